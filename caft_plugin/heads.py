"""What a head is: build heads, run one.

A head is one decoder layer of the model's own class. It is called as the model called its last layer (same
masks, rotary embeddings, position ids, packing arguments), so it needs no knowledge of the architecture.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import threading
from collections.abc import Iterator
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from caft_plugin.config import CAFTConfig, ConfigError
from caft_plugin.copies import plain_copy
from caft_plugin.fingerprint import Sample, take_sample
from caft_plugin.hidden import taken
from caft_plugin.trunk import Trunk, active_peft_configs, is_model_with_adapter, refuse_offloaded

logger = logging.getLogger(__name__)

MODULE_NAME = "caft_heads"
NOTING = "_caft_notes_its_call"  # marks the class that the last layer has while heads are on
# The paper's LoRA (section 4), for heads whose base model has no LoRA to copy the rank from.
LORA_RANK, LORA_ALPHA = 8, 16


class AuxiliaryHeads(nn.Module):
    """`layers[k - 1]` is head k, a decoder layer that predicts the token k+1 ahead.

    Heads stay in evaluation mode: they have no dropout, so they never draw from the global random generator
    and leave the base model's own dropout as it would be without them. `origin` is a sample of the layer that they were
    made over, None where it cannot be had.
    """

    def __init__(self, layers: list[nn.Module], lora: LoraConfig | None = None, origin: Sample | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.lora = lora
        self.origin = origin
        if lora is not None:
            inject_adapter_in_model(lora, self.layers, adapter_name=MODULE_NAME)
            for name, parameter in self.named_parameters():
                if ".lora_" in name:  # as PEFT does: adapters in float32 over a half-precision base
                    parameter.data = parameter.data.float()
        self.eval()

    def train(self, mode: bool = True) -> AuxiliaryHeads:
        return super().train(False)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def how(self) -> Literal["full", "lora", "frozen"]:
        """How the heads train, as `caft.train_heads` names it."""
        if self.lora is not None:
            return "lora"
        return "full" if any(p.requires_grad for p in self.parameters()) else "frozen"


def build_heads(model: nn.Module, trunk: Trunk, config: CAFTConfig, seed: int) -> AuxiliaryHeads:
    """`config.num_heads` copies of the last layer, trainable as `config.train_heads` says.

    Copies do what the layer does, its active adapters included, and are plain, dequantised, in its compute dtype.

    Raises:
        ConfigError: the layer cannot be copied, or is not at hand.
    """
    refuse_taken(trunk)
    refuse_offloaded(trunk)
    dtype = trunk.model.config.dtype
    first = plain_copy(trunk.last_layer, dtype if isinstance(dtype, torch.dtype) else None)
    layers = [first] + [copy.deepcopy(first) for _ in range(config.num_heads - 1)]
    how = config.train_heads
    if how == "auto":
        how = "lora" if is_model_with_adapter(model) else "full"
    lora = head_lora_config(model, first) if how == "lora" else None
    with own_random_numbers(next(first.parameters()).device, seed):
        heads = AuxiliaryHeads(layers, lora, take_sample(trunk))
    if how != "lora":
        for parameter in heads.parameters():
            parameter.requires_grad_(how == "full" and parameter.is_floating_point())
    return heads


@contextlib.contextmanager
def own_random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """While this is open, the generators of the CPU and of `device` go on from `seed`. The host's random streams, on
    every device, stay as they were."""
    others = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
        torch.default_generator.manual_seed(seed)
        for other in others:  # torch.manual_seed would also seed the devices whose state is not put back
            module = torch.get_device_module(other)
            with getattr(module, "device", contextlib.nullcontext)(other):  # Apple's has but one device
                module.manual_seed(seed)
        yield


def head_lora_config(model: nn.Module, layer: nn.Module) -> LoraConfig:
    """LoRA on every linear layer of a head, with the rank and alpha of the base model's LoRA, if it has one. Warns
    where much of a head is in none, such as a mixture's experts.

    Raises:
        ConfigError: the head has no linear layer that is called (nn.MultiheadAttention calls none).
    """
    linear = {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    if not linear:
        raise ConfigError(
            f"caft.train_heads: got lora, or auto beside an adapter, but {type(layer).__name__} has no linear layer to "
            "put LoRA on. Use train_heads: full or frozen."
        )
    covered = {parameter for module in linear.values() for parameter in module.parameters()}
    rest = {name: parameter.numel() for name, parameter in layer.named_parameters() if parameter not in covered}
    share = sum(rest.values()) / sum(parameter.numel() for parameter in layer.parameters())
    if share > 0.1:
        logger.warning(
            "caft.train_heads: with LoRA a head's linear layers train; %.0f %% of its weights are in none (most of "
            "them in %s) and stay as they are. Use train_heads: full to train them too.",
            100 * share,
            max(rest, key=lambda name: rest[name]),
        )
    lora = (config for config in active_peft_configs(model) if isinstance(config, LoraConfig) and config.r > 0)
    base = next(lora, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA))
    return LoraConfig(
        r=base.r,
        lora_alpha=base.lora_alpha,
        use_rslora=base.use_rslora,
        target_modules=list(linear),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )


def refuse_taken(trunk: Trunk) -> None:
    """Raises ConfigError if heads are on the last layer."""
    if hasattr(type(trunk.last_layer), NOTING):
        raise taken(trunk.model)


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of the last layer: its arguments, and the autocast it ran under (device, dtype, enabled)."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool]

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> LayerCall:
        """The call that is being made with these arguments."""
        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        return cls(args, dict(kwargs), (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)))

    @property
    def hidden_states(self) -> Tensor:
        """What the layer read: (batch, length, hidden size)."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


def run_head(layer: nn.Module, source: Tensor, call: LayerCall, positions: Tensor, checkpointing: bool) -> Tensor:
    """One head over `source` (batch, length, hidden size), before norm and unembedding, at `positions` (n,) of the
    flattened batch: (n, hidden size)."""
    if torch.is_grad_enabled() and checkpointing:
        return checkpoint(replay, layer, source, call, positions, use_reentrant=False, preserve_rng_state=False)
    return replay(layer, source, call, positions)


def replay(layer: nn.Module, source: Tensor, call: LayerCall, positions: Tensor, cache: Cache | None = None) -> Tensor:
    """Calls a head as the model called its last layer, with `source` as hidden states, and its own cache or none."""
    bound = _forward_signature(type(layer)).bind(*call.args, **call.kwargs)  # type: ignore[arg-type]
    named = dict(bound.arguments)
    extra = dict(named.get("kwargs", {}))
    first = next(iter(named))
    for arguments in (named, extra):
        for name, value in arguments.items():
            if is_cache(name, value):
                arguments[name] = cache
        if cache is None and "use_cache" in arguments:
            arguments["use_cache"] = False
    named[first] = source
    if "kwargs" in named:
        named["kwargs"] = extra

    dtype = next(p.dtype for p in layer.parameters() if p.is_floating_point())
    if not call.autocast[2] and source.dtype != dtype:
        named = tree_map(
            lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
            named,
        )
    bound.arguments.update(named)
    with only_at(positions, pointwise_parts(layer)):
        output = layer(*bound.args, **bound.kwargs)
    output = output if isinstance(output, Tensor) else output[0]
    return output.flatten(0, 1)[positions].to(source.dtype)


_turns: WeakKeyDictionary[AuxiliaryHeads, threading.Lock] = WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextlib.contextmanager
def turn_with(heads: AuxiliaryHeads) -> Iterator[None]:
    """While this is open, no other thread that takes turns runs these heads: `replay` puts hooks on them."""
    with _turns_lock:
        turn = _turns.setdefault(heads, threading.Lock())
    with turn:
        yield


def is_cache(name: str, value: object) -> bool:
    """Whether an argument of a layer is the model's cache of keys and values, which a head may not write into. Its name
    changes with the version and the family (`past_key_value(s)`, `layer_past`, `cache`, `cache_params`)."""
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return False
    name, kind = name.lower(), type(value).__name__.lower()
    return isinstance(value, Cache) or "cache" in kind or "cache" in name or "past" in name


def pointwise_parts(layer: nn.Module) -> list[nn.Module]:
    """The direct children of a decoder layer that treat each position by itself and so need not run at all of them:
    the MLP, in most families.

    A child counts where its forward takes one argument, and it has at least two linear layers, no other parameters and
    no list of modules (experts).
    """
    return [child for child in layer.children() if _is_pointwise(child)]


def _is_pointwise(module: nn.Module) -> bool:
    if len(_forward_signature(type(module)).parameters) != 1:  # type: ignore[arg-type]
        return False
    linear: list[nn.Module] = []
    inside: set[Tensor] = set()
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            return False
        if isinstance(child, (nn.Linear, Conv1D, BaseTunerLayer)):
            linear.append(child)
            inside.update(child.parameters())
    return len(linear) >= 2 and inside == set(module.parameters())


@contextlib.contextmanager
def only_at(positions: Tensor, parts: list[nn.Module]) -> Iterator[None]:
    """While this is open, `parts` are called with the given `positions` (n,) of the flattened batch alone, and their
    output is 0 at the others."""

    def pick(part: nn.Module, args: tuple) -> tuple:
        picked.append(args[0].shape[:-1])
        return (args[0].flatten(0, 1)[positions][None],)

    def spread(part: nn.Module, args: tuple, output: Tensor) -> Tensor:
        shape = picked.pop()
        everywhere = output.new_zeros(shape.numel(), output.shape[-1])
        return everywhere.index_copy(0, positions, output[0]).view(*shape, -1)

    picked: list[torch.Size] = []
    handles = [part.register_forward_pre_hook(pick) for part in parts]
    handles += [part.register_forward_hook(spread) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@functools.cache
def _forward_signature(layer_class: type[nn.Module]) -> inspect.Signature:
    signature = inspect.signature(layer_class.forward)  # type: ignore[attr-defined]
    return signature.replace(parameters=list(signature.parameters.values())[1:])

"""Build heads, and run one.

A head is one decoder layer of the model's own class. It receives exactly the arguments that the
model passed to its last layer (masks, rotary embeddings, position ids, packing), so it works with
any architecture.
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
from typing import Any, Literal, cast
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

from caft_plugin.config import CAFTConfig
from caft_plugin.errors import ConfigError
from caft_plugin.model.copies import plain_copy
from caft_plugin.model.fingerprint import Sample, take_sample
from caft_plugin.model.hidden import refuse_taken_model
from caft_plugin.model.trunk import (
    Trunk,
    active_peft_configs,
    is_model_with_adapter,
    refuse_offloaded,
)

logger = logging.getLogger(__name__)

MODULE_NAME = "caft_heads"
NOTING = "_caft_notes_its_call"  # marks the last layer's class while heads are attached
# The paper's LoRA (section 4), used if the base model has no LoRA whose rank could be copied.
LORA_RANK = 8
LORA_ALPHA = 16


class AuxiliaryHeads(nn.Module):
    """Auxiliary heads: `layers[k - 1]` is head k, a decoder layer that predicts the token k+1
    ahead.

    Heads stay in evaluation mode. Without dropout they never draw from the global random generator,
    so the base model's dropout is the same as without them. `origin` is a sample of the last layer
    they were built from, or None if it is not available.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        lora: LoraConfig | None = None,
        origin: Sample | None = None,
    ) -> None:
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
        """The heads' training mode, as in `caft.train_heads`."""
        if self.lora is not None:
            return "lora"
        return "full" if any(p.requires_grad for p in self.parameters()) else "frozen"


def build_heads(
    model: nn.Module,
    trunk: Trunk,
    config: CAFTConfig,
    seed: int,
) -> AuxiliaryHeads:
    """Build `config.num_heads` copies of the last layer, trainable as set in `config.train_heads`.

    Copies compute the same as the layer with its active adapters; they are plain, dequantised, in
    its compute dtype.

    Args:
        model: the model, PEFT-wrapped or not.
        trunk: its trunk.
        config: the number of heads, and how they train.
        seed: of the heads' LoRA factors.

    Raises:
        ConfigError: the layer cannot be copied, or is offloaded.
    """
    refuse_taken(trunk)
    refuse_offloaded(trunk)
    dtype = trunk.model.config.dtype
    first = plain_copy(trunk.last_layer, dtype if isinstance(dtype, torch.dtype) else None)
    others = [copy.deepcopy(first) for _ in range(config.num_heads - 1)]
    how = config.train_heads
    if how == "auto":
        how = "lora" if is_model_with_adapter(model) else "full"
    lora = head_lora_config(model, first) if how == "lora" else None
    with own_random_numbers(next(first.parameters()).device, seed):
        heads = AuxiliaryHeads([first, *others], lora, take_sample(trunk))
    if how != "lora":
        for parameter in heads.parameters():
            parameter.requires_grad_(how == "full" and parameter.is_floating_point())
    return heads


@contextlib.contextmanager
def own_random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the random generators of the CPU and of `device` with `seed`, and restore the host's
    afterwards."""
    others = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
        torch.default_generator.manual_seed(seed)
        # torch.manual_seed would also seed devices whose state is not restored
        for other in others:
            module = torch.get_device_module(other)
            # Apple's has only one device
            with getattr(module, "device", contextlib.nullcontext)(other):
                module.manual_seed(seed)
        yield


def head_lora_config(model: nn.Module, layer: nn.Module) -> LoraConfig:
    """Return a LoRA config for every linear layer of a head, with the rank and alpha of the base
    model's LoRA, if any.

    Warns if much of a head is not in linear layers, such as the experts of a mixture.

    Raises:
        ConfigError: the head has no linear layer that is called (nn.MultiheadAttention calls none).
    """
    linear = {name: module for name, module in layer.named_modules() if _is_called_linear(module)}
    if not linear:
        raise ConfigError(
            f"caft.train_heads: got lora, or auto with an adapter, but {type(layer).__name__} has"
            " no linear layer for LoRA. Use train_heads: full or frozen."
        )
    _warn_of_unchanged(layer, list(linear.values()))
    base = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA)
    for config in active_peft_configs(model):
        if isinstance(config, LoraConfig) and config.r > 0:
            base = config
            break
    return LoraConfig(
        r=base.r,
        lora_alpha=base.lora_alpha,
        use_rslora=base.use_rslora,
        target_modules=list(linear),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )


def _is_called_linear(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its NonDynamicallyQuantizableLinear
    is_read = isinstance(module, NonDynamicallyQuantizableLinear)
    return isinstance(module, (nn.Linear, Conv1D)) and not is_read


def _warn_of_unchanged(layer: nn.Module, linear: list[nn.Module]) -> None:
    """Warn if more than a tenth of a head's weights is not in these linear layers."""
    covered: set[Tensor] = set()
    for module in linear:
        covered.update(module.parameters())
    every = 0
    rest: dict[str, int] = {}
    for name, parameter in layer.named_parameters():
        every += parameter.numel()
        if parameter not in covered:
            rest[name] = parameter.numel()
    share = sum(rest.values()) / every
    if share > 0.1:
        logger.warning(
            "caft.train_heads: LoRA trains only a head's linear layers; %.0f %% of its weights are"
            " elsewhere (most of them in %s) and stay unchanged. Use train_heads: full to train"
            " them too.",
            100 * share,
            max(rest, key=lambda name: rest[name]),
        )


def refuse_taken(trunk: Trunk) -> None:
    """Raise ConfigError if heads are attached to the last layer."""
    refuse_taken_model(trunk.model, taken=hasattr(type(trunk.last_layer), NOTING))


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of the last layer: its arguments, and the autocast it ran under (device, dtype,
    enabled)."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool]

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> LayerCall:
        """Return the call with these arguments, under the current autocast."""
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next((tensor.device.type for tensor in tensors), "cpu")
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return cls(args, dict(kwargs), autocast)

    @property
    def hidden_states(self) -> Tensor:
        """The layer's input (batch, length, hidden size)."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


def run_head(
    layer: nn.Module,
    source: Tensor,
    call: LayerCall,
    positions: Tensor,
    checkpointing: bool,
) -> Tensor:
    """Run one head and return its hidden states (n, hidden size), before norm and unembedding.

    Args:
        layer: the head.
        source: its input (batch, length, hidden size).
        call: the model's call of its last layer, whose other arguments the head receives.
        positions: (n,) of the flattened batch, where the head's output is needed.
        checkpointing: whether to recompute the head in the backward pass.
    """
    if torch.is_grad_enabled() and checkpointing:
        return checkpoint(
            replay, layer, source, call, positions, use_reentrant=False, preserve_rng_state=False
        )
    return replay(layer, source, call, positions)


def replay(
    layer: nn.Module,
    source: Tensor,
    call: LayerCall,
    positions: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Call a head with the last layer's arguments, but `source` as hidden states, and with its own
    cache or none."""
    signature = _forward_signature(type(layer))  # type: ignore[arg-type]
    bound = signature.bind(*call.args, **call.kwargs)
    named = dict(bound.arguments)
    extra = dict(named.get("kwargs", {}))
    first = next(iter(named))
    # the model's cache is its last layer's: a head that wrote to it would change the model's text
    for arguments in (named, extra):
        _replace_cache(arguments, cache)
    named[first] = source
    if "kwargs" in named:
        named["kwargs"] = extra

    dtype = next(p.dtype for p in layer.parameters() if p.is_floating_point())
    _, _, autocasts = call.autocast
    if not autocasts and source.dtype != dtype:
        named = tree_map(functools.partial(_cast, dtype=dtype), named)
    bound.arguments.update(named)
    with only_at(positions, pointwise_parts(layer)):
        output = layer(*bound.args, **bound.kwargs)
    output = output if isinstance(output, Tensor) else output[0]
    return output.flatten(0, 1)[positions].to(source.dtype)


def _replace_cache(arguments: dict[str, object], cache: Cache | None) -> None:
    for name, value in arguments.items():
        if is_cache(name, value):
            arguments[name] = cache
    if cache is None and "use_cache" in arguments:
        arguments["use_cache"] = False


def _cast(leaf: object, dtype: torch.dtype) -> object:
    is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return cast(Tensor, leaf).to(dtype) if is_float else leaf


_turns: WeakKeyDictionary[AuxiliaryHeads, threading.Lock] = WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextlib.contextmanager
def turn_with(heads: AuxiliaryHeads) -> Iterator[None]:
    """Lock these heads for the current thread: `replay` registers hooks on them."""
    with _turns_lock:
        turn = _turns.setdefault(heads, threading.Lock())
    with turn:
        yield


def is_cache(name: str, value: object) -> bool:
    """Return True if a layer's argument is the model's KV cache, which a head must not write to.

    Its name depends on the version and the family (`past_key_value(s)`, `layer_past`, `cache`,
    `cache_params`).
    """
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return False
    name = name.lower()
    kind = type(value).__name__.lower()
    return isinstance(value, Cache) or "cache" in kind or "cache" in name or "past" in name


def pointwise_parts(layer: nn.Module) -> list[nn.Module]:
    """Return the children of a decoder layer that are pointwise, so that positions can be skipped:
    usually the MLP.

    A child is pointwise if its forward has one argument, and it has at least two linear layers, no
    other parameters and no list of modules (experts).
    """
    return [child for child in layer.children() if _is_pointwise(child)]


def _is_pointwise(module: nn.Module) -> bool:
    signature = _forward_signature(type(module))  # type: ignore[arg-type]
    if len(signature.parameters) != 1:
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
    """Run `parts` only at `positions` (n,) of the flattened batch; their output is 0 elsewhere."""

    def pick(part: nn.Module, args: tuple) -> tuple:
        picked.append(args[0].shape[:-1])
        return (args[0].flatten(0, 1)[positions][None],)

    def spread(
        part: nn.Module,
        args: tuple,
        output: Tensor,
    ) -> Tensor:
        shape = picked.pop()
        everywhere = output.new_zeros(shape.numel(), output.shape[-1])
        spread_out = everywhere.index_copy(0, positions, output[0])
        return spread_out.view(*shape, -1)

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
    _, *parameters = signature.parameters.values()  # without self
    return signature.replace(parameters=parameters)

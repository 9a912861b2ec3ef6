"""Auxiliary heads: build them, attach them to a model, run them inside its forward, take them off again.

A head is one decoder layer of the model's own class. It is called as the model called its last layer (same
masks, rotary embeddings, position ids, packing arguments), so it needs no knowledge of the architecture.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, PeftType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from caft_plugin.config import CAFTConfig, ConfigError, shown
from caft_plugin.loss import IGNORE, cross_entropy_and_hit_of, cross_entropy_of, divergence_of, weighted_sum

MODULE_NAME = "caft_heads"
NOTING = "_caft_notes_its_call"  # marks the class that the last layer has while heads are on
# The paper's LoRA (section 4), for heads whose base model has no LoRA to copy the rank from.
LORA_RANK, LORA_ALPHA = 8, 16
# Model types whose layers hand on something that a head cannot take up, and what it is.
UNFIT = {
    "rwkv": "hands a running state from layer to layer",
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "hands several hidden states for each token from layer to layer"),
}
# A forward's `logits_to_keep` for the least logits. A plain number lets Gemma 4 cut hidden states of whole layers.
LAST_POSITION = torch.tensor([-1])
# What accelerate, or a kernel, puts into an instance to have its own forward called in place of the class's.
OWN_FORWARD = ("forward", "_old_forward", "_hf_hook")


@dataclasses.dataclass(frozen=True)
class Trunk:
    """The parts of a causal language model that heads read from and write through."""

    model: PreTrainedModel
    last_layer: nn.Module
    norm: nn.Module
    unembedding: nn.Module
    transform: Callable[[Tensor], Tensor] | None
    hidden_size: int
    vocab_size: int

    @property
    def layer_class(self) -> str:
        return type(self.last_layer).__name__

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model makes of final hidden states: (..., hidden size) to (..., vocabulary)."""
        logits = self.unembedding(hidden)
        return logits if self.transform is None else self.transform(logits)


def find_trunk(model: nn.Module) -> Trunk:
    """The trunk of a (PEFT-wrapped) decoder-only transformers model.

    Raises:
        ConfigError: the model is not one that heads can be built for.
    """
    refuse_adapters(model)
    base: Any = model
    while isinstance(base, (PeftModel, PeftMixedModel)):
        base = base.get_base_model() if isinstance(base, PeftModel) else base.base_model.model
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        inside = next((f"{at} ({type(m).__name__})" for at, m in base.named_modules() if is_model(m)), None)
        raise ConfigError(
            f"caft: got a model of class {name}, but CAFT takes a transformers model (PreTrainedModel) itself, or one "
            "with an adapter of PEFT. "
            + (f"Pass its {inside} as the model" if inside else "Derive its class from PreTrainedModel")
            + ", or take the `caft:` block out."
        )
    refuse_unfit(base.config, name)
    text_config = base.config.get_text_config()
    layers, norms = None, []
    at = find_layers(base, getattr(text_config, "num_hidden_layers", None))
    if at is not None:  # the final norm lies beside the layers: the next after them, else the last before
        decoder = base.get_decoder()
        layers = decoder.get_submodule(at)
        children = list(decoder.get_submodule(at.rpartition(".")[0]).children())
        place = children.index(layers)
        near = [*children[place:], *reversed(children[:place])]
        norms = [child for child in near if "norm" in type(inmost(child)).__name__.lower()]
    unembedding = base.get_output_embeddings()
    if layers is None or not norms or unembedding is None:
        missing = [
            what
            for what, found in [
                ("list of decoder layers", layers),
                ("final norm", norms),
                ("unembedding (lm_head)", unembedding),
            ]
            if not found
        ]
        raise ConfigError(
            f"caft: {name} has no {' and no '.join(missing)} where decoder-only models have it, so CAFT cannot "
            "build heads for it. Use a decoder-only causal language model, or take the `caft:` block out."
        )
    last_layer = layers[-1]
    if isinstance(last_layer, BaseTunerLayer):
        raise _unmergeable(last_layer, "it wraps whole decoder layers")
    return Trunk(
        model=base,
        last_layer=in_use(last_layer) if isinstance(last_layer, AuxiliaryTrainingWrapper) else last_layer,
        norm=norms[0],
        unembedding=unembedding,
        transform=logit_transform(text_config),
        hidden_size=size_of(base, "hidden_size"),
        vocab_size=size_of(base, "vocab_size"),
    )


def find_layers(base: PreTrainedModel, count: int | None) -> str | None:
    """The name, in the model's decoder, of the list of decoder layers, or None. `count` is how many the config says
    there are, if it does.

    It is the list whose modules the model keeps on one device or checkpoints; else one as long as the config says.
    Lists inside of layers (experts) and lists of modules without children are none.

    Raises:
        ConfigError: several lists remain.
    """
    whole = set(getattr(base, "_no_split_modules", None) or ())

    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in whole

    lists = {
        at: [inmost(layer) for layer in module]
        for at, module in base.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and any(list(layer.children()) for layer in module)
    }
    found = [at for at, layers in lists.items() if any(map(is_layer, layers))]
    if not found:
        found = [at for at, layers in lists.items() if count in (None, len(layers))]
    found = [at for at in found if not any(at.startswith(f"{outer}.") for outer in found)]
    if len(found) > 1:
        found = [at for at in found if len(lists[at]) == count] or found
    if len(found) > 1:
        named = ", ".join(f"{at} ({len(lists[at])} {type(lists[at][-1]).__name__})" for at in found)
        raise ConfigError(
            f"caft: {type(base).__name__} has several lists that may be its decoder layers: {named}. Name the layers' "
            "class in the model's `_no_split_modules`, or take the `caft:` block out."
        )
    return found[0] if found else None


def size_of(base: PreTrainedModel, key: str) -> int:
    size = getattr(base.config.get_text_config(), key, None)
    if size is None:
        raise ConfigError(
            f"caft: {type(base.config).__name__} of {type(base).__name__} has no {key}, which heads are saved and "
            "checked with. Give the config that name (transformers' `attribute_map`), or take the `caft:` block out."
        )
    return size


def is_model(module: nn.Module) -> bool:
    return isinstance(module, (PreTrainedModel, PeftModel, PeftMixedModel))


def inmost(module: nn.Module) -> Any:
    """What PEFT has wrapped, or `module` itself."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return inmost(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def active_peft_configs(model: Any) -> list[Any]:
    """Configs of the adapters that are active, by `get_peft_model` or by the model's own `add_adapter`."""
    configs = getattr(model, "peft_config", None) or {}
    if isinstance(model, (PeftModel, PeftMixedModel)):
        names = model.active_adapters
    else:
        names = next((m.active_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)), [])
    # X-LoRA's own is not among the names: those are of the adapters that it mixes.
    return [c for name, c in configs.items() if name in names or c.peft_type == PeftType.XLORA]


def refuse_adapters(model: nn.Module) -> None:
    """Raises ConfigError if an adapter is active that heads cannot read beside, or that no copy of a layer can have."""
    for config in active_peft_configs(model):
        kind = type(config).__name__
        if getattr(config, "alora_invocation_tokens", None):
            kind += " with alora_invocation_tokens"
        if config.is_prompt_learning:
            why = "whose virtual tokens move the positions that heads read"
        elif config.peft_type == PeftType.XLORA or kind.endswith("tokens"):
            why = "whose effect follows the text, so no copy of a layer can have it"
        else:
            continue
        raise ConfigError(
            f"caft: got an adapter by PEFT's {kind}, {why}. Use an adapter on the layers alone, such as LoRA "
            "(LoraConfig), or take the `caft:` block out."
        )


def refuse_unfit(config: Any, name: str) -> None:
    """Raises ConfigError if `config` is that of a model that heads cannot follow."""
    refuse_encoder_decoder(config, name)
    if config.model_type in UNFIT:
        raise ConfigError(
            f"caft: {name} {UNFIT[config.model_type]}, which a head cannot follow. Take the `caft:` block out, or use "
            "another model."
        )


def refuse_encoder_decoder(config: Any, name: str, block: str = "caft") -> None:
    """Raises ConfigError if `config` is that of an encoder-decoder model."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{block}: {name} is an encoder-decoder model, but {block.upper()} takes decoder-only causal language "
            f"models (Llama, Qwen, Mistral, Gemma ...). Use one of these, or take the `{block}:` block out."
        )


def logit_transform(config: Any) -> Callable[[Tensor], Tensor] | None:
    """What a family does to its logits after the unembedding, or None (most families: nothing).

    Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`; Granite divides by `logits_scaling`
    and HyperCLOVA X multiplies by it; Gemma caps softly at `final_logit_softcapping` or `logits_soft_cap`.
    """
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    factor *= scaling if "hyperclovax" in config.model_type else 1 / scaling
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    if factor == 1.0 and cap is None:
        return None

    def transform(logits: Tensor) -> Tensor:
        logits = logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


class AuxiliaryHeads(nn.Module):
    """`layers[k - 1]` is head k, a decoder layer that predicts the token k+1 ahead.

    Heads stay in evaluation mode: they have no dropout, so they never draw from the global random generator
    and leave the base model's own dropout as it would be without them.
    """

    def __init__(self, layers: list[nn.Module], lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.lora = lora
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
    with torch.random.fork_rng(devices=[]):  # the host's random stream stays as it was
        torch.manual_seed(seed)
        heads = AuxiliaryHeads(layers, lora)
    if how != "lora":
        for parameter in heads.parameters():
            parameter.requires_grad_(how == "full" and parameter.is_floating_point())
    return heads


def is_model_with_adapter(model: nn.Module) -> bool:
    return isinstance(model, (PeftModel, PeftMixedModel)) or any(isinstance(m, BaseTunerLayer) for m in model.modules())


def refuse_offloaded(trunk: Trunk) -> None:
    """Raises ConfigError if accelerate keeps what heads need elsewhere and brings it for each call."""
    for name, module in trunk.model.named_modules():
        if module not in (trunk.last_layer, trunk.norm, trunk.unembedding):
            continue
        hooked = any(hasattr(part, "_hf_hook") for part in module.modules())
        if hooked and any(tensor.is_meta for tensor in module.parameters()):
            raise ConfigError(
                f"caft: accelerate keeps {name} of {type(trunk.model).__name__} on disk or in the CPU's memory "
                f"(device_map: {shown(getattr(trunk.model, 'hf_device_map', None))}), but heads are copies of the last "
                "layer and use the final norm and the unembedding at each step. Give these three a device in "
                "device_map (first layers may be elsewhere), or take the `caft:` block out."
            )


def head_lora_config(model: nn.Module, layer: nn.Module) -> LoraConfig:
    """LoRA on every linear layer of a head, with the rank and alpha of the base model's LoRA, if it has one.

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
    lora = (config for config in active_peft_configs(model) if isinstance(config, LoraConfig) and config.r > 0)
    base = next(lora, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA))
    return LoraConfig(
        r=base.r,
        lora_alpha=base.lora_alpha,
        use_rslora=base.use_rslora,
        target_modules=list(linear),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )


def plain_copy(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a decoder layer that does what the layer does, made of plain modules and tensors.

    What active adapters do is put into its weights. Hooks, and whatever was put in the place of a module's forward, are
    left out; parametrisations become their value; quantised weights are dequantised to `dtype` (the one the model was
    loaded with); all floating-point tensors take the dtype of the largest one.

    Raises:
        ConfigError: an adapter whose effect no weight can hold, or a quantisation whose weights cannot be had back.
    """
    layer = _plain(_without_hooks(layer).eval(), dtype)
    _check_plain(layer)
    largest = max((p for p in layer.parameters() if p.is_floating_point()), key=Tensor.numel)
    layer = layer.to(largest.dtype)
    layer.requires_grad_(False)
    return layer


def _without_hooks(layer: nn.Module) -> nn.Module:
    """A deep copy without hooks of any kind and without forwards of an instance's own (accelerate's, a kernel's).

    What these hold (a user's recorder, a whole model) is not copied.
    """
    memo: dict[int, Any] = {}
    for module in layer.modules():
        for name, value in vars(module).items():
            if name in OWN_FORWARD:
                memo[id(value)] = OWN_FORWARD
            elif "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
    try:
        layer = copy.deepcopy(layer, memo)
    except Exception as error:  # whatever a user has put on a layer; or torch's old weight_norm
        raise ConfigError(
            f"caft: the model's last layer ({type(layer).__name__}) cannot be copied into heads "
            f"({type(error).__name__}: {error}). Take off what is neither module nor parameter of it "
            "(torch.nn.utils.weight_norm: use torch.nn.utils.parametrizations), or take the `caft:` block out."
        ) from error
    for module in layer.modules():
        for name in OWN_FORWARD:
            module.__dict__.pop(name, None)
    return layer


def _plain(module: Any, dtype: torch.dtype | None) -> nn.Module:
    """`module` itself, made plain with all that is in it, or what takes its place."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _plain(in_use(module), dtype)
    if isinstance(module, BaseTunerLayer):
        return _merged(module, dtype)
    if type(module).__module__.startswith("peft.") and not torch.any(getattr(module, "adaption_gate", torch.ones(1))):
        return _plain(module.model, dtype)  # an adaption prompt's start
    if parametrize.is_parametrized(module):
        _take_value(module, dtype)
    if is_quantised(module):
        return dequantised_linear(module, dtype)
    for name, child in list(module.named_children()):
        setattr(module, name, _plain(child, dtype))
    return module


def in_use(wrapper: Any) -> nn.Module:
    """What a wrapper of PEFT calls: the trained copy (`modules_to_save`), or the original where adapters are off."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper._adapters for name in active):
        return wrapper.original_module
    return wrapper.token_adapter if hasattr(wrapper, "token_adapter") else wrapper.modules_to_save[active[0]]


def _take_value(module: Any, dtype: torch.dtype | None) -> None:
    """Puts plain parameters in the place of parametrised ones.

    torch's own `remove_parametrizations` changes the class, which a copy shares with its original.
    """
    values = {}
    for name, parametrisation in module.parametrizations.items():
        stored = [*parametrisation.parameters(recurse=False), *parametrisation.buffers(recurse=False)]
        value = getattr(module, name).detach().clone()
        values[name] = value if all(map(torch.is_floating_point, stored)) else value.to(dtype or value.dtype)
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _merged(tuner: Any, dtype: torch.dtype | None) -> nn.Module:
    """The base layer of a PEFT layer (which may wrap another), plain, with what active adapters do in its weights."""
    chain = [tuner]
    while isinstance(chain[-1].base_layer, BaseTunerLayer):
        chain.append(chain[-1].base_layer)
    for part in chain:
        if part.disable_adapters and part.merged:
            part.unmerge()
    inner = chain[-1]
    has_adapter_inside = isinstance(inner.base_layer, nn.MultiheadAttention)
    if not has_adapter_inside:
        theirs = inner.base_layer
        base = _plain(copy.deepcopy(theirs) if is_quantised(theirs) else theirs, dtype)  # dequantising spoils some
        if any(parameter.is_meta for parameter in base.parameters()):
            return base
        if is_plain_linear(base):
            return _with_effect(base, tuner)
        inner.base_layer = base
    try:
        for part in reversed(chain):
            merges = not part.disable_adapters and not part.merged
            if has_adapter_inside:
                return _plain(part.unload_and_optionally_merge_module(merges, False, None), dtype)
            if merges:
                part.merge()
    except NotImplementedError as error:
        raise _unmergeable(tuner, str(error)) from None
    return tuner.get_base_layer()


def is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


@torch.no_grad()
def _with_effect(base: Any, tuner: Any) -> nn.Module:
    """`base`, a linear layer, with weight and bias that do what `tuner` does, whose base layer it is or was made of.

    They are read from what `tuner` makes of the identity, so it need not know how to merge: in float32 where it can
    compute in that, as it is where it cannot (quantised, or with tensors that stay in half precision). A tuner that
    changes nothing leaves `base` as it is, to the bit.
    """
    kind, device = base.weight.dtype, base.weight.device
    exact = torch.promote_types(kind, torch.float32)
    out_in = isinstance(base, nn.Linear)
    size = base.weight.shape[1 if out_in else 0]
    layer, takes, rounding = tuner, kind, 0.02  # how far rounding may lead, of the output
    probe = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(device, exact)

    def change(rows: Tensor) -> Tensor:
        rows = rows[None].to(takes)
        return (layer(rows).to(exact) - layer.get_base_layer()(rows).to(exact))[0]

    with full_precision(), torch.random.fork_rng(devices=[]):
        if tuner.get_base_layer() is base:
            with contextlib.suppress(Exception):  # some methods hold tensors that stay in half precision
                wide = copy.deepcopy(tuner).to(exact)
                wide(probe[None])
                layer, takes, rounding = wide, exact, 1e-5
        try:
            wanted = change(probe)
        except Exception as error:  # a method that wants more than an input, each in its own way
            raise _unmergeable(tuner, f"{type(error).__name__}: {error}") from error
        if wanted.any():
            bias = change(probe.new_zeros(1, size))[0]
            identity = torch.eye(size, device=device, dtype=exact)
            weight = torch.cat([change(rows) - bias for rows in identity.split(1024)])
            off = (probe @ weight + bias - wanted).norm()
            if not off <= 0.01 * wanted.norm() + rounding * base(probe.to(kind)).norm():
                raise _unmergeable(tuner, "what it adds is not linear in its input")
            base.weight.data = (base.weight + (weight.T if out_in else weight)).to(kind)
            if bias.any():
                base.bias = nn.Parameter((bias if base.bias is None else base.bias + bias).to(kind))
    return base


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """While this is open, float32 products on a GPU are exact (no TF32)."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _unmergeable(tuner: Any, why: str) -> ConfigError:
    kind = f"{type(tuner).__module__.removeprefix('peft.tuners.').split('.')[0]} ({type(tuner).__name__})"
    return ConfigError(
        f"caft: the last layer has an adapter of PEFT's {kind}, which no weight can stand for ({why}), so the layer "
        "cannot be copied into heads. Use an adapter that can be merged, such as LoRA, or take the `caft:` block out."
    )


def _check_plain(layer: nn.Module) -> None:
    """Raises ConfigError if something in a copy is not what a plain layer has."""
    for name, module in layer.named_modules():
        if type(module).__module__.startswith("peft."):
            raise _unmergeable(module, f"{name} is not a layer that can be merged")
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            plain = type(tensor) in (nn.Parameter, Tensor)
            small = tensor.itemsize == 1 and tensor.dtype != torch.bool
            if not plain or small or (isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()):
                raise ConfigError(
                    f"caft: {key} of the last layer's {name or type(layer).__name__} ({type(module).__name__}) is a "
                    f"{type(tensor).__name__} of {tensor.dtype}, which cannot be dequantised, so the layer cannot be "
                    "copied into heads. Load the base with bitsandbytes (load_in_4bit or load_in_8bit) or unquantised."
                )


def is_quantised(module: nn.Module) -> bool:
    if hasattr(module, "qweight") or hasattr(module, "W_q"):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and type(weight) not in (nn.Parameter, Tensor)


def dequantised_linear(module: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    try:
        weight = times_identity(module) if is_packed_for_cpu(module) else dequantize_module_weight(module)
        if not weight.is_floating_point():
            raise TypeError(f"weights of type {type(weight).__name__}")
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"caft: the base model's {type(module).__name__} cannot be dequantised ({error}), so its last layer "
            "cannot be copied into heads. Load the base with bitsandbytes (load_in_4bit or load_in_8bit) or "
            "unquantised."
        ) from None
    bias = getattr(module, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone().to(dtype or weight.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def is_packed_for_cpu(module: nn.Module) -> bool:
    """bitsandbytes puts 4-bit weights into another order at the first call in evaluation mode on a CPU; its own
    dequantisation does not know that order (0.50)."""
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


@torch.no_grad()
def times_identity(module: Any) -> Tensor:
    """The weight (out, in) of a linear layer, from what it makes of the identity (the order is bfloat16's)."""
    identity = torch.eye(module.in_features, dtype=torch.bfloat16)
    weight = module(identity).T
    return weight if module.bias is None else weight - module.bias[:, None]


@dataclasses.dataclass
class Reading:
    """What heads are to compute during one loss of the host, and what came of it.

    `weights` holds the weight of each head's summed loss (num_heads,); `run` says which heads run.
    With `distribution` a head learns the base model's own next-token distribution at the position whose next token is
    its target, instead of that token; in evaluation it is measured against tokens all the same.
    With `next_tokens` (batch, length), targets of the model itself, it is called without labels and builds no logits;
    its output has their summed cross-entropy times `next_token_weight` as its loss.

    After the model was called, `loss` is the weighted sum (joined to the graph), `sums` the summed loss of each head
    (num_heads,), float32, 0 for heads that did not run, and `hits`, in evaluation, how many targets each had right.
    """

    targets: Tensor
    weights: Tensor
    run: list[bool]
    training: bool
    distribution: bool = False
    next_tokens: Tensor | None = None
    next_token_weight: Tensor | float = 1.0
    loss: Tensor | None = None
    sums: Tensor | None = None
    hits: Tensor | None = None


@dataclasses.dataclass
class _LayerCall:
    """One call of the last layer: its arguments, and the autocast it ran under."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool]


class AttachedHeads:
    """Heads for a model: a handle that puts them on and takes them off, also as a context manager.

    While they are on, the heads are the submodule `caft_heads` of `model`, so that optimizers and distributed wrappers
    see them, but they are left out of its state dict. They run in a forward hook of `model`, inside of whatever wraps
    it, and only within `reading`. While they are off, nothing of them is on the model.
    """

    def __init__(self, model: nn.Module, heads: AuxiliaryHeads, trunk: Trunk, config: CAFTConfig) -> None:
        self.model = model
        self.heads = heads
        self.trunk = trunk
        self.from_final = config.head_input == "final"
        self.apply_norm = bool(config.head_norm)
        self.hidden = HiddenSubmodule(model, MODULE_NAME, heads)
        self._handles: list[Any] = []
        self._layer_class: type | None = None
        self._noting_class: type | None = None
        self._reading: Reading | None = None
        self._call: _LayerCall | None = None
        self._final: Tensor | None = None
        self._logits_checked = False

    @property
    def attached(self) -> bool:
        return self._noting_class is not None

    def attach(self) -> AttachedHeads:
        """Puts the heads on the model. Doing it twice does no harm.

        Raises:
            ConfigError: others' heads are on the model or on its last layer.
        """
        if self.attached:
            return self
        refuse_taken(self.trunk)
        layer = self.trunk.last_layer
        self.hidden.attach()
        device = next(layer.parameters()).device
        if next(self.heads.parameters()).device != device:
            self.heads.to(device)
        self._layer_class = type(layer)
        self._noting_class = _noting(type(layer), self._note_call)
        layer.__class__ = self._noting_class
        self._handles = [
            self.trunk.norm.register_forward_hook(self._note_norm),
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
        ]
        return self

    def detach(self) -> None:
        """Takes the heads and every hook off the model. Doing it twice does no harm."""
        if self._noting_class is None or self._layer_class is None:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        layer = self.trunk.last_layer
        wrapper = type(layer)
        if wrapper is self._noting_class:
            layer.__class__ = self._layer_class
        elif self._noting_class in wrapper.__bases__:  # FSDP2 made a class of its own on top of ours
            wrapper.__bases__ = tuple(
                self._layer_class if base is self._noting_class else base for base in wrapper.__bases__
            )
        self._layer_class = self._noting_class = None
        self.hidden.detach()

    def __enter__(self) -> AttachedHeads:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextlib.contextmanager
    def reading(self, reading: Reading) -> Iterator[Reading]:
        """While this is open, the heads are on the model, and its first call (in training: the first with gradients)
        runs them."""
        with contextlib.nullcontext() if self.attached else self:
            self._reading = reading
            try:
                yield reading
            finally:
                self._reading = self._call = self._final = None

    def _wants_notes(self) -> bool:
        reading = self._reading
        if reading is None or reading.loss is not None:
            return False
        return not reading.training or torch.is_grad_enabled()

    def _note_call(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if layer is not self.trunk.last_layer or not self._wants_notes():
            return
        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._call = _LayerCall(args, dict(kwargs), autocast)

    def _note_norm(self, norm: nn.Module, args: tuple, output: Tensor) -> None:
        if self._call is not None and self._wants_notes():
            self._final = output

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._reading is None or self._reading.next_tokens is None or not self._wants_notes():
            return None
        return args, {**kwargs, "labels": None, "logits_to_keep": LAST_POSITION.clone()}

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> Any:
        reading = self._reading
        if reading is None or not self._wants_notes() or self._call is None:
            return None
        if not isinstance(output, ModelOutput):
            raise ConfigError(
                f"caft: the model returned a {type(output).__name__} instead of a ModelOutput; CAFT needs "
                "`return_dict` (the default of transformers) switched on."
            )
        call = self._call
        self._call = None  # from here on the norm serves the heads
        device, dtype, enabled = call.autocast
        trunk = self._whole_trunk(_hidden_states(call).dtype)
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            self._check_logits(output, trunk)
            if reading.next_tokens is not None:
                output["loss"] = self._next_token_loss(reading, trunk)
            with without_dropout(trunk.norm, trunk.unembedding):
                self._run(reading, call, trunk)
        assert reading.loss is not None
        return _with_aux_loss(output, reading.loss) if reading.training else None

    def _next_token_loss(self, reading: Reading, trunk: Trunk) -> Tensor:
        assert reading.next_tokens is not None
        if self._final is None:
            raise ConfigError(
                f"caft.fused_loss: {type(self.trunk.model).__name__} did not call its final norm, so the plugin cannot "
                "compute the next-token loss. Use fused_loss: off."
            )
        self._check_shape(self._final, reading.next_tokens)
        targets = reading.next_tokens.to(self._final.device).flatten()
        positions = (targets != IGNORE).nonzero().squeeze(1)
        weights = self._final.new_ones(len(positions), dtype=torch.float32) * reading.next_token_weight
        hidden = self._final.flatten(0, 1)[positions]
        return self._weighted_loss(cross_entropy_of, weights, hidden, targets[positions], trunk)[0]

    @staticmethod
    def _weighted_loss(
        of_rows: Callable[..., Any], weights: Tensor, hidden: Tensor, other: Tensor, trunk: Trunk
    ) -> tuple[Tensor, Tensor]:
        parameters = trunk.unembedding.parameters()
        return weighted_sum(of_rows(trunk.logits), weights, hidden, other, trunk.vocab_size, parameters)

    def _whole_trunk(self, dtype: torch.dtype) -> Trunk:
        """The trunk, its norm and unembedding without hooks, the user's and FSDP2's, and whole where they are sharded.

        How often they are used differs between processes (chunks of rows), so none of these uses may communicate; and
        who has a hook on them expects what the model makes of its own hidden states.
        """
        norm, unembedding = (whole_twin(module, dtype) for module in (self.trunk.norm, self.trunk.unembedding))
        return dataclasses.replace(self.trunk, norm=norm, unembedding=unembedding)

    def _check_logits(self, output: ModelOutput, trunk: Trunk) -> None:
        """Once, where the host has logits: our way from final hidden states to logits must be the model's."""
        logits = output.get("logits")
        if self._logits_checked or logits is None or self._final is None or active_dropouts(trunk.unembedding):
            return
        if logits.dim() != 3 or len(logits) != len(self._final):
            return
        self._logits_checked = True
        with torch.no_grad():
            theirs = logits[:1, -1].float()
            ours = trunk.logits(self._final[:1, -1]).float()
            same = (ours - theirs).norm() <= 0.05 * theirs.norm() + 1e-3
        if not same:
            raise ConfigError(
                f"caft: {type(self.trunk.model).__name__} makes its logits in a way that CAFT does not know, so "
                "its heads would learn something else than the model. Please report the model's name."
            )

    def _check_shape(self, hidden: Tensor, targets: Tensor) -> None:
        """Each position that is read must have its target: `hidden` (batch, length, hidden size), `targets` (batch,
        length)."""
        if hidden.shape[:-1] != targets.shape:
            raise ConfigError(
                f"caft: {type(self.trunk.model).__name__} was called with another shape than its labels have: hidden "
                f"states {tuple(hidden.shape[:-1])}, targets {tuple(targets.shape)} (batch, length), so heads would "
                "learn the wrong tokens. CAFT needs a trainer that calls the model with its batch as it is (no virtual "
                "tokens, no reshaping, no rows put together). Use one, or take the `caft:` block out."
            )

    def _run(self, reading: Reading, call: _LayerCall, trunk: Trunk) -> None:
        source = self._final if self.from_final else _hidden_states(call)
        if source is None:
            raise ConfigError(
                f"caft: {type(self.trunk.model).__name__} did not call its final norm, so heads cannot read the "
                "final hidden state. Use head_input: penultimate."
            )
        self._check_shape(source, reading.targets[0])
        device, num_heads = source.device, len(self.heads)
        zero = source.new_zeros((), dtype=torch.float32)
        rows: list[Tensor] = []
        others: list[Tensor] = []
        numbers: list[Tensor] = []  # of the head that each row belongs to
        for index, layer in enumerate(self.heads.layers):
            if not reading.run[index]:
                zero = zero + joined_zero(layer) if reading.training else zero
                continue
            targets = reading.targets[index].to(device).flatten()
            positions = (targets != IGNORE).nonzero().squeeze(1)
            rows.append(self.head_output(layer, source, call, positions))
            numbers.append(torch.full_like(positions, index))
            if reading.training and reading.distribution:
                assert self._final is not None
                others.append(self._final.detach().roll(-(index + 1), dims=1).flatten(0, 1)[positions])
            else:
                others.append(targets[positions])
        loss, sums, hits = zero, zero.new_zeros(num_heads), None
        if rows:
            hidden, number = torch.cat(rows), torch.cat(numbers)
            if self.apply_norm:
                hidden = trunk.norm(hidden)
            of_rows = cross_entropy_of if reading.training else cross_entropy_and_hit_of
            of_rows = divergence_of if reading.training and reading.distribution else of_rows
            weights = reading.weights.to(device)[number]
            total, figures = self._weighted_loss(of_rows, weights, hidden, torch.cat(others), trunk)
            loss = zero + total
            sums = sums.index_add(0, number, figures[:, 0])
            hits = None if reading.training else torch.zeros_like(sums).index_add(0, number, figures[:, 1])
        reading.loss, reading.sums, reading.hits = loss, sums, hits

    def head_output(self, layer: nn.Module, source: Tensor, call: _LayerCall, positions: Tensor) -> Tensor:
        """One head over `source` (batch, length, hidden size), before norm and unembedding, at `positions` (n,) of the
        flattened batch: (n, hidden size)."""
        if torch.is_grad_enabled() and getattr(self.trunk.model, "is_gradient_checkpointing", False):
            return checkpoint(_replay, layer, source, call, positions, use_reentrant=False, preserve_rng_state=False)
        return _replay(layer, source, call, positions)


def joined_zero(module: nn.Module) -> Tensor:
    """0, joined to the graph through every trainable tensor of `module`, as DDP needs it (FSDP2 does not)."""
    zero = torch.zeros((), device=next(module.parameters()).device)
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            zero = zero + 0.0 * parameter.sum(dtype=torch.float32)
    return zero


def whole_twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` with whole parameters and without hooks, to be used during one forward and its backward pass.

    Parameters that FSDP2 has gathered are taken as they are, and FSDP2 sends their gradient to the shards. Others are
    gathered here, once, in `dtype`, and send theirs themselves, averaged over the processes as FSDP2 does it.
    Every process has to call it.
    """
    twin: nn.Module = object.__new__(type(module))  # FSDP2's classes build another module in __new__
    twin.__dict__.update(module.__dict__)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[name] = OrderedDict()
    parameters: dict[str, Any] = {n: p if p is None else whole(p, dtype) for n, p in module._parameters.items()}
    twin._parameters = parameters
    twin._modules = {n: m if m is None else whole_twin(m, dtype) for n, m in module._modules.items()}
    return twin


def whole(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient / mesh.size())
        tensor = tensor.view_as(tensor)  # the hook is for what goes on to the shards, once
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _noting(layer_class: type, note: Callable[[nn.Module, tuple, dict[str, Any]], None]) -> type:
    """A subclass of a layer's class that tells `note` what it was called with.

    It overrides `__call__` because module hooks run inside of gradient checkpointing, where tensors are cut
    from the graph; the name stays, because wrapping policies go by it.
    """

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        note(self, args, kwargs)
        return super(noting_class, self).__call__(*args, **kwargs)  # type: ignore[arg-type]

    noting_class = type(
        layer_class.__name__,
        (layer_class,),
        {
            "__call__": __call__,
            NOTING: True,
            "__module__": layer_class.__module__,
            "__qualname__": layer_class.__qualname__,
        },
    )
    return noting_class


def _hidden_states(call: _LayerCall) -> Tensor:
    return call.args[0] if call.args else call.kwargs["hidden_states"]


def _replay(layer: nn.Module, source: Tensor, call: _LayerCall, positions: Tensor) -> Tensor:
    """Calls a head as the model called its last layer, with `source` as hidden states and without a cache."""
    bound = _forward_signature(type(layer)).bind(*call.args, **call.kwargs)  # type: ignore[arg-type]
    named = dict(bound.arguments)
    extra = dict(named.get("kwargs", {}))
    first = next(iter(named))
    for arguments in (named, extra):
        for name, value in arguments.items():
            if is_cache(name, value):
                arguments[name] = None
        if "use_cache" in arguments:
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


def is_cache(name: str, value: Any) -> bool:
    """Whether an argument of a layer is the model's cache of keys and values, which a head may not write into. Its name
    changes with the version and the family (`past_key_value(s)`, `layer_past`, `cache`, `cache_params`)."""
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return False
    name, kind = name.lower(), type(value).__name__.lower()
    return isinstance(value, Cache) or "cache" in kind or "cache" in name or "past" in name


def active_dropouts(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if m.training and "dropout" in type(m).__name__.lower()]


@contextlib.contextmanager
def without_dropout(*modules: nn.Module) -> Iterator[None]:
    """While this is open, dropout inside of `modules` (that of a LoRA on the unembedding) lets everything through and
    draws no random number."""
    dropouts = [dropout for module in modules for dropout in active_dropouts(module)]
    for dropout in dropouts:
        dropout.training = False
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.training = True


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
        whole = output.new_zeros(shape.numel(), output.shape[-1])
        return whole.index_copy(0, positions, output[0]).view(*shape, -1)

    picked: list[torch.Size] = []
    handles = [part.register_forward_pre_hook(pick) for part in parts]
    handles += [part.register_forward_hook(spread) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@functools.cache
def _forward_signature(layer_class: Any) -> inspect.Signature:
    signature = inspect.signature(layer_class.forward)  # type: ignore[attr-defined]
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.cache
def _output_class(output_class: type) -> type:
    return dataclasses.make_dataclass(
        output_class.__name__,
        [("caft_loss", Tensor | None, dataclasses.field(default=None))],
        bases=(output_class,),
    )


def _with_aux_loss(output: ModelOutput, loss: Tensor) -> ModelOutput:
    """The model's output with a field `caft_loss`: distributed wrappers look for the graph in the output."""
    return _output_class(type(output))(**dict(output.items()), caft_loss=loss)


def refuse_taken(trunk: Trunk) -> None:
    """Raises ConfigError if heads are on the last layer."""
    if hasattr(type(trunk.last_layer), NOTING):
        raise taken(trunk.model)


def taken(model: nn.Module) -> ConfigError:
    return ConfigError(
        f"caft: this {type(model).__name__} has another trainer's heads or mask token on it. Two trainers can take "
        "turns on one model, but not use it within each other's train() or evaluate(): end the other's first."
    )


class HiddenSubmodule:
    """A handle that makes a module a submodule of a model, for optimizers and distributed wrappers to find, without the
    model's state dict or `num_parameters` showing it, and takes it off again."""

    def __init__(self, model: nn.Module, name: str, module: nn.Module) -> None:
        self.model = model
        self.name = name
        self.module = module
        self._shown: Literal["all", "frozen"] | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Raises ConfigError where the model has a submodule of this name."""
        if hasattr(self.model, self.name):
            raise taken(self.model)
        self.model.add_module(self.name, self.module)
        self._handles = [
            # functools.partial, because torch sets a mark on what it is given
            self.model.register_state_dict_post_hook(functools.partial(self._hide)),
            self.model.register_load_state_dict_post_hook(self._forgive),
        ]
        if isinstance(self.model, PreTrainedModel):  # it writes its count into the index of a sharded save
            self._count = self.model.num_parameters
            self.model.num_parameters = self._num_parameters  # type: ignore[method-assign]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if getattr(self.model, self.name, None) is self.module:
            delattr(self.model, self.name)
            if isinstance(self.model, PreTrainedModel):
                vars(self.model).pop("num_parameters", None)

    def _num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As `PreTrainedModel.num_parameters`."""
        ours = sum(p.numel() for p in self.module.parameters() if p.requires_grad or not only_trainable)
        return self._count(only_trainable, exclude_embeddings) - ours

    @contextlib.contextmanager
    def in_state_dict(self, which: Literal["all", "frozen"] = "all") -> Iterator[None]:
        """While this is open, the model's state dict has the submodule, or those of its parameters that do not train.

        For whoever moves a whole model by its state dict, as accelerate does where one process has read the weights
        (FSDP2's `cpu_ram_efficient_loading`): what is not in there is never given to the other processes. And for
        torch's `ignore_frozen_params`, which takes every frozen parameter out and stops at one that is not in there.
        """
        self._shown = which
        try:
            yield
        finally:
            self._shown = None

    def _hide(self, owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        start, shown = f"{prefix}{self.name}.", set()
        if self._shown == "all":
            return
        if self._shown == "frozen":
            shown = {f"{start}{name}" for name, p in self.module.named_parameters() if not p.requires_grad}
        for key in [key for key in state if key.startswith(start) and key not in shown]:
            del state[key]

    def _forgive(self, owner: nn.Module, incompatible: Any) -> None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.startswith(f"{self.name}.")]

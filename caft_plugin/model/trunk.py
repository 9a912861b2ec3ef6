"""Find the parts of a base model that heads use: decoder layers, final norm, unembedding.

This also works for a model built from its config only, without memory for its weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from caft_plugin.errors import ConfigError, first_line, shown

logger = logging.getLogger(__name__)

# Model types whose layers pass on more than one hidden state, and what they pass on.
UNFIT = {
    "rwkv": "passes a running state from layer to layer",
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text"), "passes several hidden states per token from layer to layer"
    ),
}


@dataclasses.dataclass(frozen=True)
class Trunk:
    """The parts of a causal language model that heads use."""

    model: PreTrainedModel
    layers: Sequence[nn.Module]
    norm: nn.Module
    unembedding: nn.Module
    transform: Callable[[Tensor], Tensor] | None
    hidden_size: int
    vocab_size: int

    @property
    def last_layer(self) -> nn.Module:
        return self.layers[-1]

    @property
    def layer_class(self) -> str:
        """The class name of the decoder layers."""
        return type(self.last_layer).__name__

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., vocabulary) of final hidden states (..., hidden size)."""
        logits = self.unembedding(hidden)
        return logits if self.transform is None else self.transform(logits)


def find_trunk(model: nn.Module) -> Trunk:
    """Return the trunk of a (PEFT-wrapped) decoder-only transformers model.

    Raises:
        ConfigError: heads cannot be built for the model.
    """
    refuse_adapters(model)
    base = _transformers_model(model)
    name = type(base).__name__
    refuse_unfit(base.config, name)
    text_config = base.config.get_text_config()
    at = find_layers(base, getattr(text_config, "num_hidden_layers", None))
    layers = None if at is None else base.get_decoder().get_submodule(at)
    norm = None if at is None else _final_norm(base.get_decoder(), at)
    unembedding = base.get_output_embeddings()
    if layers is None or norm is None or unembedding is None:
        parts = {
            "list of decoder layers": layers,
            "final norm": norm,
            "unembedding (lm_head)": unembedding,
        }
        missing = [what for what, found in parts.items() if found is None]
        raise ConfigError(
            f"caft: {name} has no {' and no '.join(missing)} where decoder-only models have it, so"
            " CAFT cannot build heads for it. Use a decoder-only causal language model, or train"
            " without CAFT."
        )
    if isinstance(layers[-1], BaseTunerLayer):
        refuse_unmergeable(layers[-1], "it wraps complete decoder layers")
    return Trunk(
        model=base,
        layers=[
            in_use(layer) if isinstance(layer, AuxiliaryTrainingWrapper) else layer
            for layer in layers
        ],
        norm=norm,
        unembedding=unembedding,
        transform=logit_transform(text_config),
        hidden_size=size_of(base, "hidden_size"),
        vocab_size=size_of(base, "vocab_size"),
    )


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the model without PEFT's wrappers.

    Raises:
        ConfigError: it is not a model of transformers.
    """
    base: nn.Module = model
    while isinstance(base, (PeftModel, PeftMixedModel)):
        base = base.get_base_model() if isinstance(base, PeftModel) else base.base_model.model
    if isinstance(base, PreTrainedModel):
        return base
    inside = [f"{at} ({type(m).__name__})" for at, m in base.named_modules() if is_model(m)]
    fix = (
        f"Pass its {inside[0]} as the model" if inside else "Derive its class from PreTrainedModel"
    )
    raise ConfigError(
        f"caft: got a model of class {type(base).__name__}, but CAFT accepts a transformers model"
        f" (PreTrainedModel), with or without a PEFT adapter. {fix}, or train without CAFT."
    )


def _final_norm(decoder: nn.Module, layers: str) -> nn.Module | None:
    """Return the decoder's final norm, given the name of its list of layers.

    It is a sibling of the layers: the next norm after them, else the last one before.
    """
    siblings = list(decoder.get_submodule(layers.rpartition(".")[0]).children())
    place = siblings.index(decoder.get_submodule(layers))
    near = [*siblings[place:], *reversed(siblings[:place])]
    return next((m for m in near if "norm" in type(inmost(m)).__name__.lower()), None)


def find_layers(base: PreTrainedModel, count: int | None) -> str | None:
    """Return the name, in the model's decoder, of the list of decoder layers, or None.

    It is the list whose modules are not split over devices or can be checkpointed; else the one
    whose length is `count`, the number of layers in the config. Lists inside layers (experts) and
    lists of modules without children are ignored.

    Raises:
        ConfigError: there are several candidates.
    """
    lists = _lists_of_modules(base.get_decoder())
    unsplit = set(getattr(base, "_no_split_modules", None) or ())
    found = [at for at, layers in lists.items() if _has_layer(layers, unsplit)]
    if not found:
        found = [at for at, layers in lists.items() if count in (None, len(layers))]
    found = [at for at in found if not _is_inside(at, found)]
    as_long = [at for at in found if len(lists[at]) == count]
    found = as_long or found
    if len(found) > 1:
        each = [f"{at} ({len(lists[at])} {type(lists[at][-1]).__name__})" for at in found]
        named = ", ".join(each)
        raise ConfigError(
            f"caft: {type(base).__name__} has several lists that may be its decoder layers:"
            f" {named}. Name the layers' class in the model's `_no_split_modules`, or train without"
            " CAFT."
        )
    return found[0] if found else None


def _lists_of_modules(decoder: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules in each list of modules with children, by the list's name."""
    return {
        at: [inmost(layer) for layer in module]
        for at, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and any(list(layer.children()) for layer in module)
    }


def _has_layer(modules: Sequence[nn.Module], unsplit: set[str]) -> bool:
    return any(
        isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in unsplit
        for module in modules
    )


def _is_inside(at: str, lists: Sequence[str]) -> bool:
    """Return True if a module is inside of one of these lists, as a layer's experts are."""
    return any(at.startswith(f"{outer}.") for outer in lists)


def size_of(base: PreTrainedModel, key: str) -> int:
    size = getattr(base.config.get_text_config(), key, None)
    if size is None:
        raise ConfigError(
            f"caft: {type(base.config).__name__} of {type(base).__name__} has no {key}, which is"
            " needed to save and check heads. Add that name to the config (transformers'"
            " `attribute_map`), or train without CAFT."
        )
    return size


def input_embedding(model: nn.Module) -> nn.Embedding:
    """Return the input embedding of a (PEFT-wrapped) transformers model: an nn.Embedding, or its
    replacement."""
    host: Any = model
    return host.get_input_embeddings()


def is_model(module: nn.Module) -> bool:
    return isinstance(module, (PreTrainedModel, PeftModel, PeftMixedModel))


def inmost(module: nn.Module) -> nn.Module:
    """Return the module that PEFT has wrapped, or `module` itself."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return inmost(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def active_peft_configs(model: nn.Module) -> list[PeftConfig]:
    """Return the configs of active adapters, added by `get_peft_model` or the model's own
    `add_adapter`."""
    configs = getattr(model, "peft_config", None) or {}
    if isinstance(model, (PeftModel, PeftMixedModel)):
        names = model.active_adapters
    else:
        names = next(
            (m.active_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)), []
        )
    # X-LoRA's own config is not among the active names: these are the adapters that it mixes.
    return [c for name, c in configs.items() if name in names or c.peft_type == PeftType.XLORA]


def refuse_adapters(model: nn.Module) -> None:
    """Raise ConfigError if an active adapter moves positions, or has an effect that a copied layer
    cannot have."""
    for config in active_peft_configs(model):
        kind = type(config).__name__
        if getattr(config, "alora_invocation_tokens", None):
            kind += " with alora_invocation_tokens"
        if config.is_prompt_learning:
            why = "whose virtual tokens shift the heads' positions"
        elif config.peft_type == PeftType.XLORA or kind.endswith("tokens"):
            why = "whose effect depends on the text, so it cannot be copied with a layer"
        else:
            continue
        raise ConfigError(
            f"caft: got an adapter of PEFT's {kind}, {why}. Use an adapter that changes only"
            " layers, such as LoRA (LoraConfig), or train without CAFT."
        )


def refuse_unfit(config: PretrainedConfig, name: str) -> None:
    """Raise ConfigError if heads cannot be built for a model with this config."""
    refuse_encoder_decoder(config, name)
    if config.model_type in UNFIT:
        raise ConfigError(
            f"caft: {name} {UNFIT[config.model_type]}, which heads do not support. Use another"
            " model, or train without CAFT."
        )


def refuse_encoder_decoder(
    config: PretrainedConfig,
    name: str,
    block: str = "caft",
) -> None:
    """Raise ConfigError if `config` is an encoder-decoder model's."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{block}: {name} is an encoder-decoder model, but {block.upper()} accepts decoder-only"
            " causal language models (Llama, Qwen, Mistral, Gemma ...). Use one of these, or train"
            f" without {block.upper()}."
        )


def logit_transform(config: PretrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """Return a family's transform of its logits after the unembedding, or None (most families have
    none).

    Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`; Granite divides by
    `logits_scaling` and HyperCLOVA X multiplies by it; Gemma soft-caps at `final_logit_softcapping`
    or `logits_soft_cap`.
    """
    factor = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )
    scaling = getattr(config, "logits_scaling", None) or 1.0
    factor *= scaling if "hyperclovax" in config.model_type else 1 / scaling
    cap = getattr(config, "final_logit_softcapping", None) or getattr(
        config, "logits_soft_cap", None
    )
    if factor == 1.0 and cap is None:
        return None

    def transform(logits: Tensor) -> Tensor:
        logits = logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


def in_use(wrapper: AuxiliaryTrainingWrapper) -> nn.Module:
    """Return the module that a PEFT wrapper calls: the trained copy (`modules_to_save`), or the
    disabled original."""
    active = wrapper.active_adapters
    if (
        wrapper.disable_adapters
        or not active
        or any(name not in wrapper._adapters for name in active)
    ):
        return wrapper.original_module
    return (
        wrapper.token_adapter
        if hasattr(wrapper, "token_adapter")
        else wrapper.modules_to_save[active[0]]
    )


def is_model_with_adapter(model: nn.Module) -> bool:
    return isinstance(model, (PeftModel, PeftMixedModel)) or any(
        isinstance(m, BaseTunerLayer) for m in model.modules()
    )


def refuse_offloaded(trunk: Trunk) -> None:
    """Raise ConfigError if accelerate offloads a module that heads need."""
    for name, module in trunk.model.named_modules():
        if module not in (trunk.last_layer, trunk.norm, trunk.unembedding):
            continue
        hooked = any(hasattr(part, "_hf_hook") for part in module.modules())
        if hooked and any(tensor.is_meta for tensor in module.parameters()):
            raise ConfigError(
                f"caft: accelerate offloads {name} of {type(trunk.model).__name__} to disk or CPU"
                f" memory (device_map: {shown(getattr(trunk.model, 'hf_device_map', None))}), but"
                " heads are copies of the last layer and use the final norm and the unembedding in"
                " each step. Put these three on a device in device_map (earlier layers may be"
                " offloaded), or train without CAFT."
            )


def refuse_unmergeable(tuner: object, why: str) -> NoReturn:
    """Raise ConfigError for an adapter's module of which no plain copy can be made."""
    method = type(tuner).__module__.removeprefix("peft.tuners.").split(".")[0]
    kind = f"{method} ({type(tuner).__name__})"
    raise ConfigError(
        f"caft: the last layer has a PEFT {kind} adapter, which cannot be merged into its weights"
        f" ({why}), so the layer cannot be copied into heads. Use an adapter that can be merged,"
        " such as LoRA, or train without CAFT."
    )


def auto_class(config: PretrainedConfig, whole: bool = False) -> Any:
    """Return the transformers class that builds and loads a model with this config.

    For a vision-language model it is the text part's class; with `whole`, or if there is none, the
    complete model's.
    """
    kind = type(config)
    seeing = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and (
        whole or kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def trunk_without_weights(
    config: PretrainedConfig,
    name: str,
    build: Callable[[], nn.Module],
) -> Trunk | None:
    """Return the trunk of a model before its weights are loaded; None, with a warning, if it cannot
    be built.

    In that case the loaded model is checked.

    Args:
        config: the model's config.
        name: its name in messages.
        build: builds the model from its config; called on the meta device.

    Raises:
        ConfigError: heads cannot be built for the model.
    """
    refuse_unfit(config, name)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build()
    # a missing package, or the model's own code: loading raises it again
    except Exception as error:
        logger.warning(
            "caft: heads for %s can be checked only after its weights are loaded: it cannot be"
            " built without them (%s)",
            name,
            first_line(error),
        )
        return None
    return find_trunk(model)

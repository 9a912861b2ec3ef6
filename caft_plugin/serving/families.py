"""The model families whose heads an engine can run, and the engine's names for their layers.
Imports no engine."""

from __future__ import annotations

import dataclasses

from transformers import PretrainedConfig

from caft_plugin.errors import ConfigError, asked_as

# vLLM does not rewrite architecture names that end with "Eagle3", so its parallel drafter finds the
# draft class.
ARCHITECTURE = "CaftHeadsEagle3"
LAYERS = "vllm.model_executor.models"
QKV_BIAS = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    `layer_class` is the layer's class in transformers, `vllm_layer` its module and class in vLLM,
    `eagle3` the EAGLE-3 architecture with such a layer. `takes_vllm_config` says which of vLLM's
    two constructors the layer has.
    """

    layer_class: str
    vllm_layer: tuple[str, str]
    eagle3: str
    takes_vllm_config: bool = False
    qkv_bias: bool = False


LLAMA = (f"{LAYERS}.llama", "LlamaDecoderLayer")
FAMILIES = {
    "llama": Family("LlamaDecoderLayer", LLAMA, "LlamaForCausalLMEagle3", takes_vllm_config=True),
    "mistral": Family(
        "MistralDecoderLayer", LLAMA, "LlamaForCausalLMEagle3", takes_vllm_config=True
    ),
    "qwen2": Family(
        "Qwen2DecoderLayer",
        (f"{LAYERS}.qwen2", "Qwen2DecoderLayer"),
        "LlamaForCausalLMEagle3",
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen3DecoderLayer", (f"{LAYERS}.qwen3", "Qwen3DecoderLayer"), "Eagle3Qwen3ForCausalLM"
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model.

    Raises:
        ConfigError: no engine can run this model's heads.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"{asked_as('model')}: got a model of type {config.model_type}, but heads can be served"
            f" for {', '.join(FAMILIES)}. For other models use Drafter, in transformers."
        )
    kinds = getattr(config, "layer_types", None) or []
    window = (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )
    if "sliding_attention" in kinds[-1:] or (window is not None and not kinds):
        raise ConfigError(
            f"{asked_as('model')}: the last layer of this {config.model_type} attends to a sliding"
            f" window (sliding_window: {window}), which the engine's drafter does not support. Use"
            " Drafter, in transformers."
        )
    return family

"""Read the settings that affect memory and time from a YAML, for `caft plan`."""

from __future__ import annotations

import torch

from caft_plugin.axolotl.config_reading import Keys
from caft_plugin.config import CAFTConfig
from caft_plugin.errors import ConfigError, shown
from caft_plugin.plan.run import Run

# Keys with which Axolotl does not build the logits of the complete batch.
WITHOUT_LOGITS = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")

# Axolotl's keys that correspond to arguments of PEFT's LoraConfig.
PEFT_NAMES = {
    "lora_rank_pattern": "rank_pattern",
    "lora_target_parameters": "target_parameters",
    "peft_layers_pattern": "layers_pattern",
    "peft_layer_replication": "layer_replication",
    "peft_trainable_token_indices": "trainable_token_indices",
}
# Keys that affect memory or time and are not modelled, and what is counted instead.
_OFFLOADED = "counted as if nothing left the GPU"
_ALL = "counted as if all of it was trained"
UNCOUNTED = {
    "activation_offloading": _OFFLOADED,
    "auto_find_batch_size": "counted with micro_batch_size as written",
    "cls_model_config": "the config is read by transformers' AutoConfig",
    "fp8": "counted in the dtype set by bf16 and fp16",
    "freeze_mm_modules": _ALL,
    "gpu_memory_limit": _OFFLOADED,
    "gptq": "counted as if the base was not quantised",
    "layer_offloading": _OFFLOADED,
    "lisa_n_layers": _ALL,
    "llama4_linearized_experts": "counted with transformers' experts",
    "lora_on_cpu": _OFFLOADED,
    "max_memory": _OFFLOADED,
    "model_quantization_config": "counted as if the base was not quantised",
    "optim_target_modules": (
        "the optimizer's states are counted for all trained parameters, in full rank"
    ),
    "overrides_of_model_kwargs": "ignored",
    "ple_cpu_offload": _OFFLOADED,
    "qat": "counted without fake quantisation",
    "quantize_moe_experts": "experts are counted in the base's dtype",
    "resize_token_embeddings_to_32x": "added rows of the embeddings are not counted",
    "selective_checkpointing": "counted as set by gradient_checkpointing",
    "tiled_mlp": "MLPs are counted without tiles",
    "tokens": "added rows of the embeddings are not counted",
    "torch_compile": "counted without",
    "type_of_model": "counted as transformers' default class",
    "use_onebitllms": "counted as if the base was not quantised",
}


def read_run(keys: Keys) -> Run:
    """Return the run described by an Axolotl YAML's keys, with Axolotl's defaults for missing ones.

    Raises:
        ConfigError: there is no model, no `caft:` block, or an unsupported value.
    """
    if not isinstance(keys.get("base_model"), str):
        raise ConfigError(
            f"base_model: got {shown(keys.get('base_model'))}, but it accepts a model folder or a"
            " Hub id. Add the key."
        )
    if "caft" not in keys:
        raise ConfigError(
            "plan: the YAML has no `caft:` block, so it is a plain run without added cost. Add a"
            " line `caft:` and `plugins: [caft_plugin]`."
        )
    adapter = keys.get("adapter") or None
    if adapter not in (None, "lora", "qlora"):
        raise ConfigError(
            f"adapter: got {shown(adapter)}, but plan accepts lora, qlora or no adapter."
        )
    if keys.get("bf16", "auto") or keys.get("bfloat16"):
        dtype = torch.bfloat16
    else:
        dtype = (
            torch.float16
            if any(map(keys.get, ("fp16", "float16", "load_in_8bit")))
            else torch.float32
        )
    sharded = bool(keys.get("fsdp_config") or keys.get("fsdp"))
    attention = keys.get("attn_implementation")
    unfrozen = keys.get("unfrozen_parameters") or []
    return Run(
        model=keys["base_model"],
        config=keys.get("base_model_config"),
        revision=keys.get("revision_of_model"),
        trust_remote_code=bool(keys.get("trust_remote_code")),
        overrides=keys.get("overrides_of_model_config") or {},
        caft=CAFTConfig.read(keys["caft"]),
        dtype=dtype,
        rows=_count(keys, "micro_batch_size", 1),
        length=_count(keys, "sequence_len", 512),
        accumulation=_accumulation(keys),
        lora=None if adapter is None else _lora(keys),
        bits=4 if keys.get("load_in_4bit") else 8 if keys.get("load_in_8bit") else 16,
        checkpointing=bool(keys.get("gradient_checkpointing")),
        sharded=sharded,
        optimizer=str(keys.get("optimizer") or "adamw_torch_fused"),
        builds_logits=not any(keys.get(key) for key in WITHOUT_LOGITS),
        float32_parts=dtype != torch.float32
        and not sharded
        and not keys.get("cut_cross_entropy")
        and attention in (None, "eager", "sdpa"),
        eager=attention == "eager",
        unfrozen=[unfrozen] if isinstance(unfrozen, str) else unfrozen,
        notes=_notes(keys, sharded),
    )


def _lora(keys: Keys) -> dict[str, object]:
    """Return the arguments of PEFT's LoraConfig."""
    targets = keys.get("lora_target_modules") or []
    return {
        "r": _count(keys, "lora_r", 8),
        "lora_alpha": keys.get("lora_alpha") or 16,
        "lora_dropout": keys.get("lora_dropout") or 0.0,
        "target_modules": (
            "all-linear" if keys.get("lora_target_linear") or not targets else targets
        ),
        "modules_to_save": keys.get("lora_modules_to_save") or None,
        "layers_to_transform": keys.get("peft_layers_to_transform"),
        "use_dora": bool(keys.get("peft_use_dora")),
        **{ours: keys[theirs] for theirs, ours in PEFT_NAMES.items() if keys.get(theirs)},
    }


def _notes(keys: Keys, sharded: bool) -> list[str]:
    notes = []
    if keys.get("bf16", "auto") == "auto":
        notes.append("bf16 is auto: counted as true.")
    notes += [f"{key}: {counted}." for key, counted in UNCOUNTED.items() if keys.get(key)]
    return (
        notes
        if sharded or not keys.get("deepspeed")
        else [*notes, "deepspeed: counted without sharding."]
    )


def _accumulation(keys: Keys) -> int:
    if keys.get("gradient_accumulation_steps") is None and keys.get("batch_size") is not None:
        return max(_count(keys, "batch_size", 1) // _count(keys, "micro_batch_size", 1), 1)
    return _count(keys, "gradient_accumulation_steps", 1)


def _count(keys: Keys, key: str, default: int) -> int:
    value = keys.get(key)
    value = default if value is None else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: got {shown(value)}, but it accepts a whole number at least 1.")
    return value

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
    model = keys.get("base_model")
    if not isinstance(model, str):
        raise ConfigError(
            f"base_model: got {shown(model)}, but it accepts a model folder or a Hub id. Add the"
            " key."
        )
    if "caft" not in keys:
        raise ConfigError(
            "plan: the YAML has no `caft:` block, so it is a plain run without added cost. Add a"
            " line `caft:` and `plugins: [caft_plugin]`."
        )
    lora = _lora(keys)
    dtype = _dtype(keys)
    sharded = bool(keys.get("fsdp_config") or keys.get("fsdp"))
    unfrozen = keys.get("unfrozen_parameters") or []
    if isinstance(unfrozen, str):
        unfrozen = [unfrozen]
    return Run(
        model=model,
        config=keys.get("base_model_config"),
        revision=keys.get("revision_of_model"),
        trust_remote_code=bool(keys.get("trust_remote_code")),
        overrides=keys.get("overrides_of_model_config") or {},
        caft=CAFTConfig.read(keys["caft"]),
        dtype=dtype,
        rows=_count(keys, "micro_batch_size", 1),
        length=_count(keys, "sequence_len", 512),
        accumulation=_accumulation(keys),
        lora=lora,
        bits=_bits(keys),
        checkpointing=bool(keys.get("gradient_checkpointing")),
        sharded=sharded,
        optimizer=str(keys.get("optimizer") or "adamw_torch_fused"),
        builds_logits=not any(keys.get(key) for key in WITHOUT_LOGITS),
        float32_parts=_has_float32_parts(keys, dtype, sharded),
        eager=keys.get("attn_implementation") == "eager",
        unfrozen=unfrozen,
        notes=_notes(keys, sharded),
    )


def _dtype(keys: Keys) -> torch.dtype:
    if keys.get("bf16", "auto") or keys.get("bfloat16"):
        return torch.bfloat16
    if keys.get("fp16") or keys.get("float16") or keys.get("load_in_8bit"):
        return torch.float16
    return torch.float32


def _bits(keys: Keys) -> int:
    if keys.get("load_in_4bit"):
        return 4
    return 8 if keys.get("load_in_8bit") else 16


def _has_float32_parts(
    keys: Keys,
    dtype: torch.dtype,
    sharded: bool,
) -> bool:
    """Return True if Axolotl's loader leaves norms, embedding and unembedding in float32."""
    if dtype == torch.float32:
        return False
    # FSDP shards one dtype; Cut Cross Entropy and flash attention have no float32
    one_dtype = sharded or bool(keys.get("cut_cross_entropy"))
    return not one_dtype and keys.get("attn_implementation") in (None, "eager", "sdpa")


def _lora(keys: Keys) -> dict[str, object] | None:
    """Return the arguments of PEFT's LoraConfig, or None without an adapter."""
    adapter = keys.get("adapter") or None
    if adapter is None:
        return None
    if adapter not in ("lora", "qlora"):
        raise ConfigError(
            f"adapter: got {shown(adapter)}, but plan accepts lora, qlora or no adapter."
        )
    targets = keys.get("lora_target_modules")
    if keys.get("lora_target_linear") or not targets:
        targets = "all-linear"
    return {
        "r": _count(keys, "lora_r", 8),
        "lora_alpha": keys.get("lora_alpha") or 16,
        "lora_dropout": keys.get("lora_dropout") or 0.0,
        "target_modules": targets,
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
    if keys.get("deepspeed") and not sharded:
        notes.append("deepspeed: counted without sharding.")
    return notes


def _accumulation(keys: Keys) -> int:
    if keys.get("gradient_accumulation_steps") is not None or keys.get("batch_size") is None:
        return _count(keys, "gradient_accumulation_steps", 1)
    # Axolotl's batch_size is that of an optimisation step
    rows = _count(keys, "micro_batch_size", 1)
    return max(_count(keys, "batch_size", 1) // rows, 1)


def _count(
    keys: Keys,
    key: str,
    default: int,
) -> int:
    value = keys.get(key)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: got {shown(value)}, but it accepts a whole number at least 1.")
    return value

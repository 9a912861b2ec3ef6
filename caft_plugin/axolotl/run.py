"""A run of Axolotl, read out of its YAML without Axolotl: keys, and what left-out keys are taken to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml

from caft_plugin.config import CAFTConfig, ConfigError, shown
from caft_plugin.plan.run import Run
from caft_plugin.storage import read_text

# Keys of a YAML with which Axolotl does not build the logits of the whole batch.
WITHOUT_LOGITS = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")
Keys = dict[str, Any]  # of a YAML file


def read_keys(file: Path, command: str) -> Keys:
    """The keys of a YAML file, for a command that errors name.

    Raises:
        ConfigError: it is not a file, or not YAML, or holds no keys.
    """
    try:
        keys = yaml.safe_load(read_text(file, command, "an Axolotl YAML"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{command}: {file} is not YAML ({reason}). CONFIG takes an Axolotl YAML.") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{command}: {file} holds {shown(keys)}, but CONFIG takes an Axolotl YAML, keys and values.")
    return keys


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run has left: a model (the merged one where there is one, else the adapter or the model in the
    output folder), whether that is to be loaded in 4 bits, and the folder in which its heads are."""

    model: str
    heads: str
    in_4_bits: bool


def come_out(keys: Keys) -> Outcome:
    """Raises ConfigError where the YAML names no output_dir."""
    folder = keys.get("output_dir")
    if not isinstance(folder, str):
        raise ConfigError(f"output_dir: got {shown(folder)}, but it takes the folder that the run has written to.")
    merged = Path(folder) / "merged"
    if (merged / "config.json").is_file():
        return Outcome(str(merged), folder, in_4_bits=False)
    return Outcome(folder, folder, in_4_bits=bool(keys.get("load_in_4bit")))


def read_run(keys: Keys) -> Run:
    """What the keys of an Axolotl YAML say, left-out keys being what Axolotl takes them to be.

    Raises:
        ConfigError: there is no model, no `caft:` block, or a value that cannot be followed.
    """
    if not isinstance(keys.get("base_model"), str):
        raise ConfigError(
            f"base_model: got {shown(keys.get('base_model'))}, but it takes a model folder or a Hub id. Add the key."
        )
    if "caft" not in keys:
        raise ConfigError(
            "plan: the YAML has no `caft:` block, so it is a plain run and nothing is added to it. Add a line `caft:` "
            "(nothing below it is needed) and `plugins: [caft_plugin]`."
        )
    adapter = keys.get("adapter") or None
    if adapter not in (None, "lora", "qlora"):
        raise ConfigError(f"adapter: got {shown(adapter)}, but plan takes one of lora, qlora, or none.")
    if keys.get("bf16", "auto") or keys.get("bfloat16"):
        dtype = torch.bfloat16
    else:
        dtype = torch.float16 if any(map(keys.get, ("fp16", "float16", "load_in_8bit"))) else torch.float32
    sharded = bool(keys.get("fsdp_config") or keys.get("fsdp"))
    attention = keys.get("attn_implementation")
    unfrozen = keys.get("unfrozen_parameters") or []
    return Run(
        model=keys["base_model"],
        config=keys.get("base_model_config"),
        revision=keys.get("revision_of_model"),
        caft=CAFTConfig.read(keys["caft"]),
        dtype=dtype,
        rows=_count(keys, "micro_batch_size", 1),
        length=_count(keys, "sequence_len", 512),
        accumulation=_count(keys, "gradient_accumulation_steps", 1),
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
    """Arguments of PEFT's LoraConfig."""
    targets = keys.get("lora_target_modules") or []
    return {
        "r": _count(keys, "lora_r", 8),
        "lora_alpha": keys.get("lora_alpha") or 16,
        "lora_dropout": keys.get("lora_dropout") or 0.0,
        "target_modules": "all-linear" if keys.get("lora_target_linear") or not targets else targets,
        "modules_to_save": keys.get("lora_modules_to_save") or None,
        "layers_to_transform": keys.get("peft_layers_to_transform"),
        "use_dora": bool(keys.get("peft_use_dora")),
    }


def _notes(keys: Keys, sharded: bool) -> list[str]:
    notes = []
    if keys.get("bf16", "auto") == "auto":
        notes.append("bf16 is auto: counted as true.")
    if not sharded and keys.get("deepspeed"):
        notes.append("deepspeed: counted without sharding.")
    return notes


def _count(keys: Keys, key: str, default: int) -> int:
    value = keys.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: got {shown(value)}, but it takes a whole number at least 1.")
    return value

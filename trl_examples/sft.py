"""Fine-tune with CAFT, MEAP or both on TRL's SFTTrainer: LoRA (`--use_peft`), QLoRA (`--use_peft
--load_in_4bit`) or fully.

    accelerate launch trl_examples/sft.py \\
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \\
        --use_peft --output_dir outputs/qwen3-caft --caft --num_heads 4

`--caft` and `--meap` select the objectives, as the blocks `caft:` and `meap:` do in a YAML. Every
key of a block is an option of the same name, which selects its objective too: `--num_heads 4` is
CAFT, `--mask_ratio 0.1` MEAP. The others are TRL's (`--help` lists them).

`--dataset_name` is a data set for `datasets.load_dataset`, or a JSONL file. Without a GPU add
`--use_cpu`. Without `--bf16` or `--fp16`, training runs in bfloat16 on a GPU or a CPU with
instructions for it, and in float32 elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import load_dataset
from pydantic.fields import FieldInfo
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from caft_plugin import CAFTConfig, MEAPConfig
from caft_plugin.precision import cpu_has_bf16, quick_dtype
from caft_plugin.trl import CAFTSFTTrainer

BLOCKS: tuple[type[CAFTConfig] | type[MEAPConfig], ...] = (CAFTConfig, MEAPConfig)


@dataclasses.dataclass
class Training(SFTConfig):
    """SFTConfig, which trains in bfloat16 by default, but only where this machine computes it
    quickly."""

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = cpu_has_bf16() if self.use_cpu else quick_dtype() == torch.bfloat16
        super().__post_init__()


def options(config_class: type[CAFTConfig] | type[MEAPConfig]) -> type:
    """Return the keys of a block as a dataclass for TRL's parser; None keeps the block's own
    default."""
    fields = [option(key, field) for key, field in config_class.model_fields.items()]
    return dataclasses.make_dataclass(f"{config_class.__name__}Options", fields)


def option(key: str, field: FieldInfo) -> tuple[str, Any, Any]:
    kinds = get_args(field.annotation) or (field.annotation,)
    metadata: dict[str, Any] = {"help": field.description}
    kind: type = str
    if bool in kinds:  # the block reads its text: true, on, no ...
        metadata |= {"nargs": "?", "const": "true"}
    elif str not in kinds:
        kind = next((number for number in (int, float) if number in kinds), str)
    return key, kind | None, dataclasses.field(default=None, metadata=metadata)


def parse(arguments: list[str] | None = None) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return the script's, the training's and the model's arguments, and the configs of the
    selected objectives by block."""
    parser = TrlParser((ScriptArguments, Training, ModelConfig, *map(options, BLOCKS)))
    for config_class in BLOCKS:
        text = f"train with {config_class.block.upper()}; any of its options selects it too"
        parser.add_argument(f"--{config_class.block}", action="store_true", help=text)
    script, training, model, *blocks, selected = parser.parse_args_and_config(arguments)
    configs = {}
    for config_class, block in zip(BLOCKS, blocks, strict=True):
        keys = {key: value for key, value in vars(block).items() if value is not None}
        if is_selected(config_class.block, selected, parser) or keys:
            configs[config_class.block] = config_class(**keys)
    if not configs:
        parser.error("select an objective: --caft, --meap or both")
    return script, training, model, configs


def is_selected(name: str, selected: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    value = vars(selected)[name]
    if not isinstance(value, bool):  # of a file given as --config
        parser.error(f"{name}: got {value}, but it accepts true or false; its keys are not nested")
    return value


def load(name: str, split: str) -> Any:
    if Path(name).is_file():
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, split=split)


def how_to_load(model: ModelConfig) -> dict[str, Any]:
    kwargs = {"dtype": model.dtype or "auto", "attn_implementation": model.attn_implementation}
    if (quantization := get_quantization_config(model)) is not None:
        kwargs |= {"quantization_config": quantization}
    return kwargs


def main() -> None:
    script, training, model, configs = parse()
    training.model_init_kwargs = how_to_load(model)
    trainer = CAFTSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load(script.dataset_name, script.dataset_train_split),
        peft_config=get_peft_config(model),
        **configs,
    )
    trainer.train()
    trainer.save_model()
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()

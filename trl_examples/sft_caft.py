"""Fine-tune with CAFT on TRL's SFTTrainer: LoRA (`--use_peft`), QLoRA (`--use_peft --load_in_4bit`)
or fully.

    accelerate launch trl_examples/sft_caft.py \\
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \\
        --use_peft --output_dir outputs/qwen3-caft --num_heads 4 --beta 0.01

`--dataset_name` is a data set for `datasets.load_dataset`, or a JSONL file. Every key of the
`caft:` block is an option of the same name; the others are TRL's (`--help` lists them). Without a
GPU add `--use_cpu`. Without `--bf16` or `--fp16`, training runs in bfloat16 on a GPU or a CPU with
instructions for it, and in float32 elsewhere.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import load_dataset
from pydantic import BaseModel
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from caft_plugin import CAFTConfig
from caft_plugin.precision import cpu_has_bf16, quick_dtype
from caft_plugin.trl import CAFTSFTTrainer


@dataclasses.dataclass
class Training(SFTConfig):
    """SFTConfig, which trains in bfloat16 by default, but only where this machine computes it
    quickly."""

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = cpu_has_bf16() if self.use_cpu else quick_dtype() == torch.bfloat16
        super().__post_init__()


def options(config_class: type[BaseModel], name: str) -> type:
    """Return the keys of a config class as a dataclass for TRL's parser; None keeps the class's own
    default."""
    fields = []
    for key, field in config_class.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        kind = (
            str
            if str in kinds
            else next((kind for kind in (bool, int, float) if kind in kinds), str)
        )
        fields.append(
            (
                key,
                kind | None,
                dataclasses.field(default=None, metadata={"help": field.description}),
            )
        )
    return dataclasses.make_dataclass(name, fields)


def given(arguments: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(arguments).items() if value is not None}


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
    parser = TrlParser(
        (ScriptArguments, Training, ModelConfig, options(CAFTConfig, "CAFTArguments"))
    )
    script, training, model, caft = parser.parse_args_and_config()
    training.model_init_kwargs = how_to_load(model)
    trainer = CAFTSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load(script.dataset_name, script.dataset_train_split),
        peft_config=get_peft_config(model),
        caft=CAFTConfig(**given(caft)),
    )
    trainer.train()
    trainer.save_model()
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()

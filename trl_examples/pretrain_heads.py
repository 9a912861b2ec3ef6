"""Stage 1: train auxiliary heads on a frozen base model, once, for every later fine-tuning of it.

    accelerate launch --num_processes 1 trl_examples/pretrain_heads.py \\
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name rows.jsonl --output_dir
        outputs/qwen3-heads --bf16

`--dataset_name` is a JSONL file of `messages`, `prompt` and `completion`, or `text`. `--targets`
selects the heads' targets; the other options are those of `caft pretrain-heads` and of
`transformers.TrainingArguments` (`--help` lists them). Without a GPU add `--use_cpu`. Without
`--bf16` it computes in float32, which is about 30 times as fast as bfloat16 on a CPU without
instructions for it. `--push_to_hub --hub_model_id owner/name` uploads the heads. After an
interruption, the same command resumes the run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import TrlParser

from caft_plugin import CAFTConfig
from caft_plugin.config import PretrainConfig
from caft_plugin.model.loading import load_model, load_tokenizer
from caft_plugin.stage1.data import read_rows
from caft_plugin.stage1.pretraining import Stage1, heads_block, pretrain_heads
from caft_plugin.tools.cli import push_heads
from caft_plugin.tools.inspect_heads import describe


def key_of(config: Any, name: str) -> Any:
    """Return an option for a key of a config class; None keeps the class's default."""
    return field(default=None, metadata={"help": config.model_fields[name].description})


@dataclass
class HeadsArguments:
    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the base model."})
    dataset_name: str = field(
        metadata={"help": "JSONL file of messages, prompt and completion, or text."}
    )
    max_length: int = field(
        default=1024, metadata={"help": "Longer rows are truncated, in tokens."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the base in 4 bits (bitsandbytes NF4)."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Keep the base in 8 bits (bitsandbytes)."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the base model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the Hub."}
    )
    targets: str | None = key_of(PretrainConfig, "targets")
    max_new_tokens: int | None = key_of(PretrainConfig, "max_new_tokens")
    temperature: float | None = key_of(PretrainConfig, "temperature")
    top_p: float | None = key_of(PretrainConfig, "top_p")
    generation_batch_size: int | None = key_of(PretrainConfig, "generation_batch_size")
    heads: str | None = field(
        default=None, metadata={"help": "Train these heads further: a folder or a Hub id."}
    )
    num_heads: int | None = key_of(CAFTConfig, "num_heads")
    head_input: str | None = key_of(CAFTConfig, "head_input")
    head_norm: bool | None = key_of(CAFTConfig, "head_norm")


@dataclass
class HeadsTrainingArguments(TrainingArguments):
    learning_rate: float = field(
        default=1e-4, metadata={"help": "Initial learning rate; 1e-4 is the paper's."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})


def main() -> None:
    given, training = TrlParser((HeadsArguments, HeadsTrainingArguments)).parse_args_and_config()
    keys = {key: value for key, value in dataclasses.asdict(given).items() if value is not None}
    config = PretrainConfig(
        seed=training.seed, **{key: keys[key] for key in PretrainConfig.model_fields if key in keys}
    )
    caft = heads_block({key: keys[key] for key in CAFTConfig.model_fields if key in keys})
    tokenizer = load_tokenizer(given.model_name_or_path, given.trust_remote_code)
    rows = read_rows(Path(given.dataset_name), tokenizer, given.max_length, option="--dataset_name")
    model = load_model(
        given.model_name_or_path,
        torch.bfloat16 if training.bf16 else torch.float32,
        for_heads=True,
        load_in_4bit=given.load_in_4bit,
        load_in_8bit=given.load_in_8bit,
        attn_implementation=given.attn_implementation,
        trust_remote_code=given.trust_remote_code,
    )
    repo = (
        (training.hub_model_id or Path(training.output_dir).name) if training.push_to_hub else None
    )
    # the Trainer would upload the answers and the checkpoints' remains too
    training.push_to_hub = False
    folder = pretrain_heads(
        Stage1(model, tokenizer, rows, None, training, caft, config, given.model_name_or_path)
    )
    print(describe(folder))
    if repo:
        push_heads(folder, repo, training.hub_token)


if __name__ == "__main__":
    main()

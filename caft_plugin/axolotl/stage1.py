"""Stage 1 from an Axolotl YAML: model, tokenizer, chat template, data sets, quantisation and trainer settings."""

from __future__ import annotations

from pathlib import Path

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.loaders import load_tokenizer
from transformers import TrainingArguments

from caft_plugin.config import ConfigError, PretrainConfig
from caft_plugin.stage1.data import prompt_of
from caft_plugin.stage1.pretraining import Stage1, heads_block, load_base

# Axolotl's key, and the Trainer's name for it. What Axolotl's user left out keeps stage 1's own default.
TRAINER_KEYS = {
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "optimizer": "optim",
    "num_epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "save_total_limit": "save_total_limit",
    "seed": "seed",
    "dataloader_num_workers": "dataloader_num_workers",
}


def read_stage1(config_file: Path, options: dict[str, object], caft: dict[str, object], **keys: object) -> Stage1:
    """Everything stage 1 needs, from a YAML. What the command line gave goes before it: `options` are keys of
    `pretrain_heads:`, `caft` of `caft:`, `keys` of the YAML itself.

    The YAML's adapter is left out (the base stays as it is), its quantisation is kept.

    Raises:
        ConfigError: a key that stage 1 cannot follow.
    """
    cfg = load_cfg(str(config_file), **keys)
    if cfg.pretraining_dataset or cfg.streaming:
        raise ConfigError(
            "pretrain_heads: streamed data (`pretraining_dataset`, `streaming`) is not supported; give `datasets:`."
        )
    if cfg.processor_type:
        raise ConfigError(
            f"pretrain_heads: got processor_type: {cfg.processor_type}, but it takes rows of text alone, also for a "
            "vision-language model. Leave out `processor_type` and `skip_prepare_dataset`; give text in `datasets:`."
        )
    config = PretrainConfig(**{**dict(cfg.pretrain_heads or {}), **options})
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    settings = {ours: cfg[theirs] for theirs, ours in TRAINER_KEYS.items() if cfg[theirs] is not None}
    on_cpu = not torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=cfg.output_dir,
        bf16=bool(cfg.bf16),
        fp16=bool(cfg.fp16),
        use_cpu=on_cpu,
        report_to=[name for name in ("wandb", "mlflow") if cfg[f"use_{name}"]],
        eval_strategy="steps" if cfg.eval_steps else "no",
        eval_steps=cfg.eval_steps,
        **{"learning_rate": 1e-4, "logging_steps": 10, "save_total_limit": 2, **settings},
    )
    model = load_base(
        cfg.base_model,
        dtype=cfg.torch_dtype,
        load_in_4bit=bool(cfg.load_in_4bit),
        load_in_8bit=bool(cfg.load_in_8bit),
        attn_implementation=cfg.attn_implementation,
        trust_remote_code=bool(cfg.trust_remote_code),
        vllm=config.vllm,
    )
    return Stage1(
        model=model,
        tokenizer=load_tokenizer(cfg),
        rows=list(meta.train_dataset),
        heldout=list(meta.eval_dataset) if meta.eval_dataset is not None else None,
        arguments=arguments,
        caft=heads_block({**dict(cfg.caft or {}), **caft}),
        config=config,
        name=cfg.base_model,
    )


def read_prompts_of_tests(config_file: Path) -> list[list[int]]:
    """Token ids of the prompts in a YAML's `test_datasets`.

    Raises:
        ConfigError: there are none.
    """
    cfg = load_cfg(str(config_file))
    data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs()).eval_dataset if cfg.test_datasets else []
    prompts = [prompt for prompt in map(prompt_of, data or []) if prompt]
    if not prompts:
        raise ConfigError(
            f"--prompts: {config_file} has no test_datasets with prompts in them. Give a JSONL file of prompts that "
            "the model was not trained on."
        )
    return prompts

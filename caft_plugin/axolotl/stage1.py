"""Set up stage 1 from an Axolotl YAML: model, tokenizer, chat template, data sets, quantisation,
trainer settings."""

from __future__ import annotations

from pathlib import Path

from axolotl.cli.args import TrainerCliArgs
from axolotl.common.datasets import load_datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.logging import get_logger

from caft_plugin.axolotl.config_reading import read_config
from caft_plugin.axolotl.loading import load_frozen
from caft_plugin.axolotl.trainer_settings import refuse_keys, trainer_settings
from caft_plugin.config import PretrainConfig
from caft_plugin.stage1.pretraining import Stage1, heads_block

LOG = get_logger(__name__)


def read_stage1(
    config_file: Path,
    options: dict[str, object],
    caft: dict[str, object],
    model: str | None = None,
    **keys: object,
) -> Stage1:
    """Return the inputs of stage 1 from a YAML. Values from the command line take precedence.

    The YAML's adapter is ignored, because the base is not trained; its quantisation is used.

    Args:
        config_file: the YAML.
        options: keys of `pretrain_heads:`.
        caft: keys of `caft:`.
        model: replaces the base model.
        keys: top-level keys.

    Raises:
        ConfigError: a key that stage 1 does not support.
    """
    cfg = read_config(config_file, "pretrain-heads", **keys)
    refuse_keys(cfg)
    config = PretrainConfig(**{**dict(cfg.pretrain_heads or {}), **options})
    heads = heads_block({**dict(cfg.caft or {}), **caft})
    if cfg.sample_packing:
        LOG.warning(
            "pretrain_heads: sample_packing is ignored: stage 1 pads rows, with micro_batch_size"
            " rows per batch."
        )
    tokenizer = load_tokenizer(cfg)
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    settings = trainer_settings(cfg, tokenizer, meta.eval_dataset)
    return Stage1(
        model=load_frozen(cfg, tokenizer, model),
        tokenizer=tokenizer,
        rows=list(meta.train_dataset),
        heldout=list(meta.eval_dataset) if meta.eval_dataset is not None else None,
        arguments=settings.args,
        caft=heads,
        config=config,
        name=model or cfg.base_model,
        callbacks=settings.callbacks,
        trainer=settings.trainer,
    )

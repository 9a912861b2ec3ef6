"""Find the results of a run of `axolotl train` from its YAML: model, heads, and prompts to test
them with."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from caft_plugin.axolotl.config_reading import read_config
from caft_plugin.axolotl.loading import load_frozen
from caft_plugin.errors import ConfigError, shown
from caft_plugin.model.loading import MERGED, base_of
from caft_plugin.stage1.data import prompt_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run's config as Axolotl reads it, the folder of its saved model, and the folder with its
    heads."""

    file: Path
    cfg: DictDefault
    model: str
    heads: str

    @classmethod
    def of(cls, file: Path, command: str) -> FinishedRun:
        """Read a run's YAML.

        Raises:
            ConfigError: the YAML cannot be read or names no output_dir.
        """
        cfg = read_config(file, command)
        if not isinstance(cfg.output_dir, str):
            raise ConfigError(
                f"output_dir: got {shown(cfg.output_dir)}, but it accepts the folder that the run"
                " was saved to."
            )
        return cls(file, cfg, str(left_in(Path(cfg.output_dir))), cfg.output_dir)

    @property
    def trusts_code(self) -> bool:
        """Return True if the YAML allows the model's own code to be executed."""
        return bool(self.cfg.trust_remote_code)

    def load(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        dtype: torch.dtype,
    ) -> PreTrainedModel:
        """Load `model` (this run's, or another one) with Axolotl's loader and the YAML's
        settings."""
        # a merged model is unquantised; an adapter is loaded over the base that it was trained
        # with, quantised or not
        return load_frozen(self.cfg, tokenizer, model, dtype, quantised=base_of(model) != model)

    def prompts(self) -> list[list[int]]:
        """Return token ids of the prompts in the YAML's `test_datasets`.

        Raises:
            ConfigError: there are none.
        """
        data = (
            load_datasets(cfg=self.cfg, cli_args=TrainerCliArgs()).eval_dataset
            if self.cfg.test_datasets
            else []
        )
        prompts = [prompt for prompt in map(prompt_of, data or []) if prompt]
        if not prompts:
            raise ConfigError(
                f"--prompts: {self.file} has no test_datasets with prompts. Pass a JSONL file of"
                " prompts that the model was not trained on."
            )
        return prompts


def left_in(folder: Path) -> Path:
    """Return the folder of a run's model: the merged one if it is newer than the adapter, else the
    run's folder."""
    merged = folder / MERGED
    adapter = folder / ADAPTER_CONFIG_NAME
    if not (merged / CONFIG_NAME).is_file():
        return folder
    if adapter.is_file() and newest(merged) < newest(folder):
        logger.warning(
            "%s is older than the adapter in %s, so it belongs to an earlier run, and the adapter"
            " is used instead. Run `axolotl merge-lora` again, or pass --model",
            merged,
            folder,
        )
        return folder
    return merged


def newest(folder: Path) -> float:
    """Return the modification time of the newest weights in a folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return max((file.stat().st_mtime for file in files), default=0.0)

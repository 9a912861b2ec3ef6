"""The Axolotl plugin: reads the `caft:` block, brings the trainer class, attaches the heads."""

from __future__ import annotations

import functools
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.import_helper import get_cls_from_module_str
from axolotl.utils.logging import get_logger
from transformers import Trainer

from caft_plugin import checkpoint
from caft_plugin.config import CAFTConfig, ConfigError, PretrainConfig
from caft_plugin.heads import refuse_encoder_decoder
from caft_plugin.training import CAFTTrainerMixin, cut_up, with_caft

LOG = get_logger(__name__)

# Keys of an Axolotl config that choose another kind of training than supervised fine-tuning.
OTHER_TRAINING = ("rl", "reward_model", "process_reward_model")
# Keys that share out among processes what CAFT needs whole.
CUTTING = {
    "context_parallel_size": "sequences",
    "sequence_parallel_degree": "sequences",
    "tensor_parallel_size": "layers",
}


class CAFTPlugin(BasePlugin):
    """CAFT for `axolotl train`. Other commands (merge-lora, inference, preprocess) never build heads."""

    def __init__(self) -> None:
        super().__init__()
        self._trainer: CAFTTrainerMixin | None = None

    def register(self, cfg: Any) -> None:
        """Checks the block as the user wrote it, before Axolotl loads anything."""
        if cfg.get("pretrain_heads"):
            PretrainConfig(**_as_dict(cfg["pretrain_heads"]))
        if "caft" not in cfg:
            if "pretrain_heads" in cfg:
                return
            LOG.warning(
                "caft_plugin is listed under `plugins:` but the config has no `caft:` block, so this is a plain run. "
                "Add `caft:` (nothing below it is needed) to switch CAFT on."
            )
            return
        CAFTConfig.read(_as_dict(cfg["caft"]))
        for key in OTHER_TRAINING:
            if cfg.get(key):
                raise ConfigError(
                    f"caft: cannot be used together with `{key}: {cfg[key]}`; CAFT takes supervised fine-tuning and "
                    f"pretraining. Take out the `caft:` block or the key `{key}`."
                )
        for key, what in CUTTING.items():
            if (cfg.get(key) or 1) > 1:
                raise ConfigError(cut_up(key, cfg[key], what))
        if cfg["caft"] is None:
            cfg["caft"] = {}  # Axolotl drops keys without a value

    def get_input_args(self) -> str:
        return "caft_plugin.axolotl.schema.CAFTArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Loads nothing: the first hook of a training run alone. What can be known before data and weights are
        loaded is checked here: the kind of model, and the heads folder."""
        config = caft_config(cfg)
        if config is None or preprocess:
            return
        model_config = load_model_config(cfg)
        refuse_encoder_decoder(model_config, cfg.base_model)
        if config.heads is not None:
            folder = checkpoint.locate_heads(config.heads)
            checkpoint.check_record(checkpoint.read_record(folder), folder, config, model_config)

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        if caft_config(cfg) is None:
            return None
        for name, plugin in PluginManager.get_instance().plugins.items():
            if not isinstance(plugin, CAFTPlugin) and plugin.get_trainer_cls(cfg) is not None:
                raise ConfigError(_two_trainers(name))
        if cfg.trainer_cls:
            return axolotl_trainer(get_cls_from_module_str(cfg.trainer_cls))
        from axolotl.core.trainers import AxolotlTrainer

        return axolotl_trainer(AxolotlTrainer)

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        # Without an accelerator Axolotl refuses `bf16: true` unless told to use the CPU, which no key reaches.
        return {} if torch.accelerator.is_available() else {"use_cpu": True}

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        config = caft_config(cfg)
        if config is None:
            return
        if not isinstance(trainer, CAFTTrainerMixin):
            raise ConfigError(_two_trainers(type(trainer).__name__))
        trainer.attach_caft(config)
        self._trainer = trainer

    def post_train(self, cfg: DictDefault, model: torch.nn.Module) -> None:
        """Axolotl calls this after training, and again after its final save: the heads are saved and taken off
        before it saves the model."""
        if self._trainer is not None and self._trainer.caft is not None:
            self._trainer.save_heads(cfg.output_dir)
            self._trainer.caft.detach()
            self._trainer.caft = None
        self._trainer = None


def caft_config(cfg: DictDefault) -> CAFTConfig | None:
    return None if cfg.caft is None else CAFTConfig.read(_as_dict(cfg.caft))


def _as_dict(block: Any) -> Any:
    return dict(block) if isinstance(block, dict) else block


def _two_trainers(other: str) -> str:
    return (
        f"caft: {other} brings a trainer of its own, so CAFT cannot be trained with it. "
        "Take it out of `plugins:`, or take the `caft:` block out."
    )


@functools.cache
def axolotl_trainer(base: Any) -> type[Trainer]:
    """`with_caft(base)`, which also leaves the heads beside the model when training is interrupted."""
    caft_class = with_caft(base)

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return caft_class.train(self, *args, **kwargs)
        except SystemExit:  # Ctrl-C: Axolotl's handler has saved the model into the output folder
            self.save_heads(self.args.output_dir)
            raise

    return type(caft_class.__name__, (caft_class,), {"train": train, "__doc__": caft_class.__doc__})

"""The Axolotl plugin: reads the blocks `caft:`, `meap:` and `mtp:`, sets the trainer class,
duplicates the training set."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NoReturn

import torch
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders import ModelLoader, load_tokenizer
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import is_main_process
from axolotl.utils.import_helper import get_cls_from_module_str
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset
from transformers import Trainer

from caft_plugin.axolotl.loading import build_empty
from caft_plugin.axolotl.slips import refuse_slips
from caft_plugin.caft.heads_folder import HeadsFolder
from caft_plugin.config import CAFTConfig, MEAPConfig, MTPConfig, PretrainConfig
from caft_plugin.errors import ConfigError
from caft_plugin.meap.base_model import BaseModel, generation_config_of
from caft_plugin.meap.doubling import DoubledSet
from caft_plugin.meap.roles import Said
from caft_plugin.model.trunk import refuse_encoder_decoder, trunk_without_weights
from caft_plugin.model_card import FrameworkCard
from caft_plugin.mtp.in_training import KEY, KeptMTP
from caft_plugin.mtp.keep import Base
from caft_plugin.refusals import AXOLOTL, affected_by, refuse_settings, refuse_unfused
from caft_plugin.training import CAFTTrainerMixin, with_caft

LOG = get_logger(__name__)

# Keys that Axolotl computes from the training set, unless the user sets them.
COUNTED = ("total_num_tokens", "total_supervised_tokens", "sample_packing_eff_est")


class CAFTPlugin(BasePlugin):
    """CAFT and MEAP for `axolotl train`. Other commands (merge-lora, inference, preprocess) never
    build heads."""

    def __init__(self) -> None:
        super().__init__()
        self._trainer: CAFTTrainerMixin | None = None
        self._card: FrameworkCard | None = None
        self._doubled: DoubledSet | None = None
        self._mtp: KeptMTP | None = None
        self._mtp_of_final_save: KeptMTP | None = None

    def register(self, cfg: DictDefault) -> None:
        """Check the user's blocks before Axolotl loads anything."""
        refuse_slips(cfg)
        _read_blocks_beside_training(cfg)
        if "caft" not in cfg and "meap" not in cfg:
            if "pretrain_heads" not in cfg and "mtp" not in cfg:
                LOG.warning(
                    "caft_plugin is listed under `plugins:` but the config has neither a `caft:`"
                    " nor a `meap:` block, so this is a plain run. Add a line `caft:` to enable"
                    " CAFT with its defaults."
                )
            return
        for block, config_class in (("caft", CAFTConfig), ("meap", MEAPConfig)):
            if block not in cfg:
                continue
            config = config_class.read(_as_dict(cfg[block]))
            for asks, affected in affected_by(config):
                refuse_settings(cfg, AXOLOTL, asks, affected)
            if cfg[block] is None:
                cfg[block] = {}  # Axolotl drops keys without a value

    def get_input_args(self) -> str:
        return "caft_plugin.axolotl.schema.CAFTArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Check what can be checked before data and weights are loaded; with MEAP, load and
        duplicate the data.

        This is the first hook that is called only in training. Prepared data on disk is not
        changed.
        """
        caft = caft_config(cfg)
        meap = meap_config(cfg)
        if cfg.mtp is not None and not preprocess:
            self._mtp = KeptMTP(Base.open(cfg.base_model, KEY, cfg.revision_of_model))
        if preprocess or (caft is None and meap is None):
            return None
        trainer_class: Any = self.get_trainer_cls(cfg)
        loader = ModelLoader(cfg, None)
        if caft is None:
            refuse_encoder_decoder(loader.model_config, cfg.base_model, "meap")
        else:
            _refuse_unfit(loader, caft, trainer_class)
        if meap is None or meap.mode != "sft":
            return None
        generation = generation_config_of(cfg.base_model, cfg.revision_of_model)
        return self._duplicated_datasets(cfg, meap, BaseModel.of(loader.model_config, generation))

    def _duplicated_datasets(
        self,
        cfg: DictDefault,
        meap: MEAPConfig,
        base: BaseModel,
    ) -> TrainDatasetMeta:
        said = {key: cfg[key] for key in COUNTED}
        data = load_datasets(cfg=cfg)
        self._doubled = DoubledSet(meap, said_of_tokens(cfg))
        data.train_dataset = self._doubled.double(
            data.train_dataset, load_tokenizer(cfg), base, cfg.sequence_len
        )
        if isinstance(data.train_dataset, Dataset):
            cfg.update(said)
            # Axolotl counted them before the copies were added, and fixes the schedule with them
            steps = calculate_total_num_steps(cfg, data.train_dataset)
            data.total_num_steps = min(steps, cfg.max_steps) if cfg.max_steps else steps
        return data

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        if caft_config(cfg) is None and meap_config(cfg) is None:
            return None
        for name, plugin in PluginManager.get_instance().plugins.items():
            if not isinstance(plugin, CAFTPlugin) and plugin.get_trainer_cls(cfg) is not None:
                _refuse_other_trainer(name)
        if cfg.trainer_cls:
            return with_caft(get_cls_from_module_str(cfg.trainer_cls), framework="axolotl")
        # here, because Axolotl loads plugins before it patches what its trainers are made of
        from axolotl.core.trainers import AxolotlTrainer

        return with_caft(AxolotlTrainer)

    def get_training_args(self, cfg: DictDefault) -> dict[str, object]:
        # Without an accelerator Axolotl rejects `bf16: true` unless use_cpu is set, for which it
        # has no key.
        return {} if torch.accelerator.is_available() else {"use_cpu": True}

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        caft = caft_config(cfg)
        meap = meap_config(cfg)
        if caft is None and meap is None:
            return
        if not isinstance(trainer, CAFTTrainerMixin):
            _refuse_other_trainer(type(trainer).__name__)
        if caft is not None:
            trainer.caft_parts.attach_caft(caft)
        if meap is not None:
            doubled = self._doubled if meap.mode == "sft" else DoubledSet(meap, said_of_tokens(cfg))
            if doubled is None:
                raise ConfigError(
                    "meap: another plugin provides the training data, so examples were not"
                    " duplicated. Remove it from `plugins:`, or remove the `meap:` block."
                )
            trainer.caft_parts.attach_meap(meap, doubled)
        self._trainer = trainer
        if cfg.auto_resume_from_checkpoints and cfg.resume_from_checkpoint is None:
            # Axolotl would use the highest number, complete or not. Without a complete one, the run
            # starts over.
            cfg.resume_from_checkpoint = trainer.caft_files.newest_whole_checkpoint()
            cfg.auto_resume_from_checkpoints = False

    def post_train(self, cfg: DictDefault, model: torch.nn.Module) -> None:
        """Save the heads and remove them from the model, before Axolotl saves it; complete the
        model and its card afterwards.

        Axolotl calls this after training, and again after its final save.
        """
        if self._mtp_of_final_save is not None:
            self._mtp_of_final_save.save(Path(cfg.output_dir))
        # the processes know of each other in the first call only
        self._mtp_of_final_save = self._mtp if is_main_process() else None
        self._mtp = None
        trainer = self._trainer
        card = self._card
        self._trainer = self._card = None
        if trainer is not None:
            trainer.caft_files.save(cfg.output_dir)
            trainer.caft_parts.remove()
            if trainer.is_world_process_zero():
                self._card = trainer.caft_files.framework_card(cfg.output_dir)
        elif card is not None:
            card.complete()


def _read_blocks_beside_training(cfg: DictDefault) -> None:
    """Check the blocks that do not change how the model is trained."""
    if cfg.get("pretrain_heads"):
        PretrainConfig.read(_as_dict(cfg["pretrain_heads"]))
    if "mtp" in cfg:
        MTPConfig.read(_as_dict(cfg["mtp"]))
        cfg["mtp"] = cfg["mtp"] or {}  # Axolotl drops keys without a value


def caft_config(cfg: DictDefault) -> CAFTConfig | None:
    return None if cfg.caft is None else CAFTConfig.read(_as_dict(cfg.caft))


def meap_config(cfg: DictDefault) -> MEAPConfig | None:
    return None if cfg.meap is None else MEAPConfig.read(_as_dict(cfg.meap))


def said_of_tokens(cfg: DictDefault) -> Said:
    """Return an Axolotl config's settings of tokens. Named ones in `special_tokens:` are in the
    tokenizer."""
    special = cfg.special_tokens or {}
    overrides = cfg.added_tokens_overrides or {}
    listed = special.get("additional_special_tokens") or []
    added = [*(cfg.tokens or []), *listed, *overrides.values()]
    templates = [dataset.get("chat_template_jinja") for dataset in cfg.datasets or []]
    templates = [template for template in templates if template]
    return Said(cfg.eot_tokens or (), added, templates)


def _refuse_unfit(
    loader: ModelLoader,
    caft: CAFTConfig,
    trainer_class: type[CAFTTrainerMixin],
) -> None:
    """Raise ConfigError for a model that heads, the heads folder or `fused_loss: true` do not fit.

    Only the config of the model that Axolotl will load is read.
    """
    cfg = loader.cfg
    model_config = loader.model_config
    trunk = trunk_without_weights(
        model_config, cfg.base_model, functools.partial(build_empty, loader)
    )
    if caft.heads is not None:
        folder = HeadsFolder.open(caft.heads)
        folder.refuse_other_model(caft, model_config)
        if trunk is not None:
            folder.refuse_other_layers(trunk.layer_class)
    if trunk is not None and caft.fused_loss is True and caft.beta != 0:
        refuse_unfused(trainer_class, trunk.model, takes_logits=bool(cfg.use_eaft))


def _as_dict(block: object) -> object:
    return dict(block) if isinstance(block, dict) else block


def _refuse_other_trainer(other: str) -> NoReturn:
    raise ConfigError(
        f"caft_plugin: {other} sets its own trainer class, so CAFT and MEAP cannot be used with it."
        " Remove it from `plugins:`, or remove the `caft:` and `meap:` blocks."
    )

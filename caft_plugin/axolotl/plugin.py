"""The Axolotl plugin: reads the blocks `caft:` and `meap:`, sets the trainer class, duplicates the
training set."""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders import ModelLoader, load_tokenizer
from axolotl.utils.dict import DictDefault
from axolotl.utils.import_helper import get_cls_from_module_str
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset
from transformers import Trainer

from caft_plugin.axolotl.loading import build_empty
from caft_plugin.axolotl.slips import refuse_slips
from caft_plugin.caft.heads_folder import HeadsFolder
from caft_plugin.config import CAFTConfig, MEAPConfig, PretrainConfig
from caft_plugin.errors import ConfigError, named
from caft_plugin.meap.base_model import BaseModel, generation_config_of
from caft_plugin.meap.doubling import DoubledSet
from caft_plugin.meap.roles import Said
from caft_plugin.model.trunk import refuse_encoder_decoder, trunk_without_weights
from caft_plugin.model_card import FrameworkCard
from caft_plugin.refusals import cut_up, fsdp1, not_fused, why_not_fused, zero3
from caft_plugin.training import CAFTTrainerMixin, with_caft

LOG = get_logger(__name__)

# Keys of an Axolotl config that select training other than supervised fine-tuning.
OTHER_TRAINING = ("rl", "reward_model", "process_reward_model")
# Keys that Axolotl computes from the training set, unless the user sets them.
COUNTED = ("total_num_tokens", "total_supervised_tokens", "sample_packing_eff_est")
# Keys that split among processes what caft_plugin needs in one piece.
CUTTING = {
    "context_parallel_size": "sequences",
    "sequence_parallel_degree": "sequences",
    "tensor_parallel_size": "layers",
    "expert_parallel_size": "experts",
}


class CAFTPlugin(BasePlugin):
    """CAFT and MEAP for `axolotl train`. Other commands (merge-lora, inference, preprocess) never
    build heads."""

    def __init__(self) -> None:
        super().__init__()
        self._trainer: CAFTTrainerMixin | None = None
        self._card: FrameworkCard | None = None
        self._doubled: DoubledSet | None = None

    def register(self, cfg: DictDefault) -> None:
        """Check the user's blocks before Axolotl loads anything."""
        refuse_slips(cfg)
        if cfg.get("pretrain_heads"):
            PretrainConfig.read(_as_dict(cfg["pretrain_heads"]))
        if "caft" not in cfg and "meap" not in cfg:
            if "pretrain_heads" not in cfg:
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
            for key in OTHER_TRAINING:
                if cfg.get(key):
                    raise ConfigError(
                        f"{block}: cannot be used together with `{key}: {cfg[key]}`;"
                        f" {block.upper()} supports supervised fine-tuning and pretraining. Remove"
                        f" the `{block}:` block or the key `{key}`."
                    )
            if isinstance(config, MEAPConfig) and cfg.get("processor_type"):
                raise ConfigError(
                    f"meap: cannot be used together with `processor_type: {cfg['processor_type']}`:"
                    " Axolotl then makes tokens and labels from images and text in each batch,"
                    " where examples cannot be copied. Remove the `meap:` block or, if the data is"
                    " text only, the key `processor_type`."
                )
            if isinstance(config, MEAPConfig) and config.mode == "sft":
                _refuse_packed_stream(cfg)
            if isinstance(config, CAFTConfig) and config.beta != 0:
                _refuse_cut_up(cfg, "caft")
            if isinstance(config, MEAPConfig) and config.mask_token == "add":
                _refuse_cut_up(cfg, "meap.mask_token")
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
        if preprocess or (caft is None and meap is None):
            return None
        trainer_class: Any = self.get_trainer_cls(cfg)
        loader = ModelLoader(cfg, None)
        if caft is None:
            refuse_encoder_decoder(loader.model_config, cfg.base_model, "meap")
        else:
            _check_model(loader, caft, trainer_class)
        if meap is None or meap.mode != "sft":
            return None
        generation = generation_config_of(cfg.base_model, cfg.revision_of_model)
        return self._duplicated_datasets(cfg, meap, BaseModel.of(loader.model_config, generation))

    def _duplicated_datasets(
        self, cfg: DictDefault, meap: MEAPConfig, base: BaseModel
    ) -> TrainDatasetMeta:
        said = {key: cfg[key] for key in COUNTED}
        data = load_datasets(cfg=cfg)
        self._doubled = DoubledSet(meap, said_of_tokens(cfg))
        data.train_dataset = self._doubled.double(
            data.train_dataset, load_tokenizer(cfg), base, cfg.sequence_len
        )
        if isinstance(data.train_dataset, Dataset):
            cfg.update(said)
            steps = calculate_total_num_steps(cfg, data.train_dataset)
            data.total_num_steps = min(steps, cfg.max_steps) if cfg.max_steps else steps
        return data

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        if caft_config(cfg) is None and meap_config(cfg) is None:
            return None
        for name, plugin in PluginManager.get_instance().plugins.items():
            if not isinstance(plugin, CAFTPlugin) and plugin.get_trainer_cls(cfg) is not None:
                raise ConfigError(_two_trainers(name))
        if cfg.trainer_cls:
            return axolotl_trainer(get_cls_from_module_str(cfg.trainer_cls))
        from axolotl.core.trainers import AxolotlTrainer

        return axolotl_trainer(AxolotlTrainer)

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
            raise ConfigError(_two_trainers(type(trainer).__name__))
        if caft is not None:
            trainer.attach_caft(caft)
        if meap is not None:
            doubled = self._doubled if meap.mode == "sft" else DoubledSet(meap, said_of_tokens(cfg))
            if doubled is None:
                raise ConfigError(
                    "meap: another plugin provides the training data, so examples were not"
                    " duplicated. Remove it from `plugins:`, or remove the `meap:` block."
                )
            trainer.attach_meap(meap, doubled)
        self._trainer = trainer
        if cfg.auto_resume_from_checkpoints and cfg.resume_from_checkpoint is None:
            # Axolotl would use the highest number, complete or not. Without a complete one, the run
            # starts over.
            cfg.resume_from_checkpoint = trainer.newest_whole_checkpoint()
            cfg.auto_resume_from_checkpoints = False

    def post_train(self, cfg: DictDefault, model: torch.nn.Module) -> None:
        """Save the heads and remove them from the model, before Axolotl saves it; complete the
        model card afterwards.

        Axolotl calls this after training, and again after its final save.
        """
        trainer = self._trainer
        card = self._card
        self._trainer = self._card = None
        if trainer is not None:
            trainer.save_ours(cfg.output_dir)
            trainer.detach_ours()
            self._card = (
                trainer.framework_card(cfg.output_dir) if trainer.is_world_process_zero() else None
            )
        elif card is not None:
            card.complete()


def caft_config(cfg: DictDefault) -> CAFTConfig | None:
    return None if cfg.caft is None else CAFTConfig.read(_as_dict(cfg.caft))


def meap_config(cfg: DictDefault) -> MEAPConfig | None:
    return None if cfg.meap is None else MEAPConfig.read(_as_dict(cfg.meap))


def said_of_tokens(cfg: DictDefault) -> Said:
    """Return an Axolotl config's settings of tokens. Named ones in `special_tokens:` are in the
    tokenizer."""
    listed = (cfg.special_tokens or {}).get("additional_special_tokens") or []
    added = [*(cfg.tokens or []), *listed, *(cfg.added_tokens_overrides or {}).values()]
    templates = [dataset.get("chat_template_jinja") for dataset in cfg.datasets or []]
    return Said(cfg.eot_tokens or (), added, [template for template in templates if template])


def _refuse_packed_stream(cfg: DictDefault) -> None:
    if cfg.get("pretraining_dataset") or (cfg.get("streaming") and cfg.get("sample_packing")):
        key = "pretraining_dataset" if cfg.get("pretraining_dataset") else "streaming"
        raise ConfigError(
            f"meap.mode: got sft, but `{key}` packs its rows while it reads them, so examples"
            " cannot be duplicated. Use mode: pretrain, or `datasets:` with one of sample_packing"
            " and streaming, not both."
        )


def _refuse_cut_up(cfg: DictDefault, asks: str) -> None:
    """Raise ConfigError if processes would split what the key `asks` needs in one piece.

    `check_trainer` raises the same errors, but only after the model is loaded.
    """
    for key, what in CUTTING.items():
        if str(cfg.get(key) or 1) != "1":
            raise ConfigError(cut_up(f"{key}: {cfg[key]}", what, asks))
    deepspeed = cfg.get("deepspeed")
    if deepspeed and _zero_stage(deepspeed) == "3":
        where = f" ({named(deepspeed)})" if isinstance(deepspeed, str) else ""
        raise ConfigError(zero3(f"DeepSpeed's zero_optimization.stage: 3{where}", asks))
    if cfg.get("fsdp") or cfg.get("fsdp_config"):
        inside = cfg["fsdp_config"] if isinstance(cfg.get("fsdp_config"), dict) else {}
        said = {
            "fsdp_version": cfg.get("fsdp_version"),
            "fsdp_config.fsdp_version": inside.get("fsdp_version"),
            "fsdp_config.version": inside.get("version"),
        }
        said = {key: version for key, version in said.items() if version}
        if not said:  # Axolotl's default is version 1
            raise ConfigError(
                fsdp1(f"{'fsdp_config' if inside else 'fsdp'} without fsdp_version", asks)
            )
        for key, version in said.items():
            if str(version) != "2":
                raise ConfigError(fsdp1(f"{key}: {version}", asks))


def _zero_stage(deepspeed: str | dict) -> str:
    """Return the ZeRO stage of a DeepSpeed config: a dict or the path of a JSON file, as Axolotl
    accepts it."""
    try:
        return str(HfDeepSpeedConfig(deepspeed).get_value("zero_optimization.stage"))
    # no such file, or not JSON: Axolotl stops there itself
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _check_model(
    loader: ModelLoader, caft: CAFTConfig, trainer_class: type[CAFTTrainerMixin]
) -> None:
    """Raise ConfigError if heads, the heads folder or `fused_loss: on` do not fit the model that
    Axolotl will load.

    Only the model's config is read.
    """
    cfg = loader.cfg
    model_config = loader.model_config
    trunk = trunk_without_weights(
        model_config, cfg.base_model, functools.partial(build_empty, loader)
    )
    if caft.heads is not None:
        folder = HeadsFolder.open(caft.heads)
        folder.check_model(caft, model_config)
        if trunk is not None:
            folder.check_layers(trunk.layer_class)
    if trunk is not None and caft.fused_loss == "on" and caft.beta != 0:
        why = why_not_fused(trainer_class, trunk.model, takes_logits=bool(cfg.use_eaft))
        if why is not None:
            raise ConfigError(not_fused(why))


def _as_dict(block: object) -> object:
    return dict(block) if isinstance(block, dict) else block


def _two_trainers(other: str) -> str:
    return (
        f"caft_plugin: {other} sets its own trainer class, so CAFT and MEAP cannot be used with it."
        " Remove it from `plugins:`, or remove the `caft:` and `meap:` blocks."
    )


@functools.cache
def axolotl_trainer(base: type[Trainer]) -> type[Trainer]:
    """Return `with_caft(base)`, which also saves the heads when training is interrupted."""
    caft_class: Any = with_caft(base)

    def train(self, *args, **kwargs):
        card = self.framework_card()
        try:
            return caft_class.train(self, *args, **kwargs)
        except SystemExit:  # Ctrl-C: Axolotl's handler has saved the model into the output folder
            self.save_ours(self.args.output_dir)
            if self.is_world_process_zero():
                card.complete()
            raise

    from axolotl.core.trainers import AxolotlTrainer

    reads = (*caft_class.caft_reads_loss_alone, AxolotlTrainer)
    own = {"train": train, "caft_reads_loss_alone": reads, "__doc__": caft_class.__doc__}
    return type(caft_class.__name__, (caft_class,), own)

"""Trainers and settings that CAFT and MEAP do not support: a table for each host, and an error
message for each of them."""

from __future__ import annotations

import functools
import inspect
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, NoReturn

import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from caft_plugin.config import CAFTConfig, FusedLoss, MEAPConfig
from caft_plugin.errors import ConfigError, named

logger = logging.getLogger(__name__)

# Keys that add parameters to the model, and the name of these parameters.
ADDS = {"caft": "the heads", "meap.mask_token": "the added vector"}
# The part of a run that a host's setting affects: its objective, copies of examples, pairs of an
# example and its copy in one data set, or parameters that are added to the model.
Affected = Literal["objective", "copies", "pairs", "parameters"]


class Unsupported(NamedTuple):
    """A setting of a host that CAFT or MEAP does not support.

    `read` returns its value, given the trainer or the YAML; `is_refused` tells whether that value
    is. `message` gets the key of caft_plugin that cannot work with it, the setting and the value.
    """

    setting: str
    read: Callable[..., object]
    is_refused: Callable[..., bool]
    message: Callable[[str, str, object], str]
    affects: Affected = "parameters"


def refuse_settings(
    host: object,
    table: Iterable[Unsupported],
    asks: str,
    affected: Affected = "parameters",
) -> None:
    """Raise ConfigError for the first setting of a host that the key `asks` does not support."""
    for row in table:
        if row.affects != affected:
            continue
        value = row.read(host)
        if row.is_refused(value):
            raise ConfigError(row.message(asks, row.setting, value))


def affected_by(config: CAFTConfig | MEAPConfig) -> Iterator[tuple[str, Affected]]:
    """Yield the parts of a run with this block that a host's settings may affect, each after the
    key that asks for it."""
    yield config.block, "objective"
    if isinstance(config, CAFTConfig):
        if config.beta != 0:
            yield "caft", "parameters"
        return
    yield "meap", "copies"
    if config.mode == "sft":
        yield "meap", "pairs"
    if config.mask_token == "add":
        yield "meap.mask_token", "parameters"


# -- messages --------------------------------------------------------------------------------------


def several_gpus(
    asks: str,
    setting: str,
    value: object,
) -> str:
    return (
        f"{asks}: one process drives {value} GPUs (nn.DataParallel), which is not"
        " supported. Start one process per GPU with `accelerate launch` or `torchrun`, or"
        " select one GPU with CUDA_VISIBLE_DEVICES=0."
    )


def new_models(
    asks: str,
    setting: str,
    value: object,
) -> str:
    return (
        f"{asks}: model_init creates a new model in every train(), which would lose"
        f" {ADDS[asks]}. Pass model=..."
    )


def cut_up(
    what: str,
    asks: str,
    setting: str,
    value: object,
) -> str:
    """Return the message for a setting that splits `what` of one model among processes."""
    why = (
        "targets k ahead would be on another process"
        if what == "sequences"
        else "heads are complete layers"
    )
    if asks != "caft":
        why = f"{ADDS[asks]} was never tested there"
    return (
        f"{asks}: got {setting}: {value}, but it accepts 1: splitting the {what} of one model among"
        f" processes is not supported ({why}). Remove this setting, and split rows and weights"
        " among the processes with DDP or FSDP2."
    )


def zero3(
    asks: str,
    setting: str,
    value: object,
) -> str:
    why = "heads are copies of a layer and use the unembedding, which ZeRO-3 partitions"
    if asks != "caft":
        why = f"{ADDS[asks]} was never tested with ZeRO-3"
    return (
        f"{asks}: got {setting}: {value}, but it accepts 0, 1 or 2: {why}. Use stage 2, or FSDP2."
    )


def fsdp1(
    asks: str,
    setting: str,
    value: object,
) -> str:
    got = setting if value is True else f"{setting}: {value}"
    return (
        f"{asks}: got {got}, which is FSDP1, but it accepts FSDP2: FSDP1 hides {ADDS[asks]} in its"
        ' own modules. Set fsdp_version: 2 (Axolotl) or fsdp_config={"version": 2}'
        " (TrainingArguments), and use FSDP2's keys in fsdp_config."
    )


def other_training(
    asks: str,
    setting: str,
    value: object,
) -> str:
    return (
        f"{asks}: cannot be used together with `{setting}: {value}`; {asks.upper()} supports"
        f" supervised fine-tuning and pretraining. Remove the `{asks}:` block or the key"
        f" `{setting}`."
    )


def batches_of_images(
    asks: str,
    setting: str,
    value: object,
) -> str:
    return (
        f"{asks}: cannot be used together with `{setting}: {value}`: Axolotl then makes tokens and"
        " labels from images and text in each batch, where examples cannot be copied. Remove the"
        f" `{asks}:` block or, if the data is text only, the key `{setting}`."
    )


def packed_stream(
    asks: str,
    setting: str,
    value: object,
) -> str:
    return (
        f"{asks}.mode: got sft, but `{setting}` packs its rows while it reads them, so examples"
        " cannot be duplicated. Use mode: pretrain, or `datasets:` with one of sample_packing"
        " and streaming, not both."
    )


# -- Trainer and accelerate ------------------------------------------------------------------------


def host_name(trainer: Trainer) -> str:
    """Return the name of the class that the user passed to `with_caft`."""
    return type(trainer).__name__.removeprefix("CAFT")


def _of_accelerate(
    plugin: str,
    setting: str,
    trainer: Trainer,
) -> object:
    return getattr(getattr(trainer.accelerator.state, plugin, None), setting, None)


def _parallel_size(key: str, trainer: Trainer) -> int:
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    size = getattr(parallelism, key, None) or 1
    return max(size, trainer.get_tp_size()) if key == "tp_size" else size


def _splits(key: str, what: str) -> Unsupported:
    return Unsupported(
        f"parallelism_config.{key}",
        functools.partial(_parallel_size, key),
        lambda size: size > 1,
        functools.partial(cut_up, what),
    )


TRAINER = (
    Unsupported("n_gpu", lambda trainer: trainer.args.n_gpu, lambda gpus: gpus > 1, several_gpus),
    Unsupported("model_init", lambda trainer: trainer.model_init is not None, bool, new_models),
    Unsupported(
        "DeepSpeed's zero_optimization.stage",
        functools.partial(_of_accelerate, "deepspeed_plugin", "zero_stage"),
        lambda stage: stage == 3,
        zero3,
    ),
    Unsupported(
        "fsdp_config.version",
        functools.partial(_of_accelerate, "fsdp_plugin", "fsdp_version"),
        lambda version: version not in (None, 2),
        fsdp1,
    ),
    _splits("cp_size", "sequences"),
    _splits("sp_size", "sequences"),
    _splits("tp_size", "layers"),
)


def refuse_trainer(trainer: Trainer, asks: str = "caft") -> None:
    """Raise ConfigError if the trainer's settings do not support the parameters that the key `asks`
    adds."""
    refuse_settings(trainer, TRAINER, asks)


def refuse_optimizer(
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    block: str,
    module: nn.Module,
) -> None:
    """Raise ConfigError if the optimizer lacks trainable parameters of `module` (heads, or an added
    vector)."""
    if isinstance(optimizer, LayerWiseDummyOptimizer):  # each parameter has its own optimizer
        return
    held = {id(p) for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
    trained = [p for p in module.parameters() if p.requires_grad]
    lacking = sum(id(parameter) not in held for parameter in trained)
    if lacking:
        raise ConfigError(
            f"{block}: the optimizer {type(optimizer).__name__} of {host_name(trainer)} lacks"
            f" {lacking} of the {len(trained)} tensors that {block} trains. Let the trainer create"
            " its optimizer from all parameters of the model that require gradients"
            " (optimizer_cls_and_kwargs accepts a class and its settings), or set"
            " caft.train_heads: frozen."
        )


def refuse_without_labels(trainer: Trainer, keys: Iterable[object]) -> NoReturn:
    """Raise ConfigError for a batch with these keys."""
    raise ConfigError(
        f"caft: the batches of {host_name(trainer)} have no `labels` (batch, length), from which"
        f" the heads' targets are made; they have {', '.join(map(str, keys))}. Use a trainer for"
        " supervised fine-tuning or pretraining, such as Trainer or SFTTrainer, or train without"
        " CAFT."
    )


def refuse_step_without_heads(trainer: Trainer) -> NoReturn:
    """Raise ConfigError for a first step in which no head ran."""
    raise ConfigError(
        f"caft: {host_name(trainer)} made its first step without calling compute_loss with"
        " gradients, so the heads did not run. Use a trainer whose training_step calls"
        " compute_loss, or train without CAFT."
    )


# -- Axolotl ---------------------------------------------------------------------------------------


def _key(key: str) -> Callable[[Mapping], object]:
    return operator.methodcaller("get", key)


def _packs_a_stream(cfg: Mapping) -> bool:
    return bool(cfg.get("streaming") and cfg.get("sample_packing"))


def _splits_in_yaml(key: str, what: str) -> Unsupported:
    return Unsupported(
        key,
        lambda cfg: cfg.get(key) or 1,
        lambda size: str(size) != "1",
        functools.partial(cut_up, what),
    )


def _zero_stage(cfg: Mapping) -> str | None:
    """Return the ZeRO stage of a YAML's DeepSpeed config, and its file if it is one."""
    deepspeed = cfg.get("deepspeed")
    if not deepspeed:
        return None
    try:
        stage = HfDeepSpeedConfig(deepspeed).get_value("zero_optimization.stage")
    # no such file, or not JSON: Axolotl stops there itself
    except (ValueError, OSError, AttributeError):
        return None
    return f"{stage} ({named(deepspeed)})" if isinstance(deepspeed, str) else str(stage)


FSDP_VERSIONS = ("fsdp_version", "fsdp_config.fsdp_version", "fsdp_config.version")
NO_FSDP_VERSION = ("fsdp_config without fsdp_version", "fsdp without fsdp_version")


def _fsdp_settings(cfg: Mapping) -> dict[str, object]:
    """Return a YAML's FSDP version by each key that sets it; if none does, True by one of
    NO_FSDP_VERSION."""
    inside = cfg.get("fsdp_config")
    if not (cfg.get("fsdp") or inside):
        return {}
    inside = inside if isinstance(inside, dict) else {}
    values = (cfg.get("fsdp_version"), inside.get("fsdp_version"), inside.get("version"))
    versions = {key: value for key, value in zip(FSDP_VERSIONS, values, strict=True) if value}
    # without one, Axolotl's default is version 1
    return versions or {NO_FSDP_VERSION[0 if inside else 1]: True}


def _fsdp_in_yaml(setting: str) -> Unsupported:
    return Unsupported(
        setting,
        lambda cfg: _fsdp_settings(cfg).get(setting),
        lambda version: version is not None and str(version) != "2",
        fsdp1,
    )


AXOLOTL = (
    *(
        Unsupported(key, _key(key), bool, other_training, "objective")
        for key in ("rl", "reward_model", "process_reward_model")
    ),
    Unsupported("processor_type", _key("processor_type"), bool, batches_of_images, "copies"),
    Unsupported("pretraining_dataset", _key("pretraining_dataset"), bool, packed_stream, "pairs"),
    Unsupported("streaming", _packs_a_stream, bool, packed_stream, "pairs"),
    _splits_in_yaml("context_parallel_size", "sequences"),
    _splits_in_yaml("sequence_parallel_degree", "sequences"),
    _splits_in_yaml("tensor_parallel_size", "layers"),
    _splits_in_yaml("expert_parallel_size", "experts"),
    Unsupported(
        "DeepSpeed's zero_optimization.stage",
        _zero_stage,
        lambda stage: stage is not None and stage.partition(" ")[0] == "3",
        zero3,
    ),
    *map(_fsdp_in_yaml, (*NO_FSDP_VERSION, *FSDP_VERSIONS)),
)


# -- the fused loss --------------------------------------------------------------------------------


def _why_not_fused(
    trainer_class: type[Trainer],
    base: PreTrainedModel,
    takes_logits: bool,
) -> str | None:
    """Return why `fused_loss` cannot compute the next-token loss, or None; see `refuse_unfused`."""
    ours = "caft_reads_loss_alone"
    host = next(
        c for c in trainer_class.__mro__ if "compute_loss" in vars(c) and not hasattr(c, ours)
    )
    model = type(base).__name__
    text_config = base.config.get_text_config()
    if host not in getattr(trainer_class, ours):
        return f"{host.__name__} computes its own loss (TRL's builds no logits either)"
    if takes_logits:
        return "label smoothing and compute_loss_func need all logits"
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return f"{model} always builds all logits (its forward has no logits_to_keep)"
    if base.loss_type not in (None, "ForCausalLM") or getattr(
        text_config, "output_router_logits", False
    ):
        return f"{model} computes more than the next-token loss"
    return None


def refuse_unfused(
    trainer_class: type[Trainer],
    base: PreTrainedModel,
    takes_logits: bool,
) -> None:
    """Raise ConfigError if `fused_loss` cannot compute a model's loss in a trainer class.

    The class lists, in `caft_reads_loss_alone`, the classes whose compute_loss uses only the loss
    of a model's output.

    Args:
        trainer_class: a class made by `with_caft`.
        base: the model without adapters.
        takes_logits: whether the trainer's settings need logits.
    """
    why = _why_not_fused(trainer_class, base, takes_logits)
    if why is not None:
        raise ConfigError(f"caft.fused_loss: got true, but {why}. Use false.")


def may_fuse(
    trainer: Trainer,
    base: PreTrainedModel,
    fused_loss: FusedLoss,
) -> bool:
    """Return True if the plugin computes the next-token loss, according to `caft.fused_loss`.

    Raises:
        ConfigError: it is true, and the plugin cannot.
    """
    if not fused_loss:
        return False
    takes_logits = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    if fused_loss is True:
        refuse_unfused(type(trainer), base, takes_logits)
        return True
    why = _why_not_fused(type(trainer), base, takes_logits)
    write = "true" if why is None else f"false, because {why}"
    logger.warning(
        "caft.fused_loss: auto is deprecated, and read as true if possible, else as false."
        " For this run write %s",
        write,
    )
    return why is None

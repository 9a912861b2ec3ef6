"""Trainers and settings that CAFT and MEAP do not support, with one error message for each."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from caft_plugin.config import FusedLoss
from caft_plugin.errors import ConfigError

logger = logging.getLogger(__name__)

# Sizes in accelerate's ParallelismConfig that split something other than rows and weights among
# processes.
CUTTING = {"cp_size": "sequences", "sp_size": "sequences", "tp_size": "layers"}
# Keys that add parameters to the model, and the name of these parameters.
ADDS = {"caft": "the heads", "meap.mask_token": "the added vector"}


def host_name(trainer: Trainer) -> str:
    """Return the name of the class that the user passed to `with_caft`."""
    return type(trainer).__name__.removeprefix("CAFT")


def check_trainer(trainer: Trainer, asks: str = "caft") -> None:
    """Raise ConfigError if the trainer's settings do not support the parameters that the key `asks`
    adds."""
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"{asks}: one process drives {trainer.args.n_gpu} GPUs (nn.DataParallel), which is not"
            " supported. Start one process per GPU with `accelerate launch` or `torchrun`, or"
            " select one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    if trainer.model_init is not None:
        raise ConfigError(
            f"{asks}: model_init creates a new model in every train(), which would lose"
            f" {ADDS[asks]}. Pass model=..."
        )
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ConfigError(zero3("DeepSpeed's zero_optimization.stage: 3", asks))
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ConfigError(fsdp1(f"fsdp_config.version: {fsdp.fsdp_version}", asks))
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {key: getattr(parallelism, key, None) or 1 for key in CUTTING}
    sizes["tp_size"] = max(sizes["tp_size"], trainer.get_tp_size())
    for key, size in sizes.items():
        if size > 1:
            raise ConfigError(cut_up(f"parallelism_config.{key}: {size}", CUTTING[key], asks))


def check_optimizer(
    trainer: Trainer, optimizer: torch.optim.Optimizer, block: str, module: nn.Module
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


def no_labels(trainer: Trainer, keys: Iterable[object]) -> ConfigError:
    return ConfigError(
        f"caft: the batches of {host_name(trainer)} have no `labels` (batch, length), from which"
        f" the heads' targets are made; they have {', '.join(map(str, keys))}. Use a trainer for"
        " supervised fine-tuning or pretraining, such as Trainer or SFTTrainer, or train without"
        " CAFT."
    )


def no_heads_ran(trainer: Trainer) -> ConfigError:
    return ConfigError(
        f"caft: {host_name(trainer)} made its first step without calling compute_loss with"
        " gradients, so the heads did not run. Use a trainer whose training_step calls"
        " compute_loss, or train without CAFT."
    )


def why_not_fused(
    trainer_class: type[Trainer], base: PreTrainedModel, takes_logits: bool
) -> str | None:
    """Return why `fused_loss` cannot compute a model's next-token loss in a trainer class, or None
    if it can.

    The class lists, in `caft_reads_loss_alone`, the classes whose compute_loss uses only the loss
    of a model's output.

    Args:
        trainer_class: a class made by `with_caft`.
        base: the model without adapters.
        takes_logits: whether the trainer's settings need logits.
    """
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


def may_fuse(trainer: Trainer, base: PreTrainedModel, fused_loss: FusedLoss) -> bool:
    """Return True if the plugin computes the next-token loss, according to `caft.fused_loss`.

    Raises:
        ConfigError: it is true, and the plugin cannot.
    """
    if not fused_loss:
        return False
    takes_logits = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    why = why_not_fused(type(trainer), base, takes_logits)
    if fused_loss == "auto":
        write = "true" if why is None else f"false, because {why}"
        logger.warning(
            "caft.fused_loss: auto is deprecated, and read as true if possible, else as false."
            " For this run write %s",
            write,
        )
    elif why is not None:
        raise ConfigError(not_fused(why))
    return why is None


def not_fused(why: str) -> str:
    return f"caft.fused_loss: got true, but {why}. Use false."


def cut_up(got: str, what: str, asks: str = "caft") -> str:
    """Return the message for a setting `got` that splits one model's sequences, layers or
    experts."""
    why = (
        "targets k ahead would be on another process"
        if what == "sequences"
        else "heads are complete layers"
    )
    if asks != "caft":
        why = f"{ADDS[asks]} was never tested there"
    return (
        f"{asks}: got {got}, but it accepts 1: splitting the {what} of one model among processes is"
        f" not supported ({why}). Remove this setting, and split rows and weights among the"
        " processes with DDP or FSDP2."
    )


def zero3(got: str, asks: str = "caft") -> str:
    """Return the message for a setting `got` that selects ZeRO-3."""
    why = "heads are copies of a layer and use the unembedding, which ZeRO-3 partitions"
    if asks != "caft":
        why = f"{ADDS[asks]} was never tested with ZeRO-3"
    return f"{asks}: got {got}, but it accepts 0, 1 or 2: {why}. Use stage 2, or FSDP2."


def fsdp1(got: str, asks: str = "caft") -> str:
    """Return the message for a setting `got` that selects FSDP1."""
    return (
        f"{asks}: got {got}, which is FSDP1, but it accepts FSDP2: FSDP1 hides {ADDS[asks]} in its"
        ' own modules. Set fsdp_version: 2 (Axolotl) or fsdp_config={"version": 2}'
        " (TrainingArguments), and use FSDP2's keys in fsdp_config."
    )

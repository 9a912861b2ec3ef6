"""Trainers and settings that CAFT and MEAP refuse, in the same words wherever they are met."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from caft_plugin.config import ConfigError, FusedLoss

logger = logging.getLogger(__name__)

# What accelerate's ParallelismConfig can share out among processes besides rows and weights.
CUTTING = {"cp_size": "sequences", "sp_size": "sequences", "tp_size": "layers"}
# Keys that add parameters to the model, and which.
ADDS = {"caft": "the heads", "meap.mask_token": "the added vector"}


def host_name(trainer: Trainer) -> str:
    """The name of the class that a user gave to `with_caft`."""
    return type(trainer).__name__.removeprefix("CAFT")


def check_trainer(trainer: Trainer, asks: str = "caft") -> None:
    """Raises ConfigError where the trainer's settings do not go with what `asks`, a key of ours, adds to the model."""
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"{asks}: one process drives {trainer.args.n_gpu} GPUs (nn.DataParallel), which is not supported. "
            "Start one process a GPU with `accelerate launch` or `torchrun`, or show it one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if trainer.model_init is not None:
        raise ConfigError(
            f"{asks}: model_init makes a new model at every train(), which would lose {ADDS[asks]}. Pass model=..."
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


def check_optimizer(trainer: Trainer, optimizer: torch.optim.Optimizer, block: str, module: nn.Module) -> None:
    """Raises ConfigError where the optimizer lacks what `block` is to train of `module`, heads or an added vector."""
    if isinstance(optimizer, LayerWiseDummyOptimizer):  # each parameter has an optimizer of its own
        return
    held = {id(p) for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
    trained = [p for p in module.parameters() if p.requires_grad]
    lacking = sum(id(parameter) not in held for parameter in trained)
    if lacking:
        raise ConfigError(
            f"{block}: the optimizer {type(optimizer).__name__} of {host_name(trainer)} lacks {lacking} of the "
            f"{len(trained)} tensors that {block} is to train. Let the trainer make its optimizer from all "
            "parameters of the model that require gradients (optimizer_cls_and_kwargs takes a class and its "
            "settings), or set caft.train_heads: frozen."
        )


def no_labels(trainer: Trainer, keys: Iterable[object]) -> ConfigError:
    return ConfigError(
        f"caft: the batches of {host_name(trainer)} have no `labels` (batch, length), in which heads would find "
        f"the tokens ahead; they have {', '.join(map(str, keys))}. Use a trainer of supervised fine-tuning "
        "or pretraining, such as Trainer or SFTTrainer, or take the `caft:` block out."
    )


def no_heads_ran(trainer: Trainer) -> ConfigError:
    return ConfigError(
        f"caft: {host_name(trainer)} made its first step without computing its loss through compute_loss with "
        "gradients, so the heads did not run. Use a trainer whose training_step calls compute_loss, or "
        "take the `caft:` block out."
    )


def why_not_fused(trainer_class: type[Trainer], base: PreTrainedModel, takes_logits: bool) -> str | None:
    """Why `fused_loss` cannot compute the next-token loss of a model in a class of `with_caft`, None where it can.

    The class names, in `caft_reads_loss_alone`, the classes whose compute_loss takes of a model's output nothing but
    its loss.
    """
    ours = "caft_reads_loss_alone"
    host = next(c for c in trainer_class.__mro__ if "compute_loss" in vars(c) and not hasattr(c, ours))
    model, text_config = type(base).__name__, base.config.get_text_config()
    if host not in getattr(trainer_class, ours):
        return f"{host.__name__} computes its loss in a way of its own (TRL's does without logits by itself)"
    if takes_logits:
        return "label smoothing and compute_loss_func take all logits"
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return f"{model} cannot be asked for less than all logits (its forward has no logits_to_keep)"
    if base.loss_type not in (None, "ForCausalLM") or getattr(text_config, "output_router_logits", False):
        return f"{model} computes more than the next-token loss"
    return None


def may_fuse(trainer: Trainer, base: PreTrainedModel, fused_loss: FusedLoss) -> bool:
    """Whether the plugin computes the next-token loss too, as `caft.fused_loss` asks.

    Raises:
        ConfigError: `on`, and it cannot.
    """
    if fused_loss == "off":
        return False
    takes_logits = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    why = why_not_fused(type(trainer), base, takes_logits)
    if why is None:
        return True
    if fused_loss == "on":
        raise ConfigError(not_fused(why))
    logger.warning("caft.fused_loss: auto leaves the next-token loss to the framework: %s", why)
    return False


def not_fused(why: str) -> str:
    return f"caft.fused_loss: got on, but {why}. Use off, or auto for where it can."


def cut_up(got: str, what: str, asks: str = "caft") -> str:
    """Why processes may not share one model's sequences, layers or experts, as the setting `got` has it."""
    why = "targets k ahead would lie on another one" if what == "sequences" else "heads are whole layers"
    if asks != "caft":
        why = f"{ADDS[asks]} was never tried there"
    return (
        f"{asks}: got {got}, but it takes 1: it does not work where processes share the {what} of one model "
        f"({why}). Leave the key out and share rows and weights among the processes, with DDP or FSDP2."
    )


def zero3(got: str, asks: str = "caft") -> str:
    """Why ZeRO-3, which the setting `got` asks for, cannot be used."""
    why = "heads are copies of a layer and use the unembedding, which ZeRO-3 has cut up"
    if asks != "caft":
        why = f"{ADDS[asks]} was never tried with ZeRO-3"
    return f"{asks}: got {got}, but it takes 0, 1 or 2: {why}. Use stage 2, or FSDP2, which works."


def fsdp1(got: str, asks: str = "caft") -> str:
    """Why FSDP1, which the setting `got` asks for, cannot be used."""
    return (
        f"{asks}: got {got}, which is FSDP1, but it takes FSDP2: FSDP1 hides {ADDS[asks]} in modules of its own. Set "
        'fsdp_version: 2 (Axolotl) or fsdp_config={"version": 2} (TrainingArguments), and the other keys of '
        "fsdp_config as FSDP2 has them."
    )

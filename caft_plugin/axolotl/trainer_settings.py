"""Stage 1's training settings: made from a YAML by Axolotl's builder, tested without weights."""

from __future__ import annotations

import copy
import functools

import torch
import yaml
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.trainers.mixins import OptimizerMixin, SchedulerMixin
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from caft_plugin.axolotl.config_reading import Keys
from caft_plugin.axolotl.loading import frozen
from caft_plugin.errors import ConfigError, first_line, shown
from caft_plugin.stage1.pretraining import HeadsTrainer

# Keys for training or evaluating the fine-tuned model that stage 1 does not support for heads, and
# why.
REFUSED = {
    "rl": "it supports supervised fine-tuning",
    "reward_model": "it supports supervised fine-tuning",
    "process_reward_model": "it supports supervised fine-tuning",
    "curriculum_sampling": "it samples rows at random",
    "early_stopping_patience": "it always trains to the end; set max_steps or num_epochs",
    "lr_groups": "heads have one learning rate",
    "loraplus_lr_ratio": "heads train fully, without LoRA",
}
# Keys hidden from the builder: they concern the fine-tuned model (its repository, its checkpoint,
# its callbacks).
OF_THE_TUNED_MODEL = (
    "hub_model_id",
    "resume_from_checkpoint",
    "relora",
    "lisa_n_layers",
    "qat",
    "do_bench_eval",
    "do_causal_lm_eval",
    "generate_samples",
    "include_tkps",
    "embedding_lr",
    "embedding_lr_scale",
)
# Keys that are named in the error if the optimizer or the scheduler does not work.
CHOICES = (
    "optimizer",
    "optim_args",
    "lr_scheduler",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
)
# Numbers that some optimizers and schedulers use, and others ignore silently.
TUNING = (
    "adam_beta1",
    "adam_beta2",
    "adam_beta3",
    "adam_epsilon",
    "adam_epsilon2",
    "cosine_min_lr_ratio",
    "cosine_constant_lr_ratio",
)
# steps and learning rate of a rehearsal
STEPS = 20
RATE = 0.01


class AxolotlHeadsTrainer(HeadsTrainer, OptimizerMixin, SchedulerMixin):  # type: ignore[misc, valid-type]
    """Stage 1's trainer with Axolotl's own optimizers and schedulers."""


class Settings:
    """Settings made by Axolotl's builder from a YAML.

    The builder calls this class in place of a trainer's class; it stores the arguments and builds
    nothing.
    """

    def __init__(
        self,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
        optimizer_cls_and_kwargs: tuple[type, Keys] | None = None,
        **for_a_trainer: object,
    ) -> None:
        self.args = args
        self.callbacks = callbacks
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs

    @property
    def trainer(self) -> functools.partial[HeadsTrainer]:
        return functools.partial(
            AxolotlHeadsTrainer, optimizer_cls_and_kwargs=self.optimizer_cls_and_kwargs
        )


class SettingsBuilder(HFCausalTrainerBuilder):
    """Axolotl's builder, stopped before it builds the trainer."""

    def _get_trainer_cls(self) -> type[Settings]:
        return Settings

    def get_post_trainer_create_callbacks(self, trainer: Settings) -> list[TrainerCallback]:
        return []

    def hook_pre_create_training_args(self, training_arguments_kwargs: Keys) -> Keys:
        # stage 1 evaluates before it trains, by itself
        on_cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}
        return {**training_arguments_kwargs, "eval_on_start": False, **on_cpu}


def refuse_keys(cfg: DictDefault) -> None:
    """Raise ConfigError if the YAML has a key that stage 1 does not support."""
    if cfg.pretraining_dataset or cfg.streaming:
        raise ConfigError(
            "pretrain_heads: streamed data (`pretraining_dataset`, `streaming`) is not supported;"
            " use `datasets:`."
        )
    if cfg.processor_type:
        raise ConfigError(
            f"pretrain_heads: got processor_type: {cfg.processor_type}, but it accepts only rows of"
            " text, also for a vision-language model. Remove `processor_type` and"
            " `skip_prepare_dataset`; use text in `datasets:`."
        )
    for key, instead in REFUSED.items():
        if cfg[key]:
            raise ConfigError(
                f"pretrain_heads: does not support {key}: {shown(cfg[key])}: {instead}. Remove the"
                " key from stage 1's YAML."
            )


def trainer_settings(
    cfg: DictDefault,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Dataset | None,
) -> Settings:
    """Return the settings that Axolotl's builder makes from a YAML, after a rehearsal of optimizer
    and scheduler.

    Args:
        cfg: the YAML as Axolotl reads it.
        tokenizer: the YAML's tokenizer.
        heldout: the evaluation set, or None.

    Raises:
        ConfigError: an optimizer, a scheduler or another setting that does not work here or has no
            effect.
    """
    cfg = frozen(cfg)
    for key in OF_THE_TUNED_MODEL:
        cfg[key] = None
    cfg.logging_steps = cfg.logging_steps or 10
    cfg.save_total_limit = cfg.save_total_limit or 2

    def tried(cfg: DictDefault) -> tuple[Settings, Tensor]:
        builder = SettingsBuilder(cfg, None, tokenizer)  # builds no trainer, so needs no model
        builder.eval_dataset = heldout
        settings = with_optim_args(builder.build(None), cfg.optim_args)
        return settings, rehearse(settings)

    try:
        settings, outcome = tried(cfg)
    except Exception as error:  # a missing package, GPU or adapter: each raises its own kind
        said = ", ".join(f"{key}: {shown(cfg[key])}" for key in CHOICES if cfg[key])
        raise ConfigError(
            f"pretrain_heads: heads cannot be trained with {said} ({first_line(error)}). Use"
            " another optimizer or scheduler, such as optimizer: adamw_torch with lr_scheduler:"
            " constant."
        ) from error
    for key in TUNING:
        if cfg[key] is None:
            continue
        # a number that the optimizer or the scheduler uses would change the rehearsed weights
        other = DictDefault(dict(cfg))
        other[key] = 0.5 if cfg[key] != 0.5 else 0.25
        _, other_outcome = tried(other)
        if torch.equal(other_outcome, outcome):
            raise ConfigError(
                f"pretrain_heads: {key}: {shown(cfg[key])} has no effect with optimizer:"
                f" {cfg.optimizer} and lr_scheduler: {cfg.lr_scheduler}. Remove the key, or use an"
                " optimizer or scheduler that supports it."
            )
    return settings


def with_optim_args(settings: Settings, optim_args: str | dict | None) -> Settings:
    """Return `settings` whose optimizer gets all of `optim_args`."""
    if not optim_args or settings.optimizer_cls_and_kwargs is not None:
        return settings
    if isinstance(optim_args, str):
        optim_args = dict(pair.split("=", 1) for pair in optim_args.replace(" ", "").split(","))
    layer = _Layer()

    def made(optim_args: str | None) -> tuple[type, Keys]:
        arguments = copy.copy(settings.args)
        arguments.optim_args = optim_args
        return Trainer.get_optimizer_cls_and_kwargs(arguments, layer)  # type: ignore[arg-type]

    optimizer, kwargs = made(settings.args.optim_args)
    # transformers passes on only what it knows of an optimizer
    passed_over = {}
    for key, value in optim_args.items():
        if key in kwargs:
            lost = str(kwargs[key]) != str(value)
        else:  # transformers may use it under another name
            lost = str(made(f"{key}={value}")) == str(made(None))
        if lost:
            passed_over[key] = yaml.safe_load(value) if isinstance(value, str) else value
    if passed_over:
        settings.optimizer_cls_and_kwargs = (optimizer, {**kwargs, **passed_over})
    return settings


class _Layer(nn.Module):
    """A minimal head: a few weights with the names and shapes of a decoder layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(64, 64)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(64, 64)})
        self.norm = nn.LayerNorm(64)


class _Rehearsal(OptimizerMixin, SchedulerMixin, Trainer):
    """Creates an optimizer and a scheduler as stage 1's trainer does."""


def rehearse(settings: Settings) -> Tensor:
    """Run some steps of optimizer and scheduler on a small layer, before weights are loaded.

    Returns:
        The layer's weights after these steps.

    Raises:
        ValueError: the optimizer does not include some of the layer's parameters.
        Exception: of any kind, from an optimizer or scheduler that does not work.
    """
    max_steps = settings.args.max_steps
    steps = max_steps if max_steps > 0 else STEPS
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the outcomes of two settings are compared
        layer = _Layer().to(settings.args.device)
        optimizer, scheduler = _optimizer_and_scheduler(settings, layer, steps)
        _refuse_left_out(optimizer, layer)
        if hasattr(optimizer, "train"):  # schedule-free optimizers need this call
            optimizer.train()
        for _ in range(min(steps, STEPS)):
            squares = [parameter.square().sum() for parameter in layer.parameters()]
            torch.stack(squares).sum().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    weights = [parameter.detach().flatten().float().cpu() for parameter in layer.parameters()]
    return torch.cat(weights)


def _optimizer_and_scheduler(
    settings: Settings,
    layer: nn.Module,
    steps: int,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Create both as stage 1's trainer will, with a learning rate at which weights move."""
    arguments = copy.copy(settings.args)
    arguments.report_to = []
    arguments.learning_rate = RATE
    choice = settings.optimizer_cls_and_kwargs
    if choice is not None:
        optimizer_class, kwargs = choice
        choice = (optimizer_class, {**kwargs, "lr": RATE})
    trainer = _Rehearsal(model=layer, args=arguments, optimizer_cls_and_kwargs=choice)
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None
    return trainer.optimizer, trainer.lr_scheduler


def _refuse_left_out(optimizer: torch.optim.Optimizer, layer: nn.Module) -> None:
    if isinstance(optimizer, LayerWiseDummyOptimizer):  # each parameter has its own optimizer
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, parameter in layer.named_parameters() if id(parameter) not in held]
    if left_out:
        raise ValueError(f"it does not include {', '.join(left_out)}")

"""`with_caft`: any `transformers.Trainer` class, plus auxiliary heads' loss (CAFT), masked training (MEAP) or both."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from caft_plugin import checkpoints
from caft_plugin.attach import AttachedHeads
from caft_plugin.config import CAFTConfig, ConfigError, MEAPConfig
from caft_plugin.heads_folder import FOLDER, load_checkpoint, save_heads
from caft_plugin.hidden import all_out_of_sight, hidden_from, shown_to
from caft_plugin.logs import greater_is_better
from caft_plugin.loss import Batch
from caft_plugin.meap.mask_token import FILE as MASK_FILE
from caft_plugin.meap.mask_token import AddedMaskToken
from caft_plugin.meap.roles import NOTHING_SAID, Said
from caft_plugin.meap.training import MaskedTraining
from caft_plugin.meap.training_set import TrainingSet
from caft_plugin.model_card import FrameworkCard, section
from caft_plugin.objective import AuxiliaryObjective, HostLoss
from caft_plugin.precision import warn_of_slow_bf16
from caft_plugin.refusals import check_optimizer
from caft_plugin.window import over_processes

logger = logging.getLogger(__name__)

# Doors to frameworks whose trainers need more than this file, by the package that defines a trainer. `with_caft` asks
# the door what to put over such a class (`mixin_of`), and imports it then and not before.
DOORS = {"trl": "caft_plugin.trl"}


def with_caft(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of `trainer_class` that adds the loss of auxiliary heads to the loss the class computes, masks its
    training examples, or both.

    It takes two arguments more than `trainer_class`: `caft`, a CAFTConfig, and `meap`, a MEAPConfig; each may be a dict
    of its keys, or None (the class then does what it did before). No training loop is touched: `compute_loss` calls the
    class's own and adds to it. Heads are saved beside the model, in `caft_heads/`; the model's own files stay as they
    were.

    Raises:
        ConfigError: on construction, when the settings or the model do not fit.
        TypeError: `trainer_class` is not a Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"with_caft takes a subclass of transformers.Trainer, got {trainer_class!r}")
    if issubclass(trainer_class, CAFTTrainerMixin):
        return trainer_class
    packages = [base.__module__.partition(".")[0] for base in trainer_class.__mro__]
    door = next((DOORS[package] for package in packages if package in DOORS), None)
    host: Any = trainer_class
    return _over(CAFTTrainerMixin if door is None else import_module(door).mixin_of(host), host)


@functools.cache
def _over(mixin: type, trainer_class: type) -> type[Trainer]:
    return type(f"CAFT{trainer_class.__name__}", (mixin, trainer_class), {"__doc__": trainer_class.__doc__})


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CAFTTrainerMixin(_Base):
    """The part of `with_caft` that is the same for every trainer class.

    It overrides methods of Trainer and does no work of its own: `caft`, an AuxiliaryObjective, and `meap`, a
    MaskedTraining, do that. It has one method for each of Trainer's that these two need, so it has many.
    """

    # Classes whose compute_loss takes of a model's output nothing but its loss, so that `fused_loss` may compute that.
    caft_reads_loss_alone: tuple[type, ...] = (Trainer,)
    caft_objective: type[AuxiliaryObjective] = AuxiliaryObjective

    def __init__(
        self, *args, caft: CAFTConfig | dict | None = None, meap: MEAPConfig | dict | None = None, **kwargs
    ) -> None:
        self.caft: AuxiliaryObjective | None = None  # at beta 0 there is none
        self.caft_config: CAFTConfig | None = None
        self.meap_config = None if meap is None else MEAPConfig.read(meap)
        self.meap = None if self.meap_config is None else MaskedTraining(self, self.meap_config)
        self._saving_checkpoint = False
        self._taken_off = False
        super().__init__(*args, **kwargs)
        if caft is not None:
            self.attach_caft(CAFTConfig.read(caft))
        if self.meap is not None:
            if self.meap.config.mode == "sft" and self.meap.data is None and self.train_dataset is not None:
                self.meap.double()
            self._begin(self.meap)

    def attach_caft(self, config: CAFTConfig) -> None:
        """Builds the heads, which will be on the model while it trains or is evaluated.

        At beta 0 no head is built: the run is the host's own.

        Raises:
            ConfigError: the model, the trainer's settings or the heads folder do not fit.
        """
        self.caft_config = config
        if config.beta == 0:
            logger.info("caft.beta is 0: no auxiliary heads are built, this is a plain run")
            return
        self.caft = self.caft_objective(self, config)
        self.caft_config = self.caft.config
        set_direction_of_best(self.args)
        self._start_afresh_with_each_loop()

    def attach_meap(self, config: MEAPConfig, said: Said = NOTHING_SAID) -> None:
        """Chooses the mask token; from now on training batches are masked. In mode `sft` the training set has to be
        duplicated already. `said` is what the user's settings say of tokens.

        Raises:
            ConfigError: there is no tokenizer, or no mask token to be had, or masks are drawn already.
        """
        if self.meap is not None:
            raise ConfigError("meap: this trainer draws masks already. Give `meap` once, to a trainer of its own.")
        self.meap_config = config
        self.meap = MaskedTraining(self, config)
        self._begin(self.meap, said)

    def _begin(self, meap: MaskedTraining, said: Said = NOTHING_SAID) -> None:
        meap.attach(said)
        self._start_afresh_with_each_loop()

    def _start_afresh_with_each_loop(self) -> None:
        if not any(isinstance(callback, FreshSums) for callback in self.callback_handler.callbacks):
            self.add_callback(FreshSums(self))

    def start_afresh(self) -> None:
        """Forgets what was summed, because a training loop begins."""
        for part in (self.caft, self.meap):
            if part is not None:
                part.start_afresh()

    # -- what is ours on the model -----------------------------------------------------------------

    def _handles(self) -> dict[str, AttachedHeads | AddedMaskToken]:
        """What puts parameters of ours on the model, by the block that asks for it."""
        parts = {"caft": self.caft, "meap": self.meap}
        return {block: part.handle for block, part in parts.items() if part is not None and part.handle is not None}

    @contextlib.contextmanager
    def _ours_on_model(self) -> Iterator[None]:
        """While this is open, heads and an added mask token are on the model. Those that are on it already stay."""
        handles = [handle for handle in self._handles().values() if not handle.attached]
        with contextlib.ExitStack() as stack:
            for handle in handles:
                stack.enter_context(handle)
            losses = None if self.meap is None else self.meap.losses
            if losses is not None and not losses.attached:
                stack.enter_context(losses)
            if handles:
                parts = [handle.hidden for handle in handles]
                stack.enter_context(shown_to(self.accelerator, parts))
                stack.enter_context(hidden_from(self.callback_handler, parts))
            yield

    def _ours_out_of_sight(self) -> contextlib.AbstractContextManager[None]:
        """While this is open, the host's own code finds the model's modules and parameters without ours."""
        return all_out_of_sight([handle.hidden for handle in self._handles().values()])

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        with self._ours_on_model():
            optimizer = super().create_optimizer(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # DeepSpeed's optimizers hold tensors of their own
            for block, handle in self._handles().items():
                check_optimizer(self, optimizer, block, handle.hidden.module)
        return optimizer

    def detach_ours(self) -> None:
        """Takes heads and an added mask token off the model, for good."""
        self._taken_off = True
        for handle in self._handles().values():
            handle.detach()
        self.caft = None
        if self.meap is not None:
            self.meap.handle = self.meap.losses = None

    # -- data --------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        with contextlib.nullcontext() if self.meap is None else self.meap.collating():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args, **kwargs) -> torch.utils.data.DataLoader:
        kwargs = {key: self.as_evaluated(value) for key, value in kwargs.items()}
        return super().get_eval_dataloader(*map(self.as_evaluated, args), **kwargs)

    def get_test_dataloader(self, *args, **kwargs) -> torch.utils.data.DataLoader:
        kwargs = {key: self.as_evaluated(value) for key, value in kwargs.items()}
        return super().get_test_dataloader(*map(self.as_evaluated, args), **kwargs)

    def as_evaluated(self, dataset: TrainingSet) -> TrainingSet:
        """What stands for a data set in evaluation: for the doubled training set, that set without copies."""
        return dataset if self.meap is None else self.meap.as_evaluated(dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.meap is not None:
            self.meap.begin_step(samples)
        if self.caft is not None and samples:
            self.caft.begin_window([self._with_plan(batch) for batch in samples])
        return samples, num_items

    def _with_plan(self, inputs: Batch) -> Batch:
        """A training batch as the heads need it; the host's own holds the host's keys only."""
        if self.meap is None or not torch.is_grad_enabled():
            return inputs
        self.meap.take_plan(inputs)
        return self.meap.with_plan(inputs)

    # -- the loss ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> HostLoss:
        if self.meap is not None:
            self.meap.take_plan(inputs)

        def host_loss() -> HostLoss:
            losses = None if self.meap is None or not torch.is_grad_enabled() else self.meap.losses
            with contextlib.nullcontext() if losses is None else losses.reading(inputs):
                return super(CAFTTrainerMixin, self).compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )

        if self.caft is None:
            with self._ours_out_of_sight():
                return host_loss()
        with (
            self._ours_on_model() if torch.is_grad_enabled() else contextlib.nullcontext(),
            self._ours_out_of_sight(),
        ):
            return self.caft.loss(model, self._with_plan(inputs), host_loss, num_items_in_batch)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args, **kwargs) -> Tensor:
        with (
            self._ours_out_of_sight(),
            contextlib.nullcontext() if self.caft is None else self.caft.training_step(self._with_plan(inputs)),
        ):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args, **kwargs) -> tuple:
        if self.meap is not None:
            self.meap.put_plain_labels(inputs)
        with self._ours_out_of_sight():
            return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self._ours_out_of_sight():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        if self.caft is None:
            return super().evaluation_loop(*args, **kwargs)
        prefix = argument("metric_key_prefix", super().evaluation_loop, Trainer.evaluation_loop, args, kwargs)
        with self._ours_on_model(), self.caft.evaluation(prefix) as metrics:
            output = super().evaluation_loop(*args, **kwargs)
        cast(dict, output.metrics).update(metrics)
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            if self.caft is not None:
                logs.update(self.caft.log_entries())
            if self.meap is not None:
                logs.update(self.meap.log_entries(functools.partial(over_processes, self.accelerator)))
        with self._ours_out_of_sight():
            super().log(logs, *args, **kwargs)

    # -- saving and resuming -----------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        if self.caft_config or self.meap_config:
            warn_of_slow_bf16(self.args, self.model)
            if resume_from_checkpoint:
                parts = self.checkpoint_parts()
                resume_from_checkpoint = checkpoints.to_resume_from(
                    resume_from_checkpoint, str(self.args.output_dir), parts
                )
        try:
            with self._ours_on_model():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.start_afresh()

    def newest_whole_checkpoint(self) -> str | None:
        """The newest checkpoint of the output folder that this run can resume from, None where there is none.
        Newer ones that are not whole, because the run was killed while it wrote them, are warned of."""
        newest = checkpoints.newest_warning_of_others(str(self.args.output_dir), self.checkpoint_parts())
        return None if newest is None else str(newest)

    def checkpoint_parts(self) -> checkpoints.Parts:
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)  # these have files of their own
        return checkpoints.Parts(weights=plain, optimizer=plain and not self.args.save_only_model)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        if (self.caft_config or self.meap_config) and self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            checkpoints.begin_overwriting(Path(self._get_output_dir(trial=trial)) / name)
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        card = self.framework_card(output_dir)
        super().save_model(output_dir, _internal_call)
        self.save_ours(output_dir or self.args.output_dir)
        if self.args.should_save:
            card.complete()  # PEFT writes one with each adapter

    def create_model_card(self, *args, **kwargs) -> None:
        card = self.framework_card()
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card.complete()

    def framework_card(self, folder: str | None = None) -> FrameworkCard:
        """The card that the framework is about to write into a folder, by default the run's own."""
        return FrameworkCard(Path(folder or str(self.args.output_dir)), section(self.caft_config, self.meap_config))

    def save_ours(self, output_dir: str | None) -> None:
        """Writes the heads, in `caft_heads/`, and an added mask token, in `caft_meap/`, into `output_dir`; a
        checkpoint's heads keep what exact resuming needs."""
        if output_dir is None:
            return
        if self.args.should_save:
            self._set_aside_earlier(Path(output_dir))
        if self.meap is not None and self.meap.handle is not None:
            self.meap.handle.save(Path(output_dir), write=self.args.should_save)
        if self.caft is not None:
            caft, write = self.caft, self.args.should_save
            resumable = self._saving_checkpoint
            save_heads(output_dir, caft.heads, caft.trunk, caft.config, resumable=resumable, write=write)

    def _set_aside_earlier(self, folder: Path) -> None:
        """Moves heads and a mask token of an earlier run out of a folder where this run, which has none, saves its
        model: beside it they would pass for its own."""
        if self._taken_off or not (self.caft_config or self.meap_config):
            return
        ours = {FOLDER: self.caft, MASK_FILE.parent.name: None if self.meap is None else self.meap.handle}
        for name, part in ours.items():
            if part is None:
                checkpoints.set_aside(folder / name)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP2 this saves the adapter once more: newer accelerate takes every frozen parameter out of the state
        dict, and so has to find the heads' there."""
        adapter_alone = self.is_fsdp_enabled and isinstance(self.model, PeftModel)
        with contextlib.ExitStack() as stack:
            for handle in self._handles().values() if adapter_alone else ():
                stack.enter_context(handle.hidden.in_state_dict("frozen"))
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_ours(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_ours(self.state.best_model_checkpoint)

    def _load_ours(self, folder: str) -> None:
        if self.meap is not None:
            self.meap.load(folder)
        if self.caft is not None:
            load_checkpoint(folder, self.caft.heads, self.caft.config)
        elif self.caft_config is not None and (Path(folder) / FOLDER).exists():
            raise ConfigError(
                f"caft.beta: this run has 0 and so no heads, but the checkpoint {folder} was made with heads. Resume "
                "with the beta it was made with, or start anew."
            )


def argument(name: str, method: Callable, as_in: Callable, args: tuple, kwargs: dict) -> str:
    """The argument `name` of a call of a host's `method`, by position, by name or left out; where the method itself
    takes anything (*args), by the signature of `as_in`, the function that it overrides."""
    signature, given = inspect.signature(method), args
    if name not in signature.parameters:
        signature, given = inspect.signature(as_in), (None, *args)
    bound = signature.bind(*given, **kwargs)
    bound.apply_defaults()
    return bound.arguments[name]


def set_direction_of_best(args: TrainingArguments) -> None:
    """Correct `greater_is_better` for a metric of ours: TrainingArguments takes every metric whose name does not end in
    `loss` for one of which more is better, and would keep the checkpoint with the worst heads."""
    metric = args.metric_for_best_model
    right = None if metric is None else greater_is_better(metric)
    if right is not None and args.greater_is_better is not None and args.greater_is_better != right:
        args.greater_is_better = right
        logger.warning(
            "metric_for_best_model: of %s the %s value is the better one, so greater_is_better is set to %s",
            metric,
            "larger" if right else "smaller",
            right,
        )


class FreshSums(TrainerCallback):
    """Whatever starts a training loop starts with empty sums."""

    def __init__(self, trainer: CAFTTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.trainer.start_afresh()

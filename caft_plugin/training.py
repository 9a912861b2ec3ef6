"""`with_caft`: any `transformers.Trainer` class, plus auxiliary heads' loss (CAFT), masked training
(MEAP) or both."""

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
from caft_plugin.caft.attach import AttachedHeads
from caft_plugin.caft.heads_record import FOLDER
from caft_plugin.caft.objective import AuxiliaryObjective, HostLoss
from caft_plugin.config import CAFTConfig, MEAPConfig
from caft_plugin.errors import ConfigError
from caft_plugin.logs import greater_is_better
from caft_plugin.meap.doubling import DoubledSet
from caft_plugin.meap.mask_token import FILE as MASK_FILE
from caft_plugin.meap.mask_token import AddedMaskToken
from caft_plugin.meap.training import MaskedTraining
from caft_plugin.meap.training_set import TrainingSet
from caft_plugin.model.hidden import all_out_of_sight, hidden_from, shown_to
from caft_plugin.model_card import FrameworkCard, section
from caft_plugin.precision import warn_of_slow_bf16
from caft_plugin.refusals import check_optimizer
from caft_plugin.targets import Batch

logger = logging.getLogger(__name__)

# Modules for frameworks whose trainers need more than this file, by the package that defines a
# trainer. `with_caft` imports the module only for such a class, and gets the mixin from its
# `mixin_of`.
DOORS = {"trl": "caft_plugin.trl"}


def with_caft(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return a subclass of `trainer_class` with auxiliary heads (CAFT), masked training examples
    (MEAP), or both.

    It accepts two more arguments: `caft`, a CAFTConfig, and `meap`, a MEAPConfig. Each may be a
        dict of its keys, or
    None, which leaves the class unchanged. The training loop is not changed: `compute_loss` calls
    the class's own and adds to it. Heads are saved next to the model, in `caft_heads/`; the model's
    own files do not change.

    Raises:
        ConfigError: on construction, when the settings or the model do not fit.
        TypeError: `trainer_class` is not a Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(
            f"with_caft accepts a subclass of transformers.Trainer, got {trainer_class!r}"
        )
    if issubclass(trainer_class, CAFTTrainerMixin):
        return trainer_class
    packages = [base.__module__.partition(".")[0] for base in trainer_class.__mro__]
    door = next((DOORS[package] for package in packages if package in DOORS), None)
    host: Any = trainer_class
    return _over(CAFTTrainerMixin if door is None else import_module(door).mixin_of(host), host)


@functools.cache
def _over(mixin: type, trainer_class: type) -> type[Trainer]:
    return type(
        f"CAFT{trainer_class.__name__}", (mixin, trainer_class), {"__doc__": trainer_class.__doc__}
    )


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CAFTTrainerMixin(_Base):
    """The part of `with_caft` that is the same for every trainer class.

    It only overrides methods of Trainer; the work is done by `caft`, an AuxiliaryObjective, and
    `meap`, a MaskedTraining. It has one method for each of Trainer's that these two need, so it has
    many.
    """

    # Classes whose compute_loss uses only the loss of a model's output, so that `fused_loss` may
    # compute that.
    caft_reads_loss_alone: tuple[type, ...] = (Trainer,)
    caft_objective: Callable[[Trainer, CAFTConfig], AuxiliaryObjective] = AuxiliaryObjective

    def __init__(
        self,
        *args,
        caft: CAFTConfig | dict | None = None,
        meap: MEAPConfig | dict | None = None,
        **kwargs,
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
            self._begin(self.meap)

    def attach_caft(self, config: CAFTConfig) -> None:
        """Build the heads, which are attached to the model while it is trained or evaluated.

        With beta 0, no head is built, and the run is the host's own.

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

    def attach_meap(self, config: MEAPConfig, data: DoubledSet | None = None) -> None:
        """Choose the mask token and mask training batches from now on.

        `data` has the trainer's training set if that is doubled already (mode `sft`), and the
        user's settings of tokens.

        Raises:
            ConfigError: there is no tokenizer or no mask token, or the trainer already draws masks.
        """
        if self.meap is not None:
            raise ConfigError(
                "meap: this trainer already draws masks. Pass `meap` once, to a separate trainer."
            )
        self.meap_config = config
        self.meap = MaskedTraining(self, config, data)
        self._begin(self.meap)

    def _begin(self, meap: MaskedTraining) -> None:
        meap.attach()
        self._start_afresh_with_each_loop()

    def _start_afresh_with_each_loop(self) -> None:
        if not any(isinstance(callback, FreshSums) for callback in self.callback_handler.callbacks):
            self.add_callback(FreshSums(self))

    def start_afresh(self) -> None:
        """Reset the sums at the start of a training loop."""
        for part in self._parts:
            part.start_afresh()

    # -- what is ours on the model -----------------------------------------------------------------

    @property
    def _parts(self) -> list[AuxiliaryObjective | MaskedTraining]:
        """The objectives of this run. Both have handle, begin_window, start_afresh, log_entries,
        save and load."""
        return [part for part in (self.caft, self.meap) if part is not None]

    def _handles(self) -> dict[str, AttachedHeads | AddedMaskToken]:
        """Return the handles of parameters that caft_plugin adds to the model, by block."""
        return {part.config.block: part.handle for part in self._parts if part.handle is not None}

    @contextlib.contextmanager
    def _ours_on_model(self) -> Iterator[None]:
        """Attach the heads and an added mask token; those that are already attached stay
        attached."""
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
        """Hide caft_plugin's modules and parameters from the host's own code."""
        return all_out_of_sight([handle.hidden for handle in self._handles().values()])

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        with self._ours_on_model():
            optimizer = super().create_optimizer(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # DeepSpeed's optimizers hold tensors of their own
            for block, handle in self._handles().items():
                check_optimizer(self, optimizer, block, handle.hidden.module)
        return optimizer

    def detach_ours(self) -> None:
        """Remove the heads and an added mask token from the model permanently."""
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
        """Return the data set to evaluate: for the doubled training set, the one without copies."""
        return dataset if self.meap is None else self.meap.data.as_evaluated(dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # first: it takes its plans out of the batches, which tell heads where pairs end
        if self.meap is not None:
            self.meap.begin_window(samples)
        if self.caft is not None:
            self.caft.begin_window([self._with_plan(batch) for batch in samples])
        return samples, num_items

    def _with_plan(self, inputs: Batch) -> Batch:
        """Return a training batch with its plan, for the heads; the host's batch has only the
        host's keys."""
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
                    model,
                    inputs,
                    return_outputs=return_outputs,
                    num_items_in_batch=num_items_in_batch,
                )

        if self.caft is None:
            with self._ours_out_of_sight():
                return host_loss()
        with (
            self._ours_on_model() if torch.is_grad_enabled() else contextlib.nullcontext(),
            self._ours_out_of_sight(),
        ):
            return self.caft.loss(model, self._with_plan(inputs), host_loss, num_items_in_batch)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], *args, **kwargs
    ) -> Tensor:
        with (
            self._ours_out_of_sight(),
            (
                contextlib.nullcontext()
                if self.caft is None
                else self.caft.training_step(self._with_plan(inputs))
            ),
        ):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], *args, **kwargs
    ) -> tuple:
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
        prefix = argument(
            "metric_key_prefix", super().evaluation_loop, Trainer.evaluation_loop, args, kwargs
        )
        with self._ours_on_model(), self.caft.evaluation(prefix) as metrics:
            output = super().evaluation_loop(*args, **kwargs)
        cast(dict, output.metrics).update(metrics)
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            for part in self._parts:
                logs.update(part.log_entries())
        if self.caft is not None:
            self.caft.note_log(logs)
        with self._ours_out_of_sight():
            super().log(logs, *args, **kwargs)

    # -- saving and resuming -----------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs
    ) -> TrainOutput:
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
        """Return the newest complete checkpoint of the output folder, or None; warn about newer,
        incomplete ones."""
        newest = checkpoints.newest_warning_of_others(
            str(self.args.output_dir), self.checkpoint_parts()
        )
        return None if newest is None else str(newest)

    def checkpoint_parts(self) -> checkpoints.Parts:
        # these have files of their own
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
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
        return FrameworkCard(
            Path(folder or str(self.args.output_dir)), section(self.caft_config, self.meap_config)
        )

    def save_ours(self, output_dir: str | None) -> None:
        """Save the heads to `caft_heads/` and an added mask token to `caft_meap/` in `output_dir`.

        In a checkpoint, the heads' LoRA stays separate, for exact resuming.
        """
        if output_dir is None:
            return
        if self.args.should_save:
            self._set_aside_earlier(Path(output_dir))
        for part in self._parts:
            part.save(Path(output_dir), resumable=self._saving_checkpoint)

    def _set_aside_earlier(self, folder: Path) -> None:
        """Rename an earlier run's heads and mask token in a folder where this run saves its model
        without any."""
        if self._taken_off or not (self.caft_config or self.meap_config):
            return
        ours = {
            FOLDER: self.caft,
            MASK_FILE.parent.name: None if self.meap is None else self.meap.handle,
        }
        for name, part in ours.items():
            if part is None:
                checkpoints.set_aside(folder / name)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Show the heads' frozen parameters in the state dict while FSDP2 saves the adapter again.

        Newer accelerate removes every frozen parameter from the state dict and fails if one is
        missing.
        """
        adapter_alone = self.is_fsdp_enabled and isinstance(self.model, PeftModel)
        with contextlib.ExitStack() as stack:
            for handle in self._handles().values() if adapter_alone else ():
                stack.enter_context(handle.hidden.in_state_dict("frozen"))
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_ours(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_ours(self.state.best_model_checkpoint)

    def _load_ours(self, folder: str) -> None:
        for part in self._parts:
            part.load(folder)
        if self.caft is None and self.caft_config is not None and (Path(folder) / FOLDER).exists():
            raise ConfigError(
                f"caft.beta: this run has 0 and so no heads, but the checkpoint {folder} was made"
                " with heads. Resume with the beta it was made with, or start from the beginning."
            )


def argument(name: str, method: Callable, as_in: Callable, args: tuple, kwargs: dict) -> str:
    """Return the argument `name` of a call of a host's `method`, given by position, by name or by
    default.

    If the method has only *args and **kwargs, the signature of `as_in`, the function that it
    overrides, is used.
    """
    signature = inspect.signature(method)
    given = args
    if name not in signature.parameters:
        signature = inspect.signature(as_in)
        given = (None, *args)
    bound = signature.bind(*given, **kwargs)
    bound.apply_defaults()
    return bound.arguments[name]


def set_direction_of_best(args: TrainingArguments) -> None:
    """Correct `greater_is_better` for a caft_plugin metric.

    TrainingArguments assumes that larger is better for every metric whose name does not end in
    `loss`, and would keep the checkpoint with the worst heads.
    """
    metric = args.metric_for_best_model
    right = None if metric is None else greater_is_better(metric)
    if right is not None and args.greater_is_better is not None and args.greater_is_better != right:
        args.greater_is_better = right
        logger.warning(
            "metric_for_best_model: for %s, the %s value is better, so greater_is_better was set"
            " to %s",
            metric,
            "larger" if right else "smaller",
            right,
        )


class FreshSums(TrainerCallback):
    """Resets the trainer's sums at the start of each training loop."""

    def __init__(self, trainer: CAFTTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.trainer.start_afresh()

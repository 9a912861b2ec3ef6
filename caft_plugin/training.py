"""`with_caft`: any `transformers.Trainer` class, plus auxiliary heads' loss (CAFT), masked training
(MEAP) or both."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from caft_plugin.caft.objective import AuxiliaryObjective, HostLoss
from caft_plugin.config import CAFTConfig, MEAPConfig, MTPConfig
from caft_plugin.mtp.in_training import KeptMTP
from caft_plugin.refusals import refuse_optimizer
from caft_plugin.run_files import RunFiles
from caft_plugin.targets import Batch
from caft_plugin.trainer_parts import TrainerParts

# Modules for frameworks whose trainers need more than this file, by the package that defines a
# trainer or one of its bases. `with_caft` imports the module only for such a class, and gets the
# mixin from its `mixin_of`. A class of several frameworks gets the mixins in this order.
DOORS = {"axolotl": "caft_plugin.axolotl.trainer", "trl": "caft_plugin.trl"}


def with_caft(trainer_class: type[Trainer], *, framework: str | None = None) -> type[Trainer]:
    """Return a subclass of `trainer_class` with auxiliary heads (CAFT), masked training examples
    (MEAP), or both.

    It accepts three more arguments: `caft`, a CAFTConfig, `meap`, a MEAPConfig, and `mtp`, an
    MTPConfig. Each may be a dict of its keys, or None, which leaves the class unchanged. The
    training loop is not changed: `compute_loss` calls the class's own and adds to it. Heads are
    saved next to the model, in `caft_heads/`; the model's own files change only with `mtp`.

    Args:
        trainer_class: any subclass of Trainer.
        framework: the package that will run the trainer, if the class is not built on one of its
            trainers.

    Raises:
        ConfigError: on construction, when the settings or the model do not fit.
        TypeError: `trainer_class` is not a Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(
            f"with_caft accepts a subclass of transformers.Trainer, got {trainer_class!r}"
        )
    packages = {framework, *(base.__module__.partition(".")[0] for base in trainer_class.__mro__)}
    doors = [import_module(door) for package, door in DOORS.items() if package in packages]
    mixins: list[type] = [door.mixin_of(trainer_class) for door in doors]
    special = [mixin for mixin in mixins if mixin is not CAFTTrainerMixin]
    host: Any = trainer_class
    return _over((*special, CAFTTrainerMixin), host)


@functools.cache
def _over(mixins: tuple[type, ...], trainer_class: type) -> type[Trainer]:
    lacking = [mixin for mixin in mixins if not issubclass(trainer_class, mixin)]
    if not lacking:
        return trainer_class
    name = f"CAFT{trainer_class.__name__}"
    return type(name, (*lacking, trainer_class), {"__doc__": trainer_class.__doc__})


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CAFTTrainerMixin(_Base):
    """The part of `with_caft` that is the same for every trainer class.

    It only overrides methods of Trainer; the work is done by `caft_parts` and `caft_files`. All
    names that it adds to a trainer begin with `caft_`.
    """

    # Classes whose compute_loss uses only the loss of a model's output, so that `fused_loss` may
    # compute that.
    caft_reads_loss_alone: tuple[type, ...] = (Trainer,)
    caft_objective: Callable[[Trainer, CAFTConfig], AuxiliaryObjective] = AuxiliaryObjective
    caft_saves_model = True  # whether the trainer's checkpoints hold the model or an adapter

    def __init__(
        self,
        *args,
        caft: CAFTConfig | dict | None = None,
        meap: MEAPConfig | dict | None = None,
        mtp: MTPConfig | dict | None = None,
        **kwargs,
    ) -> None:
        # before the host's constructor, in which SFTTrainer prepares its data
        parts = TrainerParts(self, None if meap is None else MEAPConfig.read(meap))
        self.caft_parts = parts
        self.caft_files = RunFiles(parts, self.caft_saves_model)
        super().__init__(*args, **kwargs)
        if caft is not None:
            parts.attach_caft(CAFTConfig.read(caft), self.caft_objective)
        parts.begin_masking()
        if mtp is not None:
            MTPConfig.read(mtp)
            parts.mtp = KeptMTP.of(self)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        with self.caft_parts.on_model():
            optimizer = super().create_optimizer(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # DeepSpeed's optimizers hold tensors of their own
            for block, handle in self.caft_parts.handles().items():
                refuse_optimizer(self, optimizer, block, handle.hidden.module)
        return optimizer

    # -- data --------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        meap = self.caft_parts.meap
        with contextlib.nullcontext() if meap is None else meap.collating():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args, **kwargs) -> torch.utils.data.DataLoader:
        plain = self.caft_parts.as_evaluated
        kwargs = {key: plain(value) for key, value in kwargs.items()}
        return super().get_eval_dataloader(*map(plain, args), **kwargs)

    def get_test_dataloader(self, *args, **kwargs) -> torch.utils.data.DataLoader:
        plain = self.caft_parts.as_evaluated
        kwargs = {key: plain(value) for key, value in kwargs.items()}
        return super().get_test_dataloader(*map(plain, args), **kwargs)

    def get_batch_samples(
        self,
        epoch_iterator: Iterator[Batch],
        num_batches: int,
        device: torch.device,
    ) -> tuple[list[Batch], Tensor | int | None]:
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.caft_parts.begin_window(samples)
        return samples, num_items

    # -- the loss ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> HostLoss:
        def host_loss() -> HostLoss:
            return super(CAFTTrainerMixin, self).compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

        return self.caft_parts.loss(model, inputs, host_loss, num_items_in_batch)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        *args,
        **kwargs,
    ) -> Tensor:
        with self.caft_parts.out_of_sight(), self.caft_parts.training_step(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        *args,
        **kwargs,
    ) -> tuple:
        if self.caft_parts.meap is not None:
            self.caft_parts.meap.put_plain_labels(inputs)
        with self.caft_parts.out_of_sight():
            return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.caft_parts.out_of_sight():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        caft = self.caft_parts.caft
        if caft is None:
            return super().evaluation_loop(*args, **kwargs)
        prefix = argument(
            "metric_key_prefix", super().evaluation_loop, Trainer.evaluation_loop, args, kwargs
        )
        with self.caft_parts.on_model(), caft.evaluation(prefix) as metrics:
            output = super().evaluation_loop(*args, **kwargs)
        cast(dict, output.metrics).update(metrics)
        return output

    def log(
        self,
        logs: dict[str, float],
        *args,
        **kwargs,
    ) -> None:
        if "loss" in logs:
            for part in self.caft_parts.objectives:
                logs.update(part.log_entries())
        if self.caft_parts.caft is not None:
            self.caft_parts.caft.note_log(logs)
        with self.caft_parts.out_of_sight():
            super().log(logs, *args, **kwargs)

    # -- saving and resuming -----------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args,
        **kwargs,
    ) -> TrainOutput:
        checkpoint = self.caft_files.checkpoint_to_resume(resume_from_checkpoint)
        try:
            with self.caft_parts.on_model():
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self.caft_parts.start_afresh()

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.caft_files.saving_checkpoint(Path(self._get_output_dir(trial=trial)) / name):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        card = self.caft_files.framework_card(output_dir)
        super().save_model(output_dir, _internal_call)
        self.caft_files.save(output_dir or self.args.output_dir)
        self.caft_files.complete_model(output_dir or self.args.output_dir)
        if self.args.should_save:
            card.complete()  # PEFT writes one with each adapter

    def create_model_card(self, *args, **kwargs) -> None:
        card = self.caft_files.framework_card()
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card.complete()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # FSDP2 saves an adapter again here. Newer accelerate then removes every frozen parameter
        # from the state dict and fails if one is missing.
        adapter_alone = self.is_fsdp_enabled and isinstance(self.model, PeftModel)
        with contextlib.ExitStack() as stack:
            for handle in self.caft_parts.handles().values() if adapter_alone else ():
                stack.enter_context(handle.hidden.in_state_dict("frozen"))
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.caft_files.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self.caft_files.load(self.state.best_model_checkpoint)


def argument(
    name: str,
    method: Callable,
    as_in: Callable,
    args: tuple,
    kwargs: dict,
) -> str:
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

"""CAFT and MEAP in one trainer: build them, attach them to its model, give them its batches."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from caft_plugin.caft.attach import AttachedHeads
from caft_plugin.caft.objective import AuxiliaryObjective, HostLoss
from caft_plugin.config import CAFTConfig, MEAPConfig
from caft_plugin.errors import ConfigError
from caft_plugin.logs import greater_is_better
from caft_plugin.meap.doubling import DoubledSet
from caft_plugin.meap.mask_token import AddedMaskToken
from caft_plugin.meap.training import MaskedTraining
from caft_plugin.meap.training_set import TrainingSet
from caft_plugin.model.hidden import all_out_of_sight, hidden_from, shown_to
from caft_plugin.mtp.in_training import KeptMTP
from caft_plugin.targets import Batch

logger = logging.getLogger(__name__)


class TrainerParts:
    """CAFT and MEAP in one trainer; either may be missing.

    `caft` is None also at beta 0. The configs stay when the parts are `removed`.
    """

    def __init__(self, trainer: Trainer, meap: MEAPConfig | None) -> None:
        self.trainer = trainer
        self.mtp: KeptMTP | None = None
        self.caft: AuxiliaryObjective | None = None
        self.caft_config: CAFTConfig | None = None
        self.meap = None if meap is None else MaskedTraining(trainer, meap)
        self.meap_config = meap
        self.removed = False

    @property
    def objectives(self) -> list[AuxiliaryObjective | MaskedTraining]:
        """CAFT and MEAP, if requested. Both have handle, start_afresh, log_entries, save, load."""
        return [part for part in (self.caft, self.meap) if part is not None]

    def attach_caft(
        self,
        config: CAFTConfig,
        objective: Callable[[Trainer, CAFTConfig], AuxiliaryObjective] = AuxiliaryObjective,
    ) -> None:
        """Build the heads, which are attached to the model while it is trained or evaluated.

        With beta 0, no head is built, and the run is the host's own.

        Raises:
            ConfigError: the model, the trainer's settings or the heads folder do not fit.
        """
        self.caft_config = config
        if config.beta == 0:
            logger.info("caft.beta is 0: no auxiliary heads are built, this is a plain run")
            return
        self.caft = objective(self.trainer, config)
        self.caft_config = self.caft.config
        set_direction_of_best(self.trainer.args)
        reset_with_each_loop(self)

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
        self.meap = MaskedTraining(self.trainer, config, data)
        self.begin_masking()

    def begin_masking(self) -> None:
        """Mask training batches from now on, if the trainer has MEAP."""
        if self.meap is not None:
            self.meap.attach()
            reset_with_each_loop(self)

    def start_afresh(self) -> None:
        """Reset the sums at the start of a training loop."""
        for part in self.objectives:
            part.start_afresh()

    # -- on the model ------------------------------------------------------------------------------

    def handles(self) -> dict[str, AttachedHeads | AddedMaskToken]:
        """Return the handles of parameters that caft_plugin adds to the model, by block."""
        handles: dict[str, AttachedHeads | AddedMaskToken] = {}
        for part in self.objectives:
            if part.handle is not None:
                handles[part.config.block] = part.handle
        return handles

    @contextlib.contextmanager
    def on_model(self) -> Iterator[None]:
        """Attach the heads and an added mask token, except those that are already attached."""
        handles = [handle for handle in self.handles().values() if not handle.attached]
        hidden = [handle.hidden for handle in handles]
        losses = None if self.meap is None else self.meap.losses
        with contextlib.ExitStack() as stack:
            for handle in handles:
                stack.enter_context(handle)
            if losses is not None and not losses.attached:
                stack.enter_context(losses)
            if handles:
                stack.enter_context(shown_to(self.trainer.accelerator, hidden))
                stack.enter_context(hidden_from(self.trainer.callback_handler, hidden))
            yield

    def out_of_sight(self) -> contextlib.AbstractContextManager[None]:
        """Hide caft_plugin's modules and parameters from the host's own code."""
        hidden = [handle.hidden for handle in self.handles().values()]
        return all_out_of_sight(hidden)

    def remove(self) -> None:
        """Remove the heads and an added mask token from the model permanently."""
        self.removed = True
        for handle in self.handles().values():
            handle.detach()
        self.caft = None
        if self.meap is not None:
            self.meap.handle = None
            self.meap.losses = None

    # -- batches and losses ------------------------------------------------------------------------

    def as_evaluated(self, dataset: TrainingSet) -> TrainingSet:
        """Return the data set to evaluate: for the doubled training set, the one without copies."""
        return dataset if self.meap is None else self.meap.data.as_evaluated(dataset)

    def begin_window(self, batches: Sequence[MutableMapping[str, Tensor]]) -> None:
        """Open the window of the next optimisation step. Every process must call it."""
        # first MEAP: it takes its plans out of the batches, which tell heads where pairs end
        if self.meap is not None:
            self.meap.begin_window(batches)
        if self.caft is not None:
            planned = [self._with_plan(batch) for batch in batches]
            self.caft.begin_window(planned)

    def _with_plan(self, inputs: Batch) -> Batch:
        """Return a training batch with its plan for the heads; the host's has only its own keys."""
        if self.meap is None or not torch.is_grad_enabled():
            return inputs
        self.meap.take_plan(inputs)
        return self.meap.with_plan(inputs)

    def training_step(self, inputs: Batch) -> contextlib.AbstractContextManager[None]:
        """Assign losses to the micro-batch `inputs` while this is open."""
        if self.caft is None:
            return contextlib.nullcontext()
        return self.caft.training_step(self._with_plan(inputs))

    def loss(
        self,
        model: nn.Module,
        inputs: Batch,
        host_loss: Callable[[], HostLoss],
        items: Tensor | int | None,
    ) -> HostLoss:
        """Return the host's loss, plus the heads' in training; see AuxiliaryObjective.loss."""
        if self.meap is not None:
            self.meap.take_plan(inputs)
        training = torch.is_grad_enabled()
        losses = self.meap.losses if self.meap is not None and training else None

        def measured_loss() -> HostLoss:
            with contextlib.nullcontext() if losses is None else losses.reading(inputs):
                return host_loss()

        if self.caft is None:
            with self.out_of_sight():
                return measured_loss()
        # a host may compute a loss outside of train()
        on_model = self.on_model() if training else contextlib.nullcontext()
        with on_model, self.out_of_sight():
            return self.caft.loss(model, self._with_plan(inputs), measured_loss, items)


def set_direction_of_best(args: TrainingArguments) -> None:
    """Correct `greater_is_better` for a caft_plugin metric.

    TrainingArguments assumes that larger is better for every metric whose name does not end in
    `loss`, and would keep the checkpoint with the worst heads.
    """
    metric = args.metric_for_best_model
    right = None if metric is None else greater_is_better(metric)
    if right is None or args.greater_is_better in (None, right):
        return
    args.greater_is_better = right
    logger.warning(
        "metric_for_best_model: for %s, the %s value is better, so greater_is_better was set to %s",
        metric,
        "larger" if right else "smaller",
        right,
    )


class FreshSums(TrainerCallback):
    """Resets the sums at the start of each training loop."""

    def __init__(self, parts: TrainerParts) -> None:
        self.parts = parts

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.parts.start_afresh()


def reset_with_each_loop(parts: TrainerParts) -> None:
    """Reset the sums at the start of each training loop of the trainer."""
    callbacks = parts.trainer.callback_handler.callbacks
    if not any(isinstance(callback, FreshSums) for callback in callbacks):
        parts.trainer.add_callback(FreshSums(parts))

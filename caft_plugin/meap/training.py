"""MEAP in a trainer: the doubled training set, masked batches and log entries."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from caft_plugin.caft.window import over_processes
from caft_plugin.config import MEAPConfig
from caft_plugin.errors import ConfigError, shown
from caft_plugin.logs import MEAPLog
from caft_plugin.meap.base_model import BaseModel
from caft_plugin.meap.doubling import DoubledSet, tokenizer_of
from caft_plugin.meap.label_codes import plain_labels
from caft_plugin.meap.losses import LossesByKind
from caft_plugin.meap.mask_token import (
    FILE,
    AddedMaskToken,
    MaskToken,
    choose_mask_token,
    row_norms,
)
from caft_plugin.meap.masking import EpochOfMasks, MEAPCollator
from caft_plugin.meap.plans import StepPlans
from caft_plugin.meap.roles import Roles
from caft_plugin.meap.training_set import used_ids
from caft_plugin.model.trunk import input_embedding
from caft_plugin.refusals import refuse_trainer
from caft_plugin.targets import EXAMPLE, MASKED, MAY_MASK, OVERLONG, PLAN, Batch

logger = logging.getLogger(__name__)


class MaskTally:
    """Counts and losses since the last log, on this process.

    Counts of masked tokens, eligible tokens, masked examples and too long ones; the summed loss of
    masked and of other targets, and the number of each.
    """

    BITS = (MASKED, MAY_MASK, EXAMPLE, OVERLONG)

    def __init__(self, step: int, device: torch.device) -> None:
        self.since_step = step
        self.counts = torch.zeros(len(self.BITS), dtype=torch.long, device=device)
        self.losses = torch.zeros(2, device=device)
        self.targets = torch.zeros(2, dtype=torch.long, device=device)

    def add_losses(self, sums: Tensor, targets: Tensor) -> None:
        self.losses += sums.to(self.losses)
        self.targets += targets.to(self.targets)

    def add(self, plan: Tensor) -> None:
        counts = torch.stack([(plan & bit).bool().sum() for bit in self.BITS])
        self.counts += counts.to(self.counts.device)

    def log(self, step: int, over_processes: Callable[[Tensor], Tensor]) -> MEAPLog:
        """Return the log entries at `step`. Every process must call it."""
        steps = max(step - self.since_step, 1)
        # one exchange for all whole numbers
        counts = over_processes(torch.cat([self.counts, self.targets])).tolist()
        masked, eligible, examples, too_long, masked_targets, other_targets = counts
        masked_loss, other_loss = over_processes(self.losses).tolist()
        return MEAPLog(
            _ratio(masked, eligible),
            examples / steps,
            too_long / steps,
            _ratio(masked_loss, masked_targets),
            _ratio(other_loss, other_targets),
        )


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


class MaskedTraining:
    """MEAP in one trainer. It is created before the trainer's constructor runs; `attach` starts the
    masking.

    `data` owns the training set with copies and without them.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: MEAPConfig,
        data: DoubledSet | None = None,
    ) -> None:
        """`data` has the trainer's set if that is doubled already, and the user's settings of
        tokens."""
        self.trainer = trainer
        self.config = config
        self.data = DoubledSet(config) if data is None else data
        self.collator: MEAPCollator | None = None
        self.handle: AddedMaskToken | None = None  # for an added mask token
        self.losses: LossesByKind | None = None
        self._tally: MaskTally | None = None
        self._plans = StepPlans()

    def attach(self) -> None:
        """Choose the mask token and mask training batches from now on.

        In mode `sft`, double the training set first, if it is not doubled already.

        Raises:
            ConfigError: there is no tokenizer or no mask token, or the set cannot be doubled.
        """
        trainer = self.trainer
        if self.data.current is None and trainer.train_dataset is not None:
            self._double()
        model = cast(PreTrainedModel, trainer.model)
        base = BaseModel.of_model(model)
        roles = Roles.of(tokenizer_of(trainer.processing_class), base.roles, self.data.said)
        token = mask_token_for(trainer, self.config.mask_token, base, roles)
        if trainer.args.process_index == 0:
            # lower levels are not shown by default
            logger.warning("meap.mask_token: %s", token.words)
        if token.added:
            self.handle = added_to(trainer, token)
        self.collator = MEAPCollator(
            trainer.data_collator,
            self.config,
            token.id,
            trainer.args.seed,
            base.placeholders,
            roles.never_masked,
        )
        trainer.add_callback(EpochOfMasks(self.collator, self.data))
        self.losses = LossesByKind(model, token.id, self._add_losses)
        self._use_training_set()

    def _add_losses(self, sums: Tensor, targets: Tensor) -> None:
        if self._tally is not None:
            self._tally.add_losses(sums, targets)

    # -- data --------------------------------------------------------------------------------------

    def _double(self) -> None:
        """Replace the trainer's training set with the doubled one; in mode pretrain, do nothing."""
        trainer = self.trainer
        if self.config.mode == "sft":
            base = BaseModel.of_model(cast(PreTrainedModel, trainer.model))
            trainer.train_dataset = self.data.double(
                trainer.train_dataset, trainer.processing_class, base, args=trainer.args
            )

    def _use_training_set(self) -> None:
        self.data.use(self.trainer.train_dataset)
        if self.data.why_plain is not None and self.trainer.args.process_index == 0:
            logger.warning("meap: %s", self.data.why_plain)

    def _take_other_data(self, mask_id: int) -> None:
        """Use a training set that was set after the trainer was created.

        Raises:
            ConfigError: it contains the mask token.
        """
        if mask_id in (used_ids(self.trainer.train_dataset) or ()):
            raise ConfigError(
                f"meap.mask_token: got {self.config.mask_token!r}, which chose id {mask_id} before"
                " this training set was set, and the set contains that token. Pass the set to the"
                " trainer's constructor, or name another token."
            )
        self._double()
        self._use_training_set()

    @contextlib.contextmanager
    def collating(self) -> Iterator[None]:
        """Use the masking collator as the trainer's collator, for the training data loader only."""
        trainer = self.trainer
        ours = self.collator
        # a class may request its data loader while creating it
        if ours is None or trainer.data_collator is ours:
            yield
            return
        if trainer.train_dataset is not None and trainer.train_dataset is not self.data.current:
            self._take_other_data(ours.mask_id)
        # The host may have replaced its collator since. Evaluation uses the host's, unmasked.
        ours.host = trainer.data_collator
        trainer.data_collator = ours
        try:
            yield
        finally:
            trainer.data_collator = ours.host

    def put_plain_labels(self, inputs: MutableMapping[str, Tensor]) -> None:
        """Restore the original labels of rows from the doubled training set, or from a part of
        it."""
        ids = inputs.get("input_ids")
        labels = inputs.get("labels")
        if self.config.mode != "sft" or ids is None or labels is None:
            return
        if ids.shape == labels.shape:
            inputs["labels"] = plain_labels(ids, labels, self.config.layout)

    # -- steps -------------------------------------------------------------------------------------

    def begin_window(self, batches: Sequence[MutableMapping[str, Tensor]]) -> None:
        """Remove the plans from the micro-batches of the next optimisation step, and keep them.

        Raises:
            ConfigError: a batch has no plan, because the data loader does not use the masking
                collator.
        """
        if self.collator is None:
            return
        self._plans.forget()
        for batch in batches:
            if PLAN not in batch:
                raise ConfigError(
                    f"meap: a training batch of {type(self.trainer).__name__} was not masked (it"
                    f" has {shown(list(batch))}; a masked one also has {PLAN!r}): its data loader"
                    " does not use the trainer's data_collator, or drops keys. Let"
                    " get_train_dataloader use self.data_collator as collate_fn and keep every"
                    " key, or remove `meap`."
                )
            if not self.collator.masked:  # reading it waits for the device, so only until then
                self.collator.masked = bool((batch[PLAN] & MASKED).any())
            self.take_plan(batch, of_step=True)

    def take_plan(self, inputs: object, of_step: bool = False) -> None:
        """Remove the plan from a batch, keep it, and count it once."""
        if not isinstance(inputs, MutableMapping):
            return
        plan = self._plans.take(inputs, of_step)
        if plan is None:
            return
        if self._tally is None:
            self._tally = MaskTally(self.trainer.state.global_step, self.trainer.args.device)
        self._tally.add(plan)

    def with_plan(self, inputs: Batch) -> Batch:
        """Return a batch, or the host's version of one, with the boundaries of its pairs, for the
        heads' targets.

        It is a copy with an extra key, or the batch itself if it has no pairs.
        """
        if self.config.mode != "sft" or self.config.layout != "concat":
            return inputs
        plan = self._plans.of(inputs)
        return inputs if plan is None else {**inputs, PLAN: plan}

    def start_afresh(self) -> None:
        self._tally = None
        self._plans.forget()

    def log_entries(self) -> dict[str, float]:
        """Return the log entries since the last call. Every process must call it."""
        tally = self._tally
        self._tally = None
        if tally is None:
            return {}
        gathered = functools.partial(over_processes, self.trainer.accelerator)
        return tally.log(self.trainer.state.global_step, gathered).entries()

    # -- files -------------------------------------------------------------------------------------

    def save(self, folder: Path, *, resumable: bool) -> None:
        """Save an added mask token's vector, in checkpoints and in the final folder alike."""
        if self.handle is not None:
            self.handle.save(folder, write=self.trainer.args.should_save)

    def load(self, folder: str) -> None:
        """Load the added vector from a checkpoint.

        Raises:
            ConfigError: the checkpoint was made with another `meap.mask_token`.
        """
        if self.handle is not None:
            self.handle.load(Path(folder))
        elif (Path(folder) / FILE).exists():
            raise ConfigError(
                f"meap.mask_token: this run has {self.config.mask_token}, but the checkpoint"
                f" {folder} was made with add, which trains one extra vector. Resume with"
                " mask_token: add, or start from the beginning."
            )


def mask_token_for(
    trainer: Trainer,
    wanted: int | str,
    base: BaseModel,
    roles: Roles,
) -> MaskToken:
    """Choose the mask token for a trainer's model, tokenizer and training set.

    Raises:
        ConfigError: there is no such token.
    """
    embedding = input_embedding(cast(PreTrainedModel, trainer.model))
    rows = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
    used: frozenset[int] | None = frozenset()
    if trainer.train_dataset is not None and wanted != "add":
        used = used_ids(trainer.train_dataset)
    tokenizer = tokenizer_of(trainer.processing_class)
    norms = row_norms(embedding)
    return choose_mask_token(wanted, tokenizer, rows, used, norms, base.placeholders, roles)


def added_to(trainer: Trainer, token: MaskToken) -> AddedMaskToken:
    """Return the handle of an added mask token's vector for a trainer's model.

    Raises:
        ConfigError: the trainer cannot train it.
    """
    refuse_trainer(trainer, "meap.mask_token")
    added = AddedMaskToken(cast(PreTrainedModel, trainer.model), token)
    if trainer.optimizer is not None and added.vector.requires_grad:
        raise ConfigError(
            "meap.mask_token: got add, but the trainer was given a finished optimizer"
            " (optimizers=...), which cannot contain the new vector. Pass"
            " optimizer_cls_and_kwargs instead, or name a token."
        )
    return added

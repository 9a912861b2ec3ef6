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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from caft_plugin.caft.window import over_processes
from caft_plugin.config import MEAPConfig
from caft_plugin.errors import ConfigError, shown
from caft_plugin.logs import MEAPLog
from caft_plugin.meap.base_model import BaseModel
from caft_plugin.meap.losses import LossesByKind
from caft_plugin.meap.mask_token import (
    FILE,
    AddedMaskToken,
    choose_mask_token,
    row_norms,
)
from caft_plugin.meap.masking import (
    Duplication,
    EpochOfMasks,
    MEAPCollator,
    nothing_to_mask,
    plain_labels,
)
from caft_plugin.meap.plans import StepPlans
from caft_plugin.meap.roles import NOTHING_SAID, Roles, Said
from caft_plugin.meap.training_set import TrainingSet, used_ids
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
        self.counts += torch.stack([(plan & bit).bool().sum() for bit in self.BITS]).to(
            self.counts.device
        )

    def log(self, step: int, over_processes: Callable[[Tensor], Tensor]) -> MEAPLog:
        """Return the log entries at `step`. Every process must call it."""
        steps = max(step - self.since_step, 1)
        counts = over_processes(torch.cat([self.counts, self.targets])).tolist()
        masked, eligible, examples, too_long, *targets = counts
        losses = zip(over_processes(self.losses).tolist(), targets, strict=True)
        means = [total / count if count else None for total, count in losses]
        return MEAPLog(
            masked / eligible if eligible else None, examples / steps, too_long / steps, *means
        )


class MaskedTraining:
    """MEAP in one trainer. It is created before the trainer's constructor runs; `attach` starts the
    masking.

    `data` is the training set that is masked (in mode sft, the doubled one); `plain` returns the
    same set without copies.
    """

    def __init__(self, trainer: Trainer, config: MEAPConfig) -> None:
        self.trainer = trainer
        self.config = config
        self.collator: MEAPCollator | None = None
        self.handle: AddedMaskToken | None = None  # for an added mask token
        self.data: TrainingSet = None
        self.plain: Callable[[], TrainingSet] | None = None
        self.losses: LossesByKind | None = None
        self._tally: MaskTally | None = None
        self._plans = StepPlans()

    def attach(self, said: Said = NOTHING_SAID) -> None:
        """Choose the mask token and mask training batches from now on.

        In mode `sft`, the training set is already doubled. `said` are the user's settings of
        tokens.

        Raises:
            ConfigError: there is no tokenizer or no mask token.
        """
        trainer = self.trainer
        config = self.config
        model = cast(PreTrainedModel, trainer.model)
        embedding = input_embedding(model)
        rows = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
        tokenizer = tokenizer_of(trainer.processing_class)
        used: frozenset[int] | None = frozenset()
        if trainer.train_dataset is not None and config.mask_token != "add":
            used = used_ids(trainer.train_dataset)
        base = BaseModel.of_model(model)
        roles = Roles.of(tokenizer, base.roles, said)
        norms = row_norms(embedding)
        token = choose_mask_token(
            config.mask_token, tokenizer, rows, used, norms, base.placeholders, roles
        )
        if trainer.args.process_index == 0:
            # lower levels are not shown by default
            logger.warning("meap.mask_token: %s", token.words)
        if token.added:
            refuse_trainer(trainer, "meap.mask_token")
            added = AddedMaskToken(model, token)
            if trainer.optimizer is not None and added.vector.requires_grad:
                raise ConfigError(
                    "meap.mask_token: got add, but the trainer was given a finished optimizer"
                    " (optimizers=...), which cannot contain the new vector. Pass"
                    " optimizer_cls_and_kwargs instead, or name a token."
                )
            self.handle = added
        seed = trainer.args.seed
        kept = roles.never_masked
        self.collator = MEAPCollator(
            trainer.data_collator, config, token.id, seed, base.placeholders, kept
        )
        trainer.add_callback(EpochOfMasks(self.collator))

        def found(sums: Tensor, targets: Tensor) -> None:
            if self._tally is not None:
                self._tally.add_losses(sums, targets)

        self.losses = LossesByKind(model, token.id, found)
        self._mask_from_now_on(trainer.train_dataset)

    def double(self) -> None:
        """Replace the trainer's training set with the doubled one."""
        trainer = self.trainer
        dataset = trainer.train_dataset
        base = BaseModel.of_model(cast(PreTrainedModel, trainer.model))
        trainer.train_dataset = self.doubled(dataset, trainer.processing_class, trainer.args, base)
        self.plain = lambda: dataset

    def doubled(
        self,
        dataset: TrainingSet,
        processing_class: object,
        args: TrainingArguments,
        base: BaseModel,
        max_length: int | None = None,
    ) -> TrainingSet:
        """Return a training set with copies to be masked.

        Args:
            dataset: the training set.
            processing_class: the trainer's tokenizer or processor.
            args: the trainer's arguments.
            base: facts about the base model, which also limits the length of a pair.
            max_length: of a pair, in tokens; None: no limit of the host's.
        """
        tokenizer = tokenizer_of(processing_class)
        roles = Roles.of(tokenizer, base.roles)
        limit = base.limit(max_length)
        column = args.length_column_name
        duplication = Duplication.of(
            self.config, tokenizer, limit, base.placeholders, roles, column
        )
        with args.main_process_first():
            return duplication.doubled(dataset)

    def _mask_from_now_on(self, dataset: TrainingSet) -> None:
        self.data = dataset
        nothing = (
            nothing_to_mask(dataset) if self.config.mode == "sft" and dataset is not None else None
        )
        if nothing is not None and self.collator is not None:
            self.collator.masked = True  # so that the warning appears only once
            if self.trainer.args.process_index == 0:
                logger.warning("meap: %s", nothing)

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
        if self.config.mode == "sft":
            self.double()
        self._mask_from_now_on(self.trainer.train_dataset)

    @contextlib.contextmanager
    def collating(self) -> Iterator[None]:
        """Use the masking collator as the trainer's collator, for the training data loader only."""
        trainer = self.trainer
        ours = self.collator
        # a class may request its data loader while creating it
        if ours is None or trainer.data_collator is ours:
            yield
            return
        if trainer.train_dataset is not None and trainer.train_dataset is not self.data:
            self._take_other_data(ours.mask_id)
        ours.host = trainer.data_collator
        trainer.data_collator = ours
        try:
            yield
        finally:
            trainer.data_collator = ours.host

    def as_evaluated(self, dataset: TrainingSet) -> TrainingSet:
        """Return the data set to evaluate: for the doubled training set, the one without copies."""
        return dataset if self.plain is None or dataset is not self.data else self.plain()

    def put_plain_labels(self, inputs: MutableMapping[str, Tensor]) -> None:
        """Restore the original labels of rows from the doubled training set, or from a part of
        it."""
        ids = inputs.get("input_ids")
        labels = inputs.get("labels")
        if (
            self.config.mode == "sft"
            and ids is not None
            and labels is not None
            and ids.shape == labels.shape
        ):
            inputs["labels"] = plain_labels(ids, labels, self.config.layout)

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
            if not self.collator.masked:
                self.collator.masked = bool((batch[PLAN] & MASKED).any())
            self.take_plan(batch, of_step=True)

    def take_plan(self, inputs: object, of_step: bool = False) -> None:
        """Remove the plan from a batch, keep it, and count it once."""
        plan = self._plans.take(inputs, of_step) if isinstance(inputs, MutableMapping) else None
        if plan is not None:
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
        gathered = functools.partial(over_processes, self.trainer.accelerator)
        return (
            {} if tally is None else tally.log(self.trainer.state.global_step, gathered).entries()
        )

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


def tokenizer_of(processing_class: object) -> PreTrainedTokenizerBase:
    """Return a trainer's tokenizer, which may be inside a processor.

    Raises:
        ConfigError: the trainer has no tokenizer.
    """
    tokenizer = cast(
        PreTrainedTokenizerBase | None, getattr(processing_class, "tokenizer", processing_class)
    )
    if tokenizer is None:
        raise ConfigError(
            "meap: the trainer has no tokenizer, which is needed to find special tokens. Pass "
            "processing_class=tokenizer."
        )
    return tokenizer

"""Draw the masks of each batch, after the host's collator has made it.

In mode sft, the rows are those of the doubled training set, whose labels say what may be masked
(`label_codes`); in mode pretrain, any token of a document may be.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from caft_plugin.config import MEAPConfig
from caft_plugin.errors import ConfigError
from caft_plugin.meap.doubling import DoubledSet
from caft_plugin.meap.label_codes import codes, copies_in
from caft_plugin.meap.training_set import Row
from caft_plugin.targets import EXAMPLE, IGNORE, MASKED, MAY_MASK, PLAN, Batch, document_ids

logger = logging.getLogger(__name__)


class MEAPCollator:
    """Calls the host's collator and draws masks into its batches.

    An example's masks depend only on the seed, the epoch and its tokens. `epoch` is in shared
    memory, so that worker processes that live longer than an epoch see it change.

    A batch has an extra key, `meap_plan` (batch, length), with the bits BOUNDARY, MAY_MASK, MASKED,
    EXAMPLE (one token of each masked example) and OVERLONG (one token of each example that is too
    long for a pair).

    Mode pretrain masks neither `placeholders` (ids for images or sound) nor tokens with `roles`; in
    mode sft, the labels encode what may be masked. `masked` is True once a batch of an optimisation
    step had masks. The trainer sets it: the collator may run in worker processes, and ahead of the
    steps.
    """

    def __init__(
        self,
        host: Callable[..., dict[str, Tensor]],
        config: MEAPConfig,
        mask_id: int,
        seed: int,
        placeholders: Iterable[int] = (),
        roles: Iterable[int] = (),
    ) -> None:
        self.host = host
        self.config = config
        self.mask_id = mask_id
        self.seed = seed
        self.placeholders = sorted(placeholders)
        self.roles = sorted(roles)
        self.masked = False
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __call__(
        self,
        features: Sequence[Row | list[Row]],
        *args,
        **kwargs,
    ) -> dict[str, Tensor]:
        batch = self.host(features, *args, **kwargs)
        if PLAN in batch:
            raise ConfigError(
                f"meap: {self._host_name()} already draws masks (it is from another trainer with"
                " `meap`). Pass the original collator to the trainer."
            )
        if "labels" not in batch:
            raise ConfigError(
                f"meap: {self._host_name()} made a batch without labels. Use a collator that adds"
                " them."
            )
        ids = batch["input_ids"].clone()
        labels = batch["labels"].clone()
        sft = self.config.mode == "sft"
        if sft and not codes(labels).any() and any(carries_codes(row) for row in features):
            raise ConfigError(
                f"meap: {self._host_name()} replaces the rows' labels with its own, so masks cannot"
                " be drawn. Use one that pads the rows' labels, such as"
                " transformers.DataCollatorForSeq2Seq(tokenizer)."
            )
        plan = torch.zeros_like(labels)
        draw = self._mask_copies if sft else self._mask_documents
        draw(batch, ids.numpy(), labels.numpy(), plan.numpy())
        batch["input_ids"] = ids
        batch["labels"] = labels
        batch[PLAN] = plan
        return batch

    def _host_name(self) -> str:
        return f"the data collator {getattr(self.host, '__name__', type(self.host).__name__)}"

    def _mask_copies(
        self,
        batch: Batch,
        ids: np.ndarray,
        labels: np.ndarray,
        plan: np.ndarray,
    ) -> None:
        for row_ids, row_labels, row_plan in zip(ids, labels, plan, strict=True):
            for copy in copies_in(row_labels, row_plan):
                generator = self._generator(row_ids[copy.tokens])
                drawn: list[int] = []
                for answer in copy.answers:
                    drawn += self._draw(generator, answer, len(answer))
                copy.put_targets(row_labels, drawn)
                self._put_masks(row_ids, row_plan, drawn)

    def _mask_documents(
        self,
        batch: Batch,
        ids: np.ndarray,
        labels: np.ndarray,
        plan: np.ndarray,
    ) -> None:
        documents = document_ids(batch)
        documents_by_row = np.zeros_like(ids) if documents is None else documents.cpu().numpy()
        for row_ids, row_labels, row_plan, row_documents in zip(
            ids, labels, plan, documents_by_row, strict=True
        ):
            changes = np.diff(row_documents, prepend=row_documents[0] - 1)
            starts = np.flatnonzero(changes)
            ends = [*starts[1:], len(row_ids)]
            for start, end in zip(starts, ends, strict=True):
                supervised = np.flatnonzero(row_labels[start:end] != IGNORE)
                # padding is the document -1, or ignored
                if row_documents[start] >= 0 and len(supervised):
                    document = slice(start, start + int(supervised[-1]) + 1)
                    self._mask_document(row_ids[document], row_plan[document])

    def _mask_document(self, ids: np.ndarray, plan: np.ndarray) -> None:
        """Mask one document, (length,), in place."""
        text = ~np.isin(ids, self.placeholders)
        words = text & ~np.isin(ids, self.roles)
        eligible = np.flatnonzero(words[:-1]).tolist()  # the last token predicts nothing
        if not eligible:
            return
        drawn = self._draw(self._generator(ids), eligible, int(text.sum()))
        plan[eligible] |= MAY_MASK
        self._put_masks(ids, plan, drawn)

    def _put_masks(
        self,
        ids: np.ndarray,
        plan: np.ndarray,
        drawn: list[int],
    ) -> None:
        ids[drawn] = self.mask_id
        plan[drawn] |= MASKED
        plan[drawn[:1]] |= EXAMPLE

    def _generator(self, ids: np.ndarray) -> random.Random:
        key = f"{self.seed} {int(self.epoch)} ".encode() + ids.astype(np.int64).tobytes()
        return random.Random(hashlib.blake2b(key, digest_size=16).digest())

    def _draw(
        self,
        generator: random.Random,
        eligible: list[int],
        tokens: int,
    ) -> list[int]:
        share = max(1, int(tokens * self.config.ratio))
        return generator.sample(eligible, min(share, len(eligible)))


def carries_codes(row: Row | list[Row]) -> bool:
    """Return True if the labels of a row, or of one in a list of rows, have codes."""
    if isinstance(row, list):
        return any(carries_codes(part) for part in row)
    return "labels" in row and bool(codes(np.asarray(row["labels"])).any())


class EpochOfMasks(TrainerCallback):
    """Sets the collator's epoch, also in a resumed run, and warns at the end if nothing was
    masked."""

    def __init__(self, collator: MEAPCollator, data: DoubledSet) -> None:
        self.collator = collator
        self.data = data
        self.next = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.next = int(state.epoch or 0)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.collator.epoch.fill_(self.next)
        self.next += 1

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.collator.masked or not state.is_world_process_zero:
            return
        if self.data.why_plain is not None:
            return  # a warning said so when the run got this training set
        if self.collator.config.mode == "sft":
            why = (
                "No answer was long enough (meap.min_answer_tokens), every pair was too long,"
                " or the data loader read a training set other than the trainer's"
            )
        else:
            why = "No document had two tokens of text"
        logger.warning(
            "meap: no token was masked in %d steps, so this was a plain run. %s",
            state.global_step,
            why,
        )

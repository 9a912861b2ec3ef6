"""The plans of one optimisation step's micro-batches: the host's own batches hold the host's keys only.

A host may ask for the loss of a batch as often as it likes, and of pieces of it: rows, chunks, rows in another order or
several in one. What a piece's plan is shows in its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping

import numpy as np
import torch
from torch import Tensor

from caft_plugin.loss import BOUNDARY, IGNORE, PLAN, Batch


class StepPlans:
    """The plans of the micro-batches of one optimisation step."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._known: list[_Planned] = []
        self._other: list[_Planned] = []  # the last one that is not of this step

    def take(self, batch: MutableMapping[str, Tensor], of_step: bool) -> Tensor | None:
        """Take the plan out of a batch, one of this step's or another. Returns it if it was not known."""
        plan = batch.pop(PLAN, None)
        if plan is None or any(known.plan is plan for known in self._known + self._other):
            return None
        planned = _Planned(batch["input_ids"], batch["labels"], plan)
        if of_step:
            self._known.append(planned)
        else:
            self._other = [planned]
        return plan

    def of(self, batch: Batch) -> Tensor | None:
        """Return the plan (batch, length) of a micro-batch, or of what the host made of some; None without a pair."""
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if labels is None or labels.dim() != 2:
            return None
        known_here = self._known + self._other
        for known in known_here:
            if known.plan.shape == labels.shape and (ids is known.ids or labels is known.labels):
                return known.plan
        pairs = [pair for known in known_here for pair in known.pairs()]
        if not pairs:
            return None
        tokens = [None] * len(labels) if ids is None or ids.shape != labels.shape else _array(ids)
        plan = np.zeros(labels.shape, dtype=np.int64)
        for row, row_labels, row_ids in zip(plan, _array(labels), tokens, strict=True):
            found = [] if row_ids is None else [pair.mark(row, row_ids, pair.ids) for pair in pairs]
            if not any(found) and (row_labels != IGNORE).any():  # the host may have changed tokens
                for pair in pairs:
                    pair.mark(row, row_labels, pair.labels)
        return torch.from_numpy(plan).to(labels.device)


@dataclasses.dataclass(frozen=True)
class _Planned:
    """Tokens, labels and plan of a micro-batch, each (batch, length)."""

    ids: Tensor
    labels: Tensor
    plan: Tensor

    def pairs(self) -> list[_Pair]:
        rows = zip(_array(self.ids), _array(self.labels), _array(self.plan), strict=True)
        return [_Pair(*row) for row in rows if (row[2] & BOUNDARY).any()]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A row that holds a pair: its tokens, labels and plan, each (length,)."""

    ids: np.ndarray
    labels: np.ndarray
    plan: np.ndarray

    def mark(self, plan: np.ndarray, row: np.ndarray, own: np.ndarray) -> bool:
        """Write the plan into that of `row`, where `own`, this pair's tokens or labels, and the row are parts of each
        other. Returns whether they are."""
        end = 1 + int(np.flatnonzero((self.labels != IGNORE) | (self.plan != 0))[-1])  # padding may differ
        cut, at = _offset(own, row), _offset(row, own[:end])
        if cut is None and at is None:
            return False
        start, marks = (0, self.plan[cut:]) if at is None else (at, self.plan[:end])
        marks = marks[: len(plan) - start]
        plan[start : start + len(marks)] |= marks
        return True


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.int64).contiguous().numpy()


def _offset(whole: np.ndarray, part: np.ndarray) -> int | None:
    """Where `part` begins in `whole`."""
    inside, wanted, size = whole.tobytes(), part.tobytes(), whole.itemsize
    at = inside.find(wanted)
    while at >= 0 and at % size:
        at = inside.find(wanted, at + 1)
    return None if at < 0 else at // size

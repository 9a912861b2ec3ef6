"""Keep the plans of one optimisation step's micro-batches, so that the host's batches have only the
host's keys.

A host may compute the loss of a batch more than once, and of parts of it: rows, chunks, rows in
another order, or several rows in one. The plan of a part is found by its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping

import numpy as np
import torch
from torch import Tensor

from caft_plugin.targets import BOUNDARY, IGNORE, PLAN, Batch


class StepPlans:
    """The plans of the micro-batches of one optimisation step."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._known: list[_Planned] = []
        self._other: list[_Planned] = []  # the last one that is not of this step

    def take(self, batch: MutableMapping[str, Tensor], of_step: bool) -> Tensor | None:
        """Remove the plan from a batch and keep it; return it if it was not known.

        `of_step` is True if the batch belongs to the current step.
        """
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
        """Return the plan (batch, length) of a micro-batch or of parts of micro-batches; None
        without a pair."""
        ids = batch.get("input_ids")
        labels = batch.get("labels")
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
    """A row with a pair: its tokens, labels and plan, each (length,)."""

    ids: np.ndarray
    labels: np.ndarray
    plan: np.ndarray

    def mark(self, plan: np.ndarray, row: np.ndarray, own: np.ndarray) -> bool:
        """Add this pair's plan to `plan`, the plan of `row`, if one of `own` and `row` contains the
        other.

        Args:
            plan: changed in place.
            row: tokens or labels of the row.
            own: this pair's tokens or labels.

        Returns:
            True if one contains the other.
        """
        # padding may differ
        end = 1 + int(np.flatnonzero((self.labels != IGNORE) | (self.plan != 0))[-1])
        cut = _offset(own, row)
        at = _offset(row, own[:end])
        if cut is None and at is None:
            return False
        start, marks = (0, self.plan[cut:]) if at is None else (at, self.plan[:end])
        marks = marks[: len(plan) - start]
        plan[start : start + len(marks)] |= marks
        return True


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.int64).contiguous().numpy()


def _offset(whole: np.ndarray, part: np.ndarray) -> int | None:
    """Return the index at which `part` starts in `whole`, or None."""
    inside = whole.tobytes()
    wanted = part.tobytes()
    size = whole.itemsize
    at = inside.find(wanted)
    while at >= 0 and at % size:
        at = inside.find(wanted, at + 1)
    return None if at < 0 else at // size

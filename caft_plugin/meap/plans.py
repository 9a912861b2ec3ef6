"""Keep the plans of one optimisation step's micro-batches, so that the host's batches have only the
host's keys.

A host may compute the loss of a batch more than once, and of parts of it: rows, chunks, rows in
another order, or several rows in one. The plan of a part is found by its tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
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
        if plan is None:
            return None
        if any(known.plan is plan for known in self._known + self._other):
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
            if known.is_of(ids, labels):
                return known.plan
        pairs = list(itertools.chain.from_iterable(known.pairs() for known in known_here))
        return _plan_of_parts(ids, labels, pairs) if pairs else None


def _plan_of_parts(
    ids: Tensor | None,
    labels: Tensor,
    pairs: list[_Pair],
) -> Tensor:
    """Return the plan (batch, length) of rows that may have pairs, or parts of them, anywhere."""
    plan = np.zeros(labels.shape, dtype=np.int64)
    rows_of_ids = None
    if ids is not None and ids.shape == labels.shape:
        rows_of_ids = _array(ids)
    for index, row_labels in enumerate(_array(labels)):
        row_ids = None if rows_of_ids is None else rows_of_ids[index]
        _mark_row(plan[index], row_ids, row_labels, pairs)
    return torch.from_numpy(plan).to(labels.device)


def _mark_row(
    plan: np.ndarray,
    ids: np.ndarray | None,
    labels: np.ndarray,
    pairs: list[_Pair],
) -> None:
    """Add the plans of pairs in a row to the row's plan, in place; arrays are (length,)."""
    if ids is not None:
        found = [pair.mark(plan, ids, pair.ids) for pair in pairs]
        if any(found):
            return
    # The host may have changed the tokens (noise, dropped ones): labels tell the pair too, unless
    # nothing in the row is learnt.
    if (labels != IGNORE).any():
        for pair in pairs:
            pair.mark(plan, labels, pair.labels)


@dataclasses.dataclass(frozen=True)
class _Planned:
    """Tokens, labels and plan of a micro-batch, each (batch, length)."""

    ids: Tensor
    labels: Tensor
    plan: Tensor

    def is_of(self, ids: Tensor | None, labels: Tensor) -> bool:
        """Return True if this is the plan of a batch with these tensors themselves."""
        same = ids is self.ids or labels is self.labels
        return same and self.plan.shape == labels.shape

    def pairs(self) -> list[_Pair]:
        rows = zip(_array(self.ids), _array(self.labels), _array(self.plan), strict=True)
        rows_as_pairs = (_Pair(*row) for row in rows)
        return [pair for pair in rows_as_pairs if (pair.plan & BOUNDARY).any()]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A row with a pair: its tokens, labels and plan, each (length,)."""

    ids: np.ndarray
    labels: np.ndarray
    plan: np.ndarray

    def mark(
        self,
        plan: np.ndarray,
        row: np.ndarray,
        own: np.ndarray,
    ) -> bool:
        """Add this pair's plan to `plan`, the plan of `row`, if one of `own` and `row` contains the
        other.

        Args:
            plan: changed in place.
            row: tokens or labels of the row.
            own: this pair's tokens or labels.

        Returns:
            True if one contains the other.
        """
        # without padding, which may differ
        end = 1 + int(np.flatnonzero((self.labels != IGNORE) | (self.plan != 0))[-1])
        at = _offset(row, own[:end])
        if at is not None:  # the pair is in the row
            marks = self.plan[:end]
        else:
            cut = _offset(own, row)
            if cut is None:
                return False
            at = 0  # the row is a part of the pair
            marks = self.plan[cut:]
        marks = marks[: len(plan) - at]
        plan[at : at + len(marks)] |= marks
        return True


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.int64).contiguous().numpy()


def _offset(whole: np.ndarray, part: np.ndarray) -> int | None:
    """Return the index at which `part` starts in `whole`, or None."""
    inside = whole.tobytes()
    wanted = part.tobytes()
    size = whole.itemsize
    at = inside.find(wanted)
    while at >= 0 and at % size:  # bytes can match between two numbers
        at = inside.find(wanted, at + 1)
    return None if at < 0 else at // size

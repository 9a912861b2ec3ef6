"""Encode in labels what may be masked, and decode it.

Labels carry this from the doubled training set to the masking collator, because every host pads,
truncates and packs labels together with the tokens, and drops other columns. A label is the host's
(-100 or a token id), or one of the codes below. A batch has no codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from caft_plugin.targets import BOUNDARY, IGNORE, MAY_MASK, OVERLONG

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, Tensor)

COPY = -101  # a token of a copy outside its answers
KEPT = -102  # a supervised token of a copy that is never masked: special, or an end token
COPY_START = -103  # the first token of a copy after its original
# Above every token id: a code that keeps the label, so that it can be restored.
ELIGIBLE = 2**24  # + token id: a token of a copy that may be masked
TOO_LONG = 2**25  # + token id: the first target of an example whose pair would be too long


def runs(inside: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return start and end of each maximal run of True in a boolean row."""
    padded = np.concatenate(([0], inside.astype(np.int8), [0]))
    edges = np.flatnonzero(np.diff(padded))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


# -- encode ----------------------------------------------------------------------------------------


def copy_codes(labels: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """Return the codes of an example's copy: all arrays are (length,), `maskable` is boolean."""
    coded = np.where(labels == IGNORE, COPY, KEPT)
    coded[maskable] = labels[maskable] + ELIGIBLE
    return coded


def after_original(coded: np.ndarray) -> np.ndarray:
    """Return a copy's codes for the same row as its original, where heads must see the border."""
    return np.concatenate([[COPY_START], coded[1:]])


def in_its_own_row(coded: np.ndarray) -> np.ndarray:
    """Return a copy's codes for a row of its own: two copies in one packed row are two runs."""
    return np.concatenate([[IGNORE], coded[1:]])


def too_long_codes(labels: np.ndarray) -> np.ndarray:
    """Return an example's labels, marked as those of one that is too long for a pair."""
    first_target = 1 + np.flatnonzero(labels[1:] != IGNORE)[0]
    coded = labels.copy()
    coded[first_target] += TOO_LONG
    return coded


# -- decode ----------------------------------------------------------------------------------------


def codes(labels: ArrayOrTensor) -> ArrayOrTensor:
    """Return a mask of the labels (an array or a tensor) that are codes."""
    return (labels < IGNORE) | (labels >= ELIGIBLE)


def may_be_masked(labels: np.ndarray) -> np.ndarray:
    return (labels >= ELIGIBLE) & (labels < TOO_LONG)


def too_long(labels: np.ndarray) -> np.ndarray:
    return labels >= TOO_LONG


def has_target(row: Mapping[str, Any]) -> bool:
    """Return True if a doubled and then truncated row still has a token that is, or may be, a
    target."""
    return any(label >= 0 for label in row["labels"])


def plain_labels(
    ids: Tensor,
    labels: Tensor,
    layout: str,
) -> Tensor:
    """Return the original labels of rows from a doubled training set, for evaluation.

    A copy after its original is not evaluated again; a copy in its own row is evaluated like its
    original.
    """
    labels = torch.where(labels >= TOO_LONG, labels - TOO_LONG, labels)
    if layout == "separate":
        labels = torch.where(labels == KEPT, ids, labels)
        labels = torch.where(labels >= ELIGIBLE, labels - ELIGIBLE, labels)
    return labels.masked_fill(codes(labels), IGNORE)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy in a row of labels.

    `coded` are the positions of its codes, `tokens` those without its first token, which has a code
    in one layout only; `answers` are the positions that may be masked, by answer.
    """

    coded: slice
    tokens: slice
    answers: list[list[int]]

    def put_targets(self, labels: np.ndarray, masked: list[int]) -> None:
        """Replace the copy's codes in its row, in place: only masked tokens are targets."""
        targets = labels[masked] - ELIGIBLE
        labels[self.coded] = IGNORE
        labels[masked] = targets


def copies_in(labels: np.ndarray, plan: np.ndarray) -> Iterator[Copy]:
    """Yield the copies in a row of labels, (length,), and begin the row's plan, (length,).

    Both are changed in place. The codes of a copy remain until its `put_targets`.
    """
    # first: these codes are above ELIGIBLE, but no copy's
    long = too_long(labels)
    labels[long] -= TOO_LONG
    plan[long] |= OVERLONG
    plan[labels == COPY_START] |= BOUNDARY
    plan[may_be_masked(labels)] |= MAY_MASK
    for start, end in runs(codes(labels)):
        coded = labels[start:end]
        eligible = may_be_masked(coded)
        answers = []
        for begin, stop in runs(eligible | (coded == KEPT)):
            answer = start + begin + np.flatnonzero(eligible[begin:stop])
            if len(answer):
                answers.append(answer.tolist())
        # the same tokens in both layouts, so that a copy's masks are the same too
        first = start + 1 if coded[0] == COPY_START else start
        yield Copy(slice(start, end), slice(first, end), answers)

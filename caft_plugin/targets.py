"""The targets of heads: documents, what a position sees, and the label of a token ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caft_plugin.errors import ConfigError

# A collator's batch: tensors by name. An attention mask may be a dict of tensors; other keys belong
# to the host.
Batch = Mapping[str, Any]
IGNORE = -100
# A key of MEAP's batches (batch, length), and its bits. A position is the first of a copy after its
# original, may be masked, is masked, marks a masked example (one token of each), or marks an
# example that is too long for a pair.
PLAN = "meap_plan"
BOUNDARY = 1
MAY_MASK = 2
MASKED = 4
EXAMPLE = 8
OVERLONG = 16
# An addend of an attention score at or below this value hides a key; above, it is a bias.
HIDDEN = -1000.0


def document_ids(batch: Batch) -> Tensor | None:
    """Return the document of each position, or None if the batch does not mark boundaries.

    Documents are separated in the host's attention: by position ids that do not increase by 1
    (M-RoPE: that return to 0 on every axis), by a numbered attention mask (1 1 2 2 2 ...), by a
    query-key mask in which a position does not see the previous one, or by cumulative sequence
    lengths. Padding (attention mask 0) is -1. The masked copy of a MEAP pair is its own document.

    Args:
        batch: `labels` (batch, length) and, if present, `position_ids` (batch, length), or (axes,
            batch, length) with 3 axes (time, height, width) or 4 (text first), `attention_mask`
            (batch, length) or as in `sees_back`, `cu_seq_lens_q`, and MEAP's plan.

    Returns:
        Long tensor (batch, length), equal within a document and different between neighbours.
    """
    labels = batch["labels"]
    mask = mask_of(batch)
    positions = batch.get("position_ids")
    lengths = batch.get("cu_seq_lens_q")
    plan = batch.get(PLAN)
    marks: list[Tensor] = []
    if positions is not None:
        marks.append(_starts_in_positions(positions, labels.shape))
    if mask is not None:
        marks.append(_starts_in_mask(mask, labels.shape))
    if lengths is not None:
        marks.append(_starts_in_lengths(lengths, labels))
    if plan is not None:
        marks.append((plan & BOUNDARY).bool())
    if not marks:
        return None
    starts = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    for mark in marks:
        starts |= mark
    documents = starts.cumsum(dim=1)
    is_padding = mask == 0 if isinstance(mask, Tensor) and mask.shape == labels.shape else None
    return documents if is_padding is None else documents.masked_fill(is_padding, -1)


def _starts_in_positions(positions: Tensor, shape: torch.Size) -> Tensor:
    if positions.dim() == 3 and len(positions) == 3:
        # M-RoPE: time, height and width. Within an image they repeat or jump; only a document's
        # first token has 0 on every axis.
        return (positions == 0).all(dim=0)
    if positions.dim() == 3:
        # four axes: the first is the text's, which the model uses to separate documents
        positions = positions[0]
    positions = positions.expand(shape)
    follow = positions[:, :-1] + 1
    return _after_first(positions[:, 1:] != follow)


def _starts_in_mask(mask: object, shape: torch.Size) -> Tensor:
    if isinstance(mask, Tensor) and mask.shape == shape:
        return _after_first(mask[:, 1:] != mask[:, :-1])
    return _after_first(~sees_back(mask, 1, shape))


def _starts_in_lengths(lengths: Tensor, labels: Tensor) -> Tensor:
    ends = lengths.flatten()
    is_inner = (ends > 0) & (ends < labels.numel())
    inner = ends[is_inner].long()
    starts = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
    starts[inner.to(labels.device)] = True
    return starts.view(labels.shape)


def _after_first(changed: Tensor) -> Tensor:
    """Return what is true of positions 1, 2, ... (batch, length - 1) for all, False for 0."""
    return F.pad(changed, (1, 0))


def mask_of(batch: Batch) -> object:
    """Return the batch's attention mask; None also for a dict by layer type without any mask."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Mapping) and all(of_layers is None for of_layers in mask.values()):
        return None
    return mask


def sees_back(
    mask: object,
    distance: int,
    shape: torch.Size,
) -> Tensor:
    """Return which positions attend to the position `distance` before them, according to a
    query-key mask.

    Args:
        mask: (batch or 1, length, length) or (batch or 1, heads or 1, length, length): True or
            non-zero where a query (second-to-last axis) sees a key (last axis); or floating point,
            the addend of the scores. Or a dict of such masks by layer type, with at least one mask;
            visible in one of them counts.
        distance: in tokens, at least 1.
        shape: the labels' shape, (batch, length).

    Returns:
        Boolean tensor (batch, length - distance), for positions from `distance` on.

    Raises:
        ConfigError: a mask of another type or shape.
    """
    length = shape[1]
    if isinstance(mask, Mapping):
        masks = [of_layers for of_layers in mask.values() if of_layers is not None]
        return torch.stack([sees_back(m, distance, shape) for m in masks]).any(0)
    kind = f"a {type(mask).__name__}"
    if isinstance(mask, Tensor):
        kind = f"a tensor of shape {tuple(mask.shape)}"
    is_square = isinstance(mask, Tensor) and mask.shape[-2:] == (length, length)
    if not isinstance(mask, Tensor) or not is_square or mask.dim() not in (3, 4):
        raise ConfigError(
            f"caft: the batch's attention_mask is {kind}, from which documents cannot be separated"
            f" for labels of shape {tuple(shape)}. It accepts (batch, length), (batch, length,"
            " length) or (batch, heads, length, length). Without a mask, use position_ids that"
            " restart with each document."
        )
    pairs = mask.diagonal(-distance, dim1=-2, dim2=-1)
    seen = pairs > HIDDEN if mask.is_floating_point() else pairs != 0
    if seen.dim() == 3:
        seen = seen.any(1)
    return seen.expand(shape[0], -1)


def head_targets(batch: Batch, num_heads: int) -> Tensor:
    """Return the target of each head at each position.

    Head k (k = 1..num_heads) at position t predicts `labels[t + k + 1]`. The target is -100 if that
    position is past the end, ignored, padding, in another document, or does not attend to position
    t.

    Args:
        batch: `labels` (batch, length), and the keys that mark documents (see `document_ids`).
        num_heads: number of heads.

    Returns:
        Long tensor (num_heads, batch, length).
    """
    labels = batch["labels"]
    mask = mask_of(batch)
    of_positions = isinstance(mask, Tensor) and mask.shape == labels.shape
    pairwise = mask is not None and not of_positions
    if pairwise:
        # A query-key mask is used directly, because its documents may be interleaved.
        batch = {**batch, "attention_mask": None}
    documents = document_ids(batch)
    targets = labels.new_full((num_heads, *labels.shape), IGNORE)
    for index in range(num_heads):
        ahead = index + 2
        if ahead >= labels.shape[1]:
            continue
        target = labels[:, ahead:]
        if documents is not None:
            there = documents[:, ahead:]
            here = documents[:, :-ahead]
            is_other = (there != here) | (there < 0)
            target = target.masked_fill(is_other, IGNORE)
        if pairwise:
            is_seen = sees_back(mask, ahead, labels.shape)
            target = target.masked_fill(~is_seen, IGNORE)
        targets[index, :, :-ahead] = target
    return targets


def count_targets(targets: Tensor) -> Tensor:
    """Return the number of valid targets of each head: long tensor (num_heads,)."""
    return (targets != IGNORE).flatten(1).sum(1)

"""The auxiliary loss: targets k ahead, linear cross-entropy, weights and schedule. Needs torch alone."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
# A key of MEAP's batches (batch, length): bits that say what each position is. BOUNDARY marks the first token of a copy
# that stands behind its original.
PLAN, BOUNDARY = "meap_plan", 1
# Logits alive at a time: 2^24 float32 values are 64 MiB, whatever the vocabulary.
LOGITS_AT_A_TIME = 2**24


def gamma(schedule: str, step: int, total_steps: int) -> float:
    """The schedule's factor at optimisation step `step` (0-based) of `total_steps` (paper, section 3; the
    other schedules are those of the released code)."""
    done = step / max(total_steps, 1)
    match schedule:
        case "rsine":
            return math.sin((1 - done) * math.pi / 2)
        case "sine":
            return math.sin(done * math.pi / 2)
        case "linear":
            return done
        case "constant":
            return 1.0
    raise ValueError(f"unknown schedule {schedule!r}")


def head_weights(beta: float, alpha: float, gamma: float, num_heads: int) -> list[float]:
    """The weight of each head's mean loss in the total: beta * gamma * alpha^k for k = 1..num_heads."""
    return [beta * gamma * alpha**k for k in range(1, num_heads + 1)]


def document_ids(batch: Mapping[str, Any]) -> Tensor | None:
    """Which document each position belongs to, or None where the batch has no sign of boundaries.

    A document is what the host's attention separates: position ids that do not count on (those of M-RoPE: that are
    back at 0 on every axis), a numbered attention mask (1 1 2 2 2 ...), or cumulative sequence lengths. Padding
    (attention mask 0) is -1. The masked copy in a MEAP pair counts as a document of its own.

    Args:
        batch: `labels` (batch, length), and where there are any `position_ids` (batch, length), or (axes, batch,
            length) with 3 axes (time, height, width) or 4 (text before them), `attention_mask`, `cu_seq_lens_q` and
            MEAP's plan.

    Returns:
        Long tensor (batch, length), equal within a document and different between neighbours.
    """
    shape = batch["labels"].shape
    device = batch["labels"].device
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    found = False

    positions = batch.get("position_ids")
    if positions is not None:
        if positions.dim() == 3 and len(positions) == 3:
            # M-RoPE: time, height and width. Over an image they stand still or jump; only a document's first
            # token has 0 on every axis.
            starts |= (positions == 0).all(dim=0)
        else:
            if positions.dim() == 3:  # four axes: that of the text, by which the model separates documents, is first
                positions = positions[0]
            positions = positions.expand(shape)
            starts[:, 1:] |= positions[:, 1:] != positions[:, :-1] + 1
        found = True

    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape == shape:
        starts[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        found = True
    else:
        mask = None

    lengths = batch.get("cu_seq_lens_q")
    if lengths is not None:
        inner = lengths.flatten()
        inner = inner[(inner > 0) & (inner < starts.numel())].long()
        starts.view(-1)[inner.to(device)] = True
        found = True

    plan = batch.get(PLAN)
    if plan is not None:
        starts |= (plan & BOUNDARY).bool()
        found = True

    if not found:
        return None
    documents = starts.cumsum(dim=1)
    return documents if mask is None else documents.masked_fill(mask == 0, -1)


def head_targets(batch: Mapping[str, Any], num_heads: int) -> Tensor:
    """The token each head has to predict at each position.

    Head k (k = 1..num_heads) at position t is to predict `labels[t + k + 1]`; where that lies past the end,
    is ignored, is padding or belongs to another document, the target is -100.

    Args:
        batch: `labels` (batch, length), and what marks documents (see `document_ids`).

    Returns:
        Long tensor (num_heads, batch, length).
    """
    labels = batch["labels"]
    documents = document_ids(batch)
    targets = labels.new_full((num_heads, *labels.shape), IGNORE)
    for index in range(num_heads):
        ahead = index + 2
        if ahead >= labels.shape[1]:
            continue
        target = labels[:, ahead:]
        if documents is not None:
            there, here = documents[:, ahead:], documents[:, :-ahead]
            target = target.masked_fill((there != here) | (there < 0), IGNORE)
        targets[index, :, :-ahead] = target
    return targets


def count_targets(targets: Tensor) -> Tensor:
    """Valid targets of each head: long tensor (num_heads,)."""
    return (targets != IGNORE).flatten(1).sum(1)


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, unembed: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """Sum over rows of cross_entropy(unembed(hidden), targets), with few logits alive at a time.

    Args:
        hidden: (rows, hidden size), rows may be 0: the sum is then 0 and still joined to the graph.
        targets: (rows,) token ids, none of them ignored.
        unembed: maps (n, hidden size) to logits (n, vocab_size).

    Returns:
        float32 scalar, in nats, summed in float32 whatever the dtype of `hidden`.
    """

    def of_chunk(rows: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(unembed(rows).float(), ids, reduction="sum")

    return _sum_in_chunks(of_chunk, vocab_size, hidden, targets)


def summed_cross_entropy_and_hits(
    hidden: Tensor, targets: Tensor, unembed: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """`summed_cross_entropy`, and how many targets have the largest logit: float32 tensor (2,)."""

    def of_chunk(rows: Tensor, ids: Tensor) -> Tensor:
        logits = unembed(rows).float()
        hits = (logits.argmax(-1) == ids).sum()
        return torch.stack([F.cross_entropy(logits, ids, reduction="sum"), hits.float()])

    return _sum_in_chunks(of_chunk, vocab_size, hidden, targets)


def summed_divergence(hidden: Tensor, teacher: Tensor, unembed: Callable[[Tensor], Tensor], vocab_size: int) -> Tensor:
    """Sum over rows of KL(p || q), p the distribution that `unembed` makes of `teacher`, q that of `hidden`.

    Args:
        hidden: (rows, hidden size), rows may be 0.
        teacher: (rows, hidden size), the same rows; takes no gradient.
        unembed: maps (n, hidden size) to logits (n, vocab_size).

    Returns:
        float32 scalar, in nats.
    """

    def of_chunk(rows: Tensor, teacher_rows: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = unembed(teacher_rows).float().log_softmax(-1)
        return F.kl_div(unembed(rows).float().log_softmax(-1), wanted, reduction="sum", log_target=True)

    return _sum_in_chunks(of_chunk, vocab_size, hidden, teacher)


def _sum_in_chunks(of_chunk: Callable[..., Tensor], vocab_size: int, *rows: Tensor) -> Tensor:
    """Sum of `of_chunk` over chunks of rows. A chunk's logits are dropped after its loss and computed again in the
    backward pass."""
    size = max(64, LOGITS_AT_A_TIME // vocab_size)
    starts = range(0, max(len(rows[0]), 1), size)
    once = of_chunk
    if torch.is_grad_enabled():
        once = functools.partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
    return functools.reduce(operator.add, (once(*(r[start : start + size] for r in rows)) for start in starts))

"""The auxiliary loss: targets, linear cross-entropy, weights and schedule. Independent of any framework."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caft_plugin.config import ConfigError

# A collator's batch: tensors by name. An attention mask may be a dict of tensors; other keys belong to the host.
Batch = Mapping[str, Any]
# Maps hidden states (n, hidden size) and their targets (n, ...) to float32 figures (n, figures), the loss first.
RowLoss = Callable[[Tensor, Tensor], Tensor]

IGNORE = -100
# A key of MEAP's batches (batch, length), and its bits. A position is the first of a copy after its original, may be
# masked, is masked, marks a masked example (one token of each), or marks an example that is too long for a pair.
PLAN = "meap_plan"
BOUNDARY, MAY_MASK, MASKED, EXAMPLE, OVERLONG = 1, 2, 4, 8, 16
# An addend of an attention score at or below this value hides a key; above, it is a bias.
HIDDEN = -1000.0
# Maximum number of logits in memory at a time. 2^23 float32 values are 32 MiB: small enough to be fast on a CPU, and
# the size from which glibc always returns memory. Accelerators need more rows in one product.
LOGITS_AT_A_TIME = {"cpu": 2**23, "accelerator": 2**25}


def rows_at_a_time(device: torch.device, vocab_size: int) -> int:
    """Return the number of rows whose logits are computed at a time: at least 64."""
    logits = LOGITS_AT_A_TIME["cpu" if device.type == "cpu" else "accelerator"]
    return max(64, math.ceil(logits / vocab_size))


def gamma(schedule: str, step: int, total_steps: int) -> float:
    """Return the schedule's factor at optimisation step `step` (0-based) of `total_steps`.

    `rsine` is the paper's (section 3); the others are from the released code.
    """
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
    """Return the weight of each head's mean loss in the total: beta * gamma * alpha^k for k = 1..num_heads."""
    return [beta * gamma * alpha**k for k in range(1, num_heads + 1)]


def document_ids(batch: Batch) -> Tensor | None:
    """Return the document of each position, or None if the batch does not mark boundaries.

    Documents are separated in the host's attention: by position ids that do not increase by 1 (M-RoPE: that return to
    0 on every axis), by a numbered attention mask (1 1 2 2 2 ...), by a query-key mask in which a position does not see
    the previous one, or by cumulative sequence lengths. Padding (attention mask 0) is -1. The masked copy of a MEAP
    pair is its own document.

    Args:
        batch: `labels` (batch, length) and, if present, `position_ids` (batch, length), or (axes, batch, length) with
            3 axes (time, height, width) or 4 (text first), `attention_mask` (batch, length) or as in `sees_back`,
            `cu_seq_lens_q`, and MEAP's plan.

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
            # M-RoPE: time, height and width. Within an image they repeat or jump; only a document's first token has
            # 0 on every axis.
            starts |= (positions == 0).all(dim=0)
        else:
            if positions.dim() == 3:  # four axes: the first is the text's, which the model uses to separate documents
                positions = positions[0]
            positions = positions.expand(shape)
            starts[:, 1:] |= positions[:, 1:] != positions[:, :-1] + 1
        found = True

    mask = mask_of(batch)
    if isinstance(mask, Tensor) and mask.shape == shape:
        starts[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        found = True
    elif mask is not None:
        starts[:, 1:] |= ~sees_back(mask, 1, shape)
        mask, found = None, True

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


def mask_of(batch: Batch) -> object:
    """Return the batch's attention mask; None also for a dict by layer type without any mask."""
    mask = batch.get("attention_mask")
    return None if isinstance(mask, Mapping) and all(m is None for m in mask.values()) else mask


def sees_back(mask: object, distance: int, shape: torch.Size) -> Tensor:
    """Return which positions attend to the position `distance` before them, according to a query-key mask.

    Args:
        mask: (batch or 1, length, length) or (batch or 1, heads or 1, length, length): True or non-zero where a query
            (second-to-last axis) sees a key (last axis); or floating point, the addend of the scores. Or a dict of
            such masks by layer type, with at least one mask; visible in one of them counts.
        distance: in tokens, at least 1.
        shape: the labels' shape, (batch, length).

    Returns:
        Boolean tensor (batch, length - distance), for positions from `distance` on.

    Raises:
        ConfigError: a mask of another type or shape.
    """
    length = shape[1]
    if isinstance(mask, Mapping):
        return torch.stack([sees_back(m, distance, shape) for m in mask.values() if m is not None]).any(0)
    if not isinstance(mask, Tensor) or mask.dim() not in (3, 4) or mask.shape[-2:] != (length, length):
        kind = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ConfigError(
            f"caft: the batch's attention_mask is {kind}, from which documents cannot be separated for labels of shape "
            f"{tuple(shape)}. It accepts (batch, length), (batch, length, length) or (batch, heads, length, length). "
            "Without a mask, use position_ids that restart with each document."
        )
    pairs = mask.diagonal(-distance, dim1=-2, dim2=-1)
    seen = pairs > HIDDEN if mask.is_floating_point() else pairs != 0
    if seen.dim() == 3:
        seen = seen.any(1)
    return seen.expand(shape[0], -1)


def head_targets(batch: Batch, num_heads: int) -> Tensor:
    """Return the target of each head at each position.

    Head k (k = 1..num_heads) at position t predicts `labels[t + k + 1]`. The target is -100 if that position is past
    the end, ignored, padding, in another document, or does not attend to position t.

    Args:
        batch: `labels` (batch, length), and the keys that mark documents (see `document_ids`).
        num_heads: number of heads.

    Returns:
        Long tensor (num_heads, batch, length).
    """
    labels, mask = batch["labels"], mask_of(batch)
    pairwise = mask is not None and not (isinstance(mask, Tensor) and mask.shape == labels.shape)
    # A query-key mask is used directly, because its documents may be interleaved.
    documents = document_ids({**batch, "attention_mask": None} if pairwise else batch)
    targets = labels.new_full((num_heads, *labels.shape), IGNORE)
    for index in range(num_heads):
        ahead = index + 2
        if ahead >= labels.shape[1]:
            continue
        target = labels[:, ahead:]
        if documents is not None:
            there, here = documents[:, ahead:], documents[:, :-ahead]
            target = target.masked_fill((there != here) | (there < 0), IGNORE)
        if pairwise:
            target = target.masked_fill(~sees_back(mask, ahead, labels.shape), IGNORE)
        targets[index, :, :-ahead] = target
    return targets


def count_targets(targets: Tensor) -> Tensor:
    """Return the number of valid targets of each head: long tensor (num_heads,)."""
    return (targets != IGNORE).flatten(1).sum(1)


def cross_entropy_of(unembed: Callable[[Tensor], Tensor]) -> RowLoss:
    """Return a row loss: hidden states (n, hidden size) and token ids (n,) to cross-entropies (n, 1)."""

    def row_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(unembed(hidden).float(), targets, reduction="none")[:, None]

    return row_loss


def cross_entropy_and_hit_of(unembed: Callable[[Tensor], Tensor]) -> RowLoss:
    """Return a row loss like `cross_entropy_of`, plus 1 where the target has the largest logit: (n, 2)."""

    def row_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = unembed(hidden).float()
        hits = logits.argmax(-1) == targets
        return torch.stack([F.cross_entropy(logits, targets, reduction="none"), hits.float()], dim=1)

    return row_loss


def divergence_of(unembed: Callable[[Tensor], Tensor]) -> RowLoss:
    """Return a row loss: hidden states and a teacher's, both (n, hidden size), to KL(p || q), (n, 1).

    p is the distribution that `unembed` gives for the teacher's hidden state, q the one for the other.
    """

    def row_loss(hidden: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = unembed(teacher).float().log_softmax(-1)
        log_q = unembed(hidden).float().log_softmax(-1)
        return F.kl_div(log_q, wanted, reduction="none", log_target=True).sum(-1, keepdim=True)

    return row_loss


@dataclasses.dataclass(frozen=True)
class Lesson:
    """The kind of target that heads learn.

    `row_loss` makes the loss of each row from an unembedding. `learned` returns the targets (n,) of head `index` at
    `positions` (n,) of the flattened batch, from the head's target tokens (batch, length) and the model's final hidden
    state (batch, length, hidden size), or None if its norm was not called.
    """

    row_loss: Callable[[Callable[[Tensor], Tensor]], RowLoss]
    learned: Callable[[Tensor, int, Tensor, Tensor | None], Tensor]


def tokens_at(targets: Tensor, index: int, positions: Tensor, final: Tensor | None) -> Tensor:
    return targets.to(positions.device).flatten()[positions]


def distributions_at(targets: Tensor, index: int, positions: Tensor, final: Tensor | None) -> Tensor:
    """Return the final hidden states (n, hidden size) from which the model predicts the targets."""
    if final is None:
        raise ConfigError(
            "pretrain_heads.targets: got distribution, but the model did not call its final norm, from which its "
            "distribution is computed. Use targets: model or dataset."
        )
    return final.detach().roll(-(index + 1), dims=1).flatten(0, 1)[positions]


TOKENS = Lesson(cross_entropy_of, tokens_at)
TOKENS_AND_HITS = Lesson(cross_entropy_and_hit_of, tokens_at)
DISTRIBUTIONS = Lesson(divergence_of, distributions_at)


def weighted_sum(
    row_loss: RowLoss,
    weights: Tensor,
    hidden: Tensor,
    learned: Tensor,
    vocab_size: int,
    parameters: Iterable[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the rows' losses, with few logits in memory at a time.

    If gradients are needed, they are computed in the forward pass, chunk by chunk, so that logits are computed once
    and freed. (`torch.nn.functional.linear_cross_entropy` does the same for a plain matrix, but returns the loss in
    half precision for half-precision inputs.)

    Args:
        row_loss: called with chunks of `hidden` and `learned`.
        weights: (rows,) float32.
        hidden: (rows, hidden size); with 0 rows the sum is 0 and still part of the graph.
        learned: the targets (rows, ...), without gradient.
        vocab_size: of the logits in `row_loss`; it determines the chunk size.
        parameters: other tensors that `row_loss` uses and that may need a gradient.

    Returns:
        The sum, a float32 scalar in nats, and the figures of all rows (rows, figures), without gradient.
    """
    if not torch.is_grad_enabled():
        hidden, parameters = hidden.detach(), ()
    size = rows_at_a_time(hidden.device, vocab_size)
    return _WeightedSum.apply(row_loss, size, weights, learned, hidden, *parameters)


def _own_saved_tensors() -> torch.autograd.graph.saved_tensors_hooks:
    """Return hooks that override the host's for tensors of one chunk.

    TRL's activation offloading would mistake the first of these tensors that is unpacked for the start of the backward
    pass, and keep all later ones until its end.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_loss: RowLoss,
        size: int,
        weights: Tensor,
        learned: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = [index for index, tensor in enumerate(parameters) if tensor.requires_grad]
        differentiate = hidden.requires_grad or bool(wanted)
        # Gradients are computed with weights near 1, for float16; the factor is applied in the backward pass.
        factor = weights.max().clamp(min=1e-30) if len(weights) else weights.new_ones(())
        figures, hidden_gradients = [], []
        parameter_gradients: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, max(len(hidden), 1), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(differentiate), _own_saved_tensors():
                rows = hidden[chunk].detach().requires_grad_(hidden.requires_grad)
                chunk_figures = row_loss(rows, learned[chunk])
                loss = (chunk_figures[:, 0] * (weights[chunk] / factor)).sum()
            figures.append(chunk_figures.detach())
            if not loss.requires_grad:
                continue
            inputs = [rows] if hidden.requires_grad else []
            found = list(torch.autograd.grad(loss, inputs + [parameters[i] for i in wanted], allow_unused=True))
            hidden_gradients += [found.pop(0) for _ in inputs]
            for index, gradient in zip(wanted, found, strict=True):
                before = parameter_gradients[index]
                parameter_gradients[index] = gradient if before is None else before.add_(gradient)
        ctx.factor = factor
        ctx.gradients = [torch.cat(hidden_gradients) if hidden_gradients else None, *parameter_gradients]
        values = torch.cat(figures)
        ctx.mark_non_differentiable(values)
        return (values[:, 0] * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("caft: backward was called twice through one loss of the heads, which keeps no graph.")
        factor, found, ctx.gradients = gradients[0] * ctx.factor, ctx.gradients, None
        return None, None, None, None, *(None if g is None else g.mul_(factor.to(g.dtype)) for g in found)

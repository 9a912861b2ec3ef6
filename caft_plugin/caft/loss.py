"""The auxiliary loss: targets, linear cross-entropy, weights and schedule. Independent of any
framework."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caft_plugin.errors import ConfigError, RunError

# Maps hidden states (n, hidden size) and their targets (n, ...) to float32 figures (n, figures),
# the loss first.
RowLoss = Callable[[Tensor, Tensor], Tensor]

# Maximum number of logits in memory at a time. 2^23 float32 values are 32 MiB: small enough to be
# fast on a CPU, and the size from which glibc always returns memory. Accelerators need more rows in
# one product.
LOGITS_AT_A_TIME = {"cpu": 2**23, "accelerator": 2**25}


def rows_at_a_time(device: torch.device, vocab_size: int) -> int:
    """Return the number of rows whose logits are computed at a time: at least 64."""
    logits = LOGITS_AT_A_TIME["cpu" if device.type == "cpu" else "accelerator"]
    return max(64, math.ceil(logits / vocab_size))


def gamma(
    schedule: str,
    step: int,
    total_steps: int,
) -> float:
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


def head_weights(
    beta: float,
    alpha: float,
    gamma: float,
    num_heads: int,
) -> list[float]:
    """Return the weight of each head's mean loss in the total: beta * gamma * alpha^k for k =
    1..num_heads."""
    return [beta * gamma * alpha**k for k in range(1, num_heads + 1)]


def cross_entropy_of(unembed: Callable[[Tensor], Tensor]) -> RowLoss:
    """Return a row loss: hidden states (n, hidden size) and token ids (n,) to cross-entropies (n,
    1)."""

    def row_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(unembed(hidden).float(), targets, reduction="none")[:, None]

    return row_loss


def cross_entropy_and_hit_of(unembed: Callable[[Tensor], Tensor]) -> RowLoss:
    """Return a row loss like `cross_entropy_of`, plus 1 where the target has the largest logit: (n,
    2)."""

    def row_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = unembed(hidden).float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        hits = logits.argmax(-1) == targets
        return torch.stack([losses, hits.float()], dim=1)

    return row_loss


def divergence_of(unembed: Callable[[Tensor], Tensor]) -> RowLoss:
    """Return a row loss: hidden states and a teacher's, both (n, hidden size), to KL(p || q), (n,
    1).

    p is the distribution that `unembed` gives for the teacher's hidden state, q the one for the
    other.
    """

    def row_loss(hidden: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = unembed(teacher).float().log_softmax(-1)
        log_q = unembed(hidden).float().log_softmax(-1)
        terms = F.kl_div(log_q, wanted, reduction="none", log_target=True)
        return terms.sum(-1, keepdim=True)

    return row_loss


@dataclasses.dataclass(frozen=True)
class Lesson:
    """The kind of target that heads learn.

    `row_loss` makes the loss of each row from an unembedding. `learned` returns the targets (n,) of
    head `index` at `positions` (n,) of the flattened batch, from the head's target tokens (batch,
    length) and the model's final hidden state (batch, length, hidden size), or None if its norm was
    not called.
    """

    row_loss: Callable[[Callable[[Tensor], Tensor]], RowLoss]
    learned: Callable[[Tensor, int, Tensor, Tensor | None], Tensor]


def tokens_at(
    targets: Tensor,
    index: int,
    positions: Tensor,
    final: Tensor | None,
) -> Tensor:
    return targets.to(positions.device).flatten()[positions]


def distributions_at(
    targets: Tensor,
    index: int,
    positions: Tensor,
    final: Tensor | None,
) -> Tensor:
    """Return the final hidden states (n, hidden size) from which the model predicts the targets."""
    if final is None:
        raise ConfigError(
            "pretrain_heads.targets: got distribution, but the model did not call its final norm,"
            " from which its distribution is computed. Use targets: model or dataset."
        )
    # At position t head k predicts the token t + k + 1, as the model does at t + k. No target's
    # position wraps around: the token ahead of it exists.
    teachers = final.detach().roll(-(index + 1), dims=1)
    return teachers.flatten(0, 1)[positions]


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

    If gradients are needed, they are computed in the forward pass, chunk by chunk, so that logits
    are computed once and freed. (`torch.nn.functional.linear_cross_entropy` does the same for a
    plain matrix, but returns the loss in half precision for half-precision inputs.)

    Args:
        row_loss: called with chunks of `hidden` and `learned`.
        weights: (rows,) float32.
        hidden: (rows, hidden size); with 0 rows the sum is 0 and still part of the graph.
        learned: the targets (rows, ...), without gradient.
        vocab_size: of the logits in `row_loss`; it determines the chunk size.
        parameters: other tensors that `row_loss` uses and that may need a gradient.

    Returns:
        The sum, a float32 scalar in nats, and the figures of all rows (rows, figures), without
        gradient.
    """
    if not torch.is_grad_enabled():
        hidden = hidden.detach()
        parameters = ()
    size = rows_at_a_time(hidden.device, vocab_size)
    return _WeightedSum.apply(row_loss, size, weights, learned, hidden, *parameters)


def _own_saved_tensors() -> torch.autograd.graph.saved_tensors_hooks:
    """Return hooks that override the host's for tensors of one chunk.

    TRL's activation offloading would mistake the first of these tensors that is unpacked for the
    start of the backward pass, and keep all later ones until its end.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _added(total: Tensor | None, gradient: Tensor) -> Tensor:
    """Return the sum; it is written into `total`."""
    return gradient if total is None else total.add_(gradient)


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
        # Gradients are computed with weights near 1, for float16; the factor is applied in the
        # backward pass.
        factor = weights.new_ones(())
        if len(weights):
            factor = weights.max().clamp(min=1e-30)
        figures = []
        hidden_gradients = []
        parameter_gradients: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, max(len(hidden), 1), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(differentiate), _own_saved_tensors():
                rows = hidden[chunk].detach().requires_grad_(hidden.requires_grad)
                chunk_figures = row_loss(rows, learned[chunk])
                chunk_weights = weights[chunk] / factor
                loss = (chunk_figures[:, 0] * chunk_weights).sum()
            figures.append(chunk_figures.detach())
            if not loss.requires_grad:
                continue
            sources = [parameters[index] for index in wanted]
            if hidden.requires_grad:
                sources.append(rows)
            found = list(torch.autograd.grad(loss, sources, allow_unused=True))
            if hidden.requires_grad:
                hidden_gradients.append(found.pop())
            for index, gradient in zip(wanted, found, strict=True):
                parameter_gradients[index] = _added(parameter_gradients[index], gradient)
        ctx.factor = factor
        of_hidden = torch.cat(hidden_gradients) if hidden_gradients else None
        ctx.gradients = [of_hidden, *parameter_gradients]
        values = torch.cat(figures)
        ctx.mark_non_differentiable(values)
        return (values[:, 0] * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RunError(
                "caft: backward was called twice through one loss of the heads, which keeps no"
                " graph."
            )
        factor = gradients[0] * ctx.factor
        found: list[Tensor | None] = []
        for gradient in ctx.gradients:
            if gradient is not None:
                # in place: a second copy of the unembedding's gradient would be large
                gradient.mul_(factor.to(gradient.dtype))
            found.append(gradient)
        ctx.gradients = None
        # nothing for row_loss, size, weights and learned
        return None, None, None, None, *found

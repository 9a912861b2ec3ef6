"""One optimisation step: targets, counts, draws, weights, and what is logged of it. Knows no trainer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from caft_plugin.attach import Request, Result
from caft_plugin.config import CAFTConfig
from caft_plugin.logs import CAFTLog, HeadsEvaluation
from caft_plugin.loss import IGNORE, Batch, count_targets, gamma, head_targets, head_weights


@dataclasses.dataclass(frozen=True)
class LossShare:
    """How a host treats the loss that it is given.

    It divides it by `divisor` (accumulation steps), and gradients become a mean over `processes`. `items` is the number
    of next tokens by which the model itself divides its summed loss, None where it takes the mean of its batch.
    """

    divisor: int
    processes: int
    items: Tensor | int | None = None

    @property
    def scale(self) -> int:
        """Undoes both: a share of the window's mean over all processes, times this, comes out as that mean."""
        return self.divisor * self.processes


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a window.

    `draws` says how often each head was drawn. `request` is what the heads compute of it, None where it has no labels.
    """

    inputs: Batch
    draws: list[int]
    request: Request | None


class Sums:
    """What the losses of a window added up to, on this process, float64. Heads' losses are summed over their targets.

    The host may ask for a batch's loss more than once, or for that of its parts: `tokens` counts the next tokens of all
    that it asked for.
    """

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.next_token, self.aux, self.tokens = torch.zeros(3, dtype=torch.float64, device=device)
        self.heads = torch.zeros(num_heads, dtype=torch.float64, device=device)

    def add(self, next_token: Tensor, aux: Tensor, heads: Tensor, tokens: Tensor) -> None:
        self.next_token += next_token.detach().to(self.heads)
        self.aux += aux.detach().to(self.heads)
        self.heads += heads.to(self.heads)
        self.tokens += tokens.to(self.heads)


@dataclasses.dataclass
class Window:
    """One accumulation window, that is one optimisation step.

    Counts are over all processes, (num_heads,): `counts` of a head's targets, `drawn_counts` of those in micro-batches
    where the head was drawn; `next_tokens` counts the model's own targets, `own_tokens` those of this process.
    """

    config: CAFTConfig
    gamma: float
    counts: Tensor
    drawn_counts: Tensor
    next_tokens: Tensor
    own_tokens: Tensor
    sums: Sums
    micro_batches: list[MicroBatch] = dataclasses.field(default_factory=list)
    steps_begun: int = 0

    @classmethod
    def open(
        cls,
        batches: Sequence[Batch],
        config: CAFTConfig,
        *,
        step: int,
        total_steps: int,
        seed: int,
        device: torch.device,
        over_processes: Callable[[Tensor], Tensor],
    ) -> Window:
        """The window of optimisation step `step` (0-based) of `total_steps` over this process's micro-batches.

        `over_processes` sums a tensor over all processes; every process has to open the window.
        """
        num_heads = config.num_heads
        found = torch.zeros(len(batches), num_heads + 1, dtype=torch.long, device=device)
        targets: list[Tensor | None] = []
        for row, batch in zip(found, batches, strict=True):
            targets.append(head_targets(batch, num_heads) if has_targets(batch) else None)
            if targets[-1] is not None:
                row[:-1] = count_targets(targets[-1])
                row[-1] = next_tokens_in(batch)
        own_tokens = found[:, -1].sum()
        found = over_processes(found)
        draws = draw_heads(config, len(batches), seed, step)
        drawn = found[:, :-1] * torch.tensor(draws, device=device).clamp(max=1)
        window = cls(
            config,
            gamma(config.schedule, step, total_steps),
            counts=found[:, :-1].sum(0),
            drawn_counts=drawn.sum(0),
            next_tokens=found[:, -1].sum(),
            own_tokens=own_tokens,
            sums=Sums(num_heads, device),
        )
        for batch, own, times in zip(batches, targets, draws, strict=True):
            window.micro_batches.append(MicroBatch(batch, times, None if own is None else window.ask(own, times)))
        return window

    @property
    def run(self) -> list[bool]:
        """The heads that run in some micro-batch."""
        draws = [micro_batch.draws for micro_batch in self.micro_batches]
        return [self.gamma != 0.0 and any(times) for times in zip(*draws, strict=True)]

    def begun(self, inputs: Batch) -> MicroBatch | None:
        """What a `training_step` with `inputs` is about: the micro-batch that they are or whose labels they have; where
        the host has made other inputs of it, the next one; None where all had their turn."""
        self.steps_begun += 1
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        for micro_batch in self.micro_batches:
            theirs = micro_batch.inputs
            if theirs is inputs or (labels is not None and theirs.get("labels") is labels):
                return micro_batch
        in_turn = self.steps_begun - 1
        return self.micro_batches[in_turn] if in_turn < len(self.micro_batches) else None

    def weights(self, draws: Sequence[int]) -> Tensor:
        """The weight of each head's summed loss in the window's mean: beta gamma alpha^k / its targets. Of drawn heads
        beta gamma sum(alpha^j) / draws / its targets for each time, which is the same on average."""
        config = self.config
        weights = head_weights(config.beta, config.alpha, self.gamma, config.num_heads)
        if config.heads_per_step is not None:
            weights = [count * sum(weights) / config.heads_per_step for count in draws]
        return torch.tensor(weights, device=self.counts.device) / self.counts.clamp(min=1)

    def ask(self, targets: Tensor, draws: Sequence[int]) -> Request:
        """Return the request of heads with these targets, of which each was drawn so often."""
        run = [self.gamma != 0.0 and count > 0 for count in draws]
        return Request(targets, self.weights(draws), run, training=True)

    def request(self, micro_batch: MicroBatch, inputs: Batch) -> Request:
        """What the heads are to compute of `inputs`: the micro-batch's own request, or, where the host has made other
        labels of it, one for these."""
        if micro_batch.request is not None and micro_batch.inputs["labels"] is inputs["labels"]:
            return micro_batch.request
        return self.ask(head_targets(inputs, len(micro_batch.draws)), micro_batch.draws)

    def mean_weight(self, share: LossShare) -> Tensor | float:
        """The weight of each next token in the model's own loss."""
        return share.scale / self.next_tokens.clamp(min=1) if share.items is None else 1.0 / share.items


class Tally:
    """What was summed since the last log, on this process. Heads' values are shares of the global means."""

    def __init__(self, num_heads: int, step: int, device: torch.device) -> None:
        self.since_step = step
        self.next_token = torch.zeros((), dtype=torch.float64, device=device)
        self.aux = torch.zeros_like(self.next_token)
        self.gamma = 0.0
        self.heads = torch.zeros(num_heads, dtype=torch.float64, device=device)
        self.steps_of_head = [0] * num_heads

    def add(self, window: Window) -> None:
        self.gamma += window.gamma
        for index, count in enumerate(window.drawn_counts.tolist()):
            self.steps_of_head[index] += window.gamma != 0.0 and count > 0
        # A batch that was asked for twice counts once.
        share = (window.own_tokens / window.sums.tokens.clamp(min=1)).clamp(max=1)
        share = torch.where(window.sums.tokens > 0, share, 1.0)
        self.next_token += window.sums.next_token * share
        self.aux += window.sums.aux * share
        self.heads += window.sums.heads * share / window.drawn_counts.clamp(min=1)

    def log(self, step: int, processes: int, over_processes: Callable[[Tensor], Tensor]) -> CAFTLog:
        """What the log says at `step`. Every process has to call it."""
        steps = max(step - self.since_step, 1)
        shares = over_processes(torch.cat([self.next_token[None], self.aux[None], self.heads]))
        next_token, aux, *heads = shares.tolist()
        counted = enumerate(zip(heads, self.steps_of_head, strict=True), 1)
        return CAFTLog(
            next_token_loss=next_token / processes / steps,
            head_losses={k: share / times for k, (share, times) in counted if times},
            gamma=self.gamma / steps,
            aux_loss=aux / processes / steps,
        )


class Totals:
    """What an evaluation summed, on this process, float64: each head's losses, how often it was right, how often it and
    all heads before it were, and its targets."""

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.figures = torch.zeros(4, num_heads, dtype=torch.float64, device=device)

    def add(self, result: Result, counts: Tensor) -> None:
        if result.right is not None:
            right = result.right.to(result.sums)
            figures = [result.sums, right.sum(1), right.cumprod(0).sum(1), counts.to(result.sums)]
            self.figures += torch.stack(figures).to(self.figures)

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> HeadsEvaluation:
        """Every process has to call it."""
        rows = over_processes(self.figures).T.tolist()
        found = {k: row for k, row in enumerate(rows, 1) if row[3]}
        return HeadsEvaluation(
            losses={k: total / count for k, (total, _, _, count) in found.items()},
            accuracies={k: right / count for k, (_, right, _, count) in found.items()},
            tokens_per_pass=1 + sum(run for _, _, run, _ in rows) / rows[0][3] if 1 in found else None,
        )


def over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of what all processes hold."""
    return accelerator.reduce(tensor, reduction="sum") if accelerator.num_processes > 1 else tensor


def draw_heads(config: CAFTConfig, micro_batches: int, seed: int, step: int) -> list[list[int]]:
    """How often each head is drawn for each micro-batch of a step; the same on all processes and after a restart."""
    if config.heads_per_step is None:
        return [[1] * config.num_heads] * micro_batches
    heads = range(config.num_heads)
    weights = [config.alpha**k for k in heads]
    draws = []
    for index in range(micro_batches):
        generator = random.Random(f"{seed} {step} {index}")
        drawn = generator.choices(heads, weights, k=config.heads_per_step)
        draws.append([drawn.count(head) for head in heads])
    return draws


def has_targets(batch: object) -> bool:
    """Whether a batch has `labels` (batch, length)."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 2


def next_tokens_in(batch: Batch) -> Tensor:
    """How many targets the model itself has in a batch with `labels` (batch, length)."""
    return (batch["labels"][:, 1:] != IGNORE).sum()

"""One optimisation step: targets, counts, draws, weights and logged values. Independent of any
trainer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from caft_plugin.caft.attach import Request, Result
from caft_plugin.caft.loss import gamma, head_weights
from caft_plugin.config import CAFTConfig
from caft_plugin.logs import CAFTLog, HeadsEvaluation
from caft_plugin.targets import IGNORE, Batch, count_targets, head_targets


@dataclasses.dataclass(frozen=True)
class LossShare:
    """The host's scaling of the loss.

    The host divides the loss by `divisor` (accumulation steps) and averages gradients over
    `processes`. `items` is the number of next tokens by which the model divides its summed loss, or
    None if it uses the batch's mean.
    """

    divisor: int
    processes: int
    items: Tensor | int | None = None

    @property
    def scale(self) -> int:
        """The factor that undoes both, so that the result is the window's mean over all
        processes."""
        return self.divisor * self.processes


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a window.

    `draws` is how often each head was drawn, `request` the heads' work on its `labels` (None
    without labels).
    """

    inputs: Batch
    draws: list[int]
    request: Request | None


class Sums:
    """Sums of a window's losses on this process, float64; heads' losses are summed over their
    targets.

    The host may compute a batch's loss more than once, or in parts: `tokens` counts the next tokens
    of all its calls.
    """

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.heads = torch.zeros(num_heads, dtype=torch.float64, device=device)
        self.next_token = self.heads.new_zeros(())
        self.aux = self.heads.new_zeros(())
        self.tokens = self.heads.new_zeros(())

    def add(
        self,
        next_token: Tensor,
        aux: Tensor,
        heads: Tensor,
        tokens: Tensor,
    ) -> None:
        self.next_token += next_token.detach().to(self.heads)
        self.aux += aux.detach().to(self.heads)
        self.heads += heads.to(self.heads)
        self.tokens += tokens.to(self.heads)


@dataclasses.dataclass
class Window:
    """One accumulation window, that is, one optimisation step.

    `counts` (num_heads,) are each head's targets over all processes, `drawn_counts` those in
    micro-batches where the head was drawn. `next_tokens` is the number of the model's own targets
    over all processes, `own_tokens` on this one.
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
        """Open the window of an optimisation step. Every process must call it.

        Args:
            batches: this process's micro-batches.
            config: CAFT's settings.
            step: the optimisation step, 0-based.
            total_steps: of the run.
            seed: for drawing heads.
            device: of the counts.
            over_processes: sums a tensor over all processes.
        """
        num_heads = config.num_heads
        # one tensor for all counts, so that processes communicate once a step
        counts = torch.zeros(len(batches), num_heads + 1, dtype=torch.long, device=device)
        targets: list[Tensor | None] = []
        for row, batch in zip(counts, batches, strict=True):
            own = head_targets(batch, num_heads) if has_targets(batch) else None
            targets.append(own)
            if own is not None:
                row[:-1] = count_targets(own)
                row[-1] = next_tokens_in(batch)
        own_tokens = counts[:, -1].sum()
        counts = over_processes(counts)
        of_heads = counts[:, :-1]
        next_tokens = counts[:, -1].sum()
        draws = draw_heads(config, len(batches), seed, step)
        was_drawn = torch.tensor(draws, device=device).clamp(max=1)
        window = cls(
            config,
            gamma(config.schedule, step, total_steps),
            counts=of_heads.sum(0),
            drawn_counts=(of_heads * was_drawn).sum(0),
            next_tokens=next_tokens,
            own_tokens=own_tokens,
            sums=Sums(num_heads, device),
        )
        # last: the weights in a request need the counts of the complete window
        for batch, own, times in zip(batches, targets, draws, strict=True):
            request = None if own is None else window.ask(own, times)
            window.micro_batches.append(MicroBatch(batch, times, request))
        return window

    @property
    def run(self) -> list[bool]:
        """True for each head that runs in at least one micro-batch."""
        draws = [micro_batch.draws for micro_batch in self.micro_batches]
        by_head = zip(*draws, strict=True)
        return [self.gamma != 0.0 and any(times) for times in by_head]

    def begun(self, inputs: Batch) -> MicroBatch | None:
        """Return the micro-batch of a `training_step` with `inputs`, or None if all are used.

        It is the one with these inputs or labels; if the host has changed them, the next one in
        order.
        """
        self.steps_begun += 1
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        for micro_batch in self.micro_batches:
            theirs = micro_batch.inputs
            if theirs is inputs or (labels is not None and theirs.get("labels") is labels):
                return micro_batch
        in_turn = self.steps_begun - 1
        return self.micro_batches[in_turn] if in_turn < len(self.micro_batches) else None

    def weights(self, draws: Sequence[int]) -> Tensor:
        """Return the weight of each head's summed loss in the window's mean: beta gamma alpha^k /
        its targets.

        With `heads_per_step`, it is beta gamma sum(alpha^j) / heads_per_step / its targets for each
        draw, which has the same expectation.
        """
        config = self.config
        weights = head_weights(config.beta, config.alpha, self.gamma, config.num_heads)
        if config.heads_per_step is not None:
            weights = [count * sum(weights) / config.heads_per_step for count in draws]
        targets = self.counts.clamp(min=1)
        return torch.tensor(weights, device=self.counts.device) / targets

    def ask(self, targets: Tensor, draws: Sequence[int]) -> Request:
        """Return the request for these targets, with `draws`, how often each head was drawn."""
        run = [self.gamma != 0.0 and count > 0 for count in draws]
        return Request(targets, self.weights(draws), run, training=True)

    def request(self, micro_batch: MicroBatch, inputs: Batch) -> Request:
        """Return the request for `inputs`: the micro-batch's own, or a new one if the host has
        changed its labels."""
        if micro_batch.request is not None and micro_batch.inputs["labels"] is inputs["labels"]:
            return micro_batch.request
        return self.ask(head_targets(inputs, len(micro_batch.draws)), micro_batch.draws)

    def mean_weight(self, share: LossShare) -> Tensor | float:
        """Return the weight of each next token in the model's own loss."""
        if share.items is not None:
            return 1.0 / share.items
        return share.scale / self.next_tokens.clamp(min=1)


class Tally:
    """Sums since the last log, on this process. Heads' values are shares of the global means."""

    def __init__(
        self,
        num_heads: int,
        step: int,
        device: torch.device,
    ) -> None:
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
        sums = window.sums
        # A batch whose loss was computed twice counts once.
        share = (window.own_tokens / sums.tokens.clamp(min=1)).clamp(max=1)
        share = torch.where(sums.tokens > 0, share, 1.0)
        self.next_token += sums.next_token * share
        self.aux += sums.aux * share
        self.heads += sums.heads * share / window.drawn_counts.clamp(min=1)

    def log(
        self,
        step: int,
        processes: int,
        over_processes: Callable[[Tensor], Tensor],
    ) -> CAFTLog:
        """Return the log entries at `step`. Every process must call it."""
        steps = max(step - self.since_step, 1)
        own = torch.cat([self.next_token[None], self.aux[None], self.heads])
        next_token, aux, *heads = over_processes(own).tolist()
        losses = {}
        for k, (total, times) in enumerate(zip(heads, self.steps_of_head, strict=True), 1):
            if times:  # a head that was not drawn has no mean
                losses[k] = total / times
        return CAFTLog(
            # each process has the host's mean; heads' sums are already divided by global counts
            next_token_loss=next_token / processes / steps,
            head_losses=losses,
            gamma=self.gamma / steps,
            aux_loss=aux / processes / steps,
        )


class Totals:
    """Sums of an evaluation on this process, float64.

    They are, for each head: losses, correct predictions, predictions that are correct in all heads
    up to it, targets.
    """

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.figures = torch.zeros(4, num_heads, dtype=torch.float64, device=device)

    def add(self, result: Result, counts: Tensor) -> None:
        if result.right is None:
            return
        right = result.right.to(result.sums)
        in_a_row = right.cumprod(0)
        figures = [result.sums, right.sum(1), in_a_row.sum(1), counts.to(result.sums)]
        self.figures += torch.stack(figures).to(self.figures)

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> HeadsEvaluation:
        """Return the means over all processes. Every process must call it."""
        losses: dict[int, float] = {}
        accuracies: dict[int, float] = {}
        totals, rights, runs, counts = over_processes(self.figures).tolist()
        for k, count in enumerate(counts, 1):
            if count:
                losses[k] = totals[k - 1] / count
                accuracies[k] = rights[k - 1] / count
        positions = counts[0]
        tokens_per_pass = 1 + sum(runs) / positions if positions else None
        return HeadsEvaluation(losses, accuracies, tokens_per_pass, int(positions))


def over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if accelerator.num_processes == 1:
        return tensor
    return accelerator.reduce(tensor, reduction="sum")


def draw_heads(
    config: CAFTConfig,
    micro_batches: int,
    seed: int,
    step: int,
) -> list[list[int]]:
    """Return how often each head is drawn for each micro-batch; the same on all processes and after
    a restart."""
    if config.heads_per_step is None:
        all_once = [1] * config.num_heads
        return [all_once] * micro_batches
    heads = range(config.num_heads)
    weights = [config.alpha**k for k in heads]
    draws = []
    for index in range(micro_batches):
        # not torch's generators: the host draws from them
        generator = random.Random(f"{seed} {step} {index}")
        drawn = generator.choices(heads, weights, k=config.heads_per_step)
        draws.append([drawn.count(head) for head in heads])
    return draws


def has_targets(batch: object) -> bool:
    """Return True if a batch has `labels` (batch, length)."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 2


def next_tokens_in(batch: Batch) -> Tensor:
    """Return the number of the model's own targets in a batch with `labels` (batch, length)."""
    return (batch["labels"][:, 1:] != IGNORE).sum()

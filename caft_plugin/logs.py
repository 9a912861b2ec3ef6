"""The names and shapes of logged values, for writing and reading them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

CAFT = "caft/"
MEAP = "meap/"
HEAD_LOSS = f"{CAFT}loss_head_"
HEAD_ACCURACY = f"{CAFT}accuracy_head_"


def greater_is_better(metric: str) -> bool | None:
    """Return True if larger values of a caft_plugin metric are better; None for any other metric.

    `metric` may have the prefix of an evaluation, as in `eval_caft/loss_head_1`.
    """
    before, caft, name = metric.rpartition(CAFT)
    if not caft or (before and not before.endswith("_")):
        return None
    return "loss" not in name


def evaluated_sets(logs: Mapping[str, float]) -> list[str]:
    """Return the prefixes (`eval`, `eval_mine`) of the evaluations that have heads' losses in a
    line of the log."""
    return sorted({key.rpartition(f"_{HEAD_LOSS}")[0] for key in logs} - {""})


def by_head(start: str, values: Mapping[str, float]) -> dict[int, float]:
    """Return the values whose keys are `start` followed by a head's number k, by k."""
    found = {}
    for key, value in values.items():
        k = key.removeprefix(start)
        if key.startswith(start) and k.isdecimal():
            found[int(k)] = value
    return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class CAFTLog:
    """Means over the steps since the last log and over all processes, in nats. `head_losses` by k:
    head k predicts the token k+1 ahead; a head that was not drawn is left out."""

    next_token_loss: float
    head_losses: Mapping[int, float]
    gamma: float
    aux_loss: float

    def entries(self) -> dict[str, float]:
        return {
            f"{CAFT}next_token_loss": self.next_token_loss,
            **{f"{HEAD_LOSS}{k}": loss for k, loss in self.head_losses.items()},
            f"{CAFT}gamma": self.gamma,
            f"{CAFT}aux_loss": self.aux_loss,
        }

    @classmethod
    def read(cls, logs: Mapping[str, float]) -> CAFTLog | None:
        """Read CAFT's values from a line of the trainer's log; None if it has none."""
        if f"{CAFT}gamma" not in logs:
            return None
        next_token_loss, gamma, aux_loss = (
            logs[f"{CAFT}{key}"] for key in ("next_token_loss", "gamma", "aux_loss")
        )
        return cls(next_token_loss, by_head(HEAD_LOSS, logs), gamma, aux_loss)


@dataclasses.dataclass(frozen=True)
class MEAPLog:
    """Over the steps since the last log and all processes: masked over eligible tokens of masked
    examples (None where no token was eligible), examples a step, and the mean next-token loss of
    masked and of other targets, in nats (None where there was none, or where it cannot be read)."""

    masked_fraction: float | None
    examples_masked: float
    examples_too_long: float
    loss_masked: float | None = None
    loss_original: float | None = None

    def entries(self) -> dict[str, float]:
        values = dataclasses.asdict(self)
        return {f"{MEAP}{key}": value for key, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class HeadsEvaluation:
    """Each head's mean loss in nats and share of right top-1 predictions over an evaluation set, by
    k; heads without a target there are left out.

    `tokens_per_pass` is 1 plus the mean number of heads in a row, from the first on, that are
    right, over the `positions` where the first head has a target: about what a drafter of these
    heads brings (None where there is no target)."""

    losses: Mapping[int, float]
    accuracies: Mapping[int, float]
    tokens_per_pass: float | None = None
    positions: int | None = None

    def entries(self, prefix: str, details: bool = False) -> dict[str, float]:
        found = {f"{prefix}_{HEAD_LOSS}{k}": loss for k, loss in self.losses.items()}
        if self.tokens_per_pass is not None:
            found[f"{prefix}_{CAFT}tokens_per_pass"] = self.tokens_per_pass
        if details:
            found.update(
                {f"{prefix}_{HEAD_ACCURACY}{k}": share for k, share in self.accuracies.items()}
            )
        if details and self.positions is not None:
            found[f"{prefix}_{CAFT}positions"] = self.positions
        return found

    @classmethod
    def read(cls, metrics: Mapping[str, float], prefix: str) -> HeadsEvaluation:
        losses = by_head(f"{prefix}_{HEAD_LOSS}", metrics)
        accuracies = by_head(f"{prefix}_{HEAD_ACCURACY}", metrics)
        positions = metrics.get(f"{prefix}_{CAFT}positions")
        return cls(
            losses,
            accuracies,
            metrics.get(f"{prefix}_{CAFT}tokens_per_pass"),
            None if positions is None else int(positions),
        )

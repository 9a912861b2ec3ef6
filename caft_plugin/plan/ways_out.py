"""Changes to a run that does not fit: the peak with each, and the first combination that fits."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, Self

from transformers.utils.logging import tqdm

from caft_plugin.config import CAFTConfig
from caft_plugin.plan.estimate import Plan, Seen, make_plan
from caft_plugin.plan.run import Run

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Change:
    """A change to an Axolotl YAML, or to the number of GPUs.

    `run` and `caft` are the values that it changes; `gpus` multiplies the GPUs; `without_heads`
    removes the block.
    """

    words: str
    run: tuple[tuple[str, Any], ...] = ()
    caft: tuple[tuple[str, object], ...] = ()
    gpus: int = 1
    without_heads: bool = False

    def excludes(self, other: Change) -> bool:
        if self.without_heads or other.without_heads:
            return bool(self.caft or other.caft)
        return bool(dict(self.caft).keys() & dict(other.caft).keys())


class WaysOut:
    """Peaks of a run with changes, each computed once. A context manager: a progress bar is shown
    while it is open."""

    def __init__(self, plan: Plan, memory: float, gpus: int, supervised: float) -> None:
        self.plan = plan
        self.memory = memory
        self.gpus = gpus
        self.supervised = supervised
        self.lowest = plan.peak
        self._seen = Seen()
        self._peaks: dict[frozenset[Change], float] = {frozenset(): plan.peak}

    def __enter__(self) -> Self:
        self._bar = tqdm(unit="plan", desc="trying changes")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def peak(self, changes: Iterable[Change]) -> float:
        """Return the peak with these changes, in bytes."""
        made = frozenset(changes)
        if made not in self._peaks:
            self._peaks[made] = self._planned(made)
            self.lowest = min(self.lowest, self._peaks[made])
            self._bar.update()
        return self._peaks[made]

    def _planned(self, changes: frozenset[Change]) -> float:
        run: Run = self.plan.run
        caft: dict[str, object] = run.caft.model_dump(exclude_unset=True)
        for change in changes:
            run = dataclasses.replace(run, **dict(change.run))
            caft |= dict(change.caft)
        if any(change.without_heads for change in changes):
            caft = {"beta": 0}
        gpus = self.gpus * functools.reduce(
            lambda product, change: product * change.gpus, changes, 1
        )
        return make_plan(
            dataclasses.replace(run, caft=CAFTConfig.read(caft)),
            gpus,
            self.supervised,
            seen=self._seen,
        ).peak

    def fits(self, changes: Iterable[Change]) -> bool:
        return self.peak(changes) <= self.memory

    def single(self) -> list[Change]:
        """Return the changes that lower the peak without others."""
        return [change for change in self.changes if self.peak([change]) < self.plan.peak]

    @functools.cached_property
    def changes(self) -> list[Change]:
        """Return the available changes, the cheapest first: those that cost neither time nor
        quality, then time, precision, training of the heads, hardware, data, and the heads
        themselves."""
        run = self.plan.run
        plan = self.plan
        found = []
        if run.builds_logits and not run.fuses:
            found.append(
                Change(
                    "cut_cross_entropy: true", (("builds_logits", False), ("float32_parts", False))
                )
            )
            if plan.heads:
                found.append(Change("caft.fused_loss: true", caft=(("fused_loss", True),)))
        if not run.checkpointing:
            found.append(Change("gradient_checkpointing: true", (("checkpointing", True),)))
        if run.rows > 1:
            found.append(Change("micro_batch_size: 1", (("rows", 1),)))
        if not re.search("8bit|4bit", run.optimizer):
            found.append(Change("optimizer: adamw_bnb_8bit", (("optimizer", "adamw_bnb_8bit"),)))
        if run.lora is not None and run.bits == 16:
            found.append(Change("adapter: qlora, load_in_4bit: true", (("bits", 4),)))
        if plan.how == "full":
            found.append(Change("caft.train_heads: lora", caft=(("train_heads", "lora"),)))
        if plan.heads and plan.how != "frozen":
            found.append(Change("caft.train_heads: frozen", caft=(("train_heads", "frozen"),)))
        if plan.heads > 1:
            found.append(self._fewer_heads([]))
        if run.sharded:
            found.append(Change(f"--gpus {2 * self.gpus}", gpus=2))
        if run.length > 1:
            found.append(Change(f"sequence_len: {run.length // 2}", (("length", run.length // 2),)))
        if plan.heads:
            found.append(Change("no `caft:` block", without_heads=True))
        return found

    def _fewer_heads(self, others: Sequence[Change]) -> Change:
        """Return the largest number of heads with which the run fits; 1 if it fits with none."""
        changes = [_heads(count) for count in range(1, self.plan.heads)]
        fit = bisect.bisect(changes, self.memory, key=lambda change: self.peak([*others, change]))
        return changes[max(fit - 1, 0)]

    def combination(self) -> list[Change] | None:
        """Return the smallest combination of changes that fits, None if there is none. Of several
        of that size, the cheapest; one that keeps the heads is preferred."""
        for with_heads in (True, False):
            pool = [
                change
                for change in self.changes
                if not (change.without_heads if with_heads else change.caft)
            ]
            found = self._smallest(pool)
            if found is not None:
                return [
                    (
                        self._fewer_heads([c for c in found if c is not change])
                        if _is_heads(change)
                        else change
                    )
                    for change in found
                ]
        return None

    def _smallest(self, pool: Sequence[Change]) -> list[Change] | None:
        all_of_them = [
            change
            for at, change in enumerate(pool)
            if not any(map(change.excludes, pool[at + 1 :]))
        ]
        if not self.fits(all_of_them):
            return None
        # Each combination that fits has the changes without which all others together do not fit.
        choices = {
            change
            for change in pool
            for other in pool
            if other is not change and change.excludes(other)
        }
        without = {
            change: [other for other in all_of_them if other is not change]
            for change in all_of_them
        }
        necessary = {
            change
            for change in all_of_them
            if change not in choices and not self.fits(without[change])
        }
        for size in range(max(len(necessary), 2), len(all_of_them) + 1):
            for some in itertools.combinations(pool, size):
                excluded = any(
                    one.excludes(other) for one, other in itertools.combinations(some, 2)
                )
                if necessary <= set(some) and not excluded and self.fits(some):
                    return list(some)
        return all_of_them


def _heads(count: int) -> Change:
    return Change(f"caft.num_heads: {count}", caft=(("num_heads", count),))


def _is_heads(change: Change) -> bool:
    return "num_heads" in dict(change.caft)

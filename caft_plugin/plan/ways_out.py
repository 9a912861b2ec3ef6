"""Changes to a run that does not fit: the peak with each, and the first combination that fits."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
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


CUT_CROSS_ENTROPY = Change(
    "cut_cross_entropy: true",
    run=(("builds_logits", False), ("float32_parts", False)),
)
FUSED_LOSS = Change(
    "caft.fused_loss: true",
    caft=(("fused_loss", True),),
)
CHECKPOINTING = Change(
    "gradient_checkpointing: true",
    run=(("checkpointing", True),),
)
ONE_ROW = Change(
    "micro_batch_size: 1",
    run=(("rows", 1),),
)
OPTIMIZER = Change(
    "optimizer: adamw_bnb_8bit",
    run=(("optimizer", "adamw_bnb_8bit"),),
)
QLORA = Change(
    "adapter: qlora, load_in_4bit: true",
    run=(("bits", 4),),
)
LORA_HEADS = Change(
    "caft.train_heads: lora",
    caft=(("train_heads", "lora"),),
)
FROZEN_HEADS = Change(
    "caft.train_heads: frozen",
    caft=(("train_heads", "frozen"),),
)
NO_HEADS = Change(
    "no `caft:` block",
    without_heads=True,
)


def of_training(plan: Plan) -> list[Change]:
    """Return the changes of how the model trains, the cheapest first."""
    run = plan.run
    found = []
    if run.builds_logits and not run.fuses:
        found.append(CUT_CROSS_ENTROPY)
        if plan.heads:
            found.append(FUSED_LOSS)
    if not run.checkpointing:
        found.append(CHECKPOINTING)
    if run.rows > 1:
        found.append(ONE_ROW)
    if not re.search("8bit|4bit", run.optimizer):
        found.append(OPTIMIZER)
    if run.lora is not None and run.bits == 16:
        found.append(QLORA)
    return found


class WaysOut:
    """Peaks of a run with changes, each computed once. A context manager: a progress bar is shown
    while it is open."""

    def __init__(
        self,
        plan: Plan,
        memory: float,
        gpus: int,
        supervised: float,
    ) -> None:
        self.plan = plan
        self.memory = memory
        self.gpus = gpus
        self.supervised = supervised
        self.lowest = plan.peak
        self._seen = Seen(plan.run.source())
        self._peaks: dict[frozenset[Change], float] = {frozenset(): plan.peak}

    def __enter__(self) -> Self:
        self._bar = tqdm(unit="plan", desc="trying changes")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def peak(self, changes: Iterable[Change]) -> float:
        """Return the peak with these changes, in bytes."""
        made = frozenset(changes)  # their order does not matter
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
        run = dataclasses.replace(run, caft=CAFTConfig.read(caft))
        gpus = self.gpus * math.prod(change.gpus for change in changes)
        return make_plan(run, gpus, self.supervised, seen=self._seen).peak

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
        return [
            *of_training(self.plan),
            *self._of_heads(),
            *self._of_hardware_and_data(),
        ]

    def _of_heads(self) -> list[Change]:
        plan = self.plan
        found = []
        if plan.how == "full":
            found.append(LORA_HEADS)
        if plan.heads and plan.how != "frozen":
            found.append(FROZEN_HEADS)
        if plan.heads > 1:
            found.append(self._fewer_heads([]))
        return found

    def _of_hardware_and_data(self) -> list[Change]:
        run = self.plan.run
        found = []
        if run.sharded:
            found.append(Change(f"--gpus {2 * self.gpus}", gpus=2))
        if run.length > 1:
            half = run.length // 2
            found.append(Change(f"sequence_len: {half}", run=(("length", half),)))
        if self.plan.heads:
            found.append(NO_HEADS)
        return found

    def _fewer_heads(self, others: Sequence[Change]) -> Change:
        """Return the largest number of heads with which the run fits; 1 if it fits with none."""
        changes = [_heads(count) for count in range(1, self.plan.heads)]

        def peak(change: Change) -> float:
            return self.peak([*others, change])

        # Each head adds to the peak, so a bisection finds the number.
        fit = bisect.bisect(changes, self.memory, key=peak)
        return changes[max(fit - 1, 0)]

    def combination(self) -> list[Change] | None:
        """Return the smallest combination of changes that fits, None if there is none. Of several
        of that size, the cheapest; one that keeps the heads is preferred."""
        with_heads = [change for change in self.changes if not change.without_heads]
        without_heads = [change for change in self.changes if not change.caft]
        for pool in (with_heads, without_heads):
            found = self._smallest(pool)
            if found is not None:
                return [self._with_most_heads(change, found) for change in found]
        return None

    def _with_most_heads(self, change: Change, found: Sequence[Change]) -> Change:
        """Return the change; if it lowers the number of heads, the largest number that fits."""
        if "num_heads" not in dict(change.caft):
            return change
        return self._fewer_heads([other for other in found if other is not change])

    def _smallest(self, pool: Sequence[Change]) -> list[Change] | None:
        # of changes that exclude each other, the last one, which lowers the peak most
        all_of_them = [
            change
            for at, change in enumerate(pool)
            if not any(map(change.excludes, pool[at + 1 :]))
        ]
        if not self.fits(all_of_them):
            return None
        necessary = self._necessary(all_of_them, pool)
        for size in range(max(len(necessary), 2), len(all_of_them) + 1):
            for some in itertools.combinations(pool, size):
                if necessary <= set(some) and compatible(some) and self.fits(some):
                    return list(some)
        return all_of_them

    def _necessary(self, all_of_them: Sequence[Change], pool: Sequence[Change]) -> set[Change]:
        """Return the changes without which all others together do not fit: each combination that
        fits has them. This spares most combinations."""
        necessary = set()
        for change in all_of_them:
            others = [other for other in all_of_them if other is not change]
            has_alternative = any(change.excludes(other) for other in pool if other is not change)
            if not has_alternative and not self.fits(others):
                necessary.add(change)
        return necessary


def compatible(changes: Iterable[Change]) -> bool:
    pairs = itertools.combinations(changes, 2)
    return not any(one.excludes(other) for one, other in pairs)


def _heads(count: int) -> Change:
    return Change(f"caft.num_heads: {count}", caft=(("num_heads", count),))

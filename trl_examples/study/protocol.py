"""What a study declares before its runs: tasks, arms, metrics and questions, and the runs that its
rules ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUTS = ROOT / "outputs" / "study"

Settings = dict[str, Any]  # every hyperparameter of a run, as its line of results records them
Line = dict[str, Any]  # a finished run, see results.py
Lines = Sequence[Line]


class NotYet(ValueError):
    """A run that others depend on has not been done."""


class Run(NamedTuple):
    task: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.arm} seed {self.seed}"


@dataclass(frozen=True)
class Arm:
    """One way to train: what it changes in its task's settings, and the arms that it is compared
    with."""

    name: str
    says: str
    seeds: Sequence[int]
    changes: Mapping[str, object] = field(default_factory=dict)
    against: Sequence[str] = ("ntp",)


@dataclass(frozen=True)
class Task:
    """Arms with common settings. `minutes` is what a run is expected to take on two cores."""

    name: str
    settings: Settings
    arms: tuple[Arm, ...]
    minutes: float

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def comparisons(self) -> list[tuple[str, str]]:
        return [(arm.name, against) for arm in self.arms for against in arm.against]


@dataclass(frozen=True)
class Metric:
    title: str
    lower_is_better: bool
    digits: int
    percent: bool = False
    unit: str = "nats"  # of a difference, where it is not a percentage


@dataclass(frozen=True)
class Question:
    """A primary comparison: one metric, one arm against another. With `learned`, the seeds whose
    metric is above it are counted, and compared by Fisher's exact test."""

    asks: str
    task: str
    metric: str
    arm: str
    against: str
    learned: float | None = None


@dataclass(frozen=True)
class Study:
    """A study as `python -m study` uses it. Its functions are those of a module, so that a worker
    can import them.

    Args:
        name: its folder, in which results.jsonl is.
        ready: the runs to do now, by the lines so far.
        settings: the settings of a run, by the lines so far; raises NotYet where a run is missing
            that they need.
        do: trains and measures a run; what its line holds besides the settings and where it ran.
        tables: Markdown tables for README.md, by name.
        draw: writes figures into a folder.
    """

    name: str
    tasks: Mapping[str, Task]
    metrics: Mapping[str, Metric]
    questions: Sequence[Question]
    ready: Callable[[Lines], list[Run]]
    settings: Callable[[Run, Lines], Settings]
    do: Callable[[Run, Settings], Line]
    tables: Callable[[Lines], dict[str, str]]
    draw: Callable[[Lines, Path], None]

    @property
    def file(self) -> Path:
        return HERE / self.name / "results.jsonl"

    def declared(self) -> list[Run]:
        return declared(self.tasks)


def declared(tasks: Mapping[str, Task]) -> list[Run]:
    """Return every run of these tasks, whether a rule leaves it out or not, seed by seed."""
    return [
        Run(task.name, arm.name, seed)
        for task in tasks.values()
        for seed in sorted({seed for arm in task.arms for seed in arm.seeds})
        for arm in task.arms
        if seed in arm.seeds
    ]

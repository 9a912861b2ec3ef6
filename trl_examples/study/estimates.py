"""What the reports estimate and how they write it: means with t-intervals, differences paired by seed, tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import design
import design2
import numpy as np
import results
from scipy import optimize, stats

METRICS = {**design.METRICS, **design2.METRICS}
CONFIDENCE = 0.95
POWER = 0.8  # with which an effect that could have been seen would have been
ONE_SEED = "one seed, no interval"
NOT_SHOWN = "no difference shown"

Lines = Sequence[results.Line]
Value = Callable[[results.Line], float]


# -- statistics -------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over `seeds` seeds and the half width of its t-interval, None where one seed gives none."""

    mean: float
    half: float | None
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and (self.low > 0 or self.high < 0)


def estimate(values: Iterable[float]) -> Estimate:
    """The mean with its 95 % t-interval."""
    found = np.asarray(list(values), dtype=float)
    if len(found) < 2:
        return Estimate(float(found.mean()), None, len(found))
    width = stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * stats.sem(found)
    return Estimate(float(found.mean()), float(width), len(found))


def detectable(difference: Estimate) -> float | None:
    """The smallest true difference that the t-test behind `difference` finds with 80 % power, if its values scatter as
    they did; None where one seed shows no scatter."""
    if difference.half is None:
        return None
    freedom = difference.seeds - 1
    limit = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    apart = optimize.brentq(lambda apart: stats.nct.sf(limit, freedom, apart) - POWER, 0.0, 30.0)  # standard errors
    return float(apart * difference.half / limit)


def paired(lines: Lines, task: str, arm: str, against: str, value: Value) -> Estimate | None:
    """The mean difference `arm` minus `against` over the seeds that both have; None without any."""
    pairs = by_seed(lines, task, arm, against, value)
    return mean_difference(pairs) if pairs else None


def mean_difference(pairs: Iterable[tuple[float, float]]) -> Estimate:
    return estimate(ours - theirs for ours, theirs in pairs)


def by_seed(lines: Lines, task: str, arm: str, against: str, value: Value) -> list[tuple[float, float]]:
    """The values of two arms, for each seed that both have on the same kind of machine."""
    return [(value(one), value(other)) for one, other in line_pairs(lines, task, arm, against)]


def line_pairs(lines: Lines, task: str, arm: str, against: str) -> list[tuple[results.Line, results.Line]]:
    """The lines of two arms, for each seed that both have on the same kind of machine."""
    ours, theirs = (
        {(line["seed"], line.get("processor")): line for line in of(lines, task, name)} for name in (arm, against)
    )
    return [(ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys(), key=str)]


def of(lines: Lines, task: str, arm: str) -> Lines:
    return sorted(
        (line for line in lines if line["task"] == task and line["arm"] == arm), key=lambda line: line["seed"]
    )


def metric(name: str) -> Value:
    return lambda line: float(line["metrics"][name])


def verdict(difference: Estimate | None, lower_is_better: bool) -> str:
    """'better' or 'worse' only where the interval of the paired difference excludes zero."""
    if difference is None:
        return "not run"
    if difference.half is None:
        return ONE_SEED
    if not difference.excludes_zero:
        return NOT_SHOWN
    return "better" if (difference.mean < 0) == lower_is_better else "worse"


def judged(lines: Lines, task: str, arm: str, against: str, name: str) -> str:
    """The verdict on a metric's paired difference `arm` minus `against`."""
    return verdict(paired(lines, task, arm, against, metric(name)), METRICS[name].lower_is_better)


def rounded_up(value: float) -> float:
    """To two significant digits."""
    if value <= 0:
        return 0.0
    digits = 1 - math.floor(math.log10(value))
    return round(math.ceil(value * 10**digits - 1e-9) / 10**digits, digits)


# -- words and tables -------------------------------------------------------------------------------


def number(value: float, name: str, sign: bool = False) -> str:
    shown = METRICS[name]
    text = f"{value * 100 if shown.percent else value:{'+' if sign else ''}.{shown.digits}f}"
    zero = f"{0:.{shown.digits}f}"
    return zero if text.lstrip("+-") == zero else text


def unit(name: str) -> str:
    """Of differences of a metric."""
    return "points" if METRICS[name].percent else "nats"


def in_unit(size: float, name: str) -> str:
    """The size of a difference of a metric, rounded up."""
    return f"{rounded_up(100 * size if METRICS[name].percent else size):g} {unit(name)}"


def with_interval(found: Estimate | None, name: str, sign: bool = False) -> str:
    if found is None:
        return "-"
    if found.half is None:
        return f"{number(found.mean, name, sign)} (one seed)"
    return f"{number(found.mean, name, sign)} ({number(found.low, name, sign)} to {number(found.high, name, sign)})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def title(name: str) -> str:
    shown = METRICS[name]
    return f"{shown.title}{', %' if shown.percent else ''} {'↓' if shown.lower_is_better else '↑'}"


def means_table(lines: Lines, task: str, arms: Iterable[design.Arm | design2.Arm], names: Sequence[str]) -> str:
    """Of each arm the seeds that were run, and the means of these metrics over them."""
    rows = []
    for arm in arms:
        found = of(lines, task, arm.name)
        cells = [with_interval(estimate(map(metric(name), found)), name) if found else "-" for name in names]
        rows.append([f"`{arm.name}`", arm.says, ", ".join(str(line["seed"]) for line in found) or "-", *cells])
    return table(["arm", "", "seeds", *map(title, names)], rows)

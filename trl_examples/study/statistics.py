"""Means and paired differences with 95 % intervals, tests with Holm's correction, and the minimum
detectable effect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from study import results
from study.protocol import Lines, Question, Study

CONFIDENCE = 0.95
POWER = 0.8
DRAWS = 2_000  # of seeds and items, where both are resampled
ONE_SEED = "one seed, no interval"
NOT_RUN = "not run"
NOT_SHOWN = "no difference shown"

Pairs = Sequence[tuple[float, float]]


class Estimate(NamedTuple):
    """A mean over these seeds and the half width of its interval, None where one seed gives
    none."""

    mean: float
    half: float | None
    seeds: tuple[int, ...]

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and (self.low > 0 or self.high < 0)


def estimate(values: Iterable[float], seeds: Sequence[int]) -> Estimate:
    """Return the mean of one value per seed with its t-interval."""
    found = np.asarray(list(values), dtype=float)
    mean, freedom = float(found.mean()), len(found) - 1
    if freedom == 0:
        return Estimate(mean, None, tuple(seeds))
    return Estimate(
        mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * stats.sem(found)), tuple(seeds)
    )


def mean(lines: Lines, task: str, arm: str, metric: str) -> Estimate | None:
    """Return an arm's mean over its seeds; None without any."""
    found = results.of(lines, task, arm)
    return estimate(values(found, metric), [line["seed"] for line in found]) if found else None


def difference(lines: Lines, task: str, arm: str, against: str, metric: str) -> Estimate | None:
    """Return the mean of `arm` minus `against`, paired by seed, with its t-interval; None where no
    seed has both."""
    pairs = results.pairs(lines, task, arm, against)
    if not pairs:
        return None
    ours, theirs = (values(side, metric) for side in zip(*pairs, strict=True))
    return estimate(
        (a - b for a, b in zip(ours, theirs, strict=True)), [line["seed"] for line, _ in pairs]
    )


def resampled(lines: Lines, task: str, arm: str, against: str, metric: str) -> Estimate | None:
    """Return the same difference for what was measured item by item, with both seeds and items
    resampled, which errs on the wide side (Owen, 2007); None where no seed has both."""
    pairs = results.pairs(lines, task, arm, against)
    if not pairs:
        return None
    apart = np.stack(
        [np.array(a["items"][metric]) - np.array(b["items"][metric]) for a, b in pairs]
    )
    draw = np.random.default_rng(0)
    seeds, items = apart.shape
    means = [
        apart[draw.integers(0, seeds, seeds)][:, draw.integers(0, items, items)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    half = float(max(high - apart.mean(), apart.mean() - low))
    return Estimate(float(apart.mean()), half, tuple(line["seed"] for line, _ in pairs))


def values(lines: Lines, metric: str) -> list[float]:
    return [float(line["metrics"][metric]) for line in lines]


def detectable(found: Estimate) -> float | None:
    """Return the smallest true difference that the t-test behind `found` shows with 80 % power if
    its values scatter as they did; None for one seed."""
    if found.half is None:
        return None
    freedom = len(found.seeds) - 1
    limit = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    errors = optimize.brentq(lambda errors: stats.nct.sf(limit, freedom, errors) - POWER, 0.0, 30.0)
    return float(errors * found.half / limit)


def rounded_up(value: float) -> float:
    """Round up to two significant digits."""
    if value <= 0:
        return 0.0
    digits = 1 - math.floor(math.log10(value))
    return round(math.ceil(value * 10**digits - 1e-9) / 10**digits, digits)


# -- the questions ---------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The result of a question. `corrected` is its p-value by Holm's rule over all questions of the
    study."""

    question: Question
    pairs: Pairs
    difference: Estimate | None
    p: float
    corrected: float
    verdict: str


def answers(study: Study, lines: Lines) -> list[Answer]:
    """Answer a study's questions; one that was not run or has one seed counts as p = 1."""
    asked = [
        (one, pairs_of(lines, one), difference(lines, one.task, one.arm, one.against, one.metric))
        for one in study.questions
    ]
    found = [p_value(question, pairs) for question, pairs, _ in asked]
    return [
        Answer(question, pairs, apart, p, corrected, verdict(study, question, apart, corrected))
        for (question, pairs, apart), p, corrected in zip(asked, found, holm(found), strict=True)
    ]


def pairs_of(lines: Lines, question: Question) -> Pairs:
    pairs = results.pairs(lines, question.task, question.arm, question.against)
    return [(a["metrics"][question.metric], b["metrics"][question.metric]) for a, b in pairs]


def p_value(question: Question, pairs: Pairs) -> float:
    """Two-sided, of a paired t-test, or of Fisher's exact test where seeds that have learned are
    counted."""
    if len(pairs) < 2:
        return 1.0
    if question.learned is not None:
        return fisher(*learned(question, pairs), len(pairs))
    apart = np.array([ours - theirs for ours, theirs in pairs])
    if np.ptp(apart) == 0:
        return 1.0 if apart[0] == 0 else 0.0
    return float(stats.ttest_1samp(apart, 0.0).pvalue)


def learned(question: Question, pairs: Pairs) -> tuple[int, int]:
    """Count the seeds of each arm that have learned."""
    ours, theirs = (
        sum(pair[side] > (question.learned or 0.0) for pair in pairs) for side in (0, 1)
    )
    return ours, theirs


def fisher(ours: int, theirs: int, seeds: int) -> float:
    return float(stats.fisher_exact([[ours, seeds - ours], [theirs, seeds - theirs]]).pvalue)


def enough(question: Question, pairs: Pairs) -> int | None:
    """Return how many seeds would have to learn for Fisher's test to show a difference; None: not
    even all."""
    seeds, (_, theirs) = len(pairs), learned(question, pairs)
    shown = [
        ours for ours in range(theirs, seeds + 1) if fisher(ours, theirs, seeds) < 1 - CONFIDENCE
    ]
    return shown[0] if shown else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979)."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def verdict(study: Study, question: Question, apart: Estimate | None, corrected: float) -> str:
    """'better' or 'worse' only where the corrected p-value says so."""
    if apart is None:
        return NOT_RUN
    if len(apart.seeds) < 2:
        return ONE_SEED
    if corrected >= 1 - CONFIDENCE:
        return NOT_SHOWN
    return (
        "better" if (apart.mean < 0) == study.metrics[question.metric].lower_is_better else "worse"
    )

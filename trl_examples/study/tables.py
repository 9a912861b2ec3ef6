"""Markdown tables of results, and the marks between which they are in the pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from study.protocol import Lines, Metric, Study
from study.statistics import (
    Answer,
    Estimate,
    answers,
    detectable,
    difference,
    enough,
    learned,
    mean,
    resampled,
    rounded_up,
)

MARKS = re.compile(r"(?s)(<!-- table ([^>]*?) -->\n)(.*?)(<!-- end of \2 -->)")
DETECTABLE = "minimum detectable effect (80 % power)"


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with the tables put between their marks.

    Raises:
        SystemExit: the page asks for a table that there is not.
    """

    def put(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise SystemExit(
                f"error: there is no table {match[2]!r}; there are {', '.join(tables)}"
            )
        return f"{match[1]}\n{tables[match[2]]}\n\n{match[4]}"

    return MARKS.sub(put, page)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


# -- cells -----------------------------------------------------------------------------------------


def number(value: float, metric: Metric, sign: bool = False) -> str:
    text = f"{value * 100 if metric.percent else value:{'+' if sign else ''}.{metric.digits}f}"
    zero = f"{0:.{metric.digits}f}"
    return zero if text.lstrip("+-") == zero else text


def with_interval(found: Estimate | None, metric: Metric, sign: bool = False) -> str:
    if found is None:
        return "-"
    if found.half is None:
        return f"{number(found.mean, metric, sign)} (one seed)"
    low, high = (number(value, metric, sign) for value in (found.low, found.high))
    return f"{number(found.mean, metric, sign)} ({low} to {high})"


def title(metric: Metric) -> str:
    return (
        f"{metric.title}{', %' if metric.percent else ''} {'↓' if metric.lower_is_better else '↑'}"
    )


def seeds(found: Iterable[int]) -> str:
    """`0 to 3`, or the seeds one by one where one is lacking."""
    numbers = sorted(found)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "-"


def effect(found: Estimate | None, metric: Metric) -> str:
    """The minimum detectable effect, rounded up, with its unit."""
    least = detectable(found) if found else None
    if least is None:
        return "-"
    return (
        f"{rounded_up(100 * least):g} points"
        if metric.percent
        else f"{rounded_up(least):g} {metric.unit}"
    )


# -- tables ----------------------------------------------------------------------------------------


def questions_table(study: Study, lines: Lines, **more: Callable[[Answer], str]) -> str:
    """One row a question. `more` are columns before the verdict: by heading, the cell of an
    answer."""
    rows = []
    left = {(run.task, run.arm) for run in study.ready(lines)}
    for one in answers(study, lines):
        question, metric = one.question, study.metrics[one.question.metric]
        measured, apart, least = (
            title(metric),
            with_interval(one.difference, metric, sign=True),
            "-",
        )
        means = [number(sum(side) / len(side), metric) for side in zip(*one.pairs, strict=True)]
        if question.learned is not None:
            measured, apart = (
                f"seeds with more than {100 * question.learned:.0f} % {metric.title} ↑",
                "-",
            )
            means = (
                [f"{count} of {len(one.pairs)}" for count in learned(question, one.pairs)]
                if one.pairs
                else []
            )
            least = (
                f"{count} of {len(one.pairs)} seeds"
                if (count := enough(question, one.pairs))
                else "-"
            )
        elif one.difference:
            least = effect(one.difference, metric)
        unfinished = left & {(question.task, question.arm), (question.task, question.against)}
        rows.append(
            [
                question.asks,
                f"{measured}: `{question.arm}` and `{question.against}`",
                " and ".join(means) or "-",
                apart,
                seeds(one.difference.seeds) if one.difference else "-",
                least,
                *(cell(one) for cell in more.values()),
                f"{one.corrected:.2f}" if len(one.pairs) > 1 else "-",
                "not finished" if unfinished and one.pairs else one.verdict,
            ]
        )
    head = [
        "question",
        "measured",
        "means over these seeds",
        "paired difference (95 % t-interval over seeds)",
        "seeds",
    ]
    return table([*head, DETECTABLE, *more, "p (Holm)", "verdict"], rows)


def means_table(study: Study, lines: Lines, task: str, names: Sequence[str]) -> str:
    """Return each arm's seeds and the means of these metrics over them."""
    rows = []
    for arm in study.tasks[task].arms:
        found = [mean(lines, task, arm.name, name) for name in names]
        cells = [
            with_interval(one, study.metrics[name]) for one, name in zip(found, names, strict=True)
        ]
        rows.append([f"`{arm.name}`", arm.says, seeds(found[0].seeds if found[0] else ()), *cells])
    head = ["arm (means with 95 % t-intervals over seeds)", "", "seeds"]
    return table([*head, *(title(study.metrics[name]) for name in names)], rows)


def differences_table(
    study: Study,
    lines: Lines,
    task: str,
    names: Sequence[str],
    by_item: Sequence[str] = (),
    bold_from: int = 2,
) -> str:
    """Return each arm's paired difference to those that it is compared with, bold where the
    interval excludes zero.

    Args:
        study: declares the arms and what they are compared with.
        lines: the results.
        task: a row for each of its comparisons.
        names: metrics; the minimum detectable effect is given for the first.
        by_item: those of them that were measured item by item; seeds and items are resampled.
        bold_from: seeds from which a resampled interval is bold: resampling makes too much of few.
    """
    rows = []
    for arm, against in study.tasks[task].comparisons():
        first = difference(lines, task, arm, against, names[0])
        cells = []
        for name in names:
            found = (resampled if name in by_item else difference)(lines, task, arm, against, name)
            strong = (
                found
                and found.excludes_zero
                and (name not in by_item or len(found.seeds) >= bold_from)
            )
            text = with_interval(found, study.metrics[name], sign=True)
            cells.append(f"**{text}**" if strong else text)
        least = effect(first, study.metrics[names[0]])
        rows.append([f"`{arm}` - `{against}`", seeds(first.seeds if first else ()), *cells, least])
    head = ["paired difference (95 % t-interval over seeds)", "seeds"]
    for name in names:
        head.append(
            title(study.metrics[name])
            + (" (95 %, seeds and items resampled)" if name in by_item else "")
        )
    return table([*head, f"{study.metrics[names[0]].title}: {DETECTABLE}"], rows)

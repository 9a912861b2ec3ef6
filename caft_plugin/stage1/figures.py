"""Held-out figures of heads before and after training: as a table, and as expected tokens per
step."""

from __future__ import annotations

from pathlib import Path

from caft_plugin.caft.heads_record import METRICS, HeadFigures, HeadsMetrics, read_small

HEADER = ["head", "predicts", "loss before", "loss after", "accuracy before", "accuracy after"]


def before_and_after(folder: Path) -> str:
    """Return the printed figures of a folder that stage 1 has written."""
    metrics = HeadsMetrics.model_validate_json(read_small(folder, METRICS))
    if not metrics.heads:
        return "No figures before and after: no held-out row has a target of every head."
    table = aligned([HEADER, *_cells(metrics)])
    return "\n".join([*table, "", drafting(metrics)])


def aligned(table: list[list[str]]) -> list[str]:
    """Return the rows of a table as lines, each column flush right."""
    columns = zip(*table, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return lines


def figures_as_markdown(metrics: HeadsMetrics) -> list[str]:
    """Return the lines of the same table, for the heads' card."""
    rule = ["---"] * len(HEADER)
    rows = [HEADER, rule, *_cells(metrics)]
    return [f"| {' | '.join(row)} |" for row in rows]


def drafting(metrics: HeadsMetrics) -> str:
    """Return a sentence on the tokens per step that the heads give; empty if it was not
    measured."""
    if metrics.tokens_per_pass is None:
        return ""
    before = metrics.tokens_per_pass_before
    compared = ""
    if before is not None:
        compared = f" ({before:.2f} before this training)"
    places = ""
    if metrics.positions is not None:
        places = f", estimated at {metrics.positions:,} held-out positions"
    return (
        f"As drafters these heads give {metrics.tokens_per_pass:.2f} tokens per"
        f" step{compared}{places}. Plain generation gives 1. The speed-up is smaller, since"
        " drafting takes time too: `caft speculate` measures it."
    )


def _cells(metrics: HeadsMetrics) -> list[list[str]]:
    all_before = metrics.untrained or metrics.before
    cells = []
    for k, after in enumerate(metrics.heads, 1):
        before = all_before[k - 1] if all_before else None
        losses = [_loss(before), _loss(after)]
        accuracies = [_accuracy(before), _accuracy(after)]
        cells.append([str(k), f"{k + 1} ahead", *losses, *accuracies])
    return cells


def _loss(figures: HeadFigures | None) -> str:
    return "-" if figures is None else f"{figures.loss:.4f}"


def _accuracy(figures: HeadFigures | None) -> str:
    return "-" if figures is None else f"{figures.accuracy:.2%}"

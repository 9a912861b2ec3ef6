"""The third study's tables, its continuations of verses and its figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from study import results, statistics
from study.protocol import Line, Lines
from study.statistics import Answer, Estimate
from study.tables import differences_table, means_table, questions_table, table
from study.third import protocol
from study.third.protocol import LARGE, SIZES, SMALL

NAMES = ("test_loss", "best_epoch")


def tables(lines: Lines) -> dict[str, str]:
    """Return every table of the pages, by name."""
    from study.third.study import STUDY

    in_data = {
        "as a change of rows": lambda one: in_rows(
            lines, one, one.difference and one.difference.mean
        ),
        "detectable, as a change of rows": lambda one: in_rows(
            lines, one, gain_detectable(one.difference)
        ),
    }
    return {
        "third questions": questions_table(STUDY, lines, **in_data),
        "third settings": settings_table(),
        "third pilots": table(
            ["tier", *protocol.CHOSEN, "best validation loss", "epoch", ""], pilots(lines)
        ),
        "third small": means_table(STUDY, lines, "small", NAMES),
        "third small differences": differences_table(STUDY, lines, "small", NAMES),
        "third large": means_table(STUDY, lines, "large", NAMES),
        "third large differences": differences_table(STUDY, lines, "large", NAMES),
        "third cost": cost_table(lines),
        "third continuations": continuations(lines),
    }


def in_rows(lines: Lines, answer: Answer, apart: float | None) -> str:
    """Return a difference of test loss as a share of rows, by the gain from 50 % more of them."""
    gain = statistics.difference(lines, answer.question.task, "ntp-more", "ntp", "test_loss")
    if apart is None or gain is None or gain.mean >= 0:
        return "-"
    return f"{100 * (protocol.MORE - 1) * apart / gain.mean:+.0f} % rows"


def gain_detectable(found: Estimate | None) -> float | None:
    least = statistics.detectable(found) if found else None
    return None if least is None else -least


def settings_table() -> str:
    tiers = (SMALL, LARGE)

    def both(*keys: str) -> list[str]:
        return ["; ".join(f"{tier[key]:,}" for key in keys) for tier in tiers]

    tokens = [f"{tier['rows'] * tier['length']:,}" for tier in tiers]
    rows = [
        ["layers; width", *both("layers", "width")],
        ["vocabulary; tokens of a row", *both("vocabulary", "length")],
        ["rows per seed", *both("rows")],
        ["their tokens", *tokens],
        ["batch; epochs at most", *both("batch", "epochs")],
        ["epochs without a better validation loss, after which a run ends", *both("patience")],
        ["products on a GPU", *("bfloat16" if tier["bf16"] else "TF32" for tier in tiers)],
        ["rows of validation; of tests", *[f"{SIZES.validation}; {SIZES.test}"] * 2],
    ]
    return table(["setting", "small", "large"], rows)


def pilots(lines: Lines) -> Iterator[list[str]]:
    """Yield a row for each pilot's run: its settings, the result, and whether it was chosen."""
    for tier in protocol.TIERS:
        try:
            choice = protocol.chosen(tier, lines)
        except protocol.NotYet as error:
            yield [tier, *["-"] * (len(protocol.CHOSEN) + 2), str(error)]
            continue
        for name, one in protocol.pilot(tier, lines).items():
            tried = protocol.TASKS[f"{tier}-pilot"].arm(name).changes
            cells = [f"{tried[key]:g}" for key in protocol.CHOSEN]
            loss, epoch = f"{one['validation_loss']:.3f}", f"{one['best_epoch']:.0f}"
            yield [tier, *cells, loss, epoch, "chosen" if tried == choice else ""]


def cost_table(lines: Lines) -> str:
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        tier = line["task"].removesuffix("-pilot")
        kinds.setdefault(f"{tier}: {line['processor']}, {line['dtype']}", []).append(line)
    rows = [
        [name, str(len(found)), f"{sum(line['wall_seconds'] for line in found) / 3600:.1f}"]
        for name, found in [*sorted(kinds.items()), ("all", list(lines))]
    ]
    return table(["tier, processor, dtype of products", "runs", "hours"], rows)


# -- for people to read ----------------------------------------------------------------------------


def continuations(lines: Lines) -> str:
    """Return each verse's first half, its second, and what the arms of one seed wrote instead."""
    found = [
        (arm.name, line["continuations"])
        for arm in protocol.SMALL_ARMS
        for line in results.of(lines, protocol.READ[0], arm.name)
        if "continuations" in line
    ]
    parts = []
    for number, verse in enumerate(verses_of(lines), 1):
        rows = [["the verse", cell(verse["completion"])]]
        rows += [[f"`{name}`", cell(texts[number - 1])] for name, texts in found]
        parts.append(f"### {number}\n\n{table(['', cell(verse['prompt'])], rows)}")
    return "\n\n".join(parts)


def verses_of(lines: Lines) -> list[dict[str, str]]:
    """Return the verses, from a line that has them."""
    return next((line["verses"] for line in lines if "verses" in line), [])


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# -- the figure ------------------------------------------------------------------------------------


def draw(lines: Lines, folder: Path) -> None:
    """Draw epochs.png: each tier's validation loss by epoch, means over seeds as far as all have
    gone, and each seed's test loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(2, 2, figsize=(9.2, 6.4), squeeze=False, layout="constrained")
    for (epochs, losses), (tier, (_, arms)) in zip(axes, protocol.TIERS.items(), strict=True):
        shown = [arm.name for arm in arms if results.of(lines, tier, arm.name)]
        for place, name in enumerate(shown):
            found = results.of(lines, tier, name)
            curves = [line["validation"] for line in found]
            means = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)
            epochs.plot(range(1, len(means) + 1), means, "o-", markersize=2, label=name)
            values = statistics.values(found, "test_loss")
            losses.plot(
                values, [place] * len(values), "o", color="tab:gray", alpha=0.5, markersize=4
            )
            losses.plot(math.fsum(values) / len(values), place, "D", color="tab:blue")
        losses.set_yticks(range(len(shown)), shown)
        losses.invert_yaxis()
        losses.set_xlabel("test loss, nats a token")
        epochs.set_xlabel("epoch")
        epochs.set_ylabel(f"{tier}: validation loss")
        if shown:
            epochs.legend(fontsize=8)
    drawing.savefig(folder / "epochs.png", dpi=110, metadata={"Software": None})
    plt.close(drawing)

"""The second study's tables and its figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from study import results, statistics
from study.protocol import Line, Lines
from study.second import protocol
from study.second.protocol import DOCUMENTS, GRAPHS, MOLECULES, SIZES
from study.statistics import Answer
from study.tables import differences_table, means_table, questions_table, seeds, table

MOLECULE_METRICS = ("heldout_loss", "exact", "valid", "tanimoto", "best_epoch", "forgetting")
BY_ITEM = ("exact", "valid", "tanimoto")
GRAPH_METRICS = ("paths", "first")
DOCUMENT_METRICS = ("found", "answer_loss")


def tables(lines: Lines) -> dict[str, str]:
    """Return every table of the page, by name."""
    from study.second.study import STUDY

    return {
        "second questions": questions_table(
            STUDY, lines, **{"as a change of labelled rows": lambda one: worth(lines, one)}
        ),
        "second settings": settings_table(),
        "second pilots": table(["pilot or rule", "run", "result", "outcome"], pilots(lines)),
        "second molecules": means_table(STUDY, lines, "few", MOLECULE_METRICS),
        "second molecules differences": differences_table(
            STUDY, lines, "few", MOLECULE_METRICS, by_item=BY_ITEM, bold_from=protocol.INTERIM
        ),
        "second molecules heads": heads_table(lines, "few"),
        "second graphs": means_table(STUDY, lines, "graphs", GRAPH_METRICS),
        "second graphs differences": differences_table(STUDY, lines, "graphs", GRAPH_METRICS),
        "second graphs heads": heads_table(lines, "graphs"),
        "second documents": means_table(STUDY, lines, "documents", DOCUMENT_METRICS),
        "second documents differences": differences_table(
            STUDY, lines, "documents", DOCUMENT_METRICS
        ),
        "second copying": copying_table(lines),
        "second cost": cost_table(lines),
    }


def worth(lines: Lines, answer: Answer) -> str:
    """Return a difference of held-out loss as a share of labelled rows, by the gain from 30 % more
    of them."""
    gain = statistics.difference(lines, "few", "ntp-more", "ntp", "heldout_loss")
    if answer.question.task != "few" or answer.difference is None or gain is None or gain.mean >= 0:
        return "-"
    return f"{100 * (protocol.MORE - 1) * answer.difference.mean / gain.mean:+.0f} % rows"


def heads_table(lines: Lines, task: str) -> str:
    """The heads' gradient, and what they bring as drafters, of each arm with heads."""
    rows = []
    for arm in protocol.TASKS[task].arms:
        found = [line for line in results.of(lines, task, arm.name) if line.get("dose")]
        if found:
            ratios, cosines = (
                [entry[key] for line in found for entry in line["dose"]]
                for key in ("ratio", "cosine")
            )
            rows.append(
                [
                    f"`{arm.name}`",
                    seeds(line["seed"] for line in found),
                    f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                    f"{np.median(cosines):+.2f} ({min(cosines):+.2f} to {max(cosines):+.2f})",
                    f"{np.mean([line['metrics']['tokens_per_pass'] for line in found]):.2f}",
                ]
            )
    length = "length of the heads' gradient / next-token gradient, median (range)"
    return table(
        [
            "arm",
            "seeds",
            length,
            "cosine of the two, median (range)",
            "tokens per step on its own texts",
        ],
        rows,
    )


def copying_table(lines: Lines) -> str:
    """Loss on masked tokens with the original in view and without it."""
    rows = []
    for arm in protocol.DOCUMENT_ARMS:
        for kind, where in (
            ("masked_loss", "documents: yes"),
            ("masked_molecule_loss", "molecules: no"),
        ):
            names = [f"{kind}_{how}" for how in ("alone", "with_original")]
            found = [
                line
                for line in results.of(lines, "documents", arm.name)
                if names[0] in line["metrics"]
            ]
            if found:
                losses = [f"{np.mean(statistics.values(found, name)):.3f}" for name in names]
                rows.append(
                    [f"`{arm.name}`", where, seeds(line["seed"] for line in found), *losses]
                )
    return table(
        [
            "arm",
            "is the answer in the prompt?",
            "seeds",
            "loss: only the copy",
            "loss: original in view",
        ],
        rows,
    )


def settings_table() -> str:
    """The numbers that the protocol declares."""
    rules = f"{protocol.INTERIM}; {100 * protocol.CONFIDENCE_TO_STOP:.0f} %"
    rows = [
        (
            "all",
            "corrected p-value below which a verdict is better or worse",
            f"{1 - statistics.CONFIDENCE:.2f}",
        ),
        (
            "A",
            "molecules per seed; for comparison",
            f"{MOLECULES['rows']}; {MOLECULES['rows'] * protocol.MORE:.0f}",
        ),
        ("A", "batch; epochs at most", f"{MOLECULES['batch']}; {MOLECULES['epochs']}"),
        (
            "A",
            "epochs without a better validation loss, after which a run ends",
            f"{MOLECULES['patience']}",
        ),
        (
            "A",
            "held-out molecules for the loss; for SMILES",
            f"{SIZES.heldout:,}; {SIZES.generated}",
        ),
        ("A", "molecules of stage 1 for the frozen heads", f"{protocol.STAGE1['rows']:,}"),
        ("A", "seeds after which an arm may stop; interval that decides it", rules),
        (
            "B",
            "arms of a graph; nodes of an arm, with the start",
            f"{GRAPHS['arms']}; {GRAPHS['length']}",
        ),
        ("B", "layers; width", f"{GRAPHS['layers']}; {GRAPHS['width']}"),
        ("B", "steps; fresh graphs in each", f"{GRAPHS['steps']:,}; {GRAPHS['batch']}"),
        (
            "B",
            "paths right, above which a seed has learned them",
            f"{100 * protocol.LEARNED:.0f} %",
        ),
        ("C", "documents of a training question", ", ".join(map(str, DOCUMENTS["documents"]))),
        (
            "C",
            "batch; LoRA rank; alpha",
            f"{DOCUMENTS['batch']}; {DOCUMENTS['lora_r']}; {DOCUMENTS['lora_alpha']}",
        ),
        ("C", "held-out questions; documents of each", f"{SIZES.questions}; 7"),
    ]
    return table(["task", "setting", "value"], rows)


def cost_table(lines: Lines) -> str:
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        kinds.setdefault(f"{line['processor']}, {line['dtype']}", []).append(line)
    rows = [
        [name, str(len(found)), f"{sum(line['wall_seconds'] for line in found) / 3600:.1f}"]
        for name, found in [*sorted(kinds.items()), ("all", list(lines))]
    ]
    return table(["processor, dtype of products", "runs", "hours"], rows)


# -- pilots ----------------------------------------------------------------------------------------


def pilots(lines: Lines) -> Iterator[list[str]]:
    """Yield a row for each pilot's run and for each rule: the result, and what followed from it."""
    for pilot, rows in (
        ("A: settings", few_pilot),
        ("A: stage 1", stage1),
        ("A: stop after four seeds", interim),
        ("B: does the control learn?", graphs_pilot),
        ("C: headroom", documents_pilot),
    ):
        try:
            for row in rows(lines):
                yield [pilot, *row]
        except protocol.NotYet as error:
            yield [pilot, "-", str(error), "-"]


def few_pilot(lines: Lines) -> Iterator[list[str]]:
    chosen = protocol.chosen_few(lines)
    for name, one in protocol.pilot("few-pilot", lines).items():
        is_chosen = protocol.TASKS["few-pilot"].arm(name).changes.items() <= chosen.items()
        result = f"validation loss {one['validation_loss']:.3f}, {one['epochs']:.0f} epochs"
        yield [f"`{name}`", result, f"chosen, with {chosen['rows']} molecules" if is_chosen else ""]


def stage1(lines: Lines) -> Iterator[list[str]]:
    for line in results.of(lines, "few-heads", "few-heads"):
        steps, batch = (line["settings"][key] for key in ("steps", "batch-size"))
        accuracy = (
            f"head 1 right in {100 * line['metrics']['trained_accuracy_head_1']:.0f} % (goal: 40 %)"
        )
        yield [f"`few-heads`, {steps} steps of {batch}", accuracy, "used"]


def interim(lines: Lines) -> Iterator[list[str]]:
    for name in sorted(protocol.stopped(lines)):
        yield [
            f"`{name}`",
            (
                f"the {100 * protocol.CONFIDENCE_TO_STOP:.0f} % interval holds no gain of half of"
                " `ntp-more`'s"
            ),
            "stopped",
        ]


def graphs_pilot(lines: Lines) -> Iterator[list[str]]:
    share = protocol.pilot("graphs-pilot", lines)["control"]["paths"]
    result = f"{100 * share:.1f} % of the paths right (required: {100 * protocol.CONTROL:.0f} %)"
    yield ["`control`", result, "task done" if protocol.control_works(lines) else "task dropped"]


def documents_pilot(lines: Lines) -> Iterator[list[str]]:
    rows = protocol.chosen_rows(lines)
    for name, one in protocol.pilot("documents-pilot", lines).items():
        yield [
            f"`{name}`",
            f"{100 * one['found']:.1f} % found",
            "chosen" if name == f"rows-{rows}" else "",
        ]
    if rows is None:
        yield ["all", "none leaves headroom", "task dropped"]


# -- the figure ------------------------------------------------------------------------------------


def draw(lines: Lines, folder: Path) -> None:
    """Draw few.png: the validation loss by epoch, means over seeds as far as all have gone, and
    each seed's held-out loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), squeeze=False, layout="constrained")
    epochs, losses = axes.flat
    shown = [arm for arm in protocol.FEW_ARMS if results.of(lines, "few", arm.name)]
    for place, arm in enumerate(shown):
        found = results.of(lines, "few", arm.name)
        curves = [line["validation"] for line in found]
        means = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)
        epochs.plot(range(1, len(means) + 1), means, "o-", markersize=3, label=arm.name)
        values = statistics.values(found, "heldout_loss")
        losses.plot(values, [place] * len(values), "o", color="tab:gray", alpha=0.5, markersize=4)
        losses.plot(math.fsum(values) / len(values), place, "D", color="tab:blue")
    losses.set_yticks(range(len(shown)), [arm.name for arm in shown])
    losses.invert_yaxis()
    losses.set_xlabel("held-out loss, nats a token")
    epochs.set_xlabel("epoch")
    epochs.set_ylabel("validation loss, nats a token")
    if epochs.lines:
        epochs.legend(fontsize=8)
    drawing.savefig(folder / "few.png", dpi=110, metadata={"Software": None})
    plt.close(drawing)

"""`make study-report`: README.md and study-1.md here and their figures, from results.jsonl and nothing else, the same
bytes each time."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import design
import design2
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import report2
import results
import words
from estimates import (
    CONFIDENCE,
    NOT_SHOWN,
    POWER,
    Estimate,
    Lines,
    by_seed,
    detectable,
    estimate,
    in_unit,
    judged,
    mean_difference,
    means_table,
    metric,
    number,
    of,
    paired,
    table,
    times,
    title,
    verdict,
    with_interval,
)

HERE = Path(__file__).parent


def metrics_table(lines: Lines, task: str) -> str:
    return means_table(lines, task, design.TASKS[task].arms, design.SHOWN[task])


def differences_table(lines: Lines, task: str) -> str:
    names = design.SHOWN[task]
    rows = []
    for arm in design.TASKS[task].arms:
        for against in arm.against:
            cells = []
            for name in names:
                difference = paired(lines, task, arm.name, against, metric(name))
                said = verdict(difference, design.METRICS[name].lower_is_better)
                strong = f"**{said}**" if said in ("better", "worse") else said
                cells.append(f"{with_interval(difference, name, sign=True)} {strong}" if difference else said)
            rows.append([f"`{arm.name}` - `{against}`", *cells])
    return table(["paired difference", *map(title, names)], rows)


def cost_table(lines: Lines, task: str) -> str:
    rows = []
    for arm in design.TASKS[task].arms:
        found = of(lines, task, arm.name)
        if not found:
            continue
        seconds = estimate(line["train_seconds"] for line in found)
        rows.append(
            [
                f"`{arm.name}`",
                str(found[0]["settings"]["steps"]),
                f"{np.mean([line['tokens'] for line in found]):,.0f}",
                f"{seconds.mean:.0f}",
                times(paired_ratio(lines, task, arm.name, plain_arm(arm))),
                f"{np.mean([line['wall_seconds'] for line in found]) / 60:.1f}",
            ]
        )
    return table(["arm", "steps", "tokens trained on", "training, s", "times next-token's", "whole run, min"], rows)


def plain_arm(arm: design.Arm) -> str:
    """The next-token arm whose time an arm's is compared with."""
    return "ntp-full" if arm.full else "ntp"


def paired_ratio(lines: Lines, task: str, arm: str, against: str) -> float | None:
    """How many times as long `arm` trained: the median over the seeds that both have."""
    pairs = by_seed(lines, task, arm, against, lambda line: float(line["train_seconds"]))
    ratios = [ours / theirs for ours, theirs in pairs if theirs]
    return float(np.median(ratios)) if ratios else None


class Compared(NamedTuple):
    """What a primary comparison found, over the seeds that both arms have."""

    ours: Estimate
    theirs: Estimate
    difference: Estimate
    time: float | None
    verdict: str


def compared(lines: Lines, comparison: design.Comparison) -> Compared | None:
    """None where no seed has both arms."""
    task, value, pair = comparison.task, metric(comparison.metric), (comparison.arm, comparison.against)
    pairs = by_seed(lines, task, *pair, value)
    if not pairs:
        return None
    ours, theirs = map(estimate, zip(*pairs, strict=True))
    difference = mean_difference(pairs)
    said = verdict(difference, design.METRICS[comparison.metric].lower_is_better)
    return Compared(ours, theirs, difference, paired_ratio(lines, task, *pair), said)


def summary(lines: Lines) -> str:
    """Whether each method helped, one sentence each, and what each of its primary comparisons came to."""
    said = []
    for method in methods():
        found: dict[str, list[str]] = {}
        for one, outcome in primary_verdicts(lines, method):
            found.setdefault(outcome, []).append(f"`{one.arm}` against `{one.against}`")
        parts = "; ".join(f"{outcome}: {', '.join(pairs)}" for outcome, pairs in found.items())
        said.append(f"**{helped(lines, method)}** ({parts}).")
    return " ".join(said)


def methods() -> list[str]:
    return list(dict.fromkeys(comparison.method for comparison in design.COMPARISONS))


def primary_verdicts(lines: Lines, method: str) -> list[tuple[design.Comparison, str]]:
    return [(c, judged(lines, c.task, c.arm, c.against, c.metric)) for c in design.COMPARISONS if c.method == method]


def helped(lines: Lines, method: str) -> str:
    """Whether a method came out better anywhere, or else how large an effect had to be for this study to see it."""
    verdicts = [outcome for _, outcome in primary_verdicts(lines, method)]
    if "better" in verdicts:
        return f"{method} helped in {verdicts.count('better')} of {len(verdicts)} primary comparisons"
    unseen = limits(lines, method)
    return f"{method}: inconclusive" + (
        f", could not have seen an effect below {' and '.join(unseen)}" if unseen else ""
    )


def limits(lines: Lines, method: str) -> list[str]:
    """By metric, the largest detectable difference of the primary comparisons that show none, rounded up."""
    found: dict[str, float] = {}
    for c, outcome in primary_verdicts(lines, method):
        difference = paired(lines, c.task, c.arm, c.against, metric(c.metric))
        least = detectable(difference) if difference else None
        if least is not None and outcome == NOT_SHOWN:
            found[c.metric] = max(least, found.get(c.metric, 0.0))
    return [f"{in_unit(least, name)} ({design.METRICS[name].title})" for name, least in found.items()]


def secondary(lines: Lines) -> str:
    """How many of the other differences to next-token training exclude zero; the ablations make no claim."""
    primary = {(c.task, c.metric, c.arm, c.against) for c in design.COMPARISONS}
    said = [
        judged(lines, task, arm.name, against, name)
        for task, names in design.SHOWN.items()
        if task != "ablations"
        for arm in design.TASKS[task].arms
        if arm.caft is not None or arm.meap is not None
        for against in arm.against
        if against.startswith("ntp")
        for name in names
        if (task, name, arm.name, against) not in primary
    ]
    made = [one for one in said if one != "not run"]
    return (
        f"Of {len(made)} secondary differences between an arm with CAFT or MEAP and one of next-token training, "
        f"{made.count('better')} came out better and {made.count('worse')} worse (bold in the tables below); without "
        f"any effect about {len(made) * (1 - CONFIDENCE):.0f} would by chance."
    )


def rates_table(lines: Lines) -> str:
    rows = []
    for choice, rates in design.RATES.items():
        losses = {
            rate: [line["metrics"]["validation_loss"] for line in of(lines, f"rates-{choice}", f"{choice}-{rate:g}")]
            for rate in rates
        }
        cells = ", ".join(f"{rate:g}: {losses[rate][0]:.4f}" if losses[rate] else f"{rate:g}: -" for rate in rates)
        chosen = design.chosen_rate(choice, lines) if all(losses.values()) else None
        edge = " (at the edge of what was tried)" if chosen in (rates[0], rates[-1]) else ""
        rows.append([choice, cells, "-" if chosen is None else f"{chosen:g}{edge}"])
    return table(["for", "learning rate: validation loss", "chosen"], rows)


def stage1_table(lines: Lines) -> str:
    rows = []
    for arm in design.TASKS["stage1"].arms:
        for line in of(lines, "stage1", arm.name):
            heads = [
                f"{line['metrics'][f'untrained_loss_head_{k}']:.2f} to {line['metrics'][f'trained_loss_head_{k}']:.2f}"
                for k in range(1, 5)
            ]
            rows.append([f"`{arm.name}`", *heads, f"{line['wall_seconds'] / 60:.0f}"])
    return table(["targets", *(f"head {k}: loss, untrained to trained" for k in range(1, 5)), "minutes"], rows)


def equal_time_table(lines: Lines) -> str:
    """Losses on the marked molecules when next-token training of the same seed had ended, by linear interpolation."""
    rows = []
    for arm in design.TASKS["molecules"].arms:
        base = plain_arm(arm)
        ends = {line["seed"]: line["marks"][-1] for line in of(lines, "molecules", base)}
        pairs = [
            (loss_at(line, ends[line["seed"]]["train_seconds"]), ends[line["seed"]]["loss"])
            for line in of(lines, "molecules", arm.name)
            if line["seed"] in ends
        ]
        if not pairs:
            continue
        difference = mean_difference(pairs)
        rows.append(
            [
                f"`{arm.name}`",
                with_interval(estimate(ours for ours, _ in pairs), "heldout_loss"),
                "-" if arm.name == base else with_interval(difference, "heldout_loss", sign=True),
                "-" if arm.name == base else verdict(difference, True),
            ]
        )
    return table(["arm", "loss at that time", "minus next-token's", ""], rows)


def loss_at(line: results.Line, seconds: float) -> float:
    """Between marks; after the last one its loss stays."""
    marks = line["marks"]
    return float(np.interp(seconds, [m["train_seconds"] for m in marks], [m["loss"] for m in marks]))


def cells_table(lines: Lines, task: str, names: Sequence[str], head: Sequence[str]) -> str:
    """Share of questions found, by cell: means over seeds, in percent."""
    rows = []
    for arm in design.TASKS[task].arms:
        found = of(lines, task, arm.name)
        if found:
            rows.append(
                [f"`{arm.name}`", *(f"{100 * np.mean([line['metrics'][n] for line in found]):.1f}" for n in names)]
            )
    return table(["arm", *head], rows)


def needle_names() -> list[tuple[str, str]]:
    return [
        (f"needle_{length}_{depth:g}", f"{length} at {depth:.0%}")
        for length in design.NEEDLE_LENGTHS
        for depth in design.NEEDLE_DEPTHS
    ]


def mdqa_names() -> list[tuple[str, str]]:
    return [(f"mdqa_{n}_{place}", f"{n}, {place}") for n in design.MDQA_DOCUMENTS for place in design.MDQA_PLACES]


def ablations_table(lines: Lines) -> str:
    rows = []
    task, name = "ablations", "heldout_loss"
    for arm in sorted(
        design.TASKS[task].arms, key=lambda arm: list(design.DEFAULT_OF_KNOB).index(arm.knob) if arm.knob else -1
    ):
        found = of(lines, task, arm.name)
        default = design.DEFAULT_OF_KNOB.get(arm.knob)
        apart = [
            paired(lines, task, arm.name, other, metric(name)) if other else None
            for other in ("ntp" if arm.knob else None, default if default != arm.name else None)
        ]
        cells = [number(one.mean, name, sign=True) if one else "-" for one in apart]
        losses = ", ".join(number(line["metrics"][name], name) for line in found) or "-"
        default_says = f"{arm.says} (default)" if default == arm.name else arm.says
        time = times(paired_ratio(lines, task, arm.name, plain_arm(arm)))
        rows.append([arm.knob or "reference", f"`{arm.name}`: {default_says}", losses, *cells, time])
    head = ["knob", "setting", "held-out loss ↓", "minus `ntp`", "minus the default", "times next-token's time"]
    return table(head, rows)


def ablations_words(lines: Lines) -> str:
    """What the ablations' differences are to be held against, how much a difference changes with the seed, and which
    of them are beyond it."""
    task, name = "ablations", "heldout_loss"
    said = f"Molecules, LoRA, {design.TASKS[task].steps} steps, one seed: no interval, no claim, times of one run."
    pairs = by_seed(lines, "molecules", "caft-stage1", "ntp", metric(name))
    if len(pairs) < 2:
        return said
    spread = float(np.std([ours - theirs for ours, theirs in pairs], ddof=1))
    beyond = []
    for arm in design.TASKS[task].arms:
        default = design.DEFAULT_OF_KNOB.get(arm.knob, arm.name)
        apart = paired(lines, task, arm.name, default, metric(name))
        if default != arm.name and apart and abs(apart.mean) > 2 * spread:
            beyond.append(f"`{arm.name}` ({number(apart.mean, name, sign=True)})")
    return (
        f"{said} Over {len(pairs)} seeds of the molecules the difference `caft-stage1` - `ntp` has a standard "
        f"deviation of {number(spread, name)}; differences below twice that may be the seed's. Further than that from "
        f"their knob's default: {', '.join(beyond) or 'none'}. {words.DEFAULTS}"
    )


def primary_table(lines: Lines) -> str:
    """The primary comparisons, one row each."""
    rows = []
    for comparison in design.COMPARISONS:
        name, found = comparison.metric, compared(lines, comparison)
        means = [number(one.mean, name) for one in (found.ours, found.theirs)] if found else []
        rows.append(
            [
                comparison.question,
                f"{title(name)}: `{comparison.arm}` against `{comparison.against}`",
                " against ".join(means) or "-",
                with_interval(found.difference if found else None, name, sign=True),
                str(found.difference.seeds if found else 0),
                times(found.time if found else None),
                found.verdict if found else "not run",
            ]
        )
    head = ["question", "measured", "means", "paired difference (95 %)", "seeds", "times the training time", "verdict"]
    return table(head, rows)


# -- figures ----------------------------------------------------------------------------------------


def figure(folder: Path, name: str, panels: int, height: float = 3.4) -> tuple[Any, list[Any], Callable[[], None]]:
    """A drawing of so many panels, three in a row at most, `height` inches each row; the last saves it."""
    columns = min(panels, 3)
    rows = -(-panels // columns)
    size = (4.6 * columns, height * rows)
    drawing, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for unused in axes.flat[panels:]:
        unused.set_axis_off()

    def save() -> None:
        drawing.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(drawing)

    return drawing, list(axes.flat[:panels]), save


def draw_by_arm(lines: Lines, folder: Path) -> None:
    """Held-out loss of each arm with its interval."""
    _, axes, save = figure(folder, "molecules", 2)
    for axis, full in zip(axes, (False, True), strict=True):
        arms = [arm.name for arm in design.TASKS["molecules"].arms if arm.full == full]
        arms = [arm for arm in arms if of(lines, "molecules", arm)]
        for place, arm in enumerate(arms):
            found = of(lines, "molecules", arm)
            losses = [line["metrics"]["heldout_loss"] for line in found]
            whole = estimate(losses)
            axis.plot(losses, [place] * len(losses), "o", color="tab:gray", alpha=0.5, markersize=4)
            axis.errorbar(whole.mean, place, xerr=whole.half or 0, fmt="D", color="tab:blue", capsize=4)
        axis.set_yticks(range(len(arms)), arms)
        axis.invert_yaxis()
        axis.set_title("full fine-tuning" if full else "LoRA")
        axis.set_xlabel("held-out loss, nats a token")
    save()


def draw_time(lines: Lines, folder: Path) -> None:
    """Held-out loss of the marked molecules by seconds of training, means over seeds."""
    _, axes, save = figure(folder, "time", 2)
    for axis, full in zip(axes, (False, True), strict=True):
        for arm in design.TASKS["molecules"].arms:
            found = [line for line in of(lines, "molecules", arm.name) if arm.full == full and line["marks"]]
            if found:
                seconds, losses = (
                    np.mean([[mark[key] for mark in line["marks"]] for line in found], axis=0)
                    for key in ("train_seconds", "loss")
                )
                axis.plot(seconds, losses, "o-", markersize=3, label=arm.name)
        axis.set_title("full fine-tuning" if full else "LoRA")
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(f"loss on {design.SIZES.marked} held-out molecules")
        if axis.lines:
            axis.legend(fontsize=8)
    save()


def draw_heads(lines: Lines, folder: Path) -> None:
    """Training loss of each head, means over seeds."""
    arms = ("caft-copy", "caft-stage1", "caft-stage1-full")
    _, axes, save = figure(folder, "heads", len(arms))
    for axis, arm in zip(axes, arms, strict=True):
        found = [line["curve"] for line in of(lines, "molecules", arm)]
        keys = ["caft/next_token_loss", *(f"caft/loss_head_{k}" for k in range(1, 5))]
        for key in keys if found else []:
            steps = [entry["step"] for entry in found[0]]
            losses = np.mean([[entry[key] for entry in curve] for curve in found], axis=0)
            axis.plot(steps, losses, label=key.removeprefix("caft/").replace("_", " "))
        axis.set_title(arm)
        axis.set_xlabel("step")
        axis.set_ylabel("training loss, nats")
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    save()


def draw_places(lines: Lines, folder: Path) -> None:
    """Share of questions found by the place of their document."""
    _, axes, save = figure(folder, "documents", len(design.MDQA_DOCUMENTS))
    for axis, documents in zip(axes, design.MDQA_DOCUMENTS, strict=True):
        for shift, arm in enumerate(design.TASKS["retrieval"].arms):
            found = of(lines, "retrieval", arm.name)
            if found:
                cells = [estimate(map(metric(f"mdqa_{documents}_{p}"), found)) for p in design.MDQA_PLACES]
                axis.errorbar(
                    np.arange(len(cells)) + 0.05 * shift,
                    [100 * cell.mean for cell in cells],
                    yerr=[100 * (cell.half or 0) for cell in cells],
                    fmt="o-",
                    capsize=3,
                    markersize=4,
                    label=arm.name,
                )
        axis.set_xticks(range(len(design.MDQA_PLACES)), design.MDQA_PLACES)
        axis.set_title(f"{documents} documents")
        axis.set_ylabel("found, %")
    if axes[-1].containers:
        axes[-1].legend(fontsize=8)
    save()


def draw_needle(lines: Lines, folder: Path) -> None:
    """Share of needles found, each arm a grid of length by depth."""
    pairs = [(task, arm.name) for task in ("retrieval", "pretrain") for arm in design.TASKS[task].arms]
    pairs = [pair for pair in pairs if of(lines, *pair)]
    _, axes, save = figure(folder, "needle", max(len(pairs), 1), height=2.8)
    for axis, (task, arm) in zip(axes, pairs, strict=False):
        grid = [
            [
                np.mean([line["metrics"][f"needle_{n}_{d:g}"] for line in of(lines, task, arm)])
                for d in design.NEEDLE_DEPTHS
            ]
            for n in design.NEEDLE_LENGTHS
        ]
        axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for i, row in enumerate(grid):
            for j, share in enumerate(row):
                color = "black" if share > 0.6 else "white"
                axis.text(j, i, f"{share:.0%}", ha="center", va="center", color=color, fontsize=8)
        axis.set_xticks(range(len(design.NEEDLE_DEPTHS)), [f"{depth:.0%}" for depth in design.NEEDLE_DEPTHS])
        axis.set_yticks(range(len(design.NEEDLE_LENGTHS)), [str(length) for length in design.NEEDLE_LENGTHS])
        axis.set_title(f"{task}: {arm}", fontsize=10)
        axis.set_xlabel("depth")
    save()


def draw_few(lines: Lines, folder: Path) -> None:
    report2.draw_few(lines, folder, figure)


DRAWINGS = (draw_by_arm, draw_time, draw_heads, draw_places, draw_needle, draw_few)


# -- checks -----------------------------------------------------------------------------------------


def check(lines: Lines) -> None:
    """Raises SystemExit where a line is not what its study declares: results and protocol have parted."""
    planned = {*design.plan(), *design2.declared()}
    seen: set[design.Run] = set()
    for line in lines:
        run = results.run_of(line)
        if run not in planned:
            raise SystemExit(f"error: {run} is in results.jsonl and not declared in design.py or design2.py")
        if run in seen:
            raise SystemExit(f"error: {run} is in results.jsonl twice; delete one of its lines")
        seen.add(run)
        protocol = design if run.task in design.TASKS else design2
        try:
            declared: Mapping[str, Any] = protocol.settings(run, lines)
        except ValueError as error:
            raise SystemExit(f"error: {run}: {error}") from None
        if in_float32(line):
            declared = {**declared, "dtype": design.FLOAT32}
        changed = [
            key for key in declared.keys() | line["settings"].keys() if declared.get(key) != line["settings"].get(key)
        ]
        if changed:
            key = sorted(changed)[0]
            raise SystemExit(
                f"error: {run} was made with {key} {line['settings'].get(key)!r}, and {protocol.__name__}.py declares "
                f"{declared.get(key)!r}. Delete its line and run make study."
            )
    if len({line["data"] for line in lines}) > 1:
        raise SystemExit("error: the lines of results.jsonl were made on different data (key `data`)")


def of_first(lines: Lines) -> Lines:
    """The lines of the first study."""
    return [line for line in lines if line["task"] in design.TASKS]


def in_float32(line: results.Line) -> bool:
    return line["settings"].get("dtype") == design.FLOAT32


def too_long(lines: Lines) -> str:
    """Names the runs that took longer than a run should."""
    limit = design.RUN_MINUTES
    found = by_arm(results.run_of(line) for line in lines if line["wall_seconds"] > 60 * limit)
    said = f"Longer than the {limit} minutes meant for a run: {found or 'none'}."
    slow = by_arm(results.run_of(line) for line in lines if in_float32(line))
    return f"{said} In float32, not as declared, for want of a CPU with bfloat16: {slow}." if slow else said


def by_arm(runs: Iterable[design.Run]) -> str:
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        seeds.setdefault((run.task, run.arm), []).append(run.seed)
    return ", ".join(f"{task} {arm} (seed {', '.join(map(str, found))})" for (task, arm), found in seeds.items())


# -- the page ---------------------------------------------------------------------------------------


def listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values})) or "-"


def first_page(lines: Lines) -> str:
    """study-1.md: all of the first study."""
    lines = of_first(lines)
    missing = results.missing(lines)
    hours = sum(line["wall_seconds"] for line in lines) / 3600
    settings = design.TRAINING
    molecules, retrieval, pretrain = (design.TASKS[name] for name in ("molecules", "retrieval", "pretrain"))
    names = [design.METRICS[name].title for name in design.SHOWN["molecules"]]
    versions = {
        name: listed(line["versions"][name] for line in lines) for name in (lines[0]["versions"] if lines else ())
    }
    not_done = (
        "Every planned run was done."
        if not missing
        else f"**{len(missing)} of {len(design.plan())} planned runs are not done** (`make study` does them): "
        + by_arm(missing)
        + "."
    )
    sections = [
        "# Study 1: CAFT and MEAP on SmolLM2-135M, on two cores",
        f"{WRITTEN} Its answers in short, the second study and what both mean: [README.md](README.md).",
        "## Answer",
        summary(lines),
        primary_table(lines),
        "Differences are the first arm's minus the second's (↓ lower is better, ↑ higher is better). 'Better' and "
        "'worse' stand only where the 95 % interval of the paired difference excludes zero. The effect that could have "
        f"been seen is the one that the same test finds in {POWER:.0%} of such studies.",
        secondary(lines),
        "This holds for a model of 135M parameters, short runs and the data below. What it lets a user of an 8B model "
        "conclude stands in [README.md](README.md#what-an-8b-user-may-conclude).",
        not_done,
        "## Protocol",
        words.PROTOCOL.format(
            model=design.MODEL,
            threads=design.THREADS,
            steps=molecules.steps,
            batch=molecules.batch,
            time_steps=molecules.arm("ntp-time").steps,
            generated=design.SIZES.generated,
            marked=design.SIZES.marked,
            metrics=", ".join(names[1:]),
            rank=design.LORA["r"],
            alpha=design.LORA["lora_alpha"],
            schedule=settings["lr_scheduler_type"],
            warmup=f"{design.WARMUP:.0%}",
            main_heads=design.MAIN_HEADS,
            stage1_steps=design.STAGE1.options["steps"],
            stage1_batch=design.STAGE1.options["batch-size"],
            retrieval_rows=retrieval.rows,
            retrieval_steps=retrieval.steps,
            retrieval_batch=retrieval.batch,
            documents=" and ".join(map(str, design.MDQA_DOCUMENTS)),
            questions=design.SIZES.document_questions,
            lengths=", ".join(map(str, design.NEEDLE_LENGTHS)),
            depths=", ".join(f"{depth:.0%}" for depth in design.NEEDLE_DEPTHS),
            needles=design.SIZES.needle_questions,
            others=design.NEEDLE_OTHERS,
            pretrain_steps=pretrain.steps,
            pretrain_batch=pretrain.batch,
            pretrain_length=pretrain.max_length,
            seeds=len(molecules.seeds),
            fewer=len(retrieval.seeds),
            cuts=design.CUTS,
        ),
        "Primary comparisons: "
        + "; ".join(
            f"{c.task}, {design.METRICS[c.metric].title}, `{c.arm}` - `{c.against}`" for c in design.COMPARISONS
        )
        + ". Everything else is secondary. Intervals are not corrected for the number of comparisons: of twenty "
        "secondary ones without any effect, one excludes zero on average.",
        "### Learning rates",
        "Chosen for the next-token arm on validation rows that serve for nothing else, with a seed of its own; the "
        "other arms take the same rate.",
        rates_table(lines),
        "### Stage 1",
        "By `caft pretrain-heads` on training molecules, training records and Old Testament passages. The loss is on a "
        "part of these rows that it holds out, for each kind against its own targets: kinds are not comparable here.",
        stage1_table(lines),
        "## Molecules: systematic name to SMILES",
        metrics_table(lines, "molecules"),
        "Means over seeds with 95 % t-intervals (↓ lower is better). Held-out loss is over all 1,000 held-out "
        f"molecules, the other metrics over the SMILES written for the first {design.SIZES.generated} of them.",
        "![held-out loss by arm](molecules.png)",
        "### Paired differences",
        differences_table(lines, "molecules"),
        "### At equal time",
        "`ntp-time` is next-token training with about as many steps more as take CAFT's time (see 'training, s' "
        f"below). Besides that, each arm's loss on {design.SIZES.marked} held-out molecules when next-token "
        "training of the same seed ended. The learning rate of a slower arm had not come down to zero by then, which "
        "counts against it.",
        equal_time_table(lines),
        "![held-out loss by time](time.png)",
        "![training loss of each head](heads.png)",
        "### Cost",
        cost_table(lines, "molecules"),
        "## Retrieval",
        metrics_table(lines, "retrieval"),
        "### Paired differences",
        differences_table(lines, "retrieval"),
        "### Found by the place of the document, %",
        cells_table(lines, "retrieval", *zip(*mdqa_names(), strict=True)),
        "![found by place](documents.png)",
        "### Needles found by length and depth, %",
        cells_table(lines, "retrieval", *zip(*needle_names(), strict=True)),
        "![needles found](needle.png)",
        "### Cost",
        cost_table(lines, "retrieval"),
        "## MEAP pretraining",
        metrics_table(lines, "pretrain"),
        differences_table(lines, "pretrain"),
        cells_table(lines, "pretrain", *zip(*needle_names(), strict=True)),
        cost_table(lines, "pretrain"),
        "## Ablations",
        ablations_words(lines),
        ablations_table(lines),
        "## What it cost",
        f"{len(lines)} runs, {hours:.1f} hours (about ten were meant) on "
        f"{listed(line['processor'] for line in lines)}, {design.THREADS} threads. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". Commits of the code: {listed(line['commit'][:10] + line['commit'][40:] for line in lines)}.",
        too_long(lines),
    ]
    return "\n\n".join(sections) + "\n"


WRITTEN = (
    "Written by `make study-report` from `results.jsonl`; not edited by hand. "
    "[How to run the studies again](../README.md#run-the-study-again)."
)


def page(lines: Lines) -> str:
    """README.md: what to do, the second study, the first in short."""
    sections = [
        "# Does it help? CAFT and MEAP on SmolLM2-135M",
        WRITTEN,
        "## When to switch which on",
        when(lines),
        *report2.section(lines),
        "## Study 1, in short",
        "Short fine-tuning of the same model, half an epoch of molecules, retrieval with three seeds. "
        "[All of it](study-1.md): every arm, metric and ablation.",
        summary(lines),
        primary_table(lines),
        "Differences are the first arm's minus the second's (↓ lower is better, ↑ higher is better). 'Better' and "
        "'worse' stand only where the 95 % interval of the paired difference excludes zero. The effect that could have "
        f"been seen is the one that the same test finds in {POWER:.0%} of such studies.",
        words.PAPERS,
        words.CONCLUSIONS,
    ]
    return "\n\n".join(sections) + "\n"


def when(lines: Lines) -> str:
    """What a user takes away, with the figures that speak for it."""
    times_ = paired_ratio(lines, "molecules", "caft-stage1", "ntp")
    more, with_heads = (
        paired(lines, "molecules", arm, "ntp", metric("heldout_loss")) for arm in ("ntp-time", "caft-stage1")
    )
    said = words.WHEN.format(
        caft=report2.in_words(lines, "few", "caft"),
        meap=report2.in_words(lines, "few", "meap"),
        frozen=report2.in_words(lines, "few", "caft-frozen"),
        separate=report2.in_words(lines, "documents", "meap-separate"),
        concat=report2.in_words(lines, "documents", "meap-concat"),
        ruler=with_interval(report2.ruler(lines), "heldout_loss", sign=True),
        trained=report2.tokens_per_pass(lines, "caft"),
        kept=report2.tokens_per_pass(lines, "caft-frozen"),
        times=times(times_),
        more=with_interval(more, "heldout_loss", sign=True),
        heads=with_interval(with_heads, "heldout_loss", sign=True),
    )
    items = re.split(r"\n(?=\d+\. )", said)
    return "\n".join(filled(item, indent="   ") for item in items)


def filled(text: str, indent: str = "") -> str:
    """The text in lines of at most 120 characters; `indent` stands before all but the first."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FILE)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for README.md and the figures")
    options = parser.parse_args(arguments)
    lines = results.read(options.results)
    if not lines:
        raise SystemExit(f"error: {options.results} holds no run yet: make study")
    check(lines)
    options.out.mkdir(parents=True, exist_ok=True)
    for draw in DRAWINGS:
        draw(lines, options.out)
    for name, write in (("README.md", page), ("study-1.md", first_page)):
        (options.out / name).write_text(write(lines), encoding="utf-8")
    print(f"wrote README.md, study-1.md and {len(DRAWINGS)} figures into {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

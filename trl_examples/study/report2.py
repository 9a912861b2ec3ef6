"""What the report says of the second study, see design2.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import design2
import numpy as np
import results
from design import Comparison
from estimates import (
    CONFIDENCE,
    NOT_SHOWN,
    ONE_SEED,
    Estimate,
    Lines,
    by_seed,
    detectable,
    in_unit,
    line_pairs,
    mean_difference,
    means_table,
    metric,
    number,
    of,
    paired,
    table,
    title,
    unit,
    verdict,
    with_interval,
)
from scipy import stats

DRAWS = 2_000  # of seeds and items, for the intervals of what was measured item by item
NAMES = {"few": "A", "graphs": "B", "documents": "C"}
BY_ITEM = ("exact", "valid", "tanimoto", "found")


# -- the four questions -------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a comparison came to. `corrected` is its p-value by Holm's rule over all four."""

    comparison: Comparison
    pairs: list[tuple[float, float]]
    p: float
    corrected: float
    said: str

    @property
    def difference(self) -> Estimate | None:
        return mean_difference(self.pairs) if self.pairs else None


def answers(lines: Lines) -> list[Answer]:
    """Of the four primary comparisons; those that were not run or have one seed count as p = 1."""
    found = []
    for one in design2.COMPARISONS:
        pairs = by_seed(lines, one.task, one.arm, one.against, metric(one.metric))
        found.append((one, pairs, p_value(one, pairs)))
    corrected = holm([p for *_, p in found])
    return [
        Answer(one, pairs, p, least, said_of(lines, one, pairs, least))
        for (one, pairs, p), least in zip(found, corrected, strict=True)
    ]


def p_value(comparison: Comparison, pairs: list[tuple[float, float]]) -> float:
    """Two-sided: of a paired t-test, or for paths, of Fisher's exact test on how many seeds have learnt them."""
    if len(pairs) < 2:
        return 1.0
    if comparison.metric == "paths":
        return exact(learnt(pairs), len(pairs))
    differences = np.array([ours - theirs for ours, theirs in pairs])
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def learnt(pairs: list[tuple[float, float]]) -> list[int]:
    """How many seeds of each of two arms have learnt the paths."""
    return [sum(values[side] > design2.LEARNT for values in pairs) for side in (0, 1)]


def exact(counts: list[int], seeds: int) -> float:
    """Fisher's exact test on how many seeds of each arm, two-sided."""
    return float(stats.fisher_exact([[n, seeds - n] for n in counts]).pvalue)


def holm(values: list[float]) -> list[float]:
    """P-values corrected for their number (Holm, 1979)."""
    order = np.argsort(values, kind="stable")
    corrected, least = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = least
    return corrected


def said_of(lines: Lines, comparison: Comparison, pairs: list[tuple[float, float]], corrected: float) -> str:
    if dropped(lines, comparison.task):
        return "dropped by its rule"
    if not pairs:
        return "not run"
    if len(pairs) < 2:
        return ONE_SEED
    if corrected >= 1 - CONFIDENCE:
        return NOT_SHOWN
    better = np.mean([ours - theirs for ours, theirs in pairs]) < 0
    return "better" if better == design2.METRICS[comparison.metric].lower_is_better else "worse"


def dropped(lines: Lines, task: str) -> bool:
    """Whether its pilot has ended the task."""
    try:
        if task == "graphs":
            return not design2.control_works(lines)
        return task == "documents" and design2.chosen_rows(lines) is None
    except design2.NotYet:
        return False


def ruler(lines: Lines) -> Estimate | None:
    """The gain by 30 % more molecules."""
    return paired(lines, "few", "ntp-more", "ntp", metric("heldout_loss"))


def rows_worth(lines: Lines, difference: Estimate | None) -> str:
    """A difference of held-out loss in labelled rows, by the ruler."""
    measured = ruler(lines)
    if difference is None or measured is None or measured.mean >= 0:
        return "-"
    return f"{100 * (design2.RULER - 1) * difference.mean / measured.mean:+.0f} % rows"


def in_words(lines: Lines, task: str, arm: str) -> str:
    """What an arm changed of its task's first metric beside next-token training, in half a sentence, by seeds. 'Better'
    and 'worse' are for the four questions."""
    name = design2.SHOWN[task][0]
    difference = paired(lines, task, arm, "ntp", metric(name))
    if difference is None:
        return "not run yet"
    asked = {(one.comparison.task, one.comparison.arm): one.said for one in answers(lines)}
    if (task, arm) in asked:
        said = asked[task, arm]
    elif difference.excludes_zero:
        said = "not corrected, excludes zero"
    else:
        said = verdict(difference, design2.METRICS[name].lower_is_better)
    if said == NOT_SHOWN and (least := detectable(difference)):
        said += f" ({in_unit(least, name)} could have been seen)"
    seeds = f"{difference.seeds} seed{'s' if difference.seeds > 1 else ''}"
    return f"{with_interval(difference, name, True)} {unit(name)} over {seeds}: {said}"


def least_seen(answer: Answer) -> str:
    """From which effect on a comparison would have shown it: with 80 % power, and of paths, which number of seeds."""
    name = answer.comparison.metric
    if len(answer.pairs) < 2 or answer.difference is None:
        return "-"
    if name == "paths":
        seeds = len(answer.pairs)
        theirs = learnt(answer.pairs)[1]
        enough = [ours for ours in range(theirs, seeds + 1) if exact([ours, theirs], seeds) < 1 - CONFIDENCE]
        return f"{enough[0]} of {seeds} seeds" if enough else "-"
    return in_unit(detectable(answer.difference) or 0.0, name)


def tokens_per_pass(lines: Lines, arm: str) -> str:
    found = [line["metrics"]["tokens_per_pass"] for line in of(lines, "few", arm)]
    return f"{np.mean(found):.2f}" if found else "-"


def values(answer: Answer) -> list[str]:
    """What each of the two arms came to: the mean, or how many seeds have learnt the paths."""
    name = answer.comparison.metric
    if name == "paths":
        return [f"{count} of {len(answer.pairs)}" for count in learnt(answer.pairs)]
    return [number(float(np.mean(side)), name) for side in zip(*answer.pairs, strict=True)]


def answers_table(lines: Lines) -> str:
    rows = []
    for answer in answers(lines):
        one, difference = answer.comparison, answer.difference
        measured, apart = title(one.metric), with_interval(difference, one.metric, sign=True)
        if one.metric == "paths":
            measured, apart = f"seeds that find more than {design2.LEARNT:.0%} of the paths ↑", "-"
        rows.append(
            [
                f"{NAMES[one.task]}. {one.question}",
                f"{measured}: `{one.arm}` against `{one.against}`",
                " against ".join(values(answer)) if answer.pairs else "-",
                apart,
                rows_worth(lines, difference) if one.task == "few" else "-",
                str(len(answer.pairs)),
                least_seen(answer),
                f"{answer.corrected:.2f}" if len(answer.pairs) > 1 else "-",
                answer.said,
            ]
        )
    head = [
        "question",
        "measured",
        "found",
        "paired difference (95 %)",
        "worth",
        "seeds",
        "could have been shown from",
        "p (Holm)",
        "verdict",
    ]
    return table(head, rows)


# -- what was measured item by item -------------------------------------------------------------------


def by_items(lines: Lines, task: str, arm: str, against: str, name: str) -> Estimate | None:
    """The mean difference over seeds and items, both resampled, with half of the 95 % interval's width, which errs on
    the wide side (Owen, 2007). None where the items are not there."""
    pairs = [
        np.array(ours["items"][name]) - np.array(theirs["items"][name])
        for ours, theirs in line_pairs(lines, task, arm, against)
        if name in ours.get("items", {}) and name in theirs.get("items", {})
    ]
    if not pairs:
        return None
    apart = np.stack(pairs)
    draw = np.random.default_rng(0)
    seeds, items = apart.shape
    means = [apart[draw.integers(0, seeds, seeds)][:, draw.integers(0, items, items)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(apart.mean()), float(max(high - apart.mean(), apart.mean() - low)), seeds)


def differences_table(lines: Lines, task: str) -> str:
    """Each arm against those that it is compared with: by t-interval over seeds, or by resampling where there are
    items."""
    names = design2.SHOWN[task]
    rows = []
    for ours, theirs in ((arm.name, name) for arm in design2.TASKS[task].arms for name in arm.against):
        cells = []
        for name in names:
            difference = paired(lines, task, ours, theirs, metric(name))
            resampled = by_items(lines, task, ours, theirs, name) if name in BY_ITEM else None
            found = resampled or difference
            # Of few seeds resampling makes too much.
            strong = found is not None and found.excludes_zero and (not resampled or found.seeds >= design2.INTERIM)
            text = with_interval(found, name, sign=True)
            cells.append(f"**{text}**" if strong else text)
        rows.append([f"`{ours}` - `{theirs}`", *cells])
    return table(["paired difference", *map(title, names)], rows)


def alone(lines: Lines) -> str:
    """Names runs that are in no difference, because the arm beside them was run on another kind of machine. Empty where
    there are none."""
    found = set()
    for task in design2.TASKS.values():
        for ours, theirs in ((arm.name, name) for arm in task.arms for name in arm.against):
            seeds, others = ({one["seed"] for one in of(lines, task.name, name)} for name in (ours, theirs))
            compared = {one["seed"] for one, _ in line_pairs(lines, task.name, ours, theirs)}
            left = (seeds & others) - compared
            found |= {f"{task.name} `{ours}` beside `{theirs}`, seed {seed}" for seed in left}
    if not found:
        return ""
    return f"**Not compared, for the two were run on different kinds of machine**: {'; '.join(sorted(found))}."


def arms_table(lines: Lines, task: str) -> str:
    return means_table(lines, task, design2.TASKS[task].arms, design2.SHOWN[task])


def heads_table(lines: Lines, task: str) -> str:
    """What heads did besides: the dose of their gradient, and what they bring as drafters. Empty where no run has
    it."""
    rows = []
    for arm in design2.TASKS[task].arms:
        found = [line for line in of(lines, task, arm.name) if line.get("dose")]
        if found:
            ratios, cosines = ([entry[key] for line in found for entry in line["dose"]] for key in ("ratio", "cosine"))
            tokens = [line["metrics"]["tokens_per_pass"] for line in found]
            rows.append(
                [
                    f"`{arm.name}`",
                    str(len(found)),
                    f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                    f"{np.median(cosines):+.2f} ({min(cosines):+.2f} to {max(cosines):+.2f})",
                    f"{np.mean(tokens):.2f}",
                ]
            )
    head = [
        "arm",
        "seeds",
        "auxiliary gradient, of the next-token one's length",
        "cosine of the two",
        "tokens a pass as drafters, on its own greedy texts",
    ]
    return table(head, rows) if rows else ""


# -- pilots and rules ---------------------------------------------------------------------------------


def pilots(lines: Lines) -> str:
    """What each pilot chose, and which rules took effect, one line each."""
    said = []
    try:
        chosen = design2.chosen_few(lines)
        found = design2.pilot("few-pilot", lines)
        losses = ", ".join(f"{name}: {one['validation_loss']:.3f} ({one['epochs']:.0f})" for name, one in found.items())
        said.append(
            f"A: learning rate, weight decay, attention dropout: validation loss (epochs until it had not been better "
            f"for {design2.PATIENCE}): {losses}. Chosen: {chosen['learning_rate']:g}, {chosen['weight_decay']:g}, "
            f"{chosen['attention_dropout']:g}; {chosen['rows']} molecules, "
            + (
                "which overfit well before the last epoch."
                if chosen["rows"] == design2.FEW
                else "for 500 did not overfit."
            )
        )
    except design2.NotYet as error:
        said.append(f"A: {error}.")
    for line in of(lines, "few-heads", "few-heads"):
        accuracy = line["metrics"]["trained_accuracy_head_1"]
        said.append(
            f"A, stage 1 of the frozen heads: head 1 is right in {100 * accuracy:.0f} % on molecules held out from it "
            f"(40 were aimed at), after {line['settings']['steps']} steps of {line['settings']['batch-size']}."
        )
    out = design2.stopped(lines)
    if out:
        names = ", ".join(f"`{name}`" for name in sorted(out))
        said.append(
            f"A, after {design2.INTERIM} seeds: {names} ended by the rule, for their 80 % intervals hold no gain of "
            "half a ruler."
        )
    try:
        paths = design2.pilot("graphs-pilot", lines)["control"]["paths"]
        said.append(
            f"B: the control finds {100 * paths:.1f} % of the paths, {100 * design2.CONTROL:.0f} are asked for"
            + ("; dropped by its rule." if dropped(lines, "graphs") else ".")
        )
    except design2.NotYet as error:
        said.append(f"B: {error}.")
    try:
        shares = ", ".join(
            f"{100 * one['found']:.1f} % after {design2.TASKS['documents-pilot'].arm(name).changes['rows']}"
            for name, one in design2.pilot("documents-pilot", lines).items()
        )
        rows = design2.chosen_rows(lines)
        chosen = f"{rows} were chosen." if rows else "none leaves headroom: dropped by its rule."
        said.append(
            f"C: next-token training finds, of the validation questions, {shares} questions; {chosen} "
            "Range and rule were changed while this pilot ran, before any run that counts (`ROWS` in `design2.py`)."
        )
    except design2.NotYet as error:
        said.append(f"C: {error}.")
    return "\n".join(f"- {one}" for one in said)


def progress(lines: Lines) -> tuple[int, int]:
    """Runs done, and those that are still to be done as far as the rules tell now."""
    done = {results.run_of(line) for line in lines}
    out = {task for task in ("graphs", "documents") if dropped(lines, task)}
    ended = design2.stopped(lines)
    wanted = [
        run
        for run in design2.declared()
        if run.task not in out and not (run.task == "few" and run.seed >= design2.INTERIM and run.arm in ended)
    ]
    return sum(line["task"] in design2.TASKS for line in lines), sum(run not in done for run in wanted)


def state(lines: Lines) -> str:
    done, left = progress(lines)
    if left:
        still = "is" if left == 1 else "are"
        return f"**Under way: {done} runs are done, {left} {still} still to be done** (`make study`)."
    return f"All {done} runs that its rules ask for are done."


# -- the section --------------------------------------------------------------------------------------


PROTOCOL = """\
Declared in `design2.py` and committed before the runs that count; pilots choose by rules that stand there. {model},
dequantised from a Q4_1 GGUF file; `CAFTSFTTrainer` (B: `with_caft(Trainer)`) in every arm, without `caft` and `meap`
in the next-token arms. Weights in float32. A seed says which rows are drawn and in which order, and differences are
taken between runs of the same seed on the same kind of machine. What is measured is the saved model, loaded anew
without heads. The four questions are corrected by Holm's rule; 'better' and 'worse' stand there only where the
corrected p is below {alpha:.2f}. Elsewhere intervals are not corrected, and no claim is made; those that exclude
zero are bold. What is counted item by item (exact match, valid, Tanimoto, found) is resampled over seeds and items,
and bold from four seeds on.

- **A. Few data, many epochs**: {few} molecules a seed, full fine-tuning, batch {batch}, up to {epochs} epochs at a
  constant learning rate; the epoch of the best validation loss is tested, and a run ends {patience} epochs after it.
  {heldout} held-out molecules for the loss, {generated} for what is written. 'Worth' is a difference beside the gain by
  30 % more molecules (`ntp-more`, the ruler). After {interim} seeds an arm stops whose 80 % interval holds no gain of
  half a ruler. The frozen heads have seen 2,500 other molecules in stage 1: that arm asks what strong heads do.
- **B. Looking ahead**: paths in star graphs with three arms of six nodes, numbered anew in each; a Llama of {layers}
  layers and width {width} from its random start, {steps} steps of {graphs} fresh graphs. The first step has to be
  looked ahead for: without that a third are right. A seed has learnt it where more than {learnt:.0%} of the paths are
  right.
- **C. Retrieval with headroom**: questions on one of 6 to 8 documents, every place as often; {questions} held-out
  questions whose document stands in the middle of seven, no document twice. LoRA. MEAP sees each question once with its
  copy, next-token training twice, as many tokens and, since a batch holds as many questions, twice as many optimizer
  steps. `ntp-once`, which sees each question once, takes as many steps as MEAP; it was added when one seed of the
  others had been done."""


def section(lines: Lines) -> list[str]:
    """The second study, from its heading on."""
    few, graph = design2.MOLECULES, design2.GRAPHS
    kinds: dict[str, list[results.Line]] = {}
    for line in lines:
        if line["task"] in design2.TASKS:
            kinds.setdefault(f"{line['processor']}, {line['dtype']}", []).append(line)
    cost = "; ".join(
        f"{name}: {len(found)} runs, {sum(line['wall_seconds'] for line in found) / 3600:.1f} hours"
        for name, found in sorted(kinds.items())
    )
    parts = [
        "## Study 2: where the methods should help",
        state(lines),
        alone(lines),
        answers_table(lines),
        "'Could have been shown from': the effect that the same test, uncorrected, shows in 80 % of such studies; of "
        "seeds that have learnt the paths, how many it takes.",
        "### Protocol",
        PROTOCOL.format(
            model=design2.design.MODEL,
            alpha=1 - CONFIDENCE,
            few=few["rows"],
            batch=few["batch"],
            epochs=few["epochs"],
            patience=design2.PATIENCE,
            heldout=f"{design2.SIZES.heldout:,}",
            generated=design2.SIZES.generated,
            interim=design2.INTERIM,
            layers=graph["layers"],
            width=graph["width"],
            steps=f"{graph['steps']:,}",
            graphs=graph["batch"],
            learnt=design2.LEARNT,
            questions=design2.SIZES.questions,
        ),
        "### Pilots and rules",
        pilots(lines),
        "### A. Few data, many epochs",
        arms_table(lines, "few"),
        differences_table(lines, "few"),
        "The ruler: 30 % more molecules change the held-out loss by "
        f"{with_interval(ruler(lines), 'heldout_loss', sign=True)}.",
        heads_table(lines, "few"),
        followed_up(lines),
        "![validation loss by epoch, held-out loss by arm](few.png)",
        "### B. Looking ahead",
        arms_table(lines, "graphs"),
        differences_table(lines, "graphs"),
        heads_table(lines, "graphs"),
        "### C. Retrieval with headroom",
        *(
            [arms_table(lines, "documents"), differences_table(lines, "documents"), copied(lines)]
            if any(line["task"] == "documents" for line in lines)
            else ["Not run yet."]
        ),
        "### Cost",
        f"{cost}. On a GPU several runs went side by side, so their times are not compared.",
    ]
    return [part for part in parts if part]


def followed_up(lines: Lines) -> str:
    first = paired(lines, "ablations", "meap-separate", "ntp", metric("heldout_loss"))
    return (
        "The largest figure of study 1 that nothing explained was that of MEAP `separate` on molecules: "
        f"{with_interval(first, 'heldout_loss', sign=True)}. Here it is {in_words(lines, 'few', 'meap')}."
    )


def copied(lines: Lines) -> str:
    """Whether a copy behind its original is copied from it."""
    rows = []
    for arm in design2.DOCUMENT_ARMS:
        for kind, says in (
            ("masked_loss", "in the prompt (documents)"),
            ("masked_molecule_loss", "not in the prompt (molecules)"),
        ):
            names = [f"{kind}_{how}" for how in ("alone", "with_original")]
            found = [line["metrics"] for line in of(lines, "documents", arm.name) if names[0] in line["metrics"]]
            if found:
                losses = [f"{np.mean([metrics[name] for metrics in found]):.3f}" for name in names]
                rows.append([f"`{arm.name}`", says, str(len(found)), *losses])
    if not rows:
        return ""
    return "Loss on masked tokens of rows that were not trained on, in nats:\n\n" + table(
        ["arm", "the answer stands", "seeds", "the copy alone", "the original in view"], rows
    )


def draw_few(lines: Lines, folder: Path, figure: Callable[..., Any]) -> None:
    """Validation loss by epoch, means over seeds as far as all have gone, and the held-out loss of each seed."""
    _, (epochs, losses), save = figure(folder, "few", 2)
    shown: Iterable[design2.Arm] = [arm for arm in design2.FEW_ARMS if of(lines, "few", arm.name)]
    for place, arm in enumerate(shown):
        found = of(lines, "few", arm.name)
        curves = [line["validation"] for line in found]
        means = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)
        epochs.plot(range(1, len(means) + 1), means, "o-", markersize=3, label=arm.name)
        values = [line["metrics"]["heldout_loss"] for line in found]
        losses.plot(values, [place] * len(values), "o", color="tab:gray", alpha=0.5, markersize=4)
        losses.plot(math.fsum(values) / len(values), place, "D", color="tab:blue")
    losses.set_yticks(range(len(list(shown))), [arm.name for arm in shown])
    losses.invert_yaxis()
    losses.set_xlabel("held-out loss, nats a token")
    epochs.set_xlabel("epoch")
    epochs.set_ylabel("validation loss, nats a token")
    if epochs.lines:
        epochs.legend(fontsize=8)
    save()

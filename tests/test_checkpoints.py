"""Which checkpoint a run resumes from, when a kill or a full disk has left one half written."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from transformers import Trainer

from builders.runs import CAFTTrainer, arguments, lora, losses, trainer_of
from builders.tiny import word_tokenizer
from caft_plugin import ConfigError
from caft_plugin.checkpoints import IncompleteCheckpoint, Parts, newest_whole, refuse_incomplete

pytestmark = pytest.mark.newest

WHOLE = Parts(weights=True, optimizer=True)


def make(model, folder, **settings):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **settings}
    return trainer_of(copy.deepcopy(model), folder, **{"caft": {"beta": 0.5}, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run with two checkpoints: its model at the start, its folder, its losses."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from builders.tiny import LLAMA

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    folder = tmp_path_factory.mktemp("run")
    trainer = make(model, folder)
    trainer.train()
    return model, folder, losses(trainer)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add_index(checkpoint, shards):
    weights = {name: name for name in shards}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


DAMAGE = {
    "no state": (
        lambda c: (c / "trainer_state.json").unlink(),
        "has no readable trainer_state.json",
    ),
    "half a state": (lambda c: cut(c / "trainer_state.json"), "has no readable trainer_state.json"),
    "no weights": (
        lambda c: (c / "model.safetensors").unlink(),
        "lacks the weights of the model or adapter",
    ),
    "half the weights": (lambda c: cut(c / "model.safetensors"), "has a damaged model.safetensors"),
    "a shard too few": (
        lambda c: add_index(c, ["model.safetensors", "model-00002-of-00002.safetensors"]),
        "lacks model-00002-of-00002.safetensors",
    ),
    "half an index": (
        lambda c: (c / "model.safetensors.index.json").write_text('{"weight_'),
        "has a damaged model.safetensors.index.json",
    ),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "lacks optimizer.pt"),
    "half an optimizer": (lambda c: cut(c / "optimizer.pt"), "has a damaged optimizer.pt"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "lacks scheduler.pt"),
    "half a scheduler": (lambda c: cut(c / "scheduler.pt"), "has a damaged scheduler.pt"),
    "no random state": (lambda c: (c / "rng_state.pth").unlink(), "lacks rng_state.pth"),
    "half a random state": (lambda c: cut(c / "rng_state.pth"), "has a damaged rng_state.pth"),
    "half the heads": (
        lambda c: cut(c / "caft_heads/heads.safetensors"),
        "has a damaged caft_heads/heads.safetensors",
    ),
    "no heads": (
        lambda c: (c / "caft_heads/heads.safetensors").unlink(),
        "lacks caft_heads/heads.safetensors",
    ),
    "no record": (
        lambda c: (c / "caft_heads/config.json").unlink(),
        "has an incomplete caft_heads/",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_passed_over(run, tmp_path, caplog, how):
    model, folder, expected = run
    shutil.copytree(folder, tmp_path / "out")
    damage, problem = DAMAGE[how]
    damage(tmp_path / "out" / "checkpoint-4")
    trainer = make(model, tmp_path / "out")
    trainer.train(resume_from_checkpoint=True)
    assert caplog.text.count("it is skipped") == 1 and f"checkpoint-4 {problem}" in caplog.text
    assert [{**e, "epoch": 0} for e in losses(trainer)] == [{**e, "epoch": 0} for e in expected]
    newest, passed_over = newest_whole(tmp_path / "out", WHOLE)
    # what was damaged is written anew (an index that does not belong there stays)
    assert newest.name == (
        "checkpoint-2" if "index" in how or "shard" in how else "checkpoint-4"
    ), passed_over


@pytest.mark.parametrize("how", DAMAGE)
def test_one_that_is_asked_for_has_to_be_whole(run, tmp_path, how):
    model, folder, _ = run
    shutil.copytree(folder, tmp_path / "out")
    damage, problem = DAMAGE[how]
    damage(tmp_path / "out" / "checkpoint-4")
    with pytest.raises(ConfigError) as error:
        make(model, tmp_path / "elsewhere").train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")
        )
    message = str(error.value)
    assert message.startswith(
        f"resume_from_checkpoint: got {tmp_path / 'out' / 'checkpoint-4'}, which {problem}"
    )
    assert f"use {tmp_path / 'out' / 'checkpoint-2'}, the newest complete one there" in message


def test_without_a_whole_one(run, tmp_path):
    model, folder, _ = run
    with pytest.raises(
        ConfigError,
        match="got True, but .* has no complete checkpoint. Omit it to start from the beginning",
    ):
        make(model, tmp_path).train(resume_from_checkpoint=True)
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match="that folder has none, so start from the beginning"):
        make(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ConfigError, match="checkpoint-9, which is not a folder"):
        make(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_what_a_run_does_not_save_is_not_asked_for(run, tmp_path):
    model, _, _ = run
    trainer = make(model, tmp_path, save_only_model=True)
    trainer.train()
    assert trainer.caft_files.newest_whole_checkpoint() == str(tmp_path / "checkpoint-4")
    assert make(model, tmp_path).caft_files.newest_whole_checkpoint() is None


def test_adapters_and_other_folders(run, tmp_path):
    model, _, _ = run
    trainer = make(lora(copy.deepcopy(model)), tmp_path)
    trainer.train()
    refuse_incomplete(tmp_path / "checkpoint-4", WHOLE)
    for name in ("checkpoint-20-old", "checkpoint-", "checkpoint-x", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-30").write_text("a file")
    assert newest_whole(tmp_path, WHOLE) == (tmp_path / "checkpoint-4", [])
    (tmp_path / "checkpoint-4" / "adapter_model.safetensors").unlink()
    assert trainer.caft_files.newest_whole_checkpoint() == str(tmp_path / "checkpoint-2")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_one_that_is_overwritten_is_not_whole_until_it_is_done(run, tmp_path, monkeypatch, at):
    """A run with other settings into the same folder: its half beside the other's is no
    checkpoint."""
    model, folder, _ = run
    shutil.copytree(folder, tmp_path / "out")
    trainer = make(model, tmp_path / "out", learning_rate=1e-3)

    def kill(*args):
        raise Killed

    monkeypatch.setattr(trainer, at, kill)
    with pytest.raises(Killed):
        trainer.train()
    newest, passed_over = newest_whole(tmp_path / "out", WHOLE)
    assert newest.name == "checkpoint-4" and passed_over == []
    with pytest.raises(IncompleteCheckpoint, match="has no readable trainer_state.json"):
        refuse_incomplete(tmp_path / "out" / "checkpoint-2", WHOLE)


def test_what_a_killed_save_left_is_cleaned_up(run, tmp_path):
    model, _, _ = run
    heads = tmp_path / "caft_heads"
    heads.mkdir()
    (heads / ".heads.safetensors.123.tmp").write_bytes(b"half")
    make(model, tmp_path).save_model()
    assert sorted(path.name for path in heads.iterdir()) == [
        "config.json",
        "fingerprint.safetensors",
        "heads.safetensors",
    ]


def test_without_caft_resuming_is_the_trainers_own(run, tmp_path):
    _, folder, _ = run
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()
    found = []
    for trainer_class in (Trainer, CAFTTrainer):
        trainer = trainer_of(
            copy.deepcopy(run[0]),
            tmp_path / "out",
            trainer_class=trainer_class,
            max_steps=4,
            save_strategy="no",
        )
        with pytest.raises(FileNotFoundError) as error:
            trainer.train(resume_from_checkpoint=True)
        found.append(str(error.value))
    assert found[0] == found[1]


# -- settings that must agree ----------------------------------------------------------------------


def stopped_at_two(model, folder, base, **caft):
    trainer = trainer_of(
        lora(model) if base == "lora" else model,
        folder,
        caft=caft,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()


CHANGES = {
    "other input": (
        "full",
        {},
        {"head_input": "final"},
        "caft.head_input: this run has final, .* made with penultimate",
    ),
    "other norm": (
        "full",
        {},
        {"head_norm": False},
        "caft.head_norm: this run has false, .* made with true",
    ),
    "more heads": (
        "full",
        {"num_heads": 2},
        {"num_heads": 4},
        "caft.num_heads: this run has 4, .* made with 2",
    ),
    "fewer heads": (
        "full",
        {"num_heads": 2},
        {"num_heads": 1},
        "caft.num_heads: this run has 1, .* made with 2",
    ),
    "full to frozen": (
        "full",
        {},
        {"train_heads": "frozen"},
        "caft.train_heads: this run has frozen, .* made with full",
    ),
    "frozen to full": (
        "full",
        {"train_heads": "frozen"},
        {"train_heads": "full"},
        "caft.train_heads: this run has full, .* made with frozen",
    ),
    "full to lora": (
        "full",
        {},
        {"train_heads": "lora"},
        "caft.train_heads: this run has lora, .* made with full",
    ),
    "lora to frozen": (
        "lora",
        {},
        {"train_heads": "frozen"},
        "caft.train_heads: this run has frozen, .* made with lora",
    ),
    "lora to full": (
        "lora",
        {},
        {"train_heads": "full"},
        "caft.train_heads: this run has full, .* made with lora",
    ),
    "beta to 0": ("full", {}, {"beta": 0}, "caft.beta: this run has 0 and so no heads"),
    "beta from 0": ("full", {"beta": 0}, {"beta": 0.5}, "has no caft_heads/ folder"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_other_settings_is_an_error_that_names_them(tiny_model, tmp_path, change):
    base, before, after, words = CHANGES[change]
    stopped_at_two(copy.deepcopy(tiny_model), tmp_path, base, **before)
    with pytest.raises(ConfigError, match=words):
        trainer_of(
            lora(copy.deepcopy(tiny_model)) if base == "lora" else copy.deepcopy(tiny_model),
            tmp_path,
            caft={**before, **after},
            max_steps=4,
        ).train(resume_from_checkpoint=True)


def test_settings_that_may_change_do(tiny_model, tmp_path):
    stopped_at_two(copy.deepcopy(tiny_model), tmp_path, "full")
    changed = {"beta": 0.5, "alpha": 0.5, "schedule": "constant", "heads_per_step": 2}
    trainer = trainer_of(tiny_model, tmp_path, caft=changed, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-7", "final"])
def test_what_a_user_saves_is_no_checkpoint_whatever_its_name(tiny_model, tmp_path, name):
    """LoRA is merged, so a later run can start from it; a checkpoint of the run itself keeps it
    apart."""
    trainer = trainer_of(
        lora(copy.deepcopy(tiny_model)), tmp_path, caft={}, save_strategy="steps", save_steps=3
    )
    trainer.train()
    trainer.save_model(str(tmp_path / name))
    assert not (tmp_path / name / "caft_heads" / "lora.safetensors").exists()
    assert (tmp_path / "checkpoint-3" / "caft_heads" / "lora.safetensors").exists()
    trainer_of(
        tiny_model, tmp_path / "later", caft={"heads": str(tmp_path / name)}, max_steps=1
    ).train()


def masked(model, folder):
    """A run of MEAP alone."""
    meap = {"mode": "pretrain", "mask_token": 95}
    return CAFTTrainer(
        model=model,
        args=arguments(folder),
        train_dataset=[],
        processing_class=word_tokenizer(""),
        meap=meap,
    )


@pytest.mark.parametrize(
    "plain", [lambda *given: make(*given, caft={"beta": 0}), masked], ids=["beta 0", "meap"]
)
def test_what_an_earlier_run_left_is_set_aside_by_a_run_without_it(
    tiny_model, tmp_path, caplog, plain
):
    make(tiny_model, tmp_path).save_model()
    heads = (tmp_path / "caft_heads" / "heads.safetensors").read_bytes()
    plain(tiny_model, tmp_path).save_model()
    assert not (tmp_path / "caft_heads").exists()
    assert (tmp_path / "caft_heads.earlier-run" / "heads.safetensors").read_bytes() == heads
    assert f"{tmp_path / 'caft_heads'} belongs to an earlier run" in caplog.text
    make(tiny_model, tmp_path).save_model()
    plain(tiny_model, tmp_path).save_model()
    assert (tmp_path / "caft_heads.earlier-run-2").is_dir() and (
        tmp_path / "caft_heads.earlier-run"
    ).is_dir()


def test_a_run_keeps_its_own_heads_and_a_plain_trainer_touches_nothing(
    tiny_model, tmp_path, caplog
):
    trainer = make(tiny_model, tmp_path)
    trainer.save_model()
    trainer.caft_parts.remove()
    trainer.save_model()  # as Axolotl does, after the heads were saved and taken off
    make(tiny_model, tmp_path, caft=None).save_model()
    assert (
        tmp_path / "caft_heads" / "heads.safetensors"
    ).is_file() and "earlier" not in caplog.text

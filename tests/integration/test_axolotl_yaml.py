"""Every command reads a YAML as `axolotl train` does, and works on the model that it loads."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

pytest.importorskip("axolotl")

from axolotl.loaders import ModelLoader, load_tokenizer
from axolotl.utils.schemas.config import AxolotlInputConfig

from caft_plugin.axolotl import config_reading, loading, trainer_settings
from caft_plugin.axolotl.config_reading import OLD_ATTENTION, read_config, read_for_plan
from caft_plugin.axolotl.finished_run import left_in
from caft_plugin.axolotl.run import PEFT_NAMES, UNCOUNTED, read_run
from caft_plugin.axolotl.trainer_settings import refuse_keys
from caft_plugin.errors import ConfigError
from caft_plugin.model.loading import load_model
from caft_plugin.plan.estimate import make_plan
from caft_plugin.tools.cli import commands

pytestmark = pytest.mark.slow

KEYS = Path(__file__).parent / "axolotl_keys.txt"
TOKENS = {"tokens": ["<tool>", "</tool>"], "lora_modules_to_save": ["embed_tokens", "lm_head"]}
PAD = {"special_tokens": {"pad_token": "[PAD]"}}
OVERRIDES = {"overrides_of_model_config": {"rms_norm_eps": 0.5}}
OURS = {"plugins": ["caft_plugin"], "caft": {"num_heads": 2, "beta": 0.3}}


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    return project


def write(project, name, **changes):
    project.config(name, **{**OURS, "gradient_checkpointing": None, **changes})
    return project.folder / f"{name}.yml"


def run(*arguments):
    result = CliRunner().invoke(commands, [str(argument) for argument in arguments])
    assert not isinstance(result.exception, Exception), result.exception
    return result


def test_a_new_key_of_axolotls_has_been_looked_at():
    """A key that is new in Axolotl: does it bear on memory or time (`UNCOUNTED`, or `read_run`)? On
    how stage 1 trains (Axolotl's builder follows it; `REFUSED`, `OF_THE_TUNED_MODEL`)? On the base
    (Axolotl's loader follows it; `OF_TRAINING`)? Then put it into the list, which is sorted."""
    known = KEYS.read_text().split()
    there = set(AxolotlInputConfig.model_fields)
    assert sorted(there - set(known)) == [] and known == sorted(known)
    written = {
        *UNCOUNTED,
        *PEFT_NAMES,
        *OLD_ATTENTION,
        *loading.OF_TRAINING,
        *trainer_settings.REFUSED,
        *trainer_settings.OF_THE_TUNED_MODEL,
        *trainer_settings.CHOICES,
        *trainer_settings.TUNING,
        *config_reading.NOT_NEEDED,
    }
    assert sorted(written - there) == []


@pytest.mark.parametrize(
    "changes", [{**TOKENS}, {**PAD}, {**OVERRIDES}, {**TOKENS, **PAD, **OVERRIDES}], ids=str
)
def test_the_frozen_base_is_the_one_that_axolotl_trains(here, changes):
    cfg = read_config(write(here, "frozen", **changes), "x")
    tokenizer = load_tokenizer(cfg)
    ids = torch.tensor([tokenizer("Count to three. 1 2 3").input_ids])
    torch.manual_seed(0)
    ours = loading.load_frozen(cfg, tokenizer)
    torch.manual_seed(0)
    theirs, _ = ModelLoader(cfg, tokenizer).load()
    with torch.no_grad(), theirs.disable_adapter():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.get_input_embeddings().num_embeddings >= len(tokenizer)


@pytest.mark.parametrize("model", ["./nowhere", "./no-base", "./heads"])
def test_a_bad_model_in_place_of_the_yamls(here, model):
    """As without a YAML (tests/test_model_loading.py), although Axolotl loads the model."""
    for name, content in {
        "no-base/adapter_config.json": {"peft_type": "LORA"},
        "heads/config.json": {"head_input": "final", "head_norm": True, "layer_class": "L"},
    }.items():
        file = here.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    file = write(here, "bad", pretrain_heads={"targets": "dataset"})
    result = run("pretrain-heads", file, "--model", model)
    wanted = "whose config could not|names no base_model_name_or_path|which is a heads folder"
    assert result.exit_code == 1 and re.search(rf"Error: --model: .*({wanted})", result.output)


def test_heads_of_stage_1_and_of_a_run_serve_the_same_yaml(here, caplog):
    changes = {**TOKENS, **PAD, **OVERRIDES}
    file = write(
        here, "first", **changes, max_steps=1, save_steps=1, pretrain_heads={"targets": "dataset"}
    )
    made = run("pretrain-heads", file)
    assert made.exit_code == 0, made.output
    metrics = json.loads((here.folder / "first/caft_heads/metrics.json").read_text())
    file = write(
        here, "plain-base", max_steps=1, save_steps=1, pretrain_heads={"targets": "dataset"}
    )
    assert run("pretrain-heads", file).exit_code == 0
    other = json.loads((here.folder / "plain-base/caft_heads/metrics.json").read_text())
    # eps followed
    assert metrics["untrained"][0]["loss"] != pytest.approx(other["untrained"][0]["loss"], abs=1e-4)

    out = here.train("second", **OURS | {"caft": {"num_heads": 2, "heads": "./first"}}, **changes)
    here.train("third", **OURS | {"caft": {"num_heads": 2, "heads": "./second"}}, **changes)
    told = [(here.folder / f"{name}.log").read_text() for name in ("second", "third")]
    assert (
        "caft.heads: the heads in" not in told[0]
        and "the one from before that fine-tuning" in told[1]
    )

    (here.folder / "prompts.jsonl").write_text(json.dumps({"text": "Count to three."}) + "\n")
    options = ["--prompts", "prompts.jsonl", "--runs", 1, "--max-new-tokens", 4, "--float32"]
    for asked in (["second.yml"], ["--model", out, "--heads", out]):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            result = run("speculate", *asked, *options)
        assert result.exit_code == 0, result.output
        assert "heads: the heads in" not in caplog.text
    # the model of the YAML is the one of the folder
    tokenizer = load_tokenizer(read_config(here.folder / "second.yml", "x"))
    ids = torch.tensor([tokenizer("Count to three.").input_ids])
    ours = loading.load_frozen(
        read_config(here.folder / "second.yml", "x"), tokenizer, str(out), torch.float32
    )
    with torch.no_grad():
        alike = load_model(str(out), torch.float32).eval()(ids).logits
        torch.testing.assert_close(ours.eval()(ids).logits, alike)


def settings_of(project, **changes):
    cfg = read_config(write(project, "settings", **changes), "pretrain-heads")
    refuse_keys(cfg)
    return trainer_settings.trainer_settings(cfg, load_tokenizer(cfg), None)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"adam_beta1": 0.1, "adam_epsilon": 0.01}, {"adam_beta1": 0.1, "adam_epsilon": 0.01}),
        ({"lr_scheduler": "rex"}, {"alternate_lr_scheduler_type": "rex"}),
        ({"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.3}, {"cosine_min_lr_ratio": 0.3}),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}, {}),
        ({"optimizer": "sgd", "optim_args": {"momentum": 0.9}}, {"optim_args": "momentum=0.9"}),
        ({"optimizer": "schedule_free_adamw"}, {}),
        ({"learning_rate": 1e-9, "adam_beta2": 0.5}, {"learning_rate": 1e-9}),
        (
            {"warmup_steps": 3, "weight_decay": 0.2, "max_grad_norm": 0.5, "seed": 5},
            {"weight_decay": 0.2, "seed": 5},
        ),
        ({"hub_model_id": "me/tuned"}, {"push_to_hub": False, "hub_model_id": None}),
    ],
    ids=str,
)
def test_stage_1_follows(here, changes, wanted):
    arguments = settings_of(here, **changes).args
    assert {key: getattr(arguments, key) for key in wanted} == wanted


def test_optim_args_reach_an_optimizer_to_which_transformers_does_not_pass_them(here):
    optimizer, kwargs = settings_of(here, optim_args={"eps": 0.1}).optimizer_cls_and_kwargs
    assert optimizer is torch.optim.AdamW and kwargs["eps"] == 0.1 and kwargs["lr"] == 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon"}, "trained with optimizer: 'muon'.*does not include .*norm.weight"),
        ({"optimizer": "ao_adamw_8bit"}, "trained with optimizer: 'ao_adamw_8bit'"),
        ({"optimizer": "polora"}, "trained with optimizer: 'polora'"),
        ({"lr_scheduler": "one_cycle", "max_steps": 3}, "lr_scheduler: 'one_cycle'"),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"foo": 1}},
            "lr_scheduler_kwargs: {'foo': 1}",
        ),
        ({"optim_args": {"epz": 1}}, "optim_args: {'epz': 1}"),
        (
            {"optimizer": "sgd", "adam_beta1": 0.1},
            "adam_beta1: 0.1 has no effect with optimizer: sgd",
        ),
        (
            {"cosine_min_lr_ratio": 0.5},
            "cosine_min_lr_ratio: 0.5 has no effect with .*lr_scheduler: constant",
        ),
        ({"curriculum_sampling": True}, "does not support curriculum_sampling: True"),
        ({"loraplus_lr_ratio": 16}, "does not support loraplus_lr_ratio: 16"),
    ],
    ids=str,
)
def test_stage_1_refuses_by_name_in_one_line_before_weights_are_loaded(
    here, changes, message, monkeypatch
):
    monkeypatch.setattr(loading.FrozenLoader, "load", None)  # whoever calls it fails otherwise
    result = run(
        "pretrain-heads", write(here, "refused", **changes, pretrain_heads={"targets": "dataset"})
    )
    last = result.stderr.rstrip("\n").split("\n")[-1]
    assert (
        result.exit_code == 1
        and last.startswith("Error: pretrain_heads: ")
        and re.search(message, last)
    ), last


@pytest.mark.parametrize("old", OLD_ATTENTION)
def test_plan_reads_old_names_of_attention_as_new_ones(here, old):
    new = {"attn_implementation": OLD_ATTENTION[old]}
    one, other = (
        read_run(
            read_for_plan(
                write(here, "plan", bf16=True, **{"attn_implementation": None, **keys}), "plan"
            )
        )
        for keys in ({old: True}, new)
    )
    assert one == other and one.eager == (old == "eager_attention")


def test_plan_reads_texts_as_axolotl_and_without_it_alike(here, monkeypatch):
    texts = {"micro_batch_size": "3", "sequence_len": "128", "gradient_checkpointing": "false"}
    numbers = {"micro_batch_size": 3, "sequence_len": 128, "gradient_checkpointing": False}
    file = write(here, "texts", **texts)
    read = [read_run(read_for_plan(file, "plan"))]
    monkeypatch.setattr(config_reading, "has_axolotl", lambda: False)
    read.append(read_run(read_for_plan(file, "plan")))
    read.append(read_run(read_for_plan(write(here, "numbers", **numbers), "plan")))
    # micro_batch_size is 2
    file = write(here, "batch", gradient_accumulation_steps=None, batch_size=8)
    assert read_run(read_for_plan(file, "plan")).accumulation == 4
    for one in read:
        assert (one.rows, one.length, one.checkpointing) == (3, 128, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides_of_model_config": {"num_hidden_layers": 1}},
        {"peft_layer_replication": [[0, 3], [1, 3]]},
        {"lora_rank_pattern": {"q_proj": 32}},
        {"activation_offloading": True, "gradient_checkpointing": True},
        {"torch_compile": True},
        TOKENS,
    ],
    ids=str,
)
def test_what_bears_on_memory_or_time_changes_the_plan_or_is_named(here, changes):
    plain, changed = (
        make_plan(read_run(read_for_plan(write(here, name, **keys), "plan")))
        for name, keys in (("plain", {"gradient_accumulation_steps": 1}), ("changed", changes))
    )
    figures = [
        (plan.base, plan.added, plan.plain_peak, plan.peak, plan.ratio) for plan in (plain, changed)
    ]
    named = [note for note in changed.notes if note.split(":")[0] in changes]
    assert figures[0] != figures[1] or named


def test_what_axolotl_refuses_is_told_in_one_line(here):
    result = run("plan", write(here, "wrong", adapter="mora"))
    assert result.exit_code == 1 and "Error: plan: Axolotl rejects this YAML: " in result.output
    result = run("pretrain-heads", write(here, "wrong", micro_batch_size="many"))
    assert result.exit_code == 1 and "micro_batch_size: got 'many'" in result.stderr
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(here.folder / "nowhere.yml", "x")


def test_a_merged_model_that_is_older_than_the_adapter_is_told(tmp_path, caplog):
    import os

    from safetensors.torch import save_file

    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "merged" / "model.safetensors")
    assert left_in(tmp_path) == tmp_path / "merged"
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    os.utime(tmp_path / "merged" / "model.safetensors", (1, 1))
    with caplog.at_level(logging.WARNING):
        assert left_in(tmp_path) == tmp_path
    assert f"{tmp_path / 'merged'} is older than the adapter" in caplog.text
    os.utime(tmp_path / "adapter_model.safetensors", (0, 0))
    assert left_in(tmp_path) == tmp_path / "merged"


def test_a_later_run_without_heads_leaves_none_of_an_earlier_one(here):
    out = here.train("reused", **OURS)
    heads = load_file(out / "caft_heads" / "heads.safetensors")
    (here.folder / "reused.yml").write_text(
        yaml.safe_dump(
            {**yaml.safe_load((here.folder / "reused.yml").read_text()), "caft": {"beta": 0}}
        )
    )
    result = here.axolotl("train", "reused.yml")
    assert (
        not (out / "caft_heads").exists()
        and "caft_heads belongs to an earlier run" in result.stdout + result.stderr
    )
    kept = load_file(out / "caft_heads.earlier-run" / "heads.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in heads.items())

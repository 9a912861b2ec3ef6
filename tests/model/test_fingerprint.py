"""Heads tell which model they were trained over: adapters, merged models, bases, under rounding and
quantisation."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from builders.tiny import LLAMA, word_tokenizer
from caft_plugin import CAFTConfig, ConfigError, Drafter, with_caft
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import read_fingerprint, resolve_wiring, save_heads
from caft_plugin.caft.heads_record import FINGERPRINT, FOLDER
from caft_plugin.model.fingerprint import Fingerprint, Sample, take_sample
from caft_plugin.model.trunk import find_trunk
from caft_plugin.tools.cli import commands

BF16 = torch.bfloat16
WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}


def base_model(seed=0, dtype=BF16):
    """A base as they are published: its weights are numbers of `dtype`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**WIDE)).to(dtype)


def lora(model, **changes):
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **changes}))


def update(model, size, seed=1):
    """What training does to an adapter's factors that begin with 0, or to weights: changes of this
    size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def trained(model, size, change=None):
    """The fingerprint of a run on `model`."""
    trunk = find_trunk(model)
    before = take_sample(trunk)
    (change or update)(model, size)
    return Fingerprint(before, take_sample(find_trunk(model), before))


def verdict(fingerprint, model):
    return fingerprint.verdict(take_sample(find_trunk(model)))


# Sizes of lora_B: with lora_A about 0.1 these change a weight of 0.02 by roughly a hundredth of it,
# to several times.
@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.2])
@pytest.mark.parametrize("trains_in", [torch.float32, BF16])
def test_lora(tmp_path, size, trains_in):
    model = lora(base_model().to(trains_in))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fingerprint = trained(model, size)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, BF16):
        own = PeftModel.from_pretrained(base_model().to(dtype), tmp_path)
        assert verdict(fingerprint, own) == "own", dtype
        merged = own.merge_and_unload()
        assert verdict(fingerprint, merged) == "own", dtype
        assert verdict(fingerprint, merged.to(BF16).float()) == "own"
        assert verdict(fingerprint, base_model().to(dtype)) == "base"
        assert verdict(fingerprint, base_model(seed=5).to(dtype)) == "other"
        older = lora(base_model().to(dtype))
        update(older, size, seed=9)
        assert verdict(fingerprint, older) == "other"
        assert verdict(fingerprint, older.merge_and_unload()) == "other"


def test_an_earlier_state_of_the_same_run():
    model = lora(base_model())
    halfway = None

    def train(model, size):
        nonlocal halfway
        update(model, size / 2)
        halfway = copy.deepcopy(model).merge_and_unload()
        update(model, size / 2)

    fingerprint = trained(model, 0.05, train)
    assert verdict(fingerprint, halfway) == "other" and verdict(fingerprint, model) == "own"


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"use_rslora": True}, {"lora_alpha": 64}, {"bias": "all"}]
)
def test_other_kinds_of_lora(kind):
    model = lora(base_model(dtype=torch.float32), **kind)
    fingerprint = trained(model, 0.05)
    assert verdict(fingerprint, model) == "own"
    assert verdict(fingerprint, model.merge_and_unload()) == "own"
    assert verdict(fingerprint, base_model(dtype=torch.float32)) == "base"


def test_modules_to_save_and_weights_that_lie_the_other_way_round():
    def fresh():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )

    targets = ["c_attn", "c_proj", "c_fc"]
    model = lora(fresh(), target_modules=targets, modules_to_save=["ln_f"], fan_in_fan_out=True)
    fingerprint = trained(model, 0.05)
    assert verdict(fingerprint, model) == "own"
    assert verdict(fingerprint, model.merge_and_unload()) == "own"
    assert verdict(fingerprint, fresh()) == "base"


@pytest.mark.parametrize("saved", [torch.float32, BF16])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_full_fine_tuning(size, saved):
    model = base_model().float()
    fingerprint = trained(model, size)
    assert verdict(fingerprint, copy.deepcopy(model).to(saved)) == "own"
    if saved == torch.float32 or size == 1e-2:  # else rounding undoes the whole update
        assert verdict(fingerprint, base_model().to(saved)) == "base"
    assert verdict(fingerprint, base_model(seed=5).to(saved)) == "other"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    return folder


def in_4_bits(folder):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize(("size", "tells"), [(1e-4, False), (5e-3, True), (0.2, True)])
def test_qlora(base_folder, tmp_path, size, tells):
    model = lora(in_4_bits(base_folder))
    fingerprint = trained(model, size)
    assert fingerprint.before.quantised and fingerprint.after.quantised
    model.save_pretrained(tmp_path)
    assert verdict(fingerprint, model) == "own"
    assert (
        verdict(fingerprint, PeftModel.from_pretrained(in_4_bits(base_folder), tmp_path)) == "own"
    )
    for dtype in (torch.float32, BF16):
        unquantised = PeftModel.from_pretrained(base_model().to(dtype), tmp_path)
        assert verdict(fingerprint, unquantised) == "own"
        assert verdict(fingerprint, unquantised.merge_and_unload()) == "own"
        # an update that is lost in the quantisation's error: nothing is claimed
        assert verdict(fingerprint, base_model().to(dtype)) == ("base" if tells else "own")
        assert verdict(fingerprint, base_model(seed=5).to(dtype)) == "other"
    assert verdict(fingerprint, in_4_bits(base_folder)) == "base"


def test_over_a_frozen_model():
    """Stage 1: on a base in another dtype, and on a tuned model."""
    base = base_model(dtype=torch.float32)
    fingerprint = trained(base, 0, lambda *_: None)
    assert verdict(fingerprint, base.to(BF16)) == "own"
    fingerprint = trained(base_model(), 0, lambda *_: None)
    assert verdict(fingerprint, base_model().float()) == "own"
    tuned = lora(base_model())
    update(tuned, 1e-2)
    assert verdict(fingerprint, tuned) == "other"
    fingerprint = trained(tuned, 0, lambda *_: None)
    assert verdict(fingerprint, tuned) == "own"
    assert verdict(fingerprint, tuned.merge_and_unload()) == "own"
    assert verdict(fingerprint, base_model()) == "other"


def test_frozen_heads_of_a_base_in_4_bits(base_folder):
    fingerprint = trained(in_4_bits(base_folder), 0, lambda *_: None)
    assert (
        verdict(fingerprint, base_model()) == "own"
        and verdict(fingerprint, base_model(seed=5)) == "other"
    )


def test_what_is_not_at_hand_has_no_fingerprint(tiny_config):
    with torch.device("meta"):
        assert take_sample(find_trunk(LlamaForCausalLM(tiny_config))) is None


# -- on disk, and what is told ---------------------------------------------------------------------


def rows():
    return [
        {"input_ids": [5 + i, 6, 7, 8, 9, 10], "labels": [5 + i, 6, 7, 8, 9, 10]} for i in range(4)
    ]


def train(model, folder, heads=None, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        **{"learning_rate": 1e-2, **settings},
    )
    caft = {"num_heads": 2, "heads": None if heads is None else str(heads)}
    trainer = with_caft(Trainer)(
        model=model,
        args=arguments,
        train_dataset=rows(),
        data_collator=lambda batch: {
            key: torch.tensor([row[key] for row in batch]) for key in batch[0]
        },
        caft=caft,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def told(caplog, act):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        act()
    return [
        r.getMessage()
        for r in caplog.records
        if r.getMessage().startswith(("caft.heads:", "heads:"))
    ]


def test_a_run_and_what_is_told_of_its_heads(tmp_path, caplog):
    run = tmp_path / "run"
    base = base_model(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = lora(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    train(model, run)
    for folder in (run, run / "checkpoint-1"):
        assert (folder / FOLDER / FINGERPRINT).is_file()
        assert read_fingerprint(folder / FOLDER).before.values.keys() >= {
            "layer.mlp.up_proj.weight",
            "norm.weight",
        }
    start = LlamaForCausalLM.from_pretrained
    PeftModel.from_pretrained(start(tmp_path / "base"), run).merge_and_unload().to(
        BF16
    ).save_pretrained(run / "merged")

    def draft(model):
        return told(caplog, lambda: Drafter.from_pretrained(model, run))

    assert draft(PeftModel.from_pretrained(start(tmp_path / "base"), run)) == []
    assert (
        draft(start(run / "merged", dtype=BF16)) == []
        and draft(start(run / "merged", dtype=torch.float32)) == []
    )
    (message,) = draft(start(tmp_path / "base"))
    assert (
        str(run) in message
        and str(tmp_path / "base") in message
        and "before that fine-tuning" in message
    )
    train(lora(start(tmp_path / "base")), tmp_path / "again", learning_rate=3e-2)
    (message,) = draft(PeftModel.from_pretrained(start(tmp_path / "base"), tmp_path / "again"))
    assert "were trained with a different last layer or final norm" in message

    # the heads of a run start the next one: from its base told, from its own adapter or merged
    # model not
    (message,) = told(
        caplog, lambda: train(lora(start(tmp_path / "base")), tmp_path / "two", heads=run)
    )
    assert "before that fine-tuning" in message
    goes_on = PeftModel.from_pretrained(start(tmp_path / "base"), run, is_trainable=True)
    assert told(caplog, lambda: train(goes_on, tmp_path / "three", heads=run)) == []
    merged = start(run / "merged", dtype=torch.float32)
    assert told(caplog, lambda: train(merged, tmp_path / "four", heads=run)) == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_happy_path_is_told_nothing(tmp_path, caplog, monkeypatch, kind):
    """Heads of a run, and those trained further on its model, meet its adapter, its merged model or
    its model, in the commands and in Python, in every dtype in which these are loaded."""
    monkeypatch.chdir(tmp_path)
    base, tokenizer = base_model(dtype=torch.float32), word_tokenizer("")
    base.generation_config.eos_token_id = 1
    base.save_pretrained("base"), tokenizer.save_pretrained("base")
    start = LlamaForCausalLM.from_pretrained
    model = start("base")
    train(lora(model) if kind == "lora" else model, "out", learning_rate=3e-3)
    tokenizer.save_pretrained("out")
    models = ["out"]
    if kind == "lora":
        PeftModel.from_pretrained(start("base"), "out").merge_and_unload().to(BF16).save_pretrained(
            "out/merged"
        )
        tokenizer.save_pretrained("out/merged")
        models += ["out/merged", str(tmp_path / "out" / "merged")]
    lines = [
        {"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3} w{i + 4} w{i + 5}"}
        for i in range(8)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def warnings_of(*command):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            result = CliRunner().invoke(commands, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return [r.getMessage() for r in caplog.records if "heads" in r.getMessage()]

    further = ("--data", "rows.jsonl", "--targets", "dataset", "--steps", "2")
    writing = ("--prompts", "rows.jsonl", "--limit", "1", "--runs", "1", "--max-new-tokens", "3")
    made = ["out"]
    for number, (named, dtype) in enumerate(itertools.product(models, [(), ("--float32",)])):
        better = f"better-{number}"
        start_from = ("--model", named, "--heads", "out")
        assert (
            warnings_of("pretrain-heads", *start_from, "--output", better, *further, *dtype) == []
        )
        made.append(better)
    for named, heads in itertools.product(models, made):
        assert warnings_of("speculate", "--model", named, "--heads", heads, *writing) == [], (
            named,
            heads,
        )
        drafter = f"drafter of {heads} for {named}".replace("/", "-")
        assert (
            warnings_of("export-drafter", "--model", named, "--heads", heads, "--output", drafter)
            == []
        )


def test_folders_without_a_fingerprint_go_by_names(tmp_path, caplog, tiny_model):
    train(tiny_model, tmp_path / "run")
    (tmp_path / "run" / FOLDER / FINGERPRINT).unlink()
    tiny_model.config.name_or_path = "another"
    assert "were made with base model llama, this run uses another" in str(
        told(caplog, lambda: Drafter.from_pretrained(tiny_model, tmp_path / "run"))
    )


def test_heads_without_a_fingerprint_leave_no_old_one(tmp_path, tiny_model):
    trunk, config = find_trunk(tiny_model), resolve_wiring(CAFTConfig(num_heads=1), None)
    heads = build_heads(tiny_model, trunk, config, seed=0)
    save_heads(tmp_path, heads, trunk, config, resumable=False)
    assert (tmp_path / FOLDER / FINGERPRINT).is_file()
    heads.origin = None
    save_heads(tmp_path, heads, trunk, config, resumable=False)
    assert not (tmp_path / FOLDER / FINGERPRINT).exists()


@pytest.mark.parametrize(
    "how", ["truncated", "pickle", "long", "dtype", "shape", "names", "not finite", "metadata"]
)
def test_damaged_files_are_told_and_passed_over(tmp_path, caplog, tiny_model, how):
    train(tiny_model, tmp_path)
    file = tmp_path / FOLDER / FINGERPRINT
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    first = next(iter(tensors))
    match how:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "pickle":
            torch.save(tensors, file)
        case "long":
            save_file({**tensors, "before.x": torch.zeros(2_000_000)}, file)
        case "dtype":
            save_file({**tensors, first: tensors[first].int()}, file)
        case "shape":
            save_file({**tensors, first: tensors[first][None]}, file)
        case "names":
            save_file({**tensors, "middle.x": torch.zeros(1)}, file)
        case "not finite":
            save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, file)
        case "metadata":
            save_file(tensors, file, {"quantised": "{"})
    (message,) = told(caplog, lambda: read_fingerprint(tmp_path / FOLDER))
    assert str(file) in message
    Drafter.from_pretrained(tiny_model, tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path, tiny_model):
    train(tiny_model, tmp_path / "run")
    file = tmp_path / "run" / FOLDER / FINGERPRINT
    file.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", file)
    with pytest.raises(ConfigError, match="a link out of the folder"):
        Drafter.from_pretrained(tiny_model, tmp_path / "run")


def test_another_structure_is_another_model(tiny_model):
    now = take_sample(find_trunk(tiny_model))
    fewer = Sample({name: values for name, values in now.values.items() if "mlp" not in name})
    assert (
        Fingerprint(fewer, fewer).verdict(now) == "other"
        and Fingerprint(now, now).verdict(now) == "own"
    )

"""A model is loaded as it was trained: adapters with a larger vocabulary, a run's config next to
them, revisions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from builders.tiny import LLAMA, word_tokenizer
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import resolve_wiring, save_heads
from caft_plugin.config import CAFTConfig
from caft_plugin.model import loading as model_loading
from caft_plugin.model.loading import Source, load_model, load_tokenizer, merged
from caft_plugin.model.trunk import find_trunk
from caft_plugin.tools.attention_report import attention_report, read_texts
from caft_plugin.tools.cli import commands

IDS = torch.arange(2, 40)[None]


@pytest.fixture
def base(tmp_path):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "base")
    word_tokenizer("").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(base, out, tokens=None, overrides=None, leaves_config=True, **lora):
    """What a LoRA run leaves: its adapter, and Axolotl's config.json next to it. Returns the logits
    of its model."""
    config = LlamaConfig.from_pretrained(base)
    for key, value in (overrides or {}).items():
        setattr(config, key, value)
    model = LlamaForCausalLM.from_pretrained(base, config=config)
    if tokens is not None:
        model.resize_token_embeddings(tokens)
    if leaves_config:
        model.config.save_pretrained(out)
    model = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **lora})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        logits = model(IDS).logits
    model.save_pretrained(out)
    return logits


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}
ON_THEM = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
RUNS = {
    "as the base": {},
    "more tokens, saved": {"tokens": 103, **SAVED},
    "more tokens, PEFT saves them by itself": {"tokens": 103},
    "more tokens, no config": {"tokens": 103, "leaves_config": False, **SAVED},
    "LoRA on them, no config": {"tokens": 103, "leaves_config": False, **ON_THEM},
    "fewer tokens": {"tokens": 90, **SAVED},
    "overrides": {"overrides": {"rms_norm_eps": 0.5}},
    "overrides and tokens": {
        "overrides": {"rms_norm_eps": 0.5, "rope_theta": 500.0},
        "tokens": 128,
        **SAVED,
    },
}


@pytest.mark.parametrize("how", RUNS)
def test_an_adapter_brings_the_model_that_was_trained(base, tmp_path, how):
    wanted = run(base, tmp_path / "out", **RUNS[how])
    for for_heads in (False, True):
        model = load_model(str(tmp_path / "out"), torch.float32, for_heads=for_heads)
        torch.testing.assert_close(logits_of(model), wanted)
    torch.testing.assert_close(logits_of(merged(model)), wanted, rtol=1e-4, atol=1e-4)


def test_tokens_that_the_adapter_does_not_hold(base, tmp_path):
    """A new pad token, without its row in the adapter: the row was never trained, and all others
    are as they were."""
    wanted = run(base, tmp_path / "out", tokens=98)
    file = tmp_path / "out" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: t for name, t in load_file(file).items() if "lora_" in name}, file)
    found = logits_of(load_model(str(tmp_path / "out"), torch.float32))
    assert found.shape == wanted.shape
    torch.testing.assert_close(found[..., :97], wanted[..., :97])


def test_a_merged_model_keeps_what_the_run_changed(base, tmp_path, caplog):
    """`axolotl merge-lora` writes the base's config next to the merged weights."""
    out = tmp_path / "out"
    wanted = run(base, out, overrides={"rms_norm_eps": 0.5})
    merged(load_model(str(out), torch.float32)).save_pretrained(out / "merged")
    (out / "merged" / "config.json").write_text((base / "config.json").read_text())
    with caplog.at_level(logging.WARNING):
        found = logits_of(load_model(str(out / "merged"), torch.float32))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert "was trained with (overrides_of_model_config): rms_norm_eps: 0.5" in caplog.text
    caplog.clear()
    (out / "config.json").write_text((base / "config.json").read_text())
    assert Source.of(str(out / "merged")).config.rms_norm_eps == 1e-6 and not caplog.records


def test_a_config_of_another_kind_beside_an_adapter_is_told_and_passed_over(base, tmp_path, caplog):
    wanted = run(base, tmp_path / "out")
    GPT2Config().save_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(load_model(str(tmp_path / "out"), torch.float32)), wanted)
    assert "its model type is gpt2, but that of the adapter's base is llama" in caplog.text


def test_the_revision_that_an_adapter_names(base, tmp_path, monkeypatch):
    run(base, tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": "v2"}))
    asked = []

    class Config(model_loading.AutoConfig):
        @classmethod
        def from_pretrained(cls, name, **kwargs):
            asked.append((Path(name).name, kwargs.get("revision")))
            return super().from_pretrained(name, **kwargs)

    monkeypatch.setattr(model_loading, "AutoConfig", Config)
    assert Source.of(str(tmp_path / "out")).revision == "v2" and ("base", "v2") in asked


def test_an_adapter_without_a_tokenizer_has_its_bases(base, tmp_path):
    run(base, tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == word_tokenizer("").get_vocab()


def test_attention_report_of_an_adapter_is_that_of_the_merged_model(base, tmp_path):
    run(base, tmp_path / "out", tokens=103, overrides={"rms_norm_eps": 0.5}, **SAVED)
    merged(load_model(str(tmp_path / "out"), torch.float32)).save_pretrained(tmp_path / "whole")
    word_tokenizer("").save_pretrained(tmp_path / "whole")
    (tmp_path / "texts.jsonl").write_text(
        json.dumps({"context": "w1 w2 w3 w4 w5 w6", "answer": "w3 w4", "query": "w7 w8"})
        + "\n"
        + json.dumps({"text": "w1 w2 w3 w4 w5"})
        + "\n"
    )
    texts = read_texts(tmp_path / "texts.jsonl")

    def figures(tuned):
        settings = {
            "mask_ratio": 0.2,
            "mask_token": "95",
            "max_length": 64,
            "seed": 0,
            "dtype": torch.float32,
        }
        return attention_report(str(base), str(tmp_path / tuned), texts, **settings)

    adapter, whole, itself = map(figures, ("out", "whole", "base"))
    assert adapter.masked == pytest.approx(whole.masked) and adapter.variance == pytest.approx(
        whole.variance
    )
    assert adapter.masked["tuned", "unmasked"] != pytest.approx(itself.masked["tuned", "unmasked"])


def empty(folder):
    folder.mkdir()
    return folder


def with_file(folder, name, content):
    folder.mkdir()
    (folder / name).write_text(json.dumps(content) if isinstance(content, dict) else content)
    return folder


def without_tokenizer(folder):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    return folder


def without_weights(folder):
    LlamaConfig(**LLAMA).save_pretrained(folder)
    word_tokenizer("").save_pretrained(folder)
    return folder


CODE = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
RECORD = {"head_input": "final", "head_norm": True, "layer_class": "LlamaDecoderLayer"}
NO_BASE = {"peft_type": "LORA"}
GONE = {"peft_type": "LORA", "base_model_name_or_path": "./gone"}
# kind: (how the model is made, what is said of it)
BAD = {
    "no folder": (lambda folder: "./nowhere", "got './nowhere', whose config could not be read ("),
    "no Hub id": (lambda folder: "nobody/none", "got 'nobody/none', whose config could not be"),
    "an empty folder": (empty, "whose config could not be read (ValueError: "),
    "a damaged config": (
        lambda folder: with_file(folder, "config.json", "{"),
        "whose config could not be read (OSError: ",
    ),
    "a heads folder": (
        lambda folder: with_file(folder, "config.json", RECORD),
        "which is a heads folder",
    ),
    "an adapter of unknown base": (
        lambda folder: with_file(folder, "adapter_config.json", NO_BASE),
        "is an adapter, but its adapter_config.json names no base_model_name_or_path",
    ),
    "an adapter of nothing": (
        lambda folder: with_file(folder, "adapter_config.json", GONE),
        "got './gone', whose config could not be read (",
    ),
    "code of its own": (
        lambda folder: with_file(folder, "config.json", CODE),
        "whose config could not be read: it needs code of its own, which is executed only if",
    ),
    "no tokenizer": (without_tokenizer, "whose tokenizer could not be read ("),
    "no weights": (without_weights, "whose weights could not be read (OSError: "),
}
READS = {"no tokenizer": ("pretrain-heads", "speculate", "attention-report --tuned")}
READS["no weights"] = (*READS["no tokenizer"], "attention-report --base", "export-drafter")
ALL = (*READS["no weights"], "import-heads", "plan")


@pytest.mark.parametrize("kind", BAD)
def test_all_commands_say_the_same_of_a_bad_model(base, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = BAD[kind]
    bad = str(make(tmp_path / "bad"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2", "completion": "w3"}\n')
    (tmp_path / "texts.txt").write_text("w1 w2 w3 w4 w5\n")
    torch.save({"0.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, tmp_path / "heads.pth")
    (tmp_path / "plan.yml").write_text(json.dumps({"base_model": bad, "caft": {}}))
    arguments = {
        "pretrain-heads": ("--model", f"--model {bad} --data rows.jsonl --output out"),
        "speculate": ("--model", f"--model {bad} --heads heads --prompts rows.jsonl"),
        "attention-report --base": ("--base", f"{bad} --tuned {base} --text texts.txt"),
        "attention-report --tuned": ("--tuned", f"{bad} --base {base} --text texts.txt"),
        "export-drafter": ("--model", f"--model {bad} --heads {heads_of(base)} --output out"),
        "import-heads": ("--base-model", f"heads.pth out --base-model {bad}"),
        "plan": ("base_model", "plan.yml"),
    }
    told = set()
    for command in READS.get(kind, ALL):
        key, options = arguments[command]
        result = CliRunner().invoke(commands, [*command.split(), *options.split()])
        assert result.exit_code == 1, (command, result.output, result.exception)
        said = result.output.partition("Error: ")[2]
        assert said.startswith(f"{key}: "), (command, result.output)
        told.add(said.removeprefix(key))
    if kind == "no weights":
        told.remove(next(said for said in told if "whose files cannot be read" in said))
    assert len(told) == 1 and message in told.pop(), told


def heads_of(model):
    """A heads folder of the model, in its folder."""
    loaded = load_model(str(model), torch.float32)
    trunk = find_trunk(loaded)
    config = resolve_wiring(CAFTConfig(num_heads=1), None)
    save_heads(model, build_heads(loaded, trunk, config, seed=0), trunk, config, resumable=False)
    return model


def test_plan_runs_a_models_own_code_where_the_yaml_trusts_it(base, tmp_path):
    """As Axolotl does with this YAML."""
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C"}}
    config["auto_map"]["AutoModelForCausalLM"] = "code.M"
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'theirs'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    keys = {"base_model": str(base), "caft": {}, "trust_remote_code": True}
    (tmp_path / "plan.yml").write_text(json.dumps(keys))
    result = CliRunner().invoke(commands, ["plan", str(tmp_path / "plan.yml")])
    assert result.exit_code == 0 and "(theirs)" in result.output, result.output


def test_plan_counts_an_adapter_as_its_base(base, tmp_path):
    run(base, tmp_path / "out")
    (tmp_path / "plan.yml").write_text(
        json.dumps({"base_model": str(tmp_path / "out"), "caft": {}})
    )
    result = CliRunner().invoke(commands, ["plan", str(tmp_path / "plan.yml")])
    assert f"base_model is an adapter: counted as its base model, {base}." in result.output

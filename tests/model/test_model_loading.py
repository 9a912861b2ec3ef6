"""A model is loaded as it was trained: adapters with a larger vocabulary, a run's config next to
them, revisions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from builders.tiny import LLAMA, word_tokenizer
from caft_plugin.model import loading as model_loading
from caft_plugin.model.loading import Source, load_model, load_tokenizer, merged
from caft_plugin.stage1.pretraining import load_base
from caft_plugin.tools.attention_report import attention_report, read_texts

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
    for load in (load_model, load_base):
        model = load(str(tmp_path / "out"), torch.float32)
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

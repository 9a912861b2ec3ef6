"""`mtp: keep` in a trainer: final saves have the base's MTP layers, checkpoints are the host's."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from builders.mtp import LAYOUTS, publish, qwen, tensors_in
from builders.runs import CAFTTrainer, arguments, pad, rows
from caft_plugin import ConfigError, MTPConfig

pytestmark = pytest.mark.newest

DATA = [{key: row[key] % 64 for key in row} for row in rows([4, 20, 7, 3, 12, 9, 5, 15])]
for row in DATA:
    row["labels"] = row["input_ids"].clone()


@pytest.fixture(params=list(LAYOUTS))
def base(request, tmp_path):
    publish(request.param, tmp_path / "base")
    return tmp_path / "base"


def trainer_of(model, out, mtp, trainer_class=CAFTTrainer, **settings):
    more = {} if mtp is None else {"mtp": mtp}
    return trainer_class(
        model=model,
        args=arguments(out, **settings),
        train_dataset=DATA,
        data_collator=pad,
        **more,
    )


def load(base):
    return AutoModelForCausalLM.from_pretrained(base)


def test_a_final_save_has_them_and_a_checkpoint_is_the_hosts(base, tmp_path):
    out = tmp_path / "out"
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    plain = trainer_of(load(base), tmp_path / "plain", None, **settings)
    plain.train()
    plain.save_model()
    ours = CAFTTrainer(
        model=load(base),
        args=arguments(out, **settings),
        train_dataset=DATA,
        data_collator=pad,
        mtp=MTPConfig(),
    )
    ours.train()
    ours.save_model()
    for checkpoint in ("checkpoint-2", "checkpoint-3"):
        theirs = tensors_in(tmp_path / "plain" / checkpoint)
        assert tensors_in(out / checkpoint).keys() == theirs.keys()
    found = tensors_in(out)
    assert found.keys() == tensors_in(base).keys()
    for name, value in tensors_in(tmp_path / "plain").items():
        assert torch.equal(found[name], value), name
    resumed = trainer_of(load(base), out, {}, **settings)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_together_with_heads_and_saved_twice(base, tmp_path):
    trainer = CAFTTrainer(
        model=load(base),
        args=arguments(tmp_path / "out", max_steps=1),
        train_dataset=DATA,
        data_collator=pad,
        caft={"num_heads": 1},
        mtp={"mode": "keep"},
    )
    trainer.train()
    for _ in range(2):
        trainer.save_model()
        assert tensors_in(tmp_path / "out").keys() == tensors_in(base).keys()
    assert (tmp_path / "out" / "caft_heads" / "heads.safetensors").is_file()


def test_an_adapter_is_saved_as_without(base, tmp_path, caplog):
    adapted = get_peft_model(load(base), LoraConfig(target_modules=["q_proj", "v_proj"]))
    trainer = trainer_of(adapted, tmp_path / "out", {}, max_steps=1)
    trainer.train()
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert not list((tmp_path / "out").glob("model*"))
    assert "is an adapter, to which nothing is added" in caplog.text


def test_what_has_no_mtp_layers_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="mtp.mode: keep: the model was not loaded from"):
        trainer_of(qwen(), tmp_path / "out", {})
    qwen().save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="mtp.mode: keep: .* has no MTP layers"):
        trainer_of(load(tmp_path / "base"), tmp_path / "out", {})
    with pytest.raises(ConfigError, match="mtp.mode: got 'train', but it accepts one of keep"):
        trainer_of(load(tmp_path / "base"), tmp_path / "out", {"mode": "train"})


def test_config_announces_them(base, tmp_path):
    trainer = trainer_of(load(base), tmp_path / "out", {}, max_steps=1)
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved.get("mtp_num_hidden_layers") or saved.get("num_nextn_predict_layers")


def test_trls_trainer_keeps_them(base, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig

    from builders.tiny import word_tokenizer
    from caft_plugin.trl import CAFTSFTTrainer

    args = SFTConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, bf16=False, report_to=[])
    trainer = CAFTSFTTrainer(
        model=load(base),
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": [3, 5, 7, 9], "labels": [3, 5, 7, 9]}] * 4),
        processing_class=word_tokenizer(""),
        mtp=MTPConfig(),
    )
    trainer.train()
    trainer.save_model()
    assert tensors_in(tmp_path / "out").keys() == tensors_in(base).keys()

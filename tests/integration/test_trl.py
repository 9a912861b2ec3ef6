"""The real SFTTrainer of whichever TRL is installed: what the plain one runs ours runs, what it
refuses ours does."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from trl import SFTTrainer

from builders.sft import CHATS, FEATURES, TEMPLATE, make, model_of, run
from builders.tiny import word_tokenizer
from caft_plugin import with_caft
from caft_plugin.caft.heads import MODULE_NAME
from caft_plugin.trl import CAFTSFTTrainer

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(TEMPLATE)


# What the heads are to learn does not depend on how the host computes its own loss.
SAME_HEADS = (
    "loss nll",
    "loss chunked_nll",
    "loss dft",
    "label smoothing nll",
    "compute_loss_func",
    "checkpointing",
    "torch_compile",
)


@pytest.mark.parametrize("feature", FEATURES)
def test_what_the_plain_trainer_runs_ours_runs(tokenizer, tmp_path, feature):
    given = dict(zip(("rows", "settings", "arguments"), FEATURES[feature], strict=True))
    try:
        plain = run(SFTTrainer, tokenizer, tmp_path, **given)
    except Exception as refused:
        with pytest.raises(type(refused)) as ours:
            run(CAFTSFTTrainer, tokenizer, tmp_path, **given, caft={"beta": 0.05})
        assert str(ours.value) == str(refused)
        return
    ours = run(CAFTSFTTrainer, tokenizer, tmp_path, **given, caft={"beta": 0.05})
    first = ours[0]
    assert plain[0].keys() <= first.keys()
    # bfloat16 rounds the host's loss to 3 digits before it is added up
    assert first["caft/next_token_loss"] == pytest.approx(
        plain[0]["loss"], rel=1e-2 if feature == "bf16" else 1e-6
    )
    assert first["loss"] == pytest.approx(
        first["caft/next_token_loss"] + first["caft/aux_loss"], rel=1e-6
    )
    assert {f"caft/loss_head_{k}" for k in range(1, 5)} <= first.keys()
    assert ours[-1]["caft/loss_head_1"] < first["caft/loss_head_1"]
    for key in ("entropy", "num_tokens", "mean_token_accuracy"):
        assert first.get(key) == pytest.approx(plain[0].get(key), rel=1e-3)
    if feature in SAME_HEADS:
        reference = run(CAFTSFTTrainer, tokenizer, tmp_path, caft={"beta": 0.05})[0]
        for k in range(1, 5):
            assert first[f"caft/loss_head_{k}"] == pytest.approx(
                reference[f"caft/loss_head_{k}"], rel=1e-5
            )


@pytest.mark.parametrize(
    "feature", ["conversational", "packing bfd", "LoRA", "loss dft", "label smoothing nll"]
)
def test_beta_zero_is_the_plain_trainer_to_the_digit(tokenizer, tmp_path, feature):
    given = dict(zip(("rows", "settings", "arguments"), FEATURES[feature], strict=True))
    runs = [
        run(SFTTrainer, tokenizer, tmp_path, **given),
        run(CAFTSFTTrainer, tokenizer, tmp_path, **given, caft={"beta": 0}),
    ]
    plain, ours = ([(e["loss"], e["grad_norm"]) for e in logs] for logs in runs)
    assert plain == ours
    assert runs[0][0].keys() == runs[1][0].keys()


@pytest.mark.parametrize(
    "packing", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}]
)
def test_packed_rows_give_what_their_documents_give(tokenizer, tmp_path, packing):
    """Heads see and predict within a document: the same means as of padded rows, all rows in one
    step."""
    settings = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 1, "max_steps": 1}
    padded = run(CAFTSFTTrainer, tokenizer, tmp_path, settings=settings, caft={})[0]
    packed = run(CAFTSFTTrainer, tokenizer, tmp_path, settings={**settings, **packing}, caft={})[0]
    for key in ("caft/next_token_loss", *(f"caft/loss_head_{k}" for k in range(1, 5))):
        assert packed[key] == pytest.approx(padded[key], rel=1e-5), key


def test_evaluation_and_best_model(tokenizer, tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    evaluated = {"eval_dataset": Dataset.from_list(CHATS[:6])}
    plain = make(SFTTrainer, tokenizer, tmp_path / "plain", settings=settings, arguments=evaluated)
    ours = make(
        CAFTSFTTrainer,
        tokenizer,
        tmp_path / "ours",
        settings=settings,
        arguments=evaluated,
        caft={},
    )
    before = plain.evaluate(), ours.evaluate()
    assert before[0]["eval_loss"] == before[1]["eval_loss"]
    assert before[1]["eval_caft/loss_head_4"] > 0
    ours.train()
    assert ours.state.best_model_checkpoint is not None
    shapes = [
        {k: v.shape for k, v in load_file(file).items()}
        for file in (tmp_path / "ours" / "checkpoint-3").glob("model.safetensors")
    ]
    assert shapes and not any(MODULE_NAME in key for key in shapes[0])


@pytest.mark.parametrize("how", ["full", "LoRA"])
def test_what_is_saved_is_plain(tokenizer, tmp_path, how):
    arguments = (
        {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if how == "LoRA" else {}
    )
    file = "adapter_model.safetensors" if how == "LoRA" else "model.safetensors"
    found = []
    for trainer_class, caft in ((SFTTrainer, None), (CAFTSFTTrainer, {})):
        folder = tmp_path / trainer_class.__name__
        trainer = make(trainer_class, tokenizer, folder, arguments=arguments, caft=caft)
        trainer.train()
        trainer.save_model()
        found.append({key: tensor.shape for key, tensor in load_file(folder / file).items()})
    assert found[0] == found[1]
    record = json.loads((tmp_path / "CAFTSFTTrainer" / "caft_heads" / "config.json").read_text())
    assert record["num_heads"] == 4


def test_a_model_by_name_and_qlora(tokenizer, tmp_path):
    model_of(hidden_size=128, intermediate_size=256).bfloat16().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    settings = {
        "bf16": True,
        "model_init_kwargs": {
            "quantization_config": quantisation,
            "dtype": torch.bfloat16,
            "device_map": "cpu",
        },
    }
    arguments = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    trainer = make(
        CAFTSFTTrainer,
        tokenizer,
        tmp_path / "out",
        settings=settings,
        arguments=arguments,
        caft={},
        model=str(tmp_path / "base"),
    )
    assert any(
        ".lora_" in name
        for name, p in trainer.caft_parts.caft.heads.named_parameters()
        if p.requires_grad
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(entry["caft/loss_head_4"])) for entry in logs)
    moved = [p for n, p in trainer.caft_parts.caft.heads.named_parameters() if ".lora_B." in n]
    assert moved and all(p.abs().sum() > 0 for p in moved)


def test_a_users_subclass_keeps_its_loss(tokenizer, tmp_path):
    class Half(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            assert not return_outputs
            return loss / 2

    plain = run(Half, tokenizer, tmp_path)
    ours = run(with_caft(Half), tokenizer, tmp_path, caft={})
    assert ours[0]["caft/next_token_loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert ours[0]["loss"] == pytest.approx(
        ours[0]["caft/next_token_loss"] + ours[0]["caft/aux_loss"], rel=1e-6
    )

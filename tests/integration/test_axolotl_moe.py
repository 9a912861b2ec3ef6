"""Mixtures of experts through the real `axolotl train`: LoRA on the experts' three-dimensional
parameters (`lora_target_parameters`), over experts in full precision and in 4 bits
(`quantize_moe_experts`).

Axolotl quantises experts on a GPU alone: elsewhere it stops while it loads the model, with or
    without our plugin.
`quantised_experts.py` does the same to the same parameters, with the same functions, at the end of
the loading.

Every step sees all rows, so that a run's first losses can be computed here, from the model as it
lies on disk. All is in float32, sums in different orders, so that losses agree to 1e-5.
"""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

from builders.axolotl import assert_starts_from, losses_ahead
from builders.copies import EXACT, MOE, gap, moved, tiny, without_adapter

pytest.importorskip("axolotl")

from axolotl.monkeypatch.moe_quant import patch_peft_target_parameters_matching
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from quantised_experts import quantise_experts, rows_in_8_bits
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from caft_plugin.model.copies import plain_copy
from caft_plugin.stage1.data import pad_rows

pytestmark = pytest.mark.slow

HEADS = 2
CAFT = {"num_heads": HEADS, "beta": 0.1, "schedule": "constant"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
RUN = {
    "base_model": "./moe",
    "datasets": [{"path": "./few.jsonl", "ds_type": "json", "type": "chat_template"}],
    "dataset_prepared_path": "./prepared_few",
    "lora_dropout": 0.0,
    "lora_target_linear": None,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_target_parameters": EXPERTS,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "save_steps": 4,
    "learning_rate": 0.005,
}
IN_4_BITS = {"adapter": "qlora", "load_in_4bit": True}
BASES = {16: {}, 4: IN_4_BITS}
PLUGINS = {16: [], 4: ["quantised_experts.QuantisedExperts"]}


# What Axolotl replaces in PEFT.
PATCHED = [
    (BaseTuner, "_inject_parameters"),
    (BaseTuner, "_check_target_module_exists"),
    (ParamWrapper, "_activate_lora"),
]
CONFIGS = {
    "Qwen3Moe": Qwen3MoeConfig(
        **MOE, num_experts=4, moe_intermediate_size=32, head_dim=8, mlp_only_layers=[]
    ),
    "Mixtral": MixtralConfig(**MOE, num_local_experts=4),
    "GptOss": GptOssConfig(**MOE, num_local_experts=4, head_dim=8),
}


@pytest.fixture(scope="module")
def moe(project, smollm2):
    folder = project.folder / "moe"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(folder)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[],
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (project.folder / "few.jsonl").write_text(
        "".join((project.folder / "rows.jsonl").read_text().splitlines(True)[:8])
    )
    return project


def train(moe, bits, name, caft=None, **changes):
    """A run over a base of so many bits; its output folder and its log."""
    plugins = [*PLUGINS[bits], *(["caft_plugin"] if caft else [])]
    settings = {**RUN, **BASES[bits], "plugins": plugins or None, "caft": caft, **changes}
    out = moe.train(f"moe_{bits}_{name}", **settings)
    return out, moe.logs(f"moe_{bits}_{name}")


def ours(moe, bits):
    return train(moe, bits, "ours", CAFT)


def first_losses(moe, bits):
    """The mean cross-entropy of the model on disk for the token 1, 2 ... ahead, over Axolotl's
    labels of all rows."""
    options = {}
    if bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    folder = moe.folder / "moe"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", **options
    )
    if bits == 4:
        quantise_experts(model)
    model.train()  # in evaluation mode 4-bit layers compute in bfloat16 on a CPU
    (prepared,) = (moe.folder / "prepared_few").glob("*/dataset_info.json")
    batch = pad_rows(
        [{k: row[k] for k in ("input_ids", "labels")} for row in load_from_disk(prepared.parent)], 0
    )
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    return losses_ahead(logits, labels, HEADS)


@pytest.mark.parametrize("bits", [16, 4])
def test_lora_on_experts(moe, bits):
    plain, plain_log = train(moe, bits, "plain")
    out, log = ours(moe, bits)
    assert_starts_from(first_losses(moe, bits), plain_log, log)
    said = " ".join((moe.folder / f"moe_{bits}_ours.log").read_text().split())
    assert (
        said.count(
            "80 % of its weights are elsewhere (most of them in mlp.experts.gate_up_proj) and stay"
        )
        == 1
    )
    adapter, plainly = (load_file(run / "adapter_model.safetensors") for run in (out, plain))
    assert {key: t.shape for key, t in adapter.items()} == {
        key: t.shape for key, t in plainly.items()
    }
    assert sum(".experts." in key for key in adapter) == 3 * 2 * 2  # layers, parameters, factors
    assert all(tensor.abs().sum() > 0 for key, tensor in adapter.items() if "lora_B" in key)


@pytest.mark.parametrize("bits", [16, 4])
def test_heads_of_experts_are_plain_and_do_what_they_did(moe, bits):
    """Their files name the layer's parameters, in full precision. Merged after three steps, over
    the adapter that was trained with them, they have the losses that unmerged ones have at the
    fourth."""
    _, log = ours(moe, bits)
    out, three = train(moe, bits, "three", CAFT, max_steps=3, save_steps=3)
    heads = load_file(out / "caft_heads" / "heads.safetensors")
    layer = AutoModelForCausalLM.from_pretrained(moe.folder / "moe").model.layers[-1]
    shapes = {
        f"{k}.{name}": (p.shape, p.dtype)
        for k in range(HEADS)
        for name, p in layer.named_parameters()
    }
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in heads.items()} == shapes

    unmerged, lora = (
        load_file(out / "checkpoint-3" / "caft_heads" / f"{n}.safetensors")
        for n in ("heads", "lora")
    )
    assert unmerged.keys() == heads.keys() and lora
    for key, tensor in heads.items():
        factors = [lora.get(key.replace("weight", f"lora_{factor}.weight")) for factor in "BA"]
        change = 0 if factors[0] is None else 2 * factors[0] @ factors[1]  # lora_alpha / lora_r
        torch.testing.assert_close(tensor, unmerged[key] + change, rtol=0, atol=1e-6)

    given = {**CAFT, "heads": str(out), "train_heads": "frozen"}
    _, again = train(moe, bits, "again", given, lora_model_dir=str(out), max_steps=1, save_steps=1)
    for key in [f"caft/loss_head_{k}" for k in range(1, HEADS + 1)]:
        assert [entry[key] for entry in three] == [entry[key] for entry in log[:3]]
        assert log[3][key] < log[0][key] - 0.1
        assert again[0][key] == pytest.approx(log[3][key], rel=1e-5)


@pytest.mark.parametrize(("made_over", "bits"), [(16, 4), (4, 16)])
def test_heads_serve_the_other_base(moe, made_over, bits):
    """Heads made over experts in 4 bits are those of a base in full precision, and the other way
    round."""
    made, _ = ours(moe, made_over)
    given = {**CAFT, "heads": str(made), "train_heads": "frozen"}
    out, log = train(moe, bits, "others", given, max_steps=1, save_steps=1)
    kept, heads = (load_file(run / "caft_heads" / "heads.safetensors") for run in (out, made))
    assert kept.keys() == heads.keys() and all(torch.equal(kept[key], heads[key]) for key in kept)
    assert log[0]["caft/next_token_loss"] == pytest.approx(first_losses(moe, bits)[0], rel=1e-5)
    # they have learnt, the base has not
    assert log[0]["caft/loss_head_1"] < first_losses(moe, bits)[1] - 0.05


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_a_fresh_head_over_experts_that_axolotl_quantised(family, bits, monkeypatch):
    """Its logits are the last layer's own, without an adapter and with a trained one on the
    experts, which Axolotl puts on in a way of its own."""
    monkeypatch.setattr(bitsandbytes.functional, "int8_vectorwise_quant", rows_in_8_bits)
    model = tiny(CONFIGS[family])
    plain = copy.deepcopy(model.model.layers[-1])
    quantise_experts(model, bits)
    assert gap(model) < EXACT
    copied = plain_copy(model.model.layers[-1], model.config.dtype)
    shapes = {name: (p.shape, p.dtype) for name, p in plain.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in copied.named_parameters()} == shapes
    for owner, name in PATCHED:  # put back after the test
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(
        patch_peft_target_parameters_matching, "_axolotl_patched", False, raising=False
    )
    patch_peft_target_parameters_matching()
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    )
    moved(model)
    assert gap(model) < EXACT
    assert without_adapter(model, copied) > 1e-3

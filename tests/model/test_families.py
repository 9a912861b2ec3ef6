"""Every decoder-only family we say works, as a tiny random model: no table of architectures in the
engine, one here.

For each: a head that is a copy of the last layer gives the model's own logits (this proves masks,
rotary embeddings, norms, soft-capping and logit scales at once), a few steps lower every head's
loss, and what is saved is what a model without heads saves.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders.families import FAMILIES, GATED, model_of
from builders.heads import assert_the_models_own_logits, attach, batch, read
from builders.paths import ROOT
from caft_plugin import ConfigError
from caft_plugin.model.trunk import find_trunk

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_the_last_layer_gives_the_models_own_logits(family):
    model = model_of(family).eval()
    attached = attach(model, num_heads=1)
    inputs = batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 9:] = 0
    assert_the_models_own_logits(attached, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_every_heads_loss_and_the_saved_model_is_plain(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path / "before")
    attached = attach(model)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(1)
    inputs = batch()
    sums = []
    for _ in range(12):
        reading, output = read(attached, inputs)
        (output.loss + 0.1 * reading.loss).backward()
        optimizer.step(), optimizer.zero_grad()
        sums.append(reading.sums)
    assert (sums[-1] < sums[0]).all(), (sums[0], sums[-1])
    model.save_pretrained(tmp_path / "after")
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")
    )
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}


REFUSED = {
    "Gemma3nText": {
        **GATED,
        "head_dim": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0] * 3,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "Rwkv": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
    "T5": {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family):
    config = getattr(transformers, f"{family}Config")(**REFUSED[family])
    auto = transformers.AutoModelForSeq2SeqLM if family == "T5" else AutoModelForCausalLM
    model = auto.from_config(config)
    with pytest.raises(ConfigError, match=type(model).__name__):
        find_trunk(model)


def listing() -> str:
    return ", ".join(FAMILIES)


def test_the_readme_lists_the_families_of_this_test():
    text = " ".join((ROOT / "tests" / "README.md").read_text(encoding="utf-8").split())
    assert listing() in text, f"the list in tests/README.md of families is to read: {listing()}"

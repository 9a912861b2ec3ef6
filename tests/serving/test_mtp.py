"""vLLM drafts with a model's own MTP layers: with them it writes the same texts, else it stops."""

from __future__ import annotations

import json

import pytest
import torch
from drafters import run_jobs
from safetensors.torch import load_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from caft_plugin.mtp.checkpoint import Checkpoint
from caft_plugin.mtp.keep import Base, keep_mtp

TOKENS = 12
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def glm():
    return Glm4MoeForCausalLM(Glm4MoeConfig(**SMALL, num_key_value_heads=1, head_dim=64))


FAMILIES = {"glm4_moe": glm}


def publish(model, folder):
    """A base with an MTP layer under its official names: a copy of the last layer."""
    model.save_pretrained(folder)
    last, behind = "model.layers.1.", "model.layers.2."
    there = load_file(folder / "model.safetensors")
    tensors = {
        name.replace(last, behind): value.clone() for name, value in there.items() if last in name
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{behind}{name}.weight"] = torch.ones(64)
    tensors[f"{behind}eh_proj.weight"] = torch.cat([torch.zeros(64, 64), torch.eye(64)], dim=1)
    tensors[f"{behind}embed_tokens.weight"] = there["model.embed_tokens.weight"].clone()
    tensors[f"{behind}shared_head.head.weight"] = there["lm_head.weight"].clone()
    Checkpoint.open(str(folder), "base").put(tensors)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What vLLM wrote, by family and by way: plain, with MTP kept, and as transformers saves."""
    root = tmp_path_factory.mktemp("mtp")
    prompts = [[5, 9, 33, 70, 12], [101, 44, 3, 8, 8, 60, 17]]
    mtp = {"method": "mtp", "num_speculative_tokens": 1}
    jobs = {}
    for family, make in FAMILIES.items():
        torch.manual_seed(0)
        publish(make(), root / family / "base")
        model = type(make()).from_pretrained(root / family / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        for way in ("saved", "kept"):
            model.save_pretrained(root / family / way)
        keep_mtp(Base.open(str(root / family / "base"), "base"), root / family / "kept", "model")
        for way, folder, asked in (
            ("plain", "saved", None),
            ("saved", "saved", mtp),
            ("kept", "kept", mtp),
        ):
            jobs[family, way] = {
                "model": str(root / family / folder),
                "prompts": prompts,
                "tokens": TOKENS,
                "out": str(root / f"{family}-{way}.json"),
                "speculative": asked,
            }
    result = run_jobs(root, list(jobs.values()))
    found = {}
    for key, job in jobs.items():
        try:
            found[key] = json.loads(open(job["out"], encoding="utf-8").read())
        except FileNotFoundError:
            pytest.fail(result.stderr[-6000:])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_stops_vllm(written, family):
    assert "not initialized from checkpoint" in written[family, "saved"]["error"]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_its_mtp_layers_kept_vllm_drafts_and_writes_the_same_texts(written, family):
    plain, kept = written[family, "plain"], written[family, "kept"]
    assert "error" not in plain, plain["error"]
    assert "error" not in kept, kept["error"]
    assert kept[0]["texts"] == plain[0]["texts"]
    assert kept[0]["after"]["num_drafts"] > 0

"""Models with MTP layers of their own, as they are published and as vLLM reads them."""

from __future__ import annotations

import copy
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from caft_plugin.mtp.checkpoint import Checkpoint

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def qwen(**changes):
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        **SMALL | changes,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        mtp_num_hidden_layers=1,
    )
    return Qwen3_5ForCausalLM(config)


def qwen_mtp(model):
    config = copy.deepcopy(model.config)
    config.layer_types = ["full_attention"]
    block = type(model.model.layers[-1])(config, 0)
    tensors = {f"mtp.layers.0.{name}": value for name, value in block.state_dict().items()}
    tensors["mtp.fc.weight"] = torch.randn(32, 64)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = torch.randn(32)
    return tensors


def glm(**changes):
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(
        **SMALL | changes,
        num_hidden_layers=2,
        head_dim=16,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    )
    return Glm4MoeForCausalLM(config)


def layer_behind(folder, model):
    """The tensors of a layer behind the last one: DeepSeek's and GLM's layout."""
    there = {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    last = "model.layers.1."
    tensors = {
        name.replace(last, "model.layers.2."): torch.randn_like(value)
        for name, value in there.items()
        if name.startswith(last)
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"model.layers.2.{name}.weight"] = torch.randn(32)
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(32, 64)
    tensors["model.layers.2.embed_tokens.weight"] = model.model.embed_tokens.weight.detach().clone()
    tensors["model.layers.2.shared_head.head.weight"] = model.lm_head.weight.detach().clone()
    return tensors


LAYOUTS = {
    "own name": (qwen, lambda folder, model: qwen_mtp(model)),
    "layer behind": (glm, layer_behind),
}


def publish(layout, folder, **changes):
    """A base as it is published: the model's tensors and those of its MTP layer, in shards."""
    make, mtp_of = LAYOUTS[layout]
    torch.manual_seed(0)
    model = make(**changes)
    model.save_pretrained(folder, max_shard_size="40KB")
    tensors = {name: value.bfloat16() for name, value in mtp_of(folder, model).items()}
    Checkpoint.open(str(folder), "base").put(tensors)
    return tensors


def tensors_in(folder):
    """All tensors, read as vLLM does: the files that the index names, every tensor in them."""
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        assert files is None or file.name in files, f"{file.name} is not in the index"
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                assert name not in found, f"{name} is there twice"
                found[name] = opened.get_tensor(name)
    return found

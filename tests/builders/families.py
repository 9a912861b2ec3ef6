"""Every decoder-only family we say works, as a tiny random model."""

from __future__ import annotations

import copy

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}

EXPERTS = {**GATED, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}

STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}

NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}

# Config class without "Config", and what its tiny model needs.
FAMILIES: dict[str, dict] = {
    "Llama": GATED,
    "Mistral": {**GATED, "sliding_window": 8},
    "Mixtral": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": GATED,
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "Qwen3": {**GATED, "head_dim": 8},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "Gemma": {**GATED, "head_dim": 8},
    "Gemma2": {
        **GATED,
        "head_dim": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 4,
    },
    "Gemma3Text": {**GATED, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
    "Gemma4Text": {
        **GATED,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
        "final_logit_softcapping": 3.0,
    },
    "Phi": {**GATED, **NO_DROPOUT, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "Phi3": {**GATED, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "Olmo": GATED,
    "Olmo2": GATED,
    "Olmo3": {**GATED, "sliding_window": 4},
    "SmolLM3": GATED,
    "Granite": {**GATED, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "GraniteMoe": {
        **GATED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "logits_scaling": 4.0,
    },
    "Cohere": {**GATED, "logit_scale": 0.25},
    "Cohere2": {**GATED, "logit_scale": 0.25, "sliding_window": 4},
    "Glm": {**GATED, "head_dim": 8},
    "Glm4": {**GATED, "head_dim": 8},
    "DeepseekV3": {
        **GATED,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "Starcoder2": {**GATED, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "StableLm": {**GATED, **NO_DROPOUT},
    "GPTNeoX": {**SIZES, **NO_DROPOUT, "intermediate_size": 64},
    "GPT2": {**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "GPTJ": {**SIZES, "rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "OPT": {
        **SIZES,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "do_layer_norm_before": True,
    },
    "Falcon": {**SIZES, **NO_DROPOUT, "new_decoder_architecture": True, "num_kv_heads": 2},
    "Bloom": {**SIZES, **NO_DROPOUT, "n_layer": 3, "n_head": 4},
    "Mpt": {"vocab_size": 97, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "Exaone4": {**GATED, "head_dim": 8, "sliding_window": 4},
    "Ernie4_5": {**GATED, "head_dim": 8},
    "Nemotron": {**GATED, **NO_DROPOUT},
    "HunYuanDenseV1": {**GATED, "head_dim": 8},
    "Apertus": GATED,
    "SeedOss": {**GATED, "head_dim": 8, "residual_dropout": 0.0},
    "Llama4Text": {**GATED, "head_dim": 8, "num_local_experts": 2},
    "RecurrentGemma": {**GATED, "head_dim": 8, "lru_width": 32, "attention_window_size": 8},
    "Mamba": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "pad_token_id": 0,
    },
    "Mamba2": {**SIZES, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "Jamba": {
        **GATED,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "Bamba": {**GATED, **STATE_SPACE, "attn_layer_indices": [2]},
    "FalconH1": {**GATED, **STATE_SPACE, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "GraniteMoeHybrid": {
        **GATED,
        **STATE_SPACE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["mamba", "mamba", "attention"],
        "shared_intermediate_size": 32,
    },
    "Lfm2": {**GATED, "full_attn_idxs": [2]},
    "Qwen3Next": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "GptOss": {
        **GATED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 4,
    },
}


def model_of(family: str, attention: str | None = None):
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    torch.manual_seed(0)
    for implementation in [attention] if attention else ["sdpa", "eager"]:
        try:
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=implementation
            )
        except (ValueError, ImportError):  # the family has no such attention
            continue
    raise AssertionError(f"{family} has neither sdpa nor eager attention")

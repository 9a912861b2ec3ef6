"""Vision-language models as tiny random ones, and batches for them with images and without."""

from __future__ import annotations

import copy

import torch
import transformers
from transformers import AutoModelForImageTextToText

from builders.families import GATED
from caft_plugin.targets import IGNORE

IMAGE, VISION_START = 90, 92

# The vision part has as many layers as the text part, so that neither is taken for the other.
VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}

QWEN_VIT = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}

QWEN3_VIT = {**QWEN_VIT, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}

MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": 93,
}

HEAD_DIM = {**GATED, "head_dim": 8}

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}

LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def text(model_type, **more):
    return {**GATED, **more, "model_type": model_type}


# Config class without "Config", and what its tiny model needs.
FAMILIES: dict[str, dict] = {
    "Qwen2VL": {
        **QWEN_TOKENS,
        "text_config": {**GATED, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VIT, "embed_dim": 32, "mlp_ratio": 2},
    },
    "Qwen2_5_VL": {
        **QWEN_TOKENS,
        "text_config": {**GATED, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VIT, "fullatt_block_indexes": [1], "window_size": 16},
    },
    "Qwen3VL": {
        **QWEN_TOKENS,
        "text_config": {**HEAD_DIM, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": QWEN3_VIT,
    },
    "Qwen3VLMoe": {
        **QWEN_TOKENS,
        "text_config": {
            **HEAD_DIM,
            **EXPERTS,
            "mlp_only_layers": [],
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        "vision_config": QWEN3_VIT,
    },
    "Qwen3_5": {
        **QWEN_TOKENS,
        "text_config": {
            **HEAD_DIM,
            **LINEAR_ATTENTION,
            "num_hidden_layers": 4,
            "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
        },
        "vision_config": {**QWEN_VIT, "depth": 4, "num_position_embeddings": 16},
    },
    "Llava": {
        "text_config": text("llama"),
        "vision_config": {**VIT, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "InternVL": {
        "text_config": text("qwen2"),
        "vision_config": {**VIT, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "Mistral3": {
        "text_config": text("mistral", head_dim=8, sliding_window=None),
        "vision_config": {**VIT, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": IMAGE,
    },
    "Gemma3": {
        "text_config": {**HEAD_DIM, "sliding_window": 4},
        "vision_config": {**VIT, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "PaliGemma": {
        "text_config": text("gemma", head_dim=8),
        "vision_config": {**VIT, "model_type": "siglip_vision_model"},
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    "Idefics3": {"text_config": text("llama"), "vision_config": VIT, "image_token_id": IMAGE},
    "SmolVLM": {"text_config": text("llama"), "vision_config": VIT, "image_token_id": IMAGE},
}

MROPE_FAMILIES = [family for family in FAMILIES if family.startswith("Qwen")]


def model_of(family):
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(FAMILIES[family]))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        # Gemma 3 starts with zeros, and an image would be nothing
        if name.endswith("mm_input_projection_weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows_of(family, with_image, rows=4):
    """Rows as a processor makes them, each with one image of 16 x 16 pixels or none; the loss is on
    the last 8 tokens.

    Qwen's pixel values are patches, one after the other, the others' (rows, 3, 16, 16).
    """
    whole = family in ("Llava", "PaliGemma")  # no merging of patches
    image_tokens = (16 if whole else 4) if with_image else 0
    length = 12 + image_tokens
    ids = torch.randint(3, IMAGE, (rows, length))
    ids[:, 2 : 2 + image_tokens] = IMAGE
    labels = ids.clone()
    labels[:, :-8] = IGNORE
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if family == "Gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if family == "PaliGemma":
        batch["token_type_ids"] = (labels != IGNORE).long()
    if not with_image:
        return batch
    if family.startswith("Qwen"):
        ids[:, 1] = VISION_START
        batch["pixel_values"] = torch.randn(16 * rows, 2 * 3 * 4 * 4)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        batch["pixel_values"] = torch.randn(rows, 3, 16, 16)
    if family in ("Idefics3", "SmolVLM"):
        batch["pixel_values"] = batch["pixel_values"][:, None]
    if family == "Mistral3":
        batch["image_sizes"] = torch.tensor([[16, 16]] * rows)
    return batch

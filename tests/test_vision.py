"""Vision-language models as tiny random ones: heads over their text part, for batches with images
and without.

As for other families: a head that is a copy of the last layer gives the model's own logits,
    training lowers every
head's loss, and what is saved is what a model without heads saves. `python tests/test_vision.py`
prints tests/README.md's list.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from paths import ROOT
from safetensors.torch import load_file
from test_families import GATED
from test_heads import assert_the_models_own_logits, attach
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from caft_plugin import with_caft
from caft_plugin.targets import IGNORE, head_targets

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


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_the_last_layer_gives_the_models_own_logits(family, with_image):
    model = model_of(family)
    model.train()  # PaliGemma and Gemma 3 make another mask in training
    attached = attach(model, num_heads=1)
    assert type(attached.trunk.model) is type(model)
    batch = rows_of(family, with_image)
    _, output = assert_the_models_own_logits(attached, batch)
    if with_image:
        with torch.no_grad():
            other = model(**{**batch, "pixel_values": torch.randn_like(batch["pixel_values"])})
        assert (other.logits - output.logits).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_every_heads_loss_and_the_saved_model_is_plain(family, tmp_path):
    """Through the plain Trainer, batches with images and without in turn."""
    model = model_of(family)
    model.save_pretrained(tmp_path / "before")
    batches = [rows_of(family, with_image) for with_image in (True, False)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "after"),
        use_cpu=True,
        max_steps=24,
        per_device_train_batch_size=1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = with_caft(Trainer)(
        model=model,
        args=arguments,
        train_dataset=[{"batch": index % 2} for index in range(24)],
        data_collator=lambda rows: batches[rows[0]["batch"]],
        caft={"beta": 0.1},
    )
    trainer.train()
    trainer.save_model()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for k in range(1, 5):
        losses = [entry[f"caft/loss_head_{k}"] for entry in logs]
        assert sum(losses[-6:]) < 0.9 * sum(losses[:6]), losses
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")
    )
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}


@pytest.mark.parametrize("family", MROPE_FAMILIES)
def test_the_positions_of_an_image_are_no_document_boundary(family):
    """With the position ids that the model itself makes, and with those a collator for packed rows
    would add."""
    model = model_of(family)
    batch = rows_of(family, with_image=True)
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    axes = seen["position_ids"][-3:]
    assert axes.shape == (3, *batch["input_ids"].shape)
    assert (axes[0, :, 1:] != axes[0, :, :-1] + 1).any()
    counted = torch.arange(axes.shape[-1]).expand(1, *axes.shape[1:])
    wanted = head_targets(batch, 4)
    for positions in (axes, torch.cat([counted, axes])):
        torch.testing.assert_close(
            head_targets({**batch, "position_ids": positions}, 4), wanted, rtol=0, atol=0
        )


def listing() -> str:
    return ", ".join(FAMILIES)


def test_the_readme_lists_the_families_of_this_test():
    text = " ".join((ROOT / "tests" / "README.md").read_text(encoding="utf-8").split())
    assert listing() in text, (
        f"the list in tests/README.md of vision-language models is to read: {listing()}"
    )


if __name__ == "__main__":
    print(listing())  # noqa: T201

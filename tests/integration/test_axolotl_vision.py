"""Vision-language models through the real `axolotl train`, set up as Axolotl's examples are:
`processor_type`, rows of images and text, batches that Axolotl's collator makes with the model's
processor.

Every step sees all rows, so that a run's first losses can be computed here, from the model as it
lies on disk.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from builders.axolotl import FULL, assert_starts_from, losses_ahead
from builders.images import GATED, HEAD_DIM, VIT

pytest.importorskip("axolotl")

from axolotl.integrations.base import PluginManager
from axolotl.processing_strategies import get_processing_strategy
from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaConfig,
    LlavaProcessor,
)

from caft_plugin.tools.cli import commands

pytestmark = pytest.mark.slow

HEADS = 3
PLUGIN = {"plugins": ["caft_plugin"], "caft": {"num_heads": HEADS, "beta": 0.05}}
# Of text alone, after 10 with a picture. Gemma 3's processor takes no batch of both kinds.
TEXTS = {"llava": 2, "gemma3": 0}
LANGUAGE = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
HOW = {
    "lora": {"lora_target_linear": None, "lora_target_modules": LANGUAGE},
    "full": FULL,
}


def vision_run(family: str, how: str, **changes) -> dict:
    return {
        "base_model": f"./{family}",
        "processor_type": "AutoProcessor",
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "chat_template": family,
        "datasets": [{"path": f"./{family}.jsonl", "ds_type": "json", "type": "chat_template"}],
        "sequence_len": 512,
        "micro_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "save_steps": 4,
        **HOW[how],
        **changes,
    }


def make_llava(folder: Path, smollm2: Path) -> LlavaConfig:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return LlavaConfig(
        text_config={
            **GATED,
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
        },
        vision_config={**VIT, "model_type": "clip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


def make_gemma3(folder: Path, smollm2: Path) -> Gemma3Config:
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = AutoTokenizer.from_pretrained(smollm2, extra_special_tokens=names)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    pictures = Gemma3ImageProcessor(size={"height": 16, "width": 16})
    Gemma3Processor(
        pictures, tokenizer, tokenizer.chat_template, image_seq_length=4
    ).save_pretrained(folder)
    return Gemma3Config(
        text_config={
            **HEAD_DIM,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "sliding_window": 8,
        },
        vision_config={**VIT, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )


MAKE = {"llava": make_llava, "gemma3": make_gemma3}


@pytest.fixture(scope="module")
def vision(project, smollm2):
    """The project, with tiny models, their processors, and rows of pictures and of text alone."""
    for family, make in MAKE.items():
        config = make(project.folder / family, smollm2)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        if family == "gemma3":  # it starts with zeros, and an image would be nothing
            torch.nn.init.normal_(
                model.model.multi_modal_projector.mm_input_projection_weight, std=0.1
            )
        model.save_pretrained(project.folder / family)
        with open(project.folder / f"{family}.jsonl", "w") as file:
            for i in range(10 + TEXTS[family]):
                picture = project.folder / f"picture-{i}.png"
                Image.new("RGB", (16, 16), (i * 20, 255 - i * 20, i * 7)).save(picture)
                answer = " ".join(str(j) for j in range(1, i % 7 + 4))
                question = [
                    {"type": "image", "path": str(picture)},
                    {"type": "text", "text": f"Count to {i % 7 + 3}."},
                ]
                messages = [
                    {"role": "user", "content": question if i < 10 else question[1:]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
    return project


def first_losses(project, family):
    """The mean cross-entropy of the model on disk for the token 1, 2 ... ahead, over Axolotl's
    labels of all rows."""
    folder = project.folder / family
    processor = AutoProcessor.from_pretrained(folder)
    template = get_chat_template(family)
    strategy = get_processing_strategy(processor, template, family)
    rows = [
        json.loads(line) for line in (project.folder / f"{family}.jsonl").read_text().splitlines()
    ]
    batch = MultiModalChatDataCollator(processor.tokenizer, strategy)(rows)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").train()
    labels = batch.pop("labels")
    assert batch["pixel_values"].shape == (10, 3, 16, 16)
    with torch.no_grad():
        logits = model(**batch).logits
    return losses_ahead(logits, labels, HEADS)


@pytest.mark.parametrize(
    ("family", "how", "layer"), [("llava", "lora", "Llama"), ("gemma3", "full", "Gemma3")]
)
def test_images(vision, family, how, layer):
    """To 1e-5, as float32 sums of other orders differ; what comes out is what a plain run
    leaves."""
    plain = vision.train(f"{family}_plain", **vision_run(family, how))
    ours = vision.train(f"{family}_ours", **vision_run(family, how, **PLUGIN))
    log, plain_log = vision.logs(f"{family}_ours"), vision.logs(f"{family}_plain")
    assert_starts_from(first_losses(vision, family), plain_log, log)

    file = "adapter_model.safetensors" if how == "lora" else "model.safetensors"
    saved, plainly = load_file(ours / file), load_file(plain / file)
    assert {key: t.shape for key, t in saved.items()} == {
        key: t.shape for key, t in plainly.items()
    }
    names = {path.name for path in ours.iterdir()}
    assert names - {path.name for path in plain.iterdir()} == {"caft_heads"}
    if how == "full":  # the pictures' part trains through the text part
        before = load_file(vision.folder / family / file)
        moved = {key for key in saved if not torch.equal(saved[key], before[key])}
        assert any("vision_tower" in key and "layers.0" in key for key in moved)
    record = json.loads((ours / "caft_heads" / "config.json").read_text())
    assert record["layer_class"] == f"{layer}DecoderLayer" and record["num_heads"] == HEADS
    heads = load_file(ours / "caft_heads" / "heads.safetensors")
    assert {key.split(".")[0] for key in heads} == {"0", "1", "2"}
    assert not any("lora" in key or "base_layer" in key for key in heads)


def test_masks_are_refused_by_name(vision):
    """When the YAML is read: there is no such model, and there are no such rows."""
    nowhere = {
        "base_model": "./nowhere",
        "datasets": [{"path": "./nowhere.jsonl", "type": "chat_template"}],
    }
    with pytest.raises(AssertionError):
        vision.train(
            "masked", **vision_run("llava", "lora", **nowhere), plugins=["caft_plugin"], meap="bare"
        )
    said = " ".join((vision.folder / "masked.log").read_text().split())
    assert (
        said.count(
            "ConfigError: meap: cannot be used together with `processor_type: AutoProcessor`: "
        )
        == 1
    )
    assert (
        "Remove the `meap:` block or, if the data is text only, the key `processor_type`." in said
    )


def test_stage1_takes_text_alone_and_its_heads_serve_images(vision, monkeypatch):
    """The commands of `caft`, in this process."""
    monkeypatch.chdir(vision.folder)
    monkeypatch.setenv("AXOLOTL_DATASET_NUM_PROC", "0")
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", OrderedDict())
    stage1 = {
        "plugins": ["caft_plugin"],
        "caft": PLUGIN["caft"],
        "pretrain_heads": {"targets": "distribution"},
    }
    vision.config("stage1_images", **vision_run("llava", "lora", **stage1))
    refused = CliRunner().invoke(commands, ["pretrain-heads", "stage1_images.yml"])
    assert refused.exit_code == 1
    assert refused.output.endswith(
        "Error: pretrain_heads: got processor_type: AutoProcessor, but it accepts only rows of"
        " text, also for a vision-language model. Remove `processor_type` and"
        " `skip_prepare_dataset`; use text in `datasets:`.\n"
    )
    vision.config(
        "stage1", **stage1, base_model="./llava", chat_template="llava", max_steps=4, save_steps=4
    )
    made = CliRunner().invoke(commands, ["pretrain-heads", "stage1.yml"], catch_exceptions=False)
    assert made.exit_code == 0 and "LlamaDecoderLayer" in made.output, made.output
    given = {**PLUGIN["caft"], "heads": "./stage1", "train_heads": "frozen"}
    ours = vision.train(
        "from_stage1", **vision_run("llava", "lora", plugins=["caft_plugin"], caft=given)
    )
    kept, pretrained = (
        load_file(run / "caft_heads" / "heads.safetensors")
        for run in (ours, vision.folder / "stage1")
    )
    assert kept.keys() == pretrained.keys() and all(
        torch.equal(kept[key], pretrained[key]) for key in kept
    )
    base = load_file(vision.folder / "llava" / "model.safetensors")
    (last,) = (base[key] for key in base if key.endswith("layers.2.mlp.up_proj.weight"))
    assert not torch.equal(pretrained["0.mlp.up_proj.weight"], last)
    log = vision.logs("from_stage1")
    assert log[0]["caft/next_token_loss"] == pytest.approx(
        first_losses(vision, "llava")[0], rel=1e-5
    )
    assert all(
        math.isfinite(entry[f"caft/loss_head_{k}"]) for entry in log for k in range(1, HEADS + 1)
    )

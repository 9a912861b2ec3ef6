"""The real SFTTrainer on conversations with images: a tiny random Llava and its own processor.

Needs Pillow, which comes with Axolotl.
"""

from __future__ import annotations

import functools
import json

import pytest

pytest.importorskip("trl")
pytest.importorskip("PIL")

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, LlavaProcessor
from trl import SFTConfig, SFTTrainer

from builders.images import model_of
from builders.tiny import word_tokenizer
from caft_plugin import ConfigError
from caft_plugin.trl import CAFTSFTTrainer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }} {% else %}{%"
    " for part in m.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {%"
    " endif %}{% endfor %}{% endif %}</s> {% endfor %}{% if add_generation_prompt %}assistant {%"
    " endif %}"
)


@pytest.fixture
def processor():
    tokenizer = word_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def rows():
    colours = [(i * 40 % 256, 255 - i * 30, i * 20) for i in range(8)]
    return Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (16, 16), colour)],
                "messages": [
                    {"role": "user", "content": f"w{i} w{i + 1}"},
                    {
                        "role": "assistant",
                        "content": " ".join(f"w{(i * 7 + j) % 80}" for j in range(6)),
                    },
                ],
            }
            for i, colour in enumerate(colours)
        ]
    )


@pytest.mark.parametrize("how", ["full", "LoRA"])
def test_images_through_trl(processor, tmp_path, how):
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    logs, saved = {}, {}
    for trainer_class, more in ((SFTTrainer, {}), (CAFTSFTTrainer, {"caft": {"beta": 0.05}})):
        name = trainer_class.__name__
        model = model_of("Llava")
        model.resize_token_embeddings(image_token + 1)
        model.config.image_token_id = image_token
        trainer = trainer_class(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path / name),
                use_cpu=True,
                bf16=False,
                max_steps=12,
                max_length=None,
                logging_steps=1,
                per_device_train_batch_size=8,
                learning_rate=5e-3,
                lr_scheduler_type="constant",
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=rows(),
            processing_class=processor,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if how == "LoRA" else None,
            **more,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["pixel_values"].shape == (8, 3, 16, 16)
        assert ((batch["input_ids"] == image_token).sum(1) == 16).all()
        trainer.train()
        trainer.save_model()
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        file = "adapter_model.safetensors" if how == "LoRA" else "model.safetensors"
        saved[name] = {
            key: tensor.shape for key, tensor in load_file(tmp_path / name / file).items()
        }
    plain, ours = logs["SFTTrainer"], logs["CAFTSFTTrainer"]
    assert ours[0]["caft/next_token_loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    for k in range(1, 5):
        assert ours[-1][f"caft/loss_head_{k}"] < ours[0][f"caft/loss_head_{k}"] - 0.02
    assert saved["SFTTrainer"] == saved["CAFTSFTTrainer"]
    record = json.loads((tmp_path / "CAFTSFTTrainer" / "caft_heads" / "config.json").read_text())
    assert record["layer_class"] == "LlamaDecoderLayer"


def test_masks_and_images(processor, tmp_path):
    """In pretraining no image token is ever masked, though a picture has more of them than there is
    text; copies, which TRL's rows of images and text have no tokens for, are refused by name."""
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    make = functools.partial(
        CAFTSFTTrainer,
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_steps=3,
            max_length=None,
            logging_steps=1,
            report_to=[],
        ),
        train_dataset=rows(),
        processing_class=processor,
    )
    models = []
    for _ in range(2):
        model = model_of("Llava")
        model.resize_token_embeddings(image_token + 2)
        model.config.image_token_id = image_token
        models.append(model)
    with pytest.raises(
        ConfigError,
        match="training rows need `input_ids` and `labels`, but these have images.*pretrain",
    ):
        make(model=models[0], meap={"min_answer_tokens": 1})
    trainer = make(model=models[1], meap={"mode": "pretrain", "mask_ratio": 0.9})
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    trainer.train()
    mask = trainer.caft_parts.meap.collator.mask_id
    assert seen and all(((ids == image_token).sum(1) == 16).all() for ids in seen)
    assert all((ids == mask).any(1).all() for ids in seen)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["meap/examples_masked"] > 0 for entry in logs)

"""Vision-language models as tiny random ones: heads over their text part, for batches with images
and without.

As for other families: a head that is a copy of the last layer gives the model's own logits,
training lowers every head's loss, and what is saved is what a model without heads saves.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from builders.heads import assert_the_models_own_logits, attach
from builders.images import FAMILIES, MROPE_FAMILIES, model_of, rows_of
from builders.paths import ROOT
from caft_plugin import with_caft
from caft_plugin.targets import head_targets

pytestmark = pytest.mark.newest


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

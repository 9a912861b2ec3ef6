"""The authors' released numbers (tests/goldens/README.md), reached through `with_caft(Trainer)`."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerState, TrainingArguments

from builders.tiny import head_outputs
from caft_plugin import CAFTConfig, with_caft
from caft_plugin.caft.attach import Request
from caft_plugin.caft.heads import MODULE_NAME
from caft_plugin.targets import IGNORE, head_targets

pytestmark = pytest.mark.newest

BETA, ALPHA, STEPS = 0.01, 0.8, 100
SCHEDULES = ("rsine", "sine", "linear", "constant")
AT_STEPS = (0, 25, 50, 99)


def golden_trainer(golden, tmp_path, attention="sdpa", schedule="rsine"):
    tensors, config = golden
    model = LlamaForCausalLM(LlamaConfig(**config.to_dict(), attn_implementation=attention))
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    heads = {k: v for k, v in weights.items() if k.startswith("auxiliary_head.")}
    model.load_state_dict({k: v for k, v in weights.items() if k not in heads}, strict=True)
    trainer = with_caft(Trainer)(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        caft=CAFTConfig(
            schedule=schedule,
            beta=BETA,
            alpha=ALPHA,
            head_input="final",
            head_norm=False,
            train_heads="full",
        ),
    )
    trainer.caft_parts.caft.heads.layers.load_state_dict(
        {k.removeprefix("auxiliary_head.").replace(".layers.0.", "."): v for k, v in heads.items()}
    )
    model.eval()
    return trainer


def inputs(golden):
    return {"input_ids": golden[0]["input_ids"], "labels": golden[0]["labels"].clone()}


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-5), ("eager", 3e-5)])
def test_head_logits(golden, tmp_path, attention, tolerance):
    # eager: the authors' heads ran under sdpa; the two kernels differ by up to 1.4e-5 here.
    trainer = golden_trainer(golden, tmp_path, attention)
    attached = trainer.caft_parts.caft.handle
    batch = inputs(golden)
    # targets, so that every position is computed
    everywhere = torch.zeros(4, *batch["labels"].shape, dtype=torch.long)
    request = Request(everywhere, torch.ones(4), [True] * 4, training=True)
    with head_outputs() as seen:
        own, _ = attached.answer(request, lambda: trainer.model(**batch).logits)
    logits = [own, *(attached.trunk.logits(hidden).view_as(own) for _, hidden in seen)]
    torch.testing.assert_close(torch.stack(logits), golden[0]["logits"], rtol=0, atol=tolerance)


def test_loss_per_head(golden, tmp_path):
    trainer = golden_trainer(golden, tmp_path)
    batch = inputs(golden)
    targets = head_targets(batch, 4)
    request = Request(targets, torch.ones(4), [True] * 4, training=True)
    own, result = trainer.caft_parts.caft.handle.answer(
        request, lambda: trainer.model(**batch).loss
    )
    means = result.sums / (targets != IGNORE).flatten(1).sum(1)
    torch.testing.assert_close(
        torch.cat([own[None], means]), golden[0]["loss_per_head"], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step", AT_STEPS)
def test_total(golden, tmp_path, schedule, step):
    trainer = golden_trainer(golden, tmp_path, schedule=schedule)
    trainer.state = TrainerState(global_step=step, max_steps=STEPS)
    total = trainer.compute_loss(trainer.model, inputs(golden))
    torch.testing.assert_close(
        total.detach(), golden[0][f"total.{schedule}.{step}"], rtol=0, atol=1e-5
    )


def test_gradients(golden, tmp_path):
    trainer = golden_trainer(golden, tmp_path)
    trainer.state = TrainerState(global_step=25, max_steps=STEPS)
    trainer.compute_loss(trainer.model, inputs(golden)).backward()
    with trainer.caft_parts.caft.handle:
        named = dict(trainer.model.named_parameters())
    checked = 0
    for key, expected in golden[0].items():
        if key.startswith("grad.rsine.25."):
            name = key.removeprefix("grad.rsine.25.")
            if name.startswith("auxiliary_head."):
                name = f"{MODULE_NAME}.layers." + name.removeprefix("auxiliary_head.").replace(
                    ".layers.0.", "."
                )
            torch.testing.assert_close(named[name].grad, expected, rtol=0, atol=1e-5)
            checked += 1
    assert checked == 5

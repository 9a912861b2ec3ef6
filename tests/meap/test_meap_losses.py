"""`meap/loss_masked` and `meap/loss_original`, against the model's own logits of every batch,
written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from builders.masked import MASK, ROWS, Batches, trainer_of
from builders.runs import losses
from builders.tiny import LLAMA
from caft_plugin.targets import IGNORE

pytestmark = pytest.mark.newest

KINDS = ("meap/loss_masked", "meap/loss_original")


@pytest.fixture
def model():
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "max_position_embeddings": 256}))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that tokens have different losses
    return model


class LogsAt(TrainerCallback):
    """Calls `note` whenever the trainer logs."""

    def __init__(self, note):
        self.note = note

    def on_log(self, *args, **kwargs):
        self.note()


def summed(model, batches):
    """Summed loss and number of the masked targets and of the others in training batches."""
    found = torch.zeros(2, 2, dtype=torch.float64)
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        each = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
        masked = (batch["input_ids"][:, 1:].flatten() == MASK) & (targets != IGNORE)
        for row, where in enumerate((masked, ~masked & (targets != IGNORE))):
            found[row] += torch.tensor([each[where].sum(), where.sum()])
    return found


@pytest.mark.parametrize("steps", [1, 2], ids=["logged every step", "every second step"])
@pytest.mark.parametrize(
    "meap", [{"layout": "concat"}, {"layout": "separate"}, {"mode": "pretrain"}], ids=str
)
def test_each_kind_is_the_mean_over_its_tokens(model, tmp_path, meap, steps):
    """Of all micro-batches of a step, and of all steps since the last log."""
    settings = {
        "learning_rate": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    reference = copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path, meap=meap, logging_steps=steps, **settings)
    seen = Batches(model)
    ends = [0]
    trainer.add_callback(LogsAt(lambda: ends.append(len(seen.train))))
    trainer.train()
    logs = losses(trainer)
    assert len(logs) == trainer.state.max_steps // steps
    for entry, start, end in zip(logs, ends, ends[1:], strict=False):
        sums = summed(reference, seen.train[start:end])
        for key, (total, count) in zip(KINDS, sums.tolist(), strict=True):
            assert (key in entry) == (count > 0)
            assert count == 0 or entry[key] == pytest.approx(total / count, rel=1e-5)
        if steps == 1:
            assert entry["loss"] == pytest.approx(
                (sums[:, 0].sum() / sums[:, 1].sum()).item(), rel=1e-5
            )


@pytest.mark.parametrize("kind", ["fused", "lora", "added", "bf16"])
def test_with_caft_and_without_logits(model, tmp_path, kind):
    """Where the model makes no logits (`fused_loss`), its final hidden states give them; the split
    adds up."""
    if kind == "lora":
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
        )
    caft = {"num_heads": 2, "fused_loss": "on" if kind in ("fused", "bf16") else "off"}
    trainer = trainer_of(
        model,
        tmp_path,
        meap={"mask_token": "add"} if kind == "added" else {},
        caft=caft,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        bf16=kind == "bf16",
    )
    seen = Batches(model)
    trainer.train()
    tolerance = 2e-2 if kind == "bf16" else 1e-5
    for entry, batch in zip(losses(trainer), seen.train, strict=True):
        masked = (batch["input_ids"] == trainer.caft_parts.meap.collator.mask_id).sum().item()
        tokens = entry["meap/loss_masked"] * masked + entry["meap/loss_original"] * (
            count(trainer) - masked
        )
        assert tokens / count(trainer) == pytest.approx(
            entry["caft/next_token_loss"], rel=tolerance
        )


def count(trainer):
    """Supervised next tokens of an epoch."""
    masked = sum(len(row["input_ids"][3:-1]) // 10 for row in ROWS if len(row["input_ids"]) > 54)
    return masked + sum(sum(label != IGNORE for label in row["labels"][1:]) for row in ROWS)


def test_it_costs_no_forward_pass_and_changes_nothing(model, tmp_path):
    """The same weights to the bit as without reading, as many forward passes, no hook after
    training, and nothing in evaluation."""

    def trained(read):
        own = copy.deepcopy(model)
        seen = Batches(own)
        settings = {"eval_strategy": "epoch", "evaluate": ROWS, "per_device_train_batch_size": 2}
        trainer = trainer_of(own, tmp_path, meap={}, **settings)
        if not read:
            trainer.caft_parts.meap.losses = None
        trainer.train()
        hooks = [len(module._forward_hooks) for module in own.modules()]
        return (
            own.state_dict(),
            len(seen.train),
            len(seen.evaluation),
            hooks,
            trainer.state.log_history,
        )

    (weights, *counts, logs), (others, *other_counts, other_logs) = trained(True), trained(False)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert counts == other_counts and not any(counts[-1])
    for entry, other in zip(logs, other_logs, strict=True):
        assert entry.keys() - other.keys() <= set(KINDS)
        assert ("loss" in entry) or not set(KINDS) & entry.keys()
        assert not [key for key in entry if key.startswith("eval_") and "meap" in key]
        assert all(entry[key] == other[key] for key in other if "loss" in key)

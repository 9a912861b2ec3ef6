"""A pair keeps its boundary, and is counted once, however often and in whatever pieces a host asks
for its loss."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

from builders.masked import trainer_of
from builders.runs import losses
from caft_plugin import with_caft
from caft_plugin.caft.window import Window
from caft_plugin.meap.masking import MEAPCollator
from caft_plugin.meap.plans import StepPlans
from caft_plugin.targets import BOUNDARY, EXAMPLE, IGNORE, PLAN, head_targets

HEADS = 8  # that reach over the prompt of a copy, which is not learned, to its masked tokens
PARTS = {
    "again": lambda batch: [batch],
    "copies": lambda batch: [dict(batch), {**batch}],
    "rows": lambda batch: [
        {k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))
    ],
    "rows, by name": lambda batch: [
        {k: batch[k][i : i + 1].clone() for k in ("input_ids", "labels")}
        for i in range(len(batch["labels"]))
    ],
    "the other way round": lambda batch: [{k: v.flip(0) for k, v in batch.items()}],
    "other tokens": lambda batch: [
        {**batch, "input_ids": batch["input_ids"] + (batch["labels"] == -100).long()}
    ],
    "longer": lambda batch: [
        {k: torch.nn.functional.pad(v, (0, 5), value=PADDING[k]) for k, v in batch.items()}
    ],
}
PADDING = {"input_ids": 0, "labels": -100, "attention_mask": 0}


def host_of(parts, seen):
    class Host(with_caft(Trainer)):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(set(inputs))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            for part in [] if parts is None else parts(inputs):
                loss = loss + 0.0 * super().compute_loss(model, part, *args, **kwargs)
            return loss

    return Host


def count(targets):
    return targets.ne(IGNORE).flatten(1).sum(1)


@pytest.mark.parametrize("parts", [None, *PARTS])
def test_no_target_crosses_from_an_original_into_its_copy(
    tiny_config, tmp_path, monkeypatch, parts
):
    """Against the targets in the collator's own batches, whatever the host asks for."""
    tiny_config.max_position_embeddings = 256
    seen, collated, asked = [], [], []
    monkeypatch.setattr("builders.masked.CAFTTrainer", host_of(PARTS.get(parts), seen))
    collate, request = MEAPCollator.__call__, Window.request

    def collating(collator, *args):
        batch = collate(collator, *args)
        collated.append(
            (count(head_targets(batch, HEADS)), int((batch[PLAN] & EXAMPLE).bool().sum()))
        )
        return batch

    def requesting(*args):
        asked.append(count((made := request(*args)).targets))
        return made

    monkeypatch.setattr(MEAPCollator, "__call__", collating)
    monkeypatch.setattr(Window, "request", requesting)
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "gradient_accumulation_steps": 1}
    trainer = trainer_of(
        LlamaForCausalLM(tiny_config), tmp_path, meap={}, caft={"num_heads": HEADS}, **settings
    )
    trainer.train()
    wholes, examples = zip(*collated[:2], strict=True)
    times = {None: 1, "copies": 3}.get(parts, 2)
    assert torch.equal(sum(asked), times * sum(wholes))
    assert [entry["meap/examples_masked"] for entry in losses(trainer)] == list(examples)
    assert seen and all(PLAN not in keys for keys in seen)


def a_batch():
    """Two rows of 12 tokens, the first one a pair whose copy begins at 6."""
    ids = torch.arange(24).view(2, 12) + 5
    labels = torch.where(ids % 3 == 0, -100, ids)
    plan = torch.zeros_like(ids)
    plan[0, 6], plan[0, 8] = BOUNDARY, 4
    return {"input_ids": ids, "labels": labels, PLAN: plan}


def test_pieces_of_a_batch():
    batch, plans = a_batch(), StepPlans()
    plan = plans.take(batch, of_step=True)
    assert PLAN not in batch and plans.of(batch) is plan
    pieces = {
        "chunk with the boundary": {k: v[:, 3:9] for k, v in batch.items()},
        "chunk behind it": {k: v[:, 7:] for k, v in batch.items()},
        "one row of two": {k: v.reshape(1, -1) for k, v in batch.items()},
        "one row, the other order": {k: v.flip(0).reshape(1, -1) for k, v in batch.items()},
        "another text": {k: v + 40 for k, v in batch.items()},
        "nothing learned": {
            "input_ids": batch["input_ids"] + 40,
            "labels": torch.full((2, 12), -100),
        },
        "labels alone": {"labels": batch["labels"].clone()},
    }
    found = {
        name: (plans.of(piece) & BOUNDARY).nonzero().tolist() for name, piece in pieces.items()
    }
    assert found == {
        "chunk with the boundary": [[0, 3]],
        "chunk behind it": [],
        "one row of two": [[0, 6]],
        "one row, the other order": [[0, 18]],
        "another text": [],
        "nothing learned": [],
        "labels alone": [[0, 6]],
    }


def test_a_batch_that_came_another_way_is_counted_once():
    batch, plans = a_batch(), StepPlans()
    first, second = dict(batch), dict(batch)
    assert plans.take(first, of_step=False) is batch[PLAN]
    assert plans.take(second, of_step=False) is None and plans.take(first, of_step=True) is None
    assert plans.of(second) is batch[PLAN] and PLAN not in second
    assert plans.of({"labels": torch.zeros(3)}) is None
    plans.forget()
    assert plans.of(second) is None

"""Rows for MEAP, and runs of the plain transformers Trainer over them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import TrainerCallback

from builders.runs import CAFTTrainer, arguments
from builders.tiny import word_tokenizer
from caft_plugin.meap.doubling import Duplication
from caft_plugin.targets import IGNORE

MASK = 96  # w91 of the word tokenizer; no row below has it

EOS, PAD = 1, 0


def pad(rows):
    """What hosts do at least: right-padded input_ids, labels and attention_mask."""

    def padded(key, value):
        tensors = [torch.as_tensor(row[key]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    mask = [{"mask": torch.ones(len(row["input_ids"]), dtype=torch.long)} for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence([m["mask"] for m in mask], batch_first=True)
    return {
        "input_ids": padded("input_ids", PAD),
        "labels": padded("labels", IGNORE),
        "attention_mask": mask,
    }


def example(prompt=3, answer=60, seed=0, end=True):
    generator = np.random.default_rng(seed)
    ids = generator.integers(5, 90, prompt + answer).tolist() + [EOS] * end
    return {"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]}


def duplication(layout="concat", min_answer_tokens=51, max_length=None):
    return Duplication(layout, min_answer_tokens, max_length, special=(PAD, EOS, 2), blank=())


ROWS = [example(answer=n, seed=n) for n in (60, 20, 55, 58, 30, 52, 10, 61)]


class Batches(TrainerCallback):
    """Notes what the model is called with in training, and in evaluation."""

    def __init__(self, model):
        self.train, self.evaluation = [], []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, args, kwargs):
        (self.train if torch.is_grad_enabled() else self.evaluation).append(
            {key: kwargs[key].clone() for key in ("input_ids", "labels")} | {"keys": set(kwargs)}
        )


def trainer_of(
    model, folder, meap=None, caft=None, data=ROWS, evaluate=None, processing_class=None, **settings
):
    return CAFTTrainer(
        model=model,
        args=arguments(folder, **{"max_steps": -1, "num_train_epochs": 2, **settings}),
        train_dataset=data,
        eval_dataset=evaluate,
        data_collator=pad,
        processing_class=processing_class or word_tokenizer(""),
        meap={"mask_token": MASK, **meap} if meap is not None else None,
        caft=caft,
    )

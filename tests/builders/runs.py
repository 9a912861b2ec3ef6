"""Runs of the plain transformers Trainer over rows of very different lengths."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from builders.tiny import parameters_with_ours, word_tokenizer
from caft_plugin import with_caft
from caft_plugin.targets import IGNORE

CAFTTrainer = with_caft(Trainer)


def rows(lengths, prompt=2):
    """Rows whose answers have very different lengths."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in lengths:
        ids = torch.randint(1, 97, (length,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = IGNORE
        made.append({"input_ids": ids, "labels": labels})
    return made


def pad(examples):
    def padded(key, value):
        return torch.nn.utils.rnn.pad_sequence(
            [e[key] for e in examples], batch_first=True, padding_value=value
        )

    ids = padded("input_ids", 0)
    return {
        "input_ids": ids,
        "labels": padded("labels", IGNORE),
        "attention_mask": (ids != 0).long(),
    }


DATA = rows([4, 30, 7, 3, 22, 9, 5, 15, 28, 6, 3, 12, 19, 4, 8, 25])


def arguments(folder, **settings):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "max_steps": 3,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
            "seed": 3,
            **settings,
        }
    )


def trainer_of(
    model,
    folder,
    caft=None,
    trainer_class=CAFTTrainer,
    data=DATA,
    callbacks=None,
    evaluate=None,
    meap=None,
    **settings,
):
    more = {"caft": caft} if trainer_class is with_caft(trainer_class) else {}
    if meap is not None:
        more |= {"meap": meap, "processing_class": word_tokenizer("")}
    return trainer_class(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=evaluate,
        data_collator=pad,
        callbacks=callbacks,
        **more,
    )


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def lora(model):
    torch.manual_seed(11)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
    )


class Gradients(TrainerCallback):
    """Gradients as the optimizer is about to see them, at every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in parameters_with_ours(model)}
        )

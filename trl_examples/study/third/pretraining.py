"""Training a Llama from a random start, and measuring the saved model of its best epoch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    DataCollator,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from caft_plugin import CAFTConfig, MEAPConfig, with_caft
from study import measure, training
from study.measure import Model, Tokenizer
from study.protocol import Line, Run, Settings
from study.third import data, protocol

TRAINING_KEYS = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "optim",
    "warmup_steps",
)
ROWS_AT_ONCE = 48  # to measure a loss
Batch = dict[str, torch.Tensor]


def do(run: Run, settings: Settings, sizes: protocol.Sizes, folder: Path) -> Line:
    """Train until the validation loss stops improving, and measure the model of the best epoch."""
    tokenizer = data.load_tokenizer()
    trainer = trainer_of(run, settings, tokenizer, folder)
    validation = data.read("validation")[: sizes.validation]
    epochs = training.BestEpoch(
        trainer, lambda: mean_loss(trainer.model, validation), settings["patience"]
    )
    trainer.add_callback(epochs)
    figures = training.train(trainer)
    epochs.restore()
    figures["train_seconds"] = round(figures["train_seconds"] - epochs.seconds, 1)
    figures["tokens"] = figures["steps"] * settings["batch"] * settings["length"]
    figures["validation"] = [round(loss, 6) for loss in epochs.losses]
    metrics = epochs.figures()
    if not run.task.endswith("-pilot"):
        trainer.save_model()
        model = measure.load(folder).eval()
        metrics["test_loss"] = mean_loss(model, data.read("test")[: sizes.test])
        if (run.task, run.seed) == protocol.READ:
            verses = data.verses()[: sizes.verses]
            written = continuations(model, tokenizer, verses, sizes.new_tokens)
            figures |= {"verses": verses, "continuations": written}
    return {**figures, "metrics": metrics}


def trainer_of(run: Run, settings: Settings, tokenizer: Tokenizer, folder: Path) -> Trainer:
    set_seed(run.seed)
    rows = data.drawn(round(settings["rows"] * settings["times_rows"]), run.seed)
    collator: DataCollator = default_data_collator
    if settings["noise"]:
        collator = training.Noise(collator, settings["noise"], len(tokenizer), run.seed)
    return with_caft(Trainer)(
        model=with_dropout(llama(settings), settings["dropout"]),
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch"],
            **{key: settings[key] for key in TRAINING_KEYS},
            bf16=settings["bf16"] and measure.device() == "cuda",
            use_cpu=measure.device() == "cpu",
            logging_steps=max(1, len(rows) // settings["batch"]),  # an epoch
            logging_nan_inf_filter=False,  # waits for the GPU at each step
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=run.seed,
        ),
        processing_class=tokenizer,
        train_dataset=Rows(rows),
        data_collator=collator,
        caft=None if settings["caft"] is None else CAFTConfig(**settings["caft"]),
        meap=None if settings["meap"] is None else MEAPConfig(**settings["meap"]),
    )


class Rows(torch.utils.data.Dataset[Batch]):
    def __init__(self, rows: np.ndarray) -> None:
        self.rows = torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Batch:
        return {"input_ids": self.rows[number], "labels": self.rows[number]}


# -- the model -------------------------------------------------------------------------------------


def llama(settings: Settings) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings["vocabulary"],
            hidden_size=settings["width"],
            intermediate_size=settings["inner_width"],
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["attention_heads"],
            num_key_value_heads=settings["attention_heads"],
            max_position_embeddings=settings["length"],
            tie_word_embeddings=settings["tied"],
            attention_dropout=settings["dropout"],
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def with_dropout(model: LlamaForCausalLM, share: float) -> LlamaForCausalLM:
    """Add GPT-2's dropout, which Llama lacks: of embeddings and outputs of attention and MLP."""
    layers = [
        part
        for layer in model.model.layers
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    for module in [model.model.embed_tokens, *layers] if share else []:
        module.register_forward_hook(functools.partial(drop, share))
    return model


def drop(
    share: float, module: torch.nn.Module, inputs: object, output: torch.Tensor
) -> torch.Tensor:
    return torch.nn.functional.dropout(output, share, module.training)


# -- measures --------------------------------------------------------------------------------------


@torch.no_grad()
def mean_loss(model: Model, rows: np.ndarray) -> float:
    """Return the next-token loss in nats per token. A model in training mode stays in it."""
    was_training = model.training
    model.eval()
    total = 0.0
    for ids in torch.from_numpy(rows).to(model.device).split(ROWS_AT_ONCE):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        total += losses.double().sum().item()
    model.train(was_training)
    return total / rows[:, 1:].size


def continuations(
    model: Model, tokenizer: Tokenizer, verses: Sequence[Mapping[str, str]], new_tokens: int
) -> list[str]:
    """Return the model's greedy continuation of each verse's first half, up to the verse's end."""
    prompts = [verse["prompt"] for verse in verses]
    written = measure.write(model, tokenizer, prompts, new_tokens, batch=len(prompts))
    return [text.split("\n")[0] for text in written]

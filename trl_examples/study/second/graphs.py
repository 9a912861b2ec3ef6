"""Task B, looking ahead: paths in star graphs, on which next-token training is known to fail
(Bachmann and Nagarajan, 2024, arXiv 2403.06963), because each step but the first can be read off
the one before.

From a start node lead arms of equal length. A row lists all edges in random order, then start and
goal, then the path from start to goal, or on request from goal to start: in that direction each
step follows from the one before, and next-token training learns it.

A row as token ids: `a b |` for each edge, `=`, start, goal, `:`, the path. Nodes have random
    numbers in each graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from caft_plugin import CAFTConfig
from caft_plugin.targets import IGNORE
from study import measure
from study.measure import Model
from study.protocol import Line, Run, Settings
from study.second import protocol
from study.second.fine_tuning import Places, train
from study.second.gradients import MeasuredPlain

SPECIAL = 3  # the marks, whose ids follow those of the nodes
TRAINING_KEYS = (
    "learning_rate",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "optim",
    "warmup_steps",
)
Batch = dict[str, torch.Tensor]


def do(run: Run, settings: Settings, sizes: protocol.Sizes, places: Places) -> Line:
    """Train a small Llama from a random start on paths, and count the fresh ones that it finds."""
    trainer = trainer_of(run, settings, sizes, places)
    figures = train(trainer)
    model = trainer.model.eval()
    right = paths_right(model, settings, sizes.graphs)
    metrics = {"paths": float(right.all(1).mean()), "first": float(right[:, 1].mean())}
    if trainer.caft_parts.caft is not None:
        own = [on_paths(ids, settings) for ids in written_paths(model, settings, sizes.graphs)]
        metrics["tokens_per_pass"] = trainer.evaluate(own)["eval_caft/tokens_per_pass"]  # type: ignore[arg-type]
    return {**figures, "metrics": metrics}


def trainer_of(
    run: Run, settings: Settings, sizes: protocol.Sizes, places: Places
) -> MeasuredPlain:
    set_seed(run.seed)
    return MeasuredPlain(
        model=small_llama(settings),
        args=TrainingArguments(
            output_dir=str(places.trainer),
            max_steps=settings["steps"],
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,  # an item is a complete batch
            **{key: settings[key] for key in TRAINING_KEYS},
            use_cpu=measure.device() == "cpu",
            logging_steps=max(1, settings["steps"] // 40),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=run.seed,
        ),
        train_dataset=FreshGraphs(settings, run.seed),
        data_collator=the_batch,
        caft=None if settings["caft"] is None else CAFTConfig(**settings["caft"]),
        dose_every=sizes.dose_every,
    )


def small_llama(settings: Settings) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings["nodes"] + SPECIAL,
            hidden_size=settings["width"],
            intermediate_size=settings["width"] * 8 // 3,
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["attention_heads"],
            num_key_value_heads=settings["attention_heads"],
            max_position_embeddings=256,
            tie_word_embeddings=settings["tied"],
            bos_token_id=None,
            eos_token_id=None,
        )
    )


# -- data ------------------------------------------------------------------------------------------


def make(settings: Settings, number: int, seed: int | list[int]) -> np.ndarray:
    """Draw so many graphs as rows of token ids (number, length); the last `settings["length"]` are
    the path."""
    draw = np.random.default_rng(seed)
    nodes, arms, length = settings["nodes"], settings["arms"], settings["length"]
    end_of_edge, asks, answers = nodes, nodes + 1, nodes + 2
    named = draw.random((number, nodes)).argsort(axis=1)[:, : 1 + arms * (length - 1)]
    start = named[:, :1]
    paths = np.concatenate(
        [np.repeat(start[:, None], arms, axis=1), named[:, 1:].reshape(number, arms, length - 1)],
        axis=2,
    )
    edges = np.stack([paths[:, :, :-1], paths[:, :, 1:]], axis=-1).reshape(number, -1, 2)
    edges = np.concatenate([edges, np.full((*edges.shape[:2], 1), end_of_edge)], axis=2)
    order = draw.random(edges.shape[:2]).argsort(axis=1)
    listed = np.take_along_axis(edges, order[:, :, None], axis=1).reshape(number, -1)
    path = paths[np.arange(number), draw.integers(0, arms, number)]
    goal = path[:, -1:]
    said = path[:, ::-1] if settings["reversed"] else path
    marks = [np.full((number, 1), mark) for mark in (asks, answers)]
    return np.concatenate([listed, marks[0], start, goal, marks[1], said], axis=1)


def on_paths(ids: torch.Tensor, settings: Settings) -> Batch:
    """Make a batch of graphs (batch, length) whose loss is on their paths."""
    labels = ids.clone()
    labels[:, : -settings["length"]] = IGNORE
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


class FreshGraphs(torch.utils.data.Dataset[Batch]):
    """One item a step: a complete batch of graphs that no other step sees."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def __len__(self) -> int:
        return self.settings["steps"]

    def __getitem__(self, step: int) -> Batch:
        ids = torch.from_numpy(make(self.settings, self.settings["batch"], [1, self.seed, step]))
        return on_paths(ids, self.settings)


def the_batch(items: list[Batch]) -> Batch:
    (batch,) = items
    return batch


def tested(settings: Settings, number: int) -> list[torch.Tensor]:
    """Draw so many graphs that no run trains on, in batches (batch, length)."""
    rows = make(settings, number, [2])
    return [torch.from_numpy(part) for part in np.array_split(rows, max(1, number // 250))]


# -- measures --------------------------------------------------------------------------------------


@torch.no_grad()
def paths_right(model: Model, settings: Settings, number: int) -> np.ndarray:
    """Return (number, length), for each node of a fresh path: is it the model's first choice, those
    before it given? A path with all nodes right is what the model would write."""
    length, found = settings["length"], []
    for ids in tested(settings, number):
        logits = model(input_ids=ids[:, :-1].to(model.device), logits_to_keep=length).logits.cpu()
        found.append((logits.argmax(-1) == ids[:, -length:]).numpy())
    return np.concatenate(found)


@torch.no_grad()
def written_paths(model: Model, settings: Settings, number: int) -> Iterator[torch.Tensor]:
    """Yield fresh graphs with the paths that the model writes greedily, in batches (batch,
    length)."""
    length = settings["length"]
    for ids in tested(settings, number):
        asked = ids[:, :-length].to(model.device)
        seen = torch.ones_like(asked)
        yield model.generate(
            input_ids=asked, attention_mask=seen, do_sample=False, max_new_tokens=length
        ).cpu()

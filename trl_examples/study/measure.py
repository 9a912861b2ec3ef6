"""Measures of a trained language model: losses and first choices on given answers, and greedy
texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from caft_plugin.precision import cpu_has_bf16

Model = Any  # a PreTrainedModel that can generate, or a PeftModel around one
Tokenizer = PreTrainedTokenizerBase


class Asked(NamedTuple):
    """A prompt and its answer, as token ids."""

    prompt: list[int]
    answer: list[int]


class Judged(NamedTuple):
    """One answer: its tokens' summed loss in nats, their number, and whether each was the model's
    first choice."""

    loss: float
    tokens: int
    right: bool


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype() -> str:
    """Return the dtype of matrix products; weights are float32."""
    if device() == "cuda":
        return "TF32"
    return "bfloat16" if cpu_has_bf16() else "float32"


def load(folder: Path, **settings: object) -> Model:
    model: Model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    return model.to(device())


def asked(tokenizer: Tokenizer, rows: Sequence[dict[str, str]], end: bool = True) -> list[Asked]:
    """Tokenise rows of `prompt` and `completion`; with `end` the end token is part of the
    answer."""
    ends = [tokenizer.eos_token_id] if end else []
    return [
        Asked(tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids + ends)
        for row in rows
    ]


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """Make a batch padded on the left, so that answers end together."""
    length = max(map(len, rows))
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def on(where: torch.device, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(where) for key, value in inputs.items()}


def quickly(where: torch.device) -> torch.autocast:
    """Compute products in bfloat16 on a CPU that has instructions for it, elsewhere as the weights
    are."""
    return torch.autocast(
        where.type, dtype=torch.bfloat16, enabled=where.type == "cpu" and cpu_has_bf16()
    )


@torch.no_grad()
def judge(
    model: Model, rows: Sequence[Asked], pad: int, tokens_in_batch: int = 4096
) -> list[Judged]:
    """Judge each answer in one forward pass, rows of like length together. A model in training mode
    stays in it."""
    training = model.training
    model.eval()
    found: dict[int, Judged] = {}
    for batch in by_length([len(row.prompt) + len(row.answer) for row in rows], tokens_in_batch):
        inputs = on(model.device, padded([rows[i].prompt + rows[i].answer for i in batch], pad))
        longest = max(len(rows[i].answer) for i in batch)
        # A tensor, because what a number cuts is not contiguous, and the unembedding is then copied
        # for every row.
        keep = torch.arange(-longest - 1, 0, device=model.device)
        with quickly(model.device):
            logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()
        for i, of_row in zip(batch, logits, strict=True):
            answer = torch.tensor(rows[i].answer, device=model.device)
            before = of_row[-len(answer) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(before, answer, reduction="sum").item()
            found[i] = Judged(loss, len(answer), bool((before.argmax(-1) == answer).all()))
    model.train(training)
    return [found[i] for i in range(len(rows))]


def by_length(lengths: Sequence[int], tokens_in_batch: int) -> list[list[int]]:
    """Return indices in batches of at most so many tokens (but at least one row), padding counted,
    shortest first."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > tokens_in_batch:
            batches.append([])
        batches[-1].append(i)
    return batches


def mean(values: Iterable[float]) -> float:
    found = list(map(float, values))
    return sum(found) / len(found)


def mean_loss(judged: Sequence[Judged]) -> float:
    """Return nats per token, over all tokens."""
    return sum(one.loss for one in judged) / sum(one.tokens for one in judged)


@torch.no_grad()
def write(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, batch: int
) -> list[str]:
    """Return the model's greedy text after each prompt."""
    model.eval()
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = on(model.device, padded([ids[i] for i in chosen], tokenizer.pad_token_id))
        del inputs["position_ids"]  # generate makes its own from the mask
        with quickly(model.device):
            out = model.generate(
                **inputs,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        written = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        texts.update(zip(chosen, written, strict=True))
    return [texts[i].strip() for i in range(len(prompts))]

"""The base model's own answers to stage 1's prompts, kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from caft_plugin.config import PretrainConfig
from caft_plugin.errors import ConfigError, setting_as

logger = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer.

    Raises:
        ConfigError: neither the model nor the tokenizer names one.
    """
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ConfigError(
            "got a model without an eos_token_id, both in its generation_config and in its"
            " tokenizer, so the end of an answer is unknown. Set one. (Stage 1 needs none with"
            " targets `dataset`.)"
        )
    return ids


def fingerprint(model: PreTrainedModel) -> str:
    """Of a model's weights: a model that was trained again in the folder of the former has
    another."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(
            parameter.detach().flatten()[:64].cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def check_prompts(
    prompts: Sequence[Sequence[int]], config: PretrainConfig, context: int | None
) -> None:
    """Raises ConfigError where a row asks nothing, or leaves no room to answer."""
    empty = sum(not prompt for prompt in prompts)
    if empty:
        raise ConfigError(
            f"{setting_as('pretrain_heads', 'targets')}: `model` needs prompts, but {empty} of"
            f" {len(prompts)} rows have none (every token is supervised). Use `dataset` or"
            " `distribution` for plain text."
        )
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    length = len(prompts[longest])
    if context is not None and length + config.max_new_tokens > context:
        raise ConfigError(
            f"{setting_as('pretrain_heads', 'max_new_tokens')}: row {longest} has a prompt of"
            f" {length} tokens; with {config.max_new_tokens} new ones that is more than the model's"
            f" context of {context}. Remove long rows from the data, or lower this limit."
        )


class AnswerFile:
    """Answers as JSON lines, one a prompt, in the order of the prompts; a broken last line is
    dropped on opening.

    The first line holds what the answers depend on: model, prompts and sampling. A file with
    another first line is refused rather than mixed.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        self.path = path
        self.answers: list[list[int]] = []
        complete = 0  # bytes
        if path.exists():
            with open(path, "rb") as file:
                for number, line in enumerate(file):
                    if not line.endswith(b"\n"):
                        break
                    content = json.loads(line)
                    if number == 0 and content != header:
                        changed = [
                            k for k in {**header, **content} if content.get(k) != header.get(k)
                        ]
                        raise ConfigError(
                            f"pretrain_heads: {path} holds answers made with another"
                            f" {' and '.join(changed)}. Continue with the settings it was made"
                            " with, or move the file away to start again."
                        )
                    if number:
                        self.answers.append(content["answer"])
                    complete += len(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab")
        self.file.truncate(complete)
        if not complete:
            self._write(header)

    def _write(self, content: Mapping[str, object]) -> None:
        self.file.write((json.dumps(content) + "\n").encode())

    def add(self, answers: Iterable[list[int]]) -> None:
        for answer in answers:
            self._write({"answer": answer})
            self.answers.append(answer)
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: PretrainConfig,
    path: Path,
    name: str,
) -> list[list[int]]:
    """The base model's answer to each prompt, token ids with the end token where one came.

    Answers are appended to `path` batch by batch, so an interrupted run resumes where it stopped.

    Raises:
        ConfigError: no end token is known, a prompt leaves no room, or `path` holds other answers.
    """
    ends = end_tokens(model, tokenizer)
    check_prompts(
        prompts, config, getattr(model.config.get_text_config(), "max_position_embeddings", None)
    )
    digest = hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()
    header = {
        "base model": name,
        "weights": fingerprint(model),
        "prompts": digest,
        "sampling": config.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"}),
    }
    file = AnswerFile(path, header)
    try:
        done = len(file.answers)
        if done < len(prompts):
            with tqdm(
                total=len(prompts), initial=done, unit="answer", desc="generating answers"
            ) as bar:
                tokens = 0
                start = time.monotonic()
                for first in range(done, len(prompts), config.generation_batch_size):
                    batch = prompts[first : first + config.generation_batch_size]
                    answers = generate(model, tokenizer, batch, config, ends, first)
                    file.add(answers)
                    tokens += sum(map(len, answers))
                    bar.update(len(batch))
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s")
    finally:
        file.close()
    unfinished = sum(not answer or answer[-1] not in ends for answer in file.answers)
    asked_short = config.max_new_tokens < PretrainConfig().max_new_tokens
    if unfinished == len(prompts) and not asked_short:
        raise ConfigError(
            f"{setting_as('pretrain_heads', 'max_new_tokens')}: none of the {len(prompts)} answers"
            f" came to an end within {config.max_new_tokens} tokens. Raise this limit, or check the"
            f" chat template and the end token. The answers are in {path}: move the file away"
            " before you start again."
        )
    if unfinished:
        logger.warning(
            "%d of %d answers did not end within %d tokens; they are used as cut",
            unfinished,
            len(prompts),
            config.max_new_tokens,
        )
    return file.answers


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: PretrainConfig,
    ends: set[int],
    first: int,
) -> list[list[int]]:
    """Answers to one batch of prompts. The batch that starts at prompt `first` draws random numbers
    of its own, so an interrupted run writes what an uninterrupted one would have."""
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    ids = torch.tensor([[pad] * (length - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    sampling: dict[str, object] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if config.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": 0,
        }
    generating: Any = model
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed * 1_000_003 + first)
        out = generating.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            use_cache=True,
            **sampling,
        )
    answers = []
    for row in out[:, length:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append(row if end is None else row[: end + 1])
    return answers

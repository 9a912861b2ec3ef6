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
    """Return the ids that end an answer.

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
    """Return a digest of a model's weights: a model trained again in the same folder has
    another."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        first = parameter.detach().flatten()[:64].cpu().contiguous()
        digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_prompts(
    prompts: Sequence[Sequence[int]],
    config: PretrainConfig,
    context: int | None,
) -> None:
    """Raise ConfigError if a row asks nothing, or leaves no room to answer."""
    empty = sum(not prompt for prompt in prompts)
    if empty:
        raise ConfigError(
            f"{setting_as('pretrain_heads', 'targets')}: `model` needs prompts, but {empty} of"
            f" {len(prompts)} rows have none (every token is supervised). Use `dataset` or"
            " `distribution` for plain text."
        )
    lengths = [len(prompt) for prompt in prompts]
    length = max(lengths)
    longest = lengths.index(length)
    if context is not None and length + config.max_new_tokens > context:
        raise ConfigError(
            f"{setting_as('pretrain_heads', 'max_new_tokens')}: row {longest} has a prompt of"
            f" {length} tokens; with {config.max_new_tokens} new ones that is more than the model's"
            f" context of {context}. Remove long rows from the data, or lower this limit."
        )


def complete_lines(path: Path) -> list[bytes]:
    """Return a file's lines without the last one if its newline is missing: the process that wrote
    it was killed. No lines if there is no file."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return [line for line in file if line.endswith(b"\n")]


def refuse_other_settings(
    path: Path,
    found: Mapping[str, object],
    wanted: Mapping[str, object],
) -> None:
    """Raise ConfigError if a file's first line is not the wanted one."""
    changed = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if changed:
        raise ConfigError(
            f"pretrain_heads: {path} holds answers made with another {' and '.join(changed)}."
            " Continue with the settings it was made with, or move the file away to start again."
        )


class AnswerFile:
    """Answers as JSON lines, one for each prompt, in order; a broken last line is dropped.

    The first line holds what the answers depend on: model, prompts and sampling. A file with
    another first line is refused rather than mixed.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        lines = complete_lines(path)
        if lines:
            refuse_other_settings(path, json.loads(lines[0]), header)
        self.answers: list[list[int]] = [json.loads(line)["answer"] for line in lines[1:]]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab")
        # New answers would otherwise be appended to half a line.
        self.file.truncate(sum(map(len, lines)))
        if not lines:
            self._write(header)

    def _write(self, content: Mapping[str, object]) -> None:
        self.file.write((json.dumps(content) + "\n").encode())

    def add(self, answers: Iterable[list[int]]) -> None:
        for answer in answers:
            self._write({"answer": answer})
            self.answers.append(answer)
        # On disk before the next batch is generated, so no more than one batch is ever lost.
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
    """Return the base model's answer to each prompt, token ids up to and with the end token.

    Answers are appended to `path` batch by batch, so an interrupted run resumes where it stopped.

    Raises:
        ConfigError: no end token is known, a prompt leaves no room, or `path` holds other answers.
    """
    ends = end_tokens(model, tokenizer)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_prompts(prompts, config, context)
    # The batch size is not part of it, so that a killed run can resume with another one.
    digest = hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()
    header = {
        "base model": name,
        "weights": fingerprint(model),
        "prompts": digest,
        "sampling": config.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"}),
    }
    file = AnswerFile(path, header)
    try:
        write_missing(file, model, tokenizer, prompts, config, ends)
    finally:
        file.close()
    check_ends(file.answers, config, ends, path)
    return file.answers


def write_missing(
    file: AnswerFile,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: PretrainConfig,
    ends: set[int],
) -> None:
    """Generate the answers that the file does not hold yet, and add each batch to it."""
    done = len(file.answers)
    if done == len(prompts):
        return
    tokens = 0
    start = time.monotonic()
    with tqdm(
        total=len(prompts),
        initial=done,
        unit="answer",
        desc="generating answers",
    ) as bar:
        for first in range(done, len(prompts), config.generation_batch_size):
            batch = prompts[first : first + config.generation_batch_size]
            answers = generate(model, tokenizer, batch, config, ends, first)
            file.add(answers)
            tokens += sum(map(len, answers))
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s")


def check_ends(
    answers: Sequence[Sequence[int]],
    config: PretrainConfig,
    ends: set[int],
    path: Path,
) -> None:
    """Warn of answers without an end.

    Raises:
        ConfigError: none has one, although none was asked to be short.
    """
    unfinished = sum(not answer or answer[-1] not in ends for answer in answers)
    asked_short = config.max_new_tokens < PretrainConfig().max_new_tokens
    if unfinished == len(answers) and not asked_short:
        raise ConfigError(
            f"{setting_as('pretrain_heads', 'max_new_tokens')}: none of the {len(answers)} answers"
            f" came to an end within {config.max_new_tokens} tokens. Raise this limit, or check the"
            f" chat template and the end token. The answers are in {path}: move the file away"
            " before you start again."
        )
    if unfinished:
        logger.warning(
            "%d of %d answers did not end within %d tokens; they are used as cut",
            unfinished,
            len(answers),
            config.max_new_tokens,
        )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: PretrainConfig,
    ends: set[int],
    first: int,
) -> list[list[int]]:
    """Return the answers to one batch of prompts, the first of which is prompt `first`."""
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    # Padded on the left: generation continues from the last position.
    padding = [length - len(prompt) for prompt in prompts]
    rows = zip(prompts, padding, strict=True)
    ids = torch.tensor([[pad] * before + list(prompt) for prompt, before in rows])
    mask = torch.tensor([[0] * before + [1] * (length - before) for before in padding])
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
        # Each batch has its own random numbers, so an interrupted run writes what an uninterrupted
        # one would have.
        torch.manual_seed(config.seed * 1_000_003 + first)
        out = generating.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
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

"""Rows of stage 1: read from a file, padded into batches, split into prompt and answer."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from caft_plugin.errors import ConfigError
from caft_plugin.files import numbered_lines, read_text
from caft_plugin.targets import IGNORE

T = TypeVar("T")
Content = dict[str, Any]  # of a line of JSON
Row = dict[str, list[int]]  # input_ids, and labels with -100 where there is no loss


def prompt_of(row: Row) -> list[int]:
    """Return the tokens before the first one with a label: the prompt."""
    unlabelled = itertools.takewhile(lambda label: label == IGNORE, row["labels"])
    length = len(list(unlabelled))
    return list(row["input_ids"][:length])


def supervised(row: Row) -> bool:
    return any(label != IGNORE for label in row["labels"])


def with_answer(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    """Return a training row with a loss only on the answer."""
    return {
        "input_ids": [*prompt, *answer],
        "labels": [IGNORE] * len(prompt) + list(answer),
    }


def read_rows(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    option: str = "--data",
) -> list[Row]:
    """Read the rows of a JSONL file. Each line has `messages` (the first assistant turn is the
    answer), `prompt` and `completion`, or plain `text` (all of it has labels).

    Args:
        file: the JSONL file.
        tokenizer: of the model.
        max_length: longer rows are cut, in tokens.
        option: the file's name in messages.

    Raises:
        ConfigError: the file does not exist, or a line is none of these.
    """

    def read(content: Content) -> Row:
        prompt, answer = _prompt_and_answer(content, tokenizer)
        row = with_answer(prompt, answer)
        return {key: values[:max_length] for key, values in row.items()}

    return list(_read_lines(file, option, read))


def read_prompts(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    option: str = "--prompts",
) -> list[list[int]]:
    """Read the prompts (token ids) of a JSONL file: `messages` up to the first assistant turn,
    `prompt`, or `text` to continue. Other keys of a line are ignored. `option` is the file's name
    in messages.

    Raises:
        ConfigError: the file does not exist or is empty, or a line is none of these.
    """
    prompts = list(_read_lines(file, option, lambda content: _prompt(content, tokenizer)))
    if not prompts:
        raise ConfigError(
            f"{option}: {file} is empty. Give a JSONL file with a prompt on each line."
        )
    return prompts


def _read_lines(
    file: Path,
    option: str,
    read: Callable[[Content], T],
) -> Iterator[T]:
    lines = numbered_lines(read_text(file, option, "a JSONL file"))
    for number, line in tqdm(lines, unit="row", desc="tokenizing", delay=1):
        try:
            yield read(json.loads(line))
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise ConfigError(
                f"{option}: line {number} of {file} is not a row ({type(error).__name__}: {error})."
                ' A line is {"messages": [...]}, {"prompt": "...", "completion": "..."} or'
                ' {"text": "..."}.'
            ) from None


def _prompt(content: Content, tokenizer: Any) -> list[int]:
    if "messages" in content:
        messages = content["messages"]
        asked = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
        return tokenizer.apply_chat_template(
            list(asked),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    text = content["prompt"] if "prompt" in content else content["text"]
    ids = tokenizer(text).input_ids
    if not ids:
        raise ValueError("its prompt has no tokens")
    return ids


def _prompt_and_answer(content: Content, tokenizer: Any) -> tuple[list[int], list[int]]:
    if "messages" in content:
        messages = content["messages"]
        roles = (message["role"] for message in messages)
        turn = next(i for i, role in enumerate(roles) if role == "assistant")
        template = functools.partial(
            tokenizer.apply_chat_template, tokenize=True, return_dict=False
        )
        prompt = template(messages[:turn], add_generation_prompt=True)
        conversation = template(messages[: turn + 1])
        # The heads would learn from another prompt than the one that generation starts with.
        if conversation[: len(prompt)] != prompt:
            raise ValueError("the chat template changes the prompt's tokens when an answer follows")
        return prompt, conversation[len(prompt) :]
    end = []
    if tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    if "prompt" in content:
        prompt = tokenizer(content["prompt"]).input_ids
        completion = tokenizer(content["completion"], add_special_tokens=False).input_ids
        return prompt, completion + end
    text = tokenizer(content["text"]).input_ids
    return [], text + end


def pad_rows(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Return a batch, padded on the right: input_ids, labels and attention_mask (batch, longest
    row)."""
    length = max(len(row["input_ids"]) for row in rows)

    ids = []
    labels = []
    mask = []
    for row in rows:
        tokens = len(row["input_ids"])
        missing = length - tokens
        ids.append([*row["input_ids"], *[pad] * missing])
        labels.append([*row["labels"], *[IGNORE] * missing])
        mask.append([1] * tokens + [0] * missing)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }

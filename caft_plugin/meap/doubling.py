"""Add a copy, to be masked, to training examples, and keep the training set with and without
copies.

This happens before the host packs its training set or counts its steps. `DoubledSet` is the only
owner of both versions: a trainer, TRL's data preparation and Axolotl's plugin use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from caft_plugin.config import MEAPConfig
from caft_plugin.errors import ConfigError
from caft_plugin.meap.base_model import BaseModel
from caft_plugin.meap.label_codes import (
    after_original,
    codes,
    copy_codes,
    in_its_own_row,
    may_be_masked,
    runs,
    too_long,
    too_long_codes,
)
from caft_plugin.meap.roles import NOTHING_SAID, Roles, Said
from caft_plugin.meap.training_set import Row, TrainingSet, column_chunks, is_of_datasets, rows_of
from caft_plugin.targets import IGNORE

NOTHING_KNOWN = BaseModel()


@dataclasses.dataclass(frozen=True)
class Duplication:
    """Adds a copy, to be masked, to each example with a long enough answer.

    This is section 3 of the paper; the rule is that of the released code: more than 50 tokens, not
    counting end tokens. An answer is a run of supervised tokens. A conversation may have several:
    the rule applies to each, and one copy is used for all of them. `special` are ids that are never
    masked (`Roles`), `blank` those of white space, which after an answer's end token belongs to the
    template. `placeholders` are ids of tokens for images or sound. `length_column` is the column
    with each row's number of tokens, if there is one.
    """

    layout: str
    min_answer_tokens: int
    max_length: int | None
    special: tuple[int, ...]
    blank: tuple[int, ...]
    placeholders: tuple[int, ...] = ()
    length_column: str = "length"

    @classmethod
    def of(
        cls,
        config: MEAPConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        *,
        base: BaseModel = NOTHING_KNOWN,
        said: Said = NOTHING_SAID,
        length_column: str = "length",
    ) -> Duplication:
        """Create the duplication for a config and a tokenizer.

        Args:
            config: MEAP's settings.
            tokenizer: the model's tokenizer.
            max_length: of a pair, in tokens; None: no limit of the host's.
            base: facts about the base model, which also limits the length of a pair.
            said: the user's settings of tokens.
            length_column: the column with each row's number of tokens.
        """
        roles = Roles.of(tokenizer, base.roles, said)
        blank: set[int] = set()
        for text in ("\n", "\n\n", " ", "\r\n"):
            blank.update(tokenizer.encode(text, add_special_tokens=False))
        return cls(
            config.layout,
            config.min_answer_tokens,
            base.limit(max_length),
            special=tuple(sorted(roles.never_masked | base.placeholders)),
            blank=tuple(sorted(blank)),
            placeholders=tuple(sorted(base.placeholders)),
            length_column=length_column,
        )

    def copy_labels(self, ids: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Return the codes of an example's copy, or None if no answer is long enough. Arrays are
        (length,), int64."""
        special = np.isin(ids, self.special)
        blank = np.isin(ids, self.blank)
        maskable = np.zeros(len(ids), dtype=bool)
        for start, end in runs(labels != IGNORE):
            answer = slice(start, end)
            words = _words(special[answer], blank[answer])
            if start == 0:
                words[0] = False  # nothing predicts the first token
            if words.sum() >= self.min_answer_tokens:
                maskable[answer] = words
        return copy_codes(labels, maskable) if maskable.any() else None

    def __call__(self, example: Row) -> list[Row]:
        """Return the row or rows made from an example.

        Raises:
            ConfigError: the row is not tokenised, has no labels, is already doubled, or would be a
                pair with images.
        """
        for key in ("input_ids", "labels"):
            if key not in example:
                raise ConfigError(
                    "meap: training rows need `input_ids` and `labels`, but these have"
                    f" {', '.join(example)}. Tokenise them with labels of -100 on the prompt, or"
                    " use `mode: pretrain`, which needs no labels in rows."
                )
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        labels = np.asarray(example["labels"], dtype=np.int64)
        if codes(labels).any():
            raise ConfigError(
                "meap: the training rows are from a training set that already has masked copies"
                " (their labels have MEAP's codes). Use the original rows."
            )
        copy = self.copy_labels(ids, labels)
        if copy is None:
            return [dict(example)]
        if self.layout == "separate":
            return [dict(example), _with_labels(example, in_its_own_row(copy))]
        if self.max_length is not None and 2 * len(ids) > self.max_length:
            return [_with_labels(example, too_long_codes(labels))]
        self._refuse_media(example, ids)
        return [self._pair(example, np.concatenate([labels, after_original(copy)]))]

    def _refuse_media(self, example: Row, ids: np.ndarray) -> None:
        columns = [key for key in example if key.startswith(("pixel_values", "input_features"))]
        placeholders = ids[np.isin(ids, self.placeholders)]
        if columns:
            seen = f"the column {columns[0]}"
        elif len(placeholders):
            seen = f"token id {placeholders[0]}"
        else:
            return
        raise ConfigError(
            "meap.layout: got concat, but a training row contains images, video or sound"
            f" ({seen}), which would occur twice in one sequence. Use layout: separate, or"
            " mode: pretrain."
        )

    def _pair(self, example: Row, labels: np.ndarray) -> Row:
        """Return an example twice in one row, with the pair's labels."""
        length = len(example["input_ids"])
        pair = dict(example)
        for key, value in example.items():
            if np.ndim(value) == 1 and len(value) == length:  # a value for each token
                twice = np.tile(np.asarray(value), 2)
                pair[key] = like(value, twice)
        if "position_ids" in pair:
            # in the host's attention, a pair is one document: the copy sees its original
            pair["position_ids"] = like(pair["position_ids"], np.arange(2 * length))
        if self.length_column in pair:
            pair[self.length_column] = 2 * length
        return _with_labels(pair, labels)

    def doubled_rows(self, batch: Mapping[str, list]) -> dict[str, list]:
        examples = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        made = list(itertools.chain.from_iterable(map(self, examples)))
        return {key: [row[key] for row in made] for key in (made[0] if made else batch)}

    def doubled(self, dataset: TrainingSet) -> TrainingSet:
        """Return the training set with copies.

        A set of `datasets` (also streamed) keeps its type; any other map-style set is read once,
        into a list.

        Raises:
            ConfigError: the set makes its rows at each access, or cannot be doubled for another
                reason.
        """
        if is_of_datasets(dataset, "Dataset") and dataset.format["type"] == "custom":
            raise ConfigError(
                "meap.mode: got sft, but the training set makes its rows when they are read"
                " (with_transform or set_transform), so they cannot be copied. Use Dataset.map(...)"
                " instead of the transform, or use mode: pretrain, which accepts such a set."
            )
        if is_of_datasets(dataset, "Dataset"):
            from datasets import Sequence, Value

            features = None
            if "labels" in dataset.column_names:
                features = dataset.features.copy()
                features["labels"] = Sequence(Value("int64"))
            return dataset.map(
                self.doubled_rows,
                batched=True,
                features=features,
                desc="Adding copies to be masked",
            )
        if is_of_datasets(dataset, "IterableDataset"):
            return dataset.map(self.doubled_rows, batched=True)
        if isinstance(dataset, TorchIterableDataset):
            raise ConfigError(
                f"meap: the training set is a {type(dataset).__name__}, a stream that cannot be"
                " doubled. Use a `datasets.IterableDataset` or a map-style data set."
            )
        return list(itertools.chain.from_iterable(map(self, rows_of(dataset))))


def _words(special: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """Return which tokens of an answer may be masked, given its special and blank ones: boolean
    arrays, (length,)."""
    words = ~special
    if special.any():
        last = int(np.flatnonzero(special)[-1])
        if blank[last + 1 :].all():  # white space after the end token belongs to the template
            words[last:] = False
    return words


def _with_labels(row: Row, labels: np.ndarray) -> Row:
    return {**row, "labels": like(row["labels"], labels)}


def nothing_to_mask(dataset: TrainingSet) -> str | None:
    """Return why a doubled training set has no masked copy, with counts; None if it has one or is
    streamed."""
    if not hasattr(dataset, "__len__"):
        return None
    cut_out = 0
    for labels in column_chunks(dataset, "labels"):
        if labels is None or may_be_masked(labels).any():
            return None
        cut_out += int(too_long(labels).sum())
    return (
        f"none of the {len(dataset)} training rows has a masked copy, so this is a plain run:"
        f" {cut_out} examples are too long for a pair, the others have no answer that is long"
        " enough. Lower meap.min_answer_tokens, or use layout: separate or a longer sequence"
        " length"
    )


def like(value: object, array: np.ndarray) -> Tensor | np.ndarray | list:
    """Return `array` converted to the type of `value`: a tensor, an array or a list."""
    if isinstance(value, Tensor):
        return torch.from_numpy(array)
    return array if isinstance(value, np.ndarray) else array.tolist()


class DoubledSet:
    """The training set of one run, with copies to be masked and without them.

    `current` is the set to train on: in mode sft the doubled one, in mode pretrain the host's own.
    `plain`, if there is one, makes the same set without copies. `why_plain` says why `current` has
    nothing to mask; None if it has, or is streamed.
    """

    def __init__(self, config: MEAPConfig, said: Said = NOTHING_SAID) -> None:
        """`said` are the user's settings of tokens."""
        self.config = config
        self.said = said
        self.current: TrainingSet = None
        self.plain: Callable[[], TrainingSet] | None = None
        self.why_plain: str | None = None

    def double(
        self,
        dataset: TrainingSet,
        processing_class: object,
        base: BaseModel,
        max_length: int | None = None,
        *,
        args: TrainingArguments | None = None,
        finish: Callable[[TrainingSet], TrainingSet] | None = None,
    ) -> TrainingSet:
        """Return a training set with copies, which is `current` from now on.

        Args:
            dataset: the training set, tokenised.
            processing_class: the tokenizer, or a processor with one.
            base: facts about the base model, which also limits the length of a pair.
            max_length: of a pair, in tokens; None: no limit of the host's.
            args: the trainer's arguments; None before there are any.
            finish: the host's preparation of doubled rows: truncation, packing.

        Raises:
            ConfigError: there is no tokenizer, or the set cannot be doubled.
        """
        tokenizer = tokenizer_of(processing_class)
        column = "length" if args is None else args.length_column_name
        duplication = Duplication.of(
            self.config, tokenizer, max_length, base=base, said=self.said, length_column=column
        )
        # The host's preparation waits for other processes itself: it must not run inside of this.
        with contextlib.nullcontext() if args is None else args.main_process_first():
            doubled = duplication.doubled(dataset)
        self.current = doubled if finish is None else finish(doubled)
        self.plain = lambda: dataset if finish is None else finish(dataset)
        return self.current

    def use(self, dataset: TrainingSet) -> None:
        """Train on a data set from now on; in mode sft, one with copies."""
        if dataset is not self.current:
            self.plain = None  # it belongs to another set
        self.current = dataset
        self.why_plain = None
        if self.config.mode == "sft" and dataset is not None:
            self.why_plain = nothing_to_mask(dataset)

    def as_evaluated(self, dataset: TrainingSet) -> TrainingSet:
        """Return the data set to evaluate: for the doubled training set, the one without copies."""
        return dataset if self.plain is None or dataset is not self.current else self.plain()


def tokenizer_of(processing_class: object) -> PreTrainedTokenizerBase:
    """Return a trainer's tokenizer, which may be inside a processor.

    Raises:
        ConfigError: the trainer has no tokenizer.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None:
        raise ConfigError(
            "meap: the trainer has no tokenizer, which is needed to find special tokens. Pass "
            "processing_class=tokenizer."
        )
    return cast(PreTrainedTokenizerBase, tokenizer)

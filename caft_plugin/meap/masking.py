"""MEAP: add a masked copy to training examples, and draw the masks for each batch.

There are two steps. Before the host packs its training set or counts its steps, `Duplication` adds
a copy to each example whose answers are long enough. After the host's collator has made a batch,
`MEAPCollator` draws the masks. In between, the labels encode what may be masked, because every host
pads, truncates and packs labels together with the tokens and drops other columns: see COPY, KEPT,
COPY_START, ELIGIBLE and TOO_LONG.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from caft_plugin.config import MEAPConfig
from caft_plugin.errors import ConfigError
from caft_plugin.meap.roles import Roles
from caft_plugin.meap.training_set import Row, TrainingSet, column_chunks, is_of_datasets, rows_of
from caft_plugin.targets import (
    BOUNDARY,
    EXAMPLE,
    IGNORE,
    MASKED,
    MAY_MASK,
    OVERLONG,
    PLAN,
    Batch,
    document_ids,
)

logger = logging.getLogger(__name__)

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, Tensor)

# Codes of labels between duplication and collation; a batch has none of them:
COPY = -101  # a token of a copy outside its answers
KEPT = -102  # a supervised token of a copy that is never masked: special, or an end token
COPY_START = -103  # the first token of a copy after its original
ELIGIBLE = 2**24  # + token id: a token of a copy that may be masked
TOO_LONG = 2**25  # + token id: the last supervised token of an example whose pair would be too long


def runs(inside: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return start and end of each maximal run of True in a boolean row."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], inside.astype(np.int8), [0]))))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


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
        placeholders: Iterable[int] = (),
        roles: Roles | None = None,
        length_column: str = "length",
    ) -> Duplication:
        """Create the duplication for a config and a tokenizer.

        Args:
            config: MEAP's settings.
            tokenizer: the model's tokenizer.
            max_length: of a pair, in tokens; None: no limit.
            placeholders: ids of tokens for images or sound.
            roles: from the tokenizer, the base model and the user's settings; None: from the
                tokenizer only.
            length_column: the column with each row's number of tokens.
        """
        roles = Roles.of(tokenizer) if roles is None else roles
        white = [
            tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "\n\n", " ", "\r\n")
        ]
        return cls(
            config.layout,
            config.min_answer_tokens,
            max_length,
            special=tuple(sorted(roles.never_masked.union(placeholders))),
            blank=tuple(sorted({id_ for ids in white for id_ in ids})),
            placeholders=tuple(sorted(placeholders)),
            length_column=length_column,
        )

    def copy_labels(self, ids: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Return the labels of an example's copy, or None if no answer is long enough. Arrays are
        (length,), int64."""
        coded = np.where(labels == IGNORE, COPY, KEPT)
        special = np.isin(ids, self.special)
        blank = np.isin(ids, self.blank)
        found = False
        for start, end in runs(labels != IGNORE):
            maskable = ~special[start:end]
            if special[start:end].any():
                last = int(np.flatnonzero(special[start:end])[-1])
                if blank[start + last + 1 : end].all():
                    maskable[last:] = False
            if start == 0:
                maskable[0] = False  # nothing predicts the first token
            if maskable.sum() >= self.min_answer_tokens:
                found = True
                coded[start:end][maskable] = labels[start:end][maskable] + ELIGIBLE
        return coded if found else None

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
        ids, labels = (np.asarray(example[key], dtype=np.int64) for key in ("input_ids", "labels"))
        if codes(labels).any():
            raise ConfigError(
                "meap: the training rows are from a training set that already has masked copies"
                " (their labels have MEAP's codes). Use the original rows."
            )
        copy = self.copy_labels(ids, labels)
        if copy is None:
            return [dict(example)]
        if self.layout == "separate":
            copy[0] = IGNORE  # so that two copies in one packed row are two runs
            return [dict(example), {**example, "labels": like(example["labels"], copy)}]
        if self.max_length is not None and 2 * len(ids) > self.max_length:
            marked = labels.copy()
            marked[1 + np.flatnonzero(labels[1:] != IGNORE)[0]] += TOO_LONG
            return [{**example, "labels": like(example["labels"], marked)}]
        media = [key for key in example if key.startswith(("pixel_values", "input_features"))]
        if media or np.isin(ids, self.placeholders).any():
            seen = (
                f"the column {media[0]}"
                if media
                else f"token id {ids[np.isin(ids, self.placeholders)][0]}"
            )
            raise ConfigError(
                "meap.layout: got concat, but a training row contains images, video or sound"
                f" ({seen}), which would occur twice in one sequence. Use layout: separate, or"
                " mode: pretrain."
            )
        copy[0] = COPY_START
        pair = {
            key: (
                like(value, np.tile(np.asarray(value), 2))
                if np.ndim(value) == 1 and len(value) == len(ids)
                else value
            )
            for key, value in example.items()
        }
        pair["labels"] = like(example["labels"], np.concatenate([labels, copy]))
        if "position_ids" in pair:
            pair["position_ids"] = like(pair["position_ids"], np.arange(2 * len(ids)))
        if self.length_column in pair:
            pair[self.length_column] = 2 * len(ids)
        return [pair]

    def doubled_rows(self, batch: Mapping[str, list]) -> dict[str, list]:
        examples = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        made = [row for example in examples for row in self(example)]
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
        return [row for example in rows_of(dataset) for row in self(example)]


def codes(labels: ArrayOrTensor) -> ArrayOrTensor:
    """Return a mask of the labels (an array or a tensor) that are codes for the collator."""
    return (labels < IGNORE) | (labels >= ELIGIBLE)


def has_target(row: Row) -> bool:
    """Return True if a doubled and then truncated row still has a token that is, or may be, a
    target."""
    return any(label >= 0 for label in row["labels"])


def nothing_to_mask(dataset: TrainingSet) -> str | None:
    """Return why a doubled training set has no masked copy, with counts; None if it has one or is
    streamed."""
    if not hasattr(dataset, "__len__"):
        return None
    too_long = 0
    for labels in column_chunks(dataset, "labels"):
        if labels is None or ((labels >= ELIGIBLE) & (labels < TOO_LONG)).any():
            return None
        too_long += int((labels >= TOO_LONG).sum())
    return (
        f"none of the {len(dataset)} training rows has a masked copy, so this is a plain run:"
        f" {too_long} examples are too long for a pair, the others have no answer that is long"
        " enough. Lower meap.min_answer_tokens, or use layout: separate or a longer sequence"
        " length"
    )


def plain_labels(ids: Tensor, labels: Tensor, layout: str) -> Tensor:
    """Return the original labels of rows from a doubled training set, for evaluation.

    A copy after its original is not evaluated again; a copy in its own row is evaluated like its
    original.
    """
    labels = torch.where(labels >= TOO_LONG, labels - TOO_LONG, labels)
    if layout == "separate":
        labels = torch.where(labels == KEPT, ids, labels)
        labels = torch.where(labels >= ELIGIBLE, labels - ELIGIBLE, labels)
    return labels.masked_fill(codes(labels), IGNORE)


def like(value: Any, array: np.ndarray) -> Any:
    """Return `array` converted to the type of `value`: a tensor, an array or a list."""
    if isinstance(value, Tensor):
        return torch.from_numpy(array)
    return array if isinstance(value, np.ndarray) else array.tolist()


class MEAPCollator:
    """Calls the host's collator and draws masks into its batches.

    An example's masks depend only on the seed, the epoch and its tokens. `epoch` is in shared
    memory, so that worker processes that live longer than an epoch see it change.

    A batch has an extra key, `meap_plan` (batch, length), with the bits BOUNDARY, MAY_MASK, MASKED,
    EXAMPLE (one token of each masked example) and OVERLONG (one token of each example that is too
    long for a pair).

    Mode pretrain masks neither `placeholders` (ids for images or sound) nor tokens with `roles`; in
    mode sft, the labels encode what may be masked. `masked`, only set in the main process, is True
    if a batch had masks.
    """

    def __init__(
        self,
        host: Callable[..., dict[str, Tensor]],
        config: MEAPConfig,
        mask_id: int,
        seed: int,
        placeholders: Iterable[int] = (),
        roles: Iterable[int] = (),
    ) -> None:
        self.host = host
        self.config = config
        self.mask_id = mask_id
        self.seed = seed
        self.placeholders = sorted(placeholders)
        self.roles = sorted(roles)
        self.masked = False
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __call__(self, features: Sequence[Row | list[Row]], *args, **kwargs) -> dict[str, Tensor]:
        batch = self.host(features, *args, **kwargs)
        if PLAN in batch:
            raise ConfigError(
                f"meap: {self._host_name()} already draws masks (it is from another trainer with"
                " `meap`). Pass the original collator to the trainer."
            )
        if "labels" not in batch:
            raise ConfigError(
                f"meap: {self._host_name()} made a batch without labels. Use a collator that adds"
                " them."
            )
        ids = batch["input_ids"].clone()
        labels = batch["labels"].clone()
        sft = self.config.mode == "sft"
        if sft and not codes(labels).any() and any(carries_codes(row) for row in features):
            raise ConfigError(
                f"meap: {self._host_name()} replaces the rows' labels with its own, so masks cannot"
                " be drawn. Use one that pads the rows' labels, such as"
                " transformers.DataCollatorForSeq2Seq(tokenizer)."
            )
        plan = torch.zeros_like(labels)
        draw = self._mask_copies if sft else self._mask_documents
        draw(batch, ids.numpy(), labels.numpy(), plan.numpy())
        batch["input_ids"], batch["labels"], batch[PLAN] = ids, labels, plan
        return batch

    def _host_name(self) -> str:
        return f"the data collator {getattr(self.host, '__name__', type(self.host).__name__)}"

    def _mask_copies(
        self, batch: Batch, ids: np.ndarray, labels: np.ndarray, plan: np.ndarray
    ) -> None:
        for row_ids, row, marks in zip(ids, labels, plan, strict=True):
            too_long = row >= TOO_LONG
            row[too_long] -= TOO_LONG
            marks[too_long] |= OVERLONG
            marks[row == COPY_START] |= BOUNDARY
            for start, end in list(runs((row < IGNORE) | (row >= ELIGIBLE))):
                first = start + (row[start] == COPY_START)  # the same tokens in both layouts
                generator = self._generator(row_ids[first:end])
                drawn: list[int] = []
                for a, b in runs((row[start:end] >= ELIGIBLE) | (row[start:end] == KEPT)):
                    eligible = start + a + np.flatnonzero(row[start + a : start + b] >= ELIGIBLE)
                    if len(eligible):
                        marks[eligible] |= MAY_MASK
                        drawn += self._draw(generator, eligible.tolist(), len(eligible))
                wanted = row[drawn] - ELIGIBLE
                row[start:end] = IGNORE
                row[drawn], row_ids[drawn] = wanted, self.mask_id
                marks[drawn] |= MASKED
                marks[drawn[:1]] |= EXAMPLE

    def _mask_documents(
        self, batch: Batch, ids: np.ndarray, labels: np.ndarray, plan: np.ndarray
    ) -> None:
        documents = document_ids(batch)
        documents_by_row = np.zeros_like(ids) if documents is None else documents.cpu().numpy()
        for row_ids, row, marks, documents_of_row in zip(
            ids, labels, plan, documents_by_row, strict=True
        ):
            starts = np.flatnonzero(np.diff(documents_of_row, prepend=documents_of_row[0] - 1))
            for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
                supervised = np.flatnonzero(row[start:end] != IGNORE)
                if documents_of_row[start] < 0 or not len(supervised):
                    continue
                length = int(supervised[-1]) + 1  # without padding
                text = ~np.isin(row_ids[start : start + length], self.placeholders)
                words = text & ~np.isin(row_ids[start : start + length], self.roles)
                eligible = (start + np.flatnonzero(words[:-1])).tolist()
                if not eligible:
                    continue
                generator = self._generator(row_ids[start : start + length])
                drawn = self._draw(generator, eligible, int(text.sum()))
                row_ids[drawn] = self.mask_id
                marks[eligible] |= MAY_MASK
                marks[drawn] |= MASKED
                marks[drawn[:1]] |= EXAMPLE

    def _generator(self, ids: np.ndarray) -> random.Random:
        key = f"{self.seed} {int(self.epoch)} ".encode() + ids.astype(np.int64).tobytes()
        return random.Random(hashlib.blake2b(key, digest_size=16).digest())

    def _draw(self, generator: random.Random, eligible: list[int], tokens: int) -> list[int]:
        return generator.sample(
            eligible, min(max(1, int(tokens * self.config.ratio)), len(eligible))
        )


def carries_codes(row: Row | list[Row]) -> bool:
    """Return True if the labels of a row, or of one in a list of rows, have codes."""
    if isinstance(row, list):
        return any(carries_codes(part) for part in row)
    return "labels" in row and bool(codes(np.asarray(row["labels"])).any())


class EpochOfMasks(TrainerCallback):
    """Sets the collator's epoch, also in a resumed run, and warns at the end if nothing was
    masked."""

    def __init__(self, collator: MEAPCollator) -> None:
        self.collator = collator
        self.next = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.next = int(state.epoch or 0)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.collator.epoch.fill_(self.next)
        self.next += 1

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if not self.collator.masked and state.is_world_process_zero:
            logger.warning(
                "meap: no token was masked in %d steps, so this was a plain run. %s",
                state.global_step,
                (
                    "No answer was long enough (meap.min_answer_tokens), every pair was too long,"
                    " or the data loader read a training set other than the trainer's"
                    if self.collator.config.mode == "sft"
                    else "No document had two tokens of text"
                ),
            )

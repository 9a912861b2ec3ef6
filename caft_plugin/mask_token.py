"""The token that MEAP writes over masked ones: one that is already there, or one vector more, never another shape."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from caft_plugin.checkpoint import as_shards_of, gathered, write_whole
from caft_plugin.config import ConfigError
from caft_plugin.heads import HiddenSubmodule

# Names that makers of models give to tokens kept for later use: <|reserved_special_token_0|>, <unused0>, [control_8],
# <|placeholder1|>, <|dummy_0|>.
SPARE_NAME = re.compile(r"[<\[].*(reserved|unused|place.?holder|dummy|control_\d).*[>\]]", re.IGNORECASE)
MODULE_NAME = "caft_mask_token"
FILE = Path("caft_meap") / "mask_token.safetensors"


@dataclasses.dataclass(frozen=True)
class MaskToken:
    """`id` is what goes into input_ids; `added` says that it is the id after the embedding's last row."""

    id: int
    words: str
    added: bool = False


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of every token that the tokenizer marks as special, with or without a role."""
    marked = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked.union(tokenizer.all_special_ids)


def choose_mask_token(
    wanted: int | str, tokenizer: PreTrainedTokenizerBase, rows: int, used: frozenset[int] | None
) -> MaskToken:
    """The mask token for a model whose input embedding has `rows` rows.

    `auto` takes the first there is of: the tokenizer's mask token; a token with a name of reserve; a row beyond the
    tokenizer's last id; a special token that the chat template does not contain and the data does not use.

    Args:
        used: ids in the training data, None where they cannot be known (streamed data).

    Raises:
        ConfigError: no such token, or the one that was asked for is missing or in use.
    """
    if wanted == "add":
        return MaskToken(rows, f"added: id {rows}, one more input vector beside the {rows} of the model", added=True)
    vocabulary = tokenizer.get_vocab()
    text_of = {id_: text for text, id_ in vocabulary.items()}
    template = str(tokenizer.chat_template or "")

    def free(id_: int) -> bool:
        return 0 <= id_ < rows and id_ not in (used or ()) and text_of.get(id_, "\0") not in template

    def found(id_: int, why: str) -> MaskToken:
        return MaskToken(id_, f"{text_of.get(id_, 'a row without a token')!r} (id {id_}), {why}")

    if wanted != "auto":
        return _as_asked(wanted, vocabulary, text_of, rows, used, found)
    if tokenizer.mask_token_id is not None and free(tokenizer.mask_token_id):
        return found(tokenizer.mask_token_id, "the tokenizer's mask token")
    for id_ in sorted(id_ for text, id_ in vocabulary.items() if SPARE_NAME.fullmatch(text)):
        if free(id_):
            return found(id_, "a token kept in reserve")
    spare = max(vocabulary.values()) + 1
    if free(spare):
        return found(spare, f"the first of {rows - spare} embedding rows that the tokenizer does not use")
    if used is not None:
        taken = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        for id_ in sorted(special_ids(tokenizer) - taken):
            if free(id_):
                return found(id_, "a special token that neither the chat template nor the data uses")
    raise ConfigError(
        "meap.mask_token: auto found no mask token, no reserved token, no spare embedding row and no unused special "
        f"token{'' if used is not None else ' (streamed data cannot be searched for them)'}. Set mask_token: add, "
        "which adds one input vector and leaves the model's shape alone, or name a token."
    )


def _as_asked(wanted: Any, vocabulary: Any, text_of: Any, rows: int, used: Any, found: Any) -> MaskToken:
    id_ = vocabulary.get(wanted) if isinstance(wanted, str) else wanted
    if id_ is None:
        raise ConfigError(
            f"meap.mask_token: got {wanted!r}, which is not a token of this tokenizer. It takes auto, add, a token's "
            "text as the vocabulary has it, or a token id."
        )
    if not 0 <= id_ < rows:
        raise ConfigError(
            f"meap.mask_token: got {wanted!r} (id {id_}), but the model's input embedding has {rows} rows. It takes an "
            f"id from 0 to {rows - 1}, or add."
        )
    if id_ in (used or ()):
        raise ConfigError(
            f"meap.mask_token: got {wanted!r} (id {id_}), but the training data contains it, so the model could not "
            "tell masks from text. Name a token that the data does not use, or set auto or add."
        )
    return found(id_, "as asked")


def used_ids(dataset: Any) -> frozenset[int] | None:
    """Token ids in the `input_ids` of a map-style data set; None where there are none to be looked through."""
    if not hasattr(dataset, "__len__"):
        return None
    used: set[int] = set()
    for ids in _id_chunks(dataset):
        if ids is None:
            return None
        used.update(np.flatnonzero(np.bincount(ids)).tolist())
    return frozenset(used)


def _id_chunks(dataset: Any) -> Iterator[np.ndarray | None]:
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        if "input_ids" not in dataset.column_names:
            yield None
            return
        for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(1000):
            yield table.column("input_ids").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    else:
        for row in dataset:
            yield np.asarray(row["input_ids"], dtype=np.int64) if "input_ids" in row else None


class AddedMaskToken(nn.Module):
    """One input vector more, for the id after the embedding's last row; also the handle that puts it on a model and
    takes it off, and a context manager.

    It starts as the mean of the table's outputs and trains where the table trains. While it is on, it is the submodule
    `caft_mask_token` of the outermost model, left out of the model's state dict.
    """

    def __init__(self, model: nn.Module, token: MaskToken) -> None:
        super().__init__()
        base: Any = model
        embedding = base.get_input_embeddings()
        with torch.no_grad():
            chunks = torch.arange(token.id, device=embedding.weight.device).split(4096)
            mean = sum(embedding(ids).float().sum(0) for ids in chunks) / token.id
        trainable = any(parameter.requires_grad for parameter in embedding.parameters())
        self.vector = nn.Parameter(mean.to(embedding.weight.dtype), requires_grad=trainable)
        self.token = token
        self._where: Tensor | None = None
        self._embedding = (embedding,)  # in a tuple, so that it is no submodule of this one
        self.hidden = HiddenSubmodule(model, MODULE_NAME, self)
        self._handles: list[Any] = []

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> AddedMaskToken:
        """Puts vector and hooks on the model. Doing it twice does no harm.

        Raises:
            ConfigError: another trainer's vector is on it.
        """
        if not self.attached:
            (embedding,) = self._embedding
            self.hidden.attach()
            self.vector.data = self.vector.data.to(embedding.weight.device)
            self._handles = [
                embedding.register_forward_pre_hook(self._before),
                embedding.register_forward_hook(self._after),
            ]
        return self

    def _before(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._where = args[0] == self.token.id
        return (args[0].masked_fill(self._where, self.token.id - 1), *args[1:])

    def _after(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        where, self._where = self._where, None
        assert where is not None
        return torch.where(where[..., None], self.vector.to(output.dtype), output)

    def detach(self) -> None:
        """Takes vector and hooks off the model. Doing it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.hidden.detach()

    def __enter__(self) -> AddedMaskToken:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def save(self, folder: Path, write: bool) -> None:
        """Writes the vector into `folder`. Every process has to call it; the one with `write` writes."""
        vector = gathered(self.vector)
        if write:
            (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
            write_whole(folder / FILE, lambda path: save_file({"vector": vector}, path, {"format": "pt"}))

    def load(self, folder: Path) -> None:
        """Puts the vector back as a checkpoint holds it.

        Raises:
            ConfigError: the checkpoint has none, or one of another size.
        """
        try:
            vector = load_file(folder / FILE)["vector"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ConfigError(
                f"meap.mask_token: {folder / FILE} cannot be read ({error}), so this checkpoint was not made with "
                "mask_token: add. Resume with the setting it was made with, or start anew."
            ) from None
        if vector.shape != self.vector.shape:
            raise ConfigError(
                f"meap.mask_token: {folder / FILE} holds a vector of shape {tuple(vector.shape)}, but this model needs "
                f"{tuple(self.vector.shape)}. Resume with the model the checkpoint was made with."
            )
        with torch.no_grad():
            self.vector.copy_(as_shards_of(self.vector, vector))

"""The token that MEAP writes over masked ones: one that is already there, or one vector more, never another shape."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from caft_plugin.config import ConfigError
from caft_plugin.hidden import HiddenSubmodule, copies_hold_again, copies_leave_out
from caft_plugin.meap.roles import Roles
from caft_plugin.storage import gather, shard_like, write_atomically
from caft_plugin.trunk import input_embedding

# Names that makers of models give to tokens kept for later use: <|reserved_special_token_0|>, <unused0>, [control_8],
# <|placeholder1|>, <|dummy_0|>.
SPARE_NAME = re.compile(r"[<\[].*(reserved|unused|place.?holder|dummy|control_\d).*[>\]]", re.IGNORECASE)
# A row of the embedding this far below the table's median norm was never trained: rows that were lie within a factor of
# a few of each other, those of reserved tokens are often zeros. The model's first norm divides by the row's size, so
# the first gradients there are as many times too large.
UNTRAINED = 0.1
MODULE_NAME = "caft_mask_token"
FILE = Path("caft_meap") / "mask_token.safetensors"


@dataclasses.dataclass(frozen=True)
class MaskToken:
    """`id` is what goes into input_ids; `added` says that it is the id after the embedding's last row."""

    id: int
    words: str
    added: bool = False


def row_norms(embedding: nn.Module) -> Tensor | None:
    """The norm of each row of an input embedding; None where its weight is quantised, sharded or not there."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.is_meta:
        return None
    if weight.dim() != 2 or not weight.is_floating_point():
        return None
    with torch.no_grad():
        return torch.cat([rows.float().norm(dim=1) for rows in weight.split(4096)]).cpu()


def untrained(norms: Tensor, id_: int) -> bool:
    return norms[id_].item() < UNTRAINED * norms.median().item()


def choose_mask_token(
    wanted: int | str,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    used: frozenset[int] | None,
    norms: Tensor | None = None,
    placeholders: Collection[int] = (),
    roles: Roles | None = None,
) -> MaskToken:
    """The mask token for a model whose input embedding has `rows` rows.

    `auto` takes the first there is of: the tokenizer's mask token; a token with a name of reserve; a row beyond the
    tokenizer's last id; a special token that the chat template does not contain and the data does not use. It passes
    over tokens with a role, and over those whose row of the embedding is untrained as long as there is another.

    Args:
        used: ids in the training data, None where they cannot be known (streamed data).
        norms: of the embedding's rows (`row_norms`), None where they cannot be known.
        placeholders: ids that stand for images or sound (`placeholder_ids`).
        roles: of the tokenizer, the base model and the user's settings; None: of the tokenizer only.

    Raises:
        ConfigError: no such token, or the one that was asked for is missing, in use or has a role.
    """
    if wanted == "add":
        return MaskToken(rows, f"added: id {rows}, one more input vector beside the {rows} of the model", added=True)
    roles = Roles.of(tokenizer) if roles is None else roles
    vocabulary = tokenizer.get_vocab()
    text_of = {id_: text for text, id_ in vocabulary.items()}
    template = str(tokenizer.chat_template or "")

    def found(id_: int, why: str) -> MaskToken:
        words = f"{text_of.get(id_, 'a row without a token')!r} (id {id_}), {why}"
        if norms is not None and untrained(norms, id_):
            words += (
                f", but its input vector is untrained: its norm is {norms[id_]:.2g}, the table's median "
                f"{norms.median():.2g}, so the first gradients will be large. Take mask_token: add, or another token"
            )
        return MaskToken(id_, words)

    if wanted != "auto":
        return found(_as_asked(wanted, vocabulary, rows, used, placeholders, roles), "as asked")

    def candidates() -> Iterator[tuple[int, str]]:
        if tokenizer.mask_token_id is not None:
            yield tokenizer.mask_token_id, "the tokenizer's mask token"
        for id_ in sorted(id_ for text, id_ in vocabulary.items() if SPARE_NAME.fullmatch(text)):
            yield id_, "a token kept in reserve"
        spare = max(vocabulary.values()) + 1
        for id_ in range(spare, rows):
            yield id_, f"one of {rows - spare} embedding rows that the tokenizer does not use"
        if used is not None:
            for id_ in sorted(roles.special):
                yield id_, "a special token that neither the chat template nor the data uses"

    barred = {*(used or ()), *placeholders, *roles.never_chosen}
    free = [
        (id_, why)
        for id_, why in candidates()
        if 0 <= id_ < rows and id_ not in barred and text_of.get(id_, "\0") not in template
    ]
    for id_, why in free:
        if norms is None or not untrained(norms, id_):
            return found(id_, why)
    if free:
        return found(*free[0])
    raise ConfigError(
        "meap.mask_token: auto found no mask token, no reserved token, no spare embedding row and no unused special "
        f"token{'' if used is not None else ' (streamed data cannot be searched for them)'}. Set mask_token: add, "
        "which adds one input vector and leaves the model's shape alone, or name a token."
    )


def _as_asked(
    wanted: int | str,
    vocabulary: Mapping[str, int],
    rows: int,
    used: Collection[int] | None,
    placeholders: Collection[int],
    roles: Roles,
) -> int:
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
    if id_ in placeholders:
        raise ConfigError(
            f"meap.mask_token: got {wanted!r} (id {id_}), but the model's config gives it to images, video or sound. "
            "Name another token, or set auto or add."
        )
    if id_ in roles.given:
        raise ConfigError(
            f"meap.mask_token: got {wanted!r} (id {id_}), but the chat template, the tokenizer, the model's config or "
            "eot_tokens gives it a role (it begins, ends or pads a text or a turn). Name another token, or set auto or "
            "add."
        )
    return id_


class AddedMaskToken(nn.Module):
    """One input vector more, for the id after the embedding's last row; also the handle that puts it on a model and
    takes it off, and a context manager.

    It starts as the mean of the table's outputs and trains where the table trains. While it is on, it is the submodule
    `caft_mask_token` of the outermost model, left out of the model's state dict.
    """

    def __init__(self, model: nn.Module, token: MaskToken) -> None:
        super().__init__()
        embedding = input_embedding(model)
        with torch.no_grad():
            chunks = torch.arange(token.id, device=embedding.weight.device).split(4096)
            mean = sum(embedding(ids).float().sum(0) for ids in chunks) / token.id
        trainable = any(parameter.requires_grad for parameter in embedding.parameters())
        self.vector = nn.Parameter(mean.to(embedding.weight.dtype), requires_grad=trainable)
        self.token = token
        self._where: Tensor | None = None
        self._embedding = (embedding,)  # in a tuple, so that it is no submodule of this one
        self.hidden = HiddenSubmodule(model, MODULE_NAME, self)
        self._handles: list[RemovableHandle] = []

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
            copies_leave_out(self, self.hidden.model, embedding)
            if not embedding.weight.is_meta:
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
        self.hidden.ran = True
        return torch.where(where[..., None], self.vector.to(output.dtype), output)

    def detach(self) -> None:
        """Takes vector and hooks off the model. Doing it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        copies_hold_again(self, self.hidden.model, *self._embedding)
        self.hidden.detach()

    def __enter__(self) -> AddedMaskToken:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def save(self, folder: Path, write: bool) -> None:
        """Writes the vector into `folder`. Every process has to call it; the one with `write` writes."""
        vector = gather(self.vector)
        if write:
            (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / FILE, lambda path: save_file({"vector": vector}, path, {"format": "pt"}))

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
            self.vector.copy_(shard_like(self.vector, vector))

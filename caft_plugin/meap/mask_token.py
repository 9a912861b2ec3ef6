"""MEAP's mask token: an existing token, or one extra input vector. The model keeps its shape."""

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

from caft_plugin.errors import ConfigError
from caft_plugin.files import write_atomically
from caft_plugin.meap.roles import Roles
from caft_plugin.model.hidden import HiddenSubmodule, copies_hold_again, copies_leave_out
from caft_plugin.model.sharding import gather, shard_like
from caft_plugin.model.trunk import input_embedding

# Names of tokens that models reserve for later use: <|reserved_special_token_0|>, <unused0>,
# [control_8], <|placeholder1|>, <|dummy_0|>.
SPARE_NAME = re.compile(
    r"[<\[].*(reserved|unused|place.?holder|dummy|control_\d).*[>\]]", re.IGNORECASE
)
# An embedding row whose norm is below this fraction of the median was never trained: the norms of
# trained rows differ by a small factor, while rows of reserved tokens are often zero. The model's
# first norm divides by the row's size, so the first gradients would be too large by the inverse
# factor.
UNTRAINED = 0.1
Candidate = tuple[int, str]  # a token that `auto` may use, and why
MODULE_NAME = "caft_mask_token"
FILE = Path("caft_meap") / "mask_token.safetensors"


@dataclasses.dataclass(frozen=True)
class MaskToken:
    """A mask token. `id` is used in input_ids; `added` is True if it is the id after the
    embedding's last row."""

    id: int
    words: str
    added: bool = False


def row_norms(embedding: nn.Module) -> Tensor | None:
    """Return the norm of each row of an input embedding; None if its weight is quantised, sharded
    or missing."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.is_meta:
        return None
    if weight.dim() != 2 or not weight.is_floating_point():
        return None
    with torch.no_grad():
        # in parts: a float32 copy of a whole embedding takes gigabytes
        norms = [rows.float().norm(dim=1) for rows in weight.split(4096)]
        return torch.cat(norms).cpu()


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
    """Choose the mask token for a model whose input embedding has `rows` rows.

    `auto` uses the first available of: the tokenizer's mask token; a reserved token, by name; a row
    beyond the tokenizer's last id; a special token that is neither in the chat template nor in the
    data. It skips tokens with a role, and tokens with an untrained embedding row if there is
    another.

    Args:
        wanted: the value of `meap.mask_token`.
        tokenizer: the model's tokenizer.
        rows: number of rows of the input embedding.
        used: ids in the training data, None if unknown (streamed data).
        norms: norms of the embedding's rows (`row_norms`), None if unknown.
        placeholders: ids of tokens for images or sound (`placeholder_ids`).
        roles: from the tokenizer, the base model and the user's settings; None: from the tokenizer
            only.

    Raises:
        ConfigError: there is no such token, or the requested one is missing, in use or has a role.
    """
    if wanted == "add":
        words = f"added: id {rows}, one input vector in addition to the model's {rows}"
        return MaskToken(rows, words, added=True)
    roles = Roles.of(tokenizer) if roles is None else roles
    vocabulary = tokenizer.get_vocab()
    text_of = {id_: text for text, id_ in vocabulary.items()}
    if wanted == "auto":
        template = str(tokenizer.chat_template or "")
        barred = {*(used or ()), *placeholders, *roles.never_chosen}
        allowed = set(range(rows)) - barred
        free = [
            (id_, why)
            for id_, why in _candidates(tokenizer, vocabulary, rows, used, roles)
            if id_ in allowed and text_of.get(id_, "\0") not in template
        ]
        id_, why = _first_trained(free, norms, searched=used is not None)
    else:
        id_ = _as_asked(wanted, vocabulary, rows, used, placeholders, roles)
        why = "as configured"
    words = f"{text_of.get(id_, 'a row without a token')!r} (id {id_}), {why}"
    if norms is not None and untrained(norms, id_):
        words += (
            f", but its input vector is untrained: its norm is {norms[id_]:.2g}, the"
            f" embedding's median is {norms.median():.2g}, so the first gradients will be"
            " large. Use mask_token: add, or another token"
        )
    return MaskToken(id_, words)


def _candidates(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Mapping[str, int],
    rows: int,
    used: frozenset[int] | None,
    roles: Roles,
) -> Iterator[Candidate]:
    """Yield what `auto` may use, in its order."""
    if tokenizer.mask_token_id is not None:
        yield tokenizer.mask_token_id, "the tokenizer's mask token"
    reserved = [id_ for text, id_ in vocabulary.items() if SPARE_NAME.fullmatch(text)]
    for id_ in sorted(reserved):
        yield id_, "a reserved token"
    spare = max(vocabulary.values()) + 1
    for id_ in range(spare, rows):
        yield id_, f"one of {rows - spare} embedding rows without a token"
    if used is None:  # streamed data, which may have any special token
        return
    for id_ in sorted(roles.special):
        yield id_, "a special token that is neither in the chat template nor in the data"


def _first_trained(
    free: list[Candidate],
    norms: Tensor | None,
    searched: bool,
) -> Candidate:
    """Return the first candidate with a trained embedding row, or else the first one.

    Raises:
        ConfigError: there is none. `searched` is False if the training data could not be.
    """
    for id_, why in free:
        if norms is None or not untrained(norms, id_):
            return id_, why
    if free:
        return free[0]
    why_fewer = "" if searched else " (streamed data cannot be searched for them)"
    raise ConfigError(
        "meap.mask_token: auto found no mask token, no reserved token, no spare embedding row and"
        f" no unused special token{why_fewer}. Use"
        " mask_token: add, which adds one input vector and keeps the model's shape, or name a"
        " token."
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
            f"meap.mask_token: got {wanted!r}, which is not a token of this tokenizer. It accepts"
            " auto, add, a token's text as in the vocabulary, or a token id."
        )
    if not 0 <= id_ < rows:
        raise ConfigError(
            f"meap.mask_token: got {wanted!r} (id {id_}), but the model's input embedding has"
            f" {rows} rows. It accepts an id from 0 to {rows - 1}, or add."
        )
    if id_ in (used or ()):
        raise ConfigError(
            f"meap.mask_token: got {wanted!r} (id {id_}), but the training data contains it, so the"
            " model could not distinguish masks from text. Name a token that the data does not"
            " contain, or use auto or add."
        )
    if id_ in placeholders:
        raise ConfigError(
            f"meap.mask_token: got {wanted!r} (id {id_}), but the model's config uses it for"
            " images, video or sound. Name another token, or use auto or add."
        )
    if id_ in roles.given:
        raise ConfigError(
            f"meap.mask_token: got {wanted!r} (id {id_}), but the chat template, the tokenizer, the"
            " model's config or eot_tokens gives it a role (it begins, ends or pads a text or a"
            " turn). Name another token, or use auto or add."
        )
    return id_


class AddedMaskToken(nn.Module):
    """An extra input vector for the id after the embedding's last row.

    It is also the handle that attaches it to a model and detaches it, and a context manager. The
    vector starts as the mean of the embedding's outputs, and is trained if the embedding is. While
    attached, it is the submodule `caft_mask_token` of the outermost model, but not in its state
    dict.
    """

    def __init__(self, model: nn.Module, token: MaskToken) -> None:
        super().__init__()
        embedding = input_embedding(model)
        every_id = torch.arange(token.id, device=embedding.weight.device)
        with torch.no_grad():
            # of its outputs, not of its weight: a quantised or adapted embedding has no plain one
            total = sum(embedding(ids).float().sum(0) for ids in every_id.split(4096))
            mean = total / token.id
        trainable = any(parameter.requires_grad for parameter in embedding.parameters())
        self.vector = nn.Parameter(mean.to(embedding.weight.dtype), requires_grad=trainable)
        self.token = token
        self._where: Tensor | None = None
        self._embedding = (embedding,)  # in a tuple, so that it is not a submodule of this one
        self.hidden = HiddenSubmodule(model, MODULE_NAME, self)
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> AddedMaskToken:
        """Attach the vector and its hooks to the model; a no-op if attached.

        Raises:
            ConfigError: another trainer's vector is attached.
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
        # the embedding has no row for the added id: any other one, whose output is replaced
        return (args[0].masked_fill(self._where, self.token.id - 1), *args[1:])

    def _after(
        self,
        embedding: nn.Module,
        args: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor:
        where = self._where
        self._where = None
        assert where is not None
        self.hidden.ran = True
        return torch.where(where[..., None], self.vector.to(output.dtype), output)

    def detach(self) -> None:
        """Remove the vector and its hooks from the model; a no-op if detached."""
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
        """Save the vector to `folder`. Every process must call it; the one with `write` writes the
        file."""
        vector = gather(self.vector)
        if write:
            (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                folder / FILE, lambda path: save_file({"vector": vector}, path, {"format": "pt"})
            )

    def load(self, folder: Path) -> None:
        """Load the vector from a checkpoint.

        Raises:
            ConfigError: the checkpoint has none, or one of another size.
        """
        try:
            vector = load_file(folder / FILE)["vector"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ConfigError(
                f"meap.mask_token: {folder / FILE} cannot be read ({error}), so this checkpoint was"
                " not made with mask_token: add. Resume with the setting it was made with, or"
                " start from the beginning."
            ) from None
        if vector.shape != self.vector.shape:
            raise ConfigError(
                f"meap.mask_token: {folder / FILE} holds a vector of shape {tuple(vector.shape)},"
                f" but this model needs {tuple(self.vector.shape)}. Resume with the model the"
                " checkpoint was made with."
            )
        with torch.no_grad():
            self.vector.copy_(shard_like(self.vector, vector))

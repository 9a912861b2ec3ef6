"""What a run is, without what it takes to do it, which is slow to import."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model; of its data (below which number token ids lie, the shortest and the longest row,
    rows a step, steps that differ); and how many steps are taken, at which learning rate."""

    hidden: int
    layers: int
    vocabulary: int
    ids: int
    lengths: tuple[int, int]
    rows: int
    batches: int
    steps: int
    learning_rate: float


# Its ids are the words of `word_tokenizer`, which MEAP needs, of a vocabulary that is larger, so
# that losses fall.
SMALL = Size(128, 2, 512, ids=97, lengths=(4, 60), rows=8, batches=2, steps=4, learning_rate=1e-2)
# The same data, all of it in each step: what is computed does not depend on the order of rows.
WHOLE = dataclasses.replace(SMALL, rows=16, batches=1)
LARGE = Size(
    1024, 8, 32_000, ids=32_000, lengths=(64, 512), rows=8, batches=2, steps=9, learning_rate=1e-4
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, and how.

    `weights` is the dtype of the base model's, `host` the trainer that `with_caft` is put over,
    `packed` puts the rows of a batch one behind the other into a single one, `cce` patches the
    model with Cut Cross Entropy, `args` are training arguments.
    """

    how: Literal["full", "lora", "qlora"] = "lora"
    weights: str = "float32"
    attention: str = "sdpa"
    host: Literal["Trainer", "save_on_cpu", "SFTTrainer"] = "Trainer"
    packed: bool = False
    cce: bool = False
    dropout: float = 0.0
    caft: dict[str, Any] = dataclasses.field(default_factory=lambda: {"beta": 0.5})
    meap: dict[str, Any] | None = None
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Figures:
    """What was seen of a run: each step's log and seconds, trainable tensors as they were, their
    gradients at the first step (the model's own and each head's, as one vector), the names and
    shapes that were saved, modules of ours that were left on the model, and the most memory that
    tensors took on the GPU."""

    logs: list[dict[str, float]]
    start: dict[str, Tensor]
    gradients: dict[str, Tensor]
    saved: dict[str, list[int]]
    left_behind: list[str]
    seconds: list[float]
    memory: int

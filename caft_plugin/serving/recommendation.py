"""How many draft tokens a step should have: what `caft speculate` found, saved next to those heads.

The file is read by `caft export-drafter`. It names the weights it is about, so heads that were trained further are not
judged by what their predecessors did.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from caft_plugin.config import ConfigError
from caft_plugin.heads_record import DRAFTING, WEIGHTS, own_file, read_small
from caft_plugin.storage import write_json

NEARLY = 0.95


class Drafting(BaseModel):
    """`drafting.json` in a heads folder. `tokens_per_step` is with 1, 2, ... draft tokens in each step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    weights: str  # SHA-256 of the heads' file
    prompts: int = Field(gt=0)
    temperature: float = Field(ge=0)
    tokens_per_step: list[Annotated[float, Field(ge=1, le=1000)]] = Field(min_length=1)


def keep(folder: Path, model: str, prompts: int, temperature: float, tokens_per_step: list[float]) -> Path:
    """Write what was found into a heads folder. Raises OSError where that cannot be written to."""
    rounded = [round(tokens, 4) for tokens in tokens_per_step]
    found = Drafting(
        model=model, weights=digest(folder), prompts=prompts, temperature=temperature, tokens_per_step=rounded
    )
    write_json(folder / DRAFTING, found.model_dump())
    return folder / DRAFTING


def kept(folder: Path) -> Drafting | None:
    """Return what was found with the heads in this folder, None where that is not known.

    Raises:
        ConfigError: the file is damaged, or about other weights than the folder's.
    """
    if not (folder / DRAFTING).exists():
        return None
    again = f"Run `caft speculate` again with these heads, or remove {folder / DRAFTING}."
    try:
        found = Drafting.model_validate_json(read_small(folder, DRAFTING))
    except ValidationError as error:
        raise ConfigError(
            f"--heads: {folder / DRAFTING} cannot be read ({error.errors()[0]['msg']}). {again}"
        ) from error
    if found.weights != digest(folder):
        raise ConfigError(f"--heads: {folder / DRAFTING} is about other heads than those in {folder}. {again}")
    return found


def digest(folder: Path) -> str:
    """SHA-256 of the heads' weights."""
    with open(own_file(folder, WEIGHTS), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of weights that a forward pass of the model reads, and of one head and the unembedding, which draft."""

    model: int
    head: int
    unembedding: int

    def of_step(self, draft_tokens: int) -> float:
        """What a step with so many draft tokens takes, against a step without: at one request at a time the time is
        that of reading weights."""
        return 1 + (draft_tokens * self.head + self.unembedding) / self.model


def speeds(tokens_per_step: list[float], cost: Cost) -> list[float]:
    """How many times as fast as plain serving 1, 2, ... draft tokens in every step would be."""
    return [tokens / cost.of_step(number) for number, tokens in enumerate(tokens_per_step, 1)]


def recommended(tokens_per_step: list[float], cost: Cost) -> int:
    """The smallest number of draft tokens that is nearly as fast as the fastest at one request at a time. With more
    requests at a time each draft token costs more."""
    found = speeds(tokens_per_step, cost)
    enough = NEARLY * max(found)
    return next(number for number, speed in enumerate(found, 1) if speed >= enough)

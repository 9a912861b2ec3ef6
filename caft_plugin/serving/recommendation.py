"""The recommended number of draft tokens: results of `caft speculate`, saved next to the heads.

`caft export-drafter` reads the file. It holds a digest of the heads' weights, so that results of
earlier heads are not used for heads that were trained further.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from caft_plugin.caft.heads_record import DRAFTING, WEIGHTS, own_file, read_small
from caft_plugin.errors import ConfigError, heads_as
from caft_plugin.files import write_json

NEARLY = 0.95


class Drafting(BaseModel):
    """`drafting.json` in a heads folder. `tokens_per_step` has a value for 1, 2, ... draft tokens
    per step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    weights: str  # SHA-256 of the heads' file
    prompts: int = Field(gt=0)
    temperature: float = Field(ge=0)
    tokens_per_step: list[Annotated[float, Field(ge=1, le=1000)]] = Field(min_length=1)


def keep(
    folder: Path,
    model: str,
    prompts: int,
    temperature: float,
    tokens_per_step: list[float],
) -> Path:
    """Write results into a heads folder and return the file.

    Args:
        folder: the heads folder.
        model: the model's name.
        prompts: number of prompts.
        temperature: sampling temperature, 0 for greedy decoding.
        tokens_per_step: tokens per step with 1, 2, ... draft tokens.

    Raises:
        OSError: the folder is not writable.
    """
    rounded = [round(tokens, 4) for tokens in tokens_per_step]
    found = Drafting(
        model=model,
        weights=digest(folder),
        prompts=prompts,
        temperature=temperature,
        tokens_per_step=rounded,
    )
    write_json(folder / DRAFTING, found.model_dump())
    return folder / DRAFTING


def kept(folder: Path) -> Drafting | None:
    """Return the results for the heads in this folder, None if there are none.

    Raises:
        ConfigError: the file is damaged, or was written for other weights.
    """
    if not (folder / DRAFTING).exists():
        return None
    again = f"Run `caft speculate` again with these heads, or remove {folder / DRAFTING}."
    try:
        found = Drafting.model_validate_json(read_small(folder, DRAFTING))
    except ValidationError as error:
        raise ConfigError(
            f"{heads_as()}: {folder / DRAFTING} cannot be read ({error.errors()[0]['msg']})."
            f" {again}"
        ) from error
    # Heads that were trained further are accepted more often, so their results are others.
    if found.weights != digest(folder):
        raise ConfigError(
            f"{heads_as()}: {folder / DRAFTING} was written for other heads than those in {folder}."
            f" {again}"
        )
    return found


def digest(folder: Path) -> str:
    """Return the SHA-256 of the heads' weights."""
    with open(own_file(folder, WEIGHTS), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of weights: those that the model reads in a forward pass, one head's, and the
    unembedding's."""

    model: int
    head: int
    unembedding: int

    def of_step(self, draft_tokens: int) -> float:
        """Return the time of a step with draft tokens, as a multiple of a step without: for one
        request at a time, the time to read the weights."""
        return 1 + (draft_tokens * self.head + self.unembedding) / self.model


def speeds(tokens_per_step: list[float], cost: Cost) -> list[float]:
    """Return the estimated speed with 1, 2, ... draft tokens per step, as a multiple of plain
    serving."""
    return [tokens / cost.of_step(number) for number, tokens in enumerate(tokens_per_step, 1)]


def recommended(tokens_per_step: list[float], cost: Cost) -> int:
    """Return the smallest number of draft tokens that is nearly as fast as the fastest, for one
    request at a time.

    With more requests at a time each draft token costs more.
    """
    found = speeds(tokens_per_step, cost)
    enough = NEARLY * max(found)
    return next(number for number, speed in enumerate(found, 1) if speed >= enough)

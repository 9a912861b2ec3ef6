"""Find complete checkpoints, and the one to resume from.

The Trainer writes checkpoints in place and resumes from the highest number. A checkpoint that was
being written when its run was killed looks like any other.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import zipfile
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from caft_plugin.caft.heads_record import FOLDER, WEIGHTS, read_record
from caft_plugin.errors import CAFTError, ConfigError

logger = logging.getLogger(__name__)

WEIGHT_FILES = (
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    ADAPTER_WEIGHTS_NAME,
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of this run's checkpoints, in addition to the trainer's state."""

    weights: bool  # the model's or the adapter's, in one of WEIGHT_FILES
    optimizer: bool  # with scheduler and random states


class IncompleteCheckpoint(CAFTError):
    """Something is missing or damaged in a checkpoint. The message says what, without a subject."""


def refuse_incomplete(folder: Path, parts: Parts) -> None:
    """Raise IncompleteCheckpoint if something is missing or damaged in a checkpoint.

    Files are opened and checked for truncation, not read. A checkpoint without heads counts as
    complete: it is from a run without CAFT, because heads are written before the trainer's state.
    """
    if not folder.is_dir():
        raise IncompleteCheckpoint("is not a folder")
    if _json(folder / TRAINER_STATE_NAME) is None:
        raise IncompleteCheckpoint(f"has no readable {TRAINER_STATE_NAME}, which is written last")
    for index in folder.glob("*.index.json"):
        _refuse_missing_shards(index)
    if parts.weights and not any(path.name in WEIGHT_FILES for path in folder.rglob("*.*")):
        raise IncompleteCheckpoint("lacks the weights of the model or adapter")
    if parts.optimizer:
        _refuse_missing_states(folder)
    _refuse_damaged_files(folder)
    if (folder / FOLDER).is_dir():
        _refuse_incomplete_heads(folder / FOLDER)


def _refuse_missing_shards(index: Path) -> None:
    files = (_json(index) or {}).get("weight_map")
    if not isinstance(files, dict):
        raise IncompleteCheckpoint(f"has a damaged {index.name}")
    shards = {str(file) for file in files.values()}
    for shard in sorted(shards):
        if not (index.parent / shard).is_file():
            raise IncompleteCheckpoint(f"lacks {shard}")


def _refuse_missing_states(folder: Path) -> None:
    unless = "which this run saves (unless save_only_model is set)"
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (folder / name).is_file():
            raise IncompleteCheckpoint(f"lacks {name}, {unless}")
    if not any(folder.glob("rng_state*.pth")):
        raise IncompleteCheckpoint(f"lacks rng_state.pth, {unless}")


def _refuse_damaged_files(folder: Path) -> None:
    pickled = [*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]
    for file in sorted(pickled):
        if not zipfile.is_zipfile(file):
            raise IncompleteCheckpoint(f"has a damaged {file.name}")
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            # the header tells how long the file must be
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, RuntimeError, SafetensorError):
            raise IncompleteCheckpoint(f"has a damaged {file.relative_to(folder)}") from None


def _refuse_incomplete_heads(heads: Path) -> None:
    try:
        read_record(heads)
    except ConfigError as error:
        raise IncompleteCheckpoint(f"has an incomplete {FOLDER}/ ({error})") from error
    if not (heads / WEIGHTS).is_file():
        raise IncompleteCheckpoint(f"lacks {FOLDER}/{WEIGHTS}")


def newest_whole(output_dir: str | Path, parts: Parts) -> tuple[Path | None, list[str]]:
    """Return the complete checkpoint with the highest number, and a sentence on each newer one that
    was skipped."""
    start = f"{PREFIX_CHECKPOINT_DIR}-"
    numbered: dict[int, Path] = {}
    for path in Path(output_dir).glob(f"{start}*"):
        number = path.name.removeprefix(start)
        if number.isdecimal() and path.is_dir():
            numbered[int(number)] = path
    passed_over: list[str] = []
    for _, path in sorted(numbered.items(), reverse=True):
        try:
            refuse_incomplete(path, parts)
        except IncompleteCheckpoint as problem:
            passed_over.append(f"the checkpoint {path} {problem}")
        else:
            return path, passed_over
    return None, passed_over


def to_resume_from(
    asked: str | Literal[True],
    output_dir: str | Path,
    parts: Parts,
) -> str:
    """Return the checkpoint to resume from.

    Args:
        asked: the argument of `train(resume_from_checkpoint=...)`: a path, or True for the newest
            one.
        output_dir: where the run writes its checkpoints.
        parts: what a complete checkpoint of this run holds.

    Raises:
        ConfigError: the requested checkpoint is incomplete, or `output_dir` has no complete one.
    """
    if asked is True:
        newest = newest_warning_of_others(output_dir, parts)
        if newest is None:
            raise ConfigError(
                f"resume_from_checkpoint: got True, but {output_dir} has no complete checkpoint."
                " Omit it to start from the beginning, or give the path of a checkpoint elsewhere."
            )
        return str(newest)
    try:
        refuse_incomplete(Path(asked), parts)
    except IncompleteCheckpoint as problem:
        newest, _ = newest_whole(Path(asked).parent, parts)
        remedy = (
            f"use {newest}, the newest complete one there"
            if newest
            else "that folder has none, so start from the beginning"
        )
        raise ConfigError(
            f"resume_from_checkpoint: got {asked}, which {problem}. It accepts a complete"
            f" checkpoint: {remedy}."
        ) from None
    return str(asked)


def newest_warning_of_others(output_dir: str | Path, parts: Parts) -> Path | None:
    """Return the newest complete checkpoint; on the main process, warn about newer ones that a
    killed run left."""
    newest, passed_over = newest_whole(output_dir, parts)
    if PartialState().is_main_process:
        for problem in passed_over:
            logger.warning(
                "resume_from_checkpoint: %s; it is skipped, and overwritten when training reaches"
                " that step",
                problem,
            )
    return newest


def begin_overwriting(checkpoint: Path) -> None:
    """Mark a checkpoint that is about to be overwritten, file by file, as incomplete until that is
    done."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)


def set_aside(folder: Path) -> None:
    """Rename the folder that an earlier run left under this name, if there is one, and warn about
    it."""
    if not folder.is_dir():
        return
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    places = (folder.with_name(f"{folder.name}.earlier-run{number}") for number in numbers)
    to = next(place for place in places if not place.exists())
    folder.rename(to)
    logger.warning(
        "caft: %s belongs to an earlier run, not to the model that this run saves there, so it was"
        " renamed to %s. Delete it, or keep it with that run's model",
        folder,
        to,
    )


def _json(file: Path) -> dict | None:
    """Return the object in a JSON file, or None if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None

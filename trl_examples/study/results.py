"""results.jsonl: one line a finished run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import design

FILE = Path(__file__).parent / "results.jsonl"

Line = dict[str, Any]


def read(file: Path = FILE) -> list[Line]:
    if not file.exists():
        return []
    lines = []
    for number, text in enumerate(file.open(encoding="utf-8"), 1):
        try:
            line = json.loads(text)
            design.Run(line["task"], line["arm"], line["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"error: line {number} of {file} is not a run ({type(error).__name__}: {error}). Delete the line; make "
                "study does that run again."
            ) from None
        lines.append(line)
    return lines


def add(line: Line, file: Path = FILE) -> None:
    """The file with one line more takes the place of the old one: half a line is never there."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.write(file.read_text(encoding="utf-8") if file.exists() else "")
        opened.write(json.dumps(line) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)


def run_of(line: Line) -> design.Run:
    return design.Run(line["task"], line["arm"], line["seed"])


def missing(lines: Iterable[Line]) -> list[design.Run]:
    """Planned runs of the first study that have no line, in the order of the plan."""
    done = {run_of(line) for line in lines}
    return [run for run in design.plan() if run not in done]

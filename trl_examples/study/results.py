"""results.jsonl: one line a finished run, with its metrics, settings, versions, processor and
commit."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

import caft_plugin
from study.protocol import ROOT, Line, Lines, NotYet, Run, Settings, Study

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "rdkit")


def read(file: Path) -> list[Line]:
    """Return the lines of a file, none where there is no file.

    Raises:
        SystemExit: a line is not a run.
    """
    if not file.exists():
        return []
    lines = []
    for number, text in enumerate(file.open(encoding="utf-8"), 1):
        try:
            line = json.loads(text)
            run_of(line)
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"error: line {number} of {file} is not a run ({type(error).__name__}: {error})."
                " Delete the line; make study does that run again."
            ) from None
        lines.append(line)
    return lines


def add(line: Line, file: Path) -> None:
    """Add a line by replacing the file, so that it never holds half a line."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.write(file.read_text(encoding="utf-8") if file.exists() else "")
        opened.write(json.dumps(line) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)


def run_of(line: Line) -> Run:
    return Run(line["task"], line["arm"], line["seed"])


def missing(runs: Iterable[Run], lines: Lines) -> list[Run]:
    """Return the runs that have no line."""
    done = set(map(run_of, lines))
    return [run for run in runs if run not in done]


def of(lines: Lines, task: str, arm: str) -> Lines:
    """Return the lines of an arm, by seed."""
    return sorted(
        (line for line in lines if line["task"] == task and line["arm"] == arm),
        key=lambda line: line["seed"],
    )


def pairs(lines: Lines, task: str, arm: str, against: str) -> list[tuple[Line, Line]]:
    """Return the lines of two arms for each seed that both have on the same kind of machine."""
    ours, theirs = (
        {(line["seed"], line.get("processor")): line for line in of(lines, task, name)}
        for name in (arm, against)
    )
    return [(ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys(), key=str)]


def unpaired(study: Study, lines: Lines) -> list[str]:
    """Name the runs that are in no difference because the other arm's run was on another kind of
    machine."""
    found = set()
    for task in study.tasks.values():
        for arm, against in task.comparisons():
            seeds, others = (
                {one["seed"] for one in of(lines, task.name, name)} for name in (arm, against)
            )
            compared = {one["seed"] for one, _ in pairs(lines, task.name, arm, against)}
            found |= {
                f"{task.name} {arm} and {against}, seed {seed}"
                for seed in (seeds & others) - compared
            }
    return sorted(found)


def check(study: Study, lines: Lines) -> None:
    """Compare lines with the protocol.

    Raises:
        SystemExit: a run is not declared, is there twice, or was made with other settings or other
            data.
    """
    declared, seen = set(study.declared()), set()
    for line in lines:
        run = run_of(line)
        if run not in declared:
            raise SystemExit(f"error: {run} is in {study.file} and not declared in its protocol.py")
        if run in seen:
            raise SystemExit(f"error: {run} is in {study.file} twice; delete one of its lines")
        seen.add(run)
        try:
            wanted = study.settings(run, lines)
        except NotYet as error:
            raise SystemExit(f"error: {run}: {error}") from None
        made = line["settings"]
        changed = sorted(
            key for key in wanted.keys() | made.keys() if wanted.get(key) != made.get(key)
        )
        if changed:
            key = changed[0]
            raise SystemExit(
                f"error: {run} was made with {key} {made.get(key)!r}, and protocol.py declares"
                f" {wanted.get(key)!r}. Delete its line and run make study."
            )
    if len({line.get("data") for line in lines}) > 1:
        raise SystemExit(
            f"error: the lines of {study.file} were made on different data (key `data`)"
        )


# -- where a line is from --------------------------------------------------------------------------


def line_of(run: Run, settings: Settings, figures: Line, seconds: float) -> Line:
    """Put a run's figures together with its settings and with what made them."""
    return {
        **run._asdict(),
        "metrics": {key: round(value, 6) for key, value in figures["metrics"].items()},
        "wall_seconds": round(seconds, 1),
        **{key: value for key, value in figures.items() if key != "metrics"},
        "settings": settings,
        "versions": versions(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are here; a study that does not use
    one runs without."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "caft_plugin": caft_plugin.__version__}


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next(
        (
            line.split(":", 1)[1].strip()
            for line in text.splitlines()
            if line.startswith("model name")
        ),
        "",
    )


@functools.cache
def commit() -> str:
    """Return the commit of the code that this process runs, marked where the code has changed
    since.

    STUDY_COMMIT names it for a copy of the code, whose own history says something else or nothing.
    """
    if told := os.environ.get("STUDY_COMMIT"):
        return told

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    head = git("rev-parse", "HEAD").stdout.strip()
    if not head:  # a copy without its history
        return "unknown"
    return head + (
        "-changed" if git("diff", "--quiet", "HEAD", "--", "*.py").returncode != 0 else ""
    )

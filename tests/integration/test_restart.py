"""Runs that are killed with SIGKILL, while they train and while they save, and started again until
they end.

Without more said, each kind of run is killed once; `make soak` (CAFT_SOAK=1) kills each a dozen
times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from caft_plugin.caft.heads_record import FOLDER, HeadsRecord
from caft_plugin.checkpoints import IncompleteCheckpoint, newest_whole, refuse_incomplete

sys.path.insert(0, str(Path(__file__).parent))

import interrupted

pytestmark = [pytest.mark.slow, pytest.mark.newest]

KILLS = 12 if os.environ.get("CAFT_SOAK") else 1
KINDS = [(base, heads) for base in ("full", "lora", "qlora") for heads in ("auto", "frozen")]
DEADLINE = 120.0


@pytest.fixture(scope="module")
def processes():
    """Forks of one process that has imported what a run needs: a start takes a second less many."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "peft", "transformers.trainer", "bitsandbytes", "caft_plugin.training"]
    )
    return context


def start(processes, folder, base, heads):
    process = processes.Process(target=interrupted.run, args=(str(folder), base, heads))
    process.start()
    return process


def finish(process, folder):
    process.join(DEADLINE)
    assert process.exitcode == 0, (folder / "output.txt").read_text()[-3000:]


def outcome(folder):
    """Every figure logged, the weights and the heads."""
    state = json.loads(
        (folder / f"checkpoint-{interrupted.STEPS}" / "trainer_state.json").read_text()
    )
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    tensors = {}
    for file in [*folder.glob("*.safetensors"), *(folder / FOLDER).glob("*.safetensors")]:
        tensors |= {f"{file.name}: {name}": tensor for name, tensor in load_file(file).items()}
    return logs, tensors


def check_heads_files(folder):
    """No file of ours is half there: each one with its final name loads, and the record was written
    last."""
    for heads in folder.rglob(FOLDER):
        for file in heads.glob("*.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())
        if (heads / "config.json").exists():
            HeadsRecord.model_validate_json((heads / "config.json").read_text())


def is_incomplete(checkpoint):
    try:
        refuse_incomplete(checkpoint, interrupted.PARTS)
    except IncompleteCheckpoint:
        return True
    return False


def half_written(folder):
    """The checkpoints that are not whole, each with the time of its last change: one for each kill
    that left one."""
    broken = [path for path in folder.glob("checkpoint-*") if is_incomplete(path)]
    return {
        (path.name, max(p.stat().st_mtime_ns for p in [path, *path.rglob("*")])) for path in broken
    }


@pytest.mark.parametrize(("base", "heads"), KINDS)
def test_killed_and_resumed_equals_uninterrupted(processes, tmp_path, base, heads):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    finish(start(processes, whole, base, heads), whole)
    expected_logs, expected_tensors = outcome(whole)
    assert [entry["step"] for entry in expected_logs] == list(range(1, interrupted.STEPS + 1))

    # Each kill comes within a tenth of a second after a checkpoint's folder has appeared, of which
    # saving takes about a half. Where the folder is there already, the kill meets the start.
    chance = random.Random(f"{base} {heads}")
    halves, problems = set(), []
    for step in sorted(chance.choices(range(1, interrupted.STEPS - 4), k=KILLS)):
        process = start(processes, parts, base, heads)
        until = time.monotonic() + DEADLINE
        while (
            not (parts / f"checkpoint-{step}").exists()
            and process.is_alive()
            and time.monotonic() < until
        ):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join(DEADLINE)
        assert process.exitcode == -signal.SIGKILL, (parts / "output.txt").read_text()[-3000:]
        check_heads_files(parts)
        newest, problems = newest_whole(parts, interrupted.PARTS)
        halves |= half_written(parts)
        # heads come before the trainer's state (an older checkpoint may be half deleted by the save
        # limit)
        assert newest is None or (newest / FOLDER / "config.json").exists()
    before = (parts / "output.txt").read_text()
    finish(start(processes, parts, base, heads), parts)

    logs, tensors = outcome(parts)
    assert logs == expected_logs
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected_tensors[name]), name
    assert not list(parts.rglob(".*.tmp"))
    output = (parts / "output.txt").read_text().removeprefix(before)
    # (without a whole checkpoint the run started anew and had nothing to say)
    assert output.count("it is skipped") == (len(problems) if newest else 0)
    print(  # noqa: T201
        f"{base} {heads}: {KILLS} kills left {len(halves)} half-written or half-deleted checkpoints"
    )

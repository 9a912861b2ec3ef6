"""Two gloo processes on a CPU equal one with the same global batch, DDP's settings as the Trainer chooses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "one_of_several.py"
CASES = {
    "full": {"lora": False, "gradient_checkpointing": False, "caft": {"beta": 0.5}},
    "lora, checkpointing": {"lora": True, "gradient_checkpointing": True, "caft": {"beta": 0.5}},
    # gamma is 0 at the first step: no head runs, yet every one of them has to join the graph
    "gamma 0": {"lora": False, "gradient_checkpointing": True, "caft": {"beta": 0.5, "schedule": "linear"}},
    "frozen heads": {"lora": True, "gradient_checkpointing": False, "caft": {"beta": 0.5, "train_heads": "frozen"}},
}


def run(folder, settings, processes):
    settings = {**settings, "per_device_train_batch_size": 8 // processes}
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(settings)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(tmp_path, case):
    one, two = (run(tmp_path, CASES[case], processes) for processes in (1, 2))
    assert one["wrapped"] != "DistributedDataParallel" == two["wrapped"]
    assert len(one["logs"]) == 3
    for ours, theirs in zip(one["logs"], two["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if key.startswith("caft/") or key in ("loss", "grad_norm"):
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5), key

"""trl_examples/ as the README there runs them, on the real model and the shipped molecules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from safetensors.torch import load_file

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

KINDS = {"lora": ["--use_peft"], "qlora": ["--use_peft", "--load_in_4bit"], "full": ["--learning_rate", "5e-6"]}


@pytest.mark.parametrize("kind", KINDS)
def test_sft_caft(smollm2, tmp_path, kind):
    scripts = Path(sys.executable).parent
    command = [
        *(str(scripts / "accelerate"), "launch", str(ROOT / "trl_examples" / "sft_caft.py")),
        *("--model_name_or_path", str(smollm2)),
        *("--dataset_name", str(ROOT / "axolotl_configs" / "data" / "molecules-heldout.jsonl")),
        *("--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--num_heads", "2"),
        *("--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "1"),
        *("--save_steps", "2", "--max_length", "64", *KINDS[kind]),
    ]
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert all("caft/loss_head_2" in entry for entry in state["log_history"] if "loss" in entry)
    saved = load_file(tmp_path / ("model.safetensors" if kind == "full" else "adapter_model.safetensors"))
    assert saved and not any("caft" in key for key in saved)
    assert json.loads((tmp_path / "caft_heads" / "config.json").read_text())["num_heads"] == 2

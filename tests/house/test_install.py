"""The wheel goes into an environment that somebody has already, and pip changes nothing that is
installed there.

The environments hold the metadata of releases alone, which is all that pip looks at. Needs the
package index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from builders.paths import ROOT

pytestmark = pytest.mark.newest

LOWEST = {
    "torch": "2.11.0",
    "transformers": "5.16.0",
    "trl": "1.9.0",
    "peft": "0.20.0",
    "accelerate": "1.13.0",
}
OTHERS = ("click", "pydantic", "pyyaml", "safetensors")


def pip(*arguments):
    """Without constraints that the machine may set: a release above them counts as well."""
    result = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env={**os.environ, "PIP_CONSTRAINT": os.devnull},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def to_install(folder, *arguments, into=sys.executable):
    """What `pip install` would install: versions by name."""
    report = folder / "report.json"
    pip(
        "--python",
        str(into),
        "install",
        "--dry-run",
        "--quiet",
        "--report",
        str(report),
        *arguments,
    )
    entries = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {entry["name"].lower(): entry["version"] for entry in entries}


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """The newest release of everything that the wheel needs, with TRL."""
    names = [*LOWEST, *OTHERS]
    return to_install(tmp_path_factory.mktemp("newest"), "--no-deps", "--ignore-installed", *names)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (file,) = folder.glob("*.whl")
    return file


def would_change(wheel, folder, installed):
    """The packages of `installed` (version by name) that pip would replace on installing the wheel
    with TRL."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name, version in installed.items():
        record = packages / f"{name}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    found = to_install(folder, f"{wheel}[trl]", into=folder / "bin" / "python")
    return found.keys() - {"caft_plugin"} if "caft_plugin" in found else "the wheel was not taken"


def test_beside_the_newest_release_of_everything(wheel, newest, tmp_path):
    assert would_change(wheel, tmp_path, newest) == set()


def test_beside_the_lowest_releases(wheel, newest, tmp_path):
    assert would_change(wheel, tmp_path, {**newest, **LOWEST}) == set()


def test_a_release_that_is_too_old_is_replaced(wheel, newest, tmp_path):
    """Else the two tests above could not fail."""
    assert would_change(wheel, tmp_path, {**newest, "peft": "0.19.0"}) >= {"peft"}


def test_in_this_environment(wheel, tmp_path):
    assert to_install(tmp_path, str(wheel)).keys() <= {"caft_plugin"}


def test_upper_bounds_are_the_next_major_version(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    hosts = [
        *project["dependencies"],
        *(r for e in ("axolotl", "trl") for r in project["optional-dependencies"][e]),
    ]
    for requirement in map(Requirement, hosts):
        upper = [Version(s.version) for s in requirement.specifier if s.operator == "<"]
        lower = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert len(lower) == 1 and len(upper) <= 1, requirement
        assert all(bound == Version(str(lower[0].major + 1)) for bound in upper), requirement

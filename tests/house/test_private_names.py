"""Private names of other packages that caft_plugin uses: each is there, with the parameters that
are counted on.

Where one is gone, the failure says in one sentence what needs it.
"""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from builders.paths import ROOT
from generate.private_names import NAMES, README, with_table

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("private", NAMES, ids=str)
def test_it_is_there(private):
    module, _, inside = private.owner.partition(":")
    package = module.split(".")[0]
    if package in ("axolotl", "trl", "vllm"):
        pytest.importorskip(package)
    owner = importlib.import_module(module)
    owner = getattr(owner, inside) if inside else owner
    needs = f"caft_plugin needs it to {private.purpose} (caft_plugin/{private.file})"
    if private.instance:
        there = re.search(rf"\b{private.name}\b", inspect.getsource(owner))
    else:
        there = hasattr(owner, private.name)
    assert there, f"{private.owner} has no {private.name} any more: {needs}"
    if private.parameters is not None:
        found = tuple(inspect.signature(getattr(owner, private.name)).parameters)
        first = found[: len(private.parameters)]
        assert first == private.parameters, f"{private} accepts {', '.join(found)} now: {needs}"


@pytest.mark.parametrize("private", NAMES, ids=str)
def test_it_is_used_where_the_table_says(private):
    assert private.name in (ROOT / "caft_plugin" / private.file).read_text(encoding="utf-8")


def test_the_table_in_the_readme():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python tests/generate/private_names.py"

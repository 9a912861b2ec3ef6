"""The mutation tool on a toy package: what it changes, how it finds it again, what it reports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

SOURCE = '''
"""A module, 1 + 1."""
import logging

logger = logging.getLogger(__name__)
LIMIT = 3

def area(width, height=2):
    """Return 2 * 2."""
    if width < 0 and height != 0:
        raise ValueError("width: 1 + 1")
    logger.warning("a + %s", 1)
    size = width * height
    if size > LIMIT:
        return LIMIT
    return size
'''
EXPECTED = {
    ("", "LIMIT = 3", "LIMIT = 4"),
    ("", "def area(width, height=2):", "def area(width, height=3):"),
    ("area", "if width < 0 and height != 0:", "if not (width < 0 and height != 0):"),
    ("area", "if width < 0 and height != 0:", "if width < 0 or height != 0:"),
    ("area", "if width < 0 and height != 0:", "if width <= 0 and height != 0:"),
    ("area", "if width < 0 and height != 0:", "if width < 1 and height != 0:"),
    ("area", "if width < 0 and height != 0:", "if width < 0 and height == 0:"),
    ("area", "if width < 0 and height != 0:", "if width < 0 and height != 1:"),
    ("area", "raise ValueError('width: 1 + 1')", "pass"),
    ("area", "size = width * height", "size = width / height"),
    ("area", "if size > LIMIT:", "if not size > LIMIT:"),
    ("area", "if size > LIMIT:", "if size >= LIMIT:"),
    ("area", "return LIMIT", "pass"),
}
CONDITION = "if width < 0 and height != 0:"
SURVIVE = {  # what a test with positive numbers cannot tell
    (CONDITION, "if width <= 0 and height != 0:"),
    (CONDITION, "if width < 1 and height != 0:"),
    (CONDITION, "if width < 0 and height == 0:"),
    (CONDITION, "if width < 0 and height != 1:"),
    ("raise ValueError('width: 1 + 1')", "pass"),
    ("if size > LIMIT:", "if size >= LIMIT:"),
}


def test_code_is_mutated_and_text_for_people_is_not():
    found = mutations.mutations_of(SOURCE, "toy")
    changes = [(mutation.function, mutation.before, mutation.after) for mutation in found]
    assert sorted(changes) == sorted(EXPECTED)
    assert {mutation.kind for mutation in found} == set(mutations.KINDS)


def test_a_mutation_changes_one_place():
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutation in mutations.mutations_of(SOURCE, "toy"):
        lines = mutations.mutated(SOURCE, mutation).splitlines()
        assert len(lines) == len(plain)
        assert sum(before != after for before, after in zip(plain, lines, strict=True)) == 1


def test_mutations_are_the_same_wherever_the_code_is():
    found = mutations.mutations_of(SOURCE, "toy")
    wrapped = SOURCE.replace("width * height", "(width\n * height)")
    moved = "def new(a):\n    return a - 1\n\n\n" + wrapped
    others = mutations.mutations_of(moved, "toy")
    assert set(found) < set(others)
    kept = [mutation for mutation in mutations.in_order(others, 0) if mutation in set(found)]
    ranked = sorted(found, key=lambda mutation: mutation.rank(0))
    assert sorted(kept, key=lambda mutation: mutation.rank(0)) == ranked
    assert mutations.in_order(found, 0) != mutations.in_order(found, 1)


@pytest.fixture
def tree(tmp_path):
    """A checkout of a toy package whose test knows nothing of negative widths."""
    tree = tmp_path / "tree"
    (tree / "toy").mkdir(parents=True)
    (tree / "tests").mkdir()
    (tree / "toy" / "__init__.py").touch()
    (tree / "toy" / "shapes.py").write_text(SOURCE)
    (tree / "tests" / "test_shapes.py").write_text(
        "from toy.shapes import area\n\ndef test_area():\n"
        "    assert [area(1), area(1, 3), area(4)] == [2, 3, 3]\n"
    )
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    return tree


def run(tree, out, *options):
    code = "; ".join(
        [
            "import mutations",
            "mutations.PACKAGE, mutations.PRELOADED = 'toy', ['pytest']",
            "mutations.MODULES = {'shapes': (['test_shapes'], ['test_shapes'])}",
            "mutations.main()",
        ]
    )
    command = [sys.executable, "-c", code, str(out), "--tree", str(tree), *options]
    ran = subprocess.run(
        command, cwd=Path(mutations.__file__).parent, capture_output=True, text=True
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return lines, ran


def test_what_tests_catch_and_what_survives(tree, tmp_path):
    out = tmp_path / "out.jsonl"
    (first, *lines), ran = run(tree, out, "--per-module", "4", "--jobs", "2")
    assert (first["result"], len(lines)) == ("tests pass", 4), ran.stderr
    results = {(line["before"], line["after"]): line["result"] for line in lines}
    assert set(results.values()) == {"caught", "survived"}
    for change, result in results.items():
        assert result == ("survived" if change in SURVIVE else "caught"), change
    assert all("test_area" in line["by"] for line in lines if line["result"] == "caught")
    assert (tree / "toy" / "shapes.py").read_text() == SOURCE
    assert len(run(tree, out, "--per-module", "4")[0]) == 5  # nothing is left to do


def test_mutations_of_an_earlier_file_are_found_in_a_tree_that_has_changed(tree, tmp_path):
    earlier = [{**vars(m), "module": "shapes"} for m in mutations.mutations_of(SOURCE, "shapes")]
    out = tmp_path / "before.jsonl"
    out.write_text("".join(json.dumps(line) + "\n" for line in earlier))
    moved = SOURCE.replace("width * height", "height * width").replace("LIMIT = 3", "\nLIMIT = 3")
    (tree / "toy" / "elsewhere.py").write_text(moved.replace("def area", "def renamed"))
    (tree / "toy" / "shapes.py").write_text("from toy.elsewhere import renamed as area\n")
    listed = run(tree, tmp_path / "x", "--again", str(out), "--list")[1].stdout.splitlines()
    found = {line.split("  ", 2)[2] for line in listed}
    gone = {"size = width * height", "def area(width, height=2):"}
    assert found == {f"{b}  ->  {a}" for _, b, a in EXPECTED if b not in gone}
    assert all(line.startswith("toy/elsewhere.py:") for line in listed)


def test_tests_that_fail_without_a_mutation_stop_it(tree, tmp_path):
    (tree / "tests" / "test_shapes.py").write_text("def test_area():\n    assert False\n")
    lines, ran = run(tree, tmp_path / "out.jsonl")
    assert lines == [] and ran.returncode and "without a mutation" in ran.stderr

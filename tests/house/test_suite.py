"""How the tests lie: in folders as the package's, and what they share in tests/builders."""

from __future__ import annotations

import ast

from builders.paths import ROOT

TESTS = ROOT / "tests"


# Folders of tests that are about no folder of the package.
OTHERS = {"examples", "house", "integration"}


def imported_by(source: str) -> set[str]:
    """The first parts of the modules that a file imports, wherever it does so."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {module.split(".")[0] for module in modules}


def test_no_file_imports_a_test_file():
    files = sorted(TESTS.rglob("*.py"))
    unfit = {file.stem for file in files if file.stem.startswith("test_")} | {"conftest"}
    assert {"test_heads", "test_server", "conftest"} <= unfit
    found = {file.name: imported_by(file.read_text(encoding="utf-8")) & unfit for file in files}
    assert not {name: modules for name, modules in found.items() if modules}


def test_folders_are_the_packages():
    folders = {file.parent.name for file in TESTS.glob("*/test_*.py")}
    wings = {file.parent.name for file in (ROOT / "caft_plugin").glob("*/__init__.py")}
    assert folders - OTHERS <= wings


def test_what_make_test_quick_runs_is_there():
    listed = (TESTS / "quick.txt").read_text(encoding="utf-8").splitlines()
    assert listed and not [path for path in listed if not (ROOT / path.split("::")[0]).exists()]


def test_no_two_files_have_one_name():
    """pytest imports them by their names alone."""
    names = [file.name for file in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names))

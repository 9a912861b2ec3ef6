"""The walls of the house, read from the source: who may import whom, how large a class may be,
how dense a line, where the map leads."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from house_figures import figures

from builders.paths import ROOT

HOUSE = ROOT / "caft_plugin"
FILES = sorted(file for file in HOUSE.rglob("*.py") if "figures" not in file.parts)
FRAMEWORKS = {"axolotl", "trl"}
ENGINE = "serving/parallel"  # imported by vLLM alone
# The floors, from the ground up. A wing (a folder) or a file of the hall imports only itself and
# what is on floors below.
FLOORS = (
    {"errors", "config", "files", "logs", "precision", "quiet", "targets", "refusals"},
    {"model"},
    {"caft"},
    {"meap", "mtp", "drafting", "serving", "plan"},
    {"checkpoints", "model_card"},
    {"trainer_parts"},
    {"run_files"},
    {"training"},
    {"stage1"},
    {"axolotl", "trl", "_startup"},
    {"tools"},
)
GROUND = FLOORS[0]
BRIDGE = {("_startup", "axolotl/slips")}
# Rooms that some may not import although they are on a floor below.
CLOSED = {
    "plan": {"caft/objective", "caft/window"},  # it estimates, and trains nothing
    "trl": {"plan", "stage1", "serving", "drafting"},
    "tools": {"trl"},
    "_startup": {"axolotl/plugin"},  # it runs in every Python process
}
LINES, METHODS, ANYS = 250, 15, 90
# Classes that may be larger, and why.
LARGE = {
    "caft/attach.AttachedHeads": "a method for each moment of a forward pass in which heads run",
    "caft/objective.AuxiliaryObjective": "a method for each place where a trainer meets heads",
    "meap/training.MaskedTraining": "a method for each place where a trainer meets masks",
    "training.CAFTTrainerMixin": "a method for each of Trainer's that heads or masks need",
}
# The most that there may be of each figure of tests/house_figures.py.
AT_MOST = {
    "tokens a line": 7.5,
    "branches": 0,  # functions with many branches
    "deep": 0,  # functions with blocks in blocks in blocks
    "parallel": 0,  # assignments of several values to several names
    "crowded": 0,  # statements with more than one conditional expression
}


def name_of(file: Path) -> str:
    return file.relative_to(HOUSE).with_suffix("").as_posix().removesuffix("/__init__")


def room_of(name: str) -> str:
    """The wing of a file, or the file itself where it stands in the hall."""
    return name.split("/")[0]


def floor_of(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room_of(name) in rooms)


def imports_of(file: Path) -> list[tuple[str, list[str]]]:
    """Modules that a file imports, wherever it does so, with the names that it takes from each."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.append((node.module, [alias.name for alias in node.names]))
    return found


def of_ours(file: Path) -> list[str]:
    """The modules of ours that a file imports, by the names that they have in the house."""
    found = []
    for module, names in imports_of(file):
        if module == "caft_plugin":
            found += [
                name for name in names if (HOUSE / f"{name}.py").exists() or (HOUSE / name).is_dir()
            ]
        elif module.startswith("caft_plugin."):
            found.append(module.removeprefix("caft_plugin.").replace(".", "/"))
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_imports_its_own_wing_and_floors_below(file):
    name = name_of(file)
    if name == "__init__":
        return
    for imported in of_ours(file):
        assert not {imported, room_of(imported)} & CLOSED.get(room_of(name), set()), (
            f"{name} imports {imported}"
        )
        if (
            room_of(name) == room_of(imported)
            or {name, imported} <= GROUND
            or (name, imported) in BRIDGE
        ):
            continue
        assert floor_of(imported) < floor_of(name), f"{name} imports {imported}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_doors_import_frameworks(file):
    if room_of(name_of(file)) not in FRAMEWORKS | {"_startup"}:
        frameworks = {module.split(".")[0] for module, _ in imports_of(file)} & FRAMEWORKS
        assert not frameworks, f"{name_of(file)} imports {frameworks}"


def test_only_the_draft_class_imports_vllm():
    importing = {
        name_of(file)
        for file in FILES
        for module, _ in imports_of(file)
        if module.split(".")[0] == "vllm"
    }
    assert importing == {ENGINE, "serving"}  # the last inside of a function


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_private_name_crosses_a_wall(file):
    for module, names in imports_of(file):
        if module.split(".")[0] == "caft_plugin":
            private = [name for name in (*names, *module.split(".")) if name.startswith("_")]
            assert not private, f"{name_of(file)} imports {private} of {module}"


def test_nothing_imports_in_a_circle():
    inside = {name_of(file): of_ours(file) for file in FILES}

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        for imported in inside.get(name, []):
            visit(imported, [*above, name])

    for name in inside:
        visit(name, [])


def classes() -> dict[str, ast.ClassDef]:
    return {
        f"{name_of(file)}.{node.name}": node
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def test_only_listed_classes_are_large():
    for name, node in classes().items():
        lines = node.end_lineno - node.lineno + 1
        methods = sum(
            isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) for part in node.body
        )
        is_large = lines > LINES or methods > METHODS
        assert name in LARGE or not is_large, (
            f"{name} has {lines} lines and {methods} methods: split it, or say why it is large"
        )


def test_the_mixin_only_overrides_methods_of_trainer():
    from transformers import Trainer

    mixin = classes()["training.CAFTTrainerMixin"]
    methods = [part.name for part in mixin.body if isinstance(part, ast.FunctionDef)]
    assert [name for name in methods if not hasattr(Trainer, name)] == []
    assert mixin.end_lineno - mixin.lineno + 1 <= 200


def test_the_list_of_large_classes_names_classes():
    assert LARGE.keys() <= classes().keys()


@pytest.mark.parametrize("figure", AT_MOST)
def test_code_is_thin(figure):
    found = figures()[figure]
    count = len(found) if isinstance(found, list) else round(found, 1)
    assert count <= AT_MOST[figure], found


def test_an_error_is_raised_where_it_is_made():
    """A function that refuses raises: none returns an error, or makes one for its caller."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = f"{name_of(file)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                assert "Error" not in ast.unparse(node.returns), f"{place} {node.name}"
            if isinstance(node, ast.Raise) and node.exc is not None:
                made = ast.unparse(node.exc.func) if isinstance(node.exc, ast.Call) else ""
                assert made.rpartition(".")[2][:1].isupper(), f"{place} {ast.unparse(node)[:80]}"


def test_types_are_known():
    found = sum(len(re.findall(r"\bAny\b", file.read_text(encoding="utf-8"))) for file in FILES)
    assert found <= ANYS
    study = (ROOT / "trl_examples" / "study").rglob("*.py")
    assert sum(len(re.findall(r"\bAny\b", file.read_text(encoding="utf-8"))) for file in study) <= 5


def test_the_map_leads_to_every_file_and_to_no_other():
    text = (HOUSE / "README.md").read_text(encoding="utf-8")
    section = text.split("## The map")[1].split("\n## ")[0]
    mapped = {
        name
        for row in re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
        for name in re.findall(r"`([^`]+\.py)`", row)
    }
    inits = {file.relative_to(HOUSE).as_posix() for file in FILES if file.name == "__init__.py"}
    there = {file.relative_to(HOUSE).as_posix() for file in HOUSE.rglob("*.py")}
    assert mapped == there - inits


def test_the_engine_is_imported_without_a_framework():
    import subprocess

    modules = [
        f"caft_plugin.{name_of(file).replace('/', '.')}"
        for file in FILES
        if room_of(name_of(file)) != "axolotl" and name_of(file) != ENGINE
    ]
    modules = [
        name
        for name in modules
        if name not in ("caft_plugin.trl", "caft_plugin._startup", "caft_plugin.__init__")
    ]
    code = "\n".join(
        [
            "import importlib, sys",
            # importing one of these now fails
            f"for name in {FRAMEWORKS}: sys.modules[name] = None",
            f"for name in {modules}: importlib.import_module(name)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr

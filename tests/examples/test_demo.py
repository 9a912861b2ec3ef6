"""The demo's data and programs: the rows are what the program makes, and the constraints fit every
installation."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from builders.paths import ROOT

DEMO = ROOT / "axolotl_configs" / "demo"
sys.path.insert(0, str(DEMO))
import make_docstrings
import plain_config
import run_axolotl

PACKAGES = (*make_docstrings.TRAIN, *make_docstrings.HELDOUT)
NAMES = ("docstrings-train.jsonl", "docstrings-heldout.jsonl")


def rows_of(name):
    return [
        json.loads(line)["messages"]
        for line in (DEMO / name).read_text(encoding="utf-8").splitlines()
    ]


def installed(package):
    try:
        return importlib.metadata.version(package.name) == package.version
    except importlib.metadata.PackageNotFoundError:
        return False


# -- the data --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not all(map(installed, PACKAGES)), reason="other versions of the packages are installed"
)
def test_the_files_are_what_the_program_makes(tmp_path):
    assert make_docstrings.main([f"--out={tmp_path}"]) == 0
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


@pytest.mark.parametrize(("name", "rows"), zip(NAMES, (900, 100), strict=True))
def test_a_row_is_a_short_function_and_one_sentence(name, rows):
    assert len(rows_of(name)) == rows and (DEMO / name).stat().st_size < 1_000_000
    for question, answer in rows_of(name):
        assert (question["role"], answer["role"]) == ("user", "assistant")
        code = re.fullmatch(
            r"(?s)Write a one-line docstring .*\n\n```python\n(def .*)\n```", question["content"]
        )[1]
        assert len(code) <= 400 and '"""' not in code and answer["content"] not in code
        assert re.fullmatch(r"[A-Z][ -~]{10,95}\.", answer["content"])


def test_no_function_or_docstring_is_there_twice():
    rows = [row for name in NAMES for row in rows_of(name)]
    codes = [question["content"] for question, _ in rows]
    names = [re.search(r"def (\w+)", code)[1] for code in codes]
    sentences = [answer["content"].lower() for _, answer in rows]
    assert len(set(codes)) == len(set(names)) == len(set(sentences)) == len(rows) == 1_000


def test_train_and_heldout_are_from_other_packages_and_all_are_named_with_their_licence():
    assert len({package.name for package in PACKAGES}) == len(PACKAGES)
    licences = (DEMO / "LICENSES.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        assert re.search(
            rf"(?im)^## {package.name} {re.escape(package.version)} \((BSD 3-clause|MIT)\)$",
            licences,
        )
    assert (
        licences.count("THIS SOFTWARE IS PROVIDED") == 6
        and licences.count("Permission is hereby granted") == 1
    )


SOURCE = '''
def kept(values, most):
    """Return the values that are below the limit.

    More about it.
    """

    below = [value for value in values if value < most]
    return below

def stub(values, most):
    """Return the values that are below another limit."""
    first, second = values, most
    raise NotImplementedError("a subclass has this one")

def long(values, most):
    """Return the values that are below a limit, in a sentence that
    continues on the second line."""
    return [value for value in values if value < most and value > -most]
'''


def test_a_docstring_is_cut_out_of_its_function():
    seen = set()
    (function,) = make_docstrings.clear_functions([SOURCE], seen)
    assert function.docstring == "Return the values that are below the limit."
    assert function.code.splitlines() == [
        "def kept(values, most):",
        "    below = [value for value in values if value < most]",
        "    return below",
    ]
    assert make_docstrings.clear_functions([SOURCE], seen) == []


def test_more_rows_than_there_are_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make_docstrings, "read_package", lambda package: [SOURCE])
    assert make_docstrings.main([f"--out={tmp_path}", "--heldout=2"]) == 1
    assert "2 rows were asked for and 1 functions pass the filter" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- the plain run ---------------------------------------------------------------------------------


def test_the_plain_run_differs_in_the_block_alone(tmp_path, capsys):
    config, plain = (
        ROOT / "axolotl_configs" / "quickstart-cpu.yml",
        tmp_path / "folder" / "plain.yml",
    )
    assert plain_config.main([str(config), str(plain)]) == 0
    wanted = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert wanted.pop("caft") == {"num_heads": 4}
    assert yaml.safe_load(plain.read_text(encoding="utf-8")) == wanted
    assert (
        plain_config.main([str(plain), str(plain)]) == 1
        and "no caft: block" in capsys.readouterr().err
    )


# -- what is kept off the screen -------------------------------------------------------------------


def test_only_the_named_warnings_are_left_out(caplog):
    loggers = {name: logging.getLogger(name) for name in run_axolotl.LEFT_OUT}
    before = {name: list(logger.filters) for name, logger in loggers.items()}
    propagated = {name: logger.propagate for name, logger in loggers.items()}
    run_axolotl.leave_out_known_warnings()
    try:
        for name, parts in run_axolotl.LEFT_OUT.items():
            loggers[name].propagate = True
            for part in parts:
                loggers[name].warning("%s in its context", part)
            loggers[name].warning("the disk is full")
            logging.getLogger("another").warning(parts[0])
    finally:
        for name, logger in loggers.items():
            logger.filters, logger.propagate = before[name], propagated[name]
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("the disk is full") == len(loggers) and len(messages) == 2 * len(loggers)


# -- the constraints -------------------------------------------------------------------------------

PINS = [
    Requirement(line)
    for line in (DEMO / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


def test_a_constraint_is_a_version_and_nothing_else():
    for pin in PINS:
        assert (
            [one.operator for one in pin.specifier] == ["=="]
            and pin.url is None
            and pin.marker is None
        ), pin
        assert "+" not in str(pin.specifier), f"{pin}: a build of one index"
    names = [canonicalize_name(pin.name) for pin in PINS]
    assert len(set(names)) == len(names)
    # a build of torch for CUDA pins other versions of these
    assert not [
        name
        for name in names
        if name in ("torch", "triton", "caft-plugin") or name.startswith("nvidia-cu")
    ]
    assert {
        "axolotl",
        "transformers",
        "gradio",
        "pydantic",
        "fastapi",
        "fsspec",
        "virtualenv",
        "gguf",
    } <= set(names)


def test_the_constraints_allow_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in PINS}
    for wanted in map(
        Requirement,
        [*project["dependencies"], *extras["axolotl"], *extras["study"], *extras["dev"]],
    ):
        version = pins.get(canonicalize_name(wanted.name))
        assert version is None or wanted.specifier.contains(version), f"{wanted} against {version}"

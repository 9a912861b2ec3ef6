"""Rows of a text-like task for decoding.py: describe a Python function or class, given its name and
parameters.

    python tests/benchmarks/descriptions.py OUT

Writes descriptions-train.jsonl and descriptions-heldout.jsonl into OUT. The answers are the first
paragraphs of docstrings of packages that Axolotl's installation brings (BSD licences); this
repository keeps none of them. The held-out rows are from another package than the training rows.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

TRAIN = ("networkx", "numpy", "pandas", "scipy", "sympy")
HELD_OUT = ("sklearn",)
WORDS = range(20, 71)  # of an answer


def modules(package: str) -> Iterator[ModuleType]:
    """Yield the public modules of a package that can be imported."""
    root = importlib.import_module(package)
    yield root
    for found in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda _: None):
        if re.search(r"\.(_|tests?\b|conftest|testing|externals)", found.name):
            continue
        try:
            yield importlib.import_module(found.name)
        except Exception:  # optional dependencies
            continue


def functions_and_classes(package: str) -> Iterator[tuple[str, FunctionType | type]]:
    """Yield the names of public functions and classes, and these, where they are defined in a
    package."""
    for module in modules(package):
        for name, found in sorted(vars(module).items()):
            found = inspect.unwrap(found) if callable(found) else None
            if (
                isinstance(found, FunctionType | type)
                and found.__module__.startswith(package)
                and name[0] != "_"
            ):
                yield f"{package}.{name}", found


def description(documented: FunctionType | type) -> str:
    """Return a docstring up to its first section, list, example or formula, on one line."""
    text = documented.__doc__
    # some classes have a descriptor there
    text = inspect.cleandoc(text) if isinstance(text, str) else ""
    text = re.split(r"\n\s*(?:\n\.\. |[A-Z][A-Za-z ]+\n\s*[-=]{3,}|>>>|[-*] |:param)", text)[0]
    return " ".join(text.split())


def parameters(documented: FunctionType | type) -> str:
    """Return the first eight parameters, which are enough to say what is documented."""
    try:
        return ", ".join(list(inspect.signature(documented).parameters)[:8])
    except (TypeError, ValueError):  # some classes that are written in C
        return ""


def rows(packages: tuple[str, ...]) -> list[dict[str, object]]:
    """Return chat rows, each description once, in an order that depends on the texts only."""
    found = {}
    for package in packages:
        for name, documented in functions_and_classes(package):
            answer = description(documented)
            plain = answer.isascii() and not re.search(r"deprecated|\.\. |::|\\|`[^`]*$", answer)
            if plain and len(answer.split()) in WORDS and answer.endswith("."):
                found.setdefault(answer, f"Describe `{name}({parameters(documented)})` in Python.")
    ordered = sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    said = [
        ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
        for answer, asked in ordered
    ]
    return [{"messages": list(pair)} for pair in said]


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for part, packages in (("train", TRAIN), ("heldout", HELD_OUT)):
        lines = [json.dumps(row) for row in rows(packages)]
        (out / f"descriptions-{part}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{len(lines)} rows of {', '.join(packages)}")


if __name__ == "__main__":
    main()

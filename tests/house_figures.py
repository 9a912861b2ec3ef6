"""How dense the code of the package is. `python tests/house_figures.py [--names]` prints figures,
and places.

A line of code is a line with at least one token that is neither a comment nor part of a docstring.
"""

from __future__ import annotations

import ast
import functools
import io
import sys
import tokenize
from collections.abc import Iterator

from builders.paths import ROOT

FILES = sorted(file for file in (ROOT / "caft_plugin").rglob("*.py") if "figures" not in file.parts)
BRANCHES, DEPTH = 10, 3
LAYOUT = {
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
BRANCHING = (
    ast.If,
    ast.For,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.comprehension,
    ast.BoolOp,
    ast.match_case,
)
NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that hold docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, Function))
            and ast.get_docstring(node) is not None
        ):
            text = node.body[0]
            lines |= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return lines


def count_tokens(source: str, docstrings: set[int]) -> tuple[int, int, int]:
    """Return tokens of code, lines of code and comments."""
    tokens, comments = 0, 0
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.type not in LAYOUT and token.start[0] not in docstrings:
            tokens += 1
            lines |= set(range(token.start[0], token.end[0] + 1))
    return tokens, len(lines), comments


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def branches(function: Function) -> int:
    return sum(isinstance(node, BRANCHING) for node in ast.walk(function))


def depth(node: ast.AST, level: int = 0) -> int:
    """Return how deep blocks are nested in a function; `elif` counts as its `if`."""
    deepest = level
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (Function, ast.ClassDef)):
                continue
            elif_of = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
            deepest = max(
                deepest, depth(child, level + (isinstance(child, NESTING) and not elif_of))
            )
    return deepest


def parallel_assignments(tree: ast.Module) -> Iterator[ast.Assign]:
    """Yield assignments of several values to several names in one statement: `a, b = x, y`."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            yield node


def crowded_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield simple statements with more than one conditional expression."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            if sum(isinstance(part, ast.IfExp) for part in ast.walk(node)) > 1:
                yield node


@functools.cache
def figures() -> dict[str, float | list[str]]:
    """Return the figures by name; a list names the places."""
    tokens, lines, comments = 0, 0, 0
    found: dict[str, list[str]] = {"branches": [], "deep": [], "parallel": [], "crowded": []}
    for file in FILES:
        source = file.read_text(encoding="utf-8")
        tree, name = ast.parse(source), str(file.relative_to(ROOT))
        here = count_tokens(source, docstring_lines(tree))
        tokens, lines, comments = (
            old + new for old, new in zip((tokens, lines, comments), here, strict=True)
        )
        for function in functions(tree):
            place = f"{name}:{function.lineno} {function.name}"
            if branches(function) > BRANCHES:
                found["branches"].append(place)
            if depth(function) > DEPTH:
                found["deep"].append(place)
        found["parallel"] += [f"{name}:{node.lineno}" for node in parallel_assignments(tree)]
        found["crowded"] += [f"{name}:{node.lineno}" for node in crowded_statements(tree)]
    return {
        "lines": lines,
        "tokens a line": tokens / lines,
        "comments %": 100 * comments / lines,
        **found,
    }


def main() -> None:
    for name, value in figures().items():
        if not isinstance(value, list):
            print(f"{name:<14}{value:10.1f}")
            continue
        print(f"{name:<14}{len(value):10}")
        if "--names" in sys.argv:
            print("".join(f"    {place}\n" for place in value), end="")


if __name__ == "__main__":
    main()

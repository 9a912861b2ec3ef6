"""Mutation testing: are faults in the central modules caught by their tests? CI does not run it.

    python tests/mutations.py OUT.jsonl [--only MODULE ...] [--per-module 6] [--seed 0] [--jobs 1]
        [--tree CHECKOUT] [--again EARLIER.jsonl] [--wider] [--list]

A mutation changes an operator, a constant or a condition of a statement, or removes the statement.
Each is made alone, in a copy of the checkout in a temporary folder, and the module's tests run
until one fails. OUT.jsonl gets a line for each as it is done, and what it has is not run again. A
run that takes much longer than without a mutation counts as caught. `--wider` then runs more tests
for those that survived; a later line for the same mutation takes the place of the one before.

A mutation is known by module, function and the statement's code, whatever its line. `--again` makes
the mutations of an earlier file in a tree that has changed since: those whose statement is still
somewhere in the package, and in place of the others new ones of the same module.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "caft_plugin"
# The tests of each module, the most telling first, and more for what these do not catch (--wider).
# Files of both are found by name.
MODULES: dict[str, tuple[list[str], list[str]]] = {
    "loss": (["test_loss", "test_golden"], ["test_masking", "test_fused_loss", "test_heads"]),
    "window": (["test_window"], ["test_objective", "test_training", "test_fused_loss"]),
    "objective": (["test_objective"], ["test_training", "test_fused_loss"]),
    "attach": (["test_heads"], ["test_objective", "test_host_model", "test_training"]),
    "masking": (["test_masking"], ["test_masked_training", "test_meap_losses"]),
    "copies": (["test_copies"], ["test_heads", "test_precision"]),
    "decoding": (["test_decoding"], ["test_decoding", "test_speculate"]),
    "pace": (["test_pace"], ["test_decoding"]),
    "checkpoints": (["test_checkpoints"], ["test_training"]),
    "heads_folder": (["test_heads_folder"], ["test_fingerprint", "test_heads", "test_training"]),
}
# pytest's -k, but for --wider: the same tests again for many models or settings.
QUICK = "not (families or every_family or without_a_cache or compiled or any_model_prompt)"
PRELOADED = ("pytest", "torch", "transformers", "peft", "accelerate")  # once, before forking
KINDS = ("operator", "constant", "condition", "line")

OTHER = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
# Text for people: what it says is no behaviour that a test of the module has to hold.
FOR_PEOPLE = re.compile(r"^(logger|LOG|log|warnings)\.|(Error|Warning)$|^(warn|warn_once)$")
PATH = re.compile(r"folder|path", re.I)  # whose `/` is no division
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change of one statement. `before` and `after` are its code (of a block, its first line);
    `occurrence` counts statements of the function with the same change."""

    module: str
    function: str
    before: str
    after: str
    occurrence: int
    kind: str = dataclasses.field(compare=False)
    line: int = dataclasses.field(compare=False)

    def rank(self, seed: int) -> float:
        """Return a random number that depends on nothing else in the module."""
        known = [self.module, self.function, self.before, self.after, self.occurrence]
        return random.Random(f"{seed} {json.dumps(known)}").random()


@dataclasses.dataclass
class Edit:
    """What a field of a node is to be; `swap` puts it there, and swapped again, takes it back."""

    kind: str
    owner: ast.AST
    field: str
    index: int | None
    new: object

    def swap(self) -> None:
        value = getattr(self.owner, self.field)
        if self.index is None:
            setattr(self.owner, self.field, self.new)
            self.new = value
        else:
            value[self.index], self.new = self.new, value[self.index]


# -- finding mutations -----------------------------------------------------------------------------


def negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def is_negatable(test: ast.expr) -> bool:
    """Return True if an edit of the test's own operator is its negation."""
    exact = ast.Is | ast.IsNot | ast.In | ast.NotIn | ast.Eq | ast.NotEq
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], exact)
    return isinstance(test, ast.UnaryOp)


def other(operator: ast.AST) -> ast.AST | None:
    found = OTHER.get(type(operator))  # type: ignore[call-overload]
    return None if found is None else found()


def replacements(node: ast.AST, parent: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield kinds and new expressions for an expression."""
    match node:
        case ast.BinOp(_, ast.Div(), _) if PATH.search(ast.unparse(node)):
            return
        case ast.BinOp(left, operator, right) if (new := other(operator)) is not None:
            yield "operator", ast.BinOp(left, new, right)
        case ast.Compare(left, [operator], right) if (new := other(operator)) is not None:
            yield "operator", ast.Compare(left, [new], right)
        case ast.BoolOp(operator, values) if (new := other(operator)) is not None:
            yield "condition", ast.BoolOp(new, values)
        case ast.UnaryOp(ast.Not(), operand):
            yield "condition", operand
        case ast.UnaryOp(ast.USub() | ast.Invert(), operand):
            yield "operator", operand
        case ast.IfExp(test, body, orelse) if not is_negatable(test):
            yield "condition", ast.IfExp(negated(test), body, orelse)
        case ast.Constant(bool() as value):
            yield "constant", ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(str() as value) if isinstance(parent, (ast.Compare, ast.Subscript)):
            yield "constant", ast.Constant(f"{value}_")


def untouched(node: ast.AST, parent: ast.AST) -> bool:
    """Return True for text, type hints, errors, and checks of a programmer's own mistakes."""
    if isinstance(node, (ast.JoinedStr, ast.arg)):
        return True
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    if isinstance(node, ast.Call):
        return bool(FOR_PEOPLE.search(ast.unparse(node.func)))
    if isinstance(parent, ast.Call) and ast.unparse(parent.func) in ("isinstance", "cast"):
        return node is not parent.args[0]
    return False


def edits_in(node: ast.AST, fields: Iterable[str] | None = None) -> Iterator[Edit]:
    """Yield edits of the expressions in a node's fields, and of theirs."""
    for field in node._fields if fields is None else fields:
        value = getattr(node, field, None)
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or untouched(child, node):
                continue
            if field == "ifs" and isinstance(child, ast.expr) and not is_negatable(child):
                yield Edit("condition", node, field, index, negated(child))
            for kind, new in replacements(child, node):
                yield Edit(kind, node, field, index, new)
            yield from edits_in(child)


def edits_of(statement: ast.stmt) -> Iterator[Edit]:
    """Yield edits of a statement's own expressions, without those of a block below it."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield from edits_in(statement.args)  # defaults
        case ast.If() | ast.While():
            if not is_negatable(statement.test):
                yield Edit("condition", statement, "test", None, negated(statement.test))
            yield from edits_in(statement, ["test"])
        case ast.For():
            yield from edits_in(statement, ["iter"])
        case ast.With():
            yield from edits_in(statement, ["items"])
        case ast.Match():
            yield from edits_in(statement, ["subject"])
        case ast.Assign() | ast.AnnAssign() | ast.Return() | ast.Expr():
            yield from edits_in(statement, ["targets", "value"])
        case ast.AugAssign():
            new = other(statement.op)
            if new is not None:
                yield Edit("operator", statement, "op", None, new)
            yield from edits_in(statement, ["value"])


def removable(statement: ast.stmt, block: ast.AST, scope: Scope) -> bool:
    """Return True if code without the statement could be taken for finished: names stay bound."""
    match statement:
        case ast.Expr(ast.Call() as call):
            return not FOR_PEOPLE.search(ast.unparse(call.func))
        case ast.Return():
            return block is not scope
        case ast.Raise() | ast.Continue() | ast.Break() | ast.Delete() | ast.AugAssign():
            return True
        case ast.Assign() | ast.AnnAssign(value=ast.expr()):
            if scope.name == "__init__":
                return False
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            stored = {n.id for t in targets for n in ast.walk(t) if is_stored(n)}
            return stored <= bound_elsewhere(statement, scope)
    return False


def is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def bound_elsewhere(statement: ast.stmt, scope: Scope) -> set[str]:
    """Return the names that a function binds in other statements or gets as arguments."""
    own = set(ast.walk(statement))
    names = {node.id for node in ast.walk(scope) if is_stored(node) and node not in own}
    return names | {node.arg for node in ast.walk(scope) if isinstance(node, ast.arg)}


def code_of(statement: ast.stmt) -> str:
    """Return a statement's code; of one with blocks, its first line without decorators."""
    if isinstance(statement, Scope):
        plain = {**vars(statement), "decorator_list": [], "body": [ast.Pass()]}
        statement = type(statement)(**plain)
    text = ast.unparse(statement)
    return text.split("\n")[0] if hasattr(statement, "body") else text


def edits(tree: ast.Module) -> Iterator[tuple[str, ast.stmt, Edit]]:
    """Yield all edits of a module, with the function and the statement that they change."""

    def of_blocks(owner: ast.AST, names: list[str], scope: ast.AST) -> Iterator:
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            for index, part in enumerate(getattr(owner, field, [])):
                if isinstance(part, (ast.ExceptHandler, ast.match_case)):
                    yield from of_blocks(part, names, scope)
                    continue
                removal = Edit("line", owner, field, index, ast.Pass())
                yield from of_statement(part, removal, names, scope)

    def of_statement(part: ast.stmt, removal: Edit, names: list[str], scope: ast.AST) -> Iterator:
        function = ".".join(names)
        in_function = isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef))
        for edit in edits_of(part):
            if in_function or edit.kind == "constant":
                yield function, part, edit
        if in_function and removable(part, removal.owner, scope):
            yield function, part, removal
        inner = isinstance(part, Scope)
        within = [*names, part.name] if inner else names
        yield from of_blocks(part, within, part if inner else scope)

    yield from of_blocks(tree, [], tree)


def known_edits(source: str, module: str) -> Iterator[tuple[Mutation, ast.Module, Edit]]:
    """Yield mutations of a module's source, with its tree and how to make them there."""
    tree = ast.parse(source)
    seen: Counter[tuple[str, str, str]] = Counter()
    of_statement: set[tuple[int, str]] = set()
    for function, statement, edit in list(edits(tree)):
        before = code_of(statement)
        edit.swap()
        after = "pass" if edit.kind == "line" else code_of(statement)
        edit.swap()
        if before == after or (id(statement), after) in of_statement:
            continue
        of_statement.add((id(statement), after))
        key = function, before, after
        mutation = Mutation(module, *key, seen[key], edit.kind, statement.lineno)
        seen[key] += 1
        yield mutation, tree, edit


def mutations_of(source: str, module: str) -> list[Mutation]:
    return [mutation for mutation, _, _ in known_edits(source, module)]


def mutated(source: str, mutation: Mutation) -> str:
    """Return a module's source with a mutation."""
    for found, tree, edit in known_edits(source, mutation.module):
        if found == mutation:
            edit.swap()
            return ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    raise LookupError(mutation)


def in_order(found: Iterable[Mutation], seed: int) -> list[Mutation]:
    """Return mutations in the order in which they are taken: by chance, the kinds in turn."""
    by_kind: dict[str, list[Mutation]] = {kind: [] for kind in KINDS}
    for mutation in sorted(found, key=lambda mutation: mutation.rank(seed)):
        by_kind[mutation.kind].append(mutation)
    places = {m: (at, m.rank(seed)) for kind in by_kind.values() for at, m in enumerate(kind)}
    return sorted(places, key=lambda mutation: places[mutation])


# -- choosing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A mutation of a file, to be caught by the tests of module `tested`."""

    tested: str
    file: Path  # in the checkout
    mutation: Mutation

    @property
    def key(self) -> tuple:
        mutation = self.mutation
        return self.tested, mutation.function, mutation.before, mutation.after, mutation.occurrence


def only_file(folder: Path, name: str) -> Path:
    found = sorted(folder.rglob(f"{name}.py"))
    if len(found) != 1:
        raise SystemExit(f"{name}.py: {len(found)} files of that name below {folder}")
    return found[0]


def chosen(tree: Path, module: str, count: int, seed: int, earlier: list[dict]) -> list[Task]:
    """Return the mutations of a module: those of `earlier` that are still there, and others."""
    package = tree / PACKAGE
    own = only_file(package, module)
    candidates = in_order(mutations_of(own.read_text(encoding="utf-8"), module), seed)
    tasks = []
    if earlier:
        files = [own, *(file for file in sorted(package.rglob("*.py")) if file != own)]
        everywhere = [
            (file, mutation)
            for file in files
            for mutation in mutations_of(file.read_text(encoding="utf-8"), file.stem)
        ]
        for entry in earlier:
            same = [
                (file.name != own.name, mutation.function != entry["function"], at)
                for at, (file, mutation) in enumerate(everywhere)
                if (mutation.before, mutation.after) == (entry["before"], entry["after"])
            ]
            if same:
                task = Task(module, *everywhere[min(same)[-1]])
                tasks += [task] if task not in tasks else []
    taken = {task.mutation for task in tasks}
    others = [Task(module, own, mutation) for mutation in candidates if mutation not in taken]
    return [*tasks, *others[: max(count - len(tasks), 0)]]


# -- running ---------------------------------------------------------------------------------------


def copy_of(tree: Path, folder: Path) -> Path:
    """Copy the files that git tracks or would track."""
    listed = ["git", "-C", str(tree), "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if name and (tree / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / name, folder / name)
    return folder


def started(copy: Path, tests: list[Path], selected: str, log: Path) -> int:
    """Start tests in a copy, in a fork of this process, which has imported what takes long."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        os.chdir(copy)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        own = Path(__file__).resolve().parent
        others = [path for path in sys.path if path and Path(path).resolve() != own]
        sys.path[:] = [str(copy), *others]
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing them all takes a second
        sys.dont_write_bytecode = True
        import pytest

        plugins = ["-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin"]
        options = ["-x", "-q", *plugins, "--hypothesis-seed=0", "-m", "not slow", "-k", selected]
        status = int(pytest.main([*options, *map(str, tests)]))
    finally:
        sys.stdout.flush()
        os._exit(status)


@dataclasses.dataclass
class Process:
    pid: int
    task: Task | str  # a module's name: its tests without a mutation
    copy: Path
    log: Path
    limit: float
    begun: float = dataclasses.field(default_factory=time.monotonic)

    def ended(self) -> str | None:
        """Return what became of it, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and time.monotonic() - self.begun < self.limit:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with what it has started
        if pid == 0:
            os.waitpid(self.pid, 0)
            return "caught: out of time"
        code = os.waitstatus_to_exitcode(status)
        if code in (3, 4, 5, 70):  # pytest's own errors, and no tests
            raise SystemExit(f"the tests did not run:\n{self.log.read_text()[-3000:]}")
        if code == 0:
            return "survived"
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", self.log.read_text(errors="replace"), re.M)
        return f"caught: {failed[1] if failed else f'exit status {code}'}"


def run(
    tasks: list[Task], tree: Path, jobs: int, wider: bool, seconds: dict[str, float]
) -> Iterator[dict]:
    """Run tasks, `jobs` at a time; yield a line for each. Modules' own tests come before them.

    `seconds` are what a module's tests take without a mutation; missing ones are added.
    """
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        free = [copy_of(tree, folder / str(number)) for number in range(jobs)]
        running: list[Process] = []
        # Tests have to pass without a mutation, else all would be caught.
        waiting: list[Task | str] = []
        for task in tasks:
            if task.tested not in seconds and task.tested not in waiting:
                waiting.append(task.tested)
            waiting.append(task)
        try:
            while waiting or running:
                while waiting and free and may_start(waiting[0], seconds):
                    running.append(begin(waiting.pop(0), tree, free.pop(), wider, seconds))
                time.sleep(0.05)
                for process in list(running):
                    result = process.ended()
                    if result is None:
                        continue
                    running.remove(process)
                    took = round(time.monotonic() - process.begun, 1)
                    restore(process, tree)
                    free.append(process.copy)
                    if isinstance(process.task, Task):
                        yield line_of(process.task, tree, result, took, wider)
                        continue
                    if result != "survived":
                        raise SystemExit(f"{process.task}: without a mutation, {result}")
                    seconds[process.task] = took
                    yield {
                        "module": process.task,
                        "result": "tests pass",
                        "wider": wider,
                        "seconds": took,
                    }
        finally:
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)


def may_start(task: Task | str, seconds: dict[str, float]) -> bool:
    return isinstance(task, str) or task.tested in seconds


def begin(
    task: Task | str, tree: Path, copy: Path, wider: bool, seconds: dict[str, float]
) -> Process:
    module = task if isinstance(task, str) else task.tested
    tests = [only_file(copy / "tests", name) for name in MODULES[module][wider]]
    limit = 3600.0
    if isinstance(task, Task):
        limit = 60 + 4 * seconds[module]
        source = task.file.read_text(encoding="utf-8")
        changed = copy / task.file.relative_to(tree)
        changed.write_text(mutated(source, task.mutation), encoding="utf-8")
    log = copy.with_suffix(".log")
    return Process(started(copy, tests, "" if wider else QUICK, log), task, copy, log, limit)


def restore(process: Process, tree: Path) -> None:
    shutil.rmtree(process.copy / ".hypothesis", ignore_errors=True)  # examples of another fault
    if isinstance(process.task, Task):
        shutil.copy(process.task.file, process.copy / process.task.file.relative_to(tree))


def line_of(task: Task, tree: Path, result: str, seconds: float, wider: bool) -> dict:
    found = dataclasses.asdict(task.mutation)
    place = f"{task.file.relative_to(tree)}:{found.pop('line')}"
    result, _, by = result.partition(": ")
    more = {"place": place, "result": result, "by": by, "wider": wider, "seconds": seconds}
    return {**found, "module": task.tested, **more}


def lines_in(file: Path | None) -> list[dict]:
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def key_of(line: dict) -> tuple:
    names = ("module", "function", "before", "after", "occurrence")
    return tuple(line[name] for name in names)


def results_in(lines: list[dict]) -> dict[tuple, dict]:
    """Return the last line of each mutation."""
    return {key_of(line): line for line in lines if "before" in line}


def summary(lines: list[dict]) -> str:
    of_module: dict[str, list[bool]] = {}
    for line in results_in(lines).values():
        of_module.setdefault(line["module"], []).append(line["result"] == "caught")
    counts = [f"{module} {sum(caught)} of {len(caught)}" for module, caught in of_module.items()]
    every = [caught for module in of_module.values() for caught in module]
    return f"caught {sum(every)} of {len(every)}: {', '.join(counts)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a file of JSON lines")
    parser.add_argument("--only", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--per-module", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--again", type=Path, help="an earlier OUT.jsonl, of another tree")
    parser.add_argument("--wider", action="store_true", help="more tests for what has survived")
    parser.add_argument("--list", action="store_true", help="print the mutations and run none")
    options = parser.parse_args(arguments)
    tree = options.tree.resolve()
    lines = lines_in(options.out)
    earlier = results_in(lines_in(options.again))
    tasks = []
    for module in options.only:
        of_module = [line for line in earlier.values() if line["module"] == module]
        tasks += chosen(tree, module, options.per_module, options.seed, of_module)
    if options.list:
        for task in tasks:
            line = line_of(task, tree, "", 0, False)
            print(line["place"], line["function"], line["before"], "->", line["after"], sep="  ")
        return
    known = results_in(lines)
    if options.wider:
        left = {key for key, line in known.items() if line["result"] == "survived"}
        tasks = [task for task in tasks if task.key in left and not known[task.key]["wider"]]
    else:
        tasks = [task for task in tasks if task.key not in known]
    seconds = {
        line["module"]: line["seconds"]
        for line in lines
        if line["result"] == "tests pass" and line["wider"] == options.wider
    }
    with open(options.out, "a", encoding="utf-8") as file:
        for line in run(tasks, tree, options.jobs, options.wider, seconds):
            file.write(json.dumps(line) + "\n")
            file.flush()
            lines.append(line)
    print(summary(lines))


if __name__ == "__main__":
    main()

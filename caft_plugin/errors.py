"""The errors that users see, and how messages name settings and show values."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

HEADS_KEY = "caft.heads"
LONGEST = 100  # characters of a value or key in a message


class CAFTError(ValueError):
    """What caft_plugin refuses. The message names what was received, what is accepted, and the
    fix."""


class RunError(CAFTError, RuntimeError):
    """Something other than a setting that goes wrong in a run, such as a second backward pass."""


class ConfigError(CAFTError):
    """A setting that cannot work. The message names the key, the value, what is accepted and the
    fix."""


def shown(value: object) -> str:
    """Return a value as text for a message: on one line, with a limited length."""
    form = reprlib.Repr()
    form.maxstring = form.maxother = LONGEST
    try:
        return form.repr(value)
    except ValueError:  # an integer with thousands of digits
        return f"a {type(value).__name__} too long to be shown"


_heads_as: ContextVar[str] = ContextVar("caft_heads_as", default=HEADS_KEY)


def heads_as() -> str:
    """Return the caller's name for the heads folder (a key, an option or an argument), with which
    messages begin."""
    name = _heads_as.get()
    return setting_as("caft", "heads") if name == HEADS_KEY else name


@contextlib.contextmanager
def heads_named(name: str) -> Iterator[None]:
    """Use this option or argument name for the heads folder in messages; nested calls keep the
    outermost name."""
    token = _heads_as.set(name) if _heads_as.get() == HEADS_KEY else None
    try:
        yield
    finally:
        if token is not None:
            _heads_as.reset(token)


_on_command_line: ContextVar[bool] = ContextVar("caft_on_command_line", default=False)


@contextlib.contextmanager
def on_command_line() -> Iterator[None]:
    """Let `asked_as` return names of options while this is open."""
    token = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(token)


def asked_as(argument: str, option: str | None = None) -> str:
    """Return the caller's name for an argument: `num_heads` in Python, `--num-heads` on the command
    line.

    `option` is the option's name where it is not made of the argument's.
    """
    if not _on_command_line.get():
        return argument
    return f"--{argument.replace('_', '-')}" if option is None else option


_given_as_options: ContextVar[frozenset[str]] = ContextVar(
    "caft_given_as_options", default=frozenset()
)


@contextlib.contextmanager
def given_as_options(settings: Iterable[str]) -> Iterator[None]:
    """Use the options' names for these settings of a block in messages while this is open."""
    token = _given_as_options.set(frozenset(settings))
    try:
        yield
    finally:
        _given_as_options.reset(token)


def setting_as(block: str, name: str) -> str:
    """Return the caller's name for a setting of a block: `--num-heads` if given as an option, else
    `caft.num_heads`."""
    return f"--{name.replace('_', '-')}" if name in _given_as_options.get() else f"{block}.{name}"


def named(text: str) -> str:
    """Return a name from a file as text for a message: unchanged, unless it is very long or not
    printable."""
    return text if text.isprintable() and 0 < len(text) <= 3 * LONGEST else shown(text)


def first_line(error: Exception) -> str:
    """Return the type and first line of another library's error, for a message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

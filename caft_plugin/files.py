"""Write files atomically, and read small ones."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from caft_plugin.errors import ConfigError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, then rename it to `path`: never a
    partial file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_text(
    file: Path,
    asked_by: str,
    takes: str,
) -> str:
    """Read a text file, without a byte order mark.

    Args:
        file: its path.
        asked_by: the option or key that named the file, for the message.
        takes: the kind of file that it accepts, for the message.

    Raises:
        ConfigError: there is no such file, or it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8: {error.reason}"
        raise ConfigError(
            f"{asked_by}: {file} cannot be read ({why}). It accepts {takes}."
        ) from None


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines of a text that are not blank, numbered from 1.

    Lines end only at newlines: `str.splitlines` would also split JSON lines at U+2028, U+0085 and
    form feeds, which JSON allows inside strings and which `datasets` reads as part of them.
    """
    numbered = enumerate(text.split("\n"), 1)
    return [(number, line) for number, line in numbered if line.strip()]

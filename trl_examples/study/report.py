"""The report: the tables in the pages and the figures, from the studies' results and nothing
else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from study import results, tables
from study.protocol import HERE, Study


def report(studies: Sequence[Study], out: Path = HERE) -> list[Path]:
    """Write the tables of finished runs into the pages, and draw the figures.

    Args:
        studies: those whose results are read and checked.
        out: folder for pages and figures; the pages' texts are those of this folder.

    Returns:
        The pages.
    """
    found: dict[str, str] = {}
    for study in studies:
        lines = results.read(study.file)
        results.check(study, lines)
        for runs in results.unpaired(study, lines):
            print(
                f"not compared, because they ran on different kinds of machine: {runs}",
                file=sys.stderr,
            )
        found |= study.tables(lines)
        (out / study.name).mkdir(parents=True, exist_ok=True)
        study.draw(lines, out / study.name)
    pages = [
        page
        for page in sorted(HERE.rglob("*.md"))
        if tables.MARKS.search(page.read_text(encoding="utf-8"))
    ]
    written = [out / page.relative_to(HERE) for page in pages]
    for page, copy in zip(pages, written, strict=True):
        copy.write_text(tables.filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    return written

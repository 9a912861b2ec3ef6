"""The configuration tables in caft_plugin/MANUAL.md, from the config classes.

`python tests/generate/tables_of_keys.py` writes them, and test_readme.py compares them.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the keys of this checkout, not of an installed package

from caft_plugin.config import CAFTConfig, MEAPConfig, MTPConfig, PretrainConfig, accepted

KEYS = ROOT / "caft_plugin" / "MANUAL.md"
BLOCKS = (CAFTConfig, MEAPConfig, MTPConfig, PretrainConfig)


def shown(value: object) -> str:
    return (
        f"`{str(value).lower() if isinstance(value, bool) else value}`"
        if value is not None
        else "not set"
    )


def table(config_class) -> str:
    lines = ["| key | default | accepted | meaning |", "| --- | --- | --- | --- |"]
    for name, field in config_class.model_fields.items():
        takes = accepted(field).replace("|", "\\|")
        lines.append(f"| `{name}` | {shown(field.default)} | {takes} | {field.description} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    for config_class in BLOCKS:
        start, end = (f"<!-- {what}{config_class.block} table -->\n" for what in ("", "end of "))
        before, rest = text.split(start)
        text = before + start + table(config_class) + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    KEYS.write_text(with_tables(KEYS.read_text(encoding="utf-8")), encoding="utf-8")

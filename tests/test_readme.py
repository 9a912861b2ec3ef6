"""The README's configuration table is written from CAFTConfig: `python tests/test_readme.py` writes it anew."""

from __future__ import annotations

import re

from paths import ROOT

from caft_plugin.config import CAFTConfig, accepted

README = ROOT / "README.md"
START, END = "<!-- configuration table -->\n", "<!-- end of configuration table -->"


def shown(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value is not None else "left out"


def table() -> str:
    lines = ["| key | default | accepted | meaning |", "| --- | --- | --- | --- |"]
    for name, field in CAFTConfig.model_fields.items():
        takes = accepted(field).replace("|", "\\|")
        lines.append(f"| `{name}` | {shown(field.default)} | {takes} | {field.description} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


def test_configuration_table():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python tests/test_readme.py"


def test_every_key_that_is_named_exists():
    named = set(re.findall(r"`caft\.([a-z_]+)", README.read_text(encoding="utf-8")))
    assert {"heads", "beta", "alpha", "schedule", "head_norm"} <= named
    assert named <= CAFTConfig.model_fields.keys()


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")

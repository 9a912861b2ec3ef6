"""The configuration tables in README.md are written from the config classes; `python tests/test_readme.py` does it."""

from __future__ import annotations

import re

from paths import ROOT

from caft_plugin.config import CAFTConfig, MEAPConfig, accepted

README = ROOT / "README.md"
TABLES = (CAFTConfig, MEAPConfig)


def shown(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value is not None else "left out"


def table(config_class) -> str:
    lines = ["| key | default | accepted | meaning |", "| --- | --- | --- | --- |"]
    for name, field in config_class.model_fields.items():
        takes = accepted(field).replace("|", "\\|")
        lines.append(f"| `{name}` | {shown(field.default)} | {takes} | {field.description} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    for config_class in TABLES:
        start, end = (f"<!-- {what}{config_class.block} table -->\n" for what in ("", "end of "))
        before, rest = text.split(start)
        text = before + start + table(config_class) + end + rest.split(end)[1]
    return text


def test_configuration_tables():
    text = README.read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python tests/test_readme.py"


def test_every_key_that_is_named_exists():
    named = set(re.findall(r"`caft\.([a-z_]+)", README.read_text(encoding="utf-8")))
    assert {"heads", "beta", "alpha", "schedule", "head_norm"} <= named
    assert named <= CAFTConfig.model_fields.keys()


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")

"""The READMEs: links lead somewhere, keys exist, the package index gets links that work there.

`python tests/test_readme.py` writes the configuration tables in caft_plugin/MANUAL.md from the config classes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from caft_plugin.config import CAFTConfig, MEAPConfig, PretrainConfig, accepted

README = ROOT / "README.md"
KEYS = ROOT / "caft_plugin" / "MANUAL.md"
BLOCKS = (CAFTConfig, MEAPConfig, PretrainConfig)
FOLDERS = ("caft_plugin", "axolotl_configs", "trl_examples", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def shown(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value is not None else "not set"


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


def test_configuration_tables():
    text = KEYS.read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python tests/test_readme.py"


@pytest.mark.parametrize("config_class", BLOCKS, ids=lambda one: one.block)
def test_every_key_that_is_named_exists(config_class):
    named = {
        (key, page.name)
        for page in PAGES
        for key in re.findall(rf"`{config_class.block}\.(?!py`)([a-z_]+)", page.read_text(encoding="utf-8"))
    }
    assert not [one for one in named if one[0] not in config_class.model_fields]
    if config_class is CAFTConfig:
        assert {"heads", "beta", "alpha", "schedule", "head_norm"} <= {key for key, _ in named}


def test_the_readme_is_read_in_two_minutes():
    assert len(README.read_bytes()) <= 9_000


# -- links ------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"(?ms)^```.*?^```$|^    .*?$", "", text))


def links(text: str) -> list[str]:
    """Where the links and images of a page lead, as they are written."""
    text = prose(text)
    return [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)]


def anchors(page: Path) -> Iterator[str]:
    """The anchors that GitHub gives to the headings of a page."""
    for heading in re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken(link: str, folder: Path) -> str | None:
    """What is wrong with a relative link that stands in a page of that folder."""
    path, _, anchor = link.partition("#")
    target = (folder / path).resolve() if path else None
    if target is not None and not (target.exists() and target.is_relative_to(ROOT)):
        return f"{link}: no such file"
    if anchor and target is not None and anchor not in anchors(target / "README.md" if target.is_dir() else target):
        return f"{link}: no such heading"
    return None


def is_relative(link: str) -> bool:
    return not re.match(r"[a-z]+:", link)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    found = [f"{page.name}{link}" if link.startswith("#") else link for link in links(page.read_text(encoding="utf-8"))]
    assert not [wrong for link in found if is_relative(link) and (wrong := broken(link, page.parent))]


def test_a_broken_link_is_found():
    page = '[a](b.md) `[c](d)` ![e](f.png) <source srcset="g.png">\n\n    [h](i)\n'
    assert links(page) == ["b.md", "f.png", "g.png"]
    assert broken("CHANGELOG.md", ROOT) is None and broken("SECURITY.md#the-start-up-file", ROOT) is None
    assert broken("CHANGES.md", ROOT) and broken("SECURITY.md#the-start", ROOT)


HOOK = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
REPOSITORY = PROJECT["project"]["urls"]["Repository"]


def as_the_index_gets_it(text: str) -> str:
    for substitution in HOOK["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    return text


def test_the_package_index_gets_no_relative_link():
    """The wheel's description is README.md after the substitutions of pyproject.toml."""
    assert PROJECT["project"]["dynamic"] == ["readme"]
    assert HOOK["fragments"] == [{"path": "README.md"}]
    text = README.read_text(encoding="utf-8")
    before = links(text)
    text = as_the_index_gets_it(text)
    after = links(text)
    assert "<picture" not in text and "<source" not in text, "the index drops <source>"
    assert not [link for link in after if is_relative(link)]
    ours = [link.removeprefix(f"{REPOSITORY}/") for link in after if link.startswith(REPOSITORY)]
    assert sum(map(is_relative, before)) - text.count("<img") <= len(ours) and ours
    for link in ours:
        kind, branch, path = link.split("/", 2)
        assert (kind, branch) == ("raw" if path.endswith(".png") else "blob", "main"), link
        assert not broken(path, ROOT)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](SECURITY.md#x)", f"[a]({REPOSITORY}/blob/main/SECURITY.md#x)"),
        ("[a](#install)", f"[a]({REPOSITORY}/blob/main/README.md#install)"),
        ("![a](b.png)", f"![a]({REPOSITORY}/raw/main/b.png)"),
        ('<img src="b.png">', f'<img src="{REPOSITORY}/raw/main/b.png">'),
        ("[a](https://arxiv.org/abs/1) [a](mailto:b@c)", "[a](https://arxiv.org/abs/1) [a](mailto:b@c)"),
    ],
)
def test_the_package_index_gets_links_of_every_kind(written, shown):
    assert as_the_index_gets_it(written) == shown


if __name__ == "__main__":
    KEYS.write_text(with_tables(KEYS.read_text(encoding="utf-8")), encoding="utf-8")

"""The READMEs: links lead somewhere, keys exist, the package index gets links that work there."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders.paths import PAGES, ROOT
from caft_plugin.config import CAFTConfig
from generate.tables_of_keys import BLOCKS, KEYS, with_tables

README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_configuration_tables():
    text = KEYS.read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python tests/generate/tables_of_keys.py"


@pytest.mark.parametrize("config_class", BLOCKS, ids=lambda one: one.block)
def test_every_key_that_is_named_exists(config_class):
    named = {
        (key, page.name)
        for page in PAGES
        for key in re.findall(
            rf"`{config_class.block}\.(?!py`)([a-z_]+)", page.read_text(encoding="utf-8")
        )
    }
    assert not [one for one in named if one[0] not in config_class.model_fields]
    if config_class is CAFTConfig:
        assert {"heads", "beta", "alpha", "schedule", "head_norm"} <= {key for key, _ in named}


def test_the_readme_is_read_in_two_minutes():
    assert len(README.read_bytes()) <= 9_000


# -- links -----------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"(?ms)^```.*?^```$|^    .*?$", "", text))


def links(text: str) -> list[str]:
    """Where the links and images of a page lead, as they are written."""
    text = prose(text)
    return [
        *re.findall(r"\]\(([^)\s]+)\)", text),
        *re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text),
    ]


def anchors(page: Path) -> Iterator[str]:
    """The anchors that GitHub gives to the headings of a page."""
    for heading in re.findall(
        r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    ):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken(link: str, folder: Path) -> str | None:
    """What is wrong with a relative link that stands in a page of that folder."""
    path, _, anchor = link.partition("#")
    target = (folder / path).resolve() if path else None
    if target is not None and not (target.exists() and target.is_relative_to(ROOT)):
        return f"{link}: no such file"
    if (
        anchor
        and target is not None
        and anchor not in anchors(target / "README.md" if target.is_dir() else target)
    ):
        return f"{link}: no such heading"
    return None


def is_relative(link: str) -> bool:
    return not re.match(r"[a-z]+:", link)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    found = [
        f"{page.name}{link}" if link.startswith("#") else link
        for link in links(page.read_text(encoding="utf-8"))
    ]
    assert not [
        wrong for link in found if is_relative(link) and (wrong := broken(link, page.parent))
    ]


def test_a_broken_link_is_found():
    page = '[a](b.md) `[c](d)` ![e](f.png) <source srcset="g.png">\n\n    [h](i)\n'
    assert links(page) == ["b.md", "f.png", "g.png"]
    assert (
        broken("CHANGELOG.md", ROOT) is None
        and broken("SECURITY.md#the-start-up-file", ROOT) is None
    )
    assert broken("CHANGES.md", ROOT) and broken("SECURITY.md#the-start", ROOT)


# -- the package index -----------------------------------------------------------------------------

HOOK = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]


def as_the_index_gets_it(text: str) -> str:
    for substitution in HOOK["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    return text


def test_the_package_index_gets_no_relative_link():
    """The wheel's description is README.md after the substitutions of pyproject.toml. No address
    leads into the repository, which has none yet."""
    assert PROJECT["project"]["dynamic"] == ["readme"] and "urls" not in PROJECT["project"]
    assert HOOK["fragments"] == [{"path": "README.md"}]
    text = README.read_text(encoding="utf-8")
    shown = as_the_index_gets_it(text)
    assert "<picture" not in shown and "<source" not in shown and "<img" not in shown
    assert (
        set(links(text))
        > {link for link in links(shown)}
        == {link for link in links(text) if not is_relative(link)}
    )
    code = re.compile(r"(?ms)^```.*?^```$")
    assert code.findall(shown) == code.findall(text)
    assert shown.count("\n| ") == text.count("\n| "), "tables stay"
    assert not re.search(r"(?m)^\S.*\n#", re.sub(code, "", shown)), "a heading follows a blank line"
    assert (
        "github.com/caft-plugin" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8") + text
    )


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("See [a](SECURITY.md#x), [b](#y) too.", "See a, b too."),
        ("A sentence ([more](tests/README.md)).", "A sentence."),
        ("Text.\n[a](b.md), [c](d.md).\n\n## Next\n", "Text.\n\n## Next\n"),
        ("## More\n\n[a](b.md): [c](d.md) ·\n[e](#f)\n\n## Next\n", "## Next\n"),
        ("![a](b.png)\nText", "Text"),
        ('<img src="b.png" width="8">\nText', "Text"),
        ('<picture>\n<source srcset="a.png">\n<img src="b.png">\n</picture>\n\nText', "Text"),
        (
            "[a](https://arxiv.org/abs/1) ([a](mailto:b@c))",
            "[a](https://arxiv.org/abs/1) ([a](mailto:b@c))",
        ),
        ('<img src="https://x/b.png">', '<img src="https://x/b.png">'),
    ],
)
def test_the_package_index_gets_text_in_place_of_links_into_the_repository(written, shown):
    assert as_the_index_gets_it(written) == shown

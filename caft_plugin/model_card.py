"""The section on CAFT and MEAP in the card (README.md) that a framework writes next to a model."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from caft_plugin.caft.heads_record import CARD, FOLDER
from caft_plugin.config import Block, CAFTConfig, MEAPConfig
from caft_plugin.files import write_text

START = "<!-- caft_plugin -->"
END = "<!-- end of caft_plugin -->"
SECTION = re.compile(rf"\s*{START}.*?{END}\s*", re.DOTALL)


def section(caft: CAFTConfig | None, meap: MEAPConfig | None) -> str:
    """Return the section for a run with these settings; empty if neither changes the training."""
    blocks: list[Block] = []
    lines = [
        "## Training objectives",
        "",
        "Trained with caft_plugin, in addition to next-token prediction:",
        "",
    ]
    if caft is not None and caft.beta != 0:
        blocks.append(caft)
        lines.append(
            "- CAFT, concept-aware fine-tuning ([arXiv"
            f" 2506.07833](https://arxiv.org/abs/2506.07833)); auxiliary heads: {caft.num_heads}."
            f" The model has no trace of them. They are in `{FOLDER}/` next to it and can draft"
            " for it."
        )
    if meap is not None:
        blocks.append(meap)
        lines.append(
            "- MEAP, mask-enhanced autoregressive prediction ([arXiv"
            " 2502.07490](https://arxiv.org/abs/2502.07490)): a part of the input tokens was"
            " masked."
        )
    keys = {block.block: block.model_dump(exclude_none=True) for block in blocks}
    return (
        "\n".join([*lines, "", "```yaml", yaml.safe_dump(keys, sort_keys=False) + "```"])
        if blocks
        else ""
    )


class FrameworkCard:
    """The card in a folder where a framework may write one. Created before the framework saves,
    completed after."""

    def __init__(self, folder: Path, section: str) -> None:
        self.file = folder / CARD
        self.section = section
        self.before = self._content()

    def _content(self) -> str | None:
        return self.file.read_text(encoding="utf-8") if self.file.is_file() else None

    def complete(self) -> None:
        """Append the section to a card that was written since, replacing an earlier run's
        section."""
        card = self._content()
        if card is None or card == self.before:
            return
        rest = SECTION.sub("\n\n", card)
        complete = f"{rest.rstrip()}\n\n{START}\n{self.section}\n{END}\n" if self.section else rest
        if complete != card and (self.section or START in card):
            write_text(self.file, complete)

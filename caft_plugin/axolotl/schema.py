"""What `caft_plugin` adds to Axolotl's configuration."""

from __future__ import annotations

from pydantic import BaseModel, Field

from caft_plugin.config import CAFTConfig


class CAFTArgs(BaseModel):
    """Axolotl merges this class into its own config class, so the field's name is the YAML key."""

    caft: CAFTConfig | None = Field(
        default=None, description="Concept-aware fine-tuning; the block's presence switches it on."
    )

"""What `caft_plugin` adds to Axolotl's configuration."""

from __future__ import annotations

from pydantic import BaseModel, Field

from caft_plugin.config import CAFTConfig, MEAPConfig, PretrainConfig


class CAFTArgs(BaseModel):
    """Axolotl merges this class into its own config class, so the fields' names are the YAML keys."""

    caft: CAFTConfig | None = Field(
        default=None, description="Concept-aware fine-tuning; the block's presence switches it on."
    )
    meap: MEAPConfig | None = Field(
        default=None, description="Mask-enhanced autoregressive prediction; the block's presence switches it on."
    )
    pretrain_heads: PretrainConfig | None = Field(
        default=None, description="Settings of `axolotl caft pretrain-heads`; other commands pass over it."
    )

"""The keys that `caft_plugin` adds to Axolotl's configuration."""

from __future__ import annotations

from pydantic import BaseModel, Field

from caft_plugin.config import CAFTConfig, MEAPConfig, MTPConfig, PretrainConfig


class CAFTArgs(BaseModel):
    """The plugin's fields of Axolotl's config class, into which Axolotl merges them; their names
    are the YAML keys."""

    caft: CAFTConfig | None = Field(
        default=None, description="Concept-aware fine-tuning; enabled by the presence of the block."
    )
    meap: MEAPConfig | None = Field(
        default=None,
        description=(
            "Mask-enhanced autoregressive prediction; enabled by the presence of the block."
        ),
    )
    mtp: MTPConfig | None = Field(
        default=None,
        description="The base's own MTP layers; enabled by the presence of the block.",
    )
    pretrain_heads: PretrainConfig | None = Field(
        default=None,
        description="Settings of `axolotl caft pretrain-heads`; ignored by other commands.",
    )

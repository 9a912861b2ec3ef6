"""MEAP's facts about a base model: its number of positions, and the tokens with a role in its
configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from caft_plugin.meap.roles import placeholder_ids, role_ids

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
# rope types whose factor may multiply the original length
STRETCHED = ("linear", "dynamic", "yarn")


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """Facts about a base model.

    `positions` is the maximum sequence length (None: no limit); `placeholders` are the ids of
    tokens for images or sound, `roles` those of tokens with a role.
    """

    positions: int | None = None
    placeholders: frozenset[int] = frozenset()
    roles: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: PretrainedConfig, generation: GenerationConfig | None = None) -> BaseModel:
        return cls(positions_of(config), placeholder_ids(config), role_ids(config, generation))

    @classmethod
    def of_model(cls, model: nn.Module) -> BaseModel:
        return cls.of(
            cast(PretrainedConfig, model.config), getattr(model, "generation_config", None)
        )

    @classmethod
    def named(
        cls,
        model: str,
        trust_remote_code: bool = False,
        **loading: object,
    ) -> BaseModel:
        """Read the configs of a folder or Hub id, with the user's loading arguments (revision,
        config changes)."""
        config, _ = AutoConfig.from_pretrained(
            model, return_unused_kwargs=True, trust_remote_code=trust_remote_code, **loading
        )
        return cls.of(
            config, generation_config_of(model, cast(str | None, loading.get("revision")))
        )

    def limit(self, host: int | None) -> int | None:
        """Return the maximum length of a pair: the smaller of the host's limit and the model's."""
        return min((limit for limit in (host, self.positions) if limit is not None), default=None)


def generation_config_of(model: str, revision: str | None = None) -> GenerationConfig | None:
    """Return a base model's generation config, or None if it has none."""
    try:
        return GenerationConfig.from_pretrained(model, revision=revision or "main")
    except (OSError, ValueError):
        return None


def positions_of(config: PretrainedConfig) -> int | None:
    """Return a model's number of positions, including its rotary embeddings' scaling; None without
    a limit."""
    text = config.get_text_config()
    named = [getattr(text, name, None) for name in POSITIONS]
    length = next((value for value in named if isinstance(value, int)), None)
    if not length or length < 0:
        return None
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # by layer type, or one for all layers
    by_type = [kind for kind in parameters.values() if isinstance(kind, Mapping)]
    return max(length, *(_stretched(kind, length) for kind in by_type or [parameters]))


def _stretched(parameters: Mapping, length: int) -> int:
    if parameters.get("rope_type", parameters.get("type")) not in STRETCHED:
        return 0
    original = parameters.get("original_max_position_embeddings") or length
    factor = parameters.get("factor") or 1
    return int(original * factor)

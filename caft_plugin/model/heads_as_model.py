"""Refuse a heads folder that was given as a model."""

from __future__ import annotations

from caft_plugin.errors import ConfigError, shown

# Keys that tell config.json of heads from that of a model.
OF_RECORD = {"head_input", "head_norm", "layer_class"}


def refuse_heads_as_model(
    config: object,
    name: str,
    asked: str,
) -> None:
    """Raise ConfigError if the config of a model `name` is the record of a heads folder; `asked`
    begins the message.

    A record has a `model_type`, so transformers would build a model of that type's default size
    from it.
    """
    if isinstance(config, dict) and config.keys() >= OF_RECORD:
        raise ConfigError(
            f"{asked}: got {shown(name)}, which is a heads folder. Give the model that the heads"
            " were trained with (the folder names the base model"
            f" {shown(config.get('base_model'))})."
        )

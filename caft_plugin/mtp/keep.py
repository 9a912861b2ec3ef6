"""Put a base model's own MTP layers back into a model that was fine-tuned from it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from caft_plugin.errors import ConfigError
from caft_plugin.files import write_json
from caft_plugin.model.loading import reading
from caft_plugin.mtp.checkpoint import Checkpoint, find_file

Config = dict[str, Any]  # a config.json

# How families name the tensors of MTP layers. Either they have a name of their own (Qwen3.5 and
# Qwen3-Next: `mtp.`; MiMo: `model.mtp_layers.`; MiMo-V2: `model.mtp.`; Ernie: `model.mtp_block.`),
# or they are layers behind the model's last one (DeepSeek-V3, GLM-4.5 and later, Ling, Step, HY).
TEXT = r"(?:model\.|language_model\.)*"
OWN_NAME = re.compile(rf"^{TEXT}mtp[._]")
LAYER = re.compile(rf"^({TEXT})layers\.(\d+)\.(.+)$")
# Tensors of such a layer that are copies of the model's embedding and unembedding.
EMBEDDING = "embed_tokens.weight"
UNEMBEDDING = "shared_head.head.weight"
# How configs announce the layers, at the top or in `text_config`.
ANNOUNCED = (
    "mtp_num_hidden_layers",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_config",
)
# Why nothing is put into an adapter; what to do after another way of merging follows.
ADAPTER_HAS_THEM = (
    "served on its base it has the base's MTP layers, and `axolotl merge-lora` keeps them. After"
    " another way of merging"
)
# Keys in which a fine-tuned model agrees with its base.
SHAPE = ("model_type", "hidden_size", "num_hidden_layers")


@dataclasses.dataclass(frozen=True)
class Kept:
    """What was done: the tensors that were put into `folder`, and their bytes."""

    folder: Path
    names: tuple[str, ...]
    size: int
    announced: tuple[str, ...]

    def __str__(self) -> str:
        if not self.names and not self.announced:
            return f"mtp: {self.folder} has every MTP tensor of its base already"
        done = []
        if self.names:
            done.append(f"{len(self.names)} MTP tensors ({self.size / 1e6:.1f} MB) of the base")
        if self.announced:
            done.append(f"{', '.join(self.announced)} in {CONFIG_NAME}")
        return f"mtp: put {' and '.join(done)} into {self.folder}"


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model's MTP tensors: its checkpoint, its config and the tensors' names."""

    checkpoint: Checkpoint
    config: Config
    names: tuple[str, ...]

    @classmethod
    def open(
        cls,
        name: str,
        named: str,
        revision: str | None = None,
    ) -> Base:
        """Find the MTP tensors of a folder or Hub id, without reading them.

        Args:
            name: the base model.
            named: how the caller calls it, for messages.
            revision: on the Hub.

        Raises:
            ConfigError: it has none, or no weights in safetensors files.
        """
        config = config_of(name, named, revision)
        checkpoint = Checkpoint.open(name, named, revision)
        names = mtp_names(checkpoint.files, config)
        if not names:
            raise ConfigError(
                f"{named}: {name} has no MTP layers (no tensor is named mtp.*, model.mtp* or"
                f" layers.{layers_of(config)}.* and above), so there is nothing to keep. It accepts"
                " a model that was published with MTP layers."
            )
        return cls(checkpoint, config, names)


def keep_mtp(
    base: Base,
    folder: Path,
    named: str,
) -> Kept:
    """Put into a saved model the MTP tensors that its base has and it lacks, and announce them.

    Tensors have the base's names and dtypes, and quantised ones are copied with their scales.
    Copies of the embedding and the unembedding are written from the saved model's own. If nothing
    is lacking, nothing is written.

    Args:
        base: its base.
        folder: the saved model.
        named: how the caller calls the folder, for messages.

    Raises:
        ConfigError: it is an adapter, has no safetensors files, or does not come from this base.
    """
    refuse_adapter(folder, named)
    config = config_of(str(folder), named)
    refuse_other_model(base, config, folder, named)
    saved = Checkpoint.open(str(folder), named)
    copies = own_copies(base, saved)
    lacking = {name for name in base.names if name not in saved.files}
    stale = _changed(saved, {name: copies[name] for name in copies if name not in lacking})
    tensors = base.checkpoint.read(lacking - set(copies))
    tensors |= {name: copies[name] for name in copies if name in lacking or name in stale}
    if tensors:
        saved.put(tensors)
    announced = announce(folder / CONFIG_NAME, base.config, config)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Kept(folder, tuple(sorted(tensors)), size, announced)


def mtp_names(names: Iterable[str], config: Config) -> tuple[str, ...]:
    """Return which tensors of a checkpoint belong to MTP layers."""
    last = layers_of(config)
    found = []
    for name in names:
        layer = LAYER.match(name)
        behind = layer is not None and last is not None and int(layer.group(2)) >= last
        if behind or OWN_NAME.match(name):
            found.append(name)
    return tuple(sorted(found))


def own_copies(base: Base, saved: Checkpoint) -> dict[str, Tensor]:
    """Return what the base's copies of embedding and unembedding are in the saved model."""
    sources = {}
    for name in base.names:
        layer = LAYER.match(name)
        if layer is None or layer.group(3) not in (EMBEDDING, UNEMBEDDING):
            continue
        embedding = layer.group(1) + EMBEDDING
        source = embedding if layer.group(3) == EMBEDDING else "lm_head.weight"
        # a tied unembedding is not saved
        sources[name] = source if source in saved.files else embedding
    lacking = sorted(source for source in set(sources.values()) if source not in saved.files)
    if lacking:
        raise ConfigError(
            f"{saved.named}: {saved.name} has no {' and no '.join(lacking)}, of which the MTP"
            " layers of its base hold copies."
        )
    tensors = saved.read(set(sources.values()))
    dtypes = base.checkpoint.dtypes(sources)
    return {name: tensors[source].to(dtypes[name]).clone() for name, source in sources.items()}


def _changed(saved: Checkpoint, wanted: Mapping[str, Tensor]) -> set[str]:
    """Return which of these tensors differ from the saved ones."""
    there = saved.read(wanted)
    return {
        name
        for name, tensor in wanted.items()
        if there[name].shape != tensor.shape or not bool((there[name] == tensor).all())
    }


def announce(
    file: Path,
    base: Config,
    saved: Config,
) -> tuple[str, ...]:
    """Write into a saved config what the base's config says of its MTP layers; return the keys."""
    done: list[str] = []
    parts = ((base, saved), (text_config(base), text_config(saved)))
    for theirs, ours in parts:
        for key in ANNOUNCED:
            if theirs.get(key) and ours.get(key) != theirs[key]:
                ours[key] = theirs[key]
                done.append(key)
    if done:
        write_json(file, saved)
    return tuple(done)


def config_of(
    name: str,
    named: str,
    revision: str | None = None,
) -> Config:
    """Return a model's config.json as it stands there.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    with reading("config", name, named):
        file = find_file(name, revision, CONFIG_NAME)
        config = None if file is None else json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ConfigError(
            f"{named}: {name} has no {CONFIG_NAME}. It accepts the folder or Hub id of a model."
        )
    return config


def text_config(config: Config) -> Config:
    """Return the part of a config that is about text: the config itself where there is no other."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def layers_of(config: Config) -> int | None:
    return text_config(config).get("num_hidden_layers")


def refuse_adapter(folder: Path, named: str) -> None:
    """Raise ConfigError for an adapter: its base keeps its MTP layers."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ConfigError(
            f"{named}: {folder} is an adapter, and lacks nothing: {ADAPTER_HAS_THEM}, give the"
            " merged model's folder."
        )


def refuse_other_model(
    base: Base,
    config: Config,
    folder: Path,
    named: str,
) -> None:
    """Raise ConfigError if a saved model's config shows that it does not come from this base."""
    theirs = text_config(base.config)
    ours = text_config(config)
    apart = [key for key in SHAPE if theirs.get(key) != ours.get(key)]
    if not apart:
        return
    listed = ", ".join(f"{key}: {ours.get(key)} (base: {theirs.get(key)})" for key in apart)
    raise ConfigError(
        f"{named}: {folder} was not fine-tuned from {base.checkpoint.name}: {listed}. Give the"
        " model from which it was fine-tuned as the base."
    )

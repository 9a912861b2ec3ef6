"""The heads' folder: `heads.safetensors`, `config.json` and `fingerprint.safetensors`. Write, open,
check, load.

A finished folder holds plain weights with LoRA merged. A checkpoint's folder keeps LoRA separate
(`lora.safetensors`), because exact resuming needs both.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from caft_plugin.caft.heads import MODULE_NAME, AuxiliaryHeads
from caft_plugin.caft.heads_record import (
    DRAFTING,
    FINGERPRINT,
    FOLDER,
    LORA,
    LOSSES,
    METRICS,
    RECORD,
    WEIGHTS,
    HeadsRecord,
    LoggedLosses,
    locate_heads,
    own_file,
    read_record,
)
from caft_plugin.config import DEFAULT_HEAD_INPUT, DEFAULT_HEAD_NORM, CAFTConfig
from caft_plugin.errors import ConfigError, heads_as, named, setting_as, shown
from caft_plugin.files import write_atomically, write_json
from caft_plugin.model.fingerprint import Fingerprint, Sample, is_sharded, take_sample
from caft_plugin.model.sharding import gather, shard_like
from caft_plugin.model.trunk import Trunk

logger = logging.getLogger(__name__)

LARGEST_FINGERPRINT = 4_000_000  # bytes
# safetensors' names of the types that weights can be read from
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class HeadsFolder:
    """A folder of heads, and its record."""

    path: Path
    record: HeadsRecord

    @classmethod
    def open(cls, heads: str | os.PathLike[str]) -> HeadsFolder:
        """Open a heads folder, given its path, the path of a run with `caft_heads/` in it, or a Hub
        id.

        Raises:
            ConfigError: the folder does not exist or is not a readable heads folder.
        """
        path = locate_heads(os.fspath(heads))
        return cls(path, read_record(path))

    def refuse_other_model(self, config: CAFTConfig, model_config: PretrainedConfig) -> None:
        """Refuse a model whose config the folder does not fit, before any weight is loaded.

        The vocabulary size may differ: heads use the model's own unembedding.

        Raises:
            ConfigError: too few heads, or heads for another hidden size.
        """
        path = self.path
        record = self.record
        text_config = model_config.get_text_config()
        if record.num_heads < config.num_heads:
            raise ConfigError(
                f"{setting_as('caft', 'num_heads')}: got {config.num_heads}, but the folder {path}"
                f" holds {record.num_heads} heads. Use at most {record.num_heads}, or train more"
                " heads."
            )
        if record.hidden_size != text_config.hidden_size:
            raise ConfigError(
                f"{heads_as()}: {path} was made for hidden_size {record.hidden_size} (base model"
                f" {named(record.base_model)}), but this model has hidden_size"
                f" {text_config.hidden_size}. Use heads only with the model they were trained with."
            )

    def refuse_other_layers(self, layer_class: str) -> None:
        """Refuse a model with another layer class, before the heads' weights are read.

        Raises:
            ConfigError: heads of another class, or a checkpoint's LoRA factors that are not merged.
        """
        path = self.path
        record = self.record
        if record.layer_class != layer_class:
            raise ConfigError(
                f"{heads_as()}: the heads in {path} are of class {named(record.layer_class)} (base"
                f" model {named(record.base_model)}), but this model's layers are of class"
                f" {layer_class}. Use heads only with the model they were trained with."
            )
        if (path / LORA).exists():
            raise ConfigError(
                f"{heads_as()}: {path} belongs to a checkpoint, so its LoRA is not merged. Use the"
                f" {FOLDER}/ folder of a finished run, or resume from that checkpoint."
            )

    def warn_of_model(self, now: Sample | None, model_config: PretrainedConfig) -> None:
        """Warn if the heads were trained with another model than this one.

        The models are compared by fingerprint if the folder has one, else by the base model's name.

        Args:
            now: a sample of this model, or None.
            model_config: this model's config.
        """
        name = model_config.name_or_path or model_config.model_type
        theirs = named(self.record.base_model)
        fingerprint = None if now is None else read_fingerprint(self.path)
        if now is None or fingerprint is None:
            if model_config.name_or_path and self.record.base_model != model_config.name_or_path:
                logger.warning(
                    "%s: these heads were made with base model %s, this run uses %s",
                    heads_as(),
                    theirs,
                    name,
                )
            return
        verdict = fingerprint.verdict(now)
        if verdict == "base":
            logger.warning(
                "%s: the heads in %s were trained together with a fine-tuned %s, but the last layer"
                " of this model, %s, is the one from before that fine-tuning. Use the fine-tuned"
                " model: load its adapter or the merged model",
                heads_as(),
                self.path,
                theirs,
                name,
            )
        elif verdict == "other":
            logger.warning(
                "%s: the heads in %s (base model %s) were trained with a different last layer or"
                " final norm than this model, %s, has: another base, or another training state of"
                " the same one. Use the model that they were trained with",
                heads_as(),
                self.path,
                theirs,
                name,
            )

    def warn_of_wiring(self, config: CAFTConfig) -> None:
        """Warn if the config wires the heads differently than they were trained."""
        record = self.record
        for key in ("head_input", "head_norm"):
            written = getattr(config, key)
            recorded = getattr(record, key)
            if written is not None and written != recorded:
                logger.warning(
                    "%s: got %s, but these heads were made with %s; omit it to use the folder's"
                    " setting",
                    setting_as("caft", key),
                    written,
                    recorded,
                )

    def load_into(self, heads: AuxiliaryHeads, layer_class: str) -> None:
        """Load the folder's weights into `heads`; of more heads than these, the first are used.

        A checkpoint's LoRA factors are rejected: training merges them at its end.

        Raises:
            ConfigError: damaged files, another layer class, missing, unknown or misshapen tensors.
        """
        self.refuse_other_layers(layer_class)
        state = heads.layers.state_dict()
        wanted = {plain_name(name): t for name, t in state.items() if ".lora_" not in name}
        _copy_into(wanted, self.path / WEIGHTS, held=self.record.num_heads)


def resolve_wiring(config: CAFTConfig, record: HeadsRecord | None) -> CAFTConfig:
    """Return `config` with head_input and head_norm filled in: as written, else as recorded, else
    the defaults."""
    wiring: dict[str, object] = {"head_input": DEFAULT_HEAD_INPUT, "head_norm": DEFAULT_HEAD_NORM}
    for source in (record, config):
        for key in wiring:
            value = getattr(source, key, None)
            if value is not None:
                wiring[key] = value
    return config.model_copy(update=wiring)


def plain_name(name: str) -> str:
    """Return a head parameter's name without the parts that PEFT's wrapping adds."""
    return name.replace(".base_layer.", ".").replace(f".{MODULE_NAME}.", ".")


def heads_state(heads: AuxiliaryHeads) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return plain weights `K.<layer's own name>`, and LoRA factors `K.<module>.lora_A.weight` (may
    be empty).

    K counts from 0. Every process must call it; each gets unsharded tensors.
    """
    weights: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    # every tensor in every process: gathering waits for all
    for name, tensor in heads.layers.state_dict().items():
        into = lora if ".lora_" in name else weights
        into[plain_name(name)] = gather(tensor)
    return weights, lora


def merged(
    heads: AuxiliaryHeads,
    weights: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return plain weights with the LoRA factors merged: W + scaling * B A, computed in float32."""
    result = dict(weights)
    for name, module in heads.layers.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        a = lora[f"{name}.lora_A.weight"].float()
        b = lora[f"{name}.lora_B.weight"].float()
        weight = result[f"{name}.weight"]
        delta = module.scaling[MODULE_NAME] * (b @ a)
        if isinstance(module.base_layer, Conv1D):  # weights (in, out)
            delta = delta.T
        result[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return result


def save_heads(
    parent: str | os.PathLike[str],
    heads: AuxiliaryHeads,
    trunk: Trunk,
    config: CAFTConfig,
    *,
    resumable: bool,
    write: bool = True,
    losses: Mapping[str, LoggedLosses] | None = None,
) -> Path:
    """Save heads to `caft_heads/` in `parent`. Every process must call it.

    Args:
        parent: the run's folder or a checkpoint.
        heads: the heads to save.
        trunk: the trunk of the model they belong to.
        config: how the heads are wired.
        resumable: keep LoRA factors separate, for a checkpoint, instead of merging them.
        write: whether this process writes the files.
        losses: the losses that the run has logged of these heads, by data set.
    """
    weights, lora = heads_state(heads)
    after = take_sample(trunk, heads.origin) if write or is_sharded(trunk) else None
    folder = Path(parent) / FOLDER
    if write:
        if lora and not resumable:
            weights = merged(heads, weights, lora)
            lora = {}
        record = HeadsRecord.of(trunk, config, train_heads=heads.how if resumable else None)
        fingerprint = None
        if heads.origin is not None and after is not None:
            fingerprint = Fingerprint(heads.origin, after)
        write_heads(folder, record, weights, lora, fingerprint, losses)
    return folder


def write_heads(
    folder: Path,
    record: HeadsRecord,
    weights: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    fingerprint: Fingerprint | None = None,
    losses: Mapping[str, LoggedLosses] | None = None,
) -> None:
    """Write the files of a heads folder atomically, the record last: if it exists, all files are of
    the same save."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    for of_earlier_heads in (DRAFTING, METRICS, LOSSES):
        (folder / of_earlier_heads).unlink(missing_ok=True)
    for left_by_a_killed_run in folder.glob(".*.tmp"):
        left_by_a_killed_run.unlink(missing_ok=True)
    for name, tensors in ((LORA, lora), (WEIGHTS, weights)):
        if tensors:
            _write_tensors(folder / name, tensors)
        else:
            (folder / name).unlink(missing_ok=True)
    write_fingerprint(folder, fingerprint)
    if losses:
        write_json(
            folder / LOSSES,
            {name: logged.model_dump(exclude_none=True) for name, logged in losses.items()},
        )
    write_json(folder / RECORD, record.model_dump(exclude_none=True))


def _write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    **metadata: str,
) -> None:
    write_atomically(
        file, lambda temporary: save_file(dict(tensors), temporary, {"format": "pt", **metadata})
    )


def write_fingerprint(folder: Path, fingerprint: Fingerprint | None) -> None:
    """Write the fingerprint's file of a heads folder; with None, remove the one of earlier
    heads."""
    if fingerprint is None:
        (folder / FINGERPRINT).unlink(missing_ok=True)
        return
    samples = {"before": fingerprint.before, "after": fingerprint.after}
    tensors = {
        f"{end}.{name}": t for end, sample in samples.items() for name, t in sample.values.items()
    }
    _write_tensors(
        folder / FINGERPRINT, tensors, quantised=json.dumps(sorted(fingerprint.before.quantised))
    )


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """Read the fingerprint of a heads folder; return None if there is none, or (with a warning) if
    it is invalid.

    Raises:
        ConfigError: the file is a link that points outside the folder.
    """
    if not (folder / FINGERPRINT).exists():
        return None
    file = own_file(folder, FINGERPRINT)
    try:
        return _parse_fingerprint(file)
    # damaged or made by someone else: each wrong part raises its own kind
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        RecursionError,
        SafetensorError,
    ) as error:
        logger.warning(
            "%s: %s was not read, so whether these heads fit this model cannot be checked (%s)",
            heads_as(),
            file,
            shown(str(error)),
        )
        return None


def _parse_fingerprint(file: Path) -> Fingerprint:
    if file.stat().st_size > LARGEST_FINGERPRINT:
        raise ValueError(f"longer than {LARGEST_FINGERPRINT} bytes")
    samples: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
    with safe_open(file, framework="pt") as opened:
        quantised = json.loads((opened.metadata() or {}).get("quantised", "[]"))
        for key in opened.keys():
            end, _, name = key.partition(".")
            tensor = opened.get_tensor(key)
            is_vector = tensor.dtype == torch.float32 and tensor.dim() == 1
            if not is_vector or not tensor.isfinite().all():
                raise ValueError(f"{key} is not a vector of finite float32 numbers")
            samples[end][name] = tensor
    if samples["before"].keys() != samples["after"].keys() or not samples["before"]:
        raise ValueError("it is incomplete")
    names = frozenset(map(str, quantised))
    return Fingerprint(Sample(samples["before"], names), Sample(samples["after"], names))


def load_checkpoint(
    checkpoint: str | os.PathLike[str],
    heads: AuxiliaryHeads,
    config: CAFTConfig,
) -> None:
    """Load heads and LoRA factors from a checkpoint, for exact resuming.

    Raises:
        ConfigError: the checkpoint has no heads, or heads that differ from this run's.
    """
    folder = Path(checkpoint) / FOLDER
    if not folder.is_dir():
        raise ConfigError(
            f"caft: the checkpoint {checkpoint} has no {FOLDER}/ folder, so it was made without"
            " CAFT and cannot be resumed with it. Resume without CAFT, or start from the"
            " beginning."
        )
    record = read_record(folder)
    this_run = {
        "num_heads": len(heads),
        "train_heads": heads.how,
        "head_input": config.head_input,
        "head_norm": config.head_norm,
    }
    for key, value in this_run.items():
        recorded = getattr(record, key)
        if recorded is not None and recorded != value:
            raise ConfigError(
                f"caft.{key}: this run has {str(value).lower()}, but the checkpoint {checkpoint}"
                f" was made with {str(recorded).lower()}. Resume with caft.{key}:"
                f" {str(recorded).lower()}, or start from the beginning."
            )
    state = heads.layers.state_dict()
    weights = {plain_name(name): t for name, t in state.items() if ".lora_" not in name}
    lora = {plain_name(name): t for name, t in state.items() if ".lora_" in name}
    _copy_into(weights, folder / WEIGHTS, held=len(heads))
    if lora:
        _copy_into(lora, folder / LORA, held=len(heads))


def _copy_into(
    wanted: dict[str, Tensor],
    file: Path,
    *,
    held: int,
) -> None:
    """Copy the first heads of a safetensors file with `held` heads into `wanted`, after checking
    names, shapes, types.

    Other floating-point types are converted.
    """
    file = own_file(file.parent, file.name)
    try:
        with safe_open(file, framework="pt") as opened, torch.no_grad():
            found = {name: opened.get_slice(name) for name in opened.keys()}
            _refuse_other_heads(wanted.keys(), found.keys(), file, held)
            _refuse_other_tensors(wanted, found, file)
            for name, tensor in wanted.items():
                tensor.copy_(shard_like(tensor, opened.get_tensor(name)))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{heads_as()}: {file} cannot be read as safetensors ({shown(str(error))}). The file is"
            " damaged or has another format: make or download the heads folder again."
        ) from None


def _refuse_other_heads(
    wanted: Set[str],
    found: Set[str],
    file: Path,
    held: int,
) -> None:
    """Raise ConfigError unless a file with `held` heads has exactly the wanted tensors of the
    wanted heads; of the others only the number is checked."""
    first = {name.split(".")[0] for name in wanted}
    others = {name.split(".")[0] for name in found} - first
    missing = sorted(wanted - found)
    unknown = sorted(name for name in found - wanted if name.split(".")[0] in first)
    unknown += sorted(name for name in others if not _is_index(name, held))
    for names, problem in [(missing, "lacks"), (unknown, "has unknown")]:
        if names:
            raise ConfigError(
                f"{heads_as()}: {file} {problem} {len(names)} tensors, the first is"
                f" {named(names[0])}. These heads do not fit this model: use the model and the"
                " settings that they were trained with."
            )
    if len(others | first) != held:
        raise ConfigError(
            f"{heads_as()}: {file} holds {len(others | first)} heads, but {RECORD} next to it says"
            f" {held}. The files do not belong together: make or download the heads folder again."
        )


def _is_index(name: str, held: int) -> bool:
    """Return True if a name is one of the numbers 0 to `held` - 1."""
    return name.isdecimal() and len(name) < 5 and int(name) < held


def _refuse_other_tensors(
    wanted: dict[str, Tensor],
    found: dict[str, Any],
    file: Path,
) -> None:
    """Raise ConfigError for a tensor of another shape, or of another kind of type."""
    for name, tensor in sorted(wanted.items()):
        shape = tuple(found[name].get_shape())
        kind = found[name].get_dtype()
        if shape != tuple(tensor.shape):
            raise ConfigError(
                f"{heads_as()}: {file} holds {name} with shape {shape}, but this model's heads need"
                f" {tuple(tensor.shape)}. These heads do not fit this model: use the model they"
                " were trained with."
            )
        # a few families have counters in their layers
        if (kind in FLOATS) != tensor.is_floating_point():
            raise ConfigError(
                f"{heads_as()}: {file} holds {name} as {kind}, but weights are one of"
                f" {', '.join(FLOATS)}. Make or download the heads folder again."
            )

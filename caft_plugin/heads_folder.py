"""The heads' folder: `heads.safetensors`, `config.json` and `fingerprint.safetensors`. Write, open, check, load.

A finished folder holds plain weights, LoRA merged. A checkpoint's folder keeps them apart
(`lora.safetensors` beside the others), because exact resuming needs both.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from caft_plugin.config import (
    DEFAULT_HEAD_INPUT,
    DEFAULT_HEAD_NORM,
    HEADS_KEY,
    CAFTConfig,
    ConfigError,
    HeadInput,
    heads_as,
    named,
    shown,
)
from caft_plugin.fingerprint import Fingerprint, Sample, is_sharded, take_sample
from caft_plugin.heads import MODULE_NAME, AuxiliaryHeads
from caft_plugin.storage import gather, shard_like, write_atomically, write_json
from caft_plugin.trunk import Trunk

logger = logging.getLogger(__name__)

FOLDER = MODULE_NAME
WEIGHTS, LORA, RECORD = "heads.safetensors", "lora.safetensors", "config.json"
FINGERPRINT = "fingerprint.safetensors"  # of the layer and the final norm that the heads were trained over
LARGEST_FINGERPRINT = 4_000_000  # bytes
LONGEST_JSON = 100_000  # bytes
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types that weights can be read from
COPIES = "; leave the key out to start from copies of the last layer"
METRICS, CARD = "metrics.json", "README.md"  # of pretrained heads
DRAFTING = "drafting.json"  # of heads with which `caft speculate` has written


class HeadsRecord(BaseModel):
    """`config.json` of a heads folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    num_heads: Annotated[int, Field(gt=0, le=1000)]
    head_input: HeadInput
    head_norm: bool
    layer_class: str
    model_type: str
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    base_model: str
    train_heads: Literal["full", "lora", "frozen"] | None = None  # of a checkpoint's heads

    @classmethod
    def of(cls, trunk: Trunk, config: CAFTConfig, **more: object) -> HeadsRecord:
        """The record of `config.num_heads` heads over a model. `config` says how they are wired."""
        written = {
            "num_heads": config.num_heads,
            "head_input": config.head_input,
            "head_norm": config.head_norm,
            "layer_class": trunk.layer_class,
            "model_type": trunk.model.config.model_type,
            "hidden_size": trunk.hidden_size,
            "vocab_size": trunk.vocab_size,
            "base_model": trunk.model.config.name_or_path or trunk.model.config.model_type,
        }
        return cls.model_validate({**written, **more})


class HeadFigures(BaseModel):
    """Held-out figures of one head: mean cross-entropy in nats, share of right top-1 predictions (0 to 1)."""

    loss: float
    accuracy: float


class HeadsMetrics(BaseModel):
    """`metrics.json` of pretrained heads: what they were trained on, and held-out figures of each head after training
    and before it: untrained, or as they came from the folder `started_from`. The lists are empty where nothing was held
    out. Other keys in such a file are left alone."""

    targets: str
    rows: int | None = None
    steps: int
    heads: list[HeadFigures]
    untrained: list[HeadFigures] = []
    started_from: str | None = None
    before: list[HeadFigures] = []
    tokens_per_pass: float | None = None  # with these heads as drafters, on what was held out
    tokens_per_pass_before: float | None = None  # the same of the heads that training started with
    positions: int | None = None  # held out, with a target of the first head


@dataclasses.dataclass(frozen=True)
class HeadsFolder:
    """A folder of heads, and its record."""

    path: Path
    record: HeadsRecord

    @classmethod
    def open(cls, heads: str | os.PathLike[str]) -> HeadsFolder:
        """The folder that `heads` names: itself, a run's folder with `caft_heads/` in it, or a Hub id.

        Raises:
            ConfigError: there is no such folder, or it is not a readable heads folder.
        """
        path = locate_heads(os.fspath(heads))
        return cls(path, read_record(path))

    def check_model(self, config: CAFTConfig, model_config: PretrainedConfig) -> None:
        """Holds the folder against the model it is to serve, before any weight is loaded.

        Raises:
            ConfigError: too few heads, or heads made for another hidden size. (Heads hold no vocabulary: they write
                through the model's own unembedding, so one that grew is no reason.)
        """
        path, record, text_config = self.path, self.record, model_config.get_text_config()
        if record.num_heads < config.num_heads:
            raise ConfigError(
                f"caft.num_heads: got {config.num_heads}, but the folder {path} holds {record.num_heads} heads. "
                f"Set num_heads to at most {record.num_heads}, or train more heads."
            )
        if record.hidden_size != text_config.hidden_size:
            raise ConfigError(
                f"{heads_as()}: {path} was made for hidden_size {record.hidden_size} (base model "
                f"{named(record.base_model)}), but this model has hidden_size {text_config.hidden_size}. Heads fit "
                "only the model they were trained on."
            )

    def check_layers(self, layer_class: str) -> None:
        """Holds the folder against the model's layers, before the heads' weights are read.

        Raises:
            ConfigError: heads of another class, or LoRA factors, which have to be merged first.
        """
        path, record = self.path, self.record
        if record.layer_class != layer_class:
            raise ConfigError(
                f"{heads_as()}: the heads in {path} are of class {named(record.layer_class)} (base model "
                f"{named(record.base_model)}), but this model's layers are of class {layer_class}. Heads fit only the "
                "model they were trained on."
            )
        if (path / LORA).exists():
            raise ConfigError(
                f"{heads_as()}: {path} belongs to a checkpoint, its LoRA is not merged. Give the {FOLDER}/ folder of a "
                "finished run, or resume from that checkpoint."
            )

    def warn_of_model(self, now: Sample | None, model_config: PretrainedConfig) -> None:
        """Warns where heads meet another model than they were trained over: by the fingerprint, where there is one,
        else by the base model's name. `now` is a sample of the model."""
        name, theirs = model_config.name_or_path or model_config.model_type, named(self.record.base_model)
        fingerprint = None if now is None else read_fingerprint(self.path)
        if now is None or fingerprint is None:
            if model_config.name_or_path and self.record.base_model != model_config.name_or_path:
                logger.warning(
                    "%s: these heads were made with base model %s, this run uses %s", heads_as(), theirs, name
                )
            return
        verdict = fingerprint.verdict(now)
        if verdict == "base":
            logger.warning(
                "%s: the heads in %s were trained together with a fine-tuned %s, but the last layer of this "
                "model, %s, is as it was before that fine-tuning. They fit the fine-tuned model: load its adapter or "
                "the merged model",
                heads_as(),
                self.path,
                theirs,
                name,
            )
        elif verdict == "other":
            logger.warning(
                "%s: the heads in %s (base model %s) were trained over another last layer or final norm than "
                "this model, %s, has: another base, or an earlier or later state of the same. They fit the model that "
                "they were trained with",
                heads_as(),
                self.path,
                theirs,
                name,
            )

    def warn_of_wiring(self, config: CAFTConfig) -> None:
        """Warns where heads are to be wired otherwise than they were made."""
        record = self.record
        for key in ("head_input", "head_norm"):
            written, recorded = getattr(config, key), getattr(record, key)
            if written is not None and written != recorded:
                logger.warning(
                    "caft.%s: got %s, but these heads were made with %s; leave it out to follow the folder",
                    key,
                    written,
                    recorded,
                )

    def load_into(self, heads: AuxiliaryHeads, layer_class: str) -> None:
        """Puts the folder's weights into heads; a folder with more heads serves its first ones.

        LoRA factors of a checkpoint's folder are refused: they have to be merged first, which training does at its end.

        Raises:
            ConfigError: damaged files, another layer class, missing, unknown or misshapen tensors.
        """
        self.check_layers(layer_class)
        wanted = {plain_name(name): t for name, t in heads.layers.state_dict().items() if ".lora_" not in name}
        _copy_into(wanted, self.path / WEIGHTS, held=self.record.num_heads)


def resolve_wiring(config: CAFTConfig, record: HeadsRecord | None) -> CAFTConfig:
    """`config` with head_input and head_norm filled in: as written, else as recorded, else the defaults."""
    recorded = (record.head_input, record.head_norm) if record else (DEFAULT_HEAD_INPUT, DEFAULT_HEAD_NORM)
    written = (config.head_input, config.head_norm)
    head_input, head_norm = (there if said is None else said for said, there in zip(written, recorded, strict=True))
    return config.model_copy(update={"head_input": head_input, "head_norm": head_norm})


def locate_heads(heads: str) -> Path:
    """The local folder of pretrained heads, given a folder (or one with `caft_heads/` in it) or a Hub id.

    Raises:
        ConfigError: neither a folder with heads nor a Hub id that can be had.
    """
    path = Path(heads)
    if path.is_dir():
        return path / FOLDER if (path / FOLDER / RECORD).is_file() else path
    if path.exists() or heads.startswith((".", "/", "~")):
        raise ConfigError(
            f"{heads_as()}: got {heads!r}, which is not a folder. It takes a folder with {WEIGHTS} and {RECORD}, "
            f"or a Hub id (owner/name){COPIES if heads_as() == HEADS_KEY else ''}."
        )
    from huggingface_hub import snapshot_download

    files = (WEIGHTS, LORA, FINGERPRINT, RECORD, METRICS, CARD, DRAFTING)
    patterns = [f"{folder}{name}" for folder in ("", f"{FOLDER}/") for name in files]
    try:
        return locate_heads(snapshot_download(heads, allow_patterns=patterns))
    except Exception as error:  # the Hub's client has a dozen kinds: offline, no such name, no permission
        raise ConfigError(
            f"{heads_as()}: got {heads!r}, which is neither a local folder nor a Hub id that can be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, your connection and your "
            "Hub token, or give a folder."
        ) from error


def own_file(folder: Path, name: str) -> Path:
    """The path of a file in a heads folder. A link may not lead out of the folder, except where the Hub's cache
    links a snapshot's files to its own `blobs`.

    Raises:
        ConfigError: there is no such regular file, or it lies elsewhere.
    """
    file = folder / name
    snapshot = next((p for p in folder.absolute().parents if p.name == "snapshots"), None)
    in_cache = snapshot is not None and snapshot.parent.name.startswith("models--")
    root = snapshot.parent if snapshot is not None and in_cache else folder
    try:
        inside = file.resolve(strict=True).is_relative_to(root.resolve())
        problem = None if inside and file.is_file() else "not a regular file" if inside else "a link out of the folder"
    except OSError as error:
        problem = error.strerror
    except RuntimeError:
        problem = "a link to itself"
    if problem:
        raise ConfigError(
            f"{heads_as()}: {folder} has no readable {name} ({problem}). It takes a heads folder with {WEIGHTS} and "
            f"{RECORD} in it, as training leaves it in {FOLDER}/."
        )
    return file


def read_small(folder: Path, name: str) -> bytes:
    """The content of a JSON file in a heads folder.

    Raises:
        ConfigError: there is no such regular file, or it is too long to be what it should be.
    """
    with open(own_file(folder, name), "rb") as opened:
        content = opened.read(LONGEST_JSON + 1)
    if len(content) > LONGEST_JSON:
        raise ConfigError(
            f"{heads_as()}: {folder / name} is longer than {LONGEST_JSON} bytes, so it is something else. Make the "
            "folder again, or take the one that came with these heads."
        )
    return content


def read_record(folder: Path) -> HeadsRecord:
    """The record of a heads folder.

    Raises:
        ConfigError: the folder is not a readable heads folder.
    """
    content = read_small(folder, RECORD)
    _refuse_model(folder, content)
    try:
        return HeadsRecord.model_validate(json.loads(content.decode(), object_pairs_hook=_once_each), strict=True)
    except ValidationError as error:
        problem = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # not UTF-8, not JSON, a key twice
        problem = str(error)
    raise ConfigError(
        f"{heads_as()}: {folder / RECORD} is not a heads record this version reads ({shown(problem)}). "
        "Make the folder again, or take the one that came with these heads."
    )


def _refuse_model(folder: Path, config: bytes) -> None:
    """Raise ConfigError where a config.json is a model's, and say where its heads are."""
    if b'"architectures"' not in config or b'"head_input"' in config:
        return
    near = folder.parent / FOLDER  # of a merged model
    heads = f"Its heads are in {near}." if (near / RECORD).is_file() else f"A run leaves its heads in {FOLDER}/."
    raise ConfigError(f"{heads_as()}: got {folder}, which is a model's folder without heads. {heads}")


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)} stands there twice")
    return dict(pairs)


def plain_name(name: str) -> str:
    """A head parameter's name as it would be without PEFT's wrapping."""
    return name.replace(".base_layer.", ".").replace(f".{MODULE_NAME}.", ".")


def heads_state(heads: AuxiliaryHeads) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain weights `K.<layer's own name>`, and LoRA factors `K.<module>.lora_A.weight` (may be empty).

    K counts from 0. Every process has to call it; each gets unsharded tensors.
    """
    weights: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for name, tensor in heads.layers.state_dict().items():
        (lora if ".lora_" in name else weights)[plain_name(name)] = gather(tensor)
    return weights, lora


def merged(heads: AuxiliaryHeads, weights: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights with the LoRA factors merged in: W + scaling * B A, computed in float32."""
    result = dict(weights)
    for name, module in heads.layers.named_modules():
        if isinstance(module, LoraLayer):
            a, b = (lora[f"{name}.lora_{factor}.weight"].float() for factor in "AB")
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
) -> Path:
    """Writes `caft_heads/` into `parent`: LoRA merged, or (`resumable`) beside the weights.

    Every process has to call it; the one with `write` writes.
    """
    weights, lora = heads_state(heads)
    after = take_sample(trunk, heads.origin) if write or is_sharded(trunk) else None
    folder = Path(parent) / FOLDER
    if write:
        if lora and not resumable:
            weights, lora = merged(heads, weights, lora), {}
        record = HeadsRecord.of(trunk, config, train_heads=heads.how if resumable else None)
        fingerprint = None if heads.origin is None or after is None else Fingerprint(heads.origin, after)
        write_heads(folder, record, weights, lora, fingerprint)
    return folder


def write_heads(
    folder: Path,
    record: HeadsRecord,
    weights: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    fingerprint: Fingerprint | None = None,
) -> None:
    """Writes the files of a heads folder. Each file appears complete or not at all, and the record appears last: where
    there is one, all files are of one save."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    (folder / DRAFTING).unlink(missing_ok=True)  # of the heads that were here before
    for left_by_a_killed_run in folder.glob(".*.tmp"):
        left_by_a_killed_run.unlink(missing_ok=True)
    for name, tensors in ((LORA, lora), (WEIGHTS, weights)):
        if tensors:
            _write_tensors(folder / name, tensors)
        else:
            (folder / name).unlink(missing_ok=True)
    write_fingerprint(folder, fingerprint)
    write_json(folder / RECORD, record.model_dump(exclude_none=True))


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    write_atomically(file, lambda temporary: save_file(dict(tensors), temporary, {"format": "pt", **metadata}))


def write_fingerprint(folder: Path, fingerprint: Fingerprint | None) -> None:
    """Writes a fingerprint's file into a heads folder; without a fingerprint the file of earlier heads is removed."""
    if fingerprint is None:
        (folder / FINGERPRINT).unlink(missing_ok=True)
        return
    samples = {"before": fingerprint.before, "after": fingerprint.after}
    tensors = {f"{end}.{name}": t for end, sample in samples.items() for name, t in sample.values.items()}
    _write_tensors(folder / FINGERPRINT, tensors, quantised=json.dumps(sorted(fingerprint.before.quantised)))


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint in a heads folder; None, and a warning, for a file that is none.

    Raises:
        ConfigError: the file is a link out of the folder.
    """
    if not (folder / FINGERPRINT).exists():
        return None
    file = own_file(folder, FINGERPRINT)
    samples: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
    try:
        if file.stat().st_size > LARGEST_FINGERPRINT:
            raise ValueError(f"longer than {LARGEST_FINGERPRINT} bytes")
        with safe_open(file, framework="pt") as opened:
            quantised = json.loads((opened.metadata() or {}).get("quantised", "[]"))
            for key in opened.keys():
                end, _, name = key.partition(".")
                tensor = opened.get_tensor(key)
                if tensor.dtype != torch.float32 or tensor.dim() != 1 or not tensor.isfinite().all():
                    raise ValueError(f"{key} holds other things than a row of finite float32 numbers")
                samples[end][name] = tensor
        if samples["before"].keys() != samples["after"].keys() or not samples["before"]:
            raise ValueError("it is not whole")
        before, after = (Sample(values, frozenset(map(str, quantised))) for values in samples.values())
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        logger.warning(
            "%s: %s is not read, so nobody can tell whether these heads fit this model (%s)",
            heads_as(),
            file,
            shown(str(error)),
        )
        return None
    return Fingerprint(before, after)


def load_checkpoint(checkpoint: str | os.PathLike[str], heads: AuxiliaryHeads, config: CAFTConfig) -> None:
    """Puts heads and LoRA factors back as a checkpoint holds them, for exact resuming.

    Raises:
        ConfigError: the checkpoint has no heads, or others than this run's.
    """
    folder = Path(checkpoint) / FOLDER
    if not folder.is_dir():
        raise ConfigError(
            f"caft: the checkpoint {checkpoint} has no {FOLDER}/ folder, so it was made without CAFT and cannot be "
            "resumed with it. Resume without the `caft:` block, or start anew."
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
                f"caft.{key}: this run has {str(value).lower()}, but the checkpoint {checkpoint} was made with "
                f"{str(recorded).lower()}. Resume with caft.{key}: {str(recorded).lower()}, or start anew."
            )
    state = heads.layers.state_dict()
    weights = {plain_name(name): t for name, t in state.items() if ".lora_" not in name}
    lora = {plain_name(name): t for name, t in state.items() if ".lora_" in name}
    _copy_into(weights, folder / WEIGHTS, held=len(heads))
    if lora:
        _copy_into(lora, folder / LORA, held=len(heads))


def _copy_into(wanted: dict[str, Tensor], file: Path, *, held: int) -> None:
    """Copies the tensors of a safetensors file with `held` heads into `wanted`, the first heads of these, after
    checking every name, shape and type. Other floating-point types are converted."""
    file = own_file(file.parent, file.name)
    try:
        with safe_open(file, framework="pt") as opened:
            _check_tensors(wanted, {name: opened.get_slice(name) for name in opened.keys()}, file, held)
            with torch.no_grad():
                for name, tensor in wanted.items():
                    tensor.copy_(shard_like(tensor, opened.get_tensor(name)))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{heads_as()}: {file} cannot be read as safetensors ({shown(str(error))}). The file is damaged or of "
            "another kind: make or download the heads folder again."
        ) from None


def _check_tensors(wanted: dict[str, Tensor], found: dict[str, Any], file: Path, held: int) -> None:
    first = {name.split(".")[0] for name in wanted}  # the heads asked for; of others only their number is known
    missing = sorted(wanted.keys() - found.keys())
    others = {name.split(".")[0] for name in found} - first
    unknown = sorted(name for name in found if name not in wanted and name.split(".")[0] in first)
    unknown += sorted(name for name in others if not (name.isdecimal() and len(name) < 5 and int(name) < held))
    for names, problem in [(missing, "lacks"), (unknown, "has unknown")]:
        if names:
            raise ConfigError(
                f"{heads_as()}: {file} {problem} {len(names)} tensors, the first is {named(names[0])}. These heads do "
                "not fit this model: give the model or the settings that they were made with."
            )
    if len(others | first) != held:
        raise ConfigError(
            f"{heads_as()}: {file} holds {len(others | first)} heads, but {RECORD} next to it says {held}. The files "
            "are not of one folder: make or download it again."
        )
    for name, tensor in sorted(wanted.items()):
        shape, kind = tuple(found[name].get_shape()), found[name].get_dtype()
        if shape != tuple(tensor.shape):
            raise ConfigError(
                f"{heads_as()}: {file} holds {name} with shape {shape}, but this model's heads need "
                f"{tuple(tensor.shape)}. These heads do not fit this model: give the model that they were made with."
            )
        if (kind in FLOATS) != tensor.is_floating_point():  # a few families have counters in their layers
            raise ConfigError(
                f"{heads_as()}: {file} holds {name} as {kind}, but weights are one of {', '.join(FLOATS)}. Make or "
                "download the heads folder again."
            )

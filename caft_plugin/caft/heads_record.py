"""A heads folder without its weights: where it is, its record and its figures. No torch: `caft
inspect` is quick."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from caft_plugin.config import CAFTConfig, HeadInput
from caft_plugin.errors import HEADS_KEY, ConfigError, heads_as, shown
from caft_plugin.model.heads_as_model import OF_RECORD

if TYPE_CHECKING:
    from caft_plugin.model.trunk import Trunk

FOLDER = "caft_heads"
WEIGHTS = "heads.safetensors"
LORA = "lora.safetensors"
RECORD = "config.json"
# of the last layer and final norm that the heads were trained with
FINGERPRINT = "fingerprint.safetensors"
LONGEST_JSON = 100_000  # bytes
COPIES = "; omit it to start from copies of the last layer"
# written for pretrained heads
METRICS = "metrics.json"
CARD = "README.md"
DRAFTING = "drafting.json"  # written by `caft speculate`
LOSSES = "losses.json"  # written by a run
TRAINING = "training"  # in it, next to the names of evaluation sets
# Keys that tell config.json of heads from that of a model, and that from a drafter's.
OF_MODEL = {"architectures", "model_type"}
OF_DRAFTER = {
    "caft_heads",
    "eagle_aux_hidden_state_layer_ids",
}


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
    train_heads: Literal["full", "lora", "frozen"] | None = None  # only in a checkpoint

    @classmethod
    def of(
        cls,
        trunk: Trunk,
        config: CAFTConfig,
        **more: object,
    ) -> HeadsRecord:
        """Return the record of `config.num_heads` heads for a model, wired as in `config`."""
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
    """Held-out figures of one head: mean cross-entropy in nats, top-1 accuracy (0 to 1)."""

    loss: float
    accuracy: float


class HeadsMetrics(BaseModel):
    """`metrics.json` of pretrained heads: their training data, and held-out figures of each head.

    `heads` are the figures after training, `untrained` those of untrained heads, `before` those of
    the heads loaded from the folder `started_from`. Lists are empty if nothing was held out. Other
    keys of the file are ignored.
    """

    targets: str
    rows: int | None = None
    steps: int
    heads: list[HeadFigures]
    untrained: list[HeadFigures] = []
    started_from: str | None = None
    before: list[HeadFigures] = []
    tokens_per_pass: float | None = None  # of these heads as drafters, on held-out text
    tokens_per_pass_before: float | None = None  # the same of the heads that training started with
    positions: int | None = None  # held out, with a target of the first head


class LoggedLosses(BaseModel):
    """One entry of `losses.json`: what a run logged last of its heads, in training or on one
    evaluation set.

    `losses` has each head's mean cross-entropy in nats, by k, without the heads that had none;
    `step` is the optimiser step of the log, `tokens_per_pass` as in HeadsEvaluation.
    """

    step: int
    losses: dict[int, float]
    tokens_per_pass: float | None = None


LOSSES_BY_SET: TypeAdapter[dict[str, LoggedLosses]] = TypeAdapter(dict[str, LoggedLosses])


def locate_heads(heads: str) -> Path:
    """Return the local folder of heads, given a folder (or one with `caft_heads/` in it) or a Hub
    id.

    Raises:
        ConfigError: neither a folder with heads nor a Hub id that can be downloaded.
    """
    path = Path(heads)
    if path.is_dir():
        return path / FOLDER if (path / FOLDER / RECORD).is_file() else path
    if path.exists() or heads.startswith((".", "/", "~")):
        raise ConfigError(
            f"{heads_as()}: got {heads!r}, which is not a folder. It accepts a folder with"
            f" {WEIGHTS} and {RECORD}, or a Hub id"
            f" (owner/name){COPIES if heads_as() == HEADS_KEY else ''}."
        )
    from huggingface_hub import snapshot_download

    files = (WEIGHTS, LORA, FINGERPRINT, RECORD, METRICS, CARD, DRAFTING, LOSSES)
    patterns = [f"{folder}{name}" for folder in ("", f"{FOLDER}/") for name in files]
    try:
        return locate_heads(snapshot_download(heads, allow_patterns=patterns))
    # the Hub's client raises many kinds: offline, no such name, no permission
    except Exception as error:
        raise ConfigError(
            f"{heads_as()}: got {heads!r}, which is neither a local folder nor a Hub id that can be"
            f" downloaded ({type(error).__name__}: {str(error).splitlines()[0]}). Check the name,"
            " your connection and your Hub token, or give a folder."
        ) from error


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a file in a heads folder.

    A link must not point outside the folder, except in the Hub's cache, which links a snapshot's
    files to its `blobs`.

    Raises:
        ConfigError: there is no such regular file, or it is outside the folder.
    """
    file = folder / name
    snapshot = next((p for p in folder.absolute().parents if p.name == "snapshots"), None)
    in_cache = snapshot is not None and snapshot.parent.name.startswith("models--")
    root = snapshot.parent if snapshot is not None and in_cache else folder
    try:
        problem = None
        if not file.resolve(strict=True).is_relative_to(root.resolve()):
            problem = "a link out of the folder"
        elif not file.is_file():
            problem = "not a regular file"
    except OSError as error:
        problem = error.strerror
    except RuntimeError:
        problem = "a link to itself"
    if problem:
        raise ConfigError(
            f"{heads_as()}: {folder} has no readable {name} ({problem}). It accepts a heads folder"
            f" with {WEIGHTS} and {RECORD}, which training saves in {FOLDER}/."
        )
    return file


def read_small(folder: Path, name: str) -> bytes:
    """Read a JSON file of a heads folder.

    Raises:
        ConfigError: there is no such regular file, or it is too long.
    """
    with open(own_file(folder, name), "rb") as opened:
        content = opened.read(LONGEST_JSON + 1)
    if len(content) > LONGEST_JSON:
        raise ConfigError(
            f"{heads_as()}: {folder / name} is longer than {LONGEST_JSON} bytes, so it is not a"
            " file of caft_plugin. Make the folder again, or use the file that was saved with"
            " these heads."
        )
    return content


def read_record(folder: Path) -> HeadsRecord:
    """Read the record of a heads folder.

    Raises:
        ConfigError: the folder is not a readable heads folder.
    """
    try:
        content = json.loads(read_small(folder, RECORD).decode(), object_pairs_hook=_once_each)
        _refuse_model(folder, content)
        return HeadsRecord.model_validate(content, strict=True)
    except ConfigError:
        raise
    except ValidationError as error:
        problem = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
        )
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # not UTF-8, not JSON, a key twice
        problem = str(error)
    raise ConfigError(
        f"{heads_as()}: {folder / RECORD} is not a heads record that this version can read"
        f" ({shown(problem)}). Make the folder again, or use the file that was saved with these"
        " heads."
    )


def _refuse_model(folder: Path, config: object) -> None:
    """Raise ConfigError if a config.json is a model's or a drafter's, and say where the heads
    are."""
    if not isinstance(config, dict) or config.keys() & OF_RECORD or not config.keys() & OF_MODEL:
        return
    if config.keys() & OF_DRAFTER:
        raise ConfigError(
            f"{heads_as()}: got {folder}, which is a drafter's folder for an inference engine. Give"
            " the heads folder that it was made from."
        )
    near = folder.parent / FOLDER  # of a merged model
    heads = (
        f"Its heads are in {near}."
        if (near / RECORD).is_file()
        else f"A run saves its heads in {FOLDER}/."
    )
    raise ConfigError(
        f"{heads_as()}: got {folder}, which is a model's folder without heads. {heads}"
    )


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)} occurs twice")
    return dict(pairs)


def read_losses(folder: Path) -> dict[str, LoggedLosses]:
    """Return what the run that trained these heads logged of them, by TRAINING and the names of
    evaluation sets.

    Raises:
        ConfigError: the file is damaged.
    """
    if not os.path.lexists(folder / LOSSES):
        return {}
    try:
        return LOSSES_BY_SET.validate_json(read_small(folder, LOSSES))
    except (OSError, ValidationError) as error:
        refuse_unreadable(folder / LOSSES, error)


def read_metrics(folder: Path, record: HeadsRecord) -> HeadsMetrics | None:
    """Return the figures of stage 1, None where the folder has none.

    Raises:
        ConfigError: the file is damaged, or has figures of another number of heads.
    """
    file = folder / METRICS
    if not os.path.lexists(file):
        return None
    try:
        metrics = HeadsMetrics.model_validate_json(read_small(folder, METRICS))
    except (OSError, ValidationError) as error:
        refuse_unreadable(file, error)
    if len(metrics.heads) not in (0, record.num_heads):
        raise ConfigError(
            f"{file} holds figures of {len(metrics.heads)} heads, but the folder holds"
            f" {record.num_heads}. Remove it, or make or download the heads folder again."
        )
    return metrics


def refuse_unreadable(file: Path, error: OSError | ValidationError) -> NoReturn:
    """Raise ConfigError for a file of figures that could not be read."""
    reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
    raise ConfigError(
        f"{file} cannot be read ({reason}). Remove it, or make or download the heads folder again."
    ) from error

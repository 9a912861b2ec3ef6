"""`caft inspect`: a heads folder in words and a table."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from caft_plugin.config import ConfigError, named
from caft_plugin.heads_folder import (
    LORA,
    METRICS,
    RECORD,
    WEIGHTS,
    HeadFigures,
    HeadsFolder,
    HeadsMetrics,
    HeadsRecord,
    own_file,
    read_small,
)


def describe(heads: str | os.PathLike[str]) -> str:
    """The heads in a heads folder, a run's folder or a Hub id; of the weights only the file's header is read.

    Raises:
        ConfigError: the folder is not a complete heads folder.
    """
    opened = HeadsFolder.open(heads)
    folder, record = opened.path, opened.record
    metrics = read_metrics(folder, record)
    tensors = tensors_of_heads(folder, record)
    facts = {
        "Folder": str(folder),
        "Base model": named(record.base_model),
        "Layer class": f"{named(record.layer_class)} ({named(record.model_type)})",
        "Wiring": f"head_input {record.head_input}, head_norm {str(record.head_norm).lower()}",
        "Hidden size": str(record.hidden_size),
        "Vocabulary": str(record.vocab_size),
        "Heads": str(record.num_heads),
    }
    if (folder / LORA).exists():
        facts["LoRA"] = f"not merged, in {LORA}: this is a checkpoint's folder; {WEIGHTS} is without it"
    if metrics is not None:
        counts = {"rows": metrics.rows, "steps": metrics.steps}
        said = [f"{count:,} {what}" for what, count in counts.items() if count is not None]
        facts["Trained on"] = ", ".join([f"targets {named(metrics.targets)}", *said])
        if metrics.started_from is not None:
            facts["Started from"] = named(metrics.started_from)
        if metrics.tokens_per_pass is not None:
            facts["As drafters"] = f"{metrics.tokens_per_pass:.2f} tokens a pass of the model, held out"

    table = [["head", "predicts", "parameters", "dtype", "size", "held-out loss", "held-out accuracy"]]
    for k, own in enumerate(tensors):
        figures = held_out(metrics.heads[k]) if metrics and metrics.heads else ["-", "-"]
        table.append([str(k + 1), f"{k + 2} ahead", *sizes(own), *figures])
    table.append(["all", "", *sizes([tensor for own in tensors for tensor in own]), "", ""])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in [*lines, "", *rows])


def sizes(tensors: list[dict[str, Any]]) -> list[str]:
    """Parameters, dtypes and size of tensors, given by their entries in a safetensors header."""
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors)
    dtypes = sorted({tensor["dtype"] for tensor in tensors})
    size = sum(end - start for start, end in (tensor["data_offsets"] for tensor in tensors))
    return [f"{parameters:,}", ", ".join(dtypes), f"{size / 1e6:,.2f} MB"]


def held_out(figures: HeadFigures) -> list[str]:
    return [f"{figures.loss:.3f}", f"{figures.accuracy:.1%}"]


def tensors_of_heads(folder: Path, record: HeadsRecord) -> list[list[dict[str, Any]]]:
    """For each head the entries (`dtype`, `shape`, `data_offsets`) of its tensors in the weights' header.

    Raises:
        ConfigError: the file is damaged, or does not hold the heads its record speaks of.
    """
    file = own_file(folder, WEIGHTS)
    try:
        # Checks that the header is sound and the file as long as it says; "pt" would reserve memory for all of it.
        with safe_open(file, framework="numpy"):
            pass
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file} cannot be read as safetensors ({error}). The file is damaged or of another kind: make or "
            "download the heads folder again."
        ) from error
    heads = defaultdict(list)
    for name, entry in header.items():
        if name != "__metadata__":
            heads[name.partition(".")[0]].append(entry)
    wanted = [str(k) for k in range(record.num_heads)]
    if set(heads) != set(wanted):
        raise ConfigError(
            f"{file} holds heads {', '.join(map(named, sorted(heads)[:20])) or 'none'}, but {RECORD} beside it says "
            f"there are {record.num_heads}, counted from 0. Make or download the heads folder again."
        )
    return [heads[k] for k in wanted]


def read_metrics(folder: Path, record: HeadsRecord) -> HeadsMetrics | None:
    """The held-out figures, or None where the folder has none.

    Raises:
        ConfigError: the file is damaged, or speaks of another number of heads.
    """
    file = folder / METRICS
    if not os.path.lexists(file):
        return None
    try:
        metrics = HeadsMetrics.model_validate_json(read_small(folder, METRICS))
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ConfigError(
            f"{file} cannot be read ({reason}). Remove it, or make or download the heads folder again."
        ) from error
    if len(metrics.heads) not in (0, record.num_heads):
        raise ConfigError(
            f"{file} holds figures of {len(metrics.heads)} heads, but the folder holds {record.num_heads}. Remove "
            "it, or make or download the heads folder again."
        )
    return metrics

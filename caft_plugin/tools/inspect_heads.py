"""`caft inspect`: a heads folder in words and a table. It is used interactively, so it imports no
torch."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from caft_plugin.caft.heads_record import (
    LORA,
    RECORD,
    TRAINING,
    WEIGHTS,
    HeadsMetrics,
    HeadsRecord,
    LoggedLosses,
    locate_heads,
    own_file,
    read_losses,
    read_metrics,
    read_record,
)
from caft_plugin.errors import ConfigError, named
from caft_plugin.stage1.figures import aligned

SETS = 8  # evaluation sets that are shown


def describe(heads: str | os.PathLike[str]) -> str:
    """Describe the heads in a heads folder, a run's folder or a Hub id. Of the weights only the
    file's header is read.

    Raises:
        ConfigError: the folder is not a complete heads folder.
    """
    folder = locate_heads(os.fspath(heads))
    record = read_record(folder)
    metrics = read_metrics(folder, record)
    losses = read_losses(folder)
    if metrics is not None:  # of stage 1, which evaluates after its last step
        losses = {name: logged for name, logged in losses.items() if name == TRAINING}
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
        facts["LoRA"] = (
            f"not merged, in {LORA}: this is a checkpoint's folder; {WEIGHTS} is without it"
        )
    facts |= facts_of_training(metrics, losses)
    table = [["head", "predicts", "parameters", "dtype", "size"]]
    for k, own in enumerate(tensors, 1):
        table.append([str(k), f"{k + 1} ahead", *sizes(own)])
    of_all_heads = [tensor for own in tensors for tensor in own]
    table.append(["all", "", *sizes(of_all_heads)])
    for title, cells in figures_of_heads(metrics, losses, record.num_heads).items():
        column = [title, *cells, ""]
        for row, cell in zip(table, column, strict=True):
            row.append(cell)
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    return "\n".join(line.rstrip() for line in [*lines, "", *aligned(table)])


def facts_of_training(
    metrics: HeadsMetrics | None, losses: dict[str, LoggedLosses]
) -> dict[str, str]:
    """Return what the heads were trained on and how well they draft, line by line."""
    facts = {}
    if metrics is not None:
        counts = {"rows": metrics.rows, "steps": metrics.steps}
        said = [f"{count:,} {what}" for what, count in counts.items() if count is not None]
        facts["Trained on"] = ", ".join([f"targets {named(metrics.targets)}", *said])
        if metrics.started_from is not None:
            facts["Started from"] = named(metrics.started_from)
    elif losses:
        steps = [f"step {logged.step:,} ({label(name)})" for name, logged in losses.items()]
        facts["Logged at"] = ", ".join(steps[:SETS])
    drafting: dict[str, HeadsMetrics | LoggedLosses] = {}
    if metrics is not None:
        drafting["held out"] = metrics
    else:
        drafting |= {label(name): logged for name, logged in losses.items()}
    found = [
        f"{figures.tokens_per_pass:.2f} tokens per step ({name})"
        for name, figures in drafting.items()
        if figures.tokens_per_pass is not None
    ]
    if found:
        facts["As drafters"] = ", ".join(found[:SETS])
    return facts


def label(name: str) -> str:
    return "training" if name == TRAINING else named(name)


def figures_of_heads(
    metrics: HeadsMetrics | None,
    losses: dict[str, LoggedLosses],
    num_heads: int,
) -> dict[str, list[str]]:
    """Return a column for each figure that is known of the heads: its title, and a cell for each
    head."""
    columns = {}
    for name, logged in list(losses.items())[:SETS]:
        found = [logged.losses.get(k) for k in range(1, num_heads + 1)]
        columns[f"{label(name)} loss"] = ["-" if loss is None else f"{loss:.3f}" for loss in found]
    if metrics is not None and metrics.heads:
        columns["held-out loss"] = [f"{head.loss:.3f}" for head in metrics.heads]
        columns["held-out accuracy"] = [f"{head.accuracy:.1%}" for head in metrics.heads]
    return columns


def sizes(tensors: list[dict[str, Any]]) -> list[str]:
    """Return parameters, dtypes and size of tensors, given by their entries in a safetensors
    header."""
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors)
    dtypes = sorted({tensor["dtype"] for tensor in tensors})
    offsets = [tensor["data_offsets"] for tensor in tensors]
    size = sum(end - start for start, end in offsets)
    return [f"{parameters:,}", ", ".join(dtypes), f"{size / 1e6:,.2f} MB"]


def tensors_of_heads(folder: Path, record: HeadsRecord) -> list[list[dict[str, Any]]]:
    """Return for each head the entries (`dtype`, `shape`, `data_offsets`) of its tensors in the
    weights' header.

    Raises:
        ConfigError: the file is damaged, or does not hold the heads that its record names.
    """
    file = own_file(folder, WEIGHTS)
    try:
        # Checks that the header is sound and the file as long as it says; "pt" would reserve memory
        # for all of it.
        with safe_open(file, framework="numpy"):
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file} cannot be read as safetensors ({error}). The file is damaged or of another"
            " kind: make or download the heads folder again."
        ) from error
    heads = defaultdict(list)
    for name, entry in header.items():
        if name != "__metadata__":
            heads[name.partition(".")[0]].append(entry)
    wanted = [str(k) for k in range(record.num_heads)]
    if set(heads) != set(wanted):
        there = [named(name) for name in sorted(heads)[:20]]
        raise ConfigError(
            f"{file} holds heads {', '.join(there) or 'none'}, but"
            f" {RECORD} next to it says there are {record.num_heads}, counted from 0. Make or"
            " download the heads folder again."
        )
    return [heads[k] for k in wanted]

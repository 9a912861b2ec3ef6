"""Read rows and columns of token ids from any type of training set."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset as TorchIterableDataset

# lists, arrays or tensors with a value per token, by column; other columns are the host's
Row = Mapping[str, Any]
TrainingSet = Any  # a Dataset or IterableDataset of `datasets`, a torch Dataset, or a list of rows


def is_of_datasets(dataset: TrainingSet, kind: Literal["Dataset", "IterableDataset"]) -> bool:
    """Return True if a data set is a `datasets` one, without importing `datasets`, which is
    optional."""
    package = sys.modules.get("datasets")
    return package is not None and isinstance(dataset, getattr(package, kind))


def used_ids(dataset: TrainingSet) -> frozenset[int] | None:
    """Return the token ids in the `input_ids` of a map-style data set; None if they cannot be
    read."""
    if not hasattr(dataset, "__len__") or isinstance(dataset, TorchIterableDataset):
        return None
    used: set[int] = set()
    for ids in column_chunks(dataset, "input_ids"):
        if ids is None:
            return None
        used.update(np.flatnonzero(np.bincount(ids)).tolist())
    return frozenset(used)


def rows_of(dataset: TrainingSet) -> Iterator[Row]:
    """Yield `len(dataset)` rows: iterating over a set that samples its rows may never end."""
    return itertools.islice(iter(dataset), len(dataset))


def column_chunks(dataset: TrainingSet, column: str) -> Iterator[np.ndarray | None]:
    """Yield all values of an integer column, in chunks; None if rows lack it, or make it when they
    are read."""
    if is_of_datasets(dataset, "Dataset"):
        if column not in dataset.column_names or dataset.format["type"] == "custom":
            yield None
            return
        # as Arrow's arrays: rows of Python lists would take minutes for a large set
        tables = dataset.select_columns([column]).with_format("arrow").iter(1000)
        for table in tables:
            values = table.column(column).combine_chunks().flatten()
            yield values.to_numpy(zero_copy_only=False)
    else:
        for row in rows_of(dataset):
            yield np.asarray(row[column], dtype=np.int64) if column in row else None

"""What a training set holds: rows and columns of token ids, whatever kind of data set it is."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset as TorchIterableDataset

Row = Mapping[str, Any]  # lists, arrays or tensors of one value for each token, by column; other columns are the host's
TrainingSet = Any  # a Dataset or IterableDataset of `datasets`, a torch Dataset, or a list of rows


def is_of_datasets(dataset: TrainingSet, kind: Literal["Dataset", "IterableDataset"]) -> bool:
    """Whether a data set is one of the package `datasets`, which nobody needs who does not have such a set."""
    package = sys.modules.get("datasets")
    return package is not None and isinstance(dataset, getattr(package, kind))


def used_ids(dataset: TrainingSet) -> frozenset[int] | None:
    """Token ids in the `input_ids` of a map-style data set; None where there are none to be looked through."""
    if not hasattr(dataset, "__len__") or isinstance(dataset, TorchIterableDataset):
        return None
    used: set[int] = set()
    for ids in column_chunks(dataset, "input_ids"):
        if ids is None:
            return None
        used.update(np.flatnonzero(np.bincount(ids)).tolist())
    return frozenset(used)


def rows_of(dataset: TrainingSet) -> Iterator[Row]:
    """As many rows as a data set says that it has: one that draws its rows at random may never end by itself."""
    return itertools.islice(iter(dataset), len(dataset))


def column_chunks(dataset: TrainingSet, column: str) -> Iterator[np.ndarray | None]:
    """All values of a column of whole numbers, many at a time; None where rows do not have it, or make it when read."""
    if is_of_datasets(dataset, "Dataset"):
        if column not in dataset.column_names or dataset.format["type"] == "custom":
            yield None
            return
        for table in dataset.select_columns([column]).with_format("arrow").iter(1000):
            yield table.column(column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    else:
        for row in rows_of(dataset):
            yield np.asarray(row[column], dtype=np.int64) if column in row else None

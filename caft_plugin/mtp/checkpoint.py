"""The safetensors files of a model: which tensors they hold, and how tensors are put into them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from caft_plugin.errors import ConfigError
from caft_plugin.files import write_atomically, write_json
from caft_plugin.model.loading import reading

SHARD = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's weights in a folder or on the Hub.

    `named` is how the caller calls it, for messages: `--base BASE`. `files` maps each tensor's name
    to the name of its file.
    """

    name: str
    revision: str | None
    named: str
    files: Mapping[str, str]

    @classmethod
    def open(
        cls,
        name: str,
        named: str,
        revision: str | None = None,
    ) -> Checkpoint:
        """Read which tensors there are. From the Hub, only an index is downloaded, if it has one.

        Raises:
            ConfigError: there are no safetensors files, or they cannot be read.
        """
        with reading("weights", name, named):
            files = _files_of(name, revision)
        if files is not None:
            return cls(name, revision, named, files)
        raise ConfigError(
            f"{named}: {name} has neither {SAFE_WEIGHTS_INDEX_NAME} nor {SAFE_WEIGHTS_NAME}. It"
            " accepts a model whose weights are in safetensors files."
        )

    @property
    def folder(self) -> Path:
        return Path(self.name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name, on the CPU, in the dtype of the files.

        Raises:
            ConfigError: a file is missing, or does not hold what the index says.
        """
        found: dict[str, Tensor] = {}
        for file, inside in self._by_file(names).items():
            with self._opened(file) as tensors:
                found |= {name: tensors.get_tensor(name) for name in inside}
        return found

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """Return dtypes by name, without reading the tensors' values."""
        found: dict[str, torch.dtype] = {}
        for file, inside in self._by_file(names).items():
            with self._opened(file) as tensors:
                found |= {name: tensors.get_slice(name)[:0].dtype for name in inside}
        return found

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        inside: dict[str, list[str]] = {}
        for name in names:
            inside.setdefault(self.files[name], []).append(name)
        return inside

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[safe_open]:
        with reading("weights", self.name, self.named):
            path = find_file(self.name, self.revision, file)
            if path is None:
                raise ConfigError(
                    f"{self.named}: {self.name} has no {file}, which its index names."
                )
            with safe_open(path, "pt") as tensors:
                yield tensors

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into the folder: those that are there are replaced, the others go into a last
        shard of their own.

        After each step the folder is a complete model, before or after the change.
        """
        self._replace({name: tensors[name] for name in tensors if name in self.files})
        added = {name: tensors[name] for name in tensors if name not in self.files}
        if added:
            self._add(added)

    def _replace(self, tensors: Mapping[str, Tensor]) -> None:
        for file, inside in self._by_file(tensors).items():
            with safe_open(self.folder / file, "pt") as opened:
                about = opened.metadata()
                content = {name: opened.get_tensor(name) for name in opened.keys()}
            content |= {name: tensors[name].contiguous() for name in inside}
            write_atomically(
                self.folder / file, functools.partial(save_file, content, metadata=about)
            )

    def _add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add a last shard. Every engine reads a regular set of shards: `model-0000k-of-0000n`.

        The shards' names hold their number, so all of them change. Each gets its new name besides
        the old one, the index switches from the old names to the new, and the old names go.
        """
        shards = sorted(set(self.files.values()))
        number = len(shards) + 1
        found = SHARD.match(shards[0])
        stem = found.group(1) if found else shards[0].removesuffix(".safetensors")
        *renamed, last = [
            f"{stem}-{k:05d}-of-{number:05d}.safetensors" for k in range(1, number + 1)
        ]
        names = dict(zip(shards, renamed, strict=True))
        content = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(
            self.folder / last, functools.partial(save_file, content, metadata={"format": "pt"})
        )
        for old, new in names.items():
            _second_name(self.folder / old, self.folder / new)
        write_json(self.folder / SAFE_WEIGHTS_INDEX_NAME, self._index_with(tensors, names, last))
        indexed = {*renamed, last}
        for file in self.folder.glob(f"{stem}*.safetensors"):
            is_shard = file.name in shards or SHARD.match(file.name)
            if is_shard and file.name not in indexed:
                file.unlink()

    def _index_with(
        self,
        tensors: Mapping[str, Tensor],
        named: Mapping[str, str],
        last: str,
    ) -> dict[str, object]:
        """Return the index of all shards, whose old names are `named` and whose last is new."""
        places = {name: named[file] for name, file in self.files.items()}
        places |= dict.fromkeys(tensors, last)
        files = [self.folder / file for file in (*named.values(), last)]
        about = {
            "total_size": sum(map(_size, files)),
            "total_parameters": sum(map(_number, files)),
        }
        return {"metadata": about, "weight_map": dict(sorted(places.items()))}


def _size(file: Path) -> int:
    """Return the bytes of the tensors in a safetensors file: what follows its header."""
    with open(file, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - header


def _number(file: Path) -> int:
    """Return the number of values in a safetensors file."""
    with safe_open(file, "pt") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())


def _second_name(old: Path, new: Path) -> None:
    """Give a file another name and keep the old one; a copy where the file system has no links."""
    if old == new:
        return
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        write_atomically(new, functools.partial(shutil.copyfile, old))


def find_file(
    name: str,
    revision: str | None,
    file: str,
) -> Path | None:
    """Return a file of a folder or of a Hub repository, or None."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    found = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        _raise_exceptions_for_connection_errors=True,
    )
    return None if found is None else Path(found)


def _files_of(name: str, revision: str | None) -> dict[str, str] | None:
    """Return the file of each tensor, or None where there are no safetensors files."""
    # A folder's single file comes first, as in transformers: an index next to it belongs to an
    # earlier save. On the Hub an index tells more than the first of many gigabytes.
    order = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if not Path(name).is_dir():
        order.reverse()
    for file in order:
        path = find_file(name, revision, file)
        if path is None:
            continue
        if file == SAFE_WEIGHTS_INDEX_NAME:
            return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        with safe_open(path, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), file)
    return None

"""Convert the authors' published heads file (`heads.pth`, a state dict `K.layers.J.*`) into a heads
folder."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from caft_plugin.caft.heads_folder import write_heads
from caft_plugin.caft.heads_record import HeadsRecord
from caft_plugin.config import CAFTConfig, HeadInput
from caft_plugin.errors import ConfigError, asked_as, first_line
from caft_plugin.model.loading import Source
from caft_plugin.model.trunk import Trunk

PREFIX = "auxiliary_head."  # of the keys, if a file was cut out of a complete model's state dict
KEY = re.compile(r"(0|[1-9]\d*)\.(?:layers\.(0|[1-9]\d*)|lm_head)\.(.+)")
LINEAR_BLOCK = {"linear.weight", "linear.bias"}
ACCEPTED = (
    "import-heads accepts the state dict of the authors' heads, `K.layers.0.*` with K counting from"
    " 0, one decoder layer per head."
)


def import_heads(
    file: str | os.PathLike[str],
    base_model: str,
    out: str | os.PathLike[str],
    head_input: HeadInput = "final",
    head_norm: bool = False,
) -> Path:
    """Write the heads of the authors' file as a heads folder, and return the folder.

    Args:
        file: a torch.save file, read with weights_only, or a `.safetensors` file. Its keys are
            `K.layers.0.<name in the decoder layer>`, all with or without a leading
            `auxiliary_head.`.
        base_model: folder or Hub id of the model that the heads were trained with; only its config
            is read.
        out: the folder to create. It is never incomplete.
        head_input: the heads' input; the defaults of head_input and head_norm are those of the
            authors' fine-tuning.
        head_norm: apply the base model's final norm to the heads' output.

    Raises:
        ConfigError: the file does not contain such heads, or they do not fit the base model; the
            base model's config cannot be read; `out` exists or cannot be written.
    """
    file = Path(file)
    out = Path(out)
    wiring = CAFTConfig(head_input=head_input, head_norm=head_norm)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(
            f"import-heads: {out} exists. Give the name of a new folder, or remove it first."
        )
    heads = split_heads(read_state(file), file)
    trunk = Source.of(base_model, key=asked_as("base_model")).empty_trunk()
    check_heads(heads, trunk, file, base_model)
    record = HeadsRecord.of(trunk, wiring, num_heads=len(heads), base_model=base_model)
    tensors = {
        f"{k}.{name}": tensor for k, head in enumerate(heads) for name, tensor in head.items()
    }
    write_folder(out, tensors, record)
    return out


def read_state(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by their keys, without `auxiliary_head.`. Nothing in the file is
    executed.

    Raises:
        ConfigError: the file cannot be read or is not a dict of plain floating-point tensors.
    """
    if not file.is_file():
        raise ConfigError(f"import-heads: got {str(file)!r}, which is not a file. {ACCEPTED}")
    state = _load(file)
    if not isinstance(state, dict) or not state:
        held = "an empty dict" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ConfigError(f"import-heads: {file} holds {held}. {ACCEPTED}")
    for key, value in state.items():
        problem = describe_unless_plain(value)
        if not isinstance(key, str):
            problem = "a key that is not a string"
        if problem:
            raise ConfigError(f"import-heads: {file} holds {problem} under {key!r}. {ACCEPTED}")
    prefix = PREFIX if all(key.startswith(PREFIX) for key in state) else ""
    return {key.removeprefix(prefix): value.detach() for key, value in state.items()}


def _load(file: Path) -> Any:
    """Load what a file holds, which can be anything that weights_only allows.

    Raises:
        ConfigError: it holds an object, or it cannot be read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Zip files, torch.save's format since PyTorch 1.6, are mapped and copied later.
        mmap = zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    # damaged files raise a dozen types: EOFError, KeyError, OSError, RuntimeError ...
    except Exception as error:
        refused = None
        if isinstance(error, pickle.UnpicklingError):
            refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ConfigError(
                f"import-heads: {file} holds an object ({refused[1]}), which is refused: only"
                f" tensors are loaded, nothing in the file was executed. {ACCEPTED}"
            ) from None
        kind = "safetensors" if file.suffix == ".safetensors" else "a torch.save file"
        raise ConfigError(
            f"import-heads: {file} cannot be read as {kind} ({type(error).__name__}). It is"
            " incomplete, damaged or of another kind: download or make it again."
        ) from error


def describe_unless_plain(value: Any) -> str | None:
    """Return None for a dense floating-point tensor with its data in memory, else a description of
    the value."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}, not a tensor,"
    if not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
        return (
            f"a tensor that is not a plain weight ({value.dtype}, {value.layout},"
            f" {value.device.type})"
        )
    return None


def split_heads(state: Mapping[str, Tensor], file: Path) -> list[dict[str, Tensor]]:
    """Return the decoder layer's tensors of each head, by their names in the layer.

    Raises:
        ConfigError: keys that are not the authors', several layers per head, `linear` blocks,
            separate unembeddings, or gaps in the heads' numbers.
    """
    heads: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ConfigError(f"import-heads: {file} holds the unknown key {key!r}. {ACCEPTED}")
        head, layer, name = match.groups()
        if layer is None:
            raise ConfigError(
                f"import-heads: {file} holds {key}, a separate unembedding for head {head}, which"
                " is not supported. Use heads that share the base model's lm_head (the authors'"
                " default, without -sepunembed)."
            )
        if layer != "0":
            raise ConfigError(
                f"import-heads: {file} holds {key}, several layers for head {head}, which is not"
                " supported. Use heads with one layer each (the authors' default,"
                " --caft-num-layers 1)."
            )
        if name in LINEAR_BLOCK:
            raise ConfigError(
                f"import-heads: {file} holds {key}, a `linear` residual block in place of a decoder"
                " layer, which is not supported. Use heads of the authors' default architecture"
                " (--head-arch transformer)."
            )
        heads.setdefault(int(head), {})[name] = tensor
    if sorted(heads) != list(range(len(heads))):
        raise ConfigError(
            f"import-heads: {file} holds heads numbered {', '.join(map(str, sorted(heads)))}, but"
            " they must be numbered from 0 without gaps. The file is incomplete: download or make"
            " it again."
        )
    return [heads[k] for k in range(len(heads))]


def check_heads(
    heads: list[dict[str, Tensor]],
    trunk: Trunk,
    file: Path,
    base_model: str,
) -> None:
    """Check every head against the base model's decoder layer.

    Args:
        heads: the tensors of each head, by their names in the layer.
        trunk: of the base model, without weights.
        file: the heads' file, for messages.
        base_model: the base model's name, for messages.

    Raises:
        ConfigError: another hidden size; missing, unknown or misshapen tensors. The first one is
            named.
    """
    for k, head in enumerate(heads):
        _refuse_other_layer(head, f"{k}.layers.0.", trunk, file, base_model)


def _refuse_other_layer(
    head: Mapping[str, Tensor],
    prefix: str,
    trunk: Trunk,
    file: Path,
    base_model: str,
) -> None:
    """Raise ConfigError if a head is no layer of the base model; its keys begin with `prefix`."""
    layer = f"a {trunk.layer_class} of {base_model}"
    wanted = {name: tuple(tensor.shape) for name, tensor in trunk.last_layer.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    hidden_size = recognised_hidden_size(shapes, wanted, trunk.hidden_size)
    missing = [name for name in wanted if name not in shapes]
    unknown = [name for name in shapes if name not in wanted]
    misshapen = [name for name in wanted if shapes.get(name) != wanted[name]]
    # Heads of another size have other shapes everywhere, so the size is named first.
    if hidden_size != trunk.hidden_size:
        problem = (
            f"was made for hidden size {hidden_size}, but {base_model} has {trunk.hidden_size}"
        )
    elif missing:
        problem = f"lacks {prefix}{missing[0]}, which {layer} has"
    elif unknown:
        problem = f"holds {prefix}{unknown[0]}, which {layer} does not have"
    elif misshapen:
        name = misshapen[0]
        problem = (
            f"holds {prefix}{name} with shape {shapes[name]}, but {layer} has shape {wanted[name]}"
        )
    else:
        return
    raise ConfigError(
        f"import-heads: {file} {problem}. Give the model that the heads were trained with."
    )


def recognised_hidden_size(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    hidden_size: int,
) -> int:
    """Return the hidden size of a head's model, as one of the layer's norms
    (`input_layernorm.weight`) shows it.

    Args:
        shapes: the shapes of the head's tensors.
        wanted: the shapes of the base model's layer.
        hidden_size: the base model's, returned if no norm shows one.
    """
    for name, shape in wanted.items():
        if name.count(".") == 1 and shape == (hidden_size,) and len(shapes.get(name, ())) == 1:
            return shapes[name][0]
    return hidden_size


def write_folder(
    out: Path,
    tensors: dict[str, Tensor],
    record: HeadsRecord,
) -> None:
    """Write a heads folder under a temporary name, then rename it.

    Raises:
        ConfigError: the disk is full, permission is missing, or `out` was created in the meantime.
    """
    # In the same folder, since a rename to another file system would be a copy.
    temporary = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        write_heads(temporary, record, unshared(tensors), {})
        os.rename(temporary, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"import-heads: the folder {out} cannot be written ({first_line(error)})."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors, each contiguous and in its own memory, as safetensors requires."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        # A view of a larger storage would be saved with all of it.
        owns = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        result[name] = (
            tensor.contiguous() if owns else tensor.clone(memory_format=torch.contiguous_format)
        )
    return result

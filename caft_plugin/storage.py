"""Write files atomically; gather and shard tensors."""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from caft_plugin.config import ConfigError, asked_as


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, then rename it to `path`: never a partial file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_png(file: Path, size: tuple[float, float], columns: int, fill: Callable[..., None]) -> None:
    """Write a PNG with a row of panels.

    Args:
        file: the PNG's path; its folder is created.
        size: width and height in inches.
        columns: number of panels.
        fill: draws into the axes that it is called with.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"{asked_as('file', '--png')}: needs matplotlib. Install it: pip install 'caft_plugin[report]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure.subplots(1, columns))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: figure.savefig(path, format="png", dpi=120))


def read_text(file: Path, asked_by: str, takes: str) -> str:
    """Read a text file, without a byte order mark.

    Args:
        file: its path.
        asked_by: the option or key that named the file, for the message.
        takes: the kind of file that it accepts, for the message.

    Raises:
        ConfigError: there is no such file, or it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8: {error.reason}"
        raise ConfigError(f"{asked_by}: {file} cannot be read ({why}). It accepts {takes}.") from None


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines of a text that are not blank, numbered from 1.

    Lines end only at newlines: `str.splitlines` would also split JSON lines at U+2028, U+0085 and form feeds, which
    JSON allows inside strings and which `datasets` reads as part of them.
    """
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def gather(tensor: Tensor) -> Tensor:
    """Return the complete tensor, which may be sharded, detached and on the CPU. Every process must call it."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous()


def shard_like(tensor: Tensor, full: Tensor) -> Tensor:
    """Return `full`, which every process has, sharded like `tensor`."""
    if not isinstance(tensor, DTensor):
        return full
    return distribute_tensor(full.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def give_memory(module: nn.Module) -> None:
    """Give trainable parameters on the meta device memory on the CPU.

    With `cpu_ram_efficient_loading`, only rank 0 has real weights; on the other ranks parameters are on `meta` until
    FSDP2 shards the model. Before that, accelerate distinguishes the optimizer's parameters by their address, which is
    0 for all of them on meta: a process would train one shard instead of all.
    """
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta and parameter.requires_grad:
                setattr(owner, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))


def unsharded_twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return `module` with unsharded parameters and without hooks, for one forward and backward pass.

    Parameters that FSDP2 has gathered are used directly, and FSDP2 reduces their gradient. Others are gathered here,
    once, in `dtype`, and their gradient is averaged over the processes, as FSDP2 does. Every process must call it.
    """
    twin: nn.Module = object.__new__(type(module))  # FSDP2's classes create another module in __new__
    twin.__dict__.update(module.__dict__)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[name] = OrderedDict()
    twin.__dict__.pop("_compiled_call_impl", None)  # it calls `module` itself, hooks included
    parameters = {n: p if p is None else _unsharded(p, dtype) for n, p in module._parameters.items()}
    twin.__dict__["_parameters"] = parameters
    twin._modules = {n: m if m is None else unsharded_twin(m, dtype) for n, m in module._modules.items()}
    return twin


def _unsharded(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient / mesh.size())
        tensor = tensor.view_as(tensor)  # the hook runs once, on the gradient for the shards
    return tensor.to(dtype) if tensor.is_floating_point() else tensor

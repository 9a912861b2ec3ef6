"""What lies on disk and in shards: files are written completely or not at all, tensors are gathered and sharded."""

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

from caft_plugin.config import ConfigError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write to a temporary name beside `path`, then renames: never a half-written file."""
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
    """Writes a picture of panels side by side, `size` inches large, into which `fill` draws: it is given the axes.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--png needs matplotlib. Install it: pip install 'caft_plugin[report]'") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure.subplots(1, columns))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: figure.savefig(path, format="png", dpi=120))


def read_text(file: Path, asked_by: str, takes: str) -> str:
    """The content of a text file that the user named by `asked_by` (an option or a key), which `takes` such a file.

    A byte order mark at its start is left out.

    Raises:
        ConfigError: there is no such file, or it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8: {error.reason}"
        raise ConfigError(f"{asked_by}: {file} cannot be read ({why}). It takes {takes}.") from None


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines of a text that are not blank, numbered from 1.

    A line ends at a newline and nowhere else: `str.splitlines` would also cut JSON lines at U+2028, U+0085 and form
    feeds, which JSON allows inside of texts and which `datasets` reads as part of them.
    """
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def gather(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, all of it, detached, on the CPU. Every process has to call it."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous()


def shard_like(tensor: Tensor, full: Tensor) -> Tensor:
    """`full`, which every process has, as it is to be copied into a tensor that may be sharded."""
    if not isinstance(tensor, DTensor):
        return full
    return distribute_tensor(full.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def give_memory(module: nn.Module) -> None:
    """Trainable parameters that lie nowhere (on the meta device) get memory of their own, on the CPU.

    They lie nowhere in every process but the first where that one alone has read the weights; when FSDP2 shards the
    model, all get the first one's. Before that, accelerate tells the optimizer's parameters apart by their address,
    which is 0 for each on meta: a process would train one shard in the place of all.
    """
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta and parameter.requires_grad:
                setattr(owner, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))


def unsharded_twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` with unsharded parameters and without hooks, to be used during one forward and its backward pass.

    Parameters that FSDP2 has gathered are taken as they are, and FSDP2 sends their gradient to the shards. Others are
    gathered here, once, in `dtype`, and send theirs themselves, averaged over the processes as FSDP2 does it.
    Every process has to call it.
    """
    twin: nn.Module = object.__new__(type(module))  # FSDP2's classes build another module in __new__
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
        tensor = tensor.view_as(tensor)  # the hook is for what goes on to the shards, once
    return tensor.to(dtype) if tensor.is_floating_point() else tensor

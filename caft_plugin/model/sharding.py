"""Gather and shard tensors."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def gather(tensor: Tensor) -> Tensor:
    """Return the complete tensor, which may be sharded, detached and on the CPU. Every process must
    call it."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous()


def shard_like(tensor: Tensor, full: Tensor) -> Tensor:
    """Return `full`, which every process has, sharded like `tensor`."""
    if not isinstance(tensor, DTensor):
        return full
    return distribute_tensor(
        full.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
    )


def give_memory(module: nn.Module) -> None:
    """Give trainable parameters on the meta device memory on the CPU.

    With `cpu_ram_efficient_loading`, only rank 0 has real weights; on the other ranks parameters
    are on `meta` until FSDP2 shards the model. Before that, accelerate distinguishes the
    optimizer's parameters by their address, which is 0 for all of them on meta: a process would
    train one shard instead of all.
    """
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta and parameter.requires_grad:
                setattr(owner, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))


def unsharded_twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return `module` with unsharded parameters and without hooks, for one forward and backward
    pass.

    Parameters that FSDP2 has gathered are used directly, and FSDP2 reduces their gradient. Others
    are gathered here, once, in `dtype`, and their gradient is averaged over the processes, as FSDP2
    does. Every process must call it.
    """
    # FSDP2's classes create another module in __new__
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[name] = OrderedDict()
    twin.__dict__.pop("_compiled_call_impl", None)  # it calls `module` itself, hooks included
    # both hold None for what a class registered without a value
    parameters = dict(module._parameters)
    for name, parameter in parameters.items():
        if parameter is not None:
            parameters[name] = _unsharded(parameter, dtype)  # type: ignore[assignment]
    modules = dict(module._modules)
    for name, child in modules.items():
        if child is not None:
            modules[name] = unsharded_twin(child, dtype)
    twin.__dict__["_parameters"] = parameters
    twin.__dict__["_modules"] = modules
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

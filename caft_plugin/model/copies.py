"""Make a plain copy of a decoder layer: adapters merged into the weights, quantised weights
dequantised."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from caft_plugin.errors import ConfigError
from caft_plugin.model.trunk import in_use, refuse_unmergeable

# Attributes with which accelerate or a kernel replaces the class's forward on an instance.
OWN_FORWARD = ("forward", "_old_forward", "_hf_hook")


def plain_copy(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of a decoder layer that computes the same, made of plain modules and tensors.

    Active adapters are merged into its weights. Hooks and replaced forwards are dropped,
    parametrisations become their value, and quantised weights are dequantised to `dtype` (the one
    the model was loaded with). All floating-point tensors get the dtype of the largest one.

    Raises:
        ConfigError: an adapter that cannot be merged, or a quantisation that cannot be reversed.
    """
    layer = _plain(_without_hooks(layer).eval(), dtype)
    _refuse_not_plain(layer)
    floats = [p for p in layer.parameters() if p.is_floating_point()]
    layer = layer.to(max(floats, key=Tensor.numel).dtype)
    layer.requires_grad_(False)
    return layer


def _without_hooks(layer: nn.Module) -> nn.Module:
    """Return a deep copy without hooks and without forwards set on an instance (accelerate's, a
    kernel's).

    Objects that these refer to (a user's recorder, a complete model) are not copied.
    """
    memo: dict[int, Any] = {}
    for module in layer.modules():
        for name, value in vars(module).items():
            if name in OWN_FORWARD:
                memo[id(value)] = OWN_FORWARD
            elif "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
    try:
        layer = copy.deepcopy(layer, memo)
    except Exception as error:  # an object that a user attached; or torch's old weight_norm
        raise ConfigError(
            f"caft: the model's last layer ({type(layer).__name__}) cannot be copied into heads"
            f" ({type(error).__name__}: {error}). Remove attributes that are neither its modules"
            " nor its parameters (torch.nn.utils.weight_norm: use"
            " torch.nn.utils.parametrizations), or train without CAFT."
        ) from error
    for module in layer.modules():
        for name in OWN_FORWARD:
            module.__dict__.pop(name, None)
    return layer


def _plain(module: Any, dtype: torch.dtype | None) -> nn.Module:
    """Make `module` and its submodules plain; return it, or its replacement."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _plain(in_use(module), dtype)
    if isinstance(module, BaseTunerLayer):
        return _merged(module, dtype)
    if type(module).__module__.startswith("peft.") and not torch.any(
        getattr(module, "adaption_gate", torch.ones(1))
    ):
        return _plain(module.model, dtype)  # an adaption prompt's start
    if parametrize.is_parametrized(module):
        _take_value(module, dtype)
    if is_quantised(module):
        return dequantised_linear(module, dtype)
    for name, child in list(module.named_children()):
        setattr(module, name, _plain(child, dtype))
    return module


def _take_value(module: Any, dtype: torch.dtype | None) -> None:
    """Replace parametrised parameters with plain ones.

    torch's `remove_parametrizations` changes the class, which a copy shares with its original.
    """
    values = {}
    for name, parametrisation in module.parametrizations.items():
        stored = [
            *parametrisation.parameters(recurse=False),
            *parametrisation.buffers(recurse=False),
        ]
        value = getattr(module, name).detach().clone()
        was_quantised = not all(map(torch.is_floating_point, stored))
        values[name] = value.to(dtype or value.dtype) if was_quantised else value
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _merged(tuner: Any, dtype: torch.dtype | None) -> nn.Module:
    """Return the base layer of a PEFT layer (which may wrap another), plain, with active adapters
    merged."""
    chain = [tuner]
    while isinstance(chain[-1].base_layer, BaseTunerLayer):
        chain.append(chain[-1].base_layer)
    for part in chain:
        if part.disable_adapters and part.merged:
            part.unmerge()
    inner = chain[-1]
    theirs = inner.base_layer
    if isinstance(theirs, nn.MultiheadAttention):  # PEFT has put adapters inside
        return _plain(_merge_into_attention(inner), dtype)
    # a copy, because dequantising damages some
    base = _plain(copy.deepcopy(theirs) if is_quantised(theirs) else theirs, dtype)
    if any(parameter.is_meta for parameter in base.parameters()):
        return base
    if is_plain_linear(base):
        return _with_effect(base, tuner)
    inner.base_layer = base
    for part in reversed(chain):
        _merge(part)
    return tuner.get_base_layer()


def _merge(tuner: Any) -> None:
    if tuner.disable_adapters or tuner.merged:
        return
    try:
        tuner.merge()
    except NotImplementedError as error:
        refuse_unmergeable(tuner, str(error))


def _merge_into_attention(tuner: Any) -> nn.Module:
    merges = not tuner.disable_adapters and not tuner.merged
    try:
        return tuner.unload_and_optionally_merge_module(merges, False, None)
    except NotImplementedError as error:
        refuse_unmergeable(tuner, str(error))


def is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in (
        nn.Linear.forward,
        Conv1D.forward,
    )


@torch.no_grad()
def _with_effect(base: Any, tuner: Any) -> nn.Module:
    """Merge `tuner` into `base`, the linear layer that it wraps or a plain version of it, and
    return `base`.

    Weight and bias are read from the tuner's output for the identity matrix, so it does not need to
    support merging. The product is in float32 if the tuner can compute in it, else in its own dtype
    (quantised, or with tensors that stay in half precision). A tuner without effect leaves `base`
    bitwise unchanged.
    """
    kind = base.weight.dtype
    device = base.weight.device
    exact = torch.promote_types(kind, torch.float32)
    out_in = isinstance(base, nn.Linear)
    size = base.weight.shape[1 if out_in else 0]
    # tolerance for rounding, relative to the output
    layer = tuner
    takes = kind
    rounding = 0.02
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, size, generator=generator).to(device, exact)

    def change(rows: Tensor) -> Tensor:
        rows = rows[None].to(takes)
        with_adapter = layer(rows).to(exact)
        without = layer.get_base_layer()(rows).to(exact)
        return (with_adapter - without)[0]

    with full_precision(), torch.random.fork_rng(devices=[]):
        if tuner.get_base_layer() is base:
            # some methods hold tensors that stay in half precision
            with contextlib.suppress(Exception):
                wide = copy.deepcopy(tuner).to(exact)
                wide(probe[None])
                layer = wide
                takes = exact
                rounding = 1e-5
        try:
            wanted = change(probe)
        except Exception as error:  # a method that needs more than an input, each in its own way
            refuse_unmergeable(tuner, f"{type(error).__name__}: {error}")
        if wanted.any():
            bias = change(probe.new_zeros(1, size))[0]
            identity = torch.eye(size, device=device, dtype=exact)
            weight = torch.cat([change(rows) - bias for rows in identity.split(1024)])
            off = (probe @ weight + bias - wanted).norm()
            tolerance = 0.01 * wanted.norm() + rounding * base(probe.to(kind)).norm()
            if not off <= tolerance:  # also if it is not a number
                refuse_unmergeable(tuner, "its effect is not linear in its input")
            weight = weight.T if out_in else weight
            base.weight.data = (base.weight + weight).to(kind)
            if bias.any():
                bias = bias if base.bias is None else base.bias + bias
                base.bias = nn.Parameter(bias.to(kind))
    return base


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products on a GPU exactly (no TF32)."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _refuse_not_plain(layer: nn.Module) -> None:
    """Raise ConfigError if a copy has a module or tensor that a plain layer does not have."""
    for name, module in layer.named_modules():
        if type(module).__module__.startswith("peft."):
            refuse_unmergeable(module, f"{name} is not a layer that can be merged")
        for key, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            is_plain = type(tensor) in (nn.Parameter, Tensor)
            is_packed = isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()
            is_small = tensor.itemsize == 1 and tensor.dtype != torch.bool
            if not is_plain or is_packed or is_small:
                raise ConfigError(
                    f"caft: {key} of the last layer's {name or type(layer).__name__}"
                    f" ({type(module).__name__}) is a {type(tensor).__name__} of {tensor.dtype},"
                    " which cannot be dequantised, so the layer cannot be copied into heads. Load"
                    " the base with bitsandbytes (load_in_4bit or load_in_8bit) or unquantised."
                )


def is_quantised(module: nn.Module) -> bool:
    if hasattr(module, "qweight") or hasattr(module, "W_q"):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and type(weight) not in (nn.Parameter, Tensor)


def dequantised_linear(module: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    try:
        weight = (
            times_identity(module)
            if is_packed_for_cpu(module)
            else dequantize_module_weight(module)
        )
        if not weight.is_floating_point():
            raise TypeError(f"weights of type {type(weight).__name__}")
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"caft: the base model's {type(module).__name__} cannot be dequantised ({error}), so"
            " its last layer cannot be copied into heads. Load the base with bitsandbytes"
            " (load_in_4bit or load_in_8bit) or unquantised."
        ) from None
    bias = getattr(module, "bias", None)
    out_features, in_features = weight.shape
    # on meta: both of its tensors are replaced
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    plain = weight.detach().clone().to(dtype or weight.dtype)
    linear.weight = nn.Parameter(plain, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def is_packed_for_cpu(module: nn.Module) -> bool:
    """Return True if bitsandbytes has reordered a module's 4-bit weights for the CPU.

    It does so at the first call in evaluation mode; its own dequantisation does not support that
    order (0.50).
    """
    return bool(
        getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
    )


@torch.no_grad()
def times_identity(module: Any) -> Tensor:
    """Return the weight (out, in) of a linear layer, read from its output for the identity matrix.

    The identity is in bfloat16, the dtype that the reordered weights are for.
    """
    identity = torch.eye(module.in_features, dtype=torch.bfloat16)
    weight = module(identity).T
    return weight if module.bias is None else weight - module.bias[:, None]

"""Identify the last layer and final norm that heads were trained with: a sample of these weights,
saved with the heads.

A sample holds effective weights: adapters merged, dequantised. One is taken at the start of a run,
one when the heads are saved, and one of the model that the heads are used with later. That model is
the run's own if it is as far along the way from start to end as the end is; it is the base if it is
at the start. This detects even small updates, under rounding (a model merged in bfloat16) and
quantisation (QLoRA's adapter over a 16-bit base).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from caft_plugin.errors import first_line
from caft_plugin.model.copies import is_quantised, plain_copy
from caft_plugin.model.trunk import Trunk, in_use

logger = logging.getLogger(__name__)

# maximum values of a sample, and of one tensor
MOST = 16_384
EACH = 2_048
FEW = 32  # changed values below which the position between two models is not meaningful
# Relative spacing of neighbouring numbers; rounding adds at most half of it. From coarse to fine.
GRIDS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# relative error (root mean square) of weights that were rounded twice, in grids: about 0.73
TWICE_ROUNDED = 0.8
QUANTISATION = 0.25  # relative error (root mean square) of weights in 4 bits is about 0.1

Verdict = Literal["own", "base", "other"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Values (n,) of each tensor of the last layer and the final norm, float32, by plain name.

    `quantised` names the tensors that were quantised; `under` holds their values without adapters,
    which training does not change. `held` is the dtype in which the model holds each tensor that is
    not quantised: values that include an adapter do not show it.
    """

    values: dict[str, Tensor]
    quantised: frozenset[str] = frozenset()
    under: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    held: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)

    def of(self, names: frozenset[str]) -> Sample:
        """Return the sample of these tensors only."""
        values = {name: self.values[name] for name in names}
        return Sample(values, self.quantised & names)

    def shapes(self) -> dict[str, int]:
        return {name: len(values) for name, values in self.values.items()}


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A tensor to sample: a parameter, the module that uses it, and the adapter's layer around that
    module."""

    name: str
    tensor: Tensor
    module: nn.Module
    tuner: BaseTunerLayer | None = None

    @property
    def quantised(self) -> bool:
        return self.name.endswith(".weight") and _is_quantised(self.module)

    @property
    def sharded(self) -> bool:
        return isinstance(self.tensor, DTensor)


def take_sample(trunk: Trunk, first: Sample | None = None) -> Sample | None:
    """Sample a model's last layer and final norm. If weights are sharded, every process must call
    it.

    Args:
        first: the sample of the same model from the start of training. It is needed for quantised
            weights that have been sharded since.

    Returns:
        None if the weights are not available (offloaded, on the meta device) or cannot be read as
        plain numbers.
    """
    try:
        weights = [*_weights(trunk.last_layer, "layer"), *_weights(trunk.norm, "norm")]
        if any(weight.tensor.is_meta for weight in weights):
            return None
        with torch.no_grad():
            return _sample(weights, first)
    except Exception as error:  # an untested adapter or quantisation: heads are saved nevertheless
        say = logger.warning if first is None else logger.debug  # once a run
        say("caft: the last layer has no fingerprint (%s)", first_line(error))
        return None


def values_of_each(tensors: int) -> int:
    """Return the maximum number of values sampled per tensor, given the number of tensors."""
    share = MOST // max(tensors, 1)
    return max(1, min(EACH, share))


def sample_of(tensors: Mapping[str, Tensor], whole: Sample) -> Sample:
    """Sample plain tensors of a model; `whole` is a sample of all its tensors, with the same
    names."""
    each = values_of_each(len(whole.values))
    values = {name: _pick(tensor, each) for name, tensor in tensors.items()}
    return Sample(values)


def is_sharded(trunk: Trunk) -> bool:
    parameters = [*trunk.last_layer.parameters(), *trunk.norm.parameters()]
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def _weights(module: nn.Module, prefix: str) -> Iterator[_Weight]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _weights(in_use(module), prefix)
    elif isinstance(module, BaseTunerLayer):
        base = module.get_base_layer()
        if not isinstance(getattr(base, "weight", None), Tensor):
            raise ValueError(f"{prefix} has an adapter on {type(base).__name__}")
        for weight in _weights(base, prefix):
            changed = weight.name == f"{prefix}.weight"
            yield dataclasses.replace(weight, tuner=module) if changed else weight
    elif parametrize.is_parametrized(module):
        for name in cast(nn.ModuleDict, module.parametrizations):
            yield _Weight(f"{prefix}.{name}", getattr(module, name), module)
        yield from _inside(module, prefix)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            yield _Weight(f"{prefix}.{name}", parameter, module)
        yield from _inside(module, prefix)


def _inside(module: nn.Module, prefix: str) -> Iterator[_Weight]:
    for name, child in module.named_children():
        if name != "parametrizations":
            yield from _weights(child, f"{prefix}.{name}")


def _is_quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, DTensor):
        return is_quantised(module)
    # FSDP2 shards packed weights as plain rows, also in a floating-point type; the same in every
    # process
    if not weight.is_floating_point():
        return True
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return None not in shape and tuple(weight.shape) != shape


def _sample(weights: list[_Weight], first: Sample | None) -> Sample | None:
    each = values_of_each(len(weights))
    values: dict[str, Tensor] = {}
    under: dict[str, Tensor] = {}
    held = {weight.name: weight.tensor.dtype for weight in weights if weight.tensor.dtype in GRIDS}
    # all of them in every process, even if one is missing here: gathering waits for all
    for weight in weights:
        loras = [] if weight.tuner is None else _factors(weight.tuner)
        base = _base_values(weight, loras, each, first)
        if base is None:
            continue
        if weight.quantised and loras is not None:
            under[weight.name] = base
        effects = [_effect(weight.module, lora, each) for lora in loras or []]
        values[weight.name] = torch.stack([base, *effects]).sum(0)
    if len(values) < len(weights):
        return None
    return Sample(values, frozenset(under), under, held)


def _base_values(
    weight: _Weight,
    loras: list[_Factors] | None,
    each: int,
    first: Sample | None,
) -> Tensor | None:
    """Return a weight's values without its LoRAs, or None if they cannot be read.

    With another kind of adapter (`loras` is None), they are the values with it.
    """
    if loras is None:
        tuner = cast(nn.Module, weight.tuner)
        return None if weight.sharded else _pick(plain_weight(tuner), each)
    if not weight.quantised:
        return _pick(weight.tensor, each)
    # Packed weights cannot be dequantised once they are sharded, but training does not change them.
    known = None if first is None else first.under.get(weight.name)
    if known is None and not weight.sharded:
        return _pick(plain_weight(weight.module), each)
    return known


def plain_weight(linear: nn.Module) -> Tensor:
    """Return the effective weight of a linear layer: adapters merged, dequantised."""
    return plain_copy(linear, torch.float32).get_parameter("weight")


@dataclasses.dataclass(frozen=True)
class _Factors:
    """One active LoRA: scaling * b a, with a (rank, in) and b (out, rank)."""

    scaling: float
    a: Tensor
    b: Tensor


def _factors(tuner: BaseTunerLayer) -> list[_Factors] | None:
    """Return the active LoRAs, or None if there is another kind of adapter or a LoRA variant."""
    if not isinstance(tuner, LoraLayer) or isinstance(tuner.base_layer, BaseTunerLayer):
        return None
    if tuner.disable_adapters or tuner.merged:
        return []
    active = [name for name in tuner.active_adapters if name in tuner.lora_A]
    if not all(_is_plain_lora(tuner, name) for name in active):
        return None
    loras = []
    for name in active:
        a = _all_of(tuner.lora_A[name].get_parameter("weight"))
        b = _all_of(tuner.lora_B[name].get_parameter("weight"))
        loras.append(_Factors(tuner.scaling[name], a, b))
    return loras


def _is_plain_lora(tuner: LoraLayer, name: str) -> bool:
    """Return False for convolutions, DoRA and its kin."""
    is_linear = type(tuner.lora_A[name]) is nn.Linear and tuner.lora_B[name].bias is None
    return is_linear and name not in tuner.lora_variant


def _effect(
    linear: nn.Module,
    lora: _Factors,
    each: int,
) -> Tensor:
    """Return the contribution of a LoRA to the sampled values of a linear layer's weight."""
    outputs = lora.b.shape[0]
    inputs = lora.a.shape[1]
    at = positions(outputs * inputs, each)
    if isinstance(linear, Conv1D):  # weights (in, out)
        into = at // outputs
        out = at % outputs
    else:
        out = at // inputs
        into = at % inputs
    # the product of the factors at the sampled positions only
    product = (lora.b[out] * lora.a.T[into]).sum(-1)
    return lora.scaling * product


def positions(size: int, each: int) -> Tensor:
    """Return the indices of the sampled values, always the same ones: all of `size`, or `each` of
    them, spread."""
    if size <= each:
        return torch.arange(size)
    return torch.arange(each) * 2_654_435_761 % size


def _all_of(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().float().cpu()


def _pick(tensor: Tensor, each: int) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    flat = full.detach().flatten()
    at = positions(flat.numel(), each).to(flat.device)
    return flat[at].float().cpu()


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Samples of the model at the start of a run (`before`) and when its heads were saved
    (`after`)."""

    before: Sample
    after: Sample

    def of(self, names: Iterable[str]) -> Fingerprint:
        """Return the fingerprint of these tensors only."""
        kept = frozenset(names)
        return Fingerprint(self.before.of(kept), self.after.of(kept))

    def verdict(self, now: Sample) -> Verdict:
        """Return which model `now` was sampled from: the one the heads were trained with, its base,
        or another.

        If the first two cannot be distinguished, the verdict is `own`.
        """
        if not self.before.shapes() == self.after.shapes() == now.shapes():
            return "other"
        found = self._compared(now)
        way = found.way
        if len(way) < FEW:
            return "own" if found.as_after or found.as_before else "other"
        # the part of the way from start to end that the model has gone, and its standard error
        share = float(found.gone @ way / (way @ way))
        rest = (found.gone - share * way).norm()
        error = float(rest / (way.norm() * math.sqrt(len(way) - 1)))
        # share is 0 at the start and 1 at the end; rounding lengthens short steps
        if found.as_after and 0.7 - 3 * error < share < 1.6 + 3 * error:
            return "own"
        return "base" if found.as_before and abs(share) < 0.3 + 3 * error else "other"

    def _compared(self, now: Sample) -> _Compared:
        """Return the comparison of all tensors together."""
        quantised = self.before.quantised | self.after.quantised | now.quantised
        tensors = [
            _Compared.of(
                self.before.values[name],
                self.after.values[name],
                now.values[name],
                name in quantised,
                now.held.get(name),
            )
            for name in sorted(self.before.values)
        ]
        return _Compared(
            all(tensor.as_before for tensor in tensors),
            all(tensor.as_after for tensor in tensors),
            torch.cat([tensor.way for tensor in tensors]),
            torch.cat([tensor.gone for tensor in tensors]),
        )


@dataclasses.dataclass(frozen=True)
class _Compared:
    """The comparison of tensors with the run's start and end, up to rounding and quantisation.

    For the values that training changed by more than rounding can undo, `way` is that change and
    `gone` the model's difference from the start, both in units of the weights' root mean square.
    """

    as_before: bool
    as_after: bool
    way: Tensor
    gone: Tensor

    @classmethod
    def of(
        cls,
        before: Tensor,
        after: Tensor,
        now: Tensor,
        quantised: bool,
        held: torch.dtype | None = None,
    ) -> _Compared:
        size = max(_rms(before), _rms(after)) or 1.0
        step = GRIDS[grid_of(now)]
        rounded = False
        if held is not None and step < GRIDS[held]:
            # A base that was loaded in a coarser type than it has, with an adapter over it, is
            # rounded and does not show it. One that is on that type's grid by itself was not
            # rounded; of heads over a frozen model nobody knows.
            is_finer = GRIDS[grid_of(before)] < GRIDS[held]
            rounded = is_finer or torch.equal(before, after)
            step = GRIDS[held] if rounded else step

        def alike(then: Tensor) -> bool:
            grid = max(grid_of(then), grid_of(now), key=GRIDS.__getitem__)
            difference = then.to(grid).float() - now.to(grid).float()
            off = _rms(difference) / size
            if quantised:
                return off <= QUANTISATION
            # a merge rounds the base and the result in its own way; values that were on the grid
            # come back bitwise
            is_on_grid = grid_of(then) == grid and not rounded
            rounding = 0.0 if is_on_grid else TWICE_ROUNDED * max(step, GRIDS[grid])
            trained = 0.05 * _rms(after - before) / size
            return off <= rounding + trained + 1e-5

        change = after - before
        moved = change.abs() > step * now.abs()
        way = (change / size)[moved]
        gone = ((now - before) / size)[moved]
        return cls(alike(before), alike(after), way, gone)


def grid_of(values: Tensor) -> torch.dtype:
    """Return the coarsest type that represents these float32 values exactly."""
    exact = (dtype for dtype in GRIDS if torch.equal(values.to(dtype).float(), values))
    return next(exact)


def _rms(values: Tensor) -> float:
    if not len(values):
        return 0.0
    return float(values.square().mean().sqrt())

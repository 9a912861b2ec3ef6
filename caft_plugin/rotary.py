"""How many tokens a forward pass may have before its rotary embeddings differ from those of passes one token wide.

Two of transformers' rope types follow the longest position of a pass: `longrope` changes its frequencies where the
model's original length ends, `dynamic` beyond it with each new length. A draft token moves that position.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import dynamic_rope_update

_DECORATED = dynamic_rope_update(lambda: None).__code__


@dataclasses.dataclass(frozen=True)
class Border:
    """Passes that reach up to `at` tokens have one set of frequencies; those that reach further have another one
    (`beyond`), or one for each length."""

    at: int
    beyond: bool

    def room(self, reach: int) -> float:
        """How many draft tokens may follow in a pass that reaches `reach` tokens without them."""
        if reach > self.at:
            return float("inf") if self.beyond else 0
        return self.at - reach


def borders(model: PreTrainedModel) -> list[Border]:
    """Return the borders of a model's rotary embeddings; where no module is known to follow the longest position, those
    that its config names."""
    modules = [module for module in model.modules() if _follows_the_pass(type(module))]  # type: ignore[arg-type]
    found = [border for module in modules for border in _of_module(module)]
    if not modules:
        config = model.config.get_text_config()
        found = [dataclasses.replace(border, beyond=False) for border in _of_parameters(config, _longest(config))]
    return list(dict.fromkeys(found))


@functools.cache
def _follows_the_pass(module_class: type[nn.Module]) -> bool:
    return _is_decorated(inspect.unwrap(module_class.forward, stop=_is_decorated))


def _is_decorated(function: object) -> bool:
    return getattr(function, "__code__", None) is _DECORATED


def _of_module(module: nn.Module) -> Iterator[Border]:
    config = cast(PretrainedConfig, module.config)
    return _of_parameters(config, getattr(module, "original_max_seq_len", None) or _longest(config))


def _of_parameters(config: PretrainedConfig, length: int) -> Iterator[Border]:
    for parameters in _each(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
        kind = str(parameters.get("rope_type", parameters.get("type", "")))
        if "dynamic" in kind:
            yield Border(length, beyond=False)
        elif kind == "longrope" or "long_mscale" in parameters:  # Phi-3.5-MoE scales by it whatever the type
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or length
            yield Border(int(original), beyond=True)


def _each(parameters: object) -> Iterator[Mapping[str, int | str]]:
    """Rope parameters, or those of each kind of layer."""
    if isinstance(parameters, Mapping):
        if not any(isinstance(value, Mapping) for value in parameters.values()):
            yield parameters
        for value in parameters.values():
            yield from _each(value)


def _longest(config: PretrainedConfig) -> int:
    return getattr(config, "max_position_embeddings", None) or 0

"""Limit the draft length where a longer forward pass would change the rotary embeddings.

Two of transformers' rope types depend on the largest position of a forward pass: `longrope` changes
its frequencies at the model's original length, `dynamic` changes them beyond it with each new
length. Draft tokens move that position.
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
    """A length at which rotary frequencies change.

    Forward passes up to `at` tokens use one set of frequencies; longer ones use one other set
    (`beyond`), or a different one for each length.
    """

    at: int
    beyond: bool

    def room(self, reach: int) -> float:
        """Return how many draft tokens fit in a forward pass that reaches `reach` tokens without
        them."""
        if reach > self.at:
            return float("inf") if self.beyond else 0
        return self.at - reach


def borders(model: PreTrainedModel) -> list[Border]:
    """Return the borders of a model's rotary embeddings, from its modules, or from its config if
    none is recognised."""
    modules = [module for module in model.modules() if _follows_the_pass(type(module))]  # type: ignore[arg-type]
    found: list[Border] = []
    for module in modules:
        found += _of_module(module)
    if not modules:
        config = model.config.get_text_config()
        # nothing is known of its own code, so each length may have other frequencies
        for border in _of_parameters(config, _longest(config)):
            found.append(dataclasses.replace(border, beyond=False))
    return list(dict.fromkeys(found))


@functools.cache
def _follows_the_pass(module_class: type[nn.Module]) -> bool:
    return _is_decorated(inspect.unwrap(module_class.forward, stop=_is_decorated))


def _is_decorated(function: object) -> bool:
    return getattr(function, "__code__", None) is _DECORATED


def _of_module(module: nn.Module) -> Iterator[Border]:
    config = cast(PretrainedConfig, module.config)
    length = getattr(module, "original_max_seq_len", None) or _longest(config)
    return _of_parameters(config, length)


def _of_parameters(config: PretrainedConfig, length: int) -> Iterator[Border]:
    of_config = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    for parameters in _each(of_config):
        kind = str(parameters.get("rope_type", parameters.get("type", "")))
        if "dynamic" in kind:
            yield Border(length, beyond=False)
        # Phi-3.5-MoE scales by it whatever the type
        elif kind == "longrope" or "long_mscale" in parameters:
            name = "original_max_position_embeddings"
            original = parameters.get(name) or getattr(config, name, None)
            yield Border(int(original or length), beyond=True)


def _each(parameters: object) -> Iterator[Mapping[str, int | str]]:
    """Yield rope parameters, or those of each layer type."""
    if isinstance(parameters, Mapping):
        if not any(isinstance(value, Mapping) for value in parameters.values()):
            yield parameters
        for value in parameters.values():
            yield from _each(value)


def _longest(config: PretrainedConfig) -> int:
    return getattr(config, "max_position_embeddings", None) or 0

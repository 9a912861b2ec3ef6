"""Every knob of CAFT: its name, default, check and source, once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

HeadInput = Literal["penultimate", "final"]
Schedule = Literal["rsine", "sine", "linear", "constant"]
TrainHeads = Literal["auto", "full", "lora", "frozen"]
Targets = Literal["model", "dataset", "distribution"]

DEFAULT_HEAD_INPUT: HeadInput = "penultimate"
DEFAULT_HEAD_NORM = True


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value, what is accepted and the fix."""


class CAFTConfig(BaseModel):
    """Settings of concept-aware fine-tuning (arXiv 2506.07833).

    The loss at optimisation step s of S is

        L = L1 + beta * gamma(s) * sum over k = 1..num_heads of alpha^k * L_{k+1}

    where L1 is the framework's own next-token loss and L_{k+1} the mean cross-entropy of head k against the
    token k+1 ahead.

    Raises:
        ConfigError: an unknown key, or a value outside of what the key accepts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    num_heads: int = Field(
        4,
        ge=1,
        le=32,
        description="auxiliary heads; head k predicts the token k+1 ahead (published: 4, for tokens 2 to 5)",
    )
    heads: str | None = Field(
        None,
        min_length=1,
        description="folder or Hub id of pretrained heads; left out: copies of the model's last layer",
    )
    train_heads: TrainHeads = Field(
        "auto",
        description="`full`, `lora` (the adapter's rank and alpha, all linear layers), `frozen`; "
        "`auto`: `full` when the base trains fully, `lora` under LoRA and QLoRA",
    )
    beta: float = Field(0.01, ge=0, allow_inf_nan=False, description="weight of all auxiliary losses; 0 is a plain run")
    alpha: float = Field(
        0.8, gt=0, le=1, description="geometric decay: head k weighs alpha^k, so far tokens count less"
    )
    schedule: Schedule = Field(
        "rsine",
        description="gamma over training: `rsine` 1 to 0 along a sine, `sine` 0 to 1, `linear` 0 to 1, `constant` 1",
    )
    head_input: HeadInput | None = Field(
        None,
        description="what a head reads: `penultimate` (the last layer's input) or `final` (the normed final "
        "hidden state, as the authors fine-tune); left out: what the heads folder records, else "
        f"`{DEFAULT_HEAD_INPUT}`",
    )
    head_norm: bool | None = Field(
        None,
        description="apply the model's final norm to a head's output (the authors: `false`); left out: what "
        f"the heads folder records, else `{str(DEFAULT_HEAD_NORM).lower()}`",
    )

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain("caft", type(self), error.errors())) from None

    @field_validator("num_heads", "beta", "alpha", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("a number is needed")
        return value

    @classmethod
    def read(cls, block: Any) -> CAFTConfig:
        """The config for what a user wrote: a CAFTConfig, a mapping, or None (a bare `caft:`).

        Raises:
            ConfigError: `block` is none of these, or holds a wrong key or value.
        """
        if isinstance(block, cls):
            return block
        if block is None:
            return cls()
        if not isinstance(block, dict):
            raise ConfigError(
                f"caft: got {block!r}, but it takes a block of keys ({', '.join(cls.model_fields)}) "
                "or nothing at all for the defaults."
            )
        return cls(**block)


class PretrainConfig(BaseModel):
    """Settings of stage 1, `caft pretrain-heads` (arXiv 2506.07833, section 3).

    Raises:
        ConfigError: an unknown key, or a value outside of what the key accepts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    targets: Targets = Field(
        "model",
        description="what heads learn: `model`, answers that the base model writes; `dataset`, the data set's own "
        "answers; `distribution`, the base model's next-token distribution at each position of any text",
    )
    max_new_tokens: int = Field(512, ge=1, description="longest answer the base model writes, in tokens")
    temperature: float = Field(
        0.0, ge=0, le=10, description="of sampling answers; 0 takes the likeliest token each time"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    generation_batch_size: int = Field(16, ge=1, description="answers written at a time")
    seed: int = Field(0, ge=0, description="of sampling")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain("pretrain_heads", type(self), error.errors())) from None


def explain(block: str, model: type[BaseModel], errors: Iterable[ErrorDetails]) -> str:
    """One line for each error of a config block: key, value received, values accepted."""
    lines = []
    for error in errors:
        key = str(error["loc"][0]) if error["loc"] else ""
        field = model.model_fields.get(key)
        if field is None:
            lines.append(f"{block}.{key}: unknown key. Accepted keys: {', '.join(model.model_fields)}.")
        else:
            lines.append(f"{block}.{key}: got {error['input']!r}, but it takes {accepted(field)}.")
    return "\n".join(lines)


def accepted(field: Any) -> str:
    """What a field takes, in words: 'one of a, b', 'a whole number from 1 to 32', 'true or false' ..."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    choices = kinds if all(isinstance(kind, str) for kind in kinds) else get_args(kinds[0])
    if choices:
        return "one of " + ", ".join(choices)
    bounds = {
        name: getattr(mark, name) for mark in field.metadata for name in ("ge", "gt", "le") if hasattr(mark, name)
    }
    limits = [f"at least {bounds['ge']}"] if "ge" in bounds else []
    limits += [f"above {bounds['gt']}"] if "gt" in bounds else []
    limits += [f"at most {bounds['le']}"] if "le" in bounds else []
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kinds[0]]
    return " ".join([kind, " and ".join(limits)]).strip()

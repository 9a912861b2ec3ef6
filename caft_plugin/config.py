"""Every knob of CAFT and MEAP: its name, default, check and source, once."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

HeadInput = Literal["penultimate", "final"]
Schedule = Literal["rsine", "sine", "linear", "constant"]
TrainHeads = Literal["auto", "full", "lora", "frozen"]
FusedLoss = Literal["off", "auto", "on"]
Targets = Literal["model", "dataset", "distribution"]
MEAPMode = Literal["sft", "pretrain"]
Layout = Literal["concat", "separate"]

DEFAULT_HEAD_INPUT: HeadInput = "penultimate"
DEFAULT_HEAD_NORM = True
HEADS_KEY = "caft.heads"
LONGEST = 100  # of a value or key in a message, in characters
DEFAULT_MASK_RATIO: dict[str, float] = {"sft": 0.10, "pretrain": 0.15}


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value, what is accepted and the fix."""


class Block(BaseModel):
    """A block of a YAML file, `name:` with keys below it.

    Raises:
        ConfigError: an unknown key, or a value outside of what the key accepts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    block: ClassVar[str]

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error.errors())) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: object, info: ValidationInfo) -> object:
        kinds = kinds_of(cls.model_fields[str(info.field_name)])
        if isinstance(value, bool) and {"on", "off"} <= set(kinds):
            return "on" if value else "off"  # YAML reads a bare on or off as true or false
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("true and false mean nothing here")
        return value

    @classmethod
    def read(cls, block: object) -> Self:
        """The config for what a user wrote: one of this class, a mapping, or None (a bare `name:`).

        Raises:
            ConfigError: `block` is none of these, or holds a wrong key or value.
        """
        if isinstance(block, cls):
            return block
        if block is None:
            return cls()
        if not isinstance(block, dict):
            raise ConfigError(
                f"{cls.block}: got {shown(block)}, but it takes a block of keys ({', '.join(cls.model_fields)}) "
                "or nothing at all for the defaults."
            )
        return cls(**{key if isinstance(key, str) else shown(key): value for key, value in block.items()})


class CAFTConfig(Block):
    """Settings of concept-aware fine-tuning (arXiv 2506.07833).

    The loss at optimisation step s of S is

        L = L1 + beta * gamma(s) * sum over k = 1..num_heads of alpha^k * L_{k+1}

    where L1 is the framework's own next-token loss and L_{k+1} the mean cross-entropy of head k against the
    token k+1 ahead.

    Raises:
        ConfigError: an unknown key, or a value outside of what the key accepts.
    """

    block = "caft"

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
        description="`full`, `lora` (the adapter's rank and alpha, all linear layers, but no experts), `frozen`; "
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
    heads_per_step: int | None = Field(
        None,
        ge=1,
        le=32,
        description="draw this many heads for each micro-batch, with probability in proportion to alpha^k, and weigh "
        "them so that the mean gradient is that of all heads; left out: all heads run",
    )
    fused_loss: FusedLoss = Field(
        "off",
        description="let the plugin compute the next-token loss too, at supervised positions only, so that the model "
        "builds no logits; `auto`: where that is possible; `on`: stop where it is not",
    )


class MEAPConfig(Block):
    """Settings of mask-enhanced autoregressive prediction (arXiv 2502.07490).

    Raises:
        ConfigError: an unknown key, or a value outside of what the key accepts.
    """

    block = "meap"

    mode: MEAPMode = Field(
        "sft",
        description="`sft`: each example is trained on twice, unmasked and with its answers masked; "
        "`pretrain`: every document is masked, all labels stay",
    )
    mask_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of tokens masked; left out: "
        + ", ".join(f"{ratio:.2f} for `{mode}`" for mode, ratio in DEFAULT_MASK_RATIO.items()),
    )
    layout: Layout = Field(
        "concat",
        description="(sft) `concat`: the masked copy follows its original in one sequence and attends to it, as in the "
        "paper; `separate`: two sequences, as in the authors' code",
    )
    min_answer_tokens: int = Field(
        51, ge=1, description="(sft) shorter answers are not masked; special and end tokens do not count"
    )
    mask_token: int | str = Field(
        "auto",
        description="`auto`: a token that the model has and the data does not use; `add`: one extra input vector, the "
        "model keeps its shape; or a token's text or id",
    )

    @property
    def ratio(self) -> float:
        return DEFAULT_MASK_RATIO[self.mode] if self.mask_ratio is None else self.mask_ratio


class PretrainConfig(Block):
    """Settings of stage 1, `caft pretrain-heads` (arXiv 2506.07833, section 3).

    Raises:
        ConfigError: an unknown key, or a value outside of what the key accepts.
    """

    block = "pretrain_heads"

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
    vllm: bool = Field(
        False, description="let vLLM write the answers, on a GPU, of a base that is not quantised (never run by us)"
    )


def explain(model: type[Block], errors: Iterable[ErrorDetails]) -> str:
    """One line for each key that is wrong in a config block: key, value received, values accepted."""
    lines = {}
    for error in errors:
        key = str(error["loc"][0]) if error["loc"] else ""
        field = model.model_fields.get(key)
        if field is None:
            lines[key] = f"{model.block}.{named(key)}: unknown key. Accepted keys: {', '.join(model.model_fields)}."
        else:
            lines[key] = f"{model.block}.{key}: got {shown(error['input'])}, but it takes {accepted(field)}."
    return "\n".join(lines.values())


def shown(value: object) -> str:
    """A value as a message shows it: on one line and of bounded length, whatever it is."""
    form = reprlib.Repr()
    form.maxstring = form.maxother = LONGEST
    try:
        return form.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too long to be written"


_heads_as: ContextVar[str] = ContextVar("caft_heads_as", default=HEADS_KEY)


def heads_as() -> str:
    """What the caller knows a heads folder as; messages about it begin with this."""
    return _heads_as.get()


@contextlib.contextmanager
def heads_named(name: str) -> Iterator[None]:
    """While this is open, messages call a heads folder by this name of an option or argument. The outermost counts."""
    token = _heads_as.set(name) if _heads_as.get() == HEADS_KEY else None
    try:
        yield
    finally:
        if token is not None:
            _heads_as.reset(token)


_on_command_line: ContextVar[bool] = ContextVar("caft_on_command_line", default=False)


@contextlib.contextmanager
def on_command_line() -> Iterator[None]:
    """Let `asked_as` return names of options while this is open."""
    token = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(token)


def asked_as(argument: str, option: str | None = None) -> str:
    """Return the caller's name for an argument: `num_heads` in Python, `--num-heads` on the command line.

    `option` is the option's name where it is not made of the argument's.
    """
    if not _on_command_line.get():
        return argument
    return f"--{argument.replace('_', '-')}" if option is None else option


def named(text: str) -> str:
    """A name out of somebody's file as a message shows it: as it is, unless it is endless or cannot be printed."""
    return text if text.isprintable() and 0 < len(text) <= 3 * LONGEST else shown(text)


def first_line(error: Exception) -> str:
    """Somebody else's error as a message shows it."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def accepted(field: FieldInfo) -> str:
    """What a field takes, in words: 'one of a, b', 'a whole number from 1 to 32', 'true or false' ..."""
    kinds = kinds_of(field)
    choices = kinds if all(isinstance(kind, str) for kind in kinds) else get_args(kinds[0])
    if choices:
        return "one of " + ", ".join(choices)
    bounds = {
        name: getattr(mark, name) for mark in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)
    }
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items())
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return f"{' or '.join(named[kind] for kind in kinds)} {limits}".strip()


def kinds_of(field: FieldInfo) -> list[Any]:
    """The types of a field's annotation, None left out."""
    return [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]

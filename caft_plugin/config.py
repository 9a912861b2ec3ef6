"""Every setting of CAFT and MEAP: its name, default, check and source, once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NoReturn, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from caft_plugin.errors import ConfigError, named, setting_as, shown

HeadInput = Literal["penultimate", "final"]
Schedule = Literal["rsine", "sine", "linear", "constant"]
TrainHeads = Literal["auto", "full", "lora", "frozen"]
Auto = Literal["auto"]  # of `fused_loss`: still read, no longer offered
FusedLoss = bool | Auto
Targets = Literal["model", "dataset", "distribution"]
MEAPMode = Literal["sft", "pretrain"]
Layout = Literal["concat", "separate"]
MTPMode = Literal["keep"]

DEFAULT_HEAD_INPUT: HeadInput = "penultimate"
DEFAULT_HEAD_NORM = True
DEFAULT_MASK_RATIO: dict[str, float] = {"sft": 0.10, "pretrain": 0.15}


class Block(BaseModel):
    """A block of a YAML file: `name:` with keys below it.

    Raises:
        ConfigError: an unknown key, or a value that the key does not accept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    block: ClassVar[str]

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            refuse_values(type(self), error.errors())

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: object, info: ValidationInfo) -> object:
        kinds = kinds_of(cls.model_fields[str(info.field_name)])
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("true and false are not accepted here")
        return value

    @classmethod
    def read(cls, block: object) -> Self:
        """Return the config for a user's value: an instance, a mapping of keys, or None (a bare
        `name:`).

        Raises:
            ConfigError: `block` is none of these, or holds a wrong key or value.
        """
        if isinstance(block, cls):
            return block
        if block is None:
            return cls()
        if not isinstance(block, dict):
            raise ConfigError(
                f"{cls.block}: got {shown(block)}, but it accepts settings by name"
                f" ({', '.join(cls.model_fields)}), or {{}} for the defaults."
            )
        return cls(
            **{key if isinstance(key, str) else shown(key): value for key, value in block.items()}
        )


class CAFTConfig(Block):
    """Settings of concept-aware fine-tuning (arXiv 2506.07833).

    The loss at optimisation step s of S is

        L = L1 + beta * gamma(s) * sum over k = 1..num_heads of alpha^k * L_{k+1}

    where L1 is the framework's own next-token loss and L_{k+1} the mean cross-entropy of head k
    against the token k+1 ahead.

    Raises:
        ConfigError: an unknown key, or a value that the key does not accept.
    """

    block = "caft"

    num_heads: int = Field(
        4,
        ge=1,
        le=32,
        description=(
            "number of auxiliary heads; head k predicts the token k+1 ahead (paper: 4, for tokens 2"
            " to 5)"
        ),
    )
    heads: str | None = Field(
        None,
        min_length=1,
        description=(
            "folder or Hub id of pretrained heads; default: copies of the model's last layer"
        ),
    )
    train_heads: TrainHeads = Field(
        "auto",
        description=(
            "`full`, `lora` (with the adapter's rank and alpha, on all linear layers except"
            " experts) or `frozen`; `auto`: `full` if the base is trained fully, `lora` with LoRA"
            " and QLoRA"
        ),
    )
    beta: float = Field(
        0.01,
        ge=0,
        allow_inf_nan=False,
        description="weight of the auxiliary losses; 0: a plain run",
    )
    alpha: float = Field(
        0.8,
        gt=0,
        le=1,
        description="decay: head k has the weight alpha^k, so distant tokens count less",
    )
    schedule: Schedule = Field(
        "rsine",
        description=(
            "gamma over training: `rsine` from 1 to 0 along a sine, `sine` from 0 to 1, `linear`"
            " from 0 to 1, `constant` 1"
        ),
    )
    head_input: HeadInput | None = Field(
        None,
        description=(
            "the heads' input: `penultimate` (the last layer's input) or `final` (the normalised"
            " final hidden state, as in the authors' fine-tuning); default: the heads folder's"
            f" setting, else `{DEFAULT_HEAD_INPUT}`"
        ),
    )
    head_norm: bool | None = Field(
        None,
        description=(
            "apply the model's final norm to a head's output (the authors: `false`); default: the"
            f" heads folder's setting, else `{str(DEFAULT_HEAD_NORM).lower()}`"
        ),
    )
    heads_per_step: int | None = Field(
        None,
        ge=1,
        le=32,
        description=(
            "draw this many heads per micro-batch, with probabilities proportional to alpha^k,"
            " weighted so that the expected gradient is that of all heads; default: all heads run"
        ),
    )
    fused_loss: FusedLoss = Field(
        False,
        description=(
            "compute the next-token loss in the plugin, at supervised positions only, so that the"
            " model builds no logits; a run in which this is not possible stops"
        ),
    )


class MEAPConfig(Block):
    """Settings of mask-enhanced autoregressive prediction (arXiv 2502.07490).

    Raises:
        ConfigError: an unknown key, or a value that the key does not accept.
    """

    block = "meap"

    mode: MEAPMode = Field(
        "sft",
        description=(
            "`sft`: train on each example twice, unmasked and with its answers masked; "
            "`pretrain`: mask every document and keep all labels"
        ),
    )
    mask_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of tokens to mask; default: "
        + ", ".join(f"{ratio:.2f} for `{mode}`" for mode, ratio in DEFAULT_MASK_RATIO.items()),
    )
    layout: Layout = Field(
        "concat",
        description=(
            "(sft) `concat`: the masked copy follows its original in the same sequence and attends"
            " to it, as in the paper; `separate`: two sequences, as in the authors' code"
        ),
    )
    min_answer_tokens: int = Field(
        51,
        ge=1,
        description="(sft) shorter answers are not masked; special and end tokens are not counted",
    )
    mask_token: int | str = Field(
        "auto",
        description=(
            "`auto`: an existing token that the data does not use; `add`: one extra input vector"
            " (the model keeps its shape); or a token's text or id"
        ),
    )

    @property
    def ratio(self) -> float:
        return DEFAULT_MASK_RATIO[self.mode] if self.mask_ratio is None else self.mask_ratio


class MTPConfig(Block):
    """What happens to the MTP layers (multi-token prediction) that a base model brings along.

    Raises:
        ConfigError: an unknown key, or a value that the key does not accept.
    """

    block = "mtp"

    mode: MTPMode = Field(
        "keep",
        description=(
            "`keep`: put the base's MTP layers into the saved model, which transformers saves"
            " without them"
        ),
    )


class PretrainConfig(Block):
    """Settings of stage 1, `caft pretrain-heads` (arXiv 2506.07833, section 3).

    Raises:
        ConfigError: an unknown key, or a value that the key does not accept.
    """

    block = "pretrain_heads"

    targets: Targets = Field(
        "model",
        description=(
            "the heads' targets: `model`, answers generated by the base model; `dataset`, the data"
            " set's own answers; `distribution`, the base model's next-token distribution at each"
            " position of any text"
        ),
    )
    max_new_tokens: int = Field(
        512, ge=1, description="maximum length of a generated answer, in tokens"
    )
    temperature: float = Field(
        0.0, ge=0, le=10, description="sampling temperature; 0: greedy decoding"
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: use the most likely tokens with this total probability",
    )
    generation_batch_size: int = Field(16, ge=1, description="answers generated per batch")
    seed: int = Field(0, ge=0, description="sampling seed")


def refuse_values(model: type[Block], errors: Iterable[ErrorDetails]) -> NoReturn:
    """Raise ConfigError with a line for each wrong setting of a block: name, value, accepted
    values."""
    lines = {}
    for error in errors:
        key = str(error["loc"][0]) if error["loc"] else ""
        field = model.model_fields.get(key)
        if field is None:
            accepts = ", ".join(model.model_fields)
            lines[key] = (
                f"{model.block}.{named(key)}: unknown setting. Accepted settings: {accepts}."
            )
        else:
            lines[key] = (
                f"{setting_as(model.block, key)}: got {shown(error['input'])}, but it accepts"
                f" {accepted(field)}."
            )
    raise ConfigError("\n".join(lines.values())) from None


def accepted(field: FieldInfo) -> str:
    """Return the values that a field accepts, in words: 'one of a, b', 'a whole number at least 1',
    'true or false'."""
    kinds = kinds_of(field)
    choices = kinds if all(isinstance(kind, str) for kind in kinds) else get_args(kinds[0])
    if choices:
        return "one of " + ", ".join(choices)
    bounds = {
        name: getattr(mark, name)
        for mark in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(mark, name)
    }
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items())
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return f"{' or '.join(named[kind] for kind in kinds)} {limits}".strip()


def kinds_of(field: FieldInfo) -> list[Any]:
    """Return the types of a field's annotation that messages offer: without None and Auto."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return [kind for kind in kinds if kind not in (type(None), Auto)]

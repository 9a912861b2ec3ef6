"""A run's settings that affect memory and time, and its model, built without memory for weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from caft_plugin.config import CAFTConfig
from caft_plugin.errors import ConfigError, first_line
from caft_plugin.model.loading import Source
from caft_plugin.model.trunk import Trunk, find_trunk

# bitsandbytes in 4 bits: an 8-bit scale for each 64 weights, and a float32 scale for each 256 of
# these.
QUANTISED = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of a run that affect memory and time. A micro-batch has `rows` of `length`
    tokens per GPU.

    `config` names another model whose config is read instead of `model`'s, and `overrides` replace
    values of that config. `lora` has arguments of PEFT's LoraConfig (None: no adapter). `unfrozen`
    has patterns of parameter names if not all train. `builds_logits` says if the framework's own
    loss has the logits of the complete batch, `float32_parts` if norms, embedding and unembedding
    stay in float32 while the base trains fully. `notes` explain how something was counted.
    """

    model: str
    caft: CAFTConfig
    dtype: torch.dtype
    rows: int
    length: int
    accumulation: int
    bits: int
    checkpointing: bool
    sharded: bool
    optimizer: str
    builds_logits: bool
    float32_parts: bool
    lora: Mapping[str, Any] | None = None
    config: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)
    eager: bool = False
    unfrozen: Sequence[str] = ()
    notes: Sequence[str] = ()

    def source(self) -> Source:
        """Return the model whose config is read.

        Raises:
            ConfigError: its config cannot be read.
        """
        return Source.of(
            self.config or self.model,
            key="base_model_config" if self.config else "base_model",
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def fuses(self) -> bool:
        """Return True if the plugin computes the next-token loss too."""
        return self.caft.beta != 0 and bool(self.caft.fused_loss)

    @property
    def heads_at_once(self) -> int:
        """Return the maximum number of heads in one forward pass."""
        drawn = self.caft.heads_per_step
        return self.caft.num_heads if drawn is None else min(drawn, self.caft.num_heads)


def build_model(run: Run, source: Source) -> tuple[nn.Module, Trunk, dict[Tensor, float]]:
    """Return the run's model without memory for its weights, its trunk, and the bytes of each
    quantised parameter.

    Raises:
        ConfigError: the model cannot be built from its config, or the adapter does not fit it.
    """
    attention = {"attn_implementation": "eager"} if run.eager else {}
    # vision-language models complete, as Axolotl loads them
    trunk = source.empty_trunk(run.overrides, whole=True, dtype=run.dtype, **attention)
    model: nn.Module = trunk.model
    quantised = quantised_weights(trunk, run.bits)
    if run.lora is not None:
        model.requires_grad_(False)
        model = with_adapter(run, run.lora, model)
        return model, find_trunk(model), quantised
    if run.float32_parts:
        to_float32(trunk)
    if run.unfrozen:
        train_only(model, run.unfrozen)
    return model, trunk, quantised


def quantised_weights(trunk: Trunk, bits: int) -> dict[Tensor, float]:
    """Return the bytes of each weight that bitsandbytes quantises: all linear layers but the
    unembedding."""
    quantised: dict[Tensor, float] = {}
    if bits == 16:
        return quantised
    for module in trunk.model.modules():
        if isinstance(module, nn.Linear) and module is not trunk.unembedding:
            quantised[module.weight] = module.weight.numel() * QUANTISED[bits]
    return quantised


def to_float32(trunk: Trunk) -> None:
    """Convert norms, embedding and unembedding to float32, as Axolotl does."""
    embeddings = (trunk.unembedding, trunk.model.get_input_embeddings())
    for name, module in trunk.model.named_modules():
        if "norm" in name or module in embeddings:
            module.float()


def train_only(model: nn.Module, unfrozen: Sequence[str]) -> None:
    """Freeze all parameters but those whose names match a pattern of `unfrozen_parameters`."""
    patterns = []
    for written in unfrozen:
        # As Axolotl reads them: a range of rows at the end is no part of the name, a dot is a dot.
        without_range = re.sub(r"\[[0-9:]*\]$", "", written)
        patterns.append(re.compile(re.sub(r"\.(?!\+)", r"\.", without_range)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(pattern.match(name) for pattern in patterns))


def with_adapter(
    run: Run,
    lora: Mapping[str, Any],
    model: nn.Module,
) -> nn.Module:
    """Return the model with the run's LoRA adapter, in float32 on a half-precision base, as in
    PEFT."""
    try:
        with torch.device("meta"):
            return get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"adapter: no LoRA adapter can be put on {run.model} ({first_line(error)}). Check"
            " lora_r, lora_target_modules and lora_target_linear."
        ) from error

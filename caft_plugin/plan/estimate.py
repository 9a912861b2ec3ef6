"""Estimate a run: bytes of the base model and of the heads, and the step time compared with the run
without heads.

No weight is loaded and nothing is trained. The model is built without memory for its weights, so
its parameters can be counted for any architecture, and the bytes that a forward pass keeps for the
backward pass too (activations.py).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from torch import Tensor, nn

from caft_plugin.caft.heads import AuxiliaryHeads, build_heads, pointwise_parts
from caft_plugin.caft.heads_folder import HeadsFolder, resolve_wiring
from caft_plugin.caft.loss import LOGITS_AT_A_TIME
from caft_plugin.config import CAFTConfig
from caft_plugin.model.trunk import Trunk
from caft_plugin.plan.activations import Kept, keeps
from caft_plugin.plan.run import Run, build_model

# At its maximum, cross-entropy in float32 holds log-probabilities, their gradient and that of the
# logits.
BYTES_A_LOGIT = 12
# An optimizer's states for each trained parameter: number of values, and bytes of each (None: the
# parameter's own). The first pattern that matches the complete name is used.
OPTIMIZERS: list[tuple[str, int, float | None]] = [
    (r".*adam.*4bit", 2, 0.5),
    (r".*ademamix.*8bit", 3, 1),
    (r".*ademamix.*", 3, 4),
    (r".*adam.*(8bit|fp8)", 2, 1),
    (r"paged_adamw(_32bit)?", 2, 4),
    (r".*lion.*8bit", 1, 1),
    (r".*lion.*", 1, 4),
    (r"rmsprop.*8bit", 1, 1),
    (r"adagrad|rmsprop.*|muon", 1, None),
    (r"sgd|adafactor", 0, None),
    (r"adamw_(torch|apex|any).*", 2, None),
]
ADAMW = (2, None)
ACTIVE = "num_experts_per_tok"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclasses.dataclass(frozen=True)
class Share:
    """Bytes of the base model or of the heads on one GPU.

    `activations` are kept from the forward to the backward pass; `work` is temporary (a recomputed
    layer, a chunk of logits).
    """

    weights: float = 0
    gradients: float = 0
    states: float = 0
    activations: float = 0
    work: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.states + self.activations + self.work


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """Bytes of the next-token loss on one GPU: `kept` while the heads run, `peak` at its
    maximum."""

    kept: float
    peak: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory and time that heads add to a run: memory in bytes on one GPU, time as a multiple
    of the run without.

    `losses` are those of the run without and with heads; `gathered` are the bytes that FSDP has
    unsharded, `copies` the bytes that the optimizer needs during its step per byte of gradients.
    """

    run: Run
    model: str
    base_parameters: int
    heads: int
    parameters: int
    trained: int
    how: str
    base: Share
    added: Share
    losses: tuple[NextTokenLoss, NextTokenLoss]
    gathered: float
    copies: int
    ratio: float
    ratio_drawn: float | None
    notes: list[str]

    @property
    def plain_peak(self) -> float:
        """Return the peak of the run without heads, in bytes."""
        return self._peak(Share(), self.losses[0])

    @property
    def peak(self) -> float:
        """Return the peak of the run with heads, in bytes."""
        return self._peak(self.added, self.losses[1])

    def _peak(self, added: Share, loss: NextTokenLoss) -> float:
        """Return the maximum over four moments: the heads run; the backward pass of the framework's
        loss, after the heads'; the backward pass of the layers; the optimizer's step. With gradient
        accumulation, gradients of earlier micro-batches are in memory."""
        base = self.base
        gradients = base.gradients + added.gradients
        earlier = gradients if self.run.accumulation > 1 else 0
        so_far = earlier or added.gradients
        moments = (
            base.activations + loss.kept + added.activations + added.work + earlier,
            base.activations + loss.peak + so_far,
            base.activations + base.work + so_far,
            gradients * (1 + self.copies),
        )
        return (
            base.weights + base.states + added.weights + added.states + self.gathered + max(moments)
        )


Built = tuple[nn.Module, Trunk, dict[Tensor, float], CAFTConfig, AuxiliaryHeads | None]


@dataclasses.dataclass
class Seen:
    """What plans of the same run with other settings share: models, and what forward passes keep.
    Both take seconds."""

    built: dict[str, Built] = dataclasses.field(default_factory=dict)
    kept: dict[str, tuple[Kept, list[str]]] = dataclasses.field(default_factory=dict)


def make_plan(
    run: Run,
    gpus: int = 1,
    supervised: float = 0.3,
    device: str = "accelerator",
    seen: Seen | None = None,
) -> Plan:
    """Estimate what heads add to a run.

    Args:
        run: the run's settings.
        gpus: number of GPUs over which FSDP shards; without FSDP every GPU has everything.
        supervised: fraction of the tokens with a label, 0 to 1.
        device: `accelerator` or `cpu`, which differ in the size of a chunk of logits.
        seen: shared by the plans of a search.

    Raises:
        ConfigError: the model cannot be built from its config, or the heads do not fit.
    """
    seen = Seen() if seen is None else seen
    as_built, as_kept = _keys(run)
    model, trunk, quantised, caft, heads = seen.built.get(as_built) or _build(run)
    run = dataclasses.replace(
        run, caft=run.caft.model_copy(update=caft.model_dump(include={"head_input", "head_norm"}))
    )
    shards = gpus if run.sharded else 1
    plain, head, saved = multiply_adds(run, trunk, heads, supervised)
    all_heads, drawn = (0.0, 0.0) if heads is None else (len(heads), expected_heads(run.caft))
    unembedding = sum(_bytes(p) for p in trunk.unembedding.parameters() if p.requires_grad)
    standing = [stands(run, module, quantised, shards) for module in (model, heads)]
    counts = (
        [0, 0]
        if heads is None
        else [_count(heads), sum(p.numel() for p in heads.parameters() if p.requires_grad)]
    )
    base_parameters = _count(model)
    gathered = gathered_by_fsdp(trunk, model, quantised) if shards > 1 else 0.0

    if as_kept in seen.kept:
        seen.built[as_built] = (model, trunk, quantised, caft, heads)
    else:  # last: the model holds fake tensors from here on
        seen.built.pop(as_built, None)
        seen.kept[as_kept] = keeps(model, trunk, heads, run.rows, run.length, run.dtype)
    kept, guesses = seen.kept[as_kept]
    base = dataclasses.replace(standing[0], activations=kept.base)
    if run.checkpointing:
        inputs = kept.base - sum(kept.layers) + len(kept.layers) * kept.hidden
        base = dataclasses.replace(base, activations=inputs, work=max(kept.layers))
    added = standing[1]
    losses = (_next_token_loss(run, trunk),) * 2
    if heads is not None:
        chunk = (
            min(LOGITS_AT_A_TIME[device], supervised * run.tokens * trunk.vocab_size)
            * BYTES_A_LOGIT
            + unembedding
        )
        activations, work = _heads_pass(run, kept, supervised, unembedding, chunk)
        added = dataclasses.replace(added, activations=activations, work=work)
        if run.fuses:
            fused = supervised * kept.hidden + unembedding
            losses = (losses[0], NextTokenLoss(fused, fused + chunk))
    return Plan(
        run=run,
        model=f"{run.model} ({trunk.model.config.model_type})",
        base_parameters=base_parameters,
        heads=int(all_heads),
        parameters=counts[0],
        trained=counts[1],
        how="none" if heads is None else heads.how,
        base=base,
        added=added,
        losses=losses,
        gathered=gathered,
        # On a GPU torch's own AdamW updates all parameters together and needs a copy of them,
        # unless it is fused.
        copies=int(run.optimizer == "adamw_torch" and device != "cpu"),
        ratio=(plain - saved + all_heads * head) / plain,
        ratio_drawn=(
            None if run.caft.heads_per_step is None else (plain - saved + drawn * head) / plain
        ),
        notes=[*_notes(run, gpus, trunk), *optimizer_states(run.optimizer)[1], *guesses],
    )


def _build(run: Run) -> Built:
    model, trunk, quantised = build_model(run)
    caft = _checked(run, trunk)
    return (
        model,
        trunk,
        quantised,
        caft,
        None if caft.beta == 0 else build_heads(model, trunk, caft, seed=0),
    )


def _keys(run: Run) -> tuple[str, str]:
    """Return the settings on which the built model depends, and those on which the bytes of a
    forward pass do."""
    caft = run.caft.model_copy(update={"fused_loss": False, "heads_per_step": None})
    built = dataclasses.replace(
        run,
        caft=caft,
        rows=1,
        length=1,
        accumulation=1,
        checkpointing=False,
        sharded=False,
        optimizer="",
        builds_logits=False,
        notes=(),
    )
    kept = dataclasses.replace(
        built,
        caft=caft.model_copy(update={"num_heads": 1}),
        rows=run.rows,
        length=run.length,
        bits=16,
    )
    return repr(built), repr(kept)


def stands(
    run: Run, module: nn.Module | None, quantised: dict[Tensor, float], shards: int
) -> Share:
    """Return the weights, gradients and optimizer states of a module on each GPU.

    Args:
        run: the run's settings.
        module: the model or the heads.
        quantised: bytes of each quantised parameter.
        shards: number of GPUs over which FSDP shards.
    """
    values, each = optimizer_states(run.optimizer)[0]
    parameters = [] if module is None else list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Share(
        weights=sum(quantised.get(p, _bytes(p)) for p in parameters) / shards,
        gradients=sum(map(_bytes, trained)) / shards,
        states=sum(values * p.numel() * (each or p.itemsize) for p in trained) / shards,
    )


def gathered_by_fsdp(trunk: Trunk, model: nn.Module, quantised: dict[Tensor, float]) -> float:
    """Return the unsharded bytes on a GPU: two layers at a time, and the parameters outside of the
    layers with their gradients, during the complete step."""
    layers = trunk.layers
    in_layers = {p for layer in layers for p in layer.parameters()}
    outside = sum(
        _bytes(p) * (1 + p.requires_grad) for p in model.parameters() if p not in in_layers
    )
    return outside + 2 * max(
        sum(quantised.get(p, _bytes(p)) for p in layer.parameters()) for layer in layers
    )


def _checked(run: Run, trunk: Trunk) -> CAFTConfig:
    """Return the `caft:` block with its wiring filled in, after checking local heads against the
    model."""
    name = run.caft.heads
    record = None
    if name is not None and (Path(name).exists() or name.startswith((".", "/", "~"))):
        folder = HeadsFolder.open(name)
        folder.check_model(run.caft, trunk.model.config)
        record = folder.record
    return resolve_wiring(run.caft, record)


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.itemsize


def _count(module: nn.Module) -> int:
    """Return the number of parameters, without those of LoRA."""
    return sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)


# -- memory of a forward pass ----------------------------------------------------------------------


def _heads_pass(
    run: Run, kept: Kept, supervised: float, unembedding: float, chunk: float
) -> tuple[float, float]:
    """Return the bytes that the heads keep for the backward pass, and those that they need
    temporarily.

    The loss computes its gradients in the forward pass and keeps them: those of its hidden states
    and, if the unembedding trains, those of the unembedding (once for all heads).
    """
    read = supervised * (kept.hidden + (kept.norm if run.caft.head_norm else 0))
    itself = kept.head - (1 - supervised) * kept.pointwise
    if run.checkpointing:  # heads share the last layer's input, which is counted there
        return run.heads_at_once * read + unembedding, max(chunk, itself)
    return run.heads_at_once * (read + itself) + unembedding, chunk


def _next_token_loss(run: Run, trunk: Trunk) -> NextTokenLoss:
    """Return the framework's own loss. It keeps the logits, which are part of the model's output,
    in float32 (from accelerate), and the log-probabilities."""
    logits = run.tokens * trunk.vocab_size if run.builds_logits else 0
    return NextTokenLoss(logits * 8, logits * BYTES_A_LOGIT)


# -- optimizer -------------------------------------------------------------------------------------


def optimizer_states(name: str) -> tuple[tuple[int, float | None], list[str]]:
    """Return the number of values that an optimizer keeps per trained parameter, the bytes of each
    (None: the parameter's own), and notes."""
    for pattern, values, each in OPTIMIZERS:
        if re.fullmatch(pattern, name):
            said = []
            if values == 0:
                said = [
                    f"optimizer {name}: counted without states (no momentum; Adafactor has row and"
                    " column sums)."
                ]
            elif name.startswith("paged"):
                said = [
                    f"optimizer {name}: its states can move to host memory, but are counted on the"
                    " GPU."
                ]
            return (values, each), said
    return ADAMW, [
        f"optimizer {name}: unknown, counted as AdamW: two values per parameter, in its dtype."
    ]


# -- time ------------------------------------------------------------------------------------------


def multiply_adds(
    run: Run, trunk: Trunk, heads: AuxiliaryHeads | None, supervised: float
) -> tuple[float, float, float]:
    """Return the multiplications of one token's forward and backward pass: those of the run without
    heads, of one head, and those that `caft.fused_loss` saves.

    A matrix needs as many multiplications as it has weights in the forward pass, as many for its
    input's gradient and, if it trains, for its own. Gradient checkpointing runs a layer's forward
    pass twice. Attention scores and sums need 2 T h in the forward pass and twice that in the
    backward pass.
    """
    config = trunk.model.config.get_text_config()
    again = int(run.checkpointing)
    total = next((n for key in EXPERTS if (n := getattr(config, key, None))), None)
    active = getattr(config, ACTIVE, None) if total else None

    def weights(module: nn.Module, again: int) -> float:
        products = 0.0
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                used = (
                    active / total
                    if active and total and re.search(r"(^|\.)experts\.", name)
                    else 1
                )
                products += used * parameter.numel() * (2 + parameter.requires_grad + again)
        return products

    def attention(layer: nn.Module) -> float:
        attends = any("attention" in type(m).__name__.lower() for m in layer.modules())
        return attends * 2 * run.length * trunk.hidden_size * (3 + again)

    unembedding = weights(trunk.unembedding, 0)
    plain = sum(weights(layer, again) + attention(layer) for layer in trunk.layers) + unembedding
    if heads is None:
        return plain, 0.0, 0.0
    head = heads.layers[0]
    pointwise = sum(weights(part, again) for part in pointwise_parts(head))
    everywhere = weights(head, again) - pointwise + attention(head)
    saved = (1 - supervised) * unembedding if run.fuses and run.builds_logits else 0.0
    return plain, everywhere + supervised * (pointwise + unembedding), saved


def expected_heads(caft: CAFTConfig) -> float:
    """Return the expected number of different heads in a forward pass, drawn with replacement by
    alpha^k."""
    if caft.heads_per_step is None:
        return caft.num_heads
    weights = [caft.alpha**k for k in range(caft.num_heads)]
    return sum(1 - (1 - weight / sum(weights)) ** caft.heads_per_step for weight in weights)


def _notes(run: Run, gpus: int, trunk: Trunk) -> list[str]:
    notes = list(run.notes)
    if run.caft.beta == 0:
        notes.append("caft.beta is 0: no heads are built, so nothing is added to the run.")
    if run.sharded and gpus == 1:
        notes.append("The YAML shards with FSDP: give the number of GPUs with --gpus.")
    if getattr(trunk.model.config, "quantization_config", None):
        notes.append("The base model's files are quantised, but it is counted as unquantised.")
    if hasattr(trunk.model.config, "vision_config"):
        notes.append(
            "Rows are counted as text: the weights of the vision part are included, its activations"
            " are not."
        )
    heads = run.caft.heads
    if heads is not None and not Path(heads).exists():
        notes.append(
            f"caft.heads: {heads} is not local and was not read; its head_norm can differ from the"
            " default."
        )
    return notes

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
from transformers import PretrainedConfig

from caft_plugin.caft.heads import AuxiliaryHeads, build_heads, pointwise_parts
from caft_plugin.caft.heads_folder import HeadsFolder, resolve_wiring
from caft_plugin.caft.loss import LOGITS_AT_A_TIME
from caft_plugin.config import CAFTConfig
from caft_plugin.model.loading import Source
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
        heads_run = base.activations + loss.kept + added.activations + added.work + earlier
        loss_backward = base.activations + loss.peak + so_far
        layers_backward = base.activations + base.work + so_far
        optimizer_step = gradients * (1 + self.copies)
        weights = base.weights + added.weights + self.gathered
        states = base.states + added.states
        return weights + states + max(heads_run, loss_backward, layers_backward, optimizer_step)


Built = tuple[nn.Module, Trunk, dict[Tensor, float], CAFTConfig, AuxiliaryHeads | None]


@dataclasses.dataclass
class Seen:
    """What plans of the same run with other settings share: the source of the model, built models,
    and what forward passes keep. The last two take seconds."""

    source: Source
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
    seen = Seen(run.source()) if seen is None else seen
    as_built, as_kept = _keys(run)
    built = seen.built.get(as_built) or _build(run, seen.source)
    model, trunk, quantised, caft, heads = built
    wiring = caft.model_dump(include={"head_input", "head_norm"})
    run = dataclasses.replace(run, caft=run.caft.model_copy(update=wiring))
    shards = gpus if run.sharded else 1

    # Parameters are counted first: the forward pass leaves fake tensors in the model.
    base = stands(run, model, quantised, shards)
    added = stands(run, heads, quantised, shards)
    base_parameters = _count(model)
    parameters = _count(heads)
    trained = sum(map(Tensor.numel, _trained(heads)))
    unembedding = sum(map(_bytes, _trained(trunk.unembedding)))
    gathered = gathered_by_fsdp(trunk, model, quantised) if shards > 1 else 0.0
    plain, one_head, saved = multiply_adds(run, trunk, heads, supervised)

    kept, guesses = _forward_pass(run, seen, as_built, as_kept, built)
    base = _with_activations(base, run, kept)
    loss = _next_token_loss(run, trunk)
    loss_with_heads = loss
    number = 0
    how = "none"
    if heads is not None:
        number = len(heads)
        how = heads.how
        logits = min(LOGITS_AT_A_TIME[device], supervised * run.tokens * trunk.vocab_size)
        chunk = logits * BYTES_A_LOGIT + unembedding
        activations, work = _heads_pass(run, kept, supervised, unembedding, chunk)
        added = dataclasses.replace(added, activations=activations, work=work)
        if run.fuses:
            fused = supervised * kept.hidden + unembedding
            loss_with_heads = NextTokenLoss(fused, fused + chunk)
    ratio = (plain - saved + number * one_head) / plain
    ratio_drawn = None
    if run.caft.heads_per_step is not None:
        ratio_drawn = (plain - saved + expected_heads(run.caft) * one_head) / plain
    return Plan(
        run=run,
        model=f"{run.model} ({trunk.model.config.model_type})",
        base_parameters=base_parameters,
        heads=number,
        parameters=parameters,
        trained=trained,
        how=how,
        base=base,
        added=added,
        losses=(loss, loss_with_heads),
        gathered=gathered,
        # On a GPU torch's own AdamW updates all parameters together and needs a copy of them,
        # unless it is fused.
        copies=int(run.optimizer == "adamw_torch" and device != "cpu"),
        ratio=ratio,
        ratio_drawn=ratio_drawn,
        notes=[
            *_notes(run, gpus, trunk, seen.source),
            *optimizer_states(run.optimizer)[1],
            *guesses,
        ],
    )


def _build(run: Run, source: Source) -> Built:
    model, trunk, quantised = build_model(run, source)
    caft = _checked(run, trunk)
    heads = None
    if caft.beta != 0:
        heads = build_heads(model, trunk, caft, seed=0)
    return model, trunk, quantised, caft, heads


def _forward_pass(
    run: Run,
    seen: Seen,
    as_built: str,
    as_kept: str,
    built: Built,
) -> tuple[Kept, list[str]]:
    """Return what a forward pass keeps, and notes on estimates; computed once.

    Only a model that it was not computed with can be used again.
    """
    if as_kept in seen.kept:
        seen.built[as_built] = built
        return seen.kept[as_kept]
    seen.built.pop(as_built, None)
    model, trunk, _, _, heads = built
    seen.kept[as_kept] = keeps(model, trunk, heads, run.rows, run.length, run.dtype)
    return seen.kept[as_kept]


def _with_activations(
    base: Share,
    run: Run,
    kept: Kept,
) -> Share:
    if not run.checkpointing:
        return dataclasses.replace(base, activations=kept.base)
    # Each layer keeps its input only, and is recomputed when its turn comes.
    inputs = kept.base - sum(kept.layers) + len(kept.layers) * kept.hidden
    return dataclasses.replace(base, activations=inputs, work=max(kept.layers))


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
    run: Run,
    module: nn.Module | None,
    quantised: dict[Tensor, float],
    shards: int,
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
    trained = _trained(module)
    weights = sum(quantised.get(p, _bytes(p)) for p in parameters)
    gradients = sum(map(_bytes, trained))
    states = sum(values * p.numel() * (each or p.itemsize) for p in trained)
    return Share(
        weights=weights / shards,
        gradients=gradients / shards,
        states=states / shards,
    )


def gathered_by_fsdp(
    trunk: Trunk,
    model: nn.Module,
    quantised: dict[Tensor, float],
) -> float:
    """Return the unsharded bytes on a GPU: two layers at a time, and the parameters outside of the
    layers with their gradients, during the complete step."""
    in_layers: set[Tensor] = set()
    largest = 0.0
    for layer in trunk.layers:
        parameters = list(layer.parameters())
        in_layers |= set(parameters)
        largest = max(largest, sum(quantised.get(p, _bytes(p)) for p in parameters))
    others = [p for p in model.parameters() if p not in in_layers]
    outside = sum(_bytes(p) * (1 + p.requires_grad) for p in others)
    return outside + 2 * largest


def _checked(run: Run, trunk: Trunk) -> CAFTConfig:
    """Return the `caft:` block with its wiring filled in, after checking local heads against the
    model."""
    name = run.caft.heads
    record = None
    # Heads on the Hub are not read: no connection is needed for them.
    if name is not None and (Path(name).exists() or name.startswith((".", "/", "~"))):
        folder = HeadsFolder.open(name)
        folder.refuse_other_model(run.caft, trunk.model.config)
        record = folder.record
    return resolve_wiring(run.caft, record)


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.itemsize


def _trained(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else [p for p in module.parameters() if p.requires_grad]


def _count(module: nn.Module | None) -> int:
    """Return the number of parameters, without those of LoRA."""
    if module is None:
        return 0
    return sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)


# -- memory of a forward pass ----------------------------------------------------------------------


def _heads_pass(
    run: Run,
    kept: Kept,
    supervised: float,
    unembedding: float,
    chunk: float,
) -> tuple[float, float]:
    """Return the bytes that the heads keep for the backward pass, and those that they need
    temporarily.

    The loss computes its gradients in the forward pass and keeps them: those of its hidden states
    and, if the unembedding trains, those of the unembedding (once for all heads).
    """
    norm = kept.norm if run.caft.head_norm else 0
    read = supervised * (kept.hidden + norm)
    # Its pointwise parts (the MLP) run at supervised positions only.
    itself = kept.head - (1 - supervised) * kept.pointwise
    if run.checkpointing:  # heads share the last layer's input, which is counted there
        kept_by_all = run.heads_at_once * read
        return kept_by_all + unembedding, max(chunk, itself)
    kept_by_all = run.heads_at_once * (read + itself)
    return kept_by_all + unembedding, chunk


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
    run: Run,
    trunk: Trunk,
    heads: AuxiliaryHeads | None,
    supervised: float,
) -> tuple[float, float, float]:
    """Return the multiplications of one token's forward and backward pass: those of the run without
    heads, of one head, and those that `caft.fused_loss` saves.

    A matrix needs as many multiplications as it has weights in the forward pass, as many for its
    input's gradient and, if it trains, for its own. Gradient checkpointing runs a layer's forward
    pass twice. Attention scores and sums need 2 T h in the forward pass and twice that in the
    backward pass.
    """
    again = int(run.checkpointing)
    experts = used_experts(trunk.model.config.get_text_config())
    scores = 2 * run.length * trunk.hidden_size * (3 + again)  # attention scores and sums

    def layer_products(layer: nn.Module) -> float:
        return matrix_products(layer, experts, again) + has_attention(layer) * scores

    unembedding = matrix_products(trunk.unembedding, experts, 0)
    plain = sum(map(layer_products, trunk.layers)) + unembedding
    if heads is None:
        return plain, 0.0, 0.0
    head = heads.layers[0]
    pointwise = sum(matrix_products(part, experts, again) for part in pointwise_parts(head))
    everywhere = layer_products(head) - pointwise
    saved = 0.0
    if run.fuses and run.builds_logits:
        saved = (1 - supervised) * unembedding
    return plain, everywhere + supervised * (pointwise + unembedding), saved


def used_experts(config: PretrainedConfig) -> float:
    """Return the fraction of its experts that a mixture uses for one token; 1 for other models."""
    counts = [getattr(config, key, None) for key in EXPERTS]
    total = next(filter(None, counts), None)
    active = getattr(config, ACTIVE, None)
    return active / total if active and total else 1.0


def matrix_products(
    module: nn.Module,
    experts: float,
    again: int,
) -> float:
    """Return the multiplications of a module's matrices for one token.

    Args:
        module: a layer, or a part of the model.
        experts: the fraction of its experts that a token uses.
        again: 1 if the forward pass runs twice, else 0.
    """
    products = 0.0
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            used = experts if re.search(r"(^|\.)experts\.", name) else 1
            # The forward pass, the input's gradient, the matrix's own if it trains.
            passes = 2 + parameter.requires_grad + again
            products += used * parameter.numel() * passes
    return products


def has_attention(layer: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in layer.modules())


def expected_heads(caft: CAFTConfig) -> float:
    """Return the expected number of different heads in a forward pass, drawn with replacement by
    alpha^k."""
    if caft.heads_per_step is None:
        return caft.num_heads
    weights = [caft.alpha**k for k in range(caft.num_heads)]
    total = sum(weights)
    expected = 0.0
    for weight in weights:
        never_drawn = (1 - weight / total) ** caft.heads_per_step
        expected += 1 - never_drawn
    return expected


def _notes(
    run: Run,
    gpus: int,
    trunk: Trunk,
    source: Source,
) -> list[str]:
    notes = list(run.notes)
    if run.caft.beta == 0:
        notes.append("caft.beta is 0: no heads are built, so nothing is added to the run.")
    if run.sharded and gpus == 1:
        notes.append("The YAML shards with FSDP: give the number of GPUs with --gpus.")
    if getattr(trunk.model.config, "quantization_config", None):
        notes.append("The base model's files are quantised, but it is counted as unquantised.")
    if source.base != source.name:
        notes.append(f"{source.key} is an adapter: counted as its base model, {source.base}.")
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

"""`caft plan`: what auxiliary heads will add to a run, from an Axolotl YAML and the base model's config alone.

No weight is loaded and nothing is trained. The model is built without memory for its weights, so that parameters are
counted, whatever the architecture, and so is what a forward pass keeps for the backward pass (kept.py).
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from caft_plugin.checkpoint import check_record, locate_heads, read_record, resolve_wiring
from caft_plugin.config import CAFTConfig, ConfigError, shown
from caft_plugin.heads import AuxiliaryHeads, Trunk, build_heads, find_trunk, pointwise_parts
from caft_plugin.importing import empty_trunk, first_line
from caft_plugin.kept import Kept, keeps, layers_of
from caft_plugin.loss import LOGITS_AT_A_TIME

GB = 1e9
# Cross-entropy in float32 holds, at its worst moment, log-probabilities, their gradient and that of the logits.
BYTES_A_LOGIT = 12
# bitsandbytes in 4 bits: a scale of 8 bits for each 64 weights, and one of float32 for each 256 of these.
QUANTISED = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}
# What an optimizer keeps for each trained parameter: values, and bytes of one (None: as many as the parameter's own).
# The first pattern that fits the whole name counts.
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
# Keys of a YAML with which Axolotl does not build the logits of the whole batch.
WITHOUT_LOGITS = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")
ACTIVE = "num_experts_per_tok"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclasses.dataclass(frozen=True)
class Run:
    """What of an Axolotl YAML bears on memory and time. `rows` of `length` tokens are in one pass of one GPU."""

    keys: dict[str, Any]
    caft: CAFTConfig
    dtype: torch.dtype
    rows: int
    length: int
    accumulation: int
    lora: bool
    bits: int
    checkpointing: bool
    sharded: bool
    optimizer: str

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def builds_logits(self) -> bool:
        """Whether the framework's own loss has the logits of the whole batch."""
        return not any(self.keys.get(key) for key in WITHOUT_LOGITS)

    @property
    def fuses(self) -> bool:
        """Whether, with heads, the plugin computes that loss."""
        return self.caft.beta != 0 and self.caft.fused_loss != "off"

    @property
    def heads_at_once(self) -> int:
        """The most heads that run in one pass."""
        drawn = self.caft.heads_per_step
        return self.caft.num_heads if drawn is None else min(drawn, self.caft.num_heads)


@dataclasses.dataclass(frozen=True)
class Share:
    """Bytes on one GPU, of the base model or of the heads.

    `activations` are kept from the forward for the backward pass; `work` is what computing takes for a while (a layer
    that is computed again, a chunk of logits).
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
    """Bytes of the next-token loss on one GPU: `kept` while the heads run, `peak` at its own worst moment."""

    kept: float
    peak: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What heads add to a run. Memory in bytes on one GPU, time as a ratio to the run without heads.

    `losses` are those of the run without and with heads; `gathered` is what FSDP has whole for a while, `copies` what
    the optimizer takes while it steps, for each byte of gradients.
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
        """Of the run without heads, in bytes."""
        return self._peak(Share(), self.losses[0])

    @property
    def peak(self) -> float:
        """Of the run with heads, in bytes."""
        return self._peak(self.added, self.losses[1])

    def _peak(self, added: Share, loss: NextTokenLoss) -> float:
        """The worst of four moments: the heads run; the framework's loss goes backward, the heads' pass being over; the
        layers go backward; the optimizer steps. From one pass to the next of a window gradients stay."""
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
        return base.weights + base.states + added.weights + added.states + self.gathered + max(moments)


def read_keys(file: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        ConfigError: it is not a file, or not YAML, or holds no keys.
    """
    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"plan: {file} cannot be read ({first_line(error)}). CONFIG takes an Axolotl YAML."
        ) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"plan: {file} is not YAML ({reason}). CONFIG takes an Axolotl YAML.") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"plan: {file} holds {shown(keys)}, but CONFIG takes an Axolotl YAML, keys and values.")
    return keys


def read_run(keys: dict[str, Any]) -> Run:
    """What the keys of an Axolotl YAML say, left-out keys being what Axolotl takes them to be.

    Raises:
        ConfigError: there is no model, no `caft:` block, or a value that cannot be followed.
    """
    if not isinstance(keys.get("base_model"), str):
        raise ConfigError(
            f"base_model: got {shown(keys.get('base_model'))}, but it takes a model folder or a Hub id. Add the key."
        )
    if "caft" not in keys:
        raise ConfigError(
            "plan: the YAML has no `caft:` block, so it is a plain run and nothing is added to it. Add a line `caft:` "
            "(nothing below it is needed) and `plugins: [caft_plugin]`."
        )
    adapter = keys.get("adapter") or None
    if adapter not in (None, "lora", "qlora"):
        raise ConfigError(f"adapter: got {shown(adapter)}, but plan takes one of lora, qlora, or none.")
    if keys.get("bf16", "auto") or keys.get("bfloat16"):
        dtype = torch.bfloat16
    else:
        dtype = torch.float16 if any(map(keys.get, ("fp16", "float16", "load_in_8bit"))) else torch.float32
    return Run(
        keys=keys,
        caft=CAFTConfig.read(keys["caft"]),
        dtype=dtype,
        rows=_whole(keys, "micro_batch_size", 1),
        length=_whole(keys, "sequence_len", 512),
        accumulation=_whole(keys, "gradient_accumulation_steps", 1),
        lora=adapter is not None,
        bits=4 if keys.get("load_in_4bit") else 8 if keys.get("load_in_8bit") else 16,
        checkpointing=bool(keys.get("gradient_checkpointing")),
        sharded=bool(keys.get("fsdp_config") or keys.get("fsdp")),
        optimizer=str(keys.get("optimizer") or "adamw_torch_fused"),
    )


def _whole(keys: dict[str, Any], key: str, default: int) -> int:
    value = keys.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: got {shown(value)}, but it takes a whole number at least 1.")
    return value


def make_plan(keys: dict[str, Any], gpus: int = 1, supervised: float = 0.3, device: str = "accelerator") -> Plan:
    """What heads will add to the run that the keys of an Axolotl YAML describe.

    Args:
        keys: as `read_keys` has them.
        gpus: over how many FSDP shards; without FSDP every GPU has everything.
        supervised: share of the tokens that are targets, 0 to 1.
        device: `accelerator` or `cpu`, which differ in the size of a chunk of logits.

    Raises:
        ConfigError: a key that cannot be followed, a model that cannot be built from its config, heads that do not fit.
    """
    run = read_run(keys)
    model, trunk, quantised = build_model(run)
    run = dataclasses.replace(run, caft=_checked(run, trunk))
    heads = None if run.caft.beta == 0 else build_heads(model, trunk, run.caft, seed=0)
    shards = gpus if run.sharded else 1
    plain, head, saved = multiply_adds(run, trunk, heads, supervised)
    all_heads, drawn = (0.0, 0.0) if heads is None else (len(heads), expected_heads(run.caft))
    unembedding = sum(_bytes(p) for p in trunk.unembedding.parameters() if p.requires_grad)
    standing = [stands(run, module, quantised, shards) for module in (model, heads)]
    counts = [0, 0] if heads is None else [_count(heads), sum(p.numel() for p in heads.parameters() if p.requires_grad)]
    base_parameters, gathered = _count(model), gathered_by_fsdp(trunk, model, quantised) if shards > 1 else 0.0

    kept, of_activations = keeps(
        model, trunk, heads, run.rows, run.length, run.dtype
    )  # last: the model holds fake tensors from here on
    base = dataclasses.replace(standing[0], activations=kept.base)
    if run.checkpointing:
        inputs = kept.base - sum(kept.layers) + len(kept.layers) * kept.hidden
        base = dataclasses.replace(base, activations=inputs, work=max(kept.layers))
    added, losses = standing[1], (_next_token_loss(run, trunk),) * 2
    if heads is not None:
        chunk = min(LOGITS_AT_A_TIME[device], supervised * run.tokens * trunk.vocab_size) * BYTES_A_LOGIT + unembedding
        activations, work = _heads_pass(run, kept, supervised, unembedding, chunk)
        added = dataclasses.replace(added, activations=activations, work=work)
        if run.fuses:
            fused = supervised * kept.hidden + unembedding
            losses = (losses[0], NextTokenLoss(fused, fused + chunk))
    return Plan(
        run=run,
        model=f"{keys['base_model']} ({trunk.model.config.model_type})",
        base_parameters=base_parameters,
        heads=int(all_heads),
        parameters=counts[0],
        trained=counts[1],
        how="none" if heads is None else heads.how,
        base=base,
        added=added,
        losses=losses,
        gathered=gathered,
        # torch's own AdamW steps all parameters together on a GPU and has a copy of them meanwhile, unless it is fused
        copies=int(run.optimizer == "adamw_torch" and device != "cpu"),
        ratio=(plain - saved + all_heads * head) / plain,
        ratio_drawn=None if run.caft.heads_per_step is None else (plain - saved + drawn * head) / plain,
        notes=[*_notes(run, gpus, trunk), *optimizer_states(run.optimizer)[1], *of_activations],
    )


def stands(run: Run, module: nn.Module | None, quantised: dict[Tensor, float], shards: int) -> Share:
    """Weights, gradients and optimizer states of a module on each of `shards` GPUs."""
    values, each = optimizer_states(run.optimizer)[0]
    parameters = [] if module is None else list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Share(
        weights=sum(quantised.get(p, _bytes(p)) for p in parameters) / shards,
        gradients=sum(map(_bytes, trained)) / shards,
        states=sum(values * p.numel() * (each or p.itemsize) for p in trained) / shards,
    )


def gathered_by_fsdp(trunk: Trunk, model: nn.Module, quantised: dict[Tensor, float]) -> float:
    """Bytes of what is whole on a GPU: two layers at a time; and what lies outside of the layers, with its gradients,
    all through the step."""
    layers = layers_of(trunk)
    in_layers = {p for layer in layers for p in layer.parameters()}
    outside = sum(_bytes(p) * (1 + p.requires_grad) for p in model.parameters() if p not in in_layers)
    return outside + 2 * max(sum(quantised.get(p, _bytes(p)) for p in layer.parameters()) for layer in layers)


def build_model(run: Run) -> tuple[nn.Module, Trunk, dict[Tensor, float]]:
    """The model as Axolotl would have it, without memory for its weights; its trunk; and the bytes of each parameter
    that is quantised."""
    keys = run.keys
    loading: dict[str, Any] = {"dtype": run.dtype}
    if keys.get("attn_implementation") == "eager":
        loading["attn_implementation"] = "eager"
    name = keys.get("base_model_config") or keys["base_model"]
    trunk = empty_trunk(name, "base_model", keys.get("revision_of_model"), **loading)
    model: nn.Module = trunk.model
    quantised = {}
    if run.bits < 16:
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not trunk.unembedding:
                quantised[module.weight] = module.weight.numel() * QUANTISED[run.bits]
    if run.lora:
        model.requires_grad_(False)
        model = with_adapter(run, model)
        return model, find_trunk(model), quantised
    cast = not run.sharded and not keys.get("cut_cross_entropy")
    if run.half and cast and keys.get("attn_implementation") in (None, "eager", "sdpa"):
        for part, module in model.named_modules():  # Axolotl keeps these in float32 while the base trains fully
            if "norm" in part or module in (trunk.unembedding, trunk.model.get_input_embeddings()):
                module.float()
    patterns = keys.get("unfrozen_parameters")
    if patterns:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        names = [re.compile(re.sub(r"\.(?!\+)", r"\.", re.sub(r"\[[0-9:]*\]$", "", p))) for p in patterns]
        for part, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.match(part) for name in names))
    return model, trunk, quantised


def with_adapter(run: Run, model: nn.Module) -> nn.Module:
    """The model with the YAML's LoRA adapter, in float32 over a half-precision base, as PEFT has it."""
    keys = run.keys
    targets = keys.get("lora_target_modules") or []
    if keys.get("lora_target_linear") or not targets:
        targets = "all-linear"
    rank = _whole(keys, "lora_r", 8)
    try:
        settings = LoraConfig(
            r=rank,
            lora_alpha=keys.get("lora_alpha") or 16,
            lora_dropout=keys.get("lora_dropout") or 0.0,
            target_modules=targets,
            modules_to_save=keys.get("lora_modules_to_save") or None,
            layers_to_transform=keys.get("peft_layers_to_transform"),
            use_dora=bool(keys.get("peft_use_dora")),
            task_type="CAUSAL_LM",
        )
        with torch.device("meta"):
            return get_peft_model(model, settings)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"adapter: no LoRA adapter can be put on {keys['base_model']} ({first_line(error)}). Check lora_r, "
            "lora_target_modules and lora_target_linear."
        ) from error


def _checked(run: Run, trunk: Trunk) -> CAFTConfig:
    """The `caft:` block with its wiring filled in; heads that lie on this machine are held against the model."""
    name, record = run.caft.heads, None
    if name is not None and (Path(name).exists() or name.startswith((".", "/", "~"))):
        folder = locate_heads(name)
        record = read_record(folder)
        check_record(record, folder, run.caft, trunk.model.config)
    return resolve_wiring(run.caft, record)


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.itemsize


def _count(module: nn.Module) -> int:
    """Parameters, without those of LoRA."""
    return sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)


# -- memory of a pass ----------------------------------------------------------------------------------


def _heads_pass(run: Run, kept: Kept, supervised: float, unembedding: float, chunk: float) -> tuple[float, float]:
    """Bytes that the heads keep for the backward pass, and what they take for a while.

    The loss takes its gradients in the forward pass and keeps them: of the hidden states that it reads, and of the
    unembedding (once, for all heads) if that trains.
    """
    read = supervised * (kept.hidden + (kept.norm if run.caft.head_norm else 0))
    itself = kept.head - (1 - supervised) * kept.pointwise
    if run.checkpointing:  # heads share one input, which is the last layer's and counted there
        return run.heads_at_once * read + unembedding, max(chunk, itself)
    return run.heads_at_once * (read + itself) + unembedding, chunk


def _next_token_loss(run: Run, trunk: Trunk) -> NextTokenLoss:
    """The framework's own. Kept: logits, which are part of the model's output, in float32 from accelerate, and
    log-probabilities."""
    logits = run.tokens * trunk.vocab_size if run.builds_logits else 0
    return NextTokenLoss(logits * 8, logits * BYTES_A_LOGIT)


# -- optimizer -----------------------------------------------------------------------------------------


def optimizer_states(name: str) -> tuple[tuple[int, float | None], list[str]]:
    """Values that an optimizer keeps for each trained parameter, the bytes of one (None: the parameter's own), and what
    has to be said about it."""
    for pattern, values, each in OPTIMIZERS:
        if re.fullmatch(pattern, name):
            said = []
            if values == 0:
                said = [f"optimizer {name}: counted without states (no momentum; Adafactor has row and column sums)."]
            elif name.startswith("paged"):
                said = [f"optimizer {name}: its states can move to host memory; here they are counted on the GPU."]
            return (values, each), said
    return ADAMW, [f"optimizer {name}: not known here, counted as AdamW: two values a parameter, in its dtype."]


# -- time ----------------------------------------------------------------------------------------------


def multiply_adds(
    run: Run, trunk: Trunk, heads: AuxiliaryHeads | None, supervised: float
) -> tuple[float, float, float]:
    """Multiplications of one token's forward and backward pass: of the run without heads, of one head, and those that
    `caft.fused_loss` saves.

    A matrix takes its number of weights for the forward pass, as many for its input's gradient and, if it trains, for
    its own; with gradient checkpointing the forward pass of a layer comes twice. Attention scores and sums take 2 T h
    in the forward and twice that in the backward pass.
    """
    config = trunk.model.config.get_text_config()
    again = int(run.checkpointing)
    total = next((n for key in EXPERTS if (n := getattr(config, key, None))), None)
    active = getattr(config, ACTIVE, None) if total else None

    def of_weights(module: nn.Module, again: int) -> float:
        products = 0.0
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                used = active / total if active and total and re.search(r"(^|\.)experts\.", name) else 1
                products += used * parameter.numel() * (2 + parameter.requires_grad + again)
        return products

    def attention(layer: nn.Module) -> float:
        attends = any("attention" in type(m).__name__.lower() for m in layer.modules())
        return attends * 2 * run.length * trunk.hidden_size * (3 + again)

    unembedding = of_weights(trunk.unembedding, 0)
    plain = sum(of_weights(layer, again) + attention(layer) for layer in layers_of(trunk)) + unembedding
    if heads is None:
        return plain, 0.0, 0.0
    head = heads.layers[0]
    pointwise = sum(of_weights(part, again) for part in pointwise_parts(head))
    everywhere = of_weights(head, again) - pointwise + attention(head)
    saved = (1 - supervised) * unembedding if run.fuses and run.builds_logits else 0.0
    return plain, everywhere + supervised * (pointwise + unembedding), saved


def expected_heads(caft: CAFTConfig) -> float:
    """How many different heads run in a pass, on average: draws are with replacement, in proportion to alpha^k."""
    if caft.heads_per_step is None:
        return caft.num_heads
    weights = [caft.alpha**k for k in range(caft.num_heads)]
    return sum(1 - (1 - weight / sum(weights)) ** caft.heads_per_step for weight in weights)


# -- words ---------------------------------------------------------------------------------------------


def _notes(run: Run, gpus: int, trunk: Trunk) -> list[str]:
    keys, notes = run.keys, []
    if run.caft.beta == 0:
        notes.append("caft.beta is 0: no heads are built, this is a plain run and nothing is added.")
    if keys.get("bf16", "auto") == "auto":
        notes.append("bf16 is auto: counted as true.")
    if run.sharded and gpus == 1:
        notes.append("The YAML shards by FSDP: say over how many GPUs with --gpus.")
    if not run.sharded and keys.get("deepspeed"):
        notes.append("deepspeed: counted without sharding.")
    if getattr(trunk.model.config, "quantization_config", None):
        notes.append("The base model's files are quantised; it is counted as if they were not.")
    heads = run.caft.heads
    if heads is not None and not Path(heads).exists():
        notes.append(f"caft.heads: {heads} was not looked at; its head_norm may differ from the default.")
    return notes


def parse_memory(text: str) -> float:
    """Bytes, from '24GB', '24 GiB' or '24' (which is GB).

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"--gpu-memory: got {shown(text)}, but it takes gigabytes above 0, such as 24GB, 24GiB or 24."
        )
    return float(found[1]) * (2**30 if (found[2] or "").lower() == "gib" else GB)


def as_text(plan: Plan) -> str:
    """A plan in words and a table."""
    run = plan.run
    bits = f", in {run.bits} bits" if run.bits < 16 else ""
    heads = "none"
    if plan.heads:
        heads = f"{plan.heads}, {millions(plan.parameters)} parameters, {millions(plan.trained)} trained ({plan.how})"
    facts = {
        "Base model": f"{plan.model}, {millions(plan.base_parameters)} parameters, {_name(run.dtype)}{bits}",
        "Heads": heads,
        "Pass": f"{run.rows} x {run.length} tokens a GPU, {'' if run.checkpointing else 'no '}gradient checkpointing",
        "Step time": f"{plan.ratio:.2f} times the plain run's",
    }
    if plan.ratio_drawn is not None:
        facts["Step time"] += (
            f" with all heads, {plan.ratio_drawn:.2f} times with heads_per_step: {run.caft.heads_per_step}"
        )
    lines = [f"{key:<12}{value}" for key, value in facts.items()]
    added = plan.added
    rows = [
        ("weights", added.weights),
        ("gradients", added.gradients),
        ("optimizer states", added.states),
        ("activations kept", added.activations),
        ("logits or a layer at work", added.work),
        ("all of it", added.total),
        ("the run's peak grows by", plan.peak - plan.plain_peak),
    ]
    lines += ["", "The heads add, in GB on each GPU"]
    lines += [f"  {name:<29}{amount / GB:>9.2f}" for name, amount in rows]
    return "\n".join([*lines, *([""] if plan.notes else []), *plan.notes])


def run_as_text(plan: Plan) -> str:
    """The memory of the whole run on one GPU, without and with heads, as a table."""
    base, added, none = plan.base, plan.added, 0.0
    rows = [
        ("base and adapter: weights", base.weights, base.weights),
        ("  gradients", base.gradients, base.gradients),
        ("  optimizer states", base.states, base.states),
        ("  activations", base.activations + base.work, base.activations + base.work),
        ("next-token loss", plan.losses[0].peak, plan.losses[1].peak),
        ("heads: weights", none, added.weights),
        ("  gradients", none, added.gradients),
        ("  optimizer states", none, added.states),
        ("  activations and loss", none, added.activations + added.work),
        ("gathered by FSDP", plan.gathered, plan.gathered),
        ("optimizer, while it steps", plan.copies * base.gradients, plan.copies * (base.gradients + added.gradients)),
        ("peak", plan.plain_peak, plan.peak),
    ]
    lines = [f"{'The whole run on one GPU, in GB':<31}    plain  with heads"]
    lines += [f"  {name:<29}{a / GB:>9.2f}{b / GB:>12.2f}" for name, a, b in rows if b or name == "peak"]
    return "\n".join([*lines, "Not all of it is alive at once: the peak is the worst moment of a step."])


def verdict(plan: Plan, memory: float, gpus: int, supervised: float) -> str:
    """Whether the run fits into `memory` bytes, and if not, what would help, each with the peak that it leads to."""
    spare = (memory - plan.peak) / GB
    if spare >= 0:
        return (
            f"{memory / GB:.2f} GB: fits, {spare:.2f} GB to spare. CUDA itself takes about 1 GB, and fragmentation "
            "some more; neither is counted."
        )
    lines = [f"{memory / GB:.2f} GB: does not fit, by {-spare:.2f} GB."]
    ways = ways_out(plan, memory, gpus, supervised)
    if ways:
        lines.append("What would help, one at a time, and the peak that it leads to, in GB:")
        lines += [
            f"  {words:<40}{peak / GB:>9.2f}  {'fits' if peak <= memory else 'does not fit'}" for words, peak in ways
        ]
    if plan.heads:
        lines.append("heads_per_step saves time and activations; the heads' weights stay.")
    return "\n".join(lines)


def ways_out(plan: Plan, memory: float, gpus: int, supervised: float) -> list[tuple[str, float]]:
    """Changes to the YAML, and the peak in bytes that each leads to; those alone that lower it."""
    keys, run = plan.run.keys, plan.run
    block = run.caft.model_dump(exclude_unset=True)

    def peak(**changes: Any) -> float:
        return make_plan({**keys, **changes}, gpus, supervised).peak

    def with_heads(**changes: Any) -> float:
        return peak(caft={**block, **changes})

    ways = []
    if not run.checkpointing:
        ways.append(("gradient_checkpointing: true", peak(gradient_checkpointing=True)))
    if run.rows > 1:
        ways.append(("micro_batch_size: 1", peak(micro_batch_size=1)))
    ways.append((f"sequence_len: {run.length // 2}", peak(sequence_len=run.length // 2)))
    if run.builds_logits and not run.fuses:
        ways.append(("cut_cross_entropy: true", peak(cut_cross_entropy=True)))
    if run.lora and run.bits == 16:
        ways.append(("adapter: qlora, load_in_4bit: true", peak(adapter="qlora", load_in_4bit=True)))
    if not re.search("8bit|4bit", run.optimizer):
        ways.append(("optimizer: adamw_bnb_8bit", peak(optimizer="adamw_bnb_8bit")))
    if run.sharded:
        ways.append((f"--gpus {2 * gpus}", make_plan(keys, 2 * gpus, supervised).peak))
    if plan.heads:
        if run.builds_logits and not run.fuses:
            ways.append(("caft.fused_loss: on", with_heads(fused_loss="on")))
        if plan.how != "frozen":
            ways.append(("caft.train_heads: frozen", with_heads(train_heads="frozen")))
        if plan.how == "full":
            ways.append(("caft.train_heads: lora", with_heads(train_heads="lora")))
        if plan.heads > 1:
            counts = range(1, plan.heads)
            fit = bisect.bisect(counts, memory, key=lambda count: with_heads(num_heads=count))
            fewer = counts[max(fit - 1, 0)]
            ways.append((f"caft.num_heads: {fewer}", with_heads(num_heads=fewer)))
        ways.append(("no `caft:` block", plan.plain_peak))
    return [(words, to) for words, to in ways if to < plan.peak]


def millions(count: int) -> str:
    """A number of parameters, short: 8.03B, 872.4M, 41.0K."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.{2 if unit == 'B' else 1}f}{unit}"
    return str(count)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

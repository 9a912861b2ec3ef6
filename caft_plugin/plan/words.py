"""A plan in words and tables: what heads add, the whole run, whether it fits and what would help."""

from __future__ import annotations

import bisect
import dataclasses
import re
from typing import Any

import torch

from caft_plugin.config import CAFTConfig, ConfigError, shown
from caft_plugin.plan.estimate import Plan, make_plan

GB = 1e9


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
    """Changes to an Axolotl YAML, and the peak in bytes that each leads to; those alone that lower it."""
    run = plan.run
    block = run.caft.model_dump(exclude_unset=True)

    def peak(**changes: Any) -> float:
        return make_plan(dataclasses.replace(run, **changes), gpus, supervised).peak

    def with_heads(**changes: object) -> float:
        return peak(caft=CAFTConfig.read({**block, **changes}))

    ways = []
    if not run.checkpointing:
        ways.append(("gradient_checkpointing: true", peak(checkpointing=True)))
    if run.rows > 1:
        ways.append(("micro_batch_size: 1", peak(rows=1)))
    ways.append((f"sequence_len: {run.length // 2}", peak(length=run.length // 2)))
    if run.builds_logits and not run.fuses:
        ways.append(("cut_cross_entropy: true", peak(builds_logits=False, float32_parts=False)))
    if run.lora is not None and run.bits == 16:
        ways.append(("adapter: qlora, load_in_4bit: true", peak(bits=4)))
    if not re.search("8bit|4bit", run.optimizer):
        ways.append(("optimizer: adamw_bnb_8bit", peak(optimizer="adamw_bnb_8bit")))
    if run.sharded:
        ways.append((f"--gpus {2 * gpus}", make_plan(run, 2 * gpus, supervised).peak))
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

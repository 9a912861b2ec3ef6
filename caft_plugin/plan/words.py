"""A plan as text and tables: what heads add, the memory of the run, whether it fits and which
changes make it fit."""

from __future__ import annotations

import re

import torch

from caft_plugin.errors import ConfigError, asked_as, shown
from caft_plugin.plan.estimate import Plan
from caft_plugin.plan.ways_out import GB, Change, WaysOut


def parse_memory(text: str) -> float:
    """Return the bytes of '24GB', '24 GiB' or '24' (which is GB).

    Raises:
        ConfigError: `text` is anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"{asked_as('gpu_memory')}: got {shown(text)}, but it accepts gigabytes above 0, such"
            " as 24GB, 24GiB or 24."
        )
    return float(found[1]) * (2**30 if (found[2] or "").lower() == "gib" else GB)


def as_text(plan: Plan) -> str:
    """Return what the heads add, as text and a table."""
    run = plan.run
    bits = f", in {run.bits} bits" if run.bits < 16 else ""
    heads = "none"
    if plan.heads:
        heads = (
            f"{plan.heads}, {millions(plan.parameters)} parameters, {millions(plan.trained)}"
            f" trained ({plan.how})"
        )
    checkpointing = f"{'' if run.checkpointing else 'no '}gradient checkpointing"
    facts = {
        "Base model": (
            f"{plan.model}, {millions(plan.base_parameters)} parameters, {_name(run.dtype)}{bits}"
        ),
        "Heads": heads,
        "Micro-batch": f"{run.rows} x {run.length} tokens per GPU, {checkpointing}",
        "Step time": f"{plan.ratio:.2f} times that of the run without heads",
    }
    if plan.ratio_drawn is not None:
        facts["Step time"] += (
            f" with all heads, {plan.ratio_drawn:.2f} times with heads_per_step:"
            f" {run.caft.heads_per_step}"
        )
    lines = [f"{key:<13}{value}" for key, value in facts.items()]
    added = plan.added
    rows = [
        ("weights", added.weights),
        ("gradients", added.gradients),
        ("optimizer states", added.states),
        ("activations kept", added.activations),
        ("logits or a recomputed layer", added.work),
        ("total", added.total),
        ("increase of the run's peak", plan.peak - plan.plain_peak),
    ]
    lines += ["", "The heads add, in GB per GPU"]
    lines += [f"  {name:<29}{amount / GB:>9.2f}" for name, amount in rows]
    return "\n".join([*lines, *([""] if plan.notes else []), *plan.notes])


def run_as_text(plan: Plan) -> str:
    """Return the memory of the complete run on one GPU, without and with heads, as a table."""
    base = plan.base
    added = plan.added
    none = 0.0
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
        (
            "optimizer, during its step",
            plan.copies * base.gradients,
            plan.copies * (base.gradients + added.gradients),
        ),
        ("peak", plan.plain_peak, plan.peak),
    ]
    lines = [f"{'The complete run, in GB per GPU':<31}    plain  with heads"]
    lines += [
        f"  {name:<29}{a / GB:>9.2f}{b / GB:>12.2f}" for name, a, b in rows if b or name == "peak"
    ]
    return "\n".join(
        [
            *lines,
            "Not all of it is in memory at the same time: the peak is the maximum during a step.",
        ]
    )


def verdict(
    plan: Plan,
    memory: float,
    gpus: int,
    supervised: float,
) -> str:
    """Say whether the run fits into `memory` bytes and, if not, which changes make it fit.

    Args:
        plan: the run's plan.
        memory: of one GPU, in bytes.
        gpus: number of GPUs over which FSDP shards.
        supervised: fraction of the tokens with a label.
    """
    spare = (memory - plan.peak) / GB
    if spare >= 0:
        return (
            f"{memory / GB:.2f} GB: fits, {spare:.2f} GB to spare. Not counted: about 1 GB for CUDA"
            " itself, and memory fragmentation."
        )
    lines = [f"{memory / GB:.2f} GB: does not fit, {-spare:.2f} GB too much."]
    with WaysOut(plan, memory, gpus, supervised) as ways:
        single = ways.single()
        if single:
            lines.append("Single changes and the peak with each, in GB:")
        for change in single:
            to = ways.peak([change])
            lines.append(
                f"  {change.words:<40}{to / GB:>9.2f}  {'fits' if to <= memory else 'does not fit'}"
            )
        if not any(map(ways.fits, ([change] for change in single))):
            lines.append(together(ways, ways.combination()))
    if plan.heads:
        lines.append(
            "heads_per_step reduces time and activations, but not the memory of the heads' weights."
        )
    return "\n".join(lines)


def together(ways: WaysOut, found: list[Change] | None) -> str:
    if found is None:
        return f"No combination of changes fits: the lowest peak is {ways.lowest / GB:.2f} GB."
    return "\n".join(
        [
            f"The first combination that fits, with a peak of {ways.peak(found) / GB:.2f} GB:",
            *(f"  {change.words}" for change in found),
        ]
    )


def millions(count: int) -> str:
    """Return a short number of parameters: 8.03B, 872.4M, 41.0K."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.{2 if unit == 'B' else 1}f}{unit}"
    return str(count)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

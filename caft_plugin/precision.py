"""Choose bfloat16 or float32 for this machine: many CPUs have no instructions for bfloat16.

python -m caft_plugin.precision     # prints the choice, and the option of `axolotl train` for it
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# oneDNN's query for bfloat16 matrix products: the name in PyTorch 2.13, and the one after it.
QUESTIONS = (("mkldnn", "_is_mkldnn_bf16_supported"), ("onednn", "_is_onednn_bf16_supported"))
# oneDNN also answers yes for plain AVX-512, where it emulates bfloat16 and float32 is faster.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")


def cpu_has_bf16() -> bool:
    """Return True if this CPU has instructions for bfloat16 matrix products that PyTorch uses.

    Without them, one product of the backward pass runs in a plain loop: 34 times as slow as in
    float32, measured on a CPU with AVX2.
    """
    questions = [getattr(getattr(torch.ops, space), name, None) for space, name in QUESTIONS]
    if not any(question() for question in questions if question is not None):
        return False
    has = torch.cpu.get_capabilities()
    return has["architecture"] != "x86_64" or any(has.get(name) for name in INSTRUCTIONS)


def quick_dtype() -> torch.dtype:
    """Return bfloat16 if there is an accelerator or the CPU has instructions for it, else
    float32."""
    return torch.bfloat16 if torch.accelerator.is_available() or cpu_has_bf16() else torch.float32


def asked_dtype(float32: bool) -> torch.dtype:
    """Return the dtype in which a command computes: `quick_dtype`, or float32 if asked for."""
    return torch.float32 if float32 else quick_dtype()


def choice() -> str:
    """Return one line that names `quick_dtype()` and the reason."""
    if quick_dtype() == torch.float32:
        return (
            "computing in float32: this CPU has no bfloat16 instructions, so bfloat16 is about 30"
            " times as slow"
        )
    where = (
        "accelerator"
        if torch.accelerator.is_available()
        else "CPU, which has bfloat16 instructions"
    )
    return f"computing in bfloat16 on the {where}"


def warn_of_slow_bf16(args: TrainingArguments, model: Any) -> None:
    """Warn, once per process, about training in bfloat16 on a CPU without instructions for it.

    `args` are a Trainer's.
    """
    if args.device.type != "cpu" or cpu_has_bf16():
        return
    unquantised = next(model.get_input_embeddings().parameters())
    of_4_bits = [getattr(module, "compute_dtype", None) for module in model.modules()]
    if args.bf16:
        _warn("got bf16: true")
    elif torch.bfloat16 in (unquantised.dtype, *of_4_bits):
        _warn("the model was loaded to compute in bfloat16")


@functools.cache
def _warn(found: str) -> None:
    logger.warning(
        "%s, but this CPU has no bfloat16 instructions: a step takes about 30 times as long as in"
        " float32. Use float32: `bf16: false` in an Axolotl YAML; bf16=False in a Trainer's"
        " arguments, with the model loaded in dtype=torch.float32 (in 4 bits:"
        " bnb_4bit_compute_dtype too); --float32 for `caft pretrain-heads`.",
        found,
    )


if __name__ == "__main__":
    print(f"== {choice()}", file=sys.stderr)  # noqa: T201
    print(f"--bf16={str(quick_dtype() == torch.bfloat16).lower()}")  # noqa: T201

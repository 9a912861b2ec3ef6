"""Whether to compute in bfloat16 here: a CPU needs instructions for it, and many have none.

python -m caft_plugin.precision     # says which, and prints the option of `axolotl train` that asks for it
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

# What asks oneDNN whether it multiplies bfloat16 matrices: in PyTorch 2.13, and as PyTorch has renamed it since.
QUESTIONS = (("mkldnn", "_is_mkldnn_bf16_supported"), ("onednn", "_is_onednn_bf16_supported"))
# oneDNN says yes to AVX-512 alone too, where it has to emulate these and float32 is quicker.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")


def cpu_has_bf16() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices by instructions of this CPU. Where it does not, one of the products
    of a backward pass runs in a plain loop: 34 times as long as in float32, measured with AVX2."""
    questions = [getattr(getattr(torch.ops, space), name, None) for space, name in QUESTIONS]
    if not any(question() for question in questions if question is not None):
        return False
    has = torch.cpu.get_capabilities()
    return has["architecture"] != "x86_64" or any(has.get(name) for name in INSTRUCTIONS)


def quick_dtype() -> torch.dtype:
    """bfloat16 where there is an accelerator or the CPU has instructions for it, else float32."""
    return torch.bfloat16 if torch.accelerator.is_available() or cpu_has_bf16() else torch.float32


def asked_dtype(float32: bool) -> torch.dtype:
    """Return the dtype in which a command computes: `quick_dtype`, or float32 if asked for."""
    return torch.float32 if float32 else quick_dtype()


def choice() -> str:
    """What `quick_dtype` is, and why, in one line."""
    if quick_dtype() == torch.float32:
        return "computing in float32: this CPU has no instructions for bfloat16, which takes about thirty times as long"
    where = "accelerator" if torch.accelerator.is_available() else "CPU, which has instructions for it"
    return f"computing in bfloat16, on the {where}"


def warn_of_slow_bf16(args: TrainingArguments, model: Any) -> None:
    """Warns, once a process, of training in bfloat16 on a CPU without instructions for it. `args` are a Trainer's."""
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
        "%s, but this CPU has no instructions for bfloat16: a step takes about thirty times as long as in float32. "
        "Compute in float32: `bf16: false` in an Axolotl YAML; bf16=False in a Trainer's arguments, and the model "
        "loaded with dtype=torch.float32 (in 4 bits: bnb_4bit_compute_dtype too); --float32 for `caft pretrain-heads`.",
        found,
    )


if __name__ == "__main__":
    print(f"== {choice()}", file=sys.stderr)  # noqa: T201
    print(f"--bf16={str(quick_dtype() == torch.bfloat16).lower()}")  # noqa: T201

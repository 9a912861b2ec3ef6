"""Run an `axolotl` command in this process, without warnings of other packages that do not apply to
the demo.

    python run_axolotl.py train axolotl_configs/quickstart-cpu.yml --launcher=python

They are warnings about GPU kernels, which a CPU does not need, and they look like a broken
installation. Each is named below by its logger and a part of its text; everything else is shown.
"""

from __future__ import annotations

import logging
import sys

# logger: parts of the messages that are left out
LEFT_OUT = {
    "torchao": ("Failed to load ",),  # its CUDA kernels
    # torchao's use of torch
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    # for inference
    "bitsandbytes.backends.cpu.ops": (
        "Failed to load CPU gemm_4bit_forward from kernels-community",
    ),
    "py.warnings": (
        "Skipping publisher trust check for 'kernels-community/quantization-bitsandbytes'",
    ),
    # bfloat16 on a CPU works
    "axolotl.utils.schemas.config": ("AMP is not supported on this GPU",),
}


def leave_out_known_warnings() -> None:
    """Filter the messages of `LEFT_OUT` at the loggers that emit them."""
    for name, parts in LEFT_OUT.items():

        def wanted(record: logging.LogRecord, parts: tuple[str, ...] = parts) -> bool:
            return not any(part in record.getMessage() for part in parts)

        logging.getLogger(name).addFilter(wanted)


if __name__ == "__main__":
    leave_out_known_warnings()
    from axolotl.cli.main import main

    sys.argv[0] = "axolotl"
    main()

"""Run by conftest.py: `axolotl train` for each YAML that is named on standard input, one after the
other.

Each run is a fork of this process, which has imported Axolotl and done nothing else. So a run costs
no imports, and finds no plugin, patched class or random state that another one has left. Generators
are seeded, because Axolotl makes LoRA matrices before it seeds them: runs of this process start
from the same adapter.

What a run prints goes into NAME.log; its exit code is answered on standard output.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

# standard output is for answers alone, whatever is printed by what is imported
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch
import triton.language.extra.libdevice
import triton.language.math
from axolotl.cli.main import cli
from transformers import set_seed

# what a run imports when it gets there
for module in ("common.datasets", "core.builders", "core.trainers", "train"):
    import_module(f"axolotl.{module}")


def train(config: Path) -> int:
    """The exit code of a run, whose output goes into a file."""
    output = os.open(config.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(600)  # a run that hangs ends
    sys.argv = ["axolotl", "train", str(config), "--launcher", "python"]
    set_seed(0)
    try:
        cli(standalone_mode=False)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter has none of the GPU's library
        triton.language.extra.libdevice.rsqrt = lambda x: triton.language.math.rsqrt(x)
    # its own way for CPUs, which no key chooses
    if find_spec("cut_cross_entropy") and not torch.cuda.is_available():
        patch = import_module("cut_cross_entropy.transformers.patch").cce_patch
        patch.__defaults__ = ("torch_compile", *patch.__defaults__[1:])
    gc.collect()
    # Axolotl collects garbage all the time: half of a run would go into looking at what was
    # imported
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(train(Path(line.strip())))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()

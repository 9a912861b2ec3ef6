"""Run by builders/forks.py: the commands that are named on standard input, one after the other.

Each command is a fork of this process, which has imported Axolotl (`several_runs.py axolotl`) or
TRL (`several_runs.py scripts`) and done nothing else. So a command costs no imports, and finds no
plugin, patched class or random state that another one has left. Generators are seeded, because
Axolotl makes LoRA matrices before it seeds them: runs of this process start from the same adapter.

A line is a JSON object: `command` (arguments of `axolotl`, or a script with its arguments),
`environment`, `input` and `log`, the file that gets what is printed. The command's exit code is
answered on standard output.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

# standard output is for answers alone, whatever is printed by what is imported
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch
from transformers import set_seed

# what a run imports when it gets there
IMPORTED = {
    "axolotl": [
        "axolotl.cli.main",
        *(f"axolotl.{part}" for part in ("common.datasets", "core.builders", "core.trainers")),
        "axolotl.train",
    ],
    "scripts": ["bitsandbytes", "trl", "caft_plugin.trl", "caft_plugin.stage1.pretraining"],
}


def run(command: list[str]) -> None:
    sys.argv = command
    if KIND == "axolotl":
        import_module("axolotl.cli.main").cli()
    else:
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def answered(asked: dict) -> int:
    """The exit code of a command, whose output goes into a file."""
    output = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with tempfile.TemporaryFile("w+") as typed:
        typed.write(asked["input"])
        typed.seek(0)
        os.dup2(typed.fileno(), 0)
    sys.stdin = os.fdopen(0)
    os.environ.update(asked["environment"])
    signal.alarm(600)  # a run that hangs ends
    set_seed(0)
    code = 0
    try:
        run(asked["command"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def prepare_axolotl() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter has none of the GPU's library
        ours = import_module("triton.language.math")
        import_module("triton.language.extra.libdevice").rsqrt = lambda x: ours.rsqrt(x)
    # its own way for CPUs, which no key chooses
    if find_spec("cut_cross_entropy") and not torch.cuda.is_available():
        patch = import_module("cut_cross_entropy.transformers.patch").cce_patch
        patch.__defaults__ = ("torch_compile", *patch.__defaults__[1:])


def main() -> None:
    for module in IMPORTED[KIND]:
        import_module(module)
    if KIND == "axolotl":
        prepare_axolotl()
    gc.collect()
    # Axolotl collects garbage all the time: half of a run would go into looking at what was
    # imported
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(answered(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=ANSWERS, flush=True)


if __name__ == "__main__":
    KIND = sys.argv[1]
    main()

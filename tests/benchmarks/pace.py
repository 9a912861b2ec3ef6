"""Let another process start each step of a training run, by a message over a socket.

`Pace` is a callback for any transformers Trainer; as an Axolotl plugin (`plugins:
[pace.PacePlugin]`) it paces `axolotl train`. After every step it sends the seconds from the last
message to the step's end, including all that the step needs (data, forward, backward, optimizer),
and the peak memory since training began, in bytes.
"""

from __future__ import annotations

import os
import re
import resource
import time
from multiprocessing.connection import Client
from typing import Any

import torch
from transformers import TrainerCallback

ADDRESS = "CAFT_BENCH_SOCKET"


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_memory() -> int:
    """Return the peak memory in bytes: of tensors on a GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\s+(\d+) kB", file.read()).group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Pace(TrainerCallback):
    def __init__(self) -> None:
        self.connection = Client(os.environ[ADDRESS], family="AF_UNIX")
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_peak()
        self.wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.connection.send((time.perf_counter() - self.start, peak_memory()))
        self.wait(control)

    def wait(self, control: Any) -> None:
        if self.connection.recv() == "stop":
            os._exit(0)  # nothing is to be saved
        self.start = time.perf_counter()


try:
    from axolotl.integrations.base import BasePlugin
except ImportError:
    pass
else:

    class PacePlugin(BasePlugin):
        def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
            return [Pace()]

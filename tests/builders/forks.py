"""Commands in forks of one process that has imported what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from builders.paths import ROOT

PROGRAM = ROOT / "tests" / "integration" / "several_runs.py"


class Forks:
    """`kind` is "axolotl", or "scripts" for scripts that use TRL; commands run in `folder`."""

    def __init__(self, kind: str, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.log = folder / f"forks_{'_'.join([kind, *environment])}.log"
        self.count = 0
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, kind],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(
        self, *command: str, log: str | None = None, stdin: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """What a command printed, in the order in which it did so, is in `stdout` and in `log`."""
        self.count += 1
        file = self.folder / (log or f"{self.log.stem}_{self.count}.log")
        asked = {"command": command, "environment": environment, "input": stdin, "log": str(file)}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        assert code, self.log.read_text()[-4000:]
        return subprocess.CompletedProcess(command, int(code), file.read_text(), "")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

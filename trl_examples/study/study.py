"""`make study`: does every planned run that results.jsonl lacks, in the order of the plan.

Stop it at any time and start it again: a run that was interrupted leaves nothing and is done anew, finished ones stay.
What a run prints goes to outputs/study/logs/.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import data
import design
import results
import run as one_run
from tqdm import tqdm

from caft_plugin.precision import cpu_has_bf16

LOGS = one_run.ROOT / "outputs" / "study" / "logs"
HERE = Path(__file__).parent


def to_do(lines: Sequence[results.Line]) -> list[design.Run]:
    """The runs to do now: those without a line, and before the first that needs them heads that are gone."""
    missing = results.missing(lines)
    ordered: list[design.Run] = []
    for run in missing:
        kind = design.TASKS[run.task].arm(run.arm).heads
        stage1 = design.Run("stage1", kind or "", 0)
        if kind is not None and stage1 not in ordered and not one_run.heads_are_there(kind):
            ordered.append(stage1)
        if run not in ordered:
            ordered.append(run)
    return ordered


def expected_seconds(run: design.Run, lines: Sequence[results.Line]) -> float:
    """What the same arm took before, else what the task's declaration expects."""
    took = [line["wall_seconds"] for line in lines if (line["task"], line["arm"]) == run[:2]]
    return statistics.median(took) if took else 60 * design.TASKS[run.task].minutes


def left(runs: Sequence[design.Run], lines: Sequence[results.Line]) -> str:
    minutes = round(sum(expected_seconds(run, lines) for run in runs) / 60)
    return f"about {minutes // 60} h {minutes % 60:02} min left" if minutes >= 60 else f"about {minutes} min left"


def do(run: design.Run) -> None:
    """One run in a process of its own, its output in a log.

    Raises:
        SystemExit: the run failed.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{run.task}-{run.arm}-{run.seed}.log"
    command = [sys.executable, str(HERE / "run.py"), "--task", run.task, "--arm", run.arm, "--seed", str(run.seed)]
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
    if done.returncode != 0:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise SystemExit(f"\nerror: {' '.join(command[1:])} failed; its log is {log} and ends with\n{last}")


def environment() -> dict[str, str]:
    threads = str(design.THREADS)
    return {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    lines = results.read()
    runs = to_do(lines)
    if not runs:
        print(f"every one of the {len(design.plan())} planned runs is in {results.FILE}; make study-report shows them")
        return 0
    data.prepare()
    dtype = "bfloat16" if cpu_has_bf16() else "float32, for this CPU has no instructions for bfloat16"
    print(f"{len(runs)} runs to do, {left(runs, lines)} on {design.THREADS} free cores; stop and start at will")
    print(f"computing in {dtype}")
    total = len(design.plan())
    try:
        with tqdm(total=total, initial=max(total - len(runs), 0), unit="run") as bar:
            for number, run in enumerate(runs):
                bar.set_description_str(f"{run.task} {run.arm} seed {run.seed}")
                bar.set_postfix_str(left(runs[number:], results.read()))
                do(run)
                bar.update()
    except KeyboardInterrupt:
        print("\nstopped; make study goes on with the run that was interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

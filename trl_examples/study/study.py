"""`make study`: does every planned run that results.jsonl lacks, in the order of the plan.

    python trl_examples/study/study.py [--workers 1] [--minutes N] [--tasks few few-pilot few-heads]

Stop it at any time and start it again: a run that was interrupted leaves nothing and is done anew, finished ones stay.
What a run prints goes to outputs/study/logs/. On a GPU several runs go side by side (`--workers 12`); on a CPU one run
takes all cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import data
import design
import design2
import results
import run as one_run
import torch
from tqdm import tqdm

from caft_plugin.precision import cpu_has_bf16

LOGS = one_run.ROOT / "outputs" / "study" / "logs"
HERE = Path(__file__).parent
MINUTES = {"few": 12, "few-pilot": 10, "few-heads": 30, "graphs": 10, "documents": 10}  # of a run, on two cores


def to_do(lines: Sequence[results.Line]) -> list[design.Run]:
    """The first study's runs to do now: those without a line, and before the first that needs them heads that are
    gone."""
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


def ready(lines: Sequence[results.Line]) -> list[design.Run]:
    """The second study's runs that can be done now: pilots and stage 1 first, then those that the rules ask for. Heads
    that are gone are made again before the runs that start from them."""
    done = {results.run_of(line) for line in lines}
    missing = [run for run in design2.plan(lines) if run not in done]
    heads = design.Run("few-heads", "few-heads", 0)
    frozen = [run for run in missing if run.arm == "caft-frozen"]
    if heads not in missing and (not frozen or one_run.heads_are_there(heads.arm)):
        return missing
    return [heads, *(run for run in missing if run != heads and run not in frozen)]


def expected_seconds(run: design.Run, lines: Sequence[results.Line]) -> float:
    """What the same arm took before, else what is expected of its task."""
    took = [line["wall_seconds"] for line in lines if (line["task"], line["arm"]) == run[:2]]
    if took:
        return statistics.median(took)
    return 60 * (design.TASKS[run.task].minutes if run.task in design.TASKS else MINUTES.get(run.task, 5))


def left(runs: Sequence[design.Run], lines: Sequence[results.Line]) -> str:
    minutes = round(sum(expected_seconds(run, lines) for run in runs) / 60)
    return f"about {minutes // 60} h {minutes % 60:02} min left" if minutes >= 60 else f"about {minutes} min left"


def log_of(run: design.Run) -> Path:
    LOGS.mkdir(parents=True, exist_ok=True)
    return LOGS / f"{run.task}-{run.arm}-{run.seed}.log"


def do(run: design.Run) -> None:
    """One run of the first study in a process of its own, its output in a log.

    Raises:
        SystemExit: the run failed.
    """
    log = log_of(run)
    command = [sys.executable, str(HERE / "run.py"), "--task", run.task, "--arm", run.arm, "--seed", str(run.seed)]
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
    if done.returncode != 0:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise SystemExit(f"\nerror: {' '.join(command[1:])} failed; its log is {log} and ends with\n{last}")


def environment(workers: int = 1) -> dict[str, str]:
    threads = str(design.THREADS if workers == 1 else 1)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


# -- the second study: workers that do one run after the other ----------------------------------------


def work(run: design.Run, lines: Sequence[results.Line]) -> results.Line:
    """In a worker: a run's line; what it prints goes to its log."""
    with log_of(run).open("w") as log, printed_to(log.fileno()):
        try:
            return one_run.measured(run, lines)
        finally:
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where no GPU was used


@contextlib.contextmanager
def printed_to(file: int) -> Iterator[None]:
    """What this process and those that it starts print goes to another file."""
    kept = [os.dup(1), os.dup(2)]
    try:
        for number in (1, 2):
            os.dup2(file, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def second(workers: int, deadline: float, tasks: Sequence[str]) -> list[design.Run]:
    """Does the second study's runs of these tasks, `workers` at a time; a line is added as soon as its run is done.
    Returns the runs that failed."""
    failed: list[design.Run] = []
    running: dict[concurrent.futures.Future[results.Line], design.Run] = {}
    os.environ.update(environment(workers))
    spawn = multiprocessing.get_context("spawn")
    total = len(design2.declared())
    with (
        tqdm(total=total, unit="run", desc="second study") as bar,
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool,
    ):
        while True:
            lines = results.read()
            out = {*failed, *running.values()}
            waiting = [run for run in ready(lines) if run.task in tasks and run not in out]
            bar.n = sum(line["task"] in design2.TASKS for line in lines)
            bar.set_postfix_str(f"{len(running)} running, {left([*running.values(), *waiting], lines)}")
            for run in waiting[: workers - len(running)] if time.monotonic() < deadline else ():
                running[pool.submit(work, run, [line for line in lines if is_choice(line)])] = run
            if not running:
                return failed
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                if (error := future.exception()) is not None:
                    failed.append(run)
                    said = f"error: {run.task} {run.arm} seed {run.seed}: {error}; its log is {log_of(run)}"
                    tqdm.write(said, file=sys.stderr)
                elif run not in map(results.run_of, results.read()):
                    results.add(future.result())


def is_choice(line: results.Line) -> bool:
    """Whether settings of others are chosen by it."""
    return line["task"].endswith("-pilot") or design.is_choice(line)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, of the second study")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run is begun after so many")
    tasks = list(design2.TASKS)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, help="of the second study")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    lines = results.read()
    runs, more = to_do(lines), ready(lines)
    if not runs and not more:
        print(f"every planned run is in {results.FILE}; make study-report shows them")
        return 0
    data.prepare()
    dtype = "bfloat16" if cpu_has_bf16() else "float32, for this CPU has no instructions for bfloat16"
    print(f"at least {len(runs) + len(more)} runs to do, {left([*runs, *more], lines)}; stop and start at will")
    print(f"computing in {dtype}")
    try:
        total = len(design.plan())
        with tqdm(total=total, initial=max(total - len(runs), 0), unit="run", desc="first study") as bar:
            for number, run in enumerate(runs):
                bar.set_description_str(f"{run.task} {run.arm} seed {run.seed}")
                bar.set_postfix_str(left(runs[number:], results.read()))
                do(run)
                bar.update()
        return int(bool(second(options.workers, deadline, options.tasks)))
    except KeyboardInterrupt:
        print("\nstopped; make study goes on with the run that was interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

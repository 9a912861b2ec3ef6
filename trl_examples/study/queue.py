"""Doing runs: workers side by side, each run's output in a log, its line added as soon as it is
done."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from study import results
from study.protocol import OUTPUTS, Line, Lines, Run, Settings, Study

THREADS = 2  # of one worker
LOGS = OUTPUTS / "logs"


def work_through(
    study: Study, wanted: Callable[[Run], bool], workers: int, deadline: float
) -> list[Run]:
    """Do the runs of a study that are wanted and have no line.

    Args:
        study: its rules say after each run which runs are next.
        wanted: whether a run is to be done.
        workers: runs side by side.
        deadline: of `time.monotonic()`, after which no run is started.

    Returns:
        The runs that failed.
    """
    failed: list[Run] = []
    running: dict[concurrent.futures.Future[Line], Run] = {}
    os.environ.update(environment(workers))
    spawn = multiprocessing.get_context("spawn")
    with (
        tqdm(unit="run", desc=f"{study.name} study") as bar,
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool,
    ):
        while True:
            lines = results.read(study.file)
            taken = {*failed, *running.values()}
            waiting = [run for run in study.ready(lines) if wanted(run) and run not in taken]
            bar.total = bar.n + len(running) + len(waiting)
            bar.set_postfix_str(
                f"{len(running)} running, {left(study, [*running.values(), *waiting], lines)}"
            )
            for run in waiting[: workers - len(running)] if time.monotonic() < deadline else ():
                running[
                    pool.submit(work, study.do, run, study.settings(run, lines), log_of(run))
                ] = run
            if not running:
                return failed
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                run = running.pop(future)
                bar.update()
                if (error := future.exception()) is not None:
                    failed.append(run)
                    tqdm.write(f"error: {run}: {error}; its log is {log_of(run)}", file=sys.stderr)
                # else made again for its heads
                elif run in results.missing([run], results.read(study.file)):
                    results.add(future.result(), study.file)


def work(do: Callable[[Run, Settings], Line], run: Run, settings: Settings, log: Path) -> Line:
    """Do a run in a worker, with its output in a log, and return its line."""
    with log.open("w") as opened, printed_to(opened.fileno()):
        try:
            start = time.perf_counter()
            figures = do(run, settings)
            return results.line_of(run, settings, figures, time.perf_counter() - start)
        finally:
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where no GPU was used


def environment(workers: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(THREADS if workers == 1 else 1),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def log_of(run: Run) -> Path:
    LOGS.mkdir(parents=True, exist_ok=True)
    return LOGS / f"{run.task}-{run.arm}-{run.seed}.log"


@contextlib.contextmanager
def printed_to(file: int) -> Iterator[None]:
    """Send the output of this process and of those that it starts to another file."""
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


def left(study: Study, runs: Sequence[Run], lines: Lines) -> str:
    """Say how long these runs will take: as the same arm took before, else as its task is expected
    to."""
    seconds = 0.0
    for run in runs:
        took = [line["wall_seconds"] for line in results.of(lines, run.task, run.arm)]
        seconds += statistics.median(took) if took else 60 * study.tasks[run.task].minutes
    minutes = round(seconds / 60)
    return (
        f"about {minutes // 60} h {minutes % 60:02} min left"
        if minutes >= 60
        else f"about {minutes} min left"
    )

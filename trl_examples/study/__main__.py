"""Do the runs that the results lack, or write the tables.

    python -m study run [--workers 1] [--minutes N] [--tasks small-pilot small]
        [--arms ...] [--seeds ...]
    python -m study report

`run` can be stopped at any time and started again: an interrupted run leaves nothing and is done
again. To do a finished run again, delete its line in results.jsonl. A run's output is in
outputs/study/logs/. On a GPU use several workers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from study import queue, results
from study.protocol import Run
from study.report import report
from study.second import study as second
from study.third import study as third

STUDIES = (second.STUDY, third.STUDY)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "report":
        print(*(f"wrote the tables of {page}" for page in report(STUDIES)), sep="\n")
        return 0

    def wanted(run: Run) -> bool:
        asked = (options.tasks, options.arms, options.seeds)
        return all(some is None or value in some for value, some in zip(run, asked, strict=True))

    declared = [run for study in STUDIES for run in study.declared()]
    if not any(map(wanted, declared)):
        print(
            "error: no declared run has this task, arm and seed; arms and seeds are in protocol.py",
            file=sys.stderr,
        )
        return 1
    deadline = time.monotonic() + 60 * options.minutes
    try:
        failed = [
            run
            for study in STUDIES
            for run in queue.work_through(study, wanted, options.workers, deadline)
        ]
    except KeyboardInterrupt:
        print("\nstopped; make study does the interrupted run again", file=sys.stderr)
        return 130
    missing = [
        run
        for study in STUDIES
        for run in results.missing(study.declared(), results.read(study.file))
    ]
    if left := [str(run) for run in missing if wanted(run) and run not in failed]:
        print(
            "not done, because of a rule or because they wait for other runs or for time:"
            f" {', '.join(left)}"
        )
    return int(bool(failed))


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="python -m study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = described.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write the tables and figures")
    run = commands.add_parser("run", help="do the runs that results.jsonl lacks")
    run.add_argument(
        "--workers", type=int, default=1, help="runs side by side (default: %(default)s)"
    )
    run.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no run after so many"
    )
    tasks = [task for study in STUDIES for task in study.tasks]
    run.add_argument(
        "--tasks",
        nargs="+",
        choices=tasks,
        metavar="TASK",
        help=f"only these of {', '.join(tasks)}",
    )
    run.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms")
    run.add_argument("--seeds", nargs="+", metavar="SEED", type=int, help="only these seeds")
    return described


if __name__ == "__main__":
    sys.exit(main())

"""The GPU check, `make gpu`: checks that need a GPU, compared with a CPU or with runs without
caft_plugin.

    python tests/gpu/check.py [--only NAME ...] [--minutes 10] [--out FILE] [--untimed]
        [--device cpu]

Imports caft_plugin from this checkout. Downloads nothing: models and rows are random. Writes a
table to tests/gpu/results.md, and says so where there is no CUDA device. `--untimed` leaves out
times, which mean nothing while other work runs. `--device cpu` runs the checks that a CPU can run,
and writes a file only with --out. The exit status is 1 if a check failed or differed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(HERE), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
sys.path[:0] = PATHS

import torch
from checks import CHECKS, REFERENCES, UNTIMED, Check, Row, in_one_line, save
from hosts import PROCESS_CHECKS, last_words

from caft_plugin.files import write_text

RESULTS = HERE / "results.md"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "trl",
    "axolotl",
    "liger_kernel",
    "flash_attn",
)
ALL: dict[str, Check] = {check.name: check for check in (*CHECKS, *PROCESS_CHECKS)}
LIMIT = 240.0  # seconds that one check may take
OUT_OF_TIME = "not run: out of time"


# -- workers: a check that crashes or hangs takes no other with it ---------------------------------


def work(options: argparse.Namespace) -> None:
    """What a worker does: each of its checks in turn. A line is added to its file for each."""
    first = os.environ.get("RANK", "0") == "0"
    for name in options.work:
        try:
            row = (
                save(options.folder, name)
                if name in REFERENCES
                else ALL[name].measure(options.device, options.folder)
            )
        except Exception as error:
            traceback.print_exc()
            row = Row(name, f"failed: {in_one_line(error)}")
        if first:
            with open(options.lines, "a") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    if "RANK" in os.environ:
        sys.stderr.flush()
        os._exit(0)  # taking a process group down may wait for ever, and all is written


def rows_of(
    command: Callable[[list[str], Path], list[str]],
    names: list[str],
    folder: Path,
    deadline: float,
    limit: float = LIMIT,
    environment: dict[str, str] | None = None,
) -> Iterator[Row]:
    """Rows of checks, from workers: `command` starts one that does checks in turn and adds a line
    to a file for each. Where one dies, or takes longer than `limit` seconds for a check, another
    one continues with the next check."""
    waiting = list(names)
    while waiting:
        if time.monotonic() > deadline:
            yield from (Row(name, OUT_OF_TIME) for name in waiting)
            return
        with tempfile.TemporaryDirectory(dir=folder) as own, open(Path(own) / "log", "w+") as log:
            lines = Path(own) / "lines"
            lines.touch()
            process = subprocess.Popen(
                command(waiting, lines), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            begun, read, stopped = time.monotonic(), 0, None
            try:
                while waiting and stopped is None:
                    # asked before reading, so that nothing is missed
                    ended = process.poll() is not None
                    for line in lines.read_text().splitlines(keepends=True)[read:]:
                        if line.endswith("\n"):
                            yield Row(**json.loads(line))
                            waiting.pop(0)
                            begun, read = time.monotonic(), read + 1
                    now = time.monotonic()
                    if ended:
                        log.seek(0)
                        stopped = (
                            f"failed: the process ended with {process.returncode}:"
                            f" {last_words(log.read())[:200]}"
                        )
                    elif now > deadline:
                        stopped = OUT_OF_TIME
                    elif now > begun + limit:
                        stopped = f"failed: it took longer than {limit:.0f} seconds"
                    else:
                        time.sleep(0.1)
            finally:
                end(process, patience=0 if waiting else 10)
        if waiting and stopped is not None:
            yield Row(waiting.pop(0), stopped.replace("|", "/"))


def end(process: subprocess.Popen, patience: float) -> None:
    """Ends a worker that has not ended by itself in `patience` seconds: first so that it ends what
    it has started."""
    for tell, seconds in ((None, patience), (process.terminate, 10.0), (process.kill, None)):
        if tell is not None:
            tell()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def worker(device: str, folder: Path, processes: int) -> Callable[[list[str], Path], list[str]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]

    def command(names: list[str], lines: Path) -> list[str]:
        script = [
            str(HERE / "check.py"),
            "--device",
            device,
            "--folder",
            str(folder),
            "--lines",
            str(lines),
            "--work",
        ]
        return [sys.executable, *(launcher if processes > 1 else []), *script, *names]

    return command


def environment_of(device: str, processes: int) -> dict[str, str]:
    """One process sees one GPU, or it would drive all of them; a run on the CPU sees none."""
    seen = os.environ.get(
        "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
    ).split(",")
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(seen[:processes]) if device == "cuda" else "",
        "PYTHONPATH": os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # which NVIDIA's containers set: float32 is compared
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
    }


def results(device: str, names: list[str], deadline: float) -> Iterator[Row]:
    """A row of each check: those that cannot be run, then the others, with references made before
    them."""
    able = []
    for name in names:
        why = ALL[name].why_not(device)
        if why is None:
            able.append(name)
        else:
            yield Row(name, f"not run: {why}")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wanted = [
            name for name in REFERENCES if any(ALL[check].reference == name for check in able)
        ]
        lacking = {}
        for row in rows_of(
            worker("cpu", folder, 1), wanted, folder, deadline, environment=environment_of("cpu", 1)
        ):
            if row.result != "ran":
                lacking[row.check] = row.result
        for name in [name for name in able if ALL[name].reference in lacking]:
            able.remove(name)
            yield Row(name, lacking[str(ALL[name].reference)])
        for (_, processes), group in itertools.groupby(
            able, lambda name: (ALL[name].alone and name, ALL[name].processes)
        ):
            environment = environment_of(device, processes)
            yield from rows_of(
                worker(device, folder, processes),
                list(group),
                folder,
                deadline,
                environment=environment,
            )


# -- the table -------------------------------------------------------------------------------------


def table(rows: list[Row]) -> Iterator[str]:
    yield "| check | result | furthest off, of what is allowed | time, x | memory, x |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        yield f"| {row.check} | {row.result} | {row.difference} | {row.time} | {row.memory} |"


def machine(device: str) -> str:
    if device == "cpu":
        return f"CPU ({platform.machine()})"
    smi, driver = shutil.which("nvidia-smi"), "unknown"
    if smi is not None:
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True).stdout.split() or ["unknown"]
        )[0]
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"


def versions() -> str:
    found = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=list(ALL),
        default=list(ALL),
        help="some checks",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="checks not begun by then are not run"
    )
    parser.add_argument(
        "--out", type=Path, help="where the table goes, in place of tests/gpu/results.md"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--untimed",
        action="store_true",
        help="no run only for its time, except those of make bench",
    )
    for name in ("--folder", "--lines"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended too
    if options.work:
        work(options)
        return 0
    if options.untimed:
        os.environ[UNTIMED] = "1"  # workers inherit it
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: nothing was run.\n")
        print(*table([Row(name, "not run: no CUDA device") for name in options.only]), sep="\n")
        return 0
    begun, rows = time.monotonic(), []
    for row in results(options.device, options.only, begun + options.minutes * 60):
        print(
            f"[{time.monotonic() - begun:4.0f} s] {row.check}: {row.result} {row.difference}",
            file=sys.stderr,
        )
        rows.append(row)
    rows.sort(key=lambda row: options.only.index(row.check))
    lines = [f"{machine(options.device)}. {versions()}. {datetime.date.today()}.", "", *table(rows)]
    print(*lines, sep="\n")
    out = options.out or (RESULTS if options.device == "cuda" else None)
    if out is not None:
        write_text(out, "\n".join(lines) + "\n")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())

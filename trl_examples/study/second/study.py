"""The second study, as `python -m study` uses it: which runs are ready, and how one is done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from study import results
from study.protocol import OUTPUTS, ROOT, Line, Lines, Run, Settings, Study
from study.second import data, protocol, report

if TYPE_CHECKING:
    from study.second.fine_tuning import Places

MODEL = ROOT / "outputs" / "smollm2-135m-instruct"
HEADS = OUTPUTS / "heads"
MAKE_HEADS = Run("few-heads", "few-heads", 0)
NOT_OPTIONS = ("model", "rows")  # of `caft pretrain-heads`


def ready(lines: Lines) -> list[Run]:
    """Return the runs that can be done now: stage 1 and pilots first, then those that the rules ask
    for. Heads that are gone are made again before the runs that start from them."""
    missing = results.missing(protocol.plan(lines), lines)
    need_heads = [run for run in missing if run.arm == "caft-frozen"]
    if MAKE_HEADS not in missing and (not need_heads or heads_are_there(MAKE_HEADS.arm)):
        return missing
    return [MAKE_HEADS, *(run for run in missing if run != MAKE_HEADS and run not in need_heads)]


def heads_are_there(name: str) -> bool:
    return (HEADS / name / "caft_heads" / "metrics.json").is_file()


def do(run: Run, settings: Settings, sizes: protocol.Sizes = protocol.SIZES) -> Line:
    """Train and measure a run.

    Raises:
        ValueError: the model or the heads that it starts from are not there.
    """
    from study import measure
    from study.second.fine_tuning import Places

    if not (MODEL / "config.json").is_file():
        raise ValueError(
            f"{MODEL} is not there: python axolotl_configs/demo/make_base_model.py --out {MODEL}"
        )
    if settings.get("heads") is not None and not heads_are_there(settings["heads"]):
        raise ValueError(
            f"heads are not in {HEADS / settings['heads']}: python -m study run --tasks"
            f" {MAKE_HEADS.task}"
        )
    digest = data.prepare()
    if run == MAKE_HEADS:
        rows = data.read("molecules-train")[: settings["rows"]]
        figures = make_heads(settings, rows, HEADS / run.arm, measure.dtype() != "bfloat16")
    else:
        with tempfile.TemporaryDirectory(prefix="caft-study-") as folder:
            figures = train(run, settings, sizes, Places(MODEL, HEADS, Path(folder)))
    return {**figures, "dtype": measure.dtype(), "data": digest}


def train(run: Run, settings: Settings, sizes: protocol.Sizes, places: Places) -> Line:
    import torch

    from study.second import documents, graphs, molecules

    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    task: Callable[[Run, Settings, protocol.Sizes, Places], Line]
    task = {"few": molecules.do, "documents": documents.do, "graphs": graphs.do}[
        run.task.removesuffix("-pilot")
    ]
    return task(run, settings, sizes, places)


def make_heads(settings: Settings, rows: Sequence[data.Row], out: Path, float32: bool) -> Line:
    """Run stage 1 by the shipped command; the figures are those that it leaves next to the
    heads."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    file = out / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "caft_plugin.tools.cli",
        "pretrain-heads",
        "--model",
        str(MODEL),
    ]
    command += ["--data", str(file), "--output", str(out)]
    for key, value in settings.items():
        command += [] if key in NOT_OPTIONS else [f"--{key}", str(value)]
    start = time.perf_counter()
    subprocess.run([*command, *(["--float32"] if float32 else [])], check=True)
    seconds = time.perf_counter() - start
    found = json.loads((out / "caft_heads" / "metrics.json").read_text())
    metrics = {
        f"{when}_{what}_head_{k}": head[what]
        for when, heads in (("untrained", found["untrained"]), ("trained", found["heads"]))
        for k, head in enumerate(heads, 1)
        for what in ("loss", "accuracy")
    }
    return {"metrics": metrics, "curve": [], "tokens": None, "train_seconds": round(seconds, 1)}


STUDY = Study(
    name="second",
    tasks=protocol.TASKS,
    metrics=protocol.METRICS,
    questions=protocol.QUESTIONS,
    ready=ready,
    settings=protocol.settings,
    do=do,
    tables=report.tables,
    draw=report.draw,
)

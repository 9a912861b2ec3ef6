"""The third study, as `python -m study` uses it: which runs are ready, and how one is done."""

from __future__ import annotations

import tempfile
from pathlib import Path

from study import results
from study.protocol import Line, Lines, Run, Settings, Study
from study.third import protocol, report


def ready(lines: Lines) -> list[Run]:
    """Return the runs that can be done now: pilots first, then those whose pilot is complete."""
    return results.missing(protocol.plan(lines), lines)


def do(run: Run, settings: Settings, sizes: protocol.Sizes = protocol.SIZES) -> Line:
    """Train and measure a run."""
    import torch

    from study import measure
    from study.third import data, pretraining

    digest = data.prepare()
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="caft-study-") as folder:
        figures = pretraining.do(run, settings, sizes, Path(folder))
    gpu = "bfloat16" if settings["bf16"] else "TF32"
    dtype = gpu if measure.device() == "cuda" else "float32"
    return {**figures, "dtype": dtype, "data": digest}


STUDY = Study(
    name="third",
    tasks=protocol.TASKS,
    metrics=protocol.METRICS,
    questions=protocol.QUESTIONS,
    ready=ready,
    settings=protocol.settings,
    do=do,
    tables=report.tables,
    draw=report.draw,
)

"""Write a PNG with panels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from caft_plugin.errors import ConfigError, asked_as
from caft_plugin.files import write_atomically


def write_png(
    file: Path,
    size: tuple[float, float],
    columns: int,
    fill: Callable[..., None],
) -> None:
    """Write a PNG with a row of panels.

    Args:
        file: the PNG's path; its folder is created.
        size: width and height in inches.
        columns: number of panels.
        fill: draws into the axes that it is called with.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"{asked_as('file', '--png')}: needs matplotlib. Install it: pip install"
            " 'caft_plugin[report]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure.subplots(1, columns))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: figure.savefig(path, format="png", dpi=120))

"""Draw the figure of the README, light and dark: `python caft_plugin/figures/draw.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from PIL import Image

HERE = Path(__file__).parent
# pixels as the README shows them, and how many of the file's make one
WIDTH, HEIGHT, SCALE = 800, 372, 2
COLORS = {
    "light": {
        "page": "#ffffff",
        "text": "#1f2328", "quiet": "#59636e", "line": "#8c959f", "box": "#f0f2f5",
        "own": "#0969da", "own box": "#ddf0ff", "head": "#bc4c00", "head box": "#fff0e0",
        "mask": "#8250df", "mask box": "#e9dbff",
    },
    "dark": {
        "page": "#0d1117",
        "text": "#f0f6fc", "quiet": "#a5afbb", "line": "#6e7681", "box": "#22272e",
        "own": "#6cb6ff", "own box": "#12335c", "head": "#ffa657", "head box": "#4d2a10",
        "mask": "#d2a8ff", "mask box": "#46307a",
    },
}  # fmt: skip


class Canvas:
    """A drawing in pixels, y downwards."""

    def __init__(self, colors: dict[str, str]) -> None:
        self.colors = colors
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100 * SCALE)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.axis("off")

    def text(
        self, x: float, y: float, words: str, color: str = "text", size: float = 12, **more: Any
    ) -> None:
        style = {"ha": "center", "va": "center", "fontfamily": "DejaVu Sans", **more}
        self.axes.text(x, y, words, color=self.colors[color], fontsize=size * 0.72, **style)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        edge: str,
        dashed: bool = False,
    ) -> None:
        """A box with its middle at (x, y)."""
        self.axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=4",
                facecolor=self.colors[fill],
                edgecolor=self.colors[edge],
                linewidth=0.9,
                linestyle=(0, (3, 2)) if dashed else "solid",
            )
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float, color: str = "line") -> None:
        style: dict[str, Any] = {
            "arrowstyle": "-|>,head_length=3,head_width=1.8",
            "shrinkA": 0,
            "shrinkB": 0,
        }
        self.axes.add_patch(
            FancyArrowPatch(
                (x, y),
                (to_x, to_y),
                color=self.colors[color],
                linewidth=0.9,
                mutation_scale=1,
                **style,
            )
        )

    def line(
        self, points: list[tuple[float, float]], color: str = "line", codes: list[Any] | None = None
    ) -> None:
        path = PathPatch(
            Curve(points, codes), facecolor="none", edgecolor=self.colors[color], linewidth=0.9
        )
        self.axes.add_patch(path)

    def dot(self, x: float, y: float, color: str) -> None:
        self.axes.plot([x], [y], "o", color=self.colors[color], markersize=3.6, markeredgewidth=0)


def caft(canvas: Canvas) -> None:
    """A last layer with heads for the tokens 2 to 5 ahead and the model's own next token."""
    left, step, width = 44, 72, 64
    columns = [left + step * k for k in range(5)]
    middle = (columns[0] + columns[-1]) / 2
    wide = columns[-1] - columns[0] + width
    canvas.text(left - width / 2, 17, "CAFT", size=16, fontweight="bold", ha="left")
    canvas.text(left + 22, 18, "heads learn to look further ahead", "quiet", 12.5, ha="left")

    words = ("100", "degrees", "Celsius", "at", "sea")
    for k, (x, word) in enumerate(zip(columns, words, strict=True)):
        kind = "head" if k else "own"
        canvas.text(x, 50, f"{k + 1} ahead", kind, 12)
        canvas.box(x, 74, width, 26, f"{kind} box", kind)
        canvas.text(x, 74, word, size=12.5)
        canvas.arrow(x, 113, x, 88, kind)
        canvas.arrow(x, 164, x, 138, kind)
        canvas.box(x, 182, width, 36, f"{kind} box", kind, dashed=bool(k))
        canvas.text(
            x,
            182,
            f"head {k}" if k else "last\nlayer",
            kind,
            12.5,
            fontweight="bold",
            linespacing=1.1,
        )
        canvas.arrow(x, 222, x, 201, kind)
    canvas.box(middle, 125, wide, 24, "box", "line")
    canvas.text(middle, 125, "final norm and unembedding, shared", size=12)
    canvas.line([(columns[0], 222), (columns[-1], 222)])
    canvas.line([(middle, 222), (middle, 245)])
    canvas.text(middle + 9, 234, "what the last layer reads", "quiet", 11.5, ha="left")
    canvas.box(middle, 257, wide, 24, "box", "line")
    canvas.text(middle, 257, "the layers below", size=12)
    for place, word in zip(
        (middle - step, middle, middle + step), ("Water", "boils", "at"), strict=True
    ):
        canvas.arrow(place, 290, place, 271)
        canvas.box(place, 303, width, 26, "box", "line")
        canvas.text(place, 303, word, size=12.5)
    canvas.text(middle, 337, "A head starts as a copy of the last layer.", size=12)
    canvas.text(middle, 355, "Its loss is added. After training the heads are gone.", "head", 12)


def meap(canvas: Canvas) -> None:
    """A masked copy of an answer behind its original, in one sequence."""
    left, step, cell = 416, 15.3, 13.9
    prompt, answer, masked = 2, 10, 6
    length = prompt + answer
    starts = (left, left + step * length + 8)
    row = 182

    def middle(copy: int, index: int) -> float:
        return starts[copy] + step * index + cell / 2

    canvas.text(left, 17, "MEAP", size=16, fontweight="bold", ha="left")
    canvas.text(left + 58, 18, "a part of the input is masked", "quiet", 12.5, ha="left")

    # what the copy sees: every token of the original, and its own up to here
    source = middle(1, prompt + masked - 1)
    for index in range(1, length, 2):
        target = middle(0, index)
        top = row - 24 - 0.36 * (source - target)
        canvas.line(
            [(source, row - 10), (source, top), (target, top), (target, row - 10)],
            "line",
            [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
        )
    canvas.text((left + 780) / 2, 62, "the copy attends to its original", "quiet", 12)

    for copy in range(2):
        for index in range(length):
            x, hidden = middle(copy, index), copy == 1 and index == prompt + masked
            trained = index >= prompt and (copy == 0 or hidden)
            kind = "mask" if hidden else "own" if index >= prompt else "line"
            fill = "box" if index < prompt else f"{kind} box"
            canvas.box(x, row, cell, 18, fill, kind)
            letter = "M" if hidden else "abcdefghijkl"[index]
            weight = "bold" if hidden else "normal"
            canvas.text(x, row, letter, kind if hidden else "text", 11.5, fontweight=weight)
            if trained:
                canvas.dot(x, row + 18, kind)
        first, last = middle(copy, 0) - cell / 2, middle(copy, length - 1) + cell / 2
        split = middle(copy, prompt) - cell / 2 - 1
        for start, end, words in ((first, split - 1, "prompt"), (split + 1, last, "answer")):
            canvas.line([(start, row + 30), (start, row + 34), (end, row + 34), (end, row + 30)])
            place, side = (
                ((start + end) / 2, "center") if words == "answer" else (start - 1, "left")
            )
            canvas.text(place, row + 44, words, "quiet", 11.5, ha=side)
        name = ("the original", "its copy behind it")[copy]
        canvas.text((first + last) / 2, row + 66, name, size=12.5, fontweight="bold")

    y = row + 104
    canvas.dot(left + 4, y, "own")
    canvas.text(left + 14, y, "loss on every token of the answer", size=12, ha="left")
    canvas.dot(left + 4, y + 19, "mask")
    canvas.text(
        left + 14, y + 19, "in the copy, loss only on the masked tokens", size=12, ha="left"
    )
    canvas.text(left, 337, "A tenth of the answer's tokens is masked, redrawn", size=12, ha="left")
    canvas.text(left, 355, "in every epoch. The model keeps its shape.", size=12, ha="left")


def main() -> None:
    for name, colors in COLORS.items():
        canvas = Canvas(colors)
        caft(canvas)
        meap(canvas)
        canvas.line([(396, 8), (396, HEIGHT - 8)], "box")
        # With a ground of its own, so that it is legible where a page's color is not the one its
        # reader asked for.
        canvas.figure.set_facecolor(colors["page"])
        drawn = FigureCanvasAgg(canvas.figure)
        drawn.draw()
        pixels = Image.fromarray(np.asarray(drawn.buffer_rgba())).convert("RGB")
        pixels.quantize(256, dither=Image.Dither.NONE).save(
            HERE / f"methods-{name}.png", optimize=True
        )
        plt.close(canvas.figure)


if __name__ == "__main__":
    main()

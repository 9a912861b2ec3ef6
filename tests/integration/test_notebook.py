"""trl_examples/quickstart.ipynb runs from start to end in a real kernel, and what it shows is of
such a run."""

from __future__ import annotations

import base64
import re

import nbformat
import pytest

from builders.paths import ROOT
from generate.notebook import METADATA, NOTEBOOK, code_cells, execute, read, settings

pytestmark = [pytest.mark.slow, pytest.mark.newest]

HELDOUT = ROOT / "axolotl_configs" / "data" / "molecules-heldout.jsonl"


def images(notebook) -> list[bytes]:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [
        base64.b64decode(output["data"]["image/png"])
        for output in outputs
        if "image/png" in output.get("data", {})
    ]


def assert_complete(notebook, questions: int) -> None:
    """Every cell ran, in order; the losses are drawn; each answer was written twice, and the
    figures are there."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    (image,) = images(notebook)
    assert image.startswith(b"\x89PNG\r\n")
    printed = "".join(output.text for output in cells[-1].outputs if output.get("name") == "stdout")
    figures = re.search(
        r"\nsame text: +(\d+) of (\d+)\n"
        r"steps: +(\d+) plainly, (\d+) with drafts: (\d\.\d\d) tokens per step\n"
        r"seconds: +\d+\.\d plainly, \d+\.\d with drafts\n$",
        printed,
    )
    assert figures, printed
    same, asked, tokens, passes = map(int, figures.groups()[:4])
    assert same == asked == questions
    assert asked <= passes <= tokens and figures[5] == f"{tokens / passes:.2f}"


def test_runs_from_start_to_end(short_smollm2, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(HELDOUT.read_text().splitlines(True)[:3]))
    notebook = read()
    out = tmp_path / "out"
    model = str(short_smollm2)
    execute(notebook, tmp_path, model=model, heldout=str(few), steps=2, output=str(out))
    assert_complete(notebook, questions=2)
    assert (out / "model.safetensors").is_file() and (
        out / "caft_heads" / "heads.safetensors"
    ).is_file()


def test_what_is_shipped_was_run():
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert settings(notebook.cells[1])["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert_complete(notebook, questions=8)
    for cell in code_cells(notebook):
        compile(cell.source, NOTEBOOK.name, "exec")
        assert not [
            output
            for output in cell.outputs
            if output.output_type == "error" or output.get("name") == "stderr"
        ]
    assert not re.search(r"/(work|tmp|home|root|Users)\b", NOTEBOOK.read_text(encoding="utf-8"))

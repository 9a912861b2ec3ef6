"""trl_examples/quickstart.ipynb runs from start to end in a real kernel, and what it shows is of
such a run.

`python tests/integration/test_notebook.py` runs it with its own settings, on SmolLM2 from the
package index, and writes its outputs (about five minutes on two free cores).
"""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).parents[1]))  # where no conftest.py has done so
from paths import ROOT

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "trl_examples" / "quickstart.ipynb"
HELDOUT = ROOT / "axolotl_configs" / "data" / "molecules-heldout.jsonl"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def settings(cell) -> dict[str, object]:
    """What the cell of parameters, which is nothing else, assigns."""
    assert cell.metadata["tags"] == ["parameters"]
    return {
        line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body
    }


def execute(notebook, folder: Path, **changes) -> None:
    """Runs it in a kernel of this Python, where it lies, with other settings; what Jupyter writes
    goes to `folder`."""
    parameters = notebook.cells[1]
    given = settings(parameters)
    assert changes.keys() <= given.keys()
    parameters.source = "\n".join(
        f"{name} = {value!r}" for name, value in {**given, **changes}.items()
    )
    kernel = folder / "kernels" / "this_python"
    kernel.mkdir(parents=True)
    start = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "this Python",
        "env": {
            "IPYTHONDIR": str(folder),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        },
    }
    (kernel / "kernel.json").write_text(json.dumps(start))
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = NotebookClient(
        notebook, kernel_name="this_python", timeout=1200, resources=where, record_timing=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder))
        client.execute()


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


def test_runs_from_start_to_end(smollm2, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(HELDOUT.read_text().splitlines(True)[:3]))
    notebook = read()
    out = tmp_path / "out"
    execute(notebook, tmp_path, model=str(smollm2), heldout=str(few), steps=2, output=str(out))
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


def shown(output) -> bool:
    """Whether an output is shipped: what was printed and drawn, not warnings and progress bars."""
    return output.get("name") == "stdout" or "image/png" in output.get("data", {})


def write() -> None:
    sys.path.insert(0, str(ROOT / "axolotl_configs" / "demo"))
    from make_base_model import make_base_model

    model = ROOT / ".cache" / "smollm2-135m-instruct"
    make_base_model(model, cache=ROOT / ".cache")
    notebook = read()
    parameters = notebook.cells[1].source
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder), model=str(model))
    notebook.cells[1].source, notebook.metadata = parameters, METADATA
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if shown(output)]
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    write()

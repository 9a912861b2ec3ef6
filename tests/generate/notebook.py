"""The outputs of trl_examples/quickstart.ipynb.

`python tests/generate/notebook.py` runs it with its own settings, on SmolLM2 from the package
index, and writes its outputs (about five minutes on two free cores). test_notebook.py runs it with
smaller ones.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "trl_examples" / "quickstart.ipynb"

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

"""Programs that execute a notebook from its first cell to its last, beside the stock kernel."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nbformat import v4, write
from test_server import CELLS, check_outputs, normalized

KERNELS = ("python3", "python3-curve")
BROKEN = 2

WITH_NBCLIENT = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read("in.ipynb", as_version=4)
NotebookClient(notebook, kernel_name=sys.argv[1]).execute()
nbformat.write(notebook, "out.ipynb")
"""

COMMANDS = {
    "nbclient": ["-c", WITH_NBCLIENT, "KERNEL"],
    "jupyter-execute": ["-m", "jupyter", "execute", "--kernel_name=KERNEL", "--output=out", "in.ipynb"],
    "papermill": ["-m", "papermill", "-k", "KERNEL", "-p", "who", "Ada", "in.ipynb", "out.ipynb"],
}


def execute(folder: Path, program: str, kernel_name: str) -> subprocess.Popen[str]:
    """Start to execute the notebook *in.ipynb* of a new folder, to *out.ipynb*."""
    folder.mkdir()
    cells = [v4.new_code_cell(code, id=f"cell-{number}") for number, code in enumerate(CELLS)]
    if program == "papermill":
        del cells[BROKEN]  # papermill ends at the first error, whatever a cell's tags say
    else:
        cells[BROKEN]["metadata"]["tags"] = ["raises-exception"]
    cells.insert(0, v4.new_code_cell("who = 'nobody'", id="who", metadata={"tags": ["parameters"]}))
    kernelspec = {"name": kernel_name, "display_name": kernel_name, "language": "python"}
    write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), folder / "in.ipynb")
    return subprocess.Popen(
        [sys.executable, *(word.replace("KERNEL", kernel_name) for word in COMMANDS[program])],
        cwd=folder,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def without_papermill(notebook: dict[str, Any]) -> None:
    """Take away the cell of parameters, and the times that papermill writes down."""
    assert notebook["metadata"].pop("papermill")["parameters"] == {"who": "Ada"}
    parameters = notebook["cells"].pop(1)
    assert parameters["metadata"]["tags"] == ["injected-parameters"]
    for cell in notebook["cells"]:
        assert cell["metadata"].pop("papermill")["status"] == "completed"


@pytest.mark.parametrize("program", COMMANDS)
@pytest.mark.timeout(120)
def test_same_outputs_as_stock(tmp_path, program):
    # Else the first plot in a new home says that it makes the cache.
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], check=True, timeout=60)
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(execute(tmp_path / name, program, name)) for name in KERNELS]
        for process in running:
            stack.callback(process.kill)
        said = {name: one.communicate(timeout=100) for name, one in zip(KERNELS, running, strict=True)}
    for name, process in zip(KERNELS, running, strict=True):
        assert process.returncode == 0, said[name]
    output, errors = said["python3-curve"]
    assert not re.search("warn|encrypt|plain ?text", output + errors, re.IGNORECASE)

    argv = {name: (tmp_path / name / "argv").read_text().splitlines() for name in KERNELS}
    assert ["curve_kernel" in argv[name] for name in KERNELS] == [False, True]
    stock, curve = (json.loads((tmp_path / name / "out.ipynb").read_text()) for name in KERNELS)
    for notebook, name in ((stock, "python3"), (curve, "python3-curve")):
        if program == "papermill":
            without_papermill(notebook)
        assert notebook["metadata"].pop("kernelspec")["name"] == name
        assert notebook["cells"].pop(0)["execution_count"] == 1
    if program != "papermill":
        check_outputs(curve)
    assert sum(bool(cell["outputs"]) for cell in curve["cells"]) >= len(CELLS) - 2
    assert normalized(curve) == normalized(stock)

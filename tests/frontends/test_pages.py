"""Pages made from a notebook that runs in this kernel: served by Voila, built by Sphinx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, browser_page, jupyter_server
from nbformat import v4, write
from playwright.sync_api import expect
from test_lab import kernel_pids

CELLS = [
    "import sys; print('curve_kernel' in sys.orig_argv, 'on the page')",
    "from ipywidgets import HTML, IntSlider\n"
    "slider, text = IntSlider(value=7, max=9), HTML('not moved')\n"
    "slider.observe(lambda change: setattr(text, 'value', f'moved to {change.new}'), 'value')\n"
    "display(slider, text)",
]


def write_notebook(path: Path) -> None:
    kernelspec = {
        "name": "python3-curve",
        "display_name": "Python 3 (CurveZMQ)",
        "language": "python",
    }
    cells = [v4.new_code_cell(code) for code in CELLS]
    write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), path)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.flaky(reruns=2)
@pytest.mark.timeout(120)
def test_voila(tmp_path):
    """Each visitor has a kernel of their own, and their slider moves it."""
    log = tmp_path / "server.log"
    (tmp_path / "pages").mkdir()
    write_notebook(tmp_path / "pages" / "page.ipynb")
    arguments = ["--ServerApp.jpserver_extensions={'voila.server_extension': True}"]
    running = jupyter_server(tmp_path / "pages", log, *arguments, app="server")
    with running as address, browser_page() as page:
        page.goto(f"{address}/voila/render/page.ipynb?token=t0ken")
        expect(page.locator("body")).to_contain_text("True on the page", timeout=60_000)
        handle = page.locator(".widget-slider .noUi-handle")
        expect(handle).to_be_visible(timeout=60_000)
        handle.focus()
        handle.press("ArrowRight")
        expect(page.locator("body")).to_contain_text("moved to 8", timeout=30_000)
        assert len(kernel_pids()) == 1
    text = log.read_text()
    assert "encrypt" not in text
    assert "Traceback" not in text


@pytest.mark.timeout(90)
def test_myst_nb(tmp_path):
    (tmp_path / "conf.py").write_text(
        "extensions = ['myst_nb']\nnb_execution_mode = 'force'\nnb_execution_raise_on_error = True\n"
    )
    write_notebook(tmp_path / "index.ipynb")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", ".", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    # -W: a warning is an error.
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "True on the page" in page
    assert "IntSliderModel" in page

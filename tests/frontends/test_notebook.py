"""Notebook 7 and JupyterLab in a real browser: the same day's work in both."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path

import psutil
import pytest
from browser import CHROMIUM, Lab, browser_page, jupyter_server
from nbformat import v4, write
from playwright.sync_api import Locator, Page, expect
from support import listening_ports, wait_for
from test_lab import kernel_pids

from curve_kernel.wire import read_mechanism

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    # The page itself is sometimes late or early on a busy machine.
    pytest.mark.flaky(reruns=2),
    pytest.mark.timeout(200),
]
KERNEL = "Python 3 (CurveZMQ)"
CELLS = [
    "import time; ran = time.time(); print('first', 6 * 7)",
    "from IPython.display import HTML, Markdown, Latex\ndisplay(HTML('<b class=\"bold\">rich</b>'))",
    "import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1)); plt.plot([1, 4, 9]); plt.show()",
    "from ipywidgets import IntSlider, Label\n"
    "slider, label = IntSlider(value=3, max=9), Label('not moved')\n"
    "slider.observe(lambda change: setattr(label, 'value', f'moved to {change.new}'), 'value')\n"
    "display(slider, label)",
    "%matplotlib widget\nplt.figure(); plt.plot([1, 2]); plt.gcf().canvas",
    "print('last', slider.value)",
]


class Notebook(Lab):
    """One notebook's page, of Notebook 7 or of JupyterLab."""

    def __init__(self, page: Page, url: str, cells: int) -> None:
        self.page = page
        page.goto(url)
        self.wait_open(cells)

    def wait_open(self, cells: int) -> None:
        expect(self.cells).to_have_count(cells, timeout=60_000)
        self.wait_idle()

    def run_all(self) -> None:
        """A page that has just opened may take the first click for nothing."""
        for _ in range(3):
            self.menu("Run", "Run All Cells")
            with contextlib.suppress(AssertionError):
                prompt = self.cells.first.locator(".jp-InputPrompt").first
                return expect(prompt).not_to_have_text("[ ]:", timeout=8000)
        raise AssertionError("nothing runs")

    def menu(self, *names: str) -> None:
        # As fast as a person: a menu that has just opened takes no click yet.
        self.page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{names[0]}$")).click()
        for name in names[1:]:
            self.page.wait_for_timeout(500)
            item = re.compile(f"^{re.escape(name)}")
            self.page.locator(".lm-Menu-item:visible", has_text=item).first.click()

    def output(self, index: int) -> Locator:
        return self.cells.nth(index).locator(".jp-OutputArea").first

    def save(self) -> None:
        self.page.keyboard.press("Control+s")


def write_notebook(path: Path, *codes: str) -> None:
    kernelspec = {"name": "python3-curve", "display_name": KERNEL, "language": "python"}
    cells = [v4.new_code_cell(code) for code in (*codes, "")]
    write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), path)


def check_run(notebook: Notebook) -> None:
    """All cells have run, and their outputs are shown."""
    expect(notebook.output(5)).to_contain_text("last 3", timeout=60_000)
    expect(notebook.output(0)).to_contain_text("first 42")
    expect(notebook.output(1).locator("b.bold")).to_have_text("rich")
    expect(notebook.output(2).locator("img")).to_be_visible()
    expect(notebook.output(3).locator(".widget-slider")).to_be_visible(timeout=30_000)
    expect(notebook.output(4).locator("canvas").first).to_be_visible(timeout=30_000)


def move_slider(notebook: Notebook) -> None:
    mouse, output = notebook.page.mouse, notebook.output(3)
    output.locator(".widget-slider").hover()
    output.locator(".noUi-handle").hover()
    mouse.down()
    box = output.locator(".noUi-base").bounding_box()
    assert box
    mouse.move(box["x"] + box["width"] * 0.8, box["y"], steps=5)
    mouse.up()
    expect(output).to_contain_text("moved to", timeout=30_000)
    notebook.page.wait_for_timeout(1000)
    value = re.findall(r"\d", output.inner_text())[-1]
    notebook.run("print('slider', slider.value)", f"slider {value}")


def answer_input(notebook: Notebook) -> None:
    cell = notebook.run("print('hello', input('Who? '))")
    cell.locator(".jp-Stdin-input").fill("Ada")
    cell.locator(".jp-Stdin-input").press("Enter")
    expect(cell.locator(".jp-OutputArea").first).to_contain_text("hello Ada")


def interrupt_loop(notebook: Notebook) -> None:
    cell = notebook.run("print('loop')\nwhile True: time.sleep(.01)", "loop")
    notebook.menu("Kernel", "Interrupt Kernel")
    expect(cell.locator(".jp-OutputArea").first).to_contain_text("KeyboardInterrupt", timeout=30_000)
    notebook.wait_idle()


def restart_and_run_all(notebook: Notebook) -> None:
    notebook.menu("Kernel", "Restart Kernel and Run All Cells…")
    notebook.page.locator(".jp-Dialog button", has_text=re.compile("^Restart$")).click()


@pytest.mark.parametrize("app", ["notebook", "lab"])
def test_a_days_work(tmp_path, app):
    folder, log = tmp_path / "notebooks", tmp_path / "server.log"
    folder.mkdir()
    write_notebook(folder / "work.ipynb", *CELLS)
    with jupyter_server(folder, log, app=app) as address, browser_page() as page:
        path = "notebooks" if app == "notebook" else "lab/tree"
        url = f"{address}/{path}/work.ipynb?token=t0ken"
        notebook = Notebook(page, url, len(CELLS) + 1)
        notebook.run_all()
        check_run(notebook)
        [pid] = kernel_pids()
        for port in listening_ports(pid):
            assert read_mechanism(f"tcp://127.0.0.1:{port}") == "CURVE"
        move_slider(notebook)
        restart_and_run_all(notebook)
        wait_for("another kernel", lambda: kernel_pids() and pid not in kernel_pids())
        expect(notebook.cells.nth(6).locator(".jp-OutputArea")).to_contain_text(
            "slider 3", timeout=60_000
        )
        check_run(notebook)
        expect(notebook.output(3)).to_contain_text("not moved")
        notebook.wait_idle()
        notebook.screenshot(f"{app}-work")
        answer_input(notebook)
        interrupt_loop(notebook)
        [pid] = kernel_pids()

        # A second tab on the same kernel.
        notebook.save()
        page.wait_for_timeout(1000)
        saved = notebook.cells.count()
        other_page = page.context.browser.new_page(viewport={"width": 1280, "height": 800})
        other_page.set_default_timeout(30_000)
        other = Notebook(other_page, url + ("&reset" if app == "lab" else ""), saved)
        other.run("from_the_other = ran > 0; print('other tab', from_the_other)", "other tab True")
        other_page.close()
        page.bring_to_front()
        notebook.run("print('from the other:', from_the_other)", "from the other: True")
        assert kernel_pids() == [pid]
    assert "encrypt" not in log.read_text()


def test_notebook_launcher(tmp_path):
    """The kernel is in the menu New, and opens a notebook in a tab of its own."""
    folder, log = tmp_path / "notebooks", tmp_path / "server.log"
    folder.mkdir()
    with jupyter_server(folder, log, app="notebook") as address, browser_page() as page:
        page.goto(f"{address}/tree?token=t0ken")
        page.get_by_text(re.compile("^New$")).first.click(timeout=60_000)
        with page.context.expect_page() as opened:
            page.locator(".lm-Menu-item:visible", has_text=KERNEL).click()
        opened.value.set_default_timeout(30_000)
        notebook = Notebook.__new__(Notebook)
        notebook.page = opened.value
        notebook.wait_open(1)
        notebook.run("import sys; print('curve_kernel' in sys.orig_argv)", "True")
        expect(
            opened.value.locator(".jp-KernelName:visible, .jp-Toolbar-kernelName:visible").first
        ).to_have_text(KERNEL)


@pytest.mark.parametrize("app", ["notebook", "lab"])
def test_the_server_restarts(tmp_path, app):
    """A kernel ends with its server, as stock's do; the page gets another from the new server."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder / "work.ipynb", "kept = 1; print('kept' in globals())")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with browser_page() as page:
        with jupyter_server(folder, tmp_path / "one.log", app=app, port=port) as address:
            path = "notebooks" if app == "notebook" else "lab/tree"
            notebook = Notebook(page, f"{address}/{path}/work.ipynb?token=t0ken", 2)
            notebook.run_all()
            expect(notebook.output(0)).to_contain_text("True")
            [pid] = kernel_pids()
        wait_for("the end of the kernel", lambda: not psutil.pid_exists(pid))
        assert not list(Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json"))
        with jupyter_server(folder, tmp_path / "two.log", app=app, port=port):
            kernel = page.locator(".jp-NotebookPanel .jp-KernelName").first
            expect(kernel).to_have_text("No Kernel", timeout=60_000)
            page.reload()
            notebook.wait_open(2)
            notebook.run("print('kept' in globals(), 'in the new kernel')", "False in the new kernel")
            [new] = kernel_pids()
            assert new != pid

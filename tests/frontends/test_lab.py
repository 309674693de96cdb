"""Open JupyterLab, click the tile, work."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest
import zmq
from support import CHANNELS, curve_socket, listening_ports

pytest.importorskip("playwright")
from browser import CHROMIUM, Lab, browser_page, jupyter_server
from playwright.sync_api import expect

from curve_kernel import connection_file
from curve_kernel.keys import KeyPair
from curve_kernel.wire import read_mechanism

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    # JupyterLab's own page is sometimes late or early on a busy machine.
    pytest.mark.flaky(reruns=2),
]

PLOT = """import matplotlib.pyplot as plt, numpy as np
y, x = np.mgrid[-3:3:300j, -2:3:300j]
plt.figure(figsize=(5, 2.4))
plt.contour(x, y, y**2 - x**3 + x - 1, [0], colors='#0f9d8a')
plt.title('the curve'); plt.show()"""

FORK = """import os
pid = os.fork()
if not pid:
    print('child says hi', flush=True)
    os._exit(0)
os.waitpid(pid, 0);"""


def kernel_pids() -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "curve_kernel" in (process.info["cmdline"] or [])
        and os.environ["HOME"] in str(process.environ())
    ]


def test_lab(tmp_path):
    folder, log = tmp_path / "notebooks", tmp_path / "server.log"
    folder.mkdir()
    with jupyter_server(folder, log, "--debug") as address, browser_page() as page:
        lab = Lab(page, address)
        expect(lab.tile("Python 3 (CurveZMQ)")).to_be_visible()
        lab.screenshot("launcher")
        lab.open_notebook("Python 3 (CurveZMQ)")

        [file] = Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json")
        info = connection_file.read(file)
        with zmq.Context() as context:
            # Eavesdroppers for the whole session.
            plain = context.socket(zmq.SUB)
            wrong = curve_socket(context, zmq.SUB, KeyPair.generate().public_key)
            for subscriber in (plain, wrong):
                subscriber.linger = 0
                subscriber.subscribe(b"")
                subscriber.connect(f"tcp://127.0.0.1:{info['iopub_port']}")

            lab.run("print('hello, ' + 'curve')", "hello, curve")
            lab.run("import sys; print('careful', file=sys.stderr); 6 * 7", "42")
            plot = lab.run(PLOT)
            expect(plot.locator(".jp-OutputArea img")).to_be_visible(timeout=60_000)

            [pid] = kernel_pids()
            ports = listening_ports(pid)
            assert {info[f"{channel}_port"] for channel in CHANNELS} < ports
            assert {read_mechanism(f"tcp://127.0.0.1:{port}") for port in ports} == {"CURVE"}
            lab.screenshot("jupyterlab")
            lab.run(FORK, "child says hi")

            cell = lab.run("name = input('Who? '); print('hello', name)")
            cell.locator(".jp-Stdin-input").fill("Ada")
            cell.locator(".jp-Stdin-input").press("Enter")
            expect(cell.locator(".jp-OutputArea")).to_contain_text("hello Ada")

            debug(lab)

            page.keyboard.press("Control+s")
            cells = lab.cells.count()
            page.reload()
            expect(lab.cells).to_have_count(cells, timeout=60_000)
            lab.wait_idle()
            lab.run("print(name, 'is still here'); kept = 1", "Ada is still here")
            lab.restart()
            lab.run("print('kept' in globals(), 'after the restart')", "False after the restart")
            assert kernel_pids() != [pid]
            assert not plain.poll(0)
            assert not wrong.poll(0)
            plain.close()
            wrong.close()

        lab.run("get_ipython().run_line_magic('connect_info', '')", re.compile("curve_publickey"))
        secrets_are_nowhere(log, page.content())


def debug(lab: Lab) -> None:
    """Set a breakpoint, hit it, see a variable, go on."""
    page = lab.page
    page.locator(".jp-NotebookPanel:visible .jp-DebuggerBugButton").click()
    lab.type_cell("total = 0\nfor n in range(3):\n    total += n\nprint('total is', total)")
    cell = lab.cells.nth(lab.cells.count() - 1)
    gutter = cell.locator(".cm-breakpoint-gutter .cm-gutterElement")
    # The first element of the gutter is a spacer.
    expect(gutter).to_have_count(5)
    gutter.nth(4).click()
    expect(gutter.nth(4).locator(".cm-breakpoint-icon")).to_be_visible()
    index = lab.cells.count() - 1
    cell = lab.cells.nth(index)
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    expect(page.get_by_text("Paused in Debugger")).to_be_visible(timeout=30_000)
    expect(page.locator(".jp-DebuggerVariables")).to_contain_text("total", timeout=30_000)
    lab.screenshot("debugger")
    page.locator('[data-command="debugger:continue"]:visible').first.click()
    expect(cell.locator(".jp-OutputArea")).to_contain_text("total is 3", timeout=30_000)
    page.locator(".jp-NotebookPanel:visible .jp-DebuggerBugButton").click()


def secrets_are_nowhere(log: Path, page: str) -> None:
    """What only the server and the kernel may know: 40 characters of Z85 that fit the public key."""
    [file] = Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json")
    public_key = connection_file.read(file)["curve_publickey"].encode()
    texts = {str(log): log.read_bytes(), "the page": page.encode()}
    for path in Path(os.environ["HOME"]).rglob("*"):
        if path.is_file():
            texts[str(path)] = path.read_bytes()
    for pid in kernel_pids():
        for name in ("environ", "cmdline"):
            texts[f"/proc/{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    assert any(public_key in text for text in texts.values())
    for name, text in texts.items():
        assert not secret_of(public_key, text), name


def secret_of(public_key: bytes, text: bytes) -> bool:
    """Whether any 40 characters of *text* are the secret key of *public_key*."""
    for run in re.findall(rb"(?=([0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}))", text):
        try:
            if zmq.curve_public(run) == public_key:
                return True
        except (zmq.ZMQError, ValueError):
            continue
    return False

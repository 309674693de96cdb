"""JupyterLab without message signing, over a reload and a restart; and `%curve` in a notebook."""

from __future__ import annotations

import contextlib
import getpass
import os
import pty
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
import zmq
from support import MODULE, curve_socket

pytest.importorskip("playwright")
from browser import CHROMIUM, SCREENSHOTS, Lab, browser_page, jupyter_server
from playwright.sync_api import expect

from curve_kernel import connection_file
from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    # JupyterLab's own page is sometimes late or early on a busy machine.
    pytest.mark.flaky(reruns=2),
]


def test_lab_unsigned_over_restart_and_reconnect(tmp_path):
    """Without message signing the connection file holds no secret of any kind; all works as before."""
    install = [
        "install",
        "--user",
        "--name",
        "unsigned",
        "--display-name",
        "Unsigned",
        "--no-message-signing",
    ]
    subprocess.run([*MODULE, *install], check=True, timeout=30, stdout=subprocess.DEVNULL)
    folder, log = tmp_path / "notebooks", tmp_path / "server.log"
    folder.mkdir()
    with jupyter_server(folder, log) as address, browser_page() as page:
        lab = Lab(page, address)
        lab.open_notebook("Unsigned")
        [file] = Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json")
        info = connection_file.read(file)
        assert info["key"] == ""
        assert "curve_secretkey" not in info
        lab.run("kept = 'kept'; print('first', 1 + 1)", "first 2")
        page.keyboard.press("Control+s")
        expect(page.locator(".lm-TabBar-tab.lm-mod-current.jp-mod-dirty")).to_have_count(0)
        cells = lab.cells.count()
        page.reload()
        expect(lab.cells).to_have_count(cells, timeout=60_000)
        lab.wait_idle()
        lab.run("print('reconnected,', kept)", "reconnected, kept")
        cell = lab.run("print('hello', input('Who? '))")
        cell.locator(".jp-Stdin-input").fill("Ada")
        cell.locator(".jp-Stdin-input").press("Enter")
        expect(cell.locator(".jp-OutputArea")).to_contain_text("hello Ada")
        lab.restart()
        lab.run("print('kept' in globals(), 'after the restart')", "False after the restart")


def test_curve_magic(tmp_path, folder):
    """A notebook sees who is connected, and who was refused."""
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, stdout=subprocess.DEVNULL)
    veras = tmp_path / "vera" / "curve"
    veras.mkdir(parents=True, mode=0o700)
    vera = KeyPair.generate()
    write_certificate(veras / "identity.key_secret", vera.public_key, vera.secret_key)
    write_certificate(folder / "viewers" / "vera.key", vera.public_key)
    notebooks, log = tmp_path / "notebooks", tmp_path / "server.log"
    notebooks.mkdir()
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(jupyter_server(notebooks, log))
        page = stack.enter_context(browser_page())
        lab = Lab(page, address)
        lab.open_notebook("Python 3 (CurveZMQ)")
        [file] = Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json")
        info = connection_file.read(file)
        ours, theirs = pty.openpty()
        console, watch = (
            stack.enter_context(
                subprocess.Popen(
                    [*MODULE, command, "--existing", str(file)],
                    stdin=theirs,
                    stdout=theirs,
                    stderr=theirs,
                    env={**os.environ, "TERM": "xterm", **env},
                )
            )
            for command, env in (
                ("console", {}),
                ("watch", {"JUPYTER_CONFIG_DIR": str(veras.parent)}),
            )
        )
        stack.callback(watch.kill)
        stack.callback(console.kill)
        threading.Thread(target=drain, args=(ours,), daemon=True).start()
        with zmq.Context() as context:
            plain = context.socket(zmq.DEALER)
            unknown = curve_socket(context, zmq.DEALER, info["curve_publickey"].encode())
            wrong = curve_socket(context, zmq.DEALER, KeyPair.generate().public_key)
            for one in (plain, unknown, wrong):
                one.linger = 0
                one.reconnect_ivl = -1
                one.connect(f"tcp://127.0.0.1:{info['shell_port']}")
            seen: set[str] = set()

            def complete() -> bool:
                """Ask in a cell until everybody has come, and each of the three is counted."""
                cell = lab.run("%curve", "Every channel is encrypted (CURVE)")
                rows = cell.locator(".jp-OutputArea tbody tr").all_inner_texts()
                seen.clear()
                seen.update(re.sub(r"\s+", " ", row).strip() for row in rows)
                who = {re.split(" ", row)[0] for row in seen}
                # Who looks whether the kernel is there may count as a stranger, too.
                refusals = [row for row in seen if re.search(r" shell \d+$", row)]
                return {"manager", "vera"} <= who and len(refusals) >= 3

            assert any(complete() or time.sleep(1) for _ in range(20)), seen
            own = getpass.getuser()
            assert any(row.startswith("unknown key shell") for row in seen)
            assert any(row.startswith("wrong server key shell") for row in seen)
            assert any(re.match(rf"{own} owner shell, .*iopub", row) for row in seen), seen
            assert any(row.startswith("vera viewer iopub ") for row in seen)
            picture = lab.cells.nth(lab.cells.count() - 2).locator(".jp-OutputArea")
            SCREENSHOTS.mkdir(exist_ok=True)
            picture.screenshot(path=SCREENSHOTS / "curve.png")
            for one in (plain, unknown, wrong):
                one.close()
        watch.kill()
        console.kill()
        lab.run("import time; time.sleep(2)")
        left = lab.run("%curve", "Every channel is encrypted (CURVE)").inner_text()
        assert "vera" not in left
        assert "owner" not in left
        assert re.search(r"unknown key\s+shell\s+1", left)


def drain(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 1 << 16):
            pass

"""A secret key that is known is searched for everywhere while front ends run, and it is nowhere.

Each program makes its key pairs by a generator that always gives the same pair, in the program itself,
not in the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from nbformat import v4, write
from support import wait_for

PUBLIC, SECRET = zmq.curve_keypair()
FORMS = {SECRET, zmq.utils.z85.decode(SECRET), zmq.utils.z85.decode(SECRET).hex().encode()}
PATCH = f"""
import sys
if "curve_kernel" not in sys.orig_argv:
    import zmq
    zmq.curve_keypair = lambda: ({PUBLIC!r}, {SECRET!r})
"""
MOLTEN = """
import jupyter_client, sys
km = jupyter_client.manager.KernelManager(kernel_name="python3-curve")
km.start_kernel()
client = km.client()
client.write_connection_file()
km.write_connection_file()
client.start_channels()
client.wait_for_ready(timeout=60)
print(client.connection_file, open(client.connection_file).read())
client.execute_interactive("print(6 * 7)", timeout=60)
km.restart_kernel()
client.wait_for_ready(timeout=60)
client.stop_channels()
km.shutdown_kernel()
"""
NBCLIENT = """
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read("in.ipynb", as_version=4)
NotebookClient(notebook, kernel_name="python3-curve").execute()
nbformat.write(notebook, "out.ipynb")
"""
TOKEN = "t" * 20
DRIVER = Path(__file__).with_name("drive_qtconsole.py")
COMMANDS = {
    "molten": ["-c", MOLTEN],
    "nbclient": ["-c", NBCLIENT],
    "papermill": ["-m", "papermill", "--log-level", "DEBUG", "-k", "python3-curve",
                  "in.ipynb", "out.ipynb"],
    "kernel": ["-m", "jupyter", "kernel", "--kernel=python3-curve", "--debug"],
    "qtconsole": [str(DRIVER), "60", "6 * 7", "42", "--", "--kernel=python3-curve", "--debug"],
    "lab": ["-m", "jupyter", "lab", "--no-browser", "--debug", "--allow-root",
            f"--ServerApp.token={TOKEN}"],
}  # fmt: skip
NEEDS = {
    "papermill": "papermill",
    "qtconsole": "qtconsole",
    "lab": "jupyterlab",
    "nbclient": "nbclient",
}


def places(*folders: Path) -> Iterator[tuple[str, bytes]]:
    """What any process of this machine shows of itself, and every file of *folders*."""
    for process in psutil.process_iter():
        for name in ("environ", "cmdline"):
            with contextlib.suppress(OSError):
                yield f"{name} of {process.pid}", Path(f"/proc/{process.pid}/{name}").read_bytes()
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file():
                    yield str(path), path.read_bytes()


def search(*folders: Path) -> int:
    count = 0
    for name, text in places(*folders):
        count += 1
        for form in FORMS:
            assert form not in text, f"the secret key is in {name}"
    return count


def use_lab(log: Path) -> None:
    """Start, restart and end a kernel by the API, and look at what it tells."""
    url = wait_for("the server", lambda: re.search(r"http://[^/\s]+:\d+/", log.read_text()))[0]

    def ask(path: str, method: str = "GET", data: bytes | None = None) -> bytes:
        request = urllib.request.Request(
            f"{url}api/{path}", data, {"Authorization": f"token {TOKEN}"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text: bytes = answer.read()
        assert not any(form in text for form in FORMS)
        return text

    def asked() -> bool:
        with contextlib.suppress(OSError):
            return bool(ask("status"))
        return False

    wait_for("an answer", asked)
    kernel = json.loads(ask("kernels", "POST", b'{"name": "python3-curve"}'))["id"]
    session = {"path": "a.ipynb", "name": "a", "type": "notebook", "kernel": {"name": "python3-curve"}}
    ask("sessions", "POST", json.dumps(session).encode())
    for path in ("kernels", f"kernels/{kernel}", "sessions", "kernelspecs", "status", "me"):
        ask(path)
    ask(f"kernels/{kernel}/restart", "POST", b"{}")
    ask(f"kernels/{kernel}/interrupt", "POST", b"{}")
    ask("kernels")


@pytest.mark.parametrize("program", COMMANDS)
def test_the_secret_is_nowhere(tmp_path, program):
    if program in NEEDS:
        pytest.importorskip(NEEDS[program])
    folders = [tmp_path / name for name in ("work", "tmp")] + [Path(os.environ["HOME"])]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as patch:
        Path(patch, "sitecustomize.py").write_text(PATCH)
        write(
            v4.new_notebook(
                cells=[v4.new_code_cell("import os; dict(os.environ), vars(get_ipython().kernel)")]
            ),
            folders[0] / "in.ipynb",
        )
        log = folders[0] / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *COMMANDS[program]],
                cwd=folders[0],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(
                        [patch, *filter(None, [os.environ.get("PYTHONPATH")])]
                    ),
                    "PYTHONUNBUFFERED": "1",
                    "QT_QPA_PLATFORM": "offscreen",
                    "TMPDIR": str(folders[1]),
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
            if program == "lab":
                use_lab(log)
            public = PUBLIC.decode()

            def is_made() -> bool:
                assert process.poll() is None, log.read_text()
                return any(public in file.read_text() for file in runtime.glob("kernel-*.json"))

            wait_for("a connection file with the known key", is_made)
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                assert search(*folders) > 3
                if program in ("lab", "kernel"):
                    process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            if program not in ("lab", "kernel"):
                assert process.returncode == 0, log.read_text()
        finally:
            process.kill()
            process.wait(20)
    assert search(*folders) > 3

"""Each attack of an insider, for some time, beside an owner at work."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import flood
import insider
import psutil
import pytest
from support import run_code
from test_floods import p95, watch
from victim import Victim, figure, victim

# Half a minute in a run for figures, on ipc too.
SECONDS = float(os.environ.get("CURVE_KERNEL_ROW_SECONDS", "2"))
LINES = [str(number) for number in range(50)]
CELLS = {
    "": "for number in range(50): print(number, flush=True)",
    "deaf": "for _ in range(4): display({'image/png': data}, raw=True)\n"
    "for number in range(50): print(number, flush=True)",
    "thief": "assert input() == 'secret'\nfor number in range(50): print(number, flush=True)",
    "lock": "import ctypes; ctypes.PyDLL(None).usleep(1_500_000)\n"
    "for number in range(50): print(number, flush=True)",
}
PREPARE = "import os; from IPython.display import display; data = os.urandom(10_000_000)"
KINDS = [*insider.KINDS, "lock"]


def cells(kernel: Victim, kind: str, seconds: float) -> list[float]:
    """Seconds that each of an owner's cells takes, for so long; each one has all lines."""
    code, times, end = CELLS.get(kind, CELLS[""]), [], time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 5:
        start = time.monotonic()
        assert lines_of(kernel, code) == LINES
        times.append(time.monotonic() - start)
    return times


def lines_of(kernel: Victim, code: str) -> list[str]:
    heard: list[str] = []

    def output(message: dict[str, object]) -> None:
        content = message["content"]
        assert isinstance(content, dict)
        if message["msg_type"] == "stream":
            heard.append(content["text"])
        if message["msg_type"] == "iopub_welcome":
            assert content == {"subscription": ""}

    reply = kernel.client.execute_interactive(
        code,
        timeout=60,
        allow_stdin=True,
        stdin_hook=lambda _: kernel.client.input("secret"),
        output_hook=output,
    )
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(heard).split()


def attack(kernel: Victim, kind: str, measured: dict[str, float]) -> None:
    """Work beside the attacker. *measured* is filled on the way, since stock may not get to the end."""
    process = kernel.process
    run_code(kernel.client, PREPARE)
    measured["quiet_ms"] = round(p95(cells(kernel, kind, max(2, SECONDS / 6))) * 1000, 1)
    channels = list(kernel.channels.values())[:5]
    if kind == "lock":
        command = [flood.__file__, "huge", str(SECONDS), kernel.server_key, str(channels[0])]
    else:
        command = [insider.__file__, kind, str(SECONDS), kernel.client.session.session]
        command += map(str, channels)
    pair = kernel.owner if kind == "thief" else kernel.viewer
    keys = f"{kernel.server_key} {pair.public_key.decode()} {pair.secret_key.decode()}"
    env = {**os.environ, "PYTHONPATH": str(Path(flood.__file__).parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *command], text=True, env=env, **pipes) as attacker:
        assert attacker.stdin is not None
        assert attacker.stdout is not None
        attacker.stdin.write(keys)
        attacker.stdin.close()
        watcher = threading.Thread(target=watch, args=(process, attacker, measured))
        watcher.start()
        try:
            times: list[float] = []
            while attacker.poll() is None:
                times += cells(kernel, kind, 0.5)
            assert attacker.returncode == 0
            measured["done"] = int(attacker.stdout.read())
        finally:
            attacker.kill()
            watcher.join()
            measured["lives"] = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    measured |= {"cells": len(times), "attack_ms": round(p95(times) * 1000, 1)}


@contextlib.contextmanager
def on(transport: str, name: str) -> Iterator[Victim]:
    if transport == "tcp":
        with victim(name) as kernel:
            yield kernel
        return
    with (
        tempfile.TemporaryDirectory() as short,  # a socket's path has 107 characters at most
        victim(name, transport="ipc", connection_file=f"{short}/kernel.json") as kernel,
    ):
        yield kernel


def rows(transport: str) -> list[str]:
    """On ipc nobody has an address, and nothing is acknowledged."""
    return [
        kind for kind in KINDS if transport == "tcp" or kind not in ("unacknowledged", "crowd", "lock")
    ]


ROWS = [("tcp", kind) for kind in rows("tcp")]
ROWS += [("ipc", kind) for kind in rows("ipc") if SECONDS >= 10 or kind == "without_key"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("transport", "kind"), ROWS)
def test_row(transport: str, kind: str) -> None:
    measured: dict[str, float] = {}
    with on(transport, "python3-curve") as kernel:
        try:
            attack(kernel, kind, measured)
        finally:
            figure(f"{kind}, {transport}", kernel.name, **measured)
        kernel.works()
    assert measured["peak_mib"] < 128
    # What the thief counts is what it has stolen.
    assert measured["done"] == 0 if kind == "thief" else measured["done"] > 3


@pytest.mark.skipif(
    "CURVE_KERNEL_STOCK" not in os.environ, reason="for the figures beside: set CURVE_KERNEL_STOCK"
)
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("transport", "kind"), ROWS)
def test_row_of_stock(transport: str, kind: str) -> None:
    """Nothing is asserted of stock; what it does is told beside."""
    measured: dict[str, float] = {}
    try:
        with on(transport, "python3") as kernel:
            attack(kernel, kind, measured)
            figure(f"{kind}, {transport}", "stock CURVE", **measured)
    except (Exception, AssertionError) as error:  # noqa: BLE001
        failed = f"{type(error).__name__}: {str(error)[:200]}"
        figure(f"{kind}, {transport}", "stock CURVE", failed=failed, **measured)

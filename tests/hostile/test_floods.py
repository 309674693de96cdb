"""A legitimate user at work while somebody without a key floods the ports."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import flood as flooder
import psutil
import pytest
from flood import KINDS
from jupyter_client import BlockingKernelClient
from support import run_code
from victim import Victim, figure, victim

from curve_kernel.client import BlockingKernelClient as OwnKeysClient
from curve_kernel.client import ConnectionRefusedByKernelError

# A minute in a run for figures.
SECONDS = float(os.environ.get("CURVE_KERNEL_FLOOD_SECONDS", "8"))
MOST_MIB = min(8 << 30, psutil.virtual_memory().available // 2) >> 20
OPEN_64 = "files = [open('/dev/null') for _ in range(64)]; [f.close() for f in files]; print('opened')"


def round_trips(client: Any, seconds: float, least: int = 20) -> list[float]:
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < least:
        start = time.monotonic()
        reply = client.execute_interactive("pass", timeout=60, allow_stdin=False)
        assert reply["content"]["status"] == "ok"
        times.append(time.monotonic() - start)
        time.sleep(0.02)
    return times


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]


def new_client(kernel: Victim) -> float:
    """Seconds until a client that was not there before has its first answer."""
    start = time.monotonic()
    info = json.loads(Path(kernel.km.connection_file).read_text())
    client: Any
    while True:
        if kernel.name == "python3-curve":
            client = OwnKeysClient(client_keys=kernel.owner)
        else:
            client = BlockingKernelClient()
        client.load_connection_info(info)
        try:
            client.start_channels()
            client.wait_for_ready(timeout=60)
            break
        except (ConnectionRefusedByKernelError, RuntimeError):
            if time.monotonic() - start > 60:
                raise
    taken = time.monotonic() - start
    client.stop_channels()
    return taken


def watch(process: psutil.Process, attacker: subprocess.Popen[str], measured: dict[str, float]) -> None:
    """Note the most memory that the kernel takes, and end the attacker before the machine has none."""
    start, before = time.monotonic(), process.memory_info().rss
    with contextlib.suppress(psutil.NoSuchProcess):
        while attacker.poll() is None:
            taken = (process.memory_info().rss - before) >> 20
            measured["peak_mib"] = max(taken, measured.get("peak_mib", 0))
            if taken > MOST_MIB:
                break
            measured["seconds"] = round(time.monotonic() - start, 1)
            time.sleep(0.02)
    attacker.kill()


def flood(kernel: Victim, kind: str, measured: dict[str, float]) -> None:
    """Work beside an attacker. *measured* is filled on the way, since stock does not get to the end."""
    process = kernel.process
    run_code(kernel.client, "pass")
    measured["quiet_ms"] = round(p95(round_trips(kernel.client, 3)) * 1000, 1)
    before = process.memory_info().rss
    command = [sys.executable, flooder.__file__, kind, str(SECONDS)]
    command += [kernel.server_key, *map(str, kernel.channels.values())]
    env = {**os.environ, "PYTHONPATH": str(Path(flooder.__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as attacker:
        watcher = threading.Thread(target=watch, args=(process, attacker, measured))
        watcher.start()
        try:
            time.sleep(2)
            measured["ready_s"] = round(new_client(kernel), 2)
            times = []
            while attacker.poll() is None:
                times += round_trips(kernel.client, 0.2, least=2)
                opened = run_code(kernel.client, OPEN_64)
                assert opened == ("ok", "opened\n"), opened
            assert attacker.returncode == 0
            assert attacker.stdout is not None
            measured["done"] = int(attacker.stdout.read())
        finally:
            attacker.kill()
            watcher.join()
    time.sleep(1)
    measured["flood_ms"] = round(p95(times) * 1000, 1)
    measured["after_mib"] = (process.memory_info().rss - before) >> 20
    measured["descriptors"] = process.num_fds()


@pytest.mark.parametrize("kind", KINDS)
def test_flood(kind: str) -> None:
    # Where connections that speak take more than 1,024 files, more must be allowed; see the docs.
    with victim(ulimit="-Sn 1024" if kind == "greeters" else "-n 1024") as kernel:
        fds = kernel.process.num_fds()
        measured: dict[str, float] = {}
        flood(kernel, kind, measured)
        figure(kind, kernel.name, **measured)
        assert measured["done"] > 100
        assert measured["ready_s"] < 5
        # Of thousands of connections at once the allocator keeps some for the next ones.
        assert measured["after_mib"] < (160 if kind == "greeters" else 64)
        assert measured["descriptors"] < fds + 200
        kernel.works()


@pytest.mark.skipif(
    "CURVE_KERNEL_STOCK" not in os.environ, reason="for the figures beside: set CURVE_KERNEL_STOCK"
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_flood_of_stock(kind: str) -> None:
    """Nothing is asserted of stock; what it does is told beside."""
    measured: dict[str, float] = {}
    with victim("python3") as kernel:
        try:
            flood(kernel, kind, measured)
            figure(kind, "stock CURVE", **measured)
        except Exception as error:  # noqa: BLE001
            failed = f"{type(error).__name__}: {str(error)[:200]}"
            figure(kind, "stock CURVE", failed=failed, **measured)

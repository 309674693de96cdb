"""A launcher whose manager is gone ends its kernel, unless somebody has joined that."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from typing import Any

from support import MODULE

from curve_kernel.keys import KeyPair, as_hex
from curve_kernel.launch.link import Link

START = {"do": "start", "env": {}, "cwd": None, "folder": None, "name": "far", "owners": []}


async def start(info: dict[str, Any], pair: KeyPair) -> None:
    link = Link(f"tcp://127.0.0.1:{info['launcher_port']}", pair, info["curve_publickey"].encode())
    try:
        await link.connect(10)
        assert await link.ask(timeout=10, **START)
        while not (await link.ask("poll", 10) or {})["open"]:
            await asyncio.sleep(0.1)
    finally:
        link.close()


def test_a_stranger_keeps_no_abandoned_kernel_alive() -> None:
    """A port scanner, of which there is a connection at each moment, but none that stays."""
    pair = KeyPair.generate()
    words = ["launch", "--manager-key", as_hex(pair.public_key), "--ip=127.0.0.1", "--orphan-timeout=1"]
    process = subprocess.Popen([*MODULE, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        info = json.loads(process.stdout.readline())
        asyncio.run(start(info, pair))
        connections, since = [], time.monotonic()
        while process.poll() is None:
            assert time.monotonic() - since < 20
            try:
                connections.append(socket.create_connection(("127.0.0.1", info["shell_port"]), 1))
            except OSError:
                continue
            connections[-1].send(b"\xff")  # or the system would not show it to the kernel yet
            if len(connections) > 5:
                connections.pop(0).close()
            time.sleep(0.2)
        print(f"ended after {time.monotonic() - since:.1f} s")
        while connections:
            connections.pop().close()
    finally:
        process.kill()
        process.communicate(timeout=20)

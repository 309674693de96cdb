"""jupyter_server by hand-written client, twenty kernels at once; test_server has the life of one."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest
from browser import jupyter_server
from support import wait_for
from test_server import PROTOCOLS, Server, check_ports, pid_of

COUNT = 20


async def use(server: Server, kernel_id: str, protocol: str | None) -> tuple[int, str]:
    async with server.channels(kernel_id, protocol) as channels:
        assert await channels.execute(f"print({kernel_id!r})") == ("ok", f"{kernel_id}\n")
        pid = await pid_of(channels)
        return pid, (await asyncio.to_thread(check_ports, kernel_id, pid))["curve_publickey"]


async def twenty(address: str) -> None:
    server = Server(address)
    begin = time.monotonic()
    ids = await asyncio.gather(*(server.start() for _ in range(COUNT)))
    started = time.monotonic()
    print(f"{COUNT} kernels started in {started - begin:.1f} s")
    used = await asyncio.gather(*(use(server, one, PROTOCOLS[n % 2]) for n, one in enumerate(ids)))
    print(f"and used in {time.monotonic() - started:.1f} s")
    pids, keys = zip(*used, strict=True)
    assert len(set(pids)) == len(set(keys)) == COUNT
    await asyncio.gather(*(server.call("DELETE", f"/{one}", 204) for one in ids))
    wait_for("the end of the kernels", lambda: not any(map(psutil.pid_exists, pids)))


@pytest.mark.timeout(150)
def test_twenty_kernels_at_once(tmp_path):
    folder, log = tmp_path / "notebooks", tmp_path / "server.log"
    folder.mkdir()
    with jupyter_server(folder, log, app="server") as address:
        asyncio.run(asyncio.wait_for(twenty(address), 120))
    assert "Traceback" not in log.read_text()

"""Kernels start and stop, clients come and go, messages are large and small: nothing is lost or grows.

CURVE_KERNEL_SOAK_SECONDS says for how long.
"""

from __future__ import annotations

import collections
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import jupyter_client
import psutil
import pytest
from support import started
from victim import Victim, figure, victim

from curve_kernel.client import BlockingKernelClient

SECONDS = float(os.environ.get("CURVE_KERNEL_SOAK_SECONDS", "20"))


def state(process: psutil.Process) -> dict[str, int]:
    return {
        "rss": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def count_reply(client: Any, replies: collections.Counter[str]) -> None:
    message = client.get_shell_msg(timeout=30)
    if message["msg_type"] == "execute_reply":
        replies[message["parent_header"]["msg_id"]] += 1


def exchange(client: Any, count: int, size: int) -> None:
    """Each of *count* requests is answered once, with all of its output."""
    sent = [client.execute(f"print('x' * {size})") for _ in range(count)]
    replies: collections.Counter[str] = collections.Counter()
    printed: collections.Counter[str] = collections.Counter()
    idle = set()
    deadline = time.monotonic() + 60
    while idle < set(sent) or len(replies) < count:
        assert time.monotonic() < deadline, (len(idle), len(replies))
        message = client.get_iopub_msg(timeout=30) if not idle >= set(sent) else None
        if message is not None:
            request = message["parent_header"].get("msg_id")
            content = message["content"]
            if message["msg_type"] == "stream":
                printed[request] += len(content["text"])
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                idle.add(request)
        else:
            count_reply(client, replies)
    while client.shell_channel.msg_ready():
        count_reply(client, replies)
    assert replies == dict.fromkeys(sent, 1)
    assert {request: printed[request] for request in sent} == dict.fromkeys(sent, size + 1)


def soak(kernel: Victim, seconds: float) -> dict[str, int]:
    """What has grown by how much, from the tenth client to the last."""
    chance = random.Random(1)
    process = kernel.process
    info = json.loads(Path(kernel.km.connection_file).read_text())
    requests = clients = 0
    before: dict[str, int] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end or clients < 20:
        client: Any
        if kernel.name == "python3-curve":
            client = BlockingKernelClient(client_keys=kernel.owner)
        else:
            client = jupyter_client.BlockingKernelClient()
        client.load_connection_info(info)
        client.start_channels()
        client.wait_for_ready(timeout=30)
        count = chance.randint(1, 10)
        exchange(client, count, chance.choice([1, 100, 10_000, 1 << 20]))
        client.stop_channels()
        # Of a client that does not read libzmq loses what is beyond its limit, and keeps the rest.
        while kernel.client.iopub_channel.msg_ready():
            kernel.client.get_iopub_msg(timeout=1)
        requests, clients = requests + count, clients + 1
        if clients == 10:
            before = state(process)
    time.sleep(1)
    after = state(process)
    kernel.works()
    grown = {name: after[name] - before[name] for name in after}
    figure("soak", kernel.name, seconds=seconds, clients=clients, requests=requests, **grown)
    return {"requests": requests, **grown}


@pytest.mark.timeout(SECONDS * 2 + 200)
def test_soak() -> None:
    """IPython keeps some of what it ran, so memory is compared with stock's for each request."""
    with victim() as kernel:
        ours = soak(kernel, SECONDS / 2)
    with victim("python3") as kernel:
        stock = soak(kernel, SECONDS / 2)
    assert ours["threads"] <= 0
    assert ours["descriptors"] <= 10
    expected = stock["rss"] / stock["requests"] * ours["requests"]
    assert ours["rss"] < expected * 1.5 + (48 << 20)


@pytest.mark.timeout(SECONDS + 200)
def test_kernels_come_and_go() -> None:
    """In one manager's process."""
    kernels = 0
    before: dict[str, int] = {}
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end or kernels < 6:
        with started("python3-curve") as (km, client):
            exchange(client, 3, 1000)
            km.restart_kernel(now=True)
            client.wait_for_ready(timeout=30)
            exchange(client, 3, 1000)
        kernels += 1
        if kernels == 3:
            before = state(psutil.Process())
    after = state(psutil.Process())
    grown = {name: after[name] - before[name] for name in after}
    figure("kernels", "python3-curve", kernels=kernels, **grown)
    assert grown["threads"] <= 2
    assert grown["descriptors"] <= 10
    assert not list(Path(os.environ["JUPYTER_RUNTIME_DIR"]).iterdir())

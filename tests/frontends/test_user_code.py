"""What people run in a kernel that brings its own loops, processes and sockets."""

from __future__ import annotations

import threading
import time
from typing import Any

import ipykernel
import psutil
import pytest
from support import CHANNELS, listening_ports, run_code, started

from curve_kernel.wire import read_mechanism


def check(client: Any, code: str, says: str, timeout: float = 30) -> None:
    assert run_code(client, code, timeout=timeout) == ("ok", says)


ENGINES = """
import ipyparallel
cluster = ipyparallel.Cluster(n=2, log_level=40)
clients = cluster.start_and_connect_sync()
pids = clients[:].apply_sync(os.getpid)
print(clients[:].map_sync(lambda n: n * n, range(5)), os.getpid() in pids, len(set(pids)))
"""


@pytest.mark.timeout(120)
def test_ipyparallel():
    """Two engines and their controller, started by a cell; this kernel's own ports stay encrypted."""
    with started("python3-curve") as (km, client):
        run_code(client, "import os; from tqdm import auto; auto.tqdm.disable = True")
        status, text = run_code(client, ENGINES, timeout=90)
        assert (status, text.splitlines()[-1].split("]")[-1].strip()) == ("ok", "False 2"), text
        assert "[0, 1, 4, 9, 16]" in text
        for channel in CHANNELS:
            assert read_mechanism(km._make_url(channel)) == "CURVE"
        own = {
            c.laddr.port for c in psutil.Process(km.provisioner.pid).net_connections() if not c.raddr
        }
        assert {read_mechanism(f"tcp://127.0.0.1:{port}") for port in own} == {"CURVE"}
        check(client, "clients.close(); cluster.stop_cluster_sync(); print('stopped')", "stopped\n", 60)


@pytest.mark.skipif(ipykernel.version_info < (7,), reason="subshells came with ipykernel 7")
def test_subshell():
    """A cell runs in a subshell while the main shell is busy."""
    with started("python3-curve") as (km, client):
        run_code(client, "import threading, time; done = threading.Event()")

        def control(kind: str, **content: Any) -> dict[str, Any]:
            message = client.session.msg(kind, content)
            client.control_channel.send(message)
            while True:
                reply = client.get_control_msg(timeout=20)
                if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                    assert reply["content"]["status"] == "ok", reply["content"]
                    return reply["content"]

        subshell = control("create_subshell_request")["subshell_id"]
        assert control("list_subshell_request")["subshell_id"] == [subshell]
        busy = client.execute("print('woken' if done.wait(30) else 'never woken')")
        request = client.session.msg(
            "execute_request", {"code": "done.set(); print('in the subshell')"}
        )
        request["header"]["subshell_id"] = subshell
        client.shell_channel.send(request)
        texts: dict[str, str] = {}
        ends: list[str] = []
        while len(ends) < 2:
            message = client.get_iopub_msg(timeout=20)
            parent = message["parent_header"].get("msg_id")
            if message["msg_type"] == "stream":
                texts[parent] = texts.get(parent, "") + message["content"]["text"]
            elif message["content"].get("execution_state") == "idle":
                ends += [parent] if parent in (busy, request["header"]["msg_id"]) else []
        assert texts == {busy: "woken\n", request["header"]["msg_id"]: "in the subshell\n"}
        control("delete_subshell_request", subshell_id=subshell)
        assert control("list_subshell_request")["subshell_id"] == []
        for port in listening_ports(km.provisioner.pid):
            assert read_mechanism(f"tcp://127.0.0.1:{port}") == "CURVE"


TICKS = {
    "asyncio": (
        "%gui asyncio\n"
        "import asyncio\n"
        "ticks = []\n"
        "async def tick():\n"
        "    while True:\n"
        "        ticks.append(1)\n"
        "        await asyncio.sleep(.02)\n"
        "task = asyncio.get_event_loop().create_task(tick())"
    ),
    "qt": (
        "%gui qt\n"
        "from qtpy import QtCore\n"
        "ticks, timer = [], QtCore.QTimer()\n"
        "timer.timeout.connect(lambda: ticks.append(1))\n"
        "timer.start(20)"
    ),
}


@pytest.mark.flaky(reruns=2)
@pytest.mark.parametrize("loop", TICKS)
def test_gui(loop, monkeypatch):
    """A loop goes on between cells, and the kernel still answers, is interrupted and stops."""
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    with started("python3-curve") as (km, client):
        check(client, TICKS[loop], "")
        # Qt's loop, of stock too, now and then sleeps over a request that comes right after another.
        time.sleep(1)
        before = int(run_code(client, "len(ticks)")[1])
        time.sleep(1)
        assert int(run_code(client, "len(ticks)")[1]) > before + 10
        timer = threading.Timer(1, km.interrupt_kernel)
        timer.start()
        status, text = run_code(client, "import time; time.sleep(60)")
        assert (status, text) == ("error", "KeyboardInterrupt: ")
        time.sleep(1)
        check(client, "'alive'", "'alive'")


def test_asyncio_and_trio():
    with started("python3-curve") as (_, client):
        check(client, "import asyncio\nprint(await asyncio.gather(asyncio.sleep(.1, 1)))", "[1]\n")
        check(client, "%autoawait trio", "")
        check(
            client,
            "import trio\n"
            "found = []\n"
            "async def child(n):\n"
            "    await trio.sleep(.01 * n); found.append(n)\n"
            "async with trio.open_nursery() as nursery:\n"
            "    for n in (3, 1, 2):\n"
            "        nursery.start_soon(child, n)\n"
            "print(found)",
            "[1, 2, 3]\n",
        )
        check(client, "%autoawait asyncio", "")
        check(client, "print(await asyncio.sleep(.1, 'and back'))", "and back\n")


@pytest.mark.timeout(90)
def test_matplotlib_inline_and_widget():
    """The canvas of ipympl is clicked in test_notebook; here is what is sent."""
    with started("python3-curve") as (_, client):
        sent: list[dict[str, Any]] = []

        def run(code: str) -> list[dict[str, Any]]:
            sent.clear()
            reply = client.execute_interactive(code, timeout=60, output_hook=sent.append)
            assert reply["content"]["status"] == "ok", reply["content"]
            return [message for message in sent if message["msg_type"] != "status"]

        run("%matplotlib inline\nimport matplotlib.pyplot as plt, os")
        [picture] = [
            m for m in run("plt.plot([1, 4, 9]); plt.show()") if m["msg_type"] == "display_data"
        ]
        assert picture["content"]["data"]["image/png"].startswith("iVBORw0KGgo")
        assert run_code(client, "%matplotlib widget") == ("ok", "")
        messages = run("figure = plt.figure(); plt.plot([1, 2]); figure.canvas.draw(); figure.canvas")
        models = {
            message["content"]["data"]["state"]["_model_name"]
            for message in messages
            if message["msg_type"] == "comm_open"
        }
        assert "MPLCanvasModel" in models

"""What a kernel, and whoever reaches the port, may make ``watch --web`` keep and do."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from typing import Any

import pytest

from curve_kernel.cli.page import Page
from curve_kernel.cli.widgets import Widgets

VIEW = "application/vnd.jupyter.widget-view+json"


def comm(model: str, **state: Any) -> tuple[str, dict[str, Any]]:
    data = {"state": state}
    return "comm_open", {"comm_id": model, "target_name": "jupyter.widget", "data": data}


def shown(widgets: Widgets, model: str) -> str:
    output: dict[str, Any] = {"data": {VIEW: {"model_id": model}}}
    widgets.make_static([output])
    return output["data"].get("text/plain", "")


def message(kind: str, **content: Any) -> dict[str, Any]:
    return {"msg_type": kind, "content": content, "parent_header": {"msg_id": "one"}}


def test_a_box_that_holds_itself():
    widgets = Widgets()
    for kind in ("HBoxModel", "VBoxModel"):
        widgets.take(*comm("box", _model_name=kind, children=["IPY_MODEL_box"] * 100))
        began = time.monotonic()
        shown(widgets, "box")
        assert time.monotonic() - began < 1
    for n in range(60):
        widgets.take(*comm(f"label-{n}", _model_name="LabelModel", value=f"label {n}"))
    children = [f"IPY_MODEL_label-{n}" for n in range(60)]
    widgets.take(*comm("box", _model_name="VBoxModel", children=children))
    assert shown(widgets, "box").splitlines() == [f"label {n}" for n in range(60)]


def test_what_a_widget_may_hold():
    widgets = Widgets()
    widgets.take(*comm("one", value=1))
    for n in range(3000):
        widgets.take("comm_msg", {"comm_id": "one", "data": {"state": {f"name-{n}": "x" * 4000}}})
    widgets.take(*comm("two", value=["x" * 1_000_000] * 1000, **{"x" * 1_000_000: 1}))
    widgets.take(*comm("x" * 1_000_000, value=1))
    for n in range(2000):
        widgets.take(*comm(f"many-{n}", **{f"name-{m}": "x" * 4000 for m in range(10)}))
    assert len(json.dumps(widgets._states)) < 20_000_000
    for value in (float("nan"), float("inf"), 10**400, "x", None):
        widgets.take(*comm("bar", _model_name="IntProgressModel", value=value, description="Fit"))
        assert shown(widgets, "bar").startswith("Fit")


def test_what_outputs_may_hold():
    page = Page("kernel")
    large = {"x" * 1000: "y" * 1000}
    for n in range(200):
        output = message("display_data", data={"text/plain": "z"}, metadata={f"{n}": "x" * 100_000})
        output["parent_header"]["msg_id"] = str(n % 40)
        page.show(output)
    kept = [output for item in page._items.values() for output in item.outputs]
    assert kept
    assert all(output["metadata"] == {} for output in kept)
    page.show(message("display_data", data={"text/plain": "z"}, metadata=large))
    assert page._items["one"].outputs[-1]["metadata"] == large

    for n in range(160):
        output = message("display_data", data={"application/json": ["x" * 500_000]}, metadata={})
        output["parent_header"]["msg_id"] = f"json {n}"
        page.show(output)
    assert len(json.dumps([item.outputs for item in page._items.values()])) < 70_000_000


def answers(port: int, request: bytes, body: int = 0) -> int:
    """Send a request; gives how many bytes of the body went off before the server closed."""
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        try:
            client.sendall(request)
            while sent < body:
                sent += client.send(bytes(1 << 16))
            client.recv(1 << 16)
        except OSError:
            pass
    return sent


def status(url: str) -> int | None:
    """The status of the answer, None if the server closed instead."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except OSError:
        return None


def test_what_a_stranger_may_send(capfd):
    pytest.importorskip("nbconvert")
    from curve_kernel.cli.web import WebServer

    page = Page("kernel")
    server = WebServer(page)
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    answers(server.port, f"GET /?token=%ff\x9b31m HTTP/1.1\r\n{host}\r\n".encode("latin-1"))
    for method in ("GET", "POST"):
        request = f"{method} / HTTP/1.1\r\n{host}Content-Length: 90000000\r\n\r\n"
        assert answers(server.port, request.encode(), 90_000_000) < 30_000_000
    with urllib.request.urlopen(server.url.replace("/?", "/events?"), timeout=5) as events:
        many = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(600)]
        page.note("the stream goes on")
        while b"the stream goes on" not in events.readline():
            pass
        many[-1].settimeout(5)
        assert many[-1].recv(1) == b""
        for client in many:
            client.close()
    deadline = time.monotonic() + 10
    while status(server.url) != 200:  # the server hears of each end in its turn
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert capfd.readouterr() == ("", ""), "it is the watcher's terminal"

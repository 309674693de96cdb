"""A client made of bare sockets, which sees when the kernel disconnects one of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import zmq
from jupyter_client.session import Session
from support import curve_socket, wait_for
from zmq.utils.monitor import parse_monitor_message

from curve_kernel.keys import KeyPair

KINDS = {"shell": zmq.DEALER, "stdin": zmq.DEALER, "control": zmq.DEALER, "iopub": zmq.SUB}


class Member:
    """Connected to *channels*, as soon as it is made; what it loses it does not get back."""

    def __init__(
        self,
        info: dict[str, Any],
        keys: KeyPair | None = None,
        channels: tuple[str, ...] = tuple(KINDS),
        username: str = "a liar",
        comes_back: bool = False,
    ) -> None:
        self.session = Session(key=info["key"].encode(), username=username)
        self.context = zmq.Context()
        self.sockets: dict[str, zmq.Socket[Any]] = {}
        self.monitors: dict[str, zmq.Socket[Any]] = {}
        self.connected: set[str] = set()
        self.lost: dict[str, float] = {}
        for channel in channels:
            socket = curve_socket(self.context, KINDS[channel], info["curve_publickey"].encode())
            if keys is not None:
                socket.curve_publickey, socket.curve_secretkey = keys.public_key, keys.secret_key
            socket.identity = self.session.bsession
            socket.rcvhwm = socket.sndhwm = 0
            if not comes_back:
                socket.reconnect_ivl = -1
            if channel == "iopub":
                socket.subscribe(b"")
            self.monitors[channel] = socket.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            )
            if info["transport"] == "ipc":
                socket.connect(f"ipc://{info['ip']}-{info[f'{channel}_port']}")
            else:
                socket.connect(f"tcp://{info['ip']}:{info[f'{channel}_port']}")
            self.sockets[channel] = socket
        wait_for("the handshakes", lambda: self.look() or self.connected == set(channels), 20)

    def look(self) -> None:
        """See what has been lost, and when that was seen."""
        for channel, monitor in self.monitors.items():
            while monitor.poll(0):
                event = parse_monitor_message(monitor.recv_multipart())["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.connected.add(channel)
                elif channel in self.connected:
                    self.connected.discard(channel)
                    self.lost[channel] = time.monotonic()

    def is_out(self, *channels: str) -> bool:
        self.look()
        return not self.connected & set(channels or self.sockets)

    def request(self, channel: str, kind: str, **content: Any) -> str:
        message = self.session.msg(kind, content)
        self.session.send(self.sockets[channel], message)
        return message["header"]["msg_id"]

    def execute(self, code: str, **content: Any) -> str:
        return self.request(
            "shell", "execute_request", code=code, silent=False, allow_stdin=False, **content
        )

    def messages(self, channel: str, timeout: float = 0) -> Iterator[dict[str, Any]]:
        while self.sockets[channel].poll(timeout * 1000):
            _, message = self.session.recv(self.sockets[channel])
            if message is not None:
                yield message

    def reply(self, msg_id: str, channel: str = "shell", timeout: float = 60) -> dict[str, Any]:
        for message in self.messages(channel, timeout):
            if message["parent_header"].get("msg_id") == msg_id:
                return message
        raise TimeoutError(f"no reply to {msg_id}")

    def close(self) -> None:
        for channel, socket in self.sockets.items():
            socket.disable_monitor()
            self.monitors[channel].close(linger=0)
            socket.close(linger=0)
        self.context.term()

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

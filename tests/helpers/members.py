"""A kernel with a list, and clients of bare sockets, which see when they are disconnected."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.session import Session
from support import client_of, connection_info, curve_socket, headless, wait_for
from zmq.utils.monitor import parse_monitor_message

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

ALLOWLIST = "--CurveKernelApp.client_authorization=allowlist"
SECONDS = float(os.environ.get("CURVE_KERNEL_SECONDS", "6"))
"""In which a client has to be out: 2 on a machine that has nothing else to do."""
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


class Kernel:
    """A running kernel, its manager's client, its log and its list."""

    def __init__(self, info: dict[str, Any], client: Any, log: Path, folder: Path) -> None:
        self.info, self.client, self.log, self.folder = info, client, log, folder
        self.keys: dict[str, KeyPair] = {}
        self.manager: KeyPair | None = None

    def list(self, name: str, role: str = "owner", **kwargs: Any) -> KeyPair:
        keys = self.keys.setdefault(name, KeyPair.generate())
        write_certificate(self.path(name, role), keys.public_key, **kwargs)
        return keys

    def path(self, name: str, role: str = "owner") -> Path:
        return self.folder / f"{role}s" / f"{name}.key"

    def member(self, name: str, *channels: str, **kwargs: Any) -> Member:
        return Member(
            self.info, self.keys[name], channels or ("shell", "control", "stdin", "iopub"), **kwargs
        )


@contextlib.contextmanager
def listed_kernel(tmp_path: Path, transport: str) -> Iterator[Kernel]:
    """A kernel with a list of its own in *tmp_path*, with nobody in it."""
    folder = tmp_path / "list"
    for name in ("owners", "viewers"):
        (folder / name).mkdir(parents=True, mode=0o700)
    keys = KeyPair.generate()
    file, log = tmp_path / "kernel.json", tmp_path / "log"
    info = connection_info(curve_publickey=keys.public_key.decode(), transport=transport)
    if transport == "ipc":
        info["ip"] = str(tmp_path / "s")
    file.write_text(json.dumps(info))
    env = {"JUPYTER_CURVE_SECRETKEY": keys.secret_key.decode()}
    arguments = (ALLOWLIST, "--log-level=INFO", f"--CurveKernelApp.authorized_clients={folder}")
    with (
        log.open("w") as stderr,
        headless(*arguments, file=file, env=env, stderr=stderr) as (_, info),
        client_of(info, keys) as client,
    ):
        kernel = Kernel(info, client, log, folder)
        kernel.manager = keys
        yield kernel

"""ZMTP 3.1 with CURVE, byte by byte (RFC 23 and 26), so that each byte can be a wrong one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from typing import Any

from nacl.bindings import crypto_box, crypto_box_keypair, crypto_box_open
from zmq.utils import z85

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"


def greeting(mechanism: bytes = b"CURVE", version: bytes = b"\x03\x01", as_server: int = 0) -> bytes:
    return SIGNATURE + version + mechanism.ljust(20, b"\0") + bytes([as_server]) + bytes(31)


def frame(body: bytes, *, command: bool = True) -> bytes:
    kind = 4 if command else 0
    if len(body) < 256:
        return bytes([kind, len(body)]) + body
    return bytes([kind | 2]) + struct.pack(">Q", len(body)) + body


def named(name: bytes, data: bytes) -> bytes:
    return bytes([len(name)]) + name + data


def metadata(**fields: bytes) -> bytes:
    return b"".join(
        named(name.replace("_", "-").encode(), struct.pack(">I", len(value)) + value)
        for name, value in fields.items()
    )


class Peer:
    """A client of one port that sends what it is told to."""

    def __init__(
        self,
        port: int | str,
        server_key: str = "",
        keys: tuple[bytes, bytes] | None = None,
        *,
        timeout: float = 2,
        source: str = "",
    ) -> None:
        if isinstance(port, str):  # ipc
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(timeout)
            self.socket.connect(port)
        else:
            self.socket = socket.create_connection(("127.0.0.1", port), timeout, (source, 0))
        self.server_key = z85.decode(server_key.encode()) if server_key else bytes(32)
        self.public_key, self.secret_key = (
            [z85.decode(key) for key in keys] if keys else crypto_box_keypair()
        )
        self.short_public, self.short_secret = crypto_box_keypair()
        self.nonce = 0

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self.socket.recv(count - len(data))
            if not chunk:
                raise ConnectionError(f"hung up after {data!r}")
            data += chunk
        return data

    def read_frame(self) -> bytes:
        flags = self.read(1)[0]
        size = struct.unpack(">Q", self.read(8))[0] if flags & 2 else self.read(1)[0]
        return self.read(size)

    def rest(self, seconds: float = 1) -> tuple[bytes, bool]:
        """All that comes in so many seconds, and whether the other side hung up."""
        data = b""
        self.socket.settimeout(seconds)
        try:
            while chunk := self.socket.recv(1 << 16):
                data += chunk
        except TimeoutError:
            return data, False
        except OSError:
            pass
        return data, True

    def next_nonce(self) -> bytes:
        self.nonce += 1
        return struct.pack(">Q", self.nonce)

    def acknowledge_nothing(self) -> None:
        """Let the operating system take nothing in that is longer than an acknowledgement."""
        length, jump_if_greater, drop, take = 0x80, 0x25, 0, 0xFFFFFFFF
        steps = [(length, 0, 0, 0), (jump_if_greater, 0, 1, 40), (6, 0, 0, drop), (6, 0, 0, take)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        program = struct.pack("HL", len(steps), ctypes.addressof(code))
        self.socket.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER

    def exchange_greetings(self) -> bytes:
        self.send(greeting())
        return self.read(64)

    def hello(self) -> bytes:
        nonce = self.next_nonce()
        box = crypto_box(bytes(64), b"CurveZMQHELLO---" + nonce, self.server_key, self.short_secret)
        return named(b"HELLO", b"\x01\0" + bytes(72) + self.short_public + nonce + box)

    def take_welcome(self, body: bytes) -> None:
        assert body.startswith(b"\x07WELCOME"), body
        nonce, box = body[8:24], body[24:]
        opened = crypto_box_open(box, b"WELCOME-" + nonce, self.server_key, self.short_secret)
        self.server_short, self.cookie = opened[:32], opened[32:]

    def initiate(self, properties: bytes | None = None) -> bytes:
        properties = metadata(Socket_Type=b"DEALER", Identity=b"") if properties is None else properties
        vouch_nonce = os.urandom(16)
        vouch = crypto_box(
            self.short_public + self.server_key,
            b"VOUCH---" + vouch_nonce,
            self.server_short,
            self.secret_key,
        )
        nonce = self.next_nonce()
        box = crypto_box(
            self.public_key + vouch_nonce + vouch + properties,
            b"CurveZMQINITIATE" + nonce,
            self.server_short,
            self.short_secret,
        )
        return named(b"INITIATE", self.cookie + nonce + box)

    def message(self, payload: bytes, flags: int = 0) -> bytes:
        nonce = self.next_nonce()
        box = crypto_box(
            bytes([flags]) + payload,
            b"CurveZMQMESSAGEC" + nonce,
            self.server_short,
            self.short_secret,
        )
        return frame(named(b"MESSAGE", nonce + box), command=False)

    def ping(self) -> bytes:
        """A ZMTP command, encrypted as a message is."""
        nonce = self.next_nonce()
        box = crypto_box(
            b"\x02\x04PING\0\0abc", b"CurveZMQMESSAGEC" + nonce, self.server_short, self.short_secret
        )
        return frame(named(b"MESSAGE", nonce + box), command=False)

    def to_welcome(self) -> None:
        self.exchange_greetings()
        self.send(frame(self.hello()))
        self.take_welcome(self.read_frame())

    def to_ready(self, socket_type: bytes = b"DEALER") -> bytes:
        self.to_welcome()
        self.send(frame(self.initiate(metadata(Socket_Type=socket_type, Identity=b""))))
        return self.read_frame()

"""An attacker who knows the server key and is listed, in a process of its own.

`insider.py KIND SECONDS SESSION ENDPOINT...`, where the endpoints are the ports, or the paths of ipc,
of shell, stdin, control, iopub and hb. The server key and the key pair come on standard input. It stops
by itself, and tells on standard output how much it did.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq
from zmtp import Peer, frame, greeting, metadata

MIB = 1 << 20
RESET = struct.pack("ii", 1, 0)
FAILS = (OSError, AssertionError, IndexError)


@dataclass
class Insider:
    """What the attacker knows."""

    server_key: str
    keys: tuple[bytes, bytes]
    session: str
    channels: dict[str, int | str]
    end: float

    def goes_on(self) -> bool:
        return time.monotonic() < self.end

    def peer(self, channel: str, kind: bytes, keys: Any = None, **how: Any) -> Peer:
        """A peer whose handshake is over."""
        made = Peer(self.channels[channel], self.server_key, keys or self.keys, **how)
        try:
            made.to_ready(kind)
        except BaseException:
            made.socket.close()
            raise
        return made


def bursts(insider: Insider, channel: str, kind: bytes, keys: Any, count: int, what: bytes) -> int:
    made = 0
    while insider.goes_on():
        with contextlib.suppress(*FAILS), insider.peer(channel, kind, keys) as peer:
            burst = [
                peer.ping() if number % 10 == 9 else peer.message(what and what + b"%d" % number)
                for number in range(count)
            ]
            peer.send(b"".join([*burst, peer.ping()]))
            if isinstance(insider.channels[channel], int):
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        made += 1
    return made


def pings(insider: Insider) -> int:
    """A viewer's subscriptions and a PING in one write, then a reset."""
    return bursts(insider, "iopub", b"SUB", None, 12, b"\x01topic")


def heartbeat_pings(insider: Insider) -> int:
    """With the connection file only: empty messages on hb with PINGs among them, then a reset."""
    return bursts(insider, "hb", b"REQ", zmq.curve_keypair(), 2500, b"")


def unacknowledged(insider: Insider) -> int:
    """60 peers without a key that acknowledge nothing, and then send 20 MiB each."""
    made = 0
    while insider.goes_on():
        peers = []
        for _ in range(60):
            with contextlib.suppress(OSError):
                peers.append(Peer(insider.channels["shell"], insider.server_key))
                peers[-1].acknowledge_nothing()
                peers[-1].send(greeting())
        time.sleep(3)
        for peer in peers:
            peer.socket.settimeout(0.1)
            with contextlib.suppress(OSError):
                peer.socket.sendall(b"\x06" + struct.pack(">Q", 60 * MIB))
                peer.socket.sendall(bytes(20 * MIB))
            peer.socket.close()
        made += len(peers)
    return made


def initiates(insider: Insider) -> int:
    """A viewer that leaves after INITIATE a few times, then twelve handshakes at once."""
    made = 0

    def one(peers: list[Peer]) -> None:
        with contextlib.suppress(*FAILS):
            peers.append(insider.peer("iopub", b"SUB"))
            peers[-1].send(peers[-1].message(b"\x01"))

    while insider.goes_on():
        for _ in range(random.randrange(2, 6)):
            with (
                contextlib.suppress(*FAILS),
                Peer(insider.channels["iopub"], insider.server_key, insider.keys) as peer,
            ):
                peer.to_welcome()
                peer.send(frame(peer.initiate(metadata(Socket_Type=b"SUB", Identity=b""))))
        peers: list[Peer] = []
        threads = [threading.Thread(target=one, args=(peers,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for peer in peers:
            peer.socket.close()
        made += 12
    return made


def deaf(insider: Insider) -> int:
    """A viewer's four connections that read nothing, and come back when they are disconnected."""
    peers: list[Peer] = []
    made = 0
    while insider.goes_on():
        while len(peers) < 4:
            with contextlib.suppress(*FAILS):
                peers.append(insider.peer("iopub", b"SUB"))
                peers[-1].send(peers[-1].message(b"\x01"))
                made += 1
        time.sleep(0.1)
        for peer in list(peers):
            peer.send(peer.message(b"\x01"))
            if isinstance(insider.channels["iopub"], int) and hung_up(peer.socket):
                peer.socket.close()
                peers.remove(peer)
    return made


def hung_up(one: socket.socket) -> bool:
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return info[0] != 1  # TCP_ESTABLISHED


def crowd(insider: Insider) -> int:
    """540 connections to hb from 180 addresses, a third of them with a key that is not listed."""
    peers: list[Peer] = []
    made = 0
    while insider.goes_on():
        for number in range(180):
            for keys in (zmq.curve_keypair(), insider.keys, insider.keys):
                if not insider.goes_on():
                    break
                with contextlib.suppress(*FAILS):
                    source = f"127.0.1.{number + 1}"
                    peers.append(insider.peer("hb", b"REQ", keys, source=source))
                made += 1
        for peer in peers:
            peer.socket.close()
        peers.clear()
    return made


def without_key(insider: Insider) -> int:
    """40 peers without a key that send 60 MiB each, and a viewer that does so on iopub and hb."""
    sent = 0

    def send(peer: Peer) -> None:
        nonlocal sent
        with contextlib.suppress(*FAILS), peer:
            peer.exchange_greetings()
            peer.socket.sendall(b"\x06" + struct.pack(">Q", 60 * MIB))
            for _ in range(60):
                peer.socket.sendall(bytes(MIB))
                sent += MIB

    def endless(channel: str, kind: bytes) -> None:
        nonlocal sent
        with contextlib.suppress(*FAILS), insider.peer(channel, kind) as peer:
            while insider.goes_on():
                peer.socket.sendall(peer.message(bytes(4000), flags=1))
                sent += 4000

    while insider.goes_on():
        targets: list[tuple[Any, tuple[Any, ...]]] = [(endless, ("hb", b"REQ"))]
        targets.append((endless, ("iopub", b"SUB")))
        for _ in range(40):
            with contextlib.suppress(OSError):
                targets.append((send, (Peer(insider.channels["shell"], timeout=2),)))
        threads = [threading.Thread(target=target, args=given) for target, given in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sent >> 20


def many(insider: Insider) -> int:
    """A viewer's 31 connections, over and over."""
    made = 0
    while insider.goes_on():
        peers = []
        for number in range(31):
            with contextlib.suppress(*FAILS):
                channel, kind = ("iopub", b"SUB") if number % 2 else ("hb", b"REQ")
                peers.append(insider.peer(channel, kind))
        made += len(peers)
        for peer in peers:
            peer.socket.close()
    return made


def topics(insider: Insider) -> int:
    """A viewer's subscriptions to texts of its choice, escapes included."""
    made = 0
    while insider.goes_on():
        with contextlib.suppress(*FAILS), insider.peer("iopub", b"SUB") as peer:
            for topic in (b"\x1b]0;evil\x07", b"kernel", b"\xff" * 200, b"", b"<script>"):
                peer.send(peer.message(b"\x01" + topic))
                made += 1
            time.sleep(0.01)
    return made


def thief(insider: Insider) -> int:
    """An owner that takes another owner's routing id, and counts what it gets by that."""
    stolen = 0
    while insider.goes_on():
        with zmq.Context() as context, contextlib.ExitStack() as stack:
            made = []
            for channel in ("shell", "control", "stdin"):
                one = stack.enter_context(context.socket(zmq.DEALER))
                one.linger = 0
                one.identity = insider.session.encode()
                one.curve_publickey, one.curve_secretkey = insider.keys
                one.curve_serverkey = insider.server_key.encode()
                where = insider.channels[channel]
                one.connect(f"ipc://{where}" if isinstance(where, str) else f"tcp://127.0.0.1:{where}")
                made.append(one)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                stolen += sum(bool(one.poll(10) and one.recv_multipart()) for one in made)
    return stolen


KINDS: dict[str, Callable[[Insider], int]] = {
    one.__name__: one
    for one in (
        pings,
        heartbeat_pings,
        unacknowledged,
        initiates,
        deaf,
        crowd,
        without_key,
        many,
        topics,
        thief,
    )
}


if __name__ == "__main__":
    kind, seconds, session, *endpoints = sys.argv[1:]
    server_key, public_key, secret_key = sys.stdin.read().split()
    where: list[int | str] = [int(one) if one.isdecimal() else one for one in endpoints]
    names = ("shell", "stdin", "control", "iopub", "hb")
    channels = dict(zip(names, where, strict=True))
    keys = public_key.encode(), secret_key.encode()
    known = Insider(server_key, keys, session, channels, time.monotonic() + float(seconds))
    print(KINDS[kind](known))

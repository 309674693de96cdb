"""An attacker without any key, in a process of its own: `flood.py KIND SECONDS SERVER_KEY PORT...`.

It stops by itself, and tells on standard output how much it did.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable

import zmq
from zmtp import Peer, frame, greeting

CONNECTIONS = 3000
RESET = struct.pack("ii", 1, 0)
deadline = 0.0


def connect(port: int) -> socket.socket:
    one = socket.socket()
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        one.connect(("127.0.0.1", port))
    return one


def idle(ports: list[int], _: str, says: bytes = b"") -> int:
    """3,000 connections that say nothing, and come back when they are cut."""
    held: dict[int, tuple[socket.socket, int]] = {}
    poller = select.poll()
    made = 0
    while time.monotonic() < deadline:
        while len(held) < CONNECTIONS and time.monotonic() < deadline:
            port = ports[made % len(ports)]
            one = connect(port)
            held[one.fileno()] = (one, port)
            wait_for = select.POLLHUP | select.POLLRDHUP | select.POLLERR
            poller.register(one, wait_for | (select.POLLOUT if says else 0))
            made += 1
            if made % 100 == 0:
                break
        for descriptor, event in poller.poll(20):
            if event == select.POLLOUT:
                held[descriptor][0].send(says)
                poller.modify(descriptor, select.POLLHUP | select.POLLRDHUP | select.POLLERR)
            else:
                poller.unregister(descriptor)
                held.pop(descriptor)[0].close()
    return made


def greeters(ports: list[int], server_key: str) -> int:
    """The same, but each has sent a whole greeting."""
    return idle(ports, server_key, greeting())


def slow(ports: list[int], _: str) -> int:
    """500 connections that send their greeting, a byte a second."""
    held: list[socket.socket] = []
    sent = made = 0
    while time.monotonic() < deadline:
        while len(held) < 500:
            held.append(connect(ports[made % len(ports)]))
            made += 1
        time.sleep(1)
        for one in list(held):
            try:
                one.send(greeting()[sent % 64 : sent % 64 + 1])
            except OSError:
                one.close()
                held.remove(one)
        sent += 1
    return made


def storm(ports: list[int], _: str) -> int:
    """Connect and reset, as fast as it goes."""
    made = 0
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", ports[made % len(ports)]), 1) as one,
        ):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        made += 1
    return made


def strangers(ports: list[int], server_key: str) -> int:
    """Whole handshakes with a key that nobody lists, as fast as it goes."""
    made = 0
    ports = ports[:4]  # those that ask for a key
    keys = zmq.curve_keypair()
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError, AssertionError),
            Peer(ports[made % len(ports)], server_key, keys) as peer,
        ):
            peer.to_welcome()
            peer.send(frame(peer.initiate()))
            peer.read_frame()
        made += 1
    return made


def huge(ports: list[int], _: str) -> int:
    """100 connections with frames of a declared 4 GiB, and as many bytes of it as are taken."""
    held: list[socket.socket] = []
    chunk = bytes(1 << 20)
    sent = made = 0
    poller = select.poll()
    by_descriptor: dict[int, socket.socket] = {}
    while time.monotonic() < deadline:
        for _new in range(100 - len(held)):
            made += 1
            with contextlib.suppress(OSError):
                one = socket.create_connection(("127.0.0.1", ports[made % len(ports)]), 0.1)
                # Just below what the largest channel takes, and far above.
                declared = 4 << 30 if made % 2 else (64 << 20) - 1
                one.sendall(greeting() + b"\x06" + struct.pack(">Q", declared))
                one.setblocking(False)
                held.append(one)
                by_descriptor[one.fileno()] = one
                poller.register(one, select.POLLOUT)
        for descriptor, _events in poller.poll(20):
            one = by_descriptor[descriptor]
            try:
                sent += one.send(chunk)
            except BlockingIOError:
                pass
            except OSError:
                poller.unregister(descriptor)
                by_descriptor.pop(descriptor).close()
                held.remove(one)
    return sent >> 20


KINDS: dict[str, Callable[[list[int], str], int]] = {
    one.__name__: one for one in (idle, greeters, slow, storm, strangers, huge)
}


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), max(hard, wanted)))
    kind, seconds, server_key, *ports = sys.argv[1:]
    deadline = time.monotonic() + float(seconds)
    print(KINDS[kind]([int(port) for port in ports], server_key))

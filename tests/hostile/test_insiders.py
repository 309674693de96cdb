"""Who knows the server key, or is listed as a viewer, and means harm; and strangers in crowds."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import zmq
from support import run_code, wait_for
from test_floods import OPEN_64
from victim import Victim, figure, victim
from zmtp import Peer, frame, greeting, metadata

from curve_kernel.client import BlockingKernelClient
from curve_kernel.keys import KeyPair

MIB = 1 << 20
RESET = struct.pack("ii", 1, 0)


def keys(pair: KeyPair) -> tuple[bytes, bytes]:
    return pair.public_key, pair.secret_key


def grown(kernel: Victim, before: int) -> float:
    return (kernel.process.memory_info().rss - before) / MIB


def new_owner(kernel: Victim) -> float:
    """Seconds until an owner who was not there has the first answer."""
    start = time.monotonic()
    client = BlockingKernelClient(client_keys=kernel.owner)
    client.load_connection_info(json.loads(Path(kernel.km.connection_file).read_text()))
    client.start_channels()
    try:
        client.wait_for_ready(timeout=20)
    finally:
        client.stop_channels()
    return time.monotonic() - start


def curve(kernel: Victim) -> str:
    return run_code(kernel.client, "get_ipython().run_line_magic('curve', '')")[1]


def refused(kernel: Victim, channel: str = "shell") -> Peer:
    """A peer that the authenticator has refused, and that stays."""
    peer = Peer(kernel.channels[channel], kernel.server_key, zmq.curve_keypair(), timeout=5)
    peer.to_welcome()
    peer.send(frame(peer.initiate()))
    assert peer.read_frame().startswith(b"\x05ERROR")
    return peer


def test_a_refused_peer_that_stays_takes_no_memory(kernel: Victim) -> None:
    before, most = kernel.process.memory_info().rss, 0.0
    peers = [refused(kernel) for _ in range(10)]
    for peer in peers:
        peer.send(b"\x02" + struct.pack(">Q", 63 * MIB))
        for _ in range(40):
            peer.send(bytes(MIB))
        most = max(most, grown(kernel, before))
    figure("refused peers that send", kernel.name, grown_mib=round(most, 1))
    assert most < 64


def test_a_refused_peer_is_not_taken_for_who_is_let_in(kernel: Victim) -> None:
    parked = [refused(kernel) for _ in range(6)]
    with Peer(kernel.channels["shell"], kernel.server_key, keys(kernel.owner)) as olga:
        olga.to_ready()
        for peer in parked:
            peer.socket.close()
        junk = []
        for _ in range(300):
            junk.append(socket.create_connection(("127.0.0.1", kernel.channels["control"])))
            junk[-1].sendall(greeting() + b"\x06" + struct.pack(">Q", 4000) + bytes(300))
        time.sleep(1)
        assert olga.rest(0.2)[1] is False
        assert "olga" in curve(kernel)
        for one in junk:
            one.close()


@pytest.mark.parametrize("leaves_by", ["reset", "close"])
def test_who_leaves_after_initiate_locks_nobody_out(kernel: Victim, leaves_by: str) -> None:
    for _ in range(4):
        peers = []
        for _ in range(50):
            peer = Peer(kernel.channels["iopub"], kernel.server_key, keys(kernel.viewer))
            peer.to_welcome()
            peers.append(peer)
        for peer in peers:
            if leaves_by == "reset":
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            peer.send(frame(peer.initiate(metadata(Socket_Type=b"SUB", Identity=b""))))
            peer.socket.close()
    seconds = new_owner(kernel)
    figure("leaves after INITIATE", kernel.name, new_client_s=round(seconds, 2))
    assert seconds < 3


@pytest.mark.parametrize(("channel", "socket_type"), [("hb", b"REQ"), ("iopub", b"SUB")])
def test_connections_are_bounded(kernel: Victim, channel: str, socket_type: bytes) -> None:
    """A viewer's; the kernel may have 1,024 open files."""
    pair = keys(kernel.viewer)
    peers = []
    with contextlib.suppress(OSError):
        for _ in range(600):
            peers.append(Peer(kernel.channels[channel], kernel.server_key, pair))
            peers[-1].to_ready(socket_type)
    files = kernel.process.num_fds()
    figure(f"connections on {channel}", kernel.name, made=len(peers), files=files)
    assert len(peers) > 300
    assert files < 600
    assert run_code(kernel.client, OPEN_64) == ("ok", "opened\n")
    assert new_owner(kernel) < 5
    for peer in peers:
        peer.socket.close()
    wait_for("their files to be given back", lambda: kernel.process.num_fds() < 150)


@pytest.mark.parametrize(("channel", "socket_type"), [("hb", b"REQ"), ("iopub", b"SUB")])
def test_a_message_without_end(kernel: Victim, channel: str, socket_type: bytes) -> None:
    before, sent = kernel.process.memory_info().rss, 0
    pair = keys(kernel.viewer)
    with Peer(kernel.channels[channel], kernel.server_key, pair) as peer:
        peer.to_ready(socket_type)
        with contextlib.suppress(OSError):
            while sent < 100 * MIB:
                peer.socket.sendall(peer.message(bytes(4000), flags=1))
                sent += 4000
    figure(f"endless message on {channel}", kernel.name, sent_mib=sent / MIB, mib=grown(kernel, before))
    assert sent < 50 * MIB
    assert grown(kernel, before) < 64


@pytest.mark.parametrize("size", [10, 200, 900])
def test_a_viewer_subscribes_to_everything(kernel: Victim, size: int) -> None:
    before, sent = kernel.process.memory_info().rss, 0
    with Peer(kernel.channels["iopub"], kernel.server_key, keys(kernel.viewer)) as peer:
        peer.to_ready(b"SUB")
        with contextlib.suppress(OSError):
            while sent < 20 * MIB:
                topic = b"\x01" + f"{sent:016}".encode() + bytes(size)
                peer.socket.sendall(peer.message(topic))
                sent += size
        start = time.monotonic()
        assert run_code(kernel.client, "print('seen')") == ("ok", "seen\n")
        figure("subscriptions", kernel.name, size=size, sent=sent, cell_s=time.monotonic() - start)
        assert time.monotonic() - start < 2
    assert sent < 20 * MIB
    assert grown(kernel, before) < 200


def test_a_subscriber_and_a_heartbeat_that_stay_are_not_cut(kernel: Victim) -> None:
    iopub = Peer(kernel.channels["iopub"], kernel.server_key, keys(kernel.viewer))
    hb = Peer(kernel.channels["hb"], kernel.server_key, keys(kernel.viewer))
    with iopub, hb:
        iopub.to_ready(b"SUB")
        hb.to_ready(b"REQ")
        iopub.send(iopub.message(b"\x01"))
        for number in range(2000):
            hb.send(hb.message(b"", flags=1) + hb.message(b"%d" % number))
            hb.read_frame()
            hb.read_frame()
        assert run_code(kernel.client, "print('seen')") == ("ok", "seen\n")
        heard, hung_up = iopub.rest(0.5)
        assert not hung_up
        assert len(heard) > 500


SOCKETS_OF_THE_USER = """
import socket, time
end = time.monotonic() + 5
total = dead = 0
while time.monotonic() < end:
    pairs = [socket.socketpair() for _ in range(40)]
    listeners = [socket.create_server(('127.0.0.1', 0)) for _ in range(40)]
    time.sleep(0.05)
    for one, other in pairs:
        total += 1
        try:
            one.sendall(b'x')
            dead += other.recv(1) != b'x'
        except OSError:
            dead += 1
        one.close()
        other.close()
    for one in listeners:
        total += 1
        try:
            socket.create_connection(one.getsockname(), 1).close()
        except OSError:
            dead += 1
        one.close()
print(total > 1000, dead)
"""


def test_what_user_code_opens_is_never_shut_down() -> None:
    """libzmq tells numbers of descriptors, which are those of something else soon."""
    with victim(ulimit="-Sn 1024") as kernel:
        user_code_under_attack(kernel)


def user_code_under_attack(kernel: Victim) -> None:
    stop = threading.Event()

    def attack() -> None:
        ports = list(kernel.channels.values())
        turn = 0
        while not stop.is_set():
            held: list[Any] = []
            for _ in range(400):
                one = socket.socket()
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                held.append(one)
                with contextlib.suppress(OSError):
                    one.connect(("127.0.0.1", ports[turn % len(ports)]))
                    one.send(b"\xff")
            time.sleep(0.01)
            for one in held:
                one.close()
            turn += 1

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        assert run_code(kernel.client, SOCKETS_OF_THE_USER, timeout=60) == ("ok", "True 0\n")
    finally:
        stop.set()
        attacker.join()

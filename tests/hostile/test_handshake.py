"""Every mechanism, every version, every wrong byte at each step: nobody gets in, nothing breaks."""

from __future__ import annotations

import struct

import pytest
import zmq
from victim import Victim, figure
from zmtp import SIGNATURE, Peer, frame, greeting, metadata, named

# What each channel expects at its other end.
TYPES = {
    "shell": b"DEALER",
    "stdin": b"DEALER",
    "control": b"DEALER",
    "iopub": b"SUB",
    "hb": b"REQ",
    "pipe": b"PUSH",
}
NULL_READY = frame(named(b"READY", metadata(Socket_Type=b"DEALER", Identity=b"")))
PLAIN_HELLO = frame(named(b"HELLO", b"\x05admin\x05admin"))
GREETINGS = {
    "NULL": greeting(b"NULL") + NULL_READY,
    "PLAIN": greeting(b"PLAIN") + PLAIN_HELLO,
    "GSSAPI": greeting(b"GSSAPI") + frame(named(b"INITIATE", bytes(100))),
    "unknown": greeting(b"ROT13") + NULL_READY,
    "no mechanism": greeting(b"") + NULL_READY,
    "CURVE as server": greeting(as_server=1),
    "ZMTP 1.0": b"\x01\x00" + b"\x05\x00hello",
    "ZMTP 1.0 with identity": b"\x06\x00olgas" + b"\x05\x00hello",
    "ZMTP 2.0": SIGNATURE + b"\x01\x05\x00\x00" + b"\x00\x05hello",
    "ZMTP 3.0 of NULL": greeting(b"NULL", b"\x03\x00") + NULL_READY,
    "ZMTP 9": greeting(b"NULL", b"\x09\x00") + NULL_READY,
    "nothing": b"",
    "garbage": bytes(range(256)) * 4,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
}


def is_refusal(heard: bytes) -> bool:
    """Whether a peer heard nothing but a greeting of CURVE, and at most one ERROR."""
    return heard[64:66] in (b"", b"\x04\x06", b"\x04\x07") and b"READY" not in heard


@pytest.mark.parametrize("what", GREETINGS)
def test_no_other_mechanism_or_version(kernel: Victim, what: str) -> None:
    for channel, port in kernel.channels.items():
        with Peer(port) as peer:
            peer.send(GREETINGS[what])
            heard, _ = peer.rest(0.3)
            assert is_refusal(heard), (channel, heard)
            assert heard[12:32].rstrip(b"\0") in (b"CURVE", b""), channel


def test_the_key_that_is_known_gets_in(kernel: Victim) -> None:
    """The hand-made client can do it, so what follows can fail."""
    for channel, port in kernel.channels.items():
        if channel == "pipe":
            continue
        owner = (kernel.owner.public_key, kernel.owner.secret_key)
        with Peer(port, kernel.server_key, owner) as peer:
            assert peer.to_ready(TYPES[channel]).startswith(b"\x05READY"), channel


def test_wrong_keys(kernel: Victim) -> None:
    fresh = zmq.curve_keypair()
    other_server = zmq.curve_keypair()[0].decode()
    # Whoever has seen the public keys only: of an owner, and of the kernel itself.
    stolen = (kernel.owner.public_key, fresh[1])
    manager = (kernel.server_key.encode(), fresh[1])
    for channel, port in kernel.channels.items():
        with Peer(port, other_server) as peer:
            peer.exchange_greetings()
            peer.send(frame(peer.hello()))
            heard, _ = peer.rest(0.3)
            assert b"WELCOME" not in heard, channel
        if channel == "pipe":
            continue
        for keys in (fresh, stolen, manager):
            if channel == "hb" and keys is fresh:
                continue
            with Peer(port, kernel.server_key, keys) as peer:
                peer.to_welcome()
                peer.send(frame(peer.initiate(metadata(Socket_Type=TYPES[channel], Identity=b""))))
                heard, _ = peer.rest(0.3)
                assert b"READY" not in heard, channel


def test_replay(kernel: Victim) -> None:
    """A recorded HELLO gets a WELCOME that its thief can't open; a recorded INITIATE gets nothing."""
    port = kernel.channels["control"]
    owner = (kernel.owner.public_key, kernel.owner.secret_key)
    with Peer(port, kernel.server_key, owner) as victim:
        victim.exchange_greetings()
        hello = frame(victim.hello())
        victim.send(hello)
        victim.take_welcome(victim.read_frame())
        initiate = frame(victim.initiate())
        victim.send(initiate)
        assert victim.read_frame().startswith(b"\x05READY")
        message = victim.message(b"")
        for recorded in ([hello, initiate], [initiate], [hello, initiate, message], [hello, hello]):
            with Peer(port, kernel.server_key) as thief:
                thief.exchange_greetings()
                for one in recorded:
                    thief.send(one)
                heard, _ = thief.rest(0.5)
                assert b"READY" not in heard
    # On its own connection a recorded ping is not answered twice.
    with Peer(kernel.channels["hb"], kernel.server_key, owner) as peer:
        assert peer.to_ready(b"REQ").startswith(b"\x05READY")
        ping = peer.message(b"", flags=1) + peer.message(b"ping")
        peer.send(ping)
        for _ in range(2):
            assert peer.read_frame().startswith(b"\x07MESSAGE")
        peer.send(ping)
        assert peer.rest(0.5)[0] == b""


@pytest.mark.parametrize("step", ["greeting", "HELLO", "INITIATE"])
def test_cut_short(kernel: Victim, step: str) -> None:
    port = kernel.channels["shell"]
    owner = (kernel.owner.public_key, kernel.owner.secret_key)
    with Peer(port, kernel.server_key, owner) as peer:
        peer.to_welcome()
        size = {
            "greeting": 64,
            "HELLO": len(frame(peer.hello())),
            "INITIATE": len(frame(peer.initiate())),
        }[step]
    for length in sorted({0, 1, 2, 9, 10, 11, 12, 31, 32, 33, 63, *range(66, size, 17), size - 1}):
        if length >= size:
            continue
        with Peer(port, kernel.server_key, owner) as peer:
            if step == "greeting":
                peer.send(greeting()[:length])
            elif step == "HELLO":
                peer.exchange_greetings()
                peer.send(frame(peer.hello())[:length])
            else:
                peer.to_welcome()
                peer.send(frame(peer.initiate())[:length])
            assert b"READY" not in peer.rest(0.02)[0]
        # The same, well framed: the command itself is too short.
        if step != "greeting":
            with Peer(port, kernel.server_key, owner) as peer:
                if step == "HELLO":
                    peer.exchange_greetings()
                    command = peer.hello()
                else:
                    peer.to_welcome()
                    command = peer.initiate()
                peer.send(frame(command[: min(length, len(command) - 1)]))
                heard, _ = peer.rest(0.02)
                assert b"READY" not in heard


@pytest.mark.parametrize("step", ["HELLO", "INITIATE"])
def test_too_long(kernel: Victim, step: str) -> None:
    owner = (kernel.owner.public_key, kernel.owner.secret_key)
    for channel, port in kernel.channels.items():
        for extra in (1, 255, 1 << 12, 1 << 17):
            if channel == "pipe" and step == "INITIATE":
                continue
            with Peer(port, kernel.server_key, owner) as peer:
                if step == "HELLO":
                    peer.exchange_greetings()
                    peer.send(frame(peer.hello() + bytes(extra)))
                else:
                    peer.to_welcome()
                    peer.send(frame(peer.initiate() + bytes(extra)))
                heard, _ = peer.rest(0.1)
                assert b"READY" not in heard, (channel, extra)


def test_wrong_metadata_and_order(kernel: Victim) -> None:
    port = kernel.channels["shell"]
    owner = (kernel.owner.public_key, kernel.owner.secret_key)
    broken = [
        b"\xff",
        b"\x0bSocket-Type\xff\xff\xff\xffDEALER",
        named(b"Socket-Type", struct.pack(">I", 100) + b"DEALER"),
        metadata(Socket_Type=b"PUB"),
        metadata(Socket_Type=b"\xff" * 200),
    ]
    for properties in broken:
        with Peer(port, kernel.server_key, owner) as peer:
            peer.to_welcome()
            peer.send(frame(peer.initiate(properties)))
            heard, _ = peer.rest(0.2)
            assert b"READY" not in heard, properties
    for order in (
        [b"READY"],
        [b"WELCOME"],
        [b"ERROR"],
        [b"MESSAGE"],
        [b"INITIATE"],
        [b"PING"],
        [b"SUBSCRIBE"],
    ):
        with Peer(port, kernel.server_key, owner) as peer:
            peer.exchange_greetings()
            for name in order:
                peer.send(frame(named(name, bytes(200))))
            heard, _ = peer.rest(0.2)
            assert b"READY" not in heard, order


@pytest.mark.parametrize("declared", [1 << 16, 1 << 24, 1 << 32, (1 << 63) - 1])
def test_declared_sizes(kernel: Victim, declared: int) -> None:
    """A frame that is declared large is given up at once where the limit is smaller, else soon."""
    process = kernel.process
    before = process.memory_info().rss
    for port in kernel.channels.values():
        with Peer(port, kernel.server_key) as peer:
            peer.exchange_greetings()
            peer.send(b"\x06" + struct.pack(">Q", declared))
            for _ in range(64):
                peer.send(bytes(1 << 20))
            peer.rest(0.2)
    grown = (process.memory_info().rss - before) / 2**20
    figure("declared frame", kernel.name, declared=declared, grown_mib=round(grown, 1))
    assert grown < 80

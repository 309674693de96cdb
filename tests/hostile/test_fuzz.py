"""Structure-aware fuzzing: the greeting, each step of the handshake, and what a listed viewer may send.

CURVE_KERNEL_FUZZ_CASES says how many cases each test makes; those of a normal run are always the same.
Failures are kept by hypothesis, in .hypothesis, and tried first in the next run.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import CHANNELS, wait_for
from victim import Victim, figure, victim
from zmtp import Peer, frame, greeting, metadata, named

CASES = int(os.environ.get("CURVE_KERNEL_FUZZ_CASES", "150"))
PORTS = (*CHANNELS, "pipe")
NAMES = (b"HELLO", b"WELCOME", b"INITIATE", b"READY", b"ERROR", b"MESSAGE", b"PING", b"PONG", b"")
fuzzing = settings(
    max_examples=CASES,
    derandomize=CASES <= 1000,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Target:
    """One kernel for all cases; it is asked for a sign of life every thousand."""

    def __init__(self, kernel: Victim) -> None:
        self.kernel, self.ports = kernel, kernel.channels
        self.cases = 0

    def peer(self, channel: str, role: str = "stranger") -> Peer:
        self.cases += 1
        if self.cases % 1000 == 0:
            self.kernel.works()
        keys = {"owner": self.kernel.owner, "viewer": self.kernel.viewer}.get(role)
        pair = (keys.public_key, keys.secret_key) if keys else None
        return Peer(self.ports[channel], self.kernel.server_key, pair)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "HOME",
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "IPYTHONDIR",
        ):
            (home / name).mkdir(mode=0o700)
            patch.setenv(name, str(home / name))
        with victim() as kernel:
            process = kernel.process
            kernel.works()
            before = process.num_fds(), process.num_threads(), process.memory_info().rss
            target = Target(kernel)
            yield target
            kernel.works()
            wait_for("the connections to go", lambda: process.num_fds() <= before[0] + 20, 30)
            grown = (process.memory_info().rss - before[2]) / 2**20
            figure("fuzz", kernel.name, cases=target.cases, grown_mib=round(grown, 1))
            assert process.num_threads() <= before[1] + 1
            assert grown < 64


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The same bytes with some of them changed, gone, doubled, moved, or cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        if not changed:
            break
        at = draw(st.integers(0, len(changed) - 1))
        match draw(st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut"])):
            case "flip":
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                changed[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            case "insert":
                changed[at:at] = draw(st.binary(max_size=40))
            case "delete":
                del changed[at : at + draw(st.integers(1, 40))]
            case "repeat":
                changed[at:at] = changed[at : at + 64]
            case "cut":
                del changed[at:]
    return bytes(changed)


@st.composite
def frames(draw: st.DrawFn, body: bytes) -> bytes:
    """A body in a frame whose flags and size may be wrong."""
    if draw(st.integers(0, 3)):
        return frame(body, command=draw(st.booleans()))
    flags = draw(st.integers(0, 255))
    size = draw(st.sampled_from([0, 1, len(body), len(body) + 1, 255, 1 << 16, 1 << 31, 1 << 63]))
    packed = struct.pack(">Q", size) if flags & 2 else bytes([size % 256])
    return bytes([flags]) + packed + body


@fuzzing
@given(data=st.data(), channel=st.sampled_from(PORTS))
def test_greeting(target: Target, data: st.DataObject, channel: str) -> None:
    mechanism = data.draw(st.sampled_from([b"CURVE", b"NULL", b"PLAIN", b"GSSAPI", b"CURVE\0X"]))
    with target.peer(channel) as peer:
        peer.send(data.draw(mutated(greeting(mechanism))))
        peer.send(data.draw(frames(named(data.draw(st.sampled_from(NAMES)), b"x" * 50))))
        assert b"READY" not in peer.rest(0.001)[0]


@fuzzing
@given(data=st.data(), channel=st.sampled_from(PORTS))
def test_hello(target: Target, data: st.DataObject, channel: str) -> None:
    with target.peer(channel) as peer:
        peer.exchange_greetings()
        for _ in range(data.draw(st.integers(1, 3))):
            peer.send(data.draw(frames(data.draw(mutated(peer.hello())))))
        assert b"READY" not in peer.rest(0.001)[0]


@fuzzing
@given(
    data=st.data(),
    channel=st.sampled_from(CHANNELS),
    role=st.sampled_from(["stranger", "viewer", "owner"]),
)
def test_initiate(target: Target, data: st.DataObject, channel: str, role: str) -> None:
    """A changed INITIATE gets nobody in; a whole one with odd properties only who is listed."""
    with target.peer(channel, role) as peer:
        peer.to_welcome()
        properties = metadata(Socket_Type=b"DEALER", Identity=data.draw(st.binary(max_size=300)))
        body = peer.initiate(data.draw(mutated(properties)))
        change = data.draw(st.booleans())
        sent = data.draw(mutated(body)) if change else body
        peer.send(data.draw(frames(sent)))
        heard, _ = peer.rest(0.001)
        if sent != body or (role == "stranger" and channel != "hb"):
            assert b"READY" not in heard


@fuzzing
@given(data=st.data(), channel=st.sampled_from(["iopub", "hb"]))
def test_a_malicious_viewer(target: Target, data: st.DataObject, channel: str) -> None:
    """Whoever is let in to see may subscribe to anything and say anything; nobody else is to notice."""
    with target.peer(channel, "viewer") as peer:
        ready = peer.to_ready({"iopub": b"SUB", "hb": b"REQ"}[channel])
        assert ready.startswith(b"\x05READY")
        for _ in range(data.draw(st.integers(1, 6))):
            payload = data.draw(
                st.one_of(
                    st.binary(max_size=300),
                    st.sampled_from([b"\x01", b"\x00", b"\x01" + b"x" * 60000, b"\x00x", b"ping"]),
                    st.builds(named, st.sampled_from(NAMES), st.binary(max_size=60)),
                )
            )
            message = peer.message(payload, flags=data.draw(st.integers(0, 255)))
            peer.send(message if data.draw(st.integers(0, 3)) else data.draw(mutated(message)))
        peer.rest(0.001)

"""The manager's end of the launcher's port, and of a kernel's ports before anybody uses them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

import zmq
from jupyter_client.connect import channel_socket_types

from .. import sockets
from ..client.handshake import (
    ConnectionRefusedByKernelError,
    Handshake,
    KeyNotAuthorizedError,
    NobodyThereError,
    NoCurveServerError,
    WrongServerKeyError,
)
from ..errors import CurveKernelError
from ..keys import KeyPair

__all__ = ["Link", "is_refused", "unreachable_port", "verify"]

_INTERVAL = 0.01
_RETRY = 50
_PROBE_LIMIT = 1.0
_HEARTBEAT = 10_000


class Link:
    """A CURVE connection to the launcher.

    Parameters
    ----------
    url : str
        The launcher's port.
    pair : KeyPair
        The manager's key pair.
    server_key : bytes
        What the launcher proves that it holds the secret key of.
    """

    def __init__(self, url: str, pair: KeyPair, server_key: bytes) -> None:
        self.url = url
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[Any] = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.ipv6 = "[" in url
        self._socket.reconnect_ivl = 100
        self._socket.reconnect_ivl_max = 2000
        # Nothing is kept for a launcher that is not connected.
        self._socket.immediate = True
        self._socket.heartbeat_ivl = _HEARTBEAT
        self._socket.heartbeat_timeout = 2 * _HEARTBEAT
        sockets.make_client(self._socket, pair, server_key)
        self.handshake = Handshake("control", self._socket)
        self._socket.connect(url)
        self._numbers = itertools.count()
        # Several coroutines may ask at the same time.
        self._answers: dict[bytes, bytes] = {}

    async def connect(self, timeout: float) -> type[ConnectionRefusedByKernelError] | None:
        """Wait until it is connected; returns how it failed."""
        deadline = time.monotonic() + timeout
        while not self.handshake.done and time.monotonic() < deadline:
            await asyncio.sleep(_INTERVAL)
            self.handshake.read()
        self.handshake.give_up()
        return self.handshake.outcome

    @property
    def connected(self) -> bool:
        """Whether the launcher is connected now."""
        self.handshake.read()
        return self.handshake.up

    async def ask(self, do: str, timeout: float, **fields: Any) -> dict[str, Any] | None:
        """Ask the launcher to do something; None if it does not answer.

        Raises
        ------
        CurveKernelError
            If it can't do that.
        """
        number = str(next(self._numbers)).encode()
        try:
            request = json.dumps({"do": do, **fields}).encode()
            self._socket.send_multipart([number, request], zmq.NOBLOCK)
        except zmq.ZMQError:
            return None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            while not self._socket.closed and self._socket.poll(0):
                answered, *_, answer = self._socket.recv_multipart()
                self._answers[answered] = answer
            if number in self._answers:
                answer = self._answers.pop(number)
                # What is older was waited for in vain.
                self._answers = {n: a for n, a in self._answers.items() if int(n) > int(number)}
                return _answer(answer)
            if self._socket.closed:
                break
            await asyncio.sleep(_INTERVAL)
        return None

    def end_now(self) -> bool:
        """Tell the launcher to end, without an event loop; returns whether it has heard that."""
        try:
            self._socket.send_multipart([b"-1", b'{"do": "end"}'], zmq.NOBLOCK)
            return bool(self._socket.poll(1000))
        except zmq.ZMQError:
            return False

    def close(self) -> None:
        """Leave."""
        self.handshake.close()
        self._context.destroy(linger=0)


def _answer(frame: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(frame)
    if "error" in answer:
        raise CurveKernelError(str(answer["error"]), str(answer["hint"]))
    return answer


def unreachable_port(
    url: str, where: str, outcome: type[ConnectionRefusedByKernelError], *, tunnel: bool
) -> CurveKernelError:
    """Return the error for a port of the far side that can't be used."""
    texts = {
        NobodyThereError: (
            f"nobody answers at {url}, though the kernel's launcher on {where} listens there",
            "does a firewall drop it? open those ports and give them as ports, or let ssh carry"
            ' everything: "network": "tunnel" in the kernelspec\'s config (network=tunnel)',
        ),
        WrongServerKeyError: (
            f"the server at {url} has the wrong server key: it is not the kernel's launcher on {where}",
            "nothing was sent to it; see what has that address, or give another one as ip or reach",
        ),
        NoCurveServerError: (
            f"the server at {url} speaks no CURVE: it is not the kernel's launcher on {where}",
            "nothing was sent to it; see what has that address, or give another one as ip or reach",
        ),
        KeyNotAuthorizedError: (
            f"key not authorized: the server at {url} does not list the key of this start",
            "see which process has that port",
        ),
    }
    message, hint = texts[outcome]
    if tunnel and outcome is NobodyThereError:
        hint = "see whether the host's sshd lets ports be forwarded (AllowTcpForwarding)"
    return outcome(message, hint)


async def verify(
    urls: Mapping[str, str], pair: KeyPair, server_key: bytes, timeout: float
) -> dict[str, type[ConnectionRefusedByKernelError]]:
    """See that each port of a kernel can be reached, and holds the secret key of *server_key*.

    Parameters
    ----------
    urls : mapping
        The ports by channel.
    pair : KeyPair
        The manager's key pair.
    server_key : bytes
        The kernel's public key.
    timeout : float
        Seconds.

    Returns
    -------
    dict
        How a channel's handshake failed; empty if all is well.
    """
    deadline = time.monotonic() + timeout
    context: zmq.Context[Any] = zmq.Context()
    handshakes = []
    try:
        for channel, url in urls.items():
            socket = context.socket(channel_socket_types[channel])
            socket.linger = 0
            socket.ipv6 = "[" in url
            socket.reconnect_ivl = _RETRY
            sockets.make_client(socket, pair, server_key)
            handshakes.append(Handshake(channel, socket))
            socket.connect(url)
        while any(not handshake.done for handshake in handshakes) and time.monotonic() < deadline:
            await asyncio.sleep(_INTERVAL)
            for handshake in handshakes:
                handshake.read()
    finally:
        for handshake in handshakes:
            handshake.close()
        with contextlib.suppress(zmq.ZMQError):
            context.destroy(linger=0)
    return {handshake.channel: handshake.outcome for handshake in handshakes if handshake.outcome}


async def is_refused(url: str, *, by_tunnel: bool) -> bool:
    """Whether nothing listens at *url*, for certain."""
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    writer = None
    try:
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(host.strip("[]"), int(port)), _PROBE_LIMIT
        )
        if not by_tunnel:
            return False
        # A ZeroMQ server answers the first bytes of a greeting.
        writer.write(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03")
        return not await asyncio.wait_for(reader.read(1), _PROBE_LIMIT)
    except ConnectionRefusedError:
        return not by_tunnel
    except ConnectionError:
        return by_tunnel
    except (OSError, asyncio.TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()

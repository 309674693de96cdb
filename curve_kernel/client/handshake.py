"""How a client's handshake ends, and an error for each way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from ..errors import CurveKernelError
from ..keys import KeyPair
from ..wire import read_mechanism

__all__ = [
    "ChannelNotForViewersError",
    "ConnectionRefusedByKernelError",
    "Handshake",
    "KeyNotAuthorizedError",
    "NoCurveServerError",
    "NobodyThereError",
    "WrongServerKeyError",
    "explain",
    "mechanism_at",
    "wait",
    "wait_async",
]

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)
_INTERVAL = 0.01
_NUMBERS = itertools.count()


class ConnectionRefusedByKernelError(CurveKernelError):
    """A kernel can't be talked to; the subclass says why."""


class KeyNotAuthorizedError(ConnectionRefusedByKernelError):
    """The kernel has an allowlist, and this client's key is not on it."""

    shows_key = True


class ChannelNotForViewersError(ConnectionRefusedByKernelError):
    """The client is listed as a viewer, and asked for a channel that can run code."""


class WrongServerKeyError(ConnectionRefusedByKernelError):
    """The server does not hold the secret key that belongs to the connection file's public key."""


class NoCurveServerError(ConnectionRefusedByKernelError):
    """The server, or its connection file, knows nothing of CURVE."""


class NobodyThereError(ConnectionRefusedByKernelError):
    """No server answers at the connection file's address."""


class Handshake:
    """The state of a socket's connection, read from its monitor.

    Its first handshake ends with ``done``, and with an ``outcome`` if it failed. libzmq connects again
    by itself whenever a connection ends, so `read` goes on to tell whether it still may: ``up`` says
    whether it is connected now, ``connections`` how often it has been, and
    ``disconnections`` how often the server has closed a connection in the handshake since.

    Parameters
    ----------
    channel : str
        The channel's name.
    socket : zmq.Socket
        A CURVE client that is not connected yet.
    """

    def __init__(self, channel: str, socket: zmq.Socket[Any]) -> None:
        self.channel = channel
        self.outcome: type[ConnectionRefusedByKernelError] | None = None
        self.done = False
        self.up = False
        self.connections = 0
        self.disconnections = 0
        self.suspected = False
        self._socket = socket
        endpoint = f"inproc://curve-kernel-handshake-{next(_NUMBERS)}"
        socket.monitor(endpoint, _EVENTS)
        # A socket of the plain kind, also where the client's are asyncio's; of the same context, which
        # closes it with its others.
        self.monitor: zmq.Socket[Any] = socket.context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self.monitor.setsockopt(zmq.LINGER, 0)
        # With a limit libzmq's I/O thread would stop and wait for this monitor's reader.
        self.monitor.setsockopt(zmq.RCVHWM, 0)
        self.monitor.connect(endpoint)

    def read(self) -> None:
        """Take in the events that are there."""
        while self.outcome is None and not self.monitor.closed and self.monitor.poll(0):
            self._take(parse_monitor_message(self.monitor.recv_multipart())["event"])

    def _take(self, event: int) -> None:
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.done = self.up = True
                self.connections += 1
                self.disconnections, self.suspected = 0, False
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.fail(KeyNotAuthorizedError)
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self.fail(NoCurveServerError)
            case zmq.EVENT_DISCONNECTED if self.up:
                self.up = False
            case zmq.EVENT_DISCONNECTED:
                # A CURVE server disconnects after a HELLO that was made for another server key. So does
                # a kernel that ends just now, but it does not accept a second time.
                self.disconnections += 1
                if self.disconnections == 2 and not self.connections:
                    self.fail(WrongServerKeyError)

    def fail(self, outcome: type[ConnectionRefusedByKernelError]) -> None:
        """Let *outcome* be the end of it."""
        self.done, self.up, self.outcome = True, False, outcome

    def give_up(self) -> None:
        """Let a first handshake that is not over by now fail."""
        if not self.done:
            self.fail(NobodyThereError if not self.disconnections else WrongServerKeyError)

    def close(self) -> None:
        """Stop watching."""
        self.give_up()
        with contextlib.suppress(zmq.ContextTerminated):
            if not self._socket.closed:
                self._socket.disable_monitor()
        self.monitor.close()


def wait(handshakes: Sequence[Handshake], timeout: float) -> None:
    """Wait until each is connected or has failed, and give up those that are neither."""
    deadline = time.monotonic() + timeout
    for handshake in handshakes:
        while _is_undecided(handshake) and (left := deadline - time.monotonic()) > 0:
            handshake.monitor.poll(int(left * 1000) + 1)
            handshake.read()
        handshake.read()  # the process may have stood still
        handshake.give_up()


async def wait_async(handshakes: Sequence[Handshake], timeout: float) -> None:
    """Do what `wait` does, in an event loop."""
    deadline = time.monotonic() + timeout
    while any(map(_is_undecided, handshakes)) and time.monotonic() < deadline:
        await asyncio.sleep(_INTERVAL)
        for handshake in handshakes:
            handshake.read()
    for handshake in handshakes:
        handshake.give_up()


def _is_undecided(handshake: Handshake) -> bool:
    return not handshake.up and handshake.outcome is None


def mechanism_at(url: str, timeout: float) -> str | None:
    """Return what the server at *url* speaks, "" if it is no ZeroMQ server, None if none answers."""
    try:
        return read_mechanism(url, timeout=timeout)
    except OSError:
        return None
    except ValueError:
        return ""


def explain(
    outcome: type[ConnectionRefusedByKernelError], failed: Handshake, url: str, own: KeyPair
) -> ConnectionRefusedByKernelError:
    """Return the error that says how a handshake failed, of a client with the pair *own*."""
    shown = own.public_key.decode()
    again = " any more" if failed.connections else ""
    texts = {
        KeyNotAuthorizedError: (
            f"key not authorized: the kernel at {url} does not list this client's key {shown}{again}",
            "the kernel's user can list it: python -m curve_kernel authorize CERTIFICATE --name NAME",
        ),
        ChannelNotForViewersError: (
            f"channel {failed.channel} is not for viewers, and this client is listed as one",
            "python -m curve_kernel watch shows what a viewer may see; owners may do everything",
        ),
        WrongServerKeyError: (
            f"the server at {url} closed the connection: it does not hold the secret key for this"
            " connection file's server key",
            "the kernel was started anew, or something else has its port: get its new connection file",
        ),
        NoCurveServerError: (
            f"the server at {url} speaks no CURVE",
            "it is no encrypted kernel, and nothing was sent to it: see the connection file's ports",
        ),
        NobodyThereError: (
            f"nobody answers at {url}",
            "see whether the kernel still runs, and whether its address can be reached from here",
        ),
    }
    message, hint = texts[outcome]
    if outcome is NobodyThereError and "//0.0.0.0:" in url:
        hint = "0.0.0.0 is any address of the kernel's machine: write one of those into the file as ip"
    return outcome(message, hint)

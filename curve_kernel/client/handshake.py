"""The fate of a client's handshake, and an error for each."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from ..errors import CurveKernelError

__all__ = [
    "ChannelNotForViewersError",
    "ConnectionRefusedByKernelError",
    "Handshake",
    "KeyNotAuthorizedError",
    "NoCurveServerError",
    "NobodyThereError",
    "WrongServerKeyError",
    "wait",
]

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)


class ConnectionRefusedByKernelError(CurveKernelError):
    """A kernel can't be talked to; the subclass says why."""


class KeyNotAuthorizedError(ConnectionRefusedByKernelError):
    """The kernel has an allowlist, and this client's key is not on it."""


class ChannelNotForViewersError(ConnectionRefusedByKernelError):
    """The client is listed as a viewer, and asked for a channel that can run code."""


class WrongServerKeyError(ConnectionRefusedByKernelError):
    """The server does not hold the secret key that belongs to the connection file's public key."""


class NoCurveServerError(ConnectionRefusedByKernelError):
    """The server, or its connection file, knows nothing of CURVE."""


class NobodyThereError(ConnectionRefusedByKernelError):
    """Nobody answers at the connection file's address."""


class Handshake:
    """The fate of one socket's connection, read from its monitor.

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
        self._socket = socket
        self._hung_up = 0
        endpoint = f"inproc://curve-kernel-handshake-{id(self)}"
        socket.monitor(endpoint, _EVENTS)
        # A socket of the plain kind, also where the client's are asyncio's.
        context: zmq.Context[Any] = zmq.Context.shadow(socket.context.underlying)
        self.monitor: zmq.Socket[Any] = context.socket(zmq.PAIR)
        self.monitor.linger = 0
        self.monitor.connect(endpoint)

    def read(self) -> None:
        """Take in the events that are there."""
        while not self.done and self.monitor.poll(0):
            self._take(parse_monitor_message(self.monitor.recv_multipart())["event"])

    def _take(self, event: int) -> None:
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.done = True
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._fail(KeyNotAuthorizedError)
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._fail(NoCurveServerError)
            case zmq.EVENT_DISCONNECTED:
                # A CURVE server hangs up on a HELLO that was made for another server key. So does a
                # kernel that ends just now; that one does not accept a second time.
                self._hung_up += 1
                if self._hung_up == 2:
                    self._fail(WrongServerKeyError)

    def _fail(self, outcome: type[ConnectionRefusedByKernelError]) -> None:
        self.done, self.outcome = True, outcome

    def close(self) -> None:
        """Stop watching; who has not decided by now is nobody."""
        if not self.done:
            self._fail(NobodyThereError if not self._hung_up else WrongServerKeyError)
        with contextlib.suppress(zmq.ContextTerminated):
            if not self._socket.closed:
                self._socket.disable_monitor()
        self.monitor.close()


def wait(handshakes: list[Handshake], timeout: float) -> None:
    """Wait until each handshake has come to an end, then stop watching; all of it in one thread."""
    deadline = time.monotonic() + timeout
    try:
        while waiting := [one.monitor for one in handshakes if not one.done]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            zmq.select(waiting, [], [], timeout=left)
            for one in handshakes:
                one.read()
    except zmq.ContextTerminated:
        pass  # stop_channels has called it off
    finally:
        for one in handshakes:
            one.close()

"""The connection by which a forked child sends its output to the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from os import getpid
from struct import unpack
from typing import Any

import zmq

from . import sockets
from .access.connection import bytes_written, open_socket
from .clock import monotonic, sleep
from .keys import KeyPair

__all__ = ["ChildPipe"]

# Milliseconds for which a message that can't be sent is kept, as in upstream, and seconds without
# progress until it is left to that.
_LINGER, _PATIENCE = 3000, 1.0
_STEP = 0.00002
# Seconds from one message to the next, and by how much a burst may be ahead: who reads them has to keep
# up, or libzmq drops them. Stock's take twice as long.
_PACE, _BURST = 0.001, 0.1


class ChildPipe:
    """The context and the socket of a thread in a forked child, in the place of both.

    Upstream connects anew for each message, and ends the context to be sure that the message has been
    sent: a child may end without a word (``os._exit``). That would be a handshake for each line. Here
    the connection is kept, and a message has been sent once the operating system has as many
    bytes as libzmq makes of it.

    Parameters
    ----------
    port : int
        The pipe's.
    keys : KeyPair
        The children's.
    server_key : bytes
        The pipe's public key, 40 bytes of Z85.
    """

    def __init__(self, port: int, keys: KeyPair, server_key: bytes) -> None:
        self._pid = getpid()
        self._due = 0.0
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.linger = _LINGER
        sockets.make_client(self._socket, keys, server_key)
        monitor = self._socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._connection = None
        # Another server that has the port by now may accept and disconnect, again and again.
        deadline = monotonic() + _LINGER / 1000
        while (left := deadline - monotonic()) > 0 and monitor.poll(int(left * 1000)):
            event, descriptor = unpack("=Hi", monitor.recv_multipart()[0])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                break
            if self._connection is not None:
                self._connection.close()
            self._connection = open_socket(descriptor)
        else:
            self._socket.linger = 0  # its time is over
            if self._connection is not None:
                self._connection.close()
                self._connection = None
        self._socket.disable_monitor()
        monitor.close()
        self._written = bytes_written(self._connection)

    def is_open(self) -> bool:
        """Whether it can be used here: not in a child's child."""
        return self._pid == getpid() and not self._context.closed

    def send_multipart(self, frames: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """Send a message, and wait until the operating system has it, but not for ever."""
        now = monotonic()
        self._due = max(self._due, now - _BURST) + _PACE
        if self._due > now:
            sleep(self._due - now)
        self._socket.send_multipart(frames, *args, **kwargs)
        self._written += sum(_size(memoryview(frame).nbytes) for frame in frames)
        written, deadline = -1, 0.0
        while (by_now := bytes_written(self._connection)) < self._written:
            if by_now > written:
                written, deadline = by_now, monotonic() + _PATIENCE
            elif monotonic() > deadline:
                self._end()
                return
            sleep(_STEP)

    def close(self) -> None:
        """Do nothing: the next message needs it."""

    def term(self) -> None:
        """Do nothing: the next message needs it."""

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._socket.close()
        self._context.term()

    def __del__(self) -> None:
        if self.is_open():
            self._end()


def _size(size: int) -> int:
    """Return how many bytes a frame of *size* is in CURVE and ZMTP (https://rfc.zeromq.org/spec/26/)."""
    box = len(b"\x07MESSAGE") + 8 + 16 + 1 + size
    return box + (2 if box < 256 else 9)

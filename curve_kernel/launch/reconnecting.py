"""The sockets of a manager's clients, which connect again by themselves when a kernel has restarted.

Until they have, what the kernel publishes is lost for them, and so is a question on stdin.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from typing import Any

import zmq

from ..client.handshake import Handshake

__all__ = ["Reconnecting", "connected"]

# Seconds in which they have to be back; libzmq tries ten times a second.
_LIMIT, _INTERVAL = 5.0, 0.02

# What is sent on the others waits in them.
_CHANNELS = ("iopub", "stdin")
# With the endpoint and the thread of each.
_sockets: weakref.WeakKeyDictionary[zmq.Socket[Any], tuple[str, int]] = weakref.WeakKeyDictionary()


def connected(channel: str, socket: zmq.Socket[Any], url: str) -> None:
    """Take note of a socket that this thread has connected to a kernel's channel."""
    if channel in _CHANNELS:
        _sockets[socket] = url, threading.get_ident()


class Reconnecting:
    """The sockets that were connected to some ports, from before their kernel starts again.

    Parameters
    ----------
    *urls : str
        The endpoints.
    """

    def __init__(self, *urls: str) -> None:
        self._handshakes = [
            (socket, thread, Handshake(url, socket))
            for socket, (url, thread) in list(_sockets.items())
            if url in urls and not socket.closed
        ]

    async def wait(self) -> int:
        """Wait until all of them are connected again; return how many are not in time."""
        deadline = time.monotonic() + _LIMIT
        while (late := self._read()) and time.monotonic() < deadline:
            await asyncio.sleep(_INTERVAL)
        return late

    def _read(self) -> int:
        late = 0
        for socket, thread, handshake in self._handshakes:
            was_up = handshake.up
            handshake.read()
            if was_up or handshake.outcome is not None or socket.closed:
                continue
            if thread == threading.get_ident():
                # libzmq subscribes again when the socket is next used, and its owner may not have used
                # it since. Once more when it is up: that may be so at the first look, or right after
                # the look before. Nothing can arrive meanwhile that an event loop would not be told of.
                socket.get(zmq.EVENTS)
            late += not handshake.up
        return late

    def close(self) -> None:
        """Stop watching them."""
        while self._handshakes:
            self._handshakes.pop()[2].close()

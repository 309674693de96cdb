"""The sockets of a manager's clients, which connect again by themselves when a kernel has restarted.

Until they have, what the kernel publishes is lost for them, and so is a question on stdin.
"""

from __future__ import annotations

import weakref
from typing import Any

import zmq

from ..client.handshake import Handshake, wait_async

__all__ = ["Reconnecting", "connected"]

# Seconds in which they have to be back; libzmq tries ten times a second.
_LIMIT = 2.0

# What is sent on the others waits in them.
_CHANNELS = ("iopub", "stdin")
_sockets: weakref.WeakKeyDictionary[zmq.Socket[Any], str] = weakref.WeakKeyDictionary()


def connected(channel: str, socket: zmq.Socket[Any], url: str) -> None:
    """Take note of a socket that was connected to a kernel's channel."""
    if channel in _CHANNELS:
        _sockets[socket] = url


class Reconnecting:
    """The sockets that were connected to some ports, from before their kernel starts again.

    Parameters
    ----------
    *urls : str
        The endpoints.
    """

    def __init__(self, *urls: str) -> None:
        self._handshakes = [
            Handshake(url, socket)
            for socket, url in list(_sockets.items())
            if url in urls and not socket.closed
        ]

    async def wait(self) -> int:
        """Wait until all of them are connected again; return how many are not in time."""
        await wait_async(self._handshakes, _LIMIT)
        return sum(not handshake.up for handshake in self._handshakes)

    def close(self) -> None:
        """Stop watching them."""
        while self._handshakes:
            self._handshakes.pop().close()

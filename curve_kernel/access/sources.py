"""What one thread waits for: descriptors, and sockets that it reads."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from select import EPOLLIN, epoll
from typing import Any

import zmq

__all__ = ["Sources"]

_POLLIN = int(zmq.POLLIN)


class Sources:
    """Descriptors and sockets, any of which ends a wait.

    In place of `zmq.Poller`, which asks all sockets whenever one of them has something. libzmq's
    descriptor tells of it once, so a socket is `unread` until it is found to have nothing
    (ZMQ_FD in zmq_getsockopt(3)).

    Parameters
    ----------
    descriptors : iterable of int
        Besides the sockets; those below 0 are none.
    """

    def __init__(self, descriptors: Iterable[int]) -> None:
        self._epoll = epoll()
        self._sockets: dict[int, zmq.Socket[Any]] = {}
        self.unread: set[zmq.Socket[Any]] = set()
        """Sockets that may have something to read."""
        for descriptor in descriptors:
            if descriptor >= 0:
                self._epoll.register(descriptor, EPOLLIN)

    # Thread: any

    def add(self, socket: zmq.Socket[Any]) -> None:
        """Wait for *socket*, too; nobody but the waiting thread may use it from now on."""
        descriptor = int(socket.getsockopt(zmq.FD))
        self._sockets[descriptor] = socket
        self.unread.add(socket)
        self._epoll.register(descriptor, EPOLLIN)

    # Thread: the one that waits

    def leave_out(self, descriptor: int) -> None:
        """Wait for *descriptor* no more, be it a socket's or not."""
        self._sockets.pop(descriptor, None)
        with suppress(OSError):
            self._epoll.unregister(descriptor)

    def wait(self, timeout: float | None) -> set[int]:
        """Wait for so many seconds at most; return the descriptors that are readable."""
        ready = {descriptor for descriptor, _ in self._epoll.poll(timeout)}
        self.unread.update(self._sockets[descriptor] for descriptor in ready & self._sockets.keys())
        return ready

    def has_more(self, socket: zmq.Socket[Any]) -> bool:
        """Whether *socket* has something to read."""
        if socket in self.unread and not int(socket.getsockopt(zmq.EVENTS)) & _POLLIN:
            self.unread.discard(socket)
        return socket in self.unread

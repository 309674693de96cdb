"""A bound port: what is shown of it, and its socket with libzmq's monitor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import zmq

from .connection import Connection, ConnectionInfo

__all__ = ["Listener", "Port"]


class Port(NamedTuple):
    """A bound socket, as libzmq tells of it.

    ``rejected`` counts connections by the reason why they came to nothing.
    """

    channel: str
    mechanism: str
    endpoint: str
    connections: tuple[ConnectionInfo, ...]
    rejected: dict[str, int]


class Listener:
    """A guarded socket and libzmq's monitor of it."""

    def __init__(self, channel: str, socket: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
        self.channel = channel
        self.socket = socket
        self.monitor = monitor
        self.mechanism = zmq.SecurityMechanism(cast(int, socket.get(zmq.MECHANISM))).name
        self.endpoint = ""
        self.name: tuple[object, object] | None = None
        self.descriptor = self.inode = -1

    def port(self, ready: Iterable[Connection], rejected: dict[str, int]) -> Port:
        """Return what is shown of it, with those of the *ready* connections that are its own."""
        own = tuple(one.info() for one in ready if one.channel == self.channel)
        return Port(self.channel, self.mechanism, self.endpoint, own, rejected)

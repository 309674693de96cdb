"""The heartbeat channel, encrypted (ipykernel's ``heartbeat.py``)."""

from __future__ import annotations

import threading
from typing import Any

import zmq
from ipykernel.heartbeat import Heartbeat

from . import sockets
from .access.authorization import HandshakeMonitor
from .keys import KeyPair
from .sockets import Limits

__all__ = ["CurveHeartbeat"]


class CurveHeartbeat(Heartbeat):
    """A heartbeat whose socket is a CURVE server, natively so only since ipykernel 7.3."""

    def __init__(
        self,
        *args: Any,
        keys: KeyPair,
        limits: Limits,
        monitor: HandshakeMonitor | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._keys: KeyPair | None = keys
        self._monitor = monitor
        self._bound = threading.Event()
        self._error: zmq.ZMQError | None = None

    def _bind_socket(self) -> None:
        assert self._keys is not None
        sockets.make_server(self.socket, self._keys, self._limits)
        if self._monitor is not None:
            self._monitor.watch(self.socket, "hb")
        super()._bind_socket()
        self._curve_secretkey = self._keys = None
        self._bound.set()

    def run(self) -> None:
        """Echo until the context ends; a failure to bind is kept for `wait_until_bound`."""
        try:
            super().run()
        except zmq.ZMQError as error:
            if self._bound.is_set():
                raise
            self._error = error
            self._bound.set()

    def wait_until_bound(self, timeout: float = 10) -> None:
        """Wait at most *timeout* seconds until the port is bound.

        Raises
        ------
        zmq.ZMQError
            If it can't be bound.
        """
        if not self._bound.wait(timeout):
            self._error = zmq.ZMQError(zmq.EAGAIN, f"not bound within {timeout} seconds")
        if self._error is not None:
            raise self._error

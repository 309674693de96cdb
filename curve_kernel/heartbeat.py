"""The heartbeat channel, encrypted (ipykernel's ``heartbeat.py``)."""

from __future__ import annotations

import threading
from typing import Any

import zmq
from ipykernel.heartbeat import Heartbeat

from .access.gate import Gate
from .launch import ports

__all__ = ["CurveHeartbeat"]


class CurveHeartbeat(Heartbeat):
    """A heartbeat whose socket is a guarded CURVE server.

    Parameters
    ----------
    gate : Gate
        Guards the socket, in the heartbeat's own thread.
    """

    # Upstream's since 7.3, which would set options of its own.
    _curve_publickey = _curve_secretkey = None

    def __init__(self, context: zmq.Context[Any], addr: Any = None, *, gate: Gate, **_: Any) -> None:
        super().__init__(context, addr)
        self.curve_gate = gate
        self.curve_bound = threading.Event()
        self.curve_error: zmq.ZMQError | None = None

    def pick_port(self) -> int:
        """Pick a port; upstream's knows IPv4 addresses only."""
        is_tcp = self.transport == "tcp"
        self.port = ports.free_port(self.ip) if is_tcp else super().pick_port()
        return int(self.port)

    def _bind_socket(self) -> None:
        self.curve_gate.guard(self.socket, "hb")
        super()._bind_socket()
        self.curve_bound.set()

    def run(self) -> None:
        """Echo until the context ends; a failure to bind is kept for `wait_until_bound`."""
        try:
            super().run()
        except zmq.ZMQError as error:
            if self.curve_bound.is_set():
                raise
            self.curve_error = error
            self.curve_bound.set()

    def wait_until_bound(self, timeout: float = 10) -> None:
        """Wait at most *timeout* seconds until the port is bound.

        Raises
        ------
        zmq.ZMQError
            If it can't be bound.
        """
        if not self.curve_bound.wait(timeout):
            self.curve_error = zmq.ZMQError(zmq.EAGAIN, f"not bound within {timeout} seconds")
        if self.curve_error is not None:
            raise self.curve_error

"""The iopub thread and the output streams (ipykernel's ``iostream.py``)."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread, OutStream
from zmq.eventloop.zmqstream import ZMQStream

from . import sockets
from .access.authorization import HandshakeMonitor
from .keys import KeyPair
from .sockets import Limits

__all__ = ["CurveIOPubThread", "CurveOutStream"]

# The longest topic that is welcomed, and how many in a second.
_TOPIC_SIZE, _WELCOMES = 256, 50
# Of a long text: the least size of a piece, and how many there are at most. A reader loses what is
# beyond 1,000 messages (libzmq's SNDHWM), which is 250 MiB in pieces.
_PIECE, _PIECES = 1 << 18, 8
# Each message of a forked child has a connection of its own to the pipe, so pieces may come in another
# order. What is too long for the pipe's frame would not come at all.
_CHILD_PIECE = 8 << 20


class CurveIOPubThread(IOPubThread):
    """An iopub thread whose pipe for forked children is encrypted.

    Upstream binds it as a plaintext PULL socket on a loopback port. Here it has key pairs of its own,
    made for this process and told to nobody: only a forked child, which inherits them, knows the
    server key without which there is no handshake.
    """

    def __init__(
        self, *args: Any, limits: Limits, monitor: HandshakeMonitor | None, **kwargs: Any
    ) -> None:
        self._limits, self._monitor = limits, monitor
        self._second = self._welcomes = 0
        super().__init__(*args, **kwargs)

    def _setup_pipe_in(self) -> None:
        self._pipe_uuid = os.urandom(16)
        self._pipe_keys, self._pipe_client_keys = KeyPair.generate(), KeyPair.generate()
        pipe_in = self.socket.context.socket(zmq.PULL)
        pipe_in.linger = 0
        sockets.make_server(pipe_in, self._pipe_keys, self._limits)
        if self._monitor is not None:
            self._monitor.watch(pipe_in, "pipe")
        try:
            self._pipe_port = pipe_in.bind_to_random_port("tcp://127.0.0.1")
        except zmq.ZMQError as error:
            warnings.warn(
                f"Couldn't bind IOPub Pipe to 127.0.0.1: {error}"
                "\nsubprocess output will be unavailable.",
                stacklevel=2,
            )
            self._pipe_flag = False
            pipe_in.close()
            return
        self._pipe_in = ZMQStream(pipe_in, self.io_loop)
        self._pipe_in.on_recv(self._handle_pipe_msg)

    def _handle_subscription(self, frames: list[bytes]) -> None:
        """Welcome subscribers, since ipykernel 7; a viewer may send anything in place of a topic.

        What upstream raises for an empty frame would be printed into the notebook, and a welcome goes
        to everybody.
        """
        topics = [frame for frame in frames if 0 < len(frame) <= _TOPIC_SIZE]
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._welcomes = second, 0
        self._welcomes += len(topics)
        if topics and self._welcomes <= _WELCOMES:
            super()._handle_subscription(topics)

    def _setup_pipe_out(self) -> tuple[zmq.Context[Any], zmq.Socket[Any]]:
        context: zmq.Context[Any] = zmq.Context()
        pipe_out = context.socket(zmq.PUSH)
        pipe_out.linger = 3000
        sockets.make_client(pipe_out, self._pipe_client_keys, self._pipe_keys.public_key)
        pipe_out.connect(f"tcp://127.0.0.1:{self._pipe_port}")
        return context, pipe_out


class CurveOutStream(OutStream):
    """Standard output or standard error, whose long text is published in pieces of whole lines.

    libzmq encrypts and decrypts a message as a whole. In pieces one is written, the one before it
    encrypted, and the one before that read, all at the same time.
    """

    def _flush_buffers(self) -> Iterator[tuple[dict[str, Any], str]]:
        for parent, text in super()._flush_buffers():
            start, size = 0, max(_PIECE, len(text) // _PIECES)
            if not self._is_master_process():
                size = _CHILD_PIECE
            # A hook may take a message for itself, and upstream then sends nothing more.
            while not self._hooks and (end := text.find("\n", start + size) + 1):
                yield parent, text[start:end]
                start = end
            yield parent, text[start:]

"""The iopub thread and the output streams (ipykernel's ``iostream.py``)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from threading import RLock, get_ident, local
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread, OutStream
from ipykernel.kernelbase import Kernel
from tornado.ioloop import IOLoop
from zmq.eventloop.zmqstream import ZMQStream

from .access.gate import Gate
from .child_pipe import ChildPipe
from .clock import monotonic
from .keys import KeyPair

__all__ = ["CurveIOPubThread", "CurveOutStream", "HeardStream", "StdinReaper", "XPubContext"]

# How many subscribers are welcomed in a second.
_WELCOMES = 50
# Seconds after which a loop that has not called what it was to call is asked again.
_LOST = 10.0
# Of a long text: the least size of a piece, and how many there are at most. A reader loses what is
# beyond 1,000 messages (libzmq's SNDHWM), which is 250 MiB in pieces.
_PIECE, _PIECES = 1 << 18, 8
# Messages of forked children that are published before the kernel's own, at most: it goes on meanwhile.
_FROM_CHILDREN = 2000
# Of a forked child: what is too long for the pipe's frame would not come at all.
_CHILD_PIECE = 8 << 20


class CurveIOPubThread(IOPubThread):
    """An iopub thread whose pipe for forked children is encrypted.

    Upstream binds it as a plaintext PULL socket on a loopback port. Here it has key pairs of its own,
    made for this process and stored nowhere: only a forked child, which inherits them, knows the
    server key without which no handshake succeeds.
    """

    def __init__(self, *args: Any, gate: Gate, **kwargs: Any) -> None:
        self._gate = gate
        self._second = self._welcomes = 0
        self._in_child = local()
        self._has_forked = False
        os.register_at_fork(before=self._forks)
        super().__init__(*args, **kwargs)
        if not hasattr(IOPubThread, "_setup_xpub_listener"):  # before 7.2
            self._setup_xpub_listener()

    def _setup_xpub_listener(self) -> None:
        self._xpub_stream = ZMQStream(self.socket, self.io_loop)
        self._xpub_stream.on_recv(self._handle_subscription, copy=False)

    def _setup_pipe_in(self) -> None:
        self._pipe_uuid = os.urandom(16)
        self._pipe_keys, self._pipe_client_keys = KeyPair.generate(), KeyPair.generate()
        pipe_in = self.socket.context.socket(zmq.PULL)
        pipe_in.linger = 0
        self._gate.guard(pipe_in, "pipe", self._pipe_keys)
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

    def _handle_pipe_msg(self, msg: list[bytes]) -> None:
        """Publish what a forked child sent.

        Upstream schedules it too, by a message to this very thread: if a child sends much at once,
        the thread waits for ever for room for one more.
        """
        if self._pipe_flag and self._is_master_process() and msg[0] == self._pipe_uuid:
            self._really_send(msg[1:])

    def _handle_event(self, msg: list[bytes]) -> None:
        """Publish what was scheduled, after what forked children have sent until now.

        A cell that has waited for its children would else be idle before their lines are out, and front
        ends take none for it after that.
        """
        if self._has_forked and self._pipe_flag and self._pipe_in.socket.get(zmq.EVENTS):
            with suppress(zmq.Again):
                for _ in range(_FROM_CHILDREN):
                    self._handle_pipe_msg(self._pipe_in.socket.recv_multipart(zmq.NOBLOCK))
        super()._handle_event(msg)

    def _forks(self) -> None:
        self._has_forked = True

    def _handle_subscription(self, frames: list[zmq.Frame]) -> None:
        """Tell the gate of a subscriber, and welcome it to all topics, as ipykernel does since 7.2.

        Every subscriber gets each welcome, so it contains nothing that a client has chosen.
        """
        self._gate.heard("iopub", frames[0])
        second = int(monotonic())
        if second != self._second:
            self._second, self._welcomes = second, 0
        if len(frames) == 1 and frames[0].bytes == b"\x01" and self._welcomes < _WELCOMES:
            self._welcomes += 1
            if hasattr(IOPubThread, "_send_welcome_message"):
                self._send_welcome_message("")

    def _really_send(self, msg: list[Any], *args: Any, **kwargs: Any) -> None:
        self._gate.published(msg)
        super()._really_send(msg, *args, **kwargs)

    def _setup_pipe_out(self) -> tuple[Any, Any]:
        """Return what is taken for a context and a socket, in a forked child, for one message."""
        pipe_out: ChildPipe | None = getattr(self._in_child, "pipe_out", None)
        if pipe_out is None or not pipe_out.is_open():
            keys, server_key = self._pipe_client_keys, self._pipe_keys.public_key
            pipe_out = self._in_child.pipe_out = ChildPipe(self._pipe_port, keys, server_key)
        return pipe_out, pipe_out


class CurveOutStream(OutStream):
    """Standard output or standard error, whose long text is published in pieces of whole lines.

    libzmq encrypts and decrypts a message as a whole. In pieces, writing, encrypting and
    reading overlap.
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


class XPubContext:
    """A context that makes XPUB sockets in place of PUB sockets, which tell of no subscriber."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._context = context

    def socket(self, kind: int) -> zmq.Socket[Any]:
        """Make a socket of the context's own."""
        made: zmq.Socket[Any] = self._context.socket(zmq.XPUB if kind == zmq.PUB else kind)
        return made


def _once_ahead(loop: IOLoop, function: Callable[[], object]) -> Callable[[], None]:
    """Return what has *loop* call *function*, in any thread, and no more than once ahead.

    A loop may not run before a cell ends, and what it is to call takes memory. What it has lost, to an
    exception that a signal's handler raises, it is given once more after ten seconds.
    """
    due_since: float | None = None

    def call() -> None:
        nonlocal due_since
        due_since = None
        function()

    def ask() -> None:
        nonlocal due_since
        now = monotonic()
        if due_since is None or now - due_since > _LOST:
            due_since = now
            loop.add_callback(call)

    return ask


class HeardStream(ZMQStream):
    """A stream of shell or control, whose messages are dropped or named by the connection they came by.

    The name is one more frame at their end, which `CurveSession` takes off.

    Parameters
    ----------
    gate : Gate
        Is told.
    channels : mapping
        Sockets to the channel that they are.
    """

    def __init__(
        self,
        socket: zmq.Socket[Any],
        *args: Any,
        gate: Gate,
        channels: Mapping[Any, str],
        **kwargs: Any,
    ) -> None:
        self.curve_gate, self.curve_channel = gate, channels.get(socket)
        super().__init__(socket, *args, **kwargs)

    def on_recv(self, callback: Callable[..., Any] | None, copy: bool = True) -> None:
        """Call *callback* with each message, once the gate has heard of it and named its client."""
        channel = self.curve_channel
        if callback is None or channel is None:
            super().on_recv(callback, copy=copy)
            return
        heard = self.curve_gate.heard

        def receive(frames: list[zmq.Frame]) -> Any:
            speaker = heard(channel, frames[0])
            if speaker is not None:
                if speaker.reason is not None:
                    return None
                frames.append(speaker.tag)
            return callback([frame.bytes for frame in frames] if copy else frames)

        super().on_recv(receive, copy=False)
        self.curve_gate.on_question(channel, _once_ahead(self.io_loop, self.curve_drain))

    def curve_drain(self) -> None:
        """Read all messages that there are, and tell the gate."""
        if not self.closed() and self.curve_channel is not None:
            self.flush(zmq.POLLIN)
            self.curve_gate.drained(self.curve_channel)


class StdinReaper:
    """Releases what libzmq holds for clients of stdin that have left.

    libzmq releases a connection's queues (35 KiB) when its socket is next used, and stdin is not used
    until a cell asks for input. A socket is for one thread at a time, and any thread of a cell may ask,
    so nothing is released here while a thread asks.
    """

    def __init__(self, kernel: Kernel, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._lock = RLock()  # a signal's handler may ask
        self._asking: set[int] = set()
        for name in ("raw_input", "getpass"):
            setattr(kernel, name, self._counted(getattr(kernel, name)))

    def start(self, loop: IOLoop) -> Callable[[], None]:
        """Return what to call, in any thread, when a client has left; *loop* then does the work."""
        return _once_ahead(loop, self._reap)

    def _counted(self, ask: Callable[..., str]) -> Callable[..., str]:
        @wraps(ask)
        def asking(*args: Any, **kwargs: Any) -> str:
            thread = get_ident()
            with self._lock:
                self._asking.add(thread)
            try:
                return ask(*args, **kwargs)
            finally:
                self._asking.discard(thread)

        return asking

    def _reap(self) -> None:
        with self._lock:
            if not self._asking and not self._socket.closed:
                self._socket.get(zmq.EVENTS)

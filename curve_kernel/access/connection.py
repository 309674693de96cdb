"""An accepted connection: its peer, and what the operating system counts of it.

Everything here is bound at import, since code in a cell may replace what `socket`, `os` and `time`
hold.
"""

from __future__ import annotations

import errno
import termios
from _socket import socket
from contextlib import suppress
from datetime import datetime
from fcntl import ioctl
from os import close, dup
from socket import (
    AF_UNIX,
    IPPROTO_TCP,
    MSG_DONTWAIT,
    MSG_PEEK,
    SHUT_RDWR,
    SO_ACCEPTCONN,
    SO_LINGER,
    SO_RCVBUF,
    SOL_SOCKET,
    TCP_INFO,
)
from struct import error as struct_error
from struct import pack, unpack, unpack_from
from typing import NamedTuple

from ..clock import monotonic, time
from .audit import Reason
from .peer import Peer, unknown

__all__ = [
    "UNKNOWN_ADDRESS",
    "Connection",
    "ConnectionInfo",
    "Peer",
    "Progress",
    "bytes_written",
    "name_of",
    "open_socket",
    "unknown",
]

UNKNOWN_ADDRESS = "an unknown address"

# What a client has sent with its greeting and HELLO. libzmq disconnects at once if that was made
# without the server key.
_HELLO_SENT = 64 + 202
# What a server has sent with its greeting, WELCOME and ERROR, as a client gets it that ZAP rejects.
# READY is longer, so a client that has acknowledged more has got READY.
_ERROR_SENT = 64 + 170 + 12
# The most that a DEALER sends in its handshake, with a routing id of 255 bytes in its INITIATE. A
# request of Jupyter's, in six frames, is longer than what a shorter routing id leaves of it.
_INITIATE_SENT = _HELLO_SENT + 9 + 9 + 96 + 8 + 16 + 128 + 22 + 268

# Of struct tcp_info in linux/tcp.h, since Linux 4.1. tcpi_bytes_sent would count what is sent again to
# a peer that acknowledges nothing.
_STATE, _BYTES_ACKED, _BYTES_RECEIVED, _TCP_INFO_SIZE = 0, 120, 128, 136
_ESTABLISHED = 1

# The receive buffer of a connection that may send a lot, to begin with; and the option that lets the
# operating system make it larger again, since Linux 5.14 (asm-generic/socket.h; Python has no name).
_RECEIVE_BUFFER, _SO_BUF_LOCK = 1 << 17, 72


class Progress(NamedTuple):
    """What was seen of a reader: bytes published and acknowledged when it had read all, and when.

    ``largest`` is the largest message since then, ``unread`` what the operating system has for it, and
    ``still_since`` since when that is so.
    """

    published: int
    acknowledged: int
    at: float
    unread: int
    still_since: float
    largest: int = 0


class ConnectionInfo(NamedTuple):
    """What is shown of a connection whose handshake is over."""

    channel: str
    address: str
    role: str
    name: str
    public_key: str
    since: datetime


class Connection:
    """A connection to a bound port, held open until libzmq has told that it ended.

    Parameters
    ----------
    channel : str
        The port's channel.
    descriptor : int
        libzmq's file descriptor. Its number may have been reused by now: *port_name* tells.
    number : int
        The number of the last authorization before this connection was accepted; its own is greater.
    port_name : tuple
        `name_of` the listener.
    """

    def __init__(
        self, channel: str, descriptor: int, number: int, port_name: tuple[object, object] | None
    ) -> None:
        self.channel = channel
        self.descriptor = descriptor
        self.number = number
        self.since = monotonic()
        self._accepted_at = time()
        self.address = UNKNOWN_ADDRESS
        self.peer = unknown
        # While the client is not known: the authorizations that may be this connection's, by number.
        self.candidates: dict[int, Peer] = {}
        self.has_spoken = False
        self.may_be_ignored = False  # by libzmq, if its routing id was in use
        self.routing_id: str | None = None  # as it has told, with its first message
        self.is_ready = False
        self.is_disconnected = False
        # On ipc, where no bytes are counted: how often it was seen to have sent something.
        self.activity = 0
        self.progress: Progress | None = None  # of a reader on iopub
        self.held: socket | None = None
        self._receives_freely = False
        self._port_name = port_name
        self.hold()

    def hold(self) -> None:
        """Hold the connection, if it is not held, still there, and a descriptor is left."""
        if self.held is not None or (held := open_socket(self.descriptor)) is None:
            return
        try:
            listens = held.getsockopt(SOL_SOCKET, SO_ACCEPTCONN)
            if self._port_name is None or name_of(held) != self._port_name or listens:
                held.close()
                return
            self.held = held
            self.address = "this machine" if self.is_local else str(held.getpeername()[0])
        except OSError:  # it has been reset
            self.held = held

    @property
    def is_local(self) -> bool:
        """Whether it is ipc, where no counters tell of its traffic."""
        return self.held is not None and self.held.family == AF_UNIX

    def info(self) -> ConnectionInfo:
        """Return what is shown of it."""
        return ConnectionInfo(
            self.channel,
            self.address,
            *self.peer,
            datetime.fromtimestamp(self._accepted_at).astimezone(),
        )

    def _tcp(self) -> tuple[int, int, int]:
        if self.held is None or self.is_local:
            return 0, 0, 0
        try:
            info = self.held.getsockopt(IPPROTO_TCP, TCP_INFO, _TCP_INFO_SIZE)
            (acknowledged,) = unpack_from("Q", info, _BYTES_ACKED)
            (received,) = unpack_from("Q", info, _BYTES_RECEIVED)
        except (OSError, struct_error):
            return 0, 0, 0
        return info[_STATE], acknowledged, received

    def acknowledged(self) -> int:
        """Return the bytes that the peer has acknowledged, 0 on ipc."""
        return self._tcp()[1]

    def received(self) -> int:
        """Return the bytes that came from the peer, 0 on ipc."""
        return self._tcp()[2]

    def unread(self) -> int:
        """Return the bytes that the peer has not taken from the operating system yet."""
        return self._queued(termios.TIOCOUTQ)

    def waiting(self) -> int:
        """Return the bytes that came from the peer, and that libzmq has not read yet."""
        return self._queued(termios.FIONREAD)

    def _queued(self, queue: int) -> int:
        if self.held is None:
            return 0
        try:
            return int(unpack("i", ioctl(self.held, queue, bytes(4)))[0])
        except OSError:
            return 0

    def has_got_ready(self, handshake_timeout: float) -> bool:
        """Whether its handshake is over for certain.

        libzmq disconnects a peer whose handshake is not over after *handshake_timeout* seconds.
        """
        if self.acknowledged() > _ERROR_SENT:
            return True
        counted = self.held is not None and not self.is_local
        return not counted and monotonic() - self.since > handshake_timeout + 1

    def knows_server_key(self) -> bool:
        """Whether it has sent more than a HELLO, which libzmq takes only with the server key."""
        return self.received() > _HELLO_SENT

    def has_sent_hello(self) -> bool:
        """Whether it has sent a HELLO, or as much, which libzmq answers or disconnects for at once."""
        return self.received() >= _HELLO_SENT

    def may_have_sent_a_message(self) -> bool:
        """Whether it may have sent more than its handshake."""
        return self.is_local or self.received() > _INITIATE_SENT

    def left_first(self) -> bool:
        """Whether the peer ended the connection, rather than libzmq: it is still open on this side."""
        if self.held is None:
            return True
        if self.is_local:
            try:
                return not self.held.recv(1, MSG_PEEK | MSG_DONTWAIT)
            except OSError as error:
                return error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK)
        return self._tcp()[0] != _ESTABLISHED

    def why_it_failed(self) -> Reason:
        """Return the reason why its handshake came to nothing, as far as it can be told."""
        if self.held is None:
            # It was over before its descriptor could be looked at. A forked child, which knows the key,
            # left.
            return Reason.LEFT if self.channel == "pipe" else Reason.WRONG_KEY_OR_NO_CURVE
        if self.left_first():
            return Reason.LEFT
        received = self.received()
        if not received:
            return Reason.WRONG_KEY_OR_NO_CURVE
        if received < _HELLO_SENT:
            return Reason.NO_CURVE
        return Reason.WRONG_KEY if received == _HELLO_SENT else Reason.MALFORMED

    def receive_freely(self) -> None:
        """Give it a receive buffer of the usual size, in place of the handshake's."""
        self.hold()
        if self.held is None or self.is_local or self._receives_freely:
            return
        self._receives_freely = True
        with suppress(OSError):
            self.held.setsockopt(SOL_SOCKET, SO_RCVBUF, _RECEIVE_BUFFER)
            self.held.setsockopt(SOL_SOCKET, _SO_BUF_LOCK, 0)

    def disconnect(self) -> None:
        """Reset the connection; libzmq sees it and closes. What is on its way is not waited for.

        While code has every file that the process may open, it stays as it is.
        """
        self.hold()
        self.is_disconnected = self.held is not None or self._is_over()
        if self.held is None:
            return
        try:
            self.held.setsockopt(SOL_SOCKET, SO_LINGER, pack("ii", 1, 0))
            self.held.shutdown(SHUT_RDWR)
        except OSError:
            pass

    def _is_over(self) -> bool:
        """Whether libzmq has closed it, rather than that no file is left to hold it by."""
        try:
            close(dup(self.descriptor))
        except OSError as error:
            return error.errno not in (errno.EMFILE, errno.ENFILE)
        return True

    def release(self) -> None:
        """Close this process's hold on it."""
        if self.held is not None:
            self.held.close()


def open_socket(descriptor: int) -> socket | None:
    """Return a socket for a duplicate of *descriptor*, or None if there is none by now."""
    try:
        duplicate = dup(descriptor)
    except OSError:
        return None
    try:
        return socket(fileno=duplicate)
    except OSError:
        close(duplicate)
        return None


def bytes_written(held: socket | None) -> int:
    """Return the bytes that were ever written to a TCP connection, or -1 if there is none."""
    if held is None:
        return -1
    # In this order, or a byte that is acknowledged meanwhile would count twice.
    (acknowledged,) = unpack_from(
        "Q", held.getsockopt(IPPROTO_TCP, TCP_INFO, _TCP_INFO_SIZE), _BYTES_ACKED
    )
    return int(acknowledged) + int(unpack("i", ioctl(held, termios.TIOCOUTQ, bytes(4)))[0])


def name_of(bound: socket) -> tuple[object, object]:
    """Return what a listener and what it accepted have in common: family, and port or path."""
    name = bound.getsockname()
    return bound.family, name[1] if isinstance(name, tuple) else name

"""The only code that sets CURVE and ZAP options on a socket.

libzmq reads the options at ``bind`` and ``connect``, so each of these comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from .keys import KeyPair

__all__ = ["client_defaults", "make_client", "make_server"]


# The least receive buffer that there is, 2,304 bytes on Linux: enough for a handshake, and too little
# to send much by. While a call in a cell holds the interpreter lock, libzmq's thread reads on and
# nothing in Python can disconnect a peer: this bounds what it reads. `Connection.receive_freely` ends
# it for a peer that may send more.
_RECEIVE_BUFFER = 1
# Connections that the operating system may hold; it has a limit of its own, 4096 on Linux.
_BACKLOG = 4096
# Seconds of silence after which the operating system asks a peer, between two questions, and how
# many: a client whose machine is gone has its routing id for two minutes.
_KEEPALIVE = 60, 15, 4
# The same for a client that may be on another machine. It asks soon: a server that has given up the
# connection, while this machine slept perhaps, says so then. And it asks for five minutes, as it sends:
# what is published while the network is away arrives when that is back.
_CLIENT_KEEPALIVE, _CLIENT_PATIENCE = (10, 10, 30), 300


def make_server(
    socket: zmq.Socket[Any],
    keys: KeyPair,
    handshake_timeout: float,
    message_size: int,
    zap_domain: str = "",
) -> None:
    """Make *socket* a CURVE server before it binds.

    With a ZAP domain, each handshake is put to the ZAP handler of the socket's context, and none
    succeeds while there is no handler (ZAP_ENFORCE_DOMAIN; without it libzmq would let everybody in).
    Without one, knowing the server key is enough.

    Parameters
    ----------
    socket : zmq.Socket
        A socket that is not bound yet.
    keys : KeyPair
        The server key pair.
    handshake_timeout : float
        Seconds until a handshake must be over.
    message_size : int
        Bytes in a frame of a message, also of the handshake's; libzmq disconnects for a larger one.
    zap_domain : str
        The channel's name, for the authenticator.
    """
    socket.curve_secretkey = keys.secret_key
    socket.curve_publickey = keys.public_key
    socket.curve_server = True
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.handshake_ivl = int(handshake_timeout * 1000)
    socket.maxmsgsize = message_size
    socket.backlog = _BACKLOG
    socket.rcvbuf = _RECEIVE_BUFFER
    # libzmq stops reading a connection whose queue is full. If that is reset meanwhile and a PING is
    # among what was read, libzmq answers it on a dead engine and aborts the process
    # (stream_engine_base.cpp, Assertion failed: !_io_error). With no limit no peer meets it; sizes and
    # budgets bound memory.
    socket.rcvhwm = 0
    if socket.type == zmq.ROUTER:
        _keep_alive(socket, _KEEPALIVE)
    if socket.type == zmq.XPUB:
        socket.xpub_verbose = True  # tell of each subscriber, not of each topic only
    if zap_domain:
        socket.zap_domain = zap_domain.encode()


def make_client(socket: zmq.Socket[Any], keys: KeyPair, server_key: bytes) -> None:
    """Make *socket* a CURVE client before it connects.

    Parameters
    ----------
    socket : zmq.Socket
        A socket that is not connected yet.
    keys : KeyPair
        The client key pair.
    server_key : bytes
        The public key of the server, 40 bytes of Z85.
    """
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret_key)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public_key)
    socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
    _keep_alive(socket, _CLIENT_KEEPALIVE)
    socket.setsockopt(zmq.TCP_MAXRT, 1000 * _CLIENT_PATIENCE)


def _keep_alive(socket: zmq.Socket[Any], times: tuple[int, int, int]) -> None:
    named = (zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_KEEPALIVE_INTVL, zmq.TCP_KEEPALIVE_CNT)
    for option, value in zip((zmq.TCP_KEEPALIVE, *named), (1, *times), strict=True):
        socket.setsockopt(option, value)


@contextmanager
def client_defaults(context: zmq.Context[Any], keys: KeyPair, server_key: bytes) -> Iterator[None]:
    """Make every socket that *context* creates inside the block a CURVE client from birth.

    `make_server` may still turn one into a server afterwards. Use `make_client` wherever the socket
    can be reached between its creation and its connecting.
    """
    options = {
        zmq.CURVE_SECRETKEY: keys.secret_key,
        zmq.CURVE_PUBLICKEY: keys.public_key,
        zmq.CURVE_SERVERKEY: server_key,
    }
    before = dict(context.sockopts)
    for option, value in options.items():
        context.setsockopt(option, value)
    try:
        yield
    finally:
        context.sockopts.clear()
        context.sockopts.update(before)

"""What a port really speaks, read from its ZMTP greeting."""

from __future__ import annotations

import re
import socket
import struct
import time

__all__ = ["read_mechanism"]

# https://rfc.zeromq.org/spec/23/: signature, major version. libzmq answers these eleven bytes with its
# whole greeting; after a whole greeting of another mechanism a CURVE server would disconnect first.
_OPENING = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03"
_GREETING_SIZE = 64
_MECHANISM = re.compile(rb"[A-Z0-9_.+-]{1,20}")


def read_mechanism(endpoint: str, timeout: float = 2.0, user: int | None = None) -> str:
    """Return the mechanism in the greeting of the ZeroMQ socket at *endpoint*, without any key.

    Parameters
    ----------
    endpoint : str
        ``tcp://ADDRESS:PORT`` or ``ipc://PATH``.
    timeout : float
        Seconds for all of it.
    user : int, optional
        Whose socket a path has to lead to, or nothing is sent there. It may be a link.

    Returns
    -------
    str
        ``"CURVE"``, ``"NULL"``, ``"PLAIN"`` or whatever else the peer names.

    Raises
    ------
    TimeoutError
        If it accepts and says too little.
    ConnectionError, OSError
        If no server answers, it disconnects, or it is not of *user*.
    ValueError
        If what it says is no ZMTP 3 greeting.
    """
    deadline = time.monotonic() + timeout
    transport, _, address = endpoint.partition("://")
    family = socket.AF_UNIX if transport == "ipc" else socket.AF_INET
    if "[" in address:
        family = socket.AF_INET6
    with socket.socket(family) as peer:
        peer.settimeout(timeout)
        host, _, port = address.rpartition(":")
        peer.connect(address if transport == "ipc" else (host.strip("[]"), int(port)))
        if transport == "ipc" and user is not None and _user_of(peer) != user:
            raise ConnectionError(f"{endpoint} is another user's")
        peer.sendall(_OPENING)
        greeting = b""
        while len(greeting) < _GREETING_SIZE:
            peer.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = peer.recv(_GREETING_SIZE - len(greeting))
            if not chunk:
                raise ConnectionError(f"{endpoint} disconnected after {len(greeting)} bytes")
            greeting += chunk
            if not greeting.startswith(b"\xff"):
                raise ValueError(f"{endpoint} does not speak ZMTP")
    if greeting[9] != 0x7F or greeting[10] < 3:
        raise ValueError(f"{endpoint} does not speak ZMTP 3")
    mechanism = greeting[12:32].rstrip(b"\0")
    if not _MECHANISM.fullmatch(mechanism):
        raise ValueError(f"{endpoint} names no mechanism")
    return mechanism.decode("ascii")


def _user_of(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])

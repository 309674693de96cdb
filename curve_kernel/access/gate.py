"""The gate makes each socket a guarded CURVE server, before it binds."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import zmq
from jupyter_client.connect import channel_socket_types

from .. import sockets
from ..keys import KeyPair
from .allowlist import AuthorizedClients
from .audit import AuditLog
from .limits import MESSAGE_SIZES, Limits
from .monitor import Monitor, Port
from .zap import Policy

__all__ = ["Gate"]

_OPEN_FILES = 8192


class Gate:
    """Holds the server's secret key until every socket is bound, and guards each socket.

    Parameters
    ----------
    keys : KeyPair
        The server key pair.
    clients : AuthorizedClients
        The clients that are listed.
    limits : Limits
        As they are configured; never more connections than the open files of this process leave room
        for.
    log : logging.Logger
        For accepted and rejected clients.
    allow_any, open_heartbeat : bool
        See `zap.Policy`.
    message_sizes : mapping
        Bytes in a frame by channel, where it is not what `limits.MESSAGE_SIZES` says.
    """

    def __init__(
        self,
        keys: KeyPair,
        clients: AuthorizedClients,
        limits: Limits,
        log: logging.Logger,
        *,
        allow_any: bool,
        open_heartbeat: bool,
        message_sizes: Mapping[str, int],
    ) -> None:
        self.server_key = keys.public_key
        self.own_client_keys = KeyPair.generate()
        """The key pair of the client inside the kernel, its debugger."""
        self._keys: KeyPair | None = keys
        self._timeout = limits.handshake_timeout
        self._message_sizes = {**MESSAGE_SIZES, **message_sizes}
        policy = Policy(
            keys.public_key,
            self.own_client_keys.public_key,
            clients,
            allow_any=allow_any,
            open_heartbeat=open_heartbeat,
        )
        self._monitor = Monitor(policy, _within_open_files(limits, log), AuditLog(log), log)

    def guard(self, socket: zmq.Socket[Any], channel: str, keys: KeyPair | None = None) -> None:
        """Make *socket* a CURVE server that is limited and watched, before it binds.

        Parameters
        ----------
        socket : zmq.Socket
            A socket that is not bound yet.
        channel : str
            ``shell``, ``stdin``, ``control``, ``iopub``, ``hb`` or ``pipe``.
        keys : KeyPair, optional
            A key pair in place of the server's.
        """
        keys = keys or self._keys
        if keys is None:
            raise RuntimeError("the secret key is forgotten: every socket is bound already")
        domain = channel if channel in channel_socket_types else ""
        sockets.make_server(socket, keys, self._timeout, self._message_sizes[channel], domain)
        self._monitor.watch(socket, channel)

    def forget_secret(self) -> None:
        """Forget the server's secret key, which libzmq keeps for itself."""
        self._keys = None

    def heard(self, channel: str, frame: zmq.Frame) -> None:
        """Take note of the connection by which a message came; call it with each first frame."""
        self._monitor.heard(channel, frame)

    def published(self, size: int) -> None:
        """Take note of *size* bytes that are published on iopub, by which slow readers are found."""
        self._monitor.published(size)

    def on_ended(self, channel: str, callback: Callable[[], object]) -> None:
        """Call *callback*, in another thread, whenever a connection of *channel* has ended."""
        self._monitor.on_ended(channel, callback)

    def ports(self) -> list[Port]:
        """Return every guarded socket, as libzmq tells of it, with its connections."""
        return self._monitor.ports()

    @property
    def problem(self) -> str:
        """Why no new client is accepted, or empty."""
        return self._monitor.problem

    def close(self) -> None:
        """Accept no more clients, and stop watching, before the sockets are closed."""
        self._monitor.stop()


def _within_open_files(limits: Limits, log: logging.Logger) -> Limits:
    """Make room for more open files, if that is allowed, and keep *limits* within what there is.

    libzmq accepts faster than connections can be disconnected, and code must always be able to open a
    file. Each connection takes two descriptors.
    """
    soft, unlimited = 1024, resource.RLIM_INFINITY
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = _OPEN_FILES if hard == unlimited else min(hard, _OPEN_FILES)
        if soft != unlimited and soft < room:
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
            soft = room
    except (OSError, ValueError) as error:  # in a sandbox
        log.warning(
            "The limit of open files can't be read or raised, and is taken as %d: %s", soft, error
        )
    files = max(soft, 8) if soft != unlimited else sys.maxsize
    return limits._replace(
        handshakes=min(limits.handshakes, files // 4), connections=min(limits.connections, files // 8)
    )

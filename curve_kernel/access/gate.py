"""The gate makes each socket a guarded CURVE server, before it binds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import zmq
from jupyter_client.connect import channel_socket_types

from .. import sockets
from ..keys import KeyPair
from .allowlist import AuthorizedClients
from .audit import AuditLog
from .forks import shut_down_at_end
from .limits import MESSAGE_SIZES, Limits
from .monitor import Monitor
from .open_files import within_open_files
from .policy import Activity, Policy, Speaker
from .port import Port

if TYPE_CHECKING:
    from .record import Record

__all__ = ["Activity", "Gate"]


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
        See `policy.Policy`.
    message_sizes : mapping
        Bytes in a frame by channel, where it is not what `limits.MESSAGE_SIZES` says.
    record : Record, optional
        Is told of everything that clients do.
    ipv6 : bool
        Whether the sockets will be bound to an IPv6 address.
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
        record: Record | None = None,
        ipv6: bool = False,
    ) -> None:
        self.server_key = keys.public_key
        self.own_client_keys = KeyPair.generate()
        """The key pair of the client inside the kernel, its debugger."""
        self._keys: KeyPair | None = keys
        self.record = record
        self._ipv6 = ipv6
        self._timeout = limits.handshake_timeout
        self._message_sizes = {**MESSAGE_SIZES, **message_sizes}
        self._policy = Policy(
            keys.public_key,
            self.own_client_keys.public_key,
            clients,
            allow_any=allow_any,
            open_heartbeat=open_heartbeat,
        )
        self._audit = AuditLog(log, record)
        self._monitor = Monitor(self._policy, within_open_files(limits, log), self._audit, log)

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
        if self._ipv6:
            # The context's option is for sockets that it makes later, such as the debugger's client.
            socket.ipv6 = True
            socket.context.set(zmq.IPV6, 1)
        sockets.make_server(socket, keys, self._timeout, self._message_sizes[channel], domain)
        self._monitor.watch(socket, channel)

    def forget_secret(self) -> None:
        """Forget the server's secret key, which libzmq keeps for itself."""
        self._keys = None

    def heard(self, channel: str, frame: zmq.Frame) -> Speaker | None:
        """Take note of the connection by which a message came, and return its client.

        Call it with each first frame. What comes from a client that has a ``reason`` is to be dropped.
        """
        user_id = self._monitor.heard(channel, frame)
        if user_id is None:
            return None
        speaker = self._policy.speaker(channel, user_id)
        if speaker.reason is not None and channel != "iopub":  # where libzmq unsubscribes who leaves
            self._audit.dropped(channel, speaker.reason, speaker.peer)
        return speaker

    def tagged(self, frame: zmq.Frame | bytes) -> Speaker | None:
        """Return the client whose ``tag`` *frame* is, if it is a tag."""
        return self._policy.tagged(frame)

    def received(self, speaker: Speaker, message: dict[str, Any], *, is_whole: bool) -> None:
        """Write into *message* whose it is; what a client sent that is out by now is not to be run."""
        header = message["header"]
        header["username"] = self._policy.username(speaker.peer, header.get("username"))
        if not is_whole:
            return
        if speaker.reason is None:
            self._policy.requested(speaker, message["msg_type"])
            self._audit.requested(speaker.channel, speaker.peer, message)
            return
        self._audit.dropped(speaker.channel, speaker.reason, speaker.peer, message)
        # A type that no kernel knows: it says in its log that it does nothing, and is idle again.
        header["msg_type"] = message["msg_type"] = f"{message['msg_type']} of a client that is out"

    def published(self, frames: Sequence[Any]) -> None:
        """Take note of a message that is published on iopub, by which slow readers are found."""
        self._monitor.published(frames)

    def on_ended(self, channel: str, callback: Callable[[], object]) -> None:
        """Call *callback*, in another thread, whenever a connection of *channel* has ended."""
        self._monitor.on_ended(channel, callback)

    def on_question(self, channel: str, ask: Callable[[], object]) -> None:
        """Call *ask*, in another thread, when `drained` is to be called for *channel*."""
        self._monitor.on_question(channel, ask)

    def drained(self, channel: str) -> None:
        """Take note that all messages of *channel* that there are have been heard."""
        self._monitor.drained(channel)

    def ports(self) -> list[Port]:
        """Return every guarded socket, as libzmq tells of it, with its connections."""
        return self._monitor.ports()

    def activity(self) -> Activity:
        """Return what clients did last, when their access ends, and where that is recorded."""
        record = self.record.status if self.record is not None else ""
        return Activity(self._policy.requests.copy(), self._policy.ends(), record)

    @property
    def problem(self) -> str:
        """Why no new client is accepted, or empty."""
        return self._monitor.problem

    def close(self) -> None:
        """Accept no more clients, and stop watching, before the sockets are closed."""
        self._monitor.stop()
        self._audit.close()

    def closing(self) -> AbstractContextManager[None]:
        """Do so; after the block, in which they are closed, no forked process keeps them open."""
        ending = shut_down_at_end(self._monitor.listening())
        self.close()
        return ending

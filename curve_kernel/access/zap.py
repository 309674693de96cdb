"""Which client may use which channel: ZAP (https://rfc.zeromq.org/spec/27/).

ZAP sees a client only once its CURVE handshake has proved that it holds its secret key and knows the
server key. A client that fails before that is seen by libzmq's socket monitors.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import zmq
from jupyter_client.connect import channel_socket_types
from zmq.auth import Authenticator

from .allowlist import MANAGER, OWN_CLIENT, AuthorizedClients
from .audit import AuditLog, Reason
from .connection import Peer
from .connections import Connections

__all__ = ["ClientAuthenticator", "Policy"]

VIEWER_CHANNELS = frozenset({"iopub", "hb"})


class Policy:
    """Which client may use which channel.

    Parameters
    ----------
    manager_key, own_client_key : bytes
        The kernel's own public key, 40 bytes of Z85: the manager, which holds its secret key, may use
        every channel. And the key of the client inside the kernel, its debugger, which uses shell.
    clients : AuthorizedClients
        The clients that are listed.
    allow_any : bool
        Accept every client that has the server key; the list then only gives names.
    open_heartbeat : bool
        Accept every client that has the server key on hb: stock's heartbeat channels make a key pair
        that is listed nowhere, also those of a manager that holds the kernel's.
    """

    def __init__(
        self,
        manager_key: bytes,
        own_client_key: bytes,
        clients: AuthorizedClients,
        *,
        allow_any: bool,
        open_heartbeat: bool,
    ) -> None:
        self._manager_key = manager_key
        self._own_client_key = own_client_key
        self._clients = clients
        self._allow_any = allow_any
        self._open_heartbeat = open_heartbeat

    def decide(self, channel: str, key: bytes) -> tuple[Peer, Reason | None]:
        """Return the client with public *key*, 40 bytes of Z85, and why it may not use *channel*."""
        shown = key.decode()
        if key == self._manager_key:
            return Peer(MANAGER, "", shown), None
        if key == self._own_client_key and channel == "shell":
            return Peer(OWN_CLIENT, "", shown), None
        client = self._clients.find(key)
        if client is None:
            if self._allow_any or (channel == "hb" and self._open_heartbeat):
                return Peer("any", "", shown), None
            return Peer("", "", shown), Reason.UNKNOWN_KEY
        if client.role == "viewer" and channel not in VIEWER_CHANNELS and not self._allow_any:
            return Peer(client.role, client.name, shown), Reason.NOT_FOR_VIEWERS
        return Peer(client.role, client.name, shown), None


class ClientAuthenticator(Authenticator):
    """Answers the ZAP requests of one context by a `Policy`; the reader of its socket calls `answer`.

    Start it before the first socket binds: it serves every CURVE server of its context that has a ZAP
    domain, and the domain is the channel's name. pyzmq's `ThreadAuthenticator` would take 0.6 ms of CPU
    time for each handshake in place of 0.25.
    """

    def __init__(
        self, context: zmq.Context[Any], policy: Policy, connections: Connections, audit: AuditLog
    ) -> None:
        # pyzmq logs each request at debug level, a peer's own bytes among it. User code that logs
        # everything must not get to show them in the notebook.
        log = logging.getLogger("curve_kernel.zap")
        log.setLevel(logging.WARNING)
        super().__init__(context, log=log)
        self._policy = policy
        self._connections = connections
        self._audit = audit
        self._address = self._user_id = ""
        for channel in channel_socket_types:
            self.configure_curve_callback(channel, self)

    def answer(self, request: list[bytes]) -> None:
        """Answer one ZAP request."""
        answer = self.handle_zap_message(request)
        try:
            # A coroutine only because a callback could be one; `callback` is a function.
            answer.send(None)
        except StopIteration:
            return
        answer.close()
        raise RuntimeError("a ZAP request was to wait for something")

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        """Answer one ZAP request; whatever goes wrong is a rejection."""
        mechanism, self._address = (
            (msg[5], msg[3].decode("ascii", "replace")) if len(msg) > 5 else (b"", "")
        )
        try:
            if mechanism != b"CURVE":
                raise ValueError("a request without CURVE")
            await super().handle_zap_message(msg)
        except Exception as error:  # noqa: BLE001  or no client would be accepted any more
            with suppress(Exception):
                self.log.warning("a ZAP request failed, so its client is rejected: %r", error)
            if len(msg) > 1:
                self._send_zap_reply(msg[1], b"400", b"rejected")

    def callback(self, channel: str, key: bytes) -> bool:
        """Say whether the client with public *key*, 40 bytes of Z85, may use *channel*."""
        peer, reason = self._policy.decide(channel, key)
        if reason is not None:
            self._connections.rejected(channel)
            detail = f" such as {peer.name!r}" if peer.name else f" {peer.public_key}"
            self._audit.rejected(channel, self._address, reason, detail)
            return False
        self._user_id = self._connections.authorized(channel, peer)
        trusted = peer.role in (MANAGER, "owner")
        self._audit.accepted(channel, self._address, str(peer), always=trusted)
        return True

    def curve_user_id(self, client_public_key: bytes) -> str:  # noqa: ARG002
        """Return the user id of the client that `callback` has just accepted."""
        return self._user_id

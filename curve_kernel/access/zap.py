"""Answers libzmq, which asks whether a client may use a channel: ZAP (https://rfc.zeromq.org/spec/27/).

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

from .allowlist import MANAGER
from .audit import AuditLog
from .connection import Peer
from .connections import Connections
from .policy import Policy

__all__ = ["ClientAuthenticator"]


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
        self.sockets: dict[str, zmq.Socket[Any]] = {}
        """The bound sockets, by channel."""
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
            detail = f" {peer.public_key}"
            if peer.name:
                detail = f" such as {peer.name!r}" if peer.role else f", that of {peer.name!r}"
            self._audit.rejected(channel, self._address, reason, peer, detail)
            return False
        hands_over = self._set_handover(channel, peer)
        self._user_id = self._connections.authorized(channel, peer, hands_over=hands_over)
        trusted = peer.role in (MANAGER, "owner")
        self._audit.accepted(channel, self._address, peer, always=trusted)
        return True

    def _set_handover(self, channel: str, peer: Peer) -> bool:
        """Let the connection that *peer* is about to get take over a routing id, or not.

        libzmq reads the option when the socket takes in a connection, which it has not got before
        the answer to this request. Setting it does nothing else, so it may be done in this thread.
        """
        socket = self.sockets.get(channel)
        if socket is None or socket.type != zmq.ROUTER or channel == "hb":
            return True  # on hb nobody gets anything but what they have sent
        hands_over = self._connections.may_hand_over(channel, peer)
        socket.setsockopt(zmq.ROUTER_HANDOVER, hands_over)
        return hands_over

    def curve_user_id(self, client_public_key: bytes) -> str:  # noqa: ARG002
        """Return the user id of the client that `callback` has just accepted."""
        return self._user_id

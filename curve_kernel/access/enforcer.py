"""Applies the limits: disconnects a connection that exceeds one, and logs why.

All of it is called by the thread of `monitor`, with its lock held, except where it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from select import EPOLLET, EPOLLIN, epoll

from .audit import AuditLog, Reason
from .connection import Connection
from .connections import Connections
from .limits import (
    Limits,
    excess_connection,
    follow_reader,
    has_little_to_say,
    has_too_much_waiting,
    oldest_handshake,
    says_too_much,
    says_too_much_in_handshake,
)
from .policy import Policy

__all__ = ["Enforcer"]

# Bytes published on iopub after which slow readers are checked sooner.
_PUBLISHED = 8 << 20


class Enforcer:
    """Applies the limits to connections.

    Parameters
    ----------
    connections : Connections
        The table, which it keeps up to date.
    limits : Limits
        For all sockets together.
    audit : AuditLog
        Is told of each connection that was rejected or disconnected.
    policy : Policy
        Says whether a connection may go on.
    """

    def __init__(
        self, connections: Connections, limits: Limits, audit: AuditLog, policy: Policy
    ) -> None:
        self._policy = policy
        self._connections = connections
        self._limits = limits
        self._audit = audit
        # Connections that have little to say, by the descriptor that is held.
        self._budgeted: dict[int, Connection] = {}
        # Those of them that are on iopub.
        self._readers: set[Connection] = set()
        self.epoll = epoll()
        """Readable when one of them has said something."""
        self.published = 0
        """Bytes published on iopub while somebody read whose reading is followed."""
        self._published_before = self._largest = 0
        # Connections that libzmq may ignore though their routing id is free by now, with what they had
        # sent when the kernel had last read all messages.
        self._freed: dict[Connection, int] = {}
        # Connections that could not be disconnected, since no file was left to open.
        self._owed: dict[Connection, tuple[Reason, bool]] = {}
        self.questions: dict[str, Callable[[], object]] = {}
        """By channel, what has its reader read all messages and then lead to `drained`."""

    # Thread: any

    def has_readers(self) -> bool:
        """Whether somebody reads iopub who may turn out to be a slow reader."""
        return bool(self._readers)

    def note_published(self, size: int) -> None:
        """Take note that a message of *size* bytes is published on iopub."""
        self.published += size
        self._largest = max(self._largest, size)

    def has_published_much(self) -> bool:
        """Whether slow readers are to be checked now."""
        return self.published - self._published_before > _PUBLISHED and self.has_readers()

    # Thread: monitor

    def has_to_look(self) -> bool:
        """Whether `look` may have something to do."""
        return bool(self._freed or self._owed) or self.has_readers()

    def look(self) -> None:
        """Disconnect slow readers and whom else it was not possible to; ask about who is ignored."""
        for connection, (reason, always) in list(self._owed.items()):
            self._disconnect(connection, reason, always=always)
        self._check_readers()
        self._check_doubtful()

    def accepted(self, connection: Connection) -> None:
        """Take in a connection that libzmq has accepted; its handshake begins."""
        self._connections.accepted(connection)
        if connection.is_local:
            self._budget(connection)
        handshaking = self._connections.handshaking
        if len(handshaking) > self._limits.handshakes:
            oldest = oldest_handshake(handshaking.values(), self._limits.handshake_timeout)
            if oldest is not None:
                self._disconnect(oldest, Reason.HANDSHAKES)

    def got_ready(self, connection: Connection) -> None:
        """Take note that the handshake of *connection* is over."""
        self._connections.got_ready(connection)
        self.client_is_known(connection)

    def client_is_known(self, connection: Connection) -> None:
        """Apply the limits after the handshake, and again when its client gets known."""
        self._hold_against_list(connection)
        if has_little_to_say(connection):
            self._budget(connection)
            self._check_budget(connection)
        else:
            self._unbudget(connection)
            if connection.channel not in ("iopub", "hb"):
                connection.receive_freely()
        excess = excess_connection(self._connections.ready.values(), self._limits)
        if excess is not None:
            self._disconnect(excess, Reason.CONNECTIONS)

    def hold_against_list(self) -> int:
        """Disconnect every client that would not be accepted again, by the last look at the list.

        Returns how many connections were disconnected.
        """
        ended, problem = 0, None
        for connection in list(self._connections):
            if not connection.is_disconnected and connection.channel != "pipe":
                before = connection.peer
                try:
                    self._hold_against_list(connection, changed=True)
                    if connection.peer != before:
                        self.client_is_known(connection)
                except Exception as error:  # noqa: BLE001  the others are to be held against it, too
                    connection.disconnect()
                    problem = error
                ended += connection.is_disconnected
        if problem is not None:
            raise problem
        return ended

    def _hold_against_list(self, connection: Connection, *, changed: bool = False) -> None:
        """Disconnect *connection*, or let it go on as whom the list says that it is now.

        One of which nothing is known may be of a client that is out, and it comes back by itself.
        """
        if connection.is_disconnected or connection.channel == "pipe":
            return
        known = bool(connection.peer.role)
        clients = self._connections.may_be(connection)
        verdicts = [self._policy.still(connection.channel, peer.public_key) for peer in clients]
        reason = next((reason for _, reason in verdicts if reason is not None), None)
        if changed and connection.is_ready and not clients:
            reason = Reason.DOUBT
        if reason is not None:
            self._disconnect(connection, reason if known else Reason.DOUBT, always=known)
        elif known:
            connection.peer = verdicts[0][0]

    def ended(self, connection: Connection) -> None:
        """Release a connection that ended, and log why its handshake failed, if it did."""
        self._unbudget(connection)
        failed = not connection.is_ready and not connection.is_disconnected
        if failed and not connection.has_got_ready(self._limits.handshake_timeout):
            self._log_failure(connection)
        self._freed.pop(connection, None)
        self._owed.pop(connection, None)
        if connection.is_ready:
            for ignored in self._connections.ignored_until(connection):
                self._freed.setdefault(ignored, -1)
                # Nothing of it can get lost now; otherwise it depends on what the kernel has heard.
                if not ignored.may_have_sent_a_message():
                    self._disconnect(ignored, Reason.ROUTING_ID)
        connection.release()

    def _check_doubtful(self) -> None:
        """Ask for all messages of the channels where that tells whether libzmq ignores a connection."""
        freed = self._freed.items()
        self._freed = {c: sent for c, sent in freed if not c.has_spoken and not c.is_disconnected}
        for channel in {connection.channel for connection in self._freed}:
            self.questions.get(channel, partial(self.drained, channel))()

    def drained(self, channel: str) -> None:
        """Take note that the kernel has read all messages of *channel*.

        A connection that has said something by the last time, and was not heard until now, is ignored.
        """
        for connection, sent in self._freed.items():
            if connection.channel != channel or connection.has_spoken or connection.is_disconnected:
                continue
            self._freed[connection] = connection.received()
            if self._freed[connection] == sent and not connection.waiting():
                self._disconnect(connection, Reason.ROUTING_ID)

    def _log_failure(self, connection: Connection) -> None:
        counted = connection.held is not None and not connection.is_local
        may_be_rejected = connection.knows_server_key() or not counted
        if may_be_rejected and self._connections.was_rejected(connection):
            return  # the authenticator has told
        reason = connection.why_it_failed()
        if reason is Reason.LEFT:
            self._audit.left(connection.channel, connection.address)
        else:
            self._audit.rejected(connection.channel, connection.address, reason)

    def check_handshakes(self) -> list[Connection]:
        """Check what was sent in handshakes; return the connections whose handshake is over."""
        ready = []
        for connection in list(self._connections.handshaking.values()):
            connection.hold()
            if connection.has_got_ready(self._limits.handshake_timeout):
                ready.append(connection)
            else:
                self._check_budget(connection)
        return ready

    def check_budgets(self) -> tuple[int, list[Connection]]:
        """Check the connections that have little to say and have said something.

        Returns how many, and those that have sent too much unless their handshake is over: libzmq
        tells of its end before the client may send more, and that may wait to be taken in.
        """
        spoke, doubtful = self.epoll.poll(0), []
        for descriptor, _ in spoke:
            if (connection := self._budgeted.get(descriptor)) is not None:
                connection.activity += 1
                self._check_budget(connection)
                if not connection.is_ready and has_too_much_waiting(connection):
                    doubtful.append(connection)
        return len(spoke), doubtful

    def disconnect_in_handshake(self, connection: Connection) -> None:
        """Disconnect *connection* for what it has sent, if its handshake is not over for certain."""
        if not connection.is_disconnected and self._connections.is_surely_handshaking(connection):
            self._disconnect(connection, Reason.HANDSHAKE_BYTES)

    def _check_readers(self) -> None:
        """Disconnect slow readers."""
        self._published_before = self.published
        largest, self._largest = self._largest, 0
        for connection in list(self._readers):
            if connection.is_ready and not connection.is_disconnected:
                connection.progress, is_slow = follow_reader(connection, self.published, largest)
                if is_slow:
                    self._disconnect(connection, Reason.SLOW)

    def close(self) -> None:
        """Release all connections."""
        for connection in self._connections:
            connection.release()
        self.epoll.close()

    def _budget(self, connection: Connection) -> None:
        held = connection.held
        if held is not None and held.fileno() not in self._budgeted:
            self._budgeted[held.fileno()] = connection
            if connection.channel == "iopub":
                self._readers.add(connection)
            self.epoll.register(held.fileno(), EPOLLIN | EPOLLET)

    def _unbudget(self, connection: Connection) -> None:
        held = connection.held
        if held is not None and self._budgeted.get(held.fileno()) is connection:
            del self._budgeted[held.fileno()]
            self._readers.discard(connection)
            self.epoll.unregister(held.fileno())

    def _check_budget(self, connection: Connection) -> None:
        if connection.is_disconnected:
            return
        if not connection.is_ready:
            if says_too_much_in_handshake(connection):
                self._disconnect(connection, Reason.HANDSHAKE_BYTES)
        elif has_little_to_say(connection) and says_too_much(connection):
            self._disconnect(connection, Reason.BYTES)

    def _disconnect(self, connection: Connection, reason: Reason, *, always: bool = False) -> None:
        connection.disconnect()
        if not connection.is_disconnected:
            self._owed[connection] = reason, always
            return
        self._owed.pop(connection, None)
        self._connections.disconnected(connection)
        channel, address = connection.channel, connection.address
        self._audit.disconnected(channel, address, reason, connection.peer, always=always)

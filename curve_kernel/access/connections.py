"""The table of connections, fed with libzmq's events; it does no I/O.

libzmq tells of each connection by its descriptor when it is accepted and when it ends; the ZAP request
has the client's key and no descriptor; and a message has both the descriptor and the user id that ZAP
gave. So each authorization has a number, which is part of the user id. A connection is of a number only
if it was accepted before that number was given: one thread learns of both in the order in which
libzmq's I/O thread caused them.

Of a connection that has said nothing the client is known for certain if every authorization that may be
its own is of the same client: those that were given between its acceptance and the end of its
handshake, and are not another connection's. Else it is not known, and is limited as a viewer is
where viewers may connect.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

from .connection import Connection, Peer

__all__ = ["Connections", "user_id"]

# Authorizations of a channel that are kept before those that have served are looked for.
_KEPT = 64
# The roles of those that hold the kernel's secret key, or the key pair that it made for itself.
_OWN = ("manager", "kernel")


def user_id(number: int, peer: Peer) -> str:
    """Return the user id that ZAP gives the connection with that authorization."""
    return f"{number} {peer.role} {peer.public_key} {peer.name}"


def _number_and_peer(given: str) -> tuple[int, Peer]:
    """Return what `user_id` was made of."""
    number, role, public_key, name = given.split(" ", 3)
    return int(number), Peer(role, name, public_key)


def _clients_of(connection: Connection) -> set[Peer]:
    """Return the clients whose connection it may be; none if nothing is known."""
    return {connection.peer} if connection.peer.role else set(connection.candidates.values())


class Connections:
    """The connections, and the client of each as far as that is certain. Not thread-safe."""

    def __init__(self) -> None:
        self.number = 0
        # By channel and libzmq's descriptor, the oldest first: the handshake goes on, or is over.
        self.handshaking: dict[tuple[str, int], Connection] = {}
        self.ready: dict[tuple[str, int], Connection] = {}
        # Disconnected in their handshake, until libzmq has told of it.
        self.leaving: dict[tuple[str, int], Connection] = {}
        # By channel, how many of those in their handshake have succeeded at least.
        self._succeeded: collections.Counter[str] = collections.Counter()
        # By channel, the authorizations that may be of a connection whose handshake goes on, by number.
        self._authorized: dict[str, dict[int, Peer]] = collections.defaultdict(dict)
        self._kept: dict[str, int] = collections.defaultdict(lambda: _KEPT)
        # The last authorizations whose connection takes over no routing id.
        self._not_handed_over: collections.deque[int] = collections.deque(maxlen=1024)
        # By channel, the numbers of clients that ZAP has rejected.
        self._rejected: dict[str, list[int]] = collections.defaultdict(list)

    def __iter__(self) -> Iterator[Connection]:
        for connections in (self.handshaking, self.ready, self.leaving):
            yield from connections.values()

    def accepted(self, connection: Connection) -> None:
        """Take in a connection that was accepted."""
        self.handshaking[connection.channel, connection.descriptor] = connection

    def ended(self, channel: str, descriptor: int) -> Connection | None:
        """Take out a connection that ended, and return it."""
        key = channel, descriptor
        for connections in (self.handshaking, self.leaving):
            if (connection := connections.pop(key, None)) is not None:
                if channel == "pipe" and self._succeeded[channel]:
                    # A forked child that has printed its line, and by now its descriptor is another's.
                    connection.is_ready = True
                self._left_its_handshake(channel)
                return connection
        return self.ready.pop(key, None)

    def disconnected(self, connection: Connection) -> None:
        """Take note that *connection* is disconnected; if it is in its handshake, it counts no more."""
        if self.is_handshaking(connection):
            key = connection.channel, connection.descriptor
            self.leaving[key] = self.handshaking.pop(key)

    def is_handshaking(self, connection: Connection) -> bool:
        """Whether the handshake of *connection* goes on, as far as this table was told."""
        return self.handshaking.get((connection.channel, connection.descriptor)) is connection

    def is_surely_handshaking(self, connection: Connection) -> bool:
        """Whether the handshake of *connection* goes on, if all events were taken in."""
        return self.is_handshaking(connection) and not self._succeeded[connection.channel]

    def succeeded(self, channel: str) -> list[Connection]:
        """Take note that a handshake of *channel* has succeeded; libzmq does not name its connection.

        Returns the connections of which that is certain: all that are in their handshake, if so many
        have succeeded. None leaves its handshake before the event of its success has been taken in.
        """
        self._succeeded[channel] += 1
        in_it = [
            connection
            for connections in (self.handshaking, self.leaving)
            for connection in connections.values()
            if connection.channel == channel
        ]
        if self._succeeded[channel] < len(in_it):
            return []
        return [connection for connection in in_it if not connection.is_disconnected]

    def _left_its_handshake(self, channel: str) -> None:
        self._succeeded[channel] = max(self._succeeded[channel] - 1, 0)

    def authorized(self, channel: str, peer: Peer, *, hands_over: bool = True) -> str:
        """Take note that ZAP lets *peer* use *channel*; return the user id of its connection.

        Without *hands_over* libzmq ignores that connection if its routing id is in use, and so those
        that the kernel has not taken in yet.
        """
        self.number += 1
        authorized = self._authorized[channel]
        authorized[self.number] = peer
        if not hands_over:
            self._not_handed_over.extend(authorized)
        if len(authorized) > self._kept[channel]:
            self._forget(channel)
        return user_id(self.number, peer)

    def may_hand_over(self, channel: str, peer: Peer) -> bool:
        """Whether a connection of *peer* may take over a routing id that is in use on *channel*.

        libzmq takes the routing id that a client gives, and sends replies and prompts to the last
        connection that gave it. It tells the kernel only with a message, so it must not come to that:
        only clients of the same key may do so, and those that hold the kernel's own keys. The kernel
        takes in connections later than it accepts them, and the same then goes for all that wait; one
        that has been heard does not.
        """
        is_own = peer.role in _OWN

        def may(other: Peer) -> bool:
            return other.role in _OWN if is_own else other.public_key == peer.public_key

        def is_harmless(connection: Connection) -> bool:
            if connection.peer.role == "kernel" or (is_own and connection.has_spoken):
                return True
            clients = _clients_of(connection)
            return bool(clients) and all(may(client) for client in clients)

        ready = (connection for connection in self.ready.values() if connection.channel == channel)
        if not all(is_harmless(connection) for connection in ready):
            return False
        numbers = [
            connection.number
            for connections in (self.handshaking, self.leaving)
            for connection in connections.values()
            if connection.channel == channel
        ]
        oldest = min(numbers, default=self.number)
        return all(may(other) for n, other in self._authorized[channel].items() if n > oldest)

    def rejected(self, channel: str) -> None:
        """Take note that ZAP rejects a client, whose connection is about to end."""
        self.number += 1
        self._rejected[channel].append(self.number)
        del self._rejected[channel][:-_KEPT]

    def was_rejected(self, connection: Connection) -> bool:
        """Whether a connection that ended in its handshake was one of those that ZAP has rejected."""
        rejected = self._rejected[connection.channel]
        for number in rejected:
            if number > connection.number:
                rejected.remove(number)
                return True
        return False

    def got_ready(self, connection: Connection) -> None:
        """Take note that the handshake of *connection* is over."""
        key = connection.channel, connection.descriptor
        if self.is_handshaking(connection):
            del self.handshaking[key]
            self._left_its_handshake(connection.channel)
        self.ready[key] = connection
        connection.is_ready = True
        if not connection.peer.role:
            authorized = self._authorized[connection.channel].items()
            connection.candidates = {n: peer for n, peer in authorized if n > connection.number}
            connection.may_be_ignored = not connection.candidates.keys().isdisjoint(
                self._not_handed_over
            )
            self._deduce(connection)

    def ignored_until(self, ended: Connection) -> list[Connection]:
        """Return the connections that libzmq may ignore since *ended* had their routing id.

        It goes on ignoring them, and their client waits: it has to connect once more.
        """
        if ended.routing_id == "":  # libzmq has made one, which is nobody else's
            return []
        return [
            connection
            for connection in self.ready.values()
            if connection.channel == ended.channel
            and connection.may_be_ignored
            and not connection.has_spoken
            and not connection.is_disconnected
            and _clients_of(connection) & _clients_of(ended)
        ]

    def may_be(self, connection: Connection) -> list[Peer]:
        """Return the clients of which *connection* may be, as far as they have been accepted."""
        if connection.peer.role:
            return [connection.peer]
        if connection.is_ready:
            return list(connection.candidates.values())
        authorized = self._authorized[connection.channel].items()
        return [peer for number, peer in authorized if number > connection.number]

    def told(
        self, channel: str, descriptor: int, given: str, routing_id: str | None = None
    ) -> list[Connection]:
        """Take note of what a message told; return the connections whose client is known by it."""
        number, peer = _number_and_peer(given)
        key = channel, descriptor
        connection = self.handshaking.get(key) or self.ready.get(key)
        if connection is None or number <= connection.number:
            return []  # the message's connection has ended, and another one has its descriptor
        connection.peer, connection.candidates, connection.has_spoken = peer, {}, True
        connection.routing_id = routing_id
        if not connection.is_ready:
            self.got_ready(connection)
        self._authorized[channel].pop(number, None)
        others = [
            other
            for other in self.ready.values()
            if other.channel == channel and other.candidates.pop(number, None) is not None
        ]
        return [connection, *(other for other in others if self._deduce(other))]

    @staticmethod
    def _deduce(connection: Connection) -> bool:
        if len(peers := set(connection.candidates.values())) != 1:
            return False
        connection.peer, connection.candidates = peers.pop(), {}
        return True

    def _forget(self, channel: str) -> None:
        """Forget authorizations that were given before any connection that is in its handshake came."""
        numbers = (
            connection.number
            for connection in self.handshaking.values()
            if connection.channel == channel
        )
        oldest = min(numbers, default=self.number - 1)
        authorized = self._authorized[channel]
        self._authorized[channel] = {n: peer for n, peer in authorized.items() if n > oldest}
        self._kept[channel] = _KEPT + 2 * len(self._authorized[channel])

"""Every limit on what a peer may take, in one place, and which connection is disconnected for it.

Nothing here changes anything: `enforcer` applies it.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable
from typing import NamedTuple

from ..clock import monotonic
from .connection import Connection, Progress

__all__ = [
    "MESSAGE_SIZES",
    "Limits",
    "excess_connection",
    "follow_reader",
    "has_little_to_say",
    "has_too_much_waiting",
    "oldest_handshake",
    "says_too_much",
    "says_too_much_in_handshake",
]

MESSAGE_SIZES = {
    "shell": 64 << 20,
    "stdin": 4 << 20,
    "control": 16 << 20,
    "iopub": 1 << 10,
    "hb": 1 << 10,
    "pipe": 64 << 20,
}
"""Bytes in a frame by channel: what a client has to send there, uploads, code, subscriptions, pings."""

# A CURVE client sends less than 2 KiB until it gets READY.
_HANDSHAKE_BYTES = 16 << 10
# On ipc, where no bytes are counted: how often a connection may be seen to have sent something.
_HANDSHAKE_ACTIVITY = 10
# What a client may send on iopub that is not an owner, for each second that it stays, and in all: it
# subscribes to one topic, which takes libzmq fifty times its bytes. On hb, what may be unanswered.
_QUIET_BYTES, _QUIET_RATE, _QUIET_TOTAL = 8 << 10, 16, 256 << 10
_QUIET_ACTIVITY = {"iopub": (32, 0.5, 256.0), "hb": (64, 20, float("inf"))}
# Of what was published, the bytes that a slow reader may have left unread, and the seconds for which it
# may read nothing at all; on ipc, the seconds for which it may do so while more than that is published.
_BACKLOG, _STALL, _STILL = 16 << 20, 5.0, 0.25

# Connections of a listed client, and of a viewer on iopub: libzmq encrypts a message for each of them.
_PER_CLIENT, _PER_VIEWER_ON_IOPUB = {"owner": 64, "viewer": 16}, 8


class Limits(NamedTuple):
    """How many connections others may have, all ports together.

    Parameters
    ----------
    handshake_timeout : float
        Seconds until a handshake must be over.
    handshakes : int
        Connections that may be in their handshake at the same time.
    connections : int
        Connections after the handshake of clients that are not listed. Of those that are not known
        yet, a sixteenth of that on each channel, and a quarter on the heartbeat, but at least 16.
    """

    handshake_timeout: float
    handshakes: int
    connections: int


def excess_connection(connections: Collection[Connection], limits: Limits) -> Connection | None:
    """Return the connection to disconnect where a client, or a group, has too many.

    The groups do not compete: no client loses a connection to a client of which less is known. The
    manager and the kernel's own debugger have no limit, and a listed client has a limit of its own. In
    the groups of clients that are not listed, of those that are not known yet, and of the heartbeat,
    the oldest of the address that has the most is disconnected.
    """
    groups: dict[tuple[str, str], list[Connection]] = collections.defaultdict(list)
    for connection in connections:
        role = connection.peer.role
        if role in ("manager", "kernel") or connection.channel == "pipe" or connection.is_disconnected:
            continue
        if role in _PER_CLIENT:
            groups[role, connection.peer.name].append(connection)
            if role == "viewer" and connection.channel == "iopub":
                groups["iopub", connection.peer.name].append(connection)
        elif role == "any" and connection.channel != "hb":
            groups["any", ""].append(connection)
        else:
            group = "hb" if connection.channel == "hb" else ""
            groups[group, connection.channel].append(connection)
    allowed = {
        **_PER_CLIENT,
        "iopub": _PER_VIEWER_ON_IOPUB,
        "any": limits.connections,
        "": max(limits.connections // 16, 16),
        "hb": max(limits.connections // 4, 16),
    }
    for (group, _), members in groups.items():
        if len(members) > allowed[group]:
            addresses = collections.Counter(connection.address for connection in members)
            address = addresses.most_common(1)[0][0]
            same = (connection for connection in members if connection.address == address)
            return min(same, key=lambda connection: connection.since)
    return None


def oldest_handshake(handshaking: Iterable[Connection], handshake_timeout: float) -> Connection | None:
    """Return the connection to disconnect for a newer one, or None if no old one is in its handshake.

    The oldest of the first peers that has not shown that it knows the server key, else the oldest.
    """
    first = None
    for connection, _ in zip(handshaking, range(32), strict=False):
        if connection.has_got_ready(handshake_timeout):
            continue
        first = first or connection
        if not connection.has_sent_hello():
            return connection
    return first


def says_too_much_in_handshake(connection: Connection) -> bool:
    """Whether the connection has sent more than any handshake takes."""
    if connection.is_local:
        return connection.activity > _HANDSHAKE_ACTIVITY
    return connection.received() > _HANDSHAKE_BYTES


def has_too_much_waiting(connection: Connection) -> bool:
    """Whether more waits for libzmq than any handshake takes."""
    return connection.waiting() > _HANDSHAKE_BYTES


def has_little_to_say(connection: Connection) -> bool:
    """Whether the peer may only subscribe or ping, as it may while it is not known."""
    if connection.channel == "hb":
        return True
    return connection.channel == "iopub" and connection.peer.role in ("", "any", "viewer")


def says_too_much(connection: Connection) -> bool:
    """Whether a peer that `has_little_to_say` has sent more than a subscriber or a heartbeat does."""
    age = monotonic() - connection.since
    if connection.is_local:
        times, rate, most = _QUIET_ACTIVITY[connection.channel]
        allowed = min(times + rate * age, most)
        return connection.activity > allowed or connection.waiting() > _QUIET_BYTES
    if connection.channel == "hb":  # each message is echoed when it is complete
        return connection.received() - connection.acknowledged() > _QUIET_BYTES
    return connection.received() > min(_QUIET_BYTES + _QUIET_RATE * age, _QUIET_TOTAL)


def follow_reader(connection: Connection, published: int, largest: int) -> tuple[Progress, bool]:
    """Return the progress of a peer on iopub, and whether it leaves unread what would fill the memory.

    Parameters
    ----------
    connection : Connection
        Its ``progress`` is what the last look returned.
    published, largest : int
        Bytes published on iopub since the start, and of the largest message since the last look.
    """
    unread, then, at = connection.unread(), connection.progress, monotonic()
    now = Progress(published, connection.acknowledged(), at, unread=unread, still_since=at)
    if then is None or not unread:
        return now, False
    then = then._replace(largest=max(then.largest, largest))
    # One message takes its time, and is not what has piled up.
    most = max(_BACKLOG, _BACKLOG // 2 + then.largest)
    stalls = at - then.at > _STALL
    if connection.is_local:
        # No bytes are counted there; but what is unread changes if the peer reads.
        if unread != then.unread:
            then = then._replace(unread=unread, still_since=at)
        is_still = at - then.still_since > _STILL
        return then, (stalls or is_still) and published - then.published > most
    backlog = published - then.published - (now.acknowledged - then.acknowledged)
    if now.acknowledged > then.acknowledged:
        # It reads: what it has not read yet counts, not how long ago it had read everything.
        # What it acknowledges is more than what was published, by libzmq's own bytes.
        then = now._replace(published=published - max(backlog, 0), largest=then.largest)
    return then, backlog > most or stalls

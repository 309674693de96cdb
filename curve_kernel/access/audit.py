"""A log of the clients that were accepted and rejected."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from os import getpid
from threading import Timer
from typing import TYPE_CHECKING, Any

from ..clock import monotonic
from .peer import Peer, unknown
from .queued import QueuedLog

if TYPE_CHECKING:
    from .record import Record

__all__ = ["AuditLog", "Reason"]


class Reason(str, Enum):
    """Why a peer was rejected or disconnected, as logs and ``%curve`` show it."""

    WRONG_KEY = "wrong server key"
    NO_CURVE = "no CURVE, plaintext perhaps"
    WRONG_KEY_OR_NO_CURVE = "wrong server key, or no CURVE"
    MALFORMED = "malformed handshake"
    LEFT = "left during the handshake"
    UNKNOWN_KEY = "unknown key"
    NOT_FOR_VIEWERS = "not for viewers"
    REVOKED = "not listed any more"
    ENDED = "access has ended"
    DOUBT = "may be a client that is not listed any more"
    HANDSHAKES = "too many connections in the handshake"
    HANDSHAKE_BYTES = "too many bytes in the handshake"
    CONNECTIONS = "too many connections"
    BYTES = "too many bytes from a client that has little to say"
    SLOW = "slow reader"
    ROUTING_ID = "its routing id was in use until now"

    def __str__(self) -> str:
        return str(self.value)


# Clients of which it is remembered that the log has told of a message that was dropped.
_KEPT = 64


class AuditLog:
    """Logs the clients that were accepted and rejected, in a bounded number of lines.

    Each client that is listed has a bound of its own, and so have all others together. What exceeds it
    is counted, and the counts are logged when the period is over. An owner or the manager that was
    accepted always has a line.

    Parameters
    ----------
    log : logging.Logger
        Gets the lines: info for a peer that was accepted, warning for one that was rejected.
    record : Record, optional
        Gets an event for each line, and for each request.
    limit : int
        Lines of either kind in each period, of one client.
    period : float
        Seconds.
    """

    def __init__(
        self, log: logging.Logger, record: Record | None = None, limit: int = 30, period: float = 60
    ) -> None:
        self._log = log
        self._pid = getpid()
        self._record = record
        self._limit = limit
        self._period = period
        self._lock = threading.Lock()
        self._start = 0.0
        self._lines: collections.Counter[tuple[int, str]] = collections.Counter()
        # By level, reason, action, channel and client.
        self._left_out: collections.Counter[tuple[int, str, str, str, Peer]] = collections.Counter()
        self._dropped: set[str] = set()
        self._counts: collections.Counter[tuple[str, Reason]] = collections.Counter()

    def accepted(self, channel: str, address: str, peer: Peer, *, always: bool) -> None:
        """Log that a client was accepted; *always* also if there have been too many lines."""
        line = f"{channel}: accepted {peer} from {address}"
        if always or self._has_room(logging.INFO, "", "accepted", channel, peer):
            self._tell(logging.INFO, line, "accepted", channel, peer, address)

    def rejected(
        self, channel: str, address: str, reason: Reason, peer: Peer = unknown, detail: str = ""
    ) -> None:
        """Log that a peer was rejected, and why; *detail* is not part of what is counted."""
        self._count(channel, reason)
        line = f"{channel}: rejected a client from {address}: {reason}{detail}"
        if self._has_room(logging.WARNING, str(reason), "rejected", channel, peer):
            self._tell(logging.WARNING, line, "rejected", channel, peer, address, reason)

    def disconnected(
        self, channel: str, address: str, reason: Reason, peer: Peer, *, always: bool
    ) -> None:
        """Log that the kernel disconnected a client, and why; *always* also if there are many lines."""
        self._count(channel, reason)
        line = f"{channel}: disconnected {peer} from {address}: {reason}"
        if always or self._has_room(logging.WARNING, str(reason), "disconnected", channel, peer):
            self._tell(logging.WARNING, line, "disconnected", channel, peer, address, reason)

    def left(self, channel: str, address: str) -> None:
        """Log that a peer left during the handshake: a plaintext client that saw CURVE, or a probe."""
        self._count(channel, Reason.LEFT)
        line = f"{channel}: a client from {address} left during the handshake, plaintext perhaps"
        if self._has_room(logging.INFO, str(Reason.LEFT), "rejected", channel, unknown):
            self._tell(logging.INFO, line, "rejected", channel, unknown, address, Reason.LEFT)

    def requested(self, channel: str, peer: Peer, message: Mapping[str, Any]) -> None:
        """Record a request, before it is handled."""
        if self._record is not None:
            self._record.request(channel, message, **_of(peer))

    def dropped(
        self, channel: str, reason: Reason, peer: Peer, message: Mapping[str, Any] | None = None
    ) -> None:
        """Log that a message that had come already was not handled, since its client is out by now."""
        self._count(channel, reason)
        line = f"{channel}: dropped what {peer} had sent: {reason}"
        with self._lock:
            if line not in self._dropped:
                self._dropped = {*list(self._dropped)[-_KEPT:], line}
                self._write(logging.WARNING, line)
                if self._record is not None and message is None:
                    self._record.event("rejected", channel, **_of(peer), reason=str(reason))
        if self._record is not None and message is not None:
            self._record.request(channel, message, **_of(peer), reason=str(reason))

    def _tell(
        self,
        level: int,
        line: str,
        action: str,
        channel: str,
        peer: Peer,
        address: str,
        reason: Reason | None = None,
    ) -> None:
        self._write(level, line)
        if self._record is not None:
            why = "" if reason is None else str(reason)
            self._record.event(action, channel, **_of(peer), address=address, reason=why)

    def counts(self, channel: str) -> dict[str, int]:
        """Return how many peers *channel* has rejected or disconnected since the start, by reason."""
        with self._lock:
            counts = self._counts.copy()
        return {str(reason): count for (name, reason), count in counts.items() if name == channel}

    def _count(self, channel: str, reason: Reason) -> None:
        with self._lock:
            self._counts[channel, reason] += 1

    def _has_room(self, level: int, reason: str, action: str, channel: str, peer: Peer) -> bool:
        """Whether there may be one more line in this period; if not, it is counted."""
        with self._lock:
            now = monotonic()
            if now - self._start >= self._period:
                self._report()
                self._start = now
            # Of keys that are not listed, somebody may have any number.
            peer = peer if peer.name or peer.role in ("manager", "kernel") else unknown
            client = peer.name or peer.role
            self._lines[level, client] += 1
            if self._lines[level, client] <= self._limit:
                return True
            if not self._left_out:
                with suppress(Exception):
                    timer = Timer(self._start + self._period - now, self.flush)
                    timer.daemon = True
                    timer.start()
            self._left_out[level, reason, action, channel, peer] += 1
            return False

    def _write(self, level: int, line: str, *values: object) -> None:
        # Whether a client is accepted must not depend on what code in a cell makes of logging.
        with suppress(Exception):
            self._log.log(level, line, *values)

    def close(self) -> None:
        """Log and record what there still is. Does nothing in a forked child."""
        if getpid() != self._pid:
            return
        self.flush()
        if self._record is not None:
            self._record.close()
        if isinstance(self._log, QueuedLog):
            self._log.flush()

    def flush(self) -> None:
        """Log the counts of what was left out so far."""
        with self._lock:
            self._report()

    def _report(self) -> None:
        kinds: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for (level, reason, action, channel, peer), count in self._left_out.items():
            kinds[level][reason or action] += count
            if self._record is not None:
                self._record.event(action, channel, **_of(peer), reason=reason, count=str(count))
        for level, left_out in kinds.items():
            self._write(
                level,
                "%d connections were not logged one by one: %s",
                sum(left_out.values()),
                ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common()),
            )
        self._lines.clear()
        self._left_out.clear()


def _of(peer: Peer) -> dict[str, str]:
    return {"role": peer.role, "name": peer.name, "public_key": peer.public_key}

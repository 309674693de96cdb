"""A log of the clients that were accepted and rejected."""

from __future__ import annotations

import collections
import logging
import threading
from contextlib import suppress
from enum import Enum
from threading import Timer

from ..clock import monotonic

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
    HANDSHAKES = "too many connections in the handshake"
    HANDSHAKE_BYTES = "too many bytes in the handshake"
    CONNECTIONS = "too many connections"
    BYTES = "too many bytes from a client that has little to say"
    SLOW = "slow reader"

    def __str__(self) -> str:
        return str(self.value)


class AuditLog:
    """Logs the clients that were accepted and rejected, in a bounded number of lines.

    What exceeds the bound is counted, and the counts are logged when the period is over. An owner or
    the manager that was accepted always has a line.

    Parameters
    ----------
    log : logging.Logger
        Gets the lines: info for a peer that was accepted, warning for one that was rejected.
    limit : int
        Lines of either kind in each period.
    period : float
        Seconds.
    """

    def __init__(self, log: logging.Logger, limit: int = 30, period: float = 60) -> None:
        self._log = log
        self._limit = limit
        self._period = period
        self._lock = threading.Lock()
        self._start = 0.0
        self._lines: collections.Counter[int] = collections.Counter()
        self._left_out: collections.Counter[tuple[int, str]] = collections.Counter()
        self._counts: collections.Counter[tuple[str, Reason]] = collections.Counter()

    def accepted(self, channel: str, address: str, peer: str, *, always: bool) -> None:
        """Log that a client was accepted; *always* also if there have been too many lines."""
        line = f"{channel}: accepted {peer} from {address}"
        if always:
            self._write(logging.INFO, line)
        else:
            self._add(logging.INFO, "accepted", line)

    def rejected(self, channel: str, address: str, reason: Reason, detail: str = "") -> None:
        """Log that a peer was rejected, and why; *detail* is not part of what is counted."""
        self._count(channel, reason)
        line = f"{channel}: rejected a client from {address}: {reason}{detail}"
        self._add(logging.WARNING, str(reason), line)

    def disconnected(self, channel: str, address: str, reason: Reason, peer: str) -> None:
        """Log that the kernel disconnected a client, and why."""
        self._count(channel, reason)
        self._add(
            logging.WARNING, str(reason), f"{channel}: disconnected {peer} from {address}: {reason}"
        )

    def left(self, channel: str, address: str) -> None:
        """Log that a peer left during the handshake: a plaintext client that saw CURVE, or a probe."""
        self._count(channel, Reason.LEFT)
        line = f"{channel}: a client from {address} left during the handshake, plaintext perhaps"
        self._add(logging.INFO, str(Reason.LEFT), line)

    def counts(self, channel: str) -> dict[str, int]:
        """Return how many peers *channel* has rejected or disconnected since the start, by reason."""
        with self._lock:
            counts = self._counts.copy()
        return {str(reason): count for (name, reason), count in counts.items() if name == channel}

    def _count(self, channel: str, reason: Reason) -> None:
        with self._lock:
            self._counts[channel, reason] += 1

    def _add(self, level: int, kind: str, line: str) -> None:
        with self._lock:
            now = monotonic()
            if now - self._start >= self._period:
                self._report()
                self._start = now
            self._lines[level] += 1
            if self._lines[level] <= self._limit:
                self._write(level, line)
                return
            if not self._left_out:
                with suppress(Exception):
                    timer = Timer(self._start + self._period - now, self.flush)
                    timer.daemon = True
                    timer.start()
            self._left_out[level, kind] += 1

    def _write(self, level: int, line: str, *values: object) -> None:
        # Whether a client is accepted must not depend on what code in a cell makes of logging.
        with suppress(Exception):
            self._log.log(level, line, *values)

    def flush(self) -> None:
        """Log the counts of what was left out so far."""
        with self._lock:
            self._report()

    def _report(self) -> None:
        for level in {level for level, _ in self._left_out}:
            left_out = [(kind, n) for (at, kind), n in self._left_out.most_common() if at == level]
            self._write(
                level,
                "%d connections were not logged one by one: %s",
                sum(count for _, count in left_out),
                ", ".join(f"{count} x {kind}" for kind, count in left_out),
            )
        self._lines.clear()
        self._left_out.clear()

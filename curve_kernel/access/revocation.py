"""Holds every connection against the list, whenever the list changes or an access ends."""

from __future__ import annotations

from pathlib import Path

from ..clock import monotonic
from ..receipts import tell
from .allowlist import ROLES
from .enforcer import Enforcer
from .policy import Policy
from .watch import FolderWatch

__all__ = ["Revocation"]

# Seconds between two looks at a list that changes all the time.
_REST = 0.05
# Seconds between two looks at the clocks: the one that shows the time may be set, and the other stands
# while the machine is suspended, as does a wait.
_CLOCKS = 1.0


class Revocation:
    """Notices that the list has changed, or that an access has ended, and disconnects who is out.

    All of it is called by the thread of `monitor`.

    Parameters
    ----------
    policy : Policy
        Reads the list.
    enforcer : Enforcer
        Disconnects.
    """

    def __init__(self, policy: Policy, enforcer: Enforcer) -> None:
        self._policy = policy
        self._enforcer = enforcer
        self._watch = FolderWatch(policy.clients.folder, ROLES.values())
        self._told = False
        self._looked = monotonic()
        self._done = policy.looks

    @property
    def descriptor(self) -> int:
        """Readable when the list may have changed; -1 where nothing tells."""
        return self._watch.descriptor

    def told(self) -> None:
        """Take note that `descriptor` is readable."""
        self._told = True
        self._watch.take()

    def seconds(self) -> float | None:
        """Return the seconds after which `check` is to be called, or None if that has time."""
        if not self._told and not self._policy.has_served:
            return None
        left, due = self._policy.seconds_left(), self._due()
        return max(due if left is None or self._told else min(due, left, _CLOCKS), 0)

    def _due(self) -> float:
        return (_REST if self._told else self._watch.interval) - (monotonic() - self._looked)

    def check(self) -> None:
        """Look at the list if that is due, and disconnect who is not accepted any more."""
        left = self._policy.seconds_left()
        is_over = left is not None and left <= 0 and not self._told
        try:
            if self._due() <= 0 or is_over:
                self._looked = monotonic()
                self._told = not self._policy.look()
        finally:
            if self._done != (looks := self._policy.looks):
                ended = self._enforcer.hold_against_list()
                self._done = looks
                tell(self._policy.clients.folder, _connection_file(), ended)

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()


def _connection_file() -> str:
    from ipykernel.connect import get_connection_file  # which commands that share this module need not

    try:
        return Path(get_connection_file()).name
    except RuntimeError:  # it starts or ends
        return "a kernel"

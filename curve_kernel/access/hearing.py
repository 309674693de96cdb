"""What messages told of the connections that they came by, until the monitor's thread takes it in."""

from __future__ import annotations

import collections
from typing import NamedTuple, cast

import zmq

__all__ = ["Hearing", "Told"]

_SRCFD = int(zmq.SRCFD)
# Descriptors of a channel that are kept: each one that stands is told of again.
_KEPT = 4096


class Told(NamedTuple):
    """What one message told.

    ``descriptor`` is libzmq's, or -1 if all messages of the channel have been heard. ``routing_id`` is
    the one that the client gave, empty if it gave none, and None if that can't be said.
    """

    channel: str
    descriptor: int
    user_id: str = ""
    routing_id: str | None = None


class Hearing:
    """Remembers whose message came last by a descriptor, and queues what is new."""

    def __init__(self) -> None:
        self._user_ids: dict[str, dict[int, str]] = collections.defaultdict(dict)
        self.told: collections.deque[Told] = collections.deque()
        """What is to be taken in, the oldest first."""

    # Thread: that of the channel

    def note(self, channel: str, frame: zmq.Frame) -> tuple[str | None, bool]:
        """Take note of a message's first frame.

        Returns its connection's user id, None if it came from no connection, and whether that is new.
        """
        try:
            descriptor, user_id = cast("tuple[int, str]", (frame.get(_SRCFD), frame.get("User-Id")))
        except zmq.ZMQError:
            return None, False
        user_ids = self._user_ids[channel]
        if user_ids.get(descriptor) == user_id:
            return user_id, False
        user_ids[descriptor] = user_id
        self.told.append(Told(channel, descriptor, user_id, _routing_id(frame)))
        return user_id, True

    # Thread: monitor

    def trim(self, channel: str) -> None:
        """Forget what was told of *channel*, if that is a lot."""
        if len(self._user_ids[channel]) > _KEPT:
            self._user_ids[channel].clear()


def _routing_id(frame: zmq.Frame) -> str | None:
    try:
        return str(frame.get("Identity"))
    except (zmq.ZMQError, UnicodeDecodeError):  # a subscriber's, or any bytes
        return None

"""Who is at the other end of a connection."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Peer", "unknown"]


class Peer(NamedTuple):
    """The client at the other end of a connection.

    ``role`` is ``manager``, ``owner`` or ``viewer``; ``any`` for a client that is not listed where that
    is allowed; ``kernel`` for the kernel's own debugger; and empty while it is not known for certain.
    ``name`` is empty for a peer that has none. ``public_key`` is 40 characters of Z85.
    """

    role: str = ""
    name: str = ""
    public_key: str = ""

    def __str__(self) -> str:
        if self.role == "any":
            return f"any client, with key {self.public_key}"
        return f"{self.role} {self.name!r}" if self.name else self.role or "an unknown client"


unknown = Peer()

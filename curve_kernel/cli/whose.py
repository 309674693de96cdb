"""Whose a message is, for people to read."""

from __future__ import annotations

from typing import Any

__all__ = ["whose"]

# What jupyter_client's sessions call a user that has no name.
_NOBODY = "username"


def whose(message: dict[str, Any]) -> str:
    """Return the name of who sent the request that *message* comes of, or nothing.

    A curve_kernel has written the name there that belongs to the client's key. What a manager's front
    end says of itself stands as it says it, so it is made one short word.
    """
    name = message["parent_header"].get("username")
    if not isinstance(name, str) or name == _NOBODY:
        return ""
    return "".join(letter for letter in name if letter.isprintable() and not letter.isspace())[:64]

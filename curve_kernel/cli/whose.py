"""For people to read: whose a message is, and what a kernel is called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["short_name", "whose"]

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


def short_name(path: str) -> str:
    """Return a name for a connection file's kernel by which a person tells it from others."""
    stem = Path(path).stem
    # Of a launcher's UUID the beginning does.
    found = re.match(r"(kernel-[0-9a-f]{8})-[0-9a-f]{4}-", stem)
    return found[1] if found else stem

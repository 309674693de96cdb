"""Connection files to hand over: what `share` adds to one, and what reads it.

Whom it is for, as what and until when stands under ``shared``, for people only. A *ticket* also holds a
client key pair, in ``curve_client_publickey`` and ``curve_client_secretkey``: whoever has the file has
the access.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..errors import CurveKernelError
from .pair import KeyPair, parse

__all__ = ["shared", "ticket_pair", "until"]

_PUBLIC, _SECRET = "curve_client_publickey", "curve_client_secretkey"


def shared(name: str, role: str, end: datetime | None, pair: KeyPair | None) -> dict[str, Any]:
    """Return the fields that `share` adds to a connection file."""
    note = {"name": name, "role": role}
    if end is not None:
        note["until"] = end.isoformat(timespec="seconds")
    fields: dict[str, Any] = {"shared": note}
    if pair is not None:
        fields |= {_PUBLIC: pair.public_key.decode(), _SECRET: pair.secret_key.decode()}
    return fields


def ticket_pair(info: Mapping[str, Any]) -> KeyPair | None:
    """Return the client key pair in a ticket, or None if the connection info is no ticket.

    Raises
    ------
    CurveKernelError
        If a key is malformed, or the two are not a pair.
    """
    if info.get(_SECRET) is None:
        return None
    pair = KeyPair.from_secret(parse(info[_SECRET], f"{_SECRET} in the connection file"))
    if parse(info.get(_PUBLIC), f"{_PUBLIC} in the connection file") != pair.public_key:
        raise CurveKernelError(
            f"{_PUBLIC} and {_SECRET} in the connection file are not a pair", "ask for a new ticket"
        )
    return pair


def until(info: Mapping[str, Any]) -> datetime | None:
    """Return until when a connection file says that it is shared, if it does."""
    try:
        end = datetime.fromisoformat(info["shared"]["until"])
        end.astimezone()  # as `show` does
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return end if end.tzinfo is not None else None

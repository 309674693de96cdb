"""What a kernel that starts says of itself."""

from __future__ import annotations

import shlex
from typing import Any

from .errors import printable

__all__ = ["banner"]


def banner(app: Any, file: str) -> list[str]:
    """Return the lines that say that the kernel is encrypted, which clients may connect, and how.

    Parameters
    ----------
    app : CurveKernelApp
        The kernel's application.
    file : str
        Its connection file.
    """
    file = shlex.quote(file)
    clients = "anybody with the connection file"
    if app.client_authorization == "allowlist":
        clients = f"the clients listed in {shlex.quote(app.authorized_clients)}"
        if app.owner_keys:
            clients += f", and those in owner_keys ({len(app.owner_keys)})"
    lines = (
        f"Every channel is encrypted (CURVE); server key: {app.server_key.decode()}",
        f"Connection file: {file}",
        f"May connect: {clients}",
        f"To connect: python -m curve_kernel console --existing {file}",
    )
    return [printable(line) for line in lines]

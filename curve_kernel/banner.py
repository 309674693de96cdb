"""What a kernel that starts says of itself."""

from __future__ import annotations

import shlex

__all__ = ["banner"]


def banner(server_key: bytes, file: str, folder: str | None, owner_keys: int) -> list[str]:
    """Return the lines that say that the kernel is encrypted, which clients may connect, and how.

    Parameters
    ----------
    server_key : bytes
        The server's public key.
    file : str
        The connection file.
    folder : str or None
        The folder that lists the clients, or None where any client may connect.
    owner_keys : int
        How many keys are owners beside those in the folder.
    """
    file = shlex.quote(file)
    clients = "anybody with the connection file"
    if folder is not None:
        clients = f"the clients listed in {shlex.quote(folder)}"
        if owner_keys:
            clients += f", and {owner_keys} in owner_keys"
    return [
        f"Every channel is encrypted (CURVE); server key: {server_key.decode()}",
        f"Connection file: {file}",
        f"May connect: {clients}",
        f"To connect: python -m curve_kernel console --existing {file}",
    ]

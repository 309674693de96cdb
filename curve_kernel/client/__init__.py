"""Kernel clients with a key pair of their own, drop-in for jupyter_client's.

They need to know only the server's public key::

    from curve_kernel.client import BlockingKernelClient

    client = BlockingKernelClient(connection_file="kernel-1234.json")
    client.load_connection_file()
    client.start_channels()

A connection that is refused or impossible is an exception within five seconds, where stock waits. So it
is later: if the kernel does not accept the client any more, after a restart say, whatever waits for a
message raises `ConnectionRefusedByKernelError`, ``is_alive()`` is False and ``refusal`` is the error. A
kernel that is gone may come back, so that is told as in stock, by ``is_alive()``.
"""

from .clients import AsyncKernelClient, BlockingKernelClient, ThreadedKernelClient
from .handshake import (
    ChannelNotForViewersError,
    ConnectionRefusedByKernelError,
    Handshake,
    KeyNotAuthorizedError,
    NobodyThereError,
    NoCurveServerError,
    WrongServerKeyError,
)

__all__ = [
    "AsyncKernelClient",
    "BlockingKernelClient",
    "ChannelNotForViewersError",
    "ConnectionRefusedByKernelError",
    "Handshake",
    "KeyNotAuthorizedError",
    "NoCurveServerError",
    "NobodyThereError",
    "ThreadedKernelClient",
    "WrongServerKeyError",
]

"""The debug adapter's process: debugpy's own adapter, without a port.

debugpy's adapter listens on two loopback ports, for the front end and for the debugged process, and
accepts every client. Here the kernel hands it each connection as a socket that is connected already,
over a pair of sockets that the adapter inherits; no address leads to any of them.

Run as ``python adapter.py DESCRIPTOR``. It ends when the kernel does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _NoListener:
    """Stands where debugpy keeps its listening socket."""

    def getsockname(self) -> tuple[str, int]:
        return ("127.0.0.1", 0)

    def close(self) -> None:
        pass


def main() -> None:
    """Serve connections that the kernel passes on, until it closes its end."""
    # Nothing in this file's folder may stand in for a module of debugpy's.
    if sys.path[0] == str(Path(__file__).parent):
        del sys.path[0]
    from debugpy.adapter import clients, servers
    from debugpy.common import sockets

    handlers: dict[str, Callable[[socket.socket], Any]] = {}

    def serve(name: str, handler: Callable[[socket.socket], Any], *_: Any, **__: Any) -> _NoListener:
        handlers[name] = handler
        return _NoListener()

    sockets.serve = serve
    servers.serve("127.0.0.1")
    clients.serve("127.0.0.1", 0)
    kernel = socket.socket(fileno=int(sys.argv[1]))
    while True:
        name, descriptors, _, _ = socket.recv_fds(kernel, 16, 1)
        if not descriptors:
            # The kernel has ended.
            os._exit(0)
        connection = socket.socket(fileno=descriptors[0])
        threading.Thread(target=handlers[name.decode()], args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()

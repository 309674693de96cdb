"""A process that the kernel has forked holds the kernel's sockets, too: let go of them, or end them.

Python runs `let_go` in each child that it forks. In one that C code forks nothing of ours runs, and it
keeps what it has inherited until it ends or starts another program. So the kernel, when it ends, shuts
its listening sockets down, which ends them for everybody who holds them.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from os import O_CLOEXEC, O_RDONLY, close, devnull, dup2, fstat
from os import open as os_open

__all__ = ["let_go", "shut_down_at_end"]


def let_go(held: Iterable[tuple[int, int]]) -> None:
    """Close descriptors that have the inode given with each; their numbers stay taken."""
    try:
        null = os_open(devnull, O_RDONLY | O_CLOEXEC)
    except OSError:
        return
    for descriptor, inode in held:
        with suppress(OSError):
            if fstat(descriptor).st_ino == inode:
                # libzmq's number stays taken: nothing else in the child gets it.
                dup2(null, descriptor, inheritable=False)
    close(null)


@contextlib.contextmanager
def shut_down_at_end(listening: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Shut down listening sockets, by descriptor and inode, at the end of the block.

    libzmq closes them in it: before, it would take their end for an error of its own, and abort.
    """
    kept = []
    for descriptor, inode in listening:
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                kept.append(socket.socket(fileno=os.dup(descriptor)))
    try:
        yield
    finally:
        for one in kept:
            with contextlib.suppress(OSError), one:
                one.shutdown(socket.SHUT_RDWR)

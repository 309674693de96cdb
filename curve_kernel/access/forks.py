"""A process that the kernel has forked holds the kernel's sockets, too: let go of them, or end them.

Python runs `let_go` in each child that it forks. In one that C code forks nothing of ours runs, and it
keeps what it has inherited until it ends or starts another program. So the kernel, when it ends, shuts
its listening sockets down, which ends them for everybody who holds them.
"""

from __future__ import annotations

from _socket import SHUT_RDWR, socket
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from os import O_CLOEXEC, O_RDONLY, close, devnull, dup, dup2, fstat, getpid
from os import open as os_open

__all__ = ["let_go", "shut_down_at_end"]

_PROCESS = getpid()


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


@contextmanager
def shut_down_at_end(listening: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Shut down listening sockets, by descriptor and inode, at the end of the block.

    libzmq closes them in it: before, it would take their end for an error of its own, and abort. A
    child that C code forked, and that goes on to its end in Python, leaves the kernel's sockets alone.
    """
    kept = []
    for descriptor, inode in listening if getpid() == _PROCESS else ():
        with suppress(OSError):
            if fstat(descriptor).st_ino == inode:
                kept.append(socket(fileno=dup(descriptor)))
    try:
        yield
    finally:
        for one in kept:
            with suppress(OSError), closing(one):
                one.shutdown(SHUT_RDWR)

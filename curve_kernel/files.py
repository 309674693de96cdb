"""Small files: read without ever waiting, replaced in one step."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

__all__ = ["check", "read", "replace"]

_LIMIT = 1 << 20


def read(path: str | os.PathLike[str], *, follow: bool = True) -> tuple[bytes, os.stat_result]:
    """Return the content of a regular file and its status, both of the same open file.

    Without *follow*, the file must not be a link.

    Raises
    ------
    OSError
        If it can't be opened, is a folder, a FIFO, a device or a socket, or exceeds 1 MiB.
        ``strerror`` says which.
    """
    no_link = 0 if follow else os.O_NOFOLLOW
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | no_link)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(0, "it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        if status.st_size > _LIMIT:
            raise OSError(0, "it is larger than 1 MiB")
        return os.read(descriptor, _LIMIT), status
    finally:
        os.close(descriptor)


def check(path: str | os.PathLike[str]) -> None:
    """Make sure that a small file can be written beside *path*, by writing one and removing it.

    Raises
    ------
    OSError
        If the folder can't be written, or the disk is full.
    """
    with tempfile.NamedTemporaryFile(dir=Path(os.path.realpath(path)).parent, prefix=".") as file:
        file.write(bytes(4096))


def replace(path: str | os.PathLike[str], content: bytes, mode: int = 0o600) -> None:
    """Replace the file at *path* in one step; a link to a file stays a link.

    Raises
    ------
    OSError
        If the folder can't be written. Nothing is left behind then.
    """
    target = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

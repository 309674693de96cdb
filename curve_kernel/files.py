"""Small files: read without ever waiting, replaced in one step."""

from __future__ import annotations

import stat
import tempfile
from contextlib import suppress
from os import close, fstat
from os import open as os_open
from os import read as os_read
from pathlib import Path

from jupyter_core.paths import allow_insecure_writes
from traitlets.log import get_logger

from .errors import CurveKernelError
from .private_os import os

__all__ = ["check", "insecure_writes_are_allowed", "is_gone", "read", "replace", "set_mode"]

_LIMIT = 1 << 20
_AT_LEAST = 1 << 16  # a file system may not know the size


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
    descriptor = os_open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | no_link)
    try:
        status = fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(0, "it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        if status.st_size > _LIMIT:
            raise OSError(0, "it is larger than 1 MiB")
        return os_read(descriptor, max(status.st_size + 1, _AT_LEAST)), status
    finally:
        close(descriptor)


def check(path: str | os.PathLike[str]) -> None:
    """Make sure that a secret file can be written beside *path*, by writing one and removing it.

    Raises
    ------
    OSError
        If the folder can't be written, or the disk is full.
    CurveKernelError
        If others could read the file.
    """
    with tempfile.NamedTemporaryFile(dir=Path(os.path.realpath(path)).parent, prefix=".") as file:
        set_mode(file.fileno(), path, 0o600)
        file.write(bytes(4096))


def replace(
    path: str | os.PathLike[str], content: bytes, mode: int = 0o600, *, new: bool = False
) -> None:
    """Replace the file at *path* in one step, or make it if it is to be *new*; a link stays a link.

    Raises
    ------
    OSError
        If the folder can't be written, or there is a file that was to be new. Nothing is left behind
        then.
    CurveKernelError
        If *mode* is 0600 and others could read the file all the same, unless the user allows it.
    """
    target = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            set_mode(descriptor, path, mode)
            file.write(content)
        if not (new and _links(temporary, target)):
            Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _links(temporary: str, target: Path) -> bool:
    """Give a file its name if that is free; False where the file system has no links."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        return False
    Path(temporary).unlink()
    return True


def insecure_writes_are_allowed(path: str | os.PathLike[str], mode: int) -> bool:
    """Whether this user accepts, in Jupyter's own variable, that the file has such a *mode*."""
    if allow_insecure_writes:
        get_logger().warning(
            "%s has mode %04o: others can read it, which JUPYTER_ALLOW_INSECURE_WRITES accepts",
            path,
            mode,
        )
    return allow_insecure_writes


def is_gone(path: str | os.PathLike[str]) -> bool:
    """Whether there is no such file; one in a folder that can't be entered may be there."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False
    return False


def set_mode(descriptor: int, path: str | os.PathLike[str], mode: int) -> None:
    """Give the open file at *path* a *mode*.

    Raises
    ------
    CurveKernelError
        If that is for this user alone and others could read the file all the same, unless the user
        allows it.
    """
    # A file system may not let modes be changed (CIFS, Azure Files, NFS, FAT), and show one of its own.
    with suppress(OSError):
        os.fchmod(descriptor, mode)
    found = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if found & ~mode & 0o077 and not mode & 0o077 and not insecure_writes_are_allowed(path, found):
        raise CurveKernelError(
            f"{os.fspath(path)} would hold a secret, and others could read it: its file system gives it"
            f" mode {found:04o}",
            "use a folder on another file system, or mount it with file_mode=0600; or accept it, as all"
            " of Jupyter does with JUPYTER_ALLOW_INSECURE_WRITES=1",
        )

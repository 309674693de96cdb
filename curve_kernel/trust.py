"""Who may write a file: what others may write decides nothing.

As OpenSSH's StrictModes has it: a file and its folder belong to this user or to root, and nobody else
may write them, not even a group. In a folder with the sticky bit, such as /tmp, others can't replace
what is not theirs. A list of clients is trusted only if that holds for the whole path, from the home
folder on.
"""

from __future__ import annotations

import pwd
import shlex
import stat
from collections.abc import Iterator

from .errors import CurveKernelError
from .private_os import os

__all__ = ["certificate_problem", "file_problem", "folder_problem", "name_of_user", "path_problem"]

_OPEN_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_LINKS = 40


def name_of_user(uid: int) -> str:
    """Return a user's name and number, for messages."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _problem(
    kind: str, path: str, status: os.stat_result, *, sticky: bool = False, modes: bool = True
) -> CurveKernelError | None:
    if status.st_uid not in (0, os.geteuid()):
        own = "make a copy of it in a folder of yours, if you trust that user"
        return CurveKernelError(
            f"{kind} {path} belongs to another user: {name_of_user(status.st_uid)}",
            own if stat.S_ISREG(status.st_mode) else "use a folder of your own",
        )
    safe = sticky and bool(status.st_mode & stat.S_ISVTX)
    if modes and status.st_mode & _OPEN_TO_OTHERS and not safe and not stat.S_ISLNK(status.st_mode):
        return CurveKernelError(
            f"{kind} {path} can be written by others: its mode is {stat.S_IMODE(status.st_mode):04o}",
            f"look at what is in it, then: chmod go-w {shlex.quote(path)}",
        )
    return None


def certificate_problem(path: str, status: os.stat_result) -> CurveKernelError | None:
    """Return why a certificate can't be trusted, of which the way to it is known to be safe."""
    return _problem("certificate", path, status)


def file_problem(kind: str, path: str, status: os.stat_result) -> CurveKernelError | None:
    """Return why a file can't be trusted: others may write it, or replace it in its folder.

    Parameters
    ----------
    kind : str
        What it is, for the message.
    path : str
        Where it is.
    status : os.stat_result
        Of the open file, so that what is read is what is checked.
    """
    return _problem(kind, path, status, modes=_modes_count()) or folder_problem(kind, path)


def folder_problem(kind: str, path: str) -> CurveKernelError | None:
    """Return why the folder of a file can't be trusted, and of what it leads to if it is a link."""
    path = os.path.abspath(path)  # resolves no link
    folders = {os.path.dirname(one): None for one in (path, os.path.realpath(path))}
    for folder in folders:
        try:
            status = os.stat(folder)
        except OSError as error:
            return _unreadable(f"folder {folder} of {kind}", error)
        named = f"the folder of {kind} {path}, which is"
        if problem := _problem(named, folder, status, sticky=True, modes=_modes_count()):
            return problem
    return None


def path_problem(kind: str, path: str | os.PathLike[str]) -> CurveKernelError | None:
    """Return why a file or folder can't be trusted, as `file_problem`, for each folder on the way too.

    What is above the home folder is its administrator's affair. Where that is unknown, nothing is.
    """
    try:
        steps = list(_steps(os.path.abspath(path)))  # resolves no link
    except OSError as error:
        return _unreadable(f"{kind} {os.fspath(path)}", error)
    for step, status in steps:
        is_safe = status.st_uid in (0, os.geteuid()) and not status.st_mode & _OPEN_TO_OTHERS
        if is_safe or _is_above_home(step):
            continue
        last = step == steps[-1][0]
        named = kind if last else "link" if stat.S_ISLNK(status.st_mode) else "folder"
        if problem := _problem(named, step, status, sticky=not last):
            return problem
    return None


def _is_above_home(folder: str) -> bool:
    home = os.path.expanduser("~")  # may be unknown
    home = os.path.realpath(home) if os.path.isabs(home) else "/"
    return f"{home}/".startswith(f"{folder.rstrip('/')}/") and folder != home


def _steps(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each folder and each link by which *path* is reached, and last what is there."""
    current, links = "/", 0
    names = [name for name in reversed(path.split("/")) if name]
    yield current, os.lstat(current)
    while names:
        name = names.pop()
        if name == "..":
            current = os.path.dirname(current)
        elif name != ".":
            step = os.path.join(current, name)
            status = os.lstat(step)
            yield step, status
            if not stat.S_ISLNK(status.st_mode):
                current = step
                continue
            links += 1
            target = os.readlink(step)
            if links > _LINKS:
                raise OSError(0, "there are too many links")
            current = "/" if target.startswith("/") else current
            names += [name for name in reversed(target.split("/")) if name]


def _unreadable(what: str, error: OSError) -> CurveKernelError:
    return CurveKernelError(f"{what} can't be read: {error.strerror}")


def _modes_count() -> bool:
    """Whether modes say something: on a file system without them Jupyter asks for a variable."""
    from jupyter_core.paths import allow_insecure_writes

    return not allow_insecure_writes

"""The clients that may connect, listed by name: the folders ``owners`` and ``viewers``."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator
from os import geteuid, scandir
from pathlib import Path
from typing import NamedTuple

from ..errors import CurveKernelError
from ..folders import is_out_of_reach
from ..keys.certificates import read_certificate

__all__ = ["MANAGER", "OWN_CLIENT", "ROLES", "AuthorizedClients", "Client", "check_name"]

ROLES = {"owner": "owners", "viewer": "viewers"}
"""Role to the name of its folder."""

MANAGER = "manager"
"""The name of the client that holds the kernel's own secret key."""

OWN_CLIENT = "kernel"
"""The name of the client inside the kernel, its debugger."""

_NAME = re.compile(r"[\w][\w.@+-]{0,63}", re.ASCII)
_OPEN_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_name(name: str) -> str:
    """Return *name* if it can be a client's name.

    Raises
    ------
    CurveKernelError
        If it can't be the name of a file and of a line in a log, or is the manager's.
    """
    if not _NAME.fullmatch(name) or name in (MANAGER, OWN_CLIENT):
        raise CurveKernelError(
            f"{name!r} can't be the name of a client",
            "use up to 64 letters, digits and . _ @ + - with a letter or digit first, not"
            f" {MANAGER} or {OWN_CLIENT}",
        )
    return name


class Client(NamedTuple):
    """A client that is listed by name."""

    name: str
    role: str
    public_key: bytes
    path: Path


class AuthorizedClients:
    """The clients listed in a folder, as they are at the moment of asking.

    Parameters
    ----------
    folder : Path
        The folder that holds ``owners`` and ``viewers``. It need not exist.
    warn : callable
        Told, once for each state of a file, why it is skipped.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object]) -> None:
        self.folder = folder
        self._warn = warn
        self._cache: dict[str, tuple[tuple[int, ...], Client | None]] = {}
        self._owners: dict[bytes, Path] = {}  # where the certificate of each was seen
        self._warned: set[str] = set()

    def check(self) -> None:
        """Make sure that nobody but this user and root can add a client.

        Raises
        ------
        CurveKernelError
            For a folder or a certificate that another user may write, or that can't be read.
        """
        if is_out_of_reach(self.folder):
            self._warn(f"nobody is listed: {self.folder} is in a folder of another user's")
        folders = [self.folder, *(self.folder / name for name in ROLES.values())]
        for folder in folders:
            if _exists(folder) and (problem := _problem(folder)):
                raise problem
        for folder in folders[1:]:
            for certificate in _certificates(folder) if _exists(folder) else ():
                if problem := _problem(certificate):
                    raise problem

    def find(self, public_key: bytes) -> Client | None:
        """Return the client that has *public_key*, 40 bytes of Z85; an owner before a viewer.

        An owner is looked for where its certificate was before, and everybody else in all of them.
        """
        return self._known_owner(public_key) or next(
            (client for client in self if client.public_key == public_key), None
        )

    def _known_owner(self, public_key: bytes) -> Client | None:
        path = self._owners.get(public_key)
        if path is None or any(_problem(folder) for folder in (self.folder, path.parent)):
            return None
        try:
            client = self._load("owner", path, path.stat())
        except OSError:
            client = None
        if client is None or client.public_key != public_key:
            del self._owners[public_key]
            return None
        return client

    def __iter__(self) -> Iterator[Client]:
        """Yield every client, owners first, each role by name."""
        if _exists(self.folder) and self._skip(_problem(self.folder)):
            return
        for role, name in ROLES.items():
            folder = self.folder / name
            if _exists(folder) and not self._skip(_problem(folder)):
                yield from self._read(role, folder)

    def _read(self, role: str, folder: Path) -> Iterator[Client]:
        try:
            entries = _certificates(folder)
        except CurveKernelError as error:
            self._skip(error)
            return
        for entry in entries:
            try:
                client = self._load(role, entry, entry.stat())
            except OSError as error:
                self._skip(_unreadable("certificate", entry.path, error))
                continue
            if client is not None:
                if role == "owner":
                    self._owners.setdefault(client.public_key, client.path)
                yield client

    def _load(self, role: str, entry: os.PathLike[str], status: os.stat_result) -> Client | None:
        name = os.fspath(entry)
        state = (
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_size,
            status.st_ino,
            status.st_mode,
            status.st_uid,
        )
        cached = self._cache.get(name)
        if cached is not None and cached[0] == state:
            return cached[1]
        path, client = Path(entry), None
        try:
            if problem := _problem(path):
                raise problem
            client = Client(path.stem, role, read_certificate(path)[0], path)
        except CurveKernelError as error:
            self._warned.discard(error.message)
            self._skip(error)
        self._cache[name] = (state, client)
        return client

    def _skip(self, problem: CurveKernelError | None) -> bool:
        if problem is None:
            return False
        if problem.message not in self._warned:
            self._warned.add(problem.message)
            self._warn(f"no client is authorized by what can't be trusted: {problem}")
        return True


def _exists(folder: Path) -> bool:
    """Whether there is anything, or it can't be told, of which `_problem` then says why."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return not is_out_of_reach(folder)
    return True


def _certificates(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with scandir(folder) as found:
            return sorted(
                (entry for entry in found if entry.name.endswith(".key")), key=lambda entry: entry.name
            )
    except OSError as error:
        raise _unreadable("folder", folder, error) from None


def _unreadable(kind: str, path: object, error: OSError) -> CurveKernelError:
    return CurveKernelError(f"{kind} {path} can't be read: {error.strerror}")


def _problem(file: Path | os.DirEntry[str]) -> CurveKernelError | None:
    path = os.fspath(file)
    try:
        status = file.stat()
    except OSError as error:
        return CurveKernelError(f"{path} can't be read: {error.strerror}")
    kind = "folder" if stat.S_ISDIR(status.st_mode) else "certificate"
    if status.st_mode & _OPEN_TO_OTHERS:
        return CurveKernelError(
            f"{kind} {path} can be written by others: its mode is {stat.S_IMODE(status.st_mode):04o}",
            f"look at what is in it, then: chmod go-w {shlex.quote(path)}",
        )
    if status.st_uid not in (0, geteuid()):
        return CurveKernelError(f"{kind} {path} belongs to another user")
    return None

"""The clients that may connect, listed by name: the folders ``owners`` and ``viewers``."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from time import CLOCK_BOOTTIME
from typing import NamedTuple

from .. import files, trust
from ..clock import clock_gettime, time
from ..errors import CurveKernelError, printable
from ..folders import is_out_of_reach
from ..keys import as_hex, parse_public
from ..keys.certificates import parse_certificate
from ..keys.expiry import parse_until
from ..private_os import os

__all__ = ["MANAGER", "OWN_CLIENT", "ROLES", "AuthorizedClients", "Client", "check_name", "owner_keys"]

ROLES = {"owner": "owners", "viewer": "viewers"}
"""Role to the name of its folder."""

MANAGER = "manager"
"""The name of the client that holds the kernel's own secret key."""

OWN_CLIENT = "kernel"
"""The name of the client inside the kernel, its debugger."""

_NAME = re.compile(r"[\w][\w.@+-]{0,63}", re.ASCII)


def check_name(name: str) -> str:
    """Return *name* if it can be a client's name.

    Raises
    ------
    CurveKernelError
        If it can't be the name of a file and of a line in a log, or is the manager's.
    """
    if not _NAME.fullmatch(name) or _is_reserved(name):
        raise CurveKernelError(
            f"{name!r} can't be the name of a client",
            "use up to 64 letters, digits and . _ @ + - with a letter or digit first, not"
            f" {MANAGER} or {OWN_CLIENT}",
        )
    return name


def owner_keys(given: Iterable[str]) -> list[bytes]:
    """Return the public keys that are given in hexadecimal or Z85; a comma may stand between two.

    Raises
    ------
    CurveKernelError
        If there is something else.
    """
    words = [word for words in given for word in words.split(",")]
    return [parse_public(word, "a public key in owner_keys") for word in words]


def _is_reserved(name: str) -> bool:
    return name.casefold() in (MANAGER, OWN_CLIENT)


class Client(NamedTuple):
    """A client that is listed by name; ``path`` is where, or empty."""

    name: str
    role: str
    public_key: bytes
    path: str
    until: datetime | None = None


class AuthorizedClients:
    """The clients listed in a folder, as they are at the moment of asking.

    Parameters
    ----------
    folder : Path
        The folder that holds ``owners`` and ``viewers``. It need not exist.
    warn : callable
        Told, once for each state of a file, why it is skipped.
    owner_keys : iterable of bytes
        Public keys that are owners too, as long as this object lives.
    """

    def __init__(
        self, folder: Path, warn: Callable[[str], object], owner_keys: Iterable[bytes] = ()
    ) -> None:
        self.folder = folder
        self._owner_keys = {
            key: Client(f"key-{as_hex(key)[:8]}", "owner", key, "") for key in owner_keys
        }
        self._warn = warn
        self._cache: dict[str, tuple[tuple[int, ...], Client | None]] = {}
        self._owners: dict[bytes, str] = {}  # where the certificate of each was seen
        self._warned: set[str] = set()
        # When an access ends, on the clock that nobody sets and that goes on in a suspended machine.
        self._ends: dict[tuple[bytes, datetime], float] = {}

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
            if _exists(folder) and (problem := trust.path_problem("folder", folder)):
                raise problem
        for folder in folders[1:]:
            for certificate in _certificates(folder) if _exists(folder) else ():
                if problem := _problem(certificate):
                    raise problem

    def find(self, public_key: bytes) -> Client | None:
        """Return the client that has *public_key*, 40 bytes of Z85; an owner before a viewer.

        An owner is looked for where its certificate was before, and everybody else in all of them. A
        client whose time is up is returned only if no other certificate lists its key.
        """
        if (owner := self._known_owner(public_key)) is not None:
            return owner
        clients = [client for client in self if client.public_key == public_key]
        client = next((client for client in clients if not self.has_ended(client)), None) or next(
            iter(clients), None
        )
        if client is None or client.role != "owner" or self.has_ended(client):
            return self._owner_keys.get(public_key, client)
        return client

    def listed(self) -> dict[bytes, tuple[Client, bool]]:
        """Return by public key the client that `find` returns, and whether its time is up."""
        listed: dict[bytes, tuple[Client, bool]] = {}
        for client in self:
            known, ended = listed.get(client.public_key), self.has_ended(client)
            if known is None or (known[1] and not ended):
                listed[client.public_key] = client, ended
        for key, owner in self._owner_keys.items():
            known = listed.get(key)
            if known is None or known[1] or known[0].role != "owner":
                listed[key] = owner, False
        return listed

    def has_ended(self, client: Client) -> bool:
        """Whether the time of *client* is up.

        It is up at the earliest moment that any look at both clocks gave: a clock that is set back
        lengthens no access of a kernel that runs.
        """
        return client.until is not None and self.seconds_left(client) <= 0

    def seconds_left(self, client: Client) -> float:
        """Return the seconds until the time of a client with an end is up."""
        assert client.until is not None
        key, now = (client.public_key, client.until), clock_gettime(CLOCK_BOOTTIME)
        end = now + client.until.timestamp() - time()
        self._ends[key] = min(self._ends.get(key, end), end)
        return self._ends[key] - now

    def _known_owner(self, public_key: bytes) -> Client | None:
        path = self._owners.get(public_key)
        if path is None or trust.path_problem("folder", os.path.dirname(path)):
            return None
        try:
            client = self._load("owner", path)
        except OSError:
            client = None
        if client is None or client.public_key != public_key or self.has_ended(client):
            del self._owners[public_key]
            return None
        return client

    def __iter__(self) -> Iterator[Client]:
        """Yield every client, owners first, each role by name."""
        if _exists(self.folder) and self._skip(trust.path_problem("folder", self.folder)):
            return
        for role, name in ROLES.items():
            folder = self.folder / name
            if _exists(folder) and not self._skip(trust.path_problem("folder", folder)):
                yield from self._read(role, folder)

    def _read(self, role: str, folder: Path) -> Iterator[Client]:
        try:
            entries = _certificates(folder)
        except CurveKernelError as error:
            self._skip(error)
            return
        for entry in entries:
            try:
                client = self._load(role, entry)
            except OSError as error:
                self._skip(_unreadable("certificate", entry, error))
                continue
            if client is not None:
                if role == "owner":
                    self._owners.setdefault(client.public_key, entry)
                yield client

    def _load(self, role: str, path: str) -> Client | None:
        status, target = os.lstat(path), path
        if stat.S_ISLNK(status.st_mode):
            # Where it leads may be changed by others at any time.
            if self._skip(trust.path_problem("certificate", path)):
                return None
            target = os.path.realpath(path)
            status = os.lstat(target)
        cached = self._cache.get(path)
        if cached is not None and cached[0] == _state(status):
            return cached[1]
        client = None
        try:
            content, status = files.read(target, follow=False)
            # Its folder was looked at before, and nobody else can put another file there.
            if problem := trust.certificate_problem(path, status):
                raise problem
            name = os.path.splitext(os.path.basename(path))[0]
            if _is_reserved(name):
                raise CurveKernelError(f"certificate {path} has a name that no client can have")
            public_key, _ = parse_certificate(content, path)
            end = parse_until(content, path)
            client = Client(printable(name), role, public_key, path, end)
        except CurveKernelError as error:
            self._warned.discard(error.message)
            self._skip(error)
        self._cache[path] = (_state(status), client)
        return client

    def _skip(self, problem: CurveKernelError | None) -> bool:
        if problem is None:
            return False
        if problem.message not in self._warned:
            self._warned.add(problem.message)
            self._warn(printable(f"no client is authorized by what can't be trusted: {problem}"))
        return True


def _exists(folder: Path) -> bool:
    """Whether there is anything, or it can't be told, of which `trust.path_problem` then says why."""
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return not is_out_of_reach(folder)
    return True


def _certificates(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return sorted(entry.path for entry in found if entry.name.endswith(".key"))
    except OSError as error:
        raise _unreadable("folder", folder, error) from None


def _problem(certificate: str) -> CurveKernelError | None:
    """Return why a certificate can't be trusted, in a folder to which the way is known to be safe."""
    try:
        status = os.lstat(certificate)
    except OSError as error:
        return _unreadable("certificate", certificate, error)
    if stat.S_ISLNK(status.st_mode):
        return trust.path_problem("certificate", certificate)
    return trust.certificate_problem(certificate, status)


def _state(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes if a file does, or the file's rights."""
    return (
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_size,
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_uid,
    )


def _unreadable(kind: str, path: object, error: OSError) -> CurveKernelError:
    return CurveKernelError(f"{kind} {path} can't be read: {error.strerror}")

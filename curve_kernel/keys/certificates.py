"""Key files: this user's own key pair, and the clients that may connect.

They live in the folder ``curve`` of Jupyter's configuration folder, in pyzmq's certificate format::

    identity.key         this user's client public key
    identity.key_secret  the secret key that belongs to it, mode 0600
    owners/NAME.key      clients that may use every channel
    viewers/NAME.key     clients that may use iopub and hb only

The folder is the role: ``ls`` shows the role of each client.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from .. import files, trust
from ..errors import CurveKernelError
from ..folders import NOWHERE, NoFolderError, config_folder
from .pair import KeyPair, parse

__all__ = [
    "curve_folder",
    "load_identity",
    "make_folder",
    "parse_certificate",
    "read_certificate",
    "read_content",
    "write_certificate",
]


_FORM = "a certificate is a file that `python -m curve_kernel keygen` or pyzmq's zmq.auth writes"


def curve_folder(warn: Callable[[str], object] | None = None) -> Path:
    """Return the folder of this user's key files, which need not exist.

    Parameters
    ----------
    warn : callable, optional
        Told why nobody is listed, where there is no configuration folder; it then is one that can't
        exist.

    Raises
    ------
    NoFolderError
        If there is no configuration folder, and nobody to tell.
    """
    try:
        return config_folder() / "curve"
    except NoFolderError as error:
        if warn is None:
            raise
        warn(f"Nobody is listed: {error.message}")
        return Path(NOWHERE)


def make_folder(folder: Path) -> None:
    """Make *folder* and its parents, with mode 0700 where they are new."""
    for path in [*reversed(folder.parents), folder]:
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def read_certificate(path: Path) -> tuple[bytes, bytes | None]:
    """Return public key and secret key, if it has one, of the certificate file at *path*.

    Raises
    ------
    CurveKernelError
        If it can't be read or holds no key. The message never quotes the file.
    """
    return parse_certificate(read_content(path), str(path))


def read_content(path: Path) -> bytes:
    """Return what is in the certificate file at *path*.

    Raises
    ------
    CurveKernelError
        If it can't be read.
    """
    try:
        return files.read(path)[0]
    except OSError as error:
        raise CurveKernelError(f"certificate {path} can't be read: {error.strerror}", _FORM) from None


def parse_certificate(content: bytes, name: str) -> tuple[bytes, bytes | None]:
    """Return public key and secret key, if it has one, of a certificate, as pyzmq reads it.

    Parameters
    ----------
    content : bytes
        What is in the file.
    name : str
        What it is called, for messages, which never quote it.

    Raises
    ------
    CurveKernelError
        If it holds no public key, or a key that is malformed or not of the pair.
    """
    found: dict[bytes, bytes] = {}
    for line in content.split(b"\n"):
        if b"-key" not in line:
            continue
        field, _, value = line.strip().partition(b"=")
        for key in (b"public-key", b"secret-key"):
            if field.startswith(key):
                if key in found:
                    raise CurveKernelError(
                        f"certificate {name} has two lines with {key.decode()}",
                        "leave only one of them, or get a new certificate",
                    )
                found[key] = value.strip(b" \t'\"")
    if b"public-key" not in found:
        raise CurveKernelError(f"certificate {name} holds no public key", _FORM)
    public_key = parse(found[b"public-key"], f"public-key in certificate {name}")
    if b"secret-key" not in found:
        return public_key, None
    secret_key = parse(found[b"secret-key"], f"secret-key in certificate {name}")
    if KeyPair.from_secret(secret_key).public_key != public_key:
        raise CurveKernelError(f"the two keys in certificate {name} are not a pair", _FORM)
    return public_key, secret_key


def write_certificate(
    path: Path,
    public_key: bytes,
    secret_key: bytes | None = None,
    until: datetime | None = None,
    *,
    new: bool = False,
) -> None:
    """Write a certificate in pyzmq's format, atomically, with mode 0600 if it holds a secret key.

    Parameters
    ----------
    path : Path
        The file, in a folder that exists.
    public_key, secret_key : bytes
        The keys, 40 bytes of Z85 each.
    until : datetime, optional
        When the client's access ends, with a time zone.
    new : bool
        That there must be no such file yet.

    Raises
    ------
    OSError
        If the folder can't be written, or there is a file that was to be new.
    """
    kind = "Public" if secret_key is None else "**Secret**"
    lines = [f"#   ZeroMQ CURVE {kind} Certificate, written by curve_kernel"]
    if secret_key is not None:
        lines.append("#   DO NOT PROVIDE THIS FILE TO OTHER USERS nor change its permissions.")
    lines += ["", "metadata"]
    if until is not None:
        lines.append(f'    until = "{until.isoformat(timespec="seconds")}"')
    lines += ["curve", f'    public-key = "{public_key.decode()}"']
    if secret_key is not None:
        lines.append(f'    secret-key = "{secret_key.decode()}"')
    mode = 0o644 if secret_key is None else 0o600
    files.replace(path, ("\n".join(lines) + "\n").encode(), mode, new=new)


def load_identity(folder: Path | None = None) -> KeyPair | None:
    """Return this user's client key pair, or None if it has not been made yet.

    Raises
    ------
    CurveKernelError
        If the file can't be read or trusted, has not both keys, or can be read by others.
    """
    try:
        path = (folder or curve_folder()) / "identity.key_secret"
    except NoFolderError:
        return None
    if not os.path.lexists(path):
        return None
    try:
        content, status = files.read(path)
    except OSError as error:
        raise CurveKernelError(f"certificate {path} can't be read: {error.strerror}", _FORM) from None
    public_key, secret_key = parse_certificate(content, str(path))
    if secret_key is None:
        raise CurveKernelError(
            f"certificate {path} holds no secret key",
            "make a new identity: python -m curve_kernel keygen --force",
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 and not files.insecure_writes_are_allowed(path, mode):
        raise CurveKernelError(
            f"certificate {path} can be read or written by others: its mode is {mode:04o}, not 0600",
            "others may have your key, so make a new one: python -m curve_kernel keygen --force",
        )
    if problem := trust.file_problem("certificate", str(path), status):
        raise problem
    return KeyPair(public_key, secret_key)

"""``keygen``, ``authorize``, ``revoke``, ``clients``: which clients may connect."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import shlex
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from .. import trust
from ..access.allowlist import ROLES, AuthorizedClients, check_name
from ..errors import CurveKernelError, printable
from ..keys import KeyPair, require_curve
from ..keys.certificates import (
    curve_folder,
    load_identity,
    make_folder,
    parse_certificate,
    read_certificate,
    write_certificate,
)
from ..keys.expiry import ago_or_in, show
from ..receipts import receipts
from . import Command
from .ends import add_end_arguments, end_of

__all__ = [
    "AuthorizeApp",
    "ClientsApp",
    "KeygenApp",
    "RevokeApp",
    "add_role_argument",
    "check_client",
    "list_client",
    "make_identity",
    "public_certificate",
]

_OUT = "Your kernels that run disconnect that key within two seconds; no restart is needed."


def make_identity(*, force: bool = False) -> KeyPair:
    """Make this user's client key pair, and list it as an owner.

    Parameters
    ----------
    force : bool
        Replace a pair that exists.

    Returns
    -------
    KeyPair

    Raises
    ------
    CurveKernelError
        If there is a pair already, or the folder can't be written.
    """
    require_curve()
    folder = curve_folder()
    path = folder / "identity.key_secret"
    owner = folder / ROLES["owner"] / f"{_own_name()}.key"
    there_is_one = CurveKernelError(
        f"you have a key pair already: {path}",
        "use it, or replace it with --force; then others must authorize the new key",
    )
    if not force and os.path.lexists(path):
        raise there_is_one
    if not force and os.path.lexists(owner):
        raise CurveKernelError(
            f"an owner has your name already: {owner}",
            f"look at its key, and revoke {_own_name()}, or: python -m curve_kernel keygen --force",
        )
    pair = KeyPair.generate()
    try:
        _make_trusted(owner.parent)
        try:
            # Of two that make one at the same time, the second ends here.
            write_certificate(path, pair.public_key, pair.secret_key, new=not force)
        except FileExistsError:
            raise there_is_one from None
        write_certificate(folder / "identity.key", pair.public_key)
        write_certificate(owner, pair.public_key)
    except OSError as error:
        raise _not_written(error) from None
    return pair


def _make_trusted(folder: Path) -> None:
    """Make a role's folder, where the certificates in it count."""
    make_folder(folder)
    if problem := trust.path_problem("folder", folder):
        raise problem


def _own_name() -> str:
    try:
        return check_name(getpass.getuser())
    except (CurveKernelError, KeyError, OSError):
        return "me"


def _not_written(error: OSError) -> CurveKernelError:
    return CurveKernelError(
        f"{error.filename or curve_folder()} can't be written: {error.strerror}",
        "make Jupyter's configuration folder yours, or set JUPYTER_CONFIG_DIR to one you can write;"
        " `jupyter --paths` shows where it is",
    )


def _files_of(name: str) -> list[Path]:
    """Return the certificates of the client *name*; what can't be typed goes by what is shown."""
    paths: list[Path] = []
    for role in ROLES.values():
        folder = curve_folder() / role
        try:
            paths += (path for path in folder.iterdir() if path.suffix == ".key")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise CurveKernelError(
                f"the list of clients can't be read: {folder}: {error.strerror}",
                "make Jupyter's configuration folder yours; `jupyter --paths` shows where it is",
            ) from None
    exact = [path for path in paths if path.stem == name]
    return exact or [path for path in paths if printable(path.stem) == name]


class KeygenApp(Command):
    """Makes this user's client key pair."""

    name = "keygen"
    summary = "Make your own client key pair, and list it as an owner of your kernels."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add --force."""
        parser.add_argument("--force", action="store_true", help="replace the pair that you have")

    def run(self, options: argparse.Namespace) -> None:
        """Make the pair, and say where it is."""
        old_keys = _old_keys()
        replaced = bool(old_keys) or os.path.lexists(curve_folder() / "identity.key_secret")
        if options.force:
            # First, or a run that fails would leave a key on the list that the next one does not know.
            require_curve()
            _take_off_old(old_keys)
        make_identity(force=options.force)
        if not options.force:
            _take_off_old(old_keys)
        print(f"Your key pair is made, and you are an owner of your kernels as {_own_name()}.")  # noqa: T201
        certificate = shlex.quote(str(curve_folder() / "identity.key"))
        if not replaced:
            print(f"Give others your public certificate: {certificate}")  # noqa: T201
            print(_OTHER_LISTS.format(curve_folder()))  # noqa: T201
            return
        print(_OUT if old_keys else _OLD_KEY_IS_NOT_KNOWN)  # noqa: T201
        print(_FAR_KERNELS)  # noqa: T201
        print(  # noqa: T201
            "Others who listed your old key still accept it. Ask them to replace it, with\n"
            "  python -m curve_kernel authorize identity.key --name NAME --role ROLE --force\n"
            f"and give them your public certificate: {certificate}"
        )


_OTHER_LISTS = (
    "A kernel that another JUPYTER_CONFIG_DIR was set for reads another list than that in\n  {}\n"
    "and `%curve` in it shows where."
)
_FAR_KERNELS = (
    "Kernels that you started from here on other machines (`install --ssh`, `install --slurm`) accept\n"
    "the old key until you restart them or shut them down."
)
_OLD_KEY_IS_NOT_KNOWN = (
    "Your old key can't be read, so it may be listed under another name: python -m curve_kernel clients"
)


def _old_keys() -> list[bytes]:
    """Return this user's public key, as far as it can be read in its places."""
    found: dict[bytes, None] = {}
    for name in ("identity.key_secret", "identity.key"):
        with contextlib.suppress(CurveKernelError):
            found[read_certificate(curve_folder() / name)[0]] = None
    return list(found)


def _take_off(public_key: bytes) -> Iterator[str]:
    """Take a key off the list, whatever name it has there, and say so."""
    for client in list(AuthorizedClients(curve_folder(), lambda _: None)):
        if client.public_key == public_key:
            try:
                Path(client.path).unlink()
            except OSError as error:
                raise _not_written(error) from None
            yield f"It was listed as {client.role} {client.name} too, and is not any more."


def _take_off_old(keys: list[bytes]) -> None:
    for key in keys:
        off = "Your old key is off your list, and your kernels reject it from now on:"
        print(*_take_off(key), f"{off} {key.decode()}", sep="\n", flush=True)  # noqa: T201


def add_role_argument(parser: argparse.ArgumentParser) -> None:
    """Add --role."""
    parser.add_argument(
        "--role",
        choices=list(ROLES),
        default="viewer",
        help="owner: every channel; viewer (the default): sees inputs and outputs, can't run code",
    )


class AuthorizeApp(Command):
    """Lists a client."""

    name = "authorize"
    summary = """List a client by its public certificate, so that it may connect to your kernels. Takes
        effect at once, with no restart: a client that gets another role, or an end, is held to it."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the certificate, the name and the role."""
        parser.add_argument(
            "certificate",
            metavar="CERTIFICATE",
            help="the client's identity.key, or - for standard input",
        )
        parser.add_argument(
            "--name", required=True, help="what to call the client, here and in the log"
        )
        add_role_argument(parser)
        add_end_arguments(parser)
        parser.add_argument("--force", action="store_true", help="replace a client of that name")

    def run(self, options: argparse.Namespace) -> None:
        """Write the certificate into the role's folder."""
        name, end = check_name(options.name), end_of(options)
        public_key = public_certificate(options.certificate)
        target = list_client(name, options.role, public_key, until=end, force=options.force)
        print(f"{name} is {options.role} of your kernels now: {shlex.quote(str(target))}")  # noqa: T201
        if end is not None:
            moment = f"{end.astimezone():%Y-%m-%d %H:%M:%S %Z}"
            print(f"The access ends by itself at {moment}, {ago_or_in(end)}.")  # noqa: T201


def public_certificate(certificate: str) -> bytes:
    """Return the public key of a certificate file, or of standard input for ``-``.

    Raises
    ------
    CurveKernelError
        If it can't be read, or holds a secret key.
    """
    if certificate == "-":
        try:
            content = sys.stdin.buffer.read(1 << 16) if sys.stdin else b""  # closed, it is None
        except OSError as error:
            raise CurveKernelError(f"standard input can't be read: {error.strerror}") from None
        public_key, secret_key = parse_certificate(content, "on standard input")
    else:
        public_key, secret_key = read_certificate(Path(certificate))
    if secret_key is not None:
        raise CurveKernelError(
            f"certificate {certificate} holds a secret key, which must stay with its owner",
            "take the public certificate beside it: identity.key",
        )
    return public_key


def check_client(name: str, public_key: bytes, *, force: bool = False) -> list[Path]:
    """Make sure that a client may be listed, and return the certificates that there are of its name.

    Raises
    ------
    CurveKernelError
        If another client has the name, unless *force* is true, or the key is listed under another one.
    """
    existing = _files_of(name)
    if existing and not force and not _same(existing, public_key):
        raise CurveKernelError(
            f"there is another client {name} already: {existing[0]}",
            "choose another --name, or replace it with --force",
        )
    listed = AuthorizedClients(curve_folder(), lambda _: None).find(public_key)
    if listed is not None and listed.name != name:
        raise CurveKernelError(
            f"that key is listed already, as {listed.role} {listed.name}",
            f"use that name, or: python -m curve_kernel revoke {listed.name}",
        )
    return existing


def list_client(
    name: str,
    role: str,
    public_key: bytes,
    *,
    until: datetime | None,
    force: bool = False,
) -> Path:
    """List a client, and return its certificate's path.

    Raises
    ------
    CurveKernelError
        As `check_client`, or if that can't be written.
    """
    existing, folder = check_client(name, public_key, force=force), curve_folder()
    target = folder / ROLES[role] / f"{name}.key"
    try:
        _make_trusted(target.parent)
        write_certificate(target, public_key, until=until)
        # A change of role: always listed in a folder, and only for this instant in both.
        for path in existing:
            if path != target:
                path.unlink()
    except OSError as error:
        raise _not_written(error) from None
    why: list[str] = []
    if AuthorizedClients(folder, why.append).find(public_key) is None:
        raise CurveKernelError(f"{target} is written, and does not count: {'; '.join(why)}")
    return target


def _same(existing: list[Path], public_key: bytes) -> bool:
    try:
        return all(read_certificate(path)[0] == public_key for path in existing)
    except CurveKernelError:
        return False


class RevokeApp(Command):
    """Takes a client off the list."""

    name = "revoke"
    summary = """Take a client off the list. It can't connect any more, and every kernel of yours that
        runs disconnects it within two seconds, with no restart."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the name."""
        parser.add_argument("client", metavar="NAME", help="as `clients` shows it")

    def run(self, options: argparse.Namespace) -> None:
        """Remove the certificate."""
        name = options.client
        paths = _files_of(name)
        if not paths:
            raise CurveKernelError(
                f"there is no client {name!r}", "see the list: python -m curve_kernel clients"
            )
        revoked: dict[bytes, None] = {}
        lines = []
        for path in paths:
            try:
                revoked[read_certificate(path)[0]] = None
            except CurveKernelError:
                lines.append("Its certificate can't be read, so its key may have another name here.")
        with receipts(curve_folder()) as told:
            try:
                for path in paths:
                    path.unlink()
            except OSError as error:
                raise _not_written(error) from None
            for key in revoked:
                lines += _take_off(key)
            ended = told.collect()
        print(*lines, f"{printable(name)} can't connect any more. {_OUT}", sep="\n")  # noqa: T201
        for kernel, count in sorted(ended.items()):
            what = "1 connection is" if count == 1 else f"{count} connections are"
            print(f"{what} ended: {kernel}")  # noqa: T201


class ClientsApp(Command):
    """Shows which clients may connect."""

    name = "clients"
    summary = "Show which clients may connect to your kernels, and as what."

    def run(self, options: argparse.Namespace) -> None:  # noqa: ARG002
        """Print one line for each client."""
        own = load_identity()
        clients = list(AuthorizedClients(curve_folder(), lambda text: print(text, file=sys.stderr)))  # noqa: T201
        width = max((len(client.name) for client in clients), default=0)
        for client in clients:
            you = "  (you)" if own and client.public_key == own.public_key else ""
            end = f"  {show(client.until)}" if client.until else ""
            key = client.public_key.decode()
            print(f"{client.name:<{width}}  {client.role:<6}  {key}{end}{you}")  # noqa: T201
        if not clients:
            print("Nobody is listed: only their own managers can connect to your kernels.")  # noqa: T201

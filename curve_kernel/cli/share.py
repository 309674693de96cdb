"""``share``: list a client, and print the connection file to hand over."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import ipaddress
import json
import os
import secrets
import shlex
import signal
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import psutil
from jupyter_client.connect import port_names

from .. import connection_file, files, keys
from ..access.allowlist import ROLES, check_name
from ..client import BlockingKernelClient, KeyNotAuthorizedError, NobodyThereError
from ..errors import CurveKernelError
from ..keys import KeyPair
from ..keys.certificates import curve_folder
from ..keys.expiry import after, show
from ..keys.ticket import shared, ticket_pair
from . import Command
from .clients import add_role_argument, check_client, list_client, public_certificate
from .ends import add_end_arguments, end_of
from .existing import find

__all__ = ["ShareApp"]

_EVERYWHERE = ("", "*", "0.0.0.0")  # noqa: S104
_FIELDS = (
    "kernel_name",
    "hostname",
    "transport",
    "ip",
    *port_names,
    "key",
    "signature_scheme",
    "curve_publickey",
)
_LOCAL = "a person on this machine needs: --ip 127.0.0.1"


class ShareApp(Command):
    """Lists a client, and prints what to hand over."""

    name = "share"
    summary = """Share a running kernel: list a client by its public certificate, and print the
        connection file to hand over, which holds no secret key. With --ticket the client's key pair is
        made here and goes into the file: whoever has the file has the access, until it ends."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the certificate, the name, the role, the end, the kernel and its address."""
        parser.add_argument(
            "certificate",
            metavar="CERTIFICATE",
            nargs="?",
            help="the client's identity.key, or - for standard input",
        )
        parser.add_argument(
            "--ticket", action="store_true", help="for somebody who has no key pair; needs an end"
        )
        parser.add_argument("--name", help="what to call the client, here and in the log")
        add_role_argument(parser)
        add_end_arguments(parser)
        parser.add_argument(
            "--existing",
            metavar="FILE",
            help="the kernel's connection file, its name or a part of it; by default the latest",
        )
        parser.add_argument(
            "--ip", metavar="ADDRESS", help="the address by which the kernel is reached from there"
        )
        parser.add_argument("--force", action="store_true", help="replace a client of that name")

    def run(self, options: argparse.Namespace) -> None:
        """List the client, and print the file; what to know is on standard error."""
        keys.require_curve()
        if sys.stdout is None:
            raise CurveKernelError("there is no standard output to print the file to", "add > FILE")
        if options.ticket:
            _protect_output()
        name, public_key, pair = _client(options)
        end = end_of(options)
        if options.ticket and end is None:
            raise CurveKernelError(
                "a ticket needs an end, since whoever has the file has the access", "add --for 1h"
            )
        path = find(options.existing)
        info = connection_file.read(path)
        if ticket_pair(info) is not None or "shared" in info:
            raise CurveKernelError(
                f"{path} was shared by the kernel's user, who alone can list clients",
                "name the kernel's own connection file",
            )
        info = {field: info[field] for field in _FIELDS if field in info}
        hostname = str(info.pop("hostname", socket.gethostname()))
        info["ip"], note = _address(info, options.ip, path, hostname)
        _check_kernel(info, path)
        _check_list(info, path)
        check_client(name, public_key, force=options.force)
        info |= shared(name, options.role, end, pair)
        # First: a file that can't be written gives nobody access.
        print(json.dumps(info, indent=1), flush=True)  # noqa: T201
        list_client(name, options.role, public_key, until=end, force=options.force)
        for line in _remarks(name, options.role, end, pair, note):
            print(f"curve_kernel: {line}", file=sys.stderr)  # noqa: T201


def _client(options: argparse.Namespace) -> tuple[str, bytes, KeyPair | None]:
    """Return the client's name and public key, and the whole pair for a ticket."""
    if options.ticket and options.certificate:
        raise CurveKernelError(
            "a ticket brings a key pair of its own, and a certificate is given too",
            "leave out one of CERTIFICATE and --ticket",
        )
    if options.ticket:
        pair = KeyPair.generate()
        return check_name(options.name or f"ticket-{secrets.token_hex(3)}"), pair.public_key, pair
    if not options.certificate:
        raise CurveKernelError(
            "whom to share with is not said",
            "give their identity.key, which `python -m curve_kernel keygen` makes, or --ticket",
        )
    if not options.name:
        raise CurveKernelError("the client needs a name", "add --name NAME")
    return check_name(options.name), public_certificate(options.certificate), None


def _address(info: Mapping[str, Any], given: str | None, path: str, hostname: str) -> tuple[str, str]:
    """Return the address by which others reach the kernel, and what to say of it."""
    listens = str(info.get("ip") or "")
    if info.get("transport", "tcp") != "tcp":
        raise CurveKernelError(
            "the kernel listens on files (ipc), which other users and machines do not reach",
            "start it with --transport=tcp",
        )
    if given is not None:
        return _checked(given), ""
    if listens in _EVERYWHERE:
        if hostname != socket.gethostname():
            raise CurveKernelError(
                f"{path} is of another machine, and the kernel listens on all its addresses",
                f"say by which it is reached: --ip ADDRESS, or run this on {hostname}",
            )
        return _own_address()
    if _is_loopback(listens):
        if _is_for_this_machine(listens):
            return listens, ""
        raise CurveKernelError(
            f"the kernel listens on this machine only, at {listens}: for whom is it?",
            f"{_LOCAL}; for others start the kernel with --ip=ADDRESS or, if they may log in here,"
            f" let them use: console --ssh {socket.gethostname()}",
        )
    return listens, ""


def _is_for_this_machine(listens: str) -> bool:
    """Ask, if there is somebody to ask."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    question = f"The kernel listens on this machine only, at {listens}. Is it for a person here? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)  # noqa: T201
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _checked(address: str) -> str:
    problem = "is no address to connect to" if address in _EVERYWHERE else ""
    try:
        socket.getaddrinfo(address, None, socket.AF_INET)
    except (OSError, UnicodeError):
        problem = "is no address or name of a machine that is known here"
    if problem:
        raise CurveKernelError(f"{address!r} {problem}", "give --ip one like 10.0.0.5")
    return address


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _own_address() -> tuple[str, str]:
    """Return the address of this machine that others most likely reach."""
    # An address with a label, eth0:1 say, is its interface's, of which alone there are statistics.
    stats = psutil.net_if_stats()
    up = {name for name, found in stats.items() if found.isup}
    own = sorted(
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
        and not _is_loopback(address.address)
        and name.partition(":")[0] in up
    )
    if not own:
        raise CurveKernelError(
            "the kernel listens on all addresses, and this machine has none that others reach", _LOCAL
        )
    chosen = own[0]
    if len(own) > 1:
        # Nothing is sent: connecting a datagram socket only looks the route up.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # of a network for documentation
                chosen = probe.getsockname()[0]
            except OSError:
                chosen = ""
        if chosen not in own:
            raise CurveKernelError(
                f"the kernel listens on all addresses of this machine: {', '.join(own)}",
                "say by which it is reached from there: --ip ADDRESS",
            )
    others = [address for address in own if address != chosen]
    note = f"the kernel's address for others is taken to be {chosen}"
    return chosen, note + (f"; else give --ip, of {', '.join(others)}" if others else "")


def _check_kernel(info: Mapping[str, Any], path: str) -> None:
    """Make sure that the kernel runs, has that key, and accepts nobody who is not listed."""
    try:
        accepted = _is_accepted(info, KeyPair.generate())
    except NobodyThereError as error:
        raise CurveKernelError(
            f"{error.message}, as {path} has it",
            "see whether the kernel still runs, and whether --ip is an address it listens on",
        ) from None
    if accepted:
        raise CurveKernelError(
            "the kernel accepts anybody with the connection file, as its client_authorization is any",
            "start it with --allowlist: then roles and ends mean something",
        )


def _check_list(info: Mapping[str, Any], path: str) -> None:
    """Make sure that the kernel accepts whom this user lists, by listing a key of a moment."""
    pair = KeyPair.generate()
    name, end = f"share-{secrets.token_hex(4)}", after("1min")
    listed = curve_folder() / ROLES["viewer"] / f"{name}.key"
    with _ended_by_an_exception():
        try:
            list_client(name, "viewer", pair.public_key, until=end)
            accepted = _is_accepted(info, pair)
        finally:
            listed.unlink(missing_ok=True)
    if not accepted:
        raise CurveKernelError(
            f"the kernel of {path} does not use the list of clients in {listed.parent.parent}",
            "share it as the user who started it, with that user's configuration",
        )


@contextlib.contextmanager
def _ended_by_an_exception() -> Iterator[None]:
    """Let signals that end the process do so by an exception, so that it can tidy up."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    ending = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    for one in ending:
        signal.signal(one, leave)
    try:
        yield
    finally:
        for one in ending:
            signal.signal(one, signal.SIG_DFL)


def _is_accepted(info: Mapping[str, Any], pair: KeyPair) -> bool:
    client = BlockingKernelClient(client_keys=pair)
    client.load_connection_info(info)
    try:
        client.start_channels(shell=False, stdin=False, control=False, hb=False)
    except KeyNotAuthorizedError:
        return False
    finally:
        client.stop_channels()
    return True


def _protect_output() -> None:
    """Make sure that nobody else can read the file that a ticket goes into, nor has it open already.

    A shell makes the file with whatever mode the umask leaves, before this program starts.
    """
    if sys.stdout.isatty():
        raise CurveKernelError(
            "a ticket holds a secret key, which does not belong on a terminal",
            "write it into a file: > ticket.json",
        )
    output = sys.stdout.fileno()
    status = os.fstat(output)
    if not stat.S_ISREG(status.st_mode):
        return
    problem = ""
    if status.st_uid != os.geteuid():
        problem = "belongs to another user"
    elif status.st_nlink > 1:
        problem = "has another name too"
    else:
        files.set_mode(output, "the ticket's file", 0o600)
        if _is_open_elsewhere(output):
            problem = "is open in another program, which could read the secret key"
    if problem:
        raise CurveKernelError(
            f"the ticket's file {problem}",
            "write it into a new file: (umask 077; python -m curve_kernel share ... > ticket.json)",
        )


def _is_open_elsewhere(descriptor: int) -> bool:
    """Whether somebody else has a file open: one that has no other open descriptor can be leased."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # comes if the file is opened meanwhile
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN  # others say that a file system, NFS say, has no leases
    return False


def _remarks(name: str, role: str, end: Any, pair: KeyPair | None, note: str) -> list[str]:
    lines = [note] if note else []
    when = f" {show(end)}" if end is not None else ""
    if pair is not None:
        lines.append(f"whoever has this file has the access, as {role} {name},{when}: keep it 0600")
    else:
        lines.append(f"{name} is {role} of your kernels now{when}; the file holds no key of theirs")
    use = "watch FILE" if role == "viewer" else "console FILE, attach FILE or watch FILE"
    lines.append(f"they use it with: python -m curve_kernel {use}")
    lines.append(f"to end it: python -m curve_kernel revoke {shlex.quote(name)}")
    return lines

"""Connection files: read with errors for humans, changed atomically, never more open than 0600."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
from collections.abc import Iterable, Mapping
from json import JSONDecodeError, dumps, loads
from pathlib import Path
from typing import Any

from jupyter_client.connect import port_names
from traitlets.utils import filefind

from . import files, trust
from .errors import CurveKernelError, without_keys

__all__ = [
    "check",
    "check_address",
    "claim",
    "create_folder",
    "find",
    "is_from_kernel",
    "new_name",
    "origin",
    "read",
    "update",
    "write",
]


def read(path: str | os.PathLike[str], *, trusted: bool = True) -> dict[str, Any]:
    """Return the content of the connection file at *path*.

    Parameters
    ----------
    path : str or path
        The file.
    trusted : bool
        Whether keys or addresses in it are to be used: then nobody but this user and root may be
        able to write the file or its folder. Whoever can would lead this user to any kernel.

    Raises
    ------
    CurveKernelError
        If it can't be read, can't be trusted, or is not a JSON object.
    """
    hint = "name a connection file that a Jupyter launcher or a kernel wrote"
    name = f"connection file {os.fspath(path)}"
    try:
        text, status = files.read(path)
        if trusted and (problem := trust.file_problem("connection file", os.fspath(path), status)):
            raise problem
        content = loads(text)
    except OSError as error:
        can = "may not" if isinstance(error, PermissionError) else "can't"
        raise CurveKernelError(f"{name} {can} be read: {error.strerror}", hint) from None
    except (ValueError, RecursionError) as error:
        # The line only: some of the parser's messages quote the file.
        where = f", see line {error.lineno}" if isinstance(error, JSONDecodeError) else ""
        raise CurveKernelError(f"{name} is not JSON{where}", hint) from None
    if not isinstance(content, dict):
        raise CurveKernelError(f"{name} is JSON but not an object", hint)
    return content


def check_address(path: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
    """Make sure that a client can connect to what a connection file says, as far as it says something.

    Raises
    ------
    CurveKernelError
        If a field can't be an address's; the message does not quote it.
    """
    ip, transport = info.get("ip", ""), info.get("transport", "tcp")
    longest = max((len(str(info[name])) for name in port_names if name in info), default=0)
    if not isinstance(transport, str) or transport.lower() not in ("tcp", "ipc"):
        problem = "its transport is neither tcp nor ipc"
    elif not isinstance(ip, str) or without_keys(ip) != ip:
        problem = "its ip is no address"
    elif transport.lower() == "ipc":
        fits = ip and ip.isprintable() and len(ip.encode()) + longest < _LONGEST_PATH
        problem = "" if fits else "its ip is no path of a socket"
    else:
        problem = "" if _HOST.fullmatch(ip) else "its ip is no address"
    for name in port_names:
        port = info.get(name, 1)
        if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 1 << 16:
            problem = f"its {name} is no port"
    if problem:
        raise CurveKernelError(
            f"connection file {os.fspath(path)} is of no use: {problem}",
            "get the connection file that the kernel or its launcher wrote",
        )


# What libzmq takes: a name, an address, an interface. The port is part of a socket's path.
_HOST = re.compile(r"[0-9A-Za-z_.:%*\[\]-]{0,255}")
_LONGEST_PATH = 106


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Replace the connection file at *path* in one step, with mode 0600.

    Raises
    ------
    CurveKernelError
        If its folder can't be written.
    """
    try:
        files.replace(path, dumps(content, indent=1).encode())
    except OSError as error:
        raise _not_written(path, error) from None


def check(path: str | os.PathLike[str]) -> None:
    """Make sure that the connection file at *path* can be written, without writing it.

    Raises
    ------
    CurveKernelError
        If its folder can't be written, or the disk is full.
    """
    try:
        files.check(path)
    except OSError as error:
        raise _not_written(path, error) from None


def find(name: str, folder: str) -> str | None:
    """Return the path of the connection file *name*, here or in *folder*, or None if there is none.

    Raises
    ------
    CurveKernelError
        If what has that name is no file.
    """
    try:
        if os.path.lexists(name) and not Path(name).is_file():
            read(name)  # a folder or so is not passed over for another file
        return str(filefind(name, [".", folder]))
    except OSError:
        return None


def create_folder(path: str | os.PathLike[str]) -> None:
    """Make the folder for a new connection file at *path*, where there must be nothing yet.

    Raises
    ------
    CurveKernelError
        If it can't be made, others may write it, or *path* can't be the name of a file.
    """
    if os.path.lexists(path):
        read(path)
    try:
        Path(path).parent.mkdir(mode=0o700, exist_ok=True, parents=True)
        with contextlib.suppress(FileNotFoundError):
            Path(path).stat()  # its name may be too long
    except OSError as error:
        raise CurveKernelError(
            f"connection file {os.fspath(path)} can't be made: {error.strerror}",
            "name a connection file in a folder that you can write",
        ) from None
    if problem := trust.folder_problem("connection file", os.fspath(path)):
        raise problem


def _not_written(path: str | os.PathLike[str], error: OSError) -> CurveKernelError:
    return CurveKernelError(
        f"connection file {os.fspath(path)} can't be written: {error.strerror}",
        "put it into a folder that you can write, on a disk with room",
    )


def update(
    path: str | os.PathLike[str], changes: Mapping[str, Any], remove: Iterable[str] = ()
) -> None:
    """Change some fields of the connection file at *path* and keep all others.

    Does nothing where the content is the same already.

    Raises
    ------
    CurveKernelError
        As `read` and `write` do.
    """
    before = read(path)
    after = {field: value for field, value in before.items() if field not in set(remove)}
    after.update(changes)
    if after != before:
        write(path, after)


def origin() -> dict[str, Any]:
    """Return what a kernel writes into a file that it makes itself, and a launcher does not."""
    return {
        "kernel_name": "",
        "hostname": socket.gethostname(),
        "pid_namespace": _pid_namespace(),
    }


def _pid_namespace() -> str:
    """Say where this process's number is its own alone: every container has a process 1."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""


def new_name(folder: str) -> str:
    """Return the path of a new connection file in *folder*, named after this process.

    Upstream would take a file of that name which somebody left, here or in the runtime folder, and with
    it keys that somebody else knows. Such a file is removed, unless its kernel may be running: another
    container may have a process of this number.
    """
    for number in itertools.count(1):
        path = f"{folder}/kernel-{os.getpid()}{f'-{number}' if number > 1 else ''}.json"
        if not _may_be_running(path):
            with contextlib.suppress(OSError):
                Path(path).unlink()
        if not os.path.lexists(path):
            break
    return path


def claim(path: str) -> str:
    """Make an empty connection file at *path*, or at its next name if there is one by now; return it.

    Raises
    ------
    CurveKernelError
        If its folder can't be written.
    """
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            path = new_name(str(Path(path).parent))
        except OSError as error:
            raise _not_written(path, error) from None
        else:
            return path


def _may_be_running(path: str) -> bool:
    """Whether a kernel may be running that wrote the file at *path*, with this process's number."""
    try:
        info = read(path)
    except CurveKernelError:
        # Of another user, or empty since it has just been claimed.
        return not os.access(path, os.R_OK) or not Path(path).stat().st_size
    if not all(isinstance(info.get(name), int) and info[name] > 0 for name in port_names):
        return False
    return not _pid_namespace() or info.get("pid_namespace") != _pid_namespace()


def is_from_kernel(path: str | os.PathLike[str], info: Mapping[str, Any]) -> bool:
    """Whether a kernel of this user, on this machine, made the connection file at *path* itself.

    A launcher names the kernelspec in its file, or leaves the ports to the kernel. Its kernel may be
    starting, and its file is not to be replaced.
    """
    status = os.stat(path)  # noqa: PTH116
    return (
        status.st_uid == os.geteuid()
        and not status.st_mode & 0o077
        and not info.get("kernel_name")
        and info.get("hostname", socket.gethostname()) == socket.gethostname()
        and "curve_publickey" in info
        and "curve_secretkey" not in info
        and all(isinstance(info.get(name), int) and info[name] > 0 for name in port_names)
    )

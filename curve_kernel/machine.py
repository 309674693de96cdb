"""Every kernel on this machine, whoever's it is: for root, who sees the processes of all users."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.connect import port_names

from .errors import CurveKernelError
from .inspect import (
    KernelStatus,
    connections_here,
    listeners_of,
    look,
    port_or_path,
    read_kernel,
    user_name,
)

__all__ = ["inspect_machine"]

_MODULES = {"curve_kernel", "ipykernel", "ipykernel_launcher"}
_IPC = re.compile(r"/.*-\d+")
_FILES_LIMIT = 10.0  # seconds for one user's files
_NETWORK_LIMIT = 120.0
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET; os has setns from Python 3.12 on


@dataclass(frozen=True)
class _Process:
    pid: int
    uid: int
    gid: int
    words: list[str]
    files: list[str]
    """What its command line names and may be a connection file."""
    runtime: set[str]
    """The folders where connection files of its kernels would be."""
    network: str

    @property
    def user(self) -> str:
        """The name of its user."""
        return user_name(self.uid)

    @property
    def is_kernel(self) -> bool:
        """Whether its command line is that of a kernel."""
        named = any(Path(file).match("kernel-*.json") for file in self.files)
        return named or bool(_MODULES & set(self.words))


def inspect_machine() -> list[KernelStatus]:
    """Find every kernel that runs on this machine, and what its ports speak.

    A kernel is a process that listens on all ports of a connection file, which a command line names
    or which is in a runtime folder of a user who has a process; or a process with a kernel's command
    line whose file is gone or can't be read. Kernels in containers are reached in their own network.

    Raises
    ------
    CurveKernelError
        If the caller may not see the processes of all users.
    """
    if os.geteuid() != 0:
        raise CurveKernelError(
            "only root sees the kernels of all users", "run it as root, with sudo for instance"
        )
    own = _network("self")
    processes = sorted(_processes(), key=lambda process: process.network)
    kernels: list[KernelStatus] = []
    for network, members in groupby(processes, key=lambda process: process.network):
        inspect = _inspect if network == own else _inspect_elsewhere
        kernels += inspect([*members])
    return sorted(kernels, key=lambda kernel: (kernel.user, kernel.file, kernel.pid or 0))


def _processes() -> Iterator[_Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            words, uid = process.cmdline(), process.uids().real
            try:
                if words:
                    yield _read_process(process, words, uid)
            except (psutil.AccessDenied, PermissionError):
                # A container's first process may hide from its root. What others run may not.
                if uid == 0 and not _MODULES & set(words):
                    continue
                raise CurveKernelError(
                    f"root may not look here at process {process.pid} of {user_name(uid)}",
                    "run it on the machine itself, or give the container CAP_SYS_PTRACE",
                ) from None


def _read_process(process: psutil.Process, words: list[str], uid: int) -> _Process:
    environ = process.environ()
    homes = {environ.get("HOME")}
    with contextlib.suppress(KeyError):
        homes.add(pwd.getpwuid(uid).pw_dir)
    data = {environ.get("JUPYTER_DATA_DIR")}
    data |= {f"{home}/.local/share/jupyter" for home in homes if home}
    data |= {f"{folder}/jupyter" for folder in {environ.get("XDG_DATA_HOME")} if folder}
    runtime = {f"{folder}/runtime" for folder in data if folder} | {environ.get("JUPYTER_RUNTIME_DIR")}
    root, cwd = _root(process.pid), process.cwd() or "/"
    return _Process(
        process.pid,
        uid,
        process.gids().real,
        words,
        [root + os.path.normpath(Path(cwd, name)) for name in _named(words)],
        {root + os.path.normpath(folder) for folder in runtime if folder and folder[0] == "/"},
        _network(process.pid),
    )


def _named(words: Sequence[str]) -> Iterator[str]:
    for before, word in zip(["", *words], words, strict=False):
        name = word.partition("=")[2] if word.startswith("-") else word
        if name and (name.endswith(".json") or before == "-f"):
            yield name


def _network(pid: int | str) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def _root(pid: int) -> str:
    """Return what comes before the paths of a process that sees other files than this one."""
    ours, theirs = Path("/proc/self/ns/mnt"), Path(f"/proc/{pid}/ns/mnt")
    root = Path(f"/proc/{pid}/root")
    same = ours.readlink() == theirs.readlink() and root.samefile("/")
    return "" if same else str(root)


def _inspect(processes: Sequence[_Process]) -> list[KernelStatus]:
    """Find the kernels among *processes*, which are in this network."""
    connections = connections_here()
    listeners = listeners_of(connections)
    found = [*_from_files(processes, listeners)]
    users = {process.pid: process.uid for process in processes}
    look(found, connections, users)
    known = {port_or_path(c["endpoint"]) for kernel in found for c in kernel.channels.values()}
    known |= {str(port["port"]) for kernel in found for port in kernel.further_ports}
    pids = {kernel.pid for kernel in found}
    without = []
    for process in processes:
        if not process.is_kernel or process.pid in pids:
            continue
        ports = {
            place: address
            for place, holders in listeners.items()
            for pid, address in holders
            if pid == process.pid and place not in known
        }
        if kernel := _without_file(process, ports):
            without.append(kernel)
            known |= ports.keys()  # which its forked children hold too
    look(without, connections, users)
    for kernel in found + without:
        if kernel.pid in users:
            kernel.user = user_name(users[kernel.pid])
    # What ended meanwhile is no kernel that runs.
    return [kernel for kernel in found + without if kernel.verdict != "dead"]


def _inspect_elsewhere(processes: Sequence[_Process]) -> list[KernelStatus]:
    """Find the kernels among *processes*, which are in a network of their own, as containers have."""
    try:
        return _apart(_NETWORK_LIMIT, _inspect_within, processes)
    except OSError as error:
        if not psutil.pid_exists(processes[0].pid):
            return []
        raise CurveKernelError(
            f"the network of process {processes[0].pid} can't be entered: {error.strerror}",
            "run it on the machine itself",
        ) from None


def _inspect_within(processes: Sequence[_Process]) -> list[KernelStatus]:
    with open(f"/proc/{processes[0].pid}/ns/net") as network:  # noqa: PTH123
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return _inspect(processes)


def _apart(
    limit: float, function: Callable[..., list[KernelStatus]], *arguments: Any
) -> list[KernelStatus]:
    """Return what *function* finds in a child process, which has *limit* seconds for it.

    Raises
    ------
    OSError
        If it raises one, or takes too long.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, arguments))
    child.start()
    sender.close()
    # Its user may stop it in the middle of what it says.
    deadline, timer = time.monotonic() + limit, threading.Timer(limit, child.kill)
    timer.start()
    try:
        found = receiver.recv()
    except (EOFError, OSError):
        late = time.monotonic() > deadline
        found = OSError(0, f"no answer in {limit:.0f} s" if late else "its process ended")
    finally:
        timer.cancel()
        timer.join()
        child.kill()
        child.join()
        receiver.close()
    if isinstance(found, OSError):
        raise found
    return found  # type: ignore[no-any-return]


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        found = function(*arguments)
    except OSError as error:
        found = OSError(error.errno, error.strerror)
    sender.send(found)


def _from_files(
    processes: Sequence[_Process], listeners: dict[str, list[tuple[int, str]]]
) -> Iterator[KernelStatus]:
    """Read the connection files of kernels that run, each kernel's once.

    What a user has written leads to processes of that user only.
    """
    seen = set()
    users = {process.pid: process.uid for process in processes}
    for reader, kernel in _files(processes):
        places = [port_or_path(channel["endpoint"]) for channel in kernel.channels.values()]
        if len(set(places)) < len(port_names) or tuple(places) in seen:
            continue
        holders = set.intersection(*({pid for pid, _ in listeners.get(at, ())} for at in places))
        # Of what is read as root it counts whose it is.
        writer = kernel.user if reader == 0 else user_name(reader)
        own = (pid for pid in holders if pid in users and writer == user_name(users[pid]))
        pids = [*(holders if writer == user_name(0) else own)]
        if not pids:
            continue
        seen.add(tuple(places))
        kernel.pid = min(pids)
        for channel, place in zip(kernel.channels.values(), places, strict=True):
            # Where the process listens, whatever address somebody wrote into the file.
            address = next(address for pid, address in listeners[place] if pid == kernel.pid)
            channel["endpoint"] = _endpoint(place, address)
        yield kernel


def _files(processes: Sequence[_Process]) -> Iterator[tuple[int, KernelStatus]]:
    """Read what may be connection files, each user's as that user, those that are named first."""

    def owner(process: _Process) -> tuple[int, int]:
        return process.uid, process.gid

    later: list[tuple[int, KernelStatus]] = []
    for (uid, gid), members in groupby(sorted(processes, key=owner), key=owner):
        its = [*members]
        named = {file for process in its for file in process.files}
        folders = {folder for process in its for folder in process.runtime}
        # Somebody's files may be slow, on purpose too. Their kernels are found by their ports then.
        with contextlib.suppress(OSError):
            kernels = _apart(_FILES_LIMIT, _read_as, uid, gid, sorted(named), sorted(folders))
            yield from ((uid, kernel) for kernel in kernels if kernel.file in named)
            later += [(uid, kernel) for kernel in kernels if kernel.file not in named]
    yield from later


def _read_as(uid: int, gid: int, files: Sequence[str], folders: Sequence[str]) -> list[KernelStatus]:
    # Nobody has root read what they name, and root may be nobody on their file server.
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    return [*filter(None, map(_read, [*files, *_in_folders(folders)]))]


def _read(path: str) -> KernelStatus | None:
    try:
        # It is not opened before it is known to be a file: to open a device may do something.
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        kernel = read_kernel(f"/proc/self/fd/{descriptor}")
        kernel.file = path
        return kernel
    finally:
        os.close(descriptor)


def _in_folders(folders: Sequence[str]) -> Iterator[str]:
    for folder in folders:
        with contextlib.suppress(OSError):
            yield from sorted(str(path) for path in Path(folder).glob("*.json"))


def _endpoint(place: str, address: str) -> str:
    if not place.isdigit():
        return f"ipc://{place}"
    # By the same family: with the other one, another process may have that port.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104
    return f"tcp://[{host}]:{place}" if ":" in host else f"tcp://{host}:{place}"


def _without_file(process: _Process, ports: dict[str, str]) -> KernelStatus | None:
    channels = {
        f"port {place}" if place.isdigit() else place: {
            "endpoint": _endpoint(place, address),
            "mechanism": "",
        }
        for place, address in sorted(ports.items())
        if place.isdigit() or _IPC.fullmatch(place)
    }
    if len(channels) < len(port_names):
        return None  # a launcher, or another command of this package
    kernel = KernelStatus(next(iter(process.files), ""), process.user, pid=process.pid)
    kernel.channels = channels
    kernel.problem = f"process {process.pid} of {process.user} has no connection file that can be read"
    return kernel

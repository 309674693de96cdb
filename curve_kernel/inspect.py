"""What the ports of kernels really speak, and which process holds them: read from the wire."""

from __future__ import annotations

import contextlib
import pwd
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jupyter_client
import psutil
from jupyter_core.paths import jupyter_runtime_dir

from . import connection_file
from .errors import CurveKernelError, without_keys
from .wire import read_mechanism

__all__ = [
    "KernelStatus",
    "connections_here",
    "find_connection_file",
    "inspect_kernels",
    "listeners_of",
    "look",
    "port_or_path",
    "read_kernel",
    "short_names",
    "user_name",
]

_PORT_TIMEOUT = 2.0
_AT_ONCE = 500
_NAME_LENGTH = 200
_SHORT = 8
_CLOSED, _SILENT, _NOT_ZMTP = "closed", "silent", "not ZMTP"


@dataclass
class KernelStatus:
    """What was found out about a kernel.

    ``channels`` gives for each channel its endpoint and the mechanism that its port spoke: CURVE, NULL,
    PLAIN, or ``closed``, ``silent`` and ``not ZMTP`` where the port named none. ``further_ports`` are
    ports on which its process, a child of it or its debug adapter listens besides; nothing was sent
    to them. ``user`` is the owner of the process, else of the file.
    """

    file: str
    user: str = ""
    kernel_name: str = ""
    verdict: str = "unreachable"
    problem: str = ""
    pid: int | None = None
    since: datetime | None = None
    channels: dict[str, dict[str, str]] = field(default_factory=dict)
    file_mode: str = ""
    secret_key_in_file: bool = False
    hmac_key_in_file: bool = False
    further_ports: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it in the form that ``--json`` prints."""
        return {**vars(self), "since": self.since and self.since.isoformat(timespec="seconds")}


def find_connection_file(name: str) -> str:
    """Return the path of the connection file that is called *name*, or has it in its name.

    Raises
    ------
    CurveKernelError
        If it does not exist, or is in a folder that this user may not enter.
    """
    if name.strip("/"):  # else upstream takes whatever folder it finds
        with contextlib.suppress(OSError):
            return str(jupyter_client.find_connection_file(name))
    try:
        Path(name).stat()
    except PermissionError as error:
        raise CurveKernelError(
            f"connection file {name} may not be read: {error.strerror}",
            "ask its owner for a copy in a folder that you may enter",
        ) from None
    except (OSError, ValueError):
        pass
    raise CurveKernelError(
        f"there is no connection file {name or 'without a name'}",
        "`jupyter --paths` shows the runtime folder where running kernels have theirs",
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """Return for each connection file what a person types for it: ``--existing`` takes these names.

    A file in Jupyter's runtime folder has the shortest beginning of its own part of the name that no
    other file there has in its name; every other file has its path.
    """
    runtime = Path(jupyter_runtime_dir())
    try:
        there = [path.name for path in runtime.glob("*.json")]
    except OSError:
        there = []
    return [
        _short_name(Path(path).name, there) if Path(path).parent == runtime else path for path in paths
    ]


def _short_name(name: str, there: Sequence[str]) -> str:
    own = name.removeprefix("kernel-").removesuffix(".json")
    for length in range(min(len(own), _SHORT), len(own) + 1):
        part = own[:length]
        # jupyter_client looks for it as a pattern.
        if (
            part
            and not set(part) & set("*?[")
            and not any(part in other for other in there if other != name)
        ):
            return part
    return name


def inspect_kernels(paths: Sequence[str]) -> list[KernelStatus]:
    """Find out what the kernels of these connection files speak, all at once.

    Parameters
    ----------
    paths : sequence of str
        Connection files.

    Returns
    -------
    list of KernelStatus
        In the order of *paths*. A file that can't be read is in it, with its ``problem``.
    """
    kernels = [read_kernel(path) for path in paths]
    look(kernels, connections_here())
    return kernels


def look(
    kernels: Sequence[KernelStatus], connections: list[Any], users: Mapping[int, int] | None = None
) -> None:
    """Find out what the ports of *kernels* speak and, by psutil's *connections*, whose they are.

    Parameters
    ----------
    kernels : sequence of KernelStatus
        What is found out is put into them.
    connections : list
        Of this machine.
    users : mapping, optional
        User ids by process id: nothing is sent to a path where another user than the kernel's listens.
    """
    probes = [
        (channel, (users or {}).get(kernel.pid or 0))
        for kernel in kernels
        for channel in kernel.channels.values()
    ]
    with ThreadPoolExecutor(max(min(len(probes), _AT_ONCE), 1)) as pool:
        for (channel, _), said in zip(probes, pool.map(_probe, probes), strict=True):
            channel["mechanism"] = said
    listeners = listeners_of(connections)
    for kernel in kernels:
        if kernel.channels:
            kernel.verdict = _verdict([channel["mechanism"] for channel in kernel.channels.values()])
            if kernel.verdict != "dead":
                _find_process(kernel, connections, listeners)


def read_kernel(path: str) -> KernelStatus:
    """Return what the connection file at *path* says, or with which ``problem`` it can't be read."""
    kernel = KernelStatus(path)
    try:
        status = Path(path).stat()
        kernel.user, kernel.file_mode = user_name(status.st_uid), f"{stat.S_IMODE(status.st_mode):04o}"
    except OSError:
        pass  # it is said below
    try:
        info = connection_file.read(path, trusted=False)
        connection_file.check_address(path, info)
        kernel.channels = {
            name.removesuffix("_port"): {"endpoint": _endpoint(info, int(info[name])), "mechanism": ""}
            for name in ("shell_port", "control_port", "stdin_port", "iopub_port", "hb_port")
        }
    except CurveKernelError as error:
        kernel.problem = error.message
        return kernel
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else "has a field of the wrong kind"
        kernel.problem = f"connection file {path} {reason}"
        return kernel
    name = info.get("kernel_name")
    kernel.kernel_name = without_keys(name) if isinstance(name, str) else ""
    kernel.kernel_name = kernel.kernel_name[:_NAME_LENGTH]
    kernel.secret_key_in_file = bool(info.get("curve_secretkey"))
    kernel.hmac_key_in_file = bool(info.get("key"))
    return kernel


def _endpoint(info: dict[str, Any], port: int) -> str:
    address = str(info["ip"])
    if info.get("transport", "tcp") == "ipc":
        return f"ipc://{address}-{port}"
    if not 0 < port < 1 << 16:
        raise ValueError(port)
    # What a kernel binds need not be what one can connect to.
    return f"tcp://{'127.0.0.1' if address in ('', '*', '0.0.0.0') else address}:{port}"  # noqa: S104


def _probe(where: tuple[dict[str, str], int | None]) -> str:
    channel, user = where
    try:
        return read_mechanism(channel["endpoint"], _PORT_TIMEOUT, user)
    except TimeoutError:
        return _SILENT
    except (ConnectionRefusedError, FileNotFoundError):
        return _CLOSED
    except (ValueError, TypeError):
        return _NOT_ZMTP
    except OSError:
        return _SILENT


def _verdict(spoken: Sequence[str]) -> str:
    kinds = set(spoken)
    plain = kinds - {"CURVE", _CLOSED, _SILENT, _NOT_ZMTP}
    if kinds == {"CURVE"}:
        return "encrypted"
    if kinds == {_CLOSED}:
        return "dead"
    if "CURVE" in kinds:
        return "mixed"
    return "PLAINTEXT" if plain else "unreachable"


_Listeners = dict[str, list[tuple[int, str]]]


def user_name(uid: int) -> str:
    """Return the name of a user, or the number if there is no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def connections_here() -> list[Any]:
    """Return psutil's connections of this machine, as far as the caller may see."""
    # RuntimeError: somebody's socket has a path that psutil can't parse.
    with contextlib.suppress(psutil.Error, OSError, RuntimeError):
        return list(psutil.net_connections("all"))
    return []


def listeners_of(connections: list[Any]) -> _Listeners:
    """Return the listeners, process and address, by port or path."""
    found: _Listeners = {}
    for connection in connections:
        if connection.pid is None or not connection.laddr:
            continue
        if isinstance(connection.laddr, str):
            found.setdefault(connection.laddr, []).append((connection.pid, connection.laddr))
        elif connection.status == psutil.CONN_LISTEN:
            found.setdefault(str(connection.laddr.port), []).append(
                (connection.pid, connection.laddr.ip)
            )
    return found


def _find_process(kernel: KernelStatus, connections: list[Any], listeners: _Listeners) -> None:
    own = [port_or_path(channel["endpoint"]) for channel in kernel.channels.values()]
    if not _is_local(kernel):
        return
    pids = {pid for place in own for pid, _ in listeners.get(place, ())}
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            processes.append((process.create_time(), process))
    if not processes:
        return
    # The oldest: forked children hold the same ports.
    created, process = min(processes, key=lambda started: started[0])
    kernel.pid = process.pid
    with contextlib.suppress(psutil.Error):
        kernel.user = user_name(process.uids().real)
    kernel.since = datetime.fromtimestamp(created, timezone.utc).astimezone()
    remotes = {
        connection.raddr
        for connection in connections
        if connection.pid == process.pid and connection.raddr
    }
    family = {process.pid} | _debug_adapters(remotes, listeners)
    with contextlib.suppress(psutil.Error):
        family |= {child.pid for child in process.children(recursive=True)}
    kernel.further_ports = [
        {"address": address, "port": int(place), "pid": pid}
        for place, holders in sorted(listeners.items())
        for pid, address in holders
        if pid in family and place.isdigit() and place not in own
    ]


def _debug_adapters(remotes: set[Any], listeners: _Listeners) -> set[int]:
    """Find what stock's debugger has started: connected to the kernel, but no child of it any more."""
    found = set()
    for remote in remotes:
        for pid, address in listeners.get(str(getattr(remote, "port", "")), ()):
            with contextlib.suppress(psutil.Error):
                command = psutil.Process(pid).cmdline() if address == remote.ip else ()
                if any(word.endswith("debugpy/adapter") for word in command):
                    found.add(pid)
    return found


def port_or_path(endpoint: str) -> str:
    """Return the port of a tcp endpoint, or the path of an ipc one."""
    transport, _, address = endpoint.partition("://")
    return address if transport == "ipc" else address.rpartition(":")[2]


def _is_local(kernel: KernelStatus) -> bool:
    transport, _, address = next(iter(kernel.channels.values()))["endpoint"].partition("://")
    host = address.rpartition(":")[0].strip("[]")
    if transport == "ipc" or host.startswith("127.") or host == "localhost":
        return True
    return any(
        address.address == host for addresses in psutil.net_if_addrs().values() for address in addresses
    )

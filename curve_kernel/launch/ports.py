"""Ports before a kernel has bound them: whether they are free, and how they are held until then."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jupyter_client.connect import port_names

from ..errors import CurveKernelError

__all__ = [
    "HeldPorts",
    "ReservedPorts",
    "bind_error",
    "check_ended",
    "check_free",
    "free_port",
    "parse_range",
]


def bind_error(transport: str, ip: str, channel: str, port: int, error: object) -> CurveKernelError:
    """Return the error that says which channel can't be bound, and why."""
    separator = ":" if transport == "tcp" else "-"
    reason = getattr(error, "strerror", None) or error
    return CurveKernelError(
        f"channel {channel} can't bind {transport}://{ip}{separator}{port}: {reason}",
        "give every channel a free port and the kernel an address of this machine",
    )


def check_free(transport: str, ip: str, ports: Mapping[str, int]) -> None:
    """Make sure that each of *ports*, by its name in connection files, can be bound; 0 is any port.

    A socket that is bound but does not listen opens no port, so a conflict on the last channel is found
    before the first one is open. To bind a path libzmq would take it from a kernel that runs.

    Raises
    ------
    CurveKernelError
        If one can't be bound, or two channels have the same.
    """
    with contextlib.ExitStack() as probes:
        taken: set[int] = set()
        for name, port in ports.items():
            channel = name.removesuffix("_port")
            if port in taken and port > 0:
                raise bind_error(transport, ip, channel, port, "another channel has that port")
            taken.add(port)
            try:
                if transport == "ipc" and port > 0 and not _is_free_path(f"{ip}-{port}"):
                    raise bind_error(transport, ip, channel, port, os.strerror(errno.EADDRINUSE))
                if transport == "tcp" and (address := _address(ip)):
                    probes.enter_context(_bound(*address, max(port, 0)))
            except (OSError, OverflowError) as error:
                raise bind_error(transport, ip, channel, port, error) from None


def check_ended(path: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
    """Make sure that the kernel that made the connection file at *path* has ended.

    Raises
    ------
    CurveKernelError
        If a process holds one of its ports, or that can't be told.
    """
    for name in port_names:
        try:
            free = _is_free(info, info[name])
        except (OSError, OverflowError, TypeError, KeyError, AttributeError):
            free = False
        if not free:
            raise CurveKernelError(
                f"connection file {os.fspath(path)} belongs to a kernel that may be running:"
                f" its {name.removesuffix('_port')} port is in use, or not of this machine",
                "connect to it with python -m curve_kernel console --existing, or name another file",
            )


def _is_free(info: Mapping[str, Any], port: int) -> bool:
    if info.get("transport") == "ipc":
        return _is_free_path(f"{info['ip']}-{port}")
    address = _address(info["ip"])
    if address is None:
        return False
    _bound(*address, port).close()
    return True


def free_port(ip: str) -> int:
    """Return a port that is free now at *ip*.

    Raises
    ------
    CurveKernelError
        If that is no address of this machine.
    """
    address = _address(ip)
    if address is None:
        raise bind_error("tcp", ip, "hb", 0, "there is no such address")
    with _bound(*address, 0) as probe:
        return int(probe.getsockname()[1])


def _is_free_path(path: str) -> bool:
    """Whether nobody listens there; a path that can't be one is left for libzmq to name."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(1)
        try:
            peer.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError, ValueError):
            return True
        except OSError as error:
            return error.errno is None  # it is too long
        return False


def _address(ip: str) -> tuple[socket.AddressFamily, tuple[Any, ...]] | None:
    """Return the family and the address with port 0 that libzmq makes of *ip*; None if it is unknown.

    It is an address, with or without brackets, an asterisk, or the name of an interface or a host.
    """
    bare = ip[1:-1] if ip.startswith("[") and ip.endswith("]") else ip
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    if bare == "*":
        bare = "0.0.0.0"  # noqa: S104
    for flags in (socket.AI_NUMERICHOST, 0):
        with contextlib.suppress(OSError, ValueError):
            # Of text Python makes IDNA, and imports what it needs for that at every start.
            host = bare.encode() if bare.isascii() else bare
            found = socket.getaddrinfo(host, 0, family, socket.SOCK_STREAM, flags=flags)
            return family, found[0][4]
        bare = _address_of_interface(bare) or bare
    return None


def _address_of_interface(name: str) -> str:
    import psutil  # which no other address needs

    # A sandbox may deny it.
    with contextlib.suppress(OSError, psutil.Error):
        for own in psutil.net_if_addrs().get(name, ()):
            if own.family == socket.AF_INET:
                return str(own.address)
    return ""


def _bound(family: socket.AddressFamily, address: tuple[Any, ...], port: int) -> socket.socket:
    """Return a socket on *port* that does not listen.

    A port with connections that are closing counts as free.
    """
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as libzmq
        made.bind((address[0], port, *address[2:]))
    except BaseException:
        made.close()
        raise
    return made


class HeldPorts:
    """Ports that are bound until their kernel has done so, or an outgoing connection may get one.

    On Linux a socket that does not listen lets another one with SO_REUSEADDR have its port.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def hold(self, transport: str, ip: str, ports: list[int]) -> None:
        """Hold *ports* and no others; of one that can't be bound the kernel will say why."""
        self.release()
        if transport != "tcp" or sys.platform != "linux":
            return
        if address := _address(ip):
            for port in ports:
                with contextlib.suppress(OSError):
                    self._sockets.append(_bound(*address, port))

    def release(self) -> None:
        """Let go of them."""
        while self._sockets:
            self._sockets.pop().close()


class ReservedPorts:
    """Free ports of an address, nobody else's until they are released, also between two kernels.

    On Linux their kernel can bind them meanwhile, as HeldPorts says; elsewhere they are given up before
    it starts.

    Parameters
    ----------
    ip : str
        An address of this machine, IPv4 or IPv6.
    count : int
        How many ports.
    candidates : sequence of int
        Which ones; empty for any.

    Raises
    ------
    CurveKernelError
        If the address is not of this machine, or not so many ports are free.
    """

    def __init__(self, ip: str, count: int, candidates: Sequence[int] = ()) -> None:
        self._sockets: list[socket.socket] = []
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        for port in candidates or (0,) * count:
            made = socket.socket(family)
            try:
                made.bind((ip, port))
            except (OSError, TypeError, ValueError) as error:  # or Python can't encode the name
                made.close()
                number = getattr(error, "errno", None)
                if number in (errno.EADDRINUSE, errno.EACCES) and candidates:
                    continue
                self.release()
                reason = getattr(error, "strerror", None) or "it is no address"
                raise CurveKernelError(
                    f"{ip} can't be listened on: {reason}", "name an address of this machine"
                ) from None
            # Not before bind, or another who reserves could bind it too.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sockets.append(made)
            if len(self._sockets) == count:
                break
        self.ports = [made.getsockname()[1] for made in self._sockets]
        if len(self.ports) < count:
            self.release()
            raise CurveKernelError(
                f"{len(self.ports)} of the given ports are free on {ip}, and a kernel takes {count}",
                "give a larger range as ports",
            )
        if sys.platform != "linux":
            self.release()

    def release(self) -> None:
        """Give them up."""
        while self._sockets:
            self._sockets.pop().close()


def parse_range(text: str) -> list[int]:
    """Return the ports of a range such as ``50000-50099``.

    Raises
    ------
    CurveKernelError
        If it is no range, or too small for a kernel.
    """
    words = text.partition("-")
    try:
        first, last = int(words[0]), int(words[2])
    except ValueError:
        first, last = 1, 0
    if not (0 < first <= last - len(port_names) and last < 1 << 16):
        raise CurveKernelError(
            f"{text!r} is no range of ports", "give at least six, such as 50000-50099"
        )
    return list(range(first, last + 1))

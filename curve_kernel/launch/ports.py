"""Ports before a kernel has bound them: whether they are free, and how they are held until then."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
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
    before the first one is open.

    Raises
    ------
    CurveKernelError
        If one can't be bound, or two channels have the same.
    """
    if transport != "tcp":
        return
    try:
        ipaddress.IPv4Address(ip)
    except ValueError:
        return  # the name of an interface, which libzmq resolves
    probes: dict[int, socket.socket] = {}
    try:
        for name, given in ports.items():
            channel, port = name.removesuffix("_port"), max(given, 0)
            if port and port in probes:
                raise bind_error(transport, ip, channel, port, "another channel has that port")
            if port in probes:
                continue
            probe = probes[port] = _socket()
            try:
                probe.bind((ip, port))
            except (OSError, OverflowError) as error:
                raise bind_error(transport, ip, channel, port, error) from None
    finally:
        for probe in probes.values():
            probe.close()


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
        except (OSError, OverflowError, TypeError, KeyError):
            free = False
        if not free:
            raise CurveKernelError(
                f"connection file {os.fspath(path)} belongs to a kernel that may be running:"
                f" its {name.removesuffix('_port')} port is in use, or not of this machine",
                "connect to it with python -m curve_kernel console --existing, or name another file",
            )


def _is_free(info: Mapping[str, Any], port: int) -> bool:
    if info.get("transport") == "ipc":
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(1)
            try:
                peer.connect(f"{info['ip']}-{port}")
            except (FileNotFoundError, ConnectionRefusedError):
                return True
            return False
    with _socket() as probe:
        probe.bind((info["ip"], port))
        return True


def _socket() -> socket.socket:
    """Return a socket to which a port with connections that are closing counts as free."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
        for port in ports:
            held = _socket()
            self._sockets.append(held)
            with contextlib.suppress(OSError):
                held.bind((ip, port))

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
            except OSError as error:
                made.close()
                if error.errno in (errno.EADDRINUSE, errno.EACCES) and candidates:
                    continue
                self.release()
                raise CurveKernelError(
                    f"{ip} can't be listened on: {error.strerror}", "name an address of this machine"
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
    first, _, last = text.partition("-")
    try:
        ports = list(range(int(first), int(last) + 1))
    except ValueError:
        ports = []
    if len(ports) < len(port_names) + 1 or ports[0] < 1 or ports[-1] > 65535:
        raise CurveKernelError(
            f"{text!r} is no range of ports", "give at least six, such as 50000-50099"
        )
    return ports

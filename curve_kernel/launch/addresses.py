"""By which address a host is reached."""

from __future__ import annotations

import contextlib
import os
import re
import socket

from ..errors import CurveKernelError

__all__ = ["as_url_host", "check_addresses", "own_address"]

_ADDRESS = re.compile(r"[\w.:%*-]+")


def own_address() -> str:
    """Return the address of this host by which whoever started this process reaches it.

    For ssh it is the one that the client has connected to. For Slurm it is the one from which the
    controller is reached: names of nodes need not be known anywhere else.

    Raises
    ------
    CurveKernelError
        If it can't be told.
    """
    words = os.environ.get("SSH_CONNECTION", "").split()
    if "SLURM_JOB_ID" not in os.environ and len(words) == 4:
        return words[2]
    for controller, port in _controllers():
        with contextlib.suppress(OSError, ValueError):
            return _source_address(controller, port)
    raise CurveKernelError(
        "the address of this host by which it is reached from elsewhere is not known",
        "give it as ip, in the kernelspec's config or as `launch --ip`",
    )


def _controllers() -> list[tuple[str, int]]:
    # NAME:ADDRESS:PORT:VERSION, with more fields in some versions.
    found = []
    fields = os.environ.get("SLURM_WORKING_CLUSTER", "").split(":")
    if len(fields) >= 3 and fields[2].isdigit():
        found.append((fields[1], int(fields[2])))
    for variable in ("SLURM_LAUNCH_NODE_IPADDR", "SLURM_SUBMIT_HOST"):
        if address := os.environ.get(variable):
            found.append((address, 6817))
    return found


def _source_address(host: str, port: int) -> str:
    """Return the own address of the route to *host*; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def check_addresses(*texts: str) -> None:
    """Make sure that each of *texts*, if it is not empty, can be an address or the name of a host.

    Raises
    ------
    CurveKernelError
        If one can't.
    """
    for text in texts:
        if text and not _ADDRESS.fullmatch(text):
            raise CurveKernelError(
                f"{text!r} is no address", "give one such as 10.0.0.5, or the name of a host"
            )


def as_url_host(ip: str) -> str:
    """Return *ip* as it stands in a URL."""
    return f"[{ip}]" if ":" in ip else ip

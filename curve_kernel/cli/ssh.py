"""One ssh connection that forwards a kernel's ports."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from jupyter_client.connect import port_names
from jupyter_client.ssh.tunnel import select_random_ports

from ..errors import CurveKernelError

__all__ = ["ssh_tunnel"]

_TIMEOUT = 60.0
_READY = "curve-kernel-tunnel"


def ssh_tunnel(
    info: Mapping[str, Any], server: str, key: str = ""
) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """Forward a kernel's ports through one ssh connection.

    Not by jupyter_client's `tunnel_to_kernel`: it runs ssh five times, gives each one second, and its
    tunnels end when a restart of the kernel closes what goes through them. Here ssh itself asks for
    what it needs, a password or whether a host is the right one, and it ends with this process.

    Parameters
    ----------
    info : mapping
        The connection file's content; its address is seen from the server.
    server : str
        ``host``, ``user@host`` or ``user@host:port``; if empty, the kernel's own address.
    key : str
        A file for ssh's ``-i``.

    Returns
    -------
    subprocess.Popen, dict
        ssh, and the fields of the connection file that are different from here.

    Raises
    ------
    CurveKernelError
        If ssh can't connect within a minute, or there is no ssh.
    """
    if info.get("transport", "tcp") != "tcp":
        raise CurveKernelError("--ssh forwards tcp ports, and this kernel has none")
    address = str(info.get("ip") or "127.0.0.1")
    if not server:
        server, address = address, "127.0.0.1"
    if address in ("*", "0.0.0.0"):  # noqa: S104
        address = "127.0.0.1"
    host, _, port = server.rpartition(":")
    to = ["-p", port, "--", host] if host and port.isdigit() else ["--", server]
    ports = dict(zip(port_names, select_random_ports(len(port_names)), strict=True))
    if ":" in address:
        address = f"[{address}]"
    try:
        forwards = [f"-L127.0.0.1:{ours}:{address}:{int(info[name])}" for name, ours in ports.items()]
    except (KeyError, TypeError, ValueError):
        raise CurveKernelError(
            "the connection file does not have the five ports of a kernel",
            "get the connection file that the kernel or its launcher wrote",
        ) from None
    options = ["-T", "-oExitOnForwardFailure=yes", "-oConnectTimeout=15", "-oControlPath=none"]
    if key:
        options += ["-i", key]
    hint = f"see whether `ssh {server}` works; the kernel's address is seen from there"
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        process = subprocess.Popen(  # noqa: S603
            ["ssh", *options, *forwards, *to, f"echo {_READY}; exec cat"],  # noqa: S607
            stdin=subprocess.PIPE,  # ends with this process, and so does ssh
            stdout=subprocess.PIPE,
            stderr=errors,
            # A Ctrl-C in the console is for the kernel.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
    except OSError as error:
        raise CurveKernelError(
            f"ssh can't be run: {error.strerror}", "install OpenSSH's client"
        ) from None
    try:
        _wait_for_ready(process)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.poll() is not None:
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
        reason = f": {said[-1]}" if said else ""
        raise CurveKernelError(f"ssh could not connect to {server}{reason}", hint)
    return process, {"ip": "127.0.0.1", **ports}


def _wait_for_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    said, deadline = b"", time.monotonic() + _TIMEOUT
    while _READY.encode() not in said:
        left = deadline - time.monotonic()
        if left <= 0:
            raise CurveKernelError(
                f"ssh has not connected in {_TIMEOUT:.0f} seconds",
                "see whether it connects by itself, and where it waits",
            )
        if not select.select([process.stdout], [], [], left)[0]:
            continue
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            process.wait()
            return
        said += chunk

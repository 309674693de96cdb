"""One ssh process that forwards a kernel's ports, and is started again whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from jupyter_client.ssh.tunnel import select_random_ports

from ..errors import CurveKernelError
from .addresses import as_url_host
from .processes import Done, environment
from .ssh import Ssh

__all__ = ["Tunnel"]

_READY = b"curve-kernel-tunnel"
_TRIES = 3
_PAUSE, _LONGEST_PAUSE = 0.5, 15.0


class Tunnel:
    """Forwards ports of this machine's loopback to ports that a host reaches.

    What goes through is encrypted from end to end: neither the host nor who connects here is trusted.

    Parameters
    ----------
    ssh : Ssh
        The host.
    ip : str
        The address that the host reaches.
    ports : mapping
        The ports there, by name.
    log : callable
        Told when ssh has ended, and when it can't connect again.
    """

    def __init__(
        self, ssh: Ssh, ip: str, ports: Mapping[str, int], log: Callable[[str], object]
    ) -> None:
        self._ssh = ssh
        self._ip = ip
        self._far = ports
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        self.ports: dict[str, int] = {}
        """The ports here, by name."""

    async def open(self, timeout: float) -> None:
        """Connect.

        Raises
        ------
        CurveKernelError
            If ssh can't connect in *timeout* seconds, with its own last line.
        """
        deadline = time.monotonic() + timeout
        for attempt in range(_TRIES):
            near = select_random_ports(len(self._far))
            self.ports = dict(zip(self._far, near, strict=True))
            with tempfile.TemporaryFile() as errors:
                self._process = process = self._start(errors)
                try:
                    said = await _read(process, deadline)
                except BaseException:
                    self.close()
                    raise
                if _READY in said:
                    threading.Thread(target=self._keep_open, name="ssh tunnel", daemon=True).start()
                    return
                errors.seek(0)
                done = Done(process.poll(), "", errors.read().decode(errors="replace"))
            self._end_process()
            # Another program may have taken one of the ports meanwhile.
            if attempt + 1 == _TRIES or "forward" not in done.err:
                raise self._ssh.failure(done, timeout) or CurveKernelError(
                    f"ssh to {self._ssh.host} forwards no ports: {done.last_words}",
                    "see whether its sshd_config has AllowTcpForwarding no",
                )

    def _start(self, errors: IO[bytes] | int) -> subprocess.Popen[bytes]:
        forwards = [
            f"-L127.0.0.1:{near}:{as_url_host(self._ip)}:{self._far[name]}"
            for name, near in self.ports.items()
        ]
        options = ("-oExitOnForwardFailure=yes", "-oControlPath=none", "-oServerAliveInterval=15")
        command = [*self._ssh.forwarding(*options, *forwards), f"echo {_READY.decode()}; exec cat"]
        try:
            return subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,  # nothing is written: it ends with this process, and ssh with it
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise CurveKernelError(f"ssh can't be run: {error.strerror}", "install ssh here") from None

    def _keep_open(self) -> None:
        pause = _PAUSE
        while not self._closed.is_set() and (process := self._process) is not None:
            started = time.monotonic()
            process.wait()
            _close_pipes(process)
            if self._closed.is_set():
                return
            if time.monotonic() - started > _LONGEST_PAUSE:
                pause = _PAUSE
                self._log(f"ssh to {self._ssh.host} has ended; it is started again")
            if self._closed.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE)
            with contextlib.suppress(CurveKernelError):
                self._process = self._start(subprocess.DEVNULL)
        self._end_process()

    @property
    def pid(self) -> int:
        """The process of ssh."""
        return self._process.pid if self._process else 0

    def close(self) -> None:
        """End ssh."""
        self._closed.set()
        self._end_process()

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            _close_pipes(self._process)


def _close_pipes(process: subprocess.Popen[Any]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


async def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Return what ssh says until it is ready, ends, or is out of time."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    said = b""
    while _READY not in said and time.monotonic() < deadline:
        ended = process.poll() is not None
        with contextlib.suppress(BlockingIOError):
            said += os.read(process.stdout.fileno(), 1 << 12)
        if ended:
            break
        await asyncio.sleep(0.02)
    return said

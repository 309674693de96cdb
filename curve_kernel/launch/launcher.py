"""The half of a remote start that runs on the kernel's host: ``python -m curve_kernel launch``.

It makes the kernel's key pair, whose secret key never leaves this host, reserves the ports, and says in
one line of public JSON what a client needs. Then it answers one CURVE port, which only the manager's
key may use: start the kernel, start it again, pass a signal on, tell how it ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import zmq
from jupyter_client.connect import port_names
from jupyter_core.paths import jupyter_runtime_dir

from .. import __version__, connection_file, keys
from ..access.allowlist import AuthorizedClients
from ..access.gate import Gate
from ..access.limits import Limits
from ..errors import CurveKernelError
from ..keys import KeyPair
from ..keys.source import SECRETKEY_FILE_VARIABLE, EnvironmentSecret
from .addresses import as_url_host
from .ports import ReservedPorts
from .processes import complete_environment

__all__ = ["PROTOCOL", "Launcher", "Settings", "detach"]

PROTOCOL = 2
"""What manager and launcher say to each other; another number is another language."""

_TICK = 0.25
# Seconds in which a kernel that is told to end has to, and for how long an ended one keeps the launcher
# that nobody is connected to.
_PATIENCE, _KEPT = 3.0, 300.0
# For how long somebody has to be connected to the kernel to count: longer than a handshake may take.
_HANDSHAKE_TIMEOUT = 5.0
_LOOKED = _HANDSHAKE_TIMEOUT + 1
_SAID = 4096
_LOG = logging.getLogger("curve_kernel.launch")
_LOG.addHandler(logging.NullHandler())
_LOG.propagate = False


@dataclass(frozen=True)
class Settings:
    """What the manager asks of a launcher; all of it is public.

    ``start_timeout`` is how long it waits to be told to start, ``orphan_timeout`` how long a kernel
    lives on to which no manager, and nobody who came since, is connected.
    """

    manager_key: bytes
    owner_keys: tuple[bytes, ...]
    ip: str
    ports: Sequence[int]
    start_timeout: float
    orphan_timeout: float


class Launcher:
    """Starts one kernel, again and again, with the same keys and ports.

    Parameters
    ----------
    settings : Settings
        What the manager asks for.

    Raises
    ------
    CurveKernelError
        If the address is not of this machine, or there are not enough ports.
    """

    def __init__(self, settings: Settings) -> None:
        keys.require_curve()
        # What this environment may hold is not for the kernel, and the launcher leaves no core files.
        EnvironmentSecret()
        complete_environment()
        self._settings = settings
        self._keys = KeyPair.generate()
        self._reserved = ReservedPorts(settings.ip, len(port_names) + 1, settings.ports)
        *kernel_ports, self._port = self._reserved.ports
        self._ports = dict(zip(port_names, kernel_ports, strict=True))
        self._file = Path(jupyter_runtime_dir()) / f"kernel-{uuid.uuid4()}.json"
        self._kernel: subprocess.Popen[bytes] | None = None
        self._ended: Any = None  # a descriptor that can be read once the kernel has ended
        self._said = b""
        self._status: int | None = None
        self._seen = time.monotonic()
        self._manager_ip = ""
        self._manager_is_there = False
        self._stale: set[Any] = set()
        self._peers: dict[Any, float] = {}  # of the kernel, and since when each was seen
        self._stopping = False
        self._context: zmq.Context[Any] = zmq.Context()
        self._gate = Gate(
            self._keys,
            AuthorizedClients(Path("/nonexistent"), _LOG.warning, [settings.manager_key]),
            Limits(_HANDSHAKE_TIMEOUT, 64, 64),
            _LOG,
            allow_any=False,
            open_heartbeat=False,
            message_sizes={},
            ipv6=":" in settings.ip,
        )
        self._socket: zmq.Socket[Any] = self._context.socket(zmq.ROUTER)
        self._socket.linger = 500
        # Whether the manager is there is told by its connection, and that by ZMTP's heartbeat.
        interval = min(max(settings.orphan_timeout / 4, 1.0), 20.0)
        self._socket.heartbeat_ivl = int(interval * 1000)
        self._socket.heartbeat_timeout = int(2 * interval * 1000)
        self._gate.guard(self._socket, "control")
        self._gate.on_ended("control", self._note_stale)
        host = as_url_host(settings.ip)
        self._socket.bind(f"tcp://{host}:{self._port}")

    def ready(self) -> str:
        """Return the line that tells the manager what it needs to know; nothing in it is secret."""
        return json.dumps(
            {
                "curve_kernel": __version__,
                "protocol": PROTOCOL,
                "python": platform.python_version(),
                "hostname": socket.gethostname(),
                "pid": os.getpid(),
                "time": round(time.time(), 3),
                "ip": self._settings.ip,
                **self._ports,
                "launcher_port": self._port,
                "curve_publickey": self._keys.public_key.decode(),
            }
        )

    def run(self) -> None:
        """Serve the manager until it says that this is the end, or is gone for too long."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        try:
            while not self._stopping and not self._is_abandoned():
                self._wait()
        finally:
            self._end_kernel()
            self._gate.close()
            self._context.destroy(linger=500)
            self._reserved.release()
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _wait(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        output = self._kernel.stdout if self._kernel else None
        if output is not None:
            poller.register(output.fileno(), zmq.POLLIN)
        if self._ended is not None:
            poller.register(self._ended, zmq.POLLIN)
        pause = 1.0 if self._ended is not None or self._kernel is None else _TICK
        ready = dict(poller.poll(int(pause * 1000)))
        if output is not None and output.fileno() in ready:
            self._listen(output.fileno())
        self._look_at_kernel()
        if self._socket in ready:
            self._answer(self._socket.recv_multipart())

    def _listen(self, descriptor: int) -> None:
        with contextlib.suppress(OSError):
            chunk = os.read(descriptor, 1 << 16)
            self._said = (self._said + chunk)[-_SAID:]
            if not chunk and self._kernel and self._kernel.stdout:
                self._kernel.stdout.close()
                self._kernel.stdout = None

    def _look_at_kernel(self) -> None:
        if self._kernel is None or (status := self._kernel.poll()) is None:
            return
        output = self._kernel.stdout
        if output is not None:
            while select.select([output], [], [], 0)[0] and self._kernel.stdout:
                self._listen(output.fileno())
            output.close()
        if self._ended is not None:
            os.close(self._ended)
        self._ended, self._kernel, self._status = None, None, status

    def _answer(self, frames: list[bytes]) -> None:
        if len(frames) != 3:
            return
        try:
            request = json.loads(frames[2])
            handler = getattr(self, f"_do_{request.pop('do')}")
            answer = handler(**request)
        except CurveKernelError as error:
            answer = {"error": error.message, "hint": error.hint}
        except Exception as error:  # noqa: BLE001  the manager gets to know, and the kernel lives on
            answer = {"error": f"{type(error).__name__}: {error}", "hint": ""}
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart([*frames[:2], json.dumps(answer).encode()], zmq.NOBLOCK)

    def _do_poll(self) -> dict[str, Any]:
        said = self._said.decode(errors="replace") if self._status is not None else ""
        return {"status": self._status, "said": said, "open": self._is_open()}

    def _is_open(self) -> bool:
        """Whether the kernel listens on all its ports."""
        listening = {one.laddr.port for one in self._sockets_of_kernel(psutil.CONN_LISTEN)}
        return listening >= set(self._ports.values())

    def _do_signal(self, number: int) -> dict[str, Any]:
        if self._kernel is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._kernel.pid, number)
        return {}

    def _do_end(self) -> dict[str, Any]:
        self._stopping = True
        return {}

    def _do_start(
        self, env: dict[str, str], cwd: str | None, folder: str | None, name: str, owners: list[str]
    ) -> dict[str, Any]:
        """Start the kernel in *cwd*, which must be there, or else in *folder* if that is there.

        *owners* are public keys, as they are now, of owners beside those that the launcher knows.
        """
        if self._kernel is not None:
            raise CurveKernelError("the kernel runs already")
        given_now = [keys.parse_public(key, "an owner's key") for key in owners]
        where = _folder(cwd, folder)
        connection_file.create_folder(self._file.with_suffix(".new"))
        connection_file.write(
            self._file,
            {
                **self._ports,
                "ip": as_url_host(self._settings.ip),
                "transport": "tcp",
                "key": "",
                "signature_scheme": "hmac-sha256",
                "kernel_name": name,
                "curve_publickey": self._keys.public_key.decode(),
            },
        )
        owner_keys = [self._settings.manager_key, *self._settings.owner_keys, *given_now]
        given, pipe = os.pipe()
        try:
            os.write(pipe, self._keys.secret_key)
            os.close(pipe)
            self._kernel = subprocess.Popen(  # noqa: S603
                [
                    *(sys.executable, "-m", "curve_kernel", "-f", str(self._file)),
                    "--CurveKernelApp.client_authorization=allowlist",
                    *(f"--CurveKernelApp.owner_keys={keys.as_hex(key)}" for key in owner_keys),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=where,
                env={
                    **os.environ,
                    **env,
                    SECRETKEY_FILE_VARIABLE: f"/dev/fd/{given}",
                    "JPY_PARENT_PID": str(os.getpid()),
                },
                pass_fds=[given],
                start_new_session=True,
            )
        finally:
            os.close(given)
        self._said, self._status = b"", None
        with contextlib.suppress(AttributeError, OSError):
            self._ended = os.pidfd_open(self._kernel.pid)
        return {"pid": self._kernel.pid, "cwd": where}

    def _end_kernel(self) -> None:
        if self._kernel is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._kernel.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._kernel.wait(_PATIENCE)
                return

    def _is_abandoned(self) -> bool:
        """Whether the manager, and whoever came after it, is gone for longer than is allowed."""
        now = time.monotonic()
        connections = [one for port in self._gate.ports() for one in port.connections]
        if connections:
            self._seen, self._manager_is_there, self._peers = now, True, {}
            self._manager_ip = connections[0].address
            return False
        if self._kernel is None and self._status is None:
            return now - self._seen > self._settings.start_timeout
        limit = self._settings.orphan_timeout
        if self._kernel is None:
            limit = min(limit, _KEPT)
        late = now - self._seen - limit
        if late <= -_LOOKED:
            self._peers = {}
            return False
        peers = self._kernel_peers() - self._stale
        self._peers = {peer: self._peers.get(peer, now) for peer in peers}
        # A stranger's connection is ended before that, and the next one has another port.
        if any(now - since > _LOOKED for since in self._peers.values()):
            self._seen = now
            return False
        return late > (_LOOKED if peers else 0)

    def _note_stale(self) -> None:
        """Take note of what is still connected from the manager's machine when it is lost.

        Of a machine that fell silent, connections seem to be there for long. The monitor's thread calls
        this at once, so that who comes next is not among them.
        """
        if self._manager_is_there:
            self._manager_is_there = False
            self._stale = {peer for peer in self._kernel_peers() if peer[0] == self._manager_ip}

    def _kernel_peers(self) -> set[Any]:
        ports = self._ports.values()
        established = self._sockets_of_kernel(psutil.CONN_ESTABLISHED)
        peers = {tuple(one.raddr) for one in established if one.laddr.port in ports}
        return peers - {tuple(one.laddr) for one in established}  # without its own debugger

    def _sockets_of_kernel(self, state: str) -> list[Any]:
        if self._kernel is not None:
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(self._kernel.pid)
                # Before psutil 6 it has another name.
                connections = getattr(process, "net_connections", None) or process.connections
                return [one for one in connections("tcp") if one.status == state]
        return []


def _folder(cwd: str | None, folder: str | None) -> str:
    if cwd:
        path = Path(cwd).expanduser()
        if not os.path.isdir(path):  # noqa: PTH112  where this user may not look, Path raises
            raise CurveKernelError(
                f"there is no folder {path} on {socket.gethostname()}", "correct cwd in the kernelspec"
            )
        return str(path)
    # The notebook's folder, where both machines have the same files.
    if folder and os.path.isdir(folder) and os.access(folder, os.X_OK):  # noqa: PTH112
        return folder
    return str(Path.home())


def detach() -> int:
    """Go on in a process of its own session; gives a descriptor to write to when all is well.

    The process that was started waits for that, and leaves with status 0 then, or with the status of
    the one that goes on.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.setsid()
        return tell
    os.close(tell)
    if os.read(ready, 1):
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)

"""ipykernel's debugger, without a port.

Upstream runs ``debugpy.listen`` in the kernel, which starts an adapter process with two loopback ports
that accept every client. Here the same adapter is connected to the kernel and to the kernel's pydevd by
pairs of sockets that no other process has; see `adapter`. It answers as before.

debugpy is imported when the first request comes that needs it; see `late_import`.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import sys
import threading
from _socket import socketpair
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import SCM_RIGHTS, SOL_SOCKET, socket
from struct import pack
from subprocess import DEVNULL, Popen
from typing import Any

from ipykernel.compiler import get_tmp_directory
from tornado.ioloop import IOLoop

from ..upstream import replaced
from . import adapter as debug_adapter
from .late_import import debugger, find_debugpy, import_debugpy

__all__ = ["PortlessDebugger", "check", "install"]

_Socket = socket  # which code in a cell may replace
_ADAPTER_ENDED = "the debug adapter has ended"


class _AdapterStream:
    """The connection to the adapter, in the place of DebugpyClient's ZeroMQ STREAM socket."""

    def __init__(self) -> None:
        self.on_recv: Callable[[str], object] = str
        self._adapter: _Socket | None = None
        self._process: Popen[bytes] | None = None
        self._connection: _Socket | None = None
        self.closed = asyncio.Event()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def socket(self) -> _AdapterStream:
        return self

    def getsockopt(self, _: int) -> bytes:
        return b"adapter"

    def connect(self, _: str) -> None:
        """Open a session with the adapter, on the event loop of the thread that calls."""
        self.disconnect("")
        self._connection = self._pass_on("Client")
        self._decoder.reset()
        self.closed.clear()
        IOLoop.current().add_handler(self._connection, self._read, IOLoop.READ)

    def disconnect(self, _: str) -> None:
        if self._connection is not None:
            IOLoop.current().remove_handler(self._connection)
            self._connection.close()
            self._connection = None

    def send_multipart(self, frames: Sequence[bytes]) -> None:
        if self._connection is None:
            raise ConnectionError("the debug adapter is not connected")
        self._connection.sendall(frames[-1])

    def _read(self, connection: _Socket, _: int) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if data:
            self.on_recv(self._decoder.decode(data))
        else:
            self.disconnect("")
            self.closed.set()

    def _pass_on(self, name: str) -> _Socket:
        """Give the adapter one end of a new pair of sockets, and return the other."""
        if self._adapter is None:
            self._adapter = self._start_adapter()
        elif self._process is None or self._process.poll() is not None:
            # pydevd does not connect a second time.
            raise ConnectionError(f"{_ADAPTER_ENDED}; restart the kernel to debug again")
        ours, theirs = _pair()
        with theirs:
            rights = SOL_SOCKET, SCM_RIGHTS, pack("i", theirs.fileno())
            self._adapter.sendmsg([name.encode()], [rights])
        return ours

    def _start_adapter(self) -> _Socket:
        ours, theirs = _pair()
        with theirs:
            self._process = Popen(  # noqa: S603
                [sys.executable, debug_adapter.__file__, str(theirs.fileno())],
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=DEVNULL,
                pass_fds=[theirs.fileno()],
                # An interrupt goes to the kernel's whole process group.
                start_new_session=True,
            )
        return ours

    def listen(self, address: tuple[str, int]) -> tuple[str, int]:
        """Do what ``debugpy.listen`` does, with a connection to the adapter that exists already."""
        import pydevd
        from debugpy.server import api

        if api.listen.called:
            # By the user's own code, perhaps. pydevd would ignore a second call.
            raise RuntimeError("debugpy.listen() or connect() has already been called on this process")
        connection = self._pass_on("Server")

        def connect(address: tuple[str, int], settrace_kwargs: dict[str, Any]) -> None:
            host, port = address
            # A child process could reach the adapter through a port only.
            settrace_kwargs["patch_multiprocessing"] = False
            with replaced(pydevd, start_client=lambda *_: connection):
                api._settrace(
                    host=host,
                    port=port,
                    wait_for_ready_to_run=False,
                    block_until_connected=True,
                    **settrace_kwargs,
                )

        api._starts_debugging(connect)(address)
        api.listen.called = True

        def leave() -> None:
            # The threads that would resume a child from a breakpoint are not in it, and the adapter
            # ends when no process holds the other end of its connections.
            import pydevd_tracing

            if getattr(pydevd_tracing, "PYDEVD_USE_SYS_MONITORING", False):
                from _pydevd_sys_monitoring import pydevd_sys_monitoring

                pydevd_sys_monitoring.stop_monitoring(all_threads=True)
            else:
                pydevd_tracing.SetTrace(None)  # sys.settrace is a warning by now
            threading.settrace(None)
            for end in (self._adapter, self._connection, connection):
                if end is not None:
                    end.close()

        os.register_at_fork(after_in_child=leave)
        return address


def _pair() -> tuple[_Socket, _Socket]:
    """Return a pair of sockets that block, whatever classes and defaults code in a cell has set."""
    pair = [_Socket(fileno=end.detach()) for end in socketpair()]
    for end in pair:
        # Shared with the adapter, which waits for data.
        end.settimeout(None)
    return pair[0], pair[1]


class PortlessDebugger(debugger.Debugger):
    """``ipykernel.debugger.Debugger`` whose adapter listens on no port."""

    def __init__(self, log: Any, _debugpy_stream: Any, *args: Any, **kwargs: Any) -> None:
        self._stream = _AdapterStream()
        with replaced(debugger, VariableExplorer=lambda: None):
            super().__init__(log, self._stream, *args, **kwargs)
        self._stream.on_recv = self.debugpy_client.receive_dap_frame
        # Not -1, for which upstream would bind a socket to find a free port.
        vars(self.debugpy_client)["debugpy_port"] = "0"

    async def process_request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer a request, in any case; the first that needs debugpy imports it."""
        try:
            if self.variable_explorer is None and message["command"] != "debugInfo":
                files = import_debugpy()
                self.variable_explorer = debugger.VariableExplorer()
                # Since 7.0 frames of what was imported when the kernel started are not shown.
                getattr(self, "kernel_modules", []).extend(files)
            reply: dict[str, Any] = await super().process_request(message)
        except Exception as error:
            self.log.exception("A request to the debugger failed")
            return {
                "type": "response",
                "request_seq": message.get("seq"),
                "success": False,
                "command": message.get("command"),
                "message": f"{type(error).__name__}: {error}",
            }
        return reply

    async def _forward_message(self, msg: dict[str, Any]) -> Any:
        """Ask the adapter, and wait no longer than it lives: control would be blocked for ever."""
        reply = asyncio.ensure_future(super()._forward_message(msg))
        closed = asyncio.ensure_future(self._stream.closed.wait())
        try:
            await asyncio.wait((reply, closed), return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                raise ConnectionError(_ADAPTER_ENDED)
            return reply.result()
        finally:
            closed.cancel()
            reply.cancel()

    def start(self) -> bool:
        """Start the debugger, and connect to its adapter."""
        import debugpy

        folder = Path(get_tmp_directory())
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            self.log.error("The debugger does not start: %s belongs to somebody else", folder)
            return False
        try:
            # Before 7.0 upstream leaves it to the umask, and code is dumped into it.
            folder.chmod(0o700)
        except OSError as error:
            self.log.warning("The mode of %s can't be made 0700: %s", folder, error.strerror)
        with replaced(debugpy, listen=self._stream.listen):
            started = bool(super().start())
        if not started:
            self.stop()  # upstream has connected all the same
        return started


def install() -> str | None:
    """Let kernels that are made from now on debug without a port.

    Returns
    -------
    str or None
        Why there is no debugger at all, where debugpy is of a version that can't be made safe.
    """
    debugger._is_debugpy_available = False
    try:
        if not find_debugpy():
            return None
    except Exception as error:  # noqa: BLE001  whatever is wrong with debugpy, the kernel starts
        return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
    vars(debugger)["Debugger"] = PortlessDebugger
    debugger._is_debugpy_available = True
    return None


def check(kernel: Any) -> str | None:
    """Take the debugger away from a kernel whose debugger is not a `PortlessDebugger`.

    Returns
    -------
    str or None
        Why the kernel has no debugger, if so.
    """
    if isinstance(getattr(kernel, "debugger", None), (PortlessDebugger, type(None))):
        return None
    debugger._is_debugpy_available = False
    return f"{type(kernel).__name__} has a debugger of its own, which may open a plaintext port"

"""The kernel provisioner that joins a running kernel: it starts and ends nothing."""

from __future__ import annotations

import asyncio
import shlex
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo, port_names
from jupyter_client.provisioning import KernelProvisionerBase
from traitlets import Unicode

from .. import connection_file, files
from ..client import BlockingKernelClient, ChannelNotForViewersError, NobodyThereError
from ..errors import CurveKernelError
from ..wire import read_mechanism
from .client_keys import use_client_keys
from .provisioner import StartError

__all__ = ["AttachProvisioner", "RestartRefusedError"]

_GRACE = 15.0
"""Seconds for which a kernel whose ports are closed may be restarting."""


class RestartRefusedError(StartError):
    """A kernel that others started is not restarted from here."""


class AttachProvisioner(KernelProvisionerBase):
    """Joins the running kernel of a connection file, with this user's own client key pair.

    ``python -m curve_kernel attach FILE`` writes the kernelspec that names it. To start that is to
    join: all who have joined, and whoever started the kernel, share its state. To shut it down is to
    leave: the kernel goes on. An interrupt goes to it as a message, and a restart is refused.
    """

    connection_file = Unicode(config=True, help="The running kernel's connection file.")
    server_key = Unicode(
        config=True, help="The public key that the kernel had when it was attached; empty for any."
    )

    _client: BlockingKernelClient | None = None
    _closed_since: float | None = None
    _end: CurveKernelError | None = None

    def __init__(self, **kwargs: Any) -> None:
        if unknown := sorted(set(kwargs) - set(self.trait_names())):
            raise StartError(
                f"the curve-attach-provisioner has no option {', '.join(unknown)}",
                "in its kernelspec's config there can be connection_file and server_key",
            )
        super().__init__(**kwargs)

    @property
    def has_process(self) -> bool:
        """Whether a kernel is joined."""
        return self._client is not None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Join the kernel, or say why that can't be.

        Raises
        ------
        StartError
            If the kernel has ended, has another key than before, or does not accept this user as an
            owner.
        """
        km = self.parent
        if km is None:
            raise StartError("the curve-attach-provisioner has no kernel manager")
        if Path(km.connection_file).resolve() == Path(self.connection_file).resolve():
            raise StartError(
                f"{self.connection_file} is the joined kernel's own connection file",
                "leave the manager's connection_file empty: it makes one of its own",
            )
        try:
            info = self._read()
            self._client = await asyncio.to_thread(_join, info)
        except CurveKernelError as error:
            raise self._explained(error) from None
        self._end = self._closed_since = None
        self.connection_info = _for_manager(info)
        return {**await super().pre_launch(**kwargs), "cmd": []}

    def _read(self) -> dict[str, Any]:
        if files.is_gone(self.connection_file):
            raise StartError(f"the kernel of {self.connection_file} has ended: its file is gone")
        info = connection_file.read(self.connection_file)
        if self.server_key and info.get("curve_publickey") != self.server_key:
            raise StartError(
                f"the kernel of {self.connection_file} was started anew, with another key",
                f"if that is right: python -m curve_kernel attach {shlex.quote(self.connection_file)}",
            )
        return info

    def _explained(self, error: CurveKernelError) -> StartError:
        message, hint = error.message, error.hint
        if isinstance(error, NobodyThereError):
            message = f"the kernel of {self.connection_file} has ended, or can't be reached: {message}"
        elif isinstance(error, ChannelNotForViewersError):
            message = "you may watch this kernel, and not use it: it lists you as a viewer"
            hint = f"python -m curve_kernel watch --web {shlex.quote(self.connection_file)}"
        return StartError(message, hint)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:  # noqa: ARG002
        """Return where the kernel is."""
        return self.connection_info

    async def post_launch(self, **kwargs: Any) -> None:  # noqa: ARG002
        """Give the manager the client key pair, and take its power over the kernel."""
        km: Any = self.parent
        client = self._joined
        assert client.client_keys is not None
        assert client.curve_publickey is not None
        km._close_control_socket()
        use_client_keys(km, client.client_keys, client.curve_publickey)
        connection_file.update(km.connection_file, {"curve_publickey": client.curve_publickey.decode()})
        km.client_factory = _leaving(km.client_factory)
        km.blocking_class = _leaving(km.blocking_class)
        km._connect_control_socket = self._connect_manager
        km.restart_kernel = self._refuse_restart

    @property
    def _joined(self) -> BlockingKernelClient:
        assert self._client is not None
        return self._client

    def _connect_manager(self) -> None:
        km: Any = self.parent
        km._control_socket = _InterruptsOnly(self)

    def interrupt(self, frames: list[bytes]) -> None:
        """Pass an interrupt on, unless it is the one that comes before a shutdown."""
        if self._client is not None and self.parent is not None and not self.parent.shutting_down:
            self._client.control_channel.socket.send_multipart(frames)

    def _refuse_restart(self, *_: Any, **__: Any) -> Any:
        km: Any = self.parent
        error = RestartRefusedError(
            f"the kernel of {self.connection_file} is not restarted, it goes on as it was: you have"
            " joined it, and others may use it",
            "choose the kernel again to go on with it; only who started it can restart it",
        )
        if not hasattr(km, "reason"):
            raise error
        # A server's page shows no error of a restart, but it connects again after one.
        km.stop_restarter()
        self._leave()  # the server will let go of this manager without another word
        self._refuse_connections(error)

        async def done() -> None:
            self.log.warning("%s", error)

        return done()

    def _refuse_connections(self, error: CurveKernelError) -> None:
        """Let a page's next connection to the kernel fail with *error*, which it then shows."""
        ready: Future[None] = Future()
        ready.set_exception(error)
        km: Any = self.parent
        km._ready = ready
        # A server drops a manager that is not ready as it is.
        km.cleanup_connection_file()

    async def poll(self) -> int | None:
        """Tell whether the kernel runs and accepts this user: None if so.

        Silence is not death, and a kernel that its own manager restarts comes back.
        """
        if self._client is None:
            return 0
        if self._end is not None:
            return 1
        end: CurveKernelError | None = self._client.refusal
        if end is None and not self._client.connected:
            end = await self._look(self._client._make_url("control"))
        else:
            self._closed_since = None
        if end is not None:
            self._tell(end)
        return None  # this time, so that nobody tries to restart it

    async def _look(self, url: str) -> CurveKernelError | None:
        try:
            await asyncio.to_thread(read_mechanism, url, 0.5)
        except (ConnectionRefusedError, FileNotFoundError):
            now = time.monotonic()
            self._closed_since = self._closed_since or now
            if now - self._closed_since > _GRACE or files.is_gone(self.connection_file):
                return StartError(f"the kernel of {self.connection_file} has ended")
        except (OSError, ValueError, RuntimeError):  # the last at the interpreter's exit
            pass
        return None

    def _tell(self, end: CurveKernelError) -> None:
        km: Any = self.parent
        self._end = end
        self.log.warning("The kernel that was joined is gone: %s", end)
        km.stop_restarter()
        if restarter := getattr(km, "_restarter", None):
            if shows_reason := hasattr(km, "reason"):
                self._refuse_connections(self._explained(end))
            # At "restart" a page connects again; "dead" it takes without a word.
            restarter._fire_callbacks("restart" if shows_reason else "dead")

    async def wait(self) -> int | None:
        """Return at once: there is no process of ours."""
        return 0

    async def send_signal(self, signum: int) -> None:
        """Send an interrupt as a message; no other signal reaches a kernel that others started."""
        if signum == signal.SIGINT and self._client is not None and self.parent is not None:
            session = self.parent.session
            frames = session.serialize(session.msg("interrupt_request", content={}))
            self.interrupt(frames)

    async def shutdown_requested(self, restart: bool = False) -> None:  # noqa: ARG002
        """Leave."""
        self._leave()

    async def terminate(self, restart: bool = False) -> None:  # noqa: ARG002
        """Leave."""
        self._leave()

    async def kill(self, restart: bool = False) -> None:  # noqa: ARG002
        """Leave."""
        self._leave()

    async def cleanup(self, restart: bool = False) -> None:  # noqa: ARG002
        """Leave."""
        self._leave()

    def _leave(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.stop_channels()


class _InterruptsOnly:
    """A manager's control socket that drops what it would send at a shutdown."""

    linger = 0

    def __init__(self, provisioner: AttachProvisioner) -> None:
        self._provisioner = provisioner

    def send_multipart(self, frames: list[bytes], **_: Any) -> None:
        km: Any = self._provisioner.parent
        header = km.session.unpack(frames[2])  # after the delimiter and the signature
        if header["msg_type"] == "interrupt_request":
            self._provisioner.interrupt(frames)

    def close(self) -> None:
        """Do nothing: the connection is the provisioner's."""


def _join(info: dict[str, Any]) -> BlockingKernelClient:
    """Make sure that every channel accepts this user; then keep control, which tells how it goes on."""
    client = BlockingKernelClient()
    client.load_connection_info(info)
    client.start_channels(hb=False)
    client.stop_channels()
    client = BlockingKernelClient(client_keys=client.client_keys)
    client.load_connection_info(info)
    client.start_channels(shell=False, iopub=False, stdin=False, hb=False)
    return client


def _for_manager(info: dict[str, Any]) -> Any:
    """Return what the manager writes into a file of its own; it gets the keys later."""
    fields = ("transport", "ip", "signature_scheme", *port_names)
    return {"transport": "tcp", "signature_scheme": "hmac-sha256"} | {
        **{field: info[field] for field in fields if field in info},
        "key": str(info.get("key") or "").encode(),
    }


def _leaving(factory: type) -> type:
    """Make a client class whose ``shutdown`` leaves the kernel alone: a console calls it at its end."""

    class JoinedClient(factory):
        def shutdown(self, *_: Any, **__: Any) -> str:
            return ""

    JoinedClient.__name__, JoinedClient.__qualname__ = factory.__name__, factory.__qualname__
    return JoinedClient

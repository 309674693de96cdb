"""Kernel clients with a key pair of their own; see `curve_kernel.client`."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import zmq
from jupyter_client import KernelClient, asynchronous, blocking, threaded
from jupyter_client.connect import KernelConnectionInfo, channel_socket_types
from jupyter_client.utils import ensure_async, run_sync
from traitlets import Instance, TraitError

from .. import connection_file as files
from .. import keys, sockets
from ..errors import CurveKernelError
from ..keys import KeyPair
from ..keys.certificates import load_identity
from ..keys.ticket import ticket_pair
from .context import AsyncContext, Context
from .handshake import (
    ChannelNotForViewersError,
    ConnectionRefusedByKernelError,
    Handshake,
    KeyNotAuthorizedError,
    NobodyThereError,
    NoCurveServerError,
    WrongServerKeyError,
    explain,
    mechanism_at,
    wait,
    wait_async,
)
from .heartbeat import keyed_heartbeat

__all__ = ["AsyncKernelClient", "BlockingKernelClient", "ThreadedKernelClient"]

_TIMEOUT = 2.5
_INTERVAL = 0.5
"""Seconds between two looks whether the kernel still accepts this client, while a call waits."""
_DISCONNECTIONS = 5
"""A kernel that ends, or an ssh tunnel to one, disconnects too, but not again and again."""
_CHANNELS = [f"_{name}_channel" for name in ("shell", "iopub", "stdin", "hb", "control")]
_NEVER_USED = SimpleNamespace(is_alive=lambda: False, close=lambda: None)
"""In the place of a channel that was not used."""


class _CurveClient(KernelClient):
    """What the three clients share; mixed into jupyter_client's classes.

    Once started, a client watches its connections: a call that waits for the kernel does so.
    """

    client_keys = Instance(
        KeyPair,
        allow_none=True,
        help="""This client's key pair. None takes the pair of a connection file that holds both
        keys, else this user's identity, else a fresh pair.""",
    )
    _handshakes: tuple[Handshake, ...] = ()
    _new_handshakes: list[Handshake] | None = None
    _refusal: ConnectionRefusedByKernelError | None = None

    _context_class: type[Context] = Context

    def __init__(self, **kwargs: Any) -> None:
        self._lock = threading.RLock()  # channels may be read in several threads
        super().__init__(**kwargs)

    def _context_default(self) -> Any:
        self._created_context = True
        return self._context_class()

    def load_connection_file(self, connection_file: str | None = None) -> None:
        """Load a connection file, which nobody but this user and root may be able to write.

        Raises
        ------
        CurveKernelError
            If somebody else may write it or its folder, and so lead this client to any kernel, or if it
            can't be read. Also as `load_connection_info`.
        """
        self.load_connection_info(files.read(connection_file or self.connection_file))

    def load_connection_info(self, info: Mapping[str, Any]) -> None:
        """Load connection info, of which the public key is enough.

        Raises
        ------
        NoCurveServerError
            If there is no public key in it: these clients do not speak plaintext.
        CurveKernelError
            If a key or another field is malformed.
        """
        keys.require_curve()
        if info.get("curve_publickey") is None:
            raise NoCurveServerError(
                "the connection file has no curve_publickey, so its kernel speaks plaintext",
                "start a kernel that encrypts, such as python3-curve, or use a stock client",
            )
        found = {
            field: keys.parse(info[field], f"{field} in the connection file")
            for field in ("curve_publickey", "curve_secretkey")
            if info.get(field) is not None
        }
        files.check_address("of the kernel", info)
        plain = {name: value for name, value in info.items() if name not in found}
        try:
            super().load_connection_info(cast(KernelConnectionInfo, plain))
        except (TraitError, AttributeError, TypeError, ValueError):
            raise CurveKernelError(
                "the connection file has a field of the wrong kind",
                "get the connection file that the kernel or its launcher wrote",
            ) from None
        self.client_keys = self.client_keys or ticket_pair(info)
        self.curve_publickey = found["curve_publickey"]
        self.curve_secretkey = found.get("curve_secretkey")

    def _own_keys(self) -> KeyPair:
        if self.client_keys is None:
            public_key, secret_key = self.curve_publickey, self.curve_secretkey
            held = KeyPair(public_key, secret_key) if public_key and secret_key else None
            self.client_keys = held or load_identity() or KeyPair.generate()
        own: KeyPair = self.client_keys
        return own

    def _create_connected_socket(self, channel: str, identity: bytes | None = None) -> zmq.Socket[Any]:
        if self.curve_publickey is None:
            raise NoCurveServerError(
                "no server key is known, so nothing can be encrypted",
                "load a connection file that has curve_publickey",
            )
        socket: zmq.Socket[Any] = self.context.socket(channel_socket_types[channel])
        socket.linger = 1000
        if identity:
            socket.identity = identity
        socket.ipv6 = ":" in self.ip
        sockets.make_client(socket, self._own_keys(), self.curve_publickey)
        if self._new_handshakes is not None:
            self._new_handshakes.append(Handshake(channel, socket))
        try:
            socket.connect(self._make_url(channel))
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise CurveKernelError(
                f"the connection file's address of {channel} can't be connected to: {error.strerror}",
                "get the connection file that the kernel or its launcher wrote",
            ) from None
        return socket

    @property
    def hb_channel(self) -> Any:
        """The heartbeat channel, with this client's own key pair."""
        if self._hb_channel is None:
            self.hb_channel_class = keyed_heartbeat(self.hb_channel_class, self._own_keys())
        return super().hb_channel

    def start_channels(self, *args: Any, **kwargs: Any) -> None:
        """Start the channels, and make sure that each is connected.

        Raises
        ------
        ConnectionRefusedByKernelError
            The subclass that fits, within five seconds.
        """
        self._start_channels(*args, **kwargs)
        wait(self._handshakes, _TIMEOUT)
        self._check()

    def _start_channels(self, *args: Any, **kwargs: Any) -> None:
        self._refusal = None
        new = self._new_handshakes = []
        try:
            super().start_channels(*args, **kwargs)
        except BaseException:
            for handshake in new:
                handshake.close()
            raise
        finally:
            self._new_handshakes = None
        self._handshakes = tuple(new)

    def stop_channels(self) -> None:
        """Stop the channels.

        Upstream's heartbeat thread that is told to stop before it runs does not, and makes socket after
        socket until there are no more. So it is waited for.
        """
        hb, deadline = self._hb_channel, time.monotonic() + _TIMEOUT
        while hb is not None and hb.is_alive() and not hb._running and time.monotonic() < deadline:
            time.sleep(0.001)
        self._stop_watching()
        # Upstream asks each channel whether it is alive, and makes it for that.
        unused = [name for name in _CHANNELS if getattr(self, name) is None]
        try:
            for name in unused:
                setattr(self, name, _NEVER_USED)
            super().stop_channels()
        finally:
            for name in unused:
                setattr(self, name, None)

    def _stop_watching(self) -> None:
        with self._lock:
            for handshake in self._handshakes:
                handshake.close()
            self._handshakes = ()

    @property
    def refusal(self) -> ConnectionRefusedByKernelError | None:
        """Why the kernel does not accept this client any more; None as long as it does.

        A client that was connected is refused later if it was revoked, has become a viewer, or if
        another kernel has the ports now. Whatever waits for the kernel raises this error then, after
        the messages that are there already, and ``is_alive()`` is False.
        """
        with self._lock:
            if self._handshakes and self._refusal is None:
                for handshake in self._handshakes:
                    handshake.read()
                    if handshake.disconnections >= _DISCONNECTIONS:
                        self._suspect(handshake)
                self._refusal = self._find_refusal()
                if self._refusal is not None:
                    self._stop_watching()
            return self._refusal

    @property
    def connected(self) -> bool:
        """Whether every channel was connected, as of the last look at `refusal`."""
        return all(handshake.up for handshake in self._handshakes)

    @property
    def connections(self) -> int:
        """How often the channels have been connected, all together, as of that look."""
        return sum(handshake.connections for handshake in self._handshakes)

    def _suspect(self, handshake: Handshake) -> None:
        """Tell another kernel from none: an ssh tunnel to a kernel that restarts disconnects, too."""
        mechanism = mechanism_at(self._make_url(handshake.channel), _INTERVAL)
        if mechanism not in ("CURVE", None):
            handshake.fail(NoCurveServerError)
        elif mechanism and handshake.suspected:
            handshake.fail(WrongServerKeyError)
        handshake.suspected, handshake.disconnections = bool(mechanism), 0

    def _find_refusal(self) -> ConnectionRefusedByKernelError | None:
        failed = next((handshake for handshake in self._handshakes if handshake.outcome), None)
        if failed is None or failed.outcome is None:
            return None
        outcome, url = failed.outcome, self._make_url(failed.channel)
        if outcome is WrongServerKeyError and (mechanism := mechanism_at(url, _INTERVAL)) != "CURVE":
            # Which side of a mismatch disconnects first is a matter of chance.
            outcome = NobodyThereError if mechanism is None else NoCurveServerError
        if outcome is KeyNotAuthorizedError and self._sees_outputs():
            outcome = ChannelNotForViewersError
        return explain(outcome, failed, url, self._own_keys())

    def _check(self) -> None:
        refusal = self._refusal = self._find_refusal()
        if refusal is not None:
            self.stop_channels()
            raise refusal

    def _raise_refusal(self) -> None:
        if (refusal := self.refusal) is not None:
            raise refusal

    def _sees_outputs(self) -> bool:
        iopub = [handshake for handshake in self._handshakes if handshake.channel == "iopub"]
        if iopub:
            wait(iopub, _INTERVAL)
            return iopub[0].up
        self._new_handshakes = iopub
        socket = self._create_connected_socket("iopub")
        self._new_handshakes = None
        wait(iopub, _INTERVAL)
        iopub[0].close()
        socket.close(linger=0)
        return iopub[0].up

    async def _receive(self, channel: Any, timeout: float | None = None) -> dict[str, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _INTERVAL if deadline is None else max(deadline - time.monotonic(), 0)
            try:
                message: dict[str, Any] = await ensure_async(
                    channel.get_msg(timeout=min(left, _INTERVAL))
                )
            except queue.Empty:
                self._raise_refusal()
                if deadline is not None and left <= _INTERVAL:
                    raise
            else:
                return message

    async def _async_get_shell_msg(self, timeout: float | None = None) -> dict[str, Any]:
        return await self._receive(self.shell_channel, timeout)

    async def _async_get_iopub_msg(self, timeout: float | None = None) -> dict[str, Any]:
        return await self._receive(self.iopub_channel, timeout)

    async def _async_get_stdin_msg(self, timeout: float | None = None) -> dict[str, Any]:
        return await self._receive(self.stdin_channel, timeout)

    async def _async_get_control_msg(self, timeout: float | None = None) -> dict[str, Any]:
        return await self._receive(self.control_channel, timeout)

    async def _async_is_alive(self) -> bool:
        return self.refusal is None and await super()._async_is_alive()

    async def _async_wait_for_ready(self, timeout: float | None = None) -> None:
        try:
            await super()._async_wait_for_ready(timeout)
        except RuntimeError:
            self._raise_refusal()
            raise

    async def _async_execute_interactive(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        running = asyncio.ensure_future(super()._async_execute_interactive(*args, **kwargs))
        try:
            while not (await asyncio.wait([running], timeout=_INTERVAL))[0]:
                self._raise_refusal()
            return await running
        finally:
            running.cancel()


class BlockingKernelClient(_CurveClient, blocking.BlockingKernelClient):
    """``jupyter_client.BlockingKernelClient`` with a key pair of its own."""

    get_shell_msg = run_sync(_CurveClient._async_get_shell_msg)
    get_iopub_msg = run_sync(_CurveClient._async_get_iopub_msg)
    get_stdin_msg = run_sync(_CurveClient._async_get_stdin_msg)
    get_control_msg = run_sync(_CurveClient._async_get_control_msg)
    is_alive = run_sync(_CurveClient._async_is_alive)
    wait_for_ready = run_sync(_CurveClient._async_wait_for_ready)
    execute_interactive = run_sync(_CurveClient._async_execute_interactive)


class ThreadedKernelClient(_CurveClient, threaded.ThreadedKernelClient):
    """``jupyter_client.threaded.ThreadedKernelClient`` with a key pair of its own.

    It waits for nothing that could raise, so look at `refusal` or ``is_alive()``.
    """

    def is_alive(self) -> bool:
        """Tell whether the kernel lives, and still accepts this client."""
        return self.refusal is None and super().is_alive()


class AsyncKernelClient(_CurveClient, asynchronous.AsyncKernelClient):
    """``jupyter_client.AsyncKernelClient`` with a key pair of its own."""

    get_shell_msg = _CurveClient._async_get_shell_msg
    get_iopub_msg = _CurveClient._async_get_iopub_msg
    get_stdin_msg = _CurveClient._async_get_stdin_msg
    get_control_msg = _CurveClient._async_get_control_msg
    is_alive = _CurveClient._async_is_alive
    execute_interactive = _CurveClient._async_execute_interactive
    _context_class = AsyncContext

    def start_channels(self, *args: Any, **kwargs: Any) -> None:
        """Start the channels; `wait_for_ready` tells whether they are connected.

        Raises
        ------
        ConnectionRefusedByKernelError
            Only where no event loop runs in this thread: then here, as for the blocking client.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            super().start_channels(*args, **kwargs)
        else:
            self._start_channels(*args, **kwargs)

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        """Wait until the kernel answers.

        Raises
        ------
        ConnectionRefusedByKernelError
            The subclass that fits, within five seconds.
        RuntimeError
            As stock, if the kernel does not answer in *timeout* seconds.
        """
        await wait_async(self._handshakes, _TIMEOUT)
        self._check()
        await self._async_wait_for_ready(timeout=timeout)

"""Kernel clients with a key pair of their own; see `curve_kernel.client`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, cast

import zmq
from jupyter_client import KernelClient, asynchronous, blocking, threaded
from jupyter_client.connect import KernelConnectionInfo, channel_socket_types
from traitlets import Instance, TraitError

from .. import keys, sockets
from ..errors import CurveKernelError
from ..keys import KeyPair
from ..keys.certificates import load_identity
from ..wire import read_mechanism
from .handshake import (
    ChannelNotForViewersError,
    ConnectionRefusedByKernelError,
    Handshake,
    KeyNotAuthorizedError,
    NobodyThereError,
    NoCurveServerError,
    WrongServerKeyError,
    wait,
)
from .heartbeat import keyed_heartbeat

__all__ = ["AsyncKernelClient", "BlockingKernelClient", "ThreadedKernelClient"]

_TIMEOUT = 2.5


class _CurveClient(KernelClient):
    """What the three clients share; mixed into jupyter_client's classes."""

    client_keys = Instance(
        KeyPair,
        allow_none=True,
        help="""This client's key pair. None takes the pair of a connection file that holds both
        keys, else this user's identity, else a fresh pair.""",
    )
    _handshakes: list[Handshake] | None = None

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
        plain = {name: value for name, value in info.items() if name not in found}
        try:
            super().load_connection_info(cast(KernelConnectionInfo, plain))
        except (TraitError, AttributeError, TypeError, ValueError):
            raise CurveKernelError(
                "the connection file has a field of the wrong kind",
                "get the connection file that the kernel or its launcher wrote",
            ) from None
        self.curve_publickey = found["curve_publickey"]
        self.curve_secretkey = found.get("curve_secretkey")

    def _own_keys(self) -> KeyPair:
        if self.client_keys is None:
            if self.curve_publickey is not None and self.curve_secretkey is not None:
                self.client_keys = KeyPair(self.curve_publickey, self.curve_secretkey)
            else:
                self.client_keys = load_identity() or KeyPair.generate()
        own: KeyPair = self.client_keys
        return own

    def _create_connected_socket(self, channel: str, identity: bytes | None = None) -> zmq.Socket[Any]:
        if self.curve_publickey is None:
            raise NoCurveServerError(
                "no server key is known, so nothing can be encrypted",
                "load a connection file that has curve_publickey",
            )
        own = self._own_keys()
        socket: zmq.Socket[Any] = self.context.socket(channel_socket_types[channel])
        socket.linger = 1000
        if identity:
            socket.identity = identity
        sockets.make_client(socket, own, self.curve_publickey)
        if self._handshakes is not None:
            self._handshakes.append(Handshake(channel, socket))
        socket.connect(self._make_url(channel))
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
        handshakes = self._start_and_watch(*args, **kwargs)
        wait(handshakes, _TIMEOUT)
        self._check(handshakes)

    def stop_channels(self) -> None:
        """Stop the channels.

        Upstream's heartbeat thread that is told to stop before it runs does not, and makes socket after
        socket until there are no more. So it is waited for.
        """
        hb, deadline = self._hb_channel, time.monotonic() + _TIMEOUT
        while hb is not None and hb.is_alive() and not hb._running and time.monotonic() < deadline:
            time.sleep(0.001)
        super().stop_channels()

    def _start_and_watch(self, *args: Any, **kwargs: Any) -> list[Handshake]:
        handshakes = self._handshakes = []
        try:
            super().start_channels(*args, **kwargs)
        except BaseException:
            wait(handshakes, 0)
            raise
        finally:
            self._handshakes = None
        return handshakes

    def _check(self, handshakes: list[Handshake]) -> None:
        failed = next((one for one in handshakes if one.outcome), None)
        if failed is None or failed.outcome is None:
            return
        outcome = failed.outcome
        if outcome is WrongServerKeyError and not _speaks_curve(self._make_url(failed.channel)):
            # Which side of a mismatch hangs up first is a matter of chance.
            outcome = NoCurveServerError
        if outcome is KeyNotAuthorizedError and self._sees_outputs(handshakes):
            outcome = ChannelNotForViewersError
        self.stop_channels()
        raise _explain(outcome, failed.channel, self._make_url(failed.channel), self._own_keys())

    def _sees_outputs(self, handshakes: list[Handshake]) -> bool:
        iopub = [one for one in handshakes if one.channel == "iopub"]
        if iopub:
            return iopub[0].outcome is None
        extra = self._handshakes = []
        socket = self._create_connected_socket("iopub")
        self._handshakes = None
        wait(extra, 0.5)
        socket.close(linger=0)
        return extra[0].outcome is None


def _speaks_curve(url: str) -> bool:
    try:
        return read_mechanism(url, timeout=0.5) == "CURVE"
    except (OSError, ValueError):
        return False


def _explain(
    outcome: type[ConnectionRefusedByKernelError], channel: str, url: str, own: KeyPair
) -> ConnectionRefusedByKernelError:
    shown = own.public_key.decode()
    texts = {
        KeyNotAuthorizedError: (
            f"key not authorized: the kernel at {url} does not list this client's key {shown}",
            "the kernel's user can list it: python -m curve_kernel authorize CERTIFICATE --name NAME",
        ),
        ChannelNotForViewersError: (
            f"channel {channel} is not for viewers, and this client is listed as one",
            "python -m curve_kernel watch shows what a viewer may see; owners may do everything",
        ),
        WrongServerKeyError: (
            f"the server at {url} hung up: it has not the server key in the connection file",
            "the kernel was started anew, or something else has its port: get its new connection file",
        ),
        NoCurveServerError: (
            f"the server at {url} speaks no CURVE",
            "it is no encrypted kernel, and nothing was sent to it: see the connection file's ports",
        ),
        NobodyThereError: (
            f"nobody answers at {url}",
            "see whether the kernel still runs, and whether its address can be reached from here",
        ),
    }
    message, hint = texts[outcome]
    if outcome is NobodyThereError and "//0.0.0.0:" in url:
        hint = "0.0.0.0 is any address of the kernel's machine: write one of those into the file as ip"
    return outcome(message, hint)


class BlockingKernelClient(_CurveClient, blocking.BlockingKernelClient):
    """``jupyter_client.BlockingKernelClient`` with a key pair of its own."""


class ThreadedKernelClient(_CurveClient, threaded.ThreadedKernelClient):
    """``jupyter_client.threaded.ThreadedKernelClient`` with a key pair of its own."""


class AsyncKernelClient(_CurveClient, asynchronous.AsyncKernelClient):
    """``jupyter_client.AsyncKernelClient`` with a key pair of its own."""

    _connecting: asyncio.Future[None] | None = None
    _watched: list[Handshake] = []  # noqa: RUF012  never changed, only replaced

    def start_channels(self, *args: Any, **kwargs: Any) -> None:
        """Start the channels; `wait_for_ready` tells whether they are connected.

        Raises
        ------
        ConnectionRefusedByKernelError
            Only where no event loop runs in this thread: then here, as for the blocking client.
        """
        self._watched = self._start_and_watch(*args, **kwargs)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            wait(self._watched, _TIMEOUT)
            self._check(self._watched)
        else:
            self._connecting = loop.run_in_executor(None, wait, self._watched, _TIMEOUT)

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        """Wait until the kernel answers.

        Raises
        ------
        ConnectionRefusedByKernelError
            The subclass that fits, within five seconds.
        RuntimeError
            As stock, if the kernel does not answer in *timeout* seconds.
        """
        if self._connecting is not None:
            await self._connecting
            self._check(self._watched)
        await self._async_wait_for_ready(timeout=timeout)

"""Kernel clients with a key pair of their own, drop-in for jupyter_client's.

They need to know only the server's public key::

    from curve_kernel.client import BlockingKernelClient

    client = BlockingKernelClient(connection_file="kernel-1234.json")
    client.load_connection_file()
    client.start_channels()

A connection that is refused or impossible is an exception within five seconds, where stock waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any, cast

import zmq
from jupyter_client import KernelClient, asynchronous, blocking, threaded
from jupyter_client.connect import KernelConnectionInfo, channel_socket_types
from traitlets import Instance, TraitError
from zmq.utils.monitor import parse_monitor_message

from . import keys, sockets
from .errors import CurveKernelError
from .identity import load_identity
from .keys import KeyPair
from .wire import read_mechanism

__all__ = [
    "AsyncKernelClient",
    "BlockingKernelClient",
    "ChannelNotForViewersError",
    "ConnectionRefusedByKernelError",
    "Handshake",
    "KeyNotAuthorizedError",
    "NoCurveServerError",
    "NobodyThereError",
    "ThreadedKernelClient",
    "WrongServerKeyError",
]

_TIMEOUT = 2.5
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)


class ConnectionRefusedByKernelError(CurveKernelError):
    """A kernel can't be talked to; the subclass says why."""


class KeyNotAuthorizedError(ConnectionRefusedByKernelError):
    """The kernel has an allowlist, and this client's key is not on it."""


class ChannelNotForViewersError(ConnectionRefusedByKernelError):
    """The client is listed as a viewer, and asked for a channel that can run code."""


class WrongServerKeyError(ConnectionRefusedByKernelError):
    """The server does not hold the secret key that belongs to the connection file's public key."""


class NoCurveServerError(ConnectionRefusedByKernelError):
    """The server, or its connection file, knows nothing of CURVE."""


class NobodyThereError(ConnectionRefusedByKernelError):
    """Nobody answers at the connection file's address."""


class Handshake:
    """The fate of one socket's connection, read from its monitor.

    Parameters
    ----------
    channel : str
        The channel's name.
    socket : zmq.Socket
        A CURVE client that is not connected yet.
    """

    def __init__(self, channel: str, socket: zmq.Socket[Any]) -> None:
        self.channel = channel
        self.outcome: type[ConnectionRefusedByKernelError] | None = None
        self.done = False
        self._socket = socket
        self._hung_up = 0
        endpoint = f"inproc://curve-kernel-handshake-{id(self)}"
        socket.monitor(endpoint, _EVENTS)
        # A socket of the plain kind, also where the client's are asyncio's.
        context: zmq.Context[Any] = zmq.Context.shadow(socket.context.underlying)
        self.monitor: zmq.Socket[Any] = context.socket(zmq.PAIR)
        self.monitor.linger = 0
        self.monitor.connect(endpoint)

    def read(self) -> None:
        """Take in the events that are there."""
        while not self.done and self.monitor.poll(0):
            self._take(parse_monitor_message(self.monitor.recv_multipart())["event"])

    def _take(self, event: int) -> None:
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.done = True
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._fail(KeyNotAuthorizedError)
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._fail(NoCurveServerError)
            case zmq.EVENT_DISCONNECTED:
                # A CURVE server hangs up on a HELLO that was made for another server key. So does a
                # kernel that ends just now; that one does not accept a second time.
                self._hung_up += 1
                if self._hung_up == 2:
                    self._fail(WrongServerKeyError)

    def _fail(self, outcome: type[ConnectionRefusedByKernelError]) -> None:
        self.done, self.outcome = True, outcome

    def close(self) -> None:
        """Stop watching; who has not decided by now is nobody."""
        if not self.done:
            self._fail(NobodyThereError if not self._hung_up else WrongServerKeyError)
        with contextlib.suppress(zmq.ContextTerminated):
            if not self._socket.closed:
                self._socket.disable_monitor()
        self.monitor.close()


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

    def start_channels(self, *args: Any, **kwargs: Any) -> None:
        """Start the channels, and make sure that each is connected.

        Raises
        ------
        ConnectionRefusedByKernelError
            The subclass that fits, within five seconds.
        """
        handshakes = self._start_and_watch(*args, **kwargs)
        _wait(handshakes, _TIMEOUT)
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
            _wait(handshakes, 0)
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
        _wait(extra, 0.5)
        socket.close(linger=0)
        return extra[0].outcome is None


def _wait(handshakes: list[Handshake], timeout: float) -> None:
    """Wait until each handshake has come to an end, then stop watching; all of it in one thread."""
    deadline = time.monotonic() + timeout
    try:
        while waiting := [one.monitor for one in handshakes if not one.done]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            zmq.select(waiting, [], [], timeout=left)
            for one in handshakes:
                one.read()
    except zmq.ContextTerminated:
        pass  # stop_channels has called it off
    finally:
        for one in handshakes:
            one.close()


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
            _wait(self._watched, _TIMEOUT)
            self._check(self._watched)
        else:
            self._connecting = loop.run_in_executor(None, _wait, self._watched, _TIMEOUT)

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

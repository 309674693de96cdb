"""Which client may use which channel: ZAP, and a log of who was let in and who was not.

ZAP (https://rfc.zeromq.org/spec/27/) sees a peer only once its CURVE handshake has proved that it holds
its secret key and knows the server key. Whoever fails before that is seen by libzmq's socket monitors.
"""

from __future__ import annotations

import collections
import logging
import os
import socket
import threading
import time
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from .identity import MANAGER, AuthorizedClients

__all__ = ["AuditLog", "ClientAuthenticator", "HandshakeMonitor"]

VIEWER_CHANNELS = frozenset({"iopub", "hb"})

# Values of HANDSHAKE_FAILED_PROTOCOL, from libzmq's zmq.h; pyzmq has no names for them.
_REASONS = {0x11000001: "wrong server key", 0x11000002: "no CURVE, plaintext perhaps"}
_LEFT = -1


class AuditLog:
    """Says who was let in and who was not, a bounded number of lines a minute.

    What exceeds the bound is counted, and the counts are logged when the minute is over.

    Parameters
    ----------
    log : logging.Logger
        Gets the lines: info for who was let in, warning for who was refused.
    limit : int
        Lines of either kind in each period.
    period : float
        Seconds.
    """

    def __init__(self, log: logging.Logger, limit: int = 30, period: float = 60) -> None:
        self._log = log
        self._limit = limit
        self._period = period
        self._lock = threading.Lock()
        self._start = 0.0
        self._lines: collections.Counter[int] = collections.Counter()
        self._left_out: collections.Counter[str] = collections.Counter()

    def let_in(self, channel: str, address: str, who: str) -> None:
        """Log that *who* was let in."""
        self._add(logging.INFO, "let in", f"{channel}: let in {who} from {address}")

    def refused(self, channel: str, address: str, why: str, detail: str = "") -> None:
        """Log that a peer was refused, and why; *detail* is not part of what is counted."""
        self._add(logging.WARNING, why, f"{channel}: refused a client from {address}: {why}{detail}")

    def left(self, channel: str, address: str) -> None:
        """Log that a peer left during the handshake: a plaintext client that saw CURVE, or a probe."""
        line = f"{channel}: a client from {address} left during the handshake, plaintext perhaps"
        self._add(logging.INFO, "left during the handshake", line)

    def _add(self, level: int, kind: str, line: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._start >= self._period:
                self._report()
                self._start = now
            self._lines[level] += 1
            if self._lines[level] <= self._limit:
                self._log.log(level, line)
                return
            if not self._left_out:
                timer = threading.Timer(self._start + self._period - now, self.flush)
                timer.daemon = True
                timer.start()
            self._left_out[kind] += 1

    def flush(self) -> None:
        """Log the counts of what was left out so far."""
        with self._lock:
            self._report()

    def _report(self) -> None:
        if self._left_out:
            counts = ", ".join(f"{count} x {kind}" for kind, count in self._left_out.most_common())
            self._log.warning(
                "%d connections were not logged one by one: %s", self._left_out.total(), counts
            )
        self._lines.clear()
        self._left_out.clear()


class ClientAuthenticator(ThreadAuthenticator):
    """Decides for each handshake by the client's public key and the channel.

    Start it before the first socket binds: it serves every CURVE server of its context that has a ZAP
    domain, and the domain is the channel's name.

    Parameters
    ----------
    context : zmq.Context
        The context of the sockets.
    manager_key : bytes
        The kernel's own public key, 40 bytes of Z85: who holds its secret may use every channel.
    clients : AuthorizedClients
        The clients that are listed.
    anybody : bool
        Let in whoever has the server key; the list then only gives names.
    audit : AuditLog
        Is told of each decision.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        manager_key: bytes,
        clients: AuthorizedClients,
        *,
        anybody: bool,
        audit: AuditLog,
    ) -> None:
        # pyzmq logs each request at debug level, a peer's own bytes among it. User code that logs
        # everything must not get to show them in the notebook.
        log = logging.getLogger("curve_kernel.zap")
        log.setLevel(logging.WARNING)
        super().__init__(context, log=log)
        self._manager_key = manager_key
        self._clients = clients
        self._anybody = anybody
        self._audit = audit
        self._address = self._user_id = ""
        self._pid = os.getpid()
        for channel in ("shell", "stdin", "control", "iopub"):
            self.configure_curve_callback(channel, self)

    def start(self) -> None:
        """Start answering."""
        super().start()
        # As ipykernel marks its own threads: a breakpoint must not suspend it.
        vars(self.thread).update(pydev_do_not_trace=True, is_pydev_daemon_thread=True)

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        """Answer one ZAP request; whatever goes wrong is a refusal."""
        mechanism, self._address = (
            (msg[5], msg[3].decode("ascii", "replace")) if len(msg) > 5 else (b"", "")
        )
        try:
            if mechanism != b"CURVE":
                raise ValueError("a request without CURVE")
            await super().handle_zap_message(msg)
        except Exception as error:  # noqa: BLE001  the thread must live, or nobody is let in any more
            self.log.warning("a ZAP request failed, so its client is refused: %r", error)
            if len(msg) > 1:
                self._send_zap_reply(msg[1], b"400", b"refused")

    def callback(self, channel: str, key: bytes) -> bool:
        """Say whether the client with public *key*, 40 bytes of Z85, may use *channel*."""
        if key == self._manager_key:
            self._user_id = MANAGER
            self._audit.let_in(channel, self._address, MANAGER)
            return True
        client = self._clients.find(key)
        shown = key.decode()
        if client is None:
            if not self._anybody:
                self._audit.refused(channel, self._address, "unknown key", f" {shown}")
                return False
            self._user_id = shown
            self._audit.let_in(channel, self._address, f"anybody with key {shown}")
            return True
        if client.role == "viewer" and channel not in VIEWER_CHANNELS and not self._anybody:
            self._audit.refused(channel, self._address, "not for viewers", f" such as {client.name!r}")
            return False
        self._user_id = client.name
        self._audit.let_in(channel, self._address, f"{client.role} {client.name!r}")
        return True

    def curve_user_id(self, client_public_key: bytes) -> str:  # noqa: ARG002
        """Return the name of the client that `callback` has just let in."""
        return self._user_id

    def stop(self) -> None:
        """Stop answering: from now on nobody is let in. Does nothing in a forked child."""
        if os.getpid() == self._pid:
            super().stop()


class HandshakeMonitor(threading.Thread):
    """Logs the handshakes that fail before ZAP sees them: plaintext, or a wrong server key.

    One thread reads the monitors of all sockets.
    """

    _EVENTS = (
        zmq.EVENT_ACCEPTED
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_DISCONNECTED
    )
    # A monitor blocks libzmq's I/O thread while its queue is full.
    _QUEUE = 100_000

    def __init__(self, context: zmq.Context[Any], audit: AuditLog) -> None:
        super().__init__(name="HandshakeMonitor", daemon=True)
        vars(self).update(pydev_do_not_trace=True, is_pydev_daemon_thread=True)
        self._audit = audit
        self._lock = threading.Lock()
        self._watched: dict[zmq.Socket[Any], tuple[str, zmq.Socket[Any]]] = {}
        self._peers: dict[tuple[str, int], str] = {}
        self._failure: dict[str, int] = {}
        self._pid = os.getpid()
        endpoint = f"inproc://curve-kernel-monitor-{id(self)}"
        self._wake_in, self._wake_out = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        for wake in (self._wake_in, self._wake_out):
            wake.linger = 0
        self._wake_in.bind(endpoint)
        self._wake_out.connect(endpoint)

    def watch(self, watched: zmq.Socket[Any], channel: str) -> None:
        """Watch a socket that is not bound yet."""
        endpoint = f"inproc://curve-kernel-monitor-{channel}-{id(watched)}"
        watched.monitor(endpoint, self._EVENTS)
        monitor = watched.context.socket(zmq.PAIR)
        monitor.linger = 0
        monitor.rcvhwm = self._QUEUE
        monitor.connect(endpoint)
        with self._lock:
            self._watched[watched] = (channel, monitor)
            self._wake_out.send(b"")

    def run(self) -> None:
        """Read events until `stop`."""
        poller = zmq.Poller()
        poller.register(self._wake_in, zmq.POLLIN)
        channels: dict[zmq.Socket[Any], str] = {}
        while True:
            for ready, _ in poller.poll():
                if ready is not self._wake_in:
                    self._handle(channels[ready], parse_monitor_message(ready.recv_multipart()))
                elif ready.recv():
                    return
                else:
                    with self._lock:
                        channels = {monitor: channel for channel, monitor in self._watched.values()}
                    for monitor in channels:
                        poller.register(monitor, zmq.POLLIN)

    def _handle(self, channel: str, event: Any) -> None:
        value = int(event["value"])
        failure = self._failure.pop(channel, None)
        address = "an unknown address"
        match event["event"]:
            case zmq.EVENT_ACCEPTED:
                self._peers[channel, value] = _peer_of(value)
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._failure[channel] = value
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._failure[channel] = _LEFT
            case zmq.EVENT_DISCONNECTED:
                address = self._peers.pop((channel, value), address)
        # libzmq's I/O thread reports a failure and then, at once, the file descriptor that it was on.
        if failure == _LEFT:
            self._audit.left(channel, address)
        elif failure is not None:
            self._audit.refused(channel, address, _REASONS.get(failure, "malformed handshake"))

    def stop(self) -> None:
        """Stop watching, before any of the sockets is closed. Does nothing in a forked child."""
        if os.getpid() != self._pid or not self.is_alive():
            return
        with self._lock:
            for watched in self._watched:
                # While somebody still reads: a monitor without a reader blocks the socket.
                if not watched.closed:
                    watched.disable_monitor()
            self._wake_out.send(b"stop")
        self.join(10)
        for _, monitor in self._watched.values():
            monitor.close()
        self._wake_in.close()
        self._wake_out.close()


def _peer_of(descriptor: int) -> str:
    # The connection may be gone already, and its number in use for something else.
    try:
        with socket.socket(fileno=os.dup(descriptor)) as peer:
            if peer.family == socket.AF_UNIX:
                return "this machine"
            return str(peer.getpeername()[0])
    except OSError:
        return "an unknown address"

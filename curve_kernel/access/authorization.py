"""Which client may use which channel: ZAP, and a log of who was let in and who was not.

ZAP (https://rfc.zeromq.org/spec/27/) sees a peer only once its CURVE handshake has proved that it holds
its secret key and knows the server key. Whoever fails before that is seen by libzmq's socket monitors.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import select
import socket
import struct
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import zmq
from zmq.auth import Authenticator

from .allowlist import MANAGER, OWN_CLIENT, AuthorizedClients

__all__ = ["AuditLog", "ClientAuthenticator", "Connection", "HandshakeMonitor", "Port"]

VIEWER_CHANNELS = frozenset({"iopub", "hb"})

_WRONG_KEY, _NO_CURVE = "wrong server key", "no CURVE, plaintext perhaps"
_WRONG_KEY_OR_NO_CURVE = "wrong server key, or no CURVE"
_MALFORMED = "malformed handshake"
_LEFT = "left during the handshake"
# Values of HANDSHAKE_FAILED_PROTOCOL, from libzmq's zmq.h; pyzmq has no names for them.
_REASONS = {0x11000001: _WRONG_KEY, 0x11000002: _NO_CURVE}
_UNKNOWN_ADDRESS = "an unknown address"


class Connection(NamedTuple):
    """A connection to one of the kernel's ports, after its handshake.

    ``role`` is ``manager``, ``owner`` or ``viewer``, ``anybody`` for a client that is not listed
    where that is allowed, ``kernel`` for the kernel's own debugger, and empty where no key is asked
    for. ``name`` is empty for who has none.
    """

    channel: str
    address: str
    role: str = ""
    name: str = ""
    public_key: str = ""
    since: datetime | None = None

    @property
    def who(self) -> str:
        """The client, as a line in the log names it."""
        if self.role == "anybody":
            return f"anybody with key {self.public_key}"
        return f"{self.role} {self.name!r}" if self.name else self.role


class Port(NamedTuple):
    """A bound socket, as libzmq tells of it.

    ``refused`` counts connections by the reason why they came to nothing.
    """

    channel: str
    mechanism: str
    endpoint: str
    connections: tuple[Connection, ...]
    refused: dict[str, int]


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
        self._left_out: collections.Counter[tuple[int, str]] = collections.Counter()
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def let_in(self, connection: Connection) -> None:
        """Log who was let in."""
        line = f"{connection.channel}: let in {connection.who} from {connection.address}"
        self._add(logging.INFO, "let in", line)

    def refused(self, channel: str, address: str, why: str, detail: str = "") -> None:
        """Log that a peer was refused, and why; *detail* is not part of what is counted."""
        self._counts[channel, why] += 1
        self._add(logging.WARNING, why, f"{channel}: refused a client from {address}: {why}{detail}")

    def left(self, channel: str, address: str) -> None:
        """Log that a peer left during the handshake: a plaintext client that saw CURVE, or a probe."""
        self._counts[channel, _LEFT] += 1
        line = f"{channel}: a client from {address} left during the handshake, plaintext perhaps"
        self._add(logging.INFO, _LEFT, line)

    def counts(self, channel: str) -> dict[str, int]:
        """Return how many peers *channel* has not let in since the start, by reason."""
        return {why: count for (name, why), count in self._counts.copy().items() if name == channel}

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
            self._left_out[level, kind] += 1

    def flush(self) -> None:
        """Log the counts of what was left out so far."""
        with self._lock:
            self._report()

    def _report(self) -> None:
        for level in {level for level, _ in self._left_out}:
            left_out = [(kind, n) for (at, kind), n in self._left_out.most_common() if at == level]
            self._log.log(
                level,
                "%d connections were not logged one by one: %s",
                sum(count for _, count in left_out),
                ", ".join(f"{count} x {kind}" for kind, count in left_out),
            )
        self._lines.clear()
        self._left_out.clear()


class ClientAuthenticator(Authenticator):
    """Decides for each handshake by the client's public key and the channel.

    Start it before the first socket binds: it serves every CURVE server of its context that has a ZAP
    domain, and the domain is the channel's name.

    Parameters
    ----------
    context : zmq.Context
        The context of the sockets.
    manager_key : bytes
        The kernel's own public key, 40 bytes of Z85: who holds its secret may use every channel.
    own_client_key : bytes
        The public key of the client inside the kernel, its debugger, which uses shell.
    clients : AuthorizedClients
        The clients that are listed.
    anybody : bool
        Let in whoever has the server key; the list then only gives names.
    monitor : HandshakeMonitor
        Is told of each decision.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        manager_key: bytes,
        own_client_key: bytes,
        clients: AuthorizedClients,
        *,
        anybody: bool,
        monitor: HandshakeMonitor,
    ) -> None:
        # pyzmq logs each request at debug level, a peer's own bytes among it. User code that logs
        # everything must not get to show them in the notebook.
        log = logging.getLogger("curve_kernel.zap")
        log.setLevel(logging.WARNING)
        super().__init__(context, log=log)
        self._manager_key = manager_key
        self._own_client_key = own_client_key
        self._clients = clients
        self._anybody = anybody
        self._monitor = monitor
        self._address = self._user_id = ""
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        for channel in ("shell", "stdin", "control", "iopub"):
            self.configure_curve_callback(channel, self)

    def start(self) -> None:
        """Start answering, in a thread without an event loop, which would cost more than the answer."""
        super().start()
        endpoint = f"inproc://curve-kernel-zap-{id(self)}"
        self._stop_out, self._stop_in = self.context.socket(zmq.PAIR), self.context.socket(zmq.PAIR)
        for end in (self._stop_out, self._stop_in):
            end.linger = 0
        self._stop_out.bind(endpoint)
        self._stop_in.connect(endpoint)
        self._thread = threading.Thread(target=self._run, name="ClientAuthenticator", daemon=True)
        # As ipykernel marks its own threads: a breakpoint must not suspend it.
        vars(self._thread).update(pydev_do_not_trace=True, is_pydev_daemon_thread=True)
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        for readable in (self._stop_in, self.zap_socket):
            poller.register(readable, zmq.POLLIN)
        while self._stop_in not in dict(poller.poll()):
            answer = self.handle_zap_message(self.zap_socket.recv_multipart())
            try:
                # A coroutine only because a callback could be one; ours is none.
                answer.send(None)
            except StopIteration:
                continue
            answer.close()
            raise RuntimeError("a ZAP request was to wait for something")

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
        shown = key.decode()
        if key == self._manager_key:
            role, name = MANAGER, ""
        elif key == self._own_client_key and channel == "shell":
            role, name = OWN_CLIENT, ""
        elif (client := self._clients.find(key)) is None and self._anybody:
            role, name = "anybody", ""
        elif client is None:
            self._monitor.refused(channel, self._address, "unknown key", f" {shown}")
            return False
        elif client.role == "viewer" and channel not in VIEWER_CHANNELS and not self._anybody:
            such = f" such as {client.name!r}"
            self._monitor.refused(channel, self._address, "not for viewers", such)
            return False
        else:
            role, name = client.role, client.name
        self._user_id = name or (shown if role == "anybody" else role)
        self._monitor.let_in(Connection(channel, self._address, role, name, shown))
        return True

    def curve_user_id(self, client_public_key: bytes) -> str:  # noqa: ARG002
        """Return the name of the client that `callback` has just let in."""
        return self._user_id

    def stop(self) -> None:
        """Stop answering: from now on nobody is let in. Does nothing in a forked child."""
        if os.getpid() != self._pid or self._thread is None:
            return
        self._stop_out.send(b"")
        self._thread.join()
        self._thread = None
        self._stop_out.close()
        self._stop_in.close()
        super().stop()


class _Peer:
    """A connection to a port, held open until libzmq has told that it ended."""

    def __init__(self, watched: _Watched, descriptor: int) -> None:
        self.watched = watched
        self.address = _UNKNOWN_ADDRESS
        self.cut = False
        self.connection = Connection(watched.channel, "")
        self.held: socket.socket | None = None
        self._descriptor = descriptor
        self.since = time.monotonic()
        self.hold()

    def hold(self) -> None:
        """Hold it, if it is not held and there is a descriptor left for that."""
        if self.held is not None:
            return
        with contextlib.suppress(OSError):
            duplicate = _duplicate(self._descriptor)
            if not _is_of(self.watched, duplicate):
                duplicate.close()
                return
            self.held = duplicate
            is_local = duplicate.family == socket.AF_UNIX
            self.address = "this machine" if is_local else str(duplicate.getpeername()[0])

    def traffic(self) -> tuple[int, int]:
        """Return the bytes that were sent to and received from the peer, 0 where TCP does not tell."""
        return _traffic(self.held) if self.held is not None else (0, 0)

    def why_it_failed(self) -> str:
        """Return the reason as far as it can be told; empty if the authenticator has told it."""
        sent, received = self.traffic()
        if self.held is None and self.watched.channel == "pipe":
            return _LEFT  # a forked child that had printed, most probably
        if not received:
            return _WRONG_KEY_OR_NO_CURVE
        if sent > _BEFORE_READY:
            return ""
        if received < _HELLO_SENT:
            return _NO_CURVE
        return _WRONG_KEY if received == _HELLO_SENT else _MALFORMED

    def has_got_ready(self) -> bool:
        """Whether its handshake is over."""
        return self.traffic()[0] > _REFUSED

    def says_too_much(self) -> bool:
        """Whether it has sent what neither a subscriber nor a heartbeat does."""
        sent, received = self.traffic()
        if self.watched.channel == "hb":
            return received - sent > _QUIET_BYTES  # each message is echoed when it is complete
        return received > _QUIET_BYTES + _QUIET_RATE * (time.monotonic() - self.since)

    def hang_up(self) -> None:
        """End the connection; libzmq sees it and closes. What is on its way is not waited for."""
        self.cut = True
        with contextlib.suppress(OSError):
            if self.held is not None:
                _shut_down(self.held)
                return
            # No descriptor was left to hold it. This is libzmq's own.
            borrowed = socket.socket(fileno=self._descriptor)
            try:
                if _is_of(self.watched, borrowed) and _traffic(borrowed)[0] <= _REFUSED:
                    _shut_down(borrowed)
            finally:
                borrowed.detach()

    def close(self) -> None:
        """Let go of it."""
        if self.held is not None:
            self.held.close()


class _Watched:
    """What is known of a socket that is watched."""

    def __init__(self, channel: str, mechanism: str, monitor: zmq.Socket[Any]) -> None:
        self.channel = channel
        self.mechanism = mechanism
        self.monitor = monitor
        self.endpoint = ""
        self.name: tuple[object, object] | None = None
        # By libzmq's file descriptor, in the order of accepting: the handshake goes on, or is behind.
        self.handshaking: dict[int, _Peer] = {}
        self.connected: dict[int, _Peer] = {}
        # Whom the authenticator let in, and whose handshake is not known to be behind yet.
        self.let_in: list[Connection] = []
        # How many the authenticator has refused, whose connections are not known to have ended yet.
        self.refused = 0
        self.failure: str | None = None


class HandshakeMonitor:
    """Knows who is connected, bounds connections, and logs the handshakes that come to nothing.

    libzmq bounds neither how many connections are in their handshake nor what they send. Here the
    oldest is cut if there are too many, and each that has sent more than any handshake takes.

    Nor does it bound connections after the handshake, or the frames of one message. So of clients
    other than the manager, if there are too many connections, the oldest of whoever has the most is
    cut. And where a client has little to say, on hb and as a viewer on iopub, who says more is cut.

    One thread reads libzmq's monitors of all sockets; messages do not pass here. libzmq does not tell
    which connection it was whose handshake succeeded. Where several from one address are in it at the
    same time, they are let in one after the other, and TCP's count of bytes sent tells which has got
    its READY; where even that leaves a choice (it does on ipc), the first that was accepted is taken,
    so names may then be exchanged.

    libzmq's event HANDSHAKE_FAILED_PROTOCOL tells why a handshake failed. But to report it loses libzmq
    the errno by which it closes a connection that breaks the protocol later, which then stays for
    ever. So it is asked for only where nobody connects who could not run code anyway; elsewhere the
    bytes that TCP has counted tell, if the connection is still there to be asked.

    Parameters
    ----------
    context : zmq.Context
        Of most of the sockets. They may have others.
    audit : AuditLog
        Is told of who was let in and of each failure.
    max_handshakes : int
        Connections that may be in their handshake at the same time, all sockets together.
    max_connections : int
        Connections after their handshake, all sockets together, without the manager's.
    """

    _EVENTS = (
        zmq.EVENT_LISTENING
        | zmq.EVENT_ACCEPTED
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_DISCONNECTED
    )
    # A monitor blocks libzmq's I/O thread while its queue is full.
    _QUEUE = 100_000
    # Seconds for which who is let in waits for whom was let in before, and for which nobody waits
    # after that was in vain: a client that leaves then must not hold up the others.
    _PATIENCE, _IMPATIENCE = 0.2, 5.0
    # Seconds between two looks at the connections that are in their handshake.
    _INTERVAL = 0.01
    # After so many events this thread rests for an instant. Others would wait for the interpreter
    # lock 5 ms each time (sys.getswitchinterval), and a cell needs it several times.
    _BATCH, _REST = 16, 0.00005
    _LOOK_AT = 32

    def __init__(
        self, context: zmq.Context[Any], audit: AuditLog, max_handshakes: int, max_connections: int
    ) -> None:
        # A thread of its own, not a subclass: Python 3.13's Thread has an attribute `_handle`.
        self._thread = threading.Thread(target=self._run, name="HandshakeMonitor", daemon=True)
        vars(self._thread).update(pydev_do_not_trace=True, is_pydev_daemon_thread=True)
        self._audit = audit
        self._max_handshakes, self._max_connections = max_handshakes, max_connections
        # Of all sockets, the oldest first, without those that were cut already.
        self._handshaking: dict[tuple[str, int], _Peer] = {}
        # Those that have little to say, by the descriptor that is held, and what tells that one spoke.
        self._quiet: dict[int, _Peer] = {}
        self._ears = select.epoll() if hasattr(select, "epoll") else None
        self._impatient_until = 0.0
        self._lock = threading.Lock()
        self._handled = threading.Condition(self._lock)
        self._watched: dict[zmq.Socket[Any], _Watched] = {}
        self._pid = os.getpid()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave_ports)
        endpoint = f"inproc://curve-kernel-monitor-{id(self)}"
        self._wake_in, self._wake_out = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        for wake in (self._wake_in, self._wake_out):
            wake.linger = 0
        self._wake_in.bind(endpoint)
        self._wake_out.connect(endpoint)

    def watch(self, watched: zmq.Socket[Any], channel: str) -> None:
        """Watch a socket that is a server already, but not bound yet."""
        endpoint = f"inproc://curve-kernel-monitor-{channel}-{id(watched)}"
        events = self._EVENTS
        if channel in ("shell", "stdin", "control"):
            events |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        watched.monitor(endpoint, events)
        monitor = watched.context.socket(zmq.PAIR)
        monitor.linger = 0
        monitor.rcvhwm = self._QUEUE
        monitor.connect(endpoint)
        mechanism = zmq.SecurityMechanism(cast(int, watched.get(zmq.MECHANISM))).name
        with self._lock:
            self._watched[watched] = _Watched(channel, mechanism, monitor)
            self._wake_out.send(b"")

    def let_in(self, connection: Connection) -> None:
        """Take note of whom the authenticator lets in, before libzmq knows.

        Waits for whom it let in before to be connected, but not long: that one may have left.
        """
        self._audit.let_in(connection)
        with self._handled:
            watched = self._of(connection.channel)
            patience = self._PATIENCE if time.monotonic() > self._impatient_until else 0
            if not self._handled.wait_for(lambda: not watched.let_in, patience):
                watched.let_in.clear()
                if patience:
                    self._impatient_until = time.monotonic() + self._IMPATIENCE
            watched.let_in.append(connection)

    def refused(self, channel: str, address: str, why: str, detail: str) -> None:
        """Take note of whom the authenticator refuses, before libzmq knows."""
        self._audit.refused(channel, address, why, detail)
        with self._lock:
            self._of(channel).refused += 1

    def _of(self, channel: str) -> _Watched:
        return next(one for one in self._watched.values() if one.channel == channel)

    def ports(self) -> list[Port]:
        """Return the watched sockets as they are now, and who is connected to each."""
        with self._lock:
            return [
                Port(
                    one.channel,
                    one.mechanism,
                    one.endpoint,
                    tuple(peer.connection for peer in one.connected.values()),
                    self._audit.counts(one.channel),
                )
                for one in self._watched.values()
            ]

    def start(self) -> None:
        """Start reading events."""
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_in, zmq.POLLIN)
        if self._ears is not None:
            poller.register(self._ears.fileno(), zmq.POLLIN)
        watched: dict[zmq.Socket[Any], _Watched] = {}
        last, events = 0.0, 0
        while True:
            for ready, _ in poller.poll(int(self._INTERVAL * 1000) if self._handshaking else None):
                if isinstance(ready, int):
                    events += self._listen()
                elif ready is not self._wake_in:
                    with self._handled:
                        events += self._drain(watched[ready])
                        self._handled.notify_all()
                elif ready.recv():
                    return
                else:
                    with self._lock:
                        watched = {one.monitor: one for one in self._watched.values()}
                    for monitor in watched:
                        poller.register(monitor, zmq.POLLIN)
                if events >= self._BATCH:
                    time.sleep(self._REST)
                    events = 0
            if self._handshaking and time.monotonic() - last >= self._INTERVAL:
                last = time.monotonic()
                with self._lock:
                    self._cut_talkers()

    def _drain(self, watched: _Watched) -> int:
        """Handle a batch of events, and return how many there were."""
        for handled in range(self._BATCH):
            try:
                frame, endpoint = watched.monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                # Who was let in may have left before knowing it. With no event waiting, every
                # handshake that the authenticator has seen is among these.
                del watched.let_in[: max(len(watched.let_in) - len(watched.handshaking), 0)]
                return handled
            event, value = struct.unpack("=Hi", frame)
            self._handle(watched, event, value, endpoint)
        return self._BATCH

    def _handle(self, watched: _Watched, event: int, value: int, endpoint: bytes) -> None:
        failure, watched.failure = watched.failure, None
        match event:
            case zmq.EVENT_LISTENING:
                watched.endpoint = endpoint.decode()
                with contextlib.suppress(OSError), _duplicate(value) as listener:
                    watched.name = _name(listener)
                    _defer_accept(listener)
            case zmq.EVENT_ACCEPTED:
                peer = watched.handshaking[value] = _Peer(watched, value)
                self._handshaking[watched.channel, value] = peer
                if len(self._handshaking) > self._max_handshakes:
                    self._cut_oldest()
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._succeeded(watched)
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                # libzmq's I/O thread reports it and then, at once, the descriptor that it was on.
                watched.failure = _LEFT
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                watched.failure = _REASONS.get(value, _MALFORMED)
            case zmq.EVENT_DISCONNECTED if value in watched.handshaking:
                self._failed(self._ended(watched, value), failure)
            case zmq.EVENT_DISCONNECTED if value in watched.connected:
                self._let_go(watched.connected.pop(value))

    def _ended(self, watched: _Watched, descriptor: int) -> _Peer:
        self._handshaking.pop((watched.channel, descriptor), None)
        return watched.handshaking.pop(descriptor)

    def _failed(self, peer: _Peer, failure: str | None) -> None:
        watched, address = peer.watched, peer.address
        over, reason = peer.has_got_ready(), failure or peer.why_it_failed()
        peer.close()
        if over:
            return  # another one was taken for it when it succeeded
        if failure is None and watched.refused:
            # The bytes may be those of the next connection, which has got the descriptor's number.
            watched.refused -= 1
            reason = ""
        if not watched.handshaking:
            watched.refused = 0
        if peer.cut or not reason:
            return
        if reason == _LEFT:
            self._audit.left(watched.channel, address)
        else:
            self._audit.refused(watched.channel, address, reason)

    def _succeeded(self, watched: _Watched) -> None:
        if not watched.handshaking:
            return
        candidates = watched.handshaking
        who = watched.let_in.pop(0) if watched.let_in else Connection(watched.channel, "")
        if who.address:
            addresses = (who.address, _UNKNOWN_ADDRESS)
            same = {fd: one for fd, one in candidates.items() if one.address in addresses}
            candidates = same or candidates
        descriptor = next(iter(candidates))
        if len(candidates) > 1 and watched.endpoint.startswith("tcp:"):
            descriptor = _who_has_got_ready(candidates) or descriptor
        peer = self._ended(watched, descriptor)
        since = datetime.now().astimezone()
        peer.connection = who._replace(address=peer.address, since=since)
        watched.connected[descriptor] = peer
        has_little_to_say = watched.channel == "hb" or (
            watched.channel == "iopub" and who.role in ("viewer", "anybody")
        )
        if has_little_to_say and peer.held is not None and self._ears is not None:
            self._quiet[peer.held.fileno()] = peer
            self._ears.register(peer.held, select.EPOLLIN | select.EPOLLET)
            self._cut_if_it_says_too_much(peer)
        self._bound_connections()

    def _let_go(self, peer: _Peer) -> None:
        if self._ears is not None and peer.held is not None and peer.held.fileno() in self._quiet:
            del self._quiet[peer.held.fileno()]
            self._ears.unregister(peer.held)
        peer.close()

    def _listen(self) -> int:
        """Look at who has said something and has little to say, and return how many there were."""
        assert self._ears is not None
        with self._lock:
            spoke = self._ears.poll(0)
            for descriptor, _ in spoke:
                if descriptor in self._quiet:
                    self._cut_if_it_says_too_much(self._quiet[descriptor])
        return len(spoke)

    def _cut_if_it_says_too_much(self, peer: _Peer) -> None:
        if not peer.cut and peer.says_too_much():
            self._cut(peer, "too many bytes from a client that has little to say")

    def _bound_connections(self) -> None:
        """Cut one, if there are too many: the oldest of whoever has the most, by name or by address."""
        peers = [
            peer
            for one in self._watched.values()
            if one.channel != "pipe"
            for peer in one.connected.values()
            if peer.connection.role not in (MANAGER, OWN_CLIENT) and not peer.cut
        ]
        if len(peers) > self._max_connections:
            whose = collections.Counter(map(_whose, peers)).most_common(1)[0][0]
            theirs = (peer for peer in peers if _whose(peer) == whose)
            self._cut(min(theirs, key=lambda peer: peer.since), "too many connections")

    def _cut_talkers(self) -> None:
        for key, peer in list(self._handshaking.items()):
            peer.hold()
            sent, received = peer.traffic()
            if received > _HANDSHAKE_BYTES and sent <= _REFUSED:
                del self._handshaking[key]
                self._cut(peer, "too many bytes in the handshake")

    def _cut_oldest(self) -> None:
        """Cut the oldest, and rather one that has not yet shown that it knows the server key."""
        oldest = list(itertools.islice(self._handshaking.items(), self._LOOK_AT))
        waiting = [(key, one.traffic()[1]) for key, one in oldest if not one.has_got_ready()]
        strangers = (key for key, received in waiting if received < _HELLO_SENT)
        # Who has got READY is no stranger. libzmq's event says so soon.
        key = next(strangers, waiting[0][0] if waiting else oldest[0][0])
        peer = self._handshaking.pop(key)
        if waiting:
            self._cut(peer, "too many connections in the handshake")

    def _cut(self, peer: _Peer, why: str) -> None:
        who = f", {peer.connection.who}" if peer.connection.who else ""
        self._audit.refused(peer.watched.channel, peer.address, why, who)
        peer.hang_up()

    def _leave_ports(self) -> None:
        """Let go of every listener and connection in a forked child, or it would outlive the kernel."""
        names = {watched.name for watched in self._watched.values()}
        with contextlib.suppress(OSError), open(os.devnull, "rb") as null:  # noqa: PTH123
            for entry in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):
                    one = socket.socket(fileno=int(entry.name))
                    try:
                        if _name(one) in names:
                            # libzmq's number stays taken: nothing else in the child gets it.
                            os.dup2(null.fileno(), int(entry.name), inheritable=False)
                    finally:
                        one.detach()

    def stop(self) -> None:
        """Stop watching, before any of the sockets is closed. Does nothing in a forked child."""
        if os.getpid() != self._pid or not self._thread.is_alive():
            return
        with self._lock:
            for watched in self._watched:
                # While somebody still reads: a monitor without a reader blocks the socket.
                if not watched.closed:
                    watched.disable_monitor()
            self._wake_out.send(b"stop")
        self._thread.join(10)
        for one in self._watched.values():
            one.monitor.close()
            for peer in (*one.handshaking.values(), *one.connected.values()):
                peer.close()
        if self._ears is not None:
            self._ears.close()
        self._wake_in.close()
        self._wake_out.close()


def _duplicate(descriptor: int) -> socket.socket:
    # It may be closed by now, and its number in use for something that is no socket.
    duplicate = os.dup(descriptor)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _is_of(watched: _Watched, one: socket.socket) -> bool:
    """Whether it is a connection to that port.

    libzmq tells a descriptor's number, which may be another one's when that is read.
    """
    listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return watched.name is not None and _name(one) == watched.name and not listens


def _traffic(one: socket.socket) -> tuple[int, int]:
    if one.family == socket.AF_UNIX:
        return 0, 0
    try:
        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
        (received,) = struct.unpack_from("Q", info, _TCPI_BYTES_RECEIVED)
        (sent,) = struct.unpack_from("Q", info, _TCPI_BYTES_SENT)
    except (OSError, struct.error, AttributeError):  # only Linux has it
        return 0, 0
    return sent, received


def _shut_down(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.shutdown(socket.SHUT_RDWR)


def _whose(peer: _Peer) -> str:
    return peer.connection.name or f"from {peer.address}"


def _who_has_got_ready(peers: dict[int, _Peer]) -> int | None:
    # libzmq reports success an instant before it writes READY.
    for _ in range(20):
        for descriptor, peer in peers.items():
            if peer.has_got_ready():
                return descriptor
        if gone := [descriptor for descriptor, peer in peers.items() if peer.held is None]:
            return gone[0]
        time.sleep(0.001)
    return None


def _defer_accept(listener: socket.socket) -> None:
    """Let the operating system keep connections that say nothing, so that they take no descriptor.

    Both ends of ZMTP speak first.
    """
    if listener.family != socket.AF_UNIX and hasattr(socket, "TCP_DEFER_ACCEPT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _DEFER_ACCEPT)


def _name(bound: socket.socket) -> tuple[object, object]:
    """Return what is the same for a listener and what it accepted: family, and port or path."""
    name = bound.getsockname()
    return bound.family, name[1] if isinstance(name, tuple) else name


# Seconds, after which a connection that says nothing is accepted all the same.
_DEFER_ACCEPT = 600
# A CURVE client sends less than 2 KiB until it gets READY.
_HANDSHAKE_BYTES = 16 << 10
# What a client has sent with its greeting and HELLO; libzmq hangs up at once if that was made without
# the server key.
_HELLO_SENT = 64 + 202
# What a server sends before READY or ERROR: a greeting and WELCOME.
_BEFORE_READY = 64 + 170
# The same with ERROR, as a client gets it whom the authenticator refuses. READY is longer.
_REFUSED = _BEFORE_READY + 12
# What a viewer may send on iopub, and the same for each second that it stays; it subscribes to one
# topic, which takes libzmq fifty times its bytes. On hb, what may be unanswered.
_QUIET_BYTES, _QUIET_RATE = 8 << 10, 16
# Of struct tcp_info in linux/tcp.h, since Linux 4.19.
_TCPI_BYTES_RECEIVED = 128
_TCPI_BYTES_SENT = 200
_TCP_INFO_SIZE = 208

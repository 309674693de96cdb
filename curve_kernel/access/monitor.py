"""The thread that answers ZAP requests and feeds libzmq's events to the table of connections.

One thread does both, because the order counts: libzmq's I/O thread tells of a connection before it asks
about it, and here each event is taken in before the request that may follow from it.

What the thread uses is bound at import, and if handling an event fails, it goes on with the next:
libzmq's I/O thread blocks, and with it the whole kernel, while its monitors are not read. If the thread
can't go on all the same, it closes the ZAP sockets, so that no new client is accepted, and only reads.
"""

from __future__ import annotations

import collections
import logging
import os
from _thread import allocate_lock
from collections.abc import Sequence
from contextlib import closing, suppress
from os import O_CLOEXEC, O_NONBLOCK, fstat, getpid, pipe2, read, write
from socket import AF_UNIX, IPPROTO_TCP, TCP_DEFER_ACCEPT
from struct import unpack
from threading import Lock, Thread
from typing import Any

import zmq

from ..clock import monotonic, sleep
from .audit import AuditLog
from .connection import Connection, name_of, open_socket
from .connections import Connections
from .enforcer import Enforcer
from .forks import let_go
from .hearing import Hearing, Told
from .limits import Limits
from .policy import Policy
from .port import Listener, Port
from .revocation import Revocation
from .sources import Sources
from .zap import ClientAuthenticator

__all__ = ["Monitor"]

_EVENTS = (
    zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
)
# Not HANDSHAKE_FAILED_PROTOCOL: reporting it makes libzmq overwrite errno, and it then never closes a
# connection that breaks the protocol after its handshake.
# libzmq's I/O thread blocks while a monitor's queue is full.
_QUEUE = 100_000
# Seconds between two checks of the connections in their handshake, and of slow readers.
_HANDSHAKE_INTERVAL, _READER_INTERVAL = 0.01, 0.25
# Seconds in which the thread is done with what it does, unless a disk does not answer.
_PATIENCE = 2.0
# After so many events the thread rests for an instant. Others would wait for the interpreter lock 5 ms
# each time (sys.getswitchinterval), and a cell needs it several times.
_BATCH, _REST = 16, 0.00005
_NOBLOCK = int(zmq.NOBLOCK)
# Seconds after which a connection that says nothing is accepted all the same. Both ends of ZMTP speak
# first.
_DEFER_ACCEPT = 600


class Monitor:
    """Follows the connections, answers ZAP requests, and has the limits applied.

    Parameters
    ----------
    policy : Policy
        Decides which clients are accepted.
    limits : Limits
        For all sockets together.
    audit : AuditLog
        Is told of each client that is accepted or rejected.
    log : logging.Logger
        Is told when the thread can't go on.
    """

    def __init__(self, policy: Policy, limits: Limits, audit: AuditLog, log: logging.Logger) -> None:
        self._policy = policy
        self._audit = audit
        self._log = log
        self.problem = ""
        """Why no new client is accepted, or empty."""
        self._lock = Lock()
        self._connections = Connections()
        self._enforcer = Enforcer(self._connections, limits, audit, policy)
        self._revocation = Revocation(policy, self._enforcer)
        self._listeners: dict[str, Listener] = {}
        self._handlers: dict[zmq.Context[Any], ClientAuthenticator] = {}
        self._on_ended: dict[str, Any] = {}
        self._hearing = Hearing()
        # What other threads wait for: that the handshakes have been checked.
        self._asked: collections.deque[Any] = collections.deque()
        self._events = 0
        # ZAP requests that wait until the events before them have been handled.
        self._requests: dict[ClientAuthenticator, list[bytes]] = {}
        self._reported: set[str] = set()
        self._stopping = False
        self._pid = getpid()
        os.register_at_fork(after_in_child=self._leave_ports)
        self._wake_in, self._wake_out = pipe2(O_CLOEXEC | O_NONBLOCK)
        self._spoken, self._told = self._enforcer.epoll.fileno(), self._revocation.descriptor
        self._sources = Sources((self._wake_in, self._spoken, self._told))
        self._thread = Thread(target=self._run, name="curve_kernel monitor", daemon=True)
        # As ipykernel marks its own threads: a breakpoint must not suspend it.
        vars(self._thread).update(pydev_do_not_trace=True, is_pydev_daemon_thread=True)
        self._thread.start()

    # What other threads call

    def watch(self, socket: zmq.Socket[Any], channel: str) -> None:
        """Watch a socket that is a server already, but not bound yet."""
        if self.problem:
            raise RuntimeError(self.problem)
        context = socket.context
        endpoint = f"inproc://curve-kernel-monitor-{channel}-{id(socket)}"
        socket.monitor(endpoint, _EVENTS)
        monitor = context.socket(zmq.PAIR)
        monitor.linger = 0
        monitor.rcvhwm = _QUEUE
        monitor.connect(endpoint)
        with self._lock:
            if (handler := self._handlers.get(context)) is None:
                handler = ClientAuthenticator(context, self._policy, self._connections, self._audit)
                handler.start()
                self._handlers[context] = handler
                self._sources.add(handler.zap_socket)
            handler.sockets[channel] = socket
            self._listeners[channel] = Listener(channel, socket, monitor)
            self._sources.add(monitor)
        self._wake()

    def on_ended(self, channel: str, callback: Any) -> None:
        """Call *callback*, in the monitor's thread, whenever a connection of *channel* has ended."""
        self._on_ended[channel] = callback

    def heard(self, channel: str, frame: zmq.Frame) -> str | None:
        """Take note of the connection by which a message came. Called for each message of a channel.

        Returns the connection's user id, or None for a message that came from no connection.
        """
        user_id, is_new = self._hearing.note(channel, frame)
        if is_new:
            self._wake()
        return user_id

    def on_question(self, channel: str, ask: Any) -> None:
        """Call *ask*, in the monitor's thread, when it matters whether all messages have been heard."""
        self._enforcer.questions[channel] = ask

    def drained(self, channel: str) -> None:
        """Take note that all messages of *channel* that there are have been heard."""
        self._hearing.told.append(Told(channel, -1))
        self._wake()

    def published(self, frames: Sequence[Any]) -> None:
        """Take note of a message that is published on iopub."""
        if self._enforcer.has_readers():
            with suppress(TypeError):  # a frame that is no buffer, which libzmq refuses
                self._enforcer.note_published(sum(memoryview(frame).nbytes for frame in frames))
            if self._enforcer.has_published_much():
                self._wake()

    def ports(self) -> list[Port]:
        """Return the watched sockets as they are now, with their connections."""
        if self._thread.is_alive() and not self.problem:
            checked = allocate_lock()
            checked.acquire()
            self._asked.append(checked)
            self._wake()
            checked.acquire(timeout=1)
        # Without the lock: the thread has it while it reads the list, and a disk may not answer; and
        # who is interrupted here must not keep it.
        ready = [one for one in list(self._connections.ready.values()) if not one.is_disconnected]
        listeners = list(self._listeners.values())
        return [one.port(ready, self._audit.counts(one.channel)) for one in listeners]

    def stop(self) -> None:
        """Stop watching, before any of the sockets is closed. Does nothing in a forked child."""
        if getpid() != self._pid or not self._thread.is_alive() or self._stopping:
            return
        locked = self._lock.acquire(timeout=_PATIENCE)
        for listener in self._listeners.values():
            # While this thread still reads: a monitor without a reader blocks the socket.
            if not listener.socket.closed:
                listener.socket.disable_monitor()
        if locked:
            self._lock.release()
        self._stopping = True
        self._wake()
        self._thread.join(10 if locked else 0)
        for handler in self._handlers.values():
            if handler.zap_socket is not None:
                handler.stop()
        for listener in self._listeners.values():
            listener.monitor.close()
        self._enforcer.close()
        self._revocation.close()

    def _wake(self) -> None:
        with suppress(OSError):  # full: it is about to wake anyway
            write(self._wake_out, b"\0")

    # Thread: monitor

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001  also what code of the user's throws into it
            self.problem = f"the watch over connections has ended ({type(error).__name__})"
        while not self._stopping:
            try:
                self._only_drain()
            except BaseException:  # noqa: BLE001, S112
                continue

    def _serve(self) -> None:
        handshakes_then = readers_then = 0.0
        while not self._stopping:
            timeout, before = self._timeout(), monotonic()
            ready = self._sources.wait(timeout)
            if monotonic() - before > _REST:
                self._events = 0  # the others had their turn
            with self._lock:
                if self._wake_in in ready:
                    self._take(read, self._wake_in, 1 << 12)
                for listener in self._listeners.values():
                    if listener.monitor in self._sources.unread:
                        self._drain(listener, _BATCH)
                for handler in self._handlers.values():
                    if handler in self._requests or self._sources.has_more(handler.zap_socket):
                        self._take(self._answer, handler)
                self._take(self._hear)
                if self._told in ready:
                    self._take(self._revocation.told)
                self._take(self._revocation.check)
                if self._spoken in ready:
                    self._take(self._check_budgets)
                now = monotonic()
                if self._asked or (
                    self._connections.handshaking and now - handshakes_then >= _HANDSHAKE_INTERVAL
                ):
                    handshakes_then = now
                    self._take(self._check_handshakes)
                    while self._asked:
                        self._asked.popleft().release()
                if self._enforcer.has_published_much() or now - readers_then >= _READER_INTERVAL:
                    readers_then = now
                    self._take(self._enforcer.look)
            if self._events >= _BATCH:
                sleep(_REST)
                self._events = 0

    def _timeout(self) -> float | None:
        """Return the seconds after which something is to be checked, or None."""
        if self._requests or self._sources.unread or self._hearing.told:
            return 0
        if self._connections.handshaking:
            return _HANDSHAKE_INTERVAL
        seconds = self._revocation.seconds()
        if self._enforcer.has_to_look():
            seconds = min(_READER_INTERVAL, _READER_INTERVAL if seconds is None else seconds)
        return None if seconds is None else seconds + 0.001

    def _take(self, function: Any, *arguments: Any) -> None:
        """Call *function*; what goes wrong is logged once, and the thread goes on."""
        try:
            function(*arguments)
        except BlockingIOError:
            pass
        except Exception as error:  # noqa: BLE001
            problem = f"{function.__name__}: {error!r}"
            if problem not in self._reported and len(self._reported) < 32:
                self._reported.add(problem)
                with suppress(Exception):  # logging may be what is broken
                    self._log.error("The watch over connections goes on after an error: %s", problem)

    def _drain(self, listener: Listener, most: int = 1000) -> bool:
        """Handle *most* events of *listener*, and return whether those were all that there are."""
        self._sources.unread.add(listener.monitor)
        for _ in range(most):
            if not self._sources.has_more(listener.monitor):
                return True
            frame, endpoint = listener.monitor.recv_multipart(_NOBLOCK)
            self._events += 1
            self._take(self._handle_event, listener, frame, endpoint)
        return False

    def _handle_event(self, listener: Listener, frame: bytes, endpoint: bytes) -> None:
        event, value = unpack("=Hi", frame)
        channel = listener.channel
        if event == zmq.EVENT_LISTENING:
            listener.endpoint, listener.descriptor = endpoint.decode(), value
            if (held := open_socket(value)) is not None:
                with closing(held):
                    listener.name, listener.inode = name_of(held), fstat(value).st_ino
                    if held.family != AF_UNIX:
                        held.setsockopt(IPPROTO_TCP, TCP_DEFER_ACCEPT, _DEFER_ACCEPT)
        elif event == zmq.EVENT_ACCEPTED:
            self._enforcer.accepted(Connection(channel, value, self._connections.number, listener.name))
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            for ready in self._connections.succeeded(channel):
                self._enforcer.got_ready(ready)
        elif event == zmq.EVENT_DISCONNECTED:
            connection = self._connections.ended(channel, value)
            if connection is not None:
                self._ended(connection)

    def _answer(self, handler: ClientAuthenticator) -> None:
        request = self._requests.pop(handler, None) or handler.zap_socket.recv_multipart(_NOBLOCK)
        channel = request[2].decode("ascii", "replace") if len(request) > 2 else ""
        listener = self._listeners.get(channel)
        if listener is not None and not self._drain(listener):
            self._requests[handler] = request  # what came before it comes first
            return
        self._events += 1
        handler.answer(request)
        self._sources.has_more(handler.zap_socket)  # or the thread would not wait for the next one

    def _hear(self) -> None:
        told = self._hearing.told
        while told and self._drain(self._listeners[told[0].channel]):
            channel, descriptor, user_id, routing_id = told.popleft()
            if descriptor < 0:
                self._enforcer.drained(channel)
                continue
            for connection in self._connections.told(channel, descriptor, user_id, routing_id):
                self._enforcer.client_is_known(connection)

    def _check_budgets(self) -> None:
        events, doubtful = self._enforcer.check_budgets()
        self._events += events
        for connection in doubtful:
            if self._drain(self._listeners[connection.channel]):
                self._enforcer.disconnect_in_handshake(connection)

    def _check_handshakes(self) -> None:
        ready = self._enforcer.check_handshakes()
        channels = {connection.channel for connection in ready}
        drained = {channel for channel in channels if self._drain(self._listeners[channel])}
        for connection in ready:
            if connection.channel in drained and self._connections.is_handshaking(connection):
                self._enforcer.got_ready(connection)

    def _ended(self, connection: Connection) -> None:
        self._enforcer.ended(connection)
        self._hearing.trim(connection.channel)
        if (callback := self._on_ended.get(connection.channel)) is not None:
            callback()

    def _only_drain(self) -> None:
        """Accept no client, and read libzmq's monitors, so that the kernel does not hang."""
        self._sources.leave_out(self._spoken)  # nobody looks at it any more
        for handler in self._handlers.values():
            if handler.zap_socket is not None:
                self._sources.leave_out(int(handler.zap_socket.getsockopt(zmq.FD)))
                handler.stop()
        if self.problem and self.problem not in self._reported:
            with suppress(Exception):
                self._log.critical("%s: no new client can connect; restart the kernel", self.problem)
            self._reported.add(self.problem)
        while not self._stopping:
            ready = self._sources.wait(1)
            with suppress(BlockingIOError):
                read(self._wake_in, 1 << 12)
            with self._lock, suppress(Exception):
                if self._told in ready:
                    self._revocation.told()
                self._revocation.check()
            for listener in list(self._listeners.values()):
                try:
                    while not self._stopping:
                        listener.monitor.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    continue

    # Thread: the forking one, in the child

    def _leave_ports(self) -> None:
        """Close listeners and connections in a forked child, or they would outlive the kernel."""
        held = self.listening()
        for connection in self._connections:
            if connection.held is not None:
                held.append((connection.descriptor, fstat(connection.held.fileno()).st_ino))
                connection.held.close()
                connection.held = None  # for the child's own children
        let_go(held)

    def listening(self) -> list[tuple[int, int]]:
        """Return descriptor and inode of each listening socket."""
        return [(listener.descriptor, listener.inode) for listener in self._listeners.values()]

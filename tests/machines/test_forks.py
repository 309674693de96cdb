"""What forked children have of their kernel, and what they print."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from support import (
    both_keys,
    client_of,
    connection_info,
    headless,
    printed_until,
    run_code,
    started,
    wait_for,
)

from curve_kernel.child_pipe import ChildPipe
from curve_kernel.keys import KeyPair

# 100,000 with CURVE_KERNEL_LINES=100000, stock beside with CURVE_KERNEL_STOCK=1.
COUNT = int(os.environ.get("CURVE_KERNEL_LINES", "2000"))
PREPARE = """
import os, psutil, socket, threading, warnings
warnings.filterwarnings('ignore', message='.*fork')  # from Python 3.12 on, in stock too
app = get_ipython().kernel.parent
port = app.iopub_thread._pipe_port

def forked(code):
    pid = os.fork()
    if pid == 0:
        try:
            code()
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(0)
    return pid

def wait(*pids):
    for pid in pids:
        os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Path]]:
    """A kernel, its client, and its log."""
    folder, keys = tmp_path_factory.mktemp("kernel"), KeyPair.generate()
    file, log = folder / "kernel.json", folder / "log"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    file.chmod(0o600)
    env = {"HOME": str(folder), "JUPYTER_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder)}
    with (
        log.open("w") as stderr,
        headless(file=file, stderr=stderr, env=env) as (process, info),
        client_of(info, keys) as client,
    ):
        assert run_code(client, PREPARE) == ("ok", "")
        yield process, client, log


def printed(client: Any, code: str, last: str) -> str:
    """Run *code*; gives what it and its children print, until *last* has come."""
    return printed_until(client, code, lambda text: last in text)


LINES = """
def lines():
    ports = set()
    for n in range(100):
        print(f'line {n} of 100', flush=True)
        ports |= {c.laddr.port for c in psutil.Process().net_connections('tcp')
                  if c.raddr and c.raddr.port == port}
    print(f'{len(ports)} connection', flush=True)
wait(forked(lines))
"""


def test_a_child_keeps_its_connection(kernel: tuple[Any, Any, Path]) -> None:
    """A handshake for each line took four times as long as stock's new connection for each line."""
    text = printed(kernel[1], LINES, "connection")
    assert re.findall(r"line (\d+) of", text) == [str(n) for n in range(100)]
    assert "1 connection" in text


def test_a_cell_is_idle_after_the_lines_of_its_children(kernel: tuple[Any, Any, Path]) -> None:
    """They are published faster than in stock, and none is left when the cell is over."""
    code = """
def lines():
    for n in range(3000):
        print(f'line {n} of 3000', flush=True)
wait(forked(lines))
"""
    status, text = run_code(kernel[1], code)
    assert status == "ok"
    assert re.findall(r"line (\d+) of", text) == [str(n) for n in range(3000)]


FAMILY = """
def thread(number):
    for n in range(25):
        print(f'thread {number} line {n}.\\n', end='', flush=True)

def grandchild():
    print('grandchild', flush=True)

def parent():
    threads = [threading.Thread(target=thread, args=(n,)) for n in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    print('before', flush=True)
    wait(forked(grandchild))
    print('x' * 3_000_000, flush=True)
    print('after', flush=True)
wait(forked(parent))
"""


def test_threads_and_children_of_a_child(kernel: tuple[Any, Any, Path]) -> None:
    text = printed(kernel[1], FAMILY, "after")
    for number in range(4):
        lines = re.findall(rf"thread {number} line (\d+)\.", text)
        assert lines == [str(n) for n in range(25)]
    assert "before" in text
    assert "grandchild" in text
    assert "x" * 3_000_000 in text
    assert "Traceback" not in text


MANY = """
for burst in range(15):
    wait(*(forked(lambda n=n: print(f'child {burst}.{n};', flush=True)) for n in range(10)))
"""


def test_own_children_are_not_rejected(kernel: tuple[Any, Any, Path]) -> None:
    """They come and go faster than their connections can be looked at."""
    _, client, log = kernel
    names = {f"{burst}.{n}" for burst in range(15) for n in range(10)}
    printed_until(client, MANY, lambda text: set(re.findall(r"child ([\d.]+);", text)) == names)
    rejected = "print([port.rejected for port in app.bound_ports() if port.channel == 'pipe'])"
    assert run_code(client, rejected) == ("ok", "[{}]\n")
    assert "pipe: rejected" not in log.read_text()


# One child after the other: of what many print at once a reader loses what it can't keep up with.
COUNTED = """
for n in range({count} // 500):
    wait(forked(lambda: [print(f'line {{n}}.{{m}};', flush=True) for m in range(500)]))
"""


@contextlib.contextmanager
def reader(client: Any) -> Iterator[zmq.Socket[bytes]]:
    """A subscriber that keeps up, where jupyter_client's loses what is beyond 1,000 messages."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = socket.rcvhwm = 0
        if client.curve_publickey:
            socket.curve_serverkey = socket.curve_publickey = client.curve_publickey
            socket.curve_secretkey = client.curve_secretkey
        socket.subscribe(b"")
        socket.connect(client._make_url("iopub"))
        wait_for("the subscription", lambda: run_code(client, "1") and socket.poll(100))
        yield socket


def seconds_for_lines(client: Any) -> float:
    """The time from the request until every line of every child has been read."""
    left = {b"%d.%d" % (child, m) for child in range(COUNT // 500) for m in range(500)}
    with reader(client) as socket:
        since = time.monotonic()
        client.execute(COUNTED.format(count=COUNT), allow_stdin=False)
        while left:
            assert socket.poll(60_000), f"{len(left)} lines have not come"
            frames = socket.recv_multipart()
            left.difference_update(re.findall(rb"line (\d+\.\d+);", frames[-1]))
        taken = time.monotonic() - since
    client.wait_for_ready(timeout=60)
    return taken


@pytest.mark.timeout(120 + COUNT // 50)
def test_many_lines_and_no_warning(kernel: tuple[Any, Any, Path]) -> None:
    """The kernel's own children are no strangers, whatever they print and however fast they go."""
    _, client, log = kernel
    before = log.read_text()
    taken = seconds_for_lines(client)
    print(f"{COUNT} lines of {COUNT // 500} children: {taken:.1f} s")
    rejected = "print([port.rejected for port in app.bound_ports() if port.channel == 'pipe'])"
    assert run_code(client, rejected) == ("ok", "[{}]\n")
    assert log.read_text() == before


@pytest.mark.skipif("CURVE_KERNEL_STOCK" not in os.environ, reason="for the figure beside")
@pytest.mark.timeout(120 + COUNT // 50)
def test_many_lines_of_stock() -> None:
    with started("python3") as (_, client):
        assert run_code(client, PREPARE) == ("ok", "")
        print(f"stock, {COUNT} lines: {seconds_for_lines(client):.1f} s")


NUMBER = """
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(('127.0.0.1', app.shell_port))
udp.settimeout(10)

def child():
    udp.sendto(b'to myself', udp.getsockname())
    print('got', udp.recv(99), flush=True)
wait(forked(child))
udp.close()
"""


def test_a_socket_of_the_users_with_the_number_of_a_port(kernel: tuple[Any, Any, Path]) -> None:
    assert "got b'to myself'" in printed(kernel[1], NUMBER, "got")


FILES = """
import curve_kernel.access.connection as connection, curve_kernel.access.monitor as monitor
files = [open(os.devnull) for _ in range(2000)]
real, calls = monitor.fstat, []

def counted(descriptor):
    calls.append(descriptor)
    return real(descriptor)
monitor.fstat = connection.fstat = counted
wait(forked(lambda: print('calls:', len(calls), os.fstat(files[-1].fileno()).st_ino > 0, flush=True)))
monitor.fstat = connection.fstat = real
del files
"""


def test_a_fork_does_not_look_at_the_users_files(kernel: tuple[Any, Any, Path]) -> None:
    """With 10,000 open files it took 81 ms, where stock took 7.5."""
    text = printed(kernel[1], FILES, "calls:")
    found = re.search(r"calls: (\d+) True", text)
    assert found, text
    assert int(found[1]) < 100


ORPHAN = """
def orphan():
    print('not yet', flush=True)
    while os.getppid() == {pid}:
        threading.Event().wait(0.05)
    print('nobody is there', flush=True)
    open({file!r}, 'w').close()
child = forked(orphan)
print(child)
"""


def test_a_child_prints_when_its_kernel_has_been_killed(
    kernel: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    """It goes on, after the three seconds that stock waits. The last test of this kernel."""
    process, client, _ = kernel
    file = tmp_path / "went on"
    text = printed(client, ORPHAN.format(pid=process.pid, file=str(file)), "not yet")
    child = int(re.findall(r"\d+", text)[0])
    process.kill()
    process.wait(30)
    wait_for("the child to go on", file.exists, 30)
    wait_for("the child to end", lambda: not psutil.pid_exists(child) or gone(child), 30)


def gone(pid: int) -> bool:
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        os.kill(pid, signal.SIGKILL)
    except (psutil.Error, ProcessLookupError):
        return True
    return False


def test_a_server_that_accepts_and_drops_has_the_port_of_the_pipe() -> None:
    """A child outlives its kernel, and another program gets that port: a line never ended."""
    server = socket.create_server(("127.0.0.1", 0))

    def drop() -> None:
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()

    threading.Thread(target=drop, daemon=True).start()
    since = time.monotonic()
    pipe = ChildPipe(server.getsockname()[1], KeyPair.generate(), KeyPair.generate().public_key)
    pipe.send_multipart([b"a line"])
    assert time.monotonic() - since < 4
    assert not pipe.is_open()
    server.shutdown(socket.SHUT_RDWR)
    server.close()

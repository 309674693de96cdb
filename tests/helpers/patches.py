"""What code in a cell does to the modules that a kernel uses too, and what must go on all the same."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import zmq
from jupyter_client import BlockingKernelClient as StockClient
from jupyter_client import KernelManager
from support import curve_socket, printed_until, run_code, wait_for

from curve_kernel.client import BlockingKernelClient
from curve_kernel.keys import KeyPair

PREPARE = """
import builtins, datetime, fcntl, json, logging, os, resource, select, signal, socket, struct, sys
import threading, time, warnings
warnings.filterwarnings('ignore', message='.*fork')
mine, theirs = socket.socketpair()

def deny(*_, **__):
    raise RuntimeError('not in this process')

def deny_in(owner, *names):
    for name in names:
        setattr(owner, name, deny)
"""
PATCHES = {
    # pytest-socket, PySocks, Mocket
    "socket class": """
class Denied(socket.socket):
    def __new__(cls, *_, **__):
        raise RuntimeError('no sockets')
socket.socket = socket.SocketType = Denied
""",
    "socket functions": "deny_in(socket, 'create_connection', 'fromfd', 'getaddrinfo', 'socketpair')",
    "socket timeout": "socket.setdefaulttimeout(0.05)",
    "os files": "deny_in(os, 'close', 'dup', 'dup2', 'fstat', 'open', 'pipe', 'pipe2', 'read')",
    "os write": "deny_in(os, 'write')",
    "os folders": "deny_in(os, 'listdir', 'scandir', 'register_at_fork', 'urandom')",
    "frozen clock": """
frozen = {}
for name, value in ('time', 1e9), ('monotonic', 5.0), ('perf_counter', 5.0):
    frozen[id(getattr(time, name))] = lambda value=value: value
for module in list(sys.modules.values()):  # as freezegun does it
    if getattr(module, '__name__', '').startswith(('curve_kernel', 'time')):
        for name, value in list(vars(module).items()):
            if id(value) in frozen:
                setattr(module, name, frozen[id(value)])
""",
    "no sleep": "time.sleep = lambda _: None",
    "datetime": "datetime.datetime = type('FakeDatetime', (datetime.datetime,), {})",
    "struct": "deny_in(struct, 'pack', 'unpack', 'unpack_from', 'pack_into', 'calcsize', 'Struct')",
    # gevent takes away what it can't make cooperative
    "select": "deny_in(select, 'select', 'poll', 'epoll')",
    "no epoll": "del select.epoll",
    "logging functions": "deny_in(logging, 'getLogger', 'info', 'warning', 'error'); logging.disable()",
    "fcntl": "deny_in(fcntl, 'fcntl', 'ioctl'); deny_in(resource, 'getrlimit', 'setrlimit')",
    "json": "deny_in(json, 'load', 'dump', 'JSONDecoder', 'JSONEncoder')",
    "signal": "deny_in(signal, 'signal', 'pthread_sigmask', 'getsignal')",
    "builtins": "builtins.input = deny; builtins.open = deny",
}
FORK = """
pid = os.fork()
if pid == 0:
    for n in range(20):
        print(f'child {n}', flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print('both block:', os.get_blocking(mine.fileno()), os.get_blocking(theirs.fileno()))
"""


def what_goes_on(km: KernelManager, client: Any, patches: list[str], owner: KeyPair) -> dict[str, Any]:
    """Patch a kernel, and see what goes on: clients, a fork's lines, a stranger, its end.

    Each is True, or what happened instead. Of the end it is the seconds, if the status was 0.
    """
    assert run_code(client, PREPARE) == ("ok", "")
    for name in patches:
        assert run_code(client, PATCHES[name]) == ("ok", ""), name
    encrypts = bool(km.curve_publickey)
    found: dict[str, Any] = {"further clients": _seen(lambda: further_clients(km, owner))}
    found["a fork that prints"] = _seen(lambda: fork_prints(client))
    if encrypts:
        found["a stranger is counted"] = _seen(lambda: stranger_is_counted(km, client))
    assert km.provisioner is not None
    process = km.provisioner.process  # type: ignore[attr-defined]
    since = time.monotonic()
    client.shutdown()
    ended = _seen(lambda: wait_for("the kernel to end", lambda: process.poll() is not None, 9))
    found["its end"] = round(time.monotonic() - since, 2) if ended is True else ended
    if ended is True and process.returncode != 0:
        found["its end"] = f"status {process.returncode}"
    return found


def _seen(act: Callable[[], object]) -> bool | str:
    try:
        act()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error)[-300:]}"
    return True


def further_clients(km: KernelManager, owner: KeyPair) -> None:
    for _ in range(2):
        # Not km.client(), which would have this session's routing id, and take it over in stock.
        other: Any = BlockingKernelClient(client_keys=owner) if km.curve_publickey else StockClient()
        info = km.get_connection_info()
        info.pop("curve_secretkey", None)
        other.load_connection_info(info)
        other.start_channels()
        try:
            other.wait_for_ready(timeout=30)
            assert run_code(other, "print('a further client')") == ("ok", "a further client\n")
        finally:
            other.stop_channels()


def fork_prints(client: Any) -> None:
    # The ends of the lines may come apart from them.
    numbers = {str(n) for n in range(20)}
    seen = printed_until(
        client, FORK, lambda text: set(re.findall(r"child (\d+)", text)) == numbers, 30
    )
    assert "both block: True True" in seen, seen


def stranger_is_counted(km: KernelManager, client: Any) -> None:
    with zmq.Context() as context:
        for server_key in (KeyPair.generate().public_key, km.curve_publickey):
            stranger = curve_socket(context, zmq.DEALER, server_key)
            stranger.connect(km._make_url("shell"))

            def counted(says: str) -> bool:
                status, text = run_code(client, "%curve")
                assert status == "ok", text
                return says in text

            says = "unknown key" if server_key == km.curve_publickey else "wrong server key"
            wait_for(f"a rejection: {says}", lambda says=says: counted(says), 20)
            stranger.close()

"""The kernel clients with keys of their own, and each way in which a connection can fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jupyter_client
import pytest
from support import both_keys, connection_info, headless, run_code, started

from curve_kernel import client as clients
from curve_kernel.errors import CurveKernelError
from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import load_identity, write_certificate

ALLOWLIST = "--CurveKernelApp.client_authorization=allowlist"
KINDS = [clients.BlockingKernelClient, clients.AsyncKernelClient, clients.ThreadedKernelClient]


def connect(kind, info, own=None, **channels):
    """Connect, execute something, leave; what a program does, in the way of each kind of client."""
    client = kind(client_keys=own)
    client.load_connection_info(info)

    async def asynchronously():
        client.start_channels(**channels)
        await client.wait_for_ready(timeout=60)
        reply = await client.execute("1 + 1", reply=True, timeout=60)
        return reply["content"]["status"]

    try:
        if kind is clients.AsyncKernelClient:
            return asyncio.run(asynchronously())
        client.start_channels(**channels)
        if kind is clients.BlockingKernelClient:
            client.wait_for_ready(timeout=60)
            return client.execute("1 + 1", reply=True, timeout=60)["content"]["status"]
        answered = threading.Event()
        replies = []

        def take(message):
            if message["msg_type"] == "execute_reply":
                replies.append(message["content"]["status"])
                answered.set()

        client.shell_channel.call_handlers = take
        client.execute("1 + 1")
        assert answered.wait(60)
        return replies[0]
    finally:
        client.stop_channels()


def failure(kind, info, own=None, **channels) -> CurveKernelError:
    """The exception, which comes within five seconds on a machine that has them to spare."""
    start = time.monotonic()
    with pytest.raises(CurveKernelError) as caught:
        connect(kind, info, own, **channels)
    assert time.monotonic() - start < 20
    assert caught.value.hint
    if own is not None:
        assert own.secret_key.decode() not in str(caught.value)
    return caught.value


def in_a_process(program: str, tmp_path: Path, info: dict, *words: str):
    """Run *program* with a file that holds *info*, and further words, as its arguments."""
    file = tmp_path / "copy.json"
    file.write_text(json.dumps(info))
    command = [sys.executable, "-c", program, str(file), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def kernel(tmp_path, folder):
    """The content of the connection file of a kernel with an allowlist; no secret key in it."""
    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(curve_publickey=keys.public_key.decode())))
    env = {"JUPYTER_CURVE_SECRETKEY": keys.secret_key.decode()}
    with headless(ALLOWLIST, file=file, env=env) as (_, info):
        yield info


@pytest.mark.parametrize("kind", KINDS)
class TestEach:
    def test_a_given_pair(self, kind, kernel, folder):
        own = KeyPair.generate()
        write_certificate(folder / "owners" / "olga.key", own.public_key)
        assert connect(kind, kernel, own) == "ok"

    def test_the_users_identity(self, kind, kernel, folder):
        own = KeyPair.generate()
        write_certificate(folder / "identity.key_secret", own.public_key, own.secret_key)
        write_certificate(folder / "owners" / "olga.key", own.public_key)
        assert connect(kind, kernel) == "ok"

    def test_a_fresh_pair_where_anybody_may_connect(self, kind):
        with headless() as (_, info):
            assert load_identity() is None
            assert connect(kind, info) == "ok"

    def test_both_keys_of_the_file_as_stock(self, kind, tmp_path):
        file = tmp_path / "kernel.json"
        file.write_text(json.dumps(connection_info(**both_keys(KeyPair.generate()))))
        with headless(ALLOWLIST, file=file) as (_, info):
            assert connect(kind, info) == "ok"

    def test_a_key_that_is_not_authorized(self, kind, kernel):
        own = KeyPair.generate()
        error = failure(kind, kernel, own)
        assert type(error) is clients.KeyNotAuthorizedError
        assert "key not authorized" in error.message
        assert own.public_key.decode() in error.message

    def test_a_viewer_on_channels_that_are_not_for_viewers(self, kind, kernel, folder):
        own = KeyPair.generate()
        write_certificate(folder / "viewers" / "vera.key", own.public_key)
        error = failure(kind, kernel, own)
        assert type(error) is clients.ChannelNotForViewersError
        assert "not for viewers" in error.message
        error = failure(kind, kernel, own, iopub=False, stdin=False, control=False)
        assert type(error) is clients.ChannelNotForViewersError

    def test_not_the_server_key_in_the_file(self, kind, kernel):
        other = {**kernel, "curve_publickey": KeyPair.generate().public_key.decode()}
        error = failure(kind, other)
        assert type(error) is clients.WrongServerKeyError
        assert "server key" in error.message

    def test_a_server_that_speaks_no_curve(self, kind):
        with started("python3", transport_encryption="disabled") as (km, _):
            info = json.loads(Path(km.connection_file).read_text())
            assert type(failure(kind, info)) is clients.NoCurveServerError
            info["curve_publickey"] = KeyPair.generate().public_key.decode()
            error = failure(kind, info)
            assert type(error) is clients.NoCurveServerError
            assert "speaks no CURVE" in error.message

    def test_nobody_there(self, kind, kernel):
        with contextlib.ExitStack() as stack:
            ports = []
            for _ in range(5):
                holder = stack.enter_context(socket.socket())
                holder.bind(("127.0.0.1", 0))
                ports.append(holder.getsockname()[1])
            names = [name for name in kernel if name.endswith("_port")]
            # Bound, but not listening: nobody answers, and nobody else takes the port meanwhile.
            error = failure(kind, {**kernel, **dict(zip(names, ports, strict=True))})
        assert type(error) is clients.NobodyThereError
        assert "nobody answers" in error.message

    def test_somebody_who_says_nothing(self, kind, kernel):
        with contextlib.ExitStack() as stack:
            ports = []
            for _ in range(5):
                silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                ports.append(silent.getsockname()[1])
            names = [name for name in kernel if name.endswith("_port")]
            error = failure(kind, {**kernel, **dict(zip(names, ports, strict=True))})
        assert type(error) is clients.NobodyThereError


@pytest.mark.parametrize("value", [None, "", "x" * 40 + "y", 5])
def test_a_malformed_server_key(value):
    client = clients.BlockingKernelClient()
    with pytest.raises(CurveKernelError):
        client.load_connection_info(connection_info(curve_publickey=value))


def test_no_server_key_at_all_never_means_plaintext():
    client = clients.BlockingKernelClient()
    with pytest.raises(clients.NoCurveServerError):
        client.start_channels()


def test_drop_in_as_a_managers_client_class():
    name = "curve_kernel.client.BlockingKernelClient"
    with started("python3-curve", client_class=name) as (_, client):
        assert isinstance(client, clients.BlockingKernelClient)
        assert run_code(client, "print('in')") == ("ok", "in\n")


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_at_once_does_not_hang(kind, kernel, folder):
    own = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", own.public_key)

    async def come_and_go(info):
        client = kind(client_keys=own)
        client.load_connection_info(info)
        with contextlib.suppress(CurveKernelError):
            client.start_channels()
        client.stop_channels()

    start = time.monotonic()
    asyncio.run(come_and_go(kernel))
    asyncio.run(come_and_go({**kernel, "shell_port": 1}))
    assert time.monotonic() - start < 60


def test_the_async_client_without_a_loop_checks_at_once(kernel):
    client = clients.AsyncKernelClient(client_keys=KeyPair.generate())
    client.load_connection_info(kernel)
    with pytest.raises(clients.KeyNotAuthorizedError):
        client.start_channels()


def test_they_are_jupyter_clients_own():
    assert issubclass(clients.BlockingKernelClient, jupyter_client.BlockingKernelClient)
    assert issubclass(clients.AsyncKernelClient, jupyter_client.AsyncKernelClient)


def test_a_connection_file_by_path(tmp_path, kernel, folder):
    own = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", own.public_key)
    client = clients.BlockingKernelClient(
        connection_file=str(tmp_path / "kernel.json"), client_keys=own
    )
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        assert run_code(client, "print(3)") == ("ok", "3\n")
    finally:
        client.stop_channels()


def test_an_identity_open_to_others_is_refused(kernel, folder):
    own = KeyPair.generate()
    path = folder / "identity.key_secret"
    write_certificate(path, own.public_key, own.secret_key)
    path.chmod(0o644)
    error = failure(clients.BlockingKernelClient, kernel)
    assert "0644" in error.message
    assert own.secret_key.decode() not in str(error)


SLOW = """
import sys, time
from jupyter_client.channels import HBChannel

class SlowHeartbeat(HBChannel):
    def run(self):
        time.sleep(0.5)
        super().run()

from curve_kernel.client import BlockingKernelClient, KeyNotAuthorizedError
from curve_kernel.keys import KeyPair
client = BlockingKernelClient(client_keys=KeyPair.generate())
client.hb_channel_class = SlowHeartbeat
client.load_connection_file(sys.argv[1])
try:
    client.start_channels()
except KeyNotAuthorizedError:
    print("refused", client.channels_running)
"""


def test_a_client_that_is_refused_at_once_ends_with_its_heartbeat(kernel, folder, tmp_path):
    """On a busy machine the heartbeat's thread has not begun by then."""
    done = in_a_process(SLOW, tmp_path, kernel)
    assert (done.stdout, done.stderr) == ("refused False\n", "")


UNSTOPPED = """
import gc, sys
from curve_kernel.client import AsyncKernelClient, BlockingKernelClient

gc.disable()
for kind in 2 * [BlockingKernelClient, AsyncKernelClient]:
    client = kind(connection_file=sys.argv[1])
    client.load_connection_file()
    client.start_channels(hb=False)
    client.itself = client
    if len(sys.argv) > 2:
        for channel in ("shell", "iopub", "stdin", "control"):
            setattr(client, f"_{channel}_channel", None)
    del client
    gc.collect()
print("collected")
"""


@pytest.mark.parametrize("which", [[], ["channels gone"]], ids=["whole", "without channels"])
def test_a_client_that_was_never_stopped_can_be_collected(which, tmp_path):
    """Its context waits for every socket, and Python may finalize it before them."""
    with headless() as (_, info):
        done = in_a_process(UNSTOPPED, tmp_path, info, *which)
    assert (done.stdout, done.returncode) == ("collected\n", 0), done.stderr


SLEEP = "import time; time.sleep(60)"
LIMIT = 5


def listed(folder: Path, role: str, name: str) -> KeyPair:
    own = KeyPair.generate()
    write_certificate(folder / role / f"{name}.key", own.public_key)
    return own


def raises_in_threads(waits) -> dict[str, BaseException]:
    """Run each in a thread of its own; gives what they raise, once all have."""
    raised = {}

    def run(name, wait):
        try:
            wait()
        except BaseException as error:  # noqa: BLE001
            raised[name] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in waits.items()]
    for thread in threads:
        thread.start()
    return threads, raised


def connected(kind, info, own, **channels):
    client = kind(client_keys=own)
    client.load_connection_info(info)
    client.start_channels(**channels)
    return client


def test_clients_that_are_refused_after_a_restart_notice_it(folder):
    """Each waits without a limit of its own, as a program does that waits for a result."""
    with started("python3-curve") as (km, manager), contextlib.ExitStack() as stack:
        info = json.loads(Path(km.connection_file).read_text())
        own, viewer = listed(folder, "owners", "olga"), listed(folder, "owners", "vera")
        waiting = {
            name: connected(clients.BlockingKernelClient, info, viewer if name == "viewer" else own)
            for name in ("shell", "control", "stdin", "iopub", "interactive", "viewer")
        }
        threaded = connected(clients.ThreadedKernelClient, info, own)
        for client in (*waiting.values(), threaded):
            stack.callback(client.stop_channels)
        manager.execute(SLEEP)
        waiting["interactive"].allow_stdin = False
        waits = {
            "interactive": lambda: waiting["interactive"].execute_interactive("1"),
            "viewer": lambda: waiting["viewer"].execute("1", reply=True),
            "async": lambda: asyncio.run(asynchronously()),
        }

        def flood(client):
            while True:
                client.get_iopub_msg()

        waits["iopub"] = lambda: flood(waiting["iopub"])
        for channel in ("shell", "control", "stdin"):
            waits[channel] = getattr(waiting[channel], f"get_{channel}_msg")
        ready = threading.Event()

        async def asynchronously():
            client = connected(clients.AsyncKernelClient, info, own)
            try:
                ready.set()
                results = await asyncio.gather(
                    client.get_shell_msg(),
                    client.execute_interactive("1", allow_stdin=False),
                    return_exceptions=True,
                )
                assert not await client.is_alive()
                assert {type(one) for one in results} == {clients.KeyNotAuthorizedError}
                raise results[0]
            finally:
                client.stop_channels()

        threads, raised = raises_in_threads(waits)
        assert ready.wait(60)
        assert threaded.refusal is None
        (folder / "owners" / "olga.key").unlink()
        (folder / "owners" / "vera.key").rename(folder / "viewers" / "vera.key")
        km.restart_kernel(now=True)
        restarted = time.monotonic()
        for thread in threads:
            thread.join(30)
        assert time.monotonic() - restarted < LIMIT
        viewers = raised.pop("viewer")
        assert type(viewers) is clients.ChannelNotForViewersError
        assert {name: type(error) for name, error in raised.items()} == dict.fromkeys(
            waits.keys() - {"viewer"}, clients.KeyNotAuthorizedError
        )
        assert "any more" in raised["shell"].message
        assert isinstance(threaded.refusal, clients.KeyNotAuthorizedError)
        assert not threaded.is_alive()
        assert not waiting["shell"].is_alive()
        with pytest.raises(clients.KeyNotAuthorizedError):
            waiting["shell"].wait_for_ready(timeout=5)


def test_a_client_outlives_a_restart_of_the_kernel(folder):
    with started("python3-curve") as (km, _):
        own = listed(folder, "owners", "olga")
        client = connected(
            clients.BlockingKernelClient, json.loads(Path(km.connection_file).read_text()), own
        )
        try:
            km.restart_kernel(now=True)
            client.wait_for_ready(timeout=60)
            assert run_code(client, "print('on')") == ("ok", "on\n")
            assert client.refusal is None
        finally:
            client.stop_channels()


def test_another_kernel_at_the_same_ports(tmp_path):
    file = tmp_path / "kernel.json"
    with headless(file=file) as (_, info):
        client = connected(clients.BlockingKernelClient, info, None)
    try:
        file.unlink(missing_ok=True)
        ports = [f"--{name}={info[f'{name}_port']}" for name in ("shell", "iopub", "control", "hb")]
        with pytest.raises(TimeoutError):
            client.kernel_info(reply=True, timeout=2)  # nobody is there, which may change
        with headless(*ports, file=file) as (_, other):
            assert other["shell_port"] == info["shell_port"]
            start = time.monotonic()
            with pytest.raises(clients.WrongServerKeyError):
                client.get_shell_msg()
            assert time.monotonic() - start < LIMIT
    finally:
        client.stop_channels()


class Forwarder:
    """What ssh does with a forwarded port: it accepts in any case, and hangs up if nobody is there."""

    def __init__(self, port: int) -> None:
        self.target, self.hang_ups = port, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours = self.server.accept()[0]
                try:
                    theirs = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    self.hang_ups += 1
                    ours.close()
                    continue
                for one, other in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_restart_behind_a_tunnel_is_no_refusal(tmp_path, folder):
    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    content = connection_info(curve_publickey=keys.public_key.decode())
    env = {"JUPYTER_CURVE_SECRETKEY": keys.secret_key.decode()}
    file.write_text(json.dumps(content))
    own = listed(folder, "owners", "olga")
    with contextlib.ExitStack() as stack:
        with headless(ALLOWLIST, file=file, env=env) as (_, info):
            forwarders = {
                name: Forwarder(value) for name, value in info.items() if name.endswith("_port")
            }
            for one in forwarders.values():
                stack.callback(one.server.close)
            tunneled = info | {name: one.port for name, one in forwarders.items()}
            client = connected(clients.BlockingKernelClient, tunneled, own)
            stack.callback(client.stop_channels)
            client.wait_for_ready(timeout=60)
        shell = forwarders["shell_port"]
        while shell.hang_ups < 20:
            with pytest.raises(TimeoutError):
                client.kernel_info(reply=True, timeout=0.2)
        file.write_text(json.dumps(info))
        with headless(ALLOWLIST, file=file, env=env):
            client.wait_for_ready(timeout=60)
            assert client.refusal is None
    with contextlib.ExitStack() as stack:
        # And nobody behind it from the start is not a kernel of another kind.
        forwarder = Forwarder(info["shell_port"])
        stack.callback(forwarder.server.close)
        ports = dict.fromkeys((name for name in info if name.endswith("_port")), forwarder.port)
        assert type(failure(clients.BlockingKernelClient, info | ports)) is clients.NobodyThereError


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_opens_no_channel(kind):
    """Upstream makes each channel to ask whether it is alive, and the kernel sees an intruder."""
    used = {"shell": False, "stdin": False, "hb": False, "control": False}
    with headless() as (_, info):
        client = kind(client_keys=KeyPair.generate())
        client.load_connection_info(info)

        async def start_and_stop():
            client.start_channels(**used)
            client.stop_channels()

        asyncio.run(start_and_stop())
        assert [name for name in used if getattr(client, f"_{name}_channel") is not None] == []


INTERRUPTED = """
import contextlib, faulthandler, gc, json, random, signal, sys, time
from curve_kernel.client import BlockingKernelClient
from curve_kernel.keys import KeyPair

info = json.load(open(sys.argv[1]))

def come_and_go():
    client = BlockingKernelClient(client_keys=KeyPair.generate())
    client.load_connection_info(info)
    try:
        client.start_channels(shell=False, stdin=False, control=False, hb=False)
    finally:
        client.stop_channels()

signal.signal(signal.SIGALRM, signal.default_int_handler)
come_and_go()
random.seed(1)
interrupted, end = 0, time.monotonic() + 6
while time.monotonic() < end:
    faulthandler.dump_traceback_later(20, exit=True)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.02))
            come_and_go()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    gc.collect()
print(interrupted)
"""


def test_ctrl_c_at_any_moment_leaves_nothing_to_wait_for(tmp_path):
    with headless() as (_, info):
        done = in_a_process(INTERRUPTED, tmp_path, info)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 10

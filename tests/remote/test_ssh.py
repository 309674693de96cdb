"""Kernels on another host by ssh: a real sshd in a network namespace."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
import zmq
from far import FarHost, call, end, far_host, needs_root, start
from jupyter_client import KernelManager
from jupyter_client.connect import channel_socket_types
from jupyter_client.ioloop import IOLoopKernelManager
from support import CHANNELS, MODULE, begin, check_interrupt, run_code, started, value, wait_for

from curve_kernel import sockets
from curve_kernel.client import BlockingKernelClient
from curve_kernel.errors import CurveKernelError
from curve_kernel.keys import KeyPair
from curve_kernel.wire import read_mechanism

pytestmark = needs_root
Z85 = rb"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]"


@pytest.fixture(scope="module")
def far() -> Iterator[FarHost]:
    with far_host() as host:
        yield host


@pytest.fixture(autouse=True)
def _nothing_is_left(far: FarHost) -> Iterator[None]:
    far.restore()
    yield
    far.restore()
    for word in ("curve_kernel launch", "curve_kernel -f"):
        wait_for(f"the end of {word}", lambda word=word: not far.processes(word), 20)


def ssh_processes(far: FarHost) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[0] == b"ssh" and str(far.folder).encode() in b" ".join(words):
                found.append(entry.name)
    return found


def fails(name: str, says: str, hint: str = "", within: float = 20) -> str:
    """A start that ends in an error, soon."""
    manager, before = KernelManager(kernel_name=name), time.monotonic()
    with pytest.raises(CurveKernelError) as caught:
        manager.start_kernel()
    assert time.monotonic() - before < within
    assert says in caught.value.message
    assert hint in caught.value.hint
    return str(caught.value.message)


def test_a_session(far, monkeypatch):
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", token := secrets.token_hex(16))
    monkeypatch.setenv("MINE", "of the desk")
    folder = far.user.home / "work"
    folder.mkdir(exist_ok=True)
    far.kernelspec("far", env={"GIVEN": "${MINE}!"}, cwd="~/work", ports="20000-20050")
    with started("far") as (km, client):
        assert value(client, "[__import__('getpass').getuser(), __import__('os').getcwd()]") == [
            far.user.name,
            str(folder),
        ]
        environment = value(client, "dict(__import__('os').environ)")
        assert environment["GIVEN"] == "of the desk!"
        assert token not in environment.values()
        assert "MINE" not in environment
        assert not [name for name in environment if "CURVE" in name]
        # Nobody has tried to connect in vain, the manager in plaintext for example.
        assert "rejected because" not in run_code(client, "%curve")[1]
        assert ssh_processes(far) == []
        assert km.ip == far.address
        assert all(20000 <= port <= 20050 for port in km.ports)
        for channel in CHANNELS:
            assert read_mechanism(km._make_url(channel)) == "CURVE"
        info = json.loads(Path(km.connection_file).read_text())
        assert info["curve_publickey"] == km.curve_publickey.decode()
        assert "curve_secretkey" not in info

        done = subprocess.run(
            [*MODULE, "status", "--json", km.connection_file],
            capture_output=True,
            timeout=60,
            check=True,
        )
        [seen] = json.loads(done.stdout)
        assert (seen["verdict"], seen["secret_key_in_file"]) == ("encrypted", False)

        # Interrupt goes by message.
        check_interrupt(client, km.interrupt_kernel)

        # Input.
        request = client.execute("print(input('who? '))", allow_stdin=True)
        assert client.get_stdin_msg(timeout=20)["content"]["prompt"] == "who? "
        client.input("Ada")
        assert client._recv_reply(request, timeout=20)["content"]["status"] == "ok"

        # A restart is one of the kernel, with the same launcher, keys and ports.
        run_code(client, "x = 1")
        launcher, ports, key = far.processes("curve_kernel launch"), km.ports, km.curve_publickey
        pid = value(client, "__import__('os').getpid()")
        for now in (False, True):
            km.restart_kernel(now=now)
            client.wait_for_ready(timeout=60)
            assert value(client, "'x' in globals()") is False
            assert far.processes("curve_kernel launch") == launcher
            assert (km.ports, km.curve_publickey) == (ports, key)
        assert value(client, "__import__('os').getpid()") != pid

        # A kernel that dies is seen to have died.
        client.execute("import os; os._exit(7)")
        wait_for("the end of the kernel", lambda: not km.is_alive(), 10)
        km.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert run_code(client, "6 * 7") == ("ok", "42")
    wait_for("the end of all", lambda: not far.processes("curve_kernel"), 10)
    assert not list(far.user.home.glob("**/kernel-*.json"))


def secret_of(pid: int, server_key: bytes) -> bytes:
    """The secret key, out of the memory of a process that holds it."""
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split()
            if not fields[1].startswith("rw") or (len(fields) > 5 and fields[5].startswith("/")):
                continue
            first, last = (int(word, 16) for word in fields[0].split("-"))
            try:
                memory.seek(first)
                content = memory.read(last - first)
            except (OSError, ValueError):
                continue
            for found in re.finditer(rb"(?=(" + Z85 + rb"{40})\0)", content):
                with contextlib.suppress(zmq.ZMQError):
                    if zmq.curve_public(found[1]) == server_key:
                        return found[1]
    raise AssertionError("the launcher holds no secret key")


def places(*folders: Path) -> Iterator[tuple[str, bytes]]:
    """Files, command lines and environments."""
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and "site-packages" not in path.parts:
                    yield str(path), path.read_bytes()
    for entry in Path("/proc").iterdir():
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    yield f"{entry}/{name}", (entry / name).read_bytes()


@pytest.mark.parametrize("network", ["direct", "tunnel"])
def test_the_secret_key_never_leaves_and_nothing_is_plain(far, network, tmp_path):
    marker, said = secrets.token_hex(16), secrets.token_hex(16)
    capture = tmp_path / "cable.pcap"
    words = ["tcpdump", "-i", "cable", "-s", "0", "-U", "-Z", "root", "-w", str(capture)]
    tcpdump = start([*far.prefix, *words], tmp_path / "tcpdump.log")
    wait_for("tcpdump", capture.exists, 20)
    far.kernelspec("far", network=network, env={"PASSWORD": said})
    try:
        with started("far") as (km, client):
            assert run_code(client, f"print({marker!r})") == ("ok", f"{marker}\n")
            [launcher] = far.processes("curve_kernel launch")
            server_key = km.curve_publickey
            secret = secret_of(launcher, server_key)
            homes = (far.user.home, far.folder, Path(os.environ["HOME"]))
            seen = dict(places(*homes))
            raw = zmq.utils.z85.decode(secret)
            for form in (secret, raw, raw.hex().encode()):
                assert [name for name, content in seen.items() if form in content] == []
            # The search does find what is there.
            assert [name for name, content in seen.items() if server_key in content]
            time.sleep(0.5)
    finally:
        end(tcpdump)
    packets = capture.read_bytes()
    assert len(packets) > 20_000
    for form in (secret, raw, raw.hex().encode(), marker.encode(), said.encode()):
        assert form not in packets


def test_a_stranger_gets_nothing(far):
    """Who has the connection file: on the kernel's ports, the launcher's, and a tunnel's."""
    for network in ("direct", "tunnel"):
        far.kernelspec(network, network=network)
        with started(network) as (km, client):
            info = json.loads(Path(km.connection_file).read_text())
            ports = {channel: info[f"{channel}_port"] for channel in CHANNELS}
            ports["launcher"] = int(km.provisioner._link.url.rpartition(":")[2])
            with zmq.Context() as context:
                for channel, port in ports.items():
                    kind = channel_socket_types.get(channel, zmq.DEALER)
                    with (
                        context.socket(kind) as socket,
                        contextlib.closing(socket.get_monitor_socket()) as events,
                    ):
                        socket.linger = 0
                        sockets.make_client(socket, KeyPair.generate(), km.curve_publickey)
                        socket.connect(f"tcp://{km.ip}:{port}")
                        seen = set()
                        while zmq.EVENT_HANDSHAKE_FAILED_AUTH not in seen:
                            assert events.poll(10_000), (channel, seen)
                            seen.add(zmq.utils.monitor.recv_monitor_message(events)["event"])
                        assert zmq.EVENT_HANDSHAKE_SUCCEEDED not in seen
                        socket.disable_monitor()
            assert run_code(client, "6 * 7") == ("ok", "42")


def test_what_fails_says_why(far, tmp_path):
    empty = tmp_path / "known_hosts"
    empty.write_text("")
    options = [*far.ssh_options, "-o", f"UserKnownHostsFile={empty}"]
    far.kernelspec("unknown-key", ssh_options=options)
    fails("unknown-key", "ost key ", "always checked")
    wrong = tmp_path / "wrong"
    key = " ".join((far.folder / "user_key.pub").read_text().split()[:2])
    wrong.write_text(f"{far.address} {key}\n")
    far.kernelspec("wrong-key", ssh_options=[*far.ssh_options, "-o", f"UserKnownHostsFile={wrong}"])
    fails("wrong-key", "ost key verification failed", "always checked")
    for text in ("StrictHostKeyChecking=no", "stricthostkeychecking accept-new"):
        far.kernelspec("unchecked", ssh_options=[*far.ssh_options, "-o", text])
        fails("unchecked", "always checked")
    far.kernelspec("no-python", python="/nowhere/python")
    fails("no-python", "there is no python at /nowhere/python on far", "python")
    far.kernelspec("no-package", python="/usr/bin/python3")
    fails("no-package", "/usr/bin/python3 on far can't start a kernel: ", "pip install")
    far.kernelspec("no-name", host="nobody.invalid")
    fails("no-name", "ssh could not connect to nobody.invalid")
    far.kernelspec("no-folder", cwd="/nowhere")
    fails("no-folder", "there is no folder /nowhere")
    far.kernelspec("no-address", ip="192.0.2.1")
    fails("no-address", "192.0.2.1 can't be listened on")
    fake = far.user.home / "fake"
    fake.write_text('#!/bin/sh\necho Welcome\necho \'{"curve_kernel": "9.9", "protocol": 99}\'\n')
    fake.chmod(0o755)
    far.kernelspec("newer", python=str(fake))
    fails("newer", "curve_kernel 9.9 on far and", "same version")
    fake.write_text("#!/bin/sh\necho 'curve_kernel: error: no such command: launch' >&2; exit 1\n")
    fails("newer", "is too old to be started from elsewhere", "pip install --upgrade")
    far.kernelspec("misspelt", start_timeuot=3)
    fails("misspelt", "no option start_timeuot")


def test_a_host_that_says_nothing(far):
    far.kernelspec("silent", start_timeout=2)
    far.cut()
    fails("silent", "said nothing in 2 seconds", "ssh -v", within=5)


def test_a_firewall_that_lets_only_ssh_through(far):
    far.kernelspec("far", ports="20000-20050", start_timeout=5)
    far.only_ssh()
    assert ":200" in fails("far", "nobody answers at tcp://", "network=tunnel", within=20)
    wait_for("the end of the launcher", lambda: not far.processes("curve_kernel"), 5)
    far.kernelspec("far", network="tunnel")
    with started("far") as (_, client):
        assert run_code(client, "6 * 7") == ("ok", "42")


def test_another_server_at_that_address(far):
    """What is reached is a CURVE server with another key, as after an address was given away."""
    far.kernelspec("far", ports="20100-20110", reach="127.0.0.1")
    with zmq.Context() as context:
        servers = []
        for port in range(20100, 20111):
            server = context.socket(zmq.ROUTER)
            server.linger = 0
            server.curve_server = True
            server.curve_publickey, server.curve_secretkey = zmq.curve_keypair()
            server.bind(f"tcp://127.0.0.1:{port}")
            servers.append(server)
        fails("far", "wrong server key")
        for server in servers:
            server.close()


def test_a_tunnel_is_one_process_and_comes_back(far):
    far.kernelspec("far", network="tunnel")
    with started("far", IOLoopKernelManager) as (km, client):
        assert km.ip == "127.0.0.1"
        [before] = ssh_processes(far)
        run_code(client, "x = 1")
        os.kill(int(before), signal.SIGKILL)
        assert km.is_alive()
        wait_for("another ssh", lambda: [p for p in ssh_processes(far) if p != before], 20)
        # What iopub publishes until a client has connected again is lost.
        wait_for("the same state", lambda: run_code(client, "print(x)") == ("ok", "1\n"), 60)
        assert km.is_alive()
        # And a kernel that is gone is told from a tunnel that is.
        for pid in far.processes("curve_kernel"):
            os.kill(pid, signal.SIGKILL)
        wait_for("the end of the kernel", lambda: not km.is_alive(), 15)
    wait_for("the end of ssh", lambda: ssh_processes(far) == [], 5)


@pytest.mark.parametrize("network", ["direct", "tunnel"])
def test_the_network_is_away_for_a_while(far, network):
    """What a cell prints meanwhile arrives when the network is back, all of it."""
    seconds = float(os.environ.get("CURVE_KERNEL_CUT_SECONDS", "8"))
    lines = int(seconds) + 3
    far.kernelspec("far", network=network)
    with started("far", IOLoopKernelManager) as (km, client):
        run_code(client, "x = 1")
        code = f"import time\nprint('begun')\nfor n in range({lines}): time.sleep(1); print(n)"
        request = begin(client, code)
        far.cut()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert km.is_alive()
            time.sleep(1)
        far.restore()
        back, printed = time.monotonic(), ""
        while not printed.endswith(f"{lines - 1}\n"):
            printed += client.get_iopub_msg(timeout=120)["content"].get("text", "")
        assert printed.split() == [str(n) for n in range(lines)]
        print(f"cut for {seconds:.0f} s; went on {time.monotonic() - back:.1f} s after that")
        assert client._recv_reply(request, timeout=60)["content"]["status"] == "ok"
        assert value(client, "x") == 1
        assert km.is_alive()


FORGET = """
import ctypes, os, socket, threading, time

def forget():
    time.sleep(3)
    libc = ctypes.CDLL(None)
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            peer = (one := socket.socket(fileno=os.dup(int(descriptor)))).getpeername()
        except OSError:
            continue
        if peer[:1] == (DESK,):
            libc.connect(one.fileno(), bytes(16), 16)  # AF_UNSPEC: gone, as after a time limit
    for n in range(600):
        time.sleep(0.2)
        print("tick", n)

threading.Thread(target=forget, daemon=True).start()
print("begun")
"""


def test_a_host_that_has_given_up_the_connections(far):
    """As a host does to a desk that sleeps for long, which does not get to know."""
    far.kernelspec("far")
    with started("far", IOLoopKernelManager) as (km, client):
        run_code(client, f"x, DESK = 1, {far.desk_address!r}")
        begin(client, FORGET)
        far.cut()
        time.sleep(8)
        while True:
            try:
                client.get_iopub_msg(timeout=0)
            except queue.Empty:
                break
        far.restore()
        back, text = time.monotonic(), ""
        while "tick" not in text:
            text = client.get_iopub_msg(timeout=60)["content"].get("text", "")
        print(f"heard again after {time.monotonic() - back:.1f} s")
        assert value(client, "x") == 1
        assert km.is_alive()


SLEEPS = """
client = km.client()
client.start_channels()
client.wait_for_ready(timeout=60)
client.execute_interactive("x = 42", timeout=60)
print("ready", flush=True)
sys.stdin.readline()
client.execute_interactive("print(x)", timeout=60)
print(km.is_alive(), flush=True)
client.stop_channels()
km.shutdown_kernel()
"""


def test_a_laptop_that_sleeps(far):
    """Its processes stand still, and it answers nothing, until the launcher takes it for gone."""
    far.kernelspec("far", orphan_timeout=12)
    process, _ = desk("far", SLEEPS)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        far.cut()
        time.sleep(10)
        far.restore()
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("\n", timeout=90)
        assert out == "42\nTrue\n"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("restarts", [False, True])
def test_the_host_loses_its_processes(far, restarts):
    """By a kill, or as it starts anew; only a person starts the kernel again."""
    far.kernelspec("far")
    with started("far", IOLoopKernelManager) as (km, client):
        dead: list[float] = []
        restarted: list[object] = []
        km.add_restart_callback(lambda: dead.append(time.monotonic()), "dead")
        km.add_restart_callback(lambda: restarted.append(1), "restart")
        if restarts:
            far.cut()
        for pid in far.processes("curve_kernel"):
            os.kill(pid, signal.SIGKILL)
        if restarts:
            time.sleep(5)
            assert km.is_alive()
            far.restore()
        killed = time.monotonic()
        wait_for("the end of the kernel", lambda: km.is_alive() is False or dead, 30)
        print(f"dead after {time.monotonic() - killed:.1f} s")
        assert restarted == []
        assert km.is_alive() is False
        client.stop_channels()
        km.restart_kernel()
        again = km.client()
        again.start_channels()
        again.wait_for_ready(timeout=60)
        assert run_code(again, "6 * 7") == ("ok", "42")
        again.stop_channels()


DESK = """
import sys, time
from jupyter_client import KernelManager
from jupyter_client.connect import channel_socket_types
km = KernelManager(kernel_name=sys.argv[1])
km.start_kernel()
print(km.connection_file, flush=True)
{}
"""


def desk(name: str, then: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", DESK.format(then), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_desk_that_is_gone_for_good(far):
    far.kernelspec("far", orphan_timeout=3)
    for cut in (False, True):
        process, _ = desk("far", "time.sleep(100)")
        assert far.processes("curve_kernel -f")
        if cut:
            far.cut()
        process.kill()
        process.wait(10)
        gone = time.monotonic()
        wait_for("the end of the kernel", lambda: not far.processes("curve_kernel"), 30)
        print(f"ended after {time.monotonic() - gone:.1f} s")
        assert time.monotonic() - gone > 1.5
        far.restore()


def test_a_program_that_forgets_its_kernel(far):
    far.kernelspec("far")
    process, file = desk("far", "")
    assert file
    process.wait(20)
    wait_for("the end of the kernel", lambda: not far.processes("curve_kernel"), 5)


def test_the_users_own_identity_joins(far):
    """A server that was restarted knows the kernel's connection file, and the identity only."""
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, capture_output=True)
    far.kernelspec("far", orphan_timeout=3)
    process, file = desk("far", "time.sleep(100)")
    process.kill()
    process.wait(10)
    client = BlockingKernelClient(connection_file=file)
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=20)
    assert run_code(client, "6 * 7") == ("ok", "42")
    time.sleep(6)
    # It lives as long as somebody is there who came.
    run_code(client, "kept = 42")
    command = [*MODULE, "attach", file, "--name", "joined"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    with started("joined") as (_, joined):
        assert run_code(joined, "kept") == ("ok", "42")
    client.stop_channels()
    wait_for("the end of the kernel", lambda: not far.processes("curve_kernel"), 20)


def test_a_tunnels_kernel_whose_server_is_gone(far, tmp_path, monkeypatch):
    """The connection file here has ports of a tunnel that is gone; the one there is good."""
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, capture_output=True)
    far.kernelspec("far", network="tunnel", orphan_timeout=15)
    process, _ = desk("far", "time.sleep(100)")
    process.kill()
    process.wait(10)
    files = far.user.home.glob("**/kernel-*.json")  # those of other tests' kernels may be there still
    there = max(files, key=lambda file: file.stat().st_mtime)
    copy, wrapper = tmp_path / "far.json", tmp_path / "ssh"
    copy.touch(0o600)
    copy.write_bytes(there.read_bytes())
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {shlex.join(far.ssh_options)} "$@"\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    words = [*MODULE[1:], "console", str(copy), "--ssh", "far", "--simple-prompt"]
    child = pexpect.spawn(MODULE[0], words, encoding="utf-8", timeout=30, echo=False)
    try:
        child.expect(r"In \[\d+\]: ")
        child.sendline("print(6 * 7)")
        child.expect("42")
    finally:
        child.close(force=True)


def test_ipv6(far):
    if far.address6 not in call("ip", "-n", far.namespace, "-6", "address"):
        pytest.skip("this machine has no IPv6")
    far.kernelspec("far", host="far6", python="~/venv/bin/python")
    with started("far") as (km, client):
        assert km.ip == f"[{far.address6}]"
        assert run_code(client, "6 * 7") == ("ok", "42")
        km.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert run_code(client, "6 * 7") == ("ok", "42")
        assert client.hb_channel.is_beating()


def test_the_debugger(far, monkeypatch):
    """Every request that a front end makes, as on this machine."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "kernel"))
    from test_debugger import Session, everything

    far.kernelspec("far")
    with Session("far") as session:
        everything(session)

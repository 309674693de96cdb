"""What breaks around a kernel: its manager, its files, its disk, its children, the cable."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmtp
from hosts import KERNEL_ADDRESS, needs_namespaces, two_hosts
from support import (
    MODULE,
    both_keys,
    client_of,
    connection_info,
    headless,
    listening_ports,
    refused,
    run_code,
    started,
    wait_for,
)
from victim import figure
from zmtp import Peer, greeting

from curve_kernel.keys import KeyPair

# Half a minute in a run for figures.
DOWN = float(os.environ.get("CURVE_KERNEL_LINK_DOWN_SECONDS", "6"))
MANAGER = """
import sys, time
from jupyter_client import KernelManager
km = KernelManager(kernel_name=sys.argv[1])
km.start_kernel()
print(km.provisioner.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["python3-curve", "python3"])
def test_the_manager_is_killed(name: str) -> None:
    """The kernel ends, as stock does."""
    with subprocess.Popen([sys.executable, "-c", MANAGER, name], stdout=subprocess.PIPE) as manager:
        assert manager.stdout is not None
        pid = int(manager.stdout.readline())
        time.sleep(2)
        assert psutil.pid_exists(pid)
        manager.kill()
    try:
        wait_for("the kernel to end", lambda: not psutil.pid_exists(pid), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("harm", ["deleted", "truncated", "replaced"])
def test_the_connection_file_of_a_running_kernel(harm: str) -> None:
    with started("python3-curve") as (km, client):
        path = Path(km.connection_file)
        if harm == "deleted":
            path.unlink()
        elif harm == "truncated":
            path.write_text("")
        else:
            path.write_text(json.dumps({"curve_publickey": "x" * 40}))
        assert run_code(client, "print('goes on')") == ("ok", "goes on\n")
        info = {**km.get_connection_info(), "key": km.session.key.decode()}
        with client_of(info, KeyPair(km.curve_publickey, km.curve_secretkey)) as other:
            assert run_code(other, "print('for new ones too')") == ("ok", "for new ones too\n")
        assert run_code(client, "%curve")[0] == "ok"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=64k"):
        with contextlib.suppress(OSError), (disk / "all of it").open("wb") as file:
            file.write(bytes(1 << 17))
        status, lines, _ = refused("-f", str(disk / "kernel.json"))
        assert status == 1
        assert "can't be written: No space left on device" in lines[0]
        assert lines[1].startswith("curve_kernel: hint: ")
        assert len(lines) == 2
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        env = {"JUPYTER_RUNTIME_DIR": str(disk / "runtime")}
        for arguments in (("-f", str(disk / "kernel.json")), ()):
            status, lines, _ = refused(*arguments, env=env)
            assert status == 1
            assert "Read-only file system" in lines[0]
            assert len(lines) == 2


def test_a_forked_child_does_not_keep_the_ports(tmp_path: Path) -> None:
    """A kernel that was killed starts again on its ports, and its clients find it, child or not."""
    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    file.chmod(0o600)
    fork = "import os, time\npid = os.fork()\nif not pid:\n    time.sleep(60); os._exit(0)\npid"
    with contextlib.ExitStack() as stack:
        process, info = stack.enter_context(headless(file=file))
        client = stack.enter_context(client_of(info, keys))
        child = int(run_code(client, fork)[1].split()[-1])  # after the warning since Python 3.12
        stack.callback(lambda: psutil.pid_exists(child) and os.kill(child, signal.SIGKILL))
        assert listening_ports(child) == set()
        held = psutil.Process(child).net_connections("tcp")
        ports = {value for name, value in info.items() if name.endswith("_port")}
        assert not [one for one in held if one.laddr.port in ports]
        process.kill()
        process.wait(60)
        assert psutil.pid_exists(child)
        again, same = stack.enter_context(headless(file=file))
        assert {name: same[name] for name in info if name.endswith("_port")} == {
            name: info[name] for name in info if name.endswith("_port")
        }
        # The client that was there before has reconnected by itself.
        wait_for("an answer", lambda: answers(client))
        assert again.poll() is None


def answers(client: object) -> bool:
    try:
        return run_code(client, "print('again')", timeout=2) == ("ok", "again\n")
    except TimeoutError:
        return False


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_clock_jumps(tmp_path: Path) -> None:
    """Three days ahead, then three days back; who is silent meanwhile is cut in time."""
    library, ahead = tmp_path / "clock.so", tmp_path / "ahead"
    source = Path(zmtp.__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    ahead.write_text("0")
    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    env = {"LD_PRELOAD": str(library), "CLOCK_AHEAD_FILE": str(ahead)}
    with headless(file=file, env=env) as (_, info), client_of(info, keys) as client:
        for seconds in (259_200, -259_200, 0):
            with Peer(info["shell_port"], timeout=60) as silent:
                silent.send(greeting())
                silent.read(64)
                since = time.monotonic()
                ahead.write_text(str(seconds))
                status, text = run_code(client, "import time; print(time.time())")
                assert status == "ok"
                assert abs(float(text) - time.time() - seconds) < 20
                with client_of(info, keys) as other:
                    assert run_code(other, "print('let in')") == ("ok", "let in\n")
                with pytest.raises(ConnectionError):
                    silent.read(1)
                assert 3 < time.monotonic() - since < 60
        assert run_code(client, "%curve")[0] == "ok"


LINK_CLIENT = """
import json, sys, time
from curve_kernel.client import BlockingKernelClient
client = BlockingKernelClient()
client.load_connection_info(json.load(open(sys.argv[1])))
client.start_channels()
client.wait_for_ready(timeout=30)
print("ready", flush=True)
sent, end = [], time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    sent.append(client.execute(f"print({len(sent)})"))
    time.sleep(0.1)
replies, outputs, end = [], [], time.monotonic() + 90
while time.monotonic() < end and (len(set(replies)) < len(sent) or len(set(outputs)) < len(sent)):
    for get, take in ((client.get_shell_msg, replies), (client.get_iopub_msg, outputs)):
        try:
            message = get(timeout=0.05)
        except Exception:
            continue
        idle = message["content"].get("execution_state") == "idle"
        if message["parent_header"]["msg_id"] in sent and (take is replies or idle):
            take.append(message["parent_header"]["msg_id"])
time.sleep(1)
while client.shell_channel.msg_ready():
    replies.append(client.get_shell_msg(timeout=1)["parent_header"]["msg_id"])
print(json.dumps([sent, replies, outputs]))
client.stop_channels()
"""


@needs_namespaces
@pytest.mark.timeout(300)
def test_the_cable_is_pulled_out(tmp_path: Path) -> None:
    """What was asked meanwhile is answered when it is back, once."""
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, stdout=subprocess.DEVNULL)
    file = tmp_path / "kernel.json"
    with two_hosts() as (there, here):
        command = [*there.prefix, *MODULE, f"--ip={KERNEL_ADDRESS}", "-f", str(file)]
        command += ["--CurveKernelApp.client_authorization=allowlist"]
        kernel = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            wait_for("the kernel", file.exists)
            client = subprocess.Popen(
                [*here.prefix, sys.executable, "-c", LINK_CLIENT, str(file), str(DOWN + 6)],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            time.sleep(2)
            there.link("down")
            time.sleep(DOWN)
            there.link("up")
            out, _ = client.communicate(timeout=DOWN + 120)
            sent, replies, outputs = json.loads(out)
        finally:
            kernel.terminate()
            kernel.wait(60)
    assert len(sent) > DOWN * 5
    assert collections.Counter(replies) == collections.Counter(sent)
    assert collections.Counter(outputs) == collections.Counter(sent)
    figure("link down", "python3-curve", seconds=DOWN, requests=len(sent), lost=0, twice=0)

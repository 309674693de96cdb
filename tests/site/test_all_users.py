"""``status --all-users``: every kernel on the machine. With other users' kernels: tests/site."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import CHANNELS, MODULE, check_error, headless, listening_ports, started, wait_for

from curve_kernel.machine import _apart, inspect_machine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it is for root")
IN_ITS_OWN_NETWORK = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"')


def status(*arguments: str, **env: str) -> tuple[int, str, str]:
    # Whoever's it is: nothing of the caller's own says where.
    env = {"JUPYTER_RUNTIME_DIR": "/nowhere", "JUPYTER_DATA_DIR": "/nowhere", **env}
    command = [*MODULE, "status", "--all-users", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def of_processes(*pids: int) -> list[dict[str, Any]]:
    """What is said of these; kernels of other tests may be there too."""
    code, out, err = status("--json")
    assert err == ""
    found = json.loads(out)
    assert code == any(one["verdict"] != "encrypted" for one in found)
    by_pid = {one["pid"]: one for one in found}
    assert len(by_pid) == len(found)
    return [by_pid[pid] for pid in pids]


@contextlib.contextmanager
def stock_by_hand(cwd: Path) -> Iterator[tuple[psutil.Process, Path]]:
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    process = subprocess.Popen(
        [sys.executable, "-m", "ipykernel_launcher"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=cwd,
    )
    try:
        file = runtime / f"kernel-{process.pid}.json"
        wait_for("the connection file", file.exists)
        wait_for("the ports", lambda: len(listening_ports(process.pid)) >= len(CHANNELS))
        yield psutil.Process(process.pid), file
    finally:
        process.kill()
        process.wait(20)


def test_every_kernel(tmp_path):
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    with contextlib.ExitStack() as stack:
        own, _ = stack.enter_context(headless(file=tmp_path / "named by its command line"))
        stock, _ = stack.enter_context(started("python3"))
        by_hand, file = stack.enter_context(stock_by_hand(tmp_path))
        pids = own.pid, stock.provisioner.pid, by_hand.pid
        # A copy, with an address that nothing is to be sent to, and one of a kernel that has ended.
        info = json.loads(Path(stock.connection_file).read_text())
        (runtime / "kernel-copy.json").write_text(json.dumps(info | {"ip": "192.0.2.1"}))
        gone = {name: 1 for name in info if name.endswith("_port")}
        (runtime / "kernel-gone.json").write_text(json.dumps(info | gone))
        found = of_processes(*pids)
        assert [one["verdict"] for one in found] == ["encrypted", "PLAINTEXT", "PLAINTEXT"]
        assert {one["user"] for one in found} == {psutil.Process().username()}
        assert [one["file"] for one in found][::2] == [
            str(tmp_path / "named by its command line"),
            str(file),
        ]
        assert found[1]["file"] in (stock.connection_file, str(runtime / "kernel-copy.json"))
        for one in found:
            assert {at["endpoint"].rpartition(":")[0] for at in one["channels"].values()} == {
                "tcp://127.0.0.1"
            }
        # Without its file it is a kernel all the same.
        file.write_text("{")
        for _ in range(2):
            [hidden] = of_processes(by_hand.pid)
            assert hidden["verdict"] == "PLAINTEXT"
            assert f"process {by_hand.pid} of" in hidden["problem"]
            ports = {int(one["endpoint"].rpartition(":")[2]) for one in hidden["channels"].values()}
            assert ports == listening_ports(by_hand.pid)
            assert {one["mechanism"] for one in hidden["channels"].values()} == {"NULL"}
            file.unlink(missing_ok=True)

        code, out, _ = status()
        assert code == 1
        lines = [line for line in out.splitlines() if not line.startswith("process ")]
        [line] = [line for line in lines if f" {own.pid} " in line]
        assert line.split()[:2] == ["encrypted", psutil.Process().username()]


@pytest.mark.skipif(not shutil.which("ip"), reason="this needs iproute2")
def test_a_kernel_in_a_network_of_its_own(tmp_path):
    """As containers have: its ports are not this machine's, and others here may have their numbers."""
    with headless(file=tmp_path / "k.json", prefix=IN_ITS_OWN_NETWORK) as (process, info):
        [one] = of_processes(process.pid)
        assert one["verdict"] == "encrypted"
        assert one["channels"]["shell"]["endpoint"] == f"tcp://127.0.0.1:{info['shell_port']}"
        (tmp_path / "k.json").unlink()
        [one] = of_processes(process.pid)
        assert one["verdict"] == "encrypted"


def test_it_is_for_root_and_for_all():
    code, out, err = status("kernel.json")
    assert (code, out) == (1, "")
    check_error(err, "--all-users looks at every kernel: leave out the files", None)
    as_nobody = (
        "import os, sys; from curve_kernel.cli.status import StatusApp\n"
        "os.setuid(65534); app = StatusApp(); app.initialize(['--all-users']); app.start()"
    )
    done = subprocess.run(
        [sys.executable, "-c", as_nobody], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    check_error(done.stderr, "only root sees the kernels of all users", "sudo")


STRANGER = 12345
OF_A_STRANGER = """
import json, os, socket, sys, time
os.setgroups([]), os.setgid(12345), os.setuid(12345)
kind, folder, *ports = sys.argv[1:3] + json.loads(sys.argv[3])
names = [f"{name}_port" for name in ("shell", "control", "stdin", "iopub", "hb")]
info = {"transport": "tcp", "ip": "127.0.0.1", "key": "", "kernel_name": "n" * 100_000}
if kind == "equal":
    listening = socket.create_server(("127.0.0.1", 0))
    ports = [listening.getsockname()[1]] * 5
if kind == "another family":
    listening = [socket.create_server(("::", port), family=socket.AF_INET6) for port in ports]
if kind == "links":
    info |= {"transport": "ipc", "ip": f"{folder}/s"}
    listening = [socket.socket(socket.AF_UNIX) for _ in names]
    for port, one in enumerate(listening, 1):
        one.bind(f"{folder}/s-{port}")
        one.listen()
        os.unlink(f"{folder}/s-{port}")
        os.symlink(sys.argv[4], f"{folder}/s-{port}")
    ports = [1, 2, 3, 4, 5]
json.dump(info | dict(zip(names, ports)), open(f"{folder}/kernel-x.json", "w"))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["another's", "equal", "another family", "links"])
def test_nobody_leads_root_to_ports_of_another_user(kind):
    """Nothing is sent to a server that is no kernel, whatever somebody's connection file says."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        folder.chmod(0o755)
        (theirs := folder / "theirs").mkdir()
        os.chown(theirs, STRANGER, STRANGER)
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in CHANNELS]
        ports = [server.getsockname()[1] for server in servers]
        servers.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
        servers[-1].bind(path := str(folder / "root's"))
        servers[-1].listen()
        process = subprocess.Popen(
            [sys.executable, "-c", OF_A_STRANGER, kind, str(theirs), json.dumps(ports), path],
            stdout=subprocess.PIPE,
            env={"JUPYTER_RUNTIME_DIR": str(theirs), "HOME": str(theirs)},
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            found = [kernel for kernel in inspect_machine() if kernel.file.startswith(str(theirs))]
            for server in servers:
                server.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    peer, _ = server.accept()
                    peer.settimeout(0)
                    assert peer.recv(1) == b""
                    assert server.family == socket.AF_UNIX
            if kind in ("another's", "equal"):
                assert not found
            else:
                assert found[0].verdict in ("unreachable", "dead")
                assert len(found[0].kernel_name) == 200
        finally:
            process.kill()
            process.communicate(timeout=20)


def stopped_while_it_speaks() -> list[Any]:
    sender = sys._getframe(1).f_locals["sender"]
    os.write(sender.fileno(), struct.pack("!i", 1000))
    os.kill(os.getpid(), signal.SIGSTOP)
    return []


def test_a_process_that_is_stopped_while_it_says_what_it_found():
    with pytest.raises(OSError, match="no answer in 1 s"):
        _apart(1, stopped_while_it_speaks)

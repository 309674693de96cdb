"""A kernel that somebody starts in a terminal: what it says, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from jupyter_client.connect import port_names
from support import (
    CHANNELS,
    MODULE,
    check_error,
    connection_info,
    headless,
    refused,
    run_code,
    wait_for,
)

from curve_kernel.client import BlockingKernelClient
from curve_kernel.errors import CurveKernelError
from curve_kernel.keys import KeyPair
from curve_kernel.launch.ports import check_ended, check_free
from curve_kernel.wire import read_mechanism


@contextlib.contextmanager
def by_hand(out: Path, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A kernel whose standard output and error go into *out*, and which has said how to connect."""
    with out.open("w") as stream:
        process = subprocess.Popen(
            [*prefix, *MODULE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        wait_for("the last line", lambda: "The kernel, process" in out.read_text())
        yield process
    finally:
        process.kill()
        process.wait(60)


def test_without_a_file_it_makes_keys_and_says_how_to_connect(tmp_path):
    out = tmp_path / "out"
    with by_hand(out) as process:
        file = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / f"kernel-{process.pid}.json"
        info = json.loads(file.read_text())
        text = out.read_text()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "curve_secretkey" not in info
        assert info["curve_publickey"] in text
        assert "\nMay connect: anybody with the connection file\n" in text
        assert f"\nTo connect: python -m curve_kernel console --existing {file}\n" in text
        assert f"process {process.pid}," in text
        assert "SIGHUP" in text
        assert "docs/remote.md" in text
        spoken = {read_mechanism(f"tcp://127.0.0.1:{info[f'{name}_port']}") for name in CHANNELS}
        assert spoken == {"CURVE"}


def test_the_allowlist_and_nohup(tmp_path, folder):
    out, file = tmp_path / "out", tmp_path / "kernel.json"
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$0" "$@"']
    with by_hand(out, "-f", str(file), "--allowlist", prefix=ignoring) as process:
        text = out.read_text()
        assert f"\nMay connect: the clients listed in {folder}\n" in text
        assert "SIGHUP" not in text
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        assert not file.exists()


def test_log_lines_name_the_kernel_and_the_time(tmp_path):
    out, file = tmp_path / "out", tmp_path / "my 100% kernel.json"
    with by_hand(out, "-f", str(file), "--log-level=INFO"):
        lines = out.read_text().splitlines()
    line = re.compile(
        r"\[CurveKernelApp \d{4}-\d\d-\d\d \d\d:\d\d:\d\d my 100% kernel\] Every channel is"
    )
    assert any(map(line.match, lines)), lines
    with by_hand(
        out, "-f", str(file), "--log-level=INFO", "--CurveKernelApp.log_format=mine: %(message)s"
    ):
        lines = out.read_text().splitlines()
    assert any(line.startswith("mine: Every channel is") for line in lines), lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_kernel_that_a_signal_ends_removes_the_file_that_it_made(tmp_path, number):
    file = tmp_path / "kernel.json"
    with headless(file=file) as (process, _):
        process.send_signal(number)
        assert process.wait(60) == -number
        assert not file.exists()


def test_the_end_of_a_forked_child_is_not_the_end():
    code = """
import os, sys
from curve_kernel.signals import call_at_end
call_at_end(lambda: print("the end of", "parent" if os.getpid() == parent else "child", flush=True))
parent = os.getpid()
if os.fork() == 0:
    sys.exit()
os.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "the end of parent\n"


def test_children_end_by_signals_and_leave_the_file(tmp_path):
    file = tmp_path / "kernel.json"
    code = """
import os, multiprocessing, time, warnings
warnings.simplefilter("ignore")  # fork, since Python 3.12
pid = os.fork()
if pid == 0:
    os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
process.start()
process.terminate()
process.join()
print(process.exitcode)
"""
    with headless(file=file) as (process, _):
        client = BlockingKernelClient(connection_file=str(file))
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        assert run_code(client, code) == ("ok", "3\n-15\n")
        assert file.exists()
        client.stop_channels()
        # Nor does it remove a file that another kernel has put there.
        file.write_text(json.dumps(connection_info(curve_publickey="0" * 40)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        assert file.exists()


@contextlib.contextmanager
def started_anew(file: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict, dict]]:
    """A kernel with the connection file of one that was killed; gives the process and both contents."""
    with headless(*options, file=file) as (process, first):
        status, _, text = refused(*options, "-f", str(file))
        assert status == 1
        check_error(text, "a kernel that may be running: its shell port", "console --existing")
        assert json.loads(file.read_text()) == first
        process.kill()
        process.wait(60)
    assert json.loads(file.read_text()) == first
    with headless(*options, file=file) as (process, _):

        def changed() -> dict | None:
            content = json.loads(file.read_text())
            return content if content["curve_publickey"] != first["curve_publickey"] else None

        yield process, first, wait_for("a new connection file", changed)


def test_the_same_command_starts_again_after_a_kernel_was_killed(tmp_path):
    file = tmp_path / "kernel.json"
    with started_anew(file) as (process, first, second):
        assert second["key"] != first["key"]
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        client = BlockingKernelClient(connection_file=str(file))
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        assert run_code(client, "1 + 1") == ("ok", "2")
        client.stop_channels()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert not file.exists()


def test_the_same_command_over_ipc(tmp_path):
    with started_anew(tmp_path / "kernel.json", "--transport=ipc", f"--ip={tmp_path}/socket"):
        pass


@pytest.mark.parametrize("ip", ["::1", "lo", "localhost"])
def test_the_same_command_with_another_form_of_address(tmp_path, ip):
    with started_anew(tmp_path / "kernel.json", f"--ip={ip}"):
        pass


@pytest.mark.parametrize("ip", ["::1", "[::1]", "lo", "localhost"])
def test_an_address_in_each_form(ip):
    """A kernel may take its ports again, and one of another process is found before any port opens."""
    family, bare = (socket.AF_INET, "127.0.0.1") if ip[0] == "l" else (socket.AF_INET6, "::1")
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server((bare, 0), family=family)) for _ in range(5)]
        numbers = [one.getsockname()[1] for one in taken]
        ports = dict(zip(port_names, numbers, strict=True))
        for one in taken[:-1]:
            one.close()
        with pytest.raises(CurveKernelError, match=f":{numbers[-1]}: Address already"):
            check_free("tcp", ip, ports)
        with pytest.raises(CurveKernelError, match="its control port is in use"):
            check_ended("kernel.json", {"ip": ip, **ports})
        taken[-1].close()
        check_free("tcp", ip, ports)
        check_ended("kernel.json", {"ip": ip, **ports})


def test_a_second_kernel_does_not_take_the_sockets_of_one_that_runs(tmp_path):
    where = ["--transport=ipc", f"--ip={tmp_path}/socket"]
    where += [f"--{channel}={number}" for number, channel in enumerate(CHANNELS, 1)]
    with headless(*where, file=tmp_path / "kernel.json") as (process, _):
        status, _, text = refused(*where, "-f", str(tmp_path / "other.json"))
        assert status == 1
        check_error(text, "socket-1: Address already in use", "give every channel a free port")
        assert read_mechanism(f"ipc://{tmp_path}/socket-1") == "CURVE"
        process.kill()
        process.wait(60)
    with headless(*where, file=tmp_path / "other.json"):
        assert read_mechanism(f"ipc://{tmp_path}/socket-1") == "CURVE"


def test_files_that_no_kernel_of_this_user_left_here(tmp_path):
    """One that a launcher is starting, one of another machine, and what others could have written."""
    file = tmp_path / "kernel.json"
    with headless(file=file) as (process, left):
        process.kill()
        process.wait(60)
    for changes, mode, owner in (
        ({"kernel_name": "python3-curve"}, 0o600, 0),
        ({"hostname": "another"}, 0o600, 0),
        ({"shell_port": 0}, 0o600, 0),
        ({"shell_port": "1"}, 0o600, 0),
        ({}, 0o620, 0),
        ({}, 0o600, 12345),
    ):
        if owner and os.geteuid() != 0:
            continue
        content = json.dumps(left | changes)
        file.write_text(content)
        file.chmod(mode)
        os.chown(file, owner or -1, -1)
        status, _, text = refused("-f", str(file))
        assert status == 1, changes
        if owner:
            check_error(text, "belongs to another user: uid 12345", "make a copy")
        elif mode != 0o600:
            check_error(text, "can be written by others: its mode is 0620", "chmod go-w")
        else:
            host = "a kernel on another host made it, another" if "hostname" in changes else ""
            check_error(text, "only the public key", "JUPYTER_CURVE_SECRETKEY")
            assert host in text
        assert file.read_text() == content
        file.unlink()
    for ip in ("192.0.2.1", 5):
        file.write_text(json.dumps(left | {"ip": ip}))
        file.chmod(0o600)
        check_error(refused("-f", str(file))[2], "not of this machine", "console --existing")
    file.write_text(json.dumps(left | {"curve_publickey": "x"}))
    check_error(refused("-f", str(file))[2], "curve_publickey", "40 characters of Z85")


def test_a_launchers_file_stays(tmp_path):
    keys, file = KeyPair.generate(), tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(curve_publickey=keys.public_key.decode())))
    env = {"JUPYTER_CURVE_SECRETKEY": keys.secret_key.decode()}
    with headless(file=file, env=env) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    assert file.exists()

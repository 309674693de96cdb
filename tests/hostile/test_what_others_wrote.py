"""Files, names and messages that others wrote: one that is bad spoils its own row only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import MODULE, connection_info, headless, refused, run_code, started, wait_for

from curve_kernel.cli.install import shipped_spec
from curve_kernel.errors import printable
from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

PAIR = KeyPair.generate()
SECRET = PAIR.secret_key.decode()


def run(*arguments: str | bytes, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*MODULE, *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=100,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in out + err
    assert SECRET not in out + err
    assert all(line.isprintable() for line in [*out.split("\n"), *err.split("\n")]), repr(out + err)
    return done.returncode, out, err


def write(name: str, **fields: Any) -> Path:
    file = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / f"kernel-{name}.json"
    ports = {f"{channel}_port": 1 for channel in ("shell", "iopub", "stdin", "control", "hb")}
    info = connection_info(curve_publickey=PAIR.public_key.decode(), **ports)
    file.write_text(json.dumps(info | fields))
    file.chmod(0o600)
    return file


BAD: dict[str, dict[str, Any]] = {
    "zero": {"ip": "a\0b"},
    "space": {"ip": "a b"},
    "list": {"ip": []},
    "line": {"ip": "127.0.0.1\n"},
    "long": {"ip": "x" * 5000},
    "key": {"ip": SECRET},
    "surrogate": {"ip": "\ud800"},
    "below": {"shell_port": -1},
    "above": {"iopub_port": 1 << 70},
    "true": {"hb_port": True},
    "text": {"stdin_port": "22"},
    "nan": {"control_port": float("nan")},
    "transport": {"transport": SECRET},
    "nothing": {"transport": None},
    "ipc": {"transport": "ipc", "ip": "/tmp/" + "x" * 200},
    "ipc-zero": {"transport": "ipc", "ip": "/tmp/a\0b"},
    "name": {"kernel_name": {"a": ["\x1b"]}, "ip": "::: :"},
}


def test_status_shows_every_kernel():
    for name, fields in BAD.items():
        write(name, **fields)
    (Path(os.environ["JUPYTER_RUNTIME_DIR"]) / "kernel-caf\udce9\x1b.json").write_text("{}")
    with headless() as (process, info):
        _, out, err = run("status", "--json")
        assert err == ""
        found = {Path(kernel["file"]).stem: kernel for kernel in json.loads(out)}
        assert found[f"kernel-{process.pid}"]["verdict"] == "encrypted"
        assert set(found) >= {f"kernel-{name}" for name in BAD}
        assert all(found[f"kernel-{name}"]["problem"] for name in BAD)
        _, out, err = run("status")
        assert out.startswith("verdict")
        assert "encrypted" in out
        assert info["curve_publickey"] not in out


@pytest.mark.parametrize(
    ("command", "name"),
    [("watch", name) for name in ("zero", "space", "long", "key", "below", "true", "ipc", "transport")]
    + [("console", name) for name in ("zero", "below", "ipc")],
)
def test_clients_of_bad_files(command, name):
    file = write(name, **BAD[name])
    status, out, err = run(command, "--existing", str(file))
    assert (status, out) == (1, "")
    [problem] = [line for line in err.splitlines() if "error: " in line]
    assert "is of no use: its" in problem


@pytest.mark.parametrize(
    "fields",
    [
        {"ip": SECRET},
        {"transport": SECRET},
        {"signature_scheme": SECRET},
        {"signature_scheme": f"hmac-{SECRET}"},
        {"shell_port": SECRET},
        {"ip": "a\0b"},
    ],
)
def test_a_kernel_quotes_no_key(tmp_path, fields):
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(curve_publickey=PAIR.public_key.decode()) | fields))
    status, _, err = refused("-f", str(file), env={"JUPYTER_CURVE_SECRETKEY": SECRET})
    assert status == 1
    assert err.startswith("curve_kernel: error: ")
    assert "Traceback" not in err
    assert SECRET not in err


@pytest.mark.parametrize(
    "words",
    [
        ["authorize", SECRET, "--name", "vera"],
        ["authorize", "-", "--name", SECRET],
        ["authorize", f"--{SECRET}"],
        ["authorize", "x", "--name", "vera", "--role", SECRET],
        ["revoke", SECRET],
        ["watch", "--existing", SECRET],
        ["console", "--existing", SECRET],
        ["status", SECRET],
        [SECRET],
        ["-f", SECRET, "--allowlist", f"--{SECRET}"],
        [f"--IPKernelApp.transport={SECRET}"],
        [f"--{SECRET}=1"],
        ["--ip", SECRET],
        [f"--ip={SECRET}"],
    ],
)
def test_a_command_quotes_no_key(words):
    status, _, err = run(*words)
    assert status
    assert err


def test_names_that_others_gave(folder):
    """A byte that is not UTF-8, a sequence that steers a terminal, a text that is read backwards."""
    pairs = [KeyPair.generate() for _ in range(3)]
    names = ("caf\udce9", "\x1b[31mred", "\u202eolga")
    for name, pair in zip(names, pairs, strict=True):
        write_certificate(folder / "viewers" / f"{name}.key", pair.public_key)
    status, out, err = run("clients")
    assert (status, err) == (0, "")
    for name, pair in zip(names, pairs, strict=True):
        assert f"{printable(name):<8}  viewer  {pair.public_key.decode()}" in out
    status, out, err = run("revoke", os.fsencode("caf\udce9"))
    assert (status, out.splitlines()[-1][:22]) == (0, "caf? can't connect any")
    status, out, err = run("revoke", "?[31mred")
    assert status == 0
    assert [path.stem for path in (folder / "viewers").iterdir()] == ["\u202eolga"]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_doctor_runs_nothing_that_others_may_write(tmp_path):
    marker = tmp_path / "ran"
    places = {
        name: tmp_path / name / "bin" / "python" for name in ("own", "open", "other", "spec", "link")
    }
    specs = {}
    for name, path in places.items():
        if name != "link":
            program(path, f"echo {name} >> {marker}; printf '9.9\\033[31m\\n'")
        spec = shipped_spec()
        spec |= {"argv": [str(path), *spec["argv"][1:]], "display_name": "\x1b[31mname"}
        specs[name] = Path(os.environ["JUPYTER_DATA_DIR"], "kernels", name, "kernel.json")
        specs[name].parent.mkdir(parents=True)
        specs[name].write_text(json.dumps(spec))
    places["open"].parent.chmod(0o777)
    os.chown(places["other"], 54321, 54321)
    os.chown(specs["spec"], 54321, 54321)
    places["link"].parent.mkdir(parents=True)
    places["link"].symlink_to(places["open"])
    status, out, _ = run("doctor")
    assert status == 0 or "failure" in out
    assert marker.read_text() == "own\n"
    assert "9.9?[31m" in out
    for name in ("open", "other", "spec", "link"):
        assert f"runs {places[name]}, which was not run: " in out
    assert "belongs to another user: uid 54321" in out
    _, out, _ = run("doctor", "--json")
    assert marker.read_text() == "own\nown\n"


SENDS = r"""
import json
from ipykernel.kernelapp import IPKernelApp
thread = IPKernelApp.instance().iopub_thread
session = get_ipython().kernel.session
def send(frames):
    thread.schedule(lambda: thread._really_send(frames))
deep = b'{"msg_type": "stream", "a": ' + b'[' * 100000 + b']' * 100000 + b'}'
def signed(header, parent=b'{}', metadata=b'{}', content=b'{}'):
    parts = [header, parent, metadata, content]
    return [b'', b'<IDS|MSG>', session.sign(parts), *parts]
header = session.msg_header('stream')
def packed(**changes):
    return session.pack({**header, **changes})
for frames in (
    [b'one'], [b'', b'<IDS|MSG>'], [b'', b'<IDS|MSG>', b'x'],
    [b'<IDS|MSG>', b'x', b'{}', b'{}', b'{}', b'{}'],
    signed(deep), signed(packed(), content=deep[28:-1]),
    signed(packed(), content=b'[]'), signed(b'[]'),
    signed(b'{}'), signed(packed(msg_type=5)),
    signed(packed(msg_type='stream'), content=b'{"text": 5}'),
    signed(packed(session=None)), signed(packed(date='x')), signed(packed(version='x.y')),
    signed(packed(msg_type='error'), content=b'{"traceback": 5}'),
    signed(packed(msg_type='execute_result'), content=b'{"data": [], "execution_count": {}}'),
    signed(packed(msg_type='display_data'), content=b'{"data": {"image/png": 5}}'),
    signed(packed(), parent=b'5'), [b'x' * 5000] * 30,
):
    send(frames)
"""


def test_messages_that_are_none(tmp_path):
    """Whatever user code sends, `watch` shows the next good message."""
    with started("python3-curve") as (km, client), (tmp_path / "out").open("w+") as out:
        watching = subprocess.Popen(
            [*MODULE, "watch", "--existing", km.connection_file],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            text = (tmp_path / "out").read_text
            wait_for("the watch", lambda: "watching" in text())
            client.execute(SENDS)  # whose own client reads nothing of it
            for number in range(200):
                if "malformed" in text() and f"good {number - 1}" in text():
                    break
                assert watching.poll() is None, text()
                client.execute(f"print('good {number}')")
                time.sleep(0.1)
            assert "Traceback" not in text()
            assert "another key" not in text()
        finally:
            watching.send_signal(signal.SIGINT)
            assert watching.wait(20) == 0
    assert "a malformed message was left out" in text()


FORKS_IN_C = """
import ctypes
pid = ctypes.CDLL(None).fork()
while pid == 0:
    ctypes.CDLL(None).pause()
print(pid)
"""


def test_a_child_that_c_code_forked_keeps_no_port_open():
    with started("python3-curve") as (km, client):
        _, text = run_code(client, FORKS_IN_C)
        child = psutil.Process(int(text))
        ports = [getattr(km, f"{name}_port") for name in ("shell", "iopub", "stdin", "control", "hb")]
        try:
            client.stop_channels()
            kernel = psutil.Process(km.provisioner.pid)
            km.shutdown_kernel()
            assert not kernel.is_running()
            assert child.is_running()
            for port in ports:
                with socket.socket() as probe:
                    assert probe.connect_ex(("127.0.0.1", port)) != 0
        finally:
            child.kill()


EXITS_IN_PYTHON = """
import ctypes, os
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    from curve_kernel.app import CurveKernelApp
    try:
        with CurveKernelApp.instance()._gate.closing():
            pass
    finally:
        os._exit(0)
print(os.waitpid(pid, 0)[1])
"""


def test_a_child_that_c_code_forked_ends_no_port_of_the_kernel():
    with started("python3-curve") as (km, client):
        assert run_code(client, EXITS_IN_PYTHON) == ("ok", "0\n")
        again = km.client()
        again.start_channels()
        again.wait_for_ready(timeout=60)
        assert run_code(again, "6 * 7") == ("ok", "42")
        again.stop_channels()


def test_the_filter():
    assert printable("plain ü") == "plain ü"
    assert printable("a\x1b[0m\n\t\u202e\udcff\u2028b") == "a?[0m?????b"

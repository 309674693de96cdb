"""``status`` on a machine with kernels of every kind."""

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
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipykernel
import psutil
import pytest
from support import (
    CHANNELS,
    MODULE,
    check_error,
    connection_info,
    headless,
    on_terminal,
    run_code,
    started,
)

HOLD_THE_GIL = "import ctypes; ctypes.PyDLL(None).sleep(30)"


def runtime() -> Path:
    return Path(os.environ["JUPYTER_RUNTIME_DIR"])


def status(*arguments: str, **kwargs: Any) -> tuple[int, str]:
    done = subprocess.run(
        [*MODULE, "status", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        **kwargs,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def kernels(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code, out = status("--json", *arguments)
    return code, {Path(one["file"]).stem: one for one in json.loads(out)}


def write(name: str, port: int = 1, **fields: Any) -> Path:
    path = runtime() / f"kernel-{name}.json"
    info = connection_info(**{f"{channel}_port": port for channel in CHANNELS}, **fields)
    path.write_text(json.dumps(info))
    return path


@contextlib.contextmanager
def port_that(answer: bytes) -> Iterator[int]:
    """A port that accepts, says *answer*, and waits."""
    peers = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                peers.append(peer)
                peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    for peer in peers:
        peer.close()


def test_no_kernel():
    code, out = status()
    assert code == 0
    assert out == f"No kernel has a connection file in {runtime()}\n"
    assert kernels() == (0, {})


def test_an_encrypted_kernel():
    (runtime() / "jpserver-1.json").write_text('{"port": 1}')
    with started("python3-curve") as (km, client):
        code, found = kernels()
        assert code == 0
        [kernel] = found.values()
        assert kernel["file"] == km.connection_file
        assert kernel["kernel_name"] == "python3-curve"
        assert kernel["verdict"] == "encrypted"
        assert kernel["pid"] == km.provisioner.pid
        assert kernel["since"][:4] == time.strftime("%Y")
        assert {name: one["mechanism"] for name, one in kernel["channels"].items()} == dict.fromkeys(
            CHANNELS, "CURVE"
        )
        assert kernel["channels"]["hb"]["endpoint"] == f"tcp://127.0.0.1:{km.hb_port}"
        assert (kernel["file_mode"], kernel["secret_key_in_file"], kernel["hmac_key_in_file"]) == (
            "0600",
            False,
            True,
        )
        assert len(kernel["further_ports"]) == 1
        assert run_code(client, "print('unharmed')") == ("ok", "unharmed\n")
        # A cell's own port is shown, and not touched: a server for one connection still has it.
        code = "import socket; s = socket.create_server(('127.0.0.1', 0)); s.getsockname()[1]"
        port = int(run_code(client, code)[1])
        assert port in [
            one["port"] for one in kernels()[1][Path(km.connection_file).stem]["further_ports"]
        ]
        assert run_code(client, "s.setblocking(False); s.accept()")[1].startswith("BlockingIOError")


def test_every_kind_of_kernel():
    with contextlib.ExitStack() as stack:
        stock, _ = stack.enter_context(started("python3"))
        # A path of ipc can't be long.
        short = stack.enter_context(tempfile.TemporaryDirectory())
        ipc, stock_ipc = (
            stack.enter_context(
                started(name, transport="ipc", connection_file=f"{short}/kernel-{name}.json")
            )[0]
            for name in ("python3-curve", "python3")
        )
        for one in (ipc, stock_ipc):
            (runtime() / Path(one.connection_file).name).symlink_to(one.connection_file)
        busy, client = stack.enter_context(started("python3-curve"))
        client.execute(HOLD_THE_GIL)
        silent = stack.enter_context(port_that(b""))
        garbage = stack.enter_context(port_that(b"HTTP/1.1 400 \x1b[31m\r\n\r\n" * 10))
        plausible = stack.enter_context(port_that(b"\xff" + bytes(8) + b"\x7f\x03\x00\x1b[31mRED"))
        write("silent", silent)
        write("garbage", garbage)
        write("plausible", plausible)
        stale = write("stale", curve_secretkey="x" * 40, kernel_name="\x1b[31mred")
        stale.chmod(0o644)
        (runtime() / "kernel-broken.json").write_text("{")
        (runtime() / "kernel-half.json").write_text('{"ip": "127.0.0.1", "shell_port": 1}')
        (runtime() / "kernel-link.json").symlink_to("/nowhere")
        half = json.loads(Path(busy.connection_file).read_text())
        half |= {"iopub_port": stock.iopub_port, "hb_port": 1}
        (runtime() / "kernel-mixed.json").write_text(json.dumps(half))
        code, found = kernels()
        assert code == 1
        verdicts = {name: one["verdict"] for name, one in found.items()}
        assert verdicts == {
            Path(stock.connection_file).stem: "PLAINTEXT",
            Path(ipc.connection_file).stem: "encrypted",
            Path(stock_ipc.connection_file).stem: "PLAINTEXT",
            Path(busy.connection_file).stem: "encrypted",
            "kernel-silent": "unreachable",
            "kernel-garbage": "unreachable",
            "kernel-plausible": "unreachable",
            "kernel-stale": "dead",
            "kernel-broken": "unreachable",
            "kernel-half": "unreachable",
            "kernel-mixed": "mixed",
        }
        plain = found[Path(stock.connection_file).stem]
        assert plain["pid"] == stock.provisioner.pid
        assert len(plain["further_ports"]) == 1
        assert found[Path(ipc.connection_file).stem]["pid"] == ipc.provisioner.pid
        assert found["kernel-stale"]["secret_key_in_file"]
        assert found["kernel-stale"]["file_mode"] == "0644"
        assert "is not JSON" in found["kernel-broken"]["problem"]
        assert "has no 'control_port'" in found["kernel-half"]["problem"]
        assert found["kernel-mixed"]["channels"]["iopub"]["mechanism"] == "NULL"
        assert found["kernel-mixed"]["channels"]["hb"]["mechanism"] == "closed"

        code, out = status()
        assert code == 1
        assert "\x1b" not in out
        assert len([line for line in out.splitlines() if line.startswith("PLAINTEXT")]) == 2
        assert re.search(r"^dead .*\?\[31mred .* secret key, HMAC key, mode 0644 *$", out, re.MULTILINE)
        assert f"process {stock.provisioner.pid} also listens on 127.0.0.1:" in out

        # Only what was asked for counts.
        assert kernels(busy.connection_file)[0] == 0
        assert kernels(Path(stock.connection_file).name)[0] == 1
        assert kernels("stale")[0] == 0  # dead
        assert kernels("silent")[0] == 1
        os.killpg(busy.provisioner.pgid, signal.SIGKILL)


def test_stock_curve():
    if ipykernel.version_info < (7, 3):
        pytest.skip("no CURVE in this ipykernel")
    with started("python3", transport_encryption="required") as (_, client):
        code, found = kernels()
        [kernel] = found.values()
        assert (code, kernel["verdict"]) == (0, "encrypted")
        assert kernel["secret_key_in_file"]
        assert len(kernel["further_ports"]) == 1  # its open pipe
        request = {"type": "request", "seq": 1, "command": "initialize", "arguments": {}}
        client.control_channel.send(client.session.msg("debug_request", request))
        assert client.get_control_msg(timeout=60)["content"]["success"]
        [kernel] = kernels()[1].values()
        adapter = [one for one in kernel["further_ports"] if one["pid"] != kernel["pid"]]
        assert len(adapter) == 2, kernel["further_ports"]
        assert "debugpy" in " ".join(psutil.Process(adapter[0]["pid"]).cmdline())


def test_a_stopped_kernel_and_a_hundred_at_once(tmp_path):
    with headless() as (process, _):
        os.kill(process.pid, signal.SIGSTOP)
        code, found = kernels()
        assert (code, [one["verdict"] for one in found.values()]) == (1, ["unreachable"])
        os.kill(process.pid, signal.SIGCONT)
        with port_that(b"") as port:
            for number in range(100):
                write(f"silent-{number}", port)
            code, found = kernels()
    assert (code, len(found)) == (1, 101)


def test_a_file_that_is_not_there():
    done = subprocess.run([*MODULE, "status", "nope"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error == "curve_kernel: error: there is no connection file nope"
    assert hint.startswith("curve_kernel: hint: ")


def test_on_a_terminal():
    """Colors there, and as many columns as there are."""
    write("stale", kernel_name="python3")
    with started("python3") as (stock, _), started("python3-curve") as (km, _):
        half = json.loads(Path(stock.connection_file).read_text())
        half |= {"hb_port": km.hb_port}
        (runtime() / "kernel-mixed.json").write_text(json.dumps(half))
        code, out = on_terminal("status", "status", columns=132)
    assert code == 1
    for color, verdict in (("32", "encrypted"), ("1;31", "PLAINTEXT"), ("1;31", "mixed")):
        assert f"\x1b[{color}m{verdict}" in out
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in out.splitlines()) <= 132


def test_watch():
    command = [*MODULE, "status", "--watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert json.loads(process.stdout.readline()) == []
            with headless() as (kernel, _):
                seen = json.loads(process.stdout.readline())
                while [(one["verdict"], one["pid"]) for one in seen] != [("encrypted", kernel.pid)]:
                    seen = json.loads(process.stdout.readline())
            while [one["verdict"] for one in seen] == ["encrypted"]:
                seen = json.loads(process.stdout.readline())
            assert [one["verdict"] for one in seen] in ([], ["dead"])
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_as_another_user(tmp_path):
    """Who has no key and may see no process still learns what the ports speak."""
    with headless() as (process, info):
        copy = tmp_path / "kernel-copy.json"
        copy.write_text(json.dumps({**info, "key": ""}))
        code = (
            "import json, os, sys\n"
            "from curve_kernel.inspect import inspect_kernels\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "print(json.dumps([one.as_json() for one in inspect_kernels(sys.argv[1:])]))"
        )
        with copy.open() as file:
            out = subprocess.run(
                [MODULE[0], "-c", code, f"/dev/fd/{file.fileno()}"],
                pass_fds=[file.fileno()],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        [kernel] = json.loads(out.stdout)
        assert kernel["verdict"] == "encrypted"
        assert kernel["pid"] is None
        assert psutil.pid_exists(process.pid)
        assert stat.S_IMODE(copy.stat().st_mode) == int(kernel["file_mode"], 8)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folders_that_one_may_not_enter(tmp_path):
    """A file may be there, so it is not said that there is none."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "kernel-1.json").write_text("{}")
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.owner() == "root" and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    closed.chmod(0o700)
    code = (
        "import os, sys, runpy\n"
        "from curve_kernel.cli.status import StatusApp\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "app = StatusApp(); app.initialize(sys.argv[1:]); app.start()"
    )

    def status_of(*arguments: str, runtime: Path) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "JUPYTER_RUNTIME_DIR": str(runtime)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout, done.stderr

    out, err = status_of(str(closed / "kernel-1.json"), runtime=tmp_path)
    check_error(err, f"{closed}/kernel-1.json may not be read: Permission denied", "copy")
    out, err = status_of(runtime=closed)
    check_error(err, f"runtime folder {closed} may not be read: Permission denied", "name a")
    closed.chmod(0o744)  # its names are readable, and nothing else
    out, err = status_of(runtime=closed)
    assert err == ""
    assert "kernel-1.json may not be read: Permission denied" in out
    closed.chmod(0o755)
    (closed / "kernel-1.json").chmod(0o600)
    assert "kernel-1.json may not be read: Permission denied" in status_of(runtime=closed)[0]


def test_80_columns_and_names_that_can_be_copied(tmp_path):
    """No name is broken, and each one is taken for the file that it stands for."""
    uuids = [f"8a1f2b3{n}-2f60-4f0e-9f4c-0123456789ab" for n in "cd"]
    twins = [f"11111111-{n}f60-4f0e-9f4c-0123456789ab" for n in "23"]
    for name in (*uuids, *twins, "1111", "a[b", "with space"):
        write(name, kernel_name="python3-curve")
    elsewhere = tmp_path / "a folder of a long name" / "and another one" / "kernel-elsewhere.json"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text((runtime() / "kernel-1111.json").read_text())
    with started("python3-curve") as (km, _):
        code, out = on_terminal("status-80", "status", columns=80)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
        assert code == 0
        lines = plain.splitlines()
        assert max(map(len, lines)) <= 80, plain
        own = Path(km.connection_file).name.removeprefix("kernel-")[:8]
        [line] = [line for line in lines if line.startswith("encrypted")]
        assert re.fullmatch(
            rf"encrypted +python3-curve +{km.provisioner.pid} +\d\d:\d\d +CURVE +{own} +HMAC key *",
            line,
        )
        shown = [line for line in lines if line.startswith("dead")]
        assert len(shown) == 7  # one line each
        for name in (
            own,
            "8a1f2b3c",
            "8a1f2b3d",
            "11111111-2",
            "11111111-3",
            "kernel-1111",
        ):
            [line] = [line for line in lines if re.search(rf" '?{re.escape(name)}(\.json'?)? ", line)]
            named = f"{name}.json" if name.startswith("kernel-") else name
            [file] = json.loads(status("--json", named)[1])
            assert (
                Path(file["file"]).stem.removeprefix("kernel-").startswith(name.removeprefix("kernel-"))
            )
        code, out = on_terminal("status-elsewhere", "status", str(elsewhere), own, columns=80)
        assert f"… is '{elsewhere}'\n" in re.sub(r"\x1b\[[0-9;]*m", "", out)


def test_what_neighbours_may_do_to_it(tmp_path, monkeypatch):
    """A socket whose path has a line end, which psutil can't parse; a number that is none."""
    monkeypatch.chdir(tmp_path)
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    fields = '"ip": "127.0.0.1", "transport": "tcp", "shell_port": 1e999'
    (runtime / "kernel-huge.json").write_text("{" + fields + "}")
    with socket.socket(socket.AF_UNIX) as neighbour, headless():
        neighbour.bind("a\nb c")
        neighbour.listen()
        done = subprocess.run(
            [*MODULE, "status"], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.stderr == ""
    assert "encrypted" in done.stdout
    assert "kernel-huge.json" in done.stdout

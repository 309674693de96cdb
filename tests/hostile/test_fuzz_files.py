"""Fuzzing of what files, command lines and kernels say: no traceback, no hang, no secret in any output.

CURVE_KERNEL_FUZZ_CASES says how many cases each test makes; case N is the same in every run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.connect import port_names
from support import MODULE, connection_info, run_code, started, wait_for

from curve_kernel import connection_file
from curve_kernel.access.allowlist import AuthorizedClients
from curve_kernel.client import BlockingKernelClient
from curve_kernel.commands import COMMANDS
from curve_kernel.errors import CurveKernelError, fail
from curve_kernel.inspect import inspect_kernels
from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import parse_certificate
from curve_kernel.keys.source import EnvironmentSecret, find
from curve_kernel.launch import ports

CASES = int(os.environ.get("CURVE_KERNEL_FUZZ_CASES", "300"))
PAIR = KeyPair.generate()
SECRET = PAIR.secret_key.decode()
ODD: list[Any] = [
    None, True, 0, -1, 1 << 16, 1 << 70, 1.5, float("nan"), float("inf"), "", " ", "a b", "a\0b",
    "\x1b[2J",
    "\ud800", "\u202e", "*", "0.0.0.0", "::1", "[::1]", "localhost", "x" * 300, "é" * 130, "eth0",
    "eth0;1.2.3.4",
    "tcp", "ipc", "TCP", "inproc", "hmac-sha256", "hmac-", "sha256", "hmac-md5", "../..", "/", "~",
    "-", "--",
    "1", [], [[]], {}, {"a": 1}, SECRET, SECRET[:39], SECRET + "a", PAIR.public_key.decode(),
    "127.0.0.1\n", "%n%s", "{0}", "a:b:c", "@", "!",
]  # fmt: skip
FIELDS = [
    *port_names, "ip", "transport", "key", "signature_scheme", "curve_publickey", "curve_secretkey",
    "kernel_name", "hostname", "jupyter_session", "public-key", "",
]  # fmt: skip


def mutate(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randrange(4)):
        at = dice.randrange(len(changed) + 1)
        match dice.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                changed[at:at] = dice.randbytes(dice.randrange(9))
            case 2:
                del changed[at : at + dice.randrange(40)]
            case 3:
                changed[at:at] = changed[at : at + 80]
            case 4:
                del changed[at:]
    return bytes(changed)


def quiet(case: object, work: Callable[[], object]) -> str:
    """Do *work*; what it may raise is an error for humans,
    or the end with a status; gives the output."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            work()
        except CurveKernelError as error:
            with contextlib.suppress(SystemExit):
                fail(error)
        except SystemExit:
            pass
    assert isinstance(out.buffer, io.BytesIO)
    text = out.buffer.getvalue().decode()
    assert "Traceback" not in text, (case, text)
    assert SECRET[:38] not in text, (case, text)
    for line in text.splitlines():
        assert "\x1b" not in line, (case, text)
    return text


def content(dice: random.Random) -> bytes:
    """A connection file: mostly a good one of which a few fields are odd,
    sometimes no JSON any more."""
    info = connection_info(curve_publickey=PAIR.public_key.decode(), kernel_name="x")
    info |= dict.fromkeys(port_names, 1)
    if dice.random() < 0.5:
        info["curve_secretkey"] = SECRET
    for _ in range(dice.randrange(4)):
        info[dice.choice(FIELDS)] = dice.choice(ODD)
    for _ in range(dice.randrange(2)):
        info.pop(dice.choice(list(info)))
    text = json.dumps(info).encode()
    return mutate(dice, text) if dice.random() < 0.3 else text


def test_connection_files(tmp_path: Path) -> None:
    from curve_kernel.app import CurveKernelApp

    file, environment = tmp_path / "kernel.json", EnvironmentSecret()
    for case in range(CASES):
        file.write_bytes(content(random.Random(case)))
        file.chmod(0o600)

        def connect() -> None:
            client = BlockingKernelClient(connection_file=str(file))
            client.load_connection_file()
            for channel in ("shell", "iopub"):
                client._create_connected_socket(channel).close(linger=0)
            client.context.term()

        def start() -> None:
            app = CurveKernelApp(connection_file=str(file))
            app._environment = environment
            info = app._read_connection_file()
            find(environment, info, str(file))
            if info is not None:
                app._load_connection_info(info)
                ports.check_free(app.transport, app.ip, dict(zip(port_names, app.ports, strict=True)))

        quiet(case, connect)
        quiet(case, start)
        if case % 10 == 0:
            [kernel] = inspect_kernels([str(file)])
            assert SECRET[:38] not in json.dumps(kernel.as_json()), case
            assert kernel.problem or len(kernel.channels) == 5, case
        assert CurveKernelApp._instance is None


def test_certificates(folder: Path) -> None:
    good = (
        f'#   a certificate\n\nmetadata\ncurve\n    public-key = "{PAIR.public_key.decode()}"\n'
        f'    secret-key = "{SECRET}"\n'
    ).encode()
    path = folder / "owners" / "olga.key"
    lines = good.split(b"\n")
    for case in range(CASES):
        dice = random.Random(case)
        some = [dice.choice(lines) for _ in range(dice.randrange(8))] if dice.random() < 0.5 else lines
        data = mutate(dice, b"\n".join(some))
        path.write_bytes(data)
        quiet(case, lambda data=data: parse_certificate(data, "a name"))
        warnings: list[str] = []
        clients = list(AuthorizedClients(folder, warnings.append))
        assert len(clients) + len(warnings) == 1, case
        assert SECRET[:38] not in str(warnings), case
        if clients and data.count(b"public-key") > 1:
            assert data.count(clients[0].public_key) >= 1, case


WORDS = [
    "--name", "--role", "--force", "--json", "--existing", "owner", "viewer", "-", "--", "-h",
    "--for", "2h",
    "--until", "18:00", "--ip", "--ssh", "--shell", "--log-level", "identity.key", "/etc/passwd",
    "/", ".",
    "x" * 300, "a\nb", "\udcff\x1b[0m", "\u202e", "*", "[", SECRET, f"--name={SECRET}", f"--{SECRET}",
    f"--role={SECRET}", f"--CurveKernelApp.client_authorization={SECRET}", "--allowlist", "-f",
    f"--IPKernelApp.{SECRET}=1", "--client-authorization", "--IPKernelApp.ip", "-1", "", "=",
    "--=", "-e",
]  # fmt: skip
# The others wait for kernels, or start some.
TRIED = ("authorize", "revoke", "keygen", "clients", "uninstall", "status", "watch")


def test_command_lines(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curve_kernel.app import CurveKernelApp

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(SECRET.encode())))
    names = [name for name in TRIED if name in COMMANDS]
    for case in range(CASES):
        dice = random.Random(case)
        words = [dice.choice(WORDS) for _ in range(dice.randrange(6))]
        name = dice.choice([*names, ""])

        def command(name: str = name, words: list[str] = words) -> None:
            module, _, cls = COMMANDS[name][0].rpartition(".")
            app = getattr(importlib.import_module(module), cls)()
            app.initialize(words)
            app.start()

        def kernel(words: list[str] = words) -> None:
            CurveKernelApp().parse_command_line(words)

        quiet((case, name, words), command if name else kernel)
    assert folder.exists()


# Runs in the kernel: makes messages, most of which are malformed.
SENDS = r"""
import json, random
from ipykernel.kernelapp import IPKernelApp
thread, session = IPKernelApp.instance().iopub_thread, get_ipython().kernel.session
ODD = [None, True, -1, 1e300, "", "x", "\x1b[2J", "a\0b", "\ud800", [], {}, [[]], {"a": []}, "z" * 999]
TYPES = ["stream", "execute_input", "execute_result", "display_data", "update_display_data", "error",
         "status", "clear_output", "comm_open", "x"]
KEYS = ["text", "name", "code", "execution_count", "data", "metadata", "traceback", "ename", "wait",
        "execution_state", "msg_type", "session", "date", "version", "msg_id", "username", "text/plain",
        "image/png", "image/svg+xml"]
def odd(dice, depth=0):
    if depth < 3 and dice.random() < 0.4:
        return {dice.choice(KEYS): odd(dice, depth + 1) for _ in range(dice.randrange(4))}
    return dice.choice(ODD)
def odds(dice):
    return [(dice.choice(KEYS), odd(dice)) for _ in range(dice.randrange(3))]
def part(dice, good):
    choice = dice.random()
    if choice < 0.5:
        return json.dumps({**good, **dict(odds(dice))}, default=str).encode()
    if choice < 0.7:
        return json.dumps(odd(dice)).encode()
    if choice < 0.8:
        return dice.randbytes(dice.randrange(40))
    if choice < 0.85:
        return b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}"
    return json.dumps(good, default=str).encode()
GOOD = {"stream": {"name": "stdout", "text": "."},
        "execute_input": {"code": "1", "execution_count": 1},
        "execute_result": {"data": {"text/plain": "1"}, "execution_count": 1, "metadata": {}},
        "error": {"traceback": ["x"], "ename": "x", "evalue": "y"}}
def frames(dice):
    kind = dice.choice(TYPES)
    parts = [part(dice, session.msg_header(kind)), part(dice, {}), part(dice, {})]
    parts.append(part(dice, GOOD.get(kind, {})))
    if dice.random() < 0.1:
        parts = parts[: dice.randrange(5)]
    made = [kind.encode(), b"<IDS|MSG>", session.sign(parts), *parts]
    if dice.random() < 0.1:
        made = [dice.randbytes(dice.randrange(50)) for _ in range(1 + dice.randrange(7))]
    return made
def sends(first, last):
    for case in range(first, last):
        made = frames(random.Random(case))
        thread.schedule(lambda made=made: thread._really_send(made))
"""
ROUND = 100


@pytest.mark.parametrize("command", ["watch", "console"])
def test_messages(tmp_path: Path, command: str) -> None:
    arguments = {
        "watch": [],
        "console": ["--simple-prompt", "--ZMQTerminalInteractiveShell.include_other_output=True"],
    }[command]
    if command == "console":
        pytest.importorskip("jupyter_console")
    with started("python3-curve") as (km, client), (tmp_path / "out").open("w") as out:
        run_code(client, SENDS)
        shows = subprocess.Popen(
            [*MODULE, command, *arguments, "--existing", km.connection_file],
            stdin=subprocess.PIPE if command == "console" else subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
        )

        def text() -> str:
            return (tmp_path / "out").read_text(errors="replace")

        def is_shown(mark: str) -> bool:
            assert shows.poll() is None, text()[-3000:]
            if command == "console":
                assert shows.stdin is not None
                shows.stdin.write(f"print({mark!r}.upper())\n".encode())
                shows.stdin.flush()
            else:
                client.execute(f"print({mark!r}.upper())", store_history=False)
            time.sleep(0.2)
            return mark.upper() in text()

        try:
            wait_for("the start", lambda: is_shown("begun"))
            for first in range(0, CASES, ROUND):
                client.execute(f"sends({first}, {first + ROUND})")  # its own client reads nothing
                wait_for("a good message", lambda first=first: is_shown(f"after{first}-"), 120)
        finally:
            shows.send_signal(signal.SIGINT if command == "watch" else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                shows.wait(20)
            shows.kill()
            secret = km.curve_secretkey.decode()
    assert "Traceback" not in text()
    assert secret not in text()
    if command == "watch":
        assert "malformed" in text()
        assert "\x1b" not in text()


def test_a_good_case_is_good(tmp_path: Path) -> None:
    """The cases begin with what is accepted: they reach what comes after the first check."""
    accepted = 0
    for case in range(200):
        file = tmp_path / "kernel.json"
        file.write_bytes(content(random.Random(case)))
        file.chmod(0o600)
        with contextlib.suppress(CurveKernelError):
            connection_file.check_address(file, connection_file.read(file))
            accepted += 1
    assert 20 < accepted < 180

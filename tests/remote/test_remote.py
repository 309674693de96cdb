"""A kernel on one host and its clients on another: two network namespaces, with a cable between them.

Run as ``pytest tests/remote``, by root, with iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hosts import CLIENT_ADDRESS, KERNEL_ADDRESS, Host, ip, needs_namespaces, two_hosts
from support import MODULE, check_error, headless, wait_for
from terminal import Terminal, needs_tmux

from curve_kernel.keys import KeyPair

pytestmark = [
    needs_tmux,
    needs_namespaces,
]

ALLOWLIST = "--CurveKernelApp.client_authorization=allowlist"
PROGRAM = """
import sys
from curve_kernel.client import BlockingKernelClient

client = BlockingKernelClient(connection_file=sys.argv[1])
client.load_connection_file()
client.start_channels()
client.wait_for_ready(timeout=20)
client.execute_interactive("import os; print('pid', os.getpid())", timeout=20, allow_stdin=False)
client.stop_channels()
"""


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@dataclass
class User:
    """The user of the client's host, with a home and keys of their own."""

    host: Host
    home: Path

    def terminal(self, *arguments: str) -> Terminal:
        return Terminal(*arguments, home=self.home, prefix=self.host.prefix)

    def run(self, *command: str) -> tuple[int, str, str, float]:
        """Run *command* there; gives status, output, errors and how many seconds it took."""
        env = {**os.environ, "HOME": str(self.home), "JUPYTER_CONFIG_DIR": str(self.home / "config")}
        start = time.monotonic()
        done = subprocess.run(
            [*self.host.prefix, *command],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr, time.monotonic() - start

    def is_told(self, *arguments: str, says: str, hint: str) -> str:
        """Both commands fail with one line and a hint, soon, and nothing else."""
        for command in ("watch", "console"):
            status, out, err, seconds = self.run(*MODULE, command, *arguments)
            assert (status, out) == (1, ""), err
            assert seconds < 5
            check_error(err, says, hint)
        return err


@pytest.fixture
def user(hosts: tuple[Host, Host], tmp_path: Path) -> User:
    (tmp_path / "client").mkdir()
    user = User(hosts[1], tmp_path / "client")
    assert user.run(*MODULE, "keygen")[0] == 0
    return user


@contextlib.contextmanager
def kernel_on(host: Host, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A kernel by hand, whose log is of interest: standard error goes to kernel.log in its home."""
    with (
        (Path(os.environ["HOME"]) / "kernel.log").open("w") as log,
        headless("--log-level=INFO", *arguments, prefix=host.prefix, stderr=log) as (process, info),
    ):
        yield process, info


def log() -> str:
    return (Path(os.environ["HOME"]) / "kernel.log").read_text()


def copied(info: dict[str, Any], user: User, **fields: Any) -> Path:
    """The connection file as it arrives on the client's host."""
    assert "curve_secretkey" not in info
    file = user.home / "kernel.json"
    file.write_text(json.dumps({**info, **fields}))
    return file


def authorize(user: User, role: str) -> None:
    certificate = user.home / "config" / "curve" / "identity.key"
    command = [*MODULE, "authorize", str(certificate), "--name", "vera", "--role", role]
    subprocess.run(command, check=True, timeout=30, capture_output=True)


@pytest.mark.parametrize("listens_on", [KERNEL_ADDRESS, "0.0.0.0"])
@pytest.mark.parametrize("authorization", ["allowlist", "any"])
def test_console_watch_status_and_a_program(hosts, user, listens_on, authorization):
    options = (f"--ip={listens_on}", f"--CurveKernelApp.client_authorization={authorization}")
    with kernel_on(hosts[0], *options) as (process, info):
        assert info["ip"] == listens_on
        file = copied(info, user)
        if listens_on == "0.0.0.0":
            user.is_told("--existing", str(file), says="nobody answers", hint="into the file as ip")
            file = copied(info, user, ip=KERNEL_ADDRESS)
        if authorization == "allowlist":
            user.is_told("--existing", str(file), says="key not authorized", hint="identity.key")
            status, _, err, seconds = user.run(sys.executable, "-c", PROGRAM, str(file))
            assert status == 1
            assert "KeyNotAuthorizedError: key not authorized" in err
            assert seconds < 5
            assert f"rejected a client from {CLIENT_ADDRESS}" in log()
            authorize(user, "owner")

        status, out, err, _ = user.run(sys.executable, "-c", PROGRAM, str(file))
        assert (status, out) == (0, f"pid {process.pid}\n"), err
        who = "owner 'vera'" if authorization == "allowlist" else "any client, with key"
        assert f"shell: accepted {who}" in log()
        assert f"from {CLIENT_ADDRESS}" in log()

        status, out, err, _ = user.run(*MODULE, "status", "--json", str(file))
        assert (status, err) == (0, "")
        (seen,) = json.loads(out)
        assert seen["verdict"] == "encrypted"
        assert seen["pid"] is None  # the process is on another host
        assert {port["mechanism"] for port in seen["channels"].values()} == {"CURVE"}

        with (
            user.terminal("watch", "--existing", str(file)) as watching,
            user.terminal("console", "--existing", str(file)) as console,
        ):
            watching.wait("read-only")
            console.wait("In [")
            console.type("name = input('who? ')", "Enter")
            console.wait("who?")
            console.type("Ada", "Enter")
            time.sleep(1)  # a prompt that is being drawn takes no keys
            console.type("print('hello', name)", "Enter")
            console.wait("\nhello Ada")
            watching.wait("\nhello Ada")
            console.type("while True: pass", "Enter")
            time.sleep(1)
            console.type("C-c")
            watching.wait("KeyboardInterrupt")
            console.wait("KeyboardInterrupt")


def test_a_viewer_from_another_host(hosts, user):
    with kernel_on(hosts[0], f"--ip={KERNEL_ADDRESS}", ALLOWLIST) as (_, info):
        file = copied(info, user)
        authorize(user, "viewer")
        with user.terminal("watch", "--existing", str(file)) as watching:
            watching.wait("read-only")
        status, out, err, _ = user.run(*MODULE, "console", "--existing", str(file))
        assert (status, out) == (1, "")
        assert "not for viewers" in err


def test_another_kernel_has_the_port(hosts, user):
    """The copy is old: what answers there now holds another secret key."""
    with kernel_on(hosts[0], f"--ip={KERNEL_ADDRESS}") as (_, info):
        file = copied(info, user, curve_publickey=KeyPair.generate().public_key.decode())
        user.is_told(
            "--existing", str(file), says="does not hold the secret key", hint="new connection file"
        )
        assert "wrong server key" in log()


def test_kernel_that_is_gone(hosts, user):
    with kernel_on(hosts[0], f"--ip={KERNEL_ADDRESS}") as (_, info):
        file = copied(info, user)
    user.is_told("--existing", str(file), says="nobody answers", hint="still runs")
    _, out, _, seconds = user.run(*MODULE, "status", str(file))
    assert "dead" in out
    assert seconds < 5


def test_host_that_is_gone(hosts, user):
    """Nobody says that the port is closed, as behind a firewall that drops."""
    with kernel_on(hosts[0], f"--ip={KERNEL_ADDRESS}") as (_, info):
        file = copied(info, user)
        with user.terminal("watch", "--existing", str(file)) as watching:
            watching.wait("read-only")
            ip("-n", hosts[0].namespace, "link", "set", "cable", "down")
            user.is_told(
                "--existing", str(file), says="nobody answers", hint="can be reached from here"
            )
            status, out, _, seconds = user.run(*MODULE, "status", str(file))
            assert "unreachable" in out
            assert status == 1
            assert seconds < 5
            wait_for("the end of watch", lambda: "status 1" in watching.screen(), 40)
            assert "the network between is down" in watching.screen()

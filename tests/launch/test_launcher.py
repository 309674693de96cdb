"""`launch` on one machine, and owner_keys; tests/remote has other hosts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MODULE, check_error, headless, refused, run_code, wait_for

from curve_kernel.client import BlockingKernelClient, KeyNotAuthorizedError
from curve_kernel.keys import KeyPair, as_hex
from curve_kernel.launch.link import Link


@contextlib.contextmanager
def launcher(pair: KeyPair, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    words = ["launch", "--manager-key", as_hex(pair.public_key), "--ip", "127.0.0.1", *arguments]
    process = subprocess.Popen([*MODULE, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate(timeout=20)


async def ask(info: dict[str, Any], pair: KeyPair, *requests: dict[str, Any]) -> list[Any]:
    link = Link(f"tcp://127.0.0.1:{info['launcher_port']}", pair, info["curve_publickey"].encode())
    try:
        if outcome := await link.connect(10):
            return [outcome]
        return [await link.ask(timeout=10, **request) for request in requests]
    finally:
        link.close()


def status_of(info: dict[str, Any], pair: KeyPair) -> int | None:
    [answer] = asyncio.run(ask(info, pair, {"do": "poll"}))
    return answer["status"]


START = {"do": "start", "env": {"GIVEN": "yes"}, "cwd": None, "folder": "/nowhere"}
START |= {"name": "far", "owners": []}


def test_a_kernel_of_the_launcher():
    pair, owner = KeyPair.generate(), KeyPair.generate()
    with launcher(pair, "--owner-key", as_hex(owner.public_key)) as (process, info):
        assert not [value for value in info.values() if "secret" in str(value)]
        assert asyncio.run(ask(info, KeyPair.generate(), START)) == [KeyNotAuthorizedError]
        # An owner of the kernel is none of its launcher.
        assert asyncio.run(ask(info, owner, START)) == [KeyNotAuthorizedError]
        [answer] = asyncio.run(ask(info, pair, START))
        assert answer["cwd"] == os.environ["HOME"]
        wait_for("the kernel", lambda: asyncio.run(ask(info, pair, {"do": "poll"}))[0]["open"], 30)
        environment = Path(f"/proc/{answer['pid']}/environ").read_bytes()
        assert b"JUPYTER_CURVE_SECRETKEY=" not in environment
        [file] = Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json")
        assert "curve_secretkey" not in json.loads(file.read_text())
        client = BlockingKernelClient(connection_file=str(file), client_keys=owner)
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=30)
        code = "import os; [os.environ['GIVEN'], [n for n in os.environ if 'JUPYTER_CURVE' in n]]"
        assert run_code(client, code) == ("ok", "['yes', []]")
        # No descriptor is left, by which a child would get the secret key.
        code = "import os; [n for n in range(3, 50) if os.path.exists(f'/dev/fd/{n}')"
        assert run_code(client, f"{code} and os.get_inheritable(n)]") == ("ok", "[]")
        client.stop_channels()
        with pytest.raises(Exception, match="runs already"):
            asyncio.run(ask(info, pair, START))
        asyncio.run(ask(info, pair, {"do": "end"}))
        assert process.wait(20) == 0
        assert not file.exists()


def test_the_owners_of_a_kernel_are_those_of_its_last_start():
    """A restart takes the manager's identity as it is then: its old key may have leaked."""
    pair, old, new = (KeyPair.generate() for _ in range(3))
    with launcher(pair) as (_, info):
        for owner, other in ((old, new), (new, old)):
            start = START | {"owners": [as_hex(owner.public_key)]}
            [answer] = asyncio.run(ask(info, pair, start))
            words = Path(f"/proc/{answer['pid']}/cmdline").read_text()
            assert as_hex(owner.public_key) in words
            assert as_hex(other.public_key) not in words
            asyncio.run(ask(info, pair, {"do": "signal", "number": 9}))
            wait_for("its end", lambda: status_of(info, pair) is not None, 20)


def test_a_launcher_leaves_no_core_file_and_takes_no_key_of_others(monkeypatch):
    pair = KeyPair.generate()
    monkeypatch.setenv("JUPYTER_CURVE_SECRETKEY", pair.secret_key.decode())
    with launcher(pair) as (process, info):
        assert info["curve_publickey"] != pair.public_key.decode()
        assert pair.secret_key not in Path(f"/proc/{process.pid}/environ").read_bytes()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        [line] = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert line.split()[4] in ("0", "1")


def test_a_launcher_that_nobody_claims_ends():
    with launcher(KeyPair.generate(), "--start-timeout", "1") as (process, _):
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--manager-key"),
        (["--manager-key", "f" * 63], "--manager-key has 63 characters"),
        (["--manager-key", "g" * 64], "--manager-key is not hexadecimal"),
        (["--manager-key", "f" * 64, "--ip", "192.0.2.7"], "192.0.2.7 can't be listened on"),
        (["--manager-key", "f" * 64, "--ip", "::g"], "::g can't be listened on"),
        (["--manager-key", "f" * 64, "--ip", "127.0.0.1", "--ports", "5-7"], "is no range of ports"),
        (["--manager-key", "f" * 64], "address of this host"),
    ],
)
def test_launch_with_what_is_wrong(words, says, monkeypatch):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    done = subprocess.run(
        [*MODULE, "launch", *words], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    check_error(done.stderr, says, "")


@pytest.mark.parametrize("form", ["hexadecimal", "Z85"])
def test_owner_keys(form):
    owner, other = KeyPair.generate(), KeyPair.generate()
    while owner.public_key[:1] in b"[(" or b"'" in owner.public_key:
        owner = KeyPair.generate()
    key = as_hex(owner.public_key) if form == "hexadecimal" else owner.public_key.decode()
    options = ["--allowlist", f"--CurveKernelApp.owner_keys={key}"]
    options.append(f"--CurveKernelApp.owner_keys={as_hex(KeyPair.generate().public_key)}")
    with headless(*options) as (_, info):
        file = Path(os.environ["HOME"]) / "copy.json"
        file.write_text(json.dumps(info))
        client = BlockingKernelClient(connection_file=str(file), client_keys=owner)
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=30)
        assert run_code(client, "6 * 7") == ("ok", "42")
        client.stop_channels()
        stranger = BlockingKernelClient(connection_file=str(file), client_keys=other)
        stranger.load_connection_file()
        with pytest.raises(KeyNotAuthorizedError):
            stranger.start_channels()


def test_owner_keys_that_are_none():
    status, _, err = refused("--allowlist", "--CurveKernelApp.owner_keys=nonsense")
    assert status == 1
    check_error(err, "a public key in owner_keys has 8 characters", "")

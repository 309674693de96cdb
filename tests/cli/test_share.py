"""``share``, by certificate and by ticket, and what takes the file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pexpect
import pytest
from support import MODULE, check_error, connection_info, headless
from test_commands import fails, fails_to_print, run

from curve_kernel import connection_file
from curve_kernel.client import BlockingKernelClient
from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import curve_folder, load_identity

pytest.importorskip("jupyter_console")


def runtime() -> Path:
    return Path(os.environ["JUPYTER_RUNTIME_DIR"])


@pytest.fixture
def certificate(tmp_path) -> Path:
    """A colleague's public certificate; their home has the whole pair."""
    home = tmp_path / "vera"
    assert run("keygen", home=home)[0] == 0
    return home / "config" / "curve" / "identity.key"


@contextlib.contextmanager
def watching(file: Path, home: Path):
    env = {**os.environ, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config")}
    command = [*MODULE, "watch", str(file)]
    with subprocess.Popen(command, env=env, text=True, stdout=-1, stderr=-1) as process:
        try:
            yield process, lambda: process.stdout.readline()
        finally:
            process.terminate()
            process.communicate(timeout=20)


def execute(info: dict, code: str) -> None:
    client = BlockingKernelClient(client_keys=load_identity())
    client.load_connection_info(info)
    client.start_channels()
    client.wait_for_ready(timeout=30)
    client.execute_interactive(code, timeout=30, output_hook=lambda _: None)
    client.stop_channels()


def test_a_certificate_and_a_ticket(tmp_path, certificate):
    assert run("keygen")[0] == 0
    kernel = runtime() / "kernel-8a1f.json"
    with headless("--allowlist", "--ip=0.0.0.0", file=kernel) as (_, info):
        # Each address of this machine is one that others reach; in a sandbox there may be none.
        words = ("--name", "vera", "--role", "viewer", "--for", "2h", "--existing", str(kernel))
        status, out, err = run("share", str(certificate), *words, "--ip", "127.0.0.2")
        assert status == 0, err
        handed = json.loads(out)
        assert handed["ip"] == "127.0.0.2"
        assert handed["curve_publickey"] == info["curve_publickey"]
        assert not [field for field in handed if "secret" in field]
        assert handed["shared"] == {
            "name": "vera",
            "role": "viewer",
            "until": handed["shared"]["until"],
        }
        assert re.search(r"vera is viewer of your kernels now until .*, in 2 h", err)
        assert "in 2 h" in run("clients")[1]
        theirs = tmp_path / "for-vera.json"
        theirs.write_text(out)
        with watching(theirs, tmp_path / "vera") as (_, line):
            assert re.match(r"\[watching for-vera.json, read-only, until .*, in 2 h; Ctrl-C", line())
            execute(info, "print(6 * 7)")
            assert "42\n" in iter(line, "")
        # They can't pass on what is not theirs.
        fails(
            *("share", "--ticket", "--for", "1h", "--existing", str(theirs)),
            says="was shared by the kernel's user",
            hint="the kernel's own connection file",
            home=tmp_path / "vera",
        )
        fails("console", str(theirs), says="channel", hint="watch", home=tmp_path / "vera")

        ticket = tmp_path / "ticket.json"
        with ticket.open("w") as file:
            words = ["share", "--ticket", "--for=1h", "--role=owner", "--existing", str(kernel)]
            done = subprocess.run(
                [*MODULE, *words, "--ip=127.0.0.1"], stdout=file, stderr=-1, text=True, timeout=60
            )
        assert done.returncode == 0, done.stderr
        assert stat.S_IMODE(ticket.stat().st_mode) == 0o600
        handed = json.loads(ticket.read_text())
        name = handed["shared"]["name"]
        assert re.search(
            rf"whoever has this file has the access, as owner {name}, until .*, in 60 min", done.stderr
        )
        secret = handed["curve_client_secretkey"]
        assert "curve_secretkey" not in handed
        assert secret not in done.stderr
        ticket.chmod(0o644)
        nobody = tmp_path / "nobody"
        status, out, err = run(
            "console", str(ticket), "--simple-prompt", home=nobody, stdin="print(6 * 7)\nexit\n"
        )
        assert "42" in out
        assert f"since the mode of {ticket} is 0644: chmod 600 {ticket}" in err
        assert not (nobody / "config" / "curve").exists(), "a ticket needs no key pair"
        ticket.chmod(0o600)
        assert run("revoke", name)[0] == 0
        fails(
            *("watch", str(ticket)),
            says="the kernel does not accept this ticket",
            hint="another one",
            home=nobody,
        )
        handed["shared"]["until"] = "2026-01-01T00:00:00+00:00"
        ticket.write_text(json.dumps(handed))
        ticket.chmod(0o600)
        fails(
            *("watch", str(ticket)),
            says="this access to the kernel ended 2026-01-01",
            hint="share it again",
            home=nobody,
        )


def test_addresses(certificate):
    words = ["share", str(certificate), "--name=vera"]
    with headless("--allowlist", file=runtime() / "here.json"):
        fails(
            *(*words, "--existing=here"),
            says="the kernel listens on this machine only, at 127.0.0.1: for whom is it?",
            hint="--ip 127.0.0.1",
        )
        assert run("clients")[1].startswith("Nobody is listed")
        status, out, _ = run(*words, "--existing=here", "--ip=localhost")
        assert status == 0
        assert json.loads(out)["ip"] == "localhost"
        with Path("/dev/full").open("w") as full:
            command = [*MODULE, *words, "--existing=here", "--ip=127.0.0.1"]
            done = subprocess.run(command, stdout=full, stderr=-1, text=True, timeout=60)
        assert done.returncode == 1
        check_error(done.stderr, "the output can't be written: No space left", "make room")
        # On a terminal it asks.
        for answer, says in (("y", '"ip": "127.0.0.1"'), ("", "for whom is it?")):
            child = pexpect.spawn(
                MODULE[0], [*MODULE[1:], *words, "--existing=here"], encoding="utf-8", timeout=60
            )
            child.expect_exact("Is it for a person here? [y/N] ")
            child.sendline(answer)
            child.expect_exact(says)
            child.expect(pexpect.EOF)
        fails(
            *words, "--existing=here", "--ip=0.0.0.0", says="is no address to connect to", hint="10.0"
        )
        fails(
            *words, "--existing=here", "--ip=a b", says="'a b' is no address or name", hint="10.0.0.5"
        )
        info = connection_file.read(runtime() / "here.json")
        copy = runtime() / "copy.json"
        connection_file.write(copy, {**info, "ip": "0.0.0.0", "hostname": "gpubox"})
        fails(*words, f"--existing={copy}", says="is of another machine", hint="run this on gpubox")
        connection_file.write(copy, {**info, "transport": "ipc", "ip": "/tmp/x"})
        fails(*words, f"--existing={copy}", says="listens on files (ipc)", hint="--transport=tcp")
        other = KeyPair.generate().public_key.decode()
        connection_file.write(copy, {**info, "curve_publickey": other})
        wrong = "does not hold the secret key for this connection file's server key"
        fails(*words, f"--existing={copy}", "--ip=127.0.0.1", says=wrong, hint="started anew")


def test_wrong_uses(tmp_path, certificate):
    kernel = runtime() / "open.json"
    with headless(file=kernel):
        fails(
            *("share", str(certificate), "--name=vera", "--existing=open", "--ip=127.0.0.1"),
            says="the kernel accepts anybody with the connection file",
            hint="--allowlist",
        )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    kernel = runtime() / "other.json"
    folder = f"--CurveKernelApp.authorized_clients={elsewhere}"
    with headless("--allowlist", folder, file=kernel):
        fails(
            *("share", "--ticket", "--for=1h", "--existing=other", "--ip=127.0.0.1"),
            says="does not use the list of clients in",
            hint="the user who started it",
        )
        assert run("clients")[1].startswith("Nobody is listed"), "it is taken off again"
        fails("share", "--existing=other", says="whom to share with is not said", hint="--ticket")
        fails("share", str(certificate), says="the client needs a name", hint="--name NAME")
        ticket = ("share", "--ticket", "--existing=other")
        fails(*ticket, says="a ticket needs an end", hint="--for 1h")
        fails(
            *ticket, str(certificate), "--for=1h", says="a ticket brings a key pair", hint="leave out"
        )
        fails(*ticket, "--for=never", says="'never' is no duration", hint="2h")
        secret = certificate.with_name("identity.key_secret")
        words = ("share", str(secret), "--name=vera", "--existing=other")
        fails(*words, says="holds a secret key", hint="identity.key")
    fails(
        "share", str(certificate), "--name=v", "--existing=no", says="no connection file no", hint="st"
    )


def test_a_file_that_can_not_be_written_lists_nobody(certificate):
    kernel = runtime() / "full.json"
    words = ("share", str(certificate), "--name=vera", "--existing=full", "--ip=127.0.0.1")
    with headless("--allowlist", file=kernel):
        fails_to_print(*words, target="/dev/full", mode="w")
        assert run("clients")[1].startswith("Nobody is listed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nobody_listed(number):
    """While it makes sure that the kernel uses the list, a key of a moment is in there."""
    assert run("keygen")[0] == 0
    kernel = runtime() / "kernel-8a1f.json"
    viewers = curve_folder() / "viewers"
    with headless("--allowlist", file=kernel):
        words = ("--ticket", "--name", "vera", "--for", "1h", "--existing", str(kernel))
        command = [*MODULE, "share", *words, "--ip", "127.0.0.1"]
        with subprocess.Popen(command, stdout=-1, stderr=-1) as process:
            while process.poll() is None and not list(viewers.glob("share-*.key")):
                time.sleep(0.0005)
            process.send_signal(number)
            process.communicate(timeout=20)
        assert not list(viewers.glob("share-*.key"))


def test_a_ticket_is_for_nobody_else(tmp_path):
    """The shell has made its file before the command starts, for whoever the umask lets read it."""
    ticket, second = tmp_path / "ticket.json", tmp_path / "second.json"
    words = ("share", "--ticket", "--for=1h", "--existing=here", "--ip=127.0.0.1")

    def share() -> tuple[int, str]:
        with ticket.open("w") as file:
            done = subprocess.run([*MODULE, *words], stdout=file, stderr=-1, text=True, timeout=60)
        return done.returncode, done.stderr

    def refused(why: str) -> None:
        status, err = share()
        assert status == 1
        check_error(err, f"the ticket's file {why}", "umask 077")
        assert ticket.read_text() == ""
        assert run("clients")[1].startswith("Nobody is listed")

    before = os.umask(0o022)
    try:
        with headless("--allowlist", file=runtime() / "here.json"):
            ticket.touch()
            with ticket.open():
                refused("is open in another program, which could read the secret key")
            assert stat.S_IMODE(ticket.stat().st_mode) == 0o600
            second.hardlink_to(ticket)
            refused("has another name too")
            second.unlink()
            if os.geteuid() == 0:
                os.chown(ticket, 54321, 54321)
                ticket.chmod(0o644)
                refused("belongs to another user")
                assert stat.S_IMODE(ticket.stat().st_mode) == 0o644
            ticket.unlink()
            status, err = share()
            assert status == 0, err
            assert "curve_client_secretkey" in json.loads(ticket.read_text())
            assert stat.S_IMODE(ticket.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_ticket_that_was_changed(tmp_path):
    pair, other = KeyPair.generate(), KeyPair.generate()
    info = connection_info(curve_publickey=other.public_key.decode())
    file = tmp_path / "ticket.json"
    for fields, says in (
        ({"curve_client_secretkey": "x"}, "curve_client_secretkey in the connection file has 1 char"),
        ({"curve_client_secretkey": pair.secret_key.decode()}, "curve_client_publickey in the connec"),
        (
            {
                "curve_client_secretkey": pair.secret_key.decode(),
                "curve_client_publickey": other.public_key.decode(),
            },
            "are not a pair",
        ),
    ):
        file.write_text(json.dumps(info | fields))
        file.chmod(0o600)
        err = fails("watch", str(file), says=says, hint="")
        assert pair.secret_key.decode() not in err

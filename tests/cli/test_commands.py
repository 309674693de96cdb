"""The commands about clients, as typed, and ``console`` and ``watch`` on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import zmq.auth
from jupyter_client import KernelManager
from members import Member
from support import MODULE, check_error, headless, run_code, started, wait_for
from terminal import Terminal, needs_tmux

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import load_identity

pytest.importorskip("jupyter_console")


def run(*arguments: str, home: Path | None = None, stdin: str | None = None) -> tuple[int, str, str]:
    env = {**os.environ, "USER": "olga", "LOGNAME": "olga"}
    if home is not None:
        home.mkdir(exist_ok=True)
        env |= {"HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config")}
    done = subprocess.run(
        [*MODULE, *arguments],
        env=env,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def fails(*arguments: str, says: str, hint: str | None, **kwargs) -> str:
    status, out, err = run(*arguments, **kwargs)
    assert status == 1
    assert out == ""
    check_error(err, says, hint)
    return err


def fails_to_print(*arguments: str, target: str, mode: str) -> None:
    with Path(target).open(mode) as out:
        words = [*MODULE, *arguments]
        done = subprocess.run(
            words, stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 1, (arguments, target)
    check_error(done.stderr, "the output can't be written", "make room")


@pytest.fixture
def curve() -> Path:
    return Path(os.environ["JUPYTER_CONFIG_DIR"]) / "curve"


def colleague(tmp_path: Path) -> Path:
    """Another user's public certificate."""
    assert run("keygen", home=tmp_path / "colleague")[0] == 0
    return tmp_path / "colleague" / "config" / "curve" / "identity.key"


def test_keygen(curve):
    status, out, err = run("keygen")
    assert (status, err) == (0, "")
    assert str(curve / "identity.key") in out
    public_key, secret_key = zmq.auth.load_certificate(curve / "identity.key_secret")
    assert KeyPair.from_secret(secret_key).public_key == public_key
    assert zmq.auth.load_certificate(curve / "identity.key") == (public_key, None)
    assert zmq.auth.load_certificate(curve / "owners" / "olga.key") == (public_key, None)
    assert stat.S_IMODE((curve / "identity.key_secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(curve.stat().st_mode) == 0o700
    assert secret_key.decode() not in out

    before = (curve / "identity.key_secret").read_bytes()
    fails("keygen", says="already", hint="--force")
    assert (curve / "identity.key_secret").read_bytes() == before
    assert "old key" not in out
    old_key = public_key.decode()
    # Listed under one more name, and not as an owner.
    assert run("revoke", "olga")[0] == 0
    assert run("authorize", str(curve / "identity.key"), "--name", "desk", "--role", "viewer")[0] == 0
    status, out, err = run("keygen", "--force")
    assert (status, err) == (0, "")
    assert (curve / "identity.key_secret").read_bytes() != before
    assert (
        "It was listed as viewer desk too, and is not any more.\nYour old key is off your list" in out
    )
    assert f"reject it from now on: {old_key}\n" in out
    assert "disconnect that key within two seconds; no restart is needed" in out
    assert "on other machines" in out
    assert "accept\nthe old key until you restart them or shut them down" in out
    assert "Others who listed your old key" in out
    assert str(curve / "identity.key") in out
    clients = run("clients")[1]
    assert clients.count("(you)") == 1
    assert old_key not in clients

    # The secret key was removed by hand, and the old one is listed under one more name.
    (curve / "owners" / "olga.key").rename(curve / "owners" / "desk.key")
    old_key = load_identity(curve).public_key.decode()
    (curve / "identity.key_secret").unlink()
    status, out, _ = run("keygen", "--force")
    assert status == 0
    assert "It was listed as owner desk too, and is not any more.\nYour old key is off" in out
    assert old_key not in run("clients")[1]

    (curve / "identity.key_secret").write_text("torn")
    (curve / "identity.key").unlink()
    status, out, _ = run("keygen", "--force")
    assert status == 0
    assert "old key can't be read" in out
    assert run("clients")[1].count("(you)") == 1


def test_a_keygen_that_fails_leaves_no_old_key_on_the_list(curve):
    assert run("keygen")[0] == 0
    old_key = load_identity(curve).public_key.decode()
    (curve / "owners" / "olga.key").rename(curve / "owners" / "laptop.key")
    (curve / "owners" / "olga.key").mkdir()
    status, _, err = run("keygen", "--force")
    assert status == 1
    check_error(err, "can't be written", "configuration folder")
    assert old_key not in run("clients")[1]
    (curve / "owners" / "olga.key").rmdir()
    assert run("keygen", "--force")[0] == 0
    assert run("clients")[1].count("\n") == 1


def test_keygen_after_the_secret_key_was_lost(curve):
    assert run("keygen")[0] == 0
    old_key = load_identity(curve).public_key.decode()
    (curve / "owners" / "olga.key").rename(curve / "owners" / "laptop.key")
    (curve / "identity.key_secret").unlink()
    status, out, _ = run("keygen")
    assert status == 0
    assert "It was listed as owner laptop too, and is not any more.\nYour old key is off" in out
    assert old_key not in run("clients")[1]
    # No folder can be made there.
    shutil.rmtree(curve)
    curve.mkdir()
    (curve / "owners").symlink_to("/nowhere/at/all")
    fails("keygen", says="can't be", hint="configuration folder")


def test_two_that_make_a_key_pair_at_once(curve):
    for _ in range(5):
        shutil.rmtree(curve, ignore_errors=True)
        both = [
            subprocess.Popen([*MODULE, "keygen"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        outcomes = sorted((process.wait(60), process.communicate()[1]) for process in both)
        assert outcomes[0] == (0, b"")
        if outcomes[1][0] == 1:
            check_error(outcomes[1][1].decode(), "already", "--force")
        own = load_identity(curve)
        listed = [zmq.auth.load_certificate(path)[0] for path in (curve / "owners").iterdir()]
        assert [own.public_key] == listed
        assert zmq.auth.load_certificate(curve / "identity.key")[0] == own.public_key


@pytest.mark.parametrize(
    "words", [("clients",), ("doctor",), ("--version",), ("help",), ("clients", "--help")]
)
def test_output_that_can_not_be_written(words):
    for target, mode in (("/dev/full", "w"), ("/dev/null", "r")):
        fails_to_print(*words, target=target, mode=mode)


def test_a_list_that_can_not_be_read(curve, tmp_path):
    """It is not an empty one."""
    assert run("authorize", str(colleague(tmp_path)), "--name", "vera")[0] == 0
    (curve / "owners").mkdir(exist_ok=True)
    (curve / "viewers").rename(curve / "kept")
    (curve / "viewers").symlink_to(curve / "viewers")
    for words in (("revoke", "vera"), ("authorize", str(curve / "kept" / "vera.key"), "--name=vera")):
        fails(*words, says="the list of clients can't be read", hint="jupyter --paths")


def test_revoke_hears_of_a_kernel_whose_file_is_anywhere(tmp_path):
    certificate = colleague(tmp_path)
    assert run("authorize", str(certificate), "--name", "vera")[0] == 0
    with (
        headless("--allowlist", file=tmp_path / "k.json") as (_, info),
        Member(info, load_identity(certificate.parent), ("iopub",)),
    ):
        assert "\n1 connection is ended: k.json\n" in run("revoke", "vera")[1]


def test_an_option_that_is_empty():
    fails("install", "--user", "--ssh", "", "--name", "gpu", says="--ssh is empty", hint="--help")
    fails("console", "kernel.json", "--ssh", "", says="--ssh is empty", hint="--help")
    fails("install", "--prefix", "", says="--prefix is empty", hint="--help")
    fails("status", "", says="no connection file", hint="--paths")
    fails("status", "/", says="no connection file", hint="--paths")
    fails("help", "instal", says="no such command: instal", hint="did you mean")


def test_keygen_does_not_overwrite_an_owner_of_that_name(curve, tmp_path):
    certificate = colleague(tmp_path)
    assert run("authorize", str(certificate), "--name", "olga", "--role", "owner")[0] == 0
    fails("keygen", says="owners/olga.key", hint="--force")
    assert not (curve / "identity.key_secret").exists()


def test_pyzmqs_own_certificates_are_taken(curve, tmp_path):
    public, secret = zmq.auth.create_certificates(tmp_path, "pyzmq")
    status, out, _ = run("authorize", public, "--name", "pyzmq", "--role", "viewer")
    assert status == 0
    assert str(curve / "viewers" / "pyzmq.key") in out
    key = zmq.auth.load_certificate(public)[0]
    assert zmq.auth.load_certificate(curve / "viewers" / "pyzmq.key") == (key, None)
    text = fails("authorize", secret, "--name", "x", says="secret key", hint="identity.key")
    assert zmq.auth.load_certificate(secret)[1].decode() not in text
    assert not (curve / "viewers" / "x.key").exists()


def test_authorize_revoke_clients(curve, tmp_path):
    certificate = colleague(tmp_path)
    assert "Nobody is listed" in run("clients")[1]
    for role in ("viewer", "owner", "viewer"):
        status, _, err = run("authorize", str(certificate), "--name", "vera", "--role", role)
        assert (status, err) == (0, "")
        out = run("clients")[1]
        assert re.fullmatch(rf"vera +{role} +\S{{40}}\n", out)
    # By default the role that can do less.
    assert run("authorize", "-", "--name", "vera", stdin=certificate.read_text())[0] == 0
    assert "viewer" in run("clients")[1]
    fails("authorize", str(certificate), "--name", "other", says="listed already", hint="revoke vera")
    second = tmp_path / "second"
    second.mkdir()
    other, _ = zmq.auth.create_certificates(second, "other")
    fails("authorize", other, "--name", "vera", says="another client vera", hint="--force")
    assert run("authorize", other, "--name", "vera", "--force")[0] == 0
    status, out, _ = run("revoke", "vera")
    assert status == 0
    assert out.startswith("vera can't connect any more.")
    assert "no restart is needed" in out
    assert list(curve.rglob("vera.key")) == []
    fails("revoke", "vera", says="no client 'vera'", hint="clients")


@pytest.mark.parametrize(
    "name", ["", "../evil", "a/b", ".hidden", "manager", "a b", "a\nb", "x" * 65, "-x", "ü", "$(id)"]
)
def test_names_that_can_be_none(curve, tmp_path, name):
    certificate, _ = zmq.auth.create_certificates(tmp_path, "c")
    fails("authorize", certificate, f"--name={name}", says="can't be the name", hint="letters")
    fails("revoke", "--", name, says="no client", hint="clients")


def test_certificates_that_are_none(tmp_path):
    path = tmp_path / "bad.key"
    path.write_text("nothing")
    fails("authorize", str(path), "--name", "x", says="no public key", hint="keygen")
    fails("authorize", "-", "--name", "x", stdin="", says="standard input", hint="keygen")
    fails("authorize", str(tmp_path / "none"), "--name", "x", says="No such file", hint="keygen")
    fails("authorize", str(tmp_path), "--name", "x", says="folder", hint="keygen")
    path.write_text('curve\n    public-key = "abc"\n')
    fails("authorize", str(path), "--name", "x", says="3 characters", hint="Z85")
    fails("authorize", says="required", hint="--help")


def test_the_folder_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "file"))
    fails("keygen", says="can't be written", hint="configuration folder")


def console(km: KernelManager) -> Terminal:
    return Terminal("console", "--existing", km.connection_file)


def watch(km: KernelManager) -> Terminal:
    return Terminal("watch", "--existing", km.connection_file)


@needs_tmux
def test_console_first_use_and_then_a_session(curve):
    with (
        started("python3-curve") as (km, client),
        Terminal("console", "--existing", km.connection_file) as terminal,
    ):
        terminal.wait("In [")
        screen = terminal.screen()
        assert "made your key pair" in screen
        assert str(curve / "identity.key") in screen
        assert (curve / "identity.key_secret").exists()
        terminal.type("print('from ' + 'the console')", "Enter")
        terminal.wait("from the console")
        terminal.type("x = input('who? ')", "Enter")
        terminal.wait("who?")
        terminal.type("Ada", "Enter")
        wait_for("the answer", lambda: run_code(client, "x") == ("ok", "'Ada'"))
        terminal.type("1/0", "Enter")
        terminal.wait("ZeroDivisionError: division by zero")
        for _ in range(5):
            # A prompt that is being drawn takes no keys.
            terminal.type("C-d")
            with contextlib.suppress(TimeoutError):
                wait_for("the question", lambda: "really want to exit" in terminal.screen(), 3)
                break
        terminal.type("y", "Enter")
        terminal.wait("status 0")
        assert run_code(client, "print('alive')") == ("ok", "alive\n")
        with Terminal("console", "--existing", Path(km.connection_file).name) as again:
            assert "made your key pair" not in again.wait("In [")


@needs_tmux
def test_console_on_a_stock_kernel_with_both_keys_in_its_file(tmp_path):
    import ipykernel

    if ipykernel.version_info < (7, 3):
        pytest.skip("this ipykernel has no CURVE support of its own")
    file = tmp_path / "kernel.json"
    with (
        started("python3", transport_encryption="required", connection_file=str(file)),
        Terminal("console", "--existing", str(file)) as terminal,
    ):
        terminal.wait("In [1]")
        terminal.type("print(6 * 7)", "Enter")
        terminal.wait("\n42")


@needs_tmux
def test_curve_magic_fits_into_80_columns(curve):
    """Also with a client of which nothing but a long key is known."""
    assert run("keygen")[0] == 0
    assert run("revoke", "olga")[0] == 0
    with (
        headless() as (process, info),
        Terminal("console", "--existing", f"kernel-{process.pid}.json", columns=80) as terminal,
    ):
        terminal.wait("In [1]")
        terminal.type("%curve", "Enter")
        screen = terminal.wait("In [2]").partition("%curve")[2]
        # A path is in one piece, to be copied.
        file = os.environ["JUPYTER_RUNTIME_DIR"].replace(os.environ["HOME"], "~", 1)
        assert f"\nConnection file: {file}/kernel-{process.pid}.json\n" in screen
        assert max(map(len, screen.splitlines())) <= 80, screen
        assert f"Server key: {info['curve_publickey']}" in screen
        assert re.search(r"^shell +tcp://127.0.0.1:\d+ +CURVE +\d +\d$", screen, re.MULTILINE), screen
        assert re.search(r"^pipe \(forked children\) +tcp://127.0.0.1:\d+ +CURVE +0 +0$", screen, re.M)
        rows = re.findall(r"^\S{11}… +any +shell, .* 127.0.0.1 +\d\d:\d\d:\d\d$", screen, re.M)
        assert len(rows) == 1, screen
        assert load_identity(curve).public_key.decode() in screen


@needs_tmux
def test_watch_as_a_viewer(tmp_path):
    certificate = colleague(tmp_path)
    home = tmp_path / "colleague"
    with started("python3-curve") as (km, client):
        leaked = tmp_path / "copy.json"
        shutil.copy(km.connection_file, leaked)
        with Terminal("watch", "--existing", str(leaked), home=home) as terminal:
            screen = terminal.wait("status 1")
            assert "curve_kernel: error: key not authorized" in screen
            assert str(certificate) in screen
        assert run("authorize", str(certificate), "--name", "vera", "--role", "viewer")[0] == 0
        with Terminal("watch", "--existing", str(leaked), home=home) as terminal:
            terminal.wait("watching copy.json, read-only")
            for code in (
                "print('to everybody')",
                "import sys; print('warned', file=sys.stderr)",
                "def f():\n    return 6 * 7\nf()",
                "from IPython.display import Image, display; import base64\n"
                "display(Image(data=b'\\x89PNG' + bytes(5000), format='png'))",
                "print('\\x1b]0;owned\\x07\\x1b[2Jstill\\x1b[31m red\\x1b[0m')",
                "raise ValueError('oh')",
            ):
                run_code(client, code)
            screen = terminal.wait("ValueError: oh")
            assert re.search(r"In \[\d+\]: print\('to everybody'\)\nto everybody\n", screen)
            assert "warned" in screen
            assert re.search(r"Out\[\d+\]: 42", screen)
            assert "[image/png, 4 KiB]" in screen
            assert "still red" in screen
            assert "owned" not in terminal.tmux("display-message", "-p", "#{pane_title}")
            terminal.type("C-c")
            terminal.wait("status 0")
        assert run_code(client, "print('did not notice')") == ("ok", "did not notice\n")
        with Terminal("console", "--existing", str(leaked), home=home) as terminal:
            screen = terminal.wait("status 1")
            assert "not for viewers" in screen
        assert run("revoke", "vera")[0] == 0
        with Terminal("watch", "--existing", str(leaked), home=home) as terminal:
            assert "key not authorized" in terminal.wait("status 1")


@needs_tmux
def test_watch_survives_a_restart_and_ends_with_the_kernel():
    assert run("keygen")[0] == 0
    with (
        started("python3-curve") as (km, client),
        Terminal("watch", "--existing", km.connection_file) as terminal,
    ):
        terminal.wait("read-only")
        run_code(client, "print('before')")
        terminal.wait("\nbefore")
        km.restart_kernel()
        client.wait_for_ready(timeout=30)
        wait_for(
            "what comes after",
            lambda: run_code(client, "print('after')") and "\nafter" in terminal.screen(),
        )
        client.stop_channels()
        km.shutdown_kernel()
        terminal.wait("the kernel has ended")
        terminal.wait("status 0")


@pytest.mark.parametrize("command", ["console", "watch"])
def test_connecting_to_what_is_no_kernel(tmp_path, command):
    fails(command, "--existing", "no-such", says="no connection file no-such", hint="status")
    fails(command, says="no kernel has a connection file", hint="status")
    path = tmp_path / "bad.json"
    path.write_text("{")
    fails(command, "--existing", str(path), says="not JSON", hint="connection file")
    path.write_text(json.dumps({"ip": "127.0.0.1"}))
    fails(command, "--existing", str(path), says="plaintext", hint="python3-curve")


def watching(file: str, head: int = 0) -> subprocess.Popen[str]:
    command = [*MODULE, "watch", "--existing", file]
    if head:
        command = ["bash", "-c", f'"$@" | head -{head}; exit ${{PIPESTATUS[0]}}', "watch", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_watch_of_what_it_cannot_read(tmp_path):
    assert run("keygen")[0] == 0
    with started("python3-curve") as (km, client):
        info = json.loads(Path(km.connection_file).read_text())
        wrong = tmp_path / "wrong.json"
        wrong.write_text(json.dumps({**info, "key": "another"}))
        watchers = [watching(str(wrong)), watching(km.connection_file), watching(km.connection_file, 1)]
        send = "k = get_ipython().kernel; k.session.send(k.iopub_socket, 'stream', {'name': 'stdout'})"
        deadline = time.monotonic() + 120
        while watchers[0].poll() is None or watchers[2].poll() is None:
            assert time.monotonic() < deadline
            run_code(client, send)
            time.sleep(0.3)
        check_error(watchers[0].communicate(timeout=60)[1], "another key", "new connection file")
        out, err = watchers[2].communicate(timeout=60)
        assert (watchers[2].returncode, err) == (141, "")
        assert out.startswith("[watching")
        out, descriptor = b"", watchers[1].stdout.fileno()
        while b"malformed" not in out:
            assert time.monotonic() < deadline
            run_code(client, send)
            if select.select([descriptor], [], [], 0.3)[0]:
                out += os.read(descriptor, 4096)
        watchers[1].send_signal(signal.SIGINT)
        assert watchers[1].communicate(timeout=60)[1] == ""


def test_a_reader_that_leaves_and_no_standard_input():
    assert run("keygen")[0] == 0
    for command in ("status --json", "clients", "doctor"):
        line = f"{shlex.join(MODULE)} {command} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stderr == ""
    line = f"{shlex.join(MODULE)} authorize - --name x <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    check_error(done.stderr, "standard input", "certificate")


@needs_tmux
def test_console_on_a_kernel_that_does_not_answer():
    assert run("keygen")[0] == 0
    with started("python3-curve") as (km, client):
        client.execute("import time; time.sleep(200)")
        with Terminal("console", "--existing", km.connection_file) as terminal:
            kernel = psutil.Process(km.provisioner.pid)
            wait_for(
                "the console to connect",
                lambda: (
                    [
                        one.laddr.port
                        for one in kernel.net_connections("tcp")
                        if one.status == "ESTABLISHED"
                    ].count(km.shell_port)
                    >= 3
                ),
            )
            terminal.type("C-c")
            screen = terminal.wait("status 130")
            assert "Traceback" not in screen

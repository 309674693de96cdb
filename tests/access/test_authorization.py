"""Who gets in to what: the table of the README, with real handshakes against real kernels."""

from __future__ import annotations

import contextlib
import html
import json
import os
import queue
import re
import shutil
import socket as stdlib_socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from jupyter_client import BlockingKernelClient
from support import (
    CHANNELS,
    both_keys,
    client_of,
    connection_info,
    curve_socket,
    headless,
    refused,
    run_code,
    started,
    wait_for,
)
from zmq.utils.monitor import parse_monitor_message

from curve_kernel.client import BlockingKernelClient as OwnKeysClient
from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

ALLOWLIST = "--CurveKernelApp.client_authorization=allowlist"
KINDS = {
    "shell": zmq.DEALER,
    "stdin": zmq.DEALER,
    "control": zmq.DEALER,
    "iopub": zmq.SUB,
    "hb": zmq.REQ,
}
FATES = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "in",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "refused",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "protocol",
    zmq.EVENT_DISCONNECTED: "hung up",
}


def handshake(
    info: dict[str, Any], channel: str, keys: KeyPair | None = None, timeout: float = 20
) -> str:
    """The fate of one connection of a hand-made client: in, refused, protocol, hung up or nothing."""
    with zmq.Context() as context:
        socket = curve_socket(context, KINDS[channel], info["curve_publickey"].encode())
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey = keys.public_key, keys.secret_key
        socket.reconnect_ivl = -1
        monitor = socket.get_monitor_socket()
        socket.connect(f"tcp://127.0.0.1:{info[f'{channel}_port']}")
        fate = "nothing"
        deadline = time.monotonic() + timeout
        while fate == "nothing" and monitor.poll(max(0, deadline - time.monotonic()) * 1000):
            fate = FATES.get(parse_monitor_message(monitor.recv_multipart())["event"], "nothing")
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)
        return fate


def fates(info: dict[str, Any], keys: KeyPair | None = None) -> dict[str, str]:
    return {channel: handshake(info, channel, keys) for channel in CHANNELS}


EVERYWHERE = dict.fromkeys(CHANNELS, "in")
NOWHERE = dict.fromkeys(CHANNELS, "refused")
VIEWER = {**NOWHERE, "iopub": "in", "hb": "in"}


@contextlib.contextmanager
def allowlisted(tmp_path: Path, *arguments: str) -> Iterator[tuple[dict[str, Any], Any, Path]]:
    """A kernel with an allowlist: connection info, its manager's client, its log."""
    keys = KeyPair.generate()
    file, log = tmp_path / "kernel.json", tmp_path / "log"
    file.write_text(json.dumps(connection_info(curve_publickey=keys.public_key.decode())))
    env = {"JUPYTER_CURVE_SECRETKEY": keys.secret_key.decode()}
    with log.open("w") as stderr:
        command = headless(ALLOWLIST, "--log-level=INFO", *arguments, file=file, env=env, stderr=stderr)
        with command as (_, info), client_of(info, keys) as client:
            yield info, client, log
    assert keys.secret_key.decode() not in log.read_text()


def test_who_may_do_what(tmp_path, folder):
    owner, viewer = KeyPair.generate(), KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    write_certificate(folder / "viewers" / "vera.key", viewer.public_key)
    with allowlisted(tmp_path) as (info, client, log):
        assert fates(info) == NOWHERE
        assert fates(info, owner) == EVERYWHERE
        assert fates(info, viewer) == VIEWER
        assert run_code(client, "print('the manager')") == ("ok", "the manager\n")
        text = log.read_text()
    for channel in ("shell", "stdin", "control", "iopub"):
        assert f"{channel}: accepted owner 'olga' from 127.0.0.1" in text
        assert f"{channel}: accepted manager from 127.0.0.1" in text
        assert re.search(f"{channel}: rejected a client from 127.0.0.1: unknown key .{{40}}", text)
    assert "iopub: accepted viewer 'vera'" in text
    assert "shell: rejected a client from 127.0.0.1: not for viewers such as 'vera'" in text


def test_any_lets_in_whoever_has_the_server_key(tmp_path):
    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    with headless(file=file) as (_, info):
        assert fates(info) == EVERYWHERE
        wrong = {**info, "curve_publickey": KeyPair.generate().public_key.decode()}
        assert set(fates(wrong).values()) == {"hung up"}


def test_lists_take_effect_at_the_next_handshake(tmp_path, folder):
    client_keys = KeyPair.generate()
    path = folder / "owners" / "olga.key"
    with allowlisted(tmp_path) as (info, client, log):
        assert handshake(info, "shell", client_keys) == "refused"
        write_certificate(path, client_keys.public_key)
        assert handshake(info, "shell", client_keys) == "in"
        write_certificate(path, KeyPair.generate().public_key)
        assert handshake(info, "shell", client_keys) == "refused"
        write_certificate(path, client_keys.public_key)
        assert handshake(info, "shell", client_keys) == "in"
        path.rename(folder / "viewers" / "olga.key")
        assert handshake(info, "shell", client_keys) == "refused"
        assert handshake(info, "iopub", client_keys) == "in"
        shutil.rmtree(folder)
        assert fates(info, client_keys) == NOWHERE
        (folder / "owners").mkdir(parents=True, mode=0o700)
        write_certificate(path, client_keys.public_key)
        assert fates(info, client_keys) == EVERYWHERE
        path.unlink()
        assert fates(info, client_keys) == NOWHERE
        assert run_code(client, "1")[0] == "ok"
        log.read_text()


def test_an_owner_who_was_let_in_before_is_looked_at_again(tmp_path, folder):
    keys, others = KeyPair.generate(), KeyPair.generate()
    owners = folder / "owners"
    path, second, elsewhere = owners / "b.key", owners / "a.key", tmp_path / "c.key"
    text = {}
    for pair in (keys, others):
        write_certificate(elsewhere, pair.public_key)
        text[pair] = elsewhere.read_bytes()
    with allowlisted(tmp_path) as (info, client, log):

        def expect(fate: str, pair: KeyPair = keys) -> None:
            assert handshake(info, "shell", pair) == fate

        path.write_bytes(text[keys])
        path.chmod(0o600)
        expect("in")
        # In place, of the same size, with the times of before: nothing of it shows in the folder.
        times = path.stat()
        path.write_bytes(text[others])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        expect("refused")
        expect("in", others)
        path.write_bytes(b"nothing")
        expect("refused", others)
        path.write_bytes(text[keys])
        expect("in")
        for one in (path, owners, folder):
            mode = stat.S_IMODE(one.stat().st_mode)
            one.chmod(mode | 0o020)
            expect("refused")
            one.chmod(mode)
            expect("in")
        # Listed twice, and revoked at one place.
        second.write_bytes(text[keys])
        path.unlink()
        expect("in")
        second.unlink()
        expect("refused")
        path.symlink_to(elsewhere)
        elsewhere.write_bytes(text[keys])
        expect("in")
        elsewhere.write_bytes(text[others])
        expect("refused")
        expect("in", others)
        elsewhere.unlink()
        expect("refused", others)
        # A viewer whose file becomes an owner's in place.
        write_certificate(folder / "viewers" / "v.key", keys.public_key)
        path.unlink()
        path.write_bytes(text[others])
        path.chmod(0o600)
        expect("refused")
        expect("in", others)
        path.write_bytes(text[keys])
        expect("in")
        assert run_code(client, "1")[0] == "ok"
        log.read_text()


def test_200_certificates_and_broken_ones_among_them(tmp_path, folder):
    clients = [KeyPair.generate() for _ in range(200)]
    for number, keys in enumerate(clients):
        write_certificate(folder / "owners" / f"client-{number:03}.key", keys.public_key)
    broken = {
        "empty": b"",
        "text": b"hello",
        "binary": bytes(range(256)),
        "short": b'curve\n    public-key = "abc"\n',
        "no-value": b"public-key\n",
        "huge": b"x" * (2 << 20),
    }
    for name, content in broken.items():
        (folder / "owners" / f"{name}.key").write_bytes(content)
    (folder / "owners" / "folder.key").mkdir()
    os.mkfifo(folder / "owners" / "fifo.key", 0o600)
    (folder / "owners" / "dangling.key").symlink_to("nowhere")
    # The kernel starts with what a user has; the dangling link is there only afterwards.
    (folder / "owners" / "dangling.key").unlink()
    with allowlisted(tmp_path) as (info, client, log):
        (folder / "owners" / "dangling.key").symlink_to("nowhere")
        for keys in (clients[0], clients[99], clients[199]):
            assert handshake(info, "shell", keys) == "in"
        assert handshake(info, "shell") == "refused"
        assert run_code(client, "1")[0] == "ok"
        text = log.read_text()
    for name in (*broken, "folder", "fifo", "dangling"):
        assert text.count(str(folder / "owners" / f"{name}.key")) == 1, name


@pytest.mark.parametrize("name", [".", "owners", "viewers", "owners/a.key", "viewers/b.key"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_an_error_at_start(tmp_path, folder, name, mode):
    for certificate in ("owners/a.key", "viewers/b.key"):
        write_certificate(folder / certificate, KeyPair.generate().public_key)
    path = folder / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)
    status, lines, text = refused(ALLOWLIST)
    assert status == 1
    assert len(lines) == 2, text
    assert lines[0].startswith("curve_kernel: error: ")
    assert f"{path} can be written by others" in lines[0]
    assert f"chmod go-w {path}" in lines[1]


def test_what_others_may_write_later_counts_for_nothing(tmp_path, folder):
    owner, viewer = KeyPair.generate(), KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    write_certificate(folder / "viewers" / "vera.key", viewer.public_key)
    with allowlisted(tmp_path) as (info, _, log):
        (folder / "viewers").chmod(0o777)
        assert handshake(info, "iopub", viewer) == "refused"
        assert handshake(info, "iopub", owner) == "in"
        (folder / "viewers").chmod(0o700)
        assert handshake(info, "iopub", viewer) == "in"
        (folder / "owners" / "olga.key").chmod(0o666)
        assert handshake(info, "iopub", owner) == "refused"
        (folder / "owners" / "olga.key").chmod(0o644)
        assert handshake(info, "iopub", owner) == "in"
        folder.chmod(0o777)
        assert fates(info, owner) == NOWHERE
        folder.chmod(0o700)
        text = log.read_text()
    for path in (folder, folder / "viewers", folder / "owners" / "olga.key"):
        assert f"{path} can be written by others" in text


def test_another_folder_by_option(tmp_path, folder):
    client_keys = KeyPair.generate()
    other = tmp_path / "elsewhere"
    (other / "viewers").mkdir(parents=True, mode=0o700)
    other.chmod(0o700)
    write_certificate(other / "viewers" / "vera.key", client_keys.public_key)
    with allowlisted(tmp_path, f"--CurveKernelApp.authorized_clients={other}") as (info, _, _):
        assert fates(info, client_keys) == VIEWER


def test_neither_signing_nor_an_allowlist_is_no_kernel(tmp_path):
    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys)) | {"key": ""}))
    status, lines, text = refused("-f", str(file))
    assert status == 1
    assert len(lines) == 2, text
    assert "not signed" in lines[0]
    assert "allowlist" in lines[1]
    with headless(ALLOWLIST, file=file) as (_, info), client_of(info, keys) as client:
        assert run_code(client, "print('unsigned')") == ("ok", "unsigned\n")


def test_a_leaked_connection_file_is_worth_nothing(tmp_path):
    """The installed kernelspec, a copy of its connection file, a stock client and a hand-made one."""
    with started("python3-curve") as (km, client):
        leaked = json.loads(Path(km.connection_file).read_text())
        assert "curve_secretkey" not in leaked
        assert fates(leaked) == NOWHERE
        with zmq.Context() as context:
            subscribers = [context.socket(zmq.SUB)]
            subscribers.append(curve_socket(context, zmq.SUB, leaked["curve_publickey"].encode()))
            for subscriber in subscribers:
                subscriber.linger = 0
                subscriber.subscribe(b"")
                subscriber.connect(f"tcp://127.0.0.1:{leaked['iopub_port']}")
            request = BlockingKernelClient()
            request.load_connection_info(leaked)
            shell = curve_socket(context, zmq.DEALER, leaked["curve_publickey"].encode())
            shell.connect(f"tcp://127.0.0.1:{leaked['shell_port']}")
            message = request.session.msg("execute_request", {"code": "stolen = 1", "silent": False})
            shell.send_multipart(request.session.serialize(message))
            stock = BlockingKernelClient()
            stock.load_connection_info(leaked)
            stock.start_channels(hb=False)
            stock.shell_channel.socket.sndtimeo = 2000
            with contextlib.suppress(zmq.Again):
                stock.execute("stolen = 2")
            with pytest.raises(queue.Empty):
                stock.get_shell_msg(timeout=2)
            assert run_code(client, "print('stolen' in globals())") == ("ok", "False\n")
            assert not any(subscriber.poll(0) for subscriber in subscribers)
            stock.stop_channels()
            for socket in (shell, *subscribers):
                socket.close(linger=0)


def test_a_viewer_sees_outputs_and_its_requests_never_arrive(tmp_path, folder):
    viewer = KeyPair.generate()
    write_certificate(folder / "viewers" / "vera.key", viewer.public_key)
    with allowlisted(tmp_path) as (info, client, _), zmq.Context() as context:
        server_key = info["curve_publickey"].encode()
        sockets = {}
        for channel in ("iopub", "shell", "control", "stdin"):
            socket = sockets[channel] = curve_socket(context, KINDS[channel], server_key)
            socket.curve_publickey, socket.curve_secretkey = viewer.public_key, viewer.secret_key
            if channel == "iopub":
                socket.subscribe(b"")
            socket.connect(f"tcp://127.0.0.1:{info[f'{channel}_port']}")
        wait_for("it to see", lambda: run_code(client, "1") and sockets["iopub"].poll(100))
        session = client.session.clone()
        for channel, kind, content in [
            ("shell", "execute_request", {"code": "viewed = 1", "silent": False}),
            ("control", "execute_request", {"code": "viewed = 2", "silent": False}),
            ("control", "shutdown_request", {"restart": False}),
            ("control", "debug_request", {"type": "request", "seq": 1, "command": "initialize"}),
            ("stdin", "input_reply", {"value": "viewer's"}),
        ]:
            # libzmq holds nothing for a server that has rejected the client already.
            with contextlib.suppress(zmq.Again):
                message = session.serialize(session.msg(kind, content))
                sockets[channel].send_multipart(message, zmq.NOBLOCK)
        time.sleep(1)
        assert run_code(client, "print('viewed' in globals())") == ("ok", "False\n")
        heard = b""
        while b"False" not in heard:
            assert sockets["iopub"].poll(60_000)
            heard += b"".join(sockets["iopub"].recv_multipart())
        assert b"viewed" in heard
        assert not any(sockets[channel].poll(0) for channel in ("shell", "control", "stdin"))
        for socket in sockets.values():
            socket.close(linger=0)


THROW = """
import ctypes, threading, time
[thread] = [one for one in threading.enumerate() if one.name == "curve_kernel monitor"]
for _ in range(3):
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object({error}))
    get_ipython().kernel.parent._gate._monitor._wake()
    time.sleep(0.2)
"""


@pytest.mark.parametrize("error", ["SystemExit", "ValueError"])
def test_the_monitor_killed_lets_nobody_in_says_so_and_blocks_nothing(tmp_path, folder, error):
    owner = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    with allowlisted(tmp_path) as (info, client, log):
        assert handshake(info, "shell", owner) == "in"
        assert run_code(client, THROW.format(error=error))[0] == "ok"
        for channel in CHANNELS:
            assert handshake(info, channel, owner, timeout=3) != "in"
        wait_for("the log", lambda: "no new client can connect" in log.read_text())
        assert f"the watch over connections has ended ({error})" in run_code(client, "%curve")[1]
        # More connections than libzmq's monitor holds events.
        for _ in range(int(os.environ.get("CURVE_KERNEL_CONNECTS", "60000"))):
            with contextlib.suppress(OSError), stdlib_socket.socket() as peer:
                peer.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, bytes([1] + [0] * 7))
                peer.connect(("127.0.0.1", info["iopub_port"]))
                peer.sendall(b"\xff")
        assert run_code(client, "print('standing')") == ("ok", "standing\n")


def test_the_monitor_killed_does_nothing_when_a_client_leaves(tmp_path, folder):
    viewer = KeyPair.generate()
    write_certificate(folder / "viewers" / "vera.key", viewer.public_key)
    with allowlisted(tmp_path) as (info, client, _):
        watching = OwnKeysClient(client_keys=viewer)
        watching.load_connection_info(info)
        watching.start_channels(shell=False, stdin=False, control=False, hb=False)
        assert run_code(client, THROW.format(error="SystemExit"))[0] == "ok"
        watching.stop_channels()
        busy = "import time; a = time.process_time(); time.sleep(2); print(time.process_time() - a)"
        assert float(run_code(client, busy)[1]) < 1


def test_a_watch_that_a_disk_keeps_waiting_holds_up_neither_a_cell_nor_the_end(tmp_path, folder):
    """The thread has this lock while it reads the list, which may be on a disk that does not answer."""
    with allowlisted(tmp_path) as (_, client, _):
        lock = "lock = get_ipython().kernel.parent._gate._monitor._lock; lock.acquire()"
        assert run_code(client, lock)[0] == "ok"
        assert "iopub" in run_code(client, "%curve", timeout=20)[1]
        [pid] = re.findall(r"\d+", run_code(client, "import os; print(os.getpid())")[1])
        client.shutdown()
        process = psutil.Process(int(pid))
        wait_for("the kernel's end", lambda: process.status() == psutil.STATUS_ZOMBIE, 20)


def test_an_authenticator_that_fails_lets_nobody_in(tmp_path, folder):
    owner = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    with allowlisted(tmp_path) as (info, client, _):
        crash = (
            "for one in get_ipython().kernel.parent._gate._monitor._handlers.values():\n"
            "    async def crash(message): raise {error}\n"
            "    one.handle_zap_message = crash"
        )
        for error in ("ValueError", "SystemExit"):
            assert run_code(client, crash.format(error=error))[0] == "ok"
            for channel in ("shell", "iopub", "hb"):
                assert handshake(info, channel, owner, timeout=3) != "in"
            assert run_code(client, "print('standing')") == ("ok", "standing\n")


def test_a_handshake_while_the_kernel_computes(tmp_path, folder):
    """It does not wait for a cell in Python, but for one that holds the interpreter lock."""
    owner = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    begun, enough = tmp_path / "begun", tmp_path / "enough"
    with allowlisted(tmp_path) as (info, client, _):
        begin = f"import ctypes, os\nopen({str(begun)!r}, 'w').close()\n"
        client.execute(f"{begin}while not os.path.exists({str(enough)!r}): pass")
        wait_for("the cell to compute", begun.exists)
        assert handshake(info, "shell", owner, timeout=60) == "in"
        enough.touch()
        begun.unlink()
        client.execute(f"{begin}ctypes.PyDLL(None).sleep(3)")
        wait_for("the cell to hold the lock", begun.exists)
        assert handshake(info, "shell", owner, timeout=60) == "in"


def test_a_flood_of_refusals_leaves_a_bounded_log_with_a_count(tmp_path, folder):
    with allowlisted(tmp_path) as (info, client, log):
        start = time.monotonic()
        for _ in range(60):
            assert handshake(info, "shell") == "refused"
        minutes = 1 + (time.monotonic() - start) // 60
        # A client knows that it is refused before the kernel has counted it.
        code = (
            "import time\n"
            "audit = get_ipython().kernel.parent._gate._monitor._audit\n"
            "while audit.counts('shell').get('unknown key', 0) < 60: time.sleep(0.01)"
        )
        assert run_code(client, code)[0] == "ok"
        assert run_code(client, "audit.flush()")[0] == "ok"

        def logged() -> tuple[int, int]:
            text = log.read_text()
            counts = re.findall(r"(\d+) x unknown key", text)
            return text.count("rejected a client"), sum(map(int, counts))

        # The heartbeat of the manager's client, which is stock's, is among them.
        wait_for("the count", lambda: sum(logged()) >= 60)
        assert logged()[0] <= 30 * minutes


def test_plaintext_and_wrong_server_keys_are_logged(tmp_path, folder):
    with allowlisted(tmp_path) as (info, client, log):
        wrong = {**info, "curve_publickey": KeyPair.generate().public_key.decode()}
        with zmq.Context() as context:
            for channel in CHANNELS:
                assert handshake(wrong, channel) == "hung up"
                plain = context.socket(KINDS[channel])
                plain.linger = 0
                plain.reconnect_ivl = -1
                plain.connect(f"tcp://127.0.0.1:{info[f'{channel}_port']}")
                wait_for(
                    f"the log about {channel}",
                    lambda channel=channel: re.search(
                        f"{channel}: (rejected )?a client from .*, (plaintext perhaps|or no CURVE)",
                        log.read_text().partition(f"{channel}: rejected")[2],
                    ),
                )
                plain.close()
        text = log.read_text()
        for channel in CHANNELS:
            assert re.search(f"{channel}: rejected a client from .*: wrong server key", text)
        assert run_code(client, "print('fine')") == ("ok", "fine\n")


def test_forked_children_and_exit_are_undisturbed(tmp_path, folder):
    with allowlisted(tmp_path) as (info, client, _):
        code = (
            "import os, sys, time\n"
            "pid = os.fork()\n"
            "if not pid:\n"
            "    print('child', flush=True)\n"
            "    get_ipython().kernel.parent.close()\n"
            "    os._exit(0)\n"
            "start = time.time()\n"
            "while (gone := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.time() < start + 40:\n"
            "    time.sleep(0.05)\n"
            "print('parent', gone == (pid, 0))"
        )
        status, text = run_code(client, code)
        assert status == "ok"
        assert "child" in text
        assert "parent True" in text
        assert handshake(info, "shell") == "refused"


def curve(client: Any) -> tuple[dict[str, list[str]], list[list[str]], dict[tuple[str, str], int]]:
    """What %curve says as text: ports by channel, rows of clients, counts of refusals."""
    status, text = run_code(client, "%curve")
    assert status == "ok"
    title, *tables = text.split("\n\n")
    assert title.startswith("Every channel is encrypted (CURVE)\nServer key: ")
    rows = [[re.split(r"  +", line) for line in table.splitlines()[1:]] for table in tables]
    ports = {re.sub(r" \(.*", "", row[0]): row[1:] for row in rows[0]}
    refused = {(why, channel): int(count) for why, channel, count in (rows[2] if rows[2:] else [])}
    return ports, rows[1], refused


def test_curve_magic(tmp_path, folder):
    owner, viewer = KeyPair.generate(), KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    write_certificate(folder / "viewers" / "vera.key", viewer.public_key)
    with allowlisted(tmp_path) as (info, client, _):
        manager = ["manager", "manager", "shell, stdin, control, iopub", "127.0.0.1"]
        debugger = ["its debugger", "kernel", "shell", "127.0.0.1"]
        ports, clients, refused = curve(client)
        assert set(ports) == {*CHANNELS, "pipe"}
        assert {port[1] for port in ports.values()} == {"CURVE"}
        for channel in CHANNELS:
            assert ports[channel][0] == f"tcp://127.0.0.1:{info[f'{channel}_port']}"
        assert sorted(row[:4] for row in clients) == [debugger, manager]
        # The manager's client is stock's, whose heartbeat has a key pair that nobody knows.
        assert set(refused) <= {("unknown key", "hb")}

        own = OwnKeysClient(client_keys=owner)
        own.load_connection_info(info)
        own.start_channels()
        context = zmq.Context()
        watching = curve_socket(context, zmq.SUB, info["curve_publickey"].encode())
        watching.curve_publickey, watching.curve_secretkey = viewer.public_key, viewer.secret_key
        watching.subscribe(b"")
        watching.connect(f"tcp://127.0.0.1:{info['iopub_port']}")

        def names() -> list[list[str]]:
            return sorted(row[:4] for row in curve(client)[1])

        olga = ["olga", "owner", "shell, iopub, stdin, control", "127.0.0.1"]
        olga[2] = next(row[2] for row in names() if row[0] == "olga")
        assert set(olga[2].split(", ")) == {"shell", "stdin", "control", "iopub"}
        vera = ["vera", "viewer", "iopub", "127.0.0.1"]
        wait_for("everybody", lambda: names() == [debugger, manager, olga, vera])
        ports = curve(client)[0]
        assert [ports[name][2] for name in ("shell", "stdin", "control", "iopub", "hb", "pipe")] == [
            "3",
            "2",
            "2",
            "3",
            "1",
            "0",
        ]

        for _ in range(3):
            assert handshake(info, "iopub", KeyPair.generate()) == "refused"
        for _ in range(2):
            assert handshake(info, "stdin", viewer) == "refused"
        wrong = {**info, "curve_publickey": KeyPair.generate().public_key.decode()}
        for channel in ("control", "hb"):
            assert handshake(wrong, channel) == "hung up"
        with zmq.Context() as other:
            plain = other.socket(zmq.DEALER)
            plain.linger = 0
            plain.reconnect_ivl = -1
            plain.connect(f"tcp://127.0.0.1:{info['shell_port']}")

            def sorted_out() -> dict[tuple[str, str], int]:
                counts = curve(client)[2]
                seen = [count for (_, channel), count in counts.items() if channel == "shell"]
                return counts if seen == [1] else {}

            counts = wait_for("the plain client", sorted_out)
            plain.close()
        [why] = [why for why, channel in counts if channel == "shell"]
        # The connection may be gone before anybody can ask it.
        possible = ("no CURVE, plaintext perhaps", "left during the handshake")
        assert why in (*possible, "wrong server key, or no CURVE")
        counts.pop(("unknown key", "hb"))
        [wrong_on_hb] = [reason for reason, channel in counts if channel == "hb"]
        assert wrong_on_hb.startswith("wrong server key")
        expected = {
            ("unknown key", "iopub"): 3,
            ("not for viewers", "stdin"): 2,
            ("wrong server key", "control"): 1,
            (wrong_on_hb, "hb"): 1,
            (why, "shell"): 1,
        }
        assert counts == expected
        own.stop_channels()
        watching.close()
        context.term()
        wait_for("both to be gone", lambda: names() == [debugger, manager])
        ports, _, counts = curve(client)
        counts.pop(("unknown key", "hb"))
        assert counts == expected
        assert [ports[name][2:] for name in ("shell", "stdin", "control", "iopub")] == [
            ["2", "1"],
            ["1", "2"],
            ["1", "1"],
            ["1", "3"],
        ]


def test_curve_magic_when_all_come_at_once(tmp_path, folder):
    """Names stay with their connections where many handshakes from one address overlap."""
    pairs = {f"client{number}": KeyPair.generate() for number in range(12)}
    for name, pair in pairs.items():
        write_certificate(folder / "owners" / f"{name}.key", pair.public_key)
    with allowlisted(tmp_path) as (info, client, _), zmq.Context() as context:
        found: dict[str, zmq.Socket[bytes]] = {}
        for name, pair in pairs.items():
            one = found[name] = curve_socket(context, zmq.DEALER, info["curve_publickey"].encode())
            one.curve_publickey, one.curve_secretkey = pair.public_key, pair.secret_key
            one.connect(f"tcp://127.0.0.1:{info['control_port']}")

        def listed() -> set[str]:
            return {row[0] for row in curve(client)[1]} & set(pairs)

        # Who has said nothing may be any of them, and is not named.
        for one in found.values():
            one.send_multipart(client.session.serialize(client.session.msg("kernel_info_request")))
        wait_for("all of them", lambda: listed() == set(pairs))
        for name in list(pairs):
            found.pop(name).close()
            wait_for(f"{name} to be gone", lambda: listed() == set(found))


def test_a_refusal_on_ipc_is_counted_once():
    """There TCP's counts tell nothing of it."""
    with tempfile.TemporaryDirectory() as short, zmq.Context() as context:
        file = f"{short}/kernel.json"
        with started("python3-curve", transport="ipc", connection_file=file) as (km, client):
            for channel in ("shell", "iopub"):
                stranger = curve_socket(context, KINDS[channel], km.curve_publickey)
                stranger.reconnect_ivl = -1
                stranger.connect(km._make_url(channel))
                wait_for(
                    "the refusal", lambda channel=channel: ("unknown key", channel) in curve(client)[2]
                )
                stranger.close()
            time.sleep(0.5)
            assert curve(client)[2] == {("unknown key", "shell"): 1, ("unknown key", "iopub"): 1}


def test_curve_magic_with_anybody_and_as_html(tmp_path):
    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    file.chmod(0o600)
    with headless(file=file) as (_, info), client_of(info, keys) as client:
        stranger = KeyPair.generate()
        own = OwnKeysClient(client_keys=stranger)
        own.load_connection_info({**info, "curve_secretkey": None})
        own.start_channels()
        request = client.execute("%curve")
        while (message := client.get_iopub_msg(timeout=60))["msg_type"] != "execute_result":
            pass
        own.stop_channels()
        assert client.get_shell_msg(timeout=60)["parent_header"]["msg_id"] == request
        data = message["content"]["data"]
        assert stranger.public_key.decode() in data["text/plain"]
        assert "any client that knows the server key" in data["text/plain"]
        page = data["text/html"]
        assert page.count("<table>") == 2
        assert html.escape(stranger.public_key.decode()) in page
        assert keys.secret_key.decode() not in str(data)
        # Code that a user types has no way around it to a secret.
        code = (
            "import curve_kernel.app as a, gc\n"
            "app = a.CurveKernelApp.instance()\n"
            "print(app._keys, app.curve_secretkey, app.bound_ports())"
        )
        assert keys.secret_key.decode() not in run_code(client, code)[1]


def test_a_relative_folder_does_not_follow_the_working_directory(tmp_path):
    owner, stranger = KeyPair.generate(), KeyPair.generate()
    for place, pair in (("here", owner), ("clone", stranger)):
        folder = tmp_path / place / "list" / "owners"
        folder.mkdir(parents=True, mode=0o700)
        write_certificate(folder / "olga.key", pair.public_key)
    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    arguments = (ALLOWLIST, "--CurveKernelApp.authorized_clients=list")
    with (
        headless(*arguments, file=file, cwd=tmp_path / "here") as (_, info),
        client_of(info, keys) as client,
    ):
        assert handshake(info, "shell", owner) == "in"
        run_code(client, f"import os; os.chdir({str(tmp_path / 'clone')!r})")
        assert handshake(info, "shell", owner) == "in"
        assert handshake(info, "shell", stranger) == "refused"

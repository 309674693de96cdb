"""Revoked, demoted or ended means disconnected, now; and nobody else loses a line."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from members import ALLOWLIST, SECONDS, Kernel, Member, listed_kernel
from support import headless, run_code, wait_for
from test_authorization import THROW, handshake

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import load_identity, write_certificate

PRINTS = "import time\nfor i in range({0}):\n    print('line', i); time.sleep(0.1)"


@pytest.fixture(scope="module", params=["tcp", "ipc"])
def kernel(request: Any, tmp_path_factory: Any) -> Iterator[Kernel]:
    with listed_kernel(tmp_path_factory.mktemp("kernel"), request.param) as kernel:
        yield kernel


def is_out_in_time(member: Member, action: Callable[[], object], *channels: str) -> None:
    started = time.monotonic()
    action()
    wait_for("the kernel to disconnect", lambda: member.is_out(*channels), 20)
    late = {name: at - started for name, at in member.lost.items() if at - started > SECONDS}
    assert not late, late


def test_every_way_of_being_taken_off_the_list(kernel):
    other = KeyPair.generate()
    ways = {
        "removed": lambda path: path.unlink(),
        "renamed": lambda path: path.rename(path.with_suffix(".off")),
        "another key": lambda path: write_certificate(path, other.public_key),
        "in place": lambda path: path.write_text(
            f'curve\n    public-key = "{other.public_key.decode()}"\n'
        ),
        "broken": lambda path: path.write_text("nothing"),
        "the file is open": lambda path: path.chmod(0o666),
        "the role's folder is open": lambda path: path.parent.chmod(0o777),
        "the list is open": lambda path: path.parent.parent.chmod(0o777),
        "the role's folder is gone": lambda path: shutil.rmtree(path.parent),
        "ended": lambda path: write_certificate(
            path,
            kernel.keys["vera"].public_key,
            until=datetime.now(timezone.utc) - timedelta(seconds=9),
        ),
    }
    for role in ("viewer", "owner"):
        for name, way in ways.items():
            kernel.list("vera", role)
            path = kernel.path("vera", role)
            with kernel.member(
                "vera", *(("shell", "iopub") if role == "owner" else ("iopub",))
            ) as member:
                is_out_in_time(member, functools.partial(way, path))
                assert fates_of(kernel) == "refused", name
            for folder in (kernel.folder, kernel.folder / "owners", kernel.folder / "viewers"):
                folder.mkdir(exist_ok=True)
                folder.chmod(0o700)
            path.unlink(missing_ok=True)
            path.with_suffix(".off").unlink(missing_ok=True)
    assert run_code(kernel.client, "1") == ("ok", "1")


def lines_of(member: Member, until: str, timeout: float = 60) -> str:
    """What a member reads on iopub, until a text has come."""
    text = ""
    for message in member.messages("iopub", timeout):
        if message["msg_type"] == "stream":
            text += message["content"]["text"]
            if until in text:
                return text
    raise TimeoutError(text)


def test_an_owner_who_becomes_a_viewer_keeps_watching(kernel):
    kernel.list("olga")
    with kernel.member("olga") as olga, kernel.member("olga", "shell", "iopub") as second:
        assert olga.reply(olga.execute("x = 1"))["content"]["status"] == "ok"
        cell = kernel.client.execute(PRINTS.format(15))
        lines = lines_of(olga, "line 2")

        def demote() -> None:
            kernel.list("olga", "viewer")
            kernel.path("olga").unlink()

        is_out_in_time(olga, demote, "shell", "stdin", "control")
        wait_for("the second one's shell", lambda: second.is_out("shell"))
        lines += lines_of(olga, "line 14")
        assert re.findall(r"line (\d+)", lines) == list(map(str, range(15)))
        assert not olga.is_out("iopub")
        assert kernel.client.get_shell_msg(timeout=60)["parent_header"]["msg_id"] == cell
        log = kernel.log.read_text()
        assert re.search(r"shell: disconnected owner 'olga' from .*: not for viewers", log)
        # And back: one that stays connected is an owner again.
        kernel.list("olga")
        kernel.path("olga", "viewer").unlink()
        with kernel.member("olga", "shell") as shell:
            assert shell.reply(shell.execute("x"))["content"]["status"] == "ok"
        assert not olga.is_out("iopub")
    kernel.path("olga").unlink()


def replace_by_rename(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("new"))
    (folder.with_name("new") / "viewers" / "vera.key").unlink()
    folder.rename(folder.with_name("old"))
    folder.with_name("new").rename(folder)


def replace_by_copying(folder: Path) -> None:
    shutil.move(folder, folder.with_name("old"))
    time.sleep(0.1)
    shutil.copytree(folder.with_name("old"), folder, ignore=shutil.ignore_patterns("vera.key"))


def replace_by_link(folder: Path) -> None:
    new = folder.with_name("new")
    shutil.copytree(folder, new, ignore=shutil.ignore_patterns("vera.key"))
    folder.rename(folder.with_name("old"))
    folder.symlink_to(new)


def replace_the_folder_above(folder: Path) -> None:
    above = folder.parent
    shutil.copytree(above, above.with_name("aside"), ignore=shutil.ignore_patterns("vera.key", "s-*"))
    above.rename(above.with_name("before"))
    above.with_name("aside").rename(above)


def has_inotify(process: int) -> bool:
    for path in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(path.readlink()) == "anon_inode:inotify":
                return True
    return False


@pytest.mark.parametrize(
    ("replace", "inotify"),
    [
        (replace_by_rename, True),
        (replace_by_copying, True),
        (replace_by_link, True),
        (replace_the_folder_above, True),
        (replace_by_rename, False),
        (replace_the_folder_above, False),
    ],
)
def test_a_list_that_is_replaced_as_a_whole(tmp_path, replace, inotify):
    """By another process, and also where there is no inotify, as with a network file system."""
    folder = tmp_path / "above" / "list"
    for name in ("owners", "viewers"):
        (folder / name).mkdir(parents=True, mode=0o700)
    prefix = []
    if not inotify:
        none = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"'
        prefix = ["unshare", "--user", "--map-root-user", "sh", "-c", none, "sh"]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
            pytest.skip("there are no user namespaces")
    arguments = (ALLOWLIST, f"--CurveKernelApp.authorized_clients={folder}")
    with headless(*arguments, prefix=prefix) as (process, info):
        kernel = Kernel(info, None, tmp_path, folder)
        assert has_inotify(process.pid) is inotify
        kernel.list("vera", "viewer")
        kernel.list("olga", "owner")
        with kernel.member("vera", "iopub") as vera, kernel.member("olga") as olga:
            olga.execute(PRINTS.format(10))
            program = "import sys, pathlib; sys.path[:0] = sys.argv[2:]; import test_revocation as t\n"
            program += f"t.{replace.__name__}(pathlib.Path(sys.argv[1]))"
            other = subprocess.Popen([sys.executable, "-c", program, str(folder), *sys.path])
            assert other.wait(60) == 0
            gone = time.monotonic()
            wait_for("the kernel to disconnect", lambda: vera.is_out(), 20)
            assert vera.lost["iopub"] - gone < SECONDS
            # In the new folder a change is seen as well.
            if replace is not replace_by_copying:
                assert not olga.lost
                lines = lines_of(olga, "line 9")
                assert re.findall(r"line (\d+)", lines) == list(map(str, range(10)))
        with kernel.member("olga", "shell") as again:
            is_out_in_time(again, kernel.path("olga").unlink)


def test_an_access_ends_by_itself(kernel):
    kernel.list("vera", "viewer", until=datetime.now(timezone.utc) + timedelta(hours=1))
    kernel.list("olga")
    with kernel.member("vera", "iopub") as vera, kernel.member("olga") as olga:
        moment = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(seconds=2)
        kernel.list("vera", "viewer", until=moment)
        end = moment.timestamp()
        wait_for("the end", lambda: vera.is_out(), 20)
        ended = time.time() - (time.monotonic() - vera.lost["iopub"])
        assert -0.2 < ended - end < SECONDS
        assert not olga.is_out("iopub")
        assert not olga.lost
    wait_for(
        "the log",
        lambda: re.search(r"iopub: disconnected .*: access has ended", kernel.log.read_text()),
    )
    kernel.path("vera", "viewer").unlink()


def test_what_a_revoked_owner_has_sent_already_is_not_run(kernel):
    kernel.list("olga")
    kernel.list("vera")
    with kernel.member("vera") as vera, kernel.member("olga") as olga:
        assert vera.reply(vera.execute("ran = []"))["content"]["status"] == "ok"
        busy = olga.execute("import time\ntime.sleep(1)")
        wait_for("the cell", lambda: "sleep" in str(list(vera.messages("iopub"))))
        for number in range(50):
            vera.execute(f"ran.append({number})")
            vera.request("shell", "comm_info_request")
        kernel.path("vera").unlink()
        wait_for("the kernel to disconnect", vera.is_out, 20)
        kernel.list("nobody")  # one more change, while the requests wait
        assert olga.reply(busy)["content"]["status"] == "ok"
        reply = olga.reply(olga.execute("", user_expressions={"ran": "ran"}))
        assert reply["content"]["user_expressions"]["ran"]["data"]["text/plain"] == "[]"
        seen = list(olga.messages("iopub", 1))
        # Nor is she called what she called herself.
        names = {message["parent_header"].get("username") for message in seen}
        assert "olga" in names
        assert "a liar" not in names
        statuses = [
            message["content"]["execution_state"] for message in seen if message["msg_type"] == "status"
        ]
        assert statuses.count("busy") == statuses.count("idle")
    kernel.path("nobody").unlink()
    kernel.path("olga").unlink()
    assert re.search(r"shell: dropped what .* had sent: not listed any more", kernel.log.read_text())


def test_a_new_key_of_ones_own():
    """`keygen --force` disconnects who has the old one."""
    folder = Path(os.environ["JUPYTER_CONFIG_DIR"]) / "curve"
    run = [sys.executable, "-m", "curve_kernel", "keygen"]
    subprocess.run(run, check=True, capture_output=True, timeout=60)
    with headless(ALLOWLIST) as (_, info):
        old = load_identity(folder)
        with Member(info, old) as member:
            done = subprocess.Popen([*run, "--force"], stdout=subprocess.PIPE)
            wait_for("the kernel to disconnect", member.is_out, 60)
            assert done.wait(60) == 0
        with Member(info, load_identity(folder)):
            pass


def fates_of(kernel: Kernel) -> str:
    if kernel.info["transport"] == "ipc":
        return "refused"
    return handshake(kernel.info, "iopub", kernel.keys["vera"])


FILES = """
import os, resource, time
before = resource.getrlimit(resource.RLIMIT_NOFILE)
kept = []
with open({0!r}, 'w') as told:
    most = max(map(int, os.listdir('/proc/self/fd'))) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        while True: kept.append(os.open('/dev/null', os.O_RDONLY))
    except OSError as error: print(error.strerror, file=told, flush=True)
    while not os.path.exists({1!r}): time.sleep(0.1)
    for one in kept: os.close(one)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
"""


def test_an_access_ends_though_a_cell_has_every_file_that_the_kernel_may_open(kernel, tmp_path):
    if kernel.info["transport"] == "ipc":
        pytest.skip("libzmq aborts if it accepts on ipc then (ipc_listener.cpp)")
    kernel.list("vera", "viewer", until=datetime.now(timezone.utc) + timedelta(seconds=4))
    kernel.list("olga")
    told, go_on = tmp_path / "told", tmp_path / "go on"
    with kernel.member("vera", "iopub") as vera, kernel.member("olga", "iopub") as olga:
        kernel.client.execute(FILES.format(str(told), str(go_on)))
        wait_for("the cell", lambda: told.exists() and told.read_text() == "Too many open files\n")
        assert not vera.is_out()
        wait_for("the end", vera.is_out, 4 + SECONDS)
        kernel.path("olga").unlink()
        go_on.touch()
        wait_for("the one that is not listed any more", olga.is_out, 2 * SECONDS)
    assert run_code(kernel.client, "len(kept) > 0")[0] == "ok"
    kernel.path("vera", "viewer").unlink()


@pytest.mark.parametrize("what", ["certificate", "folder"])
def test_what_links_in_the_list_lead_to_counts_as_soon(kernel, tmp_path, what):
    elsewhere = tmp_path / "team"
    elsewhere.mkdir(mode=0o700)
    kernel.list("vera", "viewer")
    path = kernel.path("vera", "viewer")
    if what == "certificate":
        path.rename(elsewhere / "vera.key")
        path.symlink_to(elsewhere / "vera.key")
    else:
        path.parent.rename(elsewhere / "viewers")
        path.parent.symlink_to(elsewhere / "viewers")
        elsewhere = elsewhere / "viewers"
    with kernel.member("vera", "iopub") as vera:
        is_out_in_time(vera, (elsewhere / "vera.key").unlink)
    if what == "certificate":
        path.unlink()
    else:
        path.parent.unlink()
        path.parent.mkdir(mode=0o700)


def test_a_watch_that_was_killed_still_disconnects_who_is_off_the_list(tmp_path):
    with listed_kernel(tmp_path, "tcp") as kernel:
        kernel.list("olga")
        kernel.list("vera", "viewer", until=datetime.now(timezone.utc) + timedelta(seconds=8))
        with kernel.member("vera", "iopub") as vera, kernel.member("olga", "iopub") as olga:
            assert run_code(kernel.client, THROW.format(error="ValueError"))[0] == "ok"
            wait_for("the log", lambda: "no new client can connect" in kernel.log.read_text())
            assert not olga.is_out()
            is_out_in_time(olga, kernel.path("olga").unlink)
            wait_for("the end", vera.is_out, 8 + SECONDS)


PATCHES = {
    "one argument": "real = os.stat; os.stat = lambda path: real(path)",
    "functions of os": """
def deny(*_, **__):
    raise RuntimeError('not in this process')
for name in ('lstat', 'listdir', 'readlink', 'scandir', 'stat'):
    setattr(os, name, deny)
""",
    "functions of os.path": """
def deny(*_, **__):
    raise RuntimeError('not in this process')
for name in ('abspath', 'dirname', 'exists', 'expanduser', 'lexists', 'realpath'):
    setattr(os.path, name, deny)
""",
}


def only_on_tcp(kernel):
    if kernel.info["transport"] == "ipc":
        pytest.skip("it is the same on ipc")


@pytest.mark.parametrize("patch", PATCHES)
def test_code_that_patches_os(kernel, patch):
    only_on_tcp(kernel)
    keep = "import os; kept = {m: dict(vars(m)) for m in (os, os.path)}\n"
    kernel.list("vera", "viewer")
    with kernel.member("vera", "iopub") as member:
        assert run_code(kernel.client, keep + PATCHES[patch]) == ("ok", "")
        try:
            is_out_in_time(member, kernel.path("vera", "viewer").unlink)
            assert fates_of(kernel) == "refused"
        finally:
            run_code(kernel.client, "for m, names in kept.items(): vars(m).update(names)")


def test_a_list_that_can_not_be_read_lists_nobody(kernel):
    """Whatever it is that makes reading it fail."""
    only_on_tcp(kernel)
    code = """
from curve_kernel.access.allowlist import AuthorizedClients
read = AuthorizedClients.listed
def fails(_):
    raise RuntimeError('not in this process')
AuthorizedClients.listed = fails
"""
    kernel.list("vera", "viewer")
    other = kernel.path("nobody", "viewer")
    with kernel.member("vera", "iopub") as member:
        assert run_code(kernel.client, code) == ("ok", "")
        try:
            is_out_in_time(member, lambda: other.write_text(""))
        finally:
            run_code(kernel.client, "AuthorizedClients.listed = read")
            other.unlink()
    kernel.path("vera", "viewer").unlink()


def test_interrupts_of_what_shows_connections(kernel):
    """A time limit by SIGALRM, again and again, leaves no lock behind."""
    only_on_tcp(kernel)
    code = """
import gc, random, signal, time
gc.disable()  # ipykernel has a callback of its own there
class Late(Exception): pass
def late(*_): raise Late
before = signal.signal(signal.SIGALRM, late)
app, hits, end = get_ipython().kernel.parent, 0, time.monotonic() + 2
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-5, 6e-4))
        app.bound_ports()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Late:
        hits += 1
signal.setitimer(signal.ITIMER_REAL, 0)
signal.signal(signal.SIGALRM, before)
gc.enable()
print(hits > 20)
"""
    kernel.list("vera", "viewer")
    with kernel.member("vera", "iopub") as member:
        status, text = run_code(kernel.client, code)
        assert (status, text.endswith("True\n")) == ("ok", True), text
        is_out_in_time(member, kernel.path("vera", "viewer").unlink)


def test_what_leaves_stdin_waits_in_no_queue(kernel):
    only_on_tcp(kernel)
    probe = "import asyncio, time; loop = asyncio.get_event_loop(); time.sleep(2); len(loop._ready)"
    with ThreadPoolExecutor(1) as pool:
        cell = pool.submit(run_code, kernel.client, probe)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            address = kernel.info["ip"], kernel.info["stdin_port"]
            with socket.create_connection(address) as stranger:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stranger.send(b"x")
        status, text = cell.result(60)
    assert status == "ok"
    assert int(text) < 20


def test_a_log_that_nobody_reads(tmp_path):
    """Who is off the list is out, and new clients are let in, while standard error is full."""
    folder, keys = tmp_path / "list", {name: KeyPair.generate() for name in ("olga", "vera")}
    for role, name in (("owners", "olga"), ("viewers", "vera")):
        (folder / role).mkdir(parents=True, mode=0o700)
        write_certificate(folder / role / f"{name}.key", keys[name].public_key)
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
    option = f"--CurveKernelApp.authorized_clients={folder}"
    try:
        with (
            headless(ALLOWLIST, option, file=tmp_path / "k.json", stderr=into) as (process, info),
            Member(info, keys["vera"], ("iopub",)) as vera,
        ):
            os.set_blocking(into, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(into, b"x")
            os.set_blocking(into, True)
            for _ in range(5):
                assert handshake(info, "shell") == "refused"
            is_out_in_time(vera, (folder / "viewers" / "vera.key").unlink)
            with Member(info, keys["olga"], ("iopub", "control")) as olga:
                assert process.poll() is None
                olga.request("control", "shutdown_request", restart=False)
                wait_for("the kernel's end", lambda: process.poll() is not None, 20)
    finally:
        os.close(out)
        os.close(into)

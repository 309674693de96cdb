"""Homes, folders and file systems that are not as usual, beside stock where stock works."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    MODULE,
    check_error,
    client_of,
    connection_info,
    headless,
    run_code,
    started,
    wait_for,
)

from curve_kernel.client import BlockingKernelClient, KeyNotAuthorizedError
from curve_kernel.keys import KeyPair
from curve_kernel.keys.source import SECRETKEY_VARIABLE as VARIABLE

# A user that the system does not know. It may read what this one may, and is not root.
STRANGER = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
CAN_BE_STRANGER = not subprocess.run([*STRANGER, "true"], stderr=subprocess.DEVNULL).returncode
needs_stranger = pytest.mark.skipif(not CAN_BE_STRANGER, reason="no user namespaces here")
LIBRARY = Path(__file__).parents[1] / "helpers" / "modes.c"


def command(*arguments: str, prefix: tuple[str, ...] = (), **env: str | None) -> tuple[int, str, str]:
    environment = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    done = subprocess.run(
        [*prefix, *MODULE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def kernel(
    tmp_path: Path, *arguments: str, keys: KeyPair, **popen: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A kernel that has the secret key from its environment; gives its log and connection info."""
    file, log = tmp_path / "kernel.json", tmp_path / "log"
    file.write_text(json.dumps(connection_info(curve_publickey=keys.public_key.decode())))
    file.chmod(0o600)
    popen["env"] = {VARIABLE: keys.secret_key.decode(), **popen.pop("env", {})}
    with log.open("w") as stderr, headless(*arguments, file=file, stderr=stderr, **popen) as (_, info):
        with client_of(info, keys) as client:
            assert run_code(client, "print(6 * 7)") == ("ok", "42\n")
            status, text = run_code(client, "%curve")
        assert status == "ok"
        yield log.read_text() + text, info


@needs_stranger
@pytest.mark.parametrize("home", ["none", "/dev/null", "another user's"])
def test_a_home_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """Nobody is listed then; stock does not ask for a home either."""
    keys = KeyPair.generate()
    for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.delenv(name)
    if home == "another user's":
        folder = tmp_path / "theirs"
        folder.mkdir(mode=0o700)
        if os.geteuid() != 0:
            pytest.skip("no file of another user can be made")
        (folder / ".jupyter" / "curve" / "owners").mkdir(parents=True)
        os.chown(folder, 12345, 12345)
        monkeypatch.setenv("HOME", str(folder))
        says = f"nobody is listed: {folder}/.jupyter/curve is in a folder of another user's"
    elif home == "none":
        says = "Nobody is listed: user 54321 has no home folder"
    else:
        monkeypatch.setenv("HOME", home)
        says = "clients listed in ~/.jupyter/curve"
    with kernel(tmp_path, "--allowlist", keys=keys, prefix=STRANGER) as (said, info):
        assert says in said
        assert "Traceback" not in said
        monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
        assert command("keygen")[0] == 0
        other = BlockingKernelClient()
        other.load_connection_info(info)
        with pytest.raises(KeyNotAuthorizedError):
            other.start_channels()


@needs_stranger
def test_commands_without_a_home_say_so() -> None:
    none = dict.fromkeys(("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"))
    for words in ("keygen", "revoke x", "status", "--allowlist"):
        status, out, err = command(*words.split(), prefix=STRANGER, **none)
        assert (status, out) == (1, "")
        check_error(err, "user 54321 has no home folder", "set HOME, or JUPYTER_CONFIG_DIR")
    status, out, err = command("doctor", prefix=STRANGER, **none)
    assert status == 1
    assert "this check broke" not in out
    assert "key files: user 54321 has no home folder" in out
    assert err == ""


def test_no_configuration_folder(tmp_path: Path) -> None:
    """With JUPYTER_NO_CONFIG each process has one of its own, for as long as it runs."""
    for words in (["keygen"], ["clients"], ["authorize", "-", "--name", "vera"], ["revoke", "vera"]):
        status, out, err = command(*words, JUPYTER_NO_CONFIG="1")
        if words[0] != "authorize":
            check_error(err, "JUPYTER_NO_CONFIG is set", "unset JUPYTER_NO_CONFIG")
        assert (status, out) == (1, "")
    keys = KeyPair.generate()
    env = {"JUPYTER_NO_CONFIG": "1"}
    with kernel(tmp_path, "--allowlist", keys=keys, env=env) as (said, _):
        assert "Nobody is listed: JUPYTER_NO_CONFIG is set" in said


def test_another_configuration_folder(tmp_path: Path) -> None:
    """Who is rejected by a kernel of their own is not told to send themselves a certificate."""
    status, out, _ = command("keygen")
    assert status == 0
    assert os.environ["JUPYTER_CONFIG_DIR"] in out
    file = tmp_path / "kernel.json"
    env = {"JUPYTER_CONFIG_DIR": str(tmp_path / "other")}
    script = tmp_path / "curve-kernel"
    script.write_text("from curve_kernel.__main__ import main\nmain()\n")
    by_script = ("sh", "-c", f'shift 3; exec {sys.executable} "$0" "$@"', str(script))
    with headless("--allowlist", file=file, env=env, prefix=by_script):
        status, _, err = command("console", "--existing", str(file), "--simple-prompt")
        assert status == 1
        assert "it is your own kernel" in err
        assert "JUPYTER_CONFIG_DIR" in err
        assert "send your certificate" not in err


def test_a_working_directory_that_was_removed(tmp_path: Path) -> None:
    """What needs no folder goes on; a kernel says what is missing."""
    (tmp_path / "gone").mkdir()
    gone = ("sh", "-c", f'cd {tmp_path}/gone; rmdir ../gone; mkdir ../gone; exec "$0" "$@"')
    for words in ("--version", "keygen", "clients", "status", "install --user"):
        status, out, err = command(*words.split(), prefix=gone)
        assert (status, err) == (0, ""), words
        assert out
    status, out, err = command("watch", "kernel", prefix=gone)
    assert (status, out) == (1, "")
    check_error(err, "there is no connection file kernel", "status")
    status, out, err = command("-f", str(tmp_path / "kernel.json"), prefix=gone)
    assert (status, out) == (1, "")
    assert "Traceback" not in err
    assert "directory doesn't exist" in err


@needs_stranger
def test_a_joined_kernel_whose_folder_can_t_be_entered(tmp_path: Path) -> None:
    """Whether it has ended is not known."""
    file = tmp_path / "theirs" / "kernel.json"
    spec = Path(os.environ["JUPYTER_DATA_DIR"], "kernels", "joined", "kernel.json")
    config = {"connection_file": str(file), "server_key": ""}
    provisioner = {"provisioner_name": "curve-attach-provisioner", "config": config}
    spec.parent.mkdir(parents=True)
    content = {"argv": [], "display_name": "Joined", "language": "python"}
    spec.write_text(json.dumps({**content, "metadata": {"kernel_provisioner": provisioner}}))
    file.parent.mkdir(mode=0)
    try:
        listed = command("attach", "--list", prefix=STRANGER)
        assert listed == (0, f"joined  can't be told: its file can't be read  {file}\n", "")
        start = "import jupyter_client as j; j.KernelManager(kernel_name='joined').start_kernel()"
        started = [*STRANGER, sys.executable, "-c", start]
        done = subprocess.run(started, capture_output=True, text=True, timeout=30, check=False)
        assert "may not be read: Permission denied" in done.stderr
    finally:
        file.parent.chmod(0o700)


def test_a_home_whose_name_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is said, also where the output takes no such byte."""
    home = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    Path(home).mkdir(mode=0o700)
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, home)
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    status, out, err = command("keygen")
    assert (status, err) == (0, "")
    assert "caf\\udce9/curve/identity.key" in out
    with headless("--allowlist") as (process, _):
        process.terminate()
        out, err = process.communicate(timeout=20)
    assert "Traceback" not in err
    assert "caf?" in out


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Jupyter's folders, where files get mode 0755 and modes can't be changed, as on CIFS."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    library, share = tmp_path / "modes.so", tmp_path / "share"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, LIBRARY, "-ldl"], check=True, timeout=60)
    for name in ("CONFIG", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(share / name.lower()))
        (share / name.lower()).mkdir(parents=True)
    monkeypatch.setenv("MODES_FOLDER", str(share))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    return share


def test_a_file_system_without_chmod(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a mode can't be changed does not matter where it is what it should be."""
    monkeypatch.setenv("MODES_MASK", "077")
    assert command("keygen")[0] == 0
    with headless("--allowlist") as (process, _):
        assert (share / "runtime" / f"kernel-{process.pid}.json").exists()


def test_a_file_system_with_modes_of_its_own(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that others could read is not written, unless that is accepted as for all of Jupyter."""
    for words in (["keygen"], []):
        status, _, err = command(*words)
        assert status == 1
        says = "others could read it: its file system gives it mode 0755"
        check_error(err, says, "JUPYTER_ALLOW_INSECURE_WRITES=1")
    assert not [file for file in share.rglob("*") if not file.is_dir()]

    monkeypatch.setenv("JUPYTER_ALLOW_INSECURE_WRITES", "1")
    status, out, err = command("keygen")
    assert status == 0
    assert "Your key pair is made" in out
    assert "has mode 0755: others can read it" in err
    assert "Traceback" not in err
    with started("python3-curve") as (_, client):
        assert run_code(client, "print(6 * 7)") == ("ok", "42\n")
    with headless("--allowlist") as (process, _):
        code = f"""
from curve_kernel.client import BlockingKernelClient
client = BlockingKernelClient(connection_file={str(share / "runtime")!r} + "/kernel-{process.pid}.json")
client.load_connection_file()
client.start_channels()
client.wait_for_ready(timeout=60)
print(client.client_keys.public_key.decode())
client.stop_channels()
"""
        out = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)
        assert out.strip() in (share / "config" / "curve" / "identity.key").read_text()


# What is under the folder that follows can be read only.
READ_ONLY = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
READ_ONLY += ('mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"',)
CAN_REMOUNT = not subprocess.run(
    [*READ_ONLY, str(Path(__file__).parent), "true"], stderr=subprocess.DEVNULL
).returncode


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which all of Jupyter's folders are, as where nothing is set."""
    home = tmp_path / "another-home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(home))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.delenv(name)
    return home


def works_with_stock(tmp_path: Path, prefix: tuple[str, ...]) -> None:
    """Stock starts there, if it is given a connection file elsewhere."""
    file = tmp_path / "stock.json"
    stock = [*prefix, sys.executable, "-m", "ipykernel_launcher", "-f", str(file)]
    process = subprocess.Popen(stock, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("stock's connection file", lambda: file.exists() or process.poll() is not None)
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(not CAN_REMOUNT, reason="no mounts here")
def test_a_home_that_is_read_only(tmp_path: Path, home: Path) -> None:
    """The list and one's own key are read; what would be written is an error with a hint."""
    prefix = (*READ_ONLY, str(home))
    works_with_stock(tmp_path, prefix)
    for words in (["keygen"], []):
        status, out, err = command(*words, prefix=prefix)
        assert (status, out) == (1, "")
        error = err[err.index("curve_kernel: error") :]  # IPython warns before
        variable = "JUPYTER_CONFIG_DIR" if words else "name a connection file in a folder"
        check_error(error, "Read-only file system", variable)
    assert list(home.iterdir()) == []
    with kernel(tmp_path, "--allowlist", keys=KeyPair.generate(), prefix=prefix) as (said, info):
        assert "Traceback" not in said
        other = BlockingKernelClient()
        assert command("keygen")[0] == 0  # where it can be written: the kernel sees it
        other.load_connection_info(info)
        other.start_channels()
        assert run_code(other, "print(6 * 7)") == ("ok", "42\n")
        other.stop_channels()
    [owner] = (home / ".jupyter" / "curve" / "owners").iterdir()
    revoke = f"revoke {owner.stem}"
    runtime = home / ".local/share/jupyter/runtime"
    runtime.mkdir(parents=True, mode=0o700)
    for words in ("keygen --force", "authorize - --name vera", revoke, "install --user"):
        status, out, err = command(*words.split(), prefix=prefix)
        assert status == 1
        assert "Traceback" not in err
        assert "curve_kernel: hint: " in err
    runtime.rmdir()
    status, out, _ = command("clients", prefix=prefix)
    assert (status, out.count("(you)")) == (0, 1)
    status, out, _ = command("doctor", prefix=prefix)
    assert "this check broke" not in out
    assert "Read-only file system" in out
    # A kernel by hand, with a runtime folder that can be written.
    elsewhere = {"JUPYTER_RUNTIME_DIR": str(tmp_path)}
    words = [*prefix, *MODULE, "--allowlist"]
    by_hand = subprocess.Popen(
        words, env={**os.environ, **elsewhere}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert by_hand.stdout is not None
        said = [by_hand.stdout.readline() for _ in range(3)]
        assert f"clients listed in {home}/.jupyter/curve" in said[2], said
    finally:
        by_hand.terminate()
        by_hand.communicate(timeout=30)


ROOT = ("unshare", "--user", "--map-root-user")


@needs_stranger
@pytest.mark.skipif(os.geteuid() != 0, reason="no file of another user can be made")
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_home_that_is_not_roots(tmp_path: Path, home: Path, mode: int) -> None:
    """As NFS with root_squash shows it to root, who is like any other user there."""
    home.chmod(mode)
    os.chown(home, 12345, 12345)
    works_with_stock(tmp_path, ROOT)
    for words in (["keygen"], []):
        status, out, err = command(*words, prefix=ROOT)
        assert (status, out) == (1, "")
        error = err[err.index("curve_kernel: error") :]
        variable = "JUPYTER_CONFIG_DIR" if words else "name a connection file in a folder"
        check_error(error, "Permission denied", variable)
    status, out, err = command("doctor", prefix=ROOT)
    assert status == 1
    assert "this check broke" not in out
    with kernel(tmp_path, "--allowlist", keys=KeyPair.generate(), prefix=ROOT) as (said, _):
        assert "Traceback" not in said


@pytest.fixture
def squashed(home: Path) -> Iterator[Path]:
    """That home, where all that anybody makes belongs to nobody, as NFS with all_squash has it."""
    if os.geteuid() != 0 or not shutil.which("bindfs"):
        pytest.skip("no bindfs")
    disk = home.with_name("disk")
    disk.mkdir(mode=0o700)
    words = ["--force-user=nobody", "--force-group=nogroup", "--create-as-mounter"]
    words += ["--chown-ignore", "--chmod-ignore", str(disk), str(home)]
    if subprocess.run(["bindfs", *words], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no FUSE here")
    try:
        yield home
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True, timeout=30)


def test_a_home_where_all_is_nobodys(
    tmp_path: Path, squashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reaches that share could have written what is there: nothing in it is trusted."""
    works_with_stock(tmp_path, ())
    (file := squashed / "x").touch()
    assert file.stat().st_uid == 65534
    for words in (["keygen"], []):
        status, out, err = command(*words)
        assert (status, out) == (1, "")
        check_error(err, "belongs to another user: nobody", "use a folder of your own")
    status, out, _ = command("doctor")
    assert status == 1
    assert "this check broke" not in out
    for name in ("CONFIG", "RUNTIME"):
        (tmp_path / name).mkdir(mode=0o700)
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(tmp_path / name))
    assert command("keygen")[0] == 0
    with started("python3-curve") as (_, client):
        assert run_code(client, "print(6 * 7)") == ("ok", "42\n")


CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child")
CAN_CONTAIN = not subprocess.run([*CONTAINER, "true"], stderr=subprocess.DEVNULL).returncode


@pytest.mark.skipif(not CAN_CONTAIN, reason="no namespaces here")
def test_two_containers_with_one_runtime_folder(tmp_path: Path) -> None:
    """Both are process 1, start at once, and have the same host name; each has a file of its own."""
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    containers = [
        subprocess.Popen([*CONTAINER, *MODULE], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        for _ in range(3)
    ]
    try:

        def infos() -> list[dict[str, Any]]:
            found = []
            for file in runtime.glob("kernel-*.json"):
                with contextlib.suppress(OSError, ValueError):
                    found.append(json.loads(file.read_text()))
            return found if len(found) == 3 else []

        found = wait_for("three files", infos)
        assert len({info["shell_port"] for info in found}) == 3
        assert (runtime / "kernel-1.json").exists()
        assert {stat.S_IMODE(file.stat().st_mode) for file in runtime.iterdir()} == {0o600}
        # Process 1 ends on SIGTERM, as others do, and takes its own file with it only.
        pids = {container.pid: child_of(container.pid) for container in containers}
        os.kill(pids[containers[0].pid], 15)
        containers[0].wait(30)
        wait_for("its file to be gone", lambda: len(list(runtime.iterdir())) == 2)
    finally:
        for container in containers:
            container.kill()
            container.wait(30)


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_file_of_an_earlier_process_with_this_number(tmp_path: Path) -> None:
    """It is replaced, as before, if its kernel was of this container; else it is left alone."""
    code = (
        "import os, sys\n"
        "os.rename(sys.argv[1], f'{sys.argv[2]}/kernel-{os.getpid()}.json')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'curve_kernel'])"
    )
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    with headless() as (_, info):
        assert info["pid_namespace"]
    for namespace, replaced in ((info["pid_namespace"], True), ("another", False)):
        old = tmp_path / "old.json"
        old.write_text(json.dumps({**info, "pid_namespace": namespace}))
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(old), str(runtime)], stdout=subprocess.DEVNULL
        )
        try:
            name = f"kernel-{process.pid}.json" if replaced else f"kernel-{process.pid}-2.json"

            def is_new(name: str = name) -> bool:
                with contextlib.suppress(OSError, ValueError):
                    new = json.loads((runtime / name).read_text())
                    return bool(new["curve_publickey"] != info["curve_publickey"])
                return False

            wait_for("the new file", is_new)
        finally:
            process.terminate()
            process.wait(30)
        assert [file.name for file in runtime.iterdir()] == (
            [] if replaced else [f"kernel-{process.pid}.json"]
        )

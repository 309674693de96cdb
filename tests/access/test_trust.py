"""What another user may write decides nothing: connection files, secret files, the list of clients."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import (
    MODULE,
    both_keys,
    check_error,
    client_of,
    connection_info,
    headless,
    refused,
    run_code,
)

from curve_kernel import connection_file
from curve_kernel.access.allowlist import AuthorizedClients
from curve_kernel.client import BlockingKernelClient
from curve_kernel.errors import CurveKernelError
from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import load_identity, write_certificate

OTHER = 54321
PAIR = KeyPair.generate()
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def given(path: Path) -> Path:
    """Let the file or folder belong to another user."""
    os.chown(path, OTHER, OTHER)
    return path


def write(file: Path, **fields: object) -> Path:
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(json.dumps(connection_info(**both_keys(PAIR), **fields)))
    file.chmod(0o600)
    return file


def as_another_user(folder: Path, code: str) -> None:
    """What is planted in *folder* is planted by another user in fact."""

    def become() -> None:
        os.setgroups([])
        os.setgid(OTHER)
        os.setuid(OTHER)

    subprocess.run(["sh", "-ec", code], cwd=folder, preexec_fn=become, check=True)


def run(*arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [*MODULE, *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert PAIR.secret_key.decode() not in done.stdout + done.stderr
    return done.returncode, done.stderr


OPEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file that others may write": (lambda file: file.chmod(0o602), "connection file {file} can be"),
    "a file that a group may write": (lambda file: file.chmod(0o660), "its mode is 0660"),
    "an open folder": (lambda file: file.parent.chmod(0o777), "its mode is 0777"),
    "a folder that a group may write": (lambda file: file.parent.chmod(0o770), "its mode is 0770"),
    "another user's file": (given, f"belongs to another user: uid {OTHER}"),
    "another user's folder": (lambda file: given(file.parent), f"another user: uid {OTHER}"),
}


@needs_root
@pytest.mark.parametrize("how", OPEN)
def test_connection_files_that_others_may_write(tmp_path, how):
    change, says = OPEN[how]
    file = write(tmp_path / "folder" / "kernel.json")
    change(file)
    says = says.format(file=file)
    with pytest.raises(CurveKernelError) as caught:
        BlockingKernelClient(connection_file=str(file)).load_connection_file()
    assert says in caught.value.message
    assert caught.value.hint
    with pytest.raises(CurveKernelError):
        connection_file.update(file, {"ip": "::"})


@needs_root
@pytest.mark.parametrize("how", ["another user's file", "an open folder"])
def test_no_kernel_starts_with_them(tmp_path, how):
    change, says = OPEN[how]
    file = write(tmp_path / "folder" / "kernel.json")
    change(file)
    for options in ((), ("--allowlist",)):
        status, _, err = refused("-f", str(file), *options)
        assert status == 1
        check_error(err, says.format(file=file), "copy of it" if "file" in how else "chmod go-w")


@needs_root
def test_what_another_user_plants_in_the_current_folder(tmp_path):
    """The file of a kernel of theirs, with keys that they know, under a name that is asked for."""
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o1777)
    tmp_path.chmod(0o755)
    text = json.dumps(connection_info(**both_keys(PAIR), shell_port=1, iopub_port=2, hb_port=3))
    as_another_user(open_folder, f"umask 022; echo '{text}' > kernel-mine.json")
    planted = open_folder / "kernel-mine.json"
    assert planted.stat().st_uid == OTHER
    for command in ("watch", "console"):
        for name in ("kernel-mine.json", str(planted)):
            status, err = run(command, "--existing", name, cwd=open_folder)
            assert status == 1
            check_error(err, f"belongs to another user: uid {OTHER}", "a copy of it")
        status, err = run(command, "--existing", "mine", cwd=open_folder)
        assert status == 1
        check_error(err, "there is no connection file mine", "status")
    status, _, err = refused("-f", "kernel-mine.json", cwd=open_folder)
    assert status == 1
    check_error(err, f"belongs to another user: uid {OTHER}", "a copy of it")


@needs_root
def test_files_that_are_safe(tmp_path):
    """A folder with the sticky bit, a file given by root, a link between folders of this user."""
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    file = write(sticky / "kernel.json")
    link = tmp_path / "link.json"
    link.symlink_to(file)
    for path in (file, link):
        assert connection_file.read(path)["curve_publickey"] == PAIR.public_key.decode()
    with headless(file=file) as (_, info), client_of(info, PAIR) as client:
        assert run_code(client, "1 + 1") == ("ok", "2")
    # A link that another user may turn to another file.
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "kernel.json").symlink_to(write(tmp_path / "kernel.json"))
    with pytest.raises(CurveKernelError, match="can be written by others"):
        connection_file.read(tmp_path / "open" / "kernel.json")


def test_a_file_system_without_modes(tmp_path):
    file = write(tmp_path / "kernel.json")
    file.chmod(0o666)
    env = {"JUPYTER_ALLOW_INSECURE_WRITES": "true"}
    with headless(file=file, env=env) as (_, info), client_of(info, PAIR) as client:
        assert run_code(client, "1 + 1") == ("ok", "2")


def test_no_kernel_makes_its_file_where_others_may_write_it(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    status, _, err = refused("-f", str(tmp_path / "open" / "kernel.json"))
    assert status == 1
    check_error(err, "can be written by others", "chmod go-w")


@needs_root
@pytest.mark.parametrize("how", ["another user's file", "an open folder", "another user's folder"])
def test_secret_files_and_identities(tmp_path, folder, how):
    change, says = OPEN[how]
    secret = tmp_path / "secrets" / "key"
    secret.parent.mkdir(mode=0o700)
    secret.write_bytes(PAIR.secret_key)
    secret.chmod(0o600)
    change(secret)
    status, _, err = refused(env={"JUPYTER_CURVE_SECRETKEY_FILE": str(secret)})
    assert status == 1
    assert says in err
    assert PAIR.secret_key.decode() not in err
    write_certificate(folder / "identity.key_secret", *PAIR.__dict__.values())
    assert load_identity() == PAIR
    change(folder / "identity.key_secret")
    with pytest.raises(CurveKernelError, match=says):
        load_identity()


def listed(folder: Path) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    names = [client.name for client in AuthorizedClients(folder, warnings.append)]
    return names, warnings


PARENTS: dict[str, tuple[int, bool]] = {
    "open": (0o777, False),
    "open to a group": (0o770, False),
    "sticky": (0o1777, True),
    "closed": (0o755, True),
}


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("level", ["JUPYTER_CONFIG_DIR", "HOME"])
def test_the_folders_above_the_list(folder, parent, level):
    """Whoever may write one of them can swap in an old copy of the list, in which the revoked stand."""
    mode, counts = PARENTS[parent]
    write_certificate(folder / "owners" / "olga.key", PAIR.public_key)
    clients = AuthorizedClients(folder, str)
    found = clients.find(PAIR.public_key)
    assert found is not None
    assert found.role == "owner"
    above = Path(os.environ[level])
    above.chmod(mode)
    names, warnings = listed(folder)
    assert (names == ["olga"]) == counts
    # The owner that was found before is not found any more either.
    assert (clients.find(PAIR.public_key) is not None) == counts
    if not counts:
        assert f"{above} can be written by others: its mode is {mode:04o}" in warnings[0]
        assert "chmod go-w" in warnings[0]
        with pytest.raises(CurveKernelError, match="can be written by others"):
            AuthorizedClients(folder, str).check()
        status, _, err = refused("--allowlist")
        assert status == 1
        check_error(err, str(above), "chmod go-w")


@needs_root
def test_a_folder_above_the_list_is_another_users(folder):
    write_certificate(folder / "owners" / "olga.key", PAIR.public_key)
    given(Path(os.environ["JUPYTER_CONFIG_DIR"]))
    names, [warning] = listed(folder)
    assert names == []
    assert f"belongs to another user: uid {OTHER}" in warning


def test_certificates_that_are_links(tmp_path, folder):
    """A link to a certificate counts as long as the way to it is safe, and is looked at each time."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    write_certificate(elsewhere / "olga.key", PAIR.public_key)
    (folder / "owners" / "olga.key").symlink_to(elsewhere / "olga.key")
    clients = AuthorizedClients(folder, str)
    assert clients.find(PAIR.public_key) is not None
    for mode, counts in ((0o777, False), (0o700, True), (0o1777, True), (0o770, False)):
        elsewhere.chmod(mode)
        assert (clients.find(PAIR.public_key) is not None) == counts
        assert (listed(folder)[0] == ["olga"]) == counts
    elsewhere.chmod(0o700)
    # A loop, a link to nothing, a folder that is a link.
    (folder / "owners" / "a.key").symlink_to("b.key")
    (folder / "owners" / "b.key").symlink_to("a.key")
    (folder / "owners" / "c.key").symlink_to("nowhere")
    assert listed(folder)[0] == ["olga"]
    shutil.rmtree(folder / "owners")
    (folder / "owners").symlink_to(elsewhere)
    assert listed(folder)[0] == ["olga"]
    elsewhere.chmod(0o777)
    assert listed(folder)[0] == []


def test_two_public_keys_in_one_certificate(folder):
    """pyzmq takes the last one, a reader the first."""
    file = folder / "owners" / "olga.key"
    first, last = KeyPair.generate(), KeyPair.generate()
    write_certificate(file, first.public_key)
    with file.open("a") as more:
        more.write(f'    public-key = "{last.public_key.decode()}"\n')
    names, [warning] = listed(folder)
    assert names == []
    assert "two lines with public-key" in warning
    status, err = run("authorize", str(file), "--name", "vera")
    assert status == 1
    check_error(err, "two lines with public-key", "only one of them")


@pytest.mark.parametrize("name", ["Manager", "MANAGER", "Kernel", "kernel"])
def test_names_of_the_kernels_own_clients(folder, name):
    file = folder / "certificate.key"
    write_certificate(file, PAIR.public_key)
    status, err = run("authorize", str(file), "--name", name)
    assert status == 1
    check_error(err, "can't be the name of a client", "manager")
    file.rename(folder / "owners" / f"{name}.key")
    assert listed(folder)[0] == []


def test_revoke_takes_the_key_off_the_list(folder):
    """By hand a key can be listed under two names, and who is revoked is to be out."""
    for path in ("owners/olga.key", "viewers/vera.key", "owners/anna.key"):
        write_certificate(folder / path, PAIR.public_key)
    other = KeyPair.generate()
    write_certificate(folder / "viewers" / "zoe.key", other.public_key)
    done = subprocess.run([*MODULE, "revoke", "vera"], capture_output=True, text=True, check=True)
    assert "It was listed as owner olga too, and is not any more." in done.stdout
    assert "owner anna too" in done.stdout
    assert "vera can't connect any more" in done.stdout
    assert listed(folder)[0] == ["zoe"]


@pytest.mark.parametrize("command", ["keygen", "authorize"])
def test_no_success_where_nothing_counts(tmp_path, folder, command):
    write_certificate(tmp_path / "vera.key", PAIR.public_key)
    Path(os.environ["JUPYTER_CONFIG_DIR"]).chmod(0o775)
    arguments = {"keygen": [], "authorize": [str(tmp_path / "vera.key"), "--name", "vera"]}[command]
    status, err = run(command, *arguments)
    assert status == 1
    check_error(err, "can be written by others: its mode is 0775", "chmod go-w")
    assert [path for path in folder.rglob("*") if path.is_file()] == []


NO_HOME = """
import os, sys
from curve_kernel import trust
os.setgroups([]), os.setgid(54321), os.setuid(54321)
os.environ.pop("HOME")
os.environ.update(sys.argv[1:] and {"HOME": sys.argv[1]})
print(trust.path_problem("folder", "curve"))
"""


@needs_root
@pytest.mark.parametrize("home", [[], ["."], ["~"]], ids=["none", "relative", "tilde"])
def test_without_a_home_each_folder_on_the_way_counts(home):
    """Those above the working directory were passed over, as if that was the home."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        (cwd := Path(folder, "work")).mkdir(mode=0o700)
        given(cwd)
        (curve := cwd / "curve").mkdir(mode=0o700)
        given(curve)
        command = [sys.executable, "-c", NO_HOME, *home]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=True)
    assert f"folder {folder} can be written by others: its mode is 0777" in done.stdout

"""Each row of the README's table of bad input, with the real process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client import KernelManager
from support import (
    CHANNELS,
    both_keys,
    check_error,
    connection_info,
    refused,
    run_code,
    started,
    wait_for,
)

from curve_kernel.keys import KeyPair

PAIR, OTHER = KeyPair.generate(), KeyPair.generate()
SECRET, PUBLIC = PAIR.secret_key.decode(), PAIR.public_key.decode()
VARIABLE, FILE_VARIABLE = "JUPYTER_CURVE_SECRETKEY", "JUPYTER_CURVE_SECRETKEY_FILE"


def check(status: int, lines: list[str], text: str, *says: str, hint: str | None) -> None:
    assert status == 1
    assert len(lines) == (1 if hint is None else 2), text
    assert lines[0].startswith("curve_kernel: error: ")
    for words in says:
        assert words in lines[0]
    if hint is not None:
        assert lines[1].startswith("curve_kernel: hint: ")
        assert hint in lines[1]
    for pair in (PAIR, OTHER):
        assert pair.secret_key.decode() not in text
        assert pair.secret_key.decode()[:39] not in text


def write(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "kernel.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_file_without_keys(tmp_path):
    file = write(tmp_path, connection_info())
    result = refused("-f", str(file))
    check(*result, str(file), "launcher does not provide", hint="curve_kernel install")
    launchers = ("VS Code", "Positron", "jpterm", "Enterprise Gateway", "jupyter_client < 7")
    wrappers = ("env -i", "sudo", "docker run", "singularity --cleanenv", '"key_distribution": "file"')
    for words in (*launchers, "jupyter_client >= 8.9", "transport_encryption", *wrappers):
        assert words in result[1][1]


def test_public_key_only(tmp_path):
    file = write(tmp_path, connection_info(curve_publickey=PUBLIC))
    result = refused("-f", str(file))
    check(*result, str(file), "only the public key", hint=f"set ${VARIABLE}")
    for words in (
        "env -i",
        "sudo",
        "docker run",
        "singularity --cleanenv",
        '"key_distribution": "file"',
    ):
        assert words in result[1][1]


def test_a_wrapper_that_drops_the_environment(tmp_path):
    """The kernel must not take its launcher's file for that of a dead kernel; the hint's cure works."""
    folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / "wrapped"
    folder.mkdir(parents=True)
    argv = ["env", "-i", f"HOME={tmp_path}", sys.executable, "-m", "curve_kernel"]
    provisioner = {"provisioner_name": "curve-provisioner", "config": {}}
    spec = {
        "argv": [*argv, "--allowlist", "-f", "{connection_file}"],
        "display_name": "wrapped",
        "language": "python",
        "metadata": {"kernel_provisioner": provisioner},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    err = tmp_path / "err"
    manager = KernelManager(kernel_name="wrapped")
    with err.open("w") as stderr:
        manager.start_kernel(stderr=stderr)
    try:
        wait_for("the kernel's end", lambda: not manager.is_alive())
        check_error(err.read_text(), "connection file", '"key_distribution": "file"')
        assert "env -i" in err.read_text()
    finally:
        manager.shutdown_kernel(now=True)
    provisioner["config"] = {"key_distribution": "file"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    with started("wrapped") as (_, client):
        assert run_code(client, "1 + 1") == ("ok", "2")


def test_secret_key_only(tmp_path):
    file = write(tmp_path, connection_info(curve_secretkey=SECRET))
    check(*refused("-f", str(file)), str(file), "without curve_publickey", hint="public key")


BAD_KEYS = {
    "null": None,
    "number": 12345,
    "short": SECRET[:39],
    "long": SECRET + "a",
    "non-Z85": SECRET[:39] + "~",
    "non-ASCII": SECRET[:39] + "é",
    "empty": "",
}


@pytest.mark.parametrize("field", ["curve_publickey", "curve_secretkey"])
@pytest.mark.parametrize("name", BAD_KEYS)
def test_malformed_key_in_the_file(tmp_path, field, name):
    file = write(tmp_path, connection_info(**{**both_keys(PAIR), field: BAD_KEYS[name]}))
    check(*refused("-f", str(file)), field, str(file), hint="40 characters of Z85")


@pytest.mark.parametrize("name", ["short", "long", "non-Z85", "non-ASCII", "empty"])
def test_malformed_key_in_the_variable(tmp_path, name):
    file = write(tmp_path, connection_info(curve_publickey=PUBLIC))
    env = {VARIABLE: BAD_KEYS[name]}
    check(*refused("-f", str(file), env=env), VARIABLE, hint="40 characters of Z85")
    check(*refused(env=env), VARIABLE, hint="40 characters of Z85")


def test_no_pair(tmp_path):
    keys = both_keys(PAIR) | {"curve_publickey": OTHER.public_key.decode()}
    file = write(tmp_path, connection_info(**keys))
    check(*refused("-f", str(file)), str(file), "not a pair", hint="new connection file")


@pytest.mark.parametrize("field", ["curve_publickey", "curve_secretkey"])
def test_variable_contradicts_the_file(tmp_path, field):
    fields = {field: both_keys(OTHER)[field]}
    file = write(tmp_path, connection_info(**fields))
    check(
        *refused("-f", str(file), env={VARIABLE: SECRET}),
        f"${VARIABLE}",
        field,
        str(file),
        hint="remove one",
    )


def test_the_two_variables_contradict(tmp_path):
    file = tmp_path / "secret"
    file.write_text(OTHER.secret_key.decode())
    file.chmod(0o600)
    env = {VARIABLE: SECRET, FILE_VARIABLE: str(file)}
    check(*refused(env=env), f"${VARIABLE} and ${FILE_VARIABLE}", hint="only one")


def test_secret_file_missing(tmp_path):
    path = str(tmp_path / "no such file")
    check(*refused(env={FILE_VARIABLE: path}), path, "No such file", hint="0600")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o644])
def test_secret_file_open_to_others(tmp_path, mode):
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(mode)
    check(*refused(env={FILE_VARIABLE: str(file)}), str(file), f"{mode:04o}", hint="chmod 600")


def without_override() -> dict[str, object]:
    """Take from root what lets it read everything."""
    if os.geteuid() != 0:
        return {}
    if shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv")
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    return {"prefix": drop}


def refused_without_override(*arguments: str, env: dict[str, str]) -> tuple[int, list[str], str]:
    command = [*without_override().get("prefix", []), sys.executable, "-m", "curve_kernel", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr.splitlines(), done.stderr


def test_secret_file_unreadable(tmp_path):
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0)
    env = {FILE_VARIABLE: str(file)}
    check(*refused_without_override(env=env), str(file), "Permission denied", hint="0600")


def test_secret_file_is_a_folder_or_a_fifo(tmp_path):
    check(*refused(env={FILE_VARIABLE: str(tmp_path)}), str(tmp_path), "folder", hint="0600")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    check(*refused(env={FILE_VARIABLE: str(fifo)}), str(fifo), "not a regular file", hint="0600")


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"key": ', "\x00", "[" * 5000, '{"curve_secretkey": "' + SECRET + '"'],
    ids=["empty", "brace", "no value", "zero", "deep", "a key"],
)
def test_connection_file_is_not_json(tmp_path, content):
    file = write(tmp_path, content)
    check(*refused("-f", str(file)), str(file), "not JSON", hint="connection file")


def test_connection_file_is_not_text(tmp_path):
    file = tmp_path / "kernel.json"
    file.write_bytes(b"\xff\xfe\x80" + SECRET.encode())
    check(*refused("-f", str(file)), str(file), "not JSON", hint="connection file")


@pytest.mark.parametrize("content", [[], "text", 5, None])
def test_connection_file_is_no_object(tmp_path, content):
    file = write(tmp_path, json.dumps(content))
    check(*refused("-f", str(file)), str(file), "not an object", hint="connection file")


def test_connection_file_is_a_folder_or_a_fifo(tmp_path):
    check(*refused("-f", str(tmp_path)), str(tmp_path), "folder", hint="connection file")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    check(*refused("-f", str(fifo)), str(fifo), "regular file", hint="connection file")


def test_connection_file_unreadable(tmp_path):
    file = write(tmp_path, connection_info(**both_keys(PAIR)))
    file.chmod(0)
    result = refused_without_override("-f", str(file), env={})
    check(*result, str(file), "Permission denied", hint="connection file")


@pytest.mark.parametrize(
    "fields",
    [
        {"shell_port": "text"},
        {"shell_port": None},
        {"key": 5},
        {"ip": 5},
        {"transport": "udp"},
        {"signature_scheme": "none"},
        {"signature_scheme": "hmac-nonsense"},
    ],
)
def test_connection_file_with_nonsense_in_other_fields(tmp_path, fields):
    file = write(tmp_path, connection_info(**both_keys(PAIR)) | fields)
    check(*refused("-f", str(file)), str(file), "not valid", hint="new connection file")


def test_connection_file_in_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "folder" / "kernel.json"
    check(*refused("-f", str(path)), str(path.parent), hint="folder that you can write")


@pytest.mark.parametrize("channel", CHANNELS)
def test_port_in_use(tmp_path, channel):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        file = write(tmp_path, connection_info(**both_keys(PAIR), **{f"{channel}_port": port}))
        result = refused("-f", str(file))
        check(*result, f"channel {channel} ", f"tcp://127.0.0.1:{port}", hint="free port")


def test_port_out_of_range(tmp_path):
    file = write(tmp_path, connection_info(**both_keys(PAIR), stdin_port=70000))
    check(*refused("-f", str(file)), "channel stdin", ":70000", hint="free port")


def test_two_channels_on_one_port(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    file = write(tmp_path, connection_info(**both_keys(PAIR), shell_port=port, iopub_port=port))
    check(*refused("-f", str(file)), "channel iopub", f":{port}", hint="free port")


def test_address_not_local(tmp_path):
    file = write(tmp_path, connection_info(**both_keys(PAIR)) | {"ip": "192.0.2.1"})
    check(*refused("-f", str(file)), "channel shell", "tcp://192.0.2.1", hint="address of this machine")


def test_libzmq_without_curve(tmp_path):
    # No such libzmq can be had from a registry; this one says of itself that it is one.
    (tmp_path / "sitecustomize.py").write_text(
        "import zmq\nhas = zmq.has\nzmq.has = lambda feature: feature != 'curve' and has(feature)\n"
    )
    file = write(tmp_path, connection_info(**both_keys(PAIR)))
    env = {"PYTHONPATH": str(tmp_path)}
    check(*refused("-f", str(file), env=env), "without CURVE", hint="install a pyzmq")
    check(*refused(env=env), "without CURVE", hint="install a pyzmq")


def test_jupyter_client_too_old_for_the_provisioner(tmp_path):
    old = tmp_path / "old"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(old)]
    subprocess.run([*pip, "jupyter_client==8.8.0"], check=True, timeout=120)
    code = (
        "import jupyter_client; assert jupyter_client.__version__ == '8.8.0'\n"
        "km = jupyter_client.KernelManager(kernel_name='python3-curve')\n"
        "try: km.start_kernel()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "else: print('started')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(old)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.startswith("CurveKernelError jupyter_client 8.8.0 in the server's environment")
    assert "8.9 is needed" in done.stdout
    assert "python -m pip install" in done.stdout


def test_a_name_that_is_too_long(tmp_path):
    check(*refused("-f", "x" * 300 + ".json"), "too long", hint="name a connection file")


def test_a_folder_in_the_current_folder(tmp_path):
    (tmp_path / "kernel.json").mkdir()
    check(*refused("-f", "kernel.json", cwd=tmp_path), "it is a folder", hint="connection file")


def test_a_list_of_clients_that_cannot_be_looked_at(tmp_path):
    """As in a container that runs as another user than the one whose home it has."""
    folder = tmp_path / "closed" / "curve"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0)
    file = write(tmp_path, connection_info(**both_keys(PAIR)))
    option = f"--CurveKernelApp.authorized_clients={folder}"
    allowlist = "--CurveKernelApp.client_authorization=allowlist"
    refusal = refused_without_override("-f", str(file), option, allowlist, env={})
    check(*refusal, f"{folder} can't be read", hint=None)

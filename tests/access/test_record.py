"""The record: who did what, with names that the keys prove; and a disk that fails."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from members import Member
from support import client_of, connection_info, headless, refused, run_code, wait_for
from test_authorization import ALLOWLIST, handshake
from test_usernames import FORGED, ROUNDS, forge, names_on_iopub, true_name

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

pytest.importorskip("jupyter_events")


def record_option(path: object) -> str:
    return f"--CurveKernelApp.audit_log={path}"


def events(path: Path, **wanted: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [event for event in found if wanted.items() <= event.items()]


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
@pytest.mark.timeout(240 + ROUNDS // 20)
def test_the_record_has_each_ones_true_name(tmp_path, folder, transport):
    """A pair of owners and the manager, each with forged names; so has iopub."""
    keys = {name: KeyPair.generate() for name in ("olga", "vera", "manager")}
    for name in ("olga", "vera"):
        write_certificate(folder / "owners" / f"{name}.key", keys[name].public_key)
    file, path = tmp_path / "kernel-7.json", tmp_path / "record"
    info = connection_info(curve_publickey=keys["manager"].public_key.decode(), transport=transport)
    if transport == "ipc":
        info["ip"] = str(tmp_path / "s")
    file.write_text(json.dumps(info))
    env = {"JUPYTER_CURVE_SECRETKEY": keys["manager"].secret_key.decode()}
    with headless(ALLOWLIST, record_option(path), file=file, env=env) as (_, info):
        members = {name: Member(info, pair) for name, pair in keys.items()}
        rng, truth, names = random.Random(2), {}, {}
        for number in range(ROUNDS):
            name, said, code = rng.choice(list(keys)), rng.choice(FORGED), f"'ä' # {number}"
            request = forge(members[name], said, code=code, silent=True, allow_stdin=False)
            truth[request], names[request] = (name, code), {true_name(name, said)}
            if number % 100 == 0:
                members[name].reply(request)
        wait_for("all requests", lambda: len(events(path, action="request")) >= ROUNDS)
        assert names_on_iopub(members["vera"], set(names)) == names
        # Revoked: recorded too. So is who is not listed.
        (folder / "owners" / "vera.key").unlink()
        wait_for("the kernel to disconnect", members["vera"].is_out)
        if transport == "tcp":
            assert handshake(info, "shell") == "refused"
            wait_for("a rejection", lambda: events(path, action="rejected", reason="unknown key"))
        for member in members.values():
            member.close()
    for event in events(path, action="request", msg_type="execute_request"):
        name, code = truth.pop(event["msg_id"])
        assert event.get("name", event["role"]) == name
        assert event["public_key"] == keys[name].public_key.decode()
        assert event["code_sha256"] == hashlib.sha256(code.encode()).hexdigest()
        assert (event["kernel_id"], event["channel"]) == ("7", "shell")
        assert "code" not in event
    assert truth == {}
    assert events(path, action="accepted", channel="shell", role="owner", name="olga")
    assert events(path, action="accepted", channel="iopub", role="manager")
    gone = events(path, action="disconnected", channel="shell", reason="not listed any more")
    assert gone
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    for pair in keys.values():
        assert pair.secret_key.decode() not in text


def test_what_is_recorded_is_valid_and_code_only_if_asked_for(tmp_path, folder):
    from jupyter_events import EventLogger

    from curve_kernel.access.record import SCHEMA_ID

    path, vera = tmp_path / "record", KeyPair.generate()
    write_certificate(folder / "owners" / "vera.key", vera.public_key)
    options = (ALLOWLIST, record_option(path), "--CurveKernelApp.audit_code=True")
    with headless(*options) as (_, info), Member(info, vera) as member:
        member.reply(member.execute("x = 1", user_expressions={"b": "x", "a": "2"}))
        member.reply(member.request("control", "kernel_info_request"), "control")
        request = member.request(
            "shell", "execute_request", code="input()", silent=False, allow_stdin=True
        )
        assert next(member.messages("stdin", 60))["msg_type"] == "input_request"
        member.request("stdin", "input_reply", value="a password")
        member.reply(request)
        member.request("shell", "x" * 2000)
        member.reply(member.execute("1"))
        wait_for("it", lambda: len(events(path, action="request")) >= 6)
    [event] = events(path, code="x = 1")
    assert event["user_expressions"] == '{"a": "2", "b": "x"}'
    assert events(path, channel="stdin", msg_type="input_reply")
    assert events(path, channel="control", msg_type="kernel_info_request")
    assert "a password" not in path.read_text()
    assert max(map(len, path.read_text().splitlines())) < 1000
    schemas = EventLogger()
    schemas.register_event_schema(Path("curve_kernel/access/record.yaml").resolve())
    for event in events(path):
        data = {name: value for name, value in event.items() if not name.startswith("__")}
        schemas.schemas.validate_event(SCHEMA_ID, data)
        assert event["__timestamp__"].endswith("Z")
        assert "+" not in event["__timestamp__"]


def test_it_costs_nothing_when_off(tmp_path):
    with headless() as (_, info), Member(info) as member:
        loaded = "__import__('sys').modules"
        expressions = {"all": f"[n for n in {loaded} if 'jupyter_events' in n or 'jsonschema' in n]"}
        reply = member.reply(member.execute("", user_expressions=expressions))
        assert reply["content"]["user_expressions"]["all"]["data"]["text/plain"] == "[]"


def test_a_full_disk_and_a_closed_file_do_not_stop_the_kernel(tmp_path):
    keys, log, path = KeyPair.generate(), tmp_path / "log", tmp_path / "record"
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(curve_publickey=keys.public_key.decode())))
    env = {"JUPYTER_CURVE_SECRETKEY": keys.secret_key.decode()}
    with (
        log.open("w") as stderr,
        headless(record_option("/dev/full"), file=file, env=env, stderr=stderr) as (_, info),
        client_of(info, keys) as client,
    ):
        assert run_code(client, "1 + 1") == ("ok", "2")
        says = wait_for("the log", lambda: "No space left" in log.read_text() and log.read_text())
        assert "The record /dev/full can't be written, and the kernel goes on" in says
        assert says.count("No space left") == 1
        assert "Record: NOT WRITTEN" in run_code(client, "%curve")[1]
    file.write_text(json.dumps(connection_info(curve_publickey=keys.public_key.decode())))
    closes = f"""
import os
for number in os.listdir('/proc/self/fd'):
    try:
        if os.readlink('/proc/self/fd/' + number).startswith({str(path)!r}): os.close(int(number))
    except OSError: pass
other = [open({str(tmp_path / "other")!r}, 'w') for _ in range(5)]
"""
    with (
        headless(record_option(path), file=file, env=env) as (_, info),
        client_of(info, keys) as client,
    ):
        run_code(client, closes)
        # Rotated, and removed.
        for change in (lambda: path.rename(tmp_path / "record.1"), path.unlink, lambda: None):
            change()
            code = f"'{os.urandom(8).hex()}'"
            sha = hashlib.sha256(code.encode()).hexdigest()
            assert run_code(client, code)[0] == "ok"
            wait_for("the request", lambda sha=sha: path.exists() and events(path, code_sha256=sha))
        # As notebooks do that want no noise.
        run_code(client, "import logging, logging.config; logging.disable(logging.CRITICAL)")
        run_code(client, "logging.config.dictConfig({'version': 1})")
        run_code(client, "'still there'")
        sha = hashlib.sha256(b"'still there'").hexdigest()
        assert len(events(path, code_sha256=sha)) == 1
        assert f"Record: {path}" in run_code(client, "%curve")[1]
        run_code(client, "[one.close() for one in other]")
        # What ends the process has been recorded.
        client.execute("os._exit(0)")
        sha = hashlib.sha256(b"os._exit(0)").hexdigest()
        wait_for("the request", lambda: events(path, code_sha256=sha))
    assert (tmp_path / "other").read_text() == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_record_that_is_anothers_or_behind_anothers_link_is_no_start(tmp_path):
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.touch(0o600)
    os.chown(theirs, 65534, 65534)
    link.symlink_to(tmp_path / "mine")
    os.chown(link, 65534, 65534, follow_symlinks=False)
    for path, says in (
        (theirs, "belongs to another user"),
        (link, "a link that another user"),
    ):
        status, lines, text = refused(record_option(path))
        assert (status, len(lines)) == (1, 2), text
        assert says in lines[0]
    assert not (tmp_path / "mine").exists()


def test_a_record_that_can_not_be_kept_is_no_start(tmp_path):
    for path, says in ((tmp_path, "directory"), (tmp_path / "no" / "file", "No such file")):
        status, lines, text = refused(record_option(path))
        assert status == 1
        assert len(lines) == 2, text
        assert lines[0].startswith(f"curve_kernel: error: audit_log {path} can't be written")
        assert says in lines[0]
    open_to_others = tmp_path / "open"
    open_to_others.touch()
    open_to_others.chmod(0o666)
    status, lines, text = refused(record_option(open_to_others))
    assert (status, len(lines)) == (1, 2), text
    assert "others may write it, its mode is 0666" in lines[0]
    (tmp_path / "jupyter_events.py").write_text("raise ImportError('not installed')")
    status, lines, text = refused(record_option("x"), env={"PYTHONPATH": str(tmp_path)})
    assert (status, len(lines)) == (1, 2), text
    assert "needs jupyter_events" in lines[0]
    assert "curve-kernel[audit]" in lines[1]


def test_strangers_keep_no_name_out_of_it(tmp_path, folder):
    """Each client that is listed has lines of its own, and what was counted is there at the end."""
    keys = {name: KeyPair.generate() for name in ("olga", "vera")}
    write_certificate(folder / "owners" / "olga.key", keys["olga"].public_key)
    (folder / "viewers").mkdir(exist_ok=True)
    write_certificate(folder / "viewers" / "vera.key", keys["vera"].public_key)
    path = tmp_path / "record"
    with headless(ALLOWLIST, record_option(path), file=tmp_path / "k.json") as (process, info):
        for _ in range(40):
            assert handshake(info, "shell") == "refused"
        Member(info, keys["vera"], ("iopub",)).close()
        assert handshake(info, "shell", keys["vera"]) == "refused"
        wait_for("a rejection", lambda: events(path, action="rejected", name="vera"))
        assert events(path, action="accepted", channel="iopub", name="vera")
        with Member(info, keys["olga"], ("control",)) as owner:
            owner.request("control", "shutdown_request", restart=False)
            wait_for("the kernel's end", lambda: process.poll() is not None)
    counted = [event["count"] for event in events(path, action="rejected") if "count" in event]
    assert counted == ["10"]


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a file of another user's")
def test_a_pipe_of_another_users(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o666)
    os.chown(path, 65534, 65534)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status, error, _ = refused(record_option(path))
        assert status == 1
        assert "it belongs to another user" in error[0]
    finally:
        os.close(reader)

"""Twenty clients come and go; one after the other is revoked, demoted or at its end.

A round takes about a second; CURVE_KERNEL_ROUNDS=200 is the whole of it.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from members import SECONDS, Kernel, listed_kernel
from support import MODULE, wait_for

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

ROUNDS = int(os.environ.get("CURVE_KERNEL_ROUNDS", "8"))
CLIENTS = 20
CELL = """
import pathlib, time
number = 0
while not pathlib.Path({0!r}).exists():
    print('line', number)
    number += 1
    time.sleep(0.1)
"""


@pytest.fixture(params=["tcp", "ipc"])
def kernel(request: Any, tmp_path_factory: Any) -> Iterator[Kernel]:
    with listed_kernel(tmp_path_factory.mktemp("k"), request.param) as kernel:
        yield kernel


class Guest:
    """A client, and all that it has read."""

    def __init__(self, kernel: Kernel, name: str, role: str) -> None:
        self.name, self.role = name, role
        kernel.list(name, role)
        channels = ("iopub",) if role == "viewer" else ("shell", "control", "stdin", "iopub")
        self.member = kernel.member(name, *channels, username="somebody else")
        self.text = ""
        self.names: set[tuple[str, str]] = set()

    def read(self) -> None:
        for message in self.member.messages("iopub"):
            parent = message["parent_header"]
            if message["msg_type"] == "stream":
                self.text += message["content"]["text"]
            elif parent:
                self.names.add((parent["session"], parent["username"]))

    @property
    def lines(self) -> list[int]:
        # A message may end within a line, and who comes may have missed the line's begin.
        return [int(number) for number in re.findall(r"^line (\d+)\n", self.text, re.M)]

    def is_whole(self) -> bool:
        lines = self.lines
        return lines == list(range(lines[0], lines[-1] + 1)) if lines else True

    def leave(self, kernel: Kernel) -> None:
        self.read()
        assert self.is_whole(), self.lines
        self.member.close()
        for role in ("owner", "viewer"):
            kernel.path(self.name, role).unlink(missing_ok=True)


def end(kernel: Kernel, guest: Guest, way: str) -> float:
    """Take a guest off; gives the moment from which it has to be out."""
    path, keys = kernel.path(guest.name, guest.role), kernel.keys[guest.name]
    match way:
        case "revoked":
            path.unlink()
        case "demoted":
            kernel.list(guest.name, "viewer")
            path.unlink()
        case "another key":
            write_certificate(path, KeyPair.generate().public_key)
        case "at its end":
            moment = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(seconds=2)
            write_certificate(path, keys.public_key, until=moment)
            return time.monotonic() + moment.timestamp() - time.time()
    return time.monotonic()


@pytest.mark.timeout(60 + 15 * ROUNDS)
def test_rounds(kernel, tmp_path):
    rng, stop = random.Random(3), tmp_path / "stop"
    count, slowest, sessions = 0, 0.0, {}

    def new() -> Guest:
        nonlocal count
        count += 1
        guest = Guest(kernel, f"guest-{count}", rng.choice(["viewer", "owner"]))
        sessions[guest.member.session.session] = guest.name
        return guest

    witness = Guest(kernel, "witness", "owner")
    sessions[witness.member.session.session] = "witness"
    watching = None
    if kernel.info["transport"] == "tcp":
        kernel.list("watcher", "viewer")
        watching = watch(kernel, tmp_path)
    cell = witness.member.execute(CELL.format(str(stop)))
    guests = [new() for _ in range(CLIENTS)]
    try:
        for number in range(ROUNDS):
            for guest in rng.sample(guests, 3):
                guests.remove(guest)
                guest.leave(kernel)
                guests.append(new())
            for guest in guests:
                if guest.role == "owner":
                    guest.member.request("control", "kernel_info_request")
            way = ("revoked", "demoted", "another key", "at its end")[number % 4]
            victim = rng.choice([g for g in guests if g.role == "owner" or way != "demoted"])
            lost = ("shell", "control", "stdin") if way == "demoted" else ()
            since = end(kernel, victim, way)
            wait_for(f"{way}: out", lambda v=victim, ch=lost: v.member.is_out(*ch), 30)
            times = [at - since for at in victim.member.lost.values()]
            slowest = max(slowest, *times)
            assert max(times) < SECONDS, (way, times)
            for guest in (witness, *guests):
                guest.read()
                if guest is not victim:
                    guest.member.look()
                    assert not guest.member.lost, (way, guest.name)
            if way == "demoted":
                before = len(victim.lines)
                wait_for("a line", lambda v=victim, n=before: v.read() or len(v.lines) > n)
                assert not victim.member.is_out("iopub")
            guests.remove(victim)
            victim.leave(kernel)
            guests.append(new())
        stop.touch()
        assert witness.member.reply(cell)["content"]["status"] == "ok"
        wait_for("the last lines", lambda: witness.read() or len(witness.lines) > 5 * ROUNDS)
        assert witness.lines[0] == 0
        # What is taken in only when its client is off the list has no name.
        said = {(one, name) for guest in (witness, *guests) for one, name in guest.names if name}
        assert {sessions[session] for session, _ in said} == {name for _, name in said}
        assert all(sessions[session] == name for session, name in said)
    finally:
        for guest in (witness, *guests):
            guest.leave(kernel)
        print(f"{ROUNDS} rounds, {count} clients, the slowest was out after {slowest:.2f} s")
    if watching is not None:
        kernel.path("watcher", "viewer").unlink()
        out, err = watching.communicate(timeout=60)
        assert watching.returncode == 1
        assert "not authorized" in err
        numbers = [int(line.split()[1]) for line in out.splitlines() if line.startswith("line ")]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert len(numbers) >= ROUNDS


def watch(kernel: Kernel, tmp_path: Any) -> subprocess.Popen[str]:
    """`watch` as another user, who has a copy of the connection file."""
    home = tmp_path / "home-of-another"
    folder = home / "config" / "curve"
    folder.mkdir(parents=True, mode=0o700)
    keys = kernel.keys["watcher"]
    write_certificate(folder / "identity.key_secret", keys.public_key, keys.secret_key)
    file = home / "copy.json"
    file.write_text(json.dumps(kernel.info))
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "HOME": str(home)}
    command = [*MODULE, "watch", "--existing", str(file)]
    process = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert "read-only" in process.stdout.readline()
    return process

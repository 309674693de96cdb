"""``watch`` and ``console`` show whose input it was."""

from __future__ import annotations

import re

import pytest
from members import Member
from support import headless, wait_for
from terminal import Terminal, needs_tmux
from test_commands import run

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

pytest.importorskip("jupyter_console")
OTHERS = "--ZMQTerminalInteractiveShell.include_other_output=True"


def curve(member: Member) -> str:
    request = member.execute("%curve")
    for message in member.messages("iopub", 60):
        is_its = message["parent_header"].get("msg_id") == request
        if is_its and message["msg_type"] == "execute_result":
            text = message["content"]["data"]["text/plain"]
            assert max(map(len, text.splitlines())) <= 80
            return text
    raise TimeoutError


@needs_tmux
def test_watch_and_console_show_whose_input_it_was(folder):
    assert run("keygen")[0] == 0
    vera = KeyPair.generate()
    text = f'public-key = "{vera.public_key.decode()}"\n'
    write_certificate(folder / "owners" / "vera.key", vera.public_key)
    with (
        headless("--allowlist") as (process, info),
        Terminal("watch", "--existing", f"kernel-{process.pid}.json") as watching,
        Terminal("console", "--existing", f"kernel-{process.pid}.json", OTHERS) as console,
        Member(info, vera, username="olga\x1b[2J") as member,
    ):
        watching.wait("read-only")
        console.wait("In [1]")
        member.execute("6 * 7")
        watching.wait("vera In [1]: 6 * 7")
        assert "olga" not in watching.screen()
        console.wait("vera In [1]: 6 * 7\nvera Out[1]: 42")
        console.type("1 + 1", "Enter")
        wait_for("the console's own input", lambda: "olga In [2]: 1 + 1" in watching.screen())
        table = curve(member)
        assert re.search(
            r"^vera: 4 connections, last execute_request at \d\d:\d\d:\d\d$", table, re.M
        ), table
        assert re.search(r"^olga: \d+ connections, last \w+_request at \d\d:\d\d:\d\d$", table, re.M), (
            table
        )
        again = ("authorize", "-", "--name", "vera", "--role", "owner", "--for", "2h")
        assert run(*again, stdin=text)[0] == 0
        wait_for("the end", lambda: "until" in curve(member))
        table = " ".join(curve(member).split())
        assert re.search(r"vera: .* until [-\d ]*\d\d:\d\d, in (2 h|1 h 59 min)", table), table
        # Out at once, and each of the two says so.
        status, out, _ = run("revoke", "olga")
        assert status == 0
        assert out.startswith("olga can't connect any more.")
        # The console's four channels and its heartbeat, and two of watch.
        assert f"7 connections are ended: kernel-{process.pid}.json" in out
        for terminal in (watching, console):
            assert "not authorized" in terminal.wait("status 1")

"""``watch`` and ``console`` show whose input it was."""

from __future__ import annotations

import pytest
from members import Member
from support import headless, wait_for
from terminal import Terminal, needs_tmux
from test_commands import run

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

pytest.importorskip("jupyter_console")
OTHERS = "--ZMQTerminalInteractiveShell.include_other_output=True"


@needs_tmux
def test_watch_and_console_show_whose_input_it_was(folder):
    assert run("keygen")[0] == 0
    vera = KeyPair.generate()
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
        # Out at once, and each of the two says so.
        assert run("revoke", "olga")[0] == 0
        for terminal in (watching, console):
            assert "not authorized" in terminal.wait("status 1")

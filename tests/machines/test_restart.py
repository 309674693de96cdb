"""A restart is over when every channel of the manager's clients works again."""

from __future__ import annotations

import time

from support import run_code, started

QUESTION = "import sys; print(input('again? '))"


def test_code_that_is_sent_right_after_a_restart() -> None:
    """Its outputs were lost in 11 of 20 restarts: iopub was not subscribed to yet."""
    with started("python3-curve") as (km, client):
        for n in range(6):
            km.restart_kernel(now=True)
            if n % 2:
                assert run_code(client, f"print({n})", timeout=30) == ("ok", f"{n}\n")
                continue
            client.execute(QUESTION, allow_stdin=True)
            assert client.get_stdin_msg(timeout=30)["content"]["prompt"] == "again? "
            client.input("yes")
            text = ""
            while "yes\n" not in text:
                text += client.get_iopub_msg(timeout=30)["content"].get("text", "")


def test_a_client_that_does_not_come_back_is_not_waited_for_long() -> None:
    """Its socket is connected to no server: its kernel ends, and another one has the address."""
    with started("python3-curve") as (km, client):
        lost = km.connect_iopub()
        lost.disconnect(lost.last_endpoint)
        since = time.monotonic()
        km.restart_kernel(now=True)
        assert time.monotonic() - since < 30
        assert run_code(client, "print(1)", timeout=30) == ("ok", "1\n")
        lost.close()

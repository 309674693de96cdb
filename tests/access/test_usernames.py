"""Whose a request is: the key says it, and whatever comes of it carries that name."""

from __future__ import annotations

import os
import random
from typing import Any

from members import Member
from support import headless
from test_authorization import ALLOWLIST  # noqa: F401
from test_revocation import kernel  # noqa: F401

from curve_kernel.keys import KeyPair

WIDE = "".join(chr(ord(letter) + 0xFEE0) for letter in "vera")
# 10,000 with CURVE_KERNEL_ROUNDS=10000.
ROUNDS = int(os.environ.get("CURVE_KERNEL_ROUNDS", "150"))
FORGED = [
    "olga",
    "vera",
    "manager",
    "",
    "VERA",
    "v\u200bera",
    "vera\u3164",
    "ve\u2800ra",
    WIDE,
    "somebody",
    None,
    7,
    ["vera"],
]


def names_on_iopub(member: Member, requests: set[str]) -> dict[str, set[Any]]:
    """The usernames on iopub by request, once all requests are done."""
    found: dict[str, set[Any]] = {}
    for message in member.messages("iopub", 60):
        parent = message["parent_header"]
        if parent:
            found.setdefault(parent["msg_id"], set()).add(parent["username"])
            if message["content"].get("execution_state") == "idle":
                requests.discard(parent["msg_id"])
        if not requests:
            return found
    raise TimeoutError(requests)


def forge(member: Member, name: Any, kind: str = "execute_request", **content: Any) -> str:
    message = member.session.msg(kind, content)
    message["header"]["username"] = name
    member.session.send(member.sockets["shell"], message)
    return message["header"]["msg_id"]


def true_name(name: str, said: Any) -> str:
    """What iopub has to say of a client that calls itself *said*; only the manager is believed."""
    if name != "manager":
        return name
    if not isinstance(said, str):
        return ""
    return said if said in ("somebody", "") else "manager"


def test_every_request_has_its_true_name(kernel):  # noqa: F811
    """A pair of owners and the manager, each with forged names, all at the same time."""
    rng = random.Random(1)
    kernel.list("olga")
    kernel.list("vera")
    manager = Member(kernel.info, kernel.manager)
    with kernel.member("olga") as olga, kernel.member("vera") as vera, manager:
        who = {"olga": olga, "vera": vera, "manager": manager}
        truth: dict[str, tuple[str, Any]] = {}
        for number in range(ROUNDS):
            name, said = rng.choice(list(who)), rng.choice(FORGED)
            code = f"print({number})" if number % 10 == 0 else ""
            if number % 3:
                request = forge(who[name], said, code=code, silent=False, allow_stdin=False)
            else:
                request = forge(who[name], said, "comm_info_request")
            truth[request] = name, said
            if number % 20 == 0:
                who[name].reply(request)
        found = names_on_iopub(vera, set(truth))
        for request, (name, said) in truth.items():
            assert found[request] == {true_name(name, said)}, (name, said)
            # A reply's parent has it too.
        reply = vera.reply(forge(vera, "olga", "kernel_info_request"))
        assert reply["parent_header"]["username"] == "vera"
        control = vera.session.msg("kernel_info_request", {})
        control["header"]["username"] = "olga"
        vera.session.send(vera.sockets["control"], control)
        reply = vera.reply(control["header"]["msg_id"], "control")
        assert reply["parent_header"]["username"] == "vera"
    kernel.path("olga").unlink()
    kernel.path("vera").unlink()


def test_code_in_a_cell_sees_whose_request_it_is(kernel):  # noqa: F811
    kernel.list("vera")
    code = "get_ipython().kernel.get_parent('shell')['header']['username']"
    with kernel.member("vera") as vera:
        request = forge(
            vera, "x", code="", silent=False, user_expressions={"who": code}, allow_stdin=False
        )
        who = vera.reply(request)["content"]["user_expressions"]["who"]
        assert who["data"]["text/plain"] == "'vera'"
        # Renamed while it is connected: the next request has the new name.
        kernel.path("vera").rename(kernel.path("veronica"))
        kernel.keys["veronica"] = kernel.keys["vera"]
        for _ in range(50):
            request = forge(vera, "vera", code="", silent=False, user_expressions={"who": code})
            who = vera.reply(request)["content"]["user_expressions"]["who"]["data"]["text/plain"]
            if who != "'vera'":
                break
        assert who == "'veronica'"
    kernel.path("veronica").unlink()


def test_a_client_that_is_not_listed_gets_no_listed_name(folder):
    """With client_authorization=any, where the list only gives names."""
    from curve_kernel.keys.certificates import write_certificate

    vera = KeyPair.generate()
    write_certificate(folder / "viewers" / "vera.key", vera.public_key)
    with headless() as (_, info), Member(info) as stranger, Member(info, vera) as listed:
        hidden = "v" + "\u200b" * 1000 + "era"
        for said, expected in (
            ("vera", ""),
            (hidden, ""),
            ("Vera ", ""),
            ("somebody", "somebody"),
            (None, ""),
        ):
            reply = stranger.reply(forge(stranger, said, "kernel_info_request"))
            assert reply["parent_header"]["username"] == expected
        reply = listed.reply(forge(listed, "somebody", "kernel_info_request"))
        assert reply["parent_header"]["username"] == "vera"


def test_nobody_can_make_a_tag_and_buffers_stay_as_they_are(kernel):  # noqa: F811
    kernel.list("vera")
    with kernel.member("vera") as vera:
        target = (
            "def f(comm, message):\n    global got\n    got = [bytes(b) for b in message['buffers']]\n"
        )
        target += "get_ipython().kernel.comm_manager.register_target('t', f)"
        vera.reply(vera.execute(target))
        buffers = [b"", b"\x00" * 16 + b"shell 1 owner key olga", b"x" * 100_000]
        message = vera.session.msg("comm_open", {"comm_id": "c", "target_name": "t", "data": {}})
        vera.session.send(vera.sockets["shell"], message, buffers=buffers)
        reply = vera.reply(vera.execute("", user_expressions={"got": "[len(b) for b in got]"}))
        got = reply["content"]["user_expressions"]["got"]["data"]["text/plain"]
        assert got == str([len(buffer) for buffer in buffers])
        # Malformed ones are what they are, and the kernel goes on.
        for frames in (
            [b"x"],
            [b"<IDS|MSG>"],
            [b"<IDS|MSG>", b""],
            [b"<IDS|MSG>", b"a", b"b", b"c", b"d"],
        ):
            vera.sockets["shell"].send_multipart(frames)
        assert vera.reply(vera.execute("1"))["content"]["status"] == "ok"
    kernel.path("vera").unlink()


def test_input_comes_from_who_is_listed(kernel):  # noqa: F811
    kernel.list("vera")
    kernel.list("olga")
    with kernel.member("vera") as vera:
        request = vera.request(
            "shell", "execute_request", code="answer = input('?')", silent=False, allow_stdin=True
        )
        asked = next(vera.messages("stdin", 60))
        assert asked["msg_type"] == "input_request"
        vera.request("stdin", "input_reply", value="42")
        assert vera.reply(request)["content"]["status"] == "ok"
    kernel.path("vera").unlink()
    kernel.path("olga").unlink()

"""The table of connections and the limits, fed by hand: no socket is opened here."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from curve_kernel.access import limits
from curve_kernel.access.audit import Reason
from curve_kernel.access.connection import Connection, Peer
from curve_kernel.access.connections import Connections
from curve_kernel.access.limits import Limits

OLGA, VERA = Peer("owner", "olga", "o" * 40), Peer("viewer", "vera", "v" * 40)
MANAGER = Peer("manager", "", "m" * 40)
LIMITS = Limits(5.0, 8, 16)


def accept(table: Connections, channel: str, descriptor: int, address: str = "127.0.0.1") -> Connection:
    # No listener has that name, so no descriptor is ever held.
    connection = Connection(channel, descriptor, table.number, None)
    connection.address = address
    table.accepted(connection)
    return connection


def test_a_silent_connection_is_known_if_only_one_client_was_authorized_since():
    table = Connections()
    connection = accept(table, "iopub", 7)
    table.authorized("iopub", OLGA)
    table.authorized("shell", VERA)  # another channel says nothing
    table.got_ready(connection)
    assert connection.peer == OLGA


def test_a_silent_connection_is_not_known_if_it_may_be_either_of_two():
    table = Connections()
    first, second = accept(table, "iopub", 7), accept(table, "iopub", 8)
    table.authorized("iopub", OLGA)
    given = table.authorized("iopub", VERA)
    table.got_ready(first)
    table.got_ready(second)
    assert not first.peer.role
    assert not second.peer.role
    assert table.told("iopub", 8, given) == [second, first]
    assert second.peer == VERA
    assert first.peer == OLGA


def test_a_message_of_a_connection_that_has_ended_names_not_the_next_one_with_its_descriptor():
    table = Connections()
    accept(table, "shell", 7)
    given = table.authorized("shell", OLGA)
    table.ended("shell", 7)
    second = accept(table, "shell", 7)
    assert table.told("shell", 7, given) == []
    assert not second.peer.role
    table.authorized("shell", VERA)
    table.got_ready(second)
    assert second.peer == VERA


def test_names_are_never_exchanged_whatever_the_order():
    """Random histories as libzmq can cause them; whoever is named is who it truly is."""
    rng = random.Random(1)
    named = 0
    for _ in range(300):
        table = Connections()
        free, standing = list(range(6)), {}
        truth: dict[int, tuple[Connection, Peer, str]] = {}
        for _ in range(200):
            step = rng.random()
            if step < 0.4 and free:
                descriptor = free.pop(rng.randrange(len(free)))
                standing[descriptor] = accept(table, "iopub", descriptor)
            elif step < 0.6 and (waiting := [fd for fd in standing if fd not in truth]):
                descriptor, peer = rng.choice(waiting), rng.choice([OLGA, VERA, MANAGER])
                truth[descriptor] = standing[descriptor], peer, table.authorized("iopub", peer)
                if rng.random() < 0.7:
                    table.got_ready(standing[descriptor])
            elif step < 0.8 and truth:
                descriptor, (connection, _, given) = rng.choice(list(truth.items()))
                assert table.told("iopub", descriptor, given)[0] is connection
            elif standing:
                descriptor = rng.choice(list(standing))
                assert table.ended("iopub", descriptor) is standing.pop(descriptor)
                truth.pop(descriptor, None)
                free.append(descriptor)
            for connection, peer, _ in truth.values():
                assert connection.peer in (peer, Peer())
                named += connection.peer == peer
    assert named > 1000


def test_a_routing_id_is_handed_over_to_a_client_of_the_same_key_only():
    table = Connections()
    manager, debugger = Peer("manager", "", "M" * 40), Peer("kernel", "", "K" * 40)
    for descriptor, peer in ((1, manager), (2, debugger)):
        accept(table, "shell", descriptor)
        assert table.may_hand_over("shell", peer) or peer is debugger
        given = table.authorized("shell", peer)
        table.told("shell", descriptor, given)
    assert table.may_hand_over("shell", manager)
    assert not table.may_hand_over("shell", OLGA)
    olga = accept(table, "shell", 3)
    assert table.may_hand_over("shell", manager)
    given = table.authorized("shell", OLGA)
    assert not table.may_hand_over("shell", manager)  # olga's is on its way, with any routing id
    table.got_ready(olga)
    assert not table.may_hand_over("shell", manager)  # not heard yet: the kernel may not have it yet
    assert not table.may_hand_over("shell", OLGA)
    table.told("shell", 3, given)
    assert table.may_hand_over("shell", manager)
    assert not table.may_hand_over("shell", OLGA)
    first, second = accept(table, "control", 4), accept(table, "control", 5)
    table.authorized("control", OLGA)
    table.authorized("control", manager)
    table.got_ready(first)
    table.got_ready(second)
    assert not table.may_hand_over("control", manager)  # neither is known
    for descriptor in (4, 5):
        table.ended("control", descriptor)
    assert table.may_hand_over("control", OLGA)
    first, second = accept(table, "stdin", 6), accept(table, "stdin", 7)
    table.authorized("stdin", debugger)
    table.authorized("stdin", manager)
    table.got_ready(first)
    table.got_ready(second)
    assert table.may_hand_over("stdin", manager)  # which of the two is which makes no difference
    assert not table.may_hand_over("stdin", OLGA)


def test_nobody_was_ignored_for_a_routing_id_that_libzmq_made():
    table = Connections()
    given = {}
    for descriptor, peer in ((1, VERA), (2, OLGA), (3, OLGA)):
        accept(table, "shell", descriptor)
        given[descriptor] = table.authorized("shell", peer, hands_over=False)
        table.got_ready(table.handshaking["shell", descriptor])
    table.told("shell", 2, given[2], "")
    silent = table.ready["shell", 3]
    assert table.ignored_until(table.ended("shell", 2)) == []
    accept(table, "shell", 4)
    given = table.authorized("shell", OLGA, hands_over=False)
    table.told("shell", 4, given, "session")
    assert table.ignored_until(table.ended("shell", 4)) == [silent]


def test_successes_are_of_all_or_of_nobody():
    table = Connections()
    first, second = accept(table, "iopub", 7), accept(table, "iopub", 8)
    accept(table, "shell", 9)
    assert table.succeeded("iopub") == []
    assert table.succeeded("iopub") == [first, second]
    # One of two has succeeded, and one of them leaves: perhaps that one.
    table = Connections()
    first, second = accept(table, "iopub", 7), accept(table, "iopub", 8)
    assert table.succeeded("iopub") == []
    table.ended("iopub", 8)
    third = accept(table, "iopub", 8)
    assert table.succeeded("iopub") == []
    table.got_ready(third)
    assert table.succeeded("iopub") == [first]


def test_who_remains_is_known_when_the_other_has_spoken():
    table = Connections()
    first, second = accept(table, "shell", 7), accept(table, "shell", 8)
    table.authorized("shell", OLGA)
    given = table.authorized("shell", MANAGER)
    table.got_ready(second)
    table.got_ready(first)
    table.told("shell", 8, given)
    assert first.peer == OLGA


def test_many_authorizations_are_forgotten_without_a_wrong_name():
    table = Connections()
    silent = accept(table, "iopub", 1)
    for number in range(6000):
        accept(table, "iopub", 2)
        table.authorized("iopub", Peer("any", "", f"{number:040}"))
        table.ended("iopub", 2)
    table.got_ready(silent)
    assert not silent.peer.role
    table.ended("iopub", 1)
    for number in range(10_000):
        table.authorized("iopub", Peer("any", "", f"{number:040}"))
    assert len(table._authorized["iopub"]) < 200


def ready(channel: str, peer: Peer, address: str = "10.0.0.1", age: float = 0) -> Connection:
    connection = Connection(channel, -1, 0, None)
    connection.peer, connection.address, connection.is_ready = peer, address, True
    connection.since = time.monotonic() - age
    return connection


@pytest.mark.parametrize(
    ("peer", "channel", "most"),
    [
        (VERA, "hb", 16),
        (VERA, "iopub", 8),
        (OLGA, "shell", 64),
        (Peer("any", "", "a"), "shell", 16),
        (Peer(), "iopub", 16),
        (Peer(), "hb", 16),
        (Peer("any", "", "a"), "hb", 16),
    ],
)
def test_each_group_has_a_limit_of_its_own(peer: Peer, channel: str, most: int) -> None:
    connections = [ready(channel, peer, age=number) for number in range(most)]
    others: list[Any] = [ready("shell", OLGA) for _ in range(5)] if peer != OLGA else []
    others += [ready("shell", MANAGER) for _ in range(500)]
    assert limits.excess_connection([*connections, *others], LIMITS) is None
    oldest = ready(channel, peer, age=1000)
    assert limits.excess_connection([*others, oldest, *connections], LIMITS) is oldest


def test_an_address_with_few_connections_keeps_them():
    few = ready("hb", Peer(), "10.0.0.2", age=1000)
    many = [ready("hb", Peer(), age=number) for number in range(16)]
    assert limits.excess_connection([few, *many], LIMITS) is many[-1]


def test_reasons_read_as_text():
    assert f"{Reason.SLOW}" == "slow reader"


def test_a_reader_saves_up_no_credit(monkeypatch):
    """libzmq's own bytes are acknowledged, too: small messages are no right to large ones."""
    connection = accept(Connections(), "iopub", 7)
    counters = {"acknowledged": 0, "unread": 1000}
    for name in counters:
        monkeypatch.setattr(Connection, name, lambda _, name=name: counters[name])
    published = 0
    for _ in range(10_000):
        published, counters["acknowledged"] = published + 250_000, counters["acknowledged"] + 400_000
        connection.progress, is_slow = limits.follow_reader(connection, published, 250)
        assert not is_slow
    counters["unread"], more = 1 << 20, 0
    while not is_slow and more < 1 << 30:
        more += 1 << 20
        counters["acknowledged"] += 1
        connection.progress, is_slow = limits.follow_reader(connection, published + more, 1 << 20)
    assert more <= 18 << 20

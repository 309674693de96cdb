"""What the monitor's thread waits for: libzmq tells of a socket's messages once."""

from __future__ import annotations

import contextlib
import os

import pytest
import zmq

from curve_kernel.access.sources import Sources


@pytest.fixture
def pair():
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        one, other = (stack.enter_context(context.socket(zmq.PAIR)) for _ in range(2))
        one.bind("inproc://pair")
        other.connect("inproc://pair")
        yield one, other


def test_what_is_left_unread_is_not_forgotten(pair):
    reader, writer = pair
    sources = Sources(())
    sources.add(reader)
    for number in range(40):
        writer.send(b"%d" % number)
    sources.wait(10)
    for number in range(16):
        assert sources.has_more(reader)
        assert reader.recv() == b"%d" % number
    sources.wait(0)
    assert reader in sources.unread
    for number in range(16, 40):
        assert sources.has_more(reader)
        assert reader.recv() == b"%d" % number
    assert not sources.has_more(reader)
    assert reader not in sources.unread


def test_what_came_before_it_was_added(pair):
    reader, writer = pair
    writer.send(b"early")
    assert reader.getsockopt(zmq.EVENTS) & zmq.POLLIN  # takes what libzmq's descriptor tells
    sources = Sources(())
    sources.add(reader)
    assert sources.has_more(reader)


@pytest.mark.parametrize("is_drained", [True, False])
def test_each_message_ends_a_wait(pair, is_drained):
    reader, writer = pair
    sources = Sources((-1,))
    sources.add(reader)
    for _ in range(100):
        assert not is_drained or not sources.has_more(reader)
        writer.send(b"")
        sources.wait(0 if sources.unread else 10)
        assert sources.has_more(reader)
        reader.recv()


def test_a_descriptor_among_sockets(pair):
    readable, writable = os.pipe()
    sources = Sources((readable, -1))
    sources.add(pair[0])
    assert not sources.wait(0) & {readable}
    os.write(writable, b"x")
    assert readable in sources.wait(10)
    os.close(readable)
    os.close(writable)

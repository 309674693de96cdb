"""Who knows the server key, or is listed as a viewer, and means harm; and strangers in crowds."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flood
import psutil
import pytest
import zmq
from support import run_code, started, wait_for
from test_floods import OPEN_64
from victim import Victim, figure, victim
from zmtp import Peer, frame, greeting, metadata

from curve_kernel.client import BlockingKernelClient
from curve_kernel.keys import KeyPair

MIB = 1 << 20
RESET = struct.pack("ii", 1, 0)


def keys(pair: KeyPair) -> tuple[bytes, bytes]:
    return pair.public_key, pair.secret_key


def grown(kernel: Victim, before: int) -> float:
    return (kernel.process.memory_info().rss - before) / MIB


def new_owner(kernel: Victim) -> float:
    """Seconds until an owner who was not there has the first answer."""
    start = time.monotonic()
    client = BlockingKernelClient(client_keys=kernel.owner)
    client.load_connection_info(json.loads(Path(kernel.km.connection_file).read_text()))
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
    finally:
        client.stop_channels()
    return time.monotonic() - start


def curve(kernel: Victim) -> str:
    return run_code(kernel.client, "get_ipython().run_line_magic('curve', '')")[1]


def refused(kernel: Victim, channel: str = "shell") -> Peer:
    """A peer that the authenticator has refused, and that stays."""
    peer = Peer(kernel.channels[channel], kernel.server_key, zmq.curve_keypair(), timeout=5)
    peer.to_welcome()
    peer.send(frame(peer.initiate()))
    assert peer.read_frame().startswith(b"\x05ERROR")
    return peer


def test_a_refused_peer_that_stays_takes_no_memory(kernel: Victim) -> None:
    before, most = kernel.process.memory_info().rss, 0.0
    peers = [refused(kernel) for _ in range(10)]
    for peer in peers:
        peer.send(b"\x02" + struct.pack(">Q", 63 * MIB))
        for _ in range(40):
            peer.send(bytes(MIB))
        most = max(most, grown(kernel, before))
    figure("refused peers that send", kernel.name, grown_mib=round(most, 1))
    assert most < 64


def test_a_refused_peer_is_not_taken_for_who_is_let_in(kernel: Victim) -> None:
    parked = [refused(kernel) for _ in range(6)]
    with Peer(kernel.channels["shell"], kernel.server_key, keys(kernel.owner)) as olga:
        olga.to_ready()
        for peer in parked:
            peer.socket.close()
        junk = []
        for _ in range(300):
            junk.append(socket.create_connection(("127.0.0.1", kernel.channels["control"])))
            junk[-1].sendall(greeting() + b"\x06" + struct.pack(">Q", 4000) + bytes(300))
        time.sleep(1)
        assert olga.rest(0.2)[1] is False
        assert "olga" in curve(kernel)
        for one in junk:
            one.close()


@pytest.mark.parametrize("leaves_by", ["reset", "close"])
def test_who_leaves_after_initiate_locks_nobody_out(kernel: Victim, leaves_by: str) -> None:
    for _ in range(4):
        peers = []
        for _ in range(50):
            peer = Peer(kernel.channels["iopub"], kernel.server_key, keys(kernel.viewer))
            peer.to_welcome()
            peers.append(peer)
        for peer in peers:
            if leaves_by == "reset":
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            peer.send(frame(peer.initiate(metadata(Socket_Type=b"SUB", Identity=b""))))
            peer.socket.close()
    seconds = new_owner(kernel)
    figure("leaves after INITIATE", kernel.name, new_client_s=round(seconds, 2))
    assert seconds < 3


@pytest.mark.parametrize(("channel", "socket_type"), [("hb", b"REQ"), ("iopub", b"SUB")])
def test_connections_are_bounded(kernel: Victim, channel: str, socket_type: bytes) -> None:
    """A viewer's; the kernel may have 1,024 open files."""
    pair = keys(kernel.viewer)
    peers = []
    with contextlib.suppress(OSError):
        for _ in range(600):
            peers.append(Peer(kernel.channels[channel], kernel.server_key, pair))
            peers[-1].to_ready(socket_type)
    files = kernel.process.num_fds()
    figure(f"connections on {channel}", kernel.name, made=len(peers), files=files)
    assert len(peers) > 300
    assert files < 600
    assert run_code(kernel.client, OPEN_64) == ("ok", "opened\n")
    assert new_owner(kernel) < 5
    for peer in peers:
        peer.socket.close()
    wait_for("their files to be given back", lambda: kernel.process.num_fds() < 150)


@pytest.mark.parametrize(("channel", "socket_type"), [("hb", b"REQ"), ("iopub", b"SUB")])
def test_a_message_without_end(kernel: Victim, channel: str, socket_type: bytes) -> None:
    before, sent = kernel.process.memory_info().rss, 0
    pair = keys(kernel.viewer)
    with Peer(kernel.channels[channel], kernel.server_key, pair) as peer:
        peer.to_ready(socket_type)
        with contextlib.suppress(OSError):
            while sent < 100 * MIB:
                peer.socket.sendall(peer.message(bytes(4000), flags=1))
                sent += 4000
    figure(f"endless message on {channel}", kernel.name, sent_mib=sent / MIB, mib=grown(kernel, before))
    assert sent < 50 * MIB
    assert grown(kernel, before) < 64


@pytest.mark.parametrize("size", [10, 200, 900])
def test_a_viewer_subscribes_to_everything(kernel: Victim, size: int) -> None:
    before, sent = kernel.process.memory_info().rss, 0
    with Peer(kernel.channels["iopub"], kernel.server_key, keys(kernel.viewer)) as peer:
        peer.to_ready(b"SUB")
        with contextlib.suppress(OSError):
            while sent < 100 * MIB:
                topic = b"\x01" + f"{sent:016}".encode() + bytes(size)
                peer.socket.sendall(peer.message(topic))
                sent += size
        start = time.monotonic()
        assert run_code(kernel.client, "print('seen')") == ("ok", "seen\n")
        figure("subscriptions", kernel.name, size=size, sent=sent, cell_s=time.monotonic() - start)
        assert time.monotonic() - start < 2
    assert sent < 50 * MIB
    assert grown(kernel, before) < 200


def test_a_subscriber_and_a_heartbeat_that_stay_are_not_cut(kernel: Victim) -> None:
    iopub = Peer(kernel.channels["iopub"], kernel.server_key, keys(kernel.viewer))
    hb = Peer(kernel.channels["hb"], kernel.server_key, keys(kernel.viewer))
    with iopub, hb:
        iopub.to_ready(b"SUB")
        hb.to_ready(b"REQ")
        iopub.send(iopub.message(b"\x01"))
        for number in range(2000):
            hb.send(hb.message(b"", flags=1) + hb.message(b"%d" % number))
            hb.read_frame()
            hb.read_frame()
        assert run_code(kernel.client, "print('seen')") == ("ok", "seen\n")
        heard, hung_up = iopub.rest(0.5)
        assert not hung_up
        assert len(heard) > 500


BURST_SECONDS = float(os.environ.get("CURVE_KERNEL_BURST_SECONDS", "6"))


def test_bursts_with_pings_that_end_in_a_reset(kernel: Victim) -> None:
    """libzmq aborts the process if it has to stop reading such a connection (`!_io_error`)."""
    rng = random.Random(BURST_SECONDS)
    ports, before, files = kernel.channels, kernel.process.memory_info().rss, kernel.process.num_fds()
    end, bursts = time.monotonic() + BURST_SECONDS, 0
    while time.monotonic() < end:
        channel, kind = rng.choice([("iopub", b"SUB"), ("hb", b"REQ")])
        pair = keys(kernel.viewer) if rng.random() < 0.8 else zmq.curve_keypair()
        with contextlib.suppress(OSError), Peer(ports[channel], kernel.server_key, pair) as peer:
            bursts += 1
            peer.to_ready(kind)
            share, count = rng.choice([0, 0.05, 0.5]), rng.choice([3, 12, 50, 300, 1000, 2500, 4000])
            burst = [
                peer.ping()
                if rng.random() < share
                else peer.message(rng.choice([b"\x01topic%d" % number, b"", b"\0x", b"hello", b"\x01"]))
                for number in range(count)
            ]
            data = b"".join([*burst, peer.ping()])
            peer.send(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
            if rng.random() < 0.7:
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if bursts % 20 == 0:
            kernel.works()
    kernel.works()
    figure("bursts", kernel.name, bursts=bursts, mib=grown(kernel, before))
    assert grown(kernel, before) < 64
    wait_for("their files to be given back", lambda: kernel.process.num_fds() < files + 8)


def subscriber(kernel: Victim, port: int, topic: bytes = b"") -> Peer:
    peer = Peer(port, kernel.server_key, keys(kernel.viewer))
    peer.to_ready(b"SUB")
    peer.send(peer.message(b"\x01" + topic))
    return peer


def test_a_viewer_that_reads_nothing_is_disconnected_as_a_slow_reader(kernel: Victim) -> None:
    ports, lines = kernel.channels, "print('x' * 500_000)\n"
    run_code(
        kernel.client, "import os; from IPython.display import display; data = os.urandom(10_000_000)"
    )
    show = "for _ in range({}): display({{'image/png': data}}, raw=True)\n"
    run_code(kernel.client, show.format(4), timeout=120)  # what that takes by itself
    peers = [subscriber(kernel, ports["iopub"]) for _ in range(4)]
    wait_for("the viewer", lambda: "vera" in curve(kernel))
    before, most = kernel.process.memory_info().rss, 0.0
    for _ in range(10):
        status, text = run_code(kernel.client, show.format(4) + lines + "print('end')", timeout=120)
        assert (status, len(text), text[-4:]) == ("ok", 500_001 + 4, "end\n")
        most = max(most, grown(kernel, before))
    wait_for("them to be disconnected", lambda: re.search(r"slow reader +iopub +4", curve(kernel)))
    figure("slow readers", kernel.name, grown_mib=round(most))
    assert most < 128
    for peer in peers:
        peer.socket.close()


@pytest.mark.parametrize("size", [10, 30])
def test_a_viewer_that_reads_is_none_whatever_it_reads(kernel: Victim, size: int) -> None:
    code = f"import os; from IPython.display import display; data = os.urandom({size}_000_000)"
    run_code(kernel.client, code)
    peer = subscriber(kernel, kernel.channels["iopub"])
    wait_for("the viewer", lambda: "vera" in curve(kernel))
    heard = 0

    def read() -> None:
        nonlocal heard
        with contextlib.suppress(OSError):
            while chunk := peer.socket.recv(1 << 20):
                heard += len(chunk)

    reader = threading.Thread(target=read, daemon=True)
    peer.socket.settimeout(None)
    reader.start()
    count = 200 // size
    show = f"for _ in range({count}): display({{'image/png': data}}, raw=True)"
    run_code(kernel.client, show, timeout=120)
    wait_for("all of it", lambda: heard > count * size * 1_300_000, timeout=60)
    assert "slow reader" not in curve(kernel)
    peer.socket.close()


def test_nobody_is_welcomed_with_a_text_of_a_viewers_choice(kernel: Victim) -> None:
    texts = [b"\x1b]0;evil\x07", b"kernel", b"\xff", b""]
    peers = [subscriber(kernel, kernel.channels["iopub"], text) for text in texts]
    wait_for("them", lambda: re.search(r"vera +viewer +iopub x 4", curve(kernel)))
    heard = []
    with contextlib.suppress(queue.Empty):
        while True:
            heard.append(kernel.client.get_iopub_msg(timeout=1))
    welcomed = [one["content"] for one in heard if one["msg_type"] == "iopub_welcome"]
    assert all(one == {"subscription": ""} for one in welcomed)
    for peer in peers:
        peer.socket.close()


@pytest.mark.parametrize("channel", ["iopub", "shell"])
def test_a_routing_id_may_be_any_bytes(kernel: Victim, channel: str) -> None:
    """pyzmq gives it as text. If that fails, the iopub thread must not print it into the notebook."""
    pair = keys(kernel.viewer if channel == "iopub" else kernel.owner)
    kind = b"SUB" if channel == "iopub" else b"DEALER"
    for _ in range(5):
        with Peer(kernel.channels[channel], kernel.server_key, pair) as peer:
            peer.to_welcome()
            peer.send(frame(peer.initiate(metadata(Socket_Type=kind, Identity=b"\xff\xfe"))))
            assert peer.read_frame().startswith(b"\x05READY")
            if channel == "iopub":
                peer.send(peer.message(b"\x01"))
            else:
                request = kernel.client.session.msg("kernel_info_request", {})
                request["header"]["session"] = "another"
                frames = kernel.client.session.serialize(request)
                flags = [1] * (len(frames) - 1) + [0]
                peer.send(b"".join(map(peer.message, frames, flags)))
                assert peer.read_frame()  # the reply
    assert run_code(kernel.client, "print('seen')") == ("ok", "seen\n")
    with contextlib.suppress(queue.Empty):
        while True:
            assert kernel.client.get_iopub_msg(timeout=1)["msg_type"] != "stream"


def test_a_type_of_request_that_is_no_text_spoils_nothing(kernel: Victim) -> None:
    own = BlockingKernelClient(client_keys=kernel.owner)
    own.load_connection_info(json.loads(Path(kernel.km.connection_file).read_text()))
    own.start_channels()
    for kind in (5, ["x"], None, "x" * 1_000_000):
        request = own.session.msg("kernel_info_request", {})
        request["header"]["msg_type"] = request["msg_type"] = kind
        own.session.send(own.shell_channel.socket, request)
        wait_for("the client", lambda: "olga" in curve(kernel))
    own.stop_channels()


ROLES = """
from collections import Counter
ports = {port.channel: port.connections for port in get_ipython().kernel.parent.bound_ports()}
print(sorted(Counter((one.role, one.name) for one in ports['iopub']).items()))
"""


def test_names_are_not_exchanged_with_those_that_leave_after_initiate(kernel: Victim) -> None:
    port = kernel.channels["iopub"]
    for _ in range(8):
        for _ in range(4):
            with Peer(port, kernel.server_key, keys(kernel.viewer)) as peer:
                peer.to_welcome()
                peer.send(frame(peer.initiate(metadata(Socket_Type=b"SUB", Identity=b""))))
        peers: list[Peer] = []
        threads = [
            threading.Thread(target=lambda found: found.append(subscriber(kernel, port)), args=(peers,))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        assert new_owner(kernel) < 10
        for thread in threads:
            thread.join()
        wait_for(
            "each under its own name",
            lambda: (
                run_code(kernel.client, ROLES)[1] == "[(('manager', ''), 1), (('viewer', 'vera'), 6)]\n"
            ),
        )
        for peer in peers:
            peer.socket.close()
        wait_for(
            "all to be gone",
            lambda: run_code(kernel.client, ROLES)[1] == "[(('manager', ''), 1)]\n",
        )


def test_an_owner_keeps_every_connection_whoever_crowds_the_heartbeat(kernel: Victim) -> None:
    ports, peers = kernel.channels, []
    own = BlockingKernelClient(client_keys=kernel.owner)
    own.load_connection_info(json.loads(Path(kernel.km.connection_file).read_text()))
    own.start_channels()
    own.wait_for_ready(timeout=60)
    for number in range(180):
        address = f"127.0.1.{number + 1}"
        for pair in (zmq.curve_keypair(), keys(kernel.viewer), keys(kernel.viewer)):
            with contextlib.suppress(OSError):
                peer = Peer(ports["hb"], kernel.server_key, pair, source=address)
                peers.append(peer)
                peer.to_ready(b"REQ")
    lines = "import time\nfor number in range(81): print(number, flush=True); time.sleep(0.02)"
    status, text = run_code(own, lines)
    assert (status, text.split()) == ("ok", [str(number) for number in range(81)])
    own.stop_channels()
    for peer in peers:
        peer.socket.close()


def test_nobody_takes_another_clients_prompts_and_replies(kernel: Victim) -> None:
    """By its routing id, which is the session that iopub shows."""
    with zmq.Context() as context, contextlib.ExitStack() as stack:

        def thief(channel: str) -> zmq.Socket[bytes]:
            made = stack.enter_context(context.socket(zmq.DEALER))
            made.linger = 0
            made.identity = kernel.client.session.bsession
            made.curve_publickey, made.curve_secretkey = keys(kernel.owner)
            made.curve_serverkey = kernel.server_key.encode()
            monitor = stack.enter_context(made.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED))
            made.connect(f"tcp://127.0.0.1:{getattr(kernel.km, f'{channel}_port')}")
            assert monitor.poll(30_000)
            return made

        def prompted(_: str) -> None:
            thieves.append(thief("stdin"))
            kernel.client.input("secret")

        thieves = [thief(channel) for channel in ("shell", "control", "stdin")]
        code = "name = input('password: '); name == 'secret' or wrong"
        reply = kernel.client.execute_interactive(
            code, timeout=30, allow_stdin=True, stdin_hook=prompted, output_hook=lambda _: None
        )
        assert reply["content"]["status"] == "ok"
        kernel.client.kernel_info(reply=True, timeout=30)
        assert not any(made.poll(300) for made in thieves)


def test_a_further_client_of_the_manager_takes_over_its_session_as_in_stock() -> None:
    with victim() as kernel:
        olga = BlockingKernelClient(client_keys=kernel.owner)
        olga.load_connection_info(json.loads(Path(kernel.km.connection_file).read_text()))
        further = kernel.km.client()
        for client in (olga, further):
            client.start_channels()
            client.wait_for_ready(timeout=30)
        assert run_code(further, "print(6 * 7)") == ("ok", "42\n")
        assert run_code(olga, "print(6 * 7)") == ("ok", "42\n")
        further.stop_channels()
        olga.stop_channels()


def test_a_client_that_comes_back_before_its_old_connection_has_ended(kernel: Victim) -> None:
    """As after a cut that the kernel has not noticed: it waits, but not longer than that lasts."""
    info = json.loads(Path(kernel.km.connection_file).read_text())
    old, new = (BlockingKernelClient(client_keys=kernel.owner) for _ in range(2))
    new.session = old.session  # whose id is the routing id
    for client in (old, new):
        client.load_connection_info(info)
        client.start_channels()
        if client is old:
            client.wait_for_ready(timeout=30)
    new.kernel_info()
    assert not new.shell_channel.msg_ready()
    old.stop_channels()
    new.wait_for_ready(timeout=30)
    assert run_code(new, "print(6 * 7)") == ("ok", "42\n")
    new.stop_channels()


def test_a_client_loses_no_reply_while_others_of_the_same_key_come_and_leave(kernel: Victim) -> None:
    """What it has sent may not be read yet when another one's end makes it look at again."""
    info = json.loads(Path(kernel.km.connection_file).read_text())
    kernel.client.execute("import time; time.sleep(3)")

    def made() -> BlockingKernelClient:
        client = BlockingKernelClient(client_keys=kernel.owner)
        client.load_connection_info(info)
        client.start_channels(stdin=False, hb=False)
        return client

    leaving = [made() for _ in range(2)]
    clients = [made() for _ in range(2)]
    sent = [(client, client.execute(f"print({number})")) for number, client in enumerate(clients)]
    for client in leaving:
        client.stop_channels()
    for client, message_id in sent:
        while client.get_shell_msg(timeout=30)["parent_header"]["msg_id"] != message_id:
            pass
        client.stop_channels()


def test_strangers_that_send_while_a_cell_holds_the_interpreter_lock(kernel: Victim) -> None:
    """Nothing in Python can disconnect them meanwhile."""
    before, most = kernel.process.memory_info().rss, 0.0
    port = str(kernel.km.shell_port)
    kernel.client.execute("import ctypes; ctypes.PyDLL(None).sleep(5)")
    command = [sys.executable, flood.__file__, "huge", "4", kernel.server_key, port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacker:
        while attacker.poll() is None:
            most = max(most, grown(kernel, before))
            time.sleep(0.02)
        assert attacker.stdout is not None
        sent = int(attacker.stdout.read())
    figure("strangers while the lock is held", kernel.name, grown_mib=round(most), sent_mib=sent)
    assert sent > 50
    assert most < 128


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss, of iproute2")
def test_what_is_sent_again_to_peers_that_acknowledge_nothing_counts_once(kernel: Victim) -> None:
    """Or they would pass for clients that have got READY, after which nothing counts any more."""
    port = kernel.km.shell_port
    peers = [Peer(port, kernel.server_key) for _ in range(60)]
    for peer in peers:
        peer.acknowledge_nothing()
        peer.send(greeting())

    def sent_by_kernel() -> list[int]:
        command = ["ss", "-Htin", "state", "established", f"sport = :{port}"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        again = [line for line in listed.splitlines() if "bytes_retrans" in line]
        return [int(found[1]) for line in again if (found := re.search(r"bytes_sent:(\d+)", line))]

    wait_for("the greeting to be sent often", lambda: sum(n > 300 for n in sent_by_kernel()) == 60, 10)
    before, most = kernel.process.memory_info().rss, 0.0
    for peer in peers:
        peer.socket.settimeout(0.1)
        with contextlib.suppress(OSError):
            peer.socket.sendall(b"\x06" + struct.pack(">Q", 60 * MIB))
            peer.socket.sendall(bytes(20 * MIB))
        most = max(most, grown(kernel, before))
    figure("greeting sent again", kernel.name, grown_mib=round(most))
    assert most < 64
    table = curve(kernel)
    assert "not known yet" not in table
    assert re.search(r"too many bytes in the handshake +shell", table)
    for peer in peers:
        peer.socket.close()


@pytest.fixture
def local() -> Iterator[tuple[Any, Any]]:
    """A kernel on ipc, and its manager's client."""
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 characters at most
        file = f"{short}/kernel.json"
        with started("python3-curve", transport="ipc", connection_file=file) as (km, client):
            yield km, client


def test_peers_without_a_key_that_send_on_ipc(local: tuple[Any, Any]) -> None:
    km, client = local
    [process] = (
        child
        for child in psutil.Process().children(recursive=True)
        if "curve_kernel" in " ".join(child.cmdline())
    )
    before, most = process.memory_info().rss, 0
    path = km._make_url("shell").removeprefix("ipc://")

    def send() -> None:
        with contextlib.suppress(OSError), Peer(path, timeout=5) as peer:
            peer.exchange_greetings()
            peer.socket.sendall(b"\x06" + struct.pack(">Q", 60 * MIB))
            for _ in range(60):
                peer.socket.sendall(bytes(MIB))

    for _ in range(3):
        threads = [threading.Thread(target=send) for _ in range(40)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, process.memory_info().rss - before)
            time.sleep(0.005)
    figure("no key on ipc", "python3-curve", grown_mib=most >> 20)
    assert most < 64 * MIB
    assert run_code(client, "print(6 * 7)") == ("ok", "42\n")


def test_an_owner_on_ipc_may_send_a_lot_at_once(local: tuple[Any, Any]) -> None:
    """As soon as its handshake is over, which the kernel may have to be told of yet."""
    km, _ = local
    for _ in range(5):
        client = km.client()
        client.session = client.session.clone()
        client.session.session = os.urandom(8).hex()
        client.start_channels()
        client.execute("#" + "x" * (8 * MIB) + "\n1")
        assert client.get_shell_msg(timeout=30)["content"]["status"] == "ok"
        client.stop_channels()


SOCKETS_OF_THE_USER = """
import socket, time
end = time.monotonic() + 5
total = dead = 0
while time.monotonic() < end:
    pairs = [socket.socketpair() for _ in range(40)]
    listeners = [socket.create_server(('127.0.0.1', 0)) for _ in range(40)]
    time.sleep(0.05)
    for one, other in pairs:
        total += 1
        try:
            one.sendall(b'x')
            dead += other.recv(1) != b'x'
        except OSError:
            dead += 1
        one.close()
        other.close()
    for one in listeners:
        total += 1
        try:
            socket.create_connection(one.getsockname(), 1).close()
        except OSError:
            dead += 1
        one.close()
print(total > 1000, dead)
"""


def test_what_user_code_opens_is_never_shut_down() -> None:
    """libzmq tells numbers of descriptors, which are those of something else soon."""
    with victim(ulimit="-Sn 1024") as kernel:
        user_code_under_attack(kernel)


def user_code_under_attack(kernel: Victim) -> None:
    stop = threading.Event()
    ports = list(kernel.channels.values())

    def attack() -> None:
        turn = 0
        while not stop.is_set():
            held: list[Any] = []
            for _ in range(400):
                one = socket.socket()
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                held.append(one)
                with contextlib.suppress(OSError):
                    one.connect(("127.0.0.1", ports[turn % len(ports)]))
                    one.send(b"\xff")
            time.sleep(0.01)
            for one in held:
                one.close()
            turn += 1

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        assert run_code(kernel.client, SOCKETS_OF_THE_USER, timeout=60) == ("ok", "True 0\n")
    finally:
        stop.set()
        attacker.join()

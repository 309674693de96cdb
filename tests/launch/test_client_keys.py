"""Managers and clients with a client key pair of their own, on a kernel that they hold no secret of."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import AsyncKernelManager, KernelManager
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from support import headless, run_code, wait_for

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate
from curve_kernel.launch.client_keys import use_client_keys


@pytest.fixture
def kernel(folder: Path) -> Iterator[tuple[dict[str, Any], KeyPair]]:
    """A kernel that lists one owner; gives its connection info and that owner's pair."""
    pair = KeyPair.generate()
    write_certificate(folder / "owners" / "me.key", pair.public_key)
    with headless("--allowlist") as (_, info):
        yield info, pair


def manager(cls: type, info: dict[str, Any], pair: KeyPair) -> Any:
    file = Path(os.environ["JUPYTER_RUNTIME_DIR"], f"copy-{uuid.uuid4()}.json")
    km = cls(connection_file=str(file))
    km.load_connection_info({k: v for k, v in info.items() if not k.startswith("curve")})
    use_client_keys(km, pair, info["curve_publickey"].encode())
    return km


def is_alive(client: Any) -> bool:
    """Whether a heartbeat that was sent now is answered, which takes a listed key."""
    return client.hb_channel.is_beating()


def check_nothing_is_told(made: Any, pair: KeyPair, info: dict[str, Any]) -> None:
    """What upstream writes, passes on and shows of a manager or a client has no secret in it."""
    path = Path(os.environ["JUPYTER_RUNTIME_DIR"], f"written-{uuid.uuid4()}.json")
    made.connection_file = str(path)
    made._connection_file_written = False
    made.write_connection_file()
    # jupyter_client 8.9 writes no key at all.
    assert json.loads(path.read_text()).get("curve_publickey") in (None, info["curve_publickey"])
    secret = pair.secret_key.decode()
    for text in (path.read_text(), repr(made), str(vars(made)), str(made.get_connection_info())):
        assert secret not in text
    path.unlink()


def test_blocking(kernel):
    info, pair = kernel
    km = manager(KernelManager, info, pair)
    for client in (km.client(), km.blocking_client(), km.client().blocking_client()):
        client.start_channels()
        client.wait_for_ready(timeout=60)
        assert run_code(client, "6 * 7") == ("ok", "42")
        wait_for("a heartbeat", lambda client=client: is_alive(client), 10)
        check_nothing_is_told(client, pair, info)
        client.stop_channels()
    km._connect_control_socket()
    check_nothing_is_told(km, pair, info)

    # Other keys replace these, also those of a socket that is there.
    stranger = KeyPair.generate()
    use_client_keys(km, stranger, info["curve_publickey"].encode())
    km.session.send(km._control_socket, "kernel_info_request")
    assert not km._control_socket.poll(500)
    use_client_keys(km, pair, info["curve_publickey"].encode())
    km.session.send(km._control_socket, "kernel_info_request")
    assert km._control_socket.poll(10_000)
    km._close_control_socket()


@pytest.mark.parametrize("cls", [AsyncKernelManager, AsyncIOLoopKernelManager])
def test_asynchronous(kernel, cls):
    info, pair = kernel

    async def use() -> None:
        km = manager(cls, info, pair)
        client = km.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        said: list[Any] = []
        await client.execute_interactive("print(6 * 7)", timeout=30, output_hook=said.append)
        assert "42\n" in [message["content"].get("text") for message in said]
        check_nothing_is_told(client, pair, info)
        check_nothing_is_told(km, pair, info)
        client.stop_channels()
        # jupyter_server's websockets take streams of the manager, not a client.
        stream = km.connect_shell()
        stream.close()

    asyncio.run(use())


def test_a_wrong_server_key_gets_nothing(kernel):
    info, pair = kernel
    km = manager(
        KernelManager, {**info, "curve_publickey": KeyPair.generate().public_key.decode()}, pair
    )
    socket = km.connect_shell()
    km.session.send(socket, "kernel_info_request")
    assert not socket.poll(500)
    socket.close(linger=0)

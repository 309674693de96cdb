"""Kernel managers that have a client key pair of their own, where upstream's use the kernel's."""

from __future__ import annotations

from functools import partial
from typing import Any

import zmq
from jupyter_client import KernelManager
from jupyter_client.connect import channel_socket_types

from .. import sockets
from ..client.heartbeat import keyed_heartbeat
from ..keys import KeyPair

__all__ = ["use_client_keys"]


def use_client_keys(kernel_manager: KernelManager, pair: KeyPair, server_key: bytes) -> None:
    """Let *kernel_manager* and all its clients present *pair* to a kernel that has *server_key*.

    jupyter_client takes one pair for both ends, so whoever connects holds the kernel's secret key. Here
    the manager knows the kernel's public key only::

        use_client_keys(km, load_identity(), info["curve_publickey"].encode())

    Call it in ``post_launch``: before that, the manager compares its keys with the connection file's.
    Another call replaces the keys, also those of a control socket that is there already; clients keep
    those that they were made with.

    Parameters
    ----------
    kernel_manager : KernelManager
        Of any class: jupyter_client's blocking and asynchronous ones, jupyter_server's.
    pair : KeyPair
        The client key pair. It stays in memory: ``write_connection_file`` of the manager and of its
        clients writes the server key only, and that from jupyter_client 8.10 on.
    server_key : bytes
        The kernel's public key, 40 bytes of Z85.
    """
    km: Any = kernel_manager
    km.curve_publickey, km.curve_secretkey = server_key, None
    km._create_connected_socket = partial(_connected_socket, km, pair, server_key)
    km.client_factory = _with_keys(km.client_factory, pair, server_key)
    km.blocking_class = _with_keys(km.blocking_class, pair, server_key)
    if km._control_socket is not None:
        km._close_control_socket()
        km._connect_control_socket()


def _connected_socket(
    owner: Any, pair: KeyPair, server_key: bytes, channel: str, identity: bytes | None = None
) -> zmq.Socket[Any]:
    """Do what ``_create_connected_socket`` of *owner*, a manager or a client, does."""
    socket: zmq.Socket[Any] = owner.context.socket(channel_socket_types[channel])
    socket.linger = 1000
    if identity:
        socket.identity = identity
    socket.ipv6 = ":" in owner.ip
    sockets.make_client(socket, pair, server_key)
    socket.connect(owner._make_url(channel))
    return socket


def _with_keys(factory: Any, pair: KeyPair, server_key: bytes) -> type:
    """Make a client class of *factory* whose channels, the heartbeat too, present *pair*."""
    base: type = getattr(factory, "without_keys", factory)

    class KeyedClient(base):
        without_keys = base
        blocking_class: Any
        hb_channel_class: Any

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            # Upstream writes and passes on keys as a pair only.
            self.curve_publickey, self.curve_secretkey = server_key, None
            self.hb_channel_class = keyed_heartbeat(self.hb_channel_class, pair)

        def _create_connected_socket(
            self, channel: str, identity: bytes | None = None
        ) -> zmq.Socket[Any]:
            return _connected_socket(self, pair, server_key, channel, identity)

        def blocking_client(self) -> Any:
            self.blocking_class = _with_keys(self.blocking_class, pair, server_key)
            return super().blocking_client()

    KeyedClient.__name__, KeyedClient.__qualname__ = base.__name__, base.__qualname__
    return KeyedClient

"""A client's heartbeat channel that presents the client's key pair."""

from __future__ import annotations

from typing import Any

import zmq
from jupyter_client.channels import HBChannel

from .. import sockets
from ..keys import KeyPair

__all__ = ["keyed_heartbeat"]


class _KeyedHBChannel(HBChannel):
    """Upstream's makes a fresh pair for each socket, which no list of clients has.

    And it waits for ever to send a ping where its key is rejected: libzmq does not try again.
    """

    client_keys: KeyPair

    async def _async_run(self) -> None:
        while not self._exit.is_set():
            try:
                await super()._async_run()
            except zmq.Again:
                self._beating = False
            else:
                return

    def _create_socket(self) -> None:
        if self.curve_serverkey is None or self.context is None:
            super()._create_socket()
            return
        if self.socket is not None:
            self.poller.unregister(self.socket)
            self.socket.close()
        self.socket = self.context.socket(zmq.REQ)
        self.socket.linger = 1000
        self.socket.ipv6 = "[" in (self.address or "")
        self.socket.sndtimeo = int(self.time_to_dead * 1000)
        sockets.make_client(self.socket, self.client_keys, self.curve_serverkey)
        self.socket.connect(self.address)
        self.poller.register(self.socket, zmq.POLLIN)


def keyed_heartbeat(channel_class: Any, client_keys: KeyPair) -> Any:
    """Return a class like *channel_class* whose sockets present *client_keys*.

    A class that makes its socket in a way of its own is returned as it is.
    """
    if not (isinstance(channel_class, type) and issubclass(channel_class, HBChannel)):
        return channel_class
    keyed = issubclass(channel_class, _KeyedHBChannel)
    bases = (channel_class,) if keyed else (_KeyedHBChannel, channel_class)
    return type(channel_class.__name__, bases, {"client_keys": client_keys})

"""The manager and its clients: they hold the kernel's secret key, and never write it.

jupyter_client's ``write_connection_file``, a public method of both, writes what the object holds. Some
front ends call it at every start (molten-nvim does).
"""

from __future__ import annotations

import contextlib
from typing import Any

from .. import connection_file
from ..client.heartbeat import keyed_heartbeat
from ..errors import CurveKernelError
from ..keys import KeyPair
from .reconnecting import connected

__all__ = ["holding_manager", "presenting_client"]


class _Holder:
    """What the manager and the clients have in common."""

    def write_connection_file(self: Any, **kwargs: Any) -> None:
        """Write the connection file; a secret key only into a file that holds it already."""
        secret_key, held = self.curve_secretkey, None
        if secret_key is not None:
            with contextlib.suppress(CurveKernelError):
                held = connection_file.read(self.connection_file).get("curve_secretkey")
        self.curve_secretkey = None
        try:
            super().write_connection_file(**kwargs)  # type: ignore[misc]
        finally:
            self.curve_secretkey = secret_key
        if secret_key is None:
            return
        # jupyter_client 8.9 writes the public key beside a secret one only.
        own = {"curve_publickey": self.curve_publickey.decode()}
        if held == secret_key.decode():
            own["curve_secretkey"] = held
        with contextlib.suppress(CurveKernelError):  # it has written none
            if not own.items() <= connection_file.read(self.connection_file).items():
                connection_file.update(self.connection_file, own)

    def _create_connected_socket(self: Any, channel: str, identity: bytes | None = None) -> Any:
        socket = super()._create_connected_socket(channel, identity=identity)  # type: ignore[misc]
        if not hasattr(self, "client_keys"):  # this package's own clients watch theirs
            connected(channel, socket, self._make_url(channel))
        return socket

    def blocking_client(self: Any) -> Any:
        """Make a blocking client that writes no secret key either."""
        self.blocking_class = presenting_client(self.blocking_class)
        return super().blocking_client()  # type: ignore[misc]


def holding_manager(cls: type) -> type:
    """Make a manager class of *cls* that writes no secret key, nor do its clients."""
    if issubclass(cls, _Holder):
        return cls

    class Manager(_Holder, cls):
        client_factory: Any

        def client(self, **kwargs: Any) -> Any:
            self.client_factory = presenting_client(self.client_factory)
            return super().client(**kwargs)

    return _named_as(Manager, cls)


def presenting_client(cls: type) -> type:
    """Make a client class of *cls* whose heartbeat presents the manager's key pair too.

    It also accepts the keys as str: ``KernelManager.client()`` of jupyter_client 8.9 passes them so,
    and its own clients refuse them with a TraitError, until 8.10.
    """
    if issubclass(cls, _Holder):
        return cls

    class Client(_Holder, cls):
        hb_channel_class: Any

        def __init__(self, **kwargs: Any) -> None:
            for name in ("curve_publickey", "curve_secretkey"):
                if isinstance(kwargs.get(name), str):
                    kwargs[name] = kwargs[name].encode("ascii")
            super().__init__(**kwargs)

        @property
        def hb_channel(self) -> Any:
            public_key, secret_key = self.curve_publickey, self.curve_secretkey
            if self._hb_channel is None and public_key and secret_key:
                pair = KeyPair(public_key, secret_key)
                self.hb_channel_class = keyed_heartbeat(self.hb_channel_class, pair)
            return super().hb_channel

    return _named_as(Client, cls)


def _named_as(made: type, cls: type) -> type:
    made.__name__, made.__qualname__, made.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return made

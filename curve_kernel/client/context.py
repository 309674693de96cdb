"""The ZeroMQ contexts of clients."""

from __future__ import annotations

from typing import Any

import zmq.asyncio

__all__ = ["AsyncContext", "Context"]


class Context(zmq.Context[Any]):
    """A context that closes its sockets also when Python collects it together with them.

    pyzmq's knows them by weak references only. Python clears those before it finalizes a cycle, and
    ``term()`` then waits for ever for sockets that nobody can close any more. A client that was never
    stopped is part of such a cycle when an exception's traceback holds it.
    """

    makes: Any = zmq.Socket
    _made: tuple[zmq.Socket[Any], ...] = ()

    def socket(self, socket_type: int, socket_class: Any = None, **kwargs: Any) -> Any:
        """Create a socket; as `zmq.Context.socket`."""
        socket_class = socket_class or self.makes

        def make(*given: Any, **options: Any) -> Any:
            # Known before libzmq has it: Ctrl-C may come at any moment in between.
            socket = socket_class.__new__(socket_class, *given, **options)
            self._made = (*(made for made in self._made if not made.closed), socket)
            socket.__init__(*given, **options)
            return socket

        return super().socket(socket_type, socket_class=make, **kwargs)

    def destroy(self, linger: int | None = None) -> None:
        """Close every socket and the context; as `zmq.Context.destroy`."""
        for socket in self._made:
            socket.close(linger)
        self._made = ()
        super().destroy(linger)


class AsyncContext(Context, zmq.asyncio.Context):
    """The same for sockets that an event loop waits for."""

    makes = zmq.asyncio.Socket

"""The kernel's session: whose a message is says the key, not the message."""

from __future__ import annotations

from typing import Any

import zmq
from jupyter_client.session import Session

from .access.gate import Gate

__all__ = ["CurveSession"]


class CurveSession(Session):
    """A session in which a header's ``username`` is the name of the client whose key sent it.

    ipykernel publishes a request's header with everything that comes of it.
    """

    curve_gate: Gate | None = None
    curve_stdin: zmq.Socket[Any] | None = None

    def deserialize(self, msg_list: Any, content: bool = True, copy: bool = True) -> dict[str, Any]:
        """Return a received message as a dict, as the client that `HeardStream` has named."""
        gate = self.curve_gate
        speaker = gate.tagged(msg_list[-1]) if gate is not None and msg_list else None
        if gate is None or speaker is None:
            return super().deserialize(msg_list, content, copy)
        message = super().deserialize(msg_list[:-1], content, copy)
        gate.received(speaker, message, is_whole=content)
        return message

    def recv(
        self, socket: Any, mode: int = zmq.NOBLOCK, content: bool = True, copy: bool = True
    ) -> tuple[list[bytes] | None, dict[str, Any] | None]:
        """Receive and unpack a message, or nothing, if its client is not listed any more."""
        gate, stdin = self.curve_gate, self.curve_stdin
        if gate is None or stdin is None or socket is not stdin:
            return super().recv(socket, mode, content, copy)
        try:
            frames = stdin.recv_multipart(mode, copy=False)
        except zmq.Again:
            return None, None
        speaker = gate.heard("stdin", frames[0])
        if speaker is not None:
            if speaker.reason is not None:
                return None, None
            frames.append(speaker.tag)
        idents, rest = self.feed_identities(frames, copy=False)
        return idents, self.deserialize(rest, content, copy=False)

"""The options of the kernel application about who may connect, and how much a peer may take."""

from __future__ import annotations

from traitlets import Dict, Enum, Float, Int

from .access.limits import MESSAGE_SIZES, Limits
from .command_line import StrictApplication

__all__ = ["AccessOptions"]


class AccessOptions(StrictApplication):
    """An application with these options."""

    handshake_timeout = Float(
        5.0,
        min=0.1,
        config=True,
        help="""Seconds in which a handshake must be over.""",
    )
    max_handshakes = Int(
        256,
        min=1,
        config=True,
        help="""Connections that may be in their handshake at the same time, on all ports together;
        for one more the oldest is disconnected. Never more than a quarter of the open files that the
        process may have, so that code can always open some.""",
    )
    max_connections = Int(
        512,
        min=1,
        config=True,
        help="""Connections of clients that are not listed, on all ports together; for one more the
        oldest of the address that has the most is disconnected. Of clients that are
        not known yet, a sixteenth of that number on each port, and a quarter on the heartbeat. Never
        more than an eighth of the open files that the process may have.""",
    )
    max_message_size = Dict(
        value_trait=Int(min=4096),
        key_trait=Enum(list(MESSAGE_SIZES)),
        config=True,
        help="""Bytes in one frame by channel, also in the handshake: libzmq disconnects a client that
        sends a larger one. Give the channels that are to differ, such as shell=1073741824.""",
    )

    @property
    def limits(self) -> Limits:
        """The limits, as these options give them."""
        return Limits(self.handshake_timeout, self.max_handshakes, self.max_connections)

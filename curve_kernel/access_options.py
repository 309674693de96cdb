"""The options of the kernel application about who may connect, and how much a peer may take."""

from __future__ import annotations

import math
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traitlets import Bool, Dict, Enum, Float, Int, TraitError, Unicode, validate

from .access.limits import MESSAGE_SIZES, Limits
from .access.queued import QueuedLog
from .command_line import StrictApplication
from .errors import CurveKernelError

if TYPE_CHECKING:
    from .access.record import Record

__all__ = ["AccessOptions"]


class AccessOptions(StrictApplication):
    """An application with these options."""

    authorized_clients: str

    handshake_timeout = Float(
        5.0,
        min=0.1,
        max=86400.0,
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
        value_trait=Int(min=4096, max=(1 << 63) - 1),
        key_trait=Enum(list(MESSAGE_SIZES)),
        config=True,
        help="""Bytes in one frame by channel, also in the handshake: libzmq disconnects a client that
        sends a larger one. Give the channels that are to differ, such as shell=1073741824.""",
    )

    audit_log = Unicode(
        config=True,
        help="""A file to record in what clients do: who was accepted, rejected and disconnected, and
        each request with its client, type, id and the SHA-256 of its code. Needs
        curve-kernel[audit].""",
    )
    audit_code = Bool(
        False,
        config=True,
        help="""Record the code itself too, and not only its SHA-256.""",
    )

    @validate("handshake_timeout")
    def _is_a_number(self, proposal: Any) -> float:
        if math.isnan(value := proposal["value"]):
            raise TraitError("handshake_timeout is no number")
        return float(value)

    @cached_property
    def access_log(self) -> QueuedLog:
        """The log, for what must not wait for whoever reads it."""
        return QueuedLog(self.log)

    def folder_of_clients(self) -> Path:
        """Return where the clients are listed, absolute: code may change the working directory.

        Raises
        ------
        CurveKernelError
            If authorized_clients is empty: then it would be the working directory.
        """
        if not self.authorized_clients.strip():
            raise CurveKernelError("authorized_clients is empty", "name a folder, or leave it out")
        return Path(os.path.expanduser(self.authorized_clients)).absolute()  # noqa: PTH111

    def open_record(self) -> Record | None:
        """Open the record that audit_log asks for.

        Raises
        ------
        CurveKernelError
            If it can't be kept: then there is no kernel.
        """
        if not self.audit_log:
            return None
        try:
            from .access.record import Record
        except ImportError:
            raise CurveKernelError(
                "audit_log needs jupyter_events, which is not installed",
                'python -m pip install "curve-kernel[audit]"',
            ) from None
        path = Path(self.audit_log).expanduser().absolute()
        kernel_id = Path(self.connection_file).stem.removeprefix("kernel-")
        return Record(path, kernel_id, self.access_log, with_code=self.audit_code)

    @property
    def limits(self) -> Limits:
        """The limits, as these options give them."""
        return Limits(self.handshake_timeout, self.max_handshakes, self.max_connections)

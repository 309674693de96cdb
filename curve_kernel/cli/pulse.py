"""Whether the kernel of a client still lives, and whether what it says is whole."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from jupyter_client.session import Session

from ..client import BlockingKernelClient
from ..wire import read_mechanism

__all__ = ["Pulse", "WholeSession"]


class Pulse:
    """Whether a client's kernel lives: its heartbeat, its connection file, and then its ports tell.

    Parameters
    ----------
    client : BlockingKernelClient
        A client that is connected.
    path : str
        The connection file, which a kernel that ends removes, where it is not a copy.
    """

    SILENCE = 15.0
    """Seconds without a heartbeat after which the ports are asked."""
    _INTERVAL = 5.0

    def __init__(self, client: BlockingKernelClient, path: str) -> None:
        self._client = client
        self._path = Path(path)
        self._asked = 0.0
        self._last = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last heartbeat."""
        if self._client.hb_channel.is_beating():
            self._last = time.monotonic()
        return time.monotonic() - self._last

    def has_ended(self) -> bool:
        """Tell whether the kernel has ended; one that only restarts or is busy has not."""
        silence, now = self.silence, time.monotonic()
        if not silence or (silence < self.SILENCE and self._path.exists()):
            return False
        if now - self._asked < self._INTERVAL and self._path.exists():
            return False
        self._asked = now
        try:
            read_mechanism(self._client._make_url("iopub"), timeout=0.5)
        except ConnectionError:
            return True
        except (OSError, ValueError):
            pass
        return False


class WholeSession(Session):
    """Looks whether a message is whole before it says that the signature is wrong."""

    def deserialize(self, msg_list: list[Any], content: bool = True, copy: bool = True) -> Any:
        """Return the message that the frames are; too few are malformed, whatever the signature."""
        if len(msg_list) < 5 or not json.loads(bytes(msg_list[1])).get("msg_type"):
            raise ValueError("a malformed message")
        return super().deserialize(msg_list, content, copy)

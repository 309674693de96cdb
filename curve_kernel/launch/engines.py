"""What starts a launcher on another machine; see `ssh` and `slurm`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .. import __version__, keys
from ..errors import CurveKernelError
from .launcher import PROTOCOL

__all__ = ["Engine", "Ready", "find_ready"]


class Ready(NamedTuple):
    """What the launcher's line says."""

    ip: str
    ports: dict[str, int]
    launcher_port: int
    server_key: bytes
    pid: int
    version: str
    python: str
    hostname: str
    time: float


class Engine(ABC):
    """Runs ``python -m curve_kernel launch`` on another machine, and can end it."""

    detaches = False
    """Whether the launcher has to go on by itself after its line."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The other machine, for messages."""

    @abstractmethod
    async def launch(
        self, arguments: Sequence[str], timeout: float, progress: Callable[[str], object]
    ) -> Ready:
        """Start the launcher with *arguments*, and wait for its line.

        Parameters
        ----------
        arguments : sequence of str
            What follows ``launch``; all of it is public.
        timeout : float
            Seconds, besides those in a queue.
        progress : callable
            Is told what it waits for.

        Raises
        ------
        CurveKernelError
            If it does not start, with what the engine said. Nothing is left behind then.
        """

    @abstractmethod
    async def end(self) -> None:
        """End the launcher, if it still runs, in a few seconds."""

    @abstractmethod
    def end_now(self) -> None:
        """Do what `end` does, where no event loop runs any more."""

    async def why_ended(self, *, is_over: bool = False) -> str:  # noqa: ARG002
        """Return why the engine has ended the launcher, or empty if it has not, as far as is known.

        If the launcher *is_over*, an engine that does not know of it yet is asked for some seconds.
        """
        return ""

    async def forget(self) -> None:  # noqa: B027
        """Remove what is left once the launcher has ended."""


def find_ready(out: str, where: str) -> Ready | None:
    """Return what the launcher's line says, among what else a login prints.

    Raises
    ------
    CurveKernelError
        If it is another version's, with which this one can't talk.
    """
    for line in out.splitlines():
        if not line.startswith('{"curve_kernel"'):
            continue
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # not complete yet
        if said.get("protocol") != PROTOCOL:
            raise CurveKernelError(
                f"curve_kernel {said.get('curve_kernel')} on {where} and {__version__} here do not"
                " understand each other",
                "install the same version on both sides",
            )
        try:
            return Ready(
                str(said["ip"]),
                {name: int(port) for name, port in said.items() if name.endswith("_port")},
                int(said["launcher_port"]),
                keys.parse(said["curve_publickey"], f"the server key from {where}"),
                int(said["pid"]),
                str(said["curve_kernel"]),
                str(said["python"]),
                str(said["hostname"]),
                float(said["time"]),
            )
        except (KeyError, TypeError, ValueError):
            raise CurveKernelError(
                f"{where} says something that is not a launcher's line", "see what python is there"
            ) from None
    return None

"""Short commands with a limit, in an event loop and without threads.

Some programs clean up when the interpreter ends, where no thread can be started any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import CurveKernelError

__all__ = ["Done", "complete_environment", "environment", "interruptible", "run", "run_now"]

_INTERVAL = 0.02
_OUTPUT = 1 << 16
_AT_EXIT = 5.0
# Programs pass on what their configuration names, and a server's tokens are not for them.
_OURS = ("JUPYTER", "JPY_", "CURVE_KERNEL", "SLURM_")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class Done:
    """How a command ended; ``status`` is None if it was out of time."""

    status: int | None
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last line that it said on standard error."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self.status}"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt inside, so that what was started is ended.

    jupyter_client's console applications give SIGINT its default before they start a kernel.
    """
    main = threading.current_thread() is threading.main_thread()
    changed = main and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if changed:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment() -> dict[str, str]:
    """Return this process's environment without what is Jupyter's own."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not name.upper().startswith(_OURS)
    }


async def run(command: Sequence[str], timeout: float) -> Done:
    """Run *command* for at most *timeout* seconds, with nothing on its standard input.

    Raises
    ------
    CurveKernelError
        If there is no such program.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(),
                start_new_session=True,  # a Ctrl-C in a console is for the kernel
            )
        except OSError as error:
            raise CurveKernelError(
                f"{command[0]} can't be run: {error.strerror}", f"install {command[0]} here"
            ) from None
        try:
            while process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(_INTERVAL)
        finally:
            if (status := process.poll()) is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(_OUTPUT).decode(errors="replace"))
    return Done(status, *texts)


def run_now(command: Sequence[str]) -> None:
    """Run *command* for a few seconds, whatever comes of it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            timeout=_AT_EXIT,
            check=False,
        )


def complete_environment() -> None:
    """Set what every login has, where an engine passes nothing on (``sbatch --export=NIL``)."""
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(os.geteuid())
        for variable, value in (
            ("HOME", user.pw_dir),
            ("USER", user.pw_name),
            ("LOGNAME", user.pw_name),
            ("SHELL", user.pw_shell or "/bin/sh"),
            ("PATH", "/usr/local/bin:/usr/bin:/bin"),
            ("LANG", "C.UTF-8"),
        ):
            os.environ.setdefault(variable, value)

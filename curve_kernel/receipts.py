"""How `revoke` hears what the kernels that run have done: by a socket in Jupyter's runtime folder.

The command makes the socket before it changes the list. A kernel that has looked at the list sends one
line there. Only this user can reach the folder, and nothing depends on what is told.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import AF_UNIX, MSG_DONTWAIT, SOCK_CLOEXEC, SOCK_DGRAM, socket
from time import monotonic

from jupyter_core.paths import jupyter_runtime_dir

__all__ = ["Receipts", "receipts", "tell"]

_START, _END = "curve-revoke-", ".sock"
# Seconds in which a kernel looks at the list, and those after the last line in which one more may come.
_PATIENCE, _QUIET = 2.0, 0.3


class Receipts:
    """What kernels tell.

    Parameters
    ----------
    heard : socket or None
        Where they tell it; None if there can be no socket.
    folder : Path
        The list that they are to have looked at.
    """

    def __init__(self, heard: socket | None, folder: Path) -> None:
        self._heard, self._folder = heard, folder

    def collect(self) -> dict[str, int]:
        """Return by connection file how many connections were ended, waiting two seconds at most."""
        found: Counter[str] = Counter()
        if self._heard is None:
            return found
        deadline = monotonic() + _PATIENCE
        while (left := deadline - monotonic()) > 0:
            self._heard.settimeout(min(left, _QUIET) if found else left)
            try:
                told = json.loads(self._heard.recv(1 << 16))
                if told["list"] == str(self._folder):
                    name = "".join(letter for letter in str(told["kernel"]) if letter.isprintable())
                    found[name] += int(told["ended"])
            except TimeoutError:
                break
            except (OSError, ValueError, LookupError, TypeError):
                continue
        return found


@contextmanager
def receipts(folder: Path) -> Iterator[Receipts]:
    """Listen to what kernels tell of the list in *folder*."""
    runtime, heard = Path(jupyter_runtime_dir()), None
    path = runtime / f"{_START}{os.getpid()}{_END}"
    with ExitStack() as stack:
        with suppress(OSError):
            made = stack.enter_context(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC))
            stack.callback(_remove, path)
            with _short(path) as short:
                made.bind(short)
            path.chmod(0o600)
            heard = made
        yield Receipts(heard, folder.absolute())


def tell(folder: Path, kernel: str, ended: int) -> None:
    """Tell every command that listens that *kernel* has looked at *folder*, and ended connections."""
    line = json.dumps({"list": str(folder), "kernel": kernel, "ended": ended}).encode()
    with suppress(OSError), socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC) as sender:
        for path in Path(jupyter_runtime_dir()).glob(f"{_START}*{_END}"):
            try:
                with _short(path) as short:
                    sender.sendto(line, MSG_DONTWAIT, short)
            except ConnectionRefusedError:  # what a command left that was killed
                _remove(path)
            except OSError:
                continue


def _remove(path: Path) -> None:
    with suppress(OSError):  # also on a file system that is read-only, where there was none
        path.unlink()


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """Give a path that is short enough for a socket, whatever folder it is in."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)

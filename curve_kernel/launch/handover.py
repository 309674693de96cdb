"""How the secret key gets from the provisioner to the kernel: by the environment, or by a pipe."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from ..keys.source import PIPE

__all__ = ["Handover", "starts_python"]

_KERNELS = ("curve_kernel", "ipykernel", "ipykernel_launcher")
_PYTHON = re.compile(r"(python|pypy)[\d.]*|curve-kernel")


def starts_python(command: Sequence[str]) -> bool:
    """Whether *command* runs a Python's module, or this kernel's script, with no wrapper around it.

    A module is one if it is another than this kernel's, and that is what it is given to run.
    """
    name, words = Path(command[0]).name, iter(command[1:])
    if not _PYTHON.fullmatch(name):
        return False
    if name == "curve-kernel":
        return True
    if next((word for word in words if word[:2] != "-X"), "") != "-m":
        return False
    if next(words, "") in _KERNELS:
        return True
    return not any(re.search("curve[_-]kernel", word) for word in words)


class Handover:
    """A pipe beside the connection file from which the kernel reads its secret key, once.

    A kernel overwrites its own environment, and a wrapper that does not ``exec`` keeps its own as long
    as the kernel runs. A wrapper hands down the name of a pipe, and what is read is gone.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._pipe = -1

    def open(self, connection_file: str, secret_key: bytes) -> str:
        """Return what the kernel finds the key by.

        Raises
        ------
        OSError
            If no pipe can be made.
        """
        self.close()
        path = Path(connection_file).absolute().with_suffix(f".{secrets.token_hex(8)}.pipe")
        try:
            os.mkfifo(path, 0o600)
            self._path = path
            # As a writer alone it would wait for a reader. What is written stays while this is open.
            self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
            os.write(self._pipe, secret_key)
        except OSError:
            self.close()
            raise
        return f"{PIPE}{path}"

    def close(self) -> None:
        """Remove the pipe, with what nobody has read."""
        if self._pipe != -1:
            os.close(self._pipe)
            self._pipe = -1
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._path = None

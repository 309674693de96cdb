"""The terminal's voice: every message that ends a command or a start goes through here.

An error is two lines on standard error, lower case, with no full stop and no traceback::

    curve_kernel: error: what is wrong
    curve_kernel: hint: what to do about it

Neither line ever holds a secret key, nor the text that was given in place of one.
"""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["CurveKernelError", "fail"]


class CurveKernelError(Exception):
    """Something that a user, a file or the network caused, and that a user can mend.

    Parameters
    ----------
    message : str
        What is wrong, one line.
    hint : str
        What to do about it, one line.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}"


def fail(error: CurveKernelError) -> NoReturn:
    """Print the two lines of *error* on standard error and leave with status 1."""
    for kind, text in (("error", error.message), ("hint", error.hint)):
        print(f"curve_kernel: {kind}: {' '.join(text.splitlines())}", file=sys.stderr)  # noqa: T201
    sys.exit(1)

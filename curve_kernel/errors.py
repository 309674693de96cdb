"""Every message that ends a command or a start goes through here.

An error is one line or two on standard error, lower case, with no full stop and no traceback::

    curve_kernel: error: what is wrong
    curve_kernel: hint: what to do about it, where that does not go without saying

Neither line ever holds a secret key, nor the text that was given in place of one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

__all__ = ["CurveKernelError", "fail", "suggest"]


class CurveKernelError(Exception):
    """Something that a user, a file or the network caused, and that a user can fix.

    Parameters
    ----------
    message : str
        What is wrong, one line.
    hint : str, optional
        What to do about it, one line.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.message, self.hint)))


def fail(error: CurveKernelError) -> NoReturn:
    """Print *error* on standard error and leave with status 1."""
    for kind, text in (("error", error.message), ("hint", error.hint)):
        if text:
            print(f"curve_kernel: {kind}: {' '.join(text.splitlines())}", file=sys.stderr)  # noqa: T201
    sys.exit(1)


def suggest(word: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """Return the one of *names* that *word* is most likely meant to be, or None."""
    from difflib import get_close_matches  # only an error needs it

    plain = {_plain(name): name for name in names}
    matches = get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[matches[0]] if matches else None


def _plain(name: str) -> str:
    return name.strip("-").lower().replace("-", "_")

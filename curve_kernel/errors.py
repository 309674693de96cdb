"""Every message that ends a command or a start goes through here.

An error is one line or two on standard error, lower case, with no full stop and no traceback::

    curve_kernel: error: what is wrong
    curve_kernel: hint: what to do about it, where that does not go without saying

Neither line ever holds a secret key, nor the text that was given in place of one.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterable
from typing import NoReturn

__all__ = [
    "CurveKernelError",
    "fail",
    "fail_to_print",
    "printable",
    "suggest",
    "without_keys",
]


class CurveKernelError(Exception):
    """Something that a user, a file or the network caused, and that a user can fix.

    Parameters
    ----------
    message : str
        What is wrong, one line.
    hint : str, optional
        What to do about it, one line.
    """

    shows_key = False
    """Whether the message has a public key in it on purpose."""

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
            line = " ".join(text.splitlines())
            shown = line if error.shows_key else without_keys(line)
            print(f"curve_kernel: {kind}: {printable(shown)}", file=sys.stderr)  # noqa: T201
    sys.exit(1)


def fail_to_print(error: OSError) -> NoReturn:
    """Leave since standard output takes no more, and let what is buffered go nowhere."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # the reader has left, as `head` does
        sys.exit(128 + signal.SIGPIPE)
    fail(
        CurveKernelError(
            f"the output can't be written: {error.strerror}",
            "make room for it, or let it go elsewhere",
        )
    )


def printable(text: str) -> str:
    """Return *text* with a ? in place of whatever steers a terminal or can't be printed.

    For everything that others wrote: names of files, values in them, what another program answered.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


# 32 bytes in Z85, where a character may be too many or lack, or in hexadecimal; no name of a host.
_Z85 = r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]"
_PLAIN = rf"[0-9a-z./-]+(?!{_Z85})"
_HEX = r"(?<![0-9a-zA-Z])[0-9a-fA-F]{62,66}(?![0-9a-zA-Z])"
_IN_URL = rf"(?<=://){_Z85}{{38,42}}(?=:[0-9*])"
_KEY = re.compile(rf"(?:(?<!{_Z85})|(?<=[=:(]))(?!{_PLAIN}){_Z85}{{38,42}}(?!{_Z85})|{_HEX}|{_IN_URL}")


def without_keys(text: str) -> str:
    """Return *text* without what has a key's form and names no file: it may be a secret key."""
    parts = _OPTION.split(_without_keys(text))
    return "".join(map(_without_keys, parts))


def _without_keys(text: str) -> str:
    return _KEY.sub(lambda found: found[0] if _is_path(found[0]) else _HIDDEN, text)


_OPTION = re.compile(r"(?<![^\s'\"])(--[A-Za-z]+\.)")
_HIDDEN = "(hidden: it has the form of a key)"


def _is_path(text: str) -> bool:
    folder = os.path.dirname(text)  # noqa: PTH120
    return bool(folder.strip("/.~")) and os.path.isdir(folder)  # noqa: PTH112


def suggest(word: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """Return the one of *names* that *word* is most likely meant to be, or None."""
    from difflib import get_close_matches  # only an error needs it

    plain = {_plain(name): name for name in names}
    matches = get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[matches[0]] if matches else None


def _plain(name: str) -> str:
    return name.strip("-").lower().replace("-", "_")

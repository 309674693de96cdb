"""Every message that ends a command or a start goes through here.

An error is one line or two on standard error, lower case, with no full stop and no traceback::

    curve_kernel: error: what is wrong
    curve_kernel: hint: what to do about it, where that does not go without saying

Neither line ever holds a secret key, nor the text that was given in place of one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import NoReturn

__all__ = ["CurveKernelError", "fail", "printable", "suggest", "without_keys"]


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
            print(f"curve_kernel: {kind}: {printable(' '.join(text.splitlines()))}", file=sys.stderr)  # noqa: T201
    sys.exit(1)


def printable(text: str) -> str:
    """Return *text* with an escape in place of whatever steers a terminal or can't be printed.

    For everything that others wrote: names of files, values in them, what another program answered. A
    byte that is not UTF-8 is shown as such.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode's
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


# 32 bytes: in Z85, where a character may be too many or lack, and in hexadecimal.
_Z85 = r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]"
_KEY = re.compile(
    rf"(?<!{_Z85}){_Z85}{{38,42}}(?!{_Z85})|(?<![0-9a-zA-Z])[0-9a-fA-F]{{62,66}}(?![0-9a-zA-Z])"
)


def without_keys(text: str) -> str:
    """Return *text* without what has a key's form: what was given where a key does not belong."""
    return _KEY.sub("(hidden: it has the form of a key)", text)


def suggest(word: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """Return the one of *names* that *word* is most likely meant to be, or None."""
    from difflib import get_close_matches  # only an error needs it

    plain = {_plain(name): name for name in names}
    matches = get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[matches[0]] if matches else None


def _plain(name: str) -> str:
    return name.strip("-").lower().replace("-", "_")

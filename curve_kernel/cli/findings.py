"""What ``doctor`` finds."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass

from ..errors import CurveKernelError

__all__ = ["PYTHON", "Finding", "as_command", "from_error", "one_line"]

PYTHON = shlex.quote(sys.executable)


@dataclass(frozen=True)
class Finding:
    """One line of ``doctor``.

    ``level`` is ``ok``, ``warning`` or ``failure``. ``command`` is what fixes it: a shell's command, or
    its comment where no command does. It is empty for ``ok``.
    """

    check: str
    level: str
    message: str
    command: str = ""


def from_error(check: str, error: Exception) -> Finding:
    """Return the failure that *error* tells of."""
    message, hint = str(error), ""
    if isinstance(error, CurveKernelError):
        message, hint = error.message, error.hint
    return Finding(check, "failure", message, as_command(hint or "make it readable for you"))


def as_command(hint: str) -> str:
    """Return a hint as a shell takes it: the command that it ends with, else a comment."""
    found = re.search(r"(?:: |`)((?:python|chmod) [^`]+)", hint)
    if found is None:
        return f"# {one_line(hint)}"
    return re.sub(r"^python ", lambda _: f"{PYTHON} ", found[1])


def one_line(text: str) -> str:
    """Return *text* with its white space folded, so that it can be a shell's comment."""
    return " ".join(text.split())

"""Connection files: read with errors for humans, changed atomically, never more open than 0600."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from . import files
from .errors import CurveKernelError

__all__ = ["check", "read", "update", "write"]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of the connection file at *path*.

    Raises
    ------
    CurveKernelError
        If it can't be read, or is not a JSON object.
    """
    hint = "name a connection file that a Jupyter launcher or a kernel wrote"
    name = f"connection file {os.fspath(path)}"
    try:
        content = json.loads(files.read(path)[0])
    except OSError as error:
        can = "may not" if isinstance(error, PermissionError) else "can't"
        raise CurveKernelError(f"{name} {can} be read: {error.strerror}", hint) from None
    except (ValueError, RecursionError) as error:
        # The line only: some of the parser's messages quote the file.
        where = f", see line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CurveKernelError(f"{name} is not JSON{where}", hint) from None
    if not isinstance(content, dict):
        raise CurveKernelError(f"{name} is JSON but not an object", hint)
    return content


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Replace the connection file at *path* in one step, with mode 0600.

    Raises
    ------
    CurveKernelError
        If its folder can't be written.
    """
    try:
        files.replace(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise _not_written(path, error) from None


def check(path: str | os.PathLike[str]) -> None:
    """Make sure that the connection file at *path* can be written, without writing it.

    Raises
    ------
    CurveKernelError
        If its folder can't be written, or the disk is full.
    """
    try:
        files.check(path)
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: str | os.PathLike[str], error: OSError) -> CurveKernelError:
    return CurveKernelError(
        f"connection file {os.fspath(path)} can't be written: {error.strerror}",
        "put it into a folder that you can write, on a disk with room",
    )


def update(
    path: str | os.PathLike[str], changes: Mapping[str, Any], remove: Iterable[str] = ()
) -> None:
    """Change some fields of the connection file at *path* and keep all others.

    Does nothing where the content is the same already.

    Raises
    ------
    CurveKernelError
        As `read` and `write` do.
    """
    before = read(path)
    after = {field: value for field, value in before.items() if field not in set(remove)}
    after.update(changes)
    if after != before:
        write(path, after)

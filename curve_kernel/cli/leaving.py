"""Leaving the console leaves the kernel running: what `exit` in a cell means there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

__all__ = ["is_exit", "keep_kernel"]

# What IPython takes for a call of exit: `exit`, `exit()`, `exit 0`, `/quit`.
_LEAVE = re.compile(r"\s*/?(exit|quit)(\s*\([^()=]*\)|\s+-?\w+)?\s*;?\s*(#.*)?")


def is_exit(cell: str) -> bool:
    """Tell whether *cell* is nothing but a call of ``exit`` or ``quit``."""
    return _LEAVE.fullmatch(cell) is not None


def keep_kernel(cell: str) -> str:
    """Let each ``exit()`` and ``quit()`` in *cell* that does not say otherwise keep the kernel."""
    try:
        tree = ast.parse(cell)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return cell  # magics, or an error that the kernel shows
    text = cell.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for call in sorted(_exits(tree), key=lambda call: (call.lineno, call.col_offset), reverse=True):
        begin = starts[(call.func.end_lineno or 1) - 1] + (call.func.end_col_offset or 0)
        end = starts[(call.end_lineno or 1) - 1] + (call.end_col_offset or 0)
        text = text[:begin] + b"(keep_kernel=True)" + text[end:]
    return text.decode()


def _exits(node: ast.AST) -> Iterator[ast.Call]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Call(func=ast.Name(id="exit" | "quit"), keywords=[]):
                yield child
            case _:
                yield from _exits(child)

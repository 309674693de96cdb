"""The kernel's magics."""

from __future__ import annotations

import json
import shlex

from ipykernel.connect import get_connection_file
from IPython.core.magic import Magics, line_magic, magics_class

from . import connection_file

__all__ = ["CurveMagics"]


@magics_class
class CurveMagics(Magics):
    """Replaces ipykernel's magics where they would tell a secret."""

    @line_magic
    def connect_info(self, _line: str) -> None:
        """Print the connection file without a secret key: a notebook keeps its outputs."""
        path = get_connection_file()
        info = connection_file.read(path)
        if info.pop("curve_secretkey", None) is not None:
            hidden = "The connection file also holds curve_secretkey, which is not shown here.\n"
        else:
            hidden = ""
        print(json.dumps(info, indent=2))  # noqa: T201
        print(f"\n{hidden}The connection file is {shlex.quote(path)}")  # noqa: T201

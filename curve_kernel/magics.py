"""The kernel's magics."""

from __future__ import annotations

import html
import json
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from textwrap import fill
from typing import Any

from ipykernel.connect import get_connection_file
from IPython.core.magic import Magics, line_magic, magics_class

from . import connection_file
from .access.allowlist import OWN_CLIENT
from .access.connection import ConnectionInfo
from .access.policy import Activity
from .access.port import Port
from .keys.expiry import show

__all__ = ["CurveMagics", "Report"]

_ANY = "any client that knows the server key"
_LISTED = "this kernel's manager, and the clients listed in {}"
_PIPE = "pipe (forked children)"
_UNKNOWN = "(not known yet)"
_COLUMNS, _CLIENT = 80, 12


class Report:
    """What ``%curve`` shows: every port, the connected clients, the rejections.

    Parameters
    ----------
    server_key : str
        The kernel's public key, Z85.
    authorization : str
        Which clients may connect, in words.
    ports : sequence of Port
        As `CurveKernelApp.bound_ports` gives them.
    file : str, optional
        The connection file's path.
    activity : Activity, optional
        As `CurveKernelApp.activity` gives it.
    """

    def __init__(
        self,
        server_key: str,
        authorization: str,
        ports: Sequence[Port],
        file: str = "",
        activity: Activity | None = None,
    ) -> None:
        self.activity = activity or Activity()
        self.file = file
        self.server_key = server_key
        self.authorization = authorization
        self.ports = list(ports)

    @property
    def title(self) -> str:
        """One line that says whether every port is encrypted."""
        plain = [port.channel for port in self.ports if port.mechanism != "CURVE"]
        if plain or not self.ports:
            return f"NOT ENCRYPTED: {', '.join(plain) or 'no port is known'}"
        return "Every channel is encrypted (CURVE)"

    @property
    def connections(self) -> list[ConnectionInfo]:
        """The connections of clients."""
        return [
            connection
            for port in self.ports
            for connection in port.connections
            if port.channel != "pipe"
        ]

    def tables(self) -> list[list[list[str]]]:
        """Return the tables, each with its heading as the first row."""
        ports = [["channel", "endpoint", "mechanism", "connected", "rejected"]]
        for port in self.ports:
            connected, rejected = len(port.connections), sum(port.rejected.values())
            name = _PIPE if port.channel == "pipe" else port.channel
            ports.append([name, port.endpoint, port.mechanism, str(connected), str(rejected)])
        tables = [ports]
        clients = _by_client(self.connections)
        if clients:
            tables.append([["client", "role", "channels", "from", "since"], *clients])
        rejections = Counter(
            {(why, port.channel): count for port in self.ports for why, count in port.rejected.items()}
        )
        if rejections:
            rows = [[why, channel, str(count)] for (why, channel), count in rejections.most_common()]
            tables.append([["rejected because", "channel", "times"], *rows])
        return tables

    def lines(self) -> list[str]:
        """Return a line for each client: connections, last request, and when the access ends."""
        clients: dict[tuple[str, str], list[ConnectionInfo]] = {}
        for connection in self.connections:
            clients.setdefault((_name_of(connection), connection.role), []).append(connection)
        lines = []
        for (client, _), group in clients.items():
            keys = {connection.public_key for connection in group}
            last, ends = self.activity.last_requests, self.activity.ends
            requests = [last[key] for key in keys if key in last]
            parts = ["1 connection" if len(group) == 1 else f"{len(group)} connections"]
            if requests:
                kind, at = max(requests, key=lambda request: request[1])
                shown = "".join(letter for letter in kind if letter.isprintable())[:32]
                parts.append(f"last {shown} at {_moment(datetime.fromtimestamp(at).astimezone())}")
            parts += [show(ends[key]) for key in keys if key in ends]
            short = client if len(client) <= _CLIENT else f"{client[: _CLIENT - 1]}…"
            lines.append(f"{short}: {', '.join(parts)}")
        return lines

    def __repr__(self) -> str:
        lines = [self.title, f"Server key: {self.server_key}", f"May connect: {self.authorization}"]
        lines += [f"Connection file: {self.file}"] if self.file else []
        record = self.activity.record
        lines += [f"Record: {record}"] if record else []
        lines += [fill(line, _COLUMNS, subsequent_indent="  ") for line in self.lines()]
        try:
            drawn = [*map(_as_text, self.tables())]
        except Exception:  # noqa: BLE001  code in a cell may have broken what rich needs
            drawn = ["\n".join(map("  ".join, table)) for table in self.tables()]
        paragraphs = ["\n".join(lines), *drawn]
        cut = [client for client, *_ in _by_client(self.connections) if len(client) > _CLIENT]
        if cut:
            paragraphs.append("\n".join(["In full:", *cut]))
        return "\n\n".join(paragraphs)

    def _repr_html_(self) -> str:
        file = f"<br>Connection file: <code>{html.escape(self.file)}</code>" if self.file else ""
        clients = "".join(f"<br>{html.escape(line)}" for line in self.lines())
        record = self.activity.record
        record = f"<br>Record: {html.escape(record)}" if record else ""
        parts = [
            f"<p><b>{html.escape(self.title)}</b><br>"
            f"Server key: <code>{html.escape(self.server_key)}</code><br>"
            f"May connect: {html.escape(self.authorization)}{file}{record}{clients}</p>"
        ]
        for heading, *rows in self.tables():
            parts.append(f"<table><thead>{_html_row('th', heading)}</thead><tbody>")
            parts += [_html_row("td", row) for row in rows]
            parts.append("</tbody></table>")
        return "\n".join(parts)


def _as_text(rows: Sequence[Sequence[str]]) -> str:
    """Draw a table that a terminal of 80 columns does not wrap."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for heading in rows[0]:
        if heading == "client":  # a key, of a client that is not known
            table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=_CLIENT)
        else:
            table.add_column(heading, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console = Console(width=_COLUMNS, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _html_row(tag: str, cells: Sequence[str]) -> str:
    style = ' style="text-align: left"'
    return "<tr>" + "".join(f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _by_client(connections: Sequence[ConnectionInfo]) -> list[list[str]]:
    clients: dict[tuple[str, str, str], list[ConnectionInfo]] = {}
    for connection in connections:
        client = _name_of(connection)
        clients.setdefault((client, connection.role, connection.address), []).append(connection)
    rows = []
    for (client, role, address), group in clients.items():
        counts = Counter(connection.channel for connection in group)
        if len(counts) > 1:
            del counts["hb"]  # it goes with the others, and the table of ports counts it
        channels = [name if count == 1 else f"{name} x {count}" for name, count in counts.items()]
        since = min(connection.since for connection in group if connection.since)
        rows.append([client, role, ", ".join(channels), address, _moment(since)])
    return rows


def _name_of(connection: ConnectionInfo) -> str:
    unnamed = {"any": connection.public_key, OWN_CLIENT: "its debugger"}
    return connection.name or unnamed.get(connection.role, connection.role) or _UNKNOWN


def _moment(moment: datetime) -> str:
    today = moment.date() == datetime.now(moment.tzinfo).date()
    return f"{moment:%H:%M:%S}" if today else f"{moment:%m-%d %H:%M}"


def _from_home(path: str) -> str:
    home = os.path.expanduser("~")  # noqa: PTH111  there may be none
    return path.replace(home, "~", 1) if path.startswith(f"{home}/") else path


@magics_class
class CurveMagics(Magics):
    """``%curve``, and ipykernel's magics where they would tell a secret."""

    @line_magic
    def curve(self, _line: str) -> Report:
        """Show what each port of this kernel speaks, the connected clients, and the rejections."""
        shell: Any = self.shell
        app = shell.kernel.parent
        if app.client_authorization == "any":
            authorization = _ANY
        else:
            authorization = _LISTED.format(_from_home(app.authorized_clients))
            if app.owner_keys:
                authorization += f", and those in owner_keys ({len(app.owner_keys)})"
        if app.access_problem:
            authorization = f"no new client: {app.access_problem}; restart the kernel"
        path = _from_home(app.abs_connection_file)
        ports, key = app.bound_ports(), app.server_key.decode()
        return Report(key, authorization, ports, path, app.activity())

    @line_magic
    def connect_info(self, _line: str) -> None:
        """Print the connection file without its secrets: a notebook keeps its outputs."""
        path = get_connection_file()
        info = connection_file.read(path, trusted=False)
        hidden = [field for field in ("key", "curve_secretkey") if info.pop(field, None)]
        print(json.dumps(info, indent=2))  # noqa: T201
        if hidden:
            print(f"\nThe file also holds {' and '.join(hidden)}, not shown here.")  # noqa: T201
        quoted = shlex.quote(path)
        print(f"\nThe connection file is {quoted}")  # noqa: T201
        print(  # noqa: T201
            "To let somebody in, print a file for them:\n  python -m curve_kernel share CERTIFICATE"
            f" --name NAME --role viewer --for 2h --existing {quoted} > for-NAME.json"
        )

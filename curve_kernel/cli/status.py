"""``status``: what every running kernel's ports really speak."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from jupyter_core.paths import jupyter_runtime_dir
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import connection_file
from ..errors import CurveKernelError, printable
from ..inspect import KernelStatus, find_connection_file, inspect_kernels, short_names
from ..machine import inspect_machine
from . import Command

__all__ = ["StatusApp"]

_COLORS = {"encrypted": "green", "PLAINTEXT": "bold red", "mixed": "bold red", "unreachable": "yellow"}
_NAME = 16


class StatusApp(Command):
    """Shows what every running kernel speaks."""

    name = "status"
    summary = """Show what the ports of every running kernel really speak, read from the wire, with no
        key needed. Exit status 0 if every kernel that lives is encrypted."""

    INTERVAL = 2.0
    """Seconds between two looks of ``--watch``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the files and the forms of output."""
        parser.add_argument(
            "files",
            nargs="*",
            metavar="FILE",
            help="a connection file, or a part of its name; all in Jupyter's runtime folder by default",
        )
        parser.add_argument(
            "--all-users", action="store_true", help="every kernel on this machine, for root"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument(
            "--watch",
            action="store_true",
            help="look again every two seconds, until Ctrl-C; with --json, a line for each change",
        )

    def run(self, options: argparse.Namespace) -> int:
        """Look once, or again and again."""
        if options.all_users and options.files:
            raise CurveKernelError("--all-users looks at every kernel: leave out the files")
        if options.watch:
            return self._watch(options)
        kernels = self._inspect(options)
        if options.json:
            print(json.dumps([kernel.as_json() for kernel in kernels], indent=2))  # noqa: T201
        else:
            console = _console()
            console.print(_render(kernels, console, options.all_users), crop=False)
        alive = [kernel for kernel in kernels if kernel.verdict != "dead"]
        return int(any(kernel.verdict != "encrypted" for kernel in alive))

    @staticmethod
    def _inspect(options: argparse.Namespace) -> list[KernelStatus]:
        if options.all_users:
            return inspect_machine()
        if not options.files:
            return inspect_kernels([path for _, path in sorted(_in_runtime_folder())])
        return inspect_kernels([find_connection_file(name) for name in options.files])

    def _watch(self, options: argparse.Namespace) -> int:
        console = _console()
        live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        before = None
        with contextlib.suppress(KeyboardInterrupt), live or contextlib.nullcontext():
            while True:
                kernels = self._inspect(options)
                now = [kernel.as_json() for kernel in kernels]
                if options.json and now != before:
                    print(json.dumps(now), flush=True)  # noqa: T201
                elif not options.json and live is not None:
                    live.update(_render(kernels, console, options.all_users), refresh=True)
                elif not options.json and now != before:
                    console.print(_render(kernels, console, options.all_users), crop=False)
                before = now
                time.sleep(self.INTERVAL)
        return 0


def _in_runtime_folder() -> Iterable[tuple[float, str]]:
    folder = Path(jupyter_runtime_dir())
    try:
        paths = [path for path in folder.iterdir() if path.suffix == ".json"]
    except FileNotFoundError:
        return
    except OSError as error:
        raise CurveKernelError(
            f"runtime folder {folder} may not be read: {error.strerror}",
            "name a connection file that you may read",
        ) from None
    for path in paths:
        with contextlib.suppress(OSError, CurveKernelError):
            # A kernel may be started with a file of any name, and servers have theirs here too.
            if path.name.startswith("kernel-") or "shell_port" in connection_file.read(
                path, trusted=False
            ):
                yield _modified(path), str(path)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except PermissionError:
        return 0.0  # it is shown, with the reason


def _console() -> Console:
    console = Console(highlight=False)
    # A pipe has no width: nothing is to be cut off or wrapped there.
    return console if console.is_terminal else Console(highlight=False, width=10_000)


def _render(kernels: Sequence[KernelStatus], console: Console, all_users: bool) -> RenderableType:
    if not kernels and all_users:
        return "No kernel runs on this machine"
    if not kernels:
        return f"No kernel has a connection file in {jupyter_runtime_dir()}"
    style = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=style, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    user = ["user"] if all_users else []
    for heading in ("verdict", *user, "kernel", "pid", "since", "channels", "file", "gives away"):
        # What a person copies is never wrapped.
        wraps = heading in ("channels", "gives away")
        table.add_column(heading, no_wrap=not wraps, overflow="fold" if wraps else "ellipsis")
    further = []
    # As a shell takes them.
    names = map(shlex.quote, short_names([kernel.file or "-" for kernel in kernels]))
    for kernel, name in zip(kernels, names, strict=True):
        shown = name
        if len(name) > _NAME and console.is_terminal:
            shown = f"{Path(name).name[: _NAME - 1]}…"
            further.append(f"{shown} is {name}")
        table.add_row(
            Text(kernel.verdict, _COLORS.get(kernel.verdict, "dim")),
            *([Text(printable(kernel.user))] if all_users else []),
            Text(printable(kernel.kernel_name) or "-"),
            str(kernel.pid or "-"),
            _since(kernel),
            Text(_spoken(kernel)),
            Text(printable(shown)),
            _exposed(kernel),
        )
        if kernel.problem:
            further.append(kernel.problem)
        ports = [
            f"{port['address']}:{port['port']}"
            + ("" if port["pid"] == kernel.pid else f" (of process {port['pid']})")
            for port in kernel.further_ports
        ]
        if ports:
            further.append(f"process {kernel.pid} also listens on {', '.join(ports)}")
    # The terminal wraps these, so that a path in them can be copied.
    lines = (Text(printable(line), no_wrap=True, overflow="ignore") for line in further)
    return Group(table, *lines)


def _since(kernel: KernelStatus) -> str:
    if kernel.since is None:
        return "-"
    today = kernel.since.date() == datetime.now(kernel.since.tzinfo).date()
    return f"{kernel.since:%H:%M}" if today else f"{kernel.since:%m-%d}"


def _spoken(kernel: KernelStatus) -> str:
    by_mechanism: dict[str, list[str]] = {}
    for name, channel in kernel.channels.items():
        by_mechanism.setdefault(channel["mechanism"], []).append(name)
    if len(by_mechanism) == 1:
        return next(iter(by_mechanism))
    return ", ".join(f"{' '.join(names)} {m}" for m, names in by_mechanism.items()) or "-"


def _exposed(kernel: KernelStatus) -> Text:
    parts = []
    if kernel.secret_key_in_file:
        parts.append(Text("secret key", "bold red"))
    if kernel.hmac_key_in_file:
        parts.append(Text("HMAC key"))
    if kernel.file_mode and int(kernel.file_mode, 8) & 0o077:
        parts.append(Text(f"mode {kernel.file_mode}", "bold red"))
    return Text(", ").join(parts) if parts else Text("-")

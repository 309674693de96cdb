"""``console`` and ``watch``: connect to a kernel that runs already."""

from __future__ import annotations

import argparse
import io
import os
import queue
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_client import find_connection_file
from pygments import highlight
from pygments.formatters import TerminalFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from .. import connection_file
from ..client import BlockingKernelClient, KeyNotAuthorizedError, NobodyThereError
from ..errors import CurveKernelError
from ..keys.certificates import curve_folder, load_identity
from . import Command
from .clients import make_identity

__all__ = ["ConsoleApp", "WatchApp"]


class _ExistingCommand(Command):
    """A command with ``--existing FILE``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add --existing."""
        parser.add_argument(
            "--existing",
            nargs="?",
            const="kernel-*.json",
            required=True,
            metavar="FILE",
            help="the kernel's connection file, or a part of its name; the latest, if left out",
        )

    def find(self, options: argparse.Namespace) -> str:
        """Return the connection file's path; makes this user's identity if it is needed and missing.

        Raises
        ------
        CurveKernelError
            If there is no such file, or it is none.
        """
        try:
            path = find_connection_file(options.existing)
        except OSError:
            raise CurveKernelError(
                f"there is no connection file {options.existing}",
                "`jupyter --paths` shows the runtime folder where running kernels have theirs",
            ) from None
        info = connection_file.read(path)
        if info.get("curve_publickey") and not info.get("curve_secretkey") and load_identity() is None:
            make_identity()
            where = shlex.quote(str(curve_folder() / "identity.key"))
            print(  # noqa: T201
                f"curve_kernel: made your key pair, an owner of your own kernels: {where}",
                file=sys.stderr,
            )
        return path

    def connected(self, path: str, connect: Callable[[], Any]) -> Any:
        """Return what *connect* does; an error then names the file or this user's certificate."""
        try:
            return connect()
        except NobodyThereError as error:
            raise NobodyThereError(f"{error.message}, as {path} has it", error.hint) from None
        except KeyNotAuthorizedError as error:
            certificate = shlex.quote(str(curve_folder() / "identity.key"))
            raise KeyNotAuthorizedError(
                error.message,
                f"send your certificate to the kernel's user, who can authorize it: {certificate}",
            ) from None


class ConsoleApp(_ExistingCommand):
    """A terminal console on a running kernel."""

    name = "console"
    summary = """Open a console on a running encrypted kernel, with your own key pair. Takes all other
        options of `jupyter console` too."""
    passes_on = True

    def run(self, options: argparse.Namespace) -> None:
        """Run jupyter_console with a client that has a key pair of its own."""
        try:
            from jupyter_console.app import ZMQTerminalIPythonApp
        except ImportError:
            raise CurveKernelError(
                "the console needs jupyter_console, which is not installed",
                "python -m pip install jupyter_console",
            ) from None
        path = self.find(options)

        class CurveConsoleApp(ZMQTerminalIPythonApp):
            def handle_sigint(self, *args: Any) -> None:
                if not hasattr(self, "shell"):
                    raise KeyboardInterrupt  # the kernel has not answered yet
                super().handle_sigint(*args)

            # JupyterConsoleApp's own method drops the keys.
            def init_kernel_client(self) -> None:
                self.kernel_client = BlockingKernelClient(
                    session=self.session, connection_file=self.connection_file, parent=self
                )
                self.kernel_client.load_connection_info(connection_file.read(self.connection_file))
                self.kernel_client.start_channels()

        self.clear_instance()  # one application is the process's singleton, and IPython asks for it
        app = CurveConsoleApp.instance()
        try:
            self.connected(path, lambda: app.initialize([f"--existing={path}", *self.rest]))
        except RuntimeError as error:
            raise CurveKernelError(
                f"the kernel of {path} lets in this client and does not answer: {error}",
                "it may be busy; or the HMAC key in the file is not its own",
            ) from None
        app.start()


class WatchApp(_ExistingCommand):
    """Shows what a running kernel does."""

    name = "watch"
    summary = """Show a running kernel's inputs and outputs as they come, read-only: a viewer's role
        is enough. Ctrl-C leaves, and the kernel does not notice."""

    SILENCE = 15.0
    """Seconds without a heartbeat after which the kernel has ended."""

    def run(self, options: argparse.Namespace) -> int:
        """Print until the kernel ends or the user leaves."""
        path = self.find(options)
        client = BlockingKernelClient()
        client.load_connection_info(connection_file.read(path))
        self.connected(path, lambda: client.start_channels(shell=False, stdin=False, control=False))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a character that this terminal does not have
        printer = _Printer(color=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        printer.note(f"watching {Path(path).name}, read-only; Ctrl-C leaves")
        try:
            return self._follow(client, Path(path), printer)
        except KeyboardInterrupt:
            printer.note("left; the kernel goes on")
            return 0
        finally:
            client.stop_channels()

    def _follow(self, client: BlockingKernelClient, path: Path, printer: _Printer) -> int:
        last_beat = time.monotonic()
        while True:
            try:
                printer.show(client.get_iopub_msg(timeout=1))
                last_beat = time.monotonic()
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                # What a kernel sends is not to end who watches it.
                if "Invalid Signature" in str(error):
                    raise CurveKernelError(
                        f"the kernel signs its messages with another key than {path} has",
                        "get the kernel's new connection file",
                    ) from None
                printer.note("a malformed message was left out")
            except queue.Empty:
                if client.hb_channel.is_beating():
                    last_beat = time.monotonic()
                elif not path.exists():
                    printer.note("the kernel has ended")
                    return 0
                elif time.monotonic() - last_beat > self.SILENCE:
                    raise CurveKernelError(
                        f"the kernel has not answered for {self.SILENCE:.0f} seconds",
                        "it has ended, or the network between is down",
                    ) from None


class _Printer:
    """Prints iopub messages."""

    # What the kernel's user prints must not steer the terminal of whoever watches: of all control
    # characters only those for text and color pass.
    _COLOR = re.compile(r"\x1b\[[0-9;:]*m")
    _CONTROL = re.compile(r"(\x1b\[[0-9;:]*m)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

    def __init__(self, *, color: bool) -> None:
        self._color = color
        self._lexer: Any = None
        self._at_line_start = True

    def note(self, text: str) -> None:
        """Print a line of this program's own."""
        self._lines(f"[{text}]", "2")

    def show(self, message: dict[str, Any]) -> None:
        """Print what *message* has for a person."""
        content = message["content"]
        match message["msg_type"]:
            case "execute_input":
                self._label(f"In [{content['execution_count']}]: ", "32", content["code"])
                self._lines(self._highlighted(content["code"]))
            case "stream":
                self._write(content["text"], "31" if content["name"] == "stderr" else "")
            case "execute_result":
                label = f"Out[{content['execution_count']}]: "
                self._label(label, "31", str(content["data"].get("text/plain", "")))
                self._data(content["data"])
            case "display_data" | "update_display_data":
                self._data(content["data"])
            case "error":
                self._lines("\n".join(content["traceback"]))

    def _label(self, label: str, color: str, text: str) -> None:
        self._lines("")
        self._write(label + ("\n" if "\n" in text else ""), color)
        self._at_line_start = True

    def _data(self, data: dict[str, Any]) -> None:
        if "text/plain" in data:
            self._lines(str(data["text/plain"]))
        for kind, value in data.items():
            if kind.startswith("image/"):
                # Binary images are Base64: four characters for three bytes.
                size = len(value) if "svg" in kind else len(value) * 3 // 4
                self._lines(f"[{kind}, {max(size // 1024, 1)} KiB]", "2")

    def _highlighted(self, code: str) -> str:
        if not self._color:
            return code
        try:
            self._lexer = self._lexer or get_lexer_by_name("ipython3")
        except ClassNotFound:
            self._lexer = get_lexer_by_name("python3")
        return str(highlight(code, self._lexer, TerminalFormatter()))

    def _lines(self, text: str, color: str = "") -> None:
        start = "" if self._at_line_start else "\n"
        self._write(start + (text.rstrip("\n") + "\n" if text else ""), color)

    def _write(self, text: str, color: str = "") -> None:
        text = self._CONTROL.sub(lambda match: match[1] or "", text)
        if not self._color:
            text = self._COLOR.sub("", text)
        elif color:
            text = f"\x1b[{color}m{text}\x1b[0m"
        sys.stdout.write(text)
        sys.stdout.flush()
        plain = self._COLOR.sub("", text)
        if plain:
            self._at_line_start = plain.endswith("\n")

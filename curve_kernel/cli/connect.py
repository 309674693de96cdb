"""``console`` and ``watch``: connect to a kernel that runs already."""

from __future__ import annotations

import argparse
import io
import os
import queue
import sys
import threading
from pathlib import Path
from typing import ClassVar

from .. import connection_file
from ..client import BlockingKernelClient
from ..errors import CurveKernelError
from ..keys.expiry import show
from ..keys.ticket import until
from . import Command, until_interrupted
from .existing import connected, find, need_identity
from .page import Page
from .printer import Printer
from .pulse import Pulse, WholeSession
from .whose import short_name

__all__ = ["ConsoleApp", "WatchApp"]


class _ExistingCommand(Command):
    """A command on a kernel that runs: ``NAME`` or ``--existing NAME``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the kernel's name."""
        what = "the kernel's connection file, its name or a part of it; by default the latest that runs"
        parser.add_argument("name", nargs="?", metavar="NAME", help=what)
        parser.add_argument(
            "--existing", nargs="?", metavar="NAME", help="the same, as jupyter console has it"
        )

    def find(self, options: argparse.Namespace) -> str:
        """Return the connection file's path; makes this user's identity if it is needed and missing.

        Raises
        ------
        CurveKernelError
            If there is no such file, or it is not a connection file.
        """
        if options.name and options.existing and options.name != options.existing:
            raise CurveKernelError(
                f"two kernels are named: {options.name} and {options.existing}", "leave out one of them"
            )
        path = find(options.name or options.existing or None)
        need_identity(path)
        return path


class ConsoleApp(_ExistingCommand):
    """A terminal console on a running kernel."""

    name = "console"
    summary = """Open a console on a running encrypted kernel, with your own key pair. Leaving it with
        exit, quit or Ctrl-D leaves the kernel running; exit(keep_kernel=False) ends the kernel. Ctrl-C
        interrupts what the console runs."""
    passes_on = True

    _FLAGS: ClassVar[dict[str, str]] = {
        "simple-prompt": "read lines, without colors and completion",
        "no-simple-prompt": "the contrary, whatever a configuration file says",
        "confirm-exit": "ask at Ctrl-D, which is the default",
        "no-confirm-exit": "do not ask",
        "debug": "log everything",
    }
    _OVERRIDES = ("ip", "shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add those options of jupyter console that mean something for a kernel that runs."""
        super().add_arguments(parser)
        parser.epilog = """Traits of jupyter console may be set too, such as
            --ZMQTerminalInteractiveShell.include_other_output=True."""
        parser.add_argument(
            "--ssh",
            metavar="[USER@]HOST[:PORT]",
            help="reach the kernel through ssh; its address is seen from there",
        )
        parser.add_argument(
            "--sshkey", metavar="FILE", help="the key for ssh; alone, log in to the kernel's address"
        )
        parser.add_argument(
            "--ip", metavar="ADDRESS", help="an address other than the connection file's"
        )
        for field in self._OVERRIDES[1:]:
            channel = field.removesuffix("_port")
            parser.add_argument(
                f"--{channel}",
                type=int,
                dest=field,
                metavar="PORT",
                help=f"{channel}'s port, other than the file's",
            )
        parser.add_argument("--config", metavar="FILE", help="a configuration file of jupyter console")
        parser.add_argument("--log-level", metavar="LEVEL", help="10 to 50, or DEBUG to CRITICAL")
        for flag, what in self._FLAGS.items():
            parser.add_argument(f"--{flag}", action="store_true", help=what)

    def run(self, options: argparse.Namespace) -> None:
        """Run jupyter_console with a client that has a key pair of its own."""
        try:
            from .console import CurveConsoleApp
        except ImportError:
            raise CurveKernelError(
                "the console needs jupyter_console, which is not installed",
                "python -m pip install jupyter_console",
            ) from None
        self.clear_instance()  # one application is the process's singleton, and IPython asks for it
        app = CurveConsoleApp.instance()
        app.check_options(self.rest)
        app.log.addFilter(lambda line: not str(line.msg).startswith("Bad config"))  # `exit` says it
        path = self.find(options)
        given = {field: getattr(options, field) for field in self._OVERRIDES}
        app.info = connection_file.read(path) | {k: v for k, v in given.items() if v is not None}
        passed = [f"--{flag}" for flag in self._FLAGS if getattr(options, flag.replace("-", "_"))]
        for name in ("ssh", "sshkey", "config", "log_level"):
            if (value := getattr(options, name)) is not None:
                passed.append(f"--{name.replace('_', '-')}={value}")
        app.connection_file = path
        try:
            try:
                connected(path, lambda: app.initialize([*passed, *self.rest]))
            except RuntimeError as error:
                if isinstance(error, RecursionError):
                    raise
                raise CurveKernelError(
                    f"the kernel of {path} accepts this client and does not answer: {error}",
                    "it may be busy; or the HMAC key in the file is not its own",
                ) from None
            connected(path, app.start)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CurveKernelError(
                f"the kernel of {path} sends what no console understands: {type(error).__name__}",
                "python -m curve_kernel watch shows what can be shown",
            ) from None
        finally:
            app.close()


# Messages with another signature, with none before that has this one: the kernel's key is another.
_FORGED = 3


class WatchApp(_ExistingCommand):
    """Shows what a running kernel does."""

    name = "watch"
    summary = """Show a running kernel's inputs and outputs as they come, read-only: a viewer's role
        is enough. Ctrl-C leaves, and the kernel does not notice."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add --web and --port."""
        super().add_arguments(parser)
        parser.add_argument(
            "--web",
            action="store_true",
            help="show it as a page for a browser on this machine, with pictures and tables",
        )
        parser.add_argument("--port", type=int, help="the page's port, by default one that is free")

    def run(self, options: argparse.Namespace) -> int:
        """Print until the kernel ends or the user leaves."""
        if options.port is not None and not options.web:
            raise CurveKernelError("--port is the page's, and there is none", "add --web")
        path = self.find(options)
        name, end = Path(path).name, until(connection_file.read(path))
        client = BlockingKernelClient(session=WholeSession())
        client.load_connection_info(connection_file.read(path))
        connected(path, lambda: client.start_channels(shell=False, stdin=False, control=False))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a character that this terminal does not have
        printer = Printer(color=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        ends = f", {show(end)}" if end else ""
        try:
            shown = _serve(short_name(path), options.port or 0) if options.web else printer
            printer.note(f"watching {name}, read-only{ends}; Ctrl-C leaves")
            connected(path, lambda: self._follow(client, path, shown))
            if options.web:
                printer.note("the kernel has ended; Ctrl-C ends the page")
                threading.Event().wait()
        except KeyboardInterrupt:
            printer.note("left; the kernel goes on")
        finally:
            client.stop_channels()
        return 0

    @staticmethod
    def _follow(client: BlockingKernelClient, path: str, printer: Printer | Page) -> None:
        pulse, session, forged = Pulse(client, path), None, 0
        for _ in until_interrupted():
            try:
                message = client.get_iopub_msg(timeout=1)
                # Each process of a kernel has a session of its own.
                before, session = session, message["header"]["session"]
                if before not in (None, session):
                    printer.note("the kernel was restarted")
                printer.show(message)
            except CurveKernelError:
                raise
            except queue.Empty:
                if pulse.has_ended():
                    printer.note("the kernel has ended")
                    return
                if pulse.silence > pulse.SILENCE:
                    raise CurveKernelError(
                        f"the kernel has not answered for {pulse.SILENCE:.0f} seconds",
                        "it hangs, or the network between is down",
                    ) from None
            except Exception as error:  # noqa: BLE001  what a kernel sends must not end its watchers
                forged += "Invalid Signature" in str(error)
                if session is None and forged == _FORGED:
                    raise CurveKernelError(
                        f"the kernel signs its messages with another key than {path} has",
                        "get the kernel's new connection file",
                    ) from None
                printer.note("a malformed message was left out")


def _serve(name: str, port: int) -> Page:
    """Serve a page, say where, and return what it shows."""
    try:
        from .web import WebServer
    except ImportError as error:
        raise CurveKernelError(
            f"the page needs nbconvert, which is not installed here ({error})",
            "python -m pip install nbconvert",
        ) from None
    page = Page(name)
    print(f"Open in a browser on this machine: {WebServer(page, port).url}", flush=True)  # noqa: T201
    return page

"""Jupyter's terminal console, on a kernel that runs already and that outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from jupyter_client.consoleapp import JupyterConsoleApp
from jupyter_console.app import ZMQTerminalIPythonApp
from jupyter_console.ptshell import ZMQTerminalInteractiveShell
from traitlets import TraitError
from traitlets.config.loader import ArgumentError

from ..errors import CurveKernelError
from .printer import CleanSession
from .pulse import Pulse
from .shell import ConsoleClient, CurveShell
from .ssh import ssh_tunnel

__all__ = ["CurveConsoleApp"]

_STARTS_KERNELS = {"existing", "connection_file", "kernel_name", "transport", "ip"}


class CurveConsoleApp(ZMQTerminalIPythonApp):
    """``jupyter console --existing``, with a client that has a key pair of its own."""

    info: dict[str, Any]
    """The connection file's content."""
    tunnel: subprocess.Popen[bytes] | None = None
    _terminal: Any = None

    def check_options(self, options: Sequence[str]) -> None:
        """Make sure that each of *options* is ``--Class.trait=value`` and has a meaning here.

        Raises
        ------
        CurveKernelError
            If one has not.
        """
        classes = {
            cls.__name__: cls.class_traits(config=True)
            for cls in (*type(self).mro(), ZMQTerminalInteractiveShell)
            if hasattr(cls, "class_traits")
        }
        known = [
            f"--{name}.{trait}"
            for name, traits in classes.items()
            for trait in traits
            if trait not in _STARTS_KERNELS and not trait.endswith("_port")
        ]
        for option in options:
            name, equals, _ = option.partition("=")
            if name not in known:
                close = get_close_matches(name, known, 1)
                raise CurveKernelError(
                    f"console has no option {name}",
                    f"did you mean {close[0]}=VALUE" if close else "see console --help",
                )
            if not equals:
                raise CurveKernelError(f"{name} has no value", f"write {name}=VALUE, in one word")

    def load_config_file(self, suppress_errors: bool = False) -> None:  # noqa: ARG002
        """Load the configuration files; stock's console goes on without one that is broken.

        Raises
        ------
        CurveKernelError
            If one can't be loaded, or the one of --config is not there.
        """
        if self.config_file and not os.path.isfile(self.config_file):  # noqa: PTH113
            raise CurveKernelError(
                f"there is no configuration file {self.config_file}", "give the path of one to --config"
            )
        self.raise_config_file_errors = True
        try:
            super().load_config_file(suppress_errors=False)
        except Exception as error:  # noqa: BLE001  what is in it may raise anything
            raise CurveKernelError(
                f"a configuration file of the console can't be loaded: {error}",
                f"it is {self.config_file}" if self.config_file else f"see {self.config_dir}",
            ) from None

    def exit(self, exit_status: int | str | None = 0) -> None:
        """End; a value that traitlets refuses is an error like others, not a line in the log."""
        if isinstance(error := sys.exc_info()[1], (TraitError, ArgumentError)):
            raise CurveKernelError(str(error), "see console --help") from None
        super().exit(exit_status)

    def _session_default(self) -> CleanSession:
        return CleanSession(parent=self)

    def init_connection_file(self) -> None:
        """Leave `info` as it was given."""

    def init_ssh(self) -> None:
        """Forward the kernel's ports through ssh, if --ssh or --sshkey says so."""
        if self.sshserver or self.sshkey:
            self.tunnel, ports = ssh_tunnel(self.info, self.sshserver, self.sshkey)
            self.info |= ports

    def init_kernel_manager(self) -> None:
        """Start no kernel."""
        self.kernel_manager = None

    def init_kernel_client(self) -> None:
        """Connect. JupyterConsoleApp's own method drops the keys."""
        client = self.kernel_client = ConsoleClient(session=self.session, parent=self)
        client.load_connection_info(self.info)
        client.start_channels()
        client.pulse = Pulse(client, self.connection_file)

    def init_shell(self) -> None:
        """Connect and make the shell."""
        with contextlib.suppress(termios.error, OSError, ValueError):
            self._terminal = termios.tcgetattr(sys.stdin)
        JupyterConsoleApp.initialize(self)
        signal.signal(signal.SIGINT, self.handle_sigint)
        self.shell = CurveShell.instance(
            parent=self, client=self.kernel_client, confirm_exit=self.confirm_exit
        )

    def handle_sigint(self, *_: Any) -> None:
        """Interrupt what this console runs; the third time, wait for it no longer."""
        shell = getattr(self, "shell", None)
        if shell is None or not shell._executing:
            raise KeyboardInterrupt
        shell.interrupts += 1
        if shell.interrupts > 2:
            print("\nnot interrupted; the kernel goes on with it", file=sys.stderr)  # noqa: T201
            raise KeyboardInterrupt
        client = self.kernel_client
        client.control_channel.send(client.session.msg("interrupt_request", {}))

    def check(self) -> None:
        """Make sure that the kernel accepts this client, and that the tunnel stands.

        Raises
        ------
        CurveKernelError
            If not.
        """
        if self.tunnel_has_ended():
            raise CurveKernelError(
                f"the ssh connection to {self.sshserver} has ended", "the kernel goes on: connect again"
            )
        if self.kernel_client.refusal is not None:
            raise self.kernel_client.refusal

    def tunnel_has_ended(self) -> bool:
        """Tell whether there was a tunnel and is no more."""
        return self.tunnel is not None and self.tunnel.poll() is not None

    def restore_terminal(self) -> None:
        """Set the terminal to what it was at the start."""
        if self._terminal is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._terminal)

    def close(self) -> None:
        """Disconnect, and end the tunnel."""
        client = getattr(self, "kernel_client", None)
        if client is not None and client.channels_running:
            client.stop_channels()
        if self.tunnel is not None:
            self.tunnel.terminate()
            self.tunnel.wait()

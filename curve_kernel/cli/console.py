"""Jupyter's terminal console, on a kernel that runs already and that outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from jupyter_client.consoleapp import JupyterConsoleApp
from jupyter_console.app import ZMQTerminalIPythonApp
from jupyter_console.ptshell import ZMQTerminalInteractiveShell
from jupyter_console.utils import run_sync
from prompt_toolkit.application import run_in_terminal

from ..client import BlockingKernelClient
from ..errors import CurveKernelError, fail
from .leaving import is_exit, keep_kernel
from .printer import CleanSession
from .pulse import Pulse
from .ssh import ssh_tunnel
from .whose import whose

__all__ = ["CurveConsoleApp", "CurveShell"]

_INTERVAL = 0.5
# Seconds after which the console asks once more which process of the kernel is there.
_ASK_AGAIN = 5.0
_ENDED = CurveKernelError(
    "the kernel has ended", "python -m curve_kernel status shows which kernels run"
)
_STARTS_KERNELS = {"existing", "connection_file", "kernel_name", "transport", "ip"}


class ConsoleClient(BlockingKernelClient):
    """A client that tells a kernel which was restarted, or has ended, from one that is busy.

    To stock a heartbeat that is late is the end of the kernel, and what a cell prints later is lost.
    """

    pulse: Pulse
    restarted = False
    """Whether the kernel is another process than it was when this was set to False."""
    _session_of_kernel = ""
    _connections_seen = 0
    _asked: float | None = None

    def is_alive(self) -> bool:
        """Tell whether there may come an answer to what was sent."""
        self.settled()
        return self.refusal is None and not self.restarted and not self.pulse.has_ended()

    async def _receive(self, channel: Any, timeout: float | None = None) -> dict[str, Any]:
        while True:
            try:
                return await super()._receive(channel, timeout)
            except (CurveKernelError, queue.Empty):
                raise
            except Exception:  # noqa: BLE001, S110  one bad message spoils nothing else
                pass

    def settled(self) -> bool:
        """Find out which process of the kernel is there; tell whether that is known."""
        if self.refusal is not None:
            return False
        control = self.control_channel
        if self.connected and self.connections != self._connections_seen:
            self._connections_seen, self._asked = self.connections, time.monotonic()
            # libzmq subscribes again when the socket is next used, and that has to come first.
            self.iopub_channel.msg_ready()
            control.send(self.session.msg("kernel_info_request", {}))
        while control.msg_ready():
            # Each process of a kernel has a session of its own.
            with contextlib.suppress(LookupError, TypeError, ValueError, RecursionError):
                session = control.get_msg()["header"]["session"]
                before, self._asked = self._session_of_kernel, None
                self._session_of_kernel = session
                self.restarted |= before not in ("", session)
        # A kernel need not answer this on control, and loses what comes too early while it starts.
        unanswered = 0.0 if self._asked is None else time.monotonic() - self._asked
        if unanswered > _ASK_AGAIN:
            self._connections_seen = 0
        return self.connected and (self._asked is None or unanswered > 1)


class CurveShell(ZMQTerminalInteractiveShell):
    """The prompt. Leaving it leaves the kernel alive."""

    parent: CurveConsoleApp
    use_kernel_is_complete: Any
    other_output_prefix: Any
    is_remote = False
    """Whether the message that is shown comes of another client's request."""
    problem: CurveKernelError | None = None
    """Why the kernel can't be talked to any more."""
    _awaited = ""

    def __init__(self, **kwargs: Any) -> None:
        self.keepkernel = True
        self.interrupts = 0
        super().__init__(**kwargs)

    def init_kernel_info(self) -> None:
        """Wait for the kernel, and learn which process it is."""
        super().init_kernel_info()
        deadline = time.monotonic() + Pulse.SILENCE
        while not self.client.settled() and self.client.refusal is None:
            if self.client.pulse.has_ended():
                raise _ENDED
            if time.monotonic() > deadline:
                return  # `_watch_kernel` looks on
            time.sleep(0.01)

    def show_banner(self) -> None:
        """Print upstream's banner, and how to leave."""
        super().show_banner()
        ends = "; exit(keep_kernel=False) ends it" if self._is_python() else ""
        print(f"\nexit, quit and Ctrl-D leave the kernel running{ends}.")  # noqa: T201

    def _is_python(self) -> bool:
        return bool(self.kernel_info.get("language_info", {}).get("name") == "python")

    def run_cell(self, cell: str, store_history: bool = True) -> None:
        """Run a cell. ``exit`` in it leaves this console; by itself it would end the kernel, too."""
        if cell and is_exit(cell):
            self.ask_exit()
            return
        if cell and self._is_python():
            cell = keep_kernel(cell)
        deadline = time.monotonic() + Pulse.SILENCE
        while cell and not self.client.settled() and time.monotonic() < deadline:
            if self.client.refusal is not None:
                return
            time.sleep(0.05)  # the kernel restarts
        if self.client.restarted:
            self._tell_restart()
        self.interrupts = 0
        try:
            super().run_cell(cell, store_history)
        finally:
            self._executing = False

    def check_complete(self, code: str) -> tuple[bool, str]:
        """Ask the kernel whether *code* is complete; one that is busy or gone does not say."""
        while self.client.shell_channel.msg_ready():
            self.client.shell_channel.get_msg()  # an answer that came too late
        asks: bool = self.use_kernel_is_complete
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            more, indent = super().check_complete(code)
        self.use_kernel_is_complete = asks
        return more, indent

    def handle_execute_reply(self, msg_id: str, timeout: float | None = None) -> None:
        """Take the reply to *msg_id*; one to another request has come too late, and is left out.

        Upstream's would take it for the reply, and the cell's output would wait for the next input.
        """
        channel = self.client.shell_channel
        message = run_sync(channel.get_msg)(timeout=timeout)
        if message["parent_header"].get("msg_id") != msg_id:
            raise queue.Empty

        async def get_msg(**_: Any) -> Any:
            return message

        channel.get_msg = get_msg
        try:
            super().handle_execute_reply(msg_id, timeout=timeout)
        finally:
            del channel.get_msg

    def handle_iopub(self, msg_id: str = "") -> None:
        """Show what the kernel publishes; what can't be shown is left out."""
        self._awaited = msg_id
        while True:
            try:
                super().handle_iopub(msg_id)
            except (CurveKernelError, queue.Empty):
                raise
            except Exception:  # noqa: BLE001  one bad message spoils nothing else
                print("[a malformed message was left out]")  # noqa: T201
            else:
                return

    def include_output(self, msg: dict[str, Any]) -> bool:
        """Tell whether to show a message, and with whose name, if it is of another client."""
        is_status = msg["header"]["msg_type"] == "status"
        if is_status and self._awaited and msg["parent_header"].get("msg_id") != self._awaited:
            return False  # that an earlier request is done does not say so of this one
        self.other_output_prefix = f"{whose(msg) or 'Remote'} "
        self.is_remote = not self.from_here(msg)
        return bool(super().include_output(msg))

    # Upstream's two go past the standard output, which is held back while there is a prompt, and so
    # come behind the text that they are in front of.

    def print_remote_prompt(self, ec: int | None = None) -> None:
        """Print whose the input is; the prompt itself is there already."""
        if ec is not None:
            sys.stdout.write(f"{self.other_output_prefix}In [{ec}]: ")

    def print_out_prompt(self) -> None:
        """Print what is in front of a result."""
        if self.is_remote:
            sys.stdout.write(f"Out[{self.execution_count}]: ")
        else:
            super().print_out_prompt()

    async def interact(self, loop: Any = None, display_banner: Any = None) -> None:
        """Prompt and run, until the user leaves or the kernel can't be talked to any more."""
        watching = asyncio.create_task(self._watch_kernel())
        try:
            await super().interact(loop, display_banner)
        except CurveKernelError as error:
            self.problem = error
        finally:
            watching.cancel()

    async def _watch_kernel(self) -> None:
        while True:
            try:
                if self.client.pulse.has_ended() and not self.parent.tunnel_has_ended():
                    raise _ENDED
                self.parent.check()
            except CurveKernelError as error:
                if self._leave(error):
                    return
            self.client.settled()
            if self.client.restarted:
                await run_in_terminal(self._tell_restart)
            await asyncio.sleep(_INTERVAL)

    def _leave(self, error: CurveKernelError) -> bool:
        """End the prompt, if there is one just now."""
        if self.pt_cli is not None:
            prompt = self.pt_cli.app.future
            if prompt is None or prompt.done():
                return False
            self.pt_cli.app.exit(exception=error)
            return True
        # The simple prompt reads in a thread that nothing can stop.
        self.parent.restore_terminal()
        print()  # noqa: T201
        with contextlib.suppress(SystemExit):
            fail(error)
        os._exit(1)

    def _tell_restart(self) -> None:
        self.client.restarted = False
        print("\n[the kernel was restarted, its variables are gone]")  # noqa: T201

    def mainloop(self) -> None:
        """Run until the user leaves; raise what ended it otherwise.

        Raises
        ------
        CurveKernelError
            If the kernel has ended, or does not accept this client any more.
        """
        while True:
            try:
                asyncio.run(self._main_task())
                break
            except KeyboardInterrupt:
                print("\nKeyboardInterrupt")  # noqa: T201
        if self.problem is not None:
            raise self.problem
        if self.keepkernel:
            print("left; the kernel goes on")  # noqa: T201
        else:
            self.client.shutdown()
            print("the kernel ends, as you said")  # noqa: T201


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

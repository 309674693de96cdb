"""The shell of Jupyter's terminal console on a kernel that runs already, and its client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sys
import time
import warnings
from typing import Any

from jupyter_console.ptshell import ZMQTerminalInteractiveShell
from jupyter_console.utils import run_sync
from prompt_toolkit.application import run_in_terminal

from ..client import BlockingKernelClient
from ..errors import CurveKernelError, fail
from .leaving import is_exit, keep_kernel
from .pulse import Pulse
from .whose import whose

__all__ = ["ConsoleClient", "CurveShell"]

_INTERVAL = 0.5
# Seconds after which the console asks once more which process of the kernel is there.
_ASK_AGAIN = 5.0
_ENDED = CurveKernelError(
    "the kernel has ended", "python -m curve_kernel status shows which kernels run"
)


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

    parent: Any  # console.CurveConsoleApp
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

"""What is to be done when the process ends, also when a signal ends it."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from os import getpid, kill
from signal import SIG_BLOCK, SIG_DFL, SIG_SETMASK, getsignal, pthread_sigmask
from signal import signal as set_handler

__all__ = ["call_at_end", "what_ends_it"]

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def call_at_end(function: Callable[[], None]) -> None:
    """Call *function* when this process exits, or one of three signals ends it; not in forked children.

    The signal ends the process all the same, so that the parent sees which. One that is ignored, as
    under nohup, or has a handler, is left alone. Python runs a handler between two of its own steps:
    while an extension holds the interpreter lock, only SIGKILL ends the process.
    """
    process = os.getpid()
    masks = threading.local()

    def call() -> None:
        if getpid() == process:
            function()

    def end(number: int, _frame: object) -> None:
        call()
        set_handler(number, SIG_DFL)
        if getpid() == 1:  # which the default of a signal does not end, in a container
            os._exit(128 + number)
        kill(getpid(), number)

    # After a fork Python forgets a signal that the child's C handler has taken by then, so in the child
    # the signals wait until they have their default again.
    def block() -> None:
        masks.before = pthread_sigmask(SIG_BLOCK, _ENDING)

    def unblock() -> None:
        pthread_sigmask(SIG_SETMASK, masks.before)

    def reset() -> None:
        for number in _ENDING:
            if getsignal(number) is end:
                with contextlib.suppress(ValueError):
                    set_handler(number, SIG_DFL)
        unblock()

    atexit.register(call)
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in _ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


def what_ends_it() -> str:
    """Say how this kernel can be ended, and how it outlives its terminal."""
    process = os.getpid()
    text = f"The kernel, process {process}, ends on Ctrl-\\ or `kill {process}`"
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        text += (
            ",\nand with this terminal (SIGHUP). To keep it, start it in tmux, or with nohup or"
            " setsid: see docs/remote.md"
        )
    return text

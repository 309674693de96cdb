"""A logger that waits for nobody.

Standard error may be a pipe that nobody reads, or a terminal that stands still. What the thread of
`monitor` logs must not make it wait there: while it does, nobody is let in or thrown out.
"""

from __future__ import annotations

import atexit
import logging
from _thread import allocate_lock
from contextlib import suppress
from os import _exit, getpid
from queue import SimpleQueue
from threading import Thread, Timer
from typing import Any

__all__ = ["QueuedLog"]

# Lines that wait to be handed on; what comes then is not logged. And seconds for which `flush` waits,
# and for which the process waits at its end.
_MOST, _PATIENCE, _LAST = 10_000, 2.0, 1.0


class QueuedLog(logging.Logger):
    """Hands on what it is told in a thread of its own.

    Parameters
    ----------
    log : logging.Logger or logging.LoggerAdapter
        Is handed it.
    """

    def __init__(self, log: Any) -> None:
        target: logging.Logger = log.logger if isinstance(log, logging.LoggerAdapter) else log
        super().__init__(target.name)
        self._target = target
        self._waiting: SimpleQueue[Any] = SimpleQueue()
        self._handing_on = Thread(target=self._run, name="curve_kernel log", daemon=True)
        vars(self._handing_on).update(pydev_do_not_trace=True, is_pydev_daemon_thread=True)
        self._handing_on.start()
        self._pid = getpid()
        atexit.register(self._end)

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802
        """Tell whether a line of that level is logged."""
        return self._target.isEnabledFor(level)

    def getEffectiveLevel(self) -> int:  # noqa: N802
        """Return the level from which on lines are logged."""
        return self._target.getEffectiveLevel()

    def handle(self, record: logging.LogRecord) -> None:
        """Take in a line."""
        if self._waiting.qsize() < _MOST:
            self._waiting.put(record)

    def flush(self, patience: float = _PATIENCE) -> bool:
        """Wait until all lines are handed on, so many seconds at most; return whether they are."""
        done = allocate_lock()
        done.acquire()
        self._waiting.put(done)
        return not self._handing_on.is_alive() or done.acquire(timeout=patience)

    def _end(self) -> None:
        """Make sure that the process ends: `logging` would wait for the line that nobody reads."""
        if getpid() == self._pid and not self.flush(_LAST):
            timer = Timer(_LAST, _exit, (1,))
            timer.daemon = True
            timer.start()

    # Thread: its own

    def _run(self) -> None:
        while True:
            item = self._waiting.get()
            with suppress(Exception):
                if isinstance(item, logging.LogRecord):
                    self._target.handle(item)
                else:
                    item.release()

"""The record of what clients did, for those who must keep one, by way of `jupyter_events`.

Nothing imports this module unless the kernel is to keep a record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from time import sleep
from typing import Any

from jupyter_events import EventLogger

from ..errors import CurveKernelError

__all__ = ["SCHEMA_ID", "Record"]

SCHEMA_ID = "https://events.jupyter.org/curve_kernel/access/v1"

# Events that wait to be written, at most: a disk may hang.
_QUEUE = 100_000
# Seconds in which further events may come, once all are written.
_REST = 0.25
# Characters of what a client chooses.
_CHOSEN = 128
# What root has prepared for several users counts.
_TRUSTED = (0, os.geteuid())

_Event = tuple[datetime, dict[str, str]]


class _File(logging.Handler):
    """Appends lines to a file, each in one step; opened again when something else has its name."""

    def __init__(self, path: Path, log: logging.Logger) -> None:
        super().__init__()
        self._path, self._log = path, log
        self._descriptor, self._file = -1, (0, 0)
        self._is_torn = False
        self.problem = ""
        """Why the last event could not be written, or empty."""
        self.seen = 0
        """Events that came here."""
        self.lost = 0
        """Events that could not be written, since the start."""
        self._open()

    def _open(self) -> None:
        # O_NONBLOCK: a FIFO without a reader is an error at once.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        if self._path.is_symlink() and self._path.lstat().st_uid not in _TRUSTED:
            raise OSError(0, "it is a link that another user has made")
        descriptor = os.open(self._path, flags, 0o600)
        if problem := _problem(descriptor):
            os.close(descriptor)
            raise OSError(0, problem)
        if self._is_ours(self._descriptor):
            os.close(self._descriptor)
        status = os.fstat(descriptor)
        self._descriptor, self._file = descriptor, (status.st_dev, status.st_ino)

    def _is_ours(self, where: int | Path) -> bool:
        """Whether a descriptor or a path is still the file that was opened."""
        try:
            status = os.stat(where)  # noqa: PTH116  a path has no descriptors
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._file

    def emit(self, record: logging.LogRecord) -> None:
        """Write one event."""
        self.write(self.format(record))

    def write(self, text: str) -> None:
        """Write one event; a problem is logged when it begins and when it is over."""
        self.seen += 1
        line = f"{text}\n".encode()
        try:
            if not (self._is_ours(self._path) and self._is_ours(self._descriptor)):
                # Code in a cell may have closed it, and its number may be another file's by now.
                self._open()
            line = b"\n" + line if self._is_torn else line
            if os.write(self._descriptor, line) < len(line):
                self._is_torn = True
                raise OSError(0, "only a part of an event could be written")
            self._is_torn = False
        except (OSError, ValueError) as error:
            self.failed(getattr(error, "strerror", None) or type(error).__name__)
            return
        if self.problem:
            self.problem = ""
            self._log.warning(
                "The record %s is written again; %d events are lost", self._path, self.lost
            )

    def failed(self, problem: str) -> None:
        """Take note that an event is lost."""
        self.lost += 1
        if problem != self.problem:
            self.problem = problem
            self._log.error(
                "The record %s can't be written, and the kernel goes on: %s", self._path, problem
            )


def _problem(descriptor: int) -> str:
    """Return why others could change what is recorded, or read it by a pipe of theirs, or empty."""
    status = os.fstat(descriptor)
    try:
        has_name = os.readlink(f"/proc/self/fd/{descriptor}").startswith("/")  # noqa: PTH115
    except OSError:
        has_name = True
    if stat.S_ISCHR(status.st_mode) or not has_name:  # a terminal, or a pipe that it was started with
        return ""
    if status.st_uid not in _TRUSTED:
        return "it belongs to another user"
    is_file = stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)
    if is_file and status.st_uid == os.geteuid() and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it, its mode is {stat.S_IMODE(status.st_mode):04o}"
    return ""


class Record:
    """Writes events: requests at once, and everything else in a thread of its own.

    Parameters
    ----------
    path : Path
        The file, absolute. It is made with mode 0600, and appended to.
    kernel_id : str
        Stands in each event.
    log : logging.Logger
        Is told when the file can't be written.
    with_code : bool
        Record the code that clients run, and not only its hash.

    Raises
    ------
    CurveKernelError
        If the file can't be opened.
    """

    def __init__(self, path: Path, kernel_id: str, log: logging.Logger, *, with_code: bool) -> None:
        self.path = path
        self._kernel_id = kernel_id
        self._with_code = with_code
        try:
            self._file = _File(path, log)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "that is no file's name"
            raise CurveKernelError(
                f"audit_log {path} can't be written: {reason}",
                "name a file in a folder that you can write",
            ) from None
        self._events = EventLogger(handlers=[self._file])
        self._events.register_event_schema(Path(__file__).with_name("record.yaml"))
        self._pid = os.getpid()
        self._lock = Lock()
        self._forms: dict[tuple[str, ...], dict[str, Any]] = {}
        self._queue: SimpleQueue[_Event | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="curve_kernel record", daemon=True)
        vars(self._thread).update(pydev_do_not_trace=True, is_pydev_daemon_thread=True)
        self._thread.start()

    def event(self, action: str, channel: str, **properties: str) -> None:
        """Record that something happened; properties that are empty are left out."""
        if self._queue.qsize() > _QUEUE or not self._thread.is_alive():
            self._file.failed("it is too slow" if self._thread.is_alive() else "its thread has ended")
            return
        self._queue.put(self._made(action, channel, properties))

    def _made(self, action: str, channel: str, properties: dict[str, str]) -> _Event:
        now = datetime.now(timezone.utc).replace(tzinfo=None)  # jupyter_events writes a Z behind it
        found = {name: value for name, value in properties.items() if value}
        return now, {"action": action, "kernel_id": self._kernel_id, "channel": channel, **found}

    def request(self, channel: str, message: Mapping[str, Any], **properties: str) -> None:
        """Record a client's request, before it is handled: it may end the process.

        Those of widgets, which may be a thousand in a second, are recorded within a quarter of one.
        """
        properties["msg_type"] = str(message["msg_type"])[:_CHOSEN]
        properties["msg_id"] = str(message["msg_id"])[:_CHOSEN]
        content = message["content"]
        if message["msg_type"] == "execute_request" and isinstance(content, dict):
            code, further = content.get("code"), content.get("user_expressions")
            if isinstance(code, str):
                properties |= self._of_code("code", code)
            if further:
                properties |= self._of_code("user_expressions", json.dumps(further, sort_keys=True))
        if str(message["msg_type"]).startswith("comm_"):
            self.event("request", channel, **properties)
        else:
            self._write(*self._made("request", channel, properties))

    def _of_code(self, name: str, code: str) -> dict[str, str]:
        found = {f"{name}_sha256": hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()}
        return found | ({name: code} if self._with_code else {})

    @property
    def status(self) -> str:
        """The file, or why the last event could not be written, and how many are lost."""
        if not self._file.problem:
            return str(self.path)
        return f"NOT WRITTEN: {self._file.problem} ({self._file.lost} events are lost)"

    def _write(self, now: datetime, data: dict[str, str]) -> None:
        form = data["action"], data["channel"], *data
        with self._lock:
            try:
                if (known := self._forms.get(form)) is None:
                    self._forms[form] = self._write_first(now, data)
                else:
                    event = {**known, "__timestamp__": f"{now.isoformat()}Z", **data}
                    self._file.write(json.dumps(event))
            except Exception as error:  # noqa: BLE001  the next one may be written
                self._file.failed(repr(error))

    def _write_first(self, now: datetime, data: dict[str, str]) -> dict[str, Any]:
        """Write the first event of a form, and return what jupyter_events adds to it.

        Of one action and channel, with these properties, all are valid if the first is: each value is
        a text, and what it says is not restricted. To have each validated takes 0.2 ms.
        """
        before = self._file.seen
        event = self._events.emit(schema_id=SCHEMA_ID, data=data, timestamp_override=now) or {}
        if self._file.seen == before:
            # Code in a cell may have disabled logging, or all loggers that are there.
            self._file.handle(logging.makeLogRecord({"msg": event}))
        return {name: value for name, value in event.items() if name.startswith("__")}

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            self._write(*event)
            if self._queue.empty():
                sleep(_REST)  # rather than wake up for each

    def close(self) -> None:
        """Write what waits still, for five seconds at most."""
        if os.getpid() == self._pid:
            self._queue.put(None)
            self._thread.join(5)

"""How many files the kernel may have open, and what that leaves for connections."""

from __future__ import annotations

import logging
import resource
import sys

from .limits import Limits

__all__ = ["within_open_files"]

_OPEN_FILES = 8192


def within_open_files(limits: Limits, log: logging.Logger) -> Limits:
    """Make room for more open files, if that is allowed, and keep *limits* within what there is.

    libzmq accepts faster than connections can be disconnected, and code must always be able to open a
    file. Each connection takes two descriptors.
    """
    soft, unlimited = 1024, resource.RLIM_INFINITY
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = _OPEN_FILES if hard == unlimited else min(hard, _OPEN_FILES)
        if soft != unlimited and soft < room:
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
            soft = room
    except (OSError, ValueError) as error:  # in a sandbox
        log.warning(
            "The limit of open files can't be read or raised, and is taken as %d: %s", soft, error
        )
    files = max(soft, 8) if soft != unlimited else sys.maxsize
    return limits._replace(
        handshakes=min(limits.handshakes, files // 4), connections=min(limits.connections, files // 8)
    )

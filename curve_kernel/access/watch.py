"""Notices that a folder tree may have changed: at once by inotify, and by a slow look everywhere.

inotify tells of what this machine does to a file system of its own. What another host does to a network
file system, or a mount, it does not tell, so there is a look at intervals too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from os import O_CLOEXEC, O_NONBLOCK, close, fspath, getpid, read
from pathlib import Path
from typing import Any

from ..private_os import os

__all__ = ["FolderWatch"]

# Seconds between two looks: where inotify tells of everything that can be expected, and elsewhere.
_RARELY, _OFTEN = 30.0, 1.0

# linux/inotify.h
_MODIFY, _ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO = 0x2, 0x4, 0x8, 0x40, 0x80
_CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF, _DONT_FOLLOW = 0x100, 0x200, 0x400, 0x800, 0x2000000
_ITSELF = _ATTRIB | _DELETE_SELF | _MOVE_SELF | _DONT_FOLLOW
_APPEARS = _CREATE | _MOVED_TO
_INSIDE = _APPEARS | _MODIFY | _CLOSE_WRITE | _MOVED_FROM | _DELETE

# linux/magic.h: file systems of one machine. Below a container's overlay, the host may change files.
_LOCAL = {
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # xfs
    0x9123683E,  # btrfs
    0x01021994,  # tmpfs
    0x2FC12FC1,  # zfs
    0xF2F52010,  # f2fs
    0xCA451A4E,  # bcachefs
}

_libc: Any = None
with suppress(ImportError, OSError):  # a Python may have been built without it
    import ctypes

    _libc = ctypes.CDLL(None, use_errno=True)


class FolderWatch:
    """Watches a folder, folders in it, and every folder and link on the way there.

    Parameters
    ----------
    folder : Path
        Absolute. It need not exist.
    inside : iterable of str
        The names of the folders in it whose files count.
    """

    def __init__(self, folder: Path, inside: Iterable[str]) -> None:
        self._folder = folder
        self._inside = tuple(inside)
        self._watches: set[int] = set()
        self.interval = _OFTEN
        """Seconds after which a look is due though nothing was told."""
        self.descriptor = -1
        """Readable when something was told; -1 where there is no inotify."""
        with suppress(AttributeError):
            self.descriptor = _libc.inotify_init1(O_CLOEXEC | O_NONBLOCK)
        self._pid = getpid()
        self._watch()

    def take(self) -> None:
        """Take what was told. Look at the folder afterwards, not before."""
        with suppress(BlockingIOError):
            while self.descriptor >= 0:
                read(self.descriptor, 1 << 16)
        self._watch()

    def close(self) -> None:
        """Stop watching."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0 and getpid() == self._pid:
            close(descriptor)

    def _watch(self) -> None:
        """Watch what is there now, and no more what was there before."""
        if self.descriptor < 0:
            return
        watches, folders = set(), [self._folder, *(self._folder / name for name in self._inside)]
        # Where a link leads is not watched.
        complete = all(os.path.realpath(folder) == fspath(folder) for folder in folders)
        complete = complete and not any(map(_has_link, folders[1:]))
        for path, mask in self._paths(folders):
            watch = _libc.inotify_add_watch(self.descriptor, os.fsencode(path), mask)
            if watch >= 0:
                watches.add(watch)
            elif path in folders and os.path.exists(path):
                complete = False
        for watch in self._watches - watches:
            _libc.inotify_rm_watch(self.descriptor, watch)
        self._watches = watches
        self.interval = _RARELY if complete and all(map(_is_local, folders)) else _OFTEN

    def _paths(self, folders: list[Path]) -> Iterator[tuple[Path, int]]:
        real = Path(os.path.realpath(self._folder))
        # The same folder twice gets the mask of the last.
        for path in {*self._folder.parents, *real.parents} - {*folders, real}:
            yield path, _ITSELF
        for folder in [real, *folders]:
            there = folder
            while not os.path.lexists(there):
                there = there.parent
            yield there, (_ITSELF | _INSIDE if there == folder else _ITSELF | _APPEARS)


def _has_link(folder: Path) -> bool:
    try:
        with os.scandir(folder) as found:
            return any(entry.is_symlink() for entry in found)
    except OSError:
        return False


def _is_local(folder: Path) -> bool:
    """Whether *folder*, or where it will be, is on a file system of this machine only."""
    if _libc is None:
        return False
    while not os.path.exists(folder) and folder != folder.parent:  # raises nothing
        folder = folder.parent
    # The first word of struct statfs is the type; the whole has less than 256 bytes.
    status = (ctypes.c_ulong * 32)()
    if _libc.statfs(os.fsencode(folder), status):
        return False
    return status[0] in _LOCAL

"""Jupyter's configuration folder, and homes that are none."""

from __future__ import annotations

from pathlib import Path

from jupyter_core.paths import jupyter_config_dir

from .errors import CurveKernelError
from .private_os import os

__all__ = ["NOWHERE", "NoFolderError", "config_folder", "is_out_of_reach", "no_home"]


NOWHERE = f"{os.devnull}/curve"
"""A folder that can't exist."""


class NoFolderError(CurveKernelError):
    """There is no such folder, nor can it be made."""


def no_home(error: RuntimeError) -> NoFolderError:
    """Return what is wrong where `Path.expanduser` raised *error*, and raise any other."""
    if os.path.expanduser("~") != "~":  # it raises nothing
        raise error
    return NoFolderError(
        f"user {os.geteuid()} has no home folder: HOME is not set, and the system knows of none",
        "set HOME, or JUPYTER_CONFIG_DIR, JUPYTER_DATA_DIR and JUPYTER_RUNTIME_DIR, to folders that you"
        " can write",
    )


def config_folder() -> Path:
    """Return Jupyter's configuration folder, which need not exist.

    Raises
    ------
    NoFolderError
        If there is none, or one that Jupyter makes anew in each process.
    """
    if os.environ.get("JUPYTER_NO_CONFIG"):
        raise NoFolderError(
            "JUPYTER_NO_CONFIG is set, so every process has an empty configuration folder of its own",
            "unset JUPYTER_NO_CONFIG, and set JUPYTER_CONFIG_DIR if it is to be another folder",
        )
    try:
        return Path(jupyter_config_dir())
    except RuntimeError as error:
        raise no_home(error) from None


def is_out_of_reach(path: Path) -> bool:
    """Whether *path* is somewhere in a folder of another user's that this one may not enter.

    So is a home that is still another user's, as after ``sudo -u``, and one that an NFS server does
    not show to root.
    """
    for folder in reversed(path.parents):
        try:
            os.lstat(f"{folder}/.")  # fails unless it may be entered
        except PermissionError:
            return os.stat(folder).st_uid != os.geteuid()
        except OSError:
            return False
    return False

"""Which running kernel a command means, what it needs to connect, and why it can't."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from jupyter_core.paths import jupyter_runtime_dir

from .. import connection_file
from ..access.allowlist import AuthorizedClients
from ..client import KeyNotAuthorizedError, NobodyThereError
from ..errors import CurveKernelError, printable
from ..inspect import inspect_kernels
from ..keys.certificates import curve_folder, load_identity
from ..keys.expiry import show
from ..keys.ticket import ticket_pair, until
from .clients import make_identity

__all__ = ["connected", "find", "need_identity"]


def find(name: str | None) -> str:
    """Return the path of a kernel's connection file.

    Of several that fit it is the latest whose kernel runs.

    Parameters
    ----------
    name : str or None
        A path, the file's name or a part of it; None is any kernel in Jupyter's runtime folder. A name
        without a folder is looked for here, too. What others may write does not count.

    Raises
    ------
    CurveKernelError
        If no file fits, or none of several is of a kernel that runs and encrypts.
    """
    if name and (os.sep in name or name.startswith("~")):
        path = Path(os.path.expanduser(name))  # noqa: PTH111  there may be no home
        if not os.path.exists(path):  # noqa: PTH110  a name that is too long does not
            raise CurveKernelError(f"there is no connection file {name}", _HINT)
        return str(path.absolute())
    files = _fitting(name)
    if not files:
        if name is None:
            raise CurveKernelError(f"no kernel has a connection file in {jupyter_runtime_dir()}", _HINT)
        for path in (folder / name for folder in _folders()):
            if os.path.isfile(path):  # noqa: PTH113
                connection_file.read(path)  # says why it does not count
        raise CurveKernelError(f"there is no connection file {name}", _HINT)
    if len(files) > 1:
        kernels = inspect_kernels(files)
        spoken = [{channel["mechanism"] for channel in kernel.channels.values()} for kernel in kernels]
        running = [
            kernel.file for kernel, spoke in zip(kernels, spoken, strict=True) if "CURVE" in spoke
        ]
        if not running:
            which = f"{len(files)} connection files" + (f" that fit {name}" if name else "")
            plain = " that encrypts" if any("NULL" in spoke for spoke in spoken) else ""
            raise CurveKernelError(f"none of {which} is of a kernel that runs{plain}", _HINT)
        files = running
    return files[-1]


_HINT = "python -m curve_kernel status shows the kernels that run"


def _fitting(name: str | None) -> list[str]:
    """Return the files that *name* may mean, the latest last."""
    if name is None:
        files = Path(jupyter_runtime_dir()).glob("*.json")
        return _by_time(file for file in files if _is_connection_file(file))
    if "*" not in name:
        exact = [file for folder in _folders() if _is_connection_file(file := folder / name)]
        if exact:
            return _by_time(exact)
        name = f"*{name}*"
    pattern = name if name.endswith(".json") else f"{name}.json"
    found = set()
    with contextlib.suppress(ValueError, NotImplementedError, OSError):  # it is no pattern
        for folder in _folders():
            found |= {file for file in folder.glob(pattern) if _is_connection_file(file)}
    return _by_time(found)


def _folders() -> list[Path]:
    """Return where a name without a folder is looked for."""
    folders = [Path(jupyter_runtime_dir())]
    with contextlib.suppress(FileNotFoundError):  # the working directory was removed
        folders.insert(0, Path.cwd())
    return folders


def _is_connection_file(file: Path) -> bool:
    # A server's files are in the runtime folder, too. And what others may write does not count.
    try:
        return "shell_port" in connection_file.read(file)
    except CurveKernelError:
        return False


def _by_time(files: Iterable[Path]) -> list[str]:
    times = {}
    for file in files:
        with contextlib.suppress(OSError):  # its kernel has ended just now
            times[str(file)] = file.stat().st_mtime
    return sorted(times, key=lambda file: times[file])


def need_identity(path: str) -> None:
    """Make this user's identity, if a kernel's connection file needs it and it is missing."""
    info = connection_file.read(path)
    is_ticket = ticket_pair(info) is not None
    if is_ticket and (mode := stat.S_IMODE(Path(path).stat().st_mode)) & 0o077:
        warning = f"others may have the access too, since the mode of {path} is {mode:04o}"
        _tell(f"warning: {warning}: chmod 600 {shlex.quote(path)}")
    has_pair = is_ticket or bool(info.get("curve_secretkey"))
    if info.get("curve_publickey") and not has_pair and load_identity() is None:
        make_identity()
        where = shlex.quote(str(curve_folder() / "identity.key"))
        _tell(f"made your key pair, an owner of your own kernels: {where}")


def _tell(text: str) -> None:
    print(f"curve_kernel: {printable(text)}", file=sys.stderr)  # noqa: T201


def connected(path: str, connect: Callable[[], Any]) -> Any:
    """Return what *connect* does; an error then names the file or this user's certificate."""
    try:
        return connect()
    except NobodyThereError as error:
        raise NobodyThereError(f"{error.message}, as {path} has it", error.hint) from None
    except KeyNotAuthorizedError as error:
        info: dict[str, Any] = {}
        with contextlib.suppress(CurveKernelError):  # the kernel has just removed it
            info = connection_file.read(path)
        if (end := until(info)) is not None and end <= datetime.now().astimezone():
            raise KeyNotAuthorizedError(
                f"this access to the kernel {show(end)}", "ask the kernel's user to share it again"
            ) from None
        if ticket_pair(info) is not None:
            raise KeyNotAuthorizedError(
                "the kernel does not accept this ticket", "ask the kernel's user for another one"
            ) from None
        certificate = shlex.quote(str(curve_folder() / "identity.key"))
        if _reads_another_list(path):
            raise KeyNotAuthorizedError(
                error.message,
                f"it is your own kernel, but it does not list {certificate}: it was started with"
                " another JUPYTER_CONFIG_DIR, or HOME. `%curve` in its notebook shows the folder of"
                " its list; set JUPYTER_CONFIG_DIR to that folder's parent here",
            ) from None
        raise KeyNotAuthorizedError(
            error.message,
            f"send your certificate to the kernel's user, who can authorize it: {certificate}",
        ) from None


def _reads_another_list(path: str) -> bool:
    """Whether a kernel that rejected this user is this user's own, who is an owner in the list here."""
    identity, pid = load_identity(), inspect_kernels([path])[0].pid
    if identity is None or pid is None:
        return False
    client = AuthorizedClients(curve_folder(), str).find(identity.public_key)
    if client is None or client.role != "owner":
        return False
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)  # not ssh, which leads to somebody else's perhaps
        words = {Path(word).name for word in process.cmdline()}
        ours = not words.isdisjoint(("curve_kernel", "curve-kernel"))  # the module, and the script
        return ours and process.uids().effective == os.geteuid()
    return False

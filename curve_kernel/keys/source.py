"""Where the kernel's key pair comes from: the environment, a file, the connection file."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import shlex
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import files, trust
from ..errors import CurveKernelError
from .pair import KeyPair, parse

__all__ = ["PIPE", "SECRETKEY_FILE_VARIABLE", "SECRETKEY_VARIABLE", "EnvironmentSecret", "find"]

SECRETKEY_VARIABLE = "JUPYTER_CURVE_SECRETKEY"
SECRETKEY_FILE_VARIABLE = "JUPYTER_CURVE_SECRETKEY_FILE"

PIPE = "pipe:"
"""What the variable begins with if it names a pipe that holds the key, in place of the key."""

_WRAPPER = (
    "if a wrapper drops the environment (env -i, sudo, docker run, singularity --cleanenv), put"
    ' "key_distribution": "file" into the config of the kernelspec\'s kernel_provisioner'
)


class EnvironmentSecret:
    """What the environment said about the kernel's secret key, taken out of it for good.

    Making one reads ``$JUPYTER_CURVE_SECRETKEY`` and ``$JUPYTER_CURVE_SECRETKEY_FILE``, removes both
    from ``os.environ`` and, on Linux, overwrites their bytes in the process's initial environment
    block, so that neither a child process nor ``/proc/PID/environ`` shows them. What they mean is
    looked at in `pair`, later, when there is somebody to tell.

    Raises
    ------
    CurveKernelError
        If the secret can't be overwritten.
    """

    def __init__(self) -> None:
        _prevent_core_files()
        self._secret = _take(SECRETKEY_VARIABLE)
        self._file = _take(SECRETKEY_FILE_VARIABLE)
        self._pipe = ""
        if self._secret is not None and self._secret.startswith(f"{PIPE}/"):
            self._pipe = self._secret.removeprefix(PIPE)
            self._secret = _read_pipe(self._pipe)
        self._piped = None if self._file is None else _read_descriptor(self._file)

    def __repr__(self) -> str:
        return "EnvironmentSecret(<hidden>)"

    @property
    def given(self) -> bool:
        """Whether the environment had a key."""
        return self._secret is not None or self._file is not None

    def pair(self) -> tuple[KeyPair, str] | None:
        """Return the key pair and the name of the variable it comes from, or None if neither is set.

        Raises
        ------
        CurveKernelError
            If a value is no key, the file can't be trusted, or the two variables disagree.
        """
        pairs = []
        if self._pipe and not self._secret:
            raise CurveKernelError(
                f"pipe {self._pipe}, which ${SECRETKEY_VARIABLE} names, holds no key for this process",
                'put "key_distribution": "env", or "file", into the config of the kernelspec\'s'
                " kernel_provisioner: the kernel's wrapper keeps the pipe from it",
            )
        if self._secret is not None:
            secret_key = parse(self._secret, f"${SECRETKEY_VARIABLE}")
            pairs.append((KeyPair.from_secret(secret_key), f"${SECRETKEY_VARIABLE}"))
        if self._file is not None:
            if self._piped is None:
                secret_key = _read_secret_file(self._file)
            else:
                secret_key = parse(self._piped.strip(), f"the pipe in ${SECRETKEY_FILE_VARIABLE}")
            pairs.append((KeyPair.from_secret(secret_key), f"${SECRETKEY_FILE_VARIABLE}"))
        if not pairs:
            return None
        if pairs[0][0] != pairs[-1][0]:
            raise CurveKernelError(
                f"${SECRETKEY_VARIABLE} and ${SECRETKEY_FILE_VARIABLE} hold different keys",
                "set only one of the two",
            )
        return pairs[0]


def _prevent_core_files() -> None:
    """Keep the key out of core files: code can raise the limit again, and a debugger still attaches.

    With a limit of 1 the system starts no crash handler either, which one of 0 does not prevent
    (``man 5 core``). PR_SET_DUMPABLE would also take profilers, debuggers and the user's own view
    of /proc/PID away.
    """
    with contextlib.suppress(OSError, ValueError):  # a sandbox does not let it be changed
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))


def _read_pipe(path: str) -> str:
    """Return what a pipe of this user holds, which is gone from it then; empty if it can't be read."""
    try:
        pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError):
        return ""
    try:
        status = os.fstat(pipe)
        if not stat.S_ISFIFO(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            return ""
        return os.read(pipe, 100).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(pipe)


def _take(name: str) -> str | None:
    value = os.environ.get(name)
    if value is None:
        return None
    try:
        import ctypes
    except ImportError:  # a Python that was built without libffi
        del os.environ[name]
        with contextlib.suppress(OSError, ValueError, IndexError):
            _overwrite(os.fsencode(f"{name}={value}"))
    else:
        # Before anything calls setenv for it, libc's entry is the text that /proc/PID/environ reads.
        entries = list(_libc_entries(os.fsencode(name)))
        del os.environ[name]
        for address, size in entries:
            ctypes.memset(address, 0, size)
    block = Path("/proc/self/environ")
    entry = os.fsencode(f"{name}={value}")
    if block.exists() and entry in block.read_bytes().split(b"\0"):
        raise CurveKernelError(
            f"${name} can't be overwritten in this process's environment block",
            f"put the secret key into a file with mode 0600 and name it in ${SECRETKEY_FILE_VARIABLE}",
        )
    return value


def _overwrite(entry: bytes) -> None:
    """Overwrite what /proc/PID/environ shows, without ctypes."""
    block = b"\0" + Path("/proc/self/environ").read_bytes()
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start = int(fields[47])  # env_start, the 50th of proc(5)
    with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
        memory.seek(start + block.index(b"\0" + entry + b"\0"))
        memory.write(bytes(len(entry)))


def _libc_entries(name: bytes) -> Iterator[tuple[int, int]]:
    """Yield address and size of each ``name=value`` in libc's ``environ``."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    environ = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
    index = 0
    while (address := environ[index]) is not None:
        text = ctypes.string_at(address)
        if text.startswith(name + b"="):
            yield address, len(text)
        index += 1


def _read_descriptor(path: str) -> bytes | None:
    """Read and close the pipe that *path* names as ``/dev/fd/NUMBER``; None if it is something else.

    Now, since a pipe can be read once only, and the kernel's children would inherit what is left in it.
    """
    named = re.fullmatch(r"/dev/fd/(\d{1,5})", path)
    try:
        if named is None or not stat.S_ISFIFO(os.fstat(int(named[1])).st_mode):
            return None
        descriptor = int(named[1])
        # Its writer wrote before it started this process.
        found = os.read(descriptor, 128) if select.select([descriptor], [], [], 0)[0] else b""
        os.close(descriptor)
    except OSError:
        return None
    return found


def _read_secret_file(path: str) -> bytes:
    hint = f"${SECRETKEY_FILE_VARIABLE} must name a file of yours with mode 0600 that holds one key"
    name = f"secret-key file {path}"
    try:
        content, status = files.read(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CurveKernelError(f"{name} can't be read: {reason}", hint) from None
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise CurveKernelError(
            f"{name} can be read or written by others: its mode is {mode:04o}, not 0600",
            f"make it yours alone and put a new key into it: chmod 600 {shlex.quote(path)}",
        )
    if problem := trust.file_problem("secret-key file", path, status):
        raise problem
    return parse(content.strip(), name)


def find(
    environment: EnvironmentSecret, connection_info: Mapping[str, object] | None, file_name: str
) -> KeyPair:
    """Find the kernel's key pair, from the first source that has one.

    Parameters
    ----------
    environment : EnvironmentSecret
        What the environment variables said.
    connection_info : mapping or None
        The connection file's content, or None where there is no file yet and the kernel is its own
        launcher; then, without a variable, a fresh pair is made.
    file_name : str
        The connection file's name, for messages.

    Returns
    -------
    KeyPair

    Raises
    ------
    CurveKernelError
        If there is no pair, half a pair, a malformed key, or two sources that disagree.
    """
    given = environment.pair()
    if connection_info is None:
        return given[0] if given else KeyPair.generate()

    found = {
        field: parse(connection_info[field], f"{field} in connection file {file_name}")
        for field in ("curve_publickey", "curve_secretkey")
        if field in connection_info
    }
    public_key, secret_key = found.get("curve_publickey"), found.get("curve_secretkey")
    if public_key and secret_key and KeyPair.from_secret(secret_key).public_key != public_key:
        raise CurveKernelError(
            f"curve_publickey and curve_secretkey in connection file {file_name} are not a pair",
            "let the launcher make a new connection file, or remove both keys and the file's ports",
        )
    if given:
        pair, variable = given
        for field, in_file, in_variable in (
            ("curve_secretkey", secret_key, pair.secret_key),
            ("curve_publickey", public_key, pair.public_key),
        ):
            if in_file is not None and in_file != in_variable:
                raise CurveKernelError(
                    f"{variable} and {field} in connection file {file_name} are not of one key pair",
                    "remove one of the two, or make them agree",
                )
        return pair
    match public_key, secret_key:
        case None, None:
            raise CurveKernelError(
                f"connection file {file_name} has no CURVE keys: its launcher does not provide them",
                "VS Code, Positron, jpterm, Enterprise Gateway and jupyter_client < 7 ignore kernel"
                " provisioners: use a front end on jupyter_client >= 8.9 with a kernelspec made by"
                " `python -m curve_kernel install`, or one whose kernel manager has"
                f" transport_encryption=required; {_WRAPPER}; by hand, leave the file out, and the"
                " kernel makes its own keys",
            )
        case _, None:
            host, made = connection_info.get("hostname"), ""
            if isinstance(host, str) and host != socket.gethostname():
                # Whether that kernel runs is not seen from here, where a container has a new name too.
                made = f": a kernel on another host made it, {host[:64]}"
            raise CurveKernelError(
                f"connection file {file_name} holds only the public key, and no variable the secret"
                f"{made}",
                f"{_WRAPPER}; by hand, set ${SECRETKEY_VARIABLE} to the secret key that belongs to"
                " it, or remove the file if a kernel that has ended left it",
            )
        case None, _:
            raise CurveKernelError(
                f"connection file {file_name} holds curve_secretkey without curve_publickey",
                "add the public key that belongs to it, or let the launcher make a new file",
            )
    assert public_key is not None
    assert secret_key is not None
    return KeyPair(public_key, secret_key)

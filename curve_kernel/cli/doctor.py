"""``doctor``: is this environment able to encrypt, and if not, what to change."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import platform
import shlex
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import zmq
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.paths import jupyter_runtime_dir
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from .. import __version__, keys
from ..access.allowlist import AuthorizedClients
from ..errors import CurveKernelError, printable
from ..folders import NoFolderError, no_home
from ..keys.certificates import curve_folder, load_identity
from ..wire import read_mechanism
from . import Command
from .findings import PYTHON, Finding, as_command, from_error
from .install import shipped_spec, temporary_folder
from .kernelspecs import check_kernelspecs
from .remote import add_remote_arguments, check_far_side, is_remote, remote_config

__all__ = ["DoctorApp"]

_COLORS = {"ok": "green", "warning": "yellow", "failure": "bold red"}
_ROUND_TRIP_LIMIT = 30.0
_OTHER_RUNTIME_FOLDER = "export JUPYTER_RUNTIME_DIR=$(mktemp -d)"
_SILENT = logging.getLogger("curve_kernel.doctor")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


def _versions() -> Iterator[Finding]:
    found = [f"Python {platform.python_version()}", f"curve_kernel {__version__}"]
    for line in metadata.requires("curve-kernel") or ():
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        version = metadata.version(needed.name)
        if needed.specifier.contains(version, prereleases=True):
            found.append(f"{needed.name} {version}")
        else:
            yield Finding(
                "versions",
                "failure",
                f"{needed.name} {version} does not do, it has to be {needed.specifier}",
                f"{PYTHON} -m pip install --upgrade {shlex.quote(str(needed))}",
            )
    yield Finding("versions", "ok", ", ".join(found))


def _curve() -> Iterator[Finding]:
    try:
        keys.require_curve()
    except CurveKernelError as error:
        command = f"{PYTHON} -m pip install --force-reinstall --only-binary pyzmq pyzmq"
        yield Finding("CURVE", "failure", error.message, command)
        return
    yield Finding("CURVE", "ok", f"libzmq {zmq.zmq_version()} has CURVE, by {_sodium()}")


def _sodium() -> str:
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.partition("/")[2]
            if "libsodium" in path:
                version = ctypes.CDLL(f"/{path}").sodium_version_string
                version.restype = ctypes.c_char_p
                return f"libsodium {version().decode()}"
    return "a libsodium that is built in"


def _random() -> Iterator[Finding]:
    # https://github.com/zeromq/libzmq/issues/4241
    try:
        os.getrandom(16, os.GRND_NONBLOCK)
    except (AttributeError, OSError) as error:
        reason = errno.errorcode.get(getattr(error, "errno", None) or 0, "it is missing")
        yield Finding(
            "random numbers",
            "warning",
            f"getrandom does not work here ({reason}): libzmq's making of keys is then not thread-safe",
            "# use Linux 3.17 or later, and a sandbox that lets getrandom through",
        )
    else:
        yield Finding("random numbers", "ok", "getrandom works")


def _key_files() -> Iterator[Finding]:
    folder = curve_folder()
    try:
        AuthorizedClients(folder, str).check()
    except (CurveKernelError, OSError) as error:
        yield from_error("key files", error)
    else:
        skipped: list[str] = []
        listed = list(AuthorizedClients(folder, skipped.append))
        message = f"{len(listed)} client{'s are' if len(listed) > 1 else ' is'} listed in {folder}"
        if not listed:
            message = (
                f"no client is listed in {folder}: only their own managers can connect to your kernels"
            )
        yield Finding("key files", "ok", message)
        for line in skipped:
            yield Finding("key files", "warning", line, f"{PYTHON} -m curve_kernel clients")
    try:
        identity = load_identity()
    except (CurveKernelError, OSError) as error:
        message = error.message if isinstance(error, CurveKernelError) else str(error)
        yield Finding("key files", "failure", message, f"{PYTHON} -m curve_kernel keygen --force")
    else:
        if identity is not None:
            yield Finding("key files", "ok", f"your own key is {identity.public_key.decode()}")


def _runtime_folder() -> Iterator[Finding]:
    folder = Path(jupyter_runtime_dir())
    quoted = shlex.quote(str(folder))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        message = f"runtime folder {folder} can't be made: {error.strerror}"
        yield Finding("folders", "failure", message, _OTHER_RUNTIME_FOLDER)
        return
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() or not os.access(folder, os.W_OK | os.X_OK):
        message = f"runtime folder {folder} is not yours to write"
        yield Finding("folders", "failure", message, _OTHER_RUNTIME_FOLDER)
    elif mode & 0o022:
        message = f"others can replace connection files in {folder}: its mode is {mode:04o}"
        yield Finding("folders", "failure", message, f"chmod 700 {quoted}")
    elif mode & 0o077:
        message = f"others can list {folder}: its mode is {mode:04o}"
        yield Finding("folders", "warning", message, f"chmod 700 {quoted}")
    else:
        yield Finding("folders", "ok", f"runtime folder {folder} is yours alone")


def _round_trip() -> Iterator[Finding]:
    with temporary_folder() as folder:
        spec = Path(folder, "kernels", "throw-away")
        spec.mkdir(parents=True)
        (spec / "kernel.json").write_text(json.dumps(shipped_spec()))
        log = Path(folder, "log")
        try:
            with log.open("w") as stderr:
                yield _run_kernel(Path(folder), stderr)
        except Exception as error:  # noqa: BLE001  a broken environment breaks anywhere
            if isinstance(error, CurveKernelError):
                message, hint = error.message, error.hint
            else:
                message, hint = f"{type(error).__name__}: {error}", "see: python -m curve_kernel"
            # What the kernel itself said is nearer to the cause.
            for line in log.read_text().splitlines():
                message = line.partition("curve_kernel: error: ")[2] or message
                hint = line.partition("curve_kernel: hint: ")[2] or hint
            yield Finding(
                "round trip", "failure", f"a kernel did not answer: {message}", as_command(hint)
            )


def _run_kernel(folder: Path, stderr: Any) -> Finding:
    manager = KernelManager(
        kernel_name="throw-away",
        kernel_spec_manager=KernelSpecManager(
            kernel_dirs=[str(folder / "kernels")], ensure_native_kernel=False
        ),
        connection_file=str(folder / "kernel.json"),
        log=_SILENT,
    )
    manager.start_kernel(stdout=subprocess.DEVNULL, stderr=stderr, cwd=str(folder))
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=_ROUND_TRIP_LIMIT)
        mechanisms = {
            read_mechanism(client._make_url(name))
            for name in ("shell", "control", "stdin", "iopub", "hb")
        }
        answer = []
        client.execute_interactive(
            "print(6 * 7)",
            timeout=_ROUND_TRIP_LIMIT,
            allow_stdin=False,
            output_hook=lambda message: answer.append(message["content"].get("text")),
        )
        if mechanisms != {"CURVE"} or "42\n" not in answer:
            raise CurveKernelError(
                f"its ports spoke {', '.join(sorted(mechanisms))}", "run the tests of curve_kernel"
            )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return Finding("round trip", "ok", "a throw-away kernel ran code, and its ports spoke CURVE only")


_CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("versions", _versions),
    ("CURVE", _curve),
    ("random numbers", _random),
    ("kernelspecs", check_kernelspecs),
    ("folders", _runtime_folder),
    ("key files", _key_files),
    ("round trip", _round_trip),
)


class DoctorApp(Command):
    """Says whether this environment is able to encrypt."""

    name = "doctor"
    summary = """See whether this environment is able to start encrypted kernels, and what to change if
        not. Run it in the Jupyter server's environment, and in the kernel's. With --ssh or --slurm it
        looks at another machine instead. Exit status 1 for a failure."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add --json."""
        parser.add_argument("--json", action="store_true", help="print JSON")
        add_remote_arguments(parser)

    def run(self, options: argparse.Namespace) -> int:
        """Print what was found, as it is found."""
        console = Console(highlight=False, soft_wrap=True)
        findings = []
        checks = _CHECKS
        if is_remote(options):
            far_side = partial(check_far_side, remote_config(options), thoroughly=True)
            checks = (("other machine", far_side),)
        for check, function in checks:
            for finding in _guarded(check, function):
                findings.append(finding)
                if not options.json:
                    _print(console, finding)
        if options.json:
            print(json.dumps([asdict(finding) for finding in findings], indent=2))  # noqa: T201
        return int(any(finding.level == "failure" for finding in findings))


def _guarded(check: str, function: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        try:
            yield from function()
        except RuntimeError as error:
            raise no_home(error) from None
    except NoFolderError as error:
        yield from_error(check, error)
    except PermissionError as error:  # a home that is another user's, or that NFS does not show to root
        message = f"{error.filename} can't be read: {error.strerror}"
        yield Finding(
            check, "failure", message, "# set HOME, or JUPYTER_DATA_DIR, to a folder of yours"
        )
    except Exception as error:  # noqa: BLE001  one check that breaks must not hide the others
        message = f"this check broke: {type(error).__name__}: {error}"
        yield Finding(check, "failure", message, "# report it, with the output of doctor --json")


def _print(console: Console, finding: Finding) -> None:
    line = Text(f"{finding.level:<9}", _COLORS[finding.level])
    console.print(line.append(printable(f"{finding.check}: {finding.message}"), "default"))
    for number, command in enumerate(finding.command.splitlines()):
        console.print(Text(printable(f"{'':<9}{'' if number else 'fix it: '}{command}")))

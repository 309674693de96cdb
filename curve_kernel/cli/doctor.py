"""``doctor``: is this environment able to encrypt, and if not, what to change."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import zmq
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.provisioning import KernelProvisionerFactory
from jupyter_core.paths import jupyter_data_dir, jupyter_runtime_dir
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from .. import __version__, keys
from ..access.allowlist import AuthorizedClients
from ..errors import CurveKernelError
from ..keys.certificates import curve_folder, load_identity
from ..wire import read_mechanism
from . import Command
from .install import install_beside, installed, requirement, runs_curve_kernel, shipped_spec

__all__ = ["DoctorApp", "Finding"]

_PYTHON = shlex.quote(sys.executable)
_PROVISIONER = "curve-provisioner"
_COLORS = {"ok": "green", "warning": "yellow", "failure": "bold red"}
_ROUND_TRIP_LIMIT = 30.0
_OTHER_RUNTIME_FOLDER = "export JUPYTER_RUNTIME_DIR=$(mktemp -d)"
_SILENT = logging.getLogger("curve_kernel.doctor")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


@dataclass(frozen=True)
class Finding:
    """One line of ``doctor``.

    ``level`` is ``ok``, ``warning`` or ``failure``. ``command`` is what fixes it: a shell's command, or
    its comment where there is none. It is empty for ``ok``.
    """

    check: str
    level: str
    message: str
    command: str = ""


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
                f"{_PYTHON} -m pip install --upgrade {shlex.quote(str(needed))}",
            )
    yield Finding("versions", "ok", ", ".join(found))


def _curve() -> Iterator[Finding]:
    try:
        keys.require_curve()
    except CurveKernelError as error:
        command = f"{_PYTHON} -m pip install --force-reinstall --only-binary pyzmq pyzmq"
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


def _kernelspecs() -> Iterator[Finding]:
    manager = KernelSpecManager()
    shown = manager.find_kernel_specs()
    findings = [
        finding for name, folder in sorted(shown.items()) for finding in _kernelspec(name, Path(folder))
    ]
    yield from findings
    if all(finding.level == "failure" for finding in findings):
        yield Finding(
            "kernelspecs",
            "warning",
            "no kernelspec here starts an encrypted kernel",
            f"{_PYTHON} -m curve_kernel install",
        )
    yield from _shadowed(manager, {name: Path(folder) for name, folder in shown.items()})
    elsewhere = [name for name, folder in shown.items() if not Path(folder).is_relative_to(sys.prefix)]
    if not elsewhere and not _is_installed("jupyter_server"):
        yield Finding(
            "kernelspecs",
            "warning",
            f"there is no Jupyter server in {sys.prefix}, and others do not see its kernelspecs",
            install_beside(),
        )


def _kernelspec(name: str, folder: Path) -> Iterator[Finding]:
    if not (folder / "kernel.json").exists():
        return  # stock's, which jupyter_client makes up where it is installed nowhere
    try:
        spec = KernelSpec.from_resource_dir(str(folder))
        provisioner = spec.metadata.get("kernel_provisioner", {}).get("provisioner_name")
        executable = _executable(spec.argv[0])
    except Exception as error:  # noqa: BLE001  whatever somebody wrote into the file
        yield Finding(
            "kernelspecs",
            "failure",
            f"{name} in {folder} can't be read: {type(error).__name__}: {error}",
            f"{_PYTHON} -m jupyter kernelspec remove {shlex.quote(name)}",
        )
        return
    ours = runs_curve_kernel(spec.argv)
    if not ours and not provisioner:
        return
    if finding := _provisioner_problem(name, spec, provisioner):
        yield finding
        return
    if ours and (finding := _interpreter_problem(name, folder, spec, executable)):
        yield finding
        return
    if not any("{connection_file}" in word for word in spec.argv):
        yield Finding(
            "kernelspecs",
            "failure",
            f"{name} in {folder} does not hand over the connection file in argv",
            _reinstall(name, folder, spec),
        )
        return
    how = f"by {provisioner}" if provisioner else "with keys from the front end"
    yield Finding("kernelspecs", "ok", f"{name} in {folder} runs {executable}, started {how}")


def _shadowed(manager: KernelSpecManager, shown: dict[str, Path]) -> Iterator[Finding]:
    """Find interpreters that can't be had here, since another kernelspec has the name of theirs."""
    here = {
        Path(_executable(argv[0])).parent
        for folder, argv in installed(manager)
        if folder in shown.values() and runs_curve_kernel(argv)
    }
    for folder, argv in installed(manager):
        first = shown.get(folder.name.lower())
        if first is None or first == folder or not runs_curve_kernel(argv):
            continue
        python = Path(_executable(argv[0]))
        if python.parent in here:
            continue
        command = install_beside(str(python), str(python.parent.parent))
        if shutil.which(python) is None:
            command = f"rm -r {shlex.quote(str(folder))}"
        yield Finding(
            "kernelspecs",
            "warning",
            f"{folder.name} in {folder}, which runs {python}, is not shown: {first} comes first",
            command,
        )


def _is_installed(package: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(package))
    return False


def _executable(name: str) -> str:
    # As KernelManager.format_kernel_cmd does.
    major, minor = sys.version_info[:2]
    return sys.executable if name in ("python", f"python{major}", f"python{major}.{minor}") else name


def _reinstall(name: str, folder: Path, spec: Any) -> str:
    """Return the command that replaces a kernelspec where it is."""
    if folder.is_relative_to(jupyter_data_dir()):
        where = "--user"
    elif folder.is_relative_to(sys.prefix):
        where = "--sys-prefix"
    else:
        where = f"--prefix {shlex.quote(str(folder.parents[3]))}"
    display_name = shlex.quote(spec.display_name)
    return (
        f"{_PYTHON} -m curve_kernel install {where} --name {shlex.quote(name)}"
        f" --display-name {display_name}"
    )


def _provisioner_problem(name: str, spec: Any, provisioner: str | None) -> Finding | None:
    if not provisioner:
        return None
    factory = KernelProvisionerFactory.instance()
    problem = f"{name} names the provisioner {provisioner}, which is not installed here: it is hidden"
    with contextlib.suppress(Exception):
        if factory.is_provisioner_available(spec):
            # Being there does not mean that it can be imported.
            try:
                factory.create_provisioner_instance("doctor", spec, None)
            except Exception as error:  # noqa: BLE001
                problem = f"{name}: its provisioner {provisioner} can't be loaded: {error}"
            else:
                return None
    command = f"{_PYTHON} -m pip install --force-reinstall --no-deps {requirement()}"
    if provisioner != _PROVISIONER:
        command = f"# install the package that has the provisioner {_one_line(provisioner)} here"
    return Finding("kernelspecs", "failure", problem, command)


def _interpreter_problem(name: str, folder: Path, spec: Any, executable: str) -> Finding | None:
    if executable == sys.executable:
        return None
    try:
        found = subprocess.run(  # noqa: S603
            [executable, "-c", "import curve_kernel; print(curve_kernel.__version__)"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ROUND_TRIP_LIMIT,
            cwd="/",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer in {_ROUND_TRIP_LIMIT:.0f} s"
        message = f"{name} in {folder} runs {executable}, which does not work: {reason}"
        return Finding("kernelspecs", "failure", message, _reinstall(name, folder, spec))
    version = found.stdout.strip()
    command = f"{shlex.quote(executable)} -m pip install --upgrade {requirement()}"
    if found.returncode:
        message = f"{name} in {folder} runs {executable}, which has no curve_kernel"
        return Finding("kernelspecs", "failure", message, command)
    if version != __version__:
        message = f"{name} in {folder} runs curve_kernel {version}, and {__version__} is installed here"
        return Finding("kernelspecs", "warning", message, command)
    return None


def _key_files() -> Iterator[Finding]:
    folder = curve_folder()
    try:
        AuthorizedClients(folder, str).check()
    except (CurveKernelError, OSError) as error:
        yield _from_error("key files", error)
    else:
        skipped: list[str] = []
        listed = list(AuthorizedClients(folder, skipped.append))
        message = f"{len(listed)} client{'s are' if len(listed) > 1 else ' is'} listed in {folder}"
        if not listed:
            message = (
                f"nobody is listed in {folder}: only their own managers can connect to your kernels"
            )
        yield Finding("key files", "ok", message)
        for line in skipped:
            yield Finding("key files", "warning", line, f"{_PYTHON} -m curve_kernel clients")
    try:
        identity = load_identity()
    except (CurveKernelError, OSError) as error:
        message = error.message if isinstance(error, CurveKernelError) else str(error)
        yield Finding("key files", "failure", message, f"{_PYTHON} -m curve_kernel keygen --force")
    else:
        if identity is not None:
            yield Finding("key files", "ok", f"your own key is {identity.public_key.decode()}")


def _from_error(check: str, error: Exception) -> Finding:
    if isinstance(error, CurveKernelError):
        return Finding(check, "failure", error.message, _command(error.hint))
    return Finding(check, "failure", str(error), "# make the file or folder readable for you")


def _command(hint: str) -> str:
    """Return a hint as a shell takes it: the command that it ends with, else a comment."""
    found = re.search(r"(?:: |`)((?:python|chmod) [^`]+)", hint)
    if found is None:
        return f"# {_one_line(hint)}"
    return re.sub(r"^python ", lambda _: f"{_PYTHON} ", found[1])


def _one_line(text: str) -> str:
    return " ".join(text.split())


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
    with tempfile.TemporaryDirectory() as folder:
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
                "round trip", "failure", f"a kernel did not answer: {message}", _command(hint)
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
    ("kernelspecs", _kernelspecs),
    ("folders", _runtime_folder),
    ("key files", _key_files),
    ("round trip", _round_trip),
)


class DoctorApp(Command):
    """Says whether this environment is able to encrypt."""

    name = "doctor"
    summary = """See whether this environment is able to start encrypted kernels, and what to change if
        not. Run it in the Jupyter server's environment, and in the kernel's. Exit status 1 for a
        failure."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add --json."""
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, options: argparse.Namespace) -> int:
        """Print what was found, as it is found."""
        console = Console(highlight=False, soft_wrap=True)
        findings = []
        for check, function in _CHECKS:
            for finding in _guarded(check, function):
                findings.append(finding)
                if not options.json:
                    _print(console, finding)
        if options.json:
            print(json.dumps([asdict(finding) for finding in findings], indent=2))  # noqa: T201
        return int(any(finding.level == "failure" for finding in findings))


def _guarded(check: str, function: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from function()
    except Exception as error:  # noqa: BLE001  one check that breaks must not hide the others
        message = f"this check broke: {type(error).__name__}: {error}"
        yield Finding(check, "failure", message, "# report it, with the output of doctor --json")


def _print(console: Console, finding: Finding) -> None:
    line = Text(f"{finding.level:<9}", _COLORS[finding.level])
    console.print(line.append(f"{finding.check}: {finding.message}", "default"))
    if finding.command:
        console.print(Text(f"{'':<9}fix it: {finding.command}"))

"""``doctor`` on kernelspecs: which start an encrypted kernel here, and what is in the way of others."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.provisioning import KernelProvisionerFactory

from .. import __version__, trust
from ..errors import CurveKernelError
from .attach import ATTACH_PROVISIONER, RUNS, Attached
from .findings import PYTHON, Finding, as_command, one_line
from .install import install_beside, installed, requirement, runs_curve_kernel
from .plaintext import check_plaintext, install_option
from .remote import REMOTE_PROVISIONER, remote_options

__all__ = ["check_kernelspecs"]

_PROVISIONER = "curve-provisioner"
_TIMEOUT = 30.0
_NO_PYTHON = frozenset(
    {"bash", "dash", "env", "fish", "ksh", "sh", "sudo", "zsh"}
)  # -c means other things


def check_kernelspecs() -> Iterator[Finding]:
    """Look at every kernelspec that Jupyter would find, and at what is missing beside them."""
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
            f"{PYTHON} -m curve_kernel install",
        )
    yield from _shadowed(manager, {name: Path(folder) for name, folder in shown.items()})
    yield from check_plaintext(manager, shown)
    here = Path(sys.executable).parent
    elsewhere = any(
        runs_curve_kernel(argv)
        and Path(argv[0]).parent == here
        and not folder.is_relative_to(sys.prefix)
        for folder, argv in installed(manager)
    )
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
        if provisioner == ATTACH_PROVISIONER:
            yield _attached(Attached.read(folder))
            return
        if provisioner == REMOTE_PROVISIONER:
            config = spec.metadata["kernel_provisioner"].get("config", {})
            yield _remote(name, folder, {"engine": "ssh", **config})
            return
        executable = _executable(spec.argv[0])
    except Exception as error:  # noqa: BLE001  whatever somebody wrote into the file
        yield Finding(
            "kernelspecs",
            "failure",
            f"{name} in {folder} can't be read: {type(error).__name__}: {error}",
            f"{PYTHON} -m jupyter kernelspec remove {shlex.quote(name)}",
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
    asked = "" if executable == sys.executable else " (asked for its version)"
    if Path(executable).name in _NO_PYTHON:
        asked = " (a wrapper, not run)"
    yield Finding("kernelspecs", "ok", f"{name} in {folder} runs {executable}{asked}, started {how}")


def _remote(name: str, folder: Path, config: dict[str, Any]) -> Finding:
    place = config.get("host") or "Slurm"
    look = f"python -m curve_kernel doctor {remote_options(config)}"
    message = f"{name} in {folder} starts a kernel on another machine, {place}; look at that by: {look}"
    return Finding("kernelspecs", "ok", message)


def _attached(spec: Attached) -> Finding:
    state = spec.state()
    message = f"{spec.name} joins the kernel of {spec.file}, which {state}"
    if state == RUNS:
        return Finding("kernelspecs", "ok", message)
    command = f"{PYTHON} -m curve_kernel uninstall --name {shlex.quote(spec.name)}"
    return Finding("kernelspecs", "warning", message, command)


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
    display_name = shlex.quote(spec.display_name)
    return (
        f"{PYTHON} -m curve_kernel install {install_option(folder)} --name {shlex.quote(name)}"
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
    command = f"{PYTHON} -m pip install --force-reinstall --no-deps {requirement()}"
    if provisioner != _PROVISIONER:
        command = f"# install the package that has the provisioner {one_line(provisioner)} here"
    return Finding("kernelspecs", "failure", problem, command)


def _distrust(folder: Path, executable: str) -> CurveKernelError | None:
    """Return why a kernelspec's program is not to be run: somebody else may have written either."""
    if (path := shutil.which(executable)) is None:
        return None
    spec = folder / "kernel.json"
    found = trust.file_problem("kernelspec", str(spec), spec.stat())
    return found or trust.path_problem("program", path)


def _interpreter_problem(name: str, folder: Path, spec: Any, executable: str) -> Finding | None:
    if executable == sys.executable or Path(executable).name in _NO_PYTHON:
        return None
    if problem := _distrust(folder, executable):
        message = f"{name} in {folder} runs {executable}, which was not run: {problem.message}"
        return Finding("kernelspecs", "warning", message, as_command(problem.hint))
    try:
        found = subprocess.run(  # noqa: S603
            [executable, "-c", "import curve_kernel; print(curve_kernel.__version__)"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            cwd="/",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer in {_TIMEOUT:.0f} s"
        message = f"{name} in {folder} runs {executable}, which does not work: {reason}"
        return Finding("kernelspecs", "failure", message, _reinstall(name, folder, spec))
    version = found.stdout.strip()[:100]
    command = f"{shlex.quote(executable)} -m pip install --upgrade {requirement()}"
    if found.returncode:
        message = f"{name} in {folder} runs {executable}, which has no curve_kernel"
        return Finding("kernelspecs", "failure", message, command)
    if version != __version__:
        message = f"{name} in {folder} runs curve_kernel {version}, and {__version__} is installed here"
        return Finding("kernelspecs", "warning", message, command)
    return None

"""``install``: the kernelspec "Python 3 (CurveZMQ)"."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager

from .. import files
from ..errors import CurveKernelError
from ..keys.source import SECRETKEY_VARIABLE
from ..launch.ssh import requirement
from . import Command
from .kernel_class import import_kernel, language_of
from .remote import add_remote_arguments, is_remote, remote_spec, tell_of_far_side

__all__ = [
    "KERNELS",
    "NAME",
    "InstallApp",
    "check_kernelspec_name",
    "install_beside",
    "installed",
    "kernel_spec",
    "read_spec",
    "replaced_by_stock",
    "replaced_mark",
    "requirement",
    "resources",
    "runs_curve_kernel",
    "shipped_spec",
    "temporary_folder",
    "write_kernelspec",
]

NAME = "python3-curve"
_DISPLAY_NAME = "Python 3 (CurveZMQ)"
_PYTHON = shlex.quote(sys.executable)
_MODULE = "curve_kernel"
KERNELS = Path("share", "jupyter", "kernels")


def install_beside(python: str = sys.executable, prefix: str = sys.prefix) -> str:
    """Return the command that installs a kernelspec beside the one that each environment has.

    Jupyter shows one kernelspec of a name only, so this one is named after its environment.
    """
    folder = Path(prefix)
    name = folder.name
    if name.lower().lstrip(".") in ("venv", "env"):
        name = folder.parent.name
    name = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "other"
    display_name = shlex.quote(f"{_DISPLAY_NAME[:-1]}, {name})")
    return (
        f"{shlex.quote(python)} -m curve_kernel install --user"
        f" --name {NAME}-{name} --display-name {display_name}"
    )


def runs_curve_kernel(argv: Any) -> bool:
    """Whether a kernelspec's *argv* starts this kernel."""
    return isinstance(argv, list) and all(isinstance(word, str) for word in argv) and _MODULE in argv


def installed(manager: KernelSpecManager, prefix: str | None = None) -> Iterator[tuple[Path, Any]]:
    """Yield each kernelspec's folder and argv, in the order in which Jupyter looks, shadowed ones too.

    The argv of a file that can't be read is None. *prefix* is one more place to look.
    """
    places = list(manager.kernel_dirs)
    if prefix is not None and (further := str(Path(prefix).absolute() / KERNELS)) not in places:
        places.append(further)
    for place in places:
        for file in sorted(Path(place).glob("*/kernel.json")):
            argv = None
            with contextlib.suppress(ValueError, AttributeError):
                argv = read_spec(file.parent).get("argv")
            yield file.parent, argv


def read_spec(folder: Path) -> Any:
    """Return what is in the kernel.json of *folder*.

    Raises
    ------
    ValueError
        If it can't be read, or is no JSON.
    """
    try:
        return json.loads(files.read(folder / "kernel.json")[0])
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from None


def replaced_mark(folder: Path) -> Path:
    """Return the file that says that `install` has put a kernelspec there in place of another's.

    It is beside the kernelspecs: whoever puts the other one back empties or replaces the folder.
    """
    return folder.parents[1] / "curve_kernel" / "replaced" / folder.name


def replaced_by_stock(manager: KernelSpecManager) -> Iterator[Path]:
    """Yield the folders of kernelspecs that `install` has replaced, and that were put back since."""
    for folder, argv in installed(manager):
        if os.path.lexists(replaced_mark(folder)) and not runs_curve_kernel(argv):
            yield folder


def resources() -> Path:
    """Return the folder of the kernelspec that is shipped, with its logos."""
    package = Path(__file__).parent.parent
    in_wheel = package / "kernelspec"
    return in_wheel if in_wheel.is_dir() else package.parent / "kernelspecs" / NAME


def shipped_spec() -> dict[str, Any]:
    """Return the content of the kernel.json that is shipped, for this interpreter."""
    spec: dict[str, Any] = json.loads((resources() / "kernel.json").read_text())
    spec["argv"][0] = sys.executable
    return spec


def kernel_spec(options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of kernel.json for the options of ``install``.

    Raises
    ------
    CurveKernelError
        If the kernel class can't be imported or is not a kernel class.
    """
    spec = shipped_spec()
    arguments = [f"--CurveKernelApp.client_authorization={options.client_authorization}"]
    if options.profile:
        arguments += ["--profile", options.profile]
        spec["display_name"] = f"{_DISPLAY_NAME} [profile={options.profile}]"
    if options.kernel_class:
        kernel = import_kernel(options.kernel_class)
        arguments.append(f"--IPKernelApp.kernel_class={options.kernel_class}")
        language = language_of(kernel)
        spec["language"] = language
        spec["display_name"] = f"{language.capitalize()} (CurveZMQ)"
        # debugpy belongs to Python; a kernel that wraps another language says otherwise itself.
        spec["metadata"]["debugger"] = language == "python"
    end = spec["argv"].index("{connection_file}") + 1
    spec["argv"] = [*spec["argv"][:end], *arguments]
    if options.no_provisioner:
        del spec["metadata"]["kernel_provisioner"]
    elif options.no_message_signing:
        spec["metadata"]["kernel_provisioner"]["config"]["message_signing"] = False
    if options.env:
        spec["env"] = dict(options.env)
    if options.display_name:
        spec["display_name"] = options.display_name
    return spec


def check_kernelspec_name(name: str) -> None:
    """Refuse a name of dots: jupyter_client would replace the folder of all kernelspecs, or one above.

    Raises
    ------
    CurveKernelError
        If it is one.
    """
    if not name.strip("."):
        raise CurveKernelError(f"{name!r} is no name for a kernelspec", "choose another --name")


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that goes away again.

    Raises
    ------
    CurveKernelError
        If there is nowhere to make one.
    """
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise CurveKernelError(
            f"there is no folder for temporary files: {error.strerror}",
            "set TMPDIR to one that you can write",
        ) from None


def write_kernelspec(
    manager: KernelSpecManager,
    spec: dict[str, Any],
    name: str,
    *,
    user: bool,
    prefix: str | None = None,
    hint: str,
) -> Path:
    """Write a kernelspec with the logos, where Jupyter looks, and return its folder.

    Raises
    ------
    CurveKernelError
        If it can't be written, for which there is the *hint*, or its name is no kernelspec's.
    """
    check_kernelspec_name(name)
    # What it warns about, the command says once, as a note.
    manager.log.setLevel(logging.ERROR)
    with temporary_folder() as folder:
        source = Path(folder) / "spec"
        shutil.copytree(resources(), source)
        (source / "kernel.json").write_text(json.dumps(spec, indent=1) + "\n")
        try:
            destination = Path(manager.install_kernel_spec(str(source), name, user=user, prefix=prefix))
            if destination.name == NATIVE_KERNEL_NAME:
                replaced_mark(destination).parent.mkdir(parents=True, exist_ok=True)
                replaced_mark(destination).touch()
        except OSError as error:
            raise CurveKernelError(f"the kernelspec can't be written: {error}", hint) from None
        except ValueError as error:
            raise CurveKernelError(str(error), "choose another --name") from None
    return destination


class InstallApp(Command):
    """Installs the kernelspec."""

    name = "install"
    summary = """Install the kernelspec "Python 3 (CurveZMQ)", for Jupyter to find. Without an option
        that says where, it goes into this environment if that can be written, else to the user."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options: where, what for, and how."""
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--user", action="store_true", help="install for this user")
        where.add_argument(
            "--sys-prefix",
            action="store_const",
            const=sys.prefix,
            dest="prefix",
            help="install into this Python environment",
        )
        where.add_argument("--prefix", metavar="DIR", help="install into the environment at DIR")
        parser.add_argument("--name", help=f"the kernelspec's name, {NAME} by default")
        parser.add_argument("--display-name", metavar="TEXT", help="what the launcher shows")
        parser.add_argument("--profile", metavar="NAME", help="the IPython profile to load")
        parser.add_argument(
            "--env",
            nargs=2,
            action="append",
            metavar=("K", "V"),
            help="an environment variable for the kernel",
        )
        parser.add_argument(
            "--kernel-class",
            metavar="CLS",
            help="another ipykernel-based kernel, package.module.Class, under the same application;"
            " the kernelspec's name is then LANGUAGE-curve by default",
        )
        parser.add_argument(
            "--client-authorization",
            metavar="MODE",
            choices=["any", "allowlist"],
            default="allowlist",
            help="which clients may connect: those that are listed (allowlist, the default) or any that"
            " has the connection file",
        )
        parser.add_argument(
            "--no-message-signing",
            action="store_true",
            help="leave the HMAC key empty: every connection is authenticated already",
        )
        add_remote_arguments(parser)
        parser.add_argument(
            "--no-provisioner",
            action="store_true",
            help="do not name curve-provisioner: the front end has to provide the keys,"
            " with transport_encryption=required",
        )

    def run(self, options: argparse.Namespace) -> None:
        """Write the kernelspec, and say where."""
        if any(SECRETKEY_VARIABLE in name for name, _ in options.env or ()):
            raise CurveKernelError(
                "a secret key does not belong into a kernelspec, which others can read",
                "leave it out: the launcher makes a new key pair at every start",
            )
        if options.no_message_signing and options.client_authorization == "any":
            raise CurveKernelError(
                "a kernel with neither message signing nor an allowlist refuses to start",
                "leave out one of --no-message-signing and --client-authorization any",
            )
        if options.no_message_signing and options.no_provisioner:
            raise CurveKernelError(
                "without the provisioner, message signing is up to the front end",
                "leave out one of --no-message-signing and --no-provisioner",
            )
        for variable, _ in options.env or ():
            if not variable or "=" in variable:
                raise CurveKernelError(
                    f"{variable!r} can't be the name of an environment variable",
                    "give name and value as two words: --env NAME VALUE",
                )
        remote = is_remote(options)
        if remote:
            name, spec = remote_spec(options)
        else:
            spec = kernel_spec(options)
            name = options.name or (f"{spec['language']}-curve" if options.kernel_class else NAME)
        prefix = options.prefix
        user = options.user
        if not user and not prefix:
            prefix = sys.prefix if os.access(sys.prefix, os.W_OK) else None
            user = prefix is None
        manager = KernelSpecManager()
        hint = (
            "try --sys-prefix, or set JUPYTER_DATA_DIR to a folder that you can write"
            if user
            else "try --user or --sys-prefix"
        )
        destination = write_kernelspec(manager, spec, name, user=user, prefix=prefix, hint=hint)
        print(f"Installed kernelspec {name.lower()} in {destination}")  # noqa: T201
        if remote:
            tell_of_far_side(spec)
            return
        for line in _notes(options, manager, name.lower(), destination):
            print(line)  # noqa: T201


def _notes(
    options: argparse.Namespace, manager: KernelSpecManager, name: str, destination: Path
) -> Iterator[str]:
    """Say what runs where, and what is in the way."""
    yield f"It runs {sys.executable}, whatever environment the Jupyter server is in."
    if str(destination.parent) not in manager.kernel_dirs:
        yield (
            "Jupyter does not look there by itself: start it with"
            f" JUPYTER_PATH={shlex.quote(str(destination.parent.parent))}"
        )
        return
    if destination.is_relative_to(sys.prefix):
        yield "Only a server in this environment sees it. For a server in another one:"
        yield f"  {install_beside()}"
    elif not options.no_provisioner:
        yield "A server in another environment hides it unless curve_kernel is there too. There:"
        yield f"  python -m pip install {requirement()}"
        if name == NAME:
            yield f"That brings a {NAME} of its own, which may hide this one. To have both:"
            yield f"  {install_beside()}"
    if name == NATIVE_KERNEL_NAME:
        yield "If ipykernel is upgraded or installed again, it puts its own back: `doctor` tells then."
    first = manager.find_kernel_specs().get(name)
    if first != str(destination):
        yield (
            f"In this environment Jupyter takes another kernelspec of that name first: {first}\n"
            "Use --sys-prefix to replace that, or another --name."
        )

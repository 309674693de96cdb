"""``install``: the kernelspec "Python 3 (CurveZMQ)"."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ipykernel.kernelbase import Kernel
from jupyter_client.kernelspec import KernelSpecManager
from traitlets.utils.importstring import import_item

from ..errors import CurveKernelError
from ..keys.source import SECRETKEY_VARIABLE
from . import Command

__all__ = ["InstallApp", "kernel_spec", "shipped_spec"]

_NAME = "python3-curve"


def _resources() -> Path:
    package = Path(__file__).parent.parent
    in_wheel = package / "kernelspec"
    return in_wheel if in_wheel.is_dir() else package.parent / "kernelspecs" / _NAME


def shipped_spec() -> dict[str, Any]:
    """Return the content of the kernel.json that is shipped, for this interpreter."""
    spec: dict[str, Any] = json.loads((_resources() / "kernel.json").read_text())
    spec["argv"][0] = sys.executable
    return spec


def kernel_spec(options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of kernel.json for the options of ``install``.

    Raises
    ------
    CurveKernelError
        If the kernel class can't be imported or is none.
    """
    spec = shipped_spec()
    arguments = [f"--CurveKernelApp.client_authorization={options.client_authorization}"]
    if options.profile:
        arguments += ["--profile", options.profile]
        spec["display_name"] = f"Python 3 (CurveZMQ) [profile={options.profile}]"
    if options.kernel_class:
        kernel = _import_kernel(options.kernel_class)
        arguments.append(f"--IPKernelApp.kernel_class={options.kernel_class}")
        language = _language(kernel)
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


def _language(kernel: type[Kernel]) -> str:
    info = getattr(kernel, "language_info", None)
    name = info.get("name") if isinstance(info, dict) else None
    return str(name or getattr(kernel, "language", None) or "python").lower()


def _import_kernel(name: str) -> type[Kernel]:
    hint = "name a class as package.module.Class, of a package that is installed here"
    try:
        kernel = import_item(name)
    except Exception as error:  # noqa: BLE001  importing runs any package's code
        reason = f"{type(error).__name__}: {error}"
        raise CurveKernelError(f"kernel class {name} can't be imported: {reason}", hint) from None
    if not (isinstance(kernel, type) and issubclass(kernel, Kernel)):
        raise CurveKernelError(f"{name} is not an ipykernel Kernel class", hint)
    return kernel


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
        parser.add_argument("--name", help=f"the kernelspec's name, {_NAME} by default")
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
            help="who may connect: allowlist (the default), or any client that has the connection file",
        )
        parser.add_argument(
            "--no-message-signing",
            action="store_true",
            help="leave the HMAC key empty: every connection is authenticated already",
        )
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
        spec = kernel_spec(options)
        name = options.name or (f"{spec['language']}-curve" if options.kernel_class else _NAME)
        prefix = options.prefix
        user = options.user
        if not user and not prefix:
            prefix = sys.prefix if os.access(sys.prefix, os.W_OK) else None
            user = prefix is None
        manager = KernelSpecManager()
        # What it warns about is said below, once, as a note.
        manager.log.setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "spec"
            shutil.copytree(_resources(), source)
            (source / "kernel.json").write_text(json.dumps(spec, indent=1) + "\n")
            try:
                destination = Path(
                    manager.install_kernel_spec(str(source), name, user=user, prefix=prefix)
                )
            except OSError as error:
                raise CurveKernelError(
                    f"the kernelspec can't be written: {error}", "try --user or --sys-prefix"
                ) from None
            except ValueError as error:
                raise CurveKernelError(str(error), "choose another --name") from None
        print(f"Installed kernelspec {name.lower()} in {destination}")  # noqa: T201
        if str(destination.parent) not in manager.kernel_dirs:
            print(  # noqa: T201
                "Jupyter does not look there by itself: start it with"
                f" JUPYTER_PATH={shlex.quote(str(destination.parent.parent))}"
            )
        elif not destination.is_relative_to(sys.prefix) and not options.no_provisioner:
            print(  # noqa: T201
                "A Jupyter server that runs in another environment than"
                f" {sys.prefix} needs curve_kernel too:\n"
                "install it there with pip, or the server hides this kernel."
            )
        first = manager.find_kernel_specs().get(name.lower())
        if str(destination.parent) in manager.kernel_dirs and first != str(destination):
            print(  # noqa: T201
                f"In this environment Jupyter takes another one of that name first: {first}\n"
                "Use --sys-prefix to replace that, or another --name."
            )

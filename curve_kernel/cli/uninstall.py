"""``uninstall``: removes what ``install`` and ``attach`` made."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager

from ..errors import CurveKernelError
from . import Command
from .findings import PYTHON
from .install import (
    KERNELS,
    NAME,
    installed,
    read_spec,
    replaced_mark,
    resources,
    runs_curve_kernel,
)

__all__ = ["UninstallApp"]


class UninstallApp(Command):
    """Removes what ``install`` made."""

    name = "uninstall"
    summary = f"""Remove a kernelspec that `install` or `attach` made, {NAME} by default, wherever
        Jupyter looks: in this environment, in the user's folder, in the system's."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the name, and a place where Jupyter does not look."""
        parser.add_argument("--name", default=NAME, help=f"the kernelspec's name, {NAME} by default")
        parser.add_argument("--prefix", metavar="DIR", help="look into the environment at DIR too")

    def run(self, options: argparse.Namespace) -> None:
        """Remove it, and say what is left."""
        name = options.name.lower()
        found = [
            (folder, argv)
            for folder, argv in installed(KernelSpecManager(), options.prefix)
            if folder.name.lower() == name
        ]
        ours = [
            folder
            for folder, argv in found
            if runs_curve_kernel(argv) or _names_our_provisioner(folder)
        ]
        marks = [mark for folder, _ in found if os.path.lexists(mark := replaced_mark(folder))]
        if not ours and not marks:
            message = f"there is no kernelspec {options.name}"
            if found:
                message = f"kernelspec {options.name} in {found[0][0]} does not run curve_kernel"
            raise CurveKernelError(
                message, f"{PYTHON} -m jupyter kernelspec list shows which there are"
            )
        left = [
            f"{folder}, which does not run curve_kernel" for folder, _ in found if folder not in ours
        ]
        for folder in ours:
            if _came_with_pip(folder):
                left.append(f"{folder}, which goes with: {PYTHON} -m pip uninstall curve-kernel")
                continue
            try:
                folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
            except OSError as error:
                raise CurveKernelError(
                    f"kernelspec {folder} can't be removed: {error.strerror}"
                ) from None
            print(f"Removed kernelspec {name} from {folder}")  # noqa: T201
        for mark in marks:
            try:
                mark.unlink()
            except OSError as error:
                if not ours:
                    raise CurveKernelError(f"{mark} can't be removed: {error.strerror}") from None
                left.append(f"{mark}, which can't be removed: {error.strerror}")
        for line in left:
            print(f"Left {line}")  # noqa: T201


def _names_our_provisioner(folder: Path) -> bool:
    """Whether a kernelspec that starts nothing itself leaves it to a provisioner of this package."""
    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
        metadata = read_spec(folder)["metadata"]
        return str(metadata["kernel_provisioner"]["provisioner_name"]).startswith("curve-")
    return False


def _came_with_pip(folder: Path) -> bool:
    """Whether this package's own files put it there, and ``install`` has not replaced it since."""
    file = folder / "kernel.json"
    shipped = (resources() / "kernel.json").read_bytes()
    return file == Path(sys.prefix) / KERNELS / NAME / "kernel.json" and file.read_bytes() == shipped

"""``attach``: a kernelspec that joins a running kernel."""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.paths import jupyter_data_dir

from .. import connection_file, files, keys
from ..client import BlockingKernelClient, ChannelNotForViewersError
from ..errors import CurveKernelError, printable
from ..inspect import inspect_kernels
from . import Command
from .existing import connected, find, need_identity
from .install import check_kernelspec_name, installed, read_spec, requirement, write_kernelspec
from .whose import short_name

__all__ = ["ATTACH_PROVISIONER", "RUNS", "AttachApp", "Attached"]

ATTACH_PROVISIONER = "curve-attach-provisioner"
RUNS = "runs"
_INFO_TIMEOUT = 2.0
_LONGEST = 40
_NOT_WRITTEN = "make Jupyter's data folder yours; `jupyter --paths` shows where it is"


@dataclass(frozen=True)
class Attached:
    """A kernelspec that joins the kernel of a connection file."""

    name: str
    folder: Path
    display_name: str
    file: str
    server_key: str

    @classmethod
    def read(cls, folder: Path) -> Attached:
        """Read the kernelspec in *folder*.

        Raises
        ------
        ValueError, KeyError, TypeError
            If it is none that `attach` wrote.
        """
        spec = read_spec(folder)
        provisioner = spec["metadata"]["kernel_provisioner"]
        if provisioner["provisioner_name"] != ATTACH_PROVISIONER:
            raise ValueError(folder)
        config = provisioner["config"]
        file, server_key = str(config["connection_file"]), str(config["server_key"])
        return cls(folder.name, folder, str(spec["display_name"]), file, server_key)

    @classmethod
    def all(cls) -> Iterator[Attached]:
        """Yield each that Jupyter would find."""
        for folder, _ in installed(KernelSpecManager()):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                yield cls.read(folder)

    def state(self) -> str:
        """Tell what has become of the kernel: it `RUNS`, or a verb of which that is not true."""
        if files.is_gone(self.file):
            return "has ended"
        try:
            if connection_file.read(self.file).get("curve_publickey") != self.server_key:
                return "was started anew, with another key"
        except CurveKernelError:
            return "can't be told: its file can't be read"
        [kernel] = inspect_kernels([self.file])
        return {"encrypted": RUNS, "dead": "has ended"}.get(kernel.verdict, "does not answer")


class AttachApp(Command):
    """Makes a kernelspec that joins a running kernel."""

    name = "attach"
    summary = """Make a tile for JupyterLab, and a kernel name for every other front end, that joins a
        running kernel with your own key pair: you share its state with whoever uses it. Shutting it
        down leaves the kernel running. You have to be an owner of it."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the file, the names, and --list."""
        parser.add_argument(
            "file",
            nargs="?",
            metavar="FILE",
            help="the kernel's connection file, or a part of its name",
        )
        parser.add_argument("--existing", metavar="FILE", help="the same, as other commands have it")
        parser.add_argument("--name", help="the kernelspec's name, joined-KERNEL by default")
        parser.add_argument("--display-name", metavar="TEXT", help="what the launcher shows")
        parser.add_argument("--list", action="store_true", help="show what you have attached")

    def run(self, options: argparse.Namespace) -> None:
        """Make sure that the kernel can be joined, write the kernelspec, and say where."""
        if options.list:
            self._list(options)
            return
        if options.file and options.existing:
            raise CurveKernelError(
                f"two kernels are named: {options.file} and {options.existing}", "leave out one of them"
            )
        if not (file := options.file or options.existing):
            raise CurveKernelError(
                "which kernel to join is not said",
                "python -m curve_kernel attach FILE; python -m curve_kernel status shows what runs",
            )
        keys.require_curve()
        path = find(file)
        need_identity(path)
        info = connection_file.read(path)
        facts, note = _ask(path, info)
        short = printable(short_name(path))
        name = (options.name or re.sub(r"[^a-z0-9._-]+", "-", f"joined-{short}".lower())).lower()
        _check_name(name, path)
        spec = {
            "argv": [],
            "display_name": options.display_name or f"{facts['shown']} joined to {short}",
            "language": facts["language"],
            "interrupt_mode": "message",
            "metadata": {
                "debugger": facts["debugger"],
                "supported_encryption": ["curve"],
                "kernel_provisioner": {
                    "provisioner_name": ATTACH_PROVISIONER,
                    "config": {"connection_file": path, "server_key": info["curve_publickey"]},
                },
            },
        }
        # For this user: the file is this user's, and so is the key pair.
        destination = write_kernelspec(KernelSpecManager(), spec, name, user=True, hint=_NOT_WRITTEN)
        for line in (
            f"Attached to the kernel of {path}: kernelspec {name} in {destination}",
            f'In JupyterLab it is the tile "{spec["display_name"]}". Shutting it down leaves the kernel'
            " running.",
            "A server in another environment hides it unless curve_kernel is there too. There:",
            f"  python -m pip install {requirement()}",
            f"To remove it: python -m curve_kernel uninstall --name {shlex.quote(name)}",
        ):
            print(printable(line))  # noqa: T201
        if note:
            print(f"curve_kernel: note: {printable(note)}", file=sys.stderr)  # noqa: T201

    def _list(self, options: argparse.Namespace) -> None:
        if options.file or options.existing or options.name or options.display_name:
            raise CurveKernelError(
                "--list shows what is attached, and attaches nothing", "leave out the other words"
            )
        specs = list(Attached.all())
        for spec in specs:
            print(printable(f"{spec.name}  {spec.state()}  {spec.file}"))  # noqa: T201
        if not specs:
            print("Nothing is attached.")  # noqa: T201


def _ask(path: str, info: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Connect to the kernel; give what it says of itself, and what the user should know."""
    client = BlockingKernelClient()
    client.load_connection_info(info)
    reply: dict[str, Any] = {}
    note = ""
    try:
        connected(path, lambda: client.start_channels(hb=False))
    except ChannelNotForViewersError:
        note = (
            "the kernel lists you as a viewer, and a notebook can't be one: starting it will say so;"
            f" to see what the kernel does: python -m curve_kernel watch --web {shlex.quote(path)}"
        )
    else:
        # On control a busy kernel answers, too.
        client.control_channel.send(client.session.msg("kernel_info_request"))
        try:
            reply = client.get_control_msg(timeout=_INFO_TIMEOUT)["content"]
        except queue.Empty:
            note = (
                f"the kernel accepts you and has not answered in {_INFO_TIMEOUT:.0f} s: it may be busy,"
                f" or the HMAC key in {path} is not its own"
            )
    finally:
        client.stop_channels()
    language, features = reply.get("language_info"), reply.get("supported_features")
    if not isinstance(language, dict):  # the kernel may be anybody's
        language = {}
    name = printable(str(language.get("name") or "python"))[:_LONGEST]
    version = str(language.get("version") or ("3" if name == "python" else "")).partition(".")[0]
    facts = {
        "language": name,
        "shown": f"{name.capitalize()} {printable(version)[:_LONGEST]}".strip(),
        "debugger": bool(reply.get("debugger"))
        or (isinstance(features, list) and "debugger" in features),
    }
    return facts, note


def _check_name(name: str, path: str) -> None:
    """Make sure that a kernelspec of that name may be written: there is none, or it is of this file."""
    check_kernelspec_name(name)
    folder = Path(jupyter_data_dir(), "kernels", name)
    if not os.path.lexists(folder):
        # One in the user's folder would hide one in the environment, python3 for example.
        if (shown := KernelSpecManager().find_kernel_specs().get(name)) is None:
            return
        folder = Path(shown)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if (before := Attached.read(folder)).file != path and before.state() == RUNS:
            raise CurveKernelError(
                f"kernelspec {name} joins another kernel, which runs: {before.file}",
                "choose another --name",
            )
        return
    raise CurveKernelError(f"there is another kernelspec {name}: {folder}", "choose another --name")

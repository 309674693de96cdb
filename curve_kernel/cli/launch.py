"""``launch``: the half of a remote start on the kernel's host, which a kernelspec's engine runs."""

from __future__ import annotations

import argparse
import os
import sys

from .. import keys
from ..launch.addresses import own_address
from ..launch.launcher import Launcher, Settings, detach
from ..launch.ports import parse_range
from . import Command

__all__ = ["LaunchApp"]


class LaunchApp(Command):
    """Starts a kernel for a manager on another machine."""

    name = "launch"
    summary = """Start a kernel for a manager on another machine: what `install --ssh` and `install
        --slurm` make run there. Prints one line of JSON, in which nothing is secret, and serves that
        manager."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what the manager asks for."""
        parser.add_argument(
            "--manager-key", metavar="KEY", required=True, help="the manager's public key, hexadecimal"
        )
        parser.add_argument(
            "--owner-key",
            metavar="KEY",
            action="append",
            default=[],
            help="the public key of a further owner of the kernel; may be repeated",
        )
        parser.add_argument(
            "--ip",
            default="",
            help="the address to listen on; by default the one by which ssh, or Slurm, came here",
        )
        parser.add_argument("--ports", metavar="RANGE", help="ports to choose from: 50000-50099")
        parser.add_argument(
            "--start-timeout",
            type=float,
            default=60.0,
            metavar="SECONDS",
            help="how long to wait for the manager",
        )
        parser.add_argument(
            "--orphan-timeout",
            type=float,
            default=86400.0,
            metavar="SECONDS",
            help="how long the kernel lives on without its manager, and without anybody who joined",
        )
        parser.add_argument(
            "--detach", action="store_true", help="go on in the background once the line is printed"
        )

    def run(self, options: argparse.Namespace) -> None:
        """Print the line, and serve."""
        settings = Settings(
            keys.parse_public(options.manager_key, "--manager-key"),
            tuple(keys.parse_public(key, "--owner-key") for key in options.owner_key),
            options.ip or own_address(),
            parse_range(options.ports) if options.ports else (),
            options.start_timeout,
            options.orphan_timeout,
        )
        tell = detach() if options.detach else None
        launcher = Launcher(settings)
        print(launcher.ready(), flush=True)  # noqa: T201
        if tell is not None:
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (sys.stdin, sys.stdout, sys.stderr):
                os.dup2(nothing, stream.fileno())
            os.close(nothing)
            os.write(tell, b"1")
            os.close(tell)
        launcher.run()

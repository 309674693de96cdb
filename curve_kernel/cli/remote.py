"""``install --ssh`` and ``--slurm``: a kernelspec for another machine; and a look at that machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import time
from collections.abc import Iterator
from typing import Any

from .. import __version__
from ..errors import CurveKernelError, printable
from ..keys import KeyPair
from ..launch.addresses import as_url_host
from ..launch.link import Link, unreachable_port
from ..launch.processes import run
from ..launch.remote import OPTIONS, RemoteProvisioner
from ..launch.ssh import Ssh, far_failure, installing
from ..launch.tunnel import Tunnel
from .findings import Finding, as_command

__all__ = [
    "add_remote_arguments",
    "check_far_side",
    "is_remote",
    "remote_config",
    "remote_spec",
    "tell_of_far_side",
]

REMOTE_PROVISIONER = "curve-remote-provisioner"
_LOOK = (
    "import json, sys, time, curve_kernel;"
    "print(json.dumps({'curve_kernel': curve_kernel.__version__, 'python': sys.version.split()[0],"
    " 'time': time.time()}))"
)
_LIMIT = 20.0
# Of `install`: what the launcher there does not pass on. Its kernels accept listed clients only.
_LOCAL_ONLY = (
    *("--profile", "--kernel-class", "--client-authorization", "--no-message-signing"),
    "--no-provisioner",
)
_CLOCK = 5.0


def add_remote_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a kernel on another machine."""
    group = parser.add_argument_group("a kernel on another machine")
    group.add_argument("--ssh", metavar="HOST", help="start it on HOST, as ssh takes it")
    group.add_argument(
        "--slurm",
        action="store_true",
        help="start it as a Slurm job; with --ssh, sbatch is run on that host",
    )
    group.add_argument("--host", help="the same as --ssh")
    group.add_argument("--python", metavar="PATH", help="the interpreter there; python3 by default")
    group.add_argument(
        "--ssh-option",
        metavar="WORD",
        action="append",
        help="a further word for ssh, such as --ssh-option=-p2222; may be repeated",
    )
    group.add_argument(
        "--sbatch-option",
        metavar="WORD",
        action="append",
        help="a further word for sbatch, such as --sbatch-option=--gres=gpu:1; may be repeated",
    )
    group.add_argument(
        "--network",
        choices=["direct", "tunnel"],
        help="connect to its ports (direct, the default), or let one ssh process carry all (tunnel)",
    )
    group.add_argument("--ip", metavar="ADDRESS", help="the address there to listen on")
    group.add_argument("--reach", metavar="ADDRESS", help="another address by which that is reached")
    group.add_argument("--ports", metavar="RANGE", help="the ports there, such as 50000-50099")
    group.add_argument("--cwd", metavar="DIR", help="its working directory there")
    for name in ("start", "queue", "orphan"):
        group.add_argument(f"--{name}-timeout", type=float, metavar="SECONDS", help=_TIMEOUTS[name])


_TIMEOUTS = {
    "start": "in which it has to start (60)",
    "queue": "in which a job has to start (600)",
    "orphan": "for which it lives on without its server, or anybody who joined (a day)",
}


def is_remote(options: argparse.Namespace) -> bool:
    """Whether the options are of a kernel on another machine.

    Raises
    ------
    CurveKernelError
        If they are not, and one of them makes no sense without.
    """
    if options.ssh and options.host and options.ssh != options.host:
        raise CurveKernelError("--ssh and --host name two hosts", "give one of them")
    options.ssh = options.ssh or options.host
    if options.ssh or options.slurm:
        for option in _LOCAL_ONLY:
            value = getattr(options, option.lstrip("-").replace("-", "_"), None)
            if value and value != "allowlist":
                raise CurveKernelError(
                    f"{option} is not for a kernel on another machine", "leave one of the two out"
                )
        return True
    for name in (*OPTIONS, "ssh_option", "sbatch_option"):
        if getattr(options, name, None):
            option = f"--{name.replace('_', '-')}"
            raise CurveKernelError(
                f"{option} is for a kernel on another machine", "add --ssh HOST, or --slurm"
            )
    return False


def remote_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the provisioner's config for the options.

    Raises
    ------
    CurveKernelError
        If the provisioner does not take it.
    """
    config: dict[str, Any] = {"engine": "slurm" if options.slurm else "ssh"}
    if options.ssh:
        config["host"] = options.ssh
    config["python"] = options.python or "python3"
    for name, value in (("ssh_options", options.ssh_option), ("sbatch_options", options.sbatch_option)):
        if value:
            config[name] = value
    for name in OPTIONS:
        if name not in config and (value := getattr(options, name, None)) is not None:
            config[name] = value
    try:
        RemoteProvisioner(**config)
    except CurveKernelError:
        raise
    except Exception as error:  # noqa: BLE001  traitlets' errors are of several kinds
        raise CurveKernelError(str(error), "see python -m curve_kernel install --help") from None
    return config


def remote_spec(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return name and content of the kernelspec for a kernel on another machine."""
    config = remote_config(options)
    place = options.ssh or "slurm"
    slug = re.sub(r"[^a-z0-9_-]+", "-", place.lower().rpartition("@")[2]).strip("-") or "remote"
    if options.slurm and options.ssh:
        slug += "-slurm"
    where = f"on {options.ssh}" if options.ssh else "in Slurm"
    if options.slurm and options.ssh:
        where = f"in Slurm of {options.ssh}"
    spec: dict[str, Any] = {
        "argv": [],
        "display_name": options.display_name or f"Python 3 {where}",
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {
            "debugger": True,
            "supported_encryption": ["curve"],
            "kernel_provisioner": {"provisioner_name": REMOTE_PROVISIONER, "config": config},
        },
    }
    if options.env:
        spec["env"] = dict(options.env)
    return options.name or f"python3-{slug}", spec


def tell_of_far_side(spec: dict[str, Any]) -> None:
    """Print what is missing on the other machine of a kernelspec that has just been written."""
    config = spec["metadata"]["kernel_provisioner"]["config"]
    for finding in check_far_side(config, thoroughly=False):
        print(printable(f"{finding.level:<9}{finding.check}: {finding.message}"))  # noqa: T201
        if finding.command:
            print(printable(f"{'':<9}fix it: {finding.command}"))  # noqa: T201
    words = remote_options(config)
    print(f"To try all of it: python -m curve_kernel doctor {words}")  # noqa: T201


def remote_options(config: dict[str, Any]) -> str:
    """Return *config* as options of a command line."""
    words = ["--slurm"] if config["engine"] == "slurm" else []
    for name, value in config.items():
        option = {"host": "--ssh"}.get(name, f"--{name.removesuffix('s').replace('_', '-')}")
        if name == "ports":
            option = "--ports"
        for word in value if isinstance(value, list) else [value]:
            if name != "engine":
                words.append(f"{option}={word}")
    return shlex.join(words)


def check_far_side(config: dict[str, Any], *, thoroughly: bool) -> Iterator[Finding]:
    """Look at the other machine.

    Parameters
    ----------
    config : dict
        The provisioner's config.
    thoroughly : bool
        Whether to start a launcher there, and to connect to it.
    """
    look = _FarSide(config)
    yield from look.check(thoroughly=thoroughly)


class _FarSide:
    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._python = str(config.get("python", "python3"))
        host = config.get("host")
        self._ssh = Ssh(host, config.get("ssh_options", ())) if host else None
        self._slurm = config["engine"] == "slurm"

    def check(self, *, thoroughly: bool) -> Iterator[Finding]:
        findings = (
            [asyncio.run(self._look())] if not self._slurm else [asyncio.run(self._look_at_slurm())]
        )
        yield from (finding for found in findings for finding in found)
        if thoroughly and all(one.level != "failure" for found in findings for one in found):
            yield from asyncio.run(self._try())

    async def _look(self) -> list[Finding]:
        assert self._ssh is not None
        where, before = self._ssh.host, time.time()
        try:
            done = await self._ssh.run([self._python, "-c", _LOOK], _LIMIT)
            if error := self._ssh.failure(done, _LIMIT):
                raise error
            found = [Finding("ssh", "ok", f"ssh to {where} works, and its host key is known")]
        except CurveKernelError as error:
            return [_failure("ssh", error)]
        after = time.time()
        try:
            said = json.loads(done.out.strip().splitlines()[-1])
            version, clock = said["curve_kernel"], float(said["time"])
        except (ValueError, LookupError, TypeError):
            problem = far_failure(done, self._python, where)
            command = as_command(problem.hint)
            if "No module named" in done.err:
                command = self._pip_install()
            return [*found, Finding("python", "failure", problem.message, command)]
        found.append(self._version(where, version, said["python"]))
        return [*found, self._clock(where, max(before - clock, clock - after))]

    def _clock(self, where: str, off: float) -> Finding:
        if off <= _CLOCK:
            return Finding("clocks", "ok", f"the clocks here and on {where} agree")
        message = f"the clock of {where} is {off:.0f} s off from this one's"
        return Finding("clocks", "warning", message, "# set both by NTP: timedatectl")

    def _version(self, where: str, version: str, python: str) -> Finding:
        message = f"{self._python} on {where} is Python {python} with curve_kernel {version}"
        if version == __version__:
            return Finding("python", "ok", message)
        return Finding(
            "python", "warning", f"{message}, and {__version__} is here", self._pip_install()
        )

    def _pip_install(self) -> str:
        return installing(self._python, self._ssh.host if self._ssh else "")

    async def _look_at_slurm(self) -> list[Finding]:
        options = shlex.join(self._config.get("sbatch_options", ()))
        script = f"sbatch --version && sbatch --export=NIL --test-only {options} --wrap=true"
        words = ["sh", "-c", script]
        where = f"Slurm by {self._ssh.host}" if self._ssh else "Slurm"
        try:
            if self._ssh is None:
                done = await run(words, _LIMIT)
            else:
                done = await self._ssh.run(words, _LIMIT)
                if error := self._ssh.failure(done, _LIMIT):
                    raise error
        except CurveKernelError as error:
            return [_failure("ssh" if self._ssh else "Slurm", error)]
        version = done.out.strip() or "it has no sbatch"
        if done.status == 0:
            message = f"{where}, {version}, would take such a job, without any environment from here"
            return [Finding("Slurm", "ok", f"{message} (--export=NIL)")]
        message = f"{where} ({version}) takes no such job: {done.last_words}"
        return [Finding("Slurm", "failure", message, "sinfo  # and see sbatch_options")]

    async def _try(self) -> list[Finding]:
        """Start a launcher and connect to it, as a kernel's start would."""
        provisioner = RemoteProvisioner(**self._config)
        engine, pair = provisioner.make_engine(), KeyPair.generate()
        arguments = provisioner.launcher_arguments(pair, start_timeout=_LIMIT)
        tunnel = link = None
        found = []
        try:
            ready = await engine.launch(arguments, provisioner.start_timeout, lambda _: None)
            if self._slurm:
                found.append(self._version(engine.where, ready.version, ready.python))
                # The line has waited until it was looked for.
                found.append(self._clock(engine.where, abs(time.time() - ready.time) - _CLOCK))
            address = f"{ready.hostname} listens on {ready.ip}"
            ip, port = self._config.get("reach") or ready.ip, ready.launcher_port
            if provisioner.network == "tunnel" and self._ssh is not None:
                tunnel = Tunnel(self._ssh, ready.ip, {"launcher_port": port}, lambda _: None)
                await tunnel.open(_LIMIT)
                ip, port = "127.0.0.1", tunnel.ports["launcher_port"]
            url = f"tcp://{as_url_host(ip)}:{port}"
            link = Link(url, pair, ready.server_key)
            if outcome := await link.connect(_LIMIT / 2):
                raise unreachable_port(url, engine.where, outcome, tunnel=tunnel is not None)
            await link.ask("end", 2)
            message = f"{address}, and proves by {url} that it holds its server key"
            found.append(Finding("network", "ok", message))
        except CurveKernelError as error:
            found.append(_failure("network", error))
        finally:
            if link is not None:
                link.close()
            if tunnel is not None:
                tunnel.close()
            await engine.end()
        return found


def _failure(check: str, error: CurveKernelError) -> Finding:
    return Finding(check, "failure", error.message, as_command(error.hint or error.message))

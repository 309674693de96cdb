"""The engine ssh: OpenSSH's own client, with the user's configuration, agent and jump hosts."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .. import __version__
from ..errors import CurveKernelError
from .engines import Engine, Ready, find_ready
from .processes import Done, run, run_now

__all__ = ["Ssh", "SshEngine", "how_to_install", "installing", "requirement"]

# ssh takes what it reads first: host keys are checked whatever a configuration says, and nobody
# is asked a question.
_FIXED = (
    "-T",
    "-oBatchMode=yes",
    "-oStrictHostKeyChecking=yes",
    "-oNoHostAuthenticationForLocalhost=no",
    "-oRemoteCommand=none",
)
_UNCHECKED = re.compile(r"stricthostkeychecking[\s=]*(no|off|ask|accept-new)\b", re.IGNORECASE)
_LIMIT = 10.0
_COULD_NOT = 255


class Ssh:
    """Runs commands on a host.

    Parameters
    ----------
    host : str
        As ssh takes it: a name of its configuration, ``user@host``, ``ssh://user@host:port``.
    options : sequence of str
        Further words for ssh's command line.

    Raises
    ------
    CurveKernelError
        If *host* is no host, or an option would leave host keys unchecked.
    """

    def __init__(self, host: str, options: Sequence[str] = ()) -> None:
        if not host or host.startswith("-") or any(not char.isprintable() for char in host):
            raise CurveKernelError(f"{host!r} is no host for ssh", "name one that `ssh HOST` takes")
        if _UNCHECKED.search(" ".join(options)):
            raise CurveKernelError(
                "host keys are always checked, and an option for ssh says otherwise",
                f"leave it out, and let ssh learn the host's key once: ssh {shlex.quote(host)}",
            )
        self.host = host
        self.options = tuple(options)

    def command(self, *words: str) -> list[str]:
        """Return the command that runs *words* on the host."""
        line = " ".join([_program(words[0]), *map(shlex.quote, words[1:])])
        return [*self.forwarding("-oClearAllForwardings=yes"), line]

    def forwarding(self, *options: str) -> list[str]:
        """Return the command that connects with *options* before the user's."""
        return ["ssh", *_FIXED, *options, *self.options, "--", self.host]

    async def run(self, words: Sequence[str], timeout: float) -> Done:
        """Run *words* on the host."""
        return await run(self.command(*words), timeout)

    def failure(self, done: Done, timeout: float) -> CurveKernelError | None:
        """Return the error if ssh itself did not get through, with its own last line."""
        if done.status is None:
            return CurveKernelError(
                f"ssh to {self.host} said nothing in {timeout:.0f} seconds",
                f"see where it waits: ssh -v {shlex.quote(self.host)} true",
            )
        if done.status != _COULD_NOT:
            return None
        hint = f"see whether it works by itself: ssh -oBatchMode=yes {shlex.quote(self.host)} true"
        if "host key" in done.err.lower():
            hint = (
                "host keys are always checked: compare the key with what the host's administrator says,"
                f" and let ssh learn it: ssh {shlex.quote(self.host)}"
            )
        return CurveKernelError(f"ssh could not connect to {self.host}: {done.last_words}", hint)


def _program(path: str) -> str:
    """Return *path* as a word of the shell there, with the home there."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


def requirement() -> str:
    """Return what pip has to be given, as a shell's word, to install this package somewhere else.

    It is the folder, archive or repository from which it was installed here, else its name.
    """
    return shlex.quote(_origin())


def _origin() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError, KeyError):
        origin = json.loads(metadata.distribution("curve-kernel").read_text("direct_url.json") or "")
        url, vcs = origin["url"], origin.get("vcs_info")
        if vcs:
            return f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
        path = unquote(urlsplit(url).path)
        if not url.startswith("file:"):
            return str(url)
        if Path(path).exists():
            return path
    return "curve-kernel"


def how_to_install(python: str) -> str:
    """Return the hint that says how the package that is here gets to *python* on another machine."""
    origin = _origin()
    if not origin.startswith("/"):
        return f"there: {python} -m pip install --upgrade {shlex.quote(origin)}"
    name = shlex.quote(f"./{Path(origin).name}")
    return f"copy {shlex.quote(origin)} there, then: {python} -m pip install --upgrade {name}"


def installing(python: str, host: str) -> str:
    """Return the command that installs the package that is here for *python* on *host*."""
    origin = _origin()
    pip = f"{_program(python)} -m pip install --upgrade "
    if not host or not origin.startswith("/"):
        command = pip + shlex.quote(origin)
        return f"ssh {shlex.quote(host)} {shlex.quote(command)}" if host else command
    make, wheel = "", origin
    if not origin.endswith(".whl"):
        wheel = f"curve_kernel-{__version__}-py3-none-any.whl"
        make = f"{shlex.quote(sys.executable)} -m pip wheel --no-deps {shlex.quote(origin)} && "
    name = shlex.quote(f"./{Path(wheel).name}")
    command = shlex.quote(f"cat > {name} && {pip}{name}")
    return f"{make}ssh {shlex.quote(host)} {command} < {shlex.quote(wheel)}"


def far_failure(done: Done, python: str, where: str) -> CurveKernelError:
    """Return the error for a launcher that ended without its line."""
    python = _program(python)
    said = done.last_words
    for line in done.err.splitlines():
        if line.startswith("curve_kernel: error: "):
            said = line.removeprefix("curve_kernel: error: ")
    if "no such command: launch" in done.err:
        return CurveKernelError(
            f"the curve_kernel of {python} on {where} is too old to be started from elsewhere",
            how_to_install(python),
        )
    if "No module named" in done.err:
        return CurveKernelError(
            f"{python} on {where} can't start a kernel: {said}",
            how_to_install(python),
        )
    if done.status in (126, 127):
        return CurveKernelError(
            f"there is no python at {python} on {where}: {said}",
            "name an interpreter there that has curve_kernel, as python",
        )
    hint = next(
        (
            line.removeprefix("curve_kernel: hint: ")
            for line in done.err.splitlines()
            if line.startswith("curve_kernel: hint: ")
        ),
        f"try it there: {python} -m curve_kernel --version",
    )
    return CurveKernelError(f"the kernel's launcher on {where} did not start: {said}", hint)


class SshEngine(Engine):
    """Starts the launcher by ssh; then no ssh is needed any more, unless for a tunnel.

    Parameters
    ----------
    ssh : Ssh
        The host.
    python : str
        The interpreter there.
    """

    detaches = True

    def __init__(self, ssh: Ssh, python: str) -> None:
        self._ssh = ssh
        self._python = python
        self._pid = 0
        self._mark = ""

    @property
    def where(self) -> str:
        """The host."""
        return self._ssh.host

    async def launch(
        self,
        arguments: Sequence[str],
        timeout: float,
        progress: Callable[[str], object],  # noqa: ARG002
    ) -> Ready:
        """Start the launcher, and wait for its line."""
        words = [self._python, "-m", "curve_kernel", "launch", *arguments]
        done = await self._ssh.run(words, timeout)
        ready = find_ready(done.out, self.where)
        if ready is None:
            raise self._ssh.failure(done, timeout) or far_failure(done, self._python, self.where)
        # What tells its process from every other one: the manager's key.
        self._pid, self._mark = ready.pid, arguments[1]
        return ready

    async def end(self) -> None:
        """End the launcher, if the process is still that one."""
        if words := self._ending():
            await self._ssh.run(words, _LIMIT)

    def end_now(self) -> None:
        """End the launcher, without an event loop."""
        if words := self._ending():
            run_now(self._ssh.command(*words))

    def _ending(self) -> list[str]:
        pid, self._pid = self._pid, 0
        script = f"ps -o args= -p {pid} | grep -q {self._mark} && kill {pid}"
        return ["sh", "-c", script] if pid else []

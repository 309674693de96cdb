"""The engine ssh: OpenSSH's own client, with the user's configuration, agent and jump hosts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from ..errors import CurveKernelError
from .engines import Engine, Ready, find_ready
from .processes import Done, run, run_now

__all__ = ["Ssh", "SshEngine"]

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
        line = shlex.join(words)
        if words[0].startswith("~/"):  # the home there
            line = f"~/{shlex.join([words[0][2:], *words[1:]])}"
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


def far_failure(done: Done, python: str, where: str) -> CurveKernelError:
    """Return the error for a launcher that ended without its line."""
    python = shlex.quote(python)
    said = done.last_words
    for line in done.err.splitlines():
        if line.startswith("curve_kernel: error: "):
            said = line.removeprefix("curve_kernel: error: ")
    if "no such command: launch" in done.err:
        return CurveKernelError(
            f"the curve_kernel of {python} on {where} is too old to be started from elsewhere",
            f"there: {python} -m pip install --upgrade curve-kernel",
        )
    if "No module named" in done.err:
        return CurveKernelError(
            f"{python} on {where} can't start a kernel: {said}",
            f"there: {python} -m pip install curve-kernel",
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

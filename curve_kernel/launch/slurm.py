"""The engine Slurm: sbatch, squeue and scancel, here or on a login node by ssh."""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from collections.abc import Callable, Sequence

from ..errors import CurveKernelError
from .engines import Engine, Ready, find_ready
from .processes import Done, run, run_now
from .ssh import Ssh, far_failure

__all__ = ["SlurmEngine"]

_COMMAND_LIMIT = 30.0
# Seconds after the end of its processes in which Slurm knows that a job has ended.
_LATE = 5.0
_INTERVAL, _INTERVAL_BY_SSH = 0.3, 2.0
_REPEAT, _OUT_OF_REACH = 60.0, 120.0
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_EXPORTS = re.compile(r"^(--export|--get-user-env|--wrap|--output|-o|--parsable)\b")
# The line and the launcher's errors come back by a file, which the machines have in common.
_FOLDER = '"${XDG_CACHE_HOME:-$HOME/.cache}/curve_kernel"'


class SlurmEngine(Engine):
    """Starts the launcher as a job.

    Parameters
    ----------
    ssh : Ssh or None
        The login node where Slurm's commands are run; None for this machine.
    python : str
        The interpreter on the nodes.
    options : sequence of str
        Further words for sbatch's command line.
    queue_timeout : float
        Seconds in which the job has to start.

    Raises
    ------
    CurveKernelError
        If an option would take the place of one that has to be.
    """

    def __init__(
        self, ssh: Ssh | None, python: str, options: Sequence[str], queue_timeout: float
    ) -> None:
        for option in options:
            if _EXPORTS.match(option):
                raise CurveKernelError(
                    f"sbatch's {option.partition('=')[0]} can't be given: the job gets no environment"
                    " from here, and its output says where the kernel is",
                    "put variables for the kernel into env of its kernelspec",
                )
        self._ssh = ssh
        self._python = python
        self._options = options
        self._queue_timeout = queue_timeout
        self._job = ""

    @property
    def where(self) -> str:
        """The job."""
        by = f" by {self._ssh.host}" if self._ssh else ""
        return f"Slurm job {self._job}{by}" if self._job else f"Slurm{by}"

    async def _sh(self, script: str, timeout: float = _COMMAND_LIMIT) -> Done:
        words = ["sh", "-c", script]
        if self._ssh is None:
            return await run(words, timeout)
        done = await self._ssh.run(words, timeout)
        if error := self._ssh.failure(done, timeout):
            raise error
        return done

    async def launch(
        self, arguments: Sequence[str], timeout: float, progress: Callable[[str], object]
    ) -> Ready:
        """Submit the job, wait in the queue, and then for the launcher's line."""
        await self._submit(arguments, timeout)
        try:
            return await self._wait_for_line(timeout, progress)
        except (CurveKernelError, asyncio.CancelledError):
            await self.end()
            raise

    async def _submit(self, arguments: Sequence[str], timeout: float) -> None:
        launcher = shlex.join([self._python, "-m", "curve_kernel", "launch", *arguments])
        # --export=NIL: by default Slurm sends the whole environment of a server in the clear.
        words = shlex.join(
            [
                *("sbatch", "--job-name=curve-kernel", *self._options),
                # The last of several counts.
                *("--parsable", "--export=NIL", "--output=%j.out", "--open-mode=truncate"),
                "--no-requeue",
                f"--wrap=exec {launcher}",
            ]
        )
        folder = f"umask 077; mkdir -p {_FOLDER} && cd {_FOLDER} && "
        done = await self._sh(f"{folder}exec {words}", min(timeout, _COMMAND_LIMIT))
        found = re.search(r"^(\d+)(;\S*)?$", done.out, re.MULTILINE)
        if done.status != 0 or found is None:
            if done.status is None:
                raise CurveKernelError(
                    "sbatch said nothing in time", "see whether Slurm answers: sinfo"
                )
            hint = "see whether it works by itself: sbatch --wrap=true, with the same options"
            if done.status == 127:
                hint = "run this on a machine that has Slurm, or name one as host"
            raise CurveKernelError(f"sbatch did not take the job: {done.last_words}", hint)
        self._job = found[1]

    async def _wait_for_line(self, timeout: float, progress: Callable[[str], object]) -> Ready:
        job, interval = self._job, _INTERVAL if self._ssh is None else _INTERVAL_BY_SSH
        submitted = heard = time.monotonic()
        started: float | None = None
        told, told_at = "", submitted
        script = f'squeue -h -j {job} -o "%T %r"; echo; cat {_FOLDER}/{job}.out'
        while True:
            # Not to be a burden on those who run Slurm.
            await asyncio.sleep(interval if time.monotonic() - submitted < _REPEAT else 5 * interval)
            now = time.monotonic()
            if self._job != job:  # by a program that cleans up while it waits
                raise CurveKernelError(f"Slurm job {job} was given up")
            try:
                done = await self._sh(script)
                why = ""
                state, _, reason = done.out.partition("\n")[0].partition(" ")
                if state not in _WAITING | _RUNNING:
                    why = await self.why_ended()
            except CurveKernelError:
                # A job that has waited for hours is not given up for a network that is away.
                if now - heard > _OUT_OF_REACH:
                    raise
                continue
            if (ready := find_ready(done.out, self.where)) is not None:
                return ready
            if state or why:
                heard = now
            if why:
                said = done.out.partition("\n")[2].strip()
                if said:
                    raise far_failure(Done(1, "", said), self._python, self.where)
                raise CurveKernelError(why, f"see what Slurm says: scontrol show job {job}")
            if state in _WAITING:
                if now - submitted > self._queue_timeout:
                    raise CurveKernelError(
                        f"Slurm job {job} was still {state} after {self._queue_timeout:.0f} seconds,"
                        f" so it was cancelled; Slurm's reason: {reason or 'none'}",
                        "ask for less in sbatch_options, or wait longer with queue_timeout",
                    )
                text = f"Slurm job {job} is {state} ({reason}), for {self._queue_timeout:.0f} s at most"
                # Until Slurm has looked at the job, its reason is None.
                if (reason not in ("", "None") and text != told) or now - told_at > _REPEAT:
                    told, told_at = text, now
                    progress(text)
            elif state in _RUNNING:
                started = started or now
                if now - started > timeout:
                    raise CurveKernelError(
                        f"Slurm job {job} runs, but said nothing in {timeout:.0f} seconds",
                        "the node and this machine need a home folder in common, for its output",
                    )
            elif now - heard > _OUT_OF_REACH:
                raise CurveKernelError(
                    f"Slurm says nothing of job {job}: {done.last_words}",
                    "see whether it answers: sinfo",
                )

    async def why_ended(self, *, is_over: bool = False) -> str:
        """Return what Slurm says of a job that has ended, or empty."""
        deadline = time.monotonic() + (_LATE if is_over else 0)
        while not (why := await self._why_ended()) and time.monotonic() < deadline:
            await asyncio.sleep(_LATE / 10)
        return why

    async def _why_ended(self) -> str:
        if not self._job:
            return ""
        done = await self._sh(f"scontrol -o show job {self._job}")
        fields = dict(word.split("=", 1) for word in done.out.split() if "=" in word)
        state = fields.get("JobState", "")
        if done.status not in (0, None) and "Invalid job id" in done.err:
            return f"Slurm job {self._job} is no longer known"
        if not state or state in _WAITING or state in _RUNNING:
            return ""
        reason = fields.get("Reason", "None")
        return f"Slurm job {self._job} ended: {state}" + (f", {reason}" if reason != "None" else "")

    async def end(self) -> None:
        """Cancel the job."""
        if self._job:
            await self._sh(f"scancel {self._job}", _COMMAND_LIMIT / 3)
            await self.forget()

    async def forget(self) -> None:
        """Remove the output file."""
        if self._job:
            job, self._job = self._job, ""
            await self._sh(f"rm -f {_FOLDER}/{job}.out", _COMMAND_LIMIT / 3)

    def end_now(self) -> None:
        """Cancel the job, without an event loop."""
        if self._job:
            words = ["sh", "-c", f"scancel {self._job}; rm -f {_FOLDER}/{self._job}.out"]
            self._job = ""
            run_now(self._ssh.command(*words) if self._ssh else words)

"""The provisioner of kernels on other machines."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from jupyter_client.connect import KernelConnectionInfo, port_names
from jupyter_client.provisioning import KernelProvisionerBase
from traitlets import CaselessStrEnum, Float, List, Unicode

from .. import connection_file, keys
from ..client.handshake import NoCurveServerError, WrongServerKeyError
from ..errors import CurveKernelError
from ..keys import KeyPair
from ..keys.certificates import load_identity
from .addresses import as_url_host, check_addresses
from .client_keys import use_client_keys
from .engines import Engine, Ready
from .link import Link, is_refused, unreachable_port, verify
from .ports import parse_range
from .processes import interruptible
from .progress import tell_loss, tell_progress
from .provisioner import StartError
from .slurm import SlurmEngine
from .ssh import Ssh, SshEngine
from .tunnel import Tunnel

__all__ = ["OPTIONS", "RemoteProvisioner"]

_REACH_LIMIT = 10.0
_ANSWER_LIMIT = 1.0
_INTERVAL = 0.03
# Seconds of silence after which the engine is asked what has become of the launcher, and between that.
_SILENCE = 5.0
OPTIONS = (
    *("engine", "host", "python", "ssh_options", "sbatch_options", "network", "ip", "reach", "ports"),
    *("cwd", "start_timeout", "queue_timeout", "orphan_timeout"),
)
_LOST = 1
"""The exit status of a kernel whose host has lost it."""


class RemoteProvisioner(KernelProvisionerBase):
    """Starts a kernel on another machine, by ssh or Slurm; see docs/remote.md.

    Nothing secret is shipped: the kernel's key pair is made on its host and never leaves it, and the
    manager has a client key pair of its own, new for each kernel.
    """

    engine = CaselessStrEnum(
        ["ssh", "slurm"], "ssh", config=True, help="What starts the launcher there."
    )
    host = Unicode(config=True, help="The host as ssh takes it; with slurm, the login node, or empty.")
    python = Unicode("python3", config=True, help="The interpreter there, which has curve_kernel.")
    ssh_options = List(Unicode(), config=True, help="Further words for ssh's command line.")
    sbatch_options = List(Unicode(), config=True, help="Further words for sbatch's command line.")
    network = CaselessStrEnum(
        ["direct", "tunnel"],
        "direct",
        config=True,
        help="Whether the kernel's ports are connected to, or one ssh process forwards them.",
    )
    ip = Unicode(config=True, help="The address there to listen on; else the one that is reached.")
    reach = Unicode(config=True, help="Another address by which that one is reached from here.")
    ports = Unicode(config=True, help="The ports there to choose from, such as 50000-50099.")
    cwd = Unicode(config=True, help="The kernel's working directory there.")
    start_timeout = Float(60.0, min=1, config=True, help="Seconds in which a kernel has to start.")
    queue_timeout = Float(600.0, min=1, config=True, help="Seconds in which a job has to start.")
    orphan_timeout = Float(
        86400.0,
        min=1,
        config=True,
        help="Seconds for which a kernel lives on without its manager, or anybody who joined it.",
    )

    _ready: Ready | None = None
    _link: Link | None = None
    _tunnel: Tunnel | None = None
    _pair: KeyPair | None = None
    _status: int | None = None
    _running = False
    _wanted = False
    _refused = 0
    _lost = ""
    """Why the launcher is gone, once it is."""

    def __init__(self, **kwargs: Any) -> None:
        if unknown := sorted(set(kwargs) - set(self.trait_names())):
            raise StartError(
                f"the curve-remote-provisioner has no option {', '.join(unknown)}",
                f"in its kernelspec's config there can be {', '.join(OPTIONS)}",
            )
        super().__init__(**kwargs)
        self._process = os.getpid()
        self._silent_since = time.monotonic()
        self._engine = self.make_engine()

    def make_engine(self) -> Engine:
        """Return what starts the launcher, as it is configured."""
        ssh = Ssh(self.host, self.ssh_options) if self.host or self.engine == "ssh" else None
        check_addresses(self.ip, self.reach)
        if self.ports:
            parse_range(self.ports)
        if ssh is None:
            if self.network == "tunnel":
                raise StartError(
                    "a tunnel needs a host that ssh takes", "give host in the kernelspec's config"
                )
            return SlurmEngine(None, self.python, self.sbatch_options, self.queue_timeout)
        if self.engine == "slurm":
            return SlurmEngine(ssh, self.python, self.sbatch_options, self.queue_timeout)
        return SshEngine(ssh, self.python)

    # What a kernel manager asks for

    @property
    def has_process(self) -> bool:
        """Whether a kernel has been started that has not been waited for."""
        return self._running

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Look at what is needed; nothing of this machine's environment goes to the other one."""
        keys.require_curve()
        # The user's own, as it is now: a restarted server, or a console, can join.
        identity = load_identity()
        kwargs = await super().pre_launch(**kwargs)
        env = kwargs.pop("env")
        spec = self.kernel_spec.env or {}
        return {
            **kwargs,
            "cmd": [],
            "owners": [keys.as_hex(identity.public_key)] if identity else [],
            "spec_env": {name: str(env.get(name, spec[name])) for name in spec},
        }

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:  # noqa: ARG002
        """Start the kernel, on a host where a launcher is waiting already, or after having started one.

        Raises
        ------
        CurveKernelError
            If it does not start. Nothing is left behind then.
        """
        atexit.register(self._abandon)
        self._wanted = True
        try:
            with interruptible():
                if self._ready is None or self._link is None or not await self._is_there():
                    await self._end_launcher()
                    atexit.register(self._abandon)
                    await self._start_launcher()
                owners = kwargs.get("owners") or []
                await self._start_kernel(kwargs.get("spec_env") or {}, kwargs.get("cwd"), owners)
        except (Exception, asyncio.CancelledError) as error:
            await self._end_launcher()
            if isinstance(error, CurveKernelError) and not isinstance(error, StartError):
                raise StartError(error.message, error.hint) from None
            raise
        self._running = True
        # Before the manager connects, or it would first try in plaintext. What it compares with the
        # connection file is not changed, which has no pair.
        assert self._pair is not None
        assert self._ready is not None
        km: Any = self.parent
        use_client_keys(km, self._pair, self._ready.server_key)
        return self.connection_info

    async def post_launch(self, **kwargs: Any) -> None:
        """Give other clients the kernel's public key."""
        await super().post_launch(**kwargs)
        assert self._ready is not None
        km: Any = self.parent
        connection_file.update(km.connection_file, {"curve_publickey": self._ready.server_key.decode()})

    async def poll(self) -> int | None:
        """Return the kernel's exit status, or None while it runs, or while nobody can tell."""
        if not self._running or self._status is not None or self._link is None:
            return self._status if self._running else _LOST
        answer = await self._ask("poll")
        if answer is not None:
            self._silent_since, self._refused = time.monotonic(), 0
            self._status = answer["status"]
            return self._status
        if why := await self._why_lost():
            return await self._lose(why)
        return None

    async def wait(self) -> int | None:
        """Wait until the kernel has ended, and forget it."""
        while (status := await self.poll()) is None:
            await asyncio.sleep(0.1)
        self._running = False
        return status

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel's process group."""
        await self._ask("signal", number=int(signum))

    async def kill(self, restart: bool = False) -> None:  # noqa: ARG002
        """Kill the kernel."""
        await self.send_signal(9)

    async def terminate(self, restart: bool = False) -> None:  # noqa: ARG002
        """Ask the kernel to end."""
        await self.send_signal(15)

    async def cleanup(self, restart: bool = False) -> None:
        """End the launcher too, unless the kernel is to be started again."""
        self._running = False
        if not restart:
            self._wanted = False
            await self._end_launcher()

    async def get_provisioner_info(self) -> dict[str, Any]:
        """Return what is known of this kernel, without any key."""
        info = await super().get_provisioner_info()
        return {**info, "where": self._engine.where}

    def get_stable_start_time(self, recommended: float = 10.0) -> float:
        """Return how long a start may take."""
        return max(recommended, self.start_timeout / 6)

    # The launcher

    def launcher_arguments(self, pair: KeyPair, start_timeout: float) -> list[str]:
        """Return what follows ``launch`` on the other machine; all of it is public."""
        arguments = ["--manager-key", keys.as_hex(pair.public_key)]
        ip = self.ip or ("127.0.0.1" if self.network == "tunnel" and self.engine == "ssh" else "")
        if ip:
            arguments += ["--ip", ip]
        if self.ports:
            arguments += ["--ports", self.ports]
        arguments += ["--start-timeout", f"{start_timeout:g}"]
        arguments += ["--orphan-timeout", f"{self.orphan_timeout:g}"]
        if self._engine.detaches:
            arguments.append("--detach")
        return arguments

    async def _start_launcher(self) -> None:
        km: Any = self.parent
        deadline = time.monotonic() + self.start_timeout
        self._pair = KeyPair.generate()
        self._status, self._lost = None, ""
        arguments = self.launcher_arguments(self._pair, self.start_timeout)
        self.log.info("Kernel %s is started on %s", km.kernel_name, self._engine.where)
        self._ready = ready = await self._engine.launch(
            arguments, self.start_timeout, partial(tell_progress, self)
        )
        if not self._wanted:
            raise StartError(f"the start of kernel {km.kernel_name} was given up")
        deadline = max(deadline, time.monotonic() + _REACH_LIMIT)
        ip, far_ports = ready.ip, ready.ports
        if self.network == "tunnel":
            tunnel = Tunnel(Ssh(self.host, self.ssh_options), ready.ip, far_ports, self.log.warning)
            await tunnel.open(deadline - time.monotonic())
            self._tunnel, ip, far_ports = tunnel, "127.0.0.1", tunnel.ports
        elif self.reach:
            ip = self.reach
        self.connection_info = {
            **{name: far_ports[name] for name in port_names},  # type: ignore[typeddict-item]
            "ip": as_url_host(ip),
            "transport": "tcp",
            "key": b"",
            "signature_scheme": "hmac-sha256",
        }
        url = self._url(far_ports["launcher_port"])
        self._link = Link(url, self._pair, ready.server_key)
        outcome = await self._link.connect(min(_REACH_LIMIT, max(deadline - time.monotonic(), 1)))
        if outcome is not None:
            raise unreachable_port(url, self._engine.where, outcome, tunnel=self._tunnel is not None)
        self.log.info("Kernel %s: its launcher, %s, is verified", km.kernel_name, url)

    def _url(self, port: int) -> str:
        return f"tcp://{self.connection_info['ip']}:{port}"

    async def _start_kernel(self, env: Mapping[str, str], folder: Any, owners: list[str]) -> None:
        assert self._link is not None
        assert self._ready is not None
        assert self._pair is not None
        km: Any = self.parent
        deadline = time.monotonic() + self.start_timeout
        self._status = None
        answer = await self._link.ask(
            "start",
            self.start_timeout,
            env=dict(env),
            cwd=self.cwd or None,
            folder=None if folder is None else os.fspath(folder),
            name=km.kernel_name,
            owners=owners,
        )
        while answer is not None and not answer.get("open"):
            if answer.get("status") is not None:
                raise StartError(
                    f"the kernel on {self._engine.where} ended with status {answer['status']}",
                    _last_line(answer["said"]),
                )
            if time.monotonic() > deadline:
                raise StartError(
                    f"the kernel on {self._engine.where} opened no ports in {self.start_timeout:.0f} s",
                    "give it longer with start_timeout",
                )
            await asyncio.sleep(_INTERVAL)
            answer = await self._link.ask("poll", _REACH_LIMIT)
        if answer is None:
            raise StartError(
                f"the kernel's launcher on {self._engine.where} does not answer any more",
                await self._engine.why_ended() or "see whether that machine is still there",
            )
        urls = {
            name.removesuffix("_port"): self._url(int(self.connection_info[name]))  # type: ignore[literal-required]
            for name in port_names
        }
        failed = await verify(urls, self._pair, self._ready.server_key, _REACH_LIMIT)
        for channel, outcome in failed.items():
            raise unreachable_port(
                urls[channel], self._engine.where, outcome, tunnel=self._tunnel is not None
            )
        self._silent_since = time.monotonic()

    async def _is_there(self) -> bool:
        return not self._lost and await self._ask("poll", _REACH_LIMIT) is not None

    async def _ask(self, do: str, timeout: float = _ANSWER_LIMIT, **fields: Any) -> Any:
        if self._link is None or not self._link.connected:
            return None
        return await self._link.ask(do, timeout, **fields)

    async def _why_lost(self) -> str:
        """Return why the launcher is gone, or empty: silence is not death, to be refused is."""
        assert self._link is not None
        where = self._engine.where
        if not self._link.connected:
            if self._link.handshake.outcome in (WrongServerKeyError, NoCurveServerError):
                return f"{where} has lost the kernel: another server has its port"
            # By a tunnel, a port that is closed over there is one that accepts and says nothing.
            refused = await is_refused(self._link.url, by_tunnel=self._tunnel is not None)
            self._refused = self._refused + 1 if refused else 0
        if self._refused >= 2:
            with contextlib.suppress(CurveKernelError):
                if why := await self._engine.why_ended(is_over=True):
                    return why
            return f"{where} has lost the kernel: nobody listens on its launcher's port"
        if time.monotonic() - self._silent_since > _SILENCE:
            self._silent_since = time.monotonic()
            with contextlib.suppress(CurveKernelError):
                return await self._engine.why_ended()
        return ""

    async def _lose(self, why: str) -> int | None:
        """Take note that the host has lost the kernel; only a person starts another one there."""
        self._status, self._lost = _LOST, why
        tell_loss(self, why)
        await self._end_launcher()
        km: Any = self.parent
        restarter = getattr(km, "_restarter", None)
        if restarter is None or km.shutting_down:
            return self._status
        # The restarter would start it again at once, which for Slurm is another job. This call is
        # its own, most likely: it is told so by what becomes of it.
        km.stop_restarter()
        restarter._fire_callbacks("dead")
        return None

    async def _end_launcher(self) -> None:
        """End what runs there; directly if it can be reached, else by the engine."""
        atexit.unregister(self._abandon)
        ended = bool(self._lost)
        if self._link is not None and not ended:
            with contextlib.suppress(CurveKernelError):
                ended = await self._ask("end") is not None
        with contextlib.suppress(CurveKernelError):
            await (self._engine.forget() if ended else self._engine.end())
        self._leave()

    def _leave(self) -> None:
        if self._link is not None:
            self._link.close()
        if self._tunnel is not None:
            self._tunnel.close()
        self._link = self._tunnel = self._ready = None

    def _abandon(self) -> None:
        """End what runs there when this process ends and nobody has shut the kernel down."""
        if os.getpid() == self._process:
            if self._link is None or not self._link.end_now():
                self._engine.end_now()
            self._leave()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"its last line: {lines[-1]}" if lines else "it said nothing"

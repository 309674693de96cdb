"""Another host with a real sshd and a real Slurm: a network namespace with a cable to this one.

For root. Debian's packages are installed where they are missing. What is started here, and nothing
else, is ended again: `far_host` and `slurm_cluster` are context managers.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import wait_for

import curve_kernel

PACKAGES = {
    "ip": "iproute2",
    "nft": "nftables",
    "ssh": "openssh-client",
    "/usr/sbin/sshd": "openssh-server",
    "slurmctld": "slurm-wlm",
    "munged": "munge",
    "tcpdump": "tcpdump",
}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
FAR = "far"

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not sys.platform.startswith("linux"),
    reason="another host is a network namespace, which needs Linux and root",
)


def missing_packages() -> list[str]:
    return [package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)]


def install_packages() -> None:
    """Install what is missing, or skip the test."""
    if (missing := missing_packages()) and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *words], env=env, capture_output=True, timeout=300, check=False)
    if missing := missing_packages():
        pytest.skip(f"these are not installed, and can't be: {' '.join(missing)}")


def call(*words: str, check: bool = True, timeout: float = 30) -> str:
    env = {**os.environ, "PATH": PATH}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode:
        raise AssertionError(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


@dataclass
class FarUser:
    """The user on the other host, with an interpreter that it may read."""

    name: str
    home: Path
    python: str = ""

    @property
    def prefix(self) -> list[str]:
        return ["setpriv", f"--reuid={self.name}", f"--regid={self.name}", "--clear-groups", "--"]

    def may_read(self, path: Path) -> bool:
        return subprocess.run([*self.prefix, "test", "-r", str(path)], check=False).returncode == 0


@contextlib.contextmanager
def far_user() -> Iterator[FarUser]:
    name = f"far{secrets.token_hex(3)}"
    home = Path(tempfile.mkdtemp(prefix="curve-far-home-", dir="/var/tmp"))
    call("useradd", "--no-create-home", "--home-dir", str(home), "--shell", "/bin/sh", name)
    try:
        # Without PAM sshd refuses an account that is locked.
        call("usermod", "-p", "*", name)
        user = FarUser(name, home)
        home.chmod(0o755)
        user.python = _interpreter(user, home / "venv")
        account = pwd.getpwnam(name)
        os.chown(home, account.pw_uid, account.pw_gid)
        yield user
    finally:
        _end_processes_of(name)
        call("userdel", name, check=False)
        shutil.rmtree(home, ignore_errors=True)


def _end_processes_of(name: str) -> None:
    """End what the user, which is of this run alone, has left."""
    uid = pwd.getpwnam(name).pw_uid

    def processes() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == uid:
                    found.append(int(entry.name))
        return found

    def ended() -> bool:
        for pid in processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        return not processes()

    wait_for("the end of the far user's processes", ended, 10)


def _interpreter(user: FarUser, folder: Path) -> str:
    """An environment with this one's packages, of an interpreter that the user may run."""
    version = "{}.{}".format(*sys.version_info[:2])
    base = f"{sys.base_prefix}/bin/python{version}"
    if not user.may_read(Path(base)):
        base = f"/usr/bin/python{version}"
    if not (Path(base).exists() and user.may_read(Path(base))):
        base = _copied_interpreter(folder.parent / "python", version)
    subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    [site] = folder.glob("lib/python*/site-packages")
    paths = [Path(sysconfig.get_path("purelib")), Path(curve_kernel.__file__).parents[1]]
    if not user.may_read(paths[0]):
        shutil.copytree(paths[0], copy := folder / "packages", symlinks=True)
        paths[0] = copy
    if not user.may_read(paths[1]):
        package = folder / "source" / "curve_kernel"
        shutil.copytree(Path(curve_kernel.__file__).parent, package)
        paths[1] = package.parent
    (site / "these.pth").write_text("".join(f"{path}\n" for path in paths))
    return str(folder / "bin" / "python")


def _copied_interpreter(folder: Path, version: str) -> str:
    base, name = Path(sys.base_prefix), f"python{version}"
    shutil.copytree(
        base / "lib" / name,
        folder / "lib" / name,
        symlinks=True,
        ignore=shutil.ignore_patterns("site-packages", "test", "config-*", "idlelib", "*.a"),
    )
    (folder / "bin").mkdir()
    shutil.copy2((base / "bin" / name).resolve(), folder / "bin" / name)
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(library, folder / "lib" / library.name)
    return str(folder / "bin" / name)


@dataclass
class FarHost:
    """The other host: what tests do to it, and with what ssh reaches it as ``far``."""

    namespace: str
    address: str
    desk_address: str
    address6: str
    user: FarUser
    folder: Path
    sshd: int = 0
    others: list[int] = field(default_factory=list)

    @property
    def prefix(self) -> list[str]:
        """What comes before a command that is to run there, with this machine's /sys."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}"]

    @property
    def ssh_options(self) -> list[str]:
        return ["-F", str(self.folder / "ssh_config")]

    def nft(self, *rules: str) -> None:
        """Replace the firewall of the other host."""
        text = "flush ruleset\n" + "".join(
            f"add table inet t\nadd chain inet t {hook} "
            f"{{ type filter hook {hook} priority 0; policy accept; }}\n"
            for hook in ("input", "output")
        )
        text += "".join(f"add rule inet t {rule}\n" for rule in rules)
        subprocess.run(
            [*self.prefix, "nft", "-f", "-"],
            input=text,
            text=True,
            check=True,
            timeout=20,
            env={**os.environ, "PATH": PATH},
        )

    def cut(self) -> None:
        """Let nothing through, in either direction."""
        self.nft("input drop", "output drop")

    def only_ssh(self) -> None:
        """A firewall as they are: ssh, and answers to what was asked from there."""
        self.nft(
            "input iif lo accept",
            "input ct state established,related accept",
            "input tcp dport 22 accept",
            "input icmp type echo-request accept",
            "input meta nfproto ipv6 accept",
            "input drop",
        )

    def restore(self) -> None:
        self.nft()

    def processes(self, word: str) -> list[int]:
        """The far user's processes with *word* on their command line."""
        uid, found = pwd.getpwnam(self.user.name).pw_uid, []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == uid:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if word in line:
                        found.append(int(entry.name))
        return found

    def kernelspec(self, name: str, engine: str = "ssh", **config: object) -> str:
        """Write a kernelspec for this host into the test's home."""
        if engine == "ssh":
            config = {"host": FAR, "ssh_options": self.ssh_options, **config}
        folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        env = config.pop("env", {})
        spec = {
            "argv": [],
            "display_name": name,
            "language": "python",
            "interrupt_mode": "message",
            "env": env,
            "metadata": {
                "debugger": True,
                "supported_encryption": ["curve"],
                "kernel_provisioner": {
                    "provisioner_name": "curve-remote-provisioner",
                    "config": {"engine": engine, "python": self.user.python, **config},
                },
            },
        }
        (folder / "kernel.json").write_text(json.dumps(spec))
        return name


@contextlib.contextmanager
def far_host(delay: float = 0.0) -> Iterator[FarHost]:
    """Make the other host, its user, and its sshd; *delay* is what a packet takes, in seconds."""
    install_packages()
    number = secrets.randbelow(250) + 1, secrets.randbelow(250) + 1
    net = f"10.{number[0]}.{number[1]}"
    token = secrets.token_hex(3)
    folder = Path(tempfile.mkdtemp(prefix="curve-far-", dir="/var/tmp"))
    folder.chmod(0o755)
    with far_user() as user:
        host = FarHost(
            f"curve{token}", f"{net}.2", f"{net}.1", f"fd00:{number[0]}:{number[1]}::2", user, folder
        )
        try:
            _plug_in(host, f"far{token}", number, delay)
            host.sshd = _start_sshd(host)
            yield host
        finally:
            for pid in (host.sshd, *host.others):
                end(pid)
            call("ip", "netns", "delete", host.namespace, check=False)
            call("ip", "route", "del", "blackhole", f"{net}.0/24", check=False)
            shutil.rmtree(folder, ignore_errors=True)


def _plug_in(host: FarHost, cable: str, number: tuple[int, int], delay: float) -> None:
    net, space = host.address.rpartition(".")[0], host.namespace
    call("ip", "netns", "add", space)
    if delay:
        log = host.folder / "delay.log"
        words = [sys.executable, str(Path(__file__).with_name("delay.py")), cable, space, "cable"]
        host.others.append(start([*words, str(delay)], log))
        wait_for("the slow cable", lambda: "ready" in log.read_text(), 20)
    else:
        call("ip", "link", "add", cable, "type", "veth", "peer", "name", "cable", "netns", space)
    call("ip", "address", "add", f"{net}.1/30", "dev", cable)
    call("ip", "-n", space, "address", "add", f"{net}.2/30", "dev", "cable")
    six = f"fd00:{number[0]}:{number[1]}::"
    # Some machines have no IPv6 at all; the tests of it are skipped then.
    call("ip", "address", "add", f"{six}1/64", "dev", cable, "nodad", check=False)
    call("ip", "-n", space, "address", "add", f"{six}2/64", "dev", "cable", "nodad", check=False)
    call("ip", "link", "set", cable, "up")
    call("ip", "-n", space, "link", "set", "cable", "up")
    call("ip", "-n", space, "link", "set", "lo", "up")
    # Without the cable nothing may go out by the default route.
    call("ip", "route", "add", "blackhole", f"{net}.0/24")


def _start_sshd(host: FarHost) -> int:
    folder = host.folder
    for key in ("host_key", "user_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
    (folder / "sshd_config").write_text(
        f"""Port 22
ListenAddress {host.address}
ListenAddress [{host.address6}]:22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/sshd.pid
UsePAM no
StrictModes no
PasswordAuthentication no
AcceptEnv *
SetEnv SLURM_CONF={folder}/slurm/slurm.conf
"""
    )
    key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    known = "".join(f"{name} {key}\n" for name in (host.address, host.address6))
    (folder / "known_hosts").write_text(known)
    (folder / "ssh_config").write_text(
        f"""Host {FAR}
    HostName {host.address}
Host {FAR}6
    HostName {host.address6}
Host *
    User {host.user.name}
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
"""
    )
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = (folder / "sshd.log").open("w")
    process = subprocess.Popen(
        [*host.prefix, "/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    _PROCESSES[process.pid] = process

    def answers() -> bool:
        assert process.poll() is None, (folder / "sshd.log").read_text()
        with contextlib.suppress(OSError), socket.create_connection((host.address, 22), 1):
            return True
        return False

    wait_for("sshd", answers, 20)
    return process.pid


_PROCESSES: dict[int, subprocess.Popen[bytes]] = {}


def start(words: list[str], log: Path) -> int:
    """Start a server of this run's own."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PATH": PATH},
            start_new_session=True,
        )
    _PROCESSES[process.pid] = process
    return process.pid


def end(pid: int) -> None:
    """End a server that was started here."""
    process = _PROCESSES.pop(pid, None)
    if process is not None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


@dataclass
class Cluster:
    """A Slurm with one node, the other host; the controller is this one."""

    host: FarHost
    config: Path
    slurmctld: int
    slurmd: int
    node: str
    ignored: set[str] = field(default_factory=set)

    def call(self, *words: str, check: bool = True) -> str:
        return call("env", f"SLURM_CONF={self.config}", *words, check=check)

    def jobs(self) -> list[str]:
        return [job for job in self.call("squeue", "-h", "-o", "%i").split() if job not in self.ignored]

    @contextlib.contextmanager
    def blocked(self, processors: int = 1) -> Iterator[None]:
        """Let some of the four processors be taken."""
        words = ("sbatch", "--parsable", "--output=/dev/null", f"--cpus-per-task={processors}")
        job = self.call(*words, "--wrap=sleep 200").strip()
        self.ignored.add(job)
        wait_for("the job", lambda: "R" in self.call("squeue", "-h", "-j", job, "-o", "%t"), 30)
        try:
            yield
        finally:
            self.call("scancel", job)

    def start_slurmd(self) -> None:
        folder = self.config.parent
        command = f"hostname {self.node}; exec slurmd -D -N {self.node} -f {self.config}"
        self.slurmd = start(
            ["unshare", "--uts", *self.host.prefix, "sh", "-c", command], folder / "slurmd.out"
        )
        self.host.others.append(self.slurmd)

    def wait_until_idle(self) -> None:
        wait_for(
            "an idle node",
            lambda: "idle" in self.call("sinfo", "-h", "-o", "%T", check=False),
            40,
        )


@contextlib.contextmanager
def slurm_cluster(host: FarHost) -> Iterator[Cluster]:
    folder = host.folder / "slurm"
    folder.mkdir(mode=0o755)
    munge = _start_munged(host, folder)
    control, node_port = _free_ports(2)
    node = f"node{secrets.token_hex(2)}"
    for name in ("state", "spool"):
        (folder / name).mkdir(mode=0o755)
    shutil.chown(folder / "state", "slurm", "slurm")
    shutil.chown(folder, "slurm", "slurm")
    config = folder / "slurm.conf"
    config.write_text(
        f"""ClusterName=curve
SlurmctldHost={socket.gethostname().partition(".")[0]}({host.desk_address})
SlurmctldPort={control}
SlurmdPort={node_port}
SlurmUser=slurm
AuthType=auth/munge
AuthInfo=socket={munge}
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=20
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=3
OverTimeLimit=0
MinJobAge=300
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
InactiveLimit=0
Waittime=0
NodeName={node} NodeAddr={host.address} CPUs=4 RealMemory=500 State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""
    )
    slurmctld = start(
        [
            *("setpriv", "--reuid=slurm", "--regid=slurm", "--clear-groups", "--"),
            *("slurmctld", "-D", "-f", str(config)),
        ],
        folder / "slurmctld.out",
    )
    host.others.append(slurmctld)
    cluster = Cluster(host, config, slurmctld, 0, node)
    cluster.start_slurmd()
    try:
        cluster.wait_until_idle()
    except TimeoutError:
        logs = "".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
        raise AssertionError(logs) from None
    try:
        yield cluster
    finally:
        cluster.ignored.clear()
        for job in cluster.jobs():
            cluster.call("scancel", job, check=False)
        with contextlib.suppress(TimeoutError):
            wait_for("the end of all jobs", lambda: not cluster.jobs(), 15)


def _start_munged(host: FarHost, folder: Path) -> Path:
    place = folder / "munge"
    place.mkdir(mode=0o755)
    key = place / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    for path in (place, key):
        shutil.chown(path, "munge", "munge")
    munge_socket = place / "socket"
    host.others.append(
        start(
            [
                *("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "--"),
                *("munged", "--foreground", "--force", f"--socket={munge_socket}", f"--key-file={key}"),
                *(f"--pid-file={place}/pid", f"--log-file={place}/log", f"--seed-file={place}/seed"),
            ],
            place / "out",
        )
    )

    def listens() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return stat.S_ISSOCK(munge_socket.stat().st_mode)
        return False

    wait_for("munged", listens, 20)
    return munge_socket


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()

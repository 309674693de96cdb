"""The provisioner under unmodified managers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import venv
from pathlib import Path

import ipykernel
import psutil
import pytest
from jupyter_client import AsyncKernelManager, KernelManager
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from jupyter_client.kernelspec import NoSuchKernel
from support import CHANNELS, check_interrupt, listening_ports, run_code, started, wait_for

import curve_kernel
from curve_kernel.errors import CurveKernelError
from curve_kernel.launch.provisioner import CurveProvisioner
from curve_kernel.wire import read_mechanism


def write_spec(name: str, *, python: str = sys.executable, module: str = "curve_kernel", **config):
    folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name
    folder.mkdir(parents=True)
    metadata = {
        "supported_encryption": ["curve"],
        "kernel_provisioner": {"provisioner_name": "curve-provisioner", "config": config},
    }
    spec = {
        "argv": [python, "-m", module, "-f", "{connection_file}"],
        "display_name": name,
        "language": "python",
        "metadata": metadata,
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    return name


def check_encrypted(km, *, ports: int = 6) -> None:
    for channel in CHANNELS:
        assert read_mechanism(km._make_url(channel)) == "CURVE"
    assert {
        read_mechanism(f"tcp://127.0.0.1:{port}") for port in listening_ports(km.provisioner.pid)
    } == {"CURVE"}
    assert len(listening_ports(km.provisioner.pid)) == ports


def files_holding(secret: bytes) -> list[Path]:
    found = []
    for path in Path(os.environ["HOME"]).rglob("*"):
        if path.is_file() and secret in path.read_bytes():
            found.append(path)
    return found


def test_installed_kernelspec_start_restart_interrupt_shutdown():
    with started("python3-curve") as (km, client):
        check_encrypted(km)
        secret, file = km.curve_secretkey, Path(km.connection_file)
        info = json.loads(file.read_text())
        assert info["curve_publickey"] == km.curve_publickey.decode()
        assert "curve_secretkey" not in info
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert files_holding(secret) == []
        assert b"JUPYTER_CURVE" not in Path(f"/proc/{km.provisioner.pid}/environ").read_bytes()

        assert run_code(client, "x = 1; x") == ("ok", "1")
        check_interrupt(client, km.interrupt_kernel)

        for now in (False, True):
            before = km.provisioner.pid
            km.restart_kernel(now=now)
            client.wait_for_ready(timeout=60)
            assert km.provisioner.pid != before
            assert km.curve_secretkey == secret
            assert run_code(client, "'x' in globals()") == ("ok", "False")
            check_encrypted(km)
            assert json.loads(file.read_text())["curve_publickey"] == km.curve_publickey.decode()
            assert files_holding(secret) == []
        pid = km.provisioner.pid
        client.stop_channels()
        km.shutdown_kernel()
        assert not psutil.pid_exists(pid)
        assert not file.exists()

    with started("python3-curve") as (km, _):
        assert km.curve_secretkey != secret


def test_new_ports_on_restart():
    with started("python3-curve") as (km, client):
        client.stop_channels()
        km.restart_kernel(newports=True)
        again = km.client()
        again.start_channels()
        again.wait_for_ready(timeout=60)
        assert run_code(again, "3 + 3") == ("ok", "6")
        assert files_holding(km.curve_secretkey) == []
        again.stop_channels()


def test_async_manager_and_several_kernels_at_once():
    async def one() -> tuple[bytes, str]:
        km = AsyncKernelManager(kernel_name="python3-curve")
        await km.start_kernel()
        client = km.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=60)
            texts = []
            await client.execute_interactive(
                "print(21 * 2)",
                timeout=30,
                output_hook=lambda m: texts.append(m["content"].get("text", "")),
            )
            await km.restart_kernel()
            await client.wait_for_ready(timeout=60)
            assert "curve_secretkey" not in json.loads(Path(km.connection_file).read_text())
            return km.curve_secretkey, "".join(texts)
        finally:
            client.stop_channels()
            await km.shutdown_kernel(now=True)

    async def all_of_them():
        return await asyncio.gather(*(one() for _ in range(4)))

    results = asyncio.run(all_of_them())
    assert {text for _, text in results} == {"42\n"}
    assert len({secret for secret, _ in results}) == 4


def test_nobody_takes_a_port_before_the_kernel_has_it():
    """As an outgoing connection would, to which the system gives any port that is not bound."""
    name = write_spec("late")
    path = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name / "kernel.json"
    spec = json.loads(path.read_text())
    go = path.parent / "go"
    wait = f'until [ -e {shlex.quote(str(go))} ]; do sleep 0.05; done; exec "$0" "$@"'
    spec["argv"] = ["bash", "-c", wait, *spec["argv"]]
    path.write_text(json.dumps(spec))

    async def run() -> None:
        km = AsyncKernelManager(kernel_name=name)
        starting = asyncio.create_task(km.start_kernel())
        while not km.has_kernel:
            assert not starting.done()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        ports = [getattr(km, f"{channel}_port") for channel in CHANNELS]
        for port in ports:
            with socket.socket() as other:
                assert other.connect_ex((km.ip, port)) == errno.ECONNREFUSED
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((km.ip, port))
        go.touch()
        await starting
        assert not {one.laddr.port for one in psutil.Process().net_connections()} & set(ports)
        client = km.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        client.stop_channels()
        await km.shutdown_kernel(now=True)

    asyncio.run(run())


def test_autorestart_after_sigkill_keeps_the_keys():
    async def run() -> None:
        km = AsyncIOLoopKernelManager(kernel_name="python3-curve")
        await km.start_kernel()
        client = km.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=60)
            secret, pid = km.curve_secretkey, km.provisioner.pid
            os.kill(pid, signal.SIGKILL)
            for _ in range(600):
                await asyncio.sleep(0.1)
                if km.provisioner.pid not in (None, pid):
                    break
            await client.wait_for_ready(timeout=60)
            reply = await client.execute("1", reply=True, timeout=60)
            assert reply["content"]["status"] == "ok"
            assert km.curve_secretkey == secret
            assert await km.is_alive()
            check_encrypted(km)
        finally:
            client.stop_channels()
            await km.shutdown_kernel(now=True)

    asyncio.run(run())


def test_file_mode_with_this_kernel_restart_included():
    name = write_spec("in-file", key_distribution="file")
    with started(name) as (km, client):
        check_encrypted(km)
        secret = km.curve_secretkey
        assert files_holding(secret) == [Path(km.connection_file)]
        assert json.loads(Path(km.connection_file).read_text())["curve_secretkey"] == secret.decode()
        km.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert km.curve_secretkey == secret
        assert run_code(client, "5") == ("ok", "5")


def test_file_mode_encrypts_stock_ipykernel():
    if ipykernel.version_info < (7, 3):
        pytest.skip("this ipykernel has no CURVE support of its own")
    name = write_spec("stock", module="ipykernel_launcher", key_distribution="file")
    with started(name) as (km, client):
        for channel in CHANNELS:
            assert read_mechanism(km._make_url(channel)) == "CURVE"
        assert run_code(client, "print('stock')") == ("ok", "stock\n")
        km.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert run_code(client, "print('again')") == ("ok", "again\n")


def test_manager_and_kernel_in_different_environments(tmp_path):
    # The kernel's Python is another one, with its own prefix and only a path to the packages.
    other = tmp_path / "other"
    venv.create(other, symlinks=True)
    site = next((other / "lib").glob("python*")) / "site-packages"
    paths = {str(Path(module.__file__).parent.parent) for module in (curve_kernel, ipykernel)}
    (site / "packages.pth").write_text("\n".join(paths))
    name = write_spec("elsewhere", python=str(other / "bin" / "python"))
    with started(name) as (km, client):
        assert run_code(client, "import sys; print(sys.prefix)") == ("ok", f"{other}\n")
        check_encrypted(km)


def test_a_secret_in_the_servers_own_environment_is_not_handed_down(monkeypatch):
    monkeypatch.setenv("JUPYTER_CURVE_SECRETKEY", "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6")
    monkeypatch.setenv("JUPYTER_CURVE_SECRETKEY_FILE", "/nowhere")
    with started("python3-curve") as (km, client):
        assert run_code(client, "1") == ("ok", "1")
        assert km.curve_secretkey != os.environ["JUPYTER_CURVE_SECRETKEY"].encode()


def test_a_server_that_asks_for_encryption_itself_gets_it():
    with started("python3-curve", transport_encryption="required") as (km, _):
        check_encrypted(km)
        assert files_holding(km.curve_secretkey) == []


def test_ipc_kernel():
    # A path in the runtime folder: a socket's name has 107 characters at most.
    with contextlib.ExitStack() as stack:
        folder = Path(subprocess.check_output(["mktemp", "-d", "-p", "/tmp"], text=True).strip())
        stack.callback(lambda: subprocess.run(["rm", "-r", str(folder)], check=True))
        running = started("python3-curve", transport="ipc", ip=str(folder / "k"))
        km, client = stack.enter_context(running)
        assert {read_mechanism(km._make_url(channel)) for channel in CHANNELS} == {"CURVE"}
        assert run_code(client, "7") == ("ok", "7")


def test_the_kernel_ends_with_its_manager():
    code = (
        "import jupyter_client, os\n"
        "km = jupyter_client.KernelManager(kernel_name='python3-curve')\n"
        "km.start_kernel(); kc = km.client(); kc.start_channels(); kc.wait_for_ready(timeout=60)\n"
        "print(km.provisioner.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    pid = int(done.stdout)
    wait_for("the kernel to end", lambda: not psutil.pid_exists(pid))


def test_unknown_kernel_name_is_upstreams_error():
    with pytest.raises(NoSuchKernel):
        KernelManager(kernel_name="no-such-curve").start_kernel()


@pytest.mark.parametrize("manager", [KernelManager, AsyncIOLoopKernelManager])
def test_a_kernel_that_ignores_its_keys(manager):
    """In env mode a stock kernel finds no keys in its file, and speaks plaintext."""
    write_spec("stock", module="ipykernel_launcher")
    km = manager(kernel_name="stock")
    with pytest.raises(CurveKernelError, match="kernel stock ignores its CURVE keys, so it was ended"):
        asyncio.run(km.start_kernel()) if manager is not KernelManager else km.start_kernel()
    assert not km.has_kernel
    assert list(Path(os.environ["JUPYTER_RUNTIME_DIR"]).iterdir()) == []
    mine = psutil.Process().children(recursive=True)
    assert not [one for one in mine if "ipykernel_launcher" in one.cmdline()]


def test_a_kernel_with_other_keys_and_one_that_says_nothing(tmp_path, monkeypatch):
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import json, os, sys, zmq\n"
        "os.environ['JUPYTER_CURVE_SECRETKEY'] = zmq.curve_keypair()[1].decode()\n"
        "info = json.load(open(sys.argv[2])); info.pop('curve_publickey', None)\n"
        "sys.argv[2] += '-copy'; json.dump(info, open(sys.argv[2], 'w'))\n"
        "from curve_kernel.app import CurveKernelApp; CurveKernelApp.launch_instance()\n"
    )
    name = write_spec("liar")
    path = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name / "kernel.json"
    spec = json.loads(path.read_text())
    spec["argv"] = [sys.executable, str(launcher), "-f", "{connection_file}"]
    path.write_text(json.dumps(spec))
    with pytest.raises(CurveKernelError, match="other CURVE keys than it was given"):
        KernelManager(kernel_name=name).start_kernel()

    spec["argv"] = [sys.executable, "-c", "import time; time.sleep(60)", "{connection_file}"]
    path.write_text(json.dumps(spec))
    monkeypatch.setattr("curve_kernel.launch.provisioner._START_LIMIT", 1.0)
    km = KernelManager(kernel_name=name)
    km.start_kernel()
    assert km.is_alive()
    km.shutdown_kernel(now=True)

    spec["argv"] = [sys.executable, "-c", "raise SystemExit(3)", "{connection_file}"]
    path.write_text(json.dumps(spec))
    km = KernelManager(kernel_name=name)
    km.start_kernel()  # its manager sees that it has ended, as with stock
    assert not km.is_alive()
    km.shutdown_kernel(now=True)


ALLOWLIST = "--CurveKernelApp.client_authorization=allowlist"


def write_listing_spec(name: str, *arguments: str, **env: str) -> str:
    write_spec(name)
    path = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name / "kernel.json"
    spec = json.loads(path.read_text())
    spec["argv"] += arguments
    path.write_text(json.dumps(spec | {"env": env}))
    return name


def test_a_list_that_cannot_be_trusted_is_the_reason_why_the_start_fails(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "owners"
    elsewhere.mkdir(parents=True)
    (folder / "viewers").chmod(0o720)
    elsewhere.chmod(0o720)
    by_folder = f"--CurveKernelApp.authorized_clients={elsewhere.parent}"
    for name, arguments, place in (
        ("default", [ALLOWLIST], folder / "viewers"),
        ("two-words", ["--CurveKernelApp.client_authorization", "allowlist"], folder / "viewers"),
        ("other-folder", [by_folder, ALLOWLIST], elsewhere),
    ):
        km = KernelManager(kernel_name=write_listing_spec(name, *arguments))
        with pytest.raises(CurveKernelError) as raised:
            km.start_kernel()
        says = f"kernel {name} does not start: folder {place} can be written by others"
        assert says in raised.value.message
        assert f"chmod go-w {place}" in raised.value.hint
        assert not km.has_kernel
    # Who does not ask for the list is not kept from starting by it.
    with started(write_listing_spec("any")) as (_, client):
        assert run_code(client, "1") == ("ok", "1")
    # What only the kernel can know, the kernel alone says.
    name = write_listing_spec("own-folder", ALLOWLIST, JUPYTER_CONFIG_DIR=str(tmp_path / "x"))
    (tmp_path / "x" / "curve").mkdir(parents=True)
    (tmp_path / "x" / "curve").chmod(0o720)
    km = KernelManager(kernel_name=name)
    km.start_kernel()
    assert not km.is_alive()
    km.shutdown_kernel(now=True)


def test_a_list_that_cannot_be_trusted_any_more_ends_the_restarts(folder):
    """Nothing waits for ever for a kernel that is just restarting."""

    async def check() -> None:
        km = AsyncIOLoopKernelManager(kernel_name=write_listing_spec("crashed", ALLOWLIST))
        await km.start_kernel()
        dead = asyncio.Event()
        km.add_restart_callback(dead.set, "dead")
        (folder / "viewers").chmod(0o720)
        os.kill(km.provisioner.pid, signal.SIGKILL)
        await asyncio.wait_for(dead.wait(), 30)
        assert not km.has_kernel

    asyncio.run(check())


ABORTED = """
import asyncio, faulthandler, os, sys, time
from jupyter_client import AsyncKernelManager
faulthandler.dump_traceback_later(60, exit=True)

async def main():
    for number in range(4):
        manager = AsyncKernelManager(kernel_name="python3-curve")
        start = asyncio.create_task(manager.start_kernel())
        while getattr(manager.provisioner, "process", None) is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1 + number / 200)
        process = manager.provisioner.process
        process.kill()
        while process.poll() is None:
            time.sleep(0.001)
        for task in (manager.shutdown_kernel(now=True), start):
            try:
                await asyncio.wait_for(task, 10)
            except Exception:
                pass
    print("ended", flush=True)

asyncio.run(main())
os._exit(0)
"""


def test_a_shutdown_while_the_start_is_pending_does_not_hang():
    done = subprocess.run(
        [sys.executable, "-c", ABORTED], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.stdout == "ended\n", done.stderr[-2000:]


def test_a_start_that_fails_late_leaves_no_kernel(monkeypatch):
    post_launch = CurveProvisioner.post_launch

    async def without_the_file(self, **kwargs):
        Path(self.parent.connection_file).unlink()
        await post_launch(self, **kwargs)

    monkeypatch.setattr(CurveProvisioner, "post_launch", without_the_file)
    km = KernelManager(kernel_name="python3-curve")
    with pytest.raises(CurveKernelError, match="can't be read"):
        km.start_kernel()
    mine = psutil.Process().children(recursive=True)
    assert not [one for one in mine if "curve_kernel" in one.cmdline()]


def test_words_that_a_launcher_hands_down(tmp_path):
    """`jupyter run FILE` gives the kernel its own words too, and stock passes over them."""
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    command = [sys.executable, "-m", "jupyter", "run", "--kernel=python3-curve", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ran\n", done.stderr

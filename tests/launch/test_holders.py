"""What holds the kernel's secret key never writes it, and a wrapper does not keep it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client import AsyncKernelManager, BlockingKernelClient, KernelManager
from support import check_error, run_code, started, wait_for

from curve_kernel.launch.provisioner import StartError


def write_spec(name: str, argv: list[str], **config: Any) -> str:
    folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    provisioner = {"provisioner_name": "curve-provisioner", "config": config}
    kernel = [sys.executable, "-m", "curve_kernel", "--allowlist", "-f", "{connection_file}"]
    metadata = {"supported_encryption": ["curve"], "kernel_provisioner": provisioner}
    spec = {"argv": [*argv, *kernel], "display_name": name, "language": "python", "metadata": metadata}
    (folder / "kernel.json").write_text(json.dumps(spec))
    return name


def holding(secret: bytes) -> list[Path]:
    places = (Path(os.environ["HOME"]), Path(tempfile.gettempdir()))
    files = {file for place in places for file in place.rglob("*") if file.is_file()}
    return [file for file in files if secret in file.read_bytes()]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own for temporary files, which is looked into."""
    (tmp_path / "tmp").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.mark.parametrize("distribution", ["env", "file"])
def test_no_holder_writes_the_secret(temporary, distribution):
    name = write_spec("holder", [], key_distribution=distribution)
    with started(name) as (km, client):
        file, secret = Path(km.connection_file), km.curve_secretkey
        allowed = [file] if distribution == "file" else []
        before = json.loads(file.read_text())
        km.client_class = "jupyter_client.blocking.BlockingKernelClient"
        holders = [client, km.client(), km.blocking_client(), client.blocking_client(), km]
        assert all(holder.curve_secretkey == secret for holder in holders)
        for holder in holders:
            km._connection_file_written = False
            holder.write_connection_file()
            assert holding(secret) == allowed
            assert holder.curve_secretkey == secret
        assert (
            json.loads(file.read_text()).items()
            >= {key: value for key, value in before.items() if key.startswith("curve")}.items()
        )
        # A file that is gone is written anew, by whoever is asked.
        for holder in (km.client(), km):
            file.unlink()
            holder.write_connection_file()
            info = json.loads(file.read_text())
            assert info["curve_publickey"] == km.curve_publickey.decode()
            assert holding(secret) == []
        assert isinstance(client, BlockingKernelClient)
        assert type(km).__name__ == "KernelManager"
        assert isinstance(km, KernelManager)
        km.restart_kernel(now=True)
        client.wait_for_ready(timeout=60)
        assert run_code(client, "1 + 1") == ("ok", "2")
        assert holding(secret) == allowed


def test_an_asynchronous_manager(temporary):
    async def run() -> None:
        km = AsyncKernelManager(kernel_name="python3-curve")
        await km.start_kernel()
        try:
            for holder in (km.client(), km):
                Path(km.connection_file).unlink()
                holder.write_connection_file()
                assert "curve_publickey" in json.loads(Path(km.connection_file).read_text())
            assert holding(km.curve_secretkey) == []
        finally:
            await km.shutdown_kernel(now=True)

    asyncio.run(run())


WRAPPERS = {
    "shell": ["bash", "-c", '"$0" "$@"; exit $?'],
    "python": [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"],
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_does_not_keep_the_secret(temporary, wrapper):
    name = write_spec(f"wrapped-{wrapper}", WRAPPERS[wrapper])
    with started(name) as (km, client):
        outer = psutil.Process(km.provisioner.pid)
        [kernel] = outer.children()
        for process in (outer, kernel):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            assert km.curve_secretkey not in environment
        assert b"JUPYTER_CURVE" not in environment
        code = "import os; [name for name in os.environ if 'JUPYTER_CURVE' in name]"
        assert run_code(client, code) == ("ok", "[]")
        assert not any(file.is_fifo() for file in Path(km.connection_file).parent.iterdir())
        assert holding(km.curve_secretkey) == []
        run_code(client, "exit()")  # a shell does not pass a signal on


def test_a_wrapper_that_is_a_module(temporary, tmp_path, monkeypatch):
    code = "import subprocess, sys\nsys.exit(subprocess.call(sys.argv[1:]))\n"
    (tmp_path / "wraps.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    name = write_spec("wrapped-module", [sys.executable, "-m", "wraps"])
    with started(name) as (km, client):
        environment = Path(f"/proc/{km.provisioner.pid}/environ").read_bytes()
        assert km.curve_secretkey not in environment
        assert holding(km.curve_secretkey) == []
        assert run_code(client, "1 + 1") == ("ok", "2")


def test_a_wrapper_that_is_to_get_the_variable():
    name = write_spec("variable", WRAPPERS["shell"], key_distribution="env")
    with started(name) as (km, client):
        assert km.curve_secretkey in Path(f"/proc/{km.provisioner.pid}/environ").read_bytes()
        assert run_code(client, "1 + 1") == ("ok", "2")


def test_a_wrapper_where_no_pipe_can_be_made(tmp_path):
    """Its name would be too long here, as a folder on some network file systems has no pipes."""
    name = write_spec("no-fifo", WRAPPERS["shell"])
    manager = KernelManager(kernel_name=name, connection_file=str(tmp_path / f"{'k' * 245}.json"))
    with pytest.raises(
        StartError, match=r"(?s)wrapper would keep .*File\s+name\s+too\s+long.*_RUNTIME_DIR"
    ):
        manager.start_kernel()
    assert not manager.has_kernel
    manager.cleanup_resources()


def test_a_wrapper_that_keeps_the_pipe_from_the_kernel(tmp_path):
    name = write_spec("no-pipe", ["bash", "-c", 'rm "${JUPYTER_CURVE_SECRETKEY#pipe:}"; "$0" "$@"'])
    manager, err = KernelManager(kernel_name=name), tmp_path / "err"
    with err.open("w") as stderr:
        manager.start_kernel(stderr=stderr)
    try:
        wait_for("the kernel's end", lambda: not manager.is_alive())
        check_error(err.read_text(), "holds no key", '"key_distribution": "env"')
        assert manager.curve_secretkey.decode() not in err.read_text()
    finally:
        manager.shutdown_kernel(now=True)


def test_no_core_file_holds_the_key(tmp_path):
    pattern = Path("/proc/sys/kernel/core_pattern")
    if not pattern.exists() or pattern.read_text().strip() not in ("core", "core.%p"):
        pytest.skip("core files do not go into the current folder here")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        pytest.skip("the hard limit allows no core file")
    name = write_spec("dumping", ["bash", "-c", 'ulimit -c unlimited; exec "$0" "$@"'])
    for raised in (False, True):
        folder = tmp_path / f"raised-{raised}"
        folder.mkdir()
        km = KernelManager(kernel_name=name)
        km.start_kernel(cwd=str(folder))
        client = km.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        if raised:  # who asks for it has it
            code = "import resource as r; r.setrlimit(r.RLIMIT_CORE, (r.RLIM_INFINITY,) * 2)"
            assert run_code(client, code)[0] == "ok"
        os.kill(km.provisioner.pid, signal.SIGABRT)
        client.stop_channels()
        wait_for("the kernel's end", lambda km=km: not km.is_alive())
        assert bool(list(folder.iterdir())) == raised
        km.shutdown_kernel(now=True)

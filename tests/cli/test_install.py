"""``install``, as a user types it, and what Jupyter then finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from support import MODULE, refused, run_code, started

KERNEL = """
from ipykernel.kernelbase import Kernel
class EchoKernel(Kernel):
    implementation = 'echo'
    implementation_version = '1'
    banner = 'echo'
    language_info = {'name': 'Echo', 'mimetype': 'text/plain', 'file_extension': '.txt'}
    def do_execute(self, code, silent, *args, **kwargs):
        self.send_response(self.iopub_socket, 'stream', {'name': 'stdout', 'text': code})
        return {'status': 'ok', 'execution_count': 1, 'payload': [], 'user_expressions': {}}
"""


def install(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*MODULE, "install", *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def spec_in(data_dir: Path, name: str = "python3-curve") -> dict:
    return json.loads((data_dir / "kernels" / name / "kernel.json").read_text())


def test_user():
    out = install("--user")
    data = Path(os.environ["JUPYTER_DATA_DIR"])
    folder = data / "kernels" / "python3-curve"
    assert f"Installed kernelspec python3-curve in {folder}" in out
    assert "needs curve_kernel too" in out
    spec = spec_in(data)
    assert spec["argv"][0] == sys.executable
    assert spec["display_name"] == "Python 3 (CurveZMQ)"
    assert spec["metadata"]["supported_encryption"] == ["curve"]
    assert spec["metadata"]["debugger"] is True
    assert spec["metadata"]["kernel_provisioner"]["provisioner_name"] == "curve-provisioner"
    assert {p.name for p in folder.iterdir()} == {
        "kernel.json",
        "logo-32x32.png",
        "logo-64x64.png",
        "logo-svg.svg",
    }


def test_prefix_and_its_note(tmp_path):
    out = install("--prefix", str(tmp_path))
    assert str(tmp_path / "share" / "jupyter" / "kernels" / "python3-curve") in out
    assert "Jupyter does not look there by itself" in out
    assert f"JUPYTER_PATH={tmp_path}/share/jupyter" in out
    assert spec_in(tmp_path / "share" / "jupyter")


@pytest.mark.serial
def test_sys_prefix_needs_no_note():
    out = install("--sys-prefix", "--name", "curve-test")
    folder = Path(sys.prefix) / "share" / "jupyter" / "kernels" / "curve-test"
    try:
        assert str(folder) in out
        assert "needs curve_kernel too" not in out
        assert "curve-test" in KernelSpecManager().find_kernel_specs()
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


def test_options_reach_a_running_kernel():
    subprocess.run([sys.executable, "-m", "IPython", "profile", "create", "p1"], check=True)
    install(
        "--user",
        "--name",
        "Mine",
        "--display-name",
        "My kernel",
        "--env",
        "A_B",
        "c d",
        "--profile",
        "p1",
    )
    spec = spec_in(Path(os.environ["JUPYTER_DATA_DIR"]), "mine")
    assert spec["display_name"] == "My kernel"
    with started("mine") as (_, client):
        code = "import os; print(os.environ['A_B'], get_ipython().profile)"
        assert run_code(client, code) == ("ok", "c d p1\n")


def test_another_ipykernel_based_kernel(tmp_path, monkeypatch):
    (tmp_path / "echo_kernel.py").write_text(KERNEL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    install("--user", "--kernel-class", "echo_kernel.EchoKernel")
    spec = spec_in(Path(os.environ["JUPYTER_DATA_DIR"]), "echo-curve")
    assert (spec["language"], spec["display_name"]) == ("echo", "Echo (CurveZMQ)")
    assert spec["metadata"]["debugger"] is False
    with started("echo-curve") as (km, client):
        assert run_code(client, "hello") == ("ok", "hello")
        assert "curve_secretkey" not in Path(km.connection_file).read_text()


def test_without_the_provisioner_the_front_end_provides_the_keys():
    install("--user", "--no-provisioner", "--name", "plain")
    assert (
        "kernel_provisioner" not in spec_in(Path(os.environ["JUPYTER_DATA_DIR"]), "plain")["metadata"]
    )
    km = KernelManager(kernel_name="plain", transport_encryption="required")
    km.start_kernel()
    client = km.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        assert run_code(client, "1") == ("ok", "1")
    finally:
        client.stop_channels()
        km.shutdown_kernel(now=True)


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["--kernel-class", "no.such.Class"], "no.such.Class can't be imported", "installed here"),
        (["--kernel-class", "json.JSONDecoder"], "not an ipykernel Kernel", "package.module.Class"),
        (["--name", "a b"], "Invalid kernel name", "--name"),
        (["--prefix", "/proc/nowhere"], "can't be written", "--user"),
        (["--user", "--sys-prefix"], "not allowed with", "--help"),
        (["--nonsense"], "--nonsense", "--help"),
        (
            ["--env", "JUPYTER_CURVE_SECRETKEY", "s"],
            "does not belong into a kernelspec",
            "leave it out",
        ),
    ],
)
def test_errors(arguments, says, hint):
    status, lines, text = refused("install", *arguments)
    assert status == 1
    assert len(lines) == 2, text
    assert lines[0].startswith("curve_kernel: error: ")
    assert says in lines[0]
    assert lines[1].startswith("curve_kernel: hint: ")
    assert hint in lines[1]

"""Kernels of others: under this application, or with keys from this provisioner."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import ipykernel
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import get_kernel_spec
from support import MODULE, listening_ports, run_code, started

from curve_kernel.errors import CurveKernelError
from curve_kernel.wire import read_mechanism

WRAPPED = {
    # kernelspec, a cell and its output, completing, a cell without end and what it says in the end
    "bash_kernel.kernel.BashKernel": (
        "bash-curve",
        ("echo $((6 * 7))", "42\n"),
        ("ech", "echo"),
        ("echo begun; sleep 60", "begun"),
    ),
    "calysto_scheme.kernel.CalystoScheme": (
        "scheme-curve",
        ("(* 6 7)", "42"),
        ("defin", "define"),
        ("(define (f) (f)) (f)", "KeyboardInterrupt"),
    ),
}


@pytest.mark.parametrize("kernel_class", WRAPPED)
def test_installed_by_kernel_class(kernel_class):
    """bash_kernel wraps another program; Calysto Scheme is made with metakernel."""
    name, (cell, output), (begin, match), (endless, interrupted) = WRAPPED[kernel_class]
    command = [*MODULE, "install", "--user", "--kernel-class", kernel_class]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    with started(name) as (km, client):
        for port in listening_ports(km.provisioner.pid):
            assert read_mechanism(f"tcp://127.0.0.1:{port}") == "CURVE"
        assert run_code(client, cell) == ("ok", output)
        assert match in client.complete(begin, reply=True, timeout=20)["content"]["matches"]
        timer = threading.Timer(1.5, km.interrupt_kernel)
        timer.start()
        status, text = run_code(client, endless)
        timer.join()
        assert status != "ok"
        assert interrupted in text
        assert run_code(client, cell) == ("ok", output)
        km.restart_kernel()
        client.wait_for_ready(timeout=30)
        assert run_code(client, cell) == ("ok", output)


@pytest.fixture
def file_mode(request: pytest.FixtureRequest) -> str:
    """A kernelspec that another package has installed, and curve-provisioner named in a copy of it."""
    return name_provisioner(request.param, key_distribution="file")


def name_provisioner(original: str, **config: Any) -> str:
    spec = get_kernel_spec(original).to_dict()
    metadata = {"kernel_provisioner": {"provisioner_name": "curve-provisioner", "config": config}}
    spec["metadata"] = {**spec["metadata"], **metadata}
    folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / f"{original}-encrypted"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    return folder.name


def verdicts() -> list[str]:
    done = subprocess.run([*MODULE, "status", "--json"], capture_output=True, text=True, check=False)
    kernels = json.loads(done.stdout)
    assert done.returncode == (0 if all(one["verdict"] == "encrypted" for one in kernels) else 1)
    return [one["verdict"] for one in kernels]


@pytest.mark.parametrize("file_mode", ["python3", "async"], indirect=True)
def test_file_mode(file_mode):
    """Stock ipykernel and async-kernel, untouched, with one entry in a copy of their kernelspecs."""
    if file_mode.startswith("python3") and ipykernel.version_info < (7, 3):
        pytest.skip("this ipykernel has no CURVE support of its own")
    with started(file_mode) as (km, client):
        assert run_code(client, "kept = 6 * 7; kept") == ("ok", "42")
        assert verdicts() == ["encrypted"]
        km.restart_kernel()
        client.wait_for_ready(timeout=30)
        assert run_code(client, "print('kept' in globals())") == ("ok", "False\n")
        assert verdicts() == ["encrypted"]


@pytest.mark.parametrize("original", ["python3", "async"])
def test_env_mode_is_not_for_them(original):
    """They look for keys in their file only; that they are ended is better than plaintext."""
    name = name_provisioner(original)
    with pytest.raises(CurveKernelError) as caught:
        KernelManager(kernel_name=name).start_kernel()
    assert f"kernel {name} ignores its CURVE keys, so it was ended" in str(caught.value)
    assert "key_distribution=file" in str(caught.value)

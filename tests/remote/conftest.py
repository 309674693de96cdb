"""The Slurm that the tests here share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from far import Cluster, far_host, slurm_cluster
from support import wait_for

DOOMED = """
import sys, time
from jupyter_client import KernelManager
km = KernelManager(kernel_name="doomed")
km.start_kernel()
before = time.monotonic()
print("started", flush=True)
while km.is_alive():
    time.sleep(0.5)
print(time.monotonic() - before, km.provisioner._lost, flush=True)
"""


@pytest.fixture(scope="session")
def doomed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A kernel whose job is soon out of time; Slurm counts whole minutes, so this one goes first."""
    home = tmp_path_factory.mktemp("doomed")
    env = {**os.environ, "HOME": str(home), "JUPYTER_DATA_DIR": str(home)}
    env |= {"SLURM_CONF": str(cluster.config), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_DATA_DIR", str(home))
        cluster.host.kernelspec("doomed", "slurm", sbatch_options=["--time=1"])
    process = subprocess.Popen(
        [sys.executable, "-c", DOOMED], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    cluster.ignored.update(cluster.jobs())
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with far_host() as host, slurm_cluster(host) as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster: Cluster, doomed: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slurm's commands find the cluster, and a test leaves no job behind."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.config))
    yield
    wait_for("the end of the test's jobs", lambda: not cluster.jobs(), 20)

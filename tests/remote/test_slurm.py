"""Kernels in Slurm's jobs: a real slurmctld here, a real slurmd in a network namespace."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from far import end, needs_root, start
from jupyter_client import KernelManager
from jupyter_client.ioloop import IOLoopKernelManager
from support import check_interrupt, run_code, started, value, wait_for

from curve_kernel.errors import CurveKernelError

pytestmark = [needs_root, pytest.mark.usefixtures("slurm")]


def job_of(km: Any) -> str:
    return str(km.provisioner._engine._job)


def test_a_session(cluster, monkeypatch, tmp_path):
    token, marker = secrets.token_hex(16), secrets.token_hex(16)
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", token)
    monkeypatch.setenv("ANY_OTHER", marker)
    capture = tmp_path / "cable.pcap"
    words = ["tcpdump", "-i", "cable", "-s", "0", "-U", "-Z", "root", "-w", str(capture)]
    tcpdump = start([*cluster.host.prefix, *words], tmp_path / "tcpdump.log")
    wait_for("tcpdump", capture.exists, 20)
    cluster.host.kernelspec("job", "slurm", env={"SAID": marker}, cwd=str(tmp_path))
    with started("job") as (km, client):
        environment = value(client, "dict(__import__('os').environ)")
        assert environment["SLURM_JOB_ID"] == job_of(km)
        assert environment["SAID"] == marker
        assert "ANY_OTHER" not in environment
        assert token not in environment.values()
        assert value(client, "__import__('os').getcwd()") == str(tmp_path)
        assert km.ip == cluster.host.address

        check_interrupt(client, km.interrupt_kernel)
        run_code(client, "x = 1")
        job = job_of(km)
        km.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert value(client, "['x' in globals(), __import__('os').environ['SLURM_JOB_ID']]") == [
            False,
            job,
        ]
        time.sleep(0.5)
    end(tcpdump)
    packets = capture.read_bytes()
    assert len(packets) > 20_000
    assert token.encode() not in packets
    assert marker.encode() not in packets
    assert not list((Path.home() / ".cache" / "curve_kernel").glob("*"))


def test_a_queue_that_is_full(cluster, caplog):
    cluster.host.kernelspec("job", "slurm", sbatch_options=["--cpus-per-task=4"], queue_timeout=3)
    manager, before = KernelManager(kernel_name="job"), time.monotonic()
    manager.log = logging.getLogger("queue")
    with (
        cluster.blocked(),
        caplog.at_level(logging.WARNING, "queue"),
        pytest.raises(CurveKernelError) as caught,
    ):
        manager.start_kernel()
    assert time.monotonic() - before < 12
    assert "was still PENDING after 3 seconds" in caught.value.message
    assert "Resources" in caught.value.message
    assert "queue_timeout" in caught.value.hint
    assert "is PENDING (Resources)" in caplog.text


def test_cancelled_while_pending(cluster):
    cluster.host.kernelspec("job", "slurm", sbatch_options=["--cpus-per-task=4"])

    def cancel() -> None:
        [job] = wait_for("the job", cluster.jobs)
        cluster.call("scancel", job)

    with cluster.blocked():
        canceller = threading.Thread(target=cancel)
        canceller.start()
        with pytest.raises(CurveKernelError, match="CANCELLED"):
            KernelManager(kernel_name="job").start_kernel()
        canceller.join(20)


def test_a_job_that_slurm_refuses(cluster):
    cluster.host.kernelspec("job", "slurm", sbatch_options=["--partition=nowhere"])
    with pytest.raises(CurveKernelError, match=r"sbatch did not take the job: .*partition"):
        KernelManager(kernel_name="job").start_kernel()
    cluster.host.kernelspec("job", "slurm", sbatch_options=["--export=ALL"])
    with pytest.raises(CurveKernelError, match="can't be given"):
        KernelManager(kernel_name="job").start_kernel()
    cluster.host.kernelspec("job", "slurm", python="/nowhere/python")
    with pytest.raises(CurveKernelError, match="/nowhere/python"):
        KernelManager(kernel_name="job").start_kernel()


def test_cancelled_while_running(cluster):
    """Only a person has another job submitted."""
    cluster.host.kernelspec("job", "slurm")
    with started("job", IOLoopKernelManager) as (km, client):
        restarts: list[object] = []
        dead: list[object] = []
        km.add_restart_callback(lambda: restarts.append(1), "restart")
        km.add_restart_callback(lambda: dead.append(1), "dead")
        job, before = job_of(km), time.monotonic()
        cluster.call("scancel", job)
        wait_for("the end of the kernel", lambda: not km.is_alive(), 15)
        print(f"dead after {time.monotonic() - before:.1f} s: {km.provisioner._lost}")
        assert "CANCELLED" in km.provisioner._lost
        assert (restarts, dead) == ([], [1])
        client.stop_channels()
        km.restart_kernel()
        assert job_of(km) != job
        again = km.client()
        again.start_channels()
        again.wait_for_ready(timeout=60)
        assert run_code(again, "6 * 7") == ("ok", "42")
        again.stop_channels()


@pytest.mark.parametrize("network", ["direct", "tunnel"])
def test_by_ssh_to_a_login_node(cluster, network):
    host = cluster.host
    host.kernelspec("job", "slurm", host="far", ssh_options=host.ssh_options, network=network)
    with started("job") as (km, client):
        assert value(client, "__import__('getpass').getuser()") == host.user.name
        assert value(client, "__import__('os').environ['SLURM_JOB_ID']") == job_of(km)
        assert (km.ip == "127.0.0.1") == (network == "tunnel")
    assert not list(host.user.home.glob(".cache/curve_kernel/*"))


def test_out_of_time(doomed):
    """The kernel that conftest.py has started long ago."""
    assert doomed.stdout is not None
    said = doomed.stdout.readline()
    print(said)
    assert "TIMEOUT" in said


def test_a_node_that_is_gone(cluster):
    cluster.host.kernelspec("job", "slurm")
    with started("job") as (km, client):
        client.stop_channels()
        before = time.monotonic()
        cluster.host.cut()
        try:
            wait_for("the end of the kernel", lambda: not km.is_alive(), 90)
        finally:
            cluster.host.restore()
        print(f"dead after {time.monotonic() - before:.1f} s: {km.provisioner._lost}")
        assert "NODE_FAIL" in km.provisioner._lost
    with contextlib.suppress(AssertionError):
        cluster.call("scontrol", "update", f"nodename={cluster.node}", "state=resume")
    cluster.wait_until_idle()

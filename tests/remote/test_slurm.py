"""Kernels in Slurm's jobs: a real slurmctld here, a real slurmd in a network namespace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from far import Cluster, far_host, needs_root, slurm_cluster
from support import run_code, started

pytestmark = needs_root


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with far_host() as host, slurm_cluster(host) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _slurm_conf(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.config))


def test_start(cluster):
    cluster.host.kernelspec("job", "slurm")
    with started("job") as (km, client):
        print(km.get_connection_info())
        assert run_code(client, "import os; 'SLURM_JOB_ID' in os.environ") == ("ok", "True")
    assert cluster.jobs() == []

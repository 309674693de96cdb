"""Kernels on another host by ssh: a real sshd in a network namespace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from far import FarHost, far_host, needs_root
from support import run_code, started

pytestmark = needs_root


@pytest.fixture(scope="module")
def far() -> Iterator[FarHost]:
    with far_host() as host:
        yield host


def test_start_code_interrupt_restart_shutdown(far):
    far.kernelspec("far")
    with started("far") as (km, client):
        assert run_code(client, "import getpass; getpass.getuser()") == ("ok", repr(far.user.name))

"""A pytest plugin: writes each test's outcome, and what each kernel was started with, as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.provisioning import LocalProvisioner

outcomes: dict[str, str] = {}
kernels: list[str] = []

_launch = LocalProvisioner.launch_kernel


async def launch_kernel(self: LocalProvisioner, cmd: list[str], **kwargs: Any) -> Any:
    kernels.append(" ".join(cmd))
    return await _launch(self, cmd, **kwargs)


LocalProvisioner.launch_kernel = launch_kernel  # type: ignore[method-assign]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # The last word counts: a test that passed may still fail while it is torn down.
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    content = {"outcomes": outcomes, "kernels": kernels}
    Path(os.environ["UPSTREAM_RECORD"]).write_text(json.dumps(content))

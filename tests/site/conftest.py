from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

VARIABLE = "JUPYTER_DEFAULT_PROVISIONER_NAME"


def environment(kind: str) -> Path:
    script = str(Path(__file__).parent / "environment")
    done = subprocess.run([script, kind], stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def site() -> Path:
    """The environment with JupyterHub that all users have: its folder."""
    return environment("hub")


@pytest.fixture(scope="session")
def tools() -> Path:
    """The environment with the tools that run notebooks."""
    return environment("tools")


@pytest.fixture
def environments(tools: Path, tmp_path: Path) -> dict[str, dict[str, str]]:
    """The environment variables of a stock site, and of one that sets the variable."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env.pop(VARIABLE, None)
    env |= {"PATH": f"{tools}/bin:{env['PATH']}", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    found = {}
    for kind, more in (("stock", {}), ("variable", {VARIABLE: "curve-provisioner"})):
        # Of two servers with one database, jupyter-scheduler's stops the other's jobs.
        data = tmp_path / f"data-{kind}"
        data.mkdir()
        seen = tmp_path / f"seen-{kind}"
        found[kind] = {**env, **more, "JUPYTER_DATA_DIR": str(data), "SEEN": str(seen)}
    return found

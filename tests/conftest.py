from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a home of its own, so that it sees no other kernel and leaves nothing behind."""
    home = tmp_path / "home"
    folders = {
        "HOME": home,
        "IPYTHONDIR": home / "ipython",
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
    }
    for name, folder in folders.items():
        folder.mkdir(exist_ok=True, mode=0o700)
        monkeypatch.setenv(name, str(folder))
    for name in list(os.environ):
        if name.startswith(("JUPYTER_CURVE", "JPY_", "JUPYTER_PATH")):
            monkeypatch.delenv(name)


@pytest.fixture
def folder() -> Path:
    """Make the folder that lists the clients, with nobody in it."""
    folder = Path(os.environ["JUPYTER_CONFIG_DIR"]) / "curve"
    for name in ("owners", "viewers"):
        (folder / name).mkdir(parents=True, mode=0o700)
    return folder

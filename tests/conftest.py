from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A job in the background, or under nohup, ignores these, and so would each process that a test ends so.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def pytest_report_header(config: pytest.Config) -> str:
    """Say which of the tests this run does not look at."""
    here = Path(__file__).parent
    given = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    files = sorted(file for file in here.rglob("test_*.py") if file.parent != here / "helpers")
    out = {one for one in files if not any(one == path or path in one.parents for path in given)}
    folders = {one.parent for one in files}
    whole = {one for one in folders if out >= {file for file in files if file.parent == one}}
    names = [f"{one.relative_to(config.rootpath)}/" for one in whole]
    names += [str(one.relative_to(config.rootpath)) for one in out if one.parent not in whole]
    names += [str((here / "upstream" / "run").relative_to(config.rootpath))]
    return f"left out: {', '.join(sorted(names))}"


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

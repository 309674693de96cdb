"""A terminal, as a person has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import MODULE, wait_for

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux")


class Terminal:
    """A terminal of tmux, in which a command runs as a person's would."""

    def __init__(
        self,
        *arguments: str,
        home: Path | None = None,
        prefix: Sequence[str] = (),
        command: Sequence[str] = MODULE,
        columns: int = 150,
    ) -> None:
        self.name = f"curve-{uuid.uuid4()}"
        variables = [
            "HOME",
            "IPYTHONDIR",
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
        ]
        values = {name: os.environ[name] for name in variables}
        if home is not None:
            home.mkdir(exist_ok=True)
            values |= {"HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config")}
        settings = [f"{name}={value}" for name, value in values.items()]
        shell = 'trap : INT; env "$@"; echo "status $?"; sleep 60'
        line = ["sh", "-c", shell, "sh", *settings, *prefix, *command, *arguments]
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", "50", *line)

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-L", self.name, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    def screen(self) -> str:
        # -J joins what the terminal wrapped.
        return self.tmux("capture-pane", "-p", "-J")

    def wait(self, text: str) -> str:
        def found() -> str | None:
            screen = self.screen()
            return screen if text in screen else None

        try:
            return wait_for(repr(text), found)
        except TimeoutError:
            raise AssertionError(f"no {text!r} on the screen:\n{self.screen()}") from None

    def type(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.tmux("kill-server")

"""jupyter console on a terminal, and qtconsole in a window that no screen shows."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import run_code, started, wait_for
from terminal import Terminal, needs_tmux
from test_lab import kernel_pids

from curve_kernel import connection_file
from curve_kernel.inspect import inspect_kernels

JUPYTER = [sys.executable, "-m", "jupyter"]
PATIENCE = 6  # seconds; with a kernel that can be talked to it takes two
DRIVER = Path(__file__).with_name("drive_qtconsole.py")


def the_connection_file() -> Path:
    [file] = Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json")
    return file


@needs_tmux
def test_jupyter_console_with_a_kernel_of_its_own():
    with Terminal("console", "--kernel", "python3-curve", command=JUPYTER) as terminal:
        screen = terminal.wait("In [1]:")
        assert "warn" not in screen.lower()
        terminal.type("print('from ' + 'the console')", "Enter")
        terminal.wait("from the console")
        file = the_connection_file()
        assert "curve_secretkey" not in connection_file.read(file)
        [kernel] = inspect_kernels([str(file)])
        assert kernel.verdict == "encrypted"
        terminal.type("x = input('who? ')", "Enter")
        terminal.wait("who?")
        terminal.type("Ada", "Enter")
        terminal.wait("In [3]:")
        terminal.type("print(x * 2)", "Enter")
        terminal.wait("AdaAda")
        terminal.type("import time; print('as' + 'leep'); time.sleep(60)", "Enter")
        terminal.wait("asleep")
        terminal.type("C-c")
        terminal.wait("KeyboardInterrupt")
        [pid] = kernel_pids()
        for _ in range(5):
            # A prompt that is being drawn takes no keys.
            terminal.type("C-d")
            with contextlib.suppress(TimeoutError):
                wait_for("the question", lambda: "want to exit" in terminal.screen(), 3)
                break
        terminal.type("y", "Enter")
        terminal.wait("status 0")
        wait_for("the end of the kernel", lambda: pid not in kernel_pids())


@needs_tmux
def test_jupyter_console_existing_waits_for_ever():
    """Upstream does not take the public key from the file; the day it does, the docs have to change."""
    with started("python3-curve") as (km, client):
        arguments = ["console", "--existing", km.connection_file]
        with Terminal(*arguments, command=JUPYTER) as terminal, pytest.raises(TimeoutError):
            wait_for("a prompt", lambda: "In [" in terminal.screen(), PATIENCE)
        assert run_code(client, "print('undisturbed')") == ("ok", "undisturbed\n")


def qtconsole(*steps: str, options: list[str], patience: int = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DRIVER), str(patience), *steps, "--", *options],
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.flaky(reruns=1)
def test_qtconsole_with_a_kernel_of_its_own():
    steps = ["print('result', 6 * 7)", "result 42"]
    steps += ["import sys; print('curve_kernel' in sys.orig_argv)", "True"]
    steps += ["x = input('who' + '? ')", "who? ", "Ada", "In [4]:", "print(x * 2)", "AdaAda"]
    steps += ["%curve", "Every channel is encrypted"]
    steps += ["import time; print('as' + 'leep', flush=True); time.sleep(60)", "asleep"]
    steps += ["INTERRUPT", "KeyboardInterrupt", "print('still', x)", "still Ada"]
    done = qtconsole(*steps, options=["--kernel", "python3-curve"])
    assert done.returncode == 0, done.stderr
    assert "manager" in done.stdout
    assert "warn" not in done.stderr.lower()


def test_qtconsole_existing_shows_no_prompt():
    """As with upstream's console."""
    with started("python3-curve") as (km, client):
        done = qtconsole(options=["--existing", km.connection_file], patience=PATIENCE)
        assert done.returncode == 1
        assert "no 'In [' in the window" in done.stderr
        assert run_code(client, "print('undisturbed')") == ("ok", "undisturbed\n")

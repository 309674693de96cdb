"""Types the README's lines one after the other in a new account, with a wheel in place of the clone.

``python tests/readme.py WHEEL``: the line that opens JupyterLab, and then, in another terminal, every
command of every block and of the table, and the program. What is typed is read from the README; only
the words in capitals are filled in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect

ROOT = Path(__file__).parents[1]
PROMPT = "READY> "


def commands() -> Iterator[str]:
    """The README's commands in their order; a program is one, too."""
    block = None
    program: list[str] = []
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("```"):
            if block == "python":
                yield f"python -c {shlex.quote(chr(10).join(program))}"
            block = line[3:] if block is None else None
        elif block == "console" and line.startswith("$ "):
            yield line[2:]
        elif block == "python":
            program.append(line)
        elif block is None and (cell := re.match(r"\| `(curve-kernel .*?)` \|", line)):
            yield cell[1]


def wait_for(what: str, condition: Callable[[], Any], timeout: float) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.1)
    return found


class Account:
    """A new account on this machine, in a folder that stands for the clone."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.home = folder / "home"
        self.clone = folder / "curve_kernel"
        self.home.mkdir(mode=0o700)
        self.clone.mkdir()
        foreign = ("JUPYTER", "JPY", "IPYTHON", "PYTHON", "VIRTUAL_ENV", "CONDA", "XDG")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.env |= {"HOME": str(self.home), "BROWSER": "true", "TERM": "xterm", "PS1": PROMPT}
        self.runtime = self.home / ".local/share/jupyter/runtime"
        self.wheel = wheel

    @contextlib.contextmanager
    def jupyterlab(self) -> Iterator[None]:
        """Run the line that opens JupyterLab."""
        [line] = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
        assert line.count('".[lab]"') == 1
        line = line.replace('".[lab]"', f'"{self.wheel}[lab]"')
        print(f"$ {line}", flush=True)
        process = subprocess.Popen(
            ["bash", "-c", line],
            cwd=self.clone,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:

            def server() -> dict[str, Any] | None:
                assert process.poll() is None, "the line has ended"
                for file in self.runtime.glob("jpserver-*.json"):
                    with contextlib.suppress(OSError, ValueError):
                        self.server: dict[str, Any] = json.loads(file.read_text())
                        self.ask("api")
                        return self.server
                return None

            wait_for("the server", server, 600)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)

    def ask(self, path: str, **content: Any) -> Any:
        request = urllib.request.Request(
            f"{self.server['url']}{path}",
            data=json.dumps(content).encode() if content else None,
            headers={"Authorization": f"token {self.server['token']}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def certificate(self) -> Path:
        """Make a colleague's certificate."""
        home = self.home.parent / "colleague"
        home.mkdir()
        program = self.clone / ".venv/bin/curve-kernel"
        subprocess.run(
            [program, "keygen"],
            env={**self.env, "HOME": str(home)},
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
        return home / ".jupyter/curve/identity.key"


def type_lines(account: Account, words: dict[str, str]) -> None:
    """Type every line into one shell, and do in it what a person does next."""
    shell = pexpect.spawn(
        "bash",
        ["--norc", "--noprofile"],
        cwd=account.clone,
        env=account.env,
        encoding="utf-8",
        timeout=60,
    )
    shell.logfile_read = sys.stdout
    shell.setwinsize(50, 200)
    shell.expect_exact(PROMPT)
    for line in commands():
        by_hand = line.startswith("curve-kernel -")
        for word, value in words.items():
            line = re.sub(
                rf"\b{word}\b", "./by-hand.json" if by_hand and word == "FILE" else value, line
            )
        # A program's lines go in as one.
        shell.sendline(f"eval {shlex.quote(line)}" if "\n" in line else line)
        ends = (0,)
        if by_hand:
            shell.expect_exact("Connection file")
            shell.sendcontrol("\\")
            ends = (0, 131)
        elif "curve-kernel console" in line:
            shell.expect_exact("In [")
            shell.send("%curve\r")
            shell.expect_exact("Every channel is encrypted")
            shell.send("exit\r")
        elif "curve-kernel watch" in line:
            shell.expect_exact("[watching")
            shell.sendintr()
        shell.expect_exact(PROMPT)
        shell.sendline("echo status=$?")
        shell.expect(r"status=(\d+)\r")
        assert int(shell.match[1]) in ends, f"{line!r} ended with {shell.match[1]}"
        shell.expect_exact(PROMPT)
    shell.close(force=True)


def main() -> None:
    # What a shell starts in the background ignores these, and so would what is typed here.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        account = Account(Path(folder), Path(sys.argv[1]).absolute())
        with account.jupyterlab():
            assert "python3-curve" in account.ask("api/kernelspecs")["kernelspecs"]
            kernel = account.ask("api/kernels", name="python3-curve")["id"]
            words = {"FILE": kernel[:8], "NAME": "vera", "CERTIFICATE": str(account.certificate())}
            type_lines(account, words)
            assert "python3-curve" not in account.ask("api/kernelspecs")["kernelspecs"]
            assert not (account.home / ".jupyter/curve").exists()
    print("\nThe README's lines work, in their order.")


if __name__ == "__main__":
    main()

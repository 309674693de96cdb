"""JupyterLab, a console, `watch` and bare clients on one kernel: four of them in turn are out.

Meanwhile an owner's cell prints in a JupyterLab, which loses no line, nor does anybody else who stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pexpect
import psutil
import pytest
from members import SECONDS, Kernel
from support import MODULE, headless, wait_for

pytest.importorskip("playwright")
from browser import CHROMIUM, Lab, browser_page, jupyter_server
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect
from test_attach import UID, Her, her, share  # noqa: F401

from curve_kernel.keys.certificates import write_certificate

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    # JupyterLab's own page is sometimes late or early on a busy machine.
    pytest.mark.flaky(reruns=2),
]

CELL = """import pathlib, time
number = 0
while not pathlib.Path({0!r}).exists():
    print('line', number)
    number += 1
    time.sleep(0.1)
print('over')"""


class Colleague:
    """Somebody with keys and a home of their own, who has been given a copy of the connection file."""

    def __init__(self, kernel: Kernel, tmp_path: Path, name: str, role: str) -> None:
        self.name = name
        keys = kernel.list(name, role)
        home = tmp_path / f"home-of-{name}"
        folder = home / "config" / "curve"
        folder.mkdir(parents=True, mode=0o700)
        write_certificate(folder / "identity.key_secret", keys.public_key, keys.secret_key)
        self.file, self.log = home / "copy.json", home / "log"
        self.file.write_text(Path(kernel.info["file"]).read_text())
        self.env = {**os.environ, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config")}

    def watch(self) -> subprocess.Popen[str]:
        command = [*MODULE, "watch", "--existing", str(self.file)]
        with self.log.open("w") as log:
            process = subprocess.Popen(command, env=self.env, text=True, stdout=log, stderr=log)
        wait_for("watch", lambda: "read-only" in self.log.read_text())
        return process

    def console(self) -> pexpect.spawn:
        words = [*MODULE[1:], "console", "--existing", str(self.file), "--simple-prompt"]
        child = pexpect.spawn(MODULE[0], words, encoding="utf-8", timeout=60, echo=False, env=self.env)
        child.expect(r"In \[\d+\]: ")
        return child


def connections(kernel: Kernel, pid: int, *channels: str) -> set[tuple[str, int]]:
    """The connections of a process to the kernel, by channel and its own port, as the system tells."""
    ports = {
        kernel.info[f"{name}_port"]: name
        for name in channels or ("shell", "control", "stdin", "iopub", "hb")
    }
    found = set()
    for one in psutil.Process(pid).net_connections("tcp"):
        if one.status == psutil.CONN_ESTABLISHED and one.raddr.port in ports:
            found.add((ports[one.raddr.port], one.laddr.port))
    return found


def out_after(since: float, is_out: Callable[[], bool]) -> float:
    """Wait until somebody is out; gives the seconds since a moment of the clock."""
    wait_for("somebody to be out", is_out, 30)
    return time.time() - since


def lines(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^line (\d+)$", text, re.M)]


def whole(text: str) -> bool:
    numbers = lines(text)
    return len(numbers) > 20 and numbers == list(range(numbers[0], numbers[-1] + 1))


@pytest.mark.timeout(300)
def test_one_after_the_other(tmp_path: Path, her: Her) -> None:  # noqa: F811
    folder = Path(os.environ["JUPYTER_CONFIG_DIR"], "curve")
    notebooks, stop, marker = tmp_path / "notebooks", tmp_path / "stop", tmp_path / "marker"
    notebooks.mkdir()
    assert subprocess.run([*MODULE, "keygen"], capture_output=True, timeout=60).returncode == 0
    assert her.run("keygen").returncode == 0
    certificate = tmp_path / "vera.key"
    certificate.write_bytes((her.home / "config" / "curve" / "identity.key").read_bytes())
    file = Path(os.environ["JUPYTER_RUNTIME_DIR"], "kernel-8a1f.json")
    with contextlib.ExitStack() as stack:
        _, info = stack.enter_context(headless("--allowlist", file=file))
        kernel = Kernel({**info, "file": str(file)}, None, tmp_path / "log", folder)
        handed = her.give("for-vera.json", share(certificate, str(file), "--name=vera", "--role=owner"))
        for done in (her.run("attach", str(handed)), attach(file)):
            assert done.returncode == 0, done.stderr

        # Two JupyterLabs, two that watch, a console, and two bare clients.
        page = stack.enter_context(browser_page())
        lab = Lab(page, stack.enter_context(jupyter_server(notebooks, tmp_path / "mine.log")))
        lab.open_notebook("Python 3 joined to kernel-8a1f")
        other = page.context.browser.new_page(viewport={"width": 1280, "height": 800})
        other.set_default_timeout(30_000)
        her_lab = Lab(other, stack.enter_context(her.lab(tmp_path / "hers.log")))
        her_lab.open_notebook("Python 3 joined to for-vera")
        her_lab.run("print('said by vera')", "said by vera")
        watcher, guest, olga = (
            Colleague(kernel, tmp_path, name, role)
            for name, role in (("walter", "viewer"), ("guest", "viewer"), ("olga", "owner"))
        )
        watches = watcher.watch(), guest.watch()
        for process in watches:
            stack.callback(process.kill)
        console = olga.console()
        stack.callback(console.close, force=True)
        for name in ("otto", "ida"):
            kernel.list(name)
        otto, ida = (stack.enter_context(kernel.member(name)) for name in ("otto", "ida"))

        lab.type_cell(CELL.format(str(stop)))
        page.keyboard.press("Shift+Enter")
        output = lab.cells.first.locator(".jp-OutputArea-output").first
        expect(output).to_contain_text("line 3", timeout=30_000)
        # What she sends waits for the cell's end, and she will not be there any more.
        her_lab.type_cell(f"open({str(marker)!r}, 'w').close()")
        other.keyboard.press("Shift+Enter")
        expect(her_lab.cells.nth(1).locator(".jp-InputPrompt")).to_have_text("[*]:")

        times = {}
        server = next(p.pid for p in psutil.Process().children(recursive=True) if p.uids().real == UID)
        before = connections(kernel, server)
        assert {name for name, _ in before} >= {"shell", "control", "stdin", "iopub"}
        revoking = subprocess.Popen([*MODULE, "revoke", "vera"], text=True, stdout=subprocess.PIPE)
        stack.callback(revoking.kill)
        path = kernel.path("vera")
        wait_for("the certificate to go", lambda: not path.exists())
        since = path.parent.stat().st_mtime
        times["JupyterLab, revoked"] = out_after(
            since, lambda: not connections(kernel, server) & before
        )
        said = revoking.communicate(timeout=60)[0]
        assert "connections are ended: kernel-8a1f.json" in said

        before = connections(kernel, console.pid, "shell", "control", "stdin")
        assert {name for name, _ in before} >= {"shell", "stdin"}
        kernel.list("olga", "viewer")
        kernel.path("olga").unlink()
        times["console, demoted"] = out_after(
            time.time(),
            lambda: not connections(kernel, console.pid, "shell", "control", "stdin") & before,
        )

        before = connections(kernel, watches[1].pid)
        assert before
        moment = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(seconds=2)
        kernel.list("guest", "viewer", until=moment)
        times["watch, at its end"] = out_after(
            moment.timestamp(),
            lambda: watches[1].poll() is not None or not connections(kernel, watches[1].pid) & before,
        )

        keys = kernel.keys.pop("ida")
        kernel.list("ida")
        times["a bare client, another key"] = out_after(time.time(), ida.is_out)
        assert keys != kernel.keys["ida"]

        print({name: round(seconds, 2) for name, seconds in times.items()})
        assert max(times.values()) < SECONDS, times
        her_lab.screenshot("revoked")
        # Those who stay have every line.
        shown = len(lines(output.inner_text()))
        wait_for("a second more", lambda: len(lines(output.inner_text())) > shown + 10)
        stop.touch()
        expect(output).to_contain_text("over", timeout=30_000)
        lab.run("print('goes', 'on')", "goes on")
        assert not marker.exists(), "what vera had sent was run after she was revoked"
        assert lines(output.inner_text())[0] == 0
        assert whole(output.inner_text())
        text = "".join(m["content"].get("text", "") for m in otto.messages("iopub", 2))
        assert not otto.lost
        assert lines(text) == lines(output.inner_text())
        wait_for("watch", lambda: "goes on" in watcher.log.read_text())
        assert lines(watcher.log.read_text()) == lines(output.inner_text())
        assert watches[0].poll() is None
        # Those who are out are told why.
        assert watches[1].wait(30) == 1
        assert "not authorized" in guest.log.read_text()
        with contextlib.suppress(PlaywrightError):
            # JupyterLab believes that every kernel that ends is started again.
            other.get_by_text("appears to have died").wait_for(timeout=20_000)
            other.locator(".jp-Dialog").get_by_role("button", name="Ok").first.click()
        dialog = other.locator(".jp-Dialog").filter(has_text="key not authorized")
        expect(dialog).to_contain_text("does not list this client's key", timeout=60_000)
        # In lines that the dialog does not cut off.
        text = dialog.inner_text()
        assert "the kernel's user can list it" in text
        assert max(map(len, text.splitlines())) <= 100
        her_lab.screenshot("revoked-dialog")


def attach(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, "attach", str(file)], capture_output=True, text=True, timeout=60)

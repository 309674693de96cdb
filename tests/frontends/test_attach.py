"""Two people, each with a JupyterLab of their own in a browser, on one kernel."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MODULE, headless, run_code, wait_for

pytest.importorskip("playwright")
from browser import CHROMIUM, Lab, browser_page, jupyter_server
from playwright.sync_api import expect
from test_notebook import Notebook, interrupt_loop

from curve_kernel.client import BlockingKernelClient
from curve_kernel.keys.certificates import load_identity

UID = 23571
AS_HER = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
FOLDERS = {
    "HOME": "",
    "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    # JupyterLab's own page is sometimes late or early on a busy machine.
    pytest.mark.flaky(reruns=2),
]


def can_be_another_user() -> bool:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    return not subprocess.run(
        [*AS_HER, sys.executable, "-c", "import curve_kernel"], cwd="/"
    ).returncode


class Her:
    """Another user of the machine, with a home and keys of her own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {**os.environ, "USER": "vera", "LOGNAME": "vera"}
        for name, folder in FOLDERS.items():
            self.env[name] = str(home / folder)
            self.folder(folder)

    def folder(self, name: str) -> Path:
        path = self.home / name
        for one in [*reversed(path.relative_to(self.home).parents), path.relative_to(self.home)]:
            (self.home / one).mkdir(mode=0o700, exist_ok=True)
            os.chown(self.home / one, UID, UID)
        return path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*AS_HER, *MODULE, *words],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def give(self, name: str, content: str) -> Path:
        file = self.home / name
        file.write_text(content)
        file.chmod(0o600)
        os.chown(file, UID, UID)
        return file

    @contextlib.contextmanager
    def lab(self, log: Path) -> Iterator[str]:
        for name in ("apputils-extension", "docmanager-extension"):
            self.folder(f"config/lab/user-settings/@jupyterlab/{name}")
        notebooks = self.folder("notebooks")
        with contextlib.ExitStack() as stack:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in self.env.items():
                    patch.setenv(name, value)
                address = stack.enter_context(jupyter_server(notebooks, log, prefix=AS_HER))
            yield address


@pytest.fixture
def her() -> Iterator[Her]:
    if not can_be_another_user():
        pytest.skip("only root can become another user, who can run this Python")
    with tempfile.TemporaryDirectory(prefix="curve-vera-") as home:
        os.chown(home, UID, UID)
        yield Her(Path(home))


def share(certificate: Path, file: str, *words: str) -> str:
    words = ("share", str(certificate), "--existing", file, "--ip", "127.0.0.1", "--for", "2h", *words)
    done = subprocess.run([*MODULE, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_users_on_one_kernel(tmp_path, her):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    assert subprocess.run([*MODULE, "keygen"], capture_output=True, timeout=30).returncode == 0
    assert her.run("keygen").returncode == 0
    certificate = tmp_path / "vera.key"  # she sends it
    certificate.write_bytes((her.home / "config" / "curve" / "identity.key").read_bytes())
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(jupyter_server(folder, tmp_path / "mine.log"))
        page = stack.enter_context(browser_page())
        lab = Lab(page, mine)
        lab.open_notebook("Python 3 (CurveZMQ)")
        lab.run("shared = 'said by root'", None)
        [file] = Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json")
        assert her.run("attach", str(file)).returncode == 1, "she may not read it"

        handed = her.give("for-vera.json", share(certificate, str(file), "--name=vera", "--role=owner"))
        done = her.run("attach", str(handed))
        assert done.returncode == 0, done.stderr
        assert 'the tile "Python 3 joined to for-vera"' in done.stdout
        hers = stack.enter_context(her.lab(tmp_path / "hers.log"))
        other = page.context.browser.new_page(viewport={"width": 1280, "height": 800})
        other.set_default_timeout(30_000)
        her_lab = Lab(other, hers)
        her_lab.open_notebook("Python 3 joined to for-vera")
        her_lab.run("print(shared); reply = 'said by vera'", "said by root")
        her_lab.screenshot("joined")
        lab.run("print(reply)", "said by vera")
        # A console in JupyterLab shows what everybody runs, with "Show All Kernel Activity".
        lab.run("%curve", "vera")

        # She leaves, and the kernel goes on for me.
        lab.type_cell("import time; time.sleep(3); print('not', 'interrupted')")
        page.keyboard.press("Shift+Enter")
        her_lab.menu("Kernel", "Shut Down Kernel")
        expect(her_lab.kernel_name).to_have_text("No Kernel")
        wait_for(
            "her server to have left", lambda: not list((her.home / "runtime").glob("kernel-*")), 20
        )
        expect(page.locator(".jp-NotebookPanel:visible")).to_contain_text("not interrupted")
        lab.run("print(reply, 'and left')", "said by vera and left")

        # She comes again, her restart is refused with a sentence, and changes nothing.
        her_lab = Lab(other, hers)
        her_lab.open_notebook("Python 3 joined to for-vera")
        refused(her_lab)
        lab.run("print(reply, 'still')", "said by vera still")
        her_lab.choose_kernel("Python 3 joined to for-vera")
        her_lab.run("print(shared, 'again')", "said by root again")

        # As a viewer she gets a sentence in place of a notebook.
        share(certificate, str(file), "--name=vera", "--role=viewer")
        her_lab = Lab(other, hers)
        her_lab.tile("Python 3 joined to for-vera").click()
        dialog = other.locator(".jp-Dialog")
        expect(dialog).to_contain_text("you may watch this kernel, and not use it", timeout=30_000)
        her_lab.screenshot("joined-viewer")


def refused(lab: Lab) -> None:
    page = lab.page
    lab.menu("Kernel", "Restart Kernel…")
    page.locator(".jp-Dialog").get_by_role("button", name="Confirm Kernel Restart").click()
    dialog = page.locator(".jp-Dialog").filter(has_text="is not restarted")
    expect(dialog).to_contain_text("choose the kernel again to go on", timeout=30_000)
    lab.screenshot("joined-restart")
    dialog.get_by_role("button", name="Ok").click()


def console_shows_what_others_run(lab: Lab, info: dict[str, Any]) -> None:
    """A console in JupyterLab shows all of a kernel's cells, those of other front ends too."""
    console = lab.console_of_all()
    client = BlockingKernelClient(client_keys=load_identity())
    client.load_connection_info(info)
    client.start_channels()
    assert run_code(client, "print('seen', 'there')") == ("ok", "seen there\n")
    client.stop_channels()
    expect(console).to_contain_text("seen there", timeout=30_000)
    lab.screenshot("joined-console")


@contextlib.contextmanager
def attached() -> Iterator[tuple[Path, subprocess.Popen[str], dict[str, Any]]]:
    """Run a kernel by hand, kernel-8a1f, that this user has a tile for; gives its file, too."""
    file = Path(os.environ["JUPYTER_RUNTIME_DIR"], "kernel-8a1f.json")
    assert subprocess.run([*MODULE, "keygen"], capture_output=True, timeout=30).returncode == 0
    with headless("--allowlist", file=file) as kernel:
        done = subprocess.run([*MODULE, "attach", str(file)], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        yield file, *kernel


def test_a_kernel_by_hand_that_ends(tmp_path):
    """The notebook is told; a tile of a kernel that has ended says so."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        with attached() as (_, _, info):
            server = stack.enter_context(jupyter_server(folder, tmp_path / "server.log"))
            page = stack.enter_context(browser_page())
            lab = Lab(page, server)
            lab.open_notebook("Python 3 joined to kernel-8a1f")
            client = BlockingKernelClient(client_keys=load_identity())
            client.load_connection_info(info)
            client.start_channels()
            assert run_code(client, "x = 41") == ("ok", "")
            client.stop_channels()
            lab.run("print(x + 1)", "42")
            console_shows_what_others_run(lab, info)
        dialog = page.locator(".jp-Dialog").filter(has_text="has ended")
        with contextlib.suppress(AssertionError):
            # JupyterLab believes that every kernel that ends is started again.
            page.get_by_text("appears to have died").wait_for(timeout=20_000)
            page.locator(".jp-Dialog").get_by_role("button", name="Ok").first.click()
        expect(dialog).to_contain_text("kernel-8a1f.json has ended", timeout=30_000)
        lab.screenshot("joined-died")
        lab = Lab(page, server)
        lab.tile("Python 3 joined to kernel-8a1f").click()
        dialog = page.locator(".jp-Dialog")
        expect(dialog).to_contain_text("kernel-8a1f.json has ended", timeout=30_000)
        lab.screenshot("joined-ended")


def test_notebook_7(tmp_path):
    """It joins, shares the state, interrupts, is refused a restart, and leaves."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        file, process, info = stack.enter_context(attached())
        client = BlockingKernelClient(client_keys=load_identity())
        client.load_connection_info(info)
        client.start_channels()
        stack.callback(client.stop_channels)
        assert run_code(client, "x = 41") == ("ok", "")
        server = jupyter_server(folder, tmp_path / "server.log", app="notebook")
        address = stack.enter_context(server)
        page = stack.enter_context(browser_page())
        page.goto(f"{address}/tree?token=t0ken")
        page.get_by_text(re.compile("^New$")).first.click(timeout=60_000)
        with page.context.expect_page() as opened:
            page.locator(".lm-Menu-item:visible", has_text="joined to kernel-8a1f").click()
        opened.value.set_default_timeout(30_000)
        notebook = Notebook.__new__(Notebook)
        notebook.page = opened.value
        notebook.wait_open(1)
        notebook.run("import time; x += 1; print(x)", "42")
        interrupt_loop(notebook)
        assert run_code(client, "x") == ("ok", "42")
        refused(notebook)
        assert run_code(client, "x") == ("ok", "42")
        notebook.choose_kernel("Python 3 joined to kernel-8a1f")
        notebook.run("print(x, 'as it was')", "42 as it was")
        notebook.screenshot("joined-notebook-7")
        notebook.menu("Kernel", "Shut Down Kernel")
        wait_for("the server to have left", lambda: list(file.parent.glob("kernel-*")) == [file], 20)
        assert run_code(client, "x") == ("ok", "42")
        assert process.poll() is None

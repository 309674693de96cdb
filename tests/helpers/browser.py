"""JupyterLab in a real browser, as a person uses it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from playwright.sync_api import BrowserType, Locator, Page, expect, sync_playwright
from support import SCREENSHOTS, wait_for

# Playwright would give up after five seconds, and a busy machine takes longer for a page.
expect.set_options(timeout=30_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def jupyter_server(
    folder: Path,
    log: Path,
    *arguments: str,
    app: str = "lab",
    port: int = 0,
    prefix: Sequence[str] = (),
) -> Iterator[str]:
    """Run a server in *folder*; gives its address."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    # Not by way of `jupyter lab`, which another user may not find.
    module = ["jupyterlab"] if prefix and app == "lab" else ["jupyter", app]
    command = [*prefix, sys.executable, "-m", *module]
    command += ["--no-browser", "--allow-root", f"--port={port}"]
    command += [
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=t0ken",
        *arguments,
    ]
    # No dialogs but those that a test is about.
    settings = Path(os.environ["JUPYTER_CONFIG_DIR"], "lab/user-settings/@jupyterlab")
    for name, content in {
        "apputils-extension/notification": '{"fetchNews": "false"}',
        "docmanager-extension/plugin": '{"renameUntitledFileOnSave": false}',
    }.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            if prefix:  # its loopback may be another host's
                return "is running at" in log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t0ken", timeout=2).close()
                return True
            return False

        wait_for("the server", answers, timeout=60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextlib.contextmanager
def browser_page() -> Iterator[Page]:
    with sync_playwright() as playwright, open_browser(playwright.chromium) as page:
        yield page


@contextlib.contextmanager
def open_browser(kind: BrowserType, prefix: Sequence[str] = ()) -> Iterator[Page]:
    """Run a browser, with *prefix* on another host; gives a page."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "browser")
        program.write_text(f'#!/bin/sh\nexec {shlex.join([*prefix, str(CHROMIUM)])} "$@"\n')
        program.chmod(0o755)
        browser = kind.launch(
            executable_path=program if prefix else CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(30_000)
        try:
            yield page
        finally:
            browser.close()


class Lab:
    """One JupyterLab page."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        page.goto(f"{address}/lab?reset&token=t0ken")
        expect(page.locator(".jp-LauncherCard").first).to_be_visible(timeout=60_000)

    def screenshot(self, name: str) -> Path:
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def tile(self, title: str) -> Locator:
        return self.page.locator(f'.jp-LauncherCard[data-category="Notebook"][title="{title}"]')

    def open_notebook(self, title: str) -> None:
        self.tile(title).click()
        expect(self.page.locator(".jp-NotebookPanel:visible .jp-Cell")).to_have_count(1)
        expect(self.kernel_name).to_have_text(title, timeout=30_000)
        self.wait_idle()

    def wait_idle(self) -> None:
        indicator = self.page.locator(".jp-NotebookPanel:visible .jp-Notebook-ExecutionIndicator")
        expect(indicator).to_have_attribute("data-status", "idle", timeout=30_000)

    @property
    def kernel_name(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:visible .jp-KernelName")

    @property
    def cells(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:visible .jp-CodeCell")

    def type_cell(self, code: str) -> Locator:
        """Put *code* into the last cell, without the editor's own completing of brackets."""
        cell = self.cells.last
        cell.locator(".cm-content").click()
        self.page.keyboard.insert_text(code)
        return cell

    def run(self, code: str, says: str | re.Pattern[str] | None = None) -> Locator:
        """Type *code* into the last cell and press shift-enter; waits until the output says so."""
        cell = self.type_cell(code)
        index = self.cells.count() - 1
        self.page.keyboard.press("Shift+Enter")
        expect(self.cells).to_have_count(index + 2)
        cell = self.cells.nth(index)
        if says is not None:
            expect(cell.locator(".jp-OutputArea")).to_contain_text(says, timeout=30_000)
        return cell

    def menu(self, *names: str) -> None:
        """Click through the menu bar."""
        self.page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{names[0]}$")).click()
        for name in names[1:]:
            self.page.locator(
                ".lm-Menu-item:visible", has_text=re.compile(f"^{re.escape(name)}")
            ).first.click()

    def choose_kernel(self, title: str) -> None:
        self.kernel_name.click()
        dialog = self.page.locator(".jp-Dialog")
        dialog.locator("select").select_option(label=title)
        dialog.get_by_role("button", name="Select Kernel").click()
        expect(self.kernel_name).to_have_text(title, timeout=30_000)
        self.wait_idle()

    def console_of_all(self) -> Locator:
        """Open a console on the notebook's kernel, which shows what others run there."""
        self.cells.last.click(button="right")
        item = self.page.locator(".lm-Menu-item:visible")
        item.filter(has_text="New Console for Notebook").click()
        console = self.page.locator(".jp-CodeConsole:visible")
        expect(console).to_be_visible()
        console.locator(".jp-CodeConsole-content").click(button="right")
        item.filter(has_text="Show All Kernel Activity").click()
        return console

    def restart(self) -> None:
        self.menu("Kernel", "Restart Kernel…")
        self.page.locator(".jp-Dialog button", has_text=re.compile("^Restart$")).click()
        time.sleep(1)
        self.wait_idle()

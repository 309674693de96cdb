"""A kernel on one host is shared, by one command there, and used on another host."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import KERNEL_ADDRESS, Host, needs_namespaces, two_hosts
from nbformat import read, v4, write
from support import MODULE, SCREENSHOTS, headless, wait_for

pytest.importorskip("playwright")
from browser import CHROMIUM, Lab, jupyter_server, open_browser
from playwright.sync_api import BrowserType, expect, sync_playwright

pytestmark = needs_namespaces
PLOT = """import matplotlib.pyplot as plt
plt.figure(figsize=(2.6, 1.1))
plt.plot(loss); plt.show()"""


FOLDERS = {
    "HOME": "",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
}


def folders(home: Path) -> dict[str, str]:
    for folder in FOLDERS.values():
        (home / folder).mkdir(mode=0o700, exist_ok=True)
    return {name: str(home / folder) for name, folder in FOLDERS.items()}


def on(host: Host, home: Path, *words: str, command: list[str] = MODULE) -> tuple[int, str, str]:
    done = subprocess.run(
        [*host.prefix, *command, *words],
        env={**os.environ, **folders(home)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_kernel_on_all_addresses_is_shared_and_joined(tmp_path):
    """Its file says 0.0.0.0; what is handed over has the address that the other host reaches."""
    with two_hosts() as (there, here):
        mine, hers = tmp_path / "mine", tmp_path / "hers"
        assert on(here, hers, "keygen")[0] == 0
        assert on(there, mine, "keygen")[0] == 0
        certificate = hers / "config" / "curve" / "identity.key"
        file = mine / "kernel.json"
        env = {"HOME": str(mine), "JUPYTER_CONFIG_DIR": str(mine / "config")}
        options = ("--allowlist", "--ip=0.0.0.0")
        with headless(*options, file=file, env=env, prefix=there.prefix) as (process, _):
            words = ("--name=vera", "--role=owner", "--for=1h", "--existing", str(file))
            status, out, err = on(there, mine, "share", str(certificate), *words)
            assert status == 0, err
            assert json.loads(out)["ip"] == KERNEL_ADDRESS
            assert f"the kernel's address for others is taken to be {KERNEL_ADDRESS}" in err
            handed = hers / "for-vera.json"
            handed.write_text(out)
            handed.chmod(0o600)
            status, out, err = on(here, hers, "attach", str(handed))
            assert status == 0, err
            notebook = hers / "notebook.ipynb"
            write(v4.new_notebook(cells=[v4.new_code_cell("import os; os.getpid()")]), notebook)
            words = ("-m", "jupyter", "execute", "--kernel_name=joined-for-vera", "--inplace")
            status, _, err = on(here, hers, *words, str(notebook), command=[sys.executable])
            assert status == 0, err
            [output] = read(notebook, 4).cells[0].outputs
            assert output.data["text/plain"] == str(process.pid)
            assert process.poll() is None
            here.link("down")
            status, _, err = on(here, hers, "attach", str(handed))
            assert status == 1
            assert "nobody answers at" in err


@contextlib.contextmanager
def lab_on(host: Host, home: Path, kind: BrowserType) -> Iterator[Lab]:
    """A JupyterLab on a host, and its page in a browser there."""
    notebooks = home / "notebooks"
    notebooks.mkdir()
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in folders(home).items():
                patch.setenv(name, value)
            server = jupyter_server(notebooks, home / "server.log", prefix=host.prefix)
            address = stack.enter_context(server)
        yield Lab(stack.enter_context(open_browser(kind, host.prefix)), address)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.flaky(reruns=2)  # JupyterLab's own page is sometimes late or early on a busy machine
def test_a_jupyterlab_on_each_of_two_machines(tmp_path):
    """On one kernel, each sees what the other runs; one leaves, and the other goes on."""
    mine, hers = tmp_path / "mine", tmp_path / "hers"
    file, handed = mine / "runtime" / "kernel-8a1f.json", hers / "for-vera.json"
    with two_hosts() as (there, here), contextlib.ExitStack() as stack:
        assert on(there, mine, "keygen")[0] == on(here, hers, "keygen")[0] == 0
        options = ("--allowlist", f"--ip={KERNEL_ADDRESS}")
        kernel = headless(*options, file=file, env=folders(mine), prefix=there.prefix)
        process, _ = stack.enter_context(kernel)
        certificate = str(hers / "config" / "curve" / "identity.key")
        words = ("--name=vera", "--role=owner", "--for=2h", "--existing", str(file))
        status, out, err = on(there, mine, "share", certificate, *words)
        assert status == 0, err
        handed.write_text(out)
        handed.chmod(0o600)
        for host, home, name in ((there, mine, file), (here, hers, handed)):
            status, _, err = on(host, home, "attach", str(name))
            assert status == 0, err
        kind = stack.enter_context(sync_playwright()).chromium
        lab = stack.enter_context(lab_on(there, mine, kind))
        her_lab = stack.enter_context(lab_on(here, hers, kind))
        lab.open_notebook("Python 3 joined to kernel-8a1f")
        her_lab.open_notebook("Python 3 joined to for-vera")
        console, her_console = lab.console_of_all(), her_lab.console_of_all()

        lab.run("loss = [.9, .5, .3, .25]\nprint('trained:', loss[-1])", "trained: 0.25")
        expect(her_console).to_contain_text("trained: 0.25", timeout=30_000)
        her_lab.run(PLOT)
        expect(her_lab.cells.first.locator(".jp-OutputArea img")).to_be_visible(timeout=30_000)
        expect(console.locator(".jp-OutputArea img")).to_be_visible(timeout=30_000)
        beside("two-machines", {"you, on the kernel's machine": lab, "vera, on hers": her_lab})
        lab.run("%curve", "vera")

        # The one on the kernel's own machine leaves, while the other's cell runs.
        her_lab.type_cell("import time; time.sleep(3); print('not', 'interrupted')")
        her_lab.page.keyboard.press("Shift+Enter")
        lab.menu("Kernel", "Shut Down Kernel")
        expect(lab.kernel_name).to_have_text("No Kernel", timeout=30_000)
        wait_for("the server to have left", lambda: list(file.parent.glob("kernel-*")) == [file], 20)
        expect(her_lab.cells.nth(1)).to_contain_text("not interrupted", timeout=30_000)
        her_lab.run("print(loss[0], 'is still there')", "0.9 is still there")

        # It comes back, and finds all as it was; then the other leaves.
        lab.choose_kernel("Python 3 joined to kernel-8a1f")
        lab.run("print(loss[1], 'for me too')", "0.5 for me too")
        her_lab.menu("Kernel", "Shut Down Kernel")
        expect(her_lab.kernel_name).to_have_text("No Kernel", timeout=30_000)
        lab.run("print(loss[2], 'alone')", "0.3 alone")
        assert process.poll() is None


def beside(name: str, labs: dict[str, Lab]) -> None:
    """A picture of several pages, side by side."""
    parts = []
    for title, lab in labs.items():
        lab.page.keyboard.press("Control+b")
        lab.page.set_viewport_size({"width": 600, "height": 780})
        lab.page.locator(".jp-CodeConsole-content").evaluate("e => e.scrollTo(0, e.scrollHeight)")
        lab.page.wait_for_timeout(500)
        picture = base64.b64encode(lab.page.screenshot()).decode()
        parts.append(f"<figure><img src='data:image/png;base64,{picture}'>{title}</figure>")
        lab.page.set_viewport_size({"width": 1280, "height": 800})
    page = lab.page.context.browser.new_page()
    page.set_viewport_size({"width": 1240, "height": 820})
    style = "body {display: flex; margin: 0; font: 15px sans-serif} figure {margin: 8px}"
    page.set_content(f"<style>{style}</style>{''.join(parts)}")
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    page.close()

"""What JupyterLab's dialogs say of a kernel that does not start."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("playwright")
from browser import CHROMIUM, Lab, browser_page, jupyter_server
from playwright.sync_api import Locator, expect
from test_lab import kernel_pids

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    # JupyterLab's own page is sometimes late or early on a busy machine.
    pytest.mark.flaky(reruns=2),
]


def test_a_kernel_that_ignores_its_keys(tmp_path):
    """The reason is on the page, and nothing waits for ever."""
    spec = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / "ignores"
    spec.mkdir(parents=True)
    metadata = {"kernel_provisioner": {"provisioner_name": "curve-provisioner", "config": {}}}
    content = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Ignores its keys",
        "language": "python",
        "metadata": metadata,
    }
    (spec / "kernel.json").write_text(json.dumps(content))
    notebooks, log = tmp_path / "notebooks", tmp_path / "server.log"
    notebooks.mkdir()
    with jupyter_server(notebooks, log) as address, browser_page() as page:
        lab = Lab(page, address)
        lab.tile("Ignores its keys").click()
        dialog = page.locator(".jp-Dialog")
        check_whole_text(dialog, "ignores its CURVE keys", "use key_distribution=file if it can")
        lab.screenshot("ignores-its-keys")
    assert "ignores its CURVE keys, so it was ended" in log.read_text()


def test_a_list_that_cannot_be_trusted(tmp_path, folder):
    """The kernel's reason is on the page, in place of five restarts and then no kernel."""
    (folder / "viewers").chmod(0o720)
    notebooks, log = tmp_path / "notebooks", tmp_path / "server.log"
    notebooks.mkdir()
    with jupyter_server(notebooks, log) as address, browser_page() as page:
        lab = Lab(page, address)
        lab.tile("Python 3 (CurveZMQ)").click()
        dialog = page.locator(".jp-Dialog")
        check_whole_text(dialog, "can be written by others", f"chmod go-w {folder / 'viewers'}")
        lab.screenshot("list-not-trusted")
        assert kernel_pids() == []
        # What the dialog says helps.
        (folder / "viewers").chmod(0o700)
        dialog.get_by_role("button", name="Ok").click()
        lab = Lab(page, address)
        lab.open_notebook("Python 3 (CurveZMQ)")
        lab.run("print('it', 'runs')", "it runs")
    assert "restarting kernel" not in log.read_text()


def check_whole_text(dialog: Locator, says: str, hint: str) -> None:
    """The dialog shows an error's both lines, and none of them is cut off."""
    text = dialog.locator("pre")
    expect(text).to_contain_text(says, timeout=15_000)
    expect(text).to_contain_text(hint)
    assert text.evaluate("element => element.scrollWidth <= element.clientWidth")

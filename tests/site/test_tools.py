"""Programs that start kernels, as they are, where a site sets the variable and where it does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import textwrap
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from browser import Lab, browser_page
from playwright.sync_api import expect
from support import wait_for
from tornado.websocket import websocket_connect

# What a cell writes down: what `status --json` says of the kernel that runs the cell.
CELL = textwrap.dedent("""\
    import ipykernel, subprocess, sys
    command = [sys.executable, "-m", "curve_kernel", "status", "--json"]
    said = subprocess.run([*command, ipykernel.get_connection_file()], stdout=subprocess.PIPE).stdout
    with open({seen!r}, "ab") as seen:
        seen.write(said)
    len(said)""")
TESTBOOK = "from testbook import testbook\nwith testbook('in.ipynb', execute=True): pass"
PYTEST = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TOOLS = {
    "nbclient": ["jupyter", "execute", "in.ipynb"],
    "papermill": ["papermill", "in.ipynb", "out.ipynb"],
    "testbook": ["python", "-c", TESTBOOK],
    "nbval": [*PYTEST, "--nbval-lax", "in.ipynb"],
    "nbval-current-env": [*PYTEST, "--nbval-lax", "--nbval-current-env", "in.ipynb"],
    "nbmake": [*PYTEST, "--nbmake", "in.ipynb"],
    "jupytext": ["jupytext", "--execute", "--to", "notebook", "-o", "out.ipynb", "in.py"],
}
EXPECTED = {"stock": "PLAINTEXT", "variable": "encrypted"}
TOKEN = "t0ken"
# Extensions that other tools bring, and that make a server start slowly.
EXTENSIONS = ("jupyter_lsp", "jupyter_mcp_server", "datalayer_reactor", "jupyter_scheduler")
EXTENSIONS += ("jupyter_server_fileid", "jupyter_server_nbmodel", "jupyter_server_ydoc")
BARE = f"--ServerApp.jpserver_extensions={dict.fromkeys(EXTENSIONS, False)}"


def cell_of(env: dict[str, str]) -> str:
    # A kernel gateway's kernels do not have its environment.
    return CELL.format(seen=env["SEEN"])


def notebooks(folder: Path, env: dict[str, str]) -> Path:
    folder.mkdir()
    code = cell_of(env)
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernelspec}}
    notebook["cells"] = [{**cell, "source": code}]
    (folder / "in.ipynb").write_text(json.dumps(notebook))
    header = (
        "# ---\n# jupyter:\n#   kernelspec:\n#     display_name: Python 3\n#     name: python3\n# ---\n"
    )
    (folder / "in.py").write_text(f"{header}\n# %%\n{code}\n")
    return folder


def seen(env: dict[str, str]) -> str:
    """What the kernel that ran the cell spoke, and forget it."""
    file = Path(env["SEEN"])
    kernels = json.loads(file.read_text())
    file.unlink()
    [kernel] = kernels
    assert {one["mechanism"] for one in kernel["channels"].values()} == {
        "CURVE" if kernel["verdict"] == "encrypted" else "NULL"
    }
    return kernel["verdict"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_notebook_run(tool, environments, tmp_path):
    def run(kind: str) -> str:
        folder = notebooks(tmp_path / kind, environments[kind])
        done = subprocess.run(
            TOOLS[tool],
            cwd=folder,
            env=environments[kind],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return seen(environments[kind])

    with ThreadPoolExecutor() as pool:
        assert dict(zip(EXPECTED, pool.map(run, EXPECTED), strict=True)) == EXPECTED


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(
    folder: Path, env: dict[str, str], *arguments: str, app: str = "lab", option: str = "ServerApp"
) -> Iterator[str]:
    port, log = free_port(), folder / f"{app}-{uuid.uuid4()}.log"
    root = ["--allow-root"] if app == "lab" else []
    command = ["jupyter", app, "--no-browser", *root] if app == "lab" else ["jupyter", app]
    command += [f"--{option}.port={port}", f"--{option}.port_retries=0", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                request(f"http://127.0.0.1:{port}", "GET", "/api/kernelspecs")
                return True
            return False

        wait_for(f"jupyter {app}", answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def request(address: str, method: str, path: str, **body: Any) -> Any:
    """One request of the REST interface."""
    asked = urllib.request.Request(
        address + path,
        method=method,
        data=json.dumps(body).encode() if method == "POST" else None,
        headers={"Authorization": f"token {TOKEN}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


def run_by_websocket(address: str, code: str) -> None:
    """Start a kernel without naming one, run the cell in it, and end it."""
    kernel = request(address, "POST", "/api/kernels")["id"]

    async def run() -> None:
        url = f"{address.replace('http', 'ws', 1)}/api/kernels/{kernel}/channels?token={TOKEN}"
        connection = await websocket_connect(url, connect_timeout=30)
        content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
        header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "session": "s"}
        header |= {"username": "", "version": "5.3", "date": "2020-01-01T00:00:00Z"}
        message = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}}
        await connection.write_message(json.dumps(message | {"content": content}))
        reply: dict[str, Any] = {}
        while reply.get("msg_type") != "execute_reply":
            said = await asyncio.wait_for(connection.read_message(), 60)
            assert said is not None
            reply = json.loads(said)
        assert reply["content"]["status"] == "ok", reply
        connection.close()

    asyncio.run(run())
    request(address, "DELETE", f"/api/kernels/{kernel}")


MCP_CLIENT = """
import asyncio, os, sys
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

async def main(address, token, code):
    arguments = ["start", "--transport", "stdio", "--jupyter-url", address, "--jupyter-token", token]
    server = StdioServerParameters(command="jupyter-mcp-server", args=arguments, env=dict(os.environ))
    async with stdio_client(server) as streams, ClientSession(*streams) as session:
        await session.initialize()
        use = {"notebook_name": "n", "notebook_path": "in.ipynb", "mode": "connect"}
        await session.call_tool("use_notebook", use)
        print(await session.call_tool("execute_code", {"code": code}))

asyncio.run(main(*sys.argv[1:]))
"""


def test_servers(environments, tmp_path):
    """jupyter_kernel_gateway, JupyterLab with it, jupyter-scheduler and jupyter-mcp-server."""

    def drive(kind: str) -> dict[str, str]:
        env = environments[kind]
        folder = notebooks(tmp_path / kind, environments[kind])
        spoken = {}
        token = [f"--IdentityProvider.token={TOKEN}"]
        gateway_token = [f"--KernelGatewayApp.auth_token={TOKEN}"]
        with contextlib.ExitStack() as stack:
            gateway = stack.enter_context(
                server(folder, env, *gateway_token, app="kernelgateway", option="KernelGatewayApp")
            )
            run_by_websocket(gateway, cell_of(env))
            spoken["jupyter_kernel_gateway"] = seen(env)
            through = [f"--gateway-url={gateway}", f"--GatewayClient.auth_token={TOKEN}"]
            with server(folder, env, BARE, *token, *through) as lab:
                run_by_websocket(lab, cell_of(env))
            spoken["JupyterLab --gateway-url"] = seen(env)
            lab = stack.enter_context(server(folder, env, *token))
            [runtime] = request(lab, "GET", "/scheduler/runtime_environments")
            job = {"name": "job", "input_uri": "in.ipynb", "output_formats": ["ipynb"]}
            job["runtime_environment_name"] = runtime["name"]
            number = request(lab, "POST", "/scheduler/jobs", **job)["job_id"]

            def ended() -> str | None:
                said = request(lab, "GET", f"/scheduler/jobs/{number}")["status"]
                # A job that has not begun is STOPPED.
                return said if said in ("COMPLETED", "FAILED") else None

            assert wait_for("the job", ended) == "COMPLETED"
            spoken["jupyter-scheduler"] = seen(env)
            command = ["python", "-c", MCP_CLIENT, lab, TOKEN, cell_of(env)]
            done = subprocess.run(
                command, env=env, cwd=folder, capture_output=True, text=True, timeout=100, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            spoken["jupyter-mcp-server"] = seen(env)
        return spoken

    with ThreadPoolExecutor() as pool:
        found = dict(zip(EXPECTED, pool.map(drive, EXPECTED), strict=True))
    assert {kind: set(spoken.values()) for kind, spoken in found.items()} == {
        kind: {verdict} for kind, verdict in EXPECTED.items()
    }
    assert len(found["variable"]) == 4


START = """
import time
from jupyter_client import KernelManager
manager, begin = KernelManager(kernel_name="xpython"), time.monotonic()
try:
    manager.start_kernel()
except Exception as error:
    print(time.monotonic() - begin, type(error).__name__, error, sep="\\n")
assert not manager.has_kernel
"""


def test_a_kernel_that_cannot_encrypt(environments, tmp_path):
    """xeus-python: within a second, with the reason, in JupyterLab's dialog too."""
    env = environments["variable"]
    done = subprocess.run(
        ["python", "-c", START], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    seconds, kind, *text = done.stdout.splitlines()
    assert float(seconds) < 1
    assert kind == "StartError"
    assert text[0].startswith("kernel xpython does not start: it can't encrypt")
    assert '"xpython" in CurveProvisioner.plaintext_kernels in jupyter_config.json' in " ".join(text)
    with (
        server(notebooks(tmp_path / "n", env), env, f"--IdentityProvider.token={TOKEN}") as address,
        browser_page() as page,
    ):
        lab = Lab(page, address)
        page.locator(
            '.jp-LauncherCard[data-category="Notebook"]', has_text=re.compile("XPython\\)")
        ).click()
        dialog = page.locator(".jp-Dialog pre")
        expect(dialog).to_contain_text(
            "kernel xpython does not start: it can't encrypt", timeout=15_000
        )
        expect(dialog).to_contain_text("plaintext_kernels")
        lab.screenshot("cannot-encrypt")

"""JupyterHub with its proxy and two users of this machine, who log in with their passwords."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pwd
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import Lab, browser_page
from playwright.sync_api import Page, expect
from support import wait_for
from test_tools import free_port

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a hub that runs users is root's")

VARIABLE = "JUPYTER_DEFAULT_PROVISIONER_NAME"
CONFIG = """
import os
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub_port}"
c.JupyterHub.db_url = "sqlite:///hub.sqlite"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api_port}"
c.JupyterHub.authenticator_class = "pam"
c.Authenticator.allowed_users = {users!r}
c.JupyterHub.services = [{{"name": "test", "api_token": {token!r}}}]
scopes = ["admin:users", "admin:servers", "access:servers"]
c.JupyterHub.load_roles = [{{"name": "test", "services": ["test"], "scopes": scopes}}]
c.Spawner.cmd = [{site!r} + "/bin/jupyterhub-singleuser"]
c.Spawner.default_url = "/lab"
c.Spawner.http_timeout = c.Spawner.start_timeout = 100
c.LocalProcessSpawner.interrupt_timeout = 1
# All that a site has to do.
c.Spawner.environment = {{{variable!r}: "curve-provisioner"}}

def cull(spawner):
    if os.path.exists("cull"):
        times = {{"cull_idle_timeout": 2, "cull_interval": 1, "cull_connected": True}}
        spawner.args = [f"--MappingKernelManager.{{name}}={{value}}" for name, value in times.items()]

c.Spawner.pre_spawn_hook = cull
"""
# What another user runs: sockets on all ports of a kernel. It tells how many frames came.
SPY = """
import os, sys, threading, zmq
context, poller, frames = zmq.Context(), zmq.Poller(), {}
for port in sys.argv[1:]:
    for kind in (zmq.SUB, zmq.DEALER, zmq.PULL):
        socket = context.socket(kind)
        if kind == zmq.SUB:
            socket.subscribe(b"")
        socket.connect(f"tcp://127.0.0.1:{port}")
        poller.register(socket, zmq.POLLIN)
        frames[socket] = (port, 0)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
print("ready", flush=True)
while True:
    for socket, _ in poller.poll():
        port, count = frames[socket]
        frames[socket] = port, count + len(socket.recv_multipart())
        print(port, frames[socket][1], flush=True)
"""
# A kernel of the first user outside the hub, where nothing sets the variable.
STOCK = """
import sys, threading, time
from jupyter_client import KernelManager
manager = KernelManager(kernel_name="python3")
manager.start_kernel()
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=60)
print(manager.provisioner.pid, flush=True)
reader = threading.Thread(target=sys.stdin.read)
reader.start()
while reader.is_alive():
    client.execute_interactive("print('a password')", timeout=60, output_hook=lambda _: None)
    time.sleep(0.2)
client.stop_channels()
manager.shutdown_kernel(now=True)
"""


@dataclass
class User:
    name: str
    password: str


@pytest.fixture
def users() -> Iterator[list[User]]:
    made = [User(f"curve{secrets.token_hex(4)}", secrets.token_hex(16)) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for user in made:
            command = ["useradd", "--create-home", "--shell", "/bin/bash", user.name]
            subprocess.run(command, check=True, timeout=30, capture_output=True)
            remove = ["userdel", "--force", "--remove", user.name]
            stack.callback(subprocess.run, remove, timeout=30, capture_output=True, check=False)
            Path(pwd.getpwnam(user.name).pw_dir).chmod(0o700)
        said = "".join(f"{user.name}:{user.password}\n" for user in made)
        subprocess.run(["chpasswd"], input=said, text=True, check=True, timeout=30)
        yield made


@dataclass
class Hub:
    address: str
    token: str

    def request(self, method: str, path: str, **body: Any) -> Any:
        asked = urllib.request.Request(
            self.address + path,
            method=method,
            data=json.dumps(body).encode() if method == "POST" else None,
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def stop(self, user: User) -> None:
        self.request("DELETE", f"/hub/api/users/{user.name}/server")
        wait_for("the server's end", lambda: not self._servers(user))

    def start(self, user: User) -> None:
        self.request("POST", f"/hub/api/users/{user.name}/server")

        def ready() -> bool:
            servers = self._servers(user)
            return bool(servers and servers[""]["ready"])

        wait_for("the server", ready, timeout=100)

    def _servers(self, user: User) -> dict[str, Any]:
        return dict(self.request("GET", f"/hub/api/users/{user.name}")["servers"])


@pytest.fixture
def hub(site: Path, users: list[User], tmp_path: Path) -> Iterator[Hub]:
    token = secrets.token_hex(16)
    ports = {"port": free_port(), "hub_port": free_port(), "api_port": free_port()}
    names = {user.name for user in users}
    config = CONFIG.format(**ports, users=names, token=token, site=str(site), variable=VARIABLE)
    (tmp_path / "config.py").write_text(config)
    path = f"{site}/bin:{site}/node_modules/.bin:{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    log = tmp_path / "hub.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [f"{site}/bin/jupyterhub", "-f", "config.py"],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    running = Hub(f"http://127.0.0.1:{ports['port']}", token)
    try:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                running.request("GET", "/hub/api/users")
                return True
            return False

        wait_for("the hub", answers, timeout=100)
        yield running
    except BaseException:
        print(log.read_text()[-8000:], file=sys.stderr)
        raise
    finally:
        process.terminate()  # with the proxy and the users' servers
        try:
            process.wait(60)
        finally:
            process.kill()


class HubLab(Lab):
    """JupyterLab of a user who logs in."""

    def __init__(self, page: Page, hub: Hub, user: User) -> None:
        self.page = page
        page.goto(f"{hub.address}/hub/login")
        page.fill("#username_input", user.name)
        page.fill("#password_input", user.password)
        page.click("#login_submit")
        self.expect_launcher()

    def expect_launcher(self) -> None:
        card = self.page.locator(".jp-LauncherCard").first
        expect(card).to_be_visible(timeout=100_000)


def all_kernels(site: Path, users: list[User]) -> dict[str, list[dict[str, Any]]]:
    """What `status --all-users` says of the kernels of each user."""
    command = [f"{site}/bin/python", "-m", "curve_kernel", "status", "--all-users", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == any(one["verdict"] != "encrypted" for one in found)
    return {user.name: [one for one in found if one["user"] == user.name] for user in users}


def verdicts(kernels: list[dict[str, Any]]) -> dict[str, str]:
    return {one["kernel_name"]: one["verdict"] for one in kernels}


def ports_of(kernels: list[dict[str, Any]]) -> list[str]:
    ports = [at["endpoint"].rpartition(":")[2] for one in kernels for at in one["channels"].values()]
    return ports + [str(port["port"]) for one in kernels for port in one["further_ports"]]


@contextlib.contextmanager
def program_of(user: User, site: Path, code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code as a user of the machine."""
    entry = pwd.getpwnam(user.name)
    process = subprocess.Popen(
        [f"{site}/bin/python", "-c", code, *arguments],
        cwd=entry.pw_dir,
        env={"HOME": entry.pw_dir, "PATH": os.environ["PATH"]},
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.communicate(timeout=60)  # its input ends, and so it does


def test_two_users(hub, site, users, tmp_path):
    alice, bob = users
    with contextlib.ExitStack() as stack:
        page = stack.enter_context(browser_page())
        first = HubLab(page, hub, alice)
        assert page.context.browser is not None
        second = HubLab(page.context.browser.new_context().new_page(), hub, bob)
        # A notebook of each, with stock's kernel and with ours.
        first.open_notebook("Python 3 (ipykernel)")
        second.open_notebook("Python 3 (CurveZMQ)")
        hub.request("POST", f"/user/{alice.name}/api/kernels", name="python3-curve")
        wait_for("her kernels", lambda: len(all_kernels(site, users)[alice.name]) == 2)
        kernels = all_kernels(site, users)
        assert verdicts(kernels[alice.name]) == {"python3": "encrypted", "python3-curve": "encrypted"}
        assert verdicts(kernels[bob.name]) == {"python3-curve": "encrypted"}
        # No secret of ours on the disk; stock's is there as upstream has it, for its user only.
        for one in itertools.chain(*kernels.values()):
            assert one["secret_key_in_file"] == (one["kernel_name"] == "python3")
            assert one["file_mode"] == "0600"

        # The other user's sockets, on every port of every kernel, and of one outside the hub.
        outside = stack.enter_context(program_of(alice, site, STOCK))
        assert outside.stdout is not None
        pid = int(outside.stdout.readline())
        [stock] = [one for one in all_kernels(site, users)[alice.name] if one["pid"] == pid]
        assert stock["verdict"] == "PLAINTEXT"
        for owner, spying in ((alice, bob), (bob, alice)):
            watched = kernels[owner.name]
            spy = stack.enter_context(
                program_of(spying, site, SPY, *ports_of(watched), *ports_of([stock]))
            )
            assert spy.stdout is not None
            assert spy.stdout.readline() == "ready\n"
            spy.stdout.readline()
            (first if owner is alice else second).run("print('a ' + 'password')", "a password")
            # Stock's frames come all the time, and by now any others would have.
            port, frames = spy.stdout.readline().split()
            assert int(frames) > 0
            out, _ = spy.communicate(timeout=60)
            assert {line.split()[0] for line in out.splitlines()} <= {port}
            assert port == stock["channels"]["iopub"]["endpoint"].rpartition(":")[2]

        # The user's server is stopped and started: new kernels, encrypted again.
        hub.stop(alice)
        wait_for("her kernels to end", lambda: len(all_kernels(site, users)[alice.name]) == 1)
        hub.start(alice)
        page.goto(f"{hub.address}/user/{alice.name}/lab?reset")
        first.expect_launcher()
        first.open_notebook("Python 3 (ipykernel)")
        first.run("print('it', 'runs')", "it runs")
        again = [one for one in all_kernels(site, users)[alice.name] if one["pid"] != pid]
        assert verdicts(again) == {"python3": "encrypted"}

    # Culling ends kernels of both kinds, and their files go.
    (tmp_path / "cull").touch()
    hub.stop(alice)
    hub.start(alice)
    kernels_of = f"/user/{alice.name}/api/kernels"
    culled = [hub.request("POST", kernels_of, name=one)["id"] for one in ("python3", "python3-curve")]
    wait_for("the culling", lambda: hub.request("GET", kernels_of) == [])
    wait_for("the kernels to end", lambda: all_kernels(site, users)[alice.name] == [])
    runtime = Path(pwd.getpwnam(alice.name).pw_dir, ".local/share/jupyter/runtime")
    left = {file.stem.removeprefix("kernel-") for file in runtime.glob("kernel-*.json")}
    assert not left & set(culled)

"""Joining a running kernel by a kernelspec: what `attach` makes, and what its provisioner does."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipykernel
import psutil
import pytest
from jupyter_client import AsyncKernelManager, KernelManager
from support import (
    MODULE,
    begin,
    check_error,
    check_interrupt,
    headless,
    run_code,
    started,
    wait_for,
)
from traitlets.utils.importstring import import_item

from curve_kernel.cli.clients import make_identity
from curve_kernel.cli.kernelspecs import check_kernelspecs
from curve_kernel.commands import COMMANDS
from curve_kernel.errors import CurveKernelError
from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import load_identity


def command(*words: str) -> tuple[int, str, str]:
    """Run a command in this process, which takes a tenth of the time."""
    out, err = io.StringIO(), io.StringIO()
    app, status = import_item(COMMANDS[words[0]][0])(), -1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app.initialize(words[1:])
            app.start()
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def attach(file: str | Path, *words: str) -> str:
    status, out, err = command("attach", str(file), *words)
    assert status == 0, err
    return name_in(out)


def name_in(out: str) -> str:
    [name] = re.findall(r"kernelspec (\S+) in ", out)
    return name


@contextlib.contextmanager
def says(text: str) -> Iterator[None]:
    """The error has that text, which is folded for the dialogs that show it."""
    with pytest.raises(CurveKernelError) as caught:
        yield
    assert text in " ".join(str(caught.value).split())


def specs() -> Path:
    return Path(os.environ["JUPYTER_DATA_DIR"], "kernels")


def runtime() -> Path:
    return Path(os.environ["JUPYTER_RUNTIME_DIR"])


def test_two_managers_share_a_kernel_and_leave_it_alive():
    make_identity()
    file = runtime() / "kernel-8a1f.json"
    with headless("--allowlist", file=file) as (process, info):
        done = subprocess.run([*MODULE, "attach", "8a1f"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        name = name_in(done.stdout)
        spec = json.loads((specs() / name / "kernel.json").read_text())
        assert name == "joined-kernel-8a1f"
        assert spec["display_name"] == "Python 3 joined to kernel-8a1f"
        assert spec["language"] == "python"
        # What a kernel says of itself, since ipykernel 7.
        assert spec["metadata"]["debugger"] is (ipykernel.version_info >= (7,))
        assert load_identity().secret_key.decode() not in json.dumps(spec)
        assert command("attach", "--list") == (0, f"joined-kernel-8a1f  runs  {file}\n", "")

        with started(name) as (first, client), started(name) as (second, other):
            assert run_code(client, "shared = 6 * 7") == ("ok", "")
            assert run_code(other, "shared") == ("ok", "42")
            for km in (first, second):
                text = Path(km.connection_file).read_text()
                assert json.loads(text)["curve_publickey"] == info["curve_publickey"]
                assert load_identity().secret_key.decode() not in text

            # An interrupt goes by message.
            check_interrupt(client, second.interrupt_kernel)

            # A restart is refused, and changes nothing.
            with says("is not restarted, it goes on as it was"):
                second.restart_kernel()
            assert run_code(other, "shared") == ("ok", "42")

            # Leaving does not disturb what others run.
            request = begin(client, "print('begun')\ntime.sleep(1.5)\nprint('done')")
            other.shutdown()
            other.stop_channels()
            copy = Path(second.connection_file)
            began = time.monotonic()
            second.shutdown_kernel()
            assert time.monotonic() - began < 1.5
            assert not second.is_alive()
            assert not copy.exists()
            assert client._recv_reply(request, timeout=60)["content"]["status"] == "ok"

            # One that is signed and sent by hand does not get through either.
            first.request_shutdown()
            assert run_code(client, "shared") == ("ok", "42")
        assert process.poll() is None
        assert file.exists()
    check_ended(name, file)


def check_ended(name: str, file: Path) -> None:
    """The kernel has ended: whoever looks is told so, and how to clean up."""
    km = KernelManager(kernel_name=name)
    with says(f"the kernel of {file} has ended"):
        km.start_kernel()
    assert command("attach", "--list") == (0, f"{name}  has ended  {file}\n", "")
    [found] = [finding for finding in check_kernelspecs() if str(file) in finding.message]
    assert found.level == "warning"
    assert "which has ended" in found.message
    subprocess.run(found.command, shell=True, check=True, timeout=30, stdout=subprocess.DEVNULL)
    assert not (specs() / name).exists()
    assert command("attach", "--list") == (0, "Nothing is attached.\n", "")


def test_asynchronous_manager_busy_kernel_and_a_kernel_of_a_launcher():
    """The kernel is a launcher's, which has the secret, and busy while it is joined."""
    make_identity()
    with started("python3-curve") as (km, client):
        request = begin(client, "import time; print('begun'); time.sleep(60)")
        name = attach(km.connection_file, "--name", "Joined", "--display-name", "Ours")
        assert name == "joined"

        async def use() -> None:
            joined = AsyncKernelManager(kernel_name=name)
            await joined.start_kernel()
            await joined.interrupt_kernel()
            other = joined.client()
            other.start_channels()
            await other.wait_for_ready(timeout=60)
            said: list[Any] = []
            await other.execute_interactive("print(6 * 7)", timeout=30, output_hook=said.append)
            assert "42\n" in [message["content"].get("text") for message in said]
            with says("is not restarted"):
                await joined.restart_kernel(now=True)
            other.stop_channels()
            await joined.shutdown_kernel(now=True)

        asyncio.run(use())
        assert client._recv_reply(request, timeout=60)["content"]["ename"] == "KeyboardInterrupt"
        # Its own manager restarts it, and those who have joined stay.
        with started(name) as (joined, other):
            km.restart_kernel()
            client.wait_for_ready(timeout=60)
            assert joined.is_alive()
            other.wait_for_ready(timeout=60)
            assert run_code(other, "'time' in globals()") == ("ok", "False")
            pid = km.provisioner.pid
            km.shutdown_kernel()
            wait_for("the end to be noticed", lambda: not joined.is_alive(), 30)
        assert not psutil.pid_exists(pid)


def test_a_kernel_that_was_started_anew_and_a_viewer(folder):
    make_identity()
    file = runtime() / "mine.json"
    with headless("--allowlist", file=file):
        name = attach(file)
    with headless("--allowlist", file=file):
        km = KernelManager(kernel_name=name)
        with says("was started anew, with another key"):
            km.start_kernel()
        assert "was started anew, with another key" in command("attach", "--list")[1]
        assert attach(file) == name
        with started(name) as (_, client):
            assert run_code(client, "6 * 7") == ("ok", "42")

        [owner] = (folder / "owners").iterdir()
        owner.rename(folder / "viewers" / owner.name)
        status, _, err = command("attach", str(file))
        assert status == 0
        assert "lists you as a viewer" in err
        km = KernelManager(kernel_name=name)
        with says("you may watch this kernel, and not use it"):
            km.start_kernel()
        (folder / "viewers" / owner.name).unlink()
        km = KernelManager(kernel_name=name)
        with says("key not authorized"):
            km.start_kernel()
        status, _, err = command("attach", str(file))
        assert status == 1
        check_error(err, "key not authorized", "identity.key")


ODD = """from ipykernel.ipkernel import IPythonKernel
class Kernel(IPythonKernel):
    @property
    def kernel_info(self):
        language = {"name": "\\x1b]0;odd\\x07" + 500 * "x", "version": [3]}
        return {**super().kernel_info, "language_info": language, "supported_features": 7}
"""


def test_what_a_kernel_says_of_itself_steers_no_terminal(tmp_path):
    make_identity()
    (tmp_path / "odd.py").write_text(ODD)
    file = runtime() / "odd\x1b[2J.json"
    options = ("--allowlist", "--IPKernelApp.kernel_class=odd.Kernel")
    with headless(*options, file=file, env={"PYTHONPATH": str(tmp_path)}) as (process, _):
        status, out, err = command("attach", str(file))
        process.terminate()
        banner = process.communicate(timeout=20)[0]
    assert (status, err) == (0, "")
    assert "]0;odd" in out
    assert out.replace("\n", "").isprintable()
    assert "Connection file: " in banner
    assert banner.replace("\n", "").isprintable()
    spec = json.loads((specs() / "joined-odd-2j" / "kernel.json").read_text())
    assert len(spec["display_name"]) < 120
    assert spec["display_name"].isprintable()


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("attach",), "which kernel to join is not said", "attach FILE"),
        (("attach", "nothing.json"), "there is no connection file nothing.json", "status"),
        (("attach", "--list", "kernel.json"), "--list shows what is attached", "leave out"),
        (("attach", "dead.json"), "nobody answers at tcp://127.0.0.1:9", "still runs"),
        (("attach", "dead.json", "--nmae", "x"), "there is no option --nmae", "--name"),
        (("attach", "plain.json"), "speaks plaintext", "encrypts"),
        (("attach", "x.json", "--existing", "y.json"), "two kernels are named", "leave out one"),
        (
            ("uninstall", "joined-kernel-8a1f"),
            "a word too many",
            "did you mean --name joined-kernel-8a1f?",
        ),
        (("install", "--user", "--name", ".."), "'..' is no name for a kernelspec", "--name"),
    ],
)
def test_wrong_uses(words, message, hint):
    info = {f"{channel}_port": 9 for channel in ("shell", "stdin", "control", "iopub", "hb")}
    info |= {"ip": "127.0.0.1", "transport": "tcp", "key": ""}
    key = KeyPair.generate().public_key.decode()
    (runtime() / "dead.json").write_text(json.dumps({**info, "curve_publickey": key}))
    (runtime() / "plain.json").write_text(json.dumps(info))
    for file in runtime().iterdir():
        file.chmod(0o600)
    if "dead.json" in words:
        make_identity()
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    check_error(err, message, hint)


def test_another_kernelspec_is_not_replaced(tmp_path):
    make_identity()
    file = runtime() / "one.json"
    assert command("install", "--user", "--name", "taken")[0] == 0
    with headless("--allowlist", file=file):
        for name, says in {
            "taken": "there is another kernelspec taken",
            "python3": "there is another kernelspec python3",  # would be hidden
            "no spaces": "Invalid kernel name",
            "..": "'..' is no name",
            "x" * 300: "can't be written",
        }.items():
            status, out, err = command("attach", str(file), "--name", name)
            assert (status, out) == (1, "")
            check_error(err, says, "")
    assert sys.executable in (specs() / "taken" / "kernel.json").read_text()
    assert [folder.name for folder in specs().iterdir()] == ["taken"]

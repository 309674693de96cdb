"""The debugger: what it answers, beside stock, and what an attacker of another user gets out of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from attacker import attacker, listeners, needs_root, reachable
from jupyter_client import KernelManager
from support import listening_ports, run_code, started, stock_ports, wait_for

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="there is no /proc/net/tcp")

CODE = "def f(x):\n    y = x * 2\n    return y\n\nfor n in range(3):\n    z = f(n)\nprint('done', z)"


class Session:
    """A debug session by hand, over the control channel."""

    def __init__(self, kernel_name: str) -> None:
        ports = stock_ports() if kernel_name == "python3" else {}
        self.km = KernelManager(kernel_name=kernel_name, **ports)
        self.km.start_kernel()
        self.client = self.km.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=30)
        self.seq = 0
        self.request, self.text, self.idle = "", "", False
        self.replies: list[dict[str, Any]] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_channels()
        self.km.shutdown_kernel(now=True)

    @property
    def pid(self) -> int:
        return self.km.provisioner.pid

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.seq += 1
        content = {"type": "request", "seq": self.seq, "command": command, "arguments": arguments}
        message = self.client.session.msg("debug_request", content)
        self.client.control_channel.send(message)
        while True:
            reply = self.client.get_control_msg(timeout=60)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                self.replies.append(reply["content"])
                return reply["content"]

    def _next(self) -> dict[str, Any]:
        message = self.client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == self.request:
            if message["msg_type"] == "stream":
                self.text += message["content"]["text"]
            elif message["content"].get("execution_state") == "idle":
                self.idle = True
        return message

    def event(self, name: str) -> dict[str, Any]:
        while True:
            message = self._next()
            if message["msg_type"] == "debug_event" and message["content"]["event"] == name:
                return message["content"]

    def attach(self) -> None:
        self.ask(
            "initialize",
            clientID="test",
            adapterID="",
            pathFormat="path",
            linesStartAt1=True,
            locale="en",
        )
        assert self.ask("attach")["success"]

    def breakpoint(self, code: str, *breakpoints: dict[str, Any]) -> None:
        path = self.ask("dumpCell", code=code)["body"]["sourcePath"]
        self.ask(
            "setBreakpoints", breakpoints=list(breakpoints), source={"path": path}, sourceModified=False
        )
        self.ask("source", source={"path": path})

    def stopped(self) -> tuple[int, list[dict[str, Any]]]:
        thread = self.event("stopped")["body"]["threadId"]
        return thread, self.ask("stackTrace", threadId=thread)["body"]["stackFrames"]

    def execute(self, code: str) -> None:
        self.text, self.idle = "", False
        self.request = self.client.execute(code)

    def finish(self) -> str:
        """Wait until the cell is done, going on wherever it stops; gives what it printed."""
        while not self.idle:
            content = self._next()["content"]
            if content.get("event") == "stopped":
                self.ask("continue", threadId=content["body"]["threadId"])
        return self.text


def everything(session: Session) -> None:
    """Every request that a front end makes, in an order that makes sense, twice over."""
    session.ask("debugInfo")
    session.execute("z = [1, 2]")
    session.finish()
    session.ask("inspectVariables")
    session.ask("richInspectVariables", variableName="z")
    session.ask("richInspectVariables", variableName="no name")
    for _ in range(2):
        session.attach()
        session.breakpoint(CODE, {"line": 3}, {"line": 6, "condition": "n == 2"})
        session.ask("setExceptionBreakpoints", filters=[])
        session.ask("configurationDone")
        session.execute(CODE)
        for x in (0, 1):
            thread, frames = session.stopped()
            assert [(frame["name"], frame["line"]) for frame in frames[:2]] == [
                ("f", 3),
                ("<module>", 6),
            ]
            frame = frames[0]["id"]
            scopes = session.ask("scopes", frameId=frame)["body"]["scopes"]
            locals_ = scopes[0]["variablesReference"]
            variables = session.ask("variables", variablesReference=locals_)["body"]["variables"]
            assert {v["name"]: v["value"] for v in variables} == {"x": str(x), "y": str(2 * x)}
            result = session.ask("evaluate", expression="y + 1", frameId=frame, context="repl")
            assert result["body"]["result"] == str(2 * x + 1)
            session.ask("richInspectVariables", variableName="y", frameId=frame)
            session.ask(
                "copyToGlobals", dstVariableName="copied", srcVariableName="y", srcFrameId=frame
            )
            session.ask("threads")
            session.ask("continue", threadId=thread)
            session.event("continued")
        thread, frames = session.stopped()
        assert frames[0]["line"] == 6, "the condition"
        for step, name in (("stepIn", "f"), ("next", "f"), ("stepOut", "<module>")):
            session.ask(step, threadId=thread)
            thread, frames = session.stopped()
            assert frames[0]["name"] == name
        session.ask("debugInfo")
        session.ask("setBreakpoints", breakpoints=[], source={"path": frames[0]["source"]["path"]})
        session.ask("continue", threadId=thread)
        assert "done 4" in session.finish()
        session.ask("inspectVariables")
        session.ask("modules", startModule=0, moduleCount=1)
        session.ask("setExceptionBreakpoints", filters=["raised"])
        session.execute("1 / 0")
        thread, frames = session.stopped()
        session.ask("exceptionInfo", threadId=thread)
        session.ask("continue", threadId=thread)
        session.finish()
        session.ask("disconnect", restart=False, terminateDebuggee=False)


def normalized(reply: dict[str, Any]) -> str:
    """A reply without the numbers that differ from one process to the next."""
    text = json.dumps(
        {k: v for k, v in reply.items() if k not in ("seq", "request_seq")}, sort_keys=True
    )
    text = re.sub(r"ipykernel_\d+", "ipykernel_N", text)
    text = re.sub(r'"(hashSeed|variablesReference|frameId|id|threadId)": \d+', r'"\1": 0', text)
    text = re.sub(r'"stoppedThreads": \[[\d, ]*\]', '"stoppedThreads": []', text)
    # ipykernel 6 counts the frames below the cell's, which are those of the launcher.
    text = re.sub(r'"totalFrames": \d+', '"totalFrames": 0', text)
    # In an editable install this package is nobody's library, so its frames are shown.
    text = re.sub(r'  File \\"[^"]*curve_kernel[^"]*\\", line \d+, in \S+?\\n.*?\\n', "", text)
    # Helper threads come when libraries want them, numbered in that order.
    text = re.sub(r'(, )?\{"id": 0, "name": "Thread-\d+[^"]*"\}', "", text)
    return re.sub(r"0x[0-9a-f]+", "0x0", text)


def test_replies_are_those_of_stock():
    replies = []
    for name in ("python3", "python3-curve"):
        with Session(name) as session:
            everything(session)
            replies.append([normalized(reply) for reply in session.replies])
    stock, curve = replies
    assert len(stock) > 80
    for number, (theirs, ours) in enumerate(zip(stock, curve, strict=True)):
        if '"command": "inspectVariables"' in ours or '"modules": [' in ours:
            # These list what is imported; only their form is the same.
            assert theirs[:30] == ours[:30]
        else:
            assert theirs == ours, number


@pytest.mark.serial
@needs_root
def test_the_attacker_runs_code_in_stock(tmp_path):
    """Where it is there from the start it disturbs stock so much that nobody gets to debug anything."""
    reachable(tmp_path)
    known = listeners()
    with Session("python3") as session:
        session.attach()
        assert session.ask("disconnect", restart=False, terminateDebuggee=False)["success"]
        with attacker(tmp_path, known) as (marker, _):
            wait_for("the attacker to run code in stock", marker.exists)


@pytest.mark.serial
@needs_root
def test_an_attacker_of_another_user(tmp_path):
    reachable(tmp_path)
    with attacker(tmp_path, listeners()) as (marker, notes), Session("python3-curve") as session:
        for _ in range(2):
            session.attach()
            session.breakpoint(CODE, {"line": 3})
            session.ask("configurationDone")
            assert len(listening_ports(session.pid)) == 6
            session.execute(CODE)
            for _ in range(3):
                thread, frames = session.stopped()
                assert frames[0]["name"] == "f"
                session.ask("continue", threadId=thread)
                session.event("continued")
            assert "done 4" in session.finish()
            assert session.ask("disconnect", restart=False, terminateDebuggee=False)["success"]
            assert len(listening_ports(session.pid)) == 6
        ports = listening_ports(session.pid)

        def attacked_all() -> bool:
            text = notes.read_bytes()
            return all(text.count(b"port %d: " % port) >= 9 for port in ports)

        wait_for("the attacker to try all ports", attacked_all)
        assert run_code(session.client, "print('undisturbed')") == ("ok", "undisturbed\n")
        assert not marker.exists()
        text = notes.read_bytes()
        assert b"a token is in" not in text
        assert b"it failed" not in text
        assert b"success" not in text
        # What a ZeroMQ port says to anybody is its greeting.
        assert b"CURVE" in text


@needs_root
def test_no_token_where_others_can_read(tmp_path):
    with Session("python3-curve") as session:
        session.attach()
        helpers = psutil.Process(session.pid).children(recursive=True)
        assert len(helpers) == 1
        for process in (*helpers, psutil.Process(session.pid)):
            command = " ".join(process.cmdline())
            assert "token" not in command
            assert not re.search(r"[0-9a-f]{32}", command.replace(str(tmp_path), ""))
        adapter = helpers[0]
        assert session.ask("disconnect", restart=False)["success"]
        os.kill(session.pid, signal.SIGKILL)
        wait_for("the adapter to end with its kernel", lambda: not adapter.is_running())


def test_forked_children_run_on_while_the_debugger_is_on():
    with Session("python3-curve") as session:
        session.attach()
        code = (
            "import os, multiprocessing\n"
            "def work(n):\n"
            "    print('child', n * n, flush=True)\n"
            "process = multiprocessing.get_context('fork').Process(target=work, args=(7,))\n"
            "process.start(); process.join(10); print('exit', process.exitcode)"
        )
        session.breakpoint(code, {"line": 3})
        session.ask("configurationDone")
        status, text = run_code(session.client, code, timeout=30)
        assert status == "ok"
        # What the parent prints may come between two parts of what the child does.
        assert "child 49" in text.replace("exit 0\n", "")
        assert "exit 0" in text
        output = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'print(5)'],"
        status, text = run_code(session.client, f"{output} capture_output=True, text=True))")
        assert "returncode=0" in text
        assert "stdout='5\\n'" in text


def test_a_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Session("python3-curve") as session:
        squatted = tmp_path / f"ipykernel_{session.pid}"
        squatted.mkdir(mode=0o777)
        os.chown(squatted, 65534, 65534)
        reply = session.ask("initialize", clientID="test", adapterID="", pathFormat="path")
        assert reply.get("success") is not True
        assert list(squatted.iterdir()) == []
        assert run_code(session.client, "print('goes on')") == ("ok", "goes on\n")


LOADED = "import sys; print(*sorted({'debugpy', 'pydevd'} & set(sys.modules)))"


def test_debugpy_is_imported_when_it_is_needed():
    with Session("python3-curve") as session:
        assert session.ask("debugInfo")["body"]["isStarted"] is False
        assert run_code(session.client, LOADED) == ("ok", "\n")
        run_code(session.client, "here = 1")
        variables = session.ask("inspectVariables")["body"]["variables"]
        assert "here" in [one["name"] for one in variables]
        assert run_code(session.client, LOADED) == ("ok", "debugpy pydevd\n")


def test_debugpy_is_that_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "debugpy.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    with Session("python3-curve") as session:
        assert session.ask("inspectVariables")["success"]
        everything(session)


@pytest.mark.parametrize("kernel_name", ["python3", "python3-curve"])
def test_a_breakpoint_in_code_that_nobody_debugs(kernel_name):
    """It is passed over, in a kernel without stdin too; and a user's own hook stays."""
    code = "breakpoint(); print('passed')"
    with Session(kernel_name) as session:
        assert run_code(session.client, code) == ("ok", "passed\n")
        assert session.ask("inspectVariables")["success"]
        assert run_code(session.client, code) == ("ok", "passed\n")
    with Session(kernel_name) as session:
        own = "import sys; sys.breakpointhook = lambda: print('own')"
        assert run_code(session.client, own) == ("ok", "")
        assert session.ask("inspectVariables")["success"]
        assert run_code(session.client, code) == ("ok", "own\npassed\n")


@pytest.mark.parametrize("kernel_name", ["python3", "python3-curve"])
def test_a_breakpoint_in_code_that_somebody_debugs(kernel_name):
    with Session(kernel_name) as session:
        assert session.ask("inspectVariables")["success"]
        session.attach()
        code = "x = 1\nbreakpoint()\nprint('on')"
        session.breakpoint(code)
        session.ask("configurationDone")
        session.execute(code)
        thread, frames = session.stopped()
        assert (frames[0]["name"], frames[0]["line"]) == ("<module>", 3)
        session.ask("continue", threadId=thread)
        assert session.finish() == "on\n"


def imported_early(folder: Path) -> str:
    (folder / "sitecustomize.py").write_text("import pydevd; del pydevd.start_client\n")
    site = subprocess.run(
        [sys.executable, "-c", "import debugpy.server.api, pydevd; print(pydevd.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return f"{folder}{os.pathsep}{Path(site).parent}"


def another_debugpy(folder: Path, api: str) -> str:
    for file, text in (("server/api.py", api), ("_vendored/pydevd/pydevd.py", "start_client = 1")):
        (folder / "debugpy" / file).parent.mkdir(parents=True)
        (folder / "debugpy" / file).write_text(text)
    (folder / "debugpy" / "__init__.py").touch()
    return str(folder)


@pytest.mark.parametrize("make", [imported_early, partial(another_debugpy, api="def listen(): ...")])
def test_a_debugger_that_is_not_known_is_none(tmp_path, monkeypatch, make):
    monkeypatch.setenv("PYTHONPATH", make(tmp_path))
    with started("python3-curve") as (_, client):
        info = client.kernel_info(reply=True, timeout=60)["content"]
        assert "debugger" not in info.get("supported_features", [])
        assert not info.get("debugger", False)
        assert run_code(client, "print('works')") == ("ok", "works\n")


def test_a_debugger_that_cannot_be_imported_says_so(tmp_path, monkeypatch):
    api = "raise ImportError('broken')\ndef _settrace(): _starts_debugging, listen"
    monkeypatch.setenv("PYTHONPATH", another_debugpy(tmp_path, api))
    with Session("python3-curve") as session:
        for command in ("inspectVariables", "initialize"):
            reply = session.ask(command)
            assert (reply["success"], reply["message"]) == (False, "ImportError: broken")
        assert session.ask("debugInfo")["body"]["isStarted"] is False
        assert run_code(session.client, "print('works')") == ("ok", "works\n")


INITIALIZE = {"clientID": "test", "adapterID": "", "pathFormat": "path", "linesStartAt1": True}


def test_a_request_that_fails_is_answered(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Session("python3-curve") as session:
        (tmp_path / f"ipykernel_{session.pid}").write_text("in the folder's place")
        assert session.ask("initialize", **INITIALIZE)["success"] is False
        assert session.ask("debugInfo")["success"]
        assert run_code(session.client, "print('goes on')") == ("ok", "goes on\n")


def test_the_adapter_is_killed():
    with Session("python3-curve") as session:
        session.attach()
        [adapter] = psutil.Process(session.pid).children(recursive=True)
        adapter.kill()
        for command in ("evaluate", "initialize", "attach"):
            assert session.ask(command, **INITIALIZE)["success"] is False
        assert session.ask("debugInfo")["success"]
        assert run_code(session.client, "print('goes on')") == ("ok", "goes on\n")


def test_user_code_has_called_debugpy_itself():
    """Stock does not debug then either, and says so."""
    listen = "import debugpy; debugpy.listen(('127.0.0.1', 0)); print('listens')"
    for name in ("python3", "python3-curve"):
        with Session(name) as session:
            assert run_code(session.client, listen) == ("ok", "listens\n")
            assert session.ask("initialize", **INITIALIZE)["success"] is False
            assert session.ask("debugInfo")["body"]["isStarted"] is False
            assert run_code(session.client, "print('goes on')") == ("ok", "goes on\n")


LAZY = """
import sys, types
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise ImportError(name)
sys.modules['lazy'] = Lazy('lazy')
sys.modules['strange'] = types.SimpleNamespace(__file__=5)
"""


def test_modules_that_do_not_say_where_they_are():
    with Session("python3-curve") as session:
        assert run_code(session.client, LAZY) == ("ok", "")
        assert session.ask("inspectVariables")["success"]


def test_an_import_that_fails_leaves_nothing_half_made():
    with Session("python3-curve") as session:
        run_code(session.client, "import sys; sys.modules['debugpy.public_api'] = None")
        assert session.ask("inspectVariables")["success"] is False
        run_code(session.client, "del sys.modules['debugpy.public_api']")
        code = "import debugpy; print(callable(debugpy.listen))"
        assert run_code(session.client, code) == ("ok", "True\n")
        session.attach()


FORK = """
import os, time
pid = os.fork()
if pid == 0:
    time.sleep(60)
    os._exit(0)
print('the child is', pid)
"""


def test_a_forked_child_prints_no_more_than_in_stock_and_lets_go_of_the_adapter():
    """Than in stock without its debugger, which wraps ``os.fork``, so that no warning is the cell's."""
    with Session("python3") as session:
        _, stock = run_code(session.client, FORK)
    with Session("python3-curve") as session:
        session.attach()
        session.ask("configurationDone")
        session.execute(FORK)
        ours = session.finish()
        [child] = re.findall(r"the child is (\d+)", ours)
        [adapter] = [
            process
            for process in psutil.Process(session.pid).children()
            if any(word.endswith("debugger/adapter.py") for word in process.cmdline())
        ]
        os.kill(session.pid, signal.SIGKILL)
        wait_for("the adapter to end with its kernel", lambda: not adapter.is_running())
        os.kill(int(child), signal.SIGKILL)  # it outlived the adapter
    ours, stock = (sorted(re.sub(r"\d+", "N", text).splitlines()) for text in (ours, stock))
    assert ours == stock


PATCHED = """
import socket, subprocess
class Denied(socket.socket):
    def __new__(cls, *_, **__):
        raise RuntimeError('no sockets')
socket.setdefaulttimeout(0.05)
socket.socket = Denied
def deny(*_, **__):
    raise RuntimeError('not in this process')
socket.socketpair = socket.send_fds = subprocess.Popen = deny
"""


def test_sockets_are_patched_before_the_debugger_is_switched_on():
    """The adapter's end of a pair did not block, and so it ended."""
    with Session("python3-curve") as session:
        session.execute(PATCHED)
        assert session.finish() == ""
        session.attach()
        session.breakpoint(CODE, {"line": 2})
        session.ask("configurationDone")
        session.execute(CODE)
        thread, _ = session.stopped()
        session.ask("continue", threadId=thread)
        assert "done 4" in session.finish()
        assert len(listening_ports(session.pid)) == 6

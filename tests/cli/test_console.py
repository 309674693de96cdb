"""``console`` and ``watch`` on a kernel that goes on: leaving, interrupting, restarts, ssh, names."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pexpect
import psutil
import pytest
from support import MODULE, connection_info, headless, run_code, started, wait_for
from terminal import Terminal, needs_tmux
from test_commands import colleague, fails, run

from curve_kernel import connection_file
from curve_kernel.keys import KeyPair

pytest.importorskip("jupyter_console")


@contextlib.contextmanager
def console(*arguments: str, command: str = "console") -> Iterator[pexpect.spawn]:
    """A console that reads lines, on a terminal."""
    words = [command, *arguments] + (["--simple-prompt"] if command == "console" else [])
    child = pexpect.spawn(MODULE[0], [*MODULE[1:], *words], encoding="utf-8", timeout=60, echo=False)
    try:
        if command == "console":
            child.expect(r"In \[\d+\]: ")
        yield child
    finally:
        child.close(force=True)


def ends(child: pexpect.spawn) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


@pytest.fixture
def owner() -> None:
    assert run("keygen")[0] == 0


LEAVING = [
    "exit",
    "quit",
    "exit()",
    "quit() # bye",
    "exit(0)",
    "exit 1",
    "exit;",
    "/exit",
    "y = 1; exit()",
    "if True: quit(0)",
    "f'ü{1}'; exit()",
]


def test_leaving_leaves_the_kernel_and_its_variables(owner):
    with started("python3-curve") as (km, client):
        run_code(client, "x = 41")
        for words in LEAVING:
            with console(km.connection_file) as child:
                child.sendline(words)
                child.expect("left; the kernel goes on")
                assert ends(child) == 0, words
            assert run_code(client, "print(x + 1)") == ("ok", "42\n"), words
        with console(km.connection_file) as child:
            child.sendline("print(x)")
            child.expect("41")
            child.expect(r"In \[\d+\]: ")
            child.send("\x04")
            child.expect("really want to exit")
            child.sendline("y")
            assert ends(child) == 0
        assert run_code(client, "print(x + 1)") == ("ok", "42\n")
        with console(km.connection_file) as child:
            child.kill(signal.SIGHUP)
            ends(child)
        assert run_code(client, "print(x + 1)") == ("ok", "42\n")


def test_ending_the_kernel_takes_a_word():
    with headless() as (process, _):
        file = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / f"kernel-{process.pid}.json"
        with console(str(file)) as child:
            child.sendline("exit(keep_kernel=False)")
            child.expect("the kernel ends, as you said")
            assert ends(child) == 0
        process.wait(60)


def test_names_of_functions_that_are_no_exit_stay(owner):
    from curve_kernel.cli.leaving import keep_kernel

    for cell in ("sys.exit()", "print('exit()')", "%time exit", "exit(keep_kernel=False)", "def", "é"):
        assert keep_kernel(cell) == cell
    assert keep_kernel("f(exit(quit()), 'é', quit( 1,\n2)); exit") == (
        "f(exit(keep_kernel=True), 'é', quit(keep_kernel=True)); exit"
    )


def test_interrupting_a_cell(owner):
    with started("python3-curve") as (km, client):
        with console(km.connection_file) as child:
            child.sendline("import time; print('as' + 'leep', flush=True); time.sleep(600)")
            child.expect("asleep")
            child.sendintr()
            child.expect("KeyboardInterrupt")
            child.expect(r"In \[\d+\]: ")
            child.sendline("s = input('name' + '? ')")
            child.expect("name\\? ")
            child.sendintr()
            child.expect("KeyboardInterrupt")
            child.expect(r"In \[\d+\]: ")
            child.sendline("print('still ' + 'here')")
            child.expect("still here")
        assert run_code(client, "print('alive')") == ("ok", "alive\n")


STUBBORN = """
import signal, time
def spin():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("be" + "gun", flush=True)
    time.sleep(600)
"""


def test_a_cell_that_is_not_interrupted_is_left_behind(owner):
    with started("python3-curve") as (km, client):
        run_code(client, STUBBORN)
        with console(km.connection_file) as child:
            child.sendline("spin()")
            child.expect("begun")

            def left_behind() -> bool:
                child.sendintr()
                return child.expect(["not interrupted; the kernel goes on", pexpect.TIMEOUT], 0.3) == 0

            wait_for("the prompt", left_behind)
            child.expect(r"In \[\d+\]: ")
            child.sendline("exit")
            assert ends(child) == 0


@needs_tmux
@pytest.mark.parametrize("command", ["console", "watch"])
def test_a_client_that_is_revoked_before_a_restart(owner, tmp_path, command):
    certificate = colleague(tmp_path)
    assert run("authorize", str(certificate), "--name", "vera", "--role", "owner")[0] == 0
    with started("python3-curve") as (km, _):
        copy = tmp_path / "copy.json"
        shutil.copy(km.connection_file, copy)
        home = tmp_path / "colleague"
        with Terminal(command, str(copy), home=home) as terminal:
            terminal.wait("In [" if command == "console" else "read-only")
            assert run("revoke", "vera")[0] == 0
            km.restart_kernel(now=True)
            wait_for("the end", lambda: "status 1" in terminal.screen(), 20)
            screen = terminal.screen()
            assert "curve_kernel: error: key not authorized" in screen
            assert "any more" in screen
            assert str(certificate) in screen
            assert "Warning" not in screen
            assert "Traceback" not in screen


def test_a_console_that_reads_lines_is_revoked(owner, tmp_path):
    with started("python3-curve") as (km, _), console(km.connection_file) as child:
        for own in (Path(os.environ["JUPYTER_CONFIG_DIR"]) / "curve" / "owners").iterdir():
            own.unlink()
        km.restart_kernel(now=True)
        child.expect("key not authorized")
        assert ends(child) == 1
        assert "Warning" not in child.before


@needs_tmux
def test_a_restart_is_told_and_the_console_goes_on(owner):
    with started("python3-curve") as (km, client):
        file = km.connection_file
        with Terminal("console", file) as terminal, Terminal("watch", file) as watching:
            terminal.wait("In [")
            watching.wait("read-only")
            km.restart_kernel(now=True)
            client.wait_for_ready(timeout=30)
            terminal.wait("[the kernel was restarted, its variables are gone]")
            run_code(client, "print('again')")
            watching.wait("[the kernel was restarted]")
            assert watching.screen().count("was restarted") == 1
            terminal.type("print('go' + 'es on')", "Enter")
            terminal.wait("goes on")
            terminal.type("import time; print('as' + 'leep', flush=True); time.sleep(600)", "Enter")
            terminal.wait("asleep")
            km.restart_kernel(now=True)
            client.wait_for_ready(timeout=30)
            wait_for("the note", lambda: terminal.screen().count("was restarted") == 2)
            terminal.type("print('and ' + 'on')", "Enter")
            terminal.wait("and on")
            assert "Warning" not in terminal.screen()
            client.stop_channels()
            km.shutdown_kernel()
            terminal.wait("curve_kernel: error: the kernel has ended")
            terminal.wait("status 1")
            watching.wait("the kernel has ended")


@needs_tmux
@pytest.mark.parametrize("command", ["console", "watch"])
def test_a_kernel_started_anew_with_other_keys(tmp_path, command):
    file, copy = tmp_path / "kernel.json", tmp_path / "copy.json"
    with contextlib.ExitStack() as stack:
        with headless(file=file) as (_, info):
            shutil.copy(file, copy)
            terminal = stack.enter_context(Terminal(command, str(copy)))
            terminal.wait("In [" if command == "console" else "read-only")
        file.unlink(missing_ok=True)
        ports = [f"--{name}={info[f'{name}_port']}" for name in ("shell", "iopub", "control", "hb")]
        with headless(*ports, f"--stdin={info['stdin_port']}", file=file):
            wait_for("the end", lambda: "status 1" in terminal.screen(), 20)
            assert "it does not hold the secret key" in terminal.screen()


BUSY = """
import os, time
while not os.path.exists({!r}):
    time.sleep(0.05)
"""


@needs_tmux
def test_a_busy_kernel_is_no_warning(owner, tmp_path):
    gate = tmp_path / "gate"
    with (
        started("python3-curve") as (km, client),
        Terminal("console", km.connection_file) as terminal,
    ):
        terminal.wait("In [")
        client.execute(BUSY.format(str(gate)))
        wait_for("the cell", lambda: client.get_iopub_msg(timeout=60)["msg_type"] == "execute_input")
        # The kernel answers whether this is complete later than the console waits for that.
        terminal.type("print('af' + 'ter')", "Enter")
        terminal.wait("'ter')\n\n")
        gate.touch()
        terminal.wait("\nafter")
        assert "Warning" not in terminal.screen()


def dead(name: str, age: int) -> Path:
    """The file of a kernel that has ended, AGE seconds older than now."""
    file = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / name
    with contextlib.ExitStack() as stack:
        ports = {}
        for channel in ("shell", "control", "stdin", "iopub", "hb"):
            holder = stack.enter_context(socket.socket())
            holder.bind(("127.0.0.1", 0))
            ports[f"{channel}_port"] = holder.getsockname()[1]
    key = KeyPair.generate().public_key.decode()
    file.write_text(json.dumps(connection_info(curve_publickey=key) | ports))
    then = file.stat().st_mtime - age
    os.utime(file, (then, then))
    return file


def test_the_kernel_that_lives_is_found(tmp_path, monkeypatch):
    from curve_kernel.cli.existing import find
    from curve_kernel.errors import CurveKernelError

    fails("watch", says="no kernel has a connection file", hint="status")
    with headless() as (process, _):
        runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
        live = str(runtime / f"kernel-{process.pid}.json")
        later, earlier = dead("kernel-later.json", -60), dead("kernel-earlier.json", 60)
        (runtime / "jpserver-1.json").write_text("{}")
        (runtime / "kernel-torn.json").write_text("{")
        assert find(None) == find("kernel") == find("kernel-*") == find(Path(live).stem) == live
        assert find(live) == live
        assert find("later") == str(later)
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        shutil.copy(live, here / "mine.json")
        assert find("mine") == find("mine.json") == find("./mine.json") == str(here / "mine.json")
        shutil.copy(earlier, here / Path(live).name)
        assert find(Path(live).name) == live
        if os.geteuid() == 0:
            os.chown(here / "mine.json", 65534, 65534)
            assert find("./mine.json") == str(here / "mine.json")
            for name in ("mine.json", "mine"):
                with pytest.raises(CurveKernelError, match="mine"):
                    find(name)
        for words in ([], ["kernel"], ["--existing"], ["--existing", "kernel"]):
            with console(*words) as child:
                child.sendline("import os; print('pid', os.getpid())")
                child.expect(f"pid {process.pid}")
            with console(*words, command="watch") as child:
                child.expect(f"watching {Path(live).name}")
        fails("console", "kernel", "--existing", "other", says="two kernels", hint="leave out one")
    Path(live).unlink(missing_ok=True)
    fails("watch", says="none of 2 connection files is of a kernel that runs", hint="status")
    fails("watch", "kernel-", says="none of 3 connection files that fit kernel-", hint="status")


@pytest.mark.parametrize(
    ("words", "says", "hint"),
    [
        (["--kernel=python3"], "--kernel", "--help"),
        (["-f", "x.json"], "-f", "--help"),
        (["--transport=ipc"], "--transport", "--help"),
        (["--foo=1"], "--foo", "--help"),
        (["--CurveShell.foo=1"], "--CurveShell.foo", ""),
        (["--JupyterConsoleApp.kernel_name=x"], "kernel_name", ""),
        (["--ZMQTerminalInteractiveShell.include_other_outptu=True"], "outptu", "include_other_output"),
        (["--ZMQTerminalInteractiveShell.true_color", "k"], "has no value", "in one word"),
        (["--shell=x"], "--shell", "--help"),
    ],
)
def test_options_that_mean_nothing_are_errors(words, says, hint):
    fails("console", *words, says=says, hint=hint)


def test_options_that_help_promises(tmp_path, owner):
    status, out, _ = run("console", "--help")
    assert status == 0
    assert "exit(keep_kernel=False)" in " ".join(out.split())
    assert "--kernel" not in out
    with started("python3-curve") as (km, _):
        info = connection_file.read(km.connection_file)
        wrong = tmp_path / "wrong.json"
        names = ("shell", "control", "stdin", "iopub", "hb")
        connection_file.write(wrong, info | {f"{name}_port": 9 for name in names} | {"ip": "0.0.0.0"})
        config = tmp_path / "config.py"
        config.write_text("c.ZMQTerminalInteractiveShell.banner = 'a banner of {kernel_banner:.6}'")
        words = [f"--{name}={info[f'{name}_port']}" for name in names]
        words += ["--ip", "127.0.0.1", "--config", str(config), "--log-level=WARN", "--no-confirm-exit"]
        words += ["--ZMQTerminalInteractiveShell.include_other_output=True"]
        with console(*words, str(wrong)) as child:
            assert "a banner of Python" in child.before
            child.sendline("print(6 * 7)")
            child.expect("42")
            child.expect(r"In \[\d+\]: ")
            child.send("\x04")
            assert ends(child) == 0
        broken, unfit = tmp_path / "broken.py", tmp_path / "unfit.py"
        broken.write_text("c.")
        unfit.write_text("c.ZMQTerminalInteractiveShell.kernel_timeout = 'long'")
        for word, says in {
            f"--config={tmp_path / 'none.py'}": f"no configuration file {tmp_path / 'none.py'}",
            f"--config={broken}": "can't be loaded: invalid syntax",
            f"--config={unfit}": "'kernel_timeout'",
            "--ZMQTerminalInteractiveShell.kernel_timeout=long": "'kernel_timeout'",
            "--log-level=LOUD": "'log_level'",
        }.items():
            fails("console", km.connection_file, word, says=says, hint="")


SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
SSH = """#!/bin/sh
exec {ssh} -oUserKnownHostsFile={folder}/known -oGlobalKnownHostsFile=none -oIdentitiesOnly=yes \
    -oBatchMode=yes -F none "$@"
"""


@pytest.fixture
def sshd(tmp_path, monkeypatch) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """A server with keys of its own, as HOST:PORT and the user's key; ``ssh`` knows its key only."""
    server, ssh = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin"), shutil.which("ssh")
    if server is None or ssh is None:
        pytest.skip("there is no sshd, which apt-get install openssh-server brings")
    folder = tmp_path / "ssh"
    (folder / "bin").mkdir(parents=True, mode=0o700)
    for name in ("host", "user"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(make, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    key = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {key}")
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(SSH.format(ssh=ssh, folder=folder))
    wrapper.chmod(0o700)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([server, "-D", "-e", "-f", str(folder / "sshd_config")])
    try:

        def ready() -> bool:
            assert process.poll() is None
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        wait_for("sshd", ready)
        yield f"127.0.0.1:{port}", folder / "user", process
    finally:
        process.kill()
        process.wait()


def sessions(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_through_ssh(owner, sshd, tmp_path):
    host, key, server = sshd
    with started("python3-curve") as (km, client):
        info = connection_file.read(km.connection_file)
        # As the kernel's host sees it, which is not what can be reached from here.
        copy = tmp_path / "copy.json"
        connection_file.write(copy, info | {"ip": "0.0.0.0"})
        before = set(tmp_path.rglob("*.json"))
        run_code(client, "x = 41")
        with console(str(copy), "--ssh", host, "--sshkey", str(key)) as child:
            child.sendline("print(x + 1)")
            child.expect("42")
            child.expect(r"In \[\d+\]: ")
            child.sendline("import time; print('as' + 'leep', flush=True); time.sleep(600)")
            child.expect("asleep")
            child.sendintr()
            child.expect("KeyboardInterrupt")
            child.expect(r"In \[\d+\]: ")
            km.restart_kernel(now=True)
            client.wait_for_ready(timeout=30)
            child.expect("the kernel was restarted")
            child.sendline("print('go' + 'es on')")
            child.expect("goes on")
            child.expect(r"In \[\d+\]: ")
            child.sendline("exit")
            assert ends(child) == 0
        wait_for("the end of ssh", lambda: not sessions(server))
        assert set(tmp_path.rglob("*.json")) == before
        assert run_code(client, "print('alive')") == ("ok", "alive\n")
        with console(str(copy), f"--ssh={host}", f"--sshkey={key}") as child:
            for one in sessions(server):
                one.kill()
            child.expect("curve_kernel: error: the ssh connection to")
            assert ends(child) == 1
        with console(str(copy), f"--ssh={host}", f"--sshkey={key}") as child:
            child.kill(signal.SIGKILL)
            child.wait()
        wait_for("the end of ssh", lambda: not sessions(server))


def test_ssh_that_does_not_connect(owner, sshd, tmp_path, monkeypatch):
    host, key, _ = sshd
    with started("python3-curve") as (km, _):
        file = km.connection_file

        def says(*words: str, of: str) -> None:
            fails(
                "console", file, *words, says=f"ssh could not connect to {of}", hint="see whether `ssh"
            )

        says("--ssh", host, of=host)
        other = tmp_path / "other"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
        says("--ssh", host, "--sshkey", str(other), of=host)
        says(
            "--ssh=127.0.0.1:9",
            of="127.0.0.1:9: ssh: connect to host 127.0.0.1 port 9: Connection refused",
        )
        says("--ssh=-oProxyCommand=true", of="-oProxyCommand=true: ")
        (key.parent / "known").write_text("")
        says("--ssh", host, "--sshkey", str(key), of=f"{host}: Host key verification failed")
        monkeypatch.setenv("PATH", str(tmp_path))
        fails("console", file, "--ssh", host, says="ssh can't be run", hint="install")


ENDS = """
import os, threading, time
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp

class Kernel(IPythonKernel):
    async def kernel_info_request(self, *args):
        if threading.current_thread() is threading.main_thread():
            await super().kernel_info_request(*args)
            time.sleep(0.3)  # until it has left
            os.unlink(IPKernelApp.instance().abs_connection_file)
            os._exit(0)
"""


def test_a_kernel_that_ends_after_its_first_answer(owner, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    file = tmp_path / "kernel.json"
    options = ("--allowlist", "--IPKernelApp.kernel_class=ends.Kernel")
    with headless(*options, file=file, env={"PYTHONPATH": str(tmp_path)}):
        fails("console", str(file), "--simple-prompt", says="the kernel has ended", hint="status")


STEERS = r"""
from IPython.display import display
from curve_kernel.app import CurveKernelApp
evil = "\x1b]0;owned\x07\x1b[2J\x9b2J\x1bc"
class Evil:
    def __repr__(self):
        return "result" + evil
get_ipython().banner1 = evil + "banner" + evil
"""


def test_a_kernel_does_not_steer_the_terminal(owner):
    """In whatever message it tries: colors and what progress bars need are all that passes."""
    with started("python3-curve") as (km, client):
        run_code(client, STEERS)
        log = io.StringIO()
        other = "--ZMQTerminalInteractiveShell.include_other_output=True"
        with console(km.connection_file, other) as child:
            child.logfile_read = log
            log.write(child.before)
            for code in (
                r"print('\x1b[31mred\x1b[0m 1%\r\x1b[K2%' + evil)",
                "import sys; print(evil, file=sys.stderr)",
                "Evil()",
                "display(Evil())",
                "raise ValueError(evil)",
            ):
                child.sendline(code)
                child.expect(r"In \[\d+\]: ")
            child.sendline("input(evil + 'name? ')")
            child.expect_exact("name? ")
            child.sendline("me")
            child.expect(r"In \[\d+\]: ")
            run_code(client, "print('theirs')  # \x1b]0;owned\x07\x1b[2J")
            child.expect_exact("theirs\r\n")
            child.sendline("exit")
            child.expect("left; the kernel goes on")
    said = log.getvalue()
    assert "banner" in said
    assert said.count("result") == 2
    assert "\x1b[31mred\x1b[0m 1%\r\x1b[K2%" in said
    assert "owned" in said
    # readline itself says that it takes what is pasted in brackets.
    own = re.compile(r"\x1b\[[0-9;:]*m|\x1b\[K|\x1b\[\?2004[hl]")
    assert not re.search(r"[\x00-\x06\x0b-\x0c\x0e-\x1f\x7f-\x9f]|\x07", own.sub("", said)), said

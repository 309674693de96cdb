"""Command line and configuration files: an option takes effect, or the kernel does not start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import (
    MODULE,
    both_keys,
    check_error,
    client_of,
    connection_info,
    headless,
    refused,
    run_code,
    wait_for,
)

from curve_kernel import __version__
from curve_kernel.client import BlockingKernelClient, KeyNotAuthorizedError
from curve_kernel.keys import KeyPair

# In each case: the command line, the words of the error, and those of the hint.
MEANT = "did you mean --client-authorization?"
NO_EFFECT = [
    ("--client_authorization=allowlist", "--client_authorization", MEANT),
    ("--client-authorisation=allowlist", "--client-authorisation", MEANT),
    ("--CurveKernelAp.client_authorization=allowlist", "--CurveKernelAp.client_authorization", MEANT),
    ("--CurveKernelApp.client_authorisation=allowlist", "CurveKernelApp.client_authorisation", MEANT),
    ("--CurveKernelApp.client-authorization=allowlist", "CurveKernelApp.client-authorization", MEANT),
    ("--Kernel.client_authorization=allowlist", "--Kernel.client_authorization", MEANT),
    (
        "--IPKernelApp.CurveKernelApp.client_authorization=allowlist",
        "IPKernelApp.CurveKernelApp",
        MEANT,
    ),
    ("--client_authorization.CurveKernelApp=allowlist", "client_authorization.CurveKernelApp", ""),
    ("--authorized-clients=x", "--authorized-clients", "--CurveKernelApp.authorized_clients?"),
    ("--allowlist=yes", "--allowlist: it takes no value", "--help-all"),
    ("--allow-list", "--allow-list", "did you mean --allowlist?"),
    ("-allowlist", "-allowlist", "did you mean --allowlist?"),
    ("--client-authorization", "expected one argument", "--help-all"),
    ("--client-authorization=alow", "expected any of", "--help-all"),
    ("--log-level=LOUD", "log_level", "--help-all"),
    ("--CurveKernelApp.max_handshakes=many", "max_handshakes", "--help-all"),
    ("--foo=1", "--foo", "--help-all"),
    ("--port=9", "--port", "--help-all"),
    ("--existing foo", "--existing", "--help-all"),
    ("--Session.ky=secret", "--Session.ky", "did you mean --Session.key?"),
    ("--HistoryManger.enabled=False", "--HistoryManger.enabled", "--HistoryManager.enabled?"),
    ("--Unknown.trait=1", "--Unknown.trait", "--help-all"),
    ("--config=nothing.py", "nothing.py", "name one"),
    ("-f k.json allowlist", "allowlist", "did you mean --allowlist?"),
    ("-f k.json \N{EN DASH}allowlist", "allowlist", "did you mean --allowlist?"),
    ("-f k.json client_authorization=allowlist", "client_authorization", MEANT),
    ("-f k.json -- --CurveKernelApp.client_authorization=allowlist", "client_authorization", MEANT),
    ("revok", "no such command: revok", "did you mean python -m curve_kernel revoke?"),
    ("authorise x.key --name x", "no such command: authorise", "curve_kernel authorize?"),
    ("kernel.json", "no such command: kernel.json", "curve_kernel -f kernel.json?"),
    ("status --jsn", "no option --jsn", "did you mean --json?"),
    ("keygen --forc", "no option --forc", "did you mean --force?"),
    ("clients x", "a word too many: x", "clients --help"),
]


@pytest.mark.parametrize(("words", "error", "hint"), NO_EFFECT)
def test_what_would_have_no_effect(tmp_path, words, error, hint):
    status, _, text = refused(*words.split(), cwd=tmp_path)
    assert status == 1
    check_error(text, error, hint)
    assert "secret" not in text


def test_ways_to_the_allowlist(tmp_path):
    """Each of them keeps out a stranger who has the connection file."""
    for number, option in enumerate(
        (
            "--allowlist",
            "--client-authorization=allowlist",
            "--IPKernelApp.client_authorization=Allowlist",
            "--client-authorization=any --allowlist",
        )
    ):
        file = tmp_path / f"{number}.json"
        with headless(*option.split(), file=file):
            client = BlockingKernelClient(connection_file=str(file))
            client.load_connection_file()
            with pytest.raises(KeyNotAuthorizedError):
                client.start_channels()
            client.stop_channels()


EXTENSION = """
from traitlets import Int
from traitlets.config import Configurable
class Thing(Configurable):
    max_connections = Int(1, config=True)
def load_ipython_extension(shell):
    shell.user_ns["thing"] = Thing(parent=shell)
"""
KERNEL = """
from ipykernel.ipkernel import IPythonKernel
from traitlets import Unicode
class FlavouredKernel(IPythonKernel):
    flavour = Unicode(config=True)
"""
CONFIGURATION = """
c.TerminalInteractiveShell.confirm_exit = False
c.IPKernelApp.an_option_that_is_gone = 1
c.SomebodysExtension.handshakes = 2
c.CurveKernelApp.max_handshakes = 77
"""


def test_what_launchers_hand_over_takes_effect(tmp_path):
    (tmp_path / "extension.py").write_text(EXTENSION)
    (tmp_path / "flavoured.py").write_text(KERNEL)
    profile = Path(os.environ["IPYTHONDIR"]) / "profile_default"
    profile.mkdir()
    (profile / "ipython_kernel_config.py").write_text(CONFIGURATION)
    keys, file = KeyPair.generate(), tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    options = [
        "script.py",
        "x=allowlist/script.py",
        "--HistoryManager.enabled=False",
        "--IPKernelApp.quiet=False",
        "--IPKernelApp.kernel_class=flavoured.FlavouredKernel",
        "--FlavouredKernel.flavour=x",
        "--IPythonKernel.debug_just_my_code=False",
        "--InteractiveShellApp.exec_lines=a=1",
        "--InteractiveShell.colors=NoColor",
        "--Session.username=somebody",
        "--TerminalInteractiveShell.confirm_exit=False",
        "--InlineBackend.close_figures=False",
        "--OSMagics.cd_force_quiet=True",
        "--ext=extension",
        "--Thing.max_connections=4",
        "--matplotlib=inline",
        "--gui=asyncio",
        "--cache-size=11",
        "--profile=default",
        "--debug",
        "--interrupt=0",
        "--parent=1",
        "-c",
        "b = 2",
    ]
    values = """
shell = get_ipython()
app = shell.kernel.parent
print(shell.history_manager.enabled, app.quiet, shell.kernel.flavour, shell.kernel.debug_just_my_code,
      a, b, app.session.username, thing.max_connections, shell.cache_size, app.max_handshakes,
      app.parent_handle)"""
    env = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    popen = {"env": env, "cwd": tmp_path, "stderr": subprocess.DEVNULL}
    with headless(*options, file=file, **popen) as (_, info), client_of(info, keys) as client:
        expected = "False False x False 1 2 somebody 4 11 77 1\n"
        assert run_code(client, values) == ("ok", expected)


def test_an_extension_in_the_current_folder(tmp_path):
    (tmp_path / "extension.py").write_text(EXTENSION)
    with headless("--ext=extension", "--Thing.max_connections=4", cwd=tmp_path):
        pass
    status, _, text = refused("--ext=extension", "--Thing.max_connection=4", cwd=tmp_path)
    assert status == 1
    check_error(text, "--Thing.max_connection", "did you mean")


def test_jupyter_run(tmp_path):
    file = tmp_path / "script.py"
    file.write_text("print(6 * 7)")
    done = subprocess.run(
        [sys.executable, "-m", "jupyter", "run", "--kernel=python3-curve", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "42\n", done.stderr


CONFIGURATIONS = [
    (
        "c.CurveKernelApp.client_authorisation = 'allowlist'",
        "CurveKernelApp.client_authorisation",
        "mean",
    ),
    ("c.CurveKernelApp.something = 1", "CurveKernelApp.something", "ipython_kernel_config.py"),
    ("c.CurveKernelAp.client_authorization = 'allowlist'", "CurveKernelAp.client", "did you mean"),
    ("c.CurvKernelApp.log_level = 10", "CurvKernelApp.log_level", "did you mean"),
    ("c.IPKernelApp.client_authorisation = 'allowlist'", "IPKernelApp.client_authorisation", "mean"),
    ("c.IPythonKernel.client_authorization = 'allowlist'", "IPythonKernel.client", "did you mean"),
    ("c.client_authorization = 'allowlist'", "client_authorization", "did you mean"),
    ("c.CurveKernelApp.client_authorization = 'allow'", "expected any of", "--help-all"),
    (
        "c.CurveKernelApp.client_authorization = 'allowlist'\nimport no_such_module",
        "to its end",
        "correct it",
    ),
    ("c.CurveKernelApp.client_authorization = 'allowlist", "to its end: SyntaxError", "correct it"),
]


@pytest.mark.parametrize(("content", "error", "hint"), CONFIGURATIONS)
def test_configuration_files(content, error, hint):
    profile = Path(os.environ["IPYTHONDIR"]) / "profile_default"
    profile.mkdir()
    (profile / "ipython_kernel_config.py").write_text(content)
    env = {"IPYTHON_SUPPRESS_CONFIG_ERRORS": "1"}
    status, _, text = refused("--log-level=CRITICAL", env=env)
    assert status == 1
    check_error(text, error, hint)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-f", ""], "-f is empty"),
        (["--config="], "--config is empty"),
        (["--CurveKernelApp.audit_log="], "--CurveKernelApp.audit_log is empty"),
        (["--CurveKernelApp.authorized_clients="], "--CurveKernelApp.authorized_clients is empty"),
        (["--CurveKernelApp.authorized_clients= "], "authorized_clients is empty"),
        (["--config=empty.py"], "authorized_clients is empty"),
        (["--CurveKernelApp.handshake_timeout=nan"], "handshake_timeout"),
        (["--CurveKernelApp.handshake_timeout=1e9"], "handshake_timeout"),
        (["--CurveKernelApp.max_message_size=shell=99999999999999999999"], "max_message_size"),
    ],
)
def test_values_that_no_option_can_have(tmp_path, words, says):
    """An empty folder of clients would be the working folder, which anybody's repository may be."""
    empty = tmp_path / "empty.py"
    empty.write_text("c.CurveKernelApp.authorized_clients = ''")
    words = [word.replace("empty.py", str(empty)) for word in words]
    status, _, text = refused("--allowlist", *words, cwd=tmp_path)
    assert status == 1
    check_error(text, says, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    """A socket that gets such a number would be what is printed to."""
    file = tmp_path / "k.json"
    command = f'exec "$@" -f "{file}" {closed}'
    with subprocess.Popen(["sh", "-c", command, "sh", *MODULE]) as process:
        try:
            wait_for("the kernel", file.exists)
            client = BlockingKernelClient(client_keys=KeyPair.generate())
            client.load_connection_file(str(file))
            client.start_channels()
            try:
                client.wait_for_ready(timeout=60)
                code = "import os; print(*map(os.readlink, [f'/proc/self/fd/{n}' for n in range(3)]))"
                _, out = run_code(client, code)
            finally:
                client.stop_channels()
        finally:
            process.terminate()
    assert "socket" not in out


def test_a_broken_configuration_file_of_something_else(tmp_path):
    """As with stock: it is logged, and the kernel starts."""
    profile = Path(os.environ["IPYTHONDIR"]) / "profile_default"
    profile.mkdir()
    (profile / "ipython_config.py").write_text("import no_such_module")
    err = tmp_path / "err"
    with err.open("w") as stderr, headless(stderr=stderr):
        pass
    assert "no_such_module" in err.read_text()


def test_help_and_commands_import_no_kernel():
    for words, says in (
        (("--version",), __version__),
        (("--help",), "curve_kernel install"),
        (("-h",), "--client-authorization=MODE"),
        (("help",), "--allowlist"),
        (("help", "revoke"), "usage: python -m curve_kernel revoke"),
        (("clients",), ""),
    ):
        command = [sys.executable, "-X", "importtime", "-m", "curve_kernel", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert says in done.stdout
        assert not re.search(r"\b(ipykernel|IPython|matplotlib)\b", done.stderr)
    done = subprocess.run(
        [*MODULE, "--help-all"], capture_output=True, text=True, timeout=30, check=True
    )
    assert "--CurveKernelApp.client_authorization=" in done.stdout


def test_console_script(tmp_path):
    script = Path(sysconfig.get_path("scripts")) / "curve-kernel"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{__version__}\n"
    done = subprocess.run([script, "revok"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    check_error(done.stderr, "no such command: revok", "revoke")

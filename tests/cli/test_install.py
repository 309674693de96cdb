"""``install``, as a user types it, and what Jupyter then finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from support import MODULE, check_error, environment, refused, run_code, started

ROOT = Path(__file__).parents[2]

KERNEL = """
from ipykernel.kernelbase import Kernel
class EchoKernel(Kernel):
    implementation = 'echo'
    implementation_version = '1'
    banner = 'echo'
    language_info = {'name': 'Echo', 'mimetype': 'text/plain', 'file_extension': '.txt'}
    def do_execute(self, code, silent, *args, **kwargs):
        self.send_response(self.iopub_socket, 'stream', {'name': 'stdout', 'text': code})
        return {'status': 'ok', 'execution_count': 1, 'payload': [], 'user_expressions': {}}
"""


def install(*arguments: str, python: str = sys.executable) -> str:
    done = subprocess.run(
        [python, "-m", "curve_kernel", "install", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def spec_in(data_dir: Path, name: str = "python3-curve") -> dict:
    return json.loads((data_dir / "kernels" / name / "kernel.json").read_text())


def test_user():
    out = install("--user")
    data = Path(os.environ["JUPYTER_DATA_DIR"])
    folder = data / "kernels" / "python3-curve"
    assert f"Installed kernelspec python3-curve in {folder}" in out
    assert f"It runs {sys.executable}, whatever environment the Jupyter server is in." in out
    assert "A server in another environment hides it unless curve_kernel is there too" in out
    spec = spec_in(data)
    assert spec["argv"][0] == sys.executable
    assert spec["display_name"] == "Python 3 (CurveZMQ)"
    assert spec["metadata"]["supported_encryption"] == ["curve"]
    assert spec["metadata"]["debugger"] is True
    assert spec["metadata"]["kernel_provisioner"]["provisioner_name"] == "curve-provisioner"
    assert {p.name for p in folder.iterdir()} == {
        "kernel.json",
        "logo-32x32.png",
        "logo-64x64.png",
        "logo-svg.svg",
    }


def test_prefix_and_its_note(tmp_path):
    out = install("--prefix", str(tmp_path))
    assert str(tmp_path / "share" / "jupyter" / "kernels" / "python3-curve") in out
    assert "Jupyter does not look there by itself" in out
    assert f"JUPYTER_PATH={tmp_path}/share/jupyter" in out
    assert spec_in(tmp_path / "share" / "jupyter")


@pytest.mark.serial
def test_sys_prefix_needs_no_note():
    out = install("--sys-prefix", "--name", "curve-test")
    folder = Path(sys.prefix) / "share" / "jupyter" / "kernels" / "curve-test"
    try:
        assert str(folder) in out
        assert "Only a server in this environment sees it" in out
        assert "curve-test" in KernelSpecManager().find_kernel_specs()
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


SHOWN = """
import json
from jupyter_client.kernelspec import KernelSpecManager
specs = KernelSpecManager().get_all_specs()
print(json.dumps({name: one["spec"]["display_name"] for name, one in specs.items()}))
"""


RUN = """
import sys
from jupyter_client.manager import run_kernel
with run_kernel(kernel_name=sys.argv[1]) as client:
    client.execute_interactive("import sys; print(sys.prefix)", timeout=30)
"""


def test_kernels_in_one_environment_and_the_server_in_another(tmp_path):
    """Both have curve_kernel; what `install` says how to get both tiles is what does it."""
    jupyter, kernel = (environment(tmp_path / name) for name in ("jupyter", "proj/.venv"))
    shared = tmp_path / "jupyter" / "share" / "jupyter" / "kernels"
    shutil.copytree(ROOT / "kernelspecs", shared)
    # Into the environment first, as somebody does who has not read anything.
    out = install("--sys-prefix", python=kernel)
    assert "Only a server in this environment sees it. For a server in another one:" in out
    [command] = [line.strip() for line in out.splitlines() if line.startswith("  ")]
    assert install("--user", python=kernel).count(command) == 1
    out = subprocess.check_output(["sh", "-ec", command], text=True, timeout=30)
    assert f"It runs {kernel}" in out
    assert " -m curve_kernel install" not in out
    shown = json.loads(subprocess.check_output([jupyter, "-c", SHOWN], text=True, timeout=30))
    assert shown["python3-curve"] == "Python 3 (CurveZMQ)"
    assert shown["python3-curve-proj"] == "Python 3 (CurveZMQ, proj)"
    for name, python in (("python3-curve", jupyter), ("python3-curve-proj", kernel)):
        prefix = subprocess.check_output([jupyter, "-c", RUN, name], text=True, timeout=60)
        assert prefix == f"{Path(python).parents[1]}\n"


NO_SERVER = """
from curve_kernel.cli.kernelspecs import check_kernelspecs
print(sum("others do not see" in finding.message for finding in check_kernelspecs()))
"""


def test_an_environment_without_a_server_whose_kernelspecs_nobody_sees(tmp_path):
    """Kernelspecs of other programs, wherever they are, do not show this environment's."""
    python = environment(tmp_path / "analysis")
    [packages] = (tmp_path / "analysis").glob("lib/python*/site-packages/packages.pth")
    site, *roots = packages.read_text().splitlines()
    (tmp_path / "site").mkdir()
    for path in Path(site).iterdir():
        if not path.name.startswith(("jupyter_server", "__pycache__")):
            (tmp_path / "site" / path.name).symlink_to(path)
    packages.write_text("\n".join([str(tmp_path / "site"), *roots]))

    def told() -> int:
        return int(subprocess.check_output([python, "-c", NO_SERVER], text=True, timeout=30))

    install("--sys-prefix", python=python)
    assert told() == 1
    install("--user", "--name", "another-environment")
    ir = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / "ir" / "kernel.json"
    ir.parent.mkdir()
    ir.write_text('{"argv": ["R", "{connection_file}"], "display_name": "R", "language": "R"}')
    assert told() == 1
    install("--user", "--name", "analysis", python=python)
    assert told() == 0


def uninstall(*arguments: str, python: str = sys.executable) -> str:
    done = subprocess.run(
        [python, "-m", "curve_kernel", "uninstall", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_uninstall_finds_what_install_made_wherever_it_is(tmp_path):
    python = environment(tmp_path / "here")
    places = [
        Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels",
        tmp_path / "here" / "share" / "jupyter" / "kernels",
        tmp_path / "there" / "share" / "jupyter" / "kernels",
    ]
    for arguments in (["--user"], ["--sys-prefix"], ["--prefix", str(tmp_path / "there")]):
        for name in ([], ["--name", "Mine"]):
            install(*arguments, *name, python=python)
    out = uninstall("--prefix", str(tmp_path / "there"), python=python)
    for place in places:
        assert f"Removed kernelspec python3-curve from {place / 'python3-curve'}\n" in out
        assert [path.name for path in place.iterdir()] == ["mine"]
    # What is in a place that was not named stays, and so does somebody else's of the same name.
    (places[1] / "mine" / "kernel.json").write_text('{"argv": ["R"]}')
    out = uninstall("--name", "mine", python=python)
    assert f"Removed kernelspec mine from {places[0] / 'mine'}\n" in out
    assert f"Left {places[1] / 'mine'}, which does not run curve_kernel\n" in out
    assert not (places[0] / "mine").exists()
    assert (places[2] / "mine" / "kernel.json").exists()


def test_uninstall_leaves_to_pip_what_pip_brought(tmp_path):
    python = environment(tmp_path / "here")
    shared = tmp_path / "here" / "share" / "jupyter" / "kernels"
    shutil.copytree(ROOT / "kernelspecs", shared)
    out = uninstall(python=python)
    assert out == (
        f"Left {shared}/python3-curve, which goes with: {python} -m pip uninstall curve-kernel\n"
    )
    assert (shared / "python3-curve" / "kernel.json").exists()


def test_options_reach_a_running_kernel():
    subprocess.run([sys.executable, "-m", "IPython", "profile", "create", "p1"], check=True)
    install(
        "--user",
        "--name",
        "Mine",
        "--display-name",
        "My kernel",
        "--env",
        "A_B",
        "c d",
        "--profile",
        "p1",
    )
    spec = spec_in(Path(os.environ["JUPYTER_DATA_DIR"]), "mine")
    assert spec["display_name"] == "My kernel"
    with started("mine") as (_, client):
        code = "import os; print(os.environ['A_B'], get_ipython().profile)"
        assert run_code(client, code) == ("ok", "c d p1\n")


def test_another_ipykernel_based_kernel(tmp_path, monkeypatch):
    (tmp_path / "echo_kernel.py").write_text(KERNEL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    install("--user", "--kernel-class", "echo_kernel.EchoKernel")
    spec = spec_in(Path(os.environ["JUPYTER_DATA_DIR"]), "echo-curve")
    assert (spec["language"], spec["display_name"]) == ("echo", "Echo (CurveZMQ)")
    assert spec["metadata"]["debugger"] is False
    with started("echo-curve") as (km, client):
        assert run_code(client, "hello") == ("ok", "hello")
        assert "curve_secretkey" not in Path(km.connection_file).read_text()


def test_without_the_provisioner_the_front_end_provides_the_keys():
    install("--user", "--no-provisioner", "--name", "plain")
    assert (
        "kernel_provisioner" not in spec_in(Path(os.environ["JUPYTER_DATA_DIR"]), "plain")["metadata"]
    )
    km = KernelManager(kernel_name="plain", transport_encryption="required")
    km.start_kernel()
    client = km.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        assert run_code(client, "1") == ("ok", "1")
    finally:
        client.stop_channels()
        km.shutdown_kernel(now=True)


def test_there_is_no_temporary_folder():
    """No file may have a byte, so none can be made where temporary files are tried."""
    done = subprocess.run(
        ["prlimit", "--fsize=0", *MODULE, "install", "--user"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    check_error(done.stderr, "there is no folder for temporary files", "set TMPDIR")


STRANGER = ("unshare", "--user", "--map-user=54321", "--map-group=54321")


@pytest.mark.skipif(
    subprocess.run([*STRANGER, "true"], stderr=subprocess.DEVNULL).returncode != 0,
    reason="no user namespaces here",
)
def test_uninstall_where_root_has_replaced_a_kernelspec(tmp_path):
    prefix = tmp_path / "usr"
    install("--prefix", str(prefix), "--name", "python3")
    folder = prefix / "share" / "jupyter" / "kernels" / "python3"
    mark = prefix / "share" / "jupyter" / "curve_kernel" / "replaced" / "python3"
    assert mark.exists()
    (folder / "kernel.json").write_text('{"argv": ["R"]}')
    mark.parent.chmod(0o555)
    done = subprocess.run(
        [*STRANGER, *MODULE, "uninstall", "--name", "python3", "--prefix", str(prefix)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    check_error(done.stderr, f"{mark} can't be removed: Permission denied", None)


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["--name", "none"], "there is no kernelspec none", "kernelspec list"),
        (["--name", "python3"], "does not run curve_kernel", "kernelspec list"),
        (["--name", "../x"], "there is no kernelspec ../x", "kernelspec list"),
        (["--user"], "--user", "--help"),
    ],
)
def test_uninstall_errors(arguments, says, hint):
    status, lines, text = refused("uninstall", *arguments)
    assert status == 1
    assert len(lines) == 2, text
    assert says in lines[0]
    assert hint in lines[1]


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["--kernel-class", "no.such.Class"], "no.such.Class can't be imported", "installed here"),
        (["--kernel-class", "json.JSONDecoder"], "not an ipykernel Kernel", "package.module.Class"),
        (["--name", "a b"], "Invalid kernel name", "--name"),
        (["--prefix", "/proc/nowhere"], "can't be written", "--user"),
        (["--user", "--sys-prefix"], "not allowed with", "--help"),
        (["--nonsense"], "--nonsense", "--help"),
        (
            ["--env", "JUPYTER_CURVE_SECRETKEY", "s"],
            "does not belong into a kernelspec",
            "leave it out",
        ),
    ],
)
def test_errors(arguments, says, hint):
    status, lines, text = refused("install", *arguments)
    assert status == 1
    assert len(lines) == 2, text
    assert lines[0].startswith("curve_kernel: error: ")
    assert says in lines[0]
    assert lines[1].startswith("curve_kernel: hint: ")
    assert hint in lines[1]


@pytest.mark.parametrize("command", [("uninstall", "--name", "none"), ("attach", "--list")])
def test_a_kernelspec_that_can_not_be_read(tmp_path, monkeypatch, command):
    """It spoils nothing else, and nobody waits for it."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    for name in ("pipe", "deep", "large", "torn"):
        (tmp_path / "kernels" / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "kernels" / "pipe" / "kernel.json")
    (tmp_path / "kernels" / "deep" / "kernel.json").write_text("[" * 100_000)
    (tmp_path / "kernels" / "large" / "kernel.json").write_text(" " * (2 << 20))
    (tmp_path / "kernels" / "torn" / "kernel.json").write_bytes(b'{"argv": ["\xff')
    words = [sys.executable, "-m", "curve_kernel", *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if command[0] == "uninstall" else 0), done


@pytest.mark.parametrize(
    "ports", ["1-999999999999", "1-99999999999999999999", "0-9", "9-1", "65530-65540"]
)
def test_ports_that_are_none(ports):
    words = [sys.executable, "-m", "curve_kernel", "install", "--user", "--ssh", "h", "--ports", ports]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "is no range of ports" in done.stderr
    words[-2:] = ["--reach", "a b"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert "'a b' is no address" in done.stderr

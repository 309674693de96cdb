"""Servers and kernelspecs that do not fit: the error is where its user looks first."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import KernelManager
from nbformat import v4, write
from support import MODULE, run_code, started
from test_server import TOKEN, Server
from tornado.httpclient import AsyncHTTPClient

from curve_kernel.cli.install import shipped_spec

ROOT = Path(__file__).parents[2]


def write_notebook(folder: Path, kernel_name: str) -> None:
    folder.mkdir()
    kernelspec = {"name": kernel_name, "display_name": kernel_name, "language": "python"}
    cells = [v4.new_code_cell("print('it ran')")]
    write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), folder / "in.ipynb")


def environment(folder: Path, package: Path | None = None) -> str:
    """Make an environment with all that is installed in this one, but with *package* for curve_kernel.

    Gives its interpreter.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    ours = Path(sys.prefix) / site.relative_to(folder)
    for path in ours.iterdir():
        is_curve_kernel = "curve" in path.name.lower() and (not package or path.suffix != ".dist-info")
        if not is_curve_kernel and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    if package:
        (site / "curve_kernel").symlink_to(package)
    shared = Path("share", "jupyter")
    (folder / shared / "kernels").mkdir(parents=True)
    for path in (Path(sys.prefix) / shared).iterdir():
        if path.name != "kernels":
            (folder / shared / path.name).symlink_to(path)
    return str(folder / "bin" / "python")


def nbconvert(python: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "nbconvert", "--to", "notebook", "--execute", "--stdout", "in.ipynb"]
    return subprocess.run(
        [python, *command], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def test_an_environment_without_curve_kernel(tmp_path):
    """What upstream says there: which kernel is missing and, where its kernelspec is seen, why."""
    python = environment(tmp_path / "bare")
    import_it = [python, "-c", "import curve_kernel"]
    done = subprocess.run(import_it, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "No module named 'curve_kernel'" in done.stderr
    write_notebook(tmp_path / "notebooks", "lost-curve")
    done = nbconvert(python, tmp_path / "notebooks")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("NoSuchKernel: No such kernel named lost-curve")

    command = [*MODULE, "install", "--user", "--name", "lost-curve"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "hides it unless curve_kernel is there too" in said
    done = nbconvert(python, tmp_path / "notebooks")
    assert done.returncode == 1
    assert "provisioner ('curve-provisioner') that is not available" in done.stderr
    assert nbconvert(sys.executable, tmp_path / "notebooks").returncode == 0


@pytest.mark.timeout(120)
def test_two_versions_share_a_runtime_folder(tmp_path, monkeypatch):
    """The first version with a provisioner, and this one: they see and talk to each other's kernels."""
    git = ["git", "-C", str(ROOT)]
    log = [*git, "log", "--format=%H", "--reverse", "--", "curve_kernel/launch/provisioner.py"]
    found = subprocess.run(log, capture_output=True, text=True, check=False).stdout.split()
    if len(found) < 2:
        pytest.skip("no history is here to take the older version from")
    archive = subprocess.run(
        [*git, "archive", found[0], "curve_kernel"], capture_output=True, check=True
    )
    (tmp_path / "old").mkdir()
    subprocess.run(["tar", "-x"], cwd=tmp_path / "old", input=archive.stdout, check=True)
    monkeypatch.chdir(tmp_path)  # from the clone, each interpreter would import what is in it
    python = environment(tmp_path / "environment", tmp_path / "old" / "curve_kernel")
    spec = shipped_spec()
    spec["argv"][0] = python
    folder = Path(os.environ["JUPYTER_DATA_DIR"], "kernels", "older")
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    subprocess.run([*MODULE, "keygen"], check=True, stdout=subprocess.DEVNULL)

    # The older kernel under this version's provisioner, and under its own.
    code = (
        "import jupyter_client, curve_kernel.launch.provisioner as p, sys\n"
        "file = sys.argv[1] + '/kernel-other.json'\n"
        "km = jupyter_client.KernelManager(kernel_name='older', connection_file=file)\n"
        "km.start_kernel(); kc = km.client(); kc.start_channels(); kc.wait_for_ready(timeout=30)\n"
        "print(p.__file__, km.connection_file, flush=True)\n"
        "sys.stdin.read(); km.shutdown_kernel(now=True)"
    )
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "cwd": tmp_path,
    }
    with (
        started("older") as (_, client),
        started("python3-curve") as (_, newer),
        subprocess.Popen([python, "-c", code, os.environ["JUPYTER_RUNTIME_DIR"]], **pipes) as other,
    ):
        assert other.stdout
        assert other.stdin
        module, file = other.stdout.readline().split()
        assert str(tmp_path) in module
        where = "import curve_kernel; print(curve_kernel.__file__)"
        assert str(tmp_path) in run_code(client, where)[1]
        assert str(tmp_path) not in run_code(newer, where)[1]
        status = subprocess.run([*MODULE, "status", "--json"], capture_output=True, check=False)
        assert [one["verdict"] for one in json.loads(status.stdout)] == ["encrypted"] * 3
        assert status.returncode == 0
        from curve_kernel.client import BlockingKernelClient

        ours = BlockingKernelClient(connection_file=file)
        ours.load_connection_file()
        ours.start_channels()
        ours.wait_for_ready(timeout=30)
        assert run_code(ours, "6 * 7") == ("ok", "42")
        ours.stop_channels()
        other.stdin.close()
        assert other.wait(20) == 0


def provisioner(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["metadata"]["kernel_provisioner"]


def change_argv(old: str, *new: str) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        at = spec["argv"].index(old)
        spec["argv"][at : at + 1] = new

    return change


NONSENSE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key_distribution": (
        lambda spec: provisioner(spec).update(config={"key_distribution": "paper"}),
        "'key_distribution' trait of a CurveProvisioner .* any of \\['env', 'file', 'auto'\\]",
    ),
    "key_distribution of the wrong kind": (
        lambda spec: provisioner(spec).update(config={"key_distribution": 7}),
        "'key_distribution' trait .* not the int 7",
    ),
    "message_signing of the wrong kind": (
        lambda spec: provisioner(spec).update(config={"message_signing": "no"}),
        "'message_signing' trait .* expected a boolean",
    ),
    "misspelt option": (
        lambda spec: provisioner(spec).update(config={"mesage_signing": False}),
        "no option mesage_signing\n.* key_distribution and message_signing",
    ),
    "config is a list": (
        lambda spec: provisioner(spec).update(config=["file"]),
        "CurveProvisioner.* must be a mapping, not list",
    ),
    "config is null": (
        lambda spec: provisioner(spec).update(config=None),
        "CurveProvisioner.* must be a mapping, not NoneType",
    ),
    "wrong provisioner": (
        lambda spec: provisioner(spec).update(provisioner_name="curve-provisoner"),
        "No such kernel named nonsense",
    ),
    "no connection file": (
        change_argv("{connection_file}"),
        "argv of kernelspec nonsense does not hand over the connection file",
    ),
    "misspelt connection file": (
        change_argv("{connection_file}", "{conection_file}"),
        "argv of kernelspec nonsense does not hand over the connection file",
    ),
    "empty argv": (
        lambda spec: spec.update(argv=[]),
        "argv of kernelspec nonsense does not hand over the connection file",
    ),
    "no such interpreter": (
        lambda spec: spec["argv"].__setitem__(0, "/no/such/python"),
        "No such file or directory: '/no/such/python'",
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.timeout(30)
def test_a_kernelspec_edited_into_nonsense(name, caplog):
    """The exception is what nbconvert ends with, and what JupyterLab's dialog says."""
    change, says = NONSENSE[name]
    spec = copy.deepcopy(shipped_spec())
    change(spec)
    folder = Path(os.environ["JUPYTER_DATA_DIR"], "kernels", "nonsense")
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    km = KernelManager(kernel_name="nonsense")
    with pytest.raises(Exception, match=says):
        km.start_kernel()
    assert not km.has_kernel
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    assert not [file for file in runtime.iterdir() if "secret" in file.read_text()]
    if name == "wrong provisioner":
        assert re.search("provisioner \\('curve-provisoner'\\) that is not available", caplog.text)


def test_without_a_provisioners_name_the_kernel_itself_says_why(tmp_path):
    spec = shipped_spec()
    del provisioner(spec)["provisioner_name"]
    folder = Path(os.environ["JUPYTER_DATA_DIR"], "kernels", "nonsense")
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    write_notebook(tmp_path / "notebooks", "nonsense")
    done = nbconvert(sys.executable, tmp_path / "notebooks")
    assert done.returncode == 1
    assert "curve_kernel: error: " in done.stderr
    assert "curve_kernel: hint: " in done.stderr
    assert "with a kernelspec made by `python -m curve_kernel install`" in done.stderr


def test_nonsense_in_the_servers_answer(tmp_path):
    """What a page shows is the text of this answer."""
    from browser import jupyter_server

    spec = shipped_spec()
    provisioner(spec)["config"] = {"mesage_signing": False}
    folder = Path(os.environ["JUPYTER_DATA_DIR"], "kernels", "nonsense")
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    (tmp_path / "notebooks").mkdir()

    async def start(address: str) -> str:
        session = {"path": "n.ipynb", "name": "", "type": "notebook", "kernel": {"name": "nonsense"}}
        answer = await AsyncHTTPClient().fetch(
            f"{address}/api/sessions",
            method="POST",
            headers=TOKEN,
            body=json.dumps(session),
            raise_error=False,
        )
        assert answer.code == 500
        assert await Server(address).call("GET", "", 200) == []
        return json.loads(answer.body)["message"]

    with jupyter_server(tmp_path / "notebooks", tmp_path / "log", app="server") as address:
        assert "no option mesage_signing" in asyncio.run(start(address))

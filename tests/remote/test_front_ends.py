"""Front ends, unmodified, on kernels by ssh and in a Slurm job."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from far import Cluster, needs_root
from support import MODULE, run_code, started, wait_for
from terminal import Terminal, needs_tmux

pytestmark = [needs_root, pytest.mark.usefixtures("slurm")]


def install(cluster: Cluster, *arguments: str) -> tuple[int, str]:
    host = cluster.host
    done = subprocess.run(
        [*MODULE, "install", "--user", "--python", host.user.python, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout + done.stderr


def ssh_words(cluster: Cluster) -> list[str]:
    return [f"--ssh-option={word}" for word in cluster.host.ssh_options]


def spec(name: str) -> dict:
    return json.loads(
        (Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name / "kernel.json").read_text()
    )


def test_install_and_doctor(cluster):
    host, words = cluster.host, ssh_words(cluster)
    status, said = install(cluster, "--ssh", "far", *words, "--display-name", "Python 3 on far")
    assert status == 0
    assert "ssh to far works" in said
    assert "with curve_kernel 0.1.0" in said
    content = spec("python3-far")
    assert content["argv"] == []
    assert content["interrupt_mode"] == "message"
    assert content["metadata"]["kernel_provisioner"] == {
        "provisioner_name": "curve-remote-provisioner",
        "config": {
            "engine": "ssh",
            "host": "far",
            "python": host.user.python,
            "ssh_options": host.ssh_options,
        },
    }
    status, said = install(
        cluster,
        "--slurm",
        "--sbatch-option=--time=5",
        "--sbatch-option=--cpus-per-task=2",
        "--name",
        "job",
    )
    assert status == 0
    assert "(--export=NIL)" in said
    config = spec("job")["metadata"]["kernel_provisioner"]["config"]
    assert config["sbatch_options"] == ["--time=5", "--cpus-per-task=2"]
    status, said = install(
        cluster, "--ssh", "far", *words, "--python", "/usr/bin/python3", "--name", "none"
    )
    assert status == 0
    assert "pip install" in said
    for wrong, says in (
        (["--ports", "50000-50099"], " is for a kernel on another machine"),
        (["--ssh", "far", "--profile", "x"], "--profile is not for a kernel on another machine"),
        (["--ssh", "far", "--ports", "7"], "is no range of ports"),
        (["--ssh", "-oProxyCommand=touch /tmp/x"], "is no host for ssh"),
        (["--ssh", "far", "--ssh-option=-oStrictHostKeyChecking=no"], "always checked"),
    ):
        status, said = install(cluster, *wrong)
        assert status == 1
        assert says in said
    for place in (["--ssh", "far", *words], ["--ssh", "far", *words, "--network=tunnel"], ["--slurm"]):
        done = subprocess.run(
            [*MODULE, "doctor", "--json", "--python", host.user.python, *place],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = {finding["check"]: finding for finding in json.loads(done.stdout)}
        assert {finding["level"] for finding in found.values()} == {"ok"}
        assert "proves by tcp://" in found["network"]["message"]
    done = subprocess.run(
        [*MODULE, "doctor", "--json"], capture_output=True, text=True, timeout=100, check=False
    )
    told = [finding["message"] for finding in json.loads(done.stdout)]
    assert [text for text in told if "python3-far in" in text and "on another machine, far" in text]
    host.only_ssh()
    try:
        done = subprocess.run(
            [*MODULE, "doctor", "--json", "--python", host.user.python, "--ssh", "far", *words],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 1
        assert "network=tunnel" in done.stdout
    finally:
        host.restore()
    wait_for("the end of all launchers", lambda: not host.processes("curve_kernel launch"), 10)
    done = subprocess.run(
        [*MODULE, "uninstall", "--name", "job"], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0


WITH_NBCLIENT = """
import nbformat, sys
from nbclient import NotebookClient
notebook = nbformat.read("in.ipynb", as_version=4)
NotebookClient(notebook, kernel_name=sys.argv[1]).execute()
nbformat.write(notebook, "out.ipynb")
"""


@pytest.mark.parametrize("engine", ["ssh", "slurm"])
def test_programs_that_execute_a_notebook(cluster, engine, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    cluster.host.kernelspec("far", engine)
    commands = {
        "nbclient": ["-c", WITH_NBCLIENT, "far"],
        "jupyter-execute": [
            "-m",
            "jupyter",
            "execute",
            "--kernel_name=far",
            "--output=out",
            "in.ipynb",
        ],
    }
    if engine == "slurm":  # the programs are the same
        del commands["nbclient"]
    elif importlib.util.find_spec("papermill"):
        commands["papermill"] = ["-m", "papermill", "-k", "far", "in.ipynb", "out.ipynb"]
    for name, words in commands.items():
        folder = tmp_path / name
        folder.mkdir()
        cells = [
            nbformat.v4.new_code_cell(code)
            for code in ("x = 6", "import os; print(x * 7, 'SLURM_JOB_ID' in os.environ)")
        ]
        nbformat.write(
            nbformat.v4.new_notebook(
                cells=cells,
                metadata={"kernelspec": {"name": "far", "display_name": "far", "language": "python"}},
            ),
            folder / "in.ipynb",
        )
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        out = nbformat.read(folder / "out.ipynb", as_version=4)
        assert out.cells[-1].outputs[0].text == f"42 {engine == 'slurm'}\n"
        assert cluster.jobs() == []
        wait_for(
            f"the end of what {name} started",
            lambda: not cluster.host.processes("curve_kernel launch"),
            10,
        )


def test_a_kernel_of_launch_is_joined(cluster, tmp_path):
    """By further front ends at the desk, and by the far user on the kernel's own host."""
    nbformat = pytest.importorskip("nbformat")
    host = cluster.host
    host.kernelspec("far")
    far_env = {"HOME": str(host.user.home), "PATH": os.environ["PATH"]}
    notebook = tmp_path / "in.ipynb"
    cells = [nbformat.v4.new_code_cell("shared.append('notebook'); shared")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)

    def call(*words: str, stdin: str = "", far: bool = False) -> str:
        python, env = ([sys.executable], {**os.environ})
        if far:
            python, env = [*host.prefix, *host.user.prefix, host.user.python], far_env
        done = subprocess.run(
            [*python, "-m", *words],
            input=stdin,
            env=env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("curve_kernel", "keygen")
    with started("far") as (km, client):
        run_code(client, "shared = []")
        call("curve_kernel", "attach", km.connection_file, "--name", "joined")
        # At the end of its input a console leaves; `exit` would be code, and end the kernel.
        console = ("jupyter_console", "--kernel=joined", "--simple-prompt", "--no-confirm-exit")
        call(*console, stdin="shared.append('console')\n")
        call("jupyter", "execute", "--kernel_name=joined", "--inplace", str(notebook))
        [output] = nbformat.read(notebook, as_version=4).cells[0].outputs
        assert output.data["text/plain"] == "['console', 'notebook']"

        call("curve_kernel", "keygen", far=True)
        [file] = host.user.home.glob("**/kernel-*.json")
        call("curve_kernel", "attach", str(file), "--name", "joined", far=True)
        call(*console, stdin="shared.append('far console')\n", far=True)
        assert run_code(client, "shared") == ("ok", "['console', 'notebook', 'far console']")
        assert "  runs  " in call("curve_kernel", "attach", "--list")
    assert "  has ended  " in call("curve_kernel", "attach", "--list")
    assert "  has ended  " in call("curve_kernel", "attach", "--list", far=True)
    wait_for("the end of the kernel", lambda: not host.processes("curve_kernel"), 20)


@needs_tmux
def test_jupyter_console(cluster):
    cluster.host.kernelspec("far")
    command = [sys.executable, "-m", "jupyter_console"]
    with Terminal("--kernel=far", command=command) as console:
        console.wait("In [")
        console.type("import getpass; print('I am', getpass.getuser())", "Enter")
        console.wait(f"\nI am {cluster.host.user.name}")
        console.type("while True: pass", "Enter")
        time.sleep(1)
        console.type("C-c")
        console.wait("KeyboardInterrupt")
        console.wait("In [3]")
        time.sleep(1)  # a prompt that is being drawn takes no keys
        console.type("exit", "Enter")
        console.wait("status 0")
    wait_for("the end of the kernel", lambda: not cluster.host.processes("curve_kernel"), 20)


def test_jupyterlab(cluster, tmp_path):
    pytest.importorskip("playwright")
    from browser import CHROMIUM, Lab, browser_page, jupyter_server

    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    host = cluster.host
    install(cluster, "--ssh", "far", *ssh_words(cluster), "--display-name", "Python 3 on far")
    install(cluster, "--slurm", "--display-name", "Python 3 in Slurm", "--sbatch-option=--time=5")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    with jupyter_server(folder, tmp_path / "server.log") as address:
        for title, is_job in (("Python 3 on far", False), ("Python 3 in Slurm", True)):
            with browser_page() as page:
                lab = Lab(page, address)
                if not is_job:
                    lab.screenshot("remote-launcher")
                lab.open_notebook(title)
                lab.run("import os; print('a job:', 'SLURM_JOB_ID' in os.environ)", f"a job: {is_job}")
                cell = lab.run("import time\nprint('begun')\nwhile True: time.sleep(0.1)", "begun")
                lab.menu("Kernel", "Interrupt Kernel")
                cell.locator(".jp-OutputArea", has_text="KeyboardInterrupt").wait_for()
                lab.run("kept = 1")
                lab.restart()
                lab.run("print('kept' in globals(), 'after the restart')", "False after the restart")
                lab.run("%curve", re.compile("CURVE"))
                lab.screenshot(f"remote-{'slurm' if is_job else 'ssh'}")
    wait_for("the end of all jobs", lambda: not cluster.jobs(), 20)
    wait_for("the end of all kernels", lambda: not host.processes("curve_kernel"), 20)


def test_jupyterlab_says_what_a_job_waits_for(cluster, tmp_path):
    """The job waits for the only node, and is cancelled; the next one waits, runs, and is cancelled."""
    pytest.importorskip("playwright")
    from browser import CHROMIUM, Lab, browser_page, jupyter_server

    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    install(cluster, "--slurm", "--display-name", "In Slurm", "--sbatch-option=--cpus-per-task=3")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    with jupyter_server(folder, tmp_path / "server.log") as address, browser_page() as page:
        lab = Lab(page, address)
        with cluster.blocked(2):  # the job of conftest.py may have the third
            lab.tile("In Slurm").click()
            toast = page.locator(".Toastify__toast")
            toast.wait_for()
            lab.screenshot("remote-waits")
            [job] = cluster.jobs()
            assert f"Slurm job {job} is PENDING (Resources)" in toast.inner_text()
            cluster.call("scancel", job)
            dialog = page.locator(".jp-Dialog", has_text=f"Slurm job {job} ended: CANCELLED")
            dialog.wait_for()
            lab.screenshot("remote-cancelled")
            toast.wait_for(state="detached")
            dialog.locator("button").last.click()
            select = page.locator(".jp-Dialog", has_text="Select Kernel")
            select.wait_for()
            lab.screenshot("remote-select")
            select.locator("select").select_option(label="In Slurm")
            select.locator("button.jp-mod-accept").click()
            toast.wait_for()
            [job] = cluster.jobs()
            assert f"Slurm job {job} is PENDING (Resources)" in toast.inner_text()
        toast.wait_for(state="detached")
        lab.wait_idle()
        lab.run("import os; print('job', os.environ['SLURM_JOB_ID'])", f"job {job}")
        cluster.call("scancel", job)
        toast.wait_for()
        assert f"Slurm job {job} ended: CANCELLED" in toast.inner_text()
        lab.screenshot("remote-ended")
    wait_for("the end of all jobs", lambda: not cluster.jobs(), 20)


@pytest.mark.parametrize("program", ["execute", "console"])
def test_a_person_sees_that_it_waits_and_gives_up(cluster, program, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    cluster.host.kernelspec("job", "slurm", sbatch_options=["--cpus-per-task=4"])
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "in.ipynb")
    words = {"execute": ["-m", "jupyter", "execute", "--kernel_name=job", "in.ipynb"]}
    words["console"] = ["-m", "jupyter_console", "--kernel=job"]
    log = tmp_path / "log"
    with cluster.blocked(), log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words[program]],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
        try:
            wait_for("the line", lambda: "is PENDING (Resources)" in log.read_text(), 60)
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            process.kill()
            process.wait()
        print(log.read_text()[-300:])
        wait_for("the end of the job", lambda: cluster.jobs() == [], 15)


def test_qtconsole(cluster):
    pytest.importorskip("qtconsole")
    pytest.importorskip("PyQt6")
    cluster.host.kernelspec("far")
    driver = Path(__file__).parents[1] / "frontends" / "drive_qtconsole.py"
    steps = ["import getpass; print('I am', getpass.getuser())", f"I am {cluster.host.user.name}"]
    steps += ["import time; print('as' + 'leep', flush=True); time.sleep(60)", "asleep"]
    steps += ["INTERRUPT", "KeyboardInterrupt", "print('st' + 'ill')", "still"]
    done = subprocess.run(
        [sys.executable, str(driver), "60", *steps, "--", "--kernel", "far"],
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wait_for("the end of the kernel", lambda: not cluster.host.processes("curve_kernel"), 20)

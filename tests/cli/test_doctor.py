"""``doctor`` in a healthy environment, and in ones that were broken for the purpose."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ipykernel
from support import MODULE, environment, on_terminal

from curve_kernel.cli.install import shipped_spec
from curve_kernel.keys import KeyPair

ROOT = Path(__file__).parents[2]


def doctor(*, python: str = sys.executable, **env: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [python, "-m", "curve_kernel", "doctor", "--json"],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "Traceback" not in done.stderr
    findings = json.loads(done.stdout)
    for finding in findings:
        assert bool(finding["command"]) == (finding["level"] != "ok")
        # A command, or a comment: whatever is pasted into a shell does no harm there.
        word = next(iter(shlex.split(finding["command"])), "")
        assert word.startswith("#") or not word or shutil.which(word) or word == "export", finding
    assert done.returncode == any(one["level"] == "failure" for one in findings)
    return done.returncode, findings


SITE = {"JUPYTER_DEFAULT_PROVISIONER_NAME": "curve-provisioner"}


def found(findings: list[dict[str, str]], level: str, says: str) -> dict[str, str]:
    [finding] = [one for one in findings if one["level"] == level and says in one["message"]]
    return finding


def failures(findings: list[dict[str, str]]) -> list[str]:
    return [one["check"] for one in findings if one["level"] == "failure"]


def write_spec(name: str, **changes: Any) -> None:
    folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(shipped_spec() | changes))


def patched(folder: Path, code: str) -> dict[str, str]:
    """An environment whose every interpreter runs *code* first."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def test_healthy(monkeypatch):
    code, findings = doctor(**SITE)
    assert code == 0, findings
    assert {one["check"] for one in findings} == {
        "versions",
        "CURVE",
        "random numbers",
        "kernelspecs",
        "folders",
        "key files",
        "round trip",
    }
    assert [one for one in findings if one["level"] != "ok"] == []
    assert "libsodium" in found(findings, "ok", "has CURVE")["message"]
    found(findings, "ok", "a throw-away kernel ran code")
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, capture_output=True)
    monkeypatch.setenv(*next(iter(SITE.items())))
    out = subprocess.run(
        [*MODULE, "doctor"], check=True, timeout=100, capture_output=True, text=True
    ).stdout
    assert "ok       key files: your own key is " in out
    assert all(line.startswith("ok ") for line in out.splitlines())


def test_only_the_throw_away_kernel_imports_ipykernel():
    """It takes as long as everything else here, and versions are told without it."""
    code = (
        "import sys\nfrom curve_kernel.cli.doctor import _CHECKS\n"
        "for name, check in _CHECKS[:-1]: list(check())\n"
        "assert name == 'key files'\nassert 'ipykernel' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_on_a_terminal():
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    runtime.chmod(0o755)
    write_spec("old-curve", argv=["/opt/old/bin/python", *shipped_spec()["argv"][1:]])
    code, out = on_terminal("doctor", "doctor", columns=132)
    assert code == 1
    for color, level in (("32", "ok"), ("33", "warning"), ("1;31", "failure")):
        assert f"\x1b[{color}m{level}" in out


def test_kernelspecs(tmp_path):
    here = shipped_spec()
    write_spec("gone", argv=[str(tmp_path / "python"), *here["argv"][1:]])
    write_spec("stranger", metadata={"kernel_provisioner": {"provisioner_name": "nobodys"}})
    write_spec("unlisted", argv=[])
    write_spec("fileless", argv=[word for word in here["argv"] if word != "{connection_file}"])
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    write_spec("bare", argv=[str(bare), *here["argv"][1:]])
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho 0.0.9\n")
    other.chmod(0o755)
    write_spec("other", argv=[str(other), *here["argv"][1:]])
    code, findings = doctor()
    assert code == 1
    assert failures(findings) == ["kernelspecs"] * 5
    fileless = found(findings, "failure", "does not hand over the connection file")
    assert "install --user --name fileless" in fileless["command"]
    gone = found(findings, "failure", "gone in")
    assert "No such file" in gone["message"]
    stranger = found(findings, "failure", "the provisioner nobodys")
    assert "hidden" in stranger["message"]
    assert stranger["command"].startswith("# install the package")
    unlisted = found(findings, "failure", "unlisted in")
    bare_python = found(findings, "failure", "which has no curve_kernel")
    assert f"{bare} -m pip install --upgrade " in bare_python["command"]
    finding = found(findings, "warning", "runs curve_kernel 0.0.9")
    assert f"{other} -m pip install --upgrade " in finding["command"]
    # What it says, done.
    for finding in (fileless, gone, unlisted):
        shell = ["sh", "-ec", finding["command"]]
        subprocess.run(shell, input=b"y\n", check=True, timeout=30, capture_output=True)
    code, findings = doctor()
    assert failures(findings) == ["kernelspecs"] * 2
    assert found(findings, "ok", "gone in")


def test_plaintext(tmp_path, monkeypatch):
    """Which kernelspecs are plaintext here, stock's first, and the ways to close that."""
    write_spec("another", argv=["another", "{connection_file}"], metadata={})
    local = {"kernel_provisioner": {"provisioner_name": "local-provisioner"}}
    write_spec("local", argv=["local", "{connection_file}"], metadata=local)
    write_spec("ours", metadata={})
    code, findings = doctor()
    assert code == 0
    finding = found(findings, "warning", "in plaintext")
    names = [part.split()[0] for part in finding["message"].split(", ")]
    assert names == ["python3", "another", "local"]
    variable, install, upstream = finding["command"].splitlines()
    assert variable.startswith("export JUPYTER_DEFAULT_PROVISIONER_NAME=curve-provisioner")
    assert "install --sys-prefix --name python3" in install
    assert "reinstalled ipykernel undoes it" in install
    assert "transport_encryption" in upstream
    # What it says, done.
    _, findings = doctor(**SITE)
    message = found(findings, "warning", "in plaintext")["message"]
    assert message.startswith("local in")
    found(findings, "ok", "another does not start: it can't encrypt")
    encrypted = ["ours", "python3"] if ipykernel.version_info >= (7, 3) else ["ours"]
    says = found(findings, "ok", "encrypted by $JUPYTER_DEFAULT")["message"].partition(": ")[2]
    assert sorted(says.split(", ")) == encrypted
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path))
    allowed = {"CurveProvisioner": {"plaintext_kernels": ["another"]}}
    (tmp_path / "jupyter_config.json").write_text(json.dumps(allowed))
    found(doctor(**SITE)[1], "warning", "another starts in plaintext: it can't encrypt")
    code, findings = doctor(JUPYTER_DEFAULT_PROVISIONER_NAME="curve-provisoner")
    assert code == 1
    finding = found(findings, "failure", "names the provisioner curve-provisoner")
    assert finding["command"] == variable.split("  #")[0]


def test_stock_is_back(tmp_path):
    """`install --name python3`, and then pip upgrades ipykernel, or its kernelspec is installed."""
    python = environment(tmp_path / "env")
    stock = tmp_path / "env" / "share" / "jupyter" / "kernels" / "python3"
    run = {"check": True, "timeout": 60, "capture_output": True, "text": True}
    ipykernel_install = [python, "-m", "ipykernel", "install", "--sys-prefix"]
    install = [python, "-m", "curve_kernel", "install", "--sys-prefix", "--name", "python3"]
    subprocess.run(ipykernel_install, **run)
    file = (stock / "kernel.json").read_text()
    assert "puts its own back" in subprocess.run(install, **run).stdout
    says = f"python3 in {stock} was encrypted by `install --name python3`"
    assert [one for one in doctor(python=python)[1] if one["level"] != "ok"] == []
    (stock / "kernel.json").write_text(file)  # as pip does
    finding = found(doctor(python=python)[1], "warning", says)
    assert finding["command"] == " ".join(install)
    subprocess.run(["sh", "-ec", finding["command"]], **run)
    subprocess.run(ipykernel_install, **run)
    finding = found(doctor(python=python)[1], "warning", says)
    # Who wants it back says so.
    uninstall = [python, "-m", "curve_kernel", "uninstall", "--name", "python3"]
    assert f"Left {stock}" in subprocess.run(uninstall, **run).stdout
    assert not [one for one in doctor(python=python)[1] if says in one["message"]]


def test_the_requirement_is_where_this_was_installed_from(tmp_path):
    """There is no release, so the package's name alone would not do."""
    site = tmp_path / "site"
    info = site / "curve_kernel-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: curve-kernel\nVersion: 0.1.0\n")
    code = "from curve_kernel.cli.install import requirement; print(requirement())"
    far = (
        "from curve_kernel.launch.ssh import how_to_install, installing;"
        " print(how_to_install('python'), installing('~/v/bin/python', 'far'), sep='\\n')"
    )

    def requirement(origin: dict[str, Any] | None, code: str = code) -> str:
        (info / "direct_url.json").unlink(missing_ok=True)
        if origin is not None:
            (info / "direct_url.json").write_text(json.dumps(origin))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": f"{site}:{ROOT}"},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.strip()

    clone = tmp_path / "a clone"
    clone.mkdir()
    assert requirement(None) == "curve-kernel"
    assert requirement({"url": clone.as_uri(), "dir_info": {}}) == f"'{clone}'"
    assert requirement({"url": "file:///no/longer/there"}) == "curve-kernel"
    archive = "https://example.org/curve_kernel-0.1.0-py3-none-any.whl"
    assert requirement({"url": archive, "archive_info": {}}) == archive
    git = {"url": "https://example.org/curve", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert requirement(git) == "git+https://example.org/curve@abc"
    # Nor is a folder here one of another machine.
    hint, command = requirement({"url": clone.as_uri(), "dir_info": {}}, far).splitlines()
    assert hint == f"copy '{clone}' there, then: python -m pip install --upgrade './a clone'"
    wheel = "curve_kernel-0.1.0-py3-none-any.whl"
    pip = f"cat > ./{wheel} && ~/v/bin/python -m pip install --upgrade ./{wheel}"
    assert command == f"{sys.executable} -m pip wheel --no-deps '{clone}' && ssh far '{pip}' < {wheel}"
    hint, command = requirement(git, far).splitlines()
    assert hint == "there: python -m pip install --upgrade git+https://example.org/curve@abc"
    assert command == (
        "ssh far '~/v/bin/python -m pip install --upgrade git+https://example.org/curve@abc'"
    )


def test_a_kernelspec_of_another_environment_that_is_not_shown(tmp_path):
    """Both environments have curve_kernel, and what was installed for all is hidden by this one's."""
    jupyter, kernel = (environment(tmp_path / name) for name in ("jupyter", "analysis"))
    shared = tmp_path / "jupyter" / "share" / "jupyter" / "kernels"
    shutil.copytree(ROOT / "kernelspecs", shared)
    data = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    subprocess.run(
        [kernel, "-m", "curve_kernel", "install", "--user"], check=True, timeout=30, capture_output=True
    )
    code, findings = doctor(python=jupyter)
    assert code == 0, findings
    finding = found(findings, "warning", "is not shown")
    assert (
        f"which runs {kernel}, is not shown: {shared}/python3-curve comes first" in finding["message"]
    )
    subprocess.run(["sh", "-ec", finding["command"]], check=True, timeout=30, capture_output=True)
    code, findings = doctor(python=jupyter, **SITE)
    assert [one for one in findings if one["level"] != "ok"] == []
    shown = found(
        findings, "ok", f"python3-curve-analysis in {data}/python3-curve-analysis runs {kernel}"
    )
    assert shown["check"] == "kernelspecs"
    found(findings, "ok", f"python3-curve in {shared}/python3-curve runs {jupyter}")
    # The interpreter has gone since: what is left of it is removed.
    shutil.rmtree(data / "python3-curve-analysis")
    Path(kernel).unlink()
    finding = found(doctor(python=jupyter)[1], "warning", "is not shown")
    assert finding["command"] == f"rm -r {data / 'python3-curve'}"


def test_no_kernelspec_and_a_lost_entry_point(tmp_path):
    hide = (
        "import jupyter_client.provisioning.factory as f, jupyter_client.kernelspec as k\n"
        "f.entry_points = lambda **_: []\n"
    )
    code, findings = doctor(**patched(tmp_path, hide))
    assert code == 1
    finding = found(findings, "failure", "names the provisioner curve-provisioner")
    assert f"{sys.executable} -m pip install --force-reinstall" in finding["command"]
    assert failures(findings) == ["kernelspecs", "round trip"]
    nothing = (
        "import jupyter_client.kernelspec as k\nk.KernelSpecManager.find_kernel_specs = lambda _: {}\n"
    )
    code, findings = doctor(**patched(tmp_path, nothing))
    assert code == 0
    finding = found(findings, "warning", "no kernelspec here")
    assert finding["command"] == f"{sys.executable} -m curve_kernel install"


def test_old_versions(tmp_path):
    old = (
        "import importlib.metadata as m, jupyter_client as j\n"
        "j.__version__ = '8.6.3'; j.version_info = (8, 6, 3); version = m.version\n"
        "m.version = lambda name: '8.6.3' if name == 'jupyter-client' else version(name)\n"
    )
    code, findings = doctor(**patched(tmp_path, old))
    assert code == 1
    finding = found(findings, "failure", "jupyter-client 8.6.3 does not do, it has to be >=8.9")
    command = f"{sys.executable} -m pip install --upgrade 'jupyter-client[orjson]>=8.9'"
    assert finding["command"] == command
    assert failures(findings) == ["versions", "round trip"]


def test_no_curve(tmp_path):
    code = "import zmq\nhas = zmq.has\nzmq.has = lambda feature: feature != 'curve' and has(feature)\n"
    status, findings = doctor(**patched(tmp_path, code))
    assert status == 1
    assert "pip install" in found(findings[:-1], "failure", "CURVE")["command"]
    assert failures(findings) == ["CURVE", "round trip"]


def test_no_getrandom(tmp_path):
    code = (
        "import errno, os\n"
        "def getrandom(*_): raise OSError(errno.ENOSYS, 'Function not implemented')\n"
        "os.getrandom = getrandom\n"
    )
    status, findings = doctor(**patched(tmp_path, code))
    assert status == 0
    assert "ENOSYS" in found(findings, "warning", "getrandom")["message"]


def test_key_files(folder):
    (folder / "owners" / "torn.key").write_text("curve\n")
    code, findings = doctor()
    assert code == 0
    assert "torn.key" in found(findings, "warning", "holds no public key")["message"]
    secret = folder / "identity.key_secret"
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, capture_output=True)
    (folder / "owners").chmod(0o777)
    secret.chmod(0o640)
    code, findings = doctor()
    assert code == 1
    finding = found([*findings[:-1]], "failure", f"{folder / 'owners'} can be written by others")
    assert finding["check"] == "key files"
    assert f"chmod go-w {folder / 'owners'}" in finding["command"]
    assert "keygen --force" in found(findings, "failure", "identity.key_secret can be read")["command"]
    # The kernel itself refuses for the same reason, and says so.
    assert failures(findings) == ["key files", "key files", "round trip"]
    assert "can be written by others" in findings[-1]["message"]
    held = KeyPair.generate()
    assert held.secret_key.decode() not in json.dumps(findings)
    assert secret.read_text().split('secret-key = "')[1][:40] not in json.dumps(findings)


def test_runtime_folder(tmp_path, monkeypatch):
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    runtime.chmod(0o755)
    code, findings = doctor()
    assert code == 0
    assert found(findings, "warning", "others can list")["command"] == f"chmod 700 {runtime}"
    runtime.chmod(0o770)
    code, findings = doctor()
    assert code == 1
    found(findings, "failure", "others can replace connection files")
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(file / "runtime"))
    code, findings = doctor()
    assert code == 1
    found(findings, "failure", "can't be made")
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir(mode=0o700)
        os.chown(foreign, 65534, 65534)
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(foreign))
        found(doctor()[1], "failure", "is not yours to write")


def test_a_kernel_that_does_not_start(tmp_path):
    broken = "import sys\nif '-f' in sys.orig_argv: raise SystemExit(3)\n"
    code, findings = doctor(**patched(tmp_path, broken))
    assert code == 1
    assert failures(findings) == ["round trip"]
    assert "a kernel did not answer" in findings[-1]["message"]

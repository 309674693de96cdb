"""``doctor`` in a healthy environment, and in ones that were broken for the purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import MODULE, on_terminal

from curve_kernel import __version__
from curve_kernel.cli.install import shipped_spec
from curve_kernel.keys import KeyPair

SITE = Path(__file__).parents[1]


def doctor(**env: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [*MODULE, "doctor", "--json"],
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
    assert done.returncode == any(one["level"] == "failure" for one in findings)
    return done.returncode, findings


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


def test_healthy():
    code, findings = doctor()
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
    out = subprocess.run(
        [*MODULE, "doctor"], check=True, timeout=100, capture_output=True, text=True
    ).stdout
    assert "ok       key files: your own key is " in out
    assert all(line.startswith("ok ") for line in out.splitlines())


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
    assert "install --name fileless" in fileless["command"]
    assert "install --name gone" in found(findings, "failure", "gone runs")["command"]
    assert "No such file" in found(findings, "failure", "gone runs")["message"]
    assert "hidden" in found(findings, "failure", "the provisioner nobodys")["message"]
    found(findings, "failure", "unlisted in")
    finding = found(findings, "failure", "bare runs")
    assert finding["command"] == f"{bare} -m pip install curve-kernel"
    finding = found(findings, "warning", "other runs curve_kernel 0.0.9")
    assert finding["command"] == f"{other} -m pip install curve-kernel=={__version__}"


def test_no_kernelspec_and_a_lost_entry_point(tmp_path):
    hide = (
        "import jupyter_client.provisioning.factory as f, jupyter_client.kernelspec as k\n"
        "f.entry_points = lambda **_: []\n"
    )
    code, findings = doctor(**patched(tmp_path, hide))
    assert code == 1
    finding = found(findings, "failure", "names the provisioner curve-provisioner")
    assert finding["command"] == f"{sys.executable} -m pip install curve-kernel"
    assert failures(findings) == ["kernelspecs", "round trip"]
    nothing = (
        "import jupyter_client.kernelspec as k\nk.KernelSpecManager.find_kernel_specs = lambda _: {}\n"
    )
    code, findings = doctor(**patched(tmp_path, nothing))
    assert code == 0
    finding = found(findings, "warning", "no kernelspec here")
    assert finding["command"] == f"{sys.executable} -m curve_kernel install"


def test_old_versions(tmp_path):
    old = "import jupyter_client as j\nj.__version__ = '8.6.3'; j.version_info = (8, 6, 3)\n"
    code, findings = doctor(**patched(tmp_path, old))
    assert code == 1
    finding = found(findings, "failure", "jupyter_client 8.6.3 is too old, 8.9 is needed")
    assert finding["command"] == f"{sys.executable} -m pip install --upgrade 'jupyter_client>=8.9'"
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
    (folder / "owners").chmod(0o777)
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

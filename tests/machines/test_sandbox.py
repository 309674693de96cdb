"""Sandboxes that take away what a kernel uses to be harder, and Pythons without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sandbox
from support import client_of, connection_info, headless, run_code

from curve_kernel.keys import KeyPair
from curve_kernel.keys.source import SECRETKEY_VARIABLE as VARIABLE

needs_seccomp = pytest.mark.skipif(not sandbox.works_here(), reason="no seccomp here")
LIMITS = """
import resource
for call in (lambda: resource.getrlimit(resource.RLIMIT_NOFILE),
             lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))):
    try:
        call()
    except (OSError, ValueError):
        print("denied")
    else:
        print("allowed")
"""


@needs_seccomp
@pytest.mark.parametrize("names", ["setrlimit", "setrlimit,getrlimit,chmod"])
def test_a_sandbox_that_denies_limits(tmp_path: Path, names: str) -> None:
    """As SystemCallFilter=~@resources does; the limits are left as they are."""
    keys = KeyPair.generate()
    file, log = tmp_path / "kernel.json", tmp_path / "log"
    file.write_text(json.dumps(connection_info(curve_publickey=keys.public_key.decode())))
    limited = ("bash", "-c", 'ulimit -S -n 256; exec "$@"', "bash")
    prefix = (*limited, sys.executable, sandbox.__file__, names)
    env = {VARIABLE: keys.secret_key.decode()}
    out = subprocess.check_output([*prefix, sys.executable, "-c", LIMITS], text=True, timeout=60)
    assert out.split() == ["denied" if "getrlimit" in names else "allowed", "denied"]
    startup = Path(os.environ["IPYTHONDIR"], "profile_default", "startup")
    startup.mkdir(parents=True)
    (startup / "README").touch()  # IPython would copy one, with its mode
    with (
        log.open("w") as stderr,
        headless("--allowlist", file=file, env=env, prefix=prefix, stderr=stderr) as (_, info),
        client_of(info, keys) as client,
    ):
        assert run_code(client, "print(6 * 7)") == ("ok", "42\n")
        assert run_code(client, LIMITS)[1].split() == out.split()
    assert "Traceback" not in log.read_text()
    said = [line for line in log.read_text().splitlines() if "open files" in line]
    assert len(said) == 1, log.read_text()


@pytest.mark.parametrize("where", ["variable", "file"])
def test_a_python_without_ctypes(tmp_path: Path, where: str) -> None:
    """A Python that was built without libffi; the secret leaves the environment all the same."""
    keys = KeyPair.generate()
    site, file = tmp_path / "site", tmp_path / "kernel.json"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import sys\nsys.modules['_ctypes'] = None\n")
    fields = {"curve_publickey": keys.public_key.decode()}
    env = {"PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if where == "file":
        fields["curve_secretkey"] = keys.secret_key.decode()
    else:
        env[VARIABLE] = keys.secret_key.decode()
    file.write_text(json.dumps(connection_info(**fields)))
    file.chmod(0o600)
    with headless(file=file, env=env) as (process, info), client_of(info, keys) as client:
        status, text = run_code(client, "import ctypes")
        assert status == "error", text
        assert run_code(client, "print(6 * 7)") == ("ok", "42\n")
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert keys.secret_key not in environment
        assert VARIABLE.encode() not in environment
        assert b"PYTHONPATH" in environment

"""A kernel on one host is shared, by one command there, and used on another host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hosts import KERNEL_ADDRESS, Host, needs_namespaces, two_hosts
from nbformat import read, v4, write
from support import MODULE, headless

pytestmark = needs_namespaces


def on(host: Host, home: Path, *words: str, command: list[str] = MODULE) -> tuple[int, str, str]:
    env = {**os.environ}
    for name, folder in (("HOME", ""), ("JUPYTER_CONFIG_DIR", "config"), ("JUPYTER_DATA_DIR", "data")):
        path = home / folder
        path.mkdir(mode=0o700, exist_ok=True)
        env[name] = str(path)
    runtime = home / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    done = subprocess.run(
        [*host.prefix, *command, *words],
        env={**env, "JUPYTER_RUNTIME_DIR": str(runtime)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_kernel_on_all_addresses_is_shared_and_joined(tmp_path):
    """Its file says 0.0.0.0; what is handed over has the address that the other host reaches."""
    with two_hosts() as (there, here):
        mine, hers = tmp_path / "mine", tmp_path / "hers"
        mine.mkdir()
        hers.mkdir()
        assert on(here, hers, "keygen")[0] == 0
        assert on(there, mine, "keygen")[0] == 0
        certificate = hers / "config" / "curve" / "identity.key"
        file = mine / "kernel.json"
        env = {"HOME": str(mine), "JUPYTER_CONFIG_DIR": str(mine / "config")}
        options = ("--allowlist", "--ip=0.0.0.0")
        with headless(*options, file=file, env=env, prefix=there.prefix) as (process, _):
            words = ("--name=vera", "--role=owner", "--for=1h", "--existing", str(file))
            status, out, err = on(there, mine, "share", str(certificate), *words)
            assert status == 0, err
            assert json.loads(out)["ip"] == KERNEL_ADDRESS
            assert f"the kernel's address for others is taken to be {KERNEL_ADDRESS}" in err
            handed = hers / "for-vera.json"
            handed.write_text(out)
            handed.chmod(0o600)
            status, out, err = on(here, hers, "attach", str(handed))
            assert status == 0, err
            notebook = hers / "notebook.ipynb"
            write(v4.new_notebook(cells=[v4.new_code_cell("import os; os.getpid()")]), notebook)
            words = ("-m", "jupyter", "execute", "--kernel_name=joined-for-vera", "--inplace")
            status, _, err = on(here, hers, *words, str(notebook), command=[sys.executable])
            assert status == 0, err
            [output] = read(notebook, 4).cells[0].outputs
            assert output.data["text/plain"] == str(process.pid)
            assert process.poll() is None
            here.link("down")
            status, _, err = on(here, hers, "attach", str(handed))
            assert status == 1
            assert "nobody answers at" in err

"""Tools that can't connect to an existing kernel join it by the name that `attach` made."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from nbformat import read, v4, write
from support import MODULE, headless, run_code

from curve_kernel.client import BlockingKernelClient
from curve_kernel.keys.certificates import load_identity

DRIVER = Path(__file__).with_name("drive_qtconsole.py")
JUPYTER = [sys.executable, "-m", "jupyter"]


def tool(*words: str, stdin: str = "") -> str:
    done = subprocess.run(
        [*JUPYTER, *words], input=stdin, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_console_run_execute_qtconsole(tmp_path):
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, stdout=subprocess.DEVNULL)
    file = Path(os.environ["JUPYTER_RUNTIME_DIR"], "kernel-8a1f.json")
    with headless("--allowlist", file=file) as (process, info):
        subprocess.run(
            [*MODULE, "attach", "8a1f", "--name", "ours"],
            check=True,
            timeout=60,
            stdout=subprocess.DEVNULL,
        )
        client = BlockingKernelClient(client_keys=load_identity())
        client.load_connection_info(info)
        client.start_channels()
        assert run_code(client, "shared = [0]") == ("ok", "")

        # Ctrl-D leaves. `exit` is code, which ends the kernel from any front end.
        options = ("--kernel=ours", "--simple-prompt", "--no-confirm-exit")
        out = tool("console", *options, stdin="shared.append(1)\n")
        assert "In [" in out
        program = tmp_path / "program.py"
        program.write_text("shared.append(2); print('ran', shared)")
        assert "ran [0, 1, 2]" in tool("run", "--kernel=ours", str(program))
        notebook = tmp_path / "notebook.ipynb"
        write(v4.new_notebook(cells=[v4.new_code_cell("shared.append(3); shared")]), notebook)
        tool("execute", "--kernel_name=ours", "--inplace", str(notebook))
        [output] = read(notebook, 4).cells[0].outputs
        assert output.data["text/plain"] == "[0, 1, 2, 3]"
        assert run_code(client, "shared") == ("ok", "[0, 1, 2, 3]")
        client.stop_channels()
        if importlib.util.find_spec("qtconsole") and importlib.util.find_spec("PyQt6"):
            command = [
                sys.executable,
                str(DRIVER),
                "60",
                "shared",
                "[0, 1, 2, 3]",
                "--",
                "--kernel=ours",
            ]
            env = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
            assert done.returncode == 0, done.stderr
        assert process.poll() is None
        assert [
            one for one in file.parent.glob("kernel-*") if re.search(r"-\w{8}-\w{4}-", one.name)
        ] == []

"""A kernel to attack, and a notebook for what was measured."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from support import listening_ports, run_code, started

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate

FIGURES = os.environ.get("CURVE_KERNEL_FIGURES")


@dataclass
class Victim:
    """A running kernel, its manager's client, and what an attacker may know or hold."""

    name: str
    km: Any
    client: Any
    owner: KeyPair
    viewer: KeyPair

    @property
    def server_key(self) -> str:
        return str(self.km.curve_publickey.decode())

    @property
    def process(self) -> psutil.Process:
        found = []
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = one.cmdline()
                if self.km.connection_file in command and "ulimit" not in " ".join(command):
                    found.append(one)
        [child] = found
        return child

    @property
    def channels(self) -> dict[str, Any]:
        """Ports by channel; on ipc paths."""
        if self.km.transport == "ipc":
            names = ("shell", "stdin", "control", "iopub", "hb")
            return {name: self.km._make_url(name).removeprefix("ipc://") for name in names}
        named = {
            name: getattr(self.km, f"{name}_port")
            for name in ("shell", "stdin", "control", "iopub", "hb")
        }
        [pipe] = listening_ports(self.process.pid) - set(named.values())
        return {**named, "pipe": pipe}

    def works(self) -> None:
        assert run_code(self.client, "print(6 * 7)") == ("ok", "42\n")


@contextlib.contextmanager
def victim(name: str = "python3-curve", ulimit: str = "-n 1024", **how: Any) -> Iterator[Victim]:
    """A kernel with a limit to its open files, and with an owner and a viewer listed."""
    folder = Path(os.environ["JUPYTER_CONFIG_DIR"]) / "curve"
    owner, viewer = KeyPair.generate(), KeyPair.generate()
    for role, who, pair in (("owners", "olga", owner), ("viewers", "vera", viewer)):
        (folder / role).mkdir(parents=True, mode=0o700, exist_ok=True)
        write_certificate(folder / role / f"{who}.key", pair.public_key)
    limited = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / f"{name}-limited"
    limited.mkdir(parents=True, exist_ok=True)
    if name == "python3-curve":
        from curve_kernel.cli.install import shipped_spec

        spec = shipped_spec()
    else:
        spec = {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": name,
            "language": "python",
            "metadata": {"supported_encryption": ["curve"]},
        }
    spec["argv"] = ["bash", "-c", f'ulimit {ulimit}; exec "$0" "$@"', *spec["argv"]]
    (limited / "kernel.json").write_text(json.dumps(spec))
    stock = {} if name == "python3-curve" else {"transport_encryption": "required"}
    with started(limited.name, **stock, **how) as (km, client):
        yield Victim(name, km, client, owner, viewer)


def figure(row: str, kernel: str, **values: Any) -> None:
    """Note what was measured, for docs/records/security.md."""
    if FIGURES:
        with open(FIGURES, "a") as file:  # noqa: PTH123
            file.write(json.dumps({"row": row, "kernel": kernel, **values}) + "\n")

"""Kernels on another host, beside sshpyk's ssh tunnels: start to ready, round trips, 32 MiB of output.

Run ``python benchmarks/remote.py [--rounds N] [--delays MS ...]`` as root, with sshpyk installed. The
other host is a network namespace with a real sshd, as for tests/remote, one for each delay,
which a packet takes in each direction, whoever sends it. All contenders, with all delays, take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from far import FarHost, far_host
from jupyter_client import KernelManager

TRIPS, SIZE = 100, 32 << 20
NAMES = ("direct", "tunnel", "sshpyk")
HEADINGS = ("start to ready", "`pass`, request to idle", "32 MiB of text")


def sshpyk_spec(host: FarHost, name: str) -> None:
    # It asks for connections that are shared.
    shared = host.folder / "shared_config"
    options = f"ControlMaster auto\nControlPath {host.folder}/%C\nControlPersist 60\n"
    shared.write_text(f"{options}{(host.folder / 'ssh_config').read_text()}")
    wrapper = host.folder / "ssh-far"
    wrapper.write_text(f'#!/bin/sh\nexec ssh -F {shared} "$@"\n')
    wrapper.chmod(0o755)
    kernelspec = (host.user.python, "-m", "ipykernel", "install", "--user", "--name", "python3")
    subprocess.run(
        [*host.user.prefix, "env", "-i", f"HOME={host.user.home}", *kernelspec],
        check=True,
        capture_output=True,
    )
    config = {
        "ssh": str(wrapper),
        "ssh_host_alias": "far",
        "raise_on_ssh_config_error": False,
        "remote_python": host.user.python,
        "remote_kernel_name": "python3",
    }
    folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "sshpyk", "{connection_file}"],
        "display_name": name,
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {
            "kernel_provisioner": {"provisioner_name": "sshpyk-provisioner", "config": config}
        },
    }
    (folder / "kernel.json").write_text(json.dumps(spec))


def measure(name: str) -> tuple[float, float, float]:
    before = time.perf_counter()
    manager = KernelManager(kernel_name=name)
    manager.start_kernel()
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        ready = time.perf_counter() - before
        trips = []
        for _ in range(TRIPS):
            before = time.perf_counter()
            client.execute_interactive("pass", timeout=60, allow_stdin=False)
            trips.append(time.perf_counter() - before)
        sizes = []
        before = time.perf_counter()
        client.execute_interactive(
            f"print('x' * {SIZE})",
            timeout=60,
            allow_stdin=False,
            output_hook=lambda message: sizes.append(len(message["content"].get("text", ""))),
        )
        output = time.perf_counter() - before
        assert sum(sizes) > SIZE
        return ready, statistics.median(trips), output
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 10])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as hosts:
        for variable, folder in (("JUPYTER_DATA_DIR", "data"), ("JUPYTER_RUNTIME_DIR", "runtime")):
            os.environ[variable] = f"{home}/{folder}"
            Path(home, folder).mkdir()
        results: dict[tuple[float, str], list[tuple[float, ...]]] = {}
        for delay in given.delays:
            host = hosts.enter_context(far_host(delay / 1000))
            host.kernelspec(f"direct-{delay:g}")
            host.kernelspec(f"tunnel-{delay:g}", network="tunnel")
            sshpyk_spec(host, f"sshpyk-{delay:g}")
            results |= {(delay, name): [] for name in NAMES}
        for _ in range(given.rounds):
            for (delay, name), measured in results.items():
                measured.append(measure(f"{name}-{delay:g}"))
    print("| round trip | |", " | ".join(HEADINGS), "|")
    print("| --- | --- |", " --- |" * len(HEADINGS))
    for (delay, name), measured in results.items():
        ready, *rest = (sorted(values) for values in zip(*measured, strict=True))
        cells = [spread(ready, 1, "s")] + [spread(values, 1000, "ms") for values in rest]
        print(f"| {2 * delay:g} ms | {name} |", " | ".join(cells), "|")


def spread(values: list[float], factor: float, unit: str) -> str:
    """The median, and the least and the greatest."""
    digits = 2 if unit == "s" else 1
    middle, least, greatest = (
        f"{factor * value:.{digits}f}" for value in (statistics.median(values), values[0], values[-1])
    )
    return f"{middle} ({least} to {greatest}) {unit}"


if __name__ == "__main__":
    main()

"""Kernels on another host, beside sshpyk's ssh tunnels: start to ready, round trips, 32 MiB of output.

Run ``python benchmarks/remote.py [ROUNDS]`` as root, with sshpyk installed: the other host is a network
namespace with a real sshd, as for tests/remote. The contenders take turns in each round.
"""

from __future__ import annotations

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

TRIPS, SIZE = 200, 32 << 20
NAMES = ("direct", "tunnel", "sshpyk")
HEADINGS = ("start to ready", "`pass`, request to idle", "32 MiB of text")


def sshpyk_spec(host: FarHost) -> None:
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
    folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / "sshpyk"
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "sshpyk", "{connection_file}"],
        "display_name": "sshpyk",
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
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as home, far_host() as host:
        for variable, folder in (("JUPYTER_DATA_DIR", "data"), ("JUPYTER_RUNTIME_DIR", "runtime")):
            os.environ[variable] = f"{home}/{folder}"
            Path(home, folder).mkdir()
        host.kernelspec("direct")
        host.kernelspec("tunnel", network="tunnel")
        sshpyk_spec(host)
        results: dict[str, list[tuple[float, ...]]] = {name: [] for name in NAMES}
        for _ in range(rounds):
            for name in NAMES:
                results[name].append(measure(name))
    print("| |", " | ".join(HEADINGS), "|")
    print("| --- |", " --- |" * len(HEADINGS))
    for name in NAMES:
        ready, trip, output = (statistics.median(values) for values in zip(*results[name], strict=True))
        print(f"| {name} | {ready:.2f} s | {1000 * trip:.1f} ms | {1000 * output:.0f} ms |")


if __name__ == "__main__":
    main()

"""A session between two hosts, recorded on the cable: no marker is in it, however it is encoded."""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
import session
from hosts import KERNEL_ADDRESS, needs_namespaces, two_hosts
from support import MODULE, wait_for
from victim import figure

pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(shutil.which("tcpdump") is None, reason="there is no tcpdump"),
]
KINDS = {
    "curve": [*MODULE, "--CurveKernelApp.client_authorization=allowlist"],
    "stock": [sys.executable, "-m", "ipykernel_launcher"],
}
LAST = b"the end of the recording"
WHAT = ("code", "output", "stdin", "comm", "buffer", "file")


def encodings(marker: str) -> dict[str, bytes]:
    plain = marker.encode()
    found = {
        "plain": plain,
        "utf-16": marker.encode("utf-16-le"),
        "utf-32": marker.encode("utf-32-le"),
        "hex": binascii.hexlify(plain),
        "HEX": binascii.hexlify(plain).upper(),
        "reversed": plain[::-1],
        "quoted": urllib.parse.quote(marker).encode(),
        "json": json.dumps(marker).encode(),
    }
    for shift in range(3):
        # What does not depend on the neighbors.
        found[f"base64 at {shift}"] = base64.b64encode(bytes(shift) + plain)[4:-4]
    return found


def record(kind: str, tmp_path: Path) -> tuple[bytes, dict[str, str], dict[str, str]]:
    """What went over the cable, the markers, and the connection file's content."""
    markers = {what: secrets.token_hex(16) for what in WHAT}
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, stdout=subprocess.DEVNULL)
    file, capture = tmp_path / "kernel.json", tmp_path / "cable.pcap"
    with two_hosts() as (there, here):
        tcpdump = subprocess.Popen(
            [
                *there.prefix,
                "tcpdump",
                "-i",
                "cable",
                "-s",
                "0",
                "-U",
                "-Z",
                "root",
                "-w",
                str(capture),
            ],
            stderr=subprocess.DEVNULL,
        )
        kernel = subprocess.Popen(
            [*there.prefix, *KINDS[kind], f"--ip={KERNEL_ADDRESS}", "-f", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for("the recorder", capture.exists)
            wait_for(
                "the kernel", lambda: file.exists() and json.loads(file.read_text()).get("hb_port")
            )
            info = json.loads(file.read_text())
            client = [sys.executable, session.__file__]
            done = subprocess.run(
                [*here.prefix, *client, kind, str(file), json.dumps(markers)],
                capture_output=True,
                text=True,
                timeout=60,
                env={**os.environ},
                check=False,
            )
            assert done.returncode == 0, done.stderr
            # It was a real session: what was typed and what was printed came to the other side.
            for what in ("output", "stdin", "file"):
                assert markers[what] in done.stdout
            # What is recorded is in order.
            say = "import socket as s; s.socket(type=s.SOCK_DGRAM).sendto(%r, (%r, 9))"
            say %= LAST, KERNEL_ADDRESS
            subprocess.run([*here.prefix, sys.executable, "-c", say], check=True, timeout=60)
            wait_for("the recorder to write all", lambda: LAST in capture.read_bytes())
        finally:
            for process in (kernel, tcpdump):
                process.send_signal(signal.SIGINT if process is tcpdump else signal.SIGTERM)
                process.wait(60)
    return capture.read_bytes(), markers, info


def leaks(recorded: bytes, markers: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (what, encoding)
        for what, marker in markers.items()
        for encoding, data in encodings(marker).items()
        if data in recorded
    ]


def test_nothing_in_the_recording(tmp_path: Path) -> None:
    recorded, markers, info = record("curve", tmp_path)
    # The greetings are there: it is the right recording.
    assert b"CURVE" in recorded
    assert leaks(recorded, {**markers, "the HMAC key": info["key"]}) == []
    for word in (b"execute_request", b"msg_type", b"kernel_info", b"ipython", b"ename"):
        assert word not in recorded
    figure("capture", "python3-curve", bytes=len(recorded), markers=0)


def test_the_markers_are_found_with_stock(tmp_path: Path) -> None:
    recorded, markers, _ = record("stock", tmp_path)
    found = {what for what, _ in leaks(recorded, markers)}
    assert found == set(WHAT), len(recorded)
    figure("capture", "stock plaintext", bytes=len(recorded), markers=len(found))

"""An attacker of another user id, who tries everything on every port as it appears."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import wait_for

# Another user may not be able to load it any more when it is wanted.
"".encode("idna")

DAP_EXPRESSION = "open({marker!r}, 'w').close()"


def dap(connection: socket.socket, *requests: dict[str, Any]) -> bytes:
    """Send DAP requests one after the other; gives all that came back."""
    heard = b""
    for number, request in enumerate(requests, 1):
        body = json.dumps({"type": "request", "seq": number, **request}).encode()
        with contextlib.suppress(OSError):
            connection.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            connection.settimeout(0.2)
            while chunk := connection.recv(1 << 16):
                heard += chunk
    return heard


def attack(port: int, marker: str) -> list[bytes]:
    """Try the whole set on one port; gives what came back of each."""
    evaluate = {"expression": DAP_EXPRESSION.format(marker=marker), "context": "repl"}
    initialize = {"command": "initialize", "arguments": {"adapterID": "debugpy", "clientID": "x"}}
    attach = {"command": "attach", "arguments": {"connect": {"host": "127.0.0.1", "port": port}}}
    tries: list[Any] = [
        [
            initialize,
            attach,
            {"command": "configurationDone"},
            {"command": "threads"},
            {"command": "evaluate", "arguments": evaluate},
            {"command": "disconnect"},
        ],
        [initialize, {"command": "evaluate", "arguments": evaluate}],
        *(
            [
                {"command": "pydevdAuthorize", "arguments": {"debugServerAccessToken": guess}},
                initialize,
                {"command": "evaluate", "arguments": evaluate},
            ]
            for guess in (None, "", "0" * 64)
        ),
        b"\xff" + bytes(8) + b"\x7f\x03",
        b"",
        b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)),
        b"501\t1\t0.1\tUNIX\n",
    ]
    heard = []
    for one in tries:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 1) as connection,
        ):
            if isinstance(one, bytes):
                connection.sendall(one)
                connection.settimeout(0.2)
                with contextlib.suppress(OSError):
                    heard.append(connection.recv(1 << 16))
            else:
                heard.append(dap(connection, *one))
    return heard


def listeners() -> set[tuple[int, str]]:
    """Every TCP port that is listened on here, and its inode: what any user may know."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as file:  # noqa: PTH123
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    ports.add((int(fields[1].rpartition(":")[2], 16), fields[9]))
    return ports


def prey(known: set[tuple[int, str]], marker: str, notes: Path, rounds: int, seconds: float) -> None:
    """Attack every new port *rounds* times, all ports at once, for so many *seconds* at most."""
    held = []
    old = set(Path("/proc").glob("[0-9]*"))
    deadline = time.monotonic() + seconds
    with notes.open("ab", buffering=0) as file:

        def attack_port(port: int) -> None:
            for _ in range(rounds):
                for heard in attack(port, marker):
                    file.write(b"port %d: %r\n" % (port, heard))
                # Silent, and there to stay.
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(("127.0.0.1", port), 1))
                time.sleep(0.5)

        file.write(b"uid %d\n" % os.getuid())
        while time.monotonic() < deadline:
            for port, inode in sorted(listeners() - known):
                known.add((port, inode))
                threading.Thread(target=attack_port, args=(port,), daemon=True).start()
            for name in ("cmdline", "environ"):
                for process in set(Path("/proc").glob("[0-9]*")) - old:
                    with contextlib.suppress(OSError):
                        if b"-token" in (process / name).read_bytes():
                            file.write(
                                b"a token is in %s of %s\n" % (name.encode(), process.name.encode())
                            )
                            old.add(process)
            time.sleep(0.02)


@contextlib.contextmanager
def attacker(
    tmp_path: Path, known: set[tuple[int, str]], rounds: int = 5, seconds: float = 120
) -> Iterator[tuple[Path, Path]]:
    """A process of another user that attacks each port as it appears: its marker and its notes."""
    playground = tmp_path.parent / f"{tmp_path.name}-attacker"
    playground.mkdir(mode=0o777)
    playground.chmod(0o777)
    marker, notes = playground / "marker", playground / "notes"
    arguments = json.dumps([sorted(known), str(marker), str(notes), rounds, seconds])
    with subprocess.Popen([sys.executable, __file__, arguments]) as process:
        try:
            wait_for("the attacker", lambda: notes.exists() and b"uid 65534" in notes.read_bytes())
            yield marker, notes
        finally:
            process.kill()


def reachable(tmp_path: Path) -> None:
    # pytest makes its folders for their owner only; the attacker may pass through, no more.
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.geteuid() and str(folder).startswith("/tmp/"):
            folder.chmod(0o711)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def main() -> None:
    known, marker, notes, rounds, seconds = json.loads(sys.argv[1])
    # Whatever it imports is imported: another user may not be able to.
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        prey({(port, inode) for port, inode in known}, marker, Path(notes), rounds, seconds)
    except BaseException as error:
        with Path(notes).open("ab") as file:
            file.write(f"it failed: {error!r}".encode())
        raise


if __name__ == "__main__":
    main()

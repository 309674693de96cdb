"""What several tests need: real kernels in real processes, and what the system says of them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import uuid
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import zmq
from jupyter_client import BlockingKernelClient, KernelManager
from rich.console import Console
from rich.text import Text

import curve_kernel
from curve_kernel.keys import KeyPair

T = TypeVar("T")
CHANNELS = ("shell", "stdin", "control", "iopub", "hb")
MODULE = [sys.executable, "-m", "curve_kernel"]
SCREENSHOTS = Path(
    os.environ.get("CURVE_KERNEL_SCREENSHOTS") or Path(__file__).parents[1] / "screenshots"
)


def wait_for(what: str, condition: Callable[[], T], timeout: float = 60) -> T:
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.05)
    return value


def listening_ports(pid: int) -> set[int]:
    """The TCP ports that a process and its children listen on, as the operating system tells."""
    process = psutil.Process(pid)
    ports = set()
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            ports |= {c.laddr.port for c in one.net_connections("inet") if c.status == "LISTEN"}
    return ports


def connection_info(**fields: Any) -> dict[str, Any]:
    """A connection file's content as launchers write it, ports left to the kernel."""
    info: dict[str, Any] = {f"{name}_port": 0 for name in CHANNELS}
    info |= {"ip": "127.0.0.1", "transport": "tcp", "signature_scheme": "hmac-sha256", "key": "k" * 32}
    return info | fields


def both_keys(keys: KeyPair) -> dict[str, str]:
    return {
        "curve_publickey": keys.public_key.decode(),
        "curve_secretkey": keys.secret_key.decode(),
    }


def environment(folder: Path) -> str:
    """Make an environment with this one's packages, without its kernelspecs; gives its interpreter."""
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    here = site.relative_to(folder)
    root = Path(curve_kernel.__file__).parents[1]
    (site / "packages.pth").write_text(f"{Path(sys.prefix) / here}\n{root}\n")
    return str(folder / "bin" / "python")


@contextlib.contextmanager
def headless(
    *arguments: str,
    file: Path | None = None,
    env: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
    **popen: Any,
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run the kernel by hand; gives the process and its connection file's content."""
    if file is not None:
        arguments = ("-f", str(file), *arguments)
    process = subprocess.Popen(
        [*prefix, *MODULE, *arguments],
        env={**os.environ, **(env or {})},
        text=True,
        stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen},
    )
    try:
        if file is None:
            runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
            file = runtime / f"kernel-{process.pid}.json"

        def ready() -> dict[str, Any] | None:
            if process.poll() is not None:
                raise AssertionError(f"the kernel ended: {process.communicate()}")
            with contextlib.suppress(OSError, ValueError):
                info = json.loads(file.read_text())
                if info.get("curve_publickey") and info["hb_port"]:
                    return info
            return None

        yield process, wait_for("the connection file", ready)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        process.kill()
        process.communicate(timeout=20)


def refused(
    *arguments: str, env: dict[str, str] | None = None, **popen: Any
) -> tuple[int, list[str], str]:
    """Run a kernel that has to refuse; gives the exit status, and standard error as lines.

    Fails if the process, or a child of it, listens on any port before it ends.
    """
    process = subprocess.Popen(
        [*MODULE, *arguments],
        env={**os.environ, **(env or {})},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **popen,
    )
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                assert not listening_ports(process.pid), "a port is open"
            time.sleep(0.002)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert out == ""
    return process.returncode, err.splitlines(), err


@contextlib.contextmanager
def client_of(info: dict[str, Any], keys: KeyPair) -> Iterator[BlockingKernelClient]:
    """A stock client that holds the kernel's whole key pair."""
    client = BlockingKernelClient()
    client.load_connection_info({**info, **both_keys(keys)})
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield client
    finally:
        client.stop_channels()


def stock_ports() -> dict[str, Any]:
    """Ports for a stock kernel, which the system gives to nobody else before the kernel has them."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports: dict[str, Any] = {"cache_ports": False}
    for channel in CHANNELS:
        for port in _PORTS:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port + worker % 10 * 1000))
                ports[f"{channel}_port"] = port + worker % 10 * 1000
                break
    return ports


_PORTS = itertools.cycle(range(20_000, 21_000))


@contextlib.contextmanager
def started(
    kernel_name: str, manager: type[KernelManager] = KernelManager, **kwargs: Any
) -> Iterator[tuple[KernelManager, Any]]:
    """A kernel that a manager has started, with the manager's own client."""
    file = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / f"kernel-{uuid.uuid4()}.json"
    ports = stock_ports() if kernel_name == "python3" and "transport" not in kwargs else {}
    km = manager(kernel_name=kernel_name, **{"connection_file": str(file), **ports, **kwargs})
    km.start_kernel()
    client = km.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield km, client
    finally:
        client.stop_channels()
        km.shutdown_kernel(now=True)


def run_code(client: Any, code: str, timeout: float = 60, **kwargs: Any) -> tuple[str, str]:
    """Execute *code*; gives the reply's status, and what came out on iopub as text."""
    texts: list[str] = []

    def collect(message: dict[str, Any]) -> None:
        content = message["content"]
        match message["msg_type"]:
            case "stream":
                texts.append(content["text"])
            case "execute_result" | "display_data":
                texts.append(content["data"].get("text/plain", ""))
            case "error":
                texts.append(content["ename"] + ": " + content["evalue"])

    kwargs.setdefault("allow_stdin", False)
    reply = client.execute_interactive(code, timeout=timeout, output_hook=collect, **kwargs)
    return reply["content"]["status"], "".join(texts)


def value(client: Any, code: str) -> Any:
    """Return what the expression *code* is in the kernel, by way of JSON."""
    status, text = run_code(client, f"import json; print(json.dumps({code}))")
    assert status == "ok", text
    return json.loads(text)


def begin(client: Any, code: str, **kwargs: Any) -> str:
    """Execute *code*, which first prints "begun"; gives the request's id once it has."""
    request = client.execute(code, **kwargs)
    while client.get_iopub_msg(timeout=60)["content"].get("text") != "begun\n":
        pass
    return request


def check_interrupt(client: Any, interrupt: Callable[[], object]) -> None:
    """A cell that would run for a minute ends in KeyboardInterrupt once *interrupt* is called."""
    # Without stop_on_error=False what comes right after is aborted.
    code = "import time\nprint('begun')\nfor n in range(600): time.sleep(0.1)"
    request = begin(client, code, stop_on_error=False)
    interrupt()
    assert client._recv_reply(request, timeout=60)["content"]["ename"] == "KeyboardInterrupt"


def printed_until(client: Any, code: str, says: Callable[[str], object], timeout: float = 60) -> str:
    """Execute *code*; gives what was printed until *says* holds, also by children after its end."""
    request = client.execute(code, allow_stdin=False)
    text, idle, deadline = "", False, time.monotonic() + timeout
    while not idle or not says(text):
        try:
            message = client.get_iopub_msg(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise TimeoutError(f"waited {timeout} s for more than {text[-2000:]!r}") from None
        content = message["content"]
        text += content.get("text", "")
        own = message["parent_header"].get("msg_id") == request
        assert not own or message["msg_type"] != "error", content
        idle = idle or (own and content.get("execution_state") == "idle")
    while client.get_shell_msg(timeout=timeout)["parent_header"].get("msg_id") != request:
        pass
    return text


def check_error(err: str, says: str, hint: str | None) -> None:
    """An error is a line that says what is wrong, and a line with a hint if there is a hint."""
    lines = err.splitlines()
    assert len(lines) == (1 if hint is None else 2), err
    assert lines[0].startswith("curve_kernel: error: ")
    assert says in lines[0]
    if hint is not None:
        assert lines[1].startswith("curve_kernel: hint: ")
        assert hint in lines[1]


def on_terminal(name: str, *arguments: str, columns: int = 100) -> tuple[int, str]:
    """Run a command on a terminal, and take a picture; gives the status and what it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 1 << 16):
                chunks.append(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    env = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    done = subprocess.run(
        [*MODULE, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**env, "TERM": "xterm-256color"},
        timeout=100,
        check=False,
    )
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    out = b"".join(chunks).decode().replace("\r\n", "\n")
    shown = out.replace(os.environ["HOME"], "~").replace(sys.prefix, "/opt/jupyter")
    console = Console(record=True, width=columns, file=io.StringIO())
    console.print(Text.from_ansi(shown))
    SCREENSHOTS.mkdir(exist_ok=True)
    title = " ".join(("python -m curve_kernel", *arguments))
    picture = console.export_svg(title=title)
    # A picture that fetches nothing.
    picture = re.sub(r"@font-face \{.*?\}|<!-- Generated.*?-->", "", picture, flags=re.DOTALL)
    (SCREENSHOTS / f"{name}.svg").write_text(picture.replace("Fira Code", "DejaVu Sans Mono"))
    return done.returncode, out


def curve_socket(context: zmq.Context[Any], kind: int, server_key: bytes) -> zmq.Socket[Any]:
    """A hand-made CURVE client with a fresh key pair."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = server_key
    return socket

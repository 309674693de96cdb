"""The kernel launched by hand, and its ports under a stranger's eyes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from support import (
    CHANNELS,
    MODULE,
    both_keys,
    client_of,
    connection_info,
    curve_socket,
    headless,
    listening_ports,
    run_code,
    started,
    wait_for,
)

from curve_kernel.keys import KeyPair
from curve_kernel.wire import read_mechanism

VARIABLE, FILE_VARIABLE = "JUPYTER_CURVE_SECRETKEY", "JUPYTER_CURVE_SECRETKEY_FILE"

FORK = """
import os, sys, multiprocessing
pid = os.fork()
if pid == 0:
    print('from-os-fork', flush=True)
    print('from-os-fork-stderr', file=sys.stderr, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
def work(n):
    print(f'from-process-{n}', flush=True)
context = multiprocessing.get_context('fork')
processes = [context.Process(target=work, args=(n,)) for n in range(3)]
for process in processes: process.start()
for process in processes: process.join()
import time; time.sleep(0.3)
"""
FORK_SAYS = ["from-os-fork\n", "from-os-fork-stderr", *(f"from-process-{n}" for n in range(3))]


@pytest.fixture
def keys() -> KeyPair:
    return KeyPair.generate()


@pytest.fixture
def kernel(tmp_path, keys):
    """A running kernel with both keys in its connection file: process, connection info, client."""
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    with headless(file=file) as (process, info), client_of(info, keys) as client:
        yield process, info, client


def endpoint(info: dict, channel: str) -> str:
    port = info[f"{channel}_port"]
    return f"ipc://{info['ip']}-{port}" if info["transport"] == "ipc" else f"tcp://{info['ip']}:{port}"


def test_both_keys_in_the_file(tmp_path, keys):
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys), something="kept")))
    with headless(file=file) as (_, info), client_of(info, keys) as client:
        assert run_code(client, "print(6 * 7)") == ("ok", "42\n")
        assert info["something"] == "kept"
        assert info["curve_secretkey"] == keys.secret_key.decode()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        status, text = run_code(client, "%connect_info")
        assert status == "ok"
        assert keys.public_key.decode() in text
        assert keys.secret_key.decode() not in text
    assert file.exists()


@pytest.mark.parametrize("where", ["variable", "file", "both"])
def test_public_key_in_the_file_and_secret_elsewhere(tmp_path, keys, where):
    file, secret = tmp_path / "kernel.json", tmp_path / "secret"
    file.write_text(json.dumps(connection_info(curve_publickey=keys.public_key.decode())))
    secret.write_text(keys.secret_key.decode() + "\n")
    secret.chmod(0o600)
    env = {VARIABLE: keys.secret_key.decode(), FILE_VARIABLE: str(secret)}
    if where != "both":
        del env[FILE_VARIABLE if where == "variable" else VARIABLE]
    with headless(file=file, env=env) as (process, info), client_of(info, keys) as client:
        assert "curve_secretkey" not in info
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert keys.secret_key not in environment
        assert b"JUPYTER_CURVE" not in environment
        assert b"JUPYTER_RUNTIME_DIR" in environment
        names = "[n for n in os.environ if 'JUPYTER_CURVE' in n]"
        assert run_code(client, f"import os; print({names})") == ("ok", "[]\n")
        call = "print(subprocess.check_output([sys.executable, '-c', {!r}]))"
        child = f"import os; print({names}, open('/proc/self/environ', 'rb').read())"
        status, text = run_code(
            client,
            "import subprocess, sys; " + call.format(child),
        )
        assert status == "ok"
        assert "JUPYTER_RUNTIME_DIR" in text
        assert "JUPYTER_CURVE" not in text
        assert keys.secret_key.decode() not in run_code(client, "!env; cat /proc/self/environ")[1]


def test_a_file_that_somebody_left_under_the_kernels_own_name_is_not_taken(tmp_path, keys):
    """Whoever guesses the process id could otherwise give the kernel keys of their own."""
    planted = tmp_path / "shared"
    planted.mkdir()
    runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
    content = json.dumps(connection_info(**both_keys(keys)))
    code = (
        "import os, sys, pathlib\n"
        "for folder in sys.argv[1:]:\n"
        "    pathlib.Path(folder, f'kernel-{os.getpid()}.json').write_text(sys.stdin.readline())\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'curve_kernel'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(planted), str(runtime)],
        cwd=planted,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        process.stdin.write(f"{content}\n{content}\n")
        process.stdin.close()
        file = runtime / f"kernel-{process.pid}.json"

        def ready() -> dict | None:
            with contextlib.suppress(OSError, ValueError):
                info = json.loads(file.read_text())
                return info if info["shell_port"] else None
            return None

        info = wait_for("the kernel's own file", ready)
        assert info["curve_publickey"] != keys.public_key.decode()
        assert "curve_secretkey" not in info
        assert info["key"] != "k" * 32
        assert json.loads((planted / file.name).read_text())["shell_port"] == 0
    finally:
        process.terminate()
        process.wait(60)


def test_others_can_read_the_secret_in_the_file(tmp_path, keys):
    file, err = tmp_path / "kernel.json", tmp_path / "err"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    for mode, warns in ((0o644, True), (0o600, False)):
        file.chmod(mode)
        with err.open("w") as stderr, headless(file=file, stderr=stderr):
            pass
        assert ("Others could read the secret key" in err.read_text()) is warns
        file.write_text(json.dumps(connection_info(**both_keys(keys))))


def test_variable_without_a_file(tmp_path, keys):
    file = tmp_path / "new folder" / "kernel.json"
    env = {VARIABLE: keys.secret_key.decode()}
    with headless(file=file, env=env) as (_, info), client_of(info, keys) as client:
        assert info["curve_publickey"] == keys.public_key.decode()
        assert keys.secret_key.decode() not in file.read_text()
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert run_code(client, "1 + 1") == ("ok", "2")
        client.shutdown()
        wait_for("the kernel to clean up", lambda: not file.exists())


def test_one_log_line_names_the_key_and_none_warns(tmp_path, keys):
    file = tmp_path / "kernel.json"
    command = [*MODULE, "-f", str(file), "--debug"]
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    file.chmod(0o600)
    err = tmp_path / "err"
    with err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            wait_for("the log line", lambda: keys.public_key.decode() in err.read_text())
            time.sleep(0.5)
        finally:
            process.terminate()
            process.wait(60)
    log = err.read_text()
    assert [keys.public_key.decode() in line for line in log.splitlines()].count(True) == 1
    assert "WARNING" not in log
    assert "plain text" not in log
    assert keys.secret_key.decode() not in log


def test_every_port_the_system_knows_of_speaks_curve(kernel):
    process, info, client = kernel
    run_code(client, FORK)
    ports = listening_ports(process.pid)
    assert {info[f"{channel}_port"] for channel in CHANNELS} < ports
    assert len(ports) == 6
    assert {read_mechanism(f"tcp://127.0.0.1:{port}") for port in ports} == {"CURVE"}


EVERY_FORK = """
import concurrent.futures, multiprocessing, os, pty, subprocess
def child(fork):
    pid = fork()
    pid = pid[0] if isinstance(pid, tuple) else pid
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
child(os.fork)
child(os.forkpty)
child(pty.fork)
subprocess.run(['true'], preexec_fn=os.getpid)
for method in ('fork', 'forkserver', 'spawn'):  # the second is the default from Python 3.14 on
    context = multiprocessing.get_context(method)
    process = context.Process(target=os.getpid)
    process.start()
    process.join()
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        print(method, pool.submit(abs, -1).result())
print('over')
"""


def test_a_fork_prints_what_it_prints_in_stock(kernel):
    """From Python 3.12 on that is a DeprecationWarning, since a kernel has threads."""
    with started("python3", transport_encryption="disabled") as (_, stock):
        status, theirs = run_code(stock, EVERY_FORK)
    assert status == "ok"
    _, _, client = kernel
    status, ours = run_code(client, EVERY_FORK)
    assert status == "ok"

    def lines(text: str) -> list[str]:
        return sorted(re.sub(r"\d+", "N", text).splitlines())

    assert lines(ours) == lines(theirs)
    assert ("DeprecationWarning" in ours) is (sys.version_info >= (3, 12))


def test_what_forked_children_print_arrives(kernel):
    _, _, client = kernel
    status, text = run_code(client, FORK)
    assert status == "ok"
    assert all(line in text for line in FORK_SAYS), text


LONG = "''.join(f'{n} ' * (n % 97) + '\\n' for n in range(20_000)) + 'x' * 700_000 + '\\nend'"
LONG_FROM_CHILDREN = """
import os, time, warnings
warnings.filterwarnings('ignore', message='.*fork')  # from Python 3.12 on, in stock too
text = ''.join(f'{n} ' * (n % 97) + '\\n' for n in range(20_000))
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        print(text, end='', flush=True)
        os._exit(0)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        sum(range(1000))
    os.waitpid(pid, 0)
time.sleep(1)
"""


def test_long_text_of_a_child_comes_in_order(kernel):
    """Each child has a connection of its own."""
    _, _, client = kernel
    status, text = run_code(client, LONG_FROM_CHILDREN)
    lines = [f"{n} " * (n % 97) for n in range(20_000)]
    assert status == "ok"
    assert text.splitlines() == lines * 8


def test_long_text_comes_in_pieces_of_whole_lines(tmp_path, keys):
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    pieces = []

    def collect(message):
        if message["msg_type"] == "stream":
            pieces.append(message["content"]["text"])

    with headless(file=file) as (_, info), client_of(info, keys) as client:
        client.execute_interactive(f"print({LONG})", timeout=60, output_hook=collect)
    assert "".join(pieces) == eval(LONG) + "\n"
    assert 6 < len(pieces) < 12
    assert all(piece.endswith(("\n", "end")) for piece in pieces)  # print writes its line end apart
    assert max(map(len, pieces)) < 2_000_000


def test_what_a_stranger_sends_is_neither_printed_nor_obeyed(kernel, keys):
    process, _, client = kernel
    marker = b"stranger-was-here"
    ports = sorted(listening_ports(process.pid))
    with zmq.Context() as context:
        senders = []
        for port in ports:
            for kind in (zmq.PUSH, zmq.DEALER, zmq.REQ, zmq.PUB):
                plain = context.socket(kind)
                wrong = curve_socket(context, kind, KeyPair.generate().public_key)
                for sender in (plain, wrong):
                    sender.linger = 0
                    sender.connect(f"tcp://127.0.0.1:{port}")
                    senders.append(sender)
            # The pipe does not even take the kernel's own server key.
            pushing = curve_socket(context, zmq.PUSH, keys.public_key)
            pushing.connect(f"tcp://127.0.0.1:{port}")
            senders.append(pushing)
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(marker * 100)
        for _ in range(5):
            for sender in senders:
                with contextlib.suppress(zmq.ZMQError):
                    sender.send(marker, zmq.NOBLOCK)
            time.sleep(0.1)
        status, text = run_code(client, "import time, sys; time.sleep(1); print('still here')")
        assert (status, text) == ("ok", "still here\n")
        for sender in senders:
            sender.close()


def test_eavesdroppers_get_nothing(kernel, keys):
    _, info, client = kernel
    with zmq.Context() as context:
        plain = context.socket(zmq.SUB)
        wrong = curve_socket(context, zmq.SUB, KeyPair.generate().public_key)
        right = curve_socket(context, zmq.SUB, keys.public_key)
        for subscriber in (plain, wrong, right):
            subscriber.linger = 0
            subscriber.subscribe(b"")
            subscriber.connect(endpoint(info, "iopub"))
        time.sleep(1)
        for n in range(3):
            assert run_code(client, f"print('secret-{n}')")[0] == "ok"
        wait_for("the test itself to see it", lambda: run_code(client, "1") and right.poll(100))
        assert not plain.poll(500)
        assert not wrong.poll(500)
        for subscriber in (plain, wrong, right):
            subscriber.close()


ALLOCATED = """
import ctypes
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
        "keepcost")]
libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info
print(libc.mallinfo2().uordblks)
"""


def test_clients_that_left_leave_no_memory_behind(kernel, keys):
    """Not even on stdin, where each leaves 35 KiB in stock until a cell asks for input."""
    _, info, client = kernel

    def come_and_go(clients):
        for _ in range(clients):
            with client_of(info, keys):
                pass

    def allocated():
        return int(run_code(client, ALLOCATED)[1])

    come_and_go(10)
    time.sleep(1.5)
    before = allocated()
    come_and_go(40)
    wait_for("the memory to be free", lambda: (allocated() - before) / 40 < 15 << 10)


def test_a_thread_asks_for_input_while_clients_of_stdin_leave(kernel, keys):
    _, info, client = kernel
    # The thread may run when the cell is over, and input() then is Python's again.
    ask = "import threading\nanswers, ask = [None], input\n" + (
        "threading.Thread(target=lambda: answers.append(ask('now? '))).start()"
    )
    client.execute(ask, allow_stdin=True)
    assert client.get_stdin_msg(timeout=60)["content"]["prompt"] == "now? "
    for _ in range(10):
        with client_of(info, keys):
            time.sleep(0.3)
    client.input("yes")
    wait_for("the answer", lambda: "yes" in run_code(client, "print(answers)")[1])
    client.execute("import getpass; print(input('a') + getpass.getpass('b'))", allow_stdin=True)
    for prompt in "ab":
        assert client.get_stdin_msg(timeout=60)["content"]["prompt"] == prompt
        client.input(prompt.upper())
    while client.get_iopub_msg(timeout=60)["content"].get("text") != "AB\n":
        pass


COUNT = """
class Counted:
    def __init__(self, socket):
        self.socket, self.reads = socket, 0
    def __getattr__(self, name):
        return getattr(self.socket, name)
    def get(self, option):
        self.reads += 1
        return self.socket.get(option)

reaper = get_ipython().kernel.parent._stdin_reaper
reaper._socket = counted = Counted(reaper._socket)
"""


def test_nobody_uses_the_socket_of_stdin_while_a_thread_asks(kernel):
    _, info, client = kernel

    def reads():
        return int(run_code(client, "print(counted.reads)")[1])

    def leave() -> None:
        with socket.create_connection(("127.0.0.1", info["stdin_port"])) as peer:
            peer.sendall(b"\xff")

    assert run_code(client, COUNT)[0] == "ok"
    leave()
    wait_for("a look at stdin", lambda: reads() > 0)
    ask = "import threading\nask = input\nthread = threading.Thread(target=lambda: ask('now? '))"
    client.execute(f"{ask}\nthread.start()", allow_stdin=True)
    assert client.get_stdin_msg(timeout=60)["content"]["prompt"] == "now? "
    before = reads()
    leave()
    time.sleep(1)
    assert reads() == before
    client.input("yes")
    # Until the thread has its answer, it is left alone.
    wait_for("a look at stdin", lambda: leave() or reads() > before)


def test_ipc(tmp_path, keys):
    file = tmp_path / "kernel.json"
    info = connection_info(**both_keys(keys)) | {"transport": "ipc", "ip": str(tmp_path / "socket")}
    file.write_text(json.dumps(info))
    with headless(file=file) as (process, info), client_of(info, keys) as client:
        assert {read_mechanism(endpoint(info, channel)) for channel in CHANNELS} == {"CURVE"}
        status, text = run_code(client, FORK)
        assert status == "ok"
        assert all(line in text for line in FORK_SAYS), text
        assert len(listening_ports(process.pid)) == 1


def test_the_secret_leaves_the_application_once_the_ports_are_bound(kernel, keys):
    _, _, client = kernel
    code = """
    import gc
    app = get_ipython().kernel.parent
    print([name for name, value in app.trait_values().items() if value == SECRET],
          app.get_connection_info(), app._keys, vars(app.heartbeat))
    """
    status, text = run_code(client, code.replace("SECRET", repr(keys.secret_key)))
    assert status == "ok"
    assert text.startswith("[] ")
    assert keys.secret_key.decode() not in text


HOLDERS = """
import gc, zmq
app, found = get_ipython().kernel.parent, []
seen, todo = set(), gc.get_objects()
while todo:
    one = todo.pop()
    if id(one) in seen:
        continue
    seen.add(id(one))
    if isinstance(one, (str, bytes)) and len(one) == 40:
        try:
            key = one if isinstance(one, bytes) else one.encode()
            found += [one] * (zmq.curve_public(key) == app.server_key)
        except Exception:
            pass
    elif not isinstance(one, (str, bytes)):
        todo += gc.get_referents(one)
print(len(found))
"""


@pytest.mark.parametrize("where", ["variable", "file"])
def test_no_python_object_holds_the_secret_key(tmp_path, keys, where):
    file = tmp_path / "kernel.json"
    given = both_keys(keys)
    env = {VARIABLE: given.pop("curve_secretkey")} if where == "variable" else {}
    file.write_text(json.dumps(connection_info(**given)))
    with headless(file=file, env=env) as (_, info), client_of(info, keys) as client:
        assert run_code(client, HOLDERS) == ("ok", "0\n")
        assert run_code(client, f"held = {keys.secret_key!r}\n{HOLDERS}") != ("ok", "0\n")


def test_debugger_requests_are_answered(kernel):
    _, _, client = kernel
    message = client.session.msg(
        "debug_request",
        {
            "type": "request",
            "seq": 1,
            "command": "initialize",
            "arguments": {"clientID": "test", "adapterID": "", "pathFormat": "path"},
        },
    )
    client.control_channel.send(message)
    reply = client.get_control_msg(timeout=60)
    while reply["msg_type"] != "debug_reply":
        reply = client.get_control_msg(timeout=60)
    assert reply["content"]["success"] is True


def test_user_folder_does_not_shadow_modules(tmp_path, keys):
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')")
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(connection_info(**both_keys(keys))))
    with headless(file=file, cwd=tmp_path) as (_, info), client_of(info, keys) as client:
        assert run_code(client, "print('fine')") == ("ok", "fine\n")

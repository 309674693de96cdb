"""One contender: runs in the environment that is measured, and measures one thing at a time.

Reads a line of JSON (``{"measure": NAME, "count": N}``) and answers with one: the seconds it took, the
CPU seconds of the kernel process meanwhile, and the kernel's resident memory where that is asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import zmq

MIB = 1 << 20
TIMEOUT = 120
CERTIFICATES = 200

PREPARE = f"""
import sys
from comm import get_comm_manager
texts = {{mib: "the quick brown fox \\n" * (mib * {MIB} // 21) for mib in (1, 8)}}
blocks = {{8: bytes(8 * {MIB}), 32: bytes(32 * {MIB})}}
def opened(comm, _):
    @comm.on_msg
    def received(message):
        data = message["content"]["data"]
        buffers = [blocks[data["give"]]] if "give" in data else None
        comm.send({{"echo": data.get("echo")}}, buffers=buffers)
get_comm_manager().register_target("benchmark", opened)
"""


# A forked child sends each line by itself.
FORKED = """
import os
child = os.fork()
if child == 0:
    for i in range(500):
        print(i, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def cpu_seconds(pid: int) -> float:
    """The process's own CPU clock, clock_getcpuclockid(3): psutil knows hundredths of a second only."""
    return time.clock_gettime((~pid << 3) | 2)


def resident(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


class Contender:
    """What all contenders share: a process that serves, and measures by name."""

    pid: int

    def __init__(self) -> None:
        self.measures: dict[str, Callable[[int], dict[str, Any]]] = {}

    def timed(self, action: Callable[[], object], per: int = 1) -> dict[str, Any]:
        cpu, start = cpu_seconds(self.pid), time.perf_counter()
        action()
        seconds = time.perf_counter() - start
        return {"seconds": seconds / per, "cpu": (cpu_seconds(self.pid) - cpu) / per}

    def repeated(self, action: Callable[[], object]) -> Callable[[int], dict[str, Any]]:
        def measure(count: int) -> dict[str, Any]:
            return self.timed(lambda: [action() for _ in range(count)], per=count)

        return measure

    def close(self) -> None: ...


class Kernel(Contender):
    """A kernel with its manager and client, as front ends have them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.kernel_name, self.traits = "python3", {}
        self.owner: Any = None
        if name == "stock-curve":
            self.traits = {"transport_encryption": "required"}
        elif name.startswith("curve"):
            self._install(name)
        self.manager, self.client = self.start()
        self.manager_for_churn, _ = self.start()
        self.pid = self.manager.provisioner.pid
        self.execute(PREPARE)
        self.complete(1)  # jedi's first takes seconds, since it parses builtins
        message = self.client.session.msg("comm_open", {"comm_id": "b", "target_name": "benchmark"})
        message["content"]["data"] = {}
        self.client.shell_channel.send(message)
        self.until_idle(message["header"]["msg_id"])
        # In a context of its own, with threads enough not to be what is measured.
        self.reader = self.manager.client(context=zmq.Context(io_threads=2))
        self.subscribers: list[zmq.Socket[bytes]] = []
        self.block = bytes(32 * MIB)
        self.measures = {
            "execute": self.repeated(lambda: self.execute("pass")),
            "input": self.input,
            "complete": self.complete,
            "comm": self.comm,
            "prints": lambda _: self.timed(lambda: self.execute("for i in range(10_000): print(i)")),
            "forked": lambda _: self.timed(lambda: self.execute(FORKED)),
            "text1": lambda _: self.timed(lambda: self.execute("sys.stdout.write(texts[1]); None")),
            "text8": lambda _: self.timed(lambda: self.execute("sys.stdout.write(texts[8]); None")),
            "to_kernel": lambda _: self.ask({}, [self.block]),
            "from_kernel": lambda _: self.ask({"give": 32}),
            "spawn": self.spawn,
            "client": self.further_clients,
            "churn": self.churn,
            **{f"subscribers{n}": lambda _, n=n: self.publish(n) for n in (1, 4, 16)},
        }

    def _install(self, name: str) -> None:
        from curve_kernel.keys import KeyPair
        from curve_kernel.keys.certificates import curve_folder, write_certificate

        options = {
            "curve-unsigned": ["--no-message-signing"],
            "curve-any": ["--client-authorization", "any"],
        }
        self.kernel_name = "python3-curve"
        if name in options:
            self.kernel_name = name
            command = [sys.executable, "-m", "curve_kernel", "install", "--user", "--name", name]
            subprocess.run([*command, *options[name]], check=True, stdout=sys.stderr)
        owners = curve_folder() / "owners"
        owners.mkdir(parents=True, mode=0o700)
        for number in range(CERTIFICATES):
            self.owner = KeyPair.generate()
            write_certificate(owners / f"client-{number:03}.key", self.owner.public_key)

    def start(self) -> tuple[Any, Any]:
        from jupyter_client import KernelManager

        manager = KernelManager(kernel_name=self.kernel_name, **self.traits)
        manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = manager.client()
        client.start_channels()
        self.first_reply(client)
        return manager, client

    @staticmethod
    def first_reply(client: Any) -> None:
        request = client.kernel_info()
        while client.get_shell_msg(timeout=TIMEOUT)["parent_header"].get("msg_id") != request:
            pass

    def until_idle(self, request: str) -> None:
        while True:
            message = self.client.get_iopub_msg(timeout=TIMEOUT)
            if (
                message["parent_header"].get("msg_id") == request
                and message["msg_type"] == "status"
                and message["content"]["execution_state"] == "idle"
            ):
                return

    def execute(self, code: str) -> None:
        request = self.client.execute(code)
        self.until_idle(request)
        reply = self.client.get_shell_msg(timeout=TIMEOUT)
        if reply["content"]["status"] != "ok":
            raise RuntimeError(str(reply["content"]))

    def input(self, count: int) -> dict[str, Any]:
        request = self.client.execute(f"for _ in range({count}): input()", allow_stdin=True)

        def answer() -> None:
            for _ in range(count):
                self.client.get_stdin_msg(timeout=TIMEOUT)
                self.client.input("yes")
            self.until_idle(request)

        sample = self.timed(answer, per=count)
        self.client.get_shell_msg(timeout=TIMEOUT)
        return sample

    def complete(self, count: int) -> dict[str, Any]:
        def once() -> None:
            self.client.complete("texts.ke")
            assert self.client.get_shell_msg(timeout=TIMEOUT)["content"]["matches"]

        sample = self.timed(lambda: [once() for _ in range(count)], per=count)
        self.execute("pass")
        return sample

    def send_to_comm(self, data: dict[str, Any], buffers: list[bytes] | None) -> str:
        message = self.client.session.msg("comm_msg", {"comm_id": "b", "data": data})
        message["buffers"] = buffers or []
        self.client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def ask(self, data: dict[str, Any], buffers: list[bytes] | None = None) -> dict[str, Any]:
        """Time a message to the comm until its answer is there."""
        request = ""

        def until_answer() -> None:
            nonlocal request
            request = self.send_to_comm(data, buffers)
            while True:
                message = self.client.get_iopub_msg(timeout=TIMEOUT)
                if message["msg_type"] == "comm_msg":
                    given = sum(len(buffer) for buffer in message["buffers"])
                    assert given == data.get("give", 0) * MIB
                    return

        sample = self.timed(until_answer)
        self.until_idle(request)
        return sample

    def comm(self, count: int) -> dict[str, Any]:
        samples = [self.ask({"echo": "x" * 1024}) for _ in range(count)]
        return {kind: sum(one[kind] for one in samples) / count for kind in ("seconds", "cpu")}

    def spawn(self, count: int) -> dict[str, Any]:
        """Start a kernel; then see its memory, alone and with clients."""
        start = time.perf_counter()
        manager, client = self.start()
        seconds = time.perf_counter() - start
        pid = manager.provisioner.pid
        sample = {"seconds": seconds, "cpu": cpu_seconds(pid)}
        alone = resident(pid)
        clients = [self.connect(manager) for _ in range(count)]
        per_client = (resident(pid) - alone) / count
        for one in [*clients, client]:
            one.stop_channels()
        manager.shutdown_kernel(now=True)
        return {**sample, "memory_start": alone, "memory_client": per_client}

    def connect(self, manager: Any) -> Any:
        """A further client, that of an owner where there is a list; it has had its first reply."""
        if self.owner is None:
            from jupyter_client import BlockingKernelClient

            client = BlockingKernelClient()
        else:
            from curve_kernel.client import BlockingKernelClient as CurveClient

            client = CurveClient(client_keys=self.owner)
        client.load_connection_info(manager.get_connection_info())
        client.start_channels(hb=False)  # whose thread takes a second to stop
        self.first_reply(client)
        return client

    def further_clients(self, count: int) -> dict[str, Any]:
        """Clients that come and go, in a kernel where nothing else happens."""
        pid = self.manager_for_churn.provisioner.pid
        cpu, seconds = cpu_seconds(pid), []
        for _ in range(count):
            start = time.perf_counter()
            client = self.connect(self.manager_for_churn)
            seconds.append(time.perf_counter() - start)
            client.stop_channels()
        cpu = (cpu_seconds(pid) - cpu) / count
        return {"seconds": sorted(seconds)[count // 2], "cpu": cpu}

    def churn(self, count: int) -> dict[str, Any]:
        """The kernel's memory before, after half of the clients that come and go, and after all."""
        pid = self.manager_for_churn.provisioner.pid
        memory = {"before": resident(pid)}
        for part in ("half", "after"):
            sample = self.further_clients(count // 2)
            time.sleep(2)  # stdin's clients are let go of once a second
            memory[part] = resident(pid)
        return sample | memory

    def subscribe(self, number: int) -> None:
        while len(self.subscribers) < number:
            self.subscribers.append(self.reader.connect_iopub())
        for socket in self.subscribers:
            while not socket.poll(0):
                self.execute("pass")
            drain(socket)

    def publish(self, number: int) -> dict[str, Any]:
        """8 MiB without any JSON in it to *number* subscribers, of which the client is one."""
        self.subscribe(number - 1)
        request = ""

        def until_all_have_it() -> None:
            nonlocal request
            request = self.send_to_comm({"give": 8}, None)
            for socket in self.subscribers:
                take(socket, 8 * MIB)
            while self.client.get_iopub_msg(timeout=TIMEOUT)["msg_type"] != "comm_msg":
                pass

        sample = self.timed(until_all_have_it)
        self.until_idle(request)
        for socket in self.subscribers:
            socket.close(linger=0)
        self.subscribers.clear()
        return sample

    def close(self) -> None:
        for manager in (self.manager, self.manager_for_churn):
            manager.shutdown_kernel(now=True)


def drain(socket: Any) -> None:
    while socket.poll(0):
        socket.recv_multipart(copy=False)


def take(socket: Any, size: int) -> None:
    """Receive until a message of *size* came."""
    while True:
        if not socket.poll(TIMEOUT * 1000):
            raise TimeoutError
        if len(socket.recv_multipart(copy=False)[-1]) >= size:
            return


class BarePair(Contender):
    """CURVE sockets with nothing around them, in two processes: the limit."""

    def __init__(self) -> None:
        super().__init__()
        command = [sys.executable, __file__, "bare-server"]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.server.pid
        self.shell_url, self.iopub_url, key = json.loads(self.server.stdout.readline())
        self.server_key = key.encode()
        self.context = zmq.Context()
        self.shell = self.connected(zmq.DEALER, self.shell_url)
        self.subscribers: list[zmq.Socket[bytes]] = []
        self.subscribe(1)
        self.block = bytes(32 * MIB)
        self.measures = {
            "comm": self.repeated(lambda: self.ask(b"echo", bytes(1024))),
            "text1": lambda _: self.publish(1, MIB),
            "text8": lambda _: self.publish(1, 8 * MIB),
            "to_kernel": lambda _: self.timed(lambda: self.ask(b"take", self.block)),
            "from_kernel": lambda _: self.timed(lambda: self.ask(b"give", str(32 * MIB).encode())),
            "client": self.further_clients,
            **{f"subscribers{n}": lambda _, n=n: self.publish(n, 8 * MIB) for n in (1, 4, 16)},
        }

    def connected(self, kind: int, url: str) -> zmq.Socket[bytes]:
        from curve_kernel import sockets
        from curve_kernel.keys import KeyPair

        socket = self.context.socket(kind)
        socket.linger = 0
        sockets.make_client(socket, KeyPair.generate(), self.server_key)
        if kind == zmq.SUB:
            socket.subscribe(b"")
        socket.connect(url)
        return socket

    def ask(self, command: bytes, payload: bytes) -> None:
        self.shell.send_multipart([command, payload], copy=False)
        self.shell.recv_multipart(copy=False)

    def subscribe(self, number: int) -> None:
        while len(self.subscribers) > number:
            self.subscribers.pop().close()
        while len(self.subscribers) < number:
            self.subscribers.append(self.connected(zmq.SUB, self.iopub_url))
        for socket in self.subscribers:
            while not socket.poll(0):
                self.ask(b"publish", b"0")
            drain(socket)

    def publish(self, number: int, size: int) -> dict[str, Any]:
        self.subscribe(number)

        def round_trip() -> None:
            self.ask(b"publish", str(size).encode())
            for socket in self.subscribers:
                take(socket, size)

        return self.timed(round_trip)

    def further_clients(self, count: int) -> dict[str, Any]:
        def once() -> None:
            socket = self.connected(zmq.DEALER, self.shell_url)
            socket.send_multipart([b"echo", b""])
            socket.recv_multipart()
            socket.close()

        return self.timed(lambda: [once() for _ in range(count)], per=count)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(10)


def bare_server() -> None:
    """The other process of `BarePair`; it ends with its standard input."""
    from curve_kernel import sockets
    from curve_kernel.keys import KeyPair

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keys = KeyPair.generate()
    shell, iopub = context.socket(zmq.ROUTER), context.socket(zmq.PUB)
    for socket in (shell, iopub):
        sockets.make_server(socket, keys, handshake_timeout=5, message_size=1 << 30)
        socket.rcvbuf = -1  # the operating system's own
        socket.bind("tcp://127.0.0.1:*")
    urls = [socket.last_endpoint.decode().rstrip("\0") for socket in (shell, iopub)]
    print(json.dumps([*urls, keys.public_key.decode()]), flush=True)
    blocks: dict[int, bytes] = {}
    poller = zmq.Poller()
    poller.register(shell, zmq.POLLIN)
    poller.register(sys.stdin, zmq.POLLIN)
    while True:
        ready = [one for one, _ in poller.poll()]
        if shell not in ready:
            break
        identity, command, payload = shell.recv_multipart(copy=False)
        answer = b"" if command.bytes == b"take" else payload
        if command.bytes in (b"give", b"publish"):
            size = int(payload.bytes)
            block = blocks.setdefault(size, bytes(size))
            if command.bytes == b"give":
                answer = block
            else:
                iopub.send(block, copy=False)
        shell.send_multipart([identity, answer], copy=False)
    context.destroy(linger=0)


def main() -> None:
    name = sys.argv[1]
    if name == "bare-server":
        bare_server()
        return
    # What a kernel or a library writes must not get between the lines of JSON.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contender = BarePair() if name == "bare" else Kernel(name)
    try:
        print(json.dumps({"measures": list(contender.measures), **versions()}), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(contender.measures[request["measure"]](request["count"])), file=answers)
    finally:
        contender.close()


def versions() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0], "libzmq": zmq.zmq_version()}
    for package in ("pyzmq", "ipykernel", "jupyter_client", "tornado", "orjson", "curve_kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    return {"versions": found}


if __name__ == "__main__":
    main()

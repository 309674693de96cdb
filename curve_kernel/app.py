"""The kernel application: keys in, every bound socket a CURVE server, or no start.

What is overridden keeps its upstream name and meaning (ipykernel's ``kernelapp.py``, ``heartbeat.py``
and ``iostream.py``), and works the same way from ipykernel 6.29 on, with or without upstream's own
CURVE support (7.3 and later).
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import shlex
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import ipykernel
import zmq
from ipykernel import kernelapp
from ipykernel.iostream import IOPubThread
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp, kernel_aliases, kernel_flags
from jupyter_client.connect import KernelConnectionInfo
from tornado.ioloop import IOLoop
from traitlets import (
    CaselessStrEnum,
    Dict,
    DottedObjectName,
    Enum,
    Float,
    Int,
    TraitError,
    Unicode,
    default,
)
from traitlets.config import Config
from traitlets.utils import filefind

from . import __version__, connection_file, keys, sockets
from .access.allowlist import AuthorizedClients
from .access.gate import Gate
from .access.limits import CHANNELS, MESSAGE_SIZES, Limits
from .access.monitor import Port
from .commands import COMMANDS, DESCRIPTION
from .errors import CurveKernelError, fail, suggest
from .heartbeat import CurveHeartbeat
from .iostream import CurveIOPubThread, HeardStream, StdinReaper
from .keys import KeyPair
from .keys.certificates import curve_folder
from .keys.source import EnvironmentSecret, find
from .options import JSONConfigFile, OptionLoader, Options, PyConfigFile
from .signals import call_at_end

__all__ = ["CurveKernelApp"]

_LOG_FORMAT = "[%(name)s %(asctime)s {}]%(highlevel)s %(message)s"
_BIND_HINT = "give every channel a free port and the kernel an address of this machine"


@contextmanager
def _in_place_of_upstream(**classes: Any) -> Iterator[None]:
    """Let kernelapp's methods find *classes* where upstream's bodies name their own."""
    before = {name: getattr(kernelapp, name) for name in classes}
    vars(kernelapp).update(classes)
    try:
        yield
    finally:
        vars(kernelapp).update(before)


class _XPubContext:
    """A context that makes XPUB sockets in place of PUB sockets."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._context = context

    def socket(self, kind: int) -> zmq.Socket[Any]:
        socket: zmq.Socket[Any] = self._context.socket(zmq.XPUB if kind == zmq.PUB else kind)
        return socket


class CurveKernelApp(IPKernelApp):
    """An IPython kernel whose every bound socket is a CURVE server.

    It takes all options of ipykernel's own application, and reads the same configuration files.
    """

    version = Unicode(__version__)
    description = Unicode(DESCRIPTION)
    examples = Unicode(
        'python -m curve_kernel install           # the tile "Python 3 (CurveZMQ)"\n'
        "python -m curve_kernel                   # a kernel with a key pair of its own\n"
        "python -m curve_kernel -f kernel.json    # a kernel with the keys of a connection file\n"
    )
    subcommand_description = Unicode(
        """Subcommands are launched as `python -m curve_kernel cmd [args]`. For information on using
        subcommand 'cmd', do: `python -m curve_kernel cmd -h`."""
    )
    subcommands = Dict(COMMANDS)
    aliases = Dict(
        {
            **kernel_aliases,
            "client-authorization": "CurveKernelApp.client_authorization",
            # ipykernel had these two before launchers said it in the environment.
            "parent": "IPKernelApp.parent_handle",
            "interrupt": "IPKernelApp.interrupt",
        }
    )
    flags = Dict(
        {
            **kernel_flags,
            "allowlist": (
                {"CurveKernelApp": {"client_authorization": "allowlist"}},
                "Let only the clients that are listed in authorized_clients connect.",
            ),
        }
    )
    python_config_loader_class = PyConfigFile
    json_config_loader_class = JSONConfigFile

    client_authorization = CaselessStrEnum(
        ["any", "allowlist"],
        default_value="any",
        config=True,
        help="""Who may connect: 'any' lets in whoever knows the server key, 'allowlist' only the
        holder of the kernel's own secret key and the clients listed in authorized_clients.""",
    )
    authorized_clients = Unicode(
        config=True,
        help="""The folder that lists the clients, in owners/NAME.key and viewers/NAME.key
        [default: curve in Jupyter's configuration folder].""",
    )

    outstream_class = DottedObjectName(
        "curve_kernel.iostream.CurveOutStream",
        allow_none=True,
        config=True,
        help="""The importstring for the OutStream factory.""",
    )

    handshake_timeout = Float(
        5.0,
        min=0.1,
        config=True,
        help="""Seconds after which a handshake that is not over is given up.""",
    )
    max_handshakes = Int(
        256,
        min=1,
        config=True,
        help="""Connections that may be in their handshake at the same time, on all ports together;
        the oldest is disconnected for a newer one. Never more than a quarter of the open files that the
        process may have, so that code can always open some.""",
    )
    max_connections = Int(
        512,
        min=1,
        config=True,
        help="""Connections that clients may have that are not listed, on all ports together; the
        oldest of the address that has the most is disconnected for a newer one. A quarter of that
        number on each port of clients that are not known yet, and on the heartbeat. Never more than
        an eighth of the open files that the process may have.""",
    )
    max_message_size = Dict(
        value_trait=Int(min=4096),
        key_trait=Enum(list(MESSAGE_SIZES)),
        config=True,
        help="""Bytes in one frame that a channel takes, which holds for the handshake too: libzmq hangs
        up on a larger one. Give what is to differ, such as shell=1073741824.""",
    )

    _keys: KeyPair | None = None
    _environment: EnvironmentSecret
    _gate: Gate | None = None
    # Who can read the secret key in the connection file knows the kernel's manager's key.
    _secret_is_in_file = False
    _stdin_reaper: StdinReaper | None = None
    _secret_file_mode = 0o600
    _made_file = False
    server_key: bytes = b""

    @default("authorized_clients")
    def _default_authorized_clients(self) -> str:
        return str(curve_folder())

    def initialize(self, argv: list[str] | None = None) -> None:
        """Initialize the kernel, or leave with an error, a hint and status 1."""
        try:
            # Before a configuration file, a profile or an extension runs a line of the user's code.
            self._environment = EnvironmentSecret()
            super().initialize(argv)
        except CurveKernelError as error:
            fail(error)

    @default("log_format")
    def _default_log_format(self) -> str:
        return _LOG_FORMAT.format("pid %(process)d")

    @cached_property
    def _options(self) -> Options:
        return Options(self, CurveKernelApp)

    def parse_command_line(self, argv: list[str] | None = None) -> None:
        """Parse the command line; a word that is neither an option nor a command is an error.

        With a connection file there is a launcher, and some hand down words of their own (`jupyter run
        FILE`), which upstream passes over.
        """
        words = sys.argv[1:] if argv is None else argv
        if words and not words[0].startswith("-") and words[0] not in {*self.subcommands, "help"}:
            raise self._no_command(words[0])
        super().parse_command_line(argv)
        if self.subapp is None and self.extra_args and not self.connection_file:
            raise self._no_command(self.extra_args[0])

    def _no_command(self, word: str) -> CurveKernelError:
        meant = suggest(word, self.subcommands)
        if word.endswith(".json"):
            meant = f"-f {shlex.quote(word)}"
        hint = "see python -m curve_kernel --help"
        return CurveKernelError(
            f"no such command: {word}",
            f"did you mean python -m curve_kernel {meant}? {hint}" if meant else hint,
        )

    def _create_loader(self, *args: Any, **kwargs: Any) -> OptionLoader:
        kwargs = {"log": self.log, "subcommands": self.subcommands, **kwargs}
        return OptionLoader(self._options, *args, **kwargs)

    def update_config(self, config: Config) -> None:
        """Take in *config*, or leave if it has a value that an option of the application can't take."""
        try:
            super().update_config(config)
        except TraitError as error:
            fail(CurveKernelError(str(error).rstrip("."), "see python -m curve_kernel --help-all"))

    def load_config_file(self, *args: Any, **kwargs: Any) -> None:
        """Load the configuration files; that which the command line names must be there."""
        super().load_config_file(*args, **kwargs)
        if self.extra_config_file:
            name = os.path.splitext(self.extra_config_file)[0]  # noqa: PTH122, as upstream does
            for ending in (".py", ".json"):
                with contextlib.suppress(OSError):
                    filefind(name + ending, self.config_file_paths)
                    return
            raise CurveKernelError(
                f"there is no configuration file {name}.py or {name}.json",
                "name one that is there, or leave out the option config",
            )

    def init_connection_file(self) -> None:
        """Read the connection file, if there is one, and find the key pair."""
        keys.require_curve()
        self._options.check_late(self.argv, self)
        self._options.check_config(self.config, self.loaded_config_files)
        info = self._read_connection_file()
        if self.log_format == self._default_log_format():
            name = Path(self.connection_file).stem.replace("%", "%%")
            self.log_format = _LOG_FORMAT.format(name)
        self._keys = find(self._environment, info, self.abs_connection_file)
        del self._environment
        ports = [(info or {}).get(f"{name}_port", 0) for name in CHANNELS]
        if info is None or "curve_publickey" not in info or 0 in ports:
            connection_file.check(self.abs_connection_file)
        if info is None:
            self._made_file = True
            call_at_end(self.cleanup_connection_file)
        else:
            self._load_connection_info(cast(KernelConnectionInfo, info))
        if self.client_authorization == "any" and not self.session.key:
            raise CurveKernelError(
                "messages are not signed and any client may connect",
                "use --client-authorization=allowlist, or a connection file with a key",
            )
        self.server_key = self._keys.public_key

    def _read_connection_file(self) -> dict[str, Any] | None:
        """Return the connection file's content, or None if the kernel is to make the file."""
        try:
            if not self.connection_file:
                # Upstream would also take a file of this name that somebody left, here or in the
                # runtime folder, and with it keys that somebody else knows.
                self.connection_file = f"{self.connection_dir}/kernel-{os.getpid()}.json"
                Path(self.connection_file).unlink(missing_ok=True)
            name = self.connection_file
            if os.path.lexists(name) and not Path(name).is_file():
                connection_file.read(name)  # a folder or so is not passed over for another file
            self.connection_file = filefind(name, [".", self.connection_dir])
        except OSError:
            # A name without a folder belongs into the runtime folder. None is to follow os.chdir.
            self.connection_file = str(Path(self.abs_connection_file).absolute())
            self._create_connection_folder()
            return None
        info = connection_file.read(self.connection_file)
        if not self._environment.given and connection_file.is_from_kernel(self.connection_file, info):
            name = f"curve_publickey in connection file {self.connection_file}"
            keys.parse(info["curve_publickey"], name)
            connection_file.check_ended(self.connection_file, info)
            return None
        if "curve_secretkey" in info:
            self._secret_is_in_file = True
            self._secret_file_mode = stat.S_IMODE(Path(self.connection_file).stat().st_mode)
        return info

    def cleanup_connection_file(self) -> None:
        """Remove the connection file, unless another kernel has taken its name."""
        with contextlib.suppress(CurveKernelError):
            content = connection_file.read(self.abs_connection_file)
            if content.get("curve_publickey") == self.server_key.decode():
                super().cleanup_connection_file()

    def _create_connection_folder(self) -> None:
        path = Path(self.abs_connection_file)
        if os.path.lexists(path):
            connection_file.read(path)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True, parents=True)
            with contextlib.suppress(FileNotFoundError):
                path.stat()  # its name may be too long
        except OSError as error:
            raise CurveKernelError(
                f"connection file {path} can't be made: {error.strerror}",
                "name a connection file in a folder that you can write",
            ) from None

    def _load_connection_info(self, info: KernelConnectionInfo) -> None:
        message = f"connection file {self.connection_file} is not valid"
        hint = "let the launcher make a new connection file, or start without one"
        if not isinstance(info.get("key", ""), str):
            raise CurveKernelError(f"{message}: its key is not text", hint)
        try:
            self.load_connection_info(info)
        except (TraitError, AttributeError, TypeError, ValueError) as error:
            raise CurveKernelError(f"{message}: {error}", hint) from None

    def init_sockets(self) -> None:
        """Create a context, a session and the kernel sockets, once all given ports are known free."""
        self._check_addresses()
        # Code may change the working directory, and another folder would say who may connect.
        folder = Path(self.authorized_clients).expanduser().absolute()
        self.authorized_clients = str(folder)
        clients = AuthorizedClients(folder, self.log.warning)
        if self.client_authorization == "allowlist":
            clients.check()
        assert self._keys is not None
        allow_any = self.client_authorization == "any"
        self._gate = Gate(
            self._keys,
            clients,
            Limits(self.handshake_timeout, self.max_handshakes, self.max_connections),
            self.log,
            allow_any=allow_any,
            open_heartbeat=allow_any or self._secret_is_in_file,
            message_sizes=self.max_message_size,
        )
        self._keys = None
        # Since 7.3 upstream warns of plaintext unless this is set. The gate has the key.
        self.curve_secretkey = b"in the gate"
        try:
            super().init_sockets()
        finally:
            self.curve_secretkey = None

    def bound_ports(self) -> list[Port]:
        """Return every bound socket, as libzmq tells of it, and who is connected."""
        return self._gate.ports() if self._gate is not None else []

    @property
    def access_problem(self) -> str:
        """Why nobody new is accepted, or empty."""
        return self._gate.problem if self._gate is not None else ""

    def close(self) -> None:
        """Stop accepting clients, then close the sockets."""
        if self._gate is not None:
            self._gate.close()
        super().close()

    def _check_addresses(self) -> None:
        # A socket that is bound but does not listen opens no port, so a conflict on the last channel is
        # found before the first one is open.
        if self.transport != "tcp":
            return
        try:
            ipaddress.IPv4Address(self.ip)
        except ValueError:
            return  # the name of an interface, which libzmq resolves
        probes: dict[int, socket.socket] = {}
        try:
            for channel in CHANNELS:
                port = max(getattr(self, f"{channel}_port"), 0)
                if port and port in probes:
                    raise self._bind_error(channel, port, "another channel has that port")
                if port in probes:
                    continue
                probe = probes[port] = socket.socket()
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.ip, port))
                except (OSError, OverflowError) as error:
                    raise self._bind_error(channel, port, error) from None
        finally:
            for probe in probes.values():
                probe.close()

    def _bind_error(self, channel: str, port: int, error: object) -> CurveKernelError:
        separator = ":" if self.transport == "tcp" else "-"
        reason = getattr(error, "strerror", None) or error
        return CurveKernelError(
            f"channel {channel} can't bind {self.transport}://{self.ip}{separator}{port}: {reason}",
            _BIND_HINT,
        )

    def _bind_socket(self, s: zmq.Socket[Any], port: int) -> int:
        """Make *s* a guarded CURVE server and bind it; upstream calls this for every channel but hb."""
        assert self._gate is not None
        channel = next(name for name in CHANNELS if getattr(self, f"{name}_socket", None) is s)
        self._gate.guard(s, channel)
        try:
            return int(super()._bind_socket(s, port))
        except zmq.ZMQError as error:
            # An open socket would keep the context from ending at exit.
            self._gate.close()
            s.close(linger=0)
            raise self._bind_error(channel, port, error) from None

    def _apply_curve_server_options(self, socket: zmq.Socket[Any]) -> None:
        """Do nothing: since 7.3 upstream would set options that the gate sets."""

    def _apply_curve_client_options(self, socket: zmq.Socket[Any]) -> None:
        """Make *socket* a CURVE client of this kernel; upstream calls this since 7.3."""
        assert self._gate is not None
        sockets.make_client(socket, self._gate.own_client_keys, self.server_key)

    def init_control(self, context: zmq.Context[Any]) -> None:
        """Bind control, and connect the in-kernel debugger socket to shell as a CURVE client."""
        assert self._gate is not None
        # Before 7.3 upstream creates and connects debug_shell_socket without any CURVE option.
        with sockets.client_defaults(context, self._gate.own_client_keys, self.server_key):
            super().init_control(context)

    def init_iopub(self, context: zmq.Context[Any]) -> None:
        """Bind iopub and start its thread, with an encrypted pipe for forked children."""
        assert self._gate is not None
        subscribers: Any = context
        if not hasattr(IOPubThread, "_setup_xpub_listener"):
            subscribers = _XPubContext(context)  # upstream's PUB socket does not tell who subscribes
        with _in_place_of_upstream(IOPubThread=partial(CurveIOPubThread, gate=self._gate)):
            super().init_iopub(subscribers)

    def init_heartbeat(self) -> None:
        """Start the heart beating, and make sure that it does."""
        assert self._gate is not None
        with _in_place_of_upstream(Heartbeat=partial(CurveHeartbeat, gate=self._gate)):
            super().init_heartbeat()
        self._check_iopub_pipe_and_heartbeat()
        heartbeat = cast(CurveHeartbeat, self.heartbeat)
        try:
            heartbeat.wait_until_bound()
        except zmq.ZMQError as error:
            raise self._bind_error("hb", self.hb_port, error) from None
        self.hb_port = heartbeat.port
        self._gate.forget_secret()

    def _check_iopub_pipe_and_heartbeat(self) -> None:
        ours = isinstance(self.iopub_thread, CurveIOPubThread)
        if not ours or not isinstance(self.heartbeat, CurveHeartbeat):
            raise CurveKernelError(
                f"ipykernel {ipykernel.__version__} makes its sockets in a way that is not known here",
                "upgrade curve_kernel, or install an ipykernel that it is tested with",
            )

    def init_kernel(self) -> None:
        """Create the kernel, with a debugger that opens no port, or with none."""
        if issubclass(self.kernel_class, IPythonKernel):
            from .debugger import portless

            reason = portless.install()
            self._init_kernel()
            reason = reason or portless.check(self.kernel)
            if reason:
                self.log.warning("There is no debugger: %s", reason)
        else:
            self._init_kernel()
        self._stdin_reaper = StdinReaper(self.kernel, self.stdin_socket)

    def _init_kernel(self) -> None:
        assert self._gate is not None
        channels = {self.shell_socket: "shell", self.control_socket: "control"}
        with _in_place_of_upstream(ZMQStream=partial(HeardStream, gate=self._gate, channels=channels)):
            super().init_kernel()

    def start(self) -> None:
        """Run until the kernel is told to end."""
        if self._stdin_reaper is not None and self._gate is not None:
            self._gate.on_ended("stdin", self._stdin_reaper.start(IOLoop.current()))
        super().start()

    def init_shell(self) -> None:
        """Give the shell this kernel's magics."""
        super().init_shell()
        if self.shell:
            from .magics import CurveMagics

            self.shell.register_magics(CurveMagics)

    def write_connection_file(self, **_: Any) -> None:
        """Write ports and public key into the connection file; a secret key never is added to it."""
        path = self.abs_connection_file
        info: dict[str, Any] = {
            "ip": self.ip,
            "key": self.session.key.decode(),
            "transport": self.transport,
            "signature_scheme": self.session.signature_scheme,
            "curve_publickey": self.server_key.decode(),
        }
        info.update({f"{name}_port": getattr(self, f"{name}_port") for name in CHANNELS})
        if self._made_file:
            connection_file.write(path, {**connection_file.origin(), **info})
        else:
            connection_file.update(path, info)

    def log_connection_info(self) -> None:
        """Say that the kernel is encrypted, who may connect, and how."""
        if self._secret_file_mode & 0o077:
            self.log.warning(
                "Others could read the secret key in connection file %s: its mode was %04o, not 0600",
                self.abs_connection_file,
                self._secret_file_mode,
            )
        file = shlex.quote(self.abs_connection_file)
        listed = f"the clients listed in {shlex.quote(self.authorized_clients)}"
        anybody = self.client_authorization == "any"
        lines = [
            f"Every channel is encrypted (CURVE); server key: {self.server_key.decode()}",
            f"Connection file: {file}",
            f"May connect: {'anybody with the connection file' if anybody else listed}",
            f"To connect: python -m curve_kernel console --existing {file}",
        ]
        for line in lines:
            self.log.info("%s", line)
        if not self.parent_handle and self.log.getEffectiveLevel() < logging.CRITICAL:
            ends = f"The kernel, process {os.getpid()}, ends on Ctrl-\\ or `kill {os.getpid()}`"
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                ends += (
                    ",\nand with this terminal (SIGHUP). To keep it, start it in tmux, or with nohup or"
                    " setsid: see docs/remote.md"
                )
            print(*lines, ends, sep="\n", file=sys.__stdout__, flush=True)
        self._ports = {name: getattr(self, f"{name}_port") for name in CHANNELS}

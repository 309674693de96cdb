"""The kernel application: keys in, every bound socket a CURVE server, or no start.

What is overridden keeps the name, the meaning and the order that it has in ipykernel's
``kernelapp.py``, from 6.29 on, with upstream's own CURVE support (7.3 and later) or without.
"""

from __future__ import annotations

import contextlib
import logging
import stat
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ipykernel
import zmq
from ipykernel import kernelapp
from ipykernel.iostream import IOPubThread
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp, kernel_aliases, kernel_flags
from jupyter_client.connect import channel_socket_types, port_names
from tornado.ioloop import IOLoop
from traitlets import (
    CaselessStrEnum,
    Dict,
    DottedObjectName,
    List,
    TraitError,
    Unicode,
    default,
)

from . import __version__, connection_file, keys, sockets
from .access.allowlist import AuthorizedClients, owner_keys
from .access.gate import Activity, Gate
from .access.port import Port
from .access_options import AccessOptions
from .banner import banner
from .commands import COMMANDS, DESCRIPTION
from .errors import CurveKernelError, fail
from .folders import no_home
from .heartbeat import CurveHeartbeat
from .iostream import CurveIOPubThread, HeardStream, StdinReaper, XPubContext
from .keys import KeyPair
from .keys.certificates import curve_folder
from .keys.source import EnvironmentSecret, find
from .launch import ports
from .session import CurveSession
from .signals import call_at_end, what_ends_it
from .upstream import replaced

__all__ = ["CurveKernelApp"]

_LOG_FORMAT = "[%(name)s %(asctime)s {}]%(highlevel)s %(message)s"


class CurveKernelApp(AccessOptions, IPKernelApp):
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
    subcommand_description = Unicode("For help on a command: `python -m curve_kernel COMMAND -h`.")
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
                "Accept only the clients that are listed in authorized_clients.",
            ),
        }
    )

    client_authorization = CaselessStrEnum(
        ["any", "allowlist"],
        default_value="any",
        config=True,
        help="""Which clients may connect: 'any' accepts every client that knows the server key,
        'allowlist' only the kernel's manager, which holds its secret key, and the clients that are
        listed in authorized_clients.""",
    )
    authorized_clients = Unicode(
        config=True,
        help="""The folder that lists the clients, in owners/NAME.key and viewers/NAME.key
        [default: curve in Jupyter's configuration folder].""",
    )

    owner_keys = List(
        Unicode(),
        config=True,
        help="""Public keys, in hexadecimal or Z85, of owners beside those in authorized_clients.""",
    )

    outstream_class = DottedObjectName(
        "curve_kernel.iostream.CurveOutStream",
        allow_none=True,
        config=True,
        help="""The importstring for the OutStream factory.""",
    )

    server_key = b""
    _keys: KeyPair | None = None
    _environment: EnvironmentSecret
    _gate: Gate  # from init_sockets on
    # The manager of such a kernel may have a heartbeat of stock's, which can't present its key.
    _secret_is_in_file = False
    _secret_file_mode = 0o600
    _made_file = _names_file = False

    @default("authorized_clients")
    def _default_authorized_clients(self) -> str:
        return str(curve_folder(self.log.warning))

    @default("log_format")
    def _default_log_format(self) -> str:
        return _LOG_FORMAT.format("pid %(process)d")

    def _session_default(self) -> CurveSession:
        return CurveSession(parent=self)

    def _bind_socket(self, s: zmq.Socket[Any], port: int) -> int:
        """Make *s* a guarded CURVE server and bind it; upstream calls this for every channel but hb."""
        channel = next(name for name in channel_socket_types if getattr(self, f"{name}_socket", 0) is s)
        self._gate.guard(s, channel)
        try:
            return int(super()._bind_socket(s, port))
        except zmq.ZMQError as error:
            # An open socket would keep the context from ending at exit.
            self._gate.close()
            s.close(linger=0)
            raise ports.bind_error(self.transport, self.ip, channel, port, error) from None

    def _apply_curve_server_options(self, socket: zmq.Socket[Any]) -> None:
        """Do nothing: since 7.3 upstream would set options that the gate sets."""

    def _apply_curve_client_options(self, socket: zmq.Socket[Any]) -> None:
        """Make *socket* a CURVE client of this kernel; upstream calls this since 7.3."""
        sockets.make_client(socket, self._gate.own_client_keys, self.server_key)

    def write_connection_file(self, **_: Any) -> None:
        """Write ports and public key into the connection file; a secret key never is added to it."""
        if self._names_file:
            self.connection_file, self._names_file = connection_file.claim(self.connection_file), False
        path = self.abs_connection_file
        info: dict[str, Any] = {
            "ip": self.ip,
            "transport": self.transport,
            "key": self.session.key.decode(),
            "signature_scheme": self.session.signature_scheme,
            "curve_publickey": self.server_key.decode(),
            **dict(zip(port_names, self.ports, strict=True)),
        }
        if self._made_file:
            connection_file.write(path, {**connection_file.origin(), **info})
        else:
            connection_file.update(path, info)

    def cleanup_connection_file(self) -> None:
        """Remove the connection file, unless another kernel has taken its name."""
        with contextlib.suppress(CurveKernelError):
            content = connection_file.read(self.abs_connection_file)
            if content.get("curve_publickey") == self.server_key.decode():
                super().cleanup_connection_file()

    def init_connection_file(self) -> None:
        """Read the connection file, if there is one, and find the key pair."""
        keys.require_curve()
        self._options.check_late(self.argv, self)
        self._options.check_config(self.config, self.loaded_config_files)
        info = self._read_connection_file()
        if self.log_format == self._default_log_format():
            self.log_format = _LOG_FORMAT.format(Path(self.connection_file).stem.replace("%", "%%"))
        self._keys = find(self._environment, info, self.abs_connection_file)
        self.server_key = self._keys.public_key
        del self._environment
        if not info or "curve_publickey" not in info or not all(map(info.get, port_names)):
            connection_file.check(self.abs_connection_file)
        if info is None:
            self._made_file = True
            call_at_end(self.cleanup_connection_file)
        else:
            self._load_connection_info(info)
        if self.client_authorization == "any" and not self.session.key:
            raise CurveKernelError(
                "messages are not signed and any client may connect",
                "use --client-authorization=allowlist, or a connection file with a key",
            )

    def _read_connection_file(self) -> dict[str, Any] | None:
        """Return the connection file's content, or None if the kernel is to make the file."""
        path = None
        if self.connection_file:
            path = connection_file.find(self.connection_file, self.connection_dir)
        else:
            self.connection_file, self._names_file = connection_file.new_name(self.connection_dir), True
        if path is None:
            # A name without a folder belongs into the runtime folder, and os.chdir does not change it.
            self.connection_file = str(Path(self.abs_connection_file).absolute())
            connection_file.create_folder(self.abs_connection_file)
            return None
        self.connection_file = path
        info = connection_file.read(path)
        if not self._environment.given and connection_file.is_from_kernel(path, info):
            keys.parse(info["curve_publickey"], f"curve_publickey in connection file {path}")
            ports.check_ended(path, info)
            return None
        if "curve_secretkey" in info:
            self._secret_is_in_file = True
            self._secret_file_mode = stat.S_IMODE(Path(path).stat().st_mode)
        return info

    def _load_connection_info(self, info: Any) -> None:
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
        ports.check_free(self.transport, self.ip, dict(zip(port_names, self.ports, strict=True)))
        folder = self.folder_of_clients()
        self.authorized_clients = str(folder)
        clients = AuthorizedClients(folder, self.access_log.warning, owner_keys(self.owner_keys))
        allow_any = self.client_authorization == "any"
        if not allow_any:
            clients.check()
        assert self._keys is not None
        self._gate = Gate(
            self._keys,
            clients,
            self.limits,
            self.access_log,
            allow_any=allow_any,
            open_heartbeat=self._secret_is_in_file,
            message_sizes=self.max_message_size,
            record=self.open_record(),
            ipv6=":" in self.ip,
        )
        self._keys = None
        # Since 7.3 upstream warns of plaintext if this is None. The gate has the key.
        self.curve_secretkey = b""
        try:
            super().init_sockets()
        finally:
            self.curve_secretkey = None
        self.session.curve_gate, self.session.curve_stdin = self._gate, self.stdin_socket

    def init_control(self, context: zmq.Context[Any]) -> None:
        """Bind control, and connect the in-kernel debugger socket to shell as a CURVE client."""
        # Before 7.3 upstream creates and connects debug_shell_socket without any CURVE option.
        with sockets.client_defaults(context, self._gate.own_client_keys, self.server_key):
            super().init_control(context)

    def init_iopub(self, context: Any) -> None:
        """Bind iopub and start its thread, with an encrypted pipe for forked children."""
        if not hasattr(IOPubThread, "_setup_xpub_listener"):
            context = XPubContext(context)
        with replaced(kernelapp, IOPubThread=partial(CurveIOPubThread, gate=self._gate)):
            super().init_iopub(context)

    def init_heartbeat(self) -> None:
        """Start the heart beating, and make sure that it does."""
        with replaced(kernelapp, Heartbeat=partial(CurveHeartbeat, gate=self._gate)):
            super().init_heartbeat()
        heartbeat = self.heartbeat
        is_ours = isinstance(self.iopub_thread, CurveIOPubThread)
        if not is_ours or not isinstance(heartbeat, CurveHeartbeat):
            raise CurveKernelError(
                f"ipykernel {ipykernel.__version__} makes its sockets in a way that is not known here",
                "upgrade curve_kernel, or install an ipykernel that it is tested with",
            )
        try:
            heartbeat.wait_until_bound()
        except zmq.ZMQError as error:
            raise ports.bind_error(self.transport, self.ip, "hb", self.hb_port, error) from None
        self.hb_port = heartbeat.port
        self._gate.forget_secret()

    def close(self) -> None:
        """Stop accepting clients, then close the sockets."""
        with self._gate.closing() if hasattr(self, "_gate") else contextlib.nullcontext():
            super().close()

    def log_connection_info(self) -> None:
        """Say that the kernel is encrypted, which clients may connect, and how."""
        file = self.abs_connection_file
        if self._secret_file_mode & 0o077:
            others = (
                "Others could read the secret key in connection file %s: its mode was %04o, not 0600"
            )
            self.log.warning(others, file, self._secret_file_mode)
        lines = banner(self, file)
        for line in lines:
            self.log.info("%s", line)
        if not self.parent_handle and self.log.getEffectiveLevel() < logging.CRITICAL:
            with contextlib.suppress(OSError):  # its disk may be full
                print(*lines, what_ends_it(), sep="\n", file=sys.__stdout__, flush=True)
        self._ports = {name: getattr(self, f"{name}_port") for name in channel_socket_types}

    def init_kernel(self) -> None:
        """Create the kernel, with a debugger that opens no port, or with none."""
        is_ipython = issubclass(self.kernel_class, IPythonKernel)
        if is_ipython:
            from .debugger import portless

            problem = portless.install()
        channels = {self.shell_socket: "shell", self.control_socket: "control"}
        with replaced(kernelapp, ZMQStream=partial(HeardStream, gate=self._gate, channels=channels)):
            super().init_kernel()
        if is_ipython and (problem := problem or portless.check(self.kernel)):
            self.log.warning("There is no debugger: %s", problem)
        self._stdin_reaper = StdinReaper(self.kernel, self.stdin_socket)

    def init_shell(self) -> None:
        """Give the shell this kernel's magics."""
        super().init_shell()
        if self.shell:
            from .magics import CurveMagics

            self.shell.register_magics(CurveMagics)

    def initialize(self, argv: list[str] | None = None) -> None:
        """Initialize the kernel, or leave with an error, a hint and status 1."""
        try:
            # Before a configuration file, a profile or an extension runs a line of the user's code.
            self._environment = EnvironmentSecret()
            super().initialize(argv)
        except CurveKernelError as error:
            fail(error)
        except RuntimeError as error:
            fail(no_home(error))

    def start(self) -> None:
        """Run until the kernel is told to end."""
        if self.subapp is None:
            self._gate.on_ended("stdin", self._stdin_reaper.start(IOLoop.current()))
        super().start()

    def bound_ports(self) -> list[Port]:
        """Return every bound socket, as libzmq tells of it, and its connections."""
        return self._gate.ports() if hasattr(self, "_gate") else []

    @property
    def access_problem(self) -> str:
        """Why no new client is accepted, or empty."""
        return self._gate.problem if hasattr(self, "_gate") else ""

    def activity(self) -> Activity:
        """Return what clients did last, when their access ends, and where that is recorded."""
        return self._gate.activity() if hasattr(self, "_gate") else Activity()

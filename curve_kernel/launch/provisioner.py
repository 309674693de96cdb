"""The kernel provisioner: makes the keys, hands them over, keeps the connection file clean."""

from __future__ import annotations

import argparse
import asyncio
import os
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupyter_client
import zmq
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner
from traitlets import Bool, CaselessStrEnum

from .. import connection_file, keys, sockets
from ..access.allowlist import AuthorizedClients
from ..client.handshake import Handshake
from ..client.heartbeat import keyed_heartbeat
from ..errors import CurveKernelError
from ..folders import NoFolderError
from ..keys import KeyPair
from ..keys.certificates import curve_folder
from ..keys.source import SECRETKEY_FILE_VARIABLE, SECRETKEY_VARIABLE
from ..wire import read_mechanism
from .ports import HeldPorts
from .reconnecting import Reconnecting, connected

__all__ = ["CurveProvisioner", "StartError"]

_START_LIMIT = 60.0
_RETRY = 0.02
# What tells Jupyter where its configuration folder is.
_CONFIG_FOLDER_VARIABLES = (
    "HOME",
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_NO_CONFIG",
    "JUPYTER_PLATFORM_DIRS",
    "XDG_CONFIG_HOME",
)


class StartError(CurveKernelError):
    """Says why a kernel does not start, in short lines: JupyterLab's dialog cuts off long ones."""

    def __str__(self) -> str:
        return "\n".join(
            textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
            for text in filter(None, (self.message, self.hint))
        )


class CurveProvisioner(LocalProvisioner):
    """Starts a local kernel with a CURVE key pair of its own.

    A kernelspec names it, and every front end on jupyter_client >= 8.9 encrypts with no
    configuration::

        "metadata": {"kernel_provisioner": {"provisioner_name": "curve-provisioner", "config": {}}}

    Every start has new keys; a restart keeps them, so that clients reconnect.
    """

    key_distribution = CaselessStrEnum(
        ["env", "file"],
        default_value="env",
        config=True,
        help="""How the kernel learns its secret key: 'env' hands it over in
        $JUPYTER_CURVE_SECRETKEY, and the connection file holds the public key only; 'file' writes
        both keys into the connection file, for kernels that look for them there.""",
    )
    message_signing = Bool(
        True,
        config=True,
        help="""Sign messages with HMAC, as stock does. False leaves the HMAC key empty.""",
    )

    _keys: KeyPair | None = None
    _allowlist: Path | None = None

    def __init__(self, **kwargs: Any) -> None:
        # Traitlets would pass over a misspelt option, and what it was to change would stay as it is.
        if unknown := sorted(set(kwargs) - set(self.trait_names())):
            raise StartError(
                f"the curve-provisioner has no option {', '.join(unknown)}",
                "in its kernelspec's config there can be key_distribution and message_signing",
            )
        super().__init__(**kwargs)
        self._held_ports = HeldPorts()
        self._reconnecting = Reconnecting()

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Make the key pair, or keep that of a restarted kernel, and write the connection file."""
        _require_jupyter_client()
        keys.require_curve()
        km = self.parent
        if km is None:
            raise StartError(
                "the curve-provisioner has no kernel manager to give its keys to",
                "start the kernel through a jupyter_client KernelManager",
            )
        arguments = [*km.kernel_spec.argv, *(kwargs.get("extra_arguments") or ())]
        if not any("{connection_file}" in argument for argument in arguments):
            raise StartError(
                f"the argv of kernelspec {km.kernel_name} does not hand over the connection file",
                'its kernel.json needs "-f", "{connection_file}" in argv',
            )
        if self._keys is None:
            self._keys = KeyPair.generate()
        if not self.message_signing:
            km.session.key = b""
        # Where the manager writes keys into the file differs from version to version, so it gets to
        # know of none until it has written the file.
        km.curve_publickey = km.curve_secretkey = None
        kwargs = await super().pre_launch(transport_encryption="disabled", **kwargs)
        public_key, secret_key = self._keys.public_key.decode(), self._keys.secret_key.decode()
        if self.key_distribution == "file":
            connection_file.update(
                km.connection_file,
                {"curve_publickey": public_key, "curve_secretkey": secret_key},
            )
            self._set_manager_keys()
            self.connection_info = km.get_connection_info()
        else:
            # After the launch the manager compares the file with what it knows. See post_launch.
            connection_file.update(km.connection_file, {}, remove=["curve_publickey"])
        self._held_ports.hold(km.transport, km.ip, km.ports)
        self._reconnecting = Reconnecting(*(km._make_url(channel) for channel in ("iopub", "stdin")))
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel process, with the secret key in its environment for ``env``."""
        assert self._keys is not None
        env = dict(kwargs.pop("env", os.environ))
        for variable in (SECRETKEY_VARIABLE, SECRETKEY_FILE_VARIABLE):
            env.pop(variable, None)
        if self.key_distribution == "env":
            env[SECRETKEY_VARIABLE] = self._keys.secret_key.decode()
        self._allowlist = _allowlist_of(cmd, env, kwargs.get("cwd"))
        try:
            return await super().launch_kernel(cmd, env=env, **kwargs)
        except BaseException:
            self._held_ports.release()
            self._reconnecting.close()
            raise

    async def post_launch(self, **kwargs: Any) -> None:
        """Give the manager its keys, other clients the public one, and see that the kernel has its own.

        Raises
        ------
        CurveKernelError
            If the kernel ended because its list of clients can't be trusted, or its control port does
            not speak CURVE with the key pair that it was given. The kernel has been ended then.
        """
        assert self._keys is not None
        try:
            await super().post_launch(**kwargs)
            if self.key_distribution == "env":
                km = self._set_manager_keys()
                km._close_control_socket()
                km._connect_control_socket()
                public_key = self._keys.public_key.decode()
                connection_file.update(km.connection_file, {"curve_publickey": public_key})
            if problem := await self._verify_encryption():
                raise problem
            if late := await self._reconnecting.wait():
                self.log.warning("%d of the kernel's clients have not connected again yet", late)
        except CurveKernelError:
            await self._end_kernel()
            raise
        finally:
            self._held_ports.release()
            self._reconnecting.close()

    async def _verify_encryption(self) -> CurveKernelError | None:
        """Wait for the kernel to open its control port; say what is wrong with it."""
        assert self._keys is not None
        km: Any = self.parent
        url = km._make_url("control")
        # Not the manager's: a shutdown meanwhile would wait for a socket that it does not know.
        context: zmq.Context[Any]
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.reconnect_ivl = int(_RETRY * 1000)
            sockets.make_client(socket, self._keys, self._keys.public_key)
            handshake = Handshake("control", socket)
            try:
                socket.connect(url)
                deadline = time.monotonic() + _START_LIMIT
                while not handshake.done:
                    if await self.poll() is not None:
                        # The kernel has said why, and its manager sees that it ended.
                        return self._allowlist_problem()
                    if time.monotonic() > deadline:
                        self.log.warning(
                            "Waited %d s for the kernel to open %s: whether it encrypts is not known",
                            _START_LIMIT,
                            url,
                        )
                        return None
                    await asyncio.sleep(_RETRY)
                    handshake.read()
            finally:
                handshake.close()
        if handshake.outcome is None:
            return None
        name = km.kernel_name
        try:
            mechanism = await asyncio.to_thread(read_mechanism, url)
        except (OSError, ValueError) as error:
            mechanism = str(error)
        if mechanism == "CURVE":
            return StartError(
                f"kernel {name} has other CURVE keys than it was given, so it was ended",
                "look into its kernelspec, and for another process on its ports",
            )
        return StartError(
            f"kernel {name} ignores its CURVE keys, so it was ended: its port speaks {mechanism}",
            "start curve_kernel in its kernelspec, or use key_distribution=file if it can encrypt",
        )

    def _allowlist_problem(self) -> CurveKernelError | None:
        """Look at the list as the kernel did, since its own words are in a log that few people read."""
        if self._allowlist is None:
            return None
        try:
            AuthorizedClients(self._allowlist, str).check()
        except CurveKernelError as error:
            name = self.parent.kernel_name if self.parent else ""
            return StartError(f"kernel {name} does not start: {error.message}", error.hint)
        return None

    async def _end_kernel(self) -> None:
        km: Any = self.parent
        km.stop_restarter()
        await km._async_kill_kernel()
        await km._async_cleanup_resources()
        if restarter := getattr(km, "_restarter", None):
            # After a crash it was just restarting the kernel, and the page would wait for that.
            restarter._fire_callbacks("dead")

    async def cleanup(self, restart: bool = False) -> None:
        """Forget the keys, unless the kernel is to be restarted."""
        await super().cleanup(restart=restart)
        self._held_ports.release()
        if not restart:
            self._keys = None

    def _set_manager_keys(self) -> Any:
        assert self._keys is not None
        km: Any = self.parent
        km.curve_publickey, km.curve_secretkey = self._keys.public_key, self._keys.secret_key
        km.client_factory = _presenting_keys(km.client_factory)
        if "_create_connected_socket" not in vars(km):
            create = km._create_connected_socket

            def create_connected_socket(channel: str, identity: bytes | None = None) -> Any:
                socket = create(channel, identity=identity)
                connected(channel, socket, km._make_url(channel))
                return socket

            vars(km)["_create_connected_socket"] = create_connected_socket
        return km


def _allowlist_of(command: list[str], env: Mapping[str, str], cwd: str | None) -> Path | None:
    """Return the folder that lists the clients of the kernel that *command* starts.

    None if the command does not ask for the allowlist, or where the list is can't be known from here.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--CurveKernelApp.client_authorization", "--client-authorization"):
        parser.add_argument(option, dest="mode", type=str.lower)
    parser.add_argument("--allowlist", dest="mode", action="store_const", const="allowlist")
    parser.add_argument("--CurveKernelApp.authorized_clients", dest="folder")
    try:
        options, _ = parser.parse_known_args(command)
    except argparse.ArgumentError:
        return None
    if options.mode != "allowlist":
        return None
    if options.folder:
        return Path(cwd or Path.cwd(), os.path.expanduser(options.folder))  # noqa: PTH111
    same = all(env.get(name) == os.environ.get(name) for name in _CONFIG_FOLDER_VARIABLES)
    try:
        return curve_folder() if same else None
    except NoFolderError:
        return None


def _require_jupyter_client() -> None:
    # pip warns and goes on, where another package wants an older one.
    if jupyter_client.version_info < (8, 9):
        raise CurveKernelError(
            f"jupyter_client {jupyter_client.__version__} in the server's environment is too old to"
            " encrypt, 8.9 is needed",
            "in the server's environment: python -m pip install --upgrade 'jupyter_client>=8.9'",
        )


def _presenting_keys(factory: type) -> type:
    """Make a client class of *factory* whose heartbeat presents the manager's key pair too.

    It also accepts the keys as str: ``KernelManager.client()`` of jupyter_client 8.9 passes them so,
    and its own clients refuse them with a TraitError, until 8.10.
    """
    if hasattr(factory, "presents_keys"):
        return factory

    class Client(factory):
        presents_keys = True
        hb_channel_class: Any

        def __init__(self, **kwargs: Any) -> None:
            for name in ("curve_publickey", "curve_secretkey"):
                if isinstance(kwargs.get(name), str):
                    kwargs[name] = kwargs[name].encode("ascii")
            super().__init__(**kwargs)

        def _create_connected_socket(self, channel: str, identity: bytes | None = None) -> Any:
            socket = super()._create_connected_socket(channel, identity=identity)
            if not hasattr(self, "client_keys"):  # which this package's own clients watch themselves
                connected(channel, socket, self._make_url(channel))
            return socket

        @property
        def hb_channel(self) -> Any:
            public_key, secret_key = self.curve_publickey, self.curve_secretkey
            if self._hb_channel is None and public_key and secret_key:
                pair = KeyPair(public_key, secret_key)
                self.hb_channel_class = keyed_heartbeat(self.hb_channel_class, pair)
            return super().hb_channel

    Client.__name__, Client.__qualname__ = factory.__name__, factory.__qualname__
    return Client

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
from traitlets import Bool, CaselessStrEnum, List, TraitError, Unicode, default

from .. import connection_file, keys, sockets
from ..access.allowlist import AuthorizedClients
from ..client.handshake import Handshake
from ..distribution import Distribution, distribution_for, how_to_encrypt, site_plaintext_kernels
from ..errors import CurveKernelError
from ..folders import NoFolderError
from ..keys import KeyPair
from ..keys.certificates import curve_folder
from ..keys.source import SECRETKEY_FILE_VARIABLE, SECRETKEY_VARIABLE
from ..wire import read_mechanism
from .handover import Handover, starts_python
from .holders import holding_manager, presenting_client
from .ports import HeldPorts
from .reconnecting import Reconnecting

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
        ["env", "file", "auto"],
        config=True,
        help="""How the kernel learns its secret key: 'env' hands it over in
        $JUPYTER_CURVE_SECRETKEY, and the connection file holds the public key only; 'file' writes
        both keys into the connection file, for kernels that look for them there; 'auto' is 'env' for
        a kernelspec that starts curve_kernel, 'file' for one that advertises curve, and starts no
        other. The default is 'env' for a kernelspec that names this provisioner, and 'auto' for one
        that gets it by $JUPYTER_DEFAULT_PROVISIONER_NAME. If this is not set,
        the variable names a pipe for a kernel that a wrapper starts.""",
    )
    plaintext_kernels = List(
        Unicode(),
        config=True,
        help="""The kernelspecs that 'auto' starts although they can't encrypt, in plaintext, with a
        warning in the log each time. Set it in jupyter_config.json, which counts in every program.""",
    )
    message_signing = Bool(
        True,
        config=True,
        help="""Sign messages with HMAC, as stock does. False leaves the HMAC key empty.""",
    )

    _keys: KeyPair | None = None
    _distribution: Distribution | None = None
    """How this kernel gets its keys; None where it runs in plaintext, which a site has allowed."""
    _allowlist: Path | None = None

    def __init__(self, **kwargs: Any) -> None:
        # Traitlets would pass over a misspelt option, and what it was to change would stay as it is.
        if unknown := sorted(set(kwargs) - set(self.trait_names())):
            raise StartError(
                f"the curve-provisioner has no option {', '.join(unknown)}",
                "in its kernelspec's config there can be plaintext_kernels, key_distribution and"
                " message_signing",
            )
        super().__init__(**kwargs)
        # Who asks for it by name gets the variable, whatever the kernel is started by.
        self._by_variable = "key_distribution" in kwargs
        self._held_ports, self._handover = HeldPorts(), Handover()
        self._reconnecting = Reconnecting()

    @default("key_distribution")
    def _default_key_distribution(self) -> str:
        metadata = self.kernel_spec.metadata if self.kernel_spec else {}
        named = "provisioner_name" in metadata.get("kernel_provisioner", {})
        return "env" if named or not self.kernel_spec else "auto"

    @default("plaintext_kernels")
    def _default_plaintext_kernels(self) -> list[str]:
        return site_plaintext_kernels()

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
        self._distribution = self._choose_distribution(km)
        if self._distribution is None:
            return await super().pre_launch(**kwargs)
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
        if self._distribution == "file":
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

    def _choose_distribution(self, km: Any) -> Distribution | None:
        if self.key_distribution != "auto":
            return self.key_distribution  # type: ignore[no-any-return]
        name = km.kernel_name
        if distribution := distribution_for(km.kernel_spec):
            return distribution
        try:
            allowed = {allowed.lower() for allowed in self.plaintext_kernels}
        except TraitError as error:
            raise StartError(f"kernel {name} does not start: {error}") from None
        if name.lower() not in allowed:
            raise StartError(
                f"kernel {name} does not start: it can't encrypt, as its kernelspec neither starts"
                " curve_kernel nor advertises curve",
                how_to_encrypt(name, km.kernel_spec),
            )
        self.log.warning("Kernel %s speaks PLAINTEXT: it is listed in plaintext_kernels", name)
        return None

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel process, with the secret key in its environment for ``env``."""
        env = dict(kwargs.pop("env", os.environ))
        for variable in (SECRETKEY_VARIABLE, SECRETKEY_FILE_VARIABLE):
            env.pop(variable, None)
        try:
            if self._distribution == "env":
                env[SECRETKEY_VARIABLE] = self._secret_for(cmd)
            self._allowlist = _allowlist_of(cmd, env, kwargs.get("cwd"))
            return await super().launch_kernel(cmd, env=env, **kwargs)
        except BaseException:
            self._release()
            raise

    def _secret_for(self, command: list[str]) -> str:
        """Return the secret key, or for a wrapper what names the pipe that holds it."""
        assert self._keys is not None
        secret_key, km = self._keys.secret_key, self.parent
        if km is None or self._by_variable or starts_python(command):
            return secret_key.decode()
        try:
            return self._handover.open(km.connection_file, secret_key)
        except OSError as error:
            raise StartError(
                f"kernel {km.kernel_name} does not start: its wrapper would keep the secret key, and no"
                f" pipe for it can be made beside connection file {km.connection_file}:"
                f" {error.strerror}",
                "set JUPYTER_RUNTIME_DIR to a folder where pipes can be made, or accept that, by"
                ' "key_distribution": "env" in the config of the kernelspec\'s kernel_provisioner',
            ) from None

    def _release(self) -> None:
        self._held_ports.release()
        self._handover.close()
        self._reconnecting.close()

    async def post_launch(self, **kwargs: Any) -> None:
        """Give the manager its keys, other clients the public one, and see that the kernel has its own.

        Raises
        ------
        CurveKernelError
            If the kernel ended because its list of clients can't be trusted, or its control port does
            not speak CURVE with the key pair that it was given. The kernel has been ended then.
        """
        if self._distribution is None:
            await super().post_launch(**kwargs)
            return
        assert self._keys is not None
        try:
            await super().post_launch(**kwargs)
            if self._distribution == "env":
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
                        self._handover.close()
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
        self._handover.close()  # not where the wait was too long: the kernel may still read its key
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
            "its kernelspec promises curve: upgrade what it starts (ipykernel encrypts from 7.3 on)"
            if self._distribution == "file"
            else "start curve_kernel in its kernelspec, or use key_distribution=file if it can encrypt",
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
        self._release()
        if not restart:
            self._keys = None

    def _set_manager_keys(self) -> Any:
        assert self._keys is not None
        km: Any = self.parent
        km.curve_publickey, km.curve_secretkey = self._keys.public_key, self._keys.secret_key
        km.__class__ = holding_manager(type(km))
        km.client_factory = presenting_client(km.client_factory)
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

"""What a person is told of a kernel on another machine while nobody can ask it."""

from __future__ import annotations

from typing import Any

from jupyter_client.provisioning import KernelProvisionerBase

__all__ = ["tell_loss", "tell_progress"]

# The events by which jupyter_server says how a start went, which labextension/ listens to. Of a schema
# of our own a browser that is connected already would not be told. Its own events have a status.
_EVENTS = "https://events.jupyter.org/jupyter_server/kernel_actions/v1"


def tell_progress(provisioner: KernelProvisionerBase, text: str) -> None:
    """Say what a start waits for, in the log and to the front ends of a server.

    Parameters
    ----------
    provisioner : KernelProvisionerBase
        That of the kernel.
    text : str
        One line.
    """
    provisioner.log.warning("%s", text)
    _emit(provisioner, "start", text)


def tell_loss(provisioner: KernelProvisionerBase, text: str) -> None:
    """Say why a kernel has ended that nobody has ended from here; see `tell_progress`."""
    provisioner.log.error("%s", text)
    _emit(provisioner, "shutdown", text)


def _emit(provisioner: KernelProvisionerBase, action: str, text: str) -> None:
    km: Any = provisioner.parent
    if hasattr(km, "event_logger") and km.kernel_id:
        kernel = {"kernel_id": km.kernel_id, "kernel_name": km.kernel_name}
        km.emit(schema_id=_EVENTS, data={"action": action, "msg": text, **kernel})

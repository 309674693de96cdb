"""``doctor`` on kernelspecs whose kernels speak plaintext, and what closes that."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpec, KernelSpecManager
from jupyter_client.provisioning import KernelProvisionerFactory
from jupyter_core.paths import jupyter_data_dir
from packaging.version import Version

from ..distribution import distribution_for, site_plaintext_kernels
from .findings import PYTHON, Finding, one_line
from .install import replaced_by_stock

__all__ = ["check_plaintext", "install_option"]

_VARIABLE = KernelProvisionerFactory.default_provisioner_name_env
_OURS, _LOCAL = "curve-provisioner", "local-provisioner"
_WAYS = (
    f"export {_VARIABLE}={_OURS}  # for all: in /etc/environment, or where the hub sets its variables",
    f"# or: {PYTHON} -m curve_kernel install --sys-prefix --name {NATIVE_KERNEL_NAME}"
    "  # a reinstalled ipykernel undoes it",
    '# or: c.KernelManager.transport_encryption = "auto"'
    "  # in jupyter_config.py: ipykernel >= 7.3, in programs that read it",
)


def check_plaintext(manager: KernelSpecManager, shown: Mapping[str, str]) -> Iterator[Finding]:
    """Say which of the kernelspecs that are *shown* start in plaintext here, and what closes that."""
    factory = KernelProvisionerFactory.instance()
    default = factory.default_provisioner_name
    if default != _LOCAL and default not in factory.get_provisioner_entries():
        yield Finding(
            "kernelspecs",
            "failure",
            f"${_VARIABLE} names the provisioner {default}, which is not installed here:"
            " kernelspecs that name none do not start",
            f"export {_VARIABLE}={_OURS}",
        )
        return
    unnamed: dict[str, Any] = {}
    plaintext = []
    for name in sorted(shown, key=lambda name: (name != NATIVE_KERNEL_NAME, name)):
        try:
            spec = _read(shown[name])
            provisioner = spec.metadata.get("kernel_provisioner", {}).get("provisioner_name")
        except Exception:  # noqa: BLE001, S112  it has been told of already
            continue
        if not provisioner:
            unnamed[name] = spec
        if (provisioner or default) == _LOCAL and distribution_for(spec) != "env":
            plaintext.append(f"{name} in {shown[name]}")
    if plaintext:
        yield Finding(
            "kernelspecs",
            "warning",
            f"{', '.join(plaintext)} start{'' if plaintext[1:] else 's'} in plaintext: whoever reaches"
            " the ports reads what is printed",
            "\n".join(_WAYS),
        )
    if default == _OURS:
        yield from _by_variable(unnamed)
    for folder in replaced_by_stock(manager):
        yield Finding(
            "kernelspecs",
            "warning",
            f"{folder.name} in {folder} was encrypted by `install --name {folder.name}`, and an upgrade"
            " or a new installation of ipykernel has put its own kernelspec back",
            f"{PYTHON} -m curve_kernel install {install_option(folder)} --name {folder.name}",
        )


def _read(folder: str) -> Any:
    if Path(folder, "kernel.json").exists():
        return KernelSpec.from_resource_dir(folder)
    # Stock's, which jupyter_client makes up where it is installed nowhere.
    native = Version(metadata.version("ipykernel")) >= Version("7.3")
    encryption = {"supported_encryption": ["curve"]} if native else {}
    return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher"], metadata=encryption)


def _by_variable(specs: Mapping[str, Any]) -> Iterator[Finding]:
    """Say what becomes of kernelspecs that name no provisioner."""
    listed = site_plaintext_kernels()
    # A list of the wrong kind allows nobody.
    allowed = {str(name).lower() for name in listed} if isinstance(listed, list) else set()
    encrypted = [name for name, spec in specs.items() if distribution_for(spec)]
    if encrypted:
        message = f"encrypted by ${_VARIABLE}: {', '.join(encrypted)}"
        yield Finding("kernelspecs", "ok", message)
    for name in specs:
        if name in encrypted:
            continue
        if name in allowed:
            yield Finding(
                "kernelspecs",
                "warning",
                f"{name} starts in plaintext: it can't encrypt, and is listed in plaintext_kernels",
                f"# take {one_line(name)} out of plaintext_kernels in jupyter_config.json",
            )
        else:
            message = f"{name} does not start: it can't encrypt, and ${_VARIABLE} asks for it"
            yield Finding("kernelspecs", "ok", message)


def install_option(folder: Path) -> str:
    """Return the option that has `install` replace the kernelspec in *folder*."""
    if folder.is_relative_to(jupyter_data_dir()):
        return "--user"
    if folder.is_relative_to(sys.prefix):
        return "--sys-prefix"
    return f"--prefix {shlex.quote(str(folder.parents[3]))}"

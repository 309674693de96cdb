"""How a kernel takes its keys, seen from its kernelspec: what ``key_distribution = "auto"`` decides."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any, Literal

from traitlets.config import LazyConfigValue

__all__ = ["Distribution", "distribution_for", "how_to_encrypt", "site_plaintext_kernels"]

Distribution = Literal["env", "file"]

# As a word of argv, as a script, and within the text that a wrapper gives to a shell.
_CURVE_KERNEL = re.compile(r"(?:^|/|\s|-m)curve[_-]kernel(?:\s|$)")


def distribution_for(kernel_spec: Any) -> Distribution | None:
    """Return how the kernel of *kernel_spec* takes its keys, None if it takes none.

    This kernel takes its secret key from the environment. Others that advertise ``curve`` read both
    keys from the connection file, as upstream defines it.
    """
    if any(isinstance(word, str) and _CURVE_KERNEL.search(word) for word in kernel_spec.argv):
        return "env"
    advertised = kernel_spec.metadata.get("supported_encryption")
    if isinstance(advertised, str):
        advertised = [advertised]
    if not isinstance(advertised, list):
        return None
    return "file" if "curve" in {str(name).strip().lower() for name in advertised} else None


def how_to_encrypt(name: str, kernel_spec: Any) -> str:
    """Return what its user can do about a kernelspec that says nothing of encryption."""
    allow = (
        f'to allow it in plaintext, an administrator lists "{name}" in'
        " CurveProvisioner.plaintext_kernels in jupyter_config.json"
    )
    if not {"ipykernel", "ipykernel_launcher"} & set(kernel_spec.argv):
        return f"take another kernel; {allow}"
    python = kernel_spec.argv[0]
    if re.fullmatch(r"python[\d.]*", python):
        python = sys.executable
    # Its kernelspec may be older than the ipykernel that it runs.
    return (
        "if its ipykernel is 7.3 or later, write the kernelspec again:"
        f" {shlex.quote(python)} -m ipykernel install --user --name {shlex.quote(name)}; {allow}"
    )


def site_plaintext_kernels() -> list[str]:
    """Return ``CurveProvisioner.plaintext_kernels`` from the files ``jupyter_config.json`` and ``.py``.

    All Jupyter applications read these, in /etc/jupyter for one. nbclient, papermill and others that
    start kernels as libraries read no configuration, and what a site sets once has to hold there too.
    """
    from jupyter_core.application import JupyterApp

    app = JupyterApp()
    app.load_config_file()
    section = app.config.get("CurveProvisioner")
    value = section.get("plaintext_kernels", []) if isinstance(section, dict) else []
    return value.get_value([]) if isinstance(value, LazyConfigValue) else value

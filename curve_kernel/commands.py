"""The commands and the help text, in a module of their own so that both are shown at once.

Importing ipykernel takes most of a second on a slow machine, and neither needs it.
"""

from __future__ import annotations

__all__ = ["COMMANDS", "DESCRIPTION", "help_text"]

DESCRIPTION = """An IPython kernel whose every socket is encrypted (CurveZMQ).

Its key pair comes from $JUPYTER_CURVE_SECRETKEY, $JUPYTER_CURVE_SECRETKEY_FILE or the
connection file; without a connection file it makes its own. There is no plaintext mode."""

COMMANDS = {
    "install": (
        "curve_kernel.cli.install.InstallApp",
        "install the kernelspec: Python 3 (CurveZMQ)",
    ),
    "uninstall": ("curve_kernel.cli.uninstall.UninstallApp", "remove what install and attach made"),
    "keygen": ("curve_kernel.cli.clients.KeygenApp", "make your own client key pair"),
    "authorize": ("curve_kernel.cli.clients.AuthorizeApp", "let a client connect"),
    "revoke": ("curve_kernel.cli.clients.RevokeApp", "take a client off the list"),
    "clients": ("curve_kernel.cli.clients.ClientsApp", "show which clients may connect"),
    "share": ("curve_kernel.cli.share.ShareApp", "share a running kernel: a file to hand over"),
    "attach": ("curve_kernel.cli.attach.AttachApp", "a tile that joins a running kernel"),
    "console": ("curve_kernel.cli.connect.ConsoleApp", "a console on a running kernel"),
    "watch": ("curve_kernel.cli.connect.WatchApp", "watch a running kernel, read-only"),
    "status": ("curve_kernel.cli.status.StatusApp", "show what running kernels really speak"),
    "launch": ("curve_kernel.cli.launch.LaunchApp", "the far half of a kernel on another machine"),
    "doctor": ("curve_kernel.cli.doctor.DoctorApp", "see whether this environment can encrypt"),
}

_OPTIONS = """\
  -f FILE                      the connection file; ports that it does not name are free ones
  --client-authorization=MODE  which clients may connect: any that has the connection file (any, the
                               default) or only those that `clients` shows (allowlist)
  --allowlist                  the same as --client-authorization=allowlist
  --ip=ADDRESS                 the address to listen on; 127.0.0.1 by default
  --log-level=LEVEL            INFO tells of each accepted client too
  --config=FILE                a configuration file
  --help-all                   every option, those of ipykernel and IPython as well
  --version                    the version"""


def help_text() -> str:
    """Return what ``--help`` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""{DESCRIPTION}

usage: python -m curve_kernel [-f FILE] [options]    run a kernel
       python -m curve_kernel COMMAND [options]      see python -m curve_kernel COMMAND --help

commands:
{commands}

options of a kernel:
{_OPTIONS}

examples:
  python -m curve_kernel install           the tile "Python 3 (CurveZMQ)"
  python -m curve_kernel --allowlist       a kernel with a key pair of its own, for listed clients
  python -m curve_kernel -f kernel.json    a kernel with the keys of a connection file"""

"""``python -m curve_kernel`` and ``curve-kernel``: the kernel, or one of its commands."""

import contextlib
import gc
import io
import logging
import os
import sys
from pathlib import Path

from curve_kernel import __version__
from curve_kernel.commands import COMMANDS, help_text


def main() -> None:
    """Run what the command line asks for; Ctrl-C ends what has not begun to handle it."""
    try:
        _main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _main() -> None:
    # Only a kernel waits for ipykernel's import.
    # As ipykernel_launcher does: a notebook's folder must not shadow the modules that start it.
    with contextlib.suppress(FileNotFoundError):  # a working directory that was removed has none
        if sys.path[0] == "" or Path(sys.path[0]) == Path.cwd():
            del sys.path[0]

    # A path may have bytes that are no text. That is no reason to end after the work is done.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")

    words = sys.argv[1:]
    if words[:1] == ["help"]:
        words = [*words[1:], "-h"] if words[1:2] == [] or words[1] in COMMANDS else words[1:]
    options = words[: words.index("--")] if "--" in words else words
    if words and words[0] in COMMANDS:
        _run_command(words[0], words[1:])
    elif "--help-all" in options:
        _run_kernel()
    elif "-h" in options or "--help" in options:
        _print(help_text())
    elif "-V" in options or "--version" in options:
        _print(__version__)
    else:
        sys.argv[1:] = words
        _run_kernel()


def _print(text: str) -> None:
    try:
        print(text, flush=True)  # noqa: T201
    except OSError as error:
        from curve_kernel.errors import fail_to_print

        fail_to_print(error)


def _run_command(name: str, words: list[str]) -> None:
    from traitlets.utils.importstring import import_item

    app = import_item(COMMANDS[name][0]).instance()
    app.initialize(words)
    app.start()


def _run_kernel() -> None:
    _open_closed_descriptors()
    # What is allocated until the kernel is ready stays. Looking through it for garbage, every 700
    # objects, takes a tenth of the time that a start takes.
    threshold, at_start = gc.get_threshold(), 100_000
    gc.set_threshold(at_start)

    from curve_kernel.app import CurveKernelApp

    app = CurveKernelApp.instance()
    try:
        app.initialize()
    except (ImportError, OSError) as error:  # of a class or a file that an option or a file names
        from curve_kernel.errors import CurveKernelError, fail

        if app.log.isEnabledFor(logging.DEBUG):
            raise
        fail(CurveKernelError(str(error), "an option or a configuration file names it; see --debug"))
    if gc.get_threshold()[0] == at_start:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation, without a look at it
        gc.set_threshold(*threshold)
    app.start()


def _open_closed_descriptors() -> None:
    """Open the standard streams that the parent has closed, or a socket would get such a number."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()

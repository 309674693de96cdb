"""``python -m curve_kernel`` and ``curve-kernel``: the kernel, or one of its commands."""

import contextlib
import gc
import io
import sys
from pathlib import Path

from curve_kernel import __version__
from curve_kernel.commands import COMMANDS, help_text


def main() -> None:
    """Run what the command line asks for; only a kernel waits for ipykernel's import."""
    # As ipykernel_launcher does: a notebook's folder must not shadow the modules that start it.
    with contextlib.suppress(FileNotFoundError):  # a working directory that was removed has none
        if sys.path[0] == "" or Path(sys.path[0]) == Path.cwd():
            del sys.path[0]

    # A path may have bytes that are no text. That is no reason to end after the work is done.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")

    words = sys.argv[1:]
    if words[:1] == ["help"]:
        words = [*words[1:], "-h"]
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
    # What is allocated until the kernel is ready stays. Looking through it for garbage, every 700
    # objects, takes a tenth of the time that a start takes.
    threshold, at_start = gc.get_threshold(), 100_000
    gc.set_threshold(at_start)

    from curve_kernel.app import CurveKernelApp

    app = CurveKernelApp.instance()
    app.initialize()
    if gc.get_threshold()[0] == at_start:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation, without a look at it
        gc.set_threshold(*threshold)
    app.start()


if __name__ == "__main__":
    main()

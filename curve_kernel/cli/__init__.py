"""The subcommands of ``python -m curve_kernel``, one module per group."""

from __future__ import annotations

import argparse
import errno
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from traitlets.config import Application

from ..errors import CurveKernelError, fail, fail_to_print, suggest
from ..folders import no_home

__all__ = ["Command", "until_interrupted"]


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class _CommandParser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        try:
            print(self.format_help(), end="", file=file, flush=True)
        except OSError as error:
            fail_to_print(error)

    def error(self, message: str) -> NoReturn:
        fail(CurveKernelError(message, f"see {self.prog} --help"))

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """Leave with what is wrong with the first of *words*, or the option that is probably meant."""
        option = next((word for word in words if word.startswith("-")), "").partition("=")[0]
        hint = f"see {self.prog} --help"
        if not option:
            if "--name" in self._option_string_actions:
                hint = f"did you mean --name {shlex.quote(words[0])}? {hint}"
            fail(CurveKernelError(f"there is a word too many: {words[0]}", hint))
        meant = suggest(option, self._option_string_actions)
        hint = f"did you mean {meant}? {hint}" if meant else hint
        fail(CurveKernelError(f"there is no option {option}", hint))


class Command(Application):
    """A subcommand, in the form in which traitlets starts one, that takes argparse's options.

    ``name`` and ``summary`` say what it is, `add_arguments` takes its options, `run` does the work.
    """

    summary = ""
    passes_on = False
    """Whether options that it does not know are left in ``rest``."""
    rest: list[str]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add this command's options to *parser*."""

    def run(self, options: argparse.Namespace) -> int | None:
        """Do what the command is for.

        Returns
        -------
        int or None
            The exit status; None is success.

        Raises
        ------
        CurveKernelError
            For whatever the user can fix.
        """
        raise NotImplementedError

    def initialize(self, argv: Sequence[str] | None = None) -> None:
        """Parse the words after the command's name."""
        parser = _CommandParser(
            prog=f"python -m curve_kernel {self.name}", description=self.summary, allow_abbrev=False
        )
        self.add_arguments(parser)
        self._options, self.rest = parser.parse_known_args(argv)
        # What stands for a variable that is not set must not do as if nothing were asked for.
        for option in (word.partition("=")[0] for word in argv or ()):
            action = parser._option_string_actions.get(option)
            if action and not action.required and getattr(self._options, action.dest, None) == "":
                parser.error(f"{option} is empty")
        if self.rest and not self.passes_on:
            parser.unknown(self.rest)

    def start(self) -> None:
        """Run the command, and leave with its exit status."""
        try:
            status = self.run(self._options)
            if sys.stdout is not None:
                sys.stdout.flush()
        except CurveKernelError as error:
            fail(error)
        except RuntimeError as error:
            fail(no_home(error))
        except OSError as error:
            where = error.filename
            if where is None and error.errno in (*_FULL, errno.EPIPE, errno.EBADF):
                fail_to_print(error)
            if error.errno in _FULL:
                fail(
                    CurveKernelError(f"{where} can't be written: {error.strerror}", "make room for it")
                )
            if where is None:
                fail(CurveKernelError(str(error) or type(error).__name__))
            hint = "see whether it is yours: `jupyter --paths` shows the folders"
            fail(CurveKernelError(f"{where} can't be used: {error.strerror}", hint))
        except KeyboardInterrupt:
            status = 130
        raise SystemExit(status or 0)


def until_interrupted() -> Iterator[None]:
    """Yield again and again, until Ctrl-C raises KeyboardInterrupt, wherever that was raised.

    Python ignores what is raised in some places, such as a weak reference's callback. The next
    turn raises it then.
    """
    interrupts: list[int] = []

    def interrupt(number: int, _: object) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    while not interrupts:
        yield
    raise KeyboardInterrupt

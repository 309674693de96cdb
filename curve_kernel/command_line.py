"""The command line and the configuration files of the application: what has no effect is an error."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from functools import cached_property
from typing import Any

from IPython.core.application import BaseIPythonApplication
from traitlets import TraitError
from traitlets.config import Config
from traitlets.utils import filefind

from .errors import CurveKernelError, fail, suggest
from .options import JSONConfigFile, OptionLoader, Options, PyConfigFile

__all__ = ["StrictApplication"]


class StrictApplication(BaseIPythonApplication):
    """An application that ends with an error where traitlets passes over an option or a word."""

    python_config_loader_class = PyConfigFile
    json_config_loader_class = JSONConfigFile
    connection_file: Any

    @cached_property
    def _options(self) -> Options:
        ours = [cls for cls in type(self).mro() if issubclass(cls, StrictApplication)]
        return Options(self, ours[-2])  # the last is this class

    def parse_command_line(self, argv: list[str] | None = None) -> None:
        """Parse the command line; a word that is neither an option nor a command is an error.

        With a connection file there is a launcher, and some hand down words of their own (`jupyter run
        FILE`), which upstream passes over.
        """
        words = sys.argv[1:] if argv is None else argv
        if words and not words[0].startswith("-") and words[0] not in {*self.subcommands, "help"}:
            raise self._no_command(words[0])
        super().parse_command_line(argv)
        if self.subapp is None and self.extra_args and not self.connection_file:
            raise self._no_command(self.extra_args[0])

    def _no_command(self, word: str) -> CurveKernelError:
        meant = suggest(word, self.subcommands)
        if word.endswith(".json"):
            meant = f"-f {shlex.quote(word)}"
        hint = "see python -m curve_kernel --help"
        return CurveKernelError(
            f"no such command: {word}",
            f"did you mean python -m curve_kernel {meant}? {hint}" if meant else hint,
        )

    def _create_loader(self, *args: Any, **kwargs: Any) -> OptionLoader:
        kwargs = {"log": self.log, "subcommands": self.subcommands, **kwargs}
        return OptionLoader(self._options, *args, **kwargs)

    def update_config(self, config: Config) -> None:
        """Take in *config*, or leave if it has a value that an option of the application can't take."""
        try:
            super().update_config(config)
        except TraitError as error:
            fail(CurveKernelError(str(error).rstrip("."), "see python -m curve_kernel --help-all"))

    def load_config_file(self, *args: Any, **kwargs: Any) -> None:
        """Load the configuration files; the file that the command line names must be there."""
        super().load_config_file(*args, **kwargs)
        if self.extra_config_file:
            name = os.path.splitext(self.extra_config_file)[0]  # noqa: PTH122, as upstream does
            for ending in (".py", ".json"):
                with contextlib.suppress(OSError):
                    filefind(name + ending, self.config_file_paths)
                    return
            raise CurveKernelError(
                f"there is no configuration file {name}.py or {name}.json",
                "name one that is there, or leave out the option config",
            )

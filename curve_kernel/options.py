"""Options that have no effect are errors: a kernel is never more open than its user asked for.

Traitlets passes over an option, class or trait that it does not know, with a warning at most. Here:

- On the command line, an unknown option, class or trait is an error. Classes of extensions and of the
  kernel's class are known once they are imported, so a class that is not known yet is looked for again
  after the configuration files are read and the extensions imported, before any port is open.
- In a configuration file, which other programs read too, only what looks like an option of this kernel
  is an error: an unknown trait of its application, a misspelt class or trait, a trait in a wrong class.
  So is a file that fails to load, if it has such an option.
- Further words belong to the launcher (``jupyter run FILE``), unless they look like such an option.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from IPython.core.application import ProfileAwareConfigLoader
from traitlets.config import Application, Config, Configurable
from traitlets.config.loader import (
    ArgumentError,
    ConfigFileNotFound,
    JSONFileConfigLoader,
    KVArgParseConfigLoader,
    class_trait_opt_pattern,
)

from .errors import CurveKernelError, fail, suggest

__all__ = ["JSONConfigFile", "OptionLoader", "Options", "PyConfigFile"]

_HELP = "see python -m curve_kernel --help-all"
# What a text program makes of the two hyphens of an option that is copied from it.
_DASHES = "-\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"
# What stands for a variable that is not set must not do as if nothing were asked for.
_NEVER_EMPTY = {"audit_log", "authorized_clients", "config", "extra_config_file"}
_NEVER_EMPTY |= {"connection_file", "f"}
_NAMES_ACCESS_OPTIONS = re.compile(r"CurveKernelApp|client_authorization|authorized_clients|owner_keys")
# Classes that IPython or ipykernel imports only after the ports are open, or not at all in a kernel.
_LATE_CLASSES = {
    "AutoreloadMagics": "IPython.extensions.autoreload",
    "InlineBackend": "matplotlib_inline.config",  # can't be imported without matplotlib
    "LoggingMagics": "IPython.core.magics.logging",
    "OSMagics": "IPython.core.magics.osm",
    "ScriptMagics": "IPython.core.magics.script",
    "StoreMagics": "IPython.extensions.storemagic",
    "TerminalInteractiveShell": "IPython.terminal.interactiveshell",
    "TerminalIPythonApp": "IPython.terminal.ipapp",
}


def _unknown(name: str, meant: str | None, where: str = "") -> CurveKernelError:
    hint = f"did you mean {meant}? {where or _HELP}" if meant else where or _HELP
    return CurveKernelError(f"there is no option {name}", hint)


class Options:
    """The options of one application, and what is wrong with those that were given.

    Parameters
    ----------
    app : Application
        The application.
    base : type
        The class of it, or a base of that, with the options that must never be passed over.
    """

    def __init__(self, app: Application, base: type[Application]) -> None:
        self._app, self._base, self._class = app, base, type(app)
        self._traits = set(self._class.class_trait_names(config=True))
        self._sections = set(self._class.section_names())
        own = [cls for cls in self._class.mro() if issubclass(cls, base)]
        self._own_sections = {cls.__name__ for cls in own}
        self._own = {name for cls in own for name in cls.class_own_traits(config=True)}

    def check_words(self, words: Sequence[str], known: Iterable[str]) -> None:
        """Check the options among *words*, as far as that can be done before anything is loaded.

        Parameters
        ----------
        words : sequence of str
            The command line.
        known : iterable of str
            Its aliases and flags.
        """
        names = {f"--{name}" for name in known} | {f"-{name}" for name in known if len(name) == 1}
        for option in _options(words):
            *sections, trait = option.lstrip("-").split(".")
            # As in -c1+1 and -f/tmp/kernel.json; other words with one hyphen traitlets passes over.
            attached = option[:2] in names and not class_trait_opt_pattern.match(option)
            if option in names or attached:
                continue
            if sections:
                self._check_path(sections, trait, late=False)
                continue
            meant = suggest(trait, self._own)
            raise _unknown(option, self._as_option(meant) if meant else suggest(option, names))

    def check_late(self, words: Sequence[str], app: Any) -> None:
        """Check the options among *words* again, now that the configuration is loaded."""
        paths = [
            option.lstrip("-").split(".")
            for option in _options(words)
            if "." in option and (option.startswith("--") or class_trait_opt_pattern.match(option))
        ]
        if all(self._has_effect(sections, trait) for *sections, trait in paths):
            return
        app.init_path()  # an extension may lie in the current folder
        for module in (*_LATE_CLASSES.values(), *app.extensions, *app.extra_extensions):
            with contextlib.suppress(Exception):  # IPython will say why it can't be loaded
                importlib.import_module(module)
        for *sections, trait in paths:
            self._check_path(sections, trait, late=True)

    def check_further(self, words: Iterable[str]) -> None:
        """Check the words that are no options of this application."""
        names = {*self._own, "allowlist"}
        for word in words:
            name = word.partition("=")[0]
            if word[:1] in _DASHES or "=" in word:
                meant = suggest(name.rpartition(".")[2].lstrip(_DASHES), names)
            else:
                meant = suggest(word, names, 1.0)
            if meant:
                raise _unknown(name, self._as_option(meant))

    def check_config(self, config: Config, files: Sequence[str]) -> None:
        """Look at what the configuration files say."""
        where = f"it is in {' or '.join(files)}" if files else _HELP
        for path in _paths(config):
            *sections, trait = path
            name = ".".join(path)
            if self._has_effect(sections, trait):
                continue
            if len(sections) == 1 and sections[0] in self._sections:
                meant = suggest(trait, self._own)
                if meant or sections[0] in self._own_sections:
                    meant = meant or suggest(trait, self._traits)
                    raise _unknown(name, meant and f"{self._class.__name__}.{meant}", where)
                continue
            for section in sections:
                if section not in _classes() and suggest(section, self._own_sections, 0.8):
                    raise _unknown(name, f"{self._class.__name__}.{trait}", where)
            if meant := suggest(trait, self._own, 0.85):
                raise _unknown(name, f"{self._class.__name__}.{meant}", where)

    def _check_path(self, sections: list[str], trait: str, *, late: bool) -> None:
        # Another class may still be loaded.
        wait = not late and not (len(sections) == 1 and sections[0] in self._sections)
        if wait or self._has_effect(sections, trait):
            return
        name = "--" + ".".join([*sections, trait])
        if meant := suggest(trait, self._own):
            raise _unknown(name, self._as_option(meant))
        classes = _classes()
        if sections[-1] in _LATE_CLASSES and sections[-1] not in classes:
            return  # it is not installed
        section = suggest(sections[-1], classes) or ""
        traits = {name for cls in classes.get(section, ()) for name in _config_traits(cls)}
        closest = suggest(trait, traits)
        raise _unknown(name, closest and f"--{section}.{closest}")

    def _has_effect(self, sections: list[str], trait: str) -> bool:
        ours = len(sections) == 1 and sections[0] in self._sections
        return (ours and trait in self._traits) or self._taken_by_a_class(sections, trait)

    def _taken_by_a_class(self, sections: list[str], trait: str) -> bool:
        """Whether a class has that trait, so that it takes effect where there is an object of it."""
        classes = _classes()
        if not sections or any(section not in classes for section in sections):
            return False
        # An application has no parent, so nothing stands before it.
        return any(
            trait in _config_traits(cls)
            for parent in classes[sections[-1]]
            for cls in _with_subclasses(parent)
            if not issubclass(self._class, cls) and not issubclass(cls, self._base)
        )

    def _as_option(self, name: str) -> str:
        for word in (*self._app.aliases, *self._app.flags):
            if isinstance(word, str) and suggest(word, [name], 1.0):
                return f"--{word}"
        return f"--{self._class.__name__}.{name}"


def _check_values(words: Sequence[str]) -> None:
    for word, following in zip(words, [*words[1:], None], strict=False):
        if word == "--":
            return
        option, equals, value = word.partition("=")
        is_empty = not value if equals else following == ""
        if option[:1] == "-" and is_empty and option.lstrip("-").rpartition(".")[2] in _NEVER_EMPTY:
            raise CurveKernelError(f"{option} is empty", "give it a value, or leave it out")


def _options(words: Sequence[str]) -> Iterator[str]:
    """Yield the names of options, as argparse sees them."""
    for word in words:
        if word == "--":
            return
        name = word.partition("=")[0]
        if len(word) > 1 and word[0] == "-" and " " not in name and not re.match(r"-\d", word):
            yield name


def _paths(config: Config, *sections: str) -> Iterator[list[str]]:
    for name, value in config.items():
        if isinstance(value, Config):
            yield from _paths(value, *sections, name)
        else:
            yield [*sections, name]


def _with_subclasses(cls: type[Configurable]) -> Iterator[type[Configurable]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _classes() -> dict[str, list[type[Configurable]]]:
    """Return the classes that are loaded and have options, by name."""
    found: dict[str, list[type[Configurable]]] = {}
    for cls in _with_subclasses(Configurable):
        found.setdefault(cls.__name__, []).append(cls)
    return found


def _config_traits(cls: type[Configurable]) -> list[str]:
    return cls.class_trait_names(config=True)


_StockParser: Any = KVArgParseConfigLoader.parser_class


class _Parser(_StockParser):
    def error(self, message: str) -> NoReturn:
        # argparse would quote what was given.
        message = re.sub(r"ignored explicit argument .*", "it takes no value", message)
        raise CurveKernelError(message.removeprefix("argument ").partition("=")[0], _HELP)


class OptionLoader(KVArgParseConfigLoader):
    """Traitlets' own loader of the command line, which takes only what there is.

    Parameters
    ----------
    options : Options
        What there is.
    *args, **kwargs
        As traitlets gives them.
    """

    parser_class = _Parser

    def __init__(self, options: Options, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = options

    def load_config(self, *args: Any, **kwargs: Any) -> Config:
        """Parse the command line.

        Raises
        ------
        CurveKernelError
            If there is a word in it that would have no effect.
        """
        names = [*self.aliases, *self.flags]
        known = [name for alias in names for name in (alias if isinstance(alias, tuple) else (alias,))]
        _check_values(self.argv)
        self._options.check_words(self.argv, known)
        try:
            config = super().load_config(*args, **kwargs)
        except ArgumentError as error:
            named = re.match(r"Error loading argument ([\w.]+)=", str(error))
            raise CurveKernelError(
                f"--{named[1]}: {error.__cause__}" if named else str(error), _HELP
            ) from None
        self._options.check_further(self.extra_args)
        return config


class PyConfigFile(ProfileAwareConfigLoader):
    """A configuration file in Python, read to its end if it says which clients may connect.

    Traitlets logs the error, and goes on without the file.
    """

    def load_config(self) -> Config:
        """Load the file."""
        with _read_to_its_end(self):
            return super().load_config()


class JSONConfigFile(JSONFileConfigLoader):
    """A configuration file in JSON, read to its end if it says which clients may connect."""

    def load_config(self) -> Config:
        """Load the file."""
        with _read_to_its_end(self):
            return super().load_config()


@contextlib.contextmanager
def _read_to_its_end(loader: PyConfigFile | JSONConfigFile) -> Iterator[None]:
    try:
        yield
    except ConfigFileNotFound:
        raise
    except Exception as error:
        path = Path(loader.full_filename)
        try:
            unrelated = not _NAMES_ACCESS_OPTIONS.search(path.read_text(errors="replace"))
        except OSError:
            unrelated = False
        if unrelated:
            raise
        # Not raised, since IPython passes over errors if $IPYTHON_SUPPRESS_CONFIG_ERRORS is set.
        fail(
            CurveKernelError(
                f"configuration file {path} can't be read to its end: {type(error).__name__}: {error}",
                "correct it, or take the options of CurveKernelApp out of it",
            )
        )

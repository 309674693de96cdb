"""debugpy, imported only when somebody debugs.

It is a fifth of what a kernel imports, and most kernels are never debugged.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from subprocess import Popen
from typing import Any

from ..upstream import replaced


@contextmanager
def _without_debugpy() -> Iterator[None]:
    """Let a first ``import debugpy`` fail, for which ipykernel's debugger is prepared."""
    if "debugpy" in sys.modules or "pydevd" in sys.modules:
        yield
        return
    sys.modules["debugpy"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["debugpy"]


with _without_debugpy():
    from ipykernel import debugger

__all__ = ["debugger", "find_debugpy", "import_debugpy"]

# What `_AdapterStream.listen` is made of, in files of the package debugpy.
_NEEDED = {
    "server/api.py": ("_settrace", "_starts_debugging", "listen"),
    "_vendored/pydevd/pydevd.py": ("start_client",),
}

# debugpy as it was found when the kernel started: a notebook's folder must not shadow it later.
_found: ModuleSpec | None = None


def find_debugpy() -> bool:
    """Tell whether debugpy is installed, and import it if somebody has imported a part of it already.

    Raises
    ------
    ImportError
        If it is of a version that would open a port.
    """
    global _found
    _found = importlib.util.find_spec("debugpy")
    if _found is None or not _found.submodule_search_locations:
        return False
    if "pydevd" in sys.modules:
        import_debugpy()
    elif _looks_as_needed(_found.submodule_search_locations[0]):
        sys.breakpointhook = _ignore_breakpoint
    else:
        raise ImportError(_unknown())
    return True


def import_debugpy() -> list[str]:
    """Import of debugpy what ipykernel's debugger takes from it; return the files of debugpy's modules.

    Raises
    ------
    ImportError
        If something is missing of it, or of what `_AdapterStream.listen` takes.
    """
    hook = sys.breakpointhook
    try:
        if "debugpy" not in sys.modules and _found is not None and _found.loader is not None:
            package = sys.modules["debugpy"] = importlib.util.module_from_spec(_found)
            try:
                _found.loader.exec_module(package)
            except BaseException:
                del sys.modules["debugpy"]  # as an import does
                raise
        # First, since it makes the others importable. It starts `uname`, and code in a cell may have
        # patched what it does so with.
        with replaced(subprocess, Popen=Popen):
            api = importlib.import_module("debugpy.server.api")
    finally:
        if hook is not _ignore_breakpoint:
            sys.breakpointhook = hook
    pydevd = importlib.import_module("pydevd")
    frames = importlib.import_module("_pydevd_bundle.pydevd_suspended_frames")
    modules = {"server/api.py": api, "_vendored/pydevd/pydevd.py": pydevd}
    if not all(hasattr(modules[file], name) for file, names in _NEEDED.items() for name in names):
        raise ImportError(_unknown())
    vars(debugger).update(
        pydevd_frame_utils=importlib.import_module("_pydevd_bundle.pydevd_frame_utils"),
        SuspendedFramesManager=frames.SuspendedFramesManager,
        _FramesTracker=frames._FramesTracker,
    )
    folder = f"{sys.modules['debugpy'].__path__[0]}{os.sep}"
    # Not getattr: a module may import more, or fail, when it is asked for a name.
    files = [getattr(module, "__dict__", {}).get("__file__") for module in sys.modules.copy().values()]
    return [file for file in files if isinstance(file, str) and file.startswith(folder)]


def _ignore_breakpoint(*_args: Any, **_kwargs: Any) -> None:
    """Do what debugpy's ``sys.breakpointhook`` does while no debugger is active."""


def _unknown() -> str:
    version = importlib.metadata.version("debugpy")
    return f"debugpy {version} would open a port without encryption, and no way to prevent it is known"


def _looks_as_needed(folder: str) -> bool:
    """Tell, without importing debugpy, whether `import_debugpy` will find what it needs."""
    texts = {file: Path(folder, file).read_text("utf-8") for file in _NEEDED}
    return all(name in texts[file] for file, names in _NEEDED.items() for name in names)

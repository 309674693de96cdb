"""What a version of ipykernel, jupyter_client or another package lacks that is used and not public."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
from pathlib import Path

import debugpy.server.api  # noqa: F401  makes pydevd importable
import pytest
from packaging.specifiers import SpecifierSet

import curve_kernel
from curve_kernel.upstream import PRIVATE_NAMES, SEEN

PACKAGE = Path(curve_kernel.__file__).parent
LISTED = {
    name.rpartition(":")[2].rpartition(".")[2] for names in PRIVATE_NAMES.values() for name in names
}
# Of the standard library.
LIBRARY = {"_exit", "_option_string_actions", "_replace"}


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "curve_kernel"


@pytest.mark.parametrize(
    ("distribution", "name", "versions"),
    [
        pytest.param(distribution, name, versions, id=name)
        for distribution, names in PRIVATE_NAMES.items()
        for name, versions in names.items()
    ],
)
def test_the_installed_version_has(distribution: str, name: str, versions: str) -> None:
    version = importlib.metadata.version(distribution)
    if not SpecifierSet(versions).contains(version, prereleases=True):
        pytest.skip(f"{distribution} {version} does not need it")
    module_name, _, path = name.partition(":")
    owner, _, attribute = path.rpartition(".")
    found = module = importlib.import_module(module_name)
    if owner:
        found = getattr(module, owner)
    # An attribute of instances only is looked for in the source of the class and its bases.
    if not hasattr(found, attribute):
        assert inspect.isclass(found), f"{distribution} {version} has no {name}"
        bases = [base for base in found.__mro__ if base is not object]
        sources = [inspect.getsource(base) for base in bases]
        assert any(f"self.{attribute}" in source for source in sources), (
            f"{distribution} {version} has no {name}; it was seen in {SEEN[distribution]}"
        )


def test_private_names_that_are_used_are_in_the_table() -> None:
    trees = [ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")]
    ours: set[str] = set()
    used: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                ours.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                ours.add(name)
            case ast.Attribute(attr=name) if name.startswith("_") and not name.startswith("__"):
                used.add(name)
    assert used - ours - LIBRARY - LISTED == set()


def test_private_names_that_are_overridden_are_in_the_table() -> None:
    overridden = set()
    for module_info in pkgutil.walk_packages(curve_kernel.__path__, "curve_kernel."):
        module = importlib.import_module(module_info.name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or not is_ours(cls.__module__):
                continue
            functions = {name for name, value in vars(cls).items() if inspect.isfunction(value)}
            for base in cls.__mro__[1:]:
                if not is_ours(base.__module__) and base.__module__ not in sys.stdlib_module_names:
                    overridden |= functions & vars(base).keys()
    private = {name for name in overridden if name.startswith("_") and not name.startswith("__")}
    assert private - LISTED == set()

"""The layout of the package: what may import what, and how large a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import curve_kernel

PACKAGE = Path(curve_kernel.__file__).parent
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
    if file.parent != PACKAGE or file.stem != "__init__"
}
# What each room may import besides itself, and besides the modules below all rooms.
ROOMS = {
    "keys": set(),
    "access": {"keys"},
    "client": {"keys"},
    "launch": {"keys", "client", "access"},
    "debugger": set(),
    "cli": {"keys", "client", "access.allowlist", "launch"},
}
HEART = ("app", "access.gate", "sockets", "heartbeat")


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, at its top or later."""
    package = ["curve_kernel", *name.split(".")]
    if FILES[name].stem != "__init__":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner.removeprefix("curve_kernel.") in FILES else module)
    ours = {
        module.removeprefix("curve_kernel.") for module in found if module.startswith("curve_kernel.")
    }
    return ours & FILES.keys()


IMPORTS = {name: imports_of(name) for name in FILES}


def test_imports_are_seen() -> None:
    assert {"access.gate", "launch.ports", "magics"} <= IMPORTS["app"]
    assert IMPORTS["keys.pair"] == {"errors"}


def test_no_circle() -> None:
    # The rest is what is on a circle, or imports what is on one.
    rest = {name: set(imports) for name, imports in IMPORTS.items()}
    while free := {name for name, imports in rest.items() if not imports & rest.keys()}:
        for name in free:
            del rest[name]
    assert rest == {}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_nothing_above_it(room: str) -> None:
    allowed = {room, *ROOMS[room]}
    single = {name for name in FILES if "." not in name and name not in ROOMS}
    below = {name for name in single if not reaches(name, {*ROOMS} - {"keys"})}
    for name in FILES:
        if name.partition(".")[0] == room:
            for module in IMPORTS[name] - below:
                assert module in allowed or module.partition(".")[0] in allowed, f"{name} -> {module}"


def reaches(name: str, rooms: set[str]) -> bool:
    return any(module.partition(".")[0] in rooms or reaches(module, rooms) for module in IMPORTS[name])


def test_nothing_imports_the_command_line() -> None:
    importers = {
        name
        for name, modules in IMPORTS.items()
        if any(module.partition(".")[0] == "cli" for module in modules)
    }
    assert {name for name in importers if name.partition(".")[0] != "cli"} == set()


def lines(name: str) -> int:
    return len(FILES[name].read_text().splitlines())


def test_no_file_above_400_lines() -> None:
    assert {name: lines(name) for name in FILES if lines(name) > 400} == {}


def test_the_heart_is_small() -> None:
    assert sum(map(lines, HEART)) <= 750

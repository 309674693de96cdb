"""`os` with its `os.path`, whatever code in a cell makes of them.

A name that is bound at import is not enough: `os.path.realpath` looks `os.lstat` up at each call.
"""

from __future__ import annotations

import genericpath
import os as _os
import posixpath
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["os"]


def _copy(*modules: ModuleType, **names: Any) -> ModuleType:
    """Return one module of all *modules*, whose functions find *names* and each other there."""
    copy = ModuleType(modules[-1].__name__)
    for module in modules:
        vars(copy).update(vars(module))
    vars(copy).update(names)
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and value.__globals__ is vars(module):
                made = FunctionType(
                    value.__code__, vars(copy), name, value.__defaults__, value.__closure__
                )
                made.__kwdefaults__ = value.__kwdefaults__
                setattr(copy, name, made)
    return copy


if TYPE_CHECKING:
    import os
else:
    os = _copy(_os)
    os.path = _copy(genericpath, posixpath, os=os, genericpath=_copy(genericpath, os=os))

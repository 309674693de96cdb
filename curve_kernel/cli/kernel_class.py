"""``install --kernel-class``: the class, and its language."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traitlets.utils.importstring import import_item

from ..errors import CurveKernelError

if TYPE_CHECKING:
    from ipykernel.kernelbase import Kernel

__all__ = ["import_kernel", "language_of"]


def language_of(kernel: type[Kernel]) -> str:
    """Return the language of a kernel class, lower case."""
    info = getattr(kernel, "language_info", None)
    name = info.get("name") if isinstance(info, dict) else None
    return str(name or getattr(kernel, "language", None) or "python").lower()


def import_kernel(name: str) -> type[Kernel]:
    """Return the kernel class that is called *name*.

    Raises
    ------
    CurveKernelError
        If it can't be imported, or is not a kernel class.
    """
    from ipykernel.kernelbase import Kernel

    hint = "name a class as package.module.Class, of a package that is installed here"
    try:
        kernel = import_item(name)
    except Exception as error:  # noqa: BLE001  importing runs any package's code
        reason = f"{type(error).__name__}: {error}"
        raise CurveKernelError(f"kernel class {name} can't be imported: {reason}", hint) from None
    if not (isinstance(kernel, type) and issubclass(kernel, Kernel)):
        raise CurveKernelError(f"{name} is not an ipykernel Kernel class", hint)
    return kernel

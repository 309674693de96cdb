"""Key pairs: the kernel's own, and those of its clients."""

from .pair import KeyPair, parse, require_curve

__all__ = ["KeyPair", "parse", "require_curve"]

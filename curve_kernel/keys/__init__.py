"""Key pairs: the kernel's own, and those of its clients."""

from .pair import KeyPair, as_hex, parse, parse_public, require_curve

__all__ = ["KeyPair", "as_hex", "parse", "parse_public", "require_curve"]

"""A CURVE key pair: generate, parse, derive."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import SimpleNamespace

import zmq
from zmq.utils import z85

from ..errors import CurveKernelError

__all__ = ["KeyPair", "as_hex", "parse", "parse_public", "require_curve"]

# pyzmq looks there for each key, also for the key of a client that connects, and code in a cell may
# replace what `struct` holds.
_StructError = struct.error
vars(z85)["struct"] = SimpleNamespace(pack=struct.pack, unpack=struct.unpack)

_FORM = "a CURVE key is 40 characters of Z85: letters, digits and .-:+=^!/*?&<>()[]{}@%$#"


def require_curve() -> None:
    """Make sure that this libzmq can encrypt.

    Raises
    ------
    CurveKernelError
        If it was built without CURVE.
    """
    if not zmq.has("curve"):
        raise CurveKernelError(
            f"libzmq {zmq.zmq_version()} is built without CURVE, so nothing can be encrypted",
            "install a pyzmq that has it: python -m pip install --force-reinstall pyzmq",
        )


def parse(value: object, where: str) -> bytes:
    """Check that *value* is a CURVE key as text.

    Parameters
    ----------
    value : object
        What was given: a str or bytes of 40 Z85 characters, if it is good.
    where : str
        What it was given as, for the message. The value itself is never in the message, since it
        may be a secret key that lacks a character.

    Returns
    -------
    bytes
        The key, 40 bytes of Z85 (https://rfc.zeromq.org/spec/32/).

    Raises
    ------
    CurveKernelError
        If it is anything else.
    """
    if not isinstance(value, (str, bytes)):
        found = "null" if value is None else f"of type {type(value).__name__}"
        raise CurveKernelError(f"{where} is {found}, not a key", _FORM)
    if len(value) != 40:
        raise CurveKernelError(f"{where} has {len(value)} characters, not 40", _FORM)
    text = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    try:
        z85.decode(text)
    except (KeyError, ValueError, _StructError):  # no digit of Z85, or five that exceed 32 bits
        raise CurveKernelError(f"{where} is not Z85 text", _FORM) from None
    return text


def parse_public(text: str, where: str) -> bytes:
    """Check a public key in hexadecimal, 64 digits, or in Z85, and return it in Z85.

    Z85 is full of characters that a shell takes for its own, hence hexadecimal on command lines.

    Raises
    ------
    CurveKernelError
        If it is neither.
    """
    if len(text) == 64:
        try:
            return z85.encode(bytes.fromhex(text))
        except ValueError:
            raise CurveKernelError(f"{where} is not hexadecimal", _FORM) from None
    return parse(text, where)


def as_hex(public_key: bytes) -> str:
    """Return a public key, 40 bytes of Z85, in hexadecimal."""
    return z85.decode(public_key).hex()


@dataclass(frozen=True, repr=False)
class KeyPair:
    """A CURVE key pair, whose ``repr`` never shows the secret.

    Both keys are 40 bytes of Z85. ``KeyPair.generate()`` makes a fresh pair and
    ``KeyPair.from_secret(key)`` derives the public half.
    """

    public_key: bytes
    secret_key: bytes

    def __repr__(self) -> str:
        return f"KeyPair(public_key={self.public_key!r}, secret_key=<hidden>)"

    @classmethod
    def generate(cls) -> KeyPair:
        """Make a fresh pair with libzmq's own generator."""
        return cls(*zmq.curve_keypair())

    @classmethod
    def from_secret(cls, secret_key: bytes) -> KeyPair:
        """Derive the pair from a secret key, 40 bytes of Z85 that `parse` has checked."""
        return cls(zmq.curve_public(secret_key), secret_key)

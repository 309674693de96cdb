"""Run a command in a sandbox, as systemd does it: ``python sandbox.py NAMES COMMAND...``.

NAMES, with commas between them, are system calls that fail with EPERM: setrlimit, getrlimit, chmod.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001
# prlimit64 is what glibc calls for both; it sets if its third argument is not NULL.
_NUMBERS = {
    "x86_64": {"prlimit64": 302, "setrlimit": [160], "getrlimit": [97], "chmod": [90, 91, 268, 452]},
    "aarch64": {"prlimit64": 261, "setrlimit": [164], "getrlimit": [163], "chmod": [52, 53, 452]},
}


def works_here() -> bool:
    return sys.platform == "linux" and platform.machine() in _NUMBERS


def _statement(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def deny(names: list[str]) -> None:
    numbers = _NUMBERS[platform.machine()]
    program = []
    for name in names:
        for number in numbers[name]:
            program += [
                _statement(_LOAD, 0),
                _statement(_EQUALS, number, 0, 1),
                _statement(_RETURN, _EPERM),
            ]
    if "getrlimit" in names:
        program += [_statement(_LOAD, 0), _statement(_EQUALS, numbers["prlimit64"], 0, 1)]
        program += [_statement(_RETURN, _EPERM)]
    elif "setrlimit" in names:
        program += [_statement(_LOAD, 0), _statement(_EQUALS, numbers["prlimit64"], 0, 5)]
        # The lower and the upper half of the third argument.
        program += [_statement(_LOAD, 32), _statement(_EQUALS, 0, 0, 2)]
        program += [_statement(_LOAD, 36), _statement(_EQUALS, 0, 1, 0), _statement(_RETURN, _EPERM)]
    program.append(_statement(_RETURN, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _MODE_FILTER, filter_
    ):
        raise OSError(ctypes.get_errno(), "no seccomp here")


if __name__ == "__main__":
    deny(sys.argv[1].split(","))
    os.execv(sys.argv[2], sys.argv[2:])

"""A kernel whose user code has patched the modules that the kernel uses too.

tests/hostile has each patch alone, beside stock.
"""

from __future__ import annotations

from pathlib import Path

from patches import PATCHES, patched_kernel_goes_on
from support import started

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate


def test_everything_is_patched(folder: Path) -> None:
    owner = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    with started("python3-curve") as (km, client):
        patched_kernel_goes_on(km, client, list(PATCHES), owner)

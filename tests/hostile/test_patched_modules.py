"""Kernels whose user code has patched the modules that the kernel uses too."""

from __future__ import annotations

from pathlib import Path

import pytest
from patches import PATCHES, patched_kernel_goes_on
from support import started

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate


@pytest.mark.parametrize("patch", PATCHES)
def test_patched(patch: str, folder: Path) -> None:
    """A further client, a fork that prints, the kernel's end go on, and strangers are counted."""
    owner = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    with started("python3-curve") as (km, client):
        patched_kernel_goes_on(km, client, [patch], owner)

"""Kernels whose user code has patched the modules that the kernel uses too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from patches import PATCHES, what_goes_on
from support import started
from victim import figure

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate


@pytest.mark.parametrize("patch", PATCHES)
def test_patched(patch: str, folder: Path) -> None:
    """A further client, a fork that prints, the kernel's end go on, and strangers are counted."""
    owner = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    with started("python3-curve") as (km, client):
        found = what_goes_on(km, client, [patch], owner)
    figure(patch, "python3-curve", **found)
    seconds = found.pop("its end")
    assert found == dict.fromkeys(found, True)
    assert isinstance(seconds, float), seconds


@pytest.mark.skipif(
    "CURVE_KERNEL_STOCK" not in os.environ, reason="for the table beside: set CURVE_KERNEL_STOCK"
)
@pytest.mark.parametrize("patch", PATCHES)
def test_patched_stock(patch: str) -> None:
    """Nothing is asserted of stock; what it does is told beside."""
    with started("python3") as (km, client):
        figure(patch, "stock", **what_goes_on(km, client, [patch], KeyPair.generate()))

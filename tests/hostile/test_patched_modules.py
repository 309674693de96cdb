"""Kernels whose user code has patched the modules that the kernel uses too, each beside stock."""

from __future__ import annotations

from pathlib import Path

import pytest
from patches import PATCHES, patched_kernel_goes_on
from support import started

from curve_kernel.keys import KeyPair
from curve_kernel.keys.certificates import write_certificate


@pytest.mark.parametrize("kernel", ["python3-curve", "python3"])
@pytest.mark.parametrize("patch", PATCHES)
def test_patched(patch: str, kernel: str, folder: Path) -> None:
    """Whatever is patched, what stock does goes on, and strangers are counted."""
    owner = KeyPair.generate()
    write_certificate(folder / "owners" / "olga.key", owner.public_key)
    stock = {"transport_encryption": "disabled"} if kernel == "python3" else {}
    with started(kernel, **stock) as (km, client):
        patched_kernel_goes_on(km, client, [patch], owner)

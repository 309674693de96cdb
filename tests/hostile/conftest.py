from __future__ import annotations

from collections.abc import Iterator

import pytest
from victim import Victim, victim


@pytest.fixture
def kernel() -> Iterator[Victim]:
    with victim() as one:
        yield one
        one.works()

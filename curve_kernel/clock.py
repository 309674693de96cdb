"""The clock, whatever code in a cell makes of `time`.

A name that is bound at import is not enough: freezegun looks through all modules for what is
`time.monotonic`, and replaces it.
"""

from __future__ import annotations

import time as _time
from functools import partial

__all__ = ["clock_gettime", "monotonic", "sleep", "time"]

clock_gettime = partial(_time.clock_gettime)
monotonic = partial(_time.monotonic)
sleep = partial(_time.sleep)
time = partial(_time.time)

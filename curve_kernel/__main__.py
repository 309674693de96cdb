"""``python -m curve_kernel``: the kernel, or one of its subcommands."""

import gc
import sys
from pathlib import Path

if __name__ == "__main__":
    # As ipykernel_launcher does: a notebook's folder must not shadow the modules that start it.
    if sys.path[0] == "" or Path(sys.path[0]) == Path.cwd():
        del sys.path[0]

    # What is allocated until the kernel is ready stays. Looking through it for garbage, every 700
    # objects, takes a tenth of the time that a start takes.
    threshold, at_start = gc.get_threshold(), 100_000
    gc.set_threshold(at_start)

    from curve_kernel.app import CurveKernelApp

    app = CurveKernelApp.instance()
    app.initialize()
    if gc.get_threshold()[0] == at_start:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation, without a look at it
        gc.set_threshold(*threshold)
    app.start()

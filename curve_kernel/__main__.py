"""``python -m curve_kernel``: the kernel, or one of its subcommands."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # As ipykernel_launcher does: a notebook's folder must not shadow the modules that start it.
    if sys.path[0] == "" or Path(sys.path[0]) == Path.cwd():
        del sys.path[0]

    from curve_kernel.app import main

    main()

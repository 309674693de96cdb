"""The options that say when an access ends by itself."""

from __future__ import annotations

import argparse
from datetime import datetime

from ..keys.expiry import after, at

__all__ = ["add_end_arguments", "end_of"]


def add_end_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --for and --until."""
    end = parser.add_mutually_exclusive_group()
    end.add_argument(
        "--for",
        dest="duration",
        metavar="TIME",
        help="end the access by itself, after 30min, 2h, 1h30min or 7d",
    )
    end.add_argument(
        "--until",
        metavar="WHEN",
        help="""end the access by itself, at 18:00, 2026-12-24 or 2026-12-24T18:00, in this machine's
        time unless it says another, as in 2026-12-24T18:00Z or 2026-12-24T18:00+01:00""",
    )


def end_of(options: argparse.Namespace) -> datetime | None:
    """Return the end that the options ask for, or None for no end."""
    if options.duration is not None:
        return after(options.duration)
    return at(options.until) if options.until is not None else None

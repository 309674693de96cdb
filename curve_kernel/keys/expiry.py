"""Until when a client is listed: how it is typed, how its certificate says it, and how it is shown.

A certificate says it in its metadata, as a moment with its time zone::

    metadata
        until = "2026-11-25T18:00:00+01:00"
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from ..errors import CurveKernelError

__all__ = ["after", "ago_or_in", "at", "parse_until", "show"]

_UNITS = {"s": "seconds", "m": "minutes", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"(?:\d{1,9}(?:min|[smhdw]))+", re.ASCII)
_UNTIL = re.compile(r"^[^\S\n]*until\b(.*)", re.IGNORECASE | re.MULTILINE)
_DURATION_FORM = "write 90s, 30min, 2h, 1h30min, 7d or 2w"
_TIME_FORM = "write 18:00, 2026-12-24, 2026-12-24T18:00 or 2026-12-24T18:00+01:00"


def after(duration: str, now: datetime | None = None) -> datetime:
    """Return the moment that is *duration* away, such as ``2h`` or ``1h30min``.

    Raises
    ------
    CurveKernelError
        If it is no duration, or none at all.
    """
    now = now or _now()
    text = duration.replace(" ", "")
    if not _DURATION.fullmatch(text):
        raise CurveKernelError(f"{duration!r} is no duration", _DURATION_FORM)
    try:
        parts = re.findall(r"(\d+)(\D+)", text)
        length = sum((timedelta(**{_UNITS[unit]: int(n)}) for n, unit in parts), timedelta())
        end = (now + length).astimezone()
    except OverflowError:
        raise CurveKernelError(f"{duration!r} is too long", "leave it out for no end") from None
    if not length:
        raise CurveKernelError(f"{duration!r} is over at once", _DURATION_FORM)
    return end


def at(when: str, now: datetime | None = None) -> datetime:
    """Return the moment that *when* names; without a time zone it is this machine's time.

    A time alone is today's, and a date alone is the day's first moment.

    Raises
    ------
    CurveKernelError
        If it is no such thing, or it is over.
    """
    now = now or _now()
    text = when.strip()
    text = f"{text[:-1]}+00:00" if text[-1:] in ("Z", "z") else text
    if re.match(r"\d\d:\d\d", text, re.ASCII):
        text = f"{now:%Y-%m-%d}T{text}"
    try:
        end = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise CurveKernelError(f"{when!r} is neither a time nor a date", _TIME_FORM) from None
    if end <= now:
        raise CurveKernelError(f"{when!r} is over: it is {now:%Y-%m-%d %H:%M %Z} now", _TIME_FORM)
    return end


def parse_until(content: bytes, name: str) -> datetime | None:
    """Return until when a certificate lists its client, or None if it says nothing of an end.

    Parameters
    ----------
    content : bytes
        What is in the file.
    name : str
        What it is called, for messages.

    Raises
    ------
    CurveKernelError
        If it says something of it that is no moment with a time zone: then it lists nobody.
    """
    ends = []
    for found in _UNTIL.finditer(content.decode("utf-8", "replace")):
        value = found[1].strip().removeprefix("=").strip(" \t'\"")
        value = f"{value[:-1]}+00:00" if value[-1:] in ("Z", "z") else value
        try:
            end = datetime.fromisoformat(value)
            end.astimezone()  # as `show` does
        except (ValueError, OverflowError):
            end = datetime.min
        if end.tzinfo is None:
            raise CurveKernelError(
                f"certificate {name} does not say until when in a way that is known",
                "list the client again: python -m curve_kernel authorize ... --until ... --force",
            )
        ends.append(end)
    return min(ends, default=None)


def show(end: datetime, now: datetime | None = None) -> str:
    """Return how *end* is shown, such as ``until 18:00, in 43 min``, in this machine's time."""
    now = now or _now()
    local = end.astimezone()
    when = f"{local:%H:%M}" if local.date() == now.date() else f"{local:%Y-%m-%d %H:%M}"
    return f"{'until' if end > now else 'ended'} {when}, {ago_or_in(end, now)}"


def ago_or_in(moment: datetime, now: datetime | None = None) -> str:
    """Return how far away *moment* is, such as ``in 43 min`` or ``2 h ago``."""
    seconds = (moment - (now or _now())).total_seconds()
    far = abs(seconds)
    if far < 90:
        text = f"{far:.0f} s"
    elif far < 90 * 60:
        text = f"{far / 60:.0f} min"
    elif far < 36 * 3600:
        hours, minutes = divmod(round(far / 60), 60)
        text = f"{hours} h {minutes} min" if minutes else f"{hours} h"
    else:
        days, hours = divmod(round(far / 3600), 24)
        text = f"{days} d {hours} h" if hours else f"{days} d"
    return f"in {text}" if seconds >= 0 else f"{text} ago"


def _now() -> datetime:
    return datetime.now().astimezone()

"""An access that ends: how its end is typed, kept and shown."""

from __future__ import annotations

import contextlib
import re
import time
from datetime import datetime, timedelta, timezone

import pytest
import zmq.auth
from test_commands import colleague, curve, fails, run  # noqa: F401

from curve_kernel.access import allowlist
from curve_kernel.access.allowlist import AuthorizedClients
from curve_kernel.errors import CurveKernelError
from curve_kernel.keys import KeyPair, expiry
from curve_kernel.keys.certificates import write_certificate
from curve_kernel.keys.expiry import after, parse_until, show
from curve_kernel.keys.ticket import until

NOON = datetime(2026, 6, 1, 12, tzinfo=timezone.utc).astimezone()


def minutes(text: str) -> float:
    return (expiry.after(text, NOON) - NOON).total_seconds() / 60


def test_durations():
    assert minutes("90s") == 1.5
    assert minutes("30min") == minutes("30m") == 30
    assert minutes("2h") == 120
    assert minutes("1h30min") == minutes("1h 30m") == 90
    assert minutes("7d") == minutes("1w") == 7 * 24 * 60
    for text in ("", "2", "h", "-2h", "2h-", "0h", "2y", "2.5h", "9" * 9 + "w", "٢h", "2h\n1", "1e3s"):
        with pytest.raises(CurveKernelError):
            expiry.after(text, NOON)


def test_moments(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        now = NOON.astimezone()  # 14:00 there

        def utc(text: str) -> str:
            return f"{expiry.at(text, now).astimezone(timezone.utc):%m-%d %H:%M}"

        assert utc("18:00") == "06-01 16:00"
        assert utc("18:00Z") == "06-01 18:00"
        assert utc("18:00-05:00") == "06-01 23:00"
        assert utc("2026-12-24") == "12-23 23:00"
        assert utc("2026-12-24T18:00") == utc("2026-12-24 18:00") == "12-24 17:00"
        assert utc("2026-12-24T18:00+00:00") == "12-24 18:00"
        # The night in which 02:30 comes twice: the first of the two.
        assert utc("2026-10-25T02:30") == "10-25 00:30"
        for text in (
            "13:59",
            "2025-01-01",
            "2026-06-01",
            "",
            "soon",
            "25:00",
            "18",
            "24.12.",
            "9" * 30,
        ):
            with pytest.raises(CurveKernelError):
                expiry.at(text, now)
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_how_an_end_is_shown():
    assert expiry.show(NOON + timedelta(minutes=43), NOON).endswith(", in 43 min")
    assert expiry.show(NOON + timedelta(minutes=43), NOON).startswith(
        f"until {NOON + timedelta(minutes=43):%H:%M}, "
    )
    assert expiry.show(NOON + timedelta(days=3, hours=2), NOON).endswith(", in 3 d 2 h")
    assert "until 2026-06-04 " in expiry.show(NOON + timedelta(days=3), NOON)
    assert expiry.show(NOON - timedelta(hours=2), NOON).startswith("ended ")
    assert expiry.show(NOON - timedelta(hours=2), NOON).endswith(", 2 h ago")


def test_authorize_for_and_until(curve, tmp_path):  # noqa: F811
    certificate = str(colleague(tmp_path))
    before = time.time()
    status, out, err = run("authorize", certificate, "--name", "vera", "--for", "2h")
    assert (status, err) == (0, "")
    assert re.search(r"ends by itself at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+, in 2 h\.", out)
    path = curve / "viewers" / "vera.key"
    [until] = re.findall(r'metadata\n +until = "([^"]+)"\ncurve', path.read_text())
    assert 7100 < datetime.fromisoformat(until).timestamp() - before < 7300
    assert zmq.auth.load_certificate(path)[0] == zmq.auth.load_certificate(certificate)[0]
    assert re.fullmatch(
        r"vera +viewer +\S{40}  until (\d{4}-\d\d-\d\d )?\d\d:\d\d, in (2 h|1 h 59 min)\n",
        run("clients")[1],
    )
    # Another end in place of that, and then none.
    in_an_hour = datetime.now(timezone.utc) + timedelta(minutes=50)
    when = in_an_hour.isoformat()
    assert run("authorize", certificate, "--name", "vera", "--until", when)[0] == 0
    assert re.search(r"in (49|50) min$", run("clients")[1].strip())
    assert run("authorize", certificate, "--name", "vera")[0] == 0
    assert "until" not in run("clients")[1] + path.read_text()
    # One that is over is shown, and so is none that can't be understood.
    write_certificate(path, KeyPair.generate().public_key, until=NOON - timedelta(days=999))
    assert re.search(r"\S{40}  ended 2023-\d\d-\d\d \d\d:\d\d, \d+ d .*ago", run("clients")[1])
    name = ("authorize", certificate, "--name", "other")
    fails(*name, "--for", "soon", says="'soon' is no duration", hint="2h")
    fails(*name, "--until", "2020-01-01", says="is over", hint="18:00")
    fails(*name, "--until", "noon", says="neither", hint="18:00")
    fails(*name, "--for", "2h", "--until", "18:00", says="not allowed with", hint="--help")
    assert not (curve / "viewers" / "other.key").exists()


def test_ends_at_the_end_of_time(monkeypatch):
    """Whatever is taken for an end can be shown, in every time zone."""
    last = "9999-12-31T23:59:59"
    for zone in ("UTC-14", "UTC", "UTC+12"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        for offset in ("-12:00", "+00:00", "+14:00"):
            if end := until({"shared": {"until": last + offset}}):
                assert show(end).startswith("until ")
            with contextlib.suppress(CurveKernelError):
                show(parse_until(f"until = {last}{offset}".encode(), "a name"))
        now = datetime.fromisoformat(f"{last}-12:00") - timedelta(hours=1)
        with pytest.raises(CurveKernelError, match="is too long"):
            after("30min", now)
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    "line",
    [
        "until =",
        "until = never",
        "until 2099-01-01",
        "until: 2099-01-01T00:00Z",
        'until = "2099-01-01T00:00"',
        "UNTIL = x",
        "until = 9999-99-99T00:00Z",
        "until = 9999-12-31T23:00-12:00",  # no day here
        "until = 2099-01-01T00:00Z # or so",
        "until = 2099-01-01T00:00Z\n until = x",
    ],
)
def test_an_end_that_is_not_understood_lists_nobody(folder, line):
    warnings: list[str] = []
    keys = KeyPair.generate()
    path = folder / "owners" / "olga.key"
    write_certificate(path, keys.public_key)
    assert AuthorizedClients(folder, warnings.append).find(keys.public_key)
    path.write_text(f"metadata\n    {line}\n{path.read_text()}")
    assert AuthorizedClients(folder, warnings.append).find(keys.public_key) is None
    assert "does not say until when" in warnings[0]


def test_a_clock_that_is_set_back_lengthens_nothing(folder, monkeypatch):
    keys = KeyPair.generate()
    now, ticks = time.time(), 1000.0
    monkeypatch.setattr(allowlist, "time", lambda: now)
    monkeypatch.setattr(allowlist, "clock_gettime", lambda _: ticks)
    end = datetime.fromtimestamp(now + 3600, timezone.utc)
    write_certificate(folder / "owners" / "olga.key", keys.public_key, until=end)
    clients = AuthorizedClients(folder, pytest.fail)
    [client] = clients
    assert not clients.has_ended(client)
    now, ticks = now - 86400, ticks + 3590
    assert not clients.has_ended(client)
    (folder / "owners" / "olga.key").touch()
    assert not clients.has_ended(clients.find(keys.public_key))
    ticks += 20
    assert clients.has_ended(clients.find(keys.public_key))
    # A later end is another access; so is one that is over by the clock that shows the time.
    end += timedelta(hours=1)
    write_certificate(folder / "owners" / "olga.key", keys.public_key, until=end)
    now += 86400
    assert not clients.has_ended(clients.find(keys.public_key))
    now += 7200
    assert clients.has_ended(clients.find(keys.public_key))

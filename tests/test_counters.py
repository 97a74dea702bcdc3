"""The counters: what was spent in which window, as a fold over the ledger's lines."""

from __future__ import annotations

import datetime as dt
import functools
import math
import zoneinfo
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gateway as g

ZONES = [
    *("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "Africa/Casablanca"),
    *("America/Havana", "Pacific/Apia", "Asia/Kathmandu", "America/Santiago", "Asia/Beirut", "Pacific/Chatham"),
    *("America/Sao_Paulo", "Pacific/Kiritimati", "Africa/Cairo", "Asia/Tehran", "Antarctica/Troll"),
]
DAY = 86400.0
FIRST, LAST = (int(dt.datetime(year, 1, 1, tzinfo=dt.UTC).timestamp()) for year in (2000, 2040))


def at(text: str, zone: str = "UTC") -> float:
    """Seconds since 1970 of a local time."""
    return dt.datetime.fromisoformat(text).replace(tzinfo=zoneinfo.ZoneInfo(zone)).timestamp()


@functools.cache
def calendar(zone: str = "UTC") -> g.Calendar:
    return g.Calendar(zoneinfo.ZoneInfo(zone))


# Calendar

times = st.one_of(
    st.integers(FIRST, LAST - 1),
    st.floats(FIRST, LAST, exclude_max=True),
    st.builds(lambda day, s: FIRST + day * 86400 + s, st.integers(0, 14_609), st.integers(-3 * 3600, 3 * 3600)),
).filter(lambda moment: FIRST + 32 * DAY < moment < LAST - 32 * DAY)


@given(st.sampled_from(ZONES), times)
@example("Europe/Berlin", at("2026-03-29T00:30:00"))
@example("Europe/Berlin", at("2026-10-25T01:30:00"))
@example("America/Havana", at("2026-11-01T04:30:00"))
@example("Pacific/Apia", at("2011-12-30T10:00:00"))
@example("Pacific/Apia", at("2011-12-30T09:59:59"))
@example("America/Santiago", at("2026-04-05T03:30:00"))
@example("UTC", at("2028-02-29T23:59:59"))
@example("UTC", at("2027-01-01T00:00:00"))
def test_a_moment_lies_in_its_day_week_month_and_hour(zone, moment):
    """
    The windows are those of the wall calendar, and one ends where the next begins, whatever the clocks do.
    """
    spans = calendar(zone).spans(moment)
    local = dt.datetime.fromtimestamp(moment, zoneinfo.ZoneInfo(zone))

    assert all(span.start <= moment < span.end for span in spans.values()), spans
    for name in ("day", "week", "month"):
        span = spans[name]
        after, before = calendar(zone).spans(span.end)[name], calendar(zone).spans(span.start - 0.001)[name]
        assert (after.start, before.end) == (span.end, span.start)
        assert calendar(zone).spans(span.start)[name] == span == calendar(zone).spans(span.end - 0.001)[name]
    first = {name: dt.datetime.fromtimestamp(span.start, local.tzinfo).date() for name, span in spans.items()}
    monday = local.date() - dt.timedelta(days=local.weekday())
    assert (first["day"], first["month"]) == (local.date(), local.date().replace(day=1))
    assert first["week"] == monday


@pytest.mark.parametrize(
    ("zone", "local", "hours"),
    [
        ("Europe/Berlin", "2026-03-29T12:00", 23),
        ("Europe/Berlin", "2026-10-25T12:00", 25),
        ("Europe/Berlin", "2026-10-26T12:00", 24),
        ("Australia/Lord_Howe", "2026-04-05T12:00", 24.5),
        ("Australia/Lord_Howe", "2026-10-04T12:00", 23.5),
        ("America/Havana", "2024-11-03T12:00", 25),
        ("America/Havana", "2024-03-10T12:00", 23),
        ("America/Santiago", "2026-04-04T12:00", 25),
        ("America/Santiago", "2026-09-06T12:00", 23),
        ("Pacific/Apia", "2011-12-29T12:00", 24),
        ("Asia/Kolkata", "2026-03-29T12:00", 24),
        ("America/New_York", "2028-02-29T12:00", 24),
    ],
)
def test_a_day_is_as_long_as_people_there_live_it(zone, local, hours):
    """
    A daily limit lasts 23 or 25 hours twice a year.
    """
    day = calendar(zone).spans(at(local, zone))["day"]

    assert (day.end - day.start) / 3600 == hours


@pytest.mark.parametrize(
    ("local", "window", "first", "after"),
    [
        ("2028-02-29T23:59:59", "day", "2028-02-29", "2028-03-01"),
        ("2028-02-29T12:00", "month", "2028-02-01", "2028-03-01"),
        ("2026-12-31T23:59:59", "month", "2026-12-01", "2027-01-01"),
        ("2027-01-01T00:00", "month", "2027-01-01", "2027-02-01"),
        ("2027-01-01T00:00", "week", "2026-12-28", "2027-01-04"),
        ("2026-09-21T00:00", "week", "2026-09-21", "2026-09-28"),
        ("2026-09-20T23:59:59", "week", "2026-09-14", "2026-09-21"),
        ("2026-03-29T02:30", "clock_hour", "2026-03-29T03:00", "2026-03-29T04:00"),
    ],
)
def test_windows_begin_and_end_at_local_midnight(local, window, first, after):
    """
    Weeks begin on Monday; February ends where it ends.
    """
    span = calendar("Europe/Berlin").spans(at(local, "Europe/Berlin"))[window]

    assert span == (at(first, "Europe/Berlin"), at(after, "Europe/Berlin"))


@given(st.sampled_from(ZONES), times)
def test_the_label_of_an_hour_is_that_of_every_moment_in_it(zone, moment):
    """
    A report by day puts an hour where its calls are, also where the offset is no whole hour.
    """
    hour = calendar(zone).spans(moment)["clock_hour"]
    local = dt.datetime.fromtimestamp(moment, zoneinfo.ZoneInfo(zone))

    assert hour.end - hour.start == 3600
    if dt.datetime.fromtimestamp(hour.start, local.tzinfo).utcoffset() == local.utcoffset():
        assert calendar(zone).label(hour.start, "day") == str(local.date())
        assert calendar(zone).label(hour.start, "month") == f"{local:%Y-%m}"
        assert calendar(zone).label(hour.start, "hour") == local.replace(minute=0).isoformat(timespec="minutes")


# Counters against a naive model

START = at("2026-09-21T14:13:20")  # a Monday
TOKENS = ("input_tokens", "output_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "cache_read_tokens")


def posting(seconds: float, **fields: object) -> g.Posting:
    """A line as counters see it; `seconds` after START."""
    time = dt.datetime.fromtimestamp(START + seconds, dt.UTC)
    return g.Posting(**({"time": time, "key": "alice", "model": "m"} | fields))


def fold(zone: str = "UTC") -> g.Fold:
    """A fold for which everything may lie in the last minute."""
    return g.Fold(calendar(zone), -math.inf)


def reset(seconds: float, limit: str = "", scope: str = "key", name: str = "alice") -> g.Posting:
    return posting(seconds, key="", type="reset", scope=scope, name=name, limit=limit)


def amount(unit: str, line: g.Posting) -> float:
    """What one line adds to a limit."""
    if unit == "usd":
        return round(line.cost_usd * 1e9)
    if unit == "requests":
        return line.requests
    if line.weighted_tokens is not None:
        return line.weighted_tokens
    return round(sum(getattr(line, name) for name in TOKENS[:-1]) + line.cache_read_tokens * 0.1)


def naive(lines: list[g.Posting], unit: str, window: str, now: float, zone: str) -> float:
    """Add up every line of the window that no later reset wiped out."""
    found = 0.0
    for line in lines:
        if line.type == "reset":
            hit = line.limit in ("", f"{unit}/{window}" if window else unit)
            same = (
                window == "" or calendar(zone).spans(line.time.timestamp())[window] == calendar(zone).spans(now)[window]
            )
            found = 0.0 if hit and same else found
        elif not window or calendar(zone).spans(line.time.timestamp())[window] == calendar(zone).spans(now)[window]:
            found += amount(unit, line)
    return found


LIMITS = ["", *(f"{unit}/{window}" for unit in g.LIMIT_UNITS for window in ("day", "week", "month")), "usd", "tokens"]
amounts = st.fixed_dictionaries(
    {name: st.integers(0, 1000) for name in TOKENS} | {"weighted_tokens": st.none() | st.integers(0, 5000)}
) | st.just({})
calls = st.builds(
    lambda tokens, cost, ms: {"cost_usd": cost / 1000, "duration_ms": ms} | tokens,
    amounts,
    st.integers(0, 5000),
    st.sampled_from([0.0, 900.0, 60_000.0, 4e6]),
)
corrections = st.builds(
    lambda cost, requests, tokens: {
        "type": "adjust",
        "cost_usd": cost / 100,
        "requests": requests,
        "input_tokens": tokens,
    },
    st.integers(-900, 900),
    st.integers(-3, 3),
    st.integers(-5000, 5000),
)
steps = st.one_of(calls, calls, corrections, st.sampled_from(LIMITS))


def play(moves: list[tuple[str | dict, float]], zone: str) -> Iterator[tuple[g.Fold, list[g.Posting], float]]:
    """Post lines at times that move by so many seconds; after each one, the fold, the lines and the time."""
    made, lines, seconds = fold(zone), [], 0.0
    for what, moved in moves:
        seconds += moved
        line = reset(seconds, what) if isinstance(what, str) else posting(seconds, **what)
        made.post([line])
        lines.append(line)
        yield made, lines, START + seconds


FORWARD = st.sampled_from([0.0, 0.25, 30.0, 3000.0, 40_000.0, DAY, 6 * DAY, 31 * DAY])
BACK_AND_FORTH = st.sampled_from([0.0, 1.0, -2.0, 3600.0, 30_000.0, -30_000.0, DAY, -DAY])


@given(st.lists(st.tuples(steps, FORWARD), max_size=30), st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata"]))
@settings(deadline=None)
def test_what_is_spent_is_the_sum_over_the_window(moves, zone):
    """
    For calls, corrections and resets in any order: to the nano-dollar.
    """
    for made, lines, now in play(moves, zone):
        for unit in g.LIMIT_UNITS:
            for window in ("", "day", "week", "month"):
                spent = made.scope("key", "alice").spent(unit, g.WINDOWS[window], now)
                assert spent == naive(lines, unit, window, now, zone), (unit, window)


def days_stay_near(moves: list) -> bool:
    """Whether the clock never leaves so many days that the first of them would be forgotten."""
    seconds, seen = 0.0, []
    for _, moved in moves:
        seconds += moved
        seen.append((START + seconds) // DAY)
    return max(seen, default=0) - min(seen, default=0) <= g.Counters.LEFT


@given(st.lists(st.tuples(steps, BACK_AND_FORTH), max_size=30).filter(days_stay_near))
@settings(deadline=None)
def test_a_clock_that_is_set_back_finds_the_windows_it_had_left(moves):
    """
    A step of the clock over midnight, or by days, neither gives a limit away nor counts it twice.
    """
    for made, lines, now in play(moves, "UTC"):
        for unit in g.LIMIT_UNITS:
            for window in ("", "day", "week", "month"):
                spent = made.scope("key", "alice").spent(unit, g.WINDOWS[window], now)
                assert spent == naive(lines, unit, window, now, "UTC"), (unit, window)
        # What is asked of the day before is what was spent in it, unless a reset has been there.
        if not any(line.type == "reset" for line in lines):
            spent = made.scope("key", "alice").spent("usd", g.WINDOWS["day"], now - DAY)
            assert spent == naive(lines, "usd", "day", now - DAY, "UTC")


@pytest.mark.parametrize("back", range(1, g.Counters.LEFT + 1))
def test_as_many_windows_are_remembered_as_promised(back):
    """
    Four days forward and back again: each day has what was spent in it.
    """
    made = fold()
    for day in range(g.Counters.LEFT + 1):
        made.post([posting(day * DAY, cost_usd=2.0**day)])
    now = START + g.Counters.LEFT * DAY

    asked = made.scope("key", "alice").spent("usd", g.WINDOWS["day"], now - back * DAY)
    made.post([posting((g.Counters.LEFT - back) * DAY, cost_usd=0.5)])
    posted = made.scope("key", "alice").spent("usd", g.WINDOWS["day"], now - back * DAY)

    assert asked == 2.0 ** (g.Counters.LEFT - back) * 1e9
    assert posted == asked + 0.5e9


def test_the_last_minute_takes_up_little_memory():
    """
    Calls that ran for hours leave a second each behind; those go.
    """
    made = fold()
    for second in range(2000):
        made.post([posting(second, duration_ms=second * 500.0)])

    assert len(made.scope("key", "alice").steps) <= 98
    assert made.scope("key", "alice").spent("tokens", g.WINDOWS["minute"], START + 2000) == 0


def test_a_reset_that_is_ahead_of_the_calls_takes_nothing_from_tomorrow():
    """
    A call that ended before midnight may be booked behind a reset from after it.
    """
    made, evening = fold(), at("2026-09-21T23:59:00") - START

    made.post([posting(evening, cost_usd=1.0)])
    made.post([reset(evening + 61)])
    made.post([posting(evening + 59.9, cost_usd=2.0)])
    made.post([posting(evening + 62, cost_usd=4.0)])

    assert made.scope("key", "alice").spent("usd", g.WINDOWS["day"], START + evening + 63) == 4e9
    assert made.scope("key", "alice").spent("usd", g.WINDOWS["day"], START + evening) == 3e9


def test_a_window_that_nobody_has_called_in_is_empty():
    """
    The new day is free before its first call.
    """
    made = fold()
    made.post([posting(0, cost_usd=1.0)])

    spent = [made.scope("key", "alice").spent("usd", g.WINDOWS["day"], START + days * DAY) for days in (-1, 0, 1)]

    assert spent == [0, 1e9, 0]
    assert [fold().scope("key", "bob").spent(unit, g.WINDOWS["day"], START) for unit in g.LIMIT_UNITS] == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(("window", "span_s"), [("hour", 3600), ("5h", 18000)])
def test_hours_open_with_the_first_call_and_last_their_time(window, span_s):
    """
    From the first request on, as Anthropic's own session window; the first call after its end opens the next.
    """
    made, seen = fold(), []
    alice = made.scope("key", "alice")
    moments = [100, 200, 100 + span_s - 1, 100 + span_s, 100 + span_s + 5, 5 * span_s]

    for second in moments:
        made.post([posting(second, cost_usd=1.0)])
        resets_at = alice.resets_at(g.WINDOWS[window], START + second, calendar())
        seen.append((alice.spent("usd", g.WINDOWS[window], START + second) / 1e9, resets_at and resets_at - START))

    first, second, third = 100 + span_s, 100 + 2 * span_s, 6 * span_s
    assert seen == [(1, first), (2, first), (3, first), (1, second), (2, second), (1, third)]
    assert alice.spent("usd", g.WINDOWS[window], START + third) == 0
    assert alice.resets_at(g.WINDOWS[window], START + third, calendar()) is None


def test_an_hour_opens_when_its_first_call_begins():
    """
    A call of ten minutes has opened the window ten minutes before it is booked; never before the last one's end.
    """
    made = fold()
    alice = made.scope("key", "alice")

    made.post([posting(600, duration_ms=600_000)])
    first = alice.resets_at(g.WINDOWS["hour"], START + 601, calendar())
    made.post([posting(3700, duration_ms=600_000)])
    second = alice.resets_at(g.WINDOWS["hour"], START + 3701, calendar())
    made.post([posting(40_000, duration_ms=2e7)])
    third = alice.resets_at(g.WINDOWS["hour"], START + 40_001, calendar())

    assert (first, second, third) == (START + 3600, START + 7200, START + 43_600)


@given(st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([0.0, 5000.0])), min_size=1, max_size=30))
def test_hours_are_counted_as_a_naive_model_has_them(calls):
    """
    Clocks that only go forward: each call is in the window that is open when it ends.
    """
    made, seconds, end, spent = fold(), 0.0, -math.inf, 0
    for moved, duration_ms in calls:
        seconds += moved
        if seconds >= end:
            end, spent = max(seconds - duration_ms / 1000, end) + 3600, 0
        spent += 1
        made.post([posting(seconds, duration_ms=duration_ms)])

        assert made.scope("key", "alice").spent("requests", g.WINDOWS["hour"], START + seconds) == spent
        assert made.scope("key", "alice").resets_at(g.WINDOWS["hour"], START + seconds, calendar()) == START + end


@pytest.mark.parametrize("window", ["hour", "5h"])
def test_a_full_window_stays_full_when_the_clock_goes_ahead_and_back(window):
    """
    Ahead by nearly its length: the next window is opened, and does not stand for the one before when the clock is back.
    """
    made, row = fold(), g.WINDOWS[window]
    made.post([posting(5, cost_usd=1.0)])
    made.post([posting(row.seconds + 10, cost_usd=0.25)])

    spent = [made.scope("key", "alice").spent("usd", row, START + seconds) for seconds in (30, row.seconds + 30)]
    made.post([posting(40, cost_usd=0.5)])

    assert spent == [1e9, 0.25e9]
    assert made.scope("key", "alice").spent("usd", row, START + 50) == 1.5e9
    assert made.scope("key", "alice").spent("usd", row, START + row.seconds + 30) == 0.25e9


def test_an_hour_that_a_wrong_clock_opened_far_ahead_is_given_up():
    """
    A clock that was a day ahead locks nobody out for a day.
    """
    made = fold()
    made.post([posting(DAY, cost_usd=5.0)])
    made.post([posting(0, cost_usd=1.0)])

    assert made.scope("key", "alice").spent("usd", g.WINDOWS["hour"], START + 1) == 1e9
    assert made.scope("key", "alice").resets_at(g.WINDOWS["hour"], START + 1, calendar()) == START + 3600


minute_calls = st.tuples(
    st.sampled_from([0, 1, 7, 30, 59, 60, 61, 200, -1, -30]),
    st.sampled_from([0, 1, 30, 61, 500]),
    st.sampled_from([0, 0, 2, 40, 61]),
)


@given(st.lists(minute_calls, min_size=1, max_size=300))
@settings(deadline=None)
def test_the_last_minute_is_counted_in_steps_of_five_seconds(calls):
    """
    Tokens where a call ended, the call itself where it was admitted; what is older than a minute counts no more.
    """

    def is_recent(at: float, now: float) -> bool:
        return abs(at // 5 - now // 5) <= 12  # in steps of five seconds, and never less than a minute

    made, seconds, ended, admitted = fold(), 0, [], []
    for moved, ran_s, queued_s in calls:
        seconds += moved
        ended.append(seconds)
        admitted.append(seconds - ran_s)
        times = {"duration_ms": (queued_s + ran_s) * 1000.0, "queued_ms": queued_s * 1000.0}
        made.post([posting(seconds, output_tokens=3, **times)])

    for now in (seconds, seconds + 1, seconds + 30, seconds + 60):
        alice = made.scope("key", "alice")
        assert alice.spent("tokens", g.WINDOWS["minute"], START + now) == 3 * sum(is_recent(s, now) for s in ended)
        assert alice.spent("requests", g.WINDOWS["minute"], START + now) == sum(is_recent(s, now) for s in admitted)
    assert made.scope("key", "alice").spent("tokens", g.WINDOWS["minute"], START + max(ended) + 65) == 0
    assert len(made.scope("key", "alice").steps) <= 98


NEW_ROWS = {
    "two-days": g.LimitWindow("two-days", "calendar", "in two days", days=2),
    "quarter": g.LimitWindow("quarter", "calendar", "this quarter", months=3),
    "year": g.LimitWindow("year", "calendar", "this year", months=12),
    "12h": g.LimitWindow("12h", "rolling", "in 12 hours", seconds=12 * 3600),
    "10m": g.LimitWindow("10m", "sliding", "in 10 minutes", seconds=600),
}


@pytest.mark.parametrize(
    ("name", "counts", "does_not", "resets_at"),
    [
        ("two-days", "2026-09-20T15:00", "2026-09-19T23:59", "2026-09-22T00:00"),
        ("quarter", "2026-07-01T00:00", "2026-06-30T23:59", "2026-10-01T00:00"),
        ("year", "2026-01-01T00:00", "2025-12-31T23:59", "2027-01-01T00:00"),
        ("12h", "2026-09-21T02:30", "2026-09-20T14:00", "2026-09-21T14:30"),
        ("10m", "2026-09-21T14:05", "2026-09-21T14:02", None),
    ],
)
def test_a_new_row_is_a_window(name, counts, does_not, resets_at):
    """
    One row of the table is all that a further window needs: limits of it are read, counted, shown and reset.
    """
    row, windows = NEW_ROWS[name], g.WINDOWS | NEW_ROWS
    made = g.Fold(g.Calendar(dt.UTC, windows), -math.inf)
    limit = g.Limit("usd", row, 20.0)

    for local, cost_usd in ((does_not, 1.0), (counts, 2.0), ("2026-09-21T14:13:20", 4.0)):
        made.post([posting(at(local) - START, cost_usd=cost_usd)])
    alice = made.scope("key", "alice")
    spent = alice.spent("usd", row, START)
    made.post([reset(1, limit.name)])

    assert (limit, limit.name) == (g.Limit("usd", row, 20.0), f"usd/{name}")
    assert spent == 6e9
    assert alice.resets_at(row, START, made.calendar) == (resets_at and at(resets_at))
    assert alice.spent("usd", row, START + 1) == 0
    assert alice.spent("usd", g.WINDOWS["day"], START + 1) > 0


def test_a_quarter_begins_in_january_april_july_and_october():
    """
    A window of several months never begins in the middle of one of the next year.
    """
    dates = [NEW_ROWS["quarter"].dates(dt.date(2028, month, 29)) for month in range(1, 13)]

    firsts = [dt.date(2028, month, 1) for month in (1, 4, 7, 10)] + [dt.date(2029, 1, 1)]
    assert dates == [(firsts[n // 3], firsts[n // 3 + 1]) for n in range(12)]


@pytest.mark.parametrize("window", list(g.WINDOWS))
@pytest.mark.parametrize("unit", g.LIMIT_UNITS)
def test_a_reset_touches_its_limit_and_no_other(unit, window):
    """
    `usage reset --limit usd/day` leaves tokens, requests and the month alone; without a limit it takes all.
    """
    limit = f"{unit}/{window}" if window else unit
    one, all_ = fold(), fold()
    for made, which in ((one, limit), (all_, "")):
        made.post([posting(0, cost_usd=1.0, input_tokens=10, team="x")])
        made.post([reset(1, which)])

    def zero(made: g.Fold, counters: g.Counters) -> set[tuple[str, str]]:
        pairs = [(u, w) for u in g.LIMIT_UNITS for w in g.WINDOWS]
        return {(u, w) for u, w in pairs if counters.spent(u, g.WINDOWS[w], START + 1) == 0}

    assert zero(one, one.scope("key", "alice")) == {(unit, window)}
    assert len(zero(all_, all_.scope("key", "alice"))) == len(g.LIMIT_UNITS) * len(g.WINDOWS)
    assert zero(all_, all_.scope("team", "x")) == zero(all_, all_.scope("gateway", "")) == set()


@pytest.mark.parametrize(
    ("tokens", "weighted"),
    [
        ({"input_tokens": 100}, 100),
        ({"output_tokens": 100}, 500),
        ({"cache_write_5m_tokens": 100}, 125),
        ({"cache_write_1h_tokens": 100}, 125),
        ({"cache_read_tokens": 100}, 50),
        (dict.fromkeys(TOKENS, 100), 900),
        ({"input_tokens": 1, "cache_read_tokens": 1}, 2),  # 1.5: to the nearest whole one, the even of two
    ],
)
def test_tokens_weigh_what_the_config_says(tokens, weighted):
    """
    When they are booked, as prices are applied.
    """
    weights = g.Weights(input=1.0, output=5.0, cache_write=1.25, cache_read=0.5)

    assert weights.weigh(g.Tokens(**tokens)) == weighted


@pytest.mark.parametrize("name", g.Tokens.__struct_fields__)
def test_each_class_of_tokens_has_a_price_a_weight_and_a_place_in_reports(name):
    """
    What is added to the counts is forgotten nowhere: all but the output is input.
    """
    tokens, line = g.Tokens(**{name: 1_000_000}), posting(0, **{name: 1_000_000})
    sums = [0] * len(g.COLUMNS)
    g.add_to(sums, line)
    total = g.Total.of({}, sums)
    spent = g.Spent()
    spent.add(g.Entry(time="", **{name: 1_000_000}))

    assert tokens.total_input_tokens == (0 if name == "output_tokens" else 1_000_000)
    assert g.Price(3, 15).cost_usd(tokens) > 0 and g.Weights().weigh(tokens) > 0
    assert total.input_tokens + total.output_tokens + total.cache_write_tokens + total.cache_read_tokens == 1_000_000
    assert spent.tokens == [getattr(tokens, field) for field in g.Tokens.__struct_fields__]


counts = st.integers(0, g.MAX_COUNT)
entries = st.builds(
    g.Entry,
    time=st.floats(START - 40 * DAY, START + 40 * DAY).map(g.utc_time),
    key=st.sampled_from(["alice", "bob", ""]),
    team=st.sampled_from(["red", ""]),
    path=st.sampled_from(["/v1/messages", g.COUNT_TOKENS]),
    weighted_tokens=st.none() | counts,
    cost_usd=st.floats(0, g.MAX_COST_USD).map(lambda usd: round(usd, 9)),
    duration_ms=st.floats(0, 10 * DAY * 1000),
    queued_ms=st.floats(0, 10_000),
    **dict.fromkeys(TOKENS, counts),
)


@given(st.lists(entries, max_size=20))
def test_an_entry_counts_as_its_line_would(entries):
    """
    The running gateway counts what it writes without reading it again; a restart counts the lines.
    """
    ledger = g.Ledger(Path("never written"), 1.0, g.Clock(lambda: START, lambda: 0.0))
    books = g.Books(ledger, ledger._clock, dt.UTC)
    for entry in entries:
        ledger.note(entry)
    from_lines = fold()
    from_lines.post(g.POSTING_DECODER.decode(text) for _, text in ledger._waiting)

    assert books.fold.scopes == from_lines.scopes


def test_limits_count_the_tokens_as_they_were_weighted():
    """
    Lines from before the weighted tokens were kept count by the weights that are the default.
    """
    made = fold()
    made.post([posting(0, input_tokens=10, output_tokens=20, weighted_tokens=7)])
    made.post([posting(1, input_tokens=1, output_tokens=20, cache_write_1h_tokens=300, cache_read_tokens=4000)])

    for window in ("minute", "hour", "day", ""):
        assert made.scope("key", "alice").spent("tokens", g.WINDOWS[window], START + 1) == 7 + 721


# Books


def test_a_call_counts_with_its_key_its_team_and_the_gateway():
    """
    The team is the one the key was in when it called; who is in none has none.
    """
    made = fold()
    made.post([posting(0, cost_usd=1.0, team="x")])
    made.post([posting(1, cost_usd=2.0, team="y")])
    made.post([posting(2, cost_usd=4.0, key="bob")])
    made.post([posting(3, cost_usd=-0.5, key="", team="x", type="adjust", requests=0)])

    spent = {
        name: counters.spent("usd", g.WINDOWS["month"], START) / 1e9 for (_, name), counters in made.scopes.items()
    }
    assert spent == {"alice": 3.0, "bob": 4.0, "x": 0.5, "y": 2.0, "": 6.5}
    assert made.scope("team", "x") is made.scope("team", "x")


def test_counting_tokens_is_free():
    """
    /v1/messages/count_tokens is a line in the ledger, and nothing in a limit.
    """
    made = fold()
    made.post([posting(0, path="/v1/messages/count_tokens", input_tokens=5, cost_usd=1.0)])

    assert made.scopes == {}


def test_money_adds_up_exactly():
    """
    A million tenths of a cent are a thousand dollars.
    """
    made = fold()
    for _ in range(100_000):
        made.post([posting(0, cost_usd=0.001)])
    made.post([posting(0, cost_usd=-250.0, requests=0, input_tokens=-5, type="adjust")])

    assert made.scope("gateway", "").totals == [-5, -150_000_000_000, 100_000]


def test_counters_come_back_from_the_index_as_they_were():
    """
    Infinite windows, numbers as names and all.
    """
    made = fold()
    for number in range(50):
        made.post([posting(number * 9000.0, cost_usd=0.1 * number, team="x", output_tokens=1 << 70)])

    for counters in made.scopes.values():
        assert msgspec.json.decode(msgspec.json.encode(counters), type=g.Counters) == counters


def test_who_holds_counters_sees_those_that_a_start_has_counted():
    """
    Somebody may have asked for a key's limits before the ledger was read.
    """
    made, counted = fold(), fold()
    held = made.scope("key", "alice")
    counted.post([posting(0, cost_usd=1.0)])

    made.adopt(counted.scopes)
    made.post([posting(1, cost_usd=2.0)])

    assert held.spent("usd", g.WINDOWS["day"], START + 1) == 3e9


# Bounds

HUGE = 1 << 60


@pytest.mark.parametrize("unit", g.LIMIT_UNITS)
@pytest.mark.parametrize("window", list(g.WINDOWS))
@pytest.mark.parametrize("size", [1 << 44, 1 << 48, 1 << 53, HUGE, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30])
def test_no_line_is_so_large_that_its_limit_is_lifted(unit, window, size):
    """
    Lines that somebody made by hand, or a count that an upstream made up: a counter does not begin again below zero.
    """
    made = fold()
    line = {"usd": {"cost_usd": size / 1e9}, "tokens": {"output_tokens": size}, "requests": {"requests": size}}[unit]

    for _ in range(3):
        made.post([posting(0, **line)])
    after_three = made.scope("key", "alice").spent(unit, g.WINDOWS[window], START + 1)
    made.post([posting(0, output_tokens=1000, cost_usd=1.0)])

    assert after_three >= 3 * size * (1 - 1e-12)
    others = {"usd": 10**9, "tokens": 1000, "requests": 1}
    for each in g.LIMIT_UNITS:
        spent = made.scope("key", "alice").spent(each, g.WINDOWS[window], START + 1)
        before = after_three if each == unit else 3 if each == "requests" else 0
        assert spent == before + others[each], each

"""The index beside the ledger: whatever happens to it or to the files, its sums are those of the lines."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import sys
import time
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import gateway as g

NOW = 1795867200.0  # 2026-11-28T12:00:00Z
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
KATHMANDU = zoneinfo.ZoneInfo("Asia/Kathmandu")
AGAIN, ANEW = "all entries are read again", "made anew"


def line(rng: random.Random, at: float, **fields: object) -> dict[str, object]:
    """A call as the ledger has it, as far as it counts."""
    return {
        "type": "call",
        "time": g.utc_time(at),
        "key": rng.choice(["alice", "bob", "carol", ""]),
        "team": rng.choice(["red", "blue", ""]),
        "upstream": rng.choice(["a", "b"]),
        "model": rng.choice(["opus", "haiku", "gpt"]),
        "path": rng.choice(["/v1/messages"] * 9 + [g.COUNT_TOKENS]),
        "outcome": rng.choice(["completed", "completed", "client_gone"]),
        "input_tokens": rng.randrange(5000),
        "output_tokens": rng.randrange(900),
        "cache_write_5m_tokens": rng.randrange(900),
        "cache_write_1h_tokens": rng.randrange(900),
        "cache_read_tokens": rng.randrange(90_000),
        "weighted_tokens": rng.randrange(9000),
        "cost_usd": round(rng.random(), 9),
        "duration_ms": round(rng.random() * 90_000, 1),
        **fields,
    }


def encoded(fields: dict[str, object]) -> bytes:
    """A line as it is in the file."""
    return json.dumps(fields | {"chain": os.urandom(16).hex()}, separators=(",", ":")).encode() + b"\n"


def some_lines(count: int, seed: int = 1, jumps: bool = False) -> list[bytes]:
    """A ledger of 70 days with all that can be in one; `jumps`: its clock is wrong for a while, now and then."""
    rng, lines, at = random.Random(seed), [], NOW - 70 * 86400
    for number in range(count):
        at += rng.random() * 2 * 70 * 86400 / count
        wrong = rng.choice([3600, 7 * 3600, 86400, 40 * 86400, -7200]) if jumps and number % 97 < 5 else 0
        fields = line(rng, min(at, NOW) + wrong)
        if number % 41 == 0:
            fields = {"type": "adjust", "time": fields["time"], "key": "alice", "team": "red", "model": "(adjusted)"}
            fields |= {"requests": -1, "input_tokens": -700, "cost_usd": -0.25}
        if number % 173 == 0:
            limit = rng.choice(["", "usd/day", "tokens/5h", "requests"])
            fields = {"type": "reset", "time": fields["time"], "scope": "key", "name": "alice", "limit": limit}
        if number % 59 == 0:
            fields |= {"type": "discarded", "requests": 0}
        lines.append(b'{not json","chain":"0123"}\n' if number % 301 == 300 else encoded(fields))
    return lines


def append(folder: Path, lines: list[bytes]) -> None:
    """Write lines where the gateway would: never back into an older month."""
    newest = max((g.month_of(path) for path in folder.glob("usage-*.jsonl*")), default="")
    for text in lines:
        place = text.find(b'"time":"') + 8
        if place > 7:
            newest = max(newest, text[place : place + 7].decode())
        with open(folder / f"usage-{newest}.jsonl", "ab") as file:
            file.write(text)


def catch_up(index: g.Index) -> None:
    """Have both views read what there is."""
    for view in index.views:
        index.catch_up(view)


def opened(
    folder: Path, now: float = NOW, secret: bytes = b"secret", zone: dt.tzinfo = dt.UTC, windows: g.Windows = g.WINDOWS
) -> g.Index:
    """The index as a start finds it, caught up."""
    index = g.Index(folder, g.Calendar(zone, windows), now, secret)
    index.open()
    catch_up(index)
    return index


def spent(index: g.Index, now: float = NOW) -> dict[tuple[object, ...], float]:
    """What limits can ask."""
    amounts = {
        (*scope, unit, window.name, at): counters.spent(unit, window, at)
        for scope, counters in index.counters.fold.scopes.items()
        for unit in g.LIMIT_UNITS
        for window in g.WINDOWS.values()
        for at in (now, now - 1800, now - 5400, now - 86400, now - 40 * 86400)
    }
    return {place: amount for place, amount in amounts.items() if amount}


def state(index: g.Index, now: float = NOW) -> dict[str, object]:
    """All that can be asked."""
    sums = {place: amounts for place, amounts in index._kept().items() if place.startswith("the sums")}
    return {"spent": spent(index, now), "sums": sums, "entries": [view.entries for view in index.views]}


def fresh(folder: Path, tmp_path: Path, now: float = NOW, zone: dt.tzinfo = dt.UTC) -> dict[str, object]:
    """The same, folded from nothing elsewhere."""
    copy = tmp_path / f"fresh{time.monotonic_ns()}"
    copy.mkdir()
    for path in folder.glob("usage-*"):
        os.link(path, copy / path.name)
    index = opened(copy, now, zone=zone)
    found = state(index, now)
    index.close()
    return found


@pytest.fixture(scope="module")
def ledger_of_70_days(tmp_path_factory) -> Path:
    """1,200 lines and an index."""
    folder = tmp_path_factory.mktemp("ledger")
    append(folder, some_lines(1200))
    opened(folder).close()
    return folder


@pytest.fixture
def folder(ledger_of_70_days, tmp_path) -> Path:
    """A copy of it that fits as the original does."""
    return shutil.copytree(ledger_of_70_days, tmp_path / "usage")


# What it says


@pytest.mark.logs("cannot be read")
@pytest.mark.parametrize(
    ("by", "zone"),
    [
        (("model",), dt.UTC),
        (("key", "model"), BERLIN),
        (("upstream", "outcome"), KATHMANDU),
        (("team",), BERLIN),
        (("key", "outcome"), KATHMANDU),
    ],
)
def test_sums_are_those_of_all_lines(tmp_path, by, zone):
    """
    By any labels, by hour, day or month, whatever row of SUMS answers.
    """
    append(tmp_path, some_lines(1200))
    index = opened(tmp_path, zone=zone)
    files = g.LedgerFiles(tmp_path)

    expected: dict[tuple[str, ...], list[int]] = {}
    for path in files.paths():
        for text in path.read_bytes().splitlines():
            try:
                posting = g.POSTING_DECODER.decode(text)
            except g.UNREADABLE:
                continue
            if posting.type != "reset" and posting.path != g.COUNT_TOKENS:
                day = posting.time.astimezone(zone).date().isoformat()
                sums = expected.setdefault((day, *(getattr(posting, name) for name in by)), [0] * len(g.COLUMNS))
                g.add_to(sums, posting)
    expected = {group: sums for group, sums in expected.items() if any(sums)}

    by_day = index.ask(("day", *by), columns=g.COLUMNS)
    assert {group: sums for group, sums in by_day.items() if any(sums)} == expected
    for time_group, length in (("hour", 10), ("month", 7)):
        found: dict[tuple[str, ...], list[int]] = {}
        for groups in (index.ask((*by, time_group), columns=g.COLUMNS), expected):
            sums_of: dict[tuple[str, ...], list[int]] = {}
            for group, sums in groups.items():
                labels, at = (group[:-1], group[-1]) if groups is not expected else (group[1:], group[0])
                before = sums_of.setdefault((at[: min(length, 10)], *labels), [0] * len(sums))
                sums_of[at[: min(length, 10)], *labels] = [a + b for a, b in zip(before, sums, strict=True)]
            sums_of = {group: sums for group, sums in sums_of.items() if any(sums)}
            assert not found or sums_of == found
            found = sums_of
    index.close()


def test_calls_are_counted_by_how_long_they_took(tmp_path):
    """
    A histogram for each group, for the page: the bounds are those of the metrics.
    """
    rng = random.Random(1)
    for duration_ms, upstream in ((50, "a"), (100, "a"), (101, "a"), (400_000, "b")):
        append(tmp_path, [encoded(line(rng, NOW, duration_ms=duration_ms, upstream=upstream, path=""))])
    index = opened(tmp_path)

    waits = index.ask(("upstream",), columns=g.WAITS)
    index.close()

    assert waits == {("a",): [2, 1, *[0] * 10], ("b",): [*[0] * 11, 1]}


@pytest.mark.parametrize(
    ("since", "until", "calls"),
    [
        ("2026-11-01T00:00", "2026-11-03T00:00", 48),
        ("2026-11-01T01:00", "2026-11-03T00:00", 47),
        ("2026-11-01T00:30", "2026-11-02T23:30", 47),
    ],
)
def test_hours_are_asked_for_where_days_do_not_suffice(tmp_path, since, until, calls):
    """
    An hour counts where it begins in the time that is asked for.
    """
    rng = random.Random(1)
    first = dt.datetime(2026, 10, 31, tzinfo=dt.UTC).timestamp() + 60
    append(tmp_path, [encoded(line(rng, first + 3600 * hour, path="")) for hour in range(96)])
    index = opened(tmp_path)
    bounds = [dt.datetime.fromisoformat(text + "Z").timestamp() for text in (since, until)]

    groups = index.ask((), {}, *bounds, columns=("calls",))
    nothing = index.ask(("model",), {"key": "nobody"})
    index.close()

    assert groups == {(): [calls]}
    assert nothing == {}


def test_thought_up_models_do_not_fill_the_index(tmp_path):
    """
    Their names come from clients. What is too much for a key is summed up as (others), over restarts, too.
    """
    rng = random.Random(1)
    lines = [encoded(line(rng, NOW - 100, key="eve", model=f"m{number}", path="")) for number in range(700)]
    append(tmp_path, lines[:350])
    opened(tmp_path).close()
    append(tmp_path, lines[350:])
    index = opened(tmp_path)

    groups = index.ask(("hour", "model"), {"key": "eve"}, columns=("calls",))

    assert sum(calls for (calls,) in groups.values()) == 700
    assert len(groups) == g.MODELS + 1
    assert state(index) == fresh(tmp_path, tmp_path)
    index.close()


@pytest.mark.logs("cannot be read")
@pytest.mark.parametrize("seed", range(4))
def test_a_fold_in_pieces_is_a_fold_at_once(tmp_path, seed):
    """
    However the lines come, half ones included, wherever it is stopped, and whatever the clock did.
    """
    folder, rng, lines = tmp_path / "usage", random.Random(seed), some_lines(1500, seed, jumps=True)
    folder.mkdir()
    index = opened(folder)
    while lines:
        count = rng.choice([1, 2, 30, 400])
        torn = b""
        if count < len(lines) and rng.random() < 0.5:
            torn = lines[count][:40]
        append(folder, lines[:count])
        newest = max(folder.glob("usage-*.jsonl"))
        with open(newest, "ab") as file:
            file.write(torn)
        for view in rng.sample(index.views, 2):
            index.catch_up(view)
        if torn:
            os.truncate(newest, newest.stat().st_size - len(torn))
        del lines[:count]
        if rng.random() < 0.3:
            index.close()
            index = opened(folder)
    catch_up(index)

    assert state(index) == fresh(folder, tmp_path)
    index.close()


def stopping(index: g.Index, post: Callable[[Iterator[g.Posting]], None]) -> Callable[[Iterator[g.Posting]], None]:
    """Count one step, and then have the index stop."""

    def count(postings: Iterator[g.Posting]) -> None:
        post(postings)
        index.is_stopping = True

    return count


@pytest.mark.logs("cannot be read")
def test_a_fold_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    """
    Else whoever ends a start that takes long would end all that follow, too.
    """
    monkeypatch.setattr(g, "BLOCK", 20_000)
    folder = tmp_path / "usage"
    folder.mkdir()
    append(folder, some_lines(700))
    seen = []
    while not seen or seen[-1] < 700:
        index = g.Index(folder, g.Calendar(dt.UTC), NOW, b"secret")
        index.open()
        monkeypatch.setattr(index.counters, "post", stopping(index, index.counters.post))
        catch_up(index)
        seen.append(index.counters.entries)
        last = state(index)
        index.close()

    assert len(seen) > 10 and seen == sorted(seen)
    opened(folder).close()
    assert last["spent"] == fresh(folder, tmp_path)["spent"]


PATHS = [str(Path(__file__).parent), str(Path(g.__file__).parent)]
WRITER = """
import sys, logging
sys.path[:0] = {paths!r}
import test_index as t
logging.basicConfig(level=logging.WARNING)
t.g.Index.BATCH = 20_000
lines = t.some_lines(3000, {seed}, jumps=True)
print("ready", flush=True)
index = t.opened(t.Path({folder!r}))
for place in range(0, len(lines), 7):
    t.append(t.Path({folder!r}), lines[place:place + 7])
    t.catch_up(index)
"""


@pytest.mark.logs("a torn last line")
@pytest.mark.parametrize(("noted", "torn"), [(0, 1), (0, 400), (1, 1), (1, 400), (400, 400), (600, 600)])
@pytest.mark.parametrize("follows", [False, True], ids=["", "another line follows"])
def test_killed_within_a_line_it_reads_no_line_again(tmp_path, caplog, noted, torn, follows):
    """
    Of a line `noted` bytes were there when its file was looked at last, `torn` when the process was killed. The next
    start cuts them off: the size is then the one that was noted, or will be again, at another time.
    """
    rng, folder = random.Random(1), tmp_path / "usage"
    folder.mkdir()
    path = folder / "usage-2026-11.jsonl"
    path.write_bytes(b"".join(encoded(line(rng, NOW)) for _ in range(3)) + b"x" * noted)
    opened(folder).close()
    time.sleep(0.01)  # for the file's time to be another
    with open(path, "ab+") as file:
        file.write(b"x" * (torn - noted))
        file.flush()
        g.set_torn_line_aside(file.fileno(), path)
    if follows:
        short = encoded(line(rng, NOW, padding=""))
        append(folder, [short.replace(b'ing":"', b'ing":"' + b"x" * (noted - len(short)))])
    index = opened(folder)

    assert state(index) == fresh(folder, tmp_path)
    assert AGAIN not in caplog.text
    index.close()


@pytest.mark.logs("a torn last line", "cannot be read")
def test_killed_at_any_moment_nothing_is_lost_and_nothing_counts_twice(tmp_path):
    """
    A transaction has what was counted and how far: both or neither.
    """
    folder, rng, complaints = tmp_path / "usage", random.Random(5), b""
    folder.mkdir()
    for seed in range(5):
        code = WRITER.format(paths=PATHS, folder=str(folder), seed=seed)
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(rng.random() ** 2 * 0.5)  # some at the start, most while it writes
        child.kill()
        complaints += child.communicate()[1]
        for path in folder.glob("usage-*.jsonl"):  # as the ledger does at a start
            with open(path, "rb+") as file:
                g.set_torn_line_aside(file.fileno(), path)
    (folder / "usage-2026-09.torn").write_bytes(b"")
    append(folder, [b"torn\n"])
    with open(max(folder.glob("usage-*.jsonl")), "rb+") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"torn")
        file.flush()
        g.set_torn_line_aside(file.fileno(), max(folder.glob("usage-*.jsonl")))
    index = opened(folder)

    assert index.sums.entries > 30
    assert state(index) == fresh(folder, tmp_path)
    assert AGAIN.encode() not in complaints and ANEW.encode() not in complaints
    index.close()


# What happens to it


def change(path: Path, statement: str, *values: object) -> None:
    """Run a statement on a database."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(statement, values)


@pytest.mark.logs(ANEW, "cannot be read")
@pytest.mark.parametrize("length", [15, 100, 4095, 4096, 4097, 20_000, 60_000, -4096, -1])
def test_a_truncated_index_is_made_anew(folder, tmp_path, length):
    """
    The lines are the truth; the index only saves reading them.
    """
    path = folder / g.Index.FILE
    os.truncate(path, length % path.stat().st_size)
    index = opened(folder)

    assert state(index) == fresh(folder, tmp_path)
    index.close()
    assert not opened(folder).failure


FOREIGN = {
    "deleted": b"",
    "text": b"hello" * 5000,
    "zeros": bytes(50_000),
    "noise": random.Random(7).randbytes(50_000),
}


@pytest.mark.logs("cannot be read")
@pytest.mark.parametrize("what", [*FOREIGN, "a foreign database", "an old WAL"])
def test_a_foreign_index_is_made_anew(folder, tmp_path, what, request):
    """
    Whatever has its name: it may be deleted at any time.
    """
    if what not in ("deleted", "an old WAL"):
        request.node.add_marker(pytest.mark.logs(ANEW))
    path = folder / g.Index.FILE
    path.unlink()
    if what == "a foreign database":
        change(path, "CREATE TABLE meta (a, b)")
    elif what == "an old WAL":
        (folder / f"{g.Index.FILE}-wal").write_bytes(os.urandom(50_000))
    elif FOREIGN[what]:
        path.write_bytes(FOREIGN[what])
    index = opened(folder)

    assert state(index) == fresh(folder, tmp_path) and not index.failure
    index.close()


@pytest.mark.logs(ANEW, AGAIN, "cannot be read")
def test_a_wrong_bit_lets_no_limit_be_passed(folder, tmp_path):
    """
    Counters are signed. Sums are not: `usage verify` compares them.
    """
    expected, path, rng = fresh(folder, tmp_path), folder / g.Index.FILE, random.Random(3)
    data = path.read_bytes()
    for _ in range(20):
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
        (folder / f"{g.Index.FILE}-wal").unlink(missing_ok=True)
        index = opened(folder)
        index.ask(("hour", "model"))  # reads every page, and mends what is seen to be damaged
        assert spent(index) == expected["spent"]
        index.close()


@pytest.mark.logs("the signature is wrong", "cannot be read")
def test_counters_rewritten_to_zero_do_not_fit(folder, tmp_path):
    """
    Whoever can write the folder cannot give a key its budget back.
    """
    change(
        folder / g.Index.FILE, "UPDATE counters SET state = ? WHERE scope = 'key'", msgspec.json.encode(g.Counters())
    )
    index = opened(folder)

    assert state(index) == fresh(folder, tmp_path)
    index.close()


@pytest.mark.logs("cannot be read")
@pytest.mark.parametrize("change", ["nothing", "sums", "counters"])
def test_differences_are_found_whoever_made_them(folder, change):
    """
    Also where the signature is right: all lines are folded and compared.
    """
    index = opened(folder)
    if change == "sums":
        index._db.execute("UPDATE sums SET nano_usd = 0 WHERE cut = 1")
    if change == "counters":
        index._db.execute("UPDATE counters SET state = ? WHERE scope = 'key'", (msgspec.json.encode(g.Counters()),))

    differences = index.differences()
    index.close()

    assert bool(differences) == (change != "nothing")
    assert all(text.startswith(f"the {change} of ") for text in differences)


@pytest.mark.logs(AGAIN, "cannot be read")
def test_an_index_of_another_secret_or_time_zone_is_read_again(folder, tmp_path, caplog):
    """
    Its days and months would be others.
    """
    opened(folder, secret=b"another").close()
    assert AGAIN in caplog.text
    caplog.clear()
    opened(folder, secret=b"another").close()
    assert AGAIN not in caplog.text
    index = opened(folder, secret=b"another", zone=KATHMANDU)
    assert AGAIN in caplog.text
    assert state(index) == fresh(folder, tmp_path, zone=KATHMANDU)
    index.close()


@pytest.mark.logs(AGAIN, "cannot be read")
def test_a_new_window_counts_from_the_first_line(folder, caplog):
    """
    An index that was made without it would leave it at 0 spent, whatever was spent.
    """
    quarter = g.LimitWindow("quarter", "calendar", "this quarter", months=3)
    index = opened(folder, windows=g.WINDOWS | {"quarter": quarter})
    alice = index.counters.fold.scopes["key", "alice"]

    assert [r.message for r in caplog.records if AGAIN in r.message] == [
        "index: all entries are read again for the counters: they are of another version, or another time zone"
    ]
    assert alice.spent("requests", quarter, NOW) > alice.spent("requests", g.WINDOWS["month"], NOW) > 0
    index.close()


def test_only_owner_and_group_may_read_it(folder):
    """
    It tells who works when, as the ledger does.
    """
    assert (folder / g.Index.FILE).stat().st_mode & 0o777 == 0o640


# What happens to the ledger


def newest(folder: Path) -> Path:
    return max(folder.glob("usage-*.jsonl"))


def edit(folder: Path, in_place: bool) -> None:
    path = min(folder.glob("usage-*.jsonl"))
    data = path.read_bytes().replace(b'"output_tokens":1', b'"output_tokens":9')
    if not in_place:
        path.unlink()
    path.write_bytes(data)


def rotate(folder: Path) -> None:
    path = newest(folder)
    path.rename(folder / "old.jsonl")
    path.write_bytes(some_lines(20, 9)[1])


CHANGES = {
    "cut": lambda folder: os.truncate(newest(folder), newest(folder).stat().st_size // 2),
    "edited": lambda folder: edit(folder, False),
    "edited in place": lambda folder: edit(folder, True),
    "rotated": rotate,
    "a month gone": lambda folder: min(folder.glob("usage-*.jsonl")).unlink(),
    "an older month come": lambda folder: (folder / "usage-2026-01.jsonl").write_bytes(b"".join(some_lines(50, 3))),
}


@pytest.mark.logs(AGAIN)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("when", ["after SIGTERM", "after SIGKILL", "while it runs"])
def test_lines_that_are_gone_or_changed_count_no_more(folder, tmp_path, change, when, request):
    """
    However the gateway ended: the counters are what the files say.
    """
    request.node.add_marker(pytest.mark.logs("cannot be read"))
    index = opened(folder)
    if when == "after SIGKILL":
        append(folder, some_lines(50, 2)[-50:])
    if when != "while it runs":
        index.close()
    time.sleep(0.01)
    change(folder)
    if when == "while it runs":
        catch_up(index)
    else:
        index = opened(folder)

    assert state(index) == fresh(folder, tmp_path)
    index.close()


@pytest.mark.parametrize("change", ["archived", "archived by an older version", "copied"])
def test_what_changes_no_line_is_not_read_again(folder, tmp_path, change, request):
    """
    `usage archive`, and a move to another disk with what keeps times.
    """
    if change == "archived":
        g.LedgerFiles(folder).archive(lambda text: None)
    elif change == "copied":
        shutil.copytree(folder, tmp_path / "copy")
        folder = tmp_path / "copy"
    else:
        for path in sorted(folder.glob("usage-*.jsonl"))[:-1]:
            subprocess.run(["gzip", path], check=True)
    index = opened(folder)
    append(folder, some_lines(50, 2)[-50:])
    catch_up(index)
    found = state(index)
    index.close()

    request.node.add_marker(pytest.mark.logs("cannot be read"))  # only by the one that is folded from nothing
    assert found == fresh(folder, tmp_path)


# Where it cannot be written


@pytest.mark.logs("it is in memory", "cannot be read")
def test_a_folder_that_cannot_be_written_has_its_index_in_memory(folder, tmp_path, monkeypatch):
    """
    Limits hold all the same; each start reads all entries.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    monkeypatch.chdir(folder)  # the folders above are root's alone
    os.seteuid(65534)
    try:
        index = opened(Path())
        found = state(index)
        index.close()
    finally:
        os.seteuid(0)

    assert found == fresh(folder, tmp_path) and index.failure


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#define WITHOUT_LOCKS(name) \
    int name(int fd, int cmd, ...) { \
        va_list rest; va_start(rest, cmd); void *value = va_arg(rest, void *); va_end(rest); \
        if (cmd == F_SETLK || cmd == F_SETLKW || cmd == F_GETLK) { errno = ENOLCK; return -1; } \
        return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(fd, cmd, value); \
    }
WITHOUT_LOCKS(fcntl)
WITHOUT_LOCKS(fcntl64)
"""


@pytest.mark.logs("cannot be read")
def test_a_file_system_without_locks_has_its_index_in_memory(folder, tmp_path):
    """
    Some network mounts have none: nothing would keep a second gateway away from the file.
    """
    if not shutil.which("gcc"):
        pytest.skip("no compiler")
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"], cwd=tmp_path, check=True)
    code = (
        f"import sys, pickle; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(g.__file__).parent)!r}]\n"
        f"import test_index as t\nindex = t.opened(t.Path({str(folder)!r}))\n"
        "sys.stdout.buffer.write(pickle.dumps((index.failure, t.state(index))))"
    )
    environ = os.environ | {"LD_PRELOAD": str(tmp_path / "shim.so")}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=True)

    failure, found = pickle.loads(done.stdout)
    assert "lock" in failure
    assert found == fresh(folder, tmp_path)


@pytest.mark.logs("it is in memory", "cannot be read")
def test_a_second_process_does_not_disturb_the_first(folder, tmp_path):
    """
    `usage` while the gateway runs: it folds for itself.
    """
    first, second = opened(folder), opened(folder)
    append(folder, some_lines(50, 2)[-50:])
    catch_up(first)
    catch_up(second)
    states = [state(first), state(second)]
    first.close()
    second.close()

    assert second.failure and not first.failure
    assert states == [fresh(folder, tmp_path)] * 2


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A disk on which an index has no room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.logs("it is in memory", "cannot be read")
def test_a_full_disk_has_its_index_in_memory(tiny_disk, tmp_path):
    """
    And the ledger has what room there is.
    """
    append(tiny_disk, some_lines(2400))
    index = opened(tiny_disk)
    found = state(index)
    index.close()

    copy = shutil.copytree(tiny_disk, tmp_path / "copy", ignore=shutil.ignore_patterns("index*"))
    assert index.failure
    assert found == fresh(copy, tmp_path)


# Clocks


def test_after_a_start_with_a_clock_that_was_ahead_minutes_count(tmp_path):
    """
    60 of 60 calls passed a limit of 5 a minute until the clock had come to where it had been.
    """
    rng = random.Random(1)
    append(tmp_path, [encoded(line(rng, NOW - 30, key="alice", path="", duration_ms=5))])
    index = opened(tmp_path, now=NOW + 86400)
    calls = [line(rng, NOW + number, key="alice", path="", duration_ms=5) for number in range(5)]
    append(tmp_path, [encoded(fields) for fields in calls])
    index.catch_up(index.counters)

    minute = g.WINDOWS["minute"]
    scopes = index.counters.fold.scopes
    assert scopes["key", "alice"].spent("requests", minute, NOW + 5) == 6
    assert scopes["gateway", ""].spent("requests", minute, NOW + 5) == 6
    index.close()


@pytest.mark.parametrize("jump_s", [3 * 3600, 86400, 400 * 86400])
@pytest.mark.parametrize("window", ["hour", "5h", "day", "week", "month"])
def test_windows_outlast_a_clock_that_jumps_ahead_and_back(window, jump_s):
    """
    `hour` and `5h` began anew, and a limit held again in full.
    """
    fold = g.Fold(g.Calendar(dt.UTC))
    for at in (NOW, NOW + jump_s, NOW + 60):
        fold.post([g.Posting(time=dt.datetime.fromtimestamp(at, dt.UTC), duration_ms=1000)])

    assert fold.scope("gateway", "").spent("requests", g.WINDOWS[window], NOW + 90) >= 2


def test_a_line_of_the_first_version_counts(tmp_path):
    """
    Whatever fields came later.
    """
    first = b'{"type":"call","time":"2026-09-01T00:00:00.000Z","key":"alice","model":"opus","input_tokens":7}\n'
    (tmp_path / "usage-2026-09.jsonl").write_bytes(first)
    index = opened(tmp_path)

    assert index.ask(("key", "model"), columns=("calls", "input_tokens")) == {("alice", "opus"): [1, 7]}
    index.close()

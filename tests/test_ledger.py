"""The ledger: one line for each call, whatever the disk does; and the sums over its lines."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import gzip
import hashlib
import json
import math
import os
import resource
import secrets
import shutil
import subprocess
import tempfile
import threading
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from conftest import START, FakeClock
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gateway as g

SEPTEMBER = "usage-2026-09.jsonl"
OCTOBER = "usage-2026-10.jsonl"


def entry(number: int = 1, time: str = "2026-09-21T13:33:20.000Z", **fields: object) -> g.Entry:
    """An entry with a number to know it by."""
    values = {
        "time": time,
        "request_id": f"req_{number}",
        "key": "alice",
        "team": "",
        "upstream": "main",
        "model": "claude-test",
        "model_served": "claude-test-1",
        "path": "/v1/messages",
        "stream": True,
        "status": 200,
        "outcome": "completed",
        "error_type": "",
        "attempts": 1,
        "input_tokens": 10,
        "output_tokens": 20,
        "cache_write_5m_tokens": 30,
        "cache_write_1h_tokens": 40,
        "cache_read_tokens": 120,
        "weighted_tokens": 112,
        "estimated": False,
        "cost_usd": 0.000798,
        "price": g.Price(input=3.0, output=15.0),
        "first_byte_ms": 1.5,
        "duration_ms": 20.25,
        "bytes_up": 100,
        "bytes_down": 200,
        "session": "s-1",
        "client": "192.0.2.1",
        "user_agent": "claude-cli/2.1.329",
        "upstream_request_id": "req_up",
    }
    return g.Entry(**values | fields)


def numbers(*paths: Path) -> list[str]:
    """The requests in these files, line by line; every line must be a whole entry."""
    lines = [line for path in paths for line in path.read_bytes().splitlines(keepends=True)]
    assert all(line.endswith(b"\n") for line in lines)
    return [msgspec.json.decode(line, type=g.Entry).request_id for line in lines]


def requests(first: int, last: int) -> list[str]:
    """`req_1` and so on."""
    return [f"req_{number}" for number in range(first, last + 1)]


def open_files() -> int:
    """How many descriptors this process holds."""
    return len(os.listdir("/dev/fd"))


MakeLedger = Callable[..., g.Ledger]


@pytest.fixture
def make_ledger(tmp_path, clock: FakeClock) -> Iterator[MakeLedger]:
    """Make ledgers in the test's folder, synced only at the end unless the test says otherwise."""
    made: list[g.Ledger] = []

    def make(directory: Path = tmp_path, fsync_s: float = math.inf) -> g.Ledger:
        made.append(g.Ledger(directory, fsync_s, clock.clock))
        return made[-1]

    yield make
    for ledger in made:
        ledger.close()


MakeBooks = Callable[..., g.Books]


@pytest.fixture
def make_books(make_ledger, clock: FakeClock) -> Iterator[MakeBooks]:
    """Ledgers whose lines were counted, in the test's folder."""
    made: list[g.Books] = []

    def make(directory: Path | None = None) -> g.Books:
        made.append(g.Books(make_ledger(directory) if directory else make_ledger(), clock.clock, dt.UTC))
        made[-1].load()
        return made[-1]

    yield make
    for books in made:
        books.close()


# Lines


def test_an_entry_is_one_line_of_json(make_ledger, tmp_path):
    """
    The file can be read with any tool, now and in ten years: names, numbers and UTC.
    """
    ledger = make_ledger()

    ledger.append(entry(1, user_agent="a\nb \u2028 é"))

    assert (tmp_path / SEPTEMBER).read_text(encoding="utf-8") == (
        '{"type":"call","time":"2026-09-21T13:33:20.000Z","request_id":"req_1","key":"alice","team":"",'
        '"upstream":"main","model":"claude-test","model_served":"claude-test-1","path":"/v1/messages","stream":true,"status":200,'
        '"outcome":"completed","error_type":"","attempts":1,"input_tokens":10,"output_tokens":20,'
        '"cache_write_5m_tokens":30,"cache_write_1h_tokens":40,"cache_read_tokens":120,"weighted_tokens":112,"estimated":false,'
        '"cost_usd":0.000798,"price":{"input":3.0,"output":15.0,"cache_write_5m":3.75,"cache_write_1h":6.0,'
        '"cache_read":0.3},"premiums":{},"charges":[],"first_byte_ms":1.5,"duration_ms":20.25,"queued_ms":0.0,"bytes_up":100,'
        '"bytes_down":200,"session":"s-1",'
        '"client":"192.0.2.1","user_agent":"a\\nb \u2028 é","upstream_request_id":"req_up",'
        '"chain":"7b3f8f52d4716e12429ec91c3e73197f"}\n'
    )


def test_each_entry_is_in_the_file_when_append_returns(make_ledger, tmp_path):
    """
    What a killed process has booked is booked: nothing waits in our memory while the disk takes it.
    """
    ledger, seen = make_ledger(), []

    for number in (1, 2, 3):
        ledger.append(entry(number))
        seen.append((numbers(tmp_path / SEPTEMBER), ledger.waiting))

    assert seen == [(requests(1, 1), 0), (requests(1, 2), 0), (requests(1, 3), 0)]


def test_a_restart_goes_on_behind_the_last_line(make_ledger, tmp_path):
    """
    The ledger is the only memory: opening it changes nothing.
    """
    first = make_ledger()
    first.append(entry(1))
    first.close()

    second = make_ledger()
    second.open()
    second.append(entry(2))

    assert numbers(tmp_path / SEPTEMBER) == requests(1, 2)


def test_a_missing_folder_is_made(make_ledger, tmp_path):
    """
    A first start needs no mkdir, and others on the host cannot read who asked for what.
    """
    directory = tmp_path / "var" / "lib" / "usage"
    ledger = make_ledger(directory)

    ledger.open()
    made = [path.name for path in directory.iterdir()]
    ledger.append(entry(1))

    assert made == [SEPTEMBER]
    assert numbers(directory / SEPTEMBER) == requests(1, 1)
    assert (directory / SEPTEMBER).stat().st_mode & 0o007 == 0


def test_a_folder_that_cannot_be_made_is_known_at_the_start(make_ledger, tmp_path):
    """
    A gateway that cannot book does not start.
    """
    (tmp_path / "file").touch()
    ledger = make_ledger(tmp_path / "file" / "usage")

    with pytest.raises(OSError) as caught:
        ledger.open()

    assert caught.value.errno == errno.ENOTDIR


# Months


def test_every_month_has_a_file_of_its_own(make_ledger, tmp_path):
    """
    A call belongs to the month in which it ended, by UTC; but the order of the files is that of the chain, so that a
    call of September that is booked after the first one of October stands in October's file.
    """
    ledger = make_ledger()
    times = [
        "2026-09-30T23:59:59.999Z",
        "2026-10-01T00:00:00.000Z",
        "2026-09-30T23:59:59.998Z",
        "2026-10-02T00:00:00.000Z",
    ]

    for number, time in enumerate(times, 1):
        ledger.append(entry(number, time))

    assert numbers(tmp_path / SEPTEMBER) == ["req_1"]
    assert numbers(tmp_path / OCTOBER) == ["req_2", "req_3", "req_4"]


def test_a_month_that_is_over_is_synced_and_closed(make_ledger, tmp_path, syncs):
    """
    Nothing is left behind in the cache, and years of months take up no descriptors.
    """
    ledger, before = make_ledger(), open_files()

    for number in range(1, 13):
        ledger.append(entry(number, f"2026-{number:02}-01T00:00:00.000Z"))
    settle(ledger)

    assert syncs.files == [f"usage-2026-{number:02}.jsonl" for number in range(1, 12)]
    assert open_files() <= before + 1


# Torn lines

TORN = '{"time":"2026-09-21T13:33:20.000Z","request_id":"req_'


@pytest.mark.logs("ledger: a torn last line of usage-2026-09.jsonl was set aside in usage-2026-09.torn")
@pytest.mark.parametrize("torn", [TORN, "{", "\0" * 4096, TORN + "x" * 200_000], ids=["cut", "a byte", "NULs", "long"])
@pytest.mark.parametrize("whole", [0, 2], ids=["alone", "behind others"])
def test_a_torn_last_line_is_set_aside_as_a_whole(make_ledger, tmp_path, torn, whole):
    """
    A crash in mid-write costs no other line, is never a reason not to start, and what is left of it is kept.
    """
    path = tmp_path / SEPTEMBER
    path.write_bytes(b"".join(msgspec.json.encode(entry(number)) + b"\n" for number in range(1, whole + 1)))
    with path.open("a") as file:
        file.write(torn)

    ledger = make_ledger()
    ledger.open()
    ledger.append(entry(whole + 1))

    assert numbers(path) == requests(1, whole + 1)
    assert (tmp_path / "usage-2026-09.torn").read_text() == torn + "\n"


@pytest.mark.logs("ledger: a torn last line of usage-2026-09.jsonl was set aside in usage-2026-09.torn")
def test_every_torn_line_is_kept(make_ledger, tmp_path):
    """
    A second crash does not wipe out what the first one left.
    """
    for torn in ("first", "second"):
        with (tmp_path / SEPTEMBER).open("a") as file:
            file.write(torn)
        ledger = make_ledger()
        ledger.open()
        ledger.close()

    assert (tmp_path / "usage-2026-09.torn").read_text() == "first\nsecond\n"
    assert (tmp_path / SEPTEMBER).read_text() == ""


@pytest.mark.logs("ledger: cannot write to", "ledger: a torn last line", "can be written again")
def test_a_torn_line_that_cannot_be_set_aside_costs_no_descriptors(make_ledger, tmp_path):
    """
    A disk that stays full is asked again four times a second, for days.
    """
    (tmp_path / SEPTEMBER).write_text(TORN)
    (tmp_path / "usage-2026-09.torn").mkdir()
    ledger = make_ledger()
    ledger.append(entry(1))
    before = open_files()

    for _ in range(50):
        ledger.tick()
    after = open_files()
    (tmp_path / "usage-2026-09.torn").rmdir()
    ledger.tick()

    assert after == before
    assert numbers(tmp_path / SEPTEMBER) == requests(1, 1)
    assert (tmp_path / "usage-2026-09.torn").read_text() == TORN + "\n"


class FailingDisk:
    """Writes so many bytes of each piece that it is given, then refuses; it may refuse to cut a file, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, cuts: bool) -> None:
        self.room, self.sizes = room, list[int]()
        self._write, self._is_full = os.write, False
        monkeypatch.setattr(os, "write", self.write)
        if not cuts:
            monkeypatch.setattr(os, "ftruncate", self.refuse)

    def write(self, fd: int, data: bytes) -> int:
        self.sizes.append(len(data))
        self._is_full = not self._is_full
        if not self._is_full or not self.room:
            self.refuse()
        return self._write(fd, data[: self.room])

    def refuse(self, *_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.logs("ledger: ")
@pytest.mark.parametrize("cuts", [True, False], ids=["it is cut off", "it cannot be cut off"])
@pytest.mark.parametrize("room", [0, 1, 300, 1000, 2000])
def test_what_a_disk_takes_of_a_batch_is_whole_and_stands_there_once(make_ledger, tmp_path, monkeypatch, room, cuts):
    """
    The entries of one turn share a write, of which a disk may take any part; the rest of a line is no line's beginning.
    """
    ledger = make_ledger()
    ledger.append(entry(1))
    with monkeypatch.context() as patch:
        FailingDisk(patch, room, cuts)
        for number in range(2, 21):
            ledger.note(entry(number))
        ledger.write()
        ledger.write()
        waiting = ledger.waiting
    ledger.tick()

    assert waiting > 0
    assert numbers(tmp_path / SEPTEMBER) == requests(1, 20)
    g.LedgerFiles(tmp_path).verify("", lambda line: None)


@pytest.mark.logs("ledger: cannot write to", "can be written again")
def test_a_disk_that_refuses_is_not_given_the_whole_queue_each_time(make_ledger, tmp_path, monkeypatch):
    """
    It is asked in each turn in which a call ends: 5,000 entries in each took 20 ms.
    """
    ledger = make_ledger()
    ledger.append(entry(1))
    size = (tmp_path / SEPTEMBER).stat().st_size
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, 0, True)
        for number in range(2, 502):
            ledger.note(entry(number))
        ledger.write()

    assert ledger.waiting == 500
    assert max(disk.sizes) < 70 * size
    ledger.tick()
    assert numbers(tmp_path / SEPTEMBER) == requests(1, 501)


# Files that others move


def test_a_removed_file_is_made_again(make_ledger, tmp_path):
    """
    Who deletes the file gives up what was in it, and nothing after that.
    """
    ledger = make_ledger()
    ledger.append(entry(1))

    (tmp_path / SEPTEMBER).unlink()
    ledger.reopen_if_moved()
    ledger.append(entry(2))

    assert numbers(tmp_path / SEPTEMBER) == ["req_2"]


@pytest.mark.parametrize("is_replaced", [False, True], ids=["moved", "moved, with an empty file in its place"])
def test_a_moved_file_is_left_and_a_new_one_begun(make_ledger, tmp_path, is_replaced):
    """
    Log rotation may take the file at any time; no entry is in two files or in none.
    """
    ledger, before = make_ledger(), open_files()
    ledger.append(entry(1))

    (tmp_path / SEPTEMBER).rename(tmp_path / "old.jsonl")
    if is_replaced:
        (tmp_path / SEPTEMBER).touch()
    ledger.append(entry(2))
    ledger.reopen_if_moved()
    ledger.reopen_if_moved()
    ledger.append(entry(3))
    settle(ledger)

    assert numbers(tmp_path / "old.jsonl") == requests(1, 2)
    assert numbers(tmp_path / SEPTEMBER) == ["req_3"]
    assert open_files() <= before + 1


def test_a_removed_folder_is_made_again(make_ledger, tmp_path):
    """
    The folder may be a volume that somebody has emptied.
    """
    ledger = make_ledger(tmp_path / "usage")
    ledger.append(entry(1))

    (tmp_path / "usage" / SEPTEMBER).unlink()
    (tmp_path / "usage").rmdir()
    ledger.reopen_if_moved()
    ledger.append(entry(2))

    assert numbers(tmp_path / "usage" / SEPTEMBER) == ["req_2"]


@pytest.mark.logs("ledger: cannot write to", "can be written again")
def test_a_replaced_folder_has_one_writer(make_ledger, tmp_path):
    """
    A folder may be moved away and made again while a gateway runs: two had written into the new one. What is written
    there is a ledger of its own, which `usage verify` had called broken.
    """
    usage = tmp_path / "usage"
    ledger = make_ledger(usage)
    ledger.hold()
    ledger.append(entry(1))

    usage.rename(tmp_path / "old")
    other = g.hold_folder(usage)
    ledger.reopen_if_moved()
    ledger.append(entry(2))

    assert "another gateway runs on it" in ledger.failure
    assert (ledger.waiting, list(usage.iterdir())) == (1, [])

    os.close(other)
    ledger.tick()

    assert (ledger.failure, numbers(usage / SEPTEMBER)) == ("", ["req_2"])
    assert len(chained(usage)) == len(chained(tmp_path / "old")) == 32  # two ledgers, each with its chain
    with pytest.raises(BlockingIOError):
        g.hold_folder(usage)


def test_a_file_that_stayed_is_not_opened_again(make_ledger, tmp_path, syncs):
    """
    Looking costs a stat; a file that was cut to nothing under us is still the same one.
    """
    ledger = make_ledger()
    ledger.reopen_if_moved()
    ledger.append(entry(1))

    ledger.tick()
    os.truncate(tmp_path / SEPTEMBER, 0)
    ledger.reopen_if_moved()
    ledger.append(entry(2))
    settle(ledger)

    assert numbers(tmp_path / SEPTEMBER) == ["req_2"]
    assert syncs.files == []


# The disk that is asked to keep it


class Syncs:
    """Every fsync that reaches the system: the names of the files. `gate` holds them up, `fail` lets them fail."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False
        self._fsync = os.fsync

    def fsync(self, fd: int) -> None:
        self.files.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        assert self.gate.wait(5)
        if self.fail:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(fd)


@pytest.fixture
def syncs(monkeypatch) -> Iterator[Syncs]:
    """What the system is asked to sync."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is synced")
    seen = Syncs()
    monkeypatch.setattr(os, "fsync", seen.fsync)
    yield seen
    seen.gate.set()


def settle(ledger: g.Ledger) -> None:
    """Wait until the ledger's own thread has done what it was given."""
    ledger._disk.submit(int).result(timeout=5)


def test_fsync_never_leaves_it_to_the_system_until_the_end(make_ledger, clock, syncs):
    """
    The operator chose speed; a clean stop still loses nothing.
    """
    ledger = make_ledger(fsync_s=math.inf)

    ledger.append(entry(1))
    clock.advance(600_000)
    ledger.tick()
    settle(ledger)
    before = list(syncs.files)
    ledger.close()

    assert (before, syncs.files) == ([], [SEPTEMBER])


def test_fsync_always_syncs_each_entry(make_ledger, syncs):
    """
    What was answered is on the disk a moment later, without waiting for a tick.
    """
    ledger, counts = make_ledger(fsync_s=0), []

    for number in (1, 2, 3):
        ledger.append(entry(number))
        settle(ledger)
        counts.append(len(syncs.files))

    assert counts == [1, 2, 3]


def test_a_slow_disk_is_asked_once_for_all_that_came_meanwhile(make_ledger, tmp_path, syncs):
    """
    A sync never holds up a call, and never runs twice at a time; the last entry is covered all the same.
    """
    ledger = make_ledger(fsync_s=0)
    syncs.gate.clear()

    for number in range(1, 21):
        ledger.append(entry(number))
        ledger.tick()
    written = numbers(tmp_path / SEPTEMBER)
    syncs.gate.set()
    settle(ledger)
    first = len(syncs.files)
    ledger.tick()
    settle(ledger)
    ledger.tick()
    settle(ledger)

    assert written == requests(1, 20)
    assert (first, len(syncs.files)) == (1, 2)


def test_fsync_of_one_second_syncs_once_a_second_and_only_what_is_new(make_ledger, clock, syncs):
    """
    A crash of the host costs a second of entries at most; an idle gateway lets the disk sleep.
    """
    ledger, counts = make_ledger(fsync_s=1.0), []

    for number in range(20):
        if number in (0, 1, 2, 9):
            ledger.append(entry(number))
        clock.advance(0.25)
        ledger.tick()
        settle(ledger)
        counts.append(len(syncs.files))

    assert counts == [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.logs("ledger: fsync in")
def test_a_failed_sync_is_told_and_tried_again(make_ledger, clock, syncs):
    """
    An error of the disk is seen in the log, not by the clients.
    """
    ledger = make_ledger(fsync_s=1.0)
    ledger.append(entry(1))

    syncs.fail = True
    clock.advance(1)
    ledger.tick()
    settle(ledger)
    syncs.fail = False
    clock.advance(1)
    ledger.tick()
    settle(ledger)
    clock.advance(1)
    ledger.tick()
    settle(ledger)

    assert syncs.files == [SEPTEMBER, SEPTEMBER]


# The disk that refuses

REFUSED = ("ledger: cannot write to", "can be written again")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a disk that refuses, for everybody."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount_small_disk(disk: str | Path) -> bool:
    """Mount a file system of 64 KB; whether that worked."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    return bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True).returncode == 0


def can_mount() -> bool:
    """Whether this process may mount: root in a container often may not."""
    with tempfile.TemporaryDirectory() as disk:
        mounted = mount_small_disk(disk)
        if mounted:
            subprocess.run(["umount", disk], check=True)
    return mounted


needs_mount = pytest.mark.skipif(not can_mount(), reason="a small disk cannot be mounted here: that needs root")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    assert mount_small_disk(disk)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@needs_mount
@pytest.mark.logs(*REFUSED)
def test_entries_wait_in_their_order_for_a_full_disk(small_disk, make_ledger, caplog):
    """
    The line that was cut in the middle is taken back; nothing is lost, doubled or out of order.
    """
    (small_disk / "other").write_bytes(b"x" * (56 << 10))
    ledger = make_ledger(small_disk)

    for number in range(1, 31):
        ledger.append(entry(number))
    size, failure, waiting = (small_disk / SEPTEMBER).stat().st_size, ledger.failure, ledger.waiting
    half = numbers(small_disk / SEPTEMBER)
    (small_disk / "other").unlink()
    ledger.tick()

    assert failure == "No space left on device"
    assert 0 < waiting < 30 and len(half) == 30 - waiting and size <= 8192
    assert numbers(small_disk / SEPTEMBER) == requests(1, 30)
    assert (ledger.failure, ledger.waiting) == ("", 0)
    assert [text for text in REFUSED for record in caplog.records if text in record.getMessage()] == list(REFUSED)


@needs_mount
@pytest.mark.logs("ledger: cannot write to", "ledger: 3 entries could not be written: No space left on device")
def test_what_never_found_room_is_told_at_the_end(small_disk, make_ledger):
    """
    A stop does not wait for ever, and does not pretend.
    """
    (small_disk / "other").write_bytes(b"x" * (64 << 10))
    ledger = make_ledger(small_disk)

    for number in (1, 2, 3):
        ledger.append(entry(number))
    ledger.close()

    assert ledger.waiting == 3


@needs_mount
@pytest.mark.logs(*REFUSED)
def test_room_made_by_removing_the_ledgers_own_file_is_used(small_disk, make_ledger):
    """
    The largest file on a full disk is the first that goes; we must not be the ones who keep it from going.
    """
    ledger, number = make_ledger(small_disk), 0
    while not ledger.failure:
        number += 1
        ledger.append(entry(number))
    ledger.append(entry(number + 1))

    (small_disk / SEPTEMBER).unlink()
    for _ in range(2):
        ledger.reopen_if_moved()
        ledger.tick()
        settle(ledger)

    assert (ledger.failure, ledger.waiting) == ("", 0)
    assert numbers(small_disk / SEPTEMBER) == requests(number, number + 1)


@pytest.mark.logs(*REFUSED)
def test_a_line_cut_by_a_refusal_is_taken_back_and_written_as_a_whole(make_ledger, tmp_path):
    """
    A write may take only the beginning of a line; who reads the file meanwhile sees whole lines only.
    """
    ledger = make_ledger()
    ledger.append(entry(1))
    line = (tmp_path / SEPTEMBER).stat().st_size

    with files_of_at_most(line * 2 - 100):
        ledger.append(entry(2))
        ledger.append(entry(3))
        ledger.tick()
        size, failure, waiting = (tmp_path / SEPTEMBER).stat().st_size, ledger.failure, ledger.waiting
    ledger.append(entry(4))

    assert (size, failure, waiting) == (line, "File too large", 2)
    assert numbers(tmp_path / SEPTEMBER) == requests(1, 4)
    assert (ledger.failure, ledger.waiting) == ("", 0)


@pytest.mark.logs(*REFUSED)
def test_a_cut_line_whose_file_was_moved_is_written_again_as_a_whole(make_ledger, tmp_path):
    """
    Half a line in a file that others took away is worth nothing; the entry is still ours to book.
    """
    ledger = make_ledger()
    ledger.append(entry(1))
    line = (tmp_path / SEPTEMBER).stat().st_size

    with files_of_at_most(line * 2 - 100):
        ledger.append(entry(2))
        (tmp_path / SEPTEMBER).rename(tmp_path / "old.jsonl")
        ledger.reopen_if_moved()
        ledger.tick()

    assert (ledger.failure, ledger.waiting) == ("", 0)
    assert numbers(tmp_path / SEPTEMBER) == ["req_2"]
    assert numbers(tmp_path / "old.jsonl") == ["req_1"]


@pytest.mark.logs(*REFUSED)
def test_entries_wait_over_the_end_of_a_month(make_ledger, tmp_path):
    """
    They are written in their order; who comes after October's first line goes into October's file.
    """
    ledger = make_ledger()
    ledger.append(entry(1))
    line = (tmp_path / SEPTEMBER).stat().st_size

    with files_of_at_most(line * 2 - 100):
        ledger.append(entry(2))
        ledger.append(entry(3, "2026-10-01T00:00:00.000Z"))
        ledger.append(entry(4))
    ledger.tick()

    assert numbers(tmp_path / SEPTEMBER) == requests(1, 2)
    assert numbers(tmp_path / OCTOBER) == requests(3, 4)


@pytest.mark.logs(*REFUSED)
def test_new_calls_are_refused_before_an_entry_would_not_fit(make_ledger, tmp_path):
    """
    The queue has a bound; every call that runs has a place in it.
    """
    (tmp_path / "usage").touch()
    ledger = make_ledger(tmp_path / "usage")
    empty = [ledger.has_room(running) for running in (0, 9_999, 10_000)]

    for number in (1, 2, 3):
        ledger.append(entry(number))
    three = [ledger.has_room(running) for running in (0, 9_996, 9_997)]
    failure = ledger.failure
    (tmp_path / "usage").unlink()
    ledger.tick()

    assert (empty, three) == ([True, True, False], [True, True, False])
    assert failure == "File exists"
    assert ledger.has_room(9_999) and numbers(tmp_path / "usage" / SEPTEMBER) == requests(1, 3)


# Chain


def chained(directory: Path, seen: str = "") -> str:
    """What `verify` says: the last value of the chain, or where it breaks."""
    try:
        return g.LedgerFiles(directory).verify(seen, lambda text: None)
    except g.BrokenChain as error:
        return str(error).partition(": ")[0]


@pytest.fixture
def three_months(make_ledger, tmp_path, clock) -> Path:
    """Three lines in each of three months, one of them a correction; closed."""
    clock.advance(-82 * 86400)
    ledger = make_ledger()
    ledger.open()
    for number in range(1, 9):
        ledger.append(entry(number, f"2026-{7 + (number - 1) // 3:02}-0{number}T10:00:00.000Z"))
    ledger.append(g.Adjustment(time="2026-09-09T10:00:00.000Z", key="alice", cost_usd=-1.0, note="refund"))
    ledger.close()
    clock.advance(82 * 86400)
    return tmp_path


def test_each_line_carries_a_hash_over_itself_and_the_line_before(three_months):
    """
    Anybody can check the ledger with a few lines of his own: BLAKE2b, 16 bytes, over the value before and the line
    with an empty value; the first line follows 32 zeros.
    """
    before, values = "0" * 32, []
    for path in sorted(three_months.glob("usage-*.jsonl")):
        for line in path.read_text().splitlines():
            head, value = line[: -len("0" * 32 + '"}')], line[-34:-2]
            before = hashlib.blake2b((before + head + '"}').encode(), digest_size=16).hexdigest()
            values.append((before, value))

    told: list[str] = []
    last = g.LedgerFiles(three_months).verify("", told.append)

    assert len(values) == 9 and all(expected == found for expected, found in values)
    assert last == before
    assert told == [f"usage-2026-0{month}.jsonl: 3 lines" for month in (7, 8, 9)]


def test_the_chain_goes_on_over_restarts_and_kills(make_ledger, tmp_path):
    """
    Whoever opens the file goes on where the last one stopped, whether he was stopped or killed.
    """
    for number in range(1, 5):
        ledger = make_ledger()
        ledger.open()
        ledger.append(entry(number, f"2026-{8 + number:02}-01T00:00:00.000Z"))
        if number % 2:
            ledger.close()
        else:
            os.close(ledger._fd)  # what a kill does: the lock goes, too
            ledger._fd = -1

    assert len(chained(tmp_path)) == 32


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Change a file's lines."""
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


TAMPERED = {
    "a digit changed": (
        lambda a: [a[0], a[1].replace(b'"status":200', b'"status":201'), a[2]],
        "usage-2026-08.jsonl:2",
    ),
    "a cost changed": (lambda a: [a[0].replace(b"0.000798", b"0.0"), *a[1:]], "usage-2026-08.jsonl:1"),
    "a chain value changed": (lambda a: [a[0], a[1][:-4] + b'x"}\n', a[2]], "usage-2026-08.jsonl:2"),
    "the first removed": (lambda a: a[1:], "usage-2026-08.jsonl:1"),
    "the middle removed": (lambda a: [a[0], a[2]], "usage-2026-08.jsonl:2"),
    "the last removed": (lambda a: a[:2], "usage-2026-09.jsonl:1"),
    "all removed": (lambda a: [], "usage-2026-09.jsonl:1"),
    "one inserted": (lambda a: [a[0], msgspec.json.encode(entry(7)) + b"\n", *a[1:]], "usage-2026-08.jsonl:2"),
    "one doubled": (lambda a: [a[0], a[1], a[1], a[2]], "usage-2026-08.jsonl:3"),
    "two swapped": (lambda a: [a[0], a[2], a[1]], "usage-2026-08.jsonl:2"),
    "an empty line": (lambda a: [a[0], b"\n", *a[1:]], "usage-2026-08.jsonl:2"),
    "no newline": (lambda a: [a[0], a[1][:-1], a[2]], "usage-2026-08.jsonl:2"),
}


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize(("change", "place"), TAMPERED.values(), ids=TAMPERED)
def test_verify_names_the_first_line_that_does_not_follow(three_months, change, place, is_packed):
    """
    What was spent cannot be made to look less without being seen, and the place is told.
    """
    rewrite(three_months / "usage-2026-08.jsonl", change)
    if is_packed:
        g.LedgerFiles(three_months).archive(lambda text: None)
        place = place.replace("08.jsonl", "08.jsonl.gz")

    assert chained(three_months) == place


def test_lines_cut_off_at_the_end_are_missed_by_who_kept_a_value(three_months):
    """
    An unbroken chain says nothing about its end; a value that was written down elsewhere does.
    """
    last = chained(three_months)
    kept = [chained(three_months, seen=value) for value in (last, "0" * 31 + "1")]
    rewrite(three_months / SEPTEMBER, lambda lines: lines[:-1])

    assert kept == [last, f"no line has the chain value {'0' * 31}1"]
    assert len(chained(three_months)) == 32
    assert chained(three_months, seen=last) == f"no line has the chain value {last}"


@pytest.mark.logs("ledger: a torn last line of usage-2026-09.jsonl was set aside")
def test_a_torn_line_breaks_the_chain_only_until_the_next_start(three_months, make_ledger):
    """
    Half a line was never booked; the chain goes on behind the last whole one.
    """
    with (three_months / SEPTEMBER).open("a") as file:
        file.write(TORN)
    torn = chained(three_months)
    ledger = make_ledger()
    ledger.open()
    ledger.append(entry(9))

    assert torn == "usage-2026-09.jsonl:4"
    assert len(chained(three_months)) == 32


# Counters over restarts


def counted(books: g.Books, now: float = START) -> object:
    """What the counters say, in every unit and window."""
    return {
        (*scope, unit, window): counters.spent(unit, g.WINDOWS[window], now)
        for scope, counters in sorted(books.fold.scopes.items())
        for unit in g.LIMIT_UNITS
        for window in tuple(g.WINDOWS)
    }


def kill(books: g.Books) -> None:
    """End a gateway without a word: only what the kernel has is kept."""
    os.close(books.ledger._fd)
    books.ledger._disk.shutdown()
    books.close()


def started(directory: Path, clock: FakeClock) -> g.Books:
    """The next start."""
    books = g.Books(g.Ledger(directory, math.inf, clock.clock), clock.clock, dt.UTC)
    books.load()
    return books


def reloaded(directory: Path, clock: FakeClock) -> g.Books:
    """What the next start counts, which was then killed."""
    books = started(directory, clock)
    kill(books)
    return books


def from_the_lines(directory: Path, clock: FakeClock) -> g.Books:
    """The same, from the lines alone."""
    g.Index.remove(directory)
    return reloaded(directory, clock)


def near(number: int, seconds: float, **fields: object) -> g.Entry:
    """An entry of a time around START."""
    return entry(number, g.utc_time(START + seconds), **fields)


def test_a_killed_gateway_finds_its_counters_again(make_books, tmp_path, clock):
    """
    Limits hold over a crash: what was spent is what the lines say, corrections and resets included.
    """
    books = make_books()
    ledger = books.ledger
    for number, seconds in enumerate((-2e6, -90_000, -20_000, -4000, -3000, -50, -20, -1)):
        ledger.append(
            near(number, seconds, key="ab"[number % 2], team="x" if number % 3 else "", cost_usd=0.1 * number)
        )
    ledger.append(g.Reset(time=g.utc_time(START - 0.5), scope="key", name="a", limit="usd/day"))
    ledger.append(g.Adjustment(time=g.utc_time(START - 0.4), team="x", requests=-1, input_tokens=7, cost_usd=-0.25))
    ledger.append(near(9, 0, key="a", team="x"))
    live = counted(books)
    books.close()

    assert counted(reloaded(tmp_path, clock)) == live
    assert counted(reloaded(tmp_path, clock)) == live
    assert counted(from_the_lines(tmp_path, clock)) == live


@pytest.mark.logs(*REFUSED, "ledger: 1 entries could not be written")
def test_what_waits_counts_here_and_not_after_a_crash(make_books, tmp_path, clock):
    """
    The index has what is in the files: an entry that never reached one would otherwise be counted for ever.
    """
    books = make_books()
    books.ledger.append(entry(1, cost_usd=3.0))
    books.close()  # the index; the counters go on
    with files_of_at_most((tmp_path / SEPTEMBER).stat().st_size + 10):
        books.ledger.append(entry(2, cost_usd=0.5))
        live = usd(books)
        books.ledger.close()

    assert (live, usd(reloaded(tmp_path, clock))) == (3.5, 3.0)
    books.ledger._waiting.clear()
    books.ledger._write()


# Corrections


def correction(cost_usd: float = -1.0, time: str = "2026-09-21T14:00:00.000Z") -> g.Adjustment:
    return g.Adjustment(time=time, key="alice", team="", cost_usd=cost_usd, note="by hand")


def usd(books: g.Books, window: str = "", now: float = START) -> float:
    """What alice has spent."""
    return books.fold.scope("key", "alice").spent("usd", g.WINDOWS[window], now) / 1e9


@given(st.lists(st.sampled_from(["call", "adjust", "reset", "restart", "kill", "month"]), max_size=25))
@settings(max_examples=30, deadline=None)
def test_calls_and_corrections_in_any_order_count_once(steps):
    """
    Whenever the gateway is stopped or killed: the counters are those of the lines, one chain.
    """
    clock = FakeClock()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        books = started(directory, clock)
        for number, step in enumerate(steps):
            clock.advance(32 * 86400 if step == "month" else 700)
            now = g.utc_time(clock.clock.wall())
            if step == "call":
                books.ledger.append(entry(number, now, cost_usd=0.5))
            elif step == "adjust":
                books.ledger.append(correction(0.125, now))
            elif step == "reset":
                books.ledger.append(g.Reset(time=now, scope="key", name="alice"))
            elif step == "month":
                books.ledger.tick()
            else:
                if step == "restart":
                    books.ledger.close()
                    books.close()
                else:
                    kill(books)
                g.Ledger.correct(directory, correction(0.0625, now), clock.clock)
                books = started(directory, clock)
        now_s = clock.clock.wall()
        live = counted(books, now=now_s)
        books.ledger.close()
        books.close()

        assert sum(len(path.read_bytes().splitlines()) for path in directory.glob("usage-*.jsonl")) == sum(
            step != "month" for step in steps
        )
        assert counted(reloaded(directory, clock), now=now_s) == live
        assert counted(from_the_lines(directory, clock), now=now_s) == live
        assert len(chained(directory)) == 32


BROKEN_LINES = [
    '{"type":"reset","time":"2026-09-21T14:00:00.000Z"}',
    '{"type":"reset","time":"2026-09-21T14:00:00.000Z","scope":"planet"}',
    '{"type":"reset","time":"2026-09-21T14:00:00.000Z","scope":"key","name":"alice","limit":"apples/day"}',
    '{"type":"adjust","time":"2026-09-21T14:00:00.000Z","key":"alice","cost_usd":1e306}',
    '{"type":"coffee","time":"2026-09-21T14:00:00.000Z","key":"alice"}',
    "not JSON at all",
]


@pytest.mark.logs("1 lines of the ledger cannot be read and count nothing: usage-2026-09.jsonl:2")
@pytest.mark.parametrize("line", BROKEN_LINES)
def test_a_line_made_by_hand_is_no_reason_not_to_start(make_books, tmp_path, clock, line):
    """
    Nothing in the file stops the gateway, neither at the start nor while it runs.
    """
    books = make_books()
    books.ledger.append(entry(1, cost_usd=3.0))
    with (tmp_path / SEPTEMBER).open("a") as file:
        file.write(line + "\n")
    clock.advance(2)
    books.tick()
    books.ledger.append(entry(2, cost_usd=0.5))

    assert usd(books) == 3.5
    books.close()
    assert usd(from_the_lines(tmp_path, clock)) == 3.5


# Archive


def everything(directory: Path, clock: FakeClock) -> object:
    """What counters, chain and pages say."""
    return counted(from_the_lines(directory, clock)), chained(directory), pages(directory, 2)


def pages(directory: Path, size: int, key: str = "alice", wanted: Callable[[g.Entry], bool] = lambda e: True) -> list:
    """The requests page by page, newest first."""
    found, before = [], ("9", 0)
    while before:
        entries, before, _ = g.LedgerFiles(directory).page(key, before, wanted, size)
        found.append([each.request_id for each in entries])
    return found


def test_archiving_changes_nothing_that_can_be_asked(three_months, clock):
    """
    Old months become a fraction as large, and count, verify and show as before; the newest stays as it is.
    """
    before = everything(three_months, clock)
    told: list[str] = []

    for _ in range(2):
        g.LedgerFiles(three_months).archive(told.append)

    assert everything(three_months, clock) == before
    assert sorted(path.name for path in three_months.glob("*usage*")) == [
        *("usage-2026-07.jsonl.gz", "usage-2026-08.jsonl.gz", "usage-2026-09.jsonl"),
    ]
    assert [line.partition(":")[0] for line in told] == ["usage-2026-07.jsonl.gz", "usage-2026-08.jsonl.gz"]


def test_a_month_that_is_there_twice_counts_once(three_months, clock):
    """
    A crash in archiving leaves both; the plain file is the whole one. The next run finishes the work.
    """
    before = everything(three_months, clock)
    (three_months / "usage-2026-08.jsonl.gz").write_bytes(b"half a gzip")

    twice = everything(three_months, clock)
    g.LedgerFiles(three_months).archive(lambda text: None)

    assert twice == before
    assert everything(three_months, clock) == before
    assert not (three_months / "usage-2026-08.jsonl").exists()


def test_the_chain_goes_on_behind_a_gzipped_month(make_ledger, three_months):
    """
    A gateway that starts on the first of a month finds only archives before it.
    """
    ledger = make_ledger()
    ledger.open()
    ledger.append(entry(10, "2026-10-01T00:00:00.000Z"))
    g.LedgerFiles(three_months).archive(lambda text: None)
    (three_months / OCTOBER).unlink()

    ledger.tick()  # a command waits for it
    g.Ledger.correct(three_months, correction(time="2026-10-02T00:00:00.000Z"), FakeClock().clock)

    assert len(chained(three_months)) == 32


# Pages


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """300 entries of three keys over five months, three of them gzipped; long ones, corrections and a torn line."""
    directory = tmp_path_factory.mktemp("many")
    ledger = g.Ledger(directory, math.inf, FakeClock().clock)
    for number in range(1, 301):
        time = f"2026-{4 + number // 61:02}-{1 + number % 28:02}T10:00:00.000Z"
        agent = "x" * (200_000 if number % 40 == 0 else 10) + ' "key":"alice", '
        ledger.append(
            entry(number, time, key=("alice", "bob", "al")[number % 3], user_agent=agent, status=200 + number % 2)
        )
        if number % 50 == 0:
            ledger.append(correction(time=time))
    ledger.close()
    files = g.LedgerFiles(directory)
    files.archive(lambda text: None)
    newest = files.paths()[-2]
    newest.with_suffix("").write_bytes(gzip.decompress(newest.read_bytes()))
    newest.unlink()
    with files.paths()[-1].open("a") as file:
        file.write(TORN)
    return directory


@given(st.integers(1, 350), st.sampled_from(["alice", "bob", "al", "nobody"]), st.booleans())
@example(100, "bob", False)
@example(1, "alice", True)
@settings(max_examples=25, deadline=None)
def test_pages_show_every_entry_once_newest_first(many, size, key, only_odd):
    """
    Whatever the size of a page, across months and archives; a filter leaves out and disturbs nothing.
    """
    which = {"alice": 0, "bob": 1, "al": 2}.get(key, 9)
    expected = [n for n in range(300, 0, -1) if n % 3 == which and (n % 2 or not only_odd)]

    found = pages(many, size, key, lambda each: each.status == 201 or not only_odd)

    assert [name for page in found for name in page] == [f"req_{number}" for number in expected]
    assert all(len(page) == size for page in found[:-1])


@given(
    st.integers(0, 70_000), st.sampled_from([1, 7, 500, 1 << 18]), st.sampled_from([1, 5000, 4 << 20]), st.booleans()
)
@example(0, 1 << 18, 4 << 20, True)
@example(70_000, 500, 1, True)
@settings(max_examples=20, deadline=None)
def test_a_file_is_read_backwards_whatever_the_size_of_its_blocks(lines_of_all_kinds, end, block, step, has_members):
    """
    Plain or gzipped, in one piece or in several; from any place, also from within a line or behind the end.
    """
    content, plain = lines_of_all_kinds
    end, packed = min(end, len(content)), plain.with_suffix(".gz")
    with constants(g, BLOCK=block, MEMBER=max(step, 100)), constants(g.Content, WINDOW=step + 4999):
        packed.write_bytes(gzip.compress(content))
        if has_members:
            with open(plain, "rb") as file, open(packed, "wb") as out:
                g.write_members(file, out)
            assert gzip.decompress(packed.read_bytes()) == content
        contents = [g.Content(plain), g.Content(packed)]
        read = [list(g.marked_lines(each.blocks_before(end), end, b"mark")) for each in contents]

    lines, places, place = content[:end].splitlines(keepends=True), [], 0
    for line in lines:
        places.append(place)
        place += len(line)
    expected = [(place, line) for place, line in zip(places, lines, strict=True) if b"mark" in line][::-1]
    assert [each.size for each in contents] == [len(content)] * 2
    for found in read:
        assert [(place, line) for place, line in found if line] == expected
        stops = [place for place, line in found if not line]
        assert stops == sorted(stops, reverse=True) and set(stops) <= {*places, end} and stops[-1:] in ([], [0])


@contextlib.contextmanager
def constants(of: object, **values: int) -> Iterator[None]:
    """Other bounds for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(of, name, value)
        yield


@pytest.fixture(scope="module")
def lines_of_all_kinds(tmp_path_factory) -> tuple[bytes, Path]:
    """Short and long lines, with and without a mark."""
    lines = [b"mark %d %s\n" % (n, b"x" * (n * n % 300)) if n % 3 else b"other %d\n" % n for n in range(500)]
    content = b"".join((*lines, b"\n", b"mark" * 3000 + b"\n", b"no end: mark"))
    plain = tmp_path_factory.mktemp("lines") / "plain"
    plain.write_bytes(content)
    return content, plain


def noisy_archive(ledger: g.Ledger) -> g.LedgerFiles:
    """An archive of 300 entries that is 300 KB large, and one entry in the month after it."""
    for number in range(300):
        ledger.append(entry(number, "2026-07-01T10:00:00.000Z", session=secrets.token_hex(1000)))
    ledger.append(entry(300))
    ledger.close()
    files = g.LedgerFiles(ledger.directory)
    files.archive(lambda text: None)
    return files


def test_a_page_of_an_archive_reads_no_more_of_it_than_it_shows(make_ledger, tmp_path, monkeypatch):
    """
    Each page of a month of 250 MB took a second, and one whose filter finds nothing sixteen. After the members that a
    page needs the rest of the file may as well be noise.
    """
    monkeypatch.setattr(g, "MEMBER", 50_000)
    files = noisy_archive(make_ledger())
    with open(files.paths()[0], "r+b") as file:
        file.seek(g.MEMBER_HEAD.size)
        file.write(b"\xff" * 20_000)

    entries, before, _ = files.page("alice", ("9", 0), lambda each: True, 50)
    more, *_ = files.page("alice", before, lambda each: True, 50)

    assert [each.request_id for each in entries + more] == [f"req_{number}" for number in range(300, 200, -1)]


@pytest.mark.logs("usage-2026-07.jsonl.gz is damaged and is shown only")
@pytest.mark.parametrize(
    ("keep", "noise", "edge"), [(0.5, b"", "req_0"), (0.9999, b"", "req_0"), (0.5, b"\xff" * 5000, "req_299")]
)
def test_of_a_damaged_archive_is_shown_what_can_be_had(make_ledger, tmp_path, monkeypatch, keep, noise, edge):
    """
    All before a cut, all behind some noise, and no traceback; less what was gzipped in one piece with it.
    """
    monkeypatch.setattr(g, "MEMBER", 50_000)
    path = noisy_archive(make_ledger()).paths()[0]
    data = path.read_bytes()
    kept = int(len(data) * keep)
    rest = data[kept + len(noise) :] if noise else b""
    path.write_bytes(data[:kept] + noise + rest)

    newest, *found = [name for page in pages(tmp_path, 50) for name in page]

    assert newest == "req_300" and len(found) > 100 and edge in (found[0], found[-1])
    assert found == [f"req_{number}" for number in range(int(found[0][4:]), int(found[-1][4:]) - 1, -1)]


@pytest.mark.parametrize("place", [0, 1, 10**15 - 1])
@pytest.mark.parametrize("is_archived", [False, True])
def test_a_page_before_any_place_is_a_page(three_months, place, is_archived):
    """
    Within a line, or far behind the end of the file, which was a traceback: places come from outside.
    """
    if is_archived:
        g.LedgerFiles(three_months).archive(lambda text: None)

    entries, following, _ = g.LedgerFiles(three_months).page("alice", ("2026-08", place), lambda each: True, 1000)

    everything = [name for page in pages(three_months, 1000) for name in page]
    found = [each.request_id for each in entries]
    assert found == everything[len(everything) - len(found) :] and following is None


def test_a_page_looks_through_so_many_bytes_and_no_more(three_months, monkeypatch):
    """
    A filter that finds nothing in years of entries gives an empty page and a place to go on from.
    """
    monkeypatch.setattr(g, "BLOCK", 1000)
    monkeypatch.setattr(g.LedgerFiles, "PAGE_BYTES", 2000)

    found = pages(three_months, 2, wanted=lambda each: each.request_id in ("req_1", "req_8"))

    assert [name for page in found for name in page] == ["req_8", "req_1"]
    assert [] in found


# Reading


def read(directory: Path, **bounds: str) -> tuple[list[str], int]:
    """The requests that are found, and how many lines could not be read."""
    files = g.LedgerFiles(directory)
    return [entry.request_id for entry in files.billed(**bounds)], files.unreadable.count


@pytest.fixture
def written(make_ledger, tmp_path) -> Path:
    """A ledger over the turn of a year."""
    ledger = make_ledger()
    times = [
        *("2025-12-31T23:59:59.999Z", "2026-01-01T00:00:00.000Z", "2026-01-31T12:00:00.000Z"),
        *("2026-02-01T00:00:00.000Z", "2026-02-01T08:30:00.000Z", "2026-02-02T00:00:00.000Z"),
    ]
    for number, time in enumerate(times, 1):
        ledger.append(entry(number, time))
    return tmp_path


@pytest.mark.parametrize(
    ("bounds", "found"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"since": "2026"}, [2, 3, 4, 5, 6]),
        ({"until": "2026"}, [1]),
        ({"since": "2026-01", "until": "2026-02"}, [2, 3]),
        ({"since": "2026-02-01"}, [4, 5, 6]),
        ({"until": "2026-02-01"}, [1, 2, 3]),
        ({"since": "2026-02-01", "until": "2026-02-02"}, [4, 5]),
        ({"since": "2026-02-01T08", "until": "2026-02-01T09"}, [5]),
        ({"since": "2026-02-01T08:30:00.000Z", "until": "2026-02-02T00:00:00.000Z"}, [5]),
        ({"since": "2026-02-01T08:30:00.001Z"}, [6]),
        ({"since": "2026-03"}, []),
        ({"until": "2025"}, []),
        ({"since": "2026-02", "until": "2026-01"}, []),
    ],
)
def test_entries_are_found_by_time(written, bounds, found):
    """
    A time may be given as far as one likes: a year, a month, a day, an hour. The end is not counted.
    """
    assert read(written, **bounds) == ([f"req_{number}" for number in found], 0)


def test_no_folder_and_no_files_are_no_entries(tmp_path):
    """
    A report before the first call is empty, not an error.
    """
    assert read(tmp_path) == ([], 0)
    assert read(tmp_path / "missing") == ([], 0)


UNREADABLE = {
    "a torn line": b'{"time":"2026-09-21T13:33:20.000Z","request',
    "an empty line": b"",
    "NULs": b"\0" * 100,
    "not UTF-8": msgspec.json.encode(entry(9, key="bob")).replace(b"bob", b"b\xffb"),
    "another shape": b"[1, 2]",
    "a word for a number": msgspec.json.encode(entry(9)).replace(b'"status":200', b'"status":"200"'),
    "a field too few": b'{"time":"2026-09-21T13:33:20.000Z","request_id":"req_9"}',
}


@pytest.mark.parametrize("line", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_line_is_counted_and_costs_no_other(tmp_path, line):
    """
    A report over a damaged ledger is still a report, and says that it is not all.
    """
    good = [msgspec.json.encode(entry(number)) for number in (1, 2)]
    (tmp_path / SEPTEMBER).write_bytes(b"\n".join([good[0], line, good[1], line]) + b"\n")

    assert read(tmp_path) == (["req_1", "req_2"], 2)


@pytest.mark.logs("ledger: 1203 lines of the ledger cannot be read and count nothing: usage-2026-09.jsonl:1500")
def test_a_line_that_cannot_be_read_is_named_wherever_it_is(make_books, tmp_path):
    """
    The first of them by file and line, megabytes behind the beginning, and how many there are besides.
    """
    lines = [msgspec.json.encode(entry(number)) for number in range(3000)]
    lines[1499] = b"{}"
    lines[1700:2902] = [b"[]"] * 1202
    (tmp_path / SEPTEMBER).write_bytes(b"\n".join(lines) + b"\n")
    make_books()
    files = g.LedgerFiles(tmp_path)

    assert len(list(files.lines())) == 3000 - 1203
    assert files.unreadable.report() == [f"{SEPTEMBER}:{n}" for n in (1500, 1701, 1702, 1703, 1704)] + ["1198 more"]


GOLDEN = Path(__file__).with_name("ledger-2026-11.jsonl")


@pytest.fixture
def golden(tmp_path) -> Path:
    """A ledger as version 0.1.0 wrote it in November 2026: calls, a discarded attempt, a correction and a reset."""
    shutil.copy(GOLDEN, tmp_path / SEPTEMBER)
    return tmp_path


def test_lines_of_a_released_format_are_read_for_ever(golden, make_books):
    """
    They are written as they were, beside fields that are new; limits and reports have what they had.
    """
    files, books = g.LedgerFiles(golden), make_books()
    lines = list(files.lines())
    (total,) = g.summarize(lines, ["key"], dt.UTC)
    team = books.fold.scope("team", "red")

    kept = [json.loads(line) for line in GOLDEN.read_bytes().splitlines()]
    written = [json.loads(msgspec.json.encode(line)) for line in lines]
    for old, new in zip(kept, written, strict=True):
        assert [(name, value) for name, value in new.items() if name in old] == list(old.items())
    assert files.unreadable.count == 0
    assert len(chained(golden)) == 32
    assert total == g.Total({"key": "alice"}, 2, 1, -470, 60, 210, 360, -0.225754, 3.6)
    assert team.spent("tokens", g.WINDOWS["month"], START) == 3 * (10 + 20 + 70 + 12) - 500
    assert team.spent("usd", g.WINDOWS["month"], START) == -225_754_000
    assert team.spent("usd", g.WINDOWS["day"], START + 7) == 0
    assert books.fold.scope("key", "alice").spent("usd", g.WINDOWS["day"], START) == -225_754_000


def test_a_line_without_one_of_its_fields_is_read():
    """
    A field that is added later has a default, or the calls from before it would disappear from every report.
    """
    decoder, needed = msgspec.json.Decoder(g.LedgerLine), {"type", "time", "scope"}
    for line in GOLDEN.read_bytes().splitlines():
        fields = json.loads(line)
        for name in fields.keys() - needed:
            without = {key: value for key, value in fields.items() if key != name}
            assert decoder.decode(msgspec.json.encode(without)).time == fields["time"], name


def test_a_field_of_a_later_version_is_no_matter(tmp_path):
    """
    Going back to an older version keeps the reports.
    """
    line = msgspec.json.encode(entry(1)).replace(b'{"time"', b'{"new_field":{"a":[1]},"time"')
    (tmp_path / SEPTEMBER).write_bytes(line + b"\n")

    assert read(tmp_path) == (["req_1"], 0)


def test_other_files_in_the_folder_are_no_ledger(written):
    """
    What was set aside, and what the operator keeps beside it, is not counted.
    """
    for name in ("usage-2026-01.torn", "notes.jsonl", "usage-2026-01.jsonl~", ".usage-2026-01.jsonl.gz", "usage.gz"):
        (written / name).write_text("x\n")

    assert read(written) == (requests(1, 6), 0)


# Sums


def test_totals_are_sums_per_group(tmp_path):
    """
    One pass over the entries gives every report; what did not complete is counted and paid for all the same.
    """
    entries = [
        entry(1, model="b", cost_usd=0.1),
        entry(2, model="a", cost_usd=0.2),
        entry(3, model="b", cost_usd=0.2, outcome="client_gone"),
        entry(4, model="b", key="bob", cost_usd=0.0000001, outcome="upstream_cut"),
    ]

    totals = g.summarize(entries, ["key", "model"], dt.UTC)

    assert totals == [
        g.Total({"key": "alice", "model": "a"}, 1, 0, 10, 20, 70, 120, 0.2, 0.6),
        g.Total({"key": "alice", "model": "b"}, 2, 1, 20, 40, 140, 240, 0.3, 0.6),
        g.Total({"key": "bob", "model": "b"}, 1, 1, 10, 20, 70, 120, 0.0000001, 0.6),
    ]


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        ((0, 0, 0, 0), None),
        ((100, 0, 0, 0), 0.0),
        ((0, 0, 0, 100), 1.0),
        ((100, 50, 50, 200), 0.5),
        ((1, 0, 0, 2), 0.6667),
    ],
)
def test_the_cache_hit_rate_is_reads_over_all_input(tokens, rate):
    """
    Cache writes are input too; without input there is no rate.
    """
    names = ("input_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "cache_read_tokens")
    fields = dict(zip(names, tokens, strict=True))

    (total,) = g.summarize([entry(1, **fields)], ["key"], dt.UTC)

    assert total.cache_hit_rate == rate


def test_the_rate_of_a_group_is_that_of_its_sums():
    """
    A large call weighs more than a small one.
    """
    nothing = {"cache_write_5m_tokens": 0, "cache_write_1h_tokens": 0}
    small = entry(1, input_tokens=10, cache_read_tokens=0, **nothing)
    large = entry(2, input_tokens=0, cache_read_tokens=90, **nothing)

    (total,) = g.summarize([small, large], ["key"], dt.UTC)

    assert total.cache_hit_rate == 0.9


@pytest.mark.parametrize(
    ("timezone", "days"),
    [
        ("UTC", {"2026-10-31": 2, "2026-11-01": 2}),
        ("Asia/Shanghai", {"2026-11-01": 3, "2026-11-02": 1}),
        ("America/New_York", {"2026-10-31": 3, "2026-11-01": 1}),
        ("Pacific/Kiritimati", {"2026-11-01": 3, "2026-11-02": 1}),
    ],
)
def test_days_and_months_turn_over_where_the_operator_lives(timezone, days):
    """
    The ledger keeps UTC; a report's day is the calendar's of `server.timezone`, summer time included.
    """
    times = [
        "2026-10-31T16:00:00.000Z",
        "2026-10-31T23:59:59.999Z",
        "2026-11-01T03:59:59.999Z",
        "2026-11-01T16:00:00.000Z",
    ]

    totals = g.summarize([entry(1, time) for time in times], ["month", "day"], zoneinfo.ZoneInfo(timezone))

    assert {total.group["day"]: total.calls for total in totals} == days
    assert all(total.group["day"].startswith(total.group["month"]) for total in totals)


# Times

EPOCH = dt.datetime(1970, 1, 1)
LAST_DAY = int((dt.datetime(9999, 12, 31, 23, 59, 59) - EPOCH).total_seconds())


@given(st.integers(0, LAST_DAY * 1000))
@example(0)
@example(1_790_000_000_000)
@example(int((dt.datetime(2027, 1, 1) - EPOCH).total_seconds() * 1000) - 1)
@example(int((dt.datetime(2028, 3, 1) - EPOCH).total_seconds() * 1000) - 1)
def test_a_time_is_written_as_the_calendar_has_it(milliseconds):
    """
    Over the ends of months, years and leap years.
    """
    expected = EPOCH + dt.timedelta(milliseconds=milliseconds)

    assert g.utc_time(milliseconds / 1000) == expected.isoformat(timespec="milliseconds") + "Z"


@given(st.floats(0, 4e9))
@example(1798761599.9996)
def test_a_time_is_rounded_to_the_nearest_millisecond(seconds):
    """
    Rounding up may turn over a second, a day and a year, all at once.
    """
    written = dt.datetime.fromisoformat(g.utc_time(seconds))

    assert abs((written - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)).total_seconds() - seconds) <= 0.000501


@pytest.mark.logs("usage-2026-07.jsonl.gz: the archive is damaged")
def test_a_report_over_a_cut_archive_says_so(make_ledger, three_months):
    """
    What can be had is counted, the rest is said not to be, and the chain is broken there.
    """
    files = g.LedgerFiles(three_months)
    files.archive(lambda line: None)
    july = three_months / "usage-2026-07.jsonl.gz"
    whole = len(list(files.lines()))
    os.truncate(july, july.stat().st_size - 9)

    assert 0 < len(list(files.lines())) <= whole and files.unreadable.count == 1
    with pytest.raises(g.BrokenChain, match=r"usage-2026-07\.jsonl\.gz: the archive is damaged"):
        files.verify("", lambda line: None)


def test_a_ledger_that_cannot_be_looked_at_is_not_an_empty_one(tmp_path):
    """
    Reports of "no calls yet" and a backup without its ledger looked well. A folder that is not there is empty.
    """
    (tmp_path / "usage").write_text("a file\n")

    with pytest.raises(NotADirectoryError):
        g.LedgerFiles(tmp_path / "usage").paths()
    assert g.LedgerFiles(tmp_path / "nowhere").paths() == []


@pytest.mark.logs("has no locks: see that no second gateway runs on it")
def test_a_folder_without_locks_is_warned_of(tmp_path, monkeypatch):
    """
    There a second gateway would not be refused.
    """

    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)

    os.close(g.hold_folder(tmp_path))

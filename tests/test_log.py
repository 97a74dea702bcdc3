"""The log: a reader that does not read stops nothing, and strangers cannot fill it."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

import pytest
from conftest import HELLO, KEY, Process
from test_metrics import number, numbers
from test_stories import ledger

import gateway as g


class Pipe(NamedTuple):
    """A pipe in stderr's place: the end that is written to, and the one that is read from."""

    stderr: IO[str]
    reading: int


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reading, writing = os.pipe()
    with open(writing, "w") as stderr:
        yield Pipe(stderr, reading)
    os.close(reading)


def line(text: str) -> logging.LogRecord:
    """A record at INFO."""
    return logging.LogRecord("gateway", logging.INFO, "", 0, text, None, None)


def read_lines(fd: int, count: int) -> list[str]:
    """The messages of that many lines."""
    data = b""
    while data.count(b"\n") < count:
        data += os.read(fd, 1 << 16)
    return [text.split(" ", 3)[3] for text in data.decode().splitlines()]


def test_lines_keep_their_order_and_are_written_before_the_block_ends(pipe: Pipe):
    """
    Lines of several threads are whole, and those of each are in their order.
    """
    writer = g.LogWriter()

    def write(name: str) -> None:
        for i in range(100):
            writer.handle(line(f"{name} {i}"))

    with writer.in_thread(pipe.stderr):
        threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    read = read_lines(pipe.reading, 300)

    assert [[text for text in read if text[0] == name] for name in "abc"] == [
        [f"{name} {i}" for i in range(100)] for name in "abc"
    ]
    assert writer.lost == 0
    writer.close()


def test_what_does_not_fit_is_counted_and_told_in_its_place(pipe: Pipe):
    """
    While nobody reads, memory is bounded and no caller waits; then the log says how many lines it lost, and goes on.
    """
    writer, text = g.LogWriter(), "x" * 30_000
    with writer.in_thread(pipe.stderr):
        with writer._counting:  # the thread takes none of them in between
            for _ in range(1000):
                writer.handle(line(text))
            lost, waiting = writer.lost, writer._size
        read = read_lines(pipe.reading, 1001 - lost)
        writer.handle(line("goes on"))
        read += read_lines(pipe.reading, 1)

    assert waiting <= g.LogWriter.MAX_BYTES
    assert 700 < lost < 1000
    told = f"log: {lost} lines were lost here, because stderr was not read or refused them"
    assert read == [*[text] * (1000 - lost), told, "goes on"]
    writer.close()


def test_a_foreign_text_begins_no_line_and_moves_no_cursor(pipe: Pipe):
    """
    Line breaks within a message are followed by blanks, other control characters are shown as �.
    """
    writer = g.LogWriter()
    with writer.in_thread(pipe.stderr):
        writer.handle(line("refused: a\n2026-11-21 05:55:02,112 INFO forged\r\x1b[2J\x9b2J\u202eend"))
    data = os.read(pipe.reading, 1 << 16).decode()
    writer.close()

    assert data.splitlines()[1:] == ["    2026-11-21 05:55:02,112 INFO forged��[2J�2J�end"]


def test_an_exit_waits_a_second_for_a_reader_and_only_once(pipe: Pipe):
    """
    Neither the end of serving nor the end of the process hangs.
    """
    writer = g.LogWriter()
    with writer.in_thread(pipe.stderr):
        for _ in range(10):
            writer.handle(line("x" * 30_000))
        began = time.monotonic()
    writer.close()

    assert time.monotonic() - began < 2 * g.LogWriter.FLUSH_S
    read_lines(pipe.reading, 10)  # lets the thread end


@pytest.mark.parametrize("is_full", [False, True], ids=["closed pipe", "full disk"])
def test_what_stderr_refuses_is_lost_and_nothing_else(pipe: Pipe, is_full):
    """
    The lines are counted; the writer goes on trying, and says how many they were once it is taken again.
    """
    writer, good = g.LogWriter(), os.dup(pipe.stderr.fileno())
    reading, bad = os.pipe()
    os.close(reading)  # nobody can read any more
    if is_full:
        os.close(bad)
        bad = os.open("/dev/full", os.O_WRONLY)
    os.dup2(bad, pipe.stderr.fileno())
    with writer.in_thread(pipe.stderr):
        for count, text in enumerate(("one", "two"), 1):
            writer.handle(line(text))
            while writer.lost < count:
                os.sched_yield()
        os.dup2(good, pipe.stderr.fileno())
        writer.handle(line("three"))
        read = read_lines(pipe.reading, 2)
    os.close(good)
    os.close(bad)

    assert read == ["three", "log: 2 lines were lost here, because stderr was not read or refused them"]
    writer.close()


def test_a_rest_that_the_system_refuses_ends_no_thread(pipe: Pipe, monkeypatch):
    """
    It ended the log for good under libfaketime.
    """

    def refuse(seconds: float) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    writer = g.LogWriter()
    monkeypatch.setattr(time, "sleep", refuse)
    with writer.in_thread(pipe.stderr):
        for text in ("one", "two"):
            writer.handle(line(text))
            assert read_lines(pipe.reading, 1) == [text]
    writer.close()


def test_a_very_long_line_is_cut(pipe: Pipe):
    """
    A traceback without end does not take the place of all other lines.
    """
    writer = g.LogWriter()
    with writer.in_thread(pipe.stderr):
        writer.handle(line("x" * 100_000))
    (read,) = read_lines(pipe.reading, 1)

    assert len(read) < g.MAX_LINE and read.endswith("x …")
    writer.close()


def test_a_command_writes_its_warnings_at_once(tmp_path):
    """
    Without a thread, and before what the command says itself.
    """
    (tmp_path / "config.yaml").write_text(
        f"upstreams: [{{name: demo, format: demo}}]\nusage: {{directory: .}}\nkeys: [{{name: alice, key: {KEY}}}]"
    )
    (tmp_path / "usage-2099-01.jsonl").write_text('{"torn')
    said = subprocess.run(
        [sys.executable, g.__file__, "usage", "adjust", "alice", "--usd", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    ).stdout

    assert "WARNING ledger: a torn last line of usage-2099-01.jsonl was set aside" in said.splitlines()[0]


# A running gateway


async def serve_calls(process: Process, connect, count: int) -> list[int]:
    """The statuses of calls to the demo, one after the other on one connection."""
    client, statuses = await connect(process.port), []
    for _ in range(count):
        body = json.dumps(HELLO | {"model": "claude-demo", "max_tokens": 1}).encode()
        statuses.append((await client.request("POST", "/v1/messages", {"x-api-key": process.key}, body)).status)
    return statuses


@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_gateway_whose_log_nobody_reads_serves_and_stops(tmp_path, start_process, connect, is_closed):
    """
    A pipe is full after some 450 calls. Calls, /health, /metrics and SIGTERM go on as before.
    """
    process = start_process(tmp_path)
    if is_closed:
        process.process.stderr.close()

    statuses = await serve_calls(process, connect, 700)
    health, metrics = [await (await connect(process.port)).request("GET", path, {}) for path in ("/health", "/metrics")]
    process.process.send_signal(signal.SIGTERM)
    code = process.process.wait(timeout=10)

    assert statuses == [200] * 700
    assert (health.status, code) == (200, 0)
    assert (number(metrics, "log_lines_lost_total") > 0) == is_closed
    assert len(ledger(tmp_path)) == 700
    if is_closed:  # `communicate` of the fixture reads what is left
        process.process.stderr = None


# Refusals


def logged(caplog, text: str) -> list[str]:
    """The lines with a text in them, without ids."""
    found = [record.getMessage() for record in caplog.records if text in record.getMessage()]
    return [re.sub(r"req_\w+", "ID", message) for message in found]


async def test_refusals_of_one_address_are_logged_five_times_a_minute(gateway, caplog):
    """
    The rest is one line with its number; /metrics has all of them, and the next minute begins anew.
    """
    caplog.set_level(logging.INFO)
    for _ in range(12):
        await gateway.post("/v1/messages", HELLO, "sk-proxy-unknown")
    within = logged(caplog, "refused")
    gateway.tick(60)
    after = logged(caplog, "refused")[len(within) :]
    gateway.tick(60)
    await gateway.post("/v1/messages", HELLO, "sk-proxy-unknown")
    last = logged(caplog, "refused")[len(within) + len(after) :]

    assert within == [within[0]] * 5 and within[0].startswith("ID: 127.0.0.1 refused: 401 ")
    assert after == ["7 more requests were refused with 401 in the last minute"]
    assert last == within[:1]
    assert numbers(await gateway.get("/metrics"), "refused_total", "status") == {("401",): 13}


async def test_a_key_that_is_refused_at_the_door_is_named(start_gateway, caplog):
    """
    One key at a limit leaves the lines of another one, from the same address, and of those without any.
    """
    caplog.set_level(logging.INFO)
    bob = "sk-proxy-bob-456789abcdefghijklmnopqrstuvw"
    spent = "limits: {requests: 0}"
    gateway = await start_gateway(
        f"upstreams: [{{name: d, format: demo}}]\nkeys:\n"
        f"  - {{name: alice, key: {KEY}, {spent}}}\n  - {{name: bob, key: {bob}, {spent}}}\n"
    )

    for token in (*[KEY] * 7, bob, "sk-proxy-unknown"):
        await gateway.post("/v1/messages", HELLO, token)

    starts = [line.partition(" refused: ")[0] for line in logged(caplog, " refused: ")]
    assert starts == [*["ID: alice at 127.0.0.1"] * 5, "ID: bob at 127.0.0.1", "ID: 127.0.0.1"]


def test_many_addresses_take_neither_memory_nor_the_log(clock, caplog):
    """
    A hundred lines a minute for all addresses together; no more of them are remembered.
    """
    caplog.set_level(logging.INFO)
    events = g.Events(g.Guard(clock.clock))
    refusals = g.RefusalLog(clock.clock, events)

    for i in range(10_000):
        events.emit(g.RequestRefused("req_1", f"2001:db8::{i:x}", "", g.KeyRefused("unknown")))
    clock.advance(60)
    refusals.check()

    assert len(refusals._logged) == 0
    assert len(logged(caplog, "2001:db8")) == 100
    assert logged(caplog, "more") == ["9900 more requests were refused with 401 in the last minute"]


def test_a_process_without_standard_streams_has_the_null_device_for_them():
    """
    Without it the next socket gets the number of stderr, and log lines went to stdout, where a full pipe stopped all.
    """
    script = (
        "import os\n"
        "os.close(0)\nos.close(2)\n"
        "import gateway, sys\n"
        "sys.stdin = sys.stderr = None\n"
        "gateway.open_missing_streams()\n"
        "print('into nothing', file=sys.stderr)\n"
        "print(os.readlink('/proc/self/fd/0'), os.readlink('/proc/self/fd/2'), sys.stdin.read() == '')\n"
    )

    out = subprocess.run([sys.executable, "-c", script], cwd=os.path.dirname(g.__file__), stdout=subprocess.PIPE)

    assert out.stdout.decode().split() == ["/dev/null", "/dev/null", "True"]


def test_the_greeting_is_written_at_once(tmp_path):
    """
    Its last line and the log's first ran together where stdout and stderr are one file and nothing is buffered.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # which keeps each write apart
    environ = os.environ | {"GATEWAY_PORT": "0", "PYTHONUNBUFFERED": "1"}
    with ours, subprocess.Popen([sys.executable, g.__file__], cwd=tmp_path, env=environ, stdout=theirs) as process:
        theirs.close()
        ours.settimeout(20)
        written = ours.recv(10_000).decode()
        process.terminate()

    assert written.startswith("claude-gateway ") and written.endswith("gateway.py seal\n")


async def test_a_greeting_that_nobody_can_read_stops_nothing(tmp_path, connect):
    """
    stdout is a closed pipe: the log has the port instead, calls are served, and the end is no error.
    """
    reading, writing = os.pipe()
    os.close(reading)
    environ = os.environ | {"GATEWAY_PORT": "0"}
    with subprocess.Popen(
        [sys.executable, g.__file__], cwd=tmp_path, env=environ, stdout=writing, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(writing)
        port = next(int(found[1]) for line in process.stderr if (found := re.search(r"listens on port (\d+)", line)))
        health = await (await connect(port)).request("GET", "/health", {})
        process.terminate()
        rest = process.stderr.read()

    assert (health.status, process.returncode) == (200, 0)
    assert "Traceback" not in rest


def test_malformed_requests_do_not_fill_the_log(tmp_path, start_process):
    """
    A bad Host is Tornado's to refuse, which wrote a line for each: 27 MB of log a second, without any key.
    """
    process = start_process(tmp_path)

    for _ in range(20):
        with socket.create_connection(("127.0.0.1", process.port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: a b\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 400")
    code, log = process.end()

    assert code == 0 and "Malformed" not in log

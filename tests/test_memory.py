"""The ledger is the only memory: whatever happens, counters are the sum of its lines."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import json
import logging
import math
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zoneinfo
from pathlib import Path

import pytest
from client import Connection
from conftest import KEY, START, FakeClock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import gateway as g

ROOT = Path(__file__).parent.parent
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
BOB = "sk-proxy-bob0123456789abcdefghijklmnopqrs"
WINDOWS = ("hour", "5h", "day", "week", "month", "")
CONFIG = """
server: {{host: 127.0.0.1, port: 0, timezone: Europe/Berlin}}
upstreams: [{{name: demo, format: demo}}]
teams: [{{name: red, limits: {{usd/week: {usd}}}}}]
limits: {{gateway: {{tokens/month: {tokens}}}, queue: 5s, weights: {{output: 3, cache_read: 0.5}}}}
keys:
  - {{name: alice, key: {alice}, team: red, limits: {{usd/day: {usd}, tokens/5h: {tokens}, concurrent: 2}}}}
  - {{name: bob, key: {bob}, limits: {{requests/hour: {requests}, usd: {usd}}}}}
usage: {{fsync: never}}
"""


class Listener:
    """A client without a socket: keeps what it is told, and goes away when it is asked to."""

    def __init__(self) -> None:
        self.exchange: g.Exchange | None = None
        self.is_gone = self.is_done = False
        self.refused: g.GatewayError | None = None

    def head(self, status: int, headers: g.Headers, streaming: bool) -> None: ...

    def write(self, data: bytes, last: bool) -> None:
        self.is_done = last

    def cut(self) -> None: ...

    def refuse(self, error: g.GatewayError, api: g.Api, request_id: str) -> None:
        self.refused = error

    def leave(self) -> None:
        self.is_gone = True
        if self.exchange:
            self.exchange.client_gone()


class Model:
    """What was spent, computed from the ledger's text, line by line and slowly."""

    def __init__(self, folder: Path) -> None:
        self.lines = [
            json.loads(line)
            for path in sorted(folder.glob("usage-*.jsonl"))
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]

    @staticmethod
    def concerns(line: dict, scope: str, name: str) -> bool:
        if line["type"] == "reset":
            return (line["scope"], line["name"]) == (scope, name)
        return scope == "gateway" or line[scope] == name

    def spent(self, scope: str, name: str, unit: str, window: str, now: float) -> float:
        """The sum of the lines in the window of `now`, since the last reset in it."""
        span_s = {"hour": 3600, "5h": 18000}.get(window)
        if span_s:
            return self.spent_in_hours(scope, name, unit, window, span_s, now)
        total = 0.0
        for line in self.lines:
            at = dt.datetime.fromisoformat(line["time"]).timestamp()
            if not self.concerns(line, scope, name) or line.get("path") == "/v1/messages/count_tokens":
                continue
            if line["type"] == "reset":
                if line["limit"] in ("", f"{unit}/{window}".removesuffix("/")) and label(at, window) == label(
                    now, window
                ):
                    total = 0.0
                continue
            total += amount(line, unit) if label(at, window) == label(now, window) else 0
        return total

    def spent_in_hours(self, scope: str, name: str, unit: str, window: str, span_s: int, now: float) -> float:
        """The same of a window that opens with a call. Those that a wrong clock has left are found again."""
        windows: list[tuple[float, float]] = []  # start and sum, the present one at the end
        for line in self.lines:
            at = dt.datetime.fromisoformat(line["time"]).timestamp()
            if not self.concerns(line, scope, name) or line.get("path") == "/v1/messages/count_tokens":
                continue
            if line["type"] == "reset":
                if windows and line["limit"] in ("", f"{unit}/{window}"):
                    windows[-1] = (windows[-1][0], 0.0)
                continue
            if not windows or not opens(windows, span_s) <= at < windows[-1][0] + span_s:
                found = [each for each in windows if each[0] <= at < each[0] + span_s]
                start = at - line.get("duration_ms", 0) / 1000
                for before, _ in windows:
                    if start < before + span_s <= at:
                        start = before + span_s
                if at >= start + span_s:
                    start = at
                found += [each for each in windows if each[0] == start]
                present = found[0] if found else (start, 0.0)
                windows = [each for each in windows if each != present] + [present]
            windows[-1] = (windows[-1][0], windows[-1][1] + amount(line, unit))
        if windows and opens(windows, span_s) <= now < windows[-1][0] + span_s:
            return windows[-1][1]
        return next((total for start, total in windows[:-1] if start <= now < start + span_s), 0.0)


def opens(windows: list[tuple[float, float]], span_s: int) -> float:
    """From when on calls count in the last window: a span before it was opened, but not while one before it was."""
    start = windows[-1][0]
    return max(start - span_s, *(before + span_s for before, _ in windows if before + span_s <= start), -math.inf)


@functools.lru_cache(maxsize=10_000)
def label(at: float, window: str) -> str:
    """What two times have in common that lie in one window of the calendar."""
    day = dt.datetime.fromtimestamp(at, BERLIN).date()
    return {"day": str(day), "week": str(day.isocalendar()[:2]), "month": f"{day:%Y-%m}", "": "ever"}[window]


def amount(line: dict, unit: str) -> float:
    """What a line adds to a limit of a unit; nano-USD, so that sums are exact."""
    if unit == "usd":
        return round(line["cost_usd"] * 1e9)
    if unit == "requests":
        return line.get("requests", 1)
    if line["type"] == "adjust":
        return line["input_tokens"]
    cached = line["cache_write_5m_tokens"] + line["cache_write_1h_tokens"]
    return round(line["input_tokens"] + 3 * line["output_tokens"] + cached + line["cache_read_tokens"] / 2)


class Memory(RuleBasedStateMachine):
    """Random calls, aborts, reloads, corrections, clock jumps, kills and restarts."""

    @initialize()
    def begin(self) -> None:
        self.loop = g.new_event_loop()
        self.clock, self.folder = FakeClock(), Path(tempfile.mkdtemp())
        self.furthest, self.running = 0.0, []
        self.configure(0.05, 5000, 8)
        self.open()

    def configure(self, usd: float, tokens: int, requests: int) -> None:
        text = CONFIG.format(usd=usd, tokens=tokens, requests=requests, alice=KEY, bob=BOB)
        (self.folder / "config.yaml").write_text(text)

    def open(self) -> None:
        async def start() -> g.Gateway:
            config = g.Config.load(self.folder / "config.yaml", self.clock.clock)
            gateway = g.Gateway(config, g.Pace(demo_s=0.0))
            gateway.books.load()
            return gateway

        self.gateway: g.Gateway = self.loop.run_until_complete(start())

    def turns(self, count: int) -> None:
        """Let the loop turn so often. A turn in which calls end is over when their entries are written."""

        async def turn() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())
        while self.gateway.bookkeeper._ends:  # looked at out here: the loop turns once more before it stops
            self.loop.run_until_complete(asyncio.sleep(0))

    async def close_gateway(self) -> None:
        await self.gateway.close()

    @rule(
        key=st.sampled_from([KEY, BOB]),
        kind=st.sampled_from(["messages", "messages", "messages", "count_tokens"]),
        words=st.integers(0, 400),
        max_tokens=st.integers(1, 300),
        stream=st.booleans(),
        turns=st.integers(0, 40),
    )
    def call(self, key: str, kind: str, words: int, max_tokens: int, stream: bool, turns: int) -> None:
        """A call begins, and gets as far as so many turns of the loop let it."""
        path = "/v1/messages" if kind == "messages" else "/v1/messages/count_tokens"
        headers = [(b"x-api-key", key.encode())]
        config = self.gateway.config
        call = g.Call(config, config.keys.find([key]), g.ROUTES[path], b"", headers, "127.0.0.1")
        text = "word " * words
        body = {"model": "claude-opus-5-5", "max_tokens": max_tokens, "stream": stream}
        call.body = json.dumps(body | {"messages": [{"role": "user", "content": text}]}).encode()
        listener = Listener()

        async def enter() -> None:
            self.gateway.enter(call, len(call.body))  # it may have to wait there, for which it needs the loop

        try:
            self.loop.run_until_complete(enter())
        except g.GatewayError as error:
            listener.refuse(error, "anthropic", call.id)
            return
        self.loop.call_soon(self.gateway.start, call, listener)
        self.running.append(listener)
        self.turns(turns)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9), turns=st.integers(0, 3))
    def client_leaves(self, which: int, turns: int) -> None:
        self.running.pop(which % len(self.running)).leave()
        self.turns(turns)

    @rule()
    def all_calls_end(self) -> None:
        gateway = self.gateway

        async def finish() -> None:
            while gateway._tasks:
                self.clock.advance(1)  # those who wait give up in the end
                gateway.tick()
                await asyncio.wait(gateway._tasks, timeout=0.01)

        self.loop.run_until_complete(finish())
        self.furthest = max(self.furthest, self.clock.now)
        self.running.clear()
        for scope in gateway.limits.store._scopes.values():
            assert (scope.running, scope.reserved, scope.admitted) == (0, {"tokens": 0, "usd": 0}, {})
        assert gateway.limits.waiting == gateway.memory.held == 0

    @rule(
        usd=st.sampled_from([0.0, 0.02, 0.05, 3]), tokens=st.sampled_from([0, 900, 50_000]), requests=st.integers(0, 9)
    )
    def the_config_changes(self, usd: float, tokens: int, requests: int) -> None:
        self.configure(usd, tokens, requests)
        self.loop.run_until_complete(self.gateway.reload())

    @rule(seconds=st.sampled_from([0.001, 1, 59, 61, 3600, 5 * 3600, 86400, 7 * 86400, 31 * 86400]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.furthest = max(self.furthest, self.clock.now)
        self.gateway.tick()

    @rule(seconds=st.sampled_from([0.002, 30, 4000, 86400]))
    def the_clock_is_set_back(self, seconds: float) -> None:
        self.clock.now = max(0.0, self.clock.now - seconds, self.furthest - 2 * 86400)

    @rule(seconds=st.sampled_from([3600, 86400]))
    def the_clock_is_wrong_for_a_moment(self, seconds: float) -> None:
        """An entry comes from the future, and the next one from today."""
        now = self.clock.now
        for moment in (now, now + seconds, now):
            self.clock.now = moment
            self.spending_is_adjusted(usd=0.001, tokens=3, key="alice")

    @rule(
        whose=st.sampled_from([("key", "alice"), ("team", "red"), ("gateway", "")]),
        limit=st.sampled_from(["", "usd/day", "tokens/5h", "requests/hour", "usd", "tokens/month"]),
    )
    def a_limit_is_reset(self, whose: tuple[g.ScopeKind, str], limit: str) -> None:
        line = g.Reset(time=g.utc_time(START + self.clock.now), scope=whose[0], name=whose[1], limit=limit)
        self.gateway.ledger.append(line)

    @rule(usd=st.sampled_from([-0.01, 0.0, 0.004]), tokens=st.integers(-500, 500), key=st.sampled_from(["alice", ""]))
    def spending_is_adjusted(self, usd: float, tokens: int, key: str) -> None:
        time = g.utc_time(START + self.clock.now)
        line = g.Adjustment(time=time, key=key, team="red", cost_usd=usd, input_tokens=tokens, requests=0)
        self.gateway.ledger.append(line)

    @rule()
    def it_is_restarted(self) -> None:
        self.loop.run_until_complete(self.gateway.close())
        self.running.clear()
        self.open()

    @rule(torn=st.booleans())
    def it_is_killed(self, torn: bool) -> None:
        """What is on the disk at that moment is all there is; maybe half a line more."""
        before, self.folder = self.folder, Path(tempfile.mkdtemp())
        shutil.rmtree(self.folder)
        shutil.copytree(before, self.folder)
        self.loop.run_until_complete(self.gateway.close())
        shutil.rmtree(before)
        if torn:
            with open(max((self.folder / "usage").glob("usage-*.jsonl")), "a") as file:
                file.write('{"type":"call","time":"2026-')
        self.running.clear()
        self.open()

    @invariant()
    def counters_are_the_sum_of_the_lines(self) -> None:
        if not hasattr(self, "gateway"):
            return
        self.turns(0)
        model, now = Model(self.folder / "usage"), START + self.clock.now
        for scope, name in (("key", "alice"), ("key", "bob"), ("team", "red"), ("gateway", "")):
            counters = self.gateway.books.fold.scope(scope, name)
            for unit in ("usd", "tokens", "requests"):
                found = {window: counters.spent(unit, g.WINDOWS[window], now) for window in WINDOWS}
                assert found == {w: pytest.approx(model.spent(scope, name, unit, w, now)) for w in WINDOWS}

    @invariant()
    def the_chain_holds(self) -> None:
        if hasattr(self, "gateway"):
            g.LedgerFiles(self.folder / "usage").verify("", lambda text: None)

    def teardown(self) -> None:
        if hasattr(self, "gateway"):
            self.loop.run_until_complete(self.gateway.close())
            self.loop.close()
            shutil.rmtree(self.folder)


def test_invariant_2_counters_are_the_sum_of_the_lines_whatever_happens(caplog):
    """
    The ledger is the only memory: no call, abort, reload, correction, clock, kill or restart leads away from it.
    """
    caplog.set_level(logging.CRITICAL, logger="gateway")  # torn lines and refusals are the rule here

    run_state_machine_as_test(Memory, settings=settings(max_examples=35, stateful_step_count=25, deadline=None))


# A real process, killed


SERVE = """
server: {{host: 127.0.0.1, port: {port}}}
upstreams: [{{name: demo, format: demo}}]
keys: [{{name: alice, key: {key}}}]
usage: {{fsync: never}}
"""


class Process:
    """The gateway as a user runs it, to be killed."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        (folder / "config.yaml").write_text(SERVE.format(port=port, key=KEY))

    def launch(self) -> None:
        command = [sys.executable, str(ROOT / "gateway.py"), "--config", str(self.folder / "config.yaml")]
        with open(self.folder / "stderr", "ab") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)

    async def start(self) -> None:
        """Launch it and wait until it takes calls."""
        self.launch()
        async with asyncio.timeout(20):
            while not await self.is_ready():
                await asyncio.sleep(0.01)

    async def is_ready(self) -> bool:
        """Whether /health says that calls are taken."""
        try:
            connection = await Connection.open(self.port)
            reply = await connection.request("GET", "/health", {})
            await connection.close()
        except (OSError, EOFError):
            return False
        return reply.status == 200

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_kill_9_loses_only_calls_in_flight(tmp_path):
    """
    A thousand calls, and the process is killed five times among them: whoever has seen the end of an answer is in the
    ledger, once; nobody is in it twice; and the counters after each start are the sum of the lines.
    """
    process, seed = Process(tmp_path, free_port()), random.Random(7)
    answered: set[str] = set()
    asked = iter(range(1000))
    kills = sorted(seed.sample(range(50, 950), 5))
    body = {"model": "claude-demo", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    up = asyncio.Event()
    await process.start()
    up.set()

    async def client() -> None:
        for number in asked:
            await up.wait()
            name = f"call-{number}"
            with contextlib.suppress(OSError, EOFError, asyncio.IncompleteReadError):
                connection = await Connection.open(process.port)
                fields = {"x-api-key": KEY, "x-claude-code-session-id": name}
                streamed = body | {"stream": number % 20 == 0}
                reply = await connection.request("POST", "/v1/messages", fields, json.dumps(streamed).encode())
                await connection.close()
                if reply.status == 200 and not reply.was_cut:
                    answered.add(name)
            if kills and number >= kills[0]:
                kills.pop(0)
                up.clear()
                process.kill()
                await process.start()
                up.set()

    try:
        await asyncio.gather(*(client() for _ in range(16)))
    finally:
        process.kill()

    lines = Model(tmp_path / "usage").lines
    booked = [line["session"] for line in lines]
    assert len(booked) == len(set(booked))
    assert answered - set(booked) == set()
    assert len(answered) >= 1000 - 5 * 16  # who was in flight then
    ledger = g.Ledger(tmp_path / "usage", math.inf, g.Clock())
    books = g.Books(ledger, g.Clock(), dt.UTC, g.Config.load(tmp_path / "config.yaml").index_secret)
    books.load()
    _, nano_usd, calls = books.fold.scope("gateway", "").totals
    ledger.close()
    books.close()
    assert (calls, nano_usd) == (len(lines), sum(round(line["cost_usd"] * 1e9) for line in lines))
    assert g.LedgerFiles(tmp_path / "usage").verify("", lambda text: None) == lines[-1]["chain"]

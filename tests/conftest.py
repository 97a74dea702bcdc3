"""Fixtures: a gateway on a loopback port in the test's own loop, a scripted upstream, a clock handed in."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tornado.ioloop
from client import Connection, Reply
from hypothesis import settings
from upstream import ScriptedUpstream

import gateway as g

settings.register_profile("gateway", deadline=None)  # a machine that does other work as well is no failure
settings.load_profile("gateway")

if os.access("/dev/shm", os.W_OK) and os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_bsize > 2 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")  # thousands of small files wait for no disk

KEY = "sk-proxy-0123456789abcdefghijklmnopqrstuv"
UPSTREAM_KEY = "sk-upstream-secret-0123456789"
HELLO = {"model": "claude-test", "max_tokens": 100, "messages": [{"role": "user", "content": "say hello"}]}
HELLO_STREAM = HELLO | {"stream": True}
START = 1_790_000_000.0  # 2026-09-21T14:13:20Z


async def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    """Let the loop run until something is so; fail when it takes too long."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.001)


def calls_made(step: Callable[[], None]) -> int:
    """How many Python and C functions a step calls."""
    count = 0

    def counted(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what it calls, finalizers, is not the step's
    sys.setprofile(counted)
    try:
        step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


class TracedMemory:
    """What Python allocates while it is entered: bytes at the end, and at most."""

    held = peak = 0

    def __enter__(self) -> TracedMemory:
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.held, self.peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()


class FakeClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds

    @property
    def clock(self) -> g.Clock:
        return g.Clock(lambda: START + self.now, lambda: self.now)


class GatewayUnderTest:
    """A gateway with its front door, and what a test wants to ask it."""

    PACE = g.Pace(burst_s=0.005, demo_s=0.0)

    def __init__(
        self, path: Path, clock: FakeClock, pace: g.Pace, most: int = 4000, store: type[g.CounterStore] = g.MemoryStore
    ) -> None:
        self.path, self.clock = path, clock
        self.gateway = g.Gateway(g.Config.load(path, clock.clock), pace, store=store)
        self.door = g.Door(self.gateway, g.tornado_application(self.gateway), most)
        self.port = 0
        self.local: g.LocalDoor | None = None
        self._connections: list[Connection] = []

    async def start(self) -> None:
        self.gateway.books.load()
        await asyncio.wrap_future(self.gateway.books._following)
        self.port = await self.door.listen("127.0.0.1", 0)

    def listen_locally(self) -> None:
        """Listen for commands, as the server does."""
        self.gateway.ledger.directory.mkdir(exist_ok=True)
        self.local = g.LocalDoor(self.gateway)
        self.local.listen()

    async def stop(self) -> None:
        if self.local:
            self.local.close()
        for connection in self._connections:
            connection.abort()
        await self.gateway.close()
        await self.door.close()

    def tick(self, seconds: float = 0.0) -> None:
        """Let time pass and deadlines be looked at."""
        self.clock.advance(seconds)
        self.gateway.tick()
        self.door.check()

    async def connect(self) -> Connection:
        self._connections.append(await Connection.open(self.port))
        return self._connections[-1]

    async def request(self, method: str, target: str, body: object = b"", token: str = KEY, **headers: str) -> Reply:
        """One request on a connection of its own."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"x-api-key": token} if token else {}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = await self.connect()
        reply = await connection.request(method, target, fields, data)
        await connection.close()
        return reply

    async def post(self, target: str, body: object, token: str = KEY, **headers: str) -> Reply:
        return await self.request("POST", target, body, token, **headers)

    async def get(self, target: str, token: str = KEY, **headers: str) -> Reply:
        return await self.request("GET", target, b"", token, **headers)

    def entries(self) -> list[dict]:
        """The ledger, oldest first."""
        lines = [
            line
            for file in sorted(self.gateway.ledger.directory.glob("usage-*.jsonl"))
            for line in file.read_text().splitlines()
        ]
        return [json.loads(line) for line in lines]

    async def settled(self) -> None:
        """Wait until no call runs any more."""
        while self.gateway._tasks:
            await asyncio.wait(self.gateway._tasks)

    async def write(self, text: str) -> bool:
        """Overwrite the config and have it read; whether it was taken."""
        self.path.write_text(text)
        await self.gateway.reload()
        return not self.gateway.reload_error


@contextlib.asynccontextmanager
async def passing_time(gateway: GatewayUnderTest, seconds: float = 0.25) -> AsyncIterator[None]:
    """Time goes by, far faster than outside."""

    async def go_by() -> None:
        while True:
            gateway.tick(seconds)
            await asyncio.sleep(0.001)

    task = asyncio.ensure_future(go_by())
    try:
        yield
    finally:
        task.cancel()


CONFIG = """
server: {{host: 127.0.0.1, port: 0}}
upstreams:
  - {{name: main, url: "{url}", api_key: {upstream_key}{more}}}
keys:
  - {{name: alice, key: {key}}}
usage: {{directory: usage, fsync: never}}
routing: {{max_attempts: 1, breaker: {{failures: 1000}}}}
"""


def config_text(url: str, more: str = "", key: str = KEY) -> str:
    """A plain config with one upstream; `more` goes into it (", format: openai", say)."""
    return CONFIG.format(url=url, upstream_key=UPSTREAM_KEY, more=more, key=key)


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--event-loop", choices=["uvloop", "asyncio"], default="uvloop", help="which loop the tests run on"
    )


def pytest_collection_modifyitems(items) -> None:
    """Every async test has the loop, whether or not one of its fixtures asks for it."""
    for item in items:
        if inspect.iscoroutinefunction(item.function) and "io_loop" not in item.fixturenames:
            item.fixturenames.insert(0, "io_loop")


@pytest.fixture
def io_loop(request) -> Iterator[tornado.ioloop.IOLoop]:
    """pytest-tornasync's loop, on uvloop where it is installed, as in production."""
    on_uvloop = request.config.getoption("--event-loop") == "uvloop"
    loop = g.new_event_loop() if on_uvloop else asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    made = tornado.ioloop.IOLoop(asyncio_loop=loop, make_current=False)
    yield made
    made.run_sync(lambda: asyncio.sleep(0.001))  # closed transports let go of their sockets a turn later
    made.close(all_fds=False)
    asyncio.set_event_loop(None)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def upstream(io_loop) -> Iterator[ScriptedUpstream]:
    scripted = ScriptedUpstream()
    io_loop.run_sync(scripted.start)
    yield scripted
    io_loop.run_sync(scripted.close)


StartGateway = Callable[..., Awaitable[GatewayUnderTest]]


@pytest.fixture
def store() -> type[g.CounterStore]:
    """Where the numbers of limits are."""
    return g.MemoryStore


@pytest.fixture
def start_gateway(io_loop, tmp_path, clock, store) -> Iterator[StartGateway]:
    """Start a gateway from a config's text."""
    started: list[GatewayUnderTest] = []

    async def start(text: str, pace: g.Pace = GatewayUnderTest.PACE, most: int = 4000) -> GatewayUnderTest:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        under_test = GatewayUnderTest(path, clock, pace, most, store)
        await under_test.start()
        started.append(under_test)
        return under_test

    yield start
    for under_test in started:
        io_loop.run_sync(under_test.stop)


@pytest.fixture
def connect(io_loop) -> Iterator[Callable[[int], Awaitable[Connection]]]:
    """Connect to a port; what is open at the end is closed."""
    opened: list[Connection] = []

    async def open_one(port: int) -> Connection:
        opened.append(await Connection.open(port))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.abort()


@pytest.fixture
def gateway(io_loop, start_gateway, upstream) -> GatewayUnderTest:
    """A gateway in front of the scripted upstream, with one key."""
    return io_loop.run_sync(lambda: start_gateway(config_text(upstream.url)))


PROGRAM = Path(g.__file__)


class Process:
    """The gateway as a person starts it."""

    def __init__(self, folder: Path, *arguments: str, program: Path = PROGRAM, **environ: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        self.process = subprocess.Popen(
            [sys.executable, str(program), *arguments],
            cwd=folder,
            env=inherited | {"GATEWAY_PORT": "0"} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.greeting = ""
        for line in self.process.stdout:
            self.greeting += line
            if "gateway.py seal" in line or "gateway.py key add" in line:
                break
        found = re.search(r"listens on http://127\.0\.0\.1:(\d+)", self.greeting)
        self.port = int(found[1]) if found else 0

    @property
    def key(self) -> str:
        """The first key, which stands in a file: a pipe is no terminal."""
        return Path(re.search(r"ANTHROPIC_AUTH_TOKEN=\$\(cat (\S+)\)", self.greeting)[1]).read_text().strip()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; exit code and log."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, log = self.process.communicate(timeout=20)
        return self.process.returncode, log


@pytest.fixture
def start_process() -> Iterator[Callable[..., Process]]:
    """Start the program as a process, which ends with the test."""
    started: list[Process] = []

    def start(*arguments: Any, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
        process.process.communicate()


SKIPPED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash[SKIPPED] = item.stash.get(SKIPPED, False) or report.skipped
    return report


@pytest.fixture(autouse=True)
def no_unexpected_log_lines(caplog, request) -> Iterator[None]:
    """A line at WARNING or above fails the test, unless the test is marked `logs("part of the line")`."""
    yield
    plain = ("is in clear text", "takes a restart")  # what these tests' configs are warned of
    expected = [text for mark in request.node.iter_markers("logs") for text in mark.args]
    lines = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.WARNING]
    unexpected = [line for line in lines if not any(text in line for text in (*expected, *plain))]
    assert not unexpected, unexpected
    if request.node.stash.get(SKIPPED, False):
        return
    missing = [text for text in expected if not any(text in line for line in lines)]
    assert not missing, f"expected in the log: {missing}"

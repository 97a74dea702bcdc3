#!/usr/bin/env python3
"""A closed-loop HTTP/1.1 client that checks every answer and reads the stamp in every event.

    loadgen.py '{"port": 8080, "path": "/v1/messages", "headers": {}, "body": "FILE",
                 "conns": 16, "seconds": 4, "events": 300}'

The argument is a `Load`. Every connection sends its next request when the answer before it is whole.
Prints one line of JSON: counts, errors, times to the first byte and to the end, and the lag of the events.
"""

import array
import asyncio
import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

try:
    from uvloop import run
except ImportError:
    from asyncio import run

STAMP = re.compile(rb"@(\d{16})@")  # the mock's clock when it sent the event, in ns
STAMP_SIZE = 18
CHUNK_SIZE_LINE = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")  # the mock's events have no CR of their own
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
LAST_CHUNK = b"\r\n0\r\n\r\n"
NO_LIMIT = 1 << 60

now_ns = time.monotonic_ns


@dataclass(frozen=True)
class Load:
    """What to send, and when to stop."""

    port: int
    path: str
    headers: dict[str, str]
    body: str  # a file
    conns: int
    seconds: float
    events: int = 0  # stamped events that each answer must hold; 0: the answer is not a stream
    limit: int = NO_LIMIT  # requests in all
    per_conn: int = NO_LIMIT  # requests a connection
    ramp: float = 0  # seconds over which the connections open; lag counts only after it
    grace: float = 15  # seconds that the answers may take once no request is begun any more

    def request(self) -> bytes:
        body = Path(self.body).read_bytes()
        own = {"Host": f"127.0.0.1:{self.port}", "Content-Type": "application/json"}
        lines = [f"POST {self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in {**own, **self.headers}.items()]
        lines += [f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode() + body


def quantiles_ms(values_ns) -> dict[str, float]:
    if not values_ns:
        return {}
    ordered = sorted(values_ns)
    last = len(ordered) - 1
    points = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1}
    return {name: round(ordered[min(last, int(q * len(ordered)))] / 1e6, 3) for name, q in points.items()}


class Run:
    """One run of a `Load`: its connections and what they counted."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.request = load.request()
        self.started = self.requests = self.events = self.bytes = self.conns = 0
        self.errors = Counter()
        self.first_byte_ns, self.total_ns, self.lag_ns = (array.array("q") for _ in range(3))
        self.lag_counts_from = now_ns() + int(load.ramp * 1e9)
        self.ends_at = now_ns() + int((load.ramp + load.seconds) * 1e9)
        self.open = load.conns
        self.all_closed = asyncio.Event()

    async def go(self) -> dict:
        """Return what was counted once every connection is done, or the grace is over."""
        load = self.load
        began = now_ns()
        delays = (number * load.ramp / load.conns for number in range(load.conns))
        tasks = [asyncio.create_task(self.connect(Connection(self), delay)) for delay in delays]
        try:
            await asyncio.wait_for(self.all_closed.wait(), load.ramp + load.seconds + load.grace)
        except TimeoutError:
            self.errors["unfinished"] += self.open
        seconds = (now_ns() - began) / 1e9
        for task in tasks:
            task.cancel()
        return self.counted(seconds)

    def counted(self, seconds: float) -> dict:
        return {
            "requests": self.requests,
            "errors": sum(self.errors.values()),
            "error_kinds": dict(self.errors),
            "events": self.events,
            "bytes": self.bytes,
            "seconds": round(seconds, 3),
            "conns": self.conns,
            "ttfb_ms": quantiles_ms(self.first_byte_ns),
            "total_ms": quantiles_ms(self.total_ns),
            "lag_ms": quantiles_ms(self.lag_ns),
        }

    async def connect(self, connection: "Connection", delay: float = 0) -> None:
        await asyncio.sleep(delay)
        loop = asyncio.get_running_loop()
        for _ in range(20):
            try:
                self.conns += 1
                await loop.create_connection(lambda: connection, "127.0.0.1", self.load.port)
                return
            except OSError:
                self.errors["connect"] += 1
                await asyncio.sleep(0.1)
        self.leave()

    def may_start(self, connection: "Connection") -> bool:
        load = self.load
        return now_ns() < self.ends_at and self.started < load.limit and connection.started < load.per_conn

    def leave(self) -> None:
        self.open -= 1
        if not self.open:
            self.all_closed.set()


class Connection(asyncio.Protocol):
    """Sends request after request. Where the other side closes, it is used again for the next connection."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.started = 0
        self.busy = False  # a request is out
        self.over = False  # nothing more to send
        self.reconnecting = None

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.begin()

    def begin(self) -> None:
        """Send the next request, or leave when there is none."""
        if not self.run.may_start(self):
            self.over = True
            self.transport.close()
            self.run.leave()
            return
        self.run.started += 1
        self.started += 1
        self.busy = True
        self.head = self.carry = self.tail = b""
        self.framing = None  # "length", "chunked" or "eof", once the head is there
        self.is_ok = self.closes = False
        self.seen = self.first_byte_at = 0
        self.parts = []
        self.sent_at = now_ns()
        self.transport.write(self.run.request)

    def data_received(self, data: bytes) -> None:
        arrived_at = now_ns()
        if not self.busy:
            return
        if not self.first_byte_at:
            self.first_byte_at = arrived_at
            self.run.first_byte_ns.append(arrived_at - self.sent_at)
        self.run.bytes += len(data)
        if self.framing is None:
            data = self.read_head(data)
            if self.framing is None:
                return
        if self.run.load.events and self.is_ok and data:
            self.read_stamps(data, arrived_at)
        if self.is_whole(data):
            self.finish(arrived_at)

    def read_head(self, data: bytes) -> bytes:
        """Set `framing`, `is_ok` and `closes` once the head is whole; return what follows it."""
        head, blank_line, rest = (self.head + data).partition(b"\r\n\r\n")
        while blank_line and head.startswith(b"HTTP/1.1 1"):  # 100 Continue; the real head follows
            head, blank_line, rest = rest.partition(b"\r\n\r\n")
        self.head = head
        if not blank_line:
            return b""
        head = head.lower()
        status = head[9:12].decode()
        self.is_ok = status == "200"
        if not self.is_ok:
            self.run.errors[f"status {status}"] += 1
        self.closes = b"\r\nconnection: close" in head
        length = CONTENT_LENGTH.search(head)
        self.left = int(length[1]) if length else 0
        self.framing = "length" if length else "chunked" if b"chunked" in head else "eof"
        return rest

    def read_stamps(self, data: bytes, arrived_at: int) -> None:
        """Count the events in `data` and how long each was under way; a stamp may be cut in two."""
        self.parts.append(data)
        data = self.carry + data
        end = 0
        for stamp in STAMP.finditer(data):
            self.seen += 1
            end = stamp.end()
            if arrived_at > self.run.lag_counts_from:
                self.run.lag_ns.append(arrived_at - int(stamp[1]))
        self.carry = data[end:][1 - STAMP_SIZE :]

    def is_whole(self, data: bytes) -> bool:
        """Tell whether the answer ends with `data`, the last bytes that came."""
        if self.framing == "length":
            self.left -= len(data)
            return self.left <= 0
        if self.framing == "chunked":
            # Events never hold this sequence. The tail is shorter only where the body is empty.
            self.tail = (self.tail + data[-len(LAST_CHUNK) :])[-len(LAST_CHUNK) :]
            return self.tail in (LAST_CHUNK, LAST_CHUNK[2:])
        return False

    def finish(self, arrived_at: int) -> None:
        self.busy = False
        self.run.requests += 1
        self.run.total_ns.append(arrived_at - self.sent_at)
        if self.is_ok:
            self.check_events()
        if self.closes:
            self.transport.close()
        else:
            self.begin()

    def check_events(self) -> None:
        wanted = self.run.load.events
        if self.seen != wanted:  # a relay's own chunks may run through a stamp: look without them
            body = CHUNK_SIZE_LINE.sub(b"", b"\r\n" + b"".join(self.parts))
            self.seen = len(STAMP.findall(body))
        self.run.events += self.seen
        if self.seen != wanted:
            self.run.errors["events missing"] += 1

    def connection_lost(self, exc) -> None:
        if self.over:
            return
        if self.busy and self.framing == "eof":
            self.closes = True
            self.finish(now_ns())
        elif self.busy:
            self.run.errors["connection lost"] += 1
            self.busy = False
        if self.run.may_start(self):
            self.reconnecting = asyncio.create_task(self.run.connect(self))
        else:
            self.over = True
            self.run.leave()


async def main() -> None:
    load = Load(**json.loads(sys.argv[1]))
    print(json.dumps(await Run(load).go()))


if __name__ == "__main__":
    run(main())

#!/usr/bin/env python3
"""A fast stand-in for Anthropic's Messages API: HTTP/1.1 with keep-alive, plain and TLS, JSON and SSE.

    mock_upstream.py --port 9100 [--tls-port 9101 --cert cert.pem --key key.pem]

    POST (any path)   one message, or its events when the body has "stream": true
    GET  /__stats     how many connections and requests there were

Every event goes out in a segment of its own and carries the monotonic clock of that moment, so that a client
on the same machine can tell how long a relay held it. A marker in the body says what a stream consists of:

    BENCH[n=300,d=0,s=60]   n events, d ms between them, s bytes of text in each

With d=0 events go out as fast as the sockets take them, one per stream in turn.
"""

import argparse
import asyncio
import json
import os
import re
import socket
import ssl
import sys
import time
from collections import Counter, deque
from functools import lru_cache
from typing import NamedTuple

try:
    from uvloop import run
except ImportError:
    print("uvloop is missing: the mock upstream is slower", file=sys.stderr)
    from asyncio import run

MODEL = "claude-sonnet-4-5-20250929"
MARKER = re.compile(rb"BENCH\[n=(\d+),d=(\d+),s=(\d+)\]")
UNMARKED = (20, 0, 60)
WANTS_STREAM = re.compile(rb'"stream"\s*:\s*true')
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
LAST_CHUNK = b"\r\n0\r\n\r\n"
INPUT_USAGE = {"input_tokens": 25, "cache_creation_input_tokens": 7, "cache_read_input_tokens": 11}


# --- Bytes: what is answered ------------------------------------------------------


def dumped(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def json_answer(value) -> bytes:
    body = dumped(value)
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nrequest-id: req_bench\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )


def message(**changes) -> dict:
    empty = {"id": "msg_bench0000000000000000", "type": "message", "role": "assistant", "model": MODEL}
    return {**empty, "content": [], "stop_reason": None, "stop_sequence": None, **changes}


MESSAGE = json_answer(
    message(
        content=[{"type": "text", "text": "hello from the mock " * 20}],
        stop_reason="end_turn",
        usage={**INPUT_USAGE, "output_tokens": 42},
    )
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\nrequest-id: req_bench\r\ntransfer-encoding: chunked\r\n\r\n"
)


def event(kind: str, **fields) -> bytes:
    """Return one server-sent event as an HTTP chunk."""
    text = b"event: %s\ndata: %s\n\n" % (kind.encode(), dumped({"type": kind, **fields}))
    return b"%x\r\n%s\r\n" % (len(text), text)


class Shape(NamedTuple):
    """The bytes of a stream; an event's stamp goes between `before` and `after`."""

    head: bytes
    before: bytes
    after: bytes
    tail: bytes


@lru_cache
def shape_of(events: int, text_size: int) -> Shape:
    usage = {**INPUT_USAGE, "output_tokens": 1}
    start = event("message_start", message=message(usage=usage))
    block = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    stamp = "@" + "0" * 16 + "@"
    text = {"type": "text_delta", "text": stamp + "x" * text_size}
    before, _, after = event("content_block_delta", index=0, delta=text).partition(b"0" * 16)
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    tail = event("content_block_stop", index=0)
    tail += event("message_delta", delta=stop, usage={"output_tokens": events})
    tail += event("message_stop") + b"0\r\n\r\n"
    return Shape(STREAM_HEAD + start + block, before, after, tail)


# --- Streams: when it is sent -----------------------------------------------------


class Burst:
    """The streams that go as fast as they can: one event each in turn, then the loop's other work."""

    def __init__(self) -> None:
        self.waiting = deque()
        self.is_scheduled = False

    def add(self, stream: "Stream") -> None:
        self.waiting.append(stream)
        self.schedule()

    def schedule(self) -> None:
        if self.waiting and not self.is_scheduled:
            self.is_scheduled = True
            asyncio.get_running_loop().call_soon(self.turn)

    def turn(self) -> None:
        self.is_scheduled = False
        for _ in range(len(self.waiting)):
            stream = self.waiting.popleft()
            if stream.is_gone:
                continue
            if stream.connection.is_paused:
                stream.connection.resumes = stream  # comes back with resume_writing
            elif stream.step():
                self.waiting.append(stream)
        self.schedule()


class Stream:
    """One streamed answer."""

    def __init__(self, connection: "Connection", events: int, delay_ms: int, text_size: int) -> None:
        self.connection = connection
        self.left = events
        self.delay_s = delay_ms / 1000
        self.shape = shape_of(events, text_size)
        self.is_gone = False  # the client went away

    def start(self) -> None:
        self.connection.send(self.shape.head)
        if self.delay_s:
            self.wait()
        else:
            self.connection.burst.add(self)

    def wait(self) -> None:
        self.timer = asyncio.get_running_loop().call_later(self.delay_s, self.tick)

    def tick(self) -> None:
        if not self.is_gone and self.step():
            self.wait()

    def step(self) -> bool:
        """Send one event, or the end; tell whether the stream goes on."""
        if self.left:
            self.left -= 1
            self.connection.send(b"%b%016d%b" % (self.shape.before, time.monotonic_ns(), self.shape.after))
            return True
        self.connection.send(self.shape.tail)
        self.connection.stream_ended()
        return False


# --- Connections: requests in, answers out ----------------------------------------


class Head:
    """The request line and headers, and with them where the body ends."""

    def __init__(self, raw: bytes) -> None:
        self.size = len(raw)
        self.method, self.path = raw.split(b" ", 2)[:2]
        text = raw.lower()
        length = CONTENT_LENGTH.search(text)
        self.length = int(length[1]) if length else 0
        self.is_chunked = b"\r\ntransfer-encoding: chunked" in text
        self.expects_continue = b"\r\nexpect: 100-continue" in text
        self.closes = b"\r\nconnection: close" in text

    def request_size(self, received: bytearray) -> int:
        """Return the size of head and body, or 0 while the body is not whole."""
        if not self.is_chunked:
            size = self.size + self.length
            return size if len(received) >= size else 0
        end = received.find(LAST_CHUNK, self.size - 2)  # JSON never holds this sequence
        return end + len(LAST_CHUNK) if end >= 0 else 0


class Connection(asyncio.Protocol):
    def __init__(self, stats: Counter, burst: Burst, kind: str) -> None:
        self.stats, self.burst, self.kind = stats, burst, kind
        self.received = bytearray()
        self.head = None
        self.stream = None
        self.is_paused = False
        self.resumes = None

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.stats[self.kind] += 1
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.fd = sock.fileno() if self.kind == "connections" else None

    def connection_lost(self, exc) -> None:
        self.fd = None
        if self.stream:
            self.stream.is_gone = True

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        if self.resumes:
            stream, self.resumes = self.resumes, None
            self.burst.add(stream)

    def send(self, data: bytes) -> None:
        if self.fd is not None and not self.transport.get_write_buffer_size():
            data = self.write_at_once(data)
        if data and not self.transport.is_closing():
            self.transport.write(data)

    def write_at_once(self, data: bytes) -> bytes:
        """Write `data` as a segment of its own and return what is left; the transport would join several."""
        try:
            return data[os.write(self.fd, data) :]
        except BlockingIOError:
            return data
        except OSError:
            self.transport.abort()
            return b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.serve()

    def serve(self) -> None:
        """Answer the requests that are whole, one after another."""
        while self.stream is None:
            body = self.next_body()
            if body is None:
                return
            self.answer(body)

    def next_body(self) -> bytes | None:
        """Take the next request off the buffer and return its body, None while it is not whole."""
        if self.head is None:
            end = self.received.find(b"\r\n\r\n")
            if end < 0:
                return None
            self.head = Head(bytes(self.received[: end + 4]))
            if self.head.expects_continue:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = self.head.request_size(self.received)
        if not size:
            return None
        body = bytes(self.received[self.head.size : size])
        del self.received[:size]
        return body

    def answer(self, body: bytes) -> None:
        if self.head.method == b"POST":
            self.stats["requests"] += 1
            if WANTS_STREAM.search(body):
                marker = MARKER.search(body)
                numbers = map(int, marker.groups()) if marker else UNMARKED
                self.stream = Stream(self, *numbers)
                self.stream.start()
                return
        self.send(json_answer(self.stats) if self.head.path == b"/__stats" else MESSAGE)
        self.answered()

    def stream_ended(self) -> None:
        self.stream = None
        self.answered()
        self.serve()

    def answered(self) -> None:
        if self.head.closes:
            self.transport.close()
        self.head = None


async def main(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stats, burst = Counter(connections=0, tls_connections=0, requests=0), Burst()
    where = {"host": "127.0.0.1", "backlog": 4096}
    await loop.create_server(lambda: Connection(stats, burst, "connections"), port=options.port, **where)
    if options.tls_port:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options.cert, options.key)
        secure = {"port": options.tls_port, "ssl": tls}
        await loop.create_server(lambda: Connection(stats, burst, "tls_connections"), **secure, **where)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--port", type=int, default=9100)
    parser.add_argument("--tls-port", type=int, help="listen here too, with TLS")
    parser.add_argument("--cert")
    parser.add_argument("--key")
    run(main(parser.parse_args()))

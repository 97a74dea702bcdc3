"""What a call and an event cost, counted, not timed: so the bounds hold on any machine, however busy.

Counted are the calls of Python functions of gateway.py, the steps of its coroutines and generators among them, in the
thread of the event loop; what client and scripted upstream do in the same thread is left out. A change that costs more
than its bound fails here, before it is found in a benchmark.

To lower a bound after a change that costs less: run `pytest -s tests/test_cost.py`, which prints each count, and set
the bound to the next whole number above the count (the next tenth for events). A bound is raised only by a commit that
says what the calls are for.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from types import FrameType

import pytest
import upstream as up
from client import Connection, request_bytes
from conftest import KEY, UPSTREAM_KEY

import gateway as g

CALLS = 300  # that are counted, after as many as fill every cache
EVENTS = 300  # of a stream
CALLS_PER_REQUEST = 223
CALLS_PER_LONE_EVENT = 8.1
CALLS_PER_EVENT_OF_A_BURST = 1.3
BLOCKS_PER_EVENT = 0.1  # of memory that stay while the stream goes on: none, but for what a cache or a buffer takes

CONFIG = """
server: {{host: 127.0.0.1, port: 0}}
upstreams: [{{name: main, url: "{url}", api_key: {upstream_key}}}]
keys: [{{name: alice, key: {key}, limits: {{usd/day: 500, tokens/month: 500M, requests/minute: 100000}}}}]
usage: {{directory: usage, fsync: never}}
"""
PROMPT = "You are a coding agent. Read the file before you change it. " * 30
BODY = {
    "model": "claude-sonnet-4-5-20250929",
    "max_tokens": 8192,
    "metadata": {"user_id": "cost"},
    "system": [{"type": "text", "text": PROMPT}],
    "messages": [{"role": "user", "content": "What does `main` do?"}],
}
HEADERS = {
    "authorization": f"Bearer {KEY}",
    "content-type": "application/json",
    "anthropic-version": "2023-06-01",
    "user-agent": "claude-cli/2.1.0 (external, cli)",
}
EVENT = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}\n\n'
)


class PythonCalls:
    """Counts the calls of gateway.py's functions while it is entered."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> PythonCalls:
        gc.collect()
        gc.disable()  # what it finalizes is no call's
        sys.setprofile(self._counted)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _counted(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename == g.__file__:
            self.count += 1


async def start(start_gateway, upstream, connect) -> Connection:
    """A connection to a gateway whose key has limits in three windows."""
    gateway = await start_gateway(CONFIG.format(url=upstream.url, upstream_key=UPSTREAM_KEY, key=KEY))
    return await connect(gateway.port)


async def test_a_request_costs_no_more_python_calls(start_gateway, upstream, connect):
    """
    A small JSON call, with everything on: key, limits, prices, the ledger's entry, metrics and the log's line.
    """
    upstream.script = up.message_json("It starts the server.")
    client = await start(start_gateway, upstream, connect)
    body = json.dumps(BODY, separators=(",", ":")).encode()

    async def ask() -> None:
        for _ in range(CALLS):
            reply = await client.request("POST", "/v1/messages", HEADERS, body)
            assert reply.status == 200

    await ask()
    with PythonCalls() as calls:
        await ask()

    print(f"Python calls per request: {calls.count / CALLS:.2f}")
    assert calls.count / CALLS <= CALLS_PER_REQUEST


@pytest.mark.parametrize(("size", "bound"), [(1, CALLS_PER_LONE_EVENT), (50, CALLS_PER_EVENT_OF_A_BURST)])
async def test_an_event_costs_no_more(start_gateway, upstream, connect, size, bound):
    """
    Events that come alone, and many in one read: of each the usage is read, and nothing is kept.
    """
    asked = asyncio.Queue[int]()

    async def events(exchange: up.Exchange) -> None:
        while count := await asked.get():
            await exchange.piece(EVENT * count)

    upstream.script = [up.head(200, "text/event-stream"), up.message_start(input_tokens=12), up.block_start(), events]
    upstream.script += [up.block_stop(), up.message_delta(5), up.message_stop(), up.end()]
    client = await start(start_gateway, upstream, connect)
    body = json.dumps(BODY | {"stream": True}).encode()

    async def pass_on() -> None:
        for _ in range(EVENTS // size):
            asked.put_nowait(size)
            for _ in range(size):
                await client.read_until(b'"a"}}\n\n')

    await client.send(request_bytes("POST", "/v1/messages", HEADERS, body))
    await pass_on()
    with PythonCalls() as calls:
        await pass_on()
    blocks = sys.getallocatedblocks()
    await pass_on()
    blocks = sys.getallocatedblocks() - blocks
    asked.put_nowait(0)
    await client.read_until(b"message_stop")

    print(f"Python calls per event, {size} at once: {calls.count / EVENTS:.2f}; blocks kept: {blocks / EVENTS:.3f}")
    assert calls.count / EVENTS <= bound
    assert blocks / EVENTS <= BLOCKS_PER_EVENT

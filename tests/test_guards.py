"""Bugs of ours: one step, one call, one tick with a bug ends nothing else."""

from __future__ import annotations

import asyncio
import json
import operator

import pytest
from client import Reply, request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, config_text, until
from upstream import HELLO as HELLO_SCRIPT
from upstream import Request, Step, hello_json, message_start, stall, text, wait_for
from upstream import head as answer_head

import gateway as g


def tracebacks(caplog) -> int:
    """How many the log has."""
    return sum(1 for record in caplog.records if record.exc_info)


@pytest.mark.logs("a bug in ")
@pytest.mark.parametrize(
    ("where", "owner", "name"),
    [
        ("Books.tick", "books", "_clock"),
        ("Limits.check", "limits", "_queues"),
        ("Pools.check", "relay.pools", "_pools"),
        ("KeyChecks.check", "key_checks", "_relay"),
        ("RefusalLog.check", "refusals", "_ends_at"),
    ],
)
async def test_a_bug_in_one_tick_ends_no_other_deadline(gateway, upstream, caplog, where, owner, name):
    """
    A silent upstream still times out, its call is booked, and the log has one traceback a minute, not four a second.
    """
    upstream.script = [answer_head(200, "text/event-stream"), message_start(12), text("Hel"), stall()]
    stream = await gateway.connect()
    await stream.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await stream.read_until(b"Hel")
    part = operator.attrgetter(owner)(gateway.gateway)
    sound = getattr(part, name)
    setattr(part, name, None)

    for _ in range(40):
        gateway.tick(0.25)
    first, failures = tracebacks(caplog), gateway.gateway.guard.failures[where]
    gateway.tick(51)
    second = tracebacks(caplog)
    setattr(part, name, sound)
    gateway.tick(600)
    await stream.is_closed()
    await gateway.settled()

    assert (first, failures, second) == (1, 40, 2)
    assert gateway.entries()[-1]["outcome"] == "timeout"
    metrics = await gateway.get("/metrics", "")
    assert f'bugs_total{{where="{where}"}} 41.0' in metrics.body.decode()


@pytest.mark.logs("failed", "no answer")
async def test_a_bug_in_one_calls_deadlines_ends_that_call_alone(gateway, upstream):
    """
    It has a 500 and an entry; the call beside it runs into its own deadline.
    """
    upstream.script = [stall()]
    calls = [asyncio.create_task(gateway.post("/v1/messages", HELLO)) for _ in range(2)]
    await until(lambda: len(upstream.requests) == 2)
    broken = next(iter(gateway.gateway.relay.running))
    broken.paused_at = "never"

    gateway.tick(0.25)
    await until(lambda: len(gateway.gateway.relay.running) == 1)
    gateway.tick(3600)
    replies = await asyncio.gather(*calls)

    assert sorted(reply.status for reply in replies) == [500, 504]
    assert sorted(entry["outcome"] for entry in gateway.entries()) == ["internal_error", "timeout"]


@pytest.mark.logs("failed")
@pytest.mark.parametrize(("owner", "name"), [("ledger", "has_room"), ("limits", "admit"), ("relay", "upstreams")])
async def test_a_bug_on_a_calls_way_is_answered_and_gives_back_its_slot(start_gateway, upstream, owner, name):
    """
    A 500 in the client's format instead of silence; the next call finds the slot free.
    """
    gateway = await start_gateway(
        config_text(upstream.url).replace(f"key: {KEY}", f"key: {KEY}, limits: {{concurrent: 1}}")
    )
    upstream.script = hello_json()
    part, connection = getattr(gateway.gateway, owner), await gateway.connect()
    sound = getattr(part, name)

    async def post() -> Reply:
        return await connection.request("POST", "/v1/messages", {"x-api-key": KEY}, body)

    body = json.dumps(HELLO).encode()
    head_of = request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, body)
    await connection.send(head_of[:-5])
    await until(lambda: any(c._call for c in gateway.door.connections))
    setattr(part, name, None)  # once the request's head has been accepted
    await connection.send(head_of[-5:])
    broken = await connection.answer()
    await gateway.settled()
    setattr(part, name, sound)
    replies = [await post(), await post()]

    assert (broken.status, broken.error) == (500, {"type": "api_error", "message": g.INTERNAL_ERROR})
    assert [reply.status for reply in replies] == [200, 200]


@pytest.mark.logs("a bug in Bookkeeper._book")
@pytest.mark.parametrize("body", [HELLO, HELLO_STREAM])
async def test_an_answer_that_cannot_be_booked_still_ends_and_leaves_an_entry(gateway, upstream, body):
    """
    The client has the whole answer; the entry has no usage and says internal_error.
    """

    def answer(request: Request) -> list[Step]:
        (exchange,) = gateway.gateway.relay.running
        exchange.attempt.reader.spend = None
        return HELLO_SCRIPT if request.json.get("stream") else hello_json()

    upstream.script = answer

    reply = await gateway.post("/v1/messages", body)
    await gateway.settled()

    assert reply.status == 200 and not reply.was_cut
    assert [entry["outcome"] for entry in gateway.entries()] == ["internal_error"]


@pytest.mark.logs("failed")
@pytest.mark.parametrize("name", ["_headers", "_pieces"])
@pytest.mark.parametrize("body", [HELLO, HELLO_STREAM])
async def test_a_bug_in_reading_an_upstream_is_blamed_on_nobody(gateway, upstream, name, body):
    """
    A bug in a callback of the parser, or in what is done with a read: the client has a 500, and no other try is made.
    """

    def answer(request: Request) -> list[Step]:
        (exchange,) = gateway.gateway.relay.running
        setattr(exchange.attempt.line, name, None)
        return hello_json()

    upstream.script = answer

    broken = await gateway.post("/v1/messages", body)
    await gateway.settled()
    bugs = gateway.gateway.guard.failures.total()
    upstream.script = hello_json()
    sound = await gateway.post("/v1/messages", HELLO)
    await gateway.settled()

    assert (broken.status, broken.error) == (500, {"type": "api_error", "message": g.INTERNAL_ERROR})
    assert (bugs, sound.status, len(upstream.requests)) == (1, 200, 2)
    assert [entry["outcome"] for entry in gateway.entries()] == ["internal_error", "completed"]


@pytest.mark.logs("failed")
async def test_a_bug_in_the_middle_of_a_stream_cuts_it(gateway, upstream):
    """
    What the client has so far looks cut, and the upstream is asked again as if nothing had been.
    """
    go_on = asyncio.Event()
    upstream.script = [
        answer_head(200, "text/event-stream"),
        message_start(12),
        text("Hel"),
        wait_for(go_on),
        text("lo"),
    ]
    stream = await gateway.connect()
    await stream.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await stream.read_until(b"Hel")
    (exchange,) = gateway.gateway.relay.running

    exchange.attempt.line._pieces = None
    go_on.set()
    await stream.is_closed()
    await gateway.settled()

    assert gateway.entries()[-1]["outcome"] == "internal_error"
    assert gateway.gateway.guard.failures.total() == 1
    assert gateway.gateway.relay.upstreams.ready_in(exchange.call, set()) == 0


@pytest.mark.logs("a bug in Gateway.reload")
async def test_a_bug_in_reading_a_config_keeps_the_last_one(gateway):
    """
    /health tells it as it tells a mistake in the file.
    """
    gateway.gateway._environ = None
    taken = await gateway.write(gateway.path.read_text() + "limits: {queue: ${NONE}}\n")

    health = (await gateway.get("/health", "")).json

    assert not taken and health["config"]["reload_failed_at"]


@pytest.mark.logs("a bug in Bridge._handle")
async def test_a_bug_in_what_a_connection_calls_closes_that_connection(gateway, upstream):
    """
    The log has the traceback; the connection beside it goes on.
    """
    upstream.script = hello_json()
    broken, sound = await gateway.connect(), await gateway.connect()
    application, gateway.door.application = gateway.door.application, None

    await broken.send(request_bytes("GET", "/health", {}))
    closed = await broken.is_closed()
    gateway.door.application = application
    reply = await sound.request("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())

    assert closed and reply.status == 200
    assert gateway.gateway.metrics.connections() == 1

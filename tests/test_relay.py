"""The relay: bytes through, ends that look like ends, deadlines, and one entry for each call."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tracemalloc
from typing import get_args, get_type_hints

import pytest
from client import request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, UPSTREAM_KEY, config_text, passing_time, until
from upstream import HELLO as HELLO_SCRIPT
from upstream import (
    ConnectProxy,
    ScriptedUpstream,
    block_start,
    body,
    chat_chunk,
    chat_done,
    chat_hello,
    chat_usage,
    close,
    end,
    error_event,
    event,
    garbage,
    head,
    hello_json,
    json_body,
    message_delta,
    message_start,
    message_stop,
    raw,
    reset_peer,
    response_completed,
    slicer,
    stall,
    stream_of,
    text,
    wait_for,
)

import gateway as g

SSE = "text/event-stream"


def ledger_line(entry: dict, *names: str) -> dict:
    """The named fields of an entry."""
    return {name: entry[name] for name in names}


ENDINGS = {
    "finished": (HELLO_SCRIPT, "completed", 200),
    "refused": (json_body({"type": "error", "error": {"type": "x", "message": "no"}}, status=529), "refused", 529),
    "cut by reset": ([head(200, SSE), message_start(1), text("Hel"), reset_peer()], "upstream_cut", 200),
    "cut by close": ([head(200, SSE), message_start(1), text("Hel"), close()], "upstream_cut", 200),
    "ended before any content": ([head(200, SSE), message_start(1), end()], "upstream_cut", 502),
    "error before any content": ([head(200, SSE), error_event("api_error", "no"), end()], "upstream_error", 200),
    "no answer": ([close()], "upstream_cut", 502),
    "not HTTP": ([garbage()], "upstream_cut", 502),
    "a protocol nobody asked for": (
        [raw(b"HTTP/1.1 101 Go\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")],
        "upstream_cut",
        502,
    ),
    "a body with two lengths": (
        [raw(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab")],
        "upstream_cut",
        502,
    ),
    "a page instead of JSON": ([head(200, "text/html", content_length="4"), body(b"<p/>")], "upstream_error", 502),
    "an empty answer": ([raw(b"HTTP/1.1 204 No\r\n\r\n")], "upstream_error", 502),
    "two answers": ([*hello_json(), *hello_json()], "completed", 200),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_invariant_1_every_admitted_call_leaves_exactly_one_entry(gateway, upstream, caplog, name):
    """
    However the upstream ends a call, the ledger has one entry that says how, and the next call is served.
    """
    script, outcome, status = ENDINGS[name]
    upstream.script = script

    await gateway.post("/v1/messages", HELLO_STREAM)
    await gateway.settled()
    upstream.script = HELLO_SCRIPT
    again = await gateway.post("/v1/messages", HELLO_STREAM)

    assert [(entry["outcome"], entry["status"]) for entry in gateway.entries()] == [
        (outcome, status),
        ("completed", 200),
    ]
    assert again.texts == ["Hello", " world"]
    caplog.clear()


# --- bytes as they came ---------------------------------------------------------------


async def test_invariant_4_bytes_are_relayed_as_they_came(gateway, upstream):
    """
    Invariants 1 and 4: the client gets the very bytes, the upstream got the very body, and one entry tells the rest.
    """
    upstream.script = HELLO_SCRIPT
    sent = b'{"model": "claude-test",\n "stream" : true, "unknown": {"z": 1.50}, "messages": []}'

    reply = await gateway.post("/v1/messages?beta=true", sent, user_agent="claude-cli/2.1.329 (external, cli)")

    assert reply.texts == ["Hello", " world"] and not reply.was_cut
    assert upstream.requests[0].body == sent
    assert reply.headers["x-accel-buffering"] == "no"
    (entry,) = gateway.entries()
    assert entry == {
        "type": "call",
        "time": "2026-09-21T14:13:20.000Z",
        "request_id": entry["request_id"],
        "key": "alice",
        "team": "",
        "upstream": "main",
        "model": "claude-test",
        "model_served": entry["model_served"],
        "path": "/v1/messages",
        "stream": True,
        "status": 200,
        "outcome": "completed",
        "error_type": "",
        "attempts": [{"upstream": "main", "key": 1, "outcome": "completed", "ms": 0.0}],
        "input_tokens": 12,
        "output_tokens": 5,
        "cache_write_5m_tokens": 0,
        "cache_write_1h_tokens": 0,
        "cache_read_tokens": 0,
        "weighted_tokens": 17,
        "estimated": False,
        "cost_usd": 0.00037,
        "price": {"input": 10.0, "output": 50.0, "cache_write_5m": 12.5, "cache_write_1h": 20.0, "cache_read": 1.0},
        "premiums": {},
        "charges": [],
        "first_byte_ms": 0.0,
        "duration_ms": 0.0,
        "queued_ms": 0.0,
        "bytes_up": len(sent),
        "bytes_down": len(reply.body),
        "session": "",
        "client": "127.0.0.1",
        "user_agent": "claude-cli/2.1.329",
        "upstream_request_id": entry["upstream_request_id"],
        "chain": entry["chain"],
    }


async def test_the_price_of_a_call_is_that_of_its_tier_and_of_the_config_it_began_with(gateway, upstream):
    """
    The whole input decides, cached or not; the entry has that one price; a new price is for later calls only.
    """
    prices = """
prices:
  "*": {input: 2, output: 10, tiers: [{above: 100, input: 4, output: 20, cache_read: 1}]}
"""
    text = gateway.path.read_text()
    await gateway.write(text + prices)
    go_on = asyncio.Event()
    answers = [
        [head(200, "text/event-stream"), message_start(count, cache_read=60), wait_for(go_on), *HELLO_SCRIPT[2:]]
        for count in (40, 41)
    ]
    upstream.scripts = [*answers, HELLO_SCRIPT]

    calls = [asyncio.create_task(gateway.post("/v1/messages", HELLO_STREAM)) for _ in answers]
    await until(lambda: len(upstream.requests) == 2)
    assert await gateway.write(text + prices.replace("input: 2", "input: 200"))
    go_on.set()
    await asyncio.gather(*calls)
    await gateway.post("/v1/messages", HELLO_STREAM)

    entries = sorted(gateway.entries(), key=lambda entry: (entry["price"]["input"], entry["input_tokens"]))
    prices_found = [
        (entry["input_tokens"], entry["cache_read_tokens"], entry["price"], entry["cost_usd"]) for entry in entries
    ]
    base = {"input": 2.0, "output": 10.0, "cache_write_5m": 2.5, "cache_write_1h": 4.0, "cache_read": 0.2}
    tier = {"input": 4.0, "output": 20.0, "cache_write_5m": 5.0, "cache_write_1h": 8.0, "cache_read": 1.0}
    dear = {"input": 200.0, "output": 10.0, "cache_write_5m": 250.0, "cache_write_1h": 400.0, "cache_read": 20.0}
    assert prices_found == [
        (40, 60, base, 0.000142),  # 40 x 2 + 60 x 0.2 + 5 x 10
        (41, 60, tier, 0.000324),  # 41 x 4 + 60 x 1 + 5 x 20
        (12, 0, dear, 0.00245),  # 12 x 200 + 5 x 10
    ]


async def test_a_stream_cut_into_single_bytes_is_the_same_stream(gateway, upstream):
    """
    However the upstream's bytes are cut up, the client gets the same ones and the usage is read.
    """
    upstream.script = HELLO_SCRIPT
    whole = await gateway.post("/v1/messages", HELLO_STREAM)
    upstream.script = [slicer(step, 1) for step in HELLO_SCRIPT]

    sliced = await gateway.post("/v1/messages", HELLO_STREAM)

    assert sliced.body == whole.body
    assert [entry["output_tokens"] for entry in gateway.entries()] == [5, 5]


async def test_streaming_is_decided_from_the_answer(gateway, upstream):
    """
    A JSON answer to a stream request passes as JSON, and a stream that nobody asked for as a stream.
    """
    upstream.scripts = [hello_json(), HELLO_SCRIPT]

    asked = await gateway.post("/v1/messages", HELLO_STREAM)
    unasked = await gateway.post("/v1/messages", HELLO)

    assert "x-accel-buffering" not in asked.headers and asked.json["type"] == "message"
    assert unasked.texts == ["Hello", " world"]
    assert [entry["outcome"] for entry in gateway.entries()] == ["completed", "completed"]


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 500, 503, 529])
async def test_an_upstreams_refusal_goes_back_unchanged(gateway, upstream, caplog, status):
    """
    The client's self-repair matches on the upstream's wording: status and body are the upstream's, and cost nothing.
    """
    said = {"type": "error", "error": {"type": "some_error", "message": "exactly  this"}, "request_id": "req_1"}
    upstream.script = json_body(said, status=status)

    reply = await gateway.post("/v1/messages", HELLO_STREAM)

    assert (reply.status, reply.json) == (status, said)
    assert ledger_line(gateway.entries()[0], "status", "outcome", "error_type", "cost_usd", "input_tokens") == {
        "status": status,
        "outcome": "refused",
        "error_type": "some_error",
        "cost_usd": 0.0,
        "input_tokens": 0,
    }
    caplog.clear()  # a 429 is told


@pytest.mark.logs("sent something that is no answer")
async def test_a_redirect_is_not_followed(gateway, upstream):
    """
    Invariant 9: the upstream's key goes to the configured address only.
    """
    other = ScriptedUpstream()
    await other.start()
    upstream.script = json_body({}, status=307, location=f"{other.url}/v1/messages")

    reply = await gateway.post("/v1/messages", HELLO)

    await other.close()
    assert reply.status == 502 and other.requests == []


async def test_cache_tokens_and_their_lifetimes_are_booked_apart(gateway, upstream):
    """
    Cache reads are not billed as input, and both lifetimes of writes have their price.
    """
    upstream.script = [
        head(200, SSE),
        message_start(input_tokens=100, cache_read=1000, cache_5m=10, cache_1h=20, model="claude-opus-4-8"),
        text("Hi"),
        message_delta(output_tokens=50),
        message_stop(),
        end(),
    ]

    await gateway.post("/v1/messages", HELLO_STREAM | {"model": "claude-opus-4-8"})

    names = ("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "output_tokens")
    assert ledger_line(gateway.entries()[0], *names, "cost_usd", "model_served") == {
        "input_tokens": 100,
        "cache_read_tokens": 1000,
        "cache_write_5m_tokens": 10,
        "cache_write_1h_tokens": 20,
        "output_tokens": 50,
        "cost_usd": (100 * 5 + 1000 * 0.5 + 10 * 6.25 + 20 * 10 + 50 * 25) / 1e6,
        "model_served": "claude-opus-4-8",
    }


async def test_count_tokens_is_free(gateway, upstream):
    """
    count_tokens is answered by the upstream and never booked as spend.
    """
    upstream.script = json_body({"input_tokens": 4321})

    reply = await gateway.post("/v1/messages/count_tokens?beta=true", HELLO)

    assert reply.json == {"input_tokens": 4321}
    assert ledger_line(gateway.entries()[0], "input_tokens", "cost_usd", "outcome", "estimated") == {
        "input_tokens": 0,
        "cost_usd": 0.0,
        "outcome": "completed",
        "estimated": False,
    }


@pytest.mark.parametrize("asks", [True, False])
async def test_a_chat_stream_is_booked_by_its_usage_whether_or_not_the_client_asks(start_gateway, upstream, asks):
    """
    A client that left `include_usage` out was booked at $0.00003 for $0.30; the extra chunk is for those who asked.
    """
    gateway = await start_gateway(config_text(upstream.url, ", format: openai"))
    upstream.script = [head(200, SSE), chat_chunk("Hello"), chat_usage(prompt=30, completion=7), chat_done(), end()]
    request = HELLO_STREAM | ({"stream_options": {"include_usage": True}} if asks else {})

    reply = await gateway.post("/v1/chat/completions", request)

    assert upstream.requests[0].json == request | {"stream_options": {"include_usage": True}}
    assert (b'"prompt_tokens"' in reply.body) is asks
    assert b"Hello" in reply.body and reply.body.endswith(b"data: [DONE]\n\n")
    assert ledger_line(gateway.entries()[0], "input_tokens", "output_tokens", "estimated", "outcome") == {
        "input_tokens": 30,
        "output_tokens": 7,
        "estimated": False,
        "outcome": "completed",
    }


@pytest.mark.parametrize(
    ("more", "request_", "path"),
    [
        (", format: openai, include_usage: false", HELLO_STREAM, "/v1/chat/completions"),
        (", format: openai", HELLO, "/v1/chat/completions"),
        (", format: openai", HELLO_STREAM | {"input": "hi"}, "/v1/responses"),
        ("", HELLO_STREAM, "/v1/messages"),
    ],
    ids=["switched off", "no stream", "responses", "messages"],
)
async def test_nothing_else_is_asked_for_usage(start_gateway, upstream, more, request_, path):
    """
    Bytes are relayed as they came: the one exception is a chat stream, and an operator can end it.
    """
    gateway = await start_gateway(config_text(upstream.url, more))
    upstream.script = json_body({"error": {"type": "overloaded_error", "message": "no"}}, status=529)

    await gateway.post(path, request_)

    assert upstream.requests[0].body == json.dumps(request_).encode()


async def test_openai_streams_are_metered_with_and_without_usage(start_gateway, upstream):
    """
    With include_usage the numbers are the upstream's, cached tokens apart; without it they are estimates.
    """
    gateway = await start_gateway(config_text(upstream.url + "/v1", ", format: openai"))
    told = [head(200, SSE), chat_chunk("Hello"), chat_usage(prompt=30, completion=7, cached=10), chat_done(), end()]
    untold = [head(200, SSE), chat_chunk("x" * 40), chat_done(), end()]
    upstream.scripts = [told, untold]

    await gateway.post("/v1/chat/completions", HELLO_STREAM)
    await gateway.post("/v1/chat/completions", HELLO_STREAM)

    names = ("input_tokens", "cache_read_tokens", "output_tokens", "estimated", "outcome")
    first, second = (list(ledger_line(entry, *names).values()) for entry in gateway.entries())
    assert first == [20, 10, 7, False, "completed"]
    assert second == [40, 0, 10, True, "completed"]
    assert upstream.requests[0].header["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert upstream.requests[0].target == "/v1/chat/completions"


# --- ends that look like ends ------------------------------------------------------------


@pytest.mark.parametrize("ending", [reset_peer(), close(), garbage()], ids=["reset", "fin", "garbage"])
async def test_invariant_6_a_cut_stream_looks_cut(gateway, upstream, ending):
    """
    Invariant 6: a client can tell a complete answer from a cut one, and pays for the tokens it saw.
    """
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), text("lo, wor" * 20), ending]

    reply = await gateway.post("/v1/messages", HELLO_STREAM)
    await gateway.settled()

    assert reply.was_cut and reply.texts == ["Hel", "lo, wor" * 20]
    assert ledger_line(gateway.entries()[-1], "outcome", "input_tokens", "output_tokens", "estimated", "status") == {
        "outcome": "upstream_cut",
        "input_tokens": 12,
        "output_tokens": 143 // 4,
        "estimated": True,
        "status": 200,
    }


async def test_a_stream_that_ends_without_its_terminal_event_looks_cut(gateway, upstream):
    """
    Invariant 6: a proper end of the bytes is no end of the message.
    """
    go_on = asyncio.Event()
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), wait_for(go_on), end()]
    client = await start_stream(gateway)

    go_on.set()
    rest = await client.rest()
    await gateway.settled()

    assert not rest.endswith(b"0\r\n\r\n")
    assert gateway.entries()[-1]["outcome"] == "upstream_cut"


async def test_a_stream_with_a_length_that_lacks_its_terminal_event_looks_cut(gateway, upstream):
    """
    Invariant 6: an upstream that gives its stream a content-length ends no message with it either.
    """
    go_on, end_of_block = asyncio.Event(), b'event: content_block_stop\ndata: {"type": "content_block_stop"}\n\n'
    said = b'event: content_block_delta\ndata: {"type": "content_block_delta", "delta": {"text": "Hel"}}\n\n'
    length = str(len(said + end_of_block))
    upstream.script = [head(200, SSE, content_length=length), body(said), wait_for(go_on), body(end_of_block)]
    client = await start_stream(gateway)

    go_on.set()
    rest = await client.rest()
    await gateway.settled()

    assert end_of_block in rest and not rest.endswith(b"0\r\n\r\n")
    assert gateway.entries()[-1]["outcome"] == "upstream_cut"


async def test_what_came_before_a_cut_reaches_a_slow_client(gateway, upstream):
    """
    A cut ends the answer, however old its request is; what was said before it may still be read.
    """
    go_on = asyncio.Event()
    upstream.script = [head(200, SSE), message_start(input_tokens=1), text("Hel"), wait_for(go_on), close()]
    client = await start_stream(gateway)
    (ours,) = gateway.door.connections
    ours.transport.set_write_buffer_limits(high=32 << 20)  # a slow client, not one that is waited for
    ours.transport.write(b"x" * (16 << 20))

    gateway.clock.advance(100)
    go_on.set()
    await gateway.settled()
    gateway.tick()

    assert (await client.rest()).endswith(b"x" * (16 << 20))


async def test_an_error_event_passes_and_is_booked_as_one(gateway, upstream):
    """
    An upstream's error in mid-stream is its own end: the client reads it, and pays for what came before.
    """
    upstream.script = [
        head(200, SSE),
        message_start(input_tokens=12),
        text("Hel"),
        error_event("overloaded_error", "Overloaded"),
        end(),
    ]

    reply = await gateway.post("/v1/messages", HELLO_STREAM)

    assert not reply.was_cut and b"overloaded_error" in reply.body
    assert ledger_line(gateway.entries()[-1], "outcome", "error_type", "input_tokens") == {
        "outcome": "upstream_error",
        "error_type": "overloaded_error",
        "input_tokens": 12,
    }


async def test_a_large_json_answer_cut_in_its_body_looks_cut(gateway, upstream):
    """
    Invariant 6 for answers with a length: too short is not whole; small ones are held and never begun.
    """
    go_on, beginning = asyncio.Event(), b'{"Hel": "' + b"x" * (300 << 10) + b'"Hel"'
    upstream.script = [
        raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999999\r\n\r\n" + beginning),
        wait_for(go_on),
        close(),
    ]
    asking = asyncio.ensure_future(gateway.post("/v1/messages", HELLO))
    await until(lambda: any(exchange.bytes_down for exchange in gateway.gateway.relay.running))

    go_on.set()
    reply = await asking
    await gateway.settled()

    assert reply.was_cut and len(reply.body) == len(beginning)
    assert ledger_line(gateway.entries()[-1], "outcome", "estimated") == {"outcome": "upstream_cut", "estimated": True}


async def test_an_answer_ended_by_the_connection_is_whole(gateway, upstream):
    """
    HTTP/1.0 servers end a body by closing; that is an end, and the client gets a framed one.
    """
    answer = b'{"type":"message","model":"m","usage":{"input_tokens":3,"output_tokens":4}}'
    upstream.script = [raw(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + answer), close()]

    reply = await gateway.post("/v1/messages", HELLO)

    assert (reply.body, reply.was_cut) == (answer, False)
    assert ledger_line(gateway.entries()[0], "outcome", "input_tokens", "output_tokens") == {
        "outcome": "completed",
        "input_tokens": 3,
        "output_tokens": 4,
    }


async def test_a_client_of_http_1_0_gets_its_answer_by_close_and_a_cut_by_reset(gateway, upstream):
    """
    Without chunks a plain end would pass for the answer's own: a cut one resets the connection.
    """
    upstream.scripts = [HELLO_SCRIPT, [head(200, SSE), message_start(input_tokens=1), text("Hel"), reset_peer()]]
    request = request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode())
    request = request.replace(b"HTTP/1.1", b"HTTP/1.0")
    whole, cut = await gateway.connect(), await gateway.connect()

    await whole.send(request)
    good = await whole.answer()
    await cut.send(request)
    with pytest.raises(ConnectionResetError):
        while await cut._reader.read(1 << 16):
            pass

    assert good.texts == ["Hello", " world"] and "transfer-encoding" not in good.headers
    await whole.close()


# --- the client goes away ---------------------------------------------------------------


async def start_stream(gateway, request: dict = HELLO_STREAM) -> object:
    """A client that has read the first bytes of a stream."""
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(request).encode()))
    await client.read_until(b'"Hel"')
    return client


async def test_a_client_that_goes_away_closes_the_upstream_within_100_ms(gateway, upstream):
    """
    Esc in Claude Code must stop the upstream's work, and the tokens so far are booked.
    """
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), stall()]
    client = await start_stream(gateway)

    client.abort()

    async with asyncio.timeout(0.1):
        await upstream.closed_by_peer()
    await gateway.settled()
    assert ledger_line(gateway.entries()[0], "outcome", "input_tokens", "estimated") == {
        "outcome": "client_gone",
        "input_tokens": 12,
        "estimated": True,
    }


async def test_a_client_that_goes_away_before_the_answer_closes_the_upstream_too(gateway, upstream):
    """
    The wait for the first byte is cancelled as well; the input, which the upstream has read, is estimated.
    """
    upstream.script = [stall()]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode()))
    await upstream.request_came()

    client.abort()

    async with asyncio.timeout(0.1):
        await upstream.closed_by_peer()
    await gateway.settled()
    assert ledger_line(gateway.entries()[0], "outcome", "status", "input_tokens", "estimated") == {
        "outcome": "client_gone",
        "status": 0,
        "input_tokens": 35,
        "estimated": True,
    }


async def test_on_disconnect_drain_hears_the_answer_out_for_the_ledger(start_gateway, upstream):
    """
    `drain` books exact numbers for an answer that nobody reads.
    """
    gateway = await start_gateway(config_text(upstream.url, ", on_disconnect: drain"))
    go_on = asyncio.Event()
    upstream.script = [
        head(200, SSE),
        message_start(input_tokens=12),
        text("Hel"),
        wait_for(go_on),
        message_delta(output_tokens=77),
        message_stop(),
        end(),
    ]
    client = await start_stream(gateway)

    client.abort()
    await gateway_sees_it_gone(gateway)
    go_on.set()
    await gateway.settled()

    assert ledger_line(gateway.entries()[0], "outcome", "output_tokens", "estimated") == {
        "outcome": "client_gone",
        "output_tokens": 77,
        "estimated": False,
    }


def limited(url: str, limits: str, more: str = "") -> str:
    """A config whose key has limits."""
    return config_text(url, more).replace(f"key: {KEY}}}", f"key: {KEY}, limits: {limits}}}")


@pytest.mark.parametrize(
    ("limits", "more", "is_heard_out"),
    [
        ("{usd/day: 20}", "", True),
        ("{tokens/month: 1M}", "", True),
        ("{requests/day: 100, concurrent: 4}", "", False),
        ("{}", "", False),
        ("{usd/day: 20}", ", on_disconnect: cancel", False),
    ],
)
async def test_leaving_early_does_not_evade_a_limit(start_gateway, upstream, limits, more, is_heard_out):
    """
    Where a limit in tokens or dollars holds, the answer is heard out and booked with its numbers; else it is cancelled.
    """
    gateway = await start_gateway(limited(upstream.url, limits, more))
    go_on = asyncio.Event()
    rest = [wait_for(go_on), message_delta(output_tokens=77), message_stop(), end()]
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), *rest]
    client = await start_stream(gateway)

    client.abort()
    await gateway_sees_it_gone(gateway)
    go_on.set()
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["outcome"], entry["estimated"]) == ("client_gone", not is_heard_out)
    assert entry["output_tokens"] == (77 if is_heard_out else 1)


async def test_whoever_left_an_answer_may_ask_again_while_it_is_heard_out(start_gateway, upstream):
    """
    Esc and a new question: the slot is free at once, though the old answer is still read for the ledger.
    """
    gateway = await start_gateway(limited(upstream.url, "{usd/day: 20, concurrent: 1}"))
    go_on = asyncio.Event()
    rest = [wait_for(go_on), message_delta(output_tokens=77), message_stop(), end()]
    upstream.scripts = [[head(200, SSE), message_start(input_tokens=12), text("Hel"), *rest], HELLO_SCRIPT]
    client = await start_stream(gateway)
    client.abort()
    await gateway_sees_it_gone(gateway)

    async with asyncio.timeout(1):
        again = await gateway.post("/v1/messages", HELLO_STREAM)
    go_on.set()
    await gateway.settled()

    assert again.texts == ["Hello", " world"]
    assert [entry["output_tokens"] for entry in gateway.entries()] == [5, 77]
    assert all(scope.running == 0 for scope in gateway.gateway.limits.store._scopes.values())


def drained(gateway) -> int:
    """How many answers are read on for the ledger alone."""
    return sum(exchange.sink is None for exchange in gateway.gateway.relay.running)


async def gateway_sees_it_gone(gateway) -> None:
    """Wait until no exchange has a client any more."""
    await until(lambda: not (any(exchange.sink for exchange in gateway.gateway.relay.running)))


@pytest.mark.parametrize(("idle", "bound_s"), [("1s", 60), ("5m", 300)])
async def test_a_drained_answer_has_its_bounds(start_gateway, upstream, idle, bound_s):
    """
    Invariant 8: an answer is heard out for at most 60 s, or as long as its upstream may be silent.
    """
    more = f", on_disconnect: drain, timeouts: {{idle: {idle}}}"
    gateway = await start_gateway(config_text(upstream.url, more))
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), stall()]
    client = await start_stream(gateway)
    client.abort()
    await gateway_sees_it_gone(gateway)
    (exchange,) = gateway.gateway.relay.running

    gateway.tick(seconds=bound_s)
    in_time = exchange.done.done()
    gateway.tick(seconds=1)

    await gateway.settled()
    assert not in_time
    assert gateway.entries()[0]["outcome"] == "client_gone"


async def test_a_silent_answer_is_heard_out_as_long_as_for_a_client_where_a_limit_holds(start_gateway, upstream):
    """
    A model that thinks for four minutes is heard out, and booked with its numbers.
    """
    gateway = await start_gateway(limited(upstream.url, "{usd/day: 20}"))
    go_on = asyncio.Event()
    rest = [wait_for(go_on), message_delta(output_tokens=77), message_stop(), end()]
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), *rest]
    client = await start_stream(gateway)
    client.abort()
    await gateway_sees_it_gone(gateway)

    gateway.tick(seconds=240)
    go_on.set()
    await gateway.settled()

    assert ledger_line(gateway.entries()[0], "output_tokens", "estimated") == {"output_tokens": 77, "estimated": False}


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "never reads"])
async def test_an_answer_not_heard_out_is_booked_with_its_reserved_output(start_gateway, upstream, leaves):
    """
    Where a limit holds, a drain that ends before the upstream's numbers costs what was reserved, by estimate.
    """
    gateway = await start_gateway(limited(upstream.url, "{usd/day: 20}"))
    megabytes = [] if leaves else [body(b": " + b"x" * (1 << 20) + b"\n\n") for _ in range(32)]
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), *megabytes, stall()]
    client = await start_stream(gateway)
    (exchange,) = gateway.gateway.relay.running
    if leaves:
        client.abort()
    else:
        await until(lambda: exchange.paused_at is not None)
        gateway.tick(seconds=301)
    await gateway_sees_it_gone(gateway)
    reserved = exchange.call.reserved_output

    gateway.tick(seconds=301)
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["outcome"], entry["estimated"], entry["output_tokens"]) == ("client_gone", True, int(reserved))
    assert reserved > 10


@pytest.mark.parametrize("drain_calls", [64, 0], ids=["heard out", "no place"])
async def test_an_answer_that_came_to_its_end_without_usage_costs_its_text(start_gateway, upstream, drain_calls):
    """
    Its client has left with the terminal event, the line stays open: nothing is missing that would count as reserved.
    """
    text_of = limited(upstream.url, "{tokens/month: 1M}", ", format: openai, include_usage: false")
    gateway = await start_gateway(text_of, g.Pace(drain_calls=drain_calls))
    upstream.script = [head(200, SSE), chat_chunk("x" * 40), chat_done(), stall()]
    client = await gateway.connect()
    request = json.dumps(HELLO_STREAM).encode()
    await client.send(request_bytes("POST", "/v1/chat/completions", {"x-api-key": KEY}, request))
    await client.read_until(b"[DONE]")
    client.abort()
    await gateway_sees_it_gone(gateway)

    gateway.tick(seconds=301)
    await gateway.settled()

    assert ledger_line(gateway.entries()[0], "outcome", "output_tokens", "estimated") == {
        "outcome": "completed",
        "output_tokens": 10,
        "estimated": True,
    }


async def test_a_client_that_never_reads_is_heard_out_like_one_that_left(start_gateway, upstream):
    """
    Its connection is cut after `idle`, and the rest of the answer is read for the ledger.
    """
    gateway = await start_gateway(limited(upstream.url, "{usd/day: 20}"))
    megabytes = [body(b": " + b"x" * (1 << 20) + b"\n\n") for _ in range(32)]
    rest = [message_delta(output_tokens=77), message_stop(), end()]
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), *megabytes, *rest]
    await start_stream(gateway)
    (exchange,) = gateway.gateway.relay.running
    await until(lambda: exchange.paused_at is not None)

    gateway.tick(seconds=301)
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["outcome"], entry["output_tokens"], entry["estimated"]) == ("client_gone", 77, False)


async def test_a_keys_third_drain_counts_as_a_running_call(start_gateway, upstream):
    """
    Whoever leaves answers on purpose has no more of them running upstream than `concurrent` and two.
    """
    gateway = await start_gateway(limited(upstream.url, "{usd/day: 20, concurrent: 2}"))
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), stall()]
    relay = gateway.gateway.relay

    for drains in range(1, 5):
        client = await start_stream(gateway)
        client.abort()
        await until(lambda drains=drains: drained(gateway) == drains)

    holds = sorted(exchange.call.reservation.slots > 0 for exchange in relay.running)
    assert holds == [False, False, True, True]
    gateway.tick(seconds=301)
    await gateway.settled()
    assert not relay.drains
    assert all(scope.running == 0 for scope in gateway.gateway.limits.store._scopes.values())


async def test_a_count_that_costs_nothing_is_not_heard_out(start_gateway, upstream):
    """
    count_tokens evades no limit: it takes no place from the answers that do, and is cancelled at once.
    """
    gateway = await start_gateway(limited(upstream.url, "{usd/day: 20}"))
    upstream.script = [stall()]
    client = await gateway.connect()
    count = request_bytes("POST", "/v1/messages/count_tokens", {"x-api-key": KEY}, json.dumps(HELLO).encode())
    await client.send(count)
    await upstream.request_came()

    client.abort()
    await gateway_sees_it_gone(gateway)

    await until(lambda: drained(gateway) == 0)  # a drain would take a minute of the clock
    await gateway.settled()


async def test_one_key_cannot_take_all_places_for_drains(start_gateway, upstream):
    """
    A key drains no more answers than there are places left for others.
    """
    pace = g.Pace(drain_calls=4)
    gateway = await start_gateway(limited(upstream.url, "{usd/day: 20}"), pace)
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), stall()]
    for client in [await start_stream(gateway) for _ in range(4)]:
        client.abort()
    await gateway_sees_it_gone(gateway)
    await until(lambda: len(gateway.gateway.relay.running) == 2)

    assert drained(gateway) == 2


async def test_only_so_many_answers_are_drained_at_once(start_gateway, upstream):
    """
    Nothing is kept without a bound: above it a client that goes away cancels.
    """
    pace = g.Pace(drain_calls=1)
    gateway = await start_gateway(config_text(upstream.url, ", on_disconnect: drain"), pace)
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), stall()]
    clients = [await start_stream(gateway) for _ in range(2)]

    for client in clients:
        client.abort()
    await gateway_sees_it_gone(gateway)
    await until(lambda: not (len(gateway.gateway.relay.running) > 1))
    await until(gateway.entries)  # which are written at the end of a turn of the loop

    assert len(gateway.entries()) == 1


# --- the clock ------------------------------------------------------------------------------


async def test_a_ping_is_said_into_a_silence_between_events(gateway, upstream):
    """
    Claude Code gives up after 300 s without a byte: every 15 s of silence get a ping of ours.
    """
    go_on = asyncio.Event()
    upstream.script = [
        head(200, SSE),
        message_start(input_tokens=1),
        text("Hel"),
        wait_for(go_on),
        text("lo"),
        message_delta(output_tokens=2),
        message_stop(),
        end(),
    ]
    client = await start_stream(gateway)

    for _ in range(4):
        gateway.tick(seconds=10)
    go_on.set()
    rest = await client.read_until(b"0\r\n\r\n")

    assert rest.count(b'event: ping\ndata: {"type": "ping"}\n\n') == 2
    assert gateway.entries()[0]["outcome"] == "completed"
    await client.close()


async def test_a_ping_fits_into_a_stream_whose_upstream_gave_its_length(gateway, upstream):
    """
    Our own framing: the upstream's content-length knows nothing of our pings.
    """
    go_on = asyncio.Event()
    said = b'event: content_block_delta\ndata: {"type": "content_block_delta", "delta": {"text": "Hel"}}\n\n'
    ping, stop = b'event: ping\ndata: {"type": "ping"}\n\n', b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
    upstream.script = [head(200, SSE, content_length=str(len(said + stop))), body(said), wait_for(go_on), body(stop)]
    asking = asyncio.ensure_future(gateway.post("/v1/messages", HELLO_STREAM))
    await until(lambda: any(exchange.bytes_down for exchange in gateway.gateway.relay.running))

    gateway.tick(seconds=16)
    go_on.set()
    reply = await asking

    assert reply.body == said + ping + stop and not reply.was_cut


async def test_no_ping_breaks_an_event(gateway, upstream):
    """
    While half an event has passed, a ping would end it: there is none.
    """
    go_on = asyncio.Event()
    upstream.script = [
        head(200, SSE),
        message_start(input_tokens=1),
        block_start(),
        body(b'event: content_block_delta\ndata: {"type": "content_block_delta", "delta": {"text": "Hel"'),
        wait_for(go_on),
        body(b"}}\n\n"),
        message_delta(output_tokens=2),
        message_stop(),
        end(),
    ]
    client = await start_stream(gateway)

    gateway.tick(seconds=100)
    go_on.set()
    rest = await client.read_until(b"0\r\n\r\n")

    assert b"ping" not in rest and b"}}\n\n" in rest
    await client.close()


@pytest.mark.logs("did not answer in time")
async def test_invariant_8_every_wait_has_a_deadline(start_gateway, upstream):
    """
    Invariant 8: `first_byte` bounds the wait for a head; the client gets a 504 in its format.
    """
    gateway = await start_gateway(config_text(upstream.url, ", timeouts: {first_byte: 30s}"))
    upstream.script = [stall()]
    asking = asyncio.ensure_future(gateway.post("/v1/messages", HELLO))
    await upstream.request_came()

    gateway.tick(seconds=29)
    assert not asking.done()
    gateway.tick(seconds=2)
    reply = await asking

    assert (reply.status, reply.error["type"]) == (504, "timeout_error")
    assert reply.error["message"] == "The upstream main did not answer in time."
    assert ledger_line(gateway.entries()[0], "outcome", "status") == {"outcome": "timeout", "status": 504}


async def test_an_upstream_that_goes_silent_is_cut(start_gateway, upstream):
    """
    Invariant 8: `idle` bounds the silence within an answer, pings of ours notwithstanding.
    """
    gateway = await start_gateway(config_text(upstream.url, ", timeouts: {idle: 30s}"))
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), stall()]
    client = await start_stream(gateway)

    gateway.tick(seconds=20)
    gateway.tick(seconds=11)
    rest = await client.rest()
    await gateway.settled()

    assert rest.endswith(b'{"type": "ping"}\n\n\r\n')  # the ping's chunk, and no end
    assert gateway.entries()[0]["outcome"] == "timeout"


@pytest.mark.logs("could not be reached")
async def test_an_upstream_that_refuses_connections_is_unreachable(start_gateway, upstream):
    """
    Invariant 1: a call that reached nobody is booked as well, at no cost.
    """
    gateway = await start_gateway(config_text(f"http://127.0.0.1:{upstream.refuse()}"))

    reply = await gateway.post("/v1/messages", HELLO)

    assert (reply.status, reply.error["type"]) == (502, "api_error")
    assert ledger_line(gateway.entries()[0], "outcome", "status", "cost_usd", "attempts") == {
        "outcome": "unreachable",
        "status": 502,
        "cost_usd": 0.0,
        "attempts": [{"upstream": "main", "key": 1, "outcome": "unreachable", "ms": 0.0}],
    }


# --- connections ------------------------------------------------------------------------------


async def test_connections_are_kept_and_used_again(gateway, upstream):
    """
    Calls one after the other share one upstream connection.
    """
    upstream.script = HELLO_SCRIPT

    for _ in range(5):
        await gateway.post("/v1/messages", HELLO_STREAM)

    assert upstream.connections == 1


async def test_idle_connections_are_closed_after_a_time(gateway, upstream):
    """
    A connection that nobody uses is closed before the upstream's side closes it.
    """
    upstream.script = HELLO_SCRIPT
    await gateway.post("/v1/messages", HELLO_STREAM)

    gateway.tick(seconds=56)

    await until(lambda: not upstream.open_connections)


async def test_invariant_5_a_failed_attempt_is_retried_unseen_while_no_byte_has_come(gateway, upstream):
    """
    A kept-alive connection that dies as it is used again, before a byte of the answer, costs the client nothing, and
    whoever reads the ledger sees that the request was sent twice.
    """
    upstream.scripts = [hello_json(), [reset_peer()], hello_json()]

    replies = [await gateway.post("/v1/messages", HELLO) for _ in range(2)]

    assert [reply.status for reply in replies] == [200, 200]
    attempts = [[attempt["outcome"] for attempt in entry["attempts"]] for entry in gateway.entries()]
    assert attempts == [["completed"], ["stale_connection", "completed"]]
    assert upstream.connections == 2
    assert (await gateway.get("/health")).json["upstreams"][0]["failures"] == 0


@pytest.mark.logs("closed the connection before its answer was whole")
async def test_a_request_that_was_worked_on_is_not_sent_again_unseen(gateway, upstream):
    """
    A kept-alive connection that dies twelve seconds after the request has had it: an upstream behind a proxy was
    paid twice. It is a failure like any other, and with one attempt the client is told.
    """
    upstream.scripts = [hello_json(), [wait_for(late := asyncio.Event()), reset_peer()], hello_json()]
    await gateway.post("/v1/messages", HELLO)

    posting = asyncio.ensure_future(gateway.post("/v1/messages", HELLO))
    await upstream.request_came(2)
    gateway.tick(seconds=12)
    late.set()
    reply = await posting

    assert (reply.status, len(upstream.requests)) == (502, 2)
    assert [attempt["outcome"] for attempt in gateway.entries()[1]["attempts"]] == ["cut"]
    assert (await gateway.get("/health")).json["upstreams"][0]["failures"] == 1


async def test_a_client_that_left_while_an_attempt_failed_gets_no_second_one(gateway):
    """
    Between a connection's death and the next attempt the client may go away: then there is none.
    """
    config = gateway.gateway.config
    call = g.Call(config, next(iter(config.keys)), g.ROUTES["/v1/messages"], b"", [], "127.0.0.1")
    sink = g.ClientConnection(gateway.door).sink
    exchange = sink.exchange = g.Exchange.of(call, sink, gateway.gateway.relay)

    (choice,) = gateway.gateway.relay.upstreams.choices(config.upstreams[0])
    with g.Ticket(gateway.gateway.relay.upstreams, call, choice, "m") as ticket:
        attempt = exchange.attempt = g.Attempt.of(exchange, ticket, g.DIALECTS["anthropic", "messages"])

    attempt.lost(g.CUT)
    exchange.client_gone()
    with pytest.raises(g.AttemptFailed):
        await attempt.done

    assert await exchange.done == g.Outcome("client_gone", 0)


@pytest.mark.logs("closed the connection before its answer was whole")
async def test_a_fresh_connection_that_dies_is_not_tried_again(gateway, upstream):
    """
    A request that may have been worked on is not sent twice.
    """
    upstream.script = [close()]

    reply = await gateway.post("/v1/messages", HELLO)

    assert reply.status == 502 and len(upstream.requests) == 1
    assert gateway.entries()[0]["outcome"] == "upstream_cut"


async def test_tls_is_verified_and_connections_are_reused(start_gateway):
    """
    An upstream's certificate must fit; once warm there are no new TLS connections.
    """
    secure = ScriptedUpstream(tls=True)
    await secure.start()
    secure.script = hello_json()
    gateway = await start_gateway(config_text(secure.url, f', ca_file: "{secure.ca_file}"'))

    replies = [await gateway.post("/v1/messages", HELLO) for _ in range(3)]

    assert [reply.status for reply in replies] == [200, 200, 200]
    assert secure.connections == 1
    await secure.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_a_body_that_came_in_pieces_reaches_the_upstream_whole(start_gateway, tls):
    """
    4 MB arrive in many reads, and go up byte for byte.
    """
    upstream = ScriptedUpstream(tls=tls)
    await upstream.start()
    upstream.script = HELLO_SCRIPT
    ca_file = f', ca_file: "{upstream.ca_file}"' if tls else ""
    gateway = await start_gateway(config_text(upstream.url, ca_file))
    request = HELLO_STREAM | {"system": "x" * (4 << 20)}

    reply = await gateway.post("/v1/messages", request)

    assert reply.status == 200
    assert upstream.requests[0].body == json.dumps(request).encode()
    await upstream.close()


@pytest.mark.logs("could not be reached")
async def test_a_certificate_that_nobody_vouches_for_is_refused(start_gateway):
    """
    The upstream's key is not sent to whoever happens to answer.
    """
    secure = ScriptedUpstream(tls=True)
    await secure.start()
    gateway = await start_gateway(config_text(secure.url))

    reply = await gateway.post("/v1/messages", HELLO)

    assert reply.status == 502 and secure.requests == []
    await secure.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_a_proxy_is_asked_to_connect(start_gateway, tls):
    """
    With `proxy:` the way to the upstream is a CONNECT tunnel, with TLS to the upstream itself inside it.
    """
    upstream, proxy = ScriptedUpstream(tls=tls), ConnectProxy()
    await upstream.start()
    await proxy.start()
    upstream.script = hello_json()
    ca_file = f', ca_file: "{upstream.ca_file}"' if tls else ""
    gateway = await start_gateway(config_text(upstream.url, f', proxy: "{proxy.url}"{ca_file}'))

    replies = [await gateway.post("/v1/messages", HELLO) for _ in range(2)]

    assert [reply.status for reply in replies] == [200, 200]
    assert len(proxy.lines) == 1 and proxy.lines[0].startswith("CONNECT ")
    await upstream.close()
    await proxy.close()


@pytest.mark.logs("upstream main could not be reached")
async def test_a_tunnel_that_ends_before_tls_stands_is_unreachable(start_gateway):
    """
    A proxy may say yes and hang up in the middle of the handshake: an answer for the client, no traceback.
    """

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await reader.read(1)
        writer.close()

    proxy = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    gateway = await start_gateway(config_text("https://localhost:1", f', proxy: "http://127.0.0.1:{port}"'))

    reply = await gateway.post("/v1/messages", HELLO)

    assert reply.status == 502
    proxy.close()


@pytest.mark.logs("the proxy answered 'HTTP/1.1 403")
async def test_a_proxy_that_refuses_is_said_so(start_gateway, upstream):
    """
    A proxy's refusal is a clear error, and no request goes around it.
    """
    proxy = ConnectProxy(status=403)
    await proxy.start()
    gateway = await start_gateway(config_text(upstream.url, f', proxy: "{proxy.url}"'))

    reply = await gateway.post("/v1/messages", HELLO)

    assert reply.status == 502 and upstream.requests == []
    await proxy.close()


async def test_invariant_7_slow_readers_slow_the_upstream_not_our_memory(gateway, upstream):
    """
    Invariant 7: while the client does not read, the upstream's bytes stay with the upstream.
    """
    megabytes = [body(b": " + b"x" * (1 << 20) + b"\n\n") for _ in range(64)]
    upstream.script = [head(200, SSE), message_start(input_tokens=1), text("Hel"), *megabytes, message_stop(), end()]
    client = await start_stream(gateway)
    (exchange,) = gateway.gateway.relay.running

    await until(lambda: exchange.paused_at is not None)
    held = 0
    while held < exchange.bytes_down < 32 << 20:  # until the buffers on the way are full
        held = exchange.bytes_down
        await asyncio.sleep(0.05)

    assert exchange.bytes_down == held < 32 << 20 and exchange.paused_at is not None
    assert await client.read_on(b"0\r\n\r\n") > 64 << 20
    await client.close()


async def test_invariant_7_a_client_that_has_not_read_the_answer_before_is_slow_from_the_start(gateway, upstream):
    """
    The transport says "pause" once, which may be at the end of the answer before, when no upstream listens.
    """
    megabytes = [body(b": " + b"x" * (1 << 20) + b"\n\n") for _ in range(64)]
    upstream.script = [head(200, SSE), message_start(input_tokens=1), *megabytes, message_stop(), end()]
    client = await gateway.connect()
    await until(lambda: gateway.door.connections)
    (ours,) = gateway.door.connections
    ours.transport.write(b"x" * (16 << 20))  # an answer that nobody has read

    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await until(lambda: any(exchange.paused_at is not None for exchange in gateway.gateway.relay.running))

    assert ours.transport.get_write_buffer_size() < 32 << 20
    assert await client.read_on(b"0\r\n\r\n") > 80 << 20


async def test_a_client_that_never_reads_again_is_let_go(gateway, upstream):
    """
    Invariant 8: waiting for a client has a deadline as well.
    """
    megabytes = [body(b": " + b"x" * (1 << 20) + b"\n\n") for _ in range(64)]
    upstream.script = [head(200, SSE), message_start(input_tokens=1), text("Hel"), *megabytes, end()]
    await start_stream(gateway)
    (exchange,) = gateway.gateway.relay.running
    await until(lambda: exchange.paused_at is not None)

    gateway.tick(seconds=301)
    await gateway.settled()

    assert gateway.entries()[0]["outcome"] == "client_gone"


@pytest.mark.parametrize("model", ["claude-test", "its-own-name"])
async def test_a_stream_does_not_keep_its_request(start_gateway, upstream, model):
    """
    Streams run for hours: from their first content on the gateway holds nothing of the requests that began them.
    """
    upstream.script = [head(200, SSE), message_start(input_tokens=1), text("Hel"), stall()]
    gateway = await start_gateway(config_text(upstream.url, f", models: {{claude-test: {model}}}"))
    size, streams = 1 << 20, 8
    request = HELLO_STREAM | {"system": "x" * size}
    ours = tracemalloc.Filter(True, g.__file__)  # the fake upstream keeps every request

    tracemalloc.start()
    try:
        before = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).traces)
        for _ in range(streams):
            await start_stream(gateway, request)
        after = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).traces)
    finally:
        tracemalloc.stop()

    assert len(gateway.gateway.relay.running) == streams
    assert after - before < size


async def test_invariant_1_a_call_that_still_connects_at_the_stop_is_booked(start_gateway, upstream):
    """
    A stop does not wait for a connect timeout, and the ledger is closed after the last entry.
    """

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    proxy = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    gateway = await start_gateway(config_text(upstream.url, f', proxy: "http://127.0.0.1:{port}"'))
    asking = asyncio.ensure_future(gateway.post("/v1/messages", HELLO))
    await until(lambda: gateway.gateway.relay.running)

    await gateway.gateway.close()
    await gateway.door.close()
    await asking

    assert [entry["outcome"] for entry in gateway.entries()] == ["gateway_stopped"]
    proxy.close()


async def test_a_bug_of_ours_is_booked_and_told_without_its_details(gateway, upstream, caplog):
    """
    Invariant 1 holds for our own mistakes: one entry, a 500 in the client's format, the traceback in the log only.
    """
    gateway.gateway.relay.ready_line = None  # calling None is a bug as good as any

    reply = await gateway.post("/v1/messages", HELLO)

    assert (reply.status, reply.error) == (
        500,
        {"type": "api_error", "message": "The gateway failed; its log says how."},
    )
    assert ledger_line(gateway.entries()[0], "outcome", "status") == {"outcome": "internal_error", "status": 500}
    assert "Traceback" in caplog.text and UPSTREAM_KEY not in caplog.text
    caplog.clear()


async def test_invariant_9_no_secret_leaves(gateway, upstream, caplog):
    """
    Invariant 9: the upstream's key and the users' keys stand in no answer, log line or ledger entry.
    """
    caplog.set_level("DEBUG")
    upstream.scripts = [HELLO_SCRIPT, json_body({"error": {"type": "authentication_error"}}, status=401), [garbage()]]

    replies = [await gateway.post("/v1/messages", HELLO_STREAM) for _ in range(3)]
    replies += [await gateway.get(path) for path in ("/health", "/v1/models", "/nothing")]

    seen = caplog.text + json.dumps(gateway.entries()) + repr(gateway.gateway.config.upstreams)
    seen += "".join(f"{reply.headers}{reply.body!r}" for reply in replies)
    assert UPSTREAM_KEY not in seen and KEY not in seen
    assert "alice (…stuv)" in caplog.text
    caplog.clear()


async def test_an_api_key_that_an_upstream_says_back_is_neither_in_the_ledger_nor_in_the_log(gateway, upstream, caplog):
    """
    As an error's type, as the model that served, as the id of its answer. The answer's own bytes are the client's.
    """
    caplog.set_level("DEBUG")
    failed = {"type": "error", "error": {"type": f"bad_{UPSTREAM_KEY}", "message": "no"}}
    answered = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": UPSTREAM_KEY,
        "content": [],
        "usage": {},
    }
    upstream.scripts = [json_body(each, request_id=f"req-{UPSTREAM_KEY}") for each in (failed, answered)]

    for _ in range(2):
        await gateway.post("/v1/messages", HELLO)
        await gateway.settled()

    booked = json.dumps(gateway.entries())
    assert UPSTREAM_KEY not in booked + caplog.text
    assert "req-(our API key)" in booked and "bad_(our API key)" in booked + caplog.text
    caplog.clear()


# --- what an error that is the client's at once says of its upstream --------------------


@pytest.mark.parametrize("status, whys", [(529, ("529", None)), (429, (None, "429")), (400, (None, None))])
async def test_an_error_that_is_passed_on_at_once_is_held_against_whom_the_verdict_blames(
    start_gateway, upstream, caplog, status, whys
):
    """
    `next: false` says that nobody else is asked, not that the upstream is fine: its breaker counts all the same.
    """
    more = ", verdicts: {5xx: {next: false}, 429: {next: false}}"
    gateway = await start_gateway(config_text(upstream.url, more))
    refusal_of = {"type": "error", "error": {"type": "x", "message": "no"}}
    upstream.script = json_body(refusal_of, status=status, retry_after="30")

    reply = await gateway.post("/v1/messages", HELLO)
    await gateway.settled()

    (row,) = gateway.gateway.relay.upstreams.report(gateway.gateway.config.upstreams)
    assert reply.status == status
    assert (row.get("why"), row["keys"][0].get("why")) == whys
    caplog.clear()


# --- answers that have ended --------------------------------------------------------------------


def failed_response(usage: dict | None) -> dict:
    """A Responses answer that failed, as the API reference has it."""
    error = {"code": "server_error", "message": "The model failed to generate a response."}
    return {"id": "r", "object": "response", "model": "gpt-test", "status": "failed", "error": error, "usage": usage}


PAID = {"input_tokens": 1000, "output_tokens": 200, "total_tokens": 1200}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_response_that_failed_after_work_is_the_clients_answer(start_gateway, upstream, stream):
    """
    HTTP 200 and `status: failed` with its usage: relayed as it came, booked once, and not paid for four times.
    """
    gateway = await start_gateway(config_text(upstream.url, ", format: openai").replace("attempts: 1", "attempts: 4"))
    failed = failed_response(PAID)
    steps = [head(200, SSE), event("", {"type": "response.failed", "response": failed}), end()]
    upstream.script = steps if stream else json_body(failed)

    async with passing_time(gateway):
        reply = await gateway.post("/v1/responses", {"model": "gpt-test", "input": "hi", "stream": stream})
    await gateway.settled()

    assert (reply.status, len(upstream.requests), reply.was_cut) == (200, 1, False)
    assert stream or reply.json == failed
    (entry,) = gateway.entries()
    assert ledger_line(entry, "status", "outcome", "error_type", "input_tokens", "output_tokens", "estimated") == {
        "status": 200,
        "outcome": "upstream_error",
        "error_type": "server_error",
        "input_tokens": 1000,
        "output_tokens": 200,
        "estimated": False,
    }


@pytest.mark.parametrize("usage", [None, {"input_tokens": 0, "output_tokens": 0}], ids=["no usage", "zero"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_response_that_failed_before_any_work_is_tried_again(start_gateway, upstream, stream, usage):
    """
    Nothing of it is charged; when every try ends so, the client gets the upstream's own answer under its own status.
    """
    gateway = await start_gateway(config_text(upstream.url, ", format: openai").replace("attempts: 1", "attempts: 2"))
    failed = failed_response(usage)
    steps = [head(200, SSE), event("", {"type": "response.failed", "response": failed}), end()]
    upstream.script = steps if stream else json_body(failed)

    async with passing_time(gateway):
        reply = await gateway.post("/v1/responses", {"model": "gpt-test", "input": "hi", "stream": stream})
    await gateway.settled()

    assert (reply.status, len(upstream.requests)) == (200, 2)
    assert stream or reply.json == failed
    (entry,) = gateway.entries()
    assert ledger_line(entry, "outcome", "status", "cost_usd") == {
        "outcome": "upstream_error",
        "status": 200,
        "cost_usd": 0.0,
    }


ENDED = {
    "messages": (
        "/v1/messages",
        "",
        [message_start(12), text("Hi"), message_delta(5), message_stop()],
        b"message_stop",
    ),
    "chat": ("/v1/chat/completions", ", format: openai", chat_hello(stream=True)[1:-1], b"[DONE]"),
    "responses": (
        "/v1/responses",
        ", format: openai",
        [event("", {"type": "response.output_text.delta", "delta": "Hi"}), response_completed(12, 5)],
        b'"total_tokens"',
    ),
}


@pytest.mark.parametrize("then", ["the upstream ends", "the upstream stays silent", "the gateway stops"])
@pytest.mark.parametrize("kind", ENDED)
async def test_a_client_that_closes_after_the_terminal_event_had_its_answer(start_gateway, upstream, kind, then):
    """
    Codex does so after response.completed, others after message_stop or [DONE]: that is `completed`.
    """
    path, more, steps, mark = ENDED[kind]
    gateway = await start_gateway(config_text(upstream.url, more))
    go_on = asyncio.Event()
    upstream.script = [head(200, SSE), *steps, wait_for(go_on), end()]
    client = await gateway.connect()
    await client.send(request_bytes("POST", path, {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await client.read_until(mark)

    client.abort()
    await gateway_sees_it_gone(gateway)
    if then == "the gateway stops":
        gateway.gateway.relay.close()
    elif then == "the upstream ends":
        go_on.set()
    else:
        gateway.tick(61)
    await gateway.settled()

    (entry,) = gateway.entries()
    assert ledger_line(entry, "outcome", "status", "input_tokens", "output_tokens", "estimated") == {
        "outcome": "completed",
        "status": 200,
        "input_tokens": 12,
        "output_tokens": 5,
        "estimated": False,
    }
    assert entry["attempts"][0]["outcome"] == "completed"


async def test_an_answer_that_its_client_left_is_client_gone_also_where_the_gateway_stops(start_gateway, upstream):
    """
    Whose answer a stop has cut is told by `gateway_stopped`: nobody's here.
    """
    gateway = await start_gateway(config_text(upstream.url, ", on_disconnect: drain"))
    upstream.script = [head(200, SSE), message_start(input_tokens=12), text("Hel"), stall()]
    client = await start_stream(gateway)
    client.abort()
    await gateway_sees_it_gone(gateway)

    gateway.gateway.relay.close()
    await gateway.settled()

    assert [entry["outcome"] for entry in gateway.entries()] == ["client_gone"]


async def test_a_client_that_closes_before_the_terminal_event_is_gone(gateway, upstream):
    """
    message_delta has the usage, but the answer is not over.
    """
    upstream.script = [head(200, SSE), message_start(12), text("Hi"), message_delta(5), stall()]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await client.read_until(b"message_delta")

    client.abort()
    await gateway_sees_it_gone(gateway)
    await gateway.settled()

    assert gateway.entries()[0]["outcome"] == "client_gone"


# --- numbers that nobody believes ---------------------------------------------------------------


@pytest.mark.logs("is not believed, and estimated")
@pytest.mark.parametrize("count", [1 << 48, 10**9, 10**400])
async def test_an_absurd_usage_is_refused_loudly_and_the_limit_holds(start_gateway, upstream, count):
    """
    2^48 tokens once turned the counter over and lifted the limit; a billion, which can be counted, would cost $50,000;
    of a number with 400 digits the client got a 500.
    """
    gateway = await start_gateway(limited(upstream.url, "{usd/day: 20, tokens/day: 1M}"))
    upstream.script = stream_of("Hello", " world", input_tokens=12, output_tokens=count)

    reply = await gateway.post("/v1/messages", HELLO_STREAM)

    assert reply.texts == ["Hello", " world"]
    (entry,) = gateway.entries()
    assert ledger_line(entry, "outcome", "error_type", "estimated", "output_tokens") == {
        "outcome": "completed",
        "error_type": "absurd_usage",
        "estimated": True,
        "output_tokens": len("Hello world") // 4,
    }
    assert 0 < entry["input_tokens"] < len(json.dumps(HELLO_STREAM)) and 0 < entry["cost_usd"] < 0.01
    again = await gateway.post("/v1/messages", HELLO_STREAM)
    assert again.status == 200  # it costs what it costs, and no more


@pytest.mark.logs("no answer")
async def test_garbage_that_was_thrown_away_unread_is_not_booked(gateway, upstream):
    """
    A page of megabytes where JSON was expected: the client gets a 502, and nobody charges for it.
    """
    page = b"<html>" + b"x" * (2 << 20)
    upstream.script = [head(200, "text/html", content_length=str(len(page))), body(page)]

    reply = await gateway.post("/v1/messages", HELLO)

    (entry,) = gateway.entries()
    assert (reply.status, entry["outcome"]) == (502, "upstream_error")
    assert ledger_line(entry, "input_tokens", "output_tokens", "cost_usd") == {
        "input_tokens": 0,
        "output_tokens": 0,
        "cost_usd": 0.0,
    }


async def test_a_client_that_leaves_while_spaces_come_pays_for_the_input(gateway, upstream):
    """
    Some servers keep a line alive with spaces before their JSON: that is no garbage, and work is being done.
    """
    upstream.script = [head(200, "application/json"), body(b" \n "), stall()]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode()))
    await until(lambda: any(e.attempt and e.attempt.held_size for e in gateway.gateway.relay.running))

    client.abort()
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["outcome"], entry["estimated"]) == ("client_gone", True) and entry["input_tokens"] > 0


@pytest.mark.parametrize("moves", [g.EXCHANGE_MOVES, g.ATTEMPT_MOVES], ids=["exchange", "attempt"])
async def test_a_phase_becomes_only_what_its_table_has(gateway, moves):
    """
    Any other move is a bug, and is raised as one.
    """
    relay, config = gateway.gateway.relay, gateway.gateway.config
    call = g.Call(config, next(iter(config.keys)), g.ROUTES["/v1/messages"], b"", [], "127.0.0.1")
    (choice,) = relay.upstreams.choices(config.upstreams[0])
    moving = g.Exchange.of(call, g.ClientConnection(gateway.door), relay)
    if moves is g.ATTEMPT_MOVES:
        with g.Ticket(relay.upstreams, call, choice, "m") as ticket:
            moving = g.Attempt.of(moving, ticket, g.DIALECTS["anthropic", "messages"])

    made = set()
    for before, after in itertools.product(moves, repeat=2):
        moving.phase = before
        with contextlib.suppress(g.IllegalMove):
            moving._move(after)
            made.add((before, after))

    assert made == {(before, after) for before in moves for after in moves[before]}
    assert all(before < after for before, after in made)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("dialect", g.DIALECTS.values(), ids=map(str, g.DIALECTS))
async def test_what_an_upstream_of_the_same_format_says_stays_the_same_objects(gateway, dialect, streaming):
    """
    Bytes are relayed as they came: not equal ones, but these.
    """
    config = gateway.gateway.config
    call = g.Call(config, next(iter(config.keys)), g.ROUTES["/v1/messages"], b'{"model": "m"}', [], "127.0.0.1")
    call.model = "m"
    pieces = [b'event: ping\ndata: {"type":', b' "ping"}\n\n', b"{", b""]

    reader = dialect.reader(call)
    reader.start(streaming)
    passed = [reader.read(piece, last=piece == b"") for piece in pieces]

    assert [id(piece) for piece in passed] == [id(piece) for piece in pieces]
    assert [id(piece) for piece in dialect.request(call, "m")] == [id(call.body)]


def test_every_route_that_an_upstream_serves_has_a_dialect():
    """
    And no other.
    """
    formats = get_args(get_type_hints(g.UpstreamConfig)["format"])
    served = {
        (name, r.kind) for name in formats for r in g.ROUTES.values() if g.UpstreamConfig("u", format=name).serves(r)
    }

    assert served == set(g.DIALECTS)


class Shout(g.MessagesMeter):
    """Reads a stream and gives the client each event in capitals, once it is whole."""

    rest = b""

    def read(self, chunk: bytes, last: bool) -> bytes:
        super().read(chunk, last)
        *events, self.rest = (self.rest + chunk).split(b"\n\n")
        return b"".join(event.upper() + b"\n\n" for event in events)


class Kept:
    """A sink that keeps what it is given."""

    exchange = None
    is_gone = False
    sent = b""

    def head(self, status: int, headers: g.Headers, streaming: bool) -> None: ...

    def write(self, data: bytes, last: bool) -> None:
        self.sent += data


@pytest.mark.parametrize("fails", [True, False])
async def test_a_translated_stream_is_held_back_as_a_native_one(gateway, fails):
    """
    Whatever a reader makes of the bytes, the gate goes by what it has read: nothing goes out before the first content.
    """
    relay, config = gateway.gateway.relay, gateway.gateway.config
    call = g.Call(config, next(iter(config.keys)), g.ROUTES["/v1/messages"], b"", [], "127.0.0.1")
    (choice,) = relay.upstreams.choices(config.upstreams[0])
    sink = Kept()
    exchange = sink.exchange = g.Exchange.of(call, sink, relay)
    with g.Ticket(relay.upstreams, call, choice, "m") as ticket:
        attempt = exchange.attempt = g.Attempt.of(exchange, ticket, g.Dialect(Shout))
    attempt.begin(g.DemoLine(0.0), b"POST / HTTP/1.1\r\n\r\n", (b"{",))
    attempt.line.abort()

    attempt.head(200, [(b"content-type", b"text/event-stream")])
    attempt.received(b'data: {"type": "message_start"}\n\ndata: {"type": ', False)
    before = sink.sent
    if fails:
        attempt.lost(g.CUT)
        with pytest.raises(g.AttemptFailed):
            await attempt.done
        return
    attempt.received(b'"content_block_start"}\n\n', False)

    assert (before, exchange.phase) == (b"", g.ExchangePhase.ANSWERING)
    assert sink.sent == b'DATA: {"TYPE": "MESSAGE_START"}\n\nDATA: {"TYPE": "CONTENT_BLOCK_START"}\n\n'

"""Which requests are served, which are refused, and how."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from client import request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, UPSTREAM_KEY, GatewayUnderTest, TracedMemory, config_text, until
from upstream import head, hello_json, json_body, message_start, stall, text

import gateway as g


@pytest.mark.parametrize(
    "path",
    [
        "/v1/messages",
        "/v1/messages?beta=true",
        "/v1/v1/messages?beta=true",
        "//v1/messages",
        "/v1/./messages",
        "/x/../v1/messages",
        "/v1%2fmessages",
        "/v1/%6dessages",
        "http://elsewhere.test/v1/messages",
    ],
)
async def test_a_forwardable_path_reaches_the_upstream_in_the_tables_spelling(gateway, upstream, path):
    """
    However a path of the table is spelt, the upstream gets the table's own spelling, and the query unchanged.
    """
    upstream.script = hello_json()

    reply = await gateway.post(path, HELLO)

    assert reply.status == 200
    assert upstream.requests[-1].target == "/v1/messages" + ("?beta=true" if "?" in path else "")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/messages/batches", 404),
        ("GET", "/v1/messages/batches/b1/results", 404),
        ("POST", "/v1/files", 404),
        ("GET", "/v1/files/f1/content", 404),
        ("GET", "/v1/organizations/x", 404),
        ("POST", "/v1/complete", 404),
        ("POST", "/v1/messages/../files", 404),
        ("GET", "/v1/messages", 405),
        ("DELETE", "/v1/messages", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("GET", "/", 404),
        ("OPTIONS", "*", 404),
        ("POST", "/v1/messages/../../etc/passwd", 404),
    ],
)
async def test_invariant_9_nothing_but_the_table_reaches_an_upstream(gateway, upstream, method, path, status):
    """
    Invariant 9: only the paths of a table are forwarded; batches and files belong to the upstream's key.
    """
    reply = await gateway.request(method, path, HELLO if method in ("POST", "PUT") else b"")

    assert reply.status == status
    assert reply.error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("method", "path"),
    [("HEAD", "/"), ("HEAD", "/api/hello"), ("GET", "/api/hello"), ("POST", "/api/event_logging/batch")],
)
async def test_what_clients_ask_on_their_own_is_answered_here(gateway, upstream, method, path):
    """
    Connection warming and telemetry cost no key and no upstream, and keep the connection.
    """
    connection = await gateway.connect()

    replies = [await connection.request(method, path, {}, b"x" * 44_000 if method == "POST" else b"") for _ in "12"]

    assert [reply.status for reply in replies] == [200, 200]
    assert upstream.requests == [] and gateway.entries() == []
    await connection.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": KEY},
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}", "x-api-key": KEY},
    ],
)
async def test_a_key_is_taken_as_bearer_or_x_api_key_or_both(gateway, upstream, headers):
    """
    Each form works; none is forwarded, the upstream gets its own key.
    """
    upstream.script = hello_json()
    connection = await gateway.connect()

    reply = await connection.request("POST", "/v1/messages", headers, json.dumps(HELLO).encode())

    assert reply.status == 200
    assert upstream.requests[-1].header["x-api-key"] == UPSTREAM_KEY
    assert KEY not in str(upstream.requests[-1].headers) and "authorization" not in upstream.requests[-1].header
    await connection.close()


KEYS = f"""
upstreams: [{{name: d, format: demo}}]
keys:
  - {{name: alice, key: {KEY}}}
  - {{name: gone, key: sk-proxy-disabled-0123456789, enabled: false}}
  - {{name: old, key: sk-proxy-expired-01234567890, expires: 2026-09-20}}
  - {{name: last-day, key: sk-proxy-last-day-0123456789, expires: 2026-09-21}}
  - {{name: far, key: sk-proxy-foreign-01234567890, allow_ips: [10.0.0.0/8]}}
  - {{name: sonnet, key: sk-proxy-sonnet-only-0123456, models: ["claude-sonnet-*"]}}
"""


@pytest.mark.parametrize(
    ("token", "status", "kind", "words"),
    [
        ("", 401, "authentication_error", "No key was sent."),
        ("sk-proxy-nobody-has-this-one", 401, "authentication_error", "does not know the key"),
        ("sk-proxy-disabled-0123456789", 403, "permission_error", "The key gone (…6789) is disabled."),
        ("sk-proxy-expired-01234567890", 401, "authentication_error", "expired at 2026-09-21 00:00 UTC"),
        ("sk-proxy-foreign-01234567890", 403, "permission_error", "may not be used from 127.0.0.1"),
        ("sk-proxy-sonnet-only-0123456", 400, "policy_blocked", "may not use the model 'claude-test'"),
    ],
)
async def test_each_key_that_must_not_call_is_told_why(start_gateway, token, status, kind, words):
    """
    The status and type make Claude Code stop at the first request; the words say who can help.
    """
    gateway = await start_gateway(KEYS)

    reply = await gateway.post("/v1/messages", HELLO, token=token)

    assert (reply.status, reply.error["type"]) == (status, kind)
    assert words in reply.error["message"] and "x-api-key" not in reply.error["message"]
    assert reply.headers["x-should-retry"] == "false"
    assert reply.json["request_id"] == reply.headers["request-id"]
    assert gateway.entries() == []


async def test_a_key_works_to_the_end_of_its_last_day(start_gateway):
    """
    `expires` names a day, and the day still counts.
    """
    gateway = await start_gateway(KEYS)

    today = await gateway.post("/v1/messages", HELLO, token="sk-proxy-last-day-0123456789")
    gateway.clock.advance(12 * 3600)
    tomorrow = await gateway.post("/v1/messages", HELLO, token="sk-proxy-last-day-0123456789")

    assert (today.status, tomorrow.status) == (200, 401)


async def test_two_different_keys_are_refused(gateway):
    """
    Which of two keys is meant is not guessed.
    """
    reply = await gateway.post("/v1/messages", HELLO, authorization="Bearer sk-proxy-another-one-entirely")

    assert reply.status == 401
    assert reply.error["message"].startswith("Two different keys were sent.")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
async def test_openai_clients_get_errors_in_their_own_shape(gateway, path):
    """
    Errors of our own are in the client's format, by path, with a request id.
    """
    reply = await gateway.post(path, HELLO, token="sk-proxy-nobody-has-this-one")

    assert reply.status == 401
    assert reply.json == {
        "error": {
            "message": "This gateway does not know the key that was sent. Ask whoever runs it.",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        },
        "request_id": reply.headers["request-id"],
    }


async def test_invariant_10_a_wrong_key_is_refused_before_the_body_is_read(gateway):
    """
    Invariant 10: 401 comes at once, however long the announced body is.
    """
    connection = await gateway.connect()

    await connection.send(request_bytes("POST", "/v1/messages", {"x-api-key": "wrong", "content-length": "20000000"}))
    reply = await connection.answer()

    assert (reply.status, reply.headers["connection"]) == (401, "close")
    assert await connection.is_closed()
    await connection.send(b"x" * 300_000)  # what the client had already sent is read and thrown away
    gateway.tick(seconds=3)
    await until(lambda: not gateway.door.connections)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-length": "1048577"}, 413),
        ({"content-encoding": "gzip", "content-length": "9"}, 415),
        ({"content-encoding": "br", "content-length": "9"}, 415),
    ],
)
async def test_a_body_that_cannot_be_taken_is_refused_by_its_head(start_gateway, upstream, headers, status):
    """
    Too long and compressed bodies are refused before they are read: no decompression bombs.
    """
    gateway = await start_gateway("server: {max_body: 1MB}\n" + config_text(upstream.url).split("\n", 2)[2])
    connection = await gateway.connect()

    await connection.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY} | headers))
    reply = await connection.answer()

    assert reply.status == status
    await connection.close()


async def test_a_chunked_body_is_taken_up_to_the_limit(start_gateway, upstream):
    """
    Without a Content-Length the limit holds all the same, and a good body arrives whole.
    """
    gateway = await start_gateway("server: {max_body: 1MB}\n" + config_text(upstream.url).split("\n", 2)[2])
    upstream.script = hello_json()
    body = json.dumps(HELLO).encode()
    small, large = await gateway.connect(), await gateway.connect()
    chunked = {"x-api-key": KEY, "transfer-encoding": "chunked"}

    good = await small.request("POST", "/v1/messages", chunked, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    await large.send(request_bytes("POST", "/v1/messages", chunked) + b"200000\r\n" + b" " * (1 << 20) + b" ")
    bad = await large.answer()

    assert good.status == 200 and upstream.requests[-1].body == body
    assert (bad.status, bad.error["type"]) == (413, "request_too_large")
    await small.close()
    await large.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[]", "not as expected: Expected `object`, got `array`"),
        (b"{}", "model: field required"),
        (b'{"model": 1}', "not as expected: Expected `str`, got `int` - at `$.model`"),
        (b'{"model": "a\\nb"}', "printable"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused_with_the_place(gateway, upstream, body, words):
    """
    A bad request gets a clear 400 and never reaches the upstream; the connection lives on.
    """
    connection = await gateway.connect()

    reply = await connection.request("POST", "/v1/messages", {"x-api-key": KEY}, body)
    again = await connection.request("HEAD", "/", {})

    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert words in reply.error["message"]
    assert again.status == 200 and upstream.requests == []
    await connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\nab",
        b"POST /v1/messages HTTP/1.1\r\nhost : x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_not_http_gets_a_400_and_an_end(gateway, data):
    """
    Nothing that could be read in two ways is read at all.
    """
    connection = await gateway.connect()

    await connection.send(data)
    reply = await connection.answer()

    assert reply.status == 400
    assert await connection.is_closed()


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-length": "300000"}, b"x" * 300_000, 404),
        ({"transfer-encoding": "chunked"}, b"1\r\nx\r\n" * 10_000 + b"0\r\nx: y\r\n\r\n", 404),
        ({"content-length": "2000000"}, b"x" * 1_200_000, 413),
        ({"transfer-encoding": "chunked"}, b"1e8480\r\n" + b"x" * 1_200_000, 413),
    ],
)
async def test_a_body_that_nobody_reads_is_thrown_away(gateway, headers, body, status):
    """
    Pages get heads alone: 250 bodies of 1 MB without a key took 279 MB.
    """
    connection = await gateway.connect()

    reply = await connection.request("POST", "/v1/files", headers, body)

    assert reply.status == status


async def test_an_unfinished_body_that_nobody_reads_is_not_kept(gateway):
    """
    Before it is whole it is thrown away already.
    """
    connection = await gateway.connect()
    ours = await connection_of(gateway)
    piece = b"x" * 10_000
    await connection.send(request_bytes("POST", "/v1/files", {"content-length": "1000000"}))

    with TracedMemory() as memory:
        for _ in range(90):
            await connection.send(piece)
        await until(lambda: ours.request.body_size == 900_000)

    assert memory.held < 100_000


async def test_a_page_reads_the_head_that_the_client_sent(gateway, upstream):
    """
    Method, target and headers, but for those of the body: the query and the key arrive.
    """
    request = b"GET /api/usage/logs?limit=0 HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\n\r\n" % KEY.encode()
    with_body = request.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}")
    old = request.replace(b"HTTP/1.1", b"HTTP/1.0")

    messages = []
    for data in (request, with_body, old):
        connection = await gateway.connect()
        await connection.send(data)
        messages.append((await connection.answer()).error["message"])

    assert messages == ["limit: expected 1 to 1000, got '0'"] * 3


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"host: x\r\nx: " + b"y" * 70_000, 431),
        (b"host: x\r\nx: y\r\n" + b"a:\r\n" * 101, 431),
        (b"host: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"host: x\r\ntransfer-encoding: chunked\r\n\r\n", 401),
    ],
)
async def test_a_refusal_while_a_request_is_read_is_in_the_clients_format(gateway, sent, status):
    """
    The path of the first line says which API the client speaks, however its head goes on.
    """
    codes = []
    for path in (b"/v1/chat/completions", b"/v1/messages"):
        connection = await gateway.connect()
        await connection.send(b"POST " + path + b" HTTP/1.1\r\n" + sent)
        reply = await connection.answer()
        codes.append((reply.status, "code" in reply.error))

    assert codes == [(status, True), (status, False)]


async def test_an_endless_head_is_refused(gateway):
    """
    A head has a bound, in bytes.
    """
    connection = await gateway.connect()

    await connection.send(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\n" + b"x-filler: y\r\n" * 6000)
    reply = await connection.answer()

    assert reply.status == 431
    await connection.close()


async def test_a_head_has_a_bounded_number_of_headers(gateway, upstream):
    """
    16,000 headers of four bytes took 2 MB a connection before any key was looked at.
    """
    upstream.script = hello_json()
    many = {f"x-{i}": "" for i in range(g.Request.MAX_HEADERS - 3)}  # and host, key, length

    good = await gateway.post("/v1/messages", HELLO, **many)
    bad = await gateway.post("/v1/messages", HELLO, **many, more="")
    at_tornado = await gateway.get("/health", **many, more="", once_more="")

    assert (good.status, bad.status, at_tornado.status) == (200, 431, 431)


@pytest.mark.parametrize(("filler", "status"), [(60_000, 200), (70_000, 431)])
async def test_a_head_is_measured_by_itself_however_much_of_the_body_comes_with_it(gateway, upstream, filler, status):
    """
    One read may bring a head and a large part of the body.
    """
    upstream.script = hello_json()

    reply = await gateway.post("/v1/messages", HELLO | {"system": "x" * 200_000}, filler="y" * filler)

    assert reply.status == status


CALL = request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())
LOGS = request_bytes("POST", "/api/event_logging/batch", {"transfer-encoding": "chunked"})
CHUNKED_CALL = request_bytes("POST", "/v1/messages", {"x-api-key": KEY, "transfer-encoding": "chunked"})
OTHER_KEY = "sk-proxy-zyxwvutsrqponmlkjihgfedcba9876543"
THIRD_KEY = "sk-proxy-third0123456789abcdefghijklmnopqrst"
REFUSED = request_bytes("POST", "/v1/messages", {"x-api-key": "wrong", "transfer-encoding": "chunked"})


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (LOGS + b"2\r\n{}\r\n0\r\nx-trailer: ", 400),
        (LOGS + b"2;extension=", 400),
        (REFUSED + b"2\r\n{}\r\n0\r\nx-trailer: ", 401),
        (b"POST /v1/messages HTTP/1.1\r\nx-filler: ", 431),
        pytest.param(
            CALL + b"POST /v1/messages HTTP/1.1\r\nx-filler: ",
            504,
            marks=pytest.mark.logs("upstream main did not answer in time"),
        ),
    ],
    ids=["trailer", "chunk extension", "trailer after 401", "head", "ahead of the answer"],
)
async def test_a_value_without_end_is_not_kept_in_any_state(gateway, upstream, sent, status):
    """
    The parser joins a header's value until it ends, and copies it with each piece: 130 MB were 21 s of a dead loop.
    """
    upstream.script = [stall()]
    connection = await gateway.connect()
    await connection.send(sent)
    with TracedMemory() as memory:
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                await connection.send(b"x" * (64 << 10))
        await until(lambda: upstream.requests or status != 504)
        gateway.tick(seconds=400 if status == 504 else 0)
        reply = await connection.answer()

    assert reply.status == status
    assert memory.peak < 2 << 20  # of 4 MB, and what asyncio holds of them in this process


async def test_a_refused_client_is_let_go_though_it_sends_on(gateway):
    """
    Invariant 8: what still comes behind a refusal does not prolong the goodbye; a byte a second held it for ever.
    """
    connection = await gateway.connect()
    ours = await connection_of(gateway)
    await connection.send(request_bytes("POST", "/v1/messages", {"x-api-key": "wrong", "content-length": "1000"}))
    reply = await connection.answer()

    for _ in range(11):
        if gateway.door.connections:
            gateway.tick(seconds=1)
            with contextlib.suppress(ConnectionError):
                await connection.send(b"x")
                await until(lambda: ours._active_at == gateway.clock.now or not gateway.door.connections)

    assert reply.status == 401
    await until(lambda: not gateway.door.connections)


@pytest.mark.parametrize(("key", "seconds"), [(None, 31), ("", 31), (KEY, 301)])
async def test_a_connection_may_be_idle_longer_once_it_has_shown_a_key(gateway, upstream, key, seconds):
    """
    The first request comes within head_s, and the next one too where nobody knows whose it is; else in keep_alive_s.
    """
    upstream.script = hello_json()
    connection = await gateway.connect()
    await connection_of(gateway)
    if key is not None:
        path = "/v1/messages" if key else "/api/event_logging/batch"
        reply = await connection.request("POST", path, {"x-api-key": key}, json.dumps(HELLO).encode())
        assert reply.status == 200

    gateway.tick(seconds=seconds - 2)
    still_open = len(gateway.door.connections)
    gateway.tick(seconds=2)

    assert await connection.is_closed()
    assert still_open == 1


@pytest.mark.parametrize(("proxies", "left"), [("", 2), ("127.0.0.0/8", 4)])
async def test_an_address_has_only_so_many_connections_without_a_good_key(start_gateway, upstream, proxies, left):
    """
    A connection that shows its key counts no more; those of a trusted proxy are other people's.
    """
    upstream.script = hello_json()
    config = config_text(upstream.url).replace("port: 0", f"port: 0, trusted_proxies: [{proxies}]")
    gateway = await start_gateway(config, pace=GatewayUnderTest.PACE._replace(strangers=2))
    known = await gateway.connect()
    await known.request("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())

    strangers = [await gateway.connect() for _ in range(4)]
    await until(lambda: len(gateway.door.connections) == left + 1)
    again = await known.request("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())

    assert again.status == 200
    assert gateway.gateway.metrics.connections_refused == ({"address": 2} if left == 2 else {})
    for stranger in strangers[: 4 - left]:  # the oldest: whoever comes now is served
        assert await stranger.is_closed()
    assert (await strangers[-1].request("HEAD", "/", {})).status == 200


async def test_a_connection_that_asks_for_a_page_with_a_good_key_is_no_strangers(start_gateway, upstream):
    """
    Whoever asks for the list of models keeps the connection, however many come without a key from the same address.
    """
    upstream.script = [stall()]
    config = config_text(upstream.url).replace("port: 0", "port: 0, trusted_proxies: []")
    gateway = await start_gateway(config, pace=GatewayUnderTest.PACE._replace(strangers=2))
    asking = await gateway.connect()
    await asking.send(request_bytes("GET", "/v1/models", {"x-api-key": KEY}))
    await upstream.request_came()
    handed = next(iter(gateway.door.connections))

    strangers = [await gateway.connect() for _ in range(3)]
    await strangers[0].is_closed()

    assert handed in gateway.door.connections and handed.key_name == "alice"
    asking.abort()
    await until(lambda: handed not in gateway.door.connections)
    assert ("key", "alice") not in gateway.door._groups


async def test_the_oldest_connection_without_a_key_makes_room_for_a_new_one(start_gateway, upstream):
    """
    All connections are bounded. Whoever fills them without a key keeps nobody out who has one.
    """
    upstream.script = hello_json()
    gateway = await start_gateway(config_text(upstream.url), most=6)
    known = await gateway.connect()
    first = await known.request("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())
    strangers = []
    for count in range(2, 7):
        strangers.append(await gateway.connect())
        await until(lambda count=count: len(gateway.door.connections) == count)

    newcomer = await gateway.post("/v1/messages", HELLO)
    again = await known.request("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())

    assert (first.status, newcomer.status, again.status) == (200, 200, 200)
    assert await strangers[0].is_closed()
    assert gateway.gateway.metrics.connections_refused == {"oldest": 1}


@pytest.mark.logs("1 connections were closed for want of room in the last minute: full")
async def test_where_all_connections_are_in_use_a_new_one_is_closed(start_gateway, upstream):
    """
    A stream that runs is not given up for a stranger. The log says so, once a minute.
    """
    upstream.script = [head(200, "text/event-stream"), message_start(12), text("hello"), stall()]
    two = config_text(upstream.url).replace("keys:", f"keys:\n  - {{name: bob, key: {OTHER_KEY}}}")
    gateway = await start_gateway(two, most=2)
    for key in (KEY, OTHER_KEY):
        stream = await gateway.connect()
        await stream.send(request_bytes("POST", "/v1/messages", {"x-api-key": key}, json.dumps(HELLO_STREAM).encode()))
        await stream.read_until(b"hello")

    late = await gateway.connect()
    assert await late.is_closed()
    gateway.tick(60)


async def test_one_keys_unfinished_bodies_keep_nobody_out(start_gateway, upstream):
    """
    290 of them took all the places, and everybody else was reset for a minute, /health included.
    """
    upstream.script = hello_json()
    two = config_text(upstream.url).replace("keys:", f"keys:\n  - {{name: bob, key: {OTHER_KEY}}}")
    gateway = await start_gateway(two, most=6)
    unfinished = []
    for count in range(1, 7):
        token, name = [(KEY, "alice"), (OTHER_KEY, "bob")][count % 2]
        unfinished.append(await gateway.connect())
        await unfinished[-1].send(request_bytes("POST", "/v1/messages", {"x-api-key": token, "content-length": "100"}))
        await until(lambda name=name, count=count: len(gateway.door._groups.get(("key", name), ())) == (count + 1) // 2)

    health = await gateway.get("/health")

    assert health.status == 200
    assert gateway.gateway.metrics.connections_refused == {"key": 1}
    assert sorted(len(own) for group, own in gateway.door._groups.items() if group[0] == "key") == [2, 3]


async def test_one_key_has_half_of_all_connections_at_most(start_gateway, upstream):
    """
    480 silent streams of one key under `ulimit -n 1024` left no place for anybody else, nor for /health.
    """
    upstream.script = [head(200, "text/event-stream"), message_start(12), text("hello"), stall()]
    two = config_text(upstream.url).replace("keys:", f"keys:\n  - {{name: bob, key: {OTHER_KEY}}}")
    gateway = await start_gateway(two, most=6)
    call = request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode())
    for _ in range(3):
        stream = await gateway.connect()
        await stream.send(call)
        await stream.read_until(b"hello")

    fourth = await gateway.connect()
    await fourth.send(call)
    refused = await fourth.answer()
    upstream.script = hello_json()
    health, bob = await gateway.get("/health"), await gateway.post("/v1/messages", HELLO, token=OTHER_KEY)

    assert (refused.status, health.status, bob.status) == (503, 200, 200)
    assert "4 connections, more than are still free of the 6" in refused.error["message"]
    assert await fourth.is_closed()


async def test_however_many_streams_two_keys_have_there_is_room_for_others(start_gateway, upstream):
    """
    Each had half of all connections, which left none for /health, nor for anybody else.
    """
    upstream.script = [head(200, "text/event-stream"), message_start(12), text("hello"), stall()]
    others = "".join(f"\n  - {{name: {name}, key: {key}}}" for name, key in (("bob", OTHER_KEY), ("carol", THIRD_KEY)))
    gateway = await start_gateway(config_text(upstream.url).replace("keys:", f"keys:{others}"), most=12)
    streams = []
    for number in range(40):
        stream = await gateway.connect()
        token = (KEY, OTHER_KEY)[number % 2]
        call = request_bytes("POST", "/v1/messages", {"x-api-key": token}, json.dumps(HELLO_STREAM).encode())
        await stream.send(call)
        await stream.read_until(b"\r\n\r\n")
        streams.append(stream)

    upstream.script = hello_json()
    health, carol = await gateway.get("/health"), await gateway.post("/v1/messages", HELLO, token=THIRD_KEY)

    assert (health.status, carol.status) == (200, 200)
    assert 8 <= len(gateway.gateway.relay.running) <= 10


@pytest.mark.parametrize("chunk", [b"1\r\nx\r\n", b"7\r\n[1,2,3]\r\n"])
@pytest.mark.parametrize(
    "head", [LOGS, request_bytes("GET", "/health", {"transfer-encoding": "chunked"}), CHUNKED_CALL]
)
async def test_a_body_that_is_mostly_framing_is_refused(gateway, head, chunk):
    """
    A chunk costs a call of Python: 8 connections with bodies in chunks of 7 bytes kept others waiting for 9 s.
    """
    connection = await gateway.connect()
    await connection.send(head)

    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            await connection.send(chunk * 1000)
    reply = await connection.answer()

    assert reply.status == 400 and "framing" in reply.error["message"]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_one_keys_idle_connections_do_not_fill_the_place(start_gateway, upstream, method):
    """
    A key's connections are kept alive while there are not more of them than free places, after pages as after calls.
    """
    upstream.script = hello_json()
    gateway = await start_gateway(config_text(upstream.url), most=6)
    path, body = {"GET": ("/v1/usage", b""), "POST": ("/v1/messages", json.dumps(HELLO).encode())}[method]

    replies = []
    for _ in range(6):
        connection = await gateway.connect()
        replies.append(await connection.request(method, path, {"x-api-key": KEY}, body))

    assert [reply.headers.get("connection") for reply in replies] == [None] * 3 + ["close"] * 3
    await until(lambda: len(gateway.door.connections) == 3)


async def test_a_connection_is_kept_only_while_its_key_has_few(start_gateway, upstream):
    """
    150 idle ones stayed where 48 places were left: judged with each answer now, not with the first one alone.
    """
    upstream.script = hello_json()
    two = config_text(upstream.url).replace("keys:", f"keys:\n  - {{name: bob, key: {OTHER_KEY}}}")
    gateway = await start_gateway(two, most=8)
    connections, body = [await gateway.connect() for _ in range(4)], json.dumps(HELLO).encode()

    async def post(number: int) -> str:
        key = OTHER_KEY if number == 3 else KEY
        reply = await connections[number].request("POST", "/v1/messages", {"x-api-key": key}, body)
        return reply.headers.get("connection", "kept")

    while_there_is_room = [await post(0), await post(1), await post(2), await post(3)]
    gateway.door.most = 5  # alice has three, one place is free
    of_alice = [await post(0), await post(1)]  # two and two, after the first
    await until(lambda: len(gateway.door.connections) == 3)
    afterwards = [await post(2), await post(3)]

    assert while_there_is_room == ["kept"] * 4
    assert of_alice == ["close", "kept"]
    assert afterwards == ["kept"] * 2


async def test_idle_connections_of_a_key_with_many_are_closed_sooner(start_gateway):
    """
    After as long as a stranger's: nobody asks with them again, so no answer could close them.
    """
    two = config_text("http://127.0.0.1:9").replace("keys:", f"keys:\n  - {{name: bob, key: {OTHER_KEY}}}")
    gateway = await start_gateway(two, most=8)
    for key in (KEY, KEY, KEY, OTHER_KEY):
        await (await gateway.connect()).request("GET", "/v1/usage", {"x-api-key": key})
    gateway.door.most = 6  # alice has three, two places are free

    gateway.tick(29)
    before = len(gateway.door.connections)
    gateway.tick(2)
    await until(lambda: len(gateway.door.connections) < before)

    assert before == 4
    assert [connection.key_name for connection in gateway.door.connections] == ["bob"]


@pytest.mark.parametrize("sent", [1.0, 0.5])
async def test_an_idle_connection_makes_room_whichever_key_has_the_most(start_gateway, upstream, sent):
    """
    alice has the most, and hers are being answered, or their bodies come: bob's idle one is closed for whoever comes.
    """
    upstream.scripts = [hello_json(), [stall()], [stall()]]
    two = config_text(upstream.url).replace("keys:", f"keys:\n  - {{name: bob, key: {OTHER_KEY}}}")
    gateway = await start_gateway(two, most=3)
    idle, body = await gateway.connect(), json.dumps(HELLO).encode()
    await idle.request("POST", "/v1/messages", {"x-api-key": OTHER_KEY}, body)
    gateway.door.most = 5  # of which alice may have two
    call = request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, body)
    for count in range(2):
        connection = await gateway.connect()
        await connection.send(call[: len(call) - round(len(body) * (1 - sent))])
        await until(lambda count=count: len(gateway.door._groups.get(("key", "alice"), ())) == count + 1)
    gateway.door.most = 3

    health = await gateway.get("/health", token="")

    assert health.status == 200
    assert gateway.gateway.metrics.connections_refused == {"key": 1}
    assert await idle.is_closed()


async def test_what_loses_least_makes_room_first(start_gateway):
    """
    An idle connection, then one with part of a head, then one with part of a body, though it is the newest.
    """
    gateway = await start_gateway(config_text("http://127.0.0.1:9"), most=20)
    call, known = request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, b"{}"), []
    for beginning in (b"", call[:40], call[:-1]):
        connection = await gateway.connect()
        await connection.request("GET", "/v1/usage", {"x-api-key": KEY})
        await connection.send(beginning)
        known.append(connection)
    await until(lambda: {c.state for c in gateway.door.connections} == {g.State.BODY, g.State.HEAD, g.State.IDLE})

    for most, given_up in zip((3, 2, 1), known, strict=True):
        await until(lambda most=most: len(gateway.door.connections) == most)
        gateway.door.most = most
        health = await gateway.get("/health", token="")
        assert health.status == 200 and await given_up.is_closed()


async def test_a_page_that_takes_too_long_is_given_up(start_gateway, upstream):
    """
    Such a connection is counted like any other, and ends after page_s.
    """
    gateway = await start_gateway(config_text(upstream.url))
    connection = await gateway.connect()
    upstream.script = [stall()]
    await connection.send(request_bytes("GET", "/v1/models", {"x-api-key": KEY}))
    await upstream.request_came()  # else the passing time would end the connecting

    gateway.tick(seconds=119)
    during = len(gateway.door.connections)
    gateway.tick(seconds=2)

    assert during == 1 and await connection.is_closed()
    await until(lambda: not gateway.door.connections)


@pytest.mark.parametrize(("hard", "most"), [(1000, (1000 - 64) // 2), (90, 16)])
def test_the_limit_of_descriptors_is_raised_and_halved(hard, most):
    """
    The soft limit is often 1,024, the hard one far above. Each call needs a connection on both sides.
    """
    script = (
        "import gateway, resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (80, {hard}))\n"
        "print(gateway.raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    root = Path(g.__file__).parent

    out = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)

    assert out.stdout.split() == [str(most), str(hard)]


@pytest.mark.parametrize(
    ("addresses", "count"),
    [
        (["192.0.2.1", "192.0.2.2"], 2),
        (["2001:db8::1", "2001:db8::ffff:1"], 1),
        (["2001:db8::1", "2001:db8:0:1::1"], 2),
        (["::ffff:192.0.2.1", "192.0.2.1"], 1),
        (["", ""], 1),
    ],
)
def test_whose_an_address_is(addresses, count):
    """
    Anybody has a /64 of IPv6, so that its addresses count as one.
    """
    assert len({g.network_of(address) for address in addresses}) == count


async def test_blank_lines_ahead_of_a_request_are_not_kept(gateway):
    """
    Invariant 7: they are no head yet (RFC 9112, 2.2), however many there are, and the request after them is served.
    """
    connection = await gateway.connect()

    for _ in range(20):
        await connection.send(b"\r\n" * 4000)
    reply = await connection.request("GET", "/health", {})

    assert reply.status == 200


@pytest.mark.parametrize(
    ("sent", "seconds"),
    [
        (b"POST /v1/messages HTT", 31),
        (request_bytes("POST", "/v1/messages", {"x-api-key": KEY, "content-length": "9"}), 61),
    ],
)
async def test_a_client_that_sends_too_slowly_is_let_go(gateway, sent, seconds):
    """
    Invariant 8: a head and a body have deadlines.
    """
    connection = await gateway.connect()
    await connection.send(sent)
    await (await gateway.connect()).request("HEAD", "/", {})  # by now the first bytes have been read

    gateway.tick(seconds=seconds)
    reply = await connection.answer()

    assert reply.status == 408
    await connection.close()


async def test_a_body_that_drips_in_has_a_deadline(gateway):
    """
    Silence is not all: after a minute it must have come with 128 KB a second, or it holds memory and a slot for ever.
    """
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY, "content-length": "20000000"}))
    ours, sent = await connection_of(gateway), 0
    for _ in range(0, 81, 20):
        piece = b"x" * (1 if sent else 300_000)
        sent += len(piece)
        await client.send(piece)
        await until(lambda sent=sent: ours.request.body_size == sent)
        gateway.tick(20)
        if ours.state is not g.State.BODY:
            break
    reply = await client.answer()

    assert (reply.status, reply.error["message"]) == (408, "The request's body came too slowly.")
    assert (gateway.clock.now, gateway.gateway.memory.held) == (80, 0)


async def test_a_body_is_kept_once(gateway):
    """
    One piece stays that piece, more of them grow one buffer: a list that is joined takes twice a body's size.
    """
    size = 8 << 20
    data, half = (
        request_bytes("POST", "/v1/messages", {"x-api-key": KEY, "content-length": str(size)}),
        b"?" * (1 << 20),
    )
    client = await gateway.connect()
    await client.send(data)
    ours = await connection_of(gateway)
    with TracedMemory() as memory:
        for sent in range(0, size, len(half)):
            await client.send(half)
            await until(lambda sent=sent: ours.request.body_size == sent + len(half))

    assert (await client.answer()).status == 400
    assert memory.peak < 1.5 * size


async def test_a_head_that_drips_in_is_let_go_all_the_same(gateway):
    """
    A byte now and then does not prolong a head's time.
    """
    connection = await gateway.connect()
    ours = await connection_of(gateway)

    for byte in b"POST /v1/messag":
        before = ours._received
        await connection.send(bytes([byte]))
        await until(lambda before=before: ours._received > before)
        gateway.tick(seconds=2)
    gateway.tick(seconds=1)
    reply = await connection.answer()

    assert reply.status == 408


async def connection_of(gateway):
    """The door's side of the one connection that is open."""
    await until(lambda: gateway.door.connections)
    return next(iter(gateway.door.connections))


async def test_an_expected_100_is_said_only_when_the_body_is_wanted(gateway, upstream):
    """
    A client that asks first (curl, for large bodies) hears 100 with a good key and 401 without.
    """
    upstream.script = hello_json()
    body = json.dumps(HELLO).encode()
    headers = {"expect": "100-continue", "content-length": str(len(body))}
    good, bad = await gateway.connect(), await gateway.connect()

    await good.send(request_bytes("POST", "/v1/messages", headers | {"x-api-key": KEY}))
    await good.read_until(b"HTTP/1.1 100 Continue\r\n\r\n")
    await good.send(body)
    await bad.send(request_bytes("POST", "/v1/messages", headers | {"x-api-key": "wrong"}))

    assert (await good.answer()).status == 200
    assert (await bad.answer()).status == 401
    await good.close()
    await bad.close()


async def test_a_request_sent_ahead_ends_the_connection_after_the_answer(gateway, upstream):
    """
    Pipelined requests are not answered out of turn, mixed up or kept: the connection ends, the client asks again.
    """
    upstream.script = hello_json()
    request = request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())
    connection = await gateway.connect()

    await connection.send(request + request)
    first = await connection.answer()

    assert first.status == 200
    assert await connection.is_closed()
    assert len(upstream.requests) == 1


async def test_a_request_sent_ahead_of_an_answer_made_here_ends_the_connection_too(gateway):
    """
    Its head was not kept for Tornado: better an end at once than a wait for bytes that have been read already.
    """
    connection = await gateway.connect()

    await connection.send(request_bytes("HEAD", "/", {}) + request_bytes("GET", "/health", {}))
    first = await connection.answer(head_only=True)

    assert first.status == 200
    assert await asyncio.wait_for(connection.is_closed(), 2)


async def test_the_end_of_an_answer_goes_out_before_the_process_ends(gateway):
    """
    A call is over when its last bytes are written; a stop right then does not take them from a slow client.
    """
    connection = await gateway.connect()
    ours = await connection_of(gateway)
    ours.transport.write(b"x" * (16 << 20))
    reading = asyncio.ensure_future(connection.rest())

    await gateway.door.close()

    assert not gateway.door.connections  # closed, not merely told to close
    assert len(await reading) == 16 << 20


async def test_a_clients_address_is_what_a_trusted_proxy_says(start_gateway, upstream):
    """
    X-Forwarded-For counts from trusted proxies only, read from the right.
    """
    upstream.script = hello_json()
    gateway = await start_gateway(config_text(upstream.url).replace("port: 0", "port: 0, trusted_proxies: [127.0.0.1]"))

    await gateway.post("/v1/messages", HELLO, x_forwarded_for="6.6.6.6, 10.1.2.3")
    await gateway.write(config_text(upstream.url))
    await gateway.post("/v1/messages", HELLO, x_forwarded_for="10.1.2.3")
    await gateway.write(
        config_text(upstream.url).replace("port: 0", "port: 0, trusted_proxies: [127.0.0.1, 10.0.0.0/8]")
    )
    await gateway.post("/v1/messages", HELLO, x_forwarded_for="6.6.6.6, 203.0.113.9, 10.1.2.3")

    assert [entry["client"] for entry in gateway.entries()] == ["10.1.2.3", "127.0.0.1", "203.0.113.9"]


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("6.6.6.6, 203.0.113.9:4711", "203.0.113.9"),
        ("6.6.6.6, [2001:db8::1]:4711", "2001:db8::1"),
        ("6.6.6.6, [2001:db8::1]", "2001:db8::1"),
        ("6.6.6.6, 2001:db8::1", "2001:db8::1"),
        ("6.6.6.6, 203.0.113.9, 127.0.0.1", "203.0.113.9"),
        ("203.0.113.9, _hidden", "unknown"),
        ("203.0.113.9, unknown", "unknown"),
        ("203.0.113.9, 203.0.113.9:port", "unknown"),
        ("203.0.113.9,", "unknown"),
        ("203.0.113.9, 127.0.0.1, x, 127.0.0.1", "unknown"),
        ("203.0.113.9" + ", 127.0.0.1" * 40, "unknown"),
        ("", "unknown"),
    ],
)
async def test_what_a_proxy_forwards_is_an_address_or_unknown(start_gateway, upstream, forwarded, client):
    """
    Never what stands to the left of something that cannot be read: that may be the client's own invention.
    """
    upstream.script = hello_json()
    gateway = await start_gateway(config_text(upstream.url).replace("port: 0", "port: 0, trusted_proxies: [127.0.0.1]"))

    await gateway.post("/v1/messages", HELLO, x_forwarded_for=forwarded)

    assert gateway.entries()[-1]["client"] == client


async def test_an_unknown_address_is_in_no_network(start_gateway, upstream):
    """
    A key that may be used from some networks is refused where nobody knows from where it comes.
    """
    text = config_text(upstream.url).replace("port: 0", "port: 0, trusted_proxies: [127.0.0.1]")
    gateway = await start_gateway(text.replace(f"key: {KEY}", f"key: {KEY}, allow_ips: [0.0.0.0/0]"))

    reply = await gateway.post("/v1/messages", HELLO, x_forwarded_for="10.1.2.3, nonsense")

    assert (reply.status, reply.error["message"]) == (403, "The key alice (…stuv) may not be used from unknown.")


async def test_health_tells_the_state_and_no_secret(gateway):
    """
    GET /health needs no key and names nothing that is secret.
    """
    reply = await gateway.get("/health", token="")

    assert reply.status == 200
    assert reply.json == {
        "live": True,
        "ready": True,
        "reason": None,
        "starting": None,
        "stopping": False,
        "version": g.VERSION,
        "calls": 0,
        "config": {
            "digest": gateway.gateway.config.digest,
            "loaded_at": "2026-09-21T14:13:20.000Z",
            "reload_failed_at": None,
        },
        "ledger": {"failure": None, "waiting": 0},
        "upstreams": [
            {
                "name": "main",
                "state": "ok",
                "running": 0,
                "failures": 0,
                "keys": [{"number": 1, "state": "ok", "running": 0, "failures": 0}],
            }
        ],
    }


async def test_models_are_those_the_upstreams_list_and_the_key_may_use(start_gateway, upstream):
    """
    GET /v1/models asks the upstreams once, then answers from the cache; a key sees only its own models.
    """
    upstream.script = json_body({"data": [{"type": "model", "id": "claude-a"}, {"type": "model", "id": "gpt-b"}]})
    gateway = await start_gateway(
        config_text(upstream.url).replace("/v1", "").replace(f"key: {KEY}", f'key: {KEY}, models: ["claude-*"]')
    )

    replies = [await gateway.get("/v1/models?limit=1000") for _ in range(3)]
    one, none = await gateway.get("/v1/models/claude-a"), await gateway.get("/v1/models/gpt-b")

    assert [model["id"] for model in replies[-1].json["data"]] == ["claude-a"]
    assert (one.json["id"], one.json["type"], none.status) == ("claude-a", "model", 404)
    assert [request.target for request in upstream.requests] == ["/v1/models?limit=1000"]
    assert upstream.requests[0].header["x-api-key"] == UPSTREAM_KEY
    assert (await gateway.get("/v1/models", token="wrong")).status == 401


async def test_who_asks_for_the_models_at_once_shares_one_request_upstream(start_gateway, upstream):
    """
    However many clients ask before the list has come: each upstream is asked once.
    """
    upstream.script = json_body({"data": [{"type": "model", "id": "claude-a"}]})
    gateway = await start_gateway(config_text(upstream.url).replace("/v1", ""))

    replies = await asyncio.gather(*(gateway.get("/v1/models") for _ in range(40)))

    assert all([model["id"] for model in reply.json["data"]] == ["claude-a"] for reply in replies)
    assert len(upstream.requests) == 1


async def test_models_named_in_the_config_need_no_upstream(start_gateway, upstream):
    """
    Names without a glob are listed as they stand, without a request.
    """
    gateway = await start_gateway(config_text(upstream.url, ", models: {fast: claude-haiku, slow: claude-opus}"))

    reply = await gateway.get("/v1/models")

    assert [model["id"] for model in reply.json["data"]] == ["fast", "slow"]
    assert upstream.requests == []


@pytest.mark.logs("does not list its models")
async def test_an_upstream_that_lists_nothing_does_not_hide_the_others(start_gateway, upstream):
    """
    A failed list is said in the log and costs only that upstream's globs.
    """
    upstream.script = json_body({"error": "no"}, status=500)
    text = config_text(upstream.url, ', models: {"*": "*", named: "*"}')
    gateway = await start_gateway(text.replace("keys:", "  - {name: demo, format: demo}\nkeys:"))

    reply = await gateway.get("/v1/models")

    assert [model["id"] for model in reply.json["data"]] == ["named", "claude-demo"]


async def test_a_renamed_model_is_asked_for_by_the_upstreams_name(start_gateway, upstream):
    """
    A rename map changes the model in the body and nothing else; the ledger has both names.
    """
    gateway = await start_gateway(config_text(upstream.url, ', models: {fast: "claude-haiku-4-5"}'))
    upstream.script = hello_json()
    body = b'{ "x": [1,  2.50], "model": "fast", "messages": [ {"role":"user"} ] }'

    await gateway.post("/v1/messages", body)
    refused = await gateway.post("/v1/messages", HELLO)

    assert (
        upstream.requests[0].body
        == b'{ "x": [1,  2.50], "model": "claude-haiku-4-5", "messages": [ {"role":"user"} ] }'
    )
    assert gateway.entries()[0]["model"] == "fast"
    assert gateway.entries()[0]["price"]["input"] == 1
    assert (refused.status, refused.error["type"]) == (400, "policy_blocked")


async def test_a_format_that_no_upstream_speaks_is_not_found(gateway, upstream):
    """
    An Anthropic upstream is not sent OpenAI requests.
    """
    reply = await gateway.post("/v1/chat/completions", HELLO)

    assert (reply.status, reply.error["message"]) == (
        404,
        "No upstream of this gateway answers /v1/chat/completions.",
    )
    assert upstream.requests == []


async def test_headers_travel_by_the_rules(gateway, upstream):
    """
    anthropic-* and everything unknown goes up unchanged; credentials, hop-by-hop and forwarding headers do not;
    the upstream's rate limits and cookies do not come down, request-id and retry-after do.
    """
    upstream.script = json_body(
        {"type": "message", "usage": {"input_tokens": 1, "output_tokens": 1}},
        **{
            "request-id": "req_upstream",
            "retry-after": "7",
            "x-should-retry": "true",
            "anthropic-ratelimit-tokens-remaining": "5",
            "set-cookie": "a=b",
            "connection": "keep-alive, x-hop",
            "x-hop": "1",
            "x-kept": "2",
        },
    )

    reply = await gateway.post(
        "/v1/messages",
        HELLO,
        anthropic_version="2023-06-01",
        anthropic_beta="a,b",
        x_unknown="yes",
        accept_encoding="gzip, br",
        cookie="secret=1",
        x_forwarded_for="1.2.3.4",
        connection="keep-alive, x-mine",
        x_mine="1",
    )

    up = upstream.requests[0].header
    assert {name: up.get(name) for name in ("anthropic-version", "anthropic-beta", "x-unknown", "accept-encoding")} == {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "a,b",
        "x-unknown": None,
        "accept-encoding": "identity",
    }
    assert not {"cookie", "x-forwarded-for", "x-mine", "connection", "authorization"} & set(up)
    assert up["host"] == upstream.url.removeprefix("http://")
    assert {"request-id", "retry-after", "x-should-retry", "x-kept"} <= set(reply.headers)
    assert not {"anthropic-ratelimit-tokens-remaining", "set-cookie", "x-hop"} & set(reply.headers)


async def test_a_session_is_known_by_header_or_metadata(gateway, upstream):
    """
    Claude Code 2.1 names the session in a header, or in metadata.user_id as JSON; 2.0 at the end of user_id.
    """
    upstream.script = hello_json()
    session = "0b0e8e3a-9a52-4c8e-a5c2-5f8f0a1f2b3c"

    await gateway.post("/v1/messages", HELLO, x_claude_code_session_id="from-the-header")
    await gateway.post("/v1/messages", HELLO | {"metadata": {"user_id": f"user_1_account__session_{session}"}})
    await gateway.post("/v1/messages", HELLO | {"metadata": {"user_id": json.dumps({"session_id": session})}})
    await gateway.post("/v1/messages", HELLO)

    assert [entry["session"] for entry in gateway.entries()] == ["from-the-header", session, session, ""]


CODEX = {"model": "gpt-test", "input": "hi", "stream": False}
LONG = "s" * 200


@pytest.mark.parametrize(
    ("headers", "fields", "session"),
    [
        ({"session_id": "s-1"}, {}, "s-1"),
        ({"session-id": "s-1", "thread-id": "t-1"}, {"prompt_cache_key": "p-1"}, "s-1"),
        ({"thread-id": "t-1"}, {"prompt_cache_key": "p-1"}, "t-1"),
        ({"x-claude-code-session-id": "c-1", "session-id": "s-1"}, {}, "c-1"),
        ({}, {"prompt_cache_key": "p-1"}, "p-1"),
        ({}, {"prompt_cache_key": LONG}, "s" * 128),
        ({"session-id": LONG}, {}, "s" * 128),
        ({"x-session-affinity": "o-1"}, {"prompt_cache_key": "p-1"}, "o-1"),
        ({"conversation_id": "c-1"}, {}, "c-1"),
        ({"session-id": "a\x85b"}, {"prompt_cache_key": "a\nb"}, "a�b"),
        ({}, {"prompt_cache_key": ["p"]}, ""),
        ({}, {"prompt_cache_key": "p" * 9000}, ""),
        ({}, {}, ""),
    ],
)
async def test_sessions_of_codex_and_opencode_are_known(start_gateway, upstream, headers, fields, session):
    """
    Their prompt caches live where the session began, as Claude Code's do.
    """
    gateway = await start_gateway(config_text(upstream.url, ", format: openai"))
    upstream.script = json_body({"object": "response", "model": "gpt-test"})
    connection = await gateway.connect()

    body = json.dumps(CODEX | fields).encode()
    await connection.request("POST", "/v1/responses", {"x-api-key": KEY} | headers, body)
    await gateway.settled()

    assert gateway.entries()[0]["session"] == session
    await connection.close()


@pytest.mark.parametrize("value", [True, 1, "true"])
async def test_a_response_in_the_background_is_refused_by_name(start_gateway, upstream, value):
    """
    Its spend comes in no answer that passes here: it could never be booked.
    """
    gateway = await start_gateway(config_text(upstream.url, ", format: openai"))
    upstream.script = json_body({"object": "response", "model": "gpt-test"})

    refused = await gateway.post("/v1/responses", CODEX | {"background": value})
    plain = [await gateway.post("/v1/responses", CODEX | {"background": no}) for no in (False, None)]

    assert (refused.status, refused.error["type"]) == (400, "policy_blocked")
    assert refused.error["message"].startswith("background: ") and refused.headers["x-should-retry"] == "false"
    assert [reply.status for reply in plain] == [200, 200] and len(upstream.requests) == 2


OPUS = "claude-opus-9"
OTHER_MODELS = {
    "tools[1]": {"tools": [{"name": "x", "input_schema": {}}, {"type": "advisor_20260301", "model": OPUS}]},
    "tools[0]": {"tools": [{"type": "advisor", "advisor": {"model": OPUS}}]},
    "fallbacks": {"fallbacks": [{"model": "claude-test"}, {"model": OPUS}]},
    "models": {"models": ["claude-test", OPUS]},
}


@pytest.mark.parametrize(("place", "fields"), OTHER_MODELS.items(), ids=list(OTHER_MODELS))
async def test_a_key_is_asked_for_every_model_that_a_request_names(start_gateway, upstream, place, fields):
    """
    An Opus advisor answered a key that may only use haiku: $0.99 for a request that looked like $0.0025.
    """
    text = config_text(upstream.url).replace("name: alice,", 'name: alice, models: ["claude-test"],')
    gateway = await start_gateway(text)
    upstream.script = hello_json()

    refused = await gateway.post("/v1/messages", HELLO | fields)
    await gateway.write(text.replace('models: ["claude-test"]', 'models: ["claude-*"]'))
    allowed = await gateway.post("/v1/messages", HELLO | fields)

    assert (refused.status, refused.error["type"]) == (400, "policy_blocked")
    assert refused.error["message"].endswith(
        f"may not use the model 'claude-opus-9', which {place} names. Leave it out, or name one that it may use."
    )
    assert allowed.status == 200 and len(upstream.requests) == 1


AROUND = {
    "a query": ("?beta=true&model=claude-opus-9", {}, "The query names a model"),
    "an escaped query": ("?%6dodel=claude-opus-9", {}, "The query names a model"),
    "several names": ("", {"model": "claude-test,claude-opus-9"}, "model: "),
    "a router": ("", {"user_config": {"model_list": []}}, "user_config: "),
    "a list of models": ("", {"model_list": [{"model_name": "claude-test"}]}, "model_list: "),
    "another server": ("", {"api_base": "https://x.test"}, "api_base: "),
    "a preset": ("", {"preset": "best"}, "preset: "),
    "a tool that chooses": ("", {"tools": [{"type": "openrouter:fusion"}]}, "tools[0]: "),
    "a plugin that chooses": ("", {"plugins": [{"id": "fusion"}]}, "plugins: "),
    "a fallback of LiteLLM's": ("", {"context_window_fallbacks": ["claude-test"]}, "context_window_fallbacks: "),
    "a tool with models": (
        "",
        {"tools": [{"type": "openrouter:advisor", "parameters": {"model": OPUS}}]},
        "tools[0]: ",
    ),
}


@pytest.mark.parametrize("way", AROUND)
async def test_a_key_for_some_models_has_no_way_around(start_gateway, upstream, way):
    """
    What LiteLLM and OpenRouter take for another model, or for leave to choose one; a key for all may use it.
    """
    query, fields, start = AROUND[way]
    text = config_text(upstream.url).replace("name: alice,", 'name: alice, models: ["claude-test*"],')
    gateway = await start_gateway(text)
    upstream.script = hello_json()

    refused = await gateway.post(f"/v1/messages{query}", HELLO | fields)
    await gateway.write(text.replace('models: ["claude-test*"]', 'models: ["*"]'))
    allowed = await gateway.post(f"/v1/messages{query}", HELLO | fields)

    assert (refused.status, refused.error["type"]) == (400, "policy_blocked")
    assert refused.error["message"].startswith(start) and "some models" in refused.error["message"]
    assert allowed.status == 200 and len(upstream.requests) == 1


LONG = json.dumps(OPUS + " " * (8 << 10))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (f'"tools": [{{"model": {LONG}}}]', "tools[0]: "),
        ('"tools": [{"model": ["claude-opus-9"]}]', "tools[0]: "),
        ('"tools": [{"advisor": {"model": ["claude-opus-9"]}}]', "tools[0]: "),
        ('"tools": {"0": {"model": "claude-opus-9"}}', "tools[0]: "),
        ('"tools": [%s{}]' % ("{}," * 300_000), "tools[0]: "),
        ('"tools": [ {"\\u006dodel" : "claude-opus-9" } ]', "The key alice"),
        ('"models": "claude-test,claude-opus-9"', "models: "),
        ('"models": [["claude-opus-9"]]', "models: "),
        ('"models": [%s""]' % ('"claude-test",' * 3000), "models: "),
        ('"fallbacks": {"claude-test": ["claude-opus-9"]}', "fallbacks: "),
        ('"fallbacks": [{"claude-test": ["claude-opus-9"]}]', "fallbacks: "),
        ('"fallbacks": [{"model": "claude-opus-9", "Model": "claude-test"}]', "fallbacks: "),
        ('"fallbacks": [{"\\u004dodel": "claude-opus-9", "model": "claude-test"}]', "fallbacks: "),
        ('"fallbacks": ["claude-test", {"model": "claude-opus-9", "Model": "claude-test"}]', "fallbacks: "),
        ('"fallbacks": [%s"claude-opus-9"]' % ('"claude-test",' * 300_000), "fallbacks: "),
        ('"tools": [{"type": "OpenRouter:advisor", "parameters": {"model": "claude-opus-9"}}]', "tools[0]: "),
    ],
)
async def test_a_model_cannot_be_hidden(start_gateway, upstream, fields, message):
    """
    What readers could see differently, or nobody would look at, is refused for a key that may not use all models.
    """
    text = config_text(upstream.url).replace("name: alice,", 'name: alice, models: ["claude-test"],')
    gateway = await start_gateway(text)

    reply = await gateway.post("/v1/messages", f'{{"model": "claude-test", {fields}}}'.encode())

    assert (reply.status, reply.error["type"]) == (400, "policy_blocked")
    assert reply.error["message"].startswith(message) and "Leave it out" in reply.error["message"]
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("tool", "place"),
    [
        ('{"model": "claude-opus-9", "model": "claude-test"}', "tools[1].model: "),
        ('{"name": "a", "Model": "claude-opus-9"}', "tools[1].Model: "),
        ('{"m\\u006fdel": "claude-opus-9", "model": "claude-test"}', "tools[1].model: "),
        (
            '{"type": "advisor", "advisor": {"model": "claude-opus-9", "model": "claude-test"}}',
            "tools[1].advisor.model: ",
        ),
        ('{"Advisor": {"model": "claude-opus-9"}}', "tools[1].Advisor: "),
        ('{"type": "openrouter:fusion", "type": "function"}', "tools[1].type: "),
    ],
)
async def test_a_tool_whose_model_readers_could_differ_about_is_refused(start_gateway, upstream, tool, place):
    """
    Some readers take the first of two names, some the last, and Go's any spelling.
    """
    text = config_text(upstream.url).replace("name: alice,", 'name: alice, models: ["claude-test"],')
    gateway = await start_gateway(text)

    reply = await gateway.post("/v1/messages", f'{{"model": "claude-test", "tools": [{{}}, {tool}]}}'.encode())

    assert reply.status == 400 and reply.error["message"].startswith(place)
    assert upstream.requests == []


async def test_a_request_that_names_no_model_that_is_forbidden_passes(start_gateway, upstream):
    """
    null is nothing said; what stands elsewhere in a tool is the upstream's matter.
    """
    text = config_text(upstream.url).replace("name: alice,", 'name: alice, models: ["claude-test"],')
    gateway = await start_gateway(text)
    upstream.script = hello_json()
    tools = [{"model": None}, {"parameters": {"type": "object", "required": ["model"]}}]
    nothing = {"models": None, "fallbacks": [], "tools": tools}

    assert (await gateway.post("/v1/messages", HELLO | nothing)).status == 200


async def test_a_tools_parameter_that_is_called_model_is_no_model(start_gateway, upstream):
    """
    Claude Code's Agent tool has one: only a tool's own `model` names a model.
    """
    gateway = await start_gateway(
        config_text(upstream.url).replace("name: alice,", 'name: alice, models: ["claude-test"],')
    )
    upstream.script = hello_json()
    schema = {"properties": {"model": {"type": "string", "enum": ["opus"]}}, "required": ["model"]}

    reply = await gateway.post("/v1/messages", HELLO | {"tools": [{"name": "Agent", "input_schema": schema}]})

    assert reply.status == 200


async def test_a_response_without_a_model_goes_where_the_config_says_so(start_gateway, upstream):
    """
    A stored `prompt` may bring the model. Its upstream is named by `"": "*"`; a key with chosen models may not.
    """
    text = config_text(upstream.url, ", format: openai")
    gateway = await start_gateway(text)
    upstream.script = json_body({"object": "response", "model": "gpt-test"})
    request = {"prompt": {"id": "pmpt_1"}}

    async def status() -> int:
        return (await gateway.post("/v1/responses", request)).status

    unnamed = await status()
    await gateway.write(config_text(upstream.url, ', format: openai, models: {"": "*", "gpt-*": "*"}'))
    served = await status()
    await gateway.write(gateway.path.read_text().replace("name: alice,", 'name: alice, models: ["gpt-*"],'))
    refused = await gateway.post("/v1/responses", request)
    await gateway.write(gateway.path.read_text().replace('["gpt-*"]', '["gpt-*", ""]'))
    chosen = await status()

    assert (unnamed, served, refused.status, chosen) == (400, 200, 400, 200)
    assert refused.error["message"] == (
        'model: field required. Without it only a key may call whose `models` in the config has "*" or "" '
        "(alice (…stuv) has neither)."
    )
    assert [json.loads(each.body) for each in upstream.requests] == [request, request]
    assert (await gateway.post("/v1/chat/completions", request)).status == 400


async def test_a_body_that_came_unasked_leaves_the_deadlines_of_the_next_request(start_gateway, upstream):
    """
    A call that expects 100 waits for a slot, and its body comes unasked. The next head still has its time and no more.
    """
    upstream.scripts = [[stall()], hello_json()]
    one = config_text(upstream.url).replace(f"key: {KEY}", f"key: {KEY}, limits: {{concurrent: 1}}")
    gateway = await start_gateway(one)
    body = json.dumps(HELLO).encode()
    first, second = await gateway.connect(), await gateway.connect()
    await first.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, body))
    await until(lambda: upstream.requests)
    await second.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY, "expect": "100-continue"}, body))
    await until(lambda: gateway.gateway.limits.waiting == 1)
    first.abort()
    reply = await second.answer()

    await second.send(b"POST /v1/messages HTTP/1.1\r\nhost:")
    await until(lambda: any(each.state is g.State.HEAD for each in gateway.door.connections))
    gateway.tick(seconds=31)

    assert reply.status == 200
    assert (await second.answer()).status == 408


class Noted:
    """A front door for one refused call: it notes in which turn of the loop it was told."""

    is_gone = False

    def __init__(self, turns: list[int]) -> None:
        self._turns = turns
        self.refused_in = 0

    def refuse(self, *_: object) -> None:
        self.refused_in = len(self._turns)


@pytest.mark.parametrize(("size", "differ"), [(1 << 10, False), (1 << 20, True)])
async def test_large_bodies_are_read_in_turns_of_their_own(gateway, size, differ):
    """
    Twenty bodies of 4 MB that became whole in one moment held everybody for 8 s; small ones are read at once.
    """
    turns: list[int] = []

    async def turn() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    config = gateway.gateway.config
    sinks, calls = [], []
    for _ in range(5):
        call = g.Call(config, next(iter(config.keys)), g.ROUTES["/v1/messages"], b"", [], "127.0.0.1")
        call.body, call.reservation = b" " * size, contextlib.nullcontext()
        calls.append(call)
        sinks.append(Noted(turns))
    ticking = asyncio.create_task(turn())

    await asyncio.gather(*(gateway.gateway.handle(call, sink) for call, sink in zip(calls, sinks, strict=True)))
    ticking.cancel()

    assert (len({sink.refused_in for sink in sinks}) == 5) == differ

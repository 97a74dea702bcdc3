"""HTTP as other clients speak it: upgrades, hosts, versions, dates, methods, half-closed connections."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from client import Connection, request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, GatewayUnderTest, config_text, until
from upstream import hello_json, json_body, stall, stream_of, wait_for

import gateway as g

BODY = json.dumps(HELLO).encode()
H2C = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
PATHS = [
    ("POST", "/v1/messages"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/api/event_logging/batch"),
    ("GET", "/api/hello"),
    ("HEAD", "/"),
    ("GET", "/health"),
    ("GET", "/livez"),
    ("GET", "/api/usage/stats"),
    ("GET", "/v1/usage"),
    ("POST", "/v1/files"),
    ("GET", "/nothing"),
]


def request_of(method: str, path: str, **headers: str) -> bytes:
    """A request with a good key, and a body where its method has one."""
    body = BODY if method == "POST" else b""
    return request_bytes(method, path, {"x-api-key": KEY} | headers, body)


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_an_upgrade_is_ignored(gateway, upstream, method, path):
    """
    `Upgrade: h2c`, as every stock JDK client sends it, changes no answer and keeps the body; the connection goes on.
    """
    upstream.script = hello_json()
    plain, asking = await gateway.connect(), await gateway.connect()
    expected = await plain.request(method, path, {"x-api-key": KEY}, BODY if method == "POST" else b"")

    found = []
    for _ in range(2):
        await asking.send(request_of(method, path, **H2C))
        found.append(await asking.answer(head_only=method == "HEAD"))
        if found[0].headers.get("connection") == "close":
            break

    assert {reply.status for reply in found} == {expected.status}
    assert found[0].headers.get("connection") == expected.headers.get("connection")
    assert all(request.body == BODY for request in upstream.requests)
    assert all("upgrade" not in request.header for request in upstream.requests)


async def test_an_upgrade_is_ignored_however_the_request_is_cut(gateway, upstream):
    """
    Its head and its body come in pieces of any size.
    """
    upstream.script = hello_json()
    data = request_of("POST", "/v1/messages", **H2C)

    for size in (1, 7, len(data) - len(BODY), len(data) - 3):
        connection = await gateway.connect()
        for start in range(0, len(data), size):
            await connection.send(data[start : start + size])
            await asyncio.sleep(0)
        assert (await connection.answer()).status == 200
        assert upstream.requests[-1].body == BODY


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_body_behind_an_upgrade_is_never_the_next_request(gateway, upstream, method, path, is_cut):
    """
    The parser stops at such a head: through nginx another client got the answer to a call that stood in the body.
    """
    upstream.script = hello_json()
    smuggled = request_of("POST", "/v1/messages")
    start = f"{method} {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-length: {len(smuggled)}\r\n".encode()
    start += b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\r\n"
    connection = await gateway.connect()

    for piece in (start, smuggled) if is_cut else (start + smuggled,):
        await connection.send(piece)
        await asyncio.sleep(0.002)
    reply = await connection.answer(head_only=method == "HEAD")
    if "connection" not in reply.headers:
        assert (await connection.request("GET", "/livez", {})).json == {"live": True}
    else:
        assert await connection.is_closed()

    assert [request.target for request in upstream.requests if request.body == BODY] == []


@pytest.mark.parametrize("spelling", ["http://x{}", "/{}", "/.{}", "/v1/..{}", "{}/", "{}?", "/%{:02x}{}"])
@pytest.mark.parametrize("path", ["/health", "/v1/usage", "/api/usage/logs", "/v1/models/claude-test", "/api/hello"])
async def test_a_path_is_the_same_however_it_is_written(gateway, upstream, path, spelling):
    """
    An absolute form, doubled slashes, dots and percents name what the plain path names (RFC 9112, 3.2.2).
    """
    upstream.script = json_body({"data": [{"id": "claude-test"}]})
    target = spelling.format(ord(path[1]), path[2:]) if ":02x" in spelling else spelling.format(path)

    assert (await gateway.get(target)).status == 200


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "text/plain"])
@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_the_type_of_a_body_that_nobody_reads_says_nothing(gateway, upstream, method, path, kind):
    """
    SDKs upload files as multipart: that they cannot is said, and not that their query cannot be read.
    """
    upstream.script = hello_json()

    plain, typed = [
        await gateway.request(method, path, BODY if method == "POST" else b"", content_type=each)
        for each in ("application/json", kind)
    ]

    assert (typed.status, typed.body[:60]) == (plain.status, plain.body[:60])


async def test_a_query_of_many_fields_is_refused_like_any_other_bad_one(gateway):
    """
    In the client's format, with a date.
    """
    reply = await gateway.get("/health?" + "a=b&" * 2000)

    assert (reply.status, reply.error["type"], "date" in reply.headers) == (400, "invalid_request_error", True)


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    ("version", "hosts", "status"),
    [
        ("HTTP/1.1", [], 400),
        ("HTTP/1.1", ["a", "a"], 400),
        ("HTTP/1.1", ["a b"], 400),
        ("HTTP/1.1", ["a/b"], 400),
        ("HTTP/1.1", ["a:b"], 400),
        ("HTTP/1.1", ["a,b"], 400),
        ("HTTP/1.1", ["%zz"], 400),
        ("HTTP/1.1", ["a%2"], 400),
        ("HTTP/1.0", ["a", "b"], 400),
        ("HTTP/2.0", ["a"], 505),
        ("HTTP/0.9", ["a"], 505),
        ("HTTP/1.2", ["a"], 400),
        ("", [], 505),
    ],
)
async def test_a_bad_host_or_version_is_refused(gateway, upstream, method, path, version, hosts, status):
    """
    On every path, in the client's format, by an answer with a date that says that the connection is closed.
    """
    lines = [f"{method} {path} {version}".rstrip(), *(f"host: {host}" for host in hosts), f"x-api-key: {KEY}"]
    lines += [f"content-length: {len(BODY)}"] if method == "POST" else []
    connection = await gateway.connect()

    await connection.send("\r\n".join(lines if version else lines[:1]).encode() + b"\r\n\r\n")
    reply = await connection.answer(head_only=method == "HEAD")

    assert reply.status == status
    assert reply.headers["connection"] == "close"
    assert "date" in reply.headers
    assert ("code" in json.loads(reply.body or b'{"error":{}}')["error"]) == (path == "/v1/chat/completions")
    assert upstream.requests == []


@pytest.mark.parametrize("host", ["a", "\ta\t", "a%20b", "a.b-c:8080", "127.0.0.1:1", "[::1]:8080", "[::1]", "a_b", ""])
async def test_a_good_host_is_none_of_our_business(gateway, upstream, host):
    """
    Names, addresses and ports of every shape that RFC 9110 allows.
    """
    upstream.script = hello_json()

    assert (await gateway.post("/v1/messages", HELLO, host=host)).status == 200


async def test_http_1_0_needs_no_host(gateway, upstream):
    """
    Health checks of old load balancers send none.
    """
    connection = await gateway.connect()

    await connection.send(b"GET /health HTTP/1.0\r\n\r\n")

    assert (await connection.answer()).status == 200


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_every_answer_of_our_own_has_a_date(gateway, upstream, clock, method, path):
    """
    A refusal, a page, an answer in Tornado's half; and a relayed one whose upstream sent none.
    """
    upstream.script = hello_json()

    reply = await (await gateway.connect()).request(
        method, path, {"x-api-key": KEY}, b"{}" if method == "POST" else b""
    )
    relayed = await gateway.post("/v1/messages", HELLO)

    assert reply.headers["date"].endswith(" GMT")
    assert [name for name, _ in reply.header_list].count("date") == 1
    assert relayed.headers["date"] == g.http_date(int(clock.clock.wall())).decode()


async def test_a_date_of_the_upstream_is_kept(gateway, upstream):
    """
    It is the answer's own.
    """
    upstream.script = json_body({"type": "message", "content": []}, date="Thu, 01 Jan 2026 00:00:00 GMT")

    reply = await gateway.post("/v1/messages", HELLO)

    assert [value for name, value in reply.header_list if name == "date"] == ["Thu, 01 Jan 2026 00:00:00 GMT"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/messages", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
        ("PUT", "/metrics", "GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/claude", "GET, HEAD"),
        ("POST", "/v1/usage", "GET, HEAD"),
        ("POST", "/api/usage/logs", "GET, HEAD"),
        ("OPTIONS", "/v1/messages", "POST"),
        ("GET", "/api/event_logging/batch", "POST"),
        ("DELETE", "/api/hello", "GET, HEAD"),
    ],
)
async def test_a_405_says_what_is_allowed(gateway, method, path, allowed):
    """
    RFC 9110, 15.5.6: on every path that is served with another method.
    """
    reply = await gateway.request(method, path)

    assert reply.status == 405
    assert set(reply.headers["allow"].split(", ")) == set(allowed.split(", "))


@pytest.mark.parametrize(
    ("credential", "statuses"),
    [
        ("none", {"anyone": 200, "scraper": 200, "key": 401}),
        ("wrong", {"anyone": 200, "scraper": 200, "key": 401}),
        ("key", {"anyone": 200, "scraper": 200, "key": 200}),
        ("none, from elsewhere", {"anyone": 200, "scraper": 403, "key": 401}),
        ("key, from elsewhere", {"anyone": 200, "scraper": 403, "key": 403}),
    ],
)
async def test_who_may_do_what_is_one_table(start_gateway, upstream, credential, statuses):
    """
    Each row of the table of endpoints, and the HEAD of each GET, asked with no, a wrong and a good key.
    """
    text = config_text(upstream.url).replace("port: 0", "port: 0, trusted_proxies: [127.0.0.1]")
    openai = f'  - {{name: openai, url: "{upstream.url}", format: openai}}\nkeys:'
    text = text.replace(f"key: {KEY}", f"key: {KEY}, allow_ips: [127.0.0.1]").replace("keys:", openai)
    gateway = await start_gateway(text)
    upstream.script = lambda request: json_body(ANSWERS[request.target.split("?")[0]])
    token = {"none": "", "wrong": "sk-proxy-wrong", "key": KEY}[credential.partition(",")[0]]
    headers = {"x_forwarded_for": "203.0.113.9"} if "elsewhere" in credential else {}

    found, expected = {}, {}
    for endpoint in g.ENDPOINTS:
        path = endpoint.path.replace("*", "claude-test")
        for method in ("GET", "HEAD") if endpoint.method == "GET" else (endpoint.method,):
            body = BODY if method == "POST" else b""
            found[method, path] = (await gateway.request(method, path, body, token, **headers)).status
            expected[method, path] = statuses[endpoint.role]

    assert {endpoint.role for endpoint in g.ENDPOINTS} == set(statuses)
    assert found == expected
    assert bool(upstream.requests) == (credential == "key")


CHAT = {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 12}}
ANSWERS = {
    "/v1/models": {"data": [{"id": "claude-test"}]},
    "/v1/messages": {"type": "message", "content": [], "usage": {"input_tokens": 12, "output_tokens": 5}},
    "/v1/messages/count_tokens": {"input_tokens": 12},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"object": "response", "status": "completed", "usage": {"input_tokens": 12}},
    "/v1/embeddings": {"object": "list", "data": [], "usage": {"prompt_tokens": 12}},
}


@pytest.mark.parametrize(
    ("method", "path", "first"),
    [
        ("POST", "/v1/messages", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ("POST", "/api/event_logging/batch", b"HTTP/1.1 200 "),
        ("POST", "/v1/files", b"HTTP/1.1 404 "),
        ("POST", "/health", b"HTTP/1.1 405 "),
        ("PUT", "/v1/messages", b"HTTP/1.1 405 "),
    ],
)
async def test_a_body_is_asked_for_only_where_it_is_wanted(gateway, upstream, method, path, first):
    """
    `Expect: 100-continue` gets 100 where a handler reads the body, and else its answer at once.
    """
    upstream.script = hello_json()
    data = request_bytes(method, path, {"x-api-key": KEY, "expect": "100-continue"}, BODY)
    connection = await gateway.connect()

    await connection.send(data[: -len(BODY)])
    assert await connection.read_until(first) == first
    if first.startswith(b"HTTP/1.1 100"):
        await connection.send(BODY)
        assert (await connection.answer()).status == 200


async def test_no_body_is_asked_for_that_a_limit_refuses(start_gateway, upstream):
    """
    What is used up is known before the body, also before a short one.
    """
    upstream.script = hello_json()
    gateway = await start_gateway(
        config_text(upstream.url).replace(f"key: {KEY}", f"key: {KEY}, limits: {{usd/day: 0}}")
    )
    connection = await gateway.connect()

    await connection.send(
        request_bytes("POST", "/v1/messages", {"x-api-key": KEY, "expect": "100-continue"}, BODY)[:-1]
    )

    assert (await connection.rest()).startswith(b"HTTP/1.1 429 ")


EXPECTS = {"x-api-key": KEY, "expect": "100-continue", "content-length": str(len(BODY))}


@pytest.mark.parametrize(
    ("setting", "headers", "status"),
    [
        ("", {"x-api-key": "wrong"}, 401),
        (", allow_ips: [203.0.113.0/24]", {}, 403),
        (", limits: {usd/day: 0}", {}, 429),
        (", limits: {concurrent: 1}", {}, 429),
        ("", {"content-length": str(1 << 30)}, 413),
        ("", {"content-encoding": "gzip"}, 415),
        ("", {"host": "a b"}, 400),
    ],
)
async def test_no_body_is_asked_for_that_the_head_refuses(start_gateway, upstream, setting, headers, status):
    """
    Key, address, limits, slots, size, encoding and host: the first that the client hears is the refusal.
    """
    upstream.script = [stall()]
    text = config_text(upstream.url).replace(f"key: {KEY}", f"key: {KEY}{setting}")
    gateway = await start_gateway(text + "\nlimits: {queue: 0s}\n")
    running, connection = await gateway.connect(), await gateway.connect()
    if "concurrent" in setting:
        await running.send(request_of("POST", "/v1/messages"))
        await upstream.request_came()

    await connection.send(request_bytes("POST", "/v1/messages", EXPECTS | headers))

    assert (await connection.read_until(b" %d " % status)) == b"HTTP/1.1 %d " % status


@pytest.mark.parametrize("cuts", [[], [10], [65_000], [65_535], [65_536], [65_537], [100, 65_534, 65_538]])
@pytest.mark.parametrize(("over", "status"), [(0, 200), (8, 431)])
async def test_the_bound_of_a_head_is_the_same_however_it_is_cut(gateway, upstream, cuts, over, status):
    """
    64 KB are taken, a few bytes more are not, in whatever reads they come and with whatever body behind them.
    """
    upstream.script = hello_json()
    start = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-length: {len(BODY)}\r\nx: ".encode()
    fill = g.Request.MAX_HEAD - len(start) - 4 + over
    data = start + b"y" * fill + b"\r\n\r\n" + BODY
    connection = await gateway.connect()

    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        await connection.send(data[begin:end])
        await until(lambda: True)
        await asyncio.sleep(0.002)

    assert (await connection.answer()).status == status


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/files"])
@pytest.mark.parametrize("upgrade", ["", "connection: upgrade\r\nupgrade: h2c\r\n"])
@pytest.mark.parametrize("before", ["", "\r\n\r\n"])
@pytest.mark.parametrize(
    ("fill", "is_good"),
    [("x: " + "y" * 120_000 + "\r\n", False), ("a: b\r\n" * 3000, False), ("a:b\r\n" * 90, True)],
)
async def test_the_bounds_of_a_head_hold_for_each_kind_of_it(gateway, upstream, path, upgrade, before, fill, is_good):
    """
    Empty lines before it and an `Upgrade` in it are no way around; a head that is within the bounds stays so.
    """
    upstream.script = hello_json()
    head = f"{before}POST {path} HTTP/1.1\r\nhost:x\r\nx-api-key:{KEY}\r\ncontent-length:{len(BODY)}\r\n{upgrade}{fill}"
    if is_good:
        head += "z:" + "z" * (g.Request.MAX_HEAD - len(head) - 6) + "\r\n"
    connection = await gateway.connect()

    await connection.send(head.encode() + b"\r\n" + BODY)

    assert (await connection.answer()).status == ((200 if path == "/v1/messages" else 404) if is_good else 431)


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    "behind", [b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n", b"??"]
)
async def test_an_answer_whose_connection_closes_says_so(gateway, upstream, method, path, behind):
    """
    What came behind a request in the same read is not answered; the answer before it is whole, and the last.
    """
    upstream.script = hello_json()
    connection = await gateway.connect()

    await connection.send(request_of(method, path) + behind)
    reply = await connection.answer(head_only=method == "HEAD")

    assert reply.headers["connection"] == "close"
    assert not reply.was_cut and await connection.is_closed()


@pytest.mark.logs("could not be reached")
async def test_a_pipelined_head_request_takes_no_body_from_the_answer_before_it(start_gateway, upstream):
    """
    A refusal that comes late is written for the request that it refuses.
    """
    gateway = await start_gateway(config_text("http://127.0.0.1:1"))
    connection = await gateway.connect()

    await connection.send(request_of("POST", "/v1/messages"))
    await connection.send(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")

    assert (await connection.answer()).error["type"]


async def test_a_trailer_that_closes_the_connection_is_heard(gateway, upstream):
    """
    The parser takes it as a header, and reads nothing more.
    """
    upstream.script = hello_json()
    start = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"%x\r\n%b\r\n0\r\nConnection: close\r\n\r\n" % (len(BODY), BODY)
    connection = await gateway.connect()

    await connection.send(start.encode() + body)
    reply = await connection.answer()

    assert (reply.status, reply.headers["connection"]) == (200, "close")


@pytest.mark.parametrize("path", ["/api/event_logging/batch", "/v1/files", "/health"])
@pytest.mark.parametrize("expect", ["", "expect: 100-continue\r\n"])
async def test_a_body_too_large_for_a_page_is_refused_by_its_head(gateway, path, expect):
    """
    No body is waited for, or asked for, that will not be taken.
    """
    connection = await gateway.connect()

    await connection.send(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n{expect}\r\n".encode())
    reply = await connection.answer()

    assert (reply.status, reply.headers["connection"]) == (413, "close")


async def test_a_refusal_is_read_by_a_client_that_is_still_sending(gateway):
    """
    What it sends is read and thrown away for a moment: a reset could overtake the answer.
    """
    connection = await gateway.connect()

    await connection.send(
        b"POST /v1/files HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300_000
    )
    reply = await connection.answer()

    assert (reply.status, reply.headers["connection"], reply.was_cut) == (404, "close", False)
    assert await connection.is_closed()


async def test_a_connection_goes_on_after_a_page(gateway, upstream):
    """
    Pages and calls take turns on one connection.
    """
    upstream.script = hello_json()
    connection = await gateway.connect()

    for method, path in PATHS:
        reply = await connection.request(method, path, {"x-api-key": KEY}, BODY if method == "POST" else b"")
        assert "connection" not in reply.headers and not reply.was_cut


async def test_an_answer_that_begins_while_the_gateway_stops_says_that_it_is_the_last(gateway, upstream):
    """
    And an answer that had begun before closes nothing without a word: its connection takes one more request.
    """
    go_on = asyncio.Event()
    upstream.script = [*stream_of("Hello")[:3], wait_for(go_on), *stream_of("Hello")[3:]]
    connection = await gateway.connect()
    await connection.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await connection.read_until(b"message_start")

    gateway.gateway.stopping = True
    go_on.set()
    await connection.read_until(b"\r\n0\r\n\r\n")
    reply = await connection.request("POST", "/v1/messages", {"x-api-key": KEY}, BODY)

    assert (reply.status, reply.headers["connection"]) == (503, "close")
    assert await connection.is_closed()


# --- half-closed connections --------------------------------------------------------------------------


async def half_closed(gateway: GatewayUnderTest, body: dict) -> tuple[Connection, socket.socket]:
    """A connection whose client has sent a request and shut down its sending side."""
    connection = await gateway.connect()
    await connection.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(body).encode()))
    connection._writer.write_eof()
    return connection, connection._writer.get_extra_info("socket")


@pytest.mark.parametrize("body", [HELLO, HELLO_STREAM])
@pytest.mark.parametrize("when", ["at once", "upstream has it", "answer has begun"])
async def test_a_client_that_stops_sending_gets_its_answer(gateway, upstream, body, when):
    """
    Half-closed at any time after its request, a client reads its answer to its end; then the connection is closed.
    """
    go_on = asyncio.Event()
    steps = stream_of("Hello") if body is HELLO_STREAM else hello_json()
    at = 0 if when != "answer has begun" else 4 if body is HELLO_STREAM else 1
    upstream.script = [*steps[:at], wait_for(go_on), *steps[at:]]
    connection = await gateway.connect()
    await connection.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(body).encode()))
    if when != "at once":
        await upstream.request_came()
    if when == "answer has begun" and body is HELLO_STREAM:
        await connection.read_until(b"Hello")
    connection._writer.write_eof()
    await until(lambda: gateway.door.hangups._watched)
    go_on.set()

    if when == "answer has begun" and body is HELLO_STREAM:
        assert b"message_stop" in await connection.rest()
    else:
        assert (await connection.answer()).status == 200
        assert await connection.is_closed()
    await gateway.settled()
    assert gateway.entries()[-1]["outcome"] == "completed"
    await until(lambda: not gateway.door.hangups._watched)


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_a_client_that_stops_sending_gets_its_page(gateway, upstream, method, path):
    """
    Whatever it asked for.
    """
    upstream.script = hello_json()
    connection = await gateway.connect()

    await connection.send(request_of(method, path))
    connection._writer.write_eof()
    reply = await connection.answer(head_only=method == "HEAD")

    assert reply.status in (200, 404) and not reply.was_cut
    assert await connection.is_closed()


async def test_a_client_that_stops_sending_and_leaves_later_is_found_out(gateway, upstream):
    """
    It is asked again every ten seconds: its call ends, and its slot is free.
    """
    upstream.script = [stall()]
    connection, _ = await half_closed(gateway, HELLO)
    await connection.read_until(b"HTTP/1.1 100 Continue\r\n\r\n")
    await upstream.request_came()

    await connection.close()
    gateway.tick(9)
    during = len(gateway.gateway.relay.running)
    gateway.tick(2)
    await gateway.settled()

    assert during == 1
    assert gateway.entries()[-1]["outcome"] == "client_gone"


@pytest.mark.parametrize("body", [HELLO, HELLO_STREAM])
async def test_a_client_that_is_gone_is_found_out_at_once(gateway, upstream, body):
    """
    One that closes altogether looks the same at first: what is sent to it is answered with a reset, and its call ends.
    """
    upstream.script = [stall()]
    connection = await gateway.connect()
    await connection.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(body).encode()))
    await upstream.request_came()

    await connection.close()
    await gateway.settled()

    assert gateway.entries()[-1]["outcome"] == "client_gone"
    assert not gateway.door.hangups._watched


async def test_a_client_that_leaves_before_its_request_is_whole_is_gone(gateway, upstream):
    """
    No answer could be made for half a request.
    """
    connection = await gateway.connect()
    await connection.send(request_of("POST", "/v1/messages")[:-5])
    await until(lambda: gateway.gateway.memory.held)

    connection._writer.write_eof()

    assert await connection.is_closed()
    assert gateway.gateway.memory.held == 0


async def test_many_half_closed_clients_cost_as_much_as_others(gateway, upstream):
    """
    300 at once are answered, and nothing of them is kept.
    """
    go_on = asyncio.Event()
    upstream.script = [wait_for(go_on), *hello_json()]
    waiting = [await half_closed(gateway, HELLO) for _ in range(300)]
    await until(lambda: len(gateway.door.hangups._watched) == 300)

    go_on.set()
    replies = await asyncio.gather(*(connection.answer() for connection, _ in waiting))

    assert {reply.status for reply in replies} == {200}
    await until(lambda: not gateway.door.hangups._watched and not gateway.door.hangups._descriptors)

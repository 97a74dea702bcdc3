"""What a key's holder can ask: how the limits stand, what was spent, and the calls one by one."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import threading
from typing import Any

import msgspec
import pytest
from client import request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, UPSTREAM_KEY, GatewayUnderTest, until
from upstream import HELLO as HELLO_SCRIPT
from upstream import head, json_body, message_start, wait_for

import gateway as g

KEY_B = "sk-proxy-bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
CONFIG = f"""
server: {{host: 127.0.0.1, port: 0, timezone: Asia/Shanghai}}
upstreams: [{{name: main, url: "URL", api_key: {UPSTREAM_KEY}}}]
teams: [{{name: research, limits: {{tokens/5h: 1k}}}}]
keys:
  - {{name: alice, key: {KEY}, team: research, limits: {{usd/day: 0.01, requests/minute: 5, concurrent: 2}}}}
  - {{name: bob, key: {KEY_B}, team: research}}
limits: {{gateway: {{usd: 100, usd/month: 50}}}}
prices: {{"claude-*": {{input: 100, output: 1000}}, "*": {{input: 10, output: 50}}}}
"""
# What HELLO costs: 12 tokens of input and 5 of output.
CLAUDE_USD, OTHER_USD = 0.0062, 0.00037
HOUR_S = 3600.0


@pytest.fixture
def gateway(io_loop, start_gateway, upstream) -> GatewayUnderTest:
    """
    A gateway with three calls of alice and one of bob: at 22:13 in Shanghai, and at 05:13 of the next day.
    """

    async def start() -> GatewayUnderTest:
        gateway = await start_gateway(CONFIG.replace("URL", upstream.url))
        usage = {"input_tokens": 12, "output_tokens": 5}
        other = json_body({"type": "message", "model": "other", "content": [], "usage": usage})
        upstream.scripts = [HELLO_SCRIPT, HELLO_SCRIPT, other, HELLO_SCRIPT]
        await gateway.post("/v1/messages", HELLO_STREAM)
        gateway.tick(7 * HOUR_S)
        await gateway.post("/v1/messages", HELLO_STREAM)
        await gateway.post("/v1/messages", HELLO | {"model": "other"})
        await gateway.post("/v1/messages", HELLO_STREAM, KEY_B)
        return gateway

    return io_loop.run_sync(start)


def spent(calls: int, cost_usd: float, **group: str) -> dict[str, Any]:
    """What so many calls like HELLO add up to."""
    return {
        "group": group,
        "calls": calls,
        "failed": 0,
        "input_tokens": 12 * calls,
        "output_tokens": 5 * calls,
        "cache_write_tokens": 0,
        "cache_read_tokens": 0,
        "cost_usd": cost_usd,
        "cache_hit_rate": 0.0,
    }


def standing(limit: str, scope: str, used: float, allowed: float, remaining: float, **fields: Any) -> dict[str, Any]:
    """How a limit stands of which nothing is reserved, and which does not reset."""
    values = {"limit": limit, "scope": scope, "used": used, "reserved": 0, "allowed": allowed, "remaining": remaining}
    return values | {"resets_at": None, "resets": None} | fields


MONTH_END = {"resets_at": "2026-09-30T16:00:00.000Z", "resets": "resets Thu 1 Oct 00:00 CST"}
FIVE_HOURS = {"resets_at": "2026-09-22T02:13:20.000Z", "resets": "resets Tue 22 Sep 10:13 CST"}

# GET /v1/usage


@pytest.mark.parametrize("target", ["/v1/usage", "/api/usage", "/v1/v1/usage"])
async def test_a_key_sees_its_limits_its_teams_and_the_gateways_and_what_it_spent(gateway, target):
    """
    Days are of the gateway's time zone; team and gateway count what others spent, too.
    """
    reply = await gateway.get(target)

    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json == {
        "key": "alice",
        "team": "research",
        "timezone": "Asia/Shanghai",
        "limits": [
            standing(
                "usd/day",
                "key",
                0.00657,
                0.01,
                0.00343,
                resets_at="2026-09-22T16:00:00.000Z",
                resets="resets Wed 23 Sep 00:00 CST",
            ),
            standing("requests/minute", "key", 2, 5, 3),
            standing("concurrent", "key", 0, 2, 2),
            standing("tokens/5h", "team", 51, 1000, 949, **FIVE_HOURS),
            standing("usd", "gateway", 0.01897, 100, 99.98103),
            standing("usd/month", "gateway", 0.01897, 50, 49.98103, **MONTH_END),
        ],
        "today": spent(2, 0.00657),
        "month": spent(3, 0.01277),
    }


async def test_another_key_sees_its_own_and_what_it_shares(gateway):
    """
    Nothing of alice's but in the sums of team and gateway.
    """
    reply = await gateway.get("/v1/usage", KEY_B)

    assert reply.json == {
        "key": "bob",
        "team": "research",
        "timezone": "Asia/Shanghai",
        "limits": [
            standing("tokens/5h", "team", 51, 1000, 949, **FIVE_HOURS),
            standing("usd", "gateway", 0.01897, 100, 99.98103),
            standing("usd/month", "gateway", 0.01897, 50, 49.98103, **MONTH_END),
        ],
        "today": spent(1, 0.0062),
        "month": spent(1, 0.0062),
    }
    assert [total["calls"] for total in (await gateway.get("/api/usage/stats", KEY_B)).json["data"]] == [1]
    assert [entry["key"] for entry in (await gateway.get("/api/usage/logs", KEY_B)).json["data"]] == ["bob"]


async def test_a_limit_that_is_passed_has_nothing_left_and_asking_is_still_allowed(gateway, upstream):
    """
    Who was refused can see why.
    """
    upstream.script = HELLO_SCRIPT
    await gateway.write(gateway.path.read_text().replace("usd/day: 0.01,", "usd/day: 0.006,"))

    refused = await gateway.post("/v1/messages", HELLO_STREAM)
    reply = await gateway.get("/v1/usage")

    assert (refused.status, reply.status) == (429, 200)
    day = reply.json["limits"][0]
    assert (day["used"], day["allowed"], day["remaining"]) == (0.00657, 0.006, 0)


async def test_a_running_call_holds_what_it_may_cost(gateway, upstream):
    """
    `reserved` is what limits count besides what was used; it ends with the call.
    """
    go_on = asyncio.Event()
    upstream.script = [head(200, "text/event-stream"), message_start(12), wait_for(go_on), *HELLO_SCRIPT[2:]]
    running = asyncio.create_task(gateway.post("/v1/messages", HELLO_STREAM, KEY_B))
    await until(lambda: len(upstream.requests) == 5)

    during = (await gateway.get("/v1/usage")).json["limits"]
    go_on.set()
    await running
    after = (await gateway.get("/v1/usage")).json["limits"]

    assert during[3]["reserved"] > 0 and during[4]["reserved"] > 0
    assert [limit["reserved"] for limit in after] == [0, 0, 0, 0, 0, 0]
    assert (during[3]["used"], after[3]["used"]) == (51, 68)


@pytest.mark.parametrize("target", ["/v1/usage", "/api/usage", "/api/usage/stats", "/api/usage/logs"])
@pytest.mark.parametrize("token", ["", "sk-proxy-unknown-0123456789"])
async def test_without_a_known_key_nothing_is_told(gateway, target, token):
    """
    401 in the envelope that clients read, and no second try.
    """
    reply = await gateway.get(target, token)

    assert (reply.status, reply.headers["x-should-retry"]) == (401, "false")
    message = (
        "This gateway does not know the key that was sent. Ask whoever runs it."
        if token
        else "No key was sent. Set ANTHROPIC_AUTH_TOKEN to the sk-proxy-… key that you were given."
    )
    assert reply.json == {
        "type": "error",
        "error": {"type": "authentication_error", "message": message},
        "request_id": reply.headers["request-id"],
    }


async def test_a_key_that_never_called_has_spent_nothing(gateway):
    """
    Zeros and empty lists, not errors.
    """
    await gateway.write(gateway.path.read_text().replace("name: bob", "name: carol"))

    usage = await gateway.get("/v1/usage", KEY_B)
    stats = await gateway.get("/api/usage/stats", KEY_B)
    logs = await gateway.get("/api/usage/logs", KEY_B)

    assert usage.json["today"] == usage.json["month"] == spent(0, 0) | {"cache_hit_rate": None}
    assert (stats.json["data"], logs.json) == ([], {"key": "carol", "data": [], "next": None, "unreadable": []})


# GET /api/usage/stats

FIRST, SECOND = "2026-09-21", "2026-09-22"


@pytest.mark.parametrize(
    ("query", "data"),
    [
        ("", [spent(1, 0.0062, day=FIRST), spent(2, 0.00657, day=SECOND)]),
        ("?by=day", [spent(1, 0.0062, day=FIRST), spent(2, 0.00657, day=SECOND)]),
        (
            "?by=hour",
            [spent(1, 0.0062, hour=f"{FIRST}T22:00+08:00"), spent(2, 0.00657, hour=f"{SECOND}T05:00+08:00")],
        ),
        ("?by=month", [spent(3, 0.01277, month="2026-09")]),
        ("?by=model", [spent(2, 0.0124, model="claude-test"), spent(1, 0.00037, model="other")]),
        (
            "?by=model,day",
            [
                spent(1, 0.0062, model="claude-test", day=FIRST),
                spent(1, 0.0062, model="claude-test", day=SECOND),
                spent(1, 0.00037, model="other", day=SECOND),
            ],
        ),
        ("?by=month,month", [spent(3, 0.01277, month="2026-09")]),
        ("?by=upstream,outcome", [spent(3, 0.01277, upstream="main", outcome="completed")]),
        (f"?since={SECOND}", [spent(2, 0.00657, day=SECOND)]),
        (f"?until={SECOND}", [spent(1, 0.0062, day=FIRST)]),
        (f"?by=month&since={FIRST}T22:00&until={SECOND}T05", [spent(1, 0.0062, month="2026-09")]),
        ("?since=2026-10", []),
        ("?until=2026", []),
    ],
)
async def test_stats_are_grouped_by_what_is_asked_for(gateway, query, data):
    """
    Hours, days and months of the gateway's time zone, sorted; `since` is in, `until` is not.
    """
    reply = await gateway.get(f"/api/usage/stats{query}")

    by = list(data[0]["group"]) if data else ["day"]
    assert reply.status == 200
    assert reply.json == {"key": "alice", "by": by, "timezone": "Asia/Shanghai", "data": data}


# GET /api/usage/logs


async def pages(gateway: GatewayUnderTest, query: str) -> list[list[str]]:
    """The request ids of all pages, from the newest on."""
    found, before = [], ""
    while before is not None:
        reply = await gateway.get(f"/api/usage/logs?{query}{before}")
        assert reply.status == 200
        found.append([entry["request_id"] for entry in reply.json["data"]])
        before = reply.json["next"] and f"&before={reply.json['next']}"
    return found


def write_month(gateway: GatewayUnderTest, month: str, count: int, packed: bool = False) -> list[str]:
    """A month of entries, of alice and bob in turn, as a file of the ledger; the ids of alice's."""
    entry = msgspec.json.decode(msgspec.json.encode(gateway.entries()[0]), type=g.Entry)
    lines = [
        msgspec.structs.replace(
            entry, time=f"{month}-01T00:00:00.000Z", request_id=f"req_{month}_{i}", key=("alice", "bob")[i % 2]
        )
        for i in range(count)
    ]
    data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    path = gateway.gateway.ledger.directory / f"usage-{month}.jsonl"
    gateway.gateway.books._following.result()  # it would warn of a month that comes while it reads
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)
    return [line.request_id for line in lines if line.key == "alice"]


async def test_logs_are_the_ledgers_lines_newest_first(gateway):
    """
    The very entries, with every field.
    """
    mine = [entry for entry in gateway.entries() if entry["key"] == "alice"]

    reply = await gateway.get("/api/usage/logs")

    assert reply.json == {"key": "alice", "data": mine[::-1], "next": None, "unreadable": []}
    assert [entry["model"] for entry in reply.json["data"]] == ["other", "claude-test", "claude-test"]


@pytest.mark.parametrize("packed", [False, True])
async def test_entries_that_cannot_be_read_are_named(gateway, packed):
    """
    No call disappears without a word: file and line say where it is.
    """
    written = write_month(gateway, "2026-08", 3)  # alice's, bob's, alice's
    path = gateway.gateway.ledger.directory / "usage-2026-08.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second + third.replace(b'"status":200', b'"status":"200"') * 7)
    name = "usage-2026-08.jsonl"
    if packed:
        g.LedgerFiles(path.parent).archive(lambda text: None)
        name += ".gz"

    reply = (await gateway.get("/api/usage/logs?until=2026-09")).json

    assert [entry["request_id"] for entry in reply["data"]] == written[:1]
    assert reply["unreadable"] == [*(f"{name}:{number}" for number in (9, 8, 7, 6, 5)), "2 more"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_pages_have_everything_exactly_once_gzipped_months_included(gateway, size):
    """
    `next` is where the next page begins, in whichever file that is.
    """
    packed = write_month(gateway, "2026-07", 11, packed=True)
    plain = write_month(gateway, "2026-08", 10)
    newest = [entry["request_id"] for entry in gateway.entries()[-4:] if entry["key"] == "alice"]

    found = await pages(gateway, f"limit={size}")

    assert [request_id for page in found for request_id in page] == [*packed, *plain, *newest][::-1]
    assert all(len(page) <= size for page in found)


async def test_a_page_begun_before_a_new_call_and_an_archive_goes_on_after_them(gateway, upstream):
    """
    What happens to the ledger between two pages neither repeats nor hides a line.
    """
    august = write_month(gateway, "2026-08", 10)
    newest = [entry["request_id"] for entry in gateway.entries()[-4:] if entry["key"] == "alice"]
    first = (await gateway.get("/api/usage/logs?limit=5")).json
    upstream.script = json_body({"type": "error"}, 400)
    await gateway.post("/v1/messages", HELLO)
    g.LedgerFiles(gateway.gateway.ledger.directory).archive(lambda text: None)

    second = (await gateway.get(f"/api/usage/logs?limit=5&before={first['next']}")).json

    found = [entry["request_id"] for entry in first["data"] + second["data"]]
    assert found == [*august, *newest][::-1]


@pytest.mark.parametrize(
    ("query", "models"),
    [
        ("model=other", ["other"]),
        ("model=claude-test", ["claude-test", "claude-test"]),
        ("model=claude", []),
        ("outcome=completed&model=other", ["other"]),
        ("outcome=refused", []),
        ("upstream=main&path=/v1/messages", ["other", "claude-test", "claude-test"]),
        ("path=/v1/responses", []),
        ("session=s", []),
        ("since=2026-09-21T21", ["other", "claude-test"]),
        ("until=2026-09-21T21", ["claude-test"]),
        ("limit=1", ["other"]),
        ("limit=1000", ["other", "claude-test", "claude-test"]),
        ("before=2026-08:0", []),
        ("before=2026-09:999999999999999", ["other", "claude-test", "claude-test"]),
        ("before=9999-99:1", ["other", "claude-test", "claude-test"]),
    ],
)
async def test_logs_are_filtered(gateway, query, models):
    """
    Each filter is the value of a field; times are UTC, as in the entries.
    """
    reply = await gateway.get(f"/api/usage/logs?{query}")

    assert [entry["model"] for entry in reply.json["data"]] == models


TIME = "expected a time such as 2026-11, 2026-11-21 or 2026-11-21T08:00"
GROUPS = "by: expected some of hour, day, month, model, upstream, outcome, separated by commas"
BEFORE = "before: expected what the page before this one gave as `next`"
UTF_8 = "The query cannot be read: expected UTF-8, percent-encoded."


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("stats?by=year", GROUPS),
        ("stats?by=", GROUPS),
        ("stats?by=day,key", GROUPS),
        ("stats?by=%ff", UTF_8),
        ("stats?since=yesterday", f"since: {TIME}"),
        ("stats?until=2026-9", f"until: {TIME}"),
        ("logs?since=1", f"since: {TIME}"),
        ("logs?until=2026-09-21%2008:00", f"until: {TIME}"),
        ("logs?limit=0", "limit: expected 1 to 1000, got '0'"),
        ("logs?limit=1001", "limit: expected 1 to 1000, got '1001'"),
        ("logs?limit=-1", "limit: expected 1 to 1000, got '-1'"),
        ("logs?limit=", "limit: expected 1 to 1000, got ''"),
        ("logs?limit=many", "limit: expected 1 to 1000, got 'many'"),
        ("logs?before=5", BEFORE),
        ("logs?before=2026-09", BEFORE),
        ("logs?before=2026-09:-5", BEFORE),
        ("logs?before=2026-09:%D9%A3", BEFORE),
        ("logs?before=2026-09:1000000000000000", BEFORE),
        (f"logs?since=2026-09-21T{'1' * 1000}", f"since: {TIME}"),
        ("logs?model=%ff", UTF_8),
    ],
)
async def test_what_cannot_be_answered_is_refused_in_the_envelope(gateway, target, message):
    """
    With what would be right.
    """
    reply = await gateway.get(f"/api/usage/{target}")

    assert reply.status == 400
    assert reply.json == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": message},
        "request_id": reply.headers["request-id"],
    }


async def test_the_ledger_is_read_beside_the_loop_and_one_page_of_a_key_at_a_time(gateway, upstream):
    """
    While alice's reader waits for a slow disk, her next request waits for it; bob's page and a call do not.
    """
    reading, may_read = threading.Event(), threading.Event()

    def slow_disk(entry: g.Entry) -> bool:
        reading.set()
        return may_read.wait(10)

    key = next(key for key in gateway.gateway.config.keys if key.name == "alice")
    upstream.script = HELLO_SCRIPT
    async with gateway.gateway.key_books.take("alice"):
        page = asyncio.create_task(gateway.gateway.key_books.page(key, ("9", 0), slow_disk, 50))
        await until(reading.is_set)
        waiting = [asyncio.create_task(gateway.get(f"/api/usage/{name}")) for name in ("logs", "stats")]
        reply = await gateway.post("/v1/messages", HELLO_STREAM, KEY_B)
        bobs = await gateway.get("/api/usage/logs?limit=1", KEY_B)
        waited = [not task.done() for task in waiting]
        may_read.set()
        entries = (await page).entries

    assert reply.texts == ["Hello", " world"] and not reply.was_cut
    assert [entry["key"] for entry in bobs.json["data"]] == ["bob"]
    assert waited == [True, True]
    assert [entry.model for entry in entries] == ["other", "claude-test", "claude-test"]
    assert [len((await task).json["data"]) for task in waiting] == [3, 2]


async def test_so_many_requests_of_a_key_wait_to_read_and_more_are_refused(gateway):
    """
    Four keys read at once, the fifth waits for the first that is done; a client that has gone has no turn.
    """
    turns = gateway.gateway.key_books
    async with contextlib.AsyncExitStack() as held:
        for name in ("alice", "1", "2"):
            await held.enter_async_context(turns.take(name))
        fourth = await gateway.get("/api/usage/stats", KEY_B)
        await held.enter_async_context(turns.take("3"))
        fifth = asyncio.create_task(gateway.get("/api/usage/stats", KEY_B))
        waiting = [asyncio.create_task(gateway.get("/api/usage/logs")) for _ in range(turns.WAITING - 2)]
        gone = await gateway.connect()
        await gone.send(request_bytes("GET", "/api/usage/stats", {"x-api-key": KEY}, b""))
        await until(lambda: turns._count["alice"] == turns.WAITING)
        refused = await gateway.get("/api/usage/logs")
        await gone.close()
        waited = not fifth.done()

    assert (fourth.status, refused.status, waited) == (200, 429, True)
    assert refused.json["error"]["message"] == "16 requests of this key read its usage already. Try again in a moment."
    assert [reply.status for reply in await asyncio.gather(fifth, *waiting)] == [200] * 15
    await until(lambda: not turns._count.total())


async def test_who_waits_to_read_when_the_gateway_stops_is_told_so(gateway):
    """
    It was an error of the gateway's, with a traceback in the log.
    """
    async with gateway.gateway.key_books.take("alice"):
        waiting = asyncio.create_task(gateway.get("/api/usage/logs"))
        await until(lambda: gateway.gateway.key_books._count["alice"] == 2)
        await gateway.gateway.close()

    reply = await waiting
    assert (reply.status, reply.json["error"]["message"]) == (503, "The gateway is stopping.")


async def test_stats_with_too_many_groups_are_refused(gateway):
    """
    A hundred thousand of them were an answer of 22 MB, for which the loop stood still for 0.7 s.
    """
    gateway.gateway.key_books.MOST_GROUPS = 1

    reply = await gateway.get("/api/usage/stats?by=hour,model")

    assert (reply.status, reply.json["error"]["message"]) == (
        400,
        "These are more than 1 groups: ask for a shorter time with since and until, or for fewer groups with by.",
    )
    assert (await gateway.get(f"/api/usage/stats?by=day&since={SECOND}")).status == 200


async def test_a_big_ledger_is_read_while_another_call_streams(gateway, upstream):
    """
    A page that looks at a hundred thousand lines of others answers, and the stream beside it goes on.
    """
    write_month(gateway, "2026-08", 100_000, packed=True)
    go_on = asyncio.Event()
    upstream.script = [*HELLO_SCRIPT[:4], wait_for(go_on), *HELLO_SCRIPT[4:]]
    stream = await gateway.connect()
    fields = {"x-api-key": KEY_B}
    await stream.send(request_bytes("POST", "/v1/messages", fields, msgspec.json.encode(HELLO_STREAM)))
    await stream.read_until(b"Hello")

    logs = asyncio.create_task(pages(gateway, "model=nobodys"))
    await asyncio.sleep(0)
    go_on.set()
    await stream.read_until(b"message_stop")

    assert set(map(tuple, await logs)) == {()}


@pytest.mark.parametrize(
    "limit, used, allowed, scope, phrase",
    [
        ("usd/day", 3.2, 20, "key", "$3.20 of $20.00 today"),
        ("tokens/month", 12_345_678, 50_000_000, "key", "12.3M of 50M tokens this month"),
        ("tokens", 999, 1000, "team", "999 of 1k tokens in all (team)"),
        ("usd/week", 1041.5, 2000, "gateway", "$1,041.50 of $2,000.00 this week (gateway)"),
        ("requests/5h", 5, 100, "key", "5 of 100 requests in 5 hours"),
        ("requests/hour", 0, 2.5e9, "key", "0 of 2.5B requests this hour"),
    ],
)
def test_a_limit_is_a_short_phrase(limit, used, allowed, scope, phrase):
    """
    A status line has room for two; whose limit it is stands there where it is not the key's own.
    """
    assert g.limit_phrase({"limit": limit, "used": used, "allowed": allowed, "scope": scope}) == phrase


async def test_the_line_for_the_status_line_shows_the_limits_nearest_to_their_end(gateway):
    """
    Of alice's limits dollars are over and her team's tokens near their end; bob has his team's and the gateway's.
    """
    alice = await gateway.get("/v1/usage?format=line", KEY)
    bob = await gateway.get("/api/usage?format=line", KEY_B)

    assert alice.headers["content-type"] == "text/plain; charset=utf-8"
    assert alice.body.decode() == (
        "alice: $0.0066 of $0.0100 today, resets Wed 23 Sep 00:00 CST · 2 of 5 requests this minute\n"
    )
    assert bob.body.decode() == (
        "bob: 51 of 1k tokens in 5 hours (team), resets Tue 22 Sep 10:13 CST · $0.0190 of $50.00 this month (gateway)\n"
    )


async def test_without_limits_the_line_shows_the_cost(gateway):
    """
    The cost of the day and of the month; `concurrent` is no limit that runs out.
    """
    text = gateway.path.read_text().replace("usd/day: 0.01, requests/minute: 5, ", "")
    assert await gateway.write(text.replace("tokens/5h: 1k", "").replace("usd: 100, usd/month: 50", ""))

    line = await gateway.get("/v1/usage?format=line", KEY)

    assert line.body.decode() == "alice: $0.01 today, $0.01 this month\n"


async def test_an_error_is_a_line_as_well(gateway):
    """
    What stands in the way fits into the status line; other formats there are none.
    """
    refused = await gateway.get("/v1/usage?format=line", "sk-proxy-wrong")
    unknown = await gateway.get("/v1/usage?format=xml", KEY)

    assert (refused.status, refused.body.count(b"\n")) == (401, 1)
    assert refused.body.startswith(b"gateway: ")
    assert (unknown.status, unknown.error["message"]) == (400, "format: expected json or line")

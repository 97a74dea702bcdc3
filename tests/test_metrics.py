"""What Prometheus reads from /metrics: what was counted, how things stand, and who may know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from client import Reply, request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, START, UPSTREAM_KEY, config_text, until
from prometheus_client.parser import text_string_to_metric_families
from upstream import HELLO as HELLO_SCRIPT
from upstream import ScriptedUpstream, end, head, hello_json, json_body, message_start, stall

import gateway as g

PRICES = 'prices: {"*": {input: 1, output: 5, cache_write_5m: 1.25, cache_write_1h: 2, cache_read: 0.1}}\n'
TOKEN_CLASSES = ("input", "output", "cache_write_5m", "cache_write_1h", "cache_read")


def numbers(reply: Reply, name: str, *labels: str) -> dict:
    """The samples of one metric by the values of its labels; without labels, under ()."""
    families = text_string_to_metric_families(reply.body.decode())
    samples = [sample for family in families for sample in family.samples if sample.name == f"claude_gateway_{name}"]
    assert all(set(sample.labels) == set(labels) for sample in samples)
    return {tuple(sample.labels[label] for label in labels): sample.value for sample in samples}


def number(reply: Reply, name: str) -> float:
    """The one sample of a metric without labels."""
    return numbers(reply, name)[()]


async def test_every_metric_has_a_type_and_says_what_it_is(gateway):
    """
    A gateway that was asked nothing yet has all metrics already, named by Prometheus' conventions.
    """
    reply = await gateway.get("/metrics", token="")
    families = list(text_string_to_metric_families(reply.body.decode()))

    assert {family.name.removeprefix("claude_gateway_"): family.type for family in families} == {
        "calls": "counter",
        "tokens": "counter",
        "cost_usd": "counter",
        "refused": "counter",
        "log_lines_lost": "counter",
        "bugs": "counter",
        "attempts": "counter",
        "upstream_state": "gauge",
        "upstream_cooldown_seconds": "gauge",
        "upstream_failures": "gauge",
        "upstream_running": "gauge",
        "calls_running": "gauge",
        "connections": "gauge",
        "body_bytes": "gauge",
        "body_bytes_limit": "gauge",
        "connections_refused": "counter",
        "ledger_waiting_entries": "gauge",
        "ledger_failing": "gauge",
        "config_reload_failing": "gauge",
        "integrity_problems": "gauge",
        "config_loaded_timestamp_seconds": "gauge",
        "start_time_seconds": "gauge",
        "info": "gauge",
        "call_seconds": "histogram",
        "first_byte_seconds": "histogram",
    }
    assert [family.name for family in families if not family.documentation.endswith(".")] == []
    assert numbers(reply, "tokens_total", "upstream", "class") == {("main", name): 0 for name in TOKEN_CLASSES}
    assert numbers(reply, "cost_usd_total", "upstream") == {("main",): 0}
    assert numbers(reply, "bugs_total", "where") == {("Gateway.handle",): 0, ("Relay.run",): 0}
    assert number(reply, "log_lines_lost_total") == 0


async def test_a_call_counts_with_its_tokens_and_what_they_cost(start_gateway, upstream):
    """
    What the ledger has of a call is counted under the upstream that answered; count_tokens costs nothing.
    """
    gateway = await start_gateway(config_text(upstream.url) + PRICES)
    usage = {"input_tokens": 12, "output_tokens": 5, "cache_read_input_tokens": 1000}
    usage |= {"cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 10}}

    upstream.script = json_body({"type": "message", "usage": usage | {"cache_creation_input_tokens": 110}})
    await gateway.post("/v1/messages", HELLO)
    upstream.script = hello_json()
    await gateway.post("/v1/messages", HELLO)
    upstream.script = json_body({"input_tokens": 7})
    await gateway.post("/v1/messages/count_tokens", HELLO)
    reply = await gateway.get("/metrics")

    assert numbers(reply, "calls_total", "upstream", "outcome") == {("main", "completed"): 3}
    assert numbers(reply, "attempts_total", "upstream", "outcome") == {("main", "completed"): 3}
    assert numbers(reply, "tokens_total", "upstream", "class") == {
        ("main", "input"): 24,
        ("main", "output"): 10,
        ("main", "cache_write_5m"): 100,
        ("main", "cache_write_1h"): 10,
        ("main", "cache_read"): 1000,
    }
    assert numbers(reply, "cost_usd_total", "upstream") == {("main",): pytest.approx((24 + 50 + 125 + 20 + 100) / 1e6)}


async def test_a_refusal_counts_by_its_status_and_as_no_call(gateway, upstream):
    """
    What is turned away before an upstream was asked is told from what an upstream refuses.
    """
    upstream.script = json_body({"type": "error", "error": {"type": "x", "message": "no"}}, status=400)

    await gateway.post("/v1/messages", HELLO, token="wrong")
    await gateway.post("/v1/messages", HELLO, token="")
    await gateway.post("/v1/messages", b"{")
    await gateway.post("/v1/messages", HELLO)
    reply = await gateway.get("/metrics")

    assert numbers(reply, "refused_total", "status") == {("401",): 2, ("400",): 1}
    assert numbers(reply, "calls_total", "upstream", "outcome") == {("main", "refused"): 1}
    assert numbers(reply, "attempts_total", "upstream", "outcome") == {("main", "refused"): 1}
    assert numbers(reply, "tokens_total", "upstream", "class") == {("main", name): 0 for name in TOKEN_CLASSES}


async def test_an_attempt_that_was_billed_in_vain_costs_its_upstream(start_gateway, upstream):
    """
    The call counts where it was answered; each upstream has the tokens that it will charge for.
    """
    spare = ScriptedUpstream()
    await spare.start()
    text = config_text(upstream.url, ", priority: 0").replace("max_attempts: 1", "max_attempts: 2") + PRICES
    gateway = await start_gateway(
        text.replace("keys:", f'  - {{name: spare, url: "{spare.url}", api_key: {UPSTREAM_KEY}}}\nkeys:')
    )
    upstream.script, spare.script = [head(200, "text/event-stream"), message_start(7), end()], HELLO_SCRIPT

    await gateway.post("/v1/messages", HELLO_STREAM)
    reply = await gateway.get("/metrics")
    await spare.close()

    assert numbers(reply, "calls_total", "upstream", "outcome") == {("spare", "completed"): 1}
    assert numbers(reply, "attempts_total", "upstream", "outcome") == {("main", "cut"): 1, ("spare", "completed"): 1}
    tokens = numbers(reply, "tokens_total", "upstream", "class")
    assert (tokens["main", "input"], tokens["spare", "input"], tokens["spare", "output"]) == (7, 12, 5)
    cost = {("main",): pytest.approx(sum_of(gateway, "discarded")), ("spare",): pytest.approx(37e-6)}
    assert numbers(reply, "cost_usd_total", "upstream") == cost


def sum_of(gateway, kind: str) -> float:
    """What the ledger's lines of one type cost."""
    return sum(entry["cost_usd"] for entry in gateway.entries() if entry["type"] == kind)


async def test_times_are_counted_up_to_each_bound(gateway, upstream, clock):
    """
    A histogram's buckets are cumulative and their bounds inclusive; what takes longer is only in +Inf.
    """
    for seconds in (0.0, 2.5, 301.0):
        upstream.script = [lambda *_, seconds=seconds: passes(clock, seconds), *HELLO_SCRIPT]
        await gateway.post("/v1/messages", HELLO_STREAM)
    reply = await gateway.get("/metrics")

    bounds = ["0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "30.0", "60.0", "120.0", "300.0", "+Inf"]
    for name in ("call_seconds", "first_byte_seconds"):
        counts = numbers(reply, f"{name}_bucket", "le")
        assert counts == {(le,): n for le, n in zip(bounds, [1] * 4 + [2] * 7 + [3], strict=True)}
        assert (number(reply, f"{name}_count"), number(reply, f"{name}_sum")) == (3, 303.5)


async def passes(clock, seconds: float) -> None:
    """A step of an upstream's script: it thinks for so long."""
    clock.advance(seconds)


@pytest.mark.logs("is left alone for")
async def test_an_upstream_that_is_left_alone_says_for_how_long(start_gateway, upstream, clock):
    """
    Each upstream, and each of its keys under its number, is in one state, with the seconds that are left.
    """
    keys = f"[{UPSTREAM_KEY}, sk-upstream-another-0123456789]"
    gateway = await start_gateway(config_text(upstream.url).replace(f"api_key: {UPSTREAM_KEY}", f"api_key: {keys}"))
    upstream.script = json_body({"error": {}}, status=429, **{"retry-after": "30"})

    await gateway.post("/v1/messages", HELLO)
    at_once = await gateway.get("/metrics")
    clock.advance(12)
    later = await gateway.get("/metrics")
    clock.advance(21)
    ready = await gateway.get("/metrics")

    seconds = [numbers(reply, "upstream_cooldown_seconds", "upstream", "key") for reply in (at_once, later, ready)]
    (cooling,) = [key for (_, key), left in seconds[0].items() if left]
    other = {"1": "2", "2": "1"}[cooling]
    left = seconds[0]["main", cooling]
    assert 30 <= left <= 33  # what the upstream asked for, and up to a tenth more
    assert seconds == [{("main", ""): 0, ("main", cooling): s, ("main", other): 0} for s in (left, left - 12, 0)]
    # It holds up the one user who was told so: for the others it is as good as before.
    assert states(later) == states(ready) == {("main", ""): "ok", ("main", cooling): "ok", ("main", other): "ok"}
    failures = numbers(ready, "upstream_failures", "upstream", "key")
    assert failures == {("main", ""): 0, ("main", cooling): 1, ("main", other): 0}


def states(reply: Reply) -> dict[tuple[str, str], str]:
    """The one state of each upstream and key; the others are there too, as 0."""
    found = numbers(reply, "upstream_state", "upstream", "key", "state")
    present = [place for place, is_so in found.items() if is_so]
    assert set(found.values()) <= {0, 1} and len(found) == 3 * len(present)
    assert {state for _, _, state in found} == {"ok", "cooling", "half_open"}
    return {(upstream, key): state for upstream, key, state in present}


async def test_what_runs_is_seen_while_it_runs(gateway, upstream):
    """
    A running call counts with the gateway, with its upstream and with the API key that it uses.
    """
    upstream.script = [head(200, "text/event-stream"), message_start(1), stall()]
    connection = await gateway.connect()

    await connection.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await until(lambda: upstream.requests)
    during = await gateway.get("/metrics")
    connection.abort()
    await gateway.settled()
    after = await gateway.get("/metrics")

    assert (number(during, "calls_running"), number(after, "calls_running")) == (1, 0)
    running = [numbers(reply, "upstream_running", "upstream", "key") for reply in (during, after)]
    assert running == [{("main", ""): n, ("main", "1"): n} for n in (1, 0)]
    assert numbers(after, "calls_total", "upstream", "outcome") == {("main", "client_gone"): 1}


@pytest.mark.logs("config not reloaded")
async def test_a_config_with_a_mistake_is_seen(gateway, upstream, clock):
    """
    From a bad save to the next good one `config_reload_failing` is 1; start and load have their times.
    """
    clock.advance(60)
    await gateway.write("upstreams: [")
    bad = await gateway.get("/metrics")
    await gateway.write(config_text(upstream.url, ", weight: 2"))
    good = await gateway.get("/metrics")

    names = ("config_reload_failing", "config_loaded_timestamp_seconds", "start_time_seconds")
    assert [number(bad, name) for name in names] == [1, START, START]
    assert [number(good, name) for name in names] == [0, START + 60, START]
    assert numbers(good, "info", "version") == {(g.VERSION,): 1}


@pytest.mark.logs("ledger: cannot write to", "could not be written")
async def test_a_ledger_that_cannot_be_written_is_seen(gateway, upstream):
    """
    A disk that refuses is known before the queue is full, and announced once.
    """
    upstream.script = hello_json()
    heard: list[g.LedgerChanged] = []
    gateway.gateway.events.listen(g.LedgerChanged, heard.append)
    healthy = await gateway.get("/metrics")
    gateway.gateway.ledger.directory = gateway.path / "no-folder"
    gateway.gateway.ledger.reopen_if_moved()

    await gateway.post("/v1/messages", HELLO)
    reply = await gateway.get("/metrics")

    names = ("ledger_failing", "ledger_waiting_entries")
    assert [number(healthy, name) for name in names] == [0, 0]
    assert [number(reply, name) for name in names] == [1, 1]
    assert [event.failure for event in heard] == ["Not a directory"]
    await gateway.gateway.close()


@pytest.mark.parametrize(
    ("networks", "forwarded", "status"),
    [
        (None, "", 200),
        (None, "10.1.2.3", 403),
        (None, "nonsense", 403),
        (None, "203.0.113.9", 403),
        (None, "2001:db8::1", 403),
        (None, "10.1.2.3, 203.0.113.9", 403),
        ("[]", "", 403),
        ("[203.0.113.0/24]", "203.0.113.9", 200),
        ("[203.0.113.0/24]", "", 403),
    ],
)
async def test_only_the_configured_networks_may_read_the_metrics(gateway, upstream, networks, forwarded, status):
    """
    By default this host; what a trusted proxy forwards counts as from where it came.
    """
    metrics_from = f", metrics_from: {networks}" if networks else ""  # live, as every other setting
    server = f"port: 0, trusted_proxies: [127.0.0.1]{metrics_from}"
    await gateway.write(config_text(upstream.url).replace("port: 0", server))

    reply = await gateway.get("/metrics", **({"x_forwarded_for": forwarded} if forwarded else {}))

    assert reply.status == status
    if status == 403:
        address = {"": "127.0.0.1", "nonsense": "unknown"}.get(forwarded, forwarded.split(", ")[-1])
        assert reply.json["type"] == "error" and reply.json["error"] == {
            "type": "permission_error",
            "message": f"{address} is in none of the networks of server.metrics_from.",
        }


async def test_a_peer_that_is_no_trusted_proxy_cannot_claim_another_address(gateway, upstream):
    """
    X-Forwarded-For of anybody else is not believed.
    """
    await gateway.write(
        config_text(upstream.url).replace("port: 0", "port: 0, trusted_proxies: [], metrics_from: [10.0.0.0/8]")
    )

    reply = await gateway.get("/metrics", x_forwarded_for="10.1.2.3")

    assert reply.status == 403


async def test_the_metrics_hold_no_secret_and_name_no_user(gateway, upstream):
    """
    Invariant 9: keys of upstreams are numbered, users do not appear, not even by their names.
    """
    upstream.script = hello_json()

    await gateway.post("/v1/messages", HELLO)
    await gateway.post("/v1/messages", HELLO, token="sk-proxy-unknown-0123456789abcdef")
    text = (await gateway.get("/metrics")).body.decode()

    assert 'claude_gateway_calls_total{outcome="completed",upstream="main"} 1.0' in text
    secrets = (KEY, KEY[-4:], UPSTREAM_KEY, "sk-", "alice", "claude-test", upstream.url)
    assert [secret for secret in secrets if secret in text] == []


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
async def test_the_answer_is_prometheus_text_and_head_has_its_head(gateway, path):
    """
    GET and HEAD have the content type of the text format; other methods are refused.
    """
    got, asked = await gateway.get(path), await gateway.request("HEAD", path)
    posted = await gateway.post("/metrics", b"")

    assert (got.status, asked.status, posted.status) == (200, 200, 405)
    assert got.headers["content-type"] == asked.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert asked.body == b"" and int(asked.headers["content-length"]) == len(got.body)


def test_prometheus_client_is_not_imported_before_it_is_asked_for():
    """
    It costs time and memory that a start does without.
    """
    code = "import sys, gateway; sys.exit('prometheus_client' in sys.modules)"

    found = subprocess.run([sys.executable, "-c", code], cwd=Path(g.__file__).parent)

    assert found.returncode == 0


async def test_connections_are_counted_and_those_refused(start_gateway):
    """
    An operator sees how many connections are open, and that some were turned away, by reason.
    """
    gateway = await start_gateway(config_text("http://127.0.0.1:9"), most=2)
    idle = [await gateway.connect() for _ in range(2)]

    reply = await gateway.get("/metrics", token="")

    assert number(reply, "connections") == 2  # the scrape's own, in place of the oldest
    assert numbers(reply, "connections_refused_total", "why") == {("oldest",): 1}
    assert await idle[0].is_closed()


@pytest.mark.logs("a bug in ")
async def test_a_listener_with_a_bug_keeps_no_event_from_the_others(gateway, upstream, caplog):
    """
    The call is answered, booked and counted; the log has one traceback, and /metrics each failure.
    """

    def broken(event: g.CallEnded) -> None:
        raise ValueError("a bug")

    heard: list[g.CallEnded] = []
    gateway.gateway.events.listen(g.CallEnded, broken)
    gateway.gateway.events.listen(g.CallEnded, heard.append)
    upstream.script = hello_json()

    statuses = [(await gateway.post("/v1/messages", HELLO)).status for _ in range(3)]
    reply = await gateway.get("/metrics")

    assert statuses == [200] * 3
    assert [(event.call.key.name, event.entry.input_tokens, len(event.attempts)) for event in heard] == [
        ("alice", 12, 1)
    ] * 3
    assert numbers(reply, "calls_total", "upstream", "outcome") == {("main", "completed"): 3}
    assert [count for (where,), count in numbers(reply, "bugs_total", "where").items() if "broken" in where] == [3]
    assert sum(1 for record in caplog.records if record.exc_info) == 1

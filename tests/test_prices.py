"""Prices: what providers charge for is what is booked. The cases stand in usage.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from client import request_bytes
from conftest import HELLO, HELLO_STREAM, KEY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from upstream import body, close, end, head, json_body, stall, text

import gateway as g

CASES = json.loads((Path(__file__).parent / "usage.json").read_text())
TWO_FORMATS = """
server: {{host: 127.0.0.1, port: 0}}
upstreams:
  - {{name: claude, url: "{url}"}}
  - {{name: gpt, url: "{url}", format: openai}}
keys: [{{name: alice, key: {key}, limits: {{usd/day: 1000, tokens/day: 100M}}}}]
usage: {{directory: usage, fsync: never}}
limits: {{weights: {{input: 1, output: 1, cache_write: 1, cache_read: 1}}}}
{prices}
"""


async def start_two(start_gateway, upstream, prices: str = ""):
    """A gateway before an upstream that speaks both formats."""
    return await start_gateway(TWO_FORMATS.format(url=upstream.url, key=KEY, prices=prices))


def script_of(answer: dict | list) -> list:
    """An answer as steps: a JSON body, or a stream of events."""
    if isinstance(answer, dict):
        return json_body(answer)
    datas = [event if isinstance(event, str) else json.dumps(event) for event in answer]
    return [head(200, "text/event-stream"), *(body(f"data: {data}\n\n".encode()) for data in datas), end()]


def recomputed(entry: g.Entry) -> float:
    """The bill of an entry, from nothing but the entry."""
    own = msgspec.convert(entry, g.Tokens, from_attributes=True)
    for charge in entry.charges:
        own.add(charge, -1)
        if charge.price:
            assert charge.usd == pytest.approx(charge.price.cost_usd(charge) * charge.factor, abs=1e-9)
    main = entry.price.cost_usd(own) * math.prod(entry.premiums.values())
    return main + sum(charge.usd for charge in entry.charges)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
async def test_a_call_is_booked_as_its_provider_bills_it(start_gateway, upstream, case):
    """
    Usage objects as the APIs document them, and their bills, added up by hand from the price lists (`bill`, in
    millionths of a dollar): to the cent, and to the billionth of a dollar. The entry has all that the bill is made of.
    """
    gateway = await start_two(start_gateway, upstream)
    upstream.script = script_of(case["answer"])

    reply = await gateway.post(
        case["path"], HELLO | {"model": case["model"], "stream": isinstance(case["answer"], list)}
    )
    await gateway.settled()

    (line,) = gateway.entries()
    assert (reply.status, line["outcome"], line["estimated"], line["error_type"]) == (200, "completed", False, "")
    assert line["cost_usd"] == pytest.approx(case["usd"], abs=2e-9)
    assert {name: line[name] for name in case["tokens"]} == case["tokens"]
    assert recomputed(msgspec.convert(line, g.Entry)) == pytest.approx(line["cost_usd"], abs=5e-9)
    limits = {row["limit"]: row["used"] for row in (await gateway.get("/api/usage")).json["limits"]}
    assert limits["usd/day"] == pytest.approx(case["usd"], abs=2e-9)
    assert limits["tokens/day"] == sum(line[name] for name in g.Tokens.__struct_fields__)


def test_there_are_cases_enough():
    """
    Of both APIs, streams and whole answers, each with the place where its shape is documented.
    """
    assert len(CASES) >= 40 and len({case["name"] for case in CASES}) == len(CASES)
    assert {case["path"] for case in CASES} == {route for route in g.ROUTES if "count_tokens" not in route}
    assert all(case["documented"] for case in CASES)


# The table


def load(prices: str) -> g.Config:
    """A config with prices."""
    text = f"upstreams: [{{name: demo, format: demo}}]\n{prices}\n"
    return g.Config.parse(text, Path("config.yaml"), g.Clock(), {})


@pytest.mark.parametrize(
    ("model", "input_usd", "output_usd"),
    [
        ("gpt-5", 1.25, 10),
        ("gpt-5-2025-08-07", 1.25, 10),
        ("gpt-5-pro", 15, 120),
        ("gpt-5-pro-2025-10-06", 15, 120),
        ("gpt-5.4", 2.5, 15),
        ("gpt-5.4-nano", 0.2, 1.25),
        ("gpt-5.5", 5, 30),
        ("gpt-5.5-2026-04-23", 5, 30),
        ("gpt-5.5-pro", 30, 180),
        ("gpt-5.9", 10, 50),
        ("gpt-5-turbo", 10, 50),
        ("claude-opus-4-5@20251101", 5, 25),
        ("claude-opus-5-5[1m]", 4, 20),
        ("claude-opus-6", 10, 50),
        ("claude-fable-5-2", 8, 40),
        ("claude-fable-5-10", 10, 50),
        ("claude-opus-4-1-20250805", 15, 75),
        ("claude-3-5-haiku-latest", 0.8, 4),
        ("a model that nobody has heard of", 10, 50),
    ],
)
def test_a_family_is_named_exactly(model, input_usd, output_usd):
    """
    gpt-5.5 and the pro models cost 4 to 24 times what gpt-5 does: nothing borrows a sibling's price.
    """
    price = load("").price(model).base

    assert (price.input, price.output) == (input_usd, output_usd)


OWN = "prices:\n  claude-haiku-*: {input: 1, output: 5, fast: 3, web_search: 0.02}\n  gpt-5: {input: 2, output: 8}\n"
STAR = '  "*": {input: 10, output: 50}\n'


def test_a_surcharge_can_be_set_for_a_model_or_for_all():
    """
    A number beside the models is for all of them, a number in a model's row for that one; else the built-in one holds.
    """
    config = load(OWN + STAR + "  fast: 4\n  us: 1.25\n")
    usage = g.Usage(
        input_tokens=1000,
        output_tokens=100,
        premiums=(("speed", "fast"), ("inference_geo", "us")),
        extras=(("web_search", 2),),
    )

    haiku, gpt = config.bill("claude-haiku-4-5", "", usage), config.bill("gpt-5", "", usage)

    assert haiku.premiums == {"fast": 3, "us": 1.25} and gpt.premiums == {"fast": 4, "us": 1.25}
    assert haiku.cost_usd == pytest.approx((1000 * 1 + 100 * 5) / 1e6 * 3 * 1.25 + 2 * 0.02)
    assert gpt.cost_usd == pytest.approx((1000 * 2 + 100 * 8) / 1e6 * 4 * 1.25 + 2 * 0.01)


def test_surcharges_alone_leave_the_built_in_prices():
    """
    Whoever only has another price for searches need not write the whole table.
    """
    config = load("prices: {web_search: 0.02, unknown: dearest}")

    assert config.price("gpt-5").base == g.BUILT_IN_PRICES["gpt-5"].base
    assert config.bill("gpt-5", "", g.Usage(extras=(("web_search", 1),))).cost_usd == 0.02


def test_an_unknown_model_can_be_booked_at_the_dearest_price_of_the_table():
    """
    `unknown: dearest`: each class of tokens at the highest price that any row has for it, tiers included.
    """
    tier = "tiers: [{above: 200k, input: 6, output: 7}]"
    config = load(f"prices:\n  unknown: dearest\n  a: {{input: 1, output: 9, {tier}}}\n  b: {{input: 5, output: 2}}\n")

    assert config.price("c").base == g.Price(6, 9, 7.5, 12, 0.6)
    assert config.price("a").base.input == 1


@pytest.mark.parametrize("star", ["", STAR])
async def test_an_unknown_model_can_be_refused(start_gateway, upstream, star):
    """
    `unknown: refuse`: a 400 that says why and what to do, before an upstream is asked. count_tokens costs nothing.
    """
    prices = "prices:\n  unknown: refuse\n  claude-haiku-4-5: {input: 1, output: 5}\n"
    gateway = await start_two(start_gateway, upstream, prices + star)
    upstream.script = json_body({"input_tokens": 5})

    refused = await gateway.post("/v1/messages", HELLO | {"model": "claude-opus-9"})
    known = await gateway.post("/v1/messages", HELLO | {"model": "claude-haiku-4-5-20251001"})
    counted = await gateway.post("/v1/messages/count_tokens", HELLO | {"model": "claude-opus-9"})

    assert (refused.status, refused.error["type"], refused.headers["x-should-retry"]) == (
        400,
        "policy_blocked",
        "false",
    )
    assert refused.error["message"] == (
        "The model 'claude-opus-9' has no price here, and this gateway serves only what it can price: its config needs "
        "a row for it in `prices`."
    )
    assert (known.status, counted.status, len(upstream.requests)) == (200, 200, 2)


async def test_what_serves_in_a_models_place_is_reserved_at_its_price_the_next_time(start_gateway, upstream):
    """
    An upstream that answers for haiku with opus: the entry has the dearer price, and so have the next reservations.
    """
    gateway = await start_two(start_gateway, upstream)
    usage = {"input_tokens": 9, "output_tokens": 1}
    upstream.script = json_body({"type": "message", "model": "claude-opus-4-6", "content": [], "usage": usage})
    ask = HELLO | {"model": "claude-haiku-4-5", "max_tokens": 1000}
    config, limits = gateway.gateway.config, gateway.gateway.limits
    call = g.Call(config, config.keys.find([KEY]), g.ROUTES["/v1/messages"], b"", [], "")
    call.upstream_model, call.servings = "claude-haiku-4-5", ()

    before = limits.estimates.demand(call).per_token["usd"]
    await gateway.post("/v1/messages", ask)

    assert (before, limits.estimates.demand(call).per_token["usd"]) == (5000, 25_000)
    assert gateway.entries()[0]["price"]["output"] == 25


@pytest.mark.parametrize(
    ("asked", "factor"),
    [
        ({}, 1),
        ({"speed": "fast"}, 2),
        ({"speed": "fast", "inference_geo": "us"}, 2.2),
        ({"speed": "standard", "service_tier": "standard_only", "inference_geo": None}, 1),
        ({"service_tier": "batch"}, 1),
        ({"speed": ["fast"]}, 1),
    ],
)
async def test_a_premium_that_is_asked_for_is_reserved(start_gateway, upstream, asked, factor):
    """
    Users set fast mode themselves: while such a call runs, twice the money is held. No premium lowers what is held.
    """
    gateway = await start_two(start_gateway, upstream)
    upstream.script = [stall()]
    client = await gateway.connect()
    ask = json.dumps(HELLO | {"model": "claude-opus-5-5", "max_tokens": 10_000} | asked).encode()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, ask))
    await upstream.request_came()

    (row,) = [row for row in (await gateway.get("/api/usage")).json["limits"] if row["limit"] == "usd/day"]

    assert row["reserved"] == pytest.approx(8192 * 20 / 1e6 * factor, rel=0.01)


def test_a_bill_has_only_so_many_lines():
    """
    An upstream that makes up kinds of iterations by the thousand writes no long lines into the ledger.
    """
    config = load("")
    key = g.Key("a", b"", "", ("*",), math.inf, (), True, "", ())
    call = g.Call(config, key, g.ROUTES["/v1/messages"], b"", [], "")
    meter = g.MessagesMeter(call)
    made_up = [{"type": f"kind {i}", "model": f"m{i}", "input_tokens": 1, "output_tokens": 0} for i in range(1000)]
    answer = {"model": "claude-opus-5-5", "usage": {"input_tokens": 1, "output_tokens": 1, "iterations": made_up}}
    answer["usage"]["server_tool_use"] = {"fast": 5, "us": 5, "web_search_requests": 1}

    meter.start(False)
    meter.read(json.dumps(answer).encode(), True)
    usage = meter.spend(True)
    bill = config.bill("claude-opus-5-5", "", usage)

    assert usage.input_tokens == 1001 and len(bill.charges) == 34
    assert [charge.what for charge in bill.charges[-2:]] == ["others", "web_search"]


COUNTS = st.integers(-5, 10**6) | st.integers(0, 1 << 70) | st.floats(0, 1e9) | st.none()
WORDS = st.sampled_from(["fast", "us", "priority", "turbo", "", "claude-opus-5-5", "message", "advisor_message"])
ODD = st.recursive(
    COUNTS | WORDS | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
NUMBERS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "prompt_tokens")
OTHERS = ("speed", "service_tier", "inference_geo", "model", "type", "iterations", "server_tool_use", "cache_creation")
SHIPPED = load("")
USAGES = st.fixed_dictionaries({}, optional=dict.fromkeys(NUMBERS, COUNTS) | dict.fromkeys(OTHERS, ODD))
ANSWERS = st.builds(
    lambda usage, iterations, more: more | {"usage": usage | ({"iterations": iterations} if iterations else {})},
    USAGES,
    st.lists(USAGES, max_size=3),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("service_tier", "tool_usage", "output", "status", "model"), ODD)),
)


@given(answer=ANSWERS)
@example(answer={"usage": {"iterations": [{"input_tokens": 1}]}})
@settings(deadline=None)
def test_whatever_an_answer_says_its_bill_is_a_number_and_can_be_added_up_again(answer):
    """
    No usage object breaks the booking, none makes a call pay back, and what the entry keeps is all of the bill.
    """
    key = g.Key("a", b"", "", ("*",), math.inf, (), True, "", ())
    for route in g.ROUTES.values():
        meter = g.DIALECTS[route.api, route.kind].reader(g.Call(SHIPPED, key, route, b"", [], ""))

        meter.start(False)
        meter.read(json.dumps(answer).encode(), True)
        usage = meter.spend(True)
        bill = SHIPPED.bill("claude-haiku-4-5", meter.model, usage)

        own = msgspec.convert(usage, g.Tokens, from_attributes=True)
        for charge in bill.charges:
            own.add(charge, -1)
        assert all(getattr(own, name) >= 0 for name in g.Tokens.__struct_fields__)
        main = bill.price.cost_usd(own) * math.prod(bill.premiums.values())
        total = main + sum(charge.usd for charge in bill.charges)
        assert 0 <= bill.cost_usd == pytest.approx(total, rel=1e-9, abs=1e-8)


def test_a_name_that_has_no_price_says_nothing_of_who_served():
    """
    Servers of open models answer with paths; that must not make a cheap row dear.
    """
    config = load("prices:\n  llama: {input: 0.1, output: 0.1}\n" + STAR)

    assert config.bill("llama", "/models/llama-4.gguf", g.Usage(input_tokens=1_000_000)).cost_usd == 0.1


# Streams that break off, attempts that were billed in vain


async def test_a_stream_cut_short_has_the_premiums_that_it_began_with(start_gateway, upstream):
    """
    message_start says fast: what is estimated after it costs twice as well.
    """
    gateway = await start_two(start_gateway, upstream)
    usage = {"input_tokens": 1000, "output_tokens": 1, "speed": "fast"}
    start = {"type": "message_start", "message": {"model": "claude-opus-5-5", "usage": usage}}
    first = body(f"data: {json.dumps(start)}\n\n".encode())
    upstream.script = [head(200, "text/event-stream"), first, text("x" * 400), close()]

    await gateway.post("/v1/messages", HELLO_STREAM | {"model": "claude-opus-5-5"})
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["outcome"], entry["premiums"]) == ("upstream_cut", {"fast": 2.0})
    assert entry["cost_usd"] == pytest.approx((1000 * 4 + 100 * 20) * 2 / 1e6)


async def test_entries_of_earlier_days_are_still_read(start_gateway, upstream):
    """
    A line without premiums and charges has none.
    """
    gateway = await start_two(start_gateway, upstream)
    upstream.script = script_of(CASES[0]["answer"])
    await gateway.post("/v1/messages", HELLO | {"model": "claude-opus-5-5"})
    line = gateway.entries()[0]
    del line["premiums"], line["charges"]

    entry = msgspec.convert(line, g.Entry)

    assert (entry.premiums, entry.charges) == ({}, [])


def test_the_usage_of_a_plain_call_makes_nothing_more_than_it_did():
    """
    What is absent costs nothing: no shares, no premiums, no dictionaries.
    """
    config = load("")
    usage = g.Usage(input_tokens=1000, output_tokens=100)

    bill = config.bill("claude-opus-5-5", "claude-opus-5-5", usage)

    assert (bill.premiums, bill.charges, bill.cost_usd) == ({}, [], 0.006)
    assert (usage.shares, usage.extras, usage.premiums) == ((), (), ())

"""Config: YAML in, frozen values out, errors that say where and what; edits that keep the rest."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import errno
import gc
import json
import math
import os
import re
import shutil
import stat
import subprocess
import time
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml
from conftest import KEY
from hypothesis import given, settings
from hypothesis import strategies as st

import gateway as g

DEMO = "upstreams: [{name: demo, format: demo}]\n"
HASH, HASH2, HASH3 = ("sha256:" + digit * 64 + ":last" for digit in "123")
KEYS = DEMO + "keys:\n"
DIGEST, DIGEST2, DIGEST3 = (bytes.fromhex(digit * 64) for digit in "123")
EXAMPLE = Path(g.__file__).with_name("config.example.yaml")


BADLY_PASTED = "is empty, or has blanks, quotes or other characters that no key has: paste only the key"
NO_API_KEY = "there is none: add `api_key: ${NAME}`, or the key itself, and `seal`"


def load(text: str, path: Path = Path("config.yaml"), **environ: str) -> g.Config:
    """A config from its text, in an environment of its own."""
    return g.Config.parse(text, path, g.Clock(), environ)


def keys_of(config: g.Config) -> dict[str, g.Key]:
    """A config's keys by name."""
    return {key.name: key for key in config.keys}


# What a config means


def test_a_config_of_one_upstream_has_a_default_for_everything_else():
    """
    Required are an upstream and its name and url; what is not written is what config.example.yaml shows.
    """
    config = load("upstreams: [{name: anthropic, url: https://api.anthropic.com}]")

    assert msgspec.structs.asdict(config.file.server) == {
        "host": "127.0.0.1",
        "port": 8000,
        "url": "",
        "timezone": "UTC",
        "trusted_proxies": (),
        "metrics_from": g.LOOPBACK,
        "max_body": 33554432,
        "memory": None,
        "drain": 600.0,
        "contact": "",
    }
    assert [msgspec.structs.asdict(upstream) for upstream in config.upstreams] == [
        {
            "name": "anthropic",
            "url": "https://api.anthropic.com",
            "api_key": (),
            "format": "anthropic",
            "models": {"*": "*"},
            "priority": 1,
            "weight": 1.0,
            "max_concurrent": None,
            "max_connections": 4096,
            "timeouts": g.Timeouts(connect=10.0, first_byte=360.0, idle=300.0),
            "on_disconnect": "auto",
            "verdicts": {},
            "headers": g.HeaderRules({}, ()),
            "betas": g.BetaRules(()),
            "retry_without_thinking": False,
            "include_usage": True,
            "allow_private": False,
            "ca_file": None,
            "proxy": None,
        }
    ]
    assert (list(config.keys), config.file.usage) == ([], g.UsageConfig("usage", 1.0))
    assert config.warnings == [f"line 1: upstreams[0].api_key: {NO_API_KEY}"]
    assert (config.file.teams, config.limits) == ((), g.LimitsConfig((), 8192, 10.0, g.Weights(1.0, 1.0, 1.0, 0.1)))
    assert config.file.prices.rows == g.BUILT_IN_PRICES
    assert config.routing == g.RoutingConfig((), 4, 600.0, 120.0, 30.0, g.BreakerConfig(3, 10.0, 600.0))


def test_a_key_has_a_default_for_everything_but_its_name_and_itself():
    """
    It works for ever, from anywhere, for every model, and without limits.
    """
    config = load(f"{DEMO}keys: [{{name: alice, key: {HASH}}}]")

    budgets = (g.Budget("key", "alice", (), math.inf), g.Budget("gateway", "", (), math.inf))
    assert keys_of(config) == {"alice": g.Key("alice", DIGEST, "last", ("*",), math.inf, (), True, "", budgets)}


def test_every_setting_of_a_key_reaches_the_key():
    """
    A snapshot holds what the file says, ready to be compared with.
    """
    config = load(f"""{DEMO}
keys:
  - name: alice
    key: {HASH}
    team: research
    limits: {{usd/day: 20, concurrent: 16}}
    models: ["claude-*", gpt-6-sol]
    expires: 2027-01-31
    allow_ips: [10.0.0.0/8, "2001:db8::1"]
    enabled: false
teams: [{{name: research, limits: {{tokens/month: 50M, concurrent: 32}}}}]
limits: {{gateway: {{usd/month: 5k}}}}
""")

    alice = keys_of(config)["alice"]
    assert (alice.team, alice.budgets) == (
        "research",
        (
            g.Budget("key", "alice", (g.Limit("usd", g.WINDOWS["day"], 20.0),), 16.0),
            g.Budget("team", "research", (g.Limit("tokens", g.WINDOWS["month"], 50e6),), 32.0),
            g.Budget("gateway", "", (g.Limit("usd", g.WINDOWS["month"], 5000.0),), math.inf),
        ),
    )
    assert alice.models == ("claude-*", "gpt-6-sol")
    assert alice.expires_at == dt.datetime(2027, 2, 1, tzinfo=dt.UTC).timestamp()
    assert [str(network) for network in alice.networks] == ["10.0.0.0/8", "2001:db8::1/128"]
    assert not alice.enabled


def test_keys_without_limits_have_the_defaults_and_empty_limits_are_none():
    """
    `limits: {}` is said on purpose.
    """
    config = load(f"""{DEMO}
defaults: {{limits: {{concurrent: 16}}}}
keys: [{{name: a, key: {HASH}}}, {{name: b, key: {HASH2}, limits: {{usd: 5}}}}, {{name: c, key: {HASH3}, limits: {{}}}}]
""")

    assert [key.budgets[0] for key in config.keys] == [
        g.Budget("key", "a", (), 16.0),
        g.Budget("key", "b", (g.Limit("usd", g.WINDOWS[""], 5.0),), math.inf),
        g.Budget("key", "c", (), math.inf),
    ]


@pytest.mark.parametrize(
    "written",
    [KEY, f'"{KEY}"', f"'{KEY}'", g.seal_key(KEY), f"sha256:{g.seal_key(KEY)[7:71]}", "${ALICE}", '"${ALICE}"'],
)
def test_a_key_is_the_same_plain_sealed_or_from_the_environment(written):
    """
    However it stands in the file, its holder's requests are known.
    """
    config = load(f"{DEMO}keys:\n  - name: alice\n    key: {written}\n", ALICE=KEY)

    assert config.keys.find([KEY]).name == "alice"


def test_a_hash_in_capital_letters_is_a_hash():
    """
    Some tools print hex so.
    """
    config = load(f"{DEMO}keys: [{{name: alice, key: 'sha256:{'AB' * 32}'}}]")

    assert keys_of(config)["alice"].digest == bytes.fromhex("ab" * 32)


def test_upstream_keys_are_opened_and_what_is_in_clear_text_is_warned_about(tmp_path):
    """
    A warning names the place and not the secret; sealed values and the environment's are fine.
    """
    secret = g.Vault.new_secret()
    sealed = g.Vault([secret], "").seal("sk-ant-sealed")
    text = f"""
upstreams:
  - {{name: a, url: https://a.test, api_key: sk-ant-plain}}
  - {{name: b, url: https://b.test, api_key: {sealed}}}
  - {{name: c, url: https://c.test, api_key: "${{C_KEY}}"}}
  - {{name: d, url: https://d.test}}
keys:
  - {{name: alice, key: {KEY}}}
  - {{name: bob, key: {HASH}}}
"""

    config = load(text, tmp_path / "config.yaml", GATEWAY_SECRET=secret, C_KEY="sk-ant-environment")

    assert [upstream.api_key for upstream in config.upstreams] == [
        ("sk-ant-plain",),
        ("sk-ant-sealed",),
        ("sk-ant-environment",),
        (),
    ]
    assert config.warnings == [
        "line 3: upstreams[0].api_key: is in clear text: run `gateway.py seal`",
        f"line 6: upstreams[3].api_key: {NO_API_KEY}",
        "line 8: keys[0].key: is in clear text: run `gateway.py seal`",
    ]


def test_models_may_be_a_list_or_a_mapping_that_renames():
    """
    The first glob that matches counts; what no glob matches is not served.
    """
    config = load("""
upstreams:
  - {name: a, format: demo, models: ["claude-*", gpt-6-sol]}
  - {name: b, format: demo, models: {"claude-opus-*": big, "claude-*": "*", "*": small}}
""")

    asked = ["claude-opus-5-5", "claude-haiku-5-5", "gpt-6-sol", "gpt-6-luna"]
    assert [config.upstreams[0].rename(model) for model in asked] == [*asked[:3], None]
    assert [config.upstreams[1].rename(model) for model in asked] == ["big", "claude-haiku-5-5", "small", "small"]


def test_relative_paths_are_seen_from_the_config_file(tmp_path):
    """
    Wherever the command is run.
    """
    (tmp_path / "ca.pem").touch()
    text = "upstreams: [{name: a, url: https://a.test, ca_file: ca.pem}]\nusage: {directory: ledger}\n"

    config = load(text, tmp_path / "config.yaml")

    assert config.upstreams[0].ca_file == str(tmp_path / "ca.pem")
    assert config.usage_directory == tmp_path / "ledger"
    assert load(text.replace("ledger", "/var/ledger"), tmp_path / "config.yaml").usage_directory == Path("/var/ledger")


def test_the_digest_tells_two_texts_apart():
    """
    Whoever looks at /health sees which version is live.
    """
    assert re.fullmatch("[0-9a-f]{12}", load(DEMO).digest)
    assert load(DEMO).digest != load(DEMO + "# a comment\n").digest


# Units, limits, dates, prices


@pytest.mark.parametrize(
    ("written", "amount"),
    [
        ("20", 20),
        ("0.5", 0.5),
        ("1_000", 1000),
        ("1k", 1000),
        ("1K", 1000),
        ("50M", 50_000_000),
        ("50 M", 50_000_000),
        ("1.5B", 1_500_000_000),
        ("20万", 200_000),
        ("1.5万", 15_000),
        ("2亿", 200_000_000),
        ('"20"', 20),
        ("${N}", 7),
    ],
)
def test_counts_have_units_of_thousands_and_of_ten_thousands(written, amount):
    """
    `50M` and `20万` are how people say it.
    """
    config = load(f"{DEMO}defaults:\n  limits:\n    tokens/month: {written}\n", N="7")

    assert config.file.defaults.limits == (g.Limit("tokens", g.WINDOWS["month"], amount),)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("server.max_body", {"1000": 1000, "1000B": 1000, "64KB": 65_536, "1.5 MB": 1_572_864, "1GB": 2**30}),
        ("server.drain", {"500ms": 0.5, "10s": 10, "1.5m": 90, "6m": 360, "5h": 18_000, "2 d": 172_800}),
        ("usage.fsync", {"always": 0, "never": math.inf, "1s": 1, "500ms": 0.5}),
    ],
)
def test_sizes_are_in_powers_of_1024_and_times_need_their_unit(setting, values):
    """
    The Anthropic API takes bodies of 32 MB, meant so; a bare number would be seconds to one and minutes to another.
    """
    section, name = setting.split(".")

    for written, value in values.items():
        config = load(f"{DEMO}{section}: {{{name}: {written}}}")
        assert getattr(getattr(config.file, section), name) == value


@pytest.mark.parametrize("unit", g.LIMIT_UNITS)
@pytest.mark.parametrize("window", list(g.WINDOWS))
def test_a_limit_is_a_unit_alone_or_with_a_window(unit, window):
    """
    `usd` is for ever, `usd/day` turns over.
    """
    name = f"{unit}/{window}" if window else unit

    assert g.LimitSet.parse({name: "20"}) == (g.Limit(unit, g.WINDOWS[window], 20.0),)


def test_limits_keep_their_order_and_zero_is_a_limit():
    """
    Nothing is sorted, merged or dropped.
    """
    assert g.LimitSet.parse({"concurrent": 4, "usd/5h": 0, "usd": "1k"}) == (
        g.Limit("concurrent", g.WINDOWS[""], 4.0),
        g.Limit("usd", g.WINDOWS["5h"], 0.0),
        g.Limit("usd", g.WINDOWS[""], 1000.0),
    )


@pytest.mark.parametrize(
    ("written", "zone", "ends"),
    [
        ("2027-01-31", "UTC", "2027-02-01T00:00:00+00:00"),
        ("2027-01-31", "Asia/Shanghai", "2027-02-01T00:00:00+08:00"),
        ("2027-03-27", "Europe/Berlin", "2027-03-28T00:00:00+01:00"),
        ("2027-03-28", "Europe/Berlin", "2027-03-29T00:00:00+02:00"),  # a day of 23 hours
        ("2028-02-29", "UTC", "2028-03-01T00:00:00+00:00"),
        ("2027-01-31T12:00:00", "Asia/Shanghai", "2027-01-31T12:00:00+08:00"),
        ("2027-01-31T12:00:00Z", "Asia/Shanghai", "2027-01-31T12:00:00+00:00"),
        ("2027-01-31T12:00:00+02:00", "UTC", "2027-01-31T10:00:00+00:00"),
        ("2027-01-31 12:00:00.5 +02:00", "UTC", "2027-01-31T10:00:00.500000+00:00"),
        ('"2027-01-31"', "Asia/Shanghai", "2027-02-01T00:00:00+08:00"),
        ("2027-01-31 12:00+00:00", "UTC", "2027-01-31T12:00:00+00:00"),
        ("${ENDS}", "Asia/Shanghai", "2027-02-01T00:00:00+08:00"),
    ],
)
def test_a_date_is_a_whole_day_in_the_servers_time_zone(written, zone, ends):
    """
    `expires: 2027-01-31` works to the end of that day where the gateway's people live; a time is exact.
    """
    text = f"{DEMO}server: {{timezone: {zone}}}\nkeys:\n  - name: alice\n    key: {HASH}\n    expires: {written}\n"

    alice = keys_of(load(text, ENDS="2027-01-31"))["alice"]

    assert alice.expires_at == dt.datetime.fromisoformat(ends).timestamp()


@pytest.mark.parametrize("written", ["", "~", "9999-12-31"])
def test_a_key_without_an_end_works_for_ever(written):
    """
    No date, and the last one there is.
    """
    config = load(f"{DEMO}keys: [{{name: alice, key: {HASH}, expires: {written}}}]")

    assert keys_of(config)["alice"].expires_at == math.inf


def test_a_time_zone_is_one_of_the_tz_databases():
    """
    Reports turn over where the team lives.
    """
    assert load(f"{DEMO}server: {{timezone: Asia/Shanghai}}").timezone == zoneinfo.ZoneInfo("Asia/Shanghai")


def test_cache_prices_follow_from_the_input_price():
    """
    By the factors that Anthropic publishes: writes 1.25 and 2, reads 0.1; given ones stay.
    """
    config = load(DEMO + 'prices: {"claude-*": {input: 3, output: 15, cache_read: 0.25}, "*": {input: 0, output: 0}}')

    assert config.price("claude-x").base == g.Price(3.0, 15.0, 3.75, 6.0, 0.25)
    assert config.price("gpt-x").base == g.Price(0.0, 0.0, 0.0, 0.0, 0.0)


def test_the_first_price_that_matches_counts():
    """
    The order is the file's, not the length of the glob.
    """
    config = load(f"""{DEMO}
prices:
  "claude-*": {{input: 1, output: 1}}
  "claude-opus-*": {{input: 2, output: 2}}
  "*": {{input: 3, output: 3}}
""")

    assert [config.price(model).base.input for model in ("claude-opus-5-5", "claude-", "Claude-x")] == [1, 1, 3]


def test_a_call_costs_what_its_tokens_cost():
    """
    Each kind of token at its own price, per million, to a billionth of a dollar.
    """
    price = g.Price(5, 25, 6.25, 10, 0.5)
    usage = g.Usage(
        input_tokens=1_000_001,
        output_tokens=20_000,
        cache_write_5m_tokens=300_000,
        cache_write_1h_tokens=40_000,
        cache_read_tokens=5_000_000,
    )

    assert price.cost_usd(usage) == 5.000005 + 0.5 + 1.875 + 0.4 + 2.5


TIERED = """
prices:
  "*":
    input: 3
    output: 15
    tiers:
      - {above: 1M, input: 12, output: 45, cache_read: 1}
      - {above: 200k, input: 6, output: 22.5}
"""
BASE, LARGE, HUGE = g.Price(3, 15, 3.75, 6, 0.3), g.Price(6, 22.5, 7.5, 12, 0.6), g.Price(12, 45, 15, 24, 1)


def test_tiers_are_sorted_whatever_their_order_in_the_file():
    """
    Nobody pays the wrong price for writing the dearer tier first.
    """
    first, second = re.findall(r"      - .*\n", TIERED)
    turned = TIERED.replace(first + second, second + first)

    assert load(DEMO + TIERED).price("claude-x") == load(DEMO + turned).price("claude-x")
    assert load(DEMO + TIERED).price("claude-x").tiers == ((200_000, LARGE), (1_000_000, HUGE))


@pytest.mark.parametrize(
    ("input_tokens", "price"),
    [(0, BASE), (200_000, BASE), (200_001, LARGE), (1_000_000, LARGE), (1_000_001, HUGE), (10**9, HUGE)],
)
def test_a_tier_holds_above_its_threshold_and_not_at_it(input_tokens, price):
    """
    As the providers write it: more than 200k tokens of input.
    """
    assert load(DEMO + TIERED).price("claude-x").at(input_tokens) == price


# Teams, and the limits of the gateway


def test_a_team_without_limits_is_one_for_the_reports():
    """
    Its keys have its name, and nothing stands in their way.
    """
    config = load(f"{KEYS}  - {{name: a, key: {HASH}, team: sales}}\nteams: [{{name: sales}}, {{name: nobodys}}]\n")

    a = keys_of(config)["a"]
    assert (a.team, a.budgets[1]) == ("sales", g.Budget("team", "sales", (), math.inf))


def test_keys_of_a_team_share_its_budget_and_all_share_the_gateways():
    """
    What is shared is the same in each of them; a key may be named like a team.
    """
    config = load(f"""{DEMO}
teams: [{{name: sales, limits: {{usd/month: 5}}}}]
keys: [{{name: sales, key: {HASH}, team: sales}}, {{name: b, key: {HASH2}, team: sales}}, {{name: c, key: {HASH3}}}]
limits: {{gateway: {{requests/minute: 600, concurrent: 100}}}}
""")

    team = g.Budget("team", "sales", (g.Limit("usd", g.WINDOWS["month"], 5.0),), math.inf)
    gateway = g.Budget("gateway", "", (g.Limit("requests", g.WINDOWS["minute"], 600.0),), 100.0)
    assert {name: key.budgets for name, key in keys_of(config).items()} == {
        "sales": (g.Budget("key", "sales", (), math.inf), team, gateway),
        "b": (g.Budget("key", "b", (), math.inf), team, gateway),
        "c": (g.Budget("key", "c", (), math.inf), gateway),
    }


def test_how_limits_work_can_be_set():
    """
    Units as everywhere; what is not given keeps its default.
    """
    config = load(DEMO + "limits: {reserve_output: 8k, queue: 500ms, weights: {output: 5, cache_read: 0}}\n")

    assert config.limits == g.LimitsConfig((), 8000, 0.5, g.Weights(1.0, 5.0, 1.0, 0.0))


def test_whom_to_ask_is_said_in_a_sentence():
    """
    It ends what a limit says when it refuses.
    """
    assert load(DEMO + 'server: {contact: "Ann (ann@example.org)"}').contact == " Ask Ann (ann@example.org)."


# The environment


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("${HOST}", "a.test"),
        ("${HOST:-b.test}", "a.test"),
        ("${NONE:-b.test}", "b.test"),
        ("${EMPTY:-b.test}", "b.test"),
        ("${HOST}.${NONE:-x}.${HOST}", "a.test.x.a.test"),
        ('"${NONE:-1}"', "1"),
        ("'${HOST}'", "a.test"),
        ("${NONE:-a-b:c}", "a-b:c"),
        ("${NESTED}", "${HOST}"),
        ("$HOST", "$HOST"),
    ],
)
def test_names_in_braces_come_from_the_environment(written, host):
    """
    An empty variable counts as none, as in the shell's `:-`; what it holds is not looked at again.
    """
    config = load(f"{DEMO}server:\n  host: {written}\n", HOST="a.test", EMPTY="", NESTED="${HOST}")

    assert config.server.host == host


def test_what_the_environment_gives_has_the_type_it_looks_like():
    """
    A port is a number, a switch is a boolean, a date is a date; in quotes all is text.
    """
    text = f"""{DEMO}
server:
  port: ${{PORT:-8000}}
  drain: ${{DRAIN:-10m}}
keys:
  - name: "${{NAME}}"
    key: {HASH}
    enabled: ${{ENABLED}}
"""

    config = load(text, PORT="9000", NAME="12", ENABLED="no")

    assert (config.server.port, config.server.drain) == (9000, 600.0)
    assert not keys_of(config)["12"].enabled


# What YAML means


def plain(text: str) -> dict[str, Any]:
    """A document's values, in an empty environment."""
    return g.Document(text, Path("config.yaml")).plain({})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a: &x {b: [1, 2]}\nc: *x\n", {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}),
        ("a: &x 5\nb: [*x, *x]\n", {"a": 5, "b": [5, 5]}),
        ("a: &x {b: &y [1]}\nc: [*y, *x]\n", {"a": {"b": [1]}, "c": [[1], {"b": [1]}]}),
        ("&x\na: 1\n", {"a": 1}),
        (
            "a:\n  - b: 1\n    c: {d: [x, {e: y}], f: }\n  - [g]\n",
            {"a": [{"b": 1, "c": {"d": ["x", {"e": "y"}], "f": None}}, ["g"]]},
        ),
        ("a: '1'\nb: \"2027-01-31\"\nc: 'yes'\nd: |\n  3\n", {"a": "1", "b": "2027-01-31", "c": "yes", "d": "3\n"}),
        ("a: 1\nb: 2027-01-31\nc: yes\nd: 0x10\n", {"a": 1, "b": dt.date(2027, 1, 31), "c": True, "d": 16}),
        ("a: '1'\nb: 1\nc: !!str 1\nd: !!int '1'\ne: ! 1\n", {"a": "1", "b": 1, "c": "1", "d": 1, "e": 1}),
        ("1: a\nyes: b\n", {"1": "a", "yes": "b"}),
        ("--- {a: 1}\n...\n", {"a": 1}),
    ],
)
def test_a_document_is_read_as_yaml_says(text, values):
    """
    Anchors, block and flow, quotes and tags; only names are always text.
    """
    assert plain(text) == values


def test_an_alias_is_a_copy_that_nobody_shares():
    """
    Who changes one place changes no other.
    """
    values = plain("a: &x {b: 1}\nc: *x\n")

    values["a"]["b"] = 2

    assert values["c"] == {"b": 1}


DOLLAR = "$NAME is taken as it stands: only ${NAME}, in braces, comes from the environment"
NO_MODEL = 'no model is served: name some, or "*"'
UPSTREAM = "upstreams:\n- name: a\n  "
HTTPS = f"{UPSTREAM}url: https://a.test\n  "
WARNINGS = {  # a text, and of what it warns; the environment has K and GATEWAY_PORT
    "no API key": (f"{HTTPS}weight: 1\n", f"line 2: upstreams[0].api_key: {NO_API_KEY}"),
    "an empty one": (
        f"{HTTPS}api_key: '${{N:-}}'\n",
        f"line 4: upstreams[0].api_key: {NO_API_KEY}",
    ),
    "another header": (
        f"{HTTPS}headers: {{set: {{x-team: red}}}}\n",
        f"line 2: upstreams[0].api_key: {NO_API_KEY}",
    ),
    "a header with a key": (f"{HTTPS}headers: {{set: {{Authorization: '${{K}}'}}}}\n", ""),
    "a key of the environment": (f"{HTTPS}api_key: ${{K}}\n", ""),
    "and an alias of it": (
        f"{HTTPS}api_key: &k ${{K}}\n  headers: {{set: {{x-key: *k}}}}\n",
        "",
    ),
    "its value in clear text": (
        f"{HTTPS}api_key: {KEY}\n",
        "line 4: upstreams[0].api_key: is in clear text: run `gateway.py seal`",
    ),
    "a server in the house": (f"{UPSTREAM}url: http://vllm:8000\n", ""),
    "a name without braces, which is no secret": (
        f"{HTTPS}api_key: $ANTHROPIC_API_KEY\n",
        f"line 4: upstreams[0].api_key: {DOLLAR}",
    ),
    "another": (f"{DEMO}usage: {{directory: $LEDGER}}\n", f"line 2: usage.directory: {DOLLAR}"),
    "one in a path": (f"{DEMO}usage:\n  directory: /srv/$LEDGER_FOLDER/a\n", f"line 3: usage.directory: {DOLLAR}"),
    "no name": (f"{DEMO}usage: {{directory: us$age$5}}\n", ""),
    "a name that the environment gives": (f"{DEMO}usage: {{directory: '${{K}}'}}\n", ""),
    "no model": (f"{UPSTREAM}format: demo\n  models: []\n", f"line 4: upstreams[0].models: {NO_MODEL}"),
    "none in a mapping": (f"{UPSTREAM}format: demo\n  models: {{}}\n", f"line 4: upstreams[0].models: {NO_MODEL}"),
    "a port that the image's health check does not know": (
        f"{DEMO}server: {{port: 9000}}\n",
        "server.port is 9000, but GATEWAY_PORT, which the image's health check asks, 8000",
    ),
    "one that it knows": (f"{DEMO}server:\n  port: ${{GATEWAY_PORT}}\n", ""),
    "memory without room for a body": (
        f"{DEMO}server: {{max_body: 1MB, memory: 1023KB}}\n",
        "server.memory (default: a quarter of the host's) is 1,047,552 bytes, and a body of server.max_body, "
        "1,048,576, has no room in it: raise the one or lower the other",
    ),
    "memory for one": (f"{DEMO}server: {{max_body: 1MB, memory: 1MB}}\n", ""),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_can_hardly_work_is_warned_of(name):
    """
    A config may be good and not what was meant; no warning shows a secret.
    """
    text, warning = WARNINGS[name]

    assert load(text, K=KEY, GATEWAY_PORT="8000").warnings == ([warning] if warning else [])


def test_a_config_with_secrets_in_clear_text_that_everybody_can_read_is_warned_about(tmp_path):
    """
    A sealed one has nothing in it to hide.
    """
    path, told = tmp_path / "config.yaml", []
    for key, mode in ((KEY, 0o644), (KEY, 0o640), (HASH, 0o644)):
        path.write_text(f"{DEMO}keys: [{{name: alice, key: {key}}}]\n")
        path.chmod(mode)
        told.append([w for w in g.Config.load(path, environ={}).warnings if "chmod" in w])

    assert told == [
        [f"{path} can be read by every user of this host, and so is what is in clear text in it: chmod 640 {path}"],
        [],
        [],
    ]


YAML_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="$"), max_size=12)
YAML_NAMES = YAML_TEXT.filter(lambda name: name != "<<")
YAML_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | YAML_TEXT | st.dates() | st.datetimes()
)
YAML_VALUES = st.recursive(
    YAML_SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(YAML_NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(YAML_NAMES, YAML_VALUES, max_size=5), st.sampled_from([True, False, None]))
def test_every_document_is_read_as_pyyaml_reads_it(values, flow):
    """
    Names are always text, and there are no merges; else it means what it means elsewhere.
    """
    text = yaml.safe_dump(values, default_flow_style=flow, allow_unicode=True)

    assert plain(text) == yaml.safe_load(text)


# Every error names file, line, path and what would be right


def mistakes() -> list[tuple[str, str, list[str]]]:
    """Name, text and messages of the cases in mistakes.txt."""
    cases = []
    for case in Path(__file__).with_name("mistakes.txt").read_text().split("\n=== ")[1:]:
        name, *lines = case.splitlines()
        text = "".join(f"{line}\n" for line in lines if not line.startswith(">>> "))
        text = re.sub("HASH([123])", lambda found: f"sha256:{found[1] * 64}:last", text)
        has_upstreams = not text or "upstreams" in text or name in ("comments alone", "no upstreams")
        cases.append((name, text if has_upstreams else DEMO + text, [line[4:] for line in lines if line[:4] == ">>> "]))
    return cases


@pytest.mark.parametrize(("name", "text", "messages"), mistakes(), ids=[name for name, _, _ in mistakes()])
def test_every_mistake_is_told_with_file_line_path_and_what_would_be_right(name, text, messages):
    """
    Who reads it in a log knows where to look and what to write; who mends a file need not start again after each.
    """
    with pytest.raises(g.ConfigError) as caught:
        load(text)

    lines = str(caught.value).split("\n")
    assert [line.removeprefix("config.yaml:") for line in lines] == messages


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (DEMO + "server:\n" + "".join(f"  x{i}: 1\n" for i in range(20_000)), "server.x9: unknown setting"),
        (KEYS + "".join(f"  - {{name: a{i}, key: short}}\n" for i in range(5000)), "keys[9].key: too short"),
        (KEYS + "".join(f"  - {{name: a{i}, key: {HASH}}}\n" for i in range(5000)), "keys[10].key: the same key"),
        (
            DEMO + "prices:\n" + "".join(f"  m{i}: {{x: 1, y: 2}}\n" for i in range(5000)),
            "prices.m4.y: unknown setting",
        ),
        (
            DEMO
            + "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in ("ab", "bc", "cd", "de", "ef", "fg")),
            "more than 200,000 values, with those that aliases repeat",
        ),
    ],
    ids=["settings", "types", "meanings", "prices", "aliases"],
)
def test_a_file_full_of_mistakes_is_refused_at_once_and_the_first_ten_are_told(text, problem):
    """
    The gateway serves on meanwhile: it cannot spend seconds on a page that nobody reads.
    """
    began = time.process_time()

    with pytest.raises(g.ConfigError) as caught:
        load(text)

    *told, last = str(caught.value).split("\n")
    assert (len(told), last) == (10, "and more") or "aliases" in problem
    assert problem in str(caught.value)
    assert time.process_time() - began < 2


FOLLOW_UPS = {
    "a misspelt required setting is not missing": KEYS + f"  - {{name: a, kee: {HASH}}}\n",
    "a team whose name is wrong is not missing": KEYS + f"  - {{name: a, key: {HASH}, team: t}}\nteams: [{{nme: t}}]\n",
    "teams that are wrong are not missing": KEYS + f"  - {{name: a, key: {HASH}, team: t}}\nteams: {{name: t}}\n",
    "two names that are numbers are not the same": DEMO + "teams:\n  - {name: 1}\n",
    "an upstream that is text has no url": "upstreams: [a]\n",
    "upstreams that are text are not too few": "upstreams: a\n",
    "a format that is wrong asks for no url": "upstreams: [{name: a, format: dmeo}]\n",
    "a cooldown that is wrong is not above its bound": DEMO + "routing: {breaker: {cooldown: x, max_cooldown: 5s}}\n",
    'a row that is wrong may be "*"': DEMO + 'prices: {"*": 3}\n',
    "a secret that the environment lacks is not empty": KEYS + "  - {name: a, key: '${K}'}\n",
    "a memory that is wrong is not too small": DEMO + "server: {memory: x}\n",
}


@pytest.mark.parametrize("name", FOLLOW_UPS)
def test_what_follows_from_a_mistake_is_not_told(name):
    """
    One mistake is one line.
    """
    with pytest.raises(g.ConfigError) as caught:
        load(FOLLOW_UPS[name])

    assert "\n" not in str(caught.value)


SERVER = DEMO + "server:\n"


INDENT, COLON, BRACKET, STAR = (
    "its indent fits none",
    "text with a colon",
    "a bracket is not closed",
    "text that begins with *",
)
NOT_YAML = {  # the text, the cause, line and column
    "a tab": (SERVER + "\tport: 1\n", "a tab in the indent", 3, 1),
    "a tab behind blanks": (SERVER + "  \tport: 1\n", "a tab in the indent", 3, 3),
    "a tab in a later line": (SERVER + "  port: 1\n\thost: x\n", "a tab in the indent", 4, 1),
    "too deep": (SERVER + "  port: 1\n   host: x\n", COLON, 4, 8),
    "not deep enough": (SERVER + "    port: 1\n  host: x\n", INDENT, 4, 3),
    "an item's setting": (DEMO + "keys:\n  - name: a\n   team: x\n", INDENT, 4, 4),
    "no colon, a section": (DEMO + "server\n  port: 1\n", "a colon is missing", 2, 1),
    "no colon, the first": (SERVER + "  port 1\n  host: x\n", COLON, 4, 7),
    "no colon, the last": (SERVER + "  host: x\n  port 1\n", "a colon is missing", 4, 3),
    "no blank, in a list": (DEMO + "keys:\n  - name:a\n    team: b\n", COLON, 4, 9),
    "no blank, a secret": (DEMO + "keys:\n  - name: a\n    key:hunter2\n", "a colon is missing", 4, 5),
    "a double quote": (SERVER + '  host: "abc\n  port: 1\n', "a quote is not closed", 3, 9),
    "a quote that the next closes": (SERVER + '  host: "a\n  contact: "x"\n', INDENT, 4, 13),
    "a quote in quotes": (SERVER + "  contact: 'Ann's'\n", INDENT, 3, 17),
    "a brace": (DEMO + "server: {port: 1\nkeys: []\n", BRACKET, 2, 9),
    "a bracket": ("upstreams: [{name: a}\nserver:\n  port: 1\n", BRACKET, 1, 12),
    "a comma": (DEMO + "server: {port: 1 host: x}\n", BRACKET, 2, 22),
    "a brace too many": (SERVER + "  port: {}}\n", INDENT, 3, 11),
    "a star as a name": (DEMO + "prices:\n  *: {}\n", STAR, 3, 4),
    "a glob": (DEMO + "keys:\n- models: [*-opus]\n", STAR, 3, 12),
    "an alias of nothing": (DEMO + "keys:\n- models: [*opus]\n", STAR, 3, 12),
    "a percent sign": (SERVER + "  contact: %ann\n", "text that begins with @, ` or %", 3, 12),
    "a bar": (SERVER + "  contact: |ann\n", "while scanning a block scalar did not find expected comment", 3, 13),
    "a dash": (SERVER + "  contact: - a\n", "block sequence entries are not allowed in this context", 3, 12),
    "a backslash": (SERVER + '  contact: "C:\\dir"\n', "while parsing a quoted scalar found unknown escape", 3, 15),
    "a control character": (SERVER + "  # é\n  host: a\x07b\n", "control characters are not allowed", 4, 1),
    "a second document": (DEMO + "---\n" + DEMO, "expected a single document", 2, 1),
    "an anchor twice": (DEMO + "server: &a {}\nusage: &a {}\n", "found duplicate anchor 'a'", 3, 8),
}


@pytest.mark.parametrize("name", NOT_YAML)
def test_what_is_no_yaml_is_told_with_its_line_and_the_likely_cause(name):
    """
    For what is common, in place of the parser's own words, which help nobody who has forgotten a quote.
    """
    text, told, line, column = NOT_YAML[name]

    with pytest.raises(g.ConfigError) as caught:
        load(text)

    assert str(caught.value).startswith(f"config.yaml:{line}: not YAML: {told}")
    first, *quoted, caret = str(caught.value).split("\n")
    assert first.endswith(f" (column {column})") and 1 <= len(quoted) <= 2
    assert caret == " " * (3 + column) + "^"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (
            "contact: “Ann: 5”",
            "U+201C (left double quotation mark) means nothing to YAML: put the ASCII character in its place",
        ),
        (
            "contact: Ann：\u00a0a: 5",
            "U+FF1A (fullwidth colon) means nothing to YAML: put the ASCII character in its place",
        ),
        ("contact: Ann：a: 5", "U+FF1A (fullwidth colon) means nothing to YAML: put the ASCII character in its place"),
    ],
)
def test_a_character_that_looks_like_one_of_yamls_is_named(line, hint):
    """
    Word processors and input methods write them, and nobody sees the difference.
    """
    with pytest.raises(g.ConfigError, match=re.escape(f"; {hint} (column ")):
        load(f"{SERVER}  {line}\n")


SECRET = "sk-ant-api03-Zm9vYmFyYmF6cXV4-0123456789"
LETTERS = "correcthorsebattery"
LEAKS = {
    "no blank behind the colon": f"upstreams:\n  - {{name: a, url: https://a.test, api_key:{SECRET}}}\n",
    "no blank, in a line of its own": f"upstreams:\n  - name: a\n    url: https://a.test\n    api_key:{SECRET}\n",
    "a name that is a key": DEMO + f"server: {{{SECRET}: 1}}\n",
    "a key for a number": DEMO + f"server: {{port: {SECRET}}}\n",
    "a key for a date": KEYS + f"  - {{name: a, key: {HASH}, expires: {SECRET}}}\n",
    "a key for a limit": KEYS + f"  - {{name: a, key: {HASH}, limits: {{usd/day: {SECRET}}}}}\n",
    "a key for a limit's name": KEYS + f"  - {{name: a, key: {HASH}, limits: {{{SECRET}: 1}}}}\n",
    "a key for a time zone": DEMO + f"server: {{timezone: {SECRET}}}\n",
    "a key for a team": KEYS + f"  - {{name: a, key: {HASH}, team: {SECRET}}}\n",
    "a key for a price": DEMO + f"prices: {{a: {{input: {SECRET}}}}}\n",
    "a key for a policy": DEMO + f"routing: {{policy: {SECRET}}}\n",
    "a key for an alias": DEMO + f"server: {{host: *{SECRET}}}\n",
    "a key for a tag": DEMO + f"server: {{host: !{SECRET} a}}\n",
    "a key for an anchor": DEMO + f"server: {{host: &{SECRET} a, contact: &{SECRET} b}}\n",
    "a key as a url": f"upstreams:\n  - {{name: a, url: {SECRET}}}\n",
    "a key that is no key": f"upstreams:\n  - {{name: a, url: https://a.test, api_key: '{SECRET} '}}\n",
    "a key in a line that is no YAML": f"upstreams:\n  - name: a\n    api_key: {SECRET}: x\n",
    "a key without a colon": f"upstreams:\n  - name: a\n    api_key {SECRET}\n    url: x\n",
    "a key in a quote that is not closed": f"upstreams:\n  - name: a\n    api_key: '{SECRET}\n",
    "a key in two halves": f"upstreams:\n  - name: a\n    api_key: {SECRET[:20]}\n{SECRET[20:]}\n",
    "a key in a list of them": f"upstreams:\n  - name: a\n    api_key:\n      - '{SECRET}' '{SECRET}'\n",
    "a key of letters alone, in a line of its own": f"upstreams:\n  - api_key:\n      {LETTERS}\n     x: y: z\n",
    "one in a list, with a colon": f"upstreams:\n  - api_key:\n      - {LETTERS}: x: y\n",
    "a key for a list": f"upstreams:\n  - api_key:{SECRET}\n",
    "a password without a blank": "upstreams:\n  - name: a\n    proxy:http://me:hunter2!@proxy.test\n    url: x\n",
    "a password in two lines": "upstreams:\n  - name: a\n    proxy: http://\nme:hunter2!@proxy.test\n    url: x\n",
    "a header's value": "upstreams:\n  - name: a\n    headers: {set: {x-auth-token: hunter2! x: y}\n",
    "a user's key twice": KEYS + f"  - {{name: a, key: {SECRET}}}\n  - {{name: b, key: {SECRET}}}\n",
    "a key from the environment for a number": DEMO + "server: {port: '${K}'}\n",
    "a key from the environment for a size": DEMO + "server: {max_body: '${K}'}\n",
    "a password from the environment": DEMO + "server: {timezone: '${P}'}\n",
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_message_shows_no_secret(tmp_path, name):
    """
    It goes into the log, onto terminals and into bug reports; whatever stands in the wrong place may be a key.
    """
    (tmp_path / "config.yaml").write_text(LEAKS[name])

    with pytest.raises(g.ConfigError) as raised:
        g.Config.load(tmp_path / "config.yaml", environ={"K": SECRET, "P": "hunter2!"})

    message = str(raised.value)
    assert not any(part in message for part in (SECRET, SECRET[:12], SECRET[-12:], "hunter2", LETTERS))
    assert message.startswith(f"{tmp_path}/config.yaml:")


WITH_SECRETS = """\
upstreams:
  - name: main
    url: https://api.test
    api_key: sk-ant-api03-Zm9vYmFyYmF6cXV4-0123456789aBcDeFgH
    proxy: http://me:Tr0ub4dor-und-3@proxy.test:3128
    headers: {set: {x-auth-token: Xq7-9fKe2LmZ0pQr8sTu}}
  - name: other
    url: https://other.test
    api_key:
      - 0f8c2e6a9b1d4c7f8e3a5b6c7d8e9f00
      - "sk-proj-h6DsE3wUt5RpK8cVb2NmL7zYx9Qa0Jf4"
keys:
  - {name: alice, key: sk-proxy-4fJ0aQ9xYz7LmN2bVc8KpR5tUw3EsD6h, limits: {usd/day: 20}}
"""
SLIPS = [
    "",
    *"\n\r\t :\"'{}[],#&*!|>%@`-?$x0\\~=<\u00a0\u3000“”‘：，\ufeff\x00\x07\x85é/",
    "\n  ",
    "${",
    "${X}",
    "---\n",
]


@settings(max_examples=400, deadline=None)
@given(at=st.integers(0, len(WITH_SECRETS)), slip=st.sampled_from(SLIPS))
def test_no_slip_of_the_finger_shows_a_secret(at, slip):
    """
    A character too many or too few anywhere: the config is read, or refused with a message that has no secret in it.
    """
    secrets = re.findall(r"sk-[\w-]{20,}|Tr0\S+?(?=@)|Xq7[\w-]+|0f8\w+", WITH_SECRETS)
    parts = {secret[i : i + 14] for secret in secrets for i in range(len(secret) - 13)}

    try:
        load(WITH_SECRETS[:at] + slip + WITH_SECRETS[at + (not slip) :])
    except g.ConfigError as error:
        assert not [part for part in parts if part in str(error)]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab: -\n\t[]{},\"'&*!|>%@#?~0123.$\u00a0\x00é"), max_size=60))
def test_whatever_a_file_holds_it_is_read_or_refused(text):
    """
    Nothing but a ConfigError comes of it.
    """
    for whole in (
        text,
        DEMO + text,
        DEMO + "server:\n  " + text,
        KEYS + f"- {{name: a, key: {HASH}, expires: {text}}}",
    ):
        with contextlib.suppress(g.ConfigError):
            load(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- " * 100_000, "1: not YAML: nested too deep"),
        ("[" * 100_000, "1: not YAML: nested too deep"),
        (DEMO + "server: " + "[" * 100_000, "2: not YAML: nested too deep"),
        (DEMO + "? " + "[" * 3000 + "]" * 3000 + "\n: 1\n", "2: not YAML: nested too deep"),
        (DEMO + "server: &a " + "[" * 3000 + "]" * 3000 + "\n", "2: not YAML: nested too deep"),
        (DEMO + "server: " + "a" * 100_000 + ": b: c", "2: not YAML: text with a colon"),
        (
            SERVER + "  port: " + "1" * 5000,
            "3: server.port: expected a whole number from 0 to 65535 such as 8000, got",
        ),
        (
            SERVER + "  port: 0x" + "f" * 5000,
            "3: server.port: expected a whole number from 0 to 65535 such as 8000, got",
        ),
        (SERVER + "  port: 1:" + "1:" * 5000 + "1", "3: server.port: expected a whole number from 0 to 65535"),
        *(
            (SERVER + f"  host: !!{tag}", "3: server.host: expected ")
            for tag in ("int x", "int ''", "float ''", "bool x", "timestamp x")
        ),
    ],
)
def test_what_would_overflow_or_break_the_parser_is_refused(text, message):
    """
    Nesting ends the process in libyaml's composer; a tag on the wrong text raises whatever PyYAML meets.
    """
    with pytest.raises(g.ConfigError) as caught:
        load(text)

    assert str(caught.value).startswith(f"config.yaml:{message}")


def test_a_long_name_is_cut_in_a_message(tmp_path):
    """
    A whole paragraph may be taken for a name.
    """
    (tmp_path / "config.yaml").write_text(DEMO + f"server: {{{'very long ' * 100}: 1}}\n")

    with pytest.raises(g.ConfigError, match=r":2: server\.(very long ){12}v: unknown setting"):
        g.Config.load(tmp_path / "config.yaml")


@pytest.mark.parametrize("place", ["upstreams[0].api_key", "keys[0].key"])
@pytest.mark.parametrize(
    "written",
    [
        r'"Bearer SECRET"',
        r"Bearer SECRET",
        r'"SECRET\r\n"',
        r'"SECRET\n"',
        r'" SECRET"',
        r"|" + "\n      SECRET",
        r"""'"SECRET"'""",
        r'''"'SECRET'"''',
        r"“SECRET”",
        r"${PASTED}",
        r"ключSECRET",
    ],
)
def test_a_badly_pasted_key_is_told_and_not_echoed(tmp_path, place, written):
    """
    The message goes to logs, to /health and to screens that others see.
    """
    secret = "sk-proxy-or-ant-0123456789"
    written = written.replace("SECRET", secret)
    text = {
        "upstreams[0].api_key": f"upstreams:\n  - name: a\n    url: https://a.test\n    api_key: {written}\n",
        "keys[0].key": f"{DEMO}keys:\n  - name: a\n    key: {written}\n",
    }[place]

    with pytest.raises(g.ConfigError) as caught:
        load(text, tmp_path / "config.yaml", PASTED=f'"{secret}"')

    assert str(caught.value) == f"{tmp_path}/config.yaml:4: {place}: {BADLY_PASTED}"


def test_each_of_several_api_keys_is_looked_at(tmp_path):
    """
    A list of keys is as good as one: opened, warned about and complained of by its place.
    """
    text = "upstreams:\n  - name: a\n    url: https://a.test\n    api_key: [sk-ant-one, '${TWO}', %s]\n"
    config = load(text % "sk-ant-three", tmp_path / "config.yaml", TWO="sk-ant-two")

    assert config.upstreams[0].api_key == ("sk-ant-one", "sk-ant-two", "sk-ant-three")
    assert config.warnings == [
        f"line 4: upstreams[0].api_key[{i}]: is in clear text: run `gateway.py seal`" for i in (0, 2)
    ]
    for bad, message in (("12", "expected text"), ("'sk ant'", "is empty, or has blanks"), ("{}", "expected text")):
        with pytest.raises(g.ConfigError, match=rf"4: upstreams\[0\]\.api_key\[2\]: {message}"):
            load(text % bad, tmp_path / "config.yaml", TWO="sk-ant-two")


@pytest.mark.parametrize(
    ("upstream", "routing", "message"),
    [
        ("api_key: [sk-one, sk-one]", "", "1: upstreams[0].api_key: the same key stands here twice"),
        (
            "verdicts: {mid_stream: {next: true}}",
            "",
            "1: upstreams[0].verdicts.mid_stream.next: bytes are out: nobody else can be asked",
        ),
        (
            "weight: 1",
            "breaker: {cooldown: 20m}",
            "2: routing.breaker.max_cooldown: expected at least the cooldown, which is the first of them",
        ),
        (
            "weight: 1",
            "policy: {x: random}",
            "2: routing.policy.x: expected sticky, round_robin or least_busy, got 'random'",
        ),
    ],
)
def test_what_cannot_be_meant_is_told(tmp_path, upstream, routing, message):
    """
    A value that would do nothing, or harm, is an error with its place.
    """
    text = f"upstreams: [{{name: a, url: 'https://a.test', {upstream}}}]\nrouting: {{{routing}}}\n"

    with pytest.raises(g.ConfigError) as caught:
        load(text, tmp_path / "config.yaml")

    assert str(caught.value) == f"{tmp_path}/config.yaml:{message}"


def make_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, ": no such file; `gateway.py init` makes one"),
        (make_link_to_nowhere, ": no such file; `gateway.py init` makes one"),
        (
            Path.mkdir,
            ": is a folder, not a file: mounting a file that is not there makes one; "
            "remove it, and mount the folder in which config.yaml lies",
        ),
        (lambda path: path.write_bytes(b"\n# \xe9t\xe9\n"), ":2: not UTF-8 (the byte 0xe9): save it as UTF-8"),
        (lambda path: path.write_text(DEMO, "utf-16"), ":1: not UTF-8 (the byte 0xff): save it as UTF-8"),
        (lambda path: path.symlink_to(path), ": cannot be read: Too many levels of symbolic links"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_in_one_sentence(tmp_path, make, message):
    """
    The first start, a mount gone wrong, an editor with another encoding.
    """
    path = tmp_path / "config.yaml"
    make(path)

    with pytest.raises(g.ConfigError) as caught:
        g.Config.load(path, environ={})

    assert str(caught.value) == f"{path}{message}"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    """
    Notepad writes both.
    """
    path = tmp_path / "config.yaml"
    path.write_bytes(
        b"\xef\xbb\xbf" + f"{DEMO}keys:\n  - name: alice\n    key: {HASH}\n".replace("\n", "\r\n").encode()
    )

    assert list(keys_of(g.Config.load(path, environ={}))) == ["alice"]


# The example


def uncommented() -> str:
    """config.example.yaml with the settings that stand in comments."""
    before, mark, prices = EXAMPLE.read_text().partition("# prices:\n")
    text = re.sub(r"^#(?= (- name:|(  |    )[a-z_]+:))", " ", before, flags=re.MULTILINE)
    return text + re.sub(r"^# ", "", mark + prices, flags=re.MULTILINE)


def test_the_example_starts_unedited():
    """
    Whoever copies it has a gateway that answers.
    """
    config = g.Config.load(EXAMPLE, environ={})

    assert [(upstream.name, upstream.format) for upstream in config.upstreams] == [("demo", "demo")]
    assert list(keys_of(config)) == ["alice"]


def test_the_example_names_every_setting():
    """
    A setting that is not in it is one that nobody finds.
    """
    plain = g.Document(uncommented(), EXAMPLE).plain({"ANTHROPIC_API_KEY": "sk-ant"})
    plain["upstreams"] = [plain["upstreams"][0] | plain["upstreams"][1]]
    price = next(row for row in plain.pop("prices").values() if isinstance(row, dict))
    tiers = [price | tier for tier in price["tiers"]]  # which take what a price takes, and so does sound

    assert missing_settings(g.ConfigFile, plain) == ["prices"]
    assert missing_settings(g.PriceConfig, price | {"tiers": tiers, "audio": price}) == []


def described(kind: type, at: str = "") -> Iterator[tuple[str, str]]:
    """Every setting below a struct with what is said of it."""
    for field in msgspec.structs.fields(kind):
        metas = getattr(field.type, "__metadata__", ())
        yield at + field.encode_name, next((meta.description for meta in metas if meta.description), "")
        inner = field.type.__origin__ if metas else field.type
        for below in (inner, *get_args(inner)):
            if (
                isinstance(below, type)
                and issubclass(below, msgspec.Struct)
                and below not in (g.Weights, g.VerdictConfig)
            ):
                yield from described(below, f"{at}{field.encode_name}.")


@pytest.mark.parametrize(("setting", "sentence"), described(g.ConfigFile))
def test_the_example_says_of_each_setting_what_is_said_at_its_field(setting, sentence):
    """
    It is written once for those who read the code and once for those who configure, in the same words.
    """
    comments = " ".join(re.sub(r"[#\s]+", " ", EXAMPLE.read_text()).split())

    assert sentence or setting in ("server", "keys", "limits", "routing", "usage")
    assert sentence in comments


def missing_settings(kind: type, plain: dict[str, Any], at: str = "") -> list[str]:
    """The settings of a struct, and of those below it, that a mapping does not have."""
    missing = []
    for field in msgspec.structs.fields(kind):
        if field.encode_name not in plain:
            missing.append(at + field.encode_name)
            continue
        inner = [
            a for a in (field.type, *get_args(field.type)) if isinstance(a, type) and issubclass(a, msgspec.Struct)
        ]
        value = plain[field.encode_name]
        for below in inner:
            missing += missing_settings(
                below, value[0] if isinstance(value, list) else value, f"{at}{field.encode_name}."
            )
    return missing


def test_the_example_shows_the_defaults():
    """
    Where a value in it is not the default, its comment says so; these say none.
    """
    config = g.Config.parse(uncommented(), EXAMPLE, g.Clock(), {"ANTHROPIC_API_KEY": "sk-ant"})

    real = config.upstreams[1]
    assert (config.server, config.file.usage, config.file.defaults) == (g.ServerConfig(), g.UsageConfig(), g.Defaults())
    assert (config.limits, config.contact) == (g.LimitsConfig(), "")
    assert (real.format, real.timeouts, real.on_disconnect) == ("anthropic", g.Timeouts(), "auto")
    assert (real.ca_file, real.proxy) == (None, None)
    names = [name for name in real.__struct_fields__ if name not in ("name", "url", "api_key", "models", "headers")]
    plain = g.UpstreamConfig("", max_concurrent=real.max_concurrent)
    assert {name: getattr(real, name) for name in names} == {name: getattr(plain, name) for name in names}
    assert config.routing == msgspec.structs.replace(g.RoutingConfig(), policy=config.routing.policy)


# Edits: the lines they must touch, and no other

NEW = {"name": "new", "key": HASH3}
APPENDED = {
    "a block list": (
        f"{DEMO}keys:\n  - name: alice\n    key: {HASH}\n",
        f"{DEMO}keys:\n  - name: alice\n    key: {HASH}\n  - name: new\n    key: {HASH3}\n",
    ),
    "a list that is not indented": (
        f"{DEMO}keys:\n- name: alice\n  key: {HASH}  # hers\n\n# the server\nserver: {{}}\n",
        f"{DEMO}keys:\n- name: alice\n  key: {HASH}  # hers\n"
        f"- name: new\n  key: {HASH3}\n\n# the server\nserver: {{}}\n",
    ),
    "no newline at the end": (
        f"{DEMO}keys:\n  - name: alice\n    key: {HASH}",
        f"{DEMO}keys:\n  - name: alice\n    key: {HASH}\n  - name: new\n    key: {HASH3}",
    ),
    "a dash on a line of its own": (
        f"{DEMO}keys:\n    -  # the boss - alice\n        name: alice\n        key: {HASH}\n",
        f"{DEMO}keys:\n    -  # the boss - alice\n        name: alice\n        key: {HASH}\n"
        f"    - name: new\n      key: {HASH3}\n",
    ),
    "items in braces": (
        f"{DEMO}keys:\n  - {{name: alice, key: {HASH}}}  # hers\n",
        f"{DEMO}keys:\n  - {{name: alice, key: {HASH}}}  # hers\n  - name: new\n    key: {HASH3}\n",
    ),
    "a list in brackets": (
        f"{DEMO}keys: [{{name: alice, key: {HASH}}}]  # all\n",
        f"{DEMO}keys: [{{name: alice, key: {HASH}}}, {{name: new, key: {HASH3}}}]  # all\n",
    ),
    "brackets on several lines": (
        f"{DEMO}keys: [\n  {{name: alice, key: {HASH}}},  # hers\n]\n",
        f"{DEMO}keys: [\n  {{name: alice, key: {HASH}}}, {{name: new, key: {HASH3}}},  # hers\n]\n",
    ),
    "a last value in a block": (
        f"{DEMO}keys:\n  - name: alice\n    key: |-\n      {HASH}\nserver: {{}}\n",
        f"{DEMO}keys:\n  - name: alice\n    key: |-\n      {HASH}\n  - name: new\n    key: {HASH3}\nserver: {{}}\n",
    ),
    "a last value that is an alias": (
        f"{DEMO}keys:\n  - name: alice\n    limits: &all {{usd: 5}}\n    key: {HASH}\n"
        f"  - name: bob\n    key: {HASH2}\n    limits: *all\n",
        f"{DEMO}keys:\n  - name: alice\n    limits: &all {{usd: 5}}\n    key: {HASH}\n"
        f"  - name: bob\n    key: {HASH2}\n    limits: *all\n  - name: new\n    key: {HASH3}\n",
    ),
    "empty": (f"{DEMO}keys:\nserver: {{}}\n", f"{DEMO}keys:\n  - name: new\n    key: {HASH3}\nserver: {{}}\n"),
    "empty with a comment": (
        f"{DEMO}keys:  # none yet\n  # - name: old\nserver: {{}}\n",
        f"{DEMO}keys:  # none yet\n  - name: new\n    key: {HASH3}\n  # - name: old\nserver: {{}}\n",
    ),
    "empty at the end": (f"{DEMO}keys:", f"{DEMO}keys:\n  - name: new\n    key: {HASH3}"),
    "empty brackets": (f"{DEMO}keys: []\n", f"{DEMO}keys:\n  - name: new\n    key: {HASH3}\n"),
    "empty brackets with a comment": (
        f"{DEMO}keys: []  # none yet\nserver: {{}}\n",
        f"{DEMO}keys:  # none yet\n  - name: new\n    key: {HASH3}\nserver: {{}}\n",
    ),
    "null": (f"{DEMO}keys: ~\n", f"{DEMO}keys:\n  - name: new\n    key: {HASH3}\n"),
    "missing": (f"{DEMO}# the end\n", f"{DEMO}# the end\n\nkeys:\n  - name: new\n    key: {HASH3}\n"),
    "windows line ends": (
        f"{DEMO}keys:\n  - name: alice\n    key: {HASH}\n".replace("\n", "\r\n"),
        f"{DEMO}keys:\n  - name: alice\n    key: {HASH}\n  - name: new\n    key: {HASH3}\n".replace("\n", "\r\n"),
    ),
}


def edit(path: Path, text: str, change: Callable[[g.ConfigEditor], None]) -> str:
    """What a file's text is after a change."""
    path.write_bytes(text.encode())
    with g.edited(path) as editor:
        change(editor)
        return editor.document.text


@pytest.mark.parametrize("name", APPENDED)
def test_a_key_is_appended_in_the_style_of_the_list(tmp_path, name):
    """
    As if its owner had written it: the same indentation, the comments where they were.
    """
    before, after = APPENDED[name]

    assert edit(tmp_path / "config.yaml", before, lambda editor: editor.append_key(NEW)) == after
    assert keys_of(load(after))["new"].digest == DIGEST3


ALICE = f"{DEMO}keys:\n  - name: alice\n    key: {HASH}\n"
SET = {
    "a new field after the last": (ALICE, f"{ALICE}    enabled: false\n"),
    "a new field before a comment and the next item": (
        f"{ALICE}    models: [a]  # hers\n\n    # bob\n  - name: bob\n    key: {HASH2}\n",
        f"{ALICE}    models: [a]  # hers\n    enabled: false\n\n    # bob\n  - name: bob\n    key: {HASH2}\n",
    ),
    "a new field after a nested one": (
        f"{ALICE}    limits:\n      usd/day: 5\n      # and\n      usd/month: 50  # both\n",
        f"{ALICE}    limits:\n      usd/day: 5\n      # and\n      usd/month: 50  # both\n    enabled: false\n",
    ),
    "a new field after a field without a value": (
        f"{ALICE}    expires:\n",
        f"{ALICE}    expires:\n    enabled: false\n",
    ),
    "a field that is there": (f"{ALICE}    enabled: yes  # for now\n", f"{ALICE}    enabled: false  # for now\n"),
    "a field in quotes": (
        f"{DEMO}keys:\n  - enabled: 'true'\n    name: alice\n    key: {HASH}\n",
        f"{DEMO}keys:\n  - enabled: false\n    name: alice\n    key: {HASH}\n",
    ),
    "a field that is empty": (f"{ALICE}    enabled:\n", f"{ALICE}    enabled: false\n"),
    "braces": (
        f"{DEMO}keys:\n  - {{name: alice, key: {HASH}}}  # hers\n",
        f"{DEMO}keys:\n  - {{enabled: false, name: alice, key: {HASH}}}  # hers\n",
    ),
    "braces with a comma at the end": (
        f"{DEMO}keys: [{{name: alice, key: {HASH},}}]\n",
        f"{DEMO}keys: [{{enabled: false, name: alice, key: {HASH},}}]\n",
    ),
    "braces on several lines": (
        f"{DEMO}keys:\n  - {{name: alice,  # a\n     key: {HASH}  # b\n    }}\n",
        f"{DEMO}keys:\n  - {{enabled: false, name: alice,  # a\n     key: {HASH}  # b\n    }}\n",
    ),
    "a key in a block scalar": (
        f"{DEMO}keys:\n  - name: alice\n    key: >-\n      {HASH}\n\nserver: {{}}\n",
        f"{DEMO}keys:\n  - name: alice\n    key: >-\n      {HASH}\n    enabled: false\n\nserver: {{}}\n",
    ),
    "no newline at the end": (ALICE.rstrip(), f"{ALICE}    enabled: false"),
    "windows line ends": (ALICE.replace("\n", "\r\n"), f"{ALICE}    enabled: false\n".replace("\n", "\r\n")),
}


@pytest.mark.parametrize("name", SET)
def test_a_field_is_set_where_it_is_or_after_the_last_or_first_in_braces(tmp_path, name):
    """
    A revoked key is one more line, or one word on a line.
    """
    before, after = SET[name]

    assert (
        edit(tmp_path / "config.yaml", before, lambda editor: editor.set_field(("keys", 0), "enabled", "false"))
        == after
    )
    assert not keys_of(load(after))["alice"].enabled


@pytest.mark.parametrize(
    "written",
    [HASH, f'"{HASH}"', f"'{HASH}'", f"|-\n      {HASH}", f">-\n      {HASH}", f"\n      {HASH}", f"!!str {HASH}"],
)
def test_a_scalar_is_replaced_however_it_is_written(tmp_path, written):
    """
    Quotes, tags and blocks go with it; what follows stays.
    """
    before = f"{DEMO}keys:\n  - name: alice\n    key: {written}\n    # hers\n    enabled: true\n"

    after = edit(tmp_path / "config.yaml", before, lambda editor: editor.set_scalar(HASH3, "keys", 0, "key"))

    assert after.endswith("\n    # hers\n    enabled: true\n")
    assert keys_of(load(after))["alice"].digest == DIGEST3


@pytest.mark.parametrize("written", ["block", "flow"])
def test_an_edit_changes_the_key_that_was_meant_even_where_aliases_are(tmp_path, written):
    """
    An alias has its anchor's place in the file: whoever writes there revokes somebody else's key.
    """
    text = {
        "block": f"{ALICE}    limits: &all {{usd/day: 5}}\n  - name: bob\n    key: {HASH2}\n    limits: *all  # too\n",
        "flow": f"{DEMO}keys: [{{name: alice, key: {HASH}, limits: &all {{usd: 5}}}},\n"
        f"  {{name: bob, key: {HASH2}, limits: *all}}]\n",
    }[written]

    after = edit(tmp_path / "config.yaml", text, lambda editor: editor.set_field(("keys", 1), "enabled", "false"))

    assert {name: key.enabled for name, key in keys_of(load(after)).items()} == {"alice": True, "bob": False}


def test_an_edit_that_would_change_more_than_it_should_is_refused(tmp_path):
    """
    One anchored field, used twice: whoever replaces it replaces both. That is for a person to decide.
    """
    text = f"{ALICE}    enabled: &on true\n  - name: bob\n    key: {HASH2}\n    enabled: *on\n"

    with pytest.raises(g.ConfigError) as caught:
        edit(tmp_path / "config.yaml", text, lambda editor: editor.set_field(("keys", 0), "enabled", "false"))

    assert f"{tmp_path}/config.yaml:5: keys[0].enabled: " in str(caught.value)


def test_a_byte_order_mark_does_not_shift_an_edit(tmp_path):
    """
    Where libyaml counts from and where the text begins are then two places.
    """
    for change in (
        lambda editor: editor.append_key(NEW),
        lambda editor: editor.set_scalar(HASH3, "keys", 0, "key"),
        lambda editor: editor.set_field(("keys", 0), "enabled", "false"),
    ):
        plain = edit(tmp_path / "config.yaml", ALICE, change)
        marked = edit(tmp_path / "config.yaml", "\ufeff" + ALICE, change)

        assert marked.removeprefix("\ufeff") == plain


# The same for every file that anybody may write

COMMENTS = st.sampled_from(["", "", "  # note", " # - a: {b}, [c]", "   # “é” 😀"])
BETWEEN = st.sampled_from(["", "", "\n", "# about\n", "\n    # indented\n\n", "  # - name: old\n  #   key: gone\n"])
NAMES = st.sampled_from(["alice", "bob", "Zoë", "张伟", "😀 9", "a: b", "#x", "it's", 'say "hi"', "[", "null", "-"])
ENDS = st.sampled_from(["\n", "", "\n\n\n", "\n# the end\n", "\n# the end"])


@st.composite
def key_fields(draw: st.DrawFn, name: str, number: int, block: bool) -> list[tuple[str, str]]:
    """Names and written values of one key, in some order; values on lines of their own begin with a newline."""
    quoted = json.dumps(name, ensure_ascii=False)
    names = [quoted, "'" + name.replace("'", "''") + "'"] + [name] * name.isalpha() * (name != "null")
    key = f"sha256:{number:064x}"
    fields = [("name", draw(st.sampled_from(names))), ("key", draw(st.sampled_from([key, f'"{key}"', f"'{key}'"])))]
    models, limits = ['["claude-*", gpt]', "[]", "['*',]"], ["{usd/day: 5, concurrent: 2}", "{}"]
    if block:
        models += ['\n- "claude-*"\n- gpt', '\n  - "claude-*"  # c\n\n  - gpt', "[a,\n  b]"]
        limits += ["\n  usd/day: 5\n  concurrent: 2  # d", "\n    usd: 1"]
    more = {
        "models": models,
        "limits": limits,
        "enabled": ["true", "yes", "'${ON}'"],
        "expires": ["2027-01-31", "", "~"],
    }
    for field in draw(st.lists(st.sampled_from(sorted(more)), unique=True, max_size=3)):
        fields.append((field, draw(st.sampled_from(more[field]))))
    return draw(st.permutations(fields))


@st.composite
def block_key(draw: st.DrawFn, name: str, number: int, column: int) -> str:
    """A key as an item of a block list."""
    gap = draw(st.sampled_from([" ", "   ", "\n", "  # x - y\n"]))
    inner = column + 1 + (len(gap) if "\n" not in gap else draw(st.sampled_from([1, 3])))
    lines = []
    for field, value in draw(key_fields(name, number, block=True)):
        first, *rest = f"{field}: {value}".replace(": \n", ":\n").split("\n")
        lines.append(" " * inner + first + draw(COMMENTS))
        lines += [" " * inner + line if line else "" for line in rest]
    text = "\n".join(lines)
    head = " " * column + "-" + gap
    return (head + (text if "\n" in gap else text.lstrip(" "))) + "\n"


@st.composite
def flow_key(draw: st.DrawFn, name: str, number: int) -> str:
    """A key in braces."""
    comma = draw(st.sampled_from([", ", ",\n      ", " , "]))
    inner = comma.join(f"{field}: {value}" for field, value in draw(key_fields(name, number, block=False)))
    return "{" + inner + draw(st.sampled_from(["}", " }", ",}", "\n    }"]))


@st.composite
def configs(draw: st.DrawFn, least_keys: int = 0) -> str:
    """A good config.yaml, written as one person or another writes."""
    names = draw(st.lists(NAMES, unique=True, min_size=least_keys, max_size=3))
    style = draw(st.sampled_from(["block", "brackets"] if names else ["missing", "empty", "[]", "[ ]", "~"]))
    keys = ""
    if style == "block":
        column = draw(st.sampled_from([0, 2, 4]))
        keys = "keys:" + draw(COMMENTS) + "\n"
        for number, name in enumerate(names):
            flow = " " * column + "- " + draw(flow_key(name, number)) + draw(COMMENTS) + "\n"
            keys += draw(BETWEEN) + (flow if draw(st.booleans()) else draw(block_key(name, number, column)))
    elif style == "brackets":
        items = [draw(flow_key(name, number)) for number, name in enumerate(names)]
        between = draw(st.sampled_from([", ", ",\n  ", ",  # next\n  "]))
        keys = "keys: [" + between.join(items) + draw(st.sampled_from(["]", ",]", "\n]", "  # last\n ]"])) + "\n"
    elif style != "missing":
        keys = f"keys: {style}".replace(" empty", "") + draw(COMMENTS) + "\n"
    demo = draw(
        st.sampled_from([DEMO, "upstreams:\n  # real\n  - name: demo # d\n    format: demo\n    api_key: 'sk-x'\n"])
    )
    sections = draw(st.permutations([demo, keys, "server: {port: 1}  # s\n"]))
    text = "".join(draw(BETWEEN) + section for section in sections)
    before, limits, behind = text.partition("limits: {usd/day: 5, concurrent: 2}")
    if limits and draw(st.booleans()):
        text = before + "limits: &std {usd/day: 5, concurrent: 2}" + behind.replace(limits, "limits: *std")
    text = text.rstrip("\n") + draw(ENDS)
    return text.replace("\n", draw(st.sampled_from(["\n", "\r\n"])))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A place for one config.yaml after the other."""
    return tmp_path_factory.mktemp("edits") / "config.yaml"


def lines_changed(before: str, after: str) -> tuple[list[str], list[str]]:
    """The lines that went and those that came, all in one place."""
    old, new = re.split("\r?\n", before), re.split("\r?\n", after)
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return old, new


def keeps_line_ends(before: str, after: str) -> bool:
    """Whether a file's line ends are all of one kind still."""
    return bool(re.search("(?<!\r)\n", after)) <= bool(re.search("(?<!\r)\n", before) or "\n" not in before)


@settings(deadline=None, max_examples=60)
@given(text=configs())
def test_appending_a_key_changes_nothing_else(file, text):
    """
    In a block list no line is touched; in brackets the one on which the list ends, and `keys: []`.
    """
    after = edit(file, text, lambda editor: editor.append_key(NEW))

    values = yaml.safe_load(text)
    assert yaml.safe_load(after) == values | {"keys": [*(values.get("keys") or []), NEW]}
    gone, came = lines_changed(text.rstrip("\r\n"), after.rstrip("\r\n"))
    in_brackets = "keys: [" in text or "keys: ~" in text
    assert len(gone) <= in_brackets and all(came) >= ("keys:" in text)
    assert keeps_line_ends(text, after)


@settings(deadline=None, max_examples=60)
@given(text=configs(least_keys=1), data=st.data())
def test_setting_a_field_changes_nothing_else(file, text, data):
    """
    A field that is there changes its line; a new one is a line of its own, or a part of its key's in braces.
    """
    values = yaml.safe_load(text)
    number = data.draw(st.integers(0, len(values["keys"]) - 1))

    after = edit(file, text, lambda editor: editor.set_field(("keys", number), "enabled", "false"))

    there = "enabled" in values["keys"][number]
    values["keys"][number]["enabled"] = False
    assert yaml.safe_load(after) == values
    gone, came = lines_changed(text, after)
    assert (len(gone), len(came)) in ([(1, 1)] if there else [(0, 1), (1, 1)])
    assert keeps_line_ends(text, after)


@settings(deadline=None, max_examples=60)
@given(text=configs(least_keys=1), data=st.data())
def test_setting_a_scalar_changes_one_word(file, text, data):
    """
    On its line, what stood before and behind the old value stands before and behind the new one.
    """
    number = data.draw(st.integers(0, len(yaml.safe_load(text)["keys"]) - 1))

    after = edit(file, text, lambda editor: editor.set_scalar(HASH3, "keys", number, "key"))

    (gone,), (came,) = lines_changed(text, after)
    assert came == re.sub(f"""(["']?)sha256:{number:064x}\\1""", HASH3, gone)
    assert keeps_line_ends(text, after)


# Saving


@contextlib.contextmanager
def edited(path: Path) -> Iterator[g.ConfigEditor]:
    """An editor that has just revoked alice's key."""
    with g.edited(path) as editor:
        editor.set_field(("keys", 0), "enabled", "false")
        yield editor


def save(path: Path) -> g.Config:
    """Revoke alice's key."""
    with edited(path) as editor:
        return editor.save({})


@pytest.fixture
def saved(tmp_path) -> Path:
    """A config with alice's key, in a folder with nothing else."""
    path = tmp_path / "site" / "config.yaml"
    path.parent.mkdir()
    path.write_text(ALICE)
    return path


REVOKED = ALICE + "    enabled: false\n"


def test_a_saved_edit_replaces_the_file_and_leaves_nothing_beside_it(saved):
    """
    Readers see the old file or the new one, never a half.
    """
    inode = saved.stat().st_ino

    config = save(saved)

    assert not keys_of(config)["alice"].enabled
    assert saved.read_text() == REVOKED
    assert saved.stat().st_ino != inode
    assert os.listdir(saved.parent) == ["config.yaml"]


def test_a_saved_edit_keeps_mode_and_owner(saved):
    """
    Root edits, the service reads.
    """
    saved.chmod(0o604)
    owner = (1234, 5678) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(saved, *owner)

    save(saved)

    after = saved.stat()
    assert (stat.S_IMODE(after.st_mode), (after.st_uid, after.st_gid)) == (0o604, owner)


def test_an_edit_that_makes_a_bad_config_is_not_saved(saved):
    """
    The result is read again before it replaces anything.
    """
    with g.edited(saved) as editor, pytest.raises(g.ConfigError, match=r"keys\[1\]\.name: is taken"):
        editor.append_key({"name": "alice", "key": HASH2})
        editor.save({})

    assert saved.read_text() == ALICE
    assert os.listdir(saved.parent) == ["config.yaml"]


@pytest.mark.parametrize("key", [KEY, *(start + "abcdefgh" * 3 for start in ("sk-ant-api03-", "AIzaSy", "AKIA"))])
@pytest.mark.parametrize("place", ["upstreams", "keys", "teams"])
def test_a_key_in_the_place_of_a_name_is_refused_and_not_shown(key, place):
    """
    A name stands in the ledger, in the log and on /health.
    """
    text = f"{DEMO}keys: [{{name: alice, key: {HASH}}}]\nteams: [{{name: red}}]\n"
    old = {"upstreams": "name: d", "keys": "name: alice", "teams": "name: red"}[place]
    assert old in text

    with pytest.raises(g.ConfigError) as caught:
        load(text.replace(old, f"name: {key}", 1))

    assert f":{1 if place == 'upstreams' else 2 if place == 'keys' else 3}: {place}[0].name: expected" in str(
        caught.value
    )
    assert "and no key: a name is shown to everybody" in str(caught.value)
    assert key[:12] not in str(caught.value)


def test_an_edit_does_not_undo_what_someone_else_saved_meanwhile(saved):
    """
    Two people and one file: the later one is told, and nothing is lost.
    """
    with edited(saved) as editor, pytest.raises(g.ConfigError) as caught:
        saved.write_text(ALICE + "# mine\n")
        editor.save({})

    assert str(caught.value) == f"{saved}: was changed by someone else in the meantime; nothing was written, try again"
    assert saved.read_text() == ALICE + "# mine\n"


def test_an_edit_does_not_undo_a_save_that_comes_at_the_last_moment(saved, monkeypatch):
    """
    Also while the new text is already on the disk: the file is looked at again right before it is replaced.
    """
    sync = os.fsync

    def sync_and_save(handle: int) -> None:
        sync(handle)
        saved.write_text(ALICE + "# mine\n")

    monkeypatch.setattr(os, "fsync", sync_and_save)
    with pytest.raises(g.ConfigError, match="was changed by someone else"):
        save(saved)

    assert saved.read_text() == ALICE + "# mine\n"
    assert os.listdir(saved.parent) == ["config.yaml"]


def test_an_edit_of_a_file_that_was_replaced_by_its_like_is_not_saved(saved):
    """
    The lock is on the old file: whoever edits the new one would not know of it, and one of both would be lost.
    """
    again = saved.with_name("again")
    again.write_text(ALICE)

    with edited(saved) as editor, pytest.raises(g.ConfigError, match="was changed by someone else"):
        os.replace(again, saved)
        editor.save({})

    assert saved.read_text() == ALICE


def test_a_symlink_stays_one_and_what_it_names_is_edited(saved, tmp_path):
    """
    A config kept in a repository and linked to its place; relative paths are still seen from the link.
    """
    link = tmp_path / "config.yaml"
    link.symlink_to(saved)

    config = save(link)

    assert link.is_symlink() and saved.read_text() == REVOKED
    assert config.usage_directory == tmp_path / "usage"


@pytest.fixture
def bind_mount(saved, tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount a file over the saved config, as `docker -v ./config.yaml:/…/config.yaml` does; the file outside."""
    outside = tmp_path / "outside.yaml"

    def mount(*options: str) -> Path:
        outside.write_text(ALICE)
        try:
            subprocess.run(["mount", "--bind", outside, saved], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("bind mounts need root")
        mounted.append(saved)
        if options:
            subprocess.run(["mount", "-o", f"remount,bind,{','.join(options)}", saved], check=True)
        return outside

    mounted: list[Path] = []
    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_a_bind_mounted_file_is_written_in_place(bind_mount, saved):
    """
    It cannot be replaced (EBUSY): the file outside the container changes.
    """
    outside = bind_mount()

    save(saved)

    assert outside.read_text() == saved.read_text() == REVOKED
    assert os.listdir(saved.parent) == ["config.yaml"]


def test_a_bind_mounted_file_that_is_read_only_is_said_to_be(bind_mount, saved):
    """
    `docker -v …:ro` is common and good advice; the command says what is the matter.
    """
    bind_mount("ro")

    with pytest.raises(g.ConfigError) as caught:
        save(saved)

    assert str(caught.value) == f"{saved}: cannot be written: Read-only file system"
    assert saved.read_text() == ALICE
    assert os.listdir(saved.parent) == ["config.yaml"]


@pytest.fixture
def busy(monkeypatch) -> None:
    """The system refuses to replace files, as it does where one is a mount point."""

    def refuse(*names: str) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", refuse)


def test_writing_in_place_keeps_the_inode_and_leaves_no_rest_of_a_longer_text(busy, saved):
    """
    Nor a copy, which would keep what was sealed in clear text.
    """
    inode = saved.stat().st_ino

    g.replace_file(saved, DEMO.encode())

    assert (saved.read_text(), saved.stat().st_ino) == (DEMO, inode)
    assert os.listdir(saved.parent) == ["config.yaml"]


def test_a_disk_that_fills_while_writing_in_place_leaves_a_copy_that_is_named(busy, saved, monkeypatch):
    """
    The old text is put back: its blocks are there. The copy is as secret as the file: it has the same mode.
    """

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saved.chmod(0o600)
    syncs = iter([os.fsync, fail, os.fsync])
    monkeypatch.setattr(os, "fsync", lambda handle: next(syncs)(handle))

    with pytest.raises(g.ConfigError) as caught:
        save(saved)

    backup = saved.with_name("config.yaml.bak")
    assert str(caught.value) == f"{saved}: cannot be written: No space left on device; what it was is in {backup}"
    assert backup.read_text() == saved.read_text() == ALICE
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


def test_a_copy_that_does_not_fit_on_the_disk_leaves_no_part(busy, saved, monkeypatch):
    """
    Nothing was overwritten yet, and half a copy would keep secrets under a name that nobody was told.
    """

    def fail(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copystat", fail)

    with pytest.raises(g.ConfigError) as caught:
        save(saved)

    assert str(caught.value) == f"{saved}: cannot be written: No space left on device"
    assert os.listdir(saved.parent) == ["config.yaml"] and saved.read_text() == ALICE


@pytest.mark.parametrize("section", ["server", "keys", "teams", "defaults", "limits", "prices", "usage"])
def test_a_section_with_everything_commented_out_has_its_defaults(section):
    """
    Who comments out the last key or setting of a section has not made a mistake.
    """
    text = f"upstreams: [{{name: d, format: demo}}]\n{section}:\n  # nothing\n"

    config = g.Config.parse(text, Path("config.yaml"), g.Clock(), {})

    assert getattr(config.file, section) == getattr(g.ConfigFile(upstreams=()), section)


PLACEHOLDERS = [
    *("sk-ant-...", "YOUR_KEY", "YOUR-API-KEY-HERE", "yourapikey", "changeme", "CHANGE_ME", "replace-me", "<key>"),
    *(
        "sk-ant-<your key>",
        "xxxx",
        "sk-ant-XXXXXXXX",
        "{api_key}",
        "sk-ant-api03-R2D2...igAA",
        "sk-****R2D2",
        "placeholder",
    ),
]


@pytest.mark.parametrize("value", PLACEHOLDERS)
def test_a_placeholder_is_warned_about_wherever_it_comes_from(value):
    """
    In the file, in the environment, sealed meanwhile: the upstream would refuse it at the first call. It is not shown.
    """
    vault = g.Vault([g.Vault.new_secret()], "")
    value = value.replace(" ", "-")
    text = """
upstreams:
  - {name: a, url: https://a.test, api_key: "%s", headers: {set: {X-Token: "%s", x-team: "%s"}}}
  - name: b
    url: https://b.test
    api_key: [sk-ant-good-one, "${B}"]
  - {name: c, url: https://c.test, api_key: "%s"}
"""

    config = load(text % (*[value] * 3, vault.seal(value)), GATEWAY_SECRET=vault._keys[0], B=value)

    why = "looks like a placeholder: put the real one in its place"
    assert [warning for warning in config.warnings if "clear text" not in warning] == [
        f"line 3: upstreams[0].api_key: {why}",
        f"line 3: upstreams[0].headers.set.X-Token: {why}",
        f"line 6: upstreams[1].api_key[1]: {why}",
        f"line 7: upstreams[2].api_key: {why}",
    ]


def test_a_users_key_and_an_address_may_be_placeholders_too():
    """
    A key that everybody can guess lets everybody in.
    """
    config = load(
        "upstreams:\n- {name: a, url: 'https://YOUR-RESOURCE.openai.azure.com', api_key: '${K}'}\n"
        "keys:\n- {name: alice, key: sk-proxy-xxxxxxxxxxxx}\n",
        K="sk-ant-1",
    )

    why = "looks like a placeholder: put the real one in its place"
    assert [w for w in config.warnings if "clear text" not in w] == [
        f"line 2: upstreams[0].url: {why}",
        f"line 4: keys[0].key: {why}",
    ]


@settings(max_examples=200)
@given(st.binary(min_size=80, max_size=80), st.sampled_from(["sk-ant-api03-", "sk-proj-", "gsk_", "AIza"]))
def test_no_key_that_was_issued_looks_like_a_placeholder(raw, prefix):
    """
    Random letters of either case, digits, - and _: a warning that comes by chance is one that is not read.
    """
    assert not g.PLACEHOLDER.search(prefix + base64.urlsafe_b64encode(raw).decode())


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("usage: {directory: $LEDGER}\n", "2: usage.directory: $NAME"),
        ("usage:\n  directory: /srv/$LEDGER_FOLDER/usage\n", "3: usage.directory: $NAME"),
        ("usage: {directory: “usage”}\n", "2: usage.directory: typographic quotes"),
        ("keys:\n- name: alice\n  key: ${K}\n  models: [“claude-*”]\n", "5: keys[0].models[0]: typographic quotes"),
        ("usage: {directory: '${K}'}\n", None),
        ("usage: {directory: us$age}\n", None),
        ("usage: {directory: a$5}\n", None),
        ('server: {contact: "Ann’s desk"}\n', None),
    ],
)
def test_a_value_that_is_hardly_meant_is_warned_about(text, warning):
    """
    What a shell would fill in, and what a word processor made of quotes, is taken as it stands.
    """
    config = load(DEMO.replace("\n", "", 1).strip() + "\n" + text, K=KEY)

    told = {
        "$NAME": "$NAME is taken as it stands: only ${NAME}, in braces, comes from the environment",
        "typographic quotes": "typographic quotes belong to the value: YAML's own are \" and '",
    }
    for short, long in told.items():
        warning = warning and warning.replace(short, long)
    assert config.warnings == ([f"line {warning}"] if warning else [])


@pytest.mark.parametrize(
    ("glob", "why"),
    [
        ("claud-[*", "matches nothing: a bracket in it is not closed"),
        ("claude-[]", "matches nothing: a bracket in it is not closed"),
        ("claude-[!]", "matches nothing: a bracket in it is not closed"),
        ("[ab]-[", "matches nothing: a bracket in it is not closed"),
        ("claude-* ", "matches nothing: no name has a blank or comma in it; several globs are a list"),
        ("claude-*, gpt-*", "matches nothing: no name has a blank or comma in it; several globs are a list"),
        ("claude-*,gpt-*", "matches nothing: no name has a blank or comma in it; several globs are a list"),
        ('"claude-*"', "matches nothing: no name has quotes in it"),
        ("claude-opus-5-5[1m]", "[1m] is one letter in a glob, 1 or m: for the name itself write [[]1m]"),
        ("claude-opus-5-5[[]1m]", ""),
        ("claude-[!a-c]*", ""),
        ("claude-[]a]", ""),
        ("claude-[[]*", ""),
        ("", ""),
        ("Qwen/Qwen3-8B:free", ""),
    ],
)
def test_a_glob_that_cannot_match_is_warned_about(glob, why):
    """
    It is no error: a name may have a bracket in it. `""` stands for requests without a model.
    """
    name = json.dumps(glob)
    config = load(
        f"""upstreams:
- {{name: a, format: demo, models: [{name}]}}
- name: b
  format: demo
  models: {{{name}: "*"}}
  betas: {{drop: ["*", {name}]}}
keys:
- {{name: alice, key: "${{K}}", models: ["*", {name}]}}
routing:
  policy:
    {name}: sticky
prices:
  "*": {{input: 1, output: 1}}
  {name}: {{input: 1, output: 1}}
""",
        K=KEY,
    )

    at = f".{glob}" if glob else "."
    assert config.warnings == (
        [
            f"line 2: upstreams[0].models{at}: {why}",
            f"line 5: upstreams[1].models{at}: {why}",
            f"line 6: upstreams[1].betas.drop[1]: {why}",
            f"line 8: keys[0].models[1]: {why}",
            f"line 11: routing.policy{at}: {why}",
            f"line 14: prices{at}: {why}",
        ]
        if why
        else []
    )


@pytest.mark.parametrize("models", ["[]", "{}"])
def test_an_upstream_that_serves_no_model_is_warned_about(models):
    """
    It would be in the list, and never asked.
    """
    config = load(f"upstreams:\n- name: a\n  format: demo\n  models: {models}\n")

    assert config.warnings == ['line 4: upstreams[0].models: no model is served: name some, or "*"']


def test_a_line_that_is_no_yaml_is_quoted_in_part_where_it_is_long():
    """
    A config may be one line.
    """
    with pytest.raises(g.ConfigError) as caught:
        load(DEMO + f"server: {{contact: {'so ' * 500}, host: @, timezone: {'so ' * 500}}}\n")

    first, _, quoted, caret = str(caught.value).split("\n")
    assert first.startswith("config.yaml:2: not YAML: text that begins with @")
    assert len(quoted) <= 104 and quoted[len(caret) - 1] == "@"


def test_a_secret_in_clear_text_is_warned_about_even_where_the_environment_has_it_too():
    """
    It is the place that counts, and an alias of `${…}` is as good as that.
    """
    config = load(
        f"""upstreams:
  - {{name: a, url: "http://a.test", api_key: &key "${{K}}"}}
  - {{name: b, url: "http://b.test", api_key: *key}}
  - {{name: c, url: "http://c.test", api_key: {KEY}}}
""",
        K=KEY,
    )

    assert config.warnings == ["line 4: upstreams[2].api_key: is in clear text: run `gateway.py seal`"]


@pytest.mark.parametrize(
    ("upstream", "is_warned_of"),
    [
        ("url: https://a.test", True),
        ("url: https://a.test, api_key: '${NONE:-}'", True),
        ("url: https://a.test, headers: {set: {x-team: red}}", True),
        ("url: https://a.test, headers: {set: {Authorization: '${K}'}}", False),
        ("url: https://a.test, api_key: '${K}'", False),
        ("url: 'http://vllm:8000'", False),
        ("format: demo", False),
    ],
)
def test_an_upstream_without_an_api_key_is_warned_about(upstream, is_warned_of):
    """
    No client's credential goes there in its place. In-house servers, which are asked in clear text, want none.
    """
    config = load(f"upstreams:\n  - {{name: a, {upstream}}}\n", K="sk-ant-1")

    assert config.warnings == [f"line 2: upstreams[0].api_key: {NO_API_KEY}"] * is_warned_of


def test_an_api_key_that_is_a_name_without_braces_is_no_secret_in_clear_text(tmp_path):
    """
    It is told what it is, once; `seal` would only hide it.
    """
    config = load("upstreams:\n- name: a\n  url: https://a.test\n  api_key: $ANTHROPIC_API_KEY\n")

    assert config.warnings == [
        "line 4: upstreams[0].api_key: $NAME is taken as it stands: only ${NAME}, in braces, comes from the environment"
    ]


def test_a_port_that_the_images_health_check_does_not_know_is_warned_about():
    """
    The check is part of the image and cannot read the config: it asks GATEWAY_PORT, which the image sets.
    """
    demo = "upstreams: [{name: demo, format: demo}]\n"

    own = load("server: {port: 9000}\n" + demo, GATEWAY_PORT="8000")
    taken = load("server:\n  port: ${GATEWAY_PORT}\n" + demo, GATEWAY_PORT="8000")

    assert own.warnings == ["server.port is 9000, but GATEWAY_PORT, which the image's health check asks, 8000"]
    assert taken.warnings == []


def test_a_memory_that_holds_no_whole_body_is_warned_of():
    """
    Each body of more than `server.memory` is refused, however large `max_body` lets it be.
    """
    small, enough = (load(DEMO + f"server: {{max_body: 1MB, memory: {memory}}}\n") for memory in ("1023KB", "1MB"))

    assert (small.body_memory, enough.body_memory) == (1023 << 10, 1 << 20)
    assert enough.warnings == [] and small.warnings == [
        "server.memory (default: a quarter of the host's) is 1,047,552 bytes, and a body of server.max_body, "
        "1,048,576, has no room in it: raise the one or lower the other"
    ]


@pytest.mark.parametrize(
    ("ids", "is_warned_of"), [("0 0 4294967295", False), ("0 1000 1\n1 100000 65536", True), (None, False)]
)
def test_in_a_rootless_container_who_is_believed_by_address_is_warned_of(tmp_path, ids, is_warned_of):
    """
    There every client may come from one address; without /proc nothing is known.
    """
    if ids is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/uid_map").write_text(ids + "\n")

    assert g.is_rootless(tmp_path) is is_warned_of


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize(("end", "is_good"), [("", True), ("\nport: 1", False)])
def test_no_garbage_is_collected_while_a_config_is_read(is_enabled, end, is_good):
    """
    Each collection goes through all that was made so far, and no other thread, thus no stream, goes on meanwhile.
    """
    text = KEYS + "".join(f"  - {{name: key-{i}, key: 'sha256:{i:064x}'}}\n" for i in range(1000)) + end
    phases: list[str] = []
    was_enabled = gc.isenabled()

    def noted(phase: str, info: object) -> None:
        phases.append(phase)

    gc.callbacks.append(noted)
    try:
        gc.enable() if is_enabled else gc.disable()
        with contextlib.nullcontext() if is_good else pytest.raises(g.ConfigError):
            load(text)
        collected, after = phases.count("start"), gc.isenabled()
    finally:
        gc.callbacks.remove(noted)
        gc.enable() if was_enabled else gc.disable()

    assert after == is_enabled
    assert collected <= is_enabled  # one, once it goes on

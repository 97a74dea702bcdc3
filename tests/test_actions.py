"""Actions: values in, values out, errors as facts; no argument, no print, no HTTP."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from conftest import KEY

import gateway as g

CONFIG = f"""\
upstreams: [{{name: demo, format: demo}}]
teams: [{{name: red, limits: {{usd/day: 50}}}}]
keys:
  - name: alice
    key: {KEY}
    team: red
    limits: {{usd/day: 20, concurrent: 4}}
    allow_ips: [10.0.0.0/8]
"""


@pytest.fixture
def path(tmp_path) -> Path:
    """A config with one key."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path / "config.yaml"


class Books:
    """A house without a gateway, and what was appended to its ledger."""

    def __init__(self, path: Path) -> None:
        self.lines: list[g.LedgerLine] = []
        self.house = g.House(g.Config.load(path), self.lines.append, None)


def test_a_key_is_added_rotated_and_revoked(path):
    """
    Each gives back what whoever asked needs to know, and no more.
    """
    added = g.AddKey("bob", {"usd/day": "20"}, ("claude-*",), "2999-12-31").run(path)
    rotated = g.RotateKey("bob").run(path)
    mistake = g.RevokeKey("alice").run(path)

    alice, bob = g.Config.load(path).keys
    assert (mistake, added != rotated, g.Config.load(path).keys.find([rotated])) == ("", True, bob)
    assert (alice.enabled, bob.enabled, bob.models, bob.expires_at) == (False, True, ("claude-*",), 32503680000.0)
    assert bob.budgets[0].limits == (g.Limit("usd", g.WINDOWS["day"], 20.0),)


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (g.AddKey("alice"), "taken"),
        (g.AddKey("bob", {"usd/day": "lots"}), "invalid"),
        (g.AddKey("bob", expires="soon"), "invalid"),
        (g.AddKey("bob\n"), "invalid"),
        (g.RotateKey("bob"), "unknown"),
        (g.RevokeKey("bob"), "unknown"),
    ],
)
def test_why_an_edit_was_not_made_is_a_fact(path, action, code):
    """
    A code, for the status of an answer; the file is as before.
    """
    with pytest.raises(g.ActionError) as raised:
        action.run(path)

    assert raised.value.code == code
    assert path.read_text() == CONFIG


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (g.ResetLimits("key", "bob"), "unknown"),
        (g.AdjustUsage("team", "blue", usd=1.0), "unknown"),
        (g.ResetLimits("key", "alice", limit="usd/year"), "invalid"),
        (g.ResetLimits("key", "alice", limit="concurrent"), "invalid"),
        (g.ResetUpstream("demi"), "unknown"),
        (g.ResetUpstream("demo"), "failed"),
    ],
)
def test_why_a_change_was_not_made_is_a_fact(path, action, code):
    """
    Nothing is written for what cannot be meant.
    """
    books = Books(path)

    with pytest.raises(g.ActionError) as raised:
        action.run(books.house)

    assert (raised.value.code, books.lines) == (code, [])


def test_a_correction_is_one_line_of_the_ledger(path):
    """
    A key's adjustment counts with its team.
    """
    books = Books(path)

    teams = [g.AdjustUsage("key", "alice", "refund", usd=-3.5).run(books.house)]
    teams.append(g.AdjustUsage("gateway", "", tokens=5).run(books.house))
    g.ResetLimits("team", "red", limit="usd/day").run(books.house)

    assert teams == ["red", ""]
    assert [msgspec.structs.replace(line, time="") for line in books.lines] == [
        g.Adjustment(time="", key="alice", team="red", cost_usd=-3.5, note="refund"),
        g.Adjustment(time="", input_tokens=5),
        g.Reset(time="", scope="team", name="red", limit="usd/day"),
    ]


def test_an_action_comes_from_json_with_its_bounds():
    """
    As a request has it: named by its tag, no amount beyond what counters take.
    """
    text = b'{"action":"usage adjust","scope":"key","name":"alice","usd":-3.5}'

    assert g.REQUEST_DECODER.decode(text) == g.AdjustUsage("key", "alice", usd=-3.5)
    with pytest.raises(msgspec.ValidationError, match="usd"):
        g.REQUEST_DECODER.decode(text.replace(b"-3.5", b"1e300"))
    with pytest.raises(msgspec.ValidationError, match="tokens"):
        g.REQUEST_DECODER.decode(text.replace(b'"usd":-3.5', b'"tokens":10000000000000000'))


async def test_the_running_gateway_does_what_is_asked_and_says_who_asked(gateway, caplog):
    """
    What an endpoint or a page needs: an edit is live when it is done, a change counts, and each leaves one line.
    """
    caplog.set_level("INFO")

    added = await g.act(gateway.gateway, g.AddKey("bob"), "carol")
    await g.act(gateway.gateway, g.AdjustUsage("key", "bob", usd=1.0), "carol")
    with pytest.raises(g.ActionError, match="did you mean bob"):
        await g.act(gateway.gateway, g.RevokeKey("bop"), "carol")

    assert (await gateway.get("/v1/usage", added)).json["today"]["cost_usd"] == 1.0
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("audit")]
    assert lines == ["audit: key add bob, by carol", "audit: usage adjust key bob: +1 usd, by carol"]


async def test_the_audit_line_of_a_correction_tells_how_much_and_why(gateway, caplog):
    """
    A credit and a charge differ, and a note cannot forge a line or fill the log.
    """
    caplog.set_level("INFO")

    for action in (
        g.AdjustUsage("gateway", "", usd=-3.5, tokens=10),
        g.AdjustUsage("gateway", "", "a\n\x1b" + "x" * 5000, requests=2),
        g.ResetLimits("gateway", ""),
    ):
        await g.act(gateway.gateway, action, "carol")

    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("audit")]
    assert lines.pop(1).startswith("audit: usage adjust gateway: +2 requests, 'a\\n\\x1bxx")
    assert lines == [
        "audit: usage adjust gateway: -3.5 usd, +10 tokens, by carol",
        "audit: usage reset gateway: all limits, by carol",
    ]
    assert all("\n" not in line and len(line) < 300 for line in caplog.messages)


async def test_a_correction_that_is_repeated_is_made_once(gateway):
    """
    Whoever had no answer in time may ask again under the same id.
    """
    action = g.AdjustUsage("gateway", "", usd=1.0, id="a1", is_repeated=True)

    await g.act(gateway.gateway, action, "carol")
    with pytest.raises(g.ActionError, match="a1 was done already: nothing was done again"):
        await g.act(gateway.gateway, action, "carol")
    await g.act(gateway.gateway, g.AdjustUsage("gateway", "", usd=1.0, id="a2"), "carol")

    assert [entry["cost_usd"] for entry in gateway.entries()] == [1.0, 1.0]


async def test_no_correction_is_called_made_that_the_ledger_does_not_have(gateway, monkeypatch):
    """
    Calls wait in memory until the disk has room again. Whoever corrects is there, and can ask again.
    """
    monkeypatch.setattr(gateway.gateway.ledger, "failure", "No space left on device")

    with pytest.raises(g.ActionError, match="nothing was done, the ledger cannot be written: No space left"):
        await g.act(gateway.gateway, g.AdjustUsage("gateway", "", usd=1.0, id="a1"), "carol")

    assert gateway.entries() == []

"""Who is asked, and how that went: homes, policies, breaker, waiting. No sockets."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from email.utils import formatdate
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from conftest import KEY, START, FakeClock, calls_made, until
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import gateway as g

MODEL = "claude-test"
Place = tuple[str, int]


def parse(upstreams: dict[str, str], routing: str, clock: FakeClock) -> g.Config:
    """A config with these upstreams; `upstreams` gives what each has besides name, url and key."""
    lines = [
        f"  - {{name: {name}, url: 'http://{name}.test'{'' if 'api_key' in more else ', api_key: key-1'}"
        f"{', ' if more else ''}{more}}}"
        for name, more in upstreams.items()
    ]
    text = "\n".join(["upstreams:", *lines, f"keys: [{{name: alice, key: {KEY}}}]", f"routing: {{{routing}}}", ""])
    return g.Config.parse(text, Path("config.yaml"), clock.clock, {})


class World:
    """Upstreams on a clock of their own. Chance always says a half: jitter is nought."""

    def __init__(self, upstreams: dict[str, str], routing: str = "", pace: g.Pace = g.Pace()) -> None:
        self.clock, self._routing = FakeClock(), routing
        self.upstreams = g.Upstreams(self.clock.clock, pace, chance=lambda: 0.5)
        self.upstreams.on_trip = lambda *facts: g.log_cooldown(g.UpstreamTripped(*facts))
        self.reload(upstreams)
        self.users = (f"user-{number}" for number in itertools.count())

    def reload(self, upstreams: dict[str, str]) -> None:
        """Put another config in place."""
        self.config = parse(upstreams, self._routing, self.clock)
        self.upstreams.keep_only(self.config.upstreams)

    def call(
        self,
        session: str = "s",
        model: str = MODEL,
        path: str = "/v1/messages",
        headers: g.Headers | None = None,
        body: bytes = b"",
    ) -> g.Call:
        """A call that has been read and routed."""
        call = g.Call(self.config, next(iter(self.config.keys)), g.ROUTES[path], b"", headers or [], "127.0.0.1")
        call.session, call.model, call.body = session, model, body
        call.servings = self.config.route(call)
        return call

    def take(self, session: str = "s", tried: Iterable[Place] = (), model: str = MODEL, user: str = "") -> g.Ticket:
        """A slot, for a call of another user each time unless one is named; it must be there."""
        ticket = self.upstreams.take(self.call_of(user, session=session, model=model), set(tried))
        assert ticket
        return ticket

    def call_of(self, user: str = "", team: str = "", **asked: str) -> g.Call:
        """A call of a user, of another one each time unless one is named."""
        call = self.call(**asked)
        call.key = msgspec.structs.replace(call.key, name=user or next(self.users), team=team)
        return call

    def fail_for(
        self, user: str, case: str = "500", retry_after_s: float | None = None, team: str = "", model: str = MODEL
    ) -> None:
        """A call of this user fails; it must be let in."""
        ticket = self.upstreams.take(self.call_of(user, team, model=model), set())
        assert ticket
        with ticket:
            self.upstreams.record_failure(ticket, case, retry_after_s)

    def is_let_in(self, user: str, model: str = MODEL, team: str = "") -> bool:
        """Whether a call of this user may be sent somewhere now."""
        return self.upstreams.is_anybody_ready(self.call_of(user, team, model=model), set())

    def refuse(self, case: str, session: str = "s") -> Place:
        """Our API key is refused to two users, and the list of models tells nothing; who it was."""
        place = self.fail(case, session=session)
        for choice, health in self.upstreams.take_suspects():
            self.upstreams.record_key_check(choice, health, 404)
        assert self.fail(case, session=session) == place
        return place

    def place(self, session: str = "s", tried: Iterable[Place] = (), model: str = MODEL) -> Place | None:
        """Who would be asked."""
        ticket = self.upstreams.take(self.call(session, model), set(tried))
        if ticket is None:
            return None
        with ticket:
            return ticket.choice.place

    def name(self, session: str = "s", model: str = MODEL) -> str:
        """The name of the upstream that would be asked, "" for nobody."""
        place = self.place(session, model=model)
        return place[0] if place else ""

    def fail(self, case: str, retry_after_s: float | None = None, session: str = "s", times: int = 1) -> Place:
        """Calls, each of another user, that fail, one after the other; who failed the last."""
        for _ in range(times):
            with self.take(session) as ticket:
                self.upstreams.record_failure(ticket, case, retry_after_s)
        return ticket.choice.place

    def stream(self, session: str) -> None:
        """A call that is answered."""
        with self.take(session) as ticket:
            self.upstreams.record_answer(ticket)
            self.upstreams.record_success(ticket)

    def session_at(self, name: str, n: int = 0) -> str:
        """A session that is at home at an upstream (the n-th of them)."""
        found = (s for i in itertools.count() if self.name(s := f"session-{i}") == name)
        return next(itertools.islice(found, n, None))

    def running(self) -> dict[str, list[int]]:
        """How many calls run: of each upstream, then of each of its keys."""
        out = {}
        for upstream in self.config.upstreams:
            choices = self.upstreams.choices(upstream)
            out[upstream.name] = [choices[0].health.running, *(choice.key_health.running for choice in choices)]
        return out

    def reported(self) -> dict[str, str]:
        """How each upstream stands, in a word."""
        return {row["name"]: row["state"] for row in self.upstreams.report(self.config.upstreams)}

    def waiting(
        self, call: g.Call, until_s: float = 30.0, not_before: float = 0.0, tried: Iterable[Place] = ()
    ) -> tuple[asyncio.Task[g.Ticket | None], asyncio.Future[None]]:
        """A call that waits, and the future that says its client left."""
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wait = self.upstreams.wait(call, set(tried), not_before, until_s, gone)
        return asyncio.ensure_future(wait), gone


THREE = {"a": "", "b": "", "c": ""}
SESSIONS = [f"session-{i}" for i in range(20_000)]


# --- home ------------------------------------------------------------------------------


def homes(weights: dict[str, float], sessions: Iterable[str] = SESSIONS) -> list[str]:
    """Where each session is at home."""
    return [max(weights, key=lambda name: g.rendezvous(session, name, weights[name])) for session in sessions]


WEIGHTS = st.fixed_dictionaries({name: st.floats(0.25, 8.0) for name in THREE})


@settings(max_examples=8, deadline=None)
@given(WEIGHTS)
def test_homes_are_shared_out_by_weight(weights):
    """
    Of 20,000 sessions each upstream has its weight's share, within two percent of all.
    """
    counted = Counter(homes(weights))

    shares = {name: counted[name] / len(SESSIONS) for name in weights}

    whole = sum(weights.values())
    assert shares == {name: pytest.approx(weight / whole, abs=0.02) for name, weight in weights.items()}


@settings(max_examples=20, deadline=None)
@given(WEIGHTS, st.sampled_from(sorted(THREE)))
def test_when_an_upstream_goes_only_its_sessions_move_and_they_come_home(weights, gone):
    """
    Removing one moves nobody who was at home elsewhere; when it is back, everybody is where he was.
    """
    sessions = SESSIONS[:2000]
    before = homes(weights, sessions)

    without = homes({name: weight for name, weight in weights.items() if name != gone}, sessions)
    back = homes(dict(reversed(weights.items())), sessions)

    assert {old for old, new in zip(before, without, strict=True) if old != new} <= {gone}
    assert gone not in without
    assert back == before


@settings(max_examples=20, deadline=None)
@given(WEIGHTS, st.sampled_from(sorted(THREE)), st.floats(0.1, 10.0))
def test_a_changed_weight_moves_sessions_only_to_or_from_its_upstream(weights, changed, factor):
    """
    More weight draws sessions to that upstream, less lets some go; nobody else changes places.
    """
    sessions = SESSIONS[:2000]
    before = homes(weights, sessions)

    after = homes(weights | {changed: weights[changed] * factor}, sessions)

    moves = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
    assert all((new if factor > 1 else old) == changed for old, new in moves)


@given(st.text(), st.text(), st.floats(0, 1000))
def test_any_names_have_a_finite_share(affinity, name, weight):
    """
    Any text, lone surrogates too, and any weight that a config allows: a number that can be compared.
    """
    share = g.rendezvous(affinity, name, weight)

    assert 0 <= share < math.inf


def test_calls_are_sent_to_their_sessions_home():
    """
    What is taken is what the hash says, whatever the order of the file, and each call of a session goes there.
    """
    world, other_order = World(THREE), World(dict(reversed(THREE.items())))

    taken = [world.name(session) for session in SESSIONS[:300]]

    assert taken == homes(dict.fromkeys(THREE, 1.0), SESSIONS[:300])
    assert taken == [world.name(session) for session in SESSIONS[:300]]
    assert taken == [other_order.name(session) for session in SESSIONS[:300]]


@pytest.mark.parametrize("policy", get_args(g.Policy))
def test_weight_0_gets_only_what_no_other_can_take(policy):
    """
    An upstream of weight 0 is asked when the others were, or are full, and not before, whatever the policy.
    """
    world = World({"spare": "weight: 0", "a": "max_concurrent: 20", "b": "max_concurrent: 20"}, f"policy: {policy}")

    tickets = [world.take(session) for session in SESSIONS[:40]]
    after = world.take("one more")

    assert Counter(ticket.choice.upstream.name for ticket in tickets) == {"a": 20, "b": 20}
    assert after.choice.upstream.name == "spare"
    assert world.place("s", [("a", 1), ("b", 1)]) == ("spare", 1)


def test_a_reload_keeps_the_health_of_those_that_stay_and_forgets_the_others():
    """
    Running calls are still counted after a reload with another weight; an upstream that went and came is a new one.
    """
    world = World({"a": "", "b": ""})
    tickets = [world.take("s"), world.take("s", [("a", 1)]), world.take("s", [("b", 1)])]

    world.reload({"a": "weight: 3"})
    without_b = world.running()
    world.reload({"a": "", "b": ""})
    with_b = world.running()
    for ticket in tickets:
        ticket.__exit__()

    assert without_b["a"] == [sum(ticket.choice.upstream.name == "a" for ticket in tickets)] * 2
    assert with_b == without_b | {"b": [0, 0]}
    assert world.running() == {"a": [0, 0], "b": [0, 0]}


# --- priority ----------------------------------------------------------------------------


@pytest.mark.logs("upstream first is left alone for 10.0 s: unreachable, 3 in a row")
def test_the_next_priority_is_asked_only_when_nobody_of_the_better_one_is_ready():
    """
    The lower number first; the next one while all of that are left alone; home again after the cooldown.
    """
    world = World({"second": "priority: 2", "first": "priority: 1"})

    names = [world.name()]
    world.fail("unreachable", times=3)
    names += [world.name()]
    world.clock.advance(9.9)
    names += [world.name()]
    world.clock.advance(0.1)
    names += [world.name()]

    assert names == ["first", "second", "second", "first"]


def test_a_peer_of_the_same_priority_comes_before_the_next_priority():
    """
    Whoever was tried already is passed over, best priority first, until nobody is left.
    """
    world = World({"a": "", "b": "", "c": "priority: 7"})

    tried: list[Place] = []
    while place := world.place("s", tried):
        tried.append(place)

    assert sorted(tried[:2]) == [("a", 1), ("b", 1)]
    assert tried[2:] == [("c", 1)]


# --- several API keys ----------------------------------------------------------------------

TWO_KEYS = {"a": "api_key: [key-1, key-2]"}


def test_a_session_stays_on_one_key_and_the_keys_share_the_sessions():
    """
    Prompt caches belong to a key's account: each session has one key, and each key has its share of the sessions.
    """
    world = World(TWO_KEYS)

    first = [world.place(session) for session in SESSIONS[:1000]]
    second = [world.place(session) for session in SESSIONS[:1000]]

    assert first == second
    assert Counter(first) == {("a", 1): pytest.approx(500, abs=75), ("a", 2): pytest.approx(500, abs=75)}


@pytest.mark.parametrize(
    "case, retry_after_s, away_s",
    [("429", None, 10.0), ("429", 5.0, 5.25), ("401", None, 10.0), ("402", None, 10.0), ("403", None, 10.0)],
)
def test_a_refused_key_is_blamed_alone(caplog, case, retry_after_s, away_s):
    """
    The other key of the same upstream takes over at once; the session comes home when the key is good again.
    """
    world = World(TWO_KEYS)
    home = world.fail(case, retry_after_s, times=2) if case == "429" else world.refuse(case)

    other = world.place()
    world.clock.advance(away_s - 0.01)
    still = world.place()
    world.clock.advance(0.01)

    assert {home, other} == {("a", 1), ("a", 2)}
    assert (still, world.place()) == (other, home)
    assert world.reported() == {"a": "degraded"}
    assert "left alone" in caplog.text
    caplog.clear()


@pytest.mark.logs("is left alone")
def test_an_upstream_that_fails_takes_all_its_keys_with_it():
    """
    What is the upstream's fault is no key's: while it is left alone none of its keys is tried.
    """
    world = World(TWO_KEYS)

    world.fail("529", times=3)

    assert world.place() is None
    assert world.upstreams.ready_in(world.call(), set()) == 10.0
    assert world.upstreams.ready_in(world.call(), {("a", 1), ("a", 2)}) == math.inf


def test_max_concurrent_counts_by_key_and_max_connections_by_upstream():
    """
    Three calls at once for each key, five for the upstream; a slot that is given back is there again.
    """
    by_key = World({"a": "api_key: [key-1, key-2], max_concurrent: 3"})
    by_upstream = World({"a": "api_key: [key-1, key-2], max_concurrent: 3, max_connections: 5"})

    taken = [
        list(iter(lambda world=world: world.upstreams.take(world.call(), set()), None))
        for world in (by_key, by_upstream)
    ]
    counted = [by_key.running(), by_upstream.running()]
    first = taken[1][0].choice.place
    taken[1][0].__exit__()

    assert [len(tickets) for tickets in taken] == [6, 5]
    assert counted[0] == {"a": [6, 3, 3]} and sorted(counted[1]["a"]) == [2, 3, 5]
    assert by_upstream.place() == first


# --- policies ------------------------------------------------------------------------------


def test_round_robin_follows_the_weights_exactly():
    """
    Over each cycle of six calls, whatever their sessions: three, two and one; and never all of one in a row.
    """
    world = World({"a": "weight: 3", "b": "weight: 2", "c": "weight: 1"}, "policy: round_robin")

    asked = [world.name(session) for session in SESSIONS[:60]]

    assert [Counter(asked[i : i + 6]) for i in range(0, 60, 6)] == [{"a": 3, "b": 2, "c": 1}] * 10
    assert not any(asked[i : i + 3] == ["a", "a", "a"] for i in range(58))


def test_round_robin_shares_an_upstreams_weight_among_its_keys():
    """
    Two keys do not make an upstream of the same weight worth two.
    """
    world = World({"a": "api_key: [key-1, key-2]", "b": ""}, "policy: round_robin")

    asked = Counter(world.place() for _ in range(40))

    assert asked == {("a", 1): 10, ("a", 2): 10, ("b", 1): 20}


def test_asking_whether_another_one_is_ready_takes_nobodys_turn():
    """
    A relay asks that before each attempt; round robin is still exact.
    """
    world = World({"a": "weight: 3", "b": "weight: 2", "c": "weight: 1"}, "policy: round_robin")
    asked = []

    for _ in range(60):
        with world.take() as ticket:
            asked.append(ticket.choice.upstream.name)
            others = world.upstreams.is_anybody_ready(ticket.call, {ticket.choice.place})
            assert others

    assert Counter(asked) == {"a": 30, "b": 20, "c": 10}


def test_least_busy_asks_whoever_has_the_fewest_running_for_its_weight():
    """
    With calls that do not end, twelve at once lie as the weights say; with calls that end, sessions stay at home.
    """
    world = World({"a": "weight: 3", "b": "weight: 2", "c": "weight: 1"}, "policy: least_busy")

    idle = [world.name(session) for session in SESSIONS[:50]]
    tickets = [world.take(session) for session in SESSIONS[:12]]

    assert idle == homes({"a": 3.0, "b": 2.0, "c": 1.0}, SESSIONS[:50])
    assert Counter(ticket.choice.upstream.name for ticket in tickets) == {"a": 6, "b": 4, "c": 2}


def test_policies_are_found_by_glob_of_the_model():
    """
    The first glob that matches counts; a model that none matches is sticky.
    """
    world = World({"a": "", "b": ""}, 'policy: {"claude-haiku-*": round_robin, "claude-*": sticky, "x": least_busy}')

    asked = {model: [world.name(model=model) for _ in range(4)] for model in ("claude-haiku-4", "claude-opus-4", "y")}

    home = homes({"a": 1.0, "b": 1.0}, ["s"])
    assert sorted(asked["claude-haiku-4"]) == ["a", "a", "b", "b"]
    assert asked["claude-opus-4"] == asked["y"] == home * 4


# --- affinity ------------------------------------------------------------------------------


def affinity(body: object, path: str = "/v1/messages", headers: g.Headers | None = None) -> str:
    """What a request is kept together by."""
    call = World({"a": "", "o": "format: openai"}).call(path=path, headers=headers)
    call.body = json.dumps(body).encode()
    g.read_request(call)
    return g.find_affinity(call)


def turn(role: str, content: object) -> dict[str, object]:
    """A message."""
    return {"role": role, "content": content}


SESSION = "0198a7f0-1111-7222-8333-444455556666"


@pytest.mark.parametrize(
    "metadata, headers, expected",
    [
        ({"user_id": f"user_1_account__session_{SESSION}"}, [], SESSION),
        ({"user_id": json.dumps({"device_id": "d", "session_id": SESSION})}, [], SESSION),
        ({"user_id": f"user_1_account__session_{SESSION}"}, [(b"X-Claude-Code-Session-Id", b"header")], "header"),
    ],
)
def test_a_session_is_kept_together(metadata, headers, expected):
    """
    The header says it, else the end of `metadata.user_id`, in both of Claude Code's forms.
    """
    body = {"model": MODEL, "metadata": metadata, "messages": [turn("user", "hi")]}

    found = affinity(body, headers=headers)

    assert found == expected


def chat(*messages: dict[str, object], system: object = "be kind") -> dict[str, object]:
    """A Messages request."""
    return {"model": MODEL, "system": system, "messages": list(messages)}


MARKED = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
UNMARKED = {"type": "text", "text": "hi"}
SYSTEM = turn("system", "be kind")


@pytest.mark.parametrize(
    "path, one, other, is_same",
    [
        (
            "/v1/messages",
            chat(turn("user", "hi")),
            chat(turn("user", "hi"), turn("assistant", "ho"), turn("user", "more")),
            True,
        ),
        (
            "/v1/messages",
            chat(turn("user", [MARKED])),
            chat(turn("user", [UNMARKED]), turn("assistant", "ho"), turn("user", [MARKED])),
            True,
        ),
        ("/v1/messages", chat(turn("user", "hi")), chat(turn("user", "hello")), False),
        ("/v1/messages", chat(turn("user", "hi")), chat(turn("user", "hi"), system="be rude"), False),
        (
            "/v1/chat/completions",
            chat(SYSTEM, turn("user", "hi")),
            chat(SYSTEM, turn("user", "hi"), turn("assistant", "ho"), turn("user", "more")),
            True,
        ),
        ("/v1/chat/completions", chat(SYSTEM, turn("user", "hi")), chat(SYSTEM, turn("user", "hello")), False),
    ],
)
def test_without_a_session_a_conversation_is_known_by_its_beginning(path, one, other, is_same):
    """
    System and first user message stay the same from request to request, also when the cache's mark moves on.
    """
    found = affinity(one, path), affinity(other, path)

    assert (found[0] == found[1]) is is_same
    assert "alice" not in found


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/messages", {"model": MODEL, "messages": "none"}),
        ("/v1/messages", {"model": MODEL, "messages": [1]}),
        ("/v1/responses", {"model": MODEL, "input": "hi"}),
        ("/v1/embeddings", {"model": MODEL, "input": "hi"}),
    ],
)
def test_what_has_no_beginning_is_kept_together_by_key(path, body):
    """
    Where neither a session nor a conversation can be seen, all calls of one key have one home.
    """
    found = affinity(body, path)

    assert found == "alice"


# --- the breaker ---------------------------------------------------------------------------


def breaker_world(more: str = "") -> World:
    """One upstream: three failures open its breaker for 10 s, then 20 and at most 40."""
    return World({"a": more}, "breaker: {failures: 3, cooldown: 10s, max_cooldown: 40s}")


@pytest.mark.parametrize(
    "cases, away_s",
    [
        (["529"], 0.0),
        (["529", "529"], 0.0),
        (["529", "unreachable", "cut"], 10.0),
        (["529", "529", "ok", "529", "529"], 0.0),
        (["529", "400", "529", "529"], 10.0),
        (["404", "404", "404", "413"], 0.0),
        (["connect_timeout", "first_byte_timeout", "mid_stream"], 10.0),
        (["unexpected", "not_http", "408"], 10.0),
        (["429", "429"], 10.0),
        (["401"], 0.0),
        (["401", "401"], 10.0),
        (["402", "402"], 10.0),
        (["401", "ok", "401"], 0.0),
        (["401", "402"], 0.0),
    ],
)
def test_failures_in_a_row_open_the_breaker(caplog, cases, away_s):
    """
    Three of them; an answer that came to its end begins anew, one that is the request's own fault says nothing.
    """
    world = breaker_world()

    for case in cases:
        with world.take() as ticket:
            if case == "ok":
                world.upstreams.record_answer(ticket)
                world.upstreams.record_success(ticket)
            else:
                world.upstreams.record_failure(ticket, case)

    assert world.upstreams.ready_in(world.call(), set()) == away_s
    assert (world.place() is None) is (away_s > 0)
    caplog.clear()


@pytest.mark.logs("is left alone")
def test_half_open_lets_exactly_one_through_and_its_answer_lets_in_the_others():
    """
    After the cooldown one call finds out; while it is out nobody else is let in; its first content opens the door.
    """
    world = breaker_world()
    world.fail("529", times=3)
    world.clock.advance(10)

    with world.take() as trial:
        during = world.place(), world.reported()
        world.upstreams.record_answer(trial)
        after = world.place(), world.reported()

    assert during == (None, {"a": "half_open"})
    assert after == (("a", 1), {"a": "ok"})


@pytest.mark.logs("is left alone")
def test_each_failed_trial_doubles_the_cooldown_up_to_the_most_and_an_end_begins_anew():
    """
    10, 20, 40, 40 seconds; after an answer that came to its end 10 again.
    """
    world = breaker_world()
    seconds = []

    world.fail("529", times=3)
    for _ in range(4):
        seconds.append(world.upstreams.ready_in(world.call(), set()))
        world.clock.advance(seconds[-1])
        world.fail("529")
    world.clock.advance(40)
    world.stream("s")
    world.fail("529", times=3)
    seconds.append(world.upstreams.ready_in(world.call(), set()))

    assert seconds == [10.0, 20.0, 40.0, 40.0, 10.0]


@pytest.mark.logs("is left alone")
@pytest.mark.parametrize("case", [None, "400", "429"])
def test_a_trial_without_a_word_on_the_upstream_lets_another_one_try(case):
    """
    A client that left says nothing: others try ten seconds later. An answer at all says that the upstream is up.
    """
    world = breaker_world("api_key: [key-1, key-2]")
    world.fail("529", times=3)
    world.clock.advance(10)

    with world.take() as trial:
        if case:
            world.upstreams.record_failure(trial, case)
    state, others = world.reported(), world.place()
    world.clock.advance(10)
    another = world.take()
    another.__exit__()

    assert state == {"a": "ok" if case else "half_open"}
    assert (others is None) is (case is None)
    assert another.choice.place == trial.choice.place
    assert world.running() == {"a": [0, 0, 0]}


@pytest.mark.logs("is left alone")
@pytest.mark.parametrize("is_closed", [False, True])
def test_failures_of_calls_that_began_before_the_trip_do_not_prolong_it(is_closed):
    """
    Ten calls of one bad moment are one trip, whenever their timeouts come: also when the trial was answered meanwhile.
    """
    world = breaker_world()
    tickets = [world.take() for _ in range(10)]
    for ticket in tickets[:3]:
        world.upstreams.record_failure(ticket, "first_byte_timeout")
    world.clock.advance(10)
    if is_closed:
        world.upstreams.record_answer(world.take())

    for ticket in tickets[3:]:
        world.upstreams.record_failure(ticket, "first_byte_timeout")
        ticket.__exit__()

    assert world.upstreams.ready_in(world.call(), set()) == 0.0
    assert world.place() == ("a", 1)


@pytest.mark.logs("is left alone")
def test_reset_forgets_what_spoke_against_an_upstream_and_its_keys():
    """
    After a reset everybody is let in, the next trip is a first one, and a trial of before has no say any more.
    """
    world = breaker_world()
    world.fail("401")
    world.upstreams.reset("a")
    world.fail("529", times=3)
    world.clock.advance(10)
    trial = world.take()

    world.upstreams.reset("a")
    after_reset = world.place(), world.reported()
    world.fail("529", times=3)
    seconds = world.upstreams.ready_in(world.call(), set())
    world.clock.advance(seconds)
    with world.take():
        trial.__exit__()
        during_the_next_trial = world.place()

    assert after_reset == (("a", 1), {"a": "ok"})
    assert seconds == 10.0
    assert during_the_next_trial is None


@pytest.mark.logs("its API key is left alone for 30 m: 401, the upstream refuses our API key")
def test_the_report_says_why_an_upstream_is_left_alone_since_when_and_until_when():
    """
    For each upstream and each of its keys; a key is told by its number only.
    """
    world = World(TWO_KEYS)
    world.clock.advance(60)

    _, number = world.refuse("401")

    (row,) = world.upstreams.report(world.config.upstreams)
    fine = {"state": "ok", "running": 0, "failures": 0}
    refused = {
        "state": "cooling",
        "running": 0,
        "failures": 2,
        "why": "401",
        "since": "2026-09-21T14:14:20.000Z",
        "until": "2026-09-21T14:44:20.000Z",
    }
    keys = [{"number": i, **(refused if i == number else fine)} for i in (1, 2)]
    assert row == {"name": "a", **fine, "state": "degraded", "keys": keys}


class NaiveRest:
    """One cooldown, on which users' failures it rests, and from when on their next call and the others' may try."""

    def __init__(self, now: float, trips: int, users: set[str]) -> None:
        self.until, self.trips, self.users = now + min(40.0, 10.0 * 2**trips), trips + 1, users
        self.door = self.others_door = g.TrialDoor(self.until)
        if users:
            self.others_door = g.TrialDoor(min(self.until, now + 10.0 * 2 ** max(0, len(users) - 2)))

    def door_of(self, user: str) -> g.TrialDoor:
        return self.door if user in self.users else self.others_door


class NaiveBreaker:
    """One breaker, as simple as it can be said: it rests for one user, a model, or all."""

    def __init__(self) -> None:
        self.era = self.failures = 0
        self.counts: Counter[str] = Counter()  # of each user
        self.doubted: dict[str, float] = {}  # whose cooldown an answer has ended, until when
        self.rests: dict[g.Whom, NaiveRest] = {}
        self.began: dict[g.Ticket, int] = {}
        self.tries: dict[g.Ticket, list[tuple[g.Whom, g.TrialDoor]]] = {}

    def doors_of(self, user: str) -> list[tuple[g.Whom, g.TrialDoor]]:
        return [(whom, rest.door_of(user)) for whom, rest in self.rests.items() if whom.user in ("", user)]

    def lets_in(self, user: str, now: float) -> bool:
        return all(now >= door.opens_at for _, door in self.doors_of(user))

    def begin(self, ticket: g.Ticket, now: float) -> None:
        self.began[ticket] = self.era
        self.tries[ticket] = self.doors_of(ticket.call.key.name)
        for _, door in self.tries[ticket]:
            if not door.is_tried:
                door.is_tried, door.opens_at = True, now + 10.0

    def tried(self, ticket: g.Ticket) -> list[g.Whom]:
        """Those that the call still finds out about; it does so once."""
        tries, self.tries[ticket] = self.tries[ticket], []
        rests = self.rests
        return [w for w, door in tries if w in rests and door in (rests[w].door, rests[w].others_door)]

    def answered(self, ticket: g.Ticket, now: float) -> None:
        for whom in self.tried(ticket):
            self.doubted.update(dict.fromkeys(self.rests.pop(whom).users, now + 600.0))

    def finished(self, ticket: g.Ticket) -> None:
        if self.began[ticket] == self.era:
            self.failures = 0
            self.counts.clear()
            self.rests = {whom: rest for whom, rest in self.rests.items() if not whom.user}

    def failed(self, ticket: g.Ticket, now: float, case: str) -> None:
        user, tried = ticket.call.key.name, self.tried(ticket)
        if any(whom.user == user and whom not in tried for whom in self.rests):
            return
        if self.began[ticket] != self.era and not tried:
            return
        for whom in tried:
            door = self.rests[whom].door_of(user)
            door.is_tried, door.opens_at = False, now
        self.failures += 1
        self.counts[user] += 1
        everybody = g.Whom(model=MODEL if case == "429" else "")
        is_again = everybody in tried
        if case == "unreachable" and (is_again or self.counts.total() >= 3):
            self.rest(everybody, now, set())
            return
        users = {name: count for name, count in self.counts.items() if now >= self.doubted.get(name, 0.0)}
        before = self.rests[everybody].users if is_again else set()
        is_often = len(users) > 1 and (case == "429" or sum(users.values()) >= 3)
        is_for_all = user in users and user not in before and (is_again or is_often)
        if is_for_all:
            self.rest(everybody, now, before | set(users))
        if tried or (not is_for_all and (case == "429" or self.counts[user] >= 3)):
            self.counts[user] = 1
            self.rest(g.Whom(user, everybody.model if is_again else ""), now, set())

    def rest(self, whom: g.Whom, now: float, users: set[str]) -> None:
        self.rests = {w: rest for w, rest in self.rests.items() if now <= max(rest.until, rest.door.opens_at) + 600}
        before = self.rests.get(whom)
        self.rests[whom] = NaiveRest(now, before.trips if before else 0, users)
        if users and before and before.users:
            self.rests[whom].door = before.door
        self.era += 1

    def left(self, ticket: g.Ticket) -> None:
        self.tries[ticket] = []

    def reset(self) -> None:
        self.failures = 0
        self.counts.clear()
        self.doubted.clear()
        self.rests.clear()
        self.era += 1


class BreakerMachine(RuleBasedStateMachine):
    """The breakers of an upstream and of its key against two naive ones."""

    def __init__(self) -> None:
        super().__init__()
        self.world = breaker_world()
        self.upstream, self.key = NaiveBreaker(), NaiveBreaker()
        self.tickets: list[g.Ticket] = []

    @property
    def now(self) -> float:
        return self.world.clock.now

    @rule(user=st.sampled_from(["", "", "alice", "bob"]))
    def begin(self, user) -> None:
        call = self.world.call_of(user)
        ticket = self.world.upstreams.take(call, set())
        is_let_in = all(naive.lets_in(call.key.name, self.now) for naive in (self.upstream, self.key))
        assert (ticket is not None) == is_let_in
        if ticket:
            self.tickets.append(ticket)
            self.upstream.begin(ticket, self.now)
            self.key.begin(ticket, self.now)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def answer(self, data) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        self.world.upstreams.record_answer(ticket)
        self.upstream.answered(ticket, self.now)
        self.key.answered(ticket, self.now)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), case=st.sampled_from(["ok", "529", "529", "unreachable", "429", "400", "gone"]))
    def end(self, data, case) -> None:
        ticket = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        if case == "ok":
            self.world.upstreams.record_answer(ticket)
            self.world.upstreams.record_success(ticket)
        elif case != "gone":
            self.world.upstreams.record_failure(ticket, case)
        ticket.__exit__()
        if case in ("ok", "400"):
            self.key.answered(ticket, self.now)
        if case in ("ok", "400", "429"):
            self.upstream.answered(ticket, self.now)
        if case == "ok":
            self.upstream.finished(ticket)
            self.key.finished(ticket)
        elif case == "429":
            self.key.failed(ticket, self.now, case)
        elif case in ("529", "unreachable"):
            self.upstream.failed(ticket, self.now, case)
        self.upstream.left(ticket)
        self.key.left(ticket)

    @rule(seconds=st.sampled_from([0.5, 5.0, 10.0, 20.0, 40.0]))
    def advance(self, seconds) -> None:
        self.world.clock.advance(seconds)

    @rule()
    def reset(self) -> None:
        self.world.upstreams.reset("a")
        self.upstream.reset()
        self.key.reset()

    @invariant()
    def counters_agree(self) -> None:
        (choice,) = self.world.upstreams.choices(self.world.config.upstreams[0])
        for health, naive in ((choice.health, self.upstream), (choice.key_health, self.key)):
            assert (health.running, health.failures) == (len(self.tickets), naive.failures)
            assert {
                whom: (rest.until, rest.door.opens_at, rest.others_door.opens_at, rest.trips, rest.witnesses)
                for whom, rest in health.cooldowns.items()
            } == {
                whom: (rest.until, rest.door.opens_at, rest.others_door.opens_at, rest.trips, rest.users)
                for whom, rest in naive.rests.items()
            }

    def teardown(self) -> None:
        for ticket in self.tickets:
            ticket.__exit__()
        assert self.world.running() == {"a": [0, 0]}


def test_the_breaker_does_what_a_naive_one_does(caplog):
    """
    Whatever order calls begin, fail, are answered and left in: the same calls are let in; trials are alone for 10 s.
    """
    run_state_machine_as_test(
        BreakerMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )

    caplog.clear()


# --- one user's matter, and everybody's ------------------------------------------------------


@pytest.mark.parametrize("case", ["401", "402", "403", "429", "500", "first_byte_timeout", "cut", "mid_stream"])
def test_one_user_takes_an_upstream_from_nobody(caplog, case):
    """
    Whatever one user's requests bring about, and however often, nothing is left alone for anybody else.
    """
    world = World({"a": ""})

    for _ in range(50):
        if world.is_let_in("mallory"):
            world.fail_for("mallory", case)
        world.clock.advance(1)

    assert world.reported() == {"a": "ok"} and world.place() == ("a", 1)
    assert "for the calls of mallory only" in caplog.text
    caplog.clear()


@pytest.mark.parametrize("case", ["401", "403", "500", "cut"])
def test_one_users_failures_among_others_successes_say_nothing(case):
    """
    However long they go on.
    """
    world = World({"a": ""})

    for _ in range(100):
        with world.take(user="mallory") as bad:
            world.upstreams.record_failure(bad, case)
        world.clock.advance(9)
        world.stream("s")

    assert world.place() == ("a", 1)


@pytest.mark.parametrize(
    ("met", "held_up"),
    [
        ("mallory 500, mallory 500", ""),
        ("mallory 500, mallory 500, mallory 500", "mallory"),
        ("mallory 403, mallory 403, mallory 403", "mallory"),
        ("mallory 401, mallory 401, mallory 401", "mallory"),
        ("mallory 500, mallory cut, bob ok, mallory 500, mallory cut", ""),
        ("mallory 500, mallory 500, mallory 500, bob ok", ""),  # the first success forgets all suspicion
        ("mallory 500, mallory 500, mallory 500, bob 500", "mallory"),  # who is held up alone is one failure
        ("mallory 500, mallory 500, mallory 500, bob 500, carol 500", "everybody"),
        ("mallory 500, bob 500, mallory 500", "everybody"),
        ("mallory 401, bob 401", "everybody"),
        ("mallory 401, mallory 401, mallory 401, bob 401", "everybody"),
        ("mallory 401, bob 402", ""),
        ("red/one 500, red/two 500, red/one 500", "red/three"),  # the keys of a team are one user
        ("mallory unreachable, mallory connect_timeout, mallory not_http", "everybody"),  # no request brings that about
    ],
)
def test_failures_hold_up_their_user_and_those_of_two_users_everybody(caplog, met, held_up):
    """
    Three in a row, of one user or of several; a refused API key at once with the second user.
    """
    world = World({"a": ""})

    for step in met.split(", "):
        user, case = step.split()
        team = user.rpartition("/")[0]
        if case == "ok":
            world.stream("s")
        else:
            world.fail_for(user, case, team=team)

    asked = {"mallory": "", "dave": "", "red/three": "red"}
    found = [user for user, team in asked.items() if not world.is_let_in(user, team=team)]
    whom = {"mallory": "the calls of mallory only", "red/three": "the calls of team red only"}
    assert found == (list(asked) if held_up == "everybody" else held_up.split())
    assert whom.get(held_up, "") in caplog.text
    caplog.clear()


@pytest.mark.parametrize(("case", "alone_s"), [("402", 1800.0), ("401", 1800.0), ("500", 10.0), ("cut", 10.0)])
def test_what_one_user_brought_about_alone_holds_up_only_that_user(caplog, case, alone_s):
    """
    At night, when nobody else's calls succeed: whoever comes then is asked for at once, also while a trial of the
    first one hangs and however often its trials fail. It counts as one failure; with as many of others' as are wanted
    in a row, or with another user for whom an API key is refused, all are kept out.
    """
    world = World({"a": ""})
    for _ in range(4):
        with world.take(user="mallory") as ticket:
            world.upstreams.record_failure(ticket, case)
        if world.upstreams.take(world.call_of("mallory"), set()) is None:
            break
        world.clock.advance(5)
    away_s = world.upstreams.ready_in(world.call_of("mallory"), set())
    world.clock.advance(away_s)
    with world.take(user="mallory") as trial:
        during_the_trial = world.place()
        world.upstreams.record_failure(trial, case)

    assert (away_s, during_the_trial) == (alone_s, ("a", 1))
    assert world.upstreams.take(world.call_of("mallory"), set()) is None
    assert world.upstreams.ready_in(world.call_of("bob"), set()) == 0.0
    world.fail_for("bob", case)
    assert (world.place() is None) == (case in g.REFUSED_KEY)
    if case not in g.REFUSED_KEY:
        world.fail_for("carol", case)
    assert world.place() is None
    caplog.clear()


# --- users who act together ------------------------------------------------------------------

PROVOKED = [("429", 1800.0), ("429", None), ("403", None), ("401", None), ("402", None), ("500", 60.0), ("cut", None)]


def waits_under_attack(case: str, retry_after_s: float | None, users: int, seconds: int) -> list[int]:
    """Bob's waits, who asks every five seconds, while some users do nothing but fail, and are always first."""
    world = World({"a": ""})
    since, waits = 0, []
    for now in range(seconds):
        for user in range(users):
            while world.is_let_in(f"mallory-{user}"):
                world.fail_for(f"mallory-{user}", case, retry_after_s)
        for choice, health in world.upstreams.take_suspects():
            world.upstreams.record_key_check(choice, health, 404)
        if now >= since and world.is_let_in("bob"):
            with world.take(user="bob") as ticket:
                world.upstreams.record_answer(ticket)
                world.upstreams.record_success(ticket)
            waits.append(now - since)
            since = now + 5
        world.clock.advance(1)
    assert waits and since > seconds - 200
    return waits


@pytest.mark.parametrize(
    ("users", "case", "retry_after_s", "longest_s", "all_s"),
    [
        *((2, case, retry_after_s, 10, 20) for case, retry_after_s in PROVOKED),
        (3, "429", None, 30, 60),
        (3, "500", 60.0, 30, 60),
        (5, "401", None, 150, 300),
    ],
)
def test_users_who_act_together_hold_up_another_one_for_seconds(caplog, users, case, retry_after_s, longest_s, all_s):
    """
    Two of them took an upstream, a model or an API key from everybody for all the time. Now two hold up the others for
    10 s, three for 30 s, which a call waits, and five for 150 s; then for ten minutes only themselves.
    """
    waits = waits_under_attack(case, retry_after_s, users, seconds=800)

    assert max(waits) <= longest_s and sum(waits) <= all_s
    caplog.clear()


@pytest.mark.logs("is left alone")
@pytest.mark.parametrize("case", ["429", "402"])
def test_the_more_users_met_it_the_longer_the_others_wait(case):
    """
    An account that is spent for half an hour is asked by one more user after 10, 20, 40 s and so on. Who has met it
    waits for as long as the upstream said (with jitter).
    """
    world = World({"a": ""})
    world.fail_for("user", case, 1700.0)
    others_s = []
    for number in range(9):
        world.fail_for(f"user {number}", case, 1700.0)
        others_s.append(world.upstreams.ready_in(world.call_of("bob"), set()))
        own_s = world.upstreams.ready_in(world.call_of(f"user {number}"), set())
        assert own_s == pytest.approx(1785.0)
        world.clock.advance(others_s[-1])

    assert others_s == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, pytest.approx(1785.0)]


@pytest.mark.logs("is left alone")
@pytest.mark.parametrize(("case", "retry_after_s", "away_s"), [("429", 600.0, 630.0), ("500", None, 10.0)])
def test_where_only_two_users_ask_both_are_held_up_for_as_long_as_the_upstream_said(case, retry_after_s, away_s):
    """
    What they met is all that there is to know. Of their calls one is the trial, and its failure holds up its user
    again; then the other one may try, and is held up as well.
    """
    world = World({"a": ""})
    world.fail_for("alice", case)
    if case == "500":
        world.fail_for("alice", case)
    world.fail_for("bob", case, retry_after_s)
    let_in = []

    for seconds in (away_s - 0.1, 0.1):
        let_in += [world.is_let_in("alice"), world.is_let_in("bob")]
        world.clock.advance(seconds)
    with world.take(user="bob") as trial:
        let_in.append(world.is_let_in("alice"))
        world.upstreams.record_failure(trial, case, retry_after_s)

    assert let_in == [False] * 5
    assert world.upstreams.ready_in(world.call_of("bob"), set()) == away_s
    world.fail_for("alice", case, retry_after_s)
    assert world.upstreams.ready_in(world.call_of("alice"), set()) == away_s
    assert world.is_let_in("carol")


@pytest.mark.logs("is left alone")
def test_what_was_answered_to_another_user_is_held_against_nobody_else_for_ten_minutes():
    """
    Those who met it before are held up alone, and one of them and a third user do not count as two.
    """
    world = World({"a": ""})
    for user in ("mallory", "trudy"):
        world.fail_for(user, "402")
    assert not world.is_let_in("bob")
    world.clock.advance(10)
    with world.take(user="bob") as trial:
        world.upstreams.record_answer(trial)
    found = []

    for case in ("401", "403"):
        for user in ("mallory", "trudy", "dave"):
            world.fail_for(user, case)
        found.append(world.is_let_in("carol"))
        world.clock.advance(300)
    world.fail_for("mallory", "402")
    found.append(world.is_let_in("carol"))

    assert found == [True, True, False]


@pytest.mark.logs("is left alone")
async def test_a_trial_of_a_user_who_has_met_it_keeps_nobody_else_waiting():
    """
    Two users' calls wait in front, take the trials, are silent, and fail: the others' is made beside them, and its
    answer ends the cooldown, although theirs began it anew meanwhile.
    """
    world = World({"a": ""})
    for user in ("mallory", "trudy"):
        world.fail_for(user, "429")
    waiting = []
    for user in ("mallory", "mallory", "trudy", "bob", "carol"):
        waiting.append(world.waiting(world.call_of(user))[0])
        await begun(world, len(waiting))

    world.clock.advance(10)
    world.upstreams.check()
    bad, good = await waiting[0], await waiting[3]
    is_alone = [task.done() for task in waiting] == [True, False, False, True, False]
    world.upstreams.record_failure(bad, "429")
    world.upstreams.record_answer(good)
    carol = await waiting[4]

    assert is_alone and bad.call.key.name == "mallory" and good.call.key.name == "bob"
    assert carol.call.key.name == "carol" and world.reported() == {"a": "ok"}
    world.upstreams.close()
    await asyncio.gather(*waiting)


@pytest.mark.logs("is left alone")
async def test_when_a_trial_fails_the_waiting_call_of_the_next_user_who_met_it_is_served():
    """
    At once, one after the other; the user whose trial failed waits on, and an answer lets in all the others.
    """
    world = World({"a": ""})
    for user in ("mallory", "alice", "bob"):
        world.fail_for(user)
    waiting = []
    for user in ("mallory", "mallory", "alice", "bob"):
        waiting.append(world.waiting(world.call_of(user))[0])
        await begun(world, len(waiting))
    first, second, alice, bob = waiting
    world.clock.advance(10)
    world.upstreams.check()

    with await first as trial:
        is_alone = not (second.done() or alice.done() or bob.done())
        world.upstreams.record_failure(trial, "500")
    with await alice as trial:
        is_next = not (second.done() or bob.done())
        world.upstreams.record_answer(trial)
    ticket = await bob

    assert is_alone and is_next and ticket.call.key.name == "bob" and not second.done()
    world.upstreams.close()
    await second


@pytest.mark.logs("is left alone")
def test_those_who_met_it_do_not_put_off_the_others_trial():
    """
    However often their own fails at the moment at which it may be made. Nor each other's: only of that model, and for
    itself alone.
    """
    world = World({"a": ""})
    for user in ("mallory", "trudy"):
        world.fail_for(user, "403")
    world.clock.advance(1800)
    states = []

    for user in ("mallory", "trudy"):
        world.fail_for(user, "403")
        states.append([world.is_let_in(user) for user in ("mallory", "trudy", "bob")])

    assert states == [[False, True, True], [False, False, True]]
    assert world.is_let_in("mallory", "claude-other")


def after_an_outage(users: list[str], enemies: list[str], silent_s: int, seconds: int = 300) -> tuple[int, int]:
    """The longest wait of users who met an outage and ask every second, and how often they ask in vain.

    The enemies are always first, and all their calls fail: at once, or after so long.
    """
    world = World({"a": ""})
    for user in users * 3:
        if world.is_let_in(user):
            world.fail_for(user)
    last, refusals, longest = dict.fromkeys(users, 0), 0, 0
    running: list[tuple[int, g.Ticket]] = []
    for now in range(seconds):
        for ends_at, ticket in tuple(running):
            if now >= ends_at:
                with ticket:
                    world.upstreams.record_failure(ticket, "500")
                running.remove((ends_at, ticket))
        for user in enemies:
            while len(running) < 10 and (ticket := world.upstreams.take(world.call_of(user), set())):
                running.append((now + silent_s, ticket))
                if not silent_s:
                    running.pop()
                    with ticket:
                        world.upstreams.record_failure(ticket, "500")
        for user in last:
            longest = max(longest, now - last[user])
            if user in enemies:
                continue
            if world.is_let_in(user):
                with world.take(user=user) as good:
                    world.upstreams.record_answer(good)
                    world.upstreams.record_success(good)
                last[user] = now
            else:
                refusals += 1
        world.clock.advance(1)
    for _, ticket in running:
        ticket.__exit__()
    return longest, refusals


@pytest.mark.parametrize(
    ("enemies", "silent_s", "longest_s"),
    [
        (["mallory"], 0, 10),
        (["mallory"], 7, 30),
        (["mallory"], 60, 20),
        (["mallory", "trudy", "oscar"], 0, 31),  # when it is over, they hold up the others as any three users do
    ],
)
@pytest.mark.parametrize("met", [1, 2, 3, 5])
def test_those_who_met_a_short_outage_wait_for_seconds_whatever_others_send(caplog, met, enemies, silent_s, longest_s):
    """
    One user whose requests fail won their trial each time, and they waited for 20, 40, 80 s and on without end.
    """
    users = [f"user {number}" for number in range(met)]
    longest, refusals = after_an_outage(users, enemies, silent_s)

    assert longest <= longest_s and refusals <= met * 50
    caplog.clear()


@pytest.mark.parametrize("users", [1, 2, 3, 10])
def test_an_upstream_that_is_down_is_asked_ten_times_in_half_an_hour_by_each_user(caplog, users):
    """
    Each waits for twice as long after each failed trial, at most for ten minutes: as many times as one alone would.
    """
    world = World({"a": ""})
    asked: Counter[str] = Counter()
    for _ in range(1800):
        for user in (f"user {number}" for number in range(users)):
            if world.is_let_in(user):
                asked[user] += 1
                world.fail_for(user)
        world.clock.advance(1)

    assert max(asked.values()) <= 10 and asked.total() <= 80
    caplog.clear()


@pytest.mark.logs("its API key is left alone for 30 m: 401")
def test_a_401_of_the_list_of_models_is_believed_without_users():
    """
    Also where two users were refused before it came: nobody tries before the half hour is over.
    """
    world = World({"a": ""})
    world.fail("401", times=2)
    before_s = world.upstreams.ready_in(world.call_of("carol"), set())

    ((choice, health),) = world.upstreams.take_suspects()
    for _ in range(2):
        world.upstreams.record_key_check(choice, health, 401)

    assert (before_s, world.upstreams.ready_in(world.call_of("carol"), set())) == (10.0, 1800.0)


# --- models, times and trials ----------------------------------------------------------------


@pytest.mark.logs("is left alone for")
def test_a_429_of_two_users_rests_an_api_key_for_its_model_only():
    """
    One user's may be for what that user asked (a long context, a fast mode), and holds up nobody else. Providers limit
    by model: of two users' the others wait who ask for that one, and /health says so.
    """
    world = World({"a": ""})

    world.fail_for("alice", "429", 1800.0)
    alone = [world.is_let_in("alice"), world.is_let_in("bob")]
    world.fail_for("bob", "429")
    (row,) = world.upstreams.report(world.config.upstreams)

    assert alone == [False, True]
    assert [world.is_let_in("carol", model) for model in (MODEL, "claude-other")] == [False, True]
    assert (row["state"], row["keys"][0]["state"], row["keys"][0]["for_one_model"]) == ("degraded", "cooling", True)
    world.clock.advance(10)
    assert world.is_let_in("carol")


@pytest.mark.logs("is left alone for")
async def test_a_waiting_call_for_a_model_that_rests_holds_up_no_other_model():
    """
    It is passed over and keeps its turn.
    """
    world = World({"a": "max_connections: 1"})
    world.fail_for("alice", "429")
    world.fail_for("carol", "429")
    busy = world.take(model="claude-other")
    held, _ = world.waiting(world.call_of("alice"))
    await begun(world, 1)
    other, _ = world.waiting(world.call_of("bob", model="claude-other"))
    await begun(world, 2)

    busy.__exit__()
    ticket = await other

    assert ticket.call.key.name == "bob" and not held.done()
    world.upstreams.close()
    await held


@pytest.mark.logs("is left alone")
@pytest.mark.parametrize("case", ["500", "503", "408", "529"])
def test_a_retry_after_said_to_one_user_holds_up_only_that_user(case):
    """
    It says how long, not whose fault it is: the others go on until the same has failed so often as without it. Who met
    it then waits no longer than the breaker's longest, and who did not for 20 s, because three users met it. A success
    of others does not shorten it.
    """
    world = World({"a": ""})

    world.fail_for("mallory", case, 60.0)
    world.stream("s")
    mallory, bob = (world.upstreams.ready_in(world.call_of(user), set()) for user in ("mallory", "bob"))
    state = world.reported()
    world.fail_for("bob", case, 60.0)
    carol = world.is_let_in("carol")
    world.fail_for("carol", case, 60.0)
    dave = world.is_let_in("dave")
    world.fail_for("dave", case, 1800.0)

    assert dave and 600.0 <= world.upstreams.ready_in(world.call_of("dave"), set()) <= 660.0
    assert world.upstreams.ready_in(world.call_of("erin"), set()) == 20.0
    assert (mallory, bob, carol, state) == (pytest.approx(63.0), 0.0, True, {"a": "ok"})
    assert not world.is_let_in("erin") and world.reported() == {"a": "cooling"}


@pytest.mark.logs("is left alone")
def test_a_trial_that_takes_long_keeps_nobody_out():
    """
    It is alone for ten seconds. What the others find out meanwhile holds: its own failure is then an ordinary one.
    """
    world = breaker_world()
    world.fail("529", times=3)
    world.clock.advance(10)

    with world.take() as slow:
        world.clock.advance(9.9)
        alone = world.place()
        world.clock.advance(0.1)
        others = [world.take() for _ in range(3)]
        world.upstreams.record_answer(others[0])
        world.upstreams.record_success(others[0])
        world.upstreams.record_failure(slow, "first_byte_timeout")
    for ticket in others:
        ticket.__exit__()

    assert (alone, world.place(), world.reported()) == (None, ("a", 1), {"a": "ok"})


def test_a_call_that_tries_again_and_again_is_one_failure():
    """
    Four attempts of one call are one bad request at most.
    """
    world = World({"a": ""})
    call = world.call()

    for _ in range(4):
        with world.upstreams.take(call, set()) as ticket:
            world.upstreams.record_failure(ticket, "unreachable")

    assert world.place() == ("a", 1)
    assert world.upstreams.report(world.config.upstreams)[0]["failures"] == 1


@pytest.mark.parametrize("case", ["401", "403"])
def test_a_key_that_gets_its_list_of_models_is_good(case):
    """
    What a call is refused with is then that call's matter, also if a second user asks the same.
    """
    world = World({"a": ""})
    world.fail(case)

    ((choice, health),) = world.upstreams.take_suspects()
    world.upstreams.record_key_check(choice, health, 200)
    world.fail(case, times=20)

    assert world.place() == ("a", 1) and world.upstreams.take_suspects() == []
    world.clock.advance(g.VOUCHED_S)
    world.fail(case)
    assert [suspect.place for suspect, _ in world.upstreams.take_suspects()] == [("a", 1)]


@pytest.mark.logs("its API key is left alone for 30 m: 401")
def test_a_key_that_gets_no_list_of_models_is_bad():
    """
    One call is refused with 401, and so is the question for the list: that is the key, without a second user.
    """
    world = World({"a": ""})
    world.fail("401")

    ((choice, health),) = world.upstreams.take_suspects()
    world.upstreams.record_key_check(choice, health, 401)

    assert world.upstreams.ready_in(world.call(), set()) == 1800.0


@pytest.mark.logs("its API key is left alone for claude-test only, for 30 m: 403")
def test_a_403_of_two_users_is_about_the_model_until_the_list_of_models_speaks_for_the_key():
    """
    A model that the project lacks is refused to all users; the key is good for the others.
    """
    world = World({"a": ""})

    world.fail("403", times=2)
    let_in = [world.is_let_in("carol", model) for model in (MODEL, "claude-other")]
    ((choice, health),) = world.upstreams.take_suspects()
    world.upstreams.record_key_check(choice, health, 200)

    assert let_in == [False, True]
    assert world.place() == ("a", 1)


@pytest.mark.parametrize("retry_after_s", [None, 900.0])
def test_count_tokens_has_a_health_of_its_own(caplog, retry_after_s):
    """
    A key without a budget for the one has it for the other, both ways round; what runs counts together.
    """
    for failing, other, most in (
        ("/v1/messages", "/v1/messages/count_tokens", 1),
        ("/v1/messages/count_tokens", "/v1/messages", 2),
    ):
        world = World({"a": "max_concurrent: 2"})
        with world.upstreams.take(world.call(path=failing), set()) as ticket:
            world.upstreams.record_failure(ticket, "429", retry_after_s)

        assert world.upstreams.take(world.call(path=failing), set()) is None
        held = [world.upstreams.take(world.call(path=other), set()) for _ in range(3)]
        assert [ticket is not None for ticket in held] == [True] * most + [False] * (3 - most)
    caplog.clear()


@pytest.mark.parametrize(
    ("settings", "most"),
    [("max_concurrent: 8", 4), ("max_concurrent: 1", 1), ("max_connections: 6", 3)],
)
def test_count_tokens_has_half_of_the_slots(settings, most):
    """
    One key's count_tokens calls, which are free, held all eight slots of an upstream.
    """
    world = World({"a": settings})

    def take(path: str) -> list[g.Ticket]:
        held = [world.upstreams.take(world.call(path=path), set()) for _ in range(10)]
        return [ticket for ticket in held if ticket]

    counting = take("/v1/messages/count_tokens")
    asking = take("/v1/messages")
    for ticket in counting:
        ticket.__exit__()
    asking += take("/v1/messages")
    for ticket in asking:
        ticket.__exit__()

    assert len(counting) == most and len(asking) == int(settings.split()[1])
    assert len(take("/v1/messages/count_tokens")) == most


async def test_a_waiting_count_tokens_call_holds_up_no_message(caplog):
    """
    Both wait for the same upstream, and find different things ready.
    """
    world = World({"a": ""})
    with world.upstreams.take(world.call(path="/v1/messages/count_tokens"), set()) as ticket:
        world.upstreams.record_failure(ticket, "429", 20.0)
    with world.upstreams.take(world.call(), set()) as ticket:
        world.upstreams.record_failure(ticket, "429", 2.0)

    counting, _ = world.waiting(world.call(path="/v1/messages/count_tokens"))
    asking, _ = world.waiting(world.call())
    await until(lambda: world.upstreams.waiting == 2)
    world.clock.advance(5)
    world.upstreams.check()

    assert (await asking) is not None and not counting.done()
    world.upstreams.close()
    await counting
    caplog.clear()


# --- when to come again ----------------------------------------------------------------------


def date(seconds: float) -> str:
    """An HTTP date, so many seconds from now."""
    return formatdate(START + seconds, usegmt=True)


@pytest.mark.parametrize(
    "headers, expected",
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"Retry-After": " 7 "}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "9" * 400}, 1800.0),
        ({"retry-after": "86400"}, 1800.0),
        ({"retry-after": date(90)}, 90.0),
        ({"retry-after": date(-90)}, None),
        ({"retry-after": date(7200)}, 1800.0),
        ({"retry-after": "30", "retry-after-ms": "1250"}, 1.25),
        ({"retry-after": "30", "retry-after-ms": "x"}, 30.0),
        ({"anthropic-ratelimit-requests-remaining": "0", "x-ratelimit-reset": "30"}, None),
        ({"retry-after": "9" * 64_000}, 1800.0),
    ],
)
def test_an_answer_says_when_to_come_again(headers, expected):
    """
    Seconds, a date, or milliseconds; at most half an hour.
    """
    seconds = g.read_retry_after([(name.encode(), value.encode()) for name, value in headers.items()], START)

    assert seconds == (expected if expected is None else pytest.approx(expected))


def test_a_date_without_a_zone_is_utc_wherever_the_gateway_runs(monkeypatch):
    """
    The machine's own zone has no say in when to come again.
    """
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()

    seconds = g.read_retry_after([(b"retry-after", b"Mon, 21 Sep 2026 14:13:50 -0000")], START)

    monkeypatch.undo()
    time.tzset()
    assert seconds == 30.0


HEADER_NAMES = [b"retry-after", b"retry-after-ms"]
VALUES = st.one_of(
    st.binary(max_size=20),
    st.just(b"0"),
    st.from_regex(r"-?[0-9]{1,30}(\.[0-9]+)?(ms|s|m|h|d)?", fullmatch=True).map(str.encode),
    st.from_regex(
        r"(Sun, )?[0-9]{1,3} (Nov|Feb) [0-9]{1,5} [0-9]{1,2}:[0-9.:]{1,8} ?(GMT|[+-][0-9]{1,6})?", fullmatch=True
    ).map(str.encode),
    st.datetimes().map(lambda when: when.isoformat().encode()),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(HEADER_NAMES), VALUES), max_size=2), st.sampled_from([0.0, START, 4e9]))
def test_no_header_makes_reading_it_fail(headers, now):
    """
    Whatever an upstream sends: nothing, or more than nothing and at most half an hour.
    """
    seconds = g.read_retry_after(headers, now)

    assert seconds is None or 0 < seconds <= 1800


# --- waiting -----------------------------------------------------------------------------


async def begun(world: World, number: int) -> None:
    """Let so many calls begin to wait."""
    await until(lambda: world.upstreams.waiting == number)


async def test_a_freed_slot_goes_to_whoever_has_waited_longest():
    """
    First come, first served, one slot after the other; at the end nothing is held and nobody waits.
    """
    world = World({"a": "max_connections: 1"})
    ticket, order = world.take(), []

    async def wait(i: int) -> None:
        task, _ = world.waiting(world.call(f"session-{i}"))
        with await task:
            order.append((i, world.running()["a"][0]))

    tasks = []
    for i in range(5):
        tasks.append(asyncio.ensure_future(wait(i)))
        await begun(world, i + 1)
    ticket.__exit__()
    await asyncio.gather(*tasks)

    assert order == [(i, 1) for i in range(5)]
    assert (world.running(), world.upstreams.waiting) == ({"a": [0, 0]}, 0)


async def test_a_freed_slot_goes_to_the_oldest_whom_it_fits():
    """
    Who may not be sent there does not keep those behind from it.
    """
    world = World({"a": 'models: ["x"], max_connections: 1', "b": 'models: ["y"], max_connections: 1'})
    at_a, at_b = world.take(model="x"), world.take(model="y")
    first, _ = world.waiting(world.call(model="x"))
    second, _ = world.waiting(world.call(model="y"))
    third, _ = world.waiting(world.call(model="y"))
    await begun(world, 3)

    at_b.__exit__()
    ticket = await second
    states = [task.done() for task in (first, second, third)]
    at_a.__exit__()
    others = await first
    ticket.__exit__()

    assert ticket.choice.upstream.name == "b" and others.choice.upstream.name == "a"
    assert states == [False, True, False]
    assert (await third).choice.upstream.name == "b"


async def test_so_many_wait_and_no_more():
    """
    Waiting calls hold their bodies: one too many is told at once that nobody is ready.
    """
    world = World({"a": "max_connections: 1"}, pace=g.Pace(waiting_calls=2))
    world.take()
    waiting = [world.waiting(world.call())[0] for _ in range(2)]
    await begun(world, 2)

    refused, _ = world.waiting(world.call())

    assert await refused is None
    assert [task.done() for task in waiting] == [False, False]
    world.upstreams.close()
    assert [await task for task in waiting] == [None, None]


def of_bob(call: g.Call) -> g.Call:
    """The call as another key's."""
    call.key = msgspec.structs.replace(call.key, name="bob")
    return call


async def test_keys_that_wait_for_an_upstream_have_their_turns_one_after_the_other():
    """
    Many calls of one key do not keep another key's call behind all of them, nor out of a full queue.
    """
    world = World({"a": "max_connections: 1"}, pace=g.Pace(waiting_calls=3))
    ticket, order = world.take(), []

    async def wait(name: str, call: g.Call) -> None:
        got = await world.waiting(call)[0]
        order.append(name if got else f"{name} had to leave")
        if got:
            got.__exit__()

    tasks = []
    for i, call in enumerate([world.call(), world.call(), world.call(), of_bob(world.call())]):
        tasks.append(asyncio.ensure_future(wait(f"{call.key.name} {i}", call)))
        await begun(world, min(i + 1, 3))
    await until(lambda: order)
    ticket.__exit__()
    await asyncio.gather(*tasks)

    assert order == ["alice 2 had to leave", "alice 0", "bob 3", "alice 1"]


async def test_a_freed_upstream_costs_the_same_however_many_wait():
    """
    The end of an attempt looks for one call that it suits, whoever else waits behind it.
    """
    found = []
    for count in (10, 200):
        world = World({"a": "max_connections: 1", "b": 'models: ["other"], max_connections: 1'})
        ticket, at_b = world.take(), world.take(model="other")
        tasks = [world.waiting(world.call(model=(MODEL, "other")[i % 2]))[0] for i in range(count)]
        await begun(world, count)
        found.append(calls_made(ticket.__exit__))
        assert world.upstreams.waiting == count - 1
        world.upstreams.close()
        await asyncio.gather(*tasks)
        at_b.__exit__()

    assert found[1] <= found[0]


def trip_for(world: World, user: str) -> None:
    """Calls of one user fail until the upstream is left alone for that user."""
    for _ in range(3):
        with world.take(user=user) as ticket:
            world.upstreams.record_failure(ticket, "500")
        world.clock.advance(5)


@pytest.mark.logs("is left alone")
@pytest.mark.parametrize("has_left", [False, True])
async def test_a_user_for_whom_an_upstream_is_left_alone_holds_up_no_other_users_waiting_call(has_left):
    """
    All slots are taken and the failing user's call waits first: the next free slot is for the call behind it, past one
    whose client has just left. The call that was passed over keeps its turn until the cooldown ends.
    """
    world = World({"a": "max_connections: 2"})
    trip_for(world, "mallory")
    ticket, other = world.take(), world.take()
    passed_over, _ = world.waiting(world.call_of("mallory"))
    await begun(world, 1)
    first, leave = world.waiting(world.call_of("bob"))
    second, _ = world.waiting(world.call_of("bob"))
    await begun(world, 3)

    if has_left:
        leave.set_result(None)
        await asyncio.sleep(0)  # it is told so, and still stands in the queue
    assert world.upstreams.waiting == 3
    ticket.__exit__()
    behind = second if has_left else first
    await until(behind.done)
    served, is_held = await behind, not passed_over.done()
    world.clock.advance(10)
    served.__exit__()
    trial = await passed_over
    trial.__exit__()
    other.__exit__()
    rest = await (first if has_left else second)

    assert is_held and served.call.key.name == "bob"
    assert trial.call.key.name == "mallory"
    assert (rest is None) == has_left
    world.upstreams.close()


@pytest.mark.logs("its API key is left alone for the calls of mallory only, for 30 m: 401")
def test_only_the_user_for_whom_an_api_key_is_left_alone_is_told_that_it_is_refused():
    """
    Whoever else finds nobody ready has another reason.
    """
    world = World({"a": ""})
    for _ in range(3):
        with world.take(user="mallory") as ticket:
            world.upstreams.record_failure(ticket, "401")
        world.clock.advance(5)

    assert world.upstreams.refused_key(world.call_of("mallory")) == ("a", "401")
    assert world.upstreams.refused_key(world.call_of("bob")) is None


@pytest.mark.logs("is left alone")
async def test_passing_over_a_user_costs_the_same_however_many_wait():
    """
    With no slot free, or one, and the failing user's call first: at most one more call is looked at.
    """
    found = []
    for count in (10, 2000):
        world = World({"a": "max_connections: 2"}, pace=g.Pace(waiting_calls=5000))
        trip_for(world, "mallory")
        ticket, other = world.take(), world.take()
        tasks = [world.waiting(world.call_of(user))[0] for user in ["mallory", *(f"user {i}" for i in range(count))]]
        await begun(world, count + 1)
        full = calls_made(world.upstreams.wake)
        found.append((full, calls_made(ticket.__exit__)))
        assert world.upstreams.waiting == count
        world.upstreams.close()
        await asyncio.gather(*tasks)
        other.__exit__()

    assert found[1] == found[0]


async def test_a_wait_ends_at_its_deadline():
    """
    The clock's next look after it ends the wait with nothing; not one before.
    """
    world = World({"a": "max_connections: 1"})
    world.take()
    task, _ = world.waiting(world.call(), until_s=30)
    await begun(world, 1)

    world.clock.advance(29.9)
    world.upstreams.check()
    before = task.done()
    world.clock.advance(0.1)
    world.upstreams.check()

    assert (before, await task) == (False, None)
    assert not world.upstreams.waiting


@pytest.mark.parametrize("is_early", [True, False])
async def test_a_wait_ends_when_the_client_leaves(is_early):
    """
    Also where it had left before: nobody keeps a place for it, and the slot goes to the next.
    """
    world = World({"a": "max_connections: 1"})
    ticket = world.take()
    task, gone = world.waiting(world.call())
    if not is_early:
        await begun(world, 1)
    gone.set_result(None)

    found = await task

    assert (found, world.upstreams.waiting) == (None, 0)
    ticket.__exit__()
    assert world.running() == {"a": [0, 0]}


@pytest.mark.logs("is left alone for 30 m")
@pytest.mark.parametrize("until_s, is_kept", [(1799.0, False), (1800.0, True)])
async def test_a_call_for_which_nobody_can_be_ready_in_time_does_not_wait(until_s, is_kept):
    """
    It is refused at once, not after its time; where the cooldown ends in time it gets the trial.
    """
    world = World({"a": ""})
    world.fail("401")
    ((choice, health),) = world.upstreams.take_suspects()
    world.upstreams.record_key_check(choice, health, 401)

    task, _ = world.waiting(world.call(), until_s=until_s)
    await until(lambda: task.done() or world.upstreams.waiting)
    waits = world.upstreams.waiting
    world.clock.advance(1800)
    world.upstreams.check()
    found = await task

    assert (waits, found is not None) == ((1, True) if is_kept else (0, False))


async def test_a_call_that_has_tried_everybody_does_not_wait():
    """
    Nobody is left who could be ready for it.
    """
    world = World({"a": ""})

    task, _ = world.waiting(world.call(), tried=[("a", 1)])

    assert await task is None


async def test_a_wait_begins_to_count_from_its_moment_on():
    """
    A backoff: what is free before that moment goes to others, and a moment past the deadline is not waited for.
    """
    world = World({"a": ""})
    late, _ = world.waiting(world.call(), until_s=5, not_before=6)
    task, _ = world.waiting(world.call(), until_s=5, not_before=2)
    await begun(world, 1)

    looked = []
    for _ in range(3):
        world.upstreams.check()
        looked.append(world.running()["a"][0])
        world.clock.advance(1)
    ticket = await task

    assert (looked, await late) == ([0, 0, 1], None)
    ticket.__exit__()


@pytest.mark.parametrize("has_ticket", [True, False])
async def test_a_cancelled_wait_gives_its_slot_back(has_ticket):
    """
    Cancelled in the very turn in which a ticket was handed to it, or before: the slot goes to the next.
    """
    world = World({"a": "max_connections: 1"})
    ticket = world.take()
    task, _ = world.waiting(world.call())
    behind, _ = world.waiting(world.call())
    await begun(world, 2)

    if has_ticket:
        ticket.__exit__()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if not has_ticket:
        ticket.__exit__()
    (await behind).__exit__()

    assert (world.running(), world.upstreams.waiting) == ({"a": [0, 0]}, 0)


@pytest.mark.logs("is left alone")
async def test_an_answered_trial_lets_in_those_who_wait():
    """
    One of them is the trial; its answer wakes all the others at once, before it has ended.
    """
    world = breaker_world()
    world.fail("529", times=3)
    tasks = [world.waiting(world.call())[0] for _ in range(3)]
    await begun(world, 3)

    world.clock.advance(10)
    world.upstreams.check()
    trial = await tasks[0]
    alone = world.running()["a"][0]
    world.upstreams.record_answer(trial)
    others = await asyncio.gather(*tasks[1:])

    assert (alone, world.running()["a"][0], all(others)) == (1, 3, True)


@pytest.mark.logs("is left alone")
async def test_a_reset_wakes_those_who_wait():
    """
    Whoever puts an upstream right need not wait for its cooldown.
    """
    world = World({"a": ""})
    world.fail("429")
    by_reset, _ = world.waiting(world.call())
    await begun(world, 1)

    world.upstreams.reset("a")
    ticket = await by_reset

    assert ticket.choice.place == ("a", 1)


@given(st.integers(0, 2000), st.floats(0, 1, exclude_max=True))
def test_a_backoff_doubles_up_to_the_most_with_jitter(rounds, chance):
    """
    Half to all of 0.5 s, 1 s, 2 s … and at most 8 s.
    """
    upstreams = g.Upstreams(FakeClock().clock, g.Pace(), chance=lambda: chance)

    seconds = upstreams.backoff_s(min(rounds, 20))

    whole = min(8.0, 0.5 * 2 ** min(rounds, 20))
    assert whole / 2 <= seconds <= whole


# --- two hours -----------------------------------------------------------------------------


class Hours:
    """Sessions that call every 20 s, on upstreams with bad times; calls are retried as the relay does."""

    END = 7200.0

    def __init__(self) -> None:
        self.world = World(THREE, "max_attempts: 4")
        self.home = {session: self.world.name(session) for session in SESSIONS[:60]}
        self.calls: Counter[str] = Counter()
        self.at_home: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.nobody = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), what))

    @staticmethod
    def trouble(name: str, now: float) -> tuple[str, float | None] | None:
        """What an upstream fails with at a time."""
        if name == "a" and 2000 <= now < 2120:
            return "unreachable", None
        if name == "b" and now % 1200 >= 1170:  # now and then its rate limit is spent
            return "429", 30.0
        if name == "c" and (700 <= now < 760 or 3100 <= now < 3160 or 5500 <= now < 5560):
            return "529", None
        return None

    def run(self) -> None:
        """Let the two hours pass."""
        for i, session in enumerate(self.home):
            for n in range(360):
                self.at(n * 20 + i / 3, lambda session=session: self.ask(self.world.call(session), frozenset(), 1))
        while self._events:
            when, _, what = heapq.heappop(self._events)
            self.world.clock.now = when
            what()

    def ask(self, call: g.Call, tried: frozenset[Place], attempt: int) -> None:
        """One attempt."""
        upstreams = self.world.upstreams
        if attempt == 1:
            self.calls[call.session] += 1
        ticket = upstreams.take(call, set(tried))
        if ticket is None or attempt > 4:
            self.nobody += 1
            return
        name, now = ticket.choice.upstream.name, self.world.clock.now
        self.attempts[name] += 1
        trouble = self.trouble(name, now)
        if trouble:
            self.at(now + 0.3, lambda: self.failed(ticket, trouble, tried, attempt))
        else:
            self.at_home[call.session] += name == self.home[call.session]
            self.at(now + 1.5, lambda: upstreams.record_answer(ticket))
            self.at(now + 12.0, lambda: self.finished(ticket))

    def failed(
        self, ticket: g.Ticket, trouble: tuple[str, float | None], tried: frozenset[Place], attempt: int
    ) -> None:
        """An attempt failed: another one follows at once."""
        with ticket:
            self.world.upstreams.record_failure(ticket, *trouble)
        self.ask(ticket.call, tried | {ticket.choice.place}, attempt + 1)

    def finished(self, ticket: g.Ticket) -> None:
        """An answer came to its end."""
        with ticket:
            self.world.upstreams.record_success(ticket)


def test_over_two_bad_hours_sessions_stay_at_home_and_every_call_finds_somebody(caplog):
    """
    Sixty sessions, 21,600 calls; one upstream away for two minutes, one out of its rate limit every twenty, one with
    bursts of 529: each session has at least 95 % of its calls at home, and no call finds nobody.
    """
    hours = Hours()

    hours.run()

    shares = {session: hours.at_home[session] / hours.calls[session] for session in hours.home}
    assert (sum(hours.calls.values()), hours.nobody) == (21_600, 0)
    assert {session: share for session, share in shares.items() if share < 0.95} == {}
    assert sum(hours.attempts.values()) - 21_600 < 216  # attempts in vain: less than one in a hundred
    assert hours.world.running() == {"a": [0, 0], "b": [0, 0], "c": [0, 0]}
    caplog.clear()


# --- addresses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, expected",
    [
        ("169.254.169.254", True),
        ("169.254.0.1", True),
        ("::ffff:169.254.169.254", True),
        ("fe80::1", True),
        ("fe80::1%eth0", True),
        ("fd00:ec2::254", True),
        ("fd20:ce::254", True),
        ("100.100.100.200", True),
        ("::ffff:100.100.100.200", True),
        ("192.0.0.192", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("8.8.8.8", False),
        ("100.100.100.201", False),
        ("::1", False),
        ("::", False),
        ("fd00::1", False),
        ("2606:4700::1111", False),
        ("metadata.google.internal", False),
        ("", False),
    ],
)
def test_link_local_and_metadata_addresses_are_forbidden(address, expected):
    """
    Also an IPv4 address that is written as IPv6; a name is looked at when it is resolved. Private networks are allowed.
    """
    found = g.is_forbidden(address)

    assert found is expected


def mistake_of(text: str, clock: FakeClock) -> str:
    """What is wrong with a config, "" if nothing."""
    try:
        g.Config.parse(text, Path("config.yaml"), clock.clock, {})
    except g.ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "url, more, problem",
    [
        ("http://169.254.169.254/", "", "is a link-local or metadata address; see allow_private"),
        ("https://[fe80::1]/", "", "is a link-local or metadata address; see allow_private"),
        ("http://169.254.169.254/", ", allow_private: true", ""),
        ("http://10.0.0.1/", "", ""),
    ],
)
def test_a_config_with_a_forbidden_address_is_refused(clock, url, more, problem):
    """
    An address that stands in the file is told before anybody connects to it.
    """
    text = f"upstreams:\n  - {{name: a, url: '{url}', api_key: k{more}}}\n"

    said = mistake_of(text, clock)

    assert said == (problem and f"config.yaml:2: upstreams[0].url: {problem}")


# --- headers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, globs, expected",
    [
        (b"a-2025,b-2025", ["a-*"], b"b-2025"),
        (b"a-2025 , b-2025,c", ["b-2025"], b"a-2025, c"),
        (b"a,b", ["a", "b"], b""),
        (b"a,b", ["c"], b"a, b"),
        (b"a,b", ["*"], b""),
        (b"A", ["a"], b"A"),
        (b"", ["a"], b""),
        (b"\xff-1,b", ["b"], b"\xff-1"),
    ],
)
def test_betas_that_match_do_not_go_upstream(value, globs, expected):
    """
    The others stay, in their order; white space does not count.
    """
    kept = g.drop_betas(value, globs)

    assert kept == expected


CLIENT_HEADERS: g.Headers = [
    (b"Anthropic-Beta", b"a-2025,b-2025"),
    (b"anthropic-version", b"2023-06-01"),
    (b"User-Agent", b"claude-cli/2"),
    (b"X-App", b""),
    (b"x-api-key", b"sk-proxy-secret"),
    (b"anthropic-beta", b"a-2026"),
]


@pytest.mark.parametrize(
    "more, expected",
    [
        (
            "",
            [
                "Anthropic-Beta: a-2025,b-2025",
                "anthropic-version: 2023-06-01",
                "User-Agent: claude-cli/2",
                "X-App: ",
                "anthropic-beta: a-2026",
            ],
        ),
        (
            'betas: {drop: ["a-*"]}',
            ["Anthropic-Beta: b-2025", "anthropic-version: 2023-06-01", "User-Agent: claude-cli/2", "X-App: "],
        ),
        (
            "headers: {set: {user-agent: gateway, X-Org: o-1}, remove: [X-APP, anthropic-beta]}",
            ["anthropic-version: 2023-06-01", "user-agent: gateway", "X-Org: o-1"],
        ),
        (
            'headers: {set: {X-Org: o-1}}, betas: {drop: ["*"]}',
            ["anthropic-version: 2023-06-01", "User-Agent: claude-cli/2", "X-App: ", "X-Org: o-1"],
        ),
    ],
)
def test_an_upstream_has_its_rules_for_headers(more, expected):
    """
    What is set stands once, what is removed is gone in any case, and the gateway's own lines stay first.
    """
    world = World({"a": more})
    call, upstream = world.call(headers=CLIENT_HEADERS), world.config.upstreams[0]

    head = g.request_head(call, call.route.path, upstream, "key-1", g.UpstreamTarget.of(upstream.url, None), 7)

    own = ["POST /v1/messages HTTP/1.1", "host: a.test", "content-length: 7", "accept-encoding: identity"]
    assert head.decode().split("\r\n") == [*own, "x-api-key: key-1", *expected, "", ""]


def test_an_upstream_may_have_its_credential_in_a_header_of_its_own():
    """
    Setting x-api-key or removing it is how: what the gateway would send there is gone.
    """
    world = World({"a": "headers: {set: {Authorization: Bearer t}, remove: [x-api-key]}"})
    upstream = world.config.upstreams[0]

    head = g.request_head(world.call(), "/v1/messages", upstream, "key-1", g.UpstreamTarget.of(upstream.url, None), 0)

    assert b"Authorization: Bearer t\r\n" in head
    assert b"key-1" not in head


@pytest.mark.parametrize("rule", ["set: {%s: x}", "remove: [%s]"])
@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "connection", "host", "accept-encoding"])
def test_headers_that_the_gateway_needs_cannot_be_set_or_removed(clock, rule, name):
    """
    Without its framing a request would run into the next one, and compressed answers could not be counted.
    """
    text = f"upstreams:\n  - name: a\n    url: http://a.test\n    headers:\n      {rule % name}\n"
    is_allowed = rule.startswith("set") and name == "host"

    said = mistake_of(text, clock)

    assert said.startswith("" if is_allowed else "config.yaml:5: upstreams[0].headers.")
    assert bool(said) is not is_allowed


@pytest.mark.parametrize(
    "name",
    [
        *("Content-Length", "connection", "host", "accept-encoding", "Cookie", "Authorization", "x-api-key", "api-key"),
        *("X-Goog-*", "x-amz-security-token", "OpenAI-Organization", "openai-project", "X-Forwarded-For", "CF-*"),
        *("true-client-ip", "x-team-token", "x-ms-client-principal-id", "X-MS-Client-Principal-Name", "x y", ""),
    ],
)
def test_headers_that_no_client_may_send_up_cannot_be_let_through(clock, name):
    """
    A credential, an account or an address of a client is told when the config is read.
    """
    text = f"upstreams:\n  - name: a\n    url: http://a.test\n    headers:\n      pass: [x-team, '{name}']\n"

    with pytest.raises(g.ConfigError, match=r"config\.yaml:5: upstreams\[0\]\.headers\.pass\[1\]: (no|expected) "):
        g.Config.parse(text, Path("config.yaml"), clock.clock, {})

    (upstream,) = g.Config.parse(text.replace(f", '{name}'", ""), Path("config.yaml"), clock.clock, {}).upstreams
    assert upstream.headers.passes == ("x-team",)


# --- without thinking -------------------------------------------------------------------------

THINKING = b'{"type":"thinking","thinking":"hm","signature":"x"}'
REDACTED = b'{"type":"redacted_thinking","data":"y"}'
USE = b'{"type":"tool_use","id":"t1","name":"f","input":{"n": 1.50, "big": 12345678901234567890123, "s": "\\u00e9"}}'
TEXT = b'{"type":"text","text":"ho"}'
RESULT = b'{"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":"4"}]}'
ON = b'"thinking":{"type":"enabled","budget_tokens":1024},"context_management":{"edits":[{"type":"clear_thinking"}]}'


def request(*turns: bytes, more: bytes = ON) -> bytes:
    """A Messages request of these turns."""
    return b'{"model":"m",%b"temperature":1.0,"messages":[%b]}' % (more + b"," if more else b"", b",".join(turns))


def user(text: bytes) -> bytes:
    """A user's turn."""
    return b'{"role":"user","content":"%b"}' % text


def assistant(*blocks: bytes) -> bytes:
    """An assistant's turn."""
    return b'{"role":"assistant","content":[%b]}' % b",".join(blocks)


@pytest.mark.parametrize(
    "before, after",
    [
        (
            request(user(b"hi"), assistant(THINKING, TEXT), user(b"more")),
            request(user(b"hi"), assistant(TEXT), user(b"more")),
        ),
        (
            request(user(b"hi"), assistant(REDACTED, THINKING, USE), RESULT),
            request(user(b"hi"), assistant(USE), RESULT, more=b""),
        ),
        (
            request(user(b"hi"), assistant(THINKING, USE), RESULT, assistant(THINKING, TEXT), user(b"more")),
            request(user(b"hi"), assistant(USE), RESULT, assistant(TEXT), user(b"more")),
        ),
        (request(user(b"hi"), assistant(THINKING), user(b"more")), request(user(b"hi"), user(b"more"))),
        (request(user(b"hi"), assistant(USE), RESULT), request(user(b"hi"), assistant(USE), RESULT, more=b"")),
        (
            request(user(b"hi"), b'{"role":"assistant","content":"ho"}', user(b"more")),
            request(user(b"hi"), b'{"role":"assistant","content":"ho"}', user(b"more")),
        ),
        (
            request(user(b'is \\"tool_result\\" in a chain?')),
            request(user(b'is \\"tool_result\\" in a chain?')),
        ),
        (request(), request()),
    ],
)
def test_thinking_is_taken_out_of_a_request(before, after):
    """
    Thinking blocks go, and a turn with nothing else; the bytes of all else stay, for the prompt cache. The setting
    itself goes only inside a chain of tool calls, where the API wants the blocks that are gone.
    """
    body = g.without_thinking(before)

    assert body == after


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no",
        b"[]",
        b"{}",
        b'{"messages": 1}',
        b'{"messages": [1]}',
        b'{"messages": null}',
        b'{"messages": [{"role": "assistant"}]}',
        b'{"messages": [{"role": "assistant", "content": [1]}]}',
        b'{"messages": [{"role": "assistant", "content": [{"type": "text"]}]}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": "assistant", "content": ["\xff"]}]}',
    ],
)
def test_a_body_that_is_not_as_expected_is_the_clients_fault(body):
    """
    The client is told, and nothing else is raised.
    """
    with pytest.raises(g.BadRequest, match="is not as expected"):
        g.without_thinking(body)


# --- verdicts -------------------------------------------------------------------------------


def verdict(overrides: str, case: str) -> g.Verdict:
    """What a case means under these overrides."""
    return World({"a": f"verdicts: {{{overrides}}}"}).config.upstreams[0].verdict(case)


@pytest.mark.parametrize(
    "overrides, case, expected",
    [
        ("", "404", (True, "none", 0.0, True)),
        ("", "418", (False, "none", 0.0, True)),
        ("", "529", (True, "upstream", 0.0, True)),
        ("", "429", (True, "key", 10.0, True)),
        ("", "mid_stream", (False, "upstream", 0.0, False)),
        ("404: {next: false}", "404", (False, "none", 0.0, True)),
        ("404: {next: false}", "405", (False, "none", 0.0, True)),
        ("5xx: {blame: none}", "500", (True, "none", 0.0, True)),
        ("5xx: {blame: none}", "529", (True, "none", 0.0, True)),
        ("529: {cooldown: 1m}", "529", (True, "upstream", 60.0, True)),
        ("529: {cooldown: 1m}", "500", (True, "upstream", 0.0, True)),
        ("5xx: {blame: none}, 529: {cooldown: 1m, pass: false}", "529", (True, "none", 60.0, False)),
        ("5xx: {blame: none}, 529: {blame: key}", "529", (True, "key", 0.0, True)),
        ("4xx: {next: true}", "404", (True, "none", 0.0, True)),
        ("4xx: {next: true}", "422", (True, "none", 0.0, True)),
        ("4xx: {pass: false}", "404", (True, "none", 0.0, True)),
        ("429: {cooldown: 0s}", "429", (True, "key", 0.0, True)),
        ("cut: {next: false, blame: key, cooldown: 5s, pass: true}", "cut", (False, "key", 5.0, True)),
        ("404: {}", "404", (True, "none", 0.0, True)),
        ("own_trouble: {next: false}", "own_trouble", (False, "none", 0.0, False)),
    ],
)
def test_verdicts_are_overridden_field_by_field(overrides, case, expected):
    """
    What is not said stays as it is: in the row of the status, else in the row of its hundred as it holds here.
    """
    _, *found = verdict(overrides, case)

    assert tuple(found) == expected


@pytest.mark.parametrize(
    "case, problem",
    [
        ("nonsense: {next: false}", "verdicts.nonsense: unknown case (there are: a status, own_trouble,"),
        ("999: {next: false}", "verdicts.999: unknown case"),
        ("40: {next: false}", "verdicts.40: unknown case"),
        ("404: {nxt: false}", "verdicts.404.nxt: unknown setting, did you mean next?"),
        ("404: {blame: me}", "verdicts.404.blame: expected none, key or upstream, got 'me'"),
        (
            "404: {cooldown: soon}",
            "verdicts.404.cooldown: expected a duration such as 30s (units: ms, s, m, h, d), got 'soon'",
        ),
        ("404: {next: 7}", "verdicts.404.next: expected true or false, got 7"),
        ("404: no", "verdicts.404: expected a mapping such as {next: …}, got false"),
        ("own_trouble: {blame: key}", "verdicts.own_trouble: what this gateway lacks is no upstream's fault:"),
        ("own_trouble: {next: true, cooldown: 1m}", "verdicts.own_trouble: what this gateway lacks is no"),
        ("own_trouble: {pass: true}", "verdicts.own_trouble: what this gateway lacks is no upstream's fault:"),
    ],
)
def test_a_wrong_override_is_told_with_its_line_and_place(clock, case, problem):
    """
    File, line, path and what would be right.
    """
    text = f"upstreams:\n  - name: a\n    url: http://a.test\n    verdicts:\n      500: {{}}\n      {case}\n"

    with pytest.raises(g.ConfigError) as told:
        g.Config.parse(text, Path("config.yaml"), clock.clock, {})

    assert str(told.value).startswith(f"config.yaml:6: upstreams[0].{problem}")

"""Failover: what an upstream does wrong before its first content is nobody's business but ours."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import itertools
import json
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest
from client import Reply, request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, UPSTREAM_KEY, GatewayUnderTest, passing_time, until
from upstream import (
    Request,
    Script,
    ScriptedUpstream,
    Step,
    body,
    chat_chunk,
    chat_done,
    close,
    end,
    error_event,
    event,
    garbage,
    head,
    json_body,
    message_json,
    message_start,
    ping,
    raw,
    reset_peer,
    stall,
    stream_of,
    wait_for,
)

import gateway as g

SSE = "text/event-stream"
NAMES = ("a", "b", "c")
BOB = "sk-proxy-zyxwvutsrqponmlkjihgfedcba987654"  # another user's key


def config_of(upstreams: dict[str, str], routing: str = "", more: dict[str, str] | None = None) -> str:
    """A config with upstreams by name and URL; `more` is what each has besides."""
    lines = [
        f"  - {{name: {name}, url: '{url}', api_key: {UPSTREAM_KEY}-{name}{(more or {}).get(name, '')}}}"
        for name, url in upstreams.items()
    ]
    return "\n".join(
        [
            "server: {host: 127.0.0.1, port: 0, contact: ops}",
            "upstreams:",
            *lines,
            f"keys: [{{name: alice, key: {KEY}}}, {{name: bob, key: {BOB}}}]",
            "usage: {directory: usage, fsync: never}",
            f"routing: {{{routing}}}",
            "",
        ]
    )


@pytest.fixture
def upstreams(io_loop) -> Iterator[dict[str, ScriptedUpstream]]:
    """Three upstreams, each of which says its name and what it was asked."""
    made = {name: ScriptedUpstream() for name in NAMES}
    for name, each in made.items():
        io_loop.run_sync(each.start)
        each.script = good(name)
    yield made
    for each in made.values():
        io_loop.run_sync(each.close)


def good(name: str) -> Script:
    """An answer that tells who gave it, and to what; a stream where one was asked for."""

    def script(request: Request) -> list[Step]:
        asked = request.json["messages"][0]["content"]
        words = [f"{name} ", "heard ", asked]
        return stream_of(*words) if request.json.get("stream") else message_json("".join(words))

    return script


def ask_of(number: int, stream: bool = True) -> dict:
    """A request that no other is like, of a session of its own."""
    return HELLO | {"stream": stream, "messages": [{"role": "user", "content": f"question {number}"}]}


def texts_of(reply: Reply) -> list[str]:
    """What was said, of either kind of answer."""
    return reply.texts or ["".join(block["text"] for block in reply.json["content"])]


def is_whole(reply: Reply, number: int, stream: bool) -> bool:
    """Whether the client got one upstream's whole answer to its very question, byte for byte."""
    wanted = []
    for name in NAMES:
        words = [f"{name} ", "heard ", f"question {number}"]
        wanted.append(written(stream_of(*words) if stream else message_json("".join(words))))
    return reply.status == 200 and not reply.was_cut and reply.body in wanted


def written(script: list[Step]) -> bytes:
    """The body that a script's steps write."""

    class Recorder:
        chunked = False
        body = b""

        async def write(self, data: bytes) -> None: ...
        async def piece(self, data: bytes) -> None:
            self.body += data

    async def record() -> bytes:
        recorder = Recorder()
        for step in script:
            await step(recorder)
        return recorder.body

    coroutine = record()
    with contextlib.closing(coroutine):
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value
    raise AssertionError("a step that waits")


def api_error(status: int, kind: str, **headers: str) -> list[Step]:
    """An error in the API's own words."""
    said = {"type": "error", "error": {"type": kind, "message": f"exactly this: {kind}"}}
    return json_body(said, status=status, **headers)


# Every row of the table of verdicts that is tried elsewhere, and what hides behind a 200.
FAULTS: dict[str, Script] = {
    "reset before the head": [reset_peer()],
    "closed before the head": [close()],
    "drops in mid-head": [raw(b"HTTP/1.1 200 OK\r\ncontent-ty"), close()],
    "garbage": [garbage()],
    "two lengths": [raw(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab")],
    "401": api_error(401, "authentication_error"),
    "402": api_error(402, "billing_error"),
    "400 for want of credit": json_body(
        {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low …"}},
        status=400,
    ),
    "403": api_error(403, "permission_error"),
    "404": api_error(404, "not_found_error"),
    "408": api_error(408, "timeout_error"),
    "429": api_error(429, "rate_limit_error"),
    "429 with retry-after": api_error(429, "rate_limit_error", retry_after="60"),
    "500": api_error(500, "api_error"),
    "502 in HTML": [head(502, "text/html", content_length="4"), body(b"<p/>")],
    "503": api_error(503, "overloaded_error"),
    "529": api_error(529, "overloaded_error"),
    "529 with retry-after": api_error(529, "overloaded_error", retry_after="20"),
    "a body that is cut": [raw(b"HTTP/1.1 500 No\r\ncontent-length: 99\r\n\r\n{"), close()],
    "HTML with 200": [head(200, "text/html", content_length="4"), body(b"<p/>")],
    "HTML called JSON": [head(200, "application/json", content_length="4"), body(b"<p/>")],
    "an error with 200": json_body({"type": "error", "error": {"type": "overloaded_error", "message": "no"}}),
    "OpenAI's error with 200": json_body({"error": {"message": "no", "type": "server_error", "code": None}}),
    "half a JSON, by close": [raw(b'HTTP/1.1 200 OK\r\n\r\n{"id": "m'), close()],
    "half a JSON, by length": [raw(b'HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{"id": "m'), close()],
    "nothing at all": [raw(b"HTTP/1.1 204 No Content\r\n\r\n")],
    "a redirect": json_body({}, status=307, location="http://127.0.0.1:1/"),
    "an empty stream": [head(200, SSE), end()],
    "a stream of pings": [head(200, SSE), ping(), ping(), end()],
    "an error event": [head(200, SSE), error_event("overloaded_error", "Overloaded"), end()],
    "an error event after message_start": [
        head(200, SSE),
        message_start(input_tokens=12),
        ping(),
        error_event("api_error", "Internal server error"),
        end(),
    ],
    "a first event that is no JSON": [head(200, SSE), body(b'event: message_start\ndata: {"type": "mess\n\n'), stall()],
    "message_start and an end": [head(200, SSE), message_start(input_tokens=12), end()],
    "message_start and a reset": [head(200, SSE), message_start(input_tokens=12), reset_peer()],
    "silence": [stall()],
    "silence after message_start": [head(200, SSE), message_start(input_tokens=12), stall()],
    "an error that never ends": [head(529, "application/json"), body(b'{"type": "error"'), stall()],
}


async def test_invariant_5_500_calls_through_every_fault_and_not_one_fails(start_gateway, upstreams, caplog):
    """
    Three upstreams, of which one after the other does each thing that the table of verdicts knows: clients see nothing.
    """
    routing = "patience: 10s"
    gateway = await start_gateway(config_of({name: each.url for name, each in upstreams.items()}, routing))
    faults = [*FAULTS, "refuses connections"]
    per_fault = 500 // len(faults) + 1
    number, failed = 0, []

    async with passing_time(gateway):
        for i, fault in enumerate(faults):
            victim = upstreams[NAMES[i % 3]]
            victim.script = FAULTS.get(fault, [])
            if fault not in FAULTS:
                await victim.close()
            numbers = range(number, number := number + per_fault)
            replies = await asyncio.gather(
                *(gateway.post("/v1/messages", ask_of(n, stream=n % 4 != 0)) for n in numbers)
            )
            pairs = zip(numbers, replies, strict=True)
            failed += [(fault, reply) for n, reply in pairs if not is_whole(reply, n, stream=n % 4 != 0)]
            victim.script = good(NAMES[i % 3])
            gateway.clock.advance(2000)  # whoever was left alone is asked again

    entries = [entry for entry in gateway.entries() if entry["type"] == "call"]
    assert failed == []
    assert number >= 500 and len(entries) == number
    assert {entry["outcome"] for entry in entries} == {"completed"}
    assert len([entry for entry in entries if len(entry["attempts"]) > 1]) > 100  # the faults were met
    caplog.clear()


@pytest.mark.parametrize("fault", FAULTS)
async def test_one_upstream_that_fails_once_is_asked_again(start_gateway, upstreams, caplog, fault):
    """
    Where there is nobody else, a moment later is as good; but for what another attempt would not change.
    """
    hopeless = ("401", "402", "400 for want of credit", "403", "404", "429 with retry-after")
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "wait: 30s, deadline: 20m"))
    upstreams["a"].scripts = [FAULTS[fault]]

    async with passing_time(gateway, 1.0):
        reply = await gateway.post("/v1/messages", ask_of(1))
    await gateway.settled()

    entry = gateway.entries()[-1]
    if fault in hopeless:
        assert reply.status in (404, 429, 502) and len(upstreams["a"].requests) == 1
    else:
        assert reply.texts == ["a ", "heard ", "question 1"]
        assert [attempt["outcome"] for attempt in entry["attempts"]][1:] == ["completed"]
    caplog.clear()


@pytest.mark.parametrize(
    ("path", "error", "case"),
    [
        ("responses", {"code": "invalid_prompt", "message": "no"}, "400"),
        ("responses", {"code": "image_too_large", "message": "no"}, "400"),
        ("responses", {"type": "invalid_request_error", "code": "context_length_exceeded", "message": "no"}, "400"),
        ("responses", {"code": "rate_limit_exceeded", "message": "no"}, "429"),
        ("responses", {"code": "server_error", "message": "no"}, "500"),
        ("chat/completions", {"type": "requests", "code": "rate_limit_exceeded", "message": "no"}, "429"),
        ("chat/completions", {"code": 429, "message": "no"}, "429"),
        ("chat/completions", {"type": "BadRequestError", "code": 400, "message": "no"}, "400"),
        ("chat/completions", {"type": "server_error", "code": 503, "message": "no"}, "500"),
    ],
)
async def test_openais_errors_in_a_stream_count_as_the_status_that_they_stand_for(
    start_gateway, upstreams, caplog, path, error, case
):
    """
    A prompt that is wrong is the client's fault everywhere: asked once, and no upstream is left alone for it.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 2", {"a": ", format: openai"}))
    failed = {"type": "response.failed", "response": {"id": "r", "model": "m", "error": error}}
    upstreams["a"].script = [head(200, SSE), event("", failed if path == "responses" else {"error": error}), end()]

    async with passing_time(gateway):
        reply = await gateway.post(f"/v1/{path}", HELLO_STREAM)
    await gateway.settled()

    (entry,) = gateway.entries()
    attempts = [attempt["outcome"] for attempt in entry["attempts"]]
    assert attempts == (["upstream_error"] if case == "400" else [case] * len(attempts)) and b'"no"' in reply.body
    failures = (await gateway.get("/health")).json["upstreams"][0]
    assert failures["failures"] + failures["keys"][0]["failures"] == (0 if case == "400" else 1)  # for the call
    caplog.clear()


# --- the table: who is blamed, and what the client gets if nobody does better -------------


@pytest.mark.parametrize(
    ("fault", "status", "kind", "retry_after"),
    [
        ("closed before the head", 502, "api_error", None),
        ("garbage", 502, "api_error", None),
        ("401", 502, "api_error", None),
        ("402", 502, "api_error", None),
        ("403", 502, "api_error", None),
        ("404", 404, "not_found_error", None),
        ("408", 408, "timeout_error", None),
        ("429 with retry-after", 429, "rate_limit_error", "60"),
        ("500", 500, "api_error", None),
        ("529", 529, "overloaded_error", None),
        ("502 in HTML", 502, "api_error", None),
        ("HTML with 200", 502, "api_error", None),
        ("an error with 200", 529, "overloaded_error", None),
        ("silence", 504, "timeout_error", None),
    ],
)
async def test_when_all_fail_the_client_gets_the_most_useful_answer(
    start_gateway, upstreams, caplog, fault, status, kind, retry_after
):
    """
    The last upstream's own words where it has any that are for the client; else ours, with its status and type.
    """
    gateway = await start_gateway(config_of({name: upstreams[name].url for name in "ab"}, "max_attempts: 2"))
    for name in "ab":
        upstreams[name].script = FAULTS[fault]

    async with passing_time(gateway, 1.0):
        reply = await gateway.post("/v1/messages", HELLO)
    await gateway.settled()

    (entry,) = gateway.entries()
    assert reply.status == entry["status"] == status
    assert len(entry["attempts"]) == 2 and {attempt["upstream"] for attempt in entry["attempts"]} == {"a", "b"}
    assert reply.error["type"] == kind
    assert reply.headers.get("retry-after") == retry_after
    assert UPSTREAM_KEY not in str(reply)
    await keys_checked(gateway)
    caplog.clear()


@pytest.mark.logs("its API key is left alone")
@pytest.mark.logs("no answer, attempts 1")
async def test_a_refused_key_of_ours_is_not_told_as_the_clients(start_gateway, upstreams, caplog):
    """
    A 401 would make Claude Code ask its user to log in; what is wrong is for whoever runs the gateway.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    upstreams["a"].script = FAULTS["401"]

    reply = await gateway.post("/v1/messages", HELLO_STREAM)
    await keys_checked(gateway)
    again = await gateway.post("/v1/messages", HELLO_STREAM)

    for each in (reply, again):  # for as long as the key is left alone
        assert (each.status, each.headers["x-should-retry"]) == (502, "false")
        assert each.error["message"] == "The upstream a refuses this gateway's own API key (401). Ask ops."
    assert [request.target for request in upstreams["a"].requests] == ["/v1/messages", "/v1/models?limit=1000"]
    assert [entry["outcome"] for entry in gateway.entries()] == ["refused", "unavailable"]
    told = [message.partition(": ")[2] for message in caplog.messages if "answered" in message]
    assert told == ["no answer, attempts 1: upstream a answered 401"]


ECHOED = "Unexpected value(s) `credit balance is too low` for the `anthropic-beta` header."
REQUESTS_OWN_FAULT: dict[str, list[Step]] = {
    "an echo of the client's words": json_body(
        {"type": "error", "error": {"type": "invalid_request_error", "message": ECHOED}}, status=400
    ),
    "an echo that is no JSON": [head(400, "text/plain", content_length="25"), body(b"credit balance is too low")],
    "a model that the project lacks": json_body(
        {"error": {"message": "Project p does not have access", "type": "x", "code": "model_not_found"}}, status=403
    ),
    "a permission": json_body({"type": "error", "error": {"type": "permission_error", "message": "no"}}, status=403),
    "an organization": json_body({"error": {"message": "mismatched", "type": "authentication_error"}}, status=401),
    "a crash": json_body({"type": "error", "error": {"type": "api_error", "message": "no"}}, status=500),
}


@pytest.mark.parametrize("fault", REQUESTS_OWN_FAULT)
async def test_one_users_requests_take_no_key_from_the_others(start_gateway, upstreams, caplog, fault):
    """
    What an upstream says to one user's request, however it says it, leaves its keys to everybody else; where it may be
    the key's fault, the list of models is asked for, and speaks for the key.
    """
    text = config_of({"a": upstreams["a"].url}, "max_attempts: 4")
    gateway = await start_gateway(text.replace(f"{UPSTREAM_KEY}-a", f"[{UPSTREAM_KEY}-1, {UPSTREAM_KEY}-2]"))

    def script(request: Request) -> list[Step]:
        if request.method == "GET":
            return json_body({"data": []})
        return REQUESTS_OWN_FAULT[fault] if "mallory" in request.json["model"] else stream_of("Hello")

    upstreams["a"].script = script
    replies = []
    async with passing_time(gateway):
        for i in range(5):
            told = await gateway.post("/v1/messages", ask_of(i, stream=False) | {"model": "mallory"})
            await until(lambda: not gateway.gateway.key_checks._tasks)
            replies.append(await gateway.post("/v1/messages", ask_of(i), BOB))

    assert [reply.texts for reply in replies] == [["Hello"]] * 5
    assert told.status == {"a permission": 502, "an organization": 502, "a crash": 500}.get(
        fault, 403 if "model" in fault else 400
    )
    (row,) = (await gateway.get("/health")).json["upstreams"]
    assert [row["state"], *(key["state"] for key in row["keys"])] == ["ok"] * 3
    assert {len(entry["attempts"]) for entry in gateway.entries() if entry["key"] == "bob"} == {1}
    caplog.clear()


@pytest.mark.logs("is left alone for")
async def test_two_users_who_act_together_take_no_upstream_from_a_third(start_gateway, upstreams):
    """
    Their prompts are too long for the account, and a 429 says to come again in half an hour. Carol's call waits for ten
    seconds of it and is answered, and so are those after it, at once, whatever the two do.
    """
    carol = BOB[:-1] + "5"
    text = config_of({"a": upstreams["a"].url}, "max_attempts: 1")
    gateway = await start_gateway(text.replace("{name: bob,", f"{{name: carol, key: {carol}}}, {{name: bob,"))
    spent = api_error(429, "rate_limit_error", retry_after="1800")
    upstreams["a"].script = lambda request: spent if "too long" in str(request.json) else stream_of("Hello")
    too_long = HELLO | {"messages": [{"role": "user", "content": "too long"}]}
    refused = [await gateway.post("/v1/messages", too_long, token) for token in (KEY, BOB)]
    began = gateway.clock.now

    async with passing_time(gateway):
        first = await gateway.post("/v1/messages", ask_of(1), carol)
        waited_s = gateway.clock.now - began
    refused += [await gateway.post("/v1/messages", too_long, token) for token in (KEY, BOB)]
    others = [await gateway.post("/v1/messages", ask_of(i), carol) for i in (2, 3)]

    assert [reply.status for reply in refused] == [429, 429, 529, 429]
    assert [reply.texts for reply in (first, *others)] == [["Hello"]] * 3
    assert 10.0 <= waited_s < 15.0


async def test_a_count_tokens_429_leaves_the_key_to_messages(start_gateway, upstreams, caplog):
    """
    Counting has its own rate limit: a key that is out of it goes on answering.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "wait: 1s"))
    upstreams["a"].scripts = [api_error(429, "rate_limit_error", retry_after="1800")]

    counted = await gateway.post("/v1/messages/count_tokens", HELLO)
    reply = await gateway.post("/v1/messages", ask_of(1))

    assert (counted.status, reply.texts) == (429, ["a ", "heard ", "question 1"])
    caplog.clear()


async def test_a_request_that_is_wrong_is_wrong_everywhere(start_gateway, upstreams):
    """
    400, 413 and 422 belong to the client's request: asked once, nobody is blamed, and the words are unchanged.
    """
    gateway = await start_gateway(config_of({name: each.url for name, each in upstreams.items()}))
    statuses = [400, 413, 422, 409]
    for each in upstreams.values():
        each.scripts = [api_error(status, "invalid_request_error") for status in statuses] * 3

    replies = [await gateway.post("/v1/messages", ask_of(1)) for _ in statuses]

    assert [reply.status for reply in replies] == statuses
    assert {reply.error["message"] for reply in replies} == {"exactly this: invalid_request_error"}
    assert [len(entry["attempts"]) for entry in gateway.entries()] == [1, 1, 1, 1]
    assert {each["state"] for each in (await gateway.get("/health")).json["upstreams"]} == {"ok"}


@pytest.mark.logs("is left alone for")
async def test_every_upstream_left_alone_is_told_at_once_with_the_time_to_come_again(start_gateway, upstreams):
    """
    Where no cooldown ends within `routing.wait`, a call is not held: 529, and retry-after from the soonest.
    """
    gateway = await start_gateway(config_of({name: upstreams[name].url for name in "ab"}, "wait: 5s"))
    upstreams["a"].script = api_error(429, "rate_limit_error", retry_after="100")
    upstreams["b"].script = api_error(429, "rate_limit_error", retry_after="50")
    await gateway.post("/v1/messages", HELLO)
    asked = sum(len(each.requests) for each in upstreams.values())

    reply = await gateway.post("/v1/messages", HELLO)

    assert (reply.status, reply.error["type"]) == (529, "overloaded_error")
    assert 50 <= int(reply.headers["retry-after"]) <= 56
    assert sum(len(each.requests) for each in upstreams.values()) == asked == 2
    entry = gateway.entries()[-1]
    assert (entry["outcome"], entry["attempts"], entry["cost_usd"]) == ("unavailable", [], 0.0)


async def test_who_does_not_know_the_model_is_not_asked_again_and_the_others_are(start_gateway, upstreams):
    """
    A 404 says something of the upstream that gave it, and nothing of those that were asked before it.
    """
    gateway = await start_gateway(config_of({name: upstreams[name].url for name in "ab"}, more={"b": ", priority: 2"}))
    upstreams["a"].scripts = [FAULTS["500"]]
    upstreams["b"].script = FAULTS["404"]

    async with passing_time(gateway):
        reply = await gateway.post("/v1/messages", ask_of(1))

    assert reply.texts == ["a ", "heard ", "question 1"]
    attempts = gateway.entries()[0]["attempts"]
    assert [(each["upstream"], each["outcome"]) for each in attempts] == [
        ("a", "500"),
        ("b", "404"),
        ("a", "completed"),
    ]


@pytest.mark.logs("is left alone for")
async def test_a_short_retry_after_is_believed_and_one_that_goes_on_a_little_less(start_gateway, upstreams):
    """
    What the upstream says holds; who says one second for ever is asked after 1, 2, 4, 8 and then 10 seconds.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 6, wait: 1m"))
    upstreams["a"].scripts = [api_error(429, "rate_limit_error", retry_after="1") for _ in range(5)]

    async with passing_time(gateway):
        reply = await gateway.post("/v1/messages", ask_of(1))

    assert reply.texts == ["a ", "heard ", "question 1"]
    assert 25_000 <= gateway.entries()[0]["duration_ms"] <= 30_000  # 1 + 2 + 4 + 8 + 10, up to a tenth more, and ticks


@pytest.mark.parametrize("api", ["messages", "chat"])
async def test_an_event_of_a_shape_that_nobody_knows_is_for_the_client(start_gateway, upstreams, api):
    """
    JSON that is not as we know it is neither held back nor a failure.
    """
    more = {"a": ", format: openai" if api == "chat" else ""}
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, more=more))
    odd = (
        {"type": "message_start", "message": "odd"} if api == "messages" else {"choices": [{"delta": {"content": [1]}}]}
    )
    go_on = asyncio.Event()
    done = event("message_stop", {"type": "message_stop"}) if api == "messages" else body(b"data: [DONE]\n\n")
    upstreams["a"].script = [head(200, SSE), event("", odd), wait_for(go_on), done, end()]
    path = "/v1/messages" if api == "messages" else "/v1/chat/completions"
    asking = asyncio.ensure_future(gateway.post(path, HELLO_STREAM))
    await until(lambda: any(exchange.bytes_down for exchange in gateway.gateway.relay.running))

    go_on.set()
    reply = await asking

    assert reply.body == written([event("", odd), done]) and not reply.was_cut
    assert [entry["outcome"] for entry in gateway.entries()] == ["completed"]


async def test_a_stop_is_told_to_those_whose_answer_has_not_begun(start_gateway, upstreams):
    """
    A call that is still at the gate gets a 503 with the time to come again, and an entry.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    upstreams["a"].script = [stall()]
    asking = asyncio.ensure_future(gateway.post("/v1/messages", HELLO_STREAM))
    await upstreams["a"].request_came()

    await gateway.gateway.close()
    reply = await asking

    assert (reply.status, reply.error["type"], reply.headers["retry-after"]) == (503, "overloaded_error", "5")
    assert [(entry["outcome"], entry["status"]) for entry in gateway.entries()] == [("gateway_stopped", 503)]


async def test_bodies_that_wait_are_bounded(start_gateway, upstreams, caplog):
    """
    Calls that wait for an upstream keep their bodies, which are part of the memory that one key may hold.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}).replace("contact: ops", "memory: 250"))
    upstreams["a"].script = FAULTS["529 with retry-after"]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode()))
    await until(lambda: gateway.gateway.relay.upstreams.waiting)

    refused = await gateway.post("/v1/messages", HELLO | {"system": "x" * 60})

    assert (refused.status, refused.error["type"]) == (503, "overloaded_error")
    assert gateway.gateway.relay.upstreams.waiting == 1
    client.abort()
    await until(lambda: not gateway.gateway.relay.upstreams.waiting)
    assert gateway.gateway.memory.held == 0
    caplog.clear()


async def test_verdicts_can_be_overridden(start_gateway, upstreams):
    """
    What a failure means may differ by upstream: here a 404 is final, and a 500 passes as nobody's fault.
    """
    more = dict.fromkeys(NAMES, ", verdicts: {404: {next: false}, 500: {next: false, blame: none}}")
    text = config_of({name: each.url for name, each in upstreams.items()}, "breaker: {failures: 1}", more)
    gateway = await start_gateway(text)
    for each in upstreams.values():
        each.script = FAULTS["404"]
    missing = await gateway.post("/v1/messages", HELLO)
    for each in upstreams.values():
        each.script = FAULTS["500"]
    broken = await gateway.post("/v1/messages", HELLO)

    assert [missing.status, broken.status] == [404, 500]
    assert [len(entry["attempts"]) for entry in gateway.entries()] == [1, 1]
    assert {each["state"] for each in (await gateway.get("/health")).json["upstreams"]} == {"ok"}


# --- the gate -------------------------------------------------------------------------------


async def test_nothing_is_said_before_the_first_content(start_gateway, upstreams):
    """
    message_start and pings are held back; with the first content everything comes, in order and once.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    go_on = asyncio.Event()
    start, rest = [head(200, SSE), message_start(input_tokens=12), ping()], stream_of("Hello")[2:]
    upstreams["a"].script = [*start, wait_for(go_on), *rest]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await until(lambda: any(e.attempt and e.attempt.held_size for e in gateway.gateway.relay.running))
    (exchange,) = gateway.gateway.relay.running

    assert (exchange.status, exchange.bytes_down) == (0, 0)
    go_on.set()
    reply = await client.answer()

    assert reply.body == written([*start, *rest])


async def test_what_is_held_back_is_bounded(start_gateway, upstreams):
    """
    Pings without end are no content, but they are not kept for ever either.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    many = [event("ping", {"type": "ping", "pad": "x" * 1000}) for _ in range(400)]
    upstreams["a"].script = [head(200, SSE), *many, *stream_of("Hello")[1:]]

    reply = await gateway.post("/v1/messages", HELLO_STREAM)

    assert reply.texts == ["Hello"] and not reply.was_cut
    assert reply.body.count(b"event: ping") == 400


async def test_a_silent_gate_says_pings_that_commit_to_nothing(start_gateway, upstreams):
    """
    The client gives up after 300 s without a byte: it gets 200 and comments, and then whoever answers in the end.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "deadline: 20m, wait: 5m"))
    go_on = asyncio.Event()
    upstreams["a"].scripts = [[wait_for(go_on), *FAULTS["529"]]]
    asking = asyncio.ensure_future(gateway.post("/v1/messages", ask_of(7)))
    await upstreams["a"].request_came()

    for _ in range(3):
        gateway.tick(16)
    go_on.set()
    async with passing_time(gateway):
        reply = await asking

    assert reply.status == 200 and reply.headers["content-type"] == SSE
    assert reply.body == b": ping\n\n" * 3 + written(stream_of("a ", "heard ", "question 7"))
    assert (await gateway.get("/health")).json["upstreams"][0]["state"] == "ok"


@pytest.mark.parametrize("fault", ["529", "401", "silence", "an error event", "HTML with 200", "502 in HTML"])
async def test_a_failure_after_a_ping_is_an_error_event(start_gateway, upstreams, caplog, fault):
    """
    Once 200 is out, an error is an event of the client's format, with the upstream's own words where it has some.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1"))
    go_on = asyncio.Event()
    script = FAULTS[fault]
    assert isinstance(script, list)
    upstreams["a"].script = [wait_for(go_on), *script]
    asking = asyncio.ensure_future(gateway.post("/v1/messages", HELLO_STREAM))
    await upstreams["a"].request_came()

    gateway.tick(16)
    go_on.set()
    async with passing_time(gateway, 1.0):
        reply = await asking

    pings, said, rest = reply.body.partition(b"event: error\n")
    assert reply.status == 200 and not reply.was_cut
    assert set(pings.split(b"\n\n")) == {b": ping", b""} and said
    error = json.loads(rest.removeprefix(b"data: ").strip())["error"]
    expected = {"529": "overloaded_error", "silence": "timeout_error", "an error event": "overloaded_error"}
    assert error["type"] == expected.get(fault, "api_error")
    caplog.clear()


@pytest.mark.parametrize("ending", [[end()], [stall()], [reset_peer()]])
async def test_an_error_event_is_passed_on_whether_or_not_an_end_follows(start_gateway, upstreams, caplog, ending):
    """
    The error is told with its event; what may come later, or in another read, changes nothing for the client.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1"))
    said = [head(200, SSE), message_start(input_tokens=3), error_event("overloaded_error", "Overloaded")]
    upstreams["a"].script = [*said, *ending]

    reply = await gateway.post("/v1/messages", HELLO_STREAM)

    assert (reply.status, reply.was_cut, reply.body) == (200, False, written(said))
    assert gateway.entries()[-1]["outcome"] == "upstream_error"
    caplog.clear()


@pytest.mark.parametrize(("path", "more"), [("messages/count_tokens", ""), ("embeddings", ", format: openai")])
async def test_what_is_never_streamed_gets_no_ping(start_gateway, upstreams, path, more):
    """
    A `stream: true` that its API ignores must not be answered with events: the JSON that comes would not fit.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, more={"a": more}))
    go_on = asyncio.Event()
    upstreams["a"].script = [wait_for(go_on), *json_body({"input_tokens": 5})]
    asking = asyncio.ensure_future(gateway.post(f"/v1/{path}", HELLO_STREAM))
    await upstreams["a"].request_came()

    gateway.tick(16)
    committed = [exchange.phase is g.ExchangePhase.PINGED for exchange in gateway.gateway.relay.running]
    go_on.set()

    assert committed == [False]
    assert (await asking).json == {"input_tokens": 5}


async def test_a_call_waits_through_a_short_cooldown(start_gateway, upstreams, caplog):
    """
    One upstream, left alone for twenty seconds: the client notices nothing but a pause with pings.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    upstreams["a"].scripts = [FAULTS["529 with retry-after"]]

    async with passing_time(gateway):
        reply = await gateway.post("/v1/messages", ask_of(3))

    assert reply.texts == ["a ", "heard ", "question 3"] and reply.body.startswith(b": ping\n\n")
    (entry,) = gateway.entries()
    assert [attempt["outcome"] for attempt in entry["attempts"]] == ["529", "completed"]
    assert 20_000 <= entry["duration_ms"] <= 25_000
    caplog.clear()


async def test_one_deadline_holds_over_all_attempts(start_gateway, upstreams, caplog):
    """
    However many could still be asked: no content by then is a 504.
    """
    routing = "deadline: 25s, patience: 10s, max_attempts: 20"
    gateway = await start_gateway(config_of({name: each.url for name, each in upstreams.items()}, routing))
    for each in upstreams.values():
        each.script = [stall()]

    async with passing_time(gateway):
        reply = await gateway.post("/v1/messages", HELLO_STREAM)
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["outcome"], reply.status) == ("timeout", 200)  # a ping had gone out
    assert b'"timeout_error"' in reply.body
    assert 25_000 <= entry["duration_ms"] <= 26_000 and len(entry["attempts"]) == 3
    caplog.clear()


async def test_all_attempts_but_the_last_have_the_patience(start_gateway, upstreams, caplog):
    """
    With two attempts a silent upstream is left after `patience`, for the other one; the last one may take longer.
    """
    routing = "deadline: 25s, patience: 10s, max_attempts: 2"
    gateway = await start_gateway(config_of({name: each.url for name, each in upstreams.items()}, routing))
    for each in upstreams.values():
        each.script = [stall()]

    async with passing_time(gateway):
        await gateway.post("/v1/messages", HELLO_STREAM)
    await gateway.settled()

    first, last = gateway.entries()[-1]["attempts"]
    assert 10_000 <= first["ms"] <= 11_000 and 14_000 <= last["ms"] <= 16_000
    caplog.clear()


async def test_a_client_that_leaves_between_two_attempts_ends_the_call(start_gateway, upstreams, caplog):
    """
    Nobody is asked for a client that went away, and the slot is free again.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    upstreams["a"].script = FAULTS["529 with retry-after"]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await until(lambda: gateway.gateway.relay.upstreams.waiting)

    client.abort()
    await until(lambda: not gateway.gateway.relay.upstreams.waiting)
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["outcome"], len(entry["attempts"]), len(upstreams["a"].requests)) == ("client_gone", 1, 1)
    caplog.clear()


async def test_nobody_else_is_asked_for_a_client_that_has_gone(start_gateway, upstreams, caplog):
    """
    `drain` hears one upstream out for the ledger; when that one fails, the call is over.
    """
    more = dict.fromkeys("ab", ", on_disconnect: drain")
    gateway = await start_gateway(config_of({name: upstreams[name].url for name in "ab"}, more=more))
    go_on = asyncio.Event()
    for name in "ab":
        upstreams[name].script = [wait_for(go_on), *api_error(529, "overloaded_error")]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await until(lambda: upstreams["a"].requests or upstreams["b"].requests)

    client.abort()
    await until(lambda: any(exchange.sink is None for exchange in gateway.gateway.relay.running))
    go_on.set()
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["outcome"], [attempt["outcome"] for attempt in entry["attempts"]]) == ("client_gone", ["529"])
    assert upstreams["a"].connections + upstreams["b"].connections == 1
    caplog.clear()


async def test_a_stop_in_the_moment_in_which_an_attempt_fails_ends_the_call(start_gateway, upstreams, caplog):
    """
    No other attempt follows a stop, and the entry says that it was one.
    """
    gateway = await start_gateway(config_of({name: upstreams[name].url for name in "ab"}))
    upstreams["a"].script = upstreams["b"].script = [stall()]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await until(lambda: upstreams["a"].requests or upstreams["b"].requests)
    (exchange,) = gateway.gateway.relay.running

    exchange.attempt.line.abort()
    exchange.attempt.lost(g.CUT)
    await gateway.gateway.close()

    (entry,) = gateway.entries()
    assert (entry["outcome"], len(entry["attempts"])) == ("gateway_stopped", 1)
    caplog.clear()


async def test_a_connection_that_fails_after_a_stop_is_not_tried_again(start_gateway, upstreams, caplog):
    """
    A call that still connects when the gateway stops ends with that, not as a bug of ours.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, contextlib.ExitStack() as fillers:
        for _ in range(3):  # its queue is full: whoever comes now waits
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        gateway = await start_gateway(config_of({"a": url}, more={"a": ", timeouts: {connect: 50ms}"}))
        client = await gateway.connect()
        await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode()))
        await until(lambda: any(exchange.attempt for exchange in gateway.gateway.relay.running))

        await gateway.gateway.close()

    (entry,) = gateway.entries()
    assert (entry["outcome"], len(entry["attempts"])) == ("gateway_stopped", 1)
    caplog.clear()


# --- the ledger ---------------------------------------------------------------------------------


async def test_what_was_billed_and_thrown_away_is_booked_and_marked(start_gateway, upstreams, caplog):
    """
    Input that an upstream has read is paid for, though its answer failed: a line of its own, which is no call.
    """
    gateway = await start_gateway(config_of({name: upstreams[name].url for name in "ab"}))
    failing = [head(200, SSE), message_start(input_tokens=1000), error_event("overloaded_error", "no"), end()]
    upstreams["a"].script = upstreams["b"].script = failing
    home = await first_asked(gateway, upstreams, ask_of(5))
    other = "b" if home == "a" else "a"
    upstreams[other].script = good(other)
    gateway.clock.advance(3600)

    await gateway.post("/v1/messages", ask_of(5))

    discarded, call = gateway.entries()[-2:]
    assert [discarded[name] for name in ("type", "upstream", "outcome", "requests", "input_tokens", "cost_usd")] == [
        "discarded",
        home,
        "529",
        0,
        1000,
        0.01005,  # 1,000 in at $10, and the one token out that message_start counts
    ]
    assert discarded["request_id"] == call["request_id"]
    assert (call["upstream"], call["input_tokens"], call["cost_usd"]) == (other, 12, 0.00037)
    assert [(attempt["upstream"], attempt["outcome"]) for attempt in call["attempts"]] == [
        (home, "529"),
        (other, "completed"),
    ]
    usage = (await gateway.get("/v1/usage")).json["today"]
    assert usage["calls"] == len([entry for entry in gateway.entries() if entry["type"] == "call"])
    caplog.clear()


async def test_attempts_that_are_billed_in_vain_end_where_the_limit_does(start_gateway, upstreams, caplog):
    """
    Each upstream counts input of $0.6 and fails: after the second nobody is asked, the key has but a dollar.
    """
    text = config_of({name: upstreams[name].url for name in "abc"}, "max_attempts: 3").replace(
        f"key: {KEY}}}", f"key: {KEY}, limits: {{usd/day: 1}}}}"
    )
    gateway = await start_gateway(text)
    failing = [head(200, SSE), message_start(input_tokens=60_000), error_event("overloaded_error", "no"), end()]
    for upstream in upstreams.values():
        upstream.script = failing

    reply = await gateway.post("/v1/messages", HELLO_STREAM)
    await gateway.settled()

    asked = sum(len(upstream.requests) for upstream in upstreams.values())
    spent = sum(entry["cost_usd"] for entry in gateway.entries())
    assert (asked, b"overloaded_error" in reply.body) == (2, True)
    assert spent == pytest.approx(1.2001)
    rows = (await gateway.get("/v1/usage")).json["limits"]
    assert [row["reserved"] for row in rows] == [0] * len(rows)
    caplog.clear()


async def test_what_was_billed_is_booked_once_when_its_client_leaves_before_the_next_attempt(
    start_gateway, upstreams, caplog
):
    """
    The last attempt's usage stands in the call's own entry, whatever ended the call: not in a second line as well.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    failing = [head(200, SSE), message_start(input_tokens=1000), error_event("overloaded_error", "no"), end()]
    upstreams["a"].script = failing
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await until(lambda: gateway.gateway.relay.upstreams.waiting)

    client.abort()
    await until(lambda: not gateway.gateway.relay.running)
    await gateway.settled()

    (entry,) = gateway.entries()
    assert (entry["type"], entry["outcome"], entry["input_tokens"]) == ("call", "client_gone", 1000)
    caplog.clear()


@pytest.mark.parametrize("fault", ["529", "an error with 200", "HTML with 200", "a redirect", "nothing at all"])
async def test_what_is_no_answer_costs_nothing(start_gateway, upstreams, caplog, fault):
    """
    An error with status 200 counts as the status of its type, in the ledger too; and nobody charges for HTML.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1"))
    upstreams["a"].script = FAULTS[fault]

    await gateway.post("/v1/messages", HELLO)

    (entry,) = gateway.entries()
    assert (entry["input_tokens"], entry["output_tokens"], entry["cost_usd"]) == (0, 0, 0)
    caplog.clear()


PAID_USAGE = {"input_tokens": 100_000, "output_tokens": 5000}
PAID = {"id": "m", "type": "message", "model": "claude-opus-4-6", "content": [], "usage": PAID_USAGE}
SQUEEZED = gzip.compress(json.dumps(PAID).encode())
STREAMED = gzip.compress(b'data: {"type": "message_stop"}\n\n')
UNMETERED: dict[str, tuple[Script, str]] = {
    "compressed": (
        [head(200, "application/json", content_length=str(len(SQUEEZED)), content_encoding="gzip"), body(SQUEEZED)],
        "compressed (gzip)",
    ),
    "a compressed stream": ([head(200, SSE, content_encoding="gzip"), body(STREAMED), end()], "compressed (gzip)"),
    "a compressed stream that goes on": (
        [head(200, SSE, content_encoding="br"), body(b"\x8b" * 300_000), stall()],
        "compressed (br)",
    ),
    "201": (json_body(PAID, status=201), "answered 201"),
}


@pytest.mark.parametrize(("script", "reason"), UNMETERED.values(), ids=UNMETERED)
async def test_a_paid_answer_that_cannot_be_read_is_asked_for_once_and_booked(
    start_gateway, upstreams, caplog, script, reason
):
    """
    The next attempt would be written the same way, and paid for as well: one line of the log names the cause.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    upstreams["a"].script = script

    async with passing_time(gateway):
        reply = await gateway.post("/v1/messages", HELLO | {"model": "claude-opus-4-6", "max_tokens": 700})
    await gateway.settled()

    (entry,) = gateway.entries()
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert (reply.status, len(upstreams["a"].requests)) == (502, 1)
    assert [attempt["outcome"] for attempt in entry["attempts"]] == ["unmetered"]
    assert len(errors) == 1 and reason in errors[0]
    if reason == "answered 201":
        assert (entry["input_tokens"], entry["output_tokens"], entry["estimated"]) == (100_000, 5000, False)
    else:
        assert (entry["output_tokens"], entry["estimated"]) == (700, True) and entry["input_tokens"] > 0
    caplog.clear()


@pytest.mark.parametrize("content_type", ["text/html", "application/json"])
async def test_a_compressed_page_is_no_paid_answer(start_gateway, upstreams, caplog, content_type):
    """
    A proxy's page costs nothing, and another attempt may do better; so may one after an empty answer.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    page = gzip.compress(b"<p/>") if content_type == "text/html" else b""
    upstreams["a"].scripts = [
        [head(200, content_type, content_length=str(len(page)), content_encoding="gzip"), body(page)]
    ]

    async with passing_time(gateway):
        reply = await gateway.post("/v1/messages", ask_of(1))
    await gateway.settled()

    assert reply.texts and [a["outcome"] for a in gateway.entries()[-1]["attempts"]] == ["unexpected", "completed"]
    caplog.clear()


@pytest.mark.logs("is left alone for")
async def test_the_price_is_that_of_the_upstream_whose_answer_the_client_gets(start_gateway, upstreams):
    """
    Upstreams may know a model under other names: an answer that is handed on late is not paid at the last one's price.
    """
    more = {
        "a": ", models: {'claude-*': claude-opus-4-8}",
        "b": ", models: {'claude-*': claude-haiku-4-5}, priority: 2",
    }
    urls = {"a": upstreams["a"].url, "b": f"http://127.0.0.1:{upstreams['b'].refuse()}"}
    routing = "max_attempts: 2, breaker: {failures: 1}"
    gateway = await start_gateway(config_of(urls, routing, more))
    upstreams["a"].script = [head(200, SSE), message_start(input_tokens=1000), error_event("api_error", "no"), end()]

    await gateway.post("/v1/messages", HELLO_STREAM)

    (entry,) = gateway.entries()
    assert [attempt["upstream"] for attempt in entry["attempts"]] == ["a", "b"]
    assert (entry["upstream"], entry["input_tokens"], entry["price"]["input"]) == ("a", 1000, 5)


async def first_asked(gateway: GatewayUnderTest, upstreams: dict[str, ScriptedUpstream], request: dict) -> str:
    """Who is asked first for a request."""
    before = {name: len(each.requests) for name, each in upstreams.items()}
    async with passing_time(gateway):
        await gateway.post("/v1/messages", request)
    await gateway.settled()
    entry = gateway.entries()[-1]
    assert len(upstreams[entry["attempts"][0]["upstream"]].requests) > before[entry["attempts"][0]["upstream"]]
    return entry["attempts"][0]["upstream"]


# --- sessions ---------------------------------------------------------------------------------


async def test_a_session_stays_leaves_and_comes_home(start_gateway, upstreams, caplog):
    """
    Prompt caches live where a session was: it stays there, moves while its home is left alone, and comes back.
    """
    gateway = await start_gateway(config_of({name: each.url for name, each in upstreams.items()}))

    async def where(session: str) -> str:
        reply = await gateway.post("/v1/messages", HELLO_STREAM, x_claude_code_session_id=session)
        return reply.texts[0].strip()

    homes = {f"session {i}": await where(f"session {i}") for i in range(12)}
    home = homes["session 0"]
    upstreams[home].script = FAULTS["429 with retry-after"]
    away = {session: await where(session) for session in homes}
    upstreams[home].script = good(home)
    gateway.tick(70)

    assert set(homes.values()) == set(NAMES)
    assert all(away[session] == homes[session] for session in homes if homes[session] != home)
    assert all(away[session] != home for session in homes if homes[session] == home)
    assert {session: await where(session) for session in homes} == homes
    caplog.clear()


async def test_each_of_an_upstreams_keys_is_left_alone_on_its_own(start_gateway, upstreams, caplog):
    """
    A key that is used up or refused leaves its work to the others of the same upstream.
    """
    text = config_of({"a": upstreams["a"].url}).replace(f"{UPSTREAM_KEY}-a", f"[{UPSTREAM_KEY}-1, {UPSTREAM_KEY}-2]")
    gateway = await start_gateway(text)

    def by_key(request: Request) -> list[Step]:
        if request.header["x-api-key"].endswith("-1"):
            script = FAULTS["401"]
            assert isinstance(script, list)
            return script
        return stream_of("two")

    upstreams["a"].script = by_key
    replies = [await gateway.post("/v1/messages", ask_of(i), (KEY, BOB)[i % 2]) for i in range(20)]

    assert [reply.texts for reply in replies] == [["two"]] * 20
    keys = [request.header["x-api-key"][-2:] for request in upstreams["a"].requests]
    assert keys.count("-1") in (2, 3) and keys.count("-2") == 20  # until two users were refused
    states = (await gateway.get("/health")).json["upstreams"][0]
    assert (states["state"], [key["state"] for key in states["keys"]]) == ("degraded", ["cooling", "ok"])
    assert (states["keys"][0]["why"], states["keys"][0]["until"] > states["keys"][0]["since"]) == ("401", True)
    caplog.clear()


async def test_a_wait_for_an_upstream_is_longer_by_the_time_for_which_the_loop_stood_still(start_gateway, upstreams):
    """
    Nobody is told that all upstreams are full because the gateway itself was held up.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "wait: 5s", more={"a": ", max_concurrent: 1"}))
    released = asyncio.Event()
    upstreams["a"].script = [wait_for(released), *stream_of("a")]
    first = asyncio.ensure_future(gateway.post("/v1/messages", ask_of(0)))
    await upstreams["a"].request_came()
    second = asyncio.ensure_future(gateway.post("/v1/messages", ask_of(1)))
    await until(lambda: len(gateway.gateway.relay.running) == 2)
    await until(lambda: gateway.gateway.relay.upstreams.waiting)

    gateway.clock.advance(30)
    gateway.gateway.tick(30.0)
    released.set()

    assert [(await asking).texts for asking in (first, second)] == [["a"]] * 2


async def test_a_full_upstream_leaves_the_rest_to_others_and_then_lets_them_wait_in_turn(start_gateway, upstreams):
    """
    `max_concurrent` bounds the calls of one key; above it others are asked, and then the oldest is first.
    """
    more = dict.fromkeys("ab", ", max_concurrent: 1")
    gateway = await start_gateway(config_of({name: upstreams[name].url for name in "ab"}, more=more))
    gates = [asyncio.Event() for _ in range(4)]
    order: list[str] = []

    def held(name: str) -> Script:
        def script(request: Request) -> list[Step]:
            asked = request.json["messages"][0]["content"]
            order.append(asked)
            return [wait_for(gates[int(asked[-1])]), *stream_of(name, asked)]

        return script

    for name in "ab":
        upstreams[name].script = held(name)
    calls = []
    for i in range(4):
        calls.append(asyncio.ensure_future(gateway.post("/v1/messages", ask_of(i))))
        await until(lambda i=i: len(order) + gateway.gateway.relay.upstreams.waiting == i + 1)

    assert order == ["question 0", "question 1"]
    gates[1].set()
    await until(lambda: len(order) == 3)
    gates[0].set()
    await until(lambda: len(order) == 4)
    gates[2].set(), gates[3].set()
    replies = await asyncio.gather(*calls)

    assert order == [f"question {i}" for i in range(4)]
    assert [reply.texts[1] for reply in replies] == [f"question {i}" for i in range(4)]
    assert all(not each["running"] for each in (await gateway.get("/health")).json["upstreams"])


# --- connections ----------------------------------------------------------------------------------


async def test_a_provider_that_restarts_costs_nobody_anything(start_gateway, upstreams):
    """
    A pool full of dead connections: each call gets its answer at once, from a new one, and nobody is blamed.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    started = asyncio.Event()

    def together(request: Request) -> list[Step]:
        if len(upstreams["a"].requests) == 20:
            started.set()
        return [wait_for(started), *stream_of("Hello")]

    upstreams["a"].script = together
    await asyncio.gather(*(gateway.post("/v1/messages", ask_of(i)) for i in range(20)))
    before = upstreams["a"].connections

    def after_restart(request: Request) -> list[Step]:
        script = good("a")
        assert callable(script)
        return [reset_peer()] if request.connection <= before else script(request)

    upstreams["a"].script = after_restart

    replies = await asyncio.gather(*(gateway.post("/v1/messages", ask_of(i)) for i in range(20)))

    assert all(is_whole(reply, i, stream=True) for i, reply in enumerate(replies))
    assert before == 20 and upstreams["a"].connections > before
    outcomes = [tuple(attempt["outcome"] for attempt in entry["attempts"]) for entry in gateway.entries()]
    # Who asks after the first of them was found dead takes none of the others.
    assert (
        {("stale_connection", "completed")} <= set(outcomes[20:]) <= {("stale_connection", "completed"), ("completed",)}
    )
    assert (await gateway.get("/health")).json["upstreams"][0]["failures"] == 0


async def test_an_errors_body_is_read_so_that_its_connection_serves_again(start_gateway, upstreams, caplog):
    """
    Errors come in herds: each must not cost a connection; but a body without end is given up.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1, breaker: {failures: 1000}"))
    upstreams["a"].script = FAULTS["529"]
    for _ in range(5):
        await gateway.post("/v1/messages", HELLO)
    kept = upstreams["a"].connections
    upstreams["a"].script = [head(529, "application/json"), *[body(b"x" * 65536)] * 64, stall()]

    endless = await gateway.post("/v1/messages", HELLO)

    assert kept == 1
    assert endless.status == 502 and endless.error["type"] == "api_error"
    await until(lambda: not upstreams["a"].open_connections)
    caplog.clear()


async def test_a_refusal_without_its_body_reaches_the_client(start_gateway, upstreams):
    """
    An error whose body does not come is not kept from the client until the connection breaks.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}))
    upstreams["a"].script = [head(413, "application/json"), stall()]
    gateway.tick(1)
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode()))
    await until(lambda: any(e.attempt and e.attempt.status for e in gateway.gateway.relay.running))

    gateway.clock.advance(6)
    gateway.gateway.tick(stood_s=5.75)  # in which its body could not be read
    held = [e.attempt.phase for e in gateway.gateway.relay.running if e.attempt]
    gateway.tick(6)

    async with asyncio.timeout(2):
        assert (await client.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
    assert held == [g.AttemptPhase.HELD]


# --- what is left alone, and how it comes back ----------------------------------------------------


async def open_breaker(gateway: GatewayUnderTest, upstream: ScriptedUpstream, fault: str) -> dict:
    """Have an upstream fail until it is left alone; how it then stands."""
    upstream.script = FAULTS[fault]
    users = itertools.cycle((KEY, BOB))
    while (standing := (await gateway.get("/health")).json["upstreams"][0])["state"] == "ok":
        await gateway.post("/v1/messages", HELLO, next(users))
    return standing


async def keys_checked(gateway: GatewayUnderTest) -> None:
    """Have the list of models asked for with the API keys that were refused, and wait until that is over."""
    gateway.tick()
    await until(lambda: not gateway.gateway.key_checks._tasks)


@pytest.mark.logs("upstream a is left alone for")
@pytest.mark.logs("no answer, attempts 1")
async def test_the_breaker_opens_lets_one_through_and_closes(start_gateway, upstreams):
    """
    After three failures in a row nobody is sent there; then one call finds out, and its answer lets the others in.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1, wait: 5s"))
    standing = await open_breaker(gateway, upstreams["a"], "closed before the head")
    refused = await gateway.post("/v1/messages", HELLO)
    gateway.tick(12)
    half_open = (await gateway.get("/health")).json["upstreams"][0]["state"]
    go_on = asyncio.Event()
    upstreams["a"].script = lambda request: [wait_for(go_on), *stream_of("Hello")]
    calls = [asyncio.ensure_future(gateway.post("/v1/messages", ask_of(i))) for i in range(5)]
    await until(lambda: gateway.gateway.relay.upstreams.waiting == 4 and len(upstreams["a"].requests) > 3)
    asked = len(upstreams["a"].requests)
    go_on.set()
    replies = await asyncio.gather(*calls)

    assert (standing["state"], standing["why"], standing["failures"]) == ("cooling", "cut", 3)
    assert standing["since"] == "2026-09-21T14:13:20.000Z" and standing["until"].startswith("2026-09-21T14:13:")
    assert (refused.status, refused.error["type"], half_open) == (529, "overloaded_error", "half_open")
    assert asked == 4  # three that failed, and the one that finds out
    assert [reply.texts for reply in replies] == [["Hello"]] * 5
    assert (await gateway.get("/health")).json["upstreams"][0]["state"] == "ok"


async def probed(gateway: GatewayUnderTest) -> tuple[int, bool, str | None]:
    """What a readiness probe gets, and what it may read."""
    reply = await gateway.get("/health", token="")
    assert (await gateway.get("/livez", token="")).status == 200
    return reply.status, reply.json["ready"], reply.json["reason"]


READY, NOT_READY = (200, True, None), (503, False, "no upstream key can be used")


@pytest.mark.logs("is left alone for")
@pytest.mark.logs("refuses our API key")
@pytest.mark.logs("no answer, attempts 1")
async def test_the_gateway_is_not_ready_while_no_upstream_key_can_be_used(start_gateway, upstreams):
    """
    One key refused, the other's upstream broken: a load balancer is to ask another gateway. With the first cooldown's
    end it is ready, because nothing but a call finds out; a restart would not help, so it is live all the time.
    """
    text = config_of({"a": upstreams["a"].url, "b": upstreams["b"].url}, "max_attempts: 1, wait: 0s")
    gateway = await start_gateway(text)
    upstreams["a"].script, upstreams["b"].script = FAULTS["401"], FAULTS["closed before the head"]
    found = [await probed(gateway)]

    for number in range(40):
        await gateway.post("/v1/messages", ask_of(number), (KEY, BOB)[number % 2])
        found.append(await probed(gateway))
        if found[-1] != READY:
            break
    gateway.clock.advance(11)  # the breaker's cooldown
    ended = await probed(gateway)
    states = [row["state"] for row in (await gateway.get("/health")).json["upstreams"]]

    assert found == [READY] * (len(found) - 1) + [NOT_READY]
    assert (ended, states) == (READY, ["half_open", "half_open"])


@pytest.mark.logs("is left alone for")
@pytest.mark.parametrize("fault", ["429 with retry-after", "500"])
async def test_a_gateway_whose_upstream_rests_for_less_than_everything_is_ready(start_gateway, upstreams, fault):
    """
    Too many calls, or one user's alone: the answer with its `retry-after` is better than none.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1, wait: 0s"))
    upstreams["a"].script = FAULTS[fault]
    users = (KEY, BOB) if fault.startswith("429") else (KEY,)
    for number in range(3):
        for model in ("claude-a", "claude-b"):
            await gateway.post("/v1/messages", ask_of(number) | {"model": model}, users[number % len(users)])
        gateway.clock.advance(5)

    row = (await gateway.get("/health")).json["upstreams"][0]
    assert "until" in (row if fault == "500" else row["keys"][0])
    assert await probed(gateway) == READY


@pytest.mark.logs("upstream a is left alone for the calls of alice only, for")
async def test_an_upstream_left_alone_for_one_user_is_ok_for_the_operator(start_gateway, upstreams):
    """
    /health says so, without the user's name, and /metrics has it as ok, with its cooldown; the log names the user.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1"))
    upstreams["a"].script = FAULTS["500"]
    for _ in range(3):
        await gateway.post("/v1/messages", HELLO)
        gateway.clock.advance(5)

    standing = (await gateway.get("/health")).json["upstreams"][0]
    metrics = (await gateway.get("/metrics")).body.decode()

    assert (standing["state"], standing["for_one_user"], standing["why"]) == ("ok", True, "500")
    assert "for_one_user" not in standing["keys"][0] and "alice" not in str(standing)
    assert 'claude_gateway_upstream_state{key="",state="ok",upstream="a"} 1.0' in metrics
    assert 'claude_gateway_upstream_cooldown_seconds{key="",upstream="a"} 0.0' not in metrics


@pytest.mark.logs("is left alone for")
@pytest.mark.logs("no answer, attempts 1")
async def test_a_long_stream_that_ends_forgives_nothing_that_came_later(start_gateway, upstreams):
    """
    It began before the upstream broke: with its end the count of trips, by which cooldowns double, is not forgotten.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "breaker: {failures: 1}, max_attempts: 1"))
    go_on, script = asyncio.Event(), stream_of("Hello")
    upstreams["a"].scripts = [[*script[:4], wait_for(go_on), *script[4:]], [close()], [close()]]
    asking = asyncio.ensure_future(gateway.post("/v1/messages", ask_of(1)))
    await until(lambda: any(exchange.bytes_down for exchange in gateway.gateway.relay.running))
    await gateway.post("/v1/messages", ask_of(2))
    await gateway.post("/v1/messages", ask_of(3), BOB)

    go_on.set()
    reply = await asking
    await gateway.settled()

    (choice,) = gateway.gateway.relay.upstreams.choices(gateway.gateway.config.upstreams[0])
    assert reply.texts == ["Hello"] and not reply.was_cut
    assert (choice.health.failures, choice.health.cooldowns[g.EVERYBODY].trips) == (2, 1)


@pytest.mark.logs("401, the upstream refuses our API key; users who have not met it wait for 10.0 s. Once the config")
@pytest.mark.logs("has a good one: gateway.py upstream reset a")
@pytest.mark.logs("no answer, attempts 1")
async def test_upstream_reset_lets_it_be_asked_again(start_gateway, upstreams, capsys):
    """
    `gateway.py upstream reset NAME` asks the running gateway over its own socket.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1"))
    gateway.listen_locally()
    await gateway.post("/v1/messages", HELLO)
    upstreams["a"].script = FAULTS["401"]
    await gateway.post("/v1/messages", HELLO)
    await gateway.post("/v1/messages", HELLO, BOB)
    before = (await gateway.get("/health")).json["upstreams"][0]["keys"][0]["state"]
    upstreams["a"].script = good("a")

    command = ["--config", str(gateway.path), "upstream", "reset", "a"]
    code = await asyncio.to_thread(g.main, command)

    assert (before, code) == ("cooling", 0)
    assert capsys.readouterr().out == "a: cooldowns and failure counts were reset; it is asked again.\n"
    reply = await gateway.post("/v1/messages", ask_of(2))
    assert reply.texts == ["a ", "heard ", "question 2"], reply


@pytest.mark.logs("401, the upstream refuses our API key")
@pytest.mark.logs("upstream b is left alone for")
@pytest.mark.logs("no answer, attempts")
async def test_upstream_test_says_what_the_running_gateway_leaves_alone(start_gateway, upstreams, capsys):
    """
    The key answers again, but the gateway still goes by what its calls met: until when, why, and what ends that.
    """
    text = config_of({"a": upstreams["a"].url, "b": upstreams["b"].url}, "max_attempts: 1, wait: 0s")
    gateway = await start_gateway(text)
    gateway.listen_locally()
    gateway.clock.advance(1e9)  # later than the command's own clock
    upstreams["a"].script, upstreams["b"].script = FAULTS["401"], FAULTS["closed before the head"]
    for number in range(40):
        await gateway.post("/v1/messages", ask_of(number), (KEY, BOB)[number % 2])
        if await probed(gateway) == NOT_READY:
            break
    a, b = (await gateway.get("/health")).json["upstreams"]
    models = json_body({"data": [{"id": "claude-haiku-4-5"}]})
    for name in "ab":
        upstreams[name].script = lambda request: models if request.method == "GET" else stream_of("Hello")

    async def told(*options: str) -> str:
        command = ["--config", str(gateway.path), "upstream", "test", *options]
        assert await asyncio.get_running_loop().run_in_executor(None, g.main, command) == 0
        return capsys.readouterr().out

    lines = [line for line in (await told()).splitlines() if "gateway" in line]
    rows = [row for upstream in json.loads(await told("--json"))["upstreams"] for row in upstream["cooldowns"]]
    await gateway.stop()
    gone = await told()

    assert lines == [
        "  key 1  warn                the running gateway leaves it alone "
        f"until {a['keys'][0]['until']} (401): `gateway.py upstream reset a` ends that",
        "  all    warn                the running gateway leaves it alone "
        f"until {b['until']} (cut): `gateway.py upstream reset b` ends that",
    ]
    assert [(row["why"], row["until"]) for row in rows] == [("401", a["keys"][0]["until"]), ("cut", b["until"])]
    assert "the running gateway" not in gone and "2 of 2 keys answered" in gone


def test_upstream_reset_says_when_nobody_listens(tmp_path, capsys):
    """
    A name that is not there is told with what was meant, and a reset that nobody took leaves nothing behind.
    """
    path = tmp_path / "config.yaml"
    path.write_text("upstreams: [{name: anthropic, format: demo}]\n")
    (tmp_path / "usage").mkdir()

    codes = [g.main(["--config", str(path), "upstream", "reset", name]) for name in ("anthropc", "anthropic")]

    assert codes == [1, 1]
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: there is no upstream named 'anthropc', did you mean anthropic?"
    assert second == f"error: no gateway was reached on {tmp_path}/usage; a restart forgets cooldowns as well"
    assert list((tmp_path / "usage").iterdir()) == []


# --- repairs ------------------------------------------------------------------------------------------


BAD_SIGNATURE = json_body(
    {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "messages.1.content.0: Invalid `signature` in `thinking` block",
        },
    },
    status=400,
)
THOUGHTFUL = HELLO_STREAM | {
    "messages": [
        {"role": "user", "content": "question 9"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": "abc"}, {"type": "text", "text": "yes"}],
        },
        {"role": "user", "content": "go on"},
    ]
}


@pytest.mark.parametrize("is_on", [True, False])
async def test_a_thinking_block_of_another_account_is_left_out_once(start_gateway, upstreams, is_on):
    """
    Opt-in, on that very error only: the same request without thinking blocks; otherwise the error is the client's.
    """
    more = {"a": ", retry_without_thinking: true" if is_on else ""}
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, more=more))
    upstreams["a"].scripts = [BAD_SIGNATURE]

    reply = await gateway.post("/v1/messages", THOUGHTFUL)

    requests = [request.json for request in upstreams["a"].requests]
    assert requests[0] == THOUGHTFUL
    if is_on:
        assert reply.texts == ["a ", "heard ", "question 9"]
        assert [block["type"] for block in requests[1]["messages"][1]["content"]] == ["text"]
        assert requests[1] | {"messages": 0} == THOUGHTFUL | {"messages": 0}
    else:
        assert (reply.status, len(requests)) == (400, 1)


async def test_a_repair_is_made_even_where_no_other_attempt_is_left(start_gateway, upstreams):
    """
    `max_attempts` bounds what is tried again as it is; the repaired request is asked once all the same.
    """
    more = {"a": ", retry_without_thinking: true"}
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1", more))
    upstreams["a"].scripts = [BAD_SIGNATURE]

    reply = await gateway.post("/v1/messages", THOUGHTFUL)

    assert reply.texts == ["a ", "heard ", "question 9"]
    assert [attempt["outcome"] for attempt in gateway.entries()[0]["attempts"]] == ["400", "completed"]


async def test_a_signature_that_stays_wrong_is_told_once(start_gateway, upstreams):
    """
    One repair, no more: the second refusal is the client's.
    """
    more = {"a": ", retry_without_thinking: true"}
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, more=more))
    upstreams["a"].script = BAD_SIGNATURE

    reply = await gateway.post("/v1/messages", THOUGHTFUL)

    assert (reply.status, len(upstreams["a"].requests)) == (400, 2)
    assert "Invalid `signature` in `thinking` block" in reply.error["message"]


def rejects_usage(request: Request) -> list[Step]:
    """An upstream that knows no `stream_options`."""
    if "stream_options" in request.json:
        message = "Unrecognized request argument supplied: stream_options"
        return json_body({"error": {"type": "invalid_request_error", "message": message}}, status=400)
    return [head(200, "text/event-stream"), chat_chunk("Hello"), chat_done(), end()]


@pytest.mark.logs("rejects stream_options.include_usage")
async def test_an_upstream_that_rejects_include_usage_is_asked_without_it(start_gateway, upstreams, clock):
    """
    At once, beyond `max_attempts`, and for ten minutes; then it may have learnt the word.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1", {"a": ", format: openai"}))
    upstreams["a"].script = rejects_usage

    async def asked() -> list[bool]:
        before = len(upstreams["a"].requests)
        reply = await gateway.post("/v1/chat/completions", HELLO_STREAM)
        assert reply.status == 200 and b"Hello" in reply.body
        return ["stream_options" in request.json for request in upstreams["a"].requests[before:]]

    first, second = await asked(), await asked()
    clock.advance(601)
    third = await asked()

    assert (first, second, third) == ([True, False], [False], [True, False])
    assert [attempt["outcome"] for attempt in gateway.entries()[0]["attempts"]] == ["400", "completed"]
    assert gateway.entries()[0]["estimated"]


@pytest.mark.logs("rejects stream_options.include_usage")
async def test_a_model_that_rejects_include_usage_leaves_the_other_models_booked(start_gateway, upstreams):
    """
    Only that model is not asked again: the other models of the address keep their usage.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, more={"a": ", format: openai"}))
    upstreams["a"].script = rejects_usage
    await gateway.post("/v1/chat/completions", HELLO_STREAM)
    before = len(upstreams["a"].requests)

    await gateway.post("/v1/chat/completions", HELLO_STREAM)
    await gateway.post("/v1/chat/completions", HELLO_STREAM | {"model": "another"})

    asked = ["stream_options" in request.json for request in upstreams["a"].requests[before:]]
    assert asked == [False, True, False]


async def test_a_client_cannot_make_others_streams_be_booked_by_estimate(start_gateway, upstreams):
    """
    What an upstream says of a client's own `stream_options`, or says again without ours, is that client's matter.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, more={"a": ", format: openai"}))
    upstreams["a"].script = json_body(
        {"error": {"type": "invalid_request_error", "message": "bad stream_options"}}, status=400
    )

    own = await gateway.post("/v1/chat/completions", HELLO_STREAM | {"stream_options": {"x": 1}})
    anyway = await gateway.post("/v1/chat/completions", HELLO_STREAM)

    assert (own.status, anyway.status) == (400, 400)
    asked = ["stream_options" in request.json for request in upstreams["a"].requests]
    assert asked == [True, True, False]
    assert not gateway.gateway.relay.pools.of(gateway.gateway.config.upstreams[0]).without_usage


async def test_headers_and_betas_go_by_the_upstreams_rules(start_gateway, upstreams):
    """
    `headers` sets and removes, `betas.drop` takes values out of `anthropic-beta`, a path in the URL stays in front.
    """
    rules = (
        ', headers: {set: {X-Team: research, user-agent: gateway}, remove: [X-App]}, betas: {drop: ["context-1m-*"]}'
    )
    gateway = await start_gateway(config_of({"a": upstreams["a"].url + "/proxy/anthropic/v1"}, more={"a": rules}))

    await gateway.post(
        "/v1/messages?beta=true",
        HELLO_STREAM,
        x_app="cli",
        user_agent="claude-cli",
        anthropic_beta="claude-code-1, context-1m-2025-08-07",
    )

    (request,) = upstreams["a"].requests
    assert request.target == "/proxy/anthropic/v1/messages?beta=true"
    found = {name: request.header.get(name) for name in ("x-team", "user-agent", "x-app", "anthropic-beta")}
    assert found == {"x-team": "research", "user-agent": "gateway", "x-app": None, "anthropic-beta": "claude-code-1"}


async def test_a_client_chooses_no_account_and_learns_of_none(start_gateway, upstreams):
    """
    What names an organization, a project or an address stays here in both directions; the rest goes its way.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, more={"a": ", headers: {pass: [X-Title]}"}))
    account = {"openai_organization": "org-1", "anthropic_ratelimit_tokens_remaining": "0", "x_ratelimit_limit": "5"}
    upstreams["a"].script = json_body({"type": "message", "content": []}, **account, request_id="req_1")

    fields = {"openai_organization": "org-2", "cf_connecting_ip": "10.0.0.1", "x_goog_api_key": "k", "x_title": "t"}
    reply = await gateway.post("/v1/messages", HELLO, **fields, anthropic_version="2023-06-01")

    (request,) = upstreams["a"].requests
    own = {"host", "content-length", "accept-encoding", "x-api-key"}
    assert set(request.header) - own == {"x-title", "anthropic-version"}
    assert set(reply.headers) == {"content-type", "request-id", "content-length", "date"}


# --- our own trouble ----------------------------------------------------------------------------------


class Resolver:
    """Looks names up as a test says: at once, or when it lets it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.slow: dict[str, threading.Event] = {}
        self.addresses = ["127.0.0.1"]
        self.fails = False

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        if host in self.slow:
            assert self.slow[host].wait(20)
        if self.fails:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return list(self.addresses)


async def test_a_name_that_is_slow_to_look_up_holds_up_no_other(start_gateway, upstreams):
    """
    Two hundred calls wait for one name, with one lookup between them; a call to another upstream is answered at once.
    """
    resolver = Resolver()
    resolver.slow["slow.test"] = threading.Event()
    ports = {name: upstreams[name].url.rpartition(":")[2] for name in "ab"}
    urls = {"a": f"http://slow.test:{ports['a']}", "b": f"http://quick.test:{ports['b']}"}
    more = {"a": ', models: ["claude-test"]', "b": ', models: ["other"]'}
    gateway = await start_gateway(config_of(urls, more=more))
    gateway.gateway.relay.pools.names = g.Names(gateway.clock.clock, resolver)
    waiting = [asyncio.ensure_future(gateway.post("/v1/messages", ask_of(i))) for i in range(200)]
    await until(lambda: len(gateway.gateway.relay.running) == 200, within_s=20)

    quick = [await gateway.post("/v1/messages", ask_of(i) | {"model": "other"}) for i in range(3)]
    asked = list(resolver.asked)
    resolver.slow["slow.test"].set()
    slow = await asyncio.gather(*waiting)

    assert [reply.texts[0] for reply in quick] == ["b "] * 3
    assert asked == ["slow.test", "quick.test"]
    assert {reply.texts[0] for reply in slow} == {"a "}
    assert [row["state"] for row in (await gateway.get("/health")).json["upstreams"]] == ["ok", "ok"]


async def test_addresses_are_kept_for_a_minute_and_used_while_they_are_looked_up_anew(clock):
    """
    Then a new lookup runs beside the calls; one that fails or hangs takes the old addresses away after ten minutes.
    """
    resolver = Resolver()
    names = g.Names(clock.clock, resolver)
    first = [await names.find("a.test", False) for _ in range(3)]
    clock.advance(59)
    kept = await names.find("a.test", False), len(resolver.asked)

    resolver.addresses = ["127.0.0.2"]
    clock.advance(2)
    stale = await names.find("a.test", False)
    await until(lambda: not names._running)
    fresh = await names.find("a.test", False), len(resolver.asked)

    resolver.fails = True
    clock.advance(600)
    failing = await names.find("a.test", False)
    await until(lambda: not names._running)
    clock.advance(61)

    assert (first, kept) == ([["127.0.0.1"]] * 3, (["127.0.0.1"], 1))
    assert (stale, fresh, failing) == (["127.0.0.1"], (["127.0.0.2"], 2), ["127.0.0.2"])
    with pytest.raises(OSError, match="Temporary failure"):
        await names.find("a.test", False)


async def test_addresses_that_cannot_be_connected_to_are_looked_up_anew(start_gateway, upstreams, caplog):
    """
    An upstream that moved is found by the next attempt, not after a minute.
    """
    resolver = Resolver()
    resolver.addresses = ["127.0.0.9"]
    gateway = await start_gateway(config_of({"a": f"http://a.test:{upstreams['a'].url.rpartition(':')[2]}"}))
    gateway.gateway.relay.pools.names = g.Names(gateway.clock.clock, resolver)
    asking = asyncio.ensure_future(gateway.post("/v1/messages", ask_of(1)))
    await until(lambda: gateway.gateway.relay.upstreams.waiting)
    resolver.addresses = ["127.0.0.1"]

    async with passing_time(gateway):
        reply = await asking

    assert reply.texts[0] == "a " and len(gateway.entries()[0]["attempts"]) > 1
    caplog.clear()


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No file, socket or pipe can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(os.devnull, os.O_RDONLY)
    os.close(probe)  # the lowest that is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.logs("no answer")
async def test_want_of_descriptors_is_blamed_on_no_upstream(start_gateway, upstreams):
    """
    Whoever asks gets 503 and when to come again; the upstream is as good as before, and asked as soon as it can be.
    """
    gateway = await start_gateway(config_of({"a": upstreams["a"].url}, "max_attempts: 1"))
    clients = [await gateway.connect() for _ in range(4)]
    await gateway.post("/v1/messages", ask_of(0))  # the ledger's file is open
    gateway.gateway.relay.pools.of(gateway.gateway.config.upstreams[0]).forget_idle()

    with no_descriptors():
        replies = [
            await client.request("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())
            for client in clients
        ]
    after = await gateway.post("/v1/messages", ask_of(1))

    assert [(reply.status, reply.headers["retry-after"]) for reply in replies] == [(503, "5")] * 4
    assert replies[0].error["type"] == "overloaded_error" and "descriptors" in replies[0].error["message"]
    assert after.texts[0] == "a "
    entry = gateway.entries()[1]
    assert (entry["outcome"], entry["attempts"][0]["outcome"]) == ("unavailable", "own_trouble")
    assert (await gateway.get("/health")).json["upstreams"][0]["failures"] == 0


async def test_want_of_descriptors_at_the_first_lookup_of_a_name_is_no_ones_fault(clock):
    """
    The resolver then says that there is no such name, or that it failed for a while.
    """
    with no_descriptors(), pytest.raises(OSError) as caught:
        await g.Names(clock.clock).find("never-asked-before.invalid", False)

    assert g.is_own_trouble(caught.value)


@pytest.mark.parametrize("number", ["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EADDRNOTAVAIL", "ECONNREFUSED"])
def test_what_the_host_lacks_is_told_from_what_an_upstream_does(number):
    """
    A refused connection is the upstream's.
    """
    assert g.is_own_trouble(OSError(getattr(errno, number), "x")) is (number != "ECONNREFUSED")
    assert not g.is_own_trouble(socket.gaierror(socket.EAI_NONAME, "x"))


@contextlib.contextmanager
def deaf_address() -> Iterator[str]:
    """The URL of one whose queue is full: whoever connects to it waits."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, contextlib.ExitStack() as fillers:
        for _ in range(3):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        yield f"http://127.0.0.1:{deaf.getsockname()[1]}"


@pytest.mark.logs("no answer")
async def test_a_loop_that_stood_still_fails_no_attempt(start_gateway, upstreams):
    """
    What could not be heard did not come too late: connecting, waiting for a first byte, silence in a stream.
    """
    with deaf_address() as url:
        urls = {"a": url, "b": upstreams["b"].url, "c": upstreams["c"].url}
        more = {name: f", models: [{name}], timeouts: {{connect: 10s, first_byte: 10s, idle: 10s}}" for name in "abc"}
        gateway = await start_gateway(config_of(urls, "max_attempts: 1, deadline: 15s", more=more))
        go_on = asyncio.Event()
        upstreams["b"].script = [wait_for(go_on), *stream_of("Hello")]
        begun = stream_of("Hello")
        upstreams["c"].script = [*begun[:4], wait_for(go_on), *begun[4:]]
        bodies = [ask_of(0, stream=name != "a") | {"model": name} for name in "abc"]
        calls = [asyncio.ensure_future(gateway.post("/v1/messages", body)) for body in bodies]
        await until(lambda: any(exchange.bytes_down for exchange in gateway.gateway.relay.running))
        await until(lambda: upstreams["b"].requests and len(gateway.gateway.relay.running) == 3)

        gateway.clock.advance(40)
        gateway.gateway.tick(stood_s=39.75)
        await asyncio.sleep(0)
        running = [not call.done() for call in calls]
        go_on.set()
        answered = await asyncio.gather(*calls[1:])
        gateway.tick(11)
        late = await calls[0]

    assert running == [True] * 3
    assert [reply.texts for reply in answered] == [["Hello"]] * 2
    assert late.status == 504
    assert gateway.entries()[-1]["attempts"][0]["outcome"] == "connect_timeout"


@pytest.mark.logs("the event loop stood still for")
async def test_the_clockwork_notices_that_the_loop_stood_still(tmp_path, clock, caplog):
    """
    A tick that comes late tells by how much; ticks in time tell nothing.
    """
    path = tmp_path / "config.yaml"
    path.write_text("upstreams: [{name: demo, format: demo}]\nserver: {port: 0}\n")
    server = g.Server(g.Config.load(path, clock.clock), g.Pace(tick_s=0.001))
    await server.start()

    ticker = asyncio.ensure_future(server._tick())
    clock.advance(0.9)
    await asyncio.sleep(0.01)
    in_time = "stood still" in caplog.text
    clock.advance(12)
    await until(lambda: "stood still for 12" in caplog.text)
    await asyncio.sleep(0.01)
    ticker.cancel()
    await server.close()

    assert not in_time and caplog.text.count("stood still") == 1


# --- SSRF ----------------------------------------------------------------------------------------------


@pytest.mark.logs("could not be reached")
@pytest.mark.parametrize("name", ["2852039166", "0xa9fea9fe", "0251.0376.0251.0376"])
async def test_a_name_that_leads_to_a_metadata_address_is_not_connected_to(start_gateway, name):
    """
    What a name resolves to is looked at, not how it is written; those addresses are then the ones connected to.
    """
    gateway = await start_gateway(config_of({"a": f"http://{name}"}, "max_attempts: 1"))

    reply = await gateway.post("/v1/messages", HELLO)

    assert (reply.status, gateway.entries()[0]["outcome"]) == (502, "unreachable")
    names = gateway.gateway.relay.pools.names
    for _ in range(2):  # also where the addresses are known already
        with pytest.raises(OSError, match=r"leads to 169\.254\.169\.254, a link-local or metadata address"):
            await names.find(name, allow_private=False)
    assert await names.find(name, allow_private=True) == ["169.254.169.254"]


def test_an_address_in_the_config_is_looked_at_when_it_is_read(tmp_path):
    """
    A metadata address in a URL is told with its line, before anything is sent there.
    """
    text = "upstreams:\n  - name: a\n    url: http://169.254.169.254/latest\n"

    with pytest.raises(g.ConfigError, match=r"3: upstreams\[0\]\.url: is a link-local or metadata"):
        g.Config.parse(text, tmp_path / "config.yaml", g.Clock(), {})

    g.Config.parse(text + "    allow_private: true\n", tmp_path / "config.yaml", g.Clock(), {})

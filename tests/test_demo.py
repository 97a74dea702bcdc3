"""The demo: an upstream that needs no API key and speaks like a real one."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import anthropic.types as claude
import pytest
from conftest import config_text
from hypothesis import given, settings
from hypothesis import strategies as st

import gateway as g

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
SENTENCE = "Hello from the demo upstream. Put a real upstream into config.yaml to talk to a model."


def ask(path: str, request: object) -> tuple[int, dict, list[bytes]]:
    """What the demo answers."""
    return g.demo_answer(path, request if isinstance(request, bytes) else json.dumps(request).encode())


def user(content: object, **fields: object) -> dict:
    """A request with one message of the user's."""
    return {"model": "claude-demo", "max_tokens": 100, "messages": [{"role": "user", "content": content}]} | fields


CLAUDE_EVENTS = {
    "message_start": claude.RawMessageStartEvent,
    "content_block_start": claude.RawContentBlockStartEvent,
    "content_block_delta": claude.RawContentBlockDeltaEvent,
    "content_block_stop": claude.RawContentBlockStopEvent,
    "message_delta": claude.RawMessageDeltaEvent,
    "message_stop": claude.RawMessageStopEvent,
}


def claude_events(events: list[bytes]) -> list:
    """A Messages stream as the official SDK reads it."""
    read = []
    for event in events:
        name, data, *rest = event.decode().split("\n")
        kind = name.removeprefix("event: ")
        assert data.startswith("data: ") and rest == ["", ""]
        fields = json.loads(data.removeprefix("data: "))
        assert fields["type"] == kind
        read.append(CLAUDE_EVENTS[kind].model_validate(fields))
    return read


# Words


def test_a_message_has_all_that_the_official_sdk_expects():
    """
    The first answer that a newcomer sees goes through the same client as the real ones later.
    """
    status, answer, events = ask(MESSAGES, user("say hello"))

    message = claude.Message.model_validate(answer)
    assert (status, events) == (200, [])
    assert message.usage.input_tokens > 0
    assert message.model_dump(exclude_unset=True, exclude={"usage": {"input_tokens"}}) == {
        "id": "msg_demo",
        "type": "message",
        "role": "assistant",
        "model": "claude-demo",
        "content": [{"type": "text", "text": SENTENCE}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"output_tokens": 16},
    }


def test_a_messages_stream_tells_the_same_word_by_word():
    """
    In the order of the API: start, block, words, end of the block, usage, stop.
    """
    _, whole, _ = ask(MESSAGES, user("say hello"))

    events = claude_events(ask(MESSAGES, user("say hello", stream=True))[2])

    kinds = [event.type for event in events]
    words = [event.delta.text for event in events[2:-3]]
    start, delta = events[0].message, events[-2]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[2:-3] == ["content_block_delta"] * 16
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert (words[:3], "".join(words)) == (["Hello ", "from ", "the "], SENTENCE)
    assert (start.id, start.model, start.content, start.stop_reason) == ("msg_demo", "claude-demo", [], None)
    assert (start.usage.input_tokens, start.usage.output_tokens) == (delta.usage.input_tokens, 1)
    assert (delta.delta.stop_reason, delta.usage.output_tokens) == ("end_turn", whole["usage"]["output_tokens"])


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=60), stream=st.booleans())
def test_the_same_request_has_the_same_answer(text, stream):
    """
    Tests and benchmarks can rely on it; nothing in the answer is a clock or a dice.
    """
    request = json.dumps(user(text, stream=stream)).encode()

    assert ask(MESSAGES, request) == ask(MESSAGES, request)


# Numbers


ASKS = {
    "a line": user("say hello"),
    "a system message": user("say hello", system="Be brief."),
    "tools": user("say hello", tools=[{"name": "Bash", "input_schema": {}}]),
}


@pytest.mark.parametrize("request_", ASKS.values(), ids=ASKS)
def test_count_tokens_says_what_the_call_will_say(request_):
    """
    The count is asked for without max_tokens and stream, which are no input.
    """
    counted = {name: value for name, value in request_.items() if name != "max_tokens"}

    _, count, _ = ask(COUNT, counted)
    usages = [ask(MESSAGES, request_)[1]["usage"], ask(MESSAGES, request_ | {"stream": True})[1]["usage"]]

    totals = [usage["input_tokens"] for usage in usages]
    claude.MessageTokensCount.model_validate(count)
    assert totals == [count["input_tokens"]] * 2


@pytest.mark.parametrize("request_", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("stream", [False, True])
def test_the_meter_books_what_the_demo_says(tmp_path, request_, stream):
    """
    Both ends are ours: what one says, the other understands, exactly and without an estimate.
    """
    (tmp_path / "config.yaml").write_text(config_text("http://upstream.test"))
    config = g.Config.load(tmp_path / "config.yaml")
    request = request_ | {"stream": stream}

    meter = g.MessagesMeter(g.Call(config, next(iter(config.keys)), g.ROUTES[MESSAGES], b"", [], ""))
    _, answer, events = ask(MESSAGES, request)
    meter.start(stream)
    meter.read(b"".join(events) if stream else json.dumps(answer).encode(), True)

    usage = ask(MESSAGES, request)[1]["usage"]
    expected = g.Usage(input_tokens=usage["input_tokens"], output_tokens=usage["output_tokens"])
    assert meter.spend(True) == expected


# Bad requests

BAD_REQUESTS = {
    "not JSON": b"{",
    "too deep": b'{"model": "m", "messages": [{"role": ' + b"[" * 100_000,
    "a list": [],
    "no model": {"messages": []},
    "no messages": {"model": "m"},
    "stream in words": user("x", stream="yes"),
}


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize("request_", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_is_a_400(path, request_):
    """
    As a real API would say it: whoever tries the demo has probably made a mistake, not found a bug.
    """
    status, answer, events = ask(path, request_)

    assert (status, events) == (400, [])
    assert (answer["type"], answer["error"]["type"]) == ("error", "invalid_request_error")
    assert answer["error"]["message"]


# The line


@dataclass
class Heard:
    """What the listener of a line was told; `hook` is called with each piece."""

    hook: Callable[[bytes], None] = lambda piece: None
    head_: tuple[int, g.Headers] | None = None
    pieces: list[bytes] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def head(self, status: int, headers: g.Headers) -> None:
        assert self.head_ is None and not self.pieces
        self.head_ = (status, headers)

    def received(self, body: bytes, last: bool) -> None:
        assert self.head_ is not None and not self.ended.is_set()
        self.pieces.append(body)
        self.hook(body)
        if last:
            self.ended.set()

    def lost(self, failure: g.Failure) -> None:
        raise AssertionError(failure)

    async def whole(self) -> bytes:
        """The body, when it is all there."""
        async with asyncio.timeout(5):
            await self.ended.wait()
        return b"".join(self.pieces)


HEAD = b"POST /v1/messages?beta=true HTTP/1.1\r\nhost: demo\r\n\r\n"
STREAM = json.dumps(user("say hello", stream=True)).encode()
WHOLE = json.dumps(user("say hello")).encode()


async def turns(count: int = 100) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_line_of_the_demo_streams_event_by_event():
    """
    The relay sees no difference to a connection: a head, pieces, an end, and never before `send` has returned.
    """
    line, heard = g.DemoLine(0.0), Heard()

    line.send(HEAD, [STREAM], heard)
    at_once = (heard.head_, line.heard)
    body = await heard.whole()

    assert at_once == (None, False)
    assert heard.head_ == (
        200,
        [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
    )
    assert heard.pieces == ask(MESSAGES, STREAM)[2]
    assert body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n') and line.heard


@pytest.mark.parametrize(("body", "status"), [(WHOLE, 200), (b"{", 400)], ids=["a good one", "a bad one"])
async def test_a_line_of_the_demo_answers_at_once_where_no_stream_is_wanted(body, status):
    """
    One JSON body; errors too, whatever was asked for.
    """
    line, heard = g.DemoLine(0.0), Heard()

    line.send(HEAD, [body], heard)
    answer = await heard.whole()

    assert heard.head_ == (status, [(b"content-type", b"application/json"), (b"cache-control", b"no-cache")])
    assert json.loads(answer) == ask(MESSAGES, body)[1]


@pytest.mark.parametrize("when", ["before the head", "in the middle"])
async def test_an_aborted_line_says_nothing_more(when):
    """
    A client that left is not told the rest, and no timer is left behind.
    """
    line = g.DemoLine(0.0)
    heard = Heard(hook=lambda piece: line.abort())

    line.send(HEAD, [STREAM], heard)
    if when == "before the head":
        line.abort()
    await turns()

    assert len(heard.pieces) == (0 if when == "before the head" else 1)
    assert not heard.ended.is_set()


# Bounds


LONG_ASKS = {
    "a long text": user("a " * 400_000),
    "many messages": {"model": "m", "messages": [{"role": "assistant", "content": "x"}] * 40_000},
    "blocks that nobody looks at": user([{"type": "text", "text": "x", "rest": [[[]]] * 40_000}]),
}


@pytest.mark.parametrize("request_body", LONG_ASKS.values(), ids=LONG_ASKS)
def test_what_the_demo_looks_at_is_bounded(request_body):
    """
    It answers on the event loop. Counted in calls of Python and C functions.
    """
    body, calls = json.dumps(request_body).encode(), []
    sys.setprofile(lambda frame, event, value: calls.append(event) if event in ("call", "c_call") else None)
    try:
        status, answer, _ = g.demo_answer(MESSAGES, body)
    finally:
        sys.setprofile(None)

    assert status == 200 and len(json.dumps(answer)) < 20_000
    assert len(calls) < 200


@pytest.mark.parametrize(("size", "status"), [(g.MAX_DEMO_BODY, 200), (g.MAX_DEMO_BODY + 1, 413)])
def test_a_body_of_more_than_two_megabytes_is_refused(size, status):
    """
    In the API's own words.
    """
    empty = json.dumps(user("")).encode()
    body = empty.replace(b'""', b'"' + b"x" * (size - len(empty)) + b'"')

    answered, answer, _ = g.demo_answer(MESSAGES, body)

    assert (len(body), answered) == (size, status)
    assert answer["type"] == ("message" if status == 200 else "error")

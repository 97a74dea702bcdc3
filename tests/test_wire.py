"""Wire: events out of bytes, targets and headers, what a body says, and what an answer cost."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sys
import time
import tracemalloc
from collections.abc import Iterable

import msgspec
import pytest
from conftest import KEY, UPSTREAM_KEY, TracedMemory, calls_made, config_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gateway as g

UUID = "0f4c8a5e-1b2d-4e3f-9a6b-7c8d9e0f1a2b"


def cuts(data: bytes) -> Iterable[tuple[bytes, ...]]:
    """The bytes whole, byte by byte, and cut in two at every position."""
    yield (data,)
    yield tuple(data[i : i + 1] for i in range(len(data)))
    for i in range(1, len(data)):
        yield data[:i], data[i:]


# Events


def events_by_the_standard(stream: bytes) -> list[bytes]:
    """The data of a stream's events, by the letter of WHATWG HTML, 9.2.6 (only events that have data)."""
    lines = re.split(rb"\r\n|\n|\r", stream)
    events, data = [], []
    for line in lines[:-1]:
        name, _, value = line.partition(b":")
        if not line:
            events, data = [*events, b"\n".join(data)], []
        elif name == b"data":
            data.append(value.removeprefix(b" "))
    return [event for event in events if event]


def events_of(pieces: Iterable[bytes], reader: g.EventReader | None = None) -> list[bytes]:
    """What the reader makes of the pieces."""
    reader = reader or g.EventReader()
    return [event for piece in pieces for event in reader.feed(piece)]


LINES = [
    *(b"", b"", b"data: a", b"data:b", b"data:  c ", b"data:", b'data: {"a": [1]}', b"data: data: x", b"data:a\0b"),
    *("data: één \u2028 \u0085 𝄞".encode(), b"event: ping", b"event:data:", b"id: 1", b"retry: 5", b": comment", b":"),
    *(b"datax: 1", b" data: x", b"x data: y", b"Data: z", b"x", b"data: \xff\xfe", b"event: \xe2\x80"),
]
EOLS = st.sampled_from([b"\n", b"\r\n", b"\r"])
STREAMS = st.one_of(
    st.lists(st.tuples(st.sampled_from(LINES), EOLS), max_size=12).map(lambda lines: b"".join(a + b for a, b in lines)),
    EOLS.flatmap(lambda eol: st.lists(st.sampled_from(LINES), max_size=12).map(eol.join)),
    st.lists(st.sampled_from([b"data:", b"\n", b"\r", b"x", b":", b" "]), max_size=25).map(b"".join),
)


@settings(deadline=None, max_examples=200)
@given(STREAMS)
@example(b"data: a\r\r\ndata: b\r\n\r\r\n\n")
def test_events_are_the_same_however_the_stream_is_cut(stream):
    """
    A chunk may end anywhere: in a line's end, in a character, between two line ends.
    """
    expected = events_by_the_standard(stream)

    for pieces in cuts(stream):
        assert events_of(pieces) == expected, pieces


STREAM_CASES = {
    "LF": (b"event: a\ndata: 1\n\ndata: 2\n\n", [b"1", b"2"]),
    "CRLF": (b"event: a\r\ndata: 1\r\n\r\ndata: 2\r\n\r\n", [b"1", b"2"]),
    "CR": (b"event: a\rdata: 1\r\rdata: 2\r\r", [b"1", b"2"]),
    "mixed": (b"data: 1\r\n\ndata: 2\n\rdata: 3\r\r\n", [b"1", b"2", b"3"]),
    "several data lines": (b'data: {"a":\ndata: 1}\n\n', [b'{"a":\n1}']),
    "data lines apart": (b"data: 1\nid: 7\ndata: 2\n\n", [b"1\n2"]),
    "one space is taken": (b"data:1\n\ndata: 2\n\ndata:  3\n\n", [b"1", b"2", b" 3"]),
    "comments": (b": ping\n\n: ping\ndata: 1\n:\n\n", [b"1"]),
    "blank lines": (b"\n\n\ndata: 1\n\n\n\n\ndata: 2\n\n", [b"1", b"2"]),
    "a line separator inside": ("data: {\u2028}\n\n".encode(), ["{\u2028}".encode()]),
    "data in a value": (b"event: data:\ndata: data: 1\n\n", [b"data: 1"]),
    "data in a name": (b"xdata: 1\n\n data: 2\n\nDATA: 3\n\n", []),
    "no data": (b"event: ping\n\ndata:\n\ndata: 1\n\n", [b"1"]),
    "an event without end": (b"data: 1\n\ndata: 2\n", [b"1"]),
    "a data line without a colon": (b"data: 1\ndata\ndata: 2\n\n", [b"1\n\n2"]),
}


@pytest.mark.parametrize(("stream", "events"), STREAM_CASES.values(), ids=STREAM_CASES)
def test_a_stream_has_these_events(stream, events):
    """
    WHATWG HTML, 9.2.6, case by case.
    """
    for pieces in cuts(stream):
        assert events_of(pieces) == events, pieces
    assert events_by_the_standard(stream) == events


class ShortReader(g.EventReader):
    """A reader to whom 40 bytes are a long event."""

    MAX_EVENT = 40
    MAX_START = 8


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
def test_an_event_beyond_the_bound_is_dropped_as_a_whole(eol):
    """
    Nothing of it passes for an event of its own, and those before and behind it are read.
    """
    long = eol.join([b"data: " + b"x" * 100, b"data: y", b"event: z", b"data: " + b"x" * 100, b"data: tail"])
    stream = (eol * 2).join([b"data: before", long, b"data: behind", b""])

    for size in range(1, 40):
        reader = ShortReader()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert events_of(pieces, reader) == [b"before", b"behind"], size
        assert reader.dropped == [b"data: xx"] and reader.between_events


def test_an_event_of_nine_megabytes_is_dropped_and_the_next_one_is_read():
    """
    Memory has a bound, whatever the upstream sends; an event of seven megabytes is still read.
    """
    reader, read = g.EventReader(), 256 << 10
    stream = b"data: %b\n\ndata: %b\n\ndata: 1\n\n" % (b"x" * (7 << 20), b"y" * (9 << 20))

    events = events_of((stream[i : i + read] for i in range(0, len(stream), read)), reader)

    assert [len(event) for event in events] == [7 << 20, 1]
    assert reader.dropped == [b"data: " + b"y" * 250]


def test_a_long_list_of_odd_items_is_not_read_one_by_one(config):
    """
    An answer of 7 MB with 600,000 of them held the loop for 43 s; the usage beside them counts all the same.
    """
    meter = g.ResponsesMeter(call_of(config, {"model": "m"}))
    meter.start(False)
    meter.read(
        json.dumps({"output": [{"type": 5}] * 5000, "usage": {"input_tokens": 7, "output_tokens": 2}}).encode(), False
    )

    assert calls_made(lambda: meter.read(b"", True)) < 500
    assert (meter.counts.input_tokens, meter.counts.output_tokens, meter._is_partial) == (7, 2, True)


def test_empty_lines_without_end_take_no_time():
    """
    A read of 1,400 bytes of them is 700 events without data: none of them is looked at.
    """
    for flood in (b"\n", b"\r", b"\r\n"):
        reader, piece = g.EventReader(), flood * 700

        assert calls_made(lambda reader=reader, piece=piece: [reader.feed(piece) for _ in range(20)]) < 20 * 15
        assert reader.feed(b"data: x\n\n") == [b"x"]


def test_a_long_event_is_joined_once_however_small_its_pieces_are():
    """
    8 MB in reads of 1,400 bytes took 18 s of everybody's time when what was there was copied at each read.
    """
    reader, piece = g.EventReader(), b"x" * 1400
    reader.feed(b"data: ")
    tracemalloc.start()

    most = 0
    for _ in range(2000):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        assert reader.feed(piece) == []
        most = max(most, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()

    assert most < 1 << 20  # the buffer grows by an eighth; a copy would be 2.8 MB
    assert [len(event) for event in reader.feed(b"\n\n")] == [2000 * 1400]


PING = b"event: ping\ndata: ours\n\n"


@settings(deadline=None, max_examples=200)
@given(STREAMS)
def test_a_ping_fits_where_the_reader_is_between_events(stream):
    """
    An event of our own, said there, is one event more and breaks none.
    """
    theirs = events_by_the_standard(stream)

    for i in range(len(stream) + 1):
        reader = g.EventReader()
        before = events_of([stream[:i]], reader)
        if reader.between_events:
            with_ping = events_by_the_standard(stream[:i] + PING + stream[i:])
            assert with_ping == [*before, b"ours", *theirs[len(before) :]], i


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
def test_the_reader_is_between_events_exactly_after_each(eol):
    """
    A client that waits can be kept alive: before the first event, and after every one.
    """
    event = eol.join([b": note", b"event: a", b"data: 1", b"", b""])

    reader, between = g.EventReader(), []
    for i in range(2 * len(event)):
        between.append(reader.between_events)
        reader.feed((event + event)[i : i + 1])
    between.append(reader.between_events)

    assert [i for i, is_between in enumerate(between) if is_between] == [0, len(event), 2 * len(event)]


# Targets

TARGETS = {
    b"/v1/messages": ("/v1/messages", b""),
    b"/v1/messages?beta=true": ("/v1/messages", b"beta=true"),
    b"/v1/messages?a=%2F../b?c=//d&e=%00": ("/v1/messages", b"a=%2F../b?c=//d&e=%00"),
    b"/v1/messages?": ("/v1/messages", b""),
    b"/v1/v1/messages?beta=true": ("/v1/messages", b"beta=true"),
    b"/v1/v1/v1/messages": ("/v1/v1/messages", b""),
    b"/v1//v1/messages": ("/v1/messages", b""),
    b"//v1///messages//": ("/v1/messages", b""),
    b"/v1/messages/": ("/v1/messages", b""),
    b"/v1/./messages/.": ("/v1/messages", b""),
    b"/v1/models/../messages": ("/v1/messages", b""),
    b"/../../v1/messages": ("/v1/messages", b""),
    b"/v1/messages/..": ("/v1", b""),
    b"/v1/x/%2e%2E/messages/%2e": ("/v1/messages", b""),
    b"/v1%2Fmessages": ("/v1/messages", b""),
    b"/v1/x%2f..%2fmessages": ("/v1/messages", b""),
    b"/%76%31/messages": ("/v1/messages", b""),
    b"/v1/%252e%252e/messages": ("/v1/%2e%2e/messages", b""),
    b"/v1/messages%3Fbeta": ("/v1/messages?beta", b""),
    b"/v1/messages#x": ("/v1/messages#x", b""),
    b"/v1/messages;x": ("/v1/messages;x", b""),
    b"/v1\\messages": ("/v1\\messages", b""),
    b"/V1/Messages": ("/V1/Messages", b""),
    b"/v1/messages%00": ("/v1/messages\0", b""),
    b"/v1/mod%C3%A9": ("/v1/modé", b""),
    b"/v1/%ff": ("/v1/\ufffd", b""),
    b"/%zz": ("/%zz", b""),
    b"/": ("/", b""),
    b"": ("/*", b""),
    b"?a": ("/*", b"a"),
    b"*": ("/*", b""),
    b"gateway.test:443": ("/*", b""),
    b"v1/messages": ("/*", b""),
    b"http://other.test/v1/messages?beta=true": ("/v1/messages", b"beta=true"),
    b"HTTPS://user@other.test:8443/v1/v1/messages": ("/v1/messages", b""),
    b"http://other.test": ("/", b""),
    b"http://other.test?u=http://x/v1/messages": ("/", b"u=http://x/v1/messages"),
}


@pytest.mark.parametrize(("target", "split"), TARGETS.items(), ids=map(ascii, TARGETS))
def test_a_target_is_split_into_the_path_of_the_table_and_its_query(target, split):
    """
    Whatever spelling a path has, the table of routes sees one; the query goes on as it came.
    """
    assert g.normalize_target(target) == split


@given(st.lists(st.sampled_from([b"/", b"v1", b"..", b".", b"%2e", b"%2f", b"messages", b"x", b"://", b"%25"])))
def test_a_path_has_no_dots_and_no_doubled_slashes_left(parts):
    """
    What was looked up is what is forwarded: a path that goes elsewhere on the way is none of the table's.
    """
    path, query = g.normalize_target(b"/" + b"".join(parts))

    assert path == "/" or re.fullmatch(r"(/(?!\.\.?(/|$))[^/]+)+", path)
    assert query == b""


# Headers


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> g.Config:
    """A plain snapshot."""
    path = tmp_path_factory.mktemp("wire") / "config.yaml"
    path.write_text(config_text("https://upstream.test:8443/base/v1/"))
    return g.Config.load(path)


def call_of(config: g.Config, body: object = b"", headers: g.Headers | None = None, path="/v1/messages", query=b""):
    """A call as the front door makes it."""
    call = g.Call(config, next(iter(config.keys)), g.ROUTES[path], query, headers or [], "127.0.0.1")
    call.body = body if isinstance(body, (bytes, bytearray)) else json.dumps(body).encode()
    return call


PDF = base64.b64encode(b"%PDF-1.7" + bytes(3000)).decode()
SAID = [
    {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}]},
    {"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": PDF}}]},
]


def renamed_to(model, body):
    """The body for an upstream that knows the model by another name."""
    return b"".join(g.spliced(body, [g.splice_field(body, "model", json.dumps(model).encode())]))


def test_a_body_that_came_in_pieces_is_read_as_one_that_came_whole(config):
    """
    Pieces grow a bytearray: whatever reads a body finds the same in it as in bytes.
    """
    request = {"model": "m", "max_tokens": 5, "metadata": {"user_id": '{"session_id": "s-1"}'}, "messages": SAID}
    found = []
    for kind in (bytes, bytearray):
        call = call_of(config, request)
        call.body = kind(call.body)
        g.read_request(call)
        fields = [call.model, call.session, call.input_estimate > 700, call.max_output]  # it is counted in samples
        call.session = ""
        repaired, renamed = g.without_thinking(call.body), renamed_to("other", call.body)
        found.append([*fields, g.find_affinity(call), g.demo_answer("/v1/messages", call.body), repaired, renamed])

    assert found[0] == found[1] and found[0][:2] == ["m", "s-1"]
    assert "thinking" not in found[1][-2].decode() and json.loads(found[1][-1])["model"] == "other"
    with pytest.raises(g.BadRequest, match="stands twice"):
        g.read_request(call_of(config, bytearray(b'{"model": "m", "mod\\u0065l": "m"}')))


def upstream_of(format="anthropic", api_key=UPSTREAM_KEY, url="https://upstream.test:8443/base/v1/"):
    """An upstream, and where it is."""
    upstream = g.UpstreamConfig("main", url, g.Secrets([g.Secret(api_key)]), format)
    return upstream, api_key, g.UpstreamTarget.of(url, None)


CLAUDE_CODE = [
    (b"Host", b"gateway.test"),
    (b"Accept", b"application/json"),
    (b"Authorization", f"Bearer {KEY}".encode()),
    (b"X-API-Key", KEY.encode()),
    (b"Content-Type", b"application/json"),
    (b"Content-Length", b"2"),
    (b"User-Agent", b"claude-cli/2.1.329 (external, cli)"),
    (b"anthropic-version", b"2023-06-01"),
    (b"anthropic-beta", b"claude-code-20250219,interleaved-thinking-2025-05-14"),
    (b"anthropic-dangerous-direct-browser-access", b"true"),
    (b"x-app", b"cli"),
    (b"X-Stainless-Lang", b"js"),
    (b"X-Claude-Code-Session-Id", UUID.encode()),
    (b"Accept-Encoding", b"gzip, deflate, br, zstd"),
    (b"Connection", b"keep-alive"),
]


def test_claude_codes_request_goes_up_with_our_key_and_all_that_it_says(config):
    """
    Host, length, coding and key are ours; every `anthropic-*` header and the query go on unchanged.
    """
    call = call_of(config, b"{}", CLAUDE_CODE, query=b"beta=true")

    head = g.request_head(call, call.route.path, *upstream_of(), len(call.body))

    assert head == (
        b"POST /base/v1/messages?beta=true HTTP/1.1\r\n"
        b"host: upstream.test:8443\r\n"
        b"content-length: 2\r\n"
        b"accept-encoding: identity\r\n"
        b"x-api-key: sk-upstream-secret-0123456789\r\n"
        b"Accept: application/json\r\n"
        b"Content-Type: application/json\r\n"
        b"User-Agent: claude-cli/2.1.329 (external, cli)\r\n"
        b"anthropic-version: 2023-06-01\r\n"
        b"anthropic-beta: claude-code-20250219,interleaved-thinking-2025-05-14\r\n"
        b"anthropic-dangerous-direct-browser-access: true\r\n"
        b"x-app: cli\r\n"
        b"X-Stainless-Lang: js\r\n"
        b"X-Claude-Code-Session-Id: 0f4c8a5e-1b2d-4e3f-9a6b-7c8d9e0f1a2b\r\n"
        b"\r\n"
    )


@pytest.mark.parametrize(
    ("format", "api_key", "line"),
    [
        ("anthropic", UPSTREAM_KEY, b"x-api-key: sk-upstream-secret-0123456789\r\n"),
        ("openai", UPSTREAM_KEY, b"authorization: Bearer sk-upstream-secret-0123456789\r\n"),
        ("anthropic", "", b""),
        ("openai", "", b""),
    ],
)
def test_the_credential_stands_where_the_upstreams_format_wants_it(config, format, api_key, line):
    """
    An upstream without a key gets none, least of all the user's.
    """
    head = g.request_head(call_of(config, b"{}", CLAUDE_CODE), "/v1/messages", *upstream_of(format, api_key), 2)

    credentials = re.findall(rb"(?im)^(?:authorization|x-api-key): .*\n", head)
    assert b"".join(credentials) == line


KEPT_TO_OURSELVES = [
    *("OpenAI-Organization: org-1", "openai-project: proj_1", "anthropic-organization-id: o", "chatgpt-account-id: a"),
    *("CF-Connecting-IP: 10.0.0.1", "cf-ipcountry: DE", "True-Client-IP: 10.0.0.1", "Fastly-Client-IP: 10.0.0.1"),
    *("X-Client-IP: 10.0.0.1", "X-Cluster-Client-IP: 10.0.0.1", "X-Forwarded: 10.0.0.1", "X-Azure-ClientIP: 10.0.0.1"),
    *("x-vercel-forwarded-for: 10.0.0.1", "x-appengine-user-ip: 10.0.0.1", "CloudFront-Viewer-Address: 10.0.0.1:1"),
    *("api-key: x", "x-goog-api-key: x", "X-Goog-User-Project: p", "x-amz-security-token: x", "X-Amz-Date: 1"),
    *("Anthropic-Auth-Token: x", "x-claude-secret: x", "x-litellm-key: x", "X-Unknown: 1", "accept-language: de"),
    *("Referer: http://intern.test/", "Origin: http://intern.test", "Sec-Fetch-Mode: cors", f"anthropic-{'x' * 99}: 1"),
    *("Host: x", "Content-Length: 9", "Transfer-Encoding: chunked", "TE: trailers", "Trailer: x", "Upgrade: h2c"),
    *("Connection: close", "Keep-Alive: timeout=5", "Proxy-Connection: close", "Proxy-Authorization: Basic eDp5"),
    *("Proxy-Authenticate: Basic", "Expect: 100-continue", "Accept-Encoding: gzip", "aCCept-encoding: br"),
    *("AUTHORIZATION: Bearer x", "authorization: Basic eDp5", "X-Api-Key: x", "x-API-key: y", "Cookie: a=b"),
    *("Forwarded: for=10.0.0.1", "Via: 1.1 x", "X-Forwarded-For: 10.0.0.1", "X-Forwarded-Host: x"),
    *("X-Forwarded-Proto: https", "X-Forwarded-Port: 443", "X-Real-IP: 10.0.0.1"),
]


@pytest.mark.parametrize("line", KEPT_TO_OURSELVES)
def test_what_is_for_this_hop_goes_no_further_up(config, line):
    """
    Hop-by-hop headers, the user's credentials and addresses are not for the provider, nor is whose account is asked a
    client's matter; and no upstream can be told to take them, whatever `headers.pass` says.
    """
    name, _, value = line.encode().partition(b": ")
    call = call_of(config, b"{}", [(b"x-app", b"1"), (name, value), (b"X-Stainless-Lang", b"2")])
    upstream, api_key, target = upstream_of(api_key="")
    never = g.is_withheld(name.decode().lower())  # the others are merely on no list

    rules = g.HeaderRules({}, (), ("*",) if never else ())
    head = g.request_head(call, call.route.path, msgspec.structs.replace(upstream, headers=rules), api_key, target, 2)

    assert head == (
        b"POST /base/v1/messages HTTP/1.1\r\nhost: upstream.test:8443\r\ncontent-length: 2\r\n"
        b"accept-encoding: identity\r\nx-app: 1\r\nX-Stainless-Lang: 2\r\n\r\n"
    )


CODEX_AND_OTHERS = [
    *((b"originator", b"codex_cli_rs"), (b"version", b"0.99.0"), (b"session_id", UUID.encode()), (b"Session-Id", b"1")),
    *(
        (b"thread-id", b"2"),
        (b"conversation_id", b"3"),
        (b"x-codex-turn-state", b"s"),
        (b"OpenAI-Beta", b"responses=v1"),
    ),
    *(
        (b"x-openai-subagent", b"review"),
        (b"x-client-request-id", b"4"),
        (b"Idempotency-Key", b"stainless-node-retry-5"),
    ),
    *((b"traceparent", b"00-1-2-01"), (b"tracestate", b"a=b"), (b"X-Stainless-Retry-Count", b"0")),
    *((b"x-opencode-session", b"6"), (b"x-session-affinity", b"7"), (b"x-anthropic-additional-protection", b"true")),
    *((b"x-claude-code-agent-id", b"8"), (b"anthropic-some-header-of-tomorrow", b"\xff"), (b"anthropic-beta", b"a")),
    (b"Anthropic-Beta", b"b"),
]


def test_what_apis_and_clients_need_goes_upstream(config):
    """
    What the SDKs, Codex and opencode send, in their spelling and order; a name may come twice.
    """
    head = g.request_head(call_of(config, b"{}", CODEX_AND_OTHERS), "/v1/messages", *upstream_of(api_key=""), 2)

    assert head.split(b"\r\n")[4:-2] == [b"%b: %b" % header for header in CODEX_AND_OTHERS]


def test_an_upstream_may_take_more_headers_than_the_usual(config):
    """
    `headers.pass` names them, in any case or as globs; what must not go up does not for all that.
    """
    sent = [(b"HTTP-Referer", b"http://a.test"), (b"X-Title", b"a"), (b"x-team-red", b"1"), (b"x-team-key", b"2")]
    upstream, api_key, target = upstream_of(api_key="")
    rules = g.HeaderRules({}, (), ("http-referer", "x-t*"))

    head = g.request_head(
        call_of(config, b"{}", sent),
        "/v1/messages",
        msgspec.structs.replace(upstream, headers=rules),
        api_key,
        target,
        2,
    )

    assert head.endswith(b"identity\r\nHTTP-Referer: http://a.test\r\nX-Title: a\r\nx-team-red: 1\r\n\r\n")


def test_names_of_headers_are_remembered_in_bounded_memory(config):
    """
    A client that invents names fills no memory with them, and endless ones are not kept at all.
    """
    call = call_of(config, b"{}", [(b"x-%d" % i, b"1") for i in range(5000)] + [(b"anthropic-" + b"x" * 60_000, b"1")])

    head = g.request_head(call, call.route.path, *upstream_of(api_key=""), 2)

    assert head.endswith(b"accept-encoding: identity\r\n\r\n")
    assert g.goes_up.cache_info().currsize == g.goes_up.cache_info().maxsize == 1024


def test_headers_that_connection_names_stay_on_their_hop(config):
    """
    RFC 9110, 7.6.1: in both directions, in any case, over several lines.
    """
    headers = [
        *((b"CONNECTION", b"close, X-App ,x-two"), (b"connection", b"\tANTHROPIC-THREE,,")),
        *((b"x-app", b"1"), (b"X-Two", b"2"), (b"anthropic-three", b"3"), (b"anthropic-four", b"4")),
    ]

    up = g.request_head(call_of(config, b"{}", headers), "/v1/messages", *upstream_of(api_key=""), 2)

    assert up.endswith(b"\r\naccept-encoding: identity\r\nanthropic-four: 4\r\n\r\n")
    assert g.downstream_headers(headers, g.first_values(headers)) == [(b"anthropic-four", b"4")]


def test_an_answer_comes_down_without_what_describes_the_upstreams_side():
    """
    Rate limits of a shared key would mislead the client, and whose account it is is none of its business; `request-id`,
    `retry-after` and the rest are its own.
    """
    kept = [
        *((b"Content-Type", b"text/event-stream"), (b"request-id", b"req_1"), (b"Retry-After", b"30")),
        *((b"x-should-retry", b"false"), (b"Content-Encoding", b"identity"), (b"openai-processing-ms", b"5")),
        *((b"Access-Control-Allow-Origin", b""), (b"X-Two", b"1"), (b"x-two", b"2"), (b"Vary", b"Origin")),
        *((b"x-request-id", b"req_2"), (b"CF-RAY", b"1-FRA"), (b"x-codex-turn-state", b"s"), (b"retry-after-ms", b"5")),
    ]
    dropped = [
        *((b"Connection", b"keep-alive"), (b"Keep-Alive", b"timeout=5"), (b"Transfer-Encoding", b"chunked")),
        *((b"Content-Length", b"5"), (b"Set-Cookie", b"__cf_bm=x"), (b"set-cookie", b"a=b"), (b"Trailer", b"x")),
        *((b"Upgrade", b"h2c"), (b"Alt-Svc", b"h3"), (b"Strict-Transport-Security", b"max-age=1")),
        *((b"anthropic-ratelimit-requests-limit", b"50"), (b"Anthropic-RateLimit-Tokens-Reset", b"x")),
        *((b"anthropic-ratelimit-unified-5h-utilization", b"0.5"), (b"Proxy-Authenticate", b"Basic")),
        *((b"Anthropic-Organization-Id", b"o"), (b"openai-organization", b"o"), (b"OpenAI-Project", b"p")),
        *((b"x-ratelimit-remaining-tokens", b"5"), (b"X-RateLimit-Reset-Requests", b"6m0s"), (b"RateLimit", b"r=5")),
        *((b"ratelimit-remaining", b"5"), (b"x-codex-primary-used-percent", b"9"), (b"x-openai-proxy-wasm", b"v0.1")),
        *((b"llm_provider-request-id", b"r"), (b"x-litellm-key-spend", b"3.5"), (b"x-goog-quota-user", b"u")),
        *((b"x-litellm-model-api-base", b"http://h"), (b"anthropic-priority-input-tokens-limit", b"9")),
        *((b"anthropic-fast-input-tokens-remaining", b"9"),),
    ]

    mixed = [header for pair in zip(kept, dropped, strict=False) for header in pair] + dropped[len(kept) :]

    assert g.downstream_headers(mixed, g.first_values(mixed)) == kept


def test_the_list_of_models_is_asked_for_in_the_upstreams_format():
    """
    Anthropic pages its list, and wants a version.
    """
    anthropic, openai = g.models_head(*upstream_of()), g.models_head(*upstream_of("openai", url="http://o.test/v1"))

    assert anthropic == (
        b"GET /base/v1/models?limit=1000 HTTP/1.1\r\nhost: upstream.test:8443\r\naccept-encoding: identity\r\n"
        b"anthropic-version: 2023-06-01\r\nx-api-key: sk-upstream-secret-0123456789\r\n\r\n"
    )
    assert openai == (
        b"GET /v1/models HTTP/1.1\r\nhost: o.test\r\naccept-encoding: identity\r\n"
        b"anthropic-version: 2023-06-01\r\nauthorization: Bearer sk-upstream-secret-0123456789\r\n\r\n"
    )


# What a request's body says

SESSIONS = {
    "2.0.x": ({"user_id": f"user_{'a' * 64}_account__session_{UUID}"}, UUID),
    "2.1.x": ({"user_id": json.dumps({"device_id": "d", "account_uuid": "", "session_id": UUID})}, UUID),
    "a JSON string of its own": ({"user_id": '{"session_id": "' + "s" * 200 + '"}'}, "s" * 128),
    "somebody else's id": ({"user_id": "u-1"}, ""),
    "a session in the middle": ({"user_id": f"_session_{UUID}_x"}, ""),
    "not a uuid": ({"user_id": "user_session_42"}, ""),
    "JSON without a session": ({"user_id": "{}"}, ""),
    "JSON with a number": ({"user_id": '{"session_id": 1}'}, ""),
    "almost JSON": ({"user_id": "{session"}, ""),
    "a list": ({"user_id": ["x"]}, ""),
    "JSON too deep": ({"user_id": '{"session_id": ' + "[" * 20_000}, ""),
    "no user": ({}, ""),
    "no object": ("x", ""),
    "nothing": (None, ""),
}


@pytest.mark.parametrize(("metadata", "session"), SESSIONS.values(), ids=SESSIONS)
def test_the_session_is_found_in_the_metadata(metadata, session):
    """
    A session stays on its upstream, where its prompt cache lies; what names none is no error.
    """
    assert g.session_of(g.msgspec.Raw(json.dumps(metadata).encode())) == session


REQUEST = {"model": "claude-test", "stream": True, "metadata": {"user_id": f"user_x_account__session_{UUID}"}}


def test_a_request_says_its_model_its_session_and_whether_it_streams(config):
    """
    Nothing else in a body is looked at; its input is estimated.
    """
    call = call_of(config, REQUEST)

    g.read_request(call)

    assert (call.model, call.upstream_model, call.stream, call.session) == ("claude-test", "claude-test", True, UUID)
    assert (call.bytes_up, call.input_estimate) == (129, 49)


@pytest.mark.parametrize(
    ("headers", "session"),
    [
        ([], UUID),
        ([(b"X-Claude-Code-Session-Id", b"from-the-header")], "from-the-header"),
        ([(b"x-claude-code-session-id", b"")], UUID),
        ([(b"x-claude-code-session-id", b"x" * 200)], "x" * 128),
    ],
    ids=["none", "one", "an empty one", "a long one"],
)
def test_the_header_names_the_session_before_the_body_does(config, headers, session):
    """
    2.1.x sends both; the header is the cheaper and the newer of the two.
    """
    call = call_of(config, REQUEST, headers)

    g.read_request(call)

    assert call.session == session


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m"}',
        b'{"model": "m", "stream": null}',
        b'{"model": "m", "stream": false, "metadata": null}',
        b'{"model": "m", "metadata": "x", "max_tokens": "many", "messages": 5}',
        b' \n{"messages": [{"role": "system"}], "unknown": {"model": "x", "stream": true}, "model": "m"} ',
        b'{"model": "m", "messages": "\xff"}',
        b'{"model": "m", "__class__": {}, "": [1], "Unknown": {}, "unknown2": {"model": 1, "model": 2}}',
    ],
)
def test_what_a_body_says_beside_the_model_is_the_upstreams_matter(config, body):
    """
    Unknown fields and wrong types go on byte for byte: the upstream's error is the one that the client knows.
    """
    call = call_of(config, body)

    g.read_request(call)

    assert (call.model, call.stream, call.session, call.body) == ("m", False, "", body)


BAD_BODIES = {
    "empty": (b"", "The request body is not JSON: "),
    "cut": (b'{"model": "m"', "The request body is not JSON: "),
    "two": (b'{"model": "m"}{}', "The request body is not JSON: "),
    "a list": (b"[]", "The request body is not as expected: Expected `object`, got `array`"),
    "no model": (b"{}", "model: field required"),
    "an empty model": (b'{"model": ""}', "model: field required"),
    "a model of numbers": (
        b'{"model": 5}',
        "The request body is not as expected: Expected `str`, got `int` - at `$.model`",
    ),
    "a stream of words": (
        b'{"model": "m", "stream": "yes"}',
        "The request body is not as expected: Expected `bool | null`, got `str` - at `$.stream`",
    ),
    "a long model": (b'{"model": "%b"}' % (b"m" * 257), "model: expected at most 256 printable characters"),
    "a model with a line's end": (b'{"model": "a\\nb"}', "model: expected at most 256 printable characters"),
    "a model with a right-to-left mark": (
        b'{"model": "a\\u202eb"}',
        "model: expected at most 256 printable characters",
    ),
}


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_cannot_be_routed_is_refused(config, body, message):
    """
    A message says what is wrong (the parser's words may change), and the model's name can stand in a log line.
    """
    with pytest.raises(g.BadRequest) as caught:
        g.read_request(call_of(config, body))

    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'\xef\xbb\xbf{"model": "m"}',
        b'{"model": "m", "messages": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        b'{"model": "m", "metadata": ' + b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000 + b"}",
        b"[" * 1_000_000,
    ],
    ids=["not UTF-8", "half a character", "a byte order mark", "deep messages", "deep metadata", "deep"],
)
def test_a_hostile_body_is_a_bad_request(config, body):
    """
    Whoever has a key can send anything; the answer is a 400 and never a bug of ours.
    """
    with pytest.raises(g.BadRequest):
        g.read_request(call_of(config, body))


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: json.dumps({"model": text}).encode())))
def test_no_body_is_too_strange(config, body):
    """
    Reading a request ends in a model or in BadRequest.
    """
    call = call_of(config, body)

    try:
        g.read_request(call)
    except g.BadRequest:
        return

    assert call.model == json.loads(body)["model"]


# What reading a hostile body costs

MANY = 1 << 20
HOSTILE = {
    "a tree as metadata": b'{"model": "m", "metadata": [%b0]}' % (b"[[]]," * MANY),
    "a list as max_tokens": b'{"model": "m", "max_tokens": [%b0]}' % (b"0," * MANY),
    "a list as stream": b'{"model": "m", "stream": [%b0]}' % (b"0," * MANY),
    "tiny messages": b'{"model": "m", "messages": [%b0]}' % (b"{}," * MANY),
    "a first message of pieces": b'{"model": "m", "messages": [{"role": "user", "content": [%b0]}]}' % (b"0," * MANY),
    "a role that is a list": b'{"model": "m", "messages": [{"role": [%b0]}]}' % (b"0," * MANY),
    "tiny messages with content": b'{"model": "m", "messages": [%b0]}' % (b'{"content":0},' * MANY),
    "tiny blocks": b'{"model": "m", "messages": [{"role": "assistant", "content": [%b{}]}]}' % (b"{}," * MANY),
    "blocks that are numbers": b'{"model": "m", "messages": [{"role": "assistant", "content": [%b0]}]}'
    % (b"0," * MANY),
    "hosted tools": b'{"model": "m", "tools": [%b{}]}' % (b'{"type": "x"},' * 30_000),
    "many fields beside a thought": b'{"model": "m", "messages": [{"role": "assistant", %b"content": [%b]}]}'
    % (b"".join(b'"%x":0,' % i for i in range(MANY // 4)), b'{"type": "thinking"}'),
}


@pytest.mark.parametrize("reader", [g.read_request, g.find_affinity, lambda call: g.without_thinking(call.body)])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_reading_a_body_takes_less_memory_than_the_body_has(config, body, reader):
    """
    Any client can send 30 MB; a tree of them in Python would be 900 MB, and stop every other call for seconds.
    """
    call = call_of(config, body)

    with TracedMemory() as memory, contextlib.suppress(g.BadRequest):
        reader(call)

    assert memory.peak < 4 * len(body) + (8 << 20)


@pytest.mark.parametrize("text", [" " * 36_000, ", " * 18_000, '\\"cache_control\\":{' * 2000])
def test_a_conversation_of_blanks_is_known_in_linear_time(config, text):
    """
    A pattern that began with any number of blanks took 34 s for these 8 messages: all others waited.
    """
    message = f'{{"role": "assistant", "content": "{text}"}}'
    body = f'{{"model": "m", "system": "{text}", "messages": [{", ".join([message] * 8)}]}}'.encode()
    call = call_of(config, body)

    began = time.process_time()
    g.find_affinity(call)

    assert time.process_time() - began < 1


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_reading_a_body_makes_few_calls(config, body):
    """
    What Python does for a body is bounded; the rest is done in C, in one pass.
    """
    calls = 0

    def count(frame, event, arg) -> None:
        nonlocal calls
        calls += 1

    call = call_of(config, body)
    sys.setprofile(count)
    with contextlib.suppress(g.BadRequest):
        g.read_request(call)
        g.find_affinity(call)
    sys.setprofile(None)

    assert calls < 1000


@pytest.mark.parametrize(
    ("value", "kind", "read"),
    [
        (b"5", int, 5),
        (b"1e2", int, 0),
        (b'"x"', int, 0),
        (b"true", int, 0),
        (b"null", int, 0),
        (b"[[[", int, 0),
        (b'"%b"' % (b"x" * 8190), str, "x" * 8190),
        (b'"%b"' % (b"x" * 8191), str, ""),
    ],
)
def test_a_short_value_is_read_and_a_long_one_counts_as_not_said(value, kind, read):
    """
    No honest name or number has 8 KB; what has another type is the upstream's matter.
    """
    assert g.decode_short(g.msgspec.Raw(value), kind, kind()) == read


SPACES = st.sampled_from([b"", b" ", b"\n\t", b"\r\n"])
VALUES = st.sampled_from(
    [b"0", b"-1.5e3", b"true", b"null", b'"a"', b'"]},\\""', b"[]", b"[1,[2]]", b'{"a":[{}]}', b"{}", b'"\\u005d"']
)


@given(st.lists(st.tuples(SPACES, VALUES, SPACES), max_size=6), SPACES, st.integers(0, 7))
def test_a_list_is_walked_item_by_item(items, space, most):
    """
    The items are those of the list, however they are spaced, and no more than are wanted.
    """
    text = b"[%b]" % (b",".join(b"%b%b%b" % item for item in items) or space)

    found = [bytes(item).strip() for item in g.list_items(memoryview(text), most)]

    assert found == [value for _, value, _ in items][:most]


# Names that stand twice

DOUBLED = {
    "the same name": (
        b'{"model": "a", "model": "b"}',
        "model: this name stands twice in the request (in any case); leave one out",
    ),
    "with the same value": (b'{"model":"a","model":"a"}', "model: this name stands twice"),
    "in another case": (b'{"model": "a", "Model": "b"}', "Model: write this name model"),
    "in another case, and missing": (b'{"Model": "b", "messages": []}', "Model: write this name model"),
    "in another case alone": (b'{"model": "a", "Max_Tokens": 5}', "Max_Tokens: write this name max_tokens"),
    "as Go folds it": ('{"model": "a", "me\u017f\u017fages": []}'.encode(), "me\u017f\u017fages: write this name"),
    "with an escape": (b'{"model": "a", "\\u006dodel": "b"}', "model: this name stands twice"),
    "with an escape and another case": (b'{"model": "a", "\\u004dodel": "b"}', "Model: write this name model"),
    "an unknown name": (b'{"model": "a", "x-y": {}, "x-y": 1}', "x-y: this name stands twice"),
    "an unknown name in another case": (b'{"model": "a", "xy": {}, "XY": 1}', "XY: this name stands twice"),
    "a list and a part of it": (b'{"model": "a", "tools": [1], "tools": [1, 2]}', "tools: this name stands twice"),
    "behind strings with brackets": (b'{"x": "\\"]}", "stop": ["}"], "model": "a", "stop": ["}"]}', "stop: "),
    "with white space": (b'{\n"model"\t:\r"a" , "model" : "a" }', "model: this name stands twice"),
    "a long name": (b'{"model": "a", "%b": 1}' % (b"x" * 257), "The request has a name of more than 256 characters"),
    "many names": (
        b'{"model": "a", %b}' % b",".join(b'"%d": 0' % i for i in range(256)),
        "The request has more than 256 names",
    ),
    "quotes that make up for it": (
        rb'{"model":"a\u0022\u0022","stream":false,"stream":true}',
        "stream: this name stands",
    ),
    "a large body": (b'{"messages":["%b"],"model":"a","model":"a"}' % (b"x" * (1 << 20)), "model: this name stands"),
}


@pytest.mark.parametrize(("body", "message"), DOUBLED.values(), ids=DOUBLED)
def test_a_name_that_stands_twice_is_refused(config, body, message):
    """
    The gateway could admit one model and the upstream serve another: readers differ in which of two names counts.
    """
    with pytest.raises(g.BadRequest) as caught:
        g.read_request(call_of(config, body))

    assert caught.value.message.startswith(message)


NAMES = st.sampled_from(["model", "Model", "stream", "max_tokens", "MAX_TOKENS", "x", "X", "messages", "é", "É", "a b"])
WRITTEN = st.sampled_from([json.dumps, lambda name: json.dumps(name, ensure_ascii=False)])
FIELDS = st.tuples(WRITTEN, NAMES, SPACES, SPACES, VALUES, SPACES)


@settings(max_examples=300)
@example([(json.dumps, "stop", b"", b"", b"[]", b"")] * 2)
@given(st.lists(FIELDS, max_size=6))
def test_exactly_the_bodies_with_doubled_names_are_refused(config, fields):
    """
    Each name once, in the spelling of the API: however the body is spaced, escaped and ordered.
    """
    rest = [field for field in fields if field[1] not in ("model", "stream")]
    pieces = [b"%b%b:%b%b%b" % (write(name).encode(), a, b, value, c) for write, name, a, b, value, c in rest]
    body = b"{%b}" % b",".join([*pieces, b'"model":"m"'])
    names = [name for _, name, *_ in rest]
    is_good = len({name.casefold() for name in names}) == len(names) and not {"Model", "MAX_TOKENS"} & set(names)

    try:
        g.read_request(call_of(config, body))
    except g.BadRequest:
        assert not is_good
    else:
        assert is_good


def test_a_body_as_clients_write_it_is_checked_by_its_length(config):
    """
    Claude Code's JSON has no white space and no unknown name: no name of it is looked at.
    """
    body = json.dumps(REQUEST | {"max_tokens": 5, "messages": [{"content": "é"}], "system": []}, separators=(",", ":"))
    calls = []

    sys.setprofile(lambda frame, event, arg: calls.append(frame.f_code.co_name))
    g.read_request(call_of(config, body.encode()))
    sys.setprofile(None)

    assert "check_names" in calls and "value_end" not in calls


# The usage of a chat stream

ASKED = [
    (b'{"model":"m"}', b'{"stream_options":{"include_usage":true},"model":"m"}'),
    (b' {\n "model": "m" } ', b' {"stream_options":{"include_usage":true},\n "model": "m" } '),
    (
        b'{"x": [1 ,2], "stream_options" : {"include_usage": false, "other": false} , "model": "\\u00e9"}',
        b'{"x": [1 ,2], "stream_options" : {"include_usage":true,"other":false}, "model": "\\u00e9"}',
    ),
    (
        b'{"stream_options":{"include_usage":true,"Include_Usage":false,"x":1},"model":"m"}',
        b'{"stream_options":{"include_usage":true,"x":1},"model":"m"}',
    ),
    (b'{"stream_options":null,"model":"m"}', b'{"stream_options":{"include_usage":true},"model":"m"}'),
    (b'{"model":"m","stream_options":{}}', b'{"model":"m","stream_options":{"include_usage":true}}'),
    (b'{"stream\\u005foptions":{},"model":"m"}', b'{"stream\\u005foptions":{"include_usage":true},"model":"m"}'),
    (
        b'{"tools":[{"stream_options":{}}],"stream_options":{},"model":"m"}',
        b'{"tools":[{"stream_options":{}}],"stream_options":{"include_usage":true},"model":"m"}',
    ),
]


@pytest.mark.parametrize(("body", "asking"), ASKED)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_body_asks_for_usage_and_keeps_every_other_byte(body, asking, kind):
    """
    Prompt caches and signatures match on bytes: nothing but the one field is written.
    """
    whole = kind(body)

    assert b"".join(g.spliced(whole, [g.splice_usage(whole)])) == asking


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        (None, None),
        ('{"include_usage": true}', True),
        ('{"include_usage": false}', False),
        ('{"include_usage": true, "include_obfuscation": false}', True),
        ('{"include_usage": true, "include_usage": false}', False),
        ('{"include_usage": false, "include_usage": true}', False),
        ('{"Include_Usage": false, "include_usage": true}', False),
        ('{"include\\u005fusage": false, "include_usage": true}', False),
        ("{}", False),
        ("null", False),
        ('"include_usage"', False),
        ('{"include_usage": true, "x": "%s"}' % ("x" * 9000), False),
    ],
)
def test_whether_a_client_asks_for_usage_is_what_every_reader_sees(config, options, asks):
    """
    If readers could differ, the field is written anew, so that the stream can be booked.
    """
    more = f', "stream_options": {options}' if options else ""
    call = call_of(config, f'{{"model": "m", "stream": true{more}}}'.encode(), path="/v1/chat/completions")

    g.read_request(call)

    assert call.includes_usage is asks


CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"[] \\"choices\\":[]"}}],"usage":null}'
LAST_CHUNK = b'data: {"id":"c","choices": [ ],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
LONG_LAST = LAST_CHUNK.ljust(16 << 10)
OTHERS = [
    CHUNK,
    b"data: [DONE]",
    b": ping",
    b'data: {"choices":[],"prompt_filter_results":[]}',
    b'data: {"choices":[],"usage":null}',
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":3}}',
    b'data: no JSON "choices":[]',
    b"data: " + b"x" * 100,
    b"",
]
ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"])


def without_usage(config: g.Config, pieces: Iterable[bytes]) -> list[bytes]:
    """What a client gets of a stream, read by read, whose usage the gateway alone had asked for."""
    reader = g.HiddenUsageReader(call_of(config, path="/v1/chat/completions"))
    reader.start(True)
    return [reader.read(piece, False) for piece in pieces] + [reader.read(b"", True)]


@pytest.mark.parametrize("flood", [b"\n", b"\r", b"\r\n", b"data: ", b'data:"choices":['])
def test_a_flood_without_events_goes_on_and_takes_no_time(config, flood):
    """
    20 MB of CRs were ten million events, each looked at: 5 s of CPU for one answer.
    """
    passed: list[bytes] = []

    calls = calls_made(lambda: passed.extend(without_usage(config, [flood * 2000] * 20)))

    assert calls < 20 * 20 and b"".join(passed) == flood * 40_000


@given(st.data(), ENDS, st.lists(st.sampled_from([LAST_CHUNK, *OTHERS]), min_size=1, max_size=6), st.booleans())
def test_the_chunk_with_the_usage_alone_is_kept_however_the_stream_is_cut(config, data, eol, events, is_whole):
    """
    A client that did not ask gets every other byte as it came: pings, comments, errors, what is no JSON.
    """
    stream = eol.join(events) + eol * is_whole
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]

    passed = b"".join(without_usage(config, pieces))

    kept = [event + eol for event in events if event != LAST_CHUNK]
    if events and not is_whole and events[-1] != LAST_CHUNK:
        kept[-1] = events[-1]
    assert passed == b"".join(kept)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"\n\n\n", b"\n", LAST_CHUNK, b"\n\n"], b"\n\n\n\n"),  # an empty line that came in another read
        ([CHUNK, b"\r\n\r\n\r\n\r", b"\n", LAST_CHUNK, b"\r\n\r\n"], CHUNK + b"\r\n\r\n\r\n\r\n"),
        ([b": a\nid: 7\n", LAST_CHUNK, b"\nretry: 1\n\n", CHUNK, b"\n\n"], CHUNK + b"\n\n"),
        ([b"data: " + b"x" * 20_000, LAST_CHUNK, b"\n\n"], b"data: " + b"x" * 20_000 + LAST_CHUNK + b"\n\n"),
        (
            [b"data: " + b"x" * 20_000, b"\n" + LAST_CHUNK, b"\n\n"],
            b"data: " + b"x" * 20_000 + b"\n" + LAST_CHUNK + b"\n\n",
        ),
        ([b"data: x\n", LAST_CHUNK, b"\n\n"], b"data: x\n" + LAST_CHUNK + b"\n\n"),
        ([b"\n" + LONG_LAST, b"\nx\n\n"], b"\n" + LONG_LAST + b"\nx\n\n"),
    ],
)
def test_the_chunk_with_the_usage_is_known_by_the_whole_event(config, pieces, expected):
    """
    Where an event begins does not hang on where a read does; what else has the same words is the client's.
    """
    assert b"".join(without_usage(config, pieces)) == expected


@pytest.mark.parametrize(
    "text", [b'data:"choices":[]', b'"choices":[]\n', b'x\n\n"choices":[]', b'"choices":[' + b" " * 900]
)
def test_an_upstream_that_says_choices_all_over_takes_linear_time(config, text):
    """
    A pattern that tries each of them against the rest of the read took seconds for one of 64 KB.
    """
    pieces = [text * (65_536 // len(text)) + b"\nx"] * 4

    began = time.process_time()
    passed = without_usage(config, pieces)

    assert time.process_time() - began < 1
    assert b"".join(passed) == b"".join(pieces)


def test_an_event_that_is_longer_than_any_usage_goes_on_at_once(config):
    """
    Nothing is held without a bound, and the reader finds its place again behind it.
    """
    long = b"data: " + b"x" * 20_000

    passed = without_usage(config, (long, b"y\n", b"\n" + LAST_CHUNK + b"\n\n" + CHUNK, b"\n\n"))

    assert passed == [long, b"", b"y\n\n", CHUNK + b"\n\n", b""]


def test_whole_events_go_on_in_the_read_in_which_they_came(config):
    """
    Nothing is delayed but a part of an event.
    """
    pieces = (CHUNK + b"\n\n" + CHUNK[:9], CHUNK[9:] + b"\n\n")

    assert without_usage(config, pieces) == [CHUNK + b"\n\n", CHUNK + b"\n\n", b""]


# Another name for the model


def test_a_rename_keeps_the_bytes_of_every_other_value():
    """
    Prompt caches match on bytes: order, spaces within values, escapes and numbers stay as they were.
    """
    body = (
        '{"max_tokens": 1e2, "messages" : [ {"role":"user", "content": "\\u00e9 é \\/ 1.0"} ],\n "model": "claude",'
        ' "temperature": 1.0000000000000000001, "x": {"model": "y"},"big":12345678901234567890}'
    )
    expected = (
        '{"max_tokens": 1e2, "messages" : [ {"role":"user", "content": "\\u00e9 é \\/ 1.0"} ],\n'
        ' "model": "llama \\"8b\\"", "temperature": 1.0000000000000000001,'
        ' "x": {"model": "y"},"big":12345678901234567890}'
    )

    assert renamed_to('llama "8b"', body.encode()).decode() == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{ }", b'{"model":"m" }'),
        (b' {"input": "x"}', b' {"model":"m","input": "x"}'),
        (b'{"input":["x"], "mod\\u0065l" : {} }', b'{"input":["x"], "mod\\u0065l" : "m"}'),
    ],
)
def test_a_rename_adds_or_replaces_whatever_stands_there(body, expected):
    """
    A request may have no model, where the map has an entry for that, or one that is no name.
    """
    assert renamed_to("m", body) == expected


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_changed_body_is_no_copy(kind):
    """
    40 bodies of 30 MB that had to be renamed took twice the memory that `server.memory` allowed for them.
    """
    body = kind(json.dumps({"system": "x" * (4 << 20), "model": "a", "stream": True}).encode())

    with TracedMemory() as memory:
        pieces = g.spliced(body, [g.splice_field(body, "model", b'"b"'), g.splice_usage(body)])

    assert json.loads(b"".join(pieces)) == json.loads(body) | {"model": "b", "stream_options": {"include_usage": True}}
    assert memory.peak < 1 << 20


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=20), JSON, max_size=4), st.booleans())  # longer names are refused before
def test_a_rename_changes_the_model_alone(fields, ascii_only):
    """
    Whatever else a body holds, and however it was written, reads the same afterwards, in the same order.
    """
    body = json.dumps(fields | {"model": "a"}, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")

    renamed = json.loads(renamed_to("b", body))

    assert list(renamed.items()) == list((fields | {"model": "b"}).items())


# What an answer cost


def sse(*events: object) -> bytes:
    """Events of either API; bytes stand for themselves."""
    lines = []
    for event in events:
        name = f"event: {event['type']}\n" if isinstance(event, dict) and "type" in event else ""
        lines.append(event if isinstance(event, bytes) else f"{name}data: {json.dumps(event)}\n\n".encode())
    return b"".join(lines)


class Booked(g.msgspec.Struct):
    """What a meter has to say after an answer."""

    usage: g.Usage
    model: str
    error_type: str
    finished: bool


READERS = {kind: dialect.reader for (format, kind), dialect in g.DIALECTS.items() if format != "demo"}


@pytest.fixture(scope="module")
def meter(config):
    """Feed an answer (a stream's bytes, or an object) to a meter: `meter("messages", data)` is what it says of it."""
    bodies = {"chat": "/v1/chat/completions", "count_tokens": "/v1/messages/count_tokens"}

    def read(kind: str, pieces: Iterable[bytes], streaming: bool, ended: bool, reached: bool) -> Booked:
        call = call_of(config, path=bodies.get(kind, f"/v1/{kind}"))
        call.input_estimate = 1000
        meter = READERS[kind](call)
        meter.start(streaming)
        for piece in pieces:
            meter.read(piece, False)
        if ended:
            meter.read(b"", True)
        return Booked(meter.spend(reached), meter.model, meter.error_type, meter.is_finished)

    def metered(kind: str, answer: bytes | dict, streaming=True, ended=True, reached=True, every_cut=True) -> Booked:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        streaming = streaming and isinstance(answer, bytes)
        ways = cuts(data) if every_cut else [(data,)]
        found = [read(kind, pieces, streaming, ended, reached) for pieces in ways]
        assert all(booked == found[0] for booked in found)
        return found[0]

    return metered


def message_start(**usage: object) -> dict:
    """The first event of a Messages stream."""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-served", "content": []}
    return {"type": "message_start", "message": {**message, "stop_reason": None, "usage": usage}}


def text_delta(text: str) -> dict:
    """A piece of text."""
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


def message_delta(**usage: object) -> dict:
    """The usage so far."""
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage}


STOP = {"type": "message_stop"}
SPLIT = {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200}
START = message_start(
    input_tokens=10,
    cache_creation_input_tokens=300,
    cache_read_input_tokens=4000,
    cache_creation=SPLIT,
    output_tokens=1,
    service_tier="standard",
)
EXACT = {
    "input_tokens": 10,
    "cache_write_5m_tokens": 100,
    "cache_write_1h_tokens": 200,
    "cache_read_tokens": 4000,
}

MESSAGES = {
    "a whole stream": (
        [START, text_delta("Hello"), message_delta(output_tokens=50), STOP],
        {**EXACT, "output_tokens": 50},
    ),
    "cumulative, never added": (
        [START, message_delta(output_tokens=20), message_delta(output_tokens=50, input_tokens=12), STOP],
        {**EXACT, "input_tokens": 12, "output_tokens": 50},
    ),
    "the total again, without its split": (
        [START, message_delta(output_tokens=50, cache_creation_input_tokens=300, cache_read_input_tokens=4000), STOP],
        {**EXACT, "output_tokens": 50},
    ),
    "a smaller total later": (
        [START, message_delta(output_tokens=50, cache_creation_input_tokens=150), STOP],
        {**EXACT, "cache_write_5m_tokens": 0, "cache_write_1h_tokens": 150, "output_tokens": 50},
    ),
    "a larger total later": (
        [START, message_delta(output_tokens=50, cache_creation_input_tokens=450), STOP],
        {**EXACT, "cache_write_5m_tokens": 250, "output_tokens": 50},
    ),
    "nulls say nothing": (
        [START, message_delta(output_tokens=50, input_tokens=None, cache_read_input_tokens=None), STOP],
        {**EXACT, "output_tokens": 50},
    ),
    "zeros replace no count": (
        [START, message_delta(output_tokens=50, input_tokens=0, cache_read_input_tokens=0), STOP],
        {**EXACT, "output_tokens": 50},
    ),
    "the last usage in message_stop": (
        [START, text_delta("x"), message_delta(output_tokens=1), STOP | {"usage": {"output_tokens": 50}}],
        {**EXACT, "output_tokens": 50},
    ),
    "a message in message_stop": (
        [START, message_delta(output_tokens=50), STOP | {"message": {"model": "claude-served"}}],
        {**EXACT, "output_tokens": 50},
    ),
    "a type that is null": (
        [START, {"type": None, "model": None}, message_delta(output_tokens=50), STOP],
        {**EXACT, "output_tokens": 50},
    ),
    "zero output without any text": (
        [message_start(input_tokens=10, output_tokens=0), message_delta(output_tokens=0), STOP],
        {"input_tokens": 10},
    ),
    "zero output of a text": (
        [START, text_delta("x" * 80), message_delta(output_tokens=0), STOP],
        {**EXACT, "output_tokens": 20, "estimated": True},
    ),
    "a usage without output": (
        [START, text_delta("x" * 80), message_delta(output_tokens=None), STOP],
        {**EXACT, "output_tokens": 20, "estimated": True},
    ),
    "iterations that are null": (
        [START, message_delta(output_tokens=50, iterations=None), STOP],
        {**EXACT, "output_tokens": 50},
    ),
    "iterations that are no list": (
        [START, message_delta(output_tokens=50, iterations={"0": {"output_tokens": 20}}), STOP],
        {**EXACT, "output_tokens": 50, "estimated": True},
    ),
    "an odd split of the cache writes": (
        [
            message_start(input_tokens=10, cache_creation_input_tokens=300, cache_creation=[]),
            message_delta(output_tokens=5),
            STOP,
        ],
        {"input_tokens": 10, "cache_write_5m_tokens": 300, "output_tokens": 5},
    ),
    "writes without a split": (
        [message_start(input_tokens=10, cache_creation_input_tokens=300), message_delta(output_tokens=50), STOP],
        {"input_tokens": 10, "cache_write_5m_tokens": 300, "output_tokens": 50},
    ),
    "a split without a total": (
        [message_start(input_tokens=10, cache_creation=SPLIT), message_delta(output_tokens=50), STOP],
        {"input_tokens": 10, "cache_write_5m_tokens": 100, "cache_write_1h_tokens": 200, "output_tokens": 50},
    ),
    "half a split without a total": (
        [
            message_start(input_tokens=10, cache_creation={"ephemeral_5m_input_tokens": 100}),
            message_delta(output_tokens=50),
            STOP,
        ],
        {"input_tokens": 10, "cache_write_5m_tokens": 100, "output_tokens": 50},
    ),
    "only output at the end, as llama.cpp": (
        [
            message_start(input_tokens=7, cache_read_input_tokens=3, output_tokens=0),
            message_delta(output_tokens=5),
            STOP,
        ],
        {"input_tokens": 7, "cache_read_tokens": 3, "output_tokens": 5},
    ),
    "input only at the end": (
        [message_start(), text_delta("x"), message_delta(input_tokens=9, output_tokens=5), STOP],
        {"input_tokens": 9, "output_tokens": 5},
    ),
    "other events between": (
        [
            {"type": "ping"},
            START,
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_stop", "index": 0},
            {"type": "something_new", "usage_hint": 1, "text": "x"},
            b": ping\n\n",
            message_delta(output_tokens=50, server_tool_use={"web_search_requests": 1}),
            STOP,
        ],
        {**EXACT, "output_tokens": 50, "extras": (("web_search", 1),)},
    ),
}


@pytest.mark.parametrize(("events", "usage"), MESSAGES.values(), ids=MESSAGES)
def test_a_messages_stream_is_booked_by_its_own_numbers(meter, events, usage):
    """
    Start from message_start, overwrite with each non-null value of every message_delta: the numbers are cumulative.
    """
    booked = meter("messages", sse(*events))

    assert booked == Booked(g.Usage(**usage), "claude-served", "", True)


def test_a_messages_answer_that_is_no_stream_is_booked_by_its_usage(meter):
    """
    The whole body is one message, with the split of its cache writes.
    """
    message = START["message"] | {"content": [{"type": "text", "text": "Hello"}]}

    booked = meter("messages", message)

    assert booked == Booked(g.Usage(**EXACT, output_tokens=1), "claude-served", "", True)


THINKING = {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "t" * 80}}
TOOL_INPUT = {
    "type": "content_block_delta",
    "index": 1,
    "delta": {"type": "input_json_delta", "partial_json": "j" * 80},
}
SIGNATURE = {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s" * 80}}

CUT_SHORT = {
    "after the start": ([START], 1),
    "in the text": ([START, text_delta("x" * 60), text_delta("y" * 22)], 20),
    "in fewer characters than said": ([START, text_delta("x")], 1),
    "in the thinking": ([START, THINKING, SIGNATURE], 20),
    "in a tool's input": ([START, text_delta("x" * 40), TOOL_INPUT], 30),
    "after a small delta": ([START, text_delta("x" * 400), message_delta(output_tokens=50)], 100),
    "after a large delta": ([START, text_delta("x" * 40), message_delta(output_tokens=50)], 50),
    "within the last event": ([START, text_delta("x" * 40), message_delta(output_tokens=50), sse(STOP)[:-1]], 50),
    "in bytes, not characters": ([START, text_delta("é\u2028𝄞字" * 10)], 30),
    "in Chinese": ([START, text_delta("字" * 400)], 300),
}


@pytest.mark.parametrize(("events", "output"), CUT_SHORT.values(), ids=CUT_SHORT)
def test_a_messages_stream_cut_short_is_booked_as_an_estimate(meter, events, output):
    """
    The input is exact; the output is the larger of what was said last and a quarter of the text's bytes (UTF-8).
    """
    booked = meter("messages", sse(*events), ended=False)

    assert booked == Booked(g.Usage(**EXACT, output_tokens=output, estimated=True), "claude-served", "", False)


@pytest.mark.parametrize("kind", ["messages", "chat", "responses", "embeddings"])
def test_an_answer_that_said_nothing_is_booked_by_the_requests_size(meter, kind):
    """
    An upstream that was asked has worked: no call is free for ending early.
    """
    unheard, unreached = meter(kind, b"", ended=False), meter(kind, b"", ended=False, reached=False)

    assert unheard.usage == g.Usage(input_tokens=1000, estimated=True)
    assert unreached.usage == g.Usage()


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("messages", START["message"] | {"content": [{"type": "text", "text": "x" * 4000}]}),
        ("chat", {"model": "gpt", "choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 4000}}]}),
    ],
)
def test_an_answer_that_is_no_stream_and_cut_short_is_not_free(meter, kind, answer):
    """
    Whoever hangs up just before the end has had the text all the same.
    """
    data = json.dumps(answer, indent=1).encode()
    cut = meter(kind, data[: data.index(b"x" * 4000) + 4000], streaming=False, ended=False, every_cut=False)

    assert cut.usage.estimated
    assert cut.usage.input_tokens == 1000
    assert 1000 <= cut.usage.output_tokens <= len(data) // 4


@pytest.mark.parametrize("end", [b"", b"]}]}"], ids=["cut short", "whole"])
def test_embeddings_have_no_output_to_estimate(meter, end):
    """
    Their answer is long in bytes and holds no token.
    """
    data = b'{"model": "gpt-served", "data": [{"embedding": [' + b"-0.0123456789, " * 1000 + b"0.0" + end

    booked = meter("embeddings", data, streaming=False, ended=bool(end), every_cut=False)

    assert booked.usage == g.Usage(input_tokens=1000, estimated=True)


def test_count_tokens_is_free(meter):
    """
    It is never booked as spend, whatever it says.
    """
    answers = [meter("count_tokens", {"input_tokens": 4321}), meter("count_tokens", sse(START, STOP))]

    assert [answer.usage for answer in answers] == [g.Usage(), g.Usage()]


def chunk(delta: dict | None = None, finish: str | None = None, **fields: object) -> dict:
    """One chunk of a chat stream."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-served",
        "choices": choices,
    } | fields


CHAT_USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 30,
    "total_tokens": 130,
    "prompt_tokens_details": {"cached_tokens": 80, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 10},
}
CALLS = {"tool_calls": [{"index": 0, "function": {"arguments": "a" * 40}}]}
DONE = b"data: [DONE]\n\n"
CHAT_EXACT = g.Usage(input_tokens=20, output_tokens=30, cache_read_tokens=80)

CHAT = {
    "usage in the last chunk": (
        [chunk({"content": "Hello"}), chunk({}, "stop"), chunk(usage=CHAT_USAGE), DONE],
        CHAT_EXACT,
    ),
    "usage null before it": (
        [chunk({"content": "x"}, usage=None), chunk({}, "stop", usage=None), chunk(usage=CHAT_USAGE), DONE],
        CHAT_EXACT,
    ),
    "usage with the last choice": ([chunk({"content": "x"}), chunk({}, "stop", usage=CHAT_USAGE), DONE], CHAT_EXACT),
    "usage in every chunk": (
        [
            chunk({"content": "x"}, usage={"prompt_tokens": 100, "completion_tokens": 1}),
            chunk({}, "stop", usage={"prompt_tokens": 100, "completion_tokens": 20}),
            chunk(usage=CHAT_USAGE),
            DONE,
        ],
        CHAT_EXACT,
    ),
    "no [DONE]": ([chunk({"content": "x"}), chunk({}, "stop"), chunk(usage=CHAT_USAGE)], CHAT_EXACT),
    "no finish_reason": ([chunk({"content": "x"}), chunk(usage=CHAT_USAGE), DONE], CHAT_EXACT),
    "no details": (
        [chunk({}, "stop"), chunk(usage={"prompt_tokens": 100, "completion_tokens": 30}), DONE],
        g.Usage(input_tokens=100, output_tokens=30),
    ),
    "null details": (
        [chunk({}, "stop"), chunk(usage=CHAT_USAGE | {"prompt_tokens_details": None}), DONE],
        g.Usage(input_tokens=100, output_tokens=30),
    ),
    "no usage, as without stream_options": (
        [chunk({"role": "assistant", "content": ""}), chunk({"content": "x" * 82}), chunk({}, "stop"), DONE],
        g.Usage(input_tokens=1000, output_tokens=20, estimated=True),
    ),
    "no usage, a refusal": (
        [chunk({"refusal": "x" * 82}), chunk({}, "stop"), DONE],
        g.Usage(input_tokens=1000, output_tokens=20, estimated=True),
    ),
    "no usage, a tool's arguments": (
        [chunk({"content": "x" * 40}), chunk(CALLS), chunk(CALLS), chunk({}, "tool_calls"), DONE],
        g.Usage(input_tokens=1000, output_tokens=30, estimated=True),
    ),
    "no usage, a function's arguments": (
        [chunk({"function_call": {"name": "f", "arguments": "x" * 82}}), chunk({}, "function_call"), DONE],
        g.Usage(input_tokens=1000, output_tokens=20, estimated=True),
    ),
    "no usage, a server's reasoning": (
        [chunk({"reasoning_content": "x" * 40}), chunk({"content": "x" * 40}), chunk({}, "stop"), DONE],
        g.Usage(input_tokens=1000, output_tokens=20, estimated=True),
    ),
}


@pytest.mark.parametrize(("events", "usage"), CHAT.values(), ids=CHAT)
def test_a_chat_stream_is_booked_by_its_usage_or_as_an_estimate(meter, events, usage):
    """
    `prompt_tokens` includes what was cached; usage comes only where the client asked for it.
    """
    booked = meter("chat", sse(*events))

    assert booked == Booked(usage, "gpt-served", "", True)


def test_a_chat_stream_cut_short_is_not_finished(meter):
    """
    Neither a finish_reason nor [DONE]: what came is estimated.
    """
    booked = meter("chat", sse(chunk({"content": "x" * 82}), DONE[:-1]), ended=False)

    assert booked == Booked(g.Usage(input_tokens=1000, output_tokens=20, estimated=True), "gpt-served", "", False)


TEXT = chunk({"content": "x" * 80})
UNSAID = {
    "null": [TEXT, chunk({}, "stop"), chunk(usage={"prompt_tokens": 100, "completion_tokens": None}), DONE],
    "missing": [TEXT, chunk({}, "stop"), chunk(usage={"prompt_tokens": 100}), DONE],
    "zero": [TEXT, chunk({}, "stop"), chunk(usage={"prompt_tokens": 100, "completion_tokens": 0}), DONE],
    "zero at first": [chunk({}, usage={"prompt_tokens": 100, "completion_tokens": 0}), TEXT, chunk({}, "stop"), DONE],
}


@pytest.mark.parametrize("events", UNSAID.values(), ids=UNSAID)
def test_a_text_without_a_count_of_its_tokens_is_estimated(meter, events):
    """
    The input is the upstream's count; an output that it leaves out, or counts as nothing, is that of the text.
    """
    booked = meter("chat", sse(*events))

    assert booked.usage == g.Usage(input_tokens=100, output_tokens=20, estimated=True)


@pytest.mark.parametrize("count", [None, 0], ids=["null", "zero"])
@pytest.mark.parametrize("kind", ["chat", "responses", "messages"])
def test_a_whole_text_without_a_count_of_its_tokens_is_estimated(meter, kind, count):
    """
    No text is free for a usage that does not count it; a zero beside an empty answer is believed.
    """
    names = ("prompt_tokens", "completion_tokens") if kind == "chat" else ("input_tokens", "output_tokens")
    field = {"chat": "choices", "responses": "output", "messages": "content"}[kind]
    answer = {"model": "m", field: [{"text": "x" * 4000}], "usage": {names[0]: 100, names[1]: count}}

    booked = meter(kind, answer, every_cut=False).usage
    empty = meter(kind, answer | {field: [], "usage": {names[0]: 100, names[1]: 0}}, every_cut=False).usage

    assert (booked.input_tokens, booked.estimated) == (100, True) and 900 < booked.output_tokens < 1100
    assert empty == g.Usage(input_tokens=100)


# new-api writes both APIs' names into every usage, and zeros under those that are not in use.
BOTH_NAMES = {
    "chat": CHAT_USAGE | {"input_tokens": 0, "output_tokens": 0, "input_tokens_details": None},
    "responses": {
        **{"prompt_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}},
        **{"input_tokens": 100, "input_tokens_details": {"cached_tokens": 80}, "output_tokens": 30},
    },
}


@pytest.mark.parametrize("usage", BOTH_NAMES.values(), ids=BOTH_NAMES)
@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_a_count_stands_under_either_name_and_a_zero_beside_it_says_nothing(meter, kind, usage):
    """
    The larger of both names counts, for the input and for the output; the details are those of the name in use.
    """
    streams = {
        "chat": sse(chunk({"content": "x"}), chunk({}, "stop"), chunk(usage=usage), DONE),
        "responses": sse(OUTPUT, response("completed", usage=usage)),
    }

    assert meter(kind, {"model": "m", "usage": usage}).usage == CHAT_EXACT
    assert meter(kind, streams[kind], every_cut=False).usage == CHAT_EXACT


@pytest.mark.parametrize(
    ("usage", "output"),
    [
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 5041}, 5009),
        ({"prompt_tokens": 32, "total_tokens": 41}, 9),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 41}, 9),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 0}, 9),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": "5041"}, 9),
        ({"completion_tokens": 9, "total_tokens": 5041}, 9),
    ],
)
def test_reasoning_that_only_the_total_counts_is_output(meter, usage, output):
    """
    xAI and others bill reasoning that is not in `completion_tokens`: it is what the total has beside the prompt.
    """
    assert meter("chat", {"model": "m", "usage": usage}).usage.output_tokens == output


ITERATIONS = {
    "null": (None, True),
    "a number": (7, True),
    "an odd count": ({"type": "message", "input_tokens": "10", "output_tokens": 20}, True),
    "an odd split": ({"type": "message", "input_tokens": 10, "output_tokens": 20, "cache_creation": 0}, True),
    "an odd model": ({"type": "message", "model": [], "input_tokens": 10, "output_tokens": 20}, True),
    "a model that is null": ({"type": "message", "model": None, "input_tokens": 10, "output_tokens": 20}, False),
}


@pytest.mark.parametrize(("item", "estimated"), ITERATIONS.values(), ids=ITERATIONS)
def test_one_odd_iteration_hides_none_of_the_others(meter, item, estimated):
    """
    A compaction of 180,000 tokens is booked whatever stands beside it; what cannot be read makes the entry an estimate.
    """
    compaction = {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500}
    usage = {"input_tokens": 10, "output_tokens": 20, "iterations": [item, compaction]}

    booked = meter("messages", START["message"] | {"usage": usage}, every_cut=False).usage

    assert (booked.input_tokens, booked.output_tokens, booked.estimated) == (180_010, 3520, estimated)


def test_one_odd_item_of_a_response_hides_none_of_the_others(meter):
    """
    Searches are billed by the piece: an item that is null beside them makes the entry an estimate, and no search free.
    """
    search = {"type": "web_search_call", "status": "completed", "action": {"type": "search"}}
    answer = {"model": "m", "output": [search, None, {"type": None}, search], "usage": RESPONSES_USAGE}

    booked = meter("responses", answer, every_cut=False).usage

    assert (booked.extras, booked.estimated) == ((("web_search", 2),), True)


@settings(deadline=None, max_examples=100)
@example(model=None, error="", more=None)
@given(model=JSON, error=JSON, more=JSON)
def test_what_is_odd_beside_the_usage_does_not_hide_it(meter, model, error, more):
    """
    Servers write null, "" or an object where others write a name: the counts are booked all the same.
    """
    odd = {"model": model, "error": error, "service_tier": more}
    chat = sse(TEXT, chunk({}, "stop"), odd | {"choices": more and [more], "usage": CHAT_USAGE}, DONE)
    responses = sse(OUTPUT, {"type": "response.completed", "response": odd | {"usage": RESPONSES_USAGE}})
    stop = {"type": "message_delta", "delta": more, "error": error, "usage": {"output_tokens": 50}}

    booked = [meter(kind, data, every_cut=False) for kind, data in (("chat", chat), ("responses", responses))]
    messages = meter("messages", sse(START, text_delta("x"), stop, STOP), every_cut=False)

    for each in booked:
        assert (each.usage.input_tokens, each.usage.cache_read_tokens, each.usage.output_tokens) == (20, 80, 30)
    assert messages.usage == g.Usage(**EXACT, output_tokens=50)


@pytest.mark.parametrize("choices", [[], None])
def test_the_extra_chunk_of_a_server_without_model_names_is_kept(config, choices):
    """
    The client did not ask for it: neither a model that is null nor choices that are change that.
    """
    extra = sse({"id": "c", "model": None, "error": "", "choices": choices, "usage": CHAT_USAGE})

    assert b"".join(without_usage(config, [sse(TEXT) + extra + DONE])) == sse(TEXT) + DONE


ANSWERS = {
    "chat": ({"model": "gpt-served", "choices": [], "usage": CHAT_USAGE}, CHAT_EXACT),
    "responses": (
        {
            "model": "gpt-served",
            "error": None,
            "usage": {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 80}, "output_tokens": 30},
        },
        CHAT_EXACT,
    ),
    "embeddings": (
        {"model": "gpt-served", "data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}},
        g.Usage(input_tokens=8),
    ),
}


@pytest.mark.parametrize(("kind", "answer", "usage"), [(kind, *case) for kind, case in ANSWERS.items()], ids=ANSWERS)
def test_an_openai_answer_that_is_no_stream_is_booked_by_its_usage(meter, kind, answer, usage):
    """
    Cached tokens are part of OpenAI's input, and are priced apart.
    """
    assert meter(kind, answer) == Booked(usage, "gpt-served", "", True)


def response(kind: str, **fields: object) -> dict:
    """An event of the Responses API with the response in it."""
    return {"type": f"response.{kind}", "sequence_number": 1, "response": {"id": "r", "model": "gpt-served"} | fields}


RESPONSES_USAGE = {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 80}, "output_tokens": 30}
OUTPUT = {"type": "response.output_text.delta", "delta": "x" * 60}
ARGUMENTS = {"type": "response.function_call_arguments.delta", "delta": "x" * 22}


@pytest.mark.parametrize(
    ("last", "error_type"),
    [
        (response("completed", usage=RESPONSES_USAGE, error=None), ""),
        (response("incomplete", usage=RESPONSES_USAGE, incomplete_details={"reason": "max_output_tokens"}), ""),
        (response("failed", usage=RESPONSES_USAGE, error={"code": "server_error", "message": "m"}), "server_error"),
    ],
    ids=["completed", "incomplete", "failed"],
)
def test_a_responses_stream_is_booked_by_its_terminal_event(meter, last, error_type):
    """
    completed, incomplete and failed end a stream, and have its usage.
    """
    booked = meter("responses", sse(response("created", usage=None), OUTPUT, ARGUMENTS, last))

    assert booked == Booked(CHAT_EXACT, "gpt-served", error_type, True)


def item_done(**item: object) -> dict:
    """The event that ends an item of a response's output."""
    return {"type": "response.output_item.done", "item": item}


def test_the_items_of_a_responses_stream_are_counted_as_they_come(meter):
    """
    Cut short, the pieces of the items that came are booked; the terminal event's list takes the place of them.
    """
    search = {"type": "web_search_call", "action": {"type": "search"}}
    items = [search, {"type": "code_interpreter_call", "container_id": "a"}, search, {"type": "file_search_call"}]
    items += [{"type": "code_interpreter_call", "container_id": name} for name in "aba"]
    stream = sse(*(item_done(**item) for item in items))

    cut = meter("responses", stream, every_cut=False)
    whole = meter(
        "responses", stream + sse(response("completed", output=items, usage=RESPONSES_USAGE)), every_cut=False
    )

    assert dict(cut.usage.extras) == {"web_search": 2, "code_interpreter": 2, "file_search": 1}
    assert dict(whole.usage.extras) == dict(cut.usage.extras)


def test_of_the_items_of_a_responses_stream_nothing_is_kept(config):
    """
    400 items of 1 MB held 400 MB, and 10,000 small ones were counted anew at each: 27 s of everybody's time.
    """
    meter = READERS["responses"](call_of(config))
    meter.start(True)
    events = [sse(item_done(type="code_interpreter_call", container_id=f"{i}", code="x" * 10_000)) for i in range(2000)]

    with TracedMemory() as memory:
        for event in events:
            meter.read(event, False)

    assert memory.held < 1 << 20
    assert meter.extras == {"code_interpreter": 2000}


@pytest.mark.parametrize("kind", ["messages", "chat"])
@pytest.mark.parametrize(("said", "error_type"), [("e" * 1000, "e" * 64), ("a\nb", "a�b"), ("\x1b[31m", "�[31m")])
def test_an_errors_type_is_short_and_printable(meter, kind, said, error_type):
    """
    It stands in the ledger and in the log: 60 errors with a type of 4 MB made a ledger of 240 MB.
    """
    body = {"type": "error", "error": {"type": said, "message": "m"}}

    assert meter(kind, body, every_cut=False).error_type == error_type


def test_the_pieces_that_an_answer_names_are_bounded(meter):
    """
    Their names stand in the ledger; those of one usage object or of many, it has 32 at most, and short ones.
    """
    many = {f"tool_{i}": 1 for i in range(200)}
    huge = {f"tool_{i}": 1 for i in range(20_000)}
    events = [
        {"type": "message_delta", "usage": {"output_tokens": 1, "server_tool_use": {f"t{i}": 1}}} for i in range(99)
    ]

    in_one = meter("messages", sse(message_start(server_tool_use=many)), every_cut=False).usage.extras
    in_events = meter("messages", sse(*events), every_cut=False).usage.extras
    long = meter("messages", sse(message_start(server_tool_use={"n" * 999: 1})), every_cut=False).usage.extras

    assert (len(in_one), len(in_events)) == (32, 32)
    assert long == (("n" * 64, 1),)
    assert len(meter("messages", sse(message_start(server_tool_use=huge)), every_cut=False).usage.extras) == 32


def test_iterations_beyond_any_honest_number_are_not_read(meter):
    """
    100,000 of them took 0.2 s of everybody's time; the counts beside them are booked.
    """
    iterations = [{"type": "compaction", "input_tokens": 1, "output_tokens": 1}] * 10_000
    few = sse(message_start(input_tokens=7, iterations=iterations[:1000]))
    many = sse(message_start(input_tokens=7, iterations=iterations))

    assert meter("messages", few, every_cut=False).usage.input_tokens == 1007
    assert meter("messages", many, every_cut=False).usage.input_tokens == 7


def test_a_responses_stream_without_numbers_is_estimated(meter):
    """
    Cut short, or failed before there was usage: text and arguments count by their characters.
    """
    estimate = g.Usage(input_tokens=1000, output_tokens=20, estimated=True)
    failed = response("failed", usage=None, error={"code": "server_error", "message": "m"})

    cut = meter("responses", sse(response("created", usage=None), OUTPUT, ARGUMENTS), ended=False)
    ended = meter("responses", sse(OUTPUT, ARGUMENTS, failed))

    assert (cut.usage, cut.finished) == (estimate, False)
    assert (ended.usage, ended.finished, ended.error_type) == (estimate, True, "server_error")


# What does not belong into an answer

TRAPS = [
    "usage",
    "message_stop",
    "[DONE]",
    'data: {"type": "message_stop"}',
    '\n\ndata: {"type":"message_stop"}\n\n',
    '\r\rdata: [DONE]\r\r\u2028\u2028data: {"type": "message_delta", "usage": {"output_tokens": 9999}}\n\n',
    '"}}\n\nevent: message_delta\ndata: {"type":"message_delta","usage":{"input_tokens":0,"output_tokens":0}}',
    '{"type": "response.completed", "response": {"usage": {"input_tokens": 1, "output_tokens": 1}}}',
]
TRAP_TEXTS = st.lists(st.sampled_from([*TRAPS, "x", '"', "\\", "\n", "\ud7ff"]), max_size=4).map("".join)


@settings(deadline=None, max_examples=30)
@given(TRAP_TEXTS | st.text(max_size=40))
def test_what_a_model_says_changes_nothing_of_what_it_cost(meter, text):
    """
    A model that writes about usage, or is told to write it, is a model that writes text.
    """
    messages = sse(START, text_delta(text), message_delta(output_tokens=50), STOP)
    chat = sse(chunk({"content": text}), chunk({}, "stop"), chunk(usage=CHAT_USAGE), DONE)
    responses = sse({"type": "response.output_text.delta", "delta": text}, response("completed", usage=RESPONSES_USAGE))
    cut = sse(START, text_delta(text))

    booked = [meter("messages", messages), meter("chat", chat), meter("responses", responses)]
    cut_short = meter("messages", cut, ended=False)

    assert [b.usage for b in booked] == [g.Usage(**EXACT, output_tokens=50), CHAT_EXACT, CHAT_EXACT]
    assert cut_short.usage == g.Usage(**EXACT, output_tokens=max(1, len(text.encode()) // 4), estimated=True)
    assert not cut_short.finished


@pytest.mark.parametrize("text", TRAPS)
def test_what_a_model_says_changes_nothing_of_a_whole_answer_either(meter, text):
    """
    Text in `content` and in a tool's input stays text.
    """
    tool = {
        "type": "tool_use",
        "id": "t",
        "name": "n",
        "input": {"usage": {"input_tokens": 1}, "model": "x", "t": text},
    }
    message = START["message"] | {"content": [{"type": "text", "text": text}, tool]}

    booked = meter("messages", message, every_cut=False)

    assert booked == Booked(g.Usage(**EXACT, output_tokens=1), "claude-served", "", True)


UNREADABLE = {
    "not JSON": b"data: <html>\n\n",
    "cut JSON": b'data: {"type": "message_delta", "usage": {"output_tokens": 9\n\n',
    "a list": b"data: [1, 2]\n\n",
    "a number": b"data: 7\n\n",
    "null": b"data: null\n\n",
    "a string": b'data: "usage"\n\n',
    "not UTF-8": b'data: {"type": "\xff", "model": "\xfe", "usage": {"output_tokens": 9, "completion_tokens": 9}}\n\n',
    "half a character": b'data: {"type": "\\ud800", "usage": {"output_tokens": 9, "completion_tokens": 9}}\n\n',
    "tokens in words": b'data: {"type": "message_delta", "usage": {"output_tokens": "9", "prompt_tokens": "9"}}\n\n',
    "usage as a list": b'data: {"type": "message_delta", "usage": [1]}\n\n',
    "a message as a word": b'data: {"type": "message_start", "message": "usage", "response": "x", "choices": 1}\n\n',
    "deep": b'data: {"type": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n",
}


@pytest.mark.parametrize("event", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_event_changes_nothing(meter, event):
    """
    The client gets it all the same; what is no count of tokens is not booked.
    """
    messages = sse(START, text_delta("x" * 40), event, message_delta(output_tokens=50), event, STOP)
    chat = sse(chunk({"content": "x"}), event, chunk({}, "stop"), chunk(usage=CHAT_USAGE), event, DONE)
    responses = sse(OUTPUT, event, response("completed", usage=RESPONSES_USAGE), event)

    booked = [
        meter(k, d, every_cut=False) for k, d in (("messages", messages), ("chat", chat), ("responses", responses))
    ]

    assert booked == [
        Booked(g.Usage(**EXACT, output_tokens=50), "claude-served", "", True),
        Booked(CHAT_EXACT, "gpt-served", "", True),
        Booked(CHAT_EXACT, "gpt-served", "", True),
    ]


ABSURD = {
    **{"in pieces": 0.5, "below zero": -9, "beyond a billion": 10**9 + 1, "2^48": 1 << 48},
    **{"endless": 10**30, "of 400 digits": 10**400},
}


@pytest.mark.parametrize("count", ABSURD.values(), ids=ABSURD)
@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "cache_read_input_tokens", "split"])
def test_a_count_that_no_call_can_have_makes_the_whole_usage_an_estimate(meter, count, field):
    """
    An upstream that says 2^48 tokens once is believed in nothing: input by the request's size, output by the text's.
    """
    said = {"cache_creation": {"ephemeral_1h_input_tokens": count}} if field == "split" else {field: count}
    estimate = g.Usage(input_tokens=1000, output_tokens=20, estimated=True)
    message = START["message"]
    whole = message | {"usage": message["usage"] | said, "content": [{"type": "text", "text": "x" * 4000}]}
    stream = sse(START, text_delta("x" * 80), message_delta(**{"output_tokens": 50} | said), STOP)

    answer = meter("messages", whole, every_cut=False)

    assert meter("messages", stream, every_cut=False).usage == estimate
    assert answer.usage == g.Usage(input_tokens=1000, output_tokens=len(json.dumps(whole)) // 4, estimated=True)


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("count", ABSURD.values(), ids=ABSURD)
def test_an_openai_count_that_no_call_can_have_makes_the_whole_usage_an_estimate(meter, kind, count):
    """
    Also where it stands among the details.
    """
    names = ("prompt_tokens", "completion_tokens") if kind == "chat" else ("input_tokens", "output_tokens")
    usages = [{names[0]: count, names[1]: 5}, {names[0]: 5, names[1]: count}]
    usages.append({names[0]: 5, names[1]: 5, f"{names[0]}_details": {"cached_tokens": count}})

    booked = [meter(kind, {"model": "m", "usage": usage}, every_cut=False).usage for usage in usages]

    assert [(usage.input_tokens, usage.estimated) for usage in booked] == [(1000, True)] * 3


def test_counts_may_come_as_floats(meter):
    """
    Some servers write 12.0, and mean 12.
    """
    usage = {name: float(count) for name, count in START["message"]["usage"].items() if isinstance(count, int)}
    start = {"type": "message_start", "message": START["message"] | {"usage": usage | {"cache_creation": SPLIT}}}
    chat = {"prompt_tokens": 100.0, "completion_tokens": 30.0, "prompt_tokens_details": {"cached_tokens": 80.0}}

    messages = meter("messages", sse(start, message_delta(output_tokens=50.0), STOP))

    assert messages.usage == g.Usage(**EXACT, output_tokens=50)
    assert meter("chat", sse(chunk({"content": "x"}), chunk({}, "stop"), chunk(usage=chat), DONE)).usage == CHAT_EXACT


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", READERS)
@settings(deadline=None, max_examples=40)
@given(data=st.one_of(st.binary(max_size=60), JSON.map(lambda v: f"data: {json.dumps(v)}\n\n".encode())))
@example(data=b'data: {"type": "message_stop"}\n\n')
@example(data=b"[" * 100_000)
@example(data=b'{"deep": ' + b"[" * 100_000)
@example(data=b"\xff")
def test_no_meter_minds_what_it_reads(meter, kind, streaming, data):
    """
    An upstream may answer in events where nobody asked for them, or in noise: relaying goes on.
    """
    booked = meter(kind, data, streaming, every_cut=False)

    assert min(booked.usage.total_input_tokens, booked.usage.output_tokens) >= 0


@pytest.mark.parametrize(
    ("kind", "event", "error_type"),
    [
        ("messages", {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, "overloaded_error"),
        ("messages", {"type": "error", "error": {"message": "m"}}, "error"),
        ("chat", {"error": {"message": "m", "type": "server_error", "code": None}}, "server_error"),
        ("chat", {"error": {"message": "m", "code": 500}}, "500"),
        ("responses", {"type": "error", "code": "rate_limit_exceeded", "message": "m"}, "rate_limit_exceeded"),
        ("responses", {"type": "error", "code": None, "message": "m"}, "error"),
    ],
)
def test_an_error_within_a_stream_is_known_by_its_type(meter, kind, event, error_type):
    """
    The status was 200 long ago: the ledger has to learn it from the event.
    """
    booked = meter(kind, sse(event))

    assert (booked.error_type, booked.finished) == (error_type, False)


@pytest.mark.parametrize(
    ("kind", "body", "error_type"),
    [
        (
            "messages",
            {"type": "error", "error": {"type": "invalid_request_error", "message": "m"}},
            "invalid_request_error",
        ),
        ("chat", {"error": {"message": "m", "type": "insufficient_quota", "code": "x"}}, "insufficient_quota"),
        ("embeddings", {"error": {"message": "m", "type": None, "code": "x"}}, "x"),
    ],
)
def test_the_error_in_a_whole_answer_is_known_by_its_type(meter, kind, body, error_type):
    """
    An error's body is short, and the same in every format.
    """
    assert meter(kind, body).error_type == error_type


def test_an_answer_of_twenty_megabytes_is_not_kept_for_reading(config):
    """
    Memory has a bound; the output is booked as what was reserved for it. By its bytes, an image of 9 MB cost $21.
    """
    meter = READERS["messages"](call_of(config))
    meter.start(False)

    for _ in range(20):
        meter.read(b" " * (1 << 20), False)
    meter.read(json.dumps(START["message"]).encode(), False)
    meter.read(b"", True)

    usage = meter.spend(True)
    assert meter.is_finished and usage.estimated and usage.output_tokens == 8192  # limits.reserve_output


@pytest.mark.parametrize("ended", [True, False])
def test_a_last_event_of_nine_megabytes_ends_its_stream(config, ended):
    """
    response.completed has the images that were drawn. Too long to be read it is still the end, once it is whole; its
    output is booked as what was reserved, and no more than the client allows.
    """
    call = call_of(config)
    call.max_output = 500
    meter = READERS["responses"](call)
    meter.start(True)
    stream = sse(response("created"), response("completed", output=[{"result": "A" * (9 << 20)}]))

    for i in range(0, len(stream), 256 << 10):
        meter.read(stream[i : i + (256 << 10)] if ended else stream[i : i + (256 << 10)].rstrip(b"\n"), False)
    meter.read(b"", True)

    usage = meter.spend(True)
    assert meter.is_finished is ended
    assert not ended or (usage.output_tokens, usage.estimated) == (500, True)


def test_a_long_text_about_an_event_is_no_such_event(config):
    """
    Only a name that stands at the start of a line, or of the event's JSON, is the event's.
    """
    meter = READERS["responses"](call_of(config))
    meter.start(True)
    said = 'event: response.completed\ndata: {"type": "response.completed"}' + "A" * (9 << 20)

    meter.read(sse(b'data: {"delta": %b, "type": "response.output_text.delta"}\n\n' % json.dumps(said).encode()), False)

    assert not meter.is_finished and meter.has_content

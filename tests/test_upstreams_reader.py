"""Upstreams: how answers are read off a connection. Bytes go in by hand; there is no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gateway as g


class FakeTransport(asyncio.Transport):
    """The other end of a connection: it keeps what was sent, and knows whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.unsent = 0
        self.is_reading_paused = self.was_aborted = False

    def writelines(self, pieces: Iterable[bytes]) -> None:
        self.sent += b"".join(pieces)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.is_reading_paused = True

    def resume_reading(self) -> None:
        self.is_reading_paused = False

    def abort(self) -> None:
        self.was_aborted = True

    def is_closing(self) -> bool:
        return self.was_aborted


@dataclass
class Heard:
    """What the listener of one exchange was told, in order: "head", "body", then "end" or a failure."""

    status: int = 0
    headers: g.Headers = field(default_factory=list)
    body: bytes = b""
    told: list[str | g.Failure] = field(default_factory=list)

    def head(self, status: int, headers: g.Headers) -> None:
        self.told.append("head")
        self.status, self.headers = status, headers

    def received(self, body: bytes, last: bool) -> None:
        self.told.append("end" if last else "body")
        self.body += body

    def lost(self, failure: g.Failure) -> None:
        self.told.append(failure)

    @property
    def answer(self) -> tuple[int, g.Headers, bytes, object]:
        """The whole of it: status, headers, body, and how it ended."""
        assert self.told.count("head") <= 1 and "head" not in self.told[1:]
        ends = [told for told in self.told if told not in ("head", "body")]
        assert len(ends) <= 1 and ends == [told for told in self.told[-1:] if told not in ("head", "body")]
        return self.status, self.headers, self.body, (ends or [None])[0]


class Peer:
    """One connection, and the upstream's side of it."""

    def __init__(self) -> None:
        self.released: list[g.UpstreamConnection] = []
        self.transport = FakeTransport()
        self.connection = g.UpstreamConnection(self.released.append)
        self.connection.connection_made(self.transport)
        self._is_lost = False

    def ask(self) -> Heard:
        """Start an exchange."""
        heard = Heard()
        self.connection.send(b"POST / HTTP/1.1\r\n\r\n", [b"{}"], heard)
        return heard

    def says(self, *pieces: bytes) -> None:
        """Bytes of an answer, each piece one read; the loop reads no more once the connection is closed."""
        for piece in pieces:
            if not self.transport.was_aborted:
                self.connection.data_received(piece)
        self._let_the_loop_turn()

    def closes(self, error: Exception | None = None) -> None:
        """The end of the connection, with an error where it was reset."""
        if not self._is_lost and (error or not self.connection.eof_received()):
            self._is_lost = True
            self.connection.connection_lost(error)

    def _let_the_loop_turn(self) -> None:
        if self.transport.was_aborted:
            self.closes()


def read(*pieces: bytes, error: Exception | None = None) -> tuple[int, g.Headers, bytes, object]:
    """What a listener hears of these reads, when the peer then closes."""
    peer = Peer()
    heard = peer.ask()
    peer.says(*pieces)
    peer.closes(error)
    return heard.answer


def every_cut(data: bytes) -> Iterable[tuple[bytes, ...]]:
    """The bytes whole, byte by byte, and cut in two at every position."""
    yield (data,)
    yield tuple(data[i : i + 1] for i in range(len(data)))
    for i in range(1, len(data)):
        yield data[:i], data[i:]


# Good answers, however they are cut

SSE_HEAD = [(b"Content-Type", b"text/event-stream"), (b"Transfer-Encoding", b"chunked")]
SSE_LINES = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH_5 = [(b"Content-Length", b"5")]
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"

GOOD = {
    "Content-Length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", (200, LENGTH_5, b"hello", "end")),
    "no body": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", (200, [(b"Content-Length", b"0")], b"", "end")),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello", (200, LENGTH_5, b"hello", "end")),
    "an odd reason": (b"HTTP/1.1 200 \xe9t\xe9\r\nContent-Length: 5\r\n\r\nhello", (200, LENGTH_5, b"hello", "end")),
    "headers as they come": (
        b"HTTP/1.1 429 No\r\nAccess-Control-Allow-Origin:\r\nX-a:  \xff\r\nx-A: 2\r\nContent-Length: 5\r\n\r\nhello",
        (429, [(b"Access-Control-Allow-Origin", b""), (b"X-a", b"\xff"), (b"x-A", b"2"), *LENGTH_5], b"hello", "end"),
    ),
    "chunked": (
        b"HTTP/1.1 200 OK\r\n" + SSE_LINES + b"5\r\nhello\r\n1\r\n,\r\nA\r\n0123456789\r\n0\r\n\r\n",
        (200, SSE_HEAD, b"hello,0123456789", "end"),
    ),
    "chunk extensions": (
        b"HTTP/1.1 200 OK\r\n" + SSE_LINES + b'5;a=b;c="d e"\r\nhello\r\n0;last\r\n\r\n',
        (200, SSE_HEAD, b"hello", "end"),
    ),
    "trailers": (
        b"HTTP/1.1 200 OK\r\n" + SSE_LINES + b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-T:\r\n\r\n",
        (200, SSE_HEAD, b"hello", "end"),
    ),
    "until close": (b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\nhello", (200, [(b"X", b"1")], b"hello", "end")),
    "until close, kept alive": (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\nhello",
        (200, [(b"Connection", b"keep-alive")], b"hello", "end"),
    ),
    "until close, empty": (b"HTTP/1.1 500 No\r\n\r\n", (500, [], b"", "end")),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\nhello", (200, [], b"hello", "end")),
    "an interim answer before": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        (200, LENGTH_5, b"hello", "end"),
    ),
    "several interim answers": (
        EARLY * 3 + b"HTTP/1.1 200 OK\r\n" + SSE_LINES + b"5\r\nhello\r\n0\r\n\r\n",
        (200, SSE_HEAD, b"hello", "end"),
    ),
    "an interim answer with a length": (
        b"HTTP/1.1 103 Early\r\nContent-Length: 3\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        (200, LENGTH_5, b"hello", "end"),
    ),
    "204": (b"HTTP/1.1 204 No Content\r\nX: 1\r\n\r\n", (204, [(b"X", b"1")], b"", "end")),
    "304 with the length of what it spares": (
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
        (304, LENGTH_5, b"", "end"),
    ),
    "a line's end before": (b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", (200, LENGTH_5, b"hello", "end")),
    "an upgrade offered": (
        b"HTTP/1.1 200 OK\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello",
        (200, [(b"Connection", b"upgrade"), (b"Upgrade", b"h2c"), *LENGTH_5], b"hello", "end"),
    ),
}


@pytest.mark.parametrize(("data", "answer"), GOOD.values(), ids=GOOD)
def test_a_good_answer_is_the_same_however_it_is_cut(data, answer):
    """
    Reads end where they like; the head, the body and the end of an answer do not depend on it.
    """
    for pieces in every_cut(data):
        assert read(*pieces) == answer, pieces


HEADERS = st.lists(
    st.tuples(st.sampled_from(["x-a", "X-B", "request-id"]), st.text("abc :;,=é", max_size=12).map(str.strip)),
    max_size=3,
)
BODIES = st.binary(max_size=40)


@st.composite
def answers(draw) -> tuple[bytes, tuple[int, bytes, object]]:
    """An answer in any framing, and its status, body and end."""
    status, headers = draw(st.sampled_from([200, 201, 400, 429, 529])), draw(HEADERS)
    body, framing = draw(BODIES), draw(st.sampled_from(["length", "chunked", "close"]))
    if framing == "length":
        headers, framed = [*headers, ("content-length", str(len(body)))], body
    elif framing == "chunked":
        cuts = sorted(draw(st.sets(st.integers(0, len(body)), max_size=4)))
        chunks = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True) if a < b]
        extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b"']))
        framed = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
        framed += b"0\r\n" + draw(st.sampled_from([b"", b"X-T: 1\r\n"])) + b"\r\n"
        headers = [*headers, ("Transfer-Encoding", "chunked")]
    else:
        framed = body
    lines = [f"HTTP/1.1 {status} So", *(f"{name}: {value}" for name, value in headers)]
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", EARLY]))
    return interim + "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + framed, (status, body, "end")


@settings(deadline=None, max_examples=80)
@given(answers())
def test_every_framing_gives_the_same_body_at_every_cut(made):
    """
    Content-Length, chunks and the end of the connection are three ways to say the same.
    """
    data, expected = made

    heard = [read(*pieces) for pieces in every_cut(data)]

    assert {(status, body, end) for status, _, body, end in heard} == {expected}
    assert all(headers == heard[0][1] for _, headers, _, _ in heard)


@settings(deadline=None, max_examples=80)
@given(answers(), st.data())
def test_an_answer_that_stops_early_is_never_taken_for_whole(made, data):
    """
    An answer that says where it ends is lost when the connection closes before; what came of it is handed on.
    """
    whole, (status, body, _) = made
    stop = data.draw(st.integers(0, len(whole) - 1))

    for pieces in ((whole[:stop],), tuple(whole[i : i + 1] for i in range(stop))):
        heard_status, headers, heard_body, end = read(*pieces)
        says_its_end = any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in headers)
        assert body.startswith(heard_body)
        assert heard_status in (0, status)
        assert end == (g.CUT if says_its_end or not heard_status else "end")


FRAGMENTS = [
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 204 No\r\n", b"HTTP/1.1 100 Go\r\n", b"HTTP/1.1 304 No\r\n", b"HTTP/1.1 "),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"),
    *(b"Connection: upgrade\r\n", b"Transfer-Encoding: ", b"X: 1\r\n", b"hello", b"5\r\nhello\r\n", b"0\r\n"),
    *(b"\r\n", b"\r\n\r\n", b"\r", b"\n", b"\0", b" ", b":", b";", b"9", b"\xff"),
]


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.binary(max_size=80), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join)))
def test_no_bytes_are_too_strange(noise):
    """
    Whatever an upstream says, the listener is told of one end, and it does not depend on how the bytes were cut.
    """
    heard = {repr(read(*pieces)) for pieces in every_cut(noise)}

    assert len(heard) == 1
    assert read(noise)[3] is not None


# Broken answers

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED_HEAD = [(b"Transfer-Encoding", b"chunked")]
NOTHING = (0, [], b"")

BROKEN = {
    "nothing at all": (b"", (*NOTHING, g.CUT)),
    "an empty line": (b"\r\n", (*NOTHING, g.CUT)),
    "a cut status line": (b"HTTP/1.1 20", (*NOTHING, g.CUT)),
    "a cut head": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", (*NOTHING, g.CUT)),
    "only an interim answer": (b"HTTP/1.1 100 Continue\r\n\r\n", (*NOTHING, g.CUT)),
    "too short a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", (200, LENGTH_5, b"hell", g.CUT)),
    "a body that never begins": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", (200, LENGTH_5, b"", g.CUT)),
    "a cut chunk": (CHUNKED + b"5\r\nhel", (200, CHUNKED_HEAD, b"hel", g.CUT)),
    "no last chunk": (CHUNKED + b"5\r\nhello\r\n", (200, CHUNKED_HEAD, b"hello", g.CUT)),
    "a cut last chunk": (CHUNKED + b"5\r\nhello\r\n0\r\n", (200, CHUNKED_HEAD, b"hello", g.CUT)),
    "a bad chunk size": (CHUNKED + b"5\r\nhello\r\nzz\r\nhello\r\n", (200, CHUNKED_HEAD, b"hello", g.NOT_HTTP)),
    "a chunk longer than it says": (CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n", (200, CHUNKED_HEAD, b"hello", g.NOT_HTTP)),
    "a chunk size without end": (CHUNKED + b"f" * 17 + b"\r\nhello", (200, CHUNKED_HEAD, b"", g.NOT_HTTP)),
    "a length in a trailer": (
        CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n",
        (200, CHUNKED_HEAD, b"hello", g.NOT_HTTP),
    ),
    "Content-Length with chunks": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        (*NOTHING, g.NOT_HTTP),
    ),
    "chunks with Content-Length": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        (*NOTHING, g.NOT_HTTP),
    ),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 3\r\n\r\nhello",
        (*NOTHING, g.NOT_HTTP),
    ),
    "the same length twice": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        (*NOTHING, g.NOT_HTTP),
    ),
    "a negative length": (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello", (*NOTHING, g.NOT_HTTP)),
    "a length beyond counting": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nhello",
        (*NOTHING, g.NOT_HTTP),
    ),
    "a coding that nobody asked for": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello",
        (200, [(b"Transfer-Encoding", b"gzip")], b"hello", g.CUT),
    ),
    "garbage": (b"hello\r\n\r\n", (*NOTHING, g.NOT_HTTP)),
    "garbage before the status line": (
        b"garbage\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        (*NOTHING, g.NOT_HTTP),
    ),
    "another protocol": (b"\x15\x03\x01\x00\x02\x02\x16", (*NOTHING, g.NOT_HTTP)),
    "NUL in a header": (b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 5\r\n\r\nhello", (*NOTHING, g.NOT_HTTP)),
    "a folded header": (b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 5\r\n\r\nhello", (*NOTHING, g.NOT_HTTP)),
    "a header without a name": (b"HTTP/1.1 200 OK\r\n: a\r\nContent-Length: 5\r\n\r\nhello", (*NOTHING, g.NOT_HTTP)),
    "a space before the colon": (b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello", (*NOTHING, g.NOT_HTTP)),
    "a status of two digits": (b"HTTP/1.1 20 OK\r\nContent-Length: 5\r\n\r\nhello", (*NOTHING, g.NOT_HTTP)),
    "status 999": (b"HTTP/1.1 999 So\r\nContent-Length: 5\r\n\r\nhello", (999, LENGTH_5, b"hello", "end")),
    "101": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", (*NOTHING, g.NOT_HTTP)),
    "101 with all that belongs to it": (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello",
        (*NOTHING, g.NOT_HTTP),
    ),
    "101 and an answer behind it": (
        b"HTTP/1.1 101 Go\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        (*NOTHING, g.NOT_HTTP),
    ),
    "204 with a body": (
        b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
        (204, LENGTH_5, b"", "end"),
    ),
    "an unasked 304": (b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", (304, [(b"ETag", b"x")], b"", "end")),
}


@pytest.mark.parametrize(("data", "answer"), BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_has_a_clear_end_however_it_is_cut(data, answer):
    """
    The field's faults: nothing escapes from the reader, nothing waits for ever, and what was good before is heard.
    """
    for pieces in every_cut(data):
        assert read(*pieces) == answer, pieces


@pytest.mark.parametrize("end", [b"", b"Content-Length: 5\r\n\r\nhello"], ids=["without an end", "that ends well"])
@pytest.mark.parametrize("size", [1 << 10, 1 << 14, 1 << 16, 1 << 18])
def test_a_head_without_measure_is_refused(size, end):
    """
    Nobody fills our memory with a head: 300 KB are too many, in reads of any size.
    """
    data = b"HTTP/1.1 200 OK\r\n" + b"X-Filler: %b\r\n" % (b"x" * 1000) * 300 + end

    status, headers, body, outcome = read(*(data[i : i + size] for i in range(0, len(data), size)))

    assert (status, headers, body, outcome) == (*NOTHING, g.NOT_HTTP)


@pytest.mark.parametrize("at_once", [1, 50])
def test_interim_answers_without_end_are_refused(at_once):
    """
    An upstream may say 100 or 103 before its answer, not for ever.
    """
    peer = Peer()
    heard = peer.ask()

    for _ in range(20_000 // at_once):
        peer.says(b"HTTP/1.1 100 Continue\r\n\r\n" * at_once)

    assert heard.answer == (*NOTHING, g.NOT_HTTP)
    assert peer.transport.was_aborted


def test_a_large_body_right_behind_a_small_head_is_no_large_head():
    """
    Only the head is measured: the rest of a full read is body.
    """
    body = b"x" * ((256 << 10) - 40)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)

    answers = [read(head + body), read(head[:10], head[10:] + body), read(head, body)]

    assert answers == [(200, [(b"Content-Length", b"262104")], body, "end")] * 3


def test_a_status_below_100_is_no_interim_answer():
    """
    Its body must not become the beginning of the next answer's.
    """
    data = b"HTTP/1.1 099 So\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"

    heard = {repr(read(*pieces)) for pieces in every_cut(data)}

    assert heard == {repr((*NOTHING, g.NOT_HTTP))}


@pytest.mark.parametrize("framing", [b"Content-Length: 9\r\n", b"Transfer-Encoding: chunked\r\n", b"X: 1\r\n"])
def test_a_reset_connection_cuts_every_answer(framing):
    """
    A body that runs until the connection closes is whole after a close, not after a reset.
    """
    head = b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n"

    status, _, _, outcome = read(head, b"5\r\nhe", error=ConnectionResetError())

    assert (status, outcome) == (200, g.CUT)


# Connections that are used again


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
HELLO = (200, LENGTH_5, b"hello", "end")


def test_a_kept_alive_connection_carries_one_answer_after_another():
    """
    Nothing of an exchange is left over for the next one, whatever the framing was.
    """
    peer = Peer()
    chunked = CHUNKED + b"2\r\nhi\r\n0\r\nX-T: 1\r\n\r\n"
    unmodified = b"HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\n"

    answers = []
    for data in (ANSWER, EARLY + chunked, unmodified, ANSWER):
        heard = peer.ask()
        assert not peer.connection.heard
        peer.says(*(data[i : i + 1] for i in range(len(data))))
        answers.append(heard.answer)

    assert answers == [HELLO, (200, CHUNKED_HEAD, b"hi", "end"), (304, LENGTH_5, b"", "end"), HELLO]
    assert peer.connection.is_open and peer.connection.used_before and peer.connection.heard
    assert peer.released == [peer.connection] * 4
    assert peer.transport.sent == b"POST / HTTP/1.1\r\n\r\n{}" * 4


def test_a_connection_is_given_back_before_its_last_bytes_are_told():
    """
    Whoever hears the end may ask again at once, on the same connection.
    """
    peer = Peer()
    second = Heard()

    class AsksAgain(Heard):
        def received(self, body: bytes, last: bool) -> None:
            super().received(body, last)
            if last:
                peer.released[-1].send(b"GET / HTTP/1.1\r\n\r\n", (), second)

    first = AsksAgain()
    peer.connection.send(b"GET / HTTP/1.1\r\n\r\n", (), first)
    peer.says(ANSWER)
    peer.says(ANSWER)

    assert (first.answer, second.answer) == (HELLO, HELLO)


UNFIT = {
    "it says close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "another answer behind": ANSWER + ANSWER,
    "half an answer behind": ANSWER + ANSWER[:30],
    "garbage behind": ANSWER + b"garbage",
    "a single byte behind": ANSWER + b"H",
    "a NUL behind": ANSWER + b"\0",
    "204 with a body": b"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\nhello",
    "304 with a body": b"HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\nhello",
    "too long a body": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhello",
    "a chunked body and more": CHUNKED + b"5\r\nhello\r\n0\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "a 101 behind": ANSWER + b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
}


@pytest.mark.parametrize("data", UNFIT.values(), ids=UNFIT)
def test_what_comes_behind_an_answer_ends_the_connection(data):
    """
    Bytes that nobody asked for could pass for the answer to somebody else's question. The answer itself is good.
    """
    for pieces in every_cut(data):
        peer = Peer()
        heard = peer.ask()

        peer.says(*pieces)

        status, _, body, end = heard.answer
        assert (status, body, end) in [
            (200, b"hello", "end"),
            (200, b"hell", "end"),
            (204, b"", "end"),
            (304, b"", "end"),
        ]
        assert not peer.connection.is_open, pieces


def test_a_line_end_behind_an_answer_does_no_harm():
    """
    Some servers end a body with a line's end that they do not count (RFC 9112, 2.2).
    """
    peer = Peer()
    first = peer.ask()

    peer.says(ANSWER + b"\r\n")
    answers = [first.answer]
    if peer.connection.is_open:
        second = peer.ask()
        peer.says(ANSWER)
        answers.append(second.answer)

    assert answers in ([HELLO], [HELLO, HELLO])


ENDLESS = {
    "a header's value": (b"HTTP/1.1 200 OK\r\nX-Filler: ", b"x" * 1000),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 100),
    "interim answers": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 10),
    "a trailer": (CHUNKED + b"5\r\nhello\r\n0\r\nX-Trailer: ", b"x" * 1000),
    "a chunk's extension": (CHUNKED + b"5;x=", b"x" * 1000),
}


@pytest.mark.parametrize(("start", "piece"), ENDLESS.values(), ids=ENDLESS)
def test_what_is_no_body_has_a_bound_wherever_it_stands(start, piece):
    """
    The parser joins a header's value, or a trailer's, until it ends: 130 MB from an upstream were 20 s of a dead loop.
    """
    peer = Peer()
    heard = peer.ask()
    peer.says(start)
    said = 0

    while heard.answer[-1] is None and said < 2 << 20:
        peer.says(piece)
        said += len(piece)

    assert heard.answer[-1] is g.NOT_HTTP
    assert said <= g.UpstreamConnection.MAX_HEAD + len(piece)
    assert not peer.connection.is_open


def test_a_long_body_in_small_chunks_is_no_head():
    """
    The bound starts anew with each piece of the body, however much framing there is.
    """
    peer = Peer()
    heard = peer.ask()
    peer.says(CHUNKED)

    for _ in range(3000):
        peer.says(b"1;" + b"x" * 200, b"\r\nh\r\n")
    peer.says(b"0\r\n\r\n")

    assert (heard.answer[2], heard.answer[3]) == (b"h" * 3000, "end")


def test_bytes_on_an_idle_connection_close_it():
    """
    An answer before the question is not to be trusted: a 408 on the way out, or worse.
    """
    fresh, used = Peer(), Peer()
    used.ask()
    used.says(ANSWER)
    assert used.connection.is_open

    fresh.says(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    used.says(b"HTTP/1.1 408 Request Timeout\r\n\r\n")

    assert not fresh.connection.is_open and not used.connection.is_open


def test_a_connection_whose_request_is_not_all_sent_is_not_kept():
    """
    An upstream may refuse before it has read the body; the rest of it must not meet the next answer.
    """
    peer = Peer()
    heard = peer.ask()
    peer.transport.unsent = 5

    peer.says(ANSWER)

    assert heard.answer == HELLO
    assert not peer.connection.is_open


def test_a_request_is_sent_when_nothing_of_it_is_in_memory_any_more():
    """
    Some upstreams answer before they have read the body: until then its memory is not given back.
    """
    peer = Peer()
    peer.ask()
    peer.transport.unsent = 5
    before = peer.connection.is_sent

    peer.transport.unsent = 0

    assert (before, peer.connection.is_sent) == (False, True)


def test_an_idle_connection_that_the_peer_closes_is_given_up_in_silence():
    """
    The pool hears of it; there is no listener left to hear of it.
    """
    peer = Peer()
    heard = peer.ask()
    peer.says(ANSWER)

    peer.closes()

    assert heard.answer == HELLO
    assert peer.released == [peer.connection] * 2


# What the relay says


def test_an_abort_is_the_end_for_the_listener_too():
    """
    Whoever aborts hears nothing more: no bytes, no failure.
    """
    peer = Peer()
    heard = peer.ask()
    peer.says(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")

    peer.connection.abort()
    peer.closes()

    assert heard.answer == (200, LENGTH_5, b"he", None)
    assert peer.transport.was_aborted


@pytest.mark.parametrize(
    "data",
    [ANSWER, CHUNKED + b"5\r\nhello\r\n", CHUNKED + b"5\r\nhello\r\nzz\r\n"],
    ids=["a whole answer", "a piece of it", "a broken one"],
)
def test_an_abort_at_the_head_spares_the_listener_the_rest_of_the_read(data):
    """
    The head alone may be reason enough to go; the body that came with it is nobody's then.
    """
    peer = Peer()

    class LeavesAtTheHead(Heard):
        def head(self, status: int, headers: g.Headers) -> None:
            super().head(status, headers)
            peer.connection.abort()

    heard = LeavesAtTheHead()
    peer.connection.send(b"GET / HTTP/1.1\r\n\r\n", (), heard)
    peer.says(data)

    assert (heard.told, heard.body) == (["head"], b"")
    assert not peer.connection.is_open


def test_reading_stops_while_the_client_is_slow():
    """
    Slow readers slow the upstream, not our memory.
    """
    peer = Peer()
    peer.ask()

    peer.connection.pause()
    paused = peer.transport.is_reading_paused
    peer.connection.resume()

    assert (paused, peer.transport.is_reading_paused) == (True, False)


def test_a_connection_is_heard_from_its_first_byte_on():
    """
    A request may be sent again only where no byte of an answer has come.
    """
    peer = Peer()
    peer.ask()
    before = peer.connection.heard

    peer.says(b"H")

    assert (before, peer.connection.heard) == (False, True)

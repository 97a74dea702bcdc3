#!/usr/bin/env python3
"""A self-hosted gateway for Claude Code: one file, one config.yaml, usage in JSONL.

Clients (Claude Code, or any Anthropic or OpenAI client) send their requests here with a key of
their own, `sk-proxy-…`. The gateway checks the key and its limits, swaps in the real key of an
upstream, streams the request up and the answer back byte for byte, and appends what it cost to a
JSONL file. `gateway.py --help` has the commands, README.md the rest.

The story of a call:

    ClientConnection        reads the request's head, bounded in time and memory
    Gateway.authenticate    whose key is it, and may it be used from this address?
    Gateway.enter           takes a slot of each limit, and counts the request, before the body is read
    Gateway.handle          in a task of its own:
      read_request            model, session, what the call may be billed for
      Config.route            the upstreams that serve the model, and their names for it
      Limits.admit            holds an estimate in every window, or refuses
      Relay.run               makes attempts until one has content:
        Upstreams.take          the session's home, else the best that is ready; or waits
        Attempt.received        holds bytes back until the first content, then relays them as they come
      Bookkeeper.book         appends an Entry to the ledger, before the client's last byte
        Events.emit             tells the log and the metrics
      Reservation.release     gives back what was held

The file is read from top to bottom, in five floors; each section uses what stands above it, and
lists below its banner what it offers:

    A. Values
     1. Words         Call, Spend, Limit, WINDOWS, the errors
     2. Secrets       sealed and hashed, user keys, networks
     3. Prices        what a call costs
     4. Types         a setting's text to a value, and what is wrong with it
     5. Settings      every setting as a typed field
     6. Config        YAML to a checked, frozen snapshot
     7. Editing       config.yaml changed, nothing else with it
    B. Books
     8. Ledger        what was spent, line by line
     9. Counters      what is spent in the windows of limits
    10. Index         sums for reports and page, the position for restarts
    11. Waiting       queues with turns, bounds and deadlines
    12. Limits        may this key spend now?
    C. Road
    13. Wire          heads, header rules, events, no I/O
    14. Requests      what is read of a request
    15. Formats       what is read of an answer
    16. Dialects      a request for an upstream, and who reads its answer
    17. Connections   HTTP/1 to upstreams, pool, names
    18. Upstreams     health and choice
    19. Demo          an upstream that needs no API key
    20. Attempts      one try of one upstream, and the gate
    21. Relay         a call through its attempts, pings, drains
    D. House
    22. Events        what happened, announced once
    23. Metrics       counters for Prometheus
    24. Models        lists of models, and what the keys are good for
    25. Gateway       owns all state, tells the story
    26. Actions       what a command, a request or the page changes
    27. Reconcile     the ledger against a provider's export
    28. Backup        copied at one moment, checked, put back
    29. Integrity     installed files against their lists
    E. Doors
    30. Front door    clients' connections, no policy
    31. API           the gateway's own pages
    32. Local door    commands at the running gateway
    33. Server        process, signals, watcher, logging
    34. Command line  arguments to actions to text, JSON, CSV

Where to change what (docs/internals.md has more):

    a setting                its field and sentence in Settings, its line in config.example.yaml
    a window of limits       a row of WINDOWS
    a price                  a row of BUILT_IN_PRICES
    a field of the ledger    a field of Entry, set in Bookkeeper._entry
    an error for clients     a subclass of GatewayError
    what a failure means     a row of VERDICTS
    a route for calls        a row of ROUTES, and how its answer is read in DIALECTS
    a page or an API         a row of ENDPOINTS
    what a command changes   an Action, and a row of COMMANDS
    who hears of something   a listener of an Event

Words, one meaning each:

    client       sends calls; not a program of ours
    key          a user's, `sk-proxy-…`; an upstream has API keys
    upstream     an endpoint that answers calls
    call         one request of a client
    attempt      one try of one API key of one upstream
    spend        tokens and cost of a call; its usage is the tokens alone
    ledger       the JSONL files; their lines are entries
    index        sums over the ledger in SQLite; may be deleted
    limit        a number per window; the limits of a key, team or gateway are its budget
    reservation  what a call holds of its limits until it is booked
    session      one conversation of Claude Code; its home is the upstream that has its prompt cache
    gate         holds an attempt's bytes back until its first content
    verdict      what a failure before that means
    cooldown     how long an upstream is not asked after failures
    seal         to encrypt or hash a secret in config.yaml
    snapshot     one loaded configuration
    event        what happened, announced once
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and os.path.basename(os.path.realpath(__file__)) == "gateway.py":
    # Python keeps the syntax tree of a script until it ends: 31 MB of this one. So the server is started again as a
    # module, whose tree goes at once, and whose code is cached.
    PAIRS = zip(sys.argv, sys.argv[1:], strict=False)
    if [word for before, word in PAIRS if word[:1] != "-" and before != "--config"] in ([], ["serve"]):
        OPTIONS = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
        FOLDER = os.path.dirname(os.path.realpath(__file__))
        AGAIN = f"import sys; sys.path.insert(0, {FOLDER!r}); import gateway; sys.exit(gateway.main())"
        if not {"-m", "-c", "--"} & {*OPTIONS}:  # else it is a module already
            os.execv(sys.executable, [sys.executable, *OPTIONS, "-P", "-c", AGAIN, *sys.argv[1:]])

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback

import argparse
import asyncio
import base64
import bisect
import contextlib
import copy
import csv
import ctypes
import datetime as dt
import difflib
import email.utils
import enum
import errno
import fcntl
import fnmatch
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import posixpath
import queue
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import socket
import sqlite3
import ssl
import stat
import struct
import tarfile
import tempfile
import threading
import time
import types
import unicodedata
import urllib.parse
import zlib
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import (
    IO,
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
    cast,
    get_args,
    get_origin,
)

try:
    import httptools
    import msgspec
    import tornado.httputil
    import tornado.web
    import yaml
    from watchdog.events import (
        FileClosedEvent,
        FileCreatedEvent,
        FileDeletedEvent,
        FileMovedEvent,
        FileSystemEvent,
        FileSystemEventHandler,
    )
    from watchdog.observers import Observer
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} has no package {missing.name}: activate the virtual environment that has it, or make "
        "one (python3 -m venv .venv) and run in it: pip install -r requirements.txt"
    )

if TYPE_CHECKING:
    import importlib.metadata

    import prometheus_client

VERSION = "0.1.0"
PROGRAM = "claude-gateway" if Path(sys.argv[0]).name == "claude-gateway" else "gateway.py"  # as it was installed

log = logging.getLogger("gateway")

# === Floor A. Values: plain data and pure functions =================================

# --- 1. Words: Call, Spend, Limit, WINDOWS, the errors ----------------------------
# Offers: Api, BadRequest, Besides, Budget, Call, ClientLeft, Clock, CommandError, EncodingRefused, error_body,
#   error_headers, first_values, FromEnvironment, GatewayError, Headers, HeadTooLarge, INTERNAL_ERROR, KeyForbidden,
#   KeyRefused, Limit, LIMIT_UNITS, LimitFull, LimitSpent, LimitWindow, MethodNotAllowed, named_counts, NotFound,
#   NOTHING_BESIDES, os_reason, Overloaded, Pace, PLAIN_TARGETS, PolicyBlocked, printable, RequestTimeout, Route,
#   ROUTES, ScopeKind, Share, Spend, STEP_S, token_counts, TOKEN_KINDS, Tokens, TooLarge, Unavailable, UNREADABLE,
#   UpstreamFailed, UpstreamRefusesUs, UpstreamTimeout, Usage, VersionRefused, why_not, WINDOWS, Windows

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # what decoding foreign JSON raises
Headers = list[tuple[bytes, bytes]]
Api = Literal["anthropic", "openai"]
ScopeKind = Literal["key", "team", "gateway"]  # whose limits


def why_not(error: OSError) -> str:
    """What the system refused; where rights are missing also to whom, which is not obvious in a container."""
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        reason += f" for user {os.geteuid()}: it must be that user's (chown), or the gateway must run as its owner"
    return reason


def os_reason(error: OSError) -> str:
    """Why a connection failed, the same on every event loop."""
    if isinstance(error, (ssl.SSLError, socket.gaierror)):
        return error.strerror or str(error)
    if error.errno:
        return os.strerror(error.errno)
    return str(error) or "the connection was lost"


class Clock(NamedTuple):
    """Where time comes from: seconds since 1970, and seconds that never jump."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


class Pace(NamedTuple):
    """Times and bounds that are no settings: how often, how long, how much at most."""

    tick_s: float = 0.25  # how often deadlines are looked at
    late_s: float = 1.0  # a tick that comes later than that was held up: the time is given to whoever has a deadline
    poll_s: float = 1.0  # how often config.yaml's stat is compared; its content every tenth time
    burst_s: float = 0.05  # a save is a burst of events; the config is read when it is over
    ping_s: float = 15.0  # Claude Code gives up after 300 s without a byte
    drain_s: float = 60.0  # an answer read on for nobody, at most this long, or as long as `timeouts.idle` …
    drain_calls: int = 64  # … and so many at once, of one key at most as many as are still free
    free_drains: int = 2  # of one key's drains, how many do not count in `concurrent`
    queue_calls: int = 64  # calls that may wait for a slot of one `concurrent` limit
    waiting_calls: int = 256  # calls that may wait for the same upstreams
    backoff_s: float = 0.5  # before an upstream is asked again by the same call; twice that the next time …
    max_backoff_s: float = 8.0  # … and at most
    error_body_s: float = 5.0  # an error's body must be whole by then
    resend_s: float = 1.0  # a kept-alive connection that dies within so long was dead before the request came
    upstream_idle_s: float = 55.0  # kept-alive connections; common load balancers close at 60
    head_s: float = 30.0  # a client's request head must be whole by then
    body_s: float = 60.0  # silence allowed in a client's request body, and for it to take the rest of an answer
    body_bytes_s: int = 128 << 10  # bytes a second that a request body must have come with, after its first `body_s`
    ask_s: float = 10.0  # between two questions to a client that sends no more, whether it is there
    slow_body_s: float = 5.0  # a body that is not whole by then holds no slot until it is
    keep_alive_s: float = 300.0  # silence allowed between a client's requests; head_s until it has shown a good key
    linger_s: float = 2.0  # silence of a client whose body is refused, which is read and thrown away …
    leave_s: float = 10.0  # … at most so long
    page_s: float = 120.0  # for a page of ours: to be made, and to be read by its client
    strangers: int = 256  # connections of one address (IPv6: /64) that have shown no good key
    models_s: float = 300.0  # how long a fetched list of models is good
    models_fetch_s: float = 2.5  # Claude Code waits 3 s for the list
    without_usage_s: float = 600.0  # how long an upstream is not asked for usage that rejects the question
    demo_s: float = 0.02  # between two words of the demo upstream


class Tokens(msgspec.Struct, kw_only=True, gc=False):
    """Counts of tokens by class. `input_tokens` are those neither written to nor read from a cache."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cache_read_tokens: int = 0

    @property
    def total_input_tokens(self) -> int:
        """All input, cached or not."""
        return self.input_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens + self.cache_read_tokens

    def add(self, more: Tokens, sign: int = 1) -> None:
        """Count others in, or out."""
        for name in Tokens.__struct_fields__:
            setattr(self, name, getattr(self, name) + sign * getattr(more, name))


# The kind of each class, in the order of Tokens: input, output, cache_write (twice), cache_read. Prices know classes,
# weights and reports know kinds.
TOKEN_KINDS = tuple(re.sub(r"(_\d+[mh])?_tokens$", "", name) for name in Tokens.__struct_fields__)
# The counts of whatever has them, in the order of Tokens.
token_counts: Callable[[Any], tuple[int, ...]] = operator.attrgetter(*Tokens.__struct_fields__)


def named_counts(tokens: Tokens) -> dict[str, Any]:
    """Return its counts by the names of their classes."""
    return dict(zip(Tokens.__struct_fields__, token_counts(tokens), strict=True))


class Share(Tokens):
    """Tokens of a call that have a price of their own; `model` is "" for the model that was asked."""

    kind: str = ""
    model: str = ""
    prompt_tokens: int = 0  # of its largest prompt, which decides the tier


class Usage(Tokens, kw_only=True):
    """What one call has used. The counts have everything in them; `shares` are those of it that are priced apart."""

    estimated: bool = False
    shares: tuple[Share, ...] = ()
    extras: tuple[tuple[str, float], ...] = ()  # what is billed by the piece: web_search, 3
    premiums: tuple[tuple[str, str], ...] = ()  # what the whole is dearer or cheaper for: speed, fast
    prompt_tokens: int = 0  # of the largest prompt, where the input is the sum of several
    is_fallback: bool = False  # another model took over: what is no share was served by it


class LimitWindow(NamedTuple):
    """One row of WINDOWS: the time over which a limit counts. `kind` says how a window begins and ends.

    sliding   always the last `seconds` (a multiple of STEP_S), counted in steps of STEP_S
    rolling   opens with the first call and lasts `seconds`; the first call after its end opens the next one
    calendar  so many whole `days` (seven begin on a Monday) or `months` (three begin in January, April …)
    forever   never ends
    """

    name: str  # after the unit in config.yaml: usd/NAME
    kind: Literal["sliding", "rolling", "calendar", "forever"]
    phrase: str  # as in `$3.20 of $20.00 today`
    seconds: int = 0
    days: int = 0
    months: int = 0

    def dates(self, day: dt.date) -> tuple[dt.date, dt.date]:
        """Return the first day of the calendar window around `day`, and the first day after that window."""
        if self.months:
            month = day.year * 12 + day.month - 1  # months since the year 0
            first = month - month % self.months
            after = first + self.months
            return dt.date(first // 12, first % 12 + 1, 1), dt.date(after // 12, after % 12 + 1, 1)
        start = day - dt.timedelta(days=(day.toordinal() - 1) % self.days)  # day 1 of the year 1 was a Monday
        return start, start + dt.timedelta(days=self.days)


Windows = Mapping[str, LimitWindow]
STEP_S = 5  # seconds: a sliding window moves in steps of so many
WINDOWS: Windows = {
    window.name: window
    for window in (
        LimitWindow("minute", "sliding", "this minute", seconds=60),
        LimitWindow("hour", "rolling", "this hour", seconds=3600),
        LimitWindow("5h", "rolling", "in 5 hours", seconds=5 * 3600),
        LimitWindow("day", "calendar", "today", days=1),
        LimitWindow("week", "calendar", "this week", days=7),
        LimitWindow("month", "calendar", "this month", months=1),
        LimitWindow("", "forever", "in all"),
    )
}


class Spend(Tokens, kw_only=True):
    """What a call, an attempt, or many of them have spent."""

    weighted_tokens: int | None = None  # what counts in limits of tokens; None where it was booked without
    estimated: bool = False
    cost_usd: float = 0.0


class Limit(NamedTuple):
    """A number per window: `unit` is tokens, usd, requests or concurrent."""

    unit: str
    window: LimitWindow
    amount: float

    @property
    def name(self) -> str:
        """`usd/day`, or `usd` for ever."""
        return f"{self.unit}/{self.window.name}" if self.window.name else self.unit


class Budget(NamedTuple):
    """The limits of a key, of a team, or of the whole gateway; `concurrent` is infinite where it has none."""

    scope: ScopeKind | Literal["count_tokens"]
    name: str
    limits: tuple[Limit, ...]
    concurrent: float

    def __str__(self) -> str:
        return f"the {self.scope} {self.name}" if self.name else "this gateway"

    @property
    def id(self) -> tuple[str, str]:
        """What tells it from others, in any snapshot."""
        return self.scope, self.name


class Route(NamedTuple):
    """One row of the table of forwardable requests: the upstream's path and how its answer is read."""

    path: str
    api: Api  # the client's format: its errors are written so
    kind: Literal["messages", "count_tokens", "chat", "responses", "embeddings"]


BLANK = re.compile(  # characters that Python takes for printable and no terminal shows: fillers, selectors of a variant
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U0001d159\U000e0100-\U000e01ef]"
)


def printable(text: str, most: int = 128) -> str:
    """The beginning of a foreign text, as it may stand in entries, in the log and on terminals.

    What is not to be seen (control characters, line breaks, what turns the direction of writing, `BLANK`) becomes `�`.
    """
    if len(text) <= most and text.isascii() and text.isprintable():
        return text
    text = text[:most]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else "�" for c in text)
    return BLANK.sub("�", text)


@functools.lru_cache(maxsize=256)
def program_of(user_agent: bytes) -> str:
    """The first word of a User-Agent, the name and the version of a program, as `printable`."""
    return printable(user_agent.decode("latin-1").partition(" ")[0], 64)


def first_values(headers: Headers) -> dict[bytes, bytes]:
    """The first value of each header, by its name in lower case."""
    return {name.lower(): value for name, value in reversed(headers)}


class Besides(NamedTuple):
    """What a request may be billed for beside its text and its answer at its model's price (`read_besides`)."""

    models: tuple[str, ...] = ()  # that may serve it, or run for it, beside its own
    is_unclear: bool = False  # it names models where they cannot be read: the dearest of the price table counts
    runs: int = 0  # of other models by its tools: each has the call's input, and an output of its own
    extras: tuple[tuple[str, int], ...] = ()  # what is billed by the piece, and how many of it
    write: str = ""  # the price of its input, where that is written to a cache: a field of `Price`
    has_sound: bool = False  # it asks for an answer in sound
    has_stored: bool = False  # it refers to input that lies upstream


NOTHING_BESIDES = Besides()


class Call(msgspec.Struct, eq=False):
    """One request of a client, from its head to its entry in the ledger."""

    config: Config  # one snapshot: a reload never changes a running call
    key: Key
    route: Route
    query: bytes
    headers: Headers
    address: str
    named: dict[bytes, bytes] = {}  # `first_values` of the headers, which need not be told
    id: str = ""
    user_agent: str = ""
    started: float = 0.0
    admitted: float = 0.0  # later where it waits for a slot
    reservation: Reservation = cast("Reservation", None)  # what it holds, from its admission on
    body: bytes = b""
    bytes_up: int = 0
    input_estimate: int = 0  # tokens
    max_output: float = math.inf  # tokens that the client allows
    model: str = ""
    upstream_model: str = ""
    session: str = ""
    servings: tuple[Serving, ...] = ()  # who may be asked, the best first
    affinity: str = ""  # what has a home upstream, where that has been looked for
    blamed: tuple[object, ...] = ()  # for whose failures in a row it has counted: once for each
    stream: bool = False
    premiums: tuple[tuple[str, str], ...] = ()  # what it asks for that makes it dearer: speed, fast
    besides: Besides | None = None  # None as most calls have it
    includes_usage: bool | None = True  # of a chat stream: None where the client said nothing of it

    def __post_init__(self) -> None:
        self.id = "req_" + os.urandom(12).hex()
        self.named = self.named or first_values(self.headers)
        self.user_agent = program_of(self.named.get(b"user-agent", b"")[:256])
        self.started = self.admitted = self.config.clock.monotonic()

    def __repr__(self) -> str:
        return f"Call({self.id!r})"  # its headers have a key in them

    @property
    def reserved_output(self) -> float:
        """How many output tokens are reserved for it where its limits allow that."""
        return min(self.max_output, self.config.limits.reserve_output)

    def drop_request(self) -> None:
        """Free body and headers once no attempt can follow: thousands of streams may run for hours."""
        self.body, self.headers, self.named = b"", [], {}
        if self.reservation:  # a call of `upstream test` has none
            self.reservation.give_back_body()

    def header(self, name: bytes) -> str:
        """The first value of a header (`name` in lower case), or ""."""
        value = self.named.get(name)
        return value.decode("latin-1") if value else ""


class GatewayError(Exception):
    """A refusal that the client reads. Subclasses fix status and type; CLIENT.md's table says which do what.

    `should_retry` becomes `x-should-retry`, `retry_after_s` becomes `retry-after`; None sends neither.
    """

    status = 500
    type = "api_error"
    code = "internal_error"
    should_retry: bool | None = None

    def __init_subclass__(cls, *, status: int, type: str, code: str, should_retry: bool | None = None) -> None:
        cls.status, cls.type, cls.code, cls.should_retry = status, type, code, should_retry

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class BadRequest(GatewayError, status=400, type="invalid_request_error", code="bad_request"):
    """The request itself is wrong."""


class PolicyBlocked(GatewayError, status=400, type="policy_blocked", code="policy_blocked", should_retry=False):
    """The operator does not allow this; asking again changes nothing."""


class KeyRefused(GatewayError, status=401, type="authentication_error", code="invalid_api_key", should_retry=False):
    """No key, an unknown one, or one that has expired."""


class KeyForbidden(GatewayError, status=403, type="permission_error", code="permission_denied", should_retry=False):
    """A good key that must not be used: disabled, or from this address, which may also not read /metrics."""


class NotFound(GatewayError, status=404, type="not_found_error", code="not_found"):
    """Nothing is served under this path or name."""


class MethodNotAllowed(GatewayError, status=405, type="invalid_request_error", code="method_not_allowed"):
    """The path is served, with another method."""


class RequestTimeout(GatewayError, status=408, type="invalid_request_error", code="request_timeout"):
    """The client did not send its request in time."""


class TooLarge(GatewayError, status=413, type="request_too_large", code="request_too_large"):
    """The body is larger than `server.max_body`, or than all bodies together may be, `server.memory`."""


class EncodingRefused(GatewayError, status=415, type="invalid_request_error", code="unsupported_media_type"):
    """The body is compressed."""


class HeadTooLarge(GatewayError, status=431, type="invalid_request_error", code="headers_too_large"):
    """The request's head has more bytes than any honest one."""


class VersionRefused(GatewayError, status=505, type="invalid_request_error", code="http_version_not_supported"):
    """The request is in a version of HTTP that is not spoken here."""


class LimitSpent(GatewayError, status=429, type="billing_error", code="insufficient_quota", should_retry=False):
    """A limit is used up: asking again before its reset changes nothing."""


class LimitFull(GatewayError, status=429, type="rate_limit_error", code="rate_limit_exceeded"):
    """Too much at once: in a moment there may be room."""


class ClientLeft(GatewayError, status=499, type="client_left", code="client_left"):
    """Nobody is there any more to read this."""


class UpstreamFailed(GatewayError, status=502, type="api_error", code="upstream_failed"):
    """The upstream could not be reached, or what it said was not HTTP."""


class Unavailable(GatewayError, status=503, type="overloaded_error", code="unavailable"):
    """Not now: the gateway is stopping, or its ledger cannot be written."""


class UpstreamRefusesUs(
    GatewayError, status=502, type="api_error", code="upstream_refuses_gateway", should_retry=False
):
    """The upstream does not take the gateway's own key: the client's is good, and asking again changes nothing."""


class Overloaded(GatewayError, status=529, type="overloaded_error", code="overloaded"):
    """Every upstream is left alone for a while, or has as many calls as it may."""


class UpstreamTimeout(GatewayError, status=504, type="timeout_error", code="upstream_timeout"):
    """The upstream did not answer in time."""


INTERNAL_ERROR = "The gateway failed; its log says how."


def error_body(error: GatewayError, api: Api, request_id: str) -> bytes:
    """Render a refusal in the client's format (CLIENT.md: any other shape shows raw JSON to the user)."""
    if api == "openai":
        inner = {"message": error.message, "type": error.type, "param": None, "code": error.code}
        return msgspec.json.encode({"error": inner, "request_id": request_id})
    return msgspec.json.encode(
        {"type": "error", "error": {"type": error.type, "message": error.message}, "request_id": request_id}
    )


class CommandError(Exception):
    """A command cannot do what it was asked; the message says why and what would help."""


def error_headers(error: GatewayError, request_id: str) -> list[tuple[str, str]]:
    """The headers that make Claude Code stop or wait as it should."""
    headers = [("content-type", "application/json"), ("request-id", request_id)]
    if error.should_retry is not None:
        headers.append(("x-should-retry", "true" if error.should_retry else "false"))
    if error.retry_after_s is not None:
        headers.append(("retry-after", str(error.retry_after_s)))
    return headers


LIMIT_UNITS = ("tokens", "usd", "requests")

ROUTES = {
    "/v1/messages": Route("/v1/messages", "anthropic", "messages"),
    "/v1/messages/count_tokens": Route("/v1/messages/count_tokens", "anthropic", "count_tokens"),
    "/v1/chat/completions": Route("/v1/chat/completions", "openai", "chat"),
    "/v1/responses": Route("/v1/responses", "openai", "responses"),
    "/v1/embeddings": Route("/v1/embeddings", "openai", "embeddings"),
}  # all POST; GET /v1/models and /v1/models/ID are answered from lists, and nothing else reaches an upstream
PLAIN_TARGETS = frozenset(path.encode() for path in ROUTES)


class FromEnvironment(str):
    """Text of config.yaml in which `${NAME}` was filled in. No message shows it."""


# --- 2. Secrets: sealed and hashed, user keys, networks ---------------------------
# Offers: address_in, check_pasted, credentials, is_forbidden, Key, KeyRing, matches, Network, network_of, new_key,
#   parse_address, read_hop, seal_key, SEALED_KEY, SEALED_OR_ELSEWHERE, SealError, Secret, SECRET_HEADER, Vault

SECRET_HEADER = re.compile("auth|key|token|secret", re.IGNORECASE)  # a header of such a name has a secret in it
SEALED_OR_ELSEWHERE = re.compile(r"^(enc|sha256):|\$\{|^\$\w+$")  # no secret in clear text
SEALED_KEY = re.compile(r"sha256:([0-9a-fA-F]{64})(?::(.{4}))?")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Secret(str):
    """A string that never prints itself by accident."""

    is_written = True  # it stands in config.yaml, sealed or not; else it comes from the environment

    @classmethod
    def parse(cls, value: object) -> Self:
        """Make one of a plain value of config.yaml. Raises ValueError, which does not quote what is no text, either."""
        if not isinstance(value, str):
            raise ValueError("expected text in quotes")
        secret = cls(value)
        secret.is_written = not isinstance(value, FromEnvironment)
        return secret

    def __repr__(self) -> str:
        return "Secret(…)"


class SealError(ValueError):
    """A sealed value cannot be opened, or there is no secret to seal with."""


def new_key() -> str:
    """A fresh user key: the prefix and 32 letters and digits (190 bits)."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return "sk-proxy-" + "".join(secrets.choice(alphabet) for _ in range(32))


def seal_key(key: str) -> str:
    """The form in which a user's key is kept: its hash, and its last four characters to tell it by.

    A fast hash suffices: the keys are random and long, there is nothing to guess (unlike a password).
    """
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}:{key[-4:]}"


def check_pasted(secret: str) -> None:
    """Raise ValueError, without echoing it, where a pasted secret is empty or holds more than the secret."""
    if not re.fullmatch("(?![\"'`])[!-~]+(?<![\"'`])", secret):
        raise ValueError("is empty, or has blanks, quotes or other characters that no key has: paste only the key")


class Vault:
    """Encrypts and decrypts upstream keys with Fernet; several secrets, newest first."""

    PREFIX = "enc:"
    FILE = "gateway.secret"

    def __init__(self, fernet_keys: Sequence[str], source: str) -> None:
        self._keys = list(fernet_keys)
        self.source = source

    @classmethod
    def open(cls, directory: Path, environ: Mapping[str, str] = os.environ) -> Vault:
        """Read GATEWAY_SECRET, else the file that GATEWAY_SECRET_FILE names, else gateway.secret in `directory`."""
        path = cls.file(directory, environ)
        if path is None:
            return cls(environ["GATEWAY_SECRET"].replace(",", " ").split(), "GATEWAY_SECRET")
        try:
            return cls(path.read_text(errors="replace").split(), str(path))
        except FileNotFoundError:
            return cls([], str(path))
        except OSError as error:
            raise SealError(f"cannot read the sealing secret {path}: {why_not(error)}") from None

    @staticmethod
    def file(directory: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
        """The file of the sealing secret, whether or not it is there; None where GATEWAY_SECRET holds it."""
        if environ.get("GATEWAY_SECRET"):
            return None
        return Path(environ.get("GATEWAY_SECRET_FILE") or directory / Vault.FILE)

    @staticmethod
    def new_secret() -> str:
        """A fresh sealing secret: 32 random bytes in URL-safe base64 (the Fernet specification)."""
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()

    @property
    def index_secret(self) -> bytes:
        """What the index is signed with. Where there is no sealing secret, everybody can know it."""
        return hashlib.blake2b("".join(self._keys[:1]).encode(), person=b"index").digest()

    @functools.cached_property
    def _fernet(self) -> Any:
        # Imported where it is used: cryptography costs 30 ms and 6 MB, and a plain config needs none of it.
        from cryptography.fernet import Fernet, MultiFernet

        if not self._keys:
            raise SealError(f"there is no sealing secret in {self.source}")
        try:
            return MultiFernet([Fernet(key) for key in self._keys])
        except ValueError:
            raise SealError(f"{self.source} holds something that is no Fernet key (44 characters of base64)") from None

    def seal(self, plain: str) -> str:
        """Encrypt with the newest secret."""
        return self.PREFIX + str(self._fernet.encrypt(plain.encode()), "ascii")

    def unseal(self, value: str) -> Secret:
        """Open `enc:…`; any other value is returned as it is. Raises SealError."""
        if not value.startswith(self.PREFIX):
            return Secret(value)
        from cryptography.fernet import InvalidToken

        try:
            return Secret(self._fernet.decrypt(value.removeprefix(self.PREFIX).encode()).decode())
        except InvalidToken:
            problem = f"was sealed with another secret than the one in {self.source}"
        except SealError as error:
            problem = f"cannot be opened: {error}"
        raise SealError(
            f"{problem}. Restore the secret that it was sealed with (its file, or GATEWAY_SECRET), "
            f"or put the value here in clear text and run `{PROGRAM} seal`"
        )


def matches(pattern: str, model: str) -> bool:
    """Glob match of a model name (`*`, `?`, `[…]`; case counts)."""
    return pattern == "*" or fnmatch.fnmatchcase(model, pattern)


@functools.lru_cache(maxsize=4096)
def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IP address, IPv4 in IPv6 unwrapped; None where it is none."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0] if ":" in text else text)  # IPv6 may have a zone
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def address_in(text: str, networks: Iterable[Network]) -> bool:
    """Whether the address lies in one of the networks."""
    address = parse_address(text)
    return address is not None and any(address in network for network in networks)


# Link-local networks, and where clouds tell their machines' credentials (AWS, Google, Azure, Alibaba, Oracle).
FORBIDDEN_TEXT = "169.254.0.0/16 fe80::/10 fd00:ec2::254/128 fd20:ce::254/128 100.100.100.200/32 192.0.0.192/32"
FORBIDDEN = tuple(map(ipaddress.ip_network, FORBIDDEN_TEXT.split()))


def is_forbidden(text: str) -> bool:
    """Whether an address is link-local or a cloud's metadata service; names are not."""
    return address_in(text.partition("%")[0], FORBIDDEN)


HOP = re.compile(r"\[([0-9A-Fa-f:.%\w]+)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+")  # with brackets, a port or both


def read_hop(text: str) -> str:
    """The address in a part of X-Forwarded-For, `ip`, `ip:port`, `[ip]` or `[ip]:port`; "" where it is none."""
    text = text.strip()
    if len(text) > 64:  # none is as long
        return ""
    if found := HOP.fullmatch(text):
        text = found[1] or found[2]
    return text if parse_address(text) else ""


class Key(msgspec.Struct, frozen=True):
    """One user's key as the snapshot holds it. `expires_at` is in seconds since 1970."""

    name: str
    digest: bytes
    last4: str
    models: tuple[str, ...]
    expires_at: float
    networks: tuple[Network, ...]
    enabled: bool
    team: str
    budgets: tuple[Budget, ...]  # its own, its team's, the gateway's

    def __str__(self) -> str:
        return f"{self.name} (…{self.last4})" if self.last4 else self.name

    @property
    def spends(self) -> bool:
        """Whether a limit in tokens or dollars holds for its calls."""
        return any(limit.unit in ("tokens", "usd") for budget in self.budgets for limit in budget.limits)

    def allows_model(self, model: str) -> bool:
        """Whether one of the key's globs matches."""
        return any(matches(pattern, model) for pattern in self.models)

    def check(self, address: str, now: float) -> None:
        """Raise what is wrong with using this key from `address` at `now` (seconds since 1970)."""
        if not self.enabled:
            raise KeyForbidden(f"The key {self} is disabled. Ask whoever runs this gateway.")
        if now >= self.expires_at:
            when = dt.datetime.fromtimestamp(self.expires_at, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
            raise KeyRefused(f"The key {self} expired at {when}. Ask whoever runs this gateway for a new one.")
        if self.networks and not address_in(address, self.networks):
            raise KeyForbidden(f"The key {self} may not be used from {address}.")


def network_of(text: str) -> str:
    """Who an address is counted with: an IPv4 address by itself, IPv6 by its /64, of which anybody has 2^64."""
    address = parse_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Address(int(address) >> 64 << 64))
    return str(address or text)


class KeyRing:
    """All keys of a snapshot, found by hash."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._by_digest = {key.digest: key for key in keys}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_digest.values())

    def find(self, tokens: Sequence[str]) -> Key:
        """The key that a request's credentials name (Bearer, x-api-key or both). Raises KeyRefused."""
        if not tokens:
            raise KeyRefused("No key was sent. Set ANTHROPIC_AUTH_TOKEN to the sk-proxy-… key that you were given.")
        if len(tokens) > 1 and len(set(tokens)) > 1:
            raise KeyRefused("Two different keys were sent. Unset ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN.")
        key = self._by_digest.get(hashlib.sha256(tokens[0].encode("latin-1", "replace")).digest())
        if key is None:
            raise KeyRefused("This gateway does not know the key that was sent. Ask whoever runs it.")
        return key

    def find_again(self, key: Key) -> Key:
        """A key of an earlier snapshot as it is in this one. Raises KeyRefused."""
        found = self._by_digest.get(key.digest)
        if found is None:
            raise KeyRefused(f"This gateway does not know the key {key} any more. Ask whoever runs it.")
        return found


def credentials(headers: Headers, named: Mapping[bytes, bytes]) -> list[str]:
    """Every key in a request's headers, as text; `named` are their first values."""
    found = []
    if len(named) == len(headers):  # each name stands once, so the two that matter need not be looked for
        headers = [(name, named[name]) for name in (b"x-api-key", b"authorization") if name in named]
    for name, value in headers:
        lower = name.lower()
        if lower == b"x-api-key":
            found.append(value.decode("latin-1").strip())
        elif lower == b"authorization" and value[:7].lower() == b"bearer ":
            found.append(value[7:].decode("latin-1").strip())
    return found


# --- 3. Prices: what a call costs -------------------------------------------------
# Offers: Bill, BUILT_IN_PRICES, CHAT_SEARCH, DOLLARS, Dollars, EXTRAS, Factor, ModelPrice, ORDINARY, Premium,
#   PREMIUMS, Price, PriceConfig, PriceTable, SURCHARGE_NAMES, Unknown

DOLLARS = "a number of dollars such as 20 or 0.50 (without the $ sign)"
Dollars = Annotated[float, msgspec.Meta(ge=0, le=1e9, title=DOLLARS)]
Factor = Annotated[float, msgspec.Meta(ge=0, le=1000, title="a number from 0 to 1000 such as 1.5")]
Premium = Annotated[float, msgspec.Meta(gt=0, le=1000, title="a factor above 0 such as 1.5 (1: no premium)")]

# The prices of whatever has them, in the order of Tokens.
class_prices: Callable[[Any], tuple[float, ...]] = operator.attrgetter(
    *(name.removesuffix("_tokens") for name in Tokens.__struct_fields__)
)


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """USD per million tokens. What is not given follows from `input` by the factors Anthropic publishes."""

    input: Dollars
    output: Dollars
    cache_write_5m: Dollars | None = None
    cache_write_1h: Dollars | None = None
    cache_read: Dollars | None = None

    def __post_init__(self) -> None:
        for name, factor in (("cache_write_5m", 1.25), ("cache_write_1h", 2.0), ("cache_read", 0.1)):
            if getattr(self, name) is None:
                msgspec.structs.force_setattr(self, name, round(self.input * factor, 6))

    def plain(self) -> Price:
        """Only the prices."""
        return Price(*class_prices(self))

    def cost_usd(self, tokens: Tokens) -> float:
        """What these tokens cost, in USD, rounded to a billionth."""
        micro_usd: float = tokens.input_tokens * self.input + tokens.output_tokens * self.output
        micro_usd += tokens.cache_write_5m_tokens * (self.cache_write_5m or 0)  # none is None (`__post_init__`)
        micro_usd += tokens.cache_write_1h_tokens * (self.cache_write_1h or 0)
        micro_usd += tokens.cache_read_tokens * (self.cache_read or 0)
        return round(micro_usd / 1e6, 9)


class Tier(Price, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The price of a call whose whole input, cached or not, is larger than `above` tokens."""

    above: Amount


# What is billed beside tokens at their price: name, glob of models, amount; the first row that matches counts. A
# premium is a factor on what all tokens of a call cost; several multiply. An extra is USD a piece.
# Claude (platform.claude.com/docs/en/about-claude/pricing and /build-with-claude/fast-mode, November 2026): fast mode
# 2 x (6 x for Opus 4.6 and 4.7); Priority Tier is a commitment that is paid for apart; batches half; US-only inference
# 1.1 x; $10 for 1,000 web searches, web fetches only their tokens; code execution $0.05 an hour and container, of which
# usage has only requests: each is counted as the five minutes that are the least.
# OpenAI (developers.openai.com/api/docs/pricing and openai.com/api-fast-mode, November 2026): fast mode, which answers
# name `priority`; Flex and Batch half; $10 for 1,000 web searches, $2.50 for 1,000 file searches, $0.03 for a container
# of Code Interpreter.
SURCHARGES = (
    ("fast", "claude-opus-4-[67]*", 6.0),
    ("fast", "*", 2.0),
    ("priority", "claude-*", 1.0),
    ("priority", "gpt-5.5*", 2.5),
    ("priority", "gpt-4*", 1.75),
    ("priority", "o[1-9]*", 1.75),
    ("priority", "*", 2.0),
    ("flex", "*", 0.5),
    ("batch", "*", 0.5),
    ("us", "*", 1.1),
    ("web_search", "*", 0.01),
    ("file_search", "*", 0.0025),
    ("code_execution", "*", round(0.05 / 12, 6)),
    ("code_interpreter", "*", 0.03),
)
SURCHARGE_NAMES = tuple(dict.fromkeys(name for name, _, _ in SURCHARGES))
EXTRAS = ("web_search", "file_search", "code_execution", "code_interpreter")
CHAT_SEARCH = "web_search"  # what a chat with `web_search_options` is billed for beside its tokens
# Which premiums a field of an answer can name; a word that is not known counts as the dearest of them.
PREMIUMS = {"speed": ("fast",), "service_tier": ("priority", "flex", "batch"), "inference_geo": ("us",)}
ORDINARY = ("", "standard", "standard_only", "default", "auto", "scale", "global", "not_available")


class ModelPrice(NamedTuple):
    """What a model costs: `tiers` are for larger inputs, by the tokens above which they hold, ascending."""

    base: Price
    tiers: tuple[tuple[int, Price], ...] = ()
    audio: Price | None = None  # of tokens that are sound; None: as text
    surcharges: Mapping[str, float] = {}  # by the names of SURCHARGES; in a row of a table only those it sets itself
    is_known: bool = True  # whether a row other than "*" matches

    def at(self, input_tokens: int) -> Price:
        """Return the price of a call with so much input."""
        found = self.base
        for above, price in self.tiers:
            if input_tokens > above:
                found = price
        return found

    def premiums(self, words: Iterable[tuple[str, str]]) -> dict[str, float]:
        """Return the factors of a call's premiums: fields and words of its answer, or of its request."""
        found = {}
        for field, word in words:
            names = PREMIUMS[field]
            if word in names:
                names = (word,)
            found[word] = max(self.surcharges[name] for name in names)
        return found


class PriceConfig(Price, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A row of the price table as the file has it."""

    tiers: tuple[Tier, ...] = ()
    audio: Price | None = None
    fast: Premium | None = None
    priority: Premium | None = None
    flex: Premium | None = None
    batch: Premium | None = None
    us: Premium | None = None
    web_search: Dollars | None = None
    file_search: Dollars | None = None
    code_execution: Dollars | None = None
    code_interpreter: Dollars | None = None

    def flat(self) -> ModelPrice:
        """Return the same as it is looked up and booked."""
        named = {name: getattr(self, name) for name in SURCHARGE_NAMES}
        tiers = sorted(self.tiers, key=lambda tier: tier.above)
        return ModelPrice(
            self.plain(),
            tuple((tier.above, tier.plain()) for tier in tiers),
            self.audio,
            {name: amount for name, amount in named.items() if amount is not None},
        )


# USD per million tokens: input, output, cache write 5 m (OpenAI: 30 m), cache write 1 h (12 h), cache read. Names are
# exact, but for the date of a version: what is not known must not borrow a sibling's price.
# Claude: platform.claude.com/docs/en/about-claude/pricing as of November 2026; GPT: developers.openai.com
# /api/docs/pricing as of November 2026, retired models as they last stood there.
FABLE_5, OPUS_4, OPUS_4_5 = Price(10, 50, 12.5, 20, 1), Price(15, 75, 18.75, 30, 1.5), Price(5, 25, 6.25, 10, 0.5)
SONNET_4 = Price(3, 15, 3.75, 6, 0.3)


def gpt_price(
    input_usd: float, output_usd: float, read_usd: float, write: float = 1.0, is_long: bool = False
) -> ModelPrice:
    """A row of OpenAI's: writes to the cache cost so many times the input, and prompts above 272k tokens more."""
    base = Price(input_usd, output_usd, input_usd * write, input_usd * write, read_usd)
    large = Price(input_usd * 2, output_usd * 1.5, input_usd * write * 2, input_usd * write * 2, read_usd * 2)
    return ModelPrice(base, ((272_000, large),) if is_long else ())


BUILT_IN_PRICES = {
    **dict.fromkeys(("claude-fable-5-2", "claude-mythos-5-2"), ModelPrice(Price(8, 40, 10, 16, 0.2))),
    **dict.fromkeys(("claude-fable-5-1", "claude-mythos-5-1"), ModelPrice(Price(10, 50, 12.5, 20, 0.25))),
    **dict.fromkeys(("claude-fable-5", "claude-mythos-5", "claude-mythos-preview"), ModelPrice(FABLE_5)),
    "claude-opus-5-5": ModelPrice(Price(4, 20, 5, 8, 0.2)),
    **dict.fromkeys(("claude-opus-5", "claude-opus-4-8", "claude-opus-4-7"), ModelPrice(OPUS_4_5)),
    **dict.fromkeys(("claude-opus-4-6", "claude-opus-4-5"), ModelPrice(OPUS_4_5)),
    **dict.fromkeys(("claude-opus-4-1", "claude-opus-4", "claude-opus-4-0", "claude-3-opus"), ModelPrice(OPUS_4)),
    "claude-sonnet-5-5": ModelPrice(Price(2, 10, 2.5, 4, 0.1)),
    "claude-sonnet-5": ModelPrice(Price(2, 10, 2.5, 4, 0.2)),
    **dict.fromkeys(("claude-sonnet-4-6", "claude-sonnet-4-5", "claude-sonnet-4"), ModelPrice(SONNET_4)),
    **dict.fromkeys(("claude-sonnet-4-0", "claude-3-7-sonnet", "claude-3-5-sonnet"), ModelPrice(SONNET_4)),
    "claude-haiku-5-5": ModelPrice(Price(0.1, 0.5, 0.125, 0.2, 0.01), ((100_000, Price(0.5, 2.5, 0.625, 1, 0.05)),)),
    "claude-haiku-4-5": ModelPrice(Price(1, 5, 1.25, 2, 0.1)),
    "claude-3-5-haiku": ModelPrice(Price(0.8, 4, 1, 1.6, 0.08)),
    "claude-3-haiku": ModelPrice(Price(0.25, 1.25, 0.3, 0.5, 0.03)),
    "gpt-6.2-astra": gpt_price(8, 40, 0.4, 1.25, is_long=True),
    "gpt-6-astra": gpt_price(10, 50, 1, 1.25, is_long=True),
    **dict.fromkeys(("gpt-6.2-sol", "gpt-6.1-sol"), gpt_price(2, 10, 0.1, 1.25, is_long=True)),
    "gpt-6-sol": gpt_price(2, 10, 0.2, 1.25, is_long=True),
    "gpt-6-luna": gpt_price(0.1, 0.5, 0.01, 1.25, is_long=True),
    **dict.fromkeys(
        ("gpt-5.6-sol", "gpt-5.6"), gpt_price(5, 30, 0.5, 1.25, is_long=True)
    ),  # $4/$20 was promised until 21 November
    "gpt-5.6-terra": gpt_price(2, 12, 0.2, 1.25, is_long=True),
    "gpt-5.6-luna": gpt_price(0.2, 1.2, 0.02, 1.25, is_long=True),
    "gpt-5.5": gpt_price(5, 30, 0.5, is_long=True),
    **dict.fromkeys(("gpt-5.5-pro", "gpt-5.4-pro"), gpt_price(30, 180, 30, is_long=True)),
    "gpt-5.4": gpt_price(2.5, 15, 0.25, is_long=True),
    "gpt-5.4-mini": gpt_price(0.75, 4.5, 0.075),
    "gpt-5.4-nano": gpt_price(0.2, 1.25, 0.02),
    **dict.fromkeys(("gpt-5.3-codex", "gpt-5.2", "gpt-5.2-codex"), gpt_price(1.75, 14, 0.175)),
    "gpt-5.2-pro": gpt_price(21, 168, 21),
    "gpt-5-pro": gpt_price(15, 120, 15),
    **dict.fromkeys(("gpt-5.1", "gpt-5.1-codex", "gpt-5.1-codex-max"), gpt_price(1.25, 10, 0.125)),
    **dict.fromkeys(("gpt-5", "gpt-5-codex"), gpt_price(1.25, 10, 0.125)),
    **dict.fromkeys(("gpt-5-mini", "gpt-5.1-codex-mini"), gpt_price(0.25, 2, 0.025)),
    "gpt-5-nano": gpt_price(0.05, 0.4, 0.005),
    "gpt-4.1": gpt_price(2, 8, 0.5),
    "gpt-4.1-mini": gpt_price(0.4, 1.6, 0.1),
    "gpt-4.1-nano": gpt_price(0.1, 0.4, 0.025),
    "gpt-4o": gpt_price(2.5, 10, 1.25),
    "gpt-4o-mini": gpt_price(0.15, 0.6, 0.075),
    "gpt-audio": gpt_price(2.5, 10, 2.5)._replace(audio=Price(32, 64)),
    "gpt-audio-mini": gpt_price(0.6, 2.4, 0.6)._replace(audio=Price(10, 20)),
    "gpt-4o-audio-preview": gpt_price(2.5, 10, 2.5)._replace(audio=Price(40, 80)),
    "gpt-4o-mini-audio-preview": gpt_price(0.15, 0.6, 0.15)._replace(audio=Price(10, 20)),
    "gpt-image-*": gpt_price(10, 40, 2.5),  # of the models that draw, the dearest
    "o1": gpt_price(15, 60, 7.5),
    "o3": gpt_price(2, 8, 0.5),
    "o3-pro": gpt_price(20, 80, 20),
    "o3-mini": gpt_price(1.1, 4.4, 0.55),
    "o4-mini": gpt_price(1.1, 4.4, 0.275),
    "text-embedding-3-small": gpt_price(0.02, 0, 0.02),
    "text-embedding-3-large": gpt_price(0.13, 0, 0.13),
    "text-embedding-ada-002": gpt_price(0.1, 0, 0.1),
    "*": ModelPrice(FABLE_5, audio=Price(40, 80)),
}


class Charge(Tokens, omit_defaults=True):
    """A line of a call's bill beside its own tokens: tokens with a price of their own, or things billed by the piece.

    `usd` is `price` x tokens x `factor`, or what `count` pieces cost; tokens stand in the entry's counts as well.
    """

    what: str
    usd: float
    model: str = ""
    count: float = 0.0
    price: Price | None = None
    factor: float = 1.0


class Bill(Spend, kw_only=True):
    """What a call costs: its own tokens x `price` (USD per million) x every premium, and every charge."""

    price: Price = Price(0, 0)
    premiums: dict[str, float] = {}  # factors on the call's own tokens
    charges: list[Charge] = []  # what else is in `cost_usd`


UNDATED = re.compile(r"([-@]\d{8}|-\d{4}-\d\d-\d\d|-latest|\[1m\])$")  # what names a version of the same price
Unknown = Literal["", "refuse", "dearest"]


class PriceTable:
    """Globs and prices in the file's order; the first match wins, and a date at a name's end is looked past.

    `surcharges` are for all models. `unknown` says what becomes of a model that only "*" matches.
    """

    def __init__(
        self, rows: Mapping[str, ModelPrice], surcharges: Mapping[str, float] = {}, others: Unknown = ""
    ) -> None:
        self.rows, self.surcharges, self.unknown = rows, surcharges, others
        self.price = functools.lru_cache(maxsize=1024)(self._price)

    def _price(self, model: str) -> ModelPrice:
        """Return what a model costs, with all its surcharges."""
        plain = UNDATED.sub("", model)
        pattern = next((glob for glob in self.rows if matches(glob, model) or matches(glob, plain)), "*")
        row = self.rows.get(pattern) or self.dearest()
        surcharges = {name: amount for name, glob, amount in reversed(SURCHARGES) if matches(glob, model)}
        surcharges |= {**self.surcharges, **row.surcharges}
        if pattern == "*" and self.unknown:
            row = self.dearest()
        return row._replace(surcharges=surcharges, is_known=pattern != "*")

    def dearest(self) -> ModelPrice:
        """Return the highest price of each class in the table."""
        prices = [price for row in self.rows.values() for price in (row.base, *(price for _, price in row.tiers))]
        by_class = zip(*map(class_prices, prices), strict=True)
        return ModelPrice(Price(*map(max, by_class)))

    def fill(self, bill: Bill, asked: str, served: str, usage: Usage) -> None:
        """Write on a bill what a call costs at the price of the model that was asked, or that served if it is dearer.

        A served name that has no row says nothing: servers answer with paths and aliases of their own.
        """
        bill.input_tokens = usage.input_tokens
        bill.output_tokens = usage.output_tokens
        bill.cache_write_5m_tokens = usage.cache_write_5m_tokens
        bill.cache_write_1h_tokens = usage.cache_write_1h_tokens
        bill.cache_read_tokens = usage.cache_read_tokens
        bill.estimated = usage.estimated
        prompt = usage.prompt_tokens or usage.total_input_tokens
        if served in ("", asked) and not (usage.shares or usage.extras or usage.premiums):  # as most calls are
            bill.price = self.price(asked).at(prompt)
            bill.cost_usd = bill.price.cost_usd(usage)
            return
        names = [asked]
        if served and served != asked and self.price(served).is_known:
            names.append(served)
        if usage.is_fallback:
            names = names[-1:]  # what the asked model did is a share of its own
        own: Tokens = usage
        if usage.shares:
            own = Tokens(**named_counts(usage))
            for share in usage.shares:
                own.add(share, -1)
        offers = []
        for name in names:
            row, premiums = self.price(name), dict[str, float]()
            price = row.at(prompt)
            if usage.premiums:
                premiums = row.premiums(usage.premiums)
            offers.append((price.cost_usd(own) * math.prod(premiums.values()), price, premiums, row))
        cost, price, premiums, row = max(offers, key=operator.itemgetter(0))
        charges = [self._charge(share, asked, row, price, usage) for share in usage.shares]
        for name, count in usage.extras:
            if name in EXTRAS and row.surcharges[name]:
                charges.append(Charge(what=name, usd=round(count * row.surcharges[name], 9), count=count))
        bill.cost_usd = round(cost + sum(map(operator.attrgetter("usd"), charges)), 9)
        bill.price = price
        bill.premiums = premiums
        bill.charges = charges

    def _charge(self, share: Share, asked: str, row: ModelPrice, price: Price, usage: Usage) -> Charge:
        """Return what a share costs: sound at the call's model's price for it, another model's run at that model's."""
        if share.kind == "audio":
            price = row.audio or price
        else:
            row = self.price(share.model or asked)
            price = row.at(share.prompt_tokens)
        factor = math.prod(row.premiums(usage.premiums).values())
        usd = round(price.cost_usd(share) * factor, 9)
        return Charge(share.kind, usd, share.model, price=price, factor=factor, **named_counts(share))


# --- 4. Types: a setting's text to a value, and what is wrong with it -------------
# Offers: A_DATE, Amount, AtLeastOne, Attempts, convert, describe, Duration, Expiry, Fsync, LimitSet, MAX_SHOWN,
#   MAX_TOLD, Mistake, Mistakes, ModelNames, Name, Networks, odd_character, Policies, Port, Prices, read_date,
#   Secrets, Size, Steps, unknown, Url, UserKey

# A setting is a field of a struct: its type says what may be written, its default what holds where nothing is written,
# and `about` what it means, in the words that config.example.yaml has beside it (a test compares them).
#
# msgspec makes structs of what YAML reads. A type that it does not know has a method `parse`, which makes one of a
# plain value or raises ValueError: `parse` of Duration makes 90.0 of "1.5m". msgspec stops at the first mistake, so
# `find_mistakes` then walks value and types side by side and notes all of them, by their places: of
# {"server": {"port": "http", "drain": 10}} these are ("server", "port") and ("server", "drain").

MAX_TOLD = 10  # mistakes in one message
Steps = tuple[str | int, ...]  # through a document: names and places in lists


class Mistake(NamedTuple):
    """What is wrong, or hardly meant, at a place of a document."""

    steps: Steps
    problem: str  # and what would be right
    line: int = 0  # from 1; 0: the line to which `steps` lead


class Mistakes(ValueError):
    """All that is wrong with a value, by its places. It raises itself with the first that is one too many to tell."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Mistake] = []

    def __str__(self) -> str:
        return "; ".join(mistake.problem for mistake in self.found)

    def note(self, steps: Steps, problem: object, line: int = 0) -> None:
        """Keep a mistake."""
        self.found.append(Mistake(steps, str(problem), line))
        if len(self.found) > MAX_TOLD:
            raise self

    @contextlib.contextmanager
    def at(self, *steps: str | int) -> Iterator[None]:
        """For `with`: note a ValueError at a place instead of raising it."""
        try:
            yield
        except Mistakes as error:
            if error is self:
                raise
            for mistake in error.found:
                self.note((*steps, *mistake.steps), mistake.problem)
        except ValueError as error:
            self.note(steps, error)

    def check(self) -> None:
        """Raise what was noted, if anything was."""
        if self.found:
            raise self


A_TEXT = "text (in quotes, where it looks like a number or a date)"
A_DATE = "a date such as 2027-01-31"
TYPE_WORDS: dict[Any, str] = {
    tuple: "a list such as [a, b]",
    dict: "a mapping such as {name: value}",
    str: A_TEXT,
    int: "a whole number such as 8",
    float: "a number such as 1.5",
    bool: "true or false",
}
VALUE_WORDS: dict[type, str] = {
    list: "a list",
    dict: "a mapping",
    types.NoneType: "nothing",
    FromEnvironment: "text from the environment",
}
MAX_SHOWN = 13  # characters of a value in a message: what is longer may be a secret
ODD_CHARACTER = re.compile(  # looks like one that means something to YAML: a blank, a quote, punctuation
    "[\u00a0\u1680\u2000-\u200d\u202f\u205f\u2060\u3000\ufeff“”„‟‘’‚‛«»：﹕，；]"
)


def describe(value: object) -> str:
    """Return what is in the file for a message: `a list`, `'http'`, `5`, `a value of 40 characters`."""
    text = str(value)
    if type(value) in VALUE_WORDS:
        return VALUE_WORDS[type(value)]
    if len(text) > MAX_SHOWN:
        return f"a value of {len(text):,} characters"
    if isinstance(value, str):
        return repr(value)
    return text.lower()  # as YAML has them: true, .inf


def odd_character(text: str) -> str:
    """Return what is to be told of the first odd character in a text, behind a semicolon; "" where there is none."""
    found = ODD_CHARACTER.search(text)
    if not found:
        return ""
    name = unicodedata.name(found[0]).lower()
    return f"; U+{ord(found[0]):04X} ({name}) means nothing to YAML: put the ASCII character in its place"


def unknown(what: str, name: str, known: Collection[str], there_are: str = "") -> ValueError:
    """Return the mistake that `name` is none of the `known` ones, with the one that is probably meant."""
    close = difflib.get_close_matches(name, known, 1)
    hint = f", did you mean {close[0]}?" if close else ""
    if ":" in name:
        hint = ", is a blank missing behind the colon?"
    return ValueError(
        f"unknown {what}{hint}{odd_character(name)} (there are: {there_are or ', '.join(known) or 'none'})"
    )


def bare_type(kind: Any) -> tuple[Any, str]:
    """Return `T` of `Annotated[T | None, …]`, and what YAML must have for it, with an example that works."""
    title = ""
    while get_origin(kind) is Annotated or types.NoneType in get_args(kind):
        title = title or next((meta.title for meta in getattr(kind, "__metadata__", ()) if meta.title), "")
        kind = next(each for each in get_args(kind) if each is not types.NoneType)
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        return kind, f"{', '.join(others)} or {last}"
    if hasattr(kind, "__struct_encode_fields__"):
        return kind, f"a mapping such as {{{kind.__struct_encode_fields__[0]}: …}}"
    return kind, title or TYPE_WORDS.get(get_origin(kind) or kind, "")


def decode(kind: Any, value: object) -> Any:
    """Make a value of a type that msgspec does not know. Raises ValueError."""
    return kind.parse(value)


def find_mistakes(value: object, kind: Any, mistakes: Mistakes, at: Steps) -> None:
    """Note why a value is not of a type, part by part."""
    try:
        msgspec.convert(value, kind, dec_hook=decode)
        return
    except msgspec.ValidationError as error:
        cause = error.__cause__  # what `parse` has raised
    kind, expected = bare_type(kind)
    origin, before = get_origin(kind) or kind, len(mistakes.found)
    if isinstance(value, list) and origin is tuple:
        for i, each in enumerate(value):
            find_mistakes(each, get_args(kind)[0], mistakes, (*at, i))
    elif isinstance(value, dict) and origin is dict:
        for name, each in value.items():
            find_mistakes(each, get_args(kind)[1], mistakes, (*at, name))
    elif isinstance(value, dict) and hasattr(kind, "__struct_fields__"):
        fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        for name, each in value.items():
            if name in fields:
                find_mistakes(each, fields[name].type, mistakes, (*at, name))
            else:
                mistakes.note((*at, name), unknown("setting", name, fields))
        if value.keys() <= fields.keys():  # else one that is missing may be the one that is misspelt
            for name, field in fields.items():
                if field.required and name not in value:
                    mistakes.note((*at, name), "is required, and missing")
        if len(mistakes.found) == before:
            mistakes.note(at, cause)  # what the settings mean together
    elif isinstance(cause, ValueError):
        with mistakes.at(*at):
            raise cause
    else:
        got = describe(value)
        if isinstance(value, str):
            if expected.startswith("a list"):  # not quoted: it may be a secret
                got = "text: put it in brackets, [text], or on a line of its own as `- text`"
            elif expected.startswith("a mapping"):  # neither: it may be `api_key:sk-ant-…`
                got = "text (is a colon missing, or the blank behind one?)"
            got += odd_character(value)
        mistakes.note(at, f"expected {expected}, got {got}")


def convert(value: object, kind: Any) -> Any:
    """Return a plain value as a type. Raises Mistakes."""
    try:
        return msgspec.convert(value, kind, dec_hook=decode)
    except msgspec.ValidationError:
        mistakes = Mistakes()
        find_mistakes(value, kind, mistakes, ())
        raise mistakes from None


# Types of settings. `parse` makes one of a plain value.

COUNT_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "万": 10**4, "亿": 10**8}
TIME_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE_UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}
A_DURATION = "a duration such as 30s (units: ms, s, m, h, d)"
LIMIT_AMOUNTS = {
    "usd": DOLLARS,
    "tokens": "a number of tokens such as 200k or 50M",
    "requests": "a number of requests such as 60",
    "concurrent": "a number of calls such as 16",
}
LIMIT_NAMES = {
    limit.name: limit
    for limit in (
        *(Limit(unit, window, 0) for unit in LIMIT_UNITS for window in WINDOWS.values()),
        Limit("concurrent", WINDOWS[""], 0),
    )
}
Name = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A(?!(?:sk-|AIza|AKIA|gsk_|enc:|sha256:)[\w+/=-]{16})\S(?:.*\S)?\Z",
        title=f"{A_TEXT} without white space around it, and no key: a name is shown to everybody",
    ),
]
Url = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A(?:https?://(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+)(?::[0-9]{1,5})?(?:/[!-\"$->@-~]*)?)?\Z",
        title="http:// or https:// and a host, without a user, a password, ? or #",
    ),
]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535, title="a whole number from 0 to 65535 such as 8000")]
Attempts = Annotated[int, msgspec.Meta(ge=1, le=20, title="a whole number from 1 to 20 such as 4")]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=1_000_000, title="a whole number from 1 to 1000000 such as 50")]
Policy = Literal["sticky", "round_robin", "least_busy"]


def parse_scaled(value: object, units: Mapping[str, float], expected: str) -> float:
    """Read a number with a unit: `50M`, `32MB`, `10s`. Raises ValueError that says what is expected."""
    found = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*(\D*)", str(value).strip().replace("_", ""), re.ASCII)
    if not found or found[2] not in units:
        raise ValueError(f"expected {expected}, got {describe(value)}")
    return float(found[1]) * units[found[2]]


class Size(int):
    """Bytes: `32MB`."""

    @classmethod
    def parse(cls, value: object) -> Size:
        return cls(parse_scaled(value, SIZE_UNITS, "a size such as 64MB (units: B, KB, MB, GB)"))


class Duration(float):
    """Seconds: `10s`, `6m`, `500ms`."""

    @classmethod
    def parse(cls, value: object) -> Duration:
        return cls(parse_scaled(value, TIME_UNITS, A_DURATION))


class Fsync(float):
    """Seconds between two fsyncs of the ledger: 0 for `always`, infinity for `never`."""

    @classmethod
    def parse(cls, value: object) -> Fsync:
        if value in ("always", "never"):
            return cls(0.0 if value == "always" else math.inf)
        return cls(parse_scaled(value, TIME_UNITS, f"always, never or {A_DURATION}"))


class Networks(tuple[Network, ...]):
    """Networks and single addresses: `[10.0.0.0/8, "::1"]`."""

    @classmethod
    def parse(cls, value: object) -> Networks:
        found, mistakes = [], Mistakes()
        for i, text in enumerate(convert(value, tuple[str, ...])):
            try:
                found.append(ipaddress.ip_network(text))
            except ValueError:
                what = "a network such as 10.0.0.0/8 (no bits set behind its mask) or an address"
                mistakes.note((i,), f"expected {what}, got {describe(text)}")
        mistakes.check()
        return cls(found)


def read_date(text: str) -> dt.date | None:
    """Read a date, or a date with a time; None where it is neither."""
    for read in (dt.date.fromisoformat, dt.datetime.fromisoformat):
        with contextlib.suppress(ValueError):
            return read(text)
    return None


class Expiry:
    """The end of a key: a moment, or the end of a day."""

    def __init__(self, value: dt.date) -> None:
        self._value = value  # a datetime is a date, too

    @classmethod
    def parse(cls, value: object) -> Expiry:
        if isinstance(value, str):  # in quotes, or without seconds: YAML has not read it
            value = read_date(value) or value
        if not isinstance(value, dt.date):
            raise ValueError(f"expected {A_DATE}, got {describe(value)}")
        return cls(value)

    @property
    def last_day(self) -> dt.date | None:
        """The day that a key works through; None where it ends at a moment."""
        return None if isinstance(self._value, dt.datetime) else self._value

    def at(self, timezone: dt.tzinfo) -> float:
        """Return seconds since 1970; what has no time zone of its own is in `timezone`."""
        value = self._value
        if value == dt.date.max:
            return math.inf
        if not isinstance(value, dt.datetime):
            value = dt.datetime.combine(value + dt.timedelta(days=1), dt.time())
        return (value if value.tzinfo else value.replace(tzinfo=timezone)).timestamp()


class Amount(int):
    """A count of tokens: `8192`, `200k`."""

    @classmethod
    def parse(cls, value: object) -> Amount:
        return cls(parse_scaled(value, COUNT_UNITS, LIMIT_AMOUNTS["tokens"]))


class LimitSet(tuple[Limit, ...]):
    """`<unit>/<window>: amount`, `<unit>: amount` for ever, and `concurrent: amount`."""

    @classmethod
    def parse(cls, value: object) -> LimitSet:
        limits, mistakes = [], Mistakes()
        for name, amount in convert(value, dict[str, Any]).items():
            with mistakes.at(name):
                if name not in LIMIT_NAMES:
                    raise unknown("limit", name, LIMIT_NAMES)
                limit = LIMIT_NAMES[name]
                number = parse_scaled(amount, COUNT_UNITS, LIMIT_AMOUNTS[limit.unit])
                limits.append(limit._replace(amount=number))
        mistakes.check()
        return cls(limits)

    def budget(self, scope: ScopeKind, name: str = "") -> Budget:
        """Return these limits as those of a key, a team or the gateway."""
        concurrent = next((limit.amount for limit in self if limit.unit == "concurrent"), math.inf)
        return Budget(scope, name, tuple(limit for limit in self if limit.unit != "concurrent"), concurrent)


class Prices(PriceTable):
    """The price table: rows of models, surcharges for all of them, and `unknown`."""

    @classmethod
    def parse(cls, value: object) -> Prices:
        rows, surcharges, mistakes = dict[str, ModelPrice](), dict[str, float](), Mistakes()
        unpriced: Unknown = ""
        for name, price in convert(value, dict[str, Any]).items():
            with mistakes.at(name):
                if name == "unknown":
                    unpriced = convert(price, Literal["refuse", "dearest"])
                elif name in SURCHARGE_NAMES:
                    surcharges[name] = convert(price, Dollars if name in EXTRAS else Premium)
                else:
                    rows[name] = convert(price, PriceConfig).flat()
        mistakes.check()
        if value and not rows:
            rows = BUILT_IN_PRICES
        if "*" not in rows and not unpriced:
            raise ValueError(
                '"*" is missing: rows replace the whole built-in table, and no model is free; add `"*": {input: …, '
                "output: …}`, or `unknown: dearest` or `refuse`"
            )
        return cls(rows, surcharges, unpriced)


class Secrets(tuple[Secret, ...]):
    """The API keys of an upstream: one, or a list of them."""

    @classmethod
    def parse(cls, value: object) -> Secrets:
        if isinstance(value, list):
            return cls(filter(None, convert(value, tuple[Secret, ...])))
        return cls(filter(None, [Secret.parse(value)]))


class UserKey(Secret):
    """A user's key: `sha256:…` or in clear text."""

    digest = b""
    last4 = ""

    @classmethod
    def parse(cls, value: object) -> UserKey:
        key = super().parse(value)
        sealed = SEALED_KEY.fullmatch(key)
        if sealed:
            key.digest, key.last4 = bytes.fromhex(sealed[1]), sealed[2] or ""
            return key
        check_pasted(key)
        if key.lower().startswith(("sha256:", "enc:")):
            raise ValueError("expected sha256: and 64 hex digits, or a plain sk-proxy-… key")
        if len(key) < 20:
            raise ValueError(f"too short to be safe (20 characters); `{PROGRAM} key add` makes one")
        key.digest, key.last4 = hashlib.sha256(key.encode()).digest(), key[-4:]
        return key


class ModelNames(dict[str, str]):
    """Globs of models to the upstream's names for them; `*` is the name itself. A list renames nothing."""

    @classmethod
    def parse(cls, value: object) -> ModelNames:
        if isinstance(value, list):
            return cls(dict.fromkeys(convert(value, tuple[str, ...]), "*"))
        return cls(convert(value, dict[str, str]))


class Policies(tuple[tuple[str, Policy], ...]):
    """How upstreams are chosen, by glob of the model; the first match counts. One policy alone is for all."""

    @classmethod
    def parse(cls, value: object) -> Policies:
        if isinstance(value, dict):
            return cls(convert(value, dict[str, Policy]).items())
        return cls([("*", convert(value, Policy))])

    def of(self, model: str) -> Policy:
        """Return the policy for a model."""
        return next((policy for pattern, policy in self if matches(pattern, model)), "sticky")


# --- 5. Settings: every setting as a typed field ----------------------------------
# Offers: ConfigFile, FRAMING, HeaderRules, is_withheld, NO_RULES, REFUSED_KEY, Serving, UNREACHED, UpstreamConfig,
#   UsageConfig, VerdictConfig, VERDICTS, Weights

# The settings

LOOPBACK = Networks(ipaddress.ip_network(text) for text in ("127.0.0.0/8", "::1/128"))
FRAMING = frozenset(("connection", "content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade"))


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings below one name of config.yaml."""


def about(text: str) -> msgspec.Meta:
    """Return what describes a setting."""
    return msgspec.Meta(description=text)


class ServerConfig(Setting, frozen=True):
    """Where the gateway listens and what it accepts."""

    host: Annotated[str, about("0.0.0.0 to be reached from other hosts; put TLS in front then")] = "127.0.0.1"
    port: Annotated[Port, about("0: any that is free")] = 8000
    url: Annotated[Url, about("where clients find it, for the lines that are shown for Claude Code")] = ""
    timezone: Annotated[str, about("days and months of reports and of `expires` turn over here")] = "UTC"
    trusted_proxies: Annotated[Networks, about("whose X-Forwarded-For is believed")] = Networks()
    metrics_from: Annotated[Networks, about("who may read GET /metrics")] = LOOPBACK
    max_body: Annotated[Size, about("of a request; the Anthropic API takes 32 MB")] = Size(32 * 2**20)
    memory: Annotated[Size | None, about("for the bodies of all requests together")] = None
    drain: Annotated[Duration, about("how long running answers may finish after SIGTERM")] = Duration(600)
    contact: Annotated[str, about("whom to ask, told to those whom a limit refuses")] = ""


class Timeouts(Setting, frozen=True):
    """Bounds of an attempt."""

    connect: Annotated[Duration, about("name, TCP and TLS")] = Duration(10)
    first_byte: Annotated[Duration, about("silence before the first content of an answer")] = Duration(360)
    idle: Annotated[Duration, about("silence within an answer")] = Duration(300)


Blame = Literal["none", "key", "upstream"]


class Verdict(NamedTuple):
    """What a failed attempt means: for the call, for who failed it, and for the client if nobody does better."""

    meaning: str
    try_next: bool  # is another upstream or key asked?
    blame: Blame  # who is left alone for it: this API key, or the whole upstream?
    cooldown_s: float = 0.0  # at once, for so long; 0: only after `breaker.failures` of them in a row
    passes: bool = False  # may the upstream's own answer be the client's?


# The answer's status (of an error event, that of its type), or how an attempt failed without one.
VERDICTS = {
    "own_trouble": Verdict("the gateway lacks descriptors, ports or memory: 503 with `retry-after`", True, "none"),
    "unreachable": Verdict("no address, refused, TLS failed", True, "upstream"),
    "connect_timeout": Verdict("not connected within `timeouts.connect`", True, "upstream"),
    "first_byte_timeout": Verdict("no content within `timeouts.first_byte` (or `routing.patience`)", True, "upstream"),
    "cut": Verdict("the answer ended before its first content", True, "upstream"),
    "not_http": Verdict("what came is not HTTP", True, "upstream"),
    "unexpected": Verdict("HTML, a redirect, an empty answer", True, "upstream"),
    "unmetered": Verdict("compressed, or of a status like 201: paid for, but not to be read", False, "upstream"),
    "mid_stream": Verdict("the answer broke off after its first content", False, "upstream"),
    "401": Verdict("the upstream refuses our API key: left alone when sure, an error in the log", True, "key", 1800.0),
    "402": Verdict("its account has no credit (or a 400 that begins so): left alone when sure", True, "key", 1800.0),
    "403": Verdict("our API key may not do this: left alone when sure", True, "key", 1800.0),
    "404": Verdict("the model is not known there, or not to our project", True, "none", passes=True),
    "408": Verdict("the upstream gave up waiting", True, "upstream", passes=True),
    "429": Verdict("too much for this key and model: as long as headers say, at most 30 m", True, "key", 10.0, True),
    "4xx": Verdict("the request itself is wrong: 400, 413, 422 and all others", False, "none", passes=True),
    "5xx": Verdict("broken or overloaded: 500, 502, 503, 529 and all others", True, "upstream", passes=True),
}
REFUSED_KEY = ("401", "402", "403")  # what waits for a person, and must be sure (`Upstreams._blame`)
UNREACHED = ("unreachable", "connect_timeout", "not_http")  # no request of a client's can bring these about


class VerdictConfig(Setting, frozen=True):
    """What one upstream has different from a row of VERDICTS. The README's table describes the settings."""

    try_next: bool | None = msgspec.field(default=None, name="next")
    blame: Blame | None = None
    cooldown_s: Duration | None = msgspec.field(default=None, name="cooldown")
    passes: bool | None = msgspec.field(default=None, name="pass")

    def over(self, verdict: Verdict) -> Verdict:
        """Return `verdict` with the configured fields replaced."""
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return verdict._replace(**given)


# What no client's header of such a name does upstream, even where `headers.pass` names it: it frames this hop, it is
# a credential (see SECRET_HEADER as well), it chooses an account or a project of ours, or it says who the client is.
WITHHELD = FRAMING | {
    *("host", "accept-encoding", "keep-alive", "cookie", "set-cookie", "forwarded", "via", "x-real-ip", "client-ip"),
    *("x-client-ip", "x-cluster-client-ip", "true-client-ip", "do-connecting-ip", "remote-addr", "x-remote-ip"),
    *("x-remote-addr", "x-originating-ip", "x-original-host", "x-envoy-external-address"),
}
WITHHELD_STARTS = (
    *("proxy-", "x-forwarded", "x-original-forwarded", "cf-", "cloudfront-", "fastly-", "fly-", "akamai-", "x-vercel-"),
    *("x-azure-", "x-appengine-", "x-goog-", "x-amz", "openai-organization", "openai-project", "chatgpt-account"),
    *("anthropic-organization", "anthropic-workspace", "x-ms-client-principal"),
)


def is_withheld(name: str) -> bool:
    """Return whether a client's header, its name in lower case, must not go upstream whatever the config says."""
    return name in WITHHELD or name.startswith(WITHHELD_STARTS) or SECRET_HEADER.search(name) is not None


class HeaderRules(Setting, frozen=True):
    """Headers of requests to an upstream. Names in any case; those of `pass` may be globs."""

    set: Annotated[dict[str, Secret], about("a value may be ${NAME}")] = {}
    remove: Annotated[tuple[str, ...], about("such as [x-app]")] = ()
    passes: Annotated[tuple[str, ...], about("clients' headers that go there")] = msgspec.field(default=(), name="pass")


class BetaRules(Setting, frozen=True):
    """Which values of `anthropic-beta` do not go to an upstream; globs."""

    drop: Annotated[tuple[str, ...], about("values of `anthropic-beta` that it rejects, globs")] = ()


NO_RULES = HeaderRules()


class UpstreamConfig(Setting, frozen=True, eq=False):
    """One provider endpoint."""

    name: Annotated[Name, about("required; stands in the ledger")]
    url: Annotated[Url, about("required for a real upstream; may have a path")] = ""
    api_key: Annotated[Secrets, about("or the key itself, which `gateway.py seal` turns into enc:...")] = Secrets()
    format: Annotated[
        Literal["anthropic", "openai", "demo"],
        about("anthropic (default) | openai | demo, which is built in and needs no url"),
    ] = "anthropic"
    models: Annotated[ModelNames, about("which models it serves, and as what it knows them")] = ModelNames({"*": "*"})
    priority: Annotated[int, about("the lowest that is ready is asked; equals share")] = 1
    weight: Annotated[Factor, about("how many of the sessions are at home here; 0: only what no other can take")] = 1.0
    max_concurrent: Annotated[AtLeastOne | None, about("calls at once for each API key")] = None
    max_connections: Annotated[AtLeastOne, about("in all")] = 4096
    timeouts: Annotated[Timeouts, about("of one attempt")] = Timeouts()
    on_disconnect: Annotated[
        Literal["auto", "cancel", "drain"],
        about("when the client goes away: cancel at once, or drain the answer for the ledger"),
    ] = "auto"
    verdicts: Annotated[dict[str, VerdictConfig], about("what failures mean")] = {}
    headers: Annotated[HeaderRules, about("of requests to it")] = NO_RULES
    betas: Annotated[BetaRules, about("values of `anthropic-beta` that it rejects")] = BetaRules()
    retry_without_thinking: Annotated[bool, about("once, when it does not know the signature")] = False
    include_usage: Annotated[bool, about("ask for the usage of chat streams (format openai)")] = True
    allow_private: Annotated[bool, about("connect also to link-local and metadata addresses (169.254.169.254)")] = False
    ca_file: Annotated[str | None, about("another certificate authority than the system's, a PEM file")] = None
    proxy: Annotated[Secret | None, about("http://user:password@host:port, used with CONNECT")] = None

    def serves(self, route: Route) -> bool:
        """Return whether this upstream speaks the format of a route."""
        if self.format == "demo":
            return route.kind in ("messages", "count_tokens")
        return self.format == route.api

    def rename(self, model: str) -> str | None:
        """Return the upstream's name for `model`; None: not served. No model at all must be named: `"": "*"`."""
        if not model:
            return "" if "" in self.models else None
        for pattern, name in self.models.items():
            if matches(pattern, model):
                return model if name == "*" else name
        return None

    def named_models(self) -> list[str]:
        """Return those of `models` that are names, not globs."""
        return [name for name in self.models if name and not re.search(r"[*?\[]", name)]

    def verdict(self, case: str) -> Verdict:
        """Return what a case of VERDICTS means here; a status is looked for as itself, then as 4xx or 5xx."""
        row = next((name for name in (case, f"{case[0]}xx") if name in VERDICTS), "unexpected")
        verdict = VERDICTS[row]
        for name in dict.fromkeys((row, case)):
            if name in self.verdicts:
                verdict = self.verdicts[name].over(verdict)
        return verdict


class Serving(NamedTuple):
    """An upstream, and under which name it knows the model that is asked for."""

    upstream: UpstreamConfig
    model: str


class KeyConfig(Setting, frozen=True):
    """A user's key as the file has it."""

    name: Annotated[Name, about("required; stands in the ledger and in the log")]
    key: Annotated[UserKey, about("`gateway.py key add NAME` makes a key and keeps only its hash")]
    team: Annotated[str, about("one of `teams`, whose limits hold as well; default: none")] = ""
    limits: Annotated[LimitSet | None, about("units tokens, usd, requests; windows minute, hour, 5h, day")] = None
    models: Annotated[tuple[str, ...], about("globs of the models it may ask for")] = ("*",)
    expires: Annotated[Expiry | None, about("works to the end of this day; or a date with a time")] = None
    allow_ips: Annotated[Networks, about("such as [10.0.0.0/8]; empty: from anywhere")] = Networks()
    enabled: Annotated[bool, about("false: its calls are refused")] = True


class Defaults(Setting, frozen=True):
    """What keys have that do not say."""

    limits: Annotated[LimitSet, about("for keys that do not say")] = LimitSet()


class TeamConfig(Setting, frozen=True):
    """Limits that several keys share."""

    name: Annotated[Name, about("required; stands in the ledger")]
    limits: Annotated[LimitSet, about("keys that share limits")] = LimitSet()


class Weights(Setting, frozen=True):
    """How much a token of each class counts in limits of tokens."""

    input: Factor = 1.0
    output: Factor = 1.0
    cache_write: Factor = 1.0
    cache_read: Factor = 0.1

    def weigh(self, tokens: Tokens) -> int:
        """What counts of these tokens in limits of tokens."""
        weighted = tokens.input_tokens * self.input + tokens.output_tokens * self.output
        weighted += (tokens.cache_write_5m_tokens + tokens.cache_write_1h_tokens) * self.cache_write
        return round(weighted + tokens.cache_read_tokens * self.cache_read)


class LimitsConfig(Setting, frozen=True):
    """Limits of the whole gateway, and how all limits work."""

    gateway: Annotated[LimitSet, about("of all keys together")] = LimitSet()
    reserve_output: Annotated[Amount, about("tokens of output held for a running call")] = Amount(8192)
    queue: Annotated[Duration, about("how long a call may wait")] = Duration(10)
    weights: Annotated[Weights, about("how much a token of each kind counts in limits of tokens")] = Weights()


class BreakerConfig(Setting, frozen=True):
    """When an upstream has a cooldown."""

    failures: Annotated[AtLeastOne, about("in a row, then an upstream is left alone …")] = 3
    cooldown: Annotated[Duration, about("… for so long, twice as long each time …")] = Duration(10)
    max_cooldown: Annotated[Duration, about("… and at most so long")] = Duration(600)


class RoutingConfig(Setting, frozen=True):
    """How calls find their upstream, and how long they look."""

    policy: Annotated[Policies, about("by glob of the model")] = Policies()
    max_attempts: Annotated[Attempts, about("of one call, over all upstreams")] = 4
    deadline: Annotated[Duration, about("for the first content, over all attempts")] = Duration(600)
    patience: Annotated[Duration, about("with a stream that has not begun")] = Duration(120)
    wait: Annotated[Duration, about("for one to be ready again, where none is")] = Duration(30)
    breaker: Annotated[BreakerConfig, about("when an upstream is left alone")] = BreakerConfig()


class UsageConfig(Setting, frozen=True):
    """Where the ledger lies and how soon it is on the disk."""

    directory: Annotated[str, about("of usage-YYYY-MM.jsonl, one line per call")] = "usage"
    fsync: Annotated[Fsync, about("always | never | a time: how soon a line is safe from a power cut")] = Fsync(1)


class ConfigFile(Setting, frozen=True):
    """config.yaml, typed. Every setting that this version serves, and no other."""

    upstreams: Annotated[tuple[UpstreamConfig, ...], about("who can be asked")]
    server: ServerConfig = ServerConfig()
    keys: tuple[KeyConfig, ...] = ()
    teams: Annotated[tuple[TeamConfig, ...], about("keys that share limits")] = ()
    defaults: Annotated[Defaults, about("for keys that do not say")] = Defaults()
    limits: LimitsConfig = LimitsConfig()
    routing: RoutingConfig = RoutingConfig()
    prices: Annotated[Prices, about("USD per million tokens")] = Prices(BUILT_IN_PRICES)
    usage: UsageConfig = UsageConfig()


# --- 6. Config: YAML to a checked, frozen snapshot --------------------------------
# Offers: available_memory, Config, config_digest, ConfigError, Document, is_mounted, join_steps, ledger_of,
#   read_text, TEXT_LOADER, time_zone_of

# A text becomes a snapshot in four steps. Each tells all the mistakes it finds, at most MAX_TOLD, with file, line, path
# and what would be right; the next step begins only where there were none.
#
#   step        makes                    of                 and finds, for example
#   NodeLoader  YAML's nodes             the text           a tab in the indent, a quote that is not closed
#   Reader      dicts, lists, scalars    nodes              a setting given twice, a variable that is not set
#   convert     ConfigFile               dicts and so on    an unknown setting, `port: http`
#   Builder     upstreams and keys       ConfigFile         a name taken twice, a seal that cannot be opened
#
# `server: {prot: 1}` in line 2 passes the first two. msgspec refuses it and names the first mistake alone, so
# `find_mistakes` walks value and types side by side and notes a Mistake at ("server", "prot"). A plain value does not
# know its line: Document.locate finds it in the nodes, which edits work on as well.
#
# Messages go into logs and onto screens that others see, and anything in the file may be a secret in the wrong place.
# So they quote values of at most MAX_SHOWN characters, none that the environment gave, and mask names.


class ConfigError(Exception):
    """config.yaml cannot be used; the message names file, line, path and what would be right."""

    without_revoked: Config | None = None  # the last good snapshot without the keys that the file disables all the same


# YAML to plain values

# Every scalar as its text, whatever its tag: what an edit leaves alone need not be right.
TEXT_LOADER = yaml.CBaseLoader
MAX_NESTING = 20  # of a document; a mapping of scalars is 1 deep
SLIPS = (  # what is no mistake in a value, but hardly meant
    (
        re.compile(r"^\$\w+$|\$[A-Z][A-Z0-9_]+\b"),
        "$NAME is taken as it stands: only ${NAME}, in braces, comes from the environment",
    ),
    (re.compile("^[“”„‘‚«]|[“”»]$"), "typographic quotes belong to the value: YAML's own are \" and '"),
)


class NodeLoader(yaml.composer.Composer, yaml.CSafeLoader):
    """Makes nodes of libyaml's events. Its own composer would overflow the stack, and let no stream go on meanwhile."""

    def __init__(self, text: str) -> None:
        yaml.CSafeLoader.__init__(self, text)
        yaml.composer.Composer.__init__(self)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node. Raises YAMLError."""
        self._depth += 1
        if self._depth > MAX_NESTING:
            event: Any = self.peek_event()
            raise yaml.MarkedYAMLError(problem="nested too deep", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def line_of(node: yaml.Node) -> int:
    """Return the line, from 1, in which a node begins."""
    return int(node.start_mark.line) + 1


class Reader:
    """Makes dicts, lists and scalars of YAML's nodes, with `${NAME}` and `${NAME:-default}` filled in."""

    MAX_VALUES = 200_000  # with those that aliases repeat
    MAX_NUMBER = 64  # characters of a number or a date; what is longer is text

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._count = 0
        self._scalars: Any = yaml.SafeLoader("")
        self._values: dict[yaml.ScalarNode, Any] = {}  # aliases come back to a node
        self.mistakes = Mistakes()
        self.warnings: list[Mistake] = []

    def read(self, node: yaml.Node, at: Steps) -> Any:
        """Return the value of a node. What is wrong with it is noted; raises Mistakes where that is too much."""
        self._count += 1
        if self._count > self.MAX_VALUES:
            self.mistakes.note(
                (), f"more than {self.MAX_VALUES:,} values, with those that aliases repeat", line_of(node)
            )
            raise self.mistakes
        if len(at) > MAX_NESTING:
            return self.mistakes.note(at[:1], "nested too deep: an alias of what it is a part of?")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(each, (*at, i)) for i, each in enumerate(node.value)]
        scalar = cast(yaml.ScalarNode, node)
        if scalar not in self._values:
            with self.mistakes.at(*at):
                self._values[scalar] = self._scalar(scalar)
        for slip, told in SLIPS:
            if slip.search(scalar.value):
                self.warnings.append(Mistake(at, told, line_of(node)))
        return self._values.get(scalar)

    def _mapping(self, node: yaml.MappingNode, at: Steps) -> dict[str, Any]:
        out: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value in node.value:
            name, line = name_node.value, line_of(name_node)
            if not isinstance(name_node, yaml.ScalarNode) or name == "<<":
                self.mistakes.note(at, "expected a plain name", line)
            elif name in out:
                self.mistakes.note((*at, name), f"given twice, first in line {lines[name]}", line)
            else:
                lines[name] = line
                out[name] = self.read(value, (*at, name))
        return out

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        """Raises ValueError."""
        if "${" not in node.value:
            return self._construct(node.value, node.tag)
        text = self._fill(node.value)
        value = self._construct(text, self._scalars.resolve(yaml.ScalarNode, text, (not node.style, True)))
        return FromEnvironment(value) if isinstance(value, str) else value

    def _construct(self, text: str, tag: str) -> Any:
        is_base_60 = ":" in text and tag.endswith((":int", ":float"))  # 1:30 is 90 in YAML 1.1
        if is_base_60 or len(text) > self.MAX_NUMBER or text in ("<<", "=") or tag.endswith(":str"):
            return text
        try:
            return self._scalars.construct_document(yaml.ScalarNode(tag, text))
        except yaml.YAMLError:
            raise ValueError("text that begins with ! must be in quotes") from None
        except (ValueError, ArithmeticError, AttributeError, LookupError):  # 2027-02-30, !!int x
            expected = "what YAML can read, or text in quotes"
            if tag.endswith("timestamp"):
                expected = A_DATE
            raise ValueError(f"expected {expected}, got {describe(text)}") from None

    def _fill(self, text: str) -> str:
        def fill(found: re.Match[str]) -> str:
            value = self._environ.get(found[1]) or found[2]
            if value is None:
                raise ValueError(f"the environment has no {found[1]} (a default: ${{{found[1]}:-…}})")
            return value

        pattern = r"\$\{(\w+)(?::-([^}]*))?\}"
        if "${" in re.sub(pattern, "", text):
            raise ValueError("expected ${NAME} or ${NAME:-default}")
        return re.sub(pattern, fill, text)


# What may be shown

MIXED = (
    r"(?=[a-zA-Z]*\d|[0-9a-zA-Z]*[a-z][A-Z])(?=\d*[a-zA-Z])[0-9a-zA-Z]{8,}"  # letters among digits, or of both cases
)
SECRET_TEXT = re.compile(rf"""(?:sk-|{MIXED})[^\s,\]}}"']*|[^/@\s]{{3,}}(?=@)""")  # a key, or a password in a URL
SECRET_SETTING = re.compile(  # what follows the name of a setting that has a secret in it
    r"(?<=key|ret|ken|uth|oxy|ord|ass)([\w-]*[\"']?(?:\s*[:=]\s*|\s+))(\S.*)", re.IGNORECASE
)


def mask(text: str) -> str:
    """Return a name of the config with a * for each character of what may be a secret."""
    text = SECRET_SETTING.sub(lambda found: found[1] + "*" * len(found[2]), text)
    return SECRET_TEXT.sub(lambda found: "*" * len(found[0]), text)


LONG_WORD = re.compile(rf"\S{{{MAX_SHOWN + 1},}}")  # may be a secret of letters alone, in any place


def join_steps(steps: Sequence[str | int]) -> str:
    """("keys", 0, "name") makes `keys[0].name`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def quote_lines(lines: Sequence[str], row: int, column: int) -> str:
    """Return a line of the config and the one above it for a message, without secrets, with a caret under a column."""
    masked_from = max(0, column - 500)  # to mask takes long in a long line
    shown_from = max(0, column - 60)
    shown = []
    for line in lines[max(0, row - 1) : row + 1]:
        part = LONG_WORD.sub(lambda found: "*" * len(found[0]), mask(line[masked_from : masked_from + 1000]))
        part = part[shown_from - masked_from :][:100]
        shown.append(printable(re.sub(r"[^\S ]", "·", part.replace("\t", "→"))))
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in shown[-1][: column - shown_from])
    return "".join(f"\n    {line}" for line in [*shown, " " * (column - shown_from + wide) + "^"])


YAML_CAUSES = {  # what PyYAML says, in part, and the likely cause, which is told in its place
    "cannot start": "text that begins with @, ` or % must be in quotes",
    "alphabetic|undefined alias": 'text that begins with * or & must be in quotes, such as "*"',
    "end of stream": "a quote is not closed",
    "',' or": "a bracket is not closed, a comma is missing, or text with `: ` in it needs quotes",
    "expected ':'": "a colon is missing, or the blank behind it",
    "mapping values": "text with a colon and a blank in it must be in quotes; or the line above lacks its colon or the "
    "blank behind it, or has its value already",
    "expected (key|'-'|<doc)": "its indent fits none above (settings of one mapping, and items of one list, begin in "
    "the same column), or text follows a closing quote or bracket",
}


def explain_syntax(text: str, error: yaml.YAMLError) -> Mistake:
    """Return the line of a document that is no YAML, why, and that line with a caret."""
    problem, row, column = str(error), 0, 0
    if isinstance(error, yaml.MarkedYAMLError):
        context, mark, start = error.context or "", error.problem_mark, error.context_mark
        problem = f"{context} {error.problem}".strip()
        if start and mark and start.line < mark.line and re.search("quoted|flow|simple key", context):
            mark = start  # it is found out late
        if mark:
            row, column = mark.line, mark.column
    elif isinstance(error, yaml.reader.ReaderError):
        problem = error.reason
        row = text.encode().count(b"\n", 0, error.position)
    lines = [*text.splitlines(), ""]
    row = min(row, len(lines) - 1)
    line = lines[row]
    told = next((cause for part, cause in YAML_CAUSES.items() if re.search(part, problem)), mask(problem))
    if re.match(" *\t", line):
        told = "a tab in the indent: put blanks in its place"
    where = f" (column {column + 1}){quote_lines(lines, row, column)}"
    return Mistake((), f"not YAML: {told}{odd_character(line)}{where}", row + 1)


class Document:
    """The text of a config.yaml: plain values to read; and its YAML nodes, places to name and to edit."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path = text, path
        self.warnings: list[Mistake] = []

    @functools.cached_property
    def root(self) -> yaml.MappingNode:
        """The tree of nodes. Raises ConfigError."""
        try:
            root = NodeLoader(self.text).get_single_node()
        except yaml.YAMLError as error:
            raise self.error([explain_syntax(self.text, error)]) from None
        if not isinstance(root, yaml.MappingNode):
            raise self.error([Mistake((), "expected a mapping such as `upstreams: …`", 1)])
        return root

    def plain(self, environ: Mapping[str, str]) -> dict[str, Any]:
        """Return the document as dicts, lists and scalars. Raises ConfigError."""
        reader = Reader(environ)
        with contextlib.suppress(Mistakes):
            plain = reader.read(self.root, ())
        if reader.mistakes.found:
            raise self.error(reader.mistakes.found)
        self.warnings += reader.warnings
        return cast(dict[str, Any], plain)

    def typed(self, environ: Mapping[str, str]) -> ConfigFile:
        """Return the document with its settings checked one by one. Raises ConfigError."""
        # A section whose settings are all commented out is null: its defaults hold.
        optional = set(ConfigFile.__struct_fields__) - {"upstreams"}
        plain = {
            name: value for name, value in self.plain(environ).items() if value is not None or name not in optional
        }
        try:
            return cast(ConfigFile, convert(plain, ConfigFile))
        except Mistakes as mistakes:
            raise self.error(mistakes.found) from None

    def _walk(self, steps: Steps) -> Iterator[tuple[int, yaml.Node]]:
        """Yield line (from 1) and node of the root and of each step that exists; a setting's line is its name's."""
        line, node = 1, cast(yaml.Node, self.root)
        yield line, node
        for step in steps:
            if isinstance(node, yaml.MappingNode):
                pair = next(((key, value) for key, value in node.value if key.value == step), None)
                if pair is None:
                    return
                line, node = line_of(pair[0]), pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = line_of(node)
            else:
                return
            yield line, node

    def find(self, *steps: str | int) -> yaml.Node | None:
        """Return the node at a path such as ("keys", 0, "name"), or None."""
        nodes = [node for _, node in self._walk(steps)]
        return nodes[-1] if len(nodes) > len(steps) else None

    def locate(self, steps: Steps) -> int:
        """Return the line of the last step of a path that exists."""
        return [line for line, _ in self._walk(steps)][-1]

    def problem(self, steps: Steps, problem: str) -> ConfigError:
        """Return a ConfigError at a path."""
        return self.error([Mistake(steps, problem)])

    def error(self, mistakes: Sequence[Mistake]) -> ConfigError:
        """Return a ConfigError of mistakes, in the order of their lines."""
        sentences = [f"{self.path}:{sentence}" for sentence in self.sentences(mistakes[:MAX_TOLD])]
        if len(mistakes) > MAX_TOLD:
            sentences.append("and more")
        return ConfigError("\n".join(sentences))

    def sentences(self, mistakes: Iterable[Mistake]) -> list[str]:
        """Return `LINE: PATH: PROBLEM` of each, in the order of their lines."""
        located = [mistake._replace(line=mistake.line or self.locate(mistake.steps)) for mistake in mistakes]
        sentences = []
        for steps, problem, line in sorted(located, key=lambda mistake: mistake.line):
            path = printable(mask(join_steps(steps)[:200])) + ": " if steps else ""
            sentences.append(f"{line}: {path}{problem}")
        return sentences


# What types cannot check

PLACEHOLDER = re.compile(  # in a key or a URL
    r"\.\.\.|\*{4,}|<[^<>]*>|\{[^{}]*\}|placeholder|(change|replace)[-_]?me"
    r"|(?<![a-z0-9])(your(api)?(key|token|secret)?|x{4,})(?![a-z0-9])",
    re.IGNORECASE,
)
UNMATCHED = {  # in a glob; the first that is found is told
    r"\[1m\]$": "[1m] is one letter in a glob, 1 or m: for the name itself write [[]1m]",
    r"^[^\[]*(\[!?+\]?+[^\]]*\][^\[]*)*\[(?!!?+\]?+[^\]]*\])": "matches nothing: a bracket in it is not closed",
    r"[\s,]": "matches nothing: no name has a blank or comma in it; several globs are a list",
    "[\"'`]": "matches nothing: no name has quotes in it",
}


@functools.lru_cache(maxsize=1024)
def why_unmatched(glob: str) -> str:
    """Return why a glob can match no model, "" where it can."""
    return next((why for pattern, why in UNMATCHED.items() if re.search(pattern, glob)), "")


def globs_of(file: ConfigFile) -> Iterator[tuple[Steps, str]]:
    """Yield every glob of models, and where it is."""
    yield from ((("routing", "policy", glob), glob) for glob, _ in file.routing.policy)
    yield from ((("prices", glob), glob) for glob in file.prices.rows)
    for i, upstream in enumerate(file.upstreams):
        yield from ((("upstreams", i, "models", glob), glob) for glob in upstream.models)
        yield from ((("upstreams", i, "betas", "drop", j), glob) for j, glob in enumerate(upstream.betas.drop))
    for i, key in enumerate(file.keys):
        yield from ((("keys", i, "models", j), glob) for j, glob in enumerate(key.models))


HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"


def check_url(url: str, schemes: str) -> str:
    """Return the host of a URL. Raises ValueError, without the URL, where it cannot be asked."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.hostname and parts.scheme in schemes.split() and parts.port != 0 and re.fullmatch("[!-~]+", url):
            return parts.hostname
    except ValueError:  # of a port that is none
        pass
    raise ValueError(f"expected {' or '.join(f'{scheme}://' for scheme in schemes.split())} and a host")


def check_header_value(value: str) -> None:
    """Raise ValueError where a value cannot be sent."""
    if not value.isascii() or not value.isprintable():
        raise ValueError("expected printable ASCII")


def time_zone(name: str) -> dt.tzinfo:
    """Return a time zone of the tz database. Raises ValueError."""
    if name == "UTC":
        return dt.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"expected a time zone such as Europe/Berlin, got {describe(name)}") from None


class Builder:
    """Makes upstreams and keys of what the file says: opens seals, and checks what one value alone does not tell."""

    def __init__(self, document: Document, file: ConfigFile, vault: Vault) -> None:
        self._document, self._file, self._vault = document, file, vault
        self._mistakes = Mistakes()
        self.warnings = document.warnings
        self.has_plain = False  # a secret in clear text

    def build(self) -> tuple[dt.tzinfo, tuple[UpstreamConfig, ...], KeyRing]:
        """Return the time zone, the upstreams with their keys open, and the users' keys. Raises ConfigError."""
        timezone: dt.tzinfo = dt.UTC
        with contextlib.suppress(Mistakes):
            with self._mistakes.at("server", "timezone"):
                timezone = time_zone(self._file.server.timezone)
            for steps, glob in globs_of(self._file):
                why = why_unmatched(glob)
                if why:
                    self._warn(steps, why)
            upstreams = self._upstreams()
            keys = KeyRing(self._keys(timezone))
        if self._mistakes.found:
            raise self._document.error(self._mistakes.found)
        return timezone, upstreams, keys

    def _upstreams(self) -> tuple[UpstreamConfig, ...]:
        breaker, names = self._file.routing.breaker, set[str]()
        if not self._file.upstreams:
            self._mistakes.note(("upstreams",), "at least one upstream is needed")
        if breaker.max_cooldown < breaker.cooldown:
            problem = "expected at least the cooldown, which is the first of them"
            self._mistakes.note(("routing", "breaker", "max_cooldown"), problem)
        if self._file.server.memory == 0:
            self._mistakes.note(("server", "memory"), "expected a size such as 256MB, in which all bodies have room")
        return tuple(self._upstream(("upstreams", i), each, names) for i, each in enumerate(self._file.upstreams))

    def _upstream(self, at: Steps, upstream: UpstreamConfig, names: set[str]) -> UpstreamConfig:
        self._take((*at, "name"), upstream.name, names)
        if upstream.format != "demo":
            with self._mistakes.at(*at, "url"):
                host = check_url(upstream.url, "http https")
                if not upstream.allow_private and is_forbidden(host):  # a name's address is looked at when connecting
                    raise ValueError("is a link-local or metadata address; see allow_private")
        if PLACEHOLDER.search(upstream.url):
            self._warn((*at, "url"), "looks like a placeholder: put the real one in its place")
        self._check_verdicts((*at, "verdicts"), upstream.verdicts)
        ca_file = upstream.ca_file and str(self._document.path.parent / upstream.ca_file)
        if ca_file and upstream.url.startswith("https:") and not Path(ca_file).is_file():
            self._mistakes.note((*at, "ca_file"), "no such file, seen from the folder of the config")
        keys, steps = [], (*at, "api_key")
        for i, written in enumerate(upstream.api_key):
            keys.append(self._open((*steps, i) if len(upstream.api_key) > 1 else steps, written, check_pasted))
        if len(set(keys)) < len(keys) and all(keys):
            self._mistakes.note(steps, "the same key stands here twice")
        has_key = keys or any(map(SECRET_HEADER.search, upstream.headers.set))
        if upstream.url.startswith("https:") and not has_key:
            self._warn(steps, "there is none: add `api_key: ${NAME}`, or the key itself, and `seal`")
        if not upstream.models:
            self._warn((*at, "models"), 'no model is served: name some, or "*"')
        proxy = upstream.proxy
        if proxy:
            check = functools.partial(check_url, schemes="http")
            proxy = self._open((*at, "proxy"), proxy, check, is_secret="@" in proxy)
        headers = self._headers((*at, "headers"), upstream.headers)
        return msgspec.structs.replace(upstream, api_key=Secrets(keys), headers=headers, ca_file=ca_file, proxy=proxy)

    def _check_verdicts(self, at: Steps, verdicts: Mapping[str, VerdictConfig]) -> None:
        for case, verdict in verdicts.items():
            if case not in VERDICTS and not re.fullmatch("[45][0-9][0-9]", case):
                self._mistakes.note(
                    (*at, case), str(unknown("case", case, VERDICTS, f"a status, {', '.join(VERDICTS)}"))
                )
            if case == "mid_stream" and verdict.try_next:
                self._mistakes.note((*at, case, "next"), "bytes are out: nobody else can be asked")
            if case == "own_trouble" and verdict != VerdictConfig(try_next=verdict.try_next):
                problem = "what this gateway lacks is no upstream's fault: only `next` can be set"
                self._mistakes.note((*at, case), problem)

    def _headers(self, at: Steps, rules: HeaderRules) -> HeaderRules:
        opened: dict[str, Secret] = {}
        fixed = (*FRAMING, "accept-encoding")
        for name, written in rules.set.items():
            place = (*at, "set", name)
            if not re.fullmatch(HEADER_NAME, name) or name.lower() in fixed:
                self._mistakes.note(place, "no header that can be set")
            is_secret = SECRET_HEADER.search(name) is not None
            opened[name] = self._open(place, written, check_header_value, is_secret)
        for i, name in enumerate(rules.remove):
            if name.lower() in (*fixed, "host"):
                self._mistakes.note((*at, "remove", i), "no header that can be removed")
        for i, name in enumerate(rules.passes):
            if not re.fullmatch(HEADER_NAME.replace("[", r"[?\[\]", 1), name):
                self._mistakes.note((*at, "pass", i), "expected the name of a header, or a glob of names")
            if is_withheld(name.lower()):
                problem = "it frames the request, names an account or a client, or is a credential: see `headers.set`"
                self._mistakes.note((*at, "pass", i), f"no client's header of this name may go upstream: {problem}")
        if rules == NO_RULES:
            return NO_RULES
        removed, passed = ([name.lower() for name in names] for names in (rules.remove, rules.passes))
        return HeaderRules(opened, tuple(removed), tuple(passed))

    def _keys(self, timezone: dt.tzinfo) -> list[Key]:
        names, digests, keys = set[str](), set[bytes](), []
        teams, gateway = self._teams(), self._file.limits.gateway.budget("gateway")
        for i, entry in enumerate(self._file.keys):
            at: Steps = ("keys", i)
            self._take((*at, "name"), entry.name, names)
            if entry.key.digest in digests:
                self._mistakes.note((*at, "key"), "the same key stands here twice")
            digests.add(entry.key.digest)
            self._warn_of_secret((*at, "key"), entry.key, entry.key)
            limits = self._file.defaults.limits if entry.limits is None else entry.limits
            budgets = [limits.budget("key", entry.name)]
            if entry.team in teams:
                budgets.append(teams[entry.team])
            elif entry.team:
                what = f"team {describe(entry.team)}"
                why = str(unknown(what, entry.team, teams)) if teams else f"unknown {what}; `teams` has none"
                self._mistakes.note((*at, "team"), why)
            models, networks, last4 = entry.models, entry.allow_ips, entry.key.last4
            ends = entry.expires.at(timezone) if entry.expires else math.inf
            keys.append(
                Key(
                    *(entry.name, entry.key.digest, last4, models, ends, networks, entry.enabled, entry.team),
                    (*budgets, gateway),
                )
            )
        return keys

    def _teams(self) -> dict[str, Budget]:
        names = set[str]()
        for i, team in enumerate(self._file.teams):
            self._take(("teams", i, "name"), team.name, names)
        return {team.name: team.limits.budget("team", team.name) for team in self._file.teams}

    def _take(self, at: Steps, name: str, names: set[str]) -> None:
        if not name.isprintable():
            self._mistakes.note(at, "expected a name that can be printed")
        if name in names:
            self._mistakes.note(at, "is taken: names tell entries apart in the ledger")
        names.add(name)

    def _open(self, at: Steps, written: Secret, check: Callable[[str], object], is_secret: bool = True) -> Secret:
        """Return a secret without its seal. A mistake in it is noted."""
        secret = Secret("")
        with self._mistakes.at(*at):
            secret = self._vault.unseal(written)
            check(secret)
            if is_secret:
                self._warn_of_secret(at, secret, written)
        return secret

    def _warn_of_secret(self, at: Steps, secret: Secret, written: Secret) -> None:
        if written.is_written and not SEALED_OR_ELSEWHERE.search(written):
            self.has_plain = True
            self._warn(at, f"is in clear text: run `{PROGRAM} seal`")
        if PLACEHOLDER.search(secret) and not SEALED_KEY.fullmatch(secret):
            self._warn(at, "looks like a placeholder: put the real one in its place")

    def _warn(self, at: Steps, text: str) -> None:
        self.warnings.append(Mistake(at, text))


# The file, and what is around it


def is_mounted(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Return whether a file is a mount of its own, as with `docker -v ./config.yaml:…`; False without /proc."""
    with contextlib.suppress(OSError):
        # The fifth field is the mount point; blanks in it are escaped (proc(5)).
        escaped = re.sub(r"[\\ \t\n]", lambda found: f"\\{ord(found[0]):03o}", os.path.realpath(path))
        return any(line.split(" ")[4] == escaped for line in mounts.read_text(errors="surrogateescape").splitlines())
    return False


def read_text(path: Path, if_missing: str = f"`{PROGRAM} init` makes one") -> str:
    """Return the text of a config file. Raises ConfigError with what to do."""
    try:
        if os.stat(path).st_nlink == 0 and is_mounted(path):  # most editors put another file in its place
            raise ConfigError(
                f"{path}: was replaced on the host, and this container still has the old file, which nobody else sees: "
                "restart the container, and mount the folder instead of the file"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {if_missing}") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: is a folder, not a file: mounting a file that is not there makes one; "
            "remove it, and mount the folder in which config.yaml lies"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {why_not(error)}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (the byte {data[error.start]:#x}): save it as UTF-8") from None


def config_digest(text: str) -> str:
    """Return what tells one text of a config from another."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use: what the host has, or the least that a cgroup (v2) allows.

    `root` is where /proc and /sys are. In a container the cgroup's own path is not there, and the mount's root has the
    limit.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        own = (root / "proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        for folder in (root / "sys/fs/cgroup" / own / "x").parents:
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                found.append(int((folder / "memory.max").read_text()))
    return min(found)


def is_open_to_all(path: Path | None) -> bool:
    """Return whether every user of this host may read a file."""
    with contextlib.suppress(OSError):
        return path is not None and path.stat().st_mode & 0o007 != 0
    return False


def is_rootless(root: Path = Path("/")) -> bool:
    """Return whether this container was started without root: the users of the host are other ones (`uid_map`)."""
    with contextlib.suppress(OSError):
        return (root / "proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]
    return False


def host_warnings(config: Config, environ: Mapping[str, str], has_plain: bool) -> Iterator[str]:
    """Yield what is odd about a config on this host, or in this container."""
    server = config.server
    secret = Vault.file(config.path.parent, environ)
    if is_open_to_all(secret):
        yield f"{secret} can be read by every user of this host, and opens all sealed keys: chmod 600 {secret}"
    if has_plain and is_open_to_all(config.path):
        yield (
            f"{config.path} can be read by every user of this host, and so is what is in clear text in it: "
            f"chmod 640 {config.path}"
        )
    if is_mounted(config.path):
        yield (
            f"{config.path} is mounted as a single file: once an editor on the host has put another one in its place, "
            "edits are not seen here; mount its folder"
        )
    if environ.get("GATEWAY_PORT", str(server.port)) != str(server.port):
        asked = environ["GATEWAY_PORT"]
        yield f"server.port is {server.port}, but GATEWAY_PORT, which the image's health check asks, {asked}"
    for name in ("metrics_from", "trusted_proxies"):
        if getattr(server, name) and is_rootless():
            yield (
                f"server.{name}: in a rootless container every client may come from the same address, so that this "
                "lets all of them in: `client` in the ledger shows what it sees; [] lets nobody in"
            )
    if config.body_memory < server.max_body:
        yield (
            f"server.memory (default: a quarter of the host's) is {config.body_memory:,} bytes, and a body of "
            f"server.max_body, {server.max_body:,}, has no room in it: raise the one or lower the other"
        )


def disabled_keys(document: Document) -> set[str]:
    """Return the names of keys with `enabled: false`, by the nodes alone: no mistake in a value hides them.

    Raises ConfigError where the text is no YAML.
    """
    keys = document.find("keys")
    if not isinstance(keys, yaml.SequenceNode):
        return set()
    found = set[str]()
    for i in range(len(keys.value)):
        name = document.find("keys", i, "name")
        enabled = document.find("keys", i, "enabled")
        is_disabled = isinstance(enabled, yaml.ScalarNode) and enabled.value.lower() in ("false", "no", "off")
        if isinstance(name, yaml.ScalarNode) and is_disabled:
            found.add(name.value)
    return found


@contextlib.contextmanager
def paused_collection() -> Iterator[None]:
    """Pause the collection of circles: a snapshot has none, and each stops all threads for 0.2 s with 10,000 keys."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Config:
    """One snapshot: a loaded config.yaml and everything derived from it. Never changes."""

    def __init__(self, document: Document, vault: Vault, clock: Clock, environ: Mapping[str, str]) -> None:
        self.path, self.clock = document.path, clock
        self.file = document.typed(environ)
        self.digest = config_digest(document.text)
        self.index_secret = vault.index_secret
        self.server, self.limits, self.routing = self.file.server, self.file.limits, self.file.routing
        self.trusted, self.metrics_from = self.server.trusted_proxies, self.server.metrics_from
        self.body_memory = self.server.memory or available_memory() // 4
        self.usage_directory = self.path.parent / self.file.usage.directory
        self.contact = f" Ask {self.server.contact}." if self.server.contact else ""
        builder = Builder(document, self.file, vault)
        self.timezone, self.upstreams, self.keys = builder.build()
        self.warnings = [f"line {sentence}" for sentence in document.sentences(document.warnings)]
        self.warnings += host_warnings(self, environ, builder.has_plain)
        self.price = self.file.prices.price
        self.serving = functools.lru_cache(maxsize=1024)(self._serving)

    @classmethod
    def load(cls, path: Path, clock: Clock = Clock(), environ: Mapping[str, str] = os.environ) -> Config:
        """Read a file. Raises ConfigError."""
        return cls.parse(read_text(path), path, clock, environ)

    @classmethod
    def parse(cls, text: str, path: Path, clock: Clock, environ: Mapping[str, str]) -> Config:
        """Make a snapshot of `text`, with relative paths seen from `path`. Raises ConfigError."""
        try:
            with paused_collection():
                return cls(Document(text, path), Vault.open(path.parent, environ), clock, environ)
        except SealError as error:
            raise ConfigError(f"{path}: {error}") from None

    def without_revoked(self, text: str) -> Config | None:
        """This snapshot without the keys that a text disables whose rest is bad; None where it disables none of them.

        An unrelated mistake must not keep a key in use that was revoked because somebody else had it.
        """
        try:
            revoked = disabled_keys(Document(text, self.path))
        except ConfigError:
            return None
        if not any(key.enabled and key.name in revoked for key in self.keys):
            return None
        config = copy.copy(self)
        config.digest = ""  # no file says what this snapshot does: the next good one is taken, whatever it is
        config.keys = KeyRing(
            msgspec.structs.replace(key, enabled=False) if key.name in revoked else key for key in self.keys
        )
        return config

    def check_again(self, call: Call) -> Key:
        """The key of a call that began before this snapshot. Raises KeyRefused or KeyForbidden."""
        key = self.keys.find_again(call.key)
        key.check(call.address, self.clock.wall())
        return key

    def fill(self, bill: Bill, asked: str, served: str, usage: Usage) -> None:
        """Write on a bill what a call costs (`PriceTable.fill`), and what counts of it in limits of tokens."""
        self.file.prices.fill(bill, asked, served, usage)
        bill.weighted_tokens = self.limits.weights.weigh(usage)

    def bill(self, asked: str, served: str, usage: Usage) -> Bill:
        """Return the bill of a call (`fill`)."""
        bill = Bill()
        self.fill(bill, asked, served, usage)
        return bill

    def route(self, call: Call) -> tuple[Serving, ...]:
        """Those that speak the call's format and serve its model, by priority, then in the file's order."""
        if not call.key.allows_model(call.model):
            if not call.model:
                raise PolicyBlocked(
                    f"model: field required. Without it only a key may call whose `models` in the config has "
                    f'"*" or "" ({call.key} has neither).'
                )
            raise PolicyBlocked(f"The key {call.key} may not use the model {call.model!r}.")
        return self.serving(call.route, call.model)

    def _serving(self, route: Route, model: str) -> tuple[Serving, ...]:
        spoken = [upstream for upstream in self.upstreams if upstream.serves(route)]
        if not spoken:
            raise NotFound(f"No upstream of this gateway answers {route.path}.")
        found = [Serving(upstream, name) for upstream in spoken if (name := upstream.rename(model)) is not None]
        if not found and not model:
            raise BadRequest("model: field required (no upstream of this gateway has an entry for requests without)")
        if not found:
            raise PolicyBlocked(f"No upstream of this gateway serves the model {model!r}.")
        if self.file.prices.unknown == "refuse" and route.kind != "count_tokens":  # which costs nothing
            found = [serving for serving in found if self.price(serving.model).is_known]
            if not found:
                raise PolicyBlocked(
                    f"The model {model!r} has no price here, and this gateway serves only what it can price: "
                    f"its config needs a row for it in `prices`.{self.contact}"
                )
        return tuple(sorted(found, key=lambda serving: serving.upstream.priority))


def setting_of(document: Document, *steps: str, default: str) -> str:
    """Return a text of a config that has a mistake somewhere. Raises ConfigError where that is just there."""
    node = document.find(*steps)
    if node is None:
        return default
    value: Any = None
    with contextlib.suppress(Mistakes):
        value = Reader(os.environ).read(node, steps)
    if not isinstance(value, str) or not value:
        raise document.problem(steps, "must be known here")
    return value


def time_zone_of(document: Document) -> dt.tzinfo:
    """The time zone by a config that has a mistake somewhere. Raises ConfigError where that is just there."""
    try:
        return time_zone(setting_of(document, "server", "timezone", default="UTC"))
    except ValueError as error:
        raise document.problem(("server", "timezone"), str(error)) from None


def ledger_of(document: Document) -> Path:
    """The ledger's folder by a config that has a mistake somewhere. Raises ConfigError where that is just there."""
    return document.path.parent / setting_of(document, "usage", "directory", default=UsageConfig().directory)


# --- 7. Editing: config.yaml changed, nothing else with it ------------------------
# Offers: ConfigEditor, edited, new_file, sync_folder


def block_item(fields: dict[str, str], column: int) -> str:
    """A list item in block style."""
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return " " * column + "- " + f"\n{' ' * column}  ".join(lines)


def overwrite(file: io.FileIO, data: bytes) -> None:
    """Let a file have these bytes alone. Raises OSError."""
    file.seek(0)
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    file.truncate()
    os.fsync(file.fileno())


def copy_secret(path: Path, backup: Path, data: bytes) -> None:
    """Write what `path` holds to `backup`, with its mode and never a wider one. Raises OSError, and leaves no part."""
    backup.unlink(missing_ok=True)
    try:
        with open(os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        shutil.copystat(path, backup)
    except OSError:
        backup.unlink(missing_ok=True)
        raise


def write_in_place(path: Path, data: bytes) -> None:
    """Overwrite a file without changing its inode; meanwhile a copy beside it has what it was. Raises ConfigError.

    Where the disk is too full for the new text, the old one is put back: its blocks are there.
    """
    kept = ""
    backup = path.with_name(path.name + ".bak")
    try:
        with open(path, "r+b", buffering=0) as file:
            before = file.read()
            copy_secret(path, backup, before)
            kept = f"; what it was is in {backup}"
            try:
                overwrite(file, data)
            except OSError:
                overwrite(file, before)
                raise
        backup.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {why_not(error)}{kept}") from None


def sync_folder(path: Path) -> None:
    """Let new names in a folder outlast a power cut."""
    fd = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)


def replace_file(path: Path, data: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Put `data` in a file's place at once, with its mode and owner. Raises ConfigError.

    `check` is called just before, and raises what speaks against it. A bind-mounted file cannot be replaced (EBUSY):
    it is written in place.
    """
    before = path.stat()
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ConfigError(f"{path.parent}: cannot write here: {why_not(error)}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(handle, stat.S_IMODE(before.st_mode))
            with contextlib.suppress(PermissionError):
                os.fchown(handle, before.st_uid, before.st_gid)
            os.fsync(handle)
        check()
        os.replace(name, path)
        sync_folder(path.parent)  # else a power cut could bring back a key that was revoked
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise ConfigError(f"{path}: cannot be replaced: {why_not(error)}") from None
        write_in_place(path, data)
    finally:
        Path(name).unlink(missing_ok=True)


EDIT_WAIT_S = 10.0  # for another edit to end


def lock_config(path: Path) -> int:
    """Be the only one who edits a config until the descriptor that is returned is closed. Raises ConfigError.

    The lock is on the file itself, which an edit replaces: whoever has waited looks whether it is still there. -1
    where the file system knows no locks: then an edit only finds out that another one came in between.
    """
    until = time.monotonic() + EDIT_WAIT_S
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1  # reading it says what is wrong
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(fd)
                raise ConfigError(f"{path}: somebody else has edited it for {EDIT_WAIT_S:g} s; try again") from None
            time.sleep(0.02)
        except OSError:
            os.close(fd)
            return -1
        os.close(fd)


class ConfigEditor:
    """Edits config.yaml as text: touches only the lines it must, keeps comments, checks before it replaces."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock  # a descriptor of the file, or -1
        self.original = read_text(path)
        self.document = Document(self.original, path)

    def _splice(self, start: int, end: int, text: str, value: object, *steps: str | int) -> None:
        """Replace a piece of the text; that must change the value at `steps` and no other. Raises ConfigError.

        So an anchor or a layout that nobody thought of cannot make it change another key than the one meant.
        """
        before = self.document.text
        if "\r\n" in before:
            text = text.replace("\n", "\r\n")
        after = before[:start] + text + before[end:]
        try:
            expected = place = yaml.load(before, TEXT_LOADER)
            for step in steps[:-1]:
                place = place[step]
            place[steps[-1]] = value
            if yaml.load(after, TEXT_LOADER) != expected:
                raise yaml.YAMLError
            self.document = Document(after, self.path)
        except (yaml.YAMLError, ConfigError):
            raise self.document.problem(
                steps, "cannot be changed without touching more (an anchor, or an unusual layout?): edit it by hand"
            ) from None

    def set_scalar(self, value: str, *steps: str | int) -> None:
        """Replace a scalar that is there."""
        node = self.document.find(*steps)
        assert node is not None
        start, end = node.start_mark.index, self._end(node)
        self._splice(start, end, " " * (start == end) + value, yaml.load(value, TEXT_LOADER), *steps)

    def set_field(self, item: tuple[str | int, ...], name: str, value: str) -> None:
        """Set a field of a mapping; a new one comes after the last, or first in braces."""
        if self.document.find(*item, name) is not None:
            return self.set_scalar(value, *item, name)
        node = cast(yaml.MappingNode, self.document.find(*item))
        if node.flow_style:
            at = self.document.text.index("{", node.start_mark.index) + 1
            text = f"{name}: {value}, "
        else:
            at = self._line_after(node)
            text = f"\n{' ' * node.value[0][0].start_mark.column}{name}: {value}"
        self._splice(at, at, text, yaml.load(value, TEXT_LOADER), *item, name)

    def append_key(self, fields: dict[str, str]) -> None:
        """Add an item to `keys:`, in the style of the list."""
        node, text = self.document.find("keys"), self.document.text
        inline = "{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"
        before = yaml.load(text, TEXT_LOADER).get("keys")
        keys = [*(before if isinstance(before, list) else []), yaml.load(inline, TEXT_LOADER)]
        if node is None:
            start, end, new = len(text.rstrip()), len(text), "\n\nkeys:\n" + block_item(fields, 2) + "\n"
        elif not isinstance(node, yaml.SequenceNode) or not node.value:
            start, end = node.start_mark.index, self._line_end(node.end_mark.index)
            rest = text[node.end_mark.index : end].rstrip()  # a comment stays on its line
            start, new = len(text[:start].rstrip(" ")), f"{rest}\n{block_item(fields, 2)}"
        elif node.flow_style:
            start = end = self._end(node.value[-1])
            new = f", {inline}"
        else:
            start = end = self._line_after(node.value[-1])
            new = "\n" + block_item(fields, node.start_mark.column)
        self._splice(start, end, new, keys, "keys")

    def _end(self, node: yaml.Node) -> int:
        """Where a node's own text ends: the mark of a block stands where the next thing begins."""
        start, end = node.start_mark.index, node.end_mark.index
        return start + len(self.document.text[start:end].rstrip())

    def _line_end(self, at: int) -> int:
        text = self.document.text
        end = text.find("\n", at)
        return len(text) if end < 0 else end - (text[end - 1] == "\r")

    def _line_after(self, node: yaml.Node) -> int:
        """The end of the last line of a node: its mark stands behind the comments that belong to the next thing."""
        start, end = node.start_mark.index, self._line_end(self._end(node))
        while re.fullmatch(r"\s*(#.*)?", line := self.document.text[start:end].rpartition("\n")[2]):
            end -= len(line) + 1
        return self._line_end(end - 1)

    def save(self, environ: Mapping[str, str] = os.environ) -> Config:
        """Check the new text, then replace the file with it; mode and owner stay. Raises ConfigError."""
        config = Config.parse(self.document.text, self.path, Clock(), environ)
        self.replace()
        return config

    def replace(self) -> None:
        """Replace the file with the new text, good or bad. Raises ConfigError."""
        target = Path(os.path.realpath(self.path))  # a symlink stays one
        replace_file(target, self.document.text.encode(), self._check_unchanged)

    def _check_unchanged(self) -> None:
        """Raise ConfigError where somebody has put another file, or another text, in the place of what was read."""
        is_ours = self._lock < 0 or os.path.samestat(os.fstat(self._lock), os.stat(self.path))
        if not is_ours or read_text(self.path) != self.original:
            raise ConfigError(
                f"{self.path}: was changed by someone else in the meantime; nothing was written, try again"
            )


@contextlib.contextmanager
def edited(path: Path) -> Iterator[ConfigEditor]:
    """An editor of a config that nobody else edits until the block ends: of six keys added at once all are there."""
    lock = lock_config(path)
    try:
        yield ConfigEditor(path, lock)
    finally:
        if lock >= 0:
            os.close(lock)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file of mode 600 that appears under its name once it is whole. Raises OSError where the name is taken."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        try:
            os.link(name, path)  # unlike a rename it replaces nothing
        except FileExistsError:
            raise
        except OSError:  # no hard links here
            os.rename(name, path)
        sync_folder(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)


# === Floor B. Books: what was spent, and what may be ================================

# --- 8. Ledger: what was spent, line by line --------------------------------------
# Offers: Adjustment, AttemptEntry, BLOCK, BrokenChain, COUNT_TOKENS, DAMAGED_GZIP, Discarded, Entry, Held,
#   hold_folder, hold_ledger, is_time, Ledger, LedgerFiles, LedgerLine, LINE_END, month_of, open_month, open_shared,
#   Page, Reset, Unreadable, utc_time

FIRST_CHAIN = b"0" * 32
COUNT_TOKENS = "/v1/messages/count_tokens"  # free: no call, no tokens, no cost


class AttemptEntry(msgspec.Struct, gc=False):
    """An attempt as the ledger keeps it.

    `outcome` is that of the call, or its row in the table of verdicts; `stale_connection` where the attempt met a
    kept-alive connection that had died, which is nobody's fault, and was made again at once.
    """

    upstream: str
    key: int
    outcome: str = ""
    ms: float = 0.0


# The order of a line's fields: msgspec puts those that are given by name only behind the others, so a line begins
# with its own, then come its bill and what its `…End` has, last of all the chain.


class EntryEnd(Bill, kw_only=True):
    """What stands behind the bill of an Entry."""

    first_byte_ms: float | None = None
    duration_ms: float = 0.0
    queued_ms: float = 0.0  # of these, until a slot was free and the call was admitted
    bytes_up: int = 0
    bytes_down: int = 0
    session: str = ""
    client: str = ""
    user_agent: str = ""
    upstream_request_id: str = ""
    chain: str = ""


class Entry(EntryEnd, tag_field="type", tag="call"):
    """One call as the ledger keeps it: one line of JSON. Times are UTC.

    `time` is when the call ended. `chain` is a hash over this line and the `chain` of the line before. A new field has
    a default: lines from before it are read for ever.
    """

    time: str
    request_id: str = ""
    key: str = ""
    team: str = ""
    upstream: str = ""
    model: str = ""
    model_served: str = ""
    path: str = ""
    stream: bool = False
    status: int = 0
    outcome: str = "completed"
    error_type: str = ""
    attempts: list[AttemptEntry] | int = 0  # in their order; a number in the first months' entries


class Adjustment(msgspec.Struct, kw_only=True, tag_field="type", tag="adjust"):
    """A correction by hand: counts with the key, its team and the gateway; amounts may be negative."""

    time: str
    key: str = ""
    team: str = ""
    model: str = "(adjusted)"  # where reports show it
    requests: int = 0
    input_tokens: int = 0
    cost_usd: float = 0.0
    note: str = ""
    id: str = ""  # of the command: it is booked once
    chain: str = ""


class Reset(msgspec.Struct, kw_only=True, tag_field="type", tag="reset"):
    """From here on a limit counts from zero; `limit` is such as usd/day, or "" for all. Reports stay as they are."""

    time: str
    scope: ScopeKind
    name: str = ""
    limit: str = ""
    note: str = ""
    id: str = ""  # of the command: it is done once
    chain: str = ""


class DiscardedEnd(Bill, kw_only=True):
    """What stands behind the bill of a Discarded."""

    session: str = ""
    upstream_request_id: str = ""
    requests: int = 0
    chain: str = ""


class Discarded(DiscardedEnd, tag_field="type", tag="discarded"):
    """What an upstream charges for an attempt of whose content the client saw nothing: it failed, another one followed.

    Counts as tokens and cost, not as a request; `request_id` is that of the call.
    """

    time: str
    request_id: str = ""
    key: str = ""
    team: str = ""
    upstream: str = ""
    model: str = ""
    model_served: str = ""
    path: str = ""
    outcome: str = ""


LedgerLine = Entry | Discarded | Adjustment | Reset


# Files


def is_time(text: str) -> bool:
    """Whether a text is a time as entries have it, or the beginning of one."""
    return re.fullmatch(r"\d{4}(-\d\d(-\d\d(T[\d:.]{0,20}Z?)?)?)?", text, re.ASCII) is not None


@functools.lru_cache(maxsize=8)
def utc_second(seconds: int) -> str:
    """`2026-01-31T12:34:56`; many calls end within the same one."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def utc_time(seconds: float) -> str:
    """`2026-01-31T12:34:56.789Z`."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{utc_second(whole)}.{milliseconds:03d}Z"


ENTRY_ENCODER = msgspec.json.Encoder()
LINE_END = len('0123456789abcdef0123456789abcdef"}\n')  # of every line: its chain value, a quote, a brace, a newline


def chain_value(before: bytes, line: bytes) -> bytes:
    """The chain value (32 hex digits) of a line that ends in `"chain":""}`, over that of the line before."""
    return hashlib.blake2b(before + line, digest_size=16).hexdigest().encode()


def chain_of(line: bytes) -> bytes:
    """The chain value that a whole line carries; b"" where it carries none."""
    value = line[-LINE_END:-3]
    return value if line.endswith(b'"}\n') and line[-LINE_END - 9 : -LINE_END] == b'"chain":"' else b""


def month_of(path: Path) -> str:
    """`2026-09` of usage-2026-09.jsonl and of usage-2026-09.jsonl.gz."""
    return path.name.removeprefix("usage-")[:7]


BLOCK = 1 << 18  # bytes that are looked through at once: less than a millisecond
DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)  # what reading a bad archive raises


def open_month(path: Path) -> IO[bytes]:
    """A month's lines, whether gzipped or not."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    return open(path, "rb", BLOCK)


class Unreadable:
    """Lines of the ledger that cannot be read and count nothing: how many there are, and where the first are."""

    NAMED = 5

    def __init__(self) -> None:
        self.count = 0
        self.names: list[str] = []  # usage-2026-09.jsonl:17

    def note(self, path: Path, place: int) -> None:
        """Count the line that begins behind `place` bytes of a file."""
        self.count += 1
        if len(self.names) == self.NAMED:
            return
        number = 1
        with open_month(path) as file:
            while place > 0 and (block := file.read(min(place, BLOCK))):
                place -= len(block)
                number += block.count(b"\n")
        self.names.append(f"{path.name}:{number}")

    def report(self) -> list[str]:
        """Name the first lines, and say how many there are besides."""
        more = self.count - len(self.names)
        return [*self.names, f"{more} more"] if more else self.names

    def __str__(self) -> str:
        return f"{self.count} lines of the ledger cannot be read and count nothing: {', '.join(self.report())}"


class Page(NamedTuple):
    """Entries, newest first, and the place before which the next page begins; None at the end."""

    entries: list[Entry]
    next: tuple[str, int] | None
    unreadable: Unreadable  # lines of the key that were met


class BrokenChain(Exception):
    """A line of the ledger was changed, removed or inserted; the message names the first that does not follow."""


# A gzipped month consists of members of 4 MB each, so that it can be read from any place: a page decompresses the
# members that it looks through and no others. The head of each has its length in an extra field. RFC 1952 allows both
# (2.2: members; 2.3.1.1: extra fields): zcat, gzip -d and Python read it as any other file.
#
#     1f 8b 08 04 … "GW" length | content 0 … 4 MB | CRC-32, size || 1f 8b 08 04 … "GW" length | content 4 … 8 MB | …

MEMBER = 4 << 20  # bytes of content in one
MEMBER_MAGIC = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x08\0GW\x04\0"  # ten bytes of gzip's; an extra field of 8, ours of 4
MEMBER_HEAD = struct.Struct(f"<{len(MEMBER_MAGIC)}sI")  # and the length of the member
MEMBER_END = struct.Struct("<II")  # CRC-32 and size of its content


def write_members(plain: IO[bytes], out: IO[bytes]) -> None:
    """Gzip a file in members. Raises OSError."""
    while data := plain.read(MEMBER):
        packer = zlib.compressobj(6, wbits=-15)
        packed = packer.compress(data) + packer.flush()
        out.write(MEMBER_HEAD.pack(MEMBER_MAGIC, MEMBER_HEAD.size + len(packed) + MEMBER_END.size))
        out.write(packed + MEMBER_END.pack(zlib.crc32(data), len(data)))


class Content:
    """What is in a file of the ledger, gzipped or not, to be read backwards.

    A gzipped file that `write_members` has not made is one member, which is decompressed from its beginning, once for
    each WINDOW. Raises OSError, as its methods do.
    """

    WINDOW = 16 << 20  # bytes

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._members: list[tuple[int, int]] = []  # where each begins: in the content and in the file
        if path.suffix == ".gz":
            self._find_members()
        else:
            self.size = path.stat().st_size

    def _find_members(self) -> None:
        with open(self.path, "rb") as file:
            end, offset = file.seek(0, os.SEEK_END), 0
            while offset < end:
                self._members.append((self.size, offset))
                head = os.pread(file.fileno(), MEMBER_HEAD.size, offset)
                following = end
                if head.startswith(MEMBER_MAGIC) and len(head) == MEMBER_HEAD.size:
                    following = offset + max(MEMBER_HEAD.size, MEMBER_HEAD.unpack(head)[1])
                self.size += int.from_bytes(os.pread(file.fileno(), 4, following - 4), "little")
                offset = following
        if offset > end:
            log.error("ledger: %s is damaged and is shown only up to there: it was cut", self.path.name)

    def blocks_before(self, end: int) -> Iterator[bytes]:
        """The content before a place that is in it, the last block first; of an archive down to where it is damaged."""
        if not self._members:
            with open(self.path, "rb") as file:
                while end > 0:
                    start = max(0, end - BLOCK)
                    yield os.pread(file.fileno(), end - start, start)
                    end = start
        try:
            for place, offset in reversed(self._members):
                while end > place:
                    start = max(place, end - self.WINDOW)
                    part = self._part(offset, start - place, end - place)
                    for stop in range(len(part), 0, -BLOCK):
                        yield part[max(0, stop - BLOCK) : stop]
                    end = start
        except DAMAGED_GZIP as error:
            log.error("ledger: %s is damaged and is shown only down to there: %s", self.path.name, error)

    def _part(self, offset: int, start: int, end: int) -> bytes:
        """Decompress a member; at its end its CRC-32 is checked."""
        unpacker, place, part = zlib.decompressobj(wbits=31), 0, bytearray()
        with open(self.path, "rb") as file:
            file.seek(offset)
            while place <= end and not unpacker.eof:
                packed = file.read(1 << 16)
                if not packed:
                    raise EOFError("it was cut")
                piece = unpacker.decompress(packed)
                part += piece[max(0, start - place) : max(0, end - place)]
                place += len(piece)
        return bytes(part)


def marked_lines(blocks: Iterable[bytes], end: int, mark: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines with `mark` in the blocks before a place, last first, with where each begins.

    After each block comes b"" with the place down to which everything was looked at: there one can stop and go on.
    """
    place, rest = end, b""
    for block in blocks:
        place -= len(block)
        data = block + rest
        first = data.find(b"\n") + 1 if place else 0  # where the first line begins that is whole
        rest = data if place and not first else data[:first]
        stop = len(data) if first or not place else 0
        while stop and (found := data.rfind(mark, first, stop)) >= 0:
            stop = data.rfind(b"\n", 0, found) + 1
            yield place + stop, data[stop : data.find(b"\n", found) + 1 or len(data)]
        yield place + len(rest), b""


def open_shared(path: str | Path, flags: int) -> int:
    """Open a file of the ledger's folder, which only its owner and group may read: it tells who works when."""
    return os.open(path, flags, 0o640)


class LedgerFiles:
    """The ledger as it is read: its lines in the order in which they were written, gzipped months included."""

    PAGE_BYTES = 64 << 20  # that are looked through for one page: about 90,000 lines
    PAUSE_S = 0.001  # after each block, in which the event loop goes on

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.unreadable = Unreadable()

    def paths(self) -> list[Path]:
        """The files, oldest first. Of a month that lies there twice (a crash in archiving) the plain one counts.

        Raises OSError where the folder is there and cannot be listed.
        """
        found: dict[str, Path] = {}
        # The plain ones first: a month that is gzipped meanwhile is then seen twice, and never not at all.
        for pattern in ("usage-????-??.jsonl", "usage-????-??.jsonl.gz"):
            try:
                names = os.listdir(self.directory)  # `Path.glob` would find none where it may not look
            except FileNotFoundError:
                return []
            for path in map(self.directory.joinpath, fnmatch.filter(names, pattern)):
                found.setdefault(month_of(path), path)
        return [found[month] for month in sorted(found)]

    @staticmethod
    def lines_of(path: Path) -> Iterator[bytes]:
        """A file's lines. Raises BrokenChain where a gzipped one is damaged, after the lines before that."""
        with open_month(path) as file:
            try:
                yield from file
            except DAMAGED_GZIP as error:
                raise BrokenChain(f"{path.name}: the archive is damaged: {error}") from None

    @staticmethod
    def last_line(path: Path) -> bytes:
        """A file's last line."""
        content = Content(path)
        lines = next(content.blocks_before(content.size), b"").splitlines(keepends=True)
        return lines[-1] if lines else b""

    def lines(self, since: str = "", until: str = "9") -> Iterator[LedgerLine]:
        """Lines with since <= time < until (ISO times, or beginnings of them); what is none is `unreadable`."""
        decoder = msgspec.json.Decoder(LedgerLine)
        for path in self.paths():
            if month_of(path) < since[:7]:  # a file may hold older times than its name says, never newer ones
                continue
            place = 0
            try:
                for line in self.lines_of(path):
                    place += len(line)
                    try:
                        found = decoder.decode(line)
                    except UNREADABLE:
                        self.unreadable.note(path, place - len(line))
                        continue
                    if since <= found.time < until:
                        yield found
            except BrokenChain as error:
                self.unreadable.note(path, place)
                log.error("ledger: %s; what follows in it is not counted", error)

    def backwards(self, before: tuple[str, int], mark: bytes) -> Iterator[tuple[Path, int, bytes]]:
        """File, place and bytes of the lines with `mark` before a place, newest first; b"" as `marked_lines` does."""
        for path in reversed(self.paths()):
            if month_of(path) > before[0]:
                continue
            content = Content(path)
            end = content.size
            if month_of(path) == before[0]:
                end = min(end, before[1])
            for place, line in marked_lines(content.blocks_before(end), end, mark):
                yield path, place, line

    def page(self, key: str, before: tuple[str, int], wanted: Callable[[Entry], bool], count: int) -> Page:
        """The newest `count` entries of a key before a place that are wanted; at most PAGE_BYTES are looked through."""
        decoder, mark = msgspec.json.Decoder(LedgerLine), b'"key":' + msgspec.json.encode(key) + b","
        found: list[Entry] = []
        unreadable, blocks = Unreadable(), 0
        for path, place, line in self.backwards(before, mark):
            if line and len(found) == count:
                return Page(found, before, unreadable)
            before = (month_of(path), place)
            if not line:
                blocks += 1
                if blocks * BLOCK >= self.PAGE_BYTES:
                    return Page(found, before, unreadable)
                time.sleep(self.PAUSE_S)
                continue
            try:
                entry = decoder.decode(line)
            except UNREADABLE:
                unreadable.note(path, place)
                continue
            if isinstance(entry, Entry) and entry.key == key and wanted(entry):
                found.append(entry)
        return Page(found, None, unreadable)

    def verify(self, seen: str, tell: Callable[[str], None]) -> str:
        """Follow the chain from the first line to the last; the last chain value. Tells how many lines each file has.

        Raises BrokenChain at the first line that does not follow; or where no line has the value `seen`, because lines
        that are removed at the end break no chain.
        """
        chain, wanted = FIRST_CHAIN, seen.encode()
        for path in self.paths():
            number = 0
            for number, line in enumerate(self.lines_of(path), 1):
                value = chain_of(line)
                if value != chain_value(chain, line[:-LINE_END] + b'"}'):
                    why = "it was changed, or lines before it were removed or added"
                    raise BrokenChain(f"{path.name}:{number}: does not follow from the line before: {why}")
                chain = value
                wanted = b"" if wanted == value else wanted
            tell(f"{path.name}: {number:,} lines")
        if wanted:
            raise BrokenChain(f"no line has the chain value {seen}: what it stood for was rewritten or removed")
        return chain.decode()

    def archive(self, tell: Callable[[str], None]) -> int:
        """Gzip every month but the newest; they go on counting. Return how many were plain. Raises OSError."""
        count = 0
        for path in self.paths()[:-1]:
            if path.suffix == ".gz":
                continue
            packed, temporary = path.with_name(path.name + ".gz"), path.with_name(f".{path.name}.gz")
            before = path.stat().st_size
            with open(path, "rb") as plain, open(temporary, "wb", opener=open_shared) as file:
                write_members(plain, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.copystat(path, temporary)
            temporary.replace(packed)
            path.unlink()
            tell(f"{packed.name}: {packed.stat().st_size:,} bytes, {before:,} before")
            count += 1
        return count

    def billed(self, since: str = "", until: str = "9") -> Iterator[Entry | Discarded]:
        """What upstreams charge for: calls, and attempts whose answer was thrown away."""
        return (line for line in self.lines(since, until) if isinstance(line, (Entry, Discarded)))


def unfinished_line(fd: int, size: int) -> bytes:
    """What stands behind the last newline in the first `size` bytes of a file: a line being written, or torn."""
    torn = b""
    while b"\n" not in torn and len(torn) < size:
        step = min(size - len(torn), 1 << 16)
        torn = os.pread(fd, step, size - len(torn) - step) + torn
    return torn[torn.rfind(b"\n") + 1 :]


def set_torn_line_aside(fd: int, path: Path) -> None:
    """Cut a last line that has no end (a crash in mid-write) off the file and keep it in `….torn`."""
    size = os.fstat(fd).st_size
    torn = unfinished_line(fd, size)
    if not torn:
        return
    with open(path.with_suffix(".torn"), "ab", opener=open_shared) as aside:
        aside.write(torn + b"\n")
    os.ftruncate(fd, size - len(torn))
    log.warning("ledger: a torn last line of %s was set aside in %s", path.name, path.with_suffix(".torn").name)


def sync_and_close(fd: int) -> None:
    """Let go of a month that is over."""
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)


def hold_folder(directory: Path) -> int:
    """Hold the folder of a ledger as long as the descriptor is open: a gateway or a restore, each alone.

    The kernel lets go when a process dies. Raises OSError, and BlockingIOError where another holds it.
    """
    with contextlib.suppress(FileExistsError):  # `open` says that it is no folder
        directory.mkdir(parents=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:
        log.warning("the file system of %s has no locks: see that no second gateway runs on it", directory)
    return fd


class Held:
    """A file as it was at one moment: open, and how many of its bytes belong to that moment."""

    def __init__(self, name: str, file: IO[bytes], size: int) -> None:
        self.name, self.file, self.size = name, file, size
        self.digest = hashlib.sha256()  # of what was read

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = self.file.read(size)
        self.digest.update(data)
        return data

    def last_chain(self) -> bytes:
        """The chain value of the last line; b"" where there is no line, or the file is gzipped."""
        length = min(self.size, LINE_END + 9)
        return chain_of(os.pread(self.file.fileno(), length, self.size - length))


def hold_ledger(directory: Path, opened: contextlib.ExitStack) -> list[Held]:
    """The months of a ledger and what was set aside, while a gateway appends to it and `usage archive` gzips months.

    Their lines are a beginning of the chain, without a gap and without a half line: a month grows no more once the
    next can be listed, so only the newest may end in the middle of one. Raises OSError.
    """
    held = []
    for path in [*LedgerFiles(directory).paths(), *sorted(directory.glob("usage-????-??.torn"))]:
        try:
            file = open(path, "rb")  # noqa: SIM115 - the stack closes it
        except FileNotFoundError:  # gzipped since it was listed
            path = path.with_name(path.name + ".gz")
            file = open(path, "rb")  # noqa: SIM115
        opened.enter_context(file)
        size = os.fstat(file.fileno()).st_size
        if path.suffix == ".jsonl":
            size -= len(unfinished_line(file.fileno(), size))
        held.append(Held(f"usage/{path.name}", file, size))
    return held


class Ledger:
    """Appends lines to `usage-YYYY-MM.jsonl`; those that are noted together share one write.

    A folder has one writer, who holds it (`hold_folder`). What the disk refuses waits in a bounded queue. `tick` is to
    be called often: it writes what waits, and has the file synced off the event loop. `on_line` is called with each
    line, and its JSON, as it is handed in, even where it has to wait.
    """

    QUEUE = 10_000  # entries; new calls are refused before one more would not fit
    BATCH = 64  # entries that share a write: a disk that refuses them is asked in each turn of the event loop

    def __init__(self, directory: Path, fsync_s: float, clock: Clock) -> None:
        self.directory, self.fsync_s = directory, fsync_s
        self.on_line: Callable[[LedgerLine, bytes], None] = lambda line, text: None
        self.month = ""  # of the file that is written to
        self._clock = clock
        self._waiting: deque[tuple[str, bytes]] = deque()  # month and line, not chained yet
        self._chain = b""  # the value of the last line; unknown until a file is opened
        self._fd = self._folder = -1
        self._dirty = False
        self._synced_at = clock.monotonic()
        self._syncing: ThreadFuture[None] | None = None
        self._disk = ThreadPoolExecutor(1, "ledger")  # one thread: syncs and closes keep their order
        self.failure = ""  # why the disk refused, "" while it does not
        self.on_change: Callable[[str], None] = lambda failure: None  # called when it begins to refuse, and ends

    @classmethod
    def correct(cls, directory: Path, line: LedgerLine, clock: Clock) -> None:
        """Append one line to a ledger that no gateway writes to. Raises OSError."""
        ledger = cls(directory, 0, clock)
        try:
            newest = max([line.time[:7], *map(month_of, LedgerFiles(directory).paths())])
            ledger._waiting.append((newest, ENTRY_ENCODER.encode(line)))
            ledger._write_waiting()
        finally:
            ledger._waiting.clear()
            ledger.close()

    def hold(self) -> None:
        """Be the only gateway of the folder that has this name now, until `close`. Raises OSError.

        Two would each count only their own calls.
        """
        held = self._folder
        with contextlib.suppress(FileNotFoundError):
            if held >= 0 and os.path.samestat(os.stat(self.directory), os.fstat(held)):
                return
        try:
            self._folder = hold_folder(self.directory)
        except BlockingIOError:
            remedy = "end that first, or give this gateway a usage.directory of its own"
            raise OSError(
                errno.EBUSY, f"another gateway runs on it, or a backup is being restored there: {remedy}"
            ) from None
        if held >= 0:
            os.close(held)

    def open(self) -> None:
        """Go on behind the newest line. Raises OSError where the folder cannot be written."""
        present = LedgerFiles(self.directory).paths()
        if present and present[-1].suffix != ".gz":
            self._open(month_of(present[-1]))  # a torn line may be in it
        month = max([utc_time(self._clock.wall())[:7], *map(month_of, present)])
        if month != self.month:
            self._open(month)

    def has_room(self, running: int) -> bool:
        """Whether the entries of `running` calls and one more would fit into the queue."""
        return len(self._waiting) + running < self.QUEUE

    @property
    def waiting(self) -> int:
        """Entries that are not in a file yet."""
        return len(self._waiting)

    def append(self, line: LedgerLine) -> None:
        """Write one line; never raises. Where the disk refuses, it waits."""
        self.note(line)
        self.write()

    def note(self, line: LedgerLine) -> None:
        """Count one line, and have it wait for `write`."""
        text = ENTRY_ENCODER.encode(line)
        self._waiting.append((line.time[:7], text))
        self.on_line(line, text)

    def write(self) -> None:
        """Write what waits; never raises. What the disk refuses goes on waiting."""
        self._write()
        if self.fsync_s == 0:
            self._sync()

    def tick(self) -> None:
        """Try again what waits; sync when it is due."""
        if self._waiting:
            self._write()
        if self._dirty and self._clock.monotonic() - self._synced_at >= self.fsync_s:
            self._sync()

    def close(self) -> None:
        """Write and sync what can be, and say what cannot."""
        self._write()
        self._disk.shutdown(wait=True)
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1
        if self._waiting:
            log.error("ledger: %d entries could not be written: %s", len(self._waiting), self.failure)

    def _write(self) -> None:
        failure = ""
        try:
            self._write_waiting()
        except OSError as error:
            failure = error.strerror or str(error)
        before, self.failure = self.failure, failure
        if failure and not before:
            log.error("ledger: cannot write to %s: %s; entries wait", self.directory, failure)
            self.on_change(failure)
        elif before and not failure:
            log.warning("ledger: %s can be written again", self.directory)
            self.on_change("")

    def _write_waiting(self) -> None:
        """Write what waits. Raises OSError."""
        while self._waiting:
            month = self._waiting[0][0]
            if self._fd < 0 or month > self.month:  # never back into an older file: the order is the chain's
                self._open(max(month, self.month))
            self._write_lines()

    def _write_lines(self) -> None:
        """Write lines that wait for the open file. Each is in it as a whole or not at all. Raises OSError."""
        chain, lines = self._chain, []
        for month, text in itertools.islice(self._waiting, self.BATCH):
            if month > self.month:
                break
            chain = chain_value(chain, text)
            lines.append(text[:-2] + chain + b'"}\n')
        data = b"".join(lines)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        finally:
            self._take_out(lines, data, written)

    def _take_out(self, lines: list[bytes], data: bytes, written: int) -> None:
        """Let the lines wait no more that are whole in the first `written` bytes of `data`. Raises OSError."""
        whole = data.count(b"\n", 0, written)
        if whole:
            self._chain = chain_of(lines[whole - 1])
            self._dirty = True
        for _ in range(whole):
            self._waiting.popleft()
        torn = written - (data.rfind(b"\n", 0, written) + 1)
        if torn:
            try:
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - torn)
            except OSError:
                self._let_go()  # nothing is written behind it: `_open` sets it aside first
                raise

    def _open(self, month: str) -> None:
        """Go on in a month's file, without what a crash may have left of its last line. Raises OSError."""
        path = self.directory / f"usage-{month}.jsonl"
        if self._folder >= 0:
            self.hold()  # the folder may have been replaced
        self.directory.mkdir(parents=True, exist_ok=True)
        fd = open_shared(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        try:
            set_torn_line_aside(fd, path)
        except OSError:
            os.close(fd)
            raise
        self._let_go()
        self._fd, self.month = fd, month
        if not self._chain:
            self._chain = self._last_chain()

    def _last_chain(self) -> bytes:
        """The chain value of the newest line, or that before the first one."""
        for file in reversed(LedgerFiles(self.directory).paths()):
            if last := LedgerFiles.last_line(file):
                return chain_of(last) or FIRST_CHAIN
        return FIRST_CHAIN

    def _let_go(self) -> None:
        if self._fd >= 0:
            self._disk.submit(sync_and_close, self._fd)
        self._fd = -1

    def reopen_if_moved(self) -> None:
        """Let go of a file that was moved or removed under us."""
        if self._fd < 0:
            return
        try:
            kept = os.path.samestat(os.stat(self.directory / f"usage-{self.month}.jsonl"), os.fstat(self._fd))
        except OSError:
            kept = False
        if not kept:
            self._chain = b""  # the folder may be another one, with a ledger of its own
            self._let_go()  # the month stays: the next line goes into a new file of its name

    def _sync(self) -> None:
        if self._fd < 0 or (self._syncing and not self._syncing.done()):
            return  # `tick` comes again; what is written by then is covered
        self._dirty = False
        self._synced_at = self._clock.monotonic()
        self._syncing = self._disk.submit(self._fsync, self._fd)

    def _fsync(self, fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            self._dirty = True
            log.error("ledger: fsync in %s: %s", self.directory, error.strerror)


# --- 9. Counters: what is spent in the windows of limits --------------------------
# Offers: Calendar, Counters, Fold, HISTOGRAM_S, MAX_COST_USD, Posting, POSTING_DECODER, Scopes, Span, steps_of,
#   UNCOUNTABLE

# All of this is derived from the ledger's lines: the index may be deleted at any time. Three folds go over the lines:
#
#     fold          where                     keeps                           asked by
#     Fold          on the event loop         the windows of every scope      limits, before each call
#     CounterView   in the index's thread     the same, in table `counters`   a start, which goes on from there
#     SumView       in the index's thread     the rows of SUMS, in `sums`     stats, reports, the usage line
#
# The index follows the ledger's files as `tail -f` would: at a start from where it was left, then every second. The
# loop counts a line in memory as it is written (`Ledger.on_line`); the index finds it in the file. A call hands the
# index nothing and never waits for it, and a line is counted in one way, whoever wrote it and whenever.
#
# One transaction holds what the lines of a batch have changed, how far they were read (a Position for each month) and
# a signature. A process that is killed at any moment leaves a whole state. What does not fit is folded again:
#
#     what does not fit                         found by             folded again
#     another window, time zone or row of SUMS  View.fingerprint     that view
#     lines cut, edited, moved, a month gone    Position.still_fits  that view
#     changed by hand, another sealing secret   Index._signature     both
#     damaged or foreign                        SQLite               both, in a new file
#     read-only, no locks, full, in use         SQLite               both, in memory, at each start
#
# Example: the ledger has 1,000 lines, the index has 990 of them (position 812,000 of usage-2026-11.jsonl), and the
# process is killed. The next start reads the windows of 61 scopes, seeks to byte 812,000, counts 10 lines, and hands a
# copy of the windows to the loop. Calls are admitted; the sums catch up behind.
#
# What was tried: sums of all amounts as one wide integer (one addition a line), which only pays where a line counts in
# many places; GROUP BY in SQLite, which takes longer than dictionaries; a read-only second connection, for which the
# index could not be locked against a second writer.

HISTOGRAM_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # upper bounds, inclusive
UNIT_COLUMNS = {unit: column for column, unit in enumerate(LIMIT_UNITS)}
MAX_COST_USD = 10_000.0  # of one call: a million tokens in and 128,000 out at the dearest price are $95


class Posting(Spend, gc=False, kw_only=True):
    """What is counted of a line; a third of the time that decoding all of it takes.

    Every field but the time has a default: a line of an older version counts as far as it goes.
    """

    time: dt.datetime
    type: Literal["call", "discarded", "adjust", "reset"] = "call"
    key: str = ""
    team: str = ""
    upstream: str = ""
    model: str = ""
    path: str = ""
    outcome: str = "completed"
    requests: int = 1
    duration_ms: float = 0.0
    queued_ms: float = 0.0
    scope: str = ""
    name: str = ""
    limit: str = ""


POSTING_DECODER = msgspec.json.Decoder(Posting)
DEFAULT_WEIGHTS = Weights()
UNCOUNTABLE = (*UNREADABLE, ValueError, LookupError, ArithmeticError)  # what counting a line made by hand raises


class Span(NamedTuple):
    """From `start` until before `end`, in seconds since 1970."""

    start: float
    end: float


class Calendar:
    """The limits' windows in a time zone: days, weeks and months through daylight saving and leap days."""

    def __init__(self, timezone: dt.tzinfo, windows: Windows = WINDOWS) -> None:
        self.timezone, self.windows = timezone, windows
        self.calendar = [window for window in windows.values() if window.kind == "calendar"]
        self.ending = [*self.calendar, *(window for window in windows.values() if window.kind == "rolling")]
        self.sliding_s = max((window.seconds for window in windows.values() if window.kind == "sliding"), default=0)
        # Every offset in use is a multiple of a quarter of an hour: within one nothing turns over.
        self._of_quarter = functools.lru_cache(maxsize=4096)(self._spans)
        self._of_day = functools.lru_cache(maxsize=64)(self._day_spans)
        self.label = functools.lru_cache(maxsize=4096)(self._label)

    def spans(self, at: float) -> dict[str, Span]:
        """The calendar windows, and the hour of the clock (as `clock_hour`), that `at` lies in."""
        return self._of_quarter(at // 900)

    def _spans(self, quarter: float) -> dict[str, Span]:
        local = dt.datetime.fromtimestamp(quarter * 900, self.timezone)
        hour = quarter * 900 - local.minute * 60 - local.second
        return self._of_day(local.date()) | {"clock_hour": Span(hour, hour + 3600)}

    def _day_spans(self, day: dt.date) -> dict[str, Span]:
        return {window.name: Span(*map(self._midnight, window.dates(day))) for window in self.calendar}

    def _midnight(self, day: dt.date) -> float:
        # Where a change of the clock skips midnight, this is the moment of the change (PEP 495: fold 0 in a gap).
        return dt.datetime.combine(day, dt.time(), self.timezone).timestamp()

    def _label(self, at: float, by: str) -> str:
        """The hour (ISO, with its offset), day or month of a time."""
        local = dt.datetime.fromtimestamp(at, self.timezone).isoformat(timespec="minutes")
        return local if by == "hour" else local[: len("2026-01-31" if by == "day" else "2026-01")]


def steps_of(now: float, seconds: int) -> tuple[int, int]:
    """Return the first and last step of a sliding window: the present one and those of its `seconds`, so never more.

    As many ahead count, too: calls that were booked while the clock was ahead, for no longer than that.
    """
    present, past = int(now // STEP_S), seconds // STEP_S
    return present - past, present + past


class Window(msgspec.Struct, array_like=True):
    """A window of limits: from `start` until before `end`. `mark` are the totals at its start."""

    start: float
    end: float
    mark: list[int]


class Counters(msgspec.Struct, array_like=True):
    """What one key, one team or the gateway has spent: totals that only grow, and where each window began in them.

    So a line costs three additions, whatever windows there are, and every limit that a reload brings has been counted
    all along. A clock that is set back finds the windows it had left. Lists are in the order of LIMIT_UNITS; money is
    in nano-USD, so that sums and differences are exact.
    """

    LEFT = 8  # windows left behind that are remembered, of each kind

    totals: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0])
    windows: dict[str, Window] = msgspec.field(default_factory=lambda: {"": Window(-1e18, 1e18, [0, 0, 0])})
    left: dict[str, list[Window]] = msgspec.field(default_factory=dict)  # here `mark` is what was spent in it
    steps: dict[int, list[int]] = msgspec.field(default_factory=dict)  # for sliding windows; calls where admitted
    since: float = 0.0  # between these two no window ends
    until: float = 0.0

    def roll(self, rows: Sequence[LimitWindow], at: float, began: float, calendar: Calendar) -> None:
        """Open the windows that a call counts in which began and ended at these times."""
        since, until = -math.inf, math.inf
        for row in rows:
            window = self.windows.get(row.name)
            if window is None or not self._opens(row, window) <= at < window.end:
                window = self.windows[row.name] = self._enter(row, at, began, calendar)
            opens = self._opens(row, window)
            if opens > since:  # not `max`: a fold of a million lines comes here often
                since = opens
            if window.end < until:
                until = window.end
        self.since, self.until = since, until

    def _opens(self, row: LimitWindow, window: Window) -> float:
        """From when on calls count in a row's window: a little before it was opened, but not while another one was."""
        opens = window.start - row.seconds
        for left in self.left.get(row.name, ()):
            if opens < left.end <= window.start:
                opens = left.end
        return opens

    def _enter(self, row: LimitWindow, at: float, began: float, calendar: Calendar) -> Window:
        """Leave a row's window for the one that `at` lies in: one of those left before, or a new one."""
        left, current = self.left.setdefault(row.name, []), self.windows.get(row.name)
        if current:
            spent = [total - mark for total, mark in zip(self.totals, current.mark, strict=True)]
            left.append(Window(current.start, current.end, spent))
        start = began
        for window in left:
            if window.start <= at < window.end:
                left.remove(window)
                mark = [total - spent for total, spent in zip(self.totals, window.mark, strict=True)]
                return Window(window.start, window.end, mark)
            if start < window.end <= at:
                start = window.end  # a rolling window begins behind those before
        del left[: -self.LEFT]
        if row.kind == "calendar":
            return Window(*calendar.spans(at)[row.name], self.totals.copy())
        if at >= start + row.seconds:  # the call took longer than the window
            start = at
        return Window(start, start + row.seconds, self.totals.copy())

    def post_step(self, at: float, admitted: float, spent: tuple[int, int, int], sliding_s: int) -> None:
        """Count for sliding windows: tokens and money where the call ended, the call itself where it was admitted."""
        if len(self.steps) * STEP_S > 3 * sliding_s:
            first, last = steps_of(at, sliding_s)
            self.steps = {step: spent for step, spent in self.steps.items() if first <= step <= last}
        tokens, nano_usd, requests = spent
        ended, began = int(at // STEP_S), int(admitted // STEP_S)
        step = self.steps.get(ended) or self.steps.setdefault(ended, [0, 0, 0])
        step[0] += tokens
        step[1] += nano_usd
        if began != ended:
            step = self.steps.get(began) or self.steps.setdefault(began, [0, 0, 0])
        step[2] += requests

    def reset(self, unit: str, window: LimitWindow) -> None:
        """Let a limit count from zero."""
        column = UNIT_COLUMNS[unit]
        if window.kind == "sliding":
            for spent in self.steps.values():
                spent[column] = 0
        elif window.name in self.windows:
            self.windows[window.name].mark[column] = self.totals[column]

    def spent(self, unit: str, window: LimitWindow, now: float) -> int:
        """What counts in the window of `now`: weighted tokens, nano-USD or requests."""
        column = UNIT_COLUMNS[unit]
        if window.kind == "sliding":
            spent, (first, last) = 0, steps_of(now, window.seconds)
            for step, counts in self.steps.items():
                if first <= step <= last:
                    spent += counts[column]
            return spent
        current = self.windows.get(window.name)
        if current is None:
            return 0
        if self.since <= now < self.until or self._opens(window, current) <= now < current.end:
            return self.totals[column] - current.mark[column]
        for left in self.left.get(window.name, ()):
            if left.start <= now < left.end:
                return left.mark[column]
        return 0

    def resets_at(self, window: LimitWindow, now: float, calendar: Calendar) -> float | None:
        """When the window of `now` ends; None where it does not, or has not been opened."""
        if window.kind == "calendar":
            return calendar.spans(now)[window.name].end
        current = self.windows.get(window.name)
        if window.kind == "rolling" and current and self._opens(window, current) <= now < current.end:
            return current.end
        return None


Scopes = dict[tuple[str, str], Counters]  # by kind (ScopeKind) and name


class Fold:
    """The counters of all scopes as a fold over the ledger's lines. Nothing else changes them."""

    def __init__(self, calendar: Calendar, fresh_since: float = -math.inf) -> None:
        self.calendar = calendar
        self.scopes: Scopes = {}
        self.changed: set[tuple[str, str]] = set()  # since `forget_changes`
        self.fresh_since = fresh_since  # what ended before is in no sliding window
        self._known: dict[tuple[str, str], tuple[Counters, ...]] = {}  # by key and team

    def scope(self, kind: str, name: str) -> Counters:
        """The counters of a key, a team or the gateway."""
        self.changed.add((kind, name))
        return self.scopes.setdefault((kind, name), Counters())

    def forget_changes(self) -> None:
        """Count as changed only what changes from here on."""
        self.changed.clear()
        self._known.clear()

    def adopt(self, scopes: Scopes) -> None:
        """Go on from the counters of another fold. Counters that somebody holds stay the same objects."""
        for name, counters in scopes.items():
            own = self.scopes.setdefault(name, counters)
            for field in Counters.__struct_fields__:
                setattr(own, field, getattr(counters, field))

    def post(self, postings: Iterable[Posting]) -> None:
        """Count lines in their order. What the iterable raises comes through; one can then go on with it."""
        for posting in postings:
            at = posting.time.timestamp()
            if posting.type == "reset":
                self._reset(posting, at)
            else:
                self.count(posting, at, posting.requests)

    def count(self, line: Posting | Entry, at: float, requests: int) -> None:
        """Count a call, or what counts as so many `requests`; `at` is its time in seconds since 1970."""
        if line.path == COUNT_TOKENS:
            return
        nano_usd = round(line.cost_usd * 1e9)
        tokens = line.weighted_tokens
        if tokens is None:
            tokens = DEFAULT_WEIGHTS.weigh(line)
        calendar = self.calendar
        scopes = self._known.get((line.key, line.team)) or self._learn(line.key, line.team)
        for counters in scopes:
            if not counters.since <= at < counters.until:
                counters.roll(calendar.ending, at, at - line.duration_ms / 1000, calendar)
            totals = counters.totals
            totals[0] += tokens
            totals[1] += nano_usd
            totals[2] += requests
        if at > self.fresh_since:
            admitted = at - (line.duration_ms - line.queued_ms) / 1000
            for counters in scopes:
                counters.post_step(at, admitted, (tokens, nano_usd, requests), calendar.sliding_s)

    def _learn(self, key: str, team: str) -> tuple[Counters, ...]:
        """Everything that an entry of this key and team counts in."""
        named = [self.scope(kind, name) for kind, name in (("team", team), ("key", key)) if name]
        self._known[key, team] = self.scope("gateway", ""), *named
        return self._known[key, team]

    def _reset(self, posting: Posting, at: float) -> None:
        if posting.scope not in get_args(ScopeKind):
            raise ValueError(f"unknown scope {posting.scope}")
        limits = [Limit(unit, window, 0) for unit in LIMIT_UNITS for window in self.calendar.windows.values()]
        meant = [limit for limit in limits if posting.limit in ("", limit.name)]
        if not meant:
            raise ValueError(f"unknown limit {posting.limit}")
        counters = self.scope(posting.scope, posting.name)
        counters.roll(self.calendar.calendar, at, at, self.calendar)
        counters.until = 0.0  # a reset opens no rolling window: the next call does
        for limit in meant:
            counters.reset(limit.unit, limit.window)


# --- 10. Index: sums for reports and page, the position for restarts --------------
# Offers: Books, Groups, Index, LINE_MAX, NOTHING_SPENT, summarize, SUMS, Total, totals_of

# Sums: what reports ask

LABELS = ("key", "team", "model", "upstream", "outcome")  # what calls can be told apart by
AMOUNTS = (*Tokens.__struct_fields__, "nano_usd", "calls", "failed", "duration_ms")
WAITS = tuple(f"wait_{number}" for number in range(len(HISTOGRAM_S) + 1))  # calls by duration, between HISTOGRAM_S
COLUMNS = (*AMOUNTS, *WAITS)
WAITS_MS = [bound * 1000 for bound in HISTOGRAM_S]
LINE_MAX = 1 << 53  # of what is stored in a column: 9e15 tokens, or $9 million


class Cut(NamedTuple):
    """A row of SUMS: what is summed up for each hour or day, by which labels."""

    span: Literal["clock_hour", "day"]  # of `Calendar.spans`
    labels: tuple[str, ...]


# A question is answered from the last of these that knows enough. Of 10 million calls of 50 keys in 90 days they have
# 961,000, 44,000 and 21,000 rows.
SUMS = (
    Cut("clock_hour", LABELS),
    Cut("day", ("key", "team", "model")),
    Cut("day", ("model", "upstream", "outcome")),
)
OTHERS = "(others)"
MODELS = 200  # of a key: names come from clients, who may think up new ones all day


def add_to(sums: list[int], posting: Posting) -> None:
    """Add a line to sums that are in the order of COLUMNS. Raises OverflowError, and has added nothing then."""
    sums[5] += round(posting.cost_usd * 1e9)
    sums[0] += posting.input_tokens
    sums[1] += posting.output_tokens
    sums[2] += posting.cache_write_5m_tokens
    sums[3] += posting.cache_write_1h_tokens
    sums[4] += posting.cache_read_tokens
    sums[6] += posting.requests
    if posting.outcome != "completed" and posting.requests > 0:
        sums[7] += 1
    if posting.type == "call":
        duration_ms = posting.duration_ms
        sums[8] += int(duration_ms)
        sums[9 + bisect.bisect_left(WAITS_MS, duration_ms)] += 1


class Total(msgspec.Struct):
    """Sums over a group of entries. `cache_hit_rate` is cache reads over all input, None without input."""

    group: dict[str, str]
    calls: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_tokens: int = 0
    cache_read_tokens: int = 0
    cost_usd: float = 0.0
    cache_hit_rate: float | None = None

    @classmethod
    def of(cls, group: dict[str, str], sums: Sequence[int]) -> Total:
        """Sums (in the order of AMOUNTS) as people read them."""
        spent = dict(zip(AMOUNTS, sums, strict=False))
        tokens = Tokens(**dict(zip(Tokens.__struct_fields__, sums, strict=False)))
        total = cls(group, spent["calls"], spent["failed"], cost_usd=spent["nano_usd"] / 1e9)
        for kind, count in zip(TOKEN_KINDS, token_counts(tokens), strict=True):
            name = f"{kind}_tokens"
            setattr(total, name, getattr(total, name) + count)
        if tokens.total_input_tokens > 0:
            total.cache_hit_rate = round(tokens.cache_read_tokens / tokens.total_input_tokens, 4)
        return total


NOTHING_SPENT = [0] * len(AMOUNTS)
Groups = dict[tuple[str, ...], list[int]]  # sums by group


def totals_of(by: Sequence[str], groups: Groups) -> list[Total]:
    """Groups as people read them, sorted."""
    return [Total.of(dict(zip(by, group, strict=True)), groups[group]) for group in sorted(groups)]


def summarize(lines: Iterable[LedgerLine], by: Sequence[str], timezone: dt.tzinfo) -> list[Total]:
    """Totals per group of `by` (key, team, upstream, model, day, month, session …) over lines, sorted by group."""
    groups: Groups = {}
    for line in lines:
        if isinstance(line, Reset) or getattr(line, "path", "") == COUNT_TOKENS:
            continue
        day = dt.datetime.fromisoformat(line.time).astimezone(timezone).date().isoformat()
        values = {"day": day, "month": day[:7]}
        group = tuple(values.get(name) or getattr(line, name, "") for name in by)
        add_to(groups.setdefault(group, [0] * len(COLUMNS)), msgspec.convert(line, Posting, from_attributes=True))
    return totals_of(by, groups)


# Views: folds that are kept

SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE positions (view TEXT, month TEXT, state BLOB NOT NULL, PRIMARY KEY (view, month)) WITHOUT ROWID;
CREATE TABLE counters (scope TEXT, name TEXT, state BLOB NOT NULL, PRIMARY KEY (scope, name)) WITHOUT ROWID;
CREATE TABLE names (number INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE models (key INTEGER, model INTEGER, PRIMARY KEY (key, model)) WITHOUT ROWID;
CREATE TABLE sums (cut INTEGER, key INTEGER, start INTEGER, team INTEGER, model INTEGER, upstream INTEGER,
    outcome INTEGER, {", ".join(f"{name} INTEGER NOT NULL" for name in COLUMNS)},
    PRIMARY KEY (cut, key, start, team, model, upstream, outcome)) WITHOUT ROWID;
"""
ADD_SUMS = f"""
INSERT INTO sums VALUES ({", ".join("?" * (len(LABELS) + 2 + len(COLUMNS)))})
ON CONFLICT DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in COLUMNS)}
"""


def whole_lines(path: Path, offset: int) -> Iterator[list[bytes]]:
    """A file's whole lines from a place on, 256 KB a step; of a damaged archive as many as can be had.

    What has no end is torn, or is being written. Raises OSError.
    """
    try:
        with open_month(path) as file:
            file.seek(offset)
            while lines := file.readlines(BLOCK):
                if not lines[-1].endswith(b"\n"):
                    del lines[-1]
                if lines:
                    yield lines
    except DAMAGED_GZIP as error:
        log.error("ledger: %s is damaged and counts only up to there: %s", path.name, error)


class Position(msgspec.Struct, array_like=True):
    """How far a view has read a month; `offset` is in its content, whether gzipped or not."""

    offset: int = 0
    entries: int = 0
    tail: str = ""  # the end of the last line that was read: its chain value
    inode: int = 0  # of the file when it was looked at last
    size: int = 0
    mtime_ns: int = 0
    is_whole: bool = False  # all that was there then was read

    def still_fits(self, path: Path, is_last: bool) -> bool:
        """True if the lines that were read are still there; what follows them does not matter. Raises OSError.

        `is_last`: of the months that were read this is the last, which alone is written to.

        | what is there now                                | for example                              |      |
        |--------------------------------------------------|------------------------------------------|------|
        | same size and time                               | untouched; `cp -a`                       | fits |
        | gzipped, same time                               | `usage archive`                          | fits |
        | the last month, same inode, last line in place   | written on; a torn line was set aside    | fits |
        | anything else                                    | cut, edited, moved                       | no   |

        Not seen is an edit in place of the last month, before its last line: `usage verify` folds all lines anew.
        """
        found = path.stat()
        if found.st_mtime_ns == self.mtime_ns and (found.st_size == self.size or path.suffix == ".gz"):
            return True
        if not is_last or found.st_ino != self.inode or path.suffix == ".gz":
            return False
        with open(path, "rb") as file:
            start = max(0, self.offset - LINE_END)
            return os.pread(file.fileno(), self.offset - start, start).decode("latin-1").endswith(self.tail)

    def has_news(self, found: os.stat_result) -> bool:
        """Remember how the file is now; False if all of it was read already."""
        before = (self.inode, self.size, self.mtime_ns)
        self.inode, self.size, self.mtime_ns = now = (found.st_ino, found.st_size, found.st_mtime_ns)
        self.is_whole = self.is_whole and before == now
        return not self.is_whole

    def count(self, view: AnyView, lines: list[bytes], path: Path, unreadable: Unreadable) -> None:
        """Have a view count whole lines, which follow those that were read."""
        rest = iter(lines)
        postings = map(POSTING_DECODER.decode, rest)
        while True:
            try:
                view.post(postings)
                break
            except UNCOUNTABLE:  # `postings` goes on behind it
                number = len(lines) - operator.length_hint(rest) - 1
                unreadable.note(path, self.offset + sum(map(len, lines[:number])))
        self.offset += sum(map(len, lines))
        self.entries += len(lines)
        self.tail = lines[-1][-LINE_END:].decode("latin-1")


class View:
    """A fold over the ledger's lines that is kept in tables of the index, with its own position in each month.

    Each has a `fingerprint` of what must be the same for what is kept to mean the same. `post` counts lines, as
    `Fold.post` does; `load` goes on from what is kept (and raises sqlite3.Error or UNCOUNTABLE); `save` keeps what has
    changed since the last time.
    """

    def __init__(self, calendar: Calendar) -> None:
        self.calendar = calendar
        self.begin()

    def begin(self) -> None:
        """Forget everything."""
        self.positions: dict[str, Position] = {}  # by month

    @property
    def entries(self) -> int:
        """Lines that were read."""
        return sum(position.entries for position in self.positions.values())

    def _digest(self, *meaning: object) -> bytes:
        timezone = str(self.calendar.timezone)
        return hashlib.blake2b(msgspec.json.encode([timezone, *meaning]), digest_size=16).digest()


class CounterView(View):
    """The counters of limits."""

    name, tables = "counters", ("counters",)

    def begin(self) -> None:
        """Forget everything."""
        super().begin()
        self.fold = Fold(self.calendar)

    @property
    def fingerprint(self) -> bytes:
        """Of the table of windows, and of the shape of counters."""
        windows = [*self.calendar.windows.values()]
        return self._digest(windows, LIMIT_UNITS, STEP_S, Counters.__struct_fields__, Counters.LEFT)

    def post(self, postings: Iterable[Posting]) -> None:
        """Count lines."""
        self.fold.post(postings)

    def load(self, db: sqlite3.Connection) -> None:
        """Go on from what is kept."""
        for kind, name, state in db.execute("SELECT scope, name, state FROM counters"):
            self.fold.scopes[kind, name] = msgspec.json.decode(state, type=Counters)

    def save(self, db: sqlite3.Connection) -> None:
        """Keep the counters that have changed."""
        rows = [(*scope, msgspec.json.encode(self.fold.scopes[scope])) for scope in self.fold.changed]
        db.executemany("INSERT OR REPLACE INTO counters VALUES (?, ?, ?)", rows)
        self.fold.forget_changes()


def clamped(sums: list[int]) -> list[int]:
    """Sums as SQLite can hold them: a line that somebody made by hand may have any number."""
    if max(sums) <= LINE_MAX and min(sums) >= -LINE_MAX:
        return sums
    return [max(-LINE_MAX, min(LINE_MAX, amount)) for amount in sums]


class SumView(View):
    """The sums of reports, by hour or day and by labels (SUMS)."""

    name, tables = "sums", ("sums", "names", "models")

    def begin(self) -> None:
        """Forget everything."""
        super().begin()
        self.numbers: dict[str, int] = {}  # by name
        self._kept = 0  # names that are in the table
        self._hour = Span(0.0, 0.0)
        self._sums: dict[tuple[float, tuple[str, ...]], list[int]] = {}  # by hour and LABELS; not in the table yet
        self._models: dict[str, set[str]] = {}  # by key
        self._new_models: list[tuple[int, int]] = []  # that are not in the table

    @property
    def fingerprint(self) -> bytes:
        """Of the table of sums."""
        return self._digest(SUMS, COLUMNS, HISTOGRAM_S, MODELS)

    def number(self, name: str) -> int:
        """The number that stands for a name."""
        return self.numbers.setdefault(name, len(self.numbers) + 1)

    def post(self, postings: Iterable[Posting]) -> None:
        """Count lines."""
        for posting in postings:
            if posting.path == COUNT_TOKENS or posting.type == "reset":
                continue
            at = posting.time.timestamp()
            if not self._hour.start <= at < self._hour.end:
                self._hour = self.calendar.spans(at)["clock_hour"]
            names = (posting.key, posting.team, posting.model, posting.upstream, posting.outcome)
            sums = self._sums.get((self._hour.start, names))
            if sums is None:
                sums = self._sums[self._hour.start, names] = [0] * len(COLUMNS)
            add_to(sums, posting)

    def _labels(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The numbers of LABELS; a model that is too much for its key is one of OTHERS."""
        key, team, model, upstream, outcome = names
        models = self._models.setdefault(key, set())
        if model not in models:
            if len(models) < MODELS:
                models.add(model)
                self._new_models.append((self.number(key), self.number(model)))
            else:
                model = OTHERS
        return tuple(map(self.number, (key, team, model, upstream, outcome)))

    def load(self, db: sqlite3.Connection) -> None:
        """Go on from what is kept."""
        self.numbers = {name: number for number, name in db.execute("SELECT number, name FROM names ORDER BY number")}
        self._kept = len(self.numbers)
        by_number = list(self.numbers)
        for key, model in db.execute("SELECT key, model FROM models"):
            self._models.setdefault(by_number[key - 1], set()).add(by_number[model - 1])

    def save(self, db: sqlite3.Connection) -> None:
        """Add what was counted to the table."""
        counted = [item for item in self._sums.items() if any(item[1])]
        hours = [(int(start), self._labels(names), sums) for (start, names), sums in counted]
        db.executemany(ADD_SUMS, self._rows(hours))
        names = [(number, name) for name, number in itertools.islice(self.numbers.items(), self._kept, None)]
        db.executemany("INSERT INTO names VALUES (?, ?)", names)
        self._kept = len(self.numbers)
        db.executemany("INSERT INTO models VALUES (?, ?)", self._new_models)
        self._new_models.clear()
        self._sums.clear()

    def _rows(self, hours: list[tuple[int, tuple[int, ...], list[int]]]) -> Iterator[list[int]]:
        """What is to be added to the table, for each row of SUMS; the finest comes as it was counted."""
        for start, (key, *others), sums in hours:
            yield [0, key, start, *others, *clamped(sums)]
        spans = {start: self.calendar.spans(start) for start, *_ in hours}
        for number, cut in enumerate(SUMS[1:], 1):
            keeps = [name in cut.labels for name in LABELS]
            groups: dict[tuple[int, ...], list[int]] = {}
            for start, labels, sums in hours:
                kept = [label if keep else 0 for label, keep in zip(labels, keeps, strict=True)]
                group = (int(spans[start][cut.span].start), *kept)
                before = groups.get(group)
                groups[group] = list(map(operator.add, before, sums)) if before else sums
            for (start, key, *others), sums in groups.items():
                yield [number, key, start, *others, *clamped(sums)]


AnyView = CounterView | SumView

# The index

SQLITE_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # the last: a table is missing


class Misfit(Exception):
    """What is kept does not fit the ledger, the program or the secret; the message says why."""


class Index:
    """The index of one folder. All methods belong to one thread, and raise OSError where the ledger cannot be read."""

    FILE = "index.sqlite"
    BATCH = 32 << 20  # bytes of lines in one transaction, while much is read
    SQLITE_PAGE = 4096  # bytes of SQLite's pages
    # Derived, of one process and one thread: nobody else may lock it, and no shared memory is needed (EXCLUSIVE). A
    # power cut may take the last seconds, but must not tear it (NORMAL: the WAL is synced before it is moved).
    PRAGMAS = (
        "PRAGMA locking_mode = EXCLUSIVE",
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = NORMAL",
        f"PRAGMA page_size = {SQLITE_PAGE}",
        "PRAGMA cache_size = -16384",
        "PRAGMA temp_store = MEMORY",
        "PRAGMA trusted_schema = OFF",
    )

    def __init__(self, directory: Path, calendar: Calendar, now: float, secret: bytes = b"") -> None:
        self.directory, self.ledger = directory, LedgerFiles(directory)
        self.failure = ""  # why it is in memory
        self.is_stopping = False  # set by another thread: whatever takes long ends soon
        self.pause_s = 0.0  # between two steps, in which the event loop goes on
        self.calendar = calendar
        self.counters, self.sums = CounterView(calendar), SumView(calendar)
        self.views: tuple[AnyView, ...] = (self.counters, self.sums)  # in the order in which a start needs them
        self._now, self._secret = now, secret
        self._db: sqlite3.Connection

    def open(self) -> None:
        """Go on from what is kept, as far as it fits."""
        path = self.directory / self.FILE
        try:
            if path.exists() and path.stat().st_size % self.SQLITE_PAGE:  # SQLite takes what is missing for zeros
                log.warning("index: made anew: it was cut")
                self.remove(self.directory)
            self._connect(path)
            kept = dict(self._db.execute("SELECT name, value FROM meta"))
            is_signed = kept.get("signature") == self._signature()
            for view in self.views:
                try:
                    self._load(view, kept, is_signed)
                except (Misfit, TypeError, *UNCOUNTABLE) as error:
                    self._empty(view, str(error))
        except (sqlite3.Error, OSError) as error:
            self._begin_anew(error)

    def open_in_memory(self) -> None:
        """Begin from nothing, and leave no trace."""
        self._connect(":memory:")
        for view in self.views:
            self._empty(view)

    def _connect(self, path: Path | str) -> None:
        if isinstance(path, Path):
            os.close(open_shared(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))  # with the mode of the ledger's files
        self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        for pragma in self.PRAGMAS:
            self._db.execute(pragma)
        if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._db.executescript(f"BEGIN; {SCHEMA} COMMIT;")

    def _begin_anew(self, error: Exception) -> None:
        """Begin from nothing: in a new file where the old one was damaged or foreign; else in memory."""
        with contextlib.suppress(AttributeError, sqlite3.Error):
            self._db.close()
        try:
            # Never otherwise: a file that is locked or cannot be written may be another's.
            if (
                isinstance(error, OSError)
                or getattr(error, "sqlite_errorcode", SQLITE_DAMAGE[0]) & 0xFF not in SQLITE_DAMAGE
            ):
                raise error
            log.warning("index: made anew: %s", error)
            self.remove(self.directory)
            self._connect(self.directory / self.FILE)
        except (sqlite3.Error, OSError) as why:
            self.failure = str(why)
            log.warning("index: it is in memory, and made anew at each start: %s", why)
            self._connect(":memory:")
        for view in self.views:
            self._empty(view)

    @classmethod
    def remove(cls, directory: Path) -> None:
        """Delete the index of a folder. Raises OSError."""
        for suffix in ("-wal", "-journal", "-shm", ""):
            (directory / f"{cls.FILE}{suffix}").unlink(missing_ok=True)

    def _load(self, view: AnyView, kept: dict[str, bytes], is_signed: bool) -> None:
        """Go on from what is kept of a view. Raises Misfit."""
        if view.name not in kept:
            raise Misfit
        if kept[view.name] != view.fingerprint:
            raise Misfit("they are of another version, or another time zone")
        if not is_signed:
            raise Misfit("the signature is wrong: the index was changed, or signed with another sealing secret")
        rows = self._db.execute("SELECT month, state FROM positions WHERE view = ?", (view.name,))
        view.positions = {month: msgspec.json.decode(state, type=Position) for month, state in rows}
        self._check_files(view)
        view.load(self._db)

    def _empty(self, view: AnyView, why: str = "") -> None:
        """Let a view begin from nothing."""
        if why:
            log.warning("index: all entries are read again for the %s: %s", view.name, why)
        view.begin()
        with self._transaction():
            for table in view.tables:
                self._db.execute(f"DELETE FROM {table}")
            self._db.execute("DELETE FROM positions WHERE view = ?", (view.name,))
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (view.name, view.fingerprint))

    def _check_files(self, view: AnyView) -> None:
        """Raise Misfit where what was read is not what is there."""
        paths = {month_of(path): path for path in self.ledger.paths()}
        last = max(view.positions, default="")
        for month, position in view.positions.items():
            if month not in paths:
                raise Misfit(f"usage-{month}.jsonl is gone")
            if not position.still_fits(paths[month], month == last):
                raise Misfit(f"lines of {paths[month].name} are gone or were changed")
        for month in paths:
            if month < last and month not in view.positions:
                raise Misfit(f"usage-{month}.jsonl has come, and is older than what was read")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Run statements as one, with the signature of what they leave. Raises sqlite3.Error."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('signature', ?)", (self._signature(),))
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _signature(self) -> bytes:
        """A keyed hash over how far the files were read and what limits have counted.

        Sums are not in it: they are many, and decide nothing. A whole older index fits its own signature and is
        harmless: the lines since then are counted.
        """
        mac = hmac.new(self._secret, digestmod="sha256")
        for query in (
            "SELECT name, value FROM meta WHERE name != 'signature' ORDER BY name",
            "SELECT view, month, state FROM positions ORDER BY view, month",
            "SELECT scope, name, state FROM counters ORDER BY scope, name",
        ):
            for row in self._db.execute(query):
                for value in row:
                    data = value.encode() if isinstance(value, str) else value
                    mac.update(len(data).to_bytes(8, "little") + data)
        return mac.digest()

    def close(self) -> None:
        """Let go of the file. What was not read is read at the next start."""
        self._db.close()

    # Follow the files

    def catch_up(self, view: AnyView) -> None:
        """Count the lines that have come, a step at a time; all lines again where some are gone."""
        self._caught_up(view, Groups)

    def _caught_up(self, view: AnyView, answer: Callable[[], Groups]) -> Groups:
        """Catch up, and answer; once more in an index made anew where the disk is full, or its file damaged."""
        try:
            self._catch_up(view)
            return answer()
        except (sqlite3.Error, TypeError, *UNCOUNTABLE) as error:
            if self.failure:
                raise  # it is in memory: a bug
            self._begin_anew(error)
        for each in self.views[: self.views.index(view) + 1]:
            self._catch_up(each)
        return answer()

    def _catch_up(self, view: AnyView) -> None:
        try:
            self._check_files(view)
        except Misfit as error:
            self._empty(view, str(error))
        if view is self.counters and not view.positions:
            self.counters.fold.fresh_since = self._fresh_since()
        newest, unreadable = max(view.positions, default=""), Unreadable()
        for path in self.ledger.paths():
            if month_of(path) >= newest and not self.is_stopping:
                self._follow(view, path, unreadable)
        if unreadable.count and view is self.counters:
            log.warning("ledger: %s", unreadable)
        self.counters.fold.fresh_since = -math.inf

    def _follow(self, view: AnyView, path: Path, unreadable: Unreadable) -> None:
        """Count what has come to a file."""
        month = month_of(path)
        position = view.positions.setdefault(month, Position())
        if not position.has_news(path.stat()):
            return
        saved = position.offset
        for lines in whole_lines(path, position.offset):
            position.count(view, lines, path, unreadable)
            if position.offset - saved >= self.BATCH:
                self._save(view, month)
                saved = position.offset
            if self.is_stopping:
                return self._save(view, month)
            if self.pause_s:
                time.sleep(self.pause_s)
        position.is_whole = True
        self._save(view, month)

    def _save(self, view: AnyView, month: str) -> None:
        with self._transaction():
            view.save(self._db)
            row = (view.name, month, msgspec.json.encode(view.positions[month]))
            self._db.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", row)

    def _fresh_since(self) -> float:
        """When the last sliding windows began, whether the clock is ahead now or was at the last line."""
        now = self._now
        with contextlib.suppress(*UNCOUNTABLE, OSError, IndexError):
            last = LedgerFiles.last_line(self.ledger.paths()[-1])
            now = min(now, POSTING_DECODER.decode(last).time.timestamp())
        return now - self.calendar.sliding_s - STEP_S

    # Ask

    def ask(
        self,
        by: Sequence[str],
        where: Mapping[str, str] = {},
        since: float = -math.inf,
        until: float = math.inf,
        columns: Sequence[str] = AMOUNTS,
        most_rows: int = -1,
    ) -> Groups:
        """Sums of `columns` over the hours that begin in [since, until), in seconds since 1970, by group.

        Groups are of `by` (hour, day, month and LABELS), of calls that are `where` (LABELS). `most_rows` bounds what is
        read of the table, where it is not -1: about 31 rows make a month, one an hour or a day.
        """

        def answer() -> Groups:
            is_daily = "hour" not in by and self._is_midnight(since) and self._is_midnight(until)
            labels = [name for name in by if name in LABELS]
            cut = max(
                number
                for number, row in enumerate(SUMS)
                if {*labels, *where} <= set(row.labels) and (is_daily or row.span == "clock_hour")
            )
            conditions = ["cut = ?", "start >= ?", "start < ?"]
            values: list[float] = [cut, max(since, -1e15), min(until, 1e15)]
            for name, value in where.items():
                conditions.append(f"{name} = ?")
                values.append(self.sums.numbers.get(value, -1))
            if "key" not in where:  # the rows of a key lie together: so the time is looked up in each of them
                conditions.append(f"key IN ({', '.join(map(str, self._key_numbers()))})")
            groups = labels.copy()
            if len(labels) < len(by):
                groups.append("start")
            amounts = ", ".join(f"sum({name})" for name in columns)
            query = f"SELECT {', '.join([*groups, amounts])} FROM sums WHERE {' AND '.join(conditions)}"
            if groups:
                query += f" GROUP BY {', '.join(groups)}"
            rows = self._db.execute(f"{query} LIMIT {most_rows}", values).fetchall()
            return self._grouped(by, labels, rows, len(groups))

        return self._caught_up(self.sums, answer)

    def _grouped(self, by: Sequence[str], labels: list[str], rows: list[Any], count: int) -> Groups:
        """Rows with numbers of labels (and the start of an hour or day) as groups with names."""
        names, found = {number: name for name, number in self.sums.numbers.items()}, Groups()
        for row in rows:
            if row[-1] is None:  # a sum over nothing
                continue
            values = {label: names.get(number, OTHERS) for label, number in zip(labels, row, strict=False)}
            for name in by:
                if name not in LABELS:
                    values[name] = self.calendar.label(row[count - 1], name)
            group = tuple(values[name] for name in by)
            before = found.get(group)
            found[group] = list(map(operator.add, before, row[count:])) if before else list(row[count:])
        return found

    def _key_numbers(self) -> set[int]:
        """The numbers of all keys, of calls without a key, and of rows that are not told apart by key (0)."""
        numbers = self.sums.numbers
        keys = {numbers.get(name, -1) for kind, name in self.counters.fold.scopes if kind == "key"}
        return {0, numbers.get("", -1), *keys}

    def _is_midnight(self, at: float) -> bool:
        return math.isinf(at) or self.calendar.spans(at)["day"].start == at

    # Verify

    def differences(self) -> list[str]:
        """What is not as a fold of all lines from nothing makes it, also where it has the right signature."""
        other = Index(self.directory, self.calendar, self._now)
        other.open_in_memory()
        for index in (self, other):
            for view in index.views:
                index.catch_up(view)
        ours, theirs = self._kept(), other._kept()
        return sorted(place for place in ours.keys() | theirs.keys() if ours.get(place) != theirs.get(place))

    def _kept(self) -> dict[str, Any]:
        """What is kept, in words; without sliding windows, of which a fold from nothing counts only the last."""
        kept: dict[str, Any] = {}
        for kind, name, state in self._db.execute("SELECT scope, name, state FROM counters"):
            counters = msgspec.json.decode(state, type=Counters)
            kept[f"the counters of {kind} {name}".rstrip()] = (counters.totals, counters.windows, counters.left)
        names = dict(self._db.execute("SELECT number, name FROM names"))
        for cut, key, start, *rest in self._db.execute("SELECT * FROM sums"):
            labels = [names.get(number, "") for number in (key, *rest[:4])]
            if any(rest[4:]):
                kept[f"the sums of {SUMS[cut].span} {utc_time(start)}: {', '.join(labels)}"] = rest[4:]
        return kept


class Books:
    """The counters of a running gateway on its event loop, and the index in a thread of its own."""

    FOLLOW_S = 1.0
    PAUSE_S = 0.001  # between two steps of the index that no call waits for
    MOST_ROWS = 200_000  # that are read for an answer: whoever gets so many has more groups than anybody is shown

    def __init__(
        self, ledger: Ledger, clock: Clock, timezone: dt.tzinfo, secret: bytes = b"", windows: Windows = WINDOWS
    ) -> None:
        self.ledger = ledger
        self.calendar = Calendar(timezone, windows)
        self.fold = Fold(self.calendar)
        self._clock = clock
        self._index = Index(ledger.directory, self.calendar, clock.wall(), secret)
        self._thread = ThreadPoolExecutor(1, "index")
        self._following: ThreadFuture[None] | None = None  # None until the counters are there
        self._followed_at = clock.monotonic()
        ledger.on_line = self.take_in

    @property
    def entries(self) -> int:
        """Lines of the ledger that the index has read."""
        return self._index.counters.entries

    def start(self) -> ThreadFuture[Scopes]:
        """Open the ledger, and have its lines counted in the thread; then `begin`. Raises OSError."""
        self.ledger.open()
        return self._thread.submit(self._open)

    def _open(self) -> Scopes:
        started, view = time.monotonic(), self._index.counters
        self._index.open()
        before = view.entries
        self._index.catch_up(view)
        if view.entries > before:
            count, seconds = view.entries - before, time.monotonic() - started
            log.info("ledger: %s entries read in %.1f s", f"{count:,}", seconds)
        scopes = view.fold.scopes.items()
        return {name: msgspec.json.decode(msgspec.json.encode(each), type=Counters) for name, each in scopes}

    def begin(self, counted: Scopes) -> None:
        """Go on from what the thread has counted; it goes on with the sums. No line was appended since the start."""
        self.fold.adopt(counted)
        self._index.pause_s = self.PAUSE_S
        self._following = self._thread.submit(self._follow)

    def load(self) -> None:
        """Start, and wait for it. Raises OSError."""
        self.begin(self.start().result())

    def take_in(self, line: LedgerLine, text: bytes) -> None:
        """Count a line of the ledger. One that cannot be read counts nothing; the index finds it, too, and warns."""
        try:
            if isinstance(line, Entry):  # as `post` would count its text, without decoding that
                self.fold.count(line, dt.datetime.fromisoformat(line.time).timestamp(), requests=1)
            else:
                self.fold.post((POSTING_DECODER.decode(text),))
        except UNCOUNTABLE:
            return

    def tick(self) -> None:
        """Have the index follow the ledger; to be called often."""
        if self._following and self._following.done() and self._clock.monotonic() - self._followed_at >= self.FOLLOW_S:
            self._followed_at = self._clock.monotonic()
            self._following = self._thread.submit(self._follow)

    def _follow(self) -> None:
        try:
            for view in self._index.views:
                self._index.catch_up(view)
        except OSError as error:
            log.warning("index: the ledger cannot be read: %s", why_not(error))

    async def ask(
        self, by: Sequence[str], where: Mapping[str, str], since: float = -math.inf, until: float = math.inf
    ) -> Groups:
        """Sums, as `Index.ask` gives them. The line that was written last is in them. Raises OSError."""
        question = self._thread.submit(self._index.ask, by, where, since, until, AMOUNTS, self.MOST_ROWS)
        return await asyncio.wrap_future(question)

    def close(self) -> None:
        """Let go of the index; what it has not read is read at the next start."""
        self._index.is_stopping = True
        if self._following:
            self._thread.submit(self._index.close)
            self._following = None
        self._thread.shutdown(wait=True)


# --- 11. Waiting: queues with turns, bounds and deadlines -------------------------
# Offers: Waiter, WaitQueues

T = TypeVar("T")


class Waiter(Generic[T]):
    """A call that waits. `done` is resolved with what it waits for, or with the refusal that ends its wait."""

    __slots__ = ("asked", "call", "done", "queue_name", "until")

    def __init__(self, call: Call, until: float) -> None:
        self.call = call
        self.asked: asyncio.Future[Any] | None = None  # whether it is its turn: not answered yet
        self.until = until  # monotonic
        self.queue_name: Hashable = None  # what it waits for; None as long as it stands apart
        self.done: asyncio.Future[T | GatewayError] = asyncio.get_running_loop().create_future()

    def end(self, result: T | GatewayError) -> None:
        """End the wait, if it has not ended."""
        if not self.done.done():
            self.done.set_result(result)

    async def wait(self, gone: asyncio.Future[Any], if_gone: T | GatewayError) -> T:
        """Wait for the result; once the client has left (`gone` is resolved), for `if_gone`. Raises the refusal."""

        def leave(_: object) -> None:
            self.end(if_gone)

        gone.add_done_callback(leave)
        try:
            result = await self.done
        finally:
            gone.remove_done_callback(leave)
        if isinstance(result, GatewayError):
            raise result
        return result


W = TypeVar("W", bound=Waiter[Any])


Queue = OrderedDict[str, OrderedDict[W, None]]  # by key; the first key is the next to be served


class WaitQueues(Generic[W]):
    """All calls that wait for things of one kind, in a queue for each thing; has the bounds and deadlines.

    In a queue the calls of one key stand in the order in which they came, and the keys have turns. A full queue belongs
    to nobody: the newest call of the key that has most waiting makes room for a key that has fewer (longest queue
    drop). `result_of` makes what ends a wait that was dropped, has lasted too long, or is left at the end. As long as
    it is not clear what a call will have to wait for, it stands apart, in a queue without a bound, whose name is None.
    """

    def __init__(self, bound: int, clock: Clock, result_of: Callable[[W], Any]) -> None:
        self._bound, self._clock, self._result_of = bound, clock, result_of
        self.size = 0
        self._apart: Queue[W] = OrderedDict()
        self.queues: OrderedDict[Hashable, Queue[W]] = OrderedDict()

    def __iter__(self) -> Iterator[W]:
        queues = [self._apart, *self.queues.values()]
        return iter([waiter for queue in queues for waiters in queue.values() for waiter in waiters])

    @property
    def apart(self) -> list[W]:
        """Who stands apart."""
        return [waiter for waiters in self._apart.values() for waiter in waiters]

    def push(self, name: Hashable, waiter: W) -> None:
        """Let a call wait in a queue, or apart (None). Where the queue is full, the wait of one call in it ends."""
        self.remove(waiter)
        queue = self._apart
        if name is not None:
            queue = self.queues.setdefault(name, OrderedDict())
        own = queue.setdefault(waiter.call.key.name, OrderedDict())
        own[waiter] = None
        waiter.queue_name = name
        self.size += 1
        if name is not None and sum(map(len, queue.values())) > self._bound:
            longest = max([own, *queue.values()], key=len)  # the first of several
            dropped = next(reversed(longest))
            dropped.end(self._result_of(dropped))
            self.remove(dropped)

    def firsts(self, name: Hashable) -> Iterator[W]:
        """The first call of each key in a queue whose wait has not ended, in the order of their turns."""
        for waiters in self.queues.get(name, {}).values():
            for waiter in waiters:
                if not waiter.done.done():
                    yield waiter
                    break

    def remove(self, waiter: W, is_served: bool = False) -> None:
        """Take one out, wherever it stands, if it still waits. If it is served, its key comes last next time."""
        name, key = waiter.queue_name, waiter.call.key.name
        waiter.queue_name = None
        queue = self.queues.get(name, self._apart)
        waiters = queue.get(key)
        if waiters is None or waiter not in waiters:
            return
        if is_served:
            queue.move_to_end(key)
        del waiters[waiter]
        self.size -= 1
        if not waiters:
            del queue[key]
        if not queue and name is not None:
            del self.queues[name]

    def check(self, stood_s: float = 0.0) -> None:
        """End the waits that have lasted long enough, the `stood_s` for which the loop stood still not counted."""
        now = self._clock.monotonic()
        for waiter in self:
            waiter.until += stood_s
            if now >= waiter.until and not waiter.done.done():
                waiter.end(self._result_of(waiter))

    def close(self) -> None:
        """End every wait."""
        for waiter in self:
            waiter.end(self._result_of(waiter))


# --- 12. Limits: may this key spend now? ------------------------------------------
# Offers: BodyMemory, CounterStore, limit_phrase, Limits, MemoryStore, NANO, Reservation

# The problem. What a call costs is known when it ends, and many run at once: fifty calls that all see "$9.90 of $10.00
# spent" would all go. So a call is admitted by what is spent *and held*: before it goes it holds an estimate of its
# cost in every window of its key, its team and the gateway, in all of them or in none. Its ledger entry counts in full;
# then what it held is given back. A limit is passed by no more than running calls cost beyond their estimates.
#
# The states of a call, and what moves it:
#
#     new      -> admitted   enter: a slot of each budget that has `concurrent`, and one request
#     new      -> waiting    enter: a budget has no slot left; the slots that the call has so far stay its own
#     waiting  -> waiting    a slot was returned, and the next budget has none: the call waits there
#     waiting  -> admitted   a slot was returned, the last that was missing
#     waiting  -> refused    `limits.queue` is over, a full queue dropped it, its client left, a reload took its key,
#                            a limit is spent, or the store failed
#     admitted -> deferred   its body is not whole after 5 s: slots and request go back, and it is new once it is whole
#     admitted -> reserved   admit: the tokens and the money of its estimate; or refused
#     reserved -> reserved   charge: more tokens and money, which an attempt that failed has cost
#                            return_slots: its client has left, and its answer is read on for the ledger without a slot
#     any      -> over       release: all goes back, and whoever waits for a slot of these budgets is served
#
# There are two steps because a refusal must come before the body is read, and an estimate needs the body. The request
# counts in the first: 50 calls whose bodies dripped for more than a minute passed a limit of 5 a minute.
#
# Slots, an example. Alice and bob may have 2 calls at once, the gateway 3. Alice sends 9 calls: 2 run, 7 wait in her
# own queue. Bob sends 2: 1 runs, 1 has bob's slot and waits in the gateway's queue. One of alice's ends: her slot goes
# to her next call, which joins the gateway's queue behind bob's; the gateway's slot goes to bob. So a slot is handed to
# the first of one queue, and no other call is looked at.
#
# Money, an example. $20 a day, $19.50 spent, a running call holds $0.30. A call with an input of $0.15 and up to $0.40
# of output is admitted: the input must fit, of the output $0.05 are held. One with an input of $0.25 has to come again
# ("held by running calls"), one with $0.60 is refused until midnight.
#
# Given up: one queue for all budgets (a freed slot had to look at every call that waited), and numbers leased to each
# process in advance (a limit of 5 requests cannot be shared out among 4 processes).

NANO = {"tokens": 1.0, "requests": 1.0, "usd": 1e9}  # money is counted in nano-USD


def short_number(number: float) -> str:
    """`12.3M`, `50k`, `7`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}".removesuffix(".0") + letter
    return f"{number:g}"


def amount_text(unit: str, *amounts: float) -> str:
    """Return amounts of a limit in words: `$3.20 of $20.00`, `12.3M of 50M tokens`; money in USD."""
    texts = []
    for amount in amounts:
        if unit != "usd":
            texts.append(short_number(amount))
        elif 0 < amount < 0.1:
            texts.append(f"${amount:.4f}")
        else:
            texts.append(f"${amount:,.2f}")
    if unit != "usd":
        texts[-1] += f" {unit}"
    return " of ".join(texts)


def reset_text(at: float, timezone: dt.tzinfo) -> str:
    """`resets Mon 28 Sep 00:00 UTC`."""
    local = dt.datetime.fromtimestamp(at, timezone)
    return f"resets {local:%a} {local.day} {local:%b %H:%M} {local.tzname()}"


class Standing(NamedTuple):
    """How a limit stands, before a call that needs so much of it; amounts in the limit's unit, money in nano-USD."""

    budget: Budget
    limit: Limit
    used: float
    held: float
    allowed: float
    resets_at: float | None = None  # seconds since 1970; None where it does not reset
    need: float = 0
    wait_s: int = 0  # of a sliding window that is in the way: when it has room again; 0 where it never will

    def row(self, timezone: dt.tzinfo) -> dict[str, Any]:
        """Return it for people, money in USD."""
        scale = NANO.get(self.limit.unit, 1)
        used, allowed = round(self.used / scale, 9), self.limit.amount
        return {
            "limit": self.limit.name,
            "scope": self.budget.scope,
            "used": used,
            "reserved": round(self.held / scale, 9),
            "allowed": allowed,
            "remaining": round(max(0, allowed - used), 9),
            "resets_at": self.resets_at and utc_time(self.resets_at),
            "resets": self.resets_at and reset_text(self.resets_at, timezone),
        }


def limit_phrase(row: Mapping[str, Any]) -> str:
    """`$3.20 of $20.00 today`, `12.3M of 50M tokens this month (team)`, of a row of `Limits.standings`."""
    unit, _, window = row["limit"].partition("/")
    scope = "" if row["scope"] == "key" else f" ({row['scope']})"
    return f"{amount_text(unit, row['used'], row['allowed'])} {WINDOWS[window].phrase}{scope}"


class Demand(msgspec.Struct, frozen=True):
    """What a call asks to hold, by unit: `need` must fit; of `output` tokens as many as fit beside it."""

    need: Mapping[str, int]
    output: float
    per_token: Mapping[str, float]  # of an output token


NOTHING_MORE = Demand({"tokens": 0, "usd": 0}, 0, {"tokens": 0, "usd": 0})  # fits where no limit is used up
ONE_REQUEST = Demand({"tokens": 0, "usd": 0, "requests": 1}, 0, {"tokens": 0, "usd": 0, "requests": 0})


class Hold:
    """What one call holds of its budgets. The store alone changes it, except for `budgets`."""

    # Of a store that has the budgets' numbers here: these, and all their limits with what each allows (nano-USD).
    scopes: Sequence[tuple[Budget, Scope]] = ()
    limits: Sequence[tuple[Budget, Scope, Limit, float]] = ()
    slots = 0  # so many of the budgets, from the first on, have given it a slot
    step: int | None = None  # in which its request counts (`STEP_S`)

    def __init__(self, budgets: Sequence[Budget]) -> None:
        self.budgets = budgets
        self.amounts: dict[str, int] = {}


Reply = Standing | asyncio.Future[Standing | None] | None
CONCURRENT = "concurrent"  # the unit of slots


class CounterStore(Protocol):
    """The numbers of all budgets: what is spent, by the ledger's counters, and what running calls hold. By unit.

    Each method is one step: nothing of another call comes between its look and its change. `enter` and `reserve` return
    the limit that is in the way, None where none is; a store that has to ask elsewhere returns a future of that, which
    raises if it cannot be asked, and is cancelled by whoever waits no longer. It does what concerns one hold in the
    order in which it was asked (`settle` may come before an answer, and after an error), and answers `find_spent` and
    `standings` by what it knows at the moment.

    enter       return a limit that has no room for one request more. Else take the slots that are missing, one budget
                after the other: a standing of the unit CONCURRENT says which has none left. With all of them, hold the
                request. What was taken stays held.
    reserve     hold what `demand` asks for in all windows, or nothing
    charge      hold more, though it may pass a limit: it is spent already
    settle      give everything back, or the slots alone
    find_spent  return a limit of tokens or money that is used up, by what is spent and held
    standings   return how each limit of the hold's budgets stands
    close       do what it was asked so far, and go: no call runs any more
    """

    def enter(self, hold: Hold) -> Reply: ...
    def reserve(self, hold: Hold, demand: Demand) -> Reply: ...
    def charge(self, hold: Hold, amounts: Mapping[str, int]) -> None: ...
    def settle(self, hold: Hold, slots_only: bool = False) -> None: ...
    def find_spent(self, hold: Hold) -> Standing | None: ...
    def standings(self, hold: Hold) -> list[Standing]: ...
    async def close(self) -> None: ...


def slots_standing(budget: Budget, running: int) -> Standing:
    """Return how `concurrent` of a budget stands."""
    return Standing(budget, Limit(CONCURRENT, WINDOWS[""], budget.concurrent), running, 0, budget.concurrent)


class Scope:
    """The numbers of a key, a team or the gateway. Survives reloads."""

    __slots__ = ("admitted", "counters", "reserved", "running")

    def __init__(self, counters: Counters) -> None:
        self.counters = counters  # what is spent
        self.running = 0
        self.reserved = {"tokens": 0, "usd": 0}  # usd in nano-USD
        self.admitted = defaultdict[int, int](int)  # running calls, by the step (`STEP_S`) in which they were admitted

    def held(self, limit: Limit, now: float) -> int:
        """What running calls hold of a limit. In a sliding window a request counts when it is admitted, not later."""
        if limit.unit != "requests":
            return self.reserved[limit.unit]
        if limit.window.kind != "sliding":
            return sum(self.admitted.values())
        first, last = steps_of(now, limit.window.seconds)
        return sum([calls for step, calls in self.admitted.items() if first <= step <= last])


class MemoryStore:
    """The numbers in this process (`CounterStore`): what is held in scopes, what is spent in the fold of the ledger."""

    def __init__(self, fold: Fold, clock: Clock) -> None:
        self._fold, self._now = fold, clock.wall
        self._scopes: dict[tuple[str, str], Scope] = {}  # by the budget's id
        self._opened: dict[str, tuple[Any, ...]] = {}  # budgets, scopes and limits, by the name of the first budget

    def _open(self, hold: Hold) -> None:
        """Have the numbers of a hold's budgets in it. They are looked for once for each key and snapshot."""
        budgets = hold.budgets
        name = budgets[0].name  # the key's own
        if name not in self._opened or self._opened[name][0] is not budgets:
            scopes = [(budget, self._scope(budget)) for budget in budgets]
            limits = [(*pair, limit, limit.amount * NANO[limit.unit]) for pair in scopes for limit in pair[0].limits]
            self._opened[name] = budgets, scopes, limits
        _, hold.scopes, hold.limits = self._opened[name]

    def _scope(self, budget: Budget) -> Scope:
        if budget.id not in self._scopes:
            counters = Counters()  # nothing is ever spent on count_tokens
            if budget.scope != "count_tokens":
                counters = self._fold.scope(budget.scope, budget.name)
            self._scopes[budget.id] = Scope(counters)
        return self._scopes[budget.id]

    def _fit(self, hold: Hold, demand: Demand, now: float) -> Standing | float:
        """Return how many output tokens fit beside what is needed in every limit, or a limit in which that does not."""
        if not hold.scopes:
            self._open(hold)
        output, per_token = demand.output, demand.per_token
        for budget, scope, limit, allowed in hold.limits:
            unit = limit.unit
            need = demand.need.get(unit)
            if need is None:
                continue
            used = scope.counters.spent(unit, limit.window, now)
            held = scope.held(limit, now) if unit == "requests" else scope.reserved[unit]
            taken = used + held + need
            if used >= allowed or taken > allowed:
                return self._standing(budget, scope, limit, now, need)
            if output * per_token[unit] > allowed - taken:
                output = (allowed - taken) / per_token[unit]
        return output

    def _standing(self, budget: Budget, scope: Scope, limit: Limit, now: float, need: int = 0) -> Standing:
        allowed, window = limit.amount * NANO[limit.unit], limit.window
        used, held = scope.counters.spent(limit.unit, window, now), scope.held(limit, now)
        wait_s = 0
        if window.kind == "sliding" and need <= allowed:
            waits = range(STEP_S - int(now) % STEP_S, window.seconds, STEP_S)
            for wait_s in (*waits, window.seconds):
                taken = scope.counters.spent(limit.unit, window, now + wait_s) + scope.held(limit, now + wait_s)
                if taken + max(need, 1) <= allowed:
                    break
        resets_at = scope.counters.resets_at(window, now, self._fold.calendar)
        return Standing(budget, limit, used, held, allowed, resets_at, need, wait_s)

    def enter(self, hold: Hold) -> Standing | None:
        now = self._now()
        fits = self._fit(hold, ONE_REQUEST, now)
        if isinstance(fits, Standing):
            return fits
        for budget, scope in hold.scopes[hold.slots :]:
            if scope.running >= budget.concurrent:
                return slots_standing(budget, scope.running)
            scope.running += 1
            hold.slots += 1
        step = hold.step = int(now // STEP_S)
        for _, scope in hold.scopes:
            scope.admitted[step] += 1
        return None

    def reserve(self, hold: Hold, demand: Demand) -> Standing | None:
        output = self._fit(hold, demand, self._now())
        if isinstance(output, Standing):
            return output
        per_token = demand.per_token
        self.charge(hold, {unit: need + int(output * per_token[unit]) for unit, need in demand.need.items()})
        return None

    def charge(self, hold: Hold, amounts: Mapping[str, int]) -> None:
        for unit, amount in amounts.items():
            hold.amounts[unit] = hold.amounts.get(unit, 0) + amount
            for _, scope in hold.scopes:
                scope.reserved[unit] += amount

    def settle(self, hold: Hold, slots_only: bool = False) -> None:
        for _, scope in hold.scopes[: hold.slots]:
            scope.running -= 1
        hold.slots = 0
        if slots_only:
            return
        step = hold.step
        for _, scope in hold.scopes:
            for unit, amount in hold.amounts.items():
                scope.reserved[unit] -= amount
            if step is not None:
                scope.admitted[step] -= 1
                if not scope.admitted[step]:
                    del scope.admitted[step]
        hold.step = None
        hold.amounts = {}
        hold.scopes = ()

    def find_spent(self, hold: Hold) -> Standing | None:
        fits = self._fit(hold, NOTHING_MORE, self._now())
        return fits if isinstance(fits, Standing) else None

    def standings(self, hold: Hold) -> list[Standing]:
        rows, now = [], self._now()
        self._open(hold)
        for budget, scope in hold.scopes:
            rows += [self._standing(budget, scope, limit, now) for limit in budget.limits]
            if math.isfinite(budget.concurrent):
                rows.append(slots_standing(budget, scope.running))
        return rows

    async def close(self) -> None:
        pass


class BodyMemory:
    """The bytes of request bodies that the gateway holds, of all calls together at most `total`.

    A call takes its Content-Length before its body is read (in chunks: as they come), and gives it back with the first
    content of an answer, or at its end. So that one key's calls cannot take everything, a key may hold no more than is
    still free: the dynamic threshold of switches whose ports share a buffer (Choudhury and Hahne 1998). One busy key
    gets half of the memory, two get a third each, and there is room for whoever comes next. An example with 256 MB: of
    bodies of 30 MB one key has four (120 MB, 136 are free; a fifth would make it 150 and 106).

    Not counted: two more copies while thinking is taken out of a body, one call at a time; what TLS, and asyncio before
    Python 3.12 without uvloop, copy of what the upstream has not read yet.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0
        self._by_key = defaultdict[str, int](int)

    def take(self, reservation: Reservation, size: int) -> None:
        """Hold so many bytes (more) for the body of a call. Raises TooLarge or Unavailable."""
        name = reservation.call.key.name
        free = self.total - self.held - size
        of_key = self._by_key[name]
        if reservation.body_bytes + size > self.total:
            raise TooLarge(f"The request body is larger than {self.total:,} bytes, the limit of all: server.memory.")
        has_others = of_key > reservation.body_bytes  # of this key
        if free < 0 or (has_others and of_key + size > free):
            text = (
                f"The bodies of all calls, or those of this key, take too much memory (server.memory: {self.total:,})."
            )
            raise Unavailable(f"{text} Try again in a moment.", retry_after_s=5)
        self.held += size
        self._by_key[name] += size
        reservation.body_bytes += size

    def give_back(self, reservation: Reservation) -> None:
        """Hold a call's body no more."""
        self.held -= reservation.body_bytes
        self._by_key[reservation.call.key.name] -= reservation.body_bytes
        reservation.body_bytes = 0


class Reservation(Hold):
    """What one call holds, from its head until it is booked: bytes for its body, and what the store holds for it.

    A context manager: leaving it gives everything back, whatever happened.
    """

    body_bytes = 0
    waiter: Waiter[bool] | None = None  # where it had to wait for a slot
    is_deferred = False  # it enters again when its body is whole

    def __init__(self, limits: Limits, memory: BodyMemory, call: Call) -> None:
        super().__init__(limits.budgets(call.key, call.route.kind))
        self._limits, self._memory = limits, memory
        self.call = call

    def hold_body(self, size: int) -> None:
        """Hold so many bytes (more) for the body. Raises TooLarge or Unavailable."""
        if size:
            self._memory.take(self, size)

    def give_back_body(self) -> None:
        """The body is not needed any more."""
        if self.body_bytes:
            self._memory.give_back(self)

    def defer(self) -> None:
        """Give slots and request back: the body is slow. `Limits.admit` asks for them again once it is whole.

        One key's bodies that dripped for a minute kept its whole team out, at no cost.
        """
        if self.slots == len(self.budgets):  # else it is deferred already; or it waits, which has its own deadline
            self._limits.settle(self)
            self.is_deferred = True

    def release(self) -> None:
        """Give everything back. A second time there is nothing left to give."""
        self._limits.settle(self)
        if self.call.headers or self.body_bytes:  # else it has let go at the first content
            self.call.drop_request()

    def return_slots(self) -> None:
        """Give the slots to those who wait for them; what it holds of tokens and money stays."""
        self._limits.settle(self, slots_only=True)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class Estimates:
    """What a call may cost, by its request and by what upstreams said of earlier calls.

    No rule by bytes holds for each script and each model's tokenizer. So it is learnt per key and model how much more
    input calls have than was estimated: a ratio goes half of the way up to a larger one and a fiftieth of the way down
    to a smaller, and is near to the largest of the last fifty. At least 1, so that padding does not talk it down; what
    one key sends changes no other key's. And it is remembered which models are served by a dearer one.
    """

    MAX_RATIO = 4.0
    MIN_TOKENS = 100  # estimated; of less, what the upstream adds by itself is the larger part
    MAX_PAIRS = 4096
    STORED = 200_000  # tokens that are reserved for input that lies upstream (`previous_response_id`)
    CONTEXT = 1_000_000  # tokens of input that it may have at most, which counts for the price's tier
    IMAGE_USD = 0.25  # of a generated image, which is billed by its tokens: the largest in high quality
    MAX_SERVED = 1000

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, str], float] = {}
        self._served: dict[str, str] = {}  # by the model that was asked: a dearer one that answered in its place

    def learn(self, call: Call, asked: str, entry: Entry) -> None:
        """Take in how much input a call had, cached or not, and who answered for the model `asked` of its upstream."""
        served, config = entry.model_served, call.config
        if served not in ("", asked) and config.price(served).is_known and len(self._served) < self.MAX_SERVED:
            mine, theirs = config.price(asked).base, config.price(served).base
            if theirs.input > mine.input or theirs.output > mine.output:
                self._served[asked] = served
        if call.input_estimate < self.MIN_TOKENS or (call.besides and call.besides.has_stored):
            return
        pair = (call.key.name, call.model)
        before = self._ratios.get(pair, 1.0)
        ratio = min(self.MAX_RATIO, max(1.0, entry.total_input_tokens / call.input_estimate))
        if ratio == before:
            return
        if pair not in self._ratios and len(self._ratios) >= self.MAX_PAIRS:
            del self._ratios[next(iter(self._ratios))]  # the oldest
        share = 0.02
        if ratio > before:
            share = 0.5
        self._ratios[pair] = before + (ratio - before) * share

    def demand(self, call: Call) -> Demand:
        """Return what a call may cost.

        The rule: (input + stored input) x price of input, or of a cache's writes if the body asks for these; the same
        and `reserve_output` for each run of another model by a tool; so many pieces of each hosted tool; all of which
        must fit. Then the output, of which only what is left is held. Tokens have the dearest price and premiums of
        all models that the request or the upstream may turn to.

        An example: 20,000 tokens to a model of $2 and $10 (writes to a cache $2.50), `cache_control`, web_search with
        `max_uses: 8`, an advisor of $5 and $25 (writes $6.25) with `max_uses: 2`, `max_tokens: 4000`. Held are input
        20,000 x 6.25 / 1e6 = $0.125; two runs of 0.125 + 8192 x 25 / 1e6 = $0.6596; searches 8 x 0.01 = $0.08;
        and output 4000 x 25 / 1e6 = $0.10: together $0.9646.
        """
        config, besides = call.config, call.besides
        weights = config.limits.weights
        input_weight = weights.input
        input_tokens = call.input_estimate * self._ratios.get((call.key.name, call.model), 1.0)
        if besides:
            if besides.has_stored:
                input_tokens += self.STORED
            if besides.write:
                input_weight = max(weights.input, weights.cache_write)
        price = self._price(call, math.ceil(input_tokens))
        per_token = {"tokens": weights.output, "usd": price.output * 1e3}  # USD per million, in nano-USD
        need = {
            "tokens": math.ceil(input_tokens * input_weight),
            "usd": math.ceil(input_tokens * price.input * 1e3),
        }
        if besides:
            extras = config.price(call.upstream_model).surcharges
            for unit in need:
                run = need[unit] + config.limits.reserve_output * per_token[unit]
                need[unit] += math.ceil(besides.runs * run)
            pieces = sum(extras.get(name, self.IMAGE_USD) * count for name, count in besides.extras)
            need["usd"] += math.ceil(pieces * NANO["usd"])
        return Demand(need, call.reserved_output, per_token)

    def _price(self, call: Call, input_tokens: int) -> Price:
        """The dearest of those who may serve a call, as far as is known; `input` is what its input costs at most."""
        config, besides = call.config, call.besides or NOTHING_BESIDES
        if not (call.besides or call.premiums or len(call.servings) > 1 or call.upstream_model in self._served):
            return config.price(call.upstream_model).at(input_tokens)  # as most calls are
        if besides.has_stored:
            input_tokens = self.CONTEXT
        names = {call.upstream_model, *(serving.model for serving in call.servings), *besides.models}
        names |= {self._served[name] for name in names if name in self._served}
        rates = []
        for name in names:
            row = config.price(name)
            factor = max(1.0, math.prod(row.premiums(call.premiums).values()))
            rates.append((row.at(input_tokens), factor))
            if besides.has_sound and row.audio:
                rates.append((row.audio, factor))
        if besides.is_unclear:
            rates.append((config.file.prices.dearest().base, max(factor for _, factor in rates)))
        inputs = [price.input * factor for price, factor in rates]
        if besides.write:
            inputs += [getattr(price, besides.write) * factor for price, factor in rates]
        return Price(max(inputs), max(price.output * factor for price, factor in rates))


class Limits:
    """The policy of admission: which budgets a call counts in, who waits, what a refusal says.

    count_tokens is free and counts in no budget. It has a few slots for each key, which are waited for likewise.
    """

    COUNTS = 16  # calls of count_tokens that one key may have at once; Claude Code's /context makes 28
    STORE_S = 5.0  # how long the store may take to answer, beside the time in a queue
    SILENT = "The gateway's counters do not answer."

    def __init__(self, store: CounterStore, clock: Clock, pace: Pace, timezone: dt.tzinfo) -> None:
        self.store = store
        self._clock, self._timezone = clock, timezone
        self.estimates = Estimates()
        self._queues = WaitQueues[Waiter[bool]](pace.queue_calls, clock, self._wait_error)  # by the budget's id
        self._has_failed = False  # the store, when it was asked last

    def budgets(self, key: Key, kind: str = "messages") -> Sequence[Budget]:
        """Return the budgets that a key's calls of a kind count in."""
        if kind == "count_tokens":
            return (Budget("count_tokens", f"calls of {key.name}", (), self.COUNTS),)
        return key.budgets

    @property
    def waiting(self) -> int:
        """How many calls wait for a slot."""
        return self._queues.size

    # The first step: slots and a request

    def enter(self, reservation: Reservation) -> None:
        """Take slots and count a request before the body is read, or wait: `reservation.waiter`.

        Raises LimitSpent or LimitFull. What is held by then, the reservation gives back.
        """
        reply = self.store.enter(reservation)
        if reply is None:
            return
        call = reservation.call
        waiter = reservation.waiter = Waiter[bool](call, self._clock.monotonic() + call.config.limits.queue)
        self._queues.push(None, waiter)
        self._take_in(waiter, reply)
        if waiter.done.done():
            raise cast(GatewayError, waiter.done.result())

    def _take_in(self, waiter: Waiter[bool], reply: Reply) -> None:
        """Move a waiting call by the store's answer: admitted, refused, or to the queue for the slot that it lacks."""
        call = waiter.call
        name = waiter.queue_name
        now = self._clock.monotonic()
        waiter.asked = None
        if isinstance(reply, asyncio.Future):
            waiter.asked = reply
            waiter.until += self.STORE_S
            reply.add_done_callback(lambda reply: self._heard(waiter, reply))
            return
        if waiter.done.done() or call.reservation.waiter is not waiter:
            return  # it has left, or its time is over: its slots come back in a moment
        if reply is None:
            self._queues.remove(waiter, is_served=True)
            call.admitted = now
            waiter.end(True)
        elif reply.limit.unit != CONCURRENT:
            self._queues.remove(waiter, is_served=True)
            waiter.end(self._refusal(call.config, reply))
        elif waiter.until <= now:
            waiter.end(self._too_many(call.reservation))
        elif reply.budget.id == name:
            return
        else:
            self._queues.remove(waiter, is_served=True)
            self._queues.push(reply.budget.id, waiter)
        self._serve(name)

    def _heard(self, waiter: Waiter[bool], reply: asyncio.Future[Standing | None]) -> None:
        """Take in what a store has answered that is asked elsewhere."""
        waiter.until -= self.STORE_S
        name = waiter.queue_name
        is_current = waiter.asked is reply  # else a reload came between
        try:
            standing = self._result(reply)
        except Unavailable as error:
            if is_current:
                waiter.asked = None
                self._queues.remove(waiter)
                waiter.end(error)
                self._serve(name)
            return
        if is_current:
            self._take_in(waiter, standing)

    def _result(self, reply: asyncio.Future[Standing | None]) -> Standing | None:
        """Return what the store has answered. Raises Unavailable where it failed, or is silent until now."""
        reply.cancel()
        if reply.cancelled():
            raise self._no_answer("it is silent")
        error = reply.exception()
        if error:
            raise self._no_answer(str(error))
        self._has_failed = False
        return reply.result()

    def _no_answer(self, why: str) -> Unavailable:
        if not self._has_failed:
            log.error("limits: the store of counters does not answer (%s): calls are refused", why)
        self._has_failed = True
        return Unavailable(self.SILENT, retry_after_s=5)

    def _serve(self, name: Hashable) -> None:
        """Let the first call of a queue ask for the slot that it lacks; if it gets it, the next one asks."""
        waiter = next(self._queues.firsts(name), None)
        if waiter and not waiter.asked:
            self._take_in(waiter, self.store.enter(waiter.call.reservation))

    def _too_many(self, reservation: Reservation) -> LimitFull:
        budget, contact = reservation.budgets[reservation.slots], reservation.call.config.contact
        what = f"More than {budget.concurrent:,.0f} calls at once, the limit of {budget}"
        return LimitFull(f"{what}. Try again in a moment.{contact}", retry_after_s=5)

    def _wait_error(self, waiter: Waiter[bool]) -> GatewayError:
        if waiter.queue_name:
            return self._too_many(waiter.call.reservation)
        if waiter.until <= self._clock.monotonic():
            return self._no_answer("it is silent")
        return Unavailable(self.SILENT, retry_after_s=5)  # the gateway stops

    # The second step: tokens and money

    async def admit(self, call: Call, gone: asyncio.Future[Any]) -> None:
        """Hold what a call may cost, once its body is read and it has its slots. `gone`: resolved if the client leaves.

        Raises LimitSpent, LimitFull, ClientLeft, Unavailable, or what is wrong with the key by now.
        """
        reservation = call.reservation
        if reservation.is_deferred:
            self.enter(reservation)
        if reservation.waiter:
            await reservation.waiter.wait(gone, ClientLeft("The client left while its call waited for its turn."))
        if call.route.kind == "count_tokens":
            return
        reply = self.store.reserve(reservation, self.estimates.demand(call))
        if isinstance(reply, asyncio.Future):
            await asyncio.wait((reply, gone), timeout=self.STORE_S, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                reply.cancel()
                raise ClientLeft("The client left while its call waited for the counters.")
            reply = self._result(reply)
        if reply:
            raise self._refusal(call.config, reply)

    def _refusal(self, config: Config, standing: Standing) -> GatewayError:
        """Say which limit is in the way: LimitFull where waiting may help, else LimitSpent until the window ends."""
        limit, scale, wait_s = standing.limit, NANO[standing.limit.unit], standing.wait_s
        used, held, need = standing.used / scale, standing.held / scale, standing.need / scale
        text = f"The limit {limit.name} of {standing.budget}"
        spent = amount_text(limit.unit, used, limit.amount)
        if used >= limit.amount:
            text += f" is used up: {spent}"
        elif used + need > limit.amount:
            text += f" has too little left: {spent} used, and this call needs about {amount_text(limit.unit, need)}"
        else:
            text += f" is held by running calls: {spent} used, {amount_text(limit.unit, held)} reserved"
            wait_s = wait_s or 5
        if wait_s:
            return LimitFull(f"{text}. Try again in {wait_s} s.{config.contact}", retry_after_s=wait_s)
        if standing.resets_at is None:
            return LimitSpent(f"{text}.{config.contact}")
        reset = reset_text(standing.resets_at, self._timezone)
        after_s = max(1, math.ceil(standing.resets_at - self._clock.wall()))
        return LimitSpent(f"{text}; {reset}.{config.contact}", retry_after_s=after_s)

    # While it runs, and its end

    def charge(self, reservation: Reservation, amounts: Mapping[str, int]) -> bool:
        """Hold more, by unit, that a failed attempt has cost; whether the limits still allow another attempt."""
        self.store.charge(reservation, amounts)
        return self.store.find_spent(reservation) is None

    def settle(self, reservation: Reservation, slots_only: bool = False) -> None:
        """Give back what the store holds for a call, or its slots alone, and serve those who wait for them."""
        if reservation.waiter:
            self._queues.remove(reservation.waiter)
            reservation.waiter = None
        freed = reservation.budgets[: reservation.slots]
        self.store.settle(reservation, slots_only)
        if self._queues.size:
            for budget in reversed(freed):  # the gateway's slot, the team's, then the key's
                self._serve(budget.id)

    def take_config(self, config: Config) -> None:
        """Let those who wait see a new config's limits; who may not use its key any more is told so."""
        # All queues are made anew, those first who were nearest to their turn: a key may have another team now.
        waiters = sorted(self._queues, key=lambda waiter: -waiter.call.reservation.slots)
        for waiter in waiters:
            self._queues.push(None, waiter)
            self.store.settle(waiter.call.reservation)
        for waiter in waiters:
            reservation = waiter.call.reservation
            try:
                key = config.check_again(waiter.call)
            except GatewayError as refusal:
                waiter.end(refusal)
            else:
                reservation.budgets = self.budgets(key, waiter.call.route.kind)
                self._take_in(waiter, self.store.enter(reservation))

    def check(self, stood_s: float = 0.0) -> None:
        """End the waits that have lasted long enough, and see whether the store has slots that others gave back."""
        self._queues.check(stood_s)
        for name in tuple(self._queues.queues):
            self._serve(name)

    def close(self) -> None:
        """End every wait."""
        self._queues.close()

    def standings(self, key: Key) -> list[dict[str, Any]]:
        """Return how each limit of a key stands, as rows for people; money in USD."""
        return [standing.row(self._timezone) for standing in self.store.standings(Hold(self.budgets(key)))]


# === Floor C. Road: how a call reaches an upstream and its answer comes back ========

# --- 13. Wire: heads, header rules, events, no I/O --------------------------------
# Offers: api_of, client_address, downstream_headers, error_event, event_data, EVENT_HEADERS, EventReader,
#   FRAMED_BY, HOST, http_date, models_head, normalize_target, Pieces, PINGS, request_head, Splice, spliced,
#   status_line, UpstreamTarget

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer "
    b"transfer-encoding upgrade".split()
)
FRAMED_BY = frozenset((b"content-length", b"transfer-encoding"))  # either says where a body ends
# The headers of a client that go upstream, and nothing else: what APIs read, and by what clients find their requests
# and sessions again (Claude Code, the official SDKs, Codex, opencode).
FORWARDED = frozenset(
    (
        *("accept", "content-type", "user-agent", "x-app", "openai-beta", "x-openai-subagent", "idempotency-key"),
        *("x-client-request-id", "traceparent", "tracestate", "session-id", "session_id", "thread-id", "thread_id"),
        *("conversation-id", "conversation_id", "originator", "version", "x-session-affinity", "x-parent-session-id"),
    )
)
FORWARDED_STARTS = ("anthropic-", "x-anthropic-", "x-claude-", "x-stainless-", "x-codex-", "x-opencode-")
# Besides hop-by-hop: what describes the upstream's connection, or would bind the client to it; whose account it is;
# and what is left to the key that all share.
NOT_DOWNSTREAM = HOP_BY_HOP | frozenset(
    b"content-length set-cookie alt-svc strict-transport-security ratelimit ratelimit-policy".split()
)
NOT_DOWNSTREAM_STARTS = (
    *(b"anthropic-ratelimit-", b"x-ratelimit-", b"ratelimit-", b"x-rate-limit-", b"x-openai-", b"chatgpt-account"),
    *(b"anthropic-organization", b"anthropic-workspace", b"openai-organization", b"openai-project"),
    *(b"x-codex-primary-", b"x-codex-secondary-", b"x-codex-credits-"),
    *(b"anthropic-priority-", b"anthropic-fast-", b"llm_provider-", b"x-litellm-", b"x-goog-"),
)
MAX_HEADER_NAME = 100  # bytes; what has a longer name is neither sent up nor down, and takes no place in a cache


MAX_HOPS = 32  # in X-Forwarded-For


def client_address(trusted: Sequence[Network], headers: Headers, named: Mapping[bytes, bytes], peer: str) -> str:
    """The peer, or what trusted proxies say of it: the last address in X-Forwarded-For that is none of theirs.

    Where they say something that is no address, it is `unknown`, which is in no network: what stands to the left
    of it may have been written by the client. `named` are the first values of the headers.
    """
    if b"x-forwarded-for" not in named or not address_in(peer, trusted):
        return peer
    forwarded = [value for name, value in headers if name.lower() == b"x-forwarded-for"]
    for hop in reversed(b",".join(forwarded).decode("latin-1").rsplit(",", MAX_HOPS)):
        peer = read_hop(hop)
        if not address_in(peer, trusted):
            break
    return peer or "unknown"


def normalize_target(target: bytes) -> tuple[str, bytes]:
    """Split a request target into path and query; the path decoded, without dots, doubled slashes or a doubled /v1.

    Only what the table of routes then knows is forwarded, and under the table's own spelling (RFC 3986, 6.2.2).
    """
    raw, _, query = target.partition(b"?")
    if raw in PLAIN_TARGETS:
        return raw.decode(), query
    if not raw.startswith(b"/"):
        # Absolute form: the host decides nothing. Else `*` or an authority, which nothing here answers to.
        raw = b"/" + raw.partition(b"://")[2].partition(b"/")[2] if b"://" in raw else b"/*"
    path = urllib.parse.unquote(raw.decode("latin-1"))
    path = posixpath.normpath("/" + path.lstrip("/"))
    if path.startswith("/v1/v1/"):
        path = path.removeprefix("/v1")
    return path, query


HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|(?:[\w.~!$&'()*+;=-]++|%[0-9A-Fa-f]{2})*+)(:\d{0,5})?", re.ASCII)


@functools.lru_cache(maxsize=4)
def http_date(second: int) -> bytes:
    """A time as HTTP writes it, such as `Sat, 31 Jan 2026 12:34:56 GMT`."""
    return email.utils.formatdate(second, usegmt=True).encode()


@functools.lru_cache(maxsize=1024)
def status_line(status: int) -> bytes:
    """The first line of an answer, such as `HTTP/1.1 200 OK`."""
    return b"HTTP/1.1 %d %b" % (status, http.client.responses.get(status, "").encode())


def api_of(path: str) -> Api:
    """In which format a path's errors are written."""
    return (
        "openai" if path.startswith(("/v1/chat", "/v1/responses", "/v1/embeddings", "/v1/completions")) else "anthropic"
    )


@functools.lru_cache(maxsize=1024)  # clients send the same twenty names again and again
def goes_up(name: bytes, passed: tuple[str, ...] = ()) -> bool:
    """Whether a client's header goes upstream; `passed` are the globs that this upstream takes beside the table's."""
    lower = name.decode("latin-1").lower()
    if lower in FORWARDED:
        return True
    if is_withheld(lower):
        return False
    return lower.startswith(FORWARDED_STARTS) or any(matches(glob, lower) for glob in passed)


@functools.lru_cache(maxsize=1024)
def comes_down(name: bytes) -> bool:
    """Whether an answer's header goes to the client."""
    lower = name.lower()
    return lower not in NOT_DOWNSTREAM and not lower.startswith(NOT_DOWNSTREAM_STARTS)


def connection_options(headers: Headers) -> frozenset[bytes]:
    """The header names that `Connection` says are for this hop only (RFC 9110, 7.6.1)."""
    values = [value.lower() for name, value in headers if name.lower() == b"connection"]
    return frozenset(option.strip() for value in values for option in value.split(b","))


class UpstreamTarget(NamedTuple):
    """Where an upstream is, taken from its URL once."""

    host: str
    port: int
    tls: bool
    authority: bytes  # the Host header
    prefix: bytes  # the URL's path, without a slash at the end
    proxy: tuple[str, int, str] | None  # host, port, and the value of Proxy-Authorization or ""

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, url: str, proxy: str | None) -> UpstreamTarget:
        """Parse checked URLs."""
        parts = urllib.parse.urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        authority = parts.netloc.rpartition("@")[2].encode()
        prefix = parts.path.rstrip("/").removesuffix("/v1").encode()  # may end in /v1: the routes bring their own
        via = None
        if proxy:
            hop = urllib.parse.urlsplit(proxy)
            basic = ""
            if hop.username:
                secret = f"{urllib.parse.unquote(hop.username)}:{urllib.parse.unquote(hop.password or '')}"
                basic = "Basic " + base64.b64encode(secret.encode()).decode()
            via = (hop.hostname or "", hop.port or 80, basic)
        return cls(parts.hostname or "", port, tls, authority, prefix, via)


def credential_line(upstream: UpstreamConfig, api_key: str) -> list[bytes]:
    """The header with the upstream's own key, as its format wants it."""
    if not api_key:
        return []
    template = b"authorization: Bearer %b" if upstream.format == "openai" else b"x-api-key: %b"
    return [template % api_key.encode()]


def drop_betas(value: bytes, globs: Sequence[str]) -> bytes:
    """Return the value of an `anthropic-beta` header without the betas that match."""
    betas = [beta.strip() for beta in value.decode("latin-1").split(",")]
    return ", ".join(beta for beta in betas if not any(matches(glob, beta) for glob in globs)).encode("latin-1")


def apply_header_rules(lines: list[bytes], upstream: UpstreamConfig) -> list[bytes]:
    """Return a head's lines with the upstream's rules for headers applied; the request line stays the first."""
    rules, globs = upstream.headers, upstream.betas.drop
    gone = {name.encode() for name in rules.remove} | {name.lower().encode() for name in rules.set}
    kept = [lines[0]]
    for line in lines[1:]:
        name, _, value = line.partition(b": ")
        lower = name.lower()
        if lower in gone:
            continue
        if lower == b"anthropic-beta" and globs:
            value = drop_betas(value, globs)
            line = b"%b: %b" % (name, value)
        if value or lower != b"anthropic-beta":
            kept.append(line)
    return kept + [f"{name}: {value}".encode() for name, value in rules.set.items()]


def request_head(
    call: Call, path: str, upstream: UpstreamConfig, api_key: str, target: UpstreamTarget, length: int
) -> bytes:
    """The head of the request that goes upstream: the client's headers as far as they are its matter, our key."""
    query = b"?" + call.query if call.query else b""
    lines = [
        b"POST %b%b%b HTTP/1.1" % (target.prefix, path.encode(), query),
        b"host: %b" % target.authority,
        b"content-length: %d" % length,
        b"accept-encoding: identity",  # usage must be readable
    ]
    lines += credential_line(upstream, api_key)
    headers, passed = call.headers, upstream.headers.passes
    if len(call.named) < len(headers) or call.named.get(b"connection", b"keep-alive") != b"keep-alive":
        options = connection_options(headers)
        headers = [header for header in headers if header[0].lower() not in options]
    lines += [
        b"%b: %b" % header for header in headers if len(name := header[0]) <= MAX_HEADER_NAME and goes_up(name, passed)
    ]
    if upstream.headers is not NO_RULES or upstream.betas.drop:
        lines = apply_header_rules(lines, upstream)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def models_head(upstream: UpstreamConfig, api_key: str, target: UpstreamTarget) -> bytes:
    """The head of the request for an upstream's list of models."""
    lines = [
        b"GET %b/v1/models%b HTTP/1.1" % (target.prefix, b"?limit=1000" if upstream.format == "anthropic" else b""),
        b"host: %b" % target.authority,
        b"accept-encoding: identity",
        b"anthropic-version: 2023-06-01",
        *credential_line(upstream, api_key),
    ]
    return b"\r\n".join(apply_header_rules(lines, upstream)) + b"\r\n\r\n"


def downstream_headers(headers: Headers, named: Mapping[bytes, bytes]) -> Headers:
    """The answer's headers as the client gets them; `named` are their first values."""
    kept = [header for header in headers if len(header[0]) <= MAX_HEADER_NAME and comes_down(header[0])]
    if b"connection" not in named:
        return kept
    dropped = connection_options(headers)
    return [header for header in kept if header[0].lower() not in dropped]


EVENT_HEADERS: Headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
PINGS: dict[Api, bytes] = {"anthropic": b'event: ping\ndata: {"type": "ping"}\n\n', "openai": b": ping\n\n"}


def error_event(body: bytes, api: Api) -> bytes:
    """Return an error's JSON body as an event, for a stream that has begun."""
    name = b"event: error\n" if api == "anthropic" else b""
    return name + b"".join(b"data: %b\n" % line for line in body.splitlines() or [b"{}"]) + b"\n"


Pieces = Sequence[bytes | memoryview]  # of a request's body


class Splice(NamedTuple):
    """One change of a request's body: what stands in place of its bytes from `start` to `end`."""

    start: int
    end: int
    text: bytes


def spliced(body: bytes, splices: Sequence[Splice]) -> Pieces:
    """The pieces of a body with its changes; what stays the same is no copy."""
    whole, pieces, at = memoryview(body), list[bytes | memoryview](), 0
    for start, end, text in sorted(splices):
        pieces += (whole[at:start], text)
        at = end
    pieces.append(whole[at:])
    return pieces


def event_data(block: bytes) -> bytes:
    """The data of one event: the values of its `data:` lines, joined by newlines."""
    lines = [line.partition(b":") for line in block.split(b"\n")]
    values = [value.removeprefix(b" ") for name, _, value in lines if name == b"data"]
    return b"\n".join(values)


# Server-sent events out of bytes (WHATWG HTML, 9.2.6)
#
# Lines end in LF, CR or CRLF; an empty line ends an event; its data are the values of its `data:` lines. A chunk may
# end anywhere, even inside a character or between CR and LF. So line ends are made LF first, and what follows the last
# empty line waits for the next chunk:
#
#   chunk                     events          what waits
#   "data: 1\n"                -               "data: 1\n"
#   "\ndata: 2\r"              "1"             "data: 2\n", and an LF that comes next belongs to the CR
#   "\n\r\ndata"              "2"             "data"
#
# What waits is appended to as it comes: joined anew at each read of 1,400 bytes, 8 MB took 18 s. Of an event that is
# too long only the beginning is kept, which names it, and its last byte, which may be half of its end.


class EventReader:
    """Reads the data of each event out of a stream's chunks."""

    MAX_EVENT = 8 << 20  # bytes; a longer event is dropped, and `dropped` says how it began
    MAX_START = 256  # bytes of that: its name, and the type that its JSON begins with

    __slots__ = ("_held", "_is_long", "_skip_newline", "dropped")

    def __init__(self) -> None:
        self._held = bytearray()  # what came of an event that has begun
        self._is_long = False  # and is longer than MAX_EVENT
        self._skip_newline = False
        self.dropped: list[bytes] = []  # the start of each that was too long, once it has come to its end

    @property
    def between_events(self) -> bool:
        """Whether something of one's own could be said here without breaking an event."""
        return not self._held and not self._skip_newline

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of each event that `chunk` completes."""
        # Bytes, not text: str.splitlines would also split at U+2028, which is legal inside JSON strings.
        if self._skip_newline or b"\r" in chunk:
            chunk = self._newlines(chunk)
        held = self._held
        if chunk.startswith(b"\n") and held.endswith(b"\n"):  # the end came in two reads
            del held[-1:]
            chunk = b"\n" + chunk
        *blocks, rest = chunk.split(b"\n\n")
        if blocks and held:
            blocks[0] = bytes(held) + blocks[0]
            held.clear()
            if self._is_long:
                self.dropped.append(blocks.pop(0)[: self.MAX_START])
                self._is_long = False
        held += rest
        if self._is_long or len(held) > self.MAX_EVENT:
            self._is_long = True
            del held[self.MAX_START : -1]
        found = []
        for block in filter(None, blocks):
            before, _, data = block.partition(b"data:")
            if b"\n" in data or (before and not before.endswith(b"\n")):  # not one line of data, and at the end
                data = event_data(block)
            else:
                data = data.removeprefix(b" ")
            if data:
                found.append(data)
        return found

    def _newlines(self, chunk: bytes) -> bytes:
        """CRLF and CR become LF; a CR at the end is one, and an LF right after it is skipped."""
        if self._skip_newline and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._skip_newline = False
        if chunk:
            self._skip_newline = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


# --- 14. Requests: what is read of a request --------------------------------------
# Offers: cache_write, decode_short, Decoded, ENCODER, END, find_affinity, list_items, MAX_NAME, max_output,
#   PEEK_DECODER, read_request, Turn, walk_fields

# What is read of a request's body, and what for
#
#   model, stream, session      where it goes, how it is answered      find_session, find_affinity
#   all names                   every reader sees the same request     check_names
#   other models                a key may be for some models only      check_other_models
#   its bytes, its attachments  what its input will cost               estimate_input
#   max_tokens and its like     what its output will cost              max_output
#   tools, marks of caching     what else it may be billed for         read_besides
#
# A body is up to `server.max_body` bytes of whatever a client likes, and all of it is read on the loop, before a limit
# has been asked. A JSON tree in Python is up to 30 times as large as its text: 30 MB of nested lists as `metadata` took
# 870 MB and stopped every other call for 6 s. So no value is built that is not looked at. `RequestPeek` keeps each
# value as `msgspec.Raw`, a slice of the body, and msgspec skips its bytes in C (3 GB/s). A value that is looked at is
# decoded by itself, into a typed struct, and only where it is short: what is longer than any honest one counts as not
# said. Lists are walked item by item (`list_items`), with a bound on their number.

Raw = msgspec.Raw | msgspec.UnsetType
UNSAID = (msgspec.UNSET, msgspec.Raw(b"null"))  # values of a field that say nothing
MAX_NAME = 256  # characters of a model's name: it stands in the log and in the ledger
MAX_SHORT = 8 << 10  # bytes of a value that is decoded; Claude Code's metadata has 200
ENCODER = msgspec.json.Encoder()
RAW_DECODER = msgspec.json.Decoder(msgspec.Raw)
Decoded = TypeVar("Decoded")


def decode_short(value: Raw, kind: type[Decoded], default: Decoded) -> Decoded:
    """Decode a value of at most MAX_SHORT bytes; `default` where it is absent, longer, or of another type."""
    if value is msgspec.UNSET or len(value) > MAX_SHORT:
        return default
    try:
        return msgspec.json.decode(value, type=kind)
    except UNREADABLE:
        return default


def bytes_of(value: Raw) -> bytes:
    """Return the JSON of a value; "" where it is absent."""
    return b"" if value is msgspec.UNSET else bytes(value)


def value_end(text: memoryview, start: int) -> int:
    """Find what follows the JSON value at `start`, white space skipped, without building the value.

    msgspec skips one value and then complains of the byte behind it, counted from 1. Raises as decoding does.
    """
    try:
        RAW_DECODER.decode(text[start:])
    except msgspec.DecodeError as error:
        trailing = re.search(r"trailing characters \(byte (\d+)\)", str(error))
        if trailing is None:
            raise
        return start + int(trailing[1]) - 1
    return len(text)


def list_items(text: memoryview, most: int) -> Iterator[memoryview]:
    """Yield the items of a JSON list, at most `most`, each as its bytes; nothing where it is no list."""
    start = 1
    if not re.match(rb"\[[ \t\r\n]*[^\] \t\r\n]", text):
        return
    for _ in range(most):
        end = value_end(text, start)
        yield text[start:end]
        if text[end] != ord(","):
            return
        start = end + 1


# Names
#
# Readers differ in which of two equal names of an object counts (msgspec: the last, others: the first), and Go's also
# take `Model` for `model`: a client could be admitted by one model and served by another. So a name that stands twice
# is refused, and any other spelling of a name that the gateway knows. To look at each name costs 1 µs apiece, which an
# honest body is spared: what was decoded of it, written again without white space, is as long as the body, and each
# further name would have made that longer. A body with white space, as json.dumps makes it, has as many quotes.

# The fields that the gateway looks at, beside `model` and `stream`; wrong types in them are the upstream's matter.
LOOKED_AT = b"""
    messages input max_tokens max_completion_tokens max_output_tokens n metadata prompt_cache_key stream_options
    tools max_tool_calls mcp_servers web_search_options models fallbacks modalities speed service_tier inference_geo
    background previous_response_id conversation prompt
"""
# Those by which LiteLLM and OpenRouter turn to other models, or to another router.
ROUTER_NAMES = b"""
    context_window_fallbacks content_policy_fallbacks default_fallbacks plugins preset
    user_config model_list router_settings_override api_base base_url
"""
# The other names that the APIs have, so that a body of these alone is known by its length.
OTHER_NAMES = b"""
    system tool_choice temperature thinking context_management output_config stop_sequences top_p top_k
    container betas diagnostics safeguards
    stop seed response_format frequency_penalty presence_penalty logit_bias logprobs top_logprobs
    reasoning_effort verbosity user instructions reasoning text store include parallel_tool_calls
    prompt_cache_retention client_metadata safety_identifier
    truncation encoding_format dimensions
"""
RequestPeek = msgspec.defstruct(
    "RequestPeek",
    [
        ("model", str | msgspec.UnsetType, msgspec.UNSET),
        ("stream", bool | msgspec.UnsetType | None, msgspec.UNSET),
        *((name.decode(), Raw, msgspec.UNSET) for name in (LOOKED_AT + ROUTER_NAMES + OTHER_NAMES).split()),
    ],
    gc=False,
)
PEEK_DECODER = msgspec.json.Decoder[Any](RequestPeek)
ROUTER_FIELDS = ROUTER_NAMES.decode().split()
MAX_NAMES = 256  # at the top of a body; the APIs know 60
MAX_COPY = 1 << 20  # bytes of a body that is written again to compare lengths
NAME = re.compile(  # of an object's field, and its value if that is no object or list
    rb"""[ \t\r\n]*+[{,][ \t\r\n]*+("(?:[^"\\]|\\.){0,%d}+")[ \t\r\n]*+:[ \t\r\n]*+"""
    rb"""("[^"\\]*+(?:\\.[^"\\]*+)*+"|[^][{}", \t\r\n]++)?""" % MAX_NAME
)
END = re.compile(rb"[ \t\r\n]*+\{?[ \t\r\n]*+\}")


def walk_fields(body: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield the fields of a JSON object: name, start and end of the value (white space may follow).

    Raises BadRequest, and as decoding does.
    """
    at = count = 0
    while field := NAME.match(body, at):
        if field.lastindex == 2:  # a scalar; not asked by `field[2]`, which would copy a long string
            start, at = field.span(2)
        else:
            start = field.end()
            at = value_end(memoryview(body), start)
        yield msgspec.json.decode(field[1], type=str), start, at
        count += 1
        if count > MAX_NAMES:
            raise BadRequest(f"The request has more than {MAX_NAMES} names")
    if not END.match(body, at):
        raise BadRequest(f"The request has a name of more than {MAX_NAME} characters")


def walk_names(text: bytes, known: Collection[str], place: str = "") -> None:
    """Refuse a JSON object in which a name stands twice, or a known one is spelled in another case.

    `place` is where it stands. Raises BadRequest, and as decoding does.
    """
    found = set[str]()
    for spelled, _, _ in walk_fields(text):
        folded = spelled.casefold()
        if spelled != folded and folded in known:
            raise BadRequest(f"{place}{spelled}: write this name {folded}")
        if folded in found:
            raise BadRequest(f"{place}{spelled}: this name stands twice in the request (in any case); leave one out")
        found.add(folded)


def check_names(body: bytes, peek: Any) -> None:
    """Refuse a body in which a name stands twice, or one that the gateway knows is spelled in another case.

    Raises BadRequest, and as decoding does.
    """
    if len(body) <= MAX_COPY:
        written = ENCODER.encode(peek)
        if len(written) == len(body):
            return
        # Each further name would bring two quotes. The model's name is the one value that is not written as it came.
        if body.count(b'"') == written.count(b'"') and '"' not in (peek.model or ""):
            return
    walk_names(body, peek.__struct_fields__)


# What a request will cost
#
# A limit holds only if what is reserved for a call is near to what it will cost, so a client must not be able to talk
# the estimate down: 1 MB of text behind 44 bytes of PNG counted 55 tokens, and a key with $1 a day spent $50. The
# rules: every byte counts as text, of which none counts less than a quarter of a token and none more than one. Only
# base64 in a place where the API takes an image or a document is taken out, and only if it is one; it counts what such
# an image can cost at most. What comes by URL or from a file counts as the largest that there is.
#
# A byte ÷ 4 holds for English alone. Bytes are counted by class: Chinese is about 1.5 tokens for the 3 bytes of a
# character, code is full of signs that are tokens of their own, and base64 or hexadecimal noise has a token for every
# 1.5 to 2 characters. Of a larger body a sample is counted, from places that a client cannot know.
# What is left over is learnt from the answers, per key and model (`Estimates`).

SMALL_LETTERS = b"abcdefghijklmnopqrstuvwxyz \t\r\n"  # words, and white space: a quarter of a token for each
DIGITS = b"0123456789"  # three quarters
CAPITALS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a whole token: 3 % of a text, 40 % of base64
QUARTERS = bytes(  # of a token, by byte; any other one, sign or script, has a half
    1 if byte in SMALL_LETTERS else 3 if byte in DIGITS else 4 if byte in CAPITALS else 2 for byte in range(256)
)
SAMPLES, SAMPLE_SIZE = 32, 256  # of bytes from all over a body
BASE64_ONLY = re.compile(rb"[A-Za-z0-9+/\\=]+")


def token_rate(body: bytes, attached: int) -> float:
    """Estimate the tokens per byte of a body's text, 0.25 to 1, with `attached` bytes of it left out.

    Of the samples that look like base64 so large a share is left out: beside an attachment there may be noise.
    """
    text = body
    if len(body) > SAMPLES * SAMPLE_SIZE:
        step = len(body) // SAMPLES
        # The first may begin before the body, so that its edges and each step's are looked at as often as the rest.
        starts = range(random.randrange(step) - SAMPLE_SIZE + 1, len(body), step)
        samples = [body[max(start, 0) : start + SAMPLE_SIZE] for start in starts]
        if attached:
            samples.sort(key=lambda sample: not BASE64_ONLY.fullmatch(sample))
            del samples[: round(len(samples) * attached / len(body))]
        text = b"".join(samples)
    if not text:
        return 0.25
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65,521, which 9 KB x 4 never reach: a fifth of the
    # time of counting each class.
    quarters = (zlib.adler32(text.translate(QUARTERS)) & 0xFFFF) - 1
    return quarters / 4 / len(text)


# Pages of a PDF
#
# A page is read as text and as an image (platform.claude.com/docs, "PDF support"). The bytes of a document bound
# neither: 600 pages that share one content are 57 KB, packed 4 KB, and a text inflates to its thousandfold. So pages
# are counted as objects, and texts inflated. A page is an object of its type, and named in the `Kids` of its part of
# the document; its text is in the streams that its `Contents` name, and in forms, which any page may show.
#
# Where each page and part is named once, there are at most as many pages as names. Whatever is named once more may
# double them: a page is reached on a way from part to part, which is known by those of the repeated names that it
# takes. So four names, one of them twice, are 8 pages at most; ten parts that name the next one twice have 1,024.
#
# That holds for a document that is written in the plain way, as programs write it: its lists stand where they are
# used, names have no escapes, and streams are inflated, or in ASCII85. Any other one counts as the largest context,
# and so does what is more than can be looked at of one request.

PDF_TOKENS = 1_000_000  # the largest context
PAGE_TOKENS = 4_500  # 1,500 to 3,000 of text, and its image
MAX_PDF = 8 << 20  # bytes, in base64 and inflated, of all PDFs of a request that are read: 30 ms, of bad ones 130
LEAST_PDF = 16 << 10  # bytes that each PDF counts of MAX_PDF at least …
PDF_PART = 160  # … and that each of its streams and lists does, which takes 2 µs
PDF_STREAM = re.compile(rb">>\s{0,20}stream\r?\n")
PDF_NUMBER = re.compile(rb"(\d{1,10})\s{1,9}\d{1,9}\s{1,9}\Z")  # of an object, before its `obj`
PDF_PAGE = re.compile(rb"/Type\s*/Page\b")
# What a part of the document, or a page, names; the `Contents` of a remark or a signature are a text.
PDF_LIST = re.compile(rb"/(Kids|Contents)\b\s*(\[[\s\dR]*\]|\d{1,10}\s{1,9}\d{1,9}\s{1,9}R|[(<])?")
PDF_REFERENCE = re.compile(rb"\b(\d{1,10})\s{1,9}\d{1,9}\s{1,9}R")
# One of the names that are looked for here, in which #41 may be A.
PDF_ESCAPED = re.compile(rb"/(?:[TPKOCF]\w{0,6}#(?:[46][1-9A-Fa-f]|[57][0-9Aa])|#(?:54|50|4[bBfF36]))")


class PdfReader:
    """Counts pages and text of the PDFs of one request. What is no plain one raises ValueError within."""

    def __init__(self) -> None:
        self._bytes_left = MAX_PDF

    def tokens(self, text: bytes) -> int:
        """Return the tokens of a PDF in base64, at most PDF_TOKENS."""
        try:
            self._take(max(len(text), LEAST_PDF))
            pages, text_bytes = self._read(base64.b64decode(text, validate=True))
        except ValueError:
            return PDF_TOKENS
        return min(max(pages * PAGE_TOKENS, text_bytes // 4), PDF_TOKENS)

    def _take(self, size: int) -> None:
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise ValueError("more than can be looked at")

    def _read(self, pdf: bytes) -> tuple[int, int]:
        """Return the number of pages, and of the bytes of their text."""
        if not pdf.startswith(b"%PDF-"):
            raise ValueError("readers look past what stands before that")
        streams = list(self._streams(pdf))
        objects = b"\n".join(
            [pdf, *(self._inflate(fields, data) for _, fields, data in streams if b"/ObjStm" in fields)]
        )
        if PDF_ESCAPED.search(objects):
            raise ValueError("a name with escapes")
        named = self._named(objects)
        kids, contents = named[b"Kids"], named[b"Contents"]
        doubles = min(kids.total() - len(kids), 20)
        pages = max(kids.total() << doubles, len(PDF_PAGE.findall(objects)))
        if not pages or contents.keys() - {number for number, _, _ in streams}:
            raise ValueError("no pages, or a list of contents that stands elsewhere")
        text_bytes = 0
        for number, fields, data in streams:
            shown = pages if b"/Form" in fields else contents[number]
            if shown:
                text_bytes += len(self._inflate(fields, data)) * shown
        return pages, text_bytes

    def _streams(self, pdf: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield the streams: number (0: not to be seen), dictionary, and bytes as they came."""
        end = 0
        for found in PDF_STREAM.finditer(pdf):
            if found.start() < end:
                continue
            self._take(PDF_PART)
            before = pdf[max(end, found.start() - 1000) : found.start()]
            start, end = before.rfind(b"obj"), pdf.find(b"endstream", found.end())
            if start < 0 or end < 0:
                raise ValueError("a stream without a beginning, or without an end")
            number = PDF_NUMBER.search(before, 0, start)
            yield int(number[1]) if number else 0, before[start:], pdf[found.end() : end]

    def _inflate(self, fields: bytes, data: bytes) -> bytes:
        """Unpack the bytes of a stream. Raises ValueError if they are packed in another way."""
        if b"/ASCII85Decode" in fields:
            self._take(16 * len(data))  # it takes longer
            data = base64.a85decode(b"<~" + data.strip(), adobe=True)
        if b"/Filter" in fields:
            try:
                data = zlib.decompressobj().decompress(data, self._bytes_left + 1)
            except zlib.error:
                raise ValueError("a stream in another encoding") from None
        self._take(len(data))
        return data

    def _named(self, objects: bytes) -> dict[bytes, Counter[int]]:
        """Count how often all `Kids` and all `Contents` name each object, by its number."""
        named = {b"Kids": Counter[int](), b"Contents": Counter[int]()}
        for found in PDF_LIST.finditer(objects):
            self._take(PDF_PART)
            kind, names = found.groups()
            if names is None or (kind == b"Kids" and not names.startswith(b"[")):
                raise ValueError("a list that stands elsewhere")
            named[kind].update(map(int, PDF_REFERENCE.findall(names)))
        return named


# Attachments: base64, a URL or a file in the places of a conversation where an API takes them

IMAGE_TOKENS = 5000  # of the largest image: 3.75 million pixels, 750 a token (platform.claude.com/docs, "Vision")
# … and of the one family whose tiles cost 5,667 tokens: an image has up to eight (platform.openai.com/docs, "Images").
TILED_IMAGES, TILED_IMAGE_TOKENS = "gpt-4o-mini*", 2833 + 8 * 5667
MAX_ATTACHMENTS = 1000  # looked at, 15 µs each; the API takes 600
MAX_PARTS = 20_000  # messages and blocks among which images are looked for, 2 µs each; the rest counts as text
MAX_DEPTH = 6  # of blocks within blocks; Anthropic's web_fetch has four
ATTACHMENT_MARKS: dict[str, tuple[bytes, ...]] = {
    "messages": (b'"source"',),
    "count_tokens": (b'"source"',),
    "chat": (b'"image_url"', b'"file"'),
    "responses": (b'"image_url"', b'"input_image"', b'"input_file"'),
    "embeddings": (),
}  # without these in it, or escapes that could hide them, a conversation has no attachment
# By a block's type: the field with the attachment, and whether that is an image.
ATTACHMENTS = {
    "image": ("source", True),
    "document": ("source", False),
    "image_url": ("image_url", True),
    "input_image": ("image_url", True),
    "computer_screenshot": ("image_url", True),
    "file": ("file", False),
    "input_file": ("file_data", False),
}
ELSEWHERE_OR_BASE64 = ("base64", "url", "file")  # types of a `source` that are not text
# A letter, digit or _ that JSON has escaped: no library does that (they escape < > & ' + and ` at most).
ESCAPED = re.compile(rb"\\u00(?:3[0-9]|[46][1-9a-fA-F]|[57][0-9aA]|5[fF])")


class Part(msgspec.Struct, gc=False):
    """A message, a block of its content, or what an attachment stands in, of any of the APIs."""

    type: Raw = msgspec.UNSET
    content: Raw = msgspec.UNSET
    output: Raw = msgspec.UNSET
    source: Raw = msgspec.UNSET
    image_url: Raw = msgspec.UNSET
    file: Raw = msgspec.UNSET
    file_data: Raw = msgspec.UNSET
    data: Raw = msgspec.UNSET
    url: Raw = msgspec.UNSET


def attached_base64(part: Part, field: str) -> bytes | None:
    """Return an attachment's base64 in quotes, or what is in its place; "" for a file's number, None for a text."""
    value = bytes_of(getattr(part, field))
    if value.startswith(b"{"):
        source = msgspec.json.decode(value, type=Part)
        if field == "source" and decode_short(source.type, str, "") not in ELSEWHERE_OR_BASE64:
            return None  # a document in plain text, or what is no attachment
        value = bytes_of(source.data or source.url or source.file_data)
    return value if value.startswith(b'"') else b""


def attachments(parts: memoryview, budget: Iterator[int], depth: int = 0) -> Iterator[tuple[bytes, bool]]:
    """Yield the attachments in a list of messages or blocks: `attached_base64`, and whether it is an image.

    Blocks stand within messages, results of tools, and documents; how deep is not for the client to choose.
    """
    for item in list_items(parts, MAX_PARTS):
        if next(budget, None) is None:
            return
        try:
            part = msgspec.json.decode(item, type=Part)
        except msgspec.ValidationError:
            continue  # a text, a number
        kind = decode_short(part.type, str, "")
        if kind in ATTACHMENTS:
            field, is_image = ATTACHMENTS[kind]
            text = attached_base64(part, field)
            if text is not None:
                yield text, is_image
        for within in (part.content, part.output, part.source):
            text = bytes_of(within)
            if text.startswith(b"{"):
                text = b"[%b]" % text
            if text.startswith(b"[") and depth < MAX_DEPTH:
                yield from attachments(memoryview(text), budget, depth + 1)


def estimate_attachment(text: bytes, most_image: int, pdfs: PdfReader) -> int | None:
    """Return the tokens of an image or a PDF in base64, None if it is neither.

    `text` is within a JSON string, perhaps as a data: URL. Escapes and white space are looked past, as servers do.
    """
    has_blanks = b" " in text  # as words have, and no image
    if b"\\" in text:
        try:
            text = msgspec.json.decode(b'"%b"' % text, type=str).encode()
        except UNREADABLE:
            return None
    if text.startswith(b"data:"):
        text = text[text.find(b",", 0, 256) + 1 :]
    text = text.translate(None, b" \t\r\n")
    step = max(1, len(text) // SAMPLES)
    if not all(BASE64_ONLY.fullmatch(text[i : i + 64]) for i in range(0, len(text), step)):
        return None
    head = text[: 64 << 10]
    try:
        start = base64.b64decode(head[: len(head) // 4 * 4], validate=True)
    except ValueError:
        return None
    if b"%PDF-" in start[:1100]:
        return pdfs.tokens(text)
    if has_blanks:
        return None
    if not start.startswith((b"\x89PNG\r\n\x1a\n", b"GIF8", b"\xff\xd8")) and start[:4] + start[8:12] != b"RIFFWEBP":
        return None
    return most_image


def estimate_input(body: bytes, conversation: Raw, route: Route, model: str, is_escaped: bool) -> int:
    """Estimate the tokens of a request: text by what its bytes are, images and documents by what they can cost.

    `conversation` is the list of messages or input items within it; `is_escaped` says that names in it may be hidden.
    """
    text_bytes = len(body)
    tokens = 0
    has_any = is_escaped
    for mark in ATTACHMENT_MARKS[route.kind]:
        has_any = has_any or mark in body
    if has_any:
        is_tiled = route.api == "openai" and matches(TILED_IMAGES, model)
        most_image = TILED_IMAGE_TOKENS if is_tiled else IMAGE_TOKENS
        pdfs = PdfReader()
        found = attachments(memoryview(bytes_of(conversation)), iter(range(MAX_PARTS)))
        for text, is_image in itertools.islice(found, MAX_ATTACHMENTS):
            most = most_image if is_image else PDF_TOKENS
            cost = estimate_attachment(text[1:-1], most_image, pdfs)
            if cost is None:
                tokens += most
            else:
                tokens += min(cost, most)
                text_bytes -= len(text)
    return tokens + math.ceil(text_bytes * token_rate(body, len(body) - text_bytes))


# The fields of a route by which a request bounds its output. Servers differ in which of the two of a chat they read.
OUTPUT_FIELDS = {
    "messages": ("max_tokens",),
    "count_tokens": ("max_tokens",),
    "chat": ("max_completion_tokens", "max_tokens"),
    "responses": ("max_output_tokens",),
}
MOST_ANSWERS = 128  # that OpenAI's API gives to one request
MOST_USES = 1_000_000  # answers of a request, or uses of a tool, that are reckoned with, whatever number stands there


def read_most(value: Raw) -> float:
    """Read a count that a request allows; infinite where servers could read it in several ways, as "8000"."""
    count = decode_short(value, int, -1)
    return count if count >= 0 else math.inf


def max_output(route: Route, peek: Any) -> float:
    """Read the output tokens that a request allows in the fields of its route; infinite where they say nothing.

    A field that the upstream does not read must not make the reservation small. The larger one counts, for each of the
    `n` answers that a chat asks for.
    """
    if route.kind == "embeddings":
        return 0
    most = -1.0
    for field in OUTPUT_FIELDS[route.kind]:
        value = getattr(peek, field)
        if value not in UNSAID:
            most = max(most, read_most(value))
    if most < 0:
        return math.inf
    if route.kind == "chat" and peek.n not in UNSAID:
        most *= max(1, min(decode_short(peek.n, int, MOST_ANSWERS), MOST_USES))
    return most


# Other models
#
# A key may be for some models only, and a call is reserved at the price of the dearest that may serve it. Beside
# `model`, a request can name others where the upstream turns to them, or runs them as tools: `fallbacks`, OpenRouter's
# `models`, tools such as advisors. What stands there and cannot be read as names, and what makes a router choose others
# (ROUTER_NAMES), is refused for such a key; for the others it counts as the dearest model of all.

MAX_TOOLS = 3000  # that are looked at, up to 10 µs each …
MAX_TOOL_BYTES = 512 << 10  # … and of which each is decoded into 60 bytes


class NamesModel(msgspec.Struct, gc=False):
    """An object that names a model."""

    model: str


class Tool(msgspec.Struct, gc=False):
    """What is read of a tool: whether the client runs it itself, without a model of its own, and how often it may."""

    type: Raw = msgspec.UNSET
    max_uses: Raw = msgspec.UNSET
    model: Raw = msgspec.UNSET
    advisor: Raw = msgspec.UNSET

    def models(self) -> list[str]:
        """Return the models that run for it; "" for what cannot be read."""
        found: list[str] = []
        if self.model not in UNSAID:
            found.append(decode_short(self.model, str, ""))
        if self.advisor not in UNSAID:
            found.append(decode_short(self.advisor, NamesModel, NamesModel("")).model)
        if decode_short(self.type, str, "").lower().startswith("openrouter:"):  # some have models of their own choice
            found.append("")
        return found


TOOLS_DECODER = msgspec.json.Decoder(list[Tool] | None)
UNREAD_TOOLS = [Tool(type=msgspec.Raw(b'"web_search"'), max_uses=msgspec.Raw(b'"any"'), model=msgspec.Raw(b"0"))]


def decode_tools(tools: Raw) -> list[Tool]:
    """Decode a request's tools; too many, or what are none, as one that may do anything any number of times."""
    if tools is msgspec.UNSET:
        return []
    if len(tools) <= MAX_TOOL_BYTES:
        with contextlib.suppress(*UNREADABLE):
            found = TOOLS_DECODER.decode(tools) or []
            if len(found) <= MAX_TOOLS:
                return found
    return UNREAD_TOOLS


def other_models(peek: Any, tools: list[Tool]) -> Iterator[tuple[str, str]]:
    """Yield the models that a request names beside `model`: place, and name ("" where that cannot be read)."""
    for field in ("models", "fallbacks"):
        value = getattr(peek, field)
        if value in UNSAID:
            continue
        named: list[str | NamesModel] = decode_short(value, list[str | NamesModel], [""])
        names = [model if isinstance(model, str) else model.model for model in named]
        short = bytes_of(value)[:MAX_SHORT].lower()
        objects = sum(isinstance(model, NamesModel) for model in named)
        if b"\\" in short or short.count(b'"model"') > objects:  # readers could take another
            names = [""]
        for name in names:
            yield field, name
    for field in ROUTER_FIELDS:
        if getattr(peek, field) not in UNSAID:
            yield field, ""
    for number, tool in enumerate(tools):
        for name in tool.models():
            yield f"tools[{number}]", name


MODEL_WORDS = re.compile(rb"model|openrouter|\\u00", re.IGNORECASE)


def check_tools(tools: Raw) -> None:
    """Refuse a tool whose model, or type, readers could take for another. Raises BadRequest."""
    text = bytes_of(tools)
    if len(text) > MAX_TOOL_BYTES or not MODEL_WORDS.search(text):
        return
    try:
        for number, item in enumerate(list_items(memoryview(text), MAX_TOOLS)):
            tool = bytes(item).strip()
            if tool.startswith(b"{") and MODEL_WORDS.search(tool):
                walk_names(tool, Tool.__struct_fields__, f"tools[{number}].")
                advisor = bytes_of(msgspec.json.decode(tool, type=Tool).advisor)
                if advisor.startswith(b"{"):
                    walk_names(advisor, NamesModel.__struct_fields__, f"tools[{number}].advisor.")
    except UNREADABLE as error:
        raise BadRequest(f"The request body is not as expected: {error}") from None


def check_other_models(call: Call, peek: Any) -> None:
    """Ask a key that may not use all models for each that a request names. Raises PolicyBlocked and BadRequest."""
    key, why = call.key, f"the key {call.key} may use only some models"
    if b"model" in urllib.parse.unquote_to_bytes(call.query).lower():
        raise PolicyBlocked(f"The query names a model, but {why}, and servers may take that one. Leave the query out.")
    if "," in (peek.model or ""):
        raise PolicyBlocked(f"model: {why}, and servers may read several here. Name one.")
    check_tools(peek.tools)
    for place, name in other_models(peek, decode_tools(peek.tools)):
        if not name:
            raise PolicyBlocked(f"{place}: {why}, and which this turns to cannot be told. Leave it out.")
        if not key.allows_model(name):
            raise PolicyBlocked(
                f"The key {key} may not use the model {printable(name)!r}, which {place} names. "
                f"Leave it out, or name one that it may use."
            )


# What else a request may be billed for: tools that the upstream runs, input that lies there, writes to a cache, sound

# What is reserved where a request does not say how often a tool may be used: of each that is billed by the piece (a
# container of Code Interpreter is billed once), and of one that has a model of its own, such as an advisor.
USES = {"web_search": 10, "file_search": 10, "code_execution": 10, "code_interpreter": 1, "image_generation": 4}
MODEL_USES = 3
# Types of tools that the client runs itself. What JSON has escaped ("funct\u0069on") is none of them.
CLIENTS_OWN = (msgspec.UNSET, *(msgspec.Raw(word) for word in (b'"function"', b'"custom"', b"null")))
BILLED_FIELDS = operator.attrgetter(  # by which a request asks for something beside text and answer
    "tools", "mcp_servers", "modalities", "web_search_options", "models", "fallbacks", *ROUTER_FIELDS
)
ONE_HOUR = re.compile(rb'"ttl"\s*:\s*"1h"')  # in a mark of prompt caching


def read_uses(value: Raw, default: int) -> int:
    """Read how often a tool may be used."""
    return default if value in UNSAID else int(min(read_most(value), MOST_USES))


def cache_write(body: bytes, is_escaped: bool) -> str:
    """Return the price, a field of `Price`, at which input may be written to a cache; "" where none is asked for.

    Where escapes may hide marks of prompt caching, and there are no others, they count as the usual ones.
    """
    if b'"cache_control"' not in body:
        return "cache_write_5m" if is_escaped else ""
    return "cache_write_1h" if is_escaped or ONE_HOUR.search(body) else "cache_write_5m"


def has_stored_input(call: Call, peek: Any, tools: bytes, is_escaped: bool) -> bool:
    """Return whether a request refers to input that lies upstream, or that the upstream fetches."""
    if peek.mcp_servers or b'"web_fetch' in tools or b'"mcp"' in tools:
        return True
    if call.route.kind != "responses":
        return False
    stored = (peek.previous_response_id, peek.conversation, peek.prompt)
    return is_escaped or b"item_reference" in call.body or any(value not in UNSAID for value in stored)


def read_besides(call: Call, peek: Any, write: str, is_escaped: bool) -> Besides | None:
    """Find what a request may be billed for beside its text and its answer; None for nothing.

    `write` is the price of its input in a cache.
    """
    tools = [tool for tool in decode_tools(peek.tools) if tool.type not in CLIENTS_OWN or tool.model or tool.advisor]
    runs, extras = 0, Counter[str]()
    for tool in tools:  # few: most are the client's own
        kind = decode_short(tool.type, str, "")
        for name, uses in USES.items():
            if kind.startswith(name):
                extras[name] += read_uses(tool.max_uses, read_uses(peek.max_tool_calls, uses))
        uses = read_uses(tool.max_uses, read_uses(peek.max_tool_calls, MODEL_USES))
        runs += len(tool.models()) * uses
    if call.route.kind == "chat" and peek.web_search_options:
        extras[CHAT_SEARCH] += 1  # the model of a chat that searches does so once
    models = {name for _, name in other_models(peek, tools)}
    besides = Besides(
        models=tuple(models - {""}),
        is_unclear="" in models,
        runs=runs,
        extras=tuple(extras.items()),
        write=write,
        has_sound=b"audio" in bytes_of(peek.modalities),
        has_stored=has_stored_input(call, peek, bytes_of(peek.tools), is_escaped),
    )
    return None if besides == NOTHING_BESIDES else besides


# Sessions, and what else keeps together the calls that share a prompt cache

SESSION_HEADERS = (
    b"x-claude-code-session-id session-id session_id x-session-affinity thread-id thread_id "
    b"conversation-id conversation_id"
).split()
# In `metadata.user_id`: its end `_session_<uuid>` (Claude Code 2.0.x), or JSON within JSON (2.1.x).
SESSION = re.compile(rb'_session_([0-9a-fA-F-]{36})"|\\"session_id\\"\s*:\s*\\"([^"\\]{1,128})')
CACHE_MARK = re.compile(rb'"cache_control"\s*:\s*\{[^{}]*\}')
USER = msgspec.Raw(b'"user"')
OPENING_MESSAGES = 8  # of a conversation, among which its first user message is looked for …
OPENING_BYTES = 32 << 10  # … and so much of each, and of the system prompt: two conversations differ within it


def session_of(metadata: Raw) -> str:
    """Return the session in a request's `metadata`, at most 128 characters."""
    found = SESSION.search(bytes_of(metadata)[:MAX_SHORT])
    return (found[1] or found[2]).decode(errors="replace") if found else ""


def find_session(call: Call, peek: Any) -> str:
    """Return the session that a request names, at most 128 characters: Claude Code's, Codex's or opencode's."""
    if not call.named.keys().isdisjoint(SESSION_HEADERS):
        for name in SESSION_HEADERS:
            if session := printable(call.header(name)):
                return session
    if peek.metadata and (session := printable(session_of(peek.metadata))):
        return session
    return printable(decode_short(peek.prompt_cache_key, str, "")) if peek.prompt_cache_key else ""


class Turn(msgspec.Struct, gc=False):
    """One message of a conversation."""

    content: msgspec.Raw
    role: Raw = msgspec.UNSET


class Opening(msgspec.Struct, gc=False):
    """What stays the same in every request of a conversation."""

    system: Raw = msgspec.UNSET
    messages: Raw = msgspec.UNSET


def start_without_marks(text: bytes | memoryview) -> bytes:
    """Return the first OPENING_BYTES of a value without marks of prompt caching, which move from message to message."""
    start = bytes(text[: OPENING_BYTES + 4096])  # room for all the marks that there can be
    *pieces, last = CACHE_MARK.split(start)
    # A pattern that took the commas and blanks before a mark as well was quadratic in these: 34 s for 700 KB.
    kept = [piece.rstrip(b", \t\r\n") for piece in pieces]
    return b"".join([*kept, last])[:OPENING_BYTES].rstrip()


def opening_digest(body: bytes) -> str:
    """Hash system and the messages up to the first of the user; "" without messages. Raises as decoding does."""
    opening = msgspec.json.decode(body, type=Opening)
    starts: list[bytes] = []
    for message in list_items(memoryview(bytes_of(opening.messages)), OPENING_MESSAGES):
        starts.append(start_without_marks(message))
        if msgspec.json.decode(message, type=Turn).role == USER:
            break
    else:
        starts = starts[:1]  # no user among them
    system = start_without_marks(bytes_of(opening.system))
    return hashlib.blake2b(b"".join([system, *starts]), digest_size=16).hexdigest() if starts else ""


def find_affinity(call: Call) -> str:
    """Return what calls that share a prompt cache have in common: session, else conversation's start, else key."""
    if not call.affinity:
        call.affinity = call.session or call.key.name
        if not call.session and call.route.kind in ("messages", "count_tokens", "chat"):
            with contextlib.suppress(*UNREADABLE):
                call.affinity = opening_digest(call.body) or call.affinity
    return call.affinity


ASKS_FOR_USAGE = re.compile(rb'\{[^][{}\\]*"include_usage"\s*:\s*true[^][{}\\]*\}')


def asks_for_usage(options: Raw) -> bool | None:
    """Return whether `stream_options` of a chat stream asks for its usage; None where there is none.

    Where readers could differ, or the value is longer than any honest one, it does not: the field is written anew.
    """
    if options is msgspec.UNSET:
        return None
    text = bytes(options)
    is_plain = len(text) <= MAX_SHORT and text.lower().count(b"include_usage") == 1
    return is_plain and ASKS_FOR_USAGE.fullmatch(text) is not None


def read_request(call: Call) -> None:
    """Fill in what the body says: model, stream, session, and what it may cost. Raises BadRequest and PolicyBlocked."""
    body, kind = call.body, call.route.kind
    try:
        peek = PEEK_DECODER.decode(body)
        check_names(body, peek)
    except msgspec.ValidationError as error:
        raise BadRequest(f"The request body is not as expected: {error}") from None
    except UNREADABLE as error:
        raise BadRequest(f"The request body is not JSON: {error}") from None
    model = peek.model or ""
    if not model and kind != "responses":  # there `prompt` may bring one, if an upstream is for that
        raise BadRequest("model: field required")
    if len(model) > MAX_NAME or not model.isprintable():
        raise BadRequest(f"model: expected at most {MAX_NAME} printable characters")
    if kind == "responses" and bytes_of(peek.background) not in (b"", b"false", b"null"):
        raise PolicyBlocked("background: this gateway serves no responses in the background, whose cost it cannot see.")
    if "*" not in call.key.models:
        check_other_models(call, peek)
    call.model = call.upstream_model = model
    call.stream = bool(peek.stream) and kind in ("messages", "chat", "responses")  # the others never do
    if call.stream and kind == "chat":
        call.includes_usage = asks_for_usage(peek.stream_options)
    call.bytes_up = len(body)
    escape = body.find(b"\\u00")
    is_escaped = escape >= 0 and ESCAPED.search(body, escape) is not None
    conversation = peek.input if kind == "responses" else peek.messages
    call.input_estimate = estimate_input(body, conversation, call.route, model, is_escaped)
    call.max_output = max_output(call.route, peek)
    if peek.speed or peek.service_tier or peek.inference_geo:
        asked = [(field, decode_short(getattr(peek, field), str, "")) for field in PREMIUMS]
        call.premiums = tuple((field, word) for field, word in asked if word not in ORDINARY)
    write = cache_write(body, is_escaped)
    if write or kind == "responses" or any(BILLED_FIELDS(peek)):
        call.besides = read_besides(call, peek, write, is_escaped)
    call.session = find_session(call, peek)


# --- 15. Formats: what is read of an answer ---------------------------------------
# Offers: Block, ChatChunk, ChatMeter, CountTokensMeter, decode_known, EmbeddingsMeter, MessagesMeter, Meter,
#   Refusal, ResponsesMeter, status_of_error

# What is believed of an upstream's numbers, and when
#
#   format      its counts stand in                                                       its end
#   messages    message_start (input, split of cache writes), message_delta (so far)      message_stop
#   chat        the last chunk, where the client asked for it; of some servers in each    finish_reason or [DONE]
#   responses   response.completed, .incomplete, .failed                                  the same
#   no stream   `usage` beside the text                                                   the last byte
#
# Counts are totals: the last that is said counts, and none is added to another. A zero or null replaces no count, since
# there are servers that count at the start and write zeros at the end. What else the answer names is booked as well:
# iterations (compaction, advisors, fallbacks), pieces of hosted tools, and premiums, the words of what makes it dearer.
#
#   what came                                       input                     output
#   the end, with its counts                        as said                   as said
#   the end, without a count, or a zero of a text   as said                   bytes of text ÷ 4
#   a cut stream                                    as said                   the larger of said and bytes of text ÷ 4
#   no count of the input                           estimate of the request   as above
#   what is too long to be read, or compressed      as said                   the larger of that and what was reserved
#   a count that no call can have                   estimate of the request   bytes of text ÷ 4
#
# All but the first row are marked as estimates. An example: message_start says 10 input and 1 output, 400 bytes of text
# pass, message_delta says 50, and the connection is lost: 10 and 100, estimated. With message_stop it is 10 and 50.
#
# What an upstream sends is bounded like what a client sends: events and bodies of 8 MB, names of 64 characters, lists
# by their bytes. A value of another shape than we know hides none of those beside it (`decode_known`).

Count = int | float  # as JSON has it: some servers write 12.0
MAX_COUNT = 10**9  # tokens of one class in one call; the largest context of today is a thousandth of that
NOT_SAID = msgspec.Raw(b"")


STATUS_OF_ERROR = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "insufficient_quota": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
    "api_error": 500,
    "server_error": 500,
    "context_length_exceeded": 400,
}  # platform.claude.com/docs/en/api/errors; OpenAI's codes: `ResponseError` in its API reference


def status_of_error(name: str) -> int | None:
    """Return the status that an error's type or code stands for, None where it tells nothing."""
    if re.fullmatch(r"[45]\d\d", name):
        return int(name)
    is_clients = name.startswith(("invalid_", "image_"))  # OpenAI's: what is wrong with a prompt or an image
    return STATUS_OF_ERROR.get(name, 400 if is_clients else None)


MAX_ODD = 1000  # items of a list with an odd one; 600,000 of them, in an answer of 7 MB, took 43 s


def decode_known(raw: bytes | msgspec.Raw, kind: Any) -> Any:
    """Decode a value without the parts of it that have another shape than we know, however deep they stand.

    So what is odd beside the usage does not hide it: of structs the other fields are read, of lists the other items.
    Raises what decoding raises where nothing is known, or a list has more than MAX_ODD items.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError:
        for choice in (kind, *get_args(kind)):  # `list[Choice] | None`
            if get_origin(choice) is list:
                found = msgspec.json.decode(raw, type=list[msgspec.Raw])
                if len(found) > MAX_ODD:
                    raise
                items = []
                for item in found:
                    with contextlib.suppress(*UNREADABLE):
                        items.append(decode_known(item, get_args(choice)[0]))
                return items
            if isinstance(choice, type) and issubclass(choice, msgspec.Struct):
                parts, known = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]), {}
                for field in msgspec.structs.fields(choice):
                    if field.encode_name in parts:
                        with contextlib.suppress(*UNREADABLE):
                            known[field.name] = decode_known(parts[field.encode_name], field.type)
                return choice(**known)
        raise


def decode_items(raw: msgspec.Raw, kind: type[Decoded]) -> tuple[list[Decoded], bool]:
    """Decode a list; return its items, and whether that is all of them. Of an odd one there is what is known of it.

    Where other servers have null or a number, there is nothing to be missed.
    """
    with contextlib.suppress(*UNREADABLE):
        return msgspec.json.decode(raw, type=list[kind] | None) or [], True  # type: ignore[valid-type]
    with contextlib.suppress(*UNREADABLE):
        return decode_known(raw, list[kind]), False  # type: ignore[valid-type]
    return [], not bytes(raw).startswith((b"{", b"["))


# The shapes of answers: only what is looked at. None: this event does not say. `Raw`: looked at by itself, since it may
# have another shape than we know. They hold no cycles, and most are made per event: the collector need not know them.


class ApiError(msgspec.Struct, gc=False):
    """`error` of any API."""

    type: str | None = None
    code: str | int | None = None
    message: str = ""


class Block(msgspec.Struct, gc=False):
    """What kind of content a block is."""

    type: str = ""


class Refusal(msgspec.Struct):
    """The body of a refusal of any API."""

    error: ApiError


class AnthropicCacheCreation(msgspec.Struct, gc=False):
    """The split of cache writes; stands only in message_start and in non-stream answers."""

    ephemeral_5m_input_tokens: Count | None = None
    ephemeral_1h_input_tokens: Count | None = None


class AnthropicUsage(msgspec.Struct, gc=False):
    """`usage` of the Messages API, or one of its `iterations`."""

    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation: AnthropicCacheCreation | None = None
    iterations: msgspec.Raw = NOT_SAID
    server_tool_use: dict[str, Count | None] | None = None
    speed: str | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    type: str | None = None  # of an iteration
    model: str | None = None


class AnthropicMessage(msgspec.Struct, gc=False):
    """`message` of message_start, or a whole non-stream answer."""

    model: str | None = None
    usage: AnthropicUsage | None = None
    error: ApiError | None = None


class AnthropicDelta(msgspec.Struct, gc=False):
    """What a content_block_delta brings."""

    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None


class AnthropicEvent(msgspec.Struct, gc=False):
    """One event of a Messages stream."""

    type: str | None = None
    message: AnthropicMessage | None = None
    delta: AnthropicDelta | None = None
    usage: AnthropicUsage | None = None
    error: ApiError | None = None


class OpenAIDetails(msgspec.Struct, gc=False):
    """What is among the input tokens, or among those of the output; or how long cache writes are kept."""

    cached_tokens: Count | None = None
    cache_write_tokens: Count | None = None
    cache_write_tokens_details: OpenAIDetails | None = None
    ttl_12h_tokens: Count | None = None
    audio_tokens: Count | None = None


class OpenAIUsage(msgspec.Struct, gc=False):
    """`usage` of chat completions and embeddings (prompt, completion), and of responses and drawing tools."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: OpenAIDetails | None = None
    completion_tokens_details: OpenAIDetails | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: OpenAIDetails | None = None
    total_tokens: Any = None
    num_requests: Count | None = None  # of searches


class ToolUsage(msgspec.Struct, gc=False):
    """`tool_usage` of a response: what hosted tools have used, beside the model."""

    image_gen: OpenAIUsage | None = None
    web_search: OpenAIUsage | None = None


class OpenAIAnswer(msgspec.Struct, gc=False):
    """A non-stream answer, or the `response` of a responses event."""

    model: str | None = None
    output: msgspec.Raw = NOT_SAID  # of a response
    status: str | None = None
    service_tier: str | None = None
    tool_usage: ToolUsage | None = None
    usage: OpenAIUsage | None = None
    error: ApiError | None = None


class ChatCall(msgspec.Struct, gc=False):
    """A piece of a call of a tool, or the `function` within it."""

    arguments: str | None = None
    function: ChatCall | None = None


class ChatDelta(msgspec.Struct, gc=False):
    """What a chunk of a chat stream brings; reasoning under the names that servers give it."""

    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatCall] | None = None
    function_call: ChatCall | None = None  # of `functions`, which `tools` have replaced
    audio: Any = None

    def text_bytes(self) -> int:
        """Return how much was said, in bytes of UTF-8."""
        size = 0
        for text in (self.content, self.refusal, self.reasoning, self.reasoning_content):
            if text:
                size += len(text.encode())
        for call in self.tool_calls or ():
            if call.function and call.function.arguments:
                size += len(call.function.arguments.encode())
        if self.function_call and self.function_call.arguments:
            size += len(self.function_call.arguments.encode())
        return size


class ChatChoice(msgspec.Struct, gc=False):
    """One choice of a chat stream's chunk."""

    delta: ChatDelta | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, gc=False):
    """One event of a chat stream."""

    model: str | None = None
    choices: list[ChatChoice] | None = None
    usage: OpenAIUsage | None = None
    service_tier: str | None = None
    error: ApiError | None = None


class OutputItem(msgspec.Struct, gc=False):
    """What a response consists of: messages, calls of hosted tools and others."""

    type: str | None = None
    status: str | None = None
    action: Block | None = None
    container_id: str | None = None


class ResponsesEvent(msgspec.Struct, gc=False):
    """One event of a responses stream. `delta` is text where the event is a text delta."""

    type: str | None = None
    response: OpenAIAnswer | None = None
    item: OutputItem | None = None
    delta: Any = None
    code: str | None = None
    error: ApiError | None = None


MAX_PIECE_NAMES = 32  # of pieces, in one answer; the API has 2 …
MAX_PIECE_NAME = 64  # … and so many characters of each: they stand in the ledger


class Meter:
    """Reads the usage out of an answer while its bytes pass, and returns those for the client. Knows nothing of I/O.

    Gate and ledger go by the facts below alone, so that a translated answer is held back and booked as a native one.
    An answer that passes as it came is returned as the very bytes objects that came.

    Subclasses read one format's events and bodies. Every event is decoded, into the few typed fields above: 0.2 µs
    with msgspec, less than looking for words that may also stand in a user's text.
    """

    MAX_BODY = 8 << 20  # bytes of a non-stream answer that are kept for reading
    EMPTY = 1024  # bytes; a longer answer has said something
    EVENT_NAME = re.compile(rb'^(?:event: ?|data: ?\{\s*"type"\s*:\s*")([\w.]+)', re.MULTILINE)
    TERMINAL: frozenset[str] = frozenset()  # the types of events that end a stream

    events: msgspec.json.Decoder[Any] = msgspec.json.Decoder(AnthropicEvent)
    answer_type: type[msgspec.Struct] = AnthropicMessage
    charged = True
    speaks = True  # an answer without counts has output all the same

    # What has been seen of an answer. As defaults of the class: a call that does not need them does not write them.
    absurd = ""  # a count that nobody believes; then the whole usage is an estimate
    seen_input = False
    is_unread = False  # of what came, a part is too large to be read, or written so that nobody here can
    has_content = False  # more than the events that only announce it
    model = ""
    error_type = ""
    is_finished = False  # the format's terminal event came, or the whole body did
    has_failed = False  # and it is an answer all the same, which says of itself that it failed
    is_broken = False  # the whole body, or an event, is no JSON
    _body_size = 0
    _text_bytes = 0  # of content that passed, as UTF-8
    _said_output: Count | None = None  # the largest count of the output that stood in a final usage
    _is_partial = False  # a list of what is billed has an item that could not be read

    def __init__(self, call: Call) -> None:
        self._call = call
        self._events: EventReader | None = None
        self._body: list[bytes] = []
        self.counts = Tokens()
        self.extras: dict[str, float] = {}  # pieces by name
        self.premiums: dict[str, str] = {}  # words by the field of the answer

    def start(self, streaming: bool) -> None:
        """Begin an answer: events, or one JSON body."""
        self._events = EventReader() if streaming else None

    @property
    def between_events(self) -> bool:
        """Whether a ping fits here."""
        return self._events is not None and self._events.between_events

    def read(self, chunk: bytes, last: bool) -> bytes:
        """Read bytes of the answer and return them. What cannot be read is left alone: the client gets it as well."""
        if self._events is None:
            self._body_size += len(chunk)
            self._body.append(chunk)
            if self._body_size > self.MAX_BODY:
                self.is_unread = True
                self._body.clear()
            if last:
                self.is_finished = True
                self._read_body(b"".join(self._body))
                self._body.clear()
            return chunk
        for data in self._events.feed(chunk):
            try:
                self.read_event(self.events.decode(data))
            except msgspec.ValidationError:
                self._read_odd(data)
            except UNREADABLE:
                self.read_unknown(data, is_json=False)
        if self._events.dropped:
            self._pass_over(self._events.dropped)
        return chunk

    def _read_odd(self, data: bytes) -> None:
        """Take in what is known of an event that has something of another shape; whatever it is, it is the client's."""
        try:
            self.read_event(decode_known(data, self.events.type))
            self.has_content = self.has_content or not self.error_type
        except UNREADABLE:
            self.read_unknown(data, is_json=True)

    def _pass_over(self, dropped: list[bytes]) -> None:
        """Note events that were too long to be read: they may have had the usage, and one may have been the last."""
        self.is_unread = self.has_content = True
        for start in dropped:
            name = self.EVENT_NAME.search(start)
            self.is_finished = self.is_finished or (name is not None and name[1].decode() in self.TERMINAL)
        dropped.clear()

    def read_event(self, event: Any) -> None:
        """Take in one event; a format without streams has none."""

    def read_unknown(self, data: bytes, is_json: bool) -> None:
        """Take in the data of an event of which nothing is known; JSON is for the client to judge."""
        self.has_content = self.has_content or is_json
        self.is_broken = self.is_broken or not is_json

    def read_answer(self, answer: Any) -> None:
        """Take in a whole answer, or the one that a terminal event has."""
        self.model = answer.model or ""
        if answer.error:
            self.read_error(answer.error)
        if answer.usage:
            self.read_usage(answer.usage)

    def read_usage(self, usage: Any) -> None:
        """Overwrite what a usage object says."""
        raise NotImplementedError

    def read_error(self, error: ApiError) -> None:
        """Remember an error's type, or its code where that tells more."""
        names = [printable(str(name), MAX_PIECE_NAME) for name in (error.type, error.code) if name] or ["error"]
        self.error_type = next((name for name in names if status_of_error(name)), names[0])

    def _read_body(self, body: bytes) -> None:
        try:
            self.read_answer(decode_known(body, self.answer_type))
        except msgspec.ValidationError:
            pass  # no object
        except UNREADABLE:
            self.is_broken = not self.is_unread

    def count(self, value: Count) -> int:
        """Return a count as an integer; one that no call can have as 0, and nothing of the usage is believed."""
        if type(value) is int and 0 <= value <= MAX_COUNT:  # as most are
            return value
        count = int(value)
        if count == value and 0 <= count <= MAX_COUNT:
            return count
        self.absurd = f"a count of {max(-1e18, min(value, 1e18)):.6g} tokens"  # it may have a thousand digits
        return 0

    def read_output(self, count: Count | None) -> None:
        """Remember the count of the output in a usage that is not the first of several."""
        if count is not None:
            self._said_output = max(count, self._said_output or 0)

    def read_premium(self, field: str, word: str) -> None:
        """Take in what tier, speed or place an answer names."""
        if word in ORDINARY:
            self.premiums.pop(field, None)
        else:
            self.premiums[field] = word[:MAX_PIECE_NAME]

    # What is booked

    @property
    def did_work(self) -> bool:
        """Whether the upstream has begun to deliver, or counts tokens that it will charge for."""
        return self.has_content or self.counts.total_input_tokens + self.counts.output_tokens > 0

    def sum_up(self) -> Usage:
        """Put together what the upstream said."""
        usage = Usage(**msgspec.structs.asdict(self.counts))
        if self.extras:
            usage.extras = tuple(self.extras.items())
        if self.premiums:
            usage.premiums = tuple(self.premiums.items())
        return usage

    def spend(self, reached_upstream: bool) -> Usage:
        """Return the usage to book, by the table above."""
        if not (self.charged and reached_upstream):
            return Usage()
        usage = self.sum_up()
        if self.absurd:
            return self.estimate()
        usage.estimated = self._is_partial
        if not self.seen_input:
            usage.input_tokens = max(usage.input_tokens, self._call.input_estimate)  # that of iterations may be known
            usage.estimated = True
        is_empty = not self._text_bytes and self._body_size <= self.EMPTY
        is_counted = self._said_output or (self._said_output == 0 and is_empty)
        if self.speaks and not (is_counted and self.is_finished):
            usage.output_tokens = max(usage.output_tokens, self._estimated_output())
            usage.estimated = True
        return usage

    def estimate(self) -> Usage:
        """Return a usage without anything that the upstream said of it."""
        output = self._estimated_output()
        return Usage(input_tokens=self._call.input_estimate, output_tokens=output, estimated=True)

    def _estimated_output(self) -> int:
        """Count the content that passed. What was not read is an image or a sound, and counts what was reserved.

        By its bytes, an image of 9 MB would be 2 million tokens; it has 6,000.
        """
        if not self.speaks:
            return 0
        if self.is_unread:
            return max(self._text_bytes // 4, int(self._call.reserved_output))
        return (self._text_bytes or self._body_size) // 4


class MessagesMeter(Meter):
    """Anthropic's Messages API."""

    MAX_SHARES = 32  # lines in a call's bill
    MAX_ITERATIONS = 256 << 10  # bytes of what is read of them: a thousand, in 10 ms
    TERMINAL = frozenset(("message_stop",))
    BEFORE_CONTENT = frozenset(("message_start", "ping", "error"))

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._iterations: list[AnthropicUsage] = []

    def read_event(self, event: AnthropicEvent) -> None:
        if event.error:
            self.read_error(event.error)
        if event.type not in self.BEFORE_CONTENT:
            self.has_content = True
        delta = event.delta
        if event.type == "content_block_delta" and delta:
            text = delta.text or delta.thinking or delta.partial_json or ""
            self._text_bytes += len(text) if text.isascii() else len(text.encode())
            return
        if event.type in self.TERMINAL:
            self.is_finished = True
        if event.message:
            self.model = event.message.model or self.model
            if event.message.usage:
                self.read_usage(event.message.usage)
        if event.usage:
            self.read_output(event.usage.output_tokens)
            self.read_usage(event.usage)

    def read_answer(self, answer: AnthropicMessage) -> None:
        if answer.usage:
            self.read_output(answer.usage.output_tokens)
        super().read_answer(answer)

    def _read_counts(self, usage: AnthropicUsage, counts: Tokens) -> None:
        """Overwrite the counts that a usage object, or one of its iterations, says."""
        if usage.input_tokens:
            counts.input_tokens = self.count(usage.input_tokens)
        if usage.output_tokens:
            counts.output_tokens = self.count(usage.output_tokens)
        if usage.cache_read_input_tokens:
            counts.cache_read_tokens = self.count(usage.cache_read_input_tokens)
        split = usage.cache_creation
        if split and split.ephemeral_1h_input_tokens:
            counts.cache_write_1h_tokens = self.count(split.ephemeral_1h_input_tokens)
        if split and split.ephemeral_5m_input_tokens:
            counts.cache_write_5m_tokens = self.count(split.ephemeral_5m_input_tokens)
        if usage.cache_creation_input_tokens:  # the final one has no split, and counts all the same
            whole = self.count(usage.cache_creation_input_tokens)
            counts.cache_write_1h_tokens = min(counts.cache_write_1h_tokens, whole)
            counts.cache_write_5m_tokens = whole - counts.cache_write_1h_tokens

    def read_usage(self, usage: AnthropicUsage) -> None:
        self._read_counts(usage, self.counts)
        self.seen_input = self.seen_input or usage.input_tokens is not None
        if usage.iterations:
            self._iterations, is_whole = [], False
            if len(usage.iterations) <= self.MAX_ITERATIONS:
                self._iterations, is_whole = decode_items(usage.iterations, AnthropicUsage)
            self._is_partial = not is_whole
        if usage.server_tool_use:  # what hosted tools were used for, such as `web_search_requests`
            for name, count in itertools.islice(usage.server_tool_use.items(), MAX_PIECE_NAMES):
                piece = name[:MAX_PIECE_NAME].removesuffix("_requests")
                if piece in self.extras or len(self.extras) < MAX_PIECE_NAMES:
                    self.extras[piece] = self.count(count or 0)
        for field in PREMIUMS:
            word = getattr(usage, field)
            if word:
                self.read_premium(field, word)

    def sum_up(self) -> Usage:
        """Add up the counts and the iterations beside them.

        The top level has the executor's iterations (of its input perhaps only the first), and neither compaction nor
        advisors: so of each class the larger counts of top level and executor, and everything else in addition.
        """
        usage = super().sum_up()
        if not self._iterations:
            return usage
        executor, outside = Tokens(), Tokens()
        shares = dict[tuple[str, str], Share]()
        usage.is_fallback = any(iteration.type == "fallback_message" for iteration in self._iterations)
        for iteration in self._iterations:
            kind, model, tokens = iteration.type or "", iteration.model or "", Tokens()
            self._read_counts(iteration, tokens)
            is_executor = kind in ("message", "fallback_message")
            (executor if is_executor else outside).add(tokens)
            if is_executor and (model == self.model or not (model or usage.is_fallback)):
                usage.prompt_tokens = max(usage.prompt_tokens, tokens.total_input_tokens)
                continue
            if len(shares) >= self.MAX_SHARES and (kind, model) not in shares:
                kind, model = "others", ""
            share = shares.setdefault((kind, model), Share(kind=kind[:64], model=model[:MAX_NAME]))
            share.add(tokens)
            share.prompt_tokens = max(share.prompt_tokens, tokens.total_input_tokens)
        written = max(
            usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
            executor.cache_write_5m_tokens + executor.cache_write_1h_tokens,
        )
        for name in ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_1h_tokens"):
            setattr(usage, name, max(getattr(usage, name), getattr(executor, name)))
        usage.cache_write_5m_tokens = written - usage.cache_write_1h_tokens
        usage.add(outside)
        usage.shares = tuple(shares.values())
        return usage


class CountTokensMeter(MessagesMeter):
    """count_tokens is free of charge and never booked as spend."""

    charged = False


class OpenAIMeter(Meter):
    """What chat completions, embeddings and responses have in common."""

    answer_type = OpenAIAnswer

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._shares: dict[str, Share] = {}

    def read_usage(self, usage: OpenAIUsage) -> None:
        """Take in counts that stand under either API's names: servers write zeros under those that are not in use."""
        counts = self.counts
        whole = self.count(max(usage.prompt_tokens or 0, usage.input_tokens or 0, key=abs))
        output = self.count(max(usage.completion_tokens or 0, usage.output_tokens or 0, key=abs))
        total = usage.total_tokens
        if self.speaks and whole and isinstance(total, int | float) and total > whole + output:
            output = self.count(total) - whole  # xAI counts reasoning in nothing else
        heard = spoken = 0
        if whole:
            self.seen_input = True
            counts.input_tokens = whole
            details = usage.prompt_tokens_details if usage.prompt_tokens else usage.input_tokens_details
            if details:
                heard = self._read_details(details)
        if output:
            counts.output_tokens = output
            if usage.completion_tokens_details:
                spoken = min(self.count(usage.completion_tokens_details.audio_tokens or 0), counts.output_tokens)
        if output or usage.completion_tokens is not None or usage.output_tokens is not None:
            self.read_output(output)
        if heard or spoken:
            self._shares["audio"] = Share(input_tokens=heard, output_tokens=spoken, kind="audio")

    def _read_details(self, details: OpenAIDetails) -> int:
        """Take apart the input, which includes what was read from the cache, written to it, or is sound.

        Returns how much of it, neither cached nor written, is sound.
        """
        counts, whole = self.counts, self.counts.input_tokens
        kept = details.cache_write_tokens_details or OpenAIDetails()
        written = self.count(details.cache_write_tokens or 0)
        counts.cache_read_tokens = self.count(details.cached_tokens or 0)
        counts.cache_write_1h_tokens = min(written, self.count(kept.ttl_12h_tokens or 0))
        counts.cache_write_5m_tokens = written - counts.cache_write_1h_tokens
        counts.input_tokens = max(0, whole - counts.cache_read_tokens - written)
        return min(self.count(details.audio_tokens or 0), counts.input_tokens)

    def read_answer(self, answer: OpenAIAnswer) -> None:
        super().read_answer(answer)
        if answer.service_tier:
            self.read_premium("service_tier", answer.service_tier)

    def sum_up(self) -> Usage:
        usage = super().sum_up()
        if self._shares:
            usage.shares = tuple(self._shares.values())
            usage.prompt_tokens = usage.total_input_tokens
            for share in usage.shares:
                if share.kind != "audio":  # those are in the counts already
                    usage.add(share)
        return usage


class ChatMeter(OpenAIMeter):
    """Chat completions; usage comes only if the client asked for it, in an extra last chunk."""

    events = msgspec.json.Decoder(ChatChunk)

    def read_event(self, event: ChatChunk) -> None:
        self.model = self.model or event.model or ""
        if event.error:
            self.read_error(event.error)
        for choice in event.choices or ():
            if choice.delta:
                self._text_bytes += choice.delta.text_bytes()
                self.has_content = self.has_content or choice.delta.audio is not None
            if choice.finish_reason:
                self.is_finished = True  # some servers send no [DONE]
        self.has_content = self.has_content or self.is_finished or self._text_bytes > 0
        if event.usage:
            self.read_usage(event.usage)
            if event.service_tier:
                self.read_premium("service_tier", event.service_tier)

    def read_unknown(self, data: bytes, is_json: bool) -> None:
        if data.strip() == b"[DONE]":
            self.is_finished = self.has_content = True
        else:
            super().read_unknown(data, is_json)

    def sum_up(self) -> Usage:
        """Add the search that `web_search_options` asked for, which the usage does not tell."""
        besides = self._call.besides
        if besides and any(name == CHAT_SEARCH for name, _ in besides.extras) and self.did_work:
            self.extras[CHAT_SEARCH] = max(1, self.extras.get(CHAT_SEARCH, 0))
        return super().sum_up()


class ResponsesMeter(OpenAIMeter):
    """The Responses API."""

    MAX_CONTAINERS = 1000  # of Code Interpreter that are told apart; of more, each call counts
    TERMINAL = frozenset(("response.completed", "response.incomplete", "response.failed"))
    BEFORE_CONTENT = frozenset(
        ("response.created", "response.queued", "response.in_progress", "response.failed", "error")
    )

    events = msgspec.json.Decoder(ResponsesEvent)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._containers: set[str] = set()

    def read_event(self, event: ResponsesEvent) -> None:
        if event.type not in self.BEFORE_CONTENT:
            self.has_content = True
        if isinstance(event.delta, str) and event.response is None:
            self._text_bytes += len(event.delta) if event.delta.isascii() else len(event.delta.encode())
        elif event.type in self.TERMINAL and event.response:
            self.is_finished = True
            self.read_answer(event.response)
        elif event.type == "response.output_item.done":
            self._count_item(event.item or OutputItem())
        elif event.type == "error":
            self.read_error(event.error or ApiError(code=event.code))

    def read_answer(self, answer: OpenAIAnswer) -> None:
        super().read_answer(answer)
        if answer.status == "failed":
            self.has_failed = True
            self.error_type = self.error_type or "response_failed"
        if answer.output:
            items, is_whole = decode_items(answer.output, OutputItem)
            self._is_partial = not is_whole
            if items:  # the same ones as in the events, if there were any
                self.extras.clear()
                self._containers.clear()
            for item in items:
                self._count_item(item)
        if answer.tool_usage:
            self._read_tools(answer.tool_usage)

    def _count_item(self, item: OutputItem) -> None:
        """Count what a hosted tool was called for: a search, or another container of Code Interpreter."""
        piece = ""
        if item.type == "web_search_call" and item.status != "failed":
            if item.action is None or item.action.type in ("", "search"):  # opening a page is free
                piece = "web_search"
        elif item.type == "file_search_call":
            piece = "file_search"
        elif item.type == "code_interpreter_call":
            container = (item.container_id or "")[:MAX_PIECE_NAME]
            if container not in self._containers:
                piece = "code_interpreter"
                if len(self._containers) < self.MAX_CONTAINERS:
                    self._containers.add(container)
        if piece:
            self.extras[piece] = self.extras.get(piece, 0) + 1

    def _read_tools(self, tools: ToolUsage) -> None:
        """Take what the upstream says of its tools in place of what was counted."""
        searches, drawn = tools.web_search, tools.image_gen
        if searches and searches.num_requests is not None:
            self.extras["web_search"] = self.count(searches.num_requests)
        if drawn and (drawn.input_tokens or drawn.output_tokens):
            share = self._shares["image_gen"] = Share(kind="image_gen", model="gpt-image-1")
            share.input_tokens = self.count(drawn.input_tokens or 0)
            share.output_tokens = self.count(drawn.output_tokens or 0)


class EmbeddingsMeter(OpenAIMeter):
    """Embeddings: numbers come back, no tokens."""

    speaks = False


# --- 16. Dialects: a request for an upstream, and who reads its answer ------------
# Offers: Dialect, DIALECTS, Remedy, without_thinking

# Changes: the usage of a chat stream is asked for, a model is renamed, another account's thoughts are left out


def splice_field(body: bytes, name: str, text: bytes) -> Splice:
    """The change that sets a field of a JSON object, in its place or as the first. Raises BadRequest."""
    try:
        for found, start, end in walk_fields(body):
            if found == name:
                return Splice(start, end, text)
        start = body.index(b"{") + 1
    except (*UNREADABLE, ValueError) as error:
        raise BadRequest(f"The request body is not JSON: {error}") from None
    comma = b"" if END.match(body) else b","
    return Splice(start, start, b'"%b":%b%b' % (name.encode(), text, comma))


def splice_usage(body: bytes) -> Splice:
    """The change that lets a chat request ask for the usage of its stream. Raises BadRequest."""
    said = decode_short(PEEK_DECODER.decode(body).stream_options, dict[str, msgspec.Raw], {})
    # Without it in another case: some readers could take `Include_Usage: false` for ours.
    others = {name: value for name, value in said.items() if name.casefold() != "include_usage"}
    return splice_field(body, "stream_options", ENCODER.encode({"include_usage": True, **others}))


# Thoughts are signed for the account that they were thought for. Within a chain of tool calls the API wants them while
# `thinking` is on: there it is switched off for this answer.

ASSISTANT = msgspec.Raw(b'"assistant"')
THOUGHTS = ("thinking", "redacted_thinking")
MAX_PIECES = 50_000  # messages and blocks of a request that is repaired: 1 µs each; 200,000 tokens are 2,000


def without_thinking(body: bytes) -> bytes:
    """A Messages request without its thinking blocks, and messages that have nothing else. Raises BadRequest."""
    left = MAX_PIECES
    kept: list[bytes | memoryview] = []
    content = b""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        messages = memoryview(fields["messages"])
        if messages[0] != ord("["):
            raise BadRequest("The request body is not as expected: messages is no list")
        for message in list_items(messages, MAX_PIECES):
            turn = msgspec.json.decode(message, type=Turn)
            content = bytes(turn.content)
            repaired: bytes | memoryview = message
            if turn.role == ASSISTANT and content.startswith(b"["):
                blocks = list(list_items(memoryview(content), left))
                left -= len(blocks)
                others = [block for block in blocks if msgspec.json.decode(block, type=Block).type not in THOUGHTS]
                if len(others) < len(blocks):
                    content = b"[%b]" % b",".join(others)
                    whole = bytes(message)
                    repaired = b"".join(spliced(whole, [splice_field(whole, "content", content)]))
            left -= 1
            if left <= 0:
                raise BadRequest(
                    f"The request has more than {MAX_PIECES} messages and blocks, too many to be repaired."
                )
            if content != b"[]":
                kept.append(repaired)
    except (*UNREADABLE, KeyError) as error:
        raise BadRequest(f"The request body is not as expected: {error}") from None
    fields["messages"] = msgspec.Raw(b"[%b]" % b",".join(kept))
    if b'"tool_result"' in content:
        fields.pop("thinking", None)
        fields.pop("context_management", None)  # its clear_thinking edits need `thinking`
    return ENCODER.encode(fields)


class HiddenUsageReader(ChatMeter):
    """Reads a chat stream that has its usage because the gateway asked for it, and hides that from the client.

    All other bytes are the client's as they came, however they are cut. An event is held until it is whole, for it
    may be the chunk with the usage; what is longer than any such chunk goes on at once.
    """

    MAX_CHUNK = 16 << 10
    WHOLE = re.compile(rb".*(?:\n\r?\n|\r\r\n?)", re.DOTALL)  # up to the last empty line
    NO_CHOICES = re.compile(rb'"choices"\s*:\s*(?:\[\s*\]|null)')
    # Lines behind an empty one, and the empty one behind them.
    EVENT = re.compile(
        rb"(?:(?<=\n\n|\n\r|\r\r)|(?<=[\r\n]\r\n))"
        rb"((?:[^\r\n]++(?:\r\n?|\n|\Z))++)(?:\r\n?|\n|\Z)"
    )

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._before = b"\n\n"  # the last three bytes that went on: whether an event begins behind them
        self._held = b""

    def read(self, chunk: bytes, last: bool) -> bytes:
        super().read(chunk, last)
        if self._events is None:
            return chunk
        text = self._held + chunk
        end = 0
        if last:
            end = len(text)
        elif whole := self.WHOLE.match(text):
            end = whole.end()
        events, rest, long = text[:end], text[end:], b""
        if len(rest) > self.MAX_CHUNK:
            rest, long = b"", rest
        before, self._held = self._before, rest
        self._before = (before + (events + long)[-3:])[-3:]
        if self.NO_CHOICES.search(events):
            events = self.EVENT.sub(self._without_usage, before + events)[len(before) :]
        return events + long

    def _without_usage(self, event: re.Match[bytes]) -> bytes:
        whole, lines = event.group(0, 1)
        if len(whole) <= self.MAX_CHUNK and self.NO_CHOICES.search(lines):
            lines = lines.replace(b"\r\n", b"\n").replace(b"\r", b"\n").rstrip(b"\n")
            with contextlib.suppress(*UNREADABLE):
                chunk = decode_known(event_data(lines), ChatChunk)
                if chunk.usage and not chunk.choices:
                    return b""
        return whole


class Remedy(enum.Enum):
    """What a request goes without when it is sent once more, by the reason for which an upstream refused it."""

    THINKING = "does not know the signature of a thinking block"
    USAGE = "does not know stream_options.include_usage"


class Dialect:
    """How a client's route is spoken with an upstream of one format: the request out, and who reads the answer.

    This one is the identity, for an upstream that has the route itself. Any other overrides `request` and brings a
    reader of its own; one row of DIALECTS puts it into use.
    """

    BAD_SIGNATURE = re.compile(rb"invalid `?signature`? in `?thinking`? block", re.IGNORECASE)
    # A 400 of Anthropic's that is no fault of the request begins so; further on it may be what the client had said.
    NO_CREDIT = re.compile(r"(your )?credit balance is too low", re.IGNORECASE)

    def __init__(self, reader: Callable[[Call], Meter], with_usage: Dialect | None = None) -> None:
        self.reader = reader
        self.with_usage = with_usage  # the same, which asks for a stream's usage that the client did not ask for

    def request(self, call: Call, model: str) -> Pieces:
        """Return the body that asks for `model`: the call's own where that is its name. Raises BadRequest."""
        if model == call.model:
            return (call.body,)
        return spliced(call.body, [splice_field(call.body, "model", ENCODER.encode(model))])

    def remedy(self, call: Call, text: bytes) -> Remedy | None:
        """Return what the request can go without, after an upstream refused it with the error `text`."""
        return Remedy.THINKING if self.BAD_SIGNATURE.search(text) else None

    def refusal_case(self, status: int, text: bytes) -> str:
        """Return the row of the verdicts for a refusal: its status, unless the error `text` is more exact."""
        if status in (400, 403):
            with contextlib.suppress(*UNREADABLE):
                error = msgspec.json.decode(text, type=Refusal).error
                if status == 400 and self.NO_CREDIT.match(error.message):
                    return "402"
                if status == 403 and error.code == "model_not_found":  # OpenAI's: not for this project
                    return "404"
        return str(status)


class UsageDialect(Dialect):
    """Chat completions with `stream_options.include_usage` added, without which a stream cannot be booked."""

    UNKNOWN = re.compile(rb"stream_options|include_usage")

    def request(self, call: Call, model: str) -> Pieces:
        splices = [splice_usage(call.body)]
        if model != call.model:
            splices.append(splice_field(call.body, "model", ENCODER.encode(model)))
        return spliced(call.body, splices)

    def remedy(self, call: Call, text: bytes) -> Remedy | None:
        if call.includes_usage is None and self.UNKNOWN.search(text):  # the client did not name the option
            return Remedy.USAGE
        return super().remedy(call, text)


DIALECTS: dict[tuple[str, str], Dialect] = {
    # the upstream's format, the kind of the client's route
    ("anthropic", "messages"): Dialect(MessagesMeter),
    ("anthropic", "count_tokens"): Dialect(CountTokensMeter),
    ("openai", "chat"): Dialect(ChatMeter, with_usage=UsageDialect(HiddenUsageReader)),
    ("openai", "responses"): Dialect(ResponsesMeter),
    ("openai", "embeddings"): Dialect(EmbeddingsMeter),
    ("demo", "messages"): Dialect(MessagesMeter),
    ("demo", "count_tokens"): Dialect(CountTokensMeter),
}


# --- 17. Connections: HTTP/1 to upstreams, pool, names ----------------------------
# Offers: Answer, AttemptFailed, CUT, Failure, FIRST_BYTE_TIMEOUT, IDLE_TIMEOUT, Line, NOT_HTTP, OWN_TROUBLE, Pools,
#   STALE_CONNECTION, UNEXPECTED, UNMETERED


class Failure(NamedTuple):
    """Why an attempt gave no answer, or only part of one; `case` is its row in the table of verdicts."""

    outcome: str
    sentence: str
    case: str


OWN_TROUBLE = Failure("unavailable", "could not be asked for want of descriptors, ports or memory here", "own_trouble")
UNREACHABLE = Failure("unreachable", "could not be reached", "unreachable")
CONNECT_TIMEOUT = Failure("timeout", "could not be reached in time", "connect_timeout")
FIRST_BYTE_TIMEOUT = Failure("timeout", "did not answer in time", "first_byte_timeout")
IDLE_TIMEOUT = Failure("timeout", "went silent in the middle of its answer", "mid_stream")
CUT = Failure("upstream_cut", "closed the connection before its answer was whole", "cut")
NOT_HTTP = Failure("upstream_cut", "sent something that is not HTTP", "not_http")
UNEXPECTED = Failure("upstream_error", "sent something that is no answer", "unexpected")
UNMETERED = "unmetered"  # the case of an answer that has a form in which nobody here can read it
STALE_CONNECTION = "stale_connection"  # an attempt's outcome beside those of the table: nobody's fault


class AttemptFailed(Exception):
    """An attempt failed; `detail` is for the log. The upstream may have said when to come again."""

    def __init__(self, failure: Failure, detail: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(f"{failure.sentence} ({detail})" if detail else failure.sentence)
        self.failure = failure
        self.retry_after_s = retry_after_s


class Answer(Protocol):
    """Who listens to a connection: first a head, then bytes; the last ones say so. Or it is lost."""

    def head(self, status: int, headers: Headers) -> None: ...
    def received(self, body: bytes, last: bool) -> None: ...
    def lost(self, failure: Failure) -> None: ...
    def crashed(self, error: Exception) -> None: ...


class Line(Protocol):
    """A connection to an upstream, for one exchange at a time."""

    used_before: bool
    heard: bool  # whether any byte of the present answer has come

    @property
    def is_sent(self) -> bool: ...
    def send(self, head: bytes, body: Pieces, answer: Answer) -> None: ...
    def abort(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection. The parser is httptools (llhttp): strict, and not ours to keep.

    A read is handed on as one piece, however many chunks it held; their framing is this hop's own matter.
    """

    MAX_HEAD = 256 << 10  # bytes in a row that are no body: heads, endless 1xx included, chunk extensions, trailers
    MAX_HEADERS = 500

    def __init__(self, release: Callable[[UpstreamConnection], None]) -> None:
        self._release = release
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # called by the parser; no Python frame per chunk
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._headers: Headers = []
        self._bodiless = 0  # bytes since the last piece of a body
        self._status = self._body_pieces = 0
        self._head_given = self._head_whole = self._complete = False
        self._until_close = self._keep_alive = self._failed = False
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.used_before = self.heard = False
        self.idle_since = 0.0

    # What asyncio says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # bytes that nobody asked for: this connection cannot be trusted
            return self.abort()
        self.heard = True
        self._bodiless += len(data)
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserCallbackError:
                raise
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self._failed = not self._complete
            # The parser joins a header's value until it ends, and each piece copies all before it: 130 MB took 21 s.
            if self._pieces:
                self._bodiless = 0
            elif self._bodiless > self.MAX_HEAD or len(self._headers) > self.MAX_HEADERS:
                self._failed = not self._complete
            self._hand_on(answer)
        except Exception as error:
            self._crash(answer, error)

    def _hand_on(self, answer: Answer) -> None:
        """Tell what one read brought: a head, a piece of the body, an end; what was good before a fault as well."""
        if self._head_whole and not self._head_given:
            self._head_given = True
            headers, self._headers = self._headers, []
            answer.head(self._status, headers)
            if self._answer is None:  # it has heard enough
                return
        pieces = self._pieces
        if self._complete:
            del pieces[self._body_pieces :]  # what came behind the answer is nobody's
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._complete:
            self._finish(self._keep_alive)
            answer.received(body, True)
            return
        if self._head_given:
            answer.received(body, False)
        if self._failed:
            self._drop(NOT_HTTP)

    def eof_received(self) -> bool:
        return False  # the transport closes; connection_lost tells what that means

    def connection_lost(self, exc: Exception | None) -> None:
        answer = self._answer
        if answer is None:
            return self._release(self)
        try:
            if self._until_close and self._head_given and exc is None:
                self._finish(False)
                answer.received(b"", True)
            else:
                self._drop(CUT)
        except Exception as error:
            self._crash(answer, error)

    # What the parser says

    def on_message_begin(self) -> None:
        if self._complete:  # more than was asked for: the answer is good, the connection is not
            self._keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_whole:  # else a trailer: not for the client, whose framing is its own
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._head_whole:
            return
        self._status = self._parser.get_status_code()
        # With a body behind it in the same read, a good head may look too large.
        is_long = self._bodiless > self.MAX_HEAD and sum(map(len, itertools.chain(*self._headers))) > self.MAX_HEAD
        is_odd = self._status < 100 or self._status == 101  # nobody asked for another protocol
        if is_odd or is_long or len(self._headers) > self.MAX_HEADERS:
            self._failed = True
        if self._status < 200 or self._failed:  # or interim: the answer is still to come
            self._headers = []
            return
        self._head_whole = True
        self._keep_alive = self._parser.should_keep_alive()
        is_unframed = FRAMED_BY.isdisjoint([name.lower() for name, _ in self._headers])
        self._until_close = is_unframed and self._status not in (204, 304)

    def on_message_complete(self) -> None:
        if self._head_whole and not self._complete:
            self._complete, self._body_pieces = True, len(self._pieces)

    # What the relay says

    def send(self, head: bytes, body: Pieces, answer: Answer) -> None:
        """Start an exchange."""
        self._answer = answer
        self._headers = []
        self._bodiless = 0
        self.heard = self._head_given = self._head_whole = self._complete = self._until_close = False
        self.transport.writelines((head, *body))

    def abort(self) -> None:
        """End the exchange and the connection at once."""
        self._answer = None
        self.transport.abort()

    def pause(self) -> None:
        """Read no more until `resume`: the client is slow."""
        self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self.transport.resume_reading()

    @property
    def is_sent(self) -> bool:
        """Whether the whole request has left this process; some upstreams answer before they have read it."""
        return self.transport.get_write_buffer_size() == 0

    @property
    def is_open(self) -> bool:
        """Whether it can be used for another exchange."""
        return not self.transport.is_closing()

    def _finish(self, reusable: bool) -> None:
        self._answer = None
        self.used_before = True
        if not reusable or self.transport.get_write_buffer_size():
            self.transport.abort()
        self._release(self)

    def _drop(self, failure: Failure) -> None:
        answer = self._answer
        self.abort()
        self._release(self)
        if answer:
            answer.lost(failure)

    def _crash(self, answer: Answer, error: Exception) -> None:
        """A bug of ours ends the exchange and the connection; the upstream has done nothing wrong."""
        self.abort()
        answer.crashed(error)


P = TypeVar("P", bound=asyncio.Protocol)

# What this host lacks, and no upstream is to blame for; as getaddrinfo tells it, too.
OWN_TROUBLE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL)
OWN_TROUBLE_LOOKUPS = (socket.EAI_MEMORY, socket.EAI_SYSTEM)


def is_own_trouble(error: OSError) -> bool:
    """Whether a connection failed for want of something that the gateway itself needs."""
    return error.errno in (OWN_TROUBLE_LOOKUPS if isinstance(error, socket.gaierror) else OWN_TROUBLE_ERRNOS)


def look_up(host: str) -> list[str]:
    """The addresses of a name, in the resolver's order; takes as long as the resolver does. Raises OSError."""
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        socket.socket().close()  # the resolver does not say that it lacked descriptors: this does
        raise
    except UnicodeError as error:  # a name that cannot be one
        raise OSError(str(error)) from None
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


class Names:
    """Looks up names, each once however many calls want it, and keeps the addresses.

    A lookup has a thread of its own (there are never more of them than names), so that a name whose resolver is slow
    holds up no other: on the loop's few threads one slow name made calls to a good upstream take 60 s. Addresses are
    good for a minute. Older ones are used while a new lookup runs, and where it fails, at most for ten minutes more.
    """

    FRESH_S = 60.0
    STALE_S = 660.0

    def __init__(self, clock: Clock, resolve: Callable[[str], list[str]] = look_up) -> None:
        self._clock = clock
        self._resolve = resolve
        self._known: dict[str, tuple[float, list[str]]] = {}  # since when (monotonic), and the addresses
        self._running: dict[str, asyncio.Future[list[str]]] = {}

    async def find(self, host: str, allow_private: bool) -> list[str]:
        """Return where a name leads; what must not be connected to is left out each time. Raises OSError."""
        found = [host] if parse_address(host) is not None else await self._addresses(host)
        allowed = [address for address in found if allow_private or not is_forbidden(address)]
        if found and not allowed:
            raise OSError(f"{host} leads to {found[0]}, a link-local or metadata address: see allow_private")
        return allowed

    async def _addresses(self, host: str) -> list[str]:
        since, addresses = self._known.get(host, (-math.inf, []))
        age = self._clock.monotonic() - since
        if age <= self.FRESH_S:
            return addresses
        running = self._running.get(host) or self._start(host)
        if age <= self.STALE_S:
            return addresses
        return await asyncio.shield(running)  # it is everybody's: who gives up waiting for it does not end it

    def _start(self, host: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()
        running = self._running[host] = loop.create_future()

        def work() -> None:
            result: list[str] | OSError
            try:
                result = self._resolve(host)
            except OSError as error:
                result = error
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._end, host, result)

        try:
            threading.Thread(target=work, name=f"lookup {host}", daemon=True).start()
        except RuntimeError:  # no thread can be had
            self._end(host, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
        return running

    def _end(self, host: str, result: list[str] | OSError) -> None:
        running = self._running.pop(host)
        if isinstance(result, OSError):
            running.set_exception(result)
            running.exception()  # nobody may wait for it
        else:
            self._known[host] = self._clock.monotonic(), result
            running.set_result(result)

    def doubt(self, host: str) -> None:
        """Look a name up anew for the next call: none of its addresses could be connected to."""
        since, addresses = self._known.get(host, (-math.inf, []))
        self._known[host] = min(since, self._clock.monotonic() - self.FRESH_S - 1.0), addresses


class Pool:
    """The connections to one target. Idle ones are kept, the last used first, and closed after a time."""

    MAX_PROXY_HEAD = 64 << 10  # bytes of a proxy's answer to CONNECT

    def __init__(self, upstream: UpstreamConfig, pace: Pace, clock: Clock, names: Names) -> None:
        self.target = UpstreamTarget.of(upstream.url, upstream.proxy)
        self.names = names
        self._connecting: dict[asyncio.Timeout, float] = {}  # and by when
        self._ca_file = upstream.ca_file
        self._allow_private = upstream.allow_private
        self._pace = pace
        self._clock = clock
        self._idle: deque[UpstreamConnection] = deque()
        self._closed = False
        self.without_usage: dict[str, float] = {}  # models whose usage is not asked for, and until when

    @functools.cached_property
    def _ssl(self) -> ssl.SSLContext | None:
        if not self.target.tls:
            return None
        context = ssl.create_default_context(cafile=self._ca_file)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def take_idle(self) -> UpstreamConnection | None:
        """Return the idle connection that was used last, if there is one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def connect(self, connect_s: float) -> UpstreamConnection:
        """Return a new connection. Raises AttemptFailed."""
        try:
            async with asyncio.timeout(None) as limit:
                # Not a timer, which would go off before a word of what came while the loop stood still: see `check`.
                self._connecting[limit] = self._clock.monotonic() + connect_s
                try:
                    return await self._connect()
                finally:
                    self._connecting.pop(limit, None)
        except TimeoutError:
            raise AttemptFailed(CONNECT_TIMEOUT) from None
        except (OSError, ssl.SSLError) as error:
            raise AttemptFailed(OWN_TROUBLE if is_own_trouble(error) else UNREACHABLE, str(error)) from None

    async def _connect(self) -> UpstreamConnection:
        """Return a new connection, through a proxy and with TLS where these are wanted. Raises OSError."""
        target = self.target
        if target.proxy is None:
            name = target.host if target.tls else None
            _, connection = await self._open(
                lambda: UpstreamConnection(self.release), target.host, target.port, ssl=self._ssl, server_hostname=name
            )
            return connection
        connection = await self._tunnel(target.proxy)
        if self._ssl is None:
            return connection
        plain, loop = connection.transport, asyncio.get_running_loop()
        try:
            secured = await loop.start_tls(plain, connection, self._ssl, server_hostname=target.host)
            if secured is None:
                raise ConnectionError("the connection was closed before TLS stood")
            connection.connection_made(secured)
        except BaseException:
            plain.abort()
            raise
        return connection

    async def _open(self, make: Callable[[], P], host: str, port: int, **tls: Any) -> tuple[asyncio.Transport, P]:
        """Connect to the very addresses that were looked at. Raises OSError."""
        failures: list[OSError] = []
        for address in await self.names.find(host, self._allow_private):
            try:
                return await asyncio.get_running_loop().create_connection(make, address, port, **tls)
            except ssl.SSLError:
                raise
            except OSError as error:
                failures.append(error)
        self.names.doubt(host)
        theirs = [error for error in failures if not is_own_trouble(error)]
        raise (theirs or failures or [OSError(f"{host} has no address")])[-1]

    async def _tunnel(self, proxy: tuple[str, int, str]) -> UpstreamConnection:
        """Connect through a proxy's CONNECT (RFC 9110, 9.3.6). Raises OSError."""
        host, port, credential = proxy
        reader = asyncio.StreamReader(limit=self.MAX_PROXY_HEAD)
        transport, _ = await self._open(lambda: asyncio.StreamReaderProtocol(reader), host, port)
        try:
            name = f"[{self.target.host}]" if ":" in self.target.host else self.target.host
            authorization = f"proxy-authorization: {credential}\r\n" if credential else ""
            at = f"{name}:{self.target.port}"
            transport.write(f"CONNECT {at} HTTP/1.1\r\nhost: {at}\r\n{authorization}\r\n".encode())
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                raise ConnectionError("the proxy's answer is cut, or has no end") from None
            reader.feed_eof()
            status = head.split(b"\r\n", 1)[0].decode("latin-1")
            if not re.match(r"HTTP/1\.[01] 2\d\d\b", status) or await reader.read():
                raise ConnectionError(f"the proxy answered {status[:80]!r}")
            connection = UpstreamConnection(self.release)
            connection.connection_made(transport)  # it may be lost before TLS stands
            transport.set_protocol(connection)
            return connection
        except BaseException:
            transport.abort()
            raise

    def release(self, connection: UpstreamConnection) -> None:
        """Take back a connection after its exchange, or let go of one that was lost."""
        if connection.is_open and not self._closed:
            connection.idle_since = self._clock.monotonic()
            self._idle.append(connection)
        elif connection in self._idle:
            self._idle.remove(connection)
        elif connection.is_open:
            connection.abort()

    def forget_idle(self) -> None:
        """Close every idle connection: one of them was found dead."""
        while self._idle:
            self._idle.pop().abort()

    def check(self, stood_s: float) -> None:
        """End what takes too long to connect, and close what has been idle for too long.

        `stood_s`: the loop stood still for so long, in which no connection could get on.
        """
        now = self._clock.monotonic()
        for limit in tuple(self._connecting):
            self._connecting[limit] += stood_s
            if now > self._connecting[limit]:
                del self._connecting[limit]
                limit.reschedule(0.0)
        while self._idle and self._idle[0].idle_since < now - self._pace.upstream_idle_s:
            self._idle.popleft().abort()

    def close(self) -> None:
        """Close idle connections now and the others after their exchange."""
        self._closed = True
        self.forget_idle()


class Pools:
    """The connections to all upstreams. Those with the same address share them, also over a reload."""

    def __init__(self, clock: Clock, pace: Pace) -> None:
        self.names = Names(clock)
        self._clock = clock
        self._pace = pace
        self._pools: dict[tuple[str, str | None, str | None, bool], Pool] = {}

    def of(self, upstream: UpstreamConfig) -> Pool:
        """Return the connections to an upstream."""
        address = (upstream.url, upstream.ca_file, upstream.proxy, upstream.allow_private)
        pool = self._pools.get(address)
        if pool is None:
            pool = self._pools[address] = Pool(upstream, self._pace, self._clock, self.names)
        return pool

    def keep_only(self, upstreams: Sequence[UpstreamConfig]) -> None:
        """Close the connections that no upstream of a new snapshot uses."""
        kept = {self.of(upstream) for upstream in upstreams}
        for address, pool in tuple(self._pools.items()):
            if pool not in kept:
                pool.close()
                del self._pools[address]

    def check(self, stood_s: float) -> None:
        """End what takes too long to connect, and close connections that were idle for too long."""
        for pool in self._pools.values():
            pool.check(stood_s)


# --- 18. Upstreams: health and choice ---------------------------------------------
# Offers: Choice, Cooldown, Health, Place, read_retry_after, Ticket, Upstreams

# The problem. A failure may be everybody's (the provider is down) or one request's own (a prompt too long for the
# account), the answer does not say which, and two users may act together. So each user has a breaker at each upstream
# and API key; what two users met opens the one of everybody; and that one soon lets in a user who has not met it. The
# verdict on a failure says whether it counts against the upstream or the API key. What leads to a cooldown
# (`Evidence.add`):
#
#     failure                       of its user's calls        of everybody's
#     not reached, not HTTP         -                          `failures` in a row
#     `cooldown` in the config      -                          at once
#     401, 402                      `failures` in a row        at once, when two users met it
#     401 of the list of models     -                          at once, when a call was refused before
#     403                           `failures` in a row        the same, for that model
#     429                           at once                    the same, for that model
#     other, with a `retry-after`   at once                    as without it
#     other                         `failures` in a row        `failures` in a row, when two users met it
#
# After a 401 or a 403 the API key's list of models is asked for, which no request can spoil: a list speaks for the key
# for `VOUCHED_S`, a 401 against it; any other answer says nothing.
#
# A cooldown ends with a trial: at `until` the next call that it covers may go, and for `TRIAL_S` no other. Its answer,
# or a failure of another kind, lets in the others; the same failure begins the cooldown anew, twice as long. There may
# be several cooldowns at once: a call goes where all that cover it let it in. An answer that came to its end clears the
# counts, and ends what one user is held up for, unless the upstream said for how long. A user who is held up alone
# counts as one failure for the others. Each cooldown and each reset begins an epoch: what an attempt of an older one
# brings is ignored, unless it is a trial of a cooldown that still lasts.
#
# Its witnesses are the users on whose failures alone a cooldown of everybody's rests. They and the others have a door
# each for their trials. If a witness's fails in the same way, it holds up that witness alone, twice as long each time,
# and the next may try at once. If another user's does, there is one witness more: the others wait for
# `breaker.cooldown` for two, twice as long for each further one, the witnesses no longer than before. So whoever met a
# short outage waits for 10 s, or for 30 s if all calls of one other user fail; ten users ask an upstream that is down
# for half an hour 80 times. Once a trial is answered, what its witnesses meet holds up nobody else for `DOUBTED_S`.
#
# Example, with three failures in a row: mallory's calls get 500 at 0, 5 and 10 s, and mallory is held up until 20 s.
# Bob's call gets 500 at 11 s: that makes two, and carol's call goes. It gets 500 at 12 s: three, of three users, and
# everybody is held up until 22 s. Then dave's call is the trial. It is silent; at 32 s erin's goes beside it.
#
# Choice: the best priority that is ready; in it, by the policy, the session's home (weighted rendezvous hashing), the
# least busy, or each in turn. A call that finds nobody ready waits with those that may be sent to the same ones.
#
# Given up: a probe (the trial is one), the demotion of slow upstreams (the time to the first byte follows the prompt),
# a breaker that counts calls and not users, and one that believes two users for as long as the upstream said.

MAX_RETRY_AFTER_S = 1800.0
KEPT_S = 600.0  # an ended cooldown for which no trial came is remembered for so long
TRIAL_S = 10.0  # a trial goes alone for so long
VOUCHED_S = 60.0  # a list of models speaks so long for the API key that got it
DOUBTED_S = 600.0  # after an answered trial, what its witnesses meet holds up nobody else for so long
NUMBER = re.compile(rb"\d+(\.\d+)?")
VOUCHED_FOR = ("401", "403")  # what the list of models can speak against
MAX_COUNTS = 1000  # of an upstream or API key; the names of models in them are the clients'
Place = tuple[str, int]  # an upstream's name, and which of its API keys, counted from 1


def read_retry_after(headers: Headers, now: float) -> float | None:
    """Return when an answer says to come again, in seconds, at most half an hour; None where it does not say.

    `retry-after-ms`, else `retry-after`: seconds or an HTTP date (RFC 9110, 10.2.3).
    """
    values = first_values(headers)
    milliseconds = values.get(b"retry-after-ms", b"").strip()[:64]
    text = values.get(b"retry-after", b"").strip()[:64]
    seconds = 0.0
    if NUMBER.fullmatch(milliseconds):
        seconds = float(milliseconds) / 1000
    elif NUMBER.fullmatch(text):
        seconds = float(text)
    else:
        with contextlib.suppress(ValueError, OverflowError, TypeError):
            when = email.utils.parsedate_to_datetime(text.decode("latin-1"))
            seconds = when.replace(tzinfo=when.tzinfo or dt.UTC).timestamp() - now
    return min(seconds, MAX_RETRY_AFTER_S) if seconds > 0 else None


def user_of(call: Call) -> str:
    """Return whose call it is where failures are judged: all keys of a team are one user's."""
    return f"team {call.key.team}" if call.key.team else call.key.name


def kind_of(case: str) -> str:
    """Failures of one kind count together: each way to refuse an API key, too much for it, and all others."""
    return case if case in (*REFUSED_KEY, "429") else "failed"


class Whom(NamedTuple):
    """Whose calls a cooldown holds up: a user's, those for a model, or all."""

    user: str = ""  # "": any
    model: str = ""  # as clients name it; "": any

    def covers(self, call: Call) -> bool:
        """Whether it holds up a call."""
        return self.model in ("", call.model) and self.user in ("", user_of(call))


EVERYBODY = Whom()
Users = frozenset[str]  # as `user_of` names them
NO_USERS: Users = frozenset()


class TrialDoor:
    """Where calls that a cooldown holds up are let through: one at `opens_at`, the others `TRIAL_S` later."""

    __slots__ = ("is_tried", "opens_at")

    def __init__(self, opens_at: float) -> None:
        self.opens_at = opens_at  # monotonic
        self.is_tried = False

    def enter(self, now: float) -> None:
        """Let a call through."""
        if not self.is_tried:
            self.is_tried = True
            self.opens_at = now + TRIAL_S

    def reopen(self, now: float) -> None:
        """Let the next trial be made: one has failed."""
        self.is_tried = False
        self.opens_at = now

    def wait_s(self, now: float) -> float:
        """Return in how many seconds a trial may be made; 0 where one is running, as it may end at any time."""
        if self.is_tried:
            return 0.0
        return max(0.0, self.opens_at - now)


class Cooldown:
    """One time in which an upstream or an API key is left alone for some calls, until one of them gets an answer."""

    __slots__ = (
        *("door", "health", "is_said", "kind", "others_door", "since", "trips"),
        *("until", "until_time", "whom", "why", "witnesses"),
    )

    def __init__(
        self, health: Health, whom: Whom, why: str, seconds: float, is_said: bool = False, witnesses: Users = NO_USERS
    ) -> None:
        self.health = health
        self.whom = whom
        self.why = why
        self.kind = kind_of(why)
        self.is_said = is_said  # the upstream said how long
        self.witnesses = witnesses  # none: it is sure, or one user's
        self.trips = 1  # in a row
        now = health.clock.monotonic()
        self.until = now + seconds
        self.since = health.clock.wall()
        self.until_time = self.since + seconds  # wall time
        self.door = TrialDoor(self.until)
        self.others_door = self.door  # of those who are no witnesses

    def is_new_to(self, call: Call) -> bool:
        """Whether a call is of a user who has not met what led to it."""
        return not self.witnesses or user_of(call) not in self.witnesses

    def door_of(self, call: Call) -> TrialDoor:
        """Return where it lets a call through."""
        return self.others_door if self.is_new_to(call) else self.door

    def close(self) -> None:
        """Let in whom this covers; what its witnesses met was their own, or is over."""
        del self.health.cooldowns[self.whom]
        self.health.evidence.doubt(self.witnesses)


class Load:
    """How many calls run at an upstream, or with one of its API keys; how many of them are count_tokens."""

    __slots__ = ("counting", "running")

    def __init__(self) -> None:
        self.running = 0
        self.counting = 0


def cooldown_length_s(
    ticket: Ticket, whom: Whom, case: str, retry_after_s: float | None, trips: int, chance: float
) -> float:
    """Return how long a cooldown lasts after so many that their trials did not end; with jitter by `chance`, 0 to 1."""
    breaker = ticket.call.config.routing.breaker
    doubled = 2.0 ** min(trips, 30)
    if retry_after_s:
        if kind_of(case) == "failed" and not whom.user:  # the header is one user's answer's
            retry_after_s = min(retry_after_s, breaker.max_cooldown)
        # Nobody is to come before its time, nor all at once; a little later where it was too short.
        seconds = max(retry_after_s, min(breaker.cooldown, doubled))
        return min(seconds * (1 + 0.1 * chance), MAX_RETRY_AFTER_S)
    base = ticket.choice.upstream.verdict(case).cooldown_s or breaker.cooldown
    return min(max(breaker.max_cooldown, base), base * doubled) * (0.9 + 0.2 * chance)


class Evidence:
    """Which users met which failures in a row, and whose calls are held up for it: the table above has the cases."""

    __slots__ = ("_clock", "_doubted", "counts")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.counts: dict[tuple[str, str], Counter[str]] = {}  # by kind (and model, or ""), of each user
        self._doubted: dict[str, float] = {}  # users who hold up nobody else, until when (monotonic)

    def doubt(self, users: Iterable[str]) -> None:
        """Let nobody else be held up by what these users meet, for a while."""
        now = self._clock.monotonic()
        self._doubted = {user: until for user, until in self._doubted.items() if until > now}
        self._doubted.update(dict.fromkeys(users, now + DOUBTED_S))

    def add(
        self, ticket: Ticket, case: str, is_first: bool, is_said: bool, again: Mapping[Whom, Cooldown]
    ) -> dict[Whom, Users]:
        """Take in a failure. Return whose calls it and those before it hold up, each with the witnesses.

        `is_first`: of its call; the others count no more. `is_said`: the answer says when to come again. `again`: the
        cooldowns whose trial has failed in the same way.
        """
        call = ticket.call
        kind = kind_of(case)
        user = Whom(user_of(call))
        everybody = EVERYBODY
        if case in ("403", "429"):
            everybody = Whom(model=call.model)
        if len(self.counts) > MAX_COUNTS:
            self.counts.clear()
        counts = self.counts.setdefault((kind, everybody.model), Counter())
        if is_first:
            counts[user.user] += 1
        failures = call.config.routing.breaker.failures
        at_once = ticket.choice.upstream.verdict(case).cooldown_s > 0
        is_sure = case in UNREACHED or (kind == "failed" and at_once)
        if is_sure and (at_once or counts.total() >= failures or everybody in again):
            return {everybody: NO_USERS}
        now = self._clock.monotonic()
        believed = {name: count for name, count in counts.items() if now >= self._doubted.get(name, -math.inf)}
        is_often = at_once or sum(believed.values()) >= failures
        witnesses = NO_USERS
        if everybody in again:
            witnesses = again[everybody].witnesses
        held_up: dict[Whom, Users] = {}
        is_met = everybody in again or (is_often and len(believed) > 1)
        if is_met and user.user in believed and user.user not in witnesses:
            held_up[everybody] = witnesses.union(believed)
        is_alone = is_said or kind == "429" or counts[user.user] >= failures
        if everybody in again:
            user = Whom(user.user, everybody.model)
        if again or (is_alone and not held_up):
            counts[user.user] = 1  # for the others
            held_up[user] = NO_USERS
        return held_up


class Health:
    """What was seen of an upstream, or of one of its API keys. Survives reloads."""

    __slots__ = (
        *("ask_at", "clock", "cooldowns", "current_weight", "epoch"),
        *("evidence", "failures", "load", "vouched_until"),
    )

    def __init__(self, load: Load, clock: Clock) -> None:
        self.load = load
        self.clock = clock
        self.current_weight = 0.0  # of round robin
        self.epoch = 0  # +1 per cooldown and reset
        self.reset()

    def reset(self) -> None:
        """Forget what spoke against it."""
        self.epoch += 1
        self.failures = 0  # in a row
        self.evidence = Evidence(self.clock)
        self.cooldowns: dict[Whom, Cooldown] = {}
        self.ask_at = -math.inf  # monotonic: when the list of models may be asked for again
        self.vouched_until = -math.inf  # monotonic: until then the list speaks for the API key

    @property
    def running(self) -> int:
        """How many calls run there."""
        return self.load.running

    def record_success(self) -> None:
        """Zero the failure counters: an answer came to its end."""
        self.failures = 0
        self.evidence.counts.clear()
        if self.cooldowns:
            for cooldown in tuple(self.cooldowns.values()):
                if cooldown.whom.user and not cooldown.is_said:
                    cooldown.close()

    def vouch(self, until: float) -> None:
        """Hold no refusal against the API key, until a time (monotonic)."""
        self.ask_at = self.vouched_until = until
        evidence = self.evidence
        evidence.counts = {key: users for key, users in evidence.counts.items() if key[0] not in VOUCHED_FOR}
        for cooldown in tuple(self.cooldowns.values()):
            if cooldown.kind in VOUCHED_FOR:
                cooldown.close()

    def cool_down(self, cooldown: Cooldown, others_s: float) -> None:
        """Begin a cooldown, or the one that it follows anew: for its witnesses until then, for others `others_s`."""
        now = self.clock.monotonic()
        for old in tuple(self.cooldowns.values()):
            if now > max(old.until, old.door.opens_at) + KEPT_S:
                del self.cooldowns[old.whom]
        before = self.cooldowns.get(cooldown.whom)
        if before:
            cooldown.trips += before.trips
        if cooldown.witnesses:
            cooldown.others_door = TrialDoor(min(cooldown.until, now + others_s))
            if before and before.witnesses:
                cooldown.door = before.door
        self.cooldowns[cooldown.whom] = cooldown
        self.epoch += 1

    def cooldowns_of(self, call: Call) -> list[Cooldown]:
        """Return those that cover a call."""
        return [cooldown for whom, cooldown in self.cooldowns.items() if whom.covers(call)]

    def cooling_s(self, now: float) -> float:
        """For how long it is still left alone, for whomever."""
        return max((cooldown.until - now for cooldown in self.cooldowns.values() if cooldown.until > now), default=0.0)

    def is_out(self, now: float) -> bool:
        """Whether it is left alone for everybody."""
        return EVERYBODY in self.cooldowns and self.cooldowns[EVERYBODY].others_door.wait_s(now) > 0

    def shown(self) -> Cooldown | None:
        """Return the cooldown that people are shown: for the most calls, and the longest."""
        every = self.cooldowns.values()
        return min(every, key=lambda each: (each.whom.user != "", each.whom.model != "", -each.until), default=None)

    def state(self, now: float) -> str:
        """Return in a word how it stands for all but the users for whom alone it may be left alone."""
        shown = self.shown()
        if shown is None or shown.whom.user:
            return "ok"
        return "cooling" if shown.others_door.wait_s(now) > 0 else "half_open"

    def row(self, now: float) -> dict[str, Any]:
        """Return how it stands, for people: why it is left alone, since when and until when. Names no user."""
        row: dict[str, Any] = {"state": self.state(now), "running": self.running, "failures": self.failures}
        shown = self.shown()
        if shown:
            row |= {"why": shown.why, "since": utc_time(shown.since), "until": utc_time(shown.until_time)}
            if shown.whom.user:
                row["for_one_user"] = True
            if shown.whom.model:
                row["for_one_model"] = True
        return row


class Choice(NamedTuple):
    """One API key of one upstream: what an attempt is made with. `number` counts its API keys from 1."""

    upstream: UpstreamConfig
    number: int
    api_key: Secret
    health: Health  # of the upstream
    key_health: Health
    weight: float  # of this API key: the upstream's, divided by its API keys
    is_count: bool  # for count_tokens

    def __str__(self) -> str:
        return self.upstream.name + (f" (key {self.number})" if len(self.upstream.api_key) > 1 else "")

    @property
    def place(self) -> Place:
        """What tells it from others, in any snapshot."""
        return self.upstream.name, self.number

    def is_ready(self, now: float, call: Call) -> bool:
        """Whether a call may be sent there now: neither left alone nor full."""
        health, key, limit = self.health, self.key_health, self.upstream.max_concurrent
        is_cooling = health.cooldowns or key.cooldowns
        if is_cooling and any(now < cooldown.door_of(call).opens_at for cooldown in self.cooldowns_of(call)):
            return False
        if self.is_count:
            # It has half of the slots, and so leaves the others to calls that are paid for.
            if limit is not None and key.load.counting >= max(1, limit // 2):
                return False
            if health.load.counting >= max(1, self.upstream.max_connections // 2):
                return False
        return health.load.running < self.upstream.max_connections and (limit is None or key.load.running < limit)

    def cooldowns_of(self, call: Call) -> list[Cooldown]:
        """Return those of the upstream and of the API key that cover a call."""
        return self.health.cooldowns_of(call) + self.key_health.cooldowns_of(call)

    def ready_in(self, now: float, call: Call) -> float:
        """Return in how many seconds a call may be let in; fullness is not looked at."""
        return max([0.0, *(cooldown.door_of(call).wait_s(now) for cooldown in self.cooldowns_of(call))])


@functools.lru_cache(maxsize=8192)  # a session asks again and again
def rendezvous(affinity: str, name: str, weight: float) -> float:
    """Return how much `name` is the home of `affinity`; the highest wins (weighted rendezvous hashing).

    When one of the names goes, only what was at home there moves, and it comes home when the name does.
    """
    digest = hashlib.blake2b(f"{affinity}\0{name}".encode("utf-8", "replace"), digest_size=8).digest()
    share = ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52  # between 0 and 1
    return -weight / math.log(share)


def best_of(call: Call, ready: list[tuple[str, Choice]]) -> tuple[str, Choice]:
    """Return whom the policy prefers of those who are ready, with the name of the model there."""
    policy = call.config.routing.policy.of(call.model)
    if policy == "round_robin":
        # Smooth: who has waited longest for its weight has its turn.
        whole = sum(choice.weight for _, choice in ready) or 1.0
        for _, choice in ready:
            choice.key_health.current_weight += (choice.weight or 1e-9) / whole
        best = max(ready, key=lambda each: each[1].key_health.current_weight)
        best[1].key_health.current_weight -= 1.0
        return best
    affinity = find_affinity(call)

    def rank(each: tuple[str, Choice]) -> tuple[float, ...]:
        choice, name = each[1], each[1].upstream.name
        home = rendezvous(affinity, name, choice.upstream.weight)
        homes = home, rendezvous(affinity, f"{name}\0{choice.number}", 1.0)
        if policy == "sticky":
            return homes
        return choice.weight > 0, -choice.key_health.running / (choice.weight or 1.0), *homes

    return max(ready, key=rank)


class Ticket:
    """A slot on an upstream's API key, taken for one attempt. A context manager: leaving it gives the slot back."""

    __slots__ = ("_epochs", "_upstreams", "call", "choice", "model", "trials")

    def __init__(self, upstreams: Upstreams, call: Call, choice: Choice, model: str) -> None:
        self._upstreams = upstreams
        self.call = call
        self.choice = choice
        self.model = model  # as the upstream knows it
        health, key_health = choice.health, choice.key_health
        health.load.running += 1
        key_health.load.running += 1
        if choice.is_count:
            health.load.counting += 1
            key_health.load.counting += 1
        self._epochs = (health.epoch, key_health.epoch)
        self.trials: Sequence[tuple[Cooldown, TrialDoor]] = ()  # what it finds out about, and where it was let in
        if health.cooldowns or key_health.cooldowns:
            self.trials = [(cooldown, cooldown.door_of(call)) for cooldown in choice.cooldowns_of(call)]
            for _, door in self.trials:
                door.enter(call.config.clock.monotonic())

    def __enter__(self) -> Ticket:
        return self

    def end_trials(self) -> list[Cooldown]:
        """End its trials; return the cooldowns about which no other call has found out yet."""
        trials = [(cooldown.health.cooldowns.get(cooldown.whom), door) for cooldown, door in self.trials]
        self.trials = ()
        return [cooldown for cooldown, door in trials if cooldown and door in (cooldown.door, cooldown.others_door)]

    def is_current(self, health: Health) -> bool:
        """Whether this attempt began in the present epoch of its upstream's or API key's health."""
        return health.epoch == self._epochs[health is self.choice.key_health]

    def __exit__(self, *exc: object) -> None:
        load, key_load = self.choice.health.load, self.choice.key_health.load
        load.running -= 1
        key_load.running -= 1
        if self.choice.is_count:
            load.counting -= 1
            key_load.counting -= 1
        if self._upstreams.waiting:
            self._upstreams.wake()


class Seeker(Waiter[Ticket | None]):
    """A call that waits for an upstream: for a ticket, or for None where nobody will be ready in time.

    `wanted` says whom it may be sent to. Two calls that want the same find the same ready, but for what is left alone
    for one user or one model only (`Upstreams._serve_next`).
    """

    __slots__ = ("not_before", "tried", "wanted")

    def __init__(self, call: Call, tried: frozenset[Place], not_before: float, until: float) -> None:
        super().__init__(call, until)
        self.tried = tried
        self.not_before = not_before
        upstreams = tuple(serving.upstream for serving in call.servings)
        self.wanted = (upstreams, call.route.kind == "count_tokens", frozenset(tried))


class Upstreams:
    """Chooses who is asked, and remembers how that went. Owns the health of upstreams and API keys."""

    def __init__(self, clock: Clock, pace: Pace, chance: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._pace = pace
        self._chance = chance
        self._healths: dict[tuple[str, str, str | None, bool], Health] = {}
        self._choices: dict[tuple[UpstreamConfig, bool], tuple[Choice, ...]] = {}
        self.suspects: dict[Health, Choice] = {}  # whose list of models would tell whether its API key is good
        self.on_trip: Callable[[Choice, Cooldown], None] = lambda choice, cooldown: None
        self.on_recovery: Callable[[Choice], None] = lambda choice: None
        # By whom they may be sent to; who may not be sent anywhere yet stands apart.
        self._queues = WaitQueues[Seeker](pace.waiting_calls, clock, lambda _: None)

    # Who is asked

    def choices(self, upstream: UpstreamConfig, kind: str = "messages") -> tuple[Choice, ...]:
        """Return the API keys of an upstream, with their health.

        count_tokens has another health: an API key may have tokens for that and none for messages, or the other way
        round. What runs counts together.
        """
        is_count = kind == "count_tokens"
        found = self._choices.get((upstream, is_count))
        if found is None:
            keys = upstream.api_key or Secrets([Secret("")])
            whole = self._health(upstream, None, is_count)
            weight = upstream.weight / len(keys)
            found = self._choices[upstream, is_count] = tuple(
                Choice(upstream, i, key, whole, self._health(upstream, key, is_count), weight, is_count)
                for i, key in enumerate(keys, 1)
            )
        return found

    def choices_of(self, call: Call) -> Iterator[Choice]:
        """All API keys that a call may be sent with."""
        for serving in call.servings:
            yield from self.choices(serving.upstream, call.route.kind)

    def _health(self, upstream: UpstreamConfig, key: str | None, is_count: bool) -> Health:
        name = (upstream.name, upstream.url, key, is_count)
        if name not in self._healths:
            load = Load()
            if is_count:
                load = self._health(upstream, key, False).load
            self._healths[name] = Health(load, self._clock)
        return self._healths[name]

    def take(self, call: Call, tried: frozenset[Place]) -> Ticket | None:
        """Return a slot to ask the best who is ready now; None where nobody is."""
        now = self._clock.monotonic()
        ready: list[tuple[str, Choice]] = []
        for serving in call.servings:  # the best priority first
            if ready and serving.upstream.priority != ready[0][1].upstream.priority:
                break
            for choice in self.choices(serving.upstream, call.route.kind):
                if choice.is_ready(now, call) and (not tried or choice.place not in tried):
                    ready.append((serving.model, choice))
        if not ready:
            return None
        model, choice = ready[0]
        if len(ready) > 1:
            model, choice = best_of(call, ready)
        return Ticket(self, call, choice, model)

    def is_anybody_ready(self, call: Call, tried: frozenset[Place]) -> bool:
        """Whether there is somebody to be asked now; takes nobody's turn."""
        now = self._clock.monotonic()
        return any(choice.is_ready(now, call) and choice.place not in tried for choice in self.choices_of(call))

    def ready_in(self, call: Call, tried: frozenset[Place]) -> float:
        """Return in how many seconds somebody may be ready for a call; infinite where nobody is left."""
        now = self._clock.monotonic()
        waits = (choice.ready_in(now, call) for choice in self.choices_of(call) if choice.place not in tried)
        return min(waits, default=math.inf)

    def refused_key(self, call: Call) -> tuple[str, str] | None:
        """Return an upstream that refuses our API key, and how, where that is why nobody can be asked."""
        first = None
        for choice in self.choices_of(call):
            why = [cooldown.why for cooldown in choice.key_health.cooldowns_of(call) if cooldown.kind in REFUSED_KEY]
            if not why:
                return None
            first = first or (choice.upstream.name, why[0])
        return first

    # Who waits

    async def wait(
        self, call: Call, tried: frozenset[Place], not_before: float, until: float, gone: asyncio.Future[Any]
    ) -> Ticket | None:
        """Wait for a slot to ask somebody, from `not_before` on, users' keys in turn, at most to `until`.

        None where nobody will be ready in time, too many wait, or the client left (`gone` is resolved). Raises what a
        reload says against the user's key.
        """
        now = self._clock.monotonic()
        queues = self._queues
        if max(now + self.ready_in(call, tried), not_before) > until or len(queues.apart) >= self._pace.waiting_calls:
            return None
        seeker = Seeker(call, tried, not_before, until)
        queues.push(None if not_before > now else seeker.wanted, seeker)
        try:
            return await seeker.wait(gone, None)
        except asyncio.CancelledError:
            if seeker.done.done() and not seeker.done.cancelled():
                ticket = seeker.done.result()
                if isinstance(ticket, Ticket):
                    ticket.__exit__()
            raise
        finally:
            queues.remove(seeker)

    @property
    def waiting(self) -> int:
        """Calls that wait for an upstream."""
        return self._queues.size

    def wake(self) -> None:
        """Give what is free to those who wait: to one call of each queue, the queues in turn, while there is any."""
        queues = self._queues.queues
        turns = deque(queues)
        while turns:
            wanted = turns.popleft()
            if wanted in queues and self._serve_next(wanted):
                turns.append(wanted)
                if wanted in queues:
                    queues.move_to_end(wanted)

    def _serve_next(self, wanted: Hashable) -> bool:
        """Give a ticket to the call of a queue whose turn it is; False where none can have one.

        A call that is held up for its model, or its user, is passed over and keeps its turn. Any other may use all that
        they may, so if one finds nothing, none would.
        """
        for seeker in self._queues.firsts(wanted):
            ticket = self.take(seeker.call, seeker.tried)
            if ticket:
                self._queues.remove(seeker, is_served=True)
                seeker.end(ticket)
                return True
            covering = [each for choice in self.choices_of(seeker.call) for each in choice.cooldowns_of(seeker.call)]
            if all(cooldown.whom == EVERYBODY and cooldown.is_new_to(seeker.call) for cooldown in covering):
                return False
        return False

    def check(self, stood_s: float = 0.0) -> None:
        """Give what has cooled down to those who wait, and end the waits that have lasted long enough.

        The time `stood_s` for which the loop stood still counts for none.
        """
        now = self._clock.monotonic()
        for seeker in self._queues.apart:
            if seeker.not_before <= now:
                self._queues.push(seeker.wanted, seeker)
        self.wake()
        self._queues.check(stood_s)

    def refuse_keys(self, config: Config) -> None:
        """End the waits of calls whose user's key may not be used any more."""
        for seeker in self._queues:
            try:
                config.check_again(seeker.call)
            except GatewayError as refusal:
                seeker.end(refusal)

    def backoff_s(self, rounds: int) -> float:
        """Return how long a call waits before it asks the same ones again."""
        return min(self._pace.max_backoff_s, self._pace.backoff_s * 2.0**rounds) * (0.5 + 0.5 * self._chance())

    # How it went

    def record_answer(self, ticket: Ticket) -> None:
        """End the trials of an attempt: the upstream has something to say."""
        if ticket.trials:
            for cooldown in ticket.end_trials():
                cooldown.close()
            self.on_recovery(ticket.choice)
            self.wake()

    def record_success(self, ticket: Ticket) -> None:
        """Forget what was before: an answer came to its end. But not what the others found out meanwhile."""
        for health in (ticket.choice.health, ticket.choice.key_health):
            if (health.failures or health.cooldowns or health.evidence.counts) and ticket.is_current(health):
                health.record_success()

    def record_failure(self, ticket: Ticket, case: str, retry_after_s: float | None = None) -> None:
        """Take in how an attempt failed: the verdict says what is left alone for it, `_blame` for whom."""
        choice = ticket.choice
        verdict = choice.upstream.verdict(case)
        if case == OWN_TROUBLE.case:
            return  # it was not even asked
        if verdict.blame == "none":
            self.record_answer(ticket)
            return
        health = choice.health
        if verdict.blame == "key":
            health = choice.key_health
        is_current = ticket.is_current(health)
        again: dict[Whom, Cooldown] = {}  # those whose trial failed in the same way
        for cooldown in ticket.end_trials():
            if cooldown.health is health and cooldown.kind == kind_of(case):
                again[cooldown.whom] = cooldown
            elif cooldown.health is health or verdict.blame == "key":  # else nothing is known of the API key
                cooldown.close()
        call = ticket.call
        is_held_up = any(each.whom.user and each.whom not in again for each in health.cooldowns_of(call))
        if is_held_up or not (is_current or again):
            return  # it began before that
        for cooldown in again.values():
            cooldown.door_of(call).reopen(self._clock.monotonic())
        is_first = health not in call.blamed  # a call that tries it again and again is one failure
        if is_first:
            call.blamed += (health,)
            health.failures += 1
        if case in VOUCHED_FOR and self._is_vouched_for(choice, health):
            return
        held_up = health.evidence.add(ticket, case, is_first, bool(retry_after_s), again)
        for whom, witnesses in held_up.items():
            trips = health.cooldowns[whom].trips if whom in health.cooldowns else 0
            seconds = cooldown_length_s(ticket, whom, case, retry_after_s, trips, self._chance())
            others_s = call.config.routing.breaker.cooldown * 2.0 ** min(max(0, len(witnesses) - 2), 30)
            self._cool_down(choice, Cooldown(health, whom, case, seconds, bool(retry_after_s), witnesses), others_s)

    def _cool_down(self, choice: Choice, cooldown: Cooldown, others_s: float) -> None:
        cooldown.health.cool_down(cooldown, others_s)
        self.on_trip(choice, cooldown)

    # What the list of models, which costs nothing, says of an API key that calls were refused with

    def _is_vouched_for(self, choice: Choice, health: Health) -> bool:
        """Whether the list of models speaks for an API key that a call was refused with; ask for it if need be."""
        now = self._clock.monotonic()
        if now >= health.ask_at:
            health.ask_at = now + VOUCHED_S
            self.suspects[health] = choice
        return now < health.vouched_until

    def take_suspects(self) -> list[tuple[Choice, Health]]:
        """Return whose list of models is to be asked for, each once."""
        suspects = [(choice, health) for health, choice in self.suspects.items()]
        self.suspects.clear()
        return suspects

    def record_key_check(self, choice: Choice, health: Health, status: int) -> None:
        """Take in the answer to a request for the list of models, by a suspected API key; `status` 0: no answer."""
        if 200 <= status < 300:
            health.vouch(self._clock.monotonic() + VOUCHED_S)
            self.wake()
        elif status == 401 and health.failures:
            before = health.cooldowns.get(EVERYBODY)
            if before is None or before.witnesses:
                seconds = choice.upstream.verdict("401").cooldown_s or MAX_RETRY_AFTER_S
                self._cool_down(choice, Cooldown(health, EVERYBODY, "401", seconds), seconds)

    # What people ask and say

    def keep_only(self, upstreams: Iterable[UpstreamConfig]) -> None:
        """Forget what is no longer configured, and let those who wait see what is."""
        self._choices = {}
        kinds = ("messages", "count_tokens")
        choices = [c for upstream in upstreams for kind in kinds for c in self.choices(upstream, kind)]
        kept = {health for choice in choices for health in (choice.health, choice.key_health)}
        self._healths = {name: health for name, health in self._healths.items() if health in kept}
        self.wake()

    def reset(self, name: str) -> None:
        """Forget what speaks against an upstream and its API keys."""
        for place, health in self._healths.items():
            if place[0] == name:
                health.reset()
        log.info("upstream %s: cooldowns and failure counts were reset", name)
        self.wake()

    def can_serve(self, upstreams: Iterable[UpstreamConfig]) -> bool:
        """Whether some API key of some upstream can be used. After a cooldown it can: only a call finds out."""
        now = self._clock.monotonic()
        choices = (choice for upstream in upstreams for choice in self.choices(upstream))
        return not all(choice.health.is_out(now) or choice.key_health.is_out(now) for choice in choices)

    def report(self, upstreams: Iterable[UpstreamConfig]) -> list[dict[str, Any]]:
        """Return how each upstream and each of its API keys stands.

        While API keys of one that is ok are not, it is `degraded`; while none is, `half_open` or `cooling` as they are.
        """
        now = self._clock.monotonic()
        rows = []
        for upstream in upstreams:
            choices = self.choices(upstream)
            keys = [{"number": choice.number, **choice.key_health.row(now)} for choice in choices]
            row = {**choices[0].health.row(now), "name": upstream.name, "keys": keys}
            states = {"degraded" if "for_one_model" in key and key["state"] != "ok" else key["state"] for key in keys}
            if row["state"] == "ok" and states != {"ok"}:
                row["state"] = "degraded" if states & {"ok", "degraded"} else max(states)  # half_open before cooling
            rows.append(row)
        return rows

    def close(self) -> None:
        """End every wait."""
        self._queues.close()


# --- 19. Demo: an upstream that needs no API key ----------------------------------
# Offers: DEMO_MODEL, DemoLine

DEMO_MODEL = "claude-demo"
DEMO_TEXT = "Hello from the demo upstream. Put a real upstream into config.yaml to talk to a model."
MAX_DEMO_BODY = 2 << 20  # bytes: the demo answers on the event loop


class DemoRequest(msgspec.Struct):
    """What the demo reads of a request. Four bytes of the fields that are input count as a token."""

    model: str
    messages: msgspec.Raw
    system: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    stream: bool | None = None


def demo_event(kind: str, **fields: object) -> bytes:
    """Return one event of a Messages stream."""
    return f"event: {kind}\ndata: ".encode() + msgspec.json.encode({"type": kind, **fields}) + b"\n\n"


def demo_message(request: DemoRequest) -> tuple[dict[str, Any], list[bytes]]:
    """Return an answer, whole and as events. A word of it is a token."""
    words = re.findall(r"\S+\s*", DEMO_TEXT)
    size = len(request.messages) + len(request.system) + len(request.tools)
    usage = {"input_tokens": max(1, size // 4), "output_tokens": len(words)}
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    message: dict[str, Any] = {"id": "msg_demo", "type": "message", "role": "assistant", "model": request.model}
    whole = {**message, "content": [{"type": "text", "text": DEMO_TEXT}], **stop, "usage": usage}
    begun = {**whole, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    return whole, [
        demo_event("message_start", message=begun),
        demo_event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *(demo_event("content_block_delta", index=0, delta={"type": "text_delta", "text": word}) for word in words),
        demo_event("content_block_stop", index=0),
        demo_event("message_delta", delta=stop, usage=usage),
        demo_event("message_stop"),
    ]


def demo_answer(path: str, body: bytes) -> tuple[int, dict[str, Any], list[bytes]]:
    """Return the demo's answer: status, a JSON body, and the events where a stream was asked for."""
    if len(body) > MAX_DEMO_BODY:
        error = {"type": "request_too_large", "message": f"the demo upstream reads at most {MAX_DEMO_BODY} bytes"}
        return 413, {"type": "error", "error": error}, []
    try:
        request = msgspec.json.decode(body, type=DemoRequest)
    except UNREADABLE as unreadable:
        error = {"type": "invalid_request_error", "message": str(unreadable)}
        return 400, {"type": "error", "error": error}, []
    whole, events = demo_message(request)
    if path == "/v1/messages/count_tokens":
        return 200, {"input_tokens": whole["usage"]["input_tokens"]}, []
    return 200, whole, events if request.stream else []


class DemoLine:
    """A connection to the built-in upstream: the same calls as a real one, answers made here."""

    used_before = False
    is_sent = True

    def __init__(self, word_s: float) -> None:
        self._word_s = word_s
        self.heard = False

    def send(self, head: bytes, body: Pieces, answer: Answer) -> None:
        path = head.split(b" ", 2)[1].partition(b"?")[0].decode()
        status, whole, events = demo_answer(path, b"".join(body))
        kind = b"text/event-stream; charset=utf-8" if events else b"application/json"
        headers = [(b"content-type", kind), (b"cache-control", b"no-cache")]
        self._task = asyncio.create_task(self._say(status, headers, events or [msgspec.json.encode(whole)], answer))

    async def _say(self, status: int, headers: Headers, pieces: list[bytes], answer: Answer) -> None:
        try:
            self.heard = True
            answer.head(status, headers)
            for piece in pieces[:-1]:
                answer.received(piece, False)
                await asyncio.sleep(self._word_s)
            answer.received(pieces[-1], True)
        except Exception as error:
            answer.crashed(error)

    def abort(self) -> None:
        self._task.cancel()

    def pause(self) -> None:
        pass  # an answer of 3 KB slows nobody

    def resume(self) -> None:
        pass


# --- 20. Attempts: one try of one upstream, and the gate --------------------------
# Offers: ANSWERING, Attempt, ENDED, EXCHANGE_MOVES, ExchangePhase, FAILED, HIDDEN_KEY, IllegalMove, LEFT, Outcome,
#   PINGED, QUIET, SERVED, Sink, WHOLE

# A call on its way is an `Exchange`: its client on one side, its attempts on the other. An upstream may fail at any
# byte, and a client may leave or stop reading at any byte. Until the client has got the first byte of an answer a
# failed attempt is followed by another one, and the client does not notice; after it never. So there are two phases:
# that of an attempt says how far its upstream is, that of the exchange what its client has got.
#
# `Attempt.done` is resolved once: it raises AttemptFailed if the attempt failed before the gate opened, and has a
# result when the call is over. `Exchange.done` is resolved once, with the outcome. What is tried next is decided in
# `Relay._answer`; `Relay.send` only repeats what met a dead connection. A move that no table has is a bug.
#
# Example, a stream with two upstreams. 0 s: the request is sent to a (QUIET, ASKED). 15 s: a is silent, the client
# gets 200 and a ping (PINGED). 20 s: a answers 529 (HELD, then WHOLE with the error's last byte): the gate stays shut,
# the attempt fails, and the loop begins another one with b. 21 s: b's message_start is held back (HELD). 22 s: its
# first content_block_start opens the gate (OPEN, ANSWERING), and the client gets both events behind its ping. 30 s: b
# dies (LOST): nothing may follow, the client's stream is cut, and the entry says upstream_cut and two attempts.
#
# Given up: a timer for each deadline. It cost more than the event that moved it, so `check` looks at all every tick.


class AttemptPhase(enum.IntEnum):
    """How far the upstream of an attempt is."""

    CONNECTING = 0  # there is no connection yet
    ASKED = 1  # the request is sent
    HELD = 2  # the answer's head is here; its bytes are held back
    OPEN = 3  # its first content is here: the bytes are the client's
    WHOLE = 4  # the last byte is here
    LOST = 5  # cut, late, refused by the gate, or not wanted


class ExchangePhase(enum.IntEnum):
    """What the client of an exchange has got."""

    QUIET = 0  # nothing: an error may have any status
    PINGED = 1  # 200 and pings, into a long silence: an error is an event
    ANSWERING = 2  # bytes of one attempt: nothing else may follow them
    LEFT = 3  # it went away; the answer is read on for the ledger, or the call ends
    SERVED = 4  # it went away, and had the terminal event: it missed nothing
    ENDED = 5  # `done` has the outcome


# By these names: one of a class of Enum costs 0.12 µs each time (Python 3.11), and a call looks forty times.
CONNECTING, ASKED, HELD, OPEN, WHOLE, LOST = AttemptPhase
QUIET, PINGED, ANSWERING, LEFT, SERVED, ENDED = ExchangePhase
ATTEMPT_MOVES: dict[AttemptPhase, tuple[AttemptPhase, ...]] = {
    CONNECTING: (ASKED, LOST),
    ASKED: (HELD, LOST),
    HELD: (OPEN, WHOLE, LOST),
    OPEN: (WHOLE, LOST),
    WHOLE: (),
    LOST: (),
}
EXCHANGE_MOVES: dict[ExchangePhase, tuple[ExchangePhase, ...]] = {
    QUIET: (PINGED, ANSWERING, LEFT, ENDED),
    PINGED: (ANSWERING, LEFT, ENDED),
    ANSWERING: (LEFT, SERVED, ENDED),
    LEFT: (ENDED,),
    SERVED: (ENDED,),
    ENDED: (),
}


HIDDEN_KEY = "(our API key)"  # in place of one that an upstream says back, in the log and in the ledger


class IllegalMove(Exception):
    """A bug of ours: a phase was to become another one that its table does not have."""


class Sink(Protocol):
    """Where an answer goes: the client's side of a call. The front door implements it."""

    exchange: Exchange | None  # is told of a slow client, and of one that went away

    @property
    def is_gone(self) -> bool: ...
    def head(self, status: int, headers: Headers, streaming: bool) -> None: ...
    def write(self, data: bytes, last: bool) -> None: ...
    def cut(self) -> None: ...
    def refuse(self, error: GatewayError, api: Api, request_id: str) -> None: ...


class Outcome(NamedTuple):
    """How a call ended. `status` is what the client was sent, 0 where nothing was."""

    name: str
    status: int = 0
    error: GatewayError | None = None  # for the client, whose answer has not begun


FAILED = Outcome("internal_error", error=GatewayError(INTERNAL_ERROR))  # a bug of ours


class Attempt(msgspec.Struct, eq=False):
    """One try of one upstream: listens to its connection, and holds its answer back until the first content."""

    MAX_HELD: ClassVar = 256 << 10  # bytes; what is larger has content, or is no error that is worth keeping

    exchange: Exchange
    ticket: Ticket
    dialect: Dialect
    upstream: UpstreamConfig
    reader: Meter
    done: asyncio.Future[None]
    entry: AttemptEntry
    began: float
    heard_at: float  # when the upstream last said something
    phase: AttemptPhase = CONNECTING
    line: Line = cast("Line", None)  # from ASKED on
    failure: Failure | None = None  # why it failed; or the error that is passed on as the client's answer
    remedy: Remedy | None = None  # what cures that failure
    status: int = 0
    headers: Headers = []
    is_streaming: bool = False
    encoding: bytes = b""  # of a compressed answer, though asked for as it is
    upstream_request_id: str = ""
    raw: list[bytes] = []  # what the upstream has said while the gate was shut …
    held: list[bytes] = []  # … and the same as it is for the client
    held_size: int = 0
    first_byte_s: float = 0.0  # how long the upstream may be silent before its first content
    sent_at: float | None = None
    first_byte_at: float | None = None
    error_until: float = math.inf  # when what has come of an error's body must do

    @classmethod
    def of(cls, exchange: Exchange, ticket: Ticket, dialect: Dialect) -> Attempt:
        """Return an attempt that has not begun."""
        upstream, now = ticket.choice.upstream, exchange.clock()
        done = asyncio.get_running_loop().create_future()
        entry = AttemptEntry(upstream.name, ticket.choice.number)
        return cls(exchange, ticket, dialect, upstream, dialect.reader(exchange.call), done, entry, now, now)

    def __repr__(self) -> str:
        return f"Attempt({self.exchange!r})"  # its headers have a key in them

    def begin(self, line: Line, head: bytes, body: Pieces) -> None:
        """Send the request on a connection."""
        self._move(ASKED)
        self.line = line
        self.sent_at = self.heard_at = self.exchange.clock()
        line.send(head, body, self)

    def _move(self, phase: AttemptPhase) -> None:
        if phase not in ATTEMPT_MOVES[self.phase]:
            raise IllegalMove(f"an attempt that is {self.phase.name} cannot become {phase.name}")
        self.phase = phase

    @property
    def is_running(self) -> bool:
        """Whether its upstream is at work: the connection is its own."""
        return ASKED <= self.phase <= OPEN

    # What the connection says. What is raised here comes back as `crashed`.

    def head(self, status: int, headers: Headers) -> None:
        """Take the answer's head."""
        self._move(HELD)
        self.status = status
        self.headers = headers
        self.first_byte_at = self.heard_at = self.exchange.clock()
        named = first_values(headers)
        self.is_streaming = named.get(b"content-type", b"")[:17].lower() == b"text/event-stream"
        request_id = named.get(b"request-id") or named.get(b"x-request-id")
        if request_id:
            self.upstream_request_id = printable(request_id.decode("latin-1"))
        if b"content-encoding" in named:
            encodings = [value.strip().lower() for name, value in headers if name.lower() == b"content-encoding"]
            self.encoding = next((name for name in encodings if name not in (b"", b"identity")), b"")
        if status >= 400:
            self.error_until = self.heard_at + self.exchange.pace.error_body_s
        self.reader.start(self.is_streaming)

    def received(self, body: bytes, last: bool) -> None:
        """Take bytes of the answer: for the client at once, or held back until the gate opens."""
        self.heard_at = self.exchange.clock()
        is_open = self.phase is OPEN
        if last:
            self._move(WHOLE)
        data = self.reader.read(body, last) if body or last else body
        if not is_open:
            self.raw.append(body)
            self.held.append(data)
            self.held_size += len(body)
            if last or self._is_decidable():
                self._decide()
        elif last:
            self._end_answer(data)
        elif data:
            self.exchange.relay(data, self.heard_at)

    def lost(self, failure: Failure) -> None:
        """Take the loss of the connection: a failure while the gate is shut, else a cut answer."""
        is_open = self.phase is OPEN
        self._move(LOST)
        if is_open:
            self.exchange.complete(Outcome(failure.outcome, self.status), b"", False)
        else:
            self._fail(failure)

    def crashed(self, error: Exception) -> None:
        """End the call for a bug of ours."""
        self.exchange.crash(error)

    # The gate: decides by status, headers, and the reader's facts

    def _is_decidable(self) -> bool:
        """Return whether what is held back shows already what it is."""
        if self.held_size > self.MAX_HELD:
            return True
        if self.status >= 400:
            return False
        if self.encoding:
            return self.held_size > 0  # nothing that follows could be read
        reader = self.reader
        has_said = reader.has_content or bool(reader.error_type) or reader.is_broken
        return has_said and self.is_streaming and self.status == 200

    def _decide(self) -> None:
        """Open the gate, or fail."""
        failure = self._find_failure()
        if failure:
            self.drop()
            self._fail(failure)
            return
        data = b"".join(self.held)
        self.exchange.open(self)
        self.raw.clear()
        self.held.clear()
        if self.phase is WHOLE:
            self._end_answer(data)
        else:
            self._move(OPEN)
            self.exchange.relay(data, self.heard_at)

    def _fail(self, failure: Failure) -> None:
        self.failure = failure
        self.done.set_exception(AttemptFailed(failure, retry_after_s=self.retry_after_s()))

    def _find_failure(self) -> Failure | None:
        """Return what is wrong with what is held back; None if it is for the client."""
        reader = self.reader
        is_pinged = self.exchange.phase is PINGED
        if self.status >= 400:
            return self._find_refusal()
        if self.status != 200 or self.encoding:
            return self._find_unmetered() or UNEXPECTED
        if reader.has_failed and reader.did_work and (self.is_streaming or not is_pinged):
            return None  # it is paid for: another try would be paid for as well
        if reader.error_type:
            error_type = reader.error_type
            if self.ticket.choice.api_key:
                error_type = error_type.replace(self.ticket.choice.api_key, HIDDEN_KEY)
            sentence = f"answered with an error ({error_type})"
            return self._unless_passed(Failure("upstream_error", sentence, str(self.error_status)))
        if not self.is_streaming:
            is_answer = self.is_json and not reader.is_broken and not is_pinged
            return None if is_answer else UNEXPECTED
        if self.phase is WHOLE and not reader.is_finished:
            return CUT
        if reader.is_broken and not reader.has_content:
            return UNEXPECTED
        return None

    def _find_refusal(self) -> Failure | None:
        """Return the failure that a status of an error is; None if it is for the client."""
        text = b"".join(self.raw)
        if self.status in (400, 422):
            remedy = self.dialect.remedy(self.exchange.call, text)
            is_allowed = self.upstream.retry_without_thinking and not self.exchange.is_repaired
            if remedy is Remedy.USAGE or (remedy is Remedy.THINKING and is_allowed):
                self.remedy = remedy
                return Failure("refused", remedy.value, "400")
        case = self.dialect.refusal_case(self.status, text)
        return self._unless_passed(Failure("refused", f"answered {self.status}", case))

    def _unless_passed(self, failure: Failure) -> Failure | None:
        """Return the failure, or None if no upstream would answer better and the client can still get its status."""
        verdict = self.upstream.verdict(failure.case)
        if not verdict.passes or verdict.try_next or self.exchange.phase is PINGED:
            return failure
        self.failure = failure
        return None

    def _find_unmetered(self) -> Failure | None:
        """Return the failure of an answer that was worked on, and that cannot be read for its form."""
        content_type = first_values(self.headers).get(b"content-type", b"").lower()
        is_answer = self.is_streaming or b"json" in content_type
        if not (200 <= self.status < 300 and is_answer and b"".join(self.raw).strip()) or self.reader.error_type:
            return None
        if self.encoding:
            self.reader.is_unread = True
            encoding = printable(self.encoding.decode("latin-1"), 40)
            sentence = f"sent an answer that is compressed ({encoding}), though asked for identity"
        else:
            sentence = f"answered {self.status}, where 200 is the only status of an answer"
        return Failure("upstream_error", sentence, UNMETERED)

    # What is known of the answer

    @property
    def is_json(self) -> bool:
        """Whether what is held back begins as every JSON answer does, and no page does."""
        return b"".join(self.raw).lstrip().startswith(b"{")

    @property
    def error_status(self) -> int:
        """The status that the answer's error stands for."""
        return status_of_error(self.reader.error_type) or 500

    @property
    def client_status(self) -> int:
        """The status for the client: the upstream's, unless an error came as 200."""
        reader = self.reader
        if reader.error_type and self.status == 200 and not self.is_streaming and not reader.has_failed:
            return self.error_status
        return self.status

    @property
    def is_from_api(self) -> bool:
        """Whether what is held back is all that the API had to say (a stream's error needs no end), and no HTML."""
        is_whole = self.phase is WHOLE
        if self.is_streaming and self.status == 200:
            return is_whole or bool(self.reader.error_type)
        return is_whole and not self.reader.is_broken and self.is_json

    @property
    def is_refusal(self) -> bool:
        """Whether the upstream refused, or sent no JSON: not billed."""
        reader = self.reader
        if self.failure and self.failure.case == UNMETERED:
            return False
        if self.status not in (0, 200):
            return True
        if reader.error_type:
            return not (reader.seen_input or reader.has_content)
        text = b"" if self.is_streaming else b"".join(self.raw).lstrip()  # a space keeps a connection alive
        return bool(text) and not text.startswith(b"{")

    @property
    def was_billed(self) -> bool:
        """Whether the upstream has said what it will charge for, or has begun to deliver it."""
        reader = self.reader
        if self.failure and self.failure.case == UNMETERED:
            return reader.charged
        if self.status != 200 or not reader.charged:
            return False
        if reader.seen_input and reader.did_work:
            return True
        return self.is_json and not self.is_streaming and not reader.error_type

    def retry_after_s(self) -> float | None:
        """Return when a refusal says to come again."""
        return read_retry_after(self.headers, self.ticket.call.config.clock.wall()) if self.status >= 400 else None

    def usage(self) -> Usage:
        """Return what to book."""
        return self.reader.spend(reached_upstream=self.sent_at is not None and not self.is_refusal)

    # How it ends

    def _end_answer(self, data: bytes) -> None:
        """Hand on the upstream's last bytes, and say how the answer ended. A cut stream must look cut."""
        reader = self.reader
        is_whole = not self.is_streaming or self.status != 200 or reader.is_finished or bool(reader.error_type)
        name = "upstream_error" if reader.error_type else "completed"
        if self.status >= 400:
            name = "refused"
        elif not is_whole:
            name = "upstream_cut"
        self.exchange.complete(Outcome(name, self.status), data, is_whole)

    def check(self, now: float) -> None:
        """Look at what the upstream must do in time."""
        if not self.is_running:
            return
        silence = now - self.heard_at
        if self.phase is OPEN:
            if silence > self.upstream.timeouts.idle:
                self.line.abort()
                self.lost(IDLE_TIMEOUT)
        elif silence > self.first_byte_s or now > self.exchange.deadline:
            self.line.abort()
            self.lost(FIRST_BYTE_TIMEOUT)
        elif now > self.error_until:
            self._decide()

    def drop(self) -> None:
        """End what the upstream has not ended."""
        if self.phase >= WHOLE:
            return
        if self.phase >= ASKED:
            self.line.abort()
        self._move(LOST)

    def end(self) -> None:
        """Drop the connection and the exchange: in a circle they would wait for the garbage collector."""
        self.drop()
        self.exchange = cast("Exchange", None)


# --- 21. Relay: a call through its attempts, pings, drains ------------------------
# Offers: Exchange, Relay

# How an admitted call ends
#
#   what happens                         by              outcome                              the client gets
#   the last byte of an answer           complete        completed, refused, upstream_error   that byte
#   a stream without its terminal        complete        upstream_cut, timeout                a cut connection
#     event, or lost after its content
#   no attempt is left; an API's error   hand_on         refused, upstream_error              that error ¹
#   no attempt is left; no such error    Relay._answer   the last failure's, or unavailable   an error of ours ¹
#   its body is unreadable, or its key   Relay.run       refused                              an error of ours ¹
#     was revoked
#   the client leaves                    _leave          client_gone                          nothing
#   it had left when an attempt failed   end_if_left     client_gone                          nothing
#   the gateway stops                    Relay.close     gateway_stopped                      503 ²
#   a bug                                crash           internal_error                       500 ¹ ²
#
# ¹ An event, where pings have gone out. ² A cut connection, where an answer has begun.
#
# An answer that a client left while it was read on ends as client_gone, or as completed where the client had the
# terminal event (`finish`). All of them are booked once: by `complete` before the client has the last byte, else by
# `Gateway._carry`. The entry has the spend of the last attempt; others that were billed in vain have their own lines.


class Exchange(msgspec.Struct, eq=False):
    """One call on its way, from its admission to its end: its attempts on one side, the client's sink on the other."""

    call: Call
    sink: Sink | None  # None from LEFT on
    owner: Relay  # whose connections it uses, and who books it
    clock: Callable[[], float]
    pace: Pace
    done: asyncio.Future[Outcome]
    deadline: float  # of the first content; from LEFT on, of the rest
    last_write_at: float
    phase: ExchangePhase = QUIET
    is_booked: bool = False
    is_written: bool = False  # its entry was handed to the ledger
    attempt: Attempt | None = None  # the present one, or the last
    attempts: list[AttemptEntry] = []
    tries: int = 0  # attempts that count towards `routing.max_attempts`: not those that had a remedy
    tried: frozenset[Place] = frozenset()  # where, since the last pause
    exhausted: frozenset[Place] = frozenset()  # where the same would be said again
    best: Attempt | None = None  # of those that failed: its answer is the client's if no other is better
    discarded: tuple[tuple[Attempt, str], ...] = ()  # failed, and how; and billed all the same
    is_repaired: bool = False  # its request goes without thinking blocks
    without_usage: frozenset[str] = frozenset()  # the upstreams that refused our question for the stream's usage
    status: int = 0  # that the client was sent
    bytes_down: int = 0
    paused_at: float | None = None  # since when the client does not read

    @classmethod
    def of(cls, call: Call, sink: Sink, relay: Relay) -> Exchange:
        """Return the exchange of a call that has not been admitted yet."""
        done = asyncio.get_running_loop().create_future()
        deadline = call.started + call.config.routing.deadline
        return cls(call, sink, relay, relay.clock.monotonic, relay.pace, done, deadline, call.started)

    def __repr__(self) -> str:
        return f"Exchange({self.call.id!r})"  # its call's headers have a key in them

    def _move(self, phase: ExchangePhase) -> None:
        if phase not in EXCHANGE_MOVES[self.phase]:
            raise IllegalMove(f"an exchange that is {self.phase.name} cannot become {phase.name}")
        self.phase = phase

    def close_attempt(self, outcome: str) -> None:
        """Write down how the present attempt went, once."""
        attempt = self.attempt
        if attempt is None or attempt.entry.outcome:
            return
        attempt.entry.outcome = outcome
        attempt.entry.ms = round((self.clock() - attempt.began) * 1e3, 1)

    # What the attempt says

    def open(self, attempt: Attempt) -> None:
        """Begin the client's answer: the gate is open."""
        if attempt.phase is WHOLE or attempt.line.is_sent:  # else the body is still being sent
            self.call.drop_request()
        self.status = attempt.client_status
        if self.sink:
            if self.phase is QUIET:
                self.sink.head(self.status, attempt.headers, attempt.is_streaming)
            self._move(ANSWERING)
        if attempt.failure is None:  # else they may say when to come again
            self.owner.upstreams.record_answer(attempt.ticket)
            attempt.headers = []

    def relay(self, data: bytes, now: float) -> None:
        """Write bytes to the client."""
        self.last_write_at = now
        self.bytes_down += len(data)
        if self.sink:  # without data: the head must leave all the same
            self.sink.write(data, False)

    def complete(self, outcome: Outcome, data: bytes, whole: bool) -> None:
        """Write the answer's last bytes; cut the client off where it is not whole, so that it looks cut.

        First the ledger, then the client: who has seen the end finds it booked.
        """
        self.bytes_down += len(data)
        outcome = self.finish(outcome)
        self.owner.book(self, outcome, functools.partial(self._end_answer, data, whole))

    def _end_answer(self, data: bytes, whole: bool) -> None:
        if self.sink:
            self.sink.write(data, whole)
            if not whole:
                self.sink.cut()

    def crash(self, error: Exception) -> None:
        """End the call for a bug of ours."""
        if self.done.done():
            return
        self.done.set_exception(error)
        if self.attempt:
            self.attempt.drop()
            if not self.attempt.done.done():
                self.attempt.done.set_result(None)

    # What the client says

    def client_slow(self) -> None:
        """Read no more from the upstream: the client does not read."""
        if self.attempt and self.attempt.is_running and self.paused_at is None:
            self.paused_at = self.clock()
            self.attempt.line.pause()

    def client_ready(self) -> None:
        """Read on: the client does."""
        if self.paused_at is None:
            return
        self.paused_at = None
        if self.attempt:
            self.attempt.heard_at = self.clock()
            if self.attempt.is_running:
                self.attempt.line.resume()

    def client_gone(self) -> None:
        """End the upstream's work at once, or read the rest of the answer for the ledger."""
        if self.sink is None:
            return
        self.sink.exchange = None
        self.sink = None
        if self.done.done():
            return
        attempt = self.attempt
        has_all = False
        if attempt and attempt.is_streaming and self.phase is ANSWERING and self.paused_at is None:
            has_all = attempt.reader.is_finished
        self.client_ready()
        self._move(SERVED if has_all else LEFT)
        wants_rest = attempt and attempt.is_running and (has_all or self._hears_out(attempt))
        if attempt and wants_rest and self.owner.begin_drain(self):
            rest_s = self.pace.drain_s
            if not has_all:
                rest_s = max(rest_s, attempt.upstream.timeouts.idle)
            self.deadline = self.clock() + rest_s
        else:
            self._leave()

    def _leave(self) -> None:
        """End a call whose client is gone. Where a limit holds, an end not heard counts as what was reserved."""
        attempt = self.attempt
        if attempt and attempt.is_running and self.call.key.spends and self._hears_out(attempt):
            attempt.reader.is_unread |= not attempt.reader.is_finished
        self.end(Outcome("client_gone", self.status))

    def _hears_out(self, attempt: Attempt) -> bool:
        """Return whether the ledger wants the rest: `auto` does where a limit would be evaded by leaving early."""
        how = attempt.upstream.on_disconnect
        if how == "auto":
            return self.call.key.spends and attempt.reader.charged
        return how == "drain"

    # What the clock says

    def give_time(self, seconds: float) -> None:
        """Put off what an upstream or a client must do in time: nothing could be heard while the loop stood still."""
        self.deadline += seconds
        if self.attempt:
            self.attempt.heard_at += seconds
            self.attempt.error_until += seconds
        if self.paused_at is not None:
            self.paused_at += seconds

    def check(self, now: float) -> None:
        """Look at the deadlines; ping into a silence."""
        if self.done.done():
            return
        attempt = self.attempt
        if self.sink is None:
            if attempt is None or now > self.deadline:
                self._leave()
        elif self.paused_at is not None:
            if attempt and now - self.paused_at > attempt.upstream.timeouts.idle:
                sink = self.sink
                self.client_gone()
                sink.cut()
        else:
            if attempt:
                attempt.check(now)
            if now - self.last_write_at >= self.pace.ping_s and not self.done.done():
                self.ping(now)

    def ping(self, now: float) -> None:
        """Say something to the client of a stream, where its format allows that just now."""
        attempt = self.attempt
        if self.sink is None:
            return
        if self.phase is ANSWERING:
            if attempt and attempt.reader.between_events:
                self.last_write_at = now
                self.sink.write(PINGS[self.call.route.api], False)
        elif self.call.stream:
            # A comment commits to nothing but the status: any answer can still begin with its first event.
            self.last_write_at = now
            if self.phase is QUIET:
                self._move(PINGED)
                self.status = 200
                self.sink.head(200, [*EVENT_HEADERS, (b"request-id", self.call.id.encode())], True)
            self.sink.write(b": ping\n\n", False)

    # How it ends

    def end(self, outcome: Outcome) -> None:
        """Stop here: drop the upstream's connection, cut the client off."""
        if self.done.done():
            return
        if self.attempt:
            self.attempt.drop()
        if self.sink and self.status:
            self.sink.cut()
        self.finish(outcome)

    def finish(self, outcome: Outcome) -> Outcome:
        """Resolve `done`, and wake what waits for the attempt. Return the outcome for the client that it has."""
        if self.phase is LEFT:
            outcome = Outcome("client_gone", outcome.status)
        elif self.phase is SERVED:  # it has missed nothing
            has_failed = self.attempt is not None and self.attempt.reader.error_type
            outcome = Outcome("upstream_error" if has_failed else "completed", outcome.status)
        self._move(ENDED)
        self.paused_at = None
        self.close_attempt(outcome.name)
        self.done.set_result(outcome)
        if self.attempt and not self.attempt.done.done():
            self.attempt.done.set_result(None)
        return outcome

    def end_if_left(self) -> bool:
        """End the call of a client that left, after an attempt failed; return whether the call is over."""
        if self.phase is LEFT:
            self.finish(Outcome("client_gone", self.status))
        return self.done.done()

    def hand_on(self, attempt: Attempt) -> Outcome:
        """Give the client the answer of an attempt that failed: the upstream's own words are worth more than ours."""
        self.attempt = attempt
        data = b"".join(attempt.held)
        if self.phase is QUIET:
            self.status = attempt.client_status
            if self.sink:
                self.sink.head(self.status, attempt.headers, attempt.is_streaming)
        elif not attempt.is_streaming:
            data = error_event(data, self.call.route.api)
        self.complete(Outcome("refused" if attempt.status >= 400 else "upstream_error", self.status), data, True)
        return self.done.result()

    def refuse(self, error: GatewayError) -> None:
        """Tell the client, as an event where it has got pings; where an answer has begun, cut it off."""
        if self.sink is None:
            return
        api = self.call.route.api
        if self.status == 0:
            self.sink.refuse(error, api, self.call.id)
        elif self.phase is PINGED:
            self.sink.write(error_event(error_body(error, api, self.call.id), api), True)
        else:
            self.sink.cut()


class Relay:
    """Carries calls to upstreams. Owns the connections and the running exchanges; both survive reloads."""

    def __init__(self, clock: Clock, pace: Pace) -> None:
        self.clock = clock
        self.pace = pace
        self.upstreams = Upstreams(clock, pace)
        self.on_failure: Callable[[Call, Choice, AttemptFailed], None] = lambda call, choice, error: None
        # Books a call, and has its answer end behind that.
        self.book: Callable[[Exchange, Outcome, Callable[[], None]], None] = lambda exchange, outcome, end: end()
        # Holds what a failed attempt has cost; may another one follow?
        self.hold_cost: Callable[[Exchange, Attempt], bool] = lambda exchange, attempt: True
        self.pools = Pools(clock, pace)
        self.running: set[Exchange] = set()
        self.drains: list[Exchange] = []  # that are read on for the ledger, the oldest first

    def keep_only(self, upstreams: Sequence[UpstreamConfig]) -> None:
        """Drop what no upstream of a new snapshot uses."""
        self.upstreams.keep_only(upstreams)
        self.pools.keep_only(upstreams)

    def ready_line(self, upstream: UpstreamConfig) -> Line | None:
        """Return a connection to an upstream that is ready, if there is one."""
        if upstream.format == "demo":
            return DemoLine(self.pace.demo_s)
        return self.pools.of(upstream).take_idle()

    async def line(self, upstream: UpstreamConfig) -> Line:
        """Return a connection to an upstream. Raises AttemptFailed."""
        return self.ready_line(upstream) or await self.pools.of(upstream).connect(upstream.timeouts.connect)

    async def run(self, exchange: Exchange) -> Outcome:
        """Carry one call to its end. Never raises what upstreams did: the outcome says it."""
        self.running.add(exchange)
        try:
            return await self._answer(exchange)
        except GatewayError as error:  # a body that a rename or a repair cannot read, a key that was revoked
            return Outcome("refused", error=error)
        except asyncio.CancelledError:
            if not exchange.done.done():
                raise
            return exchange.done.result()  # it had ended, and still waited for a connection
        finally:
            self.running.discard(exchange)
            if exchange in self.drains:
                self.drains.remove(exchange)
            if exchange.attempt:
                exchange.attempt.end()

    async def _answer(self, exchange: Exchange) -> Outcome:
        """Ask one upstream after the other until one answers or none is left. Return how the call ended."""
        call = exchange.call
        routing = call.config.routing
        upstreams = self.upstreams
        failed: AttemptFailed | None = None
        rounds = 0
        while exchange.tries < routing.max_attempts and self.clock.monotonic() < exchange.deadline:
            # Where? The best that is ready, else whichever is ready first. When all were tried: again, after a moment.
            not_before = 0.0
            if exchange.tried and upstreams.ready_in(call, exchange.tried) > 0:
                exchange.tried = exchange.exhausted
                not_before = self.clock.monotonic() + upstreams.backoff_s(rounds)
                rounds += 1
            ticket = None if not_before else upstreams.take(call, exchange.tried)
            if ticket is None:
                until = min(self.clock.monotonic() + routing.wait, exchange.deadline)
                ticket = await upstreams.wait(call, exchange.tried, not_before, until, exchange.done)
            if ticket is None:
                break
            with ticket:
                if exchange.done.done():  # the client left, or the gateway stops
                    break
                try:
                    outcome = await self.send(exchange, ticket)
                except AttemptFailed as error:
                    failed = error
                else:
                    self._record_end(exchange, ticket, outcome.name)
                    return outcome
                may_try_next = self._record_failure(exchange, ticket, failed)
            if exchange.end_if_left() or not may_try_next:
                break
        if exchange.done.done():
            return exchange.done.result()
        if exchange.best:
            return exchange.hand_on(exchange.best)
        name = failed.failure.outcome if failed else "unavailable"
        return Outcome(name, error=self._final_error(exchange, failed))

    async def send(self, exchange: Exchange, ticket: Ticket) -> Outcome:
        """Make one attempt and wait for its end; once more on a new connection where a kept-alive one had died unseen.

        Unseen means: within a second of sending. What dies later has had the request (one upstream behind a proxy
        dropped it after 12 s, and was paid twice); that is a failure like any other. Raises AttemptFailed.
        """
        call, choice = exchange.call, ticket.choice
        upstream, pool = choice.upstream, self.pools.of(choice.upstream)
        for fresh in (False, True):
            dialect = self._dialect(exchange, upstream)
            body = dialect.request(call, ticket.model)
            head = request_head(call, call.route.path, upstream, choice.api_key, pool.target, sum(map(len, body)))
            attempt = exchange.attempt = Attempt.of(exchange, ticket, dialect)
            exchange.attempts.append(attempt.entry)
            exchange.tries += 1
            attempt.first_byte_s = self._first_byte_s(exchange, ticket)
            line = (None if fresh else self.ready_line(upstream)) or await pool.connect(upstream.timeouts.connect)
            if exchange.done.done():  # the client left meanwhile
                line.abort()
                break
            attempt.begin(line, head, body)
            # The call drops its body when the gate opens; this frame stays for as long as the stream runs.
            # 200 streams with bodies of 1 MB held 268 MB for it.
            del head, body
            try:
                await attempt.done
                break
            except AttemptFailed as failed:
                is_cut_unseen = line.used_before and not line.heard and failed.failure is CUT
                age = self.clock.monotonic() - (attempt.sent_at or 0.0)
                if fresh or not is_cut_unseen or age > self.pace.resend_s:
                    raise
            pool.forget_idle()  # they are as dead
            exchange.close_attempt(STALE_CONNECTION)
            exchange.tries -= 1
            if exchange.end_if_left():
                break
        return exchange.done.result()

    def _dialect(self, exchange: Exchange, upstream: UpstreamConfig) -> Dialect:
        """Return how the call's route is spoken with an upstream: with a question for usage, where none is asked."""
        call = exchange.call
        dialect = DIALECTS[upstream.format, call.route.kind]
        if call.includes_usage or dialect.with_usage is None or not upstream.include_usage:
            return dialect
        refused_until = self.pools.of(upstream).without_usage.get(call.model, -math.inf)
        if upstream.name in exchange.without_usage or self.clock.monotonic() < refused_until:
            return dialect
        return dialect.with_usage

    def _first_byte_s(self, exchange: Exchange, ticket: Ticket) -> float:
        """Return how long an upstream may be silent: less where another one is ready."""
        call = exchange.call
        routing = call.config.routing
        limit = float(ticket.choice.upstream.timeouts.first_byte)
        if limit <= routing.patience or not call.stream or len(call.servings) < 2:
            return limit
        own = {choice.place for choice in self.upstreams.choices(ticket.choice.upstream, call.route.kind)}
        is_last = exchange.tries >= routing.max_attempts  # this attempt is counted already
        has_other = not is_last and self.upstreams.is_anybody_ready(call, exchange.tried | own)
        return routing.patience if has_other else limit

    def _record_end(self, exchange: Exchange, ticket: Ticket, outcome: str) -> None:
        """Record for the upstream how an answer ended that the client got."""
        attempt = exchange.attempt
        assert attempt is not None
        case = ""
        if outcome == "completed":
            pass
        elif attempt.failure and outcome in ("refused", "upstream_error"):  # it was passed on at once
            case = attempt.failure.case
        elif outcome == "upstream_error":  # an error event behind the first content
            case = str(attempt.error_status)
        elif outcome in ("upstream_cut", "timeout"):
            case = "mid_stream"
        if case:
            self.upstreams.record_failure(ticket, case, attempt.retry_after_s())
        is_good = not case or attempt.upstream.verdict(case).blame == "none"
        if is_good and outcome not in ("client_gone", "gateway_stopped"):
            self.upstreams.record_success(ticket)
        if exchange.without_usage and outcome == "completed" and attempt.upstream.name in exchange.without_usage:
            self._remember_usage(attempt.upstream, exchange.call.model)

    def _remember_usage(self, upstream: UpstreamConfig, model: str) -> None:
        """Ask an upstream no more for usage for a while: it refused the question, and answered without it."""
        refused = self.pools.of(upstream).without_usage
        if len(refused) >= 1024:  # the names are the clients'
            refused.clear()
        again_s = self.pace.without_usage_s
        refused[model] = self.clock.monotonic() + again_s
        log.warning(
            "upstream %s rejects stream_options.include_usage: chat streams of that model are booked by estimate. "
            "It is asked again in %.0f s; `include_usage: false` ends that",
            upstream.name,
            again_s,
        )

    def _record_failure(self, exchange: Exchange, ticket: Ticket, error: AttemptFailed) -> bool:
        """Record how an attempt failed; return whether another one may do better. Raises BadRequest."""
        call = exchange.call
        choice = ticket.choice
        failure = error.failure
        attempt = exchange.attempt
        assert attempt is not None
        exchange.close_attempt(failure.case)
        attempt.end()
        self.on_failure(call, choice, error)
        if attempt.remedy:
            self.upstreams.record_answer(ticket)
            exchange.tries -= 1  # else the last one's complaint would be lost, and its cure known
            if attempt.remedy is Remedy.THINKING:
                exchange.is_repaired = True
                call.body = without_thinking(call.body)
            else:
                exchange.without_usage |= {choice.upstream.name}
            return True
        verdict = choice.upstream.verdict(failure.case)
        self.upstreams.record_failure(ticket, failure.case, error.retry_after_s)
        is_affordable = True
        if attempt.was_billed:
            exchange.discarded += ((attempt, failure.case),)
            is_affordable = self.hold_cost(exchange, attempt)
        if verdict.passes and attempt.is_from_api:
            exchange.best = attempt
        keys = [choice] if verdict.blame == "key" else self.upstreams.choices(choice.upstream, call.route.kind)
        places = {key.place for key in keys}
        exchange.tried |= places
        is_final = verdict.blame == "none" and failure is not OWN_TROUBLE
        if is_final or failure.case in REFUSED_KEY:
            exchange.exhausted |= places
        return verdict.try_next and is_affordable

    def _final_error(self, exchange: Exchange, failed: AttemptFailed | None) -> GatewayError:
        """Return the gateway's own error when no upstream error can be passed on."""
        call = exchange.call
        last = exchange.attempts[-1].upstream if exchange.attempts else ""
        ready_in = self.upstreams.ready_in(call, frozenset())
        wait_s = max(1, math.ceil(ready_in)) if 0 < ready_in < math.inf else None
        refused = self.upstreams.refused_key(call)
        if failed:
            log.warning("%s: no answer, attempts %d: upstream %s %s", call.id, exchange.tries, last, failed)
        if failed and failed.failure.case in REFUSED_KEY:  # though it may not be sure yet
            refused = last, failed.failure.case
        if refused:
            name, case = refused
            contact = call.config.contact
            return UpstreamRefusesUs(f"The upstream {name} refuses this gateway's own API key ({case}).{contact}")
        if failed is None:
            names = ", ".join(dict.fromkeys(serving.upstream.name for serving in call.servings))
            message = f"No upstream is ready for {call.model} ({names}): they failed, or are full."
            return Overloaded(message, retry_after_s=wait_s or 5)
        if failed.failure is OWN_TROUBLE:
            message = f"The gateway has no descriptors, ports or memory left to ask an upstream.{call.config.contact}"
            return Unavailable(message, retry_after_s=5)
        kind = UpstreamTimeout if failed.failure.outcome == "timeout" else UpstreamFailed
        count = f" (the last of {exchange.tries} attempts)" if exchange.tries > 1 else ""
        return kind(f"The upstream {last} {failed.failure.sentence}{count}.", retry_after_s=wait_s)

    def begin_drain(self, exchange: Exchange) -> bool:
        """Take a place for an answer that is read on for the ledger; return False if there is none for its key.

        A key may have no more places than are still free (see `BodyMemory`).
        """
        name = exchange.call.key.name
        own = sum(drain.call.key.name == name for drain in self.drains)
        if own >= self.pace.drain_calls - len(self.drains):
            return False
        self.drains.append(exchange)
        if own < self.pace.free_drains:  # a client that asks again does not wait for what it left
            exchange.call.reservation.return_slots()
        return True

    def check(self, stood_s: float = 0.0) -> None:
        """Look at every running call's deadlines; a bug in one ends that call.

        The time `stood_s` for which the loop stood still counts for none.
        """
        now = self.clock.monotonic()
        for exchange in tuple(self.running):
            try:
                if stood_s:
                    exchange.give_time(stood_s)
                exchange.check(now)
            except Exception as error:
                exchange.crash(error)

    def close(self) -> None:
        """Cut what still runs and close every connection."""
        self.upstreams.close()
        for exchange in tuple(self.running):
            error = None if exchange.status else Unavailable("The gateway is stopping.", retry_after_s=5)
            exchange.end(Outcome("gateway_stopped", exchange.status, error))
        self.keep_only(())


# === Floor D. House: one running gateway ============================================

# --- 22. Events: what happened, announced once ------------------------------------
# Offers: AttemptDiscarded, AttemptFailure, CallEnded, CallRefused, ChangeMade, ConfigLoaded, ConfigRefused,
#   ConnectionRefused, EventLog, Events, Guard, LedgerChanged, RefusalLog, RequestRefused, UpstreamRecovered,
#   UpstreamTripped

# Whoever does something says so once, and does not know who wants to hear it: it emits an event. Whoever wants to hear
# it is a listener: a function of the event, registered for the event's type (`Events.listen`). The metrics and the log
# are listeners; an alert, a hook or a live page is one more. The road and the books know no events: they have a
# callback for what the house announces.
#
# `Events.emit` calls the listeners at once, one after the other, on the event loop. A call's answer waits for them: a
# listener adds up a few numbers, or puts what it needs into a bounded queue of its own, and never waits. A bug in one
# is counted and logged, and the listeners after it are called all the same.
#
# An event carries the objects that it is about, not copies of their fields, and no listener changes them.
#
# Example: a call's first attempt failed, as those of two calls before, and its second one was answered.
#
#     AttemptFailure(call, choice, error)  the log: "req_…: upstream a answered 529"
#     UpstreamTripped(choice, cooldown)    the log: "upstream a is left alone for 10.0 s: 529, 3 in a row"
#     CallEnded(call, entry, attempts)     the metrics add up; the log: "req_…: alice (…4f2a) /v1/messages …: 200 …"


class Event(msgspec.Struct, frozen=True, gc=False):
    """Something that happened."""


class CallEnded(Event, frozen=True, gc=False):
    """An admitted call has ended, and the ledger has its entry. `Limits.standings` of its key is up to date."""

    call: Call
    entry: Entry
    attempts: list[AttemptEntry]  # the entry's


class AttemptFailure(Event, frozen=True, gc=False):
    """An attempt failed before its first content: the client has seen nothing of it."""

    call: Call
    choice: Choice
    error: AttemptFailed


class AttemptDiscarded(Event, frozen=True, gc=False):
    """An attempt was billed and its answer thrown away, for another attempt of its call was made."""

    call: Call
    entry: Discarded


class CallRefused(Event, frozen=True, gc=False):
    """A call was refused after its body had been read, and no upstream was asked."""

    call: Call
    error: GatewayError


class RequestRefused(Event, frozen=True, gc=False):
    """A request was refused while it was read. `key` is the name of a good key that it has shown, else ""."""

    id: str
    address: str
    key: str
    error: GatewayError


class ConnectionRefused(Event, frozen=True, gc=False):
    """A connection was closed for want of room; the reason is `address` (it has too many without a good key),
    `oldest` or `key` (to make room: it had no good key, or its key had most), or `full` (all are being answered).
    """

    reason: str


class UpstreamTripped(Event, frozen=True, gc=False):
    """An upstream, or one of its API keys, has a cooldown."""

    choice: Choice
    cooldown: Cooldown


class UpstreamRecovered(Event, frozen=True, gc=False):
    """An upstream answers again after a cooldown."""

    choice: Choice


class LedgerChanged(Event, frozen=True, gc=False):
    """The disk refuses the ledger's entries from now on, or takes them again: then `failure` is empty."""

    failure: str


class ConfigLoaded(Event, frozen=True, gc=False):
    """A new snapshot has taken the place of the one before."""

    before: Config
    config: Config


class ConfigRefused(Event, frozen=True, gc=False):
    """config.yaml has a mistake that it did not have before: the last good snapshot stays."""

    error: ConfigError


class ChangeMade(Event, frozen=True, gc=False):
    """Somebody has changed keys, limits or upstreams: who, and what, such as "key add bob"."""

    who: str
    what: str


E = TypeVar("E", bound=Event)


class Guard:
    """Runs steps of which one may have a bug: it is counted, its traceback is logged, and the other steps go on.

    What runs four times a second would fail as often: of one step the log has a traceback once a minute.
    """

    PERIOD_S = 60.0

    def __init__(self, clock: Clock) -> None:
        self._now = clock.monotonic
        self._silent_until: dict[str, float] = {}  # by step
        # By step, since the start; where calls are is in /metrics from the start, with 0.
        self.failures = Counter({"Gateway.handle": 0, "Relay.run": 0})

    def run(self, step: Callable[..., object], *values: object) -> bool:
        """Call a step; False if it raised."""
        try:
            step(*values)
        except Exception:  # the edge for all that no call waits for
            self.record(step.__qualname__)
            return False
        return True

    def record(self, step: str) -> None:
        """Count and log the exception that is being handled."""
        self.failures[step] += 1
        if self._now() >= self._silent_until.get(step, 0.0):
            self._silent_until[step] = self._now() + self.PERIOD_S
            log.exception("a bug in %s, seen %d times", step, self.failures[step])


class Events:
    """Brings events to those that listen."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._listeners: dict[type[Event], list[Callable[[Any], None]]] = {}

    def listen(self, kind: type[E], listener: Callable[[E], None]) -> None:
        """Have `listener` called with each event of a type, after those that are registered already."""
        self._listeners.setdefault(kind, []).append(listener)

    def emit(self, event: Event) -> None:
        """Call the listeners of an event. Never raises."""
        for listener in self._listeners.get(type(event), ()):
            try:
                listener(event)
            except Exception:  # a listener's bug is no bug of what it listens to
                self._guard.record(listener.__qualname__)


def log_refused(event: CallRefused) -> None:
    """Write one line for the call."""
    call, error = event.call, event.error
    text = "%s: %s %s %s refused: %d %s"
    log.info(text, call.id, call.key, call.route.path, call.model, error.status, error.message)


def log_failure(event: AttemptFailure) -> None:
    """Write why an attempt failed; as an error where it is paid for and cannot be read."""
    call, choice, error = event.call, event.choice, event.error
    log.info("%s: upstream %s %s", call.id, choice, error)
    if error.failure.case == UNMETERED:
        log.error("%s: upstream %s %s: it is booked by estimate, and not asked again", call.id, choice, error)


def log_cooldown(event: UpstreamTripped) -> None:
    """Write for how long an upstream is not asked, for whose calls, and why."""
    choice, cooldown = event.choice, event.cooldown
    seconds = cooldown.until_time - cooldown.since
    whose = ""
    if cooldown.whom.user:
        whose = f"the calls of {cooldown.whom.user} only, for "
    elif cooldown.whom.model:
        whose = f"{printable(cooldown.whom.model)} only, for "
    others = ""
    others_s = cooldown.others_door.wait_s(cooldown.health.clock.monotonic())
    if others_s < seconds - 1:
        others = f"; users who have not met it wait for {others_s:.1f} s"
    if cooldown.why in REFUSED_KEY:
        why = f"{cooldown.why}, {VERDICTS[cooldown.why].meaning.partition(':')[0]}{others}"
        remedy = f"Once the config has a good one: {PROGRAM} upstream reset {choice.upstream.name}"
        log.error(
            "upstream %s: its API key is left alone for %s%.0f m: %s. %s", choice, whose, seconds / 60, why, remedy
        )
    else:
        text = "upstream %s is left alone for %s%.1f s: %s, %d in a row%s"
        log.warning(text, choice, whose, seconds, cooldown.why, cooldown.health.failures, others)


def log_config(event: ConfigLoaded) -> None:
    """Write which keys are others, the warnings that are new, and what takes a restart."""
    before, config = event.before, event.config
    for warning in config.warnings:
        if warning not in before.warnings:
            log.warning("config: %s", warning)
    for name, was, is_now in (
        ("server.host", before.server.host, config.server.host),
        ("server.port", before.server.port, config.server.port),
        ("usage.directory", before.usage_directory, config.usage_directory),
        ("server.timezone, in which limits and reports turn over,", before.server.timezone, config.server.timezone),
    ):
        if was != is_now:
            log.warning("config: %s changed; that takes a restart", name)
    old = {key.name: key for key in before.file.keys}
    new = {key.name: key for key in config.file.keys}
    changed = sorted(name for name in old | new if old.get(name) != new.get(name))
    keys = ""
    if changed:
        keys = f"; keys added, changed or removed: {printable(', '.join(changed), 200)}"
    log.info("config %s loaded%s", config.digest, keys)


def log_mistake(event: ConfigRefused) -> None:
    """Write what is wrong with the config, and what of it counts all the same."""
    log.error("config not reloaded, the last good one stays: %s", event.error)
    if event.error.without_revoked:
        log.warning("config: the keys that it disables are refused all the same")


def log_change(event: ChangeMade) -> None:
    """Write the audit line."""
    log.info("audit: %s, by %s", printable(event.what, 200), event.who)


class EventLog:
    """Writes the log's lines of events."""

    def __init__(self, events: Events) -> None:
        self.write: Callable[[str], None] = functools.partial(log.info, "%s")  # the line of a call
        events.listen(CallEnded, self.call_ended)
        events.listen(CallRefused, log_refused)
        events.listen(AttemptFailure, log_failure)
        events.listen(UpstreamTripped, log_cooldown)
        events.listen(UpstreamRecovered, lambda event: log.info("upstream %s answers again", event.choice))
        events.listen(ConfigLoaded, log_config)
        events.listen(ConfigRefused, log_mistake)
        events.listen(ChangeMade, log_change)

    def call_ended(self, event: CallEnded) -> None:
        """Write one line for the call."""
        call, entry = event.call, event.entry
        more = ""
        if len(event.attempts) > 1:
            more = f", {len(event.attempts)} attempts"
        self.write(
            f"{entry.request_id}: {call.key} {entry.path} {entry.model} by {entry.upstream or 'nobody'}: "
            f"{entry.status} {entry.outcome} in {entry.total_input_tokens} out {entry.output_tokens} "
            f"${entry.cost_usd:.6f} {entry.duration_ms:.0f} ms{more}"
        )


class RefusalLog:
    """Logs requests that are refused while they are read: the first of each address, key and status in a minute.

    Anybody can be refused as often as they like, without a key. A line for each would fill the disk and push the lines
    of calls out of the log: the others are counted, here in one line a minute, and all of them in /metrics.
    """

    PERIOD_S = 60.0
    LINES = 5  # of one address, key and status in a period …
    ALL_LINES = 100  # … and of all: so many addresses are remembered at most

    def __init__(self, clock: Clock, events: Events) -> None:
        events.listen(RequestRefused, self.request_refused)
        events.listen(ConnectionRefused, self.connection_refused)
        self._now = clock.monotonic
        self._logged: Counter[tuple[str, str, int]] = Counter()  # lines of this period by address, key and status
        self._left_out: Counter[int] = Counter()  # refusals of this period without a line, by status
        self._closed: Counter[str] = Counter()  # connections of this period, by reason
        self._ends_at = self._now() + self.PERIOD_S

    def request_refused(self, event: RequestRefused) -> None:
        """Log one refusal, or count it."""
        place = (event.address, event.key, event.error.status)
        if self._logged[place] < self.LINES and self._logged.total() < self.ALL_LINES:
            self._logged[place] += 1
            client = event.address
            if event.key:
                client = f"{event.key} at {event.address}"
            log.info("%s: %s refused: %d %s", event.id, client, event.error.status, event.error.message)
        else:
            self._left_out[event.error.status] += 1

    def connection_refused(self, event: ConnectionRefused) -> None:
        """Count a connection."""
        self._closed[event.reason] += 1

    def check(self) -> None:
        """At the end of a period log what had no line."""
        if self._now() < self._ends_at:
            return
        for status, count in self._left_out.items():
            log.info("%d more requests were refused with %d in the last minute", count, status)
        for reason, count in self._closed.items():
            log.warning("%d connections were closed for want of room in the last minute: %s", count, reason)
        for counter in (self._logged, self._left_out, self._closed):
            counter.clear()
        self._ends_at = self._now() + self.PERIOD_S


# --- 23. Metrics: counters for Prometheus -----------------------------------------
# Offers: Metrics, Scrape

STATES = ("ok", "cooling", "half_open")


class Spent:
    """What calls and discarded attempts at one upstream add up to."""

    def __init__(self) -> None:
        self.tokens = [0] * len(Tokens.__struct_fields__)
        self.cost_usd = 0.0

    def add(self, entry: Entry | Discarded) -> None:
        """Add the tokens and the cost of a ledger entry."""
        tokens = self.tokens
        tokens[0] += entry.input_tokens
        tokens[1] += entry.output_tokens
        tokens[2] += entry.cache_write_5m_tokens
        tokens[3] += entry.cache_write_1h_tokens
        tokens[4] += entry.cache_read_tokens
        self.cost_usd += entry.cost_usd


class Histogram:
    """How many waits were how long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(HISTOGRAM_S) + 1)  # each without those below it: a call adds to one of them
        self.sum_s = 0.0

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and how many were not longer, as Prometheus counts them."""
        names = [*map(str, HISTOGRAM_S), "+Inf"]
        return list(zip(names, itertools.accumulate(self.counts), strict=True))


class Metrics:
    """What was counted since the start. A call costs a few additions here; everything else waits for a scrape.

    Upstreams are told apart, keys of users are not: a series for each would never end, and tell who works when.
    """

    def __init__(self, started_at: float, events: Events) -> None:
        self.started_at = started_at  # wall time
        self.calls: Counter[tuple[str, str]] = Counter()  # by upstream and outcome
        self.spent = defaultdict[str, Spent](Spent)  # by upstream
        self.attempts: Counter[tuple[str, str]] = Counter()  # by upstream and outcome
        self.refused: Counter[int] = Counter()  # by status
        self.connections: Callable[[], int] = lambda: 0  # that are open; the front door says more
        self.connections_refused: Counter[str] = Counter()  # by reason
        self.lost_log_lines: Callable[[], int] = lambda: 0  # whoever writes the log from a thread says more
        self.integrity_problems = 0  # that `check_in_background` found
        self.call_seconds, self.first_byte_seconds = Histogram(), Histogram()
        events.listen(CallEnded, self.call_ended)
        events.listen(AttemptDiscarded, self.attempt_discarded)
        events.listen(CallRefused, self.refused_one)
        events.listen(RequestRefused, self.refused_one)
        events.listen(ConnectionRefused, self.connection_refused)

    def call_ended(self, event: CallEnded) -> None:
        """Count a call, its attempts, and what it has spent."""
        entry = event.entry
        self.calls[entry.upstream, entry.outcome] += 1
        self.spent[entry.upstream].add(entry)
        for attempt in event.attempts:
            if attempt.outcome:
                self.attempts[attempt.upstream, attempt.outcome] += 1
        for histogram, ms in ((self.call_seconds, entry.duration_ms), (self.first_byte_seconds, entry.first_byte_ms)):
            if ms is not None:
                histogram.counts[bisect.bisect_left(HISTOGRAM_S, ms / 1e3)] += 1
                histogram.sum_s += ms / 1e3

    def attempt_discarded(self, event: AttemptDiscarded) -> None:
        """Count what an attempt has spent of which the client saw nothing: it is no call."""
        self.spent[event.entry.upstream].add(event.entry)

    def refused_one(self, event: CallRefused | RequestRefused) -> None:
        """Count a refusal."""
        self.refused[event.error.status] += 1

    def connection_refused(self, event: ConnectionRefused) -> None:
        """Count a connection."""
        self.connections_refused[event.reason] += 1


# What /metrics has: names without their prefix, labels, and what it is. A counter's name ends in _total, the others are
# gauges. The label `key` of an upstream counts its API keys from 1, and is empty for the upstream as a whole.
METRICS = {
    "calls_total": ("upstream outcome", "Calls that have ended, by the upstream asked last and the ledger's outcome."),
    "tokens_total": ("upstream class", "Tokens of calls, and of attempts that were billed in vain."),
    "cost_usd_total": ("upstream", "What these tokens cost, by the prices in the config, in USD."),
    "refused_total": ("status", "Requests refused before an upstream was asked, by the status of the answer."),
    "connections_refused_total": ("why", "Connections closed for want of room: address, oldest, key or full."),
    "attempts_total": (
        "upstream outcome",
        "Attempts of ended calls; a failure's row in the table of verdicts, or as calls.",
    ),
    "upstream_state": (
        "upstream key state",
        "1 for the state that an upstream, or one of its API keys, is in, else 0.",
    ),
    "upstream_cooldown_seconds": ("upstream key", "For how long it is not asked; with state ok: by one user only."),
    "upstream_failures": ("upstream key", "Failures in a row."),
    "upstream_running": ("upstream key", "Attempts that run."),
    "calls_running": ("", "Admitted calls that have not ended."),
    "connections": ("", "Connections of clients that are open."),
    "body_bytes": ("", "Bytes of request bodies that are held."),
    "body_bytes_limit": ("", "How many these may be: server.memory."),
    "ledger_waiting_entries": ("", "Entries of the ledger that are not in its file yet."),
    "ledger_failing": ("", "Whether the disk refuses the ledger's entries."),
    "config_reload_failing": ("", "Whether config.yaml has a mistake and an older one holds."),
    "config_loaded_timestamp_seconds": ("", "When the configuration that holds was loaded."),
    "start_time_seconds": ("", "When the gateway started; counters begin there."),
    "log_lines_lost_total": ("", "Lines of the log that are lost, because stderr was not read or refused them."),
    "integrity_problems": ("", "Files that at the start were not as in the image's own list; 0 where there is none."),
    "bugs_total": (
        "where",
        "Exceptions that nothing expects, by where they were caught; the log has their tracebacks.",
    ),
    "info": ("version", "The version."),
}
Sample = tuple[str, Sequence[str], float]  # a row of METRICS, the values of its labels, and the number


class Scrape(NamedTuple):
    """The gateway as it stands, for one answer to Prometheus: a collector, as prometheus_client has it."""

    metrics: Metrics
    guard: Guard
    relay: Relay
    memory: BodyMemory
    ledger: Ledger
    config: Config
    loaded_at: float  # wall time
    is_reload_failing: bool

    def text(self) -> bytes:
        """The state in Prometheus' text format (0.0.4)."""
        # Imported by the first scrape: 10 ms and 1 MB that a start, and a gateway that nobody scrapes, do without.
        from prometheus_client import generate_latest

        return generate_latest(self)

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """What `prometheus_client.registry.Collector` promises."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families: dict[str, Any] = {}
        for name, (labels, text) in METRICS.items():
            family: Any = GaugeMetricFamily
            if name.endswith("_total"):
                family = CounterMetricFamily
            families[name] = family(f"claude_gateway_{name}", text, labels=labels.split())
        for name, values, number in (*self._state(), *self._counts(), *self._upstreams()):
            families[name].add_metric(values, number)
        yield from families.values()
        for name, histogram, end in (
            ("call_seconds", self.metrics.call_seconds, "its end"),
            ("first_byte_seconds", self.metrics.first_byte_seconds, "the first byte of its answer"),
        ):
            text = f"Seconds from the beginning of a call to {end}."
            yield HistogramMetricFamily(f"claude_gateway_{name}", text, histogram.buckets(), histogram.sum_s)

    def _state(self) -> Iterator[Sample]:
        """What has one number."""
        metrics = self.metrics
        yield "calls_running", (), len(self.relay.running)
        yield "connections", (), metrics.connections()
        yield "body_bytes", (), self.memory.held
        yield "body_bytes_limit", (), self.memory.total
        yield "ledger_waiting_entries", (), self.ledger.waiting
        yield "ledger_failing", (), bool(self.ledger.failure)
        yield "config_reload_failing", (), self.is_reload_failing
        yield "config_loaded_timestamp_seconds", (), self.loaded_at
        yield "start_time_seconds", (), metrics.started_at
        yield "log_lines_lost_total", (), metrics.lost_log_lines()
        yield "integrity_problems", (), metrics.integrity_problems
        yield "info", (VERSION,), 1

    def _counts(self) -> Iterator[Sample]:
        """What was counted. Each configured upstream has tokens and cost: what appears with a call has no rate."""
        metrics = self.metrics
        for place, count in metrics.calls.items():
            yield "calls_total", place, count
        for place, count in metrics.attempts.items():
            yield "attempts_total", place, count
        for status, count in metrics.refused.items():
            yield "refused_total", (str(status),), count
        for reason, count in metrics.connections_refused.items():
            yield "connections_refused_total", (reason,), count
        for step, count in self.guard.failures.items():
            yield "bugs_total", (step,), count
        spent = {upstream.name: Spent() for upstream in self.config.upstreams} | metrics.spent
        for upstream, sums in spent.items():
            yield "cost_usd_total", (upstream,), sums.cost_usd
            for name, count in zip(Tokens.__struct_fields__, sums.tokens, strict=True):
                yield "tokens_total", (upstream, name.removesuffix("_tokens")), count

    def _upstreams(self) -> Iterator[Sample]:
        """How upstreams and their API keys stand."""
        now = self.relay.clock.monotonic()
        for upstream in self.config.upstreams:
            choices = self.relay.upstreams.choices(upstream)
            healths = {"": choices[0].health} | {str(choice.number): choice.key_health for choice in choices}
            for number, health in healths.items():
                place = upstream.name, number
                for state in STATES:
                    yield "upstream_state", (*place, state), health.state(now) == state
                yield "upstream_cooldown_seconds", place, health.cooling_s(now)
                yield "upstream_failures", place, health.failures
                yield "upstream_running", place, health.running


# --- 24. Models: lists of models, and what the keys are good for ------------------
# Offers: ask_models, collect, KeyChecks, ListedModel, ModelList, Models


class Collected:
    """An answer that is wanted whole: `done` gives status and body, or raises AttemptFailed."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body = bytearray()

    def head(self, status: int, headers: Headers) -> None:
        self._status = status

    def received(self, body: bytes, last: bool) -> None:
        self._body += body
        if len(self._body) > 4 << 20:
            self.lost(NOT_HTTP)
        elif last and not self.done.done():
            self.done.set_result((self._status, bytes(self._body)))

    def lost(self, failure: Failure) -> None:
        self.crashed(AttemptFailed(failure))

    def crashed(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class ListedModel(msgspec.Struct):
    """One model of an upstream's list; what else it says is dropped."""

    id: str
    display_name: str = ""
    created_at: str = "1970-01-01T00:00:00Z"
    created: int = 0


class ModelList(msgspec.Struct):
    """The answer to GET /v1/models, of either API."""

    data: list[ListedModel]


async def collect(relay: Relay, upstream: UpstreamConfig, head: bytes, body: Pieces) -> tuple[int, bytes]:
    """Send a request to an upstream; status and body of the answer. Raises AttemptFailed."""
    line = await relay.line(upstream)
    answer = Collected()
    try:
        line.send(head, body, answer)
        return await answer.done
    finally:
        if not answer.done.done() or answer.done.cancelled() or answer.done.exception():
            line.abort()


async def ask_models(relay: Relay, choice: Choice) -> tuple[int, bytes]:
    """Status and body of an upstream's answer to GET /v1/models. Raises AttemptFailed."""
    target = UpstreamTarget.of(choice.upstream.url, choice.upstream.proxy)
    return await collect(relay, choice.upstream, models_head(choice.upstream, choice.api_key, target), ())


class Models:
    """Which models there are: those named in the config, and those that upstreams list, cached."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._lists: dict[tuple[str, str], tuple[float, list[ListedModel]]] = {}
        self._fetching: dict[tuple[str, str], asyncio.Lock] = {}  # who asks at once waits for the one that asks

    async def of(self, config: Config, key: Key) -> list[ListedModel]:
        """The models that `key` may use, in the order of the upstreams."""
        lists = await asyncio.gather(*(self._of_upstream(upstream) for upstream in config.upstreams))
        return list({model.id: model for models in lists for model in models if key.allows_model(model.id)}.values())

    async def _of_upstream(self, upstream: UpstreamConfig) -> list[ListedModel]:
        named = [ListedModel(name, name) for name in upstream.named_models()]
        if len(named) == len(upstream.models):
            return named
        listed = [ListedModel(DEMO_MODEL, "Demo")]
        if upstream.format != "demo":
            listed = await self._listed(upstream)
        return named + [model for model in listed if upstream.rename(model.id) is not None]

    async def _listed(self, upstream: UpstreamConfig) -> list[ListedModel]:
        address = upstream.name, upstream.url
        async with self._fetching.setdefault(address, asyncio.Lock()):
            good_until, models = self._lists.get(address, (0.0, []))
            now = self._relay.clock.monotonic()
            if now < good_until:
                return models
            try:
                async with asyncio.timeout(self._relay.pace.models_fetch_s):
                    models = await self._fetch(upstream)
                good_s = self._relay.pace.models_s
            except (TimeoutError, AttemptFailed, ValueError, RecursionError) as error:
                log.warning("upstream %s does not list its models: %s", upstream.name, error or "no answer in time")
                good_s = self._relay.pace.models_s / 10
            self._lists[address] = (now + good_s, models)
        return models

    async def _fetch(self, upstream: UpstreamConfig) -> list[ListedModel]:
        choices, now = self._relay.upstreams.choices(upstream), self._relay.clock.monotonic()
        ready = next((choice for choice in choices if choice.key_health.cooling_s(now) == 0), choices[0])
        status, body = await ask_models(self._relay, ready)
        if status != 200:
            raise ValueError(f"status {status}")
        return msgspec.json.decode(body, type=ModelList).data


class KeyChecks:
    """Asks upstreams for their models with API keys that a call was refused with: is it the key, or the call?"""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._tasks: set[asyncio.Task[None]] = set()

    def check(self) -> None:
        """Ask for all that are suspected."""
        for suspect, health in self._relay.upstreams.take_suspects():
            task = asyncio.get_running_loop().create_task(self._check_key(suspect, health))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _check_key(self, choice: Choice, health: Health) -> None:
        status = 0  # no answer
        with contextlib.suppress(TimeoutError, AttemptFailed):
            async with asyncio.timeout(choice.upstream.timeouts.connect):
                status, _ = await ask_models(self._relay, choice)
        self._relay.upstreams.record_key_check(choice, health, status)

    async def close(self) -> None:
        """Stop asking."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


# --- 25. Gateway: owns all state, tells the story ---------------------------------
# Offers: Gateway, Role

Role = Literal["anyone", "scraper", "key"]  # a scraper has an address in server.metrics_from


class Principal(NamedTuple):
    """Who asks: the role that was checked, the client's address, and the key that it has shown for it."""

    role: Role
    address: str
    key: Key | None = None


def do_nothing() -> None:
    """Nothing follows."""


class Bookkeeper:
    """Makes entries of what calls have used, and hands them to the ledger."""

    def __init__(self, ledger: Ledger, limits: Limits, clock: Clock, events: Events, guard: Guard) -> None:
        self._ledger = ledger
        self._limits = limits
        self._clock = clock
        self._emit = events.emit
        self._guard = guard
        self._ends: list[Callable[[], None]] = []  # what waits for this turn's entries to be written

    def hold_cost(self, exchange: Exchange, attempt: Attempt) -> bool:
        """Hold what an attempt has cost in vain until its call is booked; whether the limits allow another attempt."""
        call, usage = exchange.call, attempt.usage()
        bill = call.config.bill(attempt.ticket.model, attempt.reader.model[:MAX_NAME], usage)
        usd = min(bill.cost_usd, MAX_COST_USD)
        held = {"tokens": bill.weighted_tokens or 0, "usd": math.ceil(usd * NANO["usd"])}
        return self._limits.charge(call.reservation, held)

    def book(self, exchange: Exchange, outcome: Outcome, then: Callable[[], None] = do_nothing) -> None:
        """Make a call's entry and its line in the log, once. `then` is called when the entry is in the file.

        All calls that end in one turn of the event loop share one write, at the turn's end. Never raises.
        """
        if exchange.is_booked:
            return
        exchange.is_booked = True
        if not self._guard.run(self._book, exchange, outcome) and not exchange.is_written:
            # What was read of the answer cannot be booked. An entry without it still shows that there was a call.
            exchange.discarded = ()
            plain = self._entry(exchange, None, Outcome("internal_error", outcome.status, outcome.error))
            self._guard.run(self._ledger.note, plain)
        if not self._ends:
            asyncio.get_running_loop().call_soon(self.write)
        self._ends.append(then)

    def write(self) -> None:
        """Write the entries of this turn, then let the answers of their calls end."""
        self._ledger.write()
        ends, self._ends = self._ends, []
        for end in ends:
            self._guard.run(end)

    def _book(self, exchange: Exchange, outcome: Outcome) -> None:
        entry = self._entry(exchange, exchange.attempt, outcome)
        for attempt, case in exchange.discarded:
            if attempt is not exchange.attempt:  # else it is the entry's own
                thrown_away = self._entry(exchange, attempt, Outcome(case))
                line = msgspec.convert(thrown_away, Discarded, from_attributes=True)
                self._ledger.note(line)
                self._emit(AttemptDiscarded(exchange.call, line))
        exchange.is_written = True
        self._ledger.note(entry)
        last = exchange.attempt
        if last and last.reader.seen_input:
            self._limits.estimates.learn(exchange.call, last.ticket.model, entry)
        self._emit(CallEnded(exchange.call, entry, exchange.attempts))

    def _fill(self, entry: Entry, call: Call, attempt: Attempt) -> None:
        """Write on an entry what an attempt has used and costs; where nobody can believe it, an estimate of both."""
        asked, meter = attempt.ticket.model, attempt.reader
        call.config.fill(entry, asked, entry.model_served, attempt.usage())
        if entry.cost_usd > MAX_COST_USD:
            meter.absurd = f"a cost of ${entry.cost_usd:,.0f}"
            entry.premiums = {}
            entry.charges = []
            call.config.fill(entry, asked, entry.model_served, meter.estimate())
        if meter.absurd:
            text = "%s: %s of upstream %s is not believed, and estimated"
            log.error(text, call.id, meter.absurd, attempt.upstream.name)

    def _entry(self, exchange: Exchange, attempt: Attempt | None, outcome: Outcome) -> Entry:
        """Make the entry of a call as it ended, with what one of its attempts has used."""
        call, error = exchange.call, outcome.error
        entry = Entry(
            time=utc_time(self._clock.wall()),
            request_id=call.id,
            key=call.key.name,
            team=call.key.team,
            model=call.model,
            path=call.route.path,
            stream=call.stream,
            status=outcome.status or exchange.status,
            outcome=outcome.name,
            attempts=exchange.attempts,
            duration_ms=round((self._clock.monotonic() - call.started) * 1e3, 1),
            queued_ms=round((call.admitted - call.started) * 1e3, 1),
            bytes_up=call.bytes_up,
            bytes_down=exchange.bytes_down,
            session=call.session,
            client=call.address,
            user_agent=call.user_agent,
        )
        if error:
            entry.status = entry.status or error.status
            entry.error_type = error.type
        if attempt is None:
            call.config.fill(entry, call.upstream_model, "", Usage())
            return entry
        entry.upstream = attempt.upstream.name
        entry.upstream_request_id = attempt.upstream_request_id
        entry.model_served = printable(attempt.reader.model, MAX_NAME)
        self._fill(entry, call, attempt)
        entry.error_type = attempt.reader.error_type or entry.error_type
        if attempt.reader.absurd:
            entry.error_type = entry.error_type or "absurd_usage"
        api_key = attempt.ticket.choice.api_key
        if api_key and api_key in f"{entry.upstream_request_id} {entry.model_served} {entry.error_type}":
            for name in ("upstream_request_id", "model_served", "error_type"):  # an upstream has said our key back
                setattr(entry, name, getattr(entry, name).replace(api_key, HIDDEN_KEY))
        if attempt.first_byte_at is not None:
            entry.first_byte_ms = round((attempt.first_byte_at - call.started) * 1e3, 1)
        return entry


class KeyBooks:
    """What a key's holder can ask of the books.

    One request of a key reads at a time, and AT_ONCE of all keys; the others wait, in order. So a key that asks for
    many pages at once delays itself, and others by one page at most.
    """

    AT_ONCE = 4
    WAITING = 16  # requests of one key, with the one that reads
    MOST_GROUPS = 5_000  # that stats may have: 1 MB of JSON, 5 ms to encode and as long to sort

    def __init__(self, all_books: Books, limits: Limits, config: Config) -> None:
        self._books = all_books
        self._limits = limits
        self._clock = config.clock
        self._timezone = config.server.timezone
        self._files = LedgerFiles(config.usage_directory)
        self._threads = ThreadPoolExecutor(self.AT_ONCE, "reader")
        self._all = asyncio.Semaphore(self.AT_ONCE)
        self._locks = defaultdict[str, asyncio.Lock](asyncio.Lock)  # by key: there are no more than the config has
        self._count: Counter[str] = Counter()
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[None]:
        """Wait for a key's turn, and have it for the block. Raises LimitFull where too many of it wait already."""
        if self._count[name] >= self.WAITING:
            raise LimitFull(f"{self.WAITING} requests of this key read its usage already. Try again in a moment.")
        self._count[name] += 1
        try:
            async with self._locks[name], self._all:
                yield
        finally:
            self._count[name] -= 1

    async def usage(self, key: Key) -> dict[str, Any]:
        """How the limits of a key stand, and what it spent today and this month. Raises Unavailable."""
        spans = self._books.calendar.spans(self._clock.wall())
        spent = {}
        for name, span in (("today", "day"), ("month", "month")):
            groups = await self._ask((), key, spans[span].start)
            spent[name] = Total.of({}, groups.get((), NOTHING_SPENT))
        about = {"key": key.name, "team": key.team, "timezone": self._timezone}
        return {**about, "limits": self._limits.standings(key), **spent}

    async def line(self, key: Key) -> str:
        """The same in a line, for Claude Code's status line: the two limits nearest to their end, else the cost."""
        usage = await self.usage(key)
        limits = [row for row in usage["limits"] if row["limit"] != "concurrent"]
        limits.sort(key=lambda row: row["used"] / row["allowed"] if row["allowed"] else 1.0, reverse=True)
        phrases = [limit_phrase(row) for row in limits[:2]]
        if not limits:
            phrases = [f"${usage['today'].cost_usd:,.2f} today, ${usage['month'].cost_usd:,.2f} this month"]
        elif limits[0]["resets"]:
            phrases[0] += f", {limits[0]['resets']}"
        return f"{key.name}: {' · '.join(phrases)}"

    async def totals(self, key: Key, by: Sequence[str], since: float, until: float) -> list[Total]:
        """What a key has spent by hour, day, month and labels, sorted. Raises BadRequest or Unavailable."""
        groups = await self._ask(by, key, since, until)
        if len(groups) > self.MOST_GROUPS:
            raise BadRequest(
                f"These are more than {self.MOST_GROUPS:,} groups: ask for a shorter time with since and until, "
                "or for fewer groups with by."
            )
        return await asyncio.get_running_loop().run_in_executor(self._threads, totals_of, by, groups)

    async def _ask(self, by: Sequence[str], key: Key, since: float, until: float = math.inf) -> Groups:
        if self._is_closed:
            raise Unavailable("The gateway is stopping.", retry_after_s=5)
        try:
            return await self._books.ask(by, {"key": key.name}, since, until)
        except OSError as error:
            raise Unavailable(f"The ledger cannot be read: {why_not(error)}", retry_after_s=30) from None

    async def page(self, key: Key, before: tuple[str, int], wanted: Callable[[Entry], bool], count: int) -> Page:
        """A page of a key's entries, newest first; the files are read in a thread. Raises Unavailable."""
        if self._is_closed:  # whoever waited for the turn finds no threads any more
            raise Unavailable("The gateway is stopping.", retry_after_s=5)
        page = functools.partial(self._files.page, key.name, before, wanted, count)
        return await asyncio.get_running_loop().run_in_executor(self._threads, page)

    def close(self) -> None:
        """Answer no more."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)


class Gateway:
    """Owns the snapshot, the ledger and the relay. Knows calls and sinks, never a handler."""

    LARGE_BODY = 256 << 10  # bytes; larger ones are read one after the other; between two of them others have a turn

    def __init__(
        self,
        config: Config,
        pace: Pace = Pace(),
        environ: Mapping[str, str] = os.environ,
        store: Callable[[Fold, Clock], CounterStore] = MemoryStore,
    ) -> None:
        self.config, self.pace, self.clock = config, pace, config.clock
        self._environ = environ
        self.ledger = Ledger(config.usage_directory, config.file.usage.fsync, config.clock)
        self.books = Books(self.ledger, config.clock, config.timezone, config.index_secret)
        self.limits = Limits(store(self.books.fold, config.clock), config.clock, pace, config.timezone)
        self.memory = BodyMemory(config.body_memory)
        self.relay = Relay(config.clock, pace)
        self.models = Models(self.relay)
        self.key_checks = KeyChecks(self.relay)
        self.guard = Guard(config.clock)
        self.events = Events(self.guard)
        self.emit = self.events.emit
        self.metrics = Metrics(config.clock.wall(), self.events)
        self.log = EventLog(self.events)
        self.refusals = RefusalLog(config.clock, self.events)
        self.ledger.on_change = lambda failure: self.emit(LedgerChanged(failure))
        self.relay.on_failure = lambda *facts: self.emit(AttemptFailure(*facts))
        self.relay.upstreams.on_trip = lambda *facts: self.emit(UpstreamTripped(*facts))
        self.relay.upstreams.on_recovery = lambda choice: self.emit(UpstreamRecovered(choice))
        self.loaded_at = config.clock.wall()
        self.reload_failed_at: float | None = None
        self.reload_error = ""
        self.stopping = False
        self.starting = False  # the ledger is still being read
        self._reloading = asyncio.Lock()
        self._reading = asyncio.Lock()
        self.key_books = KeyBooks(self.books, self.limits, config)
        self.bookkeeper = Bookkeeper(self.ledger, self.limits, self.clock, self.events, self.guard)
        self.relay.book = self.bookkeeper.book
        self.relay.hold_cost = self.bookkeeper.hold_cost
        self._tasks: dict[asyncio.Task[None], Sink] = {}  # of the calls that are handled

    # Calls

    def authenticate(self, headers: Headers, named: Mapping[bytes, bytes], peer: str) -> tuple[Key, str]:
        """The key of a request, and the client's address. Raises what is wrong before the body is read.

        `named` are the first values of the headers.
        """
        address = client_address(self.config.trusted, headers, named, peer)
        key = self.config.keys.find(credentials(headers, named))
        key.check(address, self.clock.wall())
        return key, address

    def identify(self, role: Role, headers: Headers, named: Mapping[bytes, bytes], peer: str) -> Principal:
        """Who sends a request that takes a role. Raises GatewayError where they do not have it."""
        if role == "key":
            key, address = self.authenticate(headers, named, peer)
            return Principal(role, address, key)
        address = client_address(self.config.trusted, headers, named, peer)
        if role == "scraper" and not address_in(address, self.config.metrics_from):
            raise KeyForbidden(f"{address} is in none of the networks of server.metrics_from.")
        return Principal(role, address)

    def enter(self, call: Call, length: int) -> None:
        """Take what a call needs before its body of so many bytes is read. Raises GatewayError."""
        call.reservation = Reservation(self.limits, self.memory, call)
        try:
            self.limits.enter(call.reservation)
            call.reservation.hold_body(length)
        except GatewayError:
            call.reservation.release()
            raise

    def start(self, call: Call, sink: Sink) -> None:
        """Handle a call in a task of its own."""
        task = asyncio.get_running_loop().create_task(self.handle(call, sink))
        self._tasks[task] = sink
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Cut off a client whose call could not even be refused."""
        sink = self._tasks.pop(task)
        error = None if task.cancelled() else task.exception()
        if error:
            self.guard.failures["Gateway.handle"] += 1
            log.error("a bug in refusing a call", exc_info=error)
            self.guard.run(sink.cut)

    async def handle(self, call: Call, sink: Sink) -> None:
        """The story of a call that has entered: read, route, admit, relay, book. If admitted it leaves one entry."""
        exchange = None
        try:
            with call.reservation:
                if len(call.body) <= self.LARGE_BODY:
                    read_request(call)
                else:
                    async with self._reading:
                        await asyncio.sleep(0)
                        read_request(call)
                call.servings = call.config.route(call)
                call.upstream_model = call.servings[0].model
                self.check_open()
                exchange = sink.exchange = Exchange.of(call, sink, self.relay)
                if sink.is_gone:
                    exchange.client_gone()
                await self.limits.admit(call, exchange.done)
                await self._carry(exchange)  # and settle, by its entry
        except GatewayError as error:
            self.refuse(call, sink, error)
        except Exception:  # a bug of ours outside the relay
            self.guard.failures["Gateway.handle"] += 1
            log.exception("%s: failed", call.id)
            if exchange is None:
                self.refuse(call, sink, GatewayError(INTERNAL_ERROR))
            elif sink.exchange is exchange:  # else the client has its answer, or is gone
                exchange.refuse(GatewayError(INTERNAL_ERROR))

    async def _carry(self, exchange: Exchange) -> None:
        """Relay an admitted call, and book it however it ends."""
        outcome = FAILED
        try:
            outcome = await self.relay.run(exchange)
        except Exception:  # the one edge: a bug of ours, or a refusal that nobody foresaw
            self.guard.failures["Relay.run"] += 1
            log.exception("%s: failed", exchange.call.id)
        finally:
            self.bookkeeper.book(exchange, outcome)
            if outcome.error:
                self.bookkeeper.write()
                exchange.refuse(outcome.error)

    def check_open(self) -> None:
        """Refuse what could not be booked. Raises Unavailable."""
        if self.stopping:
            raise Unavailable("The gateway is stopping.", retry_after_s=5)
        if self.starting:
            raise Unavailable("The gateway is starting: it still reads its ledger.", retry_after_s=2)
        if not self.ledger.has_room(len(self.relay.running) + self.limits.waiting):
            raise Unavailable("The gateway cannot write its ledger and takes no more calls.", retry_after_s=30)

    def refuse(self, call: Call, sink: Sink, error: GatewayError) -> None:
        """Turn a call away before it cost anything: a line in the log, none in the ledger."""
        self.emit(CallRefused(call, error))
        sink.refuse(error, call.route.api, call.id)

    # Reload, health, time, end

    async def reload(self, is_asked: bool = False) -> None:
        """Read config.yaml again. A bad file changes nothing: the last good snapshot stays and the error is kept.

        `is_asked`: somebody wants it read although its text may be what it was: the secret may be another.
        """
        async with self._reloading:
            error = ""
            try:
                # In a thread: ten thousand keys take a second, and streams go on meanwhile.
                config = await asyncio.to_thread(self._read_config, is_asked)
            except ConfigError as mistake:
                error = str(mistake)
                if error != self.reload_error or mistake.without_revoked:
                    self.emit(ConfigRefused(mistake))
                if mistake.without_revoked:
                    self.config = mistake.without_revoked
                    self._check_waiting()
            except Exception:
                self.guard.record("Gateway.reload")
                error = "a bug in reading the config; the gateway's log has its traceback"
            else:
                if config is not None:
                    self._take(config)
                elif self.reload_error:
                    self.emit(ConfigLoaded(self.config, self.config))
            self.reload_error = error
            self.reload_failed_at = self.clock.wall() if error else None

    def _read_config(self, is_asked: bool) -> Config | None:
        """A new snapshot, None where the file says what the present one does. Raises ConfigError."""
        text = read_text(self.config.path, "put it back: it is read within a second, and a restart needs it")
        if config_digest(text) == self.config.digest and not is_asked:
            return None
        try:
            return Config.parse(text, self.config.path, self.clock, self._environ)
        except ConfigError as error:
            error.without_revoked = self.config.without_revoked(text)
            raise

    def _take(self, config: Config) -> None:
        """Let a new snapshot take the place of the present one."""
        before, self.config = self.config, config
        self.loaded_at = self.clock.wall()
        self.ledger.fsync_s = config.file.usage.fsync
        self.memory.total = config.body_memory
        self.relay.keep_only(config.upstreams)
        self._check_waiting()
        self.emit(ConfigLoaded(before, config))

    def _check_waiting(self) -> None:
        """Refuse waiting calls whose key may not be used any more, and let those in for which a limit has room now."""
        self.relay.upstreams.refuse_keys(self.config)
        self.limits.take_config(self.config)

    def health(self) -> dict[str, Any]:
        """What /health says: no secrets, and of names only the upstreams'."""
        failure = self.ledger.failure
        reasons = {
            "the ledger is still being read": self.starting,
            "the gateway is stopping": self.stopping,
            "the ledger cannot be written": failure,
            "no upstream key can be used": not self.relay.upstreams.can_serve(self.config.upstreams),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        return {
            "live": True,
            "ready": reason is None,
            "reason": reason,
            "starting": {"entries": self.books.entries} if self.starting else None,
            "stopping": self.stopping,
            "version": VERSION,
            "calls": len(self.relay.running),
            "config": {
                "digest": self.config.digest,
                "loaded_at": utc_time(self.loaded_at),
                "reload_failed_at": self.reload_failed_at and utc_time(self.reload_failed_at),  # the log says why
            },
            "ledger": {"failure": failure or None, "waiting": self.ledger.waiting},
            "upstreams": self.relay.upstreams.report(self.config.upstreams),
        }

    def scrape(self) -> bytes:
        """What /metrics says."""
        present = (self.config, self.loaded_at, bool(self.reload_error))
        return Scrape(self.metrics, self.guard, self.relay, self.memory, self.ledger, *present).text()

    def tick(self, stood_s: float = 0.0) -> None:
        """Look at deadlines and at the ledger; to be called often. `stood_s`: so long the loop stood still before."""
        run = self.guard.run
        run(self.relay.check, stood_s)
        run(self.relay.upstreams.check, stood_s)
        run(self.relay.pools.check, stood_s)
        run(self.limits.check, stood_s)
        run(self.ledger.tick)
        run(self.books.tick)
        run(self.key_checks.check)
        run(self.refusals.check)

    async def drain(self, within_s: float) -> None:
        """Let running calls finish; cut those that take too long."""
        self.stopping = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)

    async def close(self) -> None:
        """Cut what still runs, book it, and close the ledger."""
        self.stopping = True
        self.limits.close()
        self.relay.close()
        await self.key_checks.close()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=1)
            for task in late:  # they wait for a connection, which may take longer than a stop does
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self.limits.store.close()
        self.bookkeeper.write()
        self.ledger.close()
        self.books.close()
        self.key_books.close()


# --- 26. Actions: what a command, a request or the page changes -------------------
# Offers: act, Action, ActionCode, ActionError, AddKey, AdjustUsage, Change, check_new, Correction, Edit, House,
#   make_secret, MOST_COUNT, MOST_USD, ResetLimits, ResetUpstream, RevokeKey, RotateKey, Sealed, SealSecrets, Tried,
#   unknown_name, UpstreamTest, write_new

# An action is a change that somebody asks for, as a value, with the function that makes it: values in, values out, no
# arguments, no print, no HTTP. So a command, an admin request and a button of the page make the same change. What
# speaks against it is raised as an ActionError, whose fields are facts: whoever asked puts them into words.
#
#     edit                            changes               gives back
#     AddKey, RotateKey               config.yaml           the key, which nobody can be shown again
#     RevokeKey                       config.yaml           somebody else's mistake in it, which keeps no key in use
#     SealSecrets                     config.yaml           where secrets were sealed, and the secret if it was made
#     change
#     ResetLimits                     the ledger            nothing
#     AdjustUsage                     the ledger            the team that it counts with
#     ResetUpstream                   upstreams' health     nothing
#
# An edit works on the file, by a ConfigEditor, and needs no running gateway, which reads the file a moment later. A
# change works on a House: the running gateway or, where none runs, its config and ledger alone. Of each the running
# gateway announces who made it (`ChangeMade`), which is a line of its log. `act` does both in the running gateway: an
# admin endpoint that edits a key is one row of the API's table, which calls it with one action.

ActionCode = Literal["unknown", "taken", "done", "invalid", "failed", "unsure"]


class ActionError(CommandError):
    """Why an action was not done.

    `code` is `unknown` (nothing has this name), `taken` (something has it), `done` (before, under this id), `invalid`
    (a value that cannot be meant), `failed` (the system refused), or `unsure` (no answer came: it may be done, or
    still be).
    """

    def __init__(self, code: ActionCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class Action(msgspec.Struct, frozen=True, kw_only=True, tag_field="action"):
    """What is asked for. Its tag is the command's name; as text it is what the audit line says.

    A correction whose `id` is in the ledger is not made again.
    """

    id: str = ""
    is_repeated: bool = False  # perhaps: the id is not a fresh one

    def __str__(self) -> str:
        return str(self.__struct_config__.tag)


class NamedAction(Action, frozen=True):
    """What is asked for one key, or one upstream."""

    name: str

    def __str__(self) -> str:
        return f"{self.__struct_config__.tag} {self.name}"


def unknown_name(kind: str, name: str, known: Sequence[str]) -> ActionError:
    """The error of a name that is not in the config: what was probably meant, or what there is."""
    close = difflib.get_close_matches(name, known, 1)
    meant = f", did you mean {close[0]}?" if close else f"; there are: {', '.join(known) or 'none'}"
    return ActionError("unknown", f"there is no {kind} named {name!r}{meant}")


def write_new(path: Path, text: str, mode: int) -> None:
    """Create a file that is not there yet. Raises ActionError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(text.encode())
            os.fchmod(file.fileno(), mode)
    except OSError as error:
        raise ActionError("failed", f"cannot write {path}: {why_not(error)}") from None


def make_secret(folder: Path) -> Path | None:
    """Write a sealing secret where there is none for the config in a folder; its file. Raises ActionError."""
    secret = Vault.file(folder)
    if secret is None or secret.exists():
        return None
    write_new(secret, Vault.new_secret() + "\n", 0o600)
    return secret


def yaml_scalar(text: str) -> str:
    """Text as a YAML scalar, quoted where it must be. Raises ActionError."""
    if not text.isprintable():
        raise ActionError("invalid", f"expected text that can be printed, got {text!a}")
    plain = re.fullmatch(r"[A-Za-z]([\w.@:=-]*[\w.@=-])?", text) is not None
    with contextlib.suppress(ValueError):  # of what YAML takes for a date, such as 2027-13-45
        plain = plain and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


def names_in(editor: ConfigEditor, kind: Literal["keys", "teams"]) -> list[str]:
    """The names of `keys:` or `teams:` in the order of the file, "" where there is none."""
    node = editor.document.find(kind)
    count = len(node.value) if isinstance(node, yaml.SequenceNode) else 0
    names = [editor.document.find(kind, i, "name") for i in range(count)]
    return [name.value if isinstance(name, yaml.ScalarNode) else "" for name in names]


def key_place(editor: ConfigEditor, name: str) -> int:
    """Where a key stands in the file. Raises ActionError."""
    names = names_in(editor, "keys")
    if name not in names:
        raise unknown_name("key", name, names)
    return names.index(name)


class AddKey(NamedAction, frozen=True, tag="key add"):
    """Make a key. `limits` by name, such as usd/day; `expires` is the last day on which it works, or ""."""

    limits: dict[str, str] = {}
    models: tuple[str, ...] = ()
    expires: str = ""
    team: str = ""

    def run(self, path: Path) -> str:
        """Append its hash to `keys:`; the key. Raises ActionError and ConfigError."""
        key = new_key()
        with edited(path) as editor:
            if self.name in names_in(editor, "keys"):
                raise ActionError("taken", f"there is a key named {self.name!r} already")
            fields = {"name": yaml_scalar(self.name), "key": seal_key(key)}
            if self.team:
                teams = names_in(editor, "teams")
                if self.team not in teams:
                    raise unknown_name("team", self.team, teams)
                fields["team"] = yaml_scalar(self.team)
            if self.limits:
                for name, amount in self.limits.items():
                    try:
                        LimitSet.parse({name: amount})
                    except ValueError as error:
                        raise ActionError("invalid", f"limit {name!r}: {error}") from None
                fields["limits"] = "{" + ", ".join(f"{name}: {amount}" for name, amount in self.limits.items()) + "}"
            if self.models:
                fields["models"] = f"[{', '.join(map(yaml_scalar, self.models))}]"
            if self.expires:
                if read_date(self.expires) is None or not re.match(r"\d{4}-\d\d-", self.expires):
                    why = f"expires: expected a date such as 2027-01-31, got {self.expires!r}"
                    raise ActionError("invalid", why)
                if Expiry.parse(self.expires).at(time_zone_of(editor.document)) <= Clock().wall():
                    raise ActionError("invalid", f"expires: {self.expires} is over, the key would never work")
                fields["expires"] = yaml_scalar(self.expires)
            editor.append_key(fields)
            editor.save()
        return key


class RotateKey(NamedAction, frozen=True, tag="key rotate"):
    """Give a key's holder a new key; the old one ends."""

    def run(self, path: Path) -> str:
        """Replace the hash; the new key. Raises ActionError and ConfigError."""
        key = new_key()
        with edited(path) as editor:
            editor.set_scalar(seal_key(key), "keys", key_place(editor, self.name), "key")
            editor.save()
        return key


class RevokeKey(NamedAction, frozen=True, tag="key revoke"):
    """Disable a key; its name stays for the ledger."""

    def run(self, path: Path) -> str:
        """Set `enabled: false`; the mistake that the file has elsewhere, or "". Raises ActionError and ConfigError."""
        mistake = ""
        with edited(path) as editor:
            editor.set_field(("keys", key_place(editor, self.name)), "enabled", "false")
            try:
                Config.parse(editor.document.text, path, Clock(), os.environ)
            except ConfigError as error:  # somebody else's: it must not keep the key in use
                mistake = str(error)
            editor.replace()
        return mistake


def sealed_value(node: yaml.Node | None, steps: Steps, vault: Vault, rotate: bool) -> str | None:
    """What a secret's scalar is to be replaced with, None where it may stay."""
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        return None
    if node.value.startswith(Vault.PREFIX):
        return vault.seal(vault.unseal(node.value)) if rotate else None
    is_proxy = len(steps) == 3 and steps[-1] == "proxy"  # no header of that name
    without_password = is_proxy and "@" not in node.value
    if without_password or SEALED_OR_ELSEWHERE.search(node.value):
        return None
    return yaml_scalar(seal_key(node.value) if steps[0] == "keys" else vault.seal(node.value))


def secret_places(config: Config) -> Iterator[Steps]:
    """Where secrets may stand in a config."""
    for i, upstream in enumerate(config.upstreams):
        yield ("upstreams", i, "api_key")
        yield from (("upstreams", i, "api_key", j) for j in range(len(upstream.api_key)))
        yield ("upstreams", i, "proxy")
        secret = [name for name in upstream.headers.set if SECRET_HEADER.search(name)]
        yield from (("upstreams", i, "headers", "set", name) for name in secret)
    yield from (("keys", i, "key") for i in range(len(config.file.keys)))


class Sealed(NamedTuple):
    """Where secrets were sealed, and where encrypted again; the file of the sealing secret where that was made."""

    places: list[str]
    again: list[str]
    secret: Path | None


class SealSecrets(Action, frozen=True, tag="seal"):
    """Seal every plain secret; `rotate`: encrypt what is sealed again, with the newest sealing secret."""

    rotate: bool = False

    def run(self, path: Path) -> Sealed:
        """Raises ActionError, ConfigError and SealError; a bad file is known before anything is changed."""
        with edited(path) as editor:
            config = Config.load(path)
            found = Sealed([], [], make_secret(path.parent))
            vault = Vault.open(path.parent, os.environ)
            for steps in secret_places(config):
                node = editor.document.find(*steps)
                sealed = sealed_value(node, steps, vault, self.rotate)
                if node and sealed:
                    places = found.again if node.value.startswith(Vault.PREFIX) else found.places
                    places.append(join_steps(steps))
                    editor.set_scalar(sealed, *steps)
            if found.places or found.again:
                editor.save()
        return found


class House(NamedTuple):
    """What changes work on: `append` writes a line of the ledger (raises OSError); `gateway`: None where none runs."""

    config: Config
    append: Callable[[LedgerLine], None]
    gateway: Gateway | None


MOST_USD, MOST_COUNT = LINE_MAX / 1e9, 10**15  # of one adjustment: more is no amount that sums and counters can take


class Correction(Action, frozen=True):
    """A correction of a key's, a team's or the gateway's limits, whose `name` is "". `note` stands in the ledger."""

    scope: ScopeKind
    name: str
    note: str = ""

    @property
    def whom(self) -> str:
        """Whose limits, in words."""
        return f"{self.scope} {self.name}".rstrip()

    def audit(self, *parts: str) -> str:
        """What the audit line says: what is done, to whom, how much and why."""
        noted = [repr(self.note)] if self.note else []
        known_as = [f"id {self.id}"] if self.id else []
        return f"{self.__struct_config__.tag} {self.whom}: {', '.join([*parts, *noted, *known_as])}"

    def check(self, config: Config) -> None:
        """Raise ActionError for a name that is not in the config."""
        known = {"key": [key.name for key in config.keys], "team": [team.name for team in config.file.teams]}
        if self.scope != "gateway" and self.name not in known[self.scope]:
            raise unknown_name(self.scope, self.name, known[self.scope])


class ResetLimits(Correction, frozen=True, tag="usage reset"):
    """Let limits count from zero; `limit` is such as usd/day, or "" for all. Reports stay as they are."""

    limit: str = ""

    def __str__(self) -> str:
        return self.audit(self.limit or "all limits")

    def limits(self, config: Config) -> Sequence[Limit]:
        """The limits that the scope has."""
        if self.scope == "key":
            return next(key.budgets[0].limits for key in config.keys if key.name == self.name)
        if self.scope == "team":
            return next(team.limits for team in config.file.teams if team.name == self.name)
        return config.limits.gateway

    def run(self, house: House) -> None:
        """Append the line. Raises ActionError, and OSError as `append` does."""
        self.check(house.config)
        # `concurrent` counts what runs: there is nothing to reset.
        known = [limit.name for limit in self.limits(house.config) if limit.unit != "concurrent"]
        if self.limit and self.limit not in known:
            why = f"{self.whom} has no such limit to reset; it has: {', '.join(known) or 'none'}"
            raise ActionError("invalid", f"limit {self.limit}: {why}")
        now = utc_time(house.config.clock.wall())
        house.append(Reset(time=now, scope=self.scope, name=self.name, limit=self.limit, note=self.note, id=self.id))


class AdjustUsage(Correction, frozen=True, tag="usage adjust"):
    """Add to what was spent, or take away from it; `tokens` count as input."""

    usd: Annotated[float, msgspec.Meta(ge=-MOST_USD, le=MOST_USD)] = 0.0
    tokens: Annotated[int, msgspec.Meta(ge=-MOST_COUNT, le=MOST_COUNT)] = 0
    requests: Annotated[int, msgspec.Meta(ge=-MOST_COUNT, le=MOST_COUNT)] = 0

    def __str__(self) -> str:
        return self.audit(*self.amounts())

    def amounts(self) -> list[str]:
        """Return what is added, such as `-3.5 usd`."""
        amounts = {"usd": self.usd, "tokens": self.tokens, "requests": self.requests}
        return [f"{amount:+.16g} {unit}" for unit, amount in amounts.items() if amount]

    def run(self, house: House) -> str:
        """Append the line; the team that it counts with, or "". Raises ActionError, and OSError as `append` does."""
        self.check(house.config)
        line = Adjustment(
            time=utc_time(house.config.clock.wall()),
            requests=self.requests,
            input_tokens=self.tokens,
            cost_usd=self.usd,
            note=self.note,
            id=self.id,
        )
        if self.scope == "team":
            line.team = self.name
        elif self.scope == "key":
            line.key = self.name
            line.team = next(key.team for key in house.config.keys if key.name == self.name)
        house.append(line)
        return line.team


def check_new(action: Correction, directory: Path) -> None:
    """Raise ActionError where the ledger has a correction of this id, this one or another; a fresh id has none."""
    if not action.is_repeated:
        return
    files, needle = LedgerFiles(directory), b'"id":' + msgspec.json.encode(action.id)
    try:
        lines = (line for path in reversed(files.paths()) for line in files.lines_of(path) if needle in line)
        found = next(lines, None)
        if found is None:
            return
        line = msgspec.json.decode(found, type=Adjustment | Reset)
    except (OSError, BrokenChain, *UNREADABLE) as error:
        raise ActionError("failed", f"nothing was done, {action.id} cannot be looked for: {error}") from None
    if isinstance(line, Reset):
        booked: Correction = ResetLimits(line.scope, line.name, line.note, line.limit, id=line.id)
    else:
        whose: list[tuple[ScopeKind, str]] = [("key", line.key), ("team", line.team)]
        scope, name = next((each for each in whose if each[1]), ("gateway", ""))
        amounts = line.cost_usd, line.input_tokens, line.requests
        booked = AdjustUsage(scope, name, line.note, *amounts, id=line.id)
    if booked == msgspec.structs.replace(action, note=line.note, is_repeated=False):
        raise ActionError("done", f"{action.id} was done already: nothing was done again")
    raise ActionError("taken", f"nothing was done: --id {action.id} was used for another correction ({booked})")


class ResetUpstream(NamedAction, frozen=True, tag="upstream reset"):
    """Forget what spoke against an upstream, so that it is asked again at once."""

    def run(self, house: House) -> None:
        """Reset its health. Raises ActionError where no gateway runs, and OSError where its folder is held."""
        known = [upstream.name for upstream in house.config.upstreams]
        if self.name not in known:
            raise unknown_name("upstream", self.name, known)
        if house.gateway is None:
            directory = house.config.usage_directory
            if directory.exists():
                os.close(hold_folder(directory))
            raise ActionError("failed", f"no gateway was reached on {directory}; a restart forgets cooldowns as well")
        house.gateway.relay.upstreams.reset(self.name)


Edit = AddKey | RotateKey | RevokeKey | SealSecrets
Change = ResetLimits | AdjustUsage | ResetUpstream


async def act(gateway: Gateway, action: Edit | Change, who: str) -> Any:
    """Do what somebody asks of the running gateway, by the config as it is in the file now; announce it.

    Raises ActionError, ConfigError and SealError as the action does, and Unavailable.
    """
    if isinstance(action, Edit):
        result: Any = await asyncio.to_thread(action.run, gateway.config.path)
        await gateway.reload()
    else:
        await gateway.reload()
        gateway.check_open()
        if gateway.ledger.failure:
            raise ActionError("failed", f"nothing was done, the ledger cannot be written: {gateway.ledger.failure}")
        if isinstance(action, Correction):
            await asyncio.to_thread(check_new, action, gateway.config.usage_directory)
        result = action.run(House(gateway.config, gateway.ledger.append, gateway))
    gateway.emit(ChangeMade(who, str(action)))
    return result


class CallFailed(Exception):
    """A test's call was answered, but not well; the message says how."""


class Tried(msgspec.Struct):
    """What came of one small call with one API key of an upstream."""

    key: int  # its number, from 1
    state: Literal["ok", "FAILED"] = "FAILED"
    ms: float = 0.0
    detail: str = ""
    model: str = ""
    status: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


TEST_KEY = Key("upstream test", b"", "", ("*",), math.inf, (), True, "", ())  # whose calls they are; nobody's
TEST_HEADERS: Headers = [
    (b"content-type", b"application/json"),
    (b"user-agent", f"claude-gateway/{VERSION}".encode()),
    (b"anthropic-version", b"2023-06-01"),
]


class UpstreamTest:
    """One small real call with each API key of an upstream, by the connections and heads of real calls.

    It passes limits, ledger and health, which belong to users' calls.
    """

    def __init__(self, config: Config, upstream: UpstreamConfig, model: str, timeout_s: float) -> None:
        self.upstream = upstream
        self._config, self._model_asked, self._timeout_s = config, model, timeout_s
        self._relay = Relay(config.clock, Pace())
        self._target = UpstreamTarget.of(upstream.url, upstream.proxy)
        secret = [str(value) for name, value in upstream.headers.set.items() if SECRET_HEADER.search(name)]
        if self._target.proxy:
            secret.append(self._target.proxy[2].removeprefix("Basic "))
        self._secrets = sorted(filter(None, [*upstream.api_key, *secret]), key=len, reverse=True)

    async def run(self, tell: Callable[[Tried], None]) -> None:
        """Call with one key after the other, so that times are not each other's, and tell what comes of each."""
        try:
            for number, choice in enumerate(self._relay.upstreams.choices(self.upstream), 1):
                tell(await self._try(choice, Tried(number)))
        finally:
            self._relay.close()

    async def _try(self, choice: Choice, tried: Tried) -> Tried:
        began = self._config.clock.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                tried.model = await self._model(choice)
                await self._call(choice, tried)
        except (CallFailed, GatewayError) as error:
            tried.detail = str(error)
        except AttemptFailed as error:
            tried.detail = error.failure.sentence
            cause = error.__context__
            if isinstance(cause, OSError) and str(cause):
                tried.detail += f": {os_reason(cause)}"
        except TimeoutError:
            tried.detail = f"no answer within {self._timeout_s:g} s"
        tried.ms = round((self._config.clock.monotonic() - began) * 1e3, 1)
        tried.model = self._clean(tried.model)
        tried.detail = self._clean(tried.detail)
        return tried

    async def _model(self, choice: Choice) -> str:
        """Which model to ask for: the one that was named, else the config's first, else the cheapest that is listed."""
        upstream = self.upstream
        named = [self._model_asked] if self._model_asked else upstream.named_models()
        if upstream.format == "demo":
            named.append(DEMO_MODEL)
        if named:
            return named[0]
        status, body = await ask_models(self._relay, choice)
        if status != 200:
            raise CallFailed(f"the list of models: {status}: {self._said(body)[:300]}; --model NAME passes it by")
        served: list[str] = []
        with contextlib.suppress(*UNREADABLE):
            listed = msgspec.json.decode(body, type=ModelList).data
            served = [model.id for model in listed if upstream.rename(model.id) is not None]
        if not served:
            raise CallFailed(
                "`models` has only globs and the upstream's list of models gave none: name one with --model"
            )
        small = Usage(input_tokens=10, output_tokens=16)
        return min(served, key=lambda model: self._config.bill(upstream.rename(model) or model, "", small).cost_usd)

    async def _call(self, choice: Choice, tried: Tried) -> None:
        """Ask for a few words, and fill in what came. Raises CallFailed, GatewayError and AttemptFailed."""
        model = self.upstream.rename(tried.model)
        if model is None:
            raise CallFailed("it is not served here: see `models`")
        asked: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": "Say hello."}],
            "stream": True,
        }
        if self.upstream.format == "openai":
            route = ROUTES["/v1/chat/completions"]
            asked["stream_options"] = {"include_usage": True}  # and no bound: newer models do not know `max_tokens`
        else:
            route = ROUTES["/v1/messages"]
            asked["max_tokens"] = 16
        call = Call(self._config, TEST_KEY, route, b"", TEST_HEADERS, "")
        call.body = msgspec.json.encode(asked)
        read_request(call)
        head = request_head(call, route.path, self.upstream, choice.api_key, self._target, len(call.body))
        tried.status, body = await collect(self._relay, self.upstream, head, (call.body,))
        if tried.status != 200:
            raise CallFailed(f"{tried.status}: {self._said(body)[:300]}")
        self._read(ChatMeter(call) if route.kind == "chat" else MessagesMeter(call), model, body, tried)

    def _read(self, meter: Meter, model: str, body: bytes, tried: Tried) -> None:
        """Read an answer as real ones are. Raises CallFailed for one that is none."""
        meter.start(body.lstrip()[:1] != b"{")
        meter.read(body, True)
        usage = meter.sum_up()
        tried.input_tokens, tried.output_tokens = usage.total_input_tokens, usage.output_tokens
        if meter.seen_input:
            tried.cost_usd = self._config.bill(model, meter.model, usage).cost_usd
        if meter.error_type:
            raise CallFailed(f"answered with an error: {self._said(body)[-300:]}")
        if not meter.has_content and not meter.seen_input:
            raise CallFailed(f"{UNEXPECTED.sentence}: {self._said(body)[:300]}")
        if not meter.is_finished:
            raise CallFailed(CUT.sentence)
        tried.state = "ok"
        tried.detail = f"{tried.input_tokens} tokens in, {tried.output_tokens} out, ${tried.cost_usd:.6f}"

    def _said(self, body: bytes) -> str:
        """An answer as text, cleaned before it is cut: half a secret is one, too."""
        return self._clean(body.decode("utf-8", "replace"))

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        return text


# --- 27. Reconcile: the ledger against a provider's export ------------------------
# Offers: Export, Pair, reconcile

# A provider's console exports what it has billed, as a CSV: a row per day and model (Anthropic: usage or cost; OpenAI:
# usage). Its sums per UTC day and model are compared with the ledger's. Three things stand in the way:
#
#     they say                                we say                        so
#     other columns in each export            one name a field              EXPORT_COLUMNS
#     Claude Haiku 4.5 (cost exports)         claude-haiku-4-5-20251001     names are compared by their words, undated
#     all input (OpenAI)                      what came from no cache       what came from the cache is taken off
#
# What another model did in a call (an advisor) stands in the export under that model, so there in our sums as well.

EXPORT_COLUMNS = {  # ours: what the providers' exports call it; of these, the first that is there counts
    "day": ("usage_date_utc", "start_time_iso", "start_time", "date"),
    "model": ("model_version", "model"),
    "input_tokens": ("usage_input_tokens_no_cache", "input_uncached_tokens", "input_tokens"),
    "cache_write_5m_tokens": ("usage_input_tokens_cache_write_5m", "usage_input_tokens_cache_write"),
    "cache_write_1h_tokens": ("usage_input_tokens_cache_write_1h",),
    "cache_read_tokens": ("usage_input_tokens_cache_read", "input_cached_tokens"),
    "output_tokens": ("usage_output_tokens", "output_tokens"),
    "cost_usd": ("cost_usd",),
}
MEASURES = {  # what is compared, kinds of tokens and money: the columns that add up to it
    kind.replace("_", " "): tuple(
        name for name, its_kind in zip(Tokens.__struct_fields__, TOKEN_KINDS, strict=True) if its_kind == kind
    )
    for kind in ("input", "cache_write", "cache_read", "output")
} | {"USD": ("cost_usd",)}
Sums = dict[tuple[str, str], dict[str, float]]  # per UTC day and model: a number per measure


class Pair(msgspec.Struct):
    """A day and model on which ledger and export differ; a side that has nothing is None."""

    day: str
    model: str
    ours: dict[str, float] | None
    theirs: dict[str, float] | None
    difference: dict[str, float]


def export_columns(path: Path, found: Sequence[str]) -> dict[str, str]:
    """Our fields and the columns that they stand in. Raises CommandError."""
    columns = {ours: next((name for name in names if name in found), "") for ours, names in EXPORT_COLUMNS.items()}
    there = {ours: name for ours, name in columns.items() if name}
    if {"day", "model"} <= there.keys() and (there.keys() >= {"input_tokens", "output_tokens"} or "cost_usd" in there):
        return there
    raise CommandError(
        f"{path} is no export that is known: its columns are {', '.join(found) or 'none'}. Needed are day and model, "
        "and input_tokens and output_tokens or cost_usd, under the names that Anthropic or OpenAI give them"
    )


def export_day(cell: str) -> str:
    """The UTC day of a date, a time (UTC where it names no zone) or seconds since 1970. Raises ValueError."""
    if re.fullmatch(r"\d{9,10}", cell):
        return utc_time(int(cell))[:10]
    try:
        when = dt.datetime.fromisoformat(cell)
    except ValueError:
        raise ValueError(f"expected a date such as 2026-11-21, got {cell!r}") from None
    return (when.astimezone(dt.UTC) if when.tzinfo else when).date().isoformat()


def export_number(column: str, cell: str) -> float:
    """`$1,234` as 1234; an empty cell is 0. Raises ValueError."""
    with contextlib.suppress(ValueError):
        number = float(cell.replace(",", "").replace("$", "") or 0)
        if math.isfinite(number):
            return number
    raise ValueError(f"{column}: expected a number, got {cell!r}")


def plain_model(name: str) -> tuple[str, ...]:
    """The same for `Claude Haiku 4.5`, as cost exports say, and `claude-haiku-4-5-20251001`, as calls do."""
    undated = re.sub(r"-(\d{8}|\d{4}-\d\d-\d\d)$", "", name.lower())
    return tuple(sorted(re.findall(r"[a-z0-9]+", undated)))


def add_sums(sums: Sums, pair: tuple[str, str], numbers: Mapping[str, float], measures: Sequence[str]) -> None:
    """Count numbers per column into the measures of a day and model; nothing where all are 0."""
    if any(numbers.values()):
        measured = sums.setdefault(pair, dict.fromkeys(measures, 0))
        for measure in measures:
            measured[measure] = round(measured[measure] + sum(numbers.get(f, 0) for f in MEASURES[measure]), 9)


class Export:
    """A provider's usage or cost export, summed: a CSV of Anthropic's Console or OpenAI's dashboard.

    It covers the days from `first` to `last`; `measures` are those of MEASURES that it has. Raises CommandError.
    """

    def __init__(self, path: Path) -> None:
        self.sums: Sums = {}
        days = set[str]()
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
                self._columns = export_columns(path, reader.fieldnames)
                self.measures = [m for m, fields in MEASURES.items() if any(f in self._columns for f in fields)]
                for row in reader:
                    try:
                        days.add(self._add(row))
                    except (ValueError, OverflowError, OSError) as error:
                        raise CommandError(f"{path}:{reader.line_num}: {error}") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        days.discard("")
        if not days:
            raise CommandError(f"{path} has no row with a date")
        self.first, self.last = min(days), max(days)
        self._names = {plain_model(model): model for _, model in sorted(self.sums)}

    def _add(self, row: Mapping[str, str | None]) -> str:
        """Count a row in; its day, "" for rows of totals. Raises ValueError."""
        cells = {ours: (row.get(theirs) or "").strip() for ours, theirs in self._columns.items()}
        if not cells["day"] or "total" in cells["day"].lower():
            return ""
        day = export_day(cells.pop("day"))
        model = cells.pop("model") or "(no model)"
        numbers = {ours: export_number(self._columns[ours], cell) for ours, cell in cells.items()}
        if self._columns.get("input_tokens") == "input_tokens":  # OpenAI's, which include what came from the cache
            numbers["input_tokens"] -= numbers.get("cache_read_tokens", 0)
        add_sums(self.sums, (day, model), numbers, self.measures)
        return day

    def name_of(self, model: str) -> str:
        """The export's name for a model of ours; our own where it has none."""
        exact = any(model == name for _, name in self.sums)
        return model if exact else self._names.get(plain_model(model), model)


def ledger_sums(entries: Iterable[Entry | Discarded], export: Export) -> Sums:
    """What the ledger has of the export's measures, under the export's names of models."""
    sums: Sums = {}
    fields = [field for measure in export.measures for field in MEASURES[measure]]
    for entry in entries:
        if entry.path.endswith("/count_tokens"):  # they are free, and in no export
            continue
        day, numbers = entry.time[:10], {field: getattr(entry, field) for field in fields}
        for charge in entry.charges:  # what another model did stands under that one's name there
            if charge.model:
                theirs = {field: charge.usd if field == "cost_usd" else getattr(charge, field) for field in fields}
                numbers = {field: numbers[field] - theirs[field] for field in fields}
                add_sums(sums, (day, export.name_of(charge.model)), theirs, export.measures)
        add_sums(sums, (day, export.name_of(entry.model_served or entry.model)), numbers, export.measures)
    return sums


def differing(ours: Sums, theirs: Sums) -> list[Pair]:
    """The days and models on which the two differ: by a token, or by half a cent."""
    pairs = []
    for day, model in sorted(ours.keys() | theirs.keys()):
        mine, yours = ours.get((day, model)), theirs.get((day, model))
        difference = {m: round((mine or {}).get(m, 0) - (yours or {}).get(m, 0), 9) for m in mine or yours or {}}
        difference = {m: d for m, d in difference.items() if abs(d) >= (0.005 if m == "USD" else 0.5)}
        if difference:
            pairs.append(Pair(day, model, mine, yours, difference))
    return pairs


class Comparison(msgspec.Struct):
    """The ledger beside an export: how many pairs of UTC day and model agree, and those that do not."""

    first_day: str
    last_day: str
    agree: int
    differ: int
    only_ours: int
    only_theirs: int
    pairs: list[Pair]


def reconcile(files: LedgerFiles, export: Export, upstream: str) -> Comparison:
    """Compare what the ledger has of an upstream ("": of all) on the days of an export."""
    entries = files.billed(export.first, export.last + "T9")  # the last day's times all begin with T0, T1 or T2
    ours = ledger_sums((entry for entry in entries if upstream in ("", entry.upstream)), export)
    pairs = differing(ours, export.sums)
    only_ours = sum(pair.theirs is None for pair in pairs)
    only_theirs = sum(pair.ours is None for pair in pairs)
    agree, differ = len(ours.keys() | export.sums.keys()) - len(pairs), len(pairs) - only_ours - only_theirs
    return Comparison(export.first, export.last, agree, differ, only_ours, only_theirs, pairs)


# --- 28. Backup: copied at one moment, checked, put back --------------------------
# Offers: DAMAGED, restore, write_backup


class Manifest(msgspec.Struct):
    """What a backup says of itself before all else."""

    FILE: ClassVar = "manifest.json"
    SUMS: ClassVar = "SHA256SUMS"  # comes last, so that nothing is read twice; for `sha256sum -c` as well
    FORMAT: ClassVar = 1
    MOST: ClassVar = 16 << 20  # bytes of a file that is not the ledger's
    NAMES: ClassVar = re.compile(
        r"manifest\.json|config\.yaml|gateway\.secret|SHA256SUMS"
        r"|usage/usage-[0-9]{4}-[0-9]{2}\.(jsonl|jsonl\.gz|torn)"
    )

    format: int
    version: str
    time: str
    chain: str  # of the last line; "" where it is not known


def write_backup(out: IO[bytes], files: Mapping[str, bytes], directory: Path) -> tuple[Manifest, list[Held]]:
    """Write these files and a ledger as it is now as a gzipped tar; the manifest, and what is in it. Raises OSError."""

    def add(member: Held) -> bytes:
        info = tarfile.TarInfo(member.name)
        info.size, info.mode, info.mtime = member.size, 0o600, int(time.time())
        tar.addfile(info, cast(IO[bytes], member))
        return f"{member.digest.hexdigest()}  {member.name}\n".encode()  # as sha256sum has it (GNU coreutils)

    gnu = tarfile.GNU_FORMAT  # has files over 8 GB
    with contextlib.ExitStack() as opened, tarfile.open(fileobj=out, mode="w|gz", format=gnu) as tar:
        ledger = hold_ledger(directory, opened)
        chain = next((held.last_chain() for held in reversed(ledger) if ".jsonl" in held.name), b"").decode()
        manifest = Manifest(Manifest.FORMAT, VERSION, utc_time(time.time()), chain)
        small = {Manifest.FILE: msgspec.json.format(msgspec.json.encode(manifest)) + b"\n", **files}
        members = [Held(name, io.BytesIO(data), len(data)) for name, data in small.items()] + ledger
        sums = b"".join(map(add, members))
        add(Held(Manifest.SUMS, io.BytesIO(sums), len(sums)))
    return manifest, members


DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, *UNREADABLE)  # what reading a bad backup raises


def unpack(file: IO[bytes], folder: Path) -> Manifest:
    """Unpack a backup into an empty folder, without folders in it. Raises CommandError, OSError, and DAMAGED.

    Only plain files with names that are known are taken, and each must have the digest that the last one has for it.
    """
    sums = {}
    with tarfile.open(fileobj=file, mode="r|gz") as tar:
        for info in tar:
            is_plain = info.type == tarfile.REGTYPE and not info.issparse()
            is_small = info.name.startswith("usage/") or info.size <= Manifest.MOST
            if not (is_plain and is_small and Manifest.NAMES.fullmatch(info.name)):
                raise CommandError(f"{info.name!a} does not belong into a backup; nothing was restored")
            with open(folder / Path(info.name).name, "xb+", opener=open_shared) as to:
                shutil.copyfileobj(cast(IO[bytes], tar.extractfile(info)), to, 1 << 20)
                to.flush()
                os.fsync(to.fileno())
                to.seek(0)
                sums[info.name] = f"{hashlib.file_digest(to, 'sha256').hexdigest()}  {info.name}\n"
    lines = "".join(line for name, line in sums.items() if name != Manifest.SUMS)
    is_whole = sums.keys() >= {Manifest.FILE, "config.yaml", Manifest.SUMS}
    if not is_whole or (folder / Manifest.SUMS).read_bytes() != lines.encode():
        raise CommandError("this is no whole backup, as its SHA256SUMS says; nothing was restored")
    manifest = msgspec.json.decode((folder / Manifest.FILE).read_bytes(), type=Manifest)
    if manifest.format != Manifest.FORMAT:
        raise CommandError(f"its format is {manifest.format}, this gateway ({VERSION}) knows 1; nothing was restored")
    return manifest


def config_in(folder: Path, path: Path) -> Config:
    """The config that was unpacked into a folder, as a gateway will read it at its place. Raises CommandError."""
    secret, environ, hint = folder / Vault.FILE, dict(os.environ), ""
    if not secret.exists():
        hint = " (the sealing secret is not in the backup: it must be here before)"
    elif Vault.file(path.parent):  # else GATEWAY_SECRET is what a start will take
        environ["GATEWAY_SECRET"] = secret.read_bytes().decode("latin-1")
    try:
        return Config.parse(read_text(folder / "config.yaml"), path, Clock(), environ)
    except ConfigError as error:
        raise CommandError(f"the backup's config does not work here, nothing was restored: {error}{hint}") from None


def ledger_in(folder: Path) -> list[Path]:
    """The files of a ledger's folder that a restore replaces."""
    return [*sorted(folder.glob("usage-????-??.*")), *folder.glob(f"{Index.FILE}*")]


def swap(old: Sequence[Path], new: dict[Path, Path], kept: str) -> None:
    """Rename what is there into a folder beside it, then move files to their places; undo all where one fails.

    `new` maps places to files. The first of both goes first and comes last. Raises OSError.
    """
    with contextlib.ExitStack() as undo:
        for folder in {place.parent / kept for place in old}:
            folder.mkdir(0o700)
            undo.callback(folder.rmdir)
        for place in old:
            aside = place.parent / kept / place.name
            place.rename(aside)
            undo.callback(aside.rename, place)
            sync_folder(place.parent)
        for place in reversed(new):
            place.touch(0o600, exist_ok=False)  # replaces nothing, and shows nobody a secret that is copied
            undo.callback(place.unlink)
            shutil.move(new[place], place)  # which may lie on another disk
            sync_folder(place.parent)
        undo.pop_all()


def present_ledger(path: Path) -> Path | None:
    """The ledger's folder by the config that is there, on which a gateway may run; None where no config says so."""
    try:
        directory = ledger_of(Document(read_text(path), path))
    except ConfigError:
        return None
    return directory if directory.is_dir() else None


def restore(file: IO[bytes], path: Path, is_forced: bool) -> list[str]:
    """Put a backup in place; what to tell. Raises CommandError, OSError, and DAMAGED, and has changed nothing then.

    All of it is unpacked beside the config and checked there. What was there is kept in `before-restore-TIME/` beside
    it. config.yaml goes first and comes last: a gateway that starts in between has no key that works, so that no
    limit is held against half a ledger.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix=".restore-", dir=path.parent)))
        manifest = unpack(file, folder)
        directory = config_in(folder, path).usage_directory
        new = {Path(os.path.realpath(path)): folder / "config.yaml"}
        secret, place = folder / Vault.FILE, Vault.file(path.parent)
        if secret.exists() and place and not (place.exists() and place.read_bytes() == secret.read_bytes()):
            secret.chmod(0o600)
            new[Path(os.path.realpath(place))] = secret
        folders = {os.path.realpath(each) for each in (directory, present_ledger(path)) if each}
        for each in folders:
            opened.callback(os.close, hold_folder(Path(each)))
        old = [place for place in new if place.exists()] + ledger_in(directory)
        kept = f"before-restore-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        if old and not is_forced:
            raise CommandError(f"{old[0]} is there already; --force keeps it in {kept}/; nothing was restored")
        new |= {directory / written.name: written for written in ledger_in(folder)}
        try:
            LedgerFiles(folder).verify(manifest.chain, lambda line: print(line, file=sys.stderr))
        except (BrokenChain, *DAMAGED) as error:
            print(f"warning: the ledger's chain was broken before the backup: {error}", file=sys.stderr)
        swap(old, new, kept)
    told = [f"Restored the backup of {manifest.time} to {path} and {directory}."]
    folders_kept = [f"{folder}/{kept}" for folder in sorted({place.parent for place in old})]
    if folders_kept:
        told.append(f"What was there before is kept in {' and '.join(folders_kept)}.")
    return [*told, f"Start the gateway with: {PROGRAM} serve"]


# --- 29. Integrity: installed files against their lists ---------------------------
# Offers: check_in_background, check_integrity, INTEGRITY_LIST

# In March 2026 a release of LiteLLM on PyPI, made with a stolen token, brought a `.pth` file. Python runs such at every
# start, before any import; it sent away all credentials that it found. The wheel's RECORD had it. What is installed is
# compared with one of two lists:
#
#   gateway.sha256  beside gateway.py, in sha256sum's format: the image's own list, of every file that Python may import
#                   in it, made when it was built. It is root's, and the gateway does not run as root.
#   RECORD          of each package, where there is no such list. Whoever can change a package can change its RECORD,
#                   and bytecode has no hash there. So what runs at every start of Python is named although a RECORD
#                   lists it.
#
# Neither proves that a release was good when it came: the hashes of requirements.txt only make it the pinned one.
# And what has taken over this very process can let it say anything.
INTEGRITY_LIST = Path(__file__).resolve().with_name("gateway.sha256")
SETUPTOOLS_PTH = "2638ce9e2500e572a5e0de7faed6661eb569d1b696fcba07b0dd223da5f5d224"  # distutils-precedence.pth


class Integrity(NamedTuple):
    """How the installed files compare with their list."""

    source: str  # which list
    files: int  # that it has
    problems: list[str]


def foreign_files(listed: Mapping[str, str], folders: Iterable[str], ignored: str) -> set[str]:
    """The paths of files and links in these folders that are not listed; of a folder with no listed file only its own.

    Folders that are named as `ignored` says are not looked at, nor are those that a link leads to.
    """
    known, foreign = set(folders), set[str]()
    for path in listed:
        while (path := os.path.dirname(path)) not in known:
            known.add(path)
    for folder in folders:
        for place, names, files in os.walk(folder):
            names[:] = [name for name in names if name != ignored]
            links = [name for name in names if os.path.islink(f"{place}/{name}")]
            for path in (f"{place}/{name}" for name in (*files, *links)):
                if path not in listed:
                    while (above := os.path.dirname(path)) not in known:
                        path = above
                    foreign.add(path)
    return foreign


def compare_files(listed: Mapping[str, str], folders: Iterable[str], ignored: str = "") -> Iterator[str]:
    """Compare files with their sha256 by path, and with what the folders hold; a sentence for each difference."""
    for path, digest in sorted(listed.items()):
        try:
            if not os.path.isfile(path):
                yield f"{path} was changed" if os.path.lexists(path) else f"{path} is missing"
            elif digest:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        yield f"{path} was changed"
        except OSError as error:
            yield f"{path} cannot be read: {why_not(error)}"
    for path in sorted(foreign_files(listed, folders, ignored)):
        yield f"{path} is in no list"


def start_code(folder: str) -> Iterator[str]:
    """A sentence for each file of a folder of packages that Python runs code of at every start."""
    for path in sorted(Path(folder).glob("*")):
        content = path.read_bytes() if path.suffix == ".pth" and path.is_file() else b""
        lines = content.decode("utf-8-sig", "replace").splitlines()
        is_run = any(line.startswith(("import ", "import\t")) for line in lines)  # as in site.addpackage
        is_run = is_run or path.name.partition(".")[0] in ("sitecustomize", "usercustomize")
        if is_run and hashlib.sha256(content).hexdigest() != SETUPTOOLS_PTH:
            yield f"{path} runs code at every start of Python"


def recorded_files(package: importlib.metadata.Distribution) -> Iterator[tuple[str, str]]:
    """Path and sha256 of each file in a package's RECORD, without bytecode. Raises ValueError."""
    for path, digest, _ in csv.reader((package.read_text("RECORD") or "").splitlines()):
        algorithm, _, value = digest.partition("=")
        if "__pycache__/" not in path:
            sha256 = base64.urlsafe_b64decode(value + "=").hex() if algorithm == "sha256" else ""
            yield os.path.normpath(str(package.locate_file(path))), sha256


def check_packages(folders: Sequence[str]) -> Integrity:
    """Compare packages with their RECORD, and name what runs at Python's start."""
    import importlib.metadata  # here: it takes 10 ms, and only this needs it

    listed: dict[str, str] = {}
    for package in importlib.metadata.distributions(path=list(folders)):
        with contextlib.suppress(ValueError, csv.Error):  # else all of its files are in no list
            listed |= dict(recorded_files(package))
    problems = [*compare_files(listed, folders, ignored="__pycache__"), *itertools.chain(*map(start_code, folders))]
    return Integrity("the RECORD of each package", len(listed), problems)


def check_integrity(path: Sequence[str], file: Path) -> Integrity:
    """Compare the folders of `path`, which is sys.path, with the image's list, else packages with their RECORDs."""
    folders = list(dict.fromkeys(map(os.path.realpath, path)))
    if not file.exists():
        packages = [each for each in folders if Path(each).name in ("site-packages", "dist-packages")]
        return check_packages(packages)
    try:
        lines = [line.partition("  ") for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        return Integrity(str(file), 0, [f"{file} cannot be read: {error}"])
    listed = {name: digest for digest, _, name in lines}
    return Integrity(str(file), len(listed), list(compare_files({**listed, str(file): ""}, folders)))


def check_in_background(metrics: Metrics, path: Sequence[str], file: Path) -> None:
    """Where there is an image's list, compare with it in a thread that nobody waits for; log and count what differs."""

    def run() -> None:
        found = check_integrity(path, file)
        metrics.integrity_problems = len(found.problems)
        if found.problems:
            named = "; ".join(printable(problem, 300) for problem in found.problems[:5])
            log.error("integrity: differences from %s: %d, such as %s", file, len(found.problems), named)
        else:
            log.info("integrity: %d files are as in %s", found.files, file)

    if file.exists():
        threading.Thread(target=run, name="integrity", daemon=True).start()


# === Floor E. Doors: how the outside gets in ========================================

# --- 30. Front door: clients' connections, no policy ------------------------------
# Offers: Bridge, ClientConnection, Door

# A client's connection reads one request after the other and sends one answer to each. A request is a call, whose
# answer the relay writes (`ClientSink`), or one for a page of the gateway's own, answered by a handler in Tornado
# (`Bridge`). Of Tornado's server nothing is used: it costs 100 µs a request and 20 KB a connection, its parser would be
# a second opinion on what a client has sent, and its connection a second place that frames answers and times them.
#
#     state        the connection                 moves to     when
#     IDLE         waits for a request            HEAD         a request begins (`on_message_begin`)
#     HEAD         reads a head                   BODY         it is whole and good (`on_headers_complete`)
#     BODY         reads a body                   CALL         a call is whole (`on_message_complete`)
#                                                 PAGE         another request is whole, or its body is not wanted
#     CALL         waits for a call's end         IDLE         the answer is out, and another request may follow
#     PAGE         waits for a page               IDLE         the same
#     each of them                                LEAVING      a refusal, or the last answer, is out (`_leave`)
#     LEAVING      throws away what still comes   GONE         (below)
#     each of them                                GONE         the connection is lost (`connection_lost`)
#
# LEAVING is there because closing while a client still sends resets the connection, and a reset throws away what the
# client has not read yet (RFC 9112, 9.6). Example: a call with 100 KB of body has a wrong key. At the end of its head
# `Door.accept` raises KeyRefused, the answer with 401 goes out, and our side of the connection is shut down. The client
# sends its 100 KB to the end, which nobody parses, reads the 401, and closes. If it sends for 10 s, it is cut off.
#
# No client of ours sends a request before it has the answer to the one before. What comes behind a request is not
# answered, and the connection closes after the answer: so no body is ever taken for a request.


class State(enum.Enum):
    """What a client's connection is doing; the table above has the moves."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    CALL = enum.auto()
    PAGE = enum.auto()
    LEAVING = enum.auto()
    GONE = enum.auto()


IDLE, HEAD, BODY, CALL, PAGE, LEAVING, GONE = State  # as with the phases of an attempt
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Request(msgspec.Struct):
    """What has been read of a request."""

    MAX_HEAD: ClassVar = 64 << 10  # bytes of a head
    MAX_HEADERS: ClassVar = 100  # Claude Code sends 25; 16,000 of four bytes took 2 MB before any key was looked at
    MAX_TARGET: ClassVar = 2 << 10  # bytes that are looked at for the format of a refusal

    method: bytes = b""
    target: bytes = b""
    path: str = ""  # of a target that is whole, as `normalize_target` writes it
    query: bytes = b""
    version: str = "1.1"
    headers: Headers = []
    named: dict[bytes, bytes] = {}  # their first values, once the head is whole
    body: bytes = b""  # a bytearray if it came in several pieces, which nobody who reads it minds
    body_size: int = 0  # also of a body that is thrown away
    is_whole: bool = False

    @property
    def api(self) -> Api:
        """The format of an error in answer to it; the head may not be whole."""
        return api_of(self.path or normalize_target(self.target[: self.MAX_TARGET])[0])

    @property
    def head_size(self) -> int:
        """The bytes of a head, where each field is written in the shortest way."""
        line = len(self.method) + len(self.target) + len(b"  HTTP/1.1\r\n")
        return line + sum(len(name) + len(value) + len(b":\r\n") for name, value in self.headers)

    def head_without_upgrade(self) -> bytes:
        """The head as it may be read again: without what asks for another protocol."""
        dropped = (b"upgrade", b"http2-settings")
        lines = [b"%b %b HTTP/%b" % (self.method, self.target, self.version.encode())]
        lines += [b"%b:%b" % field for field in self.headers if field[0].lower() not in dropped]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def add_to_body(self, piece: bytes) -> None:
        """Keep a piece of the body. The first stays what it is, and is mostly all; more of them grow one buffer."""
        if not self.body:
            self.body = piece
            return
        if not isinstance(self.body, bytearray):
            self.body = cast(bytes, bytearray(self.body))
        self.body += piece

    def check_http(self) -> None:
        """Raise what is wrong with the version or the host (RFC 9110, 2.5 and 7.2)."""
        if self.version not in ("1.1", "1.0"):
            raise VersionRefused("This gateway speaks HTTP/1.1 and HTTP/1.0.")
        host = self.named.get(b"host")
        is_wrong = host is None and self.version == "1.1"
        if host is not None:
            is_wrong = not HOST.fullmatch(host.strip(b" \t"))
        if len(self.named) < len(self.headers):  # a name stands more than once
            is_wrong = is_wrong or sum(name.lower() == b"host" for name, _ in self.headers) > 1
        if is_wrong:
            raise BadRequest("Host: expected one, with a name or an address, and perhaps a port.")


def too_large(limit: int) -> TooLarge:
    """The error for a body over the limit, in bytes."""
    return TooLarge(f"The request body is larger than {limit} bytes, this gateway's server.max_body.")


def head_too_large() -> HeadTooLarge:
    """The error for a head over the limits of one."""
    return HeadTooLarge(f"The request's head has more than {Request.MAX_HEAD} bytes, or {Request.MAX_HEADERS} headers.")


class Hangups:
    """Finds out which clients are gone of those that have stopped sending.

    A client that has ended its sending side still reads its answer; one that has closed looks just the same, until
    something is sent to it: then its host resets the connection. So something is sent, and the reset is waited for.
    The event loop does not tell of it: it has nothing to read or to write there. An epoll of which no events are wanted
    tells of resets alone, and is itself a file that the event loop can watch. Where there is none (macOS), whoever
    stops sending counts as gone.
    """

    def __init__(self) -> None:
        self._poll: select.epoll | None = None
        self._watched: dict[int, asyncio.Transport] = {}  # by descriptor
        self._descriptors: dict[asyncio.Transport, int] = {}

    def watch(self, transport: asyncio.Transport) -> bool:
        """Abort a client's transport when the client is gone; False where that cannot be found out."""
        if not hasattr(select, "epoll") or not transport.can_write_eof():  # TLS has no half that is open
            return False
        if self._poll is None:
            self._poll = select.epoll()
            asyncio.get_running_loop().add_reader(self._poll.fileno(), self._look)
        fd = transport.get_extra_info("socket").fileno()
        self._poll.register(fd, 0)
        self._watched[fd] = transport
        self._descriptors[transport] = fd
        return True

    def forget(self, transport: asyncio.Transport) -> None:
        """Watch a transport no more, which is about to be closed or was never watched."""
        fd = self._descriptors.pop(transport, None)
        if fd is not None:
            del self._watched[fd]  # the kernel takes a closed one out of the epoll

    def _look(self) -> None:
        assert self._poll is not None
        for fd, _ in self._poll.poll(0):
            self._poll.unregister(fd)
            transport = self._watched.get(fd)
            if transport:
                transport.abort()

    def close(self) -> None:
        """Watch no more."""
        if self._poll is not None:
            asyncio.get_running_loop().remove_reader(self._poll.fileno())
            self._poll.close()
            self._poll = None


class Bridge(tornado.httputil.HTTPConnection):
    """What a handler in Tornado takes for its connection: its answer goes out through the client's own."""

    def __init__(self, door: Door, client: ClientConnection) -> None:
        self.door = door
        self.client = client
        self.request = client.request

    def start(self) -> None:
        """Have the request answered; where a bug prevents that, the connection is closed."""
        if not self.door.gateway.guard.run(self._handle):
            self.client.transport.abort()

    def _handle(self) -> None:
        # Nothing but method and query is Tornado's to read: a header might say something about the body, which is gone.
        client, request = self.client, self.request
        if client.state is not PAGE:
            return
        if client.transport.get_write_buffer_size():  # the client does not read its last answer
            return client.close()
        target = "/?" + request.query.decode("latin-1")
        line = tornado.httputil.RequestStartLine(request.method.decode(), target, "HTTP/1.1")
        headers = tornado.httputil.HTTPHeaders({"Host": ""})
        try:
            self.door.application(tornado.httputil.HTTPServerRequest(start_line=line, headers=headers, connection=self))
        except tornado.httputil.HTTPInputError:
            client.reject(BadRequest("The query cannot be read: expected at most 1,000 fields, in UTF-8."))
        return None

    # What Tornado asks of a connection

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        """Do nothing: handlers ask the client's connection whether it is there."""

    def write_headers(
        self,
        start_line: tornado.httputil.RequestStartLine | tornado.httputil.ResponseStartLine,
        headers: tornado.httputil.HTTPHeaders,
        chunk: bytes | None = None,
    ) -> asyncio.Future[None]:
        """Send an answer, which is whole: no page comes in parts. That to a HEAD has a length without a body."""
        status = cast(tornado.httputil.ResponseStartLine, start_line).code
        body = chunk or b""
        length = int(headers.get("Content-Length", len(body)))
        fields = [pair for pair in headers.get_all() if pair[0] not in ("Content-Length", "Date")]
        self.client.sink.respond(status, fields, body, length)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def finish(self) -> None:
        """The answer is out."""


class ClientSink:
    """Writes answers to a client's connection, in its own framing; it is what the relay knows of the client.

    The answer to a call comes in pieces (`head`, `write`, `cut`), one of our own as a whole (`refuse`, `respond`).
    """

    def __init__(self, door: Door, connection: ClientConnection) -> None:
        self._door = door
        self._connection = connection
        self.exchange: Exchange | None = None
        self.is_gone = False
        self.is_slow = False  # the transport says so once, perhaps at the end of the answer before
        self._pending = b""  # the head of an answer, until the first bytes of its body
        self._is_chunked = False

    @property
    def has_pending_head(self) -> bool:
        """Whether an answer's head still waits for the first bytes of its body."""
        return bool(self._pending)

    def head(self, status: int, headers: Headers, streaming: bool) -> None:
        """Begin an answer. Its head leaves together with the first bytes of its body."""
        connection, named = self._connection, first_values(headers)
        lines = [b"%b: %b" % header for header in downstream_headers(headers, named)]
        length = named.get(b"content-length")
        if streaming:  # in chunks: a length leaves no room for pings, and a cut at its end would not show
            length = None
            lines.append(b"x-accel-buffering: no")
        has_body = status not in (204, 304)
        self._is_chunked = length is None and has_body and connection.request.version == "1.1"
        if self._is_chunked:
            lines.append(b"transfer-encoding: chunked")
        elif length is not None and has_body:
            lines.append(b"content-length: " + length)
        elif has_body:
            connection.keeps_alive = False  # HTTP/1.0: the end of the connection is the end of the body
        self._pending = self._head(status, lines, b"date" in named)

    def write(self, data: bytes, last: bool) -> None:
        """Send bytes of the answer."""
        if self._is_chunked:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if last:
                data += b"0\r\n\r\n"
        if self._pending:
            data = self._pending + data
            self._pending = b""
        if data:
            self._connection.transport.write(data)
        if last:
            self._connection.end_answer()
        elif self.is_slow and self.exchange:
            self.exchange.client_slow()

    def cut(self) -> None:
        """End the answer so that it looks cut: never with a proper end."""
        self.exchange = None
        if self._is_chunked or self.is_gone:
            return self._connection.close()
        # Without chunks a plain end could pass for the answer's own: reset the connection.
        sock = self._connection.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.transport.abort()

    def refuse(self, error: GatewayError, api: Api, request_id: str) -> None:
        """Answer with an error of our own."""
        body = error_body(error, api, request_id)
        self.respond(error.status, error_headers(error, request_id), body, len(body))

    def respond(self, status: int, headers: Iterable[tuple[str, str]], body: bytes, length: int) -> None:
        """Send a whole answer of our own; `length` is the body's, also where the answer is to a HEAD."""
        connection = self._connection
        if connection.state in (LEAVING, GONE):
            return
        lines = [f"{name}: {value}".encode("latin-1", "replace") for name, value in headers]
        lines.append(b"content-length: %d" % length)
        data = self._head(status, lines)
        if connection.request.method != b"HEAD":
            data += body
        connection.transport.write(data)
        connection.end_answer()

    def _head(self, status: int, lines: list[bytes], has_date: bool = False) -> bytes:
        """The head of an answer with these lines; it says whether the connection closes behind the answer."""
        door, connection = self._door, self._connection
        lines.insert(0, status_line(status))
        if not has_date:
            lines.append(b"date: " + http_date(int(door.gateway.clock.wall())))
        if door.gateway.stopping or door.has_too_many(connection.key_name):
            connection.keeps_alive = False
        if not connection.keeps_alive:
            lines.append(b"connection: close")
        return b"\r\n".join(lines) + b"\r\n\r\n"

    # What the connection says of the client

    def client_slow(self) -> None:
        self.is_slow = True
        if self.exchange:
            self.exchange.client_slow()

    def client_ready(self) -> None:
        self.is_slow = False
        if self.exchange:
            self.exchange.client_ready()

    def client_gone(self) -> None:
        self.is_gone = True
        if self.exchange:
            self.exchange.client_gone()


class ClientConnection(asyncio.Protocol):
    """One client's connection with HTTP/1: reads requests, and has each answered."""

    MAX_PAGE_BODY = 1 << 20  # of a request that is no call
    MOST_HELD = 80 << 10  # bytes of memory before any key was looked at, as was measured

    def __init__(self, door: Door) -> None:
        self._door = door
        self._parser = httptools.HttpRequestParser(self)
        self.state = IDLE
        self.request = Request()
        self._call: Call | None = None  # whose body is being read
        self._owes_continue = False  # the client sends no body until it is asked for it
        self._is_ahead = False  # something came behind a request: it is thrown away
        self._received = 0  # bytes of a head; or since a head, its own read left out
        self.sink = ClientSink(door, self)
        self._asked_at: float | None = None  # when a client that sends no more was last asked whether it is there
        self._active_at = self._entered_at = door.now()  # when it last sent something, and when the state began
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.peer = ""  # its address
        self.key_name = ""  # of the first good key that it has shown
        self.keeps_alive = True  # it is not closed after the present answer

    # What asyncio says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.peer = (transport.get_extra_info("peername") or ("",))[0]
        if not self._door.enter(self):
            self.state = GONE
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._active_at = self._door.now()
        if self.state is LEAVING or self._is_ahead:
            return  # thrown away unparsed: the parser joins a header's value until it ends, however long it is
        if self.state is IDLE:
            self._received = 0
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            if self.state is HEAD:
                return self._ignore_upgrade(data[stop.args[0] :])
            self._is_ahead = True  # CONNECT: the parser reads no further here
            self.keeps_alive = False
        except httptools.HttpParserError as error:
            if isinstance(error, httptools.HttpParserCallbackError):
                log.error("a bug in reading a request", exc_info=error.__context__ or error)
            self.keeps_alive = False
            if self.state in (IDLE, HEAD, BODY):
                self.reject(BadRequest(f"This request cannot be read: {error}"))
        if self.state is HEAD:
            if self._received > Request.MAX_HEAD or len(self.request.headers) > Request.MAX_HEADERS:
                self.reject(head_too_large())
        elif self.state is BODY and self._received > Request.MAX_HEAD + self.request.body_size * 9 // 8:
            # Each chunk costs a call: 8 connections with bodies in chunks of 7 bytes kept others waiting for 9 s.
            self.reject(BadRequest("Most of the body is framing: small chunks, extensions of them, or trailers."))

    def eof_received(self) -> bool:
        """The client sends no more. While it may still want its answer, the connection stays open (see `Hangups`)."""
        if self.state not in (CALL, PAGE) or self.request.version != "1.1":
            return False
        if not self._door.hangups.watch(self.transport):
            return False
        self.keeps_alive = False
        self._ask()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.state = GONE
        self._door.leave(self)
        self._door.hangups.forget(self.transport)
        self._drop_call()
        self.sink.client_gone()

    def pause_writing(self) -> None:
        self.sink.client_slow()

    def resume_writing(self) -> None:
        self.sink.client_ready()

    # What the parser says

    def on_message_begin(self) -> None:
        if self.state is IDLE and not self._is_ahead:
            self.state = HEAD
            self._entered_at = self._active_at
            self.request = Request()
        else:
            self._is_ahead = True
            self.keeps_alive = False

    def on_url(self, url: bytes) -> None:
        if self.state is HEAD:
            self.request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.state is HEAD:  # else a trailer
            self.request.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.state is not HEAD:
            return
        request = self.request
        request.method = self._parser.get_method()
        request.version = self._parser.get_http_version()
        request.named = first_values(request.headers)
        self.keeps_alive = True
        try:
            # With a body behind it in the same read, a good head may look too large.
            is_long = self._received > Request.MAX_HEAD and request.head_size > Request.MAX_HEAD
            if is_long or len(request.headers) > Request.MAX_HEADERS:
                raise head_too_large()
            if self._parser.should_upgrade() and request.method != b"CONNECT":
                return  # `_ignore_upgrade` follows
            request.check_http()
            request.path, request.query = normalize_target(request.target)
            self._received = 0
            self.state = BODY
            self._entered_at = self._active_at
            self._begin_request()
        except GatewayError as error:
            self.reject(error)

    def on_body(self, piece: bytes) -> None:
        if self.state is not BODY:
            return
        request, call = self.request, self._call
        request.body_size += len(piece)
        if self._owes_continue:  # it came unasked
            self._owes_continue = False
            self._entered_at = self._active_at
        try:
            if call is None:
                if request.body_size > self.MAX_PAGE_BODY:
                    raise too_large(self.MAX_PAGE_BODY)
                return
            if request.body_size > call.config.server.max_body:
                raise too_large(call.config.server.max_body)
            if b"content-length" not in request.named:  # else it was held at once
                call.reservation.hold_body(len(piece))
            request.add_to_body(piece)
        except GatewayError as error:
            self.reject(error)

    def on_message_complete(self) -> None:
        if self.state is LEAVING:
            self.transport.close()
        if self.state is not BODY:
            return
        self.request.is_whole = True
        if not self._parser.should_keep_alive():  # a trailer may say so
            self.keeps_alive = False
        call, self._call = self._call, None
        if call is None:
            return self._begin_page()
        self.state = CALL
        call.body = self.request.body
        self.request.headers, self.request.named, self.request.body = [], {}, b""  # the call has them
        self._door.gateway.start(call, self.sink)
        return None

    # A request's head

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read a request again without `Upgrade`, as any server may (RFC 9110, 7.8); `rest` came behind its head.

        The parser would take these for another protocol. Every stock HttpClient of the JDK asks for h2c, with bodies.
        """
        self._parser = httptools.HttpRequestParser(self)
        self.state = IDLE
        self.data_received(self.request.head_without_upgrade() + rest)

    def _begin_request(self) -> None:
        """Begin a call or a page by its head. Raises GatewayError."""
        request, route = self.request, None
        expects = request.version == "1.1" and request.named.get(b"expect", b"").lower() == b"100-continue"
        self._owes_continue = expects
        if request.method == b"POST":
            route = ROUTES.get(request.path)
        if route:
            self._call = call = self._door.accept(self, request, route)
            if call.reservation.waiter:
                # The body is read meanwhile: of a connection that is not read from is not known that its client leaves.
                call.reservation.waiter.done.add_done_callback(self._end_wait)
            elif expects:
                self._ask_for_body()
        elif int(request.named.get(b"content-length", 0)) > self.MAX_PAGE_BODY:
            raise too_large(self.MAX_PAGE_BODY)
        elif expects:  # no page wants a body, so none is asked for
            self.keeps_alive = False
            self._begin_page()

    def _ask(self) -> None:
        """Ask a client that sends no more whether it is there: if not, its host resets the connection."""
        now = self._asked_at = self._door.now()
        exchange = self.sink.exchange
        if exchange and exchange.status and not self.sink.has_pending_head:
            exchange.ping(now)  # between two events, else what comes next is the question
        else:
            self.transport.write(CONTINUE)  # Python's http.client takes 102 for the answer

    def _end_wait(self, done: asyncio.Future[bool | GatewayError]) -> None:
        """A call has its slot, or will have none, perhaps while its body is still on its way."""
        call = self._call
        if call and call.reservation.waiter and call.reservation.waiter.done is done:
            refusal = done.result()
            if isinstance(refusal, GatewayError):
                self.reject(refusal)
            else:
                self._ask_for_body()

    def _ask_for_body(self) -> None:
        """All that the head decides is decided: if the client has waited for that, its body's time begins now."""
        if self._owes_continue:
            self._owes_continue = False
            self._active_at = self._entered_at = self._door.now()
            self.transport.write(CONTINUE)

    def _drop_call(self) -> None:
        """Give back what a call holds whose body will not come."""
        call, self._call = self._call, None
        if call:
            call.reservation.release()

    # The answer

    def _begin_page(self) -> None:
        """Have a request that is no call answered once this read is parsed: by then is known what came behind it."""
        self.state = PAGE
        asyncio.get_running_loop().call_soon(Bridge(self._door, self).start)

    def reject(self, error: GatewayError) -> None:
        """Refuse without reading on: answer at once in the format of the path, then leave."""
        self._drop_call()
        request = self.request
        request.method = request.method or self._parser.get_method()
        request_id = self._door.announce_refusal(self, request, error)
        self.keeps_alive = False
        self.sink.refuse(error, request.api, request_id)

    def end_answer(self) -> None:
        """The answer is out: on to the next request, or close; or leave, if it came before the request was whole."""
        if not self.request.is_whole:
            self._leave()
            return self.transport.write_eof()
        self.state = IDLE
        self._entered_at = self._door.now()
        self.sink.exchange = None
        if not self.keeps_alive:
            self.close()
        return None

    def close(self) -> None:
        """End the connection once the last answer is out."""
        self._leave()
        self.transport.close()

    def _leave(self) -> None:
        """Keep nothing of a request: what still comes is thrown away."""
        self.state = LEAVING
        self._entered_at = self._active_at = self._door.now()
        self.request = Request()

    # What the clock says

    def check(self, now: float, pace: Pace) -> None:
        """Close what takes too long: a head, a body, a page, a pause between requests, a goodbye."""
        silence, age = now - self._active_at, now - self._entered_at
        has_unsent = self.transport.get_write_buffer_size() > 0
        is_stuck = False
        if self.state is LEAVING:
            is_stuck = age > pace.body_s
            if not has_unsent:
                is_stuck = age > pace.leave_s or silence > pace.linger_s
        elif self.state is PAGE and age > pace.page_s:
            is_stuck = True
        elif self._asked_at is not None and now - self._asked_at > pace.ask_s:
            self._ask()
        elif self.state is IDLE and age > pace.head_s:
            is_stuck = has_unsent and age > pace.page_s  # a page of logs that is not read
            if not self.key_name or age > pace.keep_alive_s or self._door.has_too_many(self.key_name):
                return self.close()
        elif self.state is HEAD and age > pace.head_s:
            self.reject(RequestTimeout("The request did not come in time."))
        elif self.state is BODY and not self._owes_continue:  # the wait for a slot has its own deadline
            if silence > pace.body_s or age > pace.body_s + self.request.body_size / pace.body_bytes_s:
                self.reject(RequestTimeout("The request's body came too slowly."))
            elif self._call and age > pace.slow_body_s:
                self._call.reservation.defer()
        if is_stuck:
            self.transport.abort()
        return None


Group = tuple[Literal["address", "key"], str]  # whose a connection is: an address's, or a key's by its name


class Door:
    """Where clients come in: listens, and serves each connection itself or through Tornado.

    A connection costs a descriptor and up to 64 KB, and anybody may open one. So there are at most `most` of them.
    Those that have shown no good key yet are the strangers. An address has only so many strangers. Where there is no
    room for a new connection, the oldest stranger, of its address or of all, is closed for it: honest clients show
    their key at once, and one colleague's broken script does not keep out whoever shares its address.
    One key has no more connections than no key has (see `BodyMemory`): half of all, or a third if another one has as
    many; so there is always room. While it has more than there are free places, its connections are closed with their
    next answer, or after `head_s` without a request. Where there are no strangers, one that is not being answered is
    given up, an idle one before any other: of the key that has most connections and has such a one.
    """

    GIVEN_UP = (IDLE, LEAVING, HEAD, BODY)  # in this order

    def __init__(self, gateway: Gateway, application: tornado.web.Application, most: int = 448) -> None:
        self.gateway, self.application, self.most = gateway, application, most
        self.now = gateway.clock.monotonic
        self.connections: dict[ClientConnection, Group] = {}
        # The oldest first: an OrderedDict finds it at once, a dict goes through all that were deleted before it.
        self._strangers: OrderedDict[ClientConnection, None] = OrderedDict()
        self._groups: dict[Group, OrderedDict[ClientConnection, None]] = {}
        self.hangups = Hangups()
        gateway.metrics.connections = lambda: len(self.connections)
        self._server: asyncio.Server | None = None

    def enter(self, connection: ClientConnection) -> bool:
        """Count a new connection in; False where there is no place for it."""
        group: Group = ("address", network_of(connection.peer))
        peers = self._groups.get(group, ())
        is_proxy = address_in(connection.peer, self.gateway.config.trusted)  # whose clients are many
        if len(peers) >= self.gateway.pace.strangers and not is_proxy:
            self._evict(next(iter(peers)), "address")
        if len(self.connections) >= self.most:
            if oldest := next(iter(self._strangers), None):
                self._evict(oldest, "oldest")
            elif surplus := self._surplus():
                self._evict(surplus, "key")
            else:
                self.gateway.emit(ConnectionRefused("full"))
                return False
        self._strangers[connection] = None
        self._join(connection, group)
        return True

    def _surplus(self) -> ClientConnection | None:
        """The connection to be given up where there are no strangers: of several the newest.

        290 connections of one key with unfinished bodies kept everybody else out, /health included, for a minute.
        """
        groups = sorted(self._groups.values(), key=len, reverse=True)
        connections = itertools.chain.from_iterable(map(reversed, groups))
        found = [connection for connection in connections if connection.state in self.GIVEN_UP]
        return min(found, key=lambda connection: self.GIVEN_UP.index(connection.state), default=None)

    def has_too_many(self, key_name: str) -> bool:
        """Whether a key has more connections than there are free places."""
        return len(self._groups.get(("key", key_name), ())) > self.most - len(self.connections)

    def _evict(self, connection: ClientConnection, why: str) -> None:
        """Close a connection to make room for another one."""
        self.gateway.emit(ConnectionRefused(why))
        self.leave(connection)
        connection.transport.abort()

    def accept(self, connection: ClientConnection, request: Request, route: Route) -> Call:
        """Begin a call by its head, before its body is read. Raises GatewayError."""
        gateway, named = self.gateway, request.named
        key, address = gateway.authenticate(request.headers, named, connection.peer)
        if not connection.key_name:
            self.recognize(connection, key)
            # 480 silent streams of two keys under `ulimit -n 1024` had closed the door to everybody, /health included.
            own = len(self._groups.get(("key", key.name), ()))
            if own > max(1, self.most - (len(self.connections) - len(self._strangers))):
                raise Unavailable(
                    f"The key {key} has {own:,} connections, more than are still free of the {self.most:,} that this "
                    "gateway can have (see `ulimit -n`): these are for everybody else.",
                    retry_after_s=5,
                )
        gateway.check_open()
        config = gateway.config
        if b"content-encoding" in named and named[b"content-encoding"].strip().lower() not in (b"", b"identity"):
            raise EncodingRefused("Compressed request bodies are not accepted: send it as it is.")
        length = int(named.get(b"content-length", 0))
        if length > config.server.max_body:
            raise too_large(config.server.max_body)
        call = Call(config, key, route, request.query, request.headers, address, named)
        gateway.enter(call, length)
        return call

    def announce_refusal(self, connection: ClientConnection, request: Request, error: GatewayError) -> str:
        """Announce that a request is refused before it is read; the id for its answer."""
        gateway, request_id, key = self.gateway, "req_" + secrets.token_hex(12), ""
        named = request.named or first_values(request.headers)  # where the head is not whole
        address = client_address(gateway.config.trusted, request.headers, named, connection.peer)
        with contextlib.suppress(GatewayError):
            key = gateway.config.keys.find(credentials(request.headers, named)).name
        gateway.emit(RequestRefused(request_id, address, key, error))
        return request_id

    def recognize(self, connection: ClientConnection, key: Key) -> None:
        """A connection has shown a good key: it is no stranger's any more."""
        if connection.key_name or connection not in self.connections:  # or it has just been given up
            return
        self.leave(connection)
        connection.key_name = key.name
        self._join(connection, ("key", key.name))

    def _join(self, connection: ClientConnection, group: Group) -> None:
        self.connections[connection] = group
        self._groups.setdefault(group, OrderedDict())[connection] = None

    def leave(self, connection: ClientConnection) -> None:
        """Count a connection out; once is enough."""
        group = self.connections.pop(connection, None)
        if group is None:
            return
        self._strangers.pop(connection, None)
        members = self._groups[group]
        del members[connection]
        if not members:
            del self._groups[group]

    async def listen(self, host: str, port: int) -> int:
        """Start to listen; the port that was bound. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientConnection(self), host, port, backlog=4096)
        return int(self._server.sockets[0].getsockname()[1])

    def check(self) -> None:
        """Look at every connection's deadline."""
        now = self.now()
        for connection in tuple(self.connections):
            if not self.gateway.guard.run(connection.check, now, self.gateway.pace):
                connection.transport.abort()

    def stop_listening(self) -> None:
        """Take no new connections; those that are open go on."""
        if self._server:
            self._server.close()

    async def close(self) -> None:
        """Close every connection; what was said already is still given the time of a goodbye to go out."""
        self.stop_listening()
        clients = set(self.connections)
        for connection in clients:
            connection.transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.gateway.pace.linger_s):
                while clients & self.connections.keys():  # noqa: ASYNC110 - once, at the end: not worth an event
                    await asyncio.sleep(0.01)
        self.hangups.close()


# --- 31. API: the gateway's own pages ---------------------------------------------
# Offers: tornado_application

# What is served, and to whom, is one table: ENDPOINTS. `PageRequest.prepare` finds the row of a request by its path and
# method, has `Gateway.identify` check that whoever asks has the row's role, calls the row's function, and sends what it
# returns: text as it is, anything else as JSON. Calls have rows, too, for their methods and roles; the front door hands
# them to the relay itself, because Tornado would cost them 100 µs. A new page is a row and a function.


class Endpoint(NamedTuple):
    """What is served under a method and a path. A GET answers HEAD, too; a `*` at a path's end stands for any name."""

    method: str
    path: str  # as `normalize_target` writes it
    role: Role
    answer: Callable[[PageRequest], Awaitable[object]] | None  # None: the relay's


async def say_nothing(request: PageRequest) -> object:
    """An empty object, for what clients send on their own: to warm up a connection, and telemetry."""
    return {}


async def show_health(request: PageRequest) -> object:
    """How the gateway is, with 503 while calls cannot be answered."""
    health = request.gateway.health()
    request.set_status(200 if health["ready"] else 503)
    return health


async def show_life(request: PageRequest) -> object:
    """That this process answers; what a restart does not help against is /health's matter."""
    return {"live": True}


async def show_metrics(request: PageRequest) -> object:
    """What Prometheus reads."""
    request.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
    return request.gateway.scrape()


def model_row(model: ListedModel) -> dict[str, Any]:
    """One model, with the fields of Anthropic's and of OpenAI's lists."""
    return {
        "type": "model",
        "object": "model",
        "id": model.id,
        "display_name": model.display_name or model.id,
        "created_at": model.created_at,
        "created": model.created,
        "owned_by": "gateway",
    }


async def list_models(request: PageRequest) -> object:
    """What the key may use, in a shape that both APIs' clients read."""
    models = await request.gateway.models.of(request.gateway.config, request.key)
    first, last = (models[0].id, models[-1].id) if models else (None, None)
    rows = [model_row(model) for model in models]
    return {"object": "list", "data": rows, "has_more": False, "first_id": first, "last_id": last}


async def show_model(request: PageRequest) -> object:
    """One of these models. Raises NotFound."""
    name = request.path.removeprefix("/v1/models/")
    for model in await request.gateway.models.of(request.gateway.config, request.key):
        if model.id == name:
            return model_row(model)
    raise NotFound(f"There is no model {name!r} for this key.")


async def show_usage(request: PageRequest) -> object:
    """How the limits of the key stand, and what it spent today and this month; a line of text with `format=line`."""
    if request.is_line:
        return await request.gateway.key_books.line(request.key) + "\n"
    if request.get_query_argument("format", "json") != "json":
        raise BadRequest("format: expected json or line")
    return await request.gateway.key_books.usage(request.key)


LOGS_FILTERS = ("model", "outcome", "session", "upstream", "path")
MAX_LOGS = 1000  # entries of a page


async def show_stats(request: PageRequest) -> object:
    """`?by=day,model&since=2026-11&until=…`: what the key spent, in groups."""
    by = list(dict.fromkeys(request.get_query_argument("by", "day").split(",")))
    if not set(by) <= {"hour", "day", "month", "model", "upstream", "outcome"}:
        raise BadRequest("by: expected some of hour, day, month, model, upstream, outcome, separated by commas")
    since, until = request.read_moment("since", -math.inf), request.read_moment("until", math.inf)
    async with request.gateway.key_books.take(request.key.name):
        if request.has_left:
            return None
        totals = await request.gateway.key_books.totals(request.key, by, since, until)
    return {"key": request.key.name, "by": by, "timezone": request.gateway.config.server.timezone, "data": totals}


async def show_logs(request: PageRequest) -> object:
    """`?limit=50&model=…`: the key's entries, newest first; `next` is the next page's `before`."""
    since, until = request.read_time("since", ""), request.read_time("until", "9")
    filters = {name: request.get_query_argument(name) for name in LOGS_FILTERS if request.get_query_argument(name, "")}

    def wanted(entry: Entry) -> bool:
        matching = all(getattr(entry, name) == value for name, value in filters.items())
        return matching and since <= entry.time < until

    limit, before = request.get_query_argument("limit", "50"), request.get_query_argument("before", "")
    if not re.fullmatch(r"\d{1,4}", limit) or not 1 <= int(limit) <= MAX_LOGS:
        raise BadRequest(f"limit: expected 1 to {MAX_LOGS}, got {limit[:20]!r}")
    found = re.fullmatch(r"(\d{4}-\d\d):(\d{1,15})", before or "9999-99:0", re.ASCII)
    if not found:
        raise BadRequest("before: expected what the page before this one gave as `next`")
    async with request.gateway.key_books.take(request.key.name):
        if request.has_left:
            return None
        entries = await request.gateway.key_books.page(request.key, (found[1], int(found[2])), wanted, int(limit))
    next_page = f"{entries.next[0]}:{entries.next[1]}" if entries.next else None
    unreadable = entries.unreadable.report()
    return {"key": request.key.name, "data": entries.entries, "next": next_page, "unreadable": unreadable}


ENDPOINTS = (
    *(Endpoint("POST", path, "key", None) for path in ROUTES),
    Endpoint("HEAD", "/", "anyone", say_nothing),
    Endpoint("GET", "/api/hello", "anyone", say_nothing),
    Endpoint("POST", "/api/event_logging/batch", "anyone", say_nothing),
    Endpoint("GET", "/health", "anyone", show_health),
    Endpoint("GET", "/livez", "anyone", show_life),
    Endpoint("GET", "/metrics", "scraper", show_metrics),
    Endpoint("GET", "/v1/models", "key", list_models),
    Endpoint("GET", "/v1/models/*", "key", show_model),
    Endpoint("GET", "/v1/usage", "key", show_usage),
    Endpoint("GET", "/api/usage", "key", show_usage),
    Endpoint("GET", "/api/usage/stats", "key", show_stats),
    Endpoint("GET", "/api/usage/logs", "key", show_logs),
)


def find_endpoints(path: str) -> dict[str, Endpoint]:
    """The endpoints of a path, by method."""
    found = {}
    for endpoint in ENDPOINTS:
        start, star, _ = endpoint.path.partition("*")
        if path == endpoint.path or (star and path.startswith(start)):
            found[endpoint.method] = endpoint
    if "GET" in found:
        found["HEAD"] = found["GET"]
    return found


class PageRequest(tornado.web.RequestHandler):
    """One request for an endpoint, as Tornado runs it."""

    def initialize(self, gateway: Gateway) -> None:
        self.gateway = gateway
        bridge = cast(Bridge, self.request.connection)  # the way to the client's connection
        self.door, self.client, self.asked = bridge.door, bridge.client, bridge.request
        self.path = self.asked.path
        self.endpoints = find_endpoints(self.path)

    async def prepare(self) -> None:
        """Answer the request, or raise GatewayError."""
        endpoint = self.endpoints.get(str(self.request.method))
        if endpoint is None or endpoint.answer is None:
            raise self._not_found()
        self.principal = self.gateway.identify(endpoint.role, self.asked.headers, self.asked.named, self.client.peer)
        if self.principal.key:
            self.door.recognize(self.client, self.principal.key)
        answer = await endpoint.answer(self)
        if not isinstance(answer, (str, bytes)):
            self.set_header("Content-Type", "application/json")
            answer = msgspec.json.encode(answer)
        self.finish(answer)

    def _not_found(self) -> GatewayError:
        """The error for a path, or a method of it, that is not served."""
        if self.path == "/":
            return NotFound("This is a gateway; see /health.")
        if self.endpoints:
            return MethodNotAllowed(f"{self.path} takes {' and '.join(self.endpoints)}.")
        return NotFound(f"Nothing is served at {self.path}.")

    @property
    def key(self) -> Key:
        """The key of whoever asks for an endpoint with the role `key`."""
        return cast(Key, self.principal.key)

    @property
    def has_left(self) -> bool:
        """Whether the client has gone before it had its answer."""
        return self.client.sink.is_gone

    @property
    def is_line(self) -> bool:
        """Whether a line of text is asked for, for Claude Code's status line; an error is then one, too."""
        return self.request.arguments.get("format") == [b"line"]

    def read_time(self, name: str, default: str) -> str:
        """A time in the query, or the beginning of one. Raises BadRequest."""
        text = self.get_query_argument(name, default)
        if text != default and not is_time(text):
            raise BadRequest(f"{name}: expected a time such as 2026-11, 2026-11-21 or 2026-11-21T08:00")
        return text

    def read_moment(self, name: str, default: float) -> float:
        """The same in seconds since 1970, where the query has it in the gateway's time zone. Raises BadRequest."""
        text = self.read_time(name, "")
        if not text:
            return default
        text = text[:16] + "0000-01-01T00:00"[len(text) :]
        try:
            return dt.datetime.fromisoformat(text).replace(tzinfo=self.gateway.config.timezone).timestamp()
        except (ValueError, OverflowError):
            raise BadRequest(f"{name}: there is no such time") from None

    # What Tornado asks of a handler

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Content-Type", "text/plain; charset=utf-8")

    def compute_etag(self) -> None:
        """No etags: what is asked for here changes."""

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        if status_code == 400:
            error = BadRequest("The query cannot be read: expected UTF-8, percent-encoded.")
        elif status_code == 405:
            error = self._not_found()
        elif not isinstance(error, GatewayError):
            error = GatewayError(INTERNAL_ERROR)
        request_id = "req_" + secrets.token_hex(12)
        self.set_status(error.status)
        for name, value in error_headers(error, request_id):
            self.set_header(name, value)
        if error.status == MethodNotAllowed.status:
            self.set_header("Allow", ", ".join(self.endpoints))
        if self.is_line:
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(f"gateway: {error}\n")
        else:
            self.finish(error_body(error, api_of(self.path), request_id))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, (GatewayError, tornado.web.HTTPError)):
            log.error("%s %s failed", self.request.method, self.path, exc_info=(typ, value, tb))


def tornado_application(gateway: Gateway) -> tornado.web.Application:
    """What answers every request that is no call."""
    return tornado.web.Application(
        default_handler_class=PageRequest, default_handler_args={"gateway": gateway}, log_function=lambda handler: None
    )


# --- 32. Local door: commands at the running gateway ------------------------------
# Offers: ask, EditMade, LocalDoor, NoGateway, perform, ReadHealth

# A ledger has one writer. While a gateway runs, that is the gateway, and commands ask it: over a Unix socket in the
# ledger's folder, one JSON line there and one back. While none runs, a command makes the change itself and holds the
# folder's lock meanwhile, so that no gateway starts.
#
#     folder's lock   socket                command
#     free            none, or a dead one   holds the lock, appends
#     held            answers               asks; a gateway that still starts says so
#     held            none, or a dead one   waits up to HELD_S: a gateway starts or ends just now, or a restore runs.
#                                           Then it says so: the file system has no sockets, of which the gateway warns
#
# The socket is its owner's alone (mode 0600), and the kernel says who connects: the gateway's own user, or root. Its
# path may be longer than an address can be (104 bytes), then it is reached through the folder's descriptor (Linux).

LOCAL_SOCKET = "gateway.sock"
MOST_ADDRESS = 104  # bytes of a Unix socket's address, as macOS and the BSDs have it; Linux takes 108
MOST_LINE = 64 << 10  # bytes of a request
MOST_ANSWER = 4 << 20  # bytes of an answer: the state of 10,000 upstream keys
ASK_S = 5.0  # for an answer
HELD_S = 3.0  # for a folder that is held by one who does not answer


class ReadHealth(Action, frozen=True, tag="health"):
    """What /health says."""


class EditMade(Action, frozen=True, tag="edit made"):
    """A command has edited config.yaml: it is to be read, and the edit announced."""

    edit: str


REQUEST_DECODER = msgspec.json.Decoder(Change | ReadHealth | EditMade)


class Result(msgspec.Struct):
    """What came of a change: its result, or code and message of an ActionError."""

    result: Any = None
    error: tuple[ActionCode, str] | None = None


class NoGateway(Exception):
    """No gateway listens in a ledger's folder."""


@contextlib.contextmanager
def local_address(directory: Path) -> Iterator[str]:
    """The address of the socket in a ledger's folder, good for the block. Raises OSError."""
    path = str(directory / LOCAL_SOCKET)
    if len(os.fsencode(path)) < MOST_ADDRESS:
        yield path
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{LOCAL_SOCKET}"
    finally:
        os.close(fd)


def ask(directory: Path, action: Action) -> Any:
    """Have the gateway that runs on a ledger's folder do something. Raises NoGateway, and ActionError."""
    try:
        with socket.socket(socket.AF_UNIX) as client, local_address(directory) as address:
            client.settimeout(ASK_S)
            client.connect(address)
            client.sendall(msgspec.json.encode(action) + b"\n")
            with client.makefile("rb") as file:
                answer = msgspec.json.decode(file.readline(MOST_ANSWER), type=Result)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise NoGateway from None
    except (TimeoutError, *UNREADABLE):  # it hangs, ended meanwhile, or is another version
        raise ActionError(
            "unsure", f"the running gateway gave no answer within {ASK_S:g} s; it may still do what it was asked for"
        ) from None
    except OSError as error:
        raise ActionError("failed", f"cannot ask the gateway that runs on {directory}: {why_not(error)}") from None
    if answer.error:
        raise ActionError(*answer.error)
    return answer.result


def append_alone(config: Config, action: Change, line: LedgerLine) -> None:
    """Append a change's line while no gateway can start, and no other command appends.

    Raises ActionError where it was done already, OSError, and of these BlockingIOError where a gateway runs.
    """
    directory = config.usage_directory
    held = hold_folder(directory)
    try:
        if isinstance(action, Correction):
            check_new(action, directory)
        Ledger.correct(directory, line, config.clock)
    finally:
        os.close(held)


def perform(action: Change, config: Config) -> Any:
    """Have the running gateway make a change, or make it here where none runs. Raises ActionError and OSError."""
    directory, until = config.usage_directory, time.monotonic() + HELD_S
    alone = House(config, functools.partial(append_alone, config, action), None)
    while True:
        try:
            return ask(directory, action)
        except NoGateway:
            pass
        try:
            return action.run(alone)
        except BlockingIOError:
            if time.monotonic() > until:
                silent = (
                    f"a gateway runs on {directory}, or a restore, and no {LOCAL_SOCKET} answers there: end it first"
                )
                raise ActionError("failed", silent) from None
            time.sleep(0.05)


def identify_peer(client: socket.socket) -> str:
    """Who has connected, as the kernel says. Raises ActionError where it is neither the gateway's user nor root."""
    if not hasattr(socket, "SO_PEERCRED"):  # no Linux: the socket's mode has to do
        return "a user on this host"
    pid, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid not in (os.geteuid(), 0):
        raise ActionError("failed", f"the gateway runs as user {os.geteuid()}: run this as that user")
    return f"user {uid} on this host (process {pid})"


class LocalDoor:
    """The running gateway's own socket. Some read and write at once; what they ask is done one after the other."""

    LINE_S = 2.0  # for a whole request, and for its answer to be taken
    MOST_CLIENTS = 64  # at once; others wait

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._path = gateway.ledger.directory / LOCAL_SOCKET
        self._file: os.stat_result | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # one takes clients, the others answer them
        self._turn = asyncio.Lock()
        self._is_warned = False

    def listen(self) -> None:
        """Listen, and replace a socket that was left by a gateway that was killed: whoever calls holds the folder."""
        made = socket.socket(socket.AF_UNIX)
        try:
            self._path.unlink(missing_ok=True)
            with local_address(self._path.parent) as address:
                made.bind(address)
            self._path.chmod(0o600)  # nobody can connect before `listen`
            made.listen(128)
            made.setblocking(False)
            self._file = self._path.stat()
        except OSError as error:
            made.close()
            if not self._is_warned:
                why = "commands that write to the ledger have to wait until the gateway has ended"
                log.warning("cannot listen at %s: %s; %s", self._path, os_reason(error), why)
            self._is_warned = True
            return
        self._is_warned = False
        self._start(self._take_clients(made), made.close)

    def check(self) -> None:
        """Listen again where the socket is gone, as after the ledger's folder was moved."""
        if not self._is_there():
            self._end()
            self.listen()

    def close(self) -> None:
        """Listen no more."""
        if self._is_there():
            self._path.unlink(missing_ok=True)
        self._end()

    def _is_there(self) -> bool:
        try:
            found = os.stat(self._path)
        except OSError:
            return False
        return self._file is not None and os.path.samestat(self._file, found)

    def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._file = None

    def _start(self, work: Coroutine[Any, Any, None], end: Callable[[], None]) -> None:
        """Have work done in a task; `end` is called however it ends, and also if it is cancelled before it began."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: end())

    async def _take_clients(self, listening: socket.socket) -> None:
        places = asyncio.Semaphore(self.MOST_CLIENTS)
        while True:
            await places.acquire()
            try:
                client, _ = await asyncio.get_running_loop().sock_accept(listening)
            except OSError as error:  # too many files are open
                places.release()
                log.warning("cannot take a command: %s", why_not(error))
                await asyncio.sleep(1.0)
                continue
            client.setblocking(False)

            def end(client: socket.socket = client) -> None:
                client.close()
                places.release()

            self._start(self._serve(client), end)

    async def _serve(self, client: socket.socket) -> None:
        try:
            await self._answer(client)
        except (OSError, TimeoutError):
            log.debug("a command left, or asked nothing")
        except Exception:
            self._gateway.guard.record("LocalDoor.answer")

    async def _answer(self, client: socket.socket) -> None:
        """Read a request, do what it asks, and send what came of it."""
        loop, line = asyncio.get_running_loop(), b""
        async with asyncio.timeout(self.LINE_S):
            while not line.endswith(b"\n") and len(line) < MOST_LINE:
                data = await loop.sock_recv(client, MOST_LINE)
                if not data:
                    return
                line += data
        try:
            action, who = REQUEST_DECODER.decode(line), identify_peer(client)
            async with self._turn:
                answer = Result(await self._do(action, who))
        except UNREADABLE as error:
            answer = Result(error=("invalid", f"the running gateway ({VERSION}) does not know that: {error}"))
        except ActionError as error:
            answer = Result(error=(error.code, str(error)))
        async with asyncio.timeout(self.LINE_S):
            await loop.sock_sendall(client, msgspec.json.encode(answer) + b"\n")

    async def _do(self, action: Change | ReadHealth | EditMade, who: str) -> Any:
        """Do what is asked. Raises ActionError."""
        if isinstance(action, ReadHealth):
            return self._gateway.health()
        if isinstance(action, EditMade):
            await self._gateway.reload()
            return self._gateway.emit(ChangeMade(who, action.edit))
        try:
            return await act(self._gateway, action, who)
        except Unavailable as error:
            raise ActionError("failed", str(error)) from None


# --- 33. Server: process, signals, watcher, logging -------------------------------
# Offers: LogWriter, new_event_loop, OTHER_HOST, serve, start_logging


class ConfigWatch(FileSystemEventHandler):
    """Has a gateway reload when its config.yaml changes.

    The directory is watched, not the file: editors, Kubernetes and `docker -v` put another inode in its place.
    Events do not cross every mount, so `poll`, called every second, compares as well.
    """

    # Not FileModifiedEvent: a log or a ledger in the same folder would wake the watcher's threads with every line, and
    # whoever writes config.yaml closes it afterwards.
    EVENTS: ClassVar = [FileCreatedEvent, FileMovedEvent, FileDeletedEvent, FileClosedEvent]

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._path = gateway.config.path
        self._loop = asyncio.get_running_loop()
        self._pending: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None  # asyncio keeps no reference of its own
        self._observer = Observer()
        self._polls = 0
        self._seen = self._signature()

    def start(self) -> None:
        """Begin to watch; without inotify (too few watches, say) the poll has to do."""
        try:
            self._observer.schedule(self, str(self._path.parent), event_filter=self.EVENTS)
            self._observer.start()
        except OSError as error:
            log.warning("cannot watch %s (%s): its config is looked at every second instead", self._path.parent, error)

    def stop(self) -> None:
        """End the watcher's thread."""
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join(timeout=2)

    def on_any_event(self, event: FileSystemEvent) -> None:
        # Called in the watcher's thread. The ledger may be written to the same directory all the time.
        name = os.path.basename(os.fsdecode(event.src_path))
        if not name.startswith("usage-"):
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._changed)

    def _changed(self) -> None:
        if self._pending is None:  # the first event of a burst starts the wait, later ones do not prolong it
            self._pending = self._loop.call_later(self._gateway.pace.burst_s, self.start_reload)

    def start_reload(self, is_asked: bool = False) -> None:
        """Have the config read now; `is_asked` as in `Gateway.reload`."""
        self._pending = None
        self._seen = self._signature()
        self._task = self._loop.create_task(self._gateway.reload(is_asked))

    def poll(self) -> None:
        """Compare the file's stat, and every tenth time its content, with what was loaded."""
        self._polls += 1
        if self._signature() != self._seen or self._polls % 10 == 0:
            self.start_reload()

    def _signature(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


MAX_LINE = 32 << 10  # characters of a line of the log with its traceback


class LogFormatter(logging.Formatter):
    """Lines such as `2026-11-21 05:55:02,112 INFO …`; the second is written once, not once a line."""

    def __init__(self) -> None:
        super().__init__()
        self._second, self._text = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        return self.line(record.created, record.levelname, super().format(record))

    def line(self, at: float, level: str, message: str) -> str:
        """A line of the log; `at` is in seconds since 1970."""
        second = int(at)
        if second != self._second:
            self._second, self._text = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        if not message.isprintable():  # else a name from outside could begin a line of its own
            message = "\n    ".join(printable(line, MAX_LINE) for line in message[:MAX_LINE].split("\n"))
        return f"{self._text},{int(at % 1 * 1000):03} {level} {message}"


class LogWriter(logging.Handler):
    """Writes the log to stderr: line by line for a command, from a thread of its own while the gateway serves.

    A pipe holds 64 KB, about 450 lines. When nobody reads it, a write blocks, and on the event loop it would block
    every call, /health and SIGTERM. So the loop only formats a line and queues it; the thread writes what is queued
    with one system call, then rests for `PAUSE_S`, so that a busy loop wakes it 50 times a second and not once a line.

    What does not fit, and what stderr refuses (a closed pipe, a full disk), is lost and counted. The number of lost
    lines is logged in their place when stderr takes lines again.
    """

    MAX_BYTES = 4 << 20  # characters that may wait: some 20,000 lines, 10 s of a busy gateway
    PAUSE_S = 0.02
    FLUSH_S = 1.0  # an exit waits for the thread no longer than this

    def __init__(self) -> None:
        super().__init__()
        self._formatter = LogFormatter()
        self.setFormatter(self._formatter)
        self.lost = 0  # lines, since the start
        self._told = 0  # of these, those whose number has been logged
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # lines; None is the end
        self._size = 0  # characters that are queued, or being written
        self._thread: threading.Thread | None = None
        self._counting = threading.RLock()  # for the three numbers

    @contextlib.contextmanager
    def in_thread(self, stderr: IO[str] | None) -> Iterator[None]:
        """Write to `stderr` from a thread; when the block ends, wait up to `FLUSH_S` for what is left."""
        try:
            fd = cast(IO[str], stderr).fileno()
        except (AttributeError, OSError, ValueError):  # no stderr, or none of the system's: nothing there blocks
            yield
            return
        thread = self._thread = threading.Thread(target=self._run, args=(fd,), name="log", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._queue.put(None)
            thread.join(self.FLUSH_S)
            if not thread.is_alive():  # else what is logged from here on is lost with it
                self._thread = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line."""
        try:
            line = self.format(record)
        except Exception:  # a format that does not fit its values: logging's own way to say so
            return self.handleError(record)
        return self._take(line)

    def tell(self, message: str) -> None:
        """Log a message at INFO without a record: a third of the time, for the line of each call."""
        self._take(self._formatter.line(time.time(), "INFO", message))

    def _take(self, line: str) -> None:
        if self._thread is None:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                print(line, file=sys.stderr, flush=True)
            return
        if len(line) > MAX_LINE:
            line = line[:MAX_LINE] + " …"
        with self._counting:
            if self._size + len(line) > self.MAX_BYTES:
                self.lost += 1
                return
            self._size += len(line)
            self._queue.put(line)

    def _run(self, fd: int) -> None:
        is_over = False
        while not is_over:
            found = [self._queue.get()]
            with self._counting:
                while not self._queue.empty():
                    found.append(self._queue.get())
                untold = self.lost - self._told
            lines = [line for line in found if line is not None]
            is_over = len(lines) < len(found)
            text = "".join(line + "\n" for line in lines)
            if untold:
                loss = f"log: {untold} lines were lost here, because stderr was not read or refused them"
                text += self._formatter.line(time.time(), "WARNING", loss) + "\n"
            is_written = self._write(fd, text)
            with self._counting:
                self._size -= sum(map(len, lines))
                if is_written:
                    self._told += untold
                else:
                    self.lost += len(lines)
            if not is_over:
                with contextlib.suppress(OSError):  # as under libfaketime; without a rest it only wakes more often
                    time.sleep(self.PAUSE_S)

    def _write(self, fd: int, text: str) -> bool:
        """Write all of it, however long that takes; whether stderr took it."""
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while data:
                data = data[os.write(fd, data) :]
        except OSError:
            return False
        return True


def start_logging(level: str) -> LogWriter:
    """Log to stderr."""
    writer = LogWriter()
    logging.basicConfig(level=level, handlers=[writer])
    logging.getLogger("watchdog").setLevel(logging.WARNING)
    logging.getLogger("tornado.general").setLevel(logging.WARNING)  # else a line for each malformed request
    return writer


MOST_DESCRIPTORS = 1 << 16
KEPT_DESCRIPTORS = 64  # for files, pipes, lookups


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it may, at most MOST_DESCRIPTORS; how many clients may then connect.

    Half of them, because each call needs a connection to an upstream as well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit of their own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    allowed = MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(16, (allowed - KEPT_DESCRIPTORS) // 2)


OTHER_HOST = "127.0.0.1 is for this host alone, 0.0.0.0 for others, too; a proxy's name belongs into server.url"


class Server:
    """The running process: gateway, door, watcher, signals."""

    def __init__(self, config: Config, pace: Pace = Pace()) -> None:
        self.gateway = Gateway(config, pace)
        in_memory = available_memory() // 4 // ClientConnection.MOST_HELD  # heads that do not end, of all of them
        self.door = Door(
            self.gateway, tornado_application(self.gateway), max(16, min(raise_descriptor_limit(), in_memory))
        )
        self.local = LocalDoor(self.gateway)
        self._watch = ConfigWatch(self.gateway)
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def start(self) -> int:
        """Bind, read the ledger, watch; the port. Raises CommandError.

        /health answers while the ledger is read; calls are refused, because limits are not known yet.
        """
        server = self.gateway.config.server
        self.gateway.starting = True
        try:
            port = await self.door.listen(server.host, server.port)
        except OSError as error:
            is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
            other = "port, or GATEWAY_PORT where the config reads it" if is_port else f"host: {OTHER_HOST}"
            raise CommandError(
                f"cannot listen on {server.host}:{server.port}: {os_reason(error)}; set server.{other}"
            ) from None
        try:
            self.gateway.ledger.hold()
            self.local.listen()
            counting = self.gateway.books.start()
            while not counting.done():
                self.gateway.guard.run(self.door.check)
                await asyncio.sleep(0.005)
            self.gateway.books.begin(counting.result())
        except OSError as error:
            raise CommandError(f"cannot use the ledger in {self.gateway.ledger.directory}: {why_not(error)}") from None
        self._watch.start()
        await self.gateway.reload()  # it may have been edited meanwhile: a key that was revoked never gets in
        self.gateway.starting = False
        return port

    def signalled(self, number: int) -> None:
        """SIGHUP reloads; SIGTERM and SIGINT stop, a second one at once."""
        if number == signal.SIGHUP:
            self._watch.start_reload(is_asked=True)
        elif self._stop.is_set():
            self._stop_now.set()
        else:
            self._stop.set()

    async def run(self) -> None:
        """Serve until a signal; then let running calls finish, and close."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.signalled, number)
        ticker = loop.create_task(self._tick())
        await self._stop.wait()
        drain_s = self.gateway.config.server.drain
        log.info(
            "stopping: %d calls may run for %.0f s; a second signal ends them", len(self.gateway.relay.running), drain_s
        )
        self.door.stop_listening()
        waits = [loop.create_task(self.gateway.drain(drain_s)), loop.create_task(self._stop_now.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        await self.close()
        for task in (ticker, *waits):
            task.cancel()

    async def _tick(self) -> None:
        pace, guard, polled_at = self.gateway.pace, self.gateway.guard, 0.0
        ticked_at = self.door.now()
        while True:
            await asyncio.sleep(pace.tick_s)
            now = self.door.now()
            stood_s = now - ticked_at - pace.tick_s
            ticked_at = now
            if stood_s > pace.late_s:
                log.warning("the event loop stood still for %.1f s: deadlines are later by that", stood_s)
            else:
                stood_s = 0.0
            self.gateway.tick(stood_s)
            guard.run(self.door.check)
            if self.door.now() - polled_at >= pace.poll_s:
                polled_at = self.door.now()
                guard.run(self._watch.poll)
                guard.run(self.gateway.ledger.reopen_if_moved)
                guard.run(self.local.check)

    async def close(self) -> None:
        """Book what still runs and let go of everything."""
        self._watch.stop()
        self.local.close()
        await self.gateway.close()
        await self.door.close()
        log.info("stopped")


def trim_memory() -> None:
    """Give back to the system what the start needed and holds no more: 30 MB where Python had to compile this file.

    What is there now stays: the garbage collector need not look through it again.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


async def serve(config: Config, greet: Callable[[int], str], log_writer: LogWriter) -> None:
    """Run the gateway until it is told to stop; `greet` gives what the terminal shows once it listens on a port."""
    gc.set_threshold(2000, 10, 10)  # calls leave no circles behind: some that others leave can wait a little
    server = Server(config)
    server.gateway.metrics.lost_log_lines = lambda: log_writer.lost
    if log.isEnabledFor(logging.INFO):
        server.gateway.log.write = log_writer.tell
    port = await server.start()
    check_in_background(server.gateway.metrics, sys.path, INTEGRITY_LIST)
    for warning in config.warnings:
        log.warning("config: %s", warning)
    try:
        # One write, so that no line of the log comes between the text and its end where both go into one file.
        print(greet(port) + "\n", end="", flush=True)
    except OSError as error:
        sys.stdout = io.StringIO()  # nothing more is said there, and the end is no error
        log.warning("the greeting cannot be written (%s); the gateway listens on port %d", why_not(error), port)
    threading.Thread(target=trim_memory, name="trim", daemon=True).start()  # 30 ms, without the interpreter's lock
    await server.run()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's loop where it is installed, else asyncio's."""
    try:
        import uvloop  # optional: requirements.txt has it for Linux and macOS
    except ImportError:
        return asyncio.new_event_loop()
    return cast(asyncio.AbstractEventLoop, uvloop.new_event_loop())


# --- 34. Command line: arguments to actions to text, JSON, CSV --------------------
# Offers: arguments, edit

CONFIG_TEMPLATE = """\
# The gateway's configuration. A save is live within a second; `%(program)s check` tells what it means.
# Every setting with its default stands in config.example.yaml.

server:
  host: ${GATEWAY_HOST:-127.0.0.1}
  port: ${GATEWAY_PORT:-8000}

upstreams:
  - name: demo                  # built in: answers without an API key, so that you can try the whole way
    format: demo
  # A real upstream: remove the two lines above, take these in, save, and run `%(program)s seal`.
  # - name: anthropic
  #   url: https://api.anthropic.com
  #   api_key: sk-ant-...       # sealed afterwards: enc:...; or ${ANTHROPIC_API_KEY}

keys:
  - name: me
    key: %(key)s
"""

INTEGRITY_HELP = """\
instead of the config look at the installed files: are they those of the image's list or, elsewhere, of each package's
RECORD, and does nothing foreign run when Python starts?
"""


def init_config(path: Path) -> str:
    """Write config.yaml, the sealing secret and one key; the key, which is shown only now. Raises CommandError."""
    secret = make_secret(path.parent)
    made = f" but that the sealing secret {secret} was made" if secret else ""
    if path.exists() or path.is_symlink():
        raise CommandError(f"{path} is there already; nothing was changed{made}")
    key = new_key()
    write_new(path, CONFIG_TEMPLATE % {"program": PROGRAM, "key": seal_key(key)}, 0o640)
    return key


def first_key(path: Path, is_named: bool) -> str:
    """Make a config where the gateway is started for the first time; its key, or how a shell gets it from a file.

    `is_named`: --config named the file, which was to be there. What GATEWAY_CONFIG names is made in an empty folder: a
    volume of a container. Only a terminal is shown the key: a container's log keeps it for good. Raises CommandError.
    """
    others: set[str] = set()
    with contextlib.suppress(OSError):  # there is no folder yet, or `init_config` says what is wrong with it
        others = {each.name for each in path.parent.iterdir()} - {"lost+found", Vault.FILE}
    if not os.environ.get("GATEWAY_CONFIG"):
        others = {name for name in others if name.startswith((".restore-", "before-restore-"))}
    if is_named or others:
        beside = "".join(f", but {name} is there" for name in sorted(others)[:1])
        remedy = f"look at the name, put it back, run the restore again, or make it: {PROGRAM} --config {path} init"
        raise CommandError(f"there is no {path}{beside}: {remedy}")
    key = init_config(path)
    if sys.stdout.isatty():
        return key
    file = path.parent / "first-key.txt"
    file.unlink(missing_ok=True)  # of a config that is not there any more
    write_new(file, key + "\n", 0o600)
    return f"$(cat {shlex.quote(str(file))})"


def local_url(config: Config, port: int) -> str:
    """Where a client on this host finds the gateway."""
    host = config.server.host
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}"


def exports(config: Config, port: int, key: str) -> str:
    """What a user's shell needs for Claude Code."""
    url = config.server.url.rstrip("/") or local_url(config, port)
    return f"  export ANTHROPIC_BASE_URL={url}\n  export ANTHROPIC_AUTH_TOKEN={key}\n"


def greeting(config: Config, port: int, key: str) -> str:
    """What the terminal shows once the gateway listens; `key` is the first one, or how a shell gets it, or ""."""
    path = config.path.name if config.path.parent.samefile(".") else config.path
    lines = [f"claude-gateway {VERSION} listens on {local_url(config, port)} ({path})", ""]
    lines += ["Point Claude Code at it:", "", exports(config, port, key or "sk-proxy-...")]
    another = f"{PROGRAM} key add NAME"
    if not key and not config.file.keys:
        lines.append(f"Make a key: {another}")
    elif not key:
        lines.append(f"Another key: {another}")
    elif key.startswith("$"):
        lines.append(
            f"That file, which only its owner can read, has the first key: delete it afterwards. Another: {another}"
        )
    else:
        lines.append(f"This key is shown once; {config.path.name} keeps only its hash. Another: {another}")
    if all(upstream.format == "demo" for upstream in config.upstreams):
        lines.append(f"The built-in demo answers. For a real upstream put its url and api_key into {path},")
        lines.append(f"save (it is live within a second), and run: {PROGRAM} seal")
    return "\n".join(lines)


def command_serve(options: argparse.Namespace) -> None:
    """Run the gateway; where there is no config yet, make one first."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # until it serves: as process 1 of a container nothing else ends it
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the config is read again when the start is done
    path: Path = options.config
    shown_key = "" if path.exists() or path.is_symlink() else first_key(path, options.is_config_named)
    config = Config.load(path)
    log_writer: LogWriter = options.log_writer
    with log_writer.in_thread(sys.stderr), asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            runner.run(serve(config, lambda port: greeting(config, port, shown_key), log_writer))
        except CommandError:
            if shown_key:
                print(f"{path} was made, with a key for you, which is shown once:\n\n  {shown_key}\n")
            raise


def show_key(name: str, text: str) -> None:
    """Print a text with a key that is in the config already. Raises CommandError where it cannot be shown."""
    try:
        print(text, flush=True)
    except OSError as error:
        remedy = f"`{PROGRAM} key rotate {shlex.quote(name)}` makes another"
        raise CommandError(f"{name}'s key was made, but nobody has seen it ({why_not(error)}): {remedy}") from None


def command_init(options: argparse.Namespace) -> None:
    """Write config.yaml, the sealing secret and one key."""
    key = init_config(options.config)
    start = f"It is shown once. Start the gateway with: {PROGRAM} serve"
    show_key("me", f"Wrote {options.config}, the sealing secret, and a key for you:\n\n  {key}\n\n{start}")


LOOKS_LIKE_KEY = re.compile(r"(?:sk-|AIza|AKIA|gsk_|enc:|sha256:)[\w+/=-]{16,}|\b(?=[a-zA-Z]*\d)[0-9a-zA-Z]{20,}")


def name_text(model: str) -> str:
    """Return a model's name or glob for people; "" is a request without a model. What looks like a key is masked."""
    return LOOKS_LIKE_KEY.sub(lambda found: "*" * len(found[0]), model) or '""'


def key_line(key: Key, expires: Expiry | None, now: float) -> str:
    """A key in a line; `now` in seconds since 1970."""
    state, budget = "enabled", key.budgets[0]
    if not key.enabled:
        state = "disabled"
    elif now >= key.expires_at:
        state = "expired"
    texts = [f"  {key}: {state}"]
    if expires and expires.last_day:
        texts.append(f"{'works' if now < key.expires_at else 'worked'} through {expires.last_day}")
    elif expires:
        texts.append(f"expires {utc_time(key.expires_at)[:16].replace('T', ' ')} UTC")
    if key.networks:
        texts.append(f"from {', '.join(map(str, key.networks))}")
    texts.append(f"models {', '.join(map(name_text, key.models))}")
    if key.team:
        texts.append(f"team {key.team}")
    limits = [f"{limit.name} {limit.amount:,.10g}" for limit in budget.limits]
    if math.isfinite(budget.concurrent):
        limits.append(f"concurrent {budget.concurrent:,.10g}")
    return ", ".join([*texts, f"limits {', '.join(limits) or 'none'}"])


def key_table(config: Config) -> str:
    """The keys, one line each."""
    now, entries = config.clock.wall(), config.file.keys
    return "\n".join(key_line(key, entry.expires, now) for key, entry in zip(config.keys, entries, strict=True))


def upstream_text(upstream: UpstreamConfig) -> str:
    """An upstream in a line."""
    models = [name_text(a) if b == "*" else f"{name_text(a)} as {name_text(b)}" for a, b in upstream.models.items()]
    keys = f"{len(upstream.api_key)} API keys".replace("1 API keys", "1 API key")
    if upstream.format == "demo":
        keys = "built in, needs no API key"
    where = f"{upstream.format} {upstream.url}".rstrip()
    order = f"priority {upstream.priority}, weight {upstream.weight:g}"
    return f"{upstream.name}: {where}, models {', '.join(models)}, {order}, {keys}"


def command_check_integrity(options: argparse.Namespace) -> int:
    """Print how the installed files compare with their list; 1 where one differs."""
    found = check_integrity(sys.path, INTEGRITY_LIST)
    for problem in found.problems:
        print(printable(problem, 1000))
    print(f"compared {found.files:,} files with {found.source}; differences: {len(found.problems)}")
    return bool(found.problems)


async def try_to_listen(host: str) -> None:
    """Listen for a moment on some port of a host. Raises OSError."""
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, 0)
    server.close()


def expired_keys(config: Config) -> list[str]:
    """Return what is to be told of the keys that would work, were their time not over."""
    now, document = config.clock.wall(), Document(read_text(config.path), config.path)
    expired = [i for i, key in enumerate(config.keys) if key.enabled and key.expires_at <= now]
    return document.sentences([Mistake(("keys", i, "expires"), "is over: the key works no more") for i in expired])


def command_check(options: argparse.Namespace) -> None:
    """Validate config.yaml and print what it means."""
    config = Config.load(options.config)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(try_to_listen(config.server.host))
    except OSError as error:
        why = f"this machine cannot listen there ({os_reason(error)}): {OTHER_HOST}"
        document = Document(read_text(config.path), config.path)
        config.warnings += [f"line {told}" for told in document.sentences([Mistake(("server", "host"), why)])]
    config.warnings += [f"line {told}" for told in expired_keys(config)]
    server, prices = config.server, config.file.prices
    print(f"{config.path} is good (digest {config.digest})\n")
    print(f"listens on {server.host}:{server.port}, time zone {server.timezone}, ledger in {config.usage_directory}\n")
    print("upstreams, of those that serve a model the lowest priority is asked:")
    for upstream in sorted(config.upstreams, key=lambda upstream: upstream.priority):
        print(f"  {upstream_text(upstream)}")
    unknown = prices.unknown or 'as "*"'
    print(f"\nprices: {len(prices.rows)} rows; a model without one: {unknown}")
    print("\nkeys:")
    print(key_table(config) or f"  none: nobody can call; {PROGRAM} key add NAME")
    if config.warnings:
        print("\nwarnings:")
        for warning in config.warnings:
            print(f"  {warning}")


def edit(action: Edit, path: Path) -> Any:
    """Make an edit, and have the gateway, where one runs, read it at once and log it. Raises as `action.run` does."""
    result = action.run(path)
    if isinstance(result, Sealed) and not (result.places or result.again):
        return result  # nothing was changed
    with contextlib.suppress(ConfigError, NoGateway, ActionError):
        ask(ledger_of(Document(read_text(path), path)), EditMade(str(action)))
    return result


def command_key_add(options: argparse.Namespace) -> None:
    """Make a key, show it once, keep its hash."""
    limits = {name: amount for name, _, amount in (option.partition("=") for option in options.limit)}
    action = AddKey(options.name, limits, tuple(options.model), options.expires, options.team)
    key: str = edit(action, options.config)
    config = Config.load(options.config)
    shell = exports(config, config.server.port, key).removesuffix("\n")
    show_key(options.name, f"{options.name}'s key, shown only now:\n\n  {key}\n\nFor Claude Code:\n\n{shell}")


def command_key_list(options: argparse.Namespace) -> None:
    """Show the keys."""
    print(key_table(Config.load(options.config)) or f"  none: {PROGRAM} key add NAME makes one")


def command_key_rotate(options: argparse.Namespace) -> None:
    """Give a key's holder a new key; the old one ends now."""
    key: str = edit(RotateKey(options.name), options.config)
    show_key(options.name, f"{options.name}'s new key, shown only now; it takes the old one's place:\n\n  {key}")


def command_key_revoke(options: argparse.Namespace) -> None:
    """Disable a key; its name stays for the ledger."""
    mistake = edit(RevokeKey(options.name), options.config)
    print(f"{options.name}'s key is revoked. `enabled: true` in {options.config.name} brings it back.")
    if mistake:
        print(f"But the file has a mistake, until which is mended nothing else of it is live:\n  {mistake}")


def command_seal(options: argparse.Namespace) -> None:
    """Seal every plain secret in config.yaml."""
    places, again, made = edit(SealSecrets(options.rotate), options.config)
    if made:
        print(f"Made the sealing secret {made}: keep a copy elsewhere, nothing else opens what is sealed with it.")
    if places:
        print(f"Sealed: {', '.join(places)}")
    if again:
        print(f"Encrypted again with the newest secret: {', '.join(again)}")
    if not (places or again):
        sealed = "Nothing to seal: no secret stands there in clear text."
        print("Nothing to encrypt again: no secret there is sealed." if options.rotate else sealed)


def cooldowns(config: Config) -> dict[str, list[dict[str, Any]]]:
    """By upstream, what of it the running gateway leaves alone: rows of /health with `until` in the future."""
    health: dict[str, Any] = {}
    with contextlib.suppress(NoGateway, ActionError):
        health = ask(config.usage_directory, ReadHealth())
    now, found = utc_time(config.clock.wall()), {}
    for upstream in health.get("upstreams", ()):
        rows = [upstream, *upstream.pop("keys", ())]
        found[upstream["name"]] = [row for row in rows if row.get("until", "") > now]
    return found


def cooldown_line(name: str, row: dict[str, Any]) -> str:
    """What `upstream test` says of a row of /health."""
    key = f"key {row['number']}" if row.get("number") else "all  "
    whose = [f" for {whom.replace('_', ' ')}" for whom in ("one_user", "one_model") if row.get(f"for_{whom}")]
    ends = f"until {row['until']} ({row['why']}): `{PROGRAM} upstream reset {name}` ends that"
    return f"  {key}  warn                the running gateway leaves it alone{''.join(whose)} {ends}"


def command_upstream_test(options: argparse.Namespace) -> int:
    """Make one small real call with each API key of each upstream, and tell how it went."""
    config = Config.load(options.config)
    upstreams = [upstream for upstream in config.upstreams if options.name in ("", upstream.name)]
    if not upstreams:
        raise unknown_name("upstream", options.name, [upstream.name for upstream in config.upstreams])
    left_alone = cooldowns(config)
    reports: list[dict[str, Any]] = []
    found: list[Tried] = []

    def tell(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    def tell_key(tried: Tried) -> None:
        found.append(tried)
        model = f"{tried.model}: " if tried.model else ""
        tell(f"  key {tried.key}  {tried.state:6}  {tried.ms:>7,.0f} ms  {model}{tried.detail}")

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for upstream in upstreams:
            tell(f"{upstream.name}  {upstream.url or 'built in'}")
            before = len(found)
            runner.run(UpstreamTest(config, upstream, options.model, options.timeout).run(tell_key))
            rows = left_alone.get(upstream.name, [])
            for row in rows:
                tell(cooldown_line(upstream.name, row))
            tell("")
            keys = msgspec.to_builtins(found[before:])
            reports.append({"name": upstream.name, "url": upstream.url, "keys": keys, "cooldowns": rows})
        runner.run(asyncio.sleep(0))  # closed transports let go of their sockets a turn later
    answered = sum(each.state != "FAILED" for each in found)
    cost_usd = round(sum(each.cost_usd for each in found), 9)
    sums = {"keys": len(found), "answered": answered, "cost_usd": cost_usd}
    cost = f"; cost about ${cost_usd:.6f} in all" if any(each.status for each in found) else ""
    tell(f"{answered} of {len(found)} keys answered (not booked{cost})")
    if options.json:
        print(json.dumps({"upstreams": reports, **sums, "ok": answered == len(found)}, indent=2))
    return 0 if answered == len(found) else 1


USAGE_GROUPS = ("key", "team", "model", "model_served", "day", "month", "upstream", "session", "outcome", "client")
USAGE_COLUMNS = ("calls", "failed", "input_tokens", "cache_write_tokens", "cache_read_tokens", "output_tokens")


def text_table(rows: Sequence[Sequence[str]], names: int) -> str:
    """Rows of cells for a terminal; the first `names` columns begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:names], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[names:], widths[names:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def csv_cell(text: str) -> str:
    """A name as a cell that no spreadsheet takes for a formula (also in full-width characters) or for two lines."""
    text = printable(text, 1000)
    start = unicodedata.normalize("NFKC", text.lstrip())[:1]
    return "'" + text if start in tuple("=+-@") else text


def write_csv(totals: Sequence[Total], by: Sequence[str], file: IO[str]) -> None:
    """Totals as CSV. A cell that a spreadsheet would take for a formula is escaped (names come from users)."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*by, *USAGE_COLUMNS, "cost_usd", "cache_hit_rate"])
    for total in totals:
        names = [csv_cell(name) for name in total.group.values()]
        rate = "" if total.cache_hit_rate is None else total.cache_hit_rate
        writer.writerow([*names, *(getattr(total, name) for name in USAGE_COLUMNS), f"{total.cost_usd:.6f}", rate])


def usage_table(totals: Sequence[Total], by: Sequence[str]) -> str:
    """Totals for a terminal, with a sum below."""
    rows = [[*by, "calls", "failed", "input", "cache write", "cache read", "output", "USD", "cache hits"]]
    whole = Total(dict.fromkeys(by, "") | {by[0]: "all"})
    for name in (*USAGE_COLUMNS, "cost_usd"):
        setattr(whole, name, sum(getattr(total, name) for total in totals))
    all_input = whole.input_tokens + whole.cache_write_tokens + whole.cache_read_tokens
    whole.cache_hit_rate = whole.cache_read_tokens / all_input if all_input else None
    for total in (*totals, whole):
        rate = "-" if total.cache_hit_rate is None else f"{total.cache_hit_rate:.0%}"
        numbers = [f"{getattr(total, name):,}" for name in USAGE_COLUMNS]
        rows.append([*total.group.values(), *numbers, f"{total.cost_usd:,.4f}", rate])
    return text_table(rows, len(by))


def books(path: Path) -> LedgerFiles:
    """A config's ledger. A mistake elsewhere in the config is told. Raises ConfigError."""
    document = Document(read_text(path), path)
    files = LedgerFiles(ledger_of(document))
    try:
        Config.parse(document.text, path, Clock(), os.environ)
    except ConfigError as error:
        print(f"warning: a mistake in the config: {str(error).splitlines()[0]}", file=sys.stderr)
    return files


def command_usage(options: argparse.Namespace) -> None:
    """Sum up the ledger."""
    files = books(options.config)
    by = list(dict.fromkeys(name.strip() for name in options.by.split(",")))
    unknown = sorted(set(by) - set(USAGE_GROUPS))
    if unknown:
        raise CommandError(f"cannot group by {', '.join(unknown)}; by {', '.join(USAGE_GROUPS)}")
    if options.json and options.csv:
        raise CommandError("--json or --csv, not both")
    for name, text in (("--since", options.since), ("--until", options.until)):
        if text not in ("", "9") and not is_time(text):
            raise CommandError(f"{name} {text}: expected a time such as 2026, 2026-11, 2026-11-21 or 2026-11-21T08:00")
    totals = summarize(
        files.lines(options.since, options.until), by, time_zone_of(Document(read_text(options.config), options.config))
    )
    if options.json:
        print(json.dumps([msgspec.to_builtins(total) for total in totals], indent=2))
    elif options.csv:
        write_csv(totals, by, sys.stdout)
    else:
        print(usage_table(totals, by) if totals else f"No calls in {files.directory} yet.")
    if files.unreadable.count:
        print(files.unreadable, file=sys.stderr)


def difference_table(pairs: Sequence[Pair]) -> str:
    """The differences for a terminal, a line each."""
    rows = [["day", "model", "", "ours", "theirs", "difference", "%"]]
    for pair in pairs:
        for measure, difference in pair.difference.items():
            shape = ",.4f" if measure == "USD" else ",.0f"
            theirs = (pair.theirs or {}).get(measure, 0)
            note = f"{difference / theirs:+.1%}" if theirs else "-"
            if pair.theirs is None:
                note = "only ours"
            if pair.ours is None:
                note = "only theirs"
            cells = [format(number, shape) for number in ((pair.ours or {}).get(measure, 0), theirs)]
            rows.append([pair.day, pair.model, measure, *cells, format(difference, "+" + shape), note])
    return text_table(rows, 3)


def command_reconcile(options: argparse.Namespace) -> int:
    """Compare the ledger with a provider's own usage or cost export (CSV); exit code 1 where they differ."""
    files = books(options.config)
    found = reconcile(files, Export(options.file), options.upstream)
    if options.json:
        print(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        if found.pairs:
            print(difference_table(found.pairs) + "\n")
        pairs = f"{found.agree + len(found.pairs)} pairs of day and model"
        counts = (
            f"{found.agree} agree, {found.differ} differ, {found.only_ours} only ours, {found.only_theirs} only theirs"
        )
        print(f"{found.first_day} to {found.last_day} (UTC), {pairs}: {counts}.")
    if files.unreadable.count:
        print(files.unreadable, file=sys.stderr)
    return 1 if found.pairs else 0


def corrected(options: argparse.Namespace) -> tuple[ScopeKind, str]:
    """The scope and the name of whom a correction is for. Raises CommandError."""
    chosen: list[tuple[ScopeKind, str]] = [("key", options.key), ("team", options.team)]
    named = [(scope, name) for scope, name in chosen if name]
    if options.gateway:
        named.append(("gateway", ""))
    if len(named) != 1:
        raise CommandError("name one: a KEY, --team TEAM, or --gateway")
    return named[0]


def correct(action: ResetLimits | AdjustUsage, config: Config) -> tuple[str, Any] | None:
    """Make a correction; return its id and what it gives back; None where it was done before. Raises CommandError."""
    if action.id:
        action = msgspec.structs.replace(action, is_repeated=True)
    else:
        action = msgspec.structs.replace(action, id=secrets.token_hex(8))
    try:
        return action.id, perform(action, config)
    except ActionError as error:
        if error.code == "done":
            print(f"{error}.")
            return None
        if error.code == "unsure":
            raise CommandError(f"{error}. Repeat it with --id {action.id}: what is done is not done again") from None
        raise
    except OSError as error:
        raise CommandError(f"nothing was written to {config.usage_directory}: {why_not(error)}") from None


def command_usage_reset(options: argparse.Namespace) -> None:
    """Let limits count from zero again, from now on; reports stay as they are."""
    action = ResetLimits(*corrected(options), options.note, options.limit, id=options.id)
    config = Config.load(options.config)
    made = correct(action, config)
    if made is None:
        return
    made_as, _ = made
    if action.limits(config):
        counts = (
            f"{options.limit} of {action.whom} now counts"
            if options.limit
            else f"All limits of {action.whom} now count"
        )
        print(f"{counts} from zero (id {made_as}).")
    else:
        print(f"{action.whom} has no limits in {config.path.name}: the reset is booked (id {made_as}), no more.")


def signed_usd(usd: float) -> str:
    """Return an amount such as -$3.50, to the billionth of a dollar."""
    text = re.sub(r"(\.\d\d\d*?)0+$", r"\1", f"{usd:+,.9f}")
    return f"{text[0]}${text[1:]}"


def command_usage_adjust(options: argparse.Namespace) -> None:
    """Add to what was spent, or take away from it (negative amounts)."""
    action = AdjustUsage(
        *corrected(options), options.note, options.usd, options.tokens, options.requests, id=options.id
    )
    if not (action.usd or action.tokens or action.requests):
        raise CommandError("say what to adjust, by how much other than 0: --usd, --tokens or --requests")
    made = correct(action, Config.load(options.config))
    if made is None:
        return
    made_as, team = made
    counts = {"tokens": action.tokens, "requests": action.requests}
    amounts = [f"{amount:+} {unit}" for unit, amount in counts.items() if amount]
    if action.usd:
        amounts.insert(0, signed_usd(action.usd))
    counted = [action.whom]
    if team and action.scope == "key":
        counted.append(f"team {team}")
    if action.scope != "gateway":
        counted.append("the gateway")
    print(f"Adjusted by {', '.join(amounts)}: {', '.join(counted)} (id {made_as}).")


def command_usage_verify(options: argparse.Namespace) -> None:
    """Find the first line of the ledger that was changed, removed or inserted; compare the index with the lines."""
    files = books(options.config)
    try:
        last = files.verify(options.seen, print)
    except BrokenChain as error:
        raise CommandError(str(error)) from None
    print(f"Every line follows from the one before. The last chain value is {last}")
    print("Keep it elsewhere: `usage verify --seen VALUE` proves later that nothing before it was rewritten.")
    if not (files.directory / Index.FILE).exists():
        print("There is no index to compare with the lines: the next start makes one.")
        return
    try:
        os.close(hold_folder(files.directory))
    except BlockingIOError:
        print("The index was not compared with the lines: a gateway runs on it.")
        return
    secret = Vault.open(options.config.parent).index_secret
    index = Index(
        files.directory,
        Calendar(time_zone_of(Document(read_text(options.config), options.config))),
        Clock().wall(),
        secret,
    )
    index.open()
    differences = index.differences()
    index.close()
    if differences:
        Index.remove(files.directory)
        found = f"{differences[0]} and {len(differences)} places in all"
        raise CommandError(
            f"the index differed from the lines in {found}. It was deleted: the next start counts all lines"
        )
    print("The index has what the lines add up to.")


def command_usage_archive(options: argparse.Namespace) -> None:
    """Gzip the months that are over; they go on counting in limits and reports."""
    files = books(options.config)
    try:
        count = files.archive(functools.partial(print, flush=True))
    except OSError as error:
        raise CommandError(f"cannot archive in {files.directory}: {why_not(error)}") from None
    if count:
        print(f"Months gzipped: {count}.")
    elif len(files.paths()) > 1:
        print("Nothing to do: every month but the newest is gzipped already.")
    else:
        print("Nothing to do: the ledger has no month but the newest.")


@contextlib.contextmanager
def standard(stream: IO[str], mode: str) -> Iterator[IO[bytes]]:
    """The bytes of stdin or stdout. Raises CommandError for a terminal."""
    if stream.isatty():
        raise CommandError("a backup is no text for a terminal: redirect it, or name a file")
    with open(os.dup(stream.fileno()), mode) as file:
        yield cast(IO[bytes], file)


def command_backup(options: argparse.Namespace) -> None:
    """Copy config, sealing secret and ledger into one file, as they are at one moment; the gateway may be running."""
    directory = books(options.config).directory
    files = {"config.yaml": read_text(options.config).encode()}
    secret = Vault.file(options.config.parent)
    if secret and secret.exists() and not options.without_secret:
        files[Vault.FILE] = secret.read_bytes()
    name = f"claude-gateway-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.gz"
    to = options.file or str(options.config.with_name(name))
    try:
        with standard(sys.stdout, "wb") if to == "-" else new_file(Path(to).absolute()) as out:
            manifest, members = write_backup(out, files, directory)
    except OSError as error:
        raise CommandError(f"no backup was written to {'stdout' if to == '-' else to}: {why_not(error)}") from None
    if Vault.FILE not in files:
        print("note: the sealing secret, without which no upstream's key can be read, is not in it", file=sys.stderr)
    found = ", ".join(member.name for member in members[1:])
    size = sum(member.size for member in members)
    told = f"{to}: {found}; {size:,} bytes before packing; the last chain value is {manifest.chain or 'not known'}"
    print(told, file=sys.stderr if to == "-" else sys.stdout)


def command_restore(options: argparse.Namespace) -> None:
    """Put a backup in place, after checking all of it; the gateway must not be running."""
    if is_mounted(options.config):
        remedy = "mount its folder instead; nothing was restored"
        raise CommandError(f"{options.config} is mounted as a single file, and cannot be replaced: {remedy}")
    try:
        with standard(sys.stdin, "rb") if options.file == "-" else open(options.file, "rb") as file:
            told = restore(file, options.config, options.force)
    except BlockingIOError:
        raise CommandError("a gateway runs on this ledger: stop it first; nothing was restored") from None
    except DAMAGED as error:
        raise CommandError(f"{options.file} is damaged, or no backup: {error}; nothing was restored") from None
    except OSError as error:
        where = error.filename or f"{options.file} to {options.config.parent}"
        raise CommandError(f"cannot restore {where}: {why_not(error)}; nothing was restored") from None
    print("\n".join(told))


def command_upstream_reset(options: argparse.Namespace) -> None:
    """Let an upstream that is left alone be asked again at once."""
    perform(ResetUpstream(options.name), Config.load(options.config))
    print(f"{options.name}: cooldowns and failure counts were reset; it is asked again.")


def bounded(read: Callable[[str], float], most: float, expected: str) -> Callable[[str], float]:
    """A type of a command's argument: a number of at most `most`, or as much below zero."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if abs(read(text)) <= most:
                return read(text)
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


USD = bounded(float, MOST_USD, f"dollars such as -3.50, at most {MOST_USD:,.0f} either way")
COUNT = bounded(int, MOST_COUNT, f"a whole number such as 1000, at most {MOST_COUNT:,} either way")
WAIT = bounded(Duration.parse, 3600, "a duration such as 30s, at most 1h")


def takes(*names: str, **more: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An argument of a command, as `add_argument` has it; without a word for what it takes it is a switch."""
    if "metavar" not in more and "action" not in more:
        more["action"] = "store_true"
    return names, more


ONE_KEY = takes("name", metavar="NAME", help="the key's name in config.yaml")
ID_HELP = "repeat a command that got no answer, under the id that it printed: it is booked once"
JSON = takes("--json", help="print JSON instead of a table")
WHOSE = (  # limits are corrected
    takes("key", nargs="?", metavar="KEY", help="the limits of this key, by its name"),
    takes("--team", metavar="TEAM", help="the limits of a team"),
    takes("--gateway", help="the limits of the whole gateway"),
    takes("--note", default="", metavar="TEXT", help="why; stands in the ledger"),
    takes("--id", default="", metavar="ID", help=ID_HELP),
)
BACKUP_HELP = "default: claude-gateway-TIME.tar.gz beside the config; - for stdout"
MODEL_HELP = "default: the first in `models`, else the cheapest that is listed"
BY_HELP = f"groups, of {', '.join(USAGE_GROUPS)} (default: %(default)s)"
COMMANDS: dict[str, list[Any]] = {  # what runs, or the help where there are only others below it; then what it takes
    "serve": [command_serve],
    "init": [command_init],
    "check": [
        command_check,
        takes("--integrity", action="store_const", dest="run", const=command_check_integrity, help=INTEGRITY_HELP),
    ],
    "key": ["Add, list, rotate and revoke keys."],
    "key add": [
        command_key_add,
        takes("name", metavar="NAME", help="whose key it is; reports and limits use it"),
        takes("--team", default="", metavar="NAME", help="its team, one of `teams` in config.yaml"),
        takes("--limit", action="append", default=[], metavar="UNIT/WINDOW=AMOUNT", help="such as usd/day=20"),
        takes("--model", action="append", default=[], metavar="GLOB", help='such as "claude-*"'),
        takes("--expires", default="", metavar="DATE", help="the last day on which it works, such as 2027-01-31"),
    ],
    "key list": [command_key_list],
    "key rotate": [command_key_rotate, ONE_KEY],
    "key revoke": [command_key_revoke, ONE_KEY],
    "seal": [command_seal, takes("--rotate", help="encrypt what is sealed again, with the newest secret")],
    "upstream": ["Test upstreams, and let them be asked again."],
    "upstream test": [
        command_upstream_test,
        takes("name", nargs="?", default="", metavar="NAME", help="only this upstream"),
        takes("--model", default="", metavar="MODEL", help=MODEL_HELP),
        takes("--timeout", type=WAIT, default=30.0, metavar="TIME", help="for each key; default: 30s"),
        takes("--json", help="print one JSON document at the end instead of lines"),
    ],
    "upstream reset": [
        command_upstream_reset,
        takes("name", metavar="NAME", help="the upstream's name in config.yaml"),
    ],
    "usage": [
        command_usage,
        takes("--by", default="day,key,model", metavar="BY", help=BY_HELP),
        takes("--since", default="", metavar="TIME", help="first time, such as 2026-11 or 2026-11-21 (UTC)"),
        takes("--until", default="9", metavar="TIME", help="first time no longer counted"),
        JSON,
        takes("--csv", help="print CSV instead of a table"),
    ],
    "usage reconcile": [
        command_reconcile,
        takes("file", type=Path, metavar="FILE", help="CSV from Anthropic's Console or OpenAI's dashboard"),
        takes("--upstream", default="", metavar="NAME", help="only our calls to this upstream"),
        takes("--json", default=argparse.SUPPRESS, help=JSON[1]["help"]),
    ],
    "usage reset": [
        command_usage_reset,
        *WHOSE,
        takes("--limit", default="", metavar="UNIT/WINDOW", help="such as usd/day; default: all"),
    ],
    "usage adjust": [
        command_usage_adjust,
        *WHOSE,
        takes("--usd", type=USD, default=0.0, metavar="N", help="such as -3.50"),
        takes("--tokens", type=COUNT, default=0, metavar="N", help="counted as input"),
        takes("--requests", type=COUNT, default=0, metavar="N", help="such as -1"),
    ],
    "usage verify": [
        command_usage_verify,
        takes("--seen", default="", metavar="VALUE", help="a chain value that an earlier verify printed"),
    ],
    "usage archive": [command_usage_archive],
    "backup": [
        command_backup,
        takes("file", nargs="?", default="", metavar="FILE", help=BACKUP_HELP),
        takes("--without-secret", help="leave out the sealing secret, to keep it apart"),
    ],
    "restore": [
        command_restore,
        takes("file", metavar="FILE", help="what `backup` wrote; - for stdin"),
        takes("--force", help="keep what is there in before-restore-TIME/ beside it"),
    ],
}


def arguments() -> argparse.ArgumentParser:
    """The command line. --config and --log-level may stand anywhere in it."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", type=Path, metavar="PATH", help="default: GATEWAY_CONFIG, else config.yaml")
    common.add_argument("--log-level", choices=["debug", "info", "warning", "error"], help="default: info")
    about = "A self-hosted gateway for Claude Code. Without a command it serves."
    parser = argparse.ArgumentParser(prog=PROGRAM, parents=[common], description=about)
    parser.add_argument("--version", action="version", version=f"claude-gateway {VERSION}")
    below: dict[str, Any] = {"": parser.add_subparsers(title="commands", metavar="COMMAND")}
    for words, (run, *taken) in COMMANDS.items():
        above, _, name = words.rpartition(" ")
        about = run if isinstance(run, str) else run.__doc__
        made = below[above].add_parser(name, parents=[common], help=about, description=about)
        if callable(run):
            made.set_defaults(run=run)
        for names, more in taken:
            made.add_argument(*names, **more)
        if any(other.startswith(f"{words} ") for other in COMMANDS):
            below[words] = made.add_subparsers(title="commands", metavar="COMMAND", required=not callable(run))
    return parser


def open_missing_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr the null device in their place.

    Else the next file or socket that is opened gets their number, and what is printed goes into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - for the whole life of the process
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


class Terminal:
    """stdout or stderr of a command, safe to look at whatever is printed.

    Config, ledger and exports hold names that others have chosen, and an escape sequence in one could hide or forge
    lines of a terminal. So all but the line feeds goes through `printable`, and what the stream's encoding lacks is
    written as `\\xfc`. A stream that takes nothing gets nothing more, not even when the process ends.
    """

    def __init__(self, stream: IO[str], name: str) -> None:
        self._stream, self._name = stream, name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text. Raises OSError with the stream's name."""
        self._do(lambda: self._stream.write("\n".join(printable(line, len(line)) for line in text.split("\n"))))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered. Raises OSError with the stream's name."""
        self._do(self._stream.flush)

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            error.filename = self._name
            raise


def config_path(named: Path | None) -> Path:
    """The config's path: the option's, the environment's, or the working directory's. Raises CommandError."""
    path = named or Path(os.environ.get("GATEWAY_CONFIG") or "config.yaml")
    try:
        return path.absolute()
    except FileNotFoundError:
        raise CommandError("the working directory is not there any more: go to one that is (cd)") from None


def check_arguments(argv: Sequence[str]) -> None:
    """Refuse what can neither be kept in a file nor be shown. Raises CommandError."""
    for argument in argv:
        if re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", argument):
            raise CommandError(f"expected arguments of one line, in UTF-8, got {printable(ascii(argument))}")


def run_command(argv: Sequence[str]) -> int:
    """Parse the arguments and run their command; the exit code. Whatever goes wrong, a person reads one sentence."""
    options = argparse.Namespace(run=command_serve, config=None, log_level="info")
    try:
        check_arguments(argv)
        try:
            arguments().parse_args(argv, options)
        finally:
            sys.stdout.flush()  # after --help and --version
        options.is_config_named = options.config is not None
        options.config = config_path(options.config)
        options.log_writer = start_logging(options.log_level.upper())
        code: int | None = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ConfigError, CommandError, SealError) as error:
        sentence = str(error)
    except OSError as error:
        sentence = f"{error.filename}: {why_not(error)}" if error.filename else why_not(error)
    except Exception as error:
        log.log(logging.ERROR if options.run is command_serve else logging.DEBUG, "a bug", exc_info=error)
        what = f"{type(error).__name__}: {printable(str(error), 200)}"
        sentence = f"a bug in this program ({what}); with --log-level debug before the command it says where"
    else:
        return code or 0
    print(f"error: {sentence}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the process's exit code."""
    open_missing_streams()
    stdout, stderr = Terminal(sys.stdout, "stdout"), Terminal(sys.stderr, "stderr")
    with contextlib.redirect_stdout(cast(IO[str], stdout)), contextlib.redirect_stderr(cast(IO[str], stderr)):
        return run_command(sys.argv[1:] if argv is None else argv)


if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as above the imports
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    sys.exit(main())

"""`gateway.py upstream test`: what it asks, what it says, and what it never shows."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import KEY, UPSTREAM_KEY, config_text
from upstream import (
    ConnectProxy,
    Request,
    ScriptedUpstream,
    Step,
    chat_chunk,
    chat_done,
    chat_hello,
    close,
    end,
    error_event,
    head,
    json_body,
    message_start,
    raw,
    stall,
    stream_of,
    text,
)

import gateway as g

PASSWORD = "pass-word-0123456789"
CLOCK = g.Clock(time.time, lambda: 0.0)  # every step takes 0 ms
MODELS = json_body({"data": [{"id": "gpt-6-luna"}, {"id": "claude-opus-5-5"}, {"id": "claude-haiku-4-5"}]})


class Terminal:
    """What a test of an upstream told."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "config.yaml"
        self.lines: list[str] = []

    async def run(self, text: str, model: str = "", timeout_s: float = 10.0) -> list[g.Tried]:
        """Test the only upstream of a config."""
        self._path.write_text(text)
        config = g.Config.load(self._path, CLOCK)
        found: list[g.Tried] = []
        await g.UpstreamTest(config, config.upstreams[0], model, timeout_s).run(found.append)
        for tried in found:
            model = f"{tried.model}: " if tried.model else ""
            self.lines.append(f"  key {tried.key}  {tried.state:6}  {tried.ms:>7,.0f} ms  {model}{tried.detail}")
        return found


@pytest.fixture
def terminal(tmp_path) -> Terminal:
    return Terminal(tmp_path)


@pytest.fixture
def secure(io_loop) -> Iterator[ScriptedUpstream]:
    """A scripted upstream that speaks TLS."""
    scripted = ScriptedUpstream(tls=True)
    io_loop.run_sync(scripted.start)
    yield scripted
    io_loop.run_sync(scripted.close)


def answers(stream: list[Step], models: list[Step] = MODELS) -> Callable[[Request], list[Step]]:
    """A script: the list of models for GET, a stream for POST."""
    return lambda request: models if request.method == "GET" else stream


def port_of(url: str) -> str:
    return url.rpartition(":")[2]


def refused(status: int, message: str) -> list[Step]:
    return json_body({"type": "error", "error": {"type": "some_error", "message": message}}, status)


async def command(folder: Path, *arguments: str) -> int:
    """Run the command as the terminal does, beside the scripted upstream."""
    return await asyncio.to_thread(g.main, ["--config", str(folder / "config.yaml"), "upstream", "test", *arguments])


async def test_a_good_upstream_is_told_in_a_line(terminal, upstream):
    """
    The cheapest listed model, what a call of it took and cost.
    """
    upstream.script = answers(stream_of("Hello"))

    tried = await terminal.run(config_text(upstream.url, ", models: ['claude-*']"))

    assert terminal.lines == ["  key 1  ok            0 ms  claude-haiku-4-5: 12 tokens in, 5 out, $0.000037"]
    assert tried == [
        g.Tried(
            key=1,
            state="ok",
            detail="12 tokens in, 5 out, $0.000037",
            model="claude-haiku-4-5",
            status=200,
            input_tokens=12,
            output_tokens=5,
            cost_usd=0.000037,
        )
    ]
    assert upstream.connections == 1


async def test_the_call_is_a_real_one_by_the_rules_of_the_config(terminal, upstream):
    """
    Key, prefix, header rules and the renaming of models are those that users' calls meet.
    """
    upstream.script = answers(stream_of("Hello"))
    rules = ", models: {fast: claude-big, 'claude-*': '*'}, headers: {set: {x-team: blue}, remove: [user-agent]}"

    await terminal.run(config_text(upstream.url + "/base/v1", rules))

    (asked,) = upstream.requests
    assert (asked.method, asked.target) == ("POST", "/base/v1/messages")
    assert asked.header == {
        "host": f"127.0.0.1:{port_of(upstream.url)}",
        "content-length": str(len(asked.body)),
        "accept-encoding": "identity",
        "x-api-key": UPSTREAM_KEY,
        "content-type": "application/json",
        "anthropic-version": "2023-06-01",
        "x-team": "blue",
    }
    assert asked.json == {
        "model": "claude-big",
        "max_tokens": 16,
        "messages": [{"role": "user", "content": "Say hello."}],
        "stream": True,
    }


async def test_a_certificate_that_nobody_vouches_for_fails_with_the_remedy(terminal, secure):
    """
    Without `ca_file` the handshake fails, no key is sent, and the line says what would help; with it all is well.
    """
    secure.script = answers(stream_of("Hello"))

    await terminal.run(config_text(secure.url))
    asked = len(secure.requests)
    (tried,) = await terminal.run(config_text(secure.url, f', ca_file: "{secure.ca_file}"'))

    assert terminal.lines[0].startswith(
        "  key 1  FAILED        0 ms  could not be reached: [SSL: CERTIFICATE_VERIFY_FAILED]"
    )
    assert (asked, tried.state) == (0, "ok")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_the_way_through_a_proxy_is_the_real_one(terminal, upstream, secure, tls):
    """
    With `proxy:` the connection is a CONNECT, TLS stands inside it, and its password is not shown.
    """
    target, proxy = secure if tls else upstream, ConnectProxy()
    await proxy.start()
    target.script = answers(stream_of("Hello"))
    via = proxy.url.replace("http://", f"http://user:{PASSWORD}@")

    (tried,) = await terminal.run(config_text(target.url, f", proxy: '{via}', ca_file: '{secure.ca_file}'"))

    host = target.url.partition("://")[2]
    assert (tried.state, set(proxy.lines)) == ("ok", {f"CONNECT {host} HTTP/1.1"})
    assert PASSWORD not in "".join(terminal.lines)
    await proxy.close()


async def test_of_two_keys_the_refused_one_is_told_by_its_number(terminal, upstream):
    """
    A 401 is said in words, with the upstream's own message; the key itself is not, though the upstream echoes it.
    """
    good, bad = "sk-good-0123456789", "sk-bad-0123456789"

    def script(request: Request) -> list[Step]:
        if request.header["x-api-key"] == bad:
            return refused(401, f"invalid key {bad}\x1b[31m")
        return MODELS if request.method == "GET" else stream_of("Hello")

    upstream.script = script
    await terminal.run(config_text(upstream.url).replace(UPSTREAM_KEY, f"[{bad}, {good}]"))

    assert terminal.lines == [
        '  key 1  FAILED        0 ms  the list of models: 401: {"type": "error", "error": {"type": "some_error", '
        '"message": "invalid key [secret]\\u001b[31m"}}; --model NAME passes it by',
        "  key 2  ok            0 ms  gpt-6-luna: 12 tokens in, 5 out, $0.000004",
    ]


async def test_openai_is_asked_in_its_format_for_the_cheapest_model(terminal, upstream):
    """
    Chat completions with their usage.
    """
    upstream.script = answers(chat_hello(stream=True))
    await terminal.run(config_text(upstream.url, ", format: openai"))

    assert terminal.lines == ["  key 1  ok            0 ms  gpt-6-luna: 12 tokens in, 5 out, $0.000004"]
    assert upstream.requests[-1].target == "/v1/chat/completions"
    assert upstream.requests[-1].header["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert upstream.requests[-1].json == {
        "model": "gpt-6-luna",
        "messages": [{"role": "user", "content": "Say hello."}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_the_demo_answers_without_a_key(terminal):
    """
    The built-in upstream is tested as others are.
    """
    await terminal.run(f"upstreams: [{{name: demo, format: demo}}]\nkeys: [{{name: me, key: {KEY}}}]\n")

    assert terminal.lines == ["  key 1  ok            0 ms  claude-demo: 10 tokens in, 16 out, $0.000900"]


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://127.0.0.1:{port}", "could not be reached: Connection refused"),
        (
            "http://2852039166:{port}",
            "could not be reached: 2852039166 leads to 169.254.169.254, "
            "a link-local or metadata address: see allow_private",
        ),
    ],
)
async def test_who_cannot_be_reached_is_told_with_the_reason(terminal, upstream, url, line):
    """
    And with what helps.
    """
    await terminal.run(config_text(url.format(port=upstream.refuse())), model="claude-test")

    assert terminal.lines == [f"  key 1  FAILED        0 ms  claude-test: {line}"]


@pytest.mark.parametrize(
    ("models", "line"),
    [
        (
            json_body(["gpt"]),
            "`models` has only globs and the upstream's list of models gave none: name one with --model",
        ),
        (
            json_body("out of\norder", 500),
            'the list of models: 500: "out of\\norder"; --model NAME passes it by',
        ),
        ([raw(b"\x00 no HTTP")], "sent something that is not HTTP"),
    ],
    ids=["another shape", "broken", "no HTTP"],
)
async def test_who_lists_no_models_is_asked_for_one_by_its_name(terminal, upstream, models, line):
    """
    Many compatible servers list nothing. An error is one all the same.
    """
    upstream.script = answers(stream_of("Hello"), models)

    await terminal.run(config_text(upstream.url))
    await terminal.run(config_text(upstream.url), model="claude-haiku-4-5")

    assert terminal.lines == [
        f"  key 1  FAILED        0 ms  {line}",
        "  key 1  ok            0 ms  claude-haiku-4-5: 12 tokens in, 5 out, $0.000037",
    ]


HTML = [head(200, "text/html", content_length="27"), raw(b"<html>Please log in.</html>")]


@pytest.mark.parametrize(
    ("stream", "line"),
    [
        (HTML, "sent something that is no answer: <html>Please log in.</html>"),
        (json_body("x" * 400, 529), '529: "' + "x" * 299),
        (
            [head(200, "text/event-stream"), message_start(12), text("Hel"), close()],
            "closed the connection before its answer was whole",
        ),
        (
            [head(200, "text/event-stream"), message_start(12), text("Hel"), end()],
            "closed the connection before its answer was whole",
        ),
        (
            [head(200, "text/event-stream"), message_start(12), text("Hel"), error_event("api_error", "Oh."), end()],
            'answered with an error: *"message": "Oh."}}',
        ),
        ([close()], "closed the connection before its answer was whole"),
    ],
    ids=["HTML", "overloaded", "cut", "without its end", "error event", "nothing"],
)
async def test_a_stream_that_is_none_fails_with_what_the_upstream_said(terminal, upstream, stream, line):
    """
    Status, then the upstream's own words, 300 characters of them; a cut stream looks cut here, too.
    """
    upstream.script = answers(stream)

    await terminal.run(config_text(upstream.url), model="claude-test")

    (told,) = terminal.lines
    assert fnmatch.fnmatchcase(told, f"  key 1  FAILED        0 ms  claude-test: {line}")


async def test_a_silent_upstream_is_waited_for_only_so_long(terminal, upstream):
    """
    --timeout bounds what each key takes, and ends the upstream's work.
    """
    upstream.script = answers([head(200, "text/event-stream"), message_start(12), stall()])

    await terminal.run(config_text(upstream.url), model="claude-test", timeout_s=0.2)

    assert terminal.lines == ["  key 1  FAILED        0 ms  claude-test: no answer within 0.2 s"]
    await upstream.closed_by_peer()


@pytest.mark.parametrize(
    ("more", "model", "line"),
    [
        (", models: ['claude-*']", "gpt-x", "gpt-x: it is not served here: see `models`"),
        (
            ", models: ['llama-*']",
            "",
            "`models` has only globs and the upstream's list of models gave none: name one with --model",
        ),
        ("", "x" * 300, f"{'x' * 300}: model: expected at most 256 printable characters"),
    ],
)
async def test_without_a_model_nobody_can_be_asked(terminal, upstream, more, model, line):
    """
    What real calls would be refused for is said instead of tried.
    """
    upstream.script = answers(stream_of("Hello"))

    await terminal.run(config_text(upstream.url, more), model=model)

    assert terminal.lines == [f"  key 1  FAILED        0 ms  {line}"]
    assert [request.method for request in upstream.requests] == ([] if model else ["GET"])


async def test_a_chat_stream_without_usage_adds_nothing_to_the_cost(terminal, upstream):
    """
    What the upstream did not count is not summed up.
    """
    stream = [head(200, "text/event-stream"), chat_chunk("Hello"), chat_chunk("", "stop"), chat_done(), end()]
    upstream.script = answers(stream)

    (tried,) = await terminal.run(config_text(upstream.url, ", format: openai"))

    assert (tried.state, tried.cost_usd) == ("ok", 0.0)


# The command


async def test_the_command_sums_up_and_books_nothing(tmp_path, upstream, capsys):
    """
    The last line counts keys and names the cost; the ledger does not learn of it. One failure: exit code 1.
    """
    upstream.script = answers(stream_of("Hello"))
    good = config_text(upstream.url, ", models: [claude-haiku-4-5]")
    bad = f"upstreams:\n  - {{name: dead, url: 'http://127.0.0.1:{upstream.refuse()}'}}\n"
    (tmp_path / "config.yaml").write_text(good.replace("upstreams:\n", bad))

    codes = [
        await command(tmp_path),
        await command(tmp_path, "main", "--timeout", "5s"),
        await command(tmp_path, "dead", "--timeout", "5s"),
    ]

    lines = capsys.readouterr().out.splitlines()
    assert codes == [1, 0, 1]
    assert [line for line in lines if "answered (" in line] == [
        "1 of 2 keys answered (not booked; cost about $0.000037 in all)",
        "1 of 1 keys answered (not booked; cost about $0.000037 in all)",
        "0 of 1 keys answered (not booked)",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


async def test_as_json_the_report_says_the_same(tmp_path, upstream, capsys):
    """
    For monitoring: one document with every key and the sums, and nothing else on stdout.
    """
    upstream.script = answers(stream_of("Hello"))
    (tmp_path / "config.yaml").write_text(config_text(upstream.url))

    code = await command(tmp_path, "--json", "--model", "claude-haiku-4-5")

    report = json.loads(capsys.readouterr().out)
    (tested,) = report.pop("upstreams")
    (key,) = tested.pop("keys")
    assert (code, report) == (0, {"keys": 1, "answered": 1, "cost_usd": 0.000037, "ok": True})
    assert tested == {"name": "main", "url": upstream.url, "cooldowns": []}
    assert key.pop("ms") > 0
    assert key == {
        "key": 1,
        "state": "ok",
        "detail": "12 tokens in, 5 out, $0.000037",
        "model": "claude-haiku-4-5",
        "status": 200,
        "input_tokens": 12,
        "output_tokens": 5,
        "cost_usd": 0.000037,
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["mein"], "error: there is no upstream named 'mein', did you mean main?\n"),
        (["xyz"], "error: there is no upstream named 'xyz'; there are: main\n"),
    ],
)
async def test_an_unknown_name_is_told_with_what_was_meant(tmp_path, upstream, capsys, arguments, error):
    """
    A slip of the keyboard asks nobody.
    """
    (tmp_path / "config.yaml").write_text(config_text(upstream.url))

    code = await command(tmp_path, *arguments)

    assert (code, capsys.readouterr().err, upstream.requests) == (1, error, [])


@pytest.mark.parametrize("timeout", ["0", "soon", "2h"])
def test_a_timeout_that_is_none_is_refused(timeout, capsys):
    """
    A call is bounded, by an hour at most.
    """
    with pytest.raises(SystemExit) as exit_:
        g.main(["upstream", "test", "--timeout", timeout])

    assert exit_.value.code == 2
    assert "argument --timeout: expected " in capsys.readouterr().err

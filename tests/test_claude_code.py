"""The real Claude Code, through the gateway: `tests/claude_code.sh` installs it; without it these tests are skipped."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from conftest import KEY, passing_time
from upstream import (
    Request,
    Step,
    block_start,
    close,
    end,
    error_event,
    head,
    json_body,
    message_json,
    message_start,
    ping,
    raw,
    reset_peer,
    stall,
    stream_of,
    text,
    tool_use,
)


def installed() -> Path | None:
    """The program: $CLAUDE_CODE, else where tests/claude_code.sh puts it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"claude-code-{platform.system().lower()}-{machine}"
    folder = cache / "claude-gateway-tests" / "claude-code" / "node_modules" / "@anthropic-ai" / name
    program = Path(os.environ.get("CLAUDE_CODE") or folder / "claude")
    return program if os.access(program, os.X_OK) else None


PROGRAM = installed()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Claude Code is not installed: tests/claude_code.sh does it")


StartClaude = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
def claude(io_loop, gateway, tmp_path) -> Iterator[StartClaude]:
    """Start Claude Code with nothing of this machine's settings; what still runs when a test ends is killed."""
    started: list[asyncio.subprocess.Process] = []

    async def start(*arguments: str, key: str = KEY) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            str(PROGRAM),
            *arguments,
            cwd=tmp_path,
            env=environment(tmp_path, gateway.port, key),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            io_loop.run_sync(process.communicate)


def environment(home: Path, port: int, key: str) -> dict[str, str]:
    """What a user of the gateway sets, and nothing of this machine's."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(home / ".claude"),
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}",
        "ANTHROPIC_AUTH_TOKEN": key,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_AUTOUPDATER": "1",
    }


async def said(process: asyncio.subprocess.Process) -> str:
    """What the terminal shows by the end."""
    output, _ = await process.communicate()
    return output.decode()


def by_request(answer: Callable[[Request], list[Step]]) -> Callable[[Request], list[Step]]:
    """Answer turns by `answer`, and anything that is no stream (the fallback after a failed one) with a message."""
    return lambda request: answer(request) if request.json.get("stream") else message_json("said without a stream")


async def test_a_text_turn(claude, gateway, upstream):
    """
    The text arrives, and the call is in the ledger with its session.
    """
    upstream.script = by_request(lambda request: stream_of("Hello from ", "upstream"))

    output = await said(await claude("-p", "say hi"))

    assert output.strip() == "Hello from upstream"
    (entry,) = gateway.entries()
    assert (entry["outcome"], entry["input_tokens"], entry["output_tokens"]) == ("completed", 12, 5)
    assert entry["user_agent"].startswith("claude-cli/") and len(entry["session"]) == 36


async def test_a_tool_turn(claude, gateway, upstream):
    """
    Claude Code runs the tool that the upstream asks for and sends its result back.
    """

    def answer(request: Request) -> list[Step]:
        if b"tool_result" in request.body:
            return stream_of("The tool has run.")
        return tool_use("Bash", {"command": "echo from-the-$((40 + 2))", "description": "say it"})

    upstream.script = by_request(answer)

    output = await said(await claude("-p", "run it", "--allowedTools", "Bash"))

    assert output.strip() == "The tool has run."
    assert b"from-the-42" in upstream.requests[-1].body
    assert [entry["outcome"] for entry in gateway.entries()] == ["completed", "completed"]


async def test_a_cancelled_turn(claude, gateway, upstream):
    """
    Ctrl-C ends the upstream's work, and what was seen is booked.
    """
    upstream.script = [head(200, "text/event-stream"), message_start(12), block_start(), text("Hel"), stall()]
    process = await claude("-p", "say hi", "--output-format", "stream-json", "--verbose", "--include-partial-messages")
    async for line in process.stdout:
        if b'"Hel"' in line:  # the client has it, not only the gateway
            break

    process.send_signal(signal.SIGINT)

    await upstream.closed_by_peer()
    await said(process)
    await gateway.settled()
    (entry,) = gateway.entries()
    assert (entry["outcome"], entry["input_tokens"], entry["estimated"]) == ("client_gone", 12, True)
    assert len(upstream.requests) == 1


async def test_a_wrong_key_stops_the_client_at_its_first_request(claude, gateway, upstream, caplog):
    """
    No eleven requests and no three minutes: one refusal, whose words the user reads.
    """
    caplog.set_level("INFO")

    async with asyncio.timeout(20):
        output = await said(await claude("-p", "say hi", key="sk-proxy-wrong-0123456789"))

    assert "API Error: 401 This gateway does not know the key that was sent." in output
    assert sum("refused: 401" in record.getMessage() for record in caplog.records) == 1
    assert upstream.requests == []


async def test_an_upstream_that_dies_in_mid_stream_does_not_pass_for_an_answer(claude, gateway, upstream):
    """
    Claude Code sees the cut, asks again on its own, and shows the second answer, not half of the first.
    """
    dying = [head(200, "text/event-stream"), message_start(12), block_start(), text("half of a sen"), reset_peer()]
    upstream.scripts = [dying]
    upstream.script = by_request(lambda request: stream_of("a whole sentence"))

    output = await said(await claude("-p", "say hi"))
    await gateway.settled()

    assert output.strip() in ("a whole sentence", "said without a stream")
    assert [entry["outcome"] for entry in gateway.entries()] == ["upstream_cut", "completed"]
    assert len(upstream.requests) == 2


async def test_an_upstream_that_fails_in_three_ways_before_its_content_is_not_seen(claude, gateway, upstream, caplog):
    """
    529, a drop in mid-head, an error event before content: the tool turn completes, in one request for each turn.
    """
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    faults = [
        json_body(overloaded, status=529),
        [raw(b"HTTP/1.1 200 OK\r\ncontent-ty"), close()],
        [head(200, "text/event-stream"), message_start(12), ping(), error_event("api_error", "no"), end()],
    ]

    def answer(request: Request) -> list[Step]:
        if faults:
            return faults.pop(0)
        if b"tool_result" in request.body:
            return stream_of("The tool has run.")
        return tool_use("Bash", {"command": "echo from-the-$((40 + 2))", "description": "say it"})

    upstream.script = by_request(answer)
    await gateway.write(gateway.path.read_text().replace("max_attempts: 1, breaker: {failures: 1000}", ""))

    async with passing_time(gateway):
        output = await said(await claude("-p", "run it", "--allowedTools", "Bash"))

    assert output.strip() == "The tool has run."
    assert b"from-the-42" in upstream.requests[-1].body
    calls = [entry for entry in gateway.entries() if entry["type"] == "call"]
    assert [[attempt["outcome"] for attempt in call["attempts"]] for call in calls] == [
        ["529", "cut", "500", "completed"],
        ["completed"],
    ]
    assert len(upstream.requests) == 5
    caplog.clear()


async def test_a_session_goes_on_with_json_output(claude, gateway, upstream):
    """
    With `--output-format json` the client reports the very usage that the ledger has.
    """
    upstream.script = by_request(lambda request: stream_of("fine"))

    output = json.loads(await said(await claude("-p", "say hi", "--output-format", "json")))

    entry = gateway.entries()[-1]
    assert (output["result"], output["session_id"]) == ("fine", entry["session"])
    assert (output["usage"]["input_tokens"], output["usage"]["output_tokens"]) == (12, 5)

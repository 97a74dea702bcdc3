"""The real Claude Code, through the gateway: `tests/claude_code.sh` installs it; without it these tests are skipped."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import KEY
from upstream import (
    Request,
    Step,
    block_start,
    head,
    message_json,
    message_start,
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


async def claude(gateway, home: Path, *arguments: str, key: str = KEY) -> asyncio.subprocess.Process:
    """Start Claude Code with a prompt, as CLIENT's users do, with nothing of this machine's settings."""
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(home / ".claude"),
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{gateway.port}",
        "ANTHROPIC_AUTH_TOKEN": key,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    return await asyncio.create_subprocess_exec(
        str(PROGRAM),
        *arguments,
        cwd=home,
        env=environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def said(process: asyncio.subprocess.Process) -> str:
    """What the terminal shows by the end."""
    output, _ = await process.communicate()
    return output.decode()


def by_request(answer: Callable[[Request], list[Step]]) -> Callable[[Request], list[Step]]:
    """Answer turns by `answer`, and anything that is no stream (the fallback after a failed one) with a message."""
    return lambda request: answer(request) if request.json.get("stream") else message_json("said without a stream")


async def test_a_text_turn(gateway, upstream, tmp_path):
    """
    The text arrives, and the call is in the ledger with its session.
    """
    upstream.script = by_request(lambda request: stream_of("Hello from ", "upstream"))

    output = await said(await claude(gateway, tmp_path, "-p", "say hi"))

    assert output.strip() == "Hello from upstream"
    (entry,) = gateway.entries()
    assert (entry["outcome"], entry["input_tokens"], entry["output_tokens"]) == ("completed", 12, 5)
    assert entry["user_agent"].startswith("claude-cli/") and len(entry["session"]) == 36


async def test_a_tool_turn(gateway, upstream, tmp_path):
    """
    Claude Code runs the tool that the upstream asks for and sends its result back.
    """

    def answer(request: Request) -> list[Step]:
        if b"tool_result" in request.body:
            return stream_of("The tool has run.")
        return tool_use("Bash", {"command": "echo from-the-$((40 + 2))", "description": "say it"})

    upstream.script = by_request(answer)

    output = await said(await claude(gateway, tmp_path, "-p", "run it", "--allowedTools", "Bash"))

    assert output.strip() == "The tool has run."
    assert b"from-the-42" in upstream.requests[-1].body
    assert [entry["outcome"] for entry in gateway.entries()] == ["completed", "completed"]


async def test_a_cancelled_turn(gateway, upstream, tmp_path):
    """
    Ctrl-C ends the upstream's work, and what was seen is booked.
    """
    upstream.script = [head(200, "text/event-stream"), message_start(12), block_start(), text("Hel"), stall()]
    process = await claude(gateway, tmp_path, "-p", "say hi")
    await upstream.request_came()

    process.terminate()

    async with asyncio.timeout(10):
        await upstream.closed_by_peer()
    await said(process)
    await gateway.settled()
    assert (gateway.entries()[0]["outcome"], gateway.entries()[0]["input_tokens"]) == ("client_gone", 12)


async def test_a_wrong_key_stops_the_client_at_its_first_request(gateway, upstream, tmp_path, caplog):
    """
    No eleven requests and no three minutes: one refusal, whose words the user reads.
    """
    caplog.set_level("INFO")

    async with asyncio.timeout(20):
        output = await said(await claude(gateway, tmp_path, "-p", "say hi", key="sk-proxy-wrong-0123456789"))

    assert "API Error: 401 This gateway does not know the key that was sent." in output
    assert sum("refused: 401" in record.getMessage() for record in caplog.records) == 1
    assert upstream.requests == []


async def test_an_upstream_that_dies_in_mid_stream_does_not_pass_for_an_answer(gateway, upstream, tmp_path):
    """
    Claude Code sees the cut, asks again on its own, and shows the second answer, not half of the first.
    """
    dying = [head(200, "text/event-stream"), message_start(12), block_start(), text("half of a sen"), reset_peer()]
    upstream.scripts = [dying]
    upstream.script = by_request(lambda request: stream_of("a whole sentence"))

    output = await said(await claude(gateway, tmp_path, "-p", "say hi"))
    await gateway.settled()

    assert output.strip() in ("a whole sentence", "said without a stream")
    assert [entry["outcome"] for entry in gateway.entries()] == ["upstream_cut", "completed"]


async def test_a_session_goes_on_with_json_output(gateway, upstream, tmp_path):
    """
    With `--output-format json` the client reports the very usage that the ledger has.
    """
    upstream.script = by_request(lambda request: stream_of("fine"))

    output = json.loads(await said(await claude(gateway, tmp_path, "-p", "say hi", "--output-format", "json")))

    entry = gateway.entries()[-1]
    assert (output["result"], output["session_id"]) == ("fine", entry["session"])
    assert (output["usage"]["input_tokens"], output["usage"]["output_tokens"]) == (12, 5)

"""`gateway.py status`: one line, from Python alone, whatever the gateway answers (the block before section 1)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import gateway as g


class UsageServer:
    """A little server with one answer; it notes what it was asked."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""
        self.asked: list[tuple[str, str | None]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.asked.append((self.path, self.headers["x-api-key"]))
                self.send_response(owner.status)
                self.end_headers()
                self.wfile.write(owner.body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, *limits: dict[str, Any], **fields: Any) -> None:
        """Answer with these limits."""
        answer = {"key": "alice", "team": "", "timezone": "UTC", "limits": limits}
        answer |= {"today": {"calls": 3, "cost_usd": 3.2}, "month": {"calls": 90, "cost_usd": 1041.5}}
        self.body = json.dumps(answer | fields).encode()


@pytest.fixture
def server() -> Iterator[UsageServer]:
    """A server that runs."""
    made = UsageServer()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def limit(name: str, used: float, allowed: float, scope: str = "key", resets: str | None = None) -> dict[str, Any]:
    """A limit as /v1/usage shows it."""
    numbers = {"used": used, "reserved": 0, "allowed": allowed, "remaining": allowed - used}
    return {"limit": name, "scope": scope, **numbers, "resets_at": None, "resets": resets}


DOLLARS = limit("usd/day", 3.2, 20, resets="resets Mon 00:00 UTC")
TOKENS = limit("tokens/month", 12_345_678, 50_000_000, resets="resets Tue 00:00 UTC")


def status(url: str, **environ: str) -> str:
    """What a bare Python prints, without site-packages; it must end well."""
    command = [sys.executable, "-I", "-S", g.__file__, "status"]
    environ = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "sk-proxy-1", "PYTHONUTF8": "1"} | environ
    session = '{"model": {"display_name": "Opus"}}'  # Claude Code writes such to stdin; nobody reads it
    run = subprocess.run(command, env=environ, input=session, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout


def test_python_alone_prints_the_line(server):
    """
    The host of a user has no Tornado; the key comes from where Claude Code has it.
    """
    server.answer(TOKENS, DOLLARS, limit("concurrent", 16, 16))
    expected = "alice: 12.3M of 50M tokens this month, resets Tue 00:00 UTC · $3.20 of $20.00 today\n"

    assert status(server.url) == expected
    assert status(server.url + "/v1/", ANTHROPIC_AUTH_TOKEN="", ANTHROPIC_API_KEY="sk-proxy-2") == expected
    assert server.asked == [("/v1/usage", "sk-proxy-1"), ("/v1/usage", "sk-proxy-2")]


@pytest.mark.parametrize(
    "limits, line",
    [
        ([], "alice: $3.20 today, $1,041.50 this month"),
        ([limit("concurrent", 1, 16)], "alice: $3.20 today, $1,041.50 this month"),
        ([DOLLARS], "alice: $3.20 of $20.00 today, resets Mon 00:00 UTC"),
        (
            [limit("requests/hour", 5, 100), limit("tokens", 999, 1000, "team"), limit("usd/week", 6, 10, "gateway")],
            "alice: 999 of 1k tokens in all (team) · $6.00 of $10.00 this week (gateway)",
        ),
        ([limit("usd/day", 0, 0), DOLLARS], "alice: $0.00 of $0.00 today · $3.20 of $20.00 today"),
    ],
)
def test_the_two_limits_that_are_nearest_to_their_end_are_shown(server, limits, line):
    """
    Whose limit is named where it is not the key's own; without limits the cost is shown.
    """
    server.answer(*limits)

    assert g.status_line({"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": "k"}) == line


@pytest.mark.parametrize(
    "code, body, line",
    [
        (401, b"{}", "gateway: key refused"),
        (403, b"{}", "gateway: key refused"),
        (503, b"{}", "gateway: answers 503"),
        (200, b"<html>", "gateway: not understood; is ANTHROPIC_BASE_URL the gateway's?"),
        (200, b"[]", "gateway: not understood; is ANTHROPIC_BASE_URL the gateway's?"),
        (200, b'{"limits": [{}]}', "gateway: not understood; is ANTHROPIC_BASE_URL the gateway's?"),
        (200, b"\xff", "gateway: not understood; is ANTHROPIC_BASE_URL the gateway's?"),
    ],
)
def test_an_answer_that_is_none_is_told_in_a_short_line(server, code, body, line):
    """
    A status line has no room for a traceback.
    """
    server.status, server.body = code, body

    assert g.status_line({"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": "k"}) == line


def test_what_keeps_it_from_asking_is_told_and_is_no_failure():
    """
    Claude Code shows nothing of a command that fails, so the exit code is 0 and the line says it.
    """
    assert status("http://127.0.0.1:1") == "gateway: not reached\n"
    assert status("") == "gateway: set ANTHROPIC_BASE_URL\n"
    assert status("http://127.0.0.1:1", ANTHROPIC_AUTH_TOKEN="") == "gateway: set ANTHROPIC_AUTH_TOKEN\n"
    assert status("127.0.0.1:1").startswith("gateway: not understood")


def test_a_name_cannot_write_to_the_terminal(server):
    """
    What comes over the network is printed as text.
    """
    server.answer(key="a\x1b[2Jb\n")

    line = g.status_line({"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": "k"})

    assert line == "a[2Jb: $3.20 today, $1,041.50 this month"


def test_the_command_of_the_readme_runs(server, tmp_path):
    """
    `-m gateway`, from the folder of a copy, also where only the standard library is.
    """
    server.answer(DOLLARS)
    (tmp_path / "gateway.py").write_text(Path(g.__file__).read_text())
    environ = {"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_AUTH_TOKEN": "k", "PYTHONUTF8": "1"}

    command = [sys.executable, "-S", "-m", "gateway", "status"]
    run = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)

    assert run.stdout == "alice: $3.20 of $20.00 today, resets Mon 00:00 UTC\n"
    assert list((tmp_path / "__pycache__").glob("gateway.*.pyc"))
    assert "cd /opt/claude-gateway && python3 -m gateway status" in Path(g.__file__).with_name("README.md").read_text()

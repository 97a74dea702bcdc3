"""From end to end: the program as a process, official SDKs as clients, SIGTERM, a full disk."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anthropic
import openai
import pytest
from client import request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, PROGRAM, config_text, until
from upstream import (
    HELLO as HELLO_SCRIPT,
)
from upstream import (
    chat_hello,
    end,
    head,
    hello_json,
    message_delta,
    message_start,
    message_stop,
    text,
    wait_for,
)

import gateway as g


async def test_the_first_command_makes_everything_and_the_second_changes_nothing(tmp_path, start_process):
    """
    With no config the program makes one, a secret of mode 600 and a key, and serves the demo; then it finds them.
    """
    first = start_process(tmp_path)
    client = anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{first.port}", api_key=first.key, max_retries=0)
    reply = await client.messages.create(model="claude-demo", max_tokens=100, messages=HELLO["messages"])
    code, log = first.end()
    before = {file: file.read_bytes() for file in (tmp_path / "config.yaml", tmp_path / "gateway.secret")}

    second = start_process(tmp_path)
    second.end()

    assert reply.content[0].text.startswith("Hello from the demo upstream.")
    assert (code, "completed" in log) == (0, True)
    assert (tmp_path / "gateway.secret").stat().st_mode & 0o777 == 0o600
    assert first.key not in before[tmp_path / "config.yaml"].decode() and "sk-proxy-" not in first.greeting + log
    assert (tmp_path / "first-key.txt").stat().st_mode & 0o777 == 0o600
    assert before == {file: file.read_bytes() for file in before}
    assert "sk-proxy-..." in second.greeting
    await client.close()


def test_the_readmes_status_line_runs(tmp_path, start_process):
    """
    Claude Code gives it to a shell, with the two variables that it has itself.
    """
    settings = json.loads(
        re.search(r'^\{"statusLine".*\}$', PROGRAM.with_name("README.md").read_text(), re.MULTILINE)[0]
    )
    process = start_process(tmp_path)
    url = f"http://127.0.0.1:{process.port}"

    def shown(**environ: str) -> str:
        command = ["sh", "-c", settings["statusLine"]["command"]]
        run = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=20, check=True)
        return run.stdout

    assert shown(ANTHROPIC_BASE_URL=url, ANTHROPIC_AUTH_TOKEN=process.key) == "me: $0.00 today, $0.00 this month\n"
    assert shown(ANTHROPIC_BASE_URL=url, ANTHROPIC_AUTH_TOKEN="sk-proxy-no").startswith("gateway: ")
    process.end()
    assert shown(ANTHROPIC_BASE_URL=url, ANTHROPIC_AUTH_TOKEN="sk-proxy-no") == "gateway: not reached\n"


async def test_sigterm_lets_a_stream_finish_and_takes_no_more_calls(tmp_path, start_process, upstream, connect):
    """
    After SIGTERM /health is not ready, new calls are refused, running streams finish, and the exit code is 0.
    """
    go_on = asyncio.Event()
    upstream.script = [
        head(200, "text/event-stream"),
        message_start(input_tokens=12),
        text("Hel"),
        wait_for(go_on),
        message_delta(output_tokens=5),
        message_stop(),
        end(),
    ]
    (tmp_path / "config.yaml").write_text(config_text(upstream.url))
    process = start_process(tmp_path)
    stream, asking, calling = [await connect(process.port) for _ in range(3)]
    await stream.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await stream.read_until(b'"Hel"')
    for connection in (asking, calling):
        await connection.request("HEAD", "/", {})

    process.process.send_signal(signal.SIGTERM)
    while "stopping" not in await asyncio.to_thread(process.process.stderr.readline):
        pass
    health = await asking.request("GET", "/health", {})
    refused = await calling.request("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())
    with pytest.raises(OSError):
        await connect(process.port)
    go_on.set()
    rest = await stream.read_until(b"0\r\n\r\n")
    code, _ = await asyncio.to_thread(process.process.wait, 20), None

    assert (health.status, health.json["ready"]) == (503, False)
    assert (refused.status, refused.error["type"], refused.headers["retry-after"]) == (503, "overloaded_error", "5")
    assert b"message_stop" in rest and code == 0
    (entry,) = ledger(tmp_path)
    assert (entry["outcome"], entry["output_tokens"]) == ("completed", 5)


async def test_a_second_signal_ends_at_once_and_books_what_ran(tmp_path, start_process, upstream, connect):
    """
    Whoever cannot wait sends the signal again; the cut call is in the ledger.
    """
    upstream.script = [
        head(200, "text/event-stream"),
        message_start(input_tokens=12),
        text("Hel"),
        wait_for(asyncio.Event()),
    ]
    (tmp_path / "config.yaml").write_text(config_text(upstream.url))
    process = start_process(tmp_path)
    stream = await connect(process.port)
    await stream.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await stream.read_until(b'"Hel"')

    process.process.send_signal(signal.SIGTERM)
    while "stopping" not in await asyncio.to_thread(process.process.stderr.readline):
        pass
    process.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(process.process.wait, 5)

    assert code == 0
    (entry,) = ledger(tmp_path)
    assert (entry["outcome"], entry["input_tokens"], entry["estimated"]) == ("gateway_stopped", 12, True)
    assert b"message_stop" not in await stream.rest()


def ledger(folder: Path) -> list[dict]:
    """The entries in a folder's ledger."""
    return [
        json.loads(line) for file in (folder / "usage").glob("usage-*.jsonl") for line in file.read_text().splitlines()
    ]


async def test_invariant_2_after_kill_9_the_ledger_is_what_it_was(tmp_path, start_process, upstream, connect):
    """
    A killed gateway has lost only the call in flight; a torn last line is set aside and is no reason not to start.
    """
    (tmp_path / "config.yaml").write_text(config_text(upstream.url))
    process = start_process(tmp_path)
    request = request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode())
    upstream.script = HELLO_SCRIPT
    client = await connect(process.port)
    for _ in range(20):
        await client.send(request)
        assert (await client.answer()).texts == ["Hello", " world"]
    upstream.script = [head(200, "text/event-stream"), message_start(12), text("Hel"), wait_for(asyncio.Event())]
    await client.send(request)
    await client.read_until(b'"Hel"')

    process.end(signal.SIGKILL)
    (file,) = (tmp_path / "usage").glob("usage-*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"time":"2026-11-')
    again = start_process(tmp_path)
    upstream.script = HELLO_SCRIPT
    client = await connect(again.port)
    await client.send(request)
    await client.answer()
    code, log = again.end()

    assert [entry["outcome"] for entry in ledger(tmp_path)] == ["completed"] * 21
    assert file.with_suffix(".torn").read_bytes() == b'{"time":"2026-11-\n'
    assert code == 0 and "a torn last line of" in log


def test_sigterm_ends_a_start_as_well(tmp_path):
    """
    As process 1 of a container it would otherwise not be heard until the gateway serves: with a long ledger, seconds.
    """
    os.mkfifo(tmp_path / "config.yaml")
    starting = subprocess.Popen([sys.executable, str(PROGRAM)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    with open(tmp_path / "config.yaml", "w"):  # opens when it has begun to read
        starting.terminate()
        _, log = starting.communicate(timeout=20)

    assert (starting.returncode, log) == (0, "")


def test_a_port_that_is_taken_is_said_in_one_sentence(tmp_path, start_process):
    """
    What stands in the way of a start is named with its remedy, without a traceback.
    """
    first = start_process(tmp_path)

    second = start_process(tmp_path, GATEWAY_PORT=str(first.port))
    code, log = second.end()

    assert code == 1
    assert f"error: cannot listen on 127.0.0.1:{first.port}: Address already in use; set server.port" in log
    assert "Traceback" not in log


async def test_health_answers_while_the_ledger_is_read(tmp_path, clock):
    """
    A probe sees a start that takes its time, and not a gateway that hangs.
    """
    path = tmp_path / "config.yaml"
    path.write_text("upstreams: [{name: demo, format: demo}]\nserver: {port: 0}\n")
    (tmp_path / "usage").mkdir()
    line = json.dumps({"type": "call", "time": "2026-09-01T00:00:00.000Z", "key": "alice", "padding": "x" * 4000})
    (tmp_path / "usage" / "usage-2026-09.jsonl").write_text(f"{line}\n" * 5000)
    server = g.Server(g.Config.load(path, clock.clock))

    started, seen = asyncio.ensure_future(server.start()), []
    while not started.done():
        seen.append(server.gateway.health())
        await asyncio.sleep(0)
    await started
    ready = server.gateway.health()
    await server.close()

    counts = {health["starting"]["entries"] for health in seen if health["starting"]}
    assert 0 < sorted(counts)[1] < 5000  # how many are seen in between is the scheduler's
    assert not any(health["ready"] for health in seen if health["starting"])
    assert (ready["ready"], ready["starting"]) == (True, None)


async def test_a_key_that_is_revoked_during_the_start_never_gets_in(tmp_path, clock):
    """
    An edit that comes while the ledger is read is live before the first call is.
    """
    path = tmp_path / "config.yaml"
    path.write_text(
        f"upstreams: [{{name: demo, format: demo}}]\nserver: {{port: 0}}\nkeys: [{{name: alice, key: {KEY}}}]\n"
    )
    (tmp_path / "usage").mkdir()
    server = g.Server(g.Config.load(path, clock.clock))

    started = asyncio.ensure_future(server.start())
    await asyncio.sleep(0)
    assert server.gateway.starting
    g.command_key_revoke(argparse.Namespace(config=path, name="alice"))
    await started
    state = [key.enabled for key in server.gateway.config.keys]
    await server.close()

    assert state == [False]


async def test_no_call_is_taken_while_the_ledger_is_read(gateway, upstream):
    """
    What the limits allow is not known yet.
    """
    gateway.gateway.starting = True

    health = await gateway.get("/health")
    reply = await gateway.post("/v1/messages", HELLO)

    assert (health.status, health.json["live"], health.json["ready"]) == (503, True, False)
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")
    assert reply.error["message"] == "The gateway is starting: it still reads its ledger."


def test_a_second_gateway_on_the_same_ledger_is_refused_until_the_first_is_gone(tmp_path, start_process):
    """
    Each would count only its own calls against the limits, and a restart would lose the other's. A killed one holds
    nothing, and commands work beside a running one.
    """
    first = start_process(tmp_path)

    second = start_process(tmp_path)
    code, log = second.end()
    usage = subprocess.run([sys.executable, str(PROGRAM), "usage"], cwd=tmp_path, capture_output=True, timeout=20)
    first.end(signal.SIGKILL)
    third = start_process(tmp_path)

    assert (code, second.port) == (1, 0)
    assert f"error: cannot use the ledger in {tmp_path / 'usage'}: another gateway runs on it, or a backup" in log
    assert "Traceback" not in log
    assert usage.returncode == 0
    assert third.port and third.end()[0] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_the_official_anthropic_sdk_works(gateway, upstream, stream):
    """
    Anthropic's own client, streaming and not, reads text and usage through the gateway.
    """
    upstream.script = HELLO_SCRIPT if stream else hello_json()
    client = anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{gateway.port}", api_key=KEY, max_retries=0)

    if stream:
        async with client.messages.stream(model="claude-test", max_tokens=10, messages=HELLO["messages"]) as events:
            message = await events.get_final_message()
    else:
        message = await client.messages.create(model="claude-test", max_tokens=10, messages=HELLO["messages"])

    assert (message.content[0].text, message.usage.input_tokens, message.usage.output_tokens) == ("Hello world", 12, 5)
    (entry,) = gateway.entries()
    assert (entry["input_tokens"], entry["output_tokens"], entry["outcome"]) == (12, 5, "completed")
    await client.close()


async def test_the_official_anthropic_sdk_reads_our_errors(gateway):
    """
    A wrong key is an AuthenticationError with our words, asked once.
    """
    client = anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{gateway.port}", api_key="sk-proxy-wrong")

    with pytest.raises(anthropic.AuthenticationError) as caught:
        await client.messages.create(model="claude-test", max_tokens=10, messages=HELLO["messages"])

    assert caught.value.body["error"]["message"].startswith("This gateway does not know the key")
    await client.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_official_openai_sdk_works(start_gateway, upstream, stream):
    """
    OpenAI's own client, with a base URL that ends in /v1.
    """
    gateway = await start_gateway(config_text(f"{upstream.url}/v1", ", format: openai"))
    upstream.script = chat_hello(stream=stream)
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=KEY, max_retries=0)

    if stream:
        chunks = await client.chat.completions.create(model="gpt-test", messages=HELLO["messages"], stream=True)
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])
    else:
        said = (
            (await client.chat.completions.create(model="gpt-test", messages=HELLO["messages"]))
            .choices[0]
            .message.content
        )

    assert said == "Hello world"
    assert gateway.entries()[0]["outcome"] == "completed"
    await client.close()


async def test_the_demo_answers_the_sdk(start_gateway):
    """
    The whole way works before anyone has an API key, token counts included.
    """
    gateway = await start_gateway(f"upstreams: [{{name: demo, format: demo}}]\nkeys: [{{name: me, key: {KEY}}}]\n")
    client = anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{gateway.port}", api_key=KEY, max_retries=0)
    ask = [{"role": "user", "content": "hello"}]

    async with client.messages.stream(model="claude-demo", max_tokens=100, messages=ask) as events:
        message = await events.get_final_message()
    counted = await client.messages.count_tokens(model="claude-demo", messages=ask)
    chat = await gateway.post("/v1/chat/completions", {"model": "gpt-test", "messages": ask})

    assert message.content[0].text.startswith("Hello from the demo upstream.")
    assert counted.input_tokens == message.usage.input_tokens
    assert (chat.status, chat.error["message"]) == (404, "No upstream of this gateway answers /v1/chat/completions.")
    assert [entry["outcome"] for entry in gateway.entries()] == ["completed"] * 2
    await client.close()


@pytest.mark.logs("cannot write to", "can be written again", "index: it is in memory")
async def test_a_full_disk_loses_no_entry_and_refuses_before_it_would(start_gateway, upstream, tmp_path):
    """
    Entries wait in a bounded queue, /health says so, new calls are refused at the bound, and space brings all back.
    """
    disk = tmp_path / "usage"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("a small disk needs root")
    try:
        gateway = await start_gateway(config_text(upstream.url))
        gateway.gateway.ledger.QUEUE = 5
        upstream.script = hello_json()
        statuses = [(await gateway.post("/v1/messages", HELLO)).status for _ in range(25)]
        health = await gateway.get("/health")
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        gateway.tick(seconds=1)

        assert statuses[-1] == 503 and statuses == sorted(statuses)
        assert (health.status, health.json["ledger"]) == (503, {"failure": "No space left on device", "waiting": 5})
        assert len(gateway.entries()) == statuses.count(200)
        assert (await gateway.get("/health")).status == 200
        await gateway.stop()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_terminal_is_shown_the_first_key_and_no_file_keeps_it(tmp_path):
    """
    Who sits before it sees the key once; the folder has only its hash.
    """
    ours, theirs = os.openpty()
    command = [sys.executable, g.__file__, "serve"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")} | {"GATEWAY_PORT": "0"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=theirs, stderr=subprocess.DEVNULL)
    shown = b""
    while b"gateway.py seal" not in shown:
        shown += os.read(ours, 1 << 12)
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    os.close(ours)
    os.close(theirs)

    key = re.search(rb"ANTHROPIC_AUTH_TOKEN=(sk-proxy-\w+)", shown)[1]
    assert not (tmp_path / "first-key.txt").exists()
    assert all(key not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_the_first_key_is_shown_also_where_the_port_is_taken(tmp_path, start_process):
    """
    The config with its hash is made, and the next start makes no other.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environ = {"GATEWAY_PORT": str(taken.getsockname()[1])}
        process = start_process(tmp_path, **environ)
        code, log = process.end()

    assert code == 1 and "cannot listen on" in log
    assert "with a key for you, which is shown once:\n\n  $(cat " in process.greeting


@pytest.mark.parametrize("stdout", ["closed", "full"])
def test_a_gateway_whose_greeting_nobody_reads_serves(tmp_path, stdout):
    """
    Its log says that it listens, and where.
    """
    (tmp_path / "config.yaml").write_text("upstreams: [{name: demo, format: demo}]\nserver: {port: 0}\n")
    ours, theirs = os.pipe()
    os.close(ours)
    full = os.open("/dev/full", os.O_WRONLY)
    output = {"closed": theirs, "full": full}[stdout]
    process = subprocess.Popen(
        [sys.executable, g.__file__], cwd=tmp_path, stdout=output, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    os.close(full)

    line = next(line for line in process.stderr if "greeting" in line)
    process.terminate()
    process.communicate(timeout=20)

    assert "the gateway listens on port " in line and process.returncode == 0


@pytest.mark.parametrize("case", ["--config", "GATEWAY_CONFIG in a folder that has something"])
def test_a_name_with_a_typo_makes_no_demo_gateway(tmp_path, case):
    """
    Only `init`, the default name and an empty folder that GATEWAY_CONFIG names do.
    """
    (tmp_path / "usage").mkdir()
    path = tmp_path / "confg.yaml"
    by_option = case == "--config"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
    environ |= {"GATEWAY_PORT": "0"} | ({} if by_option else {"GATEWAY_CONFIG": str(path)})
    command = [sys.executable, g.__file__, *(["--config", str(path)] if by_option else []), "serve"]

    ended = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=20)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"error: there is no {path}") and f"--config {path} init" in ended.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["usage"]


def test_what_lies_beside_the_ledger_is_for_its_owner_and_group(tmp_path, start_process):
    """
    Who works when, and on what, is nobody else's business, whatever the umask says.
    """
    before = os.umask(0)
    try:
        process = start_process(tmp_path)
    finally:
        os.umask(before)
    process.end()

    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "usage").iterdir() if file.is_file()}
    assert modes and {mode & 0o027 for mode in modes.values()} == {0}


def test_a_secret_that_others_can_read_is_warned_of(tmp_path):
    """
    It opens all sealed keys.
    """
    path, secret = tmp_path / "config.yaml", tmp_path / "gateway.secret"
    path.write_text("upstreams: [{name: demo, format: demo}]\n")
    secret.write_text(g.Vault.new_secret())

    warnings = []
    for mode in (0o644, 0o640, 0o600):
        secret.chmod(mode)
        warnings.append([warning for warning in g.Config.load(path, environ={}).warnings if str(secret) in warning])

    assert [len(found) for found in warnings] == [1, 0, 0] and "chmod 600" in warnings[0][0]


# How it is started


def resident_mb(process: subprocess.Popen[str]) -> float:
    """The memory that a process has."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("arguments", [(), ("serve",), ("--config", "config.yaml"), ("--config=config.yaml", "serve")])
async def test_a_server_that_is_started_as_a_script_keeps_no_syntax_tree(tmp_path, start_process, arguments):
    """
    Python keeps a script's until it ends, 31 MB of this one: with it, it would have more than 70 MB.
    """
    subprocess.run([sys.executable, PROGRAM, "init"], cwd=tmp_path, check=True, capture_output=True)

    server = start_process(tmp_path, *arguments)

    await until(lambda: resident_mb(server.process) < 55)
    assert server.end()[0] == 0


def test_a_copy_of_the_script_with_another_name_serves_as_well(tmp_path, start_process):
    """
    It is no module that could be imported.
    """
    program = Path(shutil.copy(PROGRAM, tmp_path / "claude gateway"))

    server = start_process(tmp_path, "serve", program=program)

    assert server.port > 0
    assert server.end()[0] == 0


def test_a_link_to_the_script_serves_from_a_folder_that_has_modules_of_the_same_names(tmp_path, start_process):
    """
    What is imported lies beside the script, or was installed: never in the folder where it was started.
    """
    (tmp_path / "link.py").symlink_to(PROGRAM)
    for name in ("gateway", "yaml", "tornado"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")

    server = start_process(tmp_path, "serve", program=tmp_path / "link.py")

    assert server.port > 0
    assert server.end()[0] == 0


@pytest.mark.parametrize("by", [("--",), ("-X", "dev", "-W", "ignore"), ("-I",)], ids=" ".join)
def test_the_script_takes_the_options_of_the_interpreter(tmp_path, by):
    """
    It hands them on where it starts itself again.
    """
    ended = subprocess.run([sys.executable, *by, PROGRAM, "--help"], cwd=tmp_path, capture_output=True, text=True)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "serve" in ended.stdout

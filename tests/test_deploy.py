"""What lies in deploy/: nginx and Caddy before a gateway, compose.yaml, Prometheus and Grafana."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from client import Connection, Reply, request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, passing_time, until
from prometheus_client.parser import text_string_to_metric_families
from upstream import (
    Step,
    end,
    head,
    hello_json,
    message_delta,
    message_start,
    message_stop,
    ping,
    reset_peer,
    self_signed,
    stall,
    text,
    wait_for,
)

import gateway as g

DEPLOY = Path(g.__file__).parent / "deploy"
MB = 2**20


def program(name: str) -> str | None:
    """Where a program is, also where only root looks; `TEST_CADDY` and the like name another one."""
    return os.environ.get(f"TEST_{name.upper()}") or shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def needs(name: str) -> pytest.MarkDecorator:
    """Skip where a program is not installed."""
    return pytest.mark.skipif(not program(name), reason=f"{name} is not installed")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# --- in front of the gateway --------------------------------------------------------


class Front:
    """nginx or Caddy with the shipped file, of which only ports, paths and the certificate are others."""

    def __init__(self, name: str, folder: Path, gateway_port: int) -> None:
        self.name = name
        certificate, _ = self_signed()
        self.tls = ssl.create_default_context(cafile=certificate)
        self.port, self.plain_port = free_ports(2)
        key = str(Path(certificate).with_name("key.pem"))
        make = nginx_file if name == "nginx" else caddy_file
        self.file = folder / name
        self.file.write_text(make(folder, self.port, self.plain_port, gateway_port, certificate, key))
        command = {
            "nginx": [program("nginx"), "-e", str(folder / "error.log"), "-c", str(self.file), "-g", "daemon off;"],
            "caddy": [program("caddy"), "run", "--adapter", "caddyfile", "--config", str(self.file)],
        }[name]
        self.log = folder / "front.log"
        with self.log.open("wb") as log:
            environ = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM if self.name == "nginx" else signal.SIGKILL)
        self.process.wait(20)

    async def connect(self, **options: object) -> Connection:
        """Connect with TLS, as soon as the front listens."""
        while True:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(ConnectionRefusedError):
                opened = await asyncio.open_connection(
                    "127.0.0.1", self.port, ssl=self.tls, server_hostname="localhost", limit=1 << 20, **options
                )
                return Connection(*opened)
            await asyncio.sleep(0.005)

    async def request(self, method: str, target: str, body: object = b"", token: str = KEY, **headers: str) -> Reply:
        """One request on a connection of its own."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"host": f"localhost:{self.port}", "x-api-key": token}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = await self.connect()
        reply = await connection.request(method, target, fields, data)
        connection.abort()
        return reply

    def bytes(self, body: dict, **headers: str) -> bytes:
        """A request for a message, as bytes."""
        fields = {"host": f"localhost:{self.port}", "x-api-key": KEY} | headers
        return request_bytes("POST", "/v1/messages", fields, json.dumps(body).encode())


def replaced(text: str, changes: dict[str, str]) -> str:
    """A shipped file with some of its words exchanged, each of which must stand there."""
    for old, new in changes.items():
        assert old in text, f"{old!r} is not in the shipped file"
        text = text.replace(old, new)
    return text


def nginx_file(folder: Path, port: int, plain_port: int, gateway_port: int, certificate: str, key: str) -> str:
    """deploy/nginx.conf for this test."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    changes = {
        "http {": "http {" + "".join(f" {kind}_temp_path {folder}/{kind};" for kind in kinds),
        "listen 80 ": f"listen 127.0.0.1:{plain_port} ",
        "listen 443 ": f"listen 127.0.0.1:{port} ",
        "server gateway:8000;": f"server 127.0.0.1:{gateway_port};",
        "/etc/nginx/tls/fullchain.pem": certificate,
        "/etc/nginx/tls/privkey.pem": key,
        "/var/log/nginx/": f"{folder}/",
        "/run/nginx.pid": f"{folder}/nginx.pid",
        "worker_processes auto": "worker_processes 1",
        "worker_rlimit_nofile 16384;": "",  # which takes root
    }
    return replaced((DEPLOY / "nginx.conf").read_text(), changes)


def caddy_file(folder: Path, port: int, plain_port: int, gateway_port: int, certificate: str, key: str) -> str:
    """deploy/Caddyfile for this test."""
    changes = {
        "\tadmin off\n": f"\tadmin off\n\thttp_port {plain_port}\n\tauto_https disable_redirects\n",
        "{$GATEWAY_DOMAIN:localhost} {": f"https://localhost:{port} {{\n\tbind 127.0.0.1\n\ttls {certificate} {key}",
        "{$GATEWAY_UPSTREAM:gateway:8000}": f"127.0.0.1:{gateway_port}",
    }
    return replaced((DEPLOY / "Caddyfile").read_text(), changes)


def caddy_version() -> tuple[int, ...]:
    """The installed Caddy's."""
    said = subprocess.run([program("caddy"), "version"], capture_output=True, text=True).stdout
    return tuple(map(int, re.search(r"(\d+)\.(\d+)", said).groups()))


StartFront = Callable[[int], Front]


@pytest.fixture(params=[pytest.param("nginx", marks=needs("nginx")), pytest.param("caddy", marks=needs("caddy"))])
def start_front(request, tmp_path, gateway) -> Iterator[StartFront]:
    """Start nginx, and in another test Caddy, in front of a port; it ends before the gateway does."""
    started: list[Front] = []

    def start(gateway_port: int) -> Front:
        started.append(Front(request.param, tmp_path, gateway_port))
        return started[-1]

    yield start
    for front in started:
        front.stop()


@pytest.fixture
def front(start_front, gateway) -> Front:
    """In front of the gateway with the scripted upstream."""
    return start_front(gateway.port)


def begun(*rest: Step) -> list[Step]:
    """A stream that has begun, and how it goes on."""
    return [head(200, "text/event-stream"), message_start(input_tokens=12), text("Hel"), *rest]


async def test_an_event_is_not_held_back(front, upstream):
    """
    Through the proxy each event reaches the client while the upstream still holds the next one, a ping too.
    """
    ping_now, go_on = asyncio.Event(), asyncio.Event()
    ending = (text("lo"), message_delta(output_tokens=5), message_stop(), end())
    upstream.script = begun(wait_for(ping_now), ping(), wait_for(go_on), *ending)
    stream = await front.connect()

    await stream.send(front.bytes(HELLO_STREAM))
    first = await stream.read_until(b'"Hel"')
    ping_now.set()
    pinged = await stream.read_until(b"event: ping")
    go_on.set()
    rest = await stream.read_until(b"0\r\n\r\n")
    stream.abort()

    assert first.startswith(b"HTTP/1.1 200") and b"message_start" in first
    assert b'"lo"' not in pinged and b'"lo"' in rest and b"message_stop" in rest


async def test_a_ping_of_the_gateway_is_the_first_that_comes_through(front, gateway, upstream):
    """
    While an upstream thinks, what keeps the client patient is passed on at once.
    """
    go_on = asyncio.Event()
    upstream.script = [head(200, "text/event-stream"), wait_for(go_on), message_start(1), message_stop(), end()]
    stream = await front.connect()

    await stream.send(front.bytes(HELLO_STREAM))
    await until(lambda: upstream.requests)
    async with passing_time(gateway):
        pinged = await stream.read_until(b": ping")
    go_on.set()
    rest = await stream.read_until(b"0\r\n\r\n")
    stream.abort()

    assert pinged.startswith(b"HTTP/1.1 200") and b"message_start" not in pinged and b"message_stop" in rest


@pytest.mark.parametrize("silent", [False, True], ids=["while it streams", "before it says anything"])
async def test_a_cancel_reaches_the_upstream(front, gateway, upstream, silent):
    """
    A client that goes away ends the upstream's work also through the proxy.
    """
    upstream.script = [stall()] if silent else begun(stall())
    stream = await front.connect()
    await stream.send(front.bytes(HELLO_STREAM))
    await (until(lambda: upstream.requests) if silent else stream.read_until(b'"Hel"'))

    stream.abort()
    await upstream.requests[0].closed.wait()
    await gateway.settled()

    assert [entry["outcome"] for entry in gateway.entries()] == ["client_gone"]


@needs("curl")
async def test_a_cancel_over_http2_reaches_the_upstream(front, gateway, upstream):
    """
    There a cancel is a stream reset, or the end of the connection, as here.
    """
    upstream.script = begun(stall())
    curl = await curl_http2(front)
    await curl.stdout.readuntil(b'"Hel"')

    curl.kill()
    await curl.wait()
    await upstream.requests[0].closed.wait()
    await gateway.settled()

    assert [entry["outcome"] for entry in gateway.entries()] == ["client_gone"]


@needs("curl")
async def test_http2_carries_a_whole_stream(front, upstream):
    """
    Clients are offered HTTP/2, and a stream comes through it.
    """
    upstream.script = begun(text("lo"), message_delta(output_tokens=5), message_stop(), end())
    curl = await curl_http2(front)
    said, _ = await curl.communicate()

    assert curl.returncode == 0
    assert said.count(b"event: ") == 5 and said.endswith(b"\n2")  # the last is curl's word for the version


async def curl_http2(front: Front) -> asyncio.subprocess.Process:
    """curl asks for a stream over HTTP/2."""
    (await front.connect()).abort()  # it listens
    command = ["curl", "-sSNk", "--http2", "-m", "20", "-w", "\n%{http_version}", "-H", f"x-api-key: {KEY}"]
    url = f"https://localhost:{front.port}/v1/messages"
    return await asyncio.create_subprocess_exec(
        *command, "--connect-to", "::127.0.0.1:", "-d", json.dumps(HELLO_STREAM), url, stdout=-1, stderr=-1
    )


async def test_a_cut_stream_looks_cut(front, upstream):
    """
    A stream that breaks off has no proper end behind the proxy either, so that no client takes it for whole.
    """
    if front.name == "caddy" and caddy_version() < (2, 8):
        pytest.skip("Caddy before 2.7.6 ends it as if it were whole; the Caddyfile says 2.8 or newer")
    upstream.script = begun(reset_peer())
    stream = await front.connect()

    await stream.send(front.bytes(HELLO_STREAM))
    reply = await stream.answer()
    stream.abort()

    assert reply.status == 200 and reply.texts == ["Hel"] and reply.was_cut


async def test_a_body_of_32_mb_passes(front, upstream):
    """
    What the API takes goes through, byte for byte.
    """
    upstream.script = hello_json()
    body = json.dumps(HELLO).encode()
    body += b" " * (32 * MB - len(body))

    reply = await front.request("POST", "/v1/messages", body)

    assert reply.status == 200 and reply.json["content"][0]["text"] == "Hello world"
    assert upstream.requests[0].body == body


@pytest.mark.parametrize("size", [32 * MB + 1, 34 * MB])
async def test_a_larger_body_is_refused_in_the_clients_format(front, upstream, size):
    """
    413 in the envelope that Claude Code reads, whoever of the two refuses.
    """
    connection = await front.connect()
    sending = asyncio.ensure_future(
        connection.send(front.bytes({}, **{"content-length": str(size)}) + b" " * (size - 2))
    )
    reply = await connection.answer()
    sending.cancel()
    connection.abort()
    await asyncio.gather(sending, return_exceptions=True)

    assert (reply.status, reply.headers["content-type"]) == (413, "application/json")
    assert (reply.json["type"], reply.error["type"]) == ("error", "request_too_large")
    assert upstream.requests == []


async def test_a_refusal_comes_before_the_body_is_sent(front):
    """
    The proxy does not collect bodies: a wrong key is told at once, with the gateway's own headers.
    """
    if front.name == "caddy":
        pytest.skip("Go's server does not answer while it waits for a piece of the body")
    connection = await front.connect()
    await connection.send(front.bytes({}, **{"content-length": "1000000", "x-api-key": "wrong"}))
    reply = await connection.answer()
    connection.abort()

    assert (reply.status, reply.error["type"]) == (401, "authentication_error")
    assert reply.headers["x-should-retry"] == "false"


async def test_the_ledger_has_the_clients_address(front, gateway, upstream):
    """
    It is the one that the proxy saw, whatever the client itself says of where it comes from.
    """
    upstream.script = hello_json()
    await gateway.write(gateway.path.read_text().replace("port: 0", "port: 0, trusted_proxies: [127.0.0.1]"))
    connection = await front.connect(local_addr=("127.0.0.2", 0))

    await connection.send(front.bytes(HELLO, **{"x-forwarded-for": "203.0.113.7"}))
    reply = await connection.answer()
    connection.abort()
    await gateway.settled()

    assert reply.status == 200
    assert gateway.entries()[-1]["client"] == "127.0.0.2"


METRICS = ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/./metrics", "/v1/../metrics", "/v1/%2e%2e/metrics"]


async def test_the_metrics_are_not_for_those_outside(front, gateway):
    """
    However the path is spelt that the gateway would answer, 404 comes from the proxy; the rest passes.
    """
    spelt = [*METRICS, "/metrics?x=1", "/%2Fmetrics", f"https://localhost:{front.port}/metrics"]

    inside = [(await gateway.get(path)).status for path in spelt[:2]]
    outside = [await front.request("GET", path) for path in spelt]
    health = await front.request("GET", "/health")

    assert inside == [200, 200]
    assert [reply.status for reply in outside] == [404] * len(spelt)
    assert {reply.error["type"] for reply in outside} == {"not_found_error"}
    assert health.status == 200


async def test_a_gateway_that_is_down_is_told_in_the_clients_format(start_front):
    """
    502 in the envelope that Claude Code reads: it tries again, for three minutes, while the gateway restarts.
    """
    (nobody,) = free_ports(1)
    reply = await start_front(nobody).request("POST", "/v1/messages", HELLO)

    assert (reply.status, reply.headers["content-type"]) == (502, "application/json")
    assert reply.json["type"] == "error" and reply.error["type"] == "api_error"
    assert "x-should-retry" not in reply.headers


async def test_http2_is_offered_over_modern_tls(front):
    """
    ALPN names h2 before HTTP/1.1, and TLS 1.1 is not spoken.
    """
    (await front.connect()).abort()
    front.tls.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection("127.0.0.1", front.port, ssl=front.tls, server_hostname="localhost")
    spoken = writer.get_extra_info("ssl_object")

    assert (spoken.selected_alpn_protocol(), spoken.version()) == ("h2", "TLSv1.3")
    writer.transport.abort()


@needs("nginx")
async def test_plain_http_is_sent_on_to_https(tmp_path, gateway, connect):
    """
    With the path, and so that a POST stays one.
    """
    front = Front("nginx", tmp_path, gateway.port)
    try:
        (await front.connect()).abort()
        connection = await connect(front.plain_port)
        reply = await connection.request("POST", "/v1/messages?beta=true", {"host": "example.com"}, b"{}")
    finally:
        front.stop()

    assert (reply.status, reply.headers["location"]) == (308, "https://example.com/v1/messages?beta=true")


SECONDS = {"s": 1, "m": 60, "min": 60}


def seconds(text: str) -> float:
    """A time as nginx, Caddy and systemd write it."""
    number, unit = re.fullmatch(r"(\d+)(\w+)", text).groups()
    return int(number) * SECONDS[unit]


@pytest.mark.parametrize(
    ("file", "silence", "idle"),
    [
        ("nginx.conf", r"proxy_read_timeout (\w+);", r"\n        keepalive_timeout (\w+);"),
        ("Caddyfile", r"response_header_timeout (\w+)", r"\bkeepalive (\w+)"),
    ],
)
def test_a_proxy_is_more_patient_than_the_gateway(file, silence, idle):
    """
    It waits longer than any silence of the gateway's, and drops idle connections before the gateway does.
    """
    shipped = (DEPLOY / file).read_text()
    routing, timeouts = g.RoutingConfig(), g.Timeouts()

    assert seconds(re.search(silence, shipped)[1]) > max(routing.deadline, timeouts.first_byte, timeouts.idle)
    assert seconds(re.search(idle, shipped)[1]) < g.Pace().keep_alive_s
    assert not re.search(r"^\s*(flush_interval|encode|write |read_body)", shipped, re.MULTILINE)


# --- the other files ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["gateway", "caddy", "nginx", "prometheus", "grafana"])
def test_each_container_has_no_more_rights_than_it_needs(name):
    """
    Read-only, without capabilities and new privileges, bounded; what it mounts from here is here.
    """
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][name]

    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"pids_limit", "mem_limit", "logging", "restart"} <= set(service)
    mounted = [v.split(":")[0] for v in service["volumes"] if isinstance(v, str) and v.startswith("./")]
    assert [path for path in mounted if not (DEPLOY / path).exists()] == []


def test_addresses_that_are_trusted_are_given_to_nobody_else():
    """
    A container without a fixed address gets one outside of those that docs/deployment.md lets the gateway believe.
    """
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text().replace("${GATEWAY_NET:-172.29.87}", "172.29.87"))
    page = (DEPLOY.parent / "docs/deployment.md").read_text()
    (net,) = compose["networks"]["gateway"]["ipam"]["config"]
    names = ("caddy", "nginx", "prometheus")
    fixed = [compose["services"][name]["networks"]["gateway"]["ipv4_address"] for name in names]

    assert f"trusted_proxies: [{', '.join(fixed[:2])}]" in page
    assert f"metrics_from: [127.0.0.1, {fixed[2]}]" in page
    assert all(ipaddress.ip_address(a) in ipaddress.ip_network(net["subnet"]) for a in fixed)
    assert not any(ipaddress.ip_address(a) in ipaddress.ip_network(net["ip_range"]) for a in fixed)


async def test_rules_and_dashboard_ask_for_metrics_that_there_are(gateway):
    """
    A name that /metrics does not have would be an alert that never comes.
    """
    scraped = (await gateway.get("/metrics")).body.decode()
    known = {family.name for family in text_string_to_metric_families(scraped)}
    files = ("prometheus/rules.yml", "grafana/dashboards/claude-gateway.json")
    asked = set(re.findall(r"claude_gateway_\w+", "".join((DEPLOY / file).read_text() for file in files)))

    assert asked and {re.sub("_(total|bucket|count|sum)$", "", name) for name in asked} <= known


@needs("promtool")
def test_the_alerts_do_what_they_promise():
    """
    promtool takes the configuration and the rules, and their tests pass.
    """
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "rules.test.yml"]):
        done = subprocess.run(
            [program("promtool"), *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs("systemd-analyze")
def test_systemd_takes_the_unit_and_finds_it_locked_in(tmp_path):
    """
    No setting is misspelt, and what is exposed is as little as a network service can do with.
    """
    unit = tmp_path / "claude-gateway.service"
    shipped = (DEPLOY / "claude-gateway.service").read_text()
    unit.write_text(replaced(shipped, {"/opt/claude-gateway/venv/bin/claude-gateway": "/bin/true"}))
    analyze = [program("systemd-analyze"), "--no-pager"]

    verified = subprocess.run([*analyze, "verify", str(unit)], capture_output=True, text=True)
    exposed = subprocess.run([*analyze, "security", "--offline=true", str(unit)], capture_output=True, text=True)

    about_it = [line for line in verified.stderr.splitlines() if unit.name in line]  # not of the host's other units
    assert (verified.returncode, about_it) == (0, [])
    assert float(re.search(r"Overall exposure level .*: ([\d.]+)", exposed.stdout)[1]) <= 1.5


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/claude-gateway.service"])
def test_freed_memory_goes_back_to_the_system(name):
    """
    glibc keeps what was freed, for ever, unless it is told otherwise before the process starts.
    """
    text = (DEPLOY.parent / name).read_text()

    assert re.search(r"\bMALLOC_TRIM_THRESHOLD_=131072\b", text) and re.search(r"\bMALLOC_ARENA_MAX=2\b", text)


def test_a_stop_waits_longer_than_the_gateway_lets_answers_run():
    """
    Docker's ten seconds, or systemd's ninety, would cut them.
    """
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["gateway"]
    unit = (DEPLOY / "claude-gateway.service").read_text()
    readme = (DEPLOY.parent / "README.md").read_text()

    waits = [compose["stop_grace_period"], re.search(r"TimeoutStopSec=(\w+)", unit)[1]]
    waits.append(re.search(r"--stop-timeout (\d+)", readme)[1] + "s")
    assert all(seconds(wait) > g.ServerConfig().drain for wait in waits), waits


def test_what_tells_instances_apart_is_there():
    """
    Each variable and setting of the table of development, test and production is one.
    """
    table = (DEPLOY.parent / "docs/deployment.md").read_text().partition("## Development, test, production")[2]
    table = table.partition("\n## ")[0]
    known = (DEPLOY / "compose.yaml").read_text() + Path(g.__file__).read_text()
    example = yaml.safe_load((DEPLOY.parent / "config.example.yaml").read_text())

    variables = set(re.findall(r"GATEWAY_\w+", table))
    settings = re.findall(r"`((?:server|limits|usage)\.\w+)`", table)

    assert len(variables) >= 6 and [name for name in variables if name not in known] == []
    assert len(settings) >= 5
    assert [name for name in settings if name.split(".")[1] not in example[name.split(".")[0]]] == []

#!/usr/bin/env python3
"""Compare gateways side by side on a noisy machine.

    python tests/bench/run.py --targets direct,nginx,tornado-simple,ours --scenarios s1,s2,s6 --reps 3

Prints one Markdown table per scenario; progress goes to stderr. README.md tells what the scenarios and the
columns are.

The gateway under test is pinned to core 0, the mock upstream and the load generator to core 1. All targets
are started first; then every repetition visits every target in turn (and the order turns too), so that noise
hits all alike. A number is the median of the repetitions, a ratio the median of the ratios within one
repetition. CPU time is that of the gateway's whole process tree. A measurement in which foreign processes
took more than --max-noise of the gateway's core is done again.
"""

import argparse
import contextlib
import http
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from targets import TARGETS, Target

HERE = Path(__file__).resolve().parent
GATEWAY_CORE, LOAD_CORE = 0, 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
SMALL_KIB, LARGE_KIB = 2, 150
START_LIMIT_S = 90
DECIMALS = ((2, 10), (1, 1000))  # two below ten, one below a thousand, else none
SLOW_STREAMS = [(1000, 200), (2000, 400)]  # s3: streams at once, ms between the events of each
FAILURES = (OSError, RuntimeError, ValueError, http.client.HTTPException)  # of one target; the others go on

USD_PER_CALL = (25 * 3 + 7 * 3.75 + 11 * 0.3 + 42 * 15) / 1e6  # the mock's JSON answer at the prices of `ours`

Row = dict[str, float | None]


# --- The machine: cores, processes, ports -----------------------------------------


def spawned(core: int, command: list[str], **options) -> subprocess.Popen:
    """Start a process that runs on one core only, and its children too."""
    return subprocess.Popen(["taskset", "-c", str(core), *command], **options)


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on (proc(5); the second may hold spaces)."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def tree_of(root: int) -> list[int]:
    """Return the process ids of `root` and of all that descend from it."""
    children = defaultdict(list)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            children[int(stat_fields(pid)[1])].append(int(pid))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def scheduled_s(pid: int) -> float:
    """Return the CPU seconds of the living threads, by the scheduler's own nanoseconds."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def usage_of(root: int) -> tuple[float, float]:
    """Return the CPU seconds that a process tree has used so far and its resident MiB.

    Ticks of 10 ms know the threads that have ended, the scheduler's nanoseconds are exact: the larger counts.
    """
    cpu_s = pages = 0
    for pid in tree_of(root):
        with contextlib.suppress(OSError, ValueError):
            fields = stat_fields(pid)
            pages += int(fields[21])
            # utime and stime; of the root also those of the children that have ended
            ticks = sum(map(int, fields[11:15] if pid == root else fields[11:13]))
            cpu_s += max(ticks / TICKS_PER_S, scheduled_s(pid))
    return cpu_s, pages * PAGE_SIZE / MIB


def busy_s(core: int) -> float:
    """Return the seconds that a core has worked since boot, for whomever."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            return (user + nice + system + irq + softirq + steal) / TICKS_PER_S
    return 0.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def call(port: int, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
    """Return status and body of one HTTP request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def stop_group(process: subprocess.Popen) -> None:
    """End a process that was started as the leader of a group, and its group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, sign)
            process.wait(8)


# --- The requests -----------------------------------------------------------------

TOOLS = [
    {
        "name": f"tool{number}",
        "description": "does a thing " * 20,
        "input_schema": {
            "type": "object",
            "properties": {"path": {"type": "string", "description": "a file's path"}},
        },
    }
    for number in range(15)
]


def text_message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def request_body(kib: int, events: int = 0, delay_ms: int = 0) -> bytes:
    """Return a request of about `kib` KiB as Claude Code sends it: system, tools, a long history.

    The first message holds the marker that tells the mock upstream what to stream; no events, no stream.
    """
    messages = [text_message("user", f"BENCH[n={events},d={delay_ms},s=60] ")]
    request = {
        "model": "claude-sonnet-4-5-20250929",
        "max_tokens": 8192,
        "stream": events > 0,
        "metadata": {"user_id": "bench"},
        "system": [{"type": "text", "text": "You are a coding agent. " * 20}],
        "messages": messages,
    }
    if kib > SMALL_KIB:
        request["tools"] = TOOLS
    while len(json.dumps(request)) < kib * 1024 - 600:
        step = len(messages) // 2
        messages.append(text_message("assistant", 'def f(x):\n    return {"é": x}\n' * 16))
        messages.append(text_message("user", f"go on, step {step}"))
    return json.dumps(request).encode()


# --- One gateway ------------------------------------------------------------------


def filled(text: str, marks: dict[str, object]) -> str:
    for name, value in marks.items():
        text = text.replace(f"@{name}@", str(value))
    return text


class Gateway:
    """One target: started, stopped, put under load. `process` is None while nothing of it runs."""

    def __init__(self, name: str, target: Target, bench: "Bench") -> None:
        self.name, self.target, self.bench = name, target, bench
        self.port = bench.port
        self.process = self.folder = None
        self.headers = {}

    def start(self, tls: bool = False, is_limited: bool = False) -> float:
        """Start it with the plain or the TLS upstream; return the seconds until its first 200.

        `is_limited`: with the files by which the key may spend 1 USD.
        """
        if not self.target.command:
            return 0.0
        if not self.target.needs.exists():
            raise RuntimeError(f"{self.target.needs} is missing")
        self.folder = Path(tempfile.mkdtemp(prefix=f"bench-{self.name}-"))
        self.port = free_port()
        marks = {"PORT": self.port, "DIR": self.folder, **self.bench.upstream_marks(tls)}
        self.headers = {name: filled(value, marks) for name, value in self.target.headers.items()}
        for name, text in (self.target.limited if is_limited else self.target.files).items():
            (self.folder / name).write_text(filled(text, marks))
        # Without the proxy settings: no target may leave the loopback.
        env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        env |= {name: filled(value, marks) for name, value in self.target.env.items()}
        command = [filled(word, marks) for word in self.target.command]
        began = time.monotonic()
        with open(self.folder / "log", "wb") as log:
            self.process = spawned(
                GATEWAY_CORE,
                command,
                env=env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.wait_for_200(began)

    def wait_for_200(self, began: float) -> float:
        last = None
        made = self.folder / "headers.json"  # of a target whose key is made at its start
        while time.monotonic() - began < START_LIMIT_S and self.process.poll() is None:
            if made.exists():
                self.headers |= json.loads(made.read_text())
            headers = {**self.headers, "Content-Type": "application/json"}
            try:
                last = call(self.port, "POST", "/v1/messages", self.bench.bodies["one"], headers)
                if last[0] == http.HTTPStatus.OK:
                    return time.monotonic() - began
            except (OSError, http.client.HTTPException) as error:
                last = error
            time.sleep(0.02)
        log = (self.folder / "log").read_text(errors="replace")
        raise RuntimeError(f"did not get ready: {str(last)[:300]}; log: {log[-1500:]}")

    def stop(self) -> None:
        if self.process:
            stop_group(self.process)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.process = None

    def kill(self) -> None:
        """End it as a power cut would, from one moment to the next."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self, tls: bool = False, is_limited: bool = False) -> float:
        self.stop()
        return self.start(tls, is_limited)

    def is_down(self) -> bool:
        return bool(self.target.command) and (self.process is None or self.process.poll() is not None)

    def usage(self) -> tuple[float, float]:
        """Return CPU seconds so far and resident MiB."""
        return usage_of(self.process.pid) if self.process else (0.0, 0.0)

    def load(self, body: str, **load) -> dict:
        """Run the load generator with one of the bench's bodies and return its numbers with ours added.

        A run in which foreign processes took too much of the gateway's core is done again.
        """
        options = self.bench.options
        for _ in range(options.retry + 1):
            numbers = self.load_once(body, load)
            if numbers["noise"] <= options.max_noise or self.process is None:
                break
        return numbers

    def load_once(self, body: str, load: dict) -> dict:
        load = {
            "port": self.port,
            "path": "/v1/messages",
            "headers": self.headers,
            "body": str(self.bench.folder / f"{body}.json"),
            **load,
        }
        command = [sys.executable, str(HERE / "loadgen.py"), json.dumps(load)]
        began, busy_before, cpu_before = time.monotonic(), busy_s(GATEWAY_CORE), self.usage()[0]
        output, rss_mib = self.watch(command)
        wall_s, cpu_s = time.monotonic() - began, self.usage()[0] - cpu_before
        numbers = json.loads(output)
        return {
            **numbers,
            "noise": max(0, busy_s(GATEWAY_CORE) - busy_before - cpu_s) / wall_s,
            "rss_mib": rss_mib,
            "requests_s": numbers["requests"] / numbers["seconds"],
            "events_s": numbers["events"] / numbers["seconds"],
            "mb_s": numbers["bytes"] / numbers["seconds"] / 1e6,
            "cpu_share": cpu_s / wall_s,
            "cpu_us_request": cpu_s * 1e6 / max(1, numbers["requests"]),
            "cpu_us_event": cpu_s * 1e6 / max(1, numbers["events"]),
        }

    def watch(self, command: list[str]) -> tuple[bytes, float]:
        """Run the load generator; return its output and the most MiB that the gateway held meanwhile."""
        rss_mib = 0.0
        with spawned(LOAD_CORE, command, stdout=subprocess.PIPE) as client:
            try:
                while True:
                    try:
                        return client.communicate(timeout=0.5)[0], rss_mib
                    except subprocess.TimeoutExpired:
                        rss_mib = max(rss_mib, self.usage()[1])
            finally:
                client.kill()  # where we are stopped ourselves


# --- The scenarios: a row of one target and one repetition ------------------------


def s1(gateway: Gateway) -> Row:
    """2 KB request, JSON answer."""
    options, row = gateway.bench.options, {}
    for conns in options.conns:
        got = gateway.load("one", conns=conns, seconds=options.seconds)
        row |= {
            f"rps@{conns}": got["requests_s"],
            f"p50@{conns}": got["total_ms"].get("p50"),
            f"p99@{conns}": got["total_ms"].get("p99"),
            f"cpu_us@{conns}": got["cpu_us_request"],
            f"errors@{conns}": got["errors"],
            f"noise@{conns}": got["noise"],
        }
    return row


def s2(gateway: Gateway) -> Row:
    """150 KB request, a stream of 300 events as fast as they go."""
    got = gateway.load("burst", conns=16, seconds=gateway.bench.options.seconds, events=300)
    return {
        "events/s": got["events_s"],
        "MB/s": got["mb_s"],
        "cpu_us/event": got["cpu_us_event"],
        "cpu_ms/request": got["cpu_us_request"] / 1000,
        "ttfb_p50": got["ttfb_ms"].get("p50"),
        "ttfb_p99": got["ttfb_ms"].get("p99"),
        "rss": got["rss_mib"],
        "errors": got["errors"],
        "noise": got["noise"],
    }


def s3(gateway: Gateway) -> Row:
    """Thousands of slow streams at once."""
    options, row = gateway.bench.options, {}
    for streams, delay_ms in SLOW_STREAMS:
        got = gateway.load(
            f"slow{streams}",
            conns=streams,
            seconds=1,
            ramp=options.ramp,
            per_conn=1,
            events=options.slow_s * 1000 // delay_ms,
            grace=options.slow_s + 20,
        )
        row |= {
            f"lag_p50@{streams}": got["lag_ms"].get("p50"),
            f"lag_p99@{streams}": got["lag_ms"].get("p99"),
            f"ttfb_p99@{streams}": got["ttfb_ms"].get("p99"),
            f"rss@{streams}": got["rss_mib"],
            f"cpu_us/event@{streams}": got["cpu_us_event"],
            f"cpu_share@{streams}": got["cpu_share"],
            f"errors@{streams}": got["errors"],
            f"noise@{streams}": got["noise"],
        }
    return row


def s4(gateway: Gateway) -> Row:
    """Start to the first 200, and what it holds when idle."""
    if gateway.process is None:
        return {}
    first_200_s = gateway.restart()
    time.sleep(2)
    return {"first_200_s": first_200_s, "idle_rss": gateway.usage()[1]}


def s5(gateway: Gateway) -> Row:
    """1000 small requests to an upstream with TLS."""
    bench = gateway.bench
    plain = gateway.load("one", conns=8, seconds=30, limit=1000)
    plain_p50 = plain["total_ms"].get("p50")
    if gateway.process is None:
        return {"p50_plain": plain_p50}
    try:
        gateway.restart(tls=True)
        gateway.load("one", conns=8, seconds=10, limit=100)
        before = bench.upstream_stats()["tls_connections"]
        tls = gateway.load("one", conns=8, seconds=30, limit=1000)
        new = bench.upstream_stats()["tls_connections"] - before
    finally:
        gateway.restart()
    tls_p50 = tls["total_ms"].get("p50")
    return {
        "new_conns/1000": new * 1000 / max(1, tls["requests"]),
        "p50_tls": tls_p50,
        "p50_plain": plain_p50,
        "added_ms": tls_p50 - plain_p50 if tls_p50 and plain_p50 else None,
        "cpu_us_tls": tls["cpu_us_request"],
        "cpu_us_plain": plain["cpu_us_request"],
        "errors": tls["errors"],
        "noise": tls["noise"],
    }


def s6(gateway: Gateway) -> Row:
    """32 streams at typing speed: every event comes alone."""
    got = gateway.load("typing", conns=32, seconds=gateway.bench.options.seconds, events=200)
    return {
        "lag_p50": got["lag_ms"].get("p50"),
        "lag_p95": got["lag_ms"].get("p95"),
        "lag_p99": got["lag_ms"].get("p99"),
        "cpu_us/event": got["cpu_us_event"],
        "errors": got["errors"],
        "noise": got["noise"],
    }


def s7(gateway: Gateway) -> Row:
    """The books: what 64 clients at once spend of a limit of 1 USD, and what kill -9 takes from the record."""
    row: Row = {"usd_of_1": None, "lost_at_kill": None}
    if gateway.target.limited:
        began = calls = gateway.bench.upstream_stats()["requests"]
        gateway.restart(is_limited=True)
        before = 0
        while before < calls:  # until nothing more is let through
            before = calls
            gateway.load_once("one", {"conns": 64, "seconds": 2})
            calls = gateway.bench.upstream_stats()["requests"]
        row["usd_of_1"] = (calls - began) * USD_PER_CALL
    if gateway.target.booked:
        gateway.restart()
        time.sleep(1)  # the call of the start is on record then
        booked_before = gateway.target.booked(gateway.folder)
        killer = threading.Timer(2, gateway.kill)
        killer.start()
        got = gateway.load_once("one", {"conns": 64, "seconds": 3})
        killer.join()
        booked = gateway.target.booked(gateway.folder)
        refused = sum(count for kind, count in got["error_kinds"].items() if kind.startswith("status"))
        row["lost_at_kill"] = got["requests"] - refused - (booked - booked_before)
    if gateway.process:
        gateway.restart()
    return row


SCENARIOS = {"s1": s1, "s2": s2, "s3": s3, "s4": s4, "s5": s5, "s6": s6, "s7": s7}


# --- The bench: what all targets share, and the turns -----------------------------


def say(*words) -> None:
    print(*words, file=sys.stderr, flush=True)


class Bench:
    """Owns the mock upstream, the request bodies and the gateways; `close` ends them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.gateways = []
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.ca, self.key = self.folder / "cert.pem", self.folder / "key.pem"
        self.port, self.tls_port = free_port(), free_port()
        self.write_bodies()
        self.make_certificate()
        self.start_mock()

    def write_bodies(self) -> None:
        self.bodies = {
            "one": request_body(SMALL_KIB),
            "burst": request_body(LARGE_KIB, events=300),
            "typing": request_body(SMALL_KIB, events=200, delay_ms=10),
        }
        for streams, delay_ms in SLOW_STREAMS:
            events = self.options.slow_s * 1000 // delay_ms
            self.bodies[f"slow{streams}"] = request_body(SMALL_KIB, events, delay_ms)
        for name, body in self.bodies.items():
            (self.folder / f"{name}.json").write_bytes(body)

    def make_certificate(self) -> None:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        files = ["-keyout", str(self.key), "-out", str(self.ca)]
        command = ["openssl", "req", "-x509", "-days", "2", *curve, *names, *files]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def start_mock(self) -> None:
        ports = ["--port", str(self.port), "--tls-port", str(self.tls_port)]
        command = [sys.executable, str(HERE / "mock_upstream.py"), *ports]
        command += ["--cert", str(self.ca), "--key", str(self.key)]
        self.mock = spawned(LOAD_CORE, command, stdout=subprocess.PIPE, start_new_session=True)
        self.mock.stdout.readline()  # "ready"

    def upstream_marks(self, tls: bool) -> dict[str, object]:
        scheme, host, port = "http", "127.0.0.1", self.port
        if tls:
            scheme, host, port = "https", "localhost", self.tls_port
        url = f"{scheme}://{host}:{port}"
        return {"SCHEME": scheme, "UPHOST": host, "UPPORT": port, "UP": url, "CA": self.ca}

    def upstream_stats(self) -> dict[str, int]:
        """Return how many connections, TLS connections and requests the mock upstream has had so far."""
        return json.loads(call(self.port, "GET", "/__stats")[1])

    def start_gateways(self) -> None:
        """Start and warm up every target; one that does not start is left out."""
        for name in self.options.targets:
            gateway = Gateway(name, TARGETS[name], self)
            try:
                took_s = gateway.start()
                small = gateway.load("one", conns=4, seconds=20, limit=self.options.warm)
                large = gateway.load("burst", conns=4, seconds=8, limit=40, events=300)
            except FAILURES as error:
                say("SKIPPED", name, error)
                gateway.stop()
                continue
            errors = small["error_kinds"] | large["error_kinds"]
            say(f"started {name} in {took_s:.2f} s; errors while warming up: {errors or 'none'}")
            self.gateways.append(gateway)

    def run(self, scenario: str) -> dict[str, list[Row]]:
        """Return the rows of each target, one a repetition; a row is empty where the target failed."""
        rows = {gateway.name: [] for gateway in self.gateways}
        for repetition in range(self.options.reps):
            turn = repetition % len(self.gateways)
            for gateway in self.gateways[turn:] + self.gateways[:turn]:
                row = self.visit(scenario, gateway)
                rows[gateway.name].append(row)
                if row:
                    numbers = " ".join(f"{column}={shown(value)}" for column, value in row.items())
                    say(scenario, repetition, gateway.name, numbers)
        return {name: own for name, own in rows.items() if any(own)}

    def visit(self, scenario: str, gateway: Gateway) -> Row:
        try:
            if gateway.is_down():
                gateway.restart()
            return SCENARIOS[scenario](gateway)
        except FAILURES as error:
            say("FAILED", scenario, gateway.name, str(error)[:600])
            return {}

    def baseline(self) -> str:
        """Return the target that ratios refer to: the one asked for, else the first that is a gateway."""
        started = [gateway.name for gateway in self.gateways if gateway.target.command]
        return self.options.baseline or (started or ["direct"])[0]

    def close(self) -> None:
        for gateway in self.gateways:
            gateway.stop()
        stop_group(self.mock)
        shutil.rmtree(self.folder, ignore_errors=True)


# --- The report -------------------------------------------------------------------


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    decimals = next((count for count, below in DECIMALS if abs(value) < below), 0)
    return f"{value:.{decimals}f}"


def columns_of(rows: list[Row]) -> list[str]:
    """Return the columns to show; errors only where there were some."""
    names = list(dict.fromkeys(name for row in rows for name in row if not name.startswith("noise")))
    return [name for name in names if not name.startswith("errors") or any(row.get(name) for row in rows)]


def cell(column: str, own: list[Row], base: list[Row]) -> str:
    """Return median, spread and ratio; `own` and `base` are parallel, and `base` empty for itself."""
    values = [row[column] for row in own if row.get(column) is not None]
    if not values:
        return "-"
    middle = statistics.median(values)
    text = shown(middle)
    if column.startswith("errors"):
        return text
    if len(values) > 1 and middle:
        text += f" ±{50 * (max(values) - min(values)) / abs(middle):.0f}%"
    pairs = [(row.get(column), other.get(column)) for row, other in zip(own, base, strict=False)]
    ratios = [value / reference for value, reference in pairs if value is not None and reference]
    return f"{text} ×{shown(statistics.median(ratios))}" if ratios else text


def noise(rows: list[Row]) -> str:
    values = [value for row in rows for name, value in row.items() if name.startswith("noise")]
    return f"{100 * statistics.median(values):.0f}%" if values else "-"


def table(scenario: str, results: dict[str, list[Row]], base: str) -> str:
    """Return the Markdown table of a scenario from the rows of each target."""
    columns = columns_of([row for rows in results.values() for row in rows])
    repetitions = max(len(rows) for rows in results.values())
    legend = f"median, ± half of min..max in %; ×: ratio to {base}"
    lines = [
        f"\n### {scenario} ({repetitions} repetitions; {legend})\n",
        f"| target | {' | '.join(columns)} | noise |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, rows in results.items():
        reference = results.get(base, []) if name != base else []
        cells = [cell(column, rows, reference) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {noise(rows)} |")
    return "\n".join(lines)


# --- The command line -------------------------------------------------------------


def list_of(kind, known=None):
    """Return an argparse type: values between commas, each one of `known` where that is given."""

    def parsed(text: str) -> list:
        values = [kind(word) for word in text.split(",")]
        for value in values:
            if known and value not in known:
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(known)}")
        return values

    return parsed


def parse_options() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--targets", default="direct,nginx,ours", type=list_of(str, TARGETS), help=", ".join(TARGETS))
    add("--scenarios", default="s1,s2", type=list_of(str, SCENARIOS), help=", ".join(SCENARIOS))
    add("--reps", type=int, default=3)
    add("--seconds", type=float, default=3, help="length of one measurement")
    add("--conns", default="1,16,64", type=list_of(int), help="s1: connections")
    add("--slow-s", type=int, default=8, help="s3: length of one slow stream")
    add("--ramp", type=float, default=3, help="s3: seconds to open the streams")
    add("--baseline", choices=TARGETS, help="what ratios refer to; default: the first target but direct")
    add("--max-noise", type=float, default=0.15, help="foreign share of the gateway's core")
    add("--retry", type=int, default=2, help="how often a noisy measurement is done again")
    add("--warm", type=int, default=300, help="requests before the first measurement")
    add("--json", type=Path, help="write every row here")
    return parser.parse_args()


def prepare_machine() -> None:
    """Raise the limit of open files (s3 needs thousands); exit where measurements cannot be pinned."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    missing = [program for program in ("taskset", "openssl") if not shutil.which(program)]
    if missing:
        sys.exit(f"not found: {', '.join(missing)}")
    if not {GATEWAY_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        sys.exit(f"cores {GATEWAY_CORE} and {LOAD_CORE} are needed")


def main() -> None:
    options = parse_options()
    prepare_machine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # unwinds, and so ends what we started
    with contextlib.closing(Bench(options)) as bench:
        bench.start_gateways()
        if not bench.gateways:
            sys.exit("no target started")
        results = {}
        for scenario in options.scenarios:
            results[scenario] = bench.run(scenario)
            if results[scenario]:
                print(table(scenario, results[scenario], bench.baseline()), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

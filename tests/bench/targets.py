"""What can be measured: one entry per gateway.

Strings may hold marks, which are filled in at the start: @PORT@ the port to listen on, @UP@ the upstream's
URL (http or https), its parts @SCHEME@ @UPHOST@ @UPPORT@, @CA@ the file with its certificate authority, and
@DIR@ a scratch folder, which is also the working directory.
"""

import json
import os
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
GATEWAY = Path(os.environ.get("GATEWAY", HERE.parent.parent)).resolve() / "gateway.py"
GATEWAY_PY = os.path.abspath(os.environ.get("GATEWAY_PY", sys.executable))
# What others publish: a folder with npm's node_modules, and the program of PyPI's smg.
NODE_MODULES = Path(os.environ.get("BENCH_NODE", "node_modules")).resolve()
SMG = Path(os.environ.get("BENCH_SMG", "smg")).resolve()

OUR_KEY = "sk-proxy-benchbenchbenchbenchbenchbench"
# The limits are there to be counted, and too high to be reached.
OURS = f"""
server: {{host: 127.0.0.1, port: @PORT@}}
upstreams:
  - {{name: mock, url: "@UP@", api_key: sk-upstream, format: anthropic, ca_file: "@CA@"}}
keys:
  - name: bench
    key: {OUR_KEY}
    limits: {{tokens: 1000B, usd/day: 1000M, requests/minute: 100M, concurrent: 100k}}
prices:
  "*": {{input: 3, output: 15, cache_write_5m: 3.75, cache_write_1h: 6, cache_read: 0.3}}
usage: {{directory: usage, fsync: 1s}}
"""
ONE_DOLLAR = OURS.replace("usd/day: 1000M", "usd: 1")

NGINX = """
worker_processes 1; daemon off; pid @DIR@/nginx.pid; error_log @DIR@/error.log crit;
events { worker_connections 16384; }
http {
  access_log off; keepalive_requests 1000000; client_max_body_size 64m; client_body_buffer_size 1m;
  client_body_temp_path @DIR@/body; proxy_temp_path @DIR@/proxy;
  fastcgi_temp_path @DIR@/fastcgi; uwsgi_temp_path @DIR@/uwsgi; scgi_temp_path @DIR@/scgi;
  upstream up { server @UPHOST@:@UPPORT@; keepalive 256; keepalive_requests 1000000; }
  server {
    listen 127.0.0.1:@PORT@ backlog=4096;
    location / {
      proxy_pass @SCHEME@://up; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
      proxy_ssl_trusted_certificate @CA@; proxy_ssl_verify on;
      proxy_ssl_name localhost; proxy_ssl_server_name on;
    }
  }
}
"""


@dataclass(frozen=True)
class Target:
    """How one gateway is started and spoken to."""

    command: tuple[str, ...] = ()  # empty: nothing to start, the mock upstream itself
    files: dict[str, str] = field(default_factory=dict)  # written into @DIR@ before the start
    env: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # sent with every request
    needs: Path = HERE  # must exist, or the target is skipped
    limited: dict[str, str] = field(default_factory=dict)  # `files` with which the key may spend 1 USD and no more
    booked: Callable[[Path], int] | None = None  # counts the calls that are on record in @DIR@


def lines_of_ledger(folder: Path) -> int:
    """Count the calls in the gateway's ledger."""
    lines = [line for path in folder.glob("usage/*.jsonl") for line in path.read_bytes().split(b"\n")]
    return sum(json.loads(line)["type"] == "call" for line in lines if line.endswith(b"}"))


def rows_of_ccflare(folder: Path) -> int:
    """Count the calls in better-ccflare's database."""
    with sqlite3.connect(folder / ".config/better-ccflare/better-ccflare.db") as database:
        return int(database.execute("select count(*) from requests").fetchone()[0])


def reference(script: str) -> Target:
    """Return the target for one of our small proxies; each checks the one key, as `ours` does."""
    return Target(
        command=(sys.executable, str(HERE / "refs" / script)),
        env={"PORT": "@PORT@", "UPSTREAM": "@UP@", "CA": "@CA@"},
        headers={"Authorization": "Bearer sk-bench"},
    )


TARGETS = {
    "direct": Target(),
    "nginx": Target(  # no key check, no metering: the floor for a proxy
        command=("/usr/sbin/nginx", "-c", "@DIR@/nginx.conf", "-p", "@DIR@"),
        files={"nginx.conf": NGINX},
        needs=Path("/usr/sbin/nginx"),
    ),
    "ours": Target(
        command=(GATEWAY_PY, str(GATEWAY), "--config", "@DIR@/config.yaml", "serve"),
        files={"config.yaml": OURS},
        headers={"Authorization": f"Bearer {OUR_KEY}"},
        needs=GATEWAY,
        limited={"config.yaml": ONE_DOLLAR},
        booked=lines_of_ledger,
    ),
    "tornado-simple": reference("ref_tornado_simple.py"),
    "fastapi-httpx": reference("ref_fastapi_httpx.py"),
    "aiohttp": reference("ref_aiohttp.py"),
    "smg": Target(  # Rust; one tenant key, its log off; limits are tokens a second at most
        command=(
            *(str(SMG), "launch", "--backend", "anthropic", "--host", "127.0.0.1", "--port", "@PORT@"),
            *("--worker-urls", "@UP@", "--tenant-api-key", "bench:sk-bench", "--log-level", "error"),
        ),
        headers={"Authorization": "Bearer sk-bench"},
        needs=SMG,
    ),
    "lmnr": Target(  # a library in Rust, run by node; neither keys nor limits, no record
        command=("node", str(HERE / "refs/start_lmnr.cjs")),
        env={"LMNR": str(NODE_MODULES / "@lmnr-ai/claude-code-proxy"), "PORT": "@PORT@", "UPSTREAM": "@UP@"},
        needs=NODE_MODULES / "@lmnr-ai/claude-code-proxy",
    ),
    "ccflare": Target(  # keys and a database; no limits
        command=(sys.executable, str(HERE / "refs/start_ccflare.py")),
        env={
            "CCFLARE": str(NODE_MODULES / "better-ccflare/dist/better-ccflare"),
            "PORT": "@PORT@",
            "UPSTREAM": "@UP@",
        },
        needs=NODE_MODULES / "better-ccflare",
        booked=rows_of_ccflare,
    ),
    "portkey": Target(  # the open part: neither keys of its own nor limits, no record
        command=(
            "node",
            str(NODE_MODULES / "@portkey-ai/gateway/build/start-server.js"),
            "--headless",
            "--port=@PORT@",
        ),
        headers={
            "x-portkey-provider": "anthropic",
            "x-portkey-custom-host": "@UP@/v1",
            "Authorization": "Bearer sk-bench",
            "anthropic-version": "2023-06-01",
        },
        needs=NODE_MODULES / "@portkey-ai/gateway",
    ),
}

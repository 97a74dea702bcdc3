"""How long `admit` and `settle` take with five windows, and what that is made of. Prints µs per call.

python tests/bench/limits.py [CALLS]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import gateway as g  # noqa: E402

KEY = "sk-proxy-0123456789abcdefghijklmnopqrstuv"
CONFIG = f"""
upstreams: [{{name: demo, format: demo}}]
keys:
  - name: alice
    key: {KEY}
    limits: {{usd/day: 1M, usd/month: 1M, tokens/5h: 1B, requests/minute: 100M, tokens/week: 1B, concurrent: 16}}
"""
BODY = b'{"model": "claude-opus-5-5", "max_tokens": 4096, "messages": [{"role": "user", "content": "hello"}]}'


async def run(calls: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = g.Config.parse(CONFIG, Path(directory) / "config.yaml", g.Clock(), {})
        fold = g.Fold(g.Calendar(config.timezone))
        store, memory = g.MemoryStore(fold, config.clock), g.BodyMemory(1 << 20)
        limits = g.Limits(store, config.clock, g.Pace(), config.timezone)
        headers = [(b"x-api-key", KEY.encode())]
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call = g.Call(config, next(iter(config.keys)), g.ROUTES["/v1/messages"], b"", headers, "127.0.0.1")
        call.body = BODY
        g.read_request(call)
        line = (
            b'{"type":"call","time":"%b","key":"alice","model":"m","input_tokens":9,"output_tokens":9,"cost_usd":0.01}'
        )

        spent = {"admit": 0.0, "settle": 0.0}
        for _ in range(calls):
            posting = g.POSTING_DECODER.decode(line % g.utc_time(config.clock.wall()).encode())
            begun = time.perf_counter()
            with g.Reservation(limits, memory, call) as call.reservation:
                limits.enter(call.reservation)
                call.reservation.hold_body(len(BODY))
                await limits.admit(call, gone)
                admitted = time.perf_counter()
                fold.post([posting])
            spent["settle"] += time.perf_counter() - admitted
            spent["admit"] += admitted - begun
        for name, seconds in spent.items():
            print(f"{name:8} {seconds / calls * 1e6:6.2f} µs")
        print(f"{'together':8} {sum(spent.values()) / calls * 1e6:6.2f} µs")


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000))

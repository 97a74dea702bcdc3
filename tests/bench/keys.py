#!/usr/bin/env python3
"""Load a config of 10,000 keys in a process of its own; print how long that takes and the most memory it held.

    python tests/bench/keys.py [--keys 10000]

Linux only: the peak is VmHWM of /proc/self/status (proc(5)), imports included.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

GATEWAY = Path(__file__).resolve().parents[2]
LIMITS = {"usd/day": "20", "tokens/month": "50M", "requests/minute": "60", "concurrent": "16"}
CHILD = """
import re, sys, time
from pathlib import Path
import gateway
started = time.perf_counter()
config = gateway.Config.load(Path(sys.argv[1]))
seconds = time.perf_counter() - started
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(f"{len(list(config.keys))} keys: {seconds:.2f} s, {peak_kb / 1024:.0f} MB")
"""


def flow_key(name: str, key: str) -> str:
    """A key on one line."""
    limits = ", ".join(f"{limit}: {amount}" for limit, amount in LIMITS.items())
    return f"  - {{name: {name}, key: {key}, limits: {{{limits}}}}}\n"


def block_key(name: str, key: str) -> str:
    """A key on many lines."""
    limits = "".join(f"      {limit}: {amount}\n" for limit, amount in LIMITS.items())
    return f"  - name: {name}\n    key: {key}\n    limits:\n{limits}"


def main() -> None:
    """Measure both styles."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=10_000)
    count = parser.parse_args().keys
    for style, item in (("flow", flow_key), ("block", block_key)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            hashes = (hashlib.sha256(str(i).encode()).hexdigest() for i in range(count))
            keys = "".join(item(f"user{i:04}", f"sha256:{digest}:abcd") for i, digest in enumerate(hashes))
            path.write_text(f"upstreams: [{{name: demo, format: demo}}]\nkeys:\n{keys}")
            print(f"{style:5}", end=" ", flush=True)
            subprocess.run([sys.executable, "-c", CHILD, str(path)], cwd=GATEWAY, check=True)


if __name__ == "__main__":
    main()

"""Starts better-ccflare with one account, the mock upstream, and one API key.

Environment: CCFLARE the program, PORT, UPSTREAM. Its home is the working directory. The key is written to `key`.
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

program, port = os.environ["CCFLARE"], os.environ["PORT"]
env = {**os.environ, "HOME": os.getcwd()}
made = subprocess.run([program, "--generate-api-key", "bench"], env=env, capture_output=True, text=True, check=True)
key = re.search(r"btr-\w+", made.stdout)
if key is None:
    sys.exit(made.stdout)
server = subprocess.Popen([program, "--serve", "--port", port], env=env)
account = {"name": "mock", "apiKey": "sk-upstream", "customEndpoint": os.environ["UPSTREAM"], "priority": 0}
request = urllib.request.Request(
    f"http://127.0.0.1:{port}/api/accounts/anthropic-compatible",
    json.dumps(account).encode(),
    {"x-api-key": key[0], "content-type": "application/json"},
)
for _ in range(200):
    try:
        urllib.request.urlopen(request, timeout=5).close()
        break
    except OSError:
        time.sleep(0.1)
Path("headers.json").write_text(json.dumps({"x-api-key": key[0]}))
sys.exit(server.wait())

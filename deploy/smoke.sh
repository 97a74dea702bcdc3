#!/usr/bin/env bash
# Tries a built image as a person would, but hardened: read-only root, no capabilities, no new privileges, little memory.
#   deploy/smoke.sh IMAGE
# ENGINE      docker or podman, with options if need be; default: the one that is here
# SMOKE_ARGS  more arguments for its `run`, such as --platform linux/arm64
# SMOKE_URL   where the gateway is found, where SMOKE_ARGS has --network host; default: a free port of 127.0.0.1
set -euo pipefail

image=${1:?usage: deploy/smoke.sh IMAGE}
found=${ENGINE:-$(command -v docker || command -v podman || true)}
[ -n "$found" ] || { echo "smoke.sh: neither docker nor podman is here" >&2; exit 2; }
read -ra engine <<<"$found"
read -ra more <<<"${SMOKE_ARGS:-}"
name=claude-gateway-smoke-$$
scratch=$(mktemp -d)
wait_s=120   # an emulated platform takes its time

if [ -n "${SMOKE_URL:-}" ]; then
  more+=(-e GATEWAY_HOST=127.0.0.1 -e "GATEWAY_PORT=${SMOKE_URL##*:}")
else
  more+=(-p 127.0.0.1::8000)
fi

finish() {
  code=$?
  if [ $code != 0 ]; then
    echo "smoke.sh: failed; what the container said:" >&2
    "${engine[@]}" logs "$name" 2>&1 | tail -n 20 >&2 || true
  fi
  "${engine[@]}" rm -f "$name" >/dev/null 2>&1 || true
  "${engine[@]}" volume rm -f "$name" >/dev/null 2>&1 || true
  rm -rf "$scratch"
}
trap finish EXIT

ok() { printf 'ok: %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

# hardened [ARGUMENT…] IMAGE [COMMAND…], as the README's line starts it
hardened() {
  "${engine[@]}" run --name "$name" --read-only --cap-drop ALL --security-opt no-new-privileges --memory 256m --pids-limit 64 \
    "${more[@]}" "$@"
}

is_running() { [ "$("${engine[@]}" inspect -f '{{.State.Running}}' "$name")" = true ]; }

# start: on the volume, until it listens
start() {
  hardened -d -v "$name:/data" "$@" >/dev/null
  for _ in $(seq $((wait_s * 5))); do
    "${engine[@]}" logs "$name" >"$scratch/log" 2>&1
    if grep -q 'listens on' "$scratch/log"; then return; fi
    is_running || fail "it ended while it started"
    sleep 0.2
  done
  fail "it does not listen after $wait_s s"
}

url() { echo "${SMOKE_URL:-http://$("${engine[@]}" port "$name" 8000/tcp | head -n 1)}"; }

# stream KEY: one call through the demo upstream, to its end
stream() {
  curl -sSfN --max-time 60 "$(url)/v1/messages" -H "x-api-key: $1" \
    -d '{"model": "claude-demo", "max_tokens": 100, "stream": true, "messages": [{"role": "user", "content": "hello"}]}' \
    >"$scratch/answer" && grep -q '^event: message_stop' "$scratch/answer"
}

healthy() {
  if [[ ${engine[0]} == *podman ]]; then "${engine[@]}" healthcheck run "$name" >/dev/null && return; fi
  for _ in $(seq $wait_s); do
    state=$("${engine[@]}" inspect -f '{{if .State.Health}}{{.State.Health.Status}}{{else}}none{{end}}' "$name")
    case $state in healthy) return ;; unhealthy | none) break ;; esac
    sleep 1
  done
  fail "its own health check says: ${state:-no}"
}

stop() {
  "${engine[@]}" stop -t 60 "$name" >/dev/null
  code=$("${engine[@]}" inspect -f '{{.State.ExitCode}}' "$name")
  [ "$code" = 0 ] || fail "SIGTERM ended it with exit code $code"
  "${engine[@]}" rm -f "$name" >/dev/null
}

# refuses EXPECTED SHELL-COMMAND: after the command on a new volume it ends with exit code 1 and one line that says so
refuses() {
  "${engine[@]}" volume rm -f "$name" >/dev/null
  hardened --rm --user 0 -v "$name:/data" --entrypoint sh "$image" -c "$2"
  hardened -d -v "$name:/data" "$image" >/dev/null
  for _ in $(seq $((wait_s * 5))); do
    is_running || break
    sleep 0.2
  done
  code=$("${engine[@]}" inspect -f '{{.State.ExitCode}}' "$name")
  "${engine[@]}" logs "$name" >"$scratch/log" 2>&1
  "${engine[@]}" rm -f "$name" >/dev/null
  if [ "$code" != 1 ] || [ "$(wc -l <"$scratch/log")" != 1 ] || ! grep -q "$1" "$scratch/log"; then
    fail "expected exit code 1 and one line with '$1', got $code: $(cat "$scratch/log")"
  fi
}

start "$image"
! grep -q 'sk-proxy-[A-Za-z0-9]' "$scratch/log" || fail "its log shows the first key"
key=$("${engine[@]}" exec "$name" cat /data/first-key.txt)
ok "starts in an empty /data and makes a config and a key, which its log does not show"

"${engine[@]}" exec "$name" cat /proc/1/status >"$scratch/status"
[ "$(awk '/^Uid:/ {print $2}' "$scratch/status")" != 0 ] || fail "it runs as root"
[[ $(awk '/^CapEff:/ {print $2}' "$scratch/status") =~ ^0+$ ]] || fail "it has capabilities"
! "${engine[@]}" exec "$name" sh -c 'touch /app/x' 2>/dev/null || fail "its root can be written"
ok "not root, no capabilities, read-only root"

stream "$key" || fail "no streamed answer: $(tail -c 200 "$scratch/answer")"
"${engine[@]}" exec "$name" sh -c 'grep -q "\"outcome\":\"completed\"" /data/usage/usage-*.jsonl' || fail "the call is not in the ledger"
ok "one streamed call, and its line in the ledger"

healthy
ok "its own health check says healthy"

"${engine[@]}" exec "$name" claude-gateway key add second >"$scratch/second"
second=$(grep -o 'sk-proxy-[A-Za-z0-9]*' "$scratch/second" | head -n 1)
for _ in $(seq 50); do
  if stream "$second" 2>"$scratch/error"; then break; fi
  sleep 0.2
done
grep -q message_stop "$scratch/answer" || fail "a key that was added does not work: $(cat "$scratch/error")"
ok "a key added while it runs works"

stop
ok "SIGTERM ends it with exit code 0"

start "$image"
stream "$key" || fail "the key is forgotten"
"${engine[@]}" exec "$name" claude-gateway usage --by key --csv >"$scratch/usage"
grep -q '^me,2,' "$scratch/usage" || fail "it forgot what was spent: $(cat "$scratch/usage")"
stop
ok "a new container on the same volume remembers"

"${engine[@]}" volume rm -f "$name" >/dev/null
start --user 12345 "$image"
stream "$("${engine[@]}" exec "$name" cat /data/first-key.txt)" || fail "no streamed answer"
stop
ok "an arbitrary user on a new volume"

refuses 'cannot write .* for user 10001' 'touch /data/config.yml && chmod 0755 /data'
refuses 'is a folder' 'mkdir /data/config.yaml'
ok "says in a line what is wrong where /data cannot be written, and where config.yaml is a folder"

echo "$image passed"

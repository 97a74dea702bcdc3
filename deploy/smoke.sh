#!/usr/bin/env bash
# Tries a built image as a person would, but hardened: read-only root, no capabilities, no new privileges, little memory.
#   deploy/smoke.sh IMAGE
# ENGINE      docker or podman, with options if need be; default: the one that is here
# SMOKE_ARGS  more arguments for its `run`, such as --platform linux/arm64
# SMOKE_URL   where the gateway is found, where SMOKE_ARGS has --network host; default: a free port of 127.0.0.1
set -euo pipefail

image=${1:?usage: deploy/smoke.sh IMAGE}
read -ra engine <<<"${ENGINE:-$(command -v docker || command -v podman || true)}"
read -ra more <<<"${SMOKE_ARGS:-}"
name=claude-gateway-smoke-$$
scratch=$(mktemp -d)
patience_s=120   # an emulated platform takes its time

if [ -n "${SMOKE_URL:-}" ]; then
  more+=(-e GATEWAY_HOST=127.0.0.1 -e "GATEWAY_PORT=${SMOKE_URL##*:}")
else
  more+=(-p 127.0.0.1::8000)
fi

finish() {
  if [ $? != 0 ]; then
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
inside() { "${engine[@]}" exec "$name" "$@"; }
state() { "${engine[@]}" inspect -f "{{.State.$1}}" "$name"; }

# within SECONDS COMMAND…: until it succeeds
within() {
  for _ in $(seq $(($1 * 5))); do
    if "${@:2}"; then return; fi
    sleep 0.2
  done
  return 1
}

# run [ARGUMENT…] IMAGE [COMMAND…]: on the volume, as the README's line starts it
run() {
  "${engine[@]}" run --name "$name" -v "$name:/data" --read-only --cap-drop ALL --security-opt no-new-privileges --memory 256m \
    --pids-limit 64 "${more[@]}" "$@" >/dev/null
}

listens() {
  "${engine[@]}" logs "$name" >"$scratch/log" 2>&1
  if grep -q 'listens on' "$scratch/log"; then return; fi
  [ "$(state Running)" = true ] || fail "it ended while it started"
  return 1
}

start() {
  run -d "$@"
  within $patience_s listens || fail "it does not listen after $patience_s s"
}

# ended CODE: stopped with this exit code
ended() { [ "$(state Running)" = false ] && [ "$(state ExitCode)" = "$1" ]; }

stop() {
  "${engine[@]}" stop -t 60 "$name" >/dev/null
  ended 0 || fail "SIGTERM ended it with exit code $(state ExitCode)"
  "${engine[@]}" rm -f "$name" >/dev/null
}

# stream KEY: one call through the demo upstream, to its end
stream() {
  local url=${SMOKE_URL:-http://$("${engine[@]}" port "$name" 8000/tcp | head -n 1)}
  curl -sSfN --max-time 60 "$url/v1/messages" -H "x-api-key: $1" \
    -d '{"model": "claude-demo", "max_tokens": 100, "stream": true, "messages": [{"role": "user", "content": "hello"}]}' \
    >"$scratch/answer" 2>&1 && grep -q '^event: message_stop' "$scratch/answer"
}

is_healthy() {
  if [[ ${engine[0]} == *podman ]]; then "${engine[@]}" healthcheck run "$name" >/dev/null; else [ "$(state Health.Status)" = healthy ]; fi
}

start "$image"
! grep -q 'sk-proxy-[A-Za-z0-9]' "$scratch/log" || fail "its log shows the first key"
key=$(inside cat /data/first-key.txt)
ok "starts in an empty /data and makes a config and a key, which its log does not show"

inside cat /proc/1/status >"$scratch/status"
[ "$(awk '/^Uid:/ {print $2}' "$scratch/status")" != 0 ] || fail "it runs as root"
[[ $(awk '/^CapEff:/ {print $2}' "$scratch/status") =~ ^0+$ ]] || fail "it has capabilities"
! inside touch /app/x 2>/dev/null || fail "its root can be written"
ok "not root, no capabilities, read-only root"

stream "$key" || fail "no streamed answer: $(tail -c 200 "$scratch/answer")"
inside sh -c 'grep -q "\"outcome\":\"completed\"" /data/usage/usage-*.jsonl' || fail "the call is not in the ledger"
ok "one streamed call, and its line in the ledger"

within $patience_s is_healthy || fail "its own health check says: $(state Health.Status)"
ok "its own health check says healthy"

second=$(inside claude-gateway key add second | grep -o 'sk-proxy-[A-Za-z0-9]*' | head -n 1)
within 10 stream "$second" || fail "a key that was added does not work: $(tail -c 200 "$scratch/answer")"
ok "a key added while it runs works"

stop
ok "SIGTERM ends it with exit code 0"

start "$image"
stream "$key" || fail "the key is forgotten"
inside claude-gateway usage --by key --csv >"$scratch/usage"
grep -q '^me,2,' "$scratch/usage" || fail "it forgot what was spent: $(cat "$scratch/usage")"
stop
ok "a new container on the same volume remembers"

"${engine[@]}" volume rm -f "$name" >/dev/null
start --user 12345 "$image"
stream "$(inside cat /data/first-key.txt)" || fail "no streamed answer"
stop
ok "an arbitrary user on a new volume"

"${engine[@]}" volume rm -f "$name" >/dev/null
run --rm --user 0 --entrypoint sh "$image" -c 'mkdir /data/lost+found && chmod 0755 /data'  # as a disk is
run -d "$image"
within $patience_s ended 1 || fail "it starts where it cannot write"
"${engine[@]}" logs "$name" 2>&1 | grep -q 'cannot write .* for user 10001' || fail "it does not say that it cannot write"
ok "says what is wrong where /data cannot be written"

echo "$image passed"

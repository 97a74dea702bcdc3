#!/usr/bin/env bash
# Builds the image on one machine, tests it and pushes it, with docker (buildx) or podman. The workflow's smoke test is
# this script's --test-only.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: deploy/build.sh [options]

  --platform P   the platform to build for, such as linux/arm64; default: this machine's
  --multi-arch   linux/amd64 and linux/arm64; --push makes one index of both
  --tag T        the image's name; may be repeated; default: claude-gateway:VERSION and claude-gateway:latest
  --test         try what was built with deploy/smoke.sh, every platform (foreign ones need emulation)
  --test-only    build nothing, try the image of the (first) --tag
  --push         push it to the registry that --tag names; after --test only what passed
  --no-cache     from nothing, with the newest base
  --verbose      show what the engine says
  --help         this

  ENGINE      docker or podman, with options if need be; default: the one that is here
  BUILD_ARGS  more arguments for its build, such as --build-arg PYTHON=3.14-slim
  SMOKE_ARGS, SMOKE_URL: see deploy/smoke.sh

  deploy/build.sh --test
  deploy/build.sh --multi-arch --test --push --tag ghcr.io/OWNER/claude-gateway:1.2.3
TEXT
}

fail() { printf 'build.sh: %s\n' "$*" >&2; exit 2; }

platforms=() tags=() test='' only='' push='' cache=() verbose='' run_on=''
while [ $# -gt 0 ]; do
  case $1 in
    --platform) platforms+=("${2:?--platform: which?}") && shift ;;
    --multi-arch) platforms=(linux/amd64 linux/arm64) ;;
    --tag) tags+=("${2:?--tag: which?}") && shift ;;
    --test) test=1 ;;
    --test-only) test=1 only=1 ;;
    --push) push=1 ;;
    --no-cache) cache=(--no-cache --pull) ;;
    --verbose) verbose=1 ;;
    --help | -h) usage && exit ;;
    *) usage >&2 && fail "unknown option $1" ;;
  esac
  shift
done

found=${ENGINE:-$(command -v docker || command -v podman || true)}
[ -n "$found" ] || fail "neither docker nor podman is here"
read -ra engine <<<"$found"
read -ra more <<<"${BUILD_ARGS:-}"
version=$(sed -n 's/^VERSION = "\(.*\)"$/\1/p' gateway.py)
if [ ${#platforms[@]} -gt 0 ]; then run_on=--platform; fi
[ -n "$run_on" ] || platforms=("linux/$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')")
if [ ${#tags[@]} = 0 ]; then
  [ -z "$push" ] || fail "--push needs a --tag that names a registry, such as ghcr.io/OWNER/claude-gateway:$version"
  tags=("claude-gateway:$version" claude-gateway:latest)
fi

# what the image tells of itself
labels=(--label "org.opencontainers.image.version=$version" --label "org.opencontainers.image.created=$(date -u +%Y-%m-%dT%H:%M:%SZ)")
if revision=$(git rev-parse HEAD 2>/dev/null); then labels+=(--label "org.opencontainers.image.revision=$revision"); fi
remote=$(git remote get-url origin 2>/dev/null || true)
source=$(sed -nE 's#^(git@|ssh://git@|https://)github\.com[:/](.*)#https://github.com/\2#p' <<<"${remote%.git}")
[ -z "$source" ] || more+=(--build-arg "SOURCE=$source")

# quietly COMMAND…: its output only if it fails
quietly() {
  if [ -n "$verbose" ]; then "$@"; return; fi
  if ! output=$("$@" 2>&1); then
    printf '%s\n' "$output" | tail -n 40 >&2
    fail "failed: $*"
  fi
}

is_podman() { [[ ${engine[0]} == *podman ]]; }
is_podman || [ -n "$only" ] || "${engine[@]}" buildx version >/dev/null 2>&1 || fail "docker has no buildx: install docker-buildx"

build() {
  if is_podman; then
    quietly "${engine[@]}" build --format docker ${cache[@]+"${cache[@]}"} "${labels[@]}" ${more[@]+"${more[@]}"} "$@" .
  else
    quietly "${engine[@]}" buildx build --provenance=false ${cache[@]+"${cache[@]}"} "${labels[@]}" ${more[@]+"${more[@]}"} "$@" .
  fi
}

# local_name PLATFORM: what one platform's image is called here, one of several by its architecture
local_name() { if [ ${#platforms[@]} = 1 ]; then echo "${tags[0]}"; else echo "${tags[0]}-${1##*/}"; fi; }

build_one() {
  local names=(--tag "$(local_name "$1")")
  if [ ${#platforms[@]} = 1 ]; then names=("${tags[@]/#/--tag=}"); fi
  if is_podman; then build --platform "$1" "${names[@]}"; else build --platform "$1" --load "${names[@]}"; fi
  echo "$(($("${engine[@]}" image inspect -f '{{.Size}}' "$(local_name "$1")") / 1000000)) MB, as the engine counts"
}

# push_tag TAG: with podman, of what was built above
push_tag() {
  if [ ${#platforms[@]} = 1 ]; then quietly "${engine[@]}" push "$1"; return; fi
  local list=claude-gateway-push-$$ images=()
  for platform in "${platforms[@]}"; do images+=("$(local_name "$platform")"); done
  quietly "${engine[@]}" manifest create "$list" "${images[@]}"
  quietly "${engine[@]}" manifest push --all --rm "$list" "docker://$1"
}

for platform in "${platforms[@]}"; do
  if [ -z "$only" ]; then
    echo "== build $(local_name "$platform") for $platform"
    build_one "$platform"
  fi
  if [ -n "$test" ]; then
    echo "== test $(local_name "$platform")"
    SMOKE_ARGS="${SMOKE_ARGS:-}${run_on:+ $run_on $platform}" deploy/smoke.sh "$(local_name "$platform")"
  fi
done

if [ -z "$push" ]; then exit; fi
echo "== push ${tags[*]}"
if is_podman; then
  for tag in "${tags[@]}"; do push_tag "$tag"; done
else # makes index and push in one go, from the layers that it has: what is pushed is what was built above
  cache=()
  build --platform "$(IFS=, && echo "${platforms[*]}")" --push "${tags[@]/#/--tag=}"
fi

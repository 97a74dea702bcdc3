#!/usr/bin/env bash
# Builds the image on one machine, tries it and pushes it, with docker (buildx) or podman.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: deploy/build.sh [options]

  --platform P   the platform to build for, such as linux/arm64; default: this machine's
  --multi-arch   linux/amd64 and linux/arm64; --push makes one index of both
  --tag T        the image's name; may be repeated; default: claude-gateway:VERSION and claude-gateway:latest
  --test         try what was built with deploy/smoke.sh, every platform (foreign ones need emulation)
  --push         push it to the registry that --tag names; after --test only what passed
  --no-cache     from nothing, with the newest base
  --help         this

  ENGINE      docker or podman, with options if need be; default: the one that is here
  BUILD_ARGS  more arguments for its build, such as --build-arg PYTHON=3.14-slim
  SMOKE_ARGS, SMOKE_URL: see deploy/smoke.sh

  deploy/build.sh --test
  deploy/build.sh --multi-arch --test --push --tag ghcr.io/OWNER/claude-gateway:1.2.3
TEXT
}

fail() { printf 'build.sh: %s\n' "$*" >&2; exit 2; }

platforms=() tags=() try='' push='' fresh=''
while [ $# -gt 0 ]; do
  case $1 in
    --platform) platforms+=("${2:?--platform: which?}") && shift ;;
    --multi-arch) platforms=(linux/amd64 linux/arm64) ;;
    --tag) tags+=("${2:?--tag: which?}") && shift ;;
    --test) try=1 ;;
    --push) push=1 ;;
    --no-cache) fresh=1 ;;
    --help | -h) usage && exit ;;
    *) usage >&2 && fail "unknown option $1" ;;
  esac
  shift
done

version=$(sed -n 's/^VERSION = "\(.*\)"$/\1/p' gateway.py)
if [ ${#tags[@]} = 0 ]; then
  [ -z "$push" ] || fail "--push needs a --tag that names a registry, such as ghcr.io/OWNER/claude-gateway:$version"
  tags=("claude-gateway:$version" claude-gateway:latest)
fi

# the engine, and what the image tells of itself
read -ra engine <<<"${ENGINE:-$(command -v docker || command -v podman || true)}"
case ${engine[0]:-} in
  '') fail "neither docker nor podman is here" ;;
  *podman) build=(build --format docker) load='' ;;
  *) build=(buildx build --provenance=false) load=--load ;;
esac
[ -z "$load" ] || "${engine[@]}" buildx version >/dev/null 2>&1 || fail "docker has no buildx: install docker-buildx"
build+=(--label "org.opencontainers.image.version=$version" --label "org.opencontainers.image.created=$(date -u +%Y-%m-%dT%H:%M:%SZ)")
if revision=$(git rev-parse HEAD 2>/dev/null); then build+=(--label "org.opencontainers.image.revision=$revision"); fi
remote=$(git remote get-url origin 2>/dev/null || true)
source=$(sed -nE 's#^(git@|ssh://git@|https://)github\.com[:/](.*)#https://github.com/\2#p' <<<"${remote%.git}")
[ -z "$source" ] || build+=(--build-arg "SOURCE=$source")
read -ra more <<<"${BUILD_ARGS:-}"
build+=(${more[@]+"${more[@]}"})

# Each platform under the first tag; of several with the architecture behind it.
images=()
for platform in "${platforms[@]:-}"; do
  image=${tags[0]}
  if [ ${#platforms[@]} -gt 1 ]; then image+=-${platform##*/}; fi
  echo "== $image${platform:+ for $platform}"
  "${engine[@]}" "${build[@]}" $load ${fresh:+--no-cache --pull} ${platform:+--platform "$platform"} --tag "$image" .
  echo "$(($("${engine[@]}" image inspect -f '{{.Size}}' "$image") / 1000000)) MB, as the engine counts"
  [ -z "$try" ] || SMOKE_ARGS="${SMOKE_ARGS:-}${platform:+ --platform $platform}" deploy/smoke.sh "$image"
  images+=("$image")
done

for tag in "${tags[@]}"; do
  if [ ${#images[@]} = 1 ]; then
    "${engine[@]}" tag "${images[0]}" "$tag"
    [ -z "$push" ] || "${engine[@]}" push "$tag"
  elif [ -n "$push" ] && [ -n "$load" ]; then  # docker: once more, from the layers that it has
    "${engine[@]}" "${build[@]}" --platform "$(IFS=, && echo "${platforms[*]}")" --push --tag "$tag" .
  elif [ -n "$push" ]; then
    "${engine[@]}" manifest create "claude-gateway-push-$$" "${images[@]}"
    "${engine[@]}" manifest push --all --rm "claude-gateway-push-$$" "docker://$tag"
  fi
done

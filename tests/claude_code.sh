#!/usr/bin/env bash
# Installs the real Claude Code from npm, for tests/test_claude_code.py, and prints the path of its program.
#
#   tests/claude_code.sh [FOLDER]      default: ~/.cache/claude-gateway-tests/claude-code; about 380 MB
set -euo pipefail

version=2.1.329
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/claude-gateway-tests/claude-code}

case "$(uname -s)-$(uname -m)" in
  Linux-x86_64) platform=linux-x64 ;;
  Linux-aarch64) platform=linux-arm64 ;;
  Darwin-arm64) platform=darwin-arm64 ;;
  *) echo "no Claude Code for $(uname -s) on $(uname -m)" >&2; exit 1 ;;
esac

program=$folder/node_modules/@anthropic-ai/claude-code-$platform/claude
if [[ "$("$program" --version 2>/dev/null)" != "$version "* ]]; then
  mkdir -p "$folder"
  npm install --silent --ignore-scripts --prefix "$folder" "@anthropic-ai/claude-code@$version" >&2
fi
"$program" --version >&2
echo "$program"

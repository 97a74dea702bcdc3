#!/bin/bash
# Stands in for the command of whose name it is a link: hands its words to tests/registry.py, and does what that answers.
exec 3<>"/dev/tcp/127.0.0.1/$STUB_PORT"
[ "${0##*/}" != gzip ] || cat >/dev/null
printf '%s\0' "$#" "${0##*/}" "$@" >&3
read -r code <&3
if [ "$code" = 0 ]; then cat <&3; else cat <&3 >&2; fi
exit "$code"

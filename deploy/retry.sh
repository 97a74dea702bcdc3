#!/bin/sh
# retry.sh COMMAND... - runs a command that talks to a registry, up to three times; its exit code is that of the last time.
for pause in 3 9; do
    "$@" && exit
    echo "retry.sh: failed with $?, again in $pause s: $1 $2" >&2
    sleep "$pause"
done
exec "$@"

#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs the compiler and keeps what ptxas reports of the kernels beside the object, as OBJECT.ptxas; the rest of what
# the compiler says passes through.
object=""
previous=""
for argument in "$@"; do
  [ "$previous" = "-o" ] && object=$argument
  previous=$argument
done
"$@" 2> "$object.said"
status=$?
grep -E '^ptxas info|bytes stack frame' "$object.said" > "$object.ptxas"
grep -vE '^ptxas info|bytes stack frame' "$object.said" >&2
rm -f "$object.said"
exit $status

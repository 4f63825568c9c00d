#!/usr/bin/env bash
# Ends the node that up.sh started on this machine, and all that runs in it. Never `ray stop`: that ends every Ray of
# the machine, whoever started it.
#   BATON_CLUSTER_DIR=/path   as for up.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
file=${BATON_CLUSTER_DIR:-$root/.run/cluster}/pid
[ -s "$file" ] || { echo "down.sh: no node runs here ($file is missing)"; exit 0; }
pid=$(cat "$file")
# A number may have come to be someone else's meanwhile.
if grep -qs "up.sh" "/proc/$pid/cmdline"; then
  kill "$pid"
  for _ in {1..300}; do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
  done
  if kill -0 "$pid" 2>/dev/null; then
    echo "down.sh: process $pid does not end; see ${file%pid}node.log" >&2
    exit 1
  fi
fi
rm -f "$file"
echo "down.sh: this machine has left the cluster"

#!/usr/bin/env bash
# Stops the cluster that local_start.sh started, and no other Ray: `ray stop` would end every Ray of this user.
set -euo pipefail
state="${RECRAY_CLUSTER_STATE:-$HOME/.ray/recray-local}"
if [ ! -f "$state/pid" ]; then
  echo "no cluster was started by local_start.sh" >&2
  exit 1
fi
pid="$(cat "$state/pid")"
if ps -p "$pid" -o args= 2>/dev/null | grep -q 'ray start'; then
  kill -TERM "$pid"
  for _ in $(seq 60); do
    ps -p "$pid" >/dev/null || break
    sleep 0.5
  done
  if ps -p "$pid" >/dev/null; then
    echo "process $pid did not end in 30 s" >&2
    exit 1
  fi
fi
rm -f "$state/pid"
echo "stopped"

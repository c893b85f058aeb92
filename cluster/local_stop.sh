#!/usr/bin/env bash
# Stops the cluster that local_start.sh started, and no other Ray: `ray stop` would end every Ray of this user.
set -euo pipefail
state="${RECRAY_CLUSTER_STATE:-$HOME/.ray/recray-local}"
if [ ! -f "$state/pid" ]; then
  echo "no cluster was started by local_start.sh" >&2
  exit 1
fi
pid="$(cat "$state/pid")"
runs() { ps -p "$pid" -o stat=,args= 2>/dev/null | grep -v '^Z' | grep -q 'ray start'; }
if runs; then
  kill -TERM "$pid"
  for _ in $(seq 120); do
    runs || break
    sleep 0.5
  done
  if runs; then
    echo "process $pid did not end in 60 s" >&2
    exit 1
  fi
fi
# The process ends before those it had started: agents that close their files, workers that were at something.
left() { ps -s "$pid" -o stat=,pid= 2>/dev/null | awk '$1 !~ /^Z/ { print $2 }'; }
for _ in $(seq 60); do
  [ -n "$(left)" ] || break
  sleep 0.5
done
if [ -n "$(left)" ]; then
  echo "ended by force, as they did not end in 30 s: $(left | tr '\n' ' ')" >&2
  left | xargs -r kill -KILL 2>/dev/null || true
fi
# Ray leaves its address behind, and the next run would look for a cluster there.
note="${RAY_TMPDIR:-/tmp}/ray/ray_current_cluster"
if cmp -s "$note" "$state/address"; then rm -f "$note"; fi
rm -f "$state/pid" "$state/address"
echo "stopped"

#!/usr/bin/env bash
# A one-machine Ray cluster that takes jobs: token authentication on, dashboard and jobs API on this machine only.
set -euo pipefail
cd "$(dirname "$0")/.."
state="${RECRAY_CLUSTER_STATE:-$HOME/.ray/recray-local}" # process id and log of the cluster started here
note="${RAY_TMPDIR:-/tmp}/ray/ray_current_cluster" # where Ray leaves the address of what it started
mkdir -p "$state"
if [ -f "$state/pid" ] && ps -p "$(cat "$state/pid")" -o args= 2>/dev/null | grep -q 'ray start'; then
  echo "already running, process $(cat "$state/pid"); stop it with cluster/local_stop.sh" >&2
  exit 1
fi

# A job's `python` is the one that the cluster finds first.
export RAY_AUTH_MODE=token PATH="$PWD/.venv/bin:$PATH"
ray get-auth-token --generate >/dev/null
# --block: one process that takes all others of this cluster with it, so that stopping need not guess by name. A free
# port for the agent: where another Ray of this machine has the usual one, no job could be submitted.
nohup setsid ray start --head --block --dashboard-host=127.0.0.1 --dashboard-port=8265 \
  --dashboard-agent-listen-port=0 --disable-usage-stats \
  >"$state/log" 2>&1 </dev/null &
echo $! >"$state/pid"

for _ in $(seq 60); do
  if [ -f "$note" ] && ray job list --address http://127.0.0.1:8265 >/dev/null 2>&1; then
    cp "$note" "$state/address"
    echo "Ray runs (process $(cat "$state/pid"), log $state/log). From the project's root:"
    echo "  export RAY_AUTH_MODE=token"
    echo "  .venv/bin/ray job submit --address http://127.0.0.1:8265 --working-dir . \\"
    echo "      -- python -m pipelines.run --recipe demo --workspace \$PWD/workspace-demo"
    echo "Stop with cluster/local_stop.sh"
    exit 0
  fi
  ps -p "$(cat "$state/pid")" >/dev/null || break
  sleep 1
done
echo "Ray did not start; its log:" >&2
tail -n 20 "$state/log" >&2
exit 1

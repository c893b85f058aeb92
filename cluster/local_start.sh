#!/usr/bin/env bash
# A one-machine Ray cluster that takes jobs: token authentication on, dashboard and jobs API on this machine only.
set -euo pipefail
cd "$(dirname "$0")/.."
ray="${RAY:-.venv/bin/ray}"

export RAY_AUTH_MODE=token
"$ray" get-auth-token --generate >/dev/null
"$ray" start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --dashboard-port=8265 --disable-usage-stats

cat <<TEXT

Submit from the project's root, with the token that lies in ~/.ray/auth_token:
  export RAY_AUTH_MODE=token
  $ray job submit --address http://127.0.0.1:8265 --working-dir . -- python -m pipelines.run --recipe demo --workspace \$PWD/workspace-demo
Stop with cluster/local_stop.sh.
TEXT

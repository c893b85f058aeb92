#!/usr/bin/env bash
# Stops the Ray of this machine and user, and all jobs on it.
set -euo pipefail
cd "$(dirname "$0")/.."
RAY_AUTH_MODE=token "${RAY:-.venv/bin/ray}" stop

#!/usr/bin/env bash
# From a fresh clone to a six-view driving video: sets up .venv, then runs `mila demo`.
#   bash scripts/demo.sh            reuses what is finished; the last line printed is the report's path
#   bash scripts/demo.sh --fresh    starts over; all arguments go to `mila demo`
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
cd "$root"  # results lie in runs/demo of the repository, wherever this was called from
exec .venv/bin/python -m mila_jax demo "$@"

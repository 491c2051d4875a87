#!/usr/bin/env bash
# Sets up .venv with the test requirements and runs the tests.
#   bash scripts/test.sh                 all but the slow ones
#   bash scripts/test.sh --slow          all; other arguments go to pytest
#   bash scripts/test.sh -k video -x     for example
# Files go to workers in the order of tests/conftest.py. On the CPU unless JAX_PLATFORMS says otherwise.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
marker="not slow"
level=1
arguments=()
for argument in "$@"; do
  if [ "$argument" = --slow ]; then marker=""; level=3; else arguments+=("$argument"); fi
done
bash "$root/scripts/setup.sh" --test
cd "$root"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Of machine code; the slow tests compute for minutes, the others mostly compile (tests/conftest.py).
[[ "${XLA_FLAGS:-}" == *--xla_backend_optimization_level* ]] || export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=$level"
exec .venv/bin/python -m pytest -m "$marker" -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"}

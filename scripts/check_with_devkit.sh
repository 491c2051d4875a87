#!/usr/bin/env bash
# Loads a simulated data set with the official nuscenes-devkit and compares it with our own reader.
#
#   bash scripts/check_with_devkit.sh [environment folder] [data root] [version]
#
# The devkit needs numpy < 2 and JAX needs numpy >= 2, so it gets an environment of its own (default .venv-devkit). Without a data
# root a small data set is simulated into a temporary folder. PYTHON names the interpreter that has mila_jax
# (default .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
environment="${1:-.venv-devkit}"
root="${2:-}"
version="${3:-v1.0-sim}"
python="${PYTHON:-.venv/bin/python}"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

if [ ! -x "$environment/bin/python" ]; then
  "$python" -m venv "$environment"
fi
if ! "$environment/bin/python" -c "import nuscenes" 2>/dev/null; then
  "$environment/bin/python" -m pip install --quiet "nuscenes-devkit==1.2.0" "numpy<2"
fi
if [ -z "$root" ]; then
  root="$work/data"
  "$python" scripts/check_with_devkit.py simulate "$root" "$version"
fi
"$python" scripts/check_with_devkit.py export "$root" "$version" "$work/ours.json"
"$environment/bin/python" scripts/check_with_devkit.py compare "$root" "$version" "$work/ours.json"

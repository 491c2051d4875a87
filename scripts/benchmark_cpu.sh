#!/usr/bin/env bash
# Times our backbone beside the same network in plain PyTorch on the CPU; see scripts/benchmark_cpu.py for what is compared.
#
#   bash scripts/benchmark_cpu.sh [options of benchmark_cpu.py]
#
# PyTorch is no requirement of mila: it goes into an environment of its own, .venv-benchmark (ENVIRONMENT names another folder).
# PYTHON names the interpreter that makes it (default .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
environment="${ENVIRONMENT:-.venv-benchmark}"

if ! [ -x "$environment/bin/python" ]; then
  "${PYTHON:-.venv/bin/python}" -m venv "$environment"
fi
if ! "$environment/bin/python" -c "import torch, jax, flax, einops" 2>/dev/null; then
  echo "benchmark: installing torch and the requirements into $environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -r requirements.txt
fi
exec "$environment/bin/python" scripts/benchmark_cpu.py "$@"

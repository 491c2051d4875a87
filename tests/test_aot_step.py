"""The training step compiled for TPUs: kernels, collectives and memory of modes and remat policies (no TPU is needed)."""

import json
import os
import subprocess
import sys

import pytest

from tests.tpu_compiler import ROOT, TPU_ENVIRONMENT

pytestmark = [pytest.mark.tpu_backend, pytest.mark.slow]


def compile_step(topology: str, mode: str, remat: str) -> dict:
    run = subprocess.run(
        [sys.executable, "-m", "tests.aot_step_probe", topology, mode, remat], capture_output=True, text=True, timeout=590,
        env=os.environ | TPU_ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split("RESULT")[1])


@pytest.mark.parametrize("topology, mode", [("v5p:2x2x1", "context"), ("v5e:2x2", "heads"), ("v6e:2x2", "kv_gather")])
def test_modes(topology, mode):
    found = compile_step(topology, mode, "block")
    # Of each kernel: forward, forward again, fused backward.
    assert found["kernels"] == (3 if mode == "kv_gather" else 6)
    exchanged = found["collectives"]["all-to-all" if mode in ("context", "heads") else "all-gather"]
    assert exchanged >= 4


def test_saved_residuals_spare_the_second_forward():
    assert compile_step("v5p:2x2x1", "context", "dots+attention")["kernels"] == 4


def test_offload_keeps_the_stream_on_the_host():
    found = compile_step("v6e:2x2", "context", "offload")
    stream = 2 * 1 * 6 * 2 * 128 * 256 * 2  # pairs, samples, views and frames of a device, tokens, width, bytes
    assert found["host"] >= stream

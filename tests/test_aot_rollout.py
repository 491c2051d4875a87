"""Whole videos compiled for a TPU slice (no TPU is needed): memory on a device does not grow with their length."""

import json
import os
import subprocess
import sys

import pytest

from tests.tpu_compiler import ROOT, TPU_ENVIRONMENT

pytestmark = [pytest.mark.tpu_backend, pytest.mark.slow]


@pytest.mark.timeout(3600)
def test_ten_seconds_and_a_minute_on_eight_chips():
    run = subprocess.run(
        [sys.executable, "-m", "tests.aot_rollout_probe", "v5e:2x4", "10", "60"], capture_output=True, text=True, timeout=3500,
        env=os.environ | TPU_ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    short, long = json.loads(run.stdout.split("RESULT")[1])
    assert (short["windows"], long["windows"]) == (24, 140) and short["devices"] == long["devices"] == 8
    assert abs(long["temporaries"] - short["temporaries"]) <= 0.02 * short["temporaries"]
    # What grows is the latents that come out: of each window a device holds its two of eight frames.
    latents = (140 - 24) * 6 * 2 * 16 * 28 * 8 * 4
    assert latents <= long["outputs"] - short["outputs"] <= 3 * latents  # arrays of few channels are padded
    assert short["kernels"] == long["kernels"] > 0 and short["collectives"]["all-to-all"] > 0

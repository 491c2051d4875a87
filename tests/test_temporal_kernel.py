"""The fused temporal kernel against the same steps by XLA, emulated on the CPU, and compiled ahead of time."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.model.attention import attend
from mila_jax.model.dit import DiTConfig
from mila_jax.model.layers import rotary_tables, rotate
from mila_jax.model.norms import rms_norm
from mila_jax.model.temporal_kernel import fused_attention
from mila_jax.parallel.logical import rules_from_config
from tests.tpu_compiler import ROOT, TPU_ENVIRONMENT


def apart(q, k, v, q_weight, k_weight, rotary):
    q, k, v = (jnp.moveaxis(x, 1, -3) for x in (q, k, v))  # attention over the last axis but two
    return jnp.moveaxis(attend(rotate(rms_norm(q, q_weight), rotary), rotate(rms_norm(k, k_weight), rotary), v), -3, 1)


@pytest.mark.parametrize(
    "frames, places, head, heads, dtype, tolerance",
    [(5, 3, 128, 2, jnp.float32, 1e-5), (28, 3, 256, 1, jnp.float32, 1e-5), (6, 19, 128, 1, jnp.float32, 1e-5), (8, 3, 128, 1, jnp.bfloat16, 0.03)],
)  # of 2 · 19 places the last block has 6 of 16
def test_equals_the_steps_apart(frames, places, head, heads, dtype, tolerance):
    r = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(r.normal(size=(1, frames, 2, places, heads, head)), dtype) for _ in range(4))  # [b, t, v, n, k, e]
    norms = [jnp.asarray(1 + 0.3 * r.normal(size=head), jnp.float32) for _ in range(2)]
    rotary = rotary_tables(frames, head)

    def gradients(attention):
        def value(*arguments):
            return (attention(*arguments, rotary).astype(jnp.float32) * weight.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(value, (0, 1, 2, 3, 4)))(q, k, v, *norms)

    def fused(q, k, v, *others):
        flat = (x.reshape(*x.shape[:-2], heads * head) for x in (q, k, v))
        return fused_attention(*flat, *others, interpret=True).reshape(q.shape)

    f32 = lambda x: np.asarray(x, np.float32)  # noqa: E731
    np.testing.assert_allclose(f32(fused(q, k, v, *norms, rotary)), f32(apart(q, k, v, *norms, rotary)), atol=tolerance)
    for found, expected in zip(gradients(fused), gradients(apart), strict=True):
        largest = float(jnp.abs(expected).max())
        assert largest > 0.1
        np.testing.assert_allclose(f32(found), f32(expected), atol=10 * tolerance * max(1.0, largest))


def test_sizes_and_modes_that_the_kernel_cannot_do_name_their_key():
    config = load_config("configs/xl.py", ["--config.attention.temporal=fused"])
    with pytest.raises(UserError, match="model.heads"):  # heads of 72
        DiTConfig(temporal_kernel="fused").check()
    DiTConfig(heads=9, temporal_kernel="fused").check()
    rules_from_config(config)
    config.attention.parallel = "kv_gather"
    with pytest.raises(UserError, match="attention.temporal"):
        rules_from_config(config)


@pytest.mark.tpu_backend
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_ahead_of_time(topology):
    run = subprocess.run(
        [sys.executable, "-m", "tests.temporal_probe", topology],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | TPU_ENVIRONMENT,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.split("RESULT")[1])["kernels"] == 2

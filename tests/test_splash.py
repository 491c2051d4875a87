"""The splash kernel against attention by XLA, emulated on the CPU."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.model.attention import SPATIAL, attend, attend_spatially
from mila_jax.model.splash import BLOCKS, attend_splash, choose_block, splash
from mila_jax.parallel.aot.chips import chip_name
from tests.tpu_compiler import ROOT, TPU_ENVIRONMENT


@pytest.mark.parametrize(
    "length, largest, block", [(2688, 896, 896), (5520, 896, 512), (100, 896, 128), (384, 896, 384), (1000, 896, 512), (130, 896, 256)]
)
def test_block_is_the_largest_of_those_with_least_padding(length, largest, block):
    assert choose_block(length, largest) == block


def test_every_block_is_a_multiple_of_the_lanes():
    for largest in BLOCKS.values():
        assert all(choose_block(n, largest) % 128 == 0 for n in range(1, 6000, 37))


@pytest.mark.parametrize("length, head", [(256, 72), (256, 128), (200, 72), (200, 128)])
def test_equals_attention_by_xla(length, head):
    r = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(r.normal(size=(1, 2, length, 2, head)), jnp.float32) for _ in range(4))  # [b, t, n, k, e]

    def value(attention):
        out = jax.jit(lambda q, k, v: (attention(q, k, v) * weight).sum())
        return jax.jit(attention)(q, k, v), jax.grad(out, (0, 1, 2))(q, k, v)

    kernel = lambda q, k, v: splash(q, k, v, block=128, interpret=True)  # noqa: E731
    (ours, gradients), (plain, expected) = value(kernel), value(attend)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert float(jnp.abs(b).max()) > 0.01


def test_padding_is_never_seen():
    """Values that only padding would bring in: without segment ids the padded keys (score 0) take part."""
    k = -5.0 * jnp.ones((1, 1, 130, 1, 128))
    q, v = jnp.ones_like(k), jnp.ones_like(k)
    out = splash(q, k, v, block=128, interpret=True)
    np.testing.assert_allclose(out, 1.0, atol=1e-6)


def test_elsewhere_than_on_tpus_it_is_xla():
    q = jnp.ones((1, 1, 4, 2, 8))
    text = str(jax.make_jaxpr(lambda q: attend_spatially(q, q, q, "splash"))(q))
    assert "pallas" not in text
    on_tpu = str(jax.make_jaxpr(lambda q: attend_splash(q, q, q, SPATIAL.queries, "TPU v5"))(q))
    assert "pallas" in on_tpu


@pytest.mark.tpu_backend
@pytest.mark.parametrize(
    "topology, heads, head, tokens",
    [("v5e:2x2", 9, 128, 2688), ("v5p:2x2x1", 16, 72, 2688), ("v6e:2x2", 16, 72, 5520), ("tpu7x:2x2x1", 9, 128, 5520)],
)
def test_compiles_ahead_of_time(topology, heads, head, tokens):
    """Forward and the fused backward, for lengths that are and are not multiples of the block; no scores in memory, no transfers."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.aot_probe", topology, str(heads), str(head), str(tokens)], capture_output=True, text=True, timeout=500,
        env=os.environ | TPU_ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.split("RESULT")[1])
    assert chip_name(result["kind"]) in BLOCKS, f"{result['kind']} has no block size of its own"
    assert result["kernels"] == 2
    assert sum(result["collectives"].values()) == result["collectives"]["all-reduce"] == 1  # of the value
    frames = 2  # on each device
    assert result["temporaries"] < frames * heads * tokens**2

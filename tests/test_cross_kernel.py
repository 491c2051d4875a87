"""The fused kernel of attention to the text against the same formula by XLA, emulated on the CPU."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.model.attention import attend_text
from mila_jax.model.cross_kernel import choose_tokens, fused_text_attention
from mila_jax.model.dit import DiTConfig
from tests.tpu_compiler import ROOT, TPU_ENVIRONMENT


@pytest.mark.parametrize(
    "words, tokens, dtype, tolerance, masked",
    [(5, 7, jnp.float32, 1e-5, False), (130, 48, jnp.float32, 1e-5, True), (5, 7, jnp.bfloat16, 0.03, True)],
)
def test_equals_the_formula(words, tokens, dtype, tolerance, masked):
    r = np.random.default_rng(0)
    q, weight = (jnp.asarray(r.normal(size=(2, 3, 2, tokens, 2, 128)), dtype) for _ in range(2))  # [b, v, t, n, k, e]
    k, v = (jnp.asarray(r.normal(size=(2, words, 2, 128)), dtype) for _ in range(2))
    mask = jnp.asarray(np.arange(words)[None] < np.array([[3], [words]])) if masked else None

    def fused(q, k, v):
        flat = (x.reshape(*x.shape[:-2], 256) for x in (q, k, v))
        return fused_text_attention(*flat, mask, 128, interpret=True).reshape(q.shape)

    def apart(q, k, v):
        return attend_text(q, k, v, mask)

    def gradients(attention):
        return jax.jit(jax.grad(lambda *x: (attention(*x).astype(jnp.float32) * weight.astype(jnp.float32)).sum(), (0, 1, 2)))(q, k, v)

    f32 = lambda x: np.asarray(x, np.float32)  # noqa: E731
    np.testing.assert_allclose(f32(fused(q, k, v)), f32(apart(q, k, v)), atol=tolerance)
    for found, expected in zip(gradients(fused), gradients(apart), strict=True):
        largest = float(jnp.abs(expected).max())
        assert largest > 0.1
        np.testing.assert_allclose(f32(found), f32(expected), atol=10 * tolerance * max(1.0, largest))


def test_a_sample_without_any_word_is_finite_and_equal():
    r = np.random.default_rng(1)
    q, k = (jnp.asarray(r.normal(size=(1, 1, 1, n, 1, 128)), jnp.float32) for n in (16, 5))
    k, mask = k[:, 0, 0], jnp.zeros((1, 5), bool)
    got = fused_text_attention(q[..., 0, :], k[:, :, 0], k[:, :, 0], mask, 128, interpret=True)
    np.testing.assert_allclose(got, attend_text(q, k, k, mask)[..., 0, :], atol=1e-5)


def test_blocks_divide_the_tokens():
    assert choose_tokens(6 * 7 * 448) == (896, 0)
    for count in (7, 100, 1000, 6 * 28 * 230, 16 * 1009):
        tokens, more = choose_tokens(count)
        assert (count + more) % tokens == 0 and tokens % 16 == 0


def test_narrow_heads_name_their_key():
    with pytest.raises(UserError, match="model.heads"):
        DiTConfig(text_kernel="fused").check()
    with pytest.raises(UserError, match="attention.text"):
        DiTConfig(text_kernel="other").check()
    DiTConfig(heads=9, text_kernel="fused").check()


@pytest.mark.tpu_backend
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_ahead_of_time(topology):
    run = subprocess.run(
        [sys.executable, "-m", "tests.text_probe", topology], capture_output=True, text=True, timeout=500, env=os.environ | TPU_ENVIRONMENT, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.split("RESULT")[1])["kernels"] == 2

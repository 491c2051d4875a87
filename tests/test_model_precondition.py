"""The linear-Gaussian preconditioning against the textbook formula and a sampled process."""

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.model import precondition
from mila_jax.model.precondition import TIME_CONSTANTS, covariance, fit_covariance, linear_denoiser, preconditioned

WEIGHTS = np.array([[0.05, 0.1, 0.1, 0.3, 0.25, 0.1, 0.1], [0.3, 0.3, 0.1, 0.1, 0.1, 0.05, 0.05]], np.float32)


def _problem():
    times = jnp.asarray([[-1 / 12, 0.0, 1 / 12, 2 / 12, 0.5]])
    levels = jnp.asarray([[[0.0, 0.0, 0.9, 0.7, 0.3], [0.0, 0.0, 1.0, 1.0, 0.2]]])
    x = jax.random.normal(jax.random.key(0), (1, 2, 5, 2, 3, 1))
    return x, levels, times


def test_is_the_conditional_law_of_the_process():
    y, levels, times = _problem()
    x, v, std = linear_denoiser(y, levels, times, WEIGHTS)
    for view in range(2):
        k = sum(w * np.exp(-np.abs(np.subtract.outer(times[0], times[0])) / tau) for w, tau in zip(WEIGHTS[view], TIME_CONSTANTS))
        s = np.asarray(levels[0, view], np.float64)
        a = np.diag(1 - s)
        joint = a @ k @ a + np.diag(s**2) + 1e-5 * np.eye(5)
        data = np.asarray(y[0, view], np.float64).reshape(5, -1)
        np.testing.assert_allclose(np.asarray(x[0, view]).reshape(5, -1), k @ a @ np.linalg.solve(joint, data), atol=2e-3)
        cross = k @ a - np.diag(s)
        np.testing.assert_allclose(np.asarray(v[0, view]).reshape(5, -1), cross @ np.linalg.solve(joint, data), atol=2e-3)
        variance = np.diag(k + np.eye(5) - cross @ np.linalg.solve(joint, cross.T))
        np.testing.assert_allclose(std[0, view] ** 2, variance, atol=2e-3)


def test_clean_frames_are_returned_and_velocity_is_consistent():
    y, levels, times = _problem()
    x, v, _ = linear_denoiser(y, levels, times, WEIGHTS)
    np.testing.assert_allclose(x[:, :, :2], y[:, :, :2], atol=2e-3)
    # x̂ = y + σ v̂ must hold between the two estimates (method.md).
    np.testing.assert_allclose(y + levels[..., None, None, None] * v, x, atol=2e-3)


def test_one_independent_frame_is_the_scalar_formula():
    weights = np.zeros((1, len(TIME_CONSTANTS)), np.float32)
    weights[0, 0] = 1
    s = 0.6
    y = jnp.full((1, 1, 2, 1, 1, 1), 2.0)
    _, v, std = linear_denoiser(y, jnp.full((1, 1, 2), s), jnp.asarray([[0.0, 1.0]]), weights)
    total = (1 - s) ** 2 + s**2
    np.testing.assert_allclose(v, (1 - 2 * s) / total * 2.0, rtol=1e-3)
    np.testing.assert_allclose(std**2, 2 - (1 - 2 * s) ** 2 / total, rtol=1e-3)


def test_wrapper_scales_the_network_and_shows_it_the_estimate():
    y, levels, times = _problem()
    seen = {}

    class FakeConditions:
        frame_times = times

    def network(latents, levels, conditions):
        seen["input"] = latents
        return jnp.ones_like(latents[..., :1])

    v = preconditioned(network, WEIGHTS)(y, levels, FakeConditions)
    x, base, std = linear_denoiser(y, levels, times, WEIGHTS)
    np.testing.assert_allclose(v - base, np.broadcast_to(std[..., None, None, None], v.shape), atol=1e-5)
    np.testing.assert_allclose(seen["input"][..., 1:], x, atol=1e-6)


def test_covariance_is_recovered_from_samples():
    r = np.random.default_rng(0)
    times = np.arange(240) / 12
    k = np.asarray(covariance(jnp.asarray(times), WEIGHTS), np.float64)
    scenes = []
    for _ in range(6):
        x = np.stack([np.linalg.cholesky(k[v] + 1e-6 * np.eye(240)) @ r.normal(size=(240, 400)) for v in range(2)], 1)
        scenes.append(x.reshape(240, 2, 20, 20, 1))
    weights = fit_covariance(scenes, [times] * 6)
    assert weights.shape == (2, len(TIME_CONSTANTS)) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    lags = jnp.asarray([0.0, 1 / 12, 0.5, 2.0])
    got, want = (np.asarray(covariance(lags, w))[:, 0] for w in (weights, WEIGHTS))
    np.testing.assert_allclose(got, want, atol=0.06)


def test_gradients_do_not_flow_into_the_prior():
    y, levels, times = _problem()

    class FakeConditions:
        frame_times = times

    def total(scale):
        return preconditioned(lambda x, *_: scale * x[..., :1], WEIGHTS)(y, levels, FakeConditions).sum()

    assert np.isfinite(float(jax.grad(total)(1.0))) and precondition.linear_denoiser is linear_denoiser

"""Joint denoising and correcting flow: coefficients, re-noising, and the law of the corrected window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow_oracles import ar1, conditional, transfer_matrix
from mila_jax.flow.anchors import coefficients, renoise
from mila_jax.flow.schedules import window_schedule

LEVELS = np.linspace(0, 1, 101, dtype=np.float32)


@pytest.mark.parametrize("a", [0.0, 0.1, 0.2, 0.5, 0.9])
def test_coefficients_make_a_latent_of_the_level(a):
    keep, spread, used = (np.asarray(part, np.float64) for part in coefficients(LEVELS, a))
    np.testing.assert_allclose(used, np.maximum(LEVELS, a), atol=1e-7)
    np.testing.assert_allclose(keep * (1 - a), 1 - used, atol=1e-6)  # (12): the true anchor keeps 1 − σ′
    np.testing.assert_allclose((keep * a) ** 2 + spread**2, used**2, atol=1e-6)  # (11): unit variance of the noise
    above = used > a + 1e-3
    b = ((used - a) / (1 - a))[above]
    np.testing.assert_allclose(spread[above], b * np.sqrt(1 + 2 * a * (1 - b) / b), atol=1e-5)  # b s with s² = 1 + 2a(1−b)/b
    below = LEVELS <= a
    assert (keep[below] == 1).all() and (spread[below] < 1e-6).all()  # clamped: nothing added, nothing taken
    assert keep[-1] == 0 and spread[-1] == 1  # level 1 forgets the anchor


def test_without_error_it_is_plain_noising():
    keep, spread, used = coefficients(LEVELS, 0.0)
    assert jnp.array_equal(keep, 1 - LEVELS) and jnp.array_equal(spread, LEVELS) and jnp.array_equal(used, LEVELS)


def test_levels_below_the_error_leave_the_anchor_alone():
    anchor = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2, 2, 4), np.float32))
    renoised, used = renoise(anchor, jnp.array([0.05, 0.2, 0.6]), 0.2, jax.random.key(1))
    assert jnp.array_equal(renoised[:2], anchor[:2]) and not jnp.allclose(renoised[2], anchor[2], atol=0.1)
    np.testing.assert_allclose(used, [0.2, 0.2, 0.6], atol=1e-7)


def test_renoised_predictions_are_distributed_as_noised_truth():
    a, level = 0.2, 0.45
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (200_000,)) * 1.5
    predicted = (1 - a) * x + a * jax.random.normal(keys[1], x.shape)
    renoised = np.asarray(renoise(predicted, level, a, keys[2])[0], np.float64)
    x = np.asarray(x, np.float64)
    slope = (renoised * x).mean() / (x * x).mean()
    assert abs(slope - (1 - level)) < 3e-3
    assert abs((renoised - slope * x).std() - level) < 3e-3
    same = renoise(predicted, level, a, jax.random.normal(keys[2], x.shape))[0]
    assert np.array_equal(same, np.asarray(renoise(predicted, level, a, keys[2])[0]))


def _law(a, sigma_a, keep, spread, alpha, steps=200, frames=9):
    """Relative error of the joint covariance of a window whose noisy tail anchor started from a prediction wrong by `a`."""
    covariance = ar1(frames)
    _, truth = conditional(covariance, 1)
    matrix = transfer_matrix(covariance, window_schedule(steps, np.arange(frames) < 1, anchor=-1, sigma_a=sigma_a, a=a, alpha=alpha))
    start = np.eye(frames - 1)
    start[-1, -1] = keep**2 * ((1 - a) ** 2 * truth[-1, -1] + a**2) + spread**2
    end = matrix[1:, 1:] @ start @ matrix[1:, 1:].T
    return np.linalg.norm(end - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("sigma_a, alpha", [(0.25, 0.0), (0.4, 0.0), (0.4, 0.5), (0.6, 0.0)])
def test_correction_restores_the_joint_law(sigma_a, alpha):
    keep, spread, _ = (float(part) for part in coefficients(sigma_a, 0.2))
    assert _law(0.2, sigma_a, keep, spread, alpha) < 0.02


def test_other_noise_does_not_restore_it():
    keep, spread, _ = (float(part) for part in coefficients(0.4, 0.2))
    assert _law(0.2, 0.4, keep, 1 - keep, 0.0) > 0.1  # s = 1
    assert _law(0.2, 0.4, *(float(part) for part in coefficients(0.4, 0.0)[:2]), 0.0) > 0.05  # SDEdit: taken for clean

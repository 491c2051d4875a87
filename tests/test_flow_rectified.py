"""The straight path, its estimates, the masked loss, training levels and the timestep transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.flow import rectified_flow as rf
from mila_jax.flow.timeshift import published_latent_frames, sampling_times, shift, shift_ratio

SHAPE = (2, 3, 4, 2, 2, 5)


def _pair(seed=0):
    x, noise = np.random.default_rng(seed).standard_normal((2, *SHAPE), np.float32)
    return jnp.asarray(x), jnp.asarray(noise)


def test_path_ends_are_exact_and_estimates_invert_it():
    x, noise = _pair()
    level = np.random.default_rng(5).random(SHAPE[:3], np.float32)
    level[:, :, 0], level[:, :, 1] = 0, 1
    noisy = rf.add_noise(x, noise, level)
    assert jnp.array_equal(noisy[:, :, 0], x[:, :, 0]) and jnp.array_equal(noisy[:, :, 1], noise[:, :, 1])
    velocity = rf.velocity_target(x, noise)
    np.testing.assert_allclose(rf.data_estimate(noisy, velocity, level), x, atol=2e-6)
    np.testing.assert_allclose(rf.noise_estimate(noisy, velocity, level), noise, atol=2e-6)
    # lowering the level by λ adds λ v
    lower = level * 0.3
    np.testing.assert_allclose(noisy + rf.align(level - lower, x) * velocity, rf.add_noise(x, noise, lower), atol=2e-6)


def test_loss_counts_every_noisy_value_once():
    prediction, target = _pair(1)
    mask = np.array([[False, True, True, True], [False, False, False, True]])
    loss = rf.masked_loss(prediction, target, mask)
    square = np.square(np.asarray(prediction) - np.asarray(target)).transpose(0, 2, 1, 3, 4, 5)
    np.testing.assert_allclose(loss.mean, square[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(loss.sample_sum / loss.sample_count, [square[0][mask[0]].mean(), square[1][mask[1]].mean()], rtol=1e-5)
    assert loss.count == square[mask].size == loss.sample_count.sum()
    parts = [rf.masked_loss(prediction[b : b + 1], target[b : b + 1], mask[b : b + 1]) for b in range(2)]
    np.testing.assert_allclose(sum(p.sum for p in parts) / sum(p.count for p in parts), loss.mean, rtol=1e-6)
    per_view = np.broadcast_to(mask[:, None], SHAPE[:3])
    assert rf.masked_loss(prediction, target, per_view).mean == loss.mean


def test_clean_frames_have_no_say_in_loss_or_gradient():
    prediction, target = _pair(2)
    mask = np.array([[False, True, True, True]] * 2)
    poisoned = prediction.at[:, :, 0].set(jnp.inf)
    assert rf.masked_loss(poisoned, target, mask).mean == rf.masked_loss(prediction, target, mask).mean
    gradient = jax.grad(lambda p: rf.masked_loss(p, target, mask).mean)(prediction)
    assert not gradient[:, :, 0].any() and gradient[:, :, 1:].all()
    assert rf.masked_loss(prediction, target, np.zeros_like(mask)).mean == 0


def test_drawn_levels_follow_their_distribution_and_seed():
    key = jax.random.key(3)
    uniform = np.asarray(rf.draw_levels(key, 20000, distribution="uniform"))
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.003
    normal = np.asarray(rf.draw_levels(key, 20000))
    logit = np.log(normal / (1 - normal))
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
    np.testing.assert_allclose(rf.draw_levels(key, 20000, ratio=2.5), shift(normal, 2.5), atol=1e-6)
    assert jnp.array_equal(rf.draw_levels(key, 4), rf.draw_levels(key, 4))
    assert not jnp.array_equal(rf.draw_levels(key, 4), rf.draw_levels(jax.random.key(4), 4))
    with pytest.raises(UserError, match="logit-normal"):
        rf.draw_levels(key, 4, distribution="gaussian")


def test_shift_keeps_its_ends_and_moves_towards_noise():
    u = jnp.linspace(0, 1, 101)
    for ratio in (0.3, 0.468, 1.0, 2.42, 10.27):
        moved = shift(u, ratio)
        assert moved[0] == 0 and moved[-1] == 1 and bool((jnp.diff(moved) > 0).all())
        np.testing.assert_allclose(moved, ratio * u / (1 + (ratio - 1) * u), atol=1e-6)
    assert jnp.array_equal(shift(u, 1.0), u)


def test_ratio_counts_latent_frames_where_the_published_rule_is_zero():
    np.testing.assert_allclose(shift_ratio(240, 426, published_latent_frames(51)), 2.42, atol=5e-3)
    assert published_latent_frames([1, 2, 12, 16, 17, 51, 102]).tolist() == [1, 0, 0, 0, 5, 15, 30]
    assert shift_ratio(64, 112, published_latent_frames(8)) == 0  # the fault: all times would become 0
    np.testing.assert_allclose(shift_ratio(64, 112, 8), np.sqrt(64 * 112 / 512**2 * 8))


def test_sampling_times():
    np.testing.assert_allclose(sampling_times(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(sampling_times(7, discrete=True)[:3], [1, 0.857, 0.714], atol=1e-7)
    published = [1000, 958.4, 911.1, 856.7, 793.5, 719.2, 630.7, 523.3, 390.4, 221.6]
    times = sampling_times(10, shift_ratio(256, 448, np.array([15, 15])))
    assert times.shape == (11, 2) and not times[-1].any()
    np.testing.assert_allclose(times[:-1, 0] * 1000, published, atol=0.06)
    for bad in ({"steps": 0}, {"steps": 3, "ratio": 0.0}):
        with pytest.raises(UserError):
            sampling_times(**bad)

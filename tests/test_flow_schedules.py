"""Every condition on temporal progressive denoising, and the exact linear-Gaussian study on the sampler that is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow_oracles import ar1, conditional, transfer_matrix, wasserstein
from mila_jax.errors import UserError
from mila_jax.flow import schedules
from mila_jax.flow.timeshift import sampling_times

TIMES = np.linspace(1, 0, 41, dtype=np.float32)


@pytest.mark.parametrize("family", schedules.FAMILIES)
@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_conditions_of_the_paper(family, alpha):
    g = np.asarray(schedules.levels(TIMES, 6, family, alpha))
    assert g.shape == (41, 6)
    assert (g[0] == 1).all() and (g[-1] == 0).all()  # all start and finish together, exactly
    assert (np.diff(g, axis=0) < 0).all()  # strictly falling with time, so every λ > 0
    np.testing.assert_allclose((g[:-1] - g[1:]).sum(axis=0), 1, atol=1e-6)  # Σ_j λ = 1
    assert (np.diff(g[1:-1], axis=1) > 0).all()  # earlier frames are always cleaner
    steps = g[:-1] - g[1:]
    assert (np.diff(steps[0]) < 0).all() and (np.diff(steps[-1]) > 0).all()  # first steps larger for early frames, last for late
    assert steps[0, 0] > 1 / 40 > steps[-1, 0] and steps[0, -1] < 1 / 40 < steps[-1, -1]  # early fast-slow, late slow-fast


@pytest.mark.parametrize("family", schedules.FAMILIES)
def test_alpha_zero_is_uniform_exactly_and_negative_is_reversed(family):
    uniform = np.broadcast_to(TIMES[:, None], (41, 5))
    assert np.array_equal(schedules.levels(TIMES, 5, family, 0.0), uniform)
    forward, backward = (schedules.levels(TIMES, 5, family, alpha) for alpha in (0.5, -0.5))
    np.testing.assert_allclose(forward, backward[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(schedules.levels(TIMES, 5, family, 1e-3), uniform, atol=1e-3)


def test_strengths_fall_geometrically_with_mean_one():
    log_k = np.asarray(schedules.log_strength(np.ones(5, bool), 0.7))
    np.testing.assert_allclose(log_k, [0.7, 0.35, 0, -0.35, -0.7], atol=1e-7)
    assert schedules.log_strength(np.array([False, False, True]), 0.7).tolist() == [0, 0, 0]  # one frame: nothing to progress over
    masked = schedules.log_strength(np.array([False, True, False, True, True]), 0.7)
    np.testing.assert_allclose(masked, [0, 0.7, 0, 0, -0.7], atol=1e-7)


def test_families_are_their_formulae():
    t, k = 0.3, np.exp(0.4)
    c = k**-2
    expected = {"power": t**k, "rational": t / (t + k * (1 - t)), "exponential": (c ** (1 - t) - c) / (1 - c)}
    for family, value in expected.items():
        np.testing.assert_allclose(schedules.progress(t, 0.4, family), value, rtol=1e-6)
    with pytest.raises(UserError, match="power"):
        schedules.progress(t, 0.4, "linear")


def test_window_schedule_rows():
    clean = np.array([True, True] + [False] * 6)
    rows = np.asarray(schedules.window_schedule(10, clean, family="power", alpha=0.5, shift=1.7))
    assert rows.shape == (11, 8) and not rows[:, :2].any()
    np.testing.assert_allclose(rows[:, 2:], schedules.levels(sampling_times(10, 1.7), 6, "power", 0.5), atol=1e-6)
    anchored = np.asarray(schedules.window_schedule(10, clean, anchor=-1, family="power", alpha=0.5, shift=1.7, sigma_a=0.4, a=0.2))
    assert np.array_equal(anchored[:, :7], rows[:, :7])
    np.testing.assert_allclose(anchored[:, 7], 0.4 * rows[:, 7], atol=1e-7)
    assert anchored[0, 7] == np.float32(0.4) and not anchored[-1].any()
    several = np.asarray(schedules.window_schedule(10, clean, anchor=(4, -1), family="power", alpha=0.5, shift=1.7, sigma_a=0.4, a=0.2))
    np.testing.assert_allclose(several, rows * np.where(np.isin(np.arange(8), (4, 7)), np.float32(0.4), 1), atol=1e-7)
    kept = clean | (np.arange(8) == 7)
    kept_rows = np.asarray(schedules.window_schedule(10, kept))
    assert not kept_rows[:, 7].any()
    np.testing.assert_allclose(kept_rows[:, 2:7], schedules.levels(sampling_times(10), 5), atol=1e-7)


@pytest.mark.parametrize("bad, word", [
    ({"anchor": 7, "sigma_a": 0.1, "a": 0.2}, "sigma_a"),
    ({"anchor": (1, 7)}, "positions \\[1\\]"),
    ({"anchor": 7, "a": 1.0, "sigma_a": 1.0}, "a = 1.0"),
    ({"anchor": 7, "sigma_a": 0.0, "a": 0.0}, "sigma_a"),
    ({"anchor": 5}, "last noisy frame"),
    ({"anchor": 0}, "last noisy frame"),
    ({"steps": 0}, "steps"),
    ({"family": "cosine"}, "cosine"),
    ({"clean": np.ones(8, bool)}, "at least one frame"),
])  # fmt: skip
def test_wrong_window_schedules_name_the_key(bad, word):
    arguments = {"steps": 4, "clean": np.arange(8) < 2} | bad
    with pytest.raises(UserError, match=word):
        schedules.window_schedule(arguments.pop("steps"), arguments.pop("clean"), **arguments)


def test_training_levels():
    clean = np.array([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 1]], bool)
    anchor = np.array([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], bool)
    sigma = jnp.array([0.5, 0.8, 1.0])
    plain = np.asarray(jax.jit(schedules.training_levels)(sigma, clean, anchor))
    expected = [[0, 0, 0.5, 0.5, 0.2], [0, 0.8, 0.8, 0.8, 0.8], [0, 1, 1, 1, 0]]
    np.testing.assert_allclose(plain, expected, atol=1e-7)
    assert np.array_equal(plain[1, 1:], np.full(4, np.float32(0.8)))  # one level per sample, exactly
    alpha = jnp.array([0.5, 0.0, 1.0])
    shaped = np.asarray(schedules.training_levels(sigma, clean, anchor, alpha=alpha))
    np.testing.assert_allclose(shaped[0, 2:4], schedules.levels([0.5], 3, alpha=0.5)[0, :2], atol=1e-6)
    np.testing.assert_allclose(shaped[0, 4], 0.4 * schedules.levels([0.5], 3, alpha=0.5)[0, 2], atol=1e-6)
    assert np.array_equal(shaped[1:], plain[1:])  # α = 0, and σ = 1, change nothing
    row = np.asarray(schedules.window_schedule(4, clean[0], anchor=4, alpha=0.5, sigma_a=0.4))[2]
    np.testing.assert_allclose(shaped[0], row, atol=1e-6)  # what training shows is what sampling asks


def _error(steps, family, alpha, frames=17):
    covariance = ar1(frames)
    _, truth = conditional(covariance, 1)
    clean = np.arange(frames) < 1
    matrix = transfer_matrix(covariance, schedules.window_schedule(steps, clean, family=family, alpha=alpha))
    assert np.array_equal(matrix[0], np.eye(frames)[0])  # the conditioning frame is what it was
    return wasserstein(truth, matrix[1:, 1:] @ matrix[1:, 1:].T)


def test_direction_of_progress_matters():
    uniform, forward, reversed_, strong = (
        _error(10, family, alpha) for family, alpha in [("exponential", 0.0), ("exponential", 0.5), ("exponential", -0.5), ("power", 1.0)]
    )
    np.testing.assert_allclose([uniform, forward, reversed_, strong], [8.42e-3, 8.12e-3, 9.99e-3, 12.62e-3], rtol=3e-3)
    assert forward < uniform < reversed_ < strong


@pytest.mark.parametrize("family", schedules.FAMILIES)
def test_any_schedule_reaches_the_truth_with_enough_steps(family):
    errors = [_error(steps, family, 0.5) for steps in (10, 40, 160)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[2] < 1e-4
    covariance = ar1(9)
    regression, _ = conditional(covariance, 2)
    matrix = transfer_matrix(covariance, schedules.window_schedule(160, np.arange(9) < 2, family=family))
    np.testing.assert_allclose(matrix[2:, :2], regression, atol=0.02)  # the mean follows the conditioning frames

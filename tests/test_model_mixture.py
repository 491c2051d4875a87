"""Guesses that the network weighs: what the velocity becomes when the prior's mean moves, and a network that starts without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from mila_jax.errors import UserError
from mila_jax.flow.rectified_flow import data_estimate
from mila_jax.model.grow import can_grow
from mila_jax.model.motion import CORRIDORS
from mila_jax.model.network import dit_config
from mila_jax.model.precondition import Prior, covariance, input_channels, mixture_size, moved_mean, preconditioned
from tests.grown import grown, velocity
from tests.parallel_probe import CONFIG
from tests.test_model_precondition import LEVELS, TIMES, WAYPOINTS, _conditions, _covariance, _weights

PRIOR = Prior(np.eye(2, dtype=np.float32), _weights())
N = len(CORRIDORS)


def test_moves_as_the_conditional_law_does():
    """One frame by Bayes' rule: x_i from the others has a mean and a variance, z_i is seen on top; then the mean moves by d."""
    found = np.asarray(moved_mean(LEVELS, covariance(TIMES, WAYPOINTS, _weights())))
    assert (found[:, :, :2] == 0).all()  # clean frames do not move
    r = np.random.default_rng(0)
    for view in (0, 4):
        for c in range(2):
            k, s = _covariance(view, c), np.asarray(LEVELS[0, view], np.float64)
            joint = np.outer(1 - s, 1 - s) * k + np.diag(s**2) + 1e-5 * np.eye(5)
            for i in (2, 3, 4):
                rest = [j for j in range(5) if j != i]
                cross = k[i, rest] * (1 - s[rest])
                variance = k[i, i] - cross @ np.linalg.solve(joint[np.ix_(rest, rest)], cross)
                z, mean, d = r.normal(size=3)
                gain = variance * (1 - s[i]) / ((1 - s[i]) ** 2 * variance + s[i] ** 2)
                x = [m + gain * (z - (1 - s[i]) * m) for m in (mean, mean + d)]
                v = [(x_ - z) / s[i] for x_ in x]
                np.testing.assert_allclose(found[0, view, i, c] * d, v[1] - v[0], rtol=2e-3)


def _estimate(y, choose):
    """What a network that answers `choose(what it sees)` makes of pure noise in the last frames."""
    levels = jnp.where(LEVELS > 0, 1.0, 0.0)
    velocity = preconditioned(lambda seen, levels, conditions: choose(seen), PRIOR, N, True, True)(y, levels, _conditions())
    return data_estimate(y, velocity, levels)


@pytest.mark.parametrize("guess", [0, 4, N])
def test_a_network_can_choose_what_is_seen(guess):
    """Weight 1 for one guess, or the mixed one (the last), and -1 for the first, which is the prior's own mean, gives exactly that guess."""
    y, kept = jax.random.normal(jax.random.key(1), (1, 6, 5, 2, 3, 2)), {}

    def choose(seen):
        kept["guess"] = seen[..., 4 + 2 * guess : 6 + 2 * guess]
        weights = jnp.zeros(mixture_size(N, True)).at[0].add(-1).at[guess].add(1)
        return jnp.concatenate([jnp.zeros_like(y), jnp.broadcast_to(weights, (*y.shape[:-1], N + 1))], -1)

    np.testing.assert_allclose(_estimate(y, choose)[:, :, 2:], kept["guess"][:, :, 2:], atol=2e-3)


def test_without_weights_nothing_moves():
    y = jax.random.normal(jax.random.key(1), (1, 6, 5, 2, 3, 2))
    f = jax.random.normal(jax.random.key(2), y.shape)
    plain = preconditioned(lambda *_: f, PRIOR, N, True)(y, LEVELS, _conditions())
    zero = jnp.concatenate([f, jnp.zeros((*y.shape[:-1], N + 1))], -1)
    np.testing.assert_array_equal(preconditioned(lambda *_: zero, PRIOR, N, True, True)(y, LEVELS, _conditions()), plain)


@pytest.mark.parametrize("pred_sigma", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_network_grows_weights_that_start_at_nothing_and_learn(pred_sigma):
    sizes = dict(width=16, heads=2, depth=1, unroll=1, in_channels=input_channels(2, 2, True), sweep=2, evidence=True, pred_sigma=pred_sigma)
    small = dataclasses.replace(CONFIG, **sizes)
    large = dataclasses.replace(small, mixture=mixture_size(2, True))
    assert can_grow(small, large) and not can_grow(large, small)
    params, grew = grown(small, large)
    np.testing.assert_array_equal(velocity(large, grew), velocity(small, params))
    gradient = jax.jit(jax.grad(lambda p: jnp.square(velocity(large, p)).sum()))(grew)["final"]["mixture"]["kernel"][...]
    assert float(jnp.abs(gradient).max(0).min()) > 0  # each weight at each place of a patch


def test_a_mixture_needs_corridors():
    model = tiny.get_config().model
    model.mixture = True
    assert dit_config(model, 8, (64, 112), 16, 4).mixture == model.sweep + 1
    model.evidence = False
    assert dit_config(model, 8, (64, 112), 16, 4).mixture == model.sweep
    model.sweep = 0
    with pytest.raises(UserError, match="model.mixture"):
        dit_config(model, 8, (64, 112), 16, 4)
    model.precondition = "none"
    assert dit_config(model, 8, (64, 112), 16, 4).mixture == 0
    with pytest.raises(ValueError, match="sweep"):
        preconditioned(None, PRIOR, 0, mixture=True)

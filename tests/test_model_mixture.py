"""The mixture of motions: the linear preconditioning where there is one corridor, and a car that drives along stays where it is."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.model import mixture
from mila_jax.model.motion import CORRIDORS, find_places, take
from mila_jax.model.network import dit_config
from mila_jax.model.precondition import SCALES, Prior, covariance, linear_denoiser, others_gain, preconditioned
from mila_jax.views import view_index
from tests.test_model_motion import HEIGHT, WIDTH, _render, _rig

WAYPOINTS = np.array([[-1.5, 0, 0], [0, 0, 0], [1.5, 0, 0], [4.5, 0, 0]], np.float32)
LEVELS = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 0.95, 0.95]), (1, 6, 4))
VIEW, CAR = view_index("CAM_FRONT_LEFT"), (slice(7, 14), slice(8, 19))
ALONG = [corridor.moves for corridor in CORRIDORS].index(1.0)


def _prior():
    weights = np.zeros((6, 2, len(SCALES)), np.float32)
    weights[..., SCALES.index((1e4, 25.0))], weights[..., 0] = 0.97, 0.03
    return Prior(np.eye(2, dtype=np.float32), weights)


def _conditions():
    intrinsics, extrinsics = _rig(len(WAYPOINTS))
    times = jnp.asarray([[-1 / 12, 0, 1 / 12, 3 / 12]])
    return types.SimpleNamespace(frame_times=times, waypoints=jnp.asarray(WAYPOINTS)[None], intrinsics=intrinsics, extrinsics=extrinsics)


@pytest.fixture(scope="module")
def street():
    """A street that goes by, and a car at the same place of one view in all frames: [1, 6, 4, h, w, 2]."""
    x = np.array(_render(WAYPOINTS)[0])
    rows, columns = np.mgrid[:7, :11]
    x[0, VIEW, :, CAR[0], CAR[1]] = np.stack([np.sin(rows * columns / 7), np.cos(columns - rows)], -1)
    return jnp.asarray(x)


def _noisy(x, levels=LEVELS):
    s = levels[..., None, None, None]
    return (1 - s) * x + s * jax.random.normal(jax.random.key(0), x.shape)


def _seen(wrap, z, levels, *sizes):
    """(what the network sees, velocity for a network that says nothing)."""
    inputs = {}

    def network(latents, levels, conditions):
        inputs["x"] = latents
        return jnp.zeros(z.shape)

    velocity = wrap(network, _prior(), *sizes)(z, levels, _conditions())
    return np.asarray(inputs["x"]), velocity


def test_one_corridor_is_the_linear_preconditioning(street):
    levels = jnp.broadcast_to(jnp.asarray([0.0, 0.3, 0.9, 0.6]), (1, 6, 4))
    z = _noisy(street, levels)
    for ours, theirs in zip(_seen(mixture.preconditioned, z, levels, 1), _seen(preconditioned, z, levels, 1)):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_each_guess_is_the_linear_law_of_its_corridor(street):
    z, c = _noisy(street), _conditions()
    for corridor in (CORRIDORS[1], CORRIDORS[ALONG]):
        carried = take(z, find_places(c.waypoints, c.intrinsics, c.extrinsics, HEIGHT, WIDTH, corridor))
        k = covariance(c.frame_times, corridor.way(c.waypoints), _prior().weights)
        found = mixture.guess(carried, LEVELS, k)
        for ours, theirs in zip(found[:2] + found[3:4], linear_denoiser(carried, LEVELS, k)):
            np.testing.assert_allclose(ours, theirs, atol=3e-3)
        np.testing.assert_allclose(found.others, jnp.einsum("bvcij,bvijhwc->bvihwc", others_gain(LEVELS, k), carried), atol=3e-3)
        # Density of z_i given the others, from the joint one in float64.
        view, i, row, column = VIEW, 1, 9, 12
        a, s = np.diag(1 - np.asarray(LEVELS[0, view], np.float64)), np.asarray(LEVELS[0, view], np.float64)
        want = 0.0
        for component in range(2):
            joint = a @ np.asarray(k[0, view, component], np.float64) @ a + np.diag(s**2) + 1e-5 * np.eye(4)
            values, rest = np.asarray(carried[0, view, i, :, row, column, component], np.float64), [0, 2, 3]
            weights = joint[i, rest] @ np.linalg.inv(joint[np.ix_(rest, rest)])
            variance = joint[i, i] - weights @ joint[rest, i]
            want += -0.5 * ((values[i] - weights @ values[rest]) ** 2 / variance + np.log(variance))
        assert float(found.evidence[0, view, i, row, column]) == pytest.approx(want, rel=2e-2)


def test_a_car_that_drives_along_stays_and_the_street_does_not(street):
    z = _noisy(street)
    mixed, _ = _seen(mixture.preconditioned, z, LEVELS, len(CORRIDORS))
    linear, _ = _seen(preconditioned, z, LEVELS, len(CORRIDORS))
    truth = np.asarray(street)
    error = {name: np.square(x[..., 2:4] - truth)[0, VIEW, 2:] for name, x in (("mixed", mixed), ("linear", linear))}
    car = (slice(None), slice(8, 13), slice(10, 17))
    assert error["mixed"][car].mean() < 0.2 * error["linear"][car].mean()
    street_only = np.delete(np.arange(WIDTH), np.arange(6, 21))
    assert error["mixed"][:, :, street_only].mean() < 1.2 * error["linear"][:, :, street_only].mean()


def test_shares_add_up_and_without_known_frames_the_first_corridor_has_all(street):
    c = _conditions()
    places = [find_places(c.waypoints, c.intrinsics, c.extrinsics, HEIGHT, WIDTH, corridor) for corridor in CORRIDORS]
    ways = [covariance(c.frame_times, corridor.way(c.waypoints), _prior().weights) for corridor in CORRIDORS]

    def shares(levels):
        z = _noisy(street, levels)
        return np.stack(mixture.shares([mixture.guess(take(z, p), levels, k).evidence for p, k in zip(places, ways)], places, levels, CORRIDORS))

    known = shares(LEVELS)
    np.testing.assert_allclose(known.sum(0), 1, atol=1e-5)
    assert known.min() >= 0 and known[ALONG, 0, VIEW, 2:, 8:13, 10:17].mean() > 0.6
    assert shares(jnp.ones((1, 6, 4)))[0].min() > 0.97
    one = jnp.broadcast_to(jnp.asarray([0.0, 1.0, 1.0, 1.0]), (1, 6, 4))  # one frame tells nothing of motion
    assert shares(one)[0].min() > 0.97


def test_neighbouring_places_are_averaged():
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    pad = np.pad(x, [(0, 0), (1, 1), (1, 1)], mode="edge")
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    want = sum(weights[i, j] * pad[:, i : i + 5, j : j + 6] for i in range(3) for j in range(3))
    np.testing.assert_allclose(mixture.smooth(jnp.asarray(x)), want, atol=1e-6)


def test_a_mixture_of_one_is_refused():
    config = load_config("configs/tiny.py", ["--config.model.precondition=mixture", "--config.model.sweep=1"])
    with pytest.raises(UserError, match="model.sweep=1 to 2"):
        dit_config(config.model, 8, (64, 112), 16, 16)

"""Evidence for the corridors of the plane sweep: misfits where frames are known, carried to where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from mila_jax.errors import UserError
from mila_jax.model import motion, precondition
from mila_jax.model.evidence import NEARER, SHARPNESS, best_sources, evidence, misfits
from mila_jax.model.motion import CORRIDORS
from mila_jax.model.network import dit_config
from mila_jax.model.precondition import SCALES, Prior, input_channels, preconditioned
from tests.test_model_motion import carried
from tests.test_model_precondition import LEVELS, TIMES, WAYPOINTS, _conditions, _weights


def test_misfits_are_means_over_the_neighbours_that_a_view_has():
    guess, known = (jax.random.normal(jax.random.key(i), (1, 6, 3, 4, 5, 2)) for i in range(2))
    off = np.square(np.asarray(guess) - np.asarray(known)).mean(-1)
    want = np.zeros_like(off)
    for row in range(4):
        for column in range(5):
            want[..., row, column] = off[..., max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].mean((-2, -1))
    np.testing.assert_allclose(misfits(guess, known), want, rtol=1e-5)


def test_sources_are_the_cleanest_frames_nearest_in_time():
    levels = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 1.0, 0.5, 0.2, 0.0]), (1, 6, 6))
    times = jnp.asarray([[-0.1, 0.0, 0.1, 0.2, 0.3, 5.0]])
    assert best_sources(levels, times)[0].tolist() == [1, 0, 1, 1, 1, 1]
    assert best_sources(levels.at[..., :2].set(0.3), times)[0].tolist() == [5, 5, 5, 5, 5, 4]
    assert best_sources(jnp.zeros((1, 6, 4)), jnp.arange(4)[None] / 12)[0].tolist() == [1, 0, 1, 2]  # of two neighbours, the earlier


# What is called for each corridor anew and loops: without this, each call would compile its loop again.
COMPILED = {name: jax.jit(getattr(precondition, name)) for name in ("inverse", "combine")}


def _seen(y, levels, weights, with_evidence, sweep=len(CORRIDORS)):
    seen = {}

    def network(latents, levels, conditions):
        seen["input"] = latents
        return jnp.zeros_like(latents[..., :2])

    with pytest.MonkeyPatch.context() as patch:
        for name, function in COMPILED.items():
            patch.setattr(precondition, name, function)
        preconditioned(network, Prior(np.eye(2, dtype=np.float32), weights), sweep, with_evidence)(y, levels, _conditions())
    return seen["input"]


@pytest.mark.parametrize("sweep", [len(CORRIDORS), pytest.param(4, marks=pytest.mark.slow)])
def test_what_the_network_is_told(sweep):
    """After what it sees without evidence: the guesses mixed, and two carried misfits of each corridor."""
    y, c = jax.random.normal(jax.random.key(1), (1, 6, 5, 2, 3, 2)), _conditions()
    seen, plain = (_seen(y, LEVELS, _weights(), told, sweep) for told in (True, False))
    assert seen.shape[-1] == input_channels(2, sweep, True) and plain.shape[-1] == input_channels(2, sweep, False)
    np.testing.assert_array_equal(seen[..., : plain.shape[-1]], plain)
    guesses = jnp.moveaxis(plain[..., 4:].reshape(*plain.shape[:-1], sweep, 2), -2, 0)
    fit = [misfits(guess, plain[..., 2:4]) for guess in guesses]
    still = jnp.stack([fit[k] for k in range(sweep) if CORRIDORS[k].moves == 0]).min(0)
    want, score = [], []
    for k in range(sweep):
        own, best = (carried(x[..., None], WAYPOINTS, c.intrinsics, c.extrinsics, CORRIDORS[k])[..., 0] for x in (fit[k], still))
        sources = [1, 0, 1, 1, 1]  # frames 0 and 1 are clean
        own, best = (jnp.stack([x[:, :, i, j] for i, j in enumerate(sources)], 2) for x in (own, best))
        want += [own, best]
        score.append((NEARER * best - own) / SHARPNESS)
    np.testing.assert_allclose(seen[..., -2 * sweep :] ** 2, jnp.stack(want, -1), atol=2e-5)
    mixed = (jax.nn.softmax(jnp.stack(score), 0)[..., None] * guesses).sum(0)
    np.testing.assert_allclose(seen[..., -2 * sweep - 2 : -2 * sweep], mixed, atol=1e-4)


def test_a_thing_that_drives_along_brings_its_evidence():
    """The same picture in all frames while the car drives 5 m: at the noisy frame only what drives along fits, and the mixed guess is it."""
    picture = jnp.broadcast_to(jax.random.normal(jax.random.key(2), (1, 6, 1, 8, 14, 2)), (1, 6, 5, 8, 14, 2))
    levels = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 1.0, 1.0, 1.0]), (1, 6, 5))
    y = jnp.where(levels[..., None, None, None] > 0, jax.random.normal(jax.random.key(3), picture.shape), picture)
    weights = np.zeros((6, 2, len(SCALES)), np.float32)
    weights[..., SCALES.index((1e4, 6.0))] = 0.95
    weights[..., 0] = 0.05
    seen, n = _seen(y, levels, weights, True), len(CORRIDORS)
    own, still = np.moveaxis(np.asarray(seen[:, :, 4, ..., -2 * n :]).reshape(1, 6, 8, 14, n, 2), -1, 0)
    along = [corridor.moves for corridor in CORRIDORS].index(1.0)
    assert own[..., along].max() < 0.1 < 0.2 < still[..., along].mean()
    error = jnp.square(seen[:, :, 4, ..., -2 * n - 2 : -2 * n] - picture[:, :, 4]).mean()
    assert float(error) < 0.2 * float(jnp.square(seen[:, :, 4, ..., 4:6] - picture[:, :, 4]).mean())  # of the street that stands still


def test_no_number_that_is_none():
    """A perfect fit everywhere, and no frame that is known."""
    guesses, known, c = [jnp.zeros((1, 6, 5, 2, 3, 2))] * len(CORRIDORS), jnp.zeros((1, 6, 5, 2, 3, 2)), _conditions()
    places = [motion.find(2, 3, WAYPOINTS, c.intrinsics, c.extrinsics, corridor) for corridor in CORRIDORS]
    mixed, roots = evidence(guesses, known, jnp.ones_like(LEVELS), TIMES, places)
    assert bool(jnp.isfinite(mixed).all()) and float(jnp.abs(roots).max()) < 2e-3


def test_the_first_corridors_are_those_that_older_weights_know():
    assert CORRIDORS[:6] == ((20, 60, 0), (4.5, 60, 0), (9, 60, 0), (40, 200, 0), (4.5, 60, 1), (4.5, 60, -1))


def test_evidence_needs_corridors():
    model = tiny.get_config().model
    assert (model.sweep, model.evidence) == (9, True)
    assert dit_config(model, 8, (64, 112), 16, 4).in_channels == 8 * (2 + 9) + 8 + 2 * 9
    model.sweep, model.evidence = 6, False
    assert dit_config(model, 8, (64, 112), 16, 4).in_channels == 64
    model.sweep, model.evidence = 0, True
    with pytest.raises(UserError, match="model.sweep"):
        dit_config(model, 8, (64, 112), 16, 4)
    model.precondition = "none"  # then neither is of consequence
    assert dit_config(model, 8, (64, 112), 16, 4).in_channels == 8
    with pytest.raises(ValueError, match="sweep"):
        preconditioned(None, Prior(np.eye(2, dtype=np.float32), _weights()), 0, True)

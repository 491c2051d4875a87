"""Bootstrapped distances are those of the pictures that a draw holds."""

import numpy as np
import pytest

from mila_jax.evaluate import resample
from mila_jax.evaluate.frechet import frechet_distance, statistics


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((40, 40)) * np.exp(-np.arange(40) / 8)[:, None]
    return rng.standard_normal((3, 6, 40)) @ mix + 1, rng.standard_normal((3, 9, 40)) @ mix - 0.5


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 0, 1), (0, 3, 0)])
def test_a_draw_is_its_pictures(sets, counts):
    fake, real = sets
    taken = np.repeat(np.arange(3), counts)
    drawn, recorded = fake[taken].reshape(-1, 40), real[taken].reshape(-1, 40)
    assert resample.AgainstPaired(fake, real).distance(counts) == pytest.approx(frechet_distance(drawn, recorded), rel=1e-5)
    assert resample.AgainstPaired(real, fake).distance(counts) == pytest.approx(frechet_distance(recorded, drawn), rel=1e-5)
    fixed = resample.AgainstFixed(fake, *statistics(real.reshape(-1, 40)))
    assert fixed.distance(counts) == pytest.approx(frechet_distance(drawn, real.reshape(-1, 40)), rel=1e-5)


def test_draws_repeat():
    counts = resample.draws(5, 40, seed=3)
    assert counts.shape == (40, 5) and (counts.sum(1) == 5).all() and len(np.unique(counts, axis=0)) > 20
    np.testing.assert_array_equal(counts, resample.draws(5, 40, seed=3))

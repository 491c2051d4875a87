"""Fréchet and kernel distance against closed forms and direct sums."""

import numpy as np
import pytest
import scipy.linalg

from mila_jax.evaluate.frechet import frechet_distance, frechet_distance_of_gaussians, kernel_distance, statistics


def test_one_dimension_closed_form():
    assert frechet_distance_of_gaussians([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2, abs=1e-12)


def test_commuting_covariances_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a, b = rng.uniform(0.1, 3, (2, 6))
    a[0] = b[3] = 0  # singular ones too
    means = rng.normal(size=(2, 6))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    got = frechet_distance_of_gaussians(means[0], basis * a @ basis.T, means[1], basis * b @ basis.T)
    assert got == pytest.approx(expected, abs=1e-7)


def test_general_covariances_against_the_matrix_square_root():
    rng = np.random.default_rng(1)
    a, b = (x @ x.T for x in rng.normal(size=(2, 5, 9)))
    expected = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance_of_gaussians(np.zeros(5), a, np.zeros(5), b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n, m, d", [(40, 50, 8), (6, 9, 20), (30, 5, 12)])
def test_samples_and_their_statistics_agree(n, m, d):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(n, d)), 0.5 + rng.normal(size=(m, d)) @ rng.normal(size=(d, d))
    expected = frechet_distance_of_gaussians(*statistics(a), *statistics(b))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_few_samples_of_many_features_move_as_a_whole():
    a = np.random.default_rng(3).normal(size=(10, 1280)).astype(np.float32)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 1280, rel=1e-6)
    assert frechet_distance(a, 3 * a - 2 * a.mean(0)) == pytest.approx(4 * a.var(0, ddof=1).sum(), rel=1e-5)


def test_kernel_distance_is_the_direct_sum_and_unbiased():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    expected = np.mean([k(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
    expected += np.mean([k(b[i], b[j]) for i in range(4) for j in range(4) if i != j])
    expected -= 2 * np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, abs=1e-12)
    repeats = [kernel_distance(*rng.normal(size=(2, 20, 3))) for _ in range(300)]
    assert abs(np.mean(repeats)) < 4 * np.std(repeats) / np.sqrt(300)
    assert kernel_distance(rng.normal(size=(50, 3)), 1 + rng.normal(size=(50, 3))) > 5 * np.std(repeats)


def test_bad_features_are_refused():
    good = np.zeros((3, 2))
    with pytest.raises(ValueError, match="n >= 2"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match="NaN"):
        kernel_distance(good, good + np.nan)

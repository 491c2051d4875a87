"""Bootstrap over videos of Fréchet distances: the same numbers as `frechet.frechet_distance`, hundreds of them in the time of a few.

A draw of videos with replacement is a count for each video. Products between pictures are taken once; a draw weights, centres and
leaves out rows of them. A draw repeats some videos and lacks others, and the fewer different pictures, the larger the distance: `interval`
leaves
that excess out. The sum of singular values that the distance needs comes from a symmetric eigenvalue problem of as many
rows as the draw has different pictures; its rounding error is some 1e-6 of the distance's terms.
"""

import numpy as np
from scipy.special import stdtrit


def draws(videos: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Counts [resamples, videos] of draws with replacement; the same for the same arguments, so that two sets of videos can be paired."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(0, videos, videos), minlength=videos) for _ in range(resamples)])


def interval(draws, value, videos: int):
    """95 % interval (low, high), each of the shape of `value` [...], from its draws [n, …] of so many videos; NaN for fewer than two.

    value ± t · s √(videos / (videos − 1)), with Student's t of videos − 1 degrees of freedom and the standard deviation s of the draws: for a mean of
    videos exactly the t interval. Percentiles of the draws would be far too narrow for few videos (of three normal ones they hold the mean in
    74 %, not 95 %), and those of Fréchet distances lie too high.
    """
    if videos < 2:
        return np.full_like(value, np.nan, dtype=float), np.full_like(value, np.nan, dtype=float)
    half = stdtrit(videos - 1, 0.975) * np.sqrt(videos / (videos - 1)) * np.std(draws, 0)
    return value - half, value + half


class _Pictures:
    """Features [videos, n, d] as one list of pictures, with what a draw of videos makes of them."""

    def __init__(self, features):
        features = np.asarray(features, np.float64)
        self.each = features.shape[1]
        self.rows = features.reshape(-1, features.shape[-1])
        self.means, self.squares = features.mean(1), np.square(features).sum((1, 2))

    def draw(self, counts):
        """Places and weights (adding up to 1) of the pictures drawn, their mean [d], the trace of their unbiased covariance and n/(n − 1)."""
        counts = np.asarray(counts)
        total = counts.sum() * self.each
        mean = counts @ self.means / counts.sum()
        unbiased = total / (total - 1)
        trace = (counts @ self.squares / total - mean @ mean) * unbiased
        weights = np.repeat(counts, self.each) / total
        places = np.flatnonzero(weights)
        return places, weights[places], mean, trace, unbiased


def _sum_of_singular_values(squared) -> float:
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(squared), 0, None)).sum())


class AgainstPaired:
    """Generated features [videos, n, d] against recorded ones [videos, m, d] of the same videos: both are drawn together."""

    def __init__(self, fake, real):
        self._fake, self._real = _Pictures(fake), _Pictures(real)
        self._products = self._fake.rows @ self._real.rows.T

    def distance(self, counts) -> float:
        """The Fréchet distance when video i is taken counts[i] times."""
        here, p, mean_a, trace_a, unbiased_a = self._fake.draw(counts)
        there, q, mean_b, trace_b, unbiased_b = self._real.draw(counts)
        m = self._products[np.ix_(here, there)]
        m = m - p @ m - (m @ q)[:, None] + p @ m @ q
        m *= np.sqrt(p * unbiased_a)[:, None] * np.sqrt(q * unbiased_b)
        cross = _sum_of_singular_values(m @ m.T if len(here) <= len(there) else m.T @ m)
        return float(max(np.sum((mean_a - mean_b) ** 2) + trace_a + trace_b - 2 * cross, 0.0))


class AgainstFixed:
    """Generated features [videos, n, d] against one set of recorded ones, a mean [d] and a covariance [d, d]."""

    def __init__(self, fake, mean, covariance):
        self._fake = _Pictures(fake)
        self._mean, self._trace = mean, np.trace(covariance)
        self._products = self._fake.rows @ covariance @ self._fake.rows.T

    def distance(self, counts) -> float:
        """The Fréchet distance when video i is taken counts[i] times."""
        here, p, mean, trace, unbiased = self._fake.draw(counts)
        m = self._products[np.ix_(here, here)]
        m = m - p @ m - (m @ p)[:, None] + p @ m @ p
        root = np.sqrt(p * unbiased)
        cross = _sum_of_singular_values(m * root[:, None] * root)
        return float(max(np.sum((mean - self._mean) ** 2) + trace + self._trace - 2 * cross, 0.0))

"""Distances between two sets of feature vectors: Fréchet and kernel, in float64.

With EfficientNet-Lite0 features the Fréchet distance is `FD-EffNetLite0`. It is not FID: FID is defined by another network,
and values of the two cannot be compared. Both distances need many pictures; the Fréchet distance of few is biased upwards,
so compare only sets of equal counts (the kernel distance is unbiased).
"""

import numpy as np

NAME = "FD-EffNetLite0"


def _checked(features):
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected features [n, d] with n >= 2, got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    return features


def statistics(features):
    """features [n, d] -> mean [d] and unbiased covariance [d, d], float64."""
    features = _checked(features)
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], features.shape[1])


def _factor_of_covariance(covariance):
    """F with Fᵀ F = covariance; tiny negative eigenvalues, which rounding makes, count as zero."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T


def _distance(mean_a, factor_a, mean_b, factor_b):
    # With A = FᵀF and B = GᵀG the eigenvalues of AB are the squared singular values of F Gᵀ, so Tr (AB)^½ is their plain
    # sum. No square root of a nearly singular matrix is taken, and with fewer samples than features F is the samples.
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    total = np.sum((mean_a - mean_b) ** 2) + np.sum(factor_a**2) + np.sum(factor_b**2) - 2 * cross
    return float(max(total, 0.0))


def frechet_distance_of_gaussians(mean_a, covariance_a, mean_b, covariance_b):
    """Fréchet (2-Wasserstein, squared) distance |μa − μb|² + Tr(A + B − 2 (AB)^½) of two Gaussians.

    means [d], covariances [d, d], symmetric and positive semidefinite, possibly singular. Source: Dowson and Landau, 1982.
    """
    means = [np.asarray(m, np.float64) for m in (mean_a, mean_b)]
    factors = [_factor_of_covariance(np.asarray(c, np.float64)) for c in (covariance_a, covariance_b)]
    return _distance(means[0], factors[0], means[1], factors[1])


def _fitted(features):
    features = _checked(features)
    mean = features.mean(0)
    centred = (features - mean) / np.sqrt(len(features) - 1)
    # The R of a QR decomposition has the same Gram matrix and no more than d rows.
    return mean, np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred


def frechet_distance(features_a, features_b):
    """Fréchet distance of the Gaussians fitted to two sets of features [n, d] and [m, d]; exact for n or m below d too.

    Raises `ValueError` for fewer than two vectors in a set or non-finite values.
    """
    return _distance(*_fitted(features_a), *_fitted(features_b))


class Reference:
    """One set of features [m, d] that many others are compared with: its part of the work is done once."""

    def __init__(self, features):
        self._fitted = _fitted(features)

    def distance(self, features):
        """`frechet_distance` of features [n, d] to the reference."""
        return _distance(*_fitted(features), *self._fitted)


def kernel_distance(features_a, features_b):
    """Squared maximum mean discrepancy with the kernel (x·y/d + 1)³, unbiased (it may be slightly negative).

    features [n, d] and [m, d]. Source: Bińkowski et al., 2018 (the kernel of KID), over all pairs instead of random subsets.
    """
    a, b = _checked(features_a), _checked(features_b)
    within = 0.0
    for x in (a, b):
        gram = (x @ x.T / x.shape[1] + 1) ** 3
        within += (gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1))
    return float(within - 2 * ((a @ b.T / a.shape[1] + 1) ** 3).mean())

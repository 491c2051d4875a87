"""Preconditioning by the best linear denoiser over time: the network learns only what linear statistics do not know.

Ours, not the paper's (switch: `model.precondition`; the large presets that load published weights leave it off). Latents of a
driving video are strongly correlated in time, and some frames of a window are clean. Take every latent element as a stationary
Gaussian process over time with unit variance and covariance K(Δt) = Σ_i w_i exp(-|Δt| / τ_i), and y_i = (1-σ_i) x_i + σ_i ε_i.
The posterior mean and variance of x and of the velocity x - ε given all frames of the window are then closed-form (a t×t solve
per view):

    A = diag(1-σ), D = diag(σ), M = A K A + D²
    E[x | y] = K A M⁻¹ y,    E[v | y] = (K A - D) M⁻¹ y,    Var[v | y] = diag(K + I - (K A - D) M⁻¹ (K A - D)ᵀ)

The network sees y and E[x | y] and its output is scaled: v = E[v | y] + sqrt(Var[v | y]) · F. This is Karras et al. 2022's
preconditioning with a temporal prior in place of a single variance; with K = identity it is theirs for rectified flow. Levels
may differ from frame to frame, so clean frames, TPD and noisy anchors need no special case.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

# Time constants of the mixture in seconds; the last is "static", the first acts as independent noise between frames.
TIME_CONSTANTS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 1e4)


def covariance(frame_times, weights):
    """K for frame_times [..., t] seconds and mixture weights [v, len(TIME_CONSTANTS)] → [..., v, t, t] float32."""
    gap = jnp.abs(frame_times[..., :, None] - frame_times[..., None, :])[..., None, :, :, None]
    taus = jnp.asarray(TIME_CONSTANTS, jnp.float32)
    return (jnp.asarray(weights, jnp.float32)[:, None, None, :] * jnp.exp(-gap / taus)).sum(-1)


def linear_denoiser(latents, levels, frame_times, weights):
    """The linear-Gaussian posterior described above.

    latents [b, v, t, h, w, c] at noise levels [b, v, t], frame_times [b, t] seconds, weights [v, m].
    Returns E[x | y] and E[v | y], both like latents, and the standard deviation of v given y [b, v, t].
    """
    k = covariance(frame_times, weights)  # [b, v, t, t]
    eye = jnp.eye(k.shape[-1], dtype=k.dtype)
    keep = 1 - levels
    ka = k * keep[..., None, :]
    m = keep[..., :, None] * ka + eye * (levels**2)[..., None] + 1e-5 * eye  # the small term: two frames at equal times
    # Per-frame weights first (t×t per view), then one product with the latents: cheap beside the network.
    cross = ka - eye * levels[..., None]  # Cov(v, y)
    solve = jnp.linalg.solve(m, jnp.concatenate([jnp.swapaxes(ka, -1, -2), jnp.swapaxes(cross, -1, -2)], -1))
    gain_x, gain_v = jnp.split(jnp.swapaxes(solve, -1, -2), 2, axis=-2)  # [b, v, t, t]
    variance = 1 + jnp.diagonal(k, axis1=-2, axis2=-1) - (gain_v * cross).sum(-1)
    flat = latents.reshape(latents.shape[:3] + (-1,)).astype(jnp.float32)
    both = jnp.concatenate([gain_x, gain_v], -2) @ flat
    x, v = jnp.split(both.reshape(both.shape[:3] + latents.shape[3:]), 2, axis=2)
    return x, v, jnp.sqrt(jnp.clip(variance, 1e-6))


def preconditioned(network, weights):
    """Wraps `network(x [b, v, t, h, w, 2c], levels, conditions) -> F` into a velocity function (see the top of this file)."""

    def velocity(latents, levels, conditions):
        x, v, std = linear_denoiser(latents, levels, conditions.frame_times, weights)
        x, v, std = jax.lax.stop_gradient((x, v, std))
        f = network(jnp.concatenate([latents, x.astype(latents.dtype)], -1), levels, conditions)
        return v + std[..., None, None, None] * f

    return velocity


def fit_covariance(latents, times) -> np.ndarray:
    """Mixture weights of each view from data, by non-negative least squares on the correlation over time.

    latents: list of [n, v, h, w, c] (normalised to unit variance), times: list of [n] seconds. Returns [v, m] float32 whose rows
    sum to 1. Non-negative weights make the covariance positive definite.
    """
    lags = np.array([0, 1, 2, 3, 6, 12, 18, 24, 36, 48, 72])
    views = latents[0].shape[1]
    product, variance, count, gaps = np.zeros((len(lags), views)), np.zeros(views), np.zeros(len(lags)), np.zeros(len(lags))
    frames = 0
    for x, t in zip(latents, times, strict=True):
        x = np.asarray(x, np.float32).reshape(len(x), views, -1)
        variance += (x * x).mean(-1).sum(0)
        frames += len(x)
        for j, lag in enumerate(lags):
            if lag < len(x):
                product[j] += (x[lag:] * x[: len(x) - lag]).mean(-1).sum(0)
                count[j] += len(x) - lag
                gaps[j] += (t[lag:] - t[: len(t) - lag]).sum()
    seen = count > 0
    correlation = product[seen] / count[seen, None] / (variance / frames)
    basis = np.exp(-(gaps[seen] / count[seen])[:, None] / np.array(TIME_CONSTANTS))
    weights = np.stack([nnls(basis, correlation[:, v])[0] for v in range(views)])
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

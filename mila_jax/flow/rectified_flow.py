"""Rectified flow: the straight path between data and noise, its velocity, and the masked training loss (paper eqs 4-7, 15).

x_σ = (1−σ) x + σ ε and v = x − ε, which points towards the data: lowering the level by λ adds λ·v. Levels σ are in [0, 1]
(0 clean, 1 noise) and may differ from frame to frame.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mila_jax.errors import UserError
from mila_jax.flow.timeshift import shift

DISTRIBUTIONS = ("uniform", "logit-normal")


def align(level, array):
    """Gives `level` trailing axes of length one until it broadcasts against `array` from the left.

    `level [..]` has at most as many axes as `array`, e.g. `[B, V, T]` against `[B, V, T, h, w, c]`.
    """
    level = jnp.asarray(level)
    return level.reshape(level.shape + (1,) * (jnp.ndim(array) - level.ndim))


def add_noise(x, noise, level):
    """x_σ = (1−σ) x + σ ε (paper eq. 4). `x`, `noise` `[B, V, T, h, w, c]`; `level` leading axes of it. Level 0 returns x exactly."""
    level = align(level, x)
    return (1 - level) * x + level * noise


def velocity_target(x, noise):
    """v = x − ε (paper eq. 6, up to the sign convention of Open-Sora 1.2, which points to the data)."""
    return x - noise


def data_estimate(x_level, velocity, level):
    """x̂ = x_σ + σ v: what the velocity takes the clean latent to be. Shapes as in `add_noise`."""
    return x_level + align(level, x_level) * velocity


def noise_estimate(x_level, velocity, level):
    """ε̂ = x_σ − (1−σ) v: what the velocity takes the noise to be. Shapes as in `add_noise`."""
    return x_level - (1 - align(level, x_level)) * velocity


class MaskedLoss(NamedTuple):
    """Squared error under a mask. `sum / count == mean`; add sums and counts over devices or micro-batches before dividing.

    `sum`, `count`, `mean` are scalars (count in latent values); `sample_sum`, `sample_count` `[B]` give the per-sample parts.
    """

    sum: jax.Array
    count: jax.Array
    mean: jax.Array
    sample_sum: jax.Array
    sample_count: jax.Array


def masked_loss(prediction, target, mask, weight=None) -> MaskedLoss:
    """L = Σ M ‖v − v_θ‖² / Σ M (paper eq. 15): every noisy latent value counts once, whichever sample it is in.

    `prediction`, `target` `[B, V, T, h, w, c]`; `mask` bool or 0/1 `[B, T]` or `[B, V, T]`, true where the frame is noisy
    (anchors included), false on clean conditioning frames. Computed in float32. An empty mask gives mean 0, not NaN.
    Open-Sora 1.2 averages per sample first: that is `mean(sample_sum / sample_count)`. `weight` (ours), `[B, V, T, h, w]`: how often the
    values of a place count, in sums and counts, in place of once. Weights that depend on the target change what is learned, E[w v | x_σ] /
    E[w | x_σ] in place of E[v | x_σ]: the flow then leads to data drawn as often as they weigh.
    """
    mask = jnp.asarray(mask, jnp.float32)
    if mask.ndim == 2:
        mask = mask[:, None]
    mask = jnp.broadcast_to(mask, prediction.shape[:3])
    error = jnp.square(jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32))
    inside = tuple(range(3, error.ndim))
    if weight is None:
        per_frame, values = error.sum(axis=inside), error[0, 0, 0].size
    else:
        per_frame, values = (error * weight[..., None]).sum(axis=inside), weight.sum(axis=inside[:-1]) * error.shape[-1]
    # where, not a product: a clean frame whose prediction overflowed must not poison the sum
    sample_sum = jnp.where(mask > 0, per_frame * mask, 0.0).sum(axis=(1, 2))
    sample_count = (mask * values).sum(axis=(1, 2))
    total, count = sample_sum.sum(), sample_count.sum()
    return MaskedLoss(total, count, total / jnp.maximum(count, 1.0), sample_sum, sample_count)


def draw_levels(key, batch: int, *, distribution: str = "logit-normal", ratio=1.0, loc: float = 0.0, scale: float = 1.0):
    """Training levels σ `[B]`: one per sample, shared by all its frames ("one timestamp per iteration", paper 3.5).

    `distribution`: "uniform" on [0, 1) or "logit-normal", sigmoid(N(loc, scale)) (Open-Sora 1.2's training configs).
    `ratio`: strength of the timestep transform, scalar or `[B]` (see `timeshift.shift_ratio`); 1 leaves levels alone.
    Raises UserError for an unknown distribution.
    """
    if distribution == "uniform":
        level = jax.random.uniform(key, (batch,))
    elif distribution == "logit-normal":
        level = jax.nn.sigmoid(loc + scale * jax.random.normal(key, (batch,)))
    else:
        raise UserError(f"unknown level distribution {distribution!r}: use one of {', '.join(DISTRIBUTIONS)}")
    return shift(level, ratio)

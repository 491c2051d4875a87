"""Joint denoising and correcting flow (JDC): re-noising a predicted anchor so that the flow can correct it (paper 3.3).

A coarse anchor is taken to be wrong by a known amount a: x̂ = (1−a) x + a ε₁ (eq. 8). It is re-noised as
x̃ = (1−b) x̂ + b s ε₂ (eq. 9) so that, seen from the true x, it is exactly a latent of level σ′: x̃ = (1−σ′) x + σ′ ε (eq. 12).
Hence 1−σ′ = (1−a)(1−b), that is b = (σ′ − a)/(1 − a), and unit variance of ε (eqs 10-11, 16-21) asks for
b·s = √(σ′² − (1−b)² a²). The symbols of (8)-(12) are stripped from the public text: reconstructed.
"""

import jax
import jax.numpy as jnp

from mila_jax.flow.rectified_flow import align


def coefficients(level, a):
    """(1−b, b·s, level used) for an anchor to be brought to `level` when it is wrong by `a` (0 ≤ a < 1); any broadcastable shapes.

    Only the product b·s appears, so nothing divides by b. Below `a` no noise can be taken away: b is clamped to 0 and the level
    used is `a`, the level that the anchor has already. a = 0 is plain noising, (1−σ′, σ′).
    """
    level, a = jnp.asarray(level, jnp.float32), jnp.asarray(a, jnp.float32)
    used = jnp.maximum(level, a)
    keep = (1 - used) / (1 - a)
    spread = jnp.sqrt(jnp.maximum(used**2 - (keep * a) ** 2, 0.0))
    return keep, jnp.where(a == 0, used, spread), used


def renoise(anchor, level, a, noise):
    """x̃ = (1−b) x̂ + b s ε₂ (eq. 9). `anchor`, `noise` of one shape, e.g. `[B, V, h, w, c]`; `level` (and `a`) its leading axes.

    `noise` is ε₂ or a key to draw it from. Returns (re-noised anchor, level used); the latter is max(level, a).
    """
    if isinstance(noise, jax.Array) and jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        noise = jax.random.normal(noise, anchor.shape, anchor.dtype)
    keep, spread, used = coefficients(level, a)
    renoised = align(keep, anchor) * anchor + align(spread, anchor) * noise
    return renoised.astype(anchor.dtype), used

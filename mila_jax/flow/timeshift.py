"""Open-Sora's timestep transform: larger latents stay longer at high noise.

u' = R u / (1 + (R−1) u) with R = √(height·width / 512²) · √F · scale (Open-Sora 1.2, schedulers/rf/rectified_flow.py,
`timestep_transform`). F is the number of latent frames. The published code derives F from pixel frames as
(frames // 17) · 5, which is its video autoencoder's length only from 17 frames on: for 2 to 16 frames it is 0, so every time
becomes 0 (and 0/0 at pure noise). Here F is given by the caller as the number of latent frames; `published_latent_frames` is
the published rule, for comparison only.
"""

import numpy as np
import jax.numpy as jnp

from mila_jax.errors import UserError


def shift(level, ratio):
    """u' = R u / (R u + 1 − u). `level` in [0, 1], any shape; `ratio` R broadcasts against it.

    This form is exactly 0 at 0, exactly 1 at 1 and the identity for R = 1; as the published one it is 0/0 for R = 0, u = 1.
    """
    level, ratio = jnp.asarray(level, jnp.float32), jnp.asarray(ratio, jnp.float32)
    scaled = ratio * level
    return jnp.where(ratio == 1, level, scaled / (scaled + (1 - level)))


def shift_ratio(height, width, latent_frames, *, base: int = 512, scale: float = 1.0):
    """R = √(height·width / base²) · √F · scale, with image sizes in pixels and F latent frames. Scalars or arrays; NumPy float64."""
    area = np.asarray(height, np.float64) * np.asarray(width, np.float64)
    return np.sqrt(area / base**2) * np.sqrt(np.asarray(latent_frames, np.float64)) * scale


def published_latent_frames(pixel_frames):
    """F as Open-Sora 1.2 computes it: 1 for one frame, else (frames // 17) · 5; 0 (a fault) for 2 to 16 frames."""
    frames = np.asarray(pixel_frames, np.int64)
    return np.where(frames == 1, 1, frames // 17 * 5)


def sampling_times(steps: int, ratio=1.0, *, discrete: bool = False) -> np.ndarray:
    """Times of a sampler, from 1 (noise) to 0 (clean): `[K+1]`, or `[K+1, B]` when `ratio` is an array `[B]`. NumPy float32.

    1 − i/K, rounded to thousandths when `discrete` (Open-Sora's integer timesteps), then shifted by `ratio`
    (Open-Sora 1.2, schedulers/rf/__init__.py). Raises UserError when `steps` < 1 or a ratio is not positive.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    ratio = np.asarray(ratio, np.float64)
    if not np.all(ratio > 0):
        raise UserError(f"the timestep shift must be positive, got {ratio.tolist()}: compute it from the number of latent frames")
    # float64 until the end: a time that equals an edit ratio on paper must equal it in float32
    times = 1 - np.arange(steps + 1) / steps
    times[-1] = 0
    if discrete:
        times = np.round(times * 1000) / 1000
    times = times.reshape(times.shape + (1,) * ratio.ndim)
    return (ratio * times / (ratio * times + (1 - times))).astype(np.float32)

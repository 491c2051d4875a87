"""Noise-level schedules: which level each frame of a window has at each step, and temporal progressive denoising (TPD).

TPD (paper 3.4, eqs 13-14; the formulae are lost, so the families here are reconstructed from the conditions the paper lists):
noisy frame i of S follows σ_i(t) = g(t, i) for the shared time t: 1 → 0, with g(1, i) = 1, g(0, i) = 0 and g strictly increasing
in t. Early frames fall fast first, trailing frames slowly, then fast; all end together. The strength k_i falls geometrically
from e^α (first) to e^−α (last), geometric mean 1; α = 0 is the uniform schedule exactly, α < 0 the reversed order.

    power        g = t^k
    rational     g = t / (t + k (1−t))
    exponential  g = (c^p − c) / (1 − c) with p = 1−t, c = k^−2   (default, α = 0.5)

A schedule is an array of levels `[K+1, T]`; step j takes frame i down by λ_{i,j} = levels[j, i] − levels[j+1, i].
"""

import numpy as np
import jax.numpy as jnp

from mila_jax.errors import UserError
from mila_jax.flow.timeshift import sampling_times

FAMILIES = ("power", "rational", "exponential")
STRONGEST = 5.0  # of |α|: beyond it, frames would go through nearly all levels in one step, and far beyond, k overflows float32


def log_strength(noisy, alpha):
    """ln k_i of every frame: α for the first noisy frame falling linearly to −α for the last; 0 on clean frames.

    `noisy [..., T]` bool; `alpha` scalar or `[...]`. A single noisy frame has k = 1. Returns `[..., T]` float32.
    """
    noisy = jnp.asarray(noisy, bool)
    rank = jnp.cumsum(noisy, axis=-1) - 1
    count = noisy.sum(axis=-1, keepdims=True)
    place = 1 - 2 * rank / jnp.maximum(count - 1, 1)
    alpha = jnp.asarray(alpha, jnp.float32)[..., None]
    return jnp.where(noisy & (count > 1), alpha * place, 0.0).astype(jnp.float32)


def progress(time, log_k, family: str = "exponential"):
    """g(t, i) (reconstructed eq. 13). `time` in [0, 1] and `log_k` = ln k_i broadcast against each other. float32.

    Raises UserError for an unknown family.
    """
    time, log_k = jnp.broadcast_arrays(jnp.asarray(time, jnp.float32), jnp.asarray(log_k, jnp.float32))
    if family == "power":
        level = time ** jnp.exp(log_k)
    elif family == "rational":
        level = time / (time + jnp.exp(log_k) * (1 - time))
    elif family == "exponential":
        # (c^p − c)/(1 − c) with c = e^−u rewritten as (e^{ut} − 1)/(e^u − 1): no cancellation near α = 0
        u = jnp.where(jnp.abs(log_k) < 1e-6, 1.0, 2 * log_k)
        level = jnp.expm1(u * time) / jnp.expm1(u)
    else:
        raise UserError(f"unknown schedule family {family!r}: use one of {', '.join(FAMILIES)}")
    return jnp.where(jnp.abs(log_k) < 1e-6, time, level)


def levels(times, frames: int, family: str = "exponential", alpha=0.5):
    """Levels of `frames` noisy frames at the shared `times [K+1]`: `[K+1, S]`, TPD of the given family and strength."""
    log_k = log_strength(jnp.ones((frames,), bool), alpha)
    return progress(jnp.asarray(times)[:, None], log_k, family)


def check_strength(alpha: float) -> None:
    """Raises UserError for a strength of TPD beyond ±`STRONGEST`."""
    if not abs(alpha) <= STRONGEST:
        raise UserError(f"window.tpd_strength={alpha:g} must lie between {-STRONGEST:g} and {STRONGEST:g}; 0 is none, the default 0.5")


def check_anchor(a: float, sigma_a: float) -> None:
    """Raises UserError unless 0 ≤ a < 1, 0 < σ_a ≤ 1 and σ_a ≥ a (below `a` an anchor cannot be re-noised, eq. 12)."""
    if not 0 <= a < 1:
        raise UserError(
            f"window.anchor_error: anchor error a = {a} must be in [0, 1): it is the part of a coarse anchor taken to be wrong (try 0.15)"
        )
    if not 0 < sigma_a <= 1:
        raise UserError(f"window.anchor_level: anchor level sigma_a = {sigma_a} must be in (0, 1] (try 0.4)")
    if sigma_a < a:
        raise UserError(f"anchor level sigma_a = {sigma_a} is below the anchor error a = {a}: raise sigma_a or lower a")


def window_schedule(
    steps: int,
    clean,
    *,
    anchor: int | tuple[int, ...] | None = None,
    family: str = "exponential",
    alpha: float = 0.5,
    sigma_a: float = 0.4,
    a: float = 0.15,
    shift: float = 1.0,
):
    """Levels of a whole window, `[K+1, T]`: 0 in every row for clean frames, TPD for the S noisy ones in their order.

    `clean [T]` bool (NumPy); `anchor`: position of the noisy tail anchor, which must be the last noisy frame, or None; or those of
    several (ours), the tail one last. Frame i's level, if it is one, is f(g(t, i)) with f(σ) = σ_a·σ (JDC, reconstructed), so it starts at
    σ_a and ends with the others. `shift`: strength R of the timestep transform on the shared times. Raises UserError for a window without
    noisy frames, a wrong anchor, σ_a < a.
    """
    clean = np.asarray(clean, bool)
    noisy = np.flatnonzero(~clean)
    if clean.ndim != 1 or noisy.size == 0:
        raise UserError(f"a window needs at least one frame to generate, got clean = {clean.tolist()}")
    rows = progress(sampling_times(steps, shift)[:, None], log_strength(~clean, alpha), family)
    rows = jnp.where(clean, 0.0, rows)
    if anchor is None or anchor == ():
        return rows
    check_anchor(a, sigma_a)
    *inner, tail = (range(clean.size)[place] for place in (anchor if isinstance(anchor, tuple) else (anchor,)))
    if tail != noisy[-1]:
        raise UserError(f"the noisy anchor must be the last noisy frame of its window ({noisy[-1]}), got position {tail}")
    if clean[inner].any():
        raise UserError(f"an anchor to be corrected must be a noisy frame, got positions {inner} of clean = {clean.tolist()}")
    return rows.at[:, np.array([*inner, tail])].multiply(sigma_a)


def training_levels(level, clean, anchor, *, alpha=0.0, family: str = "exponential", sigma_a=0.4):
    """Levels of training windows `[B, T]` from one level per sample: 0 on clean frames, g(σ, i) on noisy ones, σ_a·g on anchors.

    `level [B]`; `clean`, `anchor` bool `[B, T]` (a frame that is both is clean). `alpha` scalar or `[B]`: 0 gives every noisy
    frame its sample's level; other values show the network the uneven levels that TPD will ask of it.
    """
    clean, anchor = jnp.asarray(clean, bool), jnp.asarray(anchor, bool)
    rows = progress(jnp.asarray(level)[:, None], log_strength(~clean, alpha), family)
    rows = jnp.where(anchor, sigma_a * rows, rows)
    return jnp.where(clean, 0.0, rows)

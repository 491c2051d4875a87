"""Samplers of one window: Euler steps in one `lax.scan` over the rows of a schedule.

x ← x + λ v with λ the drop in level of each frame (paper eq. 7; "x_{t+λ} ← x_t + v(x_t, t)·λ" in the framework figure).
A frame whose level does not change in a step is not touched by it, bit for bit: clean frames simply have level 0 in all rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mila_jax.flow.rectified_flow import add_noise, align


def noise_like(key, shape, dtype=jnp.float32):
    """Standard normal `[B, ...]` in which sample b depends on the key and b only, not on the size of the batch.

    `key`: one key, or one per sample `[B]`.
    """
    keys = sample_keys(key, shape[0])
    return jax.vmap(lambda each: jax.random.normal(each, shape[1:], dtype))(keys)


def sample_keys(key, batch: int):
    """Keys `[B]`: `key` itself when it holds one key per sample, else one folded from `key` for each position in the batch."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 1:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def integrate(velocity: Callable, x, levels, steps, conditions, *, before: Callable | None = None, extras=None):
    """The one scan behind all samplers: for each row, `x ← x + step · velocity(x, level, conditions)`.

    `x [B, V, T, h, w, c]`; `levels`, `steps` broadcastable to `[K, B, V, T]`; `before(x, level, extra)` may change x ahead of the
    velocity (`extras` lead with K). The state keeps x's dtype whatever the velocity's. Frames with step 0 pass unchanged.
    """
    rows = (levels.shape[0],) + x.shape[:3]
    levels = jnp.broadcast_to(levels, rows).astype(jnp.float32)
    steps = jnp.broadcast_to(steps, rows).astype(jnp.float32)

    def body(state, row):
        level, step, extra = row
        if before is not None:
            state = before(state, level, extra)
        step = align(step, state)
        moved = state + step * velocity(state, level, conditions).astype(state.dtype)
        return jnp.where(step == 0, state, moved.astype(state.dtype)), None

    x, _ = jax.lax.scan(body, x, (levels, steps, extras))
    return x


def sample_window(velocity: Callable, x, schedule, conditions):
    """Denoises a window along `schedule`, `[K+1, T]` or `[K+1, B, T]` (levels in every row, the last all 0).

    `x [B, V, T, h, w, c]` is the start: clean frames as they are, noisy ones at the levels of row 0 (noise at level 1; re-noised
    anchors at theirs). Returns the clean window, same shape. All views of a frame share its level.
    """
    schedule = jnp.asarray(schedule, jnp.float32)
    if schedule.ndim == 2:
        schedule = schedule[:, None]
    schedule = schedule[:, :, None]
    return integrate(velocity, x, schedule[:-1], schedule[:-1] - schedule[1:], conditions)


def edit_rows(times, ratio):
    """Per-step state of Open-Sora's masked sampling: (levels, steps, active, fresh), each `[K, B, T]`.

    `times [K+1, B]` or `[K+1]`, falling to 0; `ratio [B, T]`: edit ratio, 1 generate, 0 keep, between: join when the time has
    fallen to it. `fresh` marks frames in the first step they take part in without having started as noise.
    """
    times = jnp.minimum(jnp.asarray(times, jnp.float32), 1.0)
    ratio = jnp.asarray(ratio, jnp.float32)
    times = times[:, None, None] if times.ndim == 1 else times[:, :, None]
    active = ratio >= times[:-1]
    before = jnp.concatenate([jnp.broadcast_to(ratio >= 1, active[:1].shape), active[:-1]])
    levels = jnp.where(active, times[:-1], 0.0)
    steps = jnp.where(active, times[:-1] - times[1:], 0.0)
    return levels, steps, active, active & ~before


def sample_edit(velocity: Callable, x, times, ratio, conditions, noise):
    """Open-Sora 1.2's masked sampling (schedulers/rf/__init__.py, `sample` with `mask`): image to video, extension, editing.

    `x [B, V, T, h, w, c]`: noise where ratio is 1, reference latents elsewhere; `times`, `ratio` as in `edit_rows`. A frame joins
    at the first time ≤ its ratio: it is noised to that time, x ← (1−u) x + u ε, and denoised from there; until then it is clean
    context at level 0 and is left untouched. `noise`: a key (one, or one per sample), or ε for each step `[K, B, V, T, h, w, c]`.
    """
    levels, steps, _, fresh = edit_rows(times, ratio)
    count = levels.shape[0]
    is_key = jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)
    keys = sample_keys(noise, x.shape[0]) if is_key else None

    def inject(state, level, extra):
        joining, step_noise = extra
        if is_key:
            step_noise = noise_like(jax.vmap(jax.random.fold_in, (0, None))(keys, step_noise), state.shape, state.dtype)
        return jnp.where(align(joining[:, None], state), add_noise(state, step_noise, level), state)

    extras = (fresh, jnp.arange(count) if is_key else noise)
    return integrate(velocity, x, levels[:, :, None], steps[:, :, None], conditions, before=inject, extras=extras)

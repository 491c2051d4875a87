"""Which corridor is right where: evidence for each guess of the plane sweep, from a frame that is known, carried to the frame that is not.

Ours, not the paper's (switch: `model.evidence`). Whether a guess is right shows where a frame is known: there, what the other frames say over a
corridor either fits or does not. But what is seen there lies elsewhere in the next frame, by more than a patch where a car passes close by, and
attention over time looks at one place. So the misfit is carried along the very corridor that it is of. A passing car then brings with it
how well its own motion explains it, and how badly a street that stands still does; and where a car comes to cover the street, both
explanations fit, but only the car's is one that standing things do not have.
"""

import functools

import jax
import jax.numpy as jnp

from mila_jax.model.motion import CORRIDORS, fetch

# Weights of the corridors in the mixed guess are exp(-(misfit - NEARER · misfit of the best that stands) / SHARPNESS), in latents of variance 1. Of a
# small grid, these made the mixed guess least wrong under close vehicles in the first new frame at 12 Hz.
NEARER, SHARPNESS = 1.5, 0.1


def misfits(guess, known):
    """Mean square difference [b, v, t, h, w] of a guess [b, v, t, h, w, c] from frames [b, v, t, h, w, c], over 3 × 3 neighbours in a view."""
    off = jnp.square(guess - known).mean(-1)

    def total(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1,) * (x.ndim - 2) + (3, 3), (1,) * x.ndim, "SAME")

    return total(off) / total(jnp.ones((1,) * (off.ndim - 2) + off.shape[-2:], off.dtype))


def best_sources(levels, frame_times):
    """For each frame, the other one that is known best: the cleanest, of equally clean ones the nearest in time, of those the earlier.

    levels [b, v, t], frame_times [b, t] seconds → numbers [b, t]. Needs two frames.
    """
    ahead = frame_times[:, None] - frame_times[:, :, None]
    cost = levels.mean(1)[:, None] + 1e-3 * jnp.abs(ahead) + 1e-5 * (ahead > 0)
    return jnp.argmin(jnp.where(jnp.eye(levels.shape[-1], dtype=bool), jnp.inf, cost), -1)


def evidence(guesses, known, levels, frame_times, places):
    """What is known of the first k `CORRIDORS` at each place.

    guesses: k of [b, v, t, h, w, c], what the others say of each frame over each corridor; known [b, v, t, h, w, c]: the best estimate of
    each frame; levels [b, v, t]; frame_times [b, t] seconds; places: k `motion.Places` of all frames in all frames. Returns the guesses mixed
    as the evidence says [b, v, t, h, w, c], and for each corridor two roots of misfits [b, v, t, h, w, 2 k]: its own, and that of the best corridor
    that stands still, both carried along it.
    """
    fits = [misfits(guess, known) for guess in guesses]
    still = functools.reduce(jnp.minimum, [fit for fit, corridor in zip(fits, CORRIDORS) if not corridor.moves])
    sources = best_sources(levels, frame_times)[:, None, :, None, None, None]

    def brought(fit, place):  # one misfit at a time: pairs of them side by side would each take a TPU's 128 lanes
        return fetch(fit[..., None], jax.tree.map(lambda x: jnp.take_along_axis(x, sources, 3)[:, :, :, 0], place))[..., 0]

    own = [brought(fit, place) for fit, place in zip(fits, places)]
    others = [brought(still, place) for place in places]
    weights = jax.nn.softmax(jnp.stack([(NEARER * other - mine) / SHARPNESS for mine, other in zip(own, others)]), 0)
    mixed = sum(weight[..., None] * guess for weight, guess in zip(weights, guesses))
    told = jnp.stack([misfit for pair in zip(own, others) for misfit in pair], -1)
    return mixed, jnp.sqrt(told + 1e-6)

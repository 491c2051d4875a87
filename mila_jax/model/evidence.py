"""Which corridor is right where: evidence for each guess of the plane sweep, from a frame that is known, carried to the frame that is not.

Ours, not the paper's (switch: `model.evidence`). Whether a guess is right shows where a frame is known: there, what the other frames say over a
corridor either fits or does not. But what is seen there lies elsewhere in the next frame, by more than a patch where a car passes close by, and
attention over time looks at one place. So the misfit is carried along the very corridor that it is of. A passing car then brings with it
how well its own motion explains it, and how badly a street that stands still does; and where a car comes to cover the street, both
explanations fit, but only the car's is one that standing things do not have.
"""

import jax
import jax.numpy as jnp

from mila_jax.model.motion import CORRIDORS, carry

# Weights of the corridors in the mixed guess are exp(-(misfit - NEARER · misfit of the best that stands) / SHARPNESS), in latents of variance 1. Of a
# small grid, these made the mixed guess least wrong under close vehicles.
NEARER, SHARPNESS = 1.5, 0.1


def misfits(guesses, known):
    """Mean square difference [k, b, v, t, h, w] of guesses [k, b, v, t, h, w, c] from frames [b, v, t, h, w, c], over 3 × 3 neighbours in a view."""
    off = jnp.square(guesses - known).mean(-1)

    def total(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1,) * (x.ndim - 2) + (3, 3), (1,) * x.ndim, "SAME")

    return total(off) / total(jnp.ones((1,) * 4 + off.shape[-2:], off.dtype))


def best_sources(levels, frame_times):
    """For each frame, the other one that is known best: the cleanest, of equally clean ones the nearest in time.

    levels [b, v, t], frame_times [b, t] seconds → numbers [b, t, 1].
    """
    gap = jnp.abs(frame_times[:, :, None] - frame_times[:, None])
    cost = levels.mean(1)[:, None] + 1e-3 * gap
    return jnp.argmin(jnp.where(jnp.eye(gap.shape[-1], dtype=bool), jnp.inf, cost), -1)[..., None]


def evidence(guesses, known, levels, conditions):
    """What is known of the first k `CORRIDORS` at each place.

    guesses [k, b, v, t, h, w, c]: what the others say of each frame over each corridor; known [b, v, t, h, w, c]: the best estimate of
    each frame; levels [b, v, t]. Returns the guesses mixed as the evidence says [b, v, t, h, w, c], and for each corridor two roots of misfits
    [b, v, t, h, w, 2 k]: its own, and that of the best corridor that stands still, both carried along it.
    """
    fit = misfits(guesses, known)
    corridors = CORRIDORS[: len(guesses)]
    still = fit[jnp.asarray([k for k, corridor in enumerate(corridors) if not corridor.moves])].min(0)
    sources = best_sources(levels, conditions.frame_times)
    places = conditions.waypoints, conditions.intrinsics, conditions.extrinsics
    both = [carry(jnp.stack([own, still], -1), *places, corridor, sources)[:, :, :, 0] for own, corridor in zip(fit, corridors)]
    own, still = jnp.moveaxis(jnp.stack(both), -1, 0)
    weights = jax.nn.softmax((NEARER * still - own) / SHARPNESS, 0)
    roots = jnp.sqrt(jnp.concatenate(both, -1) + 1e-6)
    return (weights[..., None] * guesses).sum(0), roots

"""Preconditioning by a mixture of motions: as `mila_jax.model.precondition`, with the corridor chosen place by place.

Ours (switch: `model.precondition` = mixture). One corridor is wrong wherever something stands nearer, or drives: a car beside us stays at its
place in the picture while the street goes by, and a prior that carries it off with the street loses it for good. So every corridor of
`motion.CORRIDORS` makes its own estimate of each frame, and frames that are known tell which is right. With P = M⁻¹ of a corridor, the
others' prediction of frame i misses it by (P z)_i / P_ii, with variance 1 / P_ii; the log-likelihood of a place under a corridor is

    -½ Σ_components (P z)_i² / P_ii - log P_ii

and its posterior weight, after a prior that favours the first corridor, says what the place belongs to. These weights are carried to the
other frames over their own corridor, as the latents are: where a car of one frame will be seen in another, that corridor finds its weight.
Two corridors may claim a place there (the car, and the street behind it); what is nearer hides what is farther, so they are asked in the
order of their distance, and the first corridor takes what is left. Without any known frame pair, all of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.model.motion import CORRIDORS, find_places, take
from mila_jax.model.precondition import Prior, covariance, inverse, moments

# Log odds against a standing and a moving corridor before anything is seen.
STANDING, MOVING = 2.0, 3.0


class Guess(NamedTuple):
    """What one corridor says of each frame i: mean of x_i and of the velocity x_i - ε_i given all frames, mean of x_i given the others, the
    standard deviation of the velocity [b, v, t, c], and the log-likelihood of z_i given the others [b, v, t, h, w]."""

    x: jnp.ndarray
    velocity: jnp.ndarray
    others: jnp.ndarray
    deviation: jnp.ndarray
    evidence: jnp.ndarray


def guess(carried, levels, k) -> Guess:
    """carried [b, v, t (i), t (j), h, w, c]: frames at noise levels [b, v, t] in principal components; k [b, v, c, t, t]."""
    level = levels[:, :, None]
    ka = k * (1 - level)[..., None, :]
    p = inverse(moments(levels, k))
    gain, cross = ka @ p, ka - jnp.eye(k.shape[-1], dtype=k.dtype) * level[..., None]
    x, miss = (jnp.einsum("bvcij,bvijhwc->bvihwc", g, carried) for g in (gain, p))  # miss: P z
    diagonal = lambda m: jnp.swapaxes(jnp.diagonal(m, axis1=-2, axis2=-1), -2, -1)  # [b, v, t, c]  # noqa: E731
    variance = 1 + diagonal(k) - jnp.swapaxes(((cross @ p) * cross).sum(-1), -2, -1)
    own, precision = ((m[:, :, :, None, None]) for m in (diagonal(gain), diagonal(p)))
    evidence = -0.5 * (miss * miss / precision - jnp.log(precision)).sum(-1)
    velocity = x - levels[..., None, None, None] * miss
    return Guess(x, velocity, x - own / precision * miss, jnp.sqrt(jnp.clip(variance, 1e-6)), evidence)


def smooth(x):
    """Binomial mean over 3×3 places of x [..., h, w]."""
    for axis in (-2, -1):
        size = x.shape[axis]
        pad = jnp.pad(x, [(1, 1) if a == x.ndim + axis else (0, 0) for a in range(x.ndim)], mode="edge")
        before, after = (jax.lax.slice_in_dim(pad, start, start + size, axis=x.ndim + axis) for start in (0, 2))
        x = 0.25 * before + 0.5 * x + 0.25 * after
    return x


def shares(evidence, places, levels, corridors):
    """The share [b, v, t, h, w] of each corridor at each place; they add up to one.

    evidence: of each corridor, [b, v, t, h, w]; places: its `Places`; levels [b, v, t].
    """
    prior = np.array([0.0, *(-(MOVING if c.moves else STANDING) for c in corridors[1:])], np.float32)
    unseen = np.exp(prior) / np.exp(prior).sum()
    owners = jax.nn.softmax(jnp.stack([smooth(e) for e in evidence]) + prior[:, None, None, None, None, None], axis=0)
    trust = ((1 - levels) ** 4 + 1e-6)[:, :, None, :, None, None]  # of noisy frames all that is said is the prior
    trust = trust / trust.sum(3, keepdims=True)
    found = [None] * len(corridors)
    left = jnp.ones_like(evidence[0])
    for n in sorted(range(1, len(corridors)), key=lambda n: (corridors[n].moves == 0, corridors[n].wall)):
        claim = (take(owners[n][..., None], places[n])[..., 0] * trust).sum(3)
        claim = jnp.clip((claim - unseen[n]) / (1 - unseen[n]), 0, 1)
        found[n] = claim * left
        left = left - found[n]
    found[0] = left
    return found


def preconditioned(network, prior: Prior, sweep: int):
    """Wraps `network(x [b, v, t, h, w, (2 + sweep) c], levels, conditions) -> F` into a velocity function, as `precondition.preconditioned` does,
    with the first `sweep` corridors."""
    basis, corridors = jnp.asarray(prior.basis, jnp.float32), CORRIDORS[:sweep]

    def mean(latents, levels, c):
        y = latents.astype(jnp.float32) @ basis
        places = [find_places(c.waypoints, c.intrinsics, c.extrinsics, *y.shape[3:5], corridor) for corridor in corridors]
        ways = [covariance(c.frame_times, corridor.way(c.waypoints), prior.weights) for corridor in corridors]
        guesses = [guess(take(y, place), levels, k) for place, k in zip(places, ways)]
        weights = [w[..., None] for w in shares([g.evidence for g in guesses], places, levels, corridors)]
        x, v = (sum(w * part for w, part in zip(weights, parts)) for parts in zip(*((g.x, g.velocity) for g in guesses)))
        return jnp.concatenate([y, x, *(g.others for g in guesses)], -1), v, guesses[0].deviation

    def velocity(latents, levels, conditions):
        seen, v, deviation = jax.lax.stop_gradient(mean(latents, levels, conditions))
        return (v + deviation[:, :, :, None, None] * network(seen, levels, conditions)) @ basis.T

    return velocity

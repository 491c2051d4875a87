"""Networks that start as smaller ones, and what they make of random clips."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mila_jax.model.conditions import from_clip
from mila_jax.model.grow import grow
from mila_jax.model.network import make_velocity
from mila_jax.model.precondition import SCALES, Prior
from mila_jax.model.stdit3_weights import create
from mila_jax.model.weights import merge_parameters
from tests.parallel_probe import make_clip


def by_name(state) -> dict:
    """Arrays of a state by dotted name."""
    return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(state)}


def random_values(params):
    """All parameters random, also those that start at zero, whose branches would be silent."""
    r = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * r.normal(size=x.shape), jnp.float32), params)


def grown(small, large):
    """Random parameters of `small`, and what `large` starts with from them."""
    params, fresh = random_values(create(small)[1]), create(large, seed=1)[1]
    return params, merge_parameters(fresh, grow(by_name(params), small, large, fresh), source="test")


def velocity(dit, params, x=None):
    """Of latents x (default: the clip's own) whose first two frames are clean if the network is preconditioned, else all at level 0.5."""
    clip = make_clip()
    x = jnp.asarray(clip["latents"] if x is None else x, jnp.float32)
    prior = Prior(np.eye(2, dtype=np.float32), np.full((x.shape[1], 2, len(SCALES)), 1 / len(SCALES), np.float32)) if dit.sweep else None
    levels = jnp.where(jnp.arange(x.shape[2]) < (2 if dit.sweep else 0), 0.0, 0.5) * jnp.ones(x.shape[:3])
    return jax.jit(lambda p, x: make_velocity(create(dit)[0], p, dit, prior)(x, levels, from_clip(clip)))(params, x)

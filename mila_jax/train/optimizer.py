"""AdamW or Muon with warm-up and clipping, as a function of the config's `train` section."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from mila_jax.errors import UserError
from mila_jax.train.muon import muon

OPTIMIZERS = ("adamw", "muon")
MOMENTS = ("float32", "bfloat16")


def learning_rate(train):
    """Schedule step → learning rate: linear warm-up lr·(s+1)/(W+1) as in Open-Sora, then constant, or cosine to lr/20 with `decay`."""
    after = optax.constant_schedule(train.learning_rate)
    if train.decay:
        after = optax.cosine_decay_schedule(train.learning_rate, max(train.steps - train.warmup, 1), alpha=0.05)
    first = train.learning_rate / (train.warmup + 1)
    return optax.join_schedules([optax.linear_schedule(first, train.learning_rate, train.warmup), after], [train.warmup])


def make_optimizer(train) -> optax.GradientTransformation:
    """Clip by global norm, then `train.optimizer`: AdamW (β₁ 0.9), or Muon (β 0.95) for the matrices of the blocks and AdamW with Nesterov
    momentum for everything else.

    Moments are float32 like the parameters, or bfloat16 with `train.moments`. Raises `UserError` for another optimizer or type of moments.
    """
    moments, name = train.get("moments", "float32"), train.get("optimizer", "adamw")
    if moments not in MOMENTS:
        raise UserError(f"train.moments={moments!r} is unknown; use one of {', '.join(MOMENTS)}")
    if name not in OPTIMIZERS:
        raise UserError(f"train.optimizer={name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    rate = learning_rate(train)
    if name == "adamw":
        inner = optax.adamw(rate, b1=0.9, b2=train.beta2, eps=train.epsilon, weight_decay=train.weight_decay)
    else:
        inner = muon(rate, matrices, eps=train.epsilon, weight_decay=train.weight_decay, adam_b2=train.beta2)
    return optax.chain(optax.clip_by_global_norm(train.clip), inner if moments == "float32" else in_bfloat16(inner))


def matrices(params):
    """For each parameter what Muon takes for its matrix, None where AdamW is to update it: all outside the blocks, biases, scales and tables.

    A block's kernels are stacked over the pairs [p, d, e]; fused projections [p, d, m, k, e] are m matrices of their own (q, k, v).
    """

    def axes(path, x):
        name = jax.tree_util.keystr(path)
        if "pairs" not in name or "table" in name or "bias" in name or x.ndim < 3:
            return None
        return MuonDimensionNumbers(1, (3, 4) if x.ndim == 5 else 2)

    return jax.tree_util.tree_map_with_path(axes, params)


def like_parameters(tx: optax.GradientTransformation, state, tree, other):
    """The optimizer's `state` with each moment replaced by the entry of its parameter in `tree`, all else by `other`."""
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731  (a parameter that this part of the optimizer leaves to another one)
    return optax.tree_utils.tree_map_params(tx, lambda x, y: x if masked(x) else y, state, tree, transform_non_params=lambda _: other, is_leaf=masked)


class HalvedState(NamedTuple):
    """count int32 []: updates so far; inner: the optimizer's state, its float32 arrays in bfloat16."""

    count: jax.Array
    inner: optax.OptState


def in_bfloat16(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with its moments kept in bfloat16: half the optimizer's memory, computed in float32 all the same.

    Rounding is stochastic: a step changes the second moment by about 1 - β₂ of itself, far less than half the distance of two
    neighbouring bfloat16 numbers, so that rounding to the nearest would never change it at all.
    """

    def halve(tree, count):
        leaves, structure = jax.tree.flatten(tree)
        seeds = _scramble(count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.arange(len(leaves), dtype=jnp.uint32))
        halved = jax.tree.leaves(moments(tree))
        return structure.unflatten([round_stochastically(x, seeds[i]) if halved[i] else x for i, x in enumerate(leaves)])

    def moments(tree):  # constants that an optimizer keeps in its state stay as they are
        return optax.tree_utils.tree_map_params(tx, lambda x: x.dtype == jnp.float32, tree, transform_non_params=lambda _: False)

    def init(params):
        state = tx.init(params)
        return HalvedState(jnp.zeros((), jnp.int32), jax.tree.map(lambda x, half: x.astype(jnp.bfloat16) if half else x, state, moments(state)))

    def update(grads, state, params=None):
        whole = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state.inner)
        updates, inner = tx.update(grads, whole, params)
        return updates, HalvedState(state.count + 1, halve(inner, state.count))

    return optax.GradientTransformation(init, update)


def _scramble(x):
    """A one-to-one map of uint32 numbers that leaves no pattern (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def round_stochastically(x, seed):
    """float32 → bfloat16, up or down with probabilities that keep the mean; finite numbers only. seed: uint32 [].

    The dither is a hash of each element's place: the same on any mesh, and a few operations where a random generator for each of some
    hundred arrays would make up most of the program.
    """
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    up = _scramble(place ^ seed) >> 16  # carries into the upper half as often as the lower half is large
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + up) & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)

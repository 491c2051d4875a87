"""Muon on a mesh: each device orthogonalizes whole matrices, its share of the stack, instead of all of them working on each.

The Newton–Schulz iteration takes fifteen products of a matrix with its own transpose. Parameters are split over `fsdp` along their width, and
products of split matrices gather or add up all of them between the devices each time. Here the momentum changes sides once, from slices of
every matrix to some matrices whole (an all-to-all), and its directions come back the same way. Momentum lies as its parameter does. Over `data`,
where every device has the same, each does the same: to share that, too, saves fewer products than its exchange costs (modelled by `mila plan`).
"""

import math

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from mila_jax.parallel.logical import constrain, mesh_axes

BETA = 0.95
RMS = 0.2  # root mean square of Muon's steps over the learning rate, about AdamW's, so that one learning rate serves both (arXiv:2502.16982)


def muon(learning_rate, matrices, *, eps: float, weight_decay: float, adam_b2: float) -> optax.GradientTransformation:
    """`optax.contrib.muon` with `consistent_rms`, to rounding, for any mesh: Muon where `matrices(params)` names axes, AdamW with Nesterov
    momentum where it has None."""

    def labels(params):
        return jax.tree.map(
            lambda axes: "adam" if axes is None else "muon", matrices(params), is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
        )

    # The state, too, is laid out as that of `optax.contrib.muon`, which scales in a transformation of its own: checkpoints made with it go on.
    orthogonal = optax.chain(
        orthogonal_momentum(matrices, eps), optax.identity(), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
    return optax.partition(
        {"muon": orthogonal, "adam": optax.adamw(learning_rate, b2=adam_b2, eps=eps, weight_decay=weight_decay, nesterov=True)}, labels
    )


def orthogonal_momentum(matrices, eps: float) -> optax.GradientTransformation:
    """Gradients → directions: their Nesterov momentum, orthogonalized, with a root mean square of `RMS`.

    matrices(updates): a tree of `MuonDimensionNumbers`; all other axes of an array count its matrices. They are split over the mesh axes of
    the logical axis "matrices" while they are orthogonalized.
    """
    # Without momentum of its own, optax's Muon is the iteration alone.
    iteration = scale_by_muon(
        beta=0.0, nesterov=False, eps=eps, weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MuonDimensionNumbers(1, 2), tree)
    )

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, BETA, 1)
        ahead = optax.tree.bias_correction(mu, BETA, optax.safe_increment(count))
        momentum = jax.tree.map(lambda m, g: BETA * m + (1 - BETA) * g, ahead, optax.tree.bias_correction(updates, BETA, count))
        axes = matrices(updates)
        stacks = jax.tree.map(stacked, momentum, axes)
        directions, _ = iteration.update(stacks, iteration.init(stacks))
        scaled = jax.tree.map(lambda x: RMS * max(x.shape[1:]) ** 0.5 * x, directions)
        return jax.tree.map(unstacked, scaled, momentum, axes), MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(scale_by_muon().init, update)


def order(x, axes: MuonDimensionNumbers) -> tuple[list[int], list[int]]:
    """The axes of x in the order (matrices, rows, columns), and the sizes of these three."""
    rows, columns = ([a] if isinstance(a, int) else list(a) for a in axes)
    others = [a for a in range(x.ndim) if a not in rows + columns]
    return others + rows + columns, [math.prod(x.shape[a] for a in part) for part in (others, rows, columns)]


def stacked(x, axes: MuonDimensionNumbers):
    """x as its matrices [n, rows, columns], each whole on one device; n is filled up with zeros to a multiple of the devices."""
    places, sizes = order(x, axes)
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.prod(mesh.shape[a] for a in mesh_axes("matrices"))
    stack = jnp.pad(x.transpose(places).reshape(sizes), ((0, -sizes[0] % devices), (0, 0), (0, 0)))
    return constrain(stack, "matrices", None, None)


def unstacked(stack, x, axes: MuonDimensionNumbers):
    """The inverse of `stacked`, for an x of the same shape."""
    places, sizes = order(x, axes)
    return stack[: sizes[0]].reshape([x.shape[a] for a in places]).transpose([places.index(a) for a in range(x.ndim)])

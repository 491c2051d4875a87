"""When parameters that are split over devices are made whole: by each layer when it needs them, or once a step (`mesh.gather`)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mila_jax.parallel.logical import constrain, mesh_axes

STORED, USED = "embed", "embed_in_step"  # logical names: how a kernel's axis is split at rest, and while a step computes with it


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, names, dtype):
    return constrain(x.astype(dtype), *(USED if n == STORED else n for n in names))


def _gather_forward(x, names, dtype):
    return _gather(x, names, dtype), None


def _gather_backward(names, dtype, _, g):
    # Stated as stored: left to itself, the gradient would lie as the gathered kernel does, which is whole on every device.
    return (constrain(g, *names).astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)


def gathered(layers: nnx.Module, dtype):
    """The kernels of stacked layers in the compute type, split as `embed_in_step` says; the module itself where that is as they are stored.

    What is computed with does not change: each layer would convert its kernels to the same type, and their gradients come in it, too.
    """
    if mesh_axes(USED) == mesh_axes(STORED):
        return layers

    def gather(variable):
        names = variable.get_metadata().get("out_sharding") or ()
        # Vectors and the tables of the modulation are small, and added in float32.
        if STORED not in names or len(names) < 3 or names[1] is None:
            return variable
        return variable.replace(_gather(variable[...], tuple(names), dtype))

    return jax.tree.map(gather, layers, is_leaf=lambda x: isinstance(x, nnx.Param))

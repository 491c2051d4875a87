"""The device mesh and the shardings on it. Axes: data, fsdp, context (sequence), tensor.

Axis types are Auto: the compiler propagates shardings, and `constrain` states the few that matter.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mila_jax.errors import UserError
from mila_jax.parallel.logical import spec

AXES = ("data", "fsdp", "context", "tensor")


def axis_sizes(sizes, count: int) -> dict[str, int]:
    """Sizes of the mesh axes over `count` devices, from the config's `mesh` section; at most one of them is -1 = the rest.

    Raises `UserError` naming the keys when the sizes do not multiply to the number of devices.
    """
    shape = [int(sizes[a]) for a in AXES]
    if shape.count(-1) > 1 or any(s < 1 and s != -1 for s in shape):
        raise UserError(f"mesh sizes {dict(zip(AXES, shape))}: at most one of mesh.data … mesh.tensor may be -1, the others positive")
    fixed = math.prod(s for s in shape if s != -1)
    if count % fixed or (-1 not in shape and fixed != count):
        raise UserError(f"mesh sizes {dict(zip(AXES, shape))} do not fit {count} devices; change mesh.data, .fsdp, .context or .tensor")
    return {axis: count // fixed if s == -1 else s for axis, s in zip(AXES, shape)}


def make_mesh(sizes, devices=None) -> Mesh:
    """Mesh over all devices (or `devices`) with the axis sizes of the config's `mesh` section; see `axis_sizes`."""
    devices = jax.devices() if devices is None else devices
    shape = axis_sizes(sizes, len(devices))
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over the data-parallel axes, everything else whole."""
    return NamedSharding(mesh, spec("batch"))


def parameter_shardings(mesh: Mesh, params):
    """Shardings of a parameter tree from the logical axes that each parameter was declared with (same structure)."""

    def sharding(variable):
        axes = variable.get_metadata().get("out_sharding") or ()
        return variable.replace(NamedSharding(mesh, spec(*axes)))

    return jax.tree.map(sharding, params, is_leaf=lambda x: hasattr(x, "get_metadata"))


def check_divides(mesh: Mesh, batch: int, heads: int, width: int, frames: int, tokens: int) -> None:
    """Raises `UserError` with the key to change when a size does not divide by the mesh axis that splits it."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for size, key, parts, axis in (
        (batch, "train.batch", shards, "mesh.data·mesh.fsdp"),
        (width, "model.width", mesh.shape["fsdp"], "mesh.fsdp"),
        (heads, "model.heads", mesh.shape["tensor"], "mesh.tensor"),
        (frames, "window.frames", mesh.shape["context"], "mesh.context"),
        (tokens, "tokens of a view (data.image_size / compression / model.patch)", mesh.shape["context"], "mesh.context"),
    ):
        if size % parts:
            raise UserError(f"{key}={size} is not a multiple of {axis}={parts}; change one of them")

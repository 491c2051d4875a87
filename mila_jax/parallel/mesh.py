"""The device mesh and the shardings on it. Axes: data, fsdp, context (sequence), tensor.

Axis types are Auto: the compiler propagates shardings, and `constrain` states the few that matter.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mila_jax.errors import UserError
from mila_jax.parallel.logical import AXES, mesh_axes, spec
from mila_jax.parallel.placement import arrange


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
    """Mesh over all devices (or `devices`, which may be those of a topology) with the axis sizes of the config's `mesh` section.

    `mesh.dcn_data` slices (-1 = as many as there are) lie along the axis data, which is the only one whose collectives then leave
    a slice. Raises `UserError` as `axis_sizes` and `placement.arrange` do.
    """
    devices = jax.devices() if devices is None else devices
    shape = axis_sizes(sizes, len(devices))
    return Mesh(arrange(tuple(shape.values()), devices, sizes.get("dcn_data", -1)), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over the data-parallel axes, everything else whole."""
    return NamedSharding(mesh, spec("batch"))


def own_rows(sharding: NamedSharding, batch: int) -> list[int]:
    """Which of `batch` rows lie on this process's devices, ascending: the samples that this process has to load.

    Where an axis that does not split the batch runs across processes, several of them hold the same rows.
    """
    parts = sharding.addressable_devices_indices_map((batch,)).values()
    return sorted({row for (rows,) in parts for row in range(batch)[rows]})


def parameter_shardings(mesh: Mesh, params):
    """Shardings of a parameter tree from the logical axes that each parameter was declared with (same structure)."""

    def sharding(variable):
        axes = variable.get_metadata().get("out_sharding") or ()
        return variable.replace(NamedSharding(mesh, spec(*axes)))

    return jax.tree.map(sharding, params, is_leaf=lambda x: hasattr(x, "get_metadata"))


def constrain_parameters(params, *lead: str):
    """States the sharding of a tree of arrays like the parameters, for their gradients. `lead`: mesh axes of the axes ahead of those that the
    parameters were declared with. Without a mesh this does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return params

    def state(variable):
        axes = variable.get_metadata().get("out_sharding") or (None,) * (variable.ndim - len(lead))
        return variable.replace(jax.lax.with_sharding_constraint(variable[...], P(*lead, *spec(*axes))))

    return jax.tree.map(state, params, is_leaf=lambda x: hasattr(x, "get_metadata"))


def check_divides(mesh: Mesh, batch: int, heads: int, width: int, frames: int, tokens: int, whose: str = "") -> None:
    """Raises `UserError` with the key to change when a size does not divide by the mesh axes that the rules in force split it over.

    frames: of a window; tokens: patches of one view of one frame; whose: of another model than the config's, for messages.
    """
    for size, key, names in (
        (batch, "train.batch", ("batch",)),
        (width, "model.width", ("embed", "mlp")),
        (heads, "model.heads", ("heads", "temporal_heads")),
        (frames, "window.frames", ("frames", "temporal_frames", "query_frames", "key_frames")),
        (tokens, "tokens of a view (data.image_size / compression / model.patch)", ("places",)),
    ):
        for name in names:
            axes = mesh_axes(name)
            parts = math.prod(mesh.shape[a] for a in axes)
            if size % parts:
                raise UserError(
                    f"{whose}{key}={size} is not a multiple of {'·'.join('mesh.' + a for a in axes)}={parts} ({name}); change one of them"
                )
    if mesh.shape["context"] > 1 and not any("context" in mesh_axes(name) for name in ("batch", "frames", "places", "temporal_frames")):
        raise UserError(f"mesh.context={mesh.shape['context']} would be left unused by attention.parallel=none; set mesh.context=1 or another mode")


def check_accumulation(train, mesh) -> None:
    """Raises `UserError` when the batch, split as the rules in force say, does not divide into `train.accumulate` parts on every device."""
    if train.accumulate < 1:
        raise UserError(f"train.accumulate={train.accumulate} must be at least 1")
    axes = mesh_axes("batch")
    parts = train.accumulate * math.prod(mesh.shape[a] for a in axes)
    if train.batch % parts:
        names = "·".join(["train.accumulate", *("mesh." + a for a in axes)])
        raise UserError(f"train.batch={train.batch} is not a multiple of {names}={parts}; change one of them")

"""Logical axis names → mesh axes: sharding is data. Nothing else in the package names a mesh axis on an array.

A name maps to a mesh axis, a tuple of them, or None (not split). The table in force is `RULES`, overlaid by the mode of
attention parallelism (`attention.parallel`) and then by the config's `mesh.rules`; `use_rules` swaps entries for a block.
"""

import contextlib
import contextvars
import functools

import jax
from jax.sharding import PartitionSpec as P

from mila_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")

RULES = {
    # activations
    "batch": ("data", "fsdp"),
    "frames": "context",  # spatial attention, and both ends of the network: each frame is independent of the others
    "temporal_frames": None,  # frames in temporal blocks
    "places": "context",  # patches of a view in temporal blocks: each place of each view is independent of the others
    "query_frames": None,  # frames of q inside temporal attention
    "key_frames": None,  # frames of k and v inside temporal attention
    "temporal_heads": "tensor",  # heads inside temporal attention
    # parameters
    "layers": None,
    "embed": "fsdp",
    "embed_in_step": "fsdp",  # of kernels while a step computes with them: split as they are stored, or whole (`mesh.gather`)
    "mlp": "tensor",
    "heads": "tensor",
    "head_dim": None,
    "matrices": "fsdp",  # kernels of the blocks while Muon orthogonalizes them: each whole on one device
}

# How attention that runs across the axis split over `context` is made whole again. Spatial attention never does; temporal does.
MODES = {
    # Nothing is split over `context`.
    "none": {"frames": None, "places": None},
    # Spatial blocks split frames, temporal blocks places: the whole activation changes sides between the blocks (all-to-all).
    "context": {},
    # Ulysses (arXiv 2309.14509): activations keep their frames; inside temporal attention heads are split instead (all-to-alls
    # of q, k, v and of the result).
    "heads": {"temporal_frames": "context", "places": None, "temporal_heads": ("tensor", "context")},
    # Activations keep their frames, queries too; keys and values are gathered.
    "kv_gather": {"temporal_frames": "context", "places": None, "query_frames": "context"},
}

_rules = contextvars.ContextVar("logical_rules", default=RULES)


# When kernels that are split over devices are made whole (`mesh.gather`): by each layer, in the forward pass and again in the backward pass
# (least memory), or all of them before the first layer, in the compute type (two bytes a parameter more, and half of the transfers).
GATHER = {"layer": {}, "step": {"embed_in_step": None}}


def rules_of(mode: str = "context", changes=(), gather: str = "layer") -> dict:
    """The whole table for `attention.parallel` = mode, the config's `mesh.gather` and its `mesh.rules`.

    Raises `UserError` for an unknown mode, gather, logical name or mesh axis.
    """
    if gather not in GATHER:
        raise UserError(f"mesh.gather={gather!r} is unknown; use one of {', '.join(GATHER)}")
    if mode not in MODES:
        raise UserError(f"attention.parallel={mode!r} is unknown; use one of {', '.join(MODES)}")
    changes = dict(changes)
    for name, axes in changes.items():
        if name not in RULES:
            raise UserError(f"mesh.rules.{name} is no logical axis; there are {', '.join(RULES)}")
        if not (axes is None or isinstance(axes, (str, tuple, list))):
            raise UserError(f"mesh.rules.{name}={axes!r} must be a mesh axis ({', '.join(AXES)}), a tuple of them, or None")
        wrong = [a for a in _as_tuple(axes) if a not in AXES]
        if wrong:
            raise UserError(f"mesh.rules.{name}={axes!r}: {wrong[0]!r} is no mesh axis; use {', '.join(AXES)}, a tuple of them, or None")
        changes[name] = tuple(axes) if isinstance(axes, list) else axes
    same = {} if "embed_in_step" in changes or "embed" not in changes else {"embed_in_step": changes["embed"]}
    return {**RULES, **MODES[mode], **same, **GATHER[gather], **changes}


def rules_from_config(config) -> dict:
    """`rules_of` a config; sections and keys that an older file lacks take their defaults.

    Raises `UserError` as `rules_of` does, and for a temporal kernel whose frames would be split.
    """
    attention = config.get("attention", {})
    mesh = config.get("mesh", {})
    rules = rules_of(attention.get("parallel", "context"), mesh.get("rules", {}), mesh.get("gather", "layer"))
    if attention.get("temporal", "xla") == "fused" and (rules["query_frames"] or rules["key_frames"]):
        raise UserError(
            "attention.temporal=fused wants whole frames on every device; use attention.parallel=context or heads, or attention.temporal=xla"
        )
    return rules


@contextlib.contextmanager
def use_rules(**changes):
    """Within the block, the given names map elsewhere: `with use_rules(embed=None): …`."""
    token = _rules.set({**_rules.get(), **changes})
    try:
        yield
    finally:
        _rules.reset(token)


def with_rules(rules: dict, function):
    """`function` under `rules`, whenever it is called or traced."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with use_rules(**rules):
            return function(*args, **kwargs)

    return call


def _as_tuple(axes) -> tuple:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def mesh_axes(name) -> tuple[str, ...]:
    """The mesh axes that split an axis of this logical name. `KeyError` for a name that is not in the table."""
    return () if name is None else _as_tuple(_rules.get()[name])


def spec(*names) -> P:
    """The partition of an array whose axes have these logical names.

    `KeyError` for a name that is not in the table; `UserError` when one mesh axis would split two axes of the array.
    """
    used = [a for name in names for a in mesh_axes(name)]
    twice = {a for a in used if used.count(a) > 1}
    if twice:
        raise UserError(
            f"mesh.rules split two axes of one array ({', '.join(map(str, names))}) over mesh axis {', '.join(sorted(twice))}; change one"
        )
    return P(*(None if name is None else _rules.get()[name] for name in names))


def constrain(x, *names):
    """States the sharding of an activation by logical names (None = leave whole). Without a mesh this does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))

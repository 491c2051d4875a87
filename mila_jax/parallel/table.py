"""The sharding table: every parameter, optimizer moment and main activation of a training step, how it is split and what it takes.

Computed from shapes alone: no data set, no devices, nothing compiled. What the compiler keeps besides is not in it.
"""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from mila_jax.model.stdit3_weights import abstract_model
from mila_jax.model.weights import model_config
from mila_jax.parallel.aot.sizes import data_description
from mila_jax.parallel.logical import AXES, mesh_axes, rules_from_config, spec, use_rules
from mila_jax.parallel.mesh import axis_sizes, check_divides
from mila_jax.train.optimizer import like_parameters, make_optimizer
from mila_jax.train.stages import resolve
from mila_jax.views import VIEWS

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One array: `group` parameters | ema | optimizer | activations; `logical`: names of its axes; `physical`: mesh axes, the same
    length; `mib`: MiB on each device, unpadded. Activations are those of one pair of blocks."""

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    logical: tuple
    physical: tuple[tuple[str, ...], ...]
    mib: float


def sharding_table(config, mesh, data: dict | None = None) -> list[Row]:
    """Rows for a config on `mesh`: a Mesh, a dict of axis sizes, or a number of devices for the config's own sizes.

    data: `prepare.describe_data` of a data set; None takes the sizes of the config's `plan` section. Raises `UserError` naming
    the key for sizes that do not divide and rules that cannot work.
    """
    data = data_description(config) if data is None else data
    sizes = axis_sizes(config.mesh, mesh) if isinstance(mesh, int) else dict(mesh if isinstance(mesh, dict) else mesh.shape)
    mesh = AbstractMesh(tuple(sizes[a] for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    dit = model_config(config, data)
    tokens = math.prod(-(-s // p) for s, p in zip(data["latent_shape"], dit.patch[1:]))
    with use_rules(**rules_from_config(config)):
        check_divides(mesh, config.train.batch, dit.heads, dit.width, config.window.frames, tokens)
        rows = _state_rows(mesh, dit, config.train)
        for name, shape, dtype, logical in _activations(dit, config.train.batch, -(-config.window.frames // dit.patch[0]), tokens):
            rows.append(_row(mesh, "activations", name, shape, dtype, logical))
    return rows


def _row(mesh, group, name, shape, dtype, logical) -> Row:
    dtype = jax.numpy.dtype(dtype)
    local = NamedSharding(mesh, spec(*logical)).shard_shape(shape)
    return Row(group, name, tuple(shape), dtype.name, tuple(logical), tuple(mesh_axes(n) for n in logical), math.prod(local) * dtype.itemsize / MIB)


def _state_rows(mesh, dit, train) -> list[Row]:
    """Parameters, their average and the optimizer's state, from the same declarations that `train.state` shards them by."""
    _, params = abstract_model(dit)
    tx = make_optimizer(train)
    trained = jax.eval_shape(resolve(params, train.get("trainable", ("*",)), dit.depth).select, params)
    # As strings, which are leaves of a tree where tuples are not.
    names_of = lambda v: v.replace(",".join(str(n) for n in v.get_metadata().get("out_sharding") or (None,) * v.ndim))  # noqa: E731
    logical, trained_logical = (jax.tree.map(names_of, p, is_leaf=lambda x: hasattr(x, "get_metadata")) for p in (params, trained))
    moments = jax.eval_shape(tx.init, trained)
    moments_logical = like_parameters(tx, moments, trained_logical, "")
    rows = []
    for group, shapes, names in (("parameters", params, logical), ("ema", params, logical), ("optimizer", moments, moments_logical)):
        for (path, leaf), joined in zip(jax.tree_util.tree_flatten_with_path(shapes)[0], jax.tree.leaves(names), strict=True):
            axes = tuple(None if n == "None" else n for n in joined.split(",")) if joined else ()
            rows.append(_row(mesh, group, _dotted(path), leaf.shape, leaf.dtype, axes))
    return rows


def _dotted(path) -> str:
    keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
    return ".".join(k for k in keys if k not in ("value", "raw_value"))


def _activations(dit, b: int, t: int, n: int):
    """(name, shape, dtype, logical names) of what a pair of blocks holds at its widest; see model/dit.py and model/attention.py."""
    v, d, k, e, hidden = len(VIEWS), dit.width, dit.heads, dit.width // dit.heads, int(dit.width * dit.mlp_ratio)
    spatial, temporal = ("batch", "frames", None, None), ("batch", "temporal_frames", None, "places")
    yield "stream, spatial block [b t v n d]", (b, t, v, n, d), dit.dtype, (*spatial, None)
    yield "stream, temporal block [b t v n d]", (b, t, v, n, d), dit.dtype, (*temporal, None)
    yield "q, spatial attention [b t v·n k e]", (b, t, v * n, k, e), dit.dtype, ("batch", "frames", None, "heads", None)
    if dit.attention_kernel == "xla":
        yield "scores, spatial attention [b t k v·n v·n]", (b, t, k, v * n, v * n), "float32", ("batch", "frames", "heads", None, None)
    yield "q, temporal attention [b v n t k e]", (b, v, n, t, k, e), dit.dtype, ("batch", None, "places", "query_frames", "temporal_heads", None)
    yield "k, temporal attention [b v n t k e]", (b, v, n, t, k, e), dit.dtype, ("batch", None, "places", "key_frames", "temporal_heads", None)
    if dit.temporal_kernel == "xla":
        scores = ("batch", None, "places", "temporal_heads", "query_frames", "key_frames")
        yield "scores, temporal attention [b v n k t t]", (b, v, n, k, t, t), "float32", scores
    yield "hidden, spatial MLP [b t v n 4d]", (b, t, v, n, hidden), dit.dtype, (*spatial, "mlp")
    yield "hidden, temporal MLP [b t v n 4d]", (b, t, v, n, hidden), dit.dtype, (*temporal, "mlp")
    yield "stream kept for the backward pass, all pairs", (dit.depth, b, t, v, n, d), dit.dtype, ("layers", *spatial, None)


def format_table(rows: list[Row], sizes: dict) -> str:
    """The table as text: parameters and activations line by line, the average and the moments (which lie as their parameters do) as sums.

    sizes: axis → size, for the heading.
    """

    def cells(row):
        logical = " ".join("·" if n is None else n for n in row.logical) or "-"
        physical = " ".join("+".join(a) if a else "·" for a in row.physical) or "-"
        return [row.name, "×".join(map(str, row.shape)) or "scalar", row.dtype, logical, physical, f"{row.mib:.3f}"]

    lines = ["mesh " + " ".join(f"{a}={sizes[a]}" for a in AXES)]
    for group, shown in (("parameters", True), ("ema", False), ("optimizer", False), ("activations", True)):
        members = [r for r in rows if r.group == group]
        lines += ["", f"{group}: {len(members)} arrays" + (f", {sum(r.mib for r in members):.1f} MiB a device" if group != "activations" else "")]
        if shown:
            table = [["name", "shape", "dtype", "logical", "physical", "MiB/device"], *map(cells, members)]
            widths = [max(len(line[i]) for line in table) for i in range(6)]
            lines += [" | ".join(c.ljust(w) for c, w in zip(line[:5], widths)) + " | " + line[5].rjust(widths[5]) for line in table]
    return "\n".join(lines) + "\n"

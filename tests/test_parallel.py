"""Mesh sizes and logical rules."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from mila_jax.errors import UserError
from mila_jax.parallel.logical import AXES, constrain, rules_of, spec, use_rules
from mila_jax.parallel.mesh import check_divides, make_mesh

ONE = dict.fromkeys(AXES, 1)


def test_minus_one_takes_the_rest():
    mesh = make_mesh(ONE | {"data": -1}, jax.devices()[:1])
    assert mesh.axis_names == AXES and mesh.size == 1


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"data": -1, "fsdp": -1}, {"data": 0}])
def test_sizes_that_do_not_fit_name_the_keys(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(ONE | sizes, jax.devices()[:1])


def test_rules_are_data():
    assert spec("batch", None, "frames", "heads") == P(("data", "fsdp"), None, "context", "tensor")
    with use_rules(heads=None, batch="data"):
        assert spec("batch", "heads") == P("data", None)
    assert spec("heads") == P("tensor")
    with pytest.raises(KeyError):
        spec("nonsense")


def test_constrain_without_a_mesh_does_nothing():
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", None) is x


@pytest.mark.parametrize(
    "mode, sizes, key",
    [
        ("context", dict(batch=3), "train.batch"), ("context", dict(frames=7), "window.frames"), ("context", dict(heads=3), "model.heads"),
        ("context", dict(tokens=7), "tokens of a view"), ("context", dict(width=9), "model.width"), ("heads", dict(heads=2), "model.heads"),
        ("kv_gather", dict(frames=7), "window.frames"), ("none", {}, "attention.parallel=none"),
    ],
)  # fmt: skip
def test_divisibility_names_the_key(mode, sizes, key):
    class Mesh:
        shape = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}

    def check(batch=4, frames=8, tokens=28, heads=4, width=16):
        check_divides(Mesh, batch, heads, width, frames, tokens)

    with use_rules(**rules_of(mode)):
        with pytest.raises(UserError, match=key):
            check(**sizes)
        if mode != "none":
            check()
    with use_rules(**rules_of("heads")):
        check(tokens=7)  # only the mode `context` splits places


@pytest.mark.parametrize(
    "mode, changes, key",
    [
        ("ring", {}, "attention.parallel"), ("none", {"mpl": None}, "mesh.rules.mpl"), ("none", {"mlp": "model"}, "mesh.rules.mlp"),
        ("none", {"mlp": ("fsdp", "tensro")}, "tensro"),
    ],
)  # fmt: skip
def test_rules_that_cannot_work_name_the_key(mode, changes, key):
    with pytest.raises(UserError, match=key):
        rules_of(mode, changes)


def test_one_mesh_axis_splits_one_axis_of_an_array():
    with use_rules(**rules_of("none", {"embed": "tensor"})), pytest.raises(UserError, match="tensor"):
        spec("embed", "mlp")

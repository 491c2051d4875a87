"""Mesh sizes and logical rules."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from mila_jax.errors import UserError
from mila_jax.parallel.logical import constrain, spec, use_rules
from mila_jax.parallel.mesh import AXES, check_divides, make_mesh

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


@pytest.mark.parametrize("key, sizes", [("train.batch", (3, 4, 8, 8, 28)), ("window.frames", (4, 4, 8, 7, 28)), ("model.heads", (4, 3, 8, 8, 28))])
def test_divisibility_names_the_key(key, sizes):
    class Mesh:
        shape = {"data": 2, "fsdp": 1, "context": 2, "tensor": 2}

    with pytest.raises(UserError, match=key):
        check_divides(Mesh, *sizes)
    check_divides(Mesh, 4, 4, 8, 8, 28)

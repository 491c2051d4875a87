"""What stays in float32 when the network computes in bfloat16, seen in the program before it is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mila_jax.model.stdit3_weights import abstract_model
from tests.test_model_dit import make_conditions
from tests.test_model_remat import CONFIG, inner_programs


def types(jaxpr, primitive: str) -> set:
    """Types of the results of a primitive, inner programs included."""
    found = {str(e.outvars[0].aval.dtype) for e in jaxpr.eqns if e.primitive.name == primitive}
    return found.union(*(types(inner, primitive) for e in jaxpr.eqns for inner in inner_programs(e)))


@pytest.fixture(scope="module")
def program():
    graphdef, params = abstract_model(dataclasses.replace(CONFIG, dtype="bfloat16", ray_rotary=True))

    def forward(params, conditions):
        return nnx.merge(graphdef, params)(jnp.ones((1, 6, 3, 4, 6, 2)), jnp.full((1, 6, 3), 400.0), conditions)

    return jax.make_jaxpr(forward)(params, jax.eval_shape(make_conditions)).jaxpr


@pytest.mark.parametrize("primitive", ["exp", "rsqrt", "sin", "cos"])  # softmax, norms, tables of positions, times and directions
def test_statistics_and_tables_are_float32(program, primitive):
    assert types(program, primitive) == {"float32"}


def test_the_stream_is_bfloat16(program):
    scans = [e for e in program.eqns if e.primitive.name == "scan"]
    carried = [v.aval for e in scans for v in e.outvars if v.aval.shape == (1, 3, 6, 6, 16)]
    assert len(carried) == 1 and carried[0].dtype == jnp.bfloat16
    assert program.outvars[0].aval.dtype == jnp.float32
    assert "bfloat16" in types(program, "dot_general")

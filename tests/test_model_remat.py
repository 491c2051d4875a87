"""Remat policies: each computes again what it is meant to, seen in the program before it is compiled."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mila_jax.model import cpu_gradients
from mila_jax.model.dit import DiTConfig
from mila_jax.errors import UserError
from mila_jax.model.remat import NAMES, parts
from mila_jax.model.stdit3_weights import abstract_model
from tests.test_model_dit import make_conditions

CONFIG = DiTConfig(
    width=16, depth=2, heads=2, in_channels=2, out_channels=2, text_width=6, text_length=3, pred_sigma=False, fourier_bands=2, unroll=1
)


def inner_programs(equation):
    """The programs in an equation's parameters (of scan, checkpoint, jit, …)."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def count(jaxpr) -> collections.Counter:
    """Primitives of a program, inner programs included; transfers to the host as "to_host"."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        found["to_host"] += equation.primitive.name == "device_put" and "host" in str(equation.params["devices"]).lower()
        for inner in inner_programs(equation):
            found += count(inner)
    return found


def gradient_program(name: str) -> collections.Counter:
    """What the gradient's program of a policy consists of."""
    graphdef, params = abstract_model(dataclasses.replace(CONFIG, remat=name))
    conditions = jax.eval_shape(make_conditions)

    def value(params, conditions):
        return jnp.sum(nnx.merge(graphdef, params)(jnp.ones((1, 6, 3, 4, 6, 2)), jnp.full((1, 6, 3), 400.0), conditions) ** 2)

    return count(jax.make_jaxpr(jax.grad(value))(params, conditions).jaxpr)


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:  # as on accelerators: on one CPU some gradients have forms of their own
        patch.setattr(cpu_gradients, "device_kind", lambda: "another device")
        return {name: gradient_program(name) for name in NAMES}


def test_less_kept_is_more_computed(found):
    products = {name: counted["dot_general"] for name, counted in found.items()}
    order = ["none", "dots+attention", "dots", "attention+mlp", "attention+results", "attention", "block"]
    assert all(products[more] < products[less] for more, less in zip(order, order[1:])), products
    assert products["full"] == products["block"] == products["offload"]
    assert products["block"] - products["none"] >= 2 * 8  # nearly every product of the two blocks of a pair


def test_parts_of_the_stack_have_their_own():
    assert parts("block", 5) == [("block", 5)]
    assert parts("dots:2:attention+mlp:1:block", 5) == [("dots", 2), ("attention+mlp", 1), ("block", 2)]
    wrong = {"dots:5:block": "none of model.depth=5", "dots:2": "PAIRS", "dots:x:block": "PAIRS", "dots:0:block": "PAIRS", "dots:1:x": "'x'"}
    for text, said in wrong.items():
        with pytest.raises(UserError, match=f"model.remat.*{said}"):
            parts(text, 5)


def test_a_part_keeps_what_its_name_says(found):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_gradients, "device_kind", lambda: "another device")
        mixed = gradient_program("none:1:block")
    # Two loops forward and two backward instead of one each, with the products of both.
    assert (mixed["scan"], found["none"]["scan"]) == (4, 2)
    assert found["block"]["dot_general"] < mixed["dot_general"] < found["none"]["dot_general"] + found["block"]["dot_general"]


def test_only_offload_moves_the_stream_to_the_host(found):
    assert {name for name, counted in found.items() if counted["to_host"]} == {"offload"}

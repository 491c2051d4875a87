"""Muon is optax's, and on a mesh no device works on a slice of a matrix."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mila_jax.train.muon import RMS, muon, stacked, unstacked
from mila_jax.train.optimizer import matrices
from tests.host_devices import host_devices


def tree(seed):
    """Arrays with the names and axes that a model's have: fused, wide and tall kernels, a table, a bias, a kernel outside the blocks."""
    r = np.random.default_rng(seed)
    shapes = {"pairs": {"qkv": (2, 8, 3, 2, 4), "fc1": (2, 8, 32), "fc2": (2, 32, 8), "table": (2, 6, 8), "fc1_bias": (2, 32)}, "final": (8, 5)}
    return jax.tree.map(lambda shape: jnp.asarray(r.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_muon_is_that_of_optax():
    rate = optax.linear_schedule(1e-2, 1e-3, 3)
    ours = muon(rate, matrices, eps=1e-8, weight_decay=0.1, adam_b2=0.99)
    theirs = optax.contrib.muon(
        rate, eps=1e-8, weight_decay=0.1, adam_b2=0.99, adam_weight_decay=0.1, consistent_rms=RMS, muon_weight_dimension_numbers=matrices
    )  # fmt: skip
    params = {"ours": tree(0), "theirs": tree(0)}
    state = {"ours": ours.init(params["ours"]), "theirs": theirs.init(params["theirs"])}
    update = {"ours": jax.jit(ours.update), "theirs": jax.jit(theirs.update)}
    for step in range(4):
        grads = tree(step + 1)
        grads["pairs"]["fc1"] = grads["pairs"]["fc1"].at[1].set(0.0)  # a matrix without a gradient
        for name in update:
            updates, state[name] = update[name](grads, state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params["ours"], tree(0))
    assert min(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params["ours"], params["theirs"])
    assert jax.tree.structure(state["ours"]) == jax.tree.structure(state["theirs"])  # checkpoints of one go on with the other
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state["ours"], state["theirs"])


def test_stack_and_back():
    x = tree(0)["pairs"]
    axes = matrices({"pairs": x})["pairs"]
    for name, shape in {"qkv": (6, 8, 8), "fc1": (2, 8, 32), "fc2": (2, 32, 8)}.items():
        stack = stacked(x[name], axes[name])
        assert stack.shape == shape
        np.testing.assert_array_equal(unstacked(stack, x[name], axes[name]), x[name])
    values = stacked(x["qkv"], axes["qkv"])[4]  # of the second pair the keys' kernel
    np.testing.assert_array_equal(values, x["qkv"][1, :, 1].reshape(8, 8))


@pytest.fixture(scope="module")
def told():
    """What `tests/muon_probe.py` found on eight host devices."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.muon_probe"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1], timeout=300,
        env=host_devices(8, optimized=True),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split("RESULT")[1])


@pytest.mark.parametrize("mesh", ("fsdp", "tensor"))
def test_meshes_give_the_same_directions(told, mesh):
    assert len(told[mesh]["apart"]) == 4 and max(told[mesh]["apart"].values()) < 2e-5


def test_each_device_has_whole_matrices(told):
    """Over fsdp, a stack of kernels changes sides once and its directions once; nothing is gathered or added up between devices."""
    found = told["fsdp"]["collectives"]
    assert found["all-to-all"] == 8 and found["all-gather"] == found["all-reduce"] == found["reduce-scatter"] == 0

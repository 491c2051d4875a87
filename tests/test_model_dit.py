"""The backbone: equal to the original code with one view, and what MiLA adds."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.model import stdit3_weights
from mila_jax.model.conditions import Conditions, drop_text, drop_waypoints
from mila_jax.model.dit import DiTConfig
from mila_jax.model.layers import ray_rotary_tables, rotate
from mila_jax.parity import __main__ as parity
from mila_jax.parity import stdit3

CONFIG = DiTConfig(width=16, depth=1, heads=2, in_channels=2, out_channels=2, text_width=6, text_length=3, pred_sigma=False, fourier_bands=2)


def make_conditions(b=1, v=6, t=3, seed=0, config=CONFIG):
    """Random conditions of the right shapes."""
    r = np.random.default_rng(seed)
    rotation = r.normal(size=(b, v, 1, 4))
    rotation /= np.linalg.norm(rotation, axis=-1, keepdims=True)
    extrinsics = np.concatenate([r.normal(size=(b, v, 1, 3)), rotation], -1) * np.ones((1, 1, t, 1))
    arrays = [
        r.normal(size=(b, config.text_length, config.text_width)), np.ones((b, config.text_length), bool), r.normal(size=(b, t, 3)),
        np.ones((b, v, t, 4)), extrinsics, np.arange(t) / 12 * np.ones((b, 1)), np.full((b,), 12.0), np.zeros(b, bool), np.zeros(b, bool),
    ]  # fmt: skip
    return Conditions(*(jnp.asarray(a, bool if a.dtype == bool else jnp.float32) for a in arrays))


def randomised(params, seed=1):
    """All parameters random, so that layers that start at zero take part."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


@pytest.mark.parametrize("name", ["stdit3_A", "stdit3_C", "stdit3_A_train"])
def test_equals_the_original_code(name, golden, request):
    npz = golden(name)
    results = stdit3.check(npz, request.path.parent / "data")
    assert len(results) == (4 if name.endswith("train") else 1)
    for output, error, tolerance in results:
        assert error <= tolerance, output


def test_parity_command_judges_by_exit_code(golden, tmp_path, capsys):
    npz = golden("stdit3_C")
    good, bad, unknown = tmp_path / "good.npz", tmp_path / "bad.npz", tmp_path / "unknown.npz"
    np.savez(good, **npz)
    npz["w/final_layer.linear.bias"] = npz["w/final_layer.linear.bias"] + 1e-3
    np.savez(bad, **npz)
    np.savez(unknown, x=np.zeros(2))
    assert parity.main([str(good)]) == 0
    assert parity.main([str(bad)]) == 1
    assert "ABOVE" in capsys.readouterr().out
    assert parity.main([str(unknown)]) == 2 and parity.main([str(tmp_path / "none.npz")]) == 2
    del npz["w/final_layer.linear.bias"]
    np.savez(bad, **npz)
    assert parity.main([str(bad)]) == 2
    assert "final_layer.linear.bias" in capsys.readouterr().err


def test_published_names_go_both_ways():
    graphdef, params = stdit3_weights.create(CONFIG)
    params = randomised(params)
    state = stdit3_weights.save(params, CONFIG)
    assert len(state) == 17 * 2 * CONFIG.depth + 20  # 21 with rope.freqs
    assert state["spatial_blocks.0.attn.qkv.weight"].shape == (48, 16)
    fresh = stdit3_weights.load(stdit3_weights.create(CONFIG, 5)[1], CONFIG, state)
    again = stdit3_weights.save(fresh, CONFIG)
    assert all(np.array_equal(state[k], again[k]) for k in state)
    state["bogus"] = np.zeros(1)
    with pytest.raises(UserError, match="bogus"):
        stdit3_weights.load(params, CONFIG, state)


def test_one_view_without_new_conditions_is_the_base_model():
    """New embeddings start at zero: the first step of a warm start equals the base model whatever cameras and waypoints are."""
    graphdef, params = stdit3_weights.create(CONFIG)
    base_config = dataclasses.replace(CONFIG, new_embeddings=False)
    base_def, base = stdit3_weights.create(base_config)
    base = stdit3_weights.load(base, base_config, stdit3_weights.save(params, CONFIG))
    x = jax.random.normal(jax.random.key(0), (1, 1, 3, 4, 6, 2))
    steps, conditions = jnp.full((1, 1, 3), 400.0), make_conditions(v=1)
    ours, plain = (jax.jit(lambda p, g=g: nnx.merge(g, p)(x, steps, conditions))(p) for g, p in ((graphdef, params), (base_def, base)))
    np.testing.assert_allclose(ours, plain, atol=1e-6)


@pytest.mark.parametrize("ray_rotary", [False, True])
def test_views_permute_with_their_cameras(ray_rotary):
    graphdef, params = stdit3_weights.create(dataclasses.replace(CONFIG, ray_rotary=ray_rotary))
    params = randomised(params)
    forward = jax.jit(lambda *a: nnx.merge(graphdef, params)(*a))
    x = jax.random.normal(jax.random.key(0), (1, 6, 3, 4, 6, 2))
    steps = 1000 * jax.random.uniform(jax.random.key(1), (1, 6, 3))
    c = make_conditions()
    order = np.array([3, 0, 5, 1, 4, 2])
    turned = c.replace(intrinsics=c.intrinsics[:, order], extrinsics=c.extrinsics[:, order])
    out = forward(x, steps, c)
    np.testing.assert_allclose(forward(x[:, order], steps[:, order], turned), out[:, order], atol=2e-5)
    assert float(jnp.abs(forward(x[:, order], steps[:, order], c) - out[:, order]).max()) > 1e-3  # cameras matter
    other = c.replace(extrinsics=c.extrinsics.at[..., 3:].multiply(-1.0))
    np.testing.assert_allclose(forward(x, steps, other), out, atol=2e-5)  # q and -q are one rotation


def test_views_see_each_other_within_a_frame_only_through_time():
    graphdef, params = stdit3_weights.create(CONFIG)
    forward = jax.jit(lambda x: nnx.merge(graphdef, randomised(params))(x, jnp.full((1, 6, 3), 400.0), make_conditions()))
    x = jax.random.normal(jax.random.key(0), (1, 6, 3, 4, 6, 2))
    change = jnp.abs(forward(x.at[0, 2, 1].add(1.0)) - forward(x)).max((0, 3, 4, 5))
    assert (change[:, 1] > 1e-5).all()  # every view of the changed frame
    assert (change[2] > 1e-5).all()  # every frame of the changed view


def test_attention_weights_depend_on_directions_relative_to_each_other():
    """Turning all cameras together about the vertical leaves the products of rotated queries and keys as they are."""
    r = np.random.default_rng(0)
    rays = jnp.asarray(r.normal(size=(5, 3)), jnp.float32)
    angle = 1.1
    turned = jnp.stack(
        [np.cos(angle) * rays[:, 0] - np.sin(angle) * rays[:, 1], np.sin(angle) * rays[:, 0] + np.cos(angle) * rays[:, 1], rays[:, 2]], -1
    )
    q, k = jnp.asarray(r.normal(size=(2, 5, 1, 12)), jnp.float32)

    def products(directions):
        tables = ray_rotary_tables(directions, 7, 12)
        return jnp.einsum("qke,ske->qs", rotate(q, tables), rotate(k, tables))

    np.testing.assert_allclose(products(turned), products(rays), atol=1e-4)
    raised = rays.at[:, 2].add(0.5)
    assert float(jnp.abs(products(raised) - products(rays)).max()) > 0.05
    assert float(jnp.abs(products(rays) - jnp.einsum("qke,ske->qs", q, k)).max()) > 0.1


def test_cosines_are_computed_once_for_all_blocks():
    """Compiled for one CPU, where a network of two pairs was found to compute those of every token again in every block."""

    def cosines(depth):
        config = dataclasses.replace(CONFIG, depth=depth, ray_rotary=True)
        graphdef, params = stdit3_weights.create(config)
        x, levels = jnp.zeros((1, 6, 3, 4, 6, 2)), jnp.zeros((1, 6, 3))
        network = jax.jit(lambda p: nnx.merge(graphdef, p)(x, levels, make_conditions()))
        text = network.lower(params).compile().as_text()
        return len(re.findall(r" (?:cosine|sine)\(", text))

    assert 0 < cosines(1) == cosines(2)


def test_null_conditions_are_learned_not_zero():
    graphdef, params = stdit3_weights.create(CONFIG)
    params = randomised(params)
    forward = jax.jit(lambda c: nnx.merge(graphdef, params)(jnp.ones((1, 6, 3, 4, 6, 2)), jnp.full((1, 6, 3), 400.0), c))
    c = make_conditions()
    still = c.replace(waypoints=jnp.zeros_like(c.waypoints))
    assert float(jnp.abs(forward(drop_waypoints(c)) - forward(still)).max()) > 1e-4
    assert float(jnp.abs(forward(drop_text(c)) - forward(c.replace(text=jnp.zeros_like(c.text)))).max()) > 1e-4
    np.testing.assert_array_equal(forward(drop_waypoints(c)), forward(drop_waypoints(still)))


@pytest.mark.parametrize("change, key", [({"heads": 3}, "model.heads"), ({"width": 18, "heads": 9}, "model"), ({"remat": "x"}, "model.remat")])
def test_sizes_that_cannot_work_name_their_key(change, key):
    with pytest.raises(UserError, match=key):
        stdit3_weights.create(dataclasses.replace(CONFIG, **change))


def test_remat_changes_nothing():
    graphdef, params = stdit3_weights.create(CONFIG)
    other, _ = stdit3_weights.create(dataclasses.replace(CONFIG, remat="block"))
    x, steps, c = jnp.ones((1, 6, 3, 4, 6, 2)), jnp.full((1, 6, 3), 400.0), make_conditions()

    def gradient(g):
        return jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(g, p)(x, steps, c) ** 2)))(randomised(params))

    plain, again = (jax.tree.leaves(gradient(g)) for g in (graphdef, other))
    largest = max(float(jnp.abs(x).max()) for x in plain)
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)

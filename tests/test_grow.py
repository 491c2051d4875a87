"""Weights that start a larger network: the same function at the first step, and every new parameter can learn."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.choose_model import SHIPPED
from mila_jax.errors import UserError
from mila_jax.model.grow import can_grow
from mila_jax.model.precondition import input_channels
from mila_jax.model.weights import load_model
from mila_jax.train.loop import _check_same_run
from mila_jax.train.trainer import Trainer
from tests.grown import by_name, grown, velocity
from tests.parallel_probe import CONFIG, make_clip

SMALL = dataclasses.replace(CONFIG, width=16, heads=2, depth=1, unroll=1)
LARGE = dataclasses.replace(SMALL, depth=2, in_channels=6)


def test_is_the_same_function_and_can_become_another():
    params, larger = grown(SMALL, LARGE)
    x = jnp.asarray(make_clip()["latents"], jnp.float32)
    more = jnp.concatenate([x, jax.random.normal(jax.random.key(0), x.shape[:-1] + (4,))], -1)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def squared(p):
        v = velocity(LARGE, p, more)
        return (v**2).sum(), v

    gradient, same = squared(larger)
    np.testing.assert_allclose(same, velocity(SMALL, params), atol=1e-5)
    gradient = by_name(gradient)
    new_rows = gradient["patch.kernel"][SMALL.in_channels * 4 :]
    assert new_rows.size and float(jnp.abs(new_rows).min(axis=1).max()) > 0
    for branch in ("spatial.attn.proj", "spatial.mlp.fc2", "temporal.attn.proj", "temporal.mlp.fc2"):
        assert (np.abs(np.asarray(gradient[f"pairs.{branch}.kernel"][1:])).max(axis=(1, 2)) > 0).all(), branch


def test_only_larger_networks_of_the_same_kind():
    assert can_grow(SMALL, LARGE) and can_grow(SMALL, SMALL)
    for other in (dict(width=32), dict(depth=0), dict(in_channels=1), dict(heads=4), dict(out_channels=3)):
        assert not can_grow(SMALL, dataclasses.replace(SMALL, **other)), other


@pytest.mark.parametrize(
    "small, large, grows",
    [
        ((6, False), (9, True), True), ((6, False), (6, True), True), ((0, False), (4, False), True), ((9, True), (9, True), True),
        ((6, False), (4, True), False), ((6, False), (5, True), False), ((4, True), (6, True), False), ((4, True), (6, False), False),
    ],
)  # fmt: skip
def test_corridors_and_evidence_are_only_added_and_in_this_order(small, large, grows):
    def sized(sweep, evidence):
        return dataclasses.replace(SMALL, in_channels=input_channels(8, sweep, evidence), out_channels=8, sweep=sweep, evidence=evidence)

    assert can_grow(sized(*small), sized(*large)) == grows


def test_more_corridors_and_evidence_change_nothing_at_first():
    small, large = (
        dataclasses.replace(SMALL, in_channels=input_channels(2, sweep, told), sweep=sweep, evidence=told) for sweep, told in ((6, False), (9, True))
    )
    params, larger = grown(small, large)
    np.testing.assert_allclose(velocity(large, larger), velocity(small, params), atol=1e-5)


def test_a_start_with_other_corridors_that_cannot_grow_is_refused_by_name(tmp_path):
    """The message names the settings, not a kernel's shape; with equal shapes nothing else would tell."""
    trainer = types.SimpleNamespace(
        config=types.SimpleNamespace(train=types.SimpleNamespace(init_from=str(SHIPPED)), seed=0),
        dit=dataclasses.replace(load_model(SHIPPED).dit, sweep=4), _check_start=lambda described: None,
    )  # fmt: skip
    with pytest.raises(UserError, match="model.sweep=9, model.evidence=True, model.mixture=.*, model.detail=64, which cannot go on with 4"):
        Trainer.initial_state(trainer)


def test_runs_from_before_a_setting_go_on_without_it(tmp_path):
    window = {"frames": 8, "inner_anchors": False}
    now = {"model": {"width": 16, "evidence": False}, "window": window, "data_description": {}, "seed": 0, "train": {"init_from": None}}
    before = now | {"model": {"width": 16}, "window": {"frames": 8}}
    (tmp_path / "config.json").write_text(json.dumps(before))
    _check_same_run(tmp_path, None, None, now)
    with pytest.raises(UserError, match="another model.evidence;"):
        _check_same_run(tmp_path, None, None, now | {"model": {"width": 16, "evidence": True}})
    with pytest.raises(UserError, match="another window.inner_anchors;"):
        _check_same_run(tmp_path, None, None, now | {"window": window | {"inner_anchors": True}})
    with pytest.raises(UserError, match="another model.width;"):
        _check_same_run(tmp_path, None, None, now | {"model": {"width": 8, "evidence": False}})
    (tmp_path / "config.json").write_text(json.dumps(before | {"data_description": {"temporal": "chunk17"}}))
    with pytest.raises(UserError, match="another data_description.temporal;"):
        _check_same_run(tmp_path, None, None, now)

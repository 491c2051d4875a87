"""The training stages as settings, the kinds of windows they train on, and starting from published weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from data_pipeline.clips import HALF_FRAME, ClipSpec, longest
from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.flow.plan import plan_rollout
from mila_jax.model import stdit3_weights
from mila_jax.model.dit import DiTConfig
from mila_jax.model.weights import model_config
from mila_jax.parallel.aot.sizes import data_description
from mila_jax.train.published import is_published, published_parameters
from mila_jax.train.stages import describe, resolve
from mila_jax.model.stdit3_weights import abstract_model
from mila_jax.train.tasks import clip_specs, task_name
from tests.test_model_dit import CONFIG as SMALL


def stage(number, preset="configs/xl.py"):
    return load_config(f"{preset}:stage{number}")


def test_stages_set_what_the_paper_says():
    one, two, three = (stage(n) for n in (1, 2, 3))
    assert [c.train.steps for c in (one, two, three)] == [2_000, 20_000, 8_000] and {c.train.warmup for c in (one, two, three)} == {1000}
    assert one.window.frames - one.window.conditioning == 12
    assert {(s.fps, s.conditioning_fps) for s in clip_specs(one)[0] if s.conditioning > 1} == {(12.0, 12), (2.0, 2.0), (1.0, 1.0)}
    assert {s.conditioning_fps for s in clip_specs(two)[0] if s.fps == 12.0} == {12}
    assert {s.conditioning for s in clip_specs(two)[0]} == {1, 4}
    assert (two.train.anchor_noisy, three.train.anchor_noisy) == (0.0, 0.75) and one.train.anchor_rate == 0
    assert load_config("configs/xl.py").train.trainable == ("*",)


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "xl", "xl128", "v6e"])
@pytest.mark.parametrize("number", ["", ":stage1", ":stage2", ":stage3"])
def test_what_a_preset_trains_on_can_be_had_and_used(preset, number):
    """Windows of every rate lie within a scene of nuScenes, and a minute is generated with the defaults, from coarse frames of a trained rate."""
    c = load_config(f"configs/{preset}.py{number}")
    specs, shares = clip_specs(c)
    times = [np.arange(round(19.3 * 12)) / 12]
    assert all(longest(times, spec, HALF_FRAME) >= spec.frames for spec in specs) and sum(shares) == pytest.approx(1)
    plan = plan_rollout(720, window=c.window.frames, conditioning=c.window.conditioning, anchor_stride=c.window.anchor_stride)
    assert plan.coarse.fps in c.train.fps and plan.anchors > 0


def test_stages_train_what_the_paper_says():
    c = stage(1)
    dit = model_config(c, data_description(c))
    _, params = abstract_model(dit)
    one, two = (resolve(params, stage(n).train.trainable, dit.depth) for n in (1, 2))
    parts = {".".join(map(str, p.path)): p for p in one.parts}
    assert "pairs.spatial.attn.qkv" in parts and parts["pairs.spatial.attn.qkv"].start is None
    assert (parts["pairs.temporal.mlp.fc1.kernel"].start, parts["pairs.temporal.mlp.fc1.kernel"].stop) == (27, 28)
    assert (
        "conditions.camera.fc1.kernel" in parts and "final.kernel" in parts and not any(name.startswith(("text", "time", "patch")) for name in parts)
    )
    frozen = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)} - {".".join(map(str, p.path)) for p in two.parts}
    assert frozen and {name.split(".")[0] for name in frozen} == {"time", "fps", "text"}
    table = describe(params, one)
    assert "pairs.temporal.cross" in table and "text" in table and "frozen" in table
    total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    assert f"{total:,}" in table.splitlines()[-1]


def test_an_unknown_stage_and_settings_over_a_stage():
    with pytest.raises(UserError, match="unknown stage 'stage4'"):
        load_config("configs/xl.py:stage4")
    assert load_config("configs/xl.py:stage1", ["--config.train.steps=5"]).train.steps == 5


FROM_TWO = ("--config.window.conditioning=2", "--config.train.four_frames=0.25")


def test_kinds_of_windows_of_the_default_are_those_that_generation_uses():
    specs, shares = clip_specs(load_config("configs/tiny.py"))
    assert specs == [ClipSpec(10, 4, 12.0), ClipSpec(10, 1, 12.0), ClipSpec(10, 4, 2.0), ClipSpec(10, 4, 2.0, 2.0)]
    np.testing.assert_allclose(shares, [0.32, 0.08, 0.3, 0.3])
    assert [task_name(s) for s in specs] == ["12Hz_from_4", "12Hz_from_1", "2Hz_from_4", "2Hz_from_4_at_2Hz"]


def test_windows_without_a_share_are_none():
    """They need not even fit into the scenes, and are not measured."""
    c = load_config("configs/tiny.py", ["--config.train.single_frame=1.0", "--config.train.fps=(12.0,2.0)", "--config.train.fps_weights=(1.0,0.0)"])
    specs, shares = clip_specs(c)
    assert [task_name(s) for s in specs] == ["12Hz_from_1"] and shares == [1.0]


def test_windows_from_four_frames_take_their_share_of_every_rate():
    c = load_config("configs/tiny.py", [*FROM_TWO, "--config.train.single_frame=0.1"])
    specs, shares = clip_specs(c)
    assert [task_name(s) for s in specs] == [
        "12Hz_from_2", "12Hz_from_4", "12Hz_from_1", "2Hz_from_2", "2Hz_from_4", "2Hz_from_2_at_2Hz", "2Hz_from_4_at_2Hz"
    ]  # fmt: skip
    np.testing.assert_allclose(shares, [0.26, 0.1, 0.04, 0.225, 0.075, 0.225, 0.075])


def test_windows_too_short_for_four_frames():
    with pytest.raises(UserError, match="train.four_frames=0.25 needs windows of more than 4 frames"):
        clip_specs(load_config("configs/tiny.py", [*FROM_TWO, "--config.window.frames=4"]))
    with pytest.raises(UserError, match="set it to 0 for window.frames=10, window.conditioning=4"):
        clip_specs(load_config("configs/tiny.py", ["--config.train.four_frames=0.25"]))


@pytest.mark.parametrize("key, value", [("conditioning_fps", "none"), ("single_frame", 1.5), ("fps", (12.0,)), ("four_frames", 0.95)])
def test_bad_kinds_of_windows(key, value):
    c = load_config("configs/tiny.py")
    c.train[key] = value
    with pytest.raises(UserError, match=f"train.{key}"):
        clip_specs(c)


def test_a_start_from_published_weights_computes_what_the_base_model_does(tmp_path):
    """The first step's output on one view, with the new embeddings there and whatever they are told."""
    base = dataclasses.replace(SMALL, new_embeddings=False)
    _, params = stdit3_weights.create(base, seed=3)
    r = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * r.standard_normal(x.shape).astype(np.float32), params)
    path = tmp_path / "published.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in stdit3_weights.save(params, base).items()}, path)
    assert is_published(path)
    started = published_parameters(path, SMALL, seed=7)
    clip = one_view()
    outputs = [run(config, p, clip) for config, p in ((base, params), (SMALL, started))]
    assert np.abs(outputs[0]).max() > 0.1
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-6)
    with pytest.raises(UserError, match=r"has misshapen|lacks spatial_blocks\.1") as error:
        published_parameters(path, dataclasses.replace(SMALL, depth=2), seed=0)
    assert "spatial_blocks.1.attn.qkv.weight" in str(error.value)


def one_view():
    from mila_jax.model.conditions import Conditions

    r = np.random.default_rng(1)
    rotation = np.tile(np.array([1.0, 0, 0, 0], np.float32), (1, 1, 4, 1))
    conditions = Conditions(
        jnp.asarray(r.normal(size=(1, 3, 6)), jnp.float32), jnp.ones((1, 3), bool), jnp.asarray(r.normal(size=(1, 4, 3)), jnp.float32),
        jnp.ones((1, 1, 4, 4)), jnp.concatenate([jnp.asarray(r.normal(size=(1, 1, 4, 3)), jnp.float32), rotation], -1),
        jnp.asarray(np.arange(4)[None] / 12, jnp.float32), jnp.full((1,), 12.0), jnp.zeros(1, bool), jnp.zeros(1, bool),
    )  # fmt: skip
    return jnp.asarray(r.normal(size=(1, 1, 4, 4, 8, 2)), jnp.float32), conditions


def run(config: DiTConfig, params, clip):
    graphdef, _ = stdit3_weights.create(config)
    x, conditions = clip
    return np.asarray(jax.jit(lambda p: nnx.merge(graphdef, p)(x, jnp.full((1, 1, 4), 500.0), conditions))(params))

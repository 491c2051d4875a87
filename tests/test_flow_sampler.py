"""The window sampler, guidance, masked editing and training masks on analytic velocities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow_oracles import QUICK, gaussian_velocity
from mila_jax.errors import UserError
from mila_jax.flow import masks
from mila_jax.flow.guidance import autoguided, guidance_weights, guided
from mila_jax.flow.rectified_flow import align
from mila_jax.flow.sampler import edit_rows, noise_like, sample_edit, sample_window
from mila_jax.flow.schedules import FAMILIES, window_schedule
from mila_jax.flow.timeshift import sampling_times

SHAPE = (2, 3, 5, 2, 2, 4)
GAUSSIAN = gaussian_velocity(0.7, 0.5)
CLEAN = np.array([True, False, False, False, False])


def _start(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE, np.float32))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _sample(velocity, x, schedule):
    return sample_window(velocity, x, schedule, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_gaussian_data_is_reached_and_error_falls_with_steps(family):
    velocity, x = GAUSSIAN, _start()
    exact = 0.7 + 0.5 * x  # the flow of a Gaussian is this map
    errors = []
    for steps in (10, 40, 160):
        schedule = window_schedule(steps, np.zeros(5, bool), family=family, alpha=0.5, shift=1.5)
        errors.append(float(jnp.abs(_sample(velocity, x, schedule) - exact).max()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.04  # first order


def test_clean_frames_pass_bit_for_bit_and_each_frame_sees_its_row():
    x = _start(1)
    schedule = np.asarray(window_schedule(6, CLEAN, alpha=0.8))

    def velocity(latents, levels, conditions):
        value = jnp.where(levels > 0, levels, jnp.nan)  # whatever a network says of clean frames
        return jnp.broadcast_to(align(value, latents), latents.shape)

    end = _sample(velocity, x, schedule)
    assert jnp.array_equal(end[:, :, 0], x[:, :, 0])
    moved = (schedule[:-1] * (schedule[:-1] - schedule[1:])).sum(axis=0)[1:]
    np.testing.assert_allclose(end[:, :, 1:] - x[:, :, 1:], np.broadcast_to(moved[:, None, None, None], (2, 3, 4, 2, 2, 4)), atol=1e-6)


def test_schedules_per_sample_and_dtypes():
    x, velocity = _start(2), GAUSSIAN
    rows = [window_schedule(5, CLEAN, alpha=alpha) for alpha in (0.0, 0.9)]
    together = _sample(velocity, x, jnp.stack(rows, axis=1))
    for sample, row in enumerate(rows):
        np.testing.assert_allclose(together[sample], _sample(velocity, x, row)[sample], atol=1e-6)
    half = _sample(lambda *a: velocity(*a).astype(jnp.bfloat16), x, rows[0])
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, _sample(velocity, x, rows[0]), atol=0.03)
    assert _sample(velocity, x.astype(jnp.bfloat16), rows[0]).dtype == jnp.bfloat16


def test_noise_depends_on_seed_and_sample_only():
    key = jax.random.key(7)
    assert jnp.array_equal(noise_like(key, SHAPE)[:1], noise_like(key, (1, *SHAPE[1:])))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(2))
    assert jnp.array_equal(noise_like(keys, SHAPE), noise_like(key, SHAPE))
    assert jnp.array_equal(noise_like(jax.random.PRNGKey(7), SHAPE), noise_like(key, SHAPE))
    noise = noise_like(key, SHAPE)
    assert not jnp.array_equal(noise[0], noise[1]) and not jnp.array_equal(noise, noise_like(jax.random.key(8), SHAPE))


def _condition_velocity(calls):
    def velocity(latents, levels, conditions):
        calls.append(latents.shape[0])
        return latents * align(levels, latents) + align(conditions["text"] * 2 + conditions["waypoints"] * 3, latents)

    return velocity


DROPS = [lambda c: c | {"text": jnp.zeros_like(c["text"])}, lambda c: c | {"waypoints": jnp.zeros_like(c["waypoints"])}]


def test_guidance_scales_each_condition_by_itself():
    x, conditions = _start(3), {"text": jnp.array([1.0, 2.0]), "waypoints": jnp.array([0.5, 0.25])}
    levels = jnp.full(SHAPE[:3], 0.5)
    for batched in (True, False):
        calls = []
        out = guided(_condition_velocity(calls), DROPS, [3.0, 2.0], batched=batched)(x, levels, conditions)
        expected = 0.5 * x + align(conditions["text"] * 2 * 3.0 + conditions["waypoints"] * 3 * 2.0, x)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        assert calls == ([6] if batched else [2, 2, 2])


@pytest.mark.parametrize("scales, evaluations", [([1, 1], 1), ([4, 4], 2), ([4, 1], 2), ([0, 0], 1), ([1, 4], 3)])
def test_guidance_evaluates_no_more_than_it_needs(scales, evaluations):
    x, conditions = _start(3), {"text": jnp.array([1.0, 2.0]), "waypoints": jnp.array([0.5, 0.25])}
    calls, levels = [], jnp.full(SHAPE[:3], 0.5)
    out = guided(_condition_velocity(calls), DROPS, scales, batched=False)(x, levels, conditions)
    assert len(calls) == evaluations
    expected = 0.5 * x + align(conditions["text"] * 2 * scales[0] + conditions["waypoints"] * 3 * scales[1], x)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_guidance_of_one_is_the_network_itself():
    velocity = _condition_velocity([])
    assert guided(velocity, DROPS, [1, 1.0]) is velocity and guided(velocity, [], []) is velocity
    assert sum(guidance_weights([7.0, 2.5])) == pytest.approx(1)
    with pytest.raises(UserError, match="one scale per condition"):
        guided(velocity, DROPS, [2.0])


def test_a_scale_of_one_leaves_the_guide_out():
    velocity, calls = _condition_velocity([]), []
    guide = _condition_velocity(calls)
    assert autoguided(velocity, guide, 1) is velocity
    x, conditions = _start(3), {"text": jnp.array([1.0, 2.0]), "waypoints": jnp.array([0.5, 0.25])}
    levels = jnp.full(SHAPE[:3], 0.5)
    np.testing.assert_allclose(autoguided(velocity, guide, 0)(x, levels, conditions), guide(x, levels, conditions), atol=1e-6)
    twice = autoguided(lambda *a: 3 * velocity(*a), guide, 2)(x, levels, conditions)
    np.testing.assert_allclose(twice, 5 * velocity(x, levels, conditions), rtol=1e-5, atol=1e-5)


def test_editing_all_or_nothing_is_plain_sampling():
    x, velocity, times = _start(4), GAUSSIAN, sampling_times(6)
    ratio = np.broadcast_to(1.0 - CLEAN, (2, 5))
    edited = jax.jit(lambda x, key: sample_edit(velocity, x, times, ratio, None, key), compiler_options=QUICK)(x, jax.random.key(0))
    np.testing.assert_allclose(edited, _sample(velocity, x, window_schedule(6, CLEAN, alpha=0.0)), atol=1e-6)
    assert jnp.array_equal(edited[:, :, 0], x[:, :, 0])


def test_partial_edits_join_at_their_time():
    times = sampling_times(10)
    levels, steps, active, fresh = edit_rows(times, np.array([[0.0, 0.35, 0.4, 1.0]]))
    assert np.asarray(active).sum(axis=(0, 1)).tolist() == [0, 3, 4, 10]
    assert np.argwhere(np.asarray(fresh)[:, 0]).tolist() == [[6, 2], [7, 1]]
    np.testing.assert_allclose(steps.sum(axis=(0, 1)), [0, 0.3, 0.4, 1], atol=1e-6)
    np.testing.assert_allclose(levels[:, 0, 2], [0] * 6 + [0.4, 0.3, 0.2, 0.1], atol=1e-6)
    x = _start(5)
    half, narrow = jnp.full((2, 5), 0.5), gaussian_velocity(0.0, 0.01)
    run = jax.jit(lambda x, key: sample_edit(narrow, x, times, half, None, key), compiler_options=QUICK)
    out = run(x, jax.random.key(1))
    assert jnp.array_equal(out, run(x, jax.random.key(1))) and not jnp.array_equal(out, run(x, jax.random.key(2)))
    assert float(out.std()) < 0.05  # noise and reference both flow to the data
    still = sample_edit(lambda *_: jnp.zeros(SHAPE), x, times, half, None, jnp.zeros((10, *SHAPE)))
    np.testing.assert_allclose(still, 0.5 * x, atol=1e-6)  # noised exactly once, at the level it joined at


def test_training_masks():
    conditioning = jnp.where(jnp.arange(4000) % 2 == 0, 1, 3)
    tail_rate = jnp.where(jnp.arange(4000) < 2000, 0.0, 1.0)
    clean, anchor = (np.asarray(part) for part in masks.training_masks(jax.random.key(0), conditioning, 6, tail_rate=tail_rate))
    assert (clean[::2, :1].all(), clean[1::2, :3].all()) == (True, True)
    assert not clean[::2, 1:5].any() and not clean[1::2, 3:5].any() and not anchor[:, :5].any()
    assert not clean[:2000, 5].any() and not anchor[:2000].any()
    assert (clean[2000:, 5] ^ anchor[2000:, 5]).all() and abs(anchor[2000:, 5].mean() - 0.75) < 0.03


def test_mask_strategies():
    assert masks.parse_mask_strategy("") == [] and masks.parse_mask_strategy("0") == [(0, 0, 0, 0, 1, 0.0)]
    assert masks.parse_mask_strategy("0;0,1,0,-1,1,0.4")[1] == (0, 1, 0, -1, 1, 0.4)
    z, reference = np.zeros((1, 2, 6, 1, 1, 1)), np.arange(1.0, 9).reshape(2, 4, 1, 1, 1)
    out, ratio = masks.apply_mask_strategy(z, [[reference]], ["0,0,-2,0,5;1,0,0,0,6"])
    assert out[0, :, :, 0, 0, 0].tolist() == [[3, 4, 0, 0, 0, 0], [7, 8, 0, 0, 0, 0]] and ratio.tolist() == [[0, 0, 1, 1, 1, 1]]
    assert not z.any() and masks.apply_mask_strategy(z, [], [])[1] is None
    for text, word in [("0,a", "0,a"), ("0,0,0,0,1,0,9", "expected"), ("0,3", "reference 3")]:
        with pytest.raises(UserError, match=word):
            masks.apply_mask_strategy(z, [[reference]], [text])

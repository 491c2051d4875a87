"""Long videos on analytic fields that put every frame where its number says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.flow.anchors import renoise
from mila_jax.flow.plan import STRATEGIES, plan_rollout
from mila_jax.flow.rectified_flow import align
from mila_jax.flow.rollout import (
    SamplerOptions, advance, after_window, collect, make_rows, make_tables, new_frames, pad_rows, rollout, start_state, start_window, unmerge,
    window_keys,
)  # fmt: skip
from mila_jax.flow.sampler import noise_like, sample_window
from tests.flow_oracles import QUICK

B, V, H, W, C = 2, 2, 1, 2, 3
OPTIONS = SamplerOptions(steps=3)
OFFSET = 100.0 * np.arange(B)[:, None, None, None, None, None] + 10.0 * np.arange(V)[:, None, None, None, None] + np.arange(C) / 8
SLOPE, WRONG = 0.5, 7.0


def _truth(numbers):
    """What the frames of these numbers look like, `[B, V, n, H, W, C]`."""
    return np.broadcast_to(OFFSET + SLOPE * np.asarray(numbers)[:, None, None, None], (B, V, len(numbers), H, W, C)).astype(np.float32)


def _conditions(windows, batch=B):
    """Frame numbers and rate of each window, batch behind the window axis; what a network gets as times and fps."""
    if windows is None:
        return None
    numbers = np.broadcast_to(windows.indices[:, None], (windows.count, batch, windows.indices.shape[1])).astype(np.float32)
    return {"number": numbers, "fps": np.full((windows.count, batch), windows.fps, np.float32)}


def continuing(latents, levels, conditions):
    """Takes every clean frame, goes on from it by the difference of frame numbers, averages: all must be at their place."""
    number = conditions["number"][:, None]
    clean = levels == 0
    guess = latents[:, :, None] + SLOPE * align(number[..., :, None] - number[..., None, :], latents[:, :, None])
    target = (guess * align(clean[:, :, None], guess)).sum(axis=3) / align(clean.sum(axis=2, keepdims=True), latents)
    return jnp.where(align(clean, latents), jnp.nan, (target - latents) / align(jnp.maximum(levels, 1e-6), latents))


def knowing(latents, levels, conditions):
    """Drives each frame to its truth by its number; coarse windows (fps below 12) are wrong by a constant."""
    wrong = jnp.where(conditions["fps"] < 12, WRONG, 0.0)
    target = OFFSET[: latents.shape[0]] + align(SLOPE * conditions["number"][:, None] + wrong[:, None, None], latents)
    return (target - latents) / align(jnp.maximum(levels, 1e-6), latents)


def _rows(plan, batch=B):
    return make_rows(plan, {stage: _conditions(windows, batch) for stage, windows in plan.stages.items()})


def _row(rows, number):
    return jax.tree.map(lambda leaf: leaf[number], rows)


def _run(velocity, plan, *, key=0, options=OPTIONS, first=None, batch=B, anchors=None):
    first = _truth(np.arange(1 - plan.given, 1))[:batch] if first is None else first
    coarse, refine, bootstrap = (_conditions(stage, batch) for stage in (plan.coarse, plan.refine, plan.bootstrap))

    def generate(first, key):
        return rollout(velocity, first, plan, coarse, refine, key, options, bootstrap_conditions=bootstrap, anchors=anchors)

    return jax.jit(generate, compiler_options=QUICK)(first, jax.random.key(key))


@pytest.mark.parametrize("strategies, frames, window, conditioning, given", [
    (STRATEGIES, 24, 8, 2, 2),  # a whole number of windows
    (STRATEGIES, 45, 8, 2, 2),  # coarse stage recurrent (8 anchors, 6 a window), last window cut
    (STRATEGIES[2:], 5, 8, 2, 2),  # less than one window
    (STRATEGIES, 20, 8, 2, 1),  # bootstrap
    (STRATEGIES[2:], 3, 8, 2, 1),  # bootstrap is enough
    (STRATEGIES[1:2], 7, 8, 2, 1),  # and just enough
    (STRATEGIES[2:], 8, 8, 2, 1),  # and just not
    (STRATEGIES[2:], 13, 8, 1, 1),
    (STRATEGIES[1:], 11, 6, 4, 4),  # more conditioning than new frames: coarse windows see given frames and anchors
    (STRATEGIES[2:], 14, 6, 4, 2),
    (STRATEGIES[:1], 9, 5, 2, 6),  # more first frames than needed
])  # fmt: skip
def test_every_frame_is_at_its_place(strategies, frames, window, conditioning, given):
    for strategy in strategies:
        plan = plan_rollout(frames, window=window, conditioning=conditioning, strategy=strategy, given=given)
        video = _run(continuing, plan)
        assert video.latents.shape == (B, V, frames, H, W, C)
        np.testing.assert_allclose(video.latents, _truth(np.arange(1, frames + 1)), atol=2e-3)
        if plan.coarse is None:
            assert video.anchors is None and video.corrected is None
            continue
        numbers = plan.refine.indices[:, -1]
        assert video.anchors.shape[2] == plan.anchors == len(numbers)
        for anchors in (video.anchors, video.corrected):
            np.testing.assert_allclose(anchors, _truth(numbers), atol=2e-3)


def test_wrong_anchors_are_corrected_or_kept():
    sizes = {"window": 8, "conditioning": 2, "given": 2}
    numbers = 6 * np.arange(1, 8)
    refined = _run(knowing, plan_rollout(40, strategy="coarse_to_refine", **sizes))
    np.testing.assert_allclose(refined.anchors, _truth(numbers) + WRONG, atol=1e-3)
    np.testing.assert_allclose(refined.corrected, _truth(numbers), atol=1e-3)
    np.testing.assert_allclose(refined.latents, _truth(np.arange(1, 41)), atol=1e-3)
    kept = _run(knowing, plan_rollout(40, strategy="divide_and_conquer", **sizes))
    assert jnp.array_equal(kept.corrected, kept.anchors) and jnp.array_equal(kept.latents[:, :, 5::6], kept.anchors[:, :, :6])
    wrong = WRONG * (np.arange(1, 41) % 6 == 0)[:, None, None, None]
    np.testing.assert_allclose(kept.latents, _truth(np.arange(1, 41)) + wrong, atol=1e-3)
    plain = _run(knowing, plan_rollout(40, strategy="recurrent", **sizes))
    np.testing.assert_allclose(plain.latents, _truth(np.arange(1, 41)), atol=1e-3)


def test_a_corrected_anchor_conditions_the_next_window():
    """With a field that copies the last conditioning frame to noise frames but does not move the tail, each window shows its anchor."""

    def copying(latents, levels, conditions):
        reference = latents[:, :, 1:2]
        toward = (reference - latents) / align(jnp.maximum(levels, 1e-6), latents)
        return toward.at[:, :, -1].set(0.0)

    plan = plan_rollout(18, window=8, conditioning=2)
    video = _run(copying, plan).latents
    for window in (1, 2):
        anchor = video[:, :, 6 * window - 1 : 6 * window]
        np.testing.assert_allclose(video[:, :, 6 * window : 6 * window + 5], np.repeat(anchor, 5, axis=2), atol=1e-5)
        assert not jnp.allclose(video[:, :, 6 * window + 5], anchor[:, :, 0], atol=0.1)


def test_anchors_enter_re_noised():
    plan, key = plan_rollout(18, window=8, conditioning=2), jax.random.key(0)
    video = _run(lambda latents, *_: jnp.zeros_like(latents), plan)  # what goes in comes out
    for number in range(3):
        noise = noise_like(window_keys(key, B, "refine", number), (B, V, 8, H, W, C))[:, :, 2:]
        expected, level = renoise(video.anchors[:, :, number], OPTIONS.sigma_a, OPTIONS.a, noise[:, :, -1])
        assert float(level) == np.float32(OPTIONS.sigma_a)
        np.testing.assert_allclose(video.corrected[:, :, number], expected, atol=1e-6)
        np.testing.assert_allclose(video.latents[:, :, 6 * number : 6 * number + 5], noise[:, :, :5], atol=1e-6)
    values = np.concatenate([video.latents.ravel(), video.anchors.ravel()])
    assert len(np.unique(values)) == values.size  # no noise is used twice, not in another stage either


def test_plain_cases_are_exactly_plain():
    """σ_a = 1 and a = 0 is the recurrent strategy; one window with α = 0 is the plain sampler."""
    options = SamplerOptions(steps=3, alpha=0.0, a=0.0, sigma_a=1.0)
    sizes = {"window": 8, "conditioning": 2}
    anchored = _run(continuing, plan_rollout(20, **sizes), options=options)
    recurrent = _run(continuing, plan_rollout(20, strategy="recurrent", **sizes), options=options)
    assert jnp.array_equal(anchored.latents, recurrent.latents)
    inner = _run(continuing, plan_rollout(20, anchor_stride=3, inner_anchors=True, **sizes), options=options)
    assert jnp.array_equal(inner.latents, recurrent.latents)
    plan = plan_rollout(6, strategy="recurrent", **sizes)
    noise = noise_like(window_keys(jax.random.key(0), B, "refine", 0), (B, V, 8, H, W, C))[:, :, 2:]
    x = jnp.concatenate([_truth([-1, 0]), noise], axis=2)
    rows = np.linspace(1, 0, 4)[:, None] * (np.arange(8) >= 2)
    conditions = jax.tree.map(lambda leaf: leaf[0], _conditions(plan.refine))
    plain = jax.jit(lambda x: sample_window(continuing, x, rows, conditions), compiler_options=QUICK)(x)
    np.testing.assert_allclose(_run(continuing, plan, options=options).latents, plain[:, :, 2:], atol=1e-6)


def _restless(latents, levels, conditions):
    """Keeps a trace of the noise, so that different noise shows."""
    return 0.3 * latents + 0.1 * latents.mean(axis=2, keepdims=True) + align(levels, latents) * 0.2


def test_same_seed_same_video_for_any_batch():
    plan = plan_rollout(20, window=8, conditioning=2)
    video = _run(_restless, plan, key=3)
    assert jnp.array_equal(video.latents, _run(_restless, plan, key=3).latents)
    assert not jnp.allclose(video.latents, _run(_restless, plan, key=4).latents, atol=1e-3)
    np.testing.assert_allclose(_run(_restless, plan, key=3, batch=1).latents, video.latents[:1], atol=1e-6)


@pytest.mark.parametrize("strategy, given, stride", [
    ("coarse_to_refine", 2, 6), ("coarse_to_refine", 1, 12), ("coarse_to_refine", 2, 3), ("divide_and_conquer", 2, 6), ("recurrent", 1, 6),
])  # fmt: skip
def test_streaming_resuming_and_one_call_give_the_same_bits(strategy, given, stride):
    """Window by window with a donated state, several at a time, and from windows kept by an interrupted run."""
    plan = plan_rollout(40, window=8, conditioning=2, given=given, strategy=strategy, anchor_stride=stride, inner_anchors=True)
    rows, tables, key = _rows(plan), make_tables(plan, OPTIONS), jax.random.key(5)
    step = jax.jit(lambda *arguments: advance(_restless, *arguments), donate_argnums=0, compiler_options=QUICK)
    first = _truth(np.arange(1 - given, 1))
    whole = unmerge(np.asarray(step(start_state(first, plan), pad_rows(rows, 32), tables, key, plan.windows)[1]), (H, W, C))
    assert not whole[plan.windows :].any()
    for size in (1, 3):
        state, parts = start_state(first, plan), []
        for begin in range(0, plan.windows, size):
            count = min(size, plan.windows - begin)
            state, windows = step(state, pad_rows(jax.tree.map(lambda leaf: leaf[begin : begin + count], rows), size), tables, key, count)
            parts.append(unmerge(np.asarray(windows)[:count], (H, W, C)))
        assert np.array_equal(np.concatenate(parts), whole[: plan.windows])
    state = start_state(first, plan)
    for number in range(5):
        state = after_window(state, _row(rows, number), whole[number])
    for number in range(5, plan.windows):
        state, window = step(state, jax.tree.map(lambda leaf: leaf[number : number + 1], rows), tables, key, 1)
        assert np.array_equal(unmerge(window, (H, W, C))[0], whole[number])
    video = collect(plan, whole[: plan.windows])
    streamed = np.concatenate([new_frames(plan, kind, window) for kind, window in zip(rows.kind, whole)], axis=2)
    assert np.array_equal(streamed[:, :, :40], video.latents)
    np.testing.assert_allclose(_run(_restless, plan, key=5, first=first).latents, video.latents, atol=1e-5)


def test_one_program_whatever_the_length_strategy_and_noise():
    calls = []

    def counting(latents, levels, conditions):
        calls.append(latents.shape)
        return _restless(latents, levels, conditions)

    step = jax.jit(lambda *arguments: advance(counting, *arguments), donate_argnums=0, compiler_options=QUICK)
    traced = None
    for frames, strategy, options in [
        (12, "coarse_to_refine", OPTIONS),
        (720, "recurrent", OPTIONS),
        (90, "divide_and_conquer", SamplerOptions(3, alpha=0.0, shift=2.0)),
    ]:
        plan = plan_rollout(frames, window=8, conditioning=2, given=1, strategy=strategy)
        step(start_state(_truth([0]), plan), jax.tree.map(lambda leaf: leaf[:1], _rows(plan)), make_tables(plan, options), jax.random.key(0), 1)
        traced = traced or len(calls)
    assert len(calls) == traced and set(calls) == {(B, V, 8, H, W, C)}


def test_memory_of_the_program_does_not_grow_with_length():
    """All windows in one call: what grows is the latents that come out and the conditions that go in."""
    shape = (1, 2, 2, 8, 14, 8)

    def sizes(frames):
        plan = plan_rollout(frames, window=8, conditioning=2)
        rows, tables = _rows(plan, 1), make_tables(plan, OPTIONS)
        step = jax.jit(lambda *arguments: advance(_restless, *arguments), donate_argnums=0, compiler_options=QUICK)
        lowered = step.lower(start_state(jnp.zeros(shape), plan), rows, tables, jax.random.key(0), plan.windows)
        return len(lowered.as_text()), lowered.compile().memory_analysis()

    (short_text, short), (long_text, long) = sizes(120), sizes(720)
    assert abs(long.temp_size_in_bytes - short.temp_size_in_bytes) <= 0.02 * short.temp_size_in_bytes
    assert abs(long_text - short_text) < 0.02 * short_text  # nothing is unrolled
    state = 4 * np.prod(shape) * 2 + 4 * 128 * np.prod(shape) // 2
    assert short.alias_size_in_bytes >= state and long.alias_size_in_bytes == short.alias_size_in_bytes  # the state is donated
    assert long.output_size_in_bytes - short.output_size_in_bytes == (140 - 24) * 4 * np.prod(shape) * 4


def test_given_anchors_take_the_place_of_the_coarse_stage():
    plan = plan_rollout(18, window=8, conditioning=2)
    truth = _truth([6, 12, 18])
    video = _run(knowing, plan, anchors=truth)
    assert np.array_equal(video.anchors, truth)
    np.testing.assert_allclose(video.latents, _truth(np.arange(1, 19)), atol=1e-3)
    own = _run(_restless, plan)
    assert jnp.array_equal(own.latents, _run(_restless, plan, anchors=np.asarray(own.anchors)).latents)
    with pytest.raises(UserError, match="3 anchors"):
        _run(knowing, plan, anchors=truth[:, :, :2])


def test_sparse_anchors():
    """Anchors every two windows: windows between them go on plainly."""
    plan = plan_rollout(40, window=8, conditioning=2, anchor_stride=12)
    assert plan.refine.anchored.tolist() == [False, True] * 3 + [False] and plan.anchors == 3
    assert plan.coarse.indices.tolist() == [[-1, 0, 12, 24, 36, 48, 60, 72]] and plan.coarse.fps == 1
    assert plan.refine.clean_mask.sum(axis=1).tolist() == [2] * 7 and plan.refine.indices[plan.refine.anchored, -1].tolist() == [12, 24, 36]
    video = _run(knowing, plan)
    np.testing.assert_allclose(video.anchors, _truth([12, 24, 36]) + WRONG, atol=1e-3)
    np.testing.assert_allclose(video.latents, _truth(np.arange(1, 41)), atol=1e-3)
    assert plan_rollout(10, window=8, conditioning=2, anchor_stride=18).coarse is None  # ends before the first anchor


def test_coarse_frames_closer_than_windows_end():
    """Long windows end in every so-many-th coarse frame; those between are given to nothing but the coarse stage."""
    plan = plan_rollout(40, window=14, conditioning=2, anchor_stride=6)
    assert plan.coarse.indices.tolist() == [[-1, 0, *range(6, 73, 6)]] and plan.coarse.fps == 2
    assert plan.refine.anchored.all() and plan.anchor_frames.tolist() == [12, 24, 36, 48] and plan.refine.slots.tolist() == [1, 3, 5, 7]
    video = _run(knowing, plan)
    np.testing.assert_allclose(video.anchors, _truth([12, 24, 36, 48]) + WRONG, atol=1e-3)
    np.testing.assert_allclose(video.corrected, _truth([12, 24, 36, 48]), atol=1e-3)
    np.testing.assert_allclose(video.latents, _truth(np.arange(1, 41)), atol=1e-3)
    own = _run(_restless, plan)
    assert jnp.array_equal(own.latents, _run(_restless, plan, anchors=np.asarray(own.anchors)).latents)  # given anchors have none between
    late = plan_rollout(40, window=14, conditioning=2, anchor_stride=6, given=1)
    assert late.coarse.indices[0, :4].tolist() == [12, 13, 19, 25] and late.anchor_frames.tolist() == [25, 37, 49]
    many = plan_rollout(720, window=28, conditioning=4, anchor_stride=6)  # a minute of the published size: 120 coarse frames, 30 anchors
    assert (many.anchors, many.coarse.count, many.refine.count) == (30, 5, 30)


def test_inner_anchors():
    """All coarse frames of a window are anchors: each starts from its own, and is corrected or kept."""
    sizes = dict(window=14, conditioning=2, anchor_stride=4, inner_anchors=True)
    plan, key = plan_rollout(40, **sizes), jax.random.key(0)
    assert plan.refine.places == (5, 9, 13) and plan.anchor_frames.tolist() == list(range(4, 49, 4)) and plan.anchors == 12
    assert plan.refine.slots.tolist() == [2, 5, 8, 11] and plan.anchor_slots.tolist() == list(range(12))
    video = _run(knowing, plan)
    np.testing.assert_allclose(video.anchors, _truth(plan.anchor_frames) + WRONG, atol=1e-3)
    np.testing.assert_allclose(video.corrected, _truth(plan.anchor_frames), atol=1e-3)
    np.testing.assert_allclose(video.latents, _truth(np.arange(1, 41)), atol=1e-3)
    untouched = _run(lambda latents, *_: jnp.zeros_like(latents), plan)  # what goes in comes out
    for window in range(3):
        noise = noise_like(window_keys(key, B, "refine", window), (B, V, 14, H, W, C))
        for number, place in enumerate(plan.refine.places):
            expected, _ = renoise(untouched.anchors[:, :, 3 * window + number], OPTIONS.sigma_a, OPTIONS.a, noise[:, :, place])
            np.testing.assert_allclose(untouched.latents[:, :, 12 * window + place - 2], expected, atol=1e-6)
    own = _run(_restless, plan)
    assert jnp.array_equal(own.latents, _run(_restless, plan, anchors=np.asarray(own.anchors)).latents)
    with pytest.raises(UserError, match="12 anchors"):
        _run(knowing, plan, anchors=own.anchors[:, :, ::3])
    kept = plan_rollout(40, strategy="divide_and_conquer", **sizes)
    assert np.flatnonzero(kept.refine.clean).tolist() == [0, 1, 5, 9, 13]
    video = _run(_restless, kept)
    assert jnp.array_equal(video.latents[:, :, 3::4], video.anchors[:, :, :10]) and jnp.array_equal(video.corrected, video.anchors)
    with pytest.raises(UserError, match="nothing is left to generate"):
        plan_rollout(40, window=14, conditioning=2, anchor_stride=1, inner_anchors=True, strategy="divide_and_conquer")
    # Where each window has one coarse frame or fewer, nothing lies between.
    for stride in (12, 24):
        assert plan_rollout(40, window=14, conditioning=2, anchor_stride=stride, inner_anchors=True).refine.inner == ()


def test_windows_longer_than_there_are_slots():
    plan = plan_rollout(140, window=140, conditioning=2, strategy="recurrent")
    np.testing.assert_allclose(_run(knowing, plan).latents, _truth(np.arange(1, 141)), atol=1e-3)


def test_plan_of_the_embedded_model():
    plan = plan_rollout(40, window=8, conditioning=2, anchor_stride=6)
    assert plan.coarse.indices.tolist() == [[-1, 0, 6, 12, 18, 24, 30, 36], [30, 36, 42, 48, 54, 60, 66, 72]]
    assert plan.refine.indices[:2].tolist() == [[-1, 0, 1, 2, 3, 4, 5, 6], [5, 6, 7, 8, 9, 10, 11, 12]]
    assert (plan.refine.count, plan.anchors, plan.coarse.fps, plan.refine.fps, plan.horizon) == (7, 7, 2.0, 12.0, 6.0)
    assert plan.coarse.reference.tolist() == [0, 36] and plan.refine.reference.tolist() == [0, 6, 12, 18, 24, 30, 36]
    np.testing.assert_allclose(plan.coarse.frame_times[0], [-1 / 12, 0, 0.5, 1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(plan.coarse.frame_times[1], [-0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(plan.refine.times[1], np.arange(5, 13) / 12)
    assert plan.windows == 9 and plan.refine.clean_mask.shape == (7, 8) and plan.refine.clean.tolist() == [True] * 2 + [False] * 6
    assert (plan.refine.anchor, plan.refine.kept_anchor) == (7, None) and list(plan.stages) == ["coarse", "refine"]
    kept = plan_rollout(40, window=8, conditioning=2, strategy="divide_and_conquer").refine
    assert (kept.anchor, kept.kept_anchor) == (None, 7) and kept.clean.tolist() == [True] * 2 + [False] * 5 + [True]
    short = plan_rollout(20, window=8, conditioning=2, given=1)
    assert short.bootstrap.indices.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] and short.bootstrap.conditioning == 1
    assert short.coarse.indices[0].tolist() == [6, 7, 13, 19, 25, 31, 37, 43] and short.refine.reference.tolist() == [7, 13, 19]
    assert plan_rollout(720, window=16, conditioning=4).refine.count == 60  # a minute


@pytest.mark.parametrize("bad, word", [
    ({"strategy": "magic"}, "coarse_to_refine"),
    ({"anchor_stride": 9}, "set generate.anchor_stride=6"),
    ({"anchor_stride": 4}, "multiple or a divisor"),
    ({"anchor_stride": 0}, "anchor_stride"),
    ({"conditioning": 8}, "window"),
    ({"conditioning": 0}, "conditioning"),
    ({"frames": 0}, "frames"),
    ({"given": 0}, "first frame"),
    ({"fps": 0}, "fps"),
    ({"conditioning": 7, "strategy": "divide_and_conquer"}, "anchor_stride"),
])  # fmt: skip
def test_plans_that_cannot_work_name_the_key(bad, word):
    arguments = {"frames": 20, "window": 8, "conditioning": 2} | bad
    with pytest.raises(UserError, match=word):
        plan_rollout(arguments.pop("frames"), **arguments)


def test_options_and_inputs_are_checked():
    with pytest.raises(UserError, match="sigma_a"):
        SamplerOptions(a=0.5, sigma_a=0.3)
    plan_rollout(20, window=8, conditioning=2, anchor_stride=3, strategy="recurrent")  # no anchors, no stride to fit
    plan = plan_rollout(20, window=8, conditioning=2)
    with pytest.raises(UserError, match="2 first frames"):
        _run(knowing, plan, first=_truth([0]))
    with pytest.raises(UserError, match="refine conditions"):
        rollout(knowing, _truth([-1, 0]), plan, _conditions(plan.coarse), _conditions(plan.coarse), jax.random.key(0))


def test_temperature_scales_what_frames_start_from_but_not_the_noise_of_anchors():
    plan = plan_rollout(6, window=8, conditioning=2, given=2)
    state, row = start_state(_truth([-1, 0]), plan, _truth([6])), _row(_rows(plan), 1)
    keys = window_keys(jax.random.key(0), B, "refine", 0)
    full, half = (start_window(state, row, make_tables(plan, SamplerOptions(steps=3, temperature=t)), keys) for t in (1.0, 0.5))
    assert jnp.array_equal(full[:, :, :2], half[:, :, :2]) and jnp.array_equal(full[:, :, -1], half[:, :, -1])
    assert jnp.array_equal(full[:, :, :2], state.context)
    np.testing.assert_allclose(half[:, :, 2:-1], 0.5 * full[:, :, 2:-1], rtol=1e-6)
    for wrong in (-0.1, 1.5):
        with pytest.raises(UserError, match="generate.temperature"):
            SamplerOptions(temperature=wrong)


def test_context_is_noised_told_so_and_not_what_is_kept():
    """With a level for context, windows start from noised frames at that level in all steps; the next context is clean frames again."""
    plan = plan_rollout(12, fps=12, window=8, conditioning=2, anchor_stride=6, strategy="recurrent", given=2)
    level = 0.1
    plain, noised = (make_tables(plan, SamplerOptions(steps=3, context_level=part)) for part in (0.0, level))
    row = 2  # refine
    np.testing.assert_allclose(noised.levels[row][:, :2], level)
    np.testing.assert_array_equal(noised.levels[row][:, 2:], plain.levels[row][:, 2:])
    rows, key = _rows(plan), jax.random.key(0)
    state = start_state(_truth([-1, 0]), plan)
    start = start_window(state, _row(rows, 0), noised, window_keys(key, B, "refine", 0))
    noise = noise_like(window_keys(key, B, "refine", 0), start.shape)
    np.testing.assert_allclose(start[:, :, :2], (1 - level) * _truth([-1, 0]) + level * noise[:, :, :2], rtol=1e-5)
    seen = []

    def told(latents, levels, conditions):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), levels[0, 0])
        return knowing(latents, levels, conditions)

    conditions = {stage: _conditions(windows) for stage, windows in plan.stages.items()}
    video = rollout(told, _truth([-1, 0]), plan, None, conditions["refine"], key, SamplerOptions(steps=3, context_level=level)).latents
    np.testing.assert_allclose(video, _truth(range(1, 13)), atol=1e-3)
    assert len(seen) >= 6 and all((x[:2] == np.float32(level)).all() for x in seen)


def test_a_context_level_needs_room_for_a_clean_context():
    plan = plan_rollout(6, fps=12, window=5, conditioning=3, anchor_stride=2, strategy="recurrent", given=3)
    with pytest.raises(UserError, match="context_level"):
        make_tables(plan, SamplerOptions(context_level=0.1))
    with pytest.raises(UserError, match="context_level"):
        SamplerOptions(context_level=1.0)

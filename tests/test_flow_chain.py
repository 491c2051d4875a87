"""The law of whole videos: windows chained by the shipped rollout, on processes whose law is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.flow.plan import plan_rollout
from mila_jax.flow.rollout import SamplerOptions, rollout
from tests.flow_oracles import QUICK, ar1, linear_velocity

GRID = (16, 16, 16)  # independent copies of the process


def _chain(strategy, alpha, first, anchors, seed=0):
    """Frames 1 … 8 `[b, 8, copies]` of windows of 1 + 4 frames of an AR(1) process; every sample draws the same noise."""
    batch = len(first)
    plan = plan_rollout(8, window=5, conditioning=1, strategy=strategy)
    covariance = jnp.asarray(ar1(5, 0.9), jnp.float32)

    def generate(first, anchors):
        keys = jnp.stack([jax.random.key(seed)] * batch)
        nothing = {stage: np.zeros((windows.count, batch), np.float32) for stage, windows in plan.stages.items()}
        options = SamplerOptions(steps=200, alpha=alpha, a=0.0, sigma_a=0.4)
        return rollout(linear_velocity(covariance), first, plan, nothing.get("coarse"), nothing["refine"], keys, options, anchors=anchors).latents

    video = jax.jit(generate, compiler_options=QUICK)(first, anchors)
    return np.asarray(video, np.float64)[:, 0].reshape(batch, 8, -1)


def _given(values):
    """values [b, n] → latents [b, 1, n, h, w, c], the same in all copies."""
    values = np.asarray(values, np.float32)
    return np.broadcast_to(values[:, None, :, None, None, None], (len(values), 1, values.shape[1], *GRID)).copy()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_refining_between_anchors_gives_their_conditional_law(alpha):
    known, unknown = [0, 4, 8], [1, 2, 3, 5, 6, 7]
    covariance = ar1(9, 0.9)
    regression = covariance[np.ix_(unknown, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
    law = covariance[np.ix_(unknown, unknown)] - regression @ covariance[np.ix_(known, unknown)]
    units = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    video = _chain("divide_and_conquer", alpha, _given(units[:, :1]), _given(units[:, 1:]))
    assert np.array_equal(video[:, [3, 7]], _given(units[:, 1:])[:, 0].reshape(4, 2, -1))
    places = [frame - 1 for frame in unknown]
    response = (video[1:] - video[0])[:, places]
    np.testing.assert_allclose(response.std(axis=-1), 0, atol=1e-4)  # the sampler is linear here
    np.testing.assert_allclose(response.mean(axis=-1).T, regression, atol=0.02)
    assert np.linalg.norm(np.cov(video[0, places]) - law) < 0.06 * np.linalg.norm(law)


def test_windows_without_anchors_give_the_law_of_continuation():
    covariance = ar1(9, 0.9)
    regression = covariance[1:, :1]
    video = _chain("recurrent", 0.5, _given([[0.0], [1.0]]), None)
    np.testing.assert_allclose((video[1] - video[0]).mean(axis=-1), regression[:, 0], atol=0.02)
    law = covariance[1:, 1:] - regression @ regression.T
    assert np.linalg.norm(np.cov(video[0]) - law) < 0.06 * np.linalg.norm(law)


def _corrected(a, wrong, sigma_a=0.4, frames=9):
    """Relative error of the joint law of frames 1 … 8 given frame 0, in a video of one window of an AR(1) process. The anchor at its end is wrong
    by `wrong` (eq. 8), and taken to be wrong by `a`."""
    plan = plan_rollout(frames - 1, window=frames, conditioning=1)
    covariance, grid = ar1(frames), (64, 64, 16)
    nothing = np.zeros((1, 2), np.float32)

    def generate(anchors):
        keys = jnp.stack([jax.random.key(1)] * 2)
        options = SamplerOptions(steps=200, alpha=0.5, a=a, sigma_a=sigma_a)
        first = jnp.zeros((2, 1, 1, *grid))
        return rollout(linear_velocity(jnp.asarray(covariance, jnp.float32)), first, plan, None, nothing, keys, options, anchors=anchors).latents

    anchors = jnp.arange(2.0)[:, None, None, None, None, None] * jnp.ones((1, 1, *grid))  # the same noise for an anchor of 0 and of 1
    video = np.asarray(jax.jit(generate, compiler_options=QUICK)(anchors), np.float64).reshape(2, frames - 1, -1)
    response = (video[1] - video[0]).mean(axis=-1)
    truth = covariance[1:, 1:] - np.outer(covariance[1:, 0], covariance[0, 1:])
    law = np.cov(video[0]) + ((1 - wrong) ** 2 * truth[-1, -1] + wrong**2) * np.outer(response, response)
    return np.linalg.norm(law - truth) / np.linalg.norm(truth)


def test_a_video_with_a_corrected_anchor_has_the_joint_law():
    assert _corrected(0.2, 0.2) < 0.02
    assert _corrected(0.0, 0.2) > 0.05  # SDEdit: taken for clean

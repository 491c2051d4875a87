"""The linear-Gaussian preconditioning against the textbook formula and a sampled process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.model import precondition
from mila_jax.model.motion import CORRIDORS
from mila_jax.model.precondition import (
    SCALES, Prior, correlation_parts, covariance, fit_weights, inverse, linear_denoiser, measure_prior, others_gain, preconditioned,
    principal_components,
)  # fmt: skip
from tests.test_model_motion import _rig, carried

TIMES = jnp.asarray([[-1 / 12, 0.0, 1 / 12, 2 / 12, 0.5]])
WAYPOINTS = jnp.asarray([[[-0.8, 0, 0], [0, 0, 0], [0.8, 0.1, 0.05], [1.7, 0.2, 0.1], [5.0, 0.5, 0.2]]])
LEVELS = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 0.9, 0.7, 0.3]), (1, 6, 5))
VARIANCES = np.array([3.0, 0.4])


def _weights():
    r = np.random.default_rng(0).uniform(0.02, 1, (6, 2, len(SCALES)))
    return (VARIANCES[:, None] * r / r.sum(-1, keepdims=True)).astype(np.float32)


def _covariance(view: int, component: int) -> np.ndarray:
    """K by its definition, in float64."""
    k = np.zeros((5, 5))
    for w, (tau, length) in zip(_weights()[view, component].astype(np.float64), SCALES):
        for i in range(5):
            for j in range(5):
                gap, far = abs(float(TIMES[0, i] - TIMES[0, j])), float(jnp.linalg.norm(WAYPOINTS[0, i, :2] - WAYPOINTS[0, j, :2]))
                k[i, j] += w * (float(i == j) if tau == 0 else np.exp(-gap / tau - far / length))
    return k


def _carried():
    return jax.random.normal(jax.random.key(0), (1, 6, 5, 5, 2, 3, 2))


def test_is_the_conditional_law_of_the_process():
    z = _carried()
    x, v, std = linear_denoiser(z, LEVELS, covariance(TIMES, WAYPOINTS, _weights()))
    for view in range(6):
        for c in range(2):
            k = _covariance(view, c)
            s = np.asarray(LEVELS[0, view], np.float64)
            a = np.diag(1 - s)
            joint = a @ k @ a + np.diag(s**2) + 1e-5 * np.eye(5)
            cross = k @ a - np.diag(s)
            for i in range(5):  # each frame is estimated from all frames as it sees them
                data = np.asarray(z[0, view, i, ..., c], np.float64).reshape(5, -1)
                np.testing.assert_allclose(np.asarray(x[0, view, i, ..., c]).reshape(-1), (k @ a @ np.linalg.solve(joint, data))[i], atol=2e-3)
                np.testing.assert_allclose(np.asarray(v[0, view, i, ..., c]).reshape(-1), (cross @ np.linalg.solve(joint, data))[i], atol=2e-3)
            variance = np.diag(k + np.eye(5) - cross @ np.linalg.solve(joint, cross.T))
            np.testing.assert_allclose(std[0, view, :, c] ** 2, variance, atol=2e-3)


def test_clean_frames_are_returned_and_velocity_is_consistent():
    z = _carried()
    y = jnp.stack([z[:, :, i, i] for i in range(5)], 2)
    x, v, _ = linear_denoiser(z, LEVELS, covariance(TIMES, WAYPOINTS, _weights()))
    np.testing.assert_allclose(x[:, :, :2], y[:, :, :2], atol=2e-3)
    # x̂ = y + σ v̂ must hold between the two estimates.
    np.testing.assert_allclose(y + LEVELS[..., None, None, None] * v, x, atol=2e-3)


def test_one_independent_frame_is_the_scalar_formula():
    weights = np.zeros((1, 1, len(SCALES)), np.float32)
    weights[0, 0, 0] = 1
    s = 0.6
    z = jnp.full((1, 1, 2, 2, 1, 1, 1), 2.0)
    k = covariance(jnp.asarray([[0.0, 1.0]]), jnp.zeros((1, 2, 3)), weights)
    _, v, std = linear_denoiser(z, jnp.full((1, 1, 2), s), k)
    total = (1 - s) ** 2 + s**2
    np.testing.assert_allclose(v, (1 - 2 * s) / total * 2.0, rtol=1e-3)
    np.testing.assert_allclose(std**2, 2 - (1 - 2 * s) ** 2 / total, rtol=1e-3)


def _conditions():
    intrinsics, extrinsics = _rig(5)

    class FakeConditions:
        frame_times, waypoints = TIMES, WAYPOINTS

    FakeConditions.intrinsics, FakeConditions.extrinsics = intrinsics, extrinsics
    return FakeConditions


def test_wrapper_scales_the_network_and_shows_it_the_estimate():
    y = jax.random.normal(jax.random.key(1), (1, 6, 5, 2, 3, 2))
    c = _conditions()
    basis = np.array([[0.8, -0.6], [0.6, 0.8]], np.float32)
    seen = {}

    def network(latents, levels, conditions):
        seen["input"] = latents
        return jnp.ones_like(latents[..., :2])

    v = preconditioned(network, Prior(basis, _weights()))(y, LEVELS, c)
    k = covariance(TIMES, WAYPOINTS, _weights())
    x, base, std = linear_denoiser(carried(y @ basis, WAYPOINTS, c.intrinsics, c.extrinsics), LEVELS, k)
    np.testing.assert_allclose(v @ basis - base, np.broadcast_to(std[:, :, :, None, None], v.shape), atol=1e-5)
    np.testing.assert_allclose(seen["input"][..., :2], y @ basis, atol=1e-6)
    np.testing.assert_allclose(seen["input"][..., 2:], x, atol=1e-6)


def test_weights_are_recovered_from_correlations():
    r = np.random.default_rng(0)
    gaps, distances = r.uniform(1 / 12, 3, 400), r.uniform(0, 30, 400)
    parts = np.asarray(correlation_parts(jnp.asarray(gaps), jnp.asarray(distances)), np.float64)
    want = np.einsum("nm,vcm->nvc", parts, _weights())
    variances = np.broadcast_to(VARIANCES, (6, 2))
    weights = fit_weights(want + r.normal(0, 0.02, want.shape) * variances, variances, gaps, distances)
    assert weights.shape == (6, 2, len(SCALES)) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), variances, rtol=1e-5)
    np.testing.assert_allclose(np.einsum("nm,vcm->nvc", parts, weights) / variances, want / variances, atol=0.03)


def test_principal_components_are_a_rotation_that_separates_channels():
    r = np.random.default_rng(0)
    x = r.normal(size=(500, 3)) @ np.diag([3, 1, 0.1]) @ np.linalg.qr(r.normal(size=(3, 3)))[0]
    basis = principal_components(x)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-9)
    moments = (x @ basis).T @ (x @ basis) / 500
    np.testing.assert_allclose(moments - np.diag(np.diag(moments)), 0, atol=1e-9)
    assert moments[0, 0] > moments[1, 1] > moments[2, 2]


def test_a_still_scene_is_known_for_ever_and_noise_not_at_all():
    """A scene is measured through its poses and cameras as the reader gives them."""
    r = np.random.default_rng(0)
    intrinsics, extrinsics = (np.asarray(x)[0].swapaxes(0, 1) for x in _rig(40))
    scene = {
        "times": np.arange(40) / 12,
        "intrinsics": intrinsics,
        "cam2ego_translation": extrinsics[..., :3],
        "cam2ego_rotation": extrinsics[..., 3:],
    }
    scene["ego_translation"], scene["ego_rotation"] = np.zeros((40, 6, 3)), np.broadcast_to([1.0, 0, 0, 0], (40, 6, 4))
    times, still = jnp.asarray([[0.0, 2.0]]), jnp.zeros((1, 2, 3))

    def share(latents):
        """Correlation over two seconds that the fitted prior has, mean over views and components."""
        k = covariance(times, still, measure_prior([scene | {"latents": latents}]).weights)
        return float((k[..., 0, 1] / k[..., 0, 0]).mean())

    picture = np.broadcast_to(r.normal(size=(1, 6, 8, 14, 4)), (40, 6, 8, 14, 4))
    assert share(picture.astype(np.float16)) > 0.95
    assert share(r.normal(size=(40, 6, 8, 14, 4)).astype(np.float16)) < 0.1


def test_gradients_do_not_flow_into_the_prior():
    y = jax.random.normal(jax.random.key(1), (1, 6, 5, 2, 3, 2))
    prior = Prior(np.eye(2, dtype=np.float32), _weights())

    def total(x, scale):
        return preconditioned(lambda x, *_: scale * jnp.ones_like(x[..., :2]), prior)(x, LEVELS, _conditions()).sum()

    through, by_scale = jax.grad(total, argnums=(0, 1))(y, 1.0)
    assert float(jnp.abs(through).max()) == 0 and float(by_scale) > 0


def test_inverse():
    r = np.random.default_rng(0)
    a = r.normal(size=(3, 2, 7, 7))
    m = a @ np.swapaxes(a, -1, -2) + 0.1 * np.eye(7)
    np.testing.assert_allclose(inverse(jnp.asarray(m, jnp.float32)) @ m, np.broadcast_to(np.eye(7), m.shape), atol=1e-3)


def test_no_call_that_waits_for_threads():
    """Two LAPACK calls at a time stop a CPU of two cores for ever."""
    k = covariance(TIMES, WAYPOINTS, _weights())
    text = jax.jit(lambda z: (linear_denoiser(z, LEVELS, k), others_gain(LEVELS, k))).lower(_carried()).compile().as_text()
    assert "lapack" not in text


def test_what_the_others_say_is_the_conditional_law_without_the_frame_itself():
    k = covariance(TIMES, WAYPOINTS, _weights())
    gain = others_gain(LEVELS, k)
    for view in (0, 3):
        for c in range(2):
            full, s = _covariance(view, c), np.asarray(LEVELS[0, view], np.float64)
            for i in range(5):
                rest = [j for j in range(5) if j != i]
                a = np.diag(1 - s[rest])
                want = full[i, rest] @ a @ np.linalg.inv(a @ full[np.ix_(rest, rest)] @ a + np.diag(s[rest] ** 2) + 1e-5 * np.eye(4))
                np.testing.assert_allclose(gain[0, view, c, i, rest], want, atol=2e-3)
                assert gain[0, view, c, i, i] == 0


def test_the_sweep_shows_the_network_what_the_others_say_over_each_corridor():
    y = jax.random.normal(jax.random.key(1), (1, 6, 5, 2, 3, 2))
    c, seen = _conditions(), {}

    def network(latents, levels, conditions):
        seen["input"] = latents
        return jnp.zeros_like(latents[..., :2])

    preconditioned(network, Prior(np.eye(2, dtype=np.float32), _weights()), len(CORRIDORS))(y, LEVELS, c)
    for number, corridor in enumerate(CORRIDORS):
        # A corridor that moves is as far as the car is from it, not from where it set out.
        gain = others_gain(LEVELS, covariance(TIMES, WAYPOINTS * (1 - corridor.moves), _weights()))
        want = jnp.einsum("bvcij,bvijhwc->bvihwc", gain, carried(y, WAYPOINTS, c.intrinsics, c.extrinsics, corridor))
        np.testing.assert_allclose(seen["input"][..., 4 + 2 * number : 6 + 2 * number], want, atol=1e-5)
    assert seen["input"].shape[-1] == 4 + 2 * len(CORRIDORS)


@pytest.mark.parametrize("one_cpu", [True, False])
def test_frames_are_combined_alike_on_every_device(one_cpu, monkeypatch):
    monkeypatch.setattr(precondition, "for_one_cpu", lambda: one_cpu)
    gain, carried = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 4, 5, 5), (2, 3, 5, 5, 2, 3, 4)]))
    want = np.einsum("bvcij,bvijhwc->bvihwc", np.asarray(gain, np.float64), np.asarray(carried, np.float64))
    np.testing.assert_allclose(jax.jit(precondition.combine)(gain, carried), want, atol=1e-5)


def test_what_drives_along_is_found_again_where_it_was():
    """The same picture in all frames, of which the last, 5 m on, are noise: the corridor that drives along says most of it, the standing ones do not."""
    c, seen = _conditions(), {}
    picture = jnp.broadcast_to(jax.random.normal(jax.random.key(2), (1, 6, 1, 2, 3, 2)), (1, 6, 5, 2, 3, 2))
    levels = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 1.0, 1.0, 1.0]), (1, 6, 5))
    y = jnp.where(levels[..., None, None, None] > 0, jax.random.normal(jax.random.key(3), picture.shape), picture)

    def network(latents, levels, conditions):
        seen["input"] = latents
        return jnp.zeros_like(latents[..., :2])

    weights = np.zeros((6, 2, len(SCALES)), np.float32)
    weights[..., SCALES.index((1e4, 6.0))] = 0.95
    weights[..., 0] = 0.05
    preconditioned(network, Prior(np.eye(2, dtype=np.float32), weights), len(CORRIDORS))(y, levels, c)
    error = [float(jnp.square(seen["input"][:, :, 4, ..., 4 + 2 * n : 6 + 2 * n] - picture[:, :, 4]).mean()) for n in range(len(CORRIDORS))]
    along = [corridor.moves for corridor in CORRIDORS].index(1.0)
    assert error[along] < 0.02 * float(jnp.square(picture).mean()) < 0.1 * min(e for n, e in enumerate(error) if n != along)


def test_products_are_exact_on_accelerators(monkeypatch):
    """A TPU would round what goes into them to bfloat16: covariances whose inverses cancel then give nonsense."""
    monkeypatch.setattr(precondition, "for_one_cpu", lambda: False)
    prior = Prior(np.eye(2, dtype=np.float32), _weights())
    velocity = preconditioned(lambda latents, levels, conditions: jnp.zeros_like(latents[..., :2]), prior, len(CORRIDORS), True)
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.params["precision"])
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    if inner := getattr(inner, "jaxpr", inner if hasattr(inner, "eqns") else None):
                        walk(inner)

    walk(jax.make_jaxpr(lambda y: velocity(y, LEVELS, _conditions()))(jnp.zeros((1, 6, 5, 2, 3, 2))).jaxpr)
    assert len(found) > 10 and all(precision == (jax.lax.Precision.HIGHEST,) * 2 for precision in found)

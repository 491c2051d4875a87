"""Preconditioning by the best linear denoiser along the car's motion: the network learns only what linear statistics do not know.

Ours, not the paper's (switch: `model.precondition`; the large presets that load published weights leave it off). Frames of a
driving video are strongly correlated once they are carried along the car's motion (`mila_jax.model.motion`), and some frames of a
window are clean. Latents are first turned into their principal components (a rotation of the channels, so noise stays white). For
frame i, let z_j be frame j as the cameras at frame i would see it (z_i = y_i), and take every element of component c as a
Gaussian process with covariance

    K_ij = w_0 δ_ij + Σ_k w_k exp(-|t_i - t_j| / τ_k - |p_i - p_j| / ℓ_k)

over the frames' times t and the car's places p, with weights of its own for each component and view. With z_j = (1-σ_j) x_j + σ_j ε_j, the posterior
mean and variance of x_i and of the velocity x_i - ε_i given all frames of the window are then closed-form (a t×t solve per component and view):

    A = diag(1-σ), D = diag(σ), M = A K A + D²
    E[x | z] = K A M⁻¹ z,    E[v | z] = (K A - D) M⁻¹ z,    Var[v | z] = diag(K + I - (K A - D) M⁻¹ (K A - D)ᵀ)

With `sweep` > 0 the network also sees what the *other* frames say of each frame, E[x_i | z_j, j ≠ i], carried over that many corridors
(`motion.CORRIDORS`): a plane sweep. On a clean frame that shows which corridor is right, place by place; `mila_jax.model.evidence` carries that
to the noisy ones.

The network sees y and E[x | z] and its output is scaled: v = E[v | z] + sqrt(Var[v | z]) · F. This is Karras et al. 2022's
preconditioning with a prior over the window in place of a single variance; with K = identity it is theirs for rectified flow.
With `mixture` the network also gives weights a_k, at each place, of the guesses g_k = E[x_i | z_j, j ≠ i] over the corridors, and the prior's mean of
the frame moves by Σ_k a_k g_k. What a velocity becomes when the mean moves by d is closed-form, too:

    z_i given the others has variance 1/P_ii, P = M⁻¹, so that E[v | z] moves by σ P_ii d

so a network that knows which corridor is right where need not carry what it shows through its own width.

Levels may differ from frame to frame, so clean frames, TPD and noisy anchors need no special case.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from mila_jax import geometry
from mila_jax.model.cpu_gradients import for_one_cpu
from mila_jax.model.evidence import evidence
from mila_jax.model.motion import CORRIDORS, EXACT, carry, find
from mila_jax.views import view_index

# Pairs (seconds, metres) over which a part of the correlation falls by e; the first stands for what no two frames share.
SCALES = ((0.0, 0.0), *itertools.product((0.3, 2.0, 1e4), (1.5, 6.0, 25.0, 1e4)))


class Prior(NamedTuple):
    """What is measured on the training latents: basis [c, c], whose columns are the principal components, and weights [v, c, m] of
    the parts of the covariance, m = len(SCALES); they add up to the component's variance."""

    basis: np.ndarray
    weights: np.ndarray


def correlation_parts(gap, distance):
    """The parts of the covariance at time gaps and distances [...] (seconds, metres) → [..., len(SCALES)], each 1 at (0, 0)."""
    same = ((gap == 0) & (distance == 0)).astype(gap.dtype)
    parts = [jnp.exp(-gap / tau - distance / length) for tau, length in SCALES[1:]]
    return jnp.stack([same, *parts], -1)


def covariance(frame_times, waypoints, weights):
    """K for frame_times [b, t] seconds, waypoints [b, t, 3] and weights [v, c, len(SCALES)] → [b, v, c, t, t] float32."""
    gap = jnp.abs(frame_times[..., :, None] - frame_times[..., None, :])
    places = waypoints[..., :2]
    distance = jnp.sqrt(jnp.square(places[..., :, None, :] - places[..., None, :, :]).sum(-1))
    parts = correlation_parts(gap, distance)
    # Two frames at one time and place are still two frames: the first part is theirs alone.
    parts = parts.at[..., 0].set(jnp.eye(gap.shape[-1], dtype=parts.dtype))
    return jnp.einsum("bijm,vcm->bvcij", parts, jnp.asarray(weights, jnp.float32), precision=EXACT)


def inverse(m):
    """Inverses of symmetric positive definite matrices [..., t, t], by Gauss-Jordan elimination without pivots, which those need none of.

    Not LAPACK: on a CPU, two of its calls that run at the same time wait for threads that each other holds, for ever on two cores; and
    a TPU has none.
    """
    place = jnp.arange(m.shape[-1])

    def eliminate(k, a):
        here = place == k
        pivot = jax.lax.dynamic_slice_in_dim(a, k, 1, -2)  # [..., 1, t]
        column = jax.lax.dynamic_slice_in_dim(a, k, 1, -1)  # [..., t, 1]
        scale = 1 / jax.lax.dynamic_slice_in_dim(pivot, k, 1, -1)
        pivot = jnp.where(here, 1.0, pivot) * scale
        return jnp.where(here[:, None], pivot, jnp.where(here, 0.0, a) - column * pivot)

    return jax.lax.fori_loop(0, m.shape[-1], eliminate, m)


def combine(gain, carried):
    """Σ_j gain_ij z_j for gain [b, v, c, t (i), t (j)] and carried frames z [b, v, t (i), t (j), h, w, c] → [b, v, t, h, w, c]."""
    if not for_one_cpu():
        return jnp.einsum("bvcij,bvijhwc->bvihwc", gain, carried, precision=EXACT)
    # As a product, the compiler would carry one number at a time, frames innermost, to have them lie as the product wants them; a sum without the
    # loop would be taken in the order of the network's patches, which has the same fault.
    gain = jnp.moveaxis(gain, 2, -1)[..., None, None, :]
    total = jnp.zeros(carried.shape[:3] + carried.shape[4:], carried.dtype)
    return jax.lax.fori_loop(0, carried.shape[3], lambda j, y: y + gain[:, :, :, j] * carried[:, :, :, j], total)


def linear_denoiser(carried, levels, k):
    """The linear-Gaussian posterior described above.

    carried [b, v, t (i), t (j), h, w, c]: frames at noise levels [b, v, t] as `motion.carry` gives them, in principal components;
    k [b, v, c, t, t]. Returns E[x | z] and E[v | z] [b, v, t, h, w, c], and the standard deviation of v given z [b, v, t, c].
    """
    eye = jnp.eye(k.shape[-1], dtype=k.dtype)
    level = levels[:, :, None]  # the same for all components
    ka = k * (1 - level)[..., None, :]
    # Per-frame weights first (t×t per component), then one product with the latents: cheap beside the network.
    cross = ka - eye * level[..., None]  # Cov(v, z)
    m = inverse(moments(levels, k))
    gain_x, gain_v = (jnp.matmul(x, m, precision=EXACT) for x in (ka, cross))  # [b, v, c, t, t]
    variance = 1 + jnp.diagonal(k, axis1=-2, axis2=-1) - (gain_v * cross).sum(-1)
    return combine(gain_x, carried), combine(gain_v, carried), jnp.sqrt(jnp.clip(jnp.swapaxes(variance, -1, -2), 1e-6))


def others_gain(levels, k):
    """E[x_i | z_j, j ≠ i] = Σ_j gain_ij z_j, levels [b, v, t] and k [b, v, c, t, t] as in `linear_denoiser` → [b, v, c, t, t], diagonal 0.

    With P = M⁻¹, the inverse without row and column i is P - P_i P_iᵀ / P_ii.
    """
    others = 1 - jnp.eye(k.shape[-1], dtype=k.dtype)
    p = inverse(moments(levels, k))
    gain = jnp.matmul(k * (1 - levels[:, :, None])[..., None, :] * others, p, precision=EXACT)
    own = jnp.diagonal(gain, axis1=-2, axis2=-1) / jnp.diagonal(p, axis1=-2, axis2=-1)
    return (gain - own[..., None] * p) * others


def moments(levels, k):
    """M = A K A + D² [b, v, c, t, t], with a small term more for frames that are one and the same."""
    keep = 1 - levels[:, :, None]
    eye = jnp.eye(k.shape[-1], dtype=k.dtype)
    return keep[..., :, None] * k * keep[..., None, :] + eye * (levels[:, :, None, :, None] ** 2 + 1e-5)


def input_channels(channels: int, sweep: int, evidence: bool) -> int:
    """Channels that a network preconditioned so sees, of latents with `channels`."""
    return channels * (2 + sweep) + (channels + 2 * sweep if evidence else 0)


def mixture_size(sweep: int, evidence: bool) -> int:
    """Guesses that a network with a mixture weighs: one for each corridor, and with evidence the mixed one."""
    return sweep + evidence


def moved_mean(levels, k):
    """By how much E[v | z] moves where the prior's mean of a frame, given the others, moves by 1; levels [b, v, t], k [b, v, c, t, t] as in
    `linear_denoiser` → [b, v, t, c]."""
    precision = jnp.diagonal(inverse(moments(levels, k)), axis1=-2, axis2=-1)
    return levels[..., None] * jnp.swapaxes(precision, -1, -2)


def preconditioned(network, prior: Prior, sweep: int = 0, with_evidence: bool = False, mixture: bool = False):
    """Wraps `network(x [b, v, t, h, w, input_channels], levels, conditions) -> F` into a velocity function (see the top of this file).

    The network sees the frames, their means, the guesses of the sweep, and with evidence the mixed guess and the misfits. With mixture it gives
    `mixture_size` channels more than F's: a weight for each guess at each place.

    The network sees and gives principal components. The prior always knows the waypoints: dropping them (guidance) concerns the
    network alone. Raises `ValueError` for evidence or a mixture without corridors.
    """
    if (with_evidence or mixture) and not sweep:
        raise ValueError("evidence and mixture need corridors to choose from: sweep is 0")
    basis = jnp.asarray(prior.basis, jnp.float32)

    def velocity(latents, levels, conditions):
        y = jax.lax.stop_gradient(jnp.matmul(latents.astype(jnp.float32), basis, precision=EXACT))
        rig = conditions.waypoints, conditions.intrinsics, conditions.extrinsics
        places = [find(*y.shape[3:5], *rig, corridor) for corridor in CORRIDORS[: max(sweep, 1)]]
        carried = carry(y, places[0])
        k = covariance(conditions.frame_times, conditions.waypoints, prior.weights)
        x, v, std = jax.lax.stop_gradient(linear_denoiser(carried, levels, k))
        gain = others_gain(levels, k) if sweep else None
        guesses = []
        for corridor, place in zip(CORRIDORS[:sweep], places):
            guess = carried if corridor == CORRIDORS[0] else carry(y, place)
            # What moves with the car is near it whatever the way: its frames are as alike as those of a standing car.
            near = covariance(conditions.frame_times, corridor.way(conditions.waypoints), prior.weights) if corridor.moves else k
            own = others_gain(levels, near) if corridor.moves else gain
            guesses.append(jax.lax.stop_gradient(combine(own, guess)))
        seen = [y, x, *guesses]
        if with_evidence:
            seen += jax.lax.stop_gradient(evidence(guesses, x, levels, conditions.frame_times, places))
        f = network(jnp.concatenate(seen, -1), levels, conditions)
        channels = y.shape[-1]
        v = v + std[:, :, :, None, None] * f[..., :channels]
        if mixture:
            guesses += seen[2 + sweep : 3 + sweep] if with_evidence else []
            moved = sum(f[..., channels + i, None] * guess for i, guess in enumerate(guesses))
            v = v + jax.lax.stop_gradient(moved_mean(levels, k))[:, :, :, None, None] * moved
        return jnp.matmul(v, basis.T, precision=EXACT)

    return velocity


def principal_components(latents) -> np.ndarray:
    """Columns [c, c] of falling variance, from latents [..., c] whose channels have mean 0; signs fixed, so that all machines agree."""
    flat = np.asarray(latents, np.float64).reshape(-1, latents.shape[-1])
    basis = np.linalg.eigh(flat.T @ flat)[1][:, ::-1]
    return basis * np.where(basis[np.abs(basis).argmax(0), np.arange(len(basis))] < 0, -1.0, 1.0)


def fit_weights(products, variances, gaps, distances) -> np.ndarray:
    """Weights of each view and component from data, by non-negative least squares.

    products [n, v, c]: mean product of the frames of a pair, carried onto each other; variances [v, c]; gaps [n] seconds, distances
    [n] metres of the pairs. Returns [v, c, len(SCALES)] float32 that sum to the variances. Non-negative weights make the
    covariance positive definite.
    """
    parts = np.asarray(correlation_parts(jnp.asarray(gaps, jnp.float32), jnp.asarray(distances, jnp.float32)), np.float64)
    # A strongly weighted row asks that they add up to one.
    matrix = np.concatenate([parts, np.full((1, len(SCALES)), float(len(parts)))])
    weights = np.zeros(variances.shape + (len(SCALES),))
    for place in np.ndindex(*variances.shape):
        target = np.append(products[(slice(None), *place)] / variances[place], float(len(parts)))
        weights[place] = nnls(matrix, target)[0]
    return (weights * (variances[..., None] / weights.sum(-1, keepdims=True))).astype(np.float32)


LAGS = (1, 2, 3, 6, 12, 18, 24, 36)  # frames at 12 Hz
PAIRS = 12  # of each lag in a scene


def measure_prior(scenes) -> Prior:
    """The prior of scenes as `data_pipeline.clips.read_scene` gives them (latents normalised); each must be longer than a frame."""
    scenes = list(scenes)
    basis = principal_components(np.concatenate([s["latents"][::6] for s in scenes]))
    compare = jax.jit(_compare)
    parts = []
    for scene in scenes:
        pairs = _pairs(len(scene["times"]))
        front = view_index("CAM_FRONT")
        poses = [geometry.relative_waypoints(scene["ego_translation"][p, front], scene["ego_rotation"][p, front], 0) for p in pairs]
        waypoints = np.stack(poses).astype(np.float32)
        extrinsics = np.concatenate([scene["cam2ego_translation"], scene["cam2ego_rotation"]], -1)
        latents, intrinsics, extrinsics = (
            np.moveaxis(np.asarray(x, np.float32)[pairs], 1, 2) for x in (scene["latents"], scene["intrinsics"], extrinsics)
        )  # [n, v, 2, …]
        product, power = compare(latents @ np.asarray(basis, np.float32), waypoints, intrinsics, extrinsics)
        gaps = np.abs(np.diff(scene["times"][pairs], axis=1)[:, 0])
        parts.append((np.asarray(product), np.asarray(power), gaps, np.linalg.norm(waypoints[:, 1, :2], axis=-1)))
    products, powers, gaps, distances = (np.concatenate(x) for x in zip(*parts))
    return Prior(basis.astype(np.float32), fit_weights(products, np.maximum(powers.mean(0), 1e-6), gaps, distances))


def _pairs(frames: int) -> np.ndarray:
    """Numbers [n, 2] of later and earlier frames of a scene, evenly spread, at each lag that it has."""
    lags = [lag for lag in LAGS if lag < frames]
    return np.array([(i, i - lag) for lag in lags for i in np.linspace(lag, frames - 1, PAIRS).astype(int)])


def _compare(latents, waypoints, intrinsics, extrinsics):
    """Mean product of the first frame of each pair with the second, carried to it, and the first's mean square; both [n, v, c]."""
    carried = carry(latents, find(*latents.shape[3:5], waypoints, intrinsics, extrinsics))[:, :, 0, 1]
    own = latents[:, :, 0]
    return (own * carried).mean((-3, -2)), (own * own).mean((-3, -2))

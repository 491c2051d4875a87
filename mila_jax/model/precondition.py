"""Preconditioning by the best linear denoiser along the car's motion: the network learns only what linear statistics do not know.

Ours, not the paper's (switch: `model.precondition`; the large presets that load published weights leave it off). Frames of a
driving video are strongly correlated once they are carried along the car's motion (`mila_jax.model.motion`), and some frames of a
window are clean. For frame i, let z_j be frame j as the cameras at frame i would see it (z_i = y_i), and take every latent
element as a Gaussian process with unit variance and covariance

    K_ij = w_0 δ_ij + Σ_k w_k exp(-|t_i - t_j| / τ_k - |p_i - p_j| / ℓ_k)

over the frames' times t and the car's places p. With z_j = (1-σ_j) x_j + σ_j ε_j, the posterior mean and variance of x_i and of
the velocity x_i - ε_i given all frames of the window are then closed-form (a t×t solve per view):

    A = diag(1-σ), D = diag(σ), M = A K A + D²
    E[x | z] = K A M⁻¹ z,    E[v | z] = (K A - D) M⁻¹ z,    Var[v | z] = diag(K + I - (K A - D) M⁻¹ (K A - D)ᵀ)

The network sees y and E[x | z] and its output is scaled: v = E[v | z] + sqrt(Var[v | z]) · F. This is Karras et al. 2022's
preconditioning with a prior over the window in place of a single variance; with K = identity it is theirs for rectified flow.
Levels may differ from frame to frame, so clean frames, TPD and noisy anchors need no special case.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from mila_jax.model.motion import carry

# Pairs (seconds, metres) over which a part of the correlation falls by e; the first stands for what no two frames share.
SCALES = ((0.0, 0.0), *itertools.product((0.3, 2.0, 1e4), (1.5, 6.0, 25.0, 1e4)))


def correlation_basis(gap, distance):
    """The parts of the covariance at time gaps and distances [...] (seconds, metres) → [..., len(SCALES)], each 1 at (0, 0)."""
    same = ((gap == 0) & (distance == 0)).astype(gap.dtype)
    parts = [jnp.exp(-gap / tau - distance / length) for tau, length in SCALES[1:]]
    return jnp.stack([same, *parts], -1)


def covariance(frame_times, waypoints, weights):
    """K for frame_times [..., t] seconds, waypoints [..., t, 3] and weights [v, len(SCALES)] → [..., v, t, t] float32."""
    gap = jnp.abs(frame_times[..., :, None] - frame_times[..., None, :])
    places = waypoints[..., :2]
    distance = jnp.sqrt(jnp.square(places[..., :, None, :] - places[..., None, :, :]).sum(-1))
    basis = correlation_basis(gap, distance)
    # Two frames at one time and place are still two frames: the first part is theirs alone.
    basis = basis.at[..., 0].set(jnp.eye(gap.shape[-1], dtype=basis.dtype))
    return jnp.einsum("...ijm,vm->...vij", basis, jnp.asarray(weights, jnp.float32))


def linear_denoiser(carried, levels, k):
    """The linear-Gaussian posterior described above.

    carried [b, v, t (i), t (j), h, w, c]: frames at noise levels [b, v, t] as `motion.carry` gives them; k [b, v, t, t] covariance.
    Returns E[x | z] and E[v | z] [b, v, t, h, w, c], and the standard deviation of v given z [b, v, t].
    """
    eye = jnp.eye(k.shape[-1], dtype=k.dtype)
    keep = 1 - levels
    ka = k * keep[..., None, :]
    m = keep[..., :, None] * ka + eye * (levels**2)[..., None] + 1e-5 * eye  # the small term: two frames that are one
    # Per-frame weights first (t×t per view), then one product with the latents: cheap beside the network.
    cross = ka - eye * levels[..., None]  # Cov(v, z)
    solve = jnp.linalg.solve(m, jnp.concatenate([jnp.swapaxes(ka, -1, -2), jnp.swapaxes(cross, -1, -2)], -1))
    gain_x, gain_v = jnp.split(jnp.swapaxes(solve, -1, -2), 2, axis=-2)  # [b, v, t, t]
    variance = 1 + jnp.diagonal(k, axis1=-2, axis2=-1) - (gain_v * cross).sum(-1)
    x, v = (jnp.einsum("bvij,bvijhwc->bvihwc", gain, carried) for gain in (gain_x, gain_v))
    return x, v, jnp.sqrt(jnp.clip(variance, 1e-6))


def preconditioned(network, weights):
    """Wraps `network(x [b, v, t, h, w, 2c], levels, conditions) -> F` into a velocity function (see the top of this file).

    The prior always knows the waypoints: dropping them (guidance) concerns the network alone.
    """

    def velocity(latents, levels, conditions):
        carried = carry(latents.astype(jnp.float32), conditions.waypoints, conditions.intrinsics, conditions.extrinsics)
        k = covariance(conditions.frame_times, conditions.waypoints, weights)
        x, v, std = jax.lax.stop_gradient(linear_denoiser(carried, levels, k))
        f = network(jnp.concatenate([latents, x.astype(latents.dtype)], -1), levels, conditions)
        return v + std[..., None, None, None] * f

    return velocity


def fit_covariance(correlations, gaps, distances) -> np.ndarray:
    """Weights of each view from data, by non-negative least squares.

    correlations [n, v]: of pairs of frames, carried onto each other; gaps [n] seconds, distances [n] metres of the pairs. Returns
    [v, len(SCALES)] float32 whose rows sum to 1. Non-negative weights make the covariance positive definite.
    """
    basis = np.asarray(correlation_basis(jnp.asarray(gaps, jnp.float32), jnp.asarray(distances, jnp.float32)), np.float64)
    # A strongly weighted row asks for K(0, 0) = 1.
    basis = np.concatenate([basis, np.full((1, len(SCALES)), 1.0 * len(basis))])
    target = np.concatenate([np.asarray(correlations, np.float64), np.full((1, correlations.shape[1]), 1.0 * len(correlations))])
    weights = np.stack([nnls(basis, target[:, v])[0] for v in range(target.shape[1])])
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


LAGS = (1, 2, 3, 6, 12, 18, 24, 36)  # frames at 12 Hz
PAIRS = 12  # of each lag in a scene


def measure_correlations(scenes):
    """What `fit_covariance` takes, from scenes as `data_pipeline.clips.read_scene` gives them (latents normalised)."""
    from mila_jax import geometry

    product, power, gaps, distances = [], [], [], []
    compare = jax.jit(_compare)
    for scene in scenes:
        n = len(scene["times"])
        chosen = [(i, i - lag) for lag in LAGS if lag < n for i in np.linspace(lag, n - 1, PAIRS).astype(int)]
        if not chosen:
            continue
        pairs = np.array(chosen)
        poses = [geometry.relative_waypoints(scene["ego_translation"][p, 1], scene["ego_rotation"][p, 1], 0) for p in pairs]
        waypoints = np.stack(poses).astype(np.float32)
        extrinsics = np.concatenate([scene["cam2ego_translation"], scene["cam2ego_rotation"]], -1).astype(np.float32)
        latents = np.asarray(scene["latents"], np.float32)
        both = [np.moveaxis(x[pairs], 1, 2) for x in (latents, scene["intrinsics"].astype(np.float32), extrinsics)]  # [n, v, 2, …]
        got, own = compare(both[0], waypoints, *both[1:])
        product.append(np.asarray(got))
        power.append(np.asarray(own))
        gaps.append(np.abs(np.diff(scene["times"][pairs], axis=1)[:, 0]))
        distances.append(np.linalg.norm(waypoints[:, 1, :2], axis=-1))
    return np.concatenate(product) / np.concatenate(power).mean(0), np.concatenate(gaps), np.concatenate(distances)


def _compare(latents, waypoints, intrinsics, extrinsics):
    """Mean product of the first frame of each pair with the second, carried to it, and the first's mean square; both [n, v]."""
    carried = carry(latents, waypoints, intrinsics, extrinsics)[:, :, 0, 1]
    own = latents[:, :, 0]
    axes = (-3, -2, -1)
    return (own * carried).mean(axes), (own * own).mean(axes)
